"""What the numbers of cells say: means, differences with intervals, and verdicts, in Markdown.

One weighting holds for all scores and differences: a score is the mean within a task, then over
tasks. The mean within a task weighs target tokens alike for the loss, and rows alike for the other
metrics. Where rows name no task, each different prompt counts as a task. "Groups" are such tasks.

An interval covers groups and seeds if there are at least LEAST_GROUPS, or if each group has one
prompt. Otherwise these tasks are taken as they are, and the interval covers prompts within them and
seeds. Rows with the same prompt are always one unit. With one seed it covers groups or prompts
alone.

Letters: G groups, U units of an interval.  Test: pytest tests/experiments/test_tables.py
"""

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from support import program
from support.program import UserError
from tasks import NO_TASK
from train import TABLE

SETS = ("seen", "unseen")
LEAST_GROUPS = 6
# `what_would_decide` tries up to MOST_SEEDS seeds, and MOST_TIMES times the units.
MOST_SEEDS = 100
MOST_TIMES = 100
SMALLEST = 1e-20  # a variance below it is a rounding error
ROUTER = {  # numbers of eval.router_report
    "entropy": "entropy of w",
    "largest": "largest mean w",
    "used": "abstract tasks used",
    "distance": "distance of w from its start",
}
Difference = tuple[float, float, float]  # mean, low, high; low and high are NaN if unknown


# ------------------------------------------------------------------------------------- from cells


class PromptScores(NamedTuple):
    """The scores of the different prompts of a set, each summed over its rows."""

    groups: np.ndarray  # number of the group of each prompt
    weights: np.ndarray  # target tokens of each prompt for the loss, rows for other metrics
    sums: np.ndarray  # (prompts, seeds)


def read_prompts(cells: Sequence[dict[str, Any]], which: str, metric: str) -> PromptScores:
    """Return the scores of a row from its cells, one for each seed. which: "seen" or "unseen"."""
    columns = [cell[which]["prompts"] for cell in cells]
    names = task_names(columns[0])
    sizes = columns[0]["tokens" if metric == "loss" else "rows"]
    for other in columns[1:]:
        if task_names(other) != names or len(other[metric]) != len(sizes):
            raise UserError(f"the cells of a row have different {which} rows")
    number_of = {}  # of each group
    groups = []
    for i, name in enumerate(names):
        key = i if name == NO_TASK else name  # a prompt without a task is a group of its own
        groups.append(number_of.setdefault(key, len(number_of)))
    sums = np.stack([column[metric] for column in columns], axis=1)
    return PromptScores(np.array(groups), np.array(sizes, float), sums)


def task_names(columns: dict[str, list]) -> list[str]:
    """Return the name of the task of each prompt, see study.by_prompt."""
    return [columns["tasks"][number] for number in columns["task"]]


def group_means(prompts: PromptScores) -> np.ndarray:
    """Return the score (G, seeds) of each group."""
    weights = np.bincount(prompts.groups, prompts.weights)
    totals = np.zeros((len(weights), prompts.sums.shape[1]))
    np.add.at(totals, prompts.groups, prompts.sums)
    return totals / weights[:, None]


def mean_scores(cells: Sequence[dict[str, Any]], which: str, metric: str) -> list[float]:
    """Return the mean over groups of each cell."""
    return group_means(read_prompts(cells, which, metric)).mean(axis=0).tolist()


class Paired(NamedTuple):
    """Paired differences of two rows, as an interval takes them."""

    values: np.ndarray  # (U, seeds); their mean is that over groups
    freedom: int  # degrees of freedom of the units
    over: str  # what the units are, such as "12 tasks"
    limits: str  # what the interval does not cover, as sentences
    units: str  # "tasks" or "prompts"


def paired(one: Sequence[dict], other: Sequence[dict], which: str, metric: str) -> Paired:
    """Return the differences one - other of the cells of two rows, which are one for each seed.

    A row with a single cell is compared with each seed of the other.
    """
    first, second = (read_prompts(cells, which, metric) for cells in (one, other))
    same_groups = np.array_equal(first.groups, second.groups)
    if not same_groups or not np.array_equal(first.weights, second.weights):
        raise UserError(f"the cells of two rows have different {which} rows")
    difference = first._replace(sums=first.sums - second.sums)
    means = group_means(difference)
    U = len(difference.groups)
    G, seeds = means.shape

    names = set(task_names(one[0][which]["prompts"]))
    limits = []
    over, units = counted(G, "task"), "tasks"
    if names == {NO_TASK}:
        over, units = counted(G, "prompt"), "prompts"
    elif NO_TASK in names:
        over = f"{G} tasks and prompts"
    if NO_TASK in names:
        limits.append("It speaks of prompts like these only.")
    values, freedom = means, G - 1
    if G < LEAST_GROUPS and G < U:
        over, units = f"{U} prompts of {over}", "prompts"
        limits = ["It speaks of these tasks only."]
        values, freedom = within_groups(difference, means)
    if seeds == 1:
        limits.append("It does not cover what another seed would change.")
    else:
        over += f" and {seeds} seeds"
    return Paired(values, freedom, over, " ".join(limits), units)


