"""The numbers of a comparison: intervals and their coverage, and what the tables say."""

import json
import math

import numpy as np
import pytest
import torch

import eval as evaluation
import runtime
from experiments import routing, tables


def test_quantiles_of_students_t():
    for freedom, point in {1: 12.706, 2: 4.303, 5: 2.571, 11: 2.201, 30: 2.042}.items():
        assert tables.t_quantile(freedom) == pytest.approx(point, abs=1e-3)


@pytest.mark.parametrize("sd", [(1, 0, 1), (1, 0.3, 1), (1, 1, 1), (0, 1, 1)], ids=str)
def test_intervals_cover_two_way_data(sd, monkeypatch):
    """Effects of 12 tasks, of 3 seeds and of each cell, with these standard deviations and mean 0."""
    grid = np.arange(1, 40, 0.25)
    table = [tables.t_quantile(freedom) for freedom in grid]  # once, since 1,000 draws ask for it
    monkeypatch.setattr(tables, "t_quantile", lambda freedom: np.interp(freedom, grid, table))
    rng, covered, draws = np.random.default_rng(0), 0, 1000
    for _ in range(draws):
        parts = rng.normal(size=(12, 1)), rng.normal(size=(1, 3)), rng.normal(size=(12, 3))
        _, low, high = tables.interval(sum(s * part for s, part in zip(sd, parts, strict=True)))
        covered += low <= 0 <= high
    assert 0.93 <= covered / draws <= 0.98


def test_intervals_of_known_differences():
    assert tables.interval(np.full((9, 3), 2.0)) == (2.0, 2.0, 2.0)
    assert tables.interval(np.full((1, 1), 2.0)) == pytest.approx(
        (2.0, math.nan, math.nan), nan_ok=True
    )
    values = np.random.default_rng(0).normal(1, 1, size=(400, 1))  # one seed: over tasks alone
    mean, low, high = tables.interval(values)
    half = tables.t_quantile(399) * values.std(ddof=1) / 20
    assert (mean, low, high) == pytest.approx((values.mean(), mean - half, mean + half))


def test_an_interval_by_hand():
    """Mean squares 10.5 of tasks, 13.5 of seeds, 3.5 of the rest, with 2, 1 and 2 degrees of freedom."""
    mean, low, high = tables.interval(np.array([[1.0, 3.0], [2.0, 8.0], [6.0, 7.0]]))
    freedom = 20.5**2 / (10.5**2 / 2 + 13.5**2 / 1 + 3.5**2 / 2)
    half = tables.t_quantile(freedom) * (20.5 / 6) ** 0.5
    assert (mean, low, high) == pytest.approx((4.5, 4.5 - half, 4.5 + half))


def test_an_interval_whose_rest_is_the_larger():
    """Mean squares 1.5 of tasks, 0 of seeds, 4.5 of the rest: the variance is the tasks', of 1 degree."""
    found = tables.interval(np.array([[3.0, 0.0], [0.0, 3.0], [3.0, 3.0]]))
    assert found == pytest.approx((2, 2 - 12.706 * 0.5, 2 + 12.706 * 0.5), abs=1e-3)


def test_summary_pairs_tasks_and_seeds():
    def cell(seed, scores):
        tasks = {task: {"rougeL": value} for task, value in scores.items()}
        return {
            "seed": seed,
            "seen": {"overall": {"rougeL": sum(scores.values()) / 2}, "tasks": tasks},
        }

    rows = {
        "orchmoe": [cell(0, {"a": 10, "b": 90}), cell(1, {"a": 20, "b": 92})],
        "lora": [cell(0, {"b": 80, "a": 5}), cell(1, {"b": 80, "a": 5})],
    }
    own, lora = tables.summarise(rows)
    assert own["seen rougeL"] == {"mean": 53, "sd": pytest.approx(3 * math.sqrt(2))}
    assert lora["seen rougeL"]["difference"] == tables.interval(
        np.array([[5.0, 15.0], [10.0, 12.0]])
    )
    text = tables.markdown([own, lora], {})
    assert "of the 1 here about 0 would exclude zero" in text and text.isascii()


def test_w_that_is_no_distribution_has_no_entropy_in_the_summary():
    w = torch.tensor([[-1.0, 2.0]])
    numbers = {
        "entropy": evaluation.mean_entropy(w),
        "distance": 0.1,
        "largest": 2.0,
        "mutual_information": routing.mutual_information(w, ["x"]),
    }
    learnt = json.loads(runtime.to_json(numbers))  # as a cell keeps it
    (entry,) = tables.summarise({"w without softmax": [{"learnt": learnt}, {"learnt": learnt}]})
    assert entry["learnt"] == {"largest": 2.0, "distance": pytest.approx(0.1)}
    assert "| w without softmax | - | - | 2.000 | 0.100 |" in tables.markdown([entry], {})
