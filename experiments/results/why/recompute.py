"""Compute the differences of tables.md once more, with the standard library alone.

python experiments/results/why/recompute.py
"""

import json
import math
import statistics
from pathlib import Path

FOLDER = Path(__file__).parent
OUTCOMES = {"loss": ("loss", 4), "ROUGE-L": ("rougeL", 2), "exact match": ("exact_match", 2)}
MIXING = (("orchmoe", "orchmoe, factors"), ("true task", "true task, factors"))
ROWS = ("frozen router", "true task", "orchmoe, factors", "true task, factors", "mhr", "lora")


def mass(limit, freedom, parts=20_000):
    """Return the integral of cos(angle)^(freedom - 1) from 0 to the limit, by Simpson's rule.

    With t = sqrt(freedom) tan(angle) it is the density of Student's t, up to a factor.
    """
    width = limit / parts
    total = 0.0
    for i in range(parts + 1):
        factor = 1 if i in (0, parts) else 2 + 2 * (i % 2)
        total += factor * math.cos(i * width) ** (freedom - 1)
    return total * width / 3


def t_quantile(freedom):
    """Return the 97.5 % point of Student's t, by bisection."""
    wanted = 0.95 * mass(math.pi / 2, freedom)
    low, high = 0.0, math.pi / 2
    for _ in range(40):
        middle = (low + high) / 2
        if mass(middle, freedom) < wanted:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(low)


def p_value(values):
    """Return the two-sided p value of Student's t test that the mean is 0."""
    freedom = len(values) - 1
    error = statistics.stdev(values) / math.sqrt(len(values))
    angle = math.atan(abs(statistics.fmean(values)) / error / math.sqrt(freedom))
    return 1 - mass(angle, freedom) / mass(math.pi / 2, freedom)


def read_cells():
    """Return the cells of each row in the order of the draws."""
    path = FOLDER / "cells.jsonl"
    if not path.exists():
        raise SystemExit(f"{path}: not there; it is made when all cells are there")
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        cell = json.loads(line)
        if "diverged" in cell:
            raise SystemExit(f"{path}: {cell['name']} diverged; this program needs all scores")
        found.setdefault(cell["settings"]["row"], []).append(cell)
    for of_row in found.values():
        of_row.sort(key=lambda cell: cell["settings"]["seed"])
    return found


cells = read_cells()


def of_tasks(pair, which, score):
    """Return the first row minus the second one, {task: difference} of each draw."""
    found = []
    for one, other in zip(cells[pair[0]], cells[pair[1]], strict=True):
        first, second = one[which]["tasks"], other[which]["tasks"]
        if first.keys() != second.keys():
            raise SystemExit(f"{pair}: two cells of a draw have different {which} tasks")
        found.append({task: first[task][score] - second[task][score] for task in first})
    return found


def of_draws(pair, which="seen", score="loss"):
    """Return the mean difference over tasks of each draw."""
    return [statistics.fmean(tasks.values()) for tasks in of_tasks(pair, which, score)]


def over_tasks(pair, which, score):
    """Return the mean difference over draws of each task. All draws must have the same tasks."""
    draws = of_tasks(pair, which, score)
    return [statistics.fmean(draw[task] for draw in draws) for task in draws[0]]


def interval(values):
    """Return the mean, and the ends of its 95 % interval by Student's t."""
    mean = statistics.fmean(values)
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def show(name, which, outcome, values, decision=""):
    """Print a line of the tables: difference, set, score, mean, interval, and the decision."""
    _, digits = OUTCOMES[outcome]
    mean, low, high = (f"{value:+.{digits}f}" for value in interval(values))
    print(f"{name} | {which} | {outcome} | {mean} [{low}, {high}]{decision}")


def show_new_tasks(pair, outcome):
    """Print the two lines of a difference on new tasks: over draws, and over tasks."""
    score, _ = OUTCOMES[outcome]
    name = " minus ".join(pair)
    show(name, "new tasks, over draws", outcome, of_draws(pair, "unseen", score))
    show(name, "new tasks, over tasks", outcome, over_tasks(pair, "unseen", score))


def verdicts(differences):
    """Return p, the verdict of Holm's step-down procedure, and whether it is equivalent."""
    p_values = {name: p_value(values) for name, values in differences.items()}
    decided = set()
    for number, name in enumerate(sorted(p_values, key=p_values.get)):
        if p_values[name] >= 0.05 / (len(p_values) - number):
            break
        decided.add(name)
    found = {}
    for name, values in differences.items():
        mean, low, high = interval(values)
        verdict = "undecided"
        if name in decided:
            verdict = "better" if mean < 0 else "worse"
        p = p_values[name]
        digits = "<0.0001" if p < 1e-4 else f"{p:.4f}"
        equivalent = "yes" if -0.02 < low and high < 0.02 else "no"
        found[name] = f" | {digits} | {verdict} | {equivalent}"
    return found


def minus(one, other):
    return [a - b for a, b in zip(one, other, strict=True)]


def main():
    first, second = (of_draws(pair) for pair in MIXING)
    primary = {
        "orchmoe minus lora": of_draws(("orchmoe", "lora")),
        "orchmoe minus mhr": of_draws(("orchmoe", "mhr")),
        "outputs minus factors": [(a + b) / 2 for a, b in zip(first, second, strict=True)],
    }
    decisions = verdicts(primary)
    for name, values in primary.items():
        show(name, "seen", "loss", values, decisions[name])
    for pair, values in zip(MIXING, (first, second), strict=True):
        show(" minus ".join(pair), "seen", "loss", values)
    show("the first of these minus the second", "seen", "loss", minus(first, second))

    for pair in (("orchmoe", "frozen router"), ("orchmoe", "true task"), ("mhr", "lora")):
        show(" minus ".join(pair), "seen", "loss", of_draws(pair))
    for other in ("lora", "mhr", "true task"):
        show_new_tasks(("orchmoe", other), "loss")
    for other in ROWS:
        pair = ("orchmoe", other)
        for outcome in ("ROUGE-L", "exact match"):
            score, _ = OUTCOMES[outcome]
            show(" minus ".join(pair), "seen", outcome, of_draws(pair, "seen", score))
            show_new_tasks(pair, outcome)


if __name__ == "__main__":
    main()
