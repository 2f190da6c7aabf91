"""The planned analysis of sixteen replicates: a t interval over their means.

There are two comparisons. In the first the baseline is the LoRA of plan.md, in the second that of
lora_plan.md (both in experiments/results/replication). This program exits with 2 until all 32
cells of the primary outcome are there. Each further row is shown when its sixteen cells are there.

    python -m experiments.replication_analysis       # writes tables.md and replicates.png
    python -m experiments.replication_analysis --baseline tuned

Test: pytest tests/experiments/test_replication.py
"""

import importlib.util
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments import tables
from experiments.replication import FIRST_SEED, REPLICATES, RESULTS
from experiments.study import file_name
from experiments.tables import Difference, interval, publish, signed, table
from support import program
from support.program import UserError

MARGIN = 0.02  # nats; a smaller difference counts as none
SEEDS = range(FIRST_SEED, FIRST_SEED + REPLICATES)
FOLDERS = {"lora": RESULTS, "tuned": RESULTS / "tuned"}  # of each --baseline
# The rows that are subtracted from each other. The first pair of a comparison is its primary one.
PAIRS = {
    "lora": (("orchmoe", "lora"), ("orchmoe", "frozen router"), ("frozen router", "lora")),
    "tuned": (
        ("orchmoe", "tuned lora"),
        ("orchmoe", "frozen router"),
        ("frozen router", "tuned lora"),
    ),
}
FURTHER_PAIRS = {  # of further_plan.md, which gives the first one a verdict, too
    "lora": (),
    "tuned": (
        ("orchmoe k8", "orchmoe"),
        ("orchmoe k8", "tuned lora"),
        ("orchmoe", "lora"),
        ("tuned lora", "lora"),
    ),
}
NAMES = {
    "orchmoe": "OrchMoE",
    "lora": "LoRA",
    "tuned lora": "the LoRA of the joint search",
    "frozen router": "a frozen router",
}
# Outcome: part of a cell, score of a task there, digits to show. The loss is in nats.
OUTCOMES = {
    "loss": ("seen", "loss", 4),
    "ROUGE-L": ("answers", "rougeL", 2),
    "exact match": ("answers", "exact_match", 2),
}
Cells = dict[str, list[dict[str, Any]]]  # of each row, in the order of the seeds


@dataclass(frozen=True)
class AnalysisConfig:
    """Analysis: which comparison, and where its cells are."""

    baseline: Literal["lora", "tuned"] = "lora"  # the LoRA of plan.md, or of lora_plan.md
    results: str = ""  # folder of the cells, to which table and figure go (default: ours)


def read_cells(results: Path, baseline: str) -> Cells:
    """Return the cells of the two primary rows, and those of each other row if all are there.

    Raise UserError if a primary cell is missing, or if the cells do not fit.
    """
    primary = PAIRS[baseline][0]
    found = {}
    for row in dict.fromkeys(itertools.chain(*PAIRS[baseline], *FURTHER_PAIRS[baseline])):
        paths = [results / "cells" / f"{file_name(row)}-s{seed}.json" for seed in SEEDS]
        missing = [path for path in paths if not path.exists()]
        if missing and row in primary:
            raise UserError(f"{missing[0]}: not finished; nothing is shown before all cells are")
        if not missing:
            found[row] = [program.read_json(path) for path in paths]
    for seed, *cells in zip(SEEDS, *found.values(), strict=True):
        for cell in cells:
            if "diverged" in cell:
                raise UserError(f"replicate {seed}: a cell diverged, so there is no verdict")
            if cell["settings"]["train_tasks"] != cells[0]["settings"]["train_tasks"]:
                raise UserError(f"replicate {seed}: its cells have other tasks")
            for name, value in made_on(found["orchmoe"][0]).items():
                if made_on(cell)[name] != value:
                    raise UserError(f"replicate {seed}: a cell differs from others in {name!r}")
    return found


def made_on(cell: dict[str, Any]) -> dict[str, Any]:
    """Return what must be equal in all cells."""
    of_settings = {name: cell["settings"][name] for name in ("cpu", "computed")}
    return of_settings | {name: cell[name] for name in ("tree", "torch", "threads")}


def means(cells: list[dict[str, Any]], outcome: str) -> np.ndarray:
    """Return the mean over tasks of each replicate (16,1), as `interval` takes them."""
    part, score, _ = OUTCOMES[outcome]
    found = []
    for cell in cells:
        found.append(np.mean([scores[score] for scores in cell[part]["tasks"].values()]))
    return np.array(found)[:, None]


