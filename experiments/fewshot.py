"""Learn a new task from a few examples: each unseen task by itself.

A finished run of OrchMoE trains on with one part of it (train.py --start --trainable). Beside it
stand a fresh LoRA of the same size and the run as it is. They are scored on 20 instances of the
task, on which nothing was trained and by which nothing was chosen. The learning rate of what trains
is chosen with as many trials for every way, on the dev instances of the first tasks.

    python -m experiments.fewshot --runs runs/orchmoe-1,runs/orchmoe-2,runs/orchmoe-3

Writes cells (see experiments/study.py) and OUT/fewshot.md.
Letters: T tasks.  Test: pytest tests/experiments/test_fewshot.py
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

import checkpoint
import data
import runtime
import train
from experiments.sizes import rank_for_total, total
from experiments.study import Cell, Row, facts_of, file_name, run_cells, subset
from experiments.tables import interval, publish, signed, table
from run_folder import read_config
from runtime import UserError


@dataclass(frozen=True)
class FewShotConfig:
    """Few-shot: of which runs, on how many examples, and where."""

    runs: tuple[str, ...] = ()  # folders of finished runs of OrchMoE, one a seed
    out: str = "results/fewshot"  # folder of the cells and the table
    examples: tuple[str, ...] = ("4", "16", "64")  # numbers of training examples of the new task
    steps: int = 50  # optimiser steps, the same for all
    batch_size: int = 8  # examples of one step
    max_tasks: int = 0  # first N of the unseen tasks (0: all)
    tuned: int = 3  # the first N of these choose the rates
    jobs: int = 0  # cells at a time (default: one on a GPU; on the CPU one a core, at most 8)
    gpu: int | None = None  # number of the GPU (default: 0, if there is one)
    device: Literal["cpu", ""] = ""  # use the CPU even if there is a GPU

    def __post_init__(self) -> None:
        runtime.require_least(self, steps=1, batch_size=1, tuned=1)
        numbers = [size.isdecimal() and int(size) > 0 for size in self.examples]
        if not self.runs or not numbers or not all(numbers):
            raise UserError("give --runs, folders of runs, and --examples, numbers above 0")


class Way(NamedTuple):
    """A way to learn the new task."""

    flags: dict[str, Any]  # of train.py
    rate: str  # what is tuned
    values: tuple[float, ...]


LORA = "fresh LoRA"
AS_IT_IS = "as it is"
WAYS = {
    "mixture": Way({"trainable": "mixture"}, "lr_allocation", (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)),
    "router": Way({"trainable": "router"}, "lr_router", (6e-4, 2e-3, 6e-3, 2e-2, 6e-2, 2e-1)),
    "all": Way({}, "lr_skills", (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    LORA: Way({"method": "lora"}, "lr_skills", (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
}
Scores = dict[tuple[str, int], dict[str, np.ndarray]]  # by way and examples: metric -> (T, seeds)


def lora_flags(run: str) -> tuple[dict[str, Any], int]:
    """Return flags of a LoRA on the base of the run, with its prompt, and the extra ranks.

    The extra ranks give it the total size of the run.
    """
    saved = train.saved_settings(read_config(run))
    base = checkpoint.on_meta(checkpoint.read_config(saved.training.model))
    size = total("orchmoe", base, saved.adapter)
    flags = {
        **vars(saved.dataset),
        "model": saved.training.model,
    }
    for name in ("skills", "rank", "alpha", "targets"):
        flags[name] = getattr(saved.adapter, name)
    return flags, rank_for_total(size, "lora", base, saved.adapter)


class FewShot:
    """What all cells share."""

    def __init__(self, config: FewShotConfig, device: runtime.Device):
        self.config = config
        self.device = device
        saved = read_config(config.runs[0])
        options = saved.section(data.DataConfig, "dataset")
        self.root = Path(options.data)
        self.tasks = data.read_splits(self.root, options.splits)["test"]
        self.tasks = self.tasks[: config.max_tasks or None]
        if not self.tasks:
            raise UserError(f"{self.root}: splits/{options.splits} has no test tasks to learn")

    def cell(
        self, way: str, task: str, examples: int, seed: int, scores: str = "answers", **rate: float
    ) -> Cell:
        """Return the cell of a way, or of the run as it is, on one task."""
        config = self.config
        run = config.runs[seed]
        folder = Path(config.out, "tasks", task)
        flags, extra_rank = lora_flags(run) if way == LORA else ({"start": run}, 0)
        flags |= {
            "data": str(subset(folder, self.root, [task])),
            "splits": "default",
            "max_tasks": 0,
            "seed": seed,
            "train_instances": examples,
            "steps": config.steps,
            "warmup": config.steps // 10,
            "eval_every": config.steps,  # once at the end: there are too few examples to stop by
            "batch_size": config.batch_size,
            **rate,
        }
        if way in WAYS:
            flags |= WAYS[way].flags
        settings = train.read_settings(flags, train.LaunchConfig())
        facts, _ = facts_of(settings.dataset, settings.training.model)
        adapter = runtime.require_path(Path(run, "adapter.safetensors"), "it has no weights yet")
        stage = "tune" if scores == "dev" else "cells"
        tag = "".join(f"_{value:g}" for value in rate.values())
        path = Path(config.out, stage, f"{file_name(way)}-{examples}-s{seed}{tag}", task)
        trained = way != AS_IT_IS
        return Cell(
            name=way,
            row=Row(model="trained" if trained else "run"),
            settings=settings,
            facts={
                **facts,
                "run": hashlib.sha256(adapter.read_bytes()).hexdigest(),
                "computed": f"{self.device.device.type}, {self.device.dtype}",
            },
            path=path.with_name(f"{task}.json"),
            folder=path if trained else Path(run),
            scores=scores,
            extra_rank=extra_rank,
        )

    def run(self, groups: dict[Any, list[Cell]]) -> None:
        """Make the cells of all groups."""
        queues = []
        for cells in groups.values():
            queues += [[cell] for cell in cells]
        run_cells(queues, self.config.jobs, self.device)

    def tune(self) -> dict[str, dict[float, float]]:
        """Return the dev losses of each way by its rate: mean over tasks, 16 examples, one run."""
        groups = {}
        for name, way in WAYS.items():
            for value in way.values:
                cells = []
                for task in self.tasks[: self.config.tuned]:
                    cells.append(self.cell(name, task, 16, 0, "dev", **{way.rate: value}))
                groups[name, value] = cells
        self.run(groups)
        losses: dict[str, dict[float, float]] = {name: {} for name in WAYS}
        for (name, value), cells in groups.items():
            of_tasks = [cell.result()["dev_loss"] for cell in cells]
            diverged = None in of_tasks
            losses[name][value] = math.inf if diverged else float(np.mean(of_tasks))
        return losses

    def scores(self, best: dict[str, float]) -> Scores:
        """Return the scores of all ways, each at its best rate, and of the runs as they are."""
        kinds = [(AS_IT_IS, 0)]
        for name in WAYS:
            kinds += [(name, int(size)) for size in self.config.examples]
        groups: dict[tuple[str, int], list[Cell]] = {}
        for name, size in kinds:
            rate = {WAYS[name].rate: best[name]} if name in WAYS else {}
            cells = []
            for task in self.tasks:
                for seed in range(len(self.config.runs)):
                    cells.append(self.cell(name, task, max(1, size), seed, **rate))
            groups[name, size] = cells
        self.run(groups)

        shape = (len(self.tasks), len(self.config.runs))
        found: Scores = {}
        for kind, cells in groups.items():
            overall = [cell.result()["seen"]["overall"] for cell in cells]
            found[kind] = {}
            for metric in ("rougeL", "loss"):
                values = [scores[metric] for scores in overall]
                found[kind][metric] = np.reshape(values, shape)
        return found


def fewshot(config: FewShotConfig, device: runtime.Device) -> None:
    """Make the cells that are missing. Print the tables, and write them."""
    study = FewShot(config, device)
    tuning = study.tune()
    best = {}
    for name, losses in tuning.items():
        way = WAYS[name]
        best[name] = min(losses, key=losses.get)
        if losses[best[name]] == math.inf:
            raise UserError(f"{name}: the runs diverged at all values of {way.rate}")
        if best[name] in (way.values[0], way.values[-1]):
            runtime.warn(f"{name}: the best {way.rate}, {best[name]:g}, is the edge of those tried")
    publish(tables(study.scores(best), tuning, best), Path(config.out, "fewshot.md"))


def tables(found: Scores, tuning: dict[str, dict[float, float]], best: dict[str, float]) -> str:
    """Return means over tasks and runs, and differences to the fresh LoRA with intervals."""
    order = [AS_IT_IS, *WAYS]
    kinds = sorted(found, key=lambda kind: (kind[1], order.index(kind[0])))
    smallest = min(size for _, size in kinds if size)
    rows = []
    for name, size in kinds:
        scores = found[name, size]
        difference = "-"
        if name != LORA:
            beside = found[LORA, size or smallest]
            difference = signed(interval(scores["loss"] - beside["loss"]))
        means = [f"{scores['rougeL'].mean():.2f}", f"{scores['loss'].mean():.3f}"]
        rows.append([name, size, *means, difference])
    head = ["what trains", "examples", "ROUGE-L", "loss", "loss - fresh LoRA's"]

    rates = []
    for name, losses in tuning.items():
        tried = ", ".join(f"{value:g}: {loss:.3f}" for value, loss in losses.items())
        rates.append([name, f"{WAYS[name].rate} {best[name]:g}", tried])
    head_of_rates = ["what trains", "its rate", "dev loss at each rate"]
    return "\n\n".join([table(head, rows), table(head_of_rates, rates)])


def main() -> None:
    config = runtime.from_flags(FewShotConfig, runtime.read_flags(__doc__, FewShotConfig))
    runtime.require_single_process()
    model = read_config(config.runs[0]).training["model"]
    device = runtime.pick_device(config.gpu, config.device, base=model)
    runtime.print_line(device.description)
    fewshot(config, device)


if __name__ == "__main__":
    runtime.run_program(main)
