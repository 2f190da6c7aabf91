"""The study of why OrchMoE is better: who knows the task, what is mixed, a LoRA, and new tasks.

experiments/results/why/plan.md has the plan, which was written before the first trial. This program
is the plan: it takes no flags for what the plan says. It needs a CPU that multiplies bfloat16
natively. Run its stages in this order, in a clone whose files do not change:

    OMP_NUM_THREADS=1 python -m experiments.why --data natural-instructions --model smollm2 \\
        --device cpu --jobs 2 --stage tune

    tune      choose the values of the rows that have a search of their own
    cells     make the cells of all rows, draw by draw
    tables    write the tables, when all cells are there

No stage but `tables` prints a loss of a draw. An interrupted stage continues when it is run again.
Test: pytest tests/experiments/test_why.py
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

import checkpoint
from experiments.compare.routers import Oracle
from experiments.compare.search import Search, loss_of_trial
from experiments.compare.sizes import rank_for_total, total
from experiments.compare.study import (
    Cell,
    Study,
    Variant,
    all_flags_but,
    changed,
    file_name,
    kind_of_cpu,
    pick_device,
    read_study,
    run_cells,
)
from experiments.compare.tables import holm, interval, publish, signed, t_p_value, table
from orchmoe import OrchMoEConfig
from support import program
from support.program import UserError
from tasks import read_splits

RESULTS = program.ROOT / "experiments/results/why"
CLAIM_VALUES = program.ROOT / "experiments/results/claim/values.json"
TUNING_TASKS = program.ROOT / "experiments/results/decision/tasks.json"  # its list "train"
DRAWS = program.ROOT / "experiments/results/replication/draws.json"
FIRST_SEED = 300  # draw i has the seed 300 + i

ROWS = {
    "orchmoe": Variant(),
    "frozen router": Variant({"lr_router": 0.0}, like="orchmoe"),
    "true task": Variant({"method": "Oracle"}, like="orchmoe"),
    "orchmoe, factors": Variant({"method": "orchmoe-factors"}),
    "true task, factors": Variant({"method": "OracleOfFactors"}, like="orchmoe, factors"),
    "mhr": Variant({"method": "QuietMHR"}),
    "lora": Variant({"method": "lora"}),
}
# MoE-LoRA has no cells. It is the largest row with rank 1, so it sets the size of all others.
EQUAL = {name: row for name, row in ROWS.items() if not row.like}
EQUAL["moe-lora"] = Variant({"method": "moe-lora"})

# The searches, and the points at which each may start. The best of these is its start.
STARTS = {
    "orchmoe, factors": [
        {"lr_skills": 1e-2, "alpha": 2.0, "lr_router": 1e-3, "lr_allocation": 1e-1},
    ],
    "mhr": [
        {"lr_skills": 1e-2, "alpha": 2.0, "lr_allocation": 1.0},
        {"lr_skills": 1e-2, "alpha": 4.0, "lr_allocation": 1.0},
    ],
    "lora": [
        {"lr_skills": 5.6e-3, "alpha": 8.0},
        {"lr_skills": 1e-2, "alpha": 4.0},
    ],
}
TRIALS = 12  # trials of each search from its start, with seed 0
MORE_TRIALS = 4  # further trials of a search, if a best value is on an edge of what was tried
BEST_POINTS = 2  # how many best points of each search are run with the further seeds
FURTHER_SEEDS = (1001, 1002)

# The questions. Each difference is between two rows, in the seen loss.
LORA = ("orchmoe", "lora")
MHR = ("orchmoe", "mhr")
MIXING = [("orchmoe", "orchmoe, factors"), ("true task", "true task, factors")]
SECONDARY = [("orchmoe", "frozen router"), ("orchmoe", "true task"), ("mhr", "lora")]
UNSEEN = [LORA, MHR, ("orchmoe", "true task")]
EQUIVALENT = 0.02  # nats; an interval within it on both sides is called equivalent


class Outcome(NamedTuple):
    """A score of a cell: its name there, and how many digits are shown."""

    score: str
    digits: int


OUTCOMES = {
    "loss": Outcome("loss", 4),  # nats per target token
    "ROUGE-L": Outcome("rougeL", 2),  # per cent
    "exact match": Outcome("exact_match", 2),  # per cent
}

# The flags that remain. All other settings are those of the plan.
CHOICES = ("data", "model", "out", "results", "jobs", "device")
DEFAULTS = {
    "device": "cpu",
    "out": "results/why",
    "results": str(RESULTS),
    "dtype": "bfloat16",
    "steps": 180,
    "batch_size": 8,
    "warmup": 20,
    "eval_every": 180,
    "eval_instances": 24,  # train.py always evaluates on dev; a search does it on all of dev
    "train_instances": 60,
    "num_pos": 0,
    "max_source_length": 200,
    "max_target_length": 64,
    "abstract_tasks": 24,
    "skills": 4,
    "rank": 1,
}


@dataclass(frozen=True)
class WhyConfig:
    """Study of the reasons: which part of the plan is carried out."""

    stage: Literal["tune", "cells", "tables"] = "tables"  # what to make


# ------------------------------------------------------------------------------------------ data


def write_subset(study: Study, name: str, tasks: Sequence[str], new_tasks: Sequence[str]) -> str:
    """Write a data folder with only these training tasks and test tasks. Return its path."""
    folder = Path(study.config.out, name)
    lists = folder / "splits/default"
    lists.mkdir(parents=True, exist_ok=True)
    (lists / "train_tasks.txt").write_text("".join(f"{task}\n" for task in tasks))
    (lists / "test_tasks.txt").write_text("".join(f"{task}\n" for task in new_tasks))
    link = folder / "tasks"
    link.unlink(missing_ok=True)  # the data may have moved
    link.symlink_to(Path(study.settings.data, "tasks").resolve())
    return str(folder)


def draws() -> dict[int, list[str]]:
    """Return the training tasks of each draw, by the seed that the draw has here."""
    found = {}
    for number, tasks in enumerate(program.read_json(DRAWS).values()):
        found[FIRST_SEED + number] = tasks
    return found


# ---------------------------------------------------------------------------------------- tuning


class PlannedSearch:
    """The search of a row, as the plan has it. Iterating yields the cells of its trials.

    The starts are tried first. TRIALS trials follow from the best of them, and MORE_TRIALS more if
    its best value is on an edge of what was tried. Then each neighbour of the best point along one
    axis is tried. If one of them is better, it becomes the best point, and its own neighbours are
    not tried. At the end the BEST_POINTS best points are run with FURTHER_SEEDS.
    """

    def __init__(
        self, starts: Sequence[dict[str, float]], cell_of: Callable[[dict[str, float]], Cell]
    ):
        """starts: values of each axis. cell_of: makes the cell of a trial from such values."""
        self.starts = starts
        self.cell_of = cell_of
        self.start_losses: list[float] = []
        self.search: Search | None = None
        self.mean_losses: dict[tuple, float] = {}  # of the best points, over all seeds

    def __iter__(self) -> Iterator[Cell]:
        self.start_losses = []
        for start in self.starts:
            cell = self.cell_of(start)
            yield cell
            self.start_losses.append(loss_of_trial(cell))
        start = self.starts[self.start_losses.index(min(self.start_losses))]

        search = Search(start, TRIALS, self.cell_of)
        self.search = search
        yield from search
        if search.edges():
            search.trials += MORE_TRIALS
            yield from search  # the finished trials are not made again
        for point in neighbours(search.best()):
            if point not in search.losses:
                cell = self.cell_of(search.values(point))
                yield cell
                search.losses[point] = loss_of_trial(cell)

        self.mean_losses = {}
        for point in sorted(search.losses, key=search.losses.get)[:BEST_POINTS]:
            losses = [search.losses[point]]
            for seed in FURTHER_SEEDS:
                cell = self.cell_of(search.values(point) | {"seed": seed})
                yield cell
                losses.append(loss_of_trial(cell))
            self.mean_losses[point] = fmean(losses)

    def report(self) -> dict[str, Any]:
        """Return what was tried and chosen. Raise UserError if all best points diverged."""
        chosen = min(self.mean_losses, key=self.mean_losses.get)
        if self.mean_losses[chosen] == math.inf:
            raise UserError("the best points diverged; there are no values to choose")
        starts = []
        for start, loss in zip(self.starts, self.start_losses, strict=True):
            starts.append({**start, "dev_loss": loss})
        of_seeds = []
        for point, loss in self.mean_losses.items():
            of_seeds.append({**self.search.values(point), "dev_loss": loss})
        return {
            "starts": starts,
            **self.search.report(),
            "all_seeds": of_seeds,
            "chosen": self.search.values(chosen),
        }


def neighbours(point: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the points that are one step away along one axis."""
    found = []
    for axis in range(len(point)):
        for step in (-1, 1):
            moved = list(point)
            moved[axis] += step
            found.append(tuple(moved))
    return found


