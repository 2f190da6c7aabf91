"""Is it the method? All methods at one total size on a base that knows its language.

Every row is tuned over the rates of all that it trains, with the same number of trials, on dev.
Scale then moves a method along a curve of seen against unseen loss, so what is compared are curves
(see experiments/curves.py). The tables are made from the finished cells alone.

    python -m experiments.report --stage all --data natural-instructions --model smollm2 \\
        --results mine
    python -m experiments.report --results mine     # what is done, what is left, and the tables

Without --results the cells are this repository's, which accept its data and settings alone.
Test: pytest tests/experiments/test_report.py
"""

import importlib.util
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import data
import runtime
from experiments import curves
from experiments.curves import EDGE, PROMPTS, ROWS, SCALES
from experiments.search import AXES
from experiments.study import (
    FIXED,
    UNTRAINED,
    Cell,
    Row,
    Study,
    StudyConfig,
    pick_device,
    read_study,
    read_tuning,
    require_choices,
    subset,
)
from experiments.tables import halves

RESULTS = runtime.ROOT / "experiments/results"
LIKE = {"like": "orchmoe"}
AT_SCALE_1 = "methods/orchmoe-x1-s{seed}"

# Each of ROWS at its one best scale, full fine-tuning, and what is not trained.
ANSWERING = {**ROWS, "full": Row({"method": "full"}), **UNTRAINED}
# What may help unseen tasks: OrchMoE with one change, at scale 1.
ABLATIONS = {
    "Gumbel noise": Row({"gumbel": True}, **LIKE),
    "w = 1/K for half of the samples": Row({"router_dropout": 0.5}, **LIKE),
    "both": Row({"gumbel": True, "router_dropout": 0.5}, **LIKE),
    "definition alone": Row(router="definition", **LIKE),
    "both with definition alone": Row(
        {"gumbel": True, "router_dropout": 0.5}, router="definition", **LIKE
    ),
    "K = 2": Row({"tasks": 2}, **LIKE),
    "K = 4": Row({"tasks": 4}, **LIKE),
    "K = 16": Row({"tasks": 16}, **LIKE),
    "K = 32": Row({"tasks": 32}, **LIKE),
}
# What tells whether it is the routing. SNI has 76 categories.
CONTROLS = {
    "w replaced by its mean": Row(w="mean", run=AT_SCALE_1, **LIKE),
    "w of another sample": Row(w="other", run=AT_SCALE_1, **LIKE),
    "router: random": Row(router="random", **LIKE),
    "router: none": Row({"router": "none"}, **LIKE),
    "K = 1 with Gumbel noise": Row({"tasks": 1, "gumbel": True}, **LIKE),
    "oracle: w is the category": Row({"tasks": 76, "router": "none"}, router="category", **LIKE),
}
STAGES = {
    "tune": ROWS,
    "methods": ROWS,
    "answers": ANSWERING,
    "examples": ANSWERING,
    "sizes": ROWS,
    "ablations": ABLATIONS,
    "controls": CONTROLS,
}

DEFAULTS = {
    "out": "results/report",
    "results": str(RESULTS),
    "trials": 9,
    "steps": 100,
    "batch_size": 8,
    "warmup": 10,
    "eval_every": 100,
    "eval_instances": 300,
    "lr_skills": 1e-2,
    "lr_router": 2e-5,
    "rank": 4,
    "train_instances": 8,
    "num_pos": 0,
    "max_source_length": 240,
}


@dataclass(frozen=True)
class ReportConfig:
    """Report: which cells are made, and which tables."""

    stage: Literal[(*STAGES, "all", "table")] = "table"  # what is made
    rows: tuple[str, ...] = ()  # these rows alone (default: all of the stage)
    cells: tuple[str, ...] = ()  # these cells of the stage alone, by the names of their files
    tune_steps: int = 50  # optimiser steps of the runs that tune
    train_tasks: int = 200  # training tasks, drawn by name; the stage sizes takes --sizes instead
    sizes: tuple[str, ...] = ("50", "687")  # numbers of training tasks of the stage sizes
    final: bool = False  # show the unseen tasks by which nothing was chosen

    def __post_init__(self) -> None:
        runtime.require_least(self, tune_steps=1, train_tasks=1)
        require_choices(f"--stage {self.stage} --rows", self.rows, STAGES.get(self.stage, ()))
        if self.cells and self.stage not in list(STAGES)[1:]:
            raise ValueError("--cells: give the --stage of the cells, another one than tune")
        for size in self.sizes:
            if not size.isdecimal() or int(size) == 0:
                raise ValueError(f"--sizes {size}: give numbers of training tasks")


def number_of_cells(config: ReportConfig, study: StudyConfig) -> dict[str, int]:
    """Return how many cells each stage has, with all of its rows."""
    rows = len(ROWS)
    answers = rows * study.seeds + len(ANSWERING) - rows  # what is not tuned has one seed
    return {
        "tune": rows * study.trials,
        "methods": rows * (len(SCALES) * study.seeds + len(EDGE)),
        "answers": answers,
        "examples": answers,
        "sizes": rows * len(config.sizes) * study.seeds,
        "ablations": len(ABLATIONS) * study.seeds,
        "controls": len(CONTROLS) * study.seeds,
    }


