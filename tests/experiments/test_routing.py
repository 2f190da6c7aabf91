"""What the router of a run has learnt: numbers of known tables and of a small model."""

import functools
import math

import numpy as np
import pytest
import torch
from torch import nn

import data
import eval as evaluation
from baselines import attach_method, without_adapters
from experiments.compare import routing
from orchmoe import OrchMoEConfig


@pytest.mark.parametrize(
    "w, expected",
    [
        (torch.eye(4), math.log(2)),
        (torch.eye(2)[[0, 1, 0, 1]], 0),
        # ln 2 less the entropy of (3/4, 1/4)
        (
            torch.tensor([[0.75, 0.25]] * 2 + [[0.25, 0.75]] * 2),
            math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25),
        ),
        (torch.tensor([[-1.0, 2.0]] * 4), math.nan),
    ],
    ids=["determined", "independent", "soft", "no distribution"],
)
def test_mutual_information_of_known_tables(w, expected):
    found = routing.mutual_information(w, ["x", "x", "y", "y"])
    assert found == pytest.approx(expected, abs=1e-9, nan_ok=True)


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
    adapters = attach_method("orchmoe", small_t5, OrchMoEConfig(abstract_tasks=3, skills=2))
    nn.init.normal_(adapters.router.W_task, generator=torch.Generator().manual_seed(1))
    examples = sampled([3, 9, 5, 7, 4, 6])
    learnt = routing.report(small_t5, adapters, examples, batch_size=4)
    w = evaluation.router_weights(small_t5, adapters, examples)
    with torch.no_grad():
        c = adapters.route(w=w).c  # (N,M,S)
    close = functools.partial(pytest.approx, rel=1e-4)
    assert learnt["distance_from_equal"] == close((c - 1 / 2).abs().mean().item())
    information = routing.mutual_information(w, [example.category for example in examples])
    assert learnt["mutual_information"] == close(information)


@pytest.mark.parametrize(
    "method, router",
    [("orchmoe", "token"), ("moe-lora", "sample"), ("c-poly", "sample")],
)
def test_report_of_what_has_no_router_of_samples(small_t5, method, router):
    adapters = attach_method(method, small_t5, OrchMoEConfig(router=router), num_tasks=3)
    assert routing.report(small_t5, adapters, sampled([3, 5])) == {}
    adapters.detach()
    assert routing.report(small_t5, without_adapters(small_t5), sampled([3])) == {}


def test_measure_takes_a_given_w_in_order(small_t5):
    adapters = attach_method("orchmoe", small_t5, OrchMoEConfig())
    for linear in adapters.linears.values():
        nn.init.normal_(linear.skill_B, generator=torch.Generator().manual_seed(1))
    w = torch.eye(8)[:4]
    examples = sampled([3, 9, 5, 7])
    together = evaluation.measure(small_t5, adapters, examples, batch_size=2, w=w)
    for row, example in enumerate(examples):
        [alone] = evaluation.measure(small_t5, adapters, [example], w=w[row : row + 1])
        assert together[row].nats == pytest.approx(alone.nats, rel=1e-5)
