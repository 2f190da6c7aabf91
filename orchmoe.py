"""OrchMoE in one file that needs torch alone: copy it. LoRA skills in frozen Linears, a Task Router that
reads the source sample, a task-skill allocation matrix in each Linear. Unofficial, after Wang et al. 2024
(arXiv 2401.10559); docs/paper.md grades what is stated, secondary, inferred and chosen. MIT licence.

    x_hat = mean_L(softmax(X X^T / sqrt D) X + X)              (B,D)      TaskRouter.features
    w     = softmax(W_task (x_hat - mu) / sd + b)              (B,K)      TaskRouter.forward
    Zhat  = sigmoid(Z), each row divided by its sum            (N,K,S)    OrchMoE.allocation_weights
    c     = w Zhat                                             (N,B,S)    OrchMoE.route
    y     = W0 x + scale * sum_s c_s B_s A_s x                            SkillLinear.forward, mix_skills

X = rmsnorm(E), E the embeddings of the source; B batch, L length, D d_in (of the router: the width of E), O
d_out, K abstract tasks, S skills, R rank, N adapted Linears.  Test: pytest tests/test_orchmoe.py

    adapters = attach(model, OrchMoEConfig())      # freezes the model, puts skills into its q and v
    with adapters.routed(model.embed(ids), mask):  # until after backward, or for a whole generate
        model.loss(ids, mask, labels).backward()
"""

from __future__ import annotations

import functools
import math
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

Mix = Callable[..., Tensor]  # mix_skills, or a function of its signature
ALL = ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo", "gate", "up", "down")  # the target `all`


@dataclass(frozen=True)
class OrchMoEConfig:
    """Adapters: what is put into the frozen base."""

    tasks: int = 8  # K, abstract tasks of the router
    skills: int = 4  # S, LoRA skills in each adapted Linear
    rank: int = 2  # R, rank of one skill
    alpha: float | None = None  # the skills' output is scaled by alpha / rank; left out: alpha = rank
    targets: tuple[str, ...] = ("q", "v")  # names of the Linears to adapt; all = every one of a block
    router: Literal["sample", "token", "none"] = "sample"  # on the source; on each token; w = 1/K
    router_attention: bool = True  # self-attention before the mean over the sample
    router_norm: Literal["softmax", "none"] = "softmax"  # none: w = W x_hat + b as it stands
    router_init: Literal["kmeans", "normal"] = "kmeans"  # start of W_task
    router_dropout: float = 0.0  # share of the training samples whose w is 1/K
    allocation_std: float = 3.0  # start of Z: N(0, this)
    gumbel: bool = False  # relaxed Bernoulli noise on Z in training

    def __post_init__(self) -> None:
        alpha, share = 1 if self.alpha is None else self.alpha, self.router_dropout
        for name, good, what in (
                ("tasks", self.tasks >= 1, "1 or more"), ("skills", self.skills >= 1, "1 or more"),
                ("rank", self.rank >= 1, "1 or more"), ("alpha", 0 < alpha < math.inf, "a number above 0"),
                ("targets", self.targets and not isinstance(self.targets, str), "a tuple of names"),
                ("router", self.router in ("sample", "token", "none"), "sample, token or none"),
                ("router_norm", self.router_norm in ("softmax", "none"), "softmax or none"),
                ("router_init", self.router_init in ("kmeans", "normal"), "kmeans or normal"),
                ("router_dropout", share == 0 or 0 < share <= 1 and self.router == "sample",
                 "a share from 0 to 1, of the sample router"),
                ("allocation_std", 0 <= self.allocation_std < math.inf, "a number from 0")):
            if not good:
                raise ValueError(f"{name}: {getattr(self, name)!r} must be {what}")


class Routing(NamedTuple):
    """What `routed` computed: w is None for the token router, whose c exists only inside each Linear."""

    w: Tensor | None  # (B,K), or (K,) where it is the same for every sample
    allocation: Tensor | None  # Zhat (N,K,S) as (1,N,K,S), or (B,N,K,S) with noise
    c: Tensor | None  # (N,B,S), or (N,1,S)
    shared: bool  # the same for every sample, so that any number of rows may come


# -------------------------------------------------------------------------------------------- the task router


