"""The map of where routing pays: its tables, and cells that cannot be compared."""

import shutil

import pytest

from experiments import map as routing_map
from experiments.tables import paired
from support.program import UserError

RESULTS = routing_map.RESULTS


def test_the_tables_are_those_of_the_cells():
    """Some rows lack seeds that others have, and some cells are of older versions."""
    tables = (RESULTS / "tables.md").read_text(encoding="utf-8")
    assert routing_map.text(RESULTS, routing_map.read_map(RESULTS)) == tables


def test_a_map_that_lacks_cells_is_refused(tmp_path):
    results = shutil.copytree(RESULTS, tmp_path / "map")
    (results / "steps-300/cells/floor-s1.json").unlink()
    with pytest.raises(UserError, match="steps-300/cells: cells are missing; name a"):
        routing_map.read_map(results)


def cell(*tasks, **settings):
    """Return a cell with these tasks."""
    return {"settings": settings, "seen": {"tasks": {task: {"loss": 1.0} for task in tasks}}}


def test_points_with_other_tasks_have_no_mean():
    with pytest.raises(UserError, match="the points have different seen tasks"):
        routing_map.mean_losses([cell("a", "b"), cell("a", "c")], "seen")


@pytest.mark.parametrize(
    "other, words",
    [
        (cell("a", "c", cpu="x", computed="y"), "have different seen tasks"),
        (cell("a", "b", cpu="z", computed="y"), "differ in 'cpu'"),
        (cell("a", "b", cpu="x", computed="z"), "differ in 'computed'"),
    ],
)
def test_rows_of_other_tasks_or_machines_are_not_compared(other, words):
    own = cell("a", "b", cpu="x", computed="y")
    with pytest.raises(UserError, match=f"the cells of two rows {words}"):
        paired({0: own}, {0: other}, "seen")
