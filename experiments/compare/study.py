"""The framework of all studies: rows of settings -> cells -> tables.

A Variant says what one row of a table changes in the settings of train.py. A Cell is one run of it,
or another scoring of a run: a JSON file with settings and scores. A Study tunes rows and
makes the cells of rows x seeds. It goes on after any interruption: finished cells are not made
again, unfinished runs resume, and a cell of other settings is refused.

    rows = {"orchmoe": Variant(), "lora": Variant({"method": "lora"})}
    controls = {"K = 1": Variant({"abstract_tasks": 1}, like="orchmoe")}
    study = Study(settings, device, StudyConfig(), equal=rows)
    study.tune(rows)
    study.run(study.cells("methods", rows | controls, {}, seeds=range(1, 4)))  # seed 0 tunes

compare.py, beside this file, is a study, and so is experiments/why.py.
Test: pytest tests/experiments/test_compare.py
"""

import contextlib
import functools
import gc
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import checkpoint
import data
import eval as evaluation
import metrics
import run_folder
import tokenizer as tokenizers
import train
from baselines import OWN_METHODS, count_parameters, load_method, settings_of_method
from experiments.compare import routers
from experiments.compare.search import AXES, Search
from experiments.compare.sizes import equal_ranks
from model import Backbone
from orchmoe import Adapters, OrchMoEConfig
from run_folder import unread_settings
from support import program, runtime
from support.program import UserError
from tasks import DataConfig

# What only studies use: methods from a file, in every process of a study.
for _name in ("RandomRouting", "Oracle", "OracleOfFactors", "QuietMHR"):
    load_method(f"{routers.__file__}:{_name}")

# SETTINGS are the flags of train.py that a study accepts. FIXED are those that it sets itself.
SETTINGS = (train.TrainConfig, DataConfig, OrchMoEConfig)
FIXED = ("method", "seed", "start", "extra_rank")
# A cell that scores "replicate" scores the first UNSEEN instances of each new task. Their prompts
# have up to UNSEEN_LENGTH tokens, so that none loses its end.
UNSEEN = 5
UNSEEN_LENGTH = 1024
ANSWER_TOKENS = 32


class Variant(NamedTuple):
    """What one row of a table changes."""

    settings: dict[str, Any] = {}  # fields of train.Settings
    like: str = ""  # row whose size and tuned values it takes (default: its own)
    w: Literal["", "mean", "other"] = ""  # replaces w at evaluation, see `replaced_w`
    run: str = ""  # run that it scores; {seed} is filled in (default: its own)
    trains: bool = True  # whether it has adapters; otherwise the row is the frozen base

    @property
    def is_run(self) -> bool:
        """Whether a cell of it makes a run. Others score the base, or the run of another cell."""
        return self.trains and not self.w


@dataclass(frozen=True)
class StudyConfig:
    """Study: how much is run, and where."""

    out: str = "results"  # folder of the runs
    results: str = ""  # folder of the finished cells (default: --out)
    seeds: int = 3  # compared runs of each row, with seeds 1 to N
    tune: bool = True  # choose the values of --axes for each row on dev; otherwise as given
    trials: int = 6  # runs of seed 0 that tune each row
    axes: tuple[str, ...] = ("lr_skills", "alpha")  # what is tuned, where a row has it
    jobs: int = 0  # cells at a time (default: one on a GPU; on the CPU one per core, at most 8)
    gpu: int | None = None  # number of the GPU (default: 0, if there is one)
    device: Literal["cpu", ""] = ""  # use the CPU even if there is a GPU

    def __post_init__(self) -> None:
        program.check(self, seeds=1, trials=1)
        require_choices("--axes", self.axes, AXES)


def read_study(
    doc: str, *own: type, defaults: dict[str, Any], fixed: Sequence[str] = FIXED
) -> tuple[dict[str, Any], StudyConfig, train.Settings]:
    """Return the given flags, and the StudyConfig and the Settings that they describe.

    own: dataclasses of further flags of this program.
    """
    flags = program.read_flags(doc, *own, StudyConfig, *SETTINGS, defaults=defaults, hidden=fixed)
    for name in fixed:
        if name in flags:
            raise UserError(f"{program.flag(name)}: the study sets this itself; leave it out")
    values = defaults | flags
    return (
        flags,
        program.from_flags(StudyConfig, values),
        program.from_flags(train.Settings, values),
    )


