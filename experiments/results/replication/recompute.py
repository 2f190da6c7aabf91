"""Compute the numbers of the replicates once more, with the standard library alone.

These are the planned differences, and what was not planned: how much single tasks count, how the
two comparisons and the two kinds of CPU differ, and the search for the LoRA. With the folder of
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
T_OF_TWO = 2.4898797034798923  # 98.75 % point: two intervals cover 95 % together
SEEDS = range(100, 116)
PAIRS = {  # folder of the cells: rows that are subtracted, the planned primary pair first
    "cells": (("orchmoe", "lora"),),
    "tuned/cells": (
        ("orchmoe", "tuned lora"),
        ("orchmoe", "frozen router"),
        ("frozen router", "tuned lora"),
        ("orchmoe k8", "orchmoe"),
        ("orchmoe k8", "tuned lora"),
        ("orchmoe", "lora"),
        ("tuned lora", "lora"),
    ),
}
OUTCOMES = (("seen", "loss", 4), ("answers", "rougeL", 2), ("answers", "exact_match", 2))


def read_cells(folder):
    """Return {row: {seed: cell}} of the cells whose names begin with this folder."""
    cells = {}
    path = Path(__file__).parent / "cells.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines():
        cell = json.loads(line)
        if cell["name"].startswith(f"{folder}/"):
            settings = cell["settings"]
            cells.setdefault(settings["row"], {})[settings["seed"]] = cell
    return cells


def differences(row, other, part="seen", score="loss"):
    """Return for each replicate the differences of its tasks in a score, the lowest first.

    row, other: the cells of two rows, {seed: cell}.
    """
    replicates = []
    for seed in SEEDS:
        first, second = row[seed][part]["tasks"], other[seed][part]["tasks"]
        assert first.keys() == second.keys()
        replicates.append(sorted(first[name][score] - second[name][score] for name in first))
    return replicates


def means_of(replicates):
    """Return the mean over tasks of each replicate."""
    return [statistics.fmean(tasks) for tasks in replicates]


def interval(values, t=T):
    """Return mean, low and high end of the t interval over one value of each replicate."""
    mean = statistics.fmean(values)
    half = t * statistics.stdev(values) / math.sqrt(len(SEEDS))
    return mean, mean - half, mean + half


def written(numbers, digits):
    """Return mean and interval as the tables have them."""
    mean, low, high = (f"{number:+.{digits}f}" for number in numbers)
    return f"{mean} [{low}, {high}]"


def in_per_cent(numbers):
    """Return changes of the loss as changes of perplexity in per cent."""
    return [100 * math.expm1(number) for number in numbers]


def planned_lines(cells, pairs):
    """Return a line for each difference of two rows in each outcome."""
    lines = []
    for one, other in pairs:
        for part, score, digits in OUTCOMES:
            found = interval(means_of(differences(cells[one], cells[other], part, score)))
            lines.append(f"{one} - {other}, {score}: {written(found, digits)}")
    return lines


# ------------------------------------------------------------------------------------- not planned


def p_of_t(values):
    """Return the two-sided p value of Student's t, by Simpson's rule."""
    t = abs(statistics.fmean(values)) / (statistics.stdev(values) / math.sqrt(16))
    scale = math.gamma(8) / (math.sqrt(15 * math.pi) * math.gamma(7.5))
    steps = 10_000
    total = 0.0
    for i in range(steps + 1):
        weight = 1 if i in (0, steps) else 2 + 2 * (i % 2)
        total += weight * scale * (1 + (t * i / steps) ** 2 / 15) ** -8
    return 1 - 2 * total * t / steps / 3


def p_of_ranks(values):
    """Return the exact two-sided p value of Wilcoxon's signed ranks. No two values are equal."""
    ranked = sorted(values, key=abs)
    above = sum(rank for rank, value in enumerate(ranked, start=1) if value > 0)
    most = len(values) * (len(values) + 1) // 2
    ways = [1] + [0] * most  # number of subsets of the ranks that have each sum
    for rank in range(1, len(values) + 1):
        for total in range(most, rank - 1, -1):
            ways[total] += ways[total - rank]
    return min(1, 2 * sum(ways[: min(above, most - above) + 1]) / 2 ** len(values))


