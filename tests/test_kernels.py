"""kernels.py against its slow twins in float64: outputs and every gradient, all forms of c, with and without
the frozen weight; what backward keeps and computes; checkpointing, autocast, compilation."""

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
EXACT = dict(rtol=1e-10, atol=1e-12)
forms = pytest.mark.parametrize("shape", FORMS.values(), ids=FORMS)
fasts = pytest.mark.parametrize("fast", [kernels.mix_skills, orchmoe.mix_skills], ids=["kernels", "orchmoe"])


def mix_skills_slow(x: Tensor, A: Tensor, B: Tensor, c: Tensor, scale: float, weight: Tensor | None = None,
                    bias: Tensor | None = None) -> Tensor:
    """mix_skills as the equation has it: a loop over skills."""
    c = c if c.dim() == 3 else c.unsqueeze(1)  # (B,1 or L,S)
    mixed = scale * sum(c[..., s, None] * (x @ A[s].T @ B[s]) for s in range(len(A)))
    return mixed if weight is None else F.linear(x, weight, bias) + mixed


def mix_factors_slow(x: Tensor, A: Tensor, B: Tensor, c: Tensor, scale: float, weight: Tensor | None = None,
                     bias: Tensor | None = None) -> Tensor:
    """mix_factors as the equation has it: a loop over samples and heads that builds each pair of factors."""
    c = c.unsqueeze(1) if c.dim() == 2 else c  # (B,H,S)
    outputs = []
    for b, row in enumerate(c.expand(x.shape[0], -1, -1)):  # row (H,S)
        parts_A, parts_B = A.chunk(len(row), dim=-1), B.chunk(len(row), dim=-1)
        A_mix = torch.cat([sum(w * a for w, a in zip(head, part, strict=True))
                           for head, part in zip(row, parts_A, strict=True)], dim=-1)  # (R,D)
        B_mix = torch.cat([sum(w * b for w, b in zip(head, part, strict=True))
                           for head, part in zip(row, parts_B, strict=True)], dim=-1)  # (R,O)
        outputs.append(scale * x[b] @ A_mix.T @ B_mix)
    mixed = torch.stack(outputs)
    return mixed if weight is None else F.linear(x, weight, bias) + mixed


def arguments(shape, dtype=torch.float64, linear=""):
    """x, A, B, c, scale, and of the frozen Linear what is named: "", "weight" or "weight bias"."""
    generator = torch.Generator().manual_seed(0)
    x, A, B_, c, weight, bias = (
        torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for size in ((B, L, D), (S, R, D), (S, R, D_OUT), shape, (D_OUT, D), (D_OUT,)))
    frozen = [weight.detach()] * ("weight" in linear) + [bias.detach()] * ("bias" in linear)
    return x, A, B_, c, 0.7, *frozen


def outputs_and_gradients(function, arguments):
    """y and the gradient of each that takes one."""
    y = function(*arguments)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    trained = [t for t in arguments if isinstance(t, Tensor) and t.requires_grad]
    return y, *torch.autograd.grad((y * weights).sum(), trained)


def assert_equal_twins(fast, slow, arguments):
    expected = outputs_and_gradients(slow, arguments)
    for found, wanted in zip(outputs_and_gradients(fast, arguments), expected, strict=True):
        torch.testing.assert_close(found, wanted, **EXACT)


@pytest.mark.parametrize("source", ["leaf", "no gradient", "transposed"])
@pytest.mark.parametrize("linear", ["", "weight", "weight bias"])
@forms
@fasts
def test_mix_skills_is_its_slow_twin(fast, shape, linear, source):
    x, *rest = arguments(shape, linear=linear)
    if source == "no gradient":
        x.requires_grad_(False)
    elif source == "transposed":  # not contiguous
        x = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert_equal_twins(fast, mix_skills_slow, (x, *rest))


@pytest.mark.parametrize("linear", ["", "weight bias"])
@forms
def test_gradients_are_those_of_finite_differences(shape, linear):
    assert torch.autograd.gradcheck(kernels.mix_skills, arguments(shape, linear=linear))


@pytest.mark.parametrize("size", [(0, L), (B, 0)])
@fasts
def test_an_empty_batch_is_none_the_worse(fast, size):
    x, A, B_, c, *rest = arguments(FORMS["sample"], linear="weight bias")
    x, c = x.detach()[: size[0], : size[1]].requires_grad_(), c[: size[0]]
    y = fast(x, A, B_, c, *rest)
    y.sum().backward()
    assert y.shape == (*size, D_OUT) and not A.grad.any() and x.grad.shape == x.shape


@forms
def test_what_is_trained_alone_gets_its_gradient(shape):
    for trained in range(4):
        given = [t.detach() if isinstance(t, Tensor) else t for t in arguments(shape, linear="weight")]
        given[trained].requires_grad_()
        assert_equal_twins(kernels.mix_skills, mix_skills_slow, given)