def tune(study: Study) -> None:
    """Make the trials of all searches, and write what they chose into values.json.

    A search that was begun on another kind of CPU is left out, and a line says so.
    """
    path = study.results / "values.json"
    values = program.read_json(path) if path.exists() else {}
    values["orchmoe"] = program.read_json(CLAIM_VALUES)["orchmoe"]
    tasks = program.read_json(TUNING_TASKS)["train"]
    folder = write_subset(study, "tasks-tuning", tasks, [])
    settings = changed(study.settings, {"data": folder})
    tuning = Study(settings, study.device, study.config, study.equal)
    searches = {}
    for name, starts in STARTS.items():
        cpus = cpus_of(study.results.glob(f"tune/{file_name(name)}_[0-9]*.json"))
        if name in values:
            continue
        if cpus - {kind_of_cpu()}:
            program.print_line(f"{name} is left out: its search was begun on {in_words(cpus)}")
            continue
        make_trial = functools.partial(tuning.trial, name, ROWS[name], scores="dev tasks")
        searches[name] = PlannedSearch(starts, make_trial)
    run_cells(list(searches.values()), study.config.jobs, study.device)
    for name, search in searches.items():
        values[name] = search.report()
    program.write_json(path, values)


def read_values(study: Study) -> dict[str, dict[str, float]]:
    """Return the chosen values of each row. Raise UserError if a search is not finished."""
    path = study.results / "values.json"
    values = program.read_json(path) if path.exists() else {}
    missing = STARTS.keys() - values.keys()
    if missing:
        raise UserError(f"{path}: lacks {min(missing)}; run --stage tune first")
    return {name: report["chosen"] for name, report in values.items()}


