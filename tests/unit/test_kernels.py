"""kernels.py against slow twins in float64: outputs and every gradient, for all forms of c, with
and without the frozen weight; what backward keeps and computes; autocast; how many kernels a GPU
would launch. The scale is 1.5, since the default of 1 hides a scale that is applied twice."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import kernels
import orchmoe
from baselines import attach_method
from helpers import seeded_generator
from orchmoe import OrchMoEConfig

S, R, D, D_OUT, B, L = 3, 2, 8, 12, 4, 5
FORMS = {"sample": (B, S), "shared": (1, S), "token": (B, L, S)}
FACTOR_FORMS = {  # how factors are mixed, and the shape of c
    "sample": (orchmoe.mix_factors, (B, S)),
    "shared": (orchmoe.mix_factors, (1, S)),
    "heads": (kernels.mix_heads, (B, 4, S)),
    "shared heads": (kernels.mix_heads, (1, 2, S)),
}
forms = pytest.mark.parametrize("shape", FORMS.values(), ids=FORMS)
both = pytest.mark.parametrize(
    "mix", [kernels.mix_skills, orchmoe.mix_skills], ids=["kernels", "orchmoe"]
)


def mix_skills_slow(x, A, B, c, scale, weight=None, bias=None):
    """mix_skills as its equation has it: a loop over skills."""
    if c.dim() == 2:
        c = c.unsqueeze(1)  # (B,1,S)
    mixed = scale * sum(c[..., s, None] * (x @ A[s].T @ B[s]) for s in range(len(A)))
    return mixed if weight is None else F.linear(x, weight, bias) + mixed


def mix_factors_slow(x, A, B, c, scale, weight=None, bias=None):
    """The mix of factors as its equation has it, with the products of all factors and weights."""
    if c.dim() == 2:
        c = c.unsqueeze(1)  # (B,1,S): one head
    weights = c.mT[:, :, None, :, None]  # (B,S,1,H,1)

    def mixed(factors):
        heads = factors.unflatten(-1, (c.shape[1], -1))  # (S,R,H,D/H)
        return (weights * heads).sum(1).flatten(2)  # (B,R,D)

    y = scale * x @ mixed(A).mT @ mixed(B)
    return y if weight is None else F.linear(x, weight, bias) + y


def arguments(shape, dtype=torch.float64, linear="weight bias"):
    """Return x, A, B, c, scale, and what `linear` names of the frozen Linear, weight and bias."""
    generator = seeded_generator()

    def random(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    trained = [random(B, L, D), random(S, R, D), random(S, R, D_OUT), random(*shape)]
    frozen = {"weight": random(D_OUT, D), "bias": random(D_OUT)}
    x, A, B_, c = (tensor.requires_grad_() for tensor in trained)
    return x, A, B_, c, 1.5, *(frozen[name] for name in linear.split())


def outputs_and_gradients(function, arguments):
    """Return y, and the gradient of each argument that takes one."""
    y = function(*arguments)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    trained = [t for t in arguments if isinstance(t, Tensor) and t.requires_grad]
    return y, *torch.autograd.grad((y * weights).sum(), trained)


def assert_equal_twins(fast, slow, arguments):
    found = outputs_and_gradients(fast, arguments)
    expected = outputs_and_gradients(slow, arguments)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("linear", ["", "weight", "weight bias"])
@forms
@both
def test_mix_skills_equals_its_equation(mix, shape, linear):
    x, *rest = arguments(shape, linear=linear)
    not_contiguous = x.mT.contiguous().mT
    for x_ in (x, not_contiguous):
        assert_equal_twins(mix, mix_skills_slow, (x_, *rest))


@pytest.mark.parametrize("linear", ["", "weight bias"])
@pytest.mark.parametrize("mix, shape", FACTOR_FORMS.values(), ids=FACTOR_FORMS)
def test_a_mix_of_factors_equals_its_equation(mix, shape, linear):
    assert_equal_twins(mix, mix_factors_slow, arguments(shape, linear=linear))


@pytest.mark.parametrize("linear", ["", "weight"])
@forms
def test_the_only_argument_that_trains_gets_its_gradient(shape, linear):
    """The scale is 1, which has a form of its own."""
    for trained in range(4):
        given = list(arguments(shape, linear=linear))
        given[4] = 1.0
        for i in range(4):
            given[i] = given[i].detach().requires_grad_(i == trained)
        assert_equal_twins(kernels.mix_skills, mix_skills_slow, given)


def test_the_output_may_be_changed_in_place():
    def changed(mix):
        def function(*given):
            y = mix(*given)
            return y.mul_(y.detach().clone())

        return function

    given = arguments(FORMS["sample"])
    assert_equal_twins(changed(kernels.mix_skills), changed(mix_skills_slow), given)


def test_a_second_derivative_is_an_error():
    x, *rest = arguments(FORMS["sample"])
    y = kernels.mix_skills(x, *rest)
    [dx] = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_the_gradient_of_x_is_computed_only_if_it_is_needed():
    def work(trains):
        """Return the number of operations in matrix products, forward and backward."""
        x, *rest = arguments(FORMS["token"])
        with FlopCounterMode(display=False) as counter:
            kernels.mix_skills(x.requires_grad_(trains), *rest).sum().backward()
        return counter.get_total_flops()

    assert work(True) - work(False) >= 2 * B * L * D * D_OUT


@forms
@both
def test_backward_keeps_two_hidden_matrices_beside_x(mix, shape):
    given = arguments(shape)
    kept = {}  # bytes of each storage that is kept

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mix(*given)
    for tensor in (*given[:4], *given[5:]):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    hidden = 2 * B * L * S * R
    c = given[3].numel() * R  # the weight of each skill, once for each rank
    # Fewer bytes would mean that backward keeps tensors in a way that is not counted here.
    assert 8 * hidden <= sum(kept.values()) <= 8 * (hidden + c)


@both
def test_autocast_computes_in_bfloat16_and_gradients_keep_their_dtype(mix):
    given = arguments(FORMS["token"], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs_and_gradients(mix, given)
        assert mix(*arguments(FORMS["token"])).dtype == torch.float64  # autocast leaves it alone
    expected = outputs_and_gradients(mix_skills_slow, given)
    assert found[0].dtype == torch.bfloat16
    for half, exact in zip(found[1:], expected[1:], strict=True):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, exact, rtol=0.05, atol=0.03 * exact.abs().max().item())


@pytest.mark.parametrize("inside", [True, False], ids=["island", "forward outside"])
def test_backward_computes_in_the_dtype_of_forward_whatever_autocast_says(inside):
    """A float32 island in an autocast step, or a step that enters autocast after forward."""
    given = arguments(FORMS["token"], torch.float32)
    expected = outputs_and_gradients(kernels.mix_skills, given)
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        with torch.autocast("cpu", enabled=False):
            y = kernels.mix_skills(*given)
        with torch.autocast("cpu", torch.bfloat16):
            found = outputs_and_gradients(lambda *_: y, given)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


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


# Forward: casts of A and B, h, hc, and the product that is added to y. Backward: dB, its cast, dhc,
# two for dc, dh, dA, its cast, and the product that is added to dx. A LoRA has no dc.
ADDED = [
    ("orchmoe", "outputs", [6, 10]),
    ("lora", "outputs", [6, 8]),
    ("orchmoe", "factors", [10, 16]),
]


@pytest.mark.parametrize("method, mixing, expected", ADDED)
def test_an_adapted_linear_adds_few_launches(method, mixing, expected):
    """docs/speed.md has these numbers, less the one launch of the frozen Linear."""
    base = torch.nn.Sequential(torch.nn.Linear(D, D_OUT, bias=False)).bfloat16()
    base.requires_grad_(False)
    x = torch.randn(B, L, D).bfloat16().requires_grad_()
    assert launches(base, x, [x]) == [1, 1]
    config = OrchMoEConfig(targets=("0",), mixing=mixing, alpha=3.0)
    adapters = attach_method(method, base, config)
    with adapters.routed(x.detach()):
        trained = [x, *base[0].skill_parameters().values(), base[0].skill_weights]
        assert launches(base, x, [t for t in trained if t.requires_grad]) == expected
