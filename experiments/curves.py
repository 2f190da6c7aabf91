"""The tables of the first study on SmolLM2: all methods at one total size, at several scales.

Scale moves a method along a curve of unseen against seen loss. Two curves are compared in the
lowest loss on the one kind of tasks that each reaches at no more than some loss on the other kind.
The tables are made from the finished cells in experiments/results/. docs/evidence.md says how these
were made.

    python -m experiments.curves            # the tables
    python -m experiments.curves --final    # also of the unseen tasks by which nothing was chosen

Letters: P points of a curve, T tasks.  Test: pytest tests/experiments/test_curves.py
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import runtime
from experiments.study import UNTRAINED, read_tuning
from experiments.tables import (
    METRICS,
    Difference,
    Group,
    by_seed,
    by_task,
    chance,
    interval,
    mean_and_sd,
    paired,
    publish,
    signed,
    table,
    tuning_table,
)
from runtime import UserError

RESULTS = runtime.ROOT / "experiments/results"
STAGES = ("tune", "methods", "answers", "sizes", "ablations", "controls")  # folders of cells
# All of one total size, which is that of the token router.
ROWS = ("orchmoe", "token router", "lora", "moe-lora", "poly")
SCALES = (0.5, 1.0, 2.0, 4.0)  # alpha divided by the rank; most rows have 0.25 with the first seed


@dataclass(frozen=True)
class CurvesConfig:
    """Curves: of which cells, and on which tasks."""

    results: str = str(RESULTS)  # folder of the finished cells
    final: bool = False  # show the unseen tasks by which nothing was chosen


Cells = dict[str, dict[str, Any]]  # by name
Curve = dict[float, Group]  # by scale


# ------------------------------------------------------------------------------ cells and curves


def read_cells(folder: Path) -> Cells:
    """Return all finished cells by stage/name. Raise UserError for a file that is no cell."""
    cells = {}
    for stage in sorted(STAGES):
        needed = {"settings", "dev_loss"} if stage == "tune" else {"settings", "seen", "unseen"}
        for path in sorted(folder.glob(f"{stage}/*.json")):
            cell = runtime.read_json(path)
            if not needed <= cell.keys():
                raise UserError(f"{path}: no finished cell")
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


def common(*given: Curve) -> list[int]:
    """Return the seeds that every point of the curves has."""
    seeds = []
    for curve in given:
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

    The limit on the loss `along` is halfway between two losses: the lowest one that every curve
    reaches, and the one beyond which no curve gets lower `across`. Return None if the curves share
    no seed.
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

    # Positions of points, because leaving out a task changes losses; `read` looks them up anew.
    first = end(x)
    last = end(y)

    def read(y, x):
        limit = max((x[first] + x[last]) / 2, *(x[part].min() for part in parts))
        found = [reading(x[part], y[part], limit) for part in parts]
        return np.subtract(found[: len(seeds)], found[len(seeds) :])

    return jackknife(read, *sets)


# ---------------------------------------------------------------------------------------- tables


def listed(seeds: Iterable[int]) -> str:
    return ", ".join(str(seed) for seed in sorted(seeds))


class Page:
    """The columns of the tables.

    sets: the sets and halves that have columns, "unseen-test" only in the final tables.
    """

    def __init__(self, final: bool):
        self.sets = ["seen", "unseen-dev"]
        if final:
            self.sets.append("unseen-test")

    def means(self, group: Group, metrics: Iterable[str] = ("loss",)) -> list[str]:
        """Return mean and sd over seeds of the means over tasks."""
        cells = []
        for which in self.sets:
            for metric in metrics:
                values = by_seed(group.values(), which, metric).mean(axis=0)
                cells.append("-" if np.isnan(values).any() else mean_and_sd(values, 3))
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
                        text = signed(interval(differences))
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
    parts = [tuning_table(tuning)]
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
    parts.append(table(["row", "scale", "seeds", "dev", *page.sets], rows))

    # Curve against curve.
    ways = [("unseen-dev", "seen"), ("seen", "unseen-dev")]
    others = {row: curve for row, curve in found.items() if row != "orchmoe" and orchmoe}
    rows = []
    for row, curve in others.items():
        found_differences = [at_most(orchmoe, curve, *way) for way in ways]
        read = [signed(each) if each else "not to be read" for each in found_differences]
        rows.append([row, listed(common(complete(orchmoe), complete(curve))), *read])
    heads = [f"{across} at no more {along}" for along, across in ways]
    parts.append(table(["orchmoe - row", "seeds", *heads], rows))

    # Best scale against best scale.
    rows = []
    for row, curve in others.items():
        if row in best and "orchmoe" in best:
            group = curve[best[row]]
            differences = page.differences(orchmoe[best["orchmoe"]], group)
            rows.append([row, listed(group), *differences])
    parts.append(table(["orchmoe - row, each at its best scale", "seeds", *page.sets], rows))

    # Answers: means, and differences of OrchMoE from what is not OrchMoE.
    titles = []
    for which in page.sets:
        titles += [f"{which} {title}" for title in METRICS.values()]
    answers = grouped(cells, "answers")
    rows = [[name, listed(group), *page.means(group, METRICS)] for name, group in answers.items()]
    parts.append(table(["answers", "seeds", *titles], rows))
    first = answers.get(f"orchmoe, scale {best.get('orchmoe', 0):g}", {})
    rows = []
    for name, group in answers.items():
        if name in UNTRAINED and first:
            group = dict.fromkeys(first, group[0])  # the same with every seed
        if first and group is not first:
            differences = page.differences(first, group, METRICS)
            rows.append([name, listed(group), *differences])
    parts.append(table(["orchmoe - row, answers", "seeds", *titles], rows))

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
    parts.append(table(["sizes, scale 1", "seeds", *page.sets, *itself], rows))

    # Single changes of OrchMoE, beside OrchMoE itself.
    for stage in ("ablations", "controls"):
        rows = []
        for name, group in grouped(cells, stage).items():
            differences = page.differences(orchmoe.get(1.0, {}), group)
            rows.append([name, listed(group), *page.means(group), *differences])
        parts.append(table([stage, "seeds", *page.sets, *itself], rows))

    if any("[" in part for part in parts):
        parts.append(
            "Means over tasks; in brackets the sd over seeds. Differences with 95 % intervals over "
            "tasks and seeds together, of one seed over tasks alone, which tells nothing of other "
            f"runs; {chance(parts)}. Losses in nats per target token, the less the better; "
            "ROUGE-L and exact match in per cent."
        )
    return "\n\n".join(part for part in parts if part) + "\n"


def main() -> None:
    config = runtime.from_flags(CurvesConfig, runtime.read_flags(__doc__, CurvesConfig))
    results = Path(config.results)
    cells = read_cells(results)
    path = results / ("final.md" if config.final else "tables.md")
    publish(text(cells, read_tuning(results), config.final), path)


if __name__ == "__main__":
    runtime.run_program(main)
