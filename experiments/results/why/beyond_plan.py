"""Show what the plan did not ask: other rows against the LoRA and MHR, single draws and tasks.

python experiments/results/why/beyond_plan.py

It prints the tables of README.md under "Beyond the plan", with the standard library alone.
"""

import json
import statistics

from recompute import FOLDER, cells, interval, minus, of_draws, of_tasks, p_value

PAIRS = (("orchmoe", "lora"), ("orchmoe", "mhr"), ("mhr", "lora"))
OTHERS = ("frozen router", "true task", "orchmoe, factors", "true task, factors")
LEFT_OUT = 10  # so many of the lowest and of the highest differences of tasks
LIMIT = 0.05 / 2  # Holm's limit for the second smallest of three p, which is that of MHR


def words(values):
    """Return "-0.021 [-0.028, -0.013]"."""
    mean, low, high = (f"{value:+.3f}" for value in interval(values))
    return f"{mean} [{low}, {high}]"


def in_digits(p):
    return "<0.0001" if p < 1e-4 else f"{p:.4f}"


def below_zero(values):
    return f"{sum(value < 0 for value in values)} of {len(values)}"


def losses(row):
    """Return the mean seen loss of each draw."""
    found = []
    for cell in cells[row]:
        found.append(statistics.fmean(task["loss"] for task in cell["seen"]["tasks"].values()))
    return found


def earlier_losses(row):
    """Return the same of the study of the claim, with 60 examples and the same tasks."""
    found = {}
    path = FOLDER.parent / "claim/cells.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines():
        cell = json.loads(line)
        name, _, seed = cell["name"].rpartition("-s")
        if name == f"first/{row}":
            tasks = cell["seen"]["tasks"].values()
            found[int(seed)] = statistics.fmean(task["loss"] for task in tasks)
    return [found[seed] for seed in sorted(found)]


def single_draws_and_tasks(pair):
    """Return the cells of a line about what single draws and tasks do to a difference."""
    differences = of_tasks(pair, "seen", "loss")
    means = of_draws(pair)
    medians = [statistics.median(draw.values()) for draw in differences]
    p_values = []
    for left_out in range(len(means)):
        p_values.append(p_value(means[:left_out] + means[left_out + 1 :]))
    ordered = sorted(value for draw in differences for value in draw.values())
    rest = statistics.fmean(ordered[LEFT_OUT:-LEFT_OUT])
    name = " minus ".join(pair)
    largest = in_digits(max(p_values))
    above = f"{sum(p >= LIMIT for p in p_values)} of {len(p_values)}"
    return [name, below_zero(ordered), words(medians), f"{rest:+.3f}", largest, above]


def of_cpus(pair):
    """Return the cells of a line about the draws of each kind of CPU."""
    found = {}
    for cell, value in zip(cells[pair[0]], of_draws(pair), strict=True):
        found.setdefault(cell["settings"]["cpu"], []).append(value)
    return [" minus ".join(pair), *(words(values) for values in found.values())]


def print_line(values):
    print(f"| {' | '.join(values)} |")


def main():
    for other in ("lora", "mhr"):
        for row in OTHERS:
            values = of_draws((row, other))
            print_line([f"{row} minus {other}", words(values), below_zero(values)])
    for row in ("orchmoe", "mhr"):
        values = minus(losses(row), earlier_losses(row))
        print_line([f"{row} minus {row} of the earlier study", words(values), below_zero(values)])
    print()
    for pair in PAIRS:
        print_line(single_draws_and_tasks(pair))
    print()
    for pair in PAIRS:
        print_line(of_cpus(pair))


if __name__ == "__main__":
    main()
