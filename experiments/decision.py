"""One decision: does OrchMoE beat a LoRA of the same total size on a pretrained base?

experiments/results/decision/plan.md has the plan, which was written before the first cell. This
program is the plan: it takes no flags for what the plan says. The setting is a small rank, many
tasks with dozens of examples each, and a high rate of the router. The training tasks are drawn with
a fixed seed among those whose prompts fit. All other tasks that fit are unseen: official test
tasks, and training tasks that are left out. The two primary outcomes are OrchMoE minus LoRA on seen
and on unseen tasks. MoE-LoRA has the same S and R, and more weights in its routers. For floor and
ceiling see experiments/map.py.

    python -m experiments.decision --stage pilot --data natural-instructions --model smollm2
    python -m experiments.decision --stage cells --data natural-instructions --model smollm2
    python -m experiments.decision --stage after --data natural-instructions --model smollm2
    python -m experiments.decision --stage many --data natural-instructions --model smollm2
    python -m experiments.decision                   # the tables of the finished cells

The pilot makes floor and ceiling alone, with three seeds. If the ceiling is not better on seen
tasks by three times the noise of a run, the stage `cells` is refused. This stage tunes OrchMoE,
LoRA and MoE-LoRA, with the same number of trials over lr_skills and alpha, by the mean of the dev
loss over tasks. Then it makes all cells. The stage `after` adds the rows that were planned after
the decision, see after.md beside plan.md, and the stage `many` repeats the decision with many other
tasks, see many.md. An interrupted stage continues when it is run again. Without --results the cells
are those of this repository.
Test: pytest tests/experiments/test_map.py
"""

import math
import random
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

import data
import program
import tokenizer as tokenizers
from experiments.map import (
    EQUAL,
    Groups,
    difference,
    losses,
    mean_losses,
    read_groups,
    stage_table,
    with_overall,
)
from experiments.map import ROWS as MAP_ROWS
from experiments.study import (
    UNTRAINED,
    Cell,
    Row,
    Study,
    all_flags_but,
    changed,
    file_name,
    pick_device,
    read_study,
    read_tuning,
    subset,
)
from experiments.tables import (
    Difference,
    Group,
    mean_and_sd,
    publish,
    signed,
    table,
    tuning_table,
)
from program import UserError

RESULTS = program.ROOT / "experiments/results/decision"
TUNED = EQUAL | {"moe-lora": Row({"method": "moe-lora"})}
ROWS = TUNED | MAP_ROWS
PILOT = {name: ROWS[name] for name in ("floor", "ceiling")}
PILOT_SEEDS = 3
TRAIN_TASKS = 24
MIN_FITTING = 95  # so many of the first 100 prompts of a task must fit
MARGIN = 0.02  # nats; a smaller difference counts as none
# Differences that are not in a plan.
NOT_PLANNED = (("floor", "lora"), ("ceiling", "lora"), ("frozen router", "lora alpha 1"))

ALL_SETS = ("seen", "unseen", "test", "left out")

# The rows after the decision, in the order of their plan. They are tuned already.
AFTER = {  # with all seeds
    "orchmoe": Row({"alpha": 1.0}),
    "frozen router": Row({"alpha": 1.0, "lr_router": 0.0}, like="orchmoe"),
    "lora": Row({"method": "lora", "alpha": 4.0}),
    "lora alpha 1": Row({"method": "lora", "alpha": 1.0}, like="lora"),
}
AFTER_ALPHA = {  # with two seeds
    "orchmoe alpha 2": Row({"alpha": 2.0}, like="orchmoe"),
    "orchmoe alpha 4": Row({"alpha": 4.0}, like="orchmoe"),
}
# Grids: the alphas and rates of each method. The best point of this one is the row "lora best".
GRID = {"lora": ((2.0, 4.0, 8.0), (3.2e-3, 1e-2, 3.2e-2))}
AFTER_ROWS = ("frozen base", *AFTER, "lora best", *AFTER_ALPHA)
AFTER_DIFFERENCES = (
    ("orchmoe", "frozen router"),
    ("orchmoe", "lora"),
    ("orchmoe", "lora best"),
    ("frozen router", "lora"),
    ("lora alpha 1", "lora"),
    ("orchmoe", "lora alpha 1"),
)

