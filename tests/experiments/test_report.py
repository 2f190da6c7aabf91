"""The study on SmolLM2: its cells, its curves and its tables."""

import importlib.util
import json
import re
import shutil
from dataclasses import replace
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
from experiments.routers import attach_with
from experiments.study import Study, StudyConfig, read_tuning, subset
from experiments.tables import halves, interval
from helpers import ROOT, run
from orchmoe import OrchMoE, OrchMoEConfig


def cell(seen, unseen, **settings):
    """Return a cell with the given losses of tasks."""
    return {
        "seen": {"tasks": {f"s{i}": {"loss": loss} for i, loss in enumerate(seen)}},
        "unseen": {"tasks": {f"u{i}": {"loss": loss} for i, loss in enumerate(unseen)}},
        "dev_loss": 1.0,
        "settings": {"seed": 0, "rank": 2, **settings},
    }


def flat(seen, unseen, **settings):
    """Return a cell with the same loss on 4 seen tasks, and on 9 unseen tasks."""
    return cell(np.full(4, seen), np.full(9, unseen), **settings)


def made(folder, stage, *flags, out="out", code=0):
    """Run a small report in a folder."""
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
        "device": "cpu",
    }
    words = [part for name, value in small.items() for part in (f"--{name}", value)]
    program = "experiments/report.py"
    return run(program, "--stage", stage, *words, *flags, cwd=folder, code=code)


# ---------------------------------------------------------------------------------------- program


def few(monkeypatch, **values):
    """Replace constants of report.py, and of curves.py where it has them."""
    for name, value in values.items():
        for module in (report, curves):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)


def test_stages_leave_cells_that_can_be_made_again(tmp_path, monkeypatch):
    few(monkeypatch, SCALES=(1.0, 2.0), EDGE=())
    rows = ["--rows", "orchmoe,lora"]

    # The methods, which are tuned first.
    out = made(tmp_path, "methods", *rows)
    names = {f"methods/{row}-x{scale}-s0" for row in ("orchmoe", "lora") for scale in (1, 2)}
    cells = curves.read_cells(tmp_path / "kept")
    assert {name for name in cells if name.startswith("methods")} == names
    assert sum(name.startswith("tune/") for name in cells) == 4
    assert "tune: 4 cells" in out
    for name in names:
        found = cells[name]
        assert found["settings"]["steps"] == 2
        assert found["settings"]["computed"] == "cpu, torch.float32"
        assert str(tmp_path) not in json.dumps(found)
        assert str(ROOT) not in json.dumps(found)
        assert len(found["seen"]["tasks"]) == 3
        assert all(scores.keys() == {"loss"} for scores in found["seen"]["tasks"].values())
        assert set(found["unseen"]["tasks"]) == set(data.read_splits(ROOT / "sni")["test"])
        assert bool(found["learnt"]) == ("orchmoe" in name)  # of what routes
        assert all(type(value) in (int, float) for value in found["learnt"].values())
    sizes = [cells[f"methods/{row}-x1-s0"]["parameters"] for row in ("orchmoe", "lora")]
    totals = [sum(size.values()) for size in sizes]
    assert abs(totals[0] - totals[1]) < 0.03 * totals[0]

    # The tables.
    assert [line for line in out.splitlines() if line.startswith("| lora | 2")]
    tables = (tmp_path / "kept/tables.md").read_text()
    assert "unseen-dev" in tables
    assert "unseen-test" not in out + tables
    assert "unseen-test" in made(tmp_path, "table", "--final")
    assert "| lora | 2 | lr_skills" in (tmp_path / "kept/tables.md").read_text()
    figure = tmp_path / "kept/curves.png"
    assert figure.exists() == bool(importlib.util.find_spec("matplotlib"))

    # Answers of the run with the best scale.
    made(tmp_path, "answers", "--rows", "lora,frozen base,copy-demo")
    found = curves.read_cells(tmp_path / "kept")
    losses = {}
    for scale in "12":
        of_scale = cells[f"methods/lora-x{scale}-s0"]
        unseen = curves.by_task(of_scale, "unseen-dev").mean()
        losses[scale] = (unseen + of_scale["dev_loss"], of_scale["seen"]["overall"]["loss"])
    best = min(losses, key=losses.get)
    answers = found[f"answers/lora-x{best}-s0"]
    assert answers["seen"]["overall"]["loss"] == losses[best][1]
    overall = found["answers/frozen_base-s0"]["unseen"]["overall"]
    assert {"rougeL", "exact_match", "loss"} <= overall.keys()
    assert f"| lora, scale {best} | 0 |" in (tmp_path / "kept/tables.md").read_text()

    # One lost cell is made again elsewhere, from nothing.
    kept = tmp_path / "kept/methods/lora-x2-s0.json"
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*.json")}
    kept.unlink()
    settings = cells["methods/lora-x2-s0"]["settings"]
    rates = ["--lr-skills", settings["lr_skills"], "--lr-router", settings["lr_router"]]
    only = [*rows, "--cells", "lora-x2-s0", "--no-tune"]
    made(tmp_path, "methods", *only, *rates, out="other")
    again = json.loads(kept.read_text())
    assert again["unseen"] == cells["methods/lora-x2-s0"]["unseen"]
    unchanged = {path: path.stat().st_mtime_ns for path in stamps if path != kept}
    assert unchanged.items() <= stamps.items()
    assert "tune: 4 cells" in made(tmp_path, "tune", *rows)  # with nothing left to do

    # Refusals. Other steps are refused also for a cell that is not there yet.
    out = made(tmp_path, "methods", "--cells", "lora-x3-s0", "--no-tune", code=2)
    assert "--cells lora-x3-s0: no cell" in out
    for row in ("lora", "poly"):
        only = ["--rows", row, "--cells", f"{row}-x2-s0", "--no-tune", "--steps", 3]
        out = made(tmp_path, "methods", *only, out="third", code=2)
        assert re.search(r"answers/\S+-s0.json: made with steps 2, not 3; name another fo", out)


