"""The evidence: cells that are files with their settings, made anew to the same numbers; curves compared
where both are, on unseen tasks in two halves."""

import importlib.util
import json
import re
from unittest import mock

import numpy as np
import pytest
import torch

import checkpoint
import data
import runtime
import tokenizer as tokenizers
import train
from experiments import compare, curves, report
from experiments.compare import definition_features
from experiments.fewshot import subset
from experiments.tables import interval
from helpers import ROOT, run
from orchmoe import OrchMoE, OrchMoEConfig, TaskRouter


def cell(seen, unseen, **settings):
    """A cell of given losses of a task each."""
    return {
        "seen": {"tasks": {f"s{i}": {"loss": loss} for i, loss in enumerate(seen)}},
        "unseen": {"tasks": {f"u{i}": {"loss": loss} for i, loss in enumerate(unseen)}},
        "dev_loss": 1.0,
        "settings": {"seed": 0, "rank": 2, **settings},
    }


def made(folder, stage, *flags, out="out", code=0):
    small = {
        "train-tasks": 3,
        "trials": 2,
        "tune-steps": 1,
        "steps": 2,
        "eval-every": 2,
        "seeds": 1,
        "eval-instances": 12,
        "jobs": 1,
        "results": folder / "kept",
        "out": folder / out,
    }
    small = [part for name, value in small.items() for part in (f"--{name}", value)]
    return run(
        "experiments/report.py",
        "--stage",
        stage,
        "--device",
        "cpu",
        *small,
        *flags,
        cwd=folder,
        code=code,
    )


def test_the_stages_leave_cells_that_can_be_made_anew(tmp_path, monkeypatch):
    for module in (report, curves):
        monkeypatch.setattr(module, "SCALES", (1.0, 2.0))
        monkeypatch.setattr(module, "EDGE", ())
    rows = ["--rows", "orchmoe,lora"]
    said = made(tmp_path, "methods", *rows)  # which are tuned first
    names = {
        "methods/orchmoe-x1-s0",
        "methods/orchmoe-x2-s0",
        "methods/lora-x1-s0",
        "methods/lora-x2-s0",
    }
    cells = curves.read_cells(tmp_path / "kept")
    assert {name for name in cells if name.startswith("methods")} == names
    assert sum(name.startswith("tune/") for name in cells) == 4 and "tune: 4 cells" in said
    for name in names:
        found = cells[name]
        assert (
            found["settings"]["steps"] == 2
            and found["settings"]["computed"] == "cpu, torch.float32"
        )
        assert str(tmp_path) not in json.dumps(found) and str(ROOT) not in json.dumps(found)
        assert len(found["seen"]["tasks"]) == 3 and all(
            scores.keys() == {"loss"} for scores in found["seen"]["tasks"].values()
        )
        assert set(found["unseen"]["tasks"]) == set(data.read_splits(ROOT / "sni")["test"])
        learnt = found.get("learnt", {})  # of what routes
        assert bool(learnt) == ("orchmoe" in name) and all(
            type(each) is float for each in learnt.values()
        )
    sizes = [
        sum(cells[f"methods/{row}-x1-s0"]["parameters"].values()) for row in ("orchmoe", "lora")
    ]
    assert abs(sizes[0] - sizes[1]) < 0.03 * sizes[0]
    assert [line for line in said.splitlines() if line.startswith("| lora | 2")]
    tables = (tmp_path / "kept/tables.md").read_text()
    assert "unseen-dev" in tables and "unseen-test" not in said + tables
    assert "unseen-test" in made(tmp_path, "table", "--final")
    assert "| lora | 2 | lr_skills" in (tmp_path / "kept/tables.md").read_text()
    assert (tmp_path / "kept/curves.png").exists() == bool(importlib.util.find_spec("matplotlib"))
    made(tmp_path, "answers", "--rows", "lora,frozen base,copy-demo")
    found = curves.read_cells(tmp_path / "kept")
    best = min(
        "12",
        key=lambda scale: (
            curves.by_task(cells[f"methods/lora-x{scale}-s0"], "unseen-dev").mean()
            + cells[f"methods/lora-x{scale}-s0"]["dev_loss"]
        ),
    )
    answers = found[f"answers/lora-x{best}-s0"]
    assert (
        answers["seen"]["overall"]["loss"]
        == cells[f"methods/lora-x{best}-s0"]["seen"]["overall"]["loss"]
    )
    assert {"rougeL", "exact_match", "loss"} <= found["answers/frozen_base-s0"]["unseen"][
        "overall"
    ].keys()
    assert f"| lora, scale {best} | 0 |" in (tmp_path / "kept/tables.md").read_text()
    kept = tmp_path / "kept/methods/lora-x2-s0.json"
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*.json")}
    kept.unlink()  # elsewhere, from nothing, this one cell
    best = [
        part
        for name in ("lr_skills", "lr_router")
        for part in (f"--{name.replace('_', '-')}", cells["methods/lora-x2-s0"]["settings"][name])
    ]
    made(tmp_path, "methods", *rows, "--cells", "lora-x2-s0", "--no-tune", *best, out="other")
    again = json.loads(kept.read_text())
    assert again["unseen"] == cells["methods/lora-x2-s0"]["unseen"]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items() if path != kept)
    said = made(tmp_path, "methods", "--cells", "lora-x3-s0", "--no-tune", code=2)
    assert "--cells lora-x3-s0: no cell" in said
    assert "tune: 4 cells" in made(tmp_path, "tune", *rows)  # with nothing left to do
    for row in (
        "lora",
        "poly",
    ):  # also of a cell that is not there yet: it would stand beside the others
        said = made(
            tmp_path,
            "methods",
            "--rows",
            row,
            "--cells",
            f"{row}-x2-s0",
            "--no-tune",
            "--steps",
            3,
            out="third",
            code=2,
        )
        assert re.search(
            r"answers/\S+-s0.json: made with steps 2, not 3; name another folder", said
        )


