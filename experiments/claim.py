"""The study of the paper's claim: OrchMoE against multi-adapter methods of equal size on real SNI.

experiments/results/claim/plan.md has the plan, which was written before the first trial. This
program is the plan: it takes no flags for what the plan says. It needs a CPU that multiplies
bfloat16 natively. Run its stages in this order, in a clone whose files do not change:

    OMP_NUM_THREADS=1 python -m experiments.claim --data natural-instructions --model smollm2 \\
        --device cpu --jobs 2 --stage tune

tune: choose the values of each method. first: the cells with 60 examples of each task. second:
those with 15. further: tune and run further rows. tables: write the tables of what is complete.

No stage prints a loss of a draw, and a family of cells that is not complete has no table. An
interrupted stage continues when it is run again. Test: pytest tests/experiments/test_claim.py
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch

from baselines import load_method, settings_of_method
from experiments.compare.search import Search
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
    tuning_table,
)
from support import program
from support.program import UserError

RESULTS = program.ROOT / "experiments/results/claim"
TUNING_TASKS = program.ROOT / "experiments/results/decision/tasks.json"  # those in "train"
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
TRIALS = 12  # of each method, with seed 0
MORE_TRIALS = 4  # of each method, if a best value is on an edge of what was tried
BEST_POINTS = 2  # that are run with further seeds
FURTHER_SEEDS = (1001, 1002)

# Outcome: part of a cell, score of a task there, digits to show. The loss is in nats.
OUTCOMES = {
    "loss": ("seen", "loss", 4),
    "ROUGE-L": ("answers", "rougeL", 2),
    "exact match": ("answers", "exact_match", 2),
}

# The flags that remain. All other settings are those of the plan.
CHOICES = ("data", "model", "out", "results", "jobs", "gpu", "device")
DEFAULTS = {
    "out": "results/claim",
    "results": str(RESULTS),
    "dtype": "bfloat16",
    "steps": 180,
    "batch_size": 8,
    "warmup": 20,
    "eval_every": 180,
    "eval_instances": 24,  # of dev, after the last step; nothing is chosen by them
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

    stage: Literal["tune", "first", "second", "further", "tables"] = "tables"  # see above


# ------------------------------------------------------------------------------------------ data


def subset(study: Study, name: str, tasks: Sequence[str]) -> str:
    """Return a data folder that has only these training tasks, and no test tasks."""
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
    """Return the training tasks of each draw, by its seed."""
    tasks = program.read_json(DRAWS).values()
    return dict(enumerate(tasks, FIRST_SEED))


# ---------------------------------------------------------------------------------------- tuning


def tune(study: Study, variants: dict[str, Variant], trials: int) -> dict[str, dict]:
    """Make the trials. Return what was tried and chosen for each method.

    trials: how many the search of each method has.
    """
    tasks = program.read_json(TUNING_TASKS)["train"]
    values = {"data": subset(study, "tasks-tuning", tasks)}
    tuning = Study(changed(study.settings, values), study.device, study.config, study.equal)
    searches = {}
    for name, variant in variants.items():
        method = changed(study.settings, variant.settings).method
        read = settings_of_method(method, "sample")
        start = {axis: value for axis, value in START.items() if axis in read}
        trial = functools.partial(tuning.trial, name, variant, scores="dev tasks")
        searches[name] = Search(start, trials, trial)
    run_cells(list(searches.values()), study.config.jobs, study.device, study.progress)
    if trials == TRIALS and any(search.edges() for search in searches.values()):
        for search in searches.values():
            search.trials += MORE_TRIALS
        run_cells(list(searches.values()), study.config.jobs, study.device, study.progress)

    repeated = {}  # the trials with further seeds of the best points of each method
    to_repeat = []
    for name, search in searches.items():
        best = sorted(search.losses, key=search.losses.get)[:BEST_POINTS]
        repeated[name] = {}
        for point in best:
            values = search.values(point)
            cells = [search.cell_of(values | {"seed": seed}) for seed in FURTHER_SEEDS]
            repeated[name][point] = cells
            to_repeat += cells
    tuning.run(to_repeat)

    chosen = {}
    for name, search in searches.items():
        means = {}
        for point, cells in repeated[name].items():
            losses = [search.losses[point], *(dev_loss(cell) for cell in cells)]
            means[point] = fmean(losses)
        best = min(means, key=means.get)
        if means[best] == math.inf:
            raise UserError(f"{name}: the best points diverged; there are no values to choose")
        three_seeds = [{**search.values(point), "dev_loss": mean} for point, mean in means.items()]
        chosen[name] = search.report() | {"three_seeds": three_seeds, "chosen": search.values(best)}
    return chosen


def dev_loss(cell: Cell) -> float:
    """Return the dev loss of a finished trial, infinity if it diverged."""
    loss = cell.result()["dev_loss"]
    return math.inf if loss is None else loss


def tune_once(study: Study, variants: dict[str, Variant], trials: int) -> None:
    """Tune these rows unless values.json has them, and write what was chosen there."""
    path = study.results / "values.json"
    values = program.read_json(path) if path.exists() else {}
    if not variants.keys() <= values.keys():
        values |= tune(study, variants, trials)
        program.write_json(path, values)


def use_values(study: Study) -> int:
    """Let all later cells have the chosen values. Return how many trials each search had."""
    path = study.results / "values.json"
    if not path.exists():
        raise UserError(f"{path}: not there; run --stage tune first")
    values = program.read_json(path)
    study.best = {name: report["chosen"] for name, report in values.items()}
    return len(values["orchmoe"]["trials"])


# ----------------------------------------------------------------------------------------- cells


def read_cells(results: Path) -> dict[str, dict[str, Any]]:
    """Return the finished cells by name, such as "first/orchmoe-s200"."""
    cells = {}
    joined = results / "cells.jsonl"
    if joined.exists():
        for _, _, cell in program.read_jsonl(joined):
            cells[cell.pop("name")] = cell
    for stage in ROWS:
        for path in sorted((results / stage).glob("*.json")):
            cells[f"{stage}/{path.stem}"] = program.read_json(path)
    return cells


def cell_name(stage: str, row: str, seed: int) -> str:
    return f"{stage}/{file_name(row)}-s{seed}"


def cells_to_make(study: Study, stage: str) -> list[Cell]:
    """Return the cells of a stage that are missing, draw by draw.

    All cells of a draw must be made on one kind of CPU. A draw that was begun on another kind is
    left out, and a line says so.
    """
    finished = read_cells(study.results)
    missing = []
    for seed, tasks in draws().items():
        of_draw = subset(study, f"tasks-{seed}", tasks)
        values = {"data": of_draw, "train_instances": EXAMPLES[stage]}
        cells = study.cells(stage, ROWS[stage], values, [seed], "replicate")
        to_make = [cell for cell in cells if cell_name(stage, cell.name, seed) not in finished]
        begun = [cell for name, cell in finished.items() if name.endswith(f"-s{seed}")]
        others = {cell["settings"]["cpu"] for cell in begun} - {kind_of_cpu()}
        if to_make and others:
            names = " and ".join(sorted(others))
            program.print_line(f"draw {seed} is left out: it was begun on {names}")
        else:
            missing += to_make
    return missing


def require_repeatable(study: Study, cell: Cell) -> None:
    """Make a cell twice. Raise UserError unless both have the same scores to the last digit."""
    again = cell._replace(
        path=study.results / "repeated" / cell.path.name,
        folder=Path(study.config.out, "repeated", cell.path.stem),
    )
    study.run([cell, again])
    one, other = cell.result(), again.result()
    for part in ("dev_loss", "seen", "answers"):
        if one[part] != other[part]:
            raise UserError(f"{again.path}: it has another {part} than {cell.path}, so none counts")


# ---------------------------------------------------------------------------------------- tables


def family(cells: dict[str, dict], stage: str) -> tuple[dict[str, list[dict]], int]:
    """Return the cells of each row of a stage in the order of the draws, and how many miss."""
    rows = {}
    missing = 0
    for row in ROWS[stage]:
        names = [cell_name(stage, row, seed) for seed in draws()]
        rows[row] = [cells[name] for name in names if name in cells]
        missing += len(names) - len(rows[row])
    return rows, missing


def require_fitting(cells: dict[str, dict]) -> None:
    """Raise UserError if two cells cannot be subtracted, or if one diverged."""
    of_draw = {}
    first = next(iter(cells.values()), None)
    for name, cell in cells.items():
        if "diverged" in cell:
            raise UserError(f"{name}: the cell diverged, so there is no verdict")
        for fact in ("tree", "torch", "threads"):
            if cell[fact] != first[fact]:
                raise UserError(f"{name}: {fact} is {cell[fact]}, that of others {first[fact]}")
        seed = cell["settings"]["seed"]
        for fact in ("cpu", "computed"):
            expected = of_draw.setdefault((seed, fact), cell["settings"][fact])
            if cell["settings"][fact] != expected:
                raise UserError(f"{name}: {fact} is not that of the other cells of its draw")


def means(cells: Sequence[dict], outcome: str) -> np.ndarray:
    """Return the mean over tasks of each draw (draws, 1), as `interval` takes them."""
    part, score, _ = OUTCOMES[outcome]
    found = []
    for cell in cells:
        found.append(fmean(scores[score] for scores in cell[part]["tasks"].values()))
    return np.array(found)[:, None]


def sizes_table(rows: dict[str, list[dict]]) -> str:
    """Return how many weights each row trains, in skills and in routing."""
    lines = []
    for row, cells in rows.items():
        sizes = cells[0]["parameters"]
        lines.append([row, f"{sizes['skills']:,}", f"{sizes['routing']:,}"])
        lines[-1].append(f"{sizes['skills'] + sizes['routing']:,}")
    return table(["row", "skills", "routing", "in all"], lines)


def difference_row(name: str, values: np.ndarray, outcome: str) -> list[Any]:
    """Return mean, interval, sd and signs of the differences of the draws (draws, 1)."""
    digits = OUTCOMES[outcome][2]
    sd = f"{values.std(ddof=1):.{digits}f}"
    below = f"{(values < 0).sum()} of {len(values)}"
    return [name, outcome, signed(interval(values), digits), sd, below]


HEAD = ["difference", "of", "mean and 95 % interval", "sd of a draw", "below zero"]


def family_table(rows: dict[str, list[dict]]) -> str:
    """Return OrchMoE minus each other row, with the verdicts of Hochberg's correction."""
    first, *others = rows
    differences = {}
    for other in others:
        differences[other] = means(rows[first], "loss") - means(rows[other], "loss")
    p_values = [t_p_value(values) for values in differences.values()]
    verdicts = {}
    for other, is_decided in zip(others, hochberg(p_values), strict=True):
        direction = "better" if differences[other].mean() < 0 else "worse"
        verdicts[other] = direction if is_decided else "undecided"

    lines = []
    for other, p_value in zip(others, p_values, strict=True):
        for outcome in OUTCOMES:
            values = means(rows[first], outcome) - means(rows[other], outcome)
            decision = [f"{p_value:.4f}", verdicts[other]] if outcome == "loss" else ["-", "-"]
            lines.append(difference_row(f"{first} - {other}", values, outcome) + decision)
    is_best = set(verdicts.values()) == {"better"}
    text = f"Better than all {len(others)}: {'yes' if is_best else 'not shown'}."
    return f"{table([*HEAD, 'p', 'verdict'], lines)}\n\n{text}"


