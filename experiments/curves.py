"""What the cells of experiments/report.py say: curves of unseen against seen loss, compared where both are,
with intervals over tasks and seeds; tables and a figure. Test: `pytest tests/experiments/test_report.py`"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import runtime
from experiments import plot
from experiments.compare import UNTRAINED
from experiments.tables import METRICS, interval, table, tuning_table

Curve = dict[float, dict[int, dict[str, Any]]]  # {scale: {seed: cell}}
# The method of each row; all are of one total size, that of the dearest routing.
ROWS: dict[str, dict[str, Any]] = {
    "orchmoe": {"method": "orchmoe"}, "token router": {"method": "orchmoe", "router": "token"},
    "lora": {"method": "lora"}, "moe-lora": {"method": "moe-lora"}, "poly": {"method": "poly"},
}  # fmt: skip
SCALES = (0.5, 1.0, 2.0, 4.0)  # alpha, in ranks
EDGE = (0.25,)  # of the first seed alone: does less help yet?
PROMPTS = {"answers": {}, "examples": {"num_pos": 2, "max_source_length": 640}}  # of stages that answer, too


def halves(tasks: Iterable[str]) -> dict[str, list[str]]:
    """The unseen tasks in two, each by its own name, whatever others there are: what concerns generalisation
    is chosen on the one, and shown on the other."""
    found: dict[str, list[str]] = {"unseen-dev": [], "unseen-test": []}
    for task in sorted(tasks):
        found[tuple(found)[hashlib.sha256(task.encode()).digest()[0] % 2]].append(task)
    return found


def read_cells(folder: Path) -> dict[str, dict[str, Any]]:
    """{name below the folder: cell} of all finished cells. ValueError names a file that is none."""
    cells = {path: runtime.read_json(path) for path in sorted(folder.glob("*/*.json"))}
    for path, cell in cells.items():
        needed = {"settings", "dev_loss"} if path.parent.name == "tune" else {"settings", "seen", "unseen"}
        if needed - cell.keys():
            raise ValueError(f"{path}: no finished cell; delete it, and make it anew by its --stage")
    return {str(path.relative_to(folder).with_suffix("")): cell for path, cell in cells.items()}


def by_task(cell: dict[str, Any], which: str, metric: str = "loss") -> np.ndarray:
    """(T,) losses, or another metric, NaN where there is none: of seen tasks, or of a half of the unseen."""
    scores = cell[which.partition("-")[0]]["tasks"]
    names = {"seen": sorted(scores), **halves(scores)}[which]
    return np.array([scores[task].get(metric, np.nan) for task in names])


def curves(cells: dict[str, dict[str, Any]]) -> dict[str, Curve]:
    """{row: curve} of the stage `methods`."""
    found: dict[str, Curve] = {}
    for name, cell in cells.items():
        if name.startswith("methods/"):
            row, rank, alpha, seed = (cell["settings"][name] for name in ("row", "rank", "alpha", "seed"))
            found.setdefault(row, {}).setdefault(alpha / rank, {})[seed] = cell
    return {row: dict(sorted(found[row].items())) for row in ROWS if row in found}


def best_scales(cells: dict[str, dict[str, Any]]) -> dict[str, float]:
    """{row: scale} of the rows that have all scales: the least of dev loss and loss on the half of the unseen
    tasks to choose by, summed, over the seeds that all scales have."""
    found = {row: complete(curve) for row, curve in curves(cells).items()}
    return {row: min(curve, key=lambda scale: np.mean(
        [cell["dev_loss"] + by_task(cell, "unseen-dev").mean()
         for cell in map(curve[scale].get, common(curve))]))
            for row, curve in found.items() if curve.keys() >= set(SCALES)}


def common(*curves: Curve) -> list[int]:
    """The seeds that every point of them has."""
    return sorted(set.intersection(*(set(group) for curve in curves for group in curve.values())))


def listed(seeds: Iterable[int]) -> str:
    return str(sorted(seeds))[1:-1]


def complete(curve: Curve) -> Curve:
    """The points that share seeds, as many cells as can be, or else as many points: a scale that is half made
    takes no seeds away."""
    parts = [{scale: group for scale, group in curve.items() if seeds <= set(group)}
             for seeds in map(set, curve.values())]
    return max(parts, key=lambda part: (len(part) * len(common(part)), len(part)))


def losses(group: dict[int, dict], seeds: Sequence[int], which: str, metric: str = "loss") -> np.ndarray:
    """(T, seeds) of one point."""
    return np.stack([by_task(group[seed], which, metric) for seed in seeds], 1)


def stacked(points: Iterable[dict[int, dict]], seeds: Sequence[int], which: str) -> np.ndarray:
    """(points, T, seeds)."""
    return np.stack([losses(group, seeds, which) for group in points])


def reading(x: np.ndarray, y: np.ndarray, at: float) -> float:
    """The lowest y of the curve through (x, y), straight from scale to scale, where x is no more than `at`;
    NaN where it is nowhere."""
    steps = np.diff(x)
    ways = (at - x[:-1]) / np.where(steps, steps, 1)
    crossings = (y[:-1] + ways * np.diff(y))[(ways >= 0) & (ways <= 1)]
    return min((*y[x <= at], *crossings), default=np.nan)


def jackknife(read: Callable[..., np.ndarray], *sets: np.ndarray) -> tuple[float, float, float] | None:
    """read(*means) -> (seeds,) differences, of the mean losses (points, seeds) over each set of tasks, whose
    losses are (points, T, seeds); its mean, and its interval over the tasks of all sets and over the seeds,
    each task's part in it by what is read without it (Tukey 1958). None where it cannot be read."""
    means, halves = [each.mean(1) for each in sets], []
    whole = read(*means)
    for i, each in enumerate(sets):
        T = each.shape[1]
        without = (T * means[i][:, None] - each) / (T - 1)
        parts = np.stack([T * whole - (T - 1) * read(*means[:i], without[:, t], *means[i + 1:])
                          for t in range(T)])  # (T, seeds)
        if np.isnan(parts).any():
            return None
        parts += whole - parts.mean(0)  # at a kink of what is read the mean of the parts is far from it
        _, low, high = interval(parts if i == 0 else parts.mean(1, keepdims=True))  # the seeds count once
        halves.append((high - low) / 2)
    half = np.hypot(*halves)
    return float(whole.mean()), float(whole.mean() - half), float(whole.mean() + half)


