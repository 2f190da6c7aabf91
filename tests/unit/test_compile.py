"""Compiled blocks: the same numbers, and few graphs without breaks for any sequence of batches."""

import copy
import functools

import pytest
import torch
from torch._dynamo.utils import counters

import kernels
import run_folder
import train
from baselines import load_method
from helpers import (
    ROOT,
    SHORT,
    adapted,
    random_batch,
    run,
    small_model,
    trace,
)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def base_in_training(family="v1.1", method="orchmoe", **options):
    """Return a base with adapters."""
    base = small_model(family)
    adapted(base, method, **options)
    return base.double().train()


# Rows, the longest source and the longest target. Sizes of 1, equal sizes, a short last batch.
BATCHES = [(4, 9, 6), (1, 5, 3), (8, 8, 8), (3, 1, 2), (3, 4, 1), (1, 1, 1), (1, 7, 9), (2, 2, 2)]


def losses_and_gradients(base, batches):
    """Return the losses and gradients of several batches, with evaluations between them."""
    adapters = base.skill_adapters
    parameters = sum(adapters.parameter_groups().values(), [])
    found = []
    for rows, source, target in batches:
        ids, mask, labels = random_batch(10, 37, [source] * rows, [target] * rows)
        with adapters.routed(base.embed(ids), mask):
            loss = base.loss(ids, mask, labels)
            found += [loss, *torch.autograd.grad(loss, parameters, allow_unused=True)]

        base.eval()
        with torch.no_grad(), adapters.routed(base.embed(ids), mask):
            found.append(base.loss(ids, mask, labels))
            found.append(base.generate(ids, mask, max_new_tokens=2, on_keep=adapters.keep))
        base.train()
    return found


def check(base, backend, batches=BATCHES, checkpointed=False):
    """Require the numbers of the uncompiled base. Return the number of graphs."""
    expected = losses_and_gradients(copy.deepcopy(base), batches)
    base.checkpoint_blocks = checkpointed
    kernels.compile_blocks(base.blocks, backend)
    torch.testing.assert_close(losses_and_gradients(base, batches), expected, rtol=1e-6, atol=1e-8)
    return counters["stats"]["unique_graphs"]


HYDRA_LORA = load_method(f"{ROOT / 'examples/hydra_lora.py'}:HydraLoRA")
CASES = [  # family, method, checkpointed, backend
    ("v1.1", "orchmoe", True, "eager"),  # dynamo alone, in a quarter of the time
    ("qwen3", "orchmoe-token", True, "eager"),
    ("v1.1", HYDRA_LORA, True, "eager"),
    ("v1.1", "orchmoe-factors", False, "eager"),
    pytest.param("v1.1", "orchmoe", False, "inductor", marks=pytest.mark.slow),
    pytest.param("v1.1", "lora", False, "inductor", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("family, method, checkpointed, backend", CASES)
def test_few_graphs_serve_all_batches(family, method, checkpointed, backend):
    """alpha / R is not 1: Inductor of torch 2.13 drops the alpha of some sums."""
    base = base_in_training(family, method, targets=("q",), alpha=3.0)
    graphs = check(base, backend, checkpointed=checkpointed)
    kinds = 2 if family == "v1.1" else 1  # encoder and decoder
    assert 0 < graphs <= 2 * kinds  # for one row and for more


def test_the_scale_is_a_constant_of_the_graph():
    """As an input it would be a number on the CPU, with a kernel of its own in each step."""
    shapes = []

    def backend(graph, inputs):
        shapes.extend(tensor.shape for tensor in inputs if isinstance(tensor, torch.Tensor))
        return graph

    check(base_in_training(alpha=3.0), backend, BATCHES[:1])
    assert len(shapes) > 0 and () not in shapes


# -------------------------------------------------------------------------- --compile of train.py


def test_the_choice_is_saved_and_only_a_flag_changes_it(copied):
    assert run_folder.read_run(copied).settings.compile == "off"
    launch = train.LaunchConfig(out=str(copied), resume=True)
    assert train.read_settings({}, launch).compile == "off"
    assert train.read_settings({"compile": "on"}, launch).compile == "on"


@pytest.mark.slow
def test_a_run_with_compiled_blocks_is_the_same_run(tmp_path, monkeypatch):
    eager = functools.partial(kernels.compile_blocks, backend="eager")
    monkeypatch.setattr(kernels, "compile_blocks", eager)

    def losses(name, flags=""):
        run(f"train.py {SHORT} --steps 4 {flags} --out {name}")
        return [row[1] for row in trace(tmp_path / name)]

    assert losses("compiled", "--compile on") == pytest.approx(losses("plain"), rel=1e-6)
    assert counters["stats"]["unique_graphs"] > 0
