"""OrchMoE in one file. It needs only torch, so you can copy it into your project.

A frozen model gets LoRA "skills" in its Linears. A Task Router reads the source sample and
estimates which abstract tasks it belongs to. An allocation matrix in each Linear turns that into
weights of the skills. Unofficial, after Wang et al. 2024 (arXiv 2401.10559). docs/paper.md
gives a grade to each line below: stated, secondary, inferred or chosen.

    X     = rmsnorm(E)                                    (B,L,D)   TaskRouter.summarise
    X_hat = softmax(X X^T / sqrt(D)) X + X                (B,L,D)   TaskRouter.summarise
    x_hat = mean of X_hat over the real tokens            (B,D)     TaskRouter.summarise
    x_hat = (x_hat - mu) / sd                             (B,D)     TaskRouter.forward
    w     = softmax(W_task x_hat + b)                     (B,K)     TaskRouter.forward
    Zhat  = sigmoid(Z), each row divided by its sum       (N,K,S)   OrchMoE.allocation_weights
    c     = w Zhat                                        (N,B,S)   OrchMoE.route
    y     = W0 x + scale * sum_s c_s B_s A_s x            (B,L,O)   mix_skills, SkillLinear.forward

E: the embeddings of the source. B batch, L length, D input width (in the router: width of E),
O output width, K abstract tasks, S skills, R rank, N adapted Linears. A is stored as (S,R,D), and
B as (S,R,O): each B_s is transposed.

The first half of the file implements these equations, our reconstruction of the paper. The second
half puts them into a model: how the router starts, skills in a Linear, the adapters, and `attach`.

    adapters = attach(model, OrchMoEConfig())             # skills in q and v; all else is frozen
    rates = {"skills": 1e-2, "router": 1e-3, "token_router": 1e-2, "allocation": 1e-2}
    groups = adapters.parameter_groups()                  # adapters.parameters() lacks the skills
    groups = [{"params": groups[kind], "lr": rates[kind]} for kind in groups]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    adapters.fit_router(embeddings, masks)                # once, on training sources
    with adapters.routed(model.embed(ids), mask):         # keep it open until after backward
        model.loss(ids, mask, labels).backward()
    optimizer.step()

Python 3.10 and torch 2.7, or later. MIT licence, copyright 2026 the authors of
the repository "OrchMoE, a reference implementation", of which this file is a part.

Test: pytest tests/unit/test_orchmoe.py tests/unit/test_orchmoe_skills.py
"""

import functools
import math
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

Mix = Callable[..., Tensor]  # mix_skills, or a function with the same signature
Linears = dict[str, nn.Linear]  # Linears of a model, by their paths
Skills = Sequence[dict[str, Any]]  # for each of these Linears: all its skills, see `new_skills`


@dataclass(frozen=True)
class OrchMoEConfig:
    """Adapters: settings of the skills and of their routing."""

    abstract_tasks: int = 8  # K, number of abstract tasks of the router
    skills: int = 4  # S, number of LoRA skills in each adapted Linear
    rank: int = 2  # R, rank of one skill
    alpha: float | None = None  # scale of the skills is alpha / their rank (default: rank)
    targets: tuple[str, ...] = ("q", "v")  # names of Linears; all: every one but the output head
    router: Literal["sample", "token"] = "sample"  # what w depends on
    router_attention: bool = True  # self-attention over the sample before its mean
    router_norm: Literal["softmax", "none"] = "softmax"  # none: w = W_task x_hat + b
    router_init: Literal["kmeans", "normal"] = "kmeans"  # how W_task starts
    allocation_std: float = 3.0  # standard deviation of the initial Z
    gumbel: bool = False  # train with logistic noise (a difference of Gumbels) on Z
    mixing: Literal["outputs", "factors"] = "outputs"  # c weighs B_s A_s x, or (slower) A_s and B_s

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(OrchMoEConfig).items():
            value = getattr(self, name)
            choices = get_args(hint)
            if hint is int and not (isinstance(value, int) and 1 <= value <= 2**20):
                raise ValueError(f"{name}: {value!r} must be a whole number (int) from 1 to 2^20")
            if get_origin(hint) is Literal and value not in choices:
                raise ValueError(f"{name}: {value!r} must be one of {', '.join(choices)}")
        if self.alpha is not None and not 0 < self.alpha < 1e6:
            raise ValueError(f"alpha: {self.alpha!r} must be above 0 and below 1e6")
        if isinstance(self.targets, str) or not self.targets:
            raise ValueError(f"targets: {self.targets!r} must be a tuple of names")
        if not 0 <= self.allocation_std < 1e6:
            raise ValueError(
                f"allocation_std: {self.allocation_std!r} must be at least 0 and below 1e6"
            )
        if self.mixing == "factors" and self.router == "token":
            raise ValueError("mixing: factors are mixed for a sample, and never by a token router")


class Routing(NamedTuple):
    """The result of routing one batch.

    With a sample router, or a w from the caller, Linear n gets c[n], (B,S). Else c is None, and the
    Linear gets Zhat[:, n], (1,K,S) or (B,K,S), and computes c for each token by itself.
    """

    w: Tensor | None = None  # (B,K), or (K,) if all samples share it
    Zhat: Tensor | None = None  # (1,N,K,S), or (B,N,K,S) with noise
    c: Tensor | None = None  # (N,B,S), or (N,1,S) if all samples share it
    shared: bool = False  # all samples share the weights, so any batch size fits


# ----------------------------------------------------------------------------------- the router


