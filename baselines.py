"""The methods that OrchMoE is compared with.

`attach_method(name, module, config)` returns Adapters, whatever the method. Every method but "full"
adapts the same Linears of a frozen module; "full" trains the module itself. The scale is alpha / R,
or alpha / (S R) for LoRA.

Letters: B batch, L length, D input width, O output width, T real tasks, S skills, R rank, H heads,
N adapted Linears.
Test: pytest tests/unit/test_baselines.py tests/parity/test_peft.py
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from orchmoe import Adapters, OrchMoEConfig, Routing, attach, new_skills, target_linears

# What Adapters take: the Linears by path, and the result of new_skills for each of them.
Linears = dict[str, nn.Linear]
Skills = list[dict[str, Any]]

METHODS = ("orchmoe", "lora", "moe-lora", "poly", "mhr", "c-poly", "full")


class Baseline(Adapters):
    """Base of the methods below. They have no abstract tasks and no Task Router.

    Each has a method route_by_id(task_ids, noise), which returns the routing of samples with the
    task ids (B,), -1 where the task is unseen.
    """

    router = None

    def fit_router(self, *_args, **_options) -> None:
        """Do nothing, since there is no router."""

    def route(
        self,
        *_inputs: Any,
        w: Tensor | None = None,
        noise: Tensor | None = None,
        task_ids: Tensor | None = None,
    ) -> Routing:
        """Return the routing of a batch. The embeddings and their mask are not used."""
        if w is not None:
            raise ValueError("w: only OrchMoE routes by weights of abstract tasks; leave it out")
        return self.route_by_id(task_ids, noise)


class NoAdapter(Baseline):
    """y = W0 x: the frozen base. If `full`, every weight of it trains."""

    def __init__(self, module: nn.Module, *, full: bool):
        super().__init__(module, {}, [])
        module.requires_grad_(full)

    @contextmanager
    def routed(self, *_args, **_options) -> Iterator[Routing]:
        """Do nothing. The same holds for `disabled` and `folded`."""
        yield Routing()

    disabled = routed
    folded = routed

    def keep(self, *_args, **_options) -> None:
        """Do nothing. The same holds for `merge` and `detach`."""

    merge = keep
    detach = keep

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"full": [p for p in self.module.parameters() if p.requires_grad]}

    def state_dict(self, *_args, **_options) -> dict[str, Tensor]:
        return self.module.state_dict()


class LoRA(Baseline):
    """One adapter of rank S R: y = W0 x + scale * B A x with A (SR,D) and B (SR,O).

    It starts and is scaled like the skills of OrchMoE: mixed with c = 1/S, they compute the same.
    Source: Hu et al. 2021, arXiv 2106.09685.
    """

    def route_by_id(self, task_ids: Tensor | None, noise: Tensor | None) -> Routing:
        A = next(iter(self.linears.values())).skill_A
        c = A.new_ones(len(self.linears), 1, 1)  # one skill, with c = 1
        return Routing(c=c)


class MoELoRA(Baseline):
    """Experts mixed for each token: y = W0 x + scale * sum_s c_s B_s A_s x, c = softmax(W_task x).

    W_task (S,D) of each Linear starts at N(0, 0.02²). There is no bias and no balance loss. The
    softmax is computed in float32. This is OrchMoE's token router with K = S and Zhat = I.
    Source: MoLoRA, Zadouri et al. 2023, arXiv 2309.05444, whose experts are LoRA or (IA)^3.
    """

    def __init__(
        self,
        module: nn.Module,
        linears: Linears,
        skills: Skills,
        generator: torch.Generator | None,
    ):
        for attributes in skills:
            A = attributes["skill_A"]
            W_task = torch.empty(len(A), A.shape[-1]).normal_(0, 0.02, generator=generator)
            attributes["skill_W_task"] = nn.Parameter(W_task.to(A))
            attributes["skill_softmax"] = True
        super().__init__(module, linears, skills)
        identity = torch.eye(len(A)).to(A).expand(1, len(linears), -1, -1)  # (1,N,S,S)
        self.register_buffer("identity", identity, persistent=False)

    def route_by_id(self, task_ids: Tensor | None, noise: Tensor | None) -> Routing:
        return Routing(Zhat=self.identity)


class Poly(Baseline):
    """Factors mixed by task: y = W0 x + scale * (sum_s c_s B_s) (sum_s c_s A_s) x.

        c = sigmoid(Z[task]), divided by its sum over the skills          (N,B,H,S)

    In training Z (N,T,H,S) gets logistic noise, so that sigmoid(Z) is a relaxed Bernoulli variable.
    A sample of an unseen task gets the mean of c over the training tasks.
    Source: Polytropon, Ponti et al. 2023, arXiv 2202.13914. With H > 1 heads there is a mixture for
    each head: Multi-Head Routing (MHR), Caccia et al. 2023, arXiv 2211.03831.

    Both papers then learn allocations for new tasks. We do not, because our comparisons do not
    train on new tasks.
    """

    needs_task_ids = True  # in `route`

    def __init__(
        self,
        module: nn.Module,
        linears: Linears,
        skills: Skills,
        shape: tuple[int, int, int],
        generator: torch.Generator | None,
    ):
        """shape: (T,H,S) of the Z of one Linear."""
        Z = torch.empty(len(linears), *shape).uniform_(-1e-3, 1e-3, generator=generator)
        Z = Z.to(skills[0]["skill_A"])
        super().__init__(module, linears, skills)
        self.Z = nn.Parameter(Z)
        self.noise_shape = (len(linears), *shape[1:])

    def route_by_id(self, task_ids: Tensor | None, noise: Tensor | None) -> Routing:
        """Return c (N,B,H,S). noise: u (B,N,H,S) in [0,1), in training; drawn here if None."""
        if task_ids is None:
            raise ValueError("task_ids: give the task of each sample, or -1 for an unseen task")
        rows = self.Z[:, task_ids.clamp(min=0)]  # (N,B,H,S)
        if self.training:
            if noise is None:
                noise = torch.rand(len(task_ids), *self.noise_shape)
            u = noise.transpose(0, 1).to(self.Z).clamp(1e-6, 1 - 1e-6)
            rows = rows + u.logit()  # temperature 1

        # sigmoid(Z) / sum_s sigmoid(Z), as in OrchMoE.allocation_weights.
        seen = F.logsigmoid(rows).softmax(-1)
        unseen = F.logsigmoid(self.Z).softmax(-1).mean(1, keepdim=True)  # (N,1,H,S)
        is_seen = (task_ids >= 0).view(1, -1, 1, 1)
        c = torch.where(is_seen, seen, unseen)
        return Routing(c=c, shared=False)


class CPoly(Poly):
    """Common and private skills: y = W0 x + scale * sum_s c_s B_s A_s x, s over S - 1 + T skills.

    For the S - 1 common skills c is that of Poly. The T private skills, one for each task, have the
    weights Z_private[task], which are not normalised; Z_private (N,T,T) starts at I. A sample of an
    unseen task uses no private skill.
    Source: C-Poly, Wang et al. 2024, arXiv 2312.03248.

    Its size grows with T, so it cannot take part in a comparison at equal total size.
    """

    def __init__(
        self,
        module: nn.Module,
        linears: Linears,
        skills: Skills,
        shape: tuple[int, int, int],
        generator: torch.Generator | None,
    ):
        """shape: (T,1,S-1)."""
        Z_private = torch.eye(shape[0]).repeat(len(linears), 1, 1)
        super().__init__(module, linears, skills, shape, generator)
        self.Z_private = nn.Parameter(Z_private.to(self.Z))

    def route_by_id(self, task_ids: Tensor | None, noise: Tensor | None) -> Routing:
        """Return c (N,B,S-1+T). noise: u (B,N,1,S-1) in [0,1), in training; drawn if None."""
        common = super().route_by_id(task_ids, noise).c.squeeze(2)  # (N,B,S-1)
        is_seen = (task_ids >= 0).unsqueeze(-1)  # (B,1)
        private = self.Z_private[:, task_ids.clamp(min=0)] * is_seen  # (N,B,T)
        c = torch.cat([common, private], dim=-1)
        return Routing(c=c, shared=False)


def attach_method(
    name: str,
    module: nn.Module,
    config: OrchMoEConfig,
    *,
    num_tasks: int = 0,
    heads: int = 4,
    generator: torch.Generator | None = None,
) -> Adapters:
    """Freeze `module` and attach the method `name` with S = config.skills and R = config.rank.

    num_tasks: T, for poly, mhr and c-poly. heads: H, for mhr. Raise ValueError for an unknown name,
    a missing T, or targets that the method cannot adapt.
    """
    if name not in METHODS:
        raise ValueError(f"method: {name!r} is unknown; choose one of {', '.join(METHODS)}")
    if name == "full":
        return NoAdapter(module, full=True)
    if name in ("poly", "mhr", "c-poly") and num_tasks < 1:
        raise ValueError(
            f"--method {name}: it routes by task id; give num_tasks, in JSONL the field `task`"
        )
    linears = target_linears(module, config.targets)
    if getattr(module, "head", None) in linears.values() and name not in ("lora", "moe-lora"):
        raise ValueError(
            f"targets: head reads the tokens of all samples as one list, so --method {name} "
            "cannot mix its skills by sample"
        )

    if name == "orchmoe":
        return attach(module, config, kernels.mix_skills, generator=generator)

    S, R, T = config.skills, config.rank, num_tasks
    alpha = R if config.alpha is None else config.alpha
    count, rank = S, R
    if name == "lora":
        count, rank = 1, S * R
    elif name == "c-poly":
        count = S - 1 + T
    config = replace(config, skills=count, rank=rank, alpha=alpha)
    mix = kernels.mix_factors if name in ("poly", "mhr") else kernels.mix_skills
    skills = [new_skills(linear, config, mix, generator) for linear in linears.values()]
    if name == "lora":
        adapters = LoRA(module, linears, skills)
    elif name == "moe-lora":
        adapters = MoELoRA(module, linears, skills, generator)
    elif name == "c-poly":
        adapters = CPoly(module, linears, skills, (T, 1, S - 1), generator)
    else:
        H = heads if name == "mhr" else 1
        adapters = Poly(module, linears, skills, (T, H, S), generator)
    module.skill_adapters = adapters.train(module.training)
    return adapters


def count_parameters(adapters: Adapters) -> dict[str, int]:
    """Return how many parameters train: A and B as "skills", all others as "routing".

    With --method full every weight counts as "skills".
    """
    counts = {"skills": 0, "routing": 0}
    for kind, group in adapters.parameter_groups().items():
        part = "skills" if kind in ("skills", "full") else "routing"
        counts[part] += sum(parameter.numel() for parameter in group)
    return counts


_SKILLS = {"skills", "rank", "alpha", "targets", "lr_skills"}
_BY_TASK_ID = _SKILLS | {"lr_allocation"}
_ORCHMOE = {field.name for field in fields(OrchMoEConfig)} | {"lr_skills", "lr_allocation"}
_SETTINGS_READ = {
    "full": {"lr_full"},
    "lora": _SKILLS,
    "moe-lora": _SKILLS | {"lr_token_router"},
    "poly": _BY_TASK_ID,
    "mhr": _BY_TASK_ID,
    "c-poly": _BY_TASK_ID,
    # orchmoe, by its router
    "sample": _ORCHMOE | {"lr_router"},
    "token": (_ORCHMOE | {"lr_token_router"}) - {"router_attention", "router_init"},
    "none": _ORCHMOE - {"router_attention", "router_init", "router_norm"},
}


def settings_of_method(method: str, router: str) -> set[str]:
    """Return the names of the settings that a method reads.

    These are fields of OrchMoEConfig, and learning rates: lr_skills, lr_router, lr_token_router,
    lr_allocation and lr_full. `router` matters only to OrchMoE.
    """
    if method == "orchmoe":
        return _SETTINGS_READ[router]
    return _SETTINGS_READ[method]