@pytest.mark.slow
def test_all_stages_leave_nothing(tmp_path, monkeypatch):
    few = {
        "ROWS": {"lora": {"method": "lora"}, "orchmoe": {"method": "orchmoe"}},
        "SCALES": (1.0,),
        "EDGE": (0.5,),
        "ABLATIONS": {"K = 2": {"tasks": 2}},
        "CONTROLS": {"router: none": {"router": "none"}},
        "ANSWERING": ("lora", "orchmoe", "full", "copy-demo"),
    }
    for name, value in few.items():
        for module in (report, curves):
            monkeypatch.setattr(module, name, value, raising=False)
    assert "methods: 0 cells of 4\n" in made(tmp_path, "table")
    said = made(tmp_path, "all", "--sizes", "2,3")
    for stage, cells in {
        "tune": 4,
        "methods": 4,
        "answers": 4,
        "examples": 4,
        "sizes": 4,
        "ablations": 1,
        "controls": 1,
    }.items():
        assert (
            f"{stage}: {cells} cells of {cells}\n" in said
            and len(list((tmp_path / "kept").glob(f"{stage}/*.json"))) == cells
        )


def test_controls_train_the_run_they_score_where_it_is_not_there(tmp_path):
    said = made(tmp_path, "controls", "--rows", "w replaced by its mean,w of another sample")
    cells = curves.read_cells(tmp_path / "kept")
    made(tmp_path, "methods", "--rows", "orchmoe")  # which finds that run
    means = [
        cells[f"controls/{name}-s0"]["seen"]["overall"]["loss"]
        for name in ("w_replaced_by_its_mean", "w_of_another_sample")
    ]
    assert means[0] != means[1] and "| w of another sample | 0 |" in said
    assert (tmp_path / "out/methods/orchmoe-x1-s0/adapter.safetensors").exists()