def counted(count: int, name: str) -> str:
    """Return "1 task", or "2 tasks"."""
    return f"{count} {name}" if count == 1 else f"{count} {name}s"


def within_groups(prompts: PromptScores, means: np.ndarray) -> tuple[np.ndarray, int]:
    """Return a value (U, seeds) for each prompt, and the degrees of freedom of the prompts.

    A group's mean is a ratio: a sum of scores by a sum of weights. So the value of a prompt is the
    mean over groups, plus how far the prompt is from the mean of its group, scaled by its weight.
    Then the variance of the mean of all values is that of the mean over these groups.
    """
    G, _ = means.shape
    U = len(prompts.groups)
    count = np.bincount(prompts.groups)[prompts.groups]  # prompts in the group of each prompt
    total = np.bincount(prompts.groups, prompts.weights)[prompts.groups]
    expected = prompts.weights[:, None] * means[prompts.groups]
    deviation = (prompts.sums - expected) * (U / G / total)[:, None]
    # The deviations in a group of m add up to 0, so their squares are too small by (m - 1) / m.
    # A prompt that is alone in its group would have the deviation 0, so it gets the group's.
    of_group = (means - means.mean(axis=0))[prompts.groups] * (U / G)
    unbiased = (count / np.maximum(count - 1, 1) * (U - 1) / U) ** 0.5
    deviation = np.where((count == 1)[:, None], of_group, deviation * unbiased[:, None])
    deviation -= deviation.mean(axis=0)
    return means.mean(axis=0) + deviation, U - G


# -------------------------------------------------------------------------------------- intervals


class Squares(NamedTuple):
    """Mean squares of values (U, seeds) in a two-way random model: mean + unit + seed + rest."""

    unit: float
    seed: float  # 0 with one seed
    rest: float  # 0 with one seed


def mean_squares(values: np.ndarray) -> Squares:
    """Return the mean squares of both effects and of the rest."""
    U, seeds = values.shape
    mean = values.mean()
    by_unit = values.mean(axis=1, keepdims=True)
    by_seed = values.mean(axis=0, keepdims=True)
    rest = values - by_unit - by_seed + mean
    return Squares(
        unit=seeds * ((by_unit - mean) ** 2).sum() / max(U - 1, 1),
        seed=U * ((by_seed - mean) ** 2).sum() / max(seeds - 1, 1),
        rest=(rest**2).sum() / max((U - 1) * (seeds - 1), 1),
    )


def half_width(squares: Squares, units: int, seeds: int, freedom: int) -> float:
    """Return half of the 95 % interval of the mean of values (units, seeds), NaN if unknown.

    freedom: degrees of freedom of the units.
    """
    of_units, of_seeds, rest = squares
    of_rest = freedom * (seeds - 1)
    if of_rest > 0:
        # units seeds Var(mean) = MS_unit + MS_seed - MS_rest, since both effects contain the rest.
        # This may be smaller than the variance of one effect alone; then it is that one.
        variance = max(of_units + of_seeds - rest, of_units, of_seeds)
        # Degrees of freedom by Satterthwaite (1946), and at least those of the smallest part. The
        # mean square of two or three seeds is often small by chance, so it is raised here.
        of_seeds *= max(1, 4 / seeds)
        largest = max(of_units + of_seeds - rest, of_units, of_seeds)
        parts = of_units**2 / freedom + of_seeds**2 / (seeds - 1) + rest**2 / of_rest
        freedom = max(largest**2 / max(parts, SMALLEST**2), min(freedom, seeds - 1))
    else:
        variance = of_units
    if freedom < 1 or variance < SMALLEST:  # one unit, or equal values, give no interval
        return np.nan
    return t_quantile(freedom) * (variance / (units * seeds)) ** 0.5


