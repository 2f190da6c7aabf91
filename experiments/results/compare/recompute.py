"""Compute the differences in loss of README.md once more, with the standard library alone.

python experiments/results/compare/recompute.py

Test: pytest tests/experiments/test_tables.py
"""

import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean

CELLS = Path(__file__).parent / "cells.jsonl"
METHODS = ("moe-lora", "poly", "mhr", "HydraLoRA", "lora")


def t_quantile(freedom, parts=20_000):
    """Return the 97.5 % point of Student's t.

    With t = sqrt(freedom) tan(angle) its density is cos(angle)^(freedom - 1), up to a factor.
    """
    width = math.pi / 2 / parts
    mass = [0.0]  # from 0 to each angle, by the midpoint rule
    for i in range(parts):
        mass.append(mass[-1] + math.cos((i + 0.5) * width) ** (freedom - 1))
    wanted = 0.95 * mass[-1]
    i = next(i for i in range(parts) if mass[i + 1] >= wanted)
    angle = (i + (wanted - mass[i]) / (mass[i + 1] - mass[i])) * width
    return math.sqrt(freedom) * math.tan(angle)


def half_width(unit, seed, rest, units, seeds, freedom):
    """Return half of the 95 % interval of a mean over units and seeds, by Satterthwaite (1946).

    unit, seed, rest: mean squares. freedom: degrees of freedom of the units.
    """
    variance = max(unit + seed - rest, unit, seed)
    cautious = seed * max(1, 4 / seeds)  # few seeds often differ too little by chance
    largest = max(unit + cautious - rest, unit, cautious)
    parts = unit**2 / freedom + cautious**2 / (seeds - 1) + rest**2 / (freedom * (seeds - 1))
    found = max(largest**2 / parts, min(freedom, seeds - 1))
    return t_quantile(found) * math.sqrt(variance / (units * seeds))


def interval(values):
    """Return the mean of differences (tasks, seeds), and half of its 95 % interval over both."""
    tasks, seeds = len(values), len(values[0])
    by_task = [fmean(row) for row in values]
    by_seed = [fmean(column) for column in zip(*values, strict=True)]
    mean = fmean(by_task)
    rest = 0.0
    for row, of_task in zip(values, by_task, strict=True):
        for value, of_seed in zip(row, by_seed, strict=True):
            rest += (value - of_task - of_seed + mean) ** 2
    rest /= (tasks - 1) * (seeds - 1)
    unit = seeds * sum((of_task - mean) ** 2 for of_task in by_task) / (tasks - 1)
    seed = tasks * sum((of_seed - mean) ** 2 for of_seed in by_seed) / (seeds - 1)
    return mean, half_width(unit, seed, rest, tasks, seeds, tasks - 1)


def losses(cell, which):
    """Return {task: loss in nats per target token} of the seen or the unseen prompts."""
    prompts = cell[which]["prompts"]
    nats = defaultdict(float)
    tokens = defaultdict(int)
    for number, loss, count in zip(
        prompts["task"], prompts["loss"], prompts["tokens"], strict=True
    ):
        nats[number] += loss
        tokens[number] += count
    return {prompts["tasks"][number]: nats[number] / tokens[number] for number in nats}


def read_cells():
    """Return {row: its cells, in the order of their seeds}, without the trials."""
    cells = defaultdict(list)
    for line in CELLS.read_text(encoding="utf-8").splitlines():
        cell = json.loads(line)
        if cell["name"].startswith("methods/"):
            cells[cell["settings"]["row"]].append(cell)
    for of_row in cells.values():
        of_row.sort(key=lambda cell: cell["settings"]["seed"])
    return cells


def difference(cells, row, other, which):
    """Return a row minus another one as the tables have it: "mean [low, high]"."""
    columns = []  # of each seed
    for one, two in zip(cells[row], cells[other], strict=True):
        first, second = losses(one, which), losses(two, which)
        columns.append([first[task] - second[task] for task in first])
    mean, half = interval(list(zip(*columns, strict=True)))
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


if __name__ == "__main__":
    cells = read_cells()
    for method in METHODS:
        for which in ("seen", "unseen"):
            found = difference(cells, "orchmoe", method, which)
            print(f"orchmoe - {method}, {which}: {found}")
