"""Routers that take the place of the learnt one, and other starts of the learnt one.

`attach_with` returns a function like baselines.attach_method, which attaches OrchMoE and then
replaces its routing. train.train and run_folder.load take such a function as `attach`:

    attach = attach_with("random", settings)
    train.train(settings, device, launch, attach=attach)
    base, adapters, tokenizer = run_folder.load(device, run=launch.out, attach=attach)

Letters: B batch, L length, D width, K abstract tasks, T training tasks.
Test: pytest tests/experiments/test_compare.py
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import runtime
import train
from experiments.sizes import attach_larger
from orchmoe import Adapters, OrchMoE, OrchMoEConfig, Routing, TaskRouter
from runtime import UserError


class RandomRouter(TaskRouter):
    """A router whose w is fixed for each sample and unrelated to its content."""

    def forward(self, embeddings: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return w (B,K). Its entropy is about ln(K) / 3, as that of a learnt router at its start.

        w is the softmax of sines of random projections. The projections are so large that similar
        samples get unrelated w.
        """
        x_hat = self.summarise(embeddings, mask)  # (B,D)
        steep = 1e3 * torch.randn(self.W_task.shape, generator=runtime.generator(0))  # (K,D)
        phases = x_hat @ steep.to(x_hat).T  # (B,K)
        return (8.5 * phases.sin()).softmax(dim=-1)


class SharpRouter(TaskRouter):
    """A router that starts closer to one-hot."""

    factor = 3.0  # on the logits of the start

    @torch.no_grad()
    def fit(self, x_hat: Tensor, generator: torch.Generator | None = None) -> None:
        """Start as TaskRouter does, with all logits multiplied by `factor`."""
        super().fit(x_hat, generator)
        self.W_task.mul_(self.factor)


class FlatRouter(SharpRouter):
    """A router that starts closer to uniform."""

    factor = 1 / 3


class SameStart(TaskRouter):
    """A router whose k-means uses the random numbers of seed 0, with every seed."""

    def fit(self, x_hat: Tensor, generator: torch.Generator | None = None) -> None:
        """Start as TaskRouter does, with the generator that train.fit_router has for seed 0."""
        super().fit(x_hat, runtime.generator(0, 1))


class Oracle(OrchMoE):
    """OrchMoE with a given w for each training task, and w = 1/K for all other tasks."""

    given_w: Tensor  # (T+1,K)

    needs_task_ids = True

    def route(
        self, *inputs: Any, task_ids: Tensor | None = None, w: Tensor | None = None, **options: Any
    ) -> Routing:
        """Route by task_ids (B,). The id of an unseen task is -1, which takes the last row."""
        if w is None:
            w = self.given_w[task_ids]
        return super().route(*inputs, w=w, **options)


class Specialising(OrchMoE):
    """OrchMoE whose skills first train apart, each on its own clusters of samples.

    During the first batches of training w is one-hot. Z starts so that abstract task k uses skill
    k mod S alone.
    """

    apart: int  # number of these batches
    batches: Tensor  # (), number of training batches so far; a resumed run goes on from it

    def route(
        self,
        embeddings: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        w: Tensor | None = None,
        **options: Any,
    ) -> Routing:
        """Return the routing of a batch, see OrchMoE.route."""
        if self.training and w is None:
            if self.batches < self.apart:
                nearest = self.router(embeddings, mask).argmax(dim=-1)  # (B,)
                w = F.one_hot(nearest, self.config.abstract_tasks).to(self.Z)
            self.batches += 1
        return super().route(embeddings, mask, w=w, **options)


ROUTERS = {
    "random": RandomRouter,
    "sharp": SharpRouter,
    "flat": FlatRouter,
    "same start": SameStart,
}
NAMES = ("", *ROUTERS, "specialised", "task")


def attach_with(
    name: str, settings: train.Settings, extra_rank: int = 0
) -> Callable[..., Adapters]:
    """Return a function like attach_method with the router `name`. With "" it is the learnt one.

    extra_rank: see sizes.attach_larger.
    random, sharp, flat: see the classes above. task: an oracle that knows the task of each training
    sample, with K = T. specialised: the skills train apart for the first third of the steps.
    same start: the learnt router, and the initial values of seed 0 with every seed.
    """
    if name not in NAMES:
        raise UserError(f"router {name}: choose one of {', '.join(NAMES[1:])}")

    def attach(method: str, module: nn.Module, config: OrchMoEConfig, **options: Any) -> Adapters:
        if name == "task":
            config = replace(config, abstract_tasks=options["num_tasks"])
        if name == "same start":
            options["generator"] = runtime.generator(0, 0)
        adapters = attach_larger(method, module, config, extra_rank=extra_rank, **options)
        if name in ROUTERS and adapters.router is not None:
            adapters.router = replaced(adapters.router, ROUTERS[name])
        if name == "specialised":
            adapters.__class__ = Specialising
            adapters.apart = settings.training.steps // 3
            adapters.register_buffer("batches", torch.zeros((), device=adapters.Z.device))
            K, S = adapters.Z.shape[1:]
            own_skill = F.one_hot(torch.arange(K) % S, S)  # (K,S)
            adapters.Z.data.copy_(8.0 * own_skill - 4.0)  # with S = 4 this Zhat is 0.95
        if name == "task":
            K = config.abstract_tasks
            w = torch.cat([torch.eye(K), torch.full((1, K), 1 / K)])  # (K+1,K), unseen tasks last
            adapters.__class__ = Oracle
            adapters.register_buffer("given_w", w.to(adapters.Z.device), persistent=False)
        return adapters

    return attach


def replaced(router: TaskRouter, cls: type[TaskRouter]) -> TaskRouter:
    """Return a router of another class with the same parameters."""
    other = cls(len(router.mu), router.config)
    other.load_state_dict(router.state_dict())
    return other.to(router.mu)
