"""Answer "OrchMoE or a LoRA?" for the bundled data or your own, or compare any other methods.

    python -m experiments.compare --data MY.jsonl --methods orchmoe,lora
    python -m experiments.compare --data MY.jsonl --methods orchmoe,lora --no-tune    # a quick look
    python -m experiments.compare --methods orchmoe,lora,FILE.py:Class    # and a method of your own
    python -m experiments.compare --ablations                # OrchMoE with one change at a time

Every method gets the same steps, order of the data and total size. Only C-Poly has a size of its
own. Tuning chooses the rate of the skills and their scale, or what --axes names, by the dev loss,
with the same number of trials for each method. Trials have seed 0. The runs that are compared
are new ones with seeds 1 to --seeds, since the best of several trials looks better than it is.

The rule of the verdict was written down before any run. The first method is compared with each
other one by the loss on seen rows, which are held out from the training data, and on unseen rows,
which are test tasks or --test. The difference is *better* if its whole 95 % interval is below zero,
*worse* if it is above, and else *undecided*. Use the better method, and a LoRA if the comparison
with it is undecided. A LoRA comes last in whatever order the methods are given. An undecided
difference comes with an estimate of what would decide it. See tables.py for what an interval
covers. Nothing is chosen by seen or unseen results.

Writes cells (see experiments/compare/study.py) and results.md, or ablations.md, into the folder of
--results, or else --out. An interrupted comparison goes on when the same command is given again.
Test: pytest tests/experiments/test_compare.py
"""

import gc
import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import checkpoint
import data
import metrics
import run_folder
import tokenizer as tokenizers
import train
from baselines import (
    BUILT_IN,
    METHODS,
    OWN_METHODS,
    Poly,
    load_method,
    method_class,
)
from experiments.compare.study import (
    Cell,
    Study,
    StudyProgress,
    Variant,
    duration,
    facts_of,
    pick_device,
    read_study,
    refuse_unread,
    require_choices,
    share_cores,
)
from experiments.compare.tables import markdown, publish, verdicts
from support import program, runtime
from support.program import UserError
from tasks import DataConfig
from variants import VARIANTS

# ------------------------------------------------------------------------------ what is compared

SIX = tuple(METHODS)

DEFAULT_RUN = "ablations/default-s{seed}"
# Each row has one difference from the default, except that the one that is told the true task has
# an abstract task for each of the T tasks. S R and alpha stay the same.
TOLD_THE_TASK = "told the true task (K = T)"
ABLATIONS = {
    "default": Variant(),
    "w replaced by its mean": Variant(w="mean", run=DEFAULT_RUN),
    "w of another sample": Variant(w="other", run=DEFAULT_RUN),
    "router: random": Variant({"method": "RandomRouting"}),
    TOLD_THE_TASK: Variant({"method": "Oracle"}),
    **{name: Variant({"method": name}) for name in VARIANTS},
    "allocation start: sd 1": Variant({"allocation_std": 1.0}),
    "allocation start: sd 0.001": Variant({"allocation_std": 1e-3}),
    "K = 1": Variant({"abstract_tasks": 1}),
    "K = 4": Variant({"abstract_tasks": 4}),
    "K = 16": Variant({"abstract_tasks": 16}),
    "S = 1": Variant({"skills": 1}),
    "S = 2": Variant({"skills": 2}),
    "S = 8": Variant({"skills": 8}),
}
DEFAULTS = {"out": "results/compare"}  # the other defaults are those of train.py and StudyConfig
TIMED_STEPS = 5


@dataclass(frozen=True)
class CompareConfig:
    """Comparison: what is compared."""

    methods: tuple[str, ...] = SIX  # the first is compared with the others; also FILE.py:Class
    ablations: bool = False  # OrchMoE with one change at a time, instead of the methods
    rows: tuple[str, ...] = ()  # these ablations (default: all)

    def __post_init__(self) -> None:
        built_in = [name for name in self.methods if ":" not in name]
        require_choices("--methods", built_in, BUILT_IN)
        require_choices("--rows", self.rows, ABLATIONS)


