"""Sixteen replicates of one comparison: OrchMoE, a LoRA of equal size, and a frozen router.

experiments/results/replication/plan.md has the plan, which was written before the first cell. This
program is the plan: it takes no flags for what the plan says. Each replicate has its own 24 tasks
of Super-NaturalInstructions and its own seed. This program makes the cells and prints neither
losses nor scores; experiments/replication_analysis.py reads them when all are there.

    python -m experiments.replication --data natural-instructions --model smollm2 --device cpu

An interrupted computation continues when it is run again. Without --results the cells are those of
this repository. Test: pytest tests/experiments/test_replication.py
"""

import random
from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.study import (
    Cell,
    Study,
    Variant,
    all_flags_but,
    kind_of_cpu,
    pick_device,
    read_study,
)
from support import program
from support.program import UserError
from tasks import read_task

RESULTS = program.ROOT / "experiments/results/replication"
EARLIER_TASKS = program.ROOT / "experiments/results/decision/tasks.json"
REPLICATES = 16
TRAIN_TASKS = 24  # of each replicate
FIRST_SEED = 100  # replicate i has the seed 100 + i

# The rows of the primary difference are equal in size. Rate and alpha are those that were tuned.
EQUAL = {
    "orchmoe": Variant({"alpha": 1.0}),
    "lora": Variant({"method": "lora", "alpha": 4.0}),
}
FROZEN = {"frozen router": Variant({"alpha": 1.0, "lr_router": 0.0}, like="orchmoe")}

# The flags that remain. All other settings are those of the plan.
CHOICES = ("data", "model", "out", "results", "jobs", "gpu", "device")

DEFAULTS = {
    "out": "results/replication",
    "results": str(RESULTS),
    "dtype": "bfloat16",
    "steps": 180,
    "batch_size": 8,
    "warmup": 20,
    "eval_every": 180,
    "eval_instances": TRAIN_TASKS,  # of dev, after the last step; nothing is chosen by them
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


def draw_tasks(folder: Path, candidates: Sequence[str]) -> dict[str, list[str]]:
    """Return {seed: names of the training tasks of this replicate}. No task is in two replicates.

    candidates: tasks that may be drawn. Those whose first 100 inputs all differ are shuffled with a
    fixed seed, and dealt out in this order. Raise UserError if there are too few.
    """
    different = []
    for name in sorted(candidates):
        instances = read_task(folder / "tasks" / f"{name}.json")["instances"][:100]
        if len({instance["input"] for instance in instances}) == 100:
            different.append(name)
    needed = REPLICATES * TRAIN_TASKS
    if len(different) < needed:
        raise UserError(f"{folder}: {len(different)} tasks may be drawn, and {needed} are needed")
    random.Random("replication").shuffle(different)
    draws = {}
    for i in range(REPLICATES):
        tasks = different[i * TRAIN_TASKS : (i + 1) * TRAIN_TASKS]
        draws[str(FIRST_SEED + i)] = sorted(tasks)
    return draws


def planned_draws(study: Study) -> dict[str, list[str]]:
    """Return the tasks of each replicate, and write them to draws.json, or compare them with it."""
    folder = Path(study.settings.dataset.data)
    draws = draw_tasks(folder, program.read_json(EARLIER_TASKS)["left out"])
    path = study.results / "draws.json"
    if path.exists() and program.read_json(path) != draws:
        raise UserError(f"{path}: the tasks of {folder} give other draws; name other --results")
    program.write_json(path, draws)
    return draws


def write_subset(folder: Path, root: Path, train_tasks: Sequence[str]) -> None:
    """Make `folder` a data folder with these training tasks of `root` and no test tasks."""
    lists = folder / "splits/default"
    lists.mkdir(parents=True, exist_ok=True)
    for name, tasks in (("train", train_tasks), ("test", ())):
        (lists / f"{name}_tasks.txt").write_text("".join(f"{task}\n" for task in tasks))
    link = folder / "tasks"
    link.unlink(missing_ok=True)  # the data may have moved
    link.symlink_to((root / "tasks").resolve())


def cells_to_make(
    study: Study, draws: dict[str, list[str]], rows: dict[str, Variant]
) -> list[Cell]:
    """Return the cells of these rows that are missing, replicate by replicate.

    The rows of one replicate must be made on one kind of CPU. A replicate that was begun on
    another kind is left out, and a line says so.
    """
    folder = Path(study.settings.dataset.data)
    missing = []
    for seed, tasks in draws.items():
        of_draw = Path(study.config.out, f"tasks-{seed}")
        write_subset(of_draw, folder, tasks)
        cells = study.cells("cells", rows, {"data": str(of_draw)}, [int(seed)], "replicate")
        begun_on = set()
        for path in sorted((study.results / "cells").glob(f"*-s{seed}.json")):
            begun_on.add(program.read_json(path)["settings"].get("cpu"))
        to_make = [cell for cell in cells if not cell.path.exists()]
        others = begun_on - {kind_of_cpu()}
        if to_make and others:
            names = " and ".join(sorted(map(str, others)))
            program.print_line(f"replicate {seed} is left out: it was begun on {names}")
        else:
            missing += to_make
    return missing


def main() -> None:
    planned = all_flags_but(CHOICES)
    flags, study_config, settings = read_study(__doc__, defaults=DEFAULTS, fixed=planned)
    if not {"data", "model"} <= flags.keys():
        raise UserError("give --data and --model")
    if not torch.cpu._is_avx512_bf16_supported():
        raise UserError("this CPU does not multiply bfloat16 natively; use one that does")
    study = Study(settings, pick_device(study_config, settings), study_config, EQUAL)
    draws = planned_draws(study)
    for rows in (EQUAL, FROZEN):
        study.run(cells_to_make(study, draws, rows))


if __name__ == "__main__":
    program.run_program(main)
