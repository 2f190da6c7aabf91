"""The code that --compile writes for an H100 computes the numbers of the block, on the CPU.

It is written for fake CUDA tensors, as in experiments/cuda_code.py, and runs: its Triton kernels in
triton's interpreter, its products by torch, and attention by its formula. The same block in float64
gives the expected numbers. What only a GPU shows: its own products and attention, and its speed.
"""

import contextlib
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_map_only

from checkpoint import FAMILY_OF_CONFIG
from experiments import cuda_code
from experiments.computed import allocate
from helpers import PYTHONPATH, adapted, random_batch, seeded_generator

# Narrow blocks, since the interpreter is slow.
T5_SIZES = dict(vocab_size=128, d_model=64, d_kv=16, d_ff=96, num_heads=4)
LLAMA_SIZES = dict(vocab_size=128, hidden_size=64, intermediate_size=96, head_dim=16)
LLAMA_SIZES |= dict(num_attention_heads=4, num_key_value_heads=2)
SHAPES = {
    "T5-base": replace(cuda_code.ONE_BLOCK["T5-base"], **T5_SIZES),
    "Llama-3.2-1B": replace(cuda_code.ONE_BLOCK["Llama-3.2-1B"], **LLAMA_SIZES),
}
LARGEST_ERROR = {"float32": 1e-5, "bfloat16": 0.06}  # relative to the largest value


@pytest.mark.slow
@pytest.mark.parametrize("block", cuda_code.BLOCKS)
def test_compiled_code_computes_the_numbers_of_the_block(block, capfd):
    reason = cuda_code.missing()
    if reason:
        pytest.skip(reason)
    folders = os.pathsep.join((PYTHONPATH, str(Path(__file__).parent)))
    variables = {"PYTHONPATH": folders, "TRITON_INTERPRET": "1"}
    code = cuda_code.run_with_fake_cuda(Path(__file__).stem, block, **variables)
    output, errors = capfd.readouterr()
    assert code == 0, errors
    if output.startswith("skipped: "):
        pytest.skip(output)
    found = {dtype: [] for dtype in LARGEST_ERROR}
    for line in output.splitlines():
        dtype, error, _ = line.split(maxsplit=2)
        found[dtype].append(float(error))
    for dtype, errors in found.items():
        assert len(errors) > 20  # the output, and the gradients of x, and of A, B and c
        for error in errors:  # max would overlook NaN
            assert error < LARGEST_ERROR[dtype], output


# ------------------------------------------------------------------ in the process with fake CUDA


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
    cuda_code.H100_FUNCTIONS |= {
        "torch._inductor.runtime.triton_helpers.libdevice": libdevice,
        "torch._C._dynamo.guards._empty_strided_cuda": unwritten,
        "torch._C._cuda_getCurrentRawStream": lambda device: 0,
        "torch.cuda._DeviceGuard": lambda device: contextlib.nullcontext(),
        "torch.cuda.set_device": lambda device: None,
    }


def with_fake_cuda(name):
    """Print the error of the output and of each gradient, relative to the largest value."""
    model, number = cuda_code.BLOCKS[name]
    shape = SHAPES[model]
    source, mask, labels = random_batch(3, 128, (21, 15, 20), (10, 7, 9))
    batch = [source, mask, labels.clamp(min=0)]

    # The block itself.
    base = FAMILY_OF_CONFIG[type(shape)](shape).double().train()
    for weight in base.parameters():
        nn.init.normal_(weight, std=0.3, generator=seeded_generator())
    adapters = adapted(base, targets=("all",))
    base.embedding.requires_grad_(True)  # as in cuda_code.rows
    with adapters.routed(base.embed(source), mask):
        inputs = cuda_code.record_inputs(base, *batch)[number]
        y = base.blocks[number](*inputs)
        dy = torch.randn(y.shape, generator=seeded_generator())
        trained = cuda_code.trained_tensors(adapters, inputs)
        expected = [y, *torch.autograd.grad(y, trained, dy, allow_unused=True)]
        given = [*base.parameters(), *inputs, *trained, dy]

    let_code_for_cuda_run_on_the_cpu()
    values = Values()
    load = "torch._inductor.graph.GraphLowering.compile_to_module"
    cuda_code.H100_FUNCTIONS[load] = lambda graph: values.load_code(graph)
    try:
        cuda_code.pretend_to_have_an_h100()
    except AttributeError as error:
        print(f"skipped: torch {torch.__version__} has other private names: {error}")
        return
    for dtype in LARGEST_ERROR:
        found = run_compiled(name, getattr(torch, dtype), values, batch, given)
        for fake, wanted in zip(found, expected, strict=True):
            if wanted is not None:  # None: a skill of another block
                error = (values.of(fake) - wanted).abs().max() / wanted.abs().max()
                print(f"{dtype} {error:.1e} {tuple(wanted.shape)}")


def run_compiled(name, dtype, values, batch, given):
    """Return the output and the gradients of a compiled block of fake CUDA tensors.

    batch: as for record_inputs. given: values of the weights, inputs, trained tensors and dy.
    """
    model, number = cuda_code.BLOCKS[name]
    torch._dynamo.reset()
    base, adapters = cuda_code.meta_base(SHAPES[model], cuda_code.Case("", "all", "orchmoe"))
    with FakeTensorMode():
        allocate(base, dtype, "cuda")
        base.embedding.requires_grad_(True)
        batch = [torch.zeros(part.shape, dtype=part.dtype, device="cuda") for part in batch]
        with adapters.routed(base.embed(batch[0]), batch[1]):
            inputs = cuda_code.record_inputs(base, *batch)[number]
            trained = cuda_code.trained_tensors(adapters, inputs)
            dy = torch.empty_like(inputs[0])
            fakes = [*base.parameters(), *inputs, *trained, dy]
            for fake, real in zip(fakes, given, strict=True):
                values.put(fake, real)
            base.compile_blocks()
            y = base.blocks[number](*inputs)
            return [y, *torch.autograd.grad(y, trained, dy, allow_unused=True)]
