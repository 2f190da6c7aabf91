"""The tables of the first study on SmolLM2: all methods at one total size, at several scales.

Scale moves a method along a curve of unseen against seen loss. Two curves are compared in the
lowest loss on the one kind of tasks that each reaches at no more than some loss on the other kind.
The tables are made from the finished cells in experiments/results/. docs/evidence.md says how these
were made.

    python -m experiments.curves            # the tables, and the figure of the curves
    python -m experiments.curves --final    # also of the unseen tasks by which nothing was chosen

Letters: P points of a curve, T tasks.  Test: pytest tests/experiments/test_curves.py
"""

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import runtime
from experiments import plot
from experiments.study import UNTRAINED, read_tuning
from experiments.tables import (
    METRICS,
    Difference,
    Group,
    by_seed,
    by_task,
    interval,
    paired,
    publish,
    signed,
    table,
    tuning_table,
)

RESULTS = runtime.ROOT / "experiments/results"
STAGES = ("tune", "methods", "answers", "sizes", "ablations", "controls")  # folders of cells
# All of one total size, which is that of the token router.
ROWS = ("orchmoe", "token router", "lora", "moe-lora", "poly")
SCALES = (0.5, 1.0, 2.0, 4.0)  # alpha divided by the rank; the first seed has 0.25, too


@dataclass(frozen=True)
class CurvesConfig:
    """Curves: of which cells, and on which tasks."""

    results: str = str(RESULTS)  # folder of the finished cells
    final: bool = False  # show the unseen tasks by which nothing was chosen


Cells = dict[str, dict[str, Any]]  # by name
Curve = dict[float, Group]  # by scale


# ------------------------------------------------------------------------------ cells and curves


def read_cells(folder: Path) -> Cells:
    """Return all finished cells by stage/name. Raise ValueError for a file that is no cell."""
    cells = {}
    for stage in sorted(STAGES):
        needed = {"settings", "dev_loss"} if stage == "tune" else {"settings", "seen", "unseen"}
        for path in sorted(folder.glob(f"{stage}/*.json")):
            cell = runtime.read_json(path)
            if not needed <= cell.keys():
                raise ValueError(f"{path}: no finished cell")
            cells[f"{stage}/{path.stem}"] = cell
    return cells


def curves(cells: Cells) -> dict[str, Curve]:
    """Return the curve of each row, from the cells of the stage methods."""
    found: dict[str, Curve] = {}
    for name, cell in cells.items():
        if name.startswith("methods/"):
            settings = cell["settings"]
            curve = found.setdefault(settings["row"], {})
            group = curve.setdefault(settings["alpha"] / settings["rank"], {})
            group[settings["seed"]] = cell
    return {row: dict(sorted(found[row].items())) for row in ROWS if row in found}


def common(*curves: Curve) -> list[int]:
    """Return the seeds that every point of the curves has."""
    seeds = []
    for curve in curves:
        seeds += [set(group) for group in curve.values()]
    return sorted(set.intersection(*seeds))


def complete(curve: Curve) -> Curve:
    """Return points of the curve that share their seeds.

    They have as many cells as possible, and of these choices as many points. A scale with missing
    seeds is left out, so that it does not remove seeds from the others.
    """
    parts = []
    for seeds in map(set, curve.values()):
        parts.append({scale: group for scale, group in curve.items() if seeds <= set(group)})
    return max(parts, key=lambda part: (len(part) * len(common(part)), len(part)))


def best_scales(cells: Cells) -> dict[str, float]:
    """Return the best scale of each row that has all scales.

    It has the lowest sum of the losses on dev and on unseen-dev, over the seeds that all have.
    """
    best = {}
    for row, curve in curves(cells).items():
        curve = complete(curve)
        if not set(SCALES) <= curve.keys():
            continue
        losses = {}
        for scale, group in curve.items():
            chosen = [group[seed] for seed in common(curve)]
            of_seeds = [cell["dev_loss"] + by_task(cell, "unseen-dev").mean() for cell in chosen]
            losses[scale] = np.mean(of_seeds)
        best[row] = min(losses, key=losses.get)
    return best


def losses_of(groups: Iterable[Group], seeds: Sequence[int], which: str) -> np.ndarray:
    """Return the losses (P,T,seeds) of points."""
    losses = []
    for group in groups:
        losses.append(by_seed([group[seed] for seed in seeds], which))
    return np.stack(losses)


