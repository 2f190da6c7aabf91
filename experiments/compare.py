"""OrchMoE against its baselines at equal size: methods x seeds, each cell a run of train.py in a folder of
its own, in the same order of data and with the same number of steps. First every method is tuned over all
that it trains, rates and scale, with the same number of trials, on dev; results are of seen and unseen
instances, which nothing is chosen by. Interrupted, the same command goes on; finished cells stay.

    python -m experiments.compare                            # tuning, then all methods
    python -m experiments.compare --ablations                # OrchMoE with one thing changed at a time
    python -m experiments.compare --dry-run --model t5-xxl   # sizes and memory alone

Writes OUT/results.json and OUT/results.md (ablations.json, ablations.md), and figures where matplotlib is
there. Test: `pytest tests/experiments/test_compare.py`"""

from __future__ import annotations

import importlib.util
import itertools
import json
import multiprocessing
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import checkpoint
import data
import eval as evaluation
import run_folder
import runtime
import t5
import tokenizer as tokenizers
import train
from baselines import METHODS, count_parameters
from experiments import plot, routing
from experiments.search import Search, axes_of
from experiments.sizes import budget, on_meta, parameters
from experiments.tables import markdown, summarise
from model import Backbone
from orchmoe import Adapters, OrchMoEConfig, TaskRouter
from run_folder import PATHS

ADAPTED = tuple(name for name in METHODS if name not in ("full", "orchmoe-factors"))
EQUAL = tuple(name for name in ADAPTED if name != "c-poly")  # c-poly's private skills grow with the tasks
UNTRAINED = ("frozen base", "copy-demo", "copy-input")  # rows without a run
SIZES = {name: t5.T5Config(32128, d_model, 64, d_ff, layers, layers, heads, feed_forward_proj="gated-gelu",
                              scale_decoder_outputs=False, tied_head=False)
         for name, d_model, d_ff, layers, heads in [  # T5 v1.1, for --dry-run
             ("t5-small", 512, 1024, 8, 6), ("t5-base", 768, 2048, 12, 12), ("t5-large", 1024, 2816, 24, 16),
             ("t5-xl", 2048, 5120, 24, 32), ("t5-xxl", 4096, 10240, 24, 64)]}  # fmt: skip


@dataclass(frozen=True)
class CompareConfig:
    """Comparison: what is compared, and where it computes."""

    out: str = "results/compare"  # folder of the cells and the results
    methods: tuple[str, ...] = ADAPTED  # methods to compare
    seeds: int = 3  # runs of each cell: initial values, order, noise
    tune: bool = True  # choose rates and scale on dev; else as given
    trials: int = 12  # runs, of seed 0, that each method is tuned by
    ablations: bool = False  # OrchMoE with one thing changed at a time, instead of the methods
    rows: tuple[str, ...] = ()  # of these ablations (default: all)
    dry_run: bool = False  # print parameters and memory, and stop
    jobs: int = 0  # cells at a time (0: one on a GPU; on the CPU one a core, of one thread, at most 8)
    gpu: int | None = None  # number of the GPU (default: 0, where there is one)
    device: Literal["cpu", ""] = ""  # no GPU even if there is one

    def __post_init__(self) -> None:
        runtime.require_least(self, seeds=1, trials=1, jobs=0)
        for name, choices in {"methods": (*ADAPTED, "full"), "rows": tuple(ABLATIONS)}.items():
            given = getattr(self, name)
            if odd := set(given) - set(choices) or {row for row in given if given.count(row) > 1}:
                raise ValueError(f"--{name} {sorted(odd)[0]}: choose, once each, of {', '.join(choices)}")
        if not self.methods:
            raise ValueError(f"--methods: name at least one of {', '.join(ADAPTED)}")


DEFAULTS = {"steps": 200, "eval_instances": 280, "lr_skills": 1e-2}
CLASSES = (train.TrainConfig, data.DataConfig, OrchMoEConfig)
FIXED = ("method", "seed", "extra_rank", "start", "trainable", "loras")  # the comparison itself sets these

