"""Draw docs/differences.svg: for each comparison a dot for each draw, the mean and its interval.

    python -m docs.picture

The cells of the published studies have the numbers.  Test: pytest tests/repo/test_picture.py
"""

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np

from experiments.compare.tables import Difference, interval, signed
from support import program

PICTURE = program.ROOT / "docs/differences.svg"
RESULTS = program.ROOT / "experiments/results"


class Comparison(NamedTuple):
    """Two rows of a study, the first minus the second in the seen loss."""

    label: str
    study: str  # folder of the results
    first: str  # the name of a cell without its seed
    second: str


COMPARISONS = [
    Comparison("a LoRA", "why", "orchmoe", "lora"),
    Comparison("MHR", "why", "orchmoe", "mhr"),
    Comparison("MoE-LoRA, earlier", "claim", "first/orchmoe", "first/moe-lora"),
    Comparison("Poly, earlier", "claim", "first/orchmoe", "first/poly"),
    Comparison("MHR, earlier form", "claim", "first/orchmoe", "first/mhr"),
]

# Sizes in pixels. The comparisons stand below each other, each in a band.
WIDTH, HEAD, BAND, FOOT = 730, 34, 44, 48
LEFT, RIGHT = 125, 530  # the plot; its labels are on the left, its numbers on the right
STEP = 0.02  # nats between two lines of the scale
AXIS = "loss on new samples of the training tasks: OrchMoE minus the other, nats per target token"

STYLE = """
text { fill: #1A1A1A; }
.paper { fill: #FFFFFF; }
.grid { stroke: #D8D8D8; }
.zero { stroke: #1A1A1A; }
.draw { fill: #0072B2; fill-opacity: 0.45; }
.interval { stroke: #B34700; stroke-width: 2.5; }
.mean { fill: #B34700; }
.end { text-anchor: end; }
.middle { text-anchor: middle; }
@media (prefers-color-scheme: dark) {
  text { fill: #E4E8EE; }
  .paper { fill: #14181E; }
  .grid { stroke: #3D434B; }
  .zero { stroke: #E4E8EE; }
  .draw { fill: #56B4E9; }
  .interval { stroke: #FFA45C; }
  .mean { fill: #FFA45C; }
}
"""


def differences(comparison: Comparison) -> list[float]:
    """Return the difference of the mean loss over tasks in each draw, in nats."""
    losses: dict[str, dict[str, float]] = {comparison.first: {}, comparison.second: {}}
    path = RESULTS / comparison.study / "cells.jsonl"
    for _, _, cell in program.read_jsonl(path):
        row, _, seed = cell["name"].rpartition("-s")
        if row in losses:
            losses[row][seed] = fmean(task["loss"] for task in cell["seen"]["tasks"].values())
    first, second = losses.values()
    if not first or first.keys() != second.keys():
        raise program.UserError(f"{path}: {comparison.label}: the two rows have other seeds")
    return [first[seed] - second[seed] for seed in first]


def text(x: float, y: float, words: str, kind: str = "") -> str:
    shown = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{shown}>{words}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def dot(x: float, y: float, radius: float, kind: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" class="{kind}"/>'


class Scale:
    """Where a difference is on the horizontal axis. Its ends are multiples of STEP."""

    def __init__(self, values: Iterable[float]):
        steps = [value / STEP for value in values]
        self.low = int(np.floor(min(steps)))
        self.high = int(np.ceil(max(steps)))

    def x(self, value: float) -> float:
        return LEFT + (RIGHT - LEFT) * (value / STEP - self.low) / (self.high - self.low)

    def lines(self, bottom: float) -> list[str]:
        """Return the lines of the scale and their numbers."""
        parts = []
        for step in range(self.low, self.high + 1):
            x = self.x(step * STEP)
            parts.append(line(x, HEAD - 8, x, bottom, "grid" if step else "zero"))
            parts.append(text(x, bottom + 16, f"{step * STEP:+.2f}" if step else "0", "middle"))
        return parts


def band(values: list[float], label: str, scale: Scale, top: float) -> list[str]:
    """Return what shows a comparison: the dots above, mean and interval below."""
    mean, low, high = difference = interval_of(values)
    middle, below = top + BAND / 2, top + BAND - 9
    parts = [text(LEFT - 10, middle + 5, label, "end")]
    parts.append(text(RIGHT + 14, middle + 5, signed(difference)))
    for i, value in enumerate(values):
        # Four heights keep dots with nearly the same value apart.
        parts.append(dot(scale.x(value), top + 6 + 5 * (i % 4), 3.5, "draw"))
    parts.append(line(scale.x(low), below, scale.x(high), below, "interval"))
    parts.append(dot(scale.x(mean), below, 4.5, "mean"))
    return parts


def interval_of(values: list[float]) -> Difference:
    return interval(np.array(values)[:, None])


def picture(comparisons: list[Comparison]) -> str:
    """Return the picture as SVG."""
    found = [differences(comparison) for comparison in comparisons]
    scale = Scale(value for values in found for value in (0.0, *values))
    bottom = HEAD + BAND * len(found)
    height = bottom + FOOT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"'
        f' width="{WIDTH}" font-size="13" font-family="Helvetica, Arial, sans-serif">',
        "<title>OrchMoE minus each other method: a dot for each draw</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="paper" width="{WIDTH}" height="{height}"/>',
        text(LEFT - 10, 16, "OrchMoE minus", "end"),
        text(scale.x(0) - 8, 16, "OrchMoE is better", "end"),
        text(scale.x(0) + 8, 16, "worse"),
        text(RIGHT + 14, 16, "mean and 95 % interval", "mean"),
        text((LEFT + RIGHT) / 2, bottom + 36, AXIS, "middle"),
        *scale.lines(bottom),
    ]
    for i, (comparison, values) in enumerate(zip(comparisons, found, strict=True)):
        parts += band(values, comparison.label, scale, HEAD + BAND * i)
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    Path(PICTURE).write_text(picture(COMPARISONS), encoding="utf-8")


if __name__ == "__main__":
    program.run_program(main)
