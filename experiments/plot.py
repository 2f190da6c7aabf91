"""Draw figures of a run, as PNG files beside their numbers.

What the router of a run does is computed first, and written to routing.json in its folder. Needs
matplotlib, and no display. The colours can be told apart by the colour-blind (Okabe and Ito;
cividis).

    python -m experiments.plot --run runs/orchmoe-1       # loss, router, allocation

Letters: K abstract tasks, N adapted Linears, S skills.  Test: pytest tests/repo/test_docs.py
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

import run_folder
import runtime
from experiments import routing
from runtime import UserError

COLOURS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#F0E442",
    "#000000",
)
MARKERS = "osD^vP*X"
WIDTH = 8.5  # inches at 150 dots: a page shows it at 850 pixels, where 9 points are 12 pixels
MOST_ROWS = 100  # with more tasks the map of the router has one row for each category


@dataclass(frozen=True)
class PlotConfig:
    """Figures: of which run."""

    run: str = ""  # folder of a run of train.py
    model: str = ""  # where the run's base is now, if it has moved
    gpu: int | None = None  # number of the GPU, to compute what the router does
    device: Literal["cpu", ""] = ""  # use the CPU even if there is a GPU

    def __post_init__(self) -> None:
        if not self.run:
            raise UserError("give --run, the folder of a run")


def pyplot() -> Any:
    """Return matplotlib.pyplot, which draws into memory. Raise UserError if it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("figures need matplotlib; pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["axes.spines.top"] = False
    plt.rcParams["axes.spines.right"] = False
    plt.rcParams["font.size"] = 9
    plt.rcParams["axes.titlesize"] = 9
    plt.rcParams["legend.frameon"] = False
    return plt


def records(folder: str | Path) -> list[dict]:
    """Return the log of a run. Raise UserError if it is damaged or has no dev loss yet."""
    path = runtime.require_path(Path(folder) / "metrics.jsonl", "name the folder of a run")
    with runtime.reading(path, "resume the run, which repairs it"):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for name in ("loss", "dev_loss"):
            if not any(name in row for row in rows):
                raise ValueError(f"no {name} yet")
    return rows


def canvas(title: str, of: str | Path, height: float, **options: Any) -> tuple[Any, Any]:
    """Return a figure of a page's width and its axes. `of` is the second line of the title."""
    figure, axes = pyplot().subplots(figsize=(WIDTH, height), layout="constrained", **options)
    figure.suptitle(f"{title}\n{of}", fontsize=10)
    return figure, axes


def save(figure: Any, path: Path) -> Path:
    with runtime.atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)
    pyplot().close(figure)
    return path


# --------------------------------------------------------------------------------------- figures


