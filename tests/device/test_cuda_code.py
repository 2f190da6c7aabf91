"""The compiled code that an H100 would run, on a machine without one.

A training step of one block in bfloat16 goes through fake CUDA tensors (fake_cuda.py).

- Kernels: torch writes the code, and triton builds every kernel in it for sm_90. Nothing in it runs
  on the CPU or waits for the GPU.
- Numbers: the same code runs on the CPU, its Triton kernels in triton's interpreter, its products
  by torch, and attention by its formula. The block itself in float64 gives the expected numbers.

Not checked: the products and the attention of the GPU itself, what triton's compiler makes of the
kernels, other shapes, and speed.
"""

import contextlib
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_map_only

from checkpoint import FAMILY_OF_CONFIG
from device import fake_cuda
from device.fake_cuda import BLOCKS, ONE_BLOCK
from experiments.computed import allocate
from helpers import adapted, random_batch, seeded_generator

pytestmark = pytest.mark.slow

# -------------------------------------------------------------------------------------- the kernels

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
            base.compile_blocks()
            with contextlib.suppress(fake_cuda.Written):
                base.run_block(base.blocks[number], *inputs)
    return [read_code(code) for code in fake_cuda.written]


# -------------------------------------------------------------------------------------- the numbers

# Narrow blocks, since the interpreter is slow.
T5_SIZES = dict(vocab_size=128, d_model=64, d_kv=16, d_ff=96, num_heads=4)
LLAMA_SIZES = dict(vocab_size=128, hidden_size=64, intermediate_size=96, head_dim=16)
LLAMA_SIZES |= dict(num_attention_heads=4, num_key_value_heads=2)
SHAPES = {
    "T5-base": replace(ONE_BLOCK["T5-base"], **T5_SIZES),
    "Llama-3.2-1B": replace(ONE_BLOCK["Llama-3.2-1B"], **LLAMA_SIZES),
}
LARGEST_ERROR = {"float32": 1e-5, "bfloat16": 0.06}  # relative to the largest value


@pytest.mark.parametrize("block", BLOCKS)
def test_compiled_code_computes_the_numbers_of_the_block(block):
    found = fake_cuda.call_with_fake_cuda("errors_of_block", block, TRITON_INTERPRET="1")
    for dtype, largest in LARGEST_ERROR.items():
        assert len(found[dtype]) > 20  # the output, and the gradients of x, and of A, B and c
        for error in found[dtype]:  # max would overlook NaN
            assert error < largest, found[dtype]


# In the process with fake CUDA:


def unwritten(size, stride, dtype, device="cpu"):
    """Return memory full of NaN, so that a number which nothing has written shows."""
    tensor = torch.empty_strided(size, stride, dtype=dtype, device=device)
    return tensor.fill_(torch.nan) if dtype.is_floating_point else tensor.zero_()


def unwritten_like(tensor, device):
    return unwritten(tensor.size(), tensor.stride(), tensor.dtype, device)


class Values:
    """The values of fake tensors: each storage of a fake tensor has real memory on the CPU."""

    def __init__(self):
        self.memory = {}  # by the address of the storage, which is kept so that no other gets it

    def of(self, fake):
        """Return the values of a fake tensor, as a real tensor with the same layout."""
        storage = fake.untyped_storage()
        if storage._cdata not in self.memory:
            size = storage.nbytes() // fake.element_size()
            self.memory[storage._cdata] = storage, unwritten((size,), (1,), fake.dtype)
        _, memory = self.memory[storage._cdata]
        return memory.as_strided(fake.size(), fake.stride(), fake.storage_offset())

    def put(self, fake, real):
        with unset_fake_temporarily():
            self.of(fake).copy_(real.detach())

    def fake_of(self, real):
        """Return a new fake CUDA tensor with these values."""
        fake = torch.empty_strided(real.size(), real.stride(), dtype=real.dtype, device="cuda")
        self.put(fake, real)
        return fake

    def load_code(self, graph):
        """Return the code of a graph of Inductor. It takes fake tensors and computes the values."""
        code = graph.codegen()[0].value
        with unset_fake_temporarily():
            call = torch._inductor.codecache.PyCodeCache.load(code).call

        def run(inputs):
            with unset_fake_temporarily():
                outputs = call(tree_map_only(torch.Tensor, self.of, list(inputs)))
            return tree_map_only(torch.Tensor, self.fake_of, outputs)

        return SimpleNamespace(call=run, runner=None)


