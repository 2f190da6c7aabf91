"""Is it the method? All methods at equal size on a base that knows its language, over a grid of scales, on
seen and unseen tasks of Super-NaturalInstructions. First each is tuned over the rates of all that it trains,
with the same number of trials, on dev. Scale then moves a method along a curve of seen against unseen loss,
so what is compared are curves. Each finished cell is one JSON file under --results, and the tables are made
from these files alone. Interrupted, the same command goes on.

    python -m experiments.report --stage tune --data natural-instructions --model smollm2 --device cpu
    python -m experiments.report --stage methods --data natural-instructions --model smollm2 --device cpu
    python -m experiments.report --stage table          # what is done, and the tables

Test: `pytest tests/test_report.py`"""

from __future__ import annotations

import importlib.util
import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

import checkpoint
import data
import runtime
import tokenizer as tokenizers
import train
from experiments import compare, plot
from experiments.compare import Cell, changed, run_cells, slug
from experiments.fewshot import subset
from experiments.search import Search, axes_of
from experiments.sizes import budget, on_meta, parameters
from experiments.tables import METRICS, interval, table, tuning_table

STAGES = ("tune", "methods", "answers", "examples", "sizes", "changes", "controls")
RESULTS = runtime.ROOT / "experiments/results"
# The method of each row; all are of one total size, that of the dearest routing.
ROWS: dict[str, dict[str, Any]] = {
    "orchmoe": {"method": "orchmoe"}, "token router": {"method": "orchmoe", "router": "token"},
    "lora": {"method": "lora"}, "moe-lora": {"method": "moe-lora"}, "poly": {"method": "poly"},
}  # fmt: skip
SCALES = (0.5, 1.0, 2.0, 4.0)  # alpha, in ranks
# At its one best scale each row answers, too: without examples in the prompt, or after training with two.
ANSWERING = (*ROWS, "full", *compare.UNTRAINED)
PROMPTS = {"answers": {}, "examples": {"num_pos": 2, "max_source_length": 640}}
# What may help unseen tasks, and what tells whether it is the routing: OrchMoE with one change, at scale 1.
CHANGES: dict[str, dict[str, Any]] = {
    "Gumbel noise": {"gumbel": True},
    "w = 1/K for half of the samples": {"router_dropout": 0.5},
    "both": {"gumbel": True, "router_dropout": 0.5},
    "definition alone": {},  # `compare.definition_features` for what the router reads
    "both, definition alone": {"gumbel": True, "router_dropout": 0.5},
    "K = 2": {"tasks": 2}, "K = 4": {"tasks": 4}, "K = 16": {"tasks": 16}, "K = 32": {"tasks": 32},
}  # fmt: skip
CONTROLS: dict[str, dict[str, Any]] = {
    "w replaced by its mean": {}, "w of another sample": {}, "router: random": {},
    "router: none": {"router": "none"}, "K = 1, Gumbel noise": {"tasks": 1, "gumbel": True},
}  # fmt: skip
DEFAULTS = {"steps": 100, "batch_size": 8, "warmup": 10, "eval_every": 100, "eval_instances": 300,
            "lr_skills": 1e-2, "rank": 4, "train_instances": 8, "num_pos": 0,
            "max_source_length": 240}  # fmt: skip
FIXED = (*compare.FIXED, "splits", "max_tasks", "alpha", "router", "trainable")


