"""Make the table and the differences of README.md from scores.jsonl, by the standard library.

python experiments/results/real/recompute.py

Test: pytest tests/experiments/test_recompute.py
"""

import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import NormalDist, fmean, stdev

SCORES = Path(__file__).parent / "scores.jsonl"
MODELS = {"frozen base": "frozen base", "lora": "LoRA", "orchmoe": "OrchMoE"}
SETS = ("seen", "unseen")
DIGITS = {"loss": 3, "rougeL": 2, "exact_match": 2}
Z = NormalDist().inv_cdf(0.975)  # both sets have 58 tasks or more


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
    for which in SETS:
        for score, digits in DIGITS.items():
            cells.append(f"{overall[model, which, score]:.{digits}f}")
    return cells


def difference(scores, which, score):
    """Return OrchMoE minus LoRA, with a 95 % interval, both over tasks: "mean [low, high]"."""
    pairs = zip(scores["orchmoe", which, score], scores["lora", which, score], strict=True)
    values = [one - other for one, other in pairs]
    mean = fmean(values)
    half = Z * stdev(values) / math.sqrt(len(values))
    low, high = mean - half, mean + half
    digits = DIGITS[score]
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


if __name__ == "__main__":
    of_tasks, overall = read_scores()
    for model, name in MODELS.items():
        print(f"| {name} | {' | '.join(cells_of(overall, model))} |")
    words = [difference(of_tasks, which, score) for which in SETS for score in DIGITS]
    print(f"| OrchMoE - LoRA | {' | '.join(words)} |")
