"""What the router of a run has learnt: numbers of known tables, and of a run by experiments.plot."""

import json
import math
import os

import numpy as np
import pytest
import torch
from torch import nn

import data
import eval as evaluation
from baselines import attach_method
from experiments import routing
from helpers import run
from orchmoe import OrchMoEConfig


def test_mutual_information_of_known_tables():
    labels = ["x", "x", "y", "y"]
    assert routing.mutual_information(torch.eye(2)[[0, 0, 1, 1]], labels) == pytest.approx(
        math.log(2)
    )
    assert routing.mutual_information(torch.eye(4), labels) == pytest.approx(math.log(2))
    assert routing.mutual_information(torch.eye(2)[[0, 1, 0, 1]], labels) == pytest.approx(0)
    assert routing.mutual_information(torch.full((4, 8), 1 / 8), labels) == pytest.approx(0)
    soft = torch.tensor(
        [[0.75, 0.25]] * 2 + [[0.25, 0.75]] * 2
    )  # ln 2 less the entropy of (3/4, 1/4)
    expected = math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    assert routing.mutual_information(soft, labels) == pytest.approx(expected)


def test_a_runs_routing_is_computed_for_its_figures_and_again_when_it_trains_on(copied):
    pytest.importorskip("matplotlib")
    written = copied / "routing.json"
    out = run("experiments/plot.py", "--run", "run", cwd=copied.parent)
    assert [line.split("/")[-1] for line in out.splitlines()] == [
        "routing.json",
        "loss.png",
        "categories-seen.png",
        "categories-unseen.png",
        "router.png",
        "allocation.png",
    ]
    learnt = json.loads(written.read_text())
    assert learnt["category"].keys() == learnt["w"].keys() and len(learnt["w"]) == 4
    assert (
        len(learnt["skill_use"]) == 20
        and 0 < learnt["entropy"] < math.log(8)
        and learnt["distance"] > 0
    )
    assert "routing.json" not in run("experiments/plot.py", "--run", "run", cwd=copied.parent)
    later = written.stat().st_mtime + 1
    os.utime(copied / "adapter.safetensors", (later, later))
    assert "routing.json" in run("experiments/plot.py", "--run", "run", cwd=copied.parent)


def sampled(lengths):
    return [
        data.Example(
            str(i),
            ("a1", "a2", "b1")[i % 3],
            "AAB"[i % 3],
            np.arange(3 + i, 3 + i + n),
            [np.array([5, 1])],
            [],
        )
        for i, n in enumerate(lengths)
    ]


def test_a_report_is_of_the_w_and_c_of_all_examples(small_t5):
    adapters = attach_method(
        "orchmoe",
        small_t5,
        OrchMoEConfig(tasks=3, skills=2),
        generator=torch.Generator().manual_seed(0),
    )
    nn.init.normal_(adapters.router.W_task, generator=torch.Generator().manual_seed(1))
    examples = sampled([3, 9, 5, 7, 4, 6])
    learnt = routing.report(small_t5, adapters, examples, batch_size=4)
    _, w = evaluation.measure(small_t5, adapters, examples)
    with torch.no_grad():
        c = adapters.route(w=w).c  # (N,B,S)
    assert learnt["distance"] == pytest.approx((c - 1 / 2).abs().mean().item(), rel=1e-4)
    assert list(learnt["skill_use"].values())[3] == pytest.approx(c[3].mean(0).tolist(), rel=1e-4)
    assert learnt["w"]["a2"] == pytest.approx(w[[1, 4]].mean(0).tolist(), rel=1e-4)
    of_category = routing.mutual_information(w, [example.category for example in examples])
    assert learnt["mutual_information"] == pytest.approx(of_category, rel=1e-4)


def test_a_w_that_is_given_is_that_of_its_example(small_t5):
    adapters, examples = attach_method("orchmoe", small_t5, OrchMoEConfig()), sampled([3, 9, 5, 7])
    w = torch.eye(8)[:4]
    _, found = evaluation.measure(small_t5, adapters, examples, batch_size=2, w=w)
    assert torch.equal(found, w)