def cpus_of(paths: Iterator[Path]) -> set[str]:
    """Return the kinds of CPU that made these cells."""
    return {program.read_json(path)["settings"]["cpu"] for path in paths}


def in_words(names: set[str]) -> str:
    return " and ".join(sorted(names))


# ----------------------------------------------------------------------------------------- cells


def read_cells(results: Path) -> dict[str, dict[str, Any]]:
    """Return the finished cells by name, such as "orchmoe-s300"."""
    cells = {}
    path = results / "cells.jsonl"
    if path.exists():
        for _, _, cell in program.read_jsonl(path):
            cells[cell.pop("name")] = cell
    for path in sorted((results / "cells").glob("*.json")):
        cells[path.stem] = program.read_json(path)
    return cells


def cell_name(row: str, seed: int) -> str:
    return f"{file_name(row)}-s{seed}"


def extra_rank_of_true_task(study: Study) -> int:
    """Return the extra rank of the rows that know the task. They have no router.

    So `Study.settings_of`, which knows only methods, would give them too few ranks.
    """
    base = checkpoint.on_meta(checkpoint.read_config(study.settings.model))
    config = study.settings.part(OrchMoEConfig)
    options = {"num_tasks": config.abstract_tasks}
    target = total("moe-lora", base, config, **options)
    return rank_for_total(target, Oracle, base, config, **options)


def cells_of_draw(study: Study, seed: int) -> list[Cell]:
    """Return the cells of a draw, one for each row."""
    new_tasks = read_splits(study.settings.data)["test"]
    folder = write_subset(study, f"tasks-{seed}", draws()[seed], new_tasks)
    extra_rank = extra_rank_of_true_task(study)
    rows = {}
    for name, row in ROWS.items():
        if name.startswith("true task"):
            row = row._replace(settings={**row.settings, "extra_rank": extra_rank})
        rows[name] = row
    return study.cells("cells", rows, {"data": folder}, [seed], "replicate")


