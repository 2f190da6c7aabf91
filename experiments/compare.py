"""Compare OrchMoE with its baselines at one total size, on the bundled data or any other.

First every method is tuned on dev over all that it trains, rates and scale, with the same number
of trials. Then each runs with several seeds: the same order of the data and the same number of
steps for all. Results are of seen and unseen instances, by which nothing is chosen.

    python -m experiments.compare                            # tuning, then all methods
    python -m experiments.compare --ablations                # OrchMoE with one change at a time
    python -m experiments.compare --dry-run --model t5-xxl   # sizes and memory alone

Writes cells (see experiments/study.py), results.json and results.md, and figures if matplotlib is
installed, into the folder of --results, or else --out; with --ablations, ablations.json and
ablations.md.
Test: pytest tests/experiments/test_compare.py
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import checkpoint
import data
import runtime
import t5
from baselines import METHODS
from experiments import plot
from experiments.sizes import equal_ranks, parameters
from experiments.study import (
    UNTRAINED,
    Cell,
    Row,
    Study,
    pick_device,
    read_study,
    require_choices,
)
from experiments.tables import markdown, publish, table
from orchmoe import OrchMoEConfig
from runtime import UserError

# ------------------------------------------------------------------------------ what is compared

ROWS = {name: Row({"method": name}) for name in METHODS if name != "orchmoe-factors"}
ADAPTED = tuple(name for name in ROWS if name != "full")
# Rows of one total size. The private skills of c-poly grow with the number of tasks.
EQUAL = {name: ROWS[name] for name in ADAPTED if name != "c-poly"}

DEFAULT_RUN = "ablations/default-s{seed}"
# Each row has one difference from the default. S R and the scale alpha / (S R) stay the same.
ABLATIONS = {
    "default": Row(),
    "w replaced by its mean": Row(w="mean", run=DEFAULT_RUN),
    "w of another sample": Row(w="other", run=DEFAULT_RUN),
    "router: token": Row({"router": "token"}),
    "router: none": Row({"router": "none"}),
    "router: random": Row(replaced_router="random"),
    "router start: normal": Row({"router_init": "normal"}),
    "attention off": Row({"router_attention": False}),
    "w without softmax": Row({"router_norm": "none"}),
    "Gumbel noise on": Row({"gumbel": True}),
    "allocation start: sd 1": Row({"allocation_std": 1.0}),
    "allocation start: sd 0.001": Row({"allocation_std": 1e-3}),
    "K = 1": Row({"abstract_tasks": 1}),
    "K = 4": Row({"abstract_tasks": 4}),
    "K = 16": Row({"abstract_tasks": 16}),
    "S = 1": Row({"skills": 1}),
    "S = 2": Row({"skills": 2}),
    "S = 8": Row({"skills": 8}),
    "factors mixed": Row({"method": "orchmoe-factors"}),
}
DEFAULTS = {
    "out": "results/compare",
    "steps": 200,
    "eval_instances": 280,
    "lr_skills": 1e-2,
    "lr_router": 2e-5,
}


@dataclass(frozen=True)
class CompareConfig:
    """Comparison: what is compared."""

    methods: tuple[str, ...] = ADAPTED  # methods to compare
    ablations: bool = False  # OrchMoE with one change at a time, instead of the methods
    rows: tuple[str, ...] = ()  # these ablations (default: all)
    dry_run: bool = False  # print parameters and memory, and stop

    def __post_init__(self) -> None:
        require_choices("--methods", self.methods, ROWS)
        require_choices("--rows", self.rows, ABLATIONS)


def ablation(name: str, adapter: OrchMoEConfig) -> Row:
    """Return a row of ABLATIONS for these settings. With another S, R follows: S R stays.

    Raise UserError if it changes nothing or is not possible.
    """
    row = ABLATIONS[name]._replace(like="orchmoe")  # its size and its tuned values
    known = vars(adapter)
    if row.settings and all(known.get(field) == value for field, value in row.settings.items()):
        raise UserError(
            f"--rows {name}: the given settings are the same already; leave out the row or the flag"
        )
    if row.w and adapter.router != "sample":
        raise UserError(
            f"--rows {name}: --router {adapter.router} has no w of a sample; leave one out"
        )
    if "skills" not in row.settings:
        return row
    total = adapter.skills * adapter.rank
    skills = row.settings["skills"]
    if total % skills:
        raise UserError(f"--rows {name}: S R = {total} is no multiple of {skills}; leave it out")
    alpha = adapter.rank if adapter.alpha is None else adapter.alpha
    return row._replace(settings={"skills": skills, "rank": total // skills, "alpha": alpha})


# -------------------------------------------------------------------------------------- accounting


def t5_config(width: int, feed_forward: int, blocks: int, heads: int) -> t5.T5Config:
    """Return a T5 v1.1 of this size."""
    return t5.T5Config(
        vocab_size=32128,
        d_model=width,
        d_kv=64,
        d_ff=feed_forward,
        num_layers=blocks,
        num_decoder_layers=blocks,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        scale_decoder_outputs=False,
        tied_head=False,
    )


SIZES = {
    "t5-small": t5_config(512, 1024, 8, 6),
    "t5-base": t5_config(768, 2048, 12, 12),
    "t5-large": t5_config(1024, 2816, 24, 16),
    "t5-xl": t5_config(2048, 5120, 24, 32),
    "t5-xxl": t5_config(4096, 10240, 24, 64),
}


def dry_run(methods: Sequence[str], shape: Any, adapter: OrchMoEConfig, num_tasks: int) -> str:
    """Return parameters and memory of each method in Markdown. Nothing is allocated.

    shape: config of the base.
    """
    ranks = equal_ranks(tuple((name, name, adapter) for name in EQUAL), shape, num_tasks)
    base = checkpoint.on_meta(shape)
    size = sum(parameter.numel() for parameter in base.parameters())
    rows = []
    for name in methods:
        extra_rank = ranks.get(name, 0)
        options = {"extra_rank": extra_rank, "num_tasks": num_tasks}
        counts = parameters(name, base, adapter, **options)
        total = sum(counts.values())
        row = ["c-poly*" if name == "c-poly" else name, adapter.skills * adapter.rank, extra_rank]
        row += [f"{count:,}" for count in (*counts.values(), total)]
        row.append(f"{100 * total / size:.3f} %")
        row += [format_bytes(4 * total), format_bytes(4 * total), format_bytes(8 * total)]
        rows.append(row)
    head = (
        "method, S R, extra ranks, skills, routing, total, of the base, weights, gradients, AdamW"
    )
    text = (
        f"base: {size:,} parameters, frozen: {format_bytes(4 * size)} in float32, "
        f"{format_bytes(2 * size)} in bfloat16; T = {num_tasks}\n\n{table(head.split(', '), rows)}"
    )
    if "c-poly" in methods:
        text += "\n\n* at equal S R only: its private skills grow with the number of tasks"
    return text


def format_bytes(number: float) -> str:
    """Return a number of bytes with three digits: 1770000 gives "1.77 MB"."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while number >= 1000 and len(units) > 1:
        number /= 1000
        units.pop(0)
    return f"{number:.3g} {units[0]}"