@pytest.mark.slow
def test_all_stages_leave_nothing(tmp_path, monkeypatch):
    rows = {name: curves.ROWS[name] for name in ("lora", "orchmoe")}
    ablations = {"K = 2": report.ABLATIONS["K = 2"]}
    controls = {"router: none": report.CONTROLS["router: none"]}
    answering = rows | {name: report.ANSWERING[name] for name in ("full", "copy-demo")}
    stages = dict.fromkeys(report.STAGES, rows) | {"ablations": ablations, "controls": controls}
    stages |= dict.fromkeys(curves.PROMPTS, answering)
    few(monkeypatch, ROWS=rows, SCALES=(1.0,), EDGE=(0.5,), STAGES=stages)
    few(monkeypatch, ABLATIONS=ablations, CONTROLS=controls, ANSWERING=answering)
    assert "methods: 0 cells of 4\n" in made(tmp_path, "table")
    out = made(tmp_path, "all", "--sizes", "2,3")
    expected = dict.fromkeys(stages, 4) | {"ablations": 1, "controls": 1}
    for stage, number in expected.items():
        assert f"{stage}: {number} cells of {number}\n" in out
        assert len(list((tmp_path / "kept").glob(f"{stage}/*.json"))) == number


def test_controls_train_the_run_they_score_if_it_is_not_there(tmp_path):
    out = made(tmp_path, "controls", "--rows", "w replaced by its mean,w of another sample")
    cells = curves.read_cells(tmp_path / "kept")
    made(tmp_path, "methods", "--rows", "orchmoe")  # which finds that run
    losses = []
    for name in ("w_replaced_by_its_mean", "w_of_another_sample"):
        losses.append(cells[f"controls/{name}-s0"]["seen"]["overall"]["loss"])
    assert losses[0] != losses[1]
    assert "| w of another sample | 0 |" in out
    assert (tmp_path / "out/methods/orchmoe-x1-s0/adapter.safetensors").exists()