def all_flags_but(choices: Sequence[str]) -> list[str]:
    """Return the flags that a planned study sets itself: all except the choices."""
    names = []
    for cls in (*SETTINGS, StudyConfig):
        names += [field.name for field in fields(cls) if field.name not in choices]
    return names


def require_choices(flag: str, given: Sequence[str], choices: Iterable[str]) -> None:
    """Raise UserError unless each given name is one of the choices and given once."""
    for name in given:
        if name not in choices or given.count(name) > 1:
            raise UserError(f"{flag} {name}: choose, once each, of {', '.join(choices)}")


def refuse_unread(
    flags: dict[str, Any],
    config: StudyConfig,
    settings: train.Settings,
    variants: Iterable[Variant],
) -> None:
    """Raise UserError for a given setting, or an axis to tune, that no variant reads."""
    unread = {name: "in this comparison" for name in vars(settings)}
    for variant in variants:  # what remains is read by none of them
        of_variant = unread_settings(changed(settings, variant.settings))
        unread = {name: why for name, why in unread.items() if name in of_variant}
    program.refuse_unread(flags, unread)
    if "axes" in flags:
        for name in config.axes:
            if name in unread:
                raise UserError(f"--axes {name}: has no effect {unread[name]}; leave it out")


def pick_device(config: StudyConfig, settings: train.Settings) -> runtime.Device:
    """Return the device of a study, and print it."""
    device = runtime.pick_device(config.gpu, config.device, settings.dtype, base=settings.model)
    program.print_line(device.description)
    return device


def changed(settings: train.Settings, values: dict[str, Any]) -> train.Settings:
    """Return settings with other values. Raise UserError if they do not fit."""
    with program.checking_settings():
        return replace(settings, **values)


# ----------------------------------------------------------------------------------------- cells


class Cell(NamedTuple):
    """One run of a row, or another scoring of a run."""

    name: str  # of the row
    row: Variant
    settings: train.Settings
    facts: dict[str, str]  # what else the numbers depend on: base, data, device
    path: Path  # its file
    folder: Path  # of the run that it scores
    scores: Literal["dev", "dev tasks", "replicate", "answers"] = "answers"  # see `run_cell`

    @property
    def is_trial(self) -> bool:
        """Return whether a search makes it, to choose the values of a row."""
        return self.scores in ("dev", "dev tasks")

    def result(self) -> dict[str, Any]:
        """Return the content of its file."""
        return program.read_json(self.path)

    def made_with(self) -> dict[str, Any]:
        """Return all that the numbers depend on. Fingerprints replace paths."""
        values = json.loads(json.dumps(vars(self.settings)))  # as JSON has them
        for name in run_folder.PATHS:
            values.pop(name, None)
        return {**values, **self.facts}

    def require_same(self) -> None:
        """Raise UserError if its file or its run was made with other settings.

        Warn if it was made by another tree or torch.
        """
        if self.path.exists():
            require_saved(self.path, {"row": self.name, **self.made_with()})
            warn_of_other_code(self.result())
        if (self.folder / "config.json").exists() and self.row.trains:
            require_saved(self.folder / "cell.json", self.made_with())


def require_saved(path: Path, expected: dict[str, Any]) -> None:
    """Raise UserError if the settings in the file differ from the expected ones."""
    saved = program.read_json(path).get("settings", {}) if path.exists() else {}
    for name, value in expected.items():
        if saved.get(name) != value:
            raise UserError(
                f"{path}: made with {name} {saved.get(name)}, not {value}; give another --out "
                "(and --results, if given)"
            )


def warn_of_other_code(cell: dict[str, Any]) -> None:
    """Warn, once for all such cells, if a finished cell was made by another tree or torch."""
    made_by = f"tree {cell.get('tree')}, torch {cell.get('torch')}"
    this_code = f"tree {tree()}, torch {torch.__version__}"
    if made_by != this_code:
        program.warn(
            f"finished cells were made by another tree or torch ({made_by}; now {this_code}), so "
            "numbers may differ for this reason, too"
        )