@dataclass(frozen=True)
class ReportConfig:
    """Report: which cells are made, and from which files the tables."""

    stage: Literal[(*STAGES, "table")] = "table"  # what is made
    rows: tuple[str, ...] = ()  # of these rows alone (default: all of the stage)
    seeds: int = 3  # runs of each cell: initial values, order, noise
    tune: bool = True  # choose each row's rates on dev; else as given
    trials: int = 8  # runs, of seed 0, that each method's rates are tuned by
    tune_steps: int = 50  # optimiser steps of these
    train_tasks: int = 200  # training tasks, drawn by name; `sizes` takes the numbers below in place of it
    sizes: tuple[str, ...] = ("50", "687")  # training tasks of the cells of sample efficiency
    cells: tuple[str, ...] = ()  # of the stage these alone, by the names of their files
    final: bool = False  # show the unseen tasks that nothing was chosen by
    out: str = "results/report"  # folder of the runs
    results: str = str(RESULTS)  # folder of the finished cells (default: experiments/results)
    jobs: int = 0  # cells at a time (0: one on a GPU; on the CPU one a core)
    gpu: int | None = None  # number of the GPU
    device: Literal["cpu", ""] = ""  # no GPU even if there is one

    def __post_init__(self) -> None:
        runtime.require_least(self, seeds=1, trials=1, tune_steps=1, train_tasks=1, jobs=0)
        rows = {"methods": ROWS, "tune": ROWS, "sizes": ROWS, "changes": CHANGES, "controls": CONTROLS,
                **dict.fromkeys(PROMPTS, ANSWERING)}
        known = rows.get(self.stage, ())
        if odd := set(self.rows) - set(known):
            raise ValueError(f"--rows {min(odd)}: of --stage {self.stage} are {', '.join(known) or 'none'}")


def halves(tasks: Iterable[str]) -> dict[str, list[str]]:
    """The unseen tasks in two: what concerns generalisation is chosen on the one, and shown on the other."""
    tasks = sorted(tasks)
    random.Random("unseen").shuffle(tasks)
    return {"unseen-dev": sorted(tasks[::2]), "unseen-test": sorted(tasks[1::2])}


class Study(NamedTuple):
    config: ReportConfig
    configs: dict[str, Any]
    facts: dict[str, dict[str, str]]  # by number of training tasks
    roots: dict[str, Path]
    extra: dict[str, int]  # extra_rank of each row

    def cell(self, stage: str, name: str, row: str, fields: dict[str, Any], *, size: str = "",
             answers: bool = False, **options: Any) -> Cell:
        size = size or str(self.config.train_tasks)
        configs = changed(self.configs, data=str(self.roots[size]), **fields)
        return Cell(row, Path(self.config.out, stage, name), configs, self.facts[size], answers=answers,
                    kept=Path(self.config.results, stage, f"{name}.json"), **options)

    def fields(self, row: str) -> dict[str, Any]:
        return {"seed": 0, "alpha": float(self.configs["adapter"].rank), "extra_rank": self.extra[row],
                **ROWS[row]}

    def search(self, row: str) -> Search:
        """Over the rates of all that the row trains, at scale 1."""
        fields = self.fields(row)
        configs = changed(self.configs, **fields)
        axes = [axis for axis in axes_of(fields["method"], configs["adapter"]) if axis != "alpha"]
        steps = {"steps": self.config.tune_steps, "eval_every": self.config.tune_steps}

        def cell_of(values: dict[str, float]) -> Cell:
            name = "_".join([slug(row), *(f"{value:g}" for value in values.values())])
            return self.cell("tune", name, row, fields | steps | values, closing=False)

        return Search(axes, {axis: getattr(configs["train"], axis) for axis in axes}, self.config.trials,
                      cell_of)

    def queues(self, best: dict[str, dict[str, float]]) -> list[list[Cell]]:
        """The cells of the stage, the first seed's first, those that share a run in one queue."""
        only, stages = self.config.cells, {
            "methods": self.points, "sizes": self.points, "changes": self.varied, "controls": self.varied,
            "tune": lambda best, seed: (), **dict.fromkeys(PROMPTS, self.answers)}
        make = stages[self.config.stage]
        made = [queue for seed in range(self.config.seeds) for queue in make(best, seed)]
        wanted = [[cell for cell in queue if not only or cell.kept.stem in only] for queue in made]
        return [queue for queue in wanted if queue]

    def points(self, best: dict[str, dict[str, float]], seed: int) -> Iterator[list[Cell]]:
        """Of each row every scale, or every number of training tasks."""
        stage, rank, sizes = self.config.stage, self.configs["adapter"].rank, self.config.sizes
        points = {f"x{scale:g}": {"alpha": scale * rank} for scale in SCALES}
        points = {size: {} for size in sizes} if stage == "sizes" else points
        for row, (point, more) in itertools.product(self.config.rows or ROWS, points.items()):
            fields = self.fields(row) | best[row] | {"seed": seed} | more
            yield [self.cell(stage, f"{slug(row)}-{point}-s{seed}", row, fields,
                             size=point if stage == "sizes" else "")]

    def answers(self, best: dict[str, dict[str, float]], seed: int) -> Iterator[list[Cell]]:
        """Of each row its best scale; what is not trained once."""
        scales, prompts = best_scales(read_cells(Path(self.config.results))), PROMPTS[self.config.stage]
        for row in self.config.rows or ANSWERING:
            fields, run = {"seed": seed} | ({"method": "full"} if row == "full" else {}), None
            if row in ROWS:
                if row not in scales:
                    raise ValueError(f"--rows {row}: its scale is chosen by --stage methods; run that first")
                alpha = scales[row] * self.configs["adapter"].rank
                fields |= self.fields(row) | best[row] | {"seed": seed, "alpha": alpha}
                run = Path(self.config.out, f"methods/{slug(row)}-x{scales[row]:g}-s{seed}")
            if row not in compare.UNTRAINED or not seed:
                yield [self.cell(self.config.stage, f"{slug(row)}-s{seed}", row, fields | prompts,
                                 answers=True, of=None if prompts else run)]

    def varied(self, best: dict[str, dict[str, float]], seed: int) -> Iterator[list[Cell]]:
        """OrchMoE with one change; those that score one run differently share a queue."""
        stage, shared = self.config.stage, []
        rows = CHANGES if stage == "changes" else CONTROLS
        run = Path(self.config.out, f"methods/orchmoe-x1-s{seed}")
        for row in self.config.rows or rows:
            fields = self.fields("orchmoe") | best["orchmoe"] | {"seed": seed} | rows[row]
            of = run if row in compare.SCORED_ONLY else None
            cell = self.cell(stage, f"{slug(row)}-s{seed}", row, fields, of=of)
            if of:
                shared.append(cell)
            else:
                yield [cell]
        yield shared


