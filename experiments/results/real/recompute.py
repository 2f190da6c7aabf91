"""Make the table and the differences of README.md from scores.jsonl, by the standard library.

python experiments/results/real/recompute.py

Test: pytest tests/experiments/test_recompute.py
"""

import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

SCORES = Path(__file__).parent / "scores.jsonl"
LORAS = {"lora": "LoRA, alpha 1", "lora alpha 4": "LoRA, alpha 4"}
MODELS = {"frozen base": "frozen base", **LORAS, "orchmoe": "OrchMoE"}
T = {"seen": 1.966, "unseen": 2.002}  # Student's t for 95 %, with 400 and 58 tasks
DIGITS = {"loss": 3, "rougeL": 2, "exact_match": 2}


def read_scores():
    """Return {(model, set, score): the scores of the tasks, in one order}, and those overall.

    Overall, train.py gives the mean over tasks of the loss, and over instances of other scores.
    """
    of_tasks = defaultdict(list)
    overall = {}
    for line in SCORES.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for score in DIGITS:
            key = (row["model"], row["set"], score)
            if row["task"] == "overall":
                overall[key] = row[score]
            else:
                of_tasks[key].append(row[score])
    return of_tasks, overall


def cells_of(overall, model):
    """Return the cells of the table for a model."""
    cells = []
    for which in T:
        for score, digits in DIGITS.items():
            cells.append(f"{overall[model, which, score]:.{digits}f}")
    return cells


def difference(scores, lora, which, score):
    """Return OrchMoE minus a LoRA, with a 95 % interval, both over tasks: "mean [low, high]"."""
    pairs = zip(scores["orchmoe", which, score], scores[lora, which, score], strict=True)
    values = [one - other for one, other in pairs]
    mean = fmean(values)
    half = T[which] * stdev(values) / math.sqrt(len(values))
    low, high = mean - half, mean + half
    digits = DIGITS[score]
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


if __name__ == "__main__":
    of_tasks, overall = read_scores()
    for model, name in MODELS.items():
        print(f"| {name} | {' | '.join(cells_of(overall, model))} |")
    for lora, name in LORAS.items():
        words = [difference(of_tasks, lora, which, score) for which in T for score in DIGITS]
        print(f"| OrchMoE - {name} | {' | '.join(words)} |")
