"""What each method is tuned over, and the local search that tunes it: the same number of trials for all.
Test: `pytest tests/experiments/test_search.py`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from orchmoe import OrchMoEConfig


def axes_of(method: str, adapter: OrchMoEConfig) -> tuple[str, ...]:
    """What the method is tuned over: the rates of all that it trains, and its scale."""
    if method == "full":
        return ("lr_full",)
    router = {"sample": ("lr_router",), "token": ("lr_token_router",), "none": ()}[adapter.router]
    own = {"orchmoe": (*router, "lr_allocation"), "lora": (), "moe-lora": ("lr_token_router",)}
    return "lr_skills", "alpha", *own.get(method, ("lr_allocation",))


class Search:
    """Local search on a grid around the values given: rates in steps of a factor sqrt(10), alpha of 2. The
    next trial is an untried neighbour of the best so far, until all trials are spent. Iterating yields the
    cells of the trials in turn, each to be finished, with its scores["dev_loss"], before the next is asked
    for."""

    def __init__(self, axes: Sequence[str], start: dict[str, float], trials: int,
                 cell_of: Callable[[dict[str, float]], Any]):
        self.axes, self.start, self.trials, self.cell_of = axes, start, trials, cell_of
        self.losses: dict[tuple[int, ...], float] = {}  # dev loss at each point, in steps from the start
        for axis in axes:
            if not start[axis] > 0:
                raise ValueError(f"--{axis.replace('_', '-')} {start[axis]}: tuning starts from a value "
                                 "above 0; give one, or --no-tune")

    def __iter__(self) -> Iterator[Any]:
        self.losses = {}
        while len(self.losses) < self.trials:
            point = self.next_point()
            cell = self.cell_of(self.values(point))
            yield cell
            self.losses[point] = cell.scores["dev_loss"]

    @property
    def best(self) -> tuple[int, ...]:
        return min(self.losses, key=self.losses.get)

    def values(self, point: tuple[int, ...]) -> dict[str, float]:
        steps = zip(self.axes, point, strict=True)
        return {axis: float(f"{self.start[axis] * (2 if axis == 'alpha' else 10**0.5) ** i:.3g}")
                for axis, i in steps}

    def next_point(self) -> tuple[int, ...]:
        """Neighbours along one axis come before diagonal ones, and both before points two steps away; among
        the neighbours those whose value of the axis was tried least."""
        if not self.losses:
            return (0,) * len(self.axes)

        def cost(point: tuple[int, ...]) -> tuple:
            moves = [abs(a - b) for a, b in zip(point, self.best, strict=True)]
            tried = sum(other[i] == point[i] for i, move in enumerate(moves) if move for other in self.losses)
            return sum(moves), tried, [-move for move in moves], point

        for reach in itertools.count(1):
            near = itertools.product(*(range(i - reach, i + reach + 1) for i in self.best))
            if untried := [point for point in near if point not in self.losses]:
                return min(untried, key=cost)

    def edges(self) -> list[str]:
        """The axes of which no trial had the next value on one side of the best's."""
        tried = [set(values) for values in zip(*self.losses, strict=True)]
        return [axis for axis, values, i in zip(self.axes, tried, self.best, strict=True)
                if not {i - 1, i + 1} <= values]

    def report(self) -> dict[str, Any]:
        return {"best": self.values(self.best), "dev_loss": self.losses[self.best], "edges": self.edges(),
                "trials": [{**self.values(point), "dev_loss": loss} for point, loss in self.losses.items()]}