# --------------------------------------------------------------------------- curve against curve


def reading(x: np.ndarray, y: np.ndarray, limit: float) -> float:
    """Return the lowest y of the curve through the points (x, y) where x is at most `limit`.

    The curve is straight between its points. Return NaN if x is larger everywhere.
    """
    steps = np.diff(x)
    shares = (limit - x[:-1]) / np.where(steps == 0, 1, steps)
    crossings = y[:-1] + shares * np.diff(y)
    crossings = crossings[(shares >= 0) & (shares <= 1)]
    return min([*y[x <= limit], *crossings], default=np.nan)


def jackknife(read: Callable[..., np.ndarray], *sets: np.ndarray) -> Difference | None:
    """Return the mean of read(*means) and its 95 % interval over tasks of both sets and seeds.

    sets: two sets of losses (P,T,seeds). means: their means over the tasks, (P,seeds).
    read: returns one difference for each seed. The part of a task is what is read without it
    (Tukey 1958). Return None if it cannot be read.
    """
    means = [losses.mean(axis=1) for losses in sets]
    whole = read(*means)  # (seeds,)
    halves = []
    for number, losses in enumerate(sets):
        T = losses.shape[1]
        parts = []
        for t in range(T):
            without = list(means)
            without[number] = (T * means[number] - losses[:, t]) / (T - 1)
            parts.append(T * whole - (T - 1) * read(*without))
        parts = np.stack(parts)  # (T,seeds)
        if np.isnan(parts).any():
            return None
        parts += whole - parts.mean(axis=0)  # their mean is far off where `read` has a kink
        if number > 0:
            parts = parts.mean(axis=1, keepdims=True)  # the seeds count once
        _, low, high = interval(parts)
        halves.append((high - low) / 2)
    mean = whole.mean()
    half = np.hypot(*halves)
    return float(mean), float(mean - half), float(mean + half)


def at_most(one: Curve, other: Curve, along: str, across: str) -> Difference | None:
    """Return the difference one - other of the lowest loss `across` at no more loss `along`.

    It is read halfway from the first loss `along` that both reach, in all seeds, to the one from
    which on more helps neither. Return None if the curves share no seed.
    """
    one = complete(one)
    other = complete(other)
    seeds = common(one, other)
    if not seeds:
        return None
    groups = [*one.values(), *other.values()]
    sets = [losses_of(groups, seeds, which) for which in (across, along)]
    y, x = (losses.mean(axis=1) for losses in sets)  # (P,seeds)

    # The curve of each seed as an index: first all of `one`, then all of `other`.
    parts = []
    for points in (slice(0, len(one)), slice(len(one), None)):
        parts += [(points, s) for s in range(len(seeds))]

    def end(values):
        """Return the lowest points of all curves: of these, the one with the largest x."""
        lowest = [(points.start + values[points, s].argmin(), s) for points, s in parts]
        return max(lowest, key=lambda point: x[point])

    # These are points, not losses: without a task all losses move, and these with them.
    first = end(x)
    last = end(y)

    def read(y, x):
        limit = max((x[first] + x[last]) / 2, *(x[part].min() for part in parts))
        found = [reading(x[part], y[part], limit) for part in parts]
        return np.subtract(found[: len(seeds)], found[len(seeds) :])

    return jackknife(read, *sets)


def above(point: Group, curve: Curve, across: str) -> Difference | None:
    """Return the difference of a point from a curve at the point's own seen loss."""
    curve = complete(curve)
    seeds = common({0: point}, curve)
    if not seeds:
        return None

    def read(y, x):
        found = [y[0, s] - reading(x[1:, s], y[1:, s], x[0, s]) for s in range(len(seeds))]
        return np.array(found)

    groups = [point, *curve.values()]
    return jackknife(read, *(losses_of(groups, seeds, which) for which in (across, "seen")))


