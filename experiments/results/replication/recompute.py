"""Compute the tables of the replicates once more, with the standard library alone.

Then compute what was not planned: how much single tasks count. With the folder of
Super-NaturalInstructions, also compute an interval over the sources of the tasks. A comparison is
left out until all cells of its two primary rows are there.

python experiments/results/replication/recompute.py [natural-instructions]
"""

import json
import math
import statistics
import sys
from pathlib import Path

T = 2.131449545559323  # 97.5 % point of Student's t with 15 degrees of freedom
FOLDER = Path(__file__).parent
SEEDS = range(100, 116)
COMPARISONS = {  # folder of the cells: rows that are subtracted, the planned primary pair first
    "cells": (("orchmoe", "lora"), ("orchmoe", "frozen_router"), ("frozen_router", "lora")),
    "tuned/cells": (
        ("orchmoe", "tuned_lora"),
        ("orchmoe", "frozen_router"),
        ("frozen_router", "tuned_lora"),
        ("orchmoe_k8", "orchmoe"),
        ("orchmoe_k8", "tuned_lora"),
        ("orchmoe", "lora"),
        ("tuned_lora", "lora"),
    ),
}


def is_finished(cells, row):
    return len(list(cells.glob(f"{row}-*"))) == len(SEEDS)


def tasks_of(cells, row, seed, part="seen"):
    return json.loads((cells / f"{row}-s{seed}.json").read_text(encoding="utf-8"))[part]["tasks"]


def mean_of(cells, row, seed, part, score):
    return statistics.fmean(scores[score] for scores in tasks_of(cells, row, seed, part).values())


def show(name, differences, digits=4):
    mean = statistics.fmean(differences)
    half = T * statistics.stdev(differences) / math.sqrt(16)
    low, high = mean - half, mean + half
    print(f"{name}: {mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]")


def show_pair(cells, one, other):
    """Show the difference of two rows in each outcome."""
    for part, score, digits in (
        ("seen", "loss", 4),
        ("answers", "rougeL", 2),
        ("answers", "exact_match", 2),
    ):
        differences = []
        for seed in SEEDS:
            first = mean_of(cells, one, seed, part, score)
            differences.append(first - mean_of(cells, other, seed, part, score))
        show(f"{one} - {other}, {score}", differences, digits)


def task_differences(cells, one, other):
    """Return for each replicate the differences of its tasks in loss, the lowest first."""
    replicates = []
    for seed in SEEDS:
        scores, others = tasks_of(cells, one, seed), tasks_of(cells, other, seed)
        replicates.append(sorted(scores[name]["loss"] - others[name]["loss"] for name in scores))
    return replicates


def show_median(cells, one, other):
    """Show the median task, and on how many tasks the first row is better."""
    tasks = sum(task_differences(cells, one, other), [])
    below = sum(value < 0 for value in tasks)
    print(f"{one} - {other}: median {statistics.median(tasks):+.4f}, {below} below zero")


def show_single_tasks(cells, baseline):
    """Show how much single tasks count."""
    replicates = task_differences(cells, "orchmoe", baseline)
    tasks = sorted(sum(replicates, []))
    print(f"lowest task {tasks[0]:+.2f}")
    without = [statistics.fmean(row[1:] if row[0] == tasks[0] else row) for row in replicates]
    show("without the lowest task", without)
    without = [statistics.fmean(row[1:-1]) for row in replicates]
    show("without the lowest and the highest task of each replicate", without)

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
        one, other = tasks_of(cells, "orchmoe", seed), tasks_of(cells, baseline, seed)
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


for name, pairs in COMPARISONS.items():
    cells = FOLDER / name
    baseline = pairs[0][1]
    if not (is_finished(cells, "orchmoe") and is_finished(cells, baseline)):
        continue
    finished = [pair for pair in pairs if all(is_finished(cells, row) for row in pair)]
    for one, other in finished:
        show_pair(cells, one, other)
    print("not planned, the differences of the 384 tasks in loss:")
    for one, other in finished:
        show_median(cells, one, other)
    print(f"not planned, orchmoe - {baseline} in loss:")
    show_single_tasks(cells, baseline)
    if len(sys.argv) > 1:
        show_over_sources(cells, baseline, sys.argv[1])