def interval(values: np.ndarray, freedom: int | None = None) -> Difference:
    """Return the mean of paired differences (U, seeds) and its 95 % confidence interval over both.

    freedom: degrees of freedom of the units (default: U - 1). With one seed the interval is over
    units alone. It is NaN if the values do not show how certain the mean is.
    """
    U, seeds = values.shape
    mean = float(values.mean())
    half = half_width(mean_squares(values), U, seeds, U - 1 if freedom is None else freedom)
    return mean, mean - half, mean + half


def mass_of_t(freedom: float) -> tuple[np.ndarray, np.ndarray]:
    """Return angles, and the mass of Student's t from 0 to each of them, up to a common factor.

    With t = sqrt(freedom) tan(angle) its density is cos(angle)^(freedom - 1).
    """
    angles = np.linspace(0, np.pi / 2, 200_001)
    middles = (angles[1:] + angles[:-1]) / 2
    return angles[1:], np.cumsum(np.cos(middles) ** (freedom - 1))


def t_quantile(freedom: float) -> float:
    """Return the 97.5 % point of Student's t."""
    angles, mass = mass_of_t(freedom)
    angle = np.interp(0.95 * mass[-1], mass, angles)
    return float(freedom**0.5 * np.tan(angle))


def t_p_value(values: np.ndarray) -> float:
    """Return the two-sided p value of Student's t test that the mean of the values is 0."""
    freedom = values.size - 1
    error = values.std(ddof=1) / values.size**0.5
    angles, mass = mass_of_t(freedom)
    angle = np.arctan(abs(values.mean()) / error / freedom**0.5)
    return float(1 - np.interp(angle, angles, mass / mass[-1]))


# --------------------------------------------------------------------------------------- verdicts


def holm(p_values: Sequence[float]) -> list[bool]:
    """Return for each of several tests whether it decides, with a joint error of at most 0.05.

    If the smallest of n p values is below 0.05 / n, it decides. If the next one is below
    0.05 / (n - 1), it decides, too, and so on until one does not decide. It holds however the tests
    are correlated. Source: Holm 1979, Scandinavian Journal of Statistics 6.
    """
    decided = [False] * len(p_values)
    by_size = sorted(range(len(p_values)), key=lambda test: p_values[test])
    for number, test in enumerate(by_size):
        if p_values[test] >= 0.05 / (len(p_values) - number):
            break
        decided[test] = True
    return decided


def verdict(difference: Difference) -> str:
    """Return what a difference in loss decides about the first of two rows."""
    _, low, high = difference
    if high < 0:
        return "better"
    return "worse" if low > 0 else "undecided"


def what_would_decide(differences: Paired) -> str:
    """Return how many seeds or units would decide a difference, if it stayed as large as it is.

    The parts of its variance are estimated from these values.
    """
    values, freedom = differences.values, differences.freedom
    U, seeds = values.shape
    squares = mean_squares(values)
    mean = abs(values.mean())
    of_unit = max(squares.unit - squares.rest, 0) / seeds
    of_seed = max(squares.seed - squares.rest, 0) / U

    def is_decided(units, seeds):
        expected = Squares(
            unit=seeds * of_unit + squares.rest,
            seed=units * of_seed + squares.rest,
            rest=squares.rest,
        )
        return half_width(expected, units, seeds, freedom + units - U) <= mean

    # If a number decides, nearly all larger ones do, too. So bisection finds about the smallest.
    ways = []
    more_seeds = range(seeds + 1, MOST_SEEDS + 1)
    enough = bisect_left(more_seeds, True, key=lambda number: is_decided(U, number))
    if enough < len(more_seeds):
        ways.append(f"{more_seeds[enough]} seeds")
    more_units = range(U + math.ceil(U / 10), MOST_TIMES * U + 1)
    enough = bisect_left(more_units, True, key=lambda number: is_decided(number, seeds))
    if enough < len(more_units):
        ways.append(f"{more_units[enough] / U:.1f} times the {differences.units}")
    if ways:
        way = " or ".join(ways)
        return f"If it stays as large as it is, a new comparison with about {way} would decide it."
    return f"It is too small for {MOST_SEEDS} seeds or {MOST_TIMES} times the rows to decide."