def ablations(names: Sequence[str], settings: train.Settings, num_tasks: int) -> dict[str, Variant]:
    """Return "default", then these rows of ABLATIONS, or without names all that are possible.

    num_tasks: that of the training data; 0 if a row names no task. Raise UserError if a name is not
    possible.
    """
    rows = {}
    for name in ["default", *(names or ABLATIONS)]:
        try:
            rows[name] = ablation(name, settings, num_tasks)
        except UserError as error:
            if names:
                raise
            program.warn(f"left out: {error}")
    return rows


def ablation(name: str, settings: train.Settings, num_tasks: int) -> Variant:
    """Return a row of ABLATIONS for these settings. With another S it has another R: S R stays.

    Raise UserError if these settings do not allow the row.
    """
    row = ABLATIONS[name]._replace(like="orchmoe")  # with the tuned values of "orchmoe"
    if name == TOLD_THE_TASK and num_tasks == 0:
        raise UserError(f"--rows {name}: a row of --data names no task")
    # What the row changes: not what the study has anyway.
    fields = [field for field, value in row.settings.items() if getattr(settings, field) != value]
    if row.settings and not fields:
        raise UserError(f"--rows {name}: changes nothing in this study")
    if "skills" not in row.settings:
        return row
    total = settings.skills * settings.rank
    skills = row.settings["skills"]
    if total % skills:
        raise UserError(f"--rows {name}: S R = {total} is no multiple of {skills}")
    return row._replace(settings={"skills": skills, "rank": total // skills})


# ------------------------------------------------------------------------------ before it trains


def require_possible(study: Study, rows: dict[str, Variant]) -> None:
    """Raise UserError if a method cannot be attached, such as one that needs the task of a row."""
    for name, row in rows.items():
        settings = study.settings_of(name, row, {})
        _, num_tasks = facts_of(settings.part(DataConfig), settings.model)
        base = checkpoint.on_meta(checkpoint.read_config(settings.model))
        run_folder.attach_adapters(settings, base, num_tasks)


def print_plan(
    study: Study, rows: dict[str, Variant], cells: Sequence[Cell], tuned: dict[str, Variant]
) -> None:
    """Print how many rows each set has, which runs are left, and how long they may take.

    rows: those that train. cells: all cells of the stage, also that of the frozen base. tuned: rows
    that are tuned before. Raise UserError if a cell that exists has other settings, or was begun
    before its row was tuned.
    """
    settings = study.settings
    sets = data.load_sets(settings.part(DataConfig), tokenizers.load(settings.model))
    for name in ("train", "dev", "seen"):
        data.require_set(sets, name, settings)
    held_out = train.held_out_sets(sets, settings.eval_instances)
    counts = [f"{len(sets['train'])} train"]
    counts += [f"{len(examples)} {which}" for which, examples in held_out.items()]
    program.print_line(f"rows of data: {', '.join(counts)}")
    study.epochs = settings.steps / math.ceil(len(sets["train"]) / settings.batch_size)
    program.print_line(
        f"{settings.steps} steps of {settings.batch_size} rows are {study.epochs:.1f} epochs"
    )

    seeds, trials = study.config.seeds, study.config.trials
    parts = [f"{trials} trials of {name} with seed 0" for name in tuned]
    words = "seed 1" if seeds == 1 else f"seeds 1 to {seeds}"
    parts.append(f"{', '.join(rows)} with {words}")
    program.print_line(f"plan: {'; '.join(parts)}")

    trials_left = {name: search.count_missing() for name, search in study.searches(tuned).items()}
    others = 0
    for cell in cells:
        is_made = cell.path.exists()
        has_begun = is_made or (cell.folder / "config.json").exists()
        tuned_like = cell.row.like or cell.name  # the row whose tuned values the cell has
        if tuned_like not in tuned:
            cell.require_same()
        elif has_begun and trials_left[tuned_like] > 0:
            raise UserError(
                f"{cell.path}: begun before the {trials} trials of {tuned_like}, which choose its "
                f"values, were made; give another --out, or delete it and {cell.folder}"
            )
        if cell.row.is_run and not is_made:
            others += 1
    study.progress = StudyProgress(trials_left, others)
    left = study.progress.expected
    if left == 0:
        return
    jobs = share_cores(study.config.jobs, study.device)
    name = next(iter(rows))  # the first row, in which nothing replaces the router
    of_row = study.settings_of(name, rows[name], {})
    step = seconds_of_a_step(of_row, study.device, sets)
    gc.collect()  # frees the base: it and its adapters refer to each other
    of_a_run = seconds_of_a_run(step, settings, held_out)
    in_all = study.progress.rounds(jobs) * of_a_run
    program.print_line(
        f"{left} runs of about {duration(of_a_run)} on an otherwise idle machine ({step:.2g} s a "
        f"step), {duration(in_all)} with {jobs} at a time; if it is interrupted, the same command "
        f"goes on in {study.config.out}"
    )


def seconds_of_a_step(
    settings: train.Settings, device: runtime.Device, sets: dict[str, data.Examples]
) -> float:
    """Return the seconds that a training step takes, from the first steps.

    Raise UserError if a row is too long for the base, before any run meets it.
    """
    train_set = sets["train"]
    base, adapters, _ = run_folder.build(settings, device, len(train_set.tasks))
    train.require_sets_fit(base, sets, settings.max_new_tokens)
    optimizer = train.make_optimizer(adapters, settings)
    for group in optimizer.param_groups:
        group["max_lr"] = 0.0  # so that these steps cannot diverge, whatever the rates are
    batch_order = data.BatchOrder(train_set.source_lengths, settings.batch_size, settings.seed)
    started = []
    for step in range(TIMED_STEPS):
        started.append(time.monotonic())
        examples = train.examples_of_step(train_set, batch_order, step)
        train.train_step(base, adapters, optimizer, examples, step, settings)
    return (time.monotonic() - started[1]) / (TIMED_STEPS - 1)  # the first step is slower


def seconds_of_a_run(
    step: float, config: train.TrainConfig, held_out: dict[str, list[data.Example]]
) -> float:
    """Return about how long a run takes. step: seconds of a training step.

    The loss of a row costs a third of what it costs to train on it. An answer to it costs as much
    as training on it, give or take its length.
    """
    of_row = step / config.batch_size
    evaluations = math.ceil(config.steps / config.eval_every)
    scored = sum(len(examples) for which, examples in held_out.items() if which != "dev")
    losses = evaluations * len(held_out["dev"]) + scored
    return config.steps * step + losses * of_row / 3 + scored * of_row


# -------------------------------------------------------------------------------------- the study


def seeds_of(study: Study) -> range:
    """Return the seeds of the runs that are compared. Seed 0 tunes."""
    return range(1, study.config.seeds + 1)


def carry_out(
    study: Study, stage: str, rows: dict[str, Variant], tuned: dict[str, Variant], path: Path
) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """Tune, and make the cells of these rows with each seed, after checks and a plan.

    tuned: rows that are tuned before, unless --no-tune is given. path: the file that will have the
    tables. Return the content of the cells of each row, and the tables. Raise UserError if a row is
    not possible, or if the file is there before any cell.
    """
    if not study.config.tune:
        tuned = {}
    to_train = {name: row for name, row in rows.items() if row.trains}
    require_possible(study, to_train)
    if not (study.results / stage).exists():  # without cells, such a file is not of this study
        program.require_new([path], "give another --out or --results")
    print_plan(study, to_train, study.cells(stage, rows, {}, seeds_of(study)), tuned)
    reports = study.tune(tuned)

    cells = study.cells(stage, rows, {}, seeds_of(study))  # with the tuned values
    study.run(cells)
    results = {}
    for cell in cells:
        results.setdefault(cell.name, []).append(cell.result())
    metric = metrics.RULES[study.settings.metric_rules].description
    return results, markdown(results, reports, metric)


def compare(study: Study, rows: dict[str, Variant]) -> None:
    """Compare methods. Write results.md, print it, and print commands for what the verdicts say."""
    path = study.results / "results.md"
    with_base = rows | {"frozen base": Variant(trains=False)}
    results, tables = carry_out(study, "methods", with_base, tuned=rows, path=path)

    first, *others = rows
    parts = [tables]
    if study.epochs < 1:  # more training may change a difference, and more seeds do not
        parts.append(
            f"The training was short: each run read {100 * study.epochs:.0f} % of the training "
            "rows. Before more seeds, try --epochs 1."
        )
    winners = []  # in the order of the verdicts
    for other in others:
        text, chosen = verdicts(first, results[first], other, results[other])
        parts.append(text)
        winners += chosen.values()
    told = [name for name in rows if issubclass(method_class(name), Poly)]
    if told:
        parts.append(
            f"{' and '.join(told)}: told the task of each seen row. Questions and unseen rows get "
            "the mean over the tasks."
        )
    publish("\n\n".join(parts), path)
    for name in dict.fromkeys(filter(None, winners)):  # each once
        cells = study.cells("methods", {name: rows[name]}, {}, seeds_of(study))
        print_next_commands(cells)


def print_next_commands(cells: Sequence[Cell]) -> None:
    """Print the commands that use the run with the lowest dev loss."""
    best = min(cells, key=lambda cell: cell.result()["dev_loss"])
    settings = best.settings
    run = ["--run", str(best.folder)]
    ask = ["python", "eval.py", *run]
    if settings.method in OWN_METHODS:
        ask += ["--method", OWN_METHODS[settings.method].source]
    if run_folder.read_run(best.folder).facts.get("instructions", True):
        ask += ["--ask", "YOUR INSTRUCTION", "--input", "YOUR INPUT"]
    else:
        ask += ["--prompt", "YOUR WHOLE PROMPT"]
    commands = [ask]
    if settings.method in ("orchmoe", "lora"):
        out = f"served-{settings.method}"
        commands.append(["python", "-m", "integrations.export", *run, "--out", out])

    program.print_line(f"the best run of {best.name} on dev, to use it:")
    for command in commands:
        program.print_line(f"  {shlex.join(command)}")
    if "--prompt" in ask:
        program.print_line(
            f"a whole prompt is written as in {settings.data}: all that stands before the answer, "
            "with its last space or line break"
        )


def compare_ablations(study: Study, names: Sequence[str]) -> None:
    """Compare OrchMoE with one change at a time, at its tuned values. Write ablations.md."""
    settings = study.settings
    _, num_tasks = facts_of(settings.part(DataConfig), settings.model)
    rows = ablations(names, settings, num_tasks)
    path = study.results / "ablations.md"
    _, tables = carry_out(study, "ablations", rows, tuned={"orchmoe": Variant()}, path=path)
    publish(tables, path)


def main() -> None:
    flags, study_config, settings = read_study(__doc__, CompareConfig, defaults=DEFAULTS)
    config = program.from_flags(CompareConfig, flags)
    unread = {"rows": "without --ablations"}
    if config.ablations:
        unread = {"methods": "with --ablations"}
    if not study_config.tune:
        unread |= {"trials": "with --no-tune", "axes": "with --no-tune"}
    if settings.epochs:
        unread["steps"] = "with --epochs"
    program.refuse_unread(flags, unread)
    if settings.epochs:
        sets = data.load_sets(settings.part(DataConfig), tokenizers.load(settings.model))
        steps = train.steps_of(settings, data.require_set(sets, "train", settings))
        settings = replace(settings, steps=steps, epochs=0)

    if config.ablations:
        # A setting may be given if any row reads it.
        refuse_unread(flags, study_config, settings, ABLATIONS.values())
        study = Study(settings, pick_device(study_config, settings), study_config, equal={})
        compare_ablations(study, config.rows)
        return
    names = [load_method(text) for text in config.methods]
    require_choices("--methods", names, BUILT_IN | OWN_METHODS)
    if "lora" in names:  # the simplest method comes last: it is used unless another one is better
        names.remove("lora")
        names.append("lora")
    rows = {name: Variant({"method": name}) for name in names}
    refuse_unread(flags, study_config, settings, rows.values())
    # The private skills of c-poly grow with the number of tasks.
    equal = {name: row for name, row in rows.items() if name != "c-poly"}
    compare(Study(settings, pick_device(study_config, settings), study_config, equal), rows)