# Each row's one difference from the first; S R and the scale alpha / (S R) stay what they are in it.
ABLATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "router: token": {"router": "token"},  # its rate, lr_token_router, is tuned by trials of its own
    "router: none": {"router": "none"},
    "router: random": {},  # `random_forward` in place of the router, in training and evaluation
    "w replaced by its mean": {},  # at evaluation, as the next: they score the default's runs
    "w of another sample": {},
    "router start: normal": {"router_init": "normal"},
    "attention off": {"router_attention": False},
    "w without softmax": {"router_norm": "none"},
    "w = 1/K for half of the samples": {"router_dropout": 0.5},
    "Gumbel noise on": {"gumbel": True},
    "allocation start: sd 1": {"allocation_std": 1.0},
    "allocation start: sd 0.001": {"allocation_std": 1e-3},
    "K = 1": {"tasks": 1}, "K = 4": {"tasks": 4}, "K = 16": {"tasks": 16},
    "S = 1": {"skills": 1}, "S = 2": {"skills": 2}, "S = 8": {"skills": 8},
    "factors mixed": {"method": "orchmoe-factors"},
}  # fmt: skip
ORACLE = "oracle: w is the category"
SCORED_ONLY = ("w replaced by its mean", "w of another sample")


# ------------------------------------------------------------------------------------------------- accounting


def dry_run(methods: Sequence[str], base: Backbone, adapter: OrchMoEConfig, num_tasks: int) -> str:
    """Parameters and memory of each method as Markdown, counted on the meta device: nothing is allocated."""
    extra_ranks, size = budget(EQUAL, base, adapter, num_tasks), sum(p.numel() for p in base.parameters())
    lines = [f"base: {size:,} parameters, frozen: {_bytes(4 * size)} in float32, {_bytes(2 * size)} in "
             f"bfloat16; T = {num_tasks}", "",
             "| method | S R | extra ranks | skills | routing | total | of the base | weights | gradients "
             "| AdamW |", "|---|" + "---:|" * 9]
    for name in methods:
        extra = extra_ranks.get(name, 0)
        sizes = parameters(name, base, adapter, extra_rank=extra, num_tasks=num_tasks)
        total = sum(sizes.values())
        cells = [name + "*" * (name == "c-poly"), adapter.skills * adapter.rank, extra,
                 *(f"{n:,}" for n in (*sizes.values(), total)), f"{100 * total / size:.3f} %",
                 *(_bytes(4 * k * total) for k in (1, 1, 2))]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if "c-poly" in methods:
        lines += ["", "* at equal S R only: its private skills grow with the number of tasks"]
    return "\n".join(lines)


def _bytes(n: float) -> str:
    power = 0
    while n >= 1000 and power < 4:
        n, power = n / 1000, power + 1
    return f"{n:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


# ------------------------------------------------------------------------------------------------------ cells


class Cell(NamedTuple):
    """One run, or another scoring of one: of the finished run in the folder `of`, or of that of the cell
    `first`, which is trained where it is not there. Without `closing` it ends with the dev loss, without
    `answers` with losses."""

    row: str
    folder: Path
    configs: train.Settings
    facts: dict[str, str]  # what else its numbers depend on: base, data, device, torch
    closing: bool = True
    answers: bool = True
    of: Path | None = None
    first: Cell | None = None
    kept: Path | None = None  # the file that keeps settings and scores, if not two in the folder

    @property
    def scores(self) -> dict[str, Any] | None:
        """What is written last: None before the cell is finished."""
        path = self.kept or self.folder / "scores.json"
        return runtime.read_json(path) if path.exists() else None

    @property
    def settings(self) -> dict[str, Any]:
        """All that the numbers depend on, as JSON has it. What is kept for others names no place of ours: its
        facts tell base and data."""
        fields = {name: value for name, value in self.configs.values().items()
                  if not (self.kept and name in PATHS)}
        return json.loads(json.dumps({"row": self.row} | fields | self.facts))

    def check(self) -> None:
        """ValueError where folder or file is of other settings than those now asked for."""
        if self.first:
            self.first.check()
        path, made = self.folder / "cell.json", ("cell.json", "config.json", "scores.json")
        found = {}
        if any((self.folder / name).exists() for name in made):
            found[self.folder] = runtime.read_json(path) if path.exists() else {}
        if self.kept and self.kept.exists():
            found[self.kept] = runtime.read_json(self.kept).get("settings", {})
        for place, kept in found.items():
            for name, value in self.settings.items():
                if kept.get(name) != value:
                    flag = "--results" if place == self.kept else "--out"
                    raise ValueError(f"{place}: made with {name} {kept.get(name)}, not {value}; "
                                     f"name another folder by {flag}, or delete this one")