# The decision with many tasks. Its grid is run on the tasks of the decision.
MANY_RATES = (5.6e-3, 1e-2, 1.8e-2)
MANY_GRID = {"orchmoe": ((1.0,), MANY_RATES), "lora": ((4.0,), MANY_RATES)}
MANY_TASKS = 160
MANY_SEEDS = 3
MANY = {"steps": 320, "eval_every": 320, "train_instances": 16, "eval_instances": MANY_TASKS}
MANY_DIFFERENCES = (("orchmoe", "lora"), ("orchmoe", "frozen router"), ("frozen router", "lora"))

# The flags that remain. All other settings are those of the plan.
CHOICES = ("data", "model", "out", "results", "jobs", "gpu", "device")

DEFAULTS = {
    "out": "results/decision",
    "results": str(RESULTS),
    "seeds": 5,
    "trials": 7,
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
    "abstract_tasks": TRAIN_TASKS,
    "rank": 1,
    "lr_skills": 1e-2,
    "lr_allocation": 1e-1,
    "lr_router": 1e-3,
}


@dataclass(frozen=True)
class DecisionConfig:
    """Decision: which cells are made."""

    stage: Literal["pilot", "cells", "after", "many", "table"] = "table"  # cells to make


def fitting_prompts(
    config: data.DataConfig, task: str, tokenizer: tokenizers.Tokenizer
) -> tuple[int, int]:
    """Return how many prompts of a task fit, and its number of different inputs.

    Only its first 100 instances count.
    """
    values = data.read_task(Path(config.data, "tasks", f"{task}.json"))
    instances = values["instances"][:100]
    fitting = 0
    for instance in instances:
        prompt = data.render_prompt(
            values, instance, tokenizer, num_pos=0, max_source_length=config.max_source_length
        )
        if prompt.endswith("Output: "):  # a prompt that is too long loses its end
            fitting += 1
    return fitting, len({instance["input"] for instance in instances})


def choose_tasks(study: Study, number: int, without: Collection[str] = ()) -> dict[str, list[str]]:
    """Return the training tasks and both groups of unseen tasks: {"train", "test", "left out"}.

    A task takes part if at least MIN_FITTING of its first 100 prompts fit. A task with fewer
    instances than that never takes part. `number` of the training tasks with 100 different inputs
    are drawn with a fixed seed. Raise UserError if there are fewer. without: training tasks that
    are on none of the three lists.
    """
    config = study.settings.dataset
    tokenizer = tokenizers.load(study.settings.training.model)
    lists = data.read_splits(config.data)
    test = []
    for task in sorted(lists["test"]):
        fitting, _ = fitting_prompts(config, task, tokenizer)
        if fitting >= MIN_FITTING:
            test.append(task)
    order = sorted(lists["train"])
    random.Random("decision").shuffle(order)
    train = []
    left_out = []
    for task in order:
        fitting, different = fitting_prompts(config, task, tokenizer)
        if fitting < MIN_FITTING or task in without:
            continue
        if different == 100 and len(train) < number:
            train.append(task)
        else:
            left_out.append(task)
    if len(train) < number:
        raise UserError(f"{config.data}: {len(train)} training tasks fit, fewer than {number}")
    return {"train": sorted(train), "test": test, "left out": sorted(left_out)}


def data_of(study: Study, name: str, number: int, without: Collection[str] = ()) -> str:
    """Return a data folder with these tasks, in which all unseen tasks are test tasks.

    name: of the JSON file that lists them, and of the folder. For the others see `choose_tasks`.
    """
    path = study.results / f"{name}.json"
    tasks = choose_tasks(study, number, without)
    if path.exists() and program.read_json(path) != tasks:
        raise UserError(f"{path}: made with other tasks; name another folder with --results")
    program.write_json(path, tasks)
    folder = Path(study.config.out, name)
    unseen = [*tasks["test"], *tasks["left out"]]
    return str(subset(folder, Path(study.settings.dataset.data), tasks["train"], unseen))


