"""OrchMoE against its baselines at equal size: methods x seeds x training sizes, each cell a run of train.py
in a folder of its own, in the same order of data and with the same number of steps. Learning rates are chosen
on dev instances with equal effort for each method; results are of seen and unseen instances, which nothing is
chosen by. Interrupted, the same command goes on; finished cells are not run again.

    python compare.py                            # rates (rates.json), all methods, curve over training sizes
    python compare.py --ablations                # then: OrchMoE with one thing changed at a time
    python compare.py --quick                    # five minutes, for a look
    python compare.py --dry-run --model t5-xxl   # sizes and memory alone; a folder with config.json will do

Writes OUT/results.json and OUT/results.md (ablations.json, ablations.md), and figures where matplotlib is
there. Test: pytest tests/test_compare.py"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import data
import eval as evaluation
import plot
import runtime
import t5
import train
from baselines import METHODS, NoAdapter, attach_method, budget, count
from orchmoe import OrchMoEConfig, target_linears

ADAPTED = tuple(name for name in METHODS if name not in ("full", "orchmoe-factors"))
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
    methods: tuple[str, ...] = ADAPTED  # methods at the largest size
    seeds: int = 3  # runs of each cell: initial values, order, noise; the splits stay those of seed 0
    sizes: tuple[str, ...] = ("10", "30", "100")  # training instances of a task
    curve: tuple[str, ...] = ("orchmoe", "lora", "moe-lora")  # methods at all sizes
    budget: Literal["total", "rank"] = "total"  # equal total parameters within 3 %, or equal S R
    tune: bool = True  # choose --lr-skills on dev where OUT/rates.json does not say it; else as given
    grid: tuple[str, ...] = ("1e-3", "3e-3", "1e-2", "3e-2")  # rates that are tried for each method
    full_grid: tuple[str, ...] = ("1e-4", "3e-4", "1e-3", "3e-3")  # and as --lr-full, for --methods full
    ablations: bool = False  # OrchMoE with one thing changed at a time, instead of the methods
    rows: tuple[str, ...] = ()  # of these ablations (default: all)
    quick: bool = False  # three methods, two seeds, one size, 200 steps, no tuning
    dry_run: bool = False  # print parameters and memory, and stop
    num_tasks: int = 0  # T of --dry-run (default: the training tasks of --data)
    jobs: int = 0  # cells at a time (0: one on a GPU; on the CPU one a core, of one thread, at most 8)
    gpu: int | None = None  # number of the GPU
    device: str = ""  # cpu or cuda:N instead

    def __post_init__(self) -> None:
        runtime.require_least(self, seeds=1, num_tasks=0, jobs=0)
        methods = (*ADAPTED, "full")
        known = {"methods": methods, "curve": methods, "rows": ABLATIONS}
        for name, choices in known.items():
            if unknown := set(getattr(self, name)) - set(choices):
                raise ValueError(f"--{name} {sorted(unknown)[0]}: choose of {', '.join(choices)}")
        if not self.methods:
            raise ValueError(f"--methods: name at least one of {', '.join(ADAPTED)}")
        for name, kind in (("sizes", int), ("grid", float), ("full_grid", float)):
            try:
                least = min(map(kind, getattr(self, name)), default=0)
            except ValueError:
                least = 0
            if not least > 0:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} {','.join(getattr(self, name))}: give positive numbers, as in "
                                 f"{','.join(vars(type(self))[name])}")


DEFAULTS = {"steps": 600, "split_seed": 0}
QUICK = {"methods": ("orchmoe", "lora", "moe-lora"), "seeds": 2, "sizes": ("100",), "tune": False,
         "steps": 200, "eval_instances": 280, "out": "results/quick"}
FIXED = ("method", "seed", "train_instances", "extra_rank", "from_scratch")  # what the comparison itself sets

# Each row's one difference from the first; lineage is two, a preset of train.py. S R stays 8, and alpha the
# default's 2: left out it would be the row's own R, and alpha / (S R), the scale of a rank, another.
ABLATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "router: token": {"router": "token"},
    "router: none": {"router": "none"},
    "w replaced by its mean": {},  # at evaluation; no training of its own
    "attention off": {"router_attention": False},
    "Gumbel noise on": {"gumbel": True},
    "w without softmax": {"router_norm": "none"},
    "router start: normal": {"router_init": "normal"},
    "router rate 1e-3": {"lr_router": 1e-3},
    "router rate 1e-2": {"lr_router": 1e-2},
    "allocation start: N(0, 1)": {"allocation_std": 1.0},
    "allocation start: N(0, 0.001)": {"allocation_std": 0.001},
    "K = 1": {"tasks": 1}, "K = 4": {"tasks": 4}, "K = 16": {"tasks": 16},
    "S = 1 with R = 8": {"skills": 1, "rank": 8, "alpha": 2.0},
    "S = 2 with R = 4": {"skills": 2, "rank": 4, "alpha": 2.0},
    "S = 8 with R = 1": {"skills": 8, "rank": 1, "alpha": 2.0},
    "factors mixed": {"method": "orchmoe-factors"},
    "preset lineage": train.PRESETS["lineage"],
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- accounting


def dry_run(config: CompareConfig, base_config: t5.T5Config, adapter: OrchMoEConfig,
            num_tasks: int) -> str:
    """Parameters and memory of each method as Markdown, of models on the meta device: nothing is
    allocated."""
    def fresh() -> t5.T5:
        with torch.device("meta"):
            return t5.T5(base_config)

    base = fresh()
    extra = extra_ranks(config, adapter, fresh(), num_tasks)
    size, linears = sum(p.numel() for p in base.parameters()), len(target_linears(base, adapter.targets))
    lines = [f"base: {size:,} parameters, frozen: {_bytes(4 * size)} in float32, {_bytes(2 * size)} in "
             f"bfloat16; {linears} adapted Linears, T = {num_tasks}, --budget {config.budget}", "",
             "| method | S R | extra ranks | skills | routing | total | of the base | weights | gradients "
             "| AdamW |", "|---|" + "---:|" * 9]
    for name in dict.fromkeys((*config.methods, "full")):
        true = count(attach_method(name, fresh(), adapter, extra_rank=extra.get(name, 0),
                                   num_tasks=num_tasks))
        mark = "*" if name == "c-poly" and config.budget == "total" else ""
        ranks = ("-", "-") if name == "full" else (adapter.skills * adapter.rank, extra[name])
        cells = [name + mark, *ranks, f"{true.skills:,}", f"{true.routing:,}", f"{true.total:,}",
                 f"{100 * true.total / size:.3f} %", *(_bytes(4 * k * true.total) for k in (1, 1, 2))]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if any("c-poly*" in line for line in lines):
        lines += ["", "* at equal S R only: its private skills grow with the number of tasks"]
    return "\n".join(lines)


def _bytes(n: float) -> str:
    power = 0
    while n >= 1000 and power < 4:
        n, power = n / 1000, power + 1
    return f"{n:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def extra_ranks(config: CompareConfig, adapter: OrchMoEConfig, base: t5.T5,
                num_tasks: int) -> dict[str, int]:
    """The extra ranks of each method at the budget; c-poly has none, whatever the budget."""
    free = ("c-poly", "full") if config.budget == "total" else config.methods
    equal = [name for name in config.methods if name not in free]
    rest = dict.fromkeys(config.methods, 0)
    return rest | (budget(equal, base, adapter, num_tasks) if equal else {})


# ------------------------------------------------------------------------------------------------------ cells


class Cell(NamedTuple):
    """One run. Without `closing` it ends with the dev loss; `mean_of` names the run whose w is replaced by
    its mean; the rows of UNTRAINED are not trained."""

    row: str
    folder: Path
    configs: dict[str, Any]
    closing: bool = True
    mean_of: Path | None = None

    @property
    def scores(self) -> Path:
        return self.folder / "scores.json"

    def result(self) -> dict[str, Any]:
        config = self.configs["train"]
        return {"row": self.row, "method": config.method, "seed": config.seed, "folder": str(self.folder),
                "size": self.configs["data"].train_instances, **runtime.read_json(self.scores)}


def run_cell(cell: Cell, place: runtime.Device) -> bool:
    """Trains and scores one cell, from where it was stopped; false if it was stopped again. scores.json comes
    last, so a cell that has it is finished."""
    began, result = time.monotonic(), {}
    config, data_config, adapter = (cell.configs[name] for name in ("train", "data", "adapter"))
    tokenizer = data.Tokenizer(config.model)
    if cell.row in UNTRAINED:
        base = train.load_base(config, place)
        adapters = NoAdapter(base, full=False)
    else:
        folder = cell.mean_of or cell.folder
        with runtime.claimed(cell.folder):
            if not (cell.mean_of or train.run(folder, cell.configs, place, closing=False)):
                return False
        losses = [row["dev_loss"] for row in plot.records(folder) if "dev_loss" in row]
        result = {"dev_loss": min(losses), "parameters": None}
        if cell.closing:
            base, adapters = evaluation.load_run(folder, place)
            result["parameters"] = count(adapters)._asdict()
    if cell.closing:
        train_set, sets = train.load_sets(tokenizer, config, data_config)
        size, w = config.eval_batch_size, None
        if cell.mean_of:
            w = evaluation.router_weights(base, adapters, sets["dev"], batch_size=size)
            w = w.mean(0).to(base.device)
        for which in sorted(sets.keys() - {"dev"}):
            if cell.row.startswith("copy"):
                said = evaluation.copy_heuristic(cell.row, data_config.data, sets[which])
            else:
                said = evaluation.predict(base, adapters, sets[which], tokenizer, batch_size=size, w=w)
            result[which] = evaluation.score(sets[which], said)
        if config.method.startswith("orchmoe") and cell.row not in UNTRAINED and not cell.mean_of:
            result["learnt"] = evaluation.routing_report(base, adapters, sets["seen"], batch_size=size)
            start = attach_method(config.method, fresh := train.load_base(config, place), adapter,
                                  generator=runtime.generator(config.seed, 0))
            train.fit_router(fresh, start, train_set, config)
            result["start"] = evaluation.routing_report(fresh, start, sets["seen"], batch_size=size)
    runtime.write_json(cell.scores, result | {"seconds": round(time.monotonic() - began)})
    return True


def check_cell(cell: Cell) -> None:
    """ValueError where the cell's folder is of other settings than those now asked for."""
    if not (cell.folder / "config.json").exists():
        return
    kept = evaluation.read_run(cell.folder)
    for name, wanted in cell.configs.items():
        for field, value in json.loads(json.dumps(asdict(wanted))).items():
            if kept[name].get(field) != value:
                raise ValueError(f"{cell.folder}: made with {field} {kept[name].get(field)}, not {value}; "
                                 "name another folder by --out, or delete this one")


