"""The planned analysis of the sixteen replicates: a t interval over their means.

See experiments/results/replication/plan.md, and lora_plan.md for the LoRA that was tuned further.
What it computes was fixed before the cells of plan.md were finished, and it exits with 2 until all
32 cells of its primary outcome are there. Each other row is shown when its sixteen cells are there.

    python -m experiments.replication_analysis       # writes tables.md and replicates.png

Test: pytest tests/experiments/test_replication.py
"""

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments import tables
from experiments.replication import EQUAL, FIRST_SEED, FROZEN, REPLICATES, RESULTS
from experiments.study import file_name
from experiments.tables import Difference, interval, publish, signed, table
from support import program
from support.program import UserError

MARGIN = 0.02  # nats; a smaller difference counts as none
SEEDS = range(FIRST_SEED, FIRST_SEED + REPLICATES)
TUNED = "tuned lora"  # experiments/results/replication/lora.py makes its cells
PAIRS = (
    ("orchmoe", "lora"),
    ("orchmoe", "frozen router"),
    ("frozen router", "lora"),
    ("orchmoe", TUNED),
)
PRIMARY = (PAIRS[0], PAIRS[3])  # of the two plans
NAMES = {
    "orchmoe": "OrchMoE",
    "lora": "LoRA",
    "frozen router": "a frozen router",
    TUNED: "the LoRA tuned further",
}
# Outcome: part of a cell, score of a task there, digits to show. The loss is in nats.
OUTCOMES = {
    "loss": ("seen", "loss", 4),
    "ROUGE-L": ("answers", "rougeL", 2),
    "exact match": ("answers", "exact_match", 2),
}
# Equal in all cells of a replicate, and in all cells.
SAME = ("cpu", "computed", "train_tasks")
SAME_EVERYWHERE = ("tree", "torch", "threads")
Cells = dict[str, list[dict[str, Any]]]  # of each row, in the order of the seeds


@dataclass(frozen=True)
class AnalysisConfig:
    """Analysis: where the cells are."""

    results: str = ""  # folder of the cells, to which table and figure go (default: ours)


def read_cells(results: Path) -> Cells:
    """Return the cells of the primary rows, and those of each other row if all are there.

    Raise UserError if a primary cell is missing, or if the cells do not fit.
    """
    found = {}
    for row in (*EQUAL, *FROZEN, TUNED):
        paths = [results / "cells" / f"{file_name(row)}-s{seed}.json" for seed in SEEDS]
        missing = [path for path in paths if not path.exists()]
        if row in EQUAL and missing:
            raise UserError(f"{missing[0]}: not finished; nothing is shown before all cells are")
        if not missing:
            found[row] = [program.read_json(path) for path in paths]
    for seed, *cells in zip(SEEDS, *found.values(), strict=True):
        for cell in cells:
            if "diverged" in cell:
                raise UserError(f"replicate {seed}: a cell diverged, so there is no verdict")
            for name in SAME:
                if cell["settings"][name] != cells[0]["settings"][name]:
                    raise UserError(f"replicate {seed}: its cells differ in {name!r}")
            for name in SAME_EVERYWHERE:
                if cell[name] != found["orchmoe"][0][name]:
                    raise UserError(f"replicate {seed}: a cell differs from others in {name!r}")
    return found


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


def text(found: Cells) -> str:
    """Return the differences, and the means of each replicate, in Markdown."""
    rows = []
    for one, other in PAIRS:
        for outcome, (_, _, digits) in OUTCOMES.items():
            if {one, other} <= found.keys():
                values = means(found[one], outcome) - means(found[other], outcome)
                difference = interval(values)
                row = [f"{one} - {other}", outcome, signed(difference, digits)]
                row += [f"{values.std(ddof=1):.{digits}f}", f"{(values < 0).sum()} of {REPLICATES}"]
                perplexity = tuple(100 * math.expm1(value) for value in difference)
                row.append(signed(perplexity, 1) if outcome == "loss" else "-")
                primary = outcome == "loss" and (one, other) in PRIMARY
                rows.append([*row, verdict(difference) if primary else "-"])
    head = ["difference", "of", "mean and 95 % interval", "sd", "below zero", "perplexity, %"]
    differences = table([*head, "verdict"], rows)

    rows = []
    for i, seed in enumerate(SEEDS):
        row = [seed, found["orchmoe"][i]["settings"]["cpu"]]
        rows.append(row + [f"{means(cells, 'loss')[i, 0]:.4f}" for cells in found.values()])
    losses = table(["replicate", "CPU", *(f"{row}, loss" for row in found)], rows)
    return f"{differences}\n\n{losses}\n"


def figure(found: Cells, path: Path) -> Path:
    """Draw the differences of each pair, sorted, and their mean with its interval.

    It is drawn in the width of a page, and needs matplotlib, but no display.
    """
    import matplotlib

    matplotlib.use("Agg")  # draws into memory
    import matplotlib.pyplot as plt

    plt.rcParams["axes.spines.top"] = False
    plt.rcParams["axes.spines.right"] = False
    plt.rcParams["font.size"] = 9
    pairs = [pair for pair in PAIRS if set(pair) <= found.keys()]
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
    results = Path(config.results or RESULTS)
    found = read_cells(results)
    publish(text(found), results / "tables.md")
    if importlib.util.find_spec("matplotlib"):
        program.print_line(f"written: {figure(found, results / 'replicates.png')}")


if __name__ == "__main__":
    program.run_program(main)
