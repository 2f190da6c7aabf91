"""What people read: the walkthrough and the drawing are what their scripts make today, every help page is
whole, bars show only where somebody looks, figures say what they show and of what."""

import importlib.util
import io
import json
import math
import multiprocessing
import re
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

import eval as evaluation
import runtime
import t5
import train
from baselines import attach_method, count
from experiments import bench, compare, plot
from orchmoe import OrchMoEConfig, attach

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = {"train": train, "eval": evaluation, "compare": compare, "plot": plot, "bench": bench}
DECIMAL = re.compile(r"-?\d+\.\d+")


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and NamedTuples look for their types
    spec.loader.exec_module(module)
    return module


# Rounding differs between processors and versions of torch, and a hundred steps of Adam enlarge it.
@pytest.mark.slow
def test_the_walkthrough_is_that_of_the_run_it_names():
    kept = (ROOT / "docs/walkthrough.md").read_text(encoding="utf-8")
    fresh = script("walkthrough").page()
    assert DECIMAL.sub("#", kept) == DECIMAL.sub("#", fresh)
    old, new = ([float(number) for number in DECIMAL.findall(text)] for text in (kept, fresh))
    assert len(old) > 100 and new == pytest.approx(old, rel=0.01, abs=0.01)


def test_the_drawing_is_what_its_script_draws():
    kept = (ROOT / "docs/architecture.svg").read_text(encoding="utf-8")
    assert kept == script("architecture").drawing()
    root = ElementTree.fromstring(kept)
    width, height = map(int, root.get("viewBox").split()[2:])
    name = "{http://www.w3.org/2000/svg}"
    ground = root.find(f"{name}rect")
    assert [ground.get(key) for key in ("fill", "width", "height")] == ["white", str(width), str(height)]
    assert width <= 900 and int(root.get("font-size")) >= 14  # readable where a page scales it to 850 pixels
    drawn = {text.text for text in root.iter(f"{name}text")}
    assert {"(B,L,D)", "(B,K)", "(N,K,S)", "(N,B,S)", "(B,L,S R)", "(B,L,O)"} <= drawn


def test_the_matrices_of_the_drawing_are_those_of_the_code():
    """As they stand before a column of inputs, and as they are kept."""
    letters = {"D": 3, "O": 5, "S": 7, "R": 11}
    base = torch.nn.Sequential(torch.nn.Linear(3, 5))
    linear = attach(base, OrchMoEConfig(targets=("0",), skills=7, rank=11)).linears["0"]
    drawn = script("architecture").drawing()

    def shapes(pattern):
        return {name: tuple(math.prod(letters[letter] for letter in part.split()) for part in shape)
                for name, *shape in re.findall(pattern, drawn)}  # fmt: skip

    A, B = linear.skill_A, linear.skill_B
    assert shapes(r"(A|B) (?:is kept )?as \((\w),(\w),(\w)\)") == {"A": A.shape, "B": B.shape}
    assert shapes(r"(A|B|weight)[:,] ([SRDO ]+) × ([SRDO ]+)<") == {
        "A": A.flatten(0, 1).shape, "B": B.flatten(0, 1).T.shape, "weight": linear.weight.shape}  # fmt: skip


def help_page(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit):
        PROGRAMS[name].main()
    return capsys.readouterr().out


def entries(page):
    """{flag: its whole entry, on one line}."""
    parts = [" ".join(part.split("\n\n")[0].split()) for part in re.split(r"\n  (?=--)", page)[1:]]
    return {re.match(r"--[a-z0-9-]+", part)[0]: part for part in parts}


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_says_what_every_flag_does(name, monkeypatch, capsys):
    page = help_page(name, monkeypatch, capsys)
    assert page.startswith("usage: ") and entries(page)
    for entry in entries(page).values():  # a flag, its value, and then words
        told = re.sub(r"^--\S+( ([A-Z,.]+|\{[^}]*\}|--\S+))*", "", entry)
        assert re.search(r"[a-z0-9]{2}", told), entry
        assert entry.count("default:") <= 1, entry


def test_help_of_compare_has_its_own_defaults_and_not_what_it_sets_itself(monkeypatch, capsys):
    told = entries(help_page("compare", monkeypatch, capsys))
    assert told["--steps"].endswith("(default: 200)") and told["--lr-skills"].endswith("(default: 0.01)")
    assert not told.keys() & {"--method", "--seed", "--extra-rank"}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def drawn_by(stream, monkeypatch, steps, seconds):
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in runtime.progress(range(steps), "train", unit="step"):
        time.sleep(seconds)
    return stream.getvalue()