def test_curves_are_read_at_equal_loss():
    rng = np.random.default_rng(0)
    seen, unseen = (
        rng.normal(2, 0.1, (3, 2, 30)),
        rng.normal(3, 0.1, (3, 2, 58)),
    )  # scales, seeds, tasks
    seen -= (
        seen.mean(2, keepdims=True) - np.array([1.0, 1.2, 1.5])[:, None, None]
    )  # means that are known

    def curve(shift):
        return {
            scale: {s: cell(seen[i, s], unseen[i, s] + shift) for s in range(2)}
            for i, scale in enumerate((4.0, 2.0, 1.0))
        }

    mean, low, high = curves.at_most(curve(0.1), curve(0), "seen", "unseen-dev")
    assert mean == pytest.approx(0.1) and low == pytest.approx(0.1) and high == pytest.approx(0.1)
    lame = curve(0)
    del lame[2.0][0]  # a scale that is half made is left out, and takes no seed away
    parts = {scale: curve(0)[scale] for scale in (4.0, 1.0)}
    assert curves.complete(lame) == parts and curves.complete(curve(0)) == curve(0)
    read = [curves.at_most(curve(0.1), other, "seen", "unseen-dev") for other in (lame, parts)]
    assert read[0] == read[1] and curves.common(curves.complete(lame)) == [0, 1]
    half = {4.0: curve(0)[4.0], **{scale: {0: curve(0)[scale][0]} for scale in (2.0, 1.0)}}
    tie = {4.0: half[4.0], 2.0: half[2.0]}  # two cells either way
    assert [list(curves.complete(each)) for each in (half, tie)] == [[4.0, 2.0, 1.0], [4.0, 2.0]]
    short = {scale: {0: group[0]} for scale, group in curve(0).items()} | {4.0: curve(0)[4.0]}
    assert (
        curves.common(curves.complete(short)) == [0]
        and curves.complete(short).keys() == short.keys()
    )
    other, one = ({1.0: {s: curve(0)[1.0][s]}} for s in (0, 1))
    assert curves.at_most(one, other, "seen", "unseen-dev") is None
    # along a line unseen = 5 - seen, a curve that lies 0.1 to the right is 0.1 above at equal seen loss
    line, moved, far = (
        {
            x: {s: cell(np.full(4, x + right), np.full(9, 5 - x)) for s in range(2)}
            for x in (1.0, 1.25, 1.5)
        }
        for right in (0, 0.1, 0.6)
    )
    assert curves.at_most(moved, line, "seen", "unseen-test")[0] == pytest.approx(0.1)
    assert curves.above(moved[1.25], line, "unseen-dev")[0] == pytest.approx(0.1)
    # one that ends before the other begins is read at its end: there no more loss on seen tasks is needed
    assert curves.at_most(line, far, "seen", "unseen-test")[0] == pytest.approx(3.5 - (5 - 1.25))
    assert curves.above({0: cell(np.full(4, 2.0), np.full(9, 1.0))}, line, "unseen-dev")[0] == -2.5
    assert curves.above({0: cell(np.full(4, 0.9), np.full(9, 1.0))}, line, "unseen-dev") is None


def test_a_curve_with_a_turn_is_read_at_its_best():
    """More scale lowers the unseen loss first, and then raises it; where it raises both, nobody uses it."""

    def curve(*points):
        return {
            scale: {0: cell(np.full(4, x), np.full(9, y))}
            for scale, (x, y) in zip((0.5, 1.0, 2.0, 4.0), points, strict=True)
        }

    one = curve((1.34, 2.06), (1.26, 2.035), (1.199, 2.008), (1.181, 2.12))
    better = curve(
        (1.33, 2.06), (1.25, 2.035), (1.189, 2.008), (1.171, 2.12)
    )  # by 0.01 on seen tasks
    assert curves.at_most(better, one, "unseen-dev", "seen")[0] == pytest.approx(-0.01)
    read = curves.reading(
        np.array([2.06, 2.035, 2.008, 2.12]), np.array([1.34, 1.26, 1.199, 1.181]), 2.02
    )
    assert read == pytest.approx(1.199 - 0.018 * 0.012 / 0.112)
    worse = np.array([2.1, 2.0, 2.3]), np.array([1.25, 1.2, 1.3])
    read = [curves.reading(*worse, at) for at in (2.2, 2.0, 1.9)]
    assert read == pytest.approx([1.2, 1.2, np.nan], nan_ok=True)


