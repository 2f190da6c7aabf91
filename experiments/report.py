"""Is it the method? All methods at equal size on a base that knows its language, over a grid of scales, on
seen and unseen tasks of Super-NaturalInstructions. First each is tuned over the rates of all that it trains,
with the same number of trials, on dev. Scale then moves a method along a curve of seen against unseen loss,
so what is compared are curves. Each finished cell is one JSON file under --results, and the tables are made
from these files alone. Interrupted, the same command goes on.

    python -m experiments.report --stage all --data natural-instructions --model smollm2 --results mine
    python -m experiments.report --results mine     # what is done, what is left, and the tables

Without --results the cells are this repository's, which go on with its data and settings alone.

Test: `pytest tests/experiments/test_report.py`"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import checkpoint
import data
import runtime
import tokenizer as tokenizers
import train
from experiments import compare, curves
from experiments.compare import Cell, changed, run_cells, slug
from experiments.curves import EDGE, PROMPTS, ROWS, SCALES
from experiments.fewshot import subset
from experiments.search import Search, axes_of
from experiments.sizes import budget, on_meta, parameters

STAGES = ("tune", "methods", "answers", "examples", "sizes", "ablations", "controls")
RESULTS = runtime.ROOT / "experiments/results"
ANSWERING = (*ROWS, "full", *compare.UNTRAINED)  # each of ROWS at its one best scale
# What may help unseen tasks, and what tells whether it is the routing: OrchMoE with one change, at scale 1.
ABLATIONS: dict[str, dict[str, Any]] = {
    "Gumbel noise": {"gumbel": True},
    "w = 1/K for half of the samples": {"router_dropout": 0.5},
    "both": {"gumbel": True, "router_dropout": 0.5},
    "definition alone": {},  # `compare.definition_features` for what the router reads
    "both with definition alone": {"gumbel": True, "router_dropout": 0.5},
    "K = 2": {"tasks": 2}, "K = 4": {"tasks": 4}, "K = 16": {"tasks": 16}, "K = 32": {"tasks": 32},
}  # fmt: skip
CONTROLS: dict[str, dict[str, Any]] = {
    "w replaced by its mean": {}, "w of another sample": {}, "router: random": {},
    "router: none": {"router": "none"}, "K = 1 with Gumbel noise": {"tasks": 1, "gumbel": True},
    compare.ORACLE: {"tasks": 76, "router": "none"},  # the categories of SNI
}  # fmt: skip
DEFAULTS = {"steps": 100, "batch_size": 8, "warmup": 10, "eval_every": 100, "eval_instances": 300,
            "lr_skills": 1e-2, "rank": 4, "train_instances": 8, "num_pos": 0,
            "max_source_length": 240}  # fmt: skip
FIXED = (*compare.FIXED, "splits", "max_tasks", "alpha", "router", "trainable")


@dataclass(frozen=True)
class ReportConfig:
    """Report: which cells are made, and from which files the tables."""

    stage: Literal[(*STAGES, "all", "table")] = "table"  # what is made
    rows: tuple[str, ...] = ()  # of these rows alone (default: all of the stage)
    seeds: int = 3  # runs of each cell: initial values, order, noise
    tune: bool = True  # choose each row's rates on dev; else as given
    trials: int = 9  # runs, of seed 0, that each method's rates are tuned by
    tune_steps: int = 50  # optimiser steps of these
    train_tasks: int = 200  # training tasks, drawn by name; `sizes` takes the numbers below in place of it
    sizes: tuple[str, ...] = ("50", "687")  # training tasks of the cells of sample efficiency
    cells: tuple[str, ...] = ()  # of the stage these alone, by the names of their files
    final: bool = False  # show the unseen tasks that nothing was chosen by
    out: str = "results/report"  # folder of the runs
    results: str = str(RESULTS)  # folder of the finished cells (default: experiments/results)
    jobs: int = 0  # cells at a time (0: one on a GPU; on the CPU one a core)
    gpu: int | None = None  # number of the GPU (default: 0, where there is one)
    device: Literal["cpu", ""] = ""  # no GPU even if there is one

    def __post_init__(self) -> None:
        runtime.require_least(self, seeds=1, trials=1, tune_steps=1, train_tasks=1, jobs=0)
        rows = {"methods": ROWS, "tune": ROWS, "sizes": ROWS, "ablations": ABLATIONS, "controls": CONTROLS,
                **dict.fromkeys(PROMPTS, ANSWERING)}
        known = rows.get(self.stage, ())
        if odd := set(self.rows) - set(known) or {row for row in self.rows if self.rows.count(row) > 1}:
            raise ValueError(f"--rows {min(odd)}: of --stage {self.stage} choose, once each, of "
                             f"{', '.join(known) or 'none'}")
        if self.cells and self.stage not in STAGES[1:]:
            raise ValueError("--cells: name by --stage the one, but tune, that they are of")
        if odd := [size for size in self.sizes if not size.isdecimal() or not int(size)]:
            raise ValueError(f"--sizes {odd[0]}: give numbers of training tasks")

    @property
    def cells_of(self) -> dict[str, int]:
        """How many cells each stage has, of all rows."""
        answers = len(ROWS) * self.seeds + len(ANSWERING) - len(ROWS)
        methods = len(ROWS) * (len(SCALES) * self.seeds + len(EDGE))
        return {"tune": len(ROWS) * self.trials, "methods": methods,
                **dict.fromkeys(PROMPTS, answers), "sizes": len(ROWS) * len(self.sizes) * self.seeds,
                "ablations": len(ABLATIONS) * self.seeds, "controls": len(CONTROLS) * self.seeds}


class Study(NamedTuple):
    config: ReportConfig
    configs: train.Settings
    facts: dict[str, dict[str, str]]  # by number of training tasks
    roots: dict[str, Path]
    extra: dict[str, dict[str, int]]  # extra_rank of each row, by the same

    @property
    def size(self) -> str:
        return str(self.config.train_tasks)

    def cell(self, stage: str, name: str, row: str, fields: dict[str, Any], *, size: str = "",
             answers: bool = False, **options: Any) -> Cell:
        size = size or self.size
        configs = changed(self.configs, data=str(self.roots[size]), **fields)
        return Cell(row, Path(self.config.out, stage, name), configs, self.facts[size], answers=answers,
                    kept=Path(self.config.results, stage, f"{name}.json"), **options)

    def fields(self, row: str, size: str = "") -> dict[str, Any]:
        extra = self.extra[size or self.size][row]
        return {"seed": 0, "alpha": float(self.configs.adapter.rank), "extra_rank": extra, **ROWS[row]}

    def search(self, row: str) -> Search:
        """Over the rates of all that the row trains, at scale 1."""
        fields = self.fields(row)
        configs = changed(self.configs, **fields)
        axes = [axis for axis in axes_of(fields["method"], configs.adapter) if axis != "alpha"]
        steps = {"steps": self.config.tune_steps, "eval_every": self.config.tune_steps}

        def cell_of(values: dict[str, float]) -> Cell:
            name = "_".join([slug(row), *(f"{value:g}" for value in values.values())])
            return self.cell("tune", name, row, fields | steps | values, closing=False)

        return Search(axes, {axis: getattr(configs.train, axis) for axis in axes}, self.config.trials,
                      cell_of)

    def queues(self, best: dict[str, dict[str, float]]) -> list[list[Cell]]:
        """The cells of the stage, the first seed's first, those that share a run in one queue."""
        only, stages = self.config.cells, {
            "methods": self.points, "sizes": self.points, "ablations": self.varied, "controls": self.varied,
            "tune": lambda best, seed: (), **dict.fromkeys(PROMPTS, self.answers)}
        make = stages[self.config.stage]
        made = [queue for seed in range(self.config.seeds) for queue in make(best, seed)]
        wanted = [[cell for cell in queue if not only or cell.kept.stem in only] for queue in made]
        if odd := set(only) - {cell.kept.stem for queue in wanted for cell in queue}:
            raise ValueError(f"--cells {min(odd)}: no cell of --stage {self.config.stage}")
        return [queue for queue in wanted if queue]

    def point(self, best: dict[str, dict[str, float]], seed: int, row: str, scale: float,
              stage: str = "methods", prompts: dict[str, Any] | None = None, **options: Any) -> Cell:
        """One scale of a row."""
        fields = self.fields(row) | best[row] | {"seed": seed, "alpha": scale * self.configs.adapter.rank}
        return self.cell(stage, f"{slug(row)}-x{scale:g}-s{seed}", row, fields | (prompts or {}), **options)

    def points(self, best: dict[str, dict[str, float]], seed: int) -> Iterator[list[Cell]]:
        """Of each row every scale, or every number of training tasks."""
        for row in self.config.rows or ROWS:
            for scale in (*SCALES, *(() if seed else EDGE)) if self.config.stage == "methods" else ():
                yield [self.point(best, seed, row, scale)]
            for size in self.config.sizes if self.config.stage == "sizes" else ():
                fields = self.fields(row, size) | best[row] | {"seed": seed}
                yield [self.cell("sizes", f"{slug(row)}-{size}-s{seed}", row, fields, size=size)]

    def answers(self, best: dict[str, dict[str, float]], seed: int) -> Iterator[list[Cell]]:
        """Of each row its best scale; what is not trained once."""
        scales = curves.best_scales(curves.read_cells(Path(self.config.results)))
        stage, prompts = self.config.stage, PROMPTS[self.config.stage]
        for row in self.config.rows or ANSWERING:
            if row in scales:
                point = best, seed, row, scales[row]
                first = None if prompts else self.point(*point)  # other prompts are other training
                yield [self.point(*point, stage, prompts, answers=True, first=first)]
            elif row in ROWS:
                runtime.warn(f"{row}: its scale is chosen by --stage methods, all scales of it; left out")
            elif not seed:
                fields = {"seed": 0} | ({"method": "full"} if row == "full" else {}) | prompts
                yield [self.cell(stage, f"{slug(row)}-s{seed}", row, fields, answers=True)]

    def varied(self, best: dict[str, dict[str, float]], seed: int) -> Iterator[list[Cell]]:
        """OrchMoE with one change; those that score one run differently share a queue."""
        stage, shared = self.config.stage, []
        rows = ABLATIONS if stage == "ablations" else CONTROLS
        for row in self.config.rows or rows:
            fields = self.fields("orchmoe") | best["orchmoe"] | {"seed": seed} | rows[row]
            first = self.point(best, seed, "orchmoe", 1.0) if row in compare.SCORED_ONLY else None
            cell = self.cell(stage, f"{slug(row)}-s{seed}", row, fields, first=first)
            if first:
                shared.append(cell)
            else:
                yield [cell]
        yield shared


