"""The study of the paper's claim: OrchMoE against multi-adapter methods of equal size on real SNI.

experiments/results/claim/plan.md has the plan, which was written before the first trial. This
program is the plan: it takes no flags for what the plan says. It needs a CPU that multiplies
bfloat16 natively. Run its stages in this order, in a clone whose files do not change:

    OMP_NUM_THREADS=1 python -m experiments.claim --data natural-instructions --model smollm2 \\
        --device cpu --jobs 2 --stage tune

    tune      choose the values of each method
    first     make the cells with 60 examples of each task
    second    make those with 15
    further   tune and make the further rows
    tables    write the tables of what is complete

No stage but `tables` prints a loss of a draw, and an incomplete family of cells has no table. An
interrupted stage continues when it is run again. Test: pytest tests/experiments/test_claim.py
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from baselines import load_method, settings_of_method
from experiments.compare.search import Search, loss_of_trial
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
from experiments.compare.tables import (
    hochberg,
    interval,
    publish,
    signed,
    t_p_value,
    table,
)
from support import program
from support.program import UserError

RESULTS = program.ROOT / "experiments/results/claim"
TUNING_TASKS = program.ROOT / "experiments/results/decision/tasks.json"  # its list "train"
DRAWS = program.ROOT / "experiments/results/replication/draws.json"
FIRST_SEED = 200  # draw i has the seed 200 + i

HYDRA_LORA = f"{program.ROOT / 'examples/hydra_lora.py'}:HydraLoRA"
COMPARED = {
    "orchmoe": Variant(),
    "moe-lora": Variant({"method": "moe-lora"}),
    "poly": Variant({"method": "poly"}),
    "mhr": Variant({"method": "mhr"}),
}
FURTHER = {
    "lora": Variant({"method": "lora"}),
    "HydraLoRA": Variant({"method": "HydraLoRA"}),
    "poly of clusters": Variant({"method": "poly"}, replaced_router="cluster"),
}
FROZEN = {"frozen router": Variant({"lr_router": 0.0}, like="orchmoe")}
ROWS = {"first": COMPARED, "second": COMPARED, "further": FURTHER | FROZEN}  # of each stage
TITLES = {"first": "First family", "second": "Second family", "further": "Further rows"}
EXAMPLES = {"first": 60, "second": 15, "further": 60}  # training instances of each task

# The search of every method starts here, on the axes that it has.
START = {
    "lr_skills": 1e-2,
    "alpha": 1.0,
    "lr_router": 1e-3,
    "lr_token_router": 1e-2,
    "lr_allocation": 1e-1,
}
TRIALS = 12  # trials of each method, with seed 0
MORE_TRIALS = 4  # further trials of each method, if a best value is on an edge of what was tried
BEST_POINTS = 2  # how many best points of each method are run with the further seeds
FURTHER_SEEDS = (1001, 1002)


class Outcome(NamedTuple):
    """A score of a cell: its part of the cell, its name there, and how many digits are shown."""

    part: str
    score: str
    digits: int


OUTCOMES = {
    "loss": Outcome("seen", "loss", 4),  # nats per target token
    "ROUGE-L": Outcome("answers", "rougeL", 2),  # per cent
    "exact match": Outcome("answers", "exact_match", 2),  # per cent
}

# The flags that remain. All other settings are those of the plan.
CHOICES = ("data", "model", "out", "results", "jobs", "device")
DEFAULTS = {
    "device": "cpu",
    "out": "results/claim",
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
class ClaimConfig:
    """Study of the claim: which part of the plan is carried out."""

    stage: Literal["tune", "first", "second", "further", "tables"] = "tables"  # what to make


# ------------------------------------------------------------------------------------------ data


def write_subset(study: Study, name: str, tasks: Sequence[str]) -> str:
    """Write a data folder with only these training tasks, and no test tasks. Return its path."""
    folder = Path(study.config.out, name)
    lists = folder / "splits/default"
    lists.mkdir(parents=True, exist_ok=True)
    (lists / "train_tasks.txt").write_text("".join(f"{task}\n" for task in tasks))
    (lists / "test_tasks.txt").write_text("")
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


def tune(study: Study, variants: dict[str, Variant], trials: int, more: int) -> dict[str, dict]:
    """Make the trials. Return what was tried and chosen for each method.

    trials: number of trials of each search. more: number of further ones, if any best value is on
    an edge of what was tried.
    """
    tasks = program.read_json(TUNING_TASKS)["train"]
    folder = write_subset(study, "tasks-tuning", tasks)
    settings = changed(study.settings, {"data": folder})
    tuning = Study(settings, study.device, study.config, study.equal)
    searches = {}
    for name, variant in variants.items():
        method = changed(settings, variant.settings).method
        read = settings_of_method(method)
        start = {axis: value for axis, value in START.items() if axis in read}
        make_trial = functools.partial(tuning.trial, name, variant, scores="dev tasks")
        searches[name] = Search(start, trials, make_trial)
    queues = list(searches.values())
    run_cells(queues, study.config.jobs, study.device)
    if any(search.edges() for search in queues):
        for search in queues:
            search.trials += more
        run_cells(queues, study.config.jobs, study.device)  # trials that were made stay

    # The best points with further seeds.
    repetitions = {}  # of each method: {point: its cells with the further seeds}
    to_make = []
    for name, search in searches.items():
        repetitions[name] = {}
        for point in sorted(search.losses, key=search.losses.get)[:BEST_POINTS]:
            values = search.values(point)
            cells = [search.cell_of(values | {"seed": seed}) for seed in FURTHER_SEEDS]
            repetitions[name][point] = cells
            to_make += cells
    tuning.run(to_make)

    reports = {}
    for name, search in searches.items():
        mean_losses = {}
        for point, cells in repetitions[name].items():
            further = [loss_of_trial(cell) for cell in cells]
            mean_losses[point] = fmean([search.losses[point], *further])
        chosen = min(mean_losses, key=mean_losses.get)
        if mean_losses[chosen] == math.inf:
            raise UserError(f"{name}: the best points diverged; there are no values to choose")
        of_seeds = []
        for point, loss in mean_losses.items():
            of_seeds.append({**search.values(point), "dev_loss": loss})
        report = search.report()
        report["all_seeds"] = of_seeds
        report["chosen"] = search.values(chosen)
        reports[name] = report
    return reports


def tune_once(study: Study, variants: dict[str, Variant], trials: int, more: int) -> None:
    """Tune these rows unless values.json has them, and write what was chosen there."""
    path = study.results / "values.json"
    values = program.read_json(path) if path.exists() else {}
    if variants.keys() - values.keys():
        values |= tune(study, variants, trials, more)
        program.write_json(path, values)


def read_values(study: Study) -> dict[str, dict]:
    """Return what was tried and chosen for each method."""
    path = study.results / "values.json"
    if not path.exists():
        raise UserError(f"{path}: not there; run --stage tune first")
    return program.read_json(path)


# ----------------------------------------------------------------------------------------- cells


def read_cells(results: Path) -> dict[str, dict[str, Any]]:
    """Return the finished cells by name, such as "first/orchmoe-s200"."""
    cells = {}
    path = results / "cells.jsonl"
    if path.exists():
        for _, _, cell in program.read_jsonl(path):
            cells[cell.pop("name")] = cell
    for stage in ROWS:
        for path in sorted((results / stage).glob("*.json")):
            cells[f"{stage}/{path.stem}"] = program.read_json(path)
    return cells


def cell_name(stage: str, row: str, seed: int) -> str:
    return f"{stage}/{file_name(row)}-s{seed}"


def cells_of_draw(study: Study, stage: str, seed: int) -> list[Cell]:
    """Return all cells of a draw in a stage."""
    folder = write_subset(study, f"tasks-{seed}", draws()[seed])
    values = {"data": folder, "train_instances": EXAMPLES[stage]}
    return study.cells(stage, ROWS[stage], values, [seed], "replicate")


def cells_to_make(study: Study, stage: str) -> list[Cell]:
    """Return the cells of a stage that are missing, draw by draw.

    All cells of a draw must be made on one kind of CPU. A draw that was begun on another kind is
    left out, and a line says so.
    """
    finished = read_cells(study.results)
    missing = []
    for seed in draws():
        to_make = []
        for cell in cells_of_draw(study, stage, seed):
            if cell_name(stage, cell.name, seed) not in finished:
                to_make.append(cell)
        begun = [cell for name, cell in finished.items() if name.endswith(f"-s{seed}")]
        other_cpus = {cell["settings"]["cpu"] for cell in begun} - {kind_of_cpu()}
        if to_make and other_cpus:
            names = " and ".join(sorted(other_cpus))
            program.print_line(f"draw {seed} is left out: it was begun on {names}")
        else:
            missing += to_make
    return missing


def require_repeatable(study: Study) -> None:
    """Make the first cell twice. Raise UserError unless the scores agree to the last digit."""
    original = cells_of_draw(study, "first", FIRST_SEED)[0]
    repetition = original._replace(
        path=study.results / "repeated" / original.path.name,
        folder=Path(study.config.out, "repeated", original.path.stem),
    )
    study.run([cell for cell in (original, repetition) if not cell.path.exists()])
    require_same_scores(original.result(), repetition.path)


def require_same_scores(cell: dict[str, Any], repetition: Path) -> None:
    """Raise UserError unless the repetition of the first cell has the same scores."""
    other = program.read_json(repetition)
    for part in ("dev_loss", "seen", "answers"):
        if cell.get(part) != other.get(part):  # a cell that diverged has no scores
            raise UserError(f"{repetition}: its {part} is not that of the first cell")


# ---------------------------------------------------------------------------------------- tables


def rows_of(cells: dict[str, dict], stage: str) -> tuple[dict[str, list[dict]], int]:
    """Return the cells of each row of a stage, draw by draw, and how many are missing."""
    rows = {}
    missing = 0
    for row in ROWS[stage]:
        names = [cell_name(stage, row, seed) for seed in draws()]
        rows[row] = [cells[name] for name in names if name in cells]
        missing += len(names) - len(rows[row])
    return rows, missing


def require_fitting(cells: dict[str, dict], trials: dict[str, dict]) -> None:
    """Raise UserError if two cells cannot be subtracted, or two trials cannot be compared.

    All must be of one clean commit, one torch and one base. Those of a draw must also be of one
    kind of CPU and of the same tasks. So must be the trials of the families, and those of each
    further row.
    """
    groups = {name: f"draw {cell['settings']['seed']}" for name, cell in cells.items()}
    for name, trial in trials.items():
        row = trial["settings"]["row"]
        groups[name] = "the families' trials" if row in COMPARED else f"the trials of {row}"

    expected = {}
    for name, cell in (trials | cells).items():
        tree = cell["tree"]
        if not tree or tree.endswith("-dirty"):
            raise UserError(f"{name}: made by the tree {tree!r}, which is no commit")
        settings = cell["settings"]
        facts = {fact: cell[fact] for fact in ("tree", "torch", "threads")}
        facts |= {fact: settings[fact] for fact in ("base", "tokenizer")}
        for fact in ("cpu", "computed", "train_tasks"):
            facts[f"{fact} of {groups[name]}"] = settings[fact]
        for fact, value in facts.items():
            if fact not in expected:
                expected[fact] = value
            elif expected[fact] != value:
                raise UserError(f"{name}: {fact} is {value}, and {expected[fact]} in others")


def means(cells: Sequence[dict], outcome: str) -> np.ndarray:
    """Return the mean over tasks of each draw (draws, 1), as `interval` takes them."""
    part, score, _ = OUTCOMES[outcome]
    found = []
    for cell in cells:
        of_tasks = cell[part]["tasks"].values()
        found.append([fmean(scores[score] for scores in of_tasks)])
    return np.array(found)


def sizes_table(rows: dict[str, list[dict]]) -> str:
    """Return how many weights each row trains, in skills and in routing."""
    lines = []
    for row, cells in rows.items():
        sizes = cells[0]["parameters"]
        numbers = (sizes["skills"], sizes["routing"], sizes["skills"] + sizes["routing"])
        lines.append([row, *(f"{number:,}" for number in numbers)])
    return table(["row", "skills", "routing", "in all"], lines)


def difference_row(name: str, values: np.ndarray, outcome: str) -> list[Any]:
    """Return a line about the differences of the draws (draws, 1), see HEAD."""
    digits = OUTCOMES[outcome].digits
    sd = f"{values.std(ddof=1):.{digits}f}"
    below = f"{(values < 0).sum()} of {len(values)}"
    return [name, outcome, signed(interval(values), digits), sd, below]


HEAD = ["difference", "outcome", "mean and 95 % interval", "sd over draws", "below zero"]


def in_digits(p_value: float) -> str:
    return "<0.0001" if p_value < 1e-4 else f"{p_value:.4f}"


def family_table(rows: dict[str, list[dict]]) -> str:
    """Return OrchMoE minus each other row, with the verdicts of Hochberg's correction."""
    others = [row for row in rows if row != "orchmoe"]
    differences = {}  # of each other row and outcome
    for other in others:
        for outcome in OUTCOMES:
            values = means(rows["orchmoe"], outcome) - means(rows[other], outcome)
            differences[other, outcome] = values
    p_values = [t_p_value(differences[other, "loss"]) for other in others]

    lines = []
    verdicts = set()
    for other, p_value, is_decided in zip(others, p_values, hochberg(p_values), strict=True):
        direction = "better" if differences[other, "loss"].mean() < 0 else "worse"
        verdict = direction if is_decided else "undecided"
        verdicts.add(verdict)
        for outcome in OUTCOMES:
            line = difference_row(f"orchmoe - {other}", differences[other, outcome], outcome)
            decision = [in_digits(p_value), verdict] if outcome == "loss" else ["-", "-"]
            lines.append(line + decision)
    answer = "yes" if verdicts == {"better"} else "not shown"
    return f"{table([*HEAD, 'p', 'verdict'], lines)}\n\nBetter than all {len(others)}: {answer}."


