"""Count the launches of a block on an H100, and build its Triton kernels, on a machine without one.

Nothing is computed. A training step of one block of T5-base or Llama-3.2-1B in bfloat16 runs on
fake CUDA tensors, which have shapes but no values.

- uncompiled: every operation of torch that is no view launches one kernel;
- compiled: torch writes the code that an H100 would run, triton builds every kernel in it for
  sm_90, and the calls in this code are counted.

    python -m experiments.cuda_code

It needs triton, a C++ compiler and the torch for CPUs, and says so where one is missing. It
replaces private functions of torch: `H100_FUNCTIONS`. The second test runs the code on the CPU.
Test: pytest -m slow tests/experiments/test_cuda_code.py tests/experiments/test_cuda_numbers.py
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils import cpp_extension
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
from baselines import attach_method, without_adapters
from experiments.computed import MODELS, allocate
from model import Backbone, Config
from orchmoe import Adapters, OrchMoEConfig
from support import program

BLOCKS = {  # model, and which of its blocks it is
    "T5-base encoder": ("T5-base", 0),
    "T5-base decoder": ("T5-base", 1),
    "Llama-3.2-1B": ("Llama-3.2-1B", 0),
}
ONE_BLOCK = {
    "T5-base": replace(MODELS["T5-base"], num_layers=1, num_decoder_layers=1),
    "Llama-3.2-1B": replace(MODELS["Llama-3.2-1B"], num_hidden_layers=1),
}


class Case(NamedTuple):
    """How a block is adapted: cells of a row of the table, and the settings that they stand for."""

    name: str
    adapted: str = ""  # which Linears
    method: str = ""  # of attach_method; none for the frozen block
    mixing: str = "outputs"


CASES = (
    Case("frozen"),
    Case("LoRA", "q, v", "lora"),
    Case("LoRA", "all", "lora"),
    Case("OrchMoE", "q, v", "orchmoe"),
    Case("OrchMoE", "all", "orchmoe"),
    Case("OrchMoE, factors", "all", "orchmoe", mixing="factors"),
)
B, LS, LT = 8, 250, 60  # rows, source tokens, target tokens

HEAD = """\
| block | method | adapted | uncompiled | compiled | kernels built | on the CPU | `.item()` |
|---|---|---|---|---|---|---|---|"""


# ------------------------------------------------------------------------------- a process for it


def missing() -> str:
    """Return what this machine lacks, or ""."""
    compiler = os.environ.get("CXX", "c++")
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install -r requirements-dev.txt"
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler})"
    if torch.version.cuda is not None:
        return "this torch is built for CUDA; use the one for CPUs here, and gpu_check on a GPU"
    return ""


def build_library(folder: str) -> str:
    """Build fake_cuda.cpp. Return the path of the library."""
    library = f"{folder}/fake_cuda.so"
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-shared", "-fPIC", "-o", library]
    command.append(str(program.ROOT / "experiments/fake_cuda.cpp"))
    command += [f"-I{path}" for path in cpp_extension.include_paths()]
    for path in cpp_extension.library_paths():
        command += [f"-L{path}", f"-Wl,-rpath,{path}"]
    subprocess.run([*command, "-ltorch_cpu", "-lc10"], check=True)
    return library


# torch looks for CUDA while it is imported, so the library must be there before.
CHILD = """
import ctypes, sys, importlib
ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
importlib.import_module(sys.argv[2]).with_fake_cuda(*sys.argv[3:])
"""


def run_with_fake_cuda(module: str, *words: str, **variables: str) -> int:
    """Call with_fake_cuda(*words) of the module in a process with fake CUDA. Return its exit code.

    variables: of the environment.
    """
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder}
        command = [sys.executable, "-c", CHILD, build_library(folder), module, *words]
        environment = os.environ | caches | variables
        return subprocess.run(command, cwd=program.ROOT, env=environment).returncode


def main() -> int:
    program.read_flags(__doc__)
    reason = missing()
    if reason:
        program.print_line(f"skipped: {reason}")
        return 0
    return run_with_fake_cuda("experiments.cuda_code", *BLOCKS)


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
    """Change torch for the rest of this process. Raise AttributeError if a name is not there."""
    for name, function in H100_FUNCTIONS.items():
        mock.patch(name, function, create=name.startswith("torch._C.")).start()

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


# ---------------------------------------------------------------------------------- the launches

aten = torch.ops.aten
NO_KERNEL = (aten._unsafe_view, aten.empty, aten.empty_like, aten.new_empty)


class Launches(TorchDispatchMode):
    """Count the operations within a `with` block that launch a kernel."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        is_kernel = function._overloadpacket not in NO_KERNEL and not function.is_view
        if is_kernel and function.namespace == "aten":
            self.count += 1
        return function(*args, **(kwargs or {}))


