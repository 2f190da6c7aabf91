"""kernels.py against slow twins in float64: outputs and every gradient, for all forms of c, with
and without the frozen weight; what the backward pass keeps and computes; gradient checkpointing,
autocast and compilation."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import kernels
import orchmoe

S, R, D, D_OUT, B, L = 3, 2, 8, 12, 4, 5
FORMS = {"sample": (B, S), "shared": (1, S), "token": (B, L, S)}
FACTOR_FORMS = {"poly": (B, S), "shared": (1, S), "mhr": (B, 4, S)}
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
    """mix_factors as its equation has it: a loop over samples that builds each pair of factors."""
    if c.dim() == 2:
        c = c.unsqueeze(1)  # (B,H,S)
    outputs = []
    for x_b, c_b in zip(x, c.expand(len(x), -1, -1), strict=True):
        A_mix = mixed_heads(A, c_b)  # (R,D)
        B_mix = mixed_heads(B, c_b)  # (R,O)
        outputs.append(scale * x_b @ A_mix.T @ B_mix)
    mixed = torch.stack(outputs)
    return mixed if weight is None else F.linear(x, weight, bias) + mixed


def mixed_heads(factors: Tensor, c: Tensor) -> Tensor:
    """Return sum_s c_hs of head h's part of the factors (S,R,D), for c (H,S): (R,D)."""
    heads = []
    for c_h, part in zip(c, factors.chunk(len(c), dim=-1), strict=True):
        heads.append(sum(c_h[s] * part[s] for s in range(len(part))))
    return torch.cat(heads, dim=-1)


def arguments(shape, dtype=torch.float64, linear=""):
    """Return x, A, B, c, scale, and what `linear` names of the frozen Linear, weight and bias."""
    generator = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    trained = [random(B, L, D), random(S, R, D), random(S, R, D_OUT), random(*shape)]
    weight, bias = random(D_OUT, D), random(D_OUT)
    x, A, B_, c = (tensor.requires_grad_() for tensor in trained)
    frozen = []
    if "weight" in linear:
        frozen.append(weight)
    if "bias" in linear:
        frozen.append(bias)
    return x, A, B_, c, 0.7, *frozen


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


@pytest.mark.parametrize("source", ["leaf", "no gradient", "transposed"])
@pytest.mark.parametrize("linear", ["", "weight", "weight bias"])
@forms
@both
def test_mix_skills_equals_its_slow_twin(mix, shape, linear, source):
    x, *rest = arguments(shape, linear=linear)
    if source == "no gradient":
        x.requires_grad_(False)
    elif source == "transposed":  # not contiguous
        x = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert_equal_twins(mix, mix_skills_slow, (x, *rest))


@pytest.mark.parametrize("linear", ["", "weight bias"])
@forms
def test_gradients_equal_finite_differences(shape, linear):
    assert torch.autograd.gradcheck(kernels.mix_skills, arguments(shape, linear=linear))


@pytest.mark.parametrize("size", [(0, L), (B, 0)])
@both
def test_an_empty_batch_is_accepted(mix, size):
    x, A, B_, c, *rest = arguments(FORMS["sample"], linear="weight bias")
    x = x.detach()[: size[0], : size[1]].requires_grad_()
    y = mix(x, A, B_, c[: size[0]], *rest)
    y.sum().backward()
    assert y.shape == (*size, D_OUT)
    assert x.grad.shape == x.shape
    assert not A.grad.any()


@forms
def test_an_argument_that_trains_alone_gets_its_gradient(shape):
    for trained in range(4):
        given = list(arguments(shape, linear="weight"))
        for i in range(4):
            given[i] = given[i].detach().requires_grad_(i == trained)
        assert_equal_twins(kernels.mix_skills, mix_skills_slow, given)


def test_the_frozen_weight_never_gets_a_gradient():
    *given, weight, bias = arguments(FORMS["sample"], linear="weight bias")
    weight.requires_grad_()
    bias.requires_grad_()
    kernels.mix_skills(*given, weight, bias).sum().backward()
    assert weight.grad is None and bias.grad is None
    assert given[0].grad.any()


def test_a_second_derivative_is_an_error():
    x, *rest = arguments(FORMS["sample"], linear="weight")
    y = kernels.mix_skills(x, *rest)
    [dx] = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