def lead_table(with_60: dict[str, list[dict]], with_15: dict[str, list[dict]]) -> str:
    """Return how much larger OrchMoE's lead over each other row is with fewer examples."""
    first, *others = with_60
    lines = []
    is_larger = []
    for other in others:
        leads = []
        for rows in (with_15, with_60):
            leads.append(means(rows[other], "loss") - means(rows[first], "loss"))
        values = leads[0] - leads[1]
        _, low, _ = interval(values)
        is_larger.append(low > 0)
        name = f"lead over {other}, fewer - more examples"
        lines.append(difference_row(name, values, "loss"))
    answer = "yes" if all(is_larger) else "not shown"
    text = f"Needs fewer examples than all {len(others)}: {answer}."
    return f"{table(HEAD, lines)}\n\n{text}"


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
    lines = []
    columns = [means(cells, "loss")[:, 0] for cells in rows.values()]
    for i, seed in enumerate(draws()):
        cpu = next(iter(rows.values()))[i]["settings"]["cpu"]
        lines.append([seed, cpu, *(f"{column[i]:.4f}" for column in columns)])
    return table(["draw", "CPU", *(f"{row}, loss" for row in rows)], lines)


def text_of(results: Path, cells: dict[str, dict]) -> str:
    """Return all tables of what is complete, in Markdown."""
    parts = []
    values = results / "values.json"
    if values.exists():
        parts += ["## Tuning", tuning_table(program.read_json(values))]
    complete = {}
    for stage in ROWS:
        rows, missing = family(cells, stage)
        parts.append(f"## {TITLES[stage]}, {EXAMPLES[stage]} examples of each task")
        if missing:
            parts.append(f"Not complete: {missing} cells are missing.")
            continue
        complete[stage] = rows
        if stage == "further":
            parts.append(further_table(complete["first"]["orchmoe"], rows))
        else:
            parts.append(family_table(rows))
        if stage == "second":
            parts.append(lead_table(complete["first"], rows))
        parts += [sizes_table(rows), losses_table(rows)]
    return "\n\n".join(parts) + "\n"


