"""The numbers of a comparison: intervals and their coverage, and what the tables say."""

import functools
import math

import numpy as np
import pytest

from experiments import tables
from helpers import ROOT
from support import program


def test_t_quantile():
    points = {
        1: 12.7062047,
        2: 4.3026527,
        5: 2.5705818,
        11: 2.2009852,
        30: 2.0422725,
        1000: 1.9623391,
    }
    for freedom, point in points.items():
        assert tables.t_quantile(freedom) == pytest.approx(point, rel=2e-6)


@pytest.mark.parametrize("sd", [(1, 0, 1), (1, 1, 1), (0, 1, 1)], ids=str)
def test_interval_coverage(sd, monkeypatch):
    """Effects of 12 tasks, of 3 seeds and of each cell have these sds and mean 0."""
    quantile = functools.cache(tables.t_quantile)  # 1,000 draws ask for it
    monkeypatch.setattr(tables, "t_quantile", lambda freedom: quantile(round(freedom, 1)))
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(1000):
        parts = rng.normal(size=(12, 1)), rng.normal(size=(1, 3)), rng.normal(size=(12, 3))
        differences = sum(s * part for s, part in zip(sd, parts, strict=True))
        _, low, high = tables.interval(differences)
        covered.append(low <= 0 <= high)
    assert 0.93 <= np.mean(covered) <= 0.98


@pytest.mark.parametrize(
    "values, half",
    [
        (np.full((1, 1), 2.0), math.nan),
        # One seed: over tasks alone. Their variance is 7.
        (np.array([[1.0], [2.0], [6.0]]), tables.t_quantile(2) * (7 / 3) ** 0.5),
        # Mean squares: tasks 10.5, seeds 13.5, rest 3.5, with 2, 1 and 2 degrees of freedom.
        (
            np.array([[1.0, 3.0], [2.0, 8.0], [6.0, 7.0]]),
            tables.t_quantile(20.5**2 / (10.5**2 / 2 + 13.5**2 + 3.5**2 / 2)) * (20.5 / 6) ** 0.5,
        ),
        # Tasks 1.5, seeds 0, rest 4.5. The variance is that of the tasks, 1 degree.
        (np.array([[3.0, 0.0], [0.0, 3.0], [3.0, 3.0]]), tables.t_quantile(1) * 0.5),
    ],
    ids=["one number", "one seed", "by hand", "large rest"],
)
def test_interval_of_known_differences(values, half):
    mean = values.mean()
    expected = pytest.approx((mean, mean - half, mean + half), nan_ok=True)
    assert tables.interval(values) == expected


@pytest.mark.parametrize(
    "folder, published",
    [
        ("map/centre/cells", "-0.050 [-0.104, +0.003]"),
        ("map/total-rank-16/cells", "-0.059 [-0.095, -0.023]"),
        ("decision/cells", "-0.022 [-0.046, +0.002]"),
    ],
)
def test_interval_gives_the_published_differences(folder, published):
    losses = {}
    for row in ("orchmoe", "lora"):
        paths = [ROOT / f"experiments/results/{folder}/{row}-s{seed}.json" for seed in range(5)]
        losses[row] = tables.by_seed(map(program.read_json, paths), "seen")
    difference = tables.interval(losses["orchmoe"] - losses["lora"])
    assert tables.signed(difference) == published


def test_markdown_pairs_tasks_and_seeds():
    def cell(scores):
        tasks = {task: {"rougeL": value} for task, value in scores.items()}
        return {"seen": {"overall": {"rougeL": sum(scores.values()) / 2}, "tasks": tasks}}

    rows = {
        "orchmoe": [cell({"a": 10, "b": 90}), cell({"a": 20, "b": 92})],
        "lora": [cell({"b": 80, "a": 5})] * 2,
    }
    text = tables.markdown(rows, {})
    assert f"| orchmoe | - | - | 53.00 ({3 * math.sqrt(2):.2f}) | - |" in text
    difference = tables.interval(np.array([[5.0, 15.0], [10.0, 12.0]]))
    assert f"| lora | {tables.signed(difference, digits=2)} | - |" in text
    assert "of the 1 here about 0 would exclude zero" in text


def test_markdown_of_a_w_without_entropy():
    """Without the softmax w is no distribution, and a cell has no number for what it lacks."""
    learnt = {
        "entropy": None,
        "mutual_information": None,
        "distance_from_equal": 0.1,
        "largest": 2.0,
    }
    text = tables.markdown({"lora": [{}], "w without softmax": [{"learnt": learnt}]}, {})
    assert "| w without softmax | - | - | 2.000 | 0.100 |" in text
    assert text.count("| lora |") == 1  # it has no router
