"""The map of where routing pays: its points, their studies, and its tables."""

import importlib.util

import numpy as np
import pytest

import checkpoint
import data
import program
import runtime
import train
from experiments import map as routing_map
from experiments.sizes import total
from experiments.study import Study, StudyConfig, read_tuning
from experiments.tables import interval
from helpers import run

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


@pytest.mark.parametrize("name", ["cpu", "computed"])
def test_difference_refuses_two_kinds_of_cpu_or_dtype(groups, name):
    groups["lora"][1]["settings"][name] = "another"
    with pytest.raises(ValueError, match=f"differ in '{name}'"):
        routing_map.difference(groups, "orchmoe", "lora", "seen")