def test_intervals_hold_the_noise_of_the_loss_they_are_read_at():
    """On lines unseen = 5 - seen, where the seen losses alone differ, of each task by another amount."""
    shift = np.random.default_rng(0).normal(0.1, 0.1, 20)
    line, moved = (
        {x: {0: cell(x + right, np.full(9, 5 - x))} for x in (1.0, 1.25, 1.5)}
        for right in (np.zeros(20), shift)
    )
    expected = pytest.approx(interval(shift[:, None]))
    assert curves.at_most(moved, line, "seen", "unseen-test") == expected
    assert curves.at_most(moved, line, "unseen-test", "seen") == expected
    assert curves.above(moved[1.25], line, "unseen-test") == expected
    # what all lose alike in a task is no noise of a difference, however steep the two are
    flat, steep = (
        {x: {0: cell(x + shift, np.full(9, 5 - slope * x))} for x in (1.0, 1.25, 1.5)}
        for slope in (1, 2)
    )
    mean, low, high = curves.at_most(flat, steep, "seen", "unseen-test")
    assert (
        mean == pytest.approx(1.25) and low == pytest.approx(mean) and high == pytest.approx(mean)
    )


def test_the_seeds_part_of_an_interval_is_of_what_is_read():
    """Three seeds in which the same is read, the lower of two points, in the last at a kink: what differs is
    of the tasks alone, though without a task the one or the other is the lower there."""
    off = np.linspace(-0.1, 0.1, 12)  # of tasks, whose mean is 0
    losses = np.stack(
        [
            np.stack([np.ones(12), np.ones(12), 1 + off], 1),
            np.stack([np.full(12, 2), np.full(12, 2), 1 - off], 1),
        ]
    )  # (points, T, seeds)
    found = curves.jackknife(lambda means, _: means.min(0), losses, np.ones((1, 2, 3)))
    parts = np.stack([np.ones(12), np.ones(12), 1 + abs(off) - abs(off).mean()], 1)
    assert found == pytest.approx(interval(parts)) and found[2] - found[0] < 0.02


@pytest.mark.slow
def test_intervals_hold_what_is_true_of_curves_like_the_real_ones():
    """Two curves of three seeds from one distribution, 60 times: between them nothing is to be found."""
    rng, held = np.random.default_rng(0), []
    seen, unseen = np.array([1.945, 1.916, 1.901, 1.91]), np.array([2.32, 2.328, 2.417, 2.476])

    def draw(means, tasks):  # (scales, tasks, seeds)
        spread = [
            rng.normal(0, sd, (4, *shape))
            for sd, shape in ((0.04, (1, 3)), (0.12, (tasks, 1)), (0.2, (tasks, 3)))
        ]  # of runs, tasks, the rest
        return means[:, None, None] + sum(spread)

    def curve():
        x, y = draw(seen, 199), draw(unseen, 58)
        return {
            scale: {s: cell(x[i, :, s], y[i, :, s]) for s in range(3)}
            for i, scale in enumerate(curves.SCALES)
        }

    for _ in range(60):
        one, other = curve(), curve()
        for way in (("seen", "unseen-dev"), ("unseen-dev", "seen")):
            _, low, high = curves.at_most(one, other, *way)
            held.append(low <= 0 <= high)
    assert np.mean(held) >= 0.93


def test_a_file_that_is_no_cell_is_named(tmp_path):
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods/lora-x1-s0.json").write_text('{"settings": {}, "seen": {}}')
    with pytest.raises(ValueError, match="lora-x1-s0.json: no finished cell; delete it"):
        curves.read_cells(tmp_path)


