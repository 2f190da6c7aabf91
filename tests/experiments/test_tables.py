"""The numbers of a comparison: intervals and their coverage, and what the tables say."""

import json
import math

import numpy as np
import pytest
import torch

import eval as evaluation
import runtime
from experiments import routing, tables


def test_t_quantile():
    for freedom, point in {1: 12.706, 2: 4.303, 5: 2.571, 11: 2.201, 30: 2.042}.items():
        assert tables.t_quantile(freedom) == pytest.approx(point, abs=1e-3)


@pytest.mark.parametrize("sd", [(1, 0, 1), (1, 0.3, 1), (1, 1, 1), (0, 1, 1)], ids=str)
def test_interval_coverage(sd, monkeypatch):
    """Effects of 12 tasks, of 3 seeds and of each cell have these sds and mean 0."""
    grid = np.arange(1, 40, 0.25)
    quantiles = [tables.t_quantile(freedom) for freedom in grid]  # 1,000 draws ask for them
    monkeypatch.setattr(tables, "t_quantile", lambda freedom: np.interp(freedom, grid, quantiles))
    rng = np.random.default_rng(0)
    covered = 0
    draws = 1000
    for _ in range(draws):
        parts = rng.normal(size=(12, 1)), rng.normal(size=(1, 3)), rng.normal(size=(12, 3))
        differences = sum(s * part for s, part in zip(sd, parts, strict=True))
        _, low, high = tables.interval(differences)
        covered += low <= 0 <= high
    assert 0.93 <= covered / draws <= 0.98


def test_interval_of_known_differences():
    assert tables.interval(np.full((9, 3), 2.0)) == (2.0, 2.0, 2.0)
    expected = pytest.approx((2.0, math.nan, math.nan), nan_ok=True)
    assert tables.interval(np.full((1, 1), 2.0)) == expected
    values = np.random.default_rng(0).normal(1, 1, size=(400, 1))  # one seed: over tasks alone
    half = tables.t_quantile(399) * values.std(ddof=1) / 20
    expected = pytest.approx((values.mean(), values.mean() - half, values.mean() + half))
    assert tables.interval(values) == expected


def test_interval_by_hand():
    """Mean squares: tasks 10.5, seeds 13.5, rest 3.5, with 2, 1 and 2 degrees of freedom."""
    found = tables.interval(np.array([[1.0, 3.0], [2.0, 8.0], [6.0, 7.0]]))
    freedom = 20.5**2 / (10.5**2 / 2 + 13.5**2 / 1 + 3.5**2 / 2)
    half = tables.t_quantile(freedom) * (20.5 / 6) ** 0.5
    assert found == pytest.approx((4.5, 4.5 - half, 4.5 + half))


def test_interval_with_a_large_rest():
    """Mean squares: tasks 1.5, seeds 0, rest 4.5. The variance is that of the tasks, 1 degree."""
    found = tables.interval(np.array([[3.0, 0.0], [0.0, 3.0], [3.0, 3.0]]))
    assert found == pytest.approx((2, 2 - 12.706 * 0.5, 2 + 12.706 * 0.5), abs=1e-3)


def test_markdown_pairs_tasks_and_seeds():
    def cell(seed, scores):
        by_task = {task: {"rougeL": value} for task, value in scores.items()}
        overall = {"rougeL": sum(scores.values()) / 2}
        return {"seed": seed, "seen": {"overall": overall, "tasks": by_task}}

    rows = {
        "orchmoe": [cell(0, {"a": 10, "b": 90}), cell(1, {"a": 20, "b": 92})],
        "lora": [cell(0, {"b": 80, "a": 5}), cell(1, {"b": 80, "a": 5})],
    }
    text = tables.markdown(rows, {})
    assert f"| orchmoe | - | - | 53.00 ({3 * math.sqrt(2):.2f}) | - |" in text
    difference = tables.interval(np.array([[5.0, 15.0], [10.0, 12.0]]))
    assert f"| lora | {tables.signed(difference, digits=2)} | - |" in text
    assert "of the 1 here about 0 would exclude zero" in text
    assert text.isascii()


def test_markdown_of_a_w_without_entropy():
    """Without the softmax w is no distribution."""
    w = torch.tensor([[-1.0, 2.0]])
    numbers = {
        "entropy": evaluation.mean_entropy(w),
        "distance": 0.1,
        "largest": 2.0,
        "mutual_information": routing.mutual_information(w, ["x"]),
    }
    learnt = json.loads(runtime.to_json(numbers))  # as a cell has it
    cells = [{"learnt": learnt}, {"learnt": learnt}]
    text = tables.markdown({"lora": [{}], "w without softmax": cells}, {})
    assert "| w without softmax | - | - | 2.000 | 0.100 |" in text
    assert text.count("| lora |") == 1  # it has no router


def test_halves_depend_on_the_name_alone():
    names = [f"task{i}" for i in range(400)]
    first = tables.halves(names)
    assert sorted(first["unseen-dev"] + first["unseen-test"]) == sorted(names)
    assert 150 < len(first["unseen-dev"]) < 250
    few = tables.halves(names[100:])
    assert all(set(few[half]) <= set(first[half]) for half in first)