def test_oracle_routes_by_the_category(tmp_path):
    given = []
    route = OrchMoE.route

    def watched(self, *inputs, w=None, **options):
        given.append(w)
        return route(self, *inputs, w=w, **options)

    oracle = "oracle: w is the category"
    with mock.patch.object(OrchMoE, "route", watched):
        made(tmp_path, "controls", "--rows", oracle, "--no-tune", "--batch-size", 12)
    assert given
    assert all(w is not None for w in given)
    rows = torch.cat(given)
    assert set(rows.max(dim=1).values.tolist()) == {1.0, np.float32(1 / 76)}  # seen and unseen
    config = data.DataConfig(data=tmp_path / "out/tasks-3")
    examples = data.load_sets(config, tokenizers.load(ROOT / "tiny"), ["train"])["train"]
    categories = {example.category for example in examples}
    used = rows[rows.max(dim=1).values == 1].argmax(dim=1)
    assert set(used.tolist()) == set(range(len(categories)))


def test_definition_router_reads_the_definition_alone():
    settings = train.Settings()
    base = checkpoint.load(ROOT / "tiny")
    attach = attach_with("definition", settings)
    generator = torch.Generator().manual_seed(0)
    router = attach("orchmoe", base, OrchMoEConfig(), generator=generator).router
    tokenizer = tokenizers.load(ROOT / "tiny")
    examples = []
    for definition, text in (
        ("Count the words.", "one two"),
        ("Count the words.", "another text"),
        ("Sort.", "one two"),
    ):
        examples.append(data.make_example(definition, text, tokenizer, settings.data))
    batch = data.collate(examples)
    embeddings = base.embed(batch.input_ids)
    found = router.summarise(embeddings, batch.attention_mask)
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
    alone = tokenizer.source("Definition: Count the words.\n\nNow")[:-1]  # without EOS
    assert batch.input_ids[0, : len(alone)].tolist() == alone
    whole = super(type(router), router).summarise(embeddings[:1, : len(alone)])
    torch.testing.assert_close(found[0], whole[0])


@pytest.mark.slow
def test_committed_cells_are_those_of_the_stages(sni_dir, smollm2_dir, tmp_path, monkeypatch):
    """The settings, sizes, tasks and base of today are those of the committed cells."""
    results = tmp_path / "results"
    shutil.copytree(report.RESULTS, results)
    made = {path for path in results.glob("*/*.json")}
    values = {"data": str(sni_dir), "model": str(smollm2_dir), "out": str(tmp_path / "out")}
    values = report.DEFAULTS | values | {"results": str(results)}
    device = runtime.Device(torch.device("cpu"), torch.bfloat16, "")
    config = runtime.from_flags(report.ReportConfig, values)
    study_config = runtime.from_flags(StudyConfig, values)
    study = Study(train.Settings.from_flags(values), device, study_config, curves.ROWS)
    monkeypatch.setattr("experiments.study.run_cell", lambda cell, _: pytest.fail(str(cell.path)))

    report.make(replace(config, stage="tune"), study)
    assert read_tuning(results) == read_tuning(report.RESULTS)
    found = {path for path in made if path.parent.name == "tune"}
    for stage in report.STAGES:
        for each in report.stage_cells(replace(config, stage=stage), study):
            each.require_same()
            found.add(each.path)
    assert made <= found


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"stage": "controls", "rows": ("lora",)}, "--rows lora: choose, once each, of w replaced"),
        ({"stage": "table", "rows": ("lora",)}, "of none"),
        ({"stage": "tune", "rows": ("lora", "lora")}, "--rows lora: choose, once each"),
        ({"stage": "all", "cells": ("lora-x1-s0",)}, "--cells: give the --stage"),
        ({"sizes": ("50", "-5")}, "--sizes -5: give numbers"),
    ],
)
def test_report_config_refuses(flags, message):
    with pytest.raises(ValueError, match=message):
        runtime.from_flags(report.ReportConfig, flags)