# -------------------------------------------------------------------------------------- the study


def method_cells(config: CompareConfig, study: Study) -> tuple[list[Cell], dict[str, dict]]:
    """Tune the methods. Return the cells of all methods, and the reports of the searches."""
    rows = {name: row for name, row in ROWS.items() if name in config.methods}  # orchmoe first
    reports = {}
    if study.config.tune:
        reports = study.tune(rows, study.config.trials)
    cells = study.cells("methods", rows, {"": {}}, range(study.config.seeds))
    return cells + study.cells("methods", UNTRAINED, {"": {}}, [0]), reports


def ablation_cells(config: CompareConfig, study: Study) -> tuple[list[Cell], dict[str, dict]]:
    """Do the same for the ablations, at the values tuned for OrchMoE and without extra ranks."""
    names = [name for name in ABLATIONS if name in ("default", *(config.rows or ABLATIONS))]
    for name in names:
        ablation(name, study.settings.adapter)  # raises now, and not after hours of tuning
    reports = {}
    if study.config.tune:
        reports = study.tune({"orchmoe": ROWS["orchmoe"]}, study.config.trials)
    tuned = study.cell("", "orchmoe", ROWS["orchmoe"], {}).settings
    rows = {name: ablation(name, tuned.adapter) for name in names}
    equal_rank = Study(study.settings, study.device, study.config, equal={})
    equal_rank.best = study.best
    if study.config.tune and "router: token" in rows:
        # The rate that was tuned for the sample router means nothing to this one.
        token = {"router: token": rows["router: token"]}
        trials = max(3, study.config.trials // 3)
        reports |= equal_rank.tune(token, trials, ["lr_token_router"])
    return equal_rank.cells("ablations", rows, {"": {}}, range(study.config.seeds)), reports


def compare(config: CompareConfig, study: Study) -> None:
    """Make the cells that are missing. Write the results, and print the tables."""
    make_cells = ablation_cells if config.ablations else method_cells
    cells, tuning = make_cells(config, study)
    study.run(cells)

    rows: dict[str, list[dict]] = {}
    for cell in cells:
        result = {"row": cell.name, "folder": str(cell.folder.absolute()), **cell.result()}
        rows.setdefault(cell.name, []).append(result)
    text = markdown(rows, tuning)

    file = "ablations" if config.ablations else "results"
    results = {"comparison": asdict(config) | asdict(study.config), **asdict(study.settings)}
    results |= {"tuning": tuning, "cells": sum(rows.values(), [])}
    runtime.write_json(study.results / f"{file}.json", results)
    publish(text, study.results / f"{file}.md")


def main() -> None:
    flags, config, study_config, settings = read_study(__doc__, CompareConfig, DEFAULTS)
    useless = {"rows": "it goes with --ablations"}
    if config.ablations:
        useless = {"methods": "not with --ablations"}
    if not study_config.tune:
        useless["trials"] = "not with --no-tune"
    for name, why in useless.items():
        if name in flags:
            raise UserError(f"{runtime.flag(name)}: {why}; leave it out")

    if config.dry_run:
        shape = SIZES.get(settings.training.model)
        if shape is None:
            folder = Path(settings.training.model)
            remedy = f"name a model's folder, or one of {', '.join(SIZES)}"
            runtime.require_path(folder / "config.json", remedy)
            shape = checkpoint.read_config(folder)
        tasks = data.read_splits(settings.dataset.data, settings.dataset.splits)["train"]
        tasks = tasks[: settings.dataset.max_tasks or None]
        runtime.print_line(dry_run(config.methods, shape, settings.adapter, len(tasks)))
        return

    study = Study(settings, pick_device(study_config, settings), study_config, EQUAL)
    compare(config, study)
    if config.ablations:
        return
    if importlib.util.find_spec("matplotlib"):
        for path in plot.figures(study.results):
            runtime.print_line(f"written: {path}")
    else:
        runtime.print_line("no figures, since matplotlib is not installed")


if __name__ == "__main__":
    runtime.run_program(main)