def _worker(threads: int) -> None:
    runtime.end_with_parent()
    torch.set_num_threads(threads)


def run_cells(cells: Sequence[Cell], config: CompareConfig, place: runtime.Device) -> None:
    """All cells that have no scores yet, --jobs at a time; SystemExit where a signal stopped them."""
    for cell in cells:
        check_cell(cell)
    todo = [cell for cell in cells if not cell.scores.exists()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = max(1, min(config.jobs or (1 if place.device.type == "cuda" else min(cores, 8)), len(todo)))
    runtime.say(f"{len(cells)} cells, {len(cells) - len(todo)} finished before; {jobs} at a time")
    bar = runtime.progress(None, "cells", len(todo), "cell")
    if jobs == 1:
        whole = all(run_cell(cell, place) and _say_done(cell, bar) for cell in todo)  # until one is stopped
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, spawn, _worker, (max(1, cores // jobs),)) as pool:
            futures = [pool.submit(run_cell, cell, place) for cell in todo]
            try:
                whole = True
                for cell, future in zip(todo, futures, strict=True):
                    whole = whole and future.result() and _say_done(cell, bar)
                    if not whole:
                        break
            except KeyboardInterrupt:  # the workers have it too: they finish their step and save
                whole = False
            pool.shutdown(cancel_futures=True)
    bar.close()
    if not whole:
        runtime.say("stopped; the same command goes on")
        raise SystemExit(130)


def _say_done(cell: Cell, bar: tqdm) -> bool:
    bar.update()
    result = runtime.read_json(cell.scores)
    what = [f"dev loss {result['dev_loss']:.4f}"] if "dev_loss" in result else []
    what += [f"{which} ROUGE-L {result[which]['overall']['rougeL']:.2f}" for which in ("seen", "unseen")
             if which in result]
    runtime.say(f"{cell.folder}: {', '.join(what)}, {result['seconds']} s")
    return True


def choose_rates(methods: Sequence[str], cell_of, config: CompareConfig, place: runtime.Device) -> dict:
    """{method: {rate, dev_loss by rate}} from OUT/rates.json, tuned first where it is missing: each method
    gets one run, seed 0 and the largest size, at every rate of its grid; the lowest dev loss wins."""
    path = Path(config.out) / "rates.json"
    rates = runtime.read_json(path) if path.exists() else {}
    missing = [name for name in methods if name not in rates]
    if config.tune and missing:
        cells = {(name, rate): cell_of(name, rate) for name in missing
                 for rate in (config.full_grid if name == "full" else config.grid)}
        run_cells(list(cells.values()), config, place)
        for name in missing:
            losses = {rate: runtime.read_json(cell.scores)["dev_loss"]
                      for (of, rate), cell in cells.items() if of == name}
            rates[name] = {"rate": float(min(losses, key=losses.get)), "dev_loss": losses}
        runtime.write_json(path, rates)
    return rates


# ---------------------------------------------------------------------------------------------------- results


def bootstrap(differences: Sequence[float], *, seed: int = 0,
              draws: int = 10_000) -> tuple[float, float, float]:
    """Mean of the paired differences over tasks, and the bounds of its 95 % bootstrap interval."""
    values = np.asarray(differences, dtype=float)
    rows = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.percentile(values[rows].mean(1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def summarise(cells: Sequence[dict[str, Any]], reference: str) -> list[dict[str, Any]]:
    """For each row and size: mean and sd over seeds of the overall scores, and the difference reference - row
    over tasks, each task's score being its mean over the seeds."""
    groups: dict[tuple[str, int], list[dict]] = {}
    for cell in cells:
        groups.setdefault((cell["row"], cell["size"]), []).append(cell)
    summary = []
    for (row, size), group in groups.items():
        entry: dict[str, Any] = {"row": row, "size": size, "seeds": len(group),
                                 "parameters": group[0].get("parameters")}
        for which in ("seen", "unseen"):
            for metric in ("rougeL", "exact_match") if which in group[0] else ():
                values = [cell[which]["overall"][metric] for cell in group]
                sd = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
                difference = None
                if row != reference and (reference, size) in groups:
                    one, other = (_by_task(g, which, metric) for g in (groups[reference, size], group))
                    difference = bootstrap([one[task] - other[task] for task in one])
                entry[f"{which} {metric}"] = {"mean": float(np.mean(values)), "sd": sd,
                                              "difference": difference}
        for when in ("start", "learnt"):
            for name in ("entropy", "mutual_information", "distance", "largest"):
                have = [value for cell in group if (value := cell.get(when, {}).get(name)) is not None]
                if have:  # w that is no distribution has no entropy
                    entry[f"{when} {name}"] = float(np.mean(have))
        summary.append(entry)
    return summary


def _by_task(group: Sequence[dict], which: str, metric: str) -> dict[str, float]:
    return {task: float(np.mean([cell[which]["tasks"][task][metric] for cell in group]))
            for task in group[0][which]["tasks"]}


def markdown(summary: Sequence[dict], reference: str, rates: dict) -> str:
    """The results as tables: scores with sd over seeds, and reference - row with its 95 % interval."""
    columns = [f"{which} {metric}" for which in ("seen", "unseen") for metric in ("rougeL", "exact_match")]
    columns = [column for column in columns if any(column in entry for entry in summary)]
    titles = [column.replace("rougeL", "ROUGE-L").replace("exact_match", "exact match") for column in columns]
    compared = [column for column in columns if "rougeL" in column]
    lines = []
    for size in sorted({entry["size"] for entry in summary}, reverse=True):
        head = [*titles, *(f"{reference} - row, {column.split()[0]}" for column in compared)]
        lines += ["", f"{size} training instances a task", "",
                  f"| row | parameters: skills + routing | rate | {' | '.join(head)} |",
                  "|---|" + "---:|" * (2 + len(head))]
        for entry in (entry for entry in summary if entry["size"] == size):
            sizes = entry["parameters"]
            cells = [entry["row"] + ("*" if entry["row"] == "c-poly" else ""),
                     f"{sizes['skills']:,} + {sizes['routing']:,}" if sizes else "-",
                     f"{rates[entry['row']]['rate']:g}" if entry["row"] in rates else "-"]
            cells += [f"{entry[c]['mean']:.2f} ± {entry[c]['sd']:.2f}" for c in columns]
            for column in compared:
                difference = entry[column]["difference"]
                cells.append("{:+.2f} [{:+.2f}, {:+.2f}]".format(*difference) if difference else "-")
            lines.append("| " + " | ".join(cells) + " |")
    routed = [entry for entry in summary if "learnt distance" in entry]
    if routed:
        names = ("start mutual_information", "learnt mutual_information", "learnt entropy", "learnt largest",
                 "learnt distance")
        lines += ["", "What the router learnt, on seen instances (nats):", "",
                  "| row | size | information on the category, start | end | entropy of w | largest mean w "
                  "| mean abs(c - 1/S) |", "|---|" + "---:|" * 6]
        lines += [f"| {entry['row']} | {entry['size']} | "
                  + " | ".join(f"{entry[name]:.3f}" if name in entry else "-" for name in names) + " |"
                  for entry in routed]
    lines += ["", "± sd over seeds; differences in ROUGE-L with 95 % bootstrap intervals over tasks alone: "
              "the variance over seeds and the number of comparisons are outside them."]
    if any(entry["row"] == "c-poly" for entry in summary):
        lines += ["", "* c-poly stands at equal S R, not at equal total: its skills grow with the tasks."]
    return "\n".join(lines[1:]) + "\n"


# ------------------------------------------------------------------------------------------------ the program


def method_cells(config: CompareConfig, configs: dict[str, Any], place: runtime.Device, num_tasks: int
                 ) -> tuple[list[Cell], dict]:
    """Cells of the comparison, whose rates are chosen first; and the rates."""
    with torch.device("meta"):
        base = t5.T5(t5.T5Config.from_json(Path(configs["train"].model) / "config.json"))
    extra = extra_ranks(config, configs["adapter"], base, num_tasks)
    sizes, out = sorted(map(int, config.sizes)), Path(config.out)

    def cell(method: str, size: int, seed: int, folder: str, rate: float | None,
             closing: bool = True) -> Cell:
        chosen = {"lr_full" if method == "full" else "lr_skills": rate} if rate else {}
        return Cell(method, out / folder, {
            "train": replace(configs["train"], method=method, seed=seed, extra_rank=extra[method], **chosen),
            "data": replace(configs["data"], train_instances=size), "adapter": configs["adapter"]}, closing)

    rates = choose_rates(config.methods, lambda method, rate: cell(
        method, sizes[-1], 0, f"tune/{method}-{rate}", float(rate), closing=False), config, place)
    largest = {**configs, "data": replace(configs["data"], train_instances=sizes[-1])}
    cells = [Cell(row, out / "cells" / row.replace(" ", "-"), largest) for row in UNTRAINED]
    for size in reversed(sizes):
        for method in config.methods:
            if size < sizes[-1] and method not in config.curve:
                continue
            rate = rates.get(method, {}).get("rate")
            cells += [cell(method, size, seed, f"cells/{method}-n{size}-s{seed}", rate)
                      for seed in range(config.seeds)]
    return cells, rates


def ablation_cells(config: CompareConfig, configs: dict[str, Any], place: runtime.Device
                   ) -> tuple[list[Cell], dict]:
    """Cells of the ablations, at OrchMoE's rate; cells that evaluate another's run come behind it."""
    out, size = Path(config.out), max(map(int, config.sizes))

    def cell(row: str, seed: int, folder: str, closing: bool = True, **changes: Any) -> Cell:
        base = {**configs, "data": replace(configs["data"], train_instances=size)}
        fields = {"method": "orchmoe", "seed": seed, **changes}
        own = {name: replace(value, **{k: v for k, v in fields.items() if hasattr(value, k)})
               for name, value in base.items()}
        default = out / "ablations" / f"default-s{seed}"
        return Cell(row, out / folder, own, closing, default if row == "w replaced by its mean" else None)

    rates = choose_rates(["orchmoe"], lambda method, rate: cell(
        method, 0, f"tune/default-{rate}", False, lr_skills=float(rate)), config, place)
    rate = {"lr_skills": rates["orchmoe"]["rate"]} if "orchmoe" in rates else {}
    rows = [row for row in ABLATIONS if not config.rows or row in ("default", *config.rows)]
    return [cell(row, seed, f"ablations/{_slug(row)}-s{seed}", **rate, **ABLATIONS[row])
            for row in rows for seed in range(config.seeds)], {}


def _slug(row: str) -> str:
    return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in row)


def compare(config: CompareConfig, configs: dict[str, Any], place: runtime.Device) -> str:
    """Runs what is missing, writes the results and returns the tables."""
    tokenizer = data.Tokenizer(configs["train"].model)
    for size in map(int, config.sizes):  # the token cache, before several workers want it
        sized = replace(configs["data"], train_instances=size)
        num_tasks = len(train.load_sets(tokenizer, configs["train"], sized)[0].tasks)
    if config.ablations:
        name, reference, (cells, rates) = "ablations", "default", ablation_cells(config, configs, place)
    else:
        name, reference = "results", "orchmoe"
        cells, rates = method_cells(config, configs, place, num_tasks)
    run_cells([cell for cell in cells if not cell.mean_of], config, place)
    if any(cell.mean_of for cell in cells):  # these need the runs above
        run_cells(cells, config, place)
    results = [cell.result() for cell in cells]
    summary = summarise(results, reference)
    text = markdown(summary, reference, rates)
    runtime.write_json(Path(config.out) / f"{name}.json", {
        "comparison": asdict(config), **{key: asdict(value) for key, value in configs.items()},
        "rates": rates, "torch": torch.__version__, "device": place.reason, "summary": summary,
        "cells": results})
    with runtime.atomic_write(Path(config.out) / f"{name}.md") as file:
        file.write(text.encode())
    return text


def main() -> None:
    parser = runtime.Parser(__doc__)
    for cls in (CompareConfig, *train.CONFIGS.values()):
        parser.add_dataclass(cls, DEFAULTS, FIXED)
    flags = vars(parser.parse_args())
    for name in FIXED:
        if name in flags:
            raise ValueError(f"--{name.replace('_', '-')}: the comparison sets this itself; see --help")
    flags = DEFAULTS | (QUICK if flags.get("quick") else {}) | flags
    runtime.require_alone()
    config = runtime.from_flags(CompareConfig, flags)
    configs = {name: runtime.from_flags(cls, flags) for name, cls in train.CONFIGS.items()}
    if config.dry_run:
        name, root = configs["train"].model, configs["data"]
        sizes = SIZES.get(name) or t5.T5Config.from_json(checkpoint.existing(
            Path(name) / "config.json", f"name a T5 folder, or one of {', '.join(SIZES)}"))
        tasks = data.read_splits(root.data, root.splits)["train"][:root.max_tasks or None]
        runtime.say(dry_run(config, sizes, configs["adapter"], config.num_tasks or len(tasks)))
        return
    place = runtime.pick_device(config.gpu, config.device, configs["train"].dtype)
    runtime.say(place.reason)
    runtime.say(compare(config, configs, place))
    if importlib.util.find_spec("matplotlib"):
        for path in plot.figures(Path(config.out)):
            runtime.say(f"written: {path}")
    else:
        runtime.say(f"no matplotlib here, so no figures; with it: python plot.py --results {config.out}")


if __name__ == "__main__":
    runtime.run_program(main)