def at_most(one: Curve, other: Curve, along: str, across: str) -> tuple[float, float, float] | None:
    """Difference one - other in the lowest loss `across` that each reaches at no more than one mean loss
    `along`, with its interval: halfway from where both can be read, in all seeds, to where more of it helps
    neither."""
    one, other = complete(one), complete(other)
    n, seeds = len(one), common(one, other)
    if not seeds:
        return None
    sets = [stacked((*one.values(), *other.values()), seeds, which) for which in (across, along)]
    y, x = (each.mean(1) for each in sets)  # (points, seeds)
    parts = [(half, s) for half in (slice(0, n), slice(n, None)) for s in range(len(seeds))]
    # Two points of the curves, and not two losses: without a task all losses move, and these with them.
    least, most = (max(((half.start + of[half, s].argmin(), s) for half, s in parts), key=x.__getitem__)
                   for of in (x, y))

    def read(y: np.ndarray, x: np.ndarray) -> np.ndarray:
        at = max((x[least] + x[most]) / 2, *(x[part].min() for part in parts))
        found = [reading(x[part], y[part], at) for part in parts]
        return np.subtract(found[:len(seeds)], found[len(seeds):])

    return jackknife(read, *sets)


def above(point: dict[int, dict], curve: Curve, across: str) -> tuple[float, float, float] | None:
    """The same of a point and a curve, at the point's own seen loss."""
    def read(y: np.ndarray, x: np.ndarray) -> np.ndarray:
        return np.array([y[0, s] - reading(x[1:, s], y[1:, s], x[0, s]) for s in range(len(seeds))])

    curve = complete(curve)
    seeds = common({0: point}, curve)
    points = point, *curve.values()
    return jackknife(read, *(stacked(points, seeds, which) for which in (across, "seen"))) if seeds else None