def join_cells(results: Path, cells: dict[str, dict]) -> None:
    """Move the cells of complete families into cells.jsonl."""
    lines = []
    joined = []
    for stage in ROWS:
        rows, missing = family(cells, stage)
        if not missing:
            for row in rows:
                names = [cell_name(stage, row, seed) for seed in draws()]
                lines += [{"name": name, **cells[name]} for name in names]
                joined += [results / f"{name}.json" for name in names]
    if lines:
        with program.atomic_write(results / "cells.jsonl") as file:
            for line in lines:
                file.write(program.to_json(line))
        for path in joined:
            path.unlink(missing_ok=True)


def write_tables(results: Path) -> None:
    """Write tables.md, and join the cells of complete families."""
    cells = read_cells(results)
    require_fitting(cells)
    publish(text_of(results, cells), results / "tables.md")
    join_cells(results, cells)


def main() -> None:
    flags, study_config, settings = read_study(
        __doc__, ClaimConfig, defaults=DEFAULTS, fixed=all_flags_but(CHOICES)
    )
    stage = program.from_flags(ClaimConfig, flags).stage
    if stage == "tables":
        write_tables(Path(study_config.results))
        return

    if not {"data", "model"} <= flags.keys():
        raise UserError("give --data and --model")
    if not torch.cpu._is_avx512_bf16_supported():
        raise UserError("this CPU does not multiply bfloat16 natively; use one that does")
    load_method(HYDRA_LORA)
    study = Study(settings, pick_device(study_config, settings), study_config, COMPARED | FURTHER)
    if stage == "tune":
        tune_once(study, COMPARED, TRIALS)
        return
    trials = use_values(study)
    if stage == "further":
        tune_once(study, FURTHER, trials)
        use_values(study)
    cells = cells_to_make(study, stage)
    if stage == "first" and cells and cells[0].settings.seed == FIRST_SEED:
        require_repeatable(study, cells[0])
    study.run(cells)


if __name__ == "__main__":
    program.run_program(main)
