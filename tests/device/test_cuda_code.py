"""The compiled code that an H100 would run, on a machine without one.

A training step of one block in bfloat16 goes through fake CUDA tensors (fake_cuda.py). torch writes
the code, and triton builds every kernel in it for sm_90. Nothing in it runs on the CPU or waits for
the GPU. test_compile.py compares numbers, on a CPU.
"""

import contextlib
import re

import pytest
import torch
from torch._subclasses import FakeTensorMode

import kernels
from device import fake_cuda
from device.fake_cuda import BLOCKS, ONE_BLOCK
from experiments.computed import allocate

pytestmark = pytest.mark.slow

ROWS, SOURCE, TARGET = 8, 250, 60  # the batch


# The decoder block of a T5 has all that its encoder block has.
@pytest.mark.parametrize("block", BLOCKS)
def test_compiled_code_does_not_wait_for_the_cpu(block):
    counts = fake_cuda.call_with_fake_cuda("count_kernels", block)
    assert len(counts) == 2  # one forward and one backward
    for triton, on_cpu, items in counts:
        assert triton > 0 and (on_cpu, items) == (0, 0)


# In the process with fake CUDA:


def read_code(code: str) -> tuple[int, int, int]:
    """Build all kernels of the code for sm_90.

    Return the number of its Triton kernels, of its calls of kernels on the CPU, and of .item().
    """
    from torch._inductor.codecache import PyCodeCache

    pattern = r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)"
    kernels = re.findall(pattern, code, re.DOTALL)
    for name, source in kernels:
        tuner = getattr(PyCodeCache.load(source), name)
        for choice in tuner.configs:
            built = tuner._precompile_config(choice).kernel.asm
            if ".target sm_90" not in built["ptx"] or built["cubin"][:4] != b"\x7fELF":
                raise RuntimeError(f"{name} was not built for sm_90")

    body = code[code.index("def call(") :].partition("def get_args")[0]
    on_cpu = re.findall(r"cpp_fused\w*\(", body)
    return len(kernels), len(on_cpu), body.count(".item()")


def count_kernels(name):
    """Return what read_code finds in the code of both passes of a block of BLOCKS."""
    fake_cuda.pretend_to_have_an_h100()
    model, number = BLOCKS[name]
    base, adapters = fake_cuda.meta_base(ONE_BLOCK[model])
    with FakeTensorMode():
        allocate(base, torch.bfloat16, "cuda")
        base.embedding.requires_grad_(True)  # so that the inputs of all blocks need a gradient
        source = torch.zeros(ROWS, SOURCE, dtype=torch.long, device="cuda")
        mask = torch.ones(ROWS, SOURCE, dtype=torch.bool, device="cuda")
        with adapters.routed(base.embed(source), mask):
            inputs = fake_cuda.record_inputs(base, source, mask, source[:, :TARGET])[number]
            kernels.compile_blocks(base.blocks)
            with contextlib.suppress(fake_cuda.Written):
                base.run_block(base.blocks[number], *inputs)
    return [read_code(code) for code in fake_cuda.written]
