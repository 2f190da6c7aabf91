"""A new task from a few examples. Each unseen task by itself: a finished run of OrchMoE goes on with one part
of it (train.py --start --trainable), beside a fresh LoRA of the same size and the run as it is. Scored on 20
instances of the task that nothing was trained on or chosen by. The rate of what trains is chosen by as many
trials for every way, on the dev instances of the first tasks. Interrupted, the same command goes on.

    python -m experiments.fewshot --runs runs/orchmoe-1,runs/orchmoe-2,runs/orchmoe-3

Writes OUT/fewshot.md and fewshot.json. Test: pytest tests/experiments/test_fewshot.py"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

import checkpoint
import data
import run_folder
import runtime
import train
from experiments.compare import Cell, run_cells, slug
from experiments.sizes import budget, on_meta, parameters
from experiments.tables import interval
from orchmoe import OrchMoEConfig


@dataclass(frozen=True)
class FewShotConfig:
    """Few-shot: of which runs, on how many examples, and where."""

    runs: tuple[str, ...] = ()  # folders of finished runs of OrchMoE, one a seed
    out: str = "results/fewshot"  # folder of the cells and the table
    examples: tuple[str, ...] = ("4", "16", "64")  # training examples of the new task
    steps: int = 50  # optimiser steps, all counted the same
    batch_size: int = 8  # examples of one step
    max_tasks: int = 0  # first N of the unseen tasks (0: all)
    tuned: int = 3  # of these the first N choose the rates
    jobs: int = 0  # cells at a time (0: one on a GPU; on the CPU one a core)
    gpu: int | None = None  # number of the GPU (default: 0, where there is one)
    device: Literal["cpu", ""] = ""  # no GPU even if there is one

    def __post_init__(self) -> None:
        runtime.require_least(self, steps=1, batch_size=1, max_tasks=0, tuned=1, jobs=0)
        good = [size for size in self.examples if size.isdecimal() and int(size)]
        if not (self.runs and good and len(good) == len(self.examples)):
            raise ValueError("give --runs, folders of runs, and --examples, numbers above 0")


class Way(NamedTuple):
    fields: dict[str, Any]  # flags of train.py
    rate: str  # what is tuned
    values: tuple[float, ...]


LORA = "fresh LoRA"
WAYS = {
    "mixture": Way({"trainable": "mixture"}, "lr_allocation", (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)),
    "router": Way({"trainable": "router"}, "lr_router", (6e-4, 2e-3, 6e-3, 2e-2, 6e-2, 2e-1)),
    "all": Way({}, "lr_skills", (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    LORA: Way({"method": "lora"}, "lr_skills", (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
}


def subset(folder: Path, root: Path, train: Sequence[str], test: Sequence[str] = ()) -> Path:
    """Makes `folder` a data folder of these tasks of `root` alone."""
    lists = folder / "splits/default"
    lists.mkdir(parents=True, exist_ok=True)
    for name, tasks in (("train", train), ("test", test)):
        with runtime.atomic_write(lists / f"{name}_tasks.txt") as file:  # another process may be reading it
            file.write("".join(f"{task}\n" for task in tasks).encode())
    link, target = folder / "tasks", (root / "tasks").resolve()
    if link.is_symlink() and link.readlink() != target:  # of data that has moved, or of others
        link.unlink()
    if not link.exists():
        link.symlink_to(target)
    return folder


class Study(NamedTuple):
    config: FewShotConfig
    roots: dict[str, Path]  # of each task
    facts: dict[str, dict[str, Any]]  # of each task
    runs: list[str]  # digests of their adapters

    def cell(self, row: str, task: str, examples: int, seed: int, fields: dict[str, Any], **options: Any
             ) -> Cell:
        """Cell of one way, or of the run as it is, on one task."""
        config, run = self.config, self.config.runs[seed]
        flags = {"data": str(self.roots[task]), "splits": "default", "max_tasks": 0, "seed": seed,
                 "train_instances": examples, "steps": config.steps, "warmup": config.steps // 10,
                 # one evaluation, at the end: with few examples there is no dev set to stop by
                 "eval_every": config.steps, "batch_size": config.batch_size} | fields
        if fields.get("method") == "lora":
            flags |= as_large(run)
        else:
            flags["start"] = run
        tuned = "".join(f"_{value:g}" for name, value in fields.items() if name.startswith("lr_"))
        kind = "cells" if options.get("closing", True) else "tune"
        folder = Path(config.out, kind, f"{slug(row)}-{examples}-s{seed}{tuned}", task)
        facts = self.facts[task] | {"run": self.runs[seed]}
        return Cell(row, folder, train.read_settings(flags, train.LaunchConfig()), facts, **options)


def as_large(run: str) -> dict[str, Any]:
    """Flags of a LoRA of the run's total size, on its base, with its prompt."""
    began = run_folder.read_config(run)
    adapter, base = began.section(OrchMoEConfig, "adapter"), on_meta(
        checkpoint.read_config(began.train["model"]))
    own = sum(parameters("orchmoe", base, adapter, extra_rank=began.train.get("extra_rank", 0)).values())
    extra = budget(("orchmoe", "lora"), base, adapter, least=own)["lora"]
    prompt = ("definition", "num_pos", "num_neg", "explanation", "max_source_length", "max_target_length")
    return {"model": began.train["model"], "extra_rank": extra, "targets": adapter.targets,
            **{name: getattr(adapter, name) for name in ("skills", "rank", "alpha")},
            **{name: began.data[name] for name in prompt if name in began.data}}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tune(study: Study, tasks: Sequence[str], place: runtime.Device) -> dict[str, dict[float, float]]:
    """{way: {rate: dev loss, mean over the tasks}} at 16 examples, of the first run."""
    cells = {way: {value: [study.cell(way, task, 16, 0, fields | {rate: value}, closing=False)
                           for task in tasks] for value in values}
             for way, (fields, rate, values) in WAYS.items()}
    run_cells([[cell] for rates in cells.values() for group in rates.values() for cell in group],
              study.config, place)
    return {way: {value: float(np.mean([cell.scores["dev_loss"] for cell in group]))
                  for value, group in rates.items()} for way, rates in cells.items()}


