"""The methods OrchMoE is compared with, behind its own interface: `attach_method(name, module, config)`
freezes the module and returns Adapters, whatever the method. All adapt the same Linears and follow one scale
rule, alpha / (the rank that adds up).

B batch, L length, D d_in, O d_out, T real tasks, S skills, R rank, H heads, N adapted Linears.  Test: pytest
tests/test_baselines.py"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from orchmoe import Adapters, Mix, OrchMoE, OrchMoEConfig, Routing, SkillLinear, add_skills, target_linears

METHODS = ("orchmoe", "lora", "moe-lora", "poly", "mhr", "c-poly", "orchmoe-factors", "full")


class NoAdapter(Adapters):
    """No adapters: the frozen base, or with `full` every weight of it training."""

    def __init__(self, module: nn.Module, *, full: bool):
        super().__init__(module, {})
        module.requires_grad_(full)

    @contextmanager
    def routed(self, *_args, **_kwargs) -> Iterator[Routing]:
        yield Routing(None, None, None, True)

    def keep(self, *_args, **_kwargs) -> None:
        """Nothing to drop, to merge or to take out."""

    merge = detach = keep
    disabled = folded = routed  # the base is as it is

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"full": [p for p in self._module[0].parameters() if p.requires_grad]}

    def state_dict(self, *_args, **_kwargs) -> dict[str, Tensor]:
        return self._module[0].state_dict()


class LoRA(Adapters):
    """One adapter of rank S R everywhere (Hu et al. 2021, arXiv 2106.09685), started and scaled as the skills
    are, so that a mixture with c = 1/S is this very function."""

    def __init__(self, module: nn.Module, linears: dict[str, SkillLinear]):
        super().__init__(module, linears)
        self.register_buffer("ones", torch.ones(len(linears), 1, 1), persistent=False)

    def route(self, embeddings=None, mask=None, *, task_ids=None, noise=None, drop=None, w=None) -> Routing:
        refuse_w(w)
        return Routing(None, None, self.ones, True)


class MoELoRA(Adapters):
    """A softmax over all S experts for each token (MoLoRA, Zadouri et al. 2023, arXiv 2309.05444): soft
    merging of outputs, router weight N(0, .02), no bias, softmax in float32, no balance loss. The paper's
    experts are those of (IA)^3 or LoRA; LoRA here. It is OrchMoE's token router with K = S and the identity
    for Zhat."""

    def __init__(self, module: nn.Module, linears: dict[str, SkillLinear], skills: int,
                 generator: torch.Generator | None):
        super().__init__(module, linears)
        for linear in linears.values():
            W_task = torch.empty(skills, linear.in_features).normal_(0, 0.02, generator=generator)
            linear.skill_task = nn.Parameter(W_task.to(linear.weight.device))
        identity = torch.eye(skills).expand(1, len(linears), -1, -1)
        self.register_buffer("identity", identity, persistent=False)

    def route(self, embeddings=None, mask=None, *, task_ids=None, noise=None, drop=None, w=None) -> Routing:
        refuse_w(w)
        return Routing(None, self.identity, None, True)


class Poly(Adapters):
    """Z of the sample's task (Polytropon, Ponti et al. 2023, arXiv 2202.13914): rows Z[task] in each Linear,
    relaxed Bernoulli in training and sigmoid in evaluation, divided by their sum; FACTORS are mixed. With
    heads H > 1 a mixture for each head: Multi-Head Routing (MHR, Caccia et al. 2023, arXiv 2211.03831). An
    unseen task, id -1, gets the mean of the learnt rows.

    Departure from both papers: no separate learning of allocations on new tasks, since the comparison trains
    on none."""

    def __init__(self, module: nn.Module, linears: dict[str, SkillLinear], tasks: int, skills: int,
                 heads: int, generator: torch.Generator | None):
        super().__init__(module, linears)
        Z = torch.empty(len(linears), tasks, heads, skills).uniform_(-1e-3, 1e-3, generator=generator)
        self.allocation = nn.Parameter(Z)
        self.noise_shape = (len(linears), heads, skills)

    def route(self, embeddings=None, mask=None, *, task_ids=None, noise=None, drop=None, w=None) -> Routing:
        """task_ids (B,), -1 where unseen; noise u (B,N,H,S) in training, drawn here if left out ->
        c (N,B,H,S)."""
        refuse_w(w)
        if task_ids is None:
            raise ValueError("task_ids: this method needs the task of each sample (B,), -1 where unseen")
        Z, seen = self.allocation, (task_ids >= 0).view(1, -1, 1, 1)
        rows = Z[:, task_ids.clamp(min=0)]  # (N,B,H,S)
        if self.training:
            u = torch.rand(len(task_ids), *self.noise_shape) if noise is None else noise
            rows = rows + u.transpose(0, 1).to(Z).clamp(1e-6, 1 - 1e-6).logit()  # temperature 1
        # softmax of logsigmoid is sigmoid(z) / sum sigmoid(z)
        unseen = F.logsigmoid(Z).softmax(-1).mean(1, keepdim=True)
        return Routing(None, None, torch.where(seen, F.logsigmoid(rows).softmax(-1), unseen), False)


class CPoly(Poly):
    """Common and private skills (C-Poly, Wang et al. 2024, arXiv 2312.03248): S-1 common skills shared as in
    Poly, one private skill a task whose weights start at the identity and are used as they stand; OUTPUTS are
    mixed. An unseen task has the common part alone. Grows with the number of tasks, so it cannot stand in a
    comparison at equal total size."""

    def __init__(self, module: nn.Module, linears: dict[str, SkillLinear], tasks: int, skills: int,
                 generator: torch.Generator | None):
        super().__init__(module, linears, tasks, skills - 1, 1, generator)
        self.allocation_private = nn.Parameter(torch.eye(tasks).repeat(len(linears), 1, 1))  # (N,T,T)

    def route(self, embeddings=None, mask=None, *, task_ids=None, noise=None, drop=None, w=None) -> Routing:
        """task_ids (B,), -1 where unseen; noise u (B,N,1,S-1) in training -> c (N,B,S-1+T)."""
        common = super().route(task_ids=task_ids, noise=noise, w=w).c.squeeze(2)  # (N,B,S-1)
        private = self.allocation_private[:, task_ids.clamp(min=0)] * (task_ids >= 0).unsqueeze(-1)  # (N,B,T)
        return Routing(None, None, torch.cat([common, private], dim=-1), False)


def refuse_w(w: Tensor | None) -> None:
    if w is not None:
        raise ValueError("w: only OrchMoE routes by weights of abstract tasks")


def attach_method(name: str, module: nn.Module, config: OrchMoEConfig, *, extra_rank: int = 0,
                  num_tasks: int = 0, heads: int = 4, generator: torch.Generator | None = None) -> Adapters:
    """Freezes `module` and attaches the method `name` of METHODS with S = config.skills, R = config.rank.

    extra_rank: ranks of a skill on top, handed out evenly over the Linears, for comparisons at equal size.
    num_tasks: T, for the methods with task ids. orchmoe-factors: OrchMoE whose skills mix factors, as Poly's
    do, for the ablation. ValueError for an unknown name, a missing T, or widths that `heads` do not divide.
    """
    S, R = config.skills, config.rank
    if name not in METHODS:
        raise ValueError(f"method: {name!r} is unknown; choose one of {', '.join(METHODS)}")
    if name in ("poly", "mhr", "c-poly") and num_tasks < 1:
        raise ValueError(f"num_tasks: {name} routes by task id and needs the number of training tasks")
    if name == "orchmoe-factors" and config.router == "token":
        raise ValueError("--method orchmoe-factors --router token: factors are mixed once per sample")
    if name == "full":
        return NoAdapter(module, full=True)
    found = target_linears(module, config.targets)
    if name not in ("lora", "moe-lora") and getattr(module, "head", None) in found.values():
        raise ValueError(f"targets: head reads labels of all samples at once; not with --method {name}")
    for path, linear in found.items() if name == "mhr" else ():
        if linear.in_features % heads or linear.out_features % heads:
            raise ValueError(f"--method mhr: {path}, {linear}, is not to be split into {heads} heads")
    N = len(found)
    extra = [(n + 1) * extra_rank // N - n * extra_rank // N for n in range(N)]

    def skills(count: int, rank: int, mix: Mix = kernels.mix_skills) -> dict[str, SkillLinear]:
        return add_skills(found, [rank + e for e in extra], config, mix, generator, skills=count)

    make: dict[str, Callable[[], Adapters]] = {
        "orchmoe": lambda: OrchMoE(module, skills(S, R), config, generator),
        "orchmoe-factors": lambda: OrchMoE(module, skills(S, R, kernels.mix_factors), config, generator),
        "lora": lambda: LoRA(module, skills(1, S * R)),
        "moe-lora": lambda: MoELoRA(module, skills(S, R), S, generator),
        "poly": lambda: Poly(module, skills(S, R, kernels.mix_factors), num_tasks, S, 1, generator),
        "mhr": lambda: Poly(module, skills(S, R, kernels.mix_factors), num_tasks, S, heads, generator),
        "c-poly": lambda: CPoly(module, skills(S - 1 + num_tasks, R), num_tasks, S, generator),
    }
    device = next(iter(found.values())).weight.device
    module.skill_adapters = make[name]().to(device).train(module.training)
    return module.skill_adapters


def count(adapters: Adapters) -> dict[str, int]:
    """Parameters that train, of the tensors that are there: `skills`, A and B of all of them (--method full:
    every weight), and `routing`, what routes them."""
    sizes = {kind: sum(p.numel() for p in group) for kind, group in adapters.parameter_groups().items()}
    skills = sizes.pop("skills", 0) + sizes.pop("full", 0)
    return {"skills": skills, "routing": sum(sizes.values())}