def figure(found: dict[str, Curve], path: Path) -> Path:
    """Seen against unseen loss, a curve for each row over the scales that all its seeds have. The bars are
    intervals, over tasks and the seeds that both have, of the difference from the first row's first scale,
    whose own are nothing."""
    found = {row: complete(curve) for row, curve in found.items()}
    row, scale = next((row, scale) for row, curve in found.items() for scale in curve)
    reference = found[row][scale]
    canvas, axes = plot.canvas("Loss on seen and on unseen tasks over the scales; lower left is better",
                               f"bars: 95 % intervals of the difference from {row} x{scale:g}", 5)
    for i, (row, curve) in enumerate(found.items()):
        points, bars = [], []
        for group in curve.values():
            seeds, here = common({0: group}, {0: reference}), []
            for which in ("seen", "unseen-dev"):
                mean, low, high = interval(losses(group, seeds, which) - losses(reference, seeds, which))
                here.append((losses(group, common(curve), which).mean(), mean - low, high - mean))
            points.append([at for at, *_ in here])
            bars.append([bar for _, *bar in here])
        x, y = np.array(points).T
        errors = np.array(bars)  # (scales, 2, 2)
        axes.errorbar(x, y, xerr=errors[:, 0].T, yerr=errors[:, 1].T, color=plot.COLOURS[i],
                      label=f"{row}, seeds: {listed(common(curve))}", marker=plot.MARKERS[i], markersize=5,
                      linewidth=1.5, elinewidth=0.6)
        for scale, *at in zip(curve, x, y, strict=True):
            axes.annotate(f"x{scale:g}", at, xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set(xlabel="seen tasks (nats per target token)", ylabel="unseen tasks, the half to choose by")
    axes.legend()
    return plot.save(canvas, path)


def text(cells: dict[str, dict[str, Any]], tuning: dict[str, dict], final: bool = False) -> str:
    """All tables, as Markdown: the tuning, each point of the curves, curve against curve, best scale against
    best scale, answers, and single changes against the curves. final: also of the unseen tasks that nothing
    was chosen by; a curve is read at its lowest loss, which is a choice, and so never on these."""
    which = ["seen", "unseen-dev", *(["unseen-test"] if final else [])]
    found, best = curves(cells), best_scales(cells)
    parts, intervals = [tuning_table(tuning)], []

    def said(difference: tuple[float, float, float] | None) -> str:
        intervals.append(difference)
        return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*difference) if difference else "not to be read"

    def less(first: dict[int, dict], group: dict[int, dict], metrics: Iterable[str] = ("loss",)) -> list[str]:
        seeds = sorted(group) if group.keys() <= first.keys() and group is not first else []
        found = [losses(first, seeds, name, metric) - losses(group, seeds, name, metric) if seeds else np.nan
                 for name in which for metric in metrics]
        return ["-" if np.isnan(each).any() else said(interval(each)) for each in found]

    def means(group: Iterable[dict], metrics: Iterable[str] = ("loss",)) -> list[str]:
        values = [[by_task(cell, name, metric).mean() for cell in group]
                  for name in which for metric in metrics]
        return ["-" if np.isnan(of_seeds).any() else f"{np.mean(of_seeds):.3f}"
                + (f" ({np.std(of_seeds, ddof=1):.3f})" if len(of_seeds) > 1 else "") for of_seeds in values]

    lines = [[row, f"{scale:g}" + ", the best" * (scale == best.get(row)), listed(group),
              f"{np.mean([cell['dev_loss'] for cell in group.values()]):.3f}", *means(group.values())]
             for row, curve in found.items() for scale, group in curve.items()]
    parts.append(table(["row", "scale", "seeds", "dev", *which], lines))
    ways = [("unseen-dev", "seen"), ("seen", "unseen-dev")]
    lines = [[row, listed(common(complete(found["orchmoe"]), complete(curve))),
              *(said(at_most(found["orchmoe"], curve, *way)) for way in ways)]
             for row, curve in found.items() if row != "orchmoe" and "orchmoe" in found]
    heads = [f"{across} at no more {along}" for along, across in ways]
    parts.append(table(["orchmoe - row", "seeds", *heads], lines))
    chosen = {row: found[row][scale] for row, scale in best.items()}
    lines = [[row, listed(group), *less(chosen["orchmoe"], group)]
             for row, group in chosen.items() if row != "orchmoe" and "orchmoe" in chosen]
    parts.append(table(["orchmoe - row, each at its best scale", "seeds", *which], lines))
    groups: dict[tuple[str, str], dict[int, dict]] = {}
    for name, cell in cells.items():
        stage, what = name.split("/")[0], cell["settings"]["row"]
        what += f", {name.rsplit('-', 2)[1]} tasks" if stage == "sizes" else ""
        if stage in PROMPTS and what in ROWS:
            what += f", scale {cell['settings']['alpha'] / cell['settings']['rank']:g}"
        groups.setdefault((stage, what), {})[cell["settings"]["seed"]] = cell
    for stage in PROMPTS:
        of_stage = {what: group for (of, what), group in sorted(groups.items()) if of == stage}
        heads = [f"{name} {METRICS[metric]}" for name in which for metric in METRICS]
        lines = [[what, listed(group), *means(group.values(), METRICS)] for what, group in of_stage.items()]
        parts.append(table([stage, "seeds", *heads], lines))
        first = of_stage.get(f"orchmoe, scale {best.get('orchmoe', 0):g}", {})
        pairs = {what: dict.fromkeys(first, group[0]) if what in UNTRAINED else group  # the same of each seed
                 for what, group in of_stage.items() if first and group is not first}
        lines = [[what, listed(group), *less(first, group, METRICS)] for what, group in pairs.items()]
        parts.append(table([f"orchmoe - row, {stage}", "seeds", *heads], lines))

    sizes = {what: group for (stage, what), group in sorted(groups.items()) if stage == "sizes"}
    for row, curve in found.items():  # beside them the same seeds of its curve's point
        seeds = {seed for what, group in sizes.items() if what.startswith(f"{row}, ") for seed in group}
        same = {seed: cell for seed, cell in curve.get(1.0, {}).items() if seed in seeds}
        sizes |= {f"{row}, the curves' tasks": same} if same else {}
    lines = [[what, listed(group), *means(group.values()),  # of fewer or more tasks there is no curve
              *less(sizes.get("orchmoe, " + what.rpartition(", ")[2], {}), group)]
             for what, group in sizes.items()]
    itself = [f"orchmoe - it, {name}" for name in which]
    parts.append(table(["sizes, scale 1", "seeds", *which, *itself], lines))
    point = found.get("orchmoe", {}).get(1.0, {})
    against = [row for row in ("orchmoe", "lora") if row in found]
    for stage in ("ablations", "controls"):
        lines = [[what, listed(group), *means(group.values()), *less(point, group),
                  *(said(above(group, found[row], "unseen-dev")) for row in against)]
                 for (of, what), group in sorted(groups.items()) if of == stage]
        heads = [*which, *itself, *(f"unseen-dev - {row}'s curve" for row in against)]
        parts.append(table([stage, "seeds", *heads], lines))
    if any(intervals):
        number = sum(map(bool, intervals))
        parts.append("Means over tasks; in brackets the sd over seeds. Differences with 95 % intervals over "
                     "tasks and seeds together, of one seed over tasks alone, which tells nothing of other "
                     f"runs; of the {number} here about {number / 20:.0f} would exclude zero if nothing "
                     "differed. Losses in nats per target token, the less the better; ROUGE-L and exact "
                     "match in per cent.")
    return "\n\n".join(filter(None, parts)) + "\n"
