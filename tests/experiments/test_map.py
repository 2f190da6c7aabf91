"""The map of where routing pays: its points, their studies, and its tables."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest

import checkpoint
import data
import program
import runtime
import train
from experiments import decision
from experiments import map as routing_map
from experiments.sizes import total
from experiments.study import Study, StudyConfig, read_tuning
from experiments.tables import interval
from helpers import ROOT, run

# Few and short prompts: the start of the router reads all that are trained on.
SMALL = ["--train-instances", 4, "--num-pos", 0]


@pytest.fixture
def study(tmp_path):
    settings = train.Settings.from_flags(routing_map.DEFAULTS)
    device = runtime.pick_device(device="cpu")
    config = StudyConfig(out=str(tmp_path / "runs"), results=str(tmp_path / "cells"))
    return Study(settings, device, config, routing_map.EQUAL)


def test_points_have_one_total_size_of_both_rows(study):
    base = checkpoint.on_meta(checkpoint.read_config(study.settings.training.model))
    sizes = {}
    for point in routing_map.points():
        of_point = routing_map.study_at(point, study)
        for name, row in routing_map.EQUAL.items():
            cell = of_point.cell("cells/x", name, row, {})
            method, adapter = cell.settings.training.method, cell.settings.adapter
            sizes[point, name] = total(method, base, adapter, extra_rank=cell.extra_rank)
        assert sizes[point, "lora"] == pytest.approx(sizes[point, "orchmoe"], rel=0.03)


def test_fewer_tasks_are_spread_over_the_list(study):
    everything = data.read_splits(study.settings.dataset.data)
    found = {}
    for tasks in (7, 14):
        found[tasks] = data.read_splits(routing_map.fewer_tasks(study, tasks))
        assert found[tasks]["train"] == everything["train"][:: 28 // tasks]
        assert found[tasks]["test"] == everything["test"]


def search_finds(loss, monkeypatch):
    """Let all searches find that their start is the best, with this loss."""

    def search(searches, *_):
        for each in searches:
            each.losses = {(0,) * len(each.start): loss}

    monkeypatch.setattr("experiments.study.run_cells", search)


def test_tune_carries_the_scale_and_the_rates_of_the_centre_over(study, monkeypatch):
    search_finds(1.0, monkeypatch)
    of_point = routing_map.study_at("total-rank-32", study)
    centre = {"lora": {"alpha": 4.0}, "orchmoe": {"alpha": 2.0, "lr_router": 0.5}}
    routing_map.tune("total-rank-32", of_point, centre)
    tuned = {"lr_skills": 0.01, "alpha": 16.0}  # alpha / R is still 2
    assert of_point.best["orchmoe"] == tuned | {"lr_router": 0.5}
    assert of_point.best["lora"] == {"lr_skills": 0.01, "alpha": 32.0}
    assert read_tuning(of_point.results)["orchmoe"]["best"] == tuned


def test_tune_refuses_rates_at_which_every_trial_diverges(study, monkeypatch):
    search_finds(np.inf, monkeypatch)
    with pytest.raises(ValueError, match="lora: all trials diverged"):
        study.tune(routing_map.EQUAL, 1)


def test_map_makes_all_cells_and_the_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(routing_map, "AXES", {"steps": {"4": {"steps": 4}, "600": {}}})
    monkeypatch.setattr(routing_map, "CENTRE_TRIALS", 2)
    monkeypatch.setitem(routing_map.DEFAULTS, "steps", 2)
    flags = ["--trials", 1, "--eval-every", 2, "--seeds", 1, "--eval-instances", 28]
    flags += ["--results", "kept", "--out", "out", "--device", "cpu", "--jobs", 1, *SMALL]
    out = run("experiments/map.py", "--stage", "map", *flags, cwd=tmp_path)

    kept = tmp_path / "kept"
    rows = ("ceiling", "floor", "lora", "orchmoe")
    for point in ("centre", "steps-4"):
        names = [path.stem for path in sorted((kept / point / "cells").glob("*.json"))]
        assert names == [f"{row}-s0" for row in rows]
        assert read_tuning(kept / point).keys() == {"lora", "orchmoe"}
    cell = program.read_json(kept / "steps-4/cells/ceiling-s0.json")
    assert cell["settings"]["steps"] == 4
    assert "| ceiling | 1 | " in out
    assert cell["parameters"]["routing"] == 20 * 28 * 4  # Z of 20 Linears: K = T = 28, S = 4
    assert cell["learnt"]["entropy"] == 0  # w is one-hot
    assert cell["learnt"]["largest"] == pytest.approx(1 / 28)  # another one for each task
    assert (kept / "map.png").exists() or not importlib.util.find_spec("matplotlib")


@pytest.fixture
def groups():
    """Cells of LoRA with two seeds, and of OrchMoE with a third one."""

    def cell(seed, *losses):
        part = {
            "overall": {"loss": float(np.mean(losses))},
            "tasks": {f"t{i}": {"loss": loss} for i, loss in enumerate(losses)},
        }
        return {"settings": {"seed": seed}, "seen": part, "unseen": part}

    lora = {0: cell(0, 1.0, 2.0), 1: cell(1, 1.2, 2.2)}
    orchmoe = {0: cell(0, 0.9, 1.8), 1: cell(1, 1.1, 2.1), 2: cell(2, 9.0, 9.0)}
    orchmoe[0]["router"] = {"distance": 0.25}
    return {"lora": lora, "orchmoe": orchmoe}


def cells_of(table):
    """Return the cells of a table, line by line."""
    return [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]


def test_stage_table_has_losses_noise_and_paired_differences(groups):
    first, second = cells_of(routing_map.stage_table("x", groups, "lora"))
    assert first[:5] == ["lora", "2", "1.600 (0.141)", "1.600 (0.141)", "-"]
    mean, low, high = interval(np.array([[-0.1, -0.1], [-0.2, -0.1]]))  # the common seeds
    assert second[4] == f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
    assert second[6] == "0.25"
    _, second = cells_of(routing_map.stage_table("x", groups))  # nothing is subtracted
    assert second[4] == "0.25"


def test_map_table_has_the_noise_and_the_distance_beside_each_difference(groups):
    del groups["orchmoe"][2]
    found = {point: {} for point in routing_map.points()} | {"steps-300": groups}
    (cells,) = cells_of(routing_map.map_table(found))
    assert cells[:3] == [
        "steps 300",
        "2",
        cells_of(routing_map.stage_table("", groups, "lora"))[1][4],
    ]
    assert cells[4:-3] == ["-"] * 7  # neither floor nor ceiling
    assert cells[-3:] == ["0.141", "0.177", "0.25"]  # sds of the losses, and the distance


def test_mean_over_points_is_over_finished_points_of_the_same_tasks(groups, monkeypatch):
    monkeypatch.setitem(routing_map.DEFAULTS, "seeds", 2)
    rows = dict.fromkeys(routing_map.ROWS, groups["lora"]) | {"orchmoe": groups["orchmoe"]}
    swapped = {name: {0: group[1], 1: group[0]} for name, group in rows.items()}
    unfinished = rows | {"floor": {0: groups["lora"][0]}}
    found = {point: {} for point in routing_map.points()} | {"total-rank-2": unfinished}
    assert routing_map.finished_points(found) == []
    found |= {"centre": rows, "steps-300": swapped, "training-tasks-7": rows}
    mean = routing_map.mean_over_points(routing_map.finished_points(found))
    assert all(group.keys() == {0, 1} for group in mean.values())
    assert mean["lora"][0]["seen"]["tasks"]["t1"]["loss"] == pytest.approx((2.0 + 2.2) / 2)
    assert mean["orchmoe"][1]["unseen"]["overall"]["loss"] == pytest.approx(1.475)
    label, seeds, seen, *_ = cells_of(routing_map.map_table(found))[-1]
    assert (label, seeds) == ("mean over 2 points", "2")
    assert seen.startswith("-0.125 [")
    swapped["floor"][1]["seen"]["tasks"]["other"] = {"loss": 1.0}
    with pytest.raises(ValueError, match="the points have different seen tasks"):
        routing_map.map_table(found)


def test_difference_refuses_other_tasks(groups):
    groups["lora"][1]["seen"]["tasks"] = {"t0": {"loss": 1.0}, "other": {"loss": 1.0}}
    with pytest.raises(ValueError, match="different seen tasks"):
        routing_map.difference(groups, "orchmoe", "lora", "seen")


# --------------------------------------------------------------------------------------- decision


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (-0.09, -0.01, "better"),
        (-0.015, -0.001, "equivalent within 0.02"),
        (0.01, 0.09, "worse"),
        (-0.019, 0.019, "equivalent within 0.02"),
        (-0.03, 0.01, "undecided"),
    ],
)
def test_verdict(low, high, expected):
    found = ((low + high) / 2, low, high)
    assert decision.verdict(found, 3, 3) == expected
    assert decision.verdict(found, 2, 3) == "unfinished"


def test_pilot_verdict_needs_three_times_the_noise_and_all_seeds():
    def group(*losses):
        cells = [{"seen": {"overall": {"loss": loss}}} for loss in losses]
        return dict(enumerate(cells))

    floor = group(1.0, 1.1, 1.2)  # the sd is 0.1
    far, near = group(0.79, 0.79, 0.79), group(0.81, 0.81, 0.81)
    passed, why = decision.pilot_verdict({"floor": floor, "ceiling": far})
    assert passed and "3.1 times the noise: the decision is run." in why
    passed, why = decision.pilot_verdict({"floor": floor, "ceiling": near})
    assert not passed and "2.9 times the noise: the decision is not run." in why
    unfinished = (False, "The pilot is unfinished.")
    assert decision.pilot_verdict({"floor": floor, "ceiling": group(0.1, 0.1)}) == unfinished
    assert decision.pilot_verdict({"floor": floor}) == unfinished


def test_decision_takes_no_flag_for_what_the_plan_says(tmp_path):
    for flag in ("--steps", "--lr-skills", "--seeds", "--num-pos"):
        error = run("experiments/decision.py", flag, 1, cwd=tmp_path, code=2)
        assert f"{flag}: the study sets this itself" in error


def test_decision_trains_on_some_tasks_and_reports_all_others_in_two_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(decision, "TRAIN_TASKS", 3)
    small = {
        "abstract_tasks": 3,
        "steps": 2,
        "eval_every": 2,
        "train_instances": 4,
        "eval_instances": 80,
    }
    small["max_source_length"] = 1024
    monkeypatch.setattr(decision, "DEFAULTS", decision.DEFAULTS | small)
    flags = ["--results", "kept", "--out", "out", "--device", "cpu", "--jobs", 1]
    flags += ["--data", ROOT / "sni", "--model", ROOT / "tiny"]
    error = run("experiments/decision.py", "--stage", "cells", *flags, cwd=tmp_path, code=2)
    assert "--stage cells: The pilot is unfinished." in error
    assert "give --data and --model" in run(
        "experiments/decision.py", "--stage", "pilot", cwd=tmp_path, code=2
    )
    out = run("experiments/decision.py", "--stage", "pilot", *flags, cwd=tmp_path)
    assert "times the noise" in out

    lists = program.read_json(tmp_path / "kept/tasks.json")
    assert (len(lists["train"]), len(lists["test"]), len(lists["left out"])) == (3, 12, 25)
    cell = program.read_json(tmp_path / "kept/pilot/floor-s2.json")
    assert cell["seen"]["tasks"].keys() == set(lists["train"])
    assert cell["unseen"]["tasks"].keys() == {*lists["test"], *lists["left out"]}
    groups = decision.with_groups(cell, lists)
    losses = [cell["unseen"]["tasks"][name]["loss"] for name in lists["test"]]
    assert groups["test"]["overall"]["loss"] == pytest.approx(np.mean(losses))
    assert groups["left out"]["tasks"].keys() == set(lists["left out"])

    # The decision with many other tasks, whose dev instances are scored too.
    many = {"steps": 2, "eval_every": 2, "train_instances": 4, "eval_instances": 4}
    changes = {"MANY": many, "MANY_TASKS": 4, "MANY_SEEDS": 1}
    changes["MANY_GRID"] = {"orchmoe": ((1.0,), (1e-2,)), "lora": ((4.0,), (1e-3, 1e-2))}
    for name, value in changes.items():
        monkeypatch.setattr(decision, name, value)
    out = run("experiments/decision.py", "--stage", "many", *flags, cwd=tmp_path)
    others = program.read_json(tmp_path / "kept/many_tasks.json")
    assert (len(others["train"]), len(others["left out"])) == (4, 21)
    assert not set(lists["train"]) & {*others["train"], *others["left out"]}
    cell = program.read_json(tmp_path / "kept/many/orchmoe-s0.json")
    seen = decision.with_groups(cell, others)["seen"]["overall"]["loss"]
    both = cell["seen"]["overall"]["loss"], cell["dev"]["overall"]["loss"]
    assert seen == pytest.approx(np.mean(both))
    assert f"| orchmoe | 1 | {seen:.3f} | " in out

    # A pilot of other settings allows nothing.
    monkeypatch.setattr(decision, "pilot_verdict", lambda _: (True, ""))
    monkeypatch.setattr(decision, "DEFAULTS", decision.DEFAULTS | {"steps": 3})
    error = run("experiments/decision.py", "--stage", "cells", *flags, cwd=tmp_path, code=2)
    assert "floor-s0.json: made with steps 2, not 3" in error


def test_choose_tasks_needs_whole_prompts(study):
    settings = train.Settings.from_flags(decision.DEFAULTS | {"max_source_length": 60})
    other = Study(settings, study.device, study.config, {})
    with pytest.raises(ValueError, match="training tasks fit"):
        decision.choose_tasks(other, 28)


def with_sets(group):
    """Return cells in which both groups of unseen tasks are all unseen ones."""
    found = {}
    for seed, cell in group.items():
        found[seed] = cell | {"test": cell["unseen"], "left out": cell["unseen"]}
    return found


def test_after_the_decision_scores_its_rows_and_the_best_of_the_grid(study, monkeypatch):
    small = {"steps": 2, "eval_every": 2, "train_instances": 4, "eval_instances": 28, "num_pos": 0}
    small["batch_size"] = 2
    monkeypatch.setattr(decision, "GRID", {"lora": ((4.0, 2.0), (1e-2,))})
    study.config = replace(study.config, seeds=1, jobs=1)
    decision.make_after(study, small)
    cells = {path.stem: program.read_json(path) for path in study.results.glob("after/*.json")}
    assert cells.keys() == {
        *("frozen_base-s0", "orchmoe-s0", "frozen_router-s0", "lora-s0", "lora_alpha_1-s0"),
        *("lora_best-s0", "orchmoe_alpha_2-s0", "orchmoe_alpha_2-s1"),
        *("orchmoe_alpha_4-s0", "orchmoe_alpha_4-s1"),
    }
    assert cells["orchmoe_alpha_2-s1"]["settings"]["seed"] == 1
    assert cells["frozen_router-s0"]["router"]["distance_from_start"] == 0
    assert cells["orchmoe-s0"]["router"]["distance_from_start"] > 0
    grid = [program.read_json(path) for path in study.results.glob("grid/*.json")]
    best = min(grid, key=lambda cell: cell["dev_loss"])
    for name in ("alpha", "lr_skills"):
        assert cells["lora_best-s0"]["settings"][name] == best["settings"][name]
    groups = routing_map.read_groups(study.results / "after")
    lines = cells_of(decision.alpha_table({"x": with_sets(groups["lora_alpha_1"])}))
    loss = cells["lora_alpha_1-s0"]["seen"]["overall"]["loss"]
    assert [line[:5] for line in lines] == [["x", "1", "0.01", "1", f"{loss:.3f}"]]
    on_dev = [task["loss"] for task in grid[0]["dev"]["tasks"].values()]
    assert len(on_dev) == 28 and "seen" not in grid[0]
    assert grid[0]["dev_loss"] == pytest.approx(np.mean(on_dev))


@pytest.mark.parametrize("name", ["cpu", "computed"])
def test_difference_refuses_two_kinds_of_cpu_or_dtype(groups, name):
    groups["lora"][1]["settings"][name] = "another"
    with pytest.raises(ValueError, match=f"differ in '{name}'"):
        routing_map.difference(groups, "orchmoe", "lora", "seen")
