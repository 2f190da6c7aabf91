"""Compute the differences of tables.md once more, with the standard library alone.

python experiments/results/claim/recompute.py
"""

import json
import math
import statistics
from pathlib import Path

FOLDER = Path(__file__).parent
COMPARED = ("moe-lora", "poly", "mhr")
FURTHER = ("lora", "HydraLoRA", "poly_of_clusters", "frozen_router")
OUTCOMES = (("seen", "loss", 4), ("answers", "rougeL", 2), ("answers", "exact_match", 2))


def t_quantile(freedom):
    """Return the 97.5 % point of Student's t, by Simpson's rule and bisection."""

    def mass(limit, parts=20_000):
        """Return the integral of cos(angle)^(freedom - 1) from 0 to the limit."""
        width = limit / parts
        total = 0.0
        for i in range(parts + 1):
            factor = 1 if i in (0, parts) else 2 + 2 * (i % 2)
            total += factor * math.cos(i * width) ** (freedom - 1)
        return total * width / 3

    wanted = 0.95 * mass(math.pi / 2)
    low, high = 0.0, math.pi / 2
    for _ in range(40):
        middle = (low + high) / 2
        if mass(middle) < wanted:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(low)


cells = {}  # (stage, row): the cells in the order of the draws
for line in (FOLDER / "cells.jsonl").read_text(encoding="utf-8").splitlines():
    cell = json.loads(line)
    stage, _, name = cell["name"].partition("/")
    cells.setdefault((stage, name.rpartition("-s")[0]), []).append(cell)
T = t_quantile(len(cells["first", "orchmoe"]) - 1)


def means(stage, row, part="seen", score="loss"):
    """Return the mean over tasks of each draw."""
    found = []
    for cell in cells[stage, row]:
        found.append(statistics.fmean(task[score] for task in cell[part]["tasks"].values()))
    return found


def show(name, values, digits):
    mean = statistics.fmean(values)
    if statistics.stdev(values) < 1e-10:
        print(f"{name}: {mean:+.{digits}f} (no interval)")
        return
    half = T * statistics.stdev(values) / math.sqrt(len(values))
    low, high = mean - half, mean + half
    print(f"{name}: {mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]")


def show_differences(stage, others):
    """Show OrchMoE minus each other row, which are of this stage."""
    of_orchmoe = "first" if stage == "further" else stage
    for other in others:
        for part, score, digits in OUTCOMES:
            one = means(of_orchmoe, "orchmoe", part, score)
            values = [a - b for a, b in zip(one, means(stage, other, part, score), strict=True)]
            show(f"{stage}, orchmoe - {other}, {score}", values, digits)


def show_leads():
    """Show how much larger the lead is with the fewer examples."""
    for other in COMPARED:
        columns = [means(stage, row) for stage in ("second", "first") for row in (other, "orchmoe")]
        values = [(a - b) - (c - d) for a, b, c, d in zip(*columns, strict=True)]
        show(f"lead over {other}, fewer - more examples", values, 4)


show_differences("first", COMPARED)
if ("second", "orchmoe") in cells:
    show_differences("second", COMPARED)
    show_leads()
if ("further", "lora") in cells:
    show_differences("further", FURTHER)
