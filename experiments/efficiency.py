"""How many examples of a task does each method need? On the bundled data, at one total size.

experiments/results/efficiency/plan.md has the plan, which was written before the first cell. With
10, 25, 50 and 100 training examples of each task OrchMoE, LoRA, MoE-LoRA and Poly train for the
same number of steps. Each is tuned at each number with the same number of trials. The best trial is
also the run of seed 0.

    python -m experiments.efficiency --stage cells --device cpu     # hours on two cores
    python -m experiments.efficiency           # the tables and the figure of the finished cells

Test: pytest tests/experiments/test_efficiency.py
"""

import importlib.util
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

import program
from experiments import plot
from experiments.map import Groups, difference, losses, read_groups, signed_difference, stage_table
from experiments.study import (
    Row,
    Study,
    all_flags_but,
    pick_device,
    read_study,
    read_tuning,
)
from experiments.tables import publish, table, tuning_table

RESULTS = program.ROOT / "experiments/results/efficiency"
EQUAL = {name: Row({"method": name}) for name in ("orchmoe", "lora", "moe-lora", "poly")}
EXAMPLES = (10, 25, 50, 100)
# The order of the runs: these methods at each of these numbers, then the next methods.
METHODS_IN_ORDER = (("orchmoe", "lora"), ("moe-lora", "poly"))
EXAMPLES_IN_ORDER = (10, 100, 25, 50)
SETS = ("seen", "unseen")
# The flags that remain. All other settings are those of the plan.
CHOICES = ("out", "results", "jobs", "gpu", "device")

DEFAULTS = {
    "out": "results/efficiency",
    "results": str(RESULTS),
    "seeds": 5,
    "trials": 5,
    "dtype": "float32",
    "steps": 600,
    "eval_every": 200,
    "eval_instances": 560,
    "rank": 1,
    "alpha": 2.0,
    "lr_skills": 1e-2,
    "lr_router": 1e-3,
    "lr_allocation": 1e-2,
}


@dataclass(frozen=True)
class EfficiencyConfig:
    """Efficiency: which cells are made."""

    stage: Literal["cells", "table"] = "table"  # cells to make (table: none)


def make_cells(study: Study) -> None:
    """Tune each method at each number of examples, then make its cells, seed by seed."""
    for methods in METHODS_IN_ORDER:
        rows = {name: EQUAL[name] for name in methods}
        for examples in EXAMPLES_IN_ORDER:
            of_number = study.at(str(examples), {"train_instances": examples})
            of_number.tune(rows, study.config.trials, ("lr_skills", "alpha"))
            seeds = range(study.config.seeds)
            cells = []
            for cell in of_number.cells("cells", rows, {"": {}}, seeds, "losses"):
                if cell.settings.training.seed == 0:  # the best trial is this run
                    best = of_number.best[cell.name]
                    trial = of_number.trial(cell.name, rows[cell.name], best)
                    cell = cell._replace(folder=trial.folder)
                cells.append(cell)
            of_number.run(cells)


# ------------------------------------------------------------------------------ tables and figure


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


def is_finished(groups: Groups, name: str) -> bool:
    return len(groups.get(name, {})) == DEFAULTS["seeds"]


def text(results: Path, found: dict[int, Groups]) -> str:
    """Return the tables of the finished cells in Markdown. found: the cells by examples."""
    tuning = {}
    rows = []
    for number, groups in found.items():
        for name, report in read_tuning(results / str(number)).items():
            tuning[f"{number} examples: {name}"] = report
        for other in EQUAL:
            both = groups.get("orchmoe", {}).keys() & groups.get(other, {}).keys()
            if both and other != "orchmoe":
                seeds = f"{len(both)}"
                if len(both) < DEFAULTS["seeds"]:
                    seeds += ", unfinished"
                row = [f"{number} examples: orchmoe - {other}", seeds]
                rows.append(row + [signed_difference(groups, "orchmoe", other, s) for s in SETS])
    parts = [table(["difference", "seeds", *SETS], rows)]

    most = found[EXAMPLES[-1]]
    if all(is_finished(found[n], "orchmoe") for n in EXAMPLES) and is_finished(most, "lora"):
        for which in SETS:
            means = {n: np.mean(losses(found[n]["orchmoe"], which)) for n in EXAMPLES}
            needed = examples_needed(np.mean(losses(most["lora"], which)), means)
            parts.append(
                f"On {which} tasks OrchMoE has the loss of a LoRA with {EXAMPLES[-1]} examples "
                f"with {needed}."
            )
    for number, groups in found.items():
        ordered = {name: groups[name] for name in EQUAL if name in groups}
        parts.append(stage_table(f"{number} examples", ordered))
    parts.append(tuning_table(tuning))
    return "\n\n".join(part for part in parts if part) + "\n"


def figure(found: dict[int, Groups], path: Path) -> Path:
    """Draw OrchMoE minus LoRA on seen and on unseen tasks, side by side at each number."""
    title = "Bundled data: loss of OrchMoE minus that of a LoRA of equal size, below zero is better"
    canvas, axes = plot.canvas(title, "bars: 95 % intervals over tasks and seeds", 3.8)
    axes.axhline(0, color="black", linewidth=0.8)
    for number, which in enumerate(SETS):
        for x, groups in enumerate(found.values()):
            bar = difference(groups, "orchmoe", "lora", which)
            if not bar:
                continue
            mean, low, high = bar
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
    planned = all_flags_but(CHOICES)
    _, config, study_config, settings = read_study(__doc__, EfficiencyConfig, DEFAULTS, planned)
    if config.stage == "cells":
        study = Study(settings, pick_device(study_config, settings), study_config, EQUAL)
        make_cells(study)

    results = Path(study_config.results)
    found = {number: read_groups(results / str(number) / "cells") for number in EXAMPLES}
    publish(text(results, found), results / "tables.md")
    drawn = any(difference(groups, "orchmoe", "lora", "seen") for groups in found.values())
    if drawn and importlib.util.find_spec("matplotlib"):
        program.print_line(f"written: {figure(found, results / 'efficiency.png')}")


if __name__ == "__main__":
    program.run_program(main)
