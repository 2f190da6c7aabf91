"""What the numbers of a comparison say: differences with intervals over tasks and seeds, Markdown tables.
Test: `pytest tests/experiments/test_tables.py`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

METRICS = {"rougeL": "ROUGE-L", "exact_match": "exact match", "loss": "loss"}
ROUTER = {"mutual_information": "information on the category", "entropy": "entropy of w",
          "largest": "largest mean w", "distance": "mean abs(c - 1/S)"}  # fmt: skip


def interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean of the paired differences (T tasks, seeds) and its 95 % confidence interval over both, from the
    two-way random model d = mean + task + seed + rest. One seed: over tasks alone; one task too: NaN."""
    T, seeds = differences.shape
    mean = differences.mean()
    by_task, by_seed = differences.mean(1, keepdims=True), differences.mean(0, keepdims=True)
    rest = differences - by_task - by_seed + mean
    sums = [(seeds * ((by_task - mean) ** 2).sum(), T - 1), (T * ((by_seed - mean) ** 2).sum(), seeds - 1),
            ((rest**2).sum(), (T - 1) * (seeds - 1))]
    squares = [(total / dof, dof) for total, dof in sums if dof]  # mean squares and degrees of freedom
    if not squares:
        return float(mean), np.nan, np.nan
    effects, rests = squares[:2], squares[2:]
    # T seeds Var(mean) = MS_task + MS_seed - MS_rest, as both effects' hold the rest; at least one effect's
    variance = max(sum(square for square, _ in effects) - sum(square for square, _ in rests),
                   *(square for square, _ in effects))
    if not variance > 0:
        return float(mean), float(mean), float(mean)
    freedom = variance**2 / sum(square**2 / dof for square, dof in squares)  # Satterthwaite (1946)
    freedom = max(freedom, min(dof for _, dof in squares))  # those of a sum lie above the least of its parts'
    half = t_quantile(freedom) * (variance / differences.size) ** 0.5
    return float(mean), float(mean - half), float(mean + half)


def t_quantile(freedom: float) -> float:
    """97.5 % point of Student's t: with t = sqrt(dof) tan(angle) its density is cos(angle)^(dof - 1)."""
    angles = np.linspace(0, np.pi / 2, 200_001)
    mass = np.cumsum(np.cos(angles) ** (freedom - 1))
    return float(freedom**0.5 * np.tan(np.interp(0.95 * mass[-1], mass, angles)))


def summarise(rows: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """For each row, whose cells are one a seed: mean and sd over seeds of the overall scores, and the
    difference first row - row with its interval."""
    reference, summary = next(iter(rows)), []
    for row, cells in rows.items():
        entry: dict[str, Any] = {"row": row, "seeds": len(cells), "parameters": cells[0].get("parameters")}
        if losses := [cell["dev_loss"] for cell in cells if "dev_loss" in cell]:
            entry["dev loss"] = _spread(losses)
        for which, metric in itertools.product(("seen", "unseen"), METRICS):
            if metric not in cells[0].get(which, {}).get("overall", {}):
                continue
            entry[f"{which} {metric}"] = _spread([cell[which]["overall"][metric] for cell in cells])
            if row != reference:  # what was not trained has one cell, and stands against every seed
                one, other = (_by_task(group, which, metric) for group in (rows[reference], cells))
                entry[f"{which} {metric}"]["difference"] = interval(one - other)
        entry["learnt"] = {}
        for name in ROUTER:
            have = [value for cell in cells if (value := cell.get("learnt", {}).get(name)) is not None]
            if have:  # w that is no distribution has no entropy
                entry["learnt"][name] = float(np.mean(have))
        summary.append(entry)
    return summary


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}


def _by_task(cells: Sequence[dict], which: str, metric: str) -> np.ndarray:
    """(T, seeds), the tasks in the order of their names."""
    tasks = sorted(cells[0][which]["tasks"])
    return np.array([[cell[which]["tasks"][task][metric] for cell in cells] for task in tasks])


def markdown(summary: Sequence[dict], tuning: dict[str, dict]) -> str:
    """Tables: what was tuned, scores with sd over seeds, first row - row with intervals, what routers do."""
    columns = ["dev loss", *(f"{which} {metric}" for which in ("seen", "unseen") for metric in METRICS)]
    columns = [column for column in columns if any(column in entry for entry in summary)]
    compared = [column for column in columns
                if any("difference" in entry.get(column, {}) for entry in summary)]
    number = sum("difference" in entry.get(column, {}) for entry in summary for column in compared)
    parts = [tuning_table(tuning),
             table(["row", "skills + routing", *map(_title, columns)],
                   [[_name(entry), _size(entry), *(_score(entry, column) for column in columns)]
                    for entry in summary]),
             table([f"{summary[0]['row']} - row", *map(_title, compared)],
                   [[entry["row"], *(_difference(entry, column) for column in compared)]
                    for entry in summary[1:]]),
             table(["row, on seen instances", *ROUTER.values()],
                   [[entry["row"], *(f"{entry['learnt'][name]:.3f}" if name in entry["learnt"] else "-"
                                     for name in ROUTER)] for entry in summary if entry["learnt"]]),
             "In brackets the sd over seeds. Differences with 95 % intervals over tasks and seeds together; "
             f"of the {number} here about {number / 20:.0f} would exclude zero if nothing differed. ROUGE-L "
             "and exact match in per cent; loss: nats per target token, of seen and unseen the mean over "
             "tasks.",
             "* c-poly stands at equal S R, not at equal total: its skills grow with the tasks."
             if any(entry["row"] == "c-poly" for entry in summary) else ""]
    return "\n\n".join(filter(None, parts)) + "\n"


def tuning_table(reports: dict[str, dict]) -> str:
    """What Search.report says of each row."""
    return table(["row", "trials", "best on dev", "dev loss", "on the edge of what was tried"],
                 [_tuned(row, found) for row, found in reports.items()])


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Markdown; nothing where there are no rows."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    top = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)] if lines else []
    return "\n".join(top + lines)


def _title(column: str) -> str:
    return " ".join(METRICS.get(word, word) for word in column.split())


def _name(entry: dict) -> str:
    return entry["row"] + "*" * (entry["row"] == "c-poly")


def _size(entry: dict) -> str:
    sizes = entry["parameters"]
    return f"{sizes['skills']:,} + {sizes['routing']:,}" if sizes else "-"


def _tuned(row: str, found: dict) -> list[Any]:
    best = ", ".join(f"{axis} {value:g}" for axis, value in found["best"].items())
    edges = ", ".join(found["edges"]) or "none: lower and higher values were tried"
    return [row, len(found["trials"]), best, f"{found['dev_loss']:.4f}", edges]


def _score(entry: dict, column: str) -> str:
    digits = _digits(column)
    return "{mean:.{0}f} ({sd:.{0}f})".format(digits, **entry[column]) if column in entry else "-"


def _difference(entry: dict, column: str) -> str:
    found, digits = entry.get(column, {}).get("difference"), _digits(column)
    return "{1:+.{0}f} [{2:+.{0}f}, {3:+.{0}f}]".format(digits, *found) if found else "-"


def _digits(column: str) -> int:
    return 3 if "loss" in column else 2  # nats, per cent