def figure(found: dict[str, Curve], path: Path) -> Path:
    """Draw seen against unseen loss, a curve for each row over the scales that all its seeds have.

    The bars are 95 % intervals of the difference from the first scale of the first row.
    """
    found = {row: complete(curve) for row, curve in found.items()}
    first_row, first_curve = next(iter(found.items()))
    scale, reference = next(iter(first_curve.items()))
    canvas, axes = plot.canvas(
        "Loss on seen and on unseen tasks over the scales; lower left is better",
        f"bars: 95 % intervals of the difference from {first_row} x{scale:g}",
        height=5,
    )
    for number, (row, curve) in enumerate(found.items()):
        centres = []  # (P,2)
        bars = []  # (P,2,2)
        for group in curve.values():
            seeds = common({0: group}, {0: reference})
            for which in ("seen", "unseen-dev"):
                centres.append(losses_of([group], common(curve), which).mean())
                pair = losses_of([group, reference], seeds, which)
                mean, low, high = interval(pair[0] - pair[1])
                bars.append((mean - low, high - mean))
        x, y = np.reshape(centres, (-1, 2)).T
        x_bars, y_bars = np.reshape(bars, (-1, 2, 2)).transpose(1, 2, 0)
        axes.errorbar(
            x,
            y,
            xerr=x_bars,
            yerr=y_bars,
            label=f"{row}, seeds: {listed(common(curve))}",
            color=plot.COLOURS[number],
            marker=plot.MARKERS[number],
            markersize=5,
            linewidth=1.5,
            elinewidth=0.6,
        )
        for scale, *point in zip(curve, x, y, strict=True):
            offset = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 7}
            axes.annotate(f"x{scale:g}", point, **offset)
    axes.set(xlabel="seen tasks (nats per target token)")
    axes.set(ylabel="unseen tasks, the half to choose by")
    axes.legend()
    return plot.save(canvas, path)


# ---------------------------------------------------------------------------------------- tables


def listed(seeds: Iterable[int]) -> str:
    return ", ".join(str(seed) for seed in sorted(seeds))