def lead_table(with_60: dict[str, list[dict]], with_15: dict[str, list[dict]]) -> str:
    """Return OrchMoE's lead over each other row, and how much larger it is with fewer examples.

    Below stands the answer of the plan: whether OrchMoE needs fewer examples.
    """
    others = [row for row in with_60 if row != "orchmoe"]
    lines = []
    lower_ends = []
    behind = []  # rows that are better than OrchMoE with fewer examples, too
    for other in others:
        lead_60 = means(with_60[other], "loss") - means(with_60["orchmoe"], "loss")
        lead_15 = means(with_15[other], "loss") - means(with_15["orchmoe"], "loss")
        lines.append(difference_row(f"lead over {other}, more examples", lead_60, "loss"))
        lines.append(difference_row(f"lead over {other}, fewer examples", lead_15, "loss"))
        change = lead_15 - lead_60
        lines.append(difference_row(f"lead over {other}, fewer - more examples", change, "loss"))
        _, low, _ = interval(change)
        lower_ends.append(low)
        if lead_15.mean() < 0:
            behind.append(other)
    answer = "not shown"
    if min(lower_ends) > 0 and not behind:
        answer = "yes"
    elif min(lower_ends) > 0:
        answer = f"no: with fewer examples it is still behind {' and '.join(behind)}, but by less"
    return f"{table(HEAD, lines)}\n\nNeeds fewer examples than all {len(others)}: {answer}."


