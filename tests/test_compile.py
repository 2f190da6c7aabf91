"""The blocks of an adapted T5, compiled: one graph without breaks for all lengths, and the same numbers."""

import functools

import pytest
import torch
from conftest import SHORT, records, run, stir

import kernels
from model import Backbone
from orchmoe import OrchMoEConfig, attach


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def adapted(small_t5, router):
    generator = torch.Generator().manual_seed(0)
    adapters = attach(small_t5, OrchMoEConfig(router=router), kernels.mix_skills, generator=generator)
    small_t5.double()
    stir(adapters, generator)
    return adapters


def losses_and_gradients(t5, adapters, inputs, sizes):
    found = []
    parameters = [p for group in adapters.parameter_groups().values() for p in group]
    for source, target in sizes:
        ids, mask = inputs.input_ids[:, :source], inputs.attention_mask[:, :source]
        with adapters.routed(t5.embed(ids), mask):
            loss = t5.loss(ids, mask, inputs.labels[:, :target])
            found += [loss.detach(), *torch.autograd.grad(loss, parameters, allow_unused=True)]
    return [t for t in found if t is not None]


WAYS = [("sample", True, "eager"),  # dynamo alone, in a quarter of the time
        pytest.param("token", False, "eager", marks=pytest.mark.slow),
        pytest.param("sample", False, "aot_eager", marks=pytest.mark.slow),
        pytest.param("token", True, "aot_eager", marks=pytest.mark.slow)]  # fmt: skip


@pytest.mark.parametrize("router, checkpointed, backend", WAYS)
def test_compiled_blocks_give_the_same_loss_and_gradients(small_t5, inputs, router, checkpointed, backend):
    adapters = adapted(small_t5, router)
    small_t5.train()
    small_t5.checkpoint_blocks = checkpointed
    sizes = [(9, 6), (7, 5), (8, 3)]
    expected = losses_and_gradients(small_t5, adapters, inputs, sizes)
    small_t5.compile_blocks(backend)
    found = losses_and_gradients(small_t5, adapters, inputs, sizes)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"], counters["graph_break"]
    # encoder and decoder, and the first block of the encoder, whose input needs no gradient
    assert 0 < counters["stats"]["unique_graphs"] <= 5, counters["stats"]


def test_a_training_forward_has_no_graph_breaks(small_t5, inputs):
    adapters = adapted(small_t5, "sample")
    small_t5.train()
    with adapters.routed(small_t5.embed(inputs.input_ids), inputs.attention_mask):
        read = inputs.input_ids, inputs.attention_mask, inputs.labels.clamp(min=0)
        seen = torch._dynamo.explain(small_t5.hidden)(*read)
    assert (seen.graph_count, seen.graph_break_count) == (1, 0)


def test_generation_is_the_same_and_decodes_uncompiled(small_t5, inputs):
    adapters = adapted(small_t5, "sample")

    def generate():
        with adapters.routed(small_t5.embed(inputs.input_ids), inputs.attention_mask):
            return small_t5.generate(inputs.input_ids, inputs.attention_mask, max_new_tokens=12,
                                     on_keep=adapters.keep)

    expected = generate()
    small_t5.compile_blocks("aot_eager")
    assert torch.equal(generate(), expected)
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # of the encoder alone


@pytest.mark.slow  # it compiles for ten seconds
def test_a_run_with_compiled_blocks_is_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setattr(Backbone, "compile_blocks", functools.partialmethod(Backbone.compile_blocks, "eager"))
    found = []
    for flags in ((), ("--compile",)):
        run("train.py", *SHORT, *flags, "--out", f"run{len(found)}", cwd=tmp_path)
        found.append([row["loss"] for row in records(tmp_path / f"run{len(found)}") if "loss" in row])
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