def require_tasks(config: ReportConfig, root: Path) -> None:
    """ValueError where the data has fewer tasks than the cells are of."""
    lists, sizes = data.read_splits(root), config.sizes if config.stage in ("sizes", "all") else ()
    if len(lists["train"]) < (most := max(map(int, (config.train_tasks, *sizes)))):
        raise ValueError(f"{root}: {len(lists['train'])} training tasks; the cells need {most}, see "
                         "--train-tasks and --sizes")
    if not all(curves.halves(lists["test"]).values()):
        raise ValueError(f"{root}: {len(lists['test'])} test tasks; both halves of the unseen need some")


def make_study(config: ReportConfig, configs: train.Settings, place: runtime.Device) -> Study:
    tokenizer, root = tokenizers.load(configs.train.model), Path(configs.data.data)
    lists = data.read_splits(root)
    order = sorted(lists["train"])
    random.Random("train").shuffle(order)  # by name: fewer tasks are among more
    facts, roots, extra = {}, {}, {}
    base, adapter = on_meta(checkpoint.read_config(configs.train.model)), configs.adapter
    token = changed(configs, router="token").adapter
    dearest = sum(parameters("orchmoe", base, token).values())
    for size in {str(config.train_tasks), *(config.sizes if config.stage == "sizes" else ())}:
        roots[size] = subset(Path(config.out, f"tasks-{size}"), root, order[:int(size)], lists["test"])
        facts[size], T = compare.facts_of(changed(configs, data=str(roots[size])), tokenizer, place)
        found = budget(("orchmoe", "lora", "moe-lora", "poly"), base, adapter, T, dearest)
        extra[size] = {row: 0 if "router" in fields else found[fields["method"]]
                       for row, fields in ROWS.items()}
    return Study(config, configs, facts, roots, extra)


