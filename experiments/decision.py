"""One decision: does OrchMoE beat a LoRA of the same total size on a pretrained base?

The setting is a small rank, many tasks with dozens of examples each, and a high rate of the router.
The training tasks are drawn with a fixed seed among those whose prompts fit. All other tasks that
fit are unseen: official test tasks, and training tasks that are left out. The two primary outcomes
are OrchMoE minus LoRA on seen and on unseen tasks. MoE-LoRA has the same S and R, and more weights
in its routers. For floor and ceiling see experiments/map.py.

    python -m experiments.decision --stage pilot --data natural-instructions --model smollm2
    python -m experiments.decision --stage cells --data natural-instructions --model smollm2
    python -m experiments.decision                   # the tables of the finished cells

The pilot makes floor and ceiling alone, with at most three seeds. If the ceiling is not better on
seen tasks by three times the noise of a run, the decision is not worth its cells. `cells` tunes the
three methods, with the same number of trials over lr_skills and alpha, and makes all cells. Stages
go on after an interruption. Without --results the cells are those of this repository.
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
from experiments.map import Group, difference, losses, read_groups, stage_table
from experiments.study import FIXED, Row, Study, pick_device, read_study, subset
from experiments.tables import Difference, publish, signed, table

RESULTS = runtime.ROOT / "experiments/results/decision"
EQUAL = {"orchmoe": Row(), "lora": Row({"method": "lora"})}
TUNED = EQUAL | {"moe-lora": Row({"method": "moe-lora"})}
ROWS = TUNED | {name: MAP_ROWS[name] for name in ("floor", "ceiling")}
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
    "eval_every": 180,
    "eval_instances": 880,
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

    stage: Literal["pilot", "cells", "table"] = "table"  # what is made; table: nothing
    train_tasks: int = 24  # number of training tasks


def whole_prompts(
    config: data.DataConfig, task: str, tokenizer: tokenizers.Tokenizer
) -> tuple[float, int]:
    """Return the share of prompts that fit, and the number of different inputs, of a task.

    Both are of its first 100 instances.
    """
    values = data.read_task(Path(config.data, "tasks", f"{task}.json"))
    instances = values["instances"][:100]
    whole = 0
    for instance in instances:
        prompt = data.render_prompt(
            values, instance, tokenizer, num_pos=0, max_source_length=config.max_source_length
        )
        whole += prompt.endswith("Output: ")
    return whole / len(instances), len({instance["input"] for instance in instances})


def choose_tasks(study: Study, number: int) -> dict[str, list[str]]:
    """Return the training tasks and both groups of unseen tasks: {"train", "test", "left out"}.

    Only tasks of which 95 % of the prompts are whole take part. `number` of the training tasks with
    100 different inputs are drawn with a fixed seed. Raise ValueError if there are fewer.
    """
    config = study.settings.data
    tokenizer = tokenizers.load(study.settings.train.model)
    lists = data.read_splits(config.data)
    test = []
    for task in sorted(lists["test"]):
        share, _ = whole_prompts(config, task, tokenizer)
        if share >= 0.95:
            test.append(task)
    order = sorted(lists["train"])
    random.Random("decision").shuffle(order)
    train = []
    left_out = []
    for task in order:
        share, different = whole_prompts(config, task, tokenizer)
        if share >= 0.95 and different == 100 and len(train) < number:
            train.append(task)
        elif share >= 0.95:
            left_out.append(task)
    if len(train) < number:
        raise ValueError(f"{config.data}: {len(train)} training tasks fit, fewer than {number}")
    return {"train": sorted(train), "test": test, "left out": sorted(left_out)}


def data_of(study: Study, number: int) -> str:
    """Return a data folder with these tasks, in which all unseen tasks are test tasks."""
    path = study.results / "tasks.json"
    tasks = choose_tasks(study, number)
    if path.exists() and runtime.read_json(path) != tasks:
        raise ValueError(f"{path}: made with other tasks; name another folder with --results")
    runtime.write_json(path, tasks)
    folder = Path(study.config.out, "tasks")
    unseen = [*tasks["test"], *tasks["left out"]]
    return str(subset(folder, Path(study.settings.data.data), tasks["train"], unseen))


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
    if -MARGIN < low and high < MARGIN:
        return f"equivalent within {MARGIN}"
    if high < 0:
        return "better"
    if low > 0:
        return "worse"
    return "undecided"


def text(results: Path) -> str:
    """Return the tables of the finished cells in Markdown."""
    lists = runtime.read_json(results / "tasks.json")
    sets = ("seen", "unseen", "test", "left out")
    parts = []
    for stage, first in (("pilot", "floor"), ("cells", "lora")):
        groups: dict[str, Group] = {}
        for name, group in read_groups(results / stage).items():
            groups[name] = {seed: with_groups(cell, lists) for seed, cell in group.items()}
        ordered = {name: groups[name] for name in ROWS if name in groups}
        parts.append(stage_table(stage, ordered, first, sets))
        if stage == "pilot" and ordered.keys() == {"floor", "ceiling"}:
            floor, ceiling = (losses(ordered[name], "seen") for name in ("floor", "ceiling"))
            gain = np.mean(floor) - np.mean(ceiling)
            noise = max(np.std(floor, ddof=1), np.std(ceiling, ddof=1))
            parts.append(
                f"Seen: floor minus ceiling {gain:.3f}, {gain / noise:.1f} times the noise."
            )
        if stage == "cells" and "orchmoe" in ordered:
            rows = []
            for name in [name for name in ordered if name != "orchmoe"]:
                for which in sets:
                    found = difference(ordered, "orchmoe", name, which)
                    if found:
                        row = [f"orchmoe - {name}", which, signed(found), verdict(found)]
                        rows.append(row)
            parts.append(table(["difference", "tasks", "nats", "verdict"], rows))
    return "\n\n".join(part for part in parts if part) + "\n"


def main() -> None:
    fixed = (*FIXED, "splits", "max_tasks", "alpha", "router", "tune")
    _, config, study_config, settings = read_study(__doc__, DecisionConfig, DEFAULTS, fixed)
    if config.stage != "table":
        study = Study(settings, pick_device(study_config, settings), study_config, EQUAL)
        values = {"data": data_of(study, config.train_tasks)}
        if config.stage == "pilot":
            rows = {name: ROWS[name] for name in ("floor", "ceiling")}
            seeds = range(min(3, study_config.seeds))
            study.run(study.cells("pilot", rows, {"": values}, seeds, "losses"))
        else:
            study.tune(TUNED, study_config.trials, ("lr_skills", "alpha"), **values)
            seeds = range(study_config.seeds)
            study.run(study.cells("cells", ROWS, {"": values}, seeds, "losses"))

    results = Path(study_config.results)
    runtime.require_path(results / "tasks.json", "make the cells with --stage")
    publish(text(results), results / "tables.md")


if __name__ == "__main__":
    runtime.run_program(main)
