"""The study on SmolLM2: its cells, its curves and its tables."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import checkpoint
import data
import runtime
import tokenizer as tokenizers
import train
from experiments import curves, report
from experiments.routers import attach_with
from experiments.study import Study, StudyConfig, read_tuning, subset
from experiments.tables import halves, interval
from helpers import ROOT, run
from orchmoe import OrchMoEConfig


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


# ---------------------------------------------------------------------------------------- program


def few(monkeypatch, **values):
    """Replace constants of report.py, and of curves.py where it has them."""
    for name, value in values.items():
        for module in (report, curves):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)


@pytest.fixture
def made(tmp_path):
    """Return a function that runs a small report in a folder, with the cells in `kept`."""
    small = "--train-tasks 3 --trials 2 --tune-steps 1 --steps 2 --eval-every 2 --seeds 1"
    small += " --eval-instances 12 --jobs 1 --results kept --device cpu"

    def run_stage(stage, *flags, out="out", code=0):
        words = ["--stage", stage, *small.split(), "--data", ROOT / "sni", "--out", out]
        words += ["--model", ROOT / "tiny", *flags]
        return run("experiments/report.py", *words, cwd=tmp_path, code=code)

    return run_stage


def test_stages_leave_cells_that_can_be_made_again(made, tmp_path, monkeypatch):
    few(monkeypatch, SCALES=(1.0, 2.0), EDGE=())
    kept = tmp_path / "kept"
    rows = ["--rows", "orchmoe,lora"]

    # The methods, which are tuned first.
    out = made("methods", *rows)
    cells = curves.read_cells(kept)
    names = {f"methods/{row}-x{scale}-s0" for row in ("orchmoe", "lora") for scale in (1, 2)}
    assert {name for name in cells if not name.startswith("tune/")} == names
    for name in names:
        found = cells[name]
        assert str(tmp_path) not in json.dumps(found)
        assert str(ROOT) not in json.dumps(found)
        assert set(found["unseen"]["tasks"]) == set(data.read_splits(ROOT / "sni")["test"])
        assert bool(found["learnt"]) == ("orchmoe" in name)  # of what routes
    assert "unseen-test" not in out
    assert "unseen-test" in made("table", "--final")

    # Answers of the run with the best scale.
    best = f"{curves.best_scales(cells)['lora']:g}"
    made("answers", "--rows", "lora,frozen base")
    found = curves.read_cells(kept)
    answers = found[f"answers/lora-x{best}-s0"]["seen"]["overall"]
    assert answers["loss"] == cells[f"methods/lora-x{best}-s0"]["seen"]["overall"]["loss"]
    assert answers.keys() == found["answers/frozen_base-s0"]["unseen"]["overall"].keys()

    # One lost cell is made again elsewhere, from nothing.
    lost = kept / "methods/lora-x2-s0.json"
    stamps = {path: path.stat().st_mtime_ns for path in kept.rglob("*.json")}
    lost.unlink()
    only = ["--cells", "lora-x2-s0", "--no-tune", "--rows", "lora"]
    settings = cells["methods/lora-x2-s0"]["settings"]
    made("methods", *only, "--lr-skills", settings["lr_skills"], out="other")
    assert json.loads(lost.read_text())["unseen"] == cells["methods/lora-x2-s0"]["unseen"]
    assert {path for path in stamps if path.stat().st_mtime_ns != stamps[path]} == {lost}

    # Other steps are refused.
    error = made("methods", *only, "--steps", 3, out="third", code=2)
    assert re.search(r"answers/\S+-s0.json: made with steps 2, not 3; name another fo", error)


@pytest.mark.slow
def test_all_stages_leave_nothing(made, monkeypatch):
    rows = {name: curves.ROWS[name] for name in ("lora", "orchmoe")}
    answering = rows | {name: report.ANSWERING[name] for name in ("full", "copy-demo")}
    ablations = {"K = 2": report.ABLATIONS["K = 2"]}
    controls = {"w of another sample": report.CONTROLS["w of another sample"]}
    stages = dict.fromkeys(report.STAGES, rows) | dict.fromkeys(curves.PROMPTS, answering)
    stages |= {"ablations": ablations, "controls": controls}
    few(monkeypatch, ROWS=rows, ANSWERING=answering, ABLATIONS=ablations, CONTROLS=controls)
    few(monkeypatch, STAGES=stages, SCALES=(1.0,), EDGE=(0.5,))
    assert "methods: 0 cells of 4\n" in made("table")
    out = made("all", "--sizes", "2,3")
    for stage in stages:
        number = 1 if stage in ("ablations", "controls") else 4
        assert f"{stage}: {number} cells of {number}\n" in out


def test_definition_router_reads_the_definition_alone():
    base = checkpoint.load(ROOT / "tiny")
    router = attach_with("definition", train.Settings())("orchmoe", base, OrchMoEConfig()).router
    tokenizer = tokenizers.load(ROOT / "tiny")

    def summary(definition, text):
        example = data.make_example(definition, text, tokenizer, data.DataConfig())
        batch = data.collate([example])
        return router.summarise(base.embed(batch.input_ids), batch.attention_mask)

    found = summary("Count the words.", "one two")
    assert torch.equal(found, summary("Count the words.", "another text"))
    alone = tokenizer.source("Definition: Count the words.\n\nNow")[:-1]  # without EOS
    whole = super(type(router), router).summarise(base.embed(torch.tensor([alone])))
    torch.testing.assert_close(found, whole)


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


def test_cells_of_all_seeds_are_runs_of_their_own(tmp_path):
    """The edge of the scales has the first seed alone."""
    config = report.ReportConfig(stage="methods", rows=("lora",), train_tasks=3)
    study_config = StudyConfig(seeds=2, tune=False, out=str(tmp_path))
    settings = train.Settings.from_flags({"train_instances": 8})
    study = Study(settings, runtime.pick_device(device="cpu"), study_config, curves.ROWS)
    cells = report.stage_cells(config, study)
    seeds = [each.settings.train.seed for each in cells]
    assert len({each.folder for each in cells}) == 2 * len(curves.SCALES) + len(curves.EDGE)
    assert sum(seeds) == len(curves.SCALES)


# --------------------------------------------------------------------------------------- refusals

REFUSED = {
    "controls --rows lora": "--rows lora: choose, once each, of w replaced",
    "all --cells lora-x1-s0": "--cells: give the --stage",
    "all --sizes 50,-5": "--sizes -5: give numbers",
    "tune --alpha 2": "--alpha: the study sets this itself",
    "all --sizes 2,29": "28 training tasks; the cells need 29, see --train-tasks and --sizes",
    "methods --cells lora-x3-s0": "--cells lora-x3-s0: no cell",
    "tune --data without": "0 test tasks; both halves",
}


@pytest.mark.parametrize("flags, words", REFUSED.items())
def test_report_refuses_before_anything_is_made(flags, words, made, tmp_path):
    subset(tmp_path / "without", ROOT / "sni", data.read_splits(ROOT / "sni")["train"])
    error = made(*flags.split(), code=2)
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "kept").exists()


def test_subset_has_these_tasks_alone(tmp_path):
    task = "task201_opposite_of_second_word"
    folder = subset(tmp_path / "one", ROOT / "sni", [task])
    assert data.read_splits(folder) == {"train": [task], "test": []}
    with open(folder / "splits/default/train_tasks.txt") as read:  # by another process
        subset(folder, tmp_path / "moved", ["task1"])
        assert read.read() == f"{task}\n"
    assert (folder / "tasks").readlink() == tmp_path / "moved/tasks"


# ----------------------------------------------------------------------------------------- curves


def line(right=0.0, slope=1):
    """Return a curve of seen losses x + right, by which unseen losses are 5 - slope x."""
    points = {}
    for x in (1.0, 1.25, 1.5):
        points[x] = {0: cell(np.broadcast_to(x + right, 20), np.full(9, 5 - slope * x))}
    return points


def test_complete_prefers_cells_then_points():
    """A scale that is half made is left out, and takes no seed away."""
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
    assert curves.above(moved[1.25], line(), "unseen-dev") == shifted
    # One that ends before the other starts is read at its end: more loss on seen tasks is useless.
    found = curves.at_most(line(), line(0.6), "seen", "unseen-test")[0]
    assert found == pytest.approx(3.5 - (5 - 1.25))
    assert curves.above({0: flat(2.0, 1.0)}, line(), "unseen-dev")[0] == -2.5
    assert curves.above({0: flat(0.9, 1.0)}, line(), "unseen-dev") is None


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
    assert curves.above(moved[1.25], still, "unseen-test") == expected
    # What all lose alike in a task is no noise of a difference, however steep the two are.
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


@pytest.mark.slow
def test_at_most_coverage_on_curves_like_the_real_ones():
    """Two curves of three seeds from one distribution, 60 times: nothing is to be found."""
    rng = np.random.default_rng(0)

    def draw(means, tasks):  # (scales, tasks, seeds)
        spreads = [(0.04, (1, 3)), (0.12, (tasks, 1)), (0.2, (tasks, 3))]  # runs, tasks, the rest
        noise = [rng.normal(0, sd, (4, *shape)) for sd, shape in spreads]
        return np.reshape(means, (4, 1, 1)) + sum(noise)

    def curve():
        seen = draw([1.945, 1.916, 1.901, 1.91], 199)
        unseen = draw([2.32, 2.328, 2.417, 2.476], 58)
        found = {}
        for scale, x, y in zip(curves.SCALES, seen, unseen, strict=True):
            found[scale] = {s: cell(x[:, s], y[:, s]) for s in range(3)}
        return found

    held = []
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


def test_figure_uses_the_half_to_choose_by_and_all_seeds_of_a_curve(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(curves.plot, "save", lambda canvas, path: canvas)
    cells = at({0.25: 9.0, 1.0: 2.0, 2.0: 2.5}, 9.0) | at({1.0: 3.0, 2.0: 3.5}, 9.0, seed=1)
    canvas = curves.figure(curves.curves(cells), tmp_path)
    (drawn,) = canvas.axes[0].containers
    assert drawn.get_label() == "lora, seeds: 0, 1"
    assert drawn.lines[0].get_xydata().tolist() == [[1.0, 2.5], [1.0, 3.0]]


# ----------------------------------------------------------------------------------------- tables


def test_readme_has_the_numbers_of_the_tables():
    page = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Does it beat LoRA?")[2]
    tables = (report.RESULTS / "tables.md").read_text()
    points, by_curves, _ = re.split(r"\| orchmoe - row.*", tables, maxsplit=2)
    rows = re.findall(r"^\| (\w[\w -]+) \| (\d.+) \|$", page, re.MULTILINE)
    assert {row.lower() for row, _ in rows} == curves.ROWS.keys()
    for row, cells in rows:
        *losses, one, other = cells.split(" | ")
        best = re.search(rf"\| {row.lower()} \| \S+, the best \|.*", points)[0]
        assert best.endswith(f" | {' | '.join(losses)} |")
        if row != "OrchMoE":
            assert re.search(rf"\| {row.lower()} \|.*", by_curves)[0].endswith(f"{one} | {other} |")


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
