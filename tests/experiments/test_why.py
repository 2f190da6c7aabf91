"""The study of the reasons: what it makes, what it keeps secret, and what its tables say."""

import re
import subprocess
import sys

import numpy as np
import pytest

from experiments import why
from experiments.compare.study import kind_of_cpu
from helpers import ROOT, run, text_of
from support import program
from tasks import read_splits

SEEDS = (300, 301)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Return flags of a study with two draws of three tasks, two trials, and four steps."""
    splits = read_splits(ROOT / "sni")
    tasks = splits["train"]
    program.write_json(tmp_path / "tuning.json", {"train": tasks[:3]})
    program.write_json(tmp_path / "draws.json", {"100": tasks[3:6], "101": tasks[6:9]})
    sizes = {"TRIALS": 2, "MORE_TRIALS": 1, "BEST_POINTS": 1, "FURTHER_SEEDS": (1001,)}
    sizes |= {"TUNING_TASKS": tmp_path / "tuning.json", "DRAWS": tmp_path / "draws.json"}
    for name, value in sizes.items():
        monkeypatch.setattr(why, name, value)
    settings = {"dtype": "float32", "steps": 4, "eval_every": 4, "eval_instances": 3}
    settings |= {"abstract_tasks": 3, "warmup": 1, "train_instances": 8}
    monkeypatch.setattr(why, "DEFAULTS", why.DEFAULTS | settings)
    monkeypatch.setattr(why, "read_splits", lambda _: {"test": splits["test"][:2]})
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr("experiments.compare.study.tree", lambda: "abc")
    flags = ["--data", ROOT / "sni", "--model", ROOT / "tiny", "--device", "cpu", "--jobs", 1]
    return [*flags, "--results", "kept", "--out", "out"]


@pytest.fixture
def tuned(small, tmp_path):
    """Return the same flags, of a study that has its values."""
    values = {name: {"chosen": starts[0]} for name, starts in why.STARTS.items()}
    values["orchmoe"] = {"chosen": {"alpha": 2.0}}
    program.write_json(tmp_path / "kept/values.json", values)
    return small


def stage(name, flags, tmp_path, code=0):
    return run(f"experiments/why.py --stage {name}", *flags, cwd=tmp_path, code=code)


@pytest.mark.slow
def test_the_study_ends_in_its_tables(small, tmp_path):
    kept = tmp_path / "kept"
    error = stage("cells", small, tmp_path, code=2)
    assert "run --stage tune first" in error

    stage("tune", small, tmp_path)
    values = program.read_json(kept / "values.json")
    assert values.keys() == {"orchmoe", *why.STARTS}
    claimed = program.read_json(ROOT / "experiments/results/claim/values.json")
    assert values["orchmoe"] == claimed["orchmoe"]
    # All neighbours of a best point are tried, and both starts.
    assert len(values["mhr"]["starts"]) == 2
    assert len(values["lora"]["trials"]) >= 5
    assert values["mhr"]["chosen"].keys() == {"lr_skills", "alpha", "lr_allocation"}
    trials = {path: path.stat().st_mtime_ns for path in (kept / "tune").iterdir()}
    stage("tune", small, tmp_path)  # nothing is made again
    assert {path: path.stat().st_mtime_ns for path in (kept / "tune").iterdir()} == trials

    out = stage("cells", small, tmp_path)
    assert "loss" not in out and "ROUGE" not in out
    cells = why.read_cells(kept)
    assert cells.keys() == {why.cell_name(row, seed) for row in why.ROWS for seed in SEEDS}
    repeated = program.read_json(kept / "repeated/orchmoe-s300.json")
    assert repeated["seen"] == cells["orchmoe-s300"]["seen"]
    assert cells["frozen_router-s300"]["settings"]["lr_router"] == 0
    assert cells["mhr-s300"]["settings"]["method"] == "QuietMHR"
    assert cells["true_task__factors-s301"]["settings"]["method"] == "OracleOfFactors"
    for cell in cells.values():
        assert cell["seen"]["tasks"].keys() == set(why.draws()[cell["settings"]["seed"]])
        assert len(cell["unseen"]["tasks"]) == 2
        assert cell["unseen"]["overall"].keys() >= {"loss", "rougeL", "exact_match"}

    out = stage("tables", small, tmp_path)
    assert not list((kept / "cells").iterdir())
    assert why.read_cells(kept) == cells
    assert stage("tables", small, tmp_path) == out  # from the joined file


def test_all_rows_have_one_size(tuned, tmp_path, monkeypatch):
    """Those that know the task have no router, and get its weights as ranks."""
    made = []
    monkeypatch.setattr(why, "require_repeatable", lambda study: None)
    monkeypatch.setattr(why.Study, "run", lambda study, cells: made.extend(cells))
    stage("cells", tuned, tmp_path)
    extra = {cell.name: cell.settings.extra_rank for cell in made}
    assert extra["true task"] > extra["orchmoe"] == extra["frozen router"]
    assert extra["true task, factors"] == extra["true task"]
    assert [cell.name for cell in made] == [*why.ROWS, *why.ROWS]  # draw by draw
    assert [cell.settings.seed for cell in made] == [300] * 7 + [301] * 7


class Trials:
    """Trials with made-up losses: the distance from the best point, plus `noise` of each seed."""

    def __init__(self, best, noise=None):
        self.best = best
        self.noise = noise or {}
        self.made = []

    def cell_of(self, values):
        self.made.append(values)
        point = {axis: value for axis, value in values.items() if axis != "seed"}
        loss = 0.0
        for axis, value in point.items():
            loss += abs(np.log2(value / self.best[axis]))
        loss += self.noise.get((tuple(point.values()), values.get("seed", 0)), 0.0)

        class Cell:
            def result(self):
                return {"dev_loss": float(loss)}

        return Cell()


def searched(starts, trials):
    """Return the report of a search."""
    search = why.PlannedSearch(starts, trials.cell_of)
    for _ in search:
        pass
    return search.report()


def test_a_search_tries_all_neighbours_and_moves_once(monkeypatch):
    monkeypatch.setattr(why, "TRIALS", 1)
    monkeypatch.setattr(why, "MORE_TRIALS", 0)
    trials = Trials({"lr_skills": 1.0, "alpha": 8.0})
    report = searched([{"lr_skills": 1.0, "alpha": 1.0}, {"lr_skills": 1.0, "alpha": 2.0}], trials)
    # It starts at the better one, tries its four neighbours, and moves to alpha 4, not to 8.
    assert [start["alpha"] for start in report["starts"]] == [1.0, 2.0]
    assert report["trials"][0]["alpha"] == 2.0 and len(report["trials"]) == 5
    assert report["best"] == report["chosen"] == {"lr_skills": 1.0, "alpha": 4.0}


def test_the_further_seeds_of_a_search_choose_between_its_best_points():
    noise = {((4.0,), 0): -0.1, ((4.0,), 1001): 4.0}
    report = searched([{"alpha": 4.0}], Trials({"alpha": 4.0}, noise))
    assert report["best"] == {"alpha": 4.0}
    assert report["chosen"] in ({"alpha": 2.0}, {"alpha": 8.0})
    assert len(report["all_seeds"]) == 2


# ----------------------------------------------------------------------------------------- tables


def made_up(row, seed, loss):
    """Return a finished cell with three tasks, whose mean loss is `loss`."""
    tasks = {}
    for task, factor in (("a", 0.5), ("b", 1.0), ("c", 1.5)):
        of_task = factor * loss
        tasks[task] = {"loss": of_task, "rougeL": 10 * of_task, "exact_match": of_task}
    settings = {"row": row, "seed": seed, "cpu": kind_of_cpu(), "computed": "x"}
    settings |= {"base": "b", "tokenizer": "t", "train_tasks": str(seed), "test_tasks": "all"}
    return {
        "settings": settings,
        "seen": {"tasks": tasks},
        "unseen": {"tasks": tasks},
        "parameters": {"skills": 2, "routing": 1},
        "tree": "abc",
        "torch": "2",
        "threads": 1,
    }


LEVELS = {"orchmoe, factors": 1.1, "true task, factors": 1.05, "lora": 1.2}  # others: 1.0


@pytest.fixture
def cells(tmp_path):
    """Write 112 cells in which outputs are better than factors, and a LoRA is worst."""
    random = np.random.default_rng(0)
    folder = tmp_path / "kept"
    for row in why.ROWS:
        for seed in why.draws():
            cell = made_up(row, seed, LEVELS.get(row, 1.0) + random.normal(0, 0.01))
            program.write_json(folder / f"cells/{why.cell_name(row, seed)}.json", cell)
            if (row, seed) == ("orchmoe", 300):
                program.write_json(folder / "repeated/orchmoe-s300.json", cell)
    return folder


def tables(cells, code=0):
    return run("experiments/why.py --results", cells, cwd=cells.parent, code=code)


def line_of(out, beginning):
    [line] = [line for line in out.splitlines() if line.startswith(f"| {beginning} |")]
    return line


def test_the_primary_differences_have_verdicts(cells):
    out = tables(cells)
    assert line_of(out, "orchmoe minus lora | seen | loss").endswith("| <0.0001 | better | no |")
    assert line_of(out, "orchmoe minus mhr | seen | loss").endswith("| undecided | yes |")
    assert line_of(out, "outputs minus factors | seen | loss").endswith("| <0.0001 | better | no |")
    means = {}
    for name in ("outputs minus factors", "the first of these minus the second"):
        cells_of_line = line_of(out, f"{name} | seen | loss").split(" | ")
        means[name] = float(cells_of_line[3].split()[0])
    assert means["outputs minus factors"] == pytest.approx(-0.075, abs=0.01)  # of -0.1 and -0.05
    assert means["the first of these minus the second"] == pytest.approx(-0.05, abs=0.01)


def test_a_second_computation_agrees(cells):
    """Each line that recompute.py prints is the beginning of a line of the tables."""
    out = tables(cells)
    script = cells / "recompute.py"
    script.write_bytes((why.RESULTS / "recompute.py").read_bytes())
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(set(lines)) == 3 + 3 + 3 + 6 + 24
    for line in lines:
        difference, _, decision = line.partition("]")
        [found] = [row for row in out.splitlines() if row.startswith(f"| {difference}]")]
        assert found.endswith(f"{decision} |")


def test_the_page_of_the_study_has_the_searches():
    reports = program.read_json(why.RESULTS / "values.json")
    assert f"\n{why.values_table(reports)}\n" in text_of(why.RESULTS / "README.md")


def test_new_tasks_have_an_interval_over_draws_and_one_over_tasks(cells):
    out = tables(cells)
    assert "of 16 |" in line_of(out, "orchmoe minus lora | new tasks, over draws | loss")
    assert "of 3 |" in line_of(out, "orchmoe minus lora | new tasks, over tasks | loss")


def test_nothing_is_shown_before_all_cells_are_there(cells):
    (cells / "cells/mhr-s303.json").unlink()
    out = tables(cells)
    assert out.endswith("Not complete: cells that are missing: 1.\n")
    assert "minus" not in out
    assert len(list((cells / "cells").iterdir())) == 111  # and none is joined


def test_a_cell_that_diverged_leaves_no_verdict(cells):
    change(cells / "cells/mhr-s303.json", "diverged", "step 3")
    out = tables(cells)
    assert out.endswith("No verdict, since cells diverged: mhr-s303.\n") and "minus" not in out


def change(path, name, value):
    """Change a setting of a cell, or another value of it."""
    cell = program.read_json(path)
    part = cell["settings"] if name in cell["settings"] else cell
    part[name] = value
    program.write_json(path, cell)


FACTS = ["cpu", "computed", "train_tasks", "test_tasks"]
FACTS += ["tree", "torch", "threads", "base", "tokenizer"]


@pytest.mark.parametrize("name", FACTS)
def test_cells_that_cannot_be_subtracted_are_refused(cells, name):
    change(cells / "cells/mhr-s307.json", name, "another")
    assert re.search(f"mhr-s307: {name}( of draw 307)? is another", tables(cells, code=2))


def test_a_tree_with_changes_is_no_commit(cells):
    change(cells / "cells/mhr-s307.json", "tree", "abc-dirty")
    assert "made by the tree 'abc-dirty', which is no commit" in tables(cells, code=2)


@pytest.mark.parametrize("name", ["cpu", "torch"])
def test_trials_that_cannot_be_compared_are_refused(cells, name):
    for alpha in (1, 2):
        program.write_json(cells / f"tune/mhr_{alpha}.json", made_up("mhr", 0, 1.0))
    program.write_json(cells / "tune/lora_1.json", made_up("lora", 0, 1.0))
    tables(cells)
    change(cells / "tune/mhr_2.json", name, "another")
    assert re.search(f"tune/mhr_2: {name}.* is another", tables(cells, code=2))


def test_the_trials_of_two_searches_may_be_of_two_kinds_of_cpu(cells):
    for row, cpu in (("mhr", "one"), ("lora", "another")):
        program.write_json(cells / f"tune/{row}_1.json", made_up(row, 0, 1.0))
        change(cells / f"tune/{row}_1.json", "cpu", cpu)
    tables(cells)


def test_tables_need_the_repetition_of_the_first_cell(cells):
    change(cells / "repeated/orchmoe-s300.json", "unseen", {})
    assert "repeated/orchmoe-s300.json: its unseen is not that of" in tables(cells, code=2)
    (cells / "repeated/orchmoe-s300.json").unlink()
    assert "repeated/orchmoe-s300.json: " in tables(cells, code=2)


# ------------------------------------------------------------------------------- kinds of CPU


def test_a_draw_that_was_begun_on_another_cpu_is_left_out(tuned, tmp_path, monkeypatch):
    cell = made_up("orchmoe", 300, 1.0)
    cell["settings"]["cpu"] = "another"
    program.write_json(tmp_path / "kept/cells/orchmoe-s300.json", cell)
    made = []
    monkeypatch.setattr(why, "require_repeatable", lambda study: None)
    monkeypatch.setattr(why.Study, "run", lambda study, cells: made.extend(cells))
    out = stage("cells", tuned, tmp_path)
    assert "draw 300 is left out: it was begun on another" in out
    assert {cell.settings.seed for cell in made} == {301}


def test_a_search_that_was_begun_on_another_cpu_is_left_out(small, tmp_path, monkeypatch):
    cell = made_up("mhr", 0, 1.0)
    cell["settings"]["cpu"] = "another"
    program.write_json(tmp_path / "kept/tune/mhr_0.01_2_1.json", cell)
    searched = []
    monkeypatch.setattr(why, "run_cells", lambda queues, *_: searched.extend(queues))
    monkeypatch.setattr(why.PlannedSearch, "report", lambda search: {"starts": search.starts})
    out = stage("tune", small, tmp_path)
    assert "mhr is left out: its search was begun on another" in out
    assert [search.starts for search in searched] == [
        why.STARTS["orchmoe, factors"],
        why.STARTS["lora"],
    ]


def test_cells_that_differ_when_they_are_made_twice_stop_the_study(tuned, tmp_path, monkeypatch):
    losses = iter((1.0, 1.001))  # of the cell, and of the same one once more

    def make(_study, cells):
        for cell in cells:
            program.write_json(cell.path, {"dev_loss": 1, **made_up("orchmoe", 300, next(losses))})

    monkeypatch.setattr(why.Study, "run", make)
    for _ in range(2):  # also when the stage is run again
        error = stage("cells", tuned, tmp_path, code=2)
        assert "repeated/orchmoe-s300.json: its seen is not that of" in error