def test_the_best_scale_is_that_of_the_seeds_that_all_scales_have():
    def at(scale, seed, loss):
        return {
            f"methods/lora-x{scale}-s{seed}": cell(
                [1.0], np.full(9, loss), row="lora", alpha=2.0 * scale, seed=seed
            )
        }

    cells = at(0.5, 0, 3.0) | at(1.0, 0, 2.5) | at(2.0, 0, 2.0) | at(4.0, 0, 3.0)
    assert curves.best_scales(cells) == curves.best_scales(cells | at(2.0, 1, 9.0)) == {"lora": 2.0}
    edge = at(0.25, 0, 1.0)  # of one seed: it counts where the others have no more
    assert curves.best_scales(cells | edge) == {"lora": 0.25}
    assert curves.best_scales(
        cells | edge | at(0.5, 1, 3.0) | at(1.0, 1, 2.5) | at(2.0, 1, 2.0) | at(4.0, 1, 3.0)
    ) == {"lora": 2.0}
    assert (
        curves.best_scales({name: each for name, each in cells.items() if "x4" not in name}) == {}
    )


def test_a_scale_is_chosen_and_drawn_by_the_half_to_choose_by(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    half = curves.halves(f"u{i}" for i in range(9))["unseen-dev"]

    def at(scale, dev, test):
        losses = [dev if f"u{i}" in half else test for i in range(9)]
        return {f"methods/lora-x{scale}-s0": cell([1.0], losses, row="lora", alpha=2.0 * scale)}

    cells = at(0.5, 3.0, 1.0) | at(1.0, 2.0, 9.0) | at(2.0, 2.5, 1.0) | at(4.0, 2.75, 1.0)
    assert curves.best_scales(cells) == {"lora": 1.0}
    monkeypatch.setattr(curves.plot, "save", lambda canvas, path: canvas)
    canvas = curves.figure(curves.curves(cells), tmp_path)
    assert canvas.axes[0].containers[0].lines[0].get_ydata().tolist() == [3.0, 2.0, 2.5, 2.75]
    cells["methods/lora-x4.0-s0"]["dev_loss"] = -9.0
    assert curves.best_scales(cells) == {"lora": 4.0}


def test_a_curve_is_drawn_of_all_seeds_that_it_has(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(curves.plot, "save", lambda canvas, path: canvas)
    one, other, third = (cell(np.full(4, x), np.full(9, x + 1)) for x in (1.0, 2.0, 1.75))
    found = {0.25: {0: third}, 1.0: {0: one, 1: other}, 2.0: {0: third, 1: third}}
    canvas = curves.figure({"orchmoe": found, "lora": {1.0: {1: third}}}, tmp_path)
    drawn = {
        group.get_label(): group.lines[0].get_xydata().tolist()
        for group in canvas.axes[0].containers
    }
    assert drawn == {
        "orchmoe, seeds: 0, 1": [[1.5, 2.5], [1.75, 2.75]],
        "lora, seeds: 1": [[1.75, 2.75]],
    }


def test_rows_stand_beside_orchmoe_on_as_many_tasks():
    cells = {
        f"sizes/{row}-{size}-s0": cell(np.full(4, x), np.full(9, 2 * x), row=row)
        for row, size, x in (("orchmoe", 50, 1.0), ("lora", 50, 1.25), ("lora", 687, 1.0))
    }
    said = curves.text(cells, {})
    assert (
        "| lora, 50 tasks | 0 | 1.250 | 2.500 | -0.250 [-0.250, -0.250] | -0.500 [-0.500," in said
    )
    assert "| orchmoe, 50 tasks | 0 | 1.000 | 2.000 | - | - |" in said and "of the 2 here" in said
    assert (
        "| lora, 687 tasks | 0 | 1.000 | 2.000 | - | - |" in said
        and "the curves' tasks" not in said
    )
    points = ("orchmoe", 0, 2.0), ("orchmoe", 1, 3.0), ("lora", 0, 2.5), ("poly", 0, 1.0)
    cells |= {
        f"methods/{row}-x1-s{seed}": cell(
            np.full(4, x), np.full(9, x), row=row, alpha=2.0, seed=seed
        )
        for row, seed, x in points
    }
    said = curves.text(cells, {})  # of the curves' rows and seeds those of the sizes
    assert (
        "| lora, the curves' tasks | 0 | 2.500 | 2.500 | -0.500 [-0.500, -0.500] | -0.500 [-0.500"
        in said
    )
    assert (
        "| orchmoe, the curves' tasks | 0 | 2.000 | 2.000 | - | - |" in said
        and "poly, the" not in said
    )


def test_controls_stand_beside_orchmoe_itself():
    name, other = "router: none", cell(np.full(4, 1.5), np.full(9, 2.25), row="router: none")
    cells = {
        f"methods/orchmoe-x1-s{seed}": cell(
            np.full(4, 1.0), np.full(9, 2.0), row="orchmoe", alpha=2.0, seed=seed
        )
        for seed in (0, 1)
    }
    cells |= {
        "controls/none-s0": other,
        "controls/none-s1": {**other, "settings": {"row": name, "seed": 1}},
    }
    said = curves.text(cells, {})
    assert (
        f"| {name} | 0, 1 | 1.500 (0.000) | 2.250 (0.000) | -0.500 [-0.500, -0.500] | -0.250 ["
        in said
    )


def test_answers_stand_beside_orchmoes():
    """Each metric by its difference; a row without losses, as what copies, has none of that."""
    cells = {
        f"methods/orchmoe-x{scale}-s0": cell(
            [1.0], np.full(9, loss), row="orchmoe", alpha=2 * scale
        )
        for scale, loss in ((0.5, 3.0), (1.0, 2.0), (2.0, 2.5), (4.0, 2.5))
    }
    made = {
        f"answers/{row}-x{alpha / 2}-s{seed}": (
            cell(np.full(4, loss), np.full(9, loss), row=row, alpha=alpha, seed=seed),
            rouge,
        )
        for row, alpha, seed, loss, rouge in (
            ("orchmoe", 1.0, 0, 9.0, 99.0),  # a scale that once was the best
            ("orchmoe", 2.0, 0, 1.0, 40.0),
            ("orchmoe", 2.0, 1, 1.0, 60.0),
            ("lora", 1.0, 0, 1.5, 30.0),
            ("poly", 1.0, 2, 1.5, 30.0),
            ("copy-demo", 1.0, 0, np.nan, 45.0),
        )
    }
    for each, rouge in made.values():
        for scores in (*each["seen"]["tasks"].values(), *each["unseen"]["tasks"].values()):
            scores |= {"rougeL": rouge, "exact_match": rouge / 2}
    said = curves.text(cells | {name: each for name, (each, _) in made.items()}, {})
    once = "+10.000 [+10.000, +10.000] | +5.000 [+5.000, +5.000] | -0.500 [-0.500, -0.500]"
    assert f"| lora, scale 0.5 | 0 | {once} | {once} |" in said and "of the 16 here" in said
    assert "| poly, scale 0.5 | 2 | - | - | - | - | - | - |" in said  # OrchMoE has no such seed
    once = "+5.000 [-122.061, +132.061] | +2.500 [-61.031, +66.031] | -"
    assert f"| copy-demo | 0, 1 | {once} | {once} |" in said  # beside both
    assert said.count("| orchmoe, scale 1 |") == 1  # its means, and no difference from itself


def test_rows_stand_beside_each_other_at_their_best_scales():
    """On the tasks that nothing was chosen by, too: no curve is read there, since that is a choice."""
    half = curves.halves(f"u{i}" for i in range(9))["unseen-dev"]

    def at(row, scale, seen, dev, test):
        losses = [dev if f"u{i}" in half else test for i in range(9)]
        return {
            f"methods/{row}-x{scale}-s0": cell(np.full(4, seen), losses, row=row, alpha=2.0 * scale)
        }

    cells = at("orchmoe", 0.5, 1.0, 2.0, 4.0) | at("lora", 2.0, 1.5, 2.25, 4.75)  # the best of each
    for row, best in (("orchmoe", 0.5), ("lora", 2.0)):
        for scale in {*curves.SCALES} - {best}:
            cells |= at(row, scale, 0.5, 9.0, 0.5)
    once = "-0.500 [-0.500, -0.500] | -0.250 [-0.250, -0.250] |"
    for final, more in ((False, ""), (True, " -0.750 [-0.750, -0.750] |")):
        said = curves.text(cells, {}, final)
        assert f"| lora | 0 | {once}{more}\n" in said
        assert "at no more unseen-dev" in said and "at no more unseen-test" not in said


def test_the_readme_has_the_numbers_of_the_tables():
    page = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Does it beat LoRA?")[2]
    tables = (ROOT / "experiments/results/tables.md").read_text()
    by_curves = tables.partition("| orchmoe - row | seeds | seen at no more")[2].partition("\n\n")[
        0
    ]
    rows = re.findall(r"^\| (\w[\w -]+) \| (\d.+) \|$", page, re.MULTILINE)
    assert {row.lower() for row, _ in rows} == curves.ROWS.keys()
    for row, cells in rows:
        there = [line for line in tables.splitlines() if line.startswith(f"| {row.lower()} | ")]
        *losses, one, other = cells.split(" | ")
        best = [line for line in there if ", the best |" in line]
        assert [line.split(" | ")[-2:] for line in best] == [[losses[0], f"{losses[1]} |"]]
        due = [line for line in by_curves.splitlines() if line.startswith(f"| {row.lower()} | ")]
        assert [line.split(" | ")[-2:] for line in due] == (
            [[one, f"{other} |"]] if row != "OrchMoE" else []
        )
        assert row != "OrchMoE" or one == other == "-"


def test_tables_and_pages_have_the_numbers_of_the_cells():
    """Of the pages each difference with an interval, either way round, of all seeds or of the first."""
    cells, tuning = curves.read_cells(report.RESULTS), report.tuned(report.ReportConfig())
    assert curves.text(cells, tuning) == (report.RESULTS / "tables.md").read_text()
    said = curves.text(cells, tuning, final=True)
    assert said == (report.RESULTS / "final.md").read_text()
    said += curves.text(
        {name: cell for name, cell in cells.items() if name.endswith("-s0")}, tuning
    )

    def quoted(text):
        number = r"([-+]?\d+\.\d+)"
        found = re.findall(rf"{number}\s+\[{number},\s+{number}\]", text)
        assert len(found) == len(re.findall(rf"\[{number},\s+{number}\]", text)) > 9
        return {tuple(map(float, each)) for each in found}

    there = quoted(said)
    there |= {(-mean, -high, -low) for mean, low, high in there}
    for page in ("README.md", "docs/evidence.md"):
        assert quoted((ROOT / page).read_text(encoding="utf-8")) <= there


def test_each_seed_is_a_run_of_its_own():
    configs = train.Settings()
    config = compare.CompareConfig(seeds=2, tune=False, methods=("lora",), rows=("K = 1",))
    study = compare.Study(config, configs, None, {}, 3)
    many = {"200": dict.fromkeys(curves.ROWS, 0)}
    asked = report.ReportConfig(seeds=2, stage="methods", rows=("lora",))
    found = report.Study(asked, configs, many, {"200": ROOT}, many).queues({"lora": {}})
    for queues in (compare.method_cells(study)[0], compare.ablation_cells(study)[0], found):
        cells = [cell for queue in queues for cell in queue if cell.row in ("lora", "K = 1")]
        assert {cell.folder.name[-1:] for cell in cells} == {"0", "1"}
        assert all(cell.configs.train.seed == int(cell.folder.name[-1]) for cell in cells)


def test_the_unseen_tasks_are_halved_by_name_alone():
    names = [f"task{i}" for i in range(400)]
    first = curves.halves(names)
    assert sorted(first["unseen-dev"] + first["unseen-test"]) == sorted(names)
    assert 150 < len(first["unseen-dev"]) < 250
    few = curves.halves(names[100:])
    assert all(set(few[half]) <= set(first[half]) for half in first)


def test_an_oracle_routes_by_the_category(tmp_path):
    given, route = [], OrchMoE.route
    with mock.patch.object(
        OrchMoE, "route", lambda *a, w=None, **k: given.append(w) or route(*a, w=w, **k)
    ):
        made(tmp_path, "controls", "--rows", compare.ORACLE, "--no-tune", "--batch-size", 12)
    assert given and all(w is not None for w in given)
    assert {float(row.max()) for w in given for row in w} == {
        1.0,
        np.float32(1 / 76),
    }  # seen and unseen
    tasks = data.load_sets(
        data.DataConfig(max_tasks=0, data=tmp_path / "out/tasks-3"),
        tokenizers.load(ROOT / "tiny"),
        ["train"],
    )["train"]
    known = {example.category for example in tasks}
    assert {int(row.argmax()) for w in given for row in w if row.max() == 1} == set(
        range(len(known))
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            {"stage": "controls", "rows": ("lora",)},
            "--rows lora: of --stage controls choose, once each, of w re",
        ),
        ({"stage": "table", "rows": ("lora",)}, "of none"),
        ({"seeds": 0}, "--seeds 0"),
        ({"stage": "tune", "rows": ("lora", "lora")}, "--rows lora: .* once each"),
        ({"stage": "all", "cells": ("lora-x1-s0",)}, "--cells: name by --stage the one"),
        ({"sizes": ("50", "-5")}, "--sizes -5: give numbers"),
    ],
)
def test_mistakes(flags, message):
    with pytest.raises(ValueError, match=message):
        runtime.from_flags(report.ReportConfig, flags)


