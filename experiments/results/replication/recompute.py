"""Compute the tables of the replicates once more, with the standard library alone.

Then compute what was not planned: how much single tasks count. With the folder of
Super-NaturalInstructions, also compute an interval over the sources of the tasks.

python experiments/results/replication/recompute.py [natural-instructions]

Test: pytest tests/experiments/test_recompute.py
"""

import json
import math
import statistics
import sys
from pathlib import Path

T = 2.131449545559323  # 97.5 % point of Student's t with 15 degrees of freedom
FOLDER = Path(__file__).parent
SEEDS = range(100, 116)
PAIRS = {  # of each comparison: rows that are subtracted, the planned primary pair first
    "first": (("orchmoe", "lora"),),
    "tuned": (
        ("orchmoe", "tuned lora"),
        ("orchmoe", "frozen router"),
        ("frozen router", "tuned lora"),
        ("orchmoe k8", "orchmoe"),
        ("orchmoe k8", "tuned lora"),
        ("orchmoe", "lora"),
        ("tuned lora", "lora"),
    ),
}
FOLDERS = {"first": FOLDER / "cells", "tuned": FOLDER / "tuned/cells"}
OUTCOMES = (("seen", "loss", 4), ("answers", "rougeL", 2), ("answers", "exact_match", 2))


def read_cells(comparison):
    """Return {row: {seed: cell}}."""
    cells = {}
    for path in FOLDERS[comparison].glob("*.json"):
        cell = json.loads(path.read_text(encoding="utf-8"))
        settings = cell["settings"]
        cells.setdefault(settings["row"], {})[settings["seed"]] = cell
    return cells


def differences(cells, one, other, part="seen", score="loss"):
    """Return for each replicate the differences of its tasks in a score, the lowest first."""
    replicates = []
    for seed in SEEDS:
        first, second = cells[one][seed][part]["tasks"], cells[other][seed][part]["tasks"]
        assert first.keys() == second.keys()
        replicates.append(sorted(first[name][score] - second[name][score] for name in first))
    return replicates


def interval(replicates):
    """Return mean, low and high end of a 95 % interval over the means of the replicates."""
    means = [statistics.fmean(tasks) for tasks in replicates]
    mean = statistics.fmean(means)
    half = T * statistics.stdev(means) / math.sqrt(len(SEEDS))
    return mean, mean - half, mean + half


def written(numbers, digits):
    """Return mean and interval as the tables have them."""
    mean, low, high = (f"{number:+.{digits}f}" for number in numbers)
    return f"{mean} [{low}, {high}]"


def planned_lines(cells, pairs):
    """Return a line for each difference of two rows in each outcome."""
    lines = []
    for one, other in pairs:
        for part, score, digits in OUTCOMES:
            found = interval(differences(cells, one, other, part, score))
            lines.append(f"{one} - {other}, {score}: {written(found, digits)}")
    return lines


def show_median(cells, one, other):
    """Show the median task, and on how many tasks the first row is better."""
    tasks = sum(differences(cells, one, other), [])
    below = sum(value < 0 for value in tasks)
    print(f"{one} - {other}: median {statistics.median(tasks):+.4f}, {below} below zero")


def show_single_tasks(cells, baseline):
    """Show how much single tasks count."""
    replicates = differences(cells, "orchmoe", baseline)
    tasks = sorted(sum(replicates, []))
    print(f"lowest task {tasks[0]:+.2f}")
    without = [row[1:] if row[0] == tasks[0] else row for row in replicates]
    print(f"without the lowest task: {written(interval(without), 4)}")
    without = [row[1:-1] for row in replicates]
    print(
        "without the lowest and the highest task of each replicate: "
        f"{written(interval(without), 4)}"
    )

    perplexities = [math.expm1(value) for value in tasks]
    print(f"geometric mean of the changes of perplexity {math.expm1(statistics.fmean(tasks)):+.1%}")
    print(f"arithmetic mean of the changes of perplexity {statistics.fmean(perplexities):+.1%}")
    print(f"change of perplexity of the median task {math.expm1(statistics.median(tasks)):+.1%}")
    print(f"share of the ten lowest tasks in the sum {sum(tasks[:10]) / sum(tasks):.0%}")
    lower, higher = sum(value < -0.2 for value in tasks), sum(value > 0.2 for value in tasks)
    print(f"tasks below -0.2: {lower}, above +0.2: {higher}")


def show_over_sources(cells, baseline, data):
    """Show an interval in which the tasks of one source are one unit."""
    sources = {}  # source: (replicate, difference) of each of its tasks
    tasks = []
    for seed in SEEDS:
        one = cells["orchmoe"][seed]["seen"]["tasks"]
        other = cells[baseline][seed]["seen"]["tasks"]
        for name in one:
            path = Path(data, "tasks", f"{name}.json")
            source = str(json.loads(path.read_text(encoding="utf-8"))["Source"])
            tasks.append(one[name]["loss"] - other[name]["loss"])
            sources.setdefault(source, []).append((seed, tasks[-1]))
    mean = statistics.fmean(tasks)
    squares = 0.0
    shared = 0  # tasks whose source also has a task of another replicate
    for found in sources.values():
        squares += sum(difference - mean for _, difference in found) ** 2
        if len({seed for seed, _ in found}) > 1:
            shared += len(found)
    count = len(sources)
    half = 1.96 * math.sqrt(squares * count / (count - 1)) / len(tasks)
    print(f"{count} sources; {shared} tasks share theirs with a task of another replicate")
    print(f"interval over sources [{mean - half:+.3f}, {mean + half:+.3f}]")


def main():
    for comparison, pairs in PAIRS.items():
        cells = read_cells(comparison)
        baseline = pairs[0][1]
        for line in planned_lines(cells, pairs):
            print(line)
        print("not planned, the differences of the 384 tasks in loss:")
        for one, other in pairs:
            show_median(cells, one, other)
        print(f"not planned, orchmoe - {baseline} in loss:")
        show_single_tasks(cells, baseline)
        if len(sys.argv) > 1:
            show_over_sources(cells, baseline, sys.argv[1])


if __name__ == "__main__":
    main()
