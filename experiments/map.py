"""When does routing pay? OrchMoE against a LoRA of the same total size, on the bundled data.

The map goes along three axes from a centre: the total rank, the number of steps, and the number of
training tasks (with fewer tasks there are fewer examples, too). Each point has four rows. LoRA and
OrchMoE have the same total size, and both are tuned on dev with the same number of trials. The
floor is OrchMoE without a router, w = 1/K. The ceiling is OrchMoE with the real task given: w is
one-hot on training tasks, and 1/K on unseen ones. Floor and ceiling use the tuned values of
OrchMoE. They have no router, so their sizes differ from those of the other two.

    python -m experiments.map                    # the tables and the figure of the finished cells

Commit 498f36a has the program that made the cells, and commit 5df92fe the one that made those of
two earlier stages, calm (how much do two runs differ?) and router (which routers leave their
start?). Test: pytest tests/experiments/test_map.py
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import plot
from experiments.study import read_tuning
from experiments.tables import (
    Difference,
    Group,
    TablesConfig,
    chance,
    interval,
    mean_and_sd,
    paired,
    publish,
    signed,
    table,
    tuning_table,
)
from support import program
from support.program import UserError

RESULTS = program.ROOT / "experiments/results/map"
ROWS = ("lora", "orchmoe", "floor", "ceiling")
SEEDS = 5

# Each axis of the map, with the labels of its points. CENTRES are labels of the centre.
AXES = {
    "total rank": ("2", "4", "8", "16", "32"),
    "steps": ("300", "600", "1800"),
    "training tasks": ("7", "14", "28"),
}
CENTRES = (("total rank", "4"), ("steps", "600"), ("training tasks", "28"))
MEAN = "mean over"  # the label of the last line of the map, before "7 points"


def point_name(axis: str, tag: str) -> str:
    """Return the name of a point for folders: "steps-300", or "centre"."""
    return "centre" if (axis, tag) in CENTRES else f"{axis.replace(' ', '-')}-{tag}"


def points() -> list[str]:
    """Return the names of all points, the centre first."""
    found = ["centre"]
    for axis, tags in AXES.items():
        found += [point_name(axis, tag) for tag in tags if (axis, tag) not in CENTRES]
    return found


# ------------------------------------------------------------------------------ tables and figure

Groups = dict[str, Group]  # finished cells by row
SETS = ("seen", "unseen")
# Differences in the table of the map: one row minus another, on a set.
DIFFERENCES = (
    ("orchmoe", "lora", "seen"),
    ("orchmoe", "lora", "unseen"),
    ("orchmoe", "floor", "seen"),
    ("orchmoe", "floor", "unseen"),
    ("orchmoe", "ceiling", "seen"),
    ("orchmoe", "ceiling", "unseen"),
    ("floor", "lora", "seen"),
    ("ceiling", "lora", "seen"),
    ("ceiling", "floor", "seen"),
)
ROUTER_COLUMNS = {  # numbers of routing.report, and their names in the tables
    "entropy": "entropy of w",
    "task_information": "information on the task",
    "skill_cosine": "cosine of the skills",
}


def read_groups(folder: Path) -> Groups:
    """Return the cells of a stage or point, by row and tag, then by seed."""
    groups = {}
    for path in sorted(folder.glob("*.json")):
        cell = program.read_json(path)
        name = path.stem.rpartition("-s")[0]
        groups.setdefault(name, {})[cell["settings"]["seed"]] = cell
    return groups


def read_map(results: Path) -> dict[str, Groups]:
    """Return the cells of the map by point. Raise UserError if some are missing."""
    found = {}
    for point in points():
        folder = results / point / "cells"
        found[point] = read_groups(folder)
        if any(len(found[point].get(row, {})) != SEEDS for row in ROWS):
            raise UserError(f"{folder}: cells are missing; name a finished map with --results")
    return found


def mean_over_points(found: dict[str, Groups]) -> tuple[Groups, int]:
    """Return groups with the mean losses over points, for each row and seed, and their number.

    Points with fewer tasks stay out, because their losses are means over other seen tasks.
    """
    compared = []
    for point, groups in found.items():
        if not point.startswith("training-tasks"):
            compared.append(groups)
    means = {}
    for row in ROWS:
        means[row] = {}
        for seed in range(SEEDS):
            cells = [groups[row][seed] for groups in compared]
            means[row][seed] = {which: mean_losses(cells, which) for which in SETS}
    return means, len(compared)


def mean_losses(cells: Sequence[dict[str, Any]], which: str) -> dict[str, Any]:
    """Return the means of several cells, task by task, on the set `which`."""
    names = cells[0][which]["tasks"].keys()
    if any(cell[which]["tasks"].keys() != names for cell in cells):
        raise UserError(f"the points have different {which} tasks")
    tasks = {}
    for name in names:
        values = [cell[which]["tasks"][name]["loss"] for cell in cells]
        tasks[name] = {"loss": float(np.mean(values))}
    overall = float(np.mean([scores["loss"] for scores in tasks.values()]))
    return {"tasks": tasks, "overall": {"loss": overall}}


def difference(groups: Groups, one: str, other: str, which: str) -> Difference:
    """Return the paired difference of two rows over their common seeds, with its interval."""
    return interval(paired(groups[one], groups[other], which))


def signed_difference(groups: Groups, one: str, other: str, which: str) -> str:
    """Return the difference of two rows with its interval, "-" if it is one row."""
    if one == other:
        return "-"
    return signed(difference(groups, one, other, which))


def losses(group: Group, which: str) -> list[float]:
    return [cell[which]["overall"]["loss"] for cell in group.values()]


def noise(group: Group) -> str:
    """Return the sd of the seen loss over seeds."""
    return f"{np.std(losses(group, 'seen'), ddof=1):.3f}"


def router_numbers(group: Group) -> list[str]:
    """Return the means over seeds of what the router does: its distance, then ROUTER_COLUMNS."""
    distances = []
    for cell in group.values():
        router = cell.get("router") or {}  # a method without a router has "router": None
        # Cells of the first version call it "distance".
        distances.append(router.get("distance_from_start", router.get("distance")))
    found = [distances]
    for name in ROUTER_COLUMNS:
        found.append([cell.get("learnt", {}).get(name) for cell in group.values()])
    texts = []
    for values in found:
        known = [value for value in values if value is not None]
        texts.append(f"{np.mean(known):.3g}" if known else "-")
    return texts


def stage_table(title: str, groups: Groups, first: str = "") -> str:
    """Return a line for each row: seeds, losses with their sd, and what its router does.

    first: the row whose losses are subtracted from those of the others (default: none).
    """
    compared = SETS if first else ()
    rows = []
    for name, group in groups.items():
        row = [name, len(group)]
        row += [mean_and_sd(losses(group, which), 3) for which in SETS]
        row += [signed_difference(groups, name, first, which) for which in compared]
        rows.append(row + router_numbers(group))
    head = [title, "seeds", *SETS, *(f"{which}, minus {first}" for which in compared)]
    return table([*head, "distance of w", *ROUTER_COLUMNS.values()], rows)


def by_axis(found: dict[str, Groups]) -> dict[str, dict[str, Groups]]:
    """Return the groups of each axis by the labels of its points, and the mean over points."""
    lines = {}
    for axis, tags in AXES.items():
        lines[axis] = {tag: found[point_name(axis, tag)] for tag in tags}
    means, count = mean_over_points(found)
    lines[MEAN] = {f"{count} points": means}
    return lines


def map_table(found: dict[str, Groups]) -> str:
    """Return a line for each point: DIFFERENCES, the noise of both rows, the distance of w."""
    rows = []
    for axis, line in by_axis(found).items():
        for tag, groups in line.items():
            row = [f"{axis} {tag}", SEEDS]
            row += [signed_difference(groups, *names) for names in DIFFERENCES]
            row += [noise(groups[name]) for name in ("lora", "orchmoe")]
            rows.append(row + router_numbers(groups["orchmoe"])[:1])
    head = [f"{one} - {other}, {which}" for one, other, which in DIFFERENCES]
    head = ["point", "seeds", *head, "noise of lora", "noise of orchmoe", "distance of w"]
    return table(head, rows)


def text(results: Path, found: dict[str, Groups]) -> str:
    """Return all tables of the finished cells in Markdown. found: those of the map."""
    tuning = {}
    for point in found:
        for name, report in read_tuning(results / point).items():
            tuning[f"{point}: {name}"] = report
    parts = [
        map_table(found),
        tuning_table(tuning),
        stage_table("calm", read_groups(results / "calm")),
        stage_table("router", read_groups(results / "router"), "rate_1e-6"),
    ]
    for point, groups in found.items():
        ordered = {name: groups[name] for name in ROWS}
        parts.append(stage_table(point, ordered, "lora"))
    parts.append(f"{NOTE} Some of the intervals are repeated; {chance(parts)}.")
    return "\n\n".join(part for part in parts if part) + "\n"


NOTE = (
    "Losses in nats per target token, means over tasks; in brackets the sd over seeds, which is "
    'the noise of a run; the columns "noise" have that of the seen loss. Differences with '
    "95 % intervals over tasks and seeds together, of one seed over tasks alone. Distance: mean KL "
    "of w from its start on dev, in nats; the other numbers of the router are of seen instances."
)
LABELS = {
    "lora": "minus LoRA of equal size",
    "floor": "minus the same without a router",
    "ceiling": "minus the same, given the true task",
}


def figure(found: dict[str, Groups], path: Path) -> Path:
    """Draw OrchMoE minus each other row along each axis."""
    lines = by_axis(found)
    title = "Bundled data: loss of OrchMoE minus that of another row, below zero is better"
    below = "bars: 95 % intervals over tasks and seeds"
    size = {"nrows": 2, "ncols": len(lines), "sharey": "row"}
    widths = [1 + len(line) for line in lines.values()]
    canvas, axes = plot.canvas(title, below, 5.5, width_ratios=widths, **size)
    drawn = {}  # a handle for each label
    for column, (axis, line) in enumerate(lines.items()):
        for row, which in enumerate(SETS):
            panel = axes[row][column]
            panel.axhline(0, color="black", linewidth=0.8)
            for number, (name, label) in enumerate(LABELS.items()):
                for x, groups in enumerate(line.values()):
                    mean, low, high = difference(groups, "orchmoe", name, which)
                    drawn[label] = panel.errorbar(
                        x + 0.2 * (number - 1),
                        mean,
                        yerr=[[mean - low], [high - mean]],
                        color=plot.COLOURS[number],
                        marker=plot.MARKERS[number],
                        markersize=4,
                        linewidth=1,
                    )
            panel.set_xticks(range(len(line)), line)
            panel.set_xlim(-0.5, len(line) - 0.5)
            panel.set_xlabel(axis)
            if axis == MEAN:  # "mean over 7 points" is read from above
                panel.set_xticks([0], [axis])
                panel.set_xlabel(*line)
    for row, which in enumerate(SETS):
        axes[row][0].set_ylabel(f"{which} tasks (nats per token)")
    canvas.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=3)
    return plot.save(canvas, path)


def main() -> None:
    results = TablesConfig.read(__doc__, RESULTS)
    found = read_map(results)
    publish(text(results, found), results / "tables.md")
    if importlib.util.find_spec("matplotlib"):
        program.print_line(f"written: {figure(found, results / 'map.png')}")


if __name__ == "__main__":
    program.run_program(main)