def test_report_refuses_what_it_sets_itself(tmp_path):
    out = made(tmp_path, "tune", "--alpha", "2", code=2)
    assert "--alpha: the study sets this itself" in out


def test_report_refuses_too_few_tasks_before_anything_is_made(tmp_path):
    out = made(tmp_path, "all", "--sizes", "2,29", code=2)
    assert "28 training tasks; the cells need 29, see --train-tasks and --sizes" in out
    folder = subset(tmp_path / "few", ROOT / "sni", data.read_splits(ROOT / "sni")["train"])
    assert "0 test tasks; both halves" in made(tmp_path, "tune", "--data", folder, code=2)
    out = made(tmp_path, "methods", "--cells", "lora-x3-s0", code=2)
    assert "--cells lora-x3-s0: no cell" in out
    assert not (tmp_path / "kept").exists()


def test_rows_can_be_named_by_a_flag():
    for rows in (*report.STAGES.values(), compare.ABLATIONS):
        assert not [row for row in rows if "," in row]  # which would end its name


def test_subset_has_these_tasks_alone(tmp_path):
    task = "task201_opposite_of_second_word"
    folder = subset(tmp_path / "one", ROOT / "sni", [task])
    assert data.read_splits(folder) == {"train": [task], "test": []}
    with open(folder / "splits/default/train_tasks.txt") as read:  # by another process
        subset(folder, ROOT / "sni", ["task1"])
        assert read.read() == f"{task}\n"
    moved = tmp_path / "moved"
    (moved / "tasks").mkdir(parents=True)
    (moved / "tasks" / f"{task}.json").write_bytes((ROOT / f"sni/tasks/{task}.json").read_bytes())
    subset(folder, moved, [task])
    assert (folder / "tasks").resolve() == moved / "tasks"


def test_cells_of_all_seeds_are_runs_of_their_own(tmp_path):
    config = report.ReportConfig(stage="methods", rows=("lora",), train_tasks=3)
    study_config = StudyConfig(seeds=2, tune=False, out=str(tmp_path))
    settings = train.Settings.from_flags({"train_instances": 8})
    study = Study(settings, runtime.pick_device(device="cpu"), study_config, curves.ROWS)
    cells = report.stage_cells(config, study)
    scales = 2 * len(curves.SCALES)
    assert len(cells) == scales + len(curves.EDGE)
    for found in cells:
        seed = found.settings.train.seed
        assert found.path.stem.endswith(f"-s{seed}")
        assert found.folder.name == found.path.stem
    assert sum(found.settings.train.seed for found in cells) == scales // 2


# ----------------------------------------------------------------------------------------- curves


def test_at_most_reads_curves_at_equal_loss():
    rng = np.random.default_rng(0)
    seen = rng.normal(2, 0.1, (3, 2, 30))  # scales, seeds, tasks
    unseen = rng.normal(3, 0.1, (3, 2, 58))
    means = np.array([1.0, 1.2, 1.5])[:, None, None]
    seen -= seen.mean(2, keepdims=True) - means  # means that are known

    def curve(shift):
        found = {}
        for i, scale in enumerate((4.0, 2.0, 1.0)):
            found[scale] = {s: cell(seen[i, s], unseen[i, s] + shift) for s in range(2)}
        return found

    found = curves.at_most(curve(0.1), curve(0), "seen", "unseen-dev")
    assert found == pytest.approx((0.1, 0.1, 0.1))
    other, one = ({1.0: {s: curve(0)[1.0][s]}} for s in (0, 1))
    assert curves.at_most(one, other, "seen", "unseen-dev") is None

    # A scale that is half made is left out, and takes no seed away.
    lame = curve(0)
    del lame[2.0][0]
    parts = {scale: curve(0)[scale] for scale in (4.0, 1.0)}
    assert curves.complete(lame) == parts
    assert curves.complete(curve(0)) == curve(0)
    read = [curves.at_most(curve(0.1), each, "seen", "unseen-dev") for each in (lame, parts)]
    assert read[0] == read[1]
    assert curves.common(curves.complete(lame)) == [0, 1]


