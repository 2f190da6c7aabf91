"""The batched adapter matmuls made fast. `attach(..., mix=kernels.mix_skills)` takes the place of
orchmoe.mix_skills: the same function, compiled on CUDA. mix_factors is the other function of the family:
skills mix their factors (Poly, MHR). Each has a slow twin with the same signature, the plain sum over skills,
which is its specification.

B batch, L length, D d_in, O d_out, S skills, R rank, H heads.  Test: pytest tests/test_kernels.py"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


def _mix_skills(x: Tensor, A: Tensor, B: Tensor, c: Tensor, scale: float) -> Tensor:
    S, R, D = A.shape
    h = F.linear(x, A.reshape(S * R, D).to(x.dtype))  # (B,L,SR): both concatenations are free views
    c = (scale * c).to(x)
    c = (c if c.dim() == 3 else c.unsqueeze(1)).unsqueeze(-1)  # (B,1 or L,S,1)
    return (h.unflatten(-1, (S, R)) * c).flatten(-2) @ B.reshape(S * R, -1).to(x.dtype)


def _mix_factors(x: Tensor, A: Tensor, B: Tensor, c: Tensor, scale: float) -> Tensor:
    S, R, D = A.shape
    c = c.unsqueeze(1) if c.dim() == 2 else c  # (B,H,S)
    H = c.shape[1]
    c = c.to(x)
    A_mix = torch.einsum("bhs,srhd->brhd", c, A.to(x.dtype).view(S, R, H, -1)).flatten(2)  # (B,R,D)
    B_mix = torch.einsum("bhs,srho->brho", c, B.to(x.dtype).view(S, R, H, -1)).flatten(2)  # (B,R,O)
    return torch.matmul(torch.matmul(x, A_mix.mT) * scale, B_mix)


@cache
def _compiled(function):
    return torch.compile(function, dynamic=True)


def _fast(function, x: Tensor, *rest):
    """Compiled for training on CUDA. Not for generation, where rows come and go and a batch of one is a graph
    of its own; not inside a compiled block, which takes the function as it is; not on the CPU."""
    worth = x.is_cuda and torch.is_grad_enabled() and min(x.shape[:2]) > 1
    return (_compiled(function) if worth and not torch.compiler.is_compiling() else function)(x, *rest)


def mix_skills(x: Tensor, A: Tensor, B: Tensor, c: Tensor, scale: float) -> Tensor:
    """scale * sum_s c_s B_s A_s x: outputs mixed, two GEMMs of the concatenated rank S R.

    x (B,L,D); A (S,R,D); B (S,R,O); c (B,S), (1,S) or (B,L,S) -> (B,L,O) in x's dtype. Weights and c are cast
    to x's dtype. Saves 2 B L S R elements for backward beside x."""
    return _fast(_mix_skills, x, A, B, c, scale)


def mix_factors(x: Tensor, A: Tensor, B: Tensor, c: Tensor, scale: float) -> Tensor:
    """scale * (sum_s c_s B_s)(sum_s c_s A_s) x: factors mixed once per sample, then two batched GEMMs (Ponti
    et al. 2023).

    x (B,L,D); A (S,R,D); B (S,R,O); c (B,S), or (B,H,S) with a mixture for each of H heads, which split A
    over D and B over O (Caccia et al. 2023); 1 for B where all samples share it -> (B,L,O) in x's dtype."""
    return _fast(_mix_factors, x, A, B, c, scale)


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