def cells_to_make(study: Study) -> list[Cell]:
    """Return the cells that are missing, draw by draw.

    All cells of a draw must be made on one kind of CPU. A draw that was begun on another kind is
    left out, and a line says so.
    """
    finished = read_cells(study.results)
    missing = []
    for seed in draws():
        to_make = []
        for cell in cells_of_draw(study, seed):
            if cell_name(cell.name, seed) not in finished:
                to_make.append(cell)
        begun = [cell for name, cell in finished.items() if name.endswith(f"-s{seed}")]
        other_cpus = {cell["settings"]["cpu"] for cell in begun} - {kind_of_cpu()}
        if to_make and other_cpus:
            program.print_line(f"draw {seed} is left out: it was begun on {in_words(other_cpus)}")
        else:
            missing += to_make
    return missing


def require_repeatable(study: Study) -> None:
    """Make the first cell twice. Raise UserError unless the scores agree to the last digit."""
    original = cells_of_draw(study, FIRST_SEED)[0]
    repetition = original._replace(
        path=study.results / "repeated" / original.path.name,
        folder=Path(study.config.out, "repeated", original.path.stem),
    )
    study.run([cell for cell in (original, repetition) if not cell.path.exists()])
    require_same_scores(original.result(), repetition.path)


def require_same_scores(cell: dict[str, Any], repetition: Path) -> None:
    """Raise UserError unless the repetition of the first cell has the same scores."""
    other = program.read_json(repetition)
    for part in ("dev_loss", "seen", "unseen"):
        if cell.get(part) != other.get(part):  # a cell that diverged has no scores
            raise UserError(f"{repetition}: its {part} is not that of the first cell")


# ---------------------------------------------------------------------------------------- tables


def require_fitting(cells: dict[str, dict], trials: dict[str, dict]) -> None:
    """Raise UserError if two cells cannot be subtracted, or two trials cannot be compared.

    All must be of one clean commit, one torch and one base. Those of a draw must also be of one
    kind of CPU and of the same tasks. So must be the trials of each search.
    """
    groups = {name: f"draw {cell['settings']['seed']}" for name, cell in cells.items()}
    for name, trial in trials.items():
        groups[name] = f"the trials of {trial['settings']['row']}"

    expected = {}
    for name, cell in (trials | cells).items():
        tree = cell["tree"]
        if not tree or tree.endswith("-dirty"):
            raise UserError(f"{name}: made by the tree {tree!r}, which is no commit")
        settings = cell["settings"]
        facts = {fact: cell[fact] for fact in ("tree", "torch", "threads")}
        facts |= {fact: settings[fact] for fact in ("base", "tokenizer")}
        for fact in ("cpu", "computed", "train_tasks", "test_tasks"):
            facts[f"{fact} of {groups[name]}"] = settings.get(fact)
        for fact, value in facts.items():
            if fact not in expected:
                expected[fact] = value
            elif expected[fact] != value:
                raise UserError(f"{name}: {fact} is {value}, and {expected[fact]} in others")


class Scores:
    """The scores of all cells: of each row, draw by draw."""

    def __init__(self, cells: dict[str, dict]):
        self.cells = {}
        for row in ROWS:
            self.cells[row] = [cells[cell_name(row, seed)] for seed in draws()]

    def of_tasks(self, row: str, which: str, score: str) -> np.ndarray:
        """Return the score of each task in each draw (draws, tasks)."""
        found = []
        for cell in self.cells[row]:
            tasks = cell[which]["tasks"]
            found.append([tasks[task][score] for task in sorted(tasks)])
        return np.array(found)

    def difference(self, pair: tuple[str, str], which: str, score: str = "loss") -> np.ndarray:
        """Return the first row minus the second one, the mean over tasks of each draw (draws,)."""
        one, other = (self.of_tasks(row, which, score) for row in pair)
        return one.mean(axis=1) - other.mean(axis=1)


HEAD = ["difference", "set", "score", "mean and 95 % interval", "sd", "below zero"]


def difference_row(name: str, which: str, outcome: str, values: np.ndarray) -> list[Any]:
    """Return a line about differences, one for each draw or task, see HEAD."""
    digits = OUTCOMES[outcome].digits
    sd = f"{values.std(ddof=1):.{digits}f}"
    below = f"{(values < 0).sum()} of {len(values)}"
    return [name, which, outcome, signed(interval(values[:, None]), digits), sd, below]


