"""The kernels that --compile writes for an H100 compute the numbers of the block.

The code of both passes is written for fake CUDA tensors, as in experiments/cuda_code.py. Then it
runs on the CPU: its Triton kernels in triton's interpreter, its products by torch, and attention by
its formula. The same block in float64 gives the expected numbers.
"""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
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
LARGEST_ERROR = {"float32": 1e-5, "bfloat16": 0.05}  # relative to the largest value
HERE = "test_cuda_numbers"  # the module that the process with fake CUDA imports


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LARGEST_ERROR)
@pytest.mark.parametrize("name", cuda_code.BLOCKS)
def test_compiled_kernels_compute_the_numbers_of_the_block(name, dtype, capfd):
    reason = cuda_code.missing()
    if reason:
        pytest.skip(reason)
    variables = {"PYTHONPATH": PYTHONPATH, "TRITON_INTERPRET": "1"}
    code = cuda_code.run_with_fake_cuda(HERE, name, dtype, **variables)
    output = capfd.readouterr()
    assert code == 0, output.err
    errors = [float(line.split()[0]) for line in output.out.splitlines()]
    assert len(errors) > 10
    assert max(errors) < LARGEST_ERROR[dtype], output.out


# ------------------------------------------------------------------ in the process with fake CUDA


def written_nowhere(size, stride, dtype):
    """Return memory of NaN, so that it shows if something reads what nothing has written."""
    tensor = torch.empty_strided(size, stride, dtype=dtype)
    return tensor.fill_(torch.nan if dtype.is_floating_point else 0)


class Values:
    """The values of fake tensors: real memory on the CPU for each storage of a fake tensor."""

    def __init__(self):
        self.memory = {}  # by the address of the fake storage, which is kept so that it stays

    def of(self, fake):
        """Return the values of a fake tensor as a real one with the same layout."""
        storage = fake.untyped_storage()
        if storage._cdata not in self.memory:
            size = storage.nbytes() // fake.element_size()
            self.memory[storage._cdata] = storage, written_nowhere((size,), (1,), fake.dtype)
        _, memory = self.memory[storage._cdata]
        return memory.as_strided(fake.size(), fake.stride(), fake.storage_offset())

    def put(self, fake, real):
        with unset_fake_temporarily():
            self.of(fake).copy_(real.detach())

    def fake_of(self, real):
        """Return a new fake CUDA tensor with these values."""
        options = {"dtype": real.dtype, "device": "cuda"}
        fake = torch.empty_strided(real.size(), real.stride(), **options)
        self.put(fake, real)
        return fake

    def run_graph(self, graph):
        """Stand for GraphLowering.compile_to_module: return code that computes with the values."""
        code = graph.codegen()[0].value
        with unset_fake_temporarily():
            call = torch._inductor.codecache.PyCodeCache.load(code).call

        def run(inputs):
            with unset_fake_temporarily():
                outputs = call(tree_map_only(torch.Tensor, self.of, list(inputs)))
            return tree_map_only(torch.Tensor, self.fake_of, outputs)

        return SimpleNamespace(call=run, runner=None)