def test_complete_prefers_cells_then_points():
    one = flat(1.0, 2.0)
    both = {0: one, 1: one}
    half = {4.0: both, 2.0: {0: one}, 1.0: {0: one}}
    assert list(curves.complete(half)) == [4.0, 2.0, 1.0]
    tie = {4.0: both, 2.0: {0: one}}  # two cells either way
    assert list(curves.complete(tie)) == [4.0, 2.0]
    short = {2.0: {0: one}, 1.0: {0: one}, 4.0: both}
    assert curves.common(curves.complete(short)) == [0]
    assert curves.complete(short).keys() == short.keys()


def test_curves_along_a_line():
    """Along a line unseen = 5 - seen, a curve 0.1 to the right is 0.1 above at equal seen loss."""

    def line(right):
        points = {}
        for x in (1.0, 1.25, 1.5):
            points[x] = {s: flat(x + right, 5 - x) for s in range(2)}
        return points

    moved, far = line(0.1), line(0.6)
    assert curves.at_most(moved, line(0), "seen", "unseen-test")[0] == pytest.approx(0.1)
    assert curves.above(moved[1.25], line(0), "unseen-dev")[0] == pytest.approx(0.1)
    # One that ends before the other starts is read at its end: more loss on seen tasks is useless.
    found = curves.at_most(line(0), far, "seen", "unseen-test")[0]
    assert found == pytest.approx(3.5 - (5 - 1.25))
    assert curves.above({0: flat(2.0, 1.0)}, line(0), "unseen-dev")[0] == -2.5
    assert curves.above({0: flat(0.9, 1.0)}, line(0), "unseen-dev") is None


def test_reading_of_a_curve_with_a_turn_is_at_its_best():
    """More scale lowers the unseen loss first, and then raises it, with the seen loss at last."""

    def curve(*points):
        return {
            scale: {0: flat(*point)} for scale, point in zip(curves.SCALES, points, strict=True)
        }

    one = curve((1.34, 2.06), (1.26, 2.035), (1.199, 2.008), (1.181, 2.12))
    better = curve((1.33, 2.06), (1.25, 2.035), (1.189, 2.008), (1.171, 2.12))  # by 0.01 on seen
    found = curves.at_most(better, one, "unseen-dev", "seen")
    assert found[0] == pytest.approx(-0.01)
    x = np.array([2.06, 2.035, 2.008, 2.12])
    y = np.array([1.34, 1.26, 1.199, 1.181])
    assert curves.reading(x, y, 2.02) == pytest.approx(1.199 - 0.018 * 0.012 / 0.112)
    worse = np.array([2.1, 2.0, 2.3]), np.array([1.25, 1.2, 1.3])
    read = [curves.reading(*worse, limit) for limit in (2.2, 2.0, 1.9)]
    assert read == pytest.approx([1.2, 1.2, np.nan], nan_ok=True)


def test_intervals_contain_the_noise_of_the_loss_they_are_read_at():
    """On lines unseen = 5 - seen the seen losses alone differ, of each task by another amount."""
    shift = np.random.default_rng(0).normal(0.1, 0.1, 20)

    def line(right, slope=1):
        unseen = {x: np.full(9, 5 - slope * x) for x in (1.0, 1.25, 1.5)}
        return {x: {0: cell(x + right, unseen[x])} for x in unseen}

    still, moved = line(np.zeros(20)), line(shift)
    expected = pytest.approx(interval(shift[:, None]))
    assert curves.at_most(moved, still, "seen", "unseen-test") == expected
    assert curves.at_most(moved, still, "unseen-test", "seen") == expected
    assert curves.above(moved[1.25], still, "unseen-test") == expected
    # What all lose alike in a task is no noise of a difference, however steep the two are.
    found = curves.at_most(line(shift), line(shift, slope=2), "seen", "unseen-test")
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
    assert found[2] - found[0] < 0.02