def verdicts(
    name: str, cells: Sequence[dict], other: str, of_other: Sequence[dict]
) -> tuple[str, dict[str, str]]:
    """Return the differences in loss of two rows on each set, and what to do, as a list.

    Also return which row to use on each set, "" for either. With one seed there are no sets. A LoRA
    is the simplest method, so it is used unless the other one is better.
    """
    lines = [f"Verdict by the loss, {name} minus {other}, in nats per target token:"]
    chosen = {}
    decisions = set()
    for which in SETS:
        if which not in cells[0]:
            continue
        differences = paired(cells, of_other, which, "loss")
        difference = interval(differences.values, differences.freedom)
        decision = "one seed: no verdict"
        if len(cells) > 1:
            decision = verdict(difference)
            decisions.add(decision)
            undecided = "lora" if other == "lora" else ""
            chosen[which] = {"better": name, "worse": other}.get(decision, undecided)
        line = [f"- {which}: {signed(difference)}: **{decision}**.", f"Over {differences.over}."]
        line.append(differences.limits)
        if decision == "undecided" and not np.isnan(difference[1]):
            line.append(what_would_decide(differences))
        lines.append(" ".join(part for part in line if part))
    if not chosen:
        lines.append("\nGive more --seeds: another seed may reverse the difference.")
    elif set(chosen.values()) == {""}:
        lines.append("\nNeither was shown to be better.")
    elif set(chosen.values()) == {name}:
        lines.append(f"\nUse {name}.")
    elif set(chosen.values()) == {other}:
        reason = "" if decisions == {"worse"} else f", since {name} was not shown to be better"
        lines.append(f"\nUse {other}{reason}.")
    else:
        seen, unseen = (use or "either" for use in chosen.values())
        lines.append(
            f"\nUse {seen} for inputs like the seen rows and {unseen} for the unseen ones."
        )
    return "\n".join(lines), chosen


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
        file.write(f"{text}\n".encode())


def signed(difference: Difference, digits: int = 3) -> str:
    """Return a difference with its interval, "+0.100 [-0.200, +0.400]"."""
    mean, low, high = (f"{value:+.{digits}f}" for value in difference)
    if np.isnan(difference[1]):
        return f"{mean} (no interval)"
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


def markdown(rows: dict[str, list[dict[str, Any]]], tuning: dict[str, dict], metric: str) -> str:
    """Return all tables of a comparison: tuning, scores, differences, and what the routers do.

    rows: the cells of each row, one for each seed. Differences are those of the first row from
    the others. The frozen base has one cell, which is compared with each seed of the first row.
    metric: how answers are scored.
    """
    reference, first = next(iter(rows.items()))
    present = [which for which in SETS if which in first[0]]
    columns = list(itertools.product(present, TABLE))
    scores = []
    differences = []
    routers = []
    intervals = 0
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
        for which, measure in columns:
            digits = 3 if measure == "loss" else 2  # nats, per cent
            scores[-1].append(mean_and_sd(mean_scores(cells, which, measure), digits))
            found = paired(first, cells, which, measure)
            difference = interval(found.values, found.freedom)
            differences[-1].append(signed(difference, digits))
            if name != reference and not np.isnan(difference[1]):
                intervals += 1

        numbers = [name]
        for key in ROUTER:
            values = [(cell.get("router") or {}).get(key) for cell in cells]
            # A w that is no distribution has no entropy.
            values = [value for value in values if value is not None]
            numbers.append(f"{np.mean(values):.3f}" if values else "-")
        if set(numbers[1:]) != {"-"}:
            routers.append(numbers)

    titles = [f"{which} {TABLE[measure]}" for which, measure in columns]
    parts = [
        tuning_table(tuning),
        table(["row", "skills + routing", "dev loss", *titles], scores),
        table([f"{reference} - row", *titles], differences[1:]),
        table(["row, on dev", *ROUTER.values()], routers),
    ]
    over = []
    for which in present:
        over.append(f"{paired(first, first, which, 'loss').over} ({which})")
    notes = [
        f"Loss: nats per target token. ROUGE-L and exact match: per cent, by {metric}.",
        "Scores are means within a task, then over tasks; where rows name no task, each different "
        "prompt counts as one. The dev loss is the mean over all tokens.",
        f"Differences have 95 % intervals over {' and '.join(over)}; of the {intervals} here about "
        f"{intervals / 20:.1f} would exclude zero if nothing differed.",
    ]
    if len(first) > 1:
        notes.append("In brackets the sd over seeds.")
    parts.append(" ".join(notes))
    if "c-poly" in rows:
        parts.append(
            "c-poly* stands at equal S R, not at equal total: its skills grow with the tasks."
        )
    return "\n\n".join(part for part in parts if part)


def mean_and_sd(values: Sequence[float], digits: int) -> str:
    """Return "mean (sd)", or the value alone if there is one."""
    text = f"{np.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ({np.std(values, ddof=1):.{digits}f})"
    return text