class TaskRouter(nn.Module):
    """Weights of K abstract tasks for each source sample, in float32 whatever the base's dtype. Trains W_task
    (K,D) and b (K): the attention has no parameters."""

    def __init__(self, width: int, config: OrchMoEConfig, generator: Generator | None = None):
        super().__init__()
        self.config = config
        self.task = nn.Parameter(_normal((config.tasks, width), 0.02, generator))
        self.bias = nn.Parameter(torch.full((config.tasks,), _bias_start(config)))
        self.register_buffer("mu", torch.zeros(width))
        self.register_buffer("sd", torch.ones(width))

    def features(self, embeddings: Tensor, mask: Tensor | None = None) -> Tensor:
        """x_hat (B,D) before standardising, of embeddings (B,L,D) and mask (B,L), true at tokens."""
        if embeddings.dim() != 3 or embeddings.shape[-1] != len(self.mu):
            raise ValueError(f"embeddings: (B,L,D) of the source with D = {len(self.mu)} (token ids must be "
                             f"embedded; attach(..., width=D) for another), not {tuple(embeddings.shape)}")
        if mask is not None and mask.shape != embeddings.shape[:2]:
            raise ValueError(f"mask: (B,L) = {tuple(embeddings.shape[:2])}, not {tuple(mask.shape)}")
        with _without_autocast(embeddings):
            X = F.rms_norm(embeddings.to(self.task.dtype), embeddings.shape[-1:], eps=1e-6)  # (B,L,D)
            mask = X.new_ones(X.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
            X = X.masked_fill(~mask.unsqueeze(-1), 0)  # junk in the padding, even infinite, reaches no sum
            mean = mask.to(X) / mask.sum(1, keepdim=True).clamp(min=1)  # (B,L); a row may be all padding
            if self.config.router_attention:
                scores = X @ X.mT / math.sqrt(X.shape[-1])  # (B,L,L)
                P = scores.masked_fill(~mask.unsqueeze(1), torch.finfo(scores.dtype).min).softmax(-1)
                mean = mean + (mean.unsqueeze(1) @ P).squeeze(1)  # mean_L(P) before X: no (B,L,D) product
            return (mean.unsqueeze(1) @ X).squeeze(1)  # (B,D)

    def forward(self, embeddings: Tensor, mask: Tensor | None = None) -> Tensor:
        """w (B,K) of embeddings (B,L,D) and mask (B,L): rows sum to 1, but with router_norm none they are
        any numbers."""
        with _without_autocast(embeddings):
            x_hat = (self.features(embeddings, mask) - self.mu) / self.sd
            logits = F.linear(x_hat, self.task, self.bias)
        return logits.softmax(-1) if self.config.router_norm == "softmax" else logits

    @torch.no_grad()
    def fit(self, features: Tensor, generator: Generator | None = None) -> None:
        """Sets mu, sd and, with router_init kmeans, W_task from x_hat (M,D) of M training sources, without
        labels: centres of a spherical k-means, as long as makes the mean entropy of w a third of ln K."""
        self.mu.copy_(features.mean(0))
        sd = features.std(0, correction=0)
        # A feature that is constant here and alive later would be divided by nothing, and alone decide w.
        self.sd.copy_(sd.clamp(min=max(0.1 * sd.median().item(), 1e-6)))
        if self.config.router_init != "kmeans":
            return
        x_hat = (features - self.mu) / self.sd
        logits = x_hat @ (centres := spherical_kmeans(x_hat, self.config.tasks, generator)).T  # (M,K)
        softmax, K = self.config.router_norm == "softmax", self.config.tasks
        self.task.copy_(centres * (_length_for_entropy(logits, math.log(K) / 3) if softmax
                                   else 1 / K / logits.std().clamp(min=1e-6)))


def spherical_kmeans(points: Tensor, k: int, generator: Generator | None = None) -> Tensor:
    """Unit centres (k,D) at a local maximum of the sum over points (M,D) of the cosine to the nearest;
    k-means++ start."""
    points = F.normalize(points, dim=-1)
    distance, picks = torch.ones(len(points)), []
    for _ in range(k):
        picks.append(int(torch.multinomial(distance.clamp(min=1e-9), 1, generator=generator)))
        distance = torch.minimum(distance, 1 - (points @ points[picks[-1]]).cpu())
    centres = points[picks]
    for _ in range(50):
        nearest = F.one_hot((points @ centres.T).argmax(1), k).to(points.dtype)  # (M,k)
        moved = F.normalize(nearest.T @ points, dim=-1)
        moved = torch.where(nearest.sum(0).unsqueeze(1) > 0, moved, centres)  # an empty cluster stays
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def _length_for_entropy(logits: Tensor, target: float) -> float:
    """Factor on `logits` (M,K) that makes the mean entropy of their softmax `target` nats, by bisection."""
    low, high = -12.0, 12.0
    for _ in range(50):
        middle = (low + high) / 2
        entropy = torch.special.entr((math.exp(middle) * logits).softmax(-1)).sum(-1).mean()
        low, high = (middle, high) if entropy > target else (low, middle)
    return math.exp(low)


def _bias_start(config: OrchMoEConfig) -> float:
    return 0.0 if config.router_norm == "softmax" else 1 / config.tasks


def _normal(shape: tuple[int, ...], std: float, generator: Generator | None) -> Tensor:
    return torch.empty(shape).normal_(0, std, generator=generator)  # on the CPU: no device changes the start


def _without_autocast(x: Tensor) -> torch.autocast:
    """The router and c are float32, whatever the base computes in."""
    return torch.autocast(x.device.type, enabled=False)


def _at_least_float32(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function of a Module._apply, .to(dtype) say; what it would round below float32 it only moves."""
    def wide(tensor: Tensor) -> Tensor:
        done = function(tensor)
        return tensor.to(done.device) if done.dtype in (torch.bfloat16, torch.float16) else done

    return wide


# ------------------------------------------------------------------------------------------------- the skills


def mix_skills(x: Tensor, A: Tensor, B: Tensor, c: Tensor, scale: float, weight: Tensor | None = None,
               bias: Tensor | None = None) -> Tensor:
    """scale * sum_s c_s B_s A_s x as two GEMMs of the concatenated rank S R: skills mix their outputs
    (Eq. 3, as summarised); with weight (O,D), and bias (O,) if there is one, on top of weight x + bias.

    x (B,L,D); A (S,R,D); B (S,R,O); c (B,S) per sample, (1,S) for all, or (B,L,S) per token -> (B,L,O) in x's
    dtype."""
    S, R, D = A.shape
    h = F.linear(x, A.reshape(S * R, D).to(x.dtype))  # (B,L,SR)
    c = (scale * c).to(x)  # of x's device too: a large base may be spread over several
    c = (c if c.dim() == 3 else c.unsqueeze(1)).repeat_interleave(R, dim=-1)  # (B,1 or L,SR)
    mixed = (h * c) @ B.reshape(S * R, -1).to(x.dtype)
    return mixed if weight is None else F.linear(x, weight, bias).add_(mixed)


class SkillLinear(nn.Linear):
    """A Linear of the base with S skills of rank R. It is the very object, with its weight, hooks and names:
    only its class becomes this one, in front of its own."""

    skill_base: type = nn.Linear  # the class before

    def skill_start(self, skills: int, rank: int, alpha: float, mix: Mix, generator: Generator | None):
        weight, bound = self.weight, 1 / math.sqrt(self.in_features)
        # kaiming_uniform(a = sqrt 5) of each (R,D) slice by itself; float32 over a bf16 base
        A = torch.empty(skills, rank, self.in_features).uniform_(-bound, bound, generator=generator)
        self.skill_A = nn.Parameter(A.to(weight.device))
        self.skill_B = nn.Parameter(torch.zeros(skills, rank, self.out_features, device=weight.device))
        self.skill_scale, self.skill_mix = alpha / rank, mix
        # Where the Linear computes W0 x + b and nothing else, `mix` does it together with the skills.
        self.skill_plain = (type(self).skill_base.forward is nn.Linear.forward
                            and type(self._parameters.get("weight")) is nn.Parameter
                            and weight.is_floating_point())
        self.skill_routing: Tensor | None = None  # set by Adapters.routed: c (B,S), or Zhat (B,K,S)
        self.skill_task = self.skill_bias = None  # of the token router
        self.skill_shared, self.skill_beams, self.skill_visited = False, 1, False

    def skill_token_router(self, tasks: int, norm: str, bias_start: float | None,
                           generator: Generator | None = None) -> None:
        """Gives this Linear a router of its own, w = softmax(W_task x + b) (B,L,K); without b where None."""
        device, self.skill_norm = self.weight.device, norm
        self.skill_task = nn.Parameter(_normal((tasks, self.in_features), 0.02, generator).to(device))
        if bias_start is not None:
            self.skill_bias = nn.Parameter(torch.full((tasks,), bias_start, device=device))

    def skill_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters(recurse=False) if name.startswith("skill_")}

    def forward(self, x: Tensor) -> Tensor:
        """x (B,..,D) -> W0 x + bias + scale * sum_s c_s B_s A_s x, (B,..,O); x (D,) is one sample."""
        rows = x.reshape(x.shape[:-1][:1].numel(), x.shape[1:-1].numel(), self.in_features)  # (B,L,D)
        skills = rows, self.skill_A, self.skill_B, self._skill_weights(rows), self.skill_scale
        self.skill_visited = True
        if self.skill_plain and not any(p.requires_grad for p in (self.weight, self.bias) if p is not None):
            return self.skill_mix(*skills, self.weight, self.bias).view(*x.shape[:-1], self.out_features)
        y = super().forward(x)  # its own: quantised, parametrised, of a subclass, or training
        return y + self.skill_mix(*skills).view_as(y).to(y.dtype)

    def _skill_weights(self, x: Tensor) -> Tensor:
        """c for x (B,L,D): (B,S) or (1,S) as handed over, or (B,L,S) from the token router."""
        routing = self.skill_routing
        if routing is None:
            raise RuntimeError("a Linear with skills was called outside `with adapters.routed(...)`")
        if not self.skill_shared and routing.shape[0] != x.shape[0]:
            if routing.shape[0] * self.skill_beams != x.shape[0]:
                raise ValueError(f"{x.shape[0]} rows in a Linear routed for {routing.shape[0]} samples of "
                                 f"{self.skill_beams} beams; route this very batch, or give beams=")
            routing = routing.repeat_interleave(self.skill_beams, dim=0)
        if self.skill_task is None or routing.dim() == 2:
            return routing
        with _without_autocast(x):
            logits = F.linear(x.to(routing.dtype), self.skill_task, self.skill_bias)  # (B,L,K)
            w = logits.softmax(-1) if self.skill_norm == "softmax" else logits
            return w @ routing.to(x.device)  # (B,L,S)

    def skill_folded(self, c: Tensor) -> nn.Parameter:
        """The weight (O,D) with the skills of c (1,S): what they make of the rows of I is their matrix."""
        eye = torch.eye(self.in_features, dtype=self.skill_A.dtype, device=self.skill_A.device).unsqueeze(0)
        with _without_autocast(eye):
            update = self.skill_mix(eye, self.skill_A, self.skill_B, c, self.skill_scale)[0].T  # (O,D)
        return nn.Parameter((self.weight + update).to(self.weight.dtype), requires_grad=False)

    def _apply(self, function: Callable, recurse: bool = True) -> nn.Module:
        own = {id(t) for p in self.skill_parameters().values() for t in (p, p.grad)}
        wide = _at_least_float32(function)
        return super()._apply(lambda t: wide(t) if id(t) in own else function(t), recurse)

    def __reduce_ex__(self, protocol: int):  # pickle and deepcopy: the class has no name to be found by
        return _unpickled, (type(self).skill_base,), self.__dict__


@functools.cache  # one class for all Linears of a kind, else torch.compile would compile each apart
def _with_skills(base: type) -> type:
    return SkillLinear if base is nn.Linear else type("Skill" + base.__name__, (SkillLinear, base),
                                                      {"skill_base": base})


def _unpickled(base: type) -> SkillLinear:
    return SkillLinear.__new__(_with_skills(base))


# ---------------------------------------------------------------------------------------- router + allocation

_CLAIM = threading.Lock()  # look and take are one step: the second of two threads is refused, not mixed up


class Adapters(nn.Module):
    """The one door through which the adapted Linears get their weights of skills, and the verbs. A method
    says in `route` what these weights are."""

    noise_shape: tuple[int, ...] | None = None  # of one sample's noise, where training wants noise
    router_dropout = 0.0  # share of the samples that training routes by w = 1/K

    def __init__(self, linears: dict[str, SkillLinear]):
        super().__init__()
        self.linears = linears  # a plain dict: they are registered where they stand in the base
        self._module: list[nn.Module] = []  # the base; in a list, so that it is not registered below itself
        self._trained: list[str] = []  # names of the base's parameters that required gradients
        self._open = ""  # the verb that holds the door
        self._routing: Routing | None = None
        self._reported = False

    def forward(self, x: Tensor) -> Tensor:
        """x as it is: an nn.Sequential calls whatever is registered on it, its adapters too."""
        return x

    def route(self, embeddings: Tensor | None = None, mask: Tensor | None = None, **options) -> Routing:
        """What all Linears need for one batch; arguments as for `routed`."""
        raise NotImplementedError

    def fit_router(self, *_args, **_kwargs) -> None:
        """Prepares a router that starts from training sources; most methods have none to prepare."""

    @contextmanager
    def routed(self, embeddings: Tensor | None = None, mask: Tensor | None = None, *,
               task_ids: Tensor | None = None, noise: Tensor | None = None, drop: Tensor | None = None,
               w: Tensor | None = None, beams: int = 1) -> Iterator[Routing]:
        """Routes one batch: inside, every SkillLinear has its c; leaving clears. Stay inside until after
        backward or for a whole generate. One backward each, and where gradients accumulate one `routed` for
        each micro-batch: checkpointed blocks run again in backward, with the c that they find then, and
        inside another `routed` that would be silently wrong.

        embeddings (B,L,D) of the SOURCE; mask (B,L), 1 or true at tokens and 0 at padding: neither PyTorch's
        key_padding_mask, which is the reverse, nor an additive one. noise u (B,N,K,S) for gumbel and drop
        (B,), true where w is to be 1/K, for router_dropout, both drawn here if left out; w (K,) or (B,K)
        fixes the routing; beams: rows a sample may have instead of one. RuntimeError inside another verb."""
        with self._claimed("routed()"):
            trains = torch.is_grad_enabled()
            try:
                self._hand_out(self.route(embeddings, mask, task_ids=task_ids, noise=noise, drop=drop, w=w),
                               beams)
                yield self._routing
                self._report_unvisited(trains)
            finally:
                self._routing = None
                for linear in self.linears.values():
                    linear.skill_routing = None

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the base as it was before attach, to the bit. RuntimeError inside another verb."""
        with self._claimed("disabled()"), self._own_classes({}):
            yield

    @contextmanager
    def folded(self, w: Tensor | None = None, **routing: Tensor | None) -> Iterator[None]:
        """Inside, the skills of ONE routing are in the weights, W0 + scale * sum_s c_s B_s A_s (O,D), so that
        any number of rows runs at the base's speed; leaving puts the very weights of before back. The routing
        is that of w (K,), or of one sample: embeddings= (1,L,D) and mask= (1,L), or task_ids= (1,).
        ValueError for more samples, noise, and where `unfoldable` says why; RuntimeError inside another."""
        with self._claimed("folded()"), self._own_classes(self._folded_weights(w, routing)):
            yield

    def merge(self, w: Tensor | None = None, **routing: Tensor | None) -> None:
        """`folded` for good, to be served without this code; tied weights are no longer tied."""
        with self._claimed("merge()"):
            for linear, weight in self._folded_weights(w, routing).items():
                linear.weight = weight
            self._leave()

    def detach(self) -> None:
        """Takes the skills out: the module of before, its classes and what trained included."""
        with self._claimed("detach()"):
            self._leave()

    def unfoldable(self) -> str:
        """Why the skills of one routing cannot go into the weights; empty where they can."""
        for name, linear in self.linears.items():
            if linear.skill_task is not None:
                return "with a token router every token has a w of its own, which no one weight equals"
            if not linear.skill_plain:
                return f"{name}: a {linear.skill_base.__name__} computes with more than a plain weight"
        return ""

    @contextmanager
    def _claimed(self, verb: str) -> Iterator[None]:
        with _CLAIM:
            if self._open:
                raise RuntimeError(f"{verb}: {self._open} is already open; leave it first, and of several "
                                   "threads let one at a time use the model")
            if not self.linears:
                raise RuntimeError("the skills are merged or detached: call the module as it is")
            self._open = verb
        try:
            yield
        finally:
            self._open = ""

    @contextmanager
    def _own_classes(self, weights: dict[SkillLinear, nn.Parameter]) -> Iterator[None]:
        """The adapted Linears under the classes they had, with these weights: nothing of ours takes time."""
        before = [(linear, type(linear), linear.weight) for linear in self.linears.values()]
        try:
            for linear, _, _ in before:
                linear.__class__ = linear.skill_base
            for linear, weight in weights.items():
                linear.weight = weight
            yield
        finally:
            for linear, adapted, weight in before:
                linear.__class__ = adapted
                if linear in weights:
                    linear.weight = weight

    @torch.no_grad()
    def _folded_weights(self, w: Tensor | None, routing: dict) -> dict[SkillLinear, nn.Parameter]:
        if reason := self.unfoldable():
            raise ValueError(f"{self._open}: {reason}")
        if self.training and (self.noise_shape or self.router_dropout):
            raise ValueError(f"{self._open}: training draws noise; call .eval() first")
        c = self.route(w=w, **routing).c
        if c.shape[1] != 1:
            raise ValueError(f"{self._open}: give one sample or one w (K,), not {c.shape[1]}")
        return {linear: linear.skill_folded(part)
                for linear, part in zip(self.linears.values(), c, strict=True)}

    def _leave(self) -> None:
        for linear in self.linears.values():
            linear.__class__ = linear.skill_base
            for name in [*linear._parameters, *vars(linear)]:
                if name.startswith("skill_"):
                    delattr(linear, name)
        module = self._module[0]
        del module.skill_adapters
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in self._trained)
        self.linears = {}

    def _hand_out(self, routing: Routing, beams: int) -> None:
        """Each Linear's slice: a tensor attribute is an input to torch.compile, and not a constant."""
        self._routing = routing
        parts = routing.allocation.unbind(1) if routing.c is None else routing.c.unbind(0)
        for linear, part in zip(self.linears.values(), parts, strict=True):
            linear.skill_routing, linear.skill_shared, linear.skill_beams = part, routing.shared, beams

    def keep(self, rows: Tensor) -> None:
        """Drops all but the given rows (positions among the current samples) from here on: the on_keep of a
        Backbone's generate. In `folded` and `disabled` all rows are alike, and nothing is dropped."""
        if self._open in ("folded()", "disabled()"):
            return
        for linear in () if self.routing().shared else self.linears.values():
            if linear.skill_beams > 1:
                raise ValueError("keep() counts samples, and with beams a sample has several rows")
            if len(linear.skill_routing) > 1:  # else one allocation, of the token router
                linear.skill_routing = linear.skill_routing[rows]

    def routing(self) -> Routing:
        """w, Zhat and c of the batch being routed, as it came; RuntimeError outside `routed`."""
        if self._routing is None:
            raise RuntimeError("no batch is being routed; call inside `with adapters.routed(...)`")
        return self._routing

    def _report_unvisited(self, trains: bool) -> None:
        """Linears whose owner computes with their weights itself would silently stay unadapted."""
        unvisited = [name for name, linear in self.linears.items() if not linear.skill_visited]
        if self._reported or (len(unvisited) == len(self.linears) and not trains):  # said, or no forward yet
            return
        self._reported = True
        if unvisited:
            few = ", ".join(unvisited[:3]) + ", ..." * (len(unvisited) > 3)
            warnings.warn(f"{len(unvisited)} of {len(self.linears)} adapted Linears were not called in the "
                          f"first routed batch, so their skills cannot train: {few}", stacklevel=4)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """What trains, by kind, each with a learning rate of its own: skills; the router of samples, on
        standardised features; the routers of tokens, on raw ones; allocation."""
        groups = {kind: [] for kind in ("skills", "router", "token_router", "allocation")}
        for name, parameter in self.named_parameters():
            groups["allocation" if name.startswith("allocation") else "router"].append(parameter)
        for linear in self.linears.values():
            for name, parameter in linear.skill_parameters().items():
                groups["skills" if name in ("skill_A", "skill_B") else "token_router"].append(parameter)
        return groups

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False) -> dict[str, Tensor]:
        """Everything that training changes and nothing of the base: router, Z, and the skills under their
        Linears' names; inside the base's own state_dict (destination given) router and Z only."""
        state = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        for owner, linear in self.linears.items() if destination is None else ():
            state |= {f"{owner}.{name}": parameter if keep_vars else parameter.detach()
                      for name, parameter in linear.skill_parameters().items()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], strict: bool = True) -> None:
        """Copies what `state_dict` gave into place. ValueError naming the first difference of names or
        shapes, before anything is changed; strict=False lets names differ, never shapes."""
        own = self.state_dict(keep_vars=True)
        if strict and (odd := sorted(own.keys() ^ state.keys())):
            raise ValueError(f"adapter state: {odd[0]} is {'missing' if odd[0] in own else 'unknown'} "
                             f"({len(odd)} names differ; a whole model's goes into model.load_state_dict)")
        pairs = {name: (own[name], state[name]) for name in sorted(own.keys() & state.keys())}
        for name, (to, given) in pairs.items():
            if given.shape != to.shape:
                raise ValueError(f"adapter state: {name} is {tuple(given.shape)}, not {tuple(to.shape)}")
        for to, given in pairs.values():
            to.copy_(given)

    def _apply(self, function: Callable, recurse: bool = True) -> nn.Module:
        return super()._apply(_at_least_float32(function), recurse)  # router, mu, sd, Z stay float32