@pytest.mark.slow
def test_at_most_coverage_on_curves_like_the_real_ones():
    """Two curves of three seeds from one distribution, 60 times: nothing is to be found."""
    rng = np.random.default_rng(0)
    held = []
    seen = np.array([1.945, 1.916, 1.901, 1.91])
    unseen = np.array([2.32, 2.328, 2.417, 2.476])

    def draw(means, tasks):  # (scales, tasks, seeds)
        spreads = [(0.04, (1, 3)), (0.12, (tasks, 1)), (0.2, (tasks, 3))]  # runs, tasks, the rest
        noise = [rng.normal(0, sd, (4, *shape)) for sd, shape in spreads]
        return means[:, None, None] + sum(noise)

    def curve():
        x, y = draw(seen, 199), draw(unseen, 58)
        found = {}
        for i, scale in enumerate(curves.SCALES):
            found[scale] = {s: cell(x[i, :, s], y[i, :, s]) for s in range(3)}
        return found

    for _ in range(60):
        one, other = curve(), curve()
        for way in (("seen", "unseen-dev"), ("unseen-dev", "seen")):
            _, low, high = curves.at_most(one, other, *way)
            held.append(low <= 0 <= high)
    assert np.mean(held) >= 0.93


def test_read_cells_names_a_file_that_is_no_cell(tmp_path):
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods/lora-x1-s0.json").write_text('{"settings": {}, "seen": {}}')
    with pytest.raises(ValueError, match="lora-x1-s0.json: no finished cell; delete it"):
        curves.read_cells(tmp_path)


# ------------------------------------------------------------------------------------ best scales


def at(scale, dev, test=None, seed=0, row="lora", seen=1.0):
    """Return a cell of the methods by its name. test: loss on the half not to choose by."""
    chosen = halves(f"u{i}" for i in range(9))["unseen-dev"]
    test = dev if test is None else test
    losses = [dev if f"u{i}" in chosen else test for i in range(9)]
    name = f"methods/{row}-x{scale}-s{seed}"
    return {name: cell(np.full(4, seen), losses, row=row, alpha=2.0 * scale, seed=seed)}


def test_best_scales_are_of_the_seeds_that_all_scales_have():
    cells = at(0.5, 3.0) | at(1.0, 2.5) | at(2.0, 2.0) | at(4.0, 3.0)
    assert curves.best_scales(cells) == {"lora": 2.0}
    assert curves.best_scales(cells | at(2.0, 9.0, seed=1)) == {"lora": 2.0}
    edge = at(0.25, 1.0)  # of one seed: it counts where the others have no more
    assert curves.best_scales(cells | edge) == {"lora": 0.25}
    second = at(0.5, 3.0, seed=1) | at(1.0, 2.5, seed=1) | at(2.0, 2.0, seed=1)
    second |= at(4.0, 3.0, seed=1)
    assert curves.best_scales(cells | edge | second) == {"lora": 2.0}
    lacking = {name: each for name, each in cells.items() if "x4" not in name}
    assert curves.best_scales(lacking) == {}


