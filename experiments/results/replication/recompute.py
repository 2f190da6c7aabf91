"""Compute the table of the replicates once more, with the standard library alone.

Then compute what was not planned: how much single tasks count. With the folder of
Super-NaturalInstructions, also compute an interval over the sources of the tasks.

python experiments/results/replication/recompute.py [natural-instructions]
"""

import json
import math
import statistics
import sys
from pathlib import Path

T = 2.131449545559323  # 97.5 % point of Student's t with 15 degrees of freedom
FOLDER = Path(__file__).parent / "cells"
PAIRS = (
    ("orchmoe", "lora"),
    ("orchmoe", "frozen_router"),
    ("frozen_router", "lora"),
    ("orchmoe", "tuned_lora"),
)
SEEDS = range(100, 116)


def is_finished(row):
    return len(list(FOLDER.glob(f"{row}-*"))) == len(SEEDS)


def tasks_of(row, seed, part="seen"):
    return json.loads((FOLDER / f"{row}-s{seed}.json").read_text(encoding="utf-8"))[part]["tasks"]


def mean_of(row, seed, part, score):
    return statistics.fmean(scores[score] for scores in tasks_of(row, seed, part).values())


def show(name, differences, digits=4):
    mean = statistics.fmean(differences)
    half = T * statistics.stdev(differences) / math.sqrt(16)
    low, high = mean - half, mean + half
    print(f"{name}: {mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]")


for one, other in PAIRS:
    if not (is_finished(one) and is_finished(other)):
        continue
    for part, score, digits in (
        ("seen", "loss", 4),
        ("answers", "rougeL", 2),
        ("answers", "exact_match", 2),
    ):
        differences = []
        for seed in SEEDS:
            first = mean_of(one, seed, part, score)
            differences.append(first - mean_of(other, seed, part, score))
        show(f"{one} - {other}, {score}", differences, digits)

print("not planned, OrchMoE minus LoRA in loss:")
replicates = []  # of each, the differences of its tasks, the lowest first
for seed in SEEDS:
    one, other = tasks_of("orchmoe", seed), tasks_of("lora", seed)
    replicates.append(sorted(one[name]["loss"] - other[name]["loss"] for name in one))
tasks = sum(replicates, [])
print(f"median of {len(tasks)} tasks {statistics.median(tasks):+.4f}")
print(f"tasks below zero {sum(value < 0 for value in tasks)}, lowest {min(tasks):+.2f}")
lowest = min(tasks)
without = [statistics.fmean(row[1:] if row[0] == lowest else row) for row in replicates]
show("without the lowest task", without)
without = [statistics.fmean(row[1:-1]) for row in replicates]
show("without the lowest and the highest task of each replicate", without)

perplexities = [math.expm1(value) for value in tasks]
print(f"geometric mean of the changes of perplexity {math.expm1(statistics.fmean(tasks)):+.1%}")
print(f"arithmetic mean of the changes of perplexity {statistics.fmean(perplexities):+.1%}")
print(f"change of perplexity of the median task {math.expm1(statistics.median(tasks)):+.1%}")
tasks.sort()
print(f"share of the ten lowest tasks in the sum {sum(tasks[:10]) / sum(tasks):.0%}")
lower, higher = sum(value < -0.2 for value in tasks), sum(value > 0.2 for value in tasks)
print(f"tasks below -0.2: {lower}, above +0.2: {higher}")

if len(sys.argv) > 1:  # tasks of one source are one unit
    sources = {}  # source: (replicate, difference) of each of its tasks
    for seed in SEEDS:
        one, other = tasks_of("orchmoe", seed), tasks_of("lora", seed)
        for name in one:
            path = Path(sys.argv[1], "tasks", f"{name}.json")
            source = str(json.loads(path.read_text(encoding="utf-8"))["Source"])
            difference = one[name]["loss"] - other[name]["loss"]
            sources.setdefault(source, []).append((seed, difference))
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
