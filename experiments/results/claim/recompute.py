"""Compute the differences of tables.md once more, with the standard library alone.

python experiments/results/claim/recompute.py
"""

import json
import math
import statistics
from pathlib import Path

FOLDER = Path(__file__).parent
COMPARED = ("moe-lora", "poly", "mhr")
OUTCOMES = (("seen", "loss", 4), ("answers", "rougeL", 2), ("answers", "exact_match", 2))


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
    """Return the cells of each (stage, row) in the order of the draws."""
    path = FOLDER / "cells.jsonl"
    if not path.exists():
        raise SystemExit(f"{path}: not there; it is made when all cells of a family are there")
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        cell = json.loads(line)
        if "diverged" in cell:
            raise SystemExit(f"{path}: {cell['name']} diverged; this program needs all scores")
        stage, _, name = cell["name"].partition("/")
        found.setdefault((stage, name.rpartition("-s")[0]), []).append(cell)
    if ("first", "orchmoe") not in found:
        raise SystemExit(f"{path}: the cells of the first family are not there")
    for of_row in found.values():
        of_row.sort(key=lambda cell: cell["settings"]["seed"])
    return found


cells = read_cells()
T = t_quantile(len(cells["first", "orchmoe"]) - 1)


def means(stage, row, part="seen", score="loss"):
    """Return the mean over tasks of each draw."""
    found = []
    for cell in cells[stage, row]:
        found.append(statistics.fmean(task[score] for task in cell[part]["tasks"].values()))
    return found


def interval(values):
    """Return the mean, and the ends of its 95 % interval by Student's t."""
    mean = statistics.fmean(values)
    half = T * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def show(name, values, digits):
    mean, low, high = interval(values)
    if high - low < 1e-10:
        print(f"{name}: {mean:+.{digits}f} (no interval)")
    else:
        print(f"{name}: {mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]")


def differences_from(stage, other, part="seen", score="loss"):
    """Return OrchMoE minus another row of this stage, draw by draw."""
    one = means(stage, "orchmoe", part, score)
    return [a - b for a, b in zip(one, means(stage, other, part, score), strict=True)]


def show_differences(stage, others):
    """Show OrchMoE minus each other row in each outcome."""
    for other in others:
        for part, score, digits in OUTCOMES:
            values = differences_from(stage, other, part, score)
            show(f"{stage}, orchmoe - {other}, {score}", values, digits)


def show_verdicts(stage):
    """Show what each difference in loss decides, by Hochberg's step-up procedure."""
    p_values = {other: p_value(differences_from(stage, other)) for other in COMPARED}
    by_size = sorted(p_values.values(), reverse=True)
    limit = 0.0  # p values up to it decide
    for tests, largest in enumerate(by_size, start=1):
        if largest < 0.05 / tests:
            limit = largest
            break
    verdicts = []
    for other, p in p_values.items():
        mean = statistics.fmean(differences_from(stage, other))
        verdict = "better" if mean < 0 else "worse"
        if p > limit:
            verdict = "undecided"
        verdicts.append(verdict)
        digits = "<0.0001" if p < 1e-4 else f"{p:.4f}"
        print(f"{stage}, orchmoe - {other}, p and verdict: {digits} | {verdict}")
    answer = "yes" if set(verdicts) == {"better"} else "not shown"
    print(f"{stage}, answer: Better than all {len(COMPARED)}: {answer}.")


def show_leads():
    """Show OrchMoE's lead with more and with fewer examples, and how much they differ.

    In the end answer whether OrchMoE needs fewer examples.
    """
    grows = []  # whether the lead is surely larger with fewer examples
    behind = []  # the methods that are better than OrchMoE with fewer examples
    for other in COMPARED:
        more = [-value for value in differences_from("first", other)]
        fewer = [-value for value in differences_from("second", other)]
        change = [a - b for a, b in zip(fewer, more, strict=True)]
        show(f"lead over {other}, more examples", more, 4)
        show(f"lead over {other}, fewer examples", fewer, 4)
        show(f"lead over {other}, fewer - more examples", change, 4)
        _, low, _ = interval(change)
        grows.append(low > 0)
        if statistics.fmean(fewer) < 0:
            behind.append(other)
    answer = "not shown"
    if all(grows) and behind:
        answer = f"no: with fewer examples it is still behind {' and '.join(behind)}, but by less"
    elif all(grows):
        answer = "yes"
    print(f"second, answer: Needs fewer examples than all {len(COMPARED)}: {answer}.")


def main():
    show_differences("first", COMPARED)
    show_verdicts("first")
    if ("second", "orchmoe") in cells:
        show_differences("second", COMPARED)
        show_verdicts("second")
        show_leads()


if __name__ == "__main__":
    main()