def run_cell(cell: Cell, place: runtime.Device) -> bool:
    """Trains and scores one cell, from where it was stopped; false if it was stopped again."""
    began, result, run = time.monotonic(), {}, cell.first or cell
    trains = not cell.of and cell.row not in UNTRAINED
    with other_router(cell):
        for made in (cell, run):
            runtime.write_json(made.folder / "cell.json", made.settings)  # no number without its settings
        last = run.folder / "checkpoint.pt"
        done = last.exists() and checkpoint.read_torch(last)["step"] == run.configs.train.steps
        if trains and not (done or train.train(
                run.configs, place, train.LaunchConfig(out=str(run.folder)), final_scores=False)):
            return False
        if trains and run is cell:
            log = plot.records(cell.folder)
            result["dev_loss"] = min(record["dev_loss"] for record in log if "dev_loss" in record)
        if cell.closing:
            result |= closing_scores(cell, place)
        result["seconds"] = round(time.monotonic() - began)
        if cell.kept:
            result = {"settings": cell.settings, "tree": tree(), "torch": torch.__version__,
                      "threads": torch.get_num_threads()} | result  # which show in bfloat16
            if "learnt" in result:  # the means: the rest is five times all else
                learnt = {name: value for name, value in result["learnt"].items() if isinstance(value, float)}
                result["learnt"] = learnt
        runtime.write_json(cell.kept or cell.folder / "scores.json", result)  # last: what has it is finished
    return True


def load_sets(configs: train.Settings, tokenizer: tokenizers.Tokenizer) -> dict[str, Sequence[data.Example]]:
    """train, and dev, seen and unseen of at most --eval-instances."""
    sets = data.load_sets(configs.data, tokenizer)
    for name in ("dev", "seen", "test"):
        if name in sets:
            examples = data.subsample(sets.pop(name), configs.train.eval_instances)
            sets["unseen" if name == "test" else name] = examples
    return sets


def closing_scores(cell: Cell, place: runtime.Device) -> dict[str, Any]:
    """Scores on seen and unseen instances, of each task too the loss per target token; parameters, and what
    the router does."""
    config, result, size = cell.configs.train, {}, cell.configs.train.eval_batch_size
    tokenizer = tokenizers.load(config.model)
    sets = load_sets(cell.configs, tokenizer)
    if cell.row.startswith("copy"):
        root = cell.configs.data.data
        return {which: evaluation.score(sets[which], evaluation.copy_heuristic(cell.row, root, sets[which]))
                for which in ("seen", "unseen") if which in sets}
    if cell.row in UNTRAINED:
        base, adapters, _ = run_folder.load(place, model=config.model)
    else:
        base, adapters, _ = run_folder.load(place, run=cell.of or (cell.first or cell).folder)
        result["parameters"] = count_parameters(adapters)
    if cell.row == "w replaced by its mean":  # of dev: nothing is learnt from what is scored
        mean = evaluation.measure(base, adapters, sets["dev"], batch_size=size)[1].mean(0)
    for which in sorted(sets.keys() & {"seen", "unseen"}):
        examples, w = sets[which], None
        if cell.row == "w replaced by its mean":
            w = mean.expand(len(examples), -1)
        elif cell.row == "w of another sample":  # of the whole set, so most likely of another task
            _, w = evaluation.measure(base, adapters, examples, batch_size=size)
            w = w[torch.randperm(len(w), generator=runtime.generator(config.seed))]
        result[which] = {"overall": {}, "tasks": {task: {} for task in sorted({e.task for e in examples})}}
        if cell.answers:
            said = evaluation.predict(base, adapters, examples, tokenizer, batch_size=size, w=w)
            result[which] = evaluation.score(examples, said)
        for task, scores in result[which]["tasks"].items():  # per task, so that long targets weigh no more
            rows = [i for i, example in enumerate(examples) if example.task == task]
            scores["loss"], _ = evaluation.measure(base, adapters, [examples[i] for i in rows],
                                                   batch_size=size, w=w if w is None else w[rows])
        losses = [scores["loss"] for scores in result[which]["tasks"].values()]
        result[which]["overall"]["loss"] = sum(losses) / len(losses)
    other = cell.of or cell.first or cell.row in UNTRAINED or config.start  # a run's, or of one task alone
    if config.method.startswith("orchmoe") and not other:
        result["learnt"] = routing.report(base, adapters, sets["seen"], batch_size=size)
    return result


