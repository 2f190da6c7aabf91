"""The sixteen replicates: which cells are made, what is kept secret, and what the analysis says."""

import importlib.util
import re
import subprocess
import sys

import numpy as np
import pytest

from experiments import replication, replication_analysis
from experiments.study import kind_of_cpu
from helpers import ROOT, run
from support import program
from tasks import read_splits

ROWS = ("orchmoe", "lora", "frozen_router")  # that replication.py makes
ALL_ROWS = (*ROWS, "tuned_lora")


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Return flags of a computation with two replicates of two tasks and of two steps."""
    earlier = tmp_path / "tasks.json"
    program.write_json(earlier, {"left out": read_splits(ROOT / "sni")["train"][:5]})
    sizes = {"REPLICATES": 2, "TRAIN_TASKS": 2, "EARLIER_TASKS": earlier}
    for name, value in sizes.items():
        monkeypatch.setattr(replication, name, value)
    settings = {"dtype": "float32", "steps": 2, "eval_every": 2, "eval_instances": 2}
    settings |= {"train_instances": 4, "abstract_tasks": 2, "warmup": 1}
    monkeypatch.setattr(replication, "DEFAULTS", replication.DEFAULTS | settings)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    flags = ["--data", ROOT / "sni", "--model", ROOT / "tiny", "--device", "cpu", "--jobs", 1]
    return [*flags, "--results", "kept", "--out", "out"]


def test_a_subset_has_only_these_tasks_even_after_the_data_have_moved(tmp_path):
    task = "task201_opposite_of_second_word"
    folder = tmp_path / "one"
    for root in (tmp_path / "before", ROOT / "sni"):
        replication.write_subset(folder, root, [task])
    assert read_splits(folder) == {"train": [task], "test": []}
    assert (folder / "tasks").readlink() == ROOT / "sni/tasks"


def test_replicates_have_their_own_tasks_and_print_no_losses(small, tmp_path):
    kept = tmp_path / "kept/cells"
    out = run("experiments/replication.py", *small, cwd=tmp_path)
    assert sorted(path.stem for path in kept.iterdir()) == sorted(
        f"{row}-s{seed}" for row in ROWS for seed in (100, 101)
    )
    draws = program.read_json(tmp_path / "kept/draws.json")
    assert len({*draws["100"], *draws["101"]}) == 4
    for row in ROWS:
        cell = program.read_json(kept / f"{row}-s101.json")
        assert sorted(cell["seen"]["tasks"]) == draws["101"]
        assert sorted(cell["answers"]["tasks"]) == draws["101"]
    assert "loss" not in out and "ROUGE" not in out
    router = program.read_json(kept / "frozen_router-s100.json")["router"]
    assert router["distance"] == 0

    # What is missing is made on the CPU of its replicate alone.
    (kept / "lora-s100.json").unlink()
    (kept / "lora-s101.json").unlink()
    other = program.read_json(kept / "orchmoe-s101.json")
    other["settings"]["cpu"] = "another"
    program.write_json(kept / "orchmoe-s101.json", other)
    out = run("experiments/replication.py", *small, cwd=tmp_path)
    assert "replicate 101 is left out: it was begun on" in out
    assert (kept / "lora-s100.json").exists() and not (kept / "lora-s101.json").exists()
    assert program.read_json(kept / "lora-s100.json")["settings"]["cpu"] == kind_of_cpu()


@pytest.fixture
def cells(tmp_path):
    """Write made-up cells of all rows and replicates, with three tasks."""
    losses = np.random.default_rng(0).normal([[1.0], [1.1], [1.05], [1.01]], 0.02, (4, 16))
    for row, of_row in zip(ALL_ROWS, losses, strict=True):
        for seed, loss in zip(range(100, 116), of_row, strict=True):
            tasks = {name: {"loss": loss + i} for name, i in (("a", -1), ("b", 0), ("c", 1))}
            answers = {name: {"rougeL": 10 * loss, "exact_match": loss} for name in tasks}
            cell = {
                "settings": {"seed": seed, "cpu": "x", "computed": "y", "train_tasks": str(seed)},
                "seen": {"tasks": tasks},
                "answers": {"tasks": answers},
                **{"tree": "abc", "torch": "2", "threads": 1},
            }
            program.write_json(tmp_path / "cells" / f"{row}-s{seed}.json", cell)


def analyse(folder, code=0):
    return run("experiments/replication_analysis.py", "--results", folder, cwd=folder, code=code)


def test_the_analysis_agrees_with_code_that_imports_nothing_of_the_project(cells, tmp_path):
    out = analyse(tmp_path)
    assert "| orchmoe - lora | loss | -0." in out and "| better |" in out
    script = tmp_path / "recompute.py"
    script.write_bytes((ROOT / "experiments/results/replication/recompute.py").read_bytes())
    second = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    planned, _, _ = second.stdout.partition("not planned")
    assert len(planned.splitlines()) == 12
    for line in planned.splitlines():
        assert f"| {line.partition(': ')[2]} |" in out
    assert (tmp_path / "replicates.png").exists() or not importlib.util.find_spec("matplotlib")


def test_nothing_is_shown_before_all_primary_cells_are_there(cells, tmp_path):
    for row in ("frozen_router", "tuned_lora"):
        assert row.replace("_", " ") in analyse(tmp_path)
        (tmp_path / f"cells/{row}-s103.json").unlink()
        assert row.replace("_", " ") not in analyse(tmp_path)
    (tmp_path / "cells/lora-s115.json").unlink()
    error = analyse(tmp_path, code=2)
    assert "lora-s115.json: not finished; nothing is shown" in error


def change(path, name, value):
    """Change a setting of a cell, or another value of it."""
    cell = program.read_json(path)
    section = cell["settings"] if name in cell["settings"] else cell
    section[name] = value
    program.write_json(path, cell)


@pytest.mark.parametrize("name", ["cpu", "computed", "train_tasks", "tree", "torch", "threads"])
@pytest.mark.parametrize("row", ["lora", "tuned_lora"])
def test_cells_of_one_replicate_must_fit(cells, tmp_path, row, name):
    change(tmp_path / f"cells/{row}-s107.json", name, "another")
    error = analyse(tmp_path, code=2)
    assert re.search(
        rf"replicate 107: (its cells differ|a cell differs from others) in '{name}'", error
    )


def test_a_whole_replicate_of_another_tree_does_not_fit(cells, tmp_path):
    for row in ALL_ROWS:
        change(tmp_path / f"cells/{row}-s107.json", "tree", "another")
    assert "replicate 107: a cell differs from others in 'tree'" in analyse(tmp_path, code=2)


def test_a_cell_that_diverged_leaves_no_verdict(cells, tmp_path):
    program.write_json(tmp_path / "cells/lora-s107.json", {"settings": {}, "diverged": "step 3"})
    assert "replicate 107: a cell diverged, so there is no verdict" in analyse(tmp_path, code=2)


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (-0.019, 0.019, "equivalent within 0.02"),
        (-0.019, -0.001, "equivalent within 0.02"),
        (-0.021, -0.001, "better"),
        (0.001, 0.021, "worse"),
        (-0.021, 0.001, "undecided"),
    ],
)
def test_the_verdict_is_the_one_of_the_plan(low, high, expected):
    assert replication_analysis.verdict(((low + high) / 2, low, high)) == expected
