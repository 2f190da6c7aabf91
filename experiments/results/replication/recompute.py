"""Compute the table of the replicates once more, with the standard library alone.

python experiments/results/replication/recompute.py
"""

import json
import math
import statistics
from pathlib import Path

T = 2.131449545559323  # 97.5 % point of Student's t with 15 degrees of freedom
FOLDER = Path(__file__).parent / "cells"
ROWS = ("orchmoe", "lora", "frozen_router")


def mean_of(row, seed, part, score):
    cell = json.loads((FOLDER / f"{row}-s{seed}.json").read_text(encoding="utf-8"))
    return statistics.fmean(scores[score] for scores in cell[part]["tasks"].values())


def show(name, differences, digits=4):
    mean = statistics.fmean(differences)
    half = T * statistics.stdev(differences) / math.sqrt(16)
    low, high = mean - half, mean + half
    print(f"{name}: {mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]")


def is_finished(row):
    return len(list(FOLDER.glob(f"{row}-s*.json"))) == 16


for one, other in (ROWS[:2], (ROWS[0], ROWS[2]), (ROWS[2], ROWS[1])):
    if not (is_finished(one) and is_finished(other)):
        continue
    for part, score, digits in (
        ("seen", "loss", 4),
        ("answers", "rougeL", 2),
        ("answers", "exact_match", 2),
    ):
        differences = []
        for seed in range(100, 116):
            first = mean_of(one, seed, part, score)
            differences.append(first - mean_of(other, seed, part, score))
        show(f"{one} - {other}, {score}", differences, digits)

print("not planned, OrchMoE minus LoRA in loss:")
tasks = []  # of each replicate, the differences of its tasks, from the lowest
for seed in range(100, 116):
    one, other = (
        json.loads((FOLDER / f"{row}-s{seed}.json").read_text(encoding="utf-8"))["seen"]["tasks"]
        for row in ROWS[:2]
    )
    tasks.append(sorted(one[name]["loss"] - other[name]["loss"] for name in one))
together = sorted(sum(tasks, []))
print(f"median of {len(together)} tasks {statistics.median(together):+.4f}")
print(f"tasks below zero {sum(value < 0 for value in together)}, lowest {together[0]:+.2f}")
lowest = min(tasks)  # the replicate with the lowest task
without = [row[1:] if row is lowest else row for row in tasks]
show("without that task", [statistics.fmean(row) for row in without])
show("without two tasks of each", [statistics.fmean(row[1:-1]) for row in tasks])
