"""How many examples of a task does OrchMoE need, and how many a LoRA of the same total size?

experiments/results/efficiency/plan.md has the plan, which was written before the first cell. With
10, 25, 50 and 100 training examples of each task OrchMoE and LoRA train for the same number of
steps. Each is tuned at each number with the same number of trials.

    python -m experiments.efficiency           # the tables and the figure of the finished cells

Commit 498f36a has the program that made the cells.
Test: pytest tests/experiments/test_efficiency.py
"""

import importlib.util
import itertools
from pathlib import Path

import numpy as np

import program
from experiments import plot
from experiments.map import Groups, difference, losses, read_groups, signed_difference, stage_table
from experiments.study import read_tuning
from experiments.tables import TablesConfig, publish, table, tuning_table

RESULTS = program.ROOT / "experiments/results/efficiency"
EXAMPLES = (10, 25, 50, 100)
SETS = ("seen", "unseen")


def examples_needed(goal: float, means: dict[int, float]) -> str:
    """Return the number of examples with which a mean loss falls to `goal`.

    means: by number of examples. Between two of them the loss is a straight line over the logarithm
    of the number.
    """
    numbers = list(means)
    if means[numbers[0]] <= goal:
        return f"at most {numbers[0]}"
    for low, high in itertools.pairwise(numbers):
        if means[high] <= goal:
            share = (means[low] - goal) / (means[low] - means[high])
            return f"{low * (high / low) ** share:.0f}"
    return f"more than {numbers[-1]}"


def text(results: Path, found: dict[int, Groups]) -> str:
    """Return the tables of the finished cells in Markdown. found: the cells by examples."""
    tuning = {}
    rows = []
    for number, groups in found.items():
        for name, report in read_tuning(results / str(number)).items():
            tuning[f"{number} examples: {name}"] = report
        row = [f"{number} examples: orchmoe - lora", len(groups["lora"])]
        rows.append(row + [signed_difference(groups, "orchmoe", "lora", s) for s in SETS])
    parts = [table(["difference", "seeds", *SETS], rows)]

    most = EXAMPLES[-1]
    for which in SETS:
        means = {n: np.mean(losses(found[n]["orchmoe"], which)) for n in EXAMPLES}
        needed = examples_needed(np.mean(losses(found[most]["lora"], which)), means)
        parts.append(
            f"On {which} tasks OrchMoE has the loss of a LoRA with {most} examples with {needed}."
        )
    for number, groups in found.items():
        ordered = {name: groups[name] for name in ("orchmoe", "lora")}
        parts.append(stage_table(f"{number} examples", ordered))
    parts.append(tuning_table(tuning))
    return "\n\n".join(parts) + "\n"


def figure(found: dict[int, Groups], path: Path) -> Path:
    """Draw OrchMoE minus LoRA on seen and on unseen tasks, side by side at each number."""
    title = "Bundled data: loss of OrchMoE minus that of a LoRA of equal size, below zero is better"
    canvas, axes = plot.canvas(title, "bars: 95 % intervals over tasks and seeds", 3.8)
    axes.axhline(0, color="black", linewidth=0.8)
    for number, which in enumerate(SETS):
        for x, groups in enumerate(found.values()):
            mean, low, high = difference(groups, "orchmoe", "lora", which)
            axes.errorbar(
                x + 0.16 * (number - 0.5),
                mean,
                yerr=[[mean - low], [high - mean]],
                color=plot.COLOURS[number],
                marker=plot.MARKERS[number],
                markersize=5,
                capsize=3,
                linestyle="none",
                label=f"{which} tasks" if x == 0 else None,
            )
    axes.set_xticks(range(len(found)), [str(number) for number in found])
    axes.set(xlabel="training examples of each task", ylabel="nats per target token")
    axes.legend()
    return plot.save(canvas, path)


def main() -> None:
    results = TablesConfig.read(__doc__, RESULTS)
    found = {number: read_groups(results / str(number) / "cells") for number in EXAMPLES}
    publish(text(results, found), results / "tables.md")
    if importlib.util.find_spec("matplotlib"):
        program.print_line(f"written: {figure(found, results / 'efficiency.png')}")


if __name__ == "__main__":
    program.run_program(main)
