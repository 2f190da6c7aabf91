"""Compare a training step on an NVIDIA GPU with the CPU in float64: pytest -m gpu.

The training step also runs on a CPU, so that a renamed function is noticed without a GPU.
"""

import copy

import pytest
import torch

from helpers import adapted

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")]
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative to the largest value
CASES = [("cpu", torch.float32, "plain")]
IS_OLD = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)
NO_BFLOAT16 = pytest.mark.skipif(IS_OLD, reason="this GPU cannot compile bfloat16")
for dtype in CLOSE:
    for mode in ("plain", "checkpointed", "compiled"):
        marks = GPU
        if (dtype, mode) == (torch.bfloat16, "compiled"):
            marks = [*GPU, NO_BFLOAT16]
        CASES.append(pytest.param("cuda", dtype, mode, marks=marks))


def assert_close(found, expected, dtype):
    error = (found.double().cpu() - expected).abs().max() / expected.abs().max()
    assert error < CLOSE[dtype], error


def moved(base, device, dtype):
    """Return a copy on the device, with the base in `dtype` and the adapters in float32."""
    copied = copy.deepcopy(base).to(device)
    for parameter in copied.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
    for buffer in copied.buffers():
        buffer.data = buffer.data.float()
    return copied, copied.skill_adapters


def step(base, adapters, inputs):
    """Return the loss and the gradients of one batch."""
    ids, mask, labels = [tensor.to(base.device) for tensor in inputs]
    with adapters.routed(base.embed(ids), mask):
        loss = base.loss(ids, mask, labels)
        loss.backward()
    gradients = []
    for group in adapters.parameter_groups().values():
        gradients += [parameter.grad.flatten().double().cpu() for parameter in group]
    base.zero_grad(set_to_none=True)
    return loss.detach(), torch.cat(gradients)


@pytest.mark.filterwarnings("error:blocks run uncompiled")
@pytest.mark.parametrize("device, dtype, mode", CASES)
@pytest.mark.parametrize("router", ["sample", "token"])
def test_a_training_step_is_as_on_the_cpu(small_t5, inputs, device, dtype, router, mode):
    adapters = adapted(small_t5, targets=("all",), router=router)
    for parameter in adapters.parameters():
        parameter.data = parameter.data.double()
    small_t5.double().train()
    expected = step(small_t5, adapters, inputs)
    base, adapters = moved(small_t5, device, dtype)
    base.checkpoint_blocks = mode == "checkpointed"
    if mode == "compiled":
        torch._dynamo.reset()
        base.compile_blocks()
    for found, wanted in zip(step(base, adapters, inputs), expected, strict=True):
        assert_close(found, wanted, dtype)