def make_study(config: ReportConfig, configs: dict[str, Any], place: runtime.Device) -> Study:
    tokenizer, root = tokenizers.load(configs["train"].model), Path(configs["data"].data)
    lists = data.read_splits(root)
    order = sorted(lists["train"])
    random.Random("train").shuffle(order)  # by name: fewer tasks are among more
    facts, roots = {}, {}
    for size in {str(config.train_tasks), *(config.sizes if config.stage == "sizes" else ())}:
        roots[size] = subset(Path(config.out, f"tasks-{size}"), root, order[:int(size)], lists["test"])
        facts[size], _ = compare.facts_of(changed(configs, data=str(roots[size])), tokenizer, place)
    base, adapter = on_meta(checkpoint.config(configs["train"].model)), configs["adapter"]
    token = changed(configs, router="token")["adapter"]
    dearest = sum(parameters("orchmoe", base, token).values())
    found = budget(("orchmoe", "lora", "moe-lora", "poly"), base, adapter, config.train_tasks, dearest)
    extra = {row: 0 if "router" in fields else found[fields["method"]] for row, fields in ROWS.items()}
    return Study(config, configs, facts, roots, extra)


# ------------------------------------------------------------------------------------------------- the tables


def read_cells(folder: Path) -> dict[str, dict[str, Any]]:
    """{name below the folder: cell} of all finished cells."""
    return {str(path.relative_to(folder).with_suffix("")): runtime.read_json(path)
            for path in sorted(folder.glob("*/*.json"))}


def by_task(cell: dict[str, Any], which: str, metric: str = "loss") -> np.ndarray:
    """(T,) losses, or another metric, NaN where there is none: of seen tasks, or of a half of the unseen."""
    scores = cell[which.partition("-")[0]]["tasks"]
    names = {"seen": sorted(scores), **halves(scores)}[which]
    return np.array([scores[task].get(metric, np.nan) for task in names])


