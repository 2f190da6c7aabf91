"""What people read: walkthrough, drawing, scaling page, help texts, progress bars and figures."""

import importlib.util
import io
import json
import math
import multiprocessing
import re
import sys
import time
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch

import eval as evaluation
import runtime
import t5
import train
from baselines import attach_method, count_parameters
from experiments import bench, compare, plot
from experiments.tables import interval
from helpers import ROOT
from orchmoe import OrchMoEConfig, attach

DECIMAL = re.compile(r"-?\d+\.\d+")


def load_script(name):
    """Import docs/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and NamedTuples look for their types here
    spec.loader.exec_module(module)
    return module


# ----------------------------------------------------------------------------- pages from scripts


@pytest.mark.slow
def test_walkthrough_is_what_its_script_prints():
    """Numbers may differ by 1 %: a hundred steps of Adam enlarge the rounding of a processor."""
    saved = (ROOT / "docs/walkthrough.md").read_text(encoding="utf-8")
    made = load_script("walkthrough").page()
    assert DECIMAL.sub("#", made) == DECIMAL.sub("#", saved)
    saved_numbers = [float(number) for number in DECIMAL.findall(saved)]
    made_numbers = [float(number) for number in DECIMAL.findall(made)]
    assert len(saved_numbers) > 100
    assert made_numbers == pytest.approx(saved_numbers, rel=0.01, abs=0.01)


def test_drawing_is_what_its_script_draws():
    saved = (ROOT / "docs/architecture.svg").read_text(encoding="utf-8")
    assert saved == load_script("architecture").drawing()
    root = ElementTree.fromstring(saved)
    width, height = root.get("viewBox").split()[2:]
    namespace = "{http://www.w3.org/2000/svg}"
    background = root.find(f"{namespace}rect")
    assert background.get("fill") == "white"
    assert (background.get("width"), background.get("height")) == (width, height)
    # It stays readable if a page scales it to 850 pixels.
    assert int(width) <= 900
    assert int(root.get("font-size")) >= 14

    texts = {text.text for text in root.iter(f"{namespace}text")}
    shapes = {"(B,L,D)", "(B,K)", "(N,K,S)", "(N,B,S)", "(B,L,S R)", "(B,L,O)"}
    assert shapes <= texts


def test_matrices_of_the_drawing_have_the_shapes_of_the_code():
    sizes = {"D": 3, "O": 5, "S": 7, "R": 11}
    base = torch.nn.Sequential(torch.nn.Linear(3, 5))
    adapters = attach(base, OrchMoEConfig(targets=("0",), skills=7, rank=11))
    linear = adapters.linears["0"]
    drawing = load_script("architecture").drawing()

    def drawn_shapes(pattern):
        shapes = {}
        for name, *letters in re.findall(pattern, drawing):
            shape = [math.prod(sizes[letter] for letter in part.split()) for part in letters]
            shapes[name] = tuple(shape)
        return shapes

    # As they are stored, and as they multiply a column.
    stored = {"A": linear.skill_A.shape, "B": linear.skill_B.shape}
    assert drawn_shapes(r"(A|B) (?:is kept )?as \((\w),(\w),(\w)\)") == stored
    multiplied = {
        "A": linear.skill_A.flatten(0, 1).shape,
        "B": linear.skill_B.flatten(0, 1).T.shape,
        "weight": linear.weight.shape,
    }
    assert drawn_shapes(r"(A|B|weight)[:,] ([SRDO ]+) × ([SRDO ]+)<") == multiplied


def test_scaling_page_has_the_computed_memory():
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    adapter_configs = (OrchMoEConfig(), OrchMoEConfig(targets=("all",), skills=8, rank=4))
    for name, config in compare.SIZES.items():
        trained = []
        with torch.device("meta"):
            base = t5.T5(config)
            for adapter_config in adapter_configs:
                adapters = attach_method("orchmoe", t5.T5(config), adapter_config)
                trained.append(sum(count_parameters(adapters).values()))
        size = sum(p.numel() for p in base.parameters())
        blocks = []
        for block in base.blocks:
            blocks.append(sum(p.numel() for p in block.parameters()))

        outside = size - sum(blocks)  # embedding and head
        memory = [2 * size, 4 * size]
        memory += [16 * count for count in trained]
        memory += [2 * size / 8, 2 * outside, 2 * max(blocks)]  # --shard over 8 processes
        cells = [name]
        cells += [f"{number:,}" for number in (size, *trained)]
        cells += [compare.format_bytes(number) for number in memory]
        assert f"| {' | '.join(cells)} |" in page


# ------------------------------------------------------------------------------------- help texts

PROGRAMS = {
    "train": train,
    "eval": evaluation,
    "compare": compare,
    "plot": plot,
    "bench": bench,
}


@pytest.fixture
def help_page(monkeypatch, capsys):
    """Return what `program --help` prints."""

    def read(program):
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setattr(sys, "argv", [f"{program}.py", "--help"])
        with pytest.raises(SystemExit):
            PROGRAMS[program].main()
        return capsys.readouterr().out

    return read


def entries(page):
    """Return {flag: its entry on one line} of a help page."""
    found = {}
    for part in re.split(r"\n  (?=--)", page)[1:]:
        entry = " ".join(part.split("\n\n")[0].split())
        flag = re.match(r"--[a-z0-9-]+", entry)[0]
        found[flag] = entry
    return found


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_describes_every_flag(help_page, program):
    page = help_page(program)
    assert page.startswith("usage: ")
    assert entries(page)
    for entry in entries(page).values():
        assert entry.count("default:") <= 1, entry
        # A flag, its value, words, and a default.
        words = re.sub(r"^--\S+( ([A-Z,.]+|\{[^}]*\}|--\S+))*", "", entry)
        words = re.sub(r"\(default: .*\)$", "", words)
        assert re.search(r"[a-z0-9]{2}", words), entry


def test_help_of_compare_has_its_own_defaults_and_hides_what_it_sets(help_page):
    found = entries(help_page("compare"))
    assert found["--steps"].endswith("(default: 200)")
    assert found["--lr-skills"].endswith("(default: 0.01)")
    assert not found.keys() & {"--method", "--seed", "--extra-rank"}


# ---------------------------------------------------------------------------------- progress bars


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bar_on_a_terminal_has_rate_and_remaining_time(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def drawn(seconds_per_step):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        for _ in runtime.progress(range(4), "train", unit="step"):
            time.sleep(seconds_per_step)
        return terminal.getvalue()

    slow = drawn(0.4)
    assert re.search(r"train: +75%.* 3/4 \[00:01<00:00, .*step/s\]", slow), slow
    assert drawn(0.01).strip() == ""  # it ends before the bar would appear


@pytest.mark.parametrize("stream, parent", [(io.StringIO(), None), (Terminal(), "a parent")])
def test_no_bar_without_a_terminal_or_in_a_worker(stream, parent, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: parent)
    assert runtime.progress(range(4), "train").disable


# ---------------------------------------------------------------------------------------- figures


@pytest.fixture
def drawn(monkeypatch):
    """Return {file name: figure} of what is drawn. No file is written."""
    pytest.importorskip("matplotlib")
    figures = {}

    def keep(figure, path):
        figures[path.name] = figure
        return path

    monkeypatch.setattr(plot, "save", keep)
    yield figures
    plot.pyplot().close("all")


def scores(**categories):
    overall = sum(categories.values()) / len(categories)
    by_category = {name: {"rougeL": value} for name, value in categories.items()}
    return {"overall": {"rougeL": overall}, "categories": by_category}


ROUTING = {
    "w": {"b1": [0.9, 0.1], "a2": [0.2, 0.8], "a1": [0.4, 0.6]},
    "category": {"a1": "A", "a2": "A", "b1": "B"},
    "allocation": [[[0.25, 0.75], [0.5, 0.5]]],
    "skill_use": {"q": [0.3, 0.7]},
}


def labels(texts):
    return [text.get_text() for text in texts]


def require_readable(figures, source):
    """Figures have the width of a page, name their source, and have labels on all axes."""
    for name, figure in figures.items():
        assert figure.get_size_inches()[0] == plot.WIDTH, name
        assert figure.get_suptitle().endswith(f"\n{source}"), name
        for axes in figure.axes:
            assert axes.get_xlabel() or axes.get_ylabel(), name


def test_figures_of_a_run(tmp_path, drawn):
    log = [{"step": step, "loss": 4.0 - step} for step in range(3)]
    log.append({"step": 2, "dev_loss": 1.5})
    lines = [json.dumps(row) + "\n" for row in log]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    rows = {
        "frozen base": {"seen": scores(A=10, B=20)},
        "orchmoe": {"seen": scores(A=30, B=50)},
    }
    (tmp_path / "scores.json").write_text(json.dumps(rows))
    (tmp_path / "routing.json").write_text(json.dumps(ROUTING))
    written = [path.name for path in plot.run_figures(tmp_path)]
    assert written == ["loss.png", "categories-seen.png", "router.png", "allocation.png"]
    require_readable(drawn, tmp_path)

    bars = drawn["categories-seen.png"].axes[0].containers
    assert [[bar.get_width() for bar in row] for row in bars] == [[10, 20], [30, 50]]
    assert [row.get_label() for row in bars] == ["frozen base (15.0)", "orchmoe (40.0)"]

    router = drawn["router.png"].axes[0]
    assert labels(router.get_yticklabels()) == ["A:  a1", "a2", "B:  b1"]
    assert labels(router.get_xticklabels()) == ["1", "2"]  # as eval.py --ask numbers them
    assert router.images[0].get_array().tolist() == [[0.4, 0.6], [0.2, 0.8], [0.9, 0.1]]

    left, right = drawn["allocation.png"].axes[:2]
    assert left.images[0].get_array().tolist() == [[0.25, 0.75, 0.5, 0.5]]
    assert [bar[0].get_width() for bar in right.containers] == [0.3, 0.7]
    assert [bar[0].get_x() for bar in right.containers] == [0, 0.3]

    loss = drawn["loss.png"].axes[0]
    _, dev = loss.lines
    assert dev.get_xydata().tolist() == [[3, 1.5]]
    assert all(step == round(step) for step in loss.get_xticks())


def test_map_of_many_tasks_has_a_row_for_each_category(tmp_path, drawn, monkeypatch):
    monkeypatch.setattr(plot, "MOST_ROWS", 2)
    plot.router_map(ROUTING, tmp_path / "router.png", tmp_path)
    axes = drawn["router.png"].axes[0]
    assert labels(axes.get_yticklabels()) == ["A", "B"]
    found = axes.images[0].get_array().ravel().tolist()
    assert found == pytest.approx([0.3, 0.7, 0.9, 0.1])


def test_ablations_are_drawn_as_intervals(tmp_path, drawn):
    cells = []
    for name, seen in (("default", [50, 54]), ("K = 1", [48, 50]), ("K = 4", [51, 54])):
        tasks = {f"task{i}": {"rougeL": rouge} for i, rouge in enumerate(seen)}
        cells.append({"row": name, "folder": name, "seen": {"tasks": tasks}})
    (tmp_path / "ablations.json").write_text(json.dumps({"cells": cells}))
    assert [path.name for path in plot.figures(tmp_path)] == ["ablations.png"]
    require_readable(drawn, tmp_path)
    axes = drawn["ablations.png"].axes[0]
    assert labels(axes.get_yticklabels()) == ["K = 1", "K = 4"]
    lines = [list(line.get_xdata()) for line in axes.lines[:4]]
    for bar, point, differences in (
        (lines[0], lines[1], [2, 4]),
        (lines[2], lines[3], [-1, 0]),
    ):
        mean, low, high = interval(np.array(differences)[:, None])  # two tasks, one seed
        assert [*bar, *point] == [low, high, mean]


def test_folder_without_results_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plot.py", "--results", str(tmp_path)])
    with pytest.raises(ValueError, match="no results.json"):
        plot.main()