def words_of(pair: tuple[str, str]) -> str:
    return " minus ".join(pair)


def in_digits(p_value: float) -> str:
    return "<0.0001" if p_value < 1e-4 else f"{p_value:.4f}"


def primary_table(scores: Scores) -> str:
    """Return the three primary differences with their verdicts, and below them their parts."""
    parts = {words_of(pair): scores.difference(pair, "seen") for pair in MIXING}
    first, second = parts.values()
    primary = {words_of(pair): scores.difference(pair, "seen") for pair in (LORA, MHR)}
    primary["outputs minus factors"] = (first + second) / 2
    p_values = [t_p_value(values) for values in primary.values()]

    lines = []
    decisions = holm(p_values)
    for (name, values), p, is_decided in zip(primary.items(), p_values, decisions, strict=True):
        verdict = "undecided"
        if is_decided:
            verdict = "better" if values.mean() < 0 else "worse"
        _, low, high = interval(values[:, None])
        is_equivalent = -EQUIVALENT < low and high < EQUIVALENT
        line = difference_row(name, "seen", "loss", values)
        lines.append([*line, in_digits(p), verdict, "yes" if is_equivalent else "no"])
    of_parts = [difference_row(name, "seen", "loss", values) for name, values in parts.items()]
    of_parts.append(
        difference_row("the first of these minus the second", "seen", "loss", first - second)
    )
    verdicts = table([*HEAD, "p", "verdict", "equivalent"], lines)
    return f"{verdicts}\n\nThe parts of outputs minus factors:\n\n{table(HEAD, of_parts)}"


def secondary_table(scores: Scores) -> str:
    """Return the secondary differences of the loss on seen and on new tasks."""
    lines = []
    for pair in SECONDARY:
        values = scores.difference(pair, "seen")
        lines.append(difference_row(words_of(pair), "seen", "loss", values))
    for pair in UNSEEN:
        lines += new_task_rows(scores, pair, "loss")
    return table(HEAD, lines)


def new_task_rows(scores: Scores, pair: tuple[str, str], outcome: str) -> list[list[Any]]:
    """Return two lines about a difference on new tasks: over draws, and over tasks.

    All draws have the same new tasks.
    """
    one, other = (scores.of_tasks(row, "unseen", OUTCOMES[outcome].score) for row in pair)
    differences = one - other  # (draws,tasks)
    return [
        difference_row(words_of(pair), "new tasks, over draws", outcome, differences.mean(axis=1)),
        difference_row(words_of(pair), "new tasks, over tasks", outcome, differences.mean(axis=0)),
    ]


def answers_table(scores: Scores) -> str:
    """Return OrchMoE minus each other row in the scores of its answers."""
    lines = []
    for other in list(ROWS)[1:]:
        pair = ("orchmoe", other)
        for outcome in ("ROUGE-L", "exact match"):
            values = scores.difference(pair, "seen", OUTCOMES[outcome].score)
            lines.append(difference_row(words_of(pair), "seen", outcome, values))
            lines += new_task_rows(scores, pair, outcome)
    return table(HEAD, lines)


def sizes_table(scores: Scores) -> str:
    """Return how many weights each row has, and its mean scores over draws and tasks."""
    lines = []
    for row, cells in scores.cells.items():
        sizes = cells[0]["parameters"]
        numbers = (sizes["skills"], sizes["routing"], sizes["skills"] + sizes["routing"])
        line = [row, *(f"{number:,}" for number in numbers)]
        for which in ("seen", "unseen"):
            for outcome in OUTCOMES.values():
                mean = scores.of_tasks(row, which, outcome.score).mean()
                line.append(f"{mean:.{outcome.digits}f}")
        lines.append(line)
    names = [f"{which} {outcome}" for which in ("seen", "new") for outcome in OUTCOMES]
    return table(["row", "skills", "routing", "in all", *names], lines)


def losses_table(scores: Scores) -> str:
    """Return the seen loss of each draw, and the kind of CPU that made it."""
    lines = []
    for i, seed in enumerate(draws()):
        cpu = scores.cells["orchmoe"][i]["settings"]["cpu"]
        losses = [scores.of_tasks(row, "seen", "loss")[i].mean() for row in ROWS]
        lines.append([seed, cpu, *(f"{loss:.4f}" for loss in losses)])
    return table(["draw", "CPU", *(f"{row}, loss" for row in ROWS)], lines)