def say_nothing(text: str) -> None:
    """Take the place of program.print_line: a study does not show the losses of its runs."""


def run_cell(cell: Cell, device: runtime.Device) -> bool:
    """Train and score a cell, and write its file. Return False if a signal stopped it.

    An interrupted run resumes. What a cell has depends on its `scores`:

    dev         the lowest dev loss of the run, in which all target tokens weigh the same
    dev tasks   the loss on all dev instances, the mean within a task, then over tasks
    replicate   the dev loss, the losses and the scores of short answers on all seen instances and,
                if there are test tasks, on some instances of each of them
    answers     the dev loss, and the losses and the scores of answers on seen and unseen instances

    A cell that diverged has "diverged" and no dev loss.
    """
    started = time.monotonic()
    about = {
        "settings": {"row": cell.name, **cell.made_with()},
        "tree": tree(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),  # in bfloat16 the numbers depend on it
    }
    try:
        result = train_and_score(cell, device)
    except train.DivergedError as error:
        result = {"dev_loss": None, "diverged": str(error)}
    if result is None:
        return False
    result["seconds"] = round(time.monotonic() - started)
    program.write_json(cell.path, about | result)
    return True


def train_and_score(cell: Cell, device: runtime.Device) -> dict[str, Any] | None:
    """Return the results of a cell, None if a signal stopped it.

    Raise DivergedError if a loss, gradient or weight is not finite, and UserError if the data or
    the file of an own method changed since the study began.
    """
    method = OWN_METHODS.get(cell.settings.method)
    if method is not None and method.kind != cell.facts["method_file"]:
        raise UserError(
            f"{method.source}: the file changed while cells were made; restore it, or start again "
            "in another --out"
        )
    gc.collect()  # frees the base of the cell before: a base and its adapters refer to each other
    result = {}
    if cell.row.trains:
        program.write_json(cell.folder / "cell.json", {"settings": cell.made_with()})
        if read_progress(cell.folder).get("next_step", 0) < cell.settings.steps:
            launch = train.LaunchConfig(out=str(cell.folder))
            if train.train(cell.settings, device, launch, say=say_nothing) is None:
                return None
        require_promised(cell, run_folder.read_run(cell.folder).facts)
        if not cell.row.w:
            result["dev_loss"] = read_progress(cell.folder)["best_loss"]
    if cell.scores != "dev":
        result |= score(cell, device)
    return result


def require_promised(cell: Cell, facts: dict[str, Any]) -> None:
    """Raise UserError unless the tasks that were read are those that the cell says.

    facts: the digests of the task files, "train_tasks" and "test_tasks".
    """
    for part in ("train", "test"):
        name = f"{part}_tasks"
        if facts.get(name, "") != cell.facts.get(name, ""):
            raise UserError(
                f"{cell.settings.data}: the {part} rows changed while cells were made; "
                f"{cell.path} is not saved; start again in another --out"
            )


def digests_of(sets: dict[str, data.Examples]) -> dict[str, str]:
    """Return the digests of the task files of the sets, as `require_promised` takes them."""
    return {f"{part}_tasks": sets[part].digest for part in ("train", "test") if part in sets}


def read_progress(folder: Path) -> dict[str, Any]:
    """Return the fields of run_folder.Progress that a run has saved, {} if it has saved none."""
    path = folder / "progress.pt"
    return checkpoint.read_torch(path)["progress"] if path.exists() else {}


@functools.cache
def tree() -> str:
    """Return the commit, with "-dirty" if Python files differ from it; "" outside a clone.

    Git's own choice of digits depends on the size of the clone, so here it is fixed.
    """

    def git(*words):
        return subprocess.run(["git", "-C", program.ROOT, *words], capture_output=True, text=True)

    try:
        commit = git("rev-parse", "--short=7", "HEAD").stdout.strip()
        is_dirty = git("diff", "--quiet", "HEAD", "--", "*.py").returncode != 0
    except OSError:  # there is no git
        return ""
    return f"{commit}-dirty" if commit and is_dirty else commit


