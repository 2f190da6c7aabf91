"""The search that tunes each method: where it goes, and that it spends the same for all."""

from types import SimpleNamespace

import pytest

from experiments.compare.search import Search
from experiments.compare.tables import tuning_table
from helpers import refusal

AXES = ["lr_skills", "alpha", "lr_router", "lr_allocation"]


def searched(optimum, trials=12):
    """Return a finished search of a bowl with its lowest point `optimum` steps from the start."""

    def cell_of(values):
        point = search.next_point()  # it has these values
        loss = sum((a - b) ** 2 for a, b in zip(point, optimum, strict=True))
        return SimpleNamespace(result=lambda: {"dev_loss": loss})

    search = Search(dict.fromkeys(AXES[: len(optimum)], 1e-2), trials, cell_of)
    assert len(list(search)) == trials
    return search


@pytest.mark.parametrize("optimum", [(0, 0), (1, 2), (0, 1, -1), (-1, 2, 1, 0)])
def test_search_finds_the_best_and_spends_all_trials(optimum):
    search = searched(optimum)
    assert search.best() == optimum
    assert search.edges() == []


def test_search_edges_names_an_axis_without_a_neighbour():
    search = searched((0, 5), trials=6)
    assert search.best() == (0, 2)
    text = tuning_table({"lora": search.report()})
    assert "| lora | 6 | lr_skills 0.01, alpha 0.04 | 9.0000 | alpha |" in text


def test_steps_are_sqrt_10_in_rates_and_2_in_alpha():
    search = Search({"lr_skills": 1e-2, "alpha": 2.0}, trials=1, cell_of=None)
    assert search.values((1, -1)) == {"lr_skills": 0.0316, "alpha": 1.0}
    assert search.values((-2, 2)) == {"lr_skills": 0.001, "alpha": 8.0}
    with refusal("--lr-skills 0: tuning starts from a value above 0"):
        Search({"lr_skills": 0}, trials=1, cell_of=None)