def loss_curve(log: list[dict], path: Path) -> Path:
    """Draw the dev loss (marked) and the running mean of the training loss (thin) of a run."""
    title = "Loss: dev (marked), running mean of training (thin)"
    figure, axes = canvas(title, path.parent, height=4)
    losses = [row["loss"] for row in log if "loss" in row]
    steps = [row["step"] for row in log if "loss" in row]
    window = max(1, len(losses) // 20)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    axes.plot(steps[window - 1 :], smooth, color=COLOURS[0], alpha=0.5, linewidth=1)

    dev = [row for row in log if "dev_loss" in row]
    dev_steps = [row["step"] + 1 for row in dev]
    axes.plot(dev_steps, [row["dev_loss"] for row in dev], color=COLOURS[0], marker="o")
    axes.set(xlabel="step", ylabel="loss (nats per target token)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return save(figure, path)


def router_map(learnt: dict, path: Path, of: Path) -> Path:
    """Draw the mean w of each real task by category; with many tasks, that of each category."""
    category = learnt["category"]
    tasks = sorted(learnt["w"], key=lambda task: (category[task], task))
    rows = []
    labels = []
    starts = []  # first row of each category
    for task in tasks:
        labels.append(task)
        if not rows or category[task] != category[tasks[len(rows) - 1]]:
            starts.append(len(rows))
            labels[-1] = f"{category[task]}:  {task}"
        rows.append(learnt["w"][task])
    if len(rows) > MOST_ROWS:
        parts = np.split(np.array(rows), starts[1:])
        rows = [part.mean(axis=0) for part in parts]
        labels = [category[tasks[start]] for start in starts]
        starts = []

    title = "Weight w of the abstract tasks, mean over seen instances"
    figure, axes = canvas(title, of, height=1.2 + 0.19 * len(rows))
    image = axes.imshow(rows, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for start in starts[1:]:
        axes.axhline(start - 0.5, color="white", linewidth=1.2)
    K = len(rows[0])
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set_xticks(range(K), range(1, K + 1))
    axes.set(xlabel="abstract task")
    figure.colorbar(image, ax=axes, label="w", aspect=40)
    return save(figure, path)


def allocation_map(learnt: dict, path: Path, of: Path) -> Path:
    """Draw Zhat of each adapted Linear, and the use of its skills: mean c."""
    Zhat = np.array(learnt["allocation"])
    N, K, S = Zhat.shape
    use = np.array(list(learnt["skill_use"].values()))  # (N,S)
    options = {"ncols": 2, "sharey": True, "width_ratios": [2, 1]}
    figure, (left, right) = canvas("Skills of each adapted Linear", of, 1.6 + 0.19 * N, **options)

    image = left.imshow(Zhat.reshape(N, K * S), cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for k in range(1, K):
        left.axvline(k * S - 0.5, color="white", linewidth=1.2)
    left.set_xticks([k * S + (S - 1) / 2 for k in range(K)], range(1, K + 1))
    left.set_yticks(range(N), learnt["skill_use"], fontsize=8)
    left.set(xlabel=f"abstract task, {S} skills each", title="Ẑ, shares of one abstract task")
    figure.colorbar(image, ax=left, label="share", location="bottom", aspect=50)

    for s in range(S):
        start = use[:, :s].sum(axis=1)
        right.barh(range(N), use[:, s], 0.9, start, color=COLOURS[s % 8], edgecolor="white")
    right.set(xlabel=f"skills 1 to {S}, from left to right")
    right.set(title="Use: mean c over seen instances", xlim=(0, max(1, use.sum(axis=1).max())))
    return save(figure, path)


# ----------------------------------------------------------------------------- figures of a run


def measure_routing(folder: Path, config: PlotConfig) -> None:
    """Write routing.json of a run that has adapters, unless it is newer than these."""
    adapter = run_folder.RunFolder(folder).adapter_path
    path = folder / "routing.json"
    if not adapter.exists():
        return
    if path.exists() and path.stat().st_mtime >= adapter.stat().st_mtime:
        return
    base = config.model or run_folder.read_config(folder).training["model"]
    device = runtime.pick_device(config.gpu, config.device, base=base)
    runtime.write_json(path, routing.report_on_run(folder, device, model=config.model))
    runtime.print_line(f"written: {path}")


def run_figures(folder: Path) -> Iterator[Path]:
    """Draw every figure that the folder of a run has the numbers for."""
    yield loss_curve(records(folder), folder / "loss.png")
    learnt = {}
    if (folder / "routing.json").exists():
        learnt = runtime.read_json(folder / "routing.json")
    if "w" in learnt:
        yield router_map(learnt, folder / "router.png", folder)
    if "allocation" in learnt:
        yield allocation_map(learnt, folder / "allocation.png", folder)


def main() -> None:
    config = runtime.from_flags(PlotConfig, runtime.read_flags(__doc__, PlotConfig))
    runtime.require_single_process()
    folder = Path(config.run)
    records(folder)  # raises before anything is computed
    measure_routing(folder, config)
    for path in run_figures(folder):
        runtime.print_line(f"written: {path}")


if __name__ == "__main__":
    runtime.run_program(main)