def show_lead(cells, baseline):
    """Show the primary lead in other ways, and how much single tasks count."""
    replicates = differences(cells["orchmoe"], cells[baseline])
    means = means_of(replicates)
    print(f"p of t {p_of_t(means):.2g}, of signed ranks {p_of_ranks(means):.2g}")
    print(f"interval if two primaries are counted: {written(interval(means, T_OF_TWO), 3)}")

    tasks = sorted(sum(replicates, []))
    print(f"lowest task {tasks[0]:+.2f}")
    without = [row[1:] if row[0] == tasks[0] else row for row in replicates]
    print(f"without the lowest task: {written(interval(means_of(without)), 4)}")
    without = [row[1:-1] for row in replicates]
    both = written(interval(means_of(without)), 4)
    print(f"without the lowest and the highest task of each replicate: {both}")

    perplexities = [math.expm1(value) for value in tasks]
    print(f"geometric mean of the changes of perplexity {math.expm1(statistics.fmean(tasks)):+.1%}")
    print(f"arithmetic mean of the changes of perplexity {statistics.fmean(perplexities):+.1%}")
    print(f"change of perplexity of the median task {math.expm1(statistics.median(tasks)):+.1%}")
    medians = interval([statistics.median(row) for row in replicates])
    print(f"the same over the replicates' medians, %: {written(in_per_cent(medians), 1)}")
    print(f"share of the ten lowest tasks in the sum {sum(tasks[:10]) / sum(tasks):.0%}")
    gains = sum(value for value in tasks if value < 0)
    losses = sum(value for value in tasks if value > 0)
    print(f"share of the ten largest gains in all gains {sum(tasks[:10]) / gains:.0%}")
    print(f"share of the ten largest losses in all losses {sum(tasks[-10:]) / losses:.0%}")
    print(f"mean without both {statistics.fmean(tasks[10:-10]):+.3f}")
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


def show_correlation(first, second):
    """Show how the two primary leads go together."""
    leads = means_of(differences(first["orchmoe"], first["lora"]))
    others = means_of(differences(second["orchmoe"], second["tuned lora"]))
    mean, other = statistics.fmean(leads), statistics.fmean(others)
    products = [(x - mean) * (y - other) for x, y in zip(leads, others, strict=True)]
    spread = statistics.stdev(leads) * statistics.stdev(others)
    print(f"correlation of the two leads over replicates {sum(products) / 15 / spread:.2f}")


def show_two_cpus(first, second):
    """Show how much a task differs between the two kinds of CPU, with all else equal."""
    for row in ("orchmoe", "lora"):
        tasks = sum(differences(first[row], second[row]), [])
        largest = max(abs(value) for value in tasks)
        spread = statistics.stdev(tasks)
        print(f"{row} on two CPUs: sd of a task {spread:.3f}, the largest {largest:.2f}")


def show_search():
    """Show the dev losses of the search for the LoRA, and the means of points with three seeds."""
    for row, trials in read_cells("lora_search").items():
        losses = [trials[seed]["dev_loss"] for seed in sorted(trials)]
        each = ", ".join(f"{loss:.3f}" for loss in losses)
        print(f"alpha and rate {row}: {each}; mean {statistics.fmean(losses):.4f}")


def main():
    for folder, pairs in PAIRS.items():
        cells = read_cells(folder)
        for line in planned_lines(cells, pairs):
            print(line)
        print("not planned, the differences of the 384 tasks in loss:")
        for one, other in pairs:
            tasks = sum(differences(cells[one], cells[other]), [])
            below = sum(value < 0 for value in tasks)
            print(f"{one} - {other}: median {statistics.median(tasks):+.4f}, {below} below zero")
        baseline = pairs[0][1]
        print(f"not planned, orchmoe - {baseline} in loss:")
        show_lead(cells, baseline)
        if len(sys.argv) > 1:
            show_over_sources(cells, baseline, sys.argv[1])
        print()
    first, second = read_cells("cells"), read_cells("tuned/cells")
    show_correlation(first, second)
    show_two_cpus(first, second)
    show_search()


if __name__ == "__main__":
    main()