def test_bars_tell_rate_and_time_left_at_a_terminal_only(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    bar = drawn_by(Terminal(), monkeypatch, 4, 0.4)
    assert re.search(r"train: +75%.* 3/4 \[00:01<00:00, .*step/s\]", bar), bar
    assert drawn_by(Terminal(), monkeypatch, 4, 0.01).strip() == ""  # too short to be watched
    for stream, parent in ((io.StringIO(), None), (Terminal(), "a parent")):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(multiprocessing, "parent_process", lambda parent=parent: parent)
        assert runtime.progress(range(4), "train").disable


# ---------------------------------------------------------------------------------------------------- figures


@pytest.fixture
def drawn(monkeypatch):
    """{file name: figure} of what is drawn, in place of files."""
    pytest.importorskip("matplotlib")
    figures = {}
    monkeypatch.setattr(plot, "save", lambda figure, path: figures.setdefault(path.name, figure) and path)
    yield figures
    plot.pyplot().close("all")


def scores(**categories):
    overall = sum(categories.values()) / len(categories)
    return {"overall": {"rougeL": overall}, "categories": {k: {"rougeL": v} for k, v in categories.items()}}


LEARNT = {"w": {"b1": [0.9, 0.1], "a2": [0.2, 0.8], "a1": [0.4, 0.6]},
          "category": {"a1": "A", "a2": "A", "b1": "B"},
          "allocation": [[[0.25, 0.75], [0.5, 0.5]]], "skill_use": {"q": [0.3, 0.7]}}  # fmt: skip


def check(figures, of):
    """A page's width, whose figure it is, a title above each panel or the whole, names of what is drawn."""
    for name, figure in figures.items():
        assert figure.get_size_inches()[0] == plot.WIDTH, name
        assert figure.get_suptitle().endswith(f"\n{of}"), name
        assert all(axes.get_xlabel() or axes.get_ylabel() for axes in figure.axes), name


def test_figures_of_a_run(tmp_path, drawn):
    log = [{"step": step, "loss": 4.0 - step} for step in range(3)] + [{"step": 2, "dev_loss": 1.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    (tmp_path / "scores.json").write_text(json.dumps({
        "frozen base": {"seen": scores(A=10, B=20)}, "orchmoe": {"seen": scores(A=30, B=50)}}))  # fmt: skip
    (tmp_path / "routing.json").write_text(json.dumps(LEARNT))
    written = [path.name for path in plot.run_figures(tmp_path)]
    assert written == ["loss.png", "categories-seen.png", "router.png", "allocation.png"]
    check(drawn, tmp_path)
    bars = drawn["categories-seen.png"].axes[0].containers
    assert [[bar.get_width() for bar in row] for row in bars] == [[10, 20], [30, 50]]
    assert [row.get_label() for row in bars] == ["frozen base (15.0)", "orchmoe (40.0)"]
    router = drawn["router.png"].axes[0]
    assert [text.get_text() for text in router.get_yticklabels()] == ["A:  a1", "a2", "B:  b1"]
    assert [text.get_text() for text in router.get_xticklabels()] == ["1", "2"]  # as eval.py --ask counts
    assert router.images[0].get_array().tolist() == [[0.4, 0.6], [0.2, 0.8], [0.9, 0.1]]
    left, right = drawn["allocation.png"].axes[:2]
    assert left.images[0].get_array().tolist() == [[0.25, 0.75, 0.5, 0.5]]
    assert [bar[0].get_width() for bar in right.containers] == [0.3, 0.7]
    assert [bar[0].get_x() for bar in right.containers] == [0, 0.3]
    (_, dev) = drawn["loss.png"].axes[0].lines
    assert dev.get_xydata().tolist() == [[3, 1.5]]
    assert all(step == round(step) for step in drawn["loss.png"].axes[0].get_xticks())


def test_the_map_of_many_tasks_has_a_row_a_category(tmp_path, drawn, monkeypatch):
    monkeypatch.setattr(plot, "MOST_ROWS", 2)
    plot.router_map(LEARNT, tmp_path / "router.png", tmp_path)
    axes = drawn["router.png"].axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["A", "B"]
    assert axes.images[0].get_array().ravel().tolist() == pytest.approx([0.3, 0.7, 0.9, 0.1])


def test_ablations_are_drawn_as_intervals(tmp_path, drawn):
    rows = [{"row": "default", "seen rougeL": {"mean": 50, "sd": 0, "difference": None}},
            {"row": "K = 1", "seen rougeL": {"mean": 48, "sd": 0, "difference": [2, 1, 3]}},
            {"row": "K = 4", "seen rougeL": {"mean": 51, "sd": 0, "difference": [-1, -2, 0]}}]  # fmt: skip
    (tmp_path / "ablations.json").write_text(json.dumps({"summary": rows, "cells": [{}]}))
    assert [path.name for path in plot.figures(tmp_path)] == ["ablations.png"]
    check(drawn, tmp_path)
    axes = drawn["ablations.png"].axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["K = 1", "K = 4"]
    drawn_lines = [line.get_xdata() for line in axes.lines[:4]]
    assert [list(line) for line in drawn_lines] == [[1, 3], [2], [-2, 0], [-1]]


def test_a_folder_without_results_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plot.py", "--results", str(tmp_path)])
    with pytest.raises(ValueError, match="no results.json"):
        plot.main()


def test_the_memory_of_the_scaling_page_is_recounted():
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    for name, config in compare.SIZES.items():
        with torch.device("meta"):
            base, *adapted = (t5.T5(config) for _ in range(3))
        size = sum(p.numel() for p in base.parameters())
        blocks = [sum(p.numel() for p in block.parameters()) for block in base.blocks]
        configs = OrchMoEConfig(), OrchMoEConfig(targets=("all",), skills=8, rank=4)
        trained = [sum(count(attach_method("orchmoe", *of)).values())
                   for of in zip(adapted, configs, strict=True)]
        shard = 2 * size / 8, 2 * (size - sum(blocks)), 2 * max(blocks)  # embedding and head: outside blocks
        memory = map(compare._bytes, (2 * size, 4 * size, *(16 * n for n in trained), *shard))
        assert " | ".join([f"| {name}", *(f"{n:,}" for n in (size, *trained)), *memory]) + " |" in page
