"""Compiled blocks of an adapted T5: few graphs without breaks for all lengths, the same numbers."""

import functools

import pytest
import torch

import kernels
from helpers import SHORT, run, seeded_generator, stir, trace
from model import Backbone
from orchmoe import OrchMoEConfig, attach


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def adapted(small_t5, router="sample"):
    config = OrchMoEConfig(router=router)
    adapters = attach(small_t5, config, kernels.mix_skills, generator=seeded_generator())
    small_t5.double()
    stir(adapters, seeded_generator(1))
    return adapters


def losses_and_gradients(t5, adapters, inputs):
    """Return the loss and all gradients for several source lengths and target lengths."""
    found = []
    parameters = sum(adapters.parameter_groups().values(), [])
    for source, target in ((9, 6), (7, 5), (8, 3)):
        ids, mask = inputs.input_ids[:, :source], inputs.attention_mask[:, :source]
        with adapters.routed(t5.embed(ids), mask):
            loss = t5.loss(ids, mask, inputs.labels[:, :target])
            found += [loss, *torch.autograd.grad(loss, parameters, allow_unused=True)]
    return found


CASES = [
    ("sample", True, "eager"),  # dynamo alone, in a quarter of the time
    pytest.param("token", False, "eager", marks=pytest.mark.slow),
    pytest.param("sample", False, "aot_eager", marks=pytest.mark.slow),
    pytest.param("token", True, "aot_eager", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("router, checkpointed, backend", CASES)
def test_compiled_blocks_give_the_same_loss_and_gradients(
    small_t5, inputs, router, checkpointed, backend
):
    adapters = adapted(small_t5, router)
    small_t5.train()
    expected = losses_and_gradients(small_t5, adapters, inputs)
    small_t5.checkpoint_blocks = checkpointed
    small_t5.compile_blocks(backend)
    found = losses_and_gradients(small_t5, adapters, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"], counters["graph_break"]
    # Encoder and decoder, and the first block of the encoder, whose input needs no gradient.
    assert 0 < counters["stats"]["unique_graphs"] <= 5, counters["stats"]


def test_generation_is_the_same_and_decodes_uncompiled(small_t5, inputs):
    adapters = adapted(small_t5)
    ids, mask, _ = inputs

    def generate():
        with adapters.routed(small_t5.embed(ids), mask):
            return small_t5.generate(ids, mask, max_new_tokens=12, on_keep=adapters.keep)

    expected = generate()
    small_t5.compile_blocks("eager")
    assert torch.equal(generate(), expected)
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # only of the encoder


@pytest.mark.slow  # it compiles for ten seconds
def test_a_run_with_compiled_blocks_is_the_same_run(tmp_path, monkeypatch):
    eager = functools.partialmethod(Backbone.compile_blocks, "eager")
    monkeypatch.setattr(Backbone, "compile_blocks", eager)

    def losses(name, *flags):
        run("train.py", *SHORT, *flags, "--out", name, cwd=tmp_path)
        return [row[1] for row in trace(tmp_path / name)]

    assert losses("compiled", "--compile") == pytest.approx(losses("plain"), rel=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