def make_after(study: Study, values: dict[str, Any]) -> None:
    """Make the cells after the decision in the order of their plan.

    values: further settings of all of them.
    """

    def make(rows, seeds):
        study.run(study.cells("after", rows, {"": values}, seeds, "losses"))

    seeds = range(study.config.seeds)
    make({"frozen base": UNTRAINED["frozen base"]}, [0])
    make(AFTER, seeds)

    best = best_of_grid(study, "grid", GRID, values)["lora"]
    row = best.row._replace(run=f"grid/{file_name(best.name)}-s{{seed}}")  # seed 0 is trained
    make({"lora best": row}, seeds)

    make(AFTER_ALPHA, range(2))


def best_of_grid(
    study: Study, stage: str, grid: dict[str, tuple], values: dict[str, Any]
) -> dict[str, Cell]:
    """Make the trials of a grid, with seed 0. Return the one of each method that is best on dev."""
    rows = {}
    for method, (alphas, rates) in grid.items():
        for alpha in alphas:
            for rate in rates:
                settings = {"method": method, "alpha": alpha, "lr_skills": rate}
                rows[f"{method} {alpha:g} {rate:g}"] = Row(settings, like=method)
    trials = study.cells(stage, rows, {"": values}, [0], "dev tasks")
    study.run(trials)
    best = {}
    for method in grid:
        of_method = [cell for cell in trials if cell.row.like == method]
        best[method] = min(of_method, key=lambda cell: cell.result()["dev_loss"] or math.inf)
    return best  # a trial that diverged has the loss None


def make_many(study: Study, values: dict[str, Any]) -> None:
    """Make the cells with many tasks. study, values: for the tuning on the first tasks."""
    many = Study(changed(study.settings, MANY), study.device, study.config, EQUAL)
    first = program.read_json(study.results / "tasks.json")["train"]
    on_many = {"": {"data": data_of(many, "many_tasks", MANY_TASKS, without=first)}}

    best = best_of_grid(study, "many_grid", MANY_GRID, values)
    rows = {method: Row(cell.row.settings) for method, cell in best.items()}
    frozen = Row(rows["orchmoe"].settings | {"lr_router": 0.0}, like="orchmoe")
    for part in (rows, {"frozen router": frozen}):
        many.run(many.cells("many", part, on_many, range(MANY_SEEDS), "all losses"))


# ---------------------------------------------------------------------------------------- tables


def with_groups(cell: dict[str, Any], lists: dict[str, list[str]]) -> dict[str, Any]:
    """Return the cell with the two groups of unseen tasks as sets of their own.

    If dev was scored, the seen loss of a task is the mean of its losses on dev and on seen.
    """
    parts = {}
    for group in ("test", "left out"):
        parts[group] = with_overall({name: cell["unseen"]["tasks"][name] for name in lists[group]})
    if "dev" in cell:
        parts["seen"] = mean_losses([cell, {"seen": cell["dev"]}], "seen")
    return cell | parts


def verdict(found: Difference, seeds: int, planned: int) -> str:
    """Return what the difference of OrchMoE from another row decides, by its 95 % interval.

    seeds: how many are finished of the planned ones.
    """
    _, low, high = found
    if seeds < planned:
        return "unfinished"
    if -MARGIN < low and high < MARGIN:
        return f"equivalent within {MARGIN}"
    if high < 0:
        return "better"
    if low > 0:
        return "worse"
    return "undecided"


def pilot_verdict(groups: dict[str, Group]) -> tuple[bool, str]:
    """Return whether the decision may be run, and why.

    The ceiling must be better than the floor by three times the noise of a run, on seen tasks.
    """
    floor = losses(groups.get("floor", {}), "seen")
    ceiling = losses(groups.get("ceiling", {}), "seen")
    if min(len(floor), len(ceiling)) < PILOT_SEEDS:
        return False, "The pilot is unfinished."
    gain = np.mean(floor) - np.mean(ceiling)
    noise = max(np.std(floor, ddof=1), np.std(ceiling, ddof=1))
    passed = bool(gain > 3 * noise)
    decision = "the decision is run" if passed else "the decision is not run"
    why = f"floor - ceiling {gain:.3f}, {gain / noise:.1f} times the noise"
    return passed, f"Pilot, seen tasks: {why}: {decision}."