def score(cell: Cell, device: runtime.Device) -> dict[str, Any]:
    """Return the scores of a cell, see `run_cell`, and its number of parameters.

    Raise DivergedError if a loss is not finite.
    """
    settings = cell.settings
    result = {}
    gc.collect()  # frees the base that trained
    if cell.row.trains:
        base, adapters, tokenizer = run_folder.load(device, run_dir=cell.folder)
        result["parameters"] = count_parameters(adapters)
    else:
        base, adapters, tokenizer = run_folder.load(device, model=settings.model)

    sets = data.load_sets(settings.part(DataConfig), tokenizer)
    require_promised(cell, digests_of(sets))
    options = {"batch_size": settings.eval_batch_size}
    if cell.scores == "dev tasks":  # a trial of a planned study
        losses = finite_losses(base, adapters, sets["dev"], "dev", **options)
        of_tasks = evaluation.losses_by_task(sets["dev"], losses).values()
        result["dev_loss"] = fmean(fmean(of_task) for of_task in of_tasks)
        return result
    rules = settings.metric_rules
    if cell.scores == "replicate":  # a cell of a planned study
        scored = {"seen": sets["seen"]}
        if "test" in sets:
            config = replace(settings.part(DataConfig), max_source_length=UNSEEN_LENGTH)
            test = data.load_sets(config, tokenizer, only_test=True)["test"]
            scored["unseen"] = first_of_each_task(test, UNSEEN)
        for which, examples in scored.items():
            losses = finite_losses(base, adapters, examples, which, **options)
            predictions = evaluation.predict(
                base, adapters, examples, tokenizer, max_new_tokens=ANSWER_TOKENS, **options
            )
            result[which] = evaluation.score(examples, predictions, rules, losses)
        return result
    held_out = train.held_out_sets(sets, settings.eval_instances)
    dev = held_out.pop("dev")
    if cell.row.is_run:
        w = evaluation.router_weights(base, adapters, dev, settings.eval_batch_size)
    for which, examples in held_out.items():
        options["w"] = replaced_w(cell.row.w, settings, base, adapters, dev, examples)
        losses = finite_losses(base, adapters, examples, which, **options)
        length = settings.max_new_tokens
        predictions = evaluation.predict(
            base, adapters, examples, tokenizer, max_new_tokens=length, **options
        )
        result[which] = {"prompts": by_prompt(examples, predictions, rules, losses)}

    if cell.row.is_run and w is not None:
        adapters.detach()  # those before training take their place
        result["router"] = router_report(w, w_before_training(cell, base, sets["train"], dev))
    return result


def w_before_training(
    cell: Cell, base: Backbone, train_set: data.Examples, dev: Sequence[data.Example]
) -> Tensor:
    """Return w (M,K) of the M dev instances before training, after attaching the adapters again."""
    settings = cell.settings
    adapters = run_folder.attach_adapters(settings, base, len(train_set.tasks))
    if adapters.router is not None:
        train.fit_router(base, adapters, train_set, settings)
    return evaluation.router_weights(base, adapters, dev, settings.eval_batch_size)


def router_report(w: Tensor, initial_w: Tensor) -> dict[str, float]:
    """Return how w (M,K) of M examples is spread over the abstract tasks.

    entropy: mean over the examples in nats, NaN if the rows of w are not distributions.
    largest: the largest of the mean weights of the abstract tasks.
    used: the number of abstract tasks whose mean weight is above 40 % of an equal share, 1/K.
    distance: mean KL(w || initial_w) in nats, where initial_w (M,K) is the router's w before
    training, NaN as the entropy.
    """
    K = w.shape[1]
    mean_w = w.mean(dim=0)  # (K,)
    report = {
        "entropy": math.nan,
        "largest": mean_w.max().item(),
        "used": int((mean_w > 0.4 / K).sum()),
        "distance": math.nan,
    }
    sums = w.sum(dim=-1)
    if (w >= 0).all() and torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        log_ratio = w.clamp(min=1e-12).log() - initial_w.clamp(min=1e-12).log()
        report["entropy"] = torch.special.entr(w).sum(dim=-1).mean().item()
        report["distance"] = (w * log_ratio).sum(dim=-1).mean().item()
    return report