def curves(cells: dict[str, dict[str, Any]]) -> dict[str, dict[float, list[dict[str, Any]]]]:
    """{row: {scale: cells of the seeds, in their order}} of the stage `methods`."""
    found: dict[str, dict[float, list[dict]]] = {}
    for name, cell in cells.items():
        if name.startswith("methods/"):
            row, rank, alpha = (cell["settings"][name] for name in ("row", "rank", "alpha"))
            found.setdefault(row, {}).setdefault(alpha / rank, []).append(cell)
    for scales in found.values():
        for group in scales.values():
            group.sort(key=lambda cell: cell["settings"]["seed"])
    return {row: dict(sorted(found[row].items())) for row in ROWS if row in found}


def best_scales(cells: dict[str, dict[str, Any]]) -> dict[str, float]:
    """{row: scale}: the least of dev loss and loss on the half of the unseen tasks to choose by, summed."""
    return {row: min(scales, key=lambda scale: np.mean(
        [cell["dev_loss"] + by_task(cell, "unseen-dev").mean() for cell in scales[scale]]))
        for row, scales in curves(cells).items()}


def at_equal(one: dict, other: dict, along: str, across: str) -> tuple[float, float, float] | None:
    """Difference one - other in the loss `across`, at equal mean loss `along`, with its interval over tasks
    and seeds. Each seed's curve over the scales is read, linearly, at the middle of the range that all of
    both have; None where they have none."""
    seeds = min(len(group) for curve in (one, other) for group in curve.values())
    read, ranges = [], []
    for curve in (one, other):
        x = np.array([[by_task(cell, along).mean() for cell in group[:seeds]] for group in curve.values()])
        y = np.array([[by_task(cell, across) for cell in group[:seeds]] for group in curve.values()])
        ranges += [(x.min(0).max(), x.max(0).min())]
        read.append((x, y))  # (scales, seeds), (scales, seeds, T)
    low, high = max(low for low, _ in ranges), min(high for _, high in ranges)
    if low > high:
        return None
    at, found = (low + high) / 2, []
    for x, y in read:
        order = x.argsort(0)
        found.append(np.array([[np.interp(at, x[order[:, s], s], y[order[:, s], s, t]) for s in range(seeds)]
                               for t in range(y.shape[2])]))  # (T, seeds)
    return interval(found[0] - found[1])


