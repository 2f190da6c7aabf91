"""Figures of a run and of a comparison, as PNG files beside their numbers. What the router of a run does is
computed first, as routing.json in its folder. Needs matplotlib, which nothing else does; draws without a
display, in colours that the colour-blind can tell apart (Okabe and Ito; cividis).

    python -m experiments.plot --run runs/orchmoe-1          # loss, categories, router, allocation
    python -m experiments.plot --results results/compare     # these; ablations, where they were run"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

import run_folder
import runtime
from experiments import routing

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
MARKERS = "osD^vP*X"
GREYS = {"frozen base": "0", "copy-demo": "0.5", "copy-input": "0.78"}  # rows that nothing was trained for
WIDTH = 8.5  # inches at 150 dots: a page shows it at 850 pixels, and 9 points are 12 pixels there
MOST_ROWS = 100  # tasks of the router's map; beyond them it has one row a category


@dataclass(frozen=True)
class PlotConfig:
    """Figures: of a run, or of a comparison."""

    run: str = ""  # folder of a run of train.py
    results: str = ""  # or folder of a comparison, the --out of experiments.compare
    model: str = ""  # with --run: where the run's base is now, if it has moved
    gpu: int | None = None  # number of the GPU, to compute what the router does
    device: Literal["cpu", ""] = ""  # no GPU even if there is one

    def __post_init__(self) -> None:
        if bool(self.run) == bool(self.results):
            raise ValueError("give one of --run and --results")


def pyplot() -> Any:
    """matplotlib.pyplot on the Agg canvas; a ValueError with the remedy where it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("matplotlib is missing, which figures alone need; pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9,
                         "axes.titlesize": 9, "legend.frameon": False})
    return plt


def records(folder: str | Path) -> list[dict]:
    """The log of a run."""
    path = runtime.require_path(Path(folder) / "metrics.jsonl", "name the folder of a run")
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON lines ({error}); resume the run, which mends it") from None
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: a line is no object; resume the run, which mends it")
    if not all(any(name in row for row in rows) for name in ("loss", "dev_loss")):
        raise ValueError(f"{path}: no loss or no dev loss yet; wait for --eval-every steps")
    return rows


def canvas(title: str, of: str | Path, height: float, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """Figure and axes of a page's width; the title's second line says of what, mostly the folder."""
    figure, axes = pyplot().subplots(1, columns, figsize=(WIDTH, height), layout="constrained", **options)
    figure.suptitle(f"{title}\n{of}", fontsize=10)
    return figure, axes


def save(figure: Any, path: Path) -> Path:
    with runtime.atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)
    pyplot().close(figure)
    return path