def finite_losses(
    base: Backbone, adapters: Adapters, examples: Sequence[data.Example], which: str, **options: Any
) -> list[evaluation.RowLoss]:
    """Return the losses of eval.measure. Raise DivergedError if one is not finite."""
    losses = evaluation.measure(base, adapters, examples, **options)
    for example, loss in zip(examples, losses, strict=True):
        if not math.isfinite(loss.nats):
            raise train.DivergedError(
                f"{example.id}: the loss on this {which} instance is {loss.nats}"
            )
    return losses


def first_of_each_task(examples: Sequence[data.Example], count: int) -> list[data.Example]:
    """Return the first `count` examples of each task."""
    tasks = {}
    for example in examples:
        tasks.setdefault(example.task, []).append(example)
    first = []
    for rows in tasks.values():
        first += rows[:count]
    return first


def by_prompt(
    examples: Sequence[data.Example],
    predictions: Sequence[str],
    rules: str,
    losses: Sequence[evaluation.RowLoss],
) -> dict[str, list]:
    """Return columns with an entry for each different prompt of a task, summed over its rows.

    They are task, rows, exact_match and rougeL in per cent, loss in nats, and tokens. See tables.py
    for what they mean. A task is a position in "tasks", the names.
    """
    names = list(dict.fromkeys(example.task for example in examples))
    found = {}
    for i, example in enumerate(examples):
        prompt = example.task, example.source_ids.tobytes()
        of_prompt = found.setdefault(prompt, {"task": names.index(example.task)})
        texts = predictions[i], example.references, rules
        row = {
            "rows": 1,
            "exact_match": 100 * metrics.exact_match(*texts),
            "rougeL": 100 * metrics.rouge_l(*texts),
            "loss": losses[i].nats,
            "tokens": losses[i].tokens,
        }
        for name, value in row.items():
            of_prompt[name] = of_prompt.get(name, 0) + value
    prompts = list(found.values())
    columns = {name: [prompt[name] for prompt in prompts] for name in prompts[0]}
    return {"tasks": names, **columns}


def replaced_w(
    kind: str,
    config: train.TrainConfig,
    base: Backbone,
    adapters: Adapters,
    dev: Sequence[data.Example],
    examples: Sequence[data.Example],
) -> Tensor | None:
    """Return w (M,K) for the examples, or None for kind "": then the router's own w is used.

    kind: with "mean" every example gets the mean w of dev, with "other" the w of another example.
    """
    if kind == "mean":  # of dev, since nothing may be learnt from what is scored
        w = evaluation.router_weights(base, adapters, dev, config.eval_batch_size)
        return w.mean(dim=0).expand(len(examples), -1)
    if kind == "other":
        w = evaluation.router_weights(base, adapters, examples, config.eval_batch_size)
        order = torch.randperm(len(w), generator=runtime.generator(config.seed))
        other = torch.empty_like(w)
        other[order] = w[order.roll(1)]  # no example keeps its own
        return other
    return None


# ------------------------------------------------------------------------------ many at a time


GRACE = 60  # seconds that a worker has to save its run when its parent is gone