class Sizes(TorchDispatchMode):
    """Collect the shapes of all tensors that are computed inside."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor):
                self.seen.add(value.shape)
        return out


@pytest.mark.parametrize("linear", ["", "weight bias"])
@forms
@both
def test_no_tensor_has_an_output_for_each_skill(mix, shape, linear):
    given = arguments(shape, linear=linear)
    with Sizes() as sizes:
        mix(*given).sum().backward()
    assert (B * L, S * R) in sizes.seen or (B, L, S * R) in sizes.seen
    assert max(size.numel() for size in sizes.seen) < B * L * S * min(D, D_OUT)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_gradient_of_x_is_computed_only_if_it_is_needed(frozen):
    x, *rest = arguments(FORMS["token"], linear="weight bias")
    y = kernels.mix_skills(x.requires_grad_(not frozen), *rest)
    with Sizes() as sizes:
        y.sum().backward()
    assert ((B * L, D) in sizes.seen) is not frozen
    assert (S * R, D) in sizes.seen


@forms
def test_gradient_checkpointing_changes_nothing(shape):
    def checkpointed(*given):
        return checkpoint(kernels.mix_skills, *given, use_reentrant=False)

    assert_equal_twins(checkpointed, kernels.mix_skills, arguments(shape, linear="weight bias"))


@forms
@both
def test_autocast_computes_in_bfloat16_and_gradients_keep_their_dtype(mix, shape):
    given = arguments(shape, torch.float32, linear="weight bias")
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs_and_gradients(mix, given)
    expected = outputs_and_gradients(mix_skills_slow, given)
    assert found[0].dtype == torch.bfloat16
    for half, exact in zip(found[1:], expected[1:], strict=True):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, exact, rtol=0.05, atol=0.03 * exact.abs().max().item())


def test_autocast_leaves_float64_alone():
    given = arguments(FORMS["sample"], linear="weight bias")
    with torch.autocast("cpu", torch.bfloat16):
        found = kernels.mix_skills(*given)
        expected = orchmoe.mix_skills(*given)
    assert found.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("linear", ["", "weight bias"])
@pytest.mark.parametrize("shape", FACTOR_FORMS.values(), ids=FACTOR_FORMS)
def test_mix_factors_equals_its_slow_twin(shape, linear):
    assert_equal_twins(kernels.mix_factors, mix_factors_slow, arguments(shape, linear=linear))


def test_outputs_and_factors_mix_to_different_functions():
    given = arguments(FORMS["sample"])
    outputs = kernels.mix_skills(*given)
    factors = kernels.mix_factors(*given)
    assert not torch.allclose(outputs, factors, rtol=0.1)


def test_bfloat16_input_gives_bfloat16_output_from_float32_weights():
    x, *rest = arguments(FORMS["sample"], torch.float32)
    y = kernels.mix_skills(x.bfloat16(), *rest)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), kernels.mix_skills(x, *rest), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("linear", ["", "weight bias"])
@forms
@both
def test_backward_keeps_two_hidden_matrices_beside_x(mix, shape, linear):
    given = arguments(shape, linear=linear)
    kept = {}  # a tensor of each storage that is kept

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mix(*given)
    for argument in given:
        if isinstance(argument, Tensor):
            kept.pop(argument.untyped_storage().data_ptr(), None)
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    c = torch.Size(shape).numel() * R  # the weight of each skill, once for each rank
    assert size <= 8 * (2 * B * L * S * R + c)


CASES = [(kernels.mix_skills, form) for form in FORMS]
CASES.append((kernels.mix_factors, "sample"))


@pytest.mark.parametrize("mix, form", CASES)
def test_one_graph_without_breaks_serves_all_lengths(mix, form):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(mix, backend="aot_eager", fullgraph=True, dynamic=True)
    x, A, B_, c, *rest = arguments(FORMS[form], linear="weight bias")
    for length in (5, 7, 9):
        x_l = x.detach()[:, :1].repeat(1, length, 1).requires_grad_()
        c_l = c
        if c.dim() == 3:
            c_l = c.detach()[:, :1].repeat(1, length, 1).requires_grad_()
        assert_equal_twins(compiled, mix, (x_l, A, B_, c_l, *rest))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("linear", ["", "weight bias"])
@forms
def test_cuda_equals_the_cpu_in_float64(shape, linear, dtype, tolerance):
    given = arguments(shape, linear=linear)
    expected = outputs_and_gradients(mix_skills_slow, given)
    moved = []
    for value in given:
        if isinstance(value, Tensor):
            value = value.detach().to("cuda", dtype).requires_grad_(value.requires_grad)
        moved.append(value)
    found = outputs_and_gradients(kernels.mix_skills, moved)
    for ours, exact in zip(found, expected, strict=True):
        limit = tolerance * exact.abs().max()
        torch.testing.assert_close(ours.double().cpu(), exact, rtol=tolerance, atol=limit)
