"""kernels.mix_skills and orchmoe.mix_skills against a loop in float64: outputs and all gradients.

Also: autocast, what backward keeps, and how many kernels a GPU would launch. The scale is 1.5,
since the default of 1 hides a scale that is applied twice.
"""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
import orchmoe
from baselines import attach_method
from helpers import seeded_generator
from orchmoe import OrchMoEConfig

S, R, D, D_OUT, B, L = 3, 2, 8, 12, 4, 5
FORMS = {"sample": (B, S), "shared": (1, S), "token": (B, L, S)}
forms = pytest.mark.parametrize("shape", FORMS.values(), ids=FORMS)
both = pytest.mark.parametrize(
    "mix", [kernels.mix_skills, orchmoe.mix_skills], ids=["kernels", "orchmoe"]
)


def mix_skills_slow(x, y, A, B, c, scale):
    """mix_skills as its equation has it: a loop over skills."""
    if c.dim() == 2:
        c = c.unsqueeze(1)  # (B,1,S)
    return y + scale * sum(c[..., s, None] * (x @ A[s].T @ B[s]) for s in range(len(A)))


def arguments(shape):
    """Return x, y, A, B, c (of this shape) and scale."""
    generator = seeded_generator()

    def random(*size):
        values = torch.randn(size, generator=generator, dtype=torch.float64)
        return values.requires_grad_()

    x, y, A = random(B, L, D), random(B, L, D_OUT), random(S, R, D)
    return x, y, A, random(S, R, D_OUT), random(*shape), 1.5


def outputs_and_gradients(function, arguments):
    """Return the output, and the gradient of each argument that takes one."""
    out = function(*arguments)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    trained = [t for t in arguments if isinstance(t, Tensor) and t.requires_grad]
    return out, *torch.autograd.grad((out * weights).sum(), trained)


@forms
@both
def test_mix_skills_equals_its_equation(mix, shape):
    x, y, A, B_, c, scale = arguments(shape)
    turned = [tensor.mT.contiguous().mT for tensor in (x, c)]  # not contiguous
    for x_, c_ in ((x, c), turned):
        found = outputs_and_gradients(mix, (x_, y, A, B_, c_, scale))
        expected = outputs_and_gradients(mix_skills_slow, (x_, y, A, B_, c_, scale))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@both
def test_an_empty_batch_gives_an_empty_output(mix):
    x, y, A, B_, c, scale = arguments(FORMS["sample"])
    assert mix(x[:0], y[:0], A, B_, c[:0], scale).shape == (0, L, D_OUT)


@forms
def test_backward_keeps_two_hidden_matrices_beside_the_inputs(shape):
    given = arguments(shape)
    kept = {}  # bytes of each storage that is kept

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kernels.mix_skills(*given)
    for tensor in given[:5]:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) == 8 * 2 * B * L * S * R


@pytest.mark.parametrize("method", ["orchmoe", "moe-lora", "poly"])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_a_linear_keeps_its_dtype_and_gradients_theirs(method, base_dtype):
    base = torch.nn.Sequential(torch.nn.Linear(D, D_OUT)).to(base_dtype)
    adapters = attach_method(method, base, OrchMoEConfig(targets=("0",)), num_tasks=1)
    for skills in adapters.skills.values():
        torch.nn.init.normal_(skills.B)
    x = torch.randn(B, L, D)
    tasks = torch.zeros(B, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16), adapters.routed(x, task_ids=tasks):
        y = base(x)
        y.sum().backward()
    assert y.dtype == torch.bfloat16
    for parameter in adapters.parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.any()


# -------------------------------------------------------------------------------------- launches


class Launches(TorchDispatchMode):
    """Count the operations for which a GPU launches kernels: all but views and new memory."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.name()
        free = operation.is_view or "empty" in name or name.startswith("prim::")
        if not free and name not in ("aten::_unsafe_view", "aten::detach"):
            self.count += 1
        return operation(*args, **(kwargs or {}))


def launches(model, x, trained):
    """Return the number of launches forward, and backward for the gradients of `trained`."""
    with Launches() as forward:
        y = model(x)
    dy = torch.empty_like(y)
    with Launches() as backward:
        torch.autograd.grad(y, trained, dy)
    return [forward.count, backward.count]


# An orchmoe forward: casts of A and B, h, its product with c, and the product that is added to y.
ADDED = [
    ("orchmoe", [6, 13]),
    ("lora", [6, 11]),
    ("moe-lora", [10, 19]),
    ("poly", [9, 15]),
    ("mhr", [13, 18]),
]


@pytest.mark.parametrize("method, expected", ADDED)
def test_an_adapted_linear_adds_few_launches(method, expected):
    """docs/speed.md has these numbers, less the one launch of the frozen Linear."""
    base = torch.nn.Sequential(torch.nn.Linear(D, D_OUT, bias=False)).bfloat16()
    base.requires_grad_(False)
    x = torch.randn(B, L, D).bfloat16().requires_grad_()
    assert launches(base, x, [x]) == [1, 1]
    config = OrchMoEConfig(targets=("0",), alpha=3.0)
    adapters = attach_method(method, base, config, num_tasks=2)
    [skills] = adapters.skills.values()
    with adapters.routed(x.detach(), task_ids=torch.zeros(B, dtype=torch.long)):
        trained = [x, *skills.parameters(), skills.c]
        assert launches(base, x, [t for t in trained if t.requires_grad]) == expected
