"""What the router of a run has learnt: numbers of known tables, and of a finished run."""

import json
import math
import os

import numpy as np
import pytest
import torch
from torch import nn

import data
import eval as evaluation
from baselines import NoAdapter, attach_method
from experiments import routing
from helpers import run
from orchmoe import OrchMoEConfig


def test_mutual_information_of_known_tables():
    labels = ["x", "x", "y", "y"]

    def information(w):
        return routing.mutual_information(w, labels)

    assert information(torch.eye(2)[[0, 0, 1, 1]]) == pytest.approx(math.log(2))
    assert information(torch.eye(4)) == pytest.approx(math.log(2))
    assert information(torch.eye(2)[[0, 1, 0, 1]]) == pytest.approx(0)
    assert information(torch.full((4, 8), 1 / 8)) == pytest.approx(0)
    # ln 2 less the entropy of (3/4, 1/4)
    soft = torch.tensor([[0.75, 0.25]] * 2 + [[0.25, 0.75]] * 2)
    expected = math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    assert information(soft) == pytest.approx(expected)


def test_plot_measures_the_routing_of_a_run_once(copied):
    """It is measured again when the run has trained on."""
    pytest.importorskip("matplotlib")

    def written():
        out = run("experiments/plot.py", "--run", "run", cwd=copied.parent)
        return [line.split("/")[-1] for line in out.splitlines()]

    figures = ["loss.png", "categories-seen.png", "categories-unseen.png"]
    figures += ["router.png", "allocation.png"]
    assert written() == ["routing.json", *figures]
    path = copied / "routing.json"
    learnt = json.loads(path.read_text())
    assert learnt["category"].keys() == learnt["w"].keys()
    assert len(learnt["w"]) == 4
    assert len(learnt["skill_use"]) == 20
    assert 0 < learnt["entropy"] < math.log(8)
    assert learnt["distance"] > 0
    assert written() == figures
    later = path.stat().st_mtime + 1
    os.utime(copied / "adapter.safetensors", (later, later))
    assert "routing.json" in written()


def sampled(lengths):
    """Return examples of three tasks in two categories, with sources of these lengths."""
    examples = []
    for i, length in enumerate(lengths):
        source = np.arange(3 + i, 3 + i + length)
        target = np.array([5, 1])
        task, category = (("a1", "A"), ("a2", "A"), ("b1", "B"))[i % 3]
        examples.append(data.Example(str(i), task, category, source, [target], []))
    return examples


def test_report_is_of_the_w_and_c_of_all_examples(small_t5):
    generator = torch.Generator().manual_seed(0)
    config = OrchMoEConfig(tasks=3, skills=2)
    adapters = attach_method("orchmoe", small_t5, config, generator=generator)
    nn.init.normal_(adapters.router.W_task, generator=torch.Generator().manual_seed(1))
    examples = sampled([3, 9, 5, 7, 4, 6])
    learnt = routing.report(small_t5, adapters, examples, batch_size=4)
    _, w = evaluation.measure(small_t5, adapters, examples)
    with torch.no_grad():
        c = adapters.route(w=w).c  # (N,M,S)
    distance = (c - 1 / 2).abs().mean().item()
    assert learnt["distance"] == pytest.approx(distance, rel=1e-4)
    use = list(learnt["skill_use"].values())
    assert use[3] == pytest.approx(c[3].mean(0).tolist(), rel=1e-4)
    assert learnt["w"]["a2"] == pytest.approx(w[[1, 4]].mean(0).tolist(), rel=1e-4)
    categories = [example.category for example in examples]
    information = routing.mutual_information(w, categories)
    assert learnt["mutual_information"] == pytest.approx(information, rel=1e-4)


@pytest.mark.parametrize(
    "router, names", [("none", {"allocation", "distance", "skill_use"}), ("token", set())]
)
def test_report_without_a_router_of_samples(small_t5, router, names):
    adapters = attach_method("orchmoe", small_t5, OrchMoEConfig(router=router))
    assert routing.report(small_t5, adapters, sampled([3, 5])).keys() == names


@pytest.mark.parametrize("method", ["lora", "moe-lora", "poly", "mhr", "c-poly"])
def test_report_is_empty_for_other_methods(small_t5, method):
    adapters = attach_method(method, small_t5, OrchMoEConfig(), num_tasks=3)
    assert routing.report(small_t5, adapters, sampled([3, 5])) == {}


def test_report_is_empty_without_adapters(small_t5):
    assert routing.report(small_t5, NoAdapter(small_t5, full=False), sampled([3, 5])) == {}


def test_measure_takes_a_given_w_in_order(small_t5):
    adapters = attach_method("orchmoe", small_t5, OrchMoEConfig())
    w = torch.eye(8)[:4]
    examples = sampled([3, 9, 5, 7])
    _, found = evaluation.measure(small_t5, adapters, examples, batch_size=2, w=w)
    assert torch.equal(found, w)
