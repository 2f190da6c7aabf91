"""Search for the best LoRA of the replicates, then compare OrchMoE with it.

See lora_plan.md, and further_plan.md for the stage "further".

Run it in a clone of commit 554a828, with that clone in PYTHONPATH; the plans have the commands.
An interrupted computation continues when it is run again.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import program
from program import UserError

from experiments import decision, replication
from experiments.study import (
    Cell,
    Variant,
    Study,
    all_flags_but,
    changed,
    kind_of_cpu,
    pick_device,
    read_study,
    subset,
)

RESULTS = Path(__file__).parent
COMPARED = RESULTS / "tuned"  # default folder of the cells
RATES = [1e-3, 1.8e-3, 3.2e-3, 5.6e-3, 1e-2, 1.8e-2, 3.2e-2, 5.6e-2]
ALPHAS = [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
GRID_RATES = [5.6e-3, 1e-2, 1.8e-2]
GRID_ALPHAS = [2.0, 4.0, 8.0]
BEST_POINTS = 3  # that are run with further seeds
FURTHER_SEEDS = [1, 2]
FURTHER = {
    "orchmoe k8": Variant({"alpha": 1.0, "abstract_tasks": 8}, like="orchmoe"),
    "lora": replication.EQUAL["lora"],
}
DEFAULTS = decision.DEFAULTS | {"out": "results/tuned_lora"}

Point = tuple[float, float]  # alpha, rate of the skills


@dataclass(frozen=True)
class LoraConfig:
    """Tuned LoRA: which cells are made."""

    stage: Literal["search", "cells", "further"] = "search"  # what to make


def row_of(point: Point) -> Variant:
    """Return the LoRA of a point, in the size of the replicates' LoRA."""
    alpha, rate = point
    return Variant({"method": "lora", "alpha": alpha, "lr_skills": rate}, like="lora")


def trials_of(study: Study, points: Iterable[Point], seeds: list[int], data: str) -> list[Cell]:
    """Return the trials of the points with these seeds."""
    rows = {f"{alpha:g} {rate:g}": row_of((alpha, rate)) for alpha, rate in points}
    return study.cells("lora_search", rows, {"": {"data": data}}, seeds, "dev tasks")


def dev_losses(study: Study, points: Iterable[Point], seeds: list[int], data: str) -> dict:
    """Make the trials that are missing. Return the mean dev loss of each point over the seeds."""
    points = list(points)
    trials = trials_of(study, points, seeds, data)
    study.run(trials)
    losses = {point: [] for point in points}
    for trial in trials:
        settings = trial.settings
        point = (settings.adapter.alpha, settings.training.lr_skills)
        loss = trial.result()["dev_loss"]
        losses[point].append(float("inf") if loss is None else loss)  # None: it diverged
    return {point: sum(values) / len(values) for point, values in losses.items()}


def beyond_the_edge(best: Point, tried: Iterable[Point]) -> list[Point]:
    """Return the untried neighbours of the best point on the axes of which it is an edge."""
    tried = list(tried)
    alphas = {alpha for alpha, _ in tried}
    rates = {rate for _, rate in tried}
    alpha, rate = best
    neighbours = []
    if alpha == min(alphas):
        neighbours.append((ALPHAS[ALPHAS.index(alpha) - 1], rate))
    if alpha == max(alphas):
        neighbours.append((ALPHAS[ALPHAS.index(alpha) + 1], rate))
    if rate == min(rates):
        neighbours.append((alpha, RATES[RATES.index(rate) - 1]))
    if rate == max(rates):
        neighbours.append((alpha, RATES[RATES.index(rate) + 1]))
    return neighbours


def search(study: Study, data: str) -> Point:
    """Make all trials of the search. Return the point that it chooses."""
    points = [(alpha, rate) for alpha in GRID_ALPHAS for rate in GRID_RATES]
    losses = dev_losses(study, points, [0], data)
    while True:
        best = min(losses, key=losses.get)
        further = beyond_the_edge(best, losses)
        if not further:
            break
        losses |= dev_losses(study, further, [0], data)

    three = sorted(losses, key=losses.get)[:BEST_POINTS]
    means = dev_losses(study, three, [0, *FURTHER_SEEDS], data)
    chosen = min(means, key=means.get)
    program.print_line(f"dev losses with seed 0: {losses}")
    program.print_line(f"means over three seeds: {means}; chosen: alpha, rate = {chosen}")
    chosen_file = {"alpha": chosen[0], "lr_skills": chosen[1], "cpu": kind_of_cpu()}
    program.write_json(study.results / "lora_chosen.json", chosen_file)
    return chosen


def make_cells(stage: str, config, settings) -> None:
    """Make the cells of a stage. They print no loss."""
    chosen = program.read_json(RESULTS / "lora_chosen.json")
    if kind_of_cpu() != chosen["cpu"]:
        raise UserError(f"the search ran on {chosen['cpu']}, and this is {kind_of_cpu()}")
    folders = ("out", "results")  # which are no settings of a cell
    planned = {name: value for name, value in replication.DEFAULTS.items() if name not in folders}
    settings = changed(settings, planned)
    study = Study(settings, pick_device(config, settings), config, replication.EQUAL)
    draws = program.read_json(RESULTS / "draws.json")  # those of the first comparison
    tuned = row_of((chosen["alpha"], chosen["lr_skills"]))
    primary = {"orchmoe": replication.EQUAL["orchmoe"], "tuned lora": tuned}
    stages = {"cells": (primary, replication.FROZEN), "further": (FURTHER,)}
    for rows in stages[stage]:
        study.run(replication.cells_to_make(study, draws, rows))


def main() -> None:
    choices = ("data", "model", "out", "results", "jobs", "gpu", "device")
    planned = all_flags_but(choices)
    flags, config, study_config, settings = read_study(__doc__, LoraConfig, DEFAULTS, planned)
    if not {"data", "model"} <= flags.keys():
        raise UserError("give --data and --model")
    settings = changed(settings, {"dtype": "bfloat16"})
    if "results" not in flags:
        folder = RESULTS if config.stage == "search" else COMPARED
        study_config = replace(study_config, results=str(folder))
    if config.stage != "search":
        make_cells(config.stage, study_config, settings)
        return
    study = Study(settings, pick_device(study_config, settings), study_config, decision.EQUAL)
    lists = program.read_json(decision.RESULTS / "tasks.json")
    folder = Path(study_config.out, "tasks")
    unseen = [*lists["test"], *lists["left out"]]
    search(study, str(subset(folder, Path(settings.dataset.data), lists["train"], unseen)))


if __name__ == "__main__":
    program.run_program(main)
