"""Other kinds of skills, and OrchMoE with one change at a time: the ablations.

FactorSkills and TokenSkills are the skills of some baselines, too. Each ablation is a method:

    python train.py --method orchmoe-token
    python -m experiments.compare --ablations

Letters: B batch, L length, D input width, O output width, N adapted Linears, K abstract tasks, S
skills, R rank, M sources.
Test: pytest tests/unit/test_variants.py
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from orchmoe import (
    Adapters,
    OrchMoE,
    Routing,
    Skills,
    TaskRouter,
    full_precision,
    masked_mean,
)

# ----------------------------------------------------------------------------------- the factors


class FactorSkills(Skills):
    """Skills whose factors are mixed: y + scale * (sum_s c_s B_s) (sum_s c_s A_s) x."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y (B,L,O) plus the skills of x (B,L,D)."""
        c = self.weights(x).to(y)  # (B,S)
        A_mix = self.mixed_factors(self.A.to(y), c)  # (B,R,D)
        B_mix = self.mixed_factors(self.B.to(y), c)  # (B,R,O)
        h = x.to(y) @ A_mix.mT  # (B,L,R)
        return y + (self.scale * h) @ B_mix

    def mixed_factors(self, factors: Tensor, c: Tensor) -> Tensor:
        """Return sum_s c_s factors_s (B,R,D) of the factors (S,R,D) of all skills."""
        return torch.einsum("bs,srd->brd", c, factors)


class Factors(OrchMoE):
    """c weighs A_s and B_s, and not B_s A_s x: another reading of Eq. 3, see docs/paper.md."""

    skills_class = FactorSkills


# --------------------------------------------------------------------------------- the token router


class TokenSkills(Skills):
    """Skills whose weights c = softmax(W_task x) are computed anew for each token x.

    W_task (S,D) starts at N(0, 0.02²). There is no bias. The softmax is computed in float32.
    """

    is_linear = False

    def draw_router(self, num_tasks: int, generator: Generator | None) -> None:
        """Draw W_task. Methods call it when the skills of all Linears are drawn."""
        W_task = torch.empty(num_tasks, self.A.shape[-1]).normal_(0, 0.02, generator=generator)
        self.W_task = nn.Parameter(W_task.to(self.A))

    def weights(self, x: Tensor) -> Tensor:
        """Return c (B,L,S) for x (B,L,D)."""
        with full_precision(x.device):
            return F.linear(x.to(self.W_task.dtype), self.W_task).softmax(dim=-1)


class TokenTaskSkills(TokenSkills):
    """Each token x has its own w = softmax(W_task x + b), and c = w Zhat. `routed` gives Zhat."""

    def draw_router(self, num_tasks: int, generator: Generator | None) -> None:
        super().draw_router(num_tasks, generator)
        self.bias = nn.Parameter(self.W_task.new_zeros(num_tasks))

    def shape_of_c(self) -> tuple[int, ...]:
        """Return the shape of Zhat."""
        return len(self.W_task), len(self.B)

    def weights(self, x: Tensor) -> Tensor:
        """Return c (B,L,S) for x (B,L,D)."""
        with full_precision(x.device):
            w = F.linear(x.to(self.W_task.dtype), self.W_task, self.bias).softmax(dim=-1)
            return w @ self.c[0].to(w)


class TokenRouted(OrchMoE):
    """OrchMoE with a router in each Linear, on the input of that Linear. Each token has its own w.

    This is another reading of the paper, see docs/paper.md.
    """

    skills_class = TokenTaskSkills
    router_class = None
    rates = Adapters.rates | {"Z": "allocation", "W_task": "token_router", "bias": "token_router"}

    def __init__(self, *inputs: Any, generator: Generator | None = None, **options: Any):
        super().__init__(*inputs, generator=generator, **options)
        for skills in self.skills.values():
            skills.draw_router(self.config.abstract_tasks, generator)

    def route(self, *_inputs: Any, **_options: Any) -> Routing:
        """Return Zhat (N,1,K,S) in place of c."""
        return Routing(self.allocation_weights().unsqueeze(1), shared=True)


# ----------------------------------------------------------------------------------- the router


class RouterWithoutAttention(TaskRouter):
    """x_hat is the mean of X."""

    def summarise(self, embeddings: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return x_hat (B,D), see TaskRouter.summarise."""
        if mask is None:
            mask = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        if mask.is_floating_point():
            raise ValueError("mask: give booleans or integers, true at real tokens")
        X = F.rms_norm(embeddings.to(self.W_task.dtype), self.mu.shape, eps=1e-6)  # (B,L,D)
        return masked_mean(X, mask.bool())


class RouterWithoutSoftmax(TaskRouter):
    """w = W_task x_hat + b. It starts around 1/K with a standard deviation of 1/K."""

    def __init__(self, width: int, num_tasks: int, generator: Generator | None = None):
        super().__init__(width, num_tasks, generator)
        nn.init.constant_(self.bias, 1 / num_tasks)

    def forward(self, embeddings: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return w (B,K). It may be negative."""
        x_hat = self.summarise(embeddings, mask)
        x_hat = (x_hat - self.mu) / self.sd
        return F.linear(x_hat, self.W_task, self.bias)

    @torch.no_grad()
    def fit(self, x_hat: Tensor, generator: Generator | None = None) -> None:
        super().fit(x_hat, generator)
        logits = (x_hat - self.mu) / self.sd @ self.W_task.T  # (M,K)
        self.W_task /= len(self.W_task) * logits.std().clamp(min=1e-6)


class RouterFromNormal(TaskRouter):
    """W_task starts from N(0, 0.02²), and not from a k-means."""

    @torch.no_grad()
    def fit(self, x_hat: Tensor, generator: Generator | None = None) -> None:
        self.standardise(x_hat)


class WithoutAttention(OrchMoE):
    router_class = RouterWithoutAttention


class WithoutSoftmax(OrchMoE):
    router_class = RouterWithoutSoftmax


class FromNormal(OrchMoE):
    router_class = RouterFromNormal


# --------------------------------------------------------------------------------------- the noise


class Noisy(OrchMoE):
    """Training adds logistic noise (a difference of Gumbels) to Z, for each sample.

    sigmoid(Z + logit(u)) is a relaxed Bernoulli variable with temperature 1 (Maddison et al. 2017).
    """

    def __init__(self, *inputs: Any, **options: Any):
        super().__init__(*inputs, **options)
        self.noise_shape = tuple(self.Z.shape)

    def route(
        self,
        embeddings: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        **options: Any,
    ) -> Routing:
        """Return w and c. noise: u (B,N,K,S) in [0,1), in training; drawn here if None."""
        routing = super().route(embeddings, mask, **options)
        if not self.training:
            return routing
        if noise is None:
            noise = torch.rand(len(embeddings), *self.noise_shape)
        u = noise.to(self.Z, non_blocking=True).clamp(1e-6, 1 - 1e-6)
        Zhat = self.allocation_weights(self.Z + u.logit())  # (B,N,K,S)
        w = routing.w.to(Zhat).expand(len(Zhat), -1)  # (B,K)
        return Routing(torch.einsum("bk,bnks->nbs", w, Zhat), w)


VARIANTS = {
    "orchmoe-token": TokenRouted,
    "orchmoe-no-attention": WithoutAttention,
    "orchmoe-no-softmax": WithoutSoftmax,
    "orchmoe-normal": FromNormal,
    "orchmoe-gumbel": Noisy,
    "orchmoe-factors": Factors,
}
