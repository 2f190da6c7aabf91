"""kernels.py against its slow twins in float64: outputs and every gradient, all forms of c; memory;
compilation."""

import pytest
import torch
from torch import Tensor

import kernels
import orchmoe

S, R, D, D_OUT, B, L = 3, 2, 8, 12, 4, 5
FORMS = {"sample": (B, S), "shared": (1, S), "token": (B, L, S)}
FACTOR_FORMS = {"poly": (B, S), "shared": (1, S), "mhr": (B, 4, S)}


def mix_skills_slow(x: Tensor, A: Tensor, B: Tensor, c: Tensor, scale: float) -> Tensor:
    """mix_skills as the equation has it: a loop over skills."""
    c = c if c.dim() == 3 else c.unsqueeze(1)  # (B,1 or L,S)
    return scale * sum(c[..., s, None] * (x @ A[s].T @ B[s]) for s in range(len(A)))


def mix_factors_slow(x: Tensor, A: Tensor, B: Tensor, c: Tensor, scale: float) -> Tensor:
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
    return torch.stack(outputs)


def arguments(shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for size in ((B, L, D), (S, R, D), (S, R, D_OUT), shape)
    ]
    return *tensors, 0.7


def outputs_and_gradients(function, arguments):
    y = function(*arguments)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    return y, *torch.autograd.grad((y * weights).sum(), arguments[:4])


@pytest.mark.parametrize("shape", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("fast", [kernels.mix_skills, orchmoe.mix_skills], ids=["kernels", "orchmoe"])
def test_mix_skills_is_its_slow_twin(fast, shape):
    expected = outputs_and_gradients(mix_skills_slow, arguments(shape))
    for found, wanted in zip(outputs_and_gradients(fast, arguments(shape)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", FACTOR_FORMS.values(), ids=FACTOR_FORMS)
def test_mix_factors_is_its_slow_twin(shape):
    expected = outputs_and_gradients(mix_factors_slow, arguments(shape))
    for found, wanted in zip(
        outputs_and_gradients(kernels.mix_factors, arguments(shape)), expected, strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


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


@pytest.mark.parametrize("function", [kernels.mix_skills, orchmoe.mix_skills], ids=["kernels", "orchmoe"])
def test_backward_keeps_two_hidden_matrices_beside_x(function):
    x, A, B_, c, scale = arguments(FORMS["sample"])
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        function(x, A, B_, c, scale)
    own = {t.untyped_storage().data_ptr() for t in (x, A, B_)}
    elements = sum(
        t.untyped_storage().nbytes() // t.element_size() for pointer, t in kept.items() if pointer not in own
    )
    assert elements <= 2 * B * L * S * R + 2 * B * S * R  # and the weights of the samples


@pytest.mark.parametrize("function", [kernels._mix_skills, kernels._mix_factors])
def test_one_graph_without_breaks_for_all_shapes(function):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (5, 7, 9):
        x, A, B_, c, scale = arguments((B, S))
        x = x[:, :1].expand(-1, length, -1)
        torch.testing.assert_close(compiled(x, A, B_, c, scale), function(x, A, B_, c, scale))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("shape", FORMS.values(), ids=FORMS)
def test_cuda_is_the_cpu_in_float64(shape, dtype, tolerance):
    expected = outputs_and_gradients(mix_skills_slow, arguments(shape))
    moved = [
        t.detach().to("cuda", dtype).requires_grad_() if isinstance(t, torch.Tensor) else t
        for t in arguments(shape)
    ]
    for found, wanted in zip(outputs_and_gradients(kernels.mix_skills, moved), expected, strict=True):
        torch.testing.assert_close(
            found.double().cpu(), wanted, rtol=tolerance, atol=tolerance * wanted.abs().max()
        )