def loss_curves(runs: dict[str, list[dict]], path: Path) -> Path:
    """Running mean of the training loss (thin), and the dev loss (marked), of each named run."""
    figure, axes = canvas("Loss: dev (marked), running mean of training (thin)", path.parent, 4)
    for i, (name, log) in enumerate(runs.items()):
        steps, losses = zip(*((row["step"], row["loss"]) for row in log if "loss" in row), strict=True)
        window = max(1, len(losses) // 20)
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1:], smooth, color=COLOURS[i % 8], alpha=0.5, linewidth=1)
        dev = [(row["step"] + 1, row["dev_loss"]) for row in log if "dev_loss" in row]
        axes.plot(*zip(*dev, strict=True), color=COLOURS[i % 8], marker=MARKERS[i % 8], markersize=4,
                  label=name)
    axes.set(xlabel="step", ylabel="loss (nats per target token)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    return save(figure, path)


def category_bars(scores: dict[str, list[dict]], path: Path, which: str) -> Path:
    """ROUGE-L of each category, mean over the seeds; scores: those of each row's runs on seen or unseen."""
    categories = sorted({name for runs in scores.values() for name in runs[0]["categories"]})
    height = 1.4 + len(categories) * (0.1 + 0.075 * len(scores))
    figure, axes = canvas(f"ROUGE-L on {which} tasks by category (in brackets: over all)", path.parent,
                           height)
    coloured = [row for row in scores if row not in GREYS]
    for i, (row, runs) in enumerate(scores.items()):
        values = [np.mean([run["categories"][name]["rougeL"] for run in runs]) for name in categories]
        place = np.arange(len(categories)) + (i - (len(scores) - 1) / 2) * 0.8 / len(scores)
        overall = np.mean([run["overall"]["rougeL"] for run in runs])
        axes.barh(place, values, 0.8 / len(scores), label=f"{row} ({overall:.1f})",
                  color=GREYS.get(row) or COLOURS[coloured.index(row) % 8])
    axes.set_yticks(range(len(categories)), categories)
    axes.grid(axis="x", color="0.85", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set(xlabel="ROUGE-L (%)", xlim=(0, 100), ylim=(len(categories) - 0.5, -0.5))
    figure.legend(loc="outside lower center", ncols=min(4, len(scores)))
    return save(figure, path)


def router_map(learnt: dict, path: Path, of: Path) -> Path:
    """Mean w of each real task, grouped by category; with many tasks, of each category."""
    tasks = sorted(learnt["w"], key=lambda task: (learnt["category"][task], task))
    categories = [learnt["category"][task] for task in tasks]
    w = np.array([learnt["w"][task] for task in tasks])  # (T,K)
    starts = [i for i in range(len(tasks)) if not i or categories[i] != categories[i - 1]]
    labels = [f"{categories[i]}:  {task}" if i in starts else task for i, task in enumerate(tasks)]
    if len(tasks) > MOST_ROWS:
        w = np.array([rows.mean(0) for rows in np.split(w, starts[1:])])
        labels, starts = [categories[i] for i in starts], []
    figure, axes = canvas("Weight w of the abstract tasks, mean over seen instances", of,
                           1.2 + 0.19 * len(labels))
    image = axes.imshow(w, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for i in starts[1:]:
        axes.axhline(i - 0.5, color="white", linewidth=1.2)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_xticks(range(w.shape[1]), range(1, w.shape[1] + 1))
    axes.set(xlabel="abstract task")
    figure.colorbar(image, ax=axes, label="w", aspect=40)
    return save(figure, path)


def allocation_map(learnt: dict, path: Path, of: Path) -> Path:
    """Zhat of each adapted Linear, a row of skills for each abstract task; and the skills' use, mean c."""
    names, Zhat = list(learnt["skill_use"]), np.array(learnt["allocation"])  # (N,K,S)
    use, (N, K, S) = np.array(list(learnt["skill_use"].values())), Zhat.shape  # (N,S)
    figure, (left, right) = canvas("Skills of each adapted Linear", of, 1.6 + 0.19 * N, columns=2,
                                    sharey=True, width_ratios=[2, 1])
    image = left.imshow(Zhat.reshape(N, K * S), cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for k in range(1, K):
        left.axvline(k * S - 0.5, color="white", linewidth=1.2)
    left.set_xticks([k * S + (S - 1) / 2 for k in range(K)], range(1, K + 1))
    left.set_yticks(range(N), names, fontsize=8)
    left.set(xlabel=f"abstract task, {S} skills each", title="Ẑ, shares of one abstract task")
    for s in range(S):
        right.barh(range(N), use[:, s], 0.9, use[:, :s].sum(1), color=COLOURS[s % 8], edgecolor="white")
    right.set(xlabel=f"skills 1 to {S}, from left to right", title="Use: mean c over seen instances",
              xlim=(0, max(1, use.sum(1).max())))
    figure.colorbar(image, ax=left, label="share", location="bottom", aspect=50)
    return save(figure, path)


def ablation_intervals(summary: Sequence[dict], path: Path) -> Path:
    """What each change costs: the difference default - row in ROUGE-L, with its interval."""
    rows = [entry for entry in summary if entry["row"] != "default"]
    figure, panels = canvas("Ablations: ROUGE-L of the default less that of the row, 95 % interval",
                             path.parent, 1.4 + 0.24 * len(rows), columns=2, sharey=True)
    for axes, which, colour in zip(panels, ("seen", "unseen"), COLOURS, strict=False):
        for i, entry in enumerate(rows):
            mean, low, high = entry.get(f"{which} rougeL", {}).get("difference") or (np.nan,) * 3
            axes.plot([low, high], [i, i], color=colour, linewidth=2)
            axes.plot(mean, i, color=colour, marker="o", markersize=5)
        axes.axvline(0, color="0.4", linewidth=1, zorder=0)
        axes.set(xlabel="points of ROUGE-L; right: default better", title=f"{which} tasks")
    panels[0].set_yticks(range(len(rows)), [entry["row"] for entry in rows])
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    return save(figure, path)


def routing_figures(learnt: dict, folder: Path, of: Path) -> Iterator[Path]:
    """The maps of the routing report of the run in `of`, as far as the method has what they show."""
    if "w" in learnt:
        yield router_map(learnt, folder / "router.png", of)
    if "allocation" in learnt:
        yield allocation_map(learnt, folder / "allocation.png", of)


def measure_routing(folder: Path, config: PlotConfig) -> None:
    """routing.json of a run that has adapters, unless it is there and no older than these."""
    adapter, written = folder / "adapter.safetensors", folder / "routing.json"
    if adapter.exists() and not (written.exists() and written.stat().st_mtime >= adapter.stat().st_mtime):
        base = config.model or run_folder.read_config(folder).train["model"]
        place = runtime.pick_device(config.gpu, config.device, base=base)
        runtime.write_json(written, routing.of_run(folder, place, model=config.model))
        runtime.print_line(f"written: {written}")


def run_figures(folder: Path) -> Iterator[Path]:
    """Every figure that a run's folder has the numbers for."""
    yield loss_curves({folder.name: records(folder)}, folder / "loss.png")
    scores = runtime.read_json(folder / "scores.json") if (folder / "scores.json").exists() else {}
    for which in ("seen", "unseen"):
        if any(which in sets for sets in scores.values()):
            yield category_bars({row: [sets[which]] for row, sets in scores.items()},
                                folder / f"categories-{which}.png", which)
    if (folder / "routing.json").exists():
        yield from routing_figures(runtime.read_json(folder / "routing.json"), folder, folder)


def read_results(path: Path) -> dict:
    if not ((results := runtime.read_json(path)).get("cells") and results.get("summary")):
        raise ValueError(f"{path}: cells and summary are missing; run it again")
    return results


def figures(out: Path) -> Iterator[Path]:
    """Every figure that a comparison's OUT/results.json and OUT/ablations.json have the numbers for."""
    if (out / "ablations.json").exists():
        yield ablation_intervals(read_results(out / "ablations.json")["summary"], out / "ablations.png")
    if not (out / "results.json").exists():
        return
    results = read_results(out / "results.json")
    cells: dict[str, list[dict]] = {}  # of each row, the lowest seed first
    for cell in results["cells"]:
        cells.setdefault(cell["row"], []).append(cell)
    logs = {row: out / "cells" / Path(group[0]["folder"]).name for row, group in cells.items()}
    runs = {row: records(folder) for row, folder in logs.items() if (folder / "metrics.jsonl").exists()}
    if runs:
        yield loss_curves(runs, out / "loss.png")
    for which in ("seen", "unseen"):
        scores = {row: [cell[which] for cell in group] for row, group in cells.items() if which in group[0]}
        if scores:
            yield category_bars(scores, out / f"categories-{which}.png", which)
    if "orchmoe" in cells:
        yield from routing_figures(cells["orchmoe"][0].get("learnt", {}), out, logs["orchmoe"])


def main() -> None:
    config = runtime.from_flags(PlotConfig, runtime.read_flags(__doc__, PlotConfig))
    runtime.require_single_process()
    if config.run:
        records(config.run)  # before anything is computed
        measure_routing(Path(config.run), config)
    written = run_figures(Path(config.run)) if config.run else figures(Path(config.results))
    found = False
    for path in written:
        found = True
        runtime.print_line(f"written: {path}")
    if not found:
        raise ValueError(f"{config.results}: no results.json or ablations.json; name a comparison's --out")


if __name__ == "__main__":
    runtime.run_program(main)
