"""The batched adapter matmuls made fast: `attach(..., mix=kernels.mix_skills)` in place of the specification,
orchmoe.mix_skills, whose signature all share. A frozen Linear and its skills are ONE function with a backward
of its own; on CUDA it is compiled. mix_factors is the other function of the family: skills mix their factors
(Poly, MHR).

B batch, L length, D d_in, O d_out, S skills, R rank, H heads, N = B L.  Test: pytest tests/test_kernels.py"""

from functools import cache, partial, wraps

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _SkillLinear(torch.autograd.Function):
    """y = W0 x + b + ((x A_cat) * c) B_cat with A_cat (D,SR), B_cat (SR,O): both are free views.

    Autograd alone would keep what it needs as well, but write y and dx twice: here W0's products and those of
    the skills accumulate in place. Nothing of shape (N,S,O) exists, and W0 gets no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, A: Tensor, B: Tensor, c: Tensor, weight: Tensor | None,
                bias: Tensor | None) -> Tensor:
        """x (B,L,D), A (SR,D), B (SR,O), c (B or 1,L or 1,SR), all of one dtype -> (B,L,O)."""
        rows = x.flatten(0, 1)  # (N,D)
        h = rows @ A.T  # (N,SR)
        hc = (h.unflatten(0, x.shape[:2]) * c).flatten(0, 1)  # (N,SR)
        y = hc @ B if weight is None else F.linear(rows, weight, bias).addmm_(hc, B)
        ctx.save_for_backward(rows, A, B, c, h, hc, weight)
        return y.unflatten(0, x.shape[:2])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        rows, A, B, c, h, hc, weight = ctx.saved_tensors
        dx = dA = dB = dc = None
        shape, dy = dy.shape[:2], dy.flatten(0, 1)  # (B,L), (N,O)
        if ctx.needs_input_grad[2]:
            dB = hc.T @ dy
        if any(ctx.needs_input_grad[i] for i in (0, 1, 3)):
            dhc = dy @ B.T  # (N,SR)
            if ctx.needs_input_grad[3]:
                dc = (dhc * h).unflatten(0, shape).sum_to_size(c.shape)  # over L and B where c is shared
            dh = (dhc.unflatten(0, shape) * c).flatten(0, 1)
            if ctx.needs_input_grad[1]:
                dA = dh.T @ rows
            if ctx.needs_input_grad[0]:
                dx = dh @ A if weight is None else (dy @ weight).addmm_(dh, A)
                dx = dx.unflatten(0, shape)
        return dx, dA, dB, dc, None, None


_compiled = cache(partial(torch.compile, dynamic=True))


def _fast(function):
    """Compiled for training on CUDA. Not for generation, where rows come and go and a batch of one is a graph
    of its own; not inside a compiled block, which takes the function as it is; not on the CPU."""
    @wraps(function)
    def mix(x: Tensor, *rest):
        worth = x.is_cuda and torch.is_grad_enabled() and min(x.shape[:2]) > 1
        return (_compiled(function) if worth and not torch.compiler.is_compiling() else function)(x, *rest)

    return mix


@_fast
def mix_skills(x: Tensor, A: Tensor, B: Tensor, c: Tensor, scale: float, weight: Tensor | None = None,
               bias: Tensor | None = None) -> Tensor:
    """weight x + bias, where weight (O,D) is given, + scale * sum_s c_s B_s A_s x: outputs mixed, two GEMMs
    of the concatenated rank S R.

    x (B,L,D); A (S,R,D); B (S,R,O); c (B,S), (1,S) or (B,L,S) -> (B,L,O) in x's dtype. Backward keeps x and 2
    N S R elements; weight and bias, frozen, get no gradient, and once is as often as it can be taken."""
    S, R, D = A.shape
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if autocast and x.dtype != torch.float64:  # which it leaves alone
        # Autocast sees single operations; this is one function, whose inputs must be of one dtype.
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = (t if t is None else t.to(dtype) for t in (x, weight, bias))
    # Weights of the skills are cast to x's dtype, never x to theirs.
    A, B = A.reshape(S * R, D).to(x.dtype), B.reshape(S * R, -1).to(x.dtype)
    c = (scale * (c if c.dim() == 3 else c.unsqueeze(1))).to(x).repeat_interleave(R, dim=-1)
    return _SkillLinear.apply(x, A, B, c, weight, bias)  # c (B or 1,L or 1,SR)


@_fast
def mix_factors(x: Tensor, A: Tensor, B: Tensor, c: Tensor, scale: float, weight: Tensor | None = None,
                bias: Tensor | None = None) -> Tensor:
    """The same with scale * (sum_s c_s B_s)(sum_s c_s A_s) x: factors mixed once per sample, then two batched
    GEMMs (Ponti et al. 2023).

    x (B,L,D); A (S,R,D); B (S,R,O); c (B,S), or (B,H,S) with a mixture for each of H heads, which split A
    over D and B over O (Caccia et al. 2023); 1 for B where all samples share it -> (B,L,O) in x's dtype."""
    S, R, D = A.shape
    c = (c.unsqueeze(1) if c.dim() == 2 else c).to(x)  # (B,H,S)
    H = c.shape[1]
    A_mix = torch.einsum("bhs,srhd->brhd", c, A.to(x.dtype).view(S, R, H, -1)).flatten(2)  # (B,R,D)
    B_mix = torch.einsum("bhs,srho->brho", c, B.to(x.dtype).view(S, R, H, -1)).flatten(2)  # (B,R,O)
    mixed = torch.matmul(torch.matmul(x, A_mix.mT) * scale, B_mix)
    return mixed if weight is None else F.linear(x, weight, bias).add_(mixed)
