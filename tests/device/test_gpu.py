"""What must be right on an NVIDIA GPU: pytest -m gpu.

A training step computes the numbers of the CPU in float64, few graphs serve all batches, attention
is fused, and the host waits for the GPU a few times in a step. `pytest -m gpu -rP` prints which
attention runs. The first test and that of attention also run on a CPU, so that a renamed function
is noticed without a GPU.
"""

import contextlib
import copy
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import kernels
import train
from checkpoint import FAMILY_OF_CONFIG
from device.fake_cuda import ONE_BLOCK
from helpers import adapted, examples_of, random_batch, small_model
from support import runtime

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")]
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative to the largest value
CUDA = pytest.param("cuda", marks=GPU)
CASES = [("cpu", torch.float32, "plain")]
for dtype in CLOSE:
    for mode in ("plain", "checkpointed", "compiled"):
        CASES.append(pytest.param("cuda", dtype, mode, marks=GPU))


def assert_close(found, expected, dtype):
    error = (found.double().cpu() - expected).abs().max() / expected.abs().max()
    assert error < CLOSE[dtype], error


def moved(base, device, dtype):
    """Return a copy on the device, with the base in `dtype` and the adapters in float32."""
    copied = copy.deepcopy(base).float().to(device, dtype)  # skills stay in float32
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


@pytest.mark.parametrize("device, dtype, mode", CASES)
@pytest.mark.parametrize("method", ["orchmoe", "orchmoe-token"])
def test_a_training_step_is_as_on_the_cpu(small_t5, inputs, device, dtype, method, mode):
    adapters = adapted(small_t5, method, targets=("all",), alpha=3.0)
    small_t5.double().train()
    expected = step(small_t5, adapters, inputs)
    base, adapters = moved(small_t5, device, dtype)
    base.checkpoint_blocks = mode == "checkpointed"
    if mode == "compiled":
        torch._dynamo.reset()
        kernels.compile_blocks(base.blocks)
    for found, wanted in zip(step(base, adapters, inputs), expected, strict=True):
        assert_close(found, wanted, dtype)


@pytest.mark.parametrize("device", [CUDA])
def test_few_graphs_serve_all_batches(small_t5, device):
    """One batch has a single row. test_compile.py tests more on a CPU."""
    adapted(small_t5, targets=("all",))
    base, adapters = moved(small_t5.train(), device, torch.float32)
    torch._dynamo.reset()
    counters.clear()
    kernels.compile_blocks(base.blocks)
    rng = np.random.default_rng(0)
    for rows, source, target in [(1, 40, 8), *rng.integers(2, 64, (15, 3)).tolist()]:
        step(base, adapters, random_batch(2, 37, [source] * rows, [target] * rows))
    assert 0 < counters["stats"]["unique_graphs"] <= 4


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("shape", ONE_BLOCK)
def test_attention_is_fused(shape, device):
    """torch's slow form has "math" in its name."""
    if device == "cuda":
        runtime.pick_device(0)  # it turns cuDNN's attention off
        dtype, source, target = torch.bfloat16, 250, 30
    else:
        dtype, source, target = torch.float32, 16, 4
    config = replace(ONE_BLOCK[shape], vocab_size=1000)
    base = FAMILY_OF_CONFIG[type(config)](config)
    adapted(base, targets=("q", "v"))
    base, adapters = moved(base.train(), device, dtype)
    inputs = random_batch(2, 1000, [source, source // 2], [target, target // 2])
    with torch.profiler.profile() as profile:
        step(base, adapters, inputs)
    names = {event.name for event in profile.events()}
    attention = {name for name in names if "_scaled_dot_product_" in name}
    print(f"{shape}: {', '.join(sorted(attention))}")
    assert len(attention) > 0
    assert not any("math" in name for name in attention)


@contextlib.contextmanager
def recorded_waits():
    """Yield a list that gets a warning each time when the host waits for the GPU."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("name", ["v1.1", "llama3"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_waits_at_most_twice_for_each_micro_batch_and_once_more(name, micro_batches, device):
    """test_device.py counts exactly, on a second device where there is no GPU."""
    base = small_model(name)
    adapted(base)
    base, adapters = moved(base.train(), device, torch.float32)
    config = train.TrainConfig(accumulate=micro_batches)
    optimizer = train.make_optimizer(adapters, config)
    examples = examples_of(random_batch(10, 37))
    train.train_step(base, adapters, optimizer, examples, 0, config)
    with recorded_waits() as found:
        train.train_step(base, adapters, optimizer, examples, 0, config)
    waits = [warning for warning in found if "synchronizing CUDA" in str(warning.message)]
    assert len(waits) <= 1 + 2 * micro_batches