def further_table(orchmoe: list[dict], rows: dict[str, list[dict]]) -> str:
    """Return OrchMoE minus each further row, without verdicts."""
    lines = []
    for other, cells in rows.items():
        for outcome in OUTCOMES:
            values = means(orchmoe, outcome) - means(cells, outcome)
            lines.append(difference_row(f"orchmoe - {other}", values, outcome))
    return table(HEAD, lines)


def losses_table(rows: dict[str, list[dict]]) -> str:
    """Return the seen loss of each draw, and the kind of CPU that made it."""
    names = list(rows)
    columns = [means(cells, "loss")[:, 0] for cells in rows.values()]
    lines = []
    for i, seed in enumerate(draws()):
        cpu = rows[names[0]][i]["settings"]["cpu"]
        lines.append([seed, cpu, *(f"{column[i]:.4f}" for column in columns)])
    return table(["draw", "CPU", *(f"{name}, loss" for name in names)], lines)


def values_table(reports: dict[str, dict]) -> str:
    """Return what was tried and chosen for each method."""

    def words(point):
        return ", ".join(f"{axis} {value:g}" for axis, value in point.items() if axis in START)

    lines = []
    for name, report in reports.items():
        line = [name, len(report["trials"]), words(report["best"]), f"{report['dev_loss']:.4f}"]
        means_of = []
        for point in report["all_seeds"]:
            loss = point["dev_loss"]  # null if a run diverged
            means_of.append(f"{words(point)}: {'diverged' if loss is None else f'{loss:.4f}'}")
        edges = []
        for axis, value in report["chosen"].items():
            tried = [trial[axis] for trial in report["trials"]]
            if value in (min(tried), max(tried)):
                edges.append(axis)
        edges = ", ".join(edges) or "none"
        lines.append([*line, "; ".join(means_of), words(report["chosen"]), edges])
    head = ["row", "trials", "best with seed 0", "dev loss"]
    return table([*head, "means of all seeds", "chosen", "chosen at an edge"], lines)


