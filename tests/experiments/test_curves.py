"""The first study on SmolLM2: its curves and its tables."""

import re

import numpy as np
import pytest

import runtime
from experiments import curves, decision
from experiments import map as routing_map
from experiments.study import read_tuning
from experiments.tables import halves, interval
from helpers import ROOT, run


def cell(seen, unseen, **settings):
    """Return a cell with the given losses of tasks."""
    return {
        "seen": {"tasks": {f"s{i}": {"loss": loss} for i, loss in enumerate(seen)}},
        "unseen": {"tasks": {f"u{i}": {"loss": loss} for i, loss in enumerate(unseen)}},
        "dev_loss": 1.0,
        "settings": {"seed": 0, "rank": 2, **settings},
    }


def flat(seen, unseen, **settings):
    """Return a cell with the same loss on 20 seen tasks, and on 9 unseen tasks."""
    return cell(np.full(20, seen), np.full(9, unseen), **settings)


# ----------------------------------------------------------------------------------------- curves


def line(right=0.0, slope=1):
    """Return a curve of seen losses x + right, by which unseen losses are 5 - slope x."""
    points = {}
    for x in (1.0, 1.25, 1.5):
        points[x] = {0: cell(np.broadcast_to(x + right, 20), np.full(9, 5 - slope * x))}
    return points


def test_complete_prefers_cells_then_points():
    """An incomplete scale is left out if it would reduce the number of common seeds."""
    one = flat(1.0, 2.0)
    both = {0: one, 1: one}
    half = {0: one}
    assert list(curves.complete({4.0: both, 2.0: half, 1.0: both})) == [4.0, 1.0]
    assert list(curves.complete({4.0: both, 2.0: half, 1.0: half})) == [4.0, 2.0, 1.0]
    assert list(curves.complete({4.0: both, 2.0: half})) == [4.0, 2.0]  # two cells either way
    other = {1.0: {2: one}}
    assert curves.at_most(other, {1.0: both}, "seen", "unseen-dev") is None  # no common seed


def test_curves_along_a_line():
    """Along a line unseen = 5 - seen, a curve 0.1 to the right is 0.1 above at equal seen loss."""
    moved = line(0.1)
    shifted = pytest.approx((0.1, 0.1, 0.1))
    assert curves.at_most(moved, line(), "seen", "unseen-test") == shifted
    # One that ends before the other starts is read at its end: more loss on seen tasks is useless.
    found = curves.at_most(line(), line(0.6), "seen", "unseen-test")[0]
    assert found == pytest.approx(3.5 - (5 - 1.25))


def test_reading_of_a_curve_with_a_turn_is_at_its_best():
    """More scale lowers the unseen loss first, and then raises it, with the seen loss at last."""
    x = np.array([2.06, 2.035, 2.008, 2.12])
    y = np.array([1.34, 1.26, 1.199, 1.181])
    assert curves.reading(x, y, 2.02) == pytest.approx(1.199 - 0.018 * 0.012 / 0.112)
    x = np.array([2.1, 2.0, 2.3])
    y = np.array([1.25, 1.2, 1.3])
    read = [curves.reading(x, y, limit) for limit in (2.2, 2.0, 1.9)]
    assert read == pytest.approx([1.2, 1.2, np.nan], nan_ok=True)


def test_intervals_contain_the_noise_of_the_loss_they_are_read_at():
    """On lines unseen = 5 - seen the seen losses alone differ, of each task by another amount."""
    shift = np.random.default_rng(0).normal(0.1, 0.1, 20)
    still, moved = line(), line(shift)
    expected = pytest.approx(interval(shift[:, None]))
    assert curves.at_most(moved, still, "seen", "unseen-test") == expected
    assert curves.at_most(moved, still, "unseen-test", "seen") == expected
    # An offset that both curves share in a task does not widen the interval.
    found = curves.at_most(moved, line(shift, slope=2), "seen", "unseen-test")
    assert found == pytest.approx((1.25, found[0], found[0]))


def test_jackknife_seeds_count_what_is_read():
    """Three seeds in which the same is read: the lower of two points, in the last at a kink.

    What differs comes from the tasks alone, though without a task one or the other is the lower.
    """
    off = np.linspace(-0.1, 0.1, 12)  # of tasks, with mean 0
    first = np.stack([np.ones(12), np.ones(12), 1 + off], 1)
    second = np.stack([np.full(12, 2), np.full(12, 2), 1 - off], 1)
    losses = np.stack([first, second])  # (points, T, seeds)
    found = curves.jackknife(lambda means, _: means.min(0), losses, np.ones((1, 2, 3)))
    parts = np.stack([np.ones(12), np.ones(12), 1 + abs(off) - abs(off).mean()], 1)
    assert found == pytest.approx(interval(parts))


