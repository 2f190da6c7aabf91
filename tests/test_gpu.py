"""The model and a training step on an NVIDIA GPU against the CPU in float64: pytest -m gpu. The step runs on
a CPU too, else nothing would tell that what this file calls has changed."""

import copy

import pytest
import torch
from conftest import stir

from baselines import attach_method
from orchmoe import OrchMoEConfig

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")]
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the largest value
WAYS = [("cpu", torch.float32, "plain"),
        *(pytest.param("cuda", dtype, way, marks=GPU) for dtype in CLOSE
          for way in ("plain", "checkpointed", "compiled"))]  # fmt: skip


def close(found, expected, dtype):
    error = (found.double().cpu() - expected).abs().max() / expected.abs().max()
    assert error < CLOSE[dtype], error


def adapted(base, router="sample"):
    adapters = attach_method("orchmoe", base, OrchMoEConfig(targets=("all",), router=router),
                             generator=torch.Generator().manual_seed(0))  # fmt: skip
    stir(adapters, torch.Generator().manual_seed(1))
    return adapters


def moved(base, device, dtype):
    """A copy of the base with its adapters on the device: the base in `dtype`, the adapters in float32."""
    there = copy.deepcopy(base).to(device)
    for parameter in there.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
    for buffer in there.buffers():
        buffer.data = buffer.data.float()
    return there, there.skill_adapters


def step(base, adapters, inputs):
    """Loss and gradients of one batch."""
    there = [tensor.to(base.device) for tensor in inputs]
    with adapters.routed(base.embed(there[0]), there[1]):
        loss = base.loss(*there)
        loss.backward()
    groups = adapters.parameter_groups().values()
    gradients = torch.cat([p.grad.flatten().double().cpu() for group in groups for p in group])
    base.zero_grad(set_to_none=True)
    return loss.detach(), gradients


@pytest.mark.parametrize("device, dtype, way", WAYS)
@pytest.mark.parametrize("router", ["sample", "token"])
def test_a_training_step_is_that_of_the_cpu(small_t5, inputs, device, dtype, router, way):
    adapters = adapted(small_t5, router)
    for parameter in adapters.parameters():
        parameter.data = parameter.data.double()
    small_t5.double().train()
    expected = step(small_t5, adapters, inputs)
    base, adapters = moved(small_t5, device, dtype)
    base.checkpoint_blocks = way == "checkpointed"
    if way == "compiled":
        torch._dynamo.reset()
        base.compile_blocks()  # fullgraph: a graph break would raise
    for found, wanted in zip(step(base, adapters, inputs), expected, strict=True):
        close(found, wanted, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
def test_generation_is_that_of_the_cpu(small_t5, inputs):
    adapters = adapted(small_t5)
    ids, mask, _ = inputs
    with adapters.routed(small_t5.embed(ids), mask):
        expected = small_t5.generate(ids, mask, max_new_tokens=20, on_keep=adapters.keep)
    base, adapters = moved(small_t5, "cuda", torch.float32)
    ids, mask = ids.cuda(), mask.cuda()
    with adapters.routed(base.embed(ids), mask):
        found = base.generate(ids, mask, max_new_tokens=20, on_keep=adapters.keep)
    assert torch.equal(found.cpu(), expected)