def by_formula(operation):
    """Return a function for the CPU that computes an operation of fused attention, or its backward.

    The outputs have the layout that the operation promises. Those beside the first ones are zero.
    """
    names = [argument.name.rstrip("_") for argument in operation._schema.arguments]

    def compute(*arguments, **options):
        given = dict(zip(names, arguments)) | options
        promised = operation(*tree_map_only(torch.Tensor, on_meta, arguments), **options)
        outputs = tree_map_only(torch.Tensor, zeros_like, promised)
        q, k, v = (given[name].float() for name in ("query", "key", "value"))
        scale = given.get("scale") or q.shape[-1] ** -0.5
        shared = k.shape[1]  # heads of k and v; neighbouring heads of q share one
        k = k.repeat_interleave(q.shape[1] // shared, 1)
        v = v.repeat_interleave(q.shape[1] // shared, 1)

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
            dscores = P * (dP - (dP * P).sum(-1, keepdim=True))
            dk = (scale * dscores.mT @ q).unflatten(1, (shared, -1)).sum(2)
            dv = (P.mT @ dy).unflatten(1, (shared, -1)).sum(2)
            results = [scale * dscores @ k, dk, dv]
        for output, result in zip(outputs, results):
            output.copy_(result)
        return outputs

    return compute


def on_meta(tensor):
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def zeros_like(tensor):
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype).zero_()


def prepare_cpu(functions):
    """Let the code for CUDA run on the CPU. Add to the `functions` that stand for those of torch.

    Return what must not be deleted before the code has run.
    """
    import triton.language as tl

    library = torch.library.Library("aten", "IMPL")
    for kind in ("flash", "efficient"):
        for direction in ("", "_backward"):
            name = f"_scaled_dot_product_{kind}_attention{direction}"
            library.impl(name, by_formula(getattr(torch.ops.aten, name).default), "CPU")

    # The interpreter has none of CUDA's own functions.
    libdevice = SimpleNamespace(
        rsqrt=lambda x: 1 / tl.sqrt(x), tanh=lambda x: 2 * tl.sigmoid(2 * x) - 1
    )
    functions |= {
        "torch._inductor.runtime.triton_helpers.libdevice": libdevice,
        "torch._C._dynamo.guards._empty_strided_cuda": written_nowhere,
        "torch._C._cuda_getCurrentRawStream": lambda device: 0,
        "torch.cuda._DeviceGuard": lambda device: contextlib.nullcontext(),
        "torch.cuda.set_device": lambda device: None,
    }
    return library


def with_fake_cuda(name, dtype):
    """Print the error of the output and of each gradient, relative to the largest value."""
    model, number = cuda_code.BLOCKS[name]
    shape = SHAPES[model]
    *batch, labels = random_batch(3, 128, (21, 15, 20), (10, 7, 9))  # of T5, target tokens
    batch.append(labels.clamp(min=0))

    real_base = FAMILY_OF_CONFIG[type(shape)](shape).double().train()
    for weight in real_base.parameters():
        nn.init.normal_(weight, std=0.3, generator=seeded_generator())
    real_adapters = adapted(real_base, targets=("all",))
    real_base.embedding.requires_grad_(True)
    with real_adapters.routed(real_base.embed(batch[0]), batch[1]):
        real_inputs = cuda_code.record_inputs(real_base, *batch)[number]
        y = real_base.blocks[number](*real_inputs)
        dy = torch.randn(y.shape, generator=seeded_generator())
        trained = cuda_code.trained_tensors(real_adapters, real_inputs)
        expected = [y, *torch.autograd.grad(y, trained, dy, allow_unused=True)]
        reals = [*real_base.parameters(), *real_inputs, *trained]

    values = Values()
    functions = cuda_code.H100_FUNCTIONS
    name = "torch._inductor.graph.GraphLowering.compile_to_module"
    functions[name] = lambda graph: values.run_graph(graph)  # a method of GraphLowering
    library = prepare_cpu(functions)  # it forgets the functions when it is deleted
    cuda_code.pretend_to_have_an_h100()
    base, adapters = cuda_code.meta_base(shape, "orchmoe", "all")
    with FakeTensorMode():
        allocate(base, getattr(torch, dtype), "cuda")
        base.embedding.requires_grad_(True)
        batch = [torch.zeros(part.shape, dtype=part.dtype, device="cuda") for part in batch]
        with adapters.routed(base.embed(batch[0]), batch[1]):
            inputs = cuda_code.record_inputs(base, *batch)[number]
            trained = cuda_code.trained_tensors(adapters, inputs)
            fakes = [*base.parameters(), *inputs, *trained]
            for fake, real in zip(fakes, reals, strict=True):
                values.put(fake, real)

            base.compile_blocks()
            y = base.blocks[number](*inputs)
            fake_dy = torch.empty_like(y)
            values.put(fake_dy, dy)
            found = [y, *torch.autograd.grad(y, trained, fake_dy, allow_unused=True)]

    for fake, wanted in zip(found, expected, strict=True):
        if wanted is None:  # a skill of the other block
            continue
        error = (values.of(fake) - wanted).abs().max() / wanted.abs().max()
        print(f"{error:.1e} {tuple(wanted.shape)}")
