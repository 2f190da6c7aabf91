"""The search that tunes each method: where it goes, and that it spends the same for all."""

import pytest
import torch

import checkpoint
import t5
from baselines import attach_method
from experiments.compare import ADAPTED
from experiments.search import Search, axes_of
from experiments.tables import markdown
from helpers import ROOT
from orchmoe import OrchMoEConfig


def searched(axes, optimum, trials=12, start=1e-2):
    """A search of a bowl whose lowest point is `optimum`, in steps from the start."""
    search = Search(axes, dict.fromkeys(axes, start), trials, cell_of=None)
    while len(search.losses) < trials:
        point = search.next_point()
        search.losses[point] = sum((a - b) ** 2 for a, b in zip(point, optimum, strict=True))
    return search


@pytest.mark.parametrize(
    "optimum", [(0, 0), (1, 2), (-1, 1, 0), (0, 1, -1), (1, 1, 0, 0), (-1, 2, 1, 0)]
)
def test_a_search_finds_the_best_inside_of_what_it_tried_and_spends_all_trials(optimum):
    axes = ["lr_skills", "alpha", "lr_router", "lr_allocation"][: len(optimum)]
    search = searched(axes, optimum)
    assert search.best == optimum and search.edges() == []
    assert len(search.losses) == len(set(search.losses)) == 12
    assert list(search.losses) == list(searched(axes, optimum).losses)


def test_a_best_on_the_edge_is_said():
    search = searched(["lr_skills", "alpha"], (0, 5), trials=6)
    assert search.best == (0, 2) and search.edges() == ["alpha"]
    assert "| lora | 6 | lr_skills 0.01, alpha 0.04 | 9.0000 | alpha |" in markdown(
        [{"row": "lora", "parameters": None, "learnt": {}}], {"lora": search.report()}
    )


def test_neighbours_come_before_diagonals_and_these_before_two_steps():
    points = list(searched(["lr_skills", "alpha"], (0, 0)).losses)
    assert points[0] == (0, 0)
    assert [sum(map(abs, point)) for point in points[1:9]] == [1] * 4 + [2] * 4
    assert all(max(map(abs, point)) == 1 for point in points[1:9])
    assert all(max(map(abs, point)) == 2 for point in points[9:])


def test_values_of_a_point_are_its_steps_from_the_start():
    search = Search(["lr_skills", "alpha"], {"lr_skills": 1e-2, "alpha": 2.0}, 1, cell_of=None)
    assert search.values((1, -1)) == {"lr_skills": 0.0316, "alpha": 1.0}
    assert search.values((-2, 2)) == {"lr_skills": 0.001, "alpha": 8.0}
    with pytest.raises(ValueError, match="--lr-skills 0: tuning starts from a value above 0"):
        Search(["lr_skills"], {"lr_skills": 0}, 1, cell_of=None)


def test_every_method_is_tuned_over_what_it_trains():
    config = checkpoint.read_config(ROOT / "tiny")
    rates = {
        "skills": "lr_skills",
        "router": "lr_router",
        "token_router": "lr_token_router",
        "allocation": "lr_allocation",
    }
    for name in ADAPTED:
        for router in ("sample", "token", "none") if name == "orchmoe" else ("sample",):
            adapter = OrchMoEConfig(router=router)
            with torch.device("meta"):
                base = t5.T5(config)
            groups = attach_method(name, base, adapter, num_tasks=3).parameter_groups()
            trained = {rates[kind] for kind, parameters in groups.items() if parameters}
            assert set(axes_of(name, adapter)) == trained | {"alpha"}, name