def by_formula(operation):
    """Return a function that computes an operation of fused attention, or its backward.

    Its outputs have the layout that the operation promises. It writes only y, or dq, dk and dv.
    """
    names = [argument.name.rstrip("_") for argument in operation._schema.arguments]

    def compute(*arguments, **options):
        given = dict(zip(names, arguments, strict=False)) | options  # some have default values
        on_meta = tree_map_only(torch.Tensor, lambda x: unwritten_like(x, "meta"), arguments)
        promised = operation(*on_meta, **options)
        outputs = tree_map_only(torch.Tensor, lambda x: unwritten_like(x, "cpu"), promised)

        q, k, v = (given[name].float() for name in ("query", "key", "value"))
        heads = k.shape[1]  # neighbouring heads of q share one
        k = k.repeat_interleave(q.shape[1] // heads, dim=1)
        v = v.repeat_interleave(q.shape[1] // heads, dim=1)
        scale = given.get("scale") or q.shape[-1] ** -0.5
        scores = scale * q @ k.mT
        if given.get("attn_bias") is not None:
            scores = scores + given["attn_bias"]
        if given.get("is_causal"):
            scores = scores + torch.full(scores.shape[2:], -torch.inf).triu(1)
        P = scores.softmax(-1)
        results = [P @ v]

        if "grad_out" in given:
            dy = given["grad_out"].float()
            dP = dy @ v.mT
            dscores = scale * P * (dP - (dP * P).sum(-1, keepdim=True))
            dk = (dscores.mT @ q).unflatten(1, (heads, -1)).sum(2)
            dv = (P.mT @ dy).unflatten(1, (heads, -1)).sum(2)
            results = [dscores @ k, dk, dv]
        for output, result in zip(outputs, results, strict=False):
            output.copy_(result)
        return outputs

    return compute


LIBRARY = torch.library.Library("aten", "IMPL")  # what it registers lasts as long as it does


def let_code_for_cuda_run_on_the_cpu():
    import triton.language as tl

    for kind in ("flash", "efficient"):
        for direction in ("", "_backward"):
            name = f"_scaled_dot_product_{kind}_attention{direction}"
            LIBRARY.impl(name, by_formula(getattr(torch.ops.aten, name).default), "CPU")

    # The interpreter has none of CUDA's own functions.
    libdevice = SimpleNamespace(
        exp=lambda x: tl.exp(x),
        rsqrt=lambda x: 1 / tl.sqrt(x),
        tanh=lambda x: 2 * tl.sigmoid(2 * x) - 1,
    )
    fake_cuda.H100_FUNCTIONS |= {
        "torch._inductor.runtime.triton_helpers.libdevice": libdevice,
        "torch._C._dynamo.guards._empty_strided_cuda": unwritten,
        "torch._C._cuda_getCurrentRawStream": lambda device: 0,
        "torch.cuda._DeviceGuard": lambda device: contextlib.nullcontext(),
        "torch.cuda.set_device": lambda device: None,
    }


def errors_of_block(name):
    """Return the error of the output and of each gradient, relative to the largest value."""
    model, number = BLOCKS[name]
    shape = SHAPES[model]
    source, mask, labels = random_batch(3, 128, (21, 15, 20), (10, 7, 9))
    batch = [source, mask, labels.clamp(min=0)]

    # The block itself.
    base = FAMILY_OF_CONFIG[type(shape)](shape).double().train()
    for weight in base.parameters():
        nn.init.normal_(weight, std=0.3, generator=seeded_generator())
    adapters = adapted(base, targets=("all",), alpha=3.0)
    base.embedding.requires_grad_(True)  # as in count_kernels
    with adapters.routed(base.embed(source), mask):
        inputs = fake_cuda.record_inputs(base, *batch)[number]
        y = base.blocks[number](*inputs)
        dy = torch.randn(y.shape, generator=seeded_generator())
        trained = fake_cuda.trained_tensors(adapters, inputs)
        expected = [y, *torch.autograd.grad(y, trained, dy, allow_unused=True)]
        given = [*base.parameters(), *inputs, *trained, dy]

    let_code_for_cuda_run_on_the_cpu()
    values = Values()
    load = "torch._inductor.graph.GraphLowering.compile_to_module"
    fake_cuda.H100_FUNCTIONS[load] = lambda graph: values.load_code(graph)
    fake_cuda.pretend_to_have_an_h100()
    errors = {}
    for dtype in LARGEST_ERROR:
        found = run_compiled(name, getattr(torch, dtype), values, batch, given)
        errors[dtype] = []
        for fake, wanted in zip(found, expected, strict=True):
            if wanted is not None:  # None: a skill of another block
                error = (values.of(fake) - wanted).abs().max() / wanted.abs().max()
                errors[dtype].append(error.item())
    return errors


def run_compiled(name, dtype, values, batch, given):
    """Return the output and the gradients of a compiled block of fake CUDA tensors.

    batch: as for record_inputs. given: values of the weights, inputs, trained tensors and dy.
    """
    model, number = BLOCKS[name]
    torch._dynamo.reset()
    base, adapters = fake_cuda.meta_base(SHAPES[model])
    with FakeTensorMode():
        allocate(base, dtype, "cuda")
        base.embedding.requires_grad_(True)
        batch = [torch.zeros(part.shape, dtype=part.dtype, device="cuda") for part in batch]
        with adapters.routed(base.embed(batch[0]), batch[1]):
            inputs = fake_cuda.record_inputs(base, *batch)[number]
            trained = fake_cuda.trained_tensors(adapters, inputs)
            dy = torch.empty_like(inputs[0])
            fakes = [*base.parameters(), *inputs, *trained, dy]
            for fake, real in zip(fakes, given, strict=True):
                values.put(fake, real)
            base.compile_blocks()
            y = base.blocks[number](*inputs)
            return [y, *torch.autograd.grad(y, trained, dy, allow_unused=True)]