def test_read_cells_names_a_file_that_is_no_cell(tmp_path):
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods/lora-x1-s0.json").write_text('{"settings": {}, "seen": {}}')
    with pytest.raises(ValueError, match="lora-x1-s0.json: no finished cell"):
        curves.read_cells(tmp_path)


# ------------------------------------------------------------------------------------ best scales


def at(losses, test=None, seed=0):
    """Return cells of LoRA. losses: of the half to choose by, for each scale. test: the others."""
    shown = [int(name[1:]) for name in halves(f"u{i}" for i in range(9))["unseen-test"]]
    cells = {}
    for scale, dev in losses.items():
        unseen = np.full(9, dev)
        if test is not None:
            unseen[shown] = test
        settings = {"row": "lora", "alpha": 2.0 * scale, "seed": seed}
        cells[f"methods/lora-x{scale}-s{seed}"] = cell([1.0], unseen, **settings)
    return cells


def test_best_scales_are_of_the_seeds_that_all_scales_have():
    losses = {0.5: 3.0, 1.0: 2.5, 2.0: 2.0, 4.0: 3.0}
    cells = at(losses)
    assert curves.best_scales(cells) == {"lora": 2.0}
    assert curves.best_scales(cells | at({2.0: 9.0}, seed=1)) == {"lora": 2.0}
    edge = at({0.25: 1.0})  # of one seed: it counts where the others have no more
    assert curves.best_scales(cells | edge) == {"lora": 0.25}
    assert curves.best_scales(cells | edge | at(losses, seed=1)) == {"lora": 2.0}
    del cells["methods/lora-x4.0-s0"]
    assert curves.best_scales(cells) == {}


def test_best_scales_use_dev_and_the_half_to_choose_by():
    cells = at({0.5: 3.0, 1.0: 2.0, 2.0: 2.5, 4.0: 2.75}, 1.0) | at({1.0: 2.0}, 9.0)
    assert curves.best_scales(cells) == {"lora": 1.0}
    cells["methods/lora-x4.0-s0"]["dev_loss"] = -9.0
    assert curves.best_scales(cells) == {"lora": 4.0}


# ----------------------------------------------------------------------------------------- tables


def test_tables_and_pages_have_the_numbers_of_the_cells():
    """The pages quote differences with intervals either way round, of all seeds or the first."""
    cells = curves.read_cells(curves.RESULTS)
    tuning = read_tuning(curves.RESULTS)
    assert curves.text(cells, tuning) == (curves.RESULTS / "tables.md").read_text()
    text = curves.text(cells, tuning, final=True)
    assert text == (curves.RESULTS / "final.md").read_text()
    first_seed = {name: each for name, each in cells.items() if name.endswith("-s0")}
    text += curves.text(first_seed, tuning)
    of_map = routing_map.text(routing_map.RESULTS, routing_map.read_map(routing_map.RESULTS))
    assert of_map == (routing_map.RESULTS / "tables.md").read_text()
    of_decision = decision.text(decision.RESULTS)
    assert of_decision == (decision.RESULTS / "tables.md").read_text()
    assert of_decision.count("| not planned |") == 8  # floor and ceiling minus LoRA, on four sets
    text += of_map + of_decision

    def quoted(text, least):
        number = r"([-+]?\d+\.\d+)"
        found = re.findall(rf"{number}\s+\[{number},\s+{number}\]", text)
        assert len(found) == len(re.findall(rf"\[{number},\s+{number}\]", text)) >= least
        return {tuple(map(float, each)) for each in found}

    there = quoted(text, least=100)
    there |= {(-mean, -high, -low) for mean, low, high in there}
    for page, least in (("README.md", 4), ("docs/evidence.md", 10)):
        assert quoted((ROOT / page).read_text(encoding="utf-8"), least) <= there


def test_curves_writes_the_tables_of_a_folder(tmp_path):
    cells = tmp_path / "methods"
    cells.mkdir()
    for row in ("orchmoe", "lora"):
        saved = flat(1.0, 2.0, row=row, alpha=2.0)
        runtime.write_json(cells / f"{row}-x1-s0.json", saved)
    out = run("experiments/curves.py", "--results", tmp_path, cwd=tmp_path)
    tables = (tmp_path / "tables.md").read_text()
    assert tables in out
    assert "| orchmoe - row |" in tables
    assert "unseen-test" not in tables
    run("experiments/curves.py", "--results", tmp_path, "--final", cwd=tmp_path)
    assert "unseen-test" in (tmp_path / "final.md").read_text()