def data_of(study: Study, tasks: int) -> str:
    """Return a data folder with all test tasks and so many of the training tasks.

    These are drawn by name, so that fewer tasks are a part of more.
    """
    root = Path(study.settings.data.data)
    lists = data.read_splits(root)
    order = sorted(lists["train"])
    random.Random("train").shuffle(order)
    folder = Path(study.config.out, f"tasks-{tasks}")
    return str(subset(folder, root, order[:tasks], lists["test"]))


def rows_of(config: ReportConfig) -> dict[str, Row]:
    """Return the rows of the stage that are asked for."""
    names = config.rows or STAGES[config.stage]
    return {name: STAGES[config.stage][name] for name in names}


def stage_cells(config: ReportConfig, study: Study) -> list[Cell]:
    """Return the cells of the stage that are asked for. Raise ValueError if one does not exist."""
    stage = config.stage
    rows = rows_of(config)
    seeds = range(study.config.seeds)
    rank = study.settings.adapter.rank
    tasks = {"data": data_of(study, config.train_tasks)}
    at_scale = {}
    for scale in (*SCALES, *EDGE):
        at_scale[scale] = {f"x{scale:g}": tasks | {"alpha": scale * rank}}

    cells = []
    if stage == "methods":
        for scale, points in at_scale.items():
            of_scale = [0] if scale in EDGE else seeds
            cells += study.cells(stage, rows, points, of_scale, "losses")
    elif stage == "sizes":
        points = {}
        for size in config.sizes:
            points[size] = {"data": data_of(study, int(size)), "alpha": float(rank)}
        cells = study.cells(stage, rows, points, seeds, "losses")
    elif stage in ("ablations", "controls"):
        points = {"": tasks | {"alpha": float(rank)}}
        cells = study.cells(stage, rows, points, seeds, "losses")
    elif stage in PROMPTS:
        best = curves.best_scales(curves.read_cells(study.results))
        for name, row in rows.items():
            if name in best:
                if stage == "answers":  # the runs are there already
                    row = row._replace(run="methods/{name}")
                for tag, point in at_scale[best[name]].items():
                    points = {tag: point | PROMPTS[stage]}
                    cells += study.cells(stage, {name: row}, points, seeds)
            elif name in ROWS:
                runtime.warn(
                    f"{name}: left out; --stage methods must be complete to choose a scale"
                )
            else:
                cells += study.cells(stage, {name: row}, {"": tasks | PROMPTS[stage]}, [0])

    if config.cells:
        named = {cell.path.stem: cell for cell in cells}
        for name in config.cells:
            if name not in named:
                raise ValueError(f"--cells {name}: no cell of --stage {stage}")
        cells = [named[name] for name in config.cells]
    return cells


def make(config: ReportConfig, study: Study) -> None:
    """Tune the rows that the stage needs, and make its cells."""
    steps = study.settings.train.steps
    for name, cell in curves.read_cells(study.results).items():
        made = cell["settings"]["steps"]
        if made != steps and not name.startswith("tune/"):  # no table has both
            raise ValueError(
                f"{study.results}/{name}.json: made with steps {made}, not {steps}; name another "
                "folder with --results"
            )
    if config.cells:
        stage_cells(config, study)  # raises before the tuning
    if study.config.tune:
        names = dict.fromkeys(row.like or name for name, row in rows_of(config).items())
        study.tune(
            {name: ROWS[name] for name in names if name in ROWS},
            study.config.trials,
            axes=[axis for axis in AXES if axis != "alpha"],
            data=data_of(study, config.train_tasks),
            steps=config.tune_steps,
            eval_every=config.tune_steps,
            alpha=float(study.settings.adapter.rank),
        )
    study.run(stage_cells(config, study))


def require_tasks(config: ReportConfig, root: str) -> None:
    """Raise ValueError if the data has fewer tasks than the cells need."""
    lists = data.read_splits(root)
    most = config.train_tasks
    if config.stage in ("sizes", "all"):
        most = max(most, *map(int, config.sizes))
    if len(lists["train"]) < most:
        raise ValueError(
            f"{root}: {len(lists['train'])} training tasks; the cells need {most}, see "
            "--train-tasks and --sizes"
        )
    if not all(halves(lists["test"]).values()):
        raise ValueError(f"{root}: {len(lists['test'])} test tasks; both halves of them need some")


def main() -> None:
    fixed = (*FIXED, "splits", "max_tasks", "alpha", "router")
    _, config, study_config, settings = read_study(__doc__, ReportConfig, DEFAULTS, fixed)
    if config.stage != "table":
        require_tasks(config, settings.data.data)
        study = Study(settings, pick_device(study_config, settings), study_config, ROWS)
        for stage in STAGES if config.stage == "all" else [config.stage]:
            make(replace(config, stage=stage), study)

    results = Path(study_config.results)
    cells = curves.read_cells(results)
    for stage, number in number_of_cells(config, study_config).items():
        done = sum(name.startswith(f"{stage}/") for name in cells)
        runtime.print_line(f"{stage}: {done} cells of {number}")
    tables = curves.text(cells, read_tuning(results), config.final)
    runtime.print_line(tables)
    with runtime.atomic_write(results / ("final.md" if config.final else "tables.md")) as file:
        file.write(tables.encode())
    found = curves.curves(cells)
    if found and curves.common(*found.values()) and importlib.util.find_spec("matplotlib"):
        runtime.print_line(f"written: {curves.figure(found, results / 'curves.png')}")


if __name__ == "__main__":
    runtime.run_program(main)