def test_the_frozen_weight_never_gets_a_gradient():
    *given, weight, bias = arguments(FORMS["sample"], linear="weight bias")
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    kernels.mix_skills(*given, weight, bias).sum().backward()
    assert weight.grad is None and bias.grad is None and given[0].grad.any()


def test_a_second_derivative_is_an_error():
    x, *rest = arguments(FORMS["sample"], linear="weight")
    y = kernels.mix_skills(x, *rest)
    [dx] = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


class Sizes(TorchDispatchMode):
    """The shapes of all that is computed inside."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.seen |= {tuple(t.shape) for t in (out if isinstance(out, tuple | list) else [out])
                      if isinstance(t, Tensor)}  # fmt: skip
        return out


@pytest.mark.parametrize("linear", ["", "weight bias"])
@forms
@fasts
def test_no_tensor_has_an_output_for_each_skill(fast, shape, linear):
    given = arguments(shape, linear=linear)
    with Sizes() as sizes:
        fast(*given).sum().backward()
    assert (B * L, S * R) in sizes.seen or (B, L, S * R) in sizes.seen
    assert max(torch.Size(size).numel() for size in sizes.seen) < B * L * S * min(D, D_OUT)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_source_without_gradient_has_none_computed(frozen):
    x, *rest = arguments(FORMS["token"], linear="weight bias")
    y = kernels.mix_skills(x.requires_grad_(not frozen), *rest)
    with Sizes() as sizes:
        y.sum().backward()
    assert ((B * L, D) in sizes.seen) is not frozen and (S * R, D) in sizes.seen


@forms
def test_checkpointed_it_is_the_same(shape):
    def again(*given):
        return checkpoint(kernels.mix_skills, *given, use_reentrant=False)

    assert_equal_twins(again, kernels.mix_skills, arguments(shape, linear="weight bias"))


@forms
@fasts
def test_under_autocast_it_computes_in_bfloat16_and_gradients_keep_their_dtype(fast, shape):
    given = arguments(shape, torch.float32, linear="weight bias")
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs_and_gradients(fast, given)
    expected = outputs_and_gradients(mix_skills_slow, given)
    assert found[0].dtype == torch.bfloat16
    for half, exact in zip(found[1:], expected[1:], strict=True):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, exact, rtol=0.05, atol=0.03 * exact.abs().max().item())


def test_autocast_leaves_float64_alone():
    given = arguments(FORMS["sample"], linear="weight bias")
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (mix(*given) for mix in (kernels.mix_skills, orchmoe.mix_skills))
    assert found.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("linear", ["", "weight bias"])
@pytest.mark.parametrize("shape", FACTOR_FORMS.values(), ids=FACTOR_FORMS)
def test_mix_factors_is_its_slow_twin(shape, linear):
    assert_equal_twins(kernels.mix_factors, mix_factors_slow, arguments(shape, linear=linear))


def test_outputs_and_factors_mix_to_different_functions():
    x, A, B_, c, scale = arguments(FORMS["sample"])
    assert not torch.allclose(
        kernels.mix_skills(x, A, B_, c, scale), kernels.mix_factors(x, A, B_, c, scale), rtol=0.1
    )


def test_bfloat16_input_gives_bfloat16_output_from_float32_weights():
    x, A, B_, c, scale = arguments(FORMS["sample"], torch.float32)
    y = kernels.mix_skills(x.bfloat16(), A, B_, c, scale)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), kernels.mix_skills(x, A, B_, c, scale), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("linear", ["", "weight bias"])
@forms
@fasts
def test_backward_keeps_two_hidden_matrices_beside_x(fast, shape, linear):
    given, kept = arguments(shape, linear=linear), {}
    with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):  # fmt: skip
        fast(*given)
    own = {t.untyped_storage().data_ptr() for t in given if isinstance(t, Tensor)}
    kept = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)
    c = torch.Size(shape).numel() * R  # each skill's weight, once a rank
    assert kept <= 8 * (2 * B * L * S * R + c)


@pytest.mark.parametrize("function, form", [*((kernels.mix_skills, form) for form in FORMS),
                                            (kernels.mix_factors, "sample")])  # fmt: skip
def test_one_graph_without_breaks_for_all_shapes(function, form):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (5, 7, 9):
        x, A, B_, c, *rest = arguments(FORMS[form], linear="weight bias")
        x, c = (t.detach()[:, :1].repeat(1, length, 1).requires_grad_() if t.dim() == 3 else t
                for t in (x, c))  # fmt: skip
        assert_equal_twins(compiled, function, (x, A, B_, c, *rest))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("linear", ["", "weight bias"])
@forms
def test_cuda_is_the_cpu_in_float64(shape, linear, dtype, tolerance):
    given = arguments(shape, linear=linear)
    expected = outputs_and_gradients(mix_skills_slow, given)
    moved = [t.detach().to("cuda", dtype).requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t
             for t in given]  # fmt: skip
    for found, wanted in zip(outputs_and_gradients(kernels.mix_skills, moved), expected, strict=True):
        torch.testing.assert_close(
            found.double().cpu(), wanted, rtol=tolerance, atol=tolerance * wanted.abs().max()
        )
