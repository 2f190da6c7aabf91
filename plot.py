"""Figures of a run and of a comparison, as PNG files beside their numbers. Needs matplotlib, which nothing
else does; draws without a display, in colours that the colour-blind can tell apart (Okabe and Ito; cividis).

    python plot.py --run runs/orchmoe-1          # loss.png
    python plot.py --results results/compare     # loss, sizes, categories, router, allocation"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import checkpoint
import runtime

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
MARKERS = "osD^vP*X"


@dataclass(frozen=True)
class PlotConfig:
    """Figures: of a run, or of a comparison."""

    run: str = ""  # folder of a run of train.py
    results: str = ""  # or --out of compare.py


def pyplot() -> Any:
    """matplotlib.pyplot on the Agg canvas; a ValueError with the remedy where it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("matplotlib is missing, which plot.py alone needs; pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9})
    return plt


def records(folder: str | Path) -> list[dict]:
    """The log of a run."""
    path = checkpoint.existing(Path(folder) / "metrics.jsonl", "name the folder of a run")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _save(figure: Any, path: Path) -> Path:
    with runtime.atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150, bbox_inches="tight")
    pyplot().close(figure)
    return path


def loss_curves(runs: dict[str, list[dict]], path: Path) -> Path:
    """Running mean of the training loss (thin), and the dev loss (marked), of each named run."""
    figure, axes = pyplot().subplots(figsize=(6, 3.6))
    for i, (name, log) in enumerate(runs.items()):
        steps, losses = zip(*((row["step"], row["loss"]) for row in log if "loss" in row), strict=True)
        window = max(1, len(losses) // 20)
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1:], smooth, color=COLOURS[i % 8], alpha=0.45, linewidth=1)
        dev = [(row["step"] + 1, row["dev_loss"]) for row in log if "dev_loss" in row]
        axes.plot(*zip(*dev, strict=True), color=COLOURS[i % 8], marker=MARKERS[i % 8], markersize=4,
                  label=name)
    axes.set(xlabel="step", ylabel="loss (nats per target token)",
             title="Loss: dev (marked), training (thin)")
    axes.legend(frameon=False)
    return _save(figure, path)


def size_curves(summary: Sequence[dict], path: Path) -> Path:
    """ROUGE-L against training instances, band of one sd over seeds; methods that have several sizes."""
    figure, panels = pyplot().subplots(1, 2, figsize=(8.5, 3.6))
    rows = [row for row in dict.fromkeys(entry["row"] for entry in summary)
            if sum(entry["row"] == row for entry in summary) > 1]
    for axes, which in zip(panels, ("seen", "unseen"), strict=True):
        for i, row in enumerate(rows):
            points = sorted((entry["size"], *(entry[f"{which} rougeL"][k] for k in ("mean", "sd")))
                            for entry in summary if entry["row"] == row and f"{which} rougeL" in entry)
            if points:
                size, mean, sd = np.array(points).T
                axes.plot(size, mean, color=COLOURS[i % 8], marker=MARKERS[i % 8], markersize=4, label=row)
                axes.fill_between(size, mean - sd, mean + sd, color=COLOURS[i % 8], alpha=0.18, linewidth=0)
        ticks = sorted({entry["size"] for entry in summary if entry["row"] in rows})
        axes.set_xscale("log")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set(xlabel="training instances a task", ylabel="ROUGE-L (%)", title=f"{which} tasks")
    panels[0].legend(frameon=False)
    figure.suptitle("Sample efficiency: mean and standard deviation over seeds", y=1.02)
    return _save(figure, path)


def category_bars(cells: Sequence[dict], path: Path, which: str = "seen") -> Path:
    """ROUGE-L of each category, mean over seeds, of the methods at the largest size."""
    largest = max(cell["size"] for cell in cells)
    cells = [cell for cell in cells if cell["size"] == largest and which in cell]
    rows = list(dict.fromkeys(cell["row"] for cell in cells))
    categories = sorted(cells[0][which]["categories"])
    figure, axes = pyplot().subplots(figsize=(1.5 + 0.13 * len(rows) * len(categories), 3.8))
    for i, row in enumerate(rows):
        mine = [cell[which]["categories"] for cell in cells if cell["row"] == row]
        values = [np.mean([scores[category]["rougeL"] for scores in mine]) for category in categories]
        place = np.arange(len(categories)) + (i - (len(rows) - 1) / 2) * 0.8 / len(rows)
        axes.bar(place, values, 0.8 / len(rows), color=COLOURS[(i - 1) % 8], label=row)
    axes.set_xticks(range(len(categories)), categories, rotation=35, ha="right")
    axes.set(ylabel="ROUGE-L (%)", ylim=(0, 100), title=f"{which.capitalize()} instances by category")
    axes.legend(frameon=False, ncols=len(rows), loc="upper center", bbox_to_anchor=(0.5, -0.42), fontsize=8)
    return _save(figure, path)