def figure(cells: dict[str, dict[str, Any]], path: Path) -> Path:
    """Seen against unseen loss, a curve for each row over its scales. The bars are intervals, over tasks and
    seeds together, of the difference from the first row's first scale, whose own are nothing."""
    found = curves(cells)
    reference = next(iter(next(iter(found.values())).values()))
    canvas, axes = plot.canvas("Loss on seen and on unseen tasks, over the scales", Path(path.parent.name), 5)
    for i, (row, scales) in enumerate(found.items()):
        points, bars = [], []
        for group in scales.values():
            seeds, here = min(len(group), len(reference)), []
            for which in ("seen", "unseen-dev"):
                one, other = (np.stack([by_task(cell, which) for cell in part[:seeds]], 1)
                              for part in (group, reference))
                mean, low, high = interval(one - other)
                here.append((other.mean() + mean, mean - low, high - mean))
            points.append([at for at, *_ in here])
            bars.append([bar for _, *bar in here])
        x, y = np.array(points).T
        errors = np.array(bars)  # (scales, 2, 2)
        axes.errorbar(x, y, xerr=errors[:, 0].T, yerr=errors[:, 1].T, label=row, color=plot.COLOURS[i],
                      marker=plot.MARKERS[i], markersize=5, linewidth=1.5, elinewidth=0.6)
        for scale, *at in zip(scales, x, y, strict=True):
            axes.annotate(f"x{scale:g}", at, xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set(xlabel="seen tasks (nats per target token)", ylabel="unseen tasks, the half to choose by")
    axes.legend()
    return plot.save(canvas, path)


def text(cells: dict[str, dict[str, Any]], final: bool = False) -> str:
    """Tables of losses, as Markdown: each point of the curves, curve against curve, single changes."""
    which = ["seen", "unseen-dev", *(["unseen-test"] if final else [])]
    found, parts = curves(cells), []
    lines = []
    for row, scales in found.items():
        for scale, group in scales.items():
            means = [np.mean([by_task(cell, name).mean() for cell in group]) for name in which]
            lines.append([row, f"{scale:g}", len(group), f"{np.mean([c['dev_loss'] for c in group]):.3f}",
                          *(f"{mean:.3f}" for mean in means)])
    parts.append(table(["row", "scale", "seeds", "dev", *which], lines))
    lines = []
    for row in found.keys() - {"orchmoe"} if "orchmoe" in found else ():
        ways = [("seen", name) for name in which[1:]] + [(name, "seen") for name in which[1:]]
        said = [at_equal(found["orchmoe"], found[row], *way) for way in ways]
        lines.append([row, *("{:+.3f} [{:+.3f}, {:+.3f}]".format(*each) if each else "no range in common"
                             for each in said)])
    heads = [f"{name} at equal seen" for name in which[1:]] + [f"seen at equal {name}" for name in which[1:]]
    parts.append(table(["orchmoe - row", *heads], sorted(lines)))
    groups: dict[tuple[str, str], list[dict]] = {}
    for name, cell in cells.items():
        if (stage := name.split("/")[0]) not in ("tune", "methods"):
            what = cell["settings"]["row"]
            what += f", {name.rsplit('-', 2)[1]} tasks" if stage == "sizes" else ""
            if stage in PROMPTS and what in ROWS:
                what += f", scale {cell['settings']['alpha'] / cell['settings']['rank']:g}"
            groups.setdefault((stage, what), []).append(cell)
    for answers, metrics in ((True, tuple(METRICS)), (False, ("loss",))):
        lines = [[stage, row, len(group), *(
            f"{np.mean([by_task(cell, name, metric).mean() for cell in group]):.3f}".replace("nan", "-")
            for name in which for metric in metrics)]
            for (stage, row), group in sorted(groups.items()) if (stage in PROMPTS) == answers]
        heads = [f"{name} {METRICS[metric]}" for name in which for metric in metrics]
        parts.append(table(["stage", "row", "seeds", *heads], lines))
    return "\n\n".join(filter(None, parts)) + "\n"


# ------------------------------------------------------------------------------------------------ the program


def make(config: ReportConfig, configs: dict[str, Any], place: runtime.Device) -> None:
    """All cells of the stage that are not there; of other stages than `tune` first the tuning."""
    study = make_study(config, configs, place)
    best: dict[str, dict[str, float]] = {row: {} for row in ROWS}
    if config.tune:
        rows = ["orchmoe"] if config.stage in ("changes", "controls") else config.rows or ROWS
        rows = [row for row in rows if row in ROWS]
        searches = {row: study.search(row) for row in rows}
        run_cells(list(searches.values()), config, place)
        reports = {row: search.report() for row, search in searches.items()}
        runtime.say(tuning_table(reports))
        best = {row: found["best"] for row, found in reports.items()}
    run_cells(study.queues(best), config, place)


def main() -> None:
    classes = ReportConfig, *train.CONFIGS.values()
    flags = runtime.read_flags(__doc__, *classes, defaults=DEFAULTS, hidden=FIXED)
    for name in FIXED:
        if name in flags:
            raise ValueError(f"--{name.replace('_', '-')}: the report sets this itself; leave it out")
    runtime.require_alone()
    config = runtime.from_flags(ReportConfig, flags)
    if config.stage != "table":
        configs = {name: runtime.from_flags(cls, DEFAULTS | flags) for name, cls in train.CONFIGS.items()}
        place = runtime.pick_device(config.gpu, config.device, configs["train"].dtype,
                                    base=configs["train"].model)
        runtime.say(place.reason)
        make(config, configs, place)
    cells = read_cells(Path(config.results))
    for stage in STAGES:
        runtime.say(f"{stage}: {sum(name.startswith(f'{stage}/') for name in cells)} cells")
    runtime.say(tables := text(cells, config.final))
    with runtime.atomic_write(Path(config.results) / "tables.md") as file:
        file.write(tables.encode())
    if curves(cells) and importlib.util.find_spec("matplotlib"):
        runtime.say(f"written: {figure(cells, Path(config.results) / 'curves.png')}")


if __name__ == "__main__":
    runtime.run_program(main)