def fewshot(config: FewShotConfig, place: runtime.Device) -> str:
    """Runs what is missing, writes the results and returns the table."""
    first = run_folder.read_config(config.runs[0])
    options = first.section(data.DataConfig, "data")
    facts = {"base": first.base, "tokenizer": first.tokenizer, "torch": torch.__version__,
             "computed": f"{place.device.type}, {place.dtype}"}
    root = Path(options.data)
    tasks = data.read_splits(root, options.splits)["test"][:config.max_tasks or None]
    if not tasks:
        raise ValueError(f"{root}: splits/{options.splits} has no test tasks, which would be the new ones")
    roots = {task: subset(Path(config.out, "tasks", task), root, [task]) for task in tasks}
    kept = [runtime.require_path(Path(run, "adapter.safetensors"), "the run has kept no weights yet")
            for run in config.runs]
    study = Study(config, roots, {task: facts | {"digest": digest(root / "tasks" / f"{task}.json")}
                                  for task in tasks}, list(map(digest, kept)))
    tuning = tune(study, tasks[:config.tuned], place)
    best = {way: min(losses, key=losses.get) for way, losses in tuning.items()}
    for way, value in best.items():
        if value in (WAYS[way].values[0], WAYS[way].values[-1]):
            runtime.warn(f"{way}: the best of {WAYS[way].rate}, {value:g}, is on the edge of what was tried")
    sizes, seeds = list(map(int, config.examples)), range(len(config.runs))
    cells: dict[tuple[str, int], list[list[Cell]]] = {}  # [task][seed]
    for way, (fields, rate, _) in WAYS.items():
        for size in sizes:
            cells[way, size] = [[study.cell(way, task, size, seed, fields | {rate: best[way]})
                                 for seed in seeds] for task in tasks]
    cells["as it is", 0] = [[study.cell("as it is", task, 1, seed, {}, of=Path(config.runs[seed]))
                             for seed in seeds] for task in tasks]
    run_cells([[cell] for rows in cells.values() for row in rows for cell in row], config, place)
    found = {key: {metric: np.array([[cell.scores["seen"]["overall"][metric] for cell in row]
                                     for row in rows]) for metric in ("rougeL", "loss")}
             for key, rows in cells.items()}
    text = table(found, sizes, tuning, best)
    with runtime.atomic_write(Path(config.out) / "fewshot.md") as file:
        file.write(text.encode())
    runtime.write_json(Path(config.out) / "fewshot.json", {
        "fewshot": asdict(config), **facts, "tasks": tasks, "tuning": tuning,
        "scores": {f"{way}, {size}": {metric: values.tolist() for metric, values in each.items()}
                   for (way, size), each in found.items()}})
    return text


def table(found: dict, sizes: Sequence[int], tuning: dict, best: dict) -> str:
    """As Markdown: means over tasks and seeds, and differences to the fresh LoRA with intervals over both."""
    def said(key: tuple[str, int]) -> list[str]:
        cells = [f"{found[key]['rougeL'].mean():.2f}", f"{found[key]['loss'].mean():.3f}"]
        if key[0] != LORA:
            beside = found[LORA, key[1] or sizes[0]]["loss"]
            cells.append("{:+.3f} [{:+.3f}, {:+.3f}]".format(*interval(found[key]["loss"] - beside)))
        return cells

    lines = ["| what trains | examples | ROUGE-L | loss | loss - fresh LoRA's |", "|---|---:|---:|---:|---:|"]
    for way, size in sorted(found, key=lambda key: (key[1], list(WAYS).index(key[0]) if key[1] else 0)):
        lines.append("| " + " | ".join([way, str(size), *(said((way, size)) + ["-"])[:3]]) + " |")
    lines += ["", "| what trains | its rate | dev loss at each rate |", "|---|---|---|"]
    for way, losses in tuning.items():
        tried = ", ".join(f"{value:g}: {loss:.3f}" for value, loss in losses.items())
        lines.append(f"| {way} | {WAYS[way].rate} {best[way]:g} | {tried} |")
    return "\n".join(lines)


def main() -> None:
    config = runtime.from_flags(FewShotConfig, runtime.read_flags(__doc__, FewShotConfig))
    runtime.require_single_process()
    config = replace(config, runs=tuple(str(Path(run).resolve()) for run in config.runs))
    model = run_folder.read_config(config.runs[0]).train["model"]
    place = runtime.pick_device(config.gpu, config.device, base=model)
    runtime.print_line(place.description)
    runtime.print_line(fewshot(config, place))


if __name__ == "__main__":
    runtime.run_program(main)
