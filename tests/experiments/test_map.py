"""The map of where routing pays: its tables."""

import numpy as np
import pytest

import program
from experiments import map as routing_map
from experiments.tables import interval


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


@pytest.fixture
def found(groups, monkeypatch):
    """A map with two seeds: the same cells at all points."""
    monkeypatch.setattr(routing_map, "SEEDS", 2)
    del groups["orchmoe"][2]
    rows = dict.fromkeys(routing_map.ROWS, groups["lora"]) | groups
    return dict.fromkeys(routing_map.points(), rows)


def test_map_table_has_the_noise_and_the_distance_beside_each_difference(found):
    for cells in cells_of(routing_map.map_table(found))[:-1]:
        assert cells[1] == "2"
        stage = routing_map.stage_table("", found["centre"], "lora")
        assert cells[2] == dict(zip(routing_map.ROWS, cells_of(stage), strict=True))["orchmoe"][4]
        assert cells[-3:] == ["0.141", "0.177", "0.25"]  # sds of the losses, and the distance


def test_mean_over_points_is_over_points_of_the_same_tasks(found):
    swapped = {name: {0: group[1], 1: group[0]} for name, group in found["centre"].items()}
    found |= {"steps-300": swapped, "training-tasks-7": None}
    for point in ("steps-1800", "total-rank-2", "total-rank-8", "total-rank-16", "total-rank-32"):
        del found[point]
    mean, count = routing_map.mean_over_points(found)
    assert count == 2
    assert all(group.keys() == {0, 1} for group in mean.values())
    assert mean["lora"][0]["seen"]["tasks"]["t1"]["loss"] == pytest.approx((2.0 + 2.2) / 2)
    assert mean["orchmoe"][1]["unseen"]["overall"]["loss"] == pytest.approx(1.475)
    swapped["floor"][1]["seen"]["tasks"]["other"] = {"loss": 1.0}
    with pytest.raises(ValueError, match="the points have different seen tasks"):
        routing_map.mean_over_points(found)


def test_the_last_line_of_the_map_is_the_mean_over_points(found):
    label, seeds, seen, *_ = cells_of(routing_map.map_table(found))[-1]
    assert (label, seeds) == ("mean over 7 points", "2")
    assert seen.startswith("-0.125 [")


def test_a_map_that_lacks_cells_is_refused(found, tmp_path):
    for point, groups in found.items():
        for row, cells in groups.items():
            for seed, cell in cells.items():
                program.write_json(tmp_path / f"{point}/cells/{row}-s{seed}.json", cell)
    assert routing_map.read_map(tmp_path).keys() == found.keys()
    (tmp_path / "steps-300/cells/floor-s1.json").unlink()
    with pytest.raises(program.UserError, match="steps-300/cells: cells are missing; name a"):
        routing_map.read_map(tmp_path)


def test_difference_refuses_other_tasks(groups):
    groups["lora"][1]["seen"]["tasks"] = {"t0": {"loss": 1.0}, "other": {"loss": 1.0}}
    with pytest.raises(ValueError, match="different seen tasks"):
        routing_map.difference(groups, "orchmoe", "lora", "seen")


@pytest.mark.parametrize("name", ["cpu", "computed"])
def test_difference_refuses_two_kinds_of_cpu_or_dtype(groups, name):
    groups["lora"][1]["settings"][name] = "another"
    with pytest.raises(ValueError, match=f"differ in '{name}'"):
        routing_map.difference(groups, "orchmoe", "lora", "seen")
