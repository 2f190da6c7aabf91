"""Fast forms of the two ways to mix skills.

`mix_skills` computes the same as orchmoe.mix_skills, which is its plain specification and has the
same signature. It treats a frozen Linear and its skills as one function with its own backward.
`mix_factors` mixes the factors of the skills instead of their outputs (Poly, MHR).
`--compile` compiles them as a part of their block.

    orchmoe.attach(model, config, mix=kernels.mix_skills)

Letters: B batch, L length, D input width, O output width, S skills, R rank, H heads, M = B L.
Test: pytest tests/unit/test_kernels.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _LinearWithSkills(torch.autograd.Function):
    """y = x W0^T + b + hc B, where h = x A^T and hc = h * c.

    A (SR,D) and B (SR,O) hold the factors of all skills below one another, so two products serve
    all skills and nothing of shape (M,S,O) exists. c contains the scale.

    Why this is a function of its own: autograd would compute the same numbers, but it would write
    the two terms of y (and of dx) to separate tensors and then add them. Here the second term is
    added in place. W0 and b are frozen and get no gradient.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, A: Tensor, B: Tensor, c: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """Return y (M,O). The caller unflattens it, since a view from in here is read-only.

        x (B,L,D), A (SR,D), B (SR,O), c (B or 1,L or 1,SR), weight (O,D), bias (O): one dtype.
        """
        shape = x.shape[:2]  # (B,L)
        x = x.flatten(0, 1)  # (M,D)

        h = x @ A.T  # (M,SR)
        hc = (h.unflatten(0, shape) * c).flatten(0, 1)  # (M,SR)
        if weight is None:
            y = hc @ B  # (M,O)
        else:
            y = F.linear(x, weight, bias)
            y.addmm_(hc, B)  # y += hc B

        ctx.save_for_backward(x, A, B, c, h, hc, weight)
        ctx.shape = shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        """Return the gradients of forward's arguments, given that of y (M,O)."""
        x, A, B, c, h, hc, weight = ctx.saved_tensors
        needs_x, needs_A, needs_B, needs_c, _, _ = ctx.needs_input_grad
        dx = dA = dB = dc = None
        shape = ctx.shape  # (B,L)

        # y = x W0^T + b + hc B
        if needs_B:
            dB = hc.T @ dy  # (SR,O)

        # hc = h * c
        if needs_x or needs_A or needs_c:
            dhc = dy @ B.T  # (M,SR)
            if needs_c:
                # Where all tokens or all samples share c, this sums over L or B.
                dc = (dhc * h).unflatten(0, shape).sum_to_size(c.shape)
            dh = (dhc.unflatten(0, shape) * c).flatten(0, 1)  # (M,SR)

        # h = x A^T
        if needs_A:
            dA = dh.T @ x  # (SR,D)
        if needs_x:
            if weight is None:
                dx = dh @ A  # (M,D)
            else:
                dx = dy @ weight
                dx.addmm_(dh, A)  # dx += dh A
            dx = dx.unflatten(0, shape)
        return dx, dA, dB, dc, None, None


def mix_skills(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    c: Tensor,
    scale: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return weight x + bias + scale * sum_s c_s B_s A_s x: the outputs of the skills are mixed.

    x (B,L,D); A (S,R,D); B (S,R,O); c (B,S), (1,S) or (B,L,S) -> (B,L,O) in x's dtype.
    Without `weight` (O,D) the result is the sum over the skills alone. weight and bias are frozen
    and get no gradient. Backward keeps x and 2 M S R numbers; there is no second derivative.
    """
    S, R, D = A.shape

    # Autocast casts the inputs of single operations. This is one function, so it casts them here.
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if autocast and x.dtype != torch.float64:  # autocast leaves float64 alone
        dtype = torch.get_autocast_dtype(device)
        x = x.to(dtype)
        if weight is not None:
            weight = weight.to(dtype)
        if bias is not None:
            bias = bias.to(dtype)

    # The skills are cast to x's dtype, never x to theirs. The reshapes are free views.
    A = A.reshape(S * R, D).to(x.dtype)
    B = B.reshape(S * R, -1).to(x.dtype)
    if c.dim() == 2:
        c = c.unsqueeze(1)  # (B,1,S): the same for all tokens of a sample
    c = (scale * c).to(x).repeat_interleave(R, dim=-1)  # one number for each rank of each skill
    y = _LinearWithSkills.apply(x, A, B, c, weight, bias)  # (M,O)
    return y.unflatten(0, x.shape[:2])


def mix_factors(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    c: Tensor,
    scale: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return weight x + bias + scale * (sum_s c_s B_s) (sum_s c_s A_s) x: the factors are mixed.

    x (B,L,D); A (S,R,D); B (S,R,O); c (B,S), or (B,H,S) with one mixture for each of H heads; one
    row serves all samples -> (B,L,O) in x's dtype. Heads split A over D and B over O.
    Sources: Ponti et al. 2023 (Poly); Caccia et al. 2023 (heads).
    """
    S, R, _ = A.shape
    if c.dim() == 2:
        c = c.unsqueeze(1)  # (B,1,S): one head
    c = c.to(x)
    H = c.shape[1]

    A = A.to(x.dtype).view(S, R, H, -1)  # (S,R,H,D/H)
    B = B.to(x.dtype).view(S, R, H, -1)  # (S,R,H,O/H)
    A_mix = torch.einsum("bhs,srhd->brhd", c, A).flatten(2)  # (B,R,D)
    B_mix = torch.einsum("bhs,srho->brho", c, B).flatten(2)  # (B,R,O)

    h = x @ A_mix.mT  # (B,L,R)
    mixed = (h * scale) @ B_mix  # (B,L,O)
    if weight is None:
        return mixed
    return F.linear(x, weight, bias).add_(mixed)
