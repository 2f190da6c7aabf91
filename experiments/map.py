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

import program
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
from program import UserError

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
    """Return the finished cells of a stage or point, by row and tag, then by seed."""
    groups = {}
    for path in sorted(folder.glob("*.json")):
        cell = program.read_json(path)
        if "diverged" in cell:
            continue  # it has no losses
        name = path.stem.rpartition("-s")[0]
        groups.setdefault(name, {})[cell["settings"]["seed"]] = cell
    return groups


def read_map(results: Path) -> dict[str, Groups]:
    """Return the finished cells of the map by point."""
    return {point: read_groups(results / point / "cells") for point in points()}


def finished_points(found: dict[str, Groups]) -> list[Groups]:
    """Return the points with 28 training tasks at which all rows have all seeds.

    Points with fewer tasks stay out, because their losses are means over other seen tasks.
    """
    seeds = set(range(SEEDS))
    finished = []
    for name in points():
        groups = found[name]
        complete = all(groups.get(row, {}).keys() >= seeds for row in ROWS)
        if complete and not name.startswith("training-tasks"):
            finished.append(groups)
    return finished


def mean_over_points(finished: Sequence[Groups]) -> Groups:
    """Return groups with the mean losses over points, for each row and seed."""
    groups = {}
    for row in ROWS:
        groups[row] = {}
        for seed in range(SEEDS):
            cells = [point[row][seed] for point in finished]
            groups[row][seed] = {which: mean_losses(cells, which) for which in SETS}
    return groups


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


def difference(groups: Groups, one: str, other: str, which: str) -> Difference | None:
    """Return the paired difference of two rows over their common seeds, with its interval."""
    common_seeds = groups.get(one, {}).keys() & groups.get(other, {}).keys()
    if one == other or not common_seeds:
        return None
    return interval(paired(groups[one], groups[other], which))


def signed_difference(groups: Groups, one: str, other: str, which: str) -> str:
    """Return the difference of two rows with its interval, "-" if there is none."""
    found = difference(groups, one, other, which)
    return signed(found) if found else "-"


def losses(group: Group, which: str) -> list[float]:
    return [cell[which]["overall"]["loss"] for cell in group.values()]


def noise(group: Group) -> str:
    """Return the sd of the seen loss over seeds, "-" if there is one seed."""
    values = losses(group, "seen")
    return f"{np.std(values, ddof=1):.3f}" if len(values) > 1 else "-"


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


def stage_table(title: str, groups: Groups, first: str = "", sets: Sequence[str] = SETS) -> str:
    """Return a line for each row: seeds, losses with their sd, and what its router does.

    first: the row whose losses are subtracted from those of the others (default: none).
    """
    compared = sets if first else ()
    rows = []
    for name, group in groups.items():
        row = [name, len(group)]
        row += [mean_and_sd(losses(group, which), 3) for which in sets]
        row += [signed_difference(groups, name, first, which) for which in compared]
        rows.append(row + router_numbers(group))
    head = [title, "seeds", *sets, *(f"{which}, minus {first}" for which in compared)]
    return table([*head, "distance of w", *ROUTER_COLUMNS.values()], rows)


def by_axis(found: dict[str, Groups]) -> dict[str, dict[str, Groups]]:
    """Return the groups of each axis by the labels of its points, and the mean over points."""
    lines = {}
    for axis, tags in AXES.items():
        lines[axis] = {tag: found[point_name(axis, tag)] for tag in tags}
    finished = finished_points(found)
    if finished:
        lines[MEAN] = {f"{len(finished)} points": mean_over_points(finished)}
    return lines


def map_table(found: dict[str, Groups]) -> str:
    """Return a line for each point: DIFFERENCES, the noise of both rows, the distance of w."""
    rows = []
    for axis, line in by_axis(found).items():
        for tag, groups in line.items():
            if not {"lora", "orchmoe"} <= groups.keys():
                continue
            row = [f"{axis} {tag}", len(groups["lora"].keys() & groups["orchmoe"].keys())]
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
        ordered = {name: groups[name] for name in ROWS if name in groups}
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


def figure(found: dict[str, Groups], path: Path) -> Path | None:
    """Draw OrchMoE minus each other row along each axis. Return None without finished cells."""
    if not any(difference(groups, "orchmoe", "lora", "seen") for groups in found.values()):
        return None
    lines = by_axis(found)
    title = "Bundled data: loss of OrchMoE minus that of another row, below zero is better"
    below = "bars: 95 % intervals over tasks and seeds"
    size = {"nrows": 2, "ncols": len(lines), "sharey": "row", "squeeze": False}
    widths = [1 + len(line) for line in lines.values()]
    canvas, axes = plot.canvas(title, below, 5.5, width_ratios=widths, **size)
    drawn = {}  # a handle for each label
    for column, (axis, line) in enumerate(lines.items()):
        for row, which in enumerate(SETS):
            panel = axes[row][column]
            panel.axhline(0, color="black", linewidth=0.8)
            for number, (name, label) in enumerate(LABELS.items()):
                for x, groups in enumerate(line.values()):
                    bar = difference(groups, "orchmoe", name, which)
                    if not bar:
                        continue
                    mean, low, high = bar
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
        path = figure(found, results / "map.png")
        if path:
            program.print_line(f"written: {path}")


if __name__ == "__main__":
    program.run_program(main)
