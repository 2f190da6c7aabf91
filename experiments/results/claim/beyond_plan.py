"""Show where OrchMoE's lead comes from. The plan did not ask this.

python experiments/results/claim/beyond_plan.py

It prints the table and the correlations of README.md, with the standard library alone.
"""

import itertools
import statistics

from recompute import COMPARED, cells, differences_from, interval, p_value

HARD = 1.0  # nats; a task whose loss is above it, in the mean of the four methods, is hard
EXTREMES = 10  # so many of the largest gains, and of the largest losses, are left out


def losses(stage, row):
    """Return {(draw, task): loss}."""
    found = {}
    for draw, cell in enumerate(cells[stage, row]):
        for task, scores in cell["seen"]["tasks"].items():
            found[draw, task] = scores["loss"]
    return found


def of_draws(differences, mean=statistics.fmean):
    """Return the mean of the differences of each draw."""
    draws = {}
    for (draw, _), value in differences.items():
        draws.setdefault(draw, []).append(value)
    return [mean(values) for values in draws.values()]


def written(values):
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*interval(values))


def in_digits(p):
    """Return a p value as the table shows it."""
    return f"{p:.4f}" if p >= 1e-4 else "<0.0001"


def line(stage, other):
    """Return a line of the table: what OrchMoE minus this method consists of."""
    rows = [losses(stage, row) for row in ("orchmoe", *COMPARED)]
    hard = {key for key in rows[0] if statistics.fmean(row[key] for row in rows) > HARD}
    orchmoe, reference = losses(stage, "orchmoe"), losses(stage, other)
    differences = {key: orchmoe[key] - reference[key] for key in orchmoe}
    lower = sum(value < 0 for value in differences.values())

    inner = sorted(differences, key=differences.get)[EXTREMES:-EXTREMES]
    without_extremes = {key: differences[key] for key in inner}
    easy = {key: value for key, value in differences.items() if key not in hard}
    share = 1 - sum(easy.values()) / sum(differences.values())
    values = of_draws(differences)
    without_largest = sorted(values)[1:]  # OrchMoE's largest lead is the lowest difference
    largest_p = max(p_value(values[:draw] + values[draw + 1 :]) for draw in range(len(values)))
    parts = [
        f"{stage}, {other}",
        f"{lower} of {len(differences)}",
        written(of_draws(differences, statistics.median)),
        written(of_draws(without_extremes)),
        f"{statistics.fmean(without_largest):+.3f}, p {in_digits(p_value(without_largest))}",
        in_digits(largest_p),
        f"{len(hard)} tasks, {100 * share:.0f} %",
        written(of_draws(easy)),
    ]
    return f"| {' | '.join(parts)} |"


def correlation(stage, one, other):
    """Return a line about the differences of the draws from two methods."""
    values = [differences_from(stage, row) for row in (one, other)]
    return f"- {stage}, {one} and {other}: {statistics.correlation(*values):+.2f}"


for stage in ("first", "second"):
    if (stage, "orchmoe") in cells:
        for other in COMPARED:
            print(line(stage, other))
        for one, other in itertools.combinations(COMPARED, 2):
            print(correlation(stage, one, other))
