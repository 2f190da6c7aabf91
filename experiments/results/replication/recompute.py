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
        mean = statistics.fmean(differences)
        half = T * statistics.stdev(differences) / math.sqrt(16)
        low, high = mean - half, mean + half
        print(
            f"{one} - {other}, {score}: {mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
        )