def values_table(reports: dict[str, dict]) -> str:
    """Return what was tried and chosen for each search."""

    def words(point):
        loss = point.get("dev_loss")
        values = [f"{axis} {value:g}" for axis, value in point.items() if axis != "dev_loss"]
        text = ", ".join(values)
        return f"{text}: {'diverged' if loss is None else f'{loss:.4f}'}"

    lines = []
    for name, report in reports.items():
        best = words({**report["best"], "dev_loss": report["dev_loss"]})
        of_seeds = "; ".join(words(point) for point in report["all_seeds"])
        chosen = ", ".join(f"{axis} {value:g}" for axis, value in report["chosen"].items())
        lines.append([name, len(report["trials"]), best, of_seeds, chosen])
    return table(["row", "trials", "best with seed 0", "means of all seeds", "chosen"], lines)


def text_of_tables(results: Path, cells: dict[str, dict]) -> str:
    """Return the tables in Markdown: those of the searches, and of the cells if all are there."""
    parts = []
    path = results / "values.json"
    if path.exists():
        parts += ["## Tuning", values_table(program.read_json(path))]
    parts.append("## Seven rows on sixteen known draws")
    expected = [cell_name(row, seed) for row in ROWS for seed in draws()]
    missing = len([name for name in expected if name not in cells])
    if missing:
        return "\n\n".join([*parts, f"Not complete: cells that are missing: {missing}."])
    diverged = [name for name in expected if "diverged" in cells[name]]
    if diverged:
        return "\n\n".join([*parts, f"No verdict, since cells diverged: {', '.join(diverged)}."])
    scores = Scores(cells)
    parts += [primary_table(scores), "### Secondary, not corrected", secondary_table(scores)]
    parts += ["### Answers, not corrected", answers_table(scores)]
    parts += ["### Rows", sizes_table(scores), losses_table(scores)]
    return "\n\n".join(parts)


def join_cells(results: Path, cells: dict[str, dict]) -> None:
    """Move all cells into cells.jsonl, if none is missing."""
    names = [cell_name(row, seed) for row in ROWS for seed in draws()]
    if set(names) - cells.keys():
        return
    with program.atomic_write(results / "cells.jsonl") as file:
        for name in names:
            file.write(program.to_json({"name": name, **cells[name]}))
    for name in names:
        (results / f"cells/{name}.json").unlink(missing_ok=True)


def write_tables(results: Path) -> None:
    """Write tables.md, and join the cells if all are there."""
    cells = read_cells(results)
    trials = {}
    for path in sorted(results.glob("tune/*.json")):
        trials[f"tune/{path.stem}"] = program.read_json(path)
    require_fitting(cells, trials)
    first = cell_name("orchmoe", FIRST_SEED)
    if first in cells:
        require_same_scores(cells[first], results / "repeated" / f"{first}.json")
    publish(text_of_tables(results, cells), results / "tables.md")
    join_cells(results, cells)


def require_machine() -> None:
    """Raise UserError unless this process computes as the plan says."""
    if not torch.cpu._is_avx512_bf16_supported():
        raise UserError("this CPU does not multiply bfloat16 natively; use one that does")
    if torch.get_num_threads() != 1:
        raise UserError("set OMP_NUM_THREADS=1: the plan has one thread for each cell")


def main() -> None:
    flags, study_config, settings = read_study(
        __doc__, WhyConfig, defaults=DEFAULTS, fixed=all_flags_but(CHOICES)
    )
    stage = program.from_flags(WhyConfig, flags).stage
    results = Path(study_config.results)
    if stage == "tables":
        write_tables(results)
        return

    for name in ("data", "model"):
        if name not in flags:
            raise UserError(f"--stage {stage}: give {program.flag(name)}")
    require_machine()
    study = Study(settings, pick_device(study_config, settings), study_config, EQUAL)
    if stage == "tune":
        tune(study)
        return

    study.best = read_values(study)
    cells = cells_to_make(study)
    if cells:
        require_repeatable(study)
    study.run([cell for cell in cells if not cell.path.exists()])


if __name__ == "__main__":
    program.run_program(main)