def test_best_scales_and_figure_use_the_half_to_choose_by(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    cells = at(0.5, 3.0, 1.0) | at(1.0, 2.0, 9.0) | at(2.0, 2.5, 1.0) | at(4.0, 2.75, 1.0)
    assert curves.best_scales(cells) == {"lora": 1.0}
    monkeypatch.setattr(curves.plot, "save", lambda canvas, path: canvas)
    canvas = curves.figure(curves.curves(cells), tmp_path)
    drawn = canvas.axes[0].containers[0].lines[0].get_ydata()
    assert drawn.tolist() == [3.0, 2.0, 2.5, 2.75]
    cells["methods/lora-x4.0-s0"]["dev_loss"] = -9.0
    assert curves.best_scales(cells) == {"lora": 4.0}


def test_figure_uses_all_seeds_of_a_curve(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(curves.plot, "save", lambda canvas, path: canvas)
    one, other, third = (flat(x, x + 1) for x in (1.0, 2.0, 1.75))
    found = {0.25: {0: third}, 1.0: {0: one, 1: other}, 2.0: {0: third, 1: third}}
    canvas = curves.figure({"orchmoe": found, "lora": {1.0: {1: third}}}, tmp_path)
    drawn = {}
    for group in canvas.axes[0].containers:
        drawn[group.get_label()] = group.lines[0].get_xydata().tolist()
    assert drawn == {
        "orchmoe, seeds: 0, 1": [[1.5, 2.5], [1.75, 2.75]],
        "lora, seeds: 1": [[1.75, 2.75]],
    }


# ----------------------------------------------------------------------------------------- tables


def test_text_sizes_stand_beside_orchmoe_on_as_many_tasks():
    cells = {}
    for row, size, x in (("orchmoe", 50, 1.0), ("lora", 50, 1.25), ("lora", 687, 1.0)):
        cells[f"sizes/{row}-{size}-s0"] = flat(x, 2 * x, row=row)
    text = curves.text(cells, {})
    differences = "-0.250 [-0.250, -0.250] | -0.500 [-0.500,"
    assert f"| lora, 50 tasks | 0 | 1.250 | 2.500 | {differences}" in text
    assert "| orchmoe, 50 tasks | 0 | 1.000 | 2.000 | - | - |" in text
    assert "of the 2 here" in text
    assert "| lora, 687 tasks | 0 | 1.000 | 2.000 | - | - |" in text
    assert "the curves' tasks" not in text

    # Of the curves, the rows and seeds of the sizes.
    for row, seed, x in (
        ("orchmoe", 0, 2.0),
        ("orchmoe", 1, 3.0),
        ("lora", 0, 2.5),
        ("poly", 0, 1.0),
    ):
        cells[f"methods/{row}-x1-s{seed}"] = flat(x, x, row=row, alpha=2.0, seed=seed)
    text = curves.text(cells, {})
    differences = "-0.500 [-0.500, -0.500] | -0.500 [-0.500"
    assert f"| lora, the curves' tasks | 0 | 2.500 | 2.500 | {differences}" in text
    assert "| orchmoe, the curves' tasks | 0 | 2.000 | 2.000 | - | - |" in text
    assert "poly, the" not in text


def test_text_controls_stand_beside_orchmoe_itself():
    name = "router: none"
    cells = {}
    for seed in (0, 1):
        orchmoe = flat(1.0, 2.0, row="orchmoe", alpha=2.0, seed=seed)
        cells[f"methods/orchmoe-x1-s{seed}"] = orchmoe
        cells[f"controls/none-s{seed}"] = flat(1.5, 2.25, row=name, seed=seed)
    text = curves.text(cells, {})
    differences = "-0.500 [-0.500, -0.500] | -0.250 ["
    assert f"| {name} | 0, 1 | 1.500 (0.000) | 2.250 (0.000) | {differences}" in text


def test_text_answers_stand_beside_orchmoes():
    """Each metric has its difference. A row without losses, as what copies, has none of that."""
    cells = {}
    for scale, loss in ((0.5, 3.0), (1.0, 2.0), (2.0, 2.5), (4.0, 2.5)):
        name = f"methods/orchmoe-x{scale}-s0"
        cells[name] = cell([1.0], np.full(9, loss), row="orchmoe", alpha=2 * scale)
    for row, alpha, seed, loss, rouge in (
        ("orchmoe", 1.0, 0, 9.0, 99.0),  # a scale that once was the best
        ("orchmoe", 2.0, 0, 1.0, 40.0),
        ("orchmoe", 2.0, 1, 1.0, 60.0),
        ("lora", 1.0, 0, 1.5, 30.0),
        ("poly", 1.0, 2, 1.5, 30.0),
        ("copy-demo", 1.0, 0, np.nan, 45.0),
    ):
        answers = flat(loss, loss, row=row, alpha=alpha, seed=seed)
        for part in ("seen", "unseen"):
            for scores in answers[part]["tasks"].values():
                scores |= {"rougeL": rouge, "exact_match": rouge / 2}
        cells[f"answers/{row}-x{alpha / 2}-s{seed}"] = answers
    text = curves.text(cells, {})
    once = "+10.000 [+10.000, +10.000] | +5.000 [+5.000, +5.000] | -0.500 [-0.500, -0.500]"
    assert f"| lora, scale 0.5 | 0 | {once} | {once} |" in text
    assert "of the 16 here" in text
    # OrchMoE has no such seed.
    assert "| poly, scale 0.5 | 2 | - | - | - | - | - | - |" in text
    # What is not trained stands beside both seeds.
    once = "+5.000 [-122.061, +132.061] | +2.500 [-61.031, +66.031] | -"
    assert f"| copy-demo | 0, 1 | {once} | {once} |" in text
    assert text.count("| orchmoe, scale 1 |") == 1  # its means, and no difference from itself


def test_text_best_scales_stand_beside_each_other():
    """Also on the tasks by which nothing was chosen. No curve is read there: that is a choice."""
    cells = at(0.5, 2.0, 4.0, row="orchmoe") | at(2.0, 2.25, 4.75, row="lora", seen=1.5)
    for row, best in (("orchmoe", 0.5), ("lora", 2.0)):
        for scale in {*curves.SCALES} - {best}:
            cells |= at(scale, 9.0, 0.5, row=row, seen=0.5)
    once = "-0.500 [-0.500, -0.500] | -0.250 [-0.250, -0.250] |"
    for final, more in ((False, ""), (True, " -0.750 [-0.750, -0.750] |")):
        text = curves.text(cells, {}, final)
        assert f"| lora | 0 | {once}{more}\n" in text
        assert "at no more unseen-dev" in text
        assert "at no more unseen-test" not in text


def test_readme_has_the_numbers_of_the_tables():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    page = page.partition("## Does it beat LoRA?")[2]
    tables = (ROOT / "experiments/results/tables.md").read_text()
    by_curves = tables.partition("| orchmoe - row | seeds | seen at no more")[2]
    by_curves = by_curves.partition("\n\n")[0]
    rows = re.findall(r"^\| (\w[\w -]+) \| (\d.+) \|$", page, re.MULTILINE)
    assert {row.lower() for row, _ in rows} == curves.ROWS.keys()
    for row, cells in rows:
        start = f"| {row.lower()} | "
        *losses, one, other = cells.split(" | ")
        best = [
            line
            for line in tables.splitlines()
            if line.startswith(start) and ", the best |" in line
        ]
        assert [line.split(" | ")[-2:] for line in best] == [[losses[0], f"{losses[1]} |"]]
        due = [line for line in by_curves.splitlines() if line.startswith(start)]
        expected = [[one, f"{other} |"]] if row != "OrchMoE" else []
        assert [line.split(" | ")[-2:] for line in due] == expected
        assert row != "OrchMoE" or one == other == "-"


def test_tables_and_pages_have_the_numbers_of_the_cells():
    """The pages quote differences with intervals either way round, of all seeds or the first."""
    cells = curves.read_cells(report.RESULTS)
    tuning = read_tuning(report.RESULTS)
    assert curves.text(cells, tuning) == (report.RESULTS / "tables.md").read_text()
    text = curves.text(cells, tuning, final=True)
    assert text == (report.RESULTS / "final.md").read_text()
    first_seed = {name: each for name, each in cells.items() if name.endswith("-s0")}
    text += curves.text(first_seed, tuning)

    def quoted(text):
        number = r"([-+]?\d+\.\d+)"
        found = re.findall(rf"{number}\s+\[{number},\s+{number}\]", text)
        assert len(found) == len(re.findall(rf"\[{number},\s+{number}\]", text)) > 9
        return {tuple(map(float, each)) for each in found}

    there = quoted(text)
    there |= {(-mean, -high, -low) for mean, low, high in there}
    for page in ("README.md", "docs/evidence.md"):
        assert quoted((ROOT / page).read_text(encoding="utf-8")) <= there