def difference_rows(
    groups: Groups, pairs: Iterable[tuple[str, str]], planned: int = DEFAULTS["seeds"]
) -> list[list]:
    """Return a line for each pair of rows and set of tasks: difference, seeds, nats, verdict.

    planned: the number of seeds in the plan, 0 if the differences are not in it.
    """
    rows = []
    for one, other in pairs:
        for which in ALL_SETS:
            found = difference(groups, one, other, which)
            if found:
                seeds = len(groups[one].keys() & groups[other].keys())
                decided = verdict(found, seeds, planned) if planned else "not planned"
                rows.append([f"{one} - {other}", which, seeds, signed(found), decided])
    return rows


def alpha_table(groups: Groups) -> str:
    """Return the losses of each row against its alpha and rate."""
    rows = []
    for name, group in groups.items():
        settings = next(iter(group.values()))["settings"]
        if name == "frozen base":
            continue
        row = [name, f"{settings['alpha']:g}", f"{settings['lr_skills']:g}", len(group)]
        rows.append(row + [mean_and_sd(losses(group, which), 3) for which in ALL_SETS])
    return table(["row", "alpha", "rate", "seeds", *ALL_SETS], rows)


def text(results: Path) -> str:
    """Return the tables of the finished cells in Markdown."""
    stages = {}
    for stage in ("pilot", "cells", "after", "many"):
        path = results / ("many_tasks.json" if stage == "many" else "tasks.json")
        lists = program.read_json(path) if path.exists() else {}
        groups = {}
        for name, group in read_groups(results / stage).items():
            groups[name] = {seed: with_groups(cell, lists) for seed, cell in group.items()}
        # In the order of the plan. File names have no spaces.
        known = {file_name(name): name for name in (*ROWS, *AFTER_ROWS)}
        stages[stage] = {known[name]: groups[name] for name in known if name in groups}

    pilot, cells, after, many = stages.values()
    head = ["difference", "tasks", "seeds", "nats", "verdict"]
    rows = difference_rows(cells, [("orchmoe", name) for name in cells])
    parts = [
        stage_table("pilot", pilot, sets=ALL_SETS),
        pilot_verdict(pilot)[1],
        tuning_table(read_tuning(results)),
        stage_table("cells", cells, sets=ALL_SETS),
        table(head, rows + difference_rows(cells, NOT_PLANNED, planned=0)),
        stage_table("after the decision", after, sets=ALL_SETS),
        table(head, difference_rows(after, AFTER_DIFFERENCES)),
        table(head, difference_rows(after, NOT_PLANNED, planned=0)),
        alpha_table(after),
        stage_table("many tasks", many, sets=ALL_SETS),
        table(head, difference_rows(many, MANY_DIFFERENCES, MANY_SEEDS)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def main() -> None:
    planned = all_flags_but(CHOICES)
    flags, config, study_config, settings = read_study(__doc__, DecisionConfig, DEFAULTS, planned)
    results = Path(study_config.results)
    if config.stage in ("after", "many"):
        settings = changed(settings, {"dtype": "bfloat16"})
    if config.stage != "table":
        if not {"data", "model"} <= flags.keys():
            raise UserError(f"--stage {config.stage}: give --data and --model")
        if config.stage == "cells":
            passed, why = pilot_verdict(read_groups(results / "pilot"))
            if not passed:
                raise UserError(f"--stage cells: {why}")
        study = Study(settings, pick_device(study_config, settings), study_config, EQUAL)
        values = {"data": data_of(study, "tasks", TRAIN_TASKS)}
        pilot = study.cells("pilot", PILOT, {"": values}, range(PILOT_SEEDS), "losses")
        if config.stage == "pilot":
            study.run(pilot)
        elif config.stage == "cells":
            for cell in pilot:
                cell.require_same()  # the pilot must be one of this base and these tasks
            axes = ("lr_skills", "alpha")
            study.tune(TUNED, study_config.trials, axes, "dev tasks", **values)
            seeds = range(study_config.seeds)
            study.run(study.cells("cells", ROWS, {"": values}, seeds, "losses"))
        elif config.stage == "after":
            make_after(study, values)
        else:
            make_many(study, values)

    program.require_path(results / "tasks.json", "make the cells with --stage")
    publish(text(results), results / "tables.md")


if __name__ == "__main__":
    program.run_program(main)