def text_of_tables(results: Path, cells: dict[str, dict]) -> str:
    """Return all tables of what is complete, in Markdown."""
    parts = []
    path = results / "values.json"
    if path.exists():
        parts += ["## Tuning", values_table(program.read_json(path))]
    sound = {}  # of each complete stage: the rows none of whose cells diverged
    for stage in ROWS:
        parts.append(f"## {TITLES[stage]}, {EXAMPLES[stage]} examples of each task")
        rows, missing = rows_of(cells, stage)
        if missing:
            parts.append(f"Not complete: cells that are missing: {missing}.")
            continue
        sound[stage] = {}
        diverged = []
        for row, of_row in rows.items():
            if any("diverged" in cell for cell in of_row):
                diverged.append(row)
            else:
                sound[stage][row] = of_row
        if diverged:
            parts.append(f"Cells of {', '.join(diverged)} diverged.")

        rows = sound[stage]
        first = sound.get("first", {})
        if stage == "further":
            if "orchmoe" not in first:
                parts.append("Not shown without OrchMoE's cells of the first family.")
                continue
            parts.append(further_table(first["orchmoe"], rows))
        else:
            if diverged:
                parts.append("So this family has no verdict.")
                continue
            parts.append(family_table(rows))
        if stage == "second" and first.keys() == COMPARED.keys():
            parts.append(lead_table(first, rows))
        parts += [sizes_table(rows), losses_table(rows)]
    return "\n\n".join(parts)