def _start_worker(threads: int, own_methods: Sequence[str], device: torch.device) -> None:
    """Prepare a worker: set its threads and GPU, load own methods, end it with its parent."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # between two cells there is nothing to save
    for method in own_methods:
        load_method(method)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os.kill(os.getpid(), signal.SIGTERM)  # a run that trains finishes its step and saves
        time.sleep(GRACE)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    if device.type == "cuda":
        runtime.pick_device(device.index)  # makes it current, and changes settings of torch


def _in_worker(cell: Cell, device: runtime.Device) -> bool:
    """Make a cell in a worker. A signal outside of training stops it at once."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # raises KeyboardInterrupt
    try:
        return run_cell(cell, device)
    except KeyboardInterrupt:
        return False
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _block_sigint() -> None:
    """Keep Ctrl-C from the processes that this thread starts. They stop by SIGTERM alone.

    Python would print a traceback in a worker that is still starting.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


@contextlib.contextmanager
def _pass_on_signals(stopped: threading.Event) -> Iterator[None]:
    """Tell the workers when this process is told to stop, and set `stopped`.

    A second Ctrl-C ends them at once.
    """

    def pass_on(number, _frame):
        at_once = number == signal.SIGINT and stopped.is_set()
        stopped.set()
        for worker in multiprocessing.active_children():
            if at_once:
                worker.kill()
            else:
                worker.terminate()  # which sends SIGTERM

    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, pass_on)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def share_cores(jobs: int, device: runtime.Device) -> int:
    """Set the threads of one cell. Return how many cells are made at a time.

    jobs: as in StudyConfig. A single cell gets no more threads than one of several, since its
    numbers must be the same.
    """
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    if jobs == 0:
        jobs = 1 if device.torch_device.type == "cuda" else min(cores, 8)
    share = max(1, cores // jobs)
    torch.set_num_threads(min(share, torch.get_num_threads()))  # OMP_NUM_THREADS may say fewer
    return jobs


class StudyProgress:
    """Prints how far a study is: a line for each finished run and, with workers, one each minute.

    trials: how many trials of each row are left when the study begins. others: how many other runs.
    Without these counts it does not print how many runs are left.
    """

    def __init__(self, trials: dict[str, int] | None = None, others: int = 0):
        self.trials = Counter(trials)
        self.others = others
        self.expected = self.trials.total() + others
        self.seconds: list[float] = []  # of each finished run
        self.running: dict[Path, Cell] = {}

    def rounds(self, jobs: int) -> int:
        """Return how many runs follow one another if `jobs` are made at a time.

        The trials of a row are made one after the other, and all trials before other runs.
        """
        longest = max(self.trials.values(), default=0)
        of_trials = max(longest, math.ceil(self.trials.total() / jobs))
        return of_trials + math.ceil(self.others / jobs)

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Within the `with` block print once a minute which step each running cell has reached."""
        ended = threading.Event()

        def report():
            while not ended.wait(60):
                running = list(self.running.values())
                if running:
                    program.print_line("; ".join(map(reached, running)))

        thread = threading.Thread(target=report, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def finished(self, cell: Cell, jobs: int) -> None:
        """Print that a cell is finished. In a planned study only trials show their dev losses."""
        result = cell.result()
        if cell.row.is_run:
            self.seconds.append(result["seconds"])
            if cell.is_trial:
                self.trials[cell.name] -= 1
            else:
                self.others -= 1
        parts = [str(cell.path), duration(result["seconds"])]
        if "diverged" in result:
            parts.append("diverged")
        elif "dev_loss" in result and cell.scores != "replicate":
            parts.append(f"dev loss {result['dev_loss']:.4f}")
        if cell.row.is_run and len(self.seconds) < self.expected:
            parts.append(f"{len(self.seconds)} of {self.expected} runs")
            parts.append(f"about {duration(self.rounds(jobs) * fmean(self.seconds))} left")
        program.print_line(", ".join(parts))


def reached(cell: Cell) -> str:
    """Return which step the run of a cell has reached."""
    steps = cell.settings.steps
    log = cell.folder / "metrics.jsonl"
    content = log.read_bytes() if log.exists() else b""
    *complete, _ = content.split(b"\n")  # the run may be writing the last line
    step = json.loads(complete[-1])["step"] + 1 if complete else 0
    if step == steps or not cell.row.trains:
        return f"{cell.path.stem}: being scored"
    return f"{cell.path.stem}: step {step} of {steps}"


def duration(seconds: float) -> str:
    """Return a time in seconds, minutes or hours, as a person would say it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"


def run_cells(
    queues: Sequence[Iterable[Cell]],
    jobs: int,
    device: runtime.Device,
    progress: StudyProgress | None = None,
) -> None:
    """Make all cells that are not finished, `jobs` at a time.

    The cells of one queue are made one after the other. The next one is taken when the one before
    it is finished. Exit with code 130 if a signal stopped a cell. Raise UserError if a cell other
    than a trial diverged, after all others are made.
    """
    jobs = share_cores(jobs, device)
    progress = progress or StudyProgress()
    stopped = threading.Event()
    diverged = []

    def finish(queue, run):
        for cell in queue:
            cell.require_same()
            if stopped.is_set():
                return
            if not cell.path.exists():
                progress.running[cell.path] = cell
                is_finished = run(cell, device)
                del progress.running[cell.path]
                if not is_finished:
                    stopped.set()
                    return
                progress.finished(cell, jobs)
            # A search tries other values. Any other cell would have no scores in its table.
            if not cell.is_trial and "diverged" in cell.result():
                diverged.append(str(cell.path))

    if jobs == 1 or len(queues) < 2:  # here the bars of training and scoring show how far they are
        try:
            for queue in queues:
                finish(queue, run_cell)
        except KeyboardInterrupt:  # outside of training, which ends its step and saves
            stopped.set()
    else:
        spawn = multiprocessing.get_context("spawn")  # a fork would inherit torch's locks
        own_methods = [method.source for method in OWN_METHODS.values()]
        started_with = (torch.get_num_threads(), own_methods, device.torch_device)
        with (
            _pass_on_signals(stopped),
            progress.watch(),
            ProcessPoolExecutor(jobs, spawn, _start_worker, started_with) as workers,
            # Each thread blocks SIGINT, submits cells, and waits for them. The workers that it
            # starts inherit the blocked signal.
            ThreadPoolExecutor(jobs, initializer=_block_sigint) as waiting,
        ):

            def run(cell, device):
                try:
                    return workers.submit(_in_worker, cell, device).result()
                except BrokenProcessPool:
                    if stopped.is_set():  # the signal ended a worker that was still starting
                        return False
                    raise UserError(
                        f"{cell.path}: a process was killed while cells were made, perhaps since "
                        "memory ran out; run the same command with fewer --jobs"
                    ) from None

            futures = [waiting.submit(finish, queue, run) for queue in queues]
            try:
                for future in as_completed(futures):  # the first one that fails ends the others
                    future.result()
            except BaseException:
                stopped.set()  # no further cells
                for worker in multiprocessing.active_children():
                    worker.terminate()  # by SIGTERM: a run that trains finishes its step and saves
                raise
    if stopped.is_set():
        program.print_line("stopped; run the same command to continue")
        raise SystemExit(130)
    if diverged:
        raise UserError(
            f"{min(diverged)}: the run diverged and has no scores; give a lower --lr-skills and "
            "another --out"
        )


# ----------------------------------------------------------------------------------------- study


def file_name(row: str) -> str:
    """Return the name of a row for files: "K = 1" gives "K___1"."""
    return re.sub(r"[^\w.-]", "_", row)


@functools.cache
def kind_of_cpu() -> str:
    """Return the kind of CPU. The numbers of a cell may differ a little from kind to kind."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor()
    values = {}
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        values.setdefault(name.strip(), value.strip())
    names = ("model name", "cpu family", "model")
    return ", ".join(values[name] for name in names if name in values)


@functools.cache
def facts_of(config: DataConfig, model: str) -> tuple[dict[str, str], int]:
    """Return fingerprints of base, tokenizer and tasks, and the number of training tasks."""
    tokenizer = tokenizers.load(model)
    sets = data.load_sets(config, tokenizer)
    base = checkpoint.load(model, dtype=None)
    facts = {"base": base.fingerprint, "tokenizer": tokenizer.fingerprint}
    return facts | digests_of(sets), len(data.require_set(sets, "train", config).tasks)


class Study:
    """What all cells of a study share.

    settings: those that all rows share; rows change some of them. equal: rows that get extra ranks,
    so that all of them have one total size.
    """

    def __init__(
        self,
        settings: train.Settings,
        device: runtime.Device,
        config: StudyConfig,
        equal: dict[str, Variant],
    ):
        if settings.alpha is None:
            # This is what None means. A number can be tuned, and holds for rows of another rank.
            settings = changed(settings, {"alpha": float(settings.rank)})
        self.settings = settings
        self.device = device
        self.config = config
        self.equal = equal
        self.results = Path(config.results or config.out)
        self.best: dict[str, dict[str, float]] = {}  # tuned values of each row
        self.progress = StudyProgress()
        self.epochs = 0.0  # of a run; known when the data are read

    def settings_of(self, name: str, row: Variant, values: dict[str, Any]) -> train.Settings:
        """Return the settings of a row, with its extra rank and its tuned values.

        values: settings of all rows of this stage. The row's own settings override them.
        """
        settings = changed(self.settings, values)
        _, num_tasks = facts_of(settings.part(DataConfig), settings.model)
        like = row.like or name
        size = {}
        if like in self.equal:
            equal_rows = []
            for equal_name, equal_row in self.equal.items():
                # alpha does not change the size. Without it equal_ranks can use its cache.
                of_row = changed(settings, equal_row.settings | {"alpha": None})
                equal_rows.append((equal_name, of_row.method, of_row.part(OrchMoEConfig)))
            with program.checking_settings():
                config = checkpoint.read_config(settings.model)
                ranks = equal_ranks(tuple(equal_rows), config, num_tasks)
            size["extra_rank"] = ranks[like]
        return changed(settings, size | self.best.get(like, {}) | values | row.settings)

    def cell(
        self, file: str, name: str, row: Variant, values: dict[str, Any], scores: str = "answers"
    ) -> Cell:
        """Return the cell of a row. file: its name below the folder of results.

        values: see `settings_of`.
        """
        settings = self.settings_of(name, row, values)
        of_data, _ = facts_of(settings.part(DataConfig), settings.model)
        facts = of_data | {"computed": f"{self.device.torch_device.type}, {self.device.dtype}"}
        if self.device.torch_device.type == "cpu":
            facts["cpu"] = kind_of_cpu()
        if settings.method in OWN_METHODS:
            facts["method_file"] = OWN_METHODS[settings.method].kind
        run = row.run.format(seed=settings.seed)
        return Cell(
            name=name,
            row=row,
            settings=settings,
            facts=facts,
            path=self.results / f"{file}.json",
            folder=Path(self.config.out, run or file),
            scores=scores,
        )

    def cells(
        self,
        stage: str,
        rows: dict[str, Variant],
        values: dict[str, Any],
        seeds: Iterable[int],
        scores: str = "answers",
    ) -> list[Cell]:
        """Return the cells of all rows with all seeds. For values see `settings_of`.

        A row that does not train has one cell, since it is the same with each seed.
        """
        cells = []
        for number, seed in enumerate(seeds):
            for name, row in rows.items():
                if number > 0 and not row.trains:
                    continue
                file = f"{stage}/{file_name(name)}-s{seed}"
                cells.append(self.cell(file, name, row, values | {"seed": seed}, scores))
        return cells

    def run(self, cells: Sequence[Cell]) -> None:
        """Make the cells that are not finished. Those that share a run are made in turn."""
        queues = {}
        for cell in cells:
            cell.require_same()  # before any of them is made
            queues.setdefault(cell.folder, []).append(cell)
        run_cells(list(queues.values()), self.config.jobs, self.device, self.progress)

    def searches(self, rows: dict[str, Variant]) -> dict[str, Search]:
        """Return the search of each row."""
        searches = {}
        for name, row in rows.items():
            settings = self.settings_of(name, row, {})
            read = settings_of_method(settings.method)
            start = {axis: getattr(settings, axis) for axis in self.config.axes if axis in read}
            if not start:
                axes = ",".join(self.config.axes)
                raise UserError(f"--axes {axes}: {name} has none of these; add lr_skills")
            trial = functools.partial(self.trial, name, row)
            searches[name] = Search(start, self.config.trials, trial)
        return searches

    def tune(self, rows: dict[str, Variant]) -> dict[str, dict]:
        """Find the values of each row that are best on dev, with seed 0, for all later cells.

        Return the reports of the searches. Warn of a best value that is on the edge of what was
        tried.
        """
        searches = self.searches(rows)
        run_cells(list(searches.values()), self.config.jobs, self.device, self.progress)

        reports = {name: search.report() for name, search in searches.items()}
        for name, report in reports.items():
            if report["dev_loss"] == math.inf:
                raise UserError(f"{name}: all trials diverged; start from a lower --lr-skills")
            for axis in report["edges"]:
                best = f"the best {axis}, {report['best'][axis]:g}"
                program.warn(
                    f"{name}: {best}, is on the edge of what was tried; in another --out, more "
                    f"--trials or a start there by {program.flag(axis)} may find a better one"
                )
            self.best[name] = report["best"]
        return reports

    def trial(self, name: str, row: Variant, values: dict[str, float], scores: str = "dev") -> Cell:
        """Return the cell of a trial. values: that of each axis."""
        tag = "_".join([file_name(name), *(f"{value:g}" for value in values.values())])
        return self.cell(f"tune/{tag}", name, row, values, scores)