def verdict(difference: Difference) -> str:
    """Return what the primary difference decides, as the plan says."""
    _, low, high = difference
    if -MARGIN < low and high < MARGIN:
        return f"equivalent within {MARGIN}"
    return tables.verdict(difference)


def text(found: Cells, baseline: str) -> str:
    """Return the differences, and the means of each replicate, in Markdown."""
    planned, further = PAIRS[baseline], FURTHER_PAIRS[baseline]
    with_verdict = (*planned[:1], *further[:1])
    rows = []
    for one, other in (*planned, *further):
        if not {one, other} <= found.keys():
            continue
        for outcome, (_, _, digits) in OUTCOMES.items():
            values = means(found[one], outcome) - means(found[other], outcome)
            difference = interval(values)
            row = [f"{one} - {other}", outcome, signed(difference, digits)]
            row += [f"{values.std(ddof=1):.{digits}f}", f"{(values < 0).sum()} of {REPLICATES}"]
            perplexity = tuple(100 * math.expm1(value) for value in difference)
            row.append(signed(perplexity, 1) if outcome == "loss" else "-")
            has_verdict = outcome == "loss" and (one, other) in with_verdict
            rows.append([*row, verdict(difference) if has_verdict else "-"])
    head = ["difference", "of", "mean and 95 % interval", "sd", "below zero", "perplexity, %"]
    differences = table([*head, "verdict"], rows)

    rows = []
    for i, seed in enumerate(SEEDS):
        row = [seed, found["orchmoe"][i]["settings"]["cpu"]]
        rows.append(row + [f"{means(cells, 'loss')[i, 0]:.4f}" for cells in found.values()])
    losses = table(["replicate", "CPU", *(f"{row}, loss" for row in found)], rows)
    return f"{differences}\n\n{losses}\n"


def figure(found: Cells, baseline: str, path: Path) -> Path:
    """Draw the differences of the planned pairs, sorted, and their mean with its interval.

    It is drawn in the width of a page, and needs matplotlib, but no display.
    """
    import matplotlib

    matplotlib.use("Agg")  # draws into memory
    import matplotlib.pyplot as plt

    plt.rcParams["axes.spines.top"] = False
    plt.rcParams["axes.spines.right"] = False
    plt.rcParams["font.size"] = 9
    pairs = [pair for pair in PAIRS[baseline] if set(pair) <= found.keys()]
    canvas, axes = plt.subplots(
        ncols=len(pairs), figsize=(8.5, 3.4), layout="constrained", sharex=True, squeeze=False
    )
    title = f"Loss on seen tasks in {REPLICATES} replicates, in nats per target token"
    below = "a dot for each replicate, sorted; black: mean and 95 % interval; grey: the margin"
    canvas.suptitle(f"{title}\n{below}", fontsize=10)
    for panel, (one, other) in zip(axes[0], pairs, strict=True):
        panel.axvspan(-MARGIN, MARGIN, color="#dddddd", zorder=0)
        panel.axvline(0, color="black", linewidth=0.8)
        values = means(found[one], "loss") - means(found[other], "loss")
        heights = range(len(values), 0, -1)
        panel.plot(np.sort(values, axis=0), heights, "o", color="#0072B2", markersize=4)
        mean, low, high = interval(values)
        panel.errorbar(mean, -0.5, xerr=[[mean - low], [high - mean]], fmt="ko", capsize=4)
        panel.text(0, len(values) + 1.2, "equal", ha="center", fontsize=8)
        panel.set_title(f"{NAMES[one]}\nminus {NAMES[other]}\n", fontsize=9)
        panel.set_xlabel(f"left of zero,\n{NAMES[one]} is better")
        panel.set_ylim(-1.5, len(values) + 1)
        panel.set_yticks([])
    with program.atomic_write(path) as file:
        canvas.savefig(file, format="png", dpi=150)
    return path


def main() -> None:
    config = program.from_flags(AnalysisConfig, program.read_flags(__doc__, AnalysisConfig))
    results = Path(config.results or FOLDERS[config.baseline])
    found = read_cells(results, config.baseline)
    publish(text(found, config.baseline), results / "tables.md")
    if importlib.util.find_spec("matplotlib"):
        path = figure(found, config.baseline, results / "replicates.png")
        program.print_line(f"written: {path}")


if __name__ == "__main__":
    program.run_program(main)