def one_kernel_norm(x, shape, weight, eps):
    """Stand for rms_norm, which is one kernel on CUDA in each direction, as layer_norm is."""
    return F.layer_norm(x, shape, weight, eps=eps)


class Code(NamedTuple):
    """What the code of one pass launches."""

    launches: int
    kernels: int  # different Triton kernels
    on_cpu: int  # calls of kernels on the CPU
    items: int  # calls of .item()


def read_code(code: str) -> Code:
    """Build all kernels of the code for sm_90. Return its counts."""
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
    launches = re.findall(
        r"triton_\w+\.run\(|extern_kernels\.\w+\(|torch\.ops\.aten\.[\w.]+\(", body
    )
    # Where addmm adds a product to one tensor and writes to another, it first copies.
    added = re.findall(r"extern_kernels\.addmm\((\w+),.* beta=1, out=(\w+)\)", body)
    copies = [source for source, target in added if source != target]
    on_cpu = re.findall(r"cpp_fused\w*\(", body)
    return Code(len(launches) + len(copies), len(kernels), len(on_cpu), body.count(".item()"))


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


def trained_tensors(adapters: Adapters, inputs: list[Tensor]) -> list[Tensor]:
    """Return the tensors for which a block computes gradients. The adapters are routed."""
    tensors = [*inputs, *adapters.parameter_groups()["skills"]]
    tensors += [linear.skill_weights for linear in adapters.linears.values()]
    return [tensor for tensor in tensors if tensor.requires_grad]


def count(base: Backbone, adapters: Adapters, block: nn.Module, inputs: list[Tensor]) -> list[str]:
    """Return the counts of a block as cells of the table. The adapters are routed."""
    trained = trained_tensors(adapters, inputs)
    with mock.patch("torch.nn.functional.rms_norm", one_kernel_norm):
        with Launches() as forward:
            y = base.run_block(block, *inputs)
        dy = torch.empty_like(y)
        with Launches() as backward:
            torch.autograd.grad(y, trained, dy, allow_unused=True)

    torch._dynamo.reset()
    written.clear()
    base.compile_blocks()
    with suppress(Written):
        base.run_block(block, *inputs)
    codes = [read_code(code) for code in written]
    if len(codes) != 2:
        raise RuntimeError(f"torch wrote {len(codes)} programs, not one forward and one backward")

    compiled = " + ".join(str(code.launches) for code in codes)
    sums = [sum(numbers) for numbers in zip(*codes, strict=True)]
    return [f"{forward.count} + {backward.count}", compiled, *map(str, sums[1:])]


def meta_base(shape: Config, case: Case) -> tuple[Backbone, Adapters]:
    """Return a base of this shape on the meta device, and its adapters."""
    base = checkpoint.on_meta(shape).train()
    with torch.device("meta"):
        if not case.method:
            return base, without_adapters(base)
        config = OrchMoEConfig(targets=tuple(case.adapted.split(", ")), mixing=case.mixing)
        return base, attach_method(case.method, base, config)


def rows(name: str) -> Iterator[list[str]]:
    """Yield the row of each case for a block of BLOCKS."""
    model, number = BLOCKS[name]
    for case in CASES:
        base, adapters = meta_base(ONE_BLOCK[model], case)
        with FakeTensorMode():
            allocate(base, torch.bfloat16, "cuda")
            base.embedding.requires_grad_(True)  # so that the inputs of all blocks need a gradient
            source = torch.zeros(B, LS, dtype=torch.long, device="cuda")
            mask = torch.ones(B, LS, dtype=torch.bool, device="cuda")
            with adapters.routed(base.embed(source), mask):
                inputs = record_inputs(base, source, mask, source[:, :LT])[number]
                cells = count(base, adapters, base.blocks[number], inputs)
        yield [name, case.name, case.adapted, *cells]


def with_fake_cuda(*names: str) -> None:
    """Print the table of these BLOCKS, in a process with fake CUDA."""
    import triton

    try:
        pretend_to_have_an_h100()
    except (AttributeError, ImportError) as error:
        program.print_line(f"skipped: torch {torch.__version__} has other private names: {error}")
        return
    program.print_line(f"torch {torch.__version__}, triton {triton.__version__}\n\n{HEAD}")
    for name in names:
        for row in rows(name):
            program.print_line(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    program.run_program(main)