class Page:
    """Tables in Markdown. Counts the intervals that they show.

    sets: the sets and halves that have columns, "unseen-test" only in the final tables.
    """

    def __init__(self, final: bool):
        self.sets = ["seen", "unseen-dev"]
        if final:
            self.sets.append("unseen-test")
        self.parts: list[str] = []
        self.intervals = 0

    def add(self, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        self.parts.append(table(head, rows))

    def signed(self, difference: Difference | None) -> str:
        if difference is None:
            return "not to be read"
        self.intervals += 1
        return signed(difference)

    def means(self, group: Group, metrics: Iterable[str] = ("loss",)) -> list[str]:
        """Return mean and sd over seeds of the means over tasks."""
        cells = []
        for which in self.sets:
            for metric in metrics:
                values = by_seed(group.values(), which, metric).mean(axis=0)
                text = f"{values.mean():.3f}"
                if len(values) > 1:
                    text += f" ({values.std(ddof=1):.3f})"
                cells.append("-" if np.isnan(values).any() else text)
        return cells

    def differences(
        self, first: Group, group: Group, metrics: Iterable[str] = ("loss",)
    ) -> list[str]:
        """Return the differences first - group of the seeds of `group`."""
        cells = []
        for which in self.sets:
            for metric in metrics:
                text = "-"
                if group.keys() <= first.keys() and group is not first:
                    differences = paired(first, group, which, metric)
                    if not np.isnan(differences).any():
                        text = self.signed(interval(differences))
                cells.append(text)
        return cells


def grouped(cells: Cells, stage: str) -> dict[str, Group]:
    """Return the cells of a stage by what they are, and by seed."""
    groups: dict[str, Group] = {}
    for name, cell in cells.items():
        if not name.startswith(f"{stage}/"):
            continue
        settings = cell["settings"]
        label = settings["row"]
        if stage == "sizes":
            label += f", {name.rsplit('-', 2)[1]} tasks"
        if stage == "answers" and label in ROWS:
            label += f", scale {settings['alpha'] / settings['rank']:g}"
        groups.setdefault(label, {})[settings["seed"]] = cell
    return dict(sorted(groups.items()))


def text(cells: Cells, tuning: dict[str, dict], final: bool = False) -> str:
    """Return all tables in Markdown.

    final: also of the unseen tasks by which nothing was chosen. A curve is never read on these,
    since its lowest loss is a choice.
    """
    page = Page(final)
    page.parts.append(tuning_table(tuning))
    found = curves(cells)
    best = best_scales(cells)
    orchmoe = found.get("orchmoe", {})

    # All points of the curves.
    rows = []
    for row, curve in found.items():
        for scale, group in curve.items():
            name = f"{scale:g}, the best" if scale == best.get(row) else f"{scale:g}"
            dev = np.mean([cell["dev_loss"] for cell in group.values()])
            rows.append([row, name, listed(group), f"{dev:.3f}", *page.means(group)])
    page.add(["row", "scale", "seeds", "dev", *page.sets], rows)

    # Curve against curve.
    ways = [("unseen-dev", "seen"), ("seen", "unseen-dev")]
    others = {row: curve for row, curve in found.items() if row != "orchmoe" and orchmoe}
    rows = []
    for row, curve in others.items():
        read = [page.signed(at_most(orchmoe, curve, *way)) for way in ways]
        rows.append([row, listed(common(complete(orchmoe), complete(curve))), *read])
    heads = [f"{across} at no more {along}" for along, across in ways]
    page.add(["orchmoe - row", "seeds", *heads], rows)

    # Best scale against best scale.
    rows = []
    for row, curve in others.items():
        if row in best and "orchmoe" in best:
            group = curve[best[row]]
            differences = page.differences(orchmoe[best["orchmoe"]], group)
            rows.append([row, listed(group), *differences])
    page.add(["orchmoe - row, each at its best scale", "seeds", *page.sets], rows)

    # Answers: means, and differences of OrchMoE from what is not OrchMoE.
    titles = []
    for which in page.sets:
        titles += [f"{which} {title}" for title in METRICS.values()]
    answers = grouped(cells, "answers")
    rows = [[name, listed(group), *page.means(group, METRICS)] for name, group in answers.items()]
    page.add(["answers", "seeds", *titles], rows)
    first = answers.get(f"orchmoe, scale {best.get('orchmoe', 0):g}", {})
    rows = []
    for name, group in answers.items():
        if name in UNTRAINED and first:
            group = dict.fromkeys(first, group[0])  # the same with every seed
        if first and group is not first:
            differences = page.differences(first, group, METRICS)
            rows.append([name, listed(group), *differences])
    page.add(["orchmoe - row, answers", "seeds", *titles], rows)

    # Numbers of training tasks. Beside them stand the same seeds on the tasks of the curves.
    sizes = grouped(cells, "sizes")
    for row, curve in found.items():
        seeds: set[int] = set()
        for name, group in sizes.items():
            if name.startswith(f"{row}, "):
                seeds |= group.keys()
        same = {seed: cell for seed, cell in curve.get(1.0, {}).items() if seed in seeds}
        if same:
            sizes[f"{row}, the curves' tasks"] = same
    itself = [f"orchmoe - it, {which}" for which in page.sets]
    rows = []
    for name, group in sizes.items():
        first = sizes.get("orchmoe, " + name.rpartition(", ")[2], {})
        rows.append([name, listed(group), *page.means(group), *page.differences(first, group)])
    page.add(["sizes, scale 1", "seeds", *page.sets, *itself], rows)

    # Single changes of OrchMoE, beside OrchMoE itself and beside curves at the same seen loss.
    beside = {row: found[row] for row in ("orchmoe", "lora") if row in found}
    heads = [*page.sets, *itself, *(f"unseen-dev - {row}'s curve" for row in beside)]
    for stage in ("ablations", "controls"):
        rows = []
        for name, group in grouped(cells, stage).items():
            row = [name, listed(group), *page.means(group)]
            row += page.differences(orchmoe.get(1.0, {}), group)
            row += [page.signed(above(group, curve, "unseen-dev")) for curve in beside.values()]
            rows.append(row)
        page.add([stage, "seeds", *heads], rows)

    if page.intervals:
        page.parts.append(
            "Means over tasks; in brackets the sd over seeds. Differences with 95 % intervals over "
            "tasks and seeds together, of one seed over tasks alone, which tells nothing of other "
            f"runs; of the {page.intervals} here about {page.intervals / 20:.0f} would exclude "
            "zero if nothing differed. Losses in nats per target token, the less the better; "
            "ROUGE-L and exact match in per cent."
        )
    return "\n\n".join(part for part in page.parts if part) + "\n"


def main() -> None:
    config = runtime.from_flags(CurvesConfig, runtime.read_flags(__doc__, CurvesConfig))
    results = Path(config.results)
    cells = read_cells(results)
    path = results / ("final.md" if config.final else "tables.md")
    publish(text(cells, read_tuning(results), config.final), path)
    if importlib.util.find_spec("matplotlib"):
        runtime.print_line(f"written: {figure(curves(cells), results / 'curves.png')}")


if __name__ == "__main__":
    runtime.run_program(main)