class TaskRouter(nn.Module):
    """Estimate which abstract tasks a source sample belongs to.

    Learns W_task (K,D) and a bias (K). The self-attention has no parameters.
    """

    def __init__(self, width: int, config: OrchMoEConfig, generator: Generator | None = None):
        super().__init__()
        self.config = config
        K = config.abstract_tasks
        self.W_task = nn.Parameter(torch.empty(K, width).normal_(0, 0.02, generator=generator))
        self.bias = nn.Parameter(torch.zeros(K))
        if config.router_norm == "none":
            nn.init.constant_(self.bias, 1 / K)  # without the softmax, w is 1/K where x_hat = 0
        # Mean and standard deviation of x_hat over training sources. `fit` sets them.
        self.register_buffer("mu", torch.zeros(width))
        self.register_buffer("sd", torch.ones(width))

    def summarise(self, embeddings: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return x_hat (B,D), one vector per sample, before it is standardised.

        embeddings: (B,L,D), the embedded source. mask: (B,L), true at real tokens, booleans or
        integers. Raise ValueError for another shape, or a mask of floats.
        """
        D = len(self.mu)
        shape = embeddings.shape
        if mask is None:
            mask = torch.ones(shape[:2], dtype=torch.bool, device=embeddings.device)
        if shape[2:] != (D,) or shape[:2] != mask.shape:
            raise ValueError(
                f"embeddings: expected (B,L,D) with D = {D}, and a mask (B,L), got {tuple(shape)} "
                f"and {tuple(mask.shape)}; embed the token ids first, or give attach(..., width=D) "
                "for another D"
            )
        if mask.is_floating_point():
            # One that is added to attention scores has 0 at real tokens.
            raise ValueError("mask: give booleans or integers, true at real tokens")
        mask = mask.bool()
        X = F.rms_norm(embeddings.to(self.W_task.dtype), (D,), eps=1e-6)  # (B,L,D)
        # Padding may hold any value, even infinity. Set it to zero, so that it enters no sum.
        X = X.masked_fill(~mask[..., None], 0.0)

        X_hat = X
        if self.config.router_attention:
            scores = X @ X.mT / math.sqrt(D)  # (B,L,L)
            # Not -inf: in a row that is all padding the softmax would give NaN.
            lowest = torch.finfo(scores.dtype).min
            scores = scores.masked_fill(~mask[:, None, :], lowest)
            P = scores.softmax(dim=-1)
            X_hat = P @ X + X  # (B,L,D)

        return masked_mean(X_hat, mask)  # (B,D)

    def forward(self, embeddings: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return w (B,K), the weight of each abstract task. With the softmax, rows sum to 1.

        For the arguments see `summarise`.
        """
        x_hat = self.summarise(embeddings, mask)
        x_hat = (x_hat - self.mu) / self.sd
        logits = F.linear(x_hat, self.W_task, self.bias)  # W_task x_hat + b
        if self.config.router_norm == "none":
            return logits
        return logits.softmax(dim=-1)

    @torch.no_grad()
    def fit(self, x_hat: Tensor, generator: Generator | None = None) -> None:
        """Set mu and sd from x_hat (M,D) of M sources. With router_init "kmeans", also set W_task.

        Each row of W_task becomes a centre of a spherical k-means, times one factor for all rows.
        So the largest w is that of the source's cluster. With the softmax, the factor makes the
        mean entropy of w ln(K) / 3 (0: one-hot; ln(K): uniform); without it, the sd of w is 1/K.
        """
        K = self.config.abstract_tasks
        self.mu.copy_(x_hat.mean(dim=0))
        sd = x_hat.std(dim=0, correction=0)
        # A feature that is nearly constant here, but varies later, must not dominate w.
        smallest = max(0.1 * sd.median().item(), 1e-6)
        self.sd.copy_(sd.clamp(min=smallest))
        if self.config.router_init == "normal":
            return

        x_hat = (x_hat - self.mu) / self.sd
        centres = spherical_kmeans(x_hat, K, generator)  # (K,D)
        logits = x_hat @ centres.T  # (M,K)
        if self.config.router_norm == "softmax":
            scale = scale_for_entropy(logits, math.log(K) / 3)
        else:
            scale = 1 / K / logits.std().clamp(min=1e-6)
        self.W_task.copy_(scale * centres)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean (B,D) of x (B,L,D) over the positions where mask (B,L) is true."""
    total = x.masked_fill(~mask[..., None], 0.0).sum(dim=1)  # (B,D)
    count = mask.sum(dim=1, keepdim=True).clamp(min=1)  # (B,1); a row may be all padding
    return total / count


# ---------------------------------------------------------------------------- methods, and OrchMoE


class Method(nn.Module):
    """Computes the weights of the skills. OrchMoE is one method; baselines.py has others.

    To write your own, derive a class with a `route`, and a constructor that takes what OrchMoE's
    takes. The constructor may change `skills`, the attributes that each Linear will get, and may
    make parameters. docs/use.md explains an example of 40 lines.
    """

    settings = frozenset({"skills", "rank", "alpha", "targets"})  # fields of the config it reads
    # The group of each parameter, by the first part of its name: skills, router, token_router or
    # allocation. Each group has its own learning rate.
    rates = {"skill_A": "skills", "skill_B": "skills"}
    noise_shape: tuple[int, ...] | None = None  # shape of one sample's noise, if training uses it
    # Whether a Linear must know to which sample a token belongs. The output head does not know it:
    # it gets the tokens of all samples as one list.
    mixes_by_sample = True
    kind = ""  # name in saved runs; only the same method loads them (default: name of the class)

    @classmethod
    def skill_shape(cls, config: OrchMoEConfig, num_tasks: int) -> tuple[int, int]:
        """Return how many skills a Linear gets, and their rank."""
        return config.skills, config.rank

    def route(self, *inputs: Tensor, **options: Any) -> Routing:
        """Return the weights of a batch. For the arguments see `Adapters.routed`.

        A method without abstract tasks does not read w.
        """
        raise NotImplementedError


class OrchMoE(Method):
    """The Task Router, and the allocation matrices Z (N,K,S) of all adapted Linears."""

    settings = frozenset(field.name for field in fields(OrchMoEConfig))
    rates = Method.rates | {
        "Z": "allocation",
        "router": "router",
        "skill_W_task": "token_router",
        "skill_bias": "token_router",
    }

    def __init__(
        self,
        linears: Linears,
        skills: Skills,
        config: OrchMoEConfig,
        *,
        width: int,
        num_tasks: int = 0,
        generator: Generator | None = None,
    ):
        """Make Z and the router.

        width: D of the embeddings. num_tasks: number of training tasks, which OrchMoE does not
        need. generator: source of the initial values.
        """
        super().__init__()
        self.config = config
        shape = (len(linears), config.abstract_tasks, config.skills)
        Z = torch.empty(shape).normal_(0, config.allocation_std, generator=generator)
        self.Z = nn.Parameter(Z.to(skills[0]["skill_A"]))  # on the device of the first Linear
        if config.gumbel:
            self.noise_shape = shape

        self.router = None
        if config.router == "sample":
            self.router = TaskRouter(width, config, generator).to(self.Z)
        for linear, attributes in zip(linears.values(), skills, strict=True):
            if config.router == "token":
                # Each token x has its own w = softmax(W_task x + b), without norm, mu and sd.
                token_router = TaskRouter(linear.in_features, config, generator)
                token_router.to(attributes["skill_A"])
                attributes["skill_W_task"] = token_router.W_task
                attributes["skill_bias"] = token_router.bias
                attributes["skill_softmax"] = config.router_norm == "softmax"
            if config.mixing == "factors":
                attributes["skill_mix"] = mix_factors

    def allocation_weights(self, noise: Tensor | None = None) -> Tensor:
        """Return Zhat (1,N,K,S), or (B,N,K,S) with noise u (B,N,K,S) in [0,1).

        With noise, sigmoid(Z + logit(u)) is a relaxed Bernoulli variable with temperature 1
        (Maddison et al. 2017).
        """
        Z = self.Z.unsqueeze(0)
        if noise is not None:
            noise = noise.to(Z, non_blocking=True)  # from the CPU, without waiting for a GPU
            Z = Z + noise.clamp(1e-6, 1 - 1e-6).logit()
        # sigmoid(Z) / sum_s sigmoid(Z). In logarithms, so that a row of tiny values is not 0 / 0.
        return F.logsigmoid(Z).softmax(dim=-1)

    def route(
        self,
        embeddings: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        w: Tensor | None = None,
        noise: Tensor | None = None,
        task_ids: Tensor | None = None,
    ) -> Routing:
        """Return w, Zhat and c of all Linears. For the arguments see `Adapters.routed`.

        Raise ValueError for a w or embeddings of a wrong shape, or if embeddings are missing.
        """
        if not self.training or self.noise_shape is None:
            noise = None
        elif noise is None:
            if embeddings is None:
                raise ValueError(
                    "noise: give it, or the embeddings (B,L,D), which say how many samples need it"
                )
            noise = torch.rand(len(embeddings), *self.noise_shape)
        Zhat = self.allocation_weights(noise)

        K = self.config.abstract_tasks
        with full_precision(Zhat.device):
            if w is None:
                if self.config.router == "token":
                    return Routing(Zhat=Zhat, shared=noise is None)
                if embeddings is None:
                    raise ValueError("embeddings: give those of the source (B,L,D), or give w")
                w = self.router(embeddings, mask)
            if w.dim() not in (1, 2) or w.shape[-1] != K:
                raise ValueError(f"w: expected (K,) or (B,K) with K = {K}, got {tuple(w.shape)}")
            # w, Zhat or both may have one row for all samples: einsum broadcasts it.
            c = torch.einsum("bk,bnks->nbs", w.to(Zhat).reshape(-1, K), Zhat)
        return Routing(w=w, Zhat=Zhat, c=c, shared=w.dim() == 1 and noise is None)


def full_precision(device: torch.device) -> torch.autocast:
    """Return a context in which autocast is off, so that routing is computed in float32."""
    return torch.autocast(device.type, enabled=False)


# -------------------------------------------------------------------------------------- the mix


def mix_skills(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    c: Tensor,
    scale: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return scale * sum_s c_s B_s A_s x. If a weight is given, add weight x + bias.

    The outputs of the skills are mixed, not A and B: our reading of Eq. 3 as a summary quotes it,
    see docs/paper.md. The skills are laid side by side as one LoRA of rank S R, so that there is no
    loop over them.

    x (B,L,D); A (S,R,D); B (S,R,O); c (B,S), or (1,S) for all samples, or (B,L,S) per token;
    weight (O,D); bias (O,). Returns (B,L,O) in the dtype of x, or of autocast.
    """
    S, R, D = A.shape
    A = A.reshape(S * R, D).to(x.dtype)
    B = B.reshape(S * R, -1).to(x.dtype)
    if c.dim() == 2:
        c = c.unsqueeze(1)  # (B,1,S): the same for all tokens
    # Also to the device of x: a large base may be spread over several devices.
    c = (scale * c).to(x)
    c = c.repeat_interleave(R, dim=-1)  # (B,1,S R) or (B,L,S R): each rank gets the c of its skill

    h = F.linear(x, A)  # (B,L,S R): all A_s x, one skill after the other
    mixed = (h * c) @ B  # (B,L,O)
    if weight is None:
        return mixed
    return F.linear(x, weight, bias).add_(mixed)


def mix_factors(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    c: Tensor,
    scale: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return scale * (sum_s c_s B_s) (sum_s c_s A_s) x: as mix_skills, but factors are mixed.

    This is another reading of Eq. 3, `mixing="factors"`. c: (B,S), or (1,S) for all samples.
    """
    c = c.to(x)
    A_mix = torch.einsum("bs,srd->brd", c, A.to(x.dtype))  # (B,R,D): sum_s c_s A_s
    B_mix = torch.einsum("bs,sro->bro", c, B.to(x.dtype))  # (B,R,O): sum_s c_s B_s

    h = x @ A_mix.mT  # (B,L,R)
    mixed = (scale * h) @ B_mix  # (B,L,O)
    if weight is None:
        return mixed
    return F.linear(x, weight, bias).add_(mixed)


# ---------------------------------------------------------------------------- the router's start


def spherical_kmeans(points: Tensor, k: int, generator: Generator | None = None) -> Tensor:
    """Return k unit vectors (k,D), the centres of points (M,D) by cosine similarity."""
    points = F.normalize(points, dim=-1)

    # k-means++ start: points far from all picked points are more likely to be picked. A distance is
    # 1 - cosine, capped at 1. It runs on the CPU, like the generator. The clamp keeps the sum
    # positive when all points are equal.
    distance = torch.ones(len(points), device="cpu")
    picks = []
    for _ in range(k):
        pick = int(torch.multinomial(distance.clamp(min=1e-9), 1, generator=generator))
        picks.append(pick)
        distance = torch.minimum(distance, 1 - (points @ points[pick]).cpu())
    centres = points[picks]

    for _ in range(50):  # more than enough; after convergence nothing changes
        nearest = (points @ centres.T).argmax(dim=1)  # (M,)
        membership = F.one_hot(nearest, k).to(points.dtype)  # (M,k)
        moved = F.normalize(membership.T @ points, dim=-1)  # (k,D)
        is_empty = membership.sum(dim=0) == 0
        centres = torch.where(is_empty[:, None], centres, moved)
    return centres


def scale_for_entropy(logits: Tensor, target: float) -> float:
    """Return the factor f that gives softmax(f * logits) the mean entropy `target`.

    logits: (M,K). A bisection finds f, since the entropy falls as f grows.
    """
    low, high = -12.0, 12.0  # natural logarithm of the factor
    for _ in range(50):
        middle = (low + high) / 2
        probabilities = (math.exp(middle) * logits).softmax(dim=-1)
        entropy = torch.special.entr(probabilities).sum(dim=-1).mean()
        if entropy > target:
            low = middle
        else:
            high = middle
    return math.exp(low)


# ----------------------------------------------------------------------------------- the skills


class SkillLinear(nn.Linear):
    """A Linear of the base with S skills.

    No SkillLinear is constructed. Adapters change the class of an existing Linear, as
    torch.nn.utils.parametrize does. An nn.Linear gets the class SkillLinear. An instance of a
    subclass Sub gets a new class SkillSub(SkillLinear, Sub). The object keeps its weight, name and
    hooks, and isinstance(linear, Sub) still holds. `detach` restores the class.

    Every attribute that the skills add to the object starts with `skill_`.
    """

    skill_base: type = nn.Linear  # the class that the Linear had before
    skill_base_is_plain: bool  # it computes only W0 x + b, so `skill_mix` may compute that, too
    skill_A: nn.Parameter  # (S,R,D)
    skill_B: nn.Parameter  # (S,R,O)
    skill_scale: float
    skill_mix: Mix
    skill_W_task: nn.Parameter | None  # (K,D) of a token router
    skill_bias: nn.Parameter | None  # (K,) of a token router
    skill_softmax: bool  # whether the w of a token router is a softmax
    skill_weights: Tensor | None  # set by `routed`: c (B,S) or, for a token router, Zhat (B,K,S)
    skill_shared: bool  # set by `routed`: all samples share these weights
    skill_beams: int  # set by `routed`: how many rows of x belong to one sample
    skill_visited: bool  # whether it was called

    def skill_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the skills, and of the token router if there is one."""
        own = self.named_parameters(recurse=False)
        return {name: parameter for name, parameter in own if name.startswith("skill_")}

    def forward(self, x: Tensor) -> Tensor:
        """Return W0 x + bias + scale * sum_s c_s B_s A_s x, (B,...,O) for x (B,...,D)."""
        x_3d = x  # (B,L,D)
        if x.dim() != 3:
            batch = 1 if x.dim() == 1 else x.shape[0]  # a single vector is a batch of one
            length = x.shape[1:-1].numel()  # 1 if x is (B,D) or (D,)
            x_3d = x.reshape(batch, length, self.in_features)
        c = self.skill_c(x_3d)
        mix_inputs = (x_3d, self.skill_A, self.skill_B, c, self.skill_scale)
        self.skill_visited = True

        if self.skill_base_is_plain:
            weight, bias = self.weight, self.bias
            is_frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
            # Since `attach` the weight may have been quantised, pruned or parametrised. Quantised
            # subclasses have __tensor_flatten__; fake tensors, which torch.compile uses, do not.
            is_quantised = hasattr(weight, "__tensor_flatten__")
            if is_frozen and isinstance(weight, nn.Parameter) and not is_quantised:
                # The programs pass kernels.mix_skills to `attach`.
                y = self.skill_mix(*mix_inputs, weight, bias)
                return y if x_3d is x else y.view(*x.shape[:-1], self.out_features)

        # Otherwise the Linear's own forward computes W0 x + b: its weight is quantised or
        # parametrised, or it trains.
        y = super().forward(x)
        mixed = self.skill_mix(*mix_inputs)
        return y + mixed.view_as(y).to(y.dtype)

    def skill_c(self, x: Tensor) -> Tensor:
        """Return c for x (B,L,D): (B,S) or (1,S), or (B,L,S) from a token router."""
        weights = self.skill_weights
        if weights is None:
            raise RuntimeError(
                "a Linear with skills was called outside `with adapters.routed(...)`"
            )

        if not self.skill_shared and len(weights) != len(x):
            beams = self.skill_beams
            if len(weights) * beams != len(x):
                raise ValueError(
                    f"the batch has {len(x)} rows, but {len(weights)} samples of {beams} beams "
                    "were routed; route the same batch, or give routed(..., beams=); a Linear that "
                    "gets the tokens of all samples as one list cannot have skills"
                )
            weights = weights.repeat_interleave(beams, dim=0)

        # Without a token router, or with a w from the caller, these are c already.
        if self.skill_W_task is None or weights.dim() == 2:
            return weights
        with full_precision(x.device):
            logits = F.linear(x.to(weights.dtype), self.skill_W_task, self.skill_bias)  # (B,L,K)
            w = logits.softmax(dim=-1) if self.skill_softmax else logits
            return w @ weights.to(x.device)  # (B,L,S)

    def _apply(self, function: Callable, recurse: bool = True) -> nn.Module:
        """Apply .to(), .half(), .cuda() and the like. The skills stay in float32 or wider."""
        # Recognise the skills by identity, because `function` sees no names.
        ours = set()
        for parameter in self.skill_parameters().values():
            ours |= {id(parameter), id(parameter.grad)}

        def apply(tensor: Tensor) -> Tensor:
            if id(tensor) in ours:
                return at_least_float32(tensor, function(tensor))
            return function(tensor)

        return super()._apply(apply, recurse)

    def __reduce_ex__(self, protocol: int):
        """Copy and pickle through the base class: pickle cannot find a class made at run time."""
        return _new_skill_linear, (self.skill_base,), self.__getstate__()


@functools.cache  # one class per base class; otherwise torch.compile would compile each Linear anew
def class_with_skills(base: type) -> type:
    """Return the subclass of `base` whose forward adds the skills."""
    if base is nn.Linear:
        return SkillLinear
    return type("Skill" + base.__name__, (SkillLinear, base), {"skill_base": base})


def class_without_skills(cls: type) -> type:
    """Return the class that a Linear of class `cls` has without its skills.

    It is the class that the Linear had before `attach`. If torch has derived another class since
    then, as parametrize does, the same is derived from that: ParametrizedSkillLinear becomes
    ParametrizedLinear.
    """
    if cls is class_with_skills(cls.skill_base):
        return cls.skill_base
    base = class_without_skills(cls.__bases__[0])
    return type(cls.__name__.replace("Skill", "", 1), (base,), dict(vars(cls)))


def _new_skill_linear(base: type) -> SkillLinear:
    """Make an empty object for copy and pickle, which then fill in its attributes."""
    return SkillLinear.__new__(class_with_skills(base))


def at_least_float32(before: Tensor, after: Tensor) -> Tensor:
    """Return `after`, or if it is half precision, `before` on the device of `after`."""
    if after.dtype in (torch.bfloat16, torch.float16):
        return before.to(after.device)
    return after


def new_skills(
    linear: nn.Linear,
    num_skills: int,
    rank: int,
    scale: float,
    mix: Mix,
    generator: Generator | None,
) -> dict[str, Any]:
    """Return the attributes that turn `linear` into a SkillLinear. It is not changed."""
    S, R, D = num_skills, rank, linear.in_features

    # A: kaiming_uniform(a = sqrt 5) of each (R,D) slice. B = 0: the model starts as the base.
    bound = 1 / math.sqrt(D)
    A = torch.empty(S, R, D).uniform_(-bound, bound, generator=generator)
    dtype = torch.promote_types(A.dtype, torch.float32)  # even if the default is bfloat16
    A = A.to(linear.weight.device, dtype)

    weight = linear._parameters.get("weight")  # None if it is parametrised
    base_is_plain = (
        type(linear).forward is nn.Linear.forward
        and type(weight) is nn.Parameter
        and weight.is_floating_point()
    )
    return {
        "skill_A": nn.Parameter(A),
        "skill_B": nn.Parameter(A.new_zeros(S, R, linear.out_features)),
        "skill_scale": scale,
        "skill_mix": mix,
        "skill_base_is_plain": base_is_plain,
        "skill_W_task": None,
        "skill_bias": None,
        "skill_softmax": True,
        "skill_weights": None,
        "skill_shared": False,
        "skill_beams": 1,
        "skill_visited": False,
    }


# --------------------------------------------------------------------------------- the adapters


class Adapters(nn.Identity):  # as a child of an nn.Sequential it is called, and must pass x on
    """Add skills to the Linears of `module`, and give them the weights that the method computes.

    Only one of routed, disabled, folded, merge and detach can run at a time.
    """

    _lock = threading.Lock()  # two threads must not pass the check in `_open` together

    def __init__(self, module: nn.Module, linears: Linears, skills: Skills, method: Method):
        """Freeze `module` and add `skills`, one result of `new_skills` for each of its Linears."""
        super().__init__()
        # A class may refuse subclasses, so make them before anything changes.
        classes = [class_with_skills(type(linear)) for linear in linears.values()]

        self.method = method
        self.linears = linears  # a plain dict: the Linears are registered in the base already
        self.__dict__["module"] = module  # so torch does not register the base below itself
        self._state = ""  # the context or method in use, or "removed" after merge and detach
        self._routing: Routing | None = None

        # Remember for `detach` what trained, then freeze the base.
        parameters = module.named_parameters(remove_duplicate=False)
        self._trained_before = {name: parameter.requires_grad for name, parameter in parameters}
        module.requires_grad_(False)
        for linear, cls, attributes in zip(linears.values(), classes, skills, strict=True):
            linear.__class__ = cls
            for name, value in attributes.items():
                setattr(linear, name, value)

    def __getattr__(self, name: str) -> Any:
        """Return what the method has: route, Z, noise_shape, allocation_weights."""
        if name == "method":
            return super().__getattr__(name)  # where torch keeps submodules
        return getattr(self.method, name)

    @property
    def router(self) -> TaskRouter | None:
        """The sample router, if the method has one."""
        router = getattr(self.method, "router", None)
        return router if isinstance(router, TaskRouter) else None

    @contextmanager
    def routed(
        self,
        embeddings: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        beams: int = 1,
        **options: Any,
    ) -> Iterator[Routing]:
        """Route one batch. Within the `with` block every adapted Linear has its weights c.

        Keep it open until after backward. With gradient checkpointing (use_reentrant=False)
        backward runs the blocks again, with the weights that are routed then. So one backward must
        not span two routings: to add two losses, route both batches as one. For generation, keep it
        open until the last token. Open it anew for each micro-batch.

        embeddings: (B,L,D) of the SOURCE. mask: (B,L), true at real tokens (the reverse of
        PyTorch's key_padding_mask; default: all are real). beams: how many consecutive rows belong
        to one sample.

        The options go to the method's `route`. w: (K,) or (B,K), to use instead of the router's.
        noise: u in [0,1), (B,*noise_shape), for training with noise; `route` draws it if it is not
        given. task_ids: (B,), the training task of each sample, or -1; OrchMoE does not read them.

        Raise RuntimeError inside routed, disabled or folded, and after merge and detach. Raise
        ValueError as `route` does.
        """
        with self._open("routed"):
            routing = self.method.route(embeddings, mask, **options)
            if routing.c is None:
                parts = routing.Zhat.unbind(1)  # a token router in each Linear computes c itself
            else:
                parts = routing.c.unbind(0)
            try:
                self._routing = routing
                same = {"skill_shared": routing.shared, "skill_beams": beams}
                for linear, part in zip(self.linears.values(), parts, strict=True):
                    # Faster than `linear.skill_weights = part`, a call of nn.Module.__setattr__.
                    vars(linear).update(same, skill_weights=part)
                yield routing
                self._warn_unvisited()
            finally:
                self._routing = None
                for linear in self.linears.values():
                    vars(linear).update(skill_weights=None)

    @torch.no_grad()
    def fit_router(
        self,
        embeddings: Iterable[Tensor],
        masks: Iterable[Tensor] | None = None,
        *,
        generator: Generator | None = None,
    ) -> None:
        """Start the sample router from training sources. Call it once, before training.

        embeddings: batches (B,L,D) of training sources. masks: their masks (B,L), if any token is
        padding. With router_init "normal" it only sets mu and sd. It does nothing without a sample
        router. Raise ValueError for fewer than max(2, K) different sources: k-means would leave
        abstract tasks empty.
        """
        if self.router is None:
            return
        K = self.config.abstract_tasks
        with full_precision(self.router.mu.device):
            if masks is None:
                parts = [self.router.summarise(batch) for batch in embeddings]
            else:
                pairs = zip(embeddings, masks, strict=True)
                parts = [self.router.summarise(batch, mask) for batch, mask in pairs]
            x_hat = torch.cat(parts)  # (M,D)
            sources = len(x_hat.unique(dim=0))
            if sources < max(2, K):
                raise ValueError(
                    f"{sources} different training sources are too few for K = {K} abstract tasks; "
                    f"give at least {max(2, K)}, better hundreds"
                )
            self.router.fit(x_hat, generator)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the `with` block the model is the base as before attach, bit for bit."""
        with self._open("disabled"), self._base_classes():
            yield

    @contextmanager
    def folded(self, w: Tensor | None = None, **options: Any) -> Iterator[None]:
        """Within the `with` block the skills of ONE routing are in the weights, at base speed.

        The weights are W0 + scale * sum_s c_s B_s A_s, for w (K,), or for a single sample given as
        embeddings=(1,L,D) and mask=. Raise ValueError for several samples, and if `unfoldable`
        gives a reason.
        """
        with self._open("folded"):
            new_weights = self._folded_weights(w, options)
            originals = {linear: linear.weight for linear in new_weights}
            with self._base_classes():
                try:
                    for linear, weight in new_weights.items():
                        linear.weight = weight
                    yield
                finally:
                    for linear, weight in originals.items():
                        linear.weight = weight

    def merge(self, w: Tensor | None = None, **options: Any) -> None:
        """Fold one routing for good and remove the adapters. A tied weight is not tied afterwards.

        For the arguments see `folded`.
        """
        with self._open("merge"):
            for linear, weight in self._folded_weights(w, options).items():
                linear.weight = weight
            self._remove_skills()

    def detach(self) -> None:
        """Remove the skills. Restore the classes of the Linears and the base's requires_grad.

        A weight that was parametrised after `attach` stays frozen.
        """
        with self._open("detach"):
            self._remove_skills()

    def unfoldable(self) -> str:
        """Return why one routing cannot be folded into the weights, or "" if it can."""
        if self.training and self.method.noise_shape:
            return "training draws noise; call .eval() first"
        for name, linear in self.linears.items():
            if linear.skill_W_task is not None:
                return "with a token router every token has its own w, so nothing is folded"
            # A weight that was pruned or parametrised after `attach` is not a Parameter any more.
            weight = linear._parameters.get("weight")
            if not linear.skill_base_is_plain or type(weight) is not nn.Parameter:
                kind = linear.skill_base.__name__
                return f"{name}: this {kind} or its weight computes more than a plain product"
        return ""

    def keep(self, positions: Tensor) -> None:
        """Keep only the samples at these positions (B',), as generation drops finished samples."""
        if self._state in ("folded", "disabled") or self.routing().shared:
            return  # no weights are stored for single samples
        for linear in self.linears.values():
            linear.skill_weights = linear.skill_weights[positions]

    def routing(self) -> Routing:
        """Return w, Zhat and c of the routed batch. Raise RuntimeError outside `routed`."""
        if self._routing is None:
            raise RuntimeError("no batch is routed; call it inside `with adapters.routed(...)`")
        return self._routing

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters that train, by kind. Each kind needs its own learning rate.

        Raise ValueError if all are frozen, two Linears share one, or one has no rate.
        """
        groups = {"skills": [], "router": [], "token_router": [], "allocation": []}
        named = [*self.method.named_parameters()]
        for linear in self.linears.values():
            # Not linear.skill_parameters(): inside `disabled` the Linear has its old class.
            named += SkillLinear.skill_parameters(linear).items()
        for name, parameter in named:
            kind = self.method.rates.get(name.partition(".")[0])
            if kind not in groups:
                method = type(self.method).__name__
                raise ValueError(f"{method}.rates: {name} needs one of {', '.join(groups)}")
            if parameter.requires_grad:
                groups[kind].append(parameter)
        trained = sum(groups.values(), [])
        if named and not trained:
            raise ValueError(
                "all parameters of the adapters are frozen; attach them after whatever froze the "
                "model, such as peft"
            )
        if len(set(trained)) < len(trained):
            raise ValueError("two Linears train the same parameter; give each its own")
        return groups

    def state_dict(self, *, destination=None, prefix="", keep_vars=False) -> dict[str, Tensor]:
        """Return the state of the method, and each skill under its Linear's name.

        torch passes a destination when it collects the state of the whole model. Then the Linears
        themselves put the skills in. Raise RuntimeError after merge and detach.
        """
        self._require_skills()
        if destination is not None:
            return super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        state = self.method.state_dict(prefix=prefix, keep_vars=keep_vars)
        for path, linear in self.linears.items():
            for name, parameter in SkillLinear.skill_parameters(linear).items():
                state[f"{prefix}{path}.{name}"] = parameter if keep_vars else parameter.detach()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], strict: bool = True) -> None:
        """Copy a state from `state_dict` into the adapters.

        Raise ValueError, with nothing changed, if names or shapes differ. With strict=False names
        may differ, but not shapes.
        """
        own = self.state_dict()
        names = own.keys() & state.keys()
        different = own.keys() ^ state.keys()
        if strict and different:
            name = min(different)
            lacking = "the given state" if name in own else "these adapters"
            raise ValueError(f"adapter state: {name} is missing in {lacking}")
        for name in sorted(names):
            given, expected = tuple(state[name].shape), tuple(own[name].shape)
            if given != expected:
                raise ValueError(f"adapter state: {name} has shape {given}, expected {expected}")
        for name in names:
            own[name].copy_(state[name])

    @contextmanager
    def _open(self, verb: str) -> Iterator[None]:
        """Mark `verb` as open. Raise RuntimeError if one is already, or after merge and detach."""
        with self._lock:
            self._require_skills()
            if self._state:
                raise RuntimeError(
                    f"{verb}(): {self._state}() is active; leave it first. Threads must take turns"
                )
            self._state = verb
        try:
            yield
        finally:
            if self._state == verb:  # and not "removed"
                self._state = ""

    def _require_skills(self) -> None:
        if self._state == "removed":
            raise RuntimeError(
                "the skills are merged or detached: save them before, and call the model as it is"
            )

    @contextmanager
    def _base_classes(self) -> Iterator[None]:
        """Inside, the Linears have their original classes, so they compute without skills."""
        classes = {linear: type(linear) for linear in self.linears.values()}
        try:
            for linear, cls in classes.items():
                linear.__class__ = class_without_skills(cls)
            yield
        finally:
            for linear, cls in classes.items():
                linear.__class__ = cls

    @torch.no_grad()
    def _folded_weights(
        self, w: Tensor | None, options: dict[str, Any]
    ) -> dict[SkillLinear, nn.Parameter]:
        """Return W0 + scale * sum_s c_s B_s A_s of each Linear."""
        reason = self.unfoldable()
        if reason:
            raise ValueError(f"{self._state}(): {reason}")
        c = self.method.route(w=w, **options).c  # (N,1,S)
        if c.shape[1] != 1:
            raise ValueError(f"{self._state}(): give one sample or one w (K,), not {c.shape[1]}")

        weights = {}
        for linear, c_n in zip(self.linears.values(), c, strict=True):
            A = linear.skill_A
            with full_precision(A.device):
                # The skills applied to the identity give their matrix (D,O), whatever `mix` is.
                eye = torch.eye(linear.in_features, dtype=A.dtype, device=A.device)
                delta = linear.skill_mix(eye[None], A, linear.skill_B, c_n, linear.skill_scale)
                weight = linear.weight + delta[0].T  # (O,D)
            weight = weight.to(linear.weight.dtype)
            weights[linear] = nn.Parameter(weight, requires_grad=False)
        return weights

    def _remove_skills(self) -> None:
        for linear in self.linears.values():
            linear.__class__ = class_without_skills(type(linear))
            for name in [*linear._parameters, *vars(linear)]:
                if name.startswith("skill_"):
                    delattr(linear, name)
        self.linears = {}
        self._state = "removed"
        self.module._modules.pop("skill_adapters", None)
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(self._trained_before.get(name, parameter.requires_grad))

    def _warn_unvisited(self) -> None:
        """Warn about Linears that were not called. Their owner may read their weights directly."""
        missed = [name for name, linear in self.linears.items() if not linear.skill_visited]
        # Without gradients `routed` may be opened just to read w.
        nothing_ran = len(missed) == len(self.linears) and not torch.is_grad_enabled()
        if not missed or nothing_ran:
            return
        for name in missed:
            self.linears[name].skill_visited = True  # warn once
        warnings.warn(
            f"{len(missed)} of {len(self.linears)} adapted Linears were not called, so their "
            f"skills cannot train: {', '.join(missed[:3])}",
            stacklevel=4,  # the line of the user's `with`
        )

    def _apply(self, function: Callable, recurse: bool = True) -> nn.Module:
        """Apply .to() and the like. Router and allocation stay in float32 or wider."""
        return super()._apply(lambda tensor: at_least_float32(tensor, function(tensor)), recurse)

    def __getstate__(self) -> dict:
        # Inside routed, disabled or folded the Linears may have another class, or hold one batch's
        # weights.
        if self._state not in ("", "removed"):
            raise RuntimeError(f"{self._state}(): leave it before the model is copied or pickled")
        return super().__getstate__()


def embedding_width(module: nn.Module) -> int:
    """Return the width of the model's first Embedding, or else of its first Linear's input."""
    widths = [child.embedding_dim for child in module.modules() if isinstance(child, nn.Embedding)]
    widths += [child.in_features for child in module.modules() if isinstance(child, nn.Linear)]
    return widths[0]


def attach(
    module: nn.Module,
    config: OrchMoEConfig,
    mix: Mix = mix_skills,
    *,
    method: type[Method] = OrchMoE,
    width: int | None = None,
    num_tasks: int = 0,
    extra_rank: int = 0,
    generator: Generator | None = None,
) -> Adapters:
    """Freeze `module`, give skills to its Linears, and register `module.skill_adapters`.

    The Linears are those named in config.targets. Their inputs must be batch-first. To train a head
    of your own as well, call its requires_grad_() afterwards, and give it to the optimizer. In an
    nn.Sequential, model[-1] is then the Adapters, and no longer your head. Attach, and fit the
    router, before the model is wrapped in DistributedDataParallel, which would not synchronise the
    skills.

    mix: mix_skills, or the faster kernels.mix_skills; a method that mixes factors replaces it.
    method: the class that computes the weights. width: D of the embeddings given to `routed`, if it
    is not that of the first Embedding. num_tasks: how many training tasks there are, for methods
    that read task ids. extra_rank: this many ranks are divided evenly among the Linears. If a
    Linear gets e of them, each of its skills has rank R + e, and the scale alpha / (R + e). Raise
    ValueError, with the module unchanged, if a target does not exist or cannot have skills.
    """
    # The wrapper that torch.compile returns would give all names a prefix.
    module = getattr(module, "_orig_mod", module)
    linears = target_linears(module, config.targets)
    N = len(linears)
    S, R = method.skill_shape(config, num_tasks)
    alpha = config.rank if config.alpha is None else config.alpha
    skills = []
    for n, linear in enumerate(linears.values()):
        # The first n of the N Linears together have floor(n * extra_rank / N) of the extra ranks.
        before = (n * extra_rank) // N
        after = ((n + 1) * extra_rank) // N
        rank = R + after - before
        skills.append(new_skills(linear, S, rank, alpha / rank, mix, generator))
    built = method(
        linears,
        skills,
        config,
        width=width or embedding_width(module),
        num_tasks=num_tasks,
        generator=generator,
    )
    adapters = Adapters(module, linears, skills, built)
    adapters.config = config
    module.skill_adapters = adapters.train(module.training)
    return adapters


def target_linears(module: nn.Module, targets: Sequence[str]) -> Linears:
    """Return {path: Linear} of the Linears named in `targets`, in the order of the module.

    "all" stands for every Linear but the output head, which is what a method
    get_output_embeddings() returns. Raise ValueError if a target does not exist or cannot have
    skills.
    """
    heads = []
    for child in module.modules():
        if hasattr(child, "get_output_embeddings"):  # as in transformers
            heads.append(child.get_output_embeddings())

    available = set()
    found = {}
    for owner_path, owner in module.named_modules():
        for name, child in owner._modules.items():
            if not isinstance(child, nn.Linear):
                continue
            path = f"{owner_path}.{name}".lstrip(".")
            available.add(name)
            if hasattr(child, "skill_A"):
                raise ValueError(f"module: {path} has skills already; detach() them first")
            is_wanted = name in targets or ("all" in targets and child not in heads)
            if not is_wanted or child in found.values():  # one in two places is adapted once
                continue
            if "forward" in vars(child):
                raise ValueError(
                    f"targets: {path}: its forward was replaced, as accelerate does for a base on "
                    "several devices, and would bypass the skills; put the base on one device"
                )
            if isinstance(owner, nn.MultiheadAttention | nn.TransformerEncoderLayer):
                raise ValueError(
                    f"targets: {path}: its {type(owner).__name__} reads the weight without calling "
                    "the Linear, which bypasses the skills; choose other Linears"
                )
            found[path] = child

    missing = set(targets) - {"all"} - available
    if missing or not found:
        names = ", ".join(sorted(missing or targets))
        choices = ", ".join(sorted(available)) or "none"
        raise ValueError(f"targets: no Linear has the name {names}; the model has {choices}")
    return found