def other_router(cell: Cell) -> AbstractContextManager:
    """Inside, the router that the row's name asks for."""
    if cell.row == "router: random":
        return mock.patch.object(TaskRouter, "forward", random_forward)
    if "definition alone" in cell.row:
        alone = definition_features(cell.configs.train.model)
        return mock.patch.object(TaskRouter, "summarise", alone)
    if cell.row == ORACLE:
        return mock.patch.object(evaluation, "routed", by_category(cell))
    return nullcontext()


def definition_features(model: str) -> Callable:
    """TaskRouter.summarise of what stands before the words that end a prompt's definition and examples, which
    are known by their embeddings."""
    tokenizer, features = tokenizers.load(model), TaskRouter.summarise
    ids = tokenizer.source(" complete the following example")[len(tokenizer.bos_ids):]
    words = checkpoint.mapped(model).embed(torch.tensor([i for i in ids if i not in tokenizer.eos_ids]))

    def alone(router: TaskRouter, embeddings: Tensor, mask: Tensor) -> Tensor:
        here = embeddings.unfold(1, len(words), 1) == words.to(embeddings).T  # (B,L-m+1,D,m)
        behind = here.all(-1).all(-1).cumsum(1) > 0
        behind = torch.cat((behind, behind[:, -1:].expand(-1, len(words) - 1)), 1)  # (B,L)
        return features(router, embeddings, mask.bool() & ~behind)

    return alone


def by_category(cell: Cell) -> Callable:
    """evaluation.routed with an abstract task for each category that training tasks have, and w = 1/K for the
    categories of others."""
    config, routed, K = cell.configs.train, evaluation.routed, cell.configs.adapter.tasks
    examples = load_sets(cell.configs, tokenizers.load(config.model))["train"]
    known = sorted({example.category for example in examples})
    if len(known) > K:
        raise ValueError(f"--tasks {K}: there are {len(known)} categories")
    tasks = {example.task: known.index(example.category) for example in examples}

    def oracle(base: Backbone, adapters: Adapters, batch: data.Batch, **options: Any):
        w = torch.full((len(batch.ids), K), 1 / K)
        for row, task in enumerate(batch.task_ids.tolist()):
            if task >= 0:
                w[row] = torch.eye(K)[tasks[examples.tasks[task]]]
        return routed(base, adapters, batch, **options | {"w": w.to(base.device)})

    return oracle


def random_forward(router: TaskRouter, embeddings: Tensor, mask: Tensor | None = None) -> Tensor:
    """w (B,K) that says nothing of the sample, but is always the same for it: phases of projections of its
    features, so steep that neighbours share nothing; as sharp as a router starts, entropy ln K / 3."""
    features = router.summarise(embeddings, mask)
    K, D = router.W_task.shape
    steep = 1e3 * torch.randn(K, D, generator=runtime.generator(0)).to(features)
    return (8.5 * torch.sin(features @ steep.T)).softmax(-1)