def router_map(learnt: dict, path: Path) -> Path:
    """Mean w of each real task, grouped by category."""
    tasks = sorted(learnt["w"], key=lambda task: (learnt["category"][task], task))
    w = np.array([learnt["w"][task] for task in tasks])  # (T,K)
    figure, axes = pyplot().subplots(figsize=(1.5 + 0.45 * w.shape[1], 1 + 0.2 * len(tasks)))
    image = axes.imshow(w, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    categories = [learnt["category"][task] for task in tasks]
    for i in range(1, len(tasks)):
        if categories[i] != categories[i - 1]:
            axes.axhline(i - 0.5, color="white", linewidth=1.2)
    labels = [task if i and categories[i] == categories[i - 1] else f"{categories[i]}:  {task}"
              for i, task in enumerate(tasks)]
    axes.set_yticks(range(len(tasks)), labels, fontsize=6.5)
    axes.set_xticks(range(w.shape[1]), range(1, w.shape[1] + 1))
    axes.set(xlabel="abstract task", title="Mean weight w of each real task's instances")
    figure.colorbar(image, ax=axes, label="w", shrink=0.6)
    return _save(figure, path)


def allocation_map(learnt: dict, path: Path) -> Path:
    """Zhat of each adapted Linear, a row of skills for each abstract task; and the skills' use, mean c."""
    names, Zhat = list(learnt["skill_use"]), np.array(learnt["allocation"])  # (N,K,S)
    use, (N, K, S) = np.array(list(learnt["skill_use"].values())), Zhat.shape  # (N,S)
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(3 + 0.14 * K * S, 1.2 + 0.2 * N), sharey=True,
                                              gridspec_kw={"width_ratios": [K * S, 2 * S], "wspace": 0.05})
    left.imshow(Zhat.reshape(N, K * S), cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for k in range(1, K):
        left.axvline(k * S - 0.5, color="white", linewidth=1.2)
    left.set_xticks([k * S + (S - 1) / 2 for k in range(K)], range(1, K + 1))
    left.set_yticks(range(N), names, fontsize=6.5)
    left.set(xlabel=f"abstract task, {S} skills each", title="Allocation Zhat")
    image = right.imshow(use, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    right.set_xticks(range(S), range(1, S + 1))
    right.set(xlabel="skill", title="Mean c")
    figure.colorbar(image, ax=(left, right), label="share", shrink=0.6, pad=0.02)
    return _save(figure, path)


def figures(out: Path) -> list[Path]:
    """Every figure that OUT/results.json of compare.py has the numbers for."""
    path = out / "results.json"
    if not path.exists():
        return []
    results = runtime.read_json(path)
    cells, written = results["cells"], []
    largest = max(cell["size"] for cell in cells)
    firsts = {cell["row"]: cell for cell in reversed(cells) if cell["size"] == largest}  # the lowest seed's
    runs = {row: records(cell["folder"]) for row, cell in reversed(firsts.items())
            if (Path(cell["folder"]) / "metrics.jsonl").exists()}
    if runs:
        written.append(loss_curves(runs, out / "loss.png"))
    if len({cell["size"] for cell in cells}) > 1:
        written.append(size_curves(results["summary"], out / "sizes.png"))
    for which in ("seen", "unseen"):
        if which in cells[0]:
            written.append(category_bars(cells, out / f"categories-{which}.png", which))
    learnt = firsts.get("orchmoe", {}).get("learnt", {})
    if "w" in learnt:
        written.append(router_map(learnt, out / "router.png"))
    if "allocation" in learnt:
        written.append(allocation_map(learnt, out / "allocation.png"))
    return written


def main() -> None:
    parser = runtime.Parser(__doc__)
    parser.add_dataclass(PlotConfig)
    config = runtime.from_flags(PlotConfig, vars(parser.parse_args()))
    if bool(config.run) == bool(config.results):
        raise ValueError("give one of --run and --results")
    if config.run:
        written = [loss_curves({Path(config.run).name: records(config.run)}, Path(config.run) / "loss.png")]
    else:
        checkpoint.existing(Path(config.results) / "results.json", "name the --out of a finished compare.py")
        written = figures(Path(config.results))
    for path in written:
        runtime.say(f"written: {path}")


if __name__ == "__main__":
    runtime.run_program(main)