class OrchMoE(Adapters):
    """Task Router and allocation matrices Z (N,K,S) of all adapted Linears."""

    def __init__(self, linears: dict[str, SkillLinear], config: OrchMoEConfig, width: int,
                 generator: Generator | None = None):
        super().__init__(linears)
        self.config, self.router_dropout = config, config.router_dropout
        device = next(iter(linears.values())).weight.device
        shape = (len(linears), config.tasks, config.skills)
        self.allocation = nn.Parameter(_normal(shape, config.allocation_std, generator).to(device))
        self.noise_shape = shape if config.gumbel else None
        self.router = TaskRouter(width, config, generator).to(device) if config.router == "sample" else None
        if config.router == "token":
            for linear in linears.values():
                linear.skill_token_router(config.tasks, config.router_norm, _bias_start(config), generator)

    def allocation_weights(self, noise: Tensor | None = None) -> Tensor:
        """Zhat (N,K,S) as (1,N,K,S), or (B,N,K,S) with noise u (B,N,K,S) in [0,1): relaxed Bernoulli of
        temperature 1 (Maddison et al. 2017), each row divided by its sum."""
        Z = self.allocation.unsqueeze(0)
        if noise is not None:
            Z = Z + noise.to(Z).clamp(1e-6, 1 - 1e-6).logit()
        return F.logsigmoid(Z).softmax(-1)  # sigmoid(z) / sum sigmoid(z), without an epsilon

    def route(self, embeddings: Tensor | None = None, mask: Tensor | None = None, *,
              task_ids: Tensor | None = None, noise: Tensor | None = None, drop: Tensor | None = None,
              w: Tensor | None = None) -> Routing:
        """w, Zhat and c of all Linears at once. task_ids are not used: OrchMoE needs none."""
        if embeddings is None and noise is None and self.training and self.noise_shape:
            raise ValueError("noise: training with gumbel needs noise (B,N,K,S), or embeddings to know B")
        if not (self.training and self.noise_shape):
            noise = None
        elif noise is None:
            noise = torch.rand(len(embeddings), *self.noise_shape)
        allocation = self.allocation_weights(noise)
        if w is None and self.config.router == "token":
            return Routing(None, allocation, None, noise is None)
        if w is None:
            w = self._task_weights(embeddings, mask, drop)
        if w.shape[-1] != self.config.tasks:
            raise ValueError(f"w: (K,) or (B,K) with K = {self.config.tasks}, not {tuple(w.shape)}")
        with _without_autocast(allocation):
            c = torch.einsum("bk,bnks->nbs", w.to(allocation).reshape(-1, self.config.tasks), allocation)
        return Routing(w, allocation, c, w.dim() == 1 and noise is None)

    def _task_weights(self, embeddings: Tensor | None, mask: Tensor | None, drop: Tensor | None) -> Tensor:
        if self.config.router == "none":
            return self.allocation.new_full((self.config.tasks,), 1 / self.config.tasks)
        if embeddings is None:
            raise ValueError("embeddings: the sample router reads the source's embeddings (B,L,D)")
        w = self.router(embeddings, mask)
        if self.training and self.router_dropout:  # skills that serve the mean routing serve unseen tasks
            drop = torch.rand(len(w)) < self.router_dropout if drop is None else drop
            w = torch.where(drop.to(w.device).unsqueeze(1), 1 / self.config.tasks, w)
        return w

    @torch.no_grad()
    def fit_router(self, embeddings: Iterable[Tensor], masks: Iterable[Tensor] | None = None, *,
                   generator: Generator | None = None) -> None:
        """Once, before training: mu, sd and the k-means start of the sample router from batches of training
        sources, embeddings (B,L,D) and, in the same order, masks (B,L); without masks there is no padding.
        One pass, no labels; other routers need none. ValueError for fewer sources than K, or than 2."""
        if self.router is None:
            return
        pairs = ((e, None) for e in embeddings) if masks is None else zip(embeddings, masks, strict=True)
        features = [self.router.features(e, m) for e, m in pairs]
        M, K = sum(map(len, features)), self.config.tasks
        if M < (least := max(2, K) if self.config.router_init == "kmeans" else 2):
            raise ValueError(f"fit_router: {M} sources for K = {K} abstract tasks; give at least {least}, "
                             "better hundreds")
        with _without_autocast(features[0]):
            self.router.fit(torch.cat(features), generator)