# ------------------------------------------------------------------------------------------------ the program


def tuned(config: ReportConfig) -> dict[str, dict]:
    """What the searches of all rows have reported."""
    path = Path(config.results, "tuning.json")
    return runtime.read_json(path) if path.exists() else {}


def make(config: ReportConfig, configs: train.Settings, place: runtime.Device) -> None:
    """All cells of the stage that are not there; first the tuning of the rows that they are of."""
    study, steps = make_study(config, configs, place), configs.train.steps
    for name, cell in curves.read_cells(Path(config.results)).items():
        made = steps if name.startswith("tune/") else cell["settings"]["steps"]
        if made != steps:  # no table is of both
            raise ValueError(f"{config.results}/{name}.json: made with steps {made}, not {steps}; name "
                             "another folder by --results")
    best: dict[str, dict[str, float]] = {row: {} for row in ROWS}
    if config.cells:
        study.queues(best)  # refuses those that are not there before the tuning
    rows = ["orchmoe"] if config.stage in ("ablations", "controls") else config.rows or ROWS
    if searches := {row: study.search(row) for row in rows if row in ROWS and config.tune}:
        run_cells(list(searches.values()), config, place)
        reports = {row: search.report() for row, search in searches.items()}
        runtime.write_json(Path(config.results, "tuning.json"), tuned(config) | reports)
        best |= {row: found["best"] for row, found in reports.items()}
        for row, found in reports.items():
            if found["edges"]:
                runtime.warn(f"{row}: the best of {', '.join(found['edges'])} is on the edge of what was "
                             "tried; raise --trials, for all rows")
    if queues := study.queues(best):
        run_cells(queues, config, place)


