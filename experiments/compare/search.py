"""The local search that tunes each method with the same number of trials.

Test: pytest tests/experiments/test_search.py
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

from support import program
from support.program import UserError

# What can be tuned: learning rates, and the scale of the skills.
AXES = ("lr_skills", "alpha", "lr_router", "lr_token_router", "lr_allocation")

Point = tuple[int, ...]  # steps from the start along each axis


def loss_of_trial(cell: Any) -> float:
    """Return the dev loss of a finished trial, infinity if its run diverged."""
    loss = cell.result()["dev_loss"]
    return math.inf if loss is None else loss


class Search:
    """Local search on a grid around a start: steps of a factor sqrt(10) in rates, of 2 in alpha.

    The next trial is an untried neighbour of the best point so far, until all trials are spent.
    Iterating yields the cells of the trials. Each must be finished, with a dev_loss, before the
    next one is asked for.
    """

    def __init__(
        self, start: dict[str, float], trials: int, cell_of: Callable[[dict[str, float]], Any]
    ):
        """start: value of each axis. cell_of: makes the cell of a trial from such values."""
        self.start = start
        self.trials = trials
        self.cell_of = cell_of
        self.losses: dict[Point, float] = {}  # dev loss of each tried point
        for axis, value in start.items():
            if not value > 0:
                raise UserError(
                    f"{program.flag(axis)} {value}: tuning starts from a value above 0; give one, "
                    "or --no-tune"
                )

    def __iter__(self) -> Iterator[Any]:
        self.losses = {}
        while len(self.losses) < self.trials:
            point = self.next_point()
            cell = self.cell_of(self.values(point))
            yield cell
            self.losses[point] = loss_of_trial(cell)

    def count_missing(self) -> int:
        """Return how many trials are left to make.

        Raise UserError if one was made with other settings.
        """
        for cell in self:
            cell.require_same()
            if not cell.path.exists():
                return self.trials - len(self.losses)
        return 0

    def best(self) -> Point:
        return min(self.losses, key=self.losses.get)

    def values(self, point: Point) -> dict[str, float]:
        """Return the value of each axis at a point, with three digits."""
        values = {}
        for (axis, start), steps in zip(self.start.items(), point, strict=True):
            factor = 2 if axis == "alpha" else 10**0.5
            values[axis] = float(f"{start * factor**steps:.3g}")
        return values

    def next_point(self) -> Point:
        """Return the untried point that is the nearest to the best one.

        Neighbours along one axis come before diagonal ones. Among equally near points, take
        the one whose values were tried least often.
        """
        if not self.losses:
            return (0,) * len(self.start)
        best = self.best()

        def cost(point):
            moves = [abs(i - j) for i, j in zip(point, best, strict=True)]
            tried = 0
            for number, move in enumerate(moves):
                if move:
                    tried += sum(other[number] == point[number] for other in self.losses)
            return sum(moves), tried, [-move for move in moves], point

        for reach in itertools.count(1):
            ranges = [range(i - reach, i + reach + 1) for i in best]
            untried = set(itertools.product(*ranges)) - self.losses.keys()
            if untried:
                return min(untried, key=cost)

    def edges(self) -> list[str]:
        """Return the axes on which the next value below or above the best was never tried."""
        edges = []
        for number, (axis, i) in enumerate(zip(self.start, self.best(), strict=True)):
            tried = {point[number] for point in self.losses}
            if not {i - 1, i + 1} <= tried:
                edges.append(axis)
        return edges

    def report(self) -> dict[str, Any]:
        """Return the best values, their dev loss, the edges, and all trials."""
        best = self.best()
        trials = []
        for point, loss in self.losses.items():
            trials.append({**self.values(point), "dev_loss": loss})
        return {
            "best": self.values(best),
            "dev_loss": self.losses[best],
            "edges": self.edges(),
            "trials": trials,
        }
