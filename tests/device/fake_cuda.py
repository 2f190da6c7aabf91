"""A process in which torch takes this machine for one with an H100, whose tensors have no values.

torch then writes the code that it would run on an H100, and triton builds it. This needs triton, a
C++ compiler and the torch for CPUs; without them the tests skip. `H100_FUNCTIONS` replaces private
functions of torch.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import checkpoint
from baselines import attach_method
from device.library import build
from experiments.computed import MODELS
from helpers import PYTHONPATH
from model import Backbone, Config
from orchmoe import Adapters, OrchMoEConfig

BLOCKS = {  # model, and which of its blocks it is
    "T5-base decoder": ("T5-base", 1),
    "Llama-3.2-1B": ("Llama-3.2-1B", 0),
}
ONE_BLOCK = {
    "T5-base": replace(MODELS["T5-base"], num_layers=1, num_decoder_layers=1),
    "Llama-3.2-1B": replace(MODELS["Llama-3.2-1B"], num_hidden_layers=1),
}

# ------------------------------------------------------------------------------------- the process

# torch looks for CUDA while it is imported, so the library must be there before.
CHILD = """
import ctypes, sys
ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
from device import fake_cuda
fake_cuda.write_result(*sys.argv[2:])
"""


class OtherNames(Exception):
    """This version of torch has other private functions."""


def call_with_fake_cuda(function: str, *words: str, **environment: str) -> dict[str, Any]:
    """Call a function of test_cuda_code.py in a process with fake CUDA. Return its result."""
    pytest.importorskip("triton")
    if torch.version.cuda is not None:
        pytest.skip("this torch is built for CUDA")
    library = build("fake_cuda")
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        environment |= {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder}
        environment |= {"PYTHONPATH": PYTHONPATH}
        command = [sys.executable, "-c", CHILD, library, result, function, *words]
        subprocess.run(command, env=os.environ | environment, check=True)
        found = json.loads(result.read_text(encoding="utf-8"))
    if "skip" in found:
        pytest.skip(found["skip"])
    return found["result"]


def write_result(path: str, function: str, *words: str) -> None:
    """Call a function of test_cuda_code.py. Write its result, or why it cannot run, to a file."""
    from device import test_cuda_code

    try:
        found = {"result": getattr(test_cuda_code, function)(*words)}
    except OtherNames as error:
        found = {"skip": f"torch {torch.__version__} has other private names: {error}"}
    Path(path).write_text(json.dumps(found), encoding="utf-8")


# ------------------------------------------------------------------------------------- the H100

PROPERTIES = SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=48 * 2**10,
    shared_memory_per_block_optin=227 * 2**10,
    shared_memory_per_multiprocessor=228 * 2**10,
    L2_cache_size=50 * 2**20,
    total_memory=80 * 2**30,
    gcnArchName="",  # cards of AMD have one
)


class Written(Exception):
    """torch has written the code of both passes, and would run it now."""


written: list[str] = []  # the code of the forward pass and of the backward pass


def keep_code(graph):
    """Keep the code of a graph of Inductor, in place of loading it."""

    def run(inputs):
        raise Written

    written.append(graph.codegen()[0].value)
    return SimpleNamespace(call=run, runner=None)


def attention(
    q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """Call what scaled_dot_product_attention calls on an H100, where the programs leave out cuDNN.

    Without a GPU torch itself takes its slow form. Raise ValueError where a GPU takes it, too.
    """
    if attn_mask is None and q.dtype == torch.bfloat16:
        fused = torch.ops.aten._scaled_dot_product_flash_attention
        return fused(q, k, v, dropout_p, is_causal, scale=scale)[0]
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"{q.shape[1]} heads of queries share {k.shape[1]} heads of keys")
    if attn_mask is not None:
        if attn_mask.stride(-1) != 1:
            raise ValueError(f"a mask has strides {attn_mask.stride()}; the last one must be 1")
        attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    fused = torch.ops.aten._scaled_dot_product_efficient_attention
    return fused(q, k, v, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


CUDA = "torch._dynamo.device_interface.CudaInterface"
H100_FUNCTIONS = {
    "torch.cuda.device_count": lambda: 1,
    "torch.cuda.current_device": lambda: 0,
    "torch.cuda.get_device_properties": lambda *_: PROPERTIES,
    "torch.cuda.get_device_capability": lambda *_: (9, 0),
    f"{CUDA}.is_available": lambda: True,
    f"{CUDA}.is_bf16_supported": lambda **_: True,
    f"{CUDA}.current_device": lambda: 0,
    f"{CUDA}.get_device_properties": lambda *_: PROPERTIES,
    "torch._inductor.runtime.triton_helpers.set_driver_to_gpu": lambda: None,
    "torch._inductor.graph.GraphLowering.compile_to_module": keep_code,
    "torch.nn.functional.scaled_dot_product_attention": attention,
}


def pretend_to_have_an_h100() -> None:
    """Change torch for the rest of this process. Raise OtherNames if a name is not there."""
    try:
        for name, function in H100_FUNCTIONS.items():
            mock.patch(name, function).start()
    except AttributeError as error:
        raise OtherNames(error) from None

    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", 90, PROPERTIES.warp_size)
    driver = SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0)
    triton.runtime.driver.set_active(driver)

    inductor = torch._inductor.config
    inductor.fx_graph_cache = False
    inductor.use_static_triton_launcher = False
    inductor.compile_threads = 1
    inductor.joint_graph_constant_folding = False  # it would compute constants on the GPU
    inductor.shape_padding = False  # it would time products on the GPU
    torch._functorch.config.enable_autograd_cache = False
    torch.autograd.set_multithreading_enabled(False)  # a thread for CUDA would need CUDA


# -------------------------------------------------------------------------------------- the blocks


def meta_base(shape: Config) -> tuple[Backbone, Adapters]:
    """Return a base of this shape on the meta device, and adapters of all its Linears."""
    base = checkpoint.on_meta(shape).train()
    with torch.device("meta"):
        config = OrchMoEConfig(targets=("all",), alpha=3.0)
        return base, attach_method("orchmoe", base, config)


def record_inputs(
    base: Backbone, source: Tensor, mask: Tensor, target: Tensor
) -> list[list[Tensor]]:
    """Return the inputs of each block, as leaves that need a gradient where they did.

    source (B,Ls), its mask, and target (B,Lt), which only an encoder-decoder model reads.
    """
    found = []

    def run_block(block, *inputs):
        found.append([tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs])
        return block(*inputs)

    with mock.patch.object(base, "run_block", run_block):
        if hasattr(base, "encoder"):
            base.hidden(source, mask, target)
        else:
            base.hidden(source)
    return found