# ----------------------------------------------------------------------------------------------------- attach


def attach(module: nn.Module, config: OrchMoEConfig, mix: Mix = mix_skills, *, width: int | None = None,
           generator: Generator | None = None) -> Adapters:
    """Freezes `module`, gives skills to its Linears named in config.targets, where they stand, and registers
    the router as `module.skill_adapters`. Base key names survive; every new name carries `skill_`. Inputs
    must be batch-first. A head of your own that is to train gets its requires_grad_() after.

    mix: mix_skills, or kernels.mix_skills. width: D of what `routed` gets, where the first nn.Embedding is
    another. generator: of the initial values. ValueError where nothing matches, where adapters are already,
    and for Linears that would go round their skills: the module is then as before."""
    found = target_linears(module, config.targets)
    width = router_width(module) if width is None else width
    linears = add_skills(found, [config.rank] * len(found), config, mix, generator)
    return register(module, OrchMoE(linears, config, width, generator))


def target_linears(module: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """{path: Linear} of all that `targets` names, in the module's order. ValueError for a name that is not
    there, for what cannot be adapted, and where adapters are already."""
    children = [(owner, f"{path}.{name}".lstrip("."), child) for path, owner in module.named_modules()
                for name, child in owner.named_children() if isinstance(child, nn.Linear)]
    have = {path.rpartition(".")[2] for _, path, _ in children}
    own = set(targets) - {"all"}
    names = own.union(ALL if "all" in targets else ())
    if own - have or not have & names:
        absent, there = ", ".join(sorted(own - have or names)), ", ".join(sorted(have)) or "none"
        raise ValueError(f"targets: no Linear is named {absent}; there are {there}")
    found: dict[nn.Linear, str] = {}
    for owner, path, child in children:
        if isinstance(child, SkillLinear):
            raise ValueError(f"module: {path} has skills already; detach() them, or attach to a fresh copy")
        if path.rpartition(".")[2] in names:
            if isinstance(owner, nn.MultiheadAttention | nn.TransformerEncoderLayer):
                raise ValueError(f"targets: {path}: a {type(owner).__name__} would bypass its skills")
            if nn.parameter.is_lazy(child.weight):
                raise ValueError(f"targets: {path} has no shape yet; run the module once before attach")
            if "forward" in vars(child):
                raise ValueError(f"targets: {path} has a forward of its instance, as accelerate gives, which "
                                 "would bypass its skills; remove it before attach")
            found.setdefault(child, path)  # a Linear in two places is one, under its first name
    return {path: child for child, path in found.items()}


def add_skills(linears: dict[str, nn.Linear], ranks: Sequence[int], config: OrchMoEConfig, mix: Mix,
               generator: Generator | None, *, skills: int | None = None) -> dict[str, SkillLinear]:
    """Gives each Linear S skills of its rank, scaled by alpha / rank; LoRA is one skill of rank S R."""
    alpha = config.rank if config.alpha is None else config.alpha
    for linear, rank in zip(linears.values(), ranks, strict=True):
        linear.__class__ = _with_skills(type(linear))
        linear.skill_start(skills or config.skills, rank, alpha, mix, generator)
    return linears


def register(module: nn.Module, adapters: Adapters) -> Adapters:
    """Makes the adapters a part of `module`, in its mode of training or evaluation, and freezes the rest."""
    own = {name: p for name, p in module.named_parameters() if "skill_" not in name}
    adapters._trained = [name for name, p in own.items() if p.requires_grad]
    for parameter in own.values():
        parameter.requires_grad_(False)
    module.skill_adapters, adapters._module = adapters.train(module.training), [module]
    return adapters


def router_width(module: nn.Module) -> int:
    """D of the embeddings that `routed` gets: of the first nn.Embedding, without one of the first Linear."""
    embeddings = [m.embedding_dim for m in module.modules() if isinstance(m, nn.Embedding)]
    return [*embeddings, *(m.in_features for m in module.modules() if isinstance(m, nn.Linear))][0]
