"""What the figures of the studies share. Needs matplotlib, and no display.

The colours can be told apart by the colour-blind (Okabe and Ito).
"""

from pathlib import Path
from typing import Any

from support import program

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
MARKERS = "osD^"
WIDTH = 8.5  # inches at 150 dots: a page shows it at 850 pixels, where 9 points are 12 pixels


def canvas(title: str, of: str, height: float, **options: Any) -> tuple[Any, Any]:
    """Return a figure of a page's width and its axes. `of` is the second line of the title."""
    import matplotlib

    matplotlib.use("Agg")  # draws into memory
    import matplotlib.pyplot as plt

    plt.rcParams["axes.spines.top"] = False
    plt.rcParams["axes.spines.right"] = False
    plt.rcParams["font.size"] = 9
    plt.rcParams["axes.titlesize"] = 9
    plt.rcParams["legend.frameon"] = False
    figure, axes = plt.subplots(figsize=(WIDTH, height), layout="constrained", **options)
    figure.suptitle(f"{title}\n{of}", fontsize=10)
    return figure, axes


def save(figure: Any, path: Path) -> Path:
    with program.atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)
    return path