def tree() -> str:
    """The commit that the numbers are of; nothing outside a clone."""
    with suppress(OSError):
        command = ["git", "-C", runtime.ROOT, "describe", "--always", "--dirty", "--exclude", "*"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return ""


def _worker(threads: int) -> None:
    """Outlives no parent that was killed outright: an orphan would wait for work forever."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(threads)


class InProcess(Executor):
    """Runs what is submitted at once."""

    def submit(self, function: Callable, /, *arguments: Any) -> Future:
        future = Future()
        future.set_result(function(*arguments))
        return future


def run_cells(queues: Sequence[Iterable[Cell]], config: CompareConfig, place: runtime.Device) -> None:
    """All cells that have no scores yet, --jobs at a time; those of one queue in turn, each asked for when
    the one before it is finished. SystemExit where a signal stopped them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = config.jobs or (1 if place.device.type == "cuda" else min(cores, 8))
    # Of a lone cell too: in bfloat16 the number of threads shows in the third digit.
    threads = min(torch.get_num_threads(), max(1, cores // jobs))
    torch.set_num_threads(threads)
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads, locked
    alone = min(jobs, len(queues)) < 2
    pool = InProcess() if alone else ProcessPoolExecutor(jobs, spawn, _worker, (threads,))
    waiting, running, whole = [iter(queue) for queue in queues], {}, True
    try:
        while whole and (waiting or running):
            while waiting and len(running) < jobs:
                if (cell := next(waiting[0], None)) is None:
                    waiting.pop(0)
                    continue
                cell.check()
                if cell.scores is None:
                    running[pool.submit(run_cell, cell, place)] = cell, waiting.pop(0)
            for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                cell, queue = running.pop(future)
                waiting.append(queue)
                whole = whole and future.result()
                if cell.scores is not None:
                    _say_done(cell)
    except KeyboardInterrupt:  # the workers have it too: they finish their step and save
        whole = False
    pool.shutdown()
    if not whole:
        runtime.print_line("stopped; the same command goes on")
        raise SystemExit(130)


def _say_done(cell: Cell) -> None:
    result = cell.scores
    what = [f"dev loss {result['dev_loss']:.4f}"] if "dev_loss" in result else []
    shown = ("seen",) if cell.kept else ("seen", "unseen")  # of the report's half is to be seen at the end
    what += [f"{which} {metric} {result[which]['overall'][metric]:.2f}" for metric in ("rougeL", "loss")
             for which in shown if metric in result.get(which, {}).get("overall", {})]
    runtime.print_line(f"{cell.folder}: {', '.join(what)}, {result['seconds']} s")


# ------------------------------------------------------------------------------------------------ the program


def changed(configs: train.Settings, **fields: Any) -> train.Settings:
    """The configs with these fields, whichever of them has each."""
    return train.Settings.from_flags(configs.values() | fields)


class Study(NamedTuple):
    """What all cells share."""

    config: CompareConfig
    configs: train.Settings
    place: runtime.Device
    facts: dict[str, str]
    num_tasks: int

    def cell(self, row: str, folder: str, fields: dict[str, Any], **options: Any) -> Cell:
        configs = changed(self.configs, **fields)
        return Cell(row, Path(self.config.out, folder), configs, self.facts, **options)

    def search(self, row: str, axes: Sequence[str], trials: int, fields: dict[str, Any]) -> Search:
        configs = changed(self.configs, **fields)
        start = {axis: configs.values()[axis] for axis in axes}
        if start.get("alpha", 0) is None:
            start["alpha"] = float(configs.adapter.rank)

        def cell_of(values: dict[str, float]) -> Cell:
            name = "_".join(f"{value:g}" for value in values.values())
            return self.cell(row, f"tune/{slug(row)}/{name}", fields | values, closing=False)

        return Search(axes, start, trials, cell_of)

    def tuned(self, searches: dict[str, Search]) -> dict[str, dict]:
        run_cells(list(searches.values()), self.config, self.place)
        return {row: search.report() for row, search in searches.items()}

    def fields_of(self, methods: Sequence[str]) -> dict[str, dict[str, Any]]:
        """What each method sets, at equal totals; c-poly's and full's size is as it is."""
        base = on_meta(checkpoint.read_config(self.configs.train.model))
        # of all methods, whichever are compared: a method's size does not depend on the others named
        extra = budget(EQUAL, base, self.configs.adapter, self.num_tasks)
        return {name: {"method": name, "extra_rank": extra.get(name, 0), "seed": 0} for name in methods}


def tune_methods(study: Study, methods: Sequence[str]) -> tuple[dict[str, dict], dict[str, dict]]:
    """{method: its fields with the best values}, and the reports; nothing is tuned with --no-tune."""
    fields, adapter = study.fields_of(methods), study.configs.adapter
    if not study.config.tune:
        return fields, {}
    searches = {name: study.search(name, axes_of(name, adapter), study.config.trials, fields[name])
                for name in methods}
    reports = study.tuned(searches)
    return {name: fields[name] | reports[name]["best"] for name in methods}, reports


def method_cells(study: Study) -> tuple[list[list[Cell]], dict[str, dict]]:
    """Queues of one cell each, and the reports on the tuning."""
    fields, reports = tune_methods(study, study.config.methods)
    queues = [[study.cell(name, f"cells/{name}-s{seed}", fields[name] | {"seed": seed})]
              for name in study.config.methods for seed in range(study.config.seeds)]
    return [*queues, *([study.cell(row, f"cells/{slug(row)}", {})] for row in UNTRAINED)], reports


def ablation_cells(study: Study) -> tuple[list[list[Cell]], dict[str, dict]]:
    """The same for the ablations, at what is best for OrchMoE in the comparison but with no extra ranks."""
    rows = [row for row in ABLATIONS if not study.config.rows or row in ("default", *study.config.rows)]
    for row in rows:
        ablation(row, study.configs.adapter)  # what is wrong with one, before hours of tuning
    found, reports = tune_methods(study, ["orchmoe"])
    default = found["orchmoe"] | {"extra_rank": 0}
    fields = {row: default | ablation(row, changed(study.configs, **default).adapter) for row in rows}
    if "router: token" in rows and study.config.tune:  # the default's router rate means nothing to it
        search = study.search("router: token", ["lr_token_router"], max(3, study.config.trials // 3),
                              fields["router: token"])
        reports |= study.tuned({"router: token": search})
        fields["router: token"] |= reports["router: token"]["best"]
    queues = []
    for seed in range(study.config.seeds):
        run = study.cell("default", f"ablations/default-s{seed}", fields["default"] | {"seed": seed})
        cells = [study.cell(row, f"ablations/{slug(row)}-s{seed}", fields[row] | {"seed": seed},
                            first=run if row in SCORED_ONLY else None) for row in rows]
        queues.append([cell for cell in cells if cell.first or cell.row == "default"])
        queues += [[cell] for cell in cells if not (cell.first or cell.row == "default")]
    return queues, reports


def ablation(row: str, adapter: OrchMoEConfig) -> dict[str, Any]:
    """The row's changes; with another S, R such that S R and the scale stay. ValueError where it is none."""
    changes = dict(ABLATIONS[row])
    if changes and all(getattr(adapter, name, None) == value for name, value in changes.items()):
        raise ValueError(f"--rows {row}: the settings given have that already; leave out the row or the flag")
    if row in SCORED_ONLY and adapter.router != "sample":
        raise ValueError(f"--rows {row}: --router {adapter.router} has no w of a sample; leave one out")
    if skills := changes.get("skills"):
        total = adapter.skills * adapter.rank
        if total % skills:
            raise ValueError(f"--rows {row}: S R = {total} is no multiple of {skills}; leave out the row")
        alpha = adapter.rank if adapter.alpha is None else adapter.alpha
        changes |= {"rank": total // skills, "alpha": alpha}
    return changes


def slug(row: str) -> str:
    return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in row)


def facts_of(configs: train.Settings, tokenizer: tokenizers.Tokenizer, place: runtime.Device
             ) -> tuple[dict[str, str], int]:
    """What cells of these configs depend on beside them, and the number of training tasks."""
    lists = data.read_splits(configs.data.data, configs.data.splits)
    sets = data.load_sets(configs.data, tokenizer, ["train"] + ["test"] * bool(lists["test"]))
    facts = {"base": checkpoint.fingerprint(configs.train.model), "tokenizer": tokenizer.fingerprint,
             **{f"{name}_tasks": part.digest for name, part in sets.items()},
             "computed": f"{place.device.type}, {place.dtype}"}
    return facts, len(sets["train"].tasks)


def compare(config: CompareConfig, configs: train.Settings, place: runtime.Device) -> str:
    """Runs what is missing, writes the results and returns the tables."""
    tokenizer = tokenizers.load(configs.train.model)
    facts, num_tasks = facts_of(configs, tokenizer, place)
    facts["torch"] = torch.__version__
    study = Study(config, configs, place, facts, num_tasks)
    queues, tuning = (ablation_cells if config.ablations else method_cells)(study)
    run_cells(queues, config, place)
    rows: dict[str, list[dict]] = {}
    for cell in itertools.chain(*queues):
        rows.setdefault(cell.row, []).append({"row": cell.row, "folder": str(cell.folder), **cell.scores})
    first = "default" if config.ablations else "orchmoe" if "orchmoe" in rows else config.methods[0]
    rows = {row: rows[row] for row in sorted(rows, key=lambda row: row != first)}
    summary = summarise(rows)
    text, name = markdown(summary, tuning), "ablations" if config.ablations else "results"
    runtime.write_json(Path(config.out) / f"{name}.json", {
        "comparison": asdict(config), **asdict(configs), **facts,
        "tuning": tuning, "summary": summary, "cells": [cell for cells in rows.values() for cell in cells]})
    with runtime.atomic_write(Path(config.out) / f"{name}.md") as file:
        file.write(text.encode())
    return text


def require_used(flags: dict[str, Any]) -> None:
    """ValueError for a flag that would do nothing."""
    useless = dict.fromkeys(FIXED, "the comparison sets this itself")
    if flags.get("ablations"):
        useless["methods"] = "not with --ablations"
    else:
        useless["rows"] = "goes with --ablations"
    if not flags.get("tune", True):
        useless["trials"] = "not used with --no-tune"
    for name, why in useless.items():
        if name in flags:
            raise ValueError(f"--{name.replace('_', '-')}: {why}; leave it out")


def main() -> None:
    classes = CompareConfig, *CLASSES
    flags = runtime.read_flags(__doc__, *classes, defaults=DEFAULTS, hidden=FIXED)
    require_used(flags)
    runtime.require_single_process()
    config = runtime.from_flags(CompareConfig, flags)
    configs = train.Settings.from_flags(DEFAULTS | flags)
    if config.dry_run:
        name, root = configs.train.model, configs.data
        base = on_meta(SIZES.get(name) or checkpoint.read_config(runtime.require_path(
            Path(name) / "config.json", f"name a model's folder, or one of {', '.join(SIZES)}").parent))
        tasks = data.read_splits(root.data, root.splits)["train"][:root.max_tasks or None]
        runtime.print_line(dry_run(config.methods, base, configs.adapter, len(tasks)))
        return
    cell = configs.train
    place = runtime.pick_device(config.gpu, config.device, cell.dtype, base=cell.model)
    runtime.print_line(place.description)
    runtime.print_line(compare(config, configs, place))
    if importlib.util.find_spec("matplotlib"):
        for path in plot.figures(Path(config.out)):
            runtime.print_line(f"written: {path}")
    else:
        runtime.print_line("no matplotlib here, so no figures; with it: "
                    f"python -m experiments.plot --results {config.out}")


if __name__ == "__main__":
    runtime.run_program(main)
