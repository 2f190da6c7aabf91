"""One decision on a base that knows its language: does OrchMoE beat a LoRA of the same size there?

The point is a small rank, many tasks with dozens of examples each, and a router that moves. The
training tasks are drawn by name among those whose prompts fit. All other tasks are unseen: the
official test tasks, and the training tasks that are left out. docs/evidence.md has the plan, which
was written before the cells were made.

    python -m experiments.decision --stage pilot --data natural-instructions --model smollm2
    python -m experiments.decision --stage cells --data natural-instructions --model smollm2
    python -m experiments.decision                   # the tables of the finished cells

The pilot makes floor and ceiling alone, with three seeds: if they do not differ by three times the
noise of a run, no router can show anything here. `cells` tunes the three methods, with the same
number of trials, and makes all cells. Stages go on after an interruption. Without --results the
cells are those of this repository.
Test: pytest tests/experiments/test_map.py
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

import data
import runtime
import tokenizer as tokenizers
from experiments.map import ROWS as MAP_ROWS
from experiments.map import Group, difference, read_groups, stage_table
from experiments.study import FIXED, Row, Study, pick_device, read_study, subset
from experiments.tables import Difference, signed, table

RESULTS = runtime.ROOT / "experiments/results/decision"
EQUAL = {"orchmoe": Row(), "lora": Row({"method": "lora"}), "moe-lora": Row({"method": "moe-lora"})}
ROWS = EQUAL | {name: MAP_ROWS[name] for name in ("floor", "ceiling")}
MARGIN = 0.02  # nats; a smaller difference counts as none

DEFAULTS = {
    "out": "results/decision",
    "results": str(RESULTS),
    "seeds": 5,
    "trials": 5,
    "dtype": "float32",
    "steps": 180,
    "batch_size": 8,
    "warmup": 20,
    "eval_every": 90,
    "eval_instances": 1600,
    "train_instances": 60,
    "num_pos": 0,
    "max_source_length": 200,
    "max_target_length": 64,
    "tasks": 24,
    "rank": 1,
    "lr_skills": 1e-2,
    "lr_allocation": 1e-1,
    "lr_router": 1e-3,
}


@dataclass(frozen=True)
class DecisionConfig:
    """Decision: which cells are made."""

    stage: Literal["pilot", "cells", "table"] = "table"  # what is made
    train_tasks: int = 24  # training tasks, drawn by name


def fitting_tasks(study: Study, number: int) -> list[str]:
    """Return so many training tasks, drawn by name among those that fit.

    A task fits if it has 100 different instances, and if at least 95 % of its prompts are whole.
    """
    settings = study.settings
    tokenizer = tokenizers.load(settings.train.model)
    root = Path(settings.data.data)
    names = sorted(data.read_splits(root)["train"])
    random.Random("decision").shuffle(names)
    found = []
    for name in names:
        task = data.read_task(root / "tasks" / f"{name}.json")
        instances = task["instances"][:100]
        whole = 0
        for instance in instances:
            prompt = data.render_prompt(
                task,
                instance,
                tokenizer,
                num_pos=0,
                max_source_length=settings.data.max_source_length,
            )
            whole += prompt.endswith("Output: ")
        different = {instance["input"] for instance in instances}
        if len(different) == 100 and whole >= 95:
            found.append(name)
        if len(found) == number:
            return sorted(found)
    raise ValueError(f"{root}: {len(found)} training tasks fit, fewer than {number}")


def data_of(study: Study, number: int) -> str:
    """Return a data folder with the training tasks, in which all other tasks are test tasks."""
    root = Path(study.settings.data.data)
    lists = data.read_splits(root)
    chosen = fitting_tasks(study, number)
    left_out = sorted(set(lists["train"]) - set(chosen))
    runtime.write_json(
        study.results / "tasks.json",
        {"train": chosen, "test": sorted(lists["test"]), "left out": left_out},
    )
    return str(subset(Path(study.config.out, "tasks"), root, chosen, [*lists["test"], *left_out]))


# ---------------------------------------------------------------------------------------- tables


def with_groups(cell: dict[str, Any], lists: dict[str, list[str]]) -> dict[str, Any]:
    """Return the cell with the two groups of unseen tasks as sets of their own."""
    parts = {}
    for group in ("test", "left out"):
        tasks = {}
        for name, scores in cell["unseen"]["tasks"].items():
            if name in lists[group]:
                tasks[name] = scores
        mean = float(np.mean([scores["loss"] for scores in tasks.values()]))
        parts[group] = {"tasks": tasks, "overall": {"loss": mean}}
    return cell | parts


def verdict(found: Difference) -> str:
    """Return what a difference of OrchMoE from another row decides, by its 95 % interval."""
    _, low, high = found
    if high < 0:
        return "better"
    if low > 0:
        return "worse"
    if -MARGIN < low and high < MARGIN:
        return f"equivalent within {MARGIN}"
    return "undecided"


def text(results: Path) -> str:
    """Return the tables of the finished cells in Markdown."""
    lists = runtime.read_json(results / "tasks.json")
    sets = ("seen", "unseen", "test", "left out")
    parts = []
    for stage in ("pilot", "cells"):
        groups: dict[str, Group] = {}
        for name, group in read_groups(results / stage).items():
            groups[name] = {seed: with_groups(cell, lists) for seed, cell in group.items()}
        ordered = {name: groups[name] for name in ROWS if name in groups}
        first = "floor" if stage == "pilot" else "lora"
        parts.append(stage_table(stage, ordered, first, sets))
        if stage == "cells" and "orchmoe" in ordered:
            rows = []
            for name in ordered.keys() - {"orchmoe"}:
                for which in sets:
                    found = difference(ordered["orchmoe"], ordered[name], which)
                    rows.append([f"orchmoe - {name}", which, signed(found), verdict(found)])
            parts.append(table(["difference", "tasks", "nats", "verdict"], sorted(rows)))
    return "\n\n".join(part for part in parts if part) + "\n"


def main() -> None:
    fixed = (*FIXED, "splits", "max_tasks", "alpha", "router")
    _, config, study_config, settings = read_study(__doc__, DecisionConfig, DEFAULTS, fixed)
    if config.stage != "table":
        study = Study(settings, pick_device(study_config, settings), study_config, EQUAL)
        values = {"data": data_of(study, config.train_tasks)}
        if config.stage == "pilot":
            rows = {name: ROWS[name] for name in ("floor", "ceiling")}
            study.run(study.cells("pilot", rows, {"": values}, range(3), "losses"))
        else:
            study.tune(EQUAL, study_config.trials, ("lr_skills", "alpha"), **values)
            seeds = range(study_config.seeds)
            study.run(study.cells("cells", ROWS, {"": values}, seeds, "losses"))

    results = Path(study_config.results)
    runtime.require_path(results / "tasks.json", "make the cells with --stage")
    tables = text(results)
    runtime.print_line(tables)
    with runtime.atomic_write(results / "tables.md") as file:
        file.write(tables.encode())


if __name__ == "__main__":
    runtime.run_program(main)
