"""What the numbers of cells say: differences with intervals over tasks and seeds, in Markdown.

Letters: T tasks.  Test: pytest tests/experiments/test_tables.py
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from support import program

METRICS = {"rougeL": "ROUGE-L", "exact_match": "exact match", "loss": "loss"}
COLUMNS = list(itertools.product(("seen", "unseen"), METRICS))
ROUTER = {  # numbers of routing.report
    "mutual_information": "information on the category",
    "entropy": "entropy of w",
    "largest": "largest mean w",
    "distance_from_equal": "mean abs(c - 1/S)",
}
Difference = tuple[float, float, float]  # mean, low, high


@dataclass(frozen=True)
class TablesConfig:
    """Tables: where the cells are."""

    results: str = ""  # folder of the cells, to which tables and figure go (default: ours)

    @classmethod
    def read(cls, doc: str, default: Path) -> Path:
        """Return the folder that the command line names, or the default one."""
        return Path(program.read_flags(doc, cls).get("results", default))


# -------------------------------------------------------------------------------------- intervals


def interval(differences: np.ndarray) -> Difference:
    """Return the mean of paired differences (T, seeds) and its 95 % confidence interval over both.

    The model is two-way random: d = mean + task + seed + rest. With one seed the interval is over
    tasks alone; with one task as well it is NaN.
    """
    T, seeds = differences.shape
    mean = differences.mean()
    by_task = differences.mean(axis=1, keepdims=True)
    by_seed = differences.mean(axis=0, keepdims=True)
    rest = differences - by_task - by_seed + mean

    # Mean squares and degrees of freedom of both effects and of the rest.
    squares = []
    for total, freedom in (
        (seeds * ((by_task - mean) ** 2).sum(), T - 1),
        (T * ((by_seed - mean) ** 2).sum(), seeds - 1),
        ((rest**2).sum(), (T - 1) * (seeds - 1)),
    ):
        if freedom > 0:
            squares.append((total / freedom, freedom))
    if not squares:
        return float(mean), np.nan, np.nan

    # T seeds Var(mean) = MS_task + MS_seed - MS_rest, since both effects contain the rest. It is
    # at least that of one effect.
    effects = [square for square, _ in squares[:2]]
    rests = [square for square, _ in squares[2:]]
    variance = max(sum(effects) - sum(rests), *effects)
    if not variance > 0:
        return float(mean), float(mean), float(mean)

    # Degrees of freedom by Satterthwaite (1946), and at least those of the smallest part.
    freedom = variance**2 / sum(square**2 / dof for square, dof in squares)
    freedom = max(freedom, min(dof for _, dof in squares))
    half = t_quantile(freedom) * (variance / differences.size) ** 0.5
    return float(mean), float(mean - half), float(mean + half)


def t_quantile(freedom: float) -> float:
    """Return the 97.5 % point of Student's t.

    With t = sqrt(freedom) tan(angle) its density is cos(angle)^(freedom - 1).
    """
    angles = np.linspace(0, np.pi / 2, 200_001)
    middles = (angles[1:] + angles[:-1]) / 2
    mass = np.cumsum(np.cos(middles) ** (freedom - 1))  # up to angles[1:]
    angle = np.interp(0.95 * mass[-1], mass, angles[1:])
    return float(freedom**0.5 * np.tan(angle))


# ------------------------------------------------------------------------------------- from cells


def by_task(cell: dict[str, Any], which: str, metric: str = "loss") -> np.ndarray:
    """Return the scores (T,) on the tasks of a set, by name. NaN where there are none."""
    scores = cell[which]["tasks"]
    return np.array([scores[name].get(metric, np.nan) for name in sorted(scores)])


def by_seed(cells: Iterable[dict], which: str, metric: str = "loss") -> np.ndarray:
    """Return the scores (T, seeds) of cells that are one for each seed."""
    return np.stack([by_task(cell, which, metric) for cell in cells], axis=1)


# --------------------------------------------------------------------------------------- Markdown


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table in Markdown, "" without rows."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    if not lines:
        return ""
    return "\n".join([f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1), *lines])


def publish(text: str, path: Path) -> None:
    """Print the tables and write them to a file."""
    program.print_line(text)
    with program.atomic_write(path) as file:
        file.write(text.encode())


def signed(difference: Difference, digits: int = 3) -> str:
    """Return a difference with its interval, "+0.100 [-0.200, +0.400]"."""
    mean, low, high = (f"{value:+.{digits}f}" for value in difference)
    return f"{mean} [{low}, {high}]"


def tuning_table(reports: dict[str, dict]) -> str:
    """Return what Search.report says of each row."""
    rows = []
    for name, report in reports.items():
        best = ", ".join(f"{axis} {value:g}" for axis, value in report["best"].items())
        edges = ", ".join(report["edges"]) or "none: lower and higher values were tried"
        rows.append([name, len(report["trials"]), best, f"{report['dev_loss']:.4f}", edges])
    head = ["row", "trials", "best on dev", "dev loss", "on the edge of what was tried"]
    return table(head, rows)


def markdown(rows: dict[str, list[dict[str, Any]]], tuning: dict[str, dict]) -> str:
    """Return all tables of a comparison: tuning, scores, differences, and what the routers do.

    rows: the cells of each row, one for each seed. Differences are those of the first row from
    the others. An untrained row has one cell, which is compared with each seed of the first row.
    """
    reference, first = next(iter(rows.items()))
    scores = []
    differences = []
    routers = []
    for name, cells in rows.items():
        sizes = cells[0].get("parameters")
        losses = [cell["dev_loss"] for cell in cells if "dev_loss" in cell]
        scores.append(
            [
                f"{name}*" if name == "c-poly" else name,
                f"{sizes['skills']:,} + {sizes['routing']:,}" if sizes else "-",
                mean_and_sd(losses, 3) if losses else "-",
            ]
        )
        differences.append([name])
        for which, metric in COLUMNS:
            digits = 3 if metric == "loss" else 2  # nats, per cent
            overall = [cell[which]["overall"] for cell in cells if which in cell]
            score = "-"
            difference = "-"
            if overall and metric in overall[0]:
                score = mean_and_sd([values[metric] for values in overall], digits)
                if cells is not first:
                    one = by_seed(first, which, metric)
                    difference = signed(interval(one - by_seed(cells, which, metric)), digits)
            scores[-1].append(score)
            differences[-1].append(difference)

        numbers = [name]
        for key in ROUTER:
            values = [cell.get("learnt", {}).get(key) for cell in cells]
            values = [value for value in values if value is not None]
            # A w that is no distribution has no entropy.
            numbers.append(f"{np.mean(values):.3f}" if values else "-")
        if set(numbers[1:]) != {"-"}:
            routers.append(numbers)

    titles = [f"{which} {METRICS[metric]}" for which, metric in COLUMNS]
    parts = [
        tuning_table(tuning),
        table(["row", "skills + routing", "dev loss", *titles], scores),
        table([f"{reference} - row", *titles], differences[1:]),
        table(["row, on seen instances", *ROUTER.values()], routers),
    ]
    parts.append(
        "In brackets the sd over seeds. Differences with 95 % intervals over tasks and seeds "
        f"together; {chance(parts)}. ROUGE-L and exact match in per cent; loss: nats per target "
        "token, of seen and unseen the mean over tasks."
    )
    if "c-poly" in rows:
        parts.append(
            "* c-poly stands at equal S R, not at equal total: its skills grow with the tasks."
        )
    return "\n\n".join(part for part in parts if part) + "\n"


def mean_and_sd(values: Sequence[float], digits: int) -> str:
    """Return "mean (sd)", or the value alone if there is one."""
    text = f"{np.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ({np.std(values, ddof=1):.{digits}f})"
    return text


def chance(parts: Iterable[str]) -> str:
    """Return how many of the intervals in these tables would exclude zero by chance alone."""
    count = sum(part.count("[") for part in parts)
    return f"of the {count} here about {count / 20:.0f} would exclude zero if nothing differed"