def join_cells(results: Path, cells: dict[str, dict]) -> None:
    """Move the cells of complete families into cells.jsonl."""
    lines = []
    to_delete = []
    for stage in ROWS:
        rows, missing = rows_of(cells, stage)
        if missing:
            continue
        for row in rows:
            names = [cell_name(stage, row, seed) for seed in draws()]
            lines += [{"name": name, **cells[name]} for name in names]
            to_delete += [results / f"{name}.json" for name in names]
    if lines:
        with program.atomic_write(results / "cells.jsonl") as file:
            for line in lines:
                file.write(program.to_json(line))
        for path in to_delete:
            path.unlink(missing_ok=True)


def write_tables(results: Path) -> None:
    """Write tables.md, and join the cells of complete families."""
    cells = read_cells(results)
    trials = {f"tune/{path.stem}": program.read_json(path) for path in results.glob("tune/*.json")}
    require_fitting(cells, trials)
    _, missing = rows_of(cells, "first")
    if not missing:
        name = cell_name("first", "orchmoe", FIRST_SEED)
        require_same_scores(cells[name], results / "repeated" / f"{Path(name).name}.json")
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
        __doc__, ClaimConfig, defaults=DEFAULTS, fixed=all_flags_but(CHOICES)
    )
    stage = program.from_flags(ClaimConfig, flags).stage
    results = Path(study_config.results)
    if stage == "tables":
        write_tables(results)
        return

    for name in ("data", "model"):
        if name not in flags:
            raise UserError(f"--stage {stage}: give {program.flag(name)}")
    require_machine()
    load_method(HYDRA_LORA)
    study = Study(settings, pick_device(study_config, settings), study_config, COMPARED | FURTHER)
    if stage == "tune":
        tune_once(study, COMPARED, TRIALS, MORE_TRIALS)
        return

    values = read_values(study)
    if stage == "further":  # as many trials as the methods of the families had
        tune_once(study, FURTHER, len(values["orchmoe"]["trials"]), 0)
        values = read_values(study)
    study.best = {name: report["chosen"] for name, report in values.items()}
    cells = cells_to_make(study, stage)
    if stage == "first" and cells:
        require_repeatable(study)
    study.run([cell for cell in cells if not cell.path.exists()])


if __name__ == "__main__":
    program.run_program(main)
