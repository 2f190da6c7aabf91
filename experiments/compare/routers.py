"""Methods of studies alone: OrchMoE with another router, and MHR without noise.

They are methods from a file, which is this one, and study.py loads them. To score the run of one,
give eval.py its name: --method experiments/compare/routers.py:Oracle

Letters: B batch, D width, K abstract tasks, T training tasks.
Test: pytest tests/experiments/test_compare.py
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from baselines import MHR
from orchmoe import OrchMoE, OrchMoEConfig, Routing, TaskRouter, scale_for_entropy
from variants import FactorSkills


def make_buffers(router: TaskRouter) -> None:
    """Turn the weights of a router into buffers, which do not train and are not counted."""
    for name in ("W_task", "bias"):
        value = getattr(router, name).detach()
        delattr(router, name)
        router.register_buffer(name, value)


class RandomRouter(TaskRouter):
    """A router whose w is fixed for each sample, but as good as random: nothing is learnt."""

    def __init__(self, width: int, num_tasks: int, generator: torch.Generator | None = None):
        super().__init__(width, num_tasks, generator)
        # So large that similar samples get unrelated w.
        directions = 1e3 * torch.randn(num_tasks, width, generator=generator)  # (K,D)
        self.register_buffer("directions", directions, persistent=False)
        phases = 2 * math.pi * torch.rand(1000, num_tasks, generator=generator)
        self.scale = scale_for_entropy(phases.sin(), math.log(num_tasks) / 3)
        make_buffers(self)

    def forward(self, embeddings: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return w (B,K). Its entropy is about ln(K) / 3, as that of a learnt router at its start.

        w is the softmax of sines of random projections.
        """
        x_hat = self.summarise(embeddings, mask)  # (B,D)
        phases = x_hat @ self.directions.T  # (B,K)
        return (self.scale * phases.sin()).softmax(dim=-1)


class RandomRouting(OrchMoE):
    """OrchMoE with a RandomRouter, which the seed of the run draws."""

    router_class = RandomRouter


class Oracle(OrchMoE):
    """OrchMoE that knows the task of each training sample: K = T, and w is one-hot.

    All other tasks have w = 1/K.
    """

    router_class = None

    def __init__(
        self,
        module: nn.Module,
        linears: dict[str, nn.Linear],
        config: OrchMoEConfig,
        *,
        num_tasks: int,
        **options: Any,
    ):
        config = replace(config, abstract_tasks=num_tasks)
        super().__init__(module, linears, config, **options)
        K = num_tasks
        w = torch.cat([torch.eye(K), torch.full((1, K), 1 / K)])  # (K+1,K), unseen tasks last
        self.register_buffer("given_w", w.to(self.Z.device), persistent=False)

    def route(
        self,
        *inputs: Any,
        task_ids: Tensor | None = None,
        w: Tensor | None = None,
        **options: Any,
    ) -> Routing:
        """Route by task_ids (B,). The id of an unseen task is -1, which takes the last row."""
        if w is None:
            w = self.given_w[task_ids]
        return super().route(*inputs, w=w, **options)


class OracleOfFactors(Oracle):
    """The Oracle of orchmoe-factors."""

    skills_class = FactorSkills


class QuietMHR(MHR):
    """MHR that trains without noise, which is one of its authors' settings."""

    noisy = False