def main() -> None:
    classes = ReportConfig, *compare.CLASSES
    flags = runtime.read_flags(__doc__, *classes, defaults=DEFAULTS, hidden=FIXED)
    for name in FIXED:
        if name in flags:
            raise ValueError(f"--{name.replace('_', '-')}: the report sets this itself; leave it out")
    runtime.require_single_process()
    config = runtime.from_flags(ReportConfig, flags)
    if config.stage != "table":
        configs = train.Settings.from_flags(DEFAULTS | flags)
        place = runtime.pick_device(config.gpu, config.device, configs.train.dtype,
                                    base=configs.train.model)
        runtime.print_line(place.description)
        require_tasks(config, Path(configs.data.data))
        for stage in STAGES if config.stage == "all" else [config.stage]:
            make(replace(config, stage=stage), configs, place)
    cells = curves.read_cells(Path(config.results))
    for stage, whole in config.cells_of.items():
        done = sum(name.startswith(f"{stage}/") for name in cells)
        runtime.print_line(f"{stage}: {done} cells of {whole}")
    runtime.print_line(tables := curves.text(cells, tuned(config), config.final))
    with runtime.atomic_write(Path(config.results, "final.md" if config.final else "tables.md")) as file:
        file.write(tables.encode())
    found = curves.curves(cells)
    if found and curves.common(*found.values()) and importlib.util.find_spec("matplotlib"):
        runtime.print_line(f"written: {curves.figure(found, Path(config.results) / 'curves.png')}")


if __name__ == "__main__":
    runtime.run_program(main)