def test_every_row_can_be_named_by_its_flag():
    rows = *report.ABLATIONS, *report.CONTROLS, *report.ANSWERING, *compare.ABLATIONS
    assert not [row for row in rows if "," in row]  # which would end its name


def test_what_the_report_sets_itself_is_no_flag(tmp_path):
    assert "--alpha: the report sets this itself" in made(tmp_path, "tune", "--alpha", "2", code=2)


def test_too_few_tasks_are_said_before_anything_is_made(tmp_path):
    said = made(tmp_path, "all", "--sizes", "2,29", code=2)
    assert "28 training tasks; the cells need 29, see --train-tasks and --sizes" in said
    folder = subset(tmp_path / "few", ROOT / "sni", data.read_splits(ROOT / "sni")["train"])
    assert "0 test tasks; both halves" in made(tmp_path, "tune", "--data", folder, code=2)
    assert not (tmp_path / "out").exists()
    assert "--cells lora-x3-s0: no cell" in made(
        tmp_path, "methods", "--cells", "lora-x3-s0", code=2
    )
    assert not (tmp_path / "kept").exists()


def test_a_router_of_the_definition_alone():
    tokenizer, base = tokenizers.load(ROOT / "tiny"), checkpoint.load(ROOT / "tiny")
    router = TaskRouter(base.config.d_model, OrchMoEConfig(), torch.Generator().manual_seed(0))
    asked = [
        ("Count the words.", "one two"),
        ("Count the words.", "another text"),
        ("Sort.", "one two"),
    ]
    batch = data.collate(
        [data.make_example(*texts, tokenizer, data.DataConfig()) for texts in asked]
    )
    embeddings = base.embed(batch.input_ids)
    with mock.patch.object(TaskRouter, "summarise", definition_features(ROOT / "tiny")):
        found = router.summarise(embeddings, batch.attention_mask)
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2])
    alone = tokenizer.source("Definition: Count the words.\n\nNow")[:-1]  # without EOS
    assert batch.input_ids[0, : len(alone)].tolist() == alone
    torch.testing.assert_close(found[0], router.summarise(embeddings[:1, : len(alone)])[0])
