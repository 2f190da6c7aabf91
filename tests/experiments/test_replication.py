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
ROWS_OF = {  # --baseline: the rows of its comparison, the primary ones first
    "lora": ("orchmoe", "lora", "frozen_router"),
    "tuned": ("orchmoe", "tuned_lora", "frozen_router", "orchmoe_k8", "lora"),
}


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


@pytest.fixture(params=ROWS_OF)
def baseline(request):
    """Name one of the two comparisons."""
    return request.param


@pytest.fixture
def cells(baseline, tmp_path):
    """Write made-up cells of a comparison, with three tasks in each. Return their folder."""
    folder = tmp_path / ("tuned/cells" if baseline == "tuned" else "cells")
    losses = np.random.default_rng(0).normal([[1.0], [1.1], [1.05], [1.2], [1.3]], 0.02, (5, 16))
    for row, of_row in zip(ROWS_OF[baseline], losses, strict=False):
        for seed, loss in zip(range(100, 116), of_row, strict=True):
            tasks = {name: {"loss": loss + i} for name, i in (("a", -1), ("b", 0), ("c", 1))}
            answers = {name: {"rougeL": 10 * loss, "exact_match": loss} for name in tasks}
            cell = {
                "settings": {"seed": seed, "cpu": "x", "computed": "y", "train_tasks": str(seed)},
                "seen": {"tasks": tasks},
                "answers": {"tasks": answers},
                **{"tree": "abc", "torch": "2", "threads": 1},
            }
            program.write_json(folder / f"{row}-s{seed}.json", cell)
    return folder


def analyse(cells, baseline, code=0):
    flags = ("--baseline", baseline, "--results", cells.parent)
    return run("experiments/replication_analysis.py", *flags, cwd=cells.parent, code=code)


def test_the_analysis_agrees_with_code_that_imports_nothing_of_the_project(
    cells, baseline, tmp_path
):
    out = analyse(cells, baseline)
    primary = ROWS_OF[baseline][1].replace("_", " ")
    assert re.search(rf"\| orchmoe - {primary} \| loss \|.*\| better \|", out)
    verdicts = re.findall(r"\| (better|worse) \|", out)
    assert verdicts == (["better", "worse"] if "orchmoe_k8" in ROWS_OF[baseline] else ["better"])
    script = tmp_path / "recompute.py"
    script.write_bytes((ROOT / "experiments/results/replication/recompute.py").read_bytes())
    second = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    planned, _, _ = second.stdout.partition("not planned")
    pairs = replication_analysis.PAIRS[baseline] + replication_analysis.FURTHER_PAIRS[baseline]
    assert len(planned.splitlines()) == len(replication_analysis.OUTCOMES) * len(pairs)
    for line in planned.splitlines():
        assert f"| {line.partition(': ')[2]} |" in out
    is_drawn = (cells.parent / "replicates.png").exists()
    assert is_drawn or not importlib.util.find_spec("matplotlib")


def test_nothing_is_shown_before_all_primary_cells_are_there(cells, baseline):
    _, of_baseline, *others = ROWS_OF[baseline]
    for row in others:
        name = row.replace("_", " ")
        assert f"| {name}, loss" in analyse(cells, baseline)
        (cells / f"{row}-s103.json").unlink()
        out = analyse(cells, baseline)
        for part in (f"| {name}, loss", f"| {name} - ", f" - {name} |"):
            assert part not in out
    missing = cells / f"{of_baseline}-s115.json"
    missing.unlink()
    error = analyse(cells, baseline, code=2)
    assert f"{missing.name}: not finished; nothing is shown" in error


def change(path, name, value):
    """Change a setting of a cell, or another value of it."""
    cell = program.read_json(path)
    section = cell["settings"] if name in cell["settings"] else cell
    section[name] = value
    program.write_json(path, cell)


@pytest.mark.parametrize("name", ["cpu", "computed", "train_tasks", "tree", "torch", "threads"])
@pytest.mark.parametrize("row", ["baseline", "frozen_router"])
def test_cells_of_one_replicate_must_fit(cells, baseline, row, name):
    row = ROWS_OF[baseline][1] if row == "baseline" else row
    change(cells / f"{row}-s107.json", name, "another")
    error = analyse(cells, baseline, code=2)
    expected = "its cells have other tasks" if name == "train_tasks" else f"in '{name}'"
    assert "replicate 107: " in error and expected in error


@pytest.mark.parametrize("name", ["cpu", "tree"])
def test_a_whole_replicate_of_another_tree_or_cpu_does_not_fit(cells, baseline, name):
    for path in cells.glob("*-s107.json"):
        change(path, name, "another")
    error = analyse(cells, baseline, code=2)
    assert f"replicate 107: a cell differs from others in '{name}'" in error


def test_a_cell_that_diverged_leaves_no_verdict(cells, baseline):
    of_baseline = cells / f"{ROWS_OF[baseline][1]}-s107.json"
    program.write_json(of_baseline, {"settings": {}, "diverged": "step 3"})
    error = analyse(cells, baseline, code=2)
    assert "replicate 107: a cell diverged, so there is no verdict" in error


def test_the_published_tables_are_those_of_the_cells(baseline):
    folder = replication_analysis.FOLDERS[baseline]
    found = replication_analysis.read_cells(folder, baseline)
    published = (folder / "tables.md").read_text(encoding="utf-8")
    assert replication_analysis.text(found, baseline) == published


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
