"""OrchMoE in one file that needs torch alone: copy it. LoRA skills in frozen Linears, a Task Router that
reads the source sample, a task-skill allocation matrix in each Linear. Unofficial, after Wang et al. 2024
(arXiv 2401.10559); docs/paper.md says what is stated there and what was chosen. MIT licence.

    x_hat = mean_L(softmax(X X^T / sqrt D) X + X)              (B,D)      TaskRouter.features
    w     = softmax(W_task (x_hat - mu) / sd + b)              (B,K)      TaskRouter.forward
    Zhat  = sigmoid(Z), each row divided by its sum            (N,K,S)    OrchMoE.allocation_weights
    c     = w Zhat                                             (N,B,S)    OrchMoE.route
    y     = W0 x + scale * sum_s c_s B_s A_s x                            SkillLinear.forward, mix_skills

X = rmsnorm(E), E the embeddings of the source; B batch, L length, D d_in (of the router: the width of E), O
d_out, K abstract tasks, S skills, R rank, N adapted Linears.  Test: pytest tests/test_orchmoe.py

    adapters = attach(model, OrchMoEConfig())      # skills in q and v, all else frozen; then fit_router once
    with adapters.routed(model.embed(ids), mask):  # until after backward, or for a whole generate
        model.loss(ids, mask, labels).backward()
"""

import functools
import math
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
        for name, good, what in (
            *((name, 1 <= getattr(self, name) <= 2**20, "1 to 2^20") for name in ("tasks", "skills", "rank")),
            ("alpha", self.alpha is None or 0 < self.alpha < 1e18, "a number above 0, below 1e18"),
            ("targets", self.targets and isinstance(self.targets, tuple | list)
             and all(isinstance(name, str) for name in self.targets), "a tuple of names"),
            ("router", self.router in ("sample", "token", "none"), "sample, token or none"),
            ("router_norm", self.router_norm in ("softmax", "none"), "softmax or none"),
            ("router_init", self.router_init in ("kmeans", "normal"), "kmeans or normal"),
            ("router_dropout", 0 <= self.router_dropout <= (self.router == "sample"),
             "a share from 0 to 1, of the sample router"),
            ("allocation_std", 0 <= self.allocation_std < 1e18, "a number from 0, below 1e18"),
        ):
            if not good:
                raise ValueError(f"{name}: {getattr(self, name)!r} must be {what}")


class Routing(NamedTuple):
    """What `routed` computed: w is None for the token router, whose c exists only inside each Linear."""

    w: Tensor | None  # (B,K), or (K,) where it is the same for every sample
    allocation: Tensor | None  # Zhat (N,K,S) as (1,N,K,S), or (B,N,K,S) with noise
    c: Tensor | None  # (N,B,S), or (N,1,S)
    shared: bool  # the same for every sample, so that any number of rows may come


class TaskRouter(nn.Module):
    """w (B,K) of each source sample. Trains W_task (K,D) and b (K); the attention has no parameters."""

    def __init__(self, width: int, config: OrchMoEConfig, generator: Generator | None = None):
        super().__init__()
        self.config, K = config, config.tasks
        self.task = nn.Parameter(torch.empty(K, width).normal_(0, 0.02, generator=generator))
        self.bias = nn.Parameter(torch.full((K,), 0.0 if config.router_norm == "softmax" else 1 / K))
        self.register_buffer("mu", torch.zeros(width))
        self.register_buffer("sd", torch.ones(width))

    def features(self, embeddings: Tensor, mask: Tensor | None = None) -> Tensor:
        """x_hat (B,D) before standardising, of embeddings (B,L,D) and mask (B,L), true at tokens."""
        shape = tuple(getattr(embeddings, "shape", ()))
        if len(shape) != 3 or shape[-1] != len(self.mu):
            raise ValueError(f"embeddings: (B,L,D) of the source with D = {len(self.mu)} (token ids must be "
                             f"embedded; attach(..., width=D) for another), not {shape}")
        if mask is not None and mask.shape != shape[:2]:
            raise ValueError(f"mask: (B,L) = {shape[:2]}, not {tuple(mask.shape)}")
        with torch.autocast(embeddings.device.type, enabled=False):  # float32, whatever the base is in
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
        """w (B,K) of embeddings (B,L,D) and mask (B,L): rows sum to 1, but for router_norm none."""
        x_hat = (self.features(embeddings, mask) - self.mu) / self.sd
        with torch.autocast(x_hat.device.type, enabled=False):
            logits = F.linear(x_hat, self.task, self.bias)
            return logits.softmax(-1) if self.config.router_norm == "softmax" else logits

    @torch.no_grad()
    def fit(self, features: Tensor, generator: Generator | None = None) -> None:
        """Sets mu, sd and, with router_init kmeans, W_task from x_hat (M,D) of M training sources: centres of
        a spherical k-means, so long that the mean entropy of w is a third of ln K. No labels."""
        self.mu.copy_(features.mean(0))
        sd = features.std(0, correction=0)
        # A feature that is constant here and alive later, divided by nothing, would alone decide w.
        self.sd.copy_(sd.clamp(min=max(0.1 * sd.median().item(), 1e-6)))
        if self.config.router_init != "kmeans":
            return
        x_hat, K = (features - self.mu) / self.sd, self.config.tasks
        centres = spherical_kmeans(x_hat, K, generator)  # (K,D)
        logits = x_hat @ centres.T  # (M,K)
        length = (_length_for_entropy(logits, math.log(K) / 3) if self.config.router_norm == "softmax"
                  else 1 / K / logits.std().clamp(min=1e-6))
        self.task.copy_(centres * length)


def spherical_kmeans(points: Tensor, k: int, generator: Generator | None = None) -> Tensor:
    """Unit centres (k,D) of points (M,D) by the cosine to the nearest; k-means++ start."""
    points = F.normalize(points, dim=-1)
    distance, picks = torch.ones(len(points), device="cpu"), []
    for _ in range(k):
        picks.append(int(torch.multinomial(distance.clamp(min=1e-9), 1, generator=generator)))
        distance = torch.minimum(distance, 1 - (points @ points[picks[-1]]).cpu())
    centres = points[picks]
    for _ in range(50):  # more than it takes: what has converged stays as it is
        nearest = F.one_hot((points @ centres.T).argmax(1), k).to(points.dtype)  # (M,k)
        moved = F.normalize(nearest.T @ points, dim=-1)
        centres = torch.where(nearest.sum(0).unsqueeze(1) > 0, moved, centres)  # an empty cluster stays
    return centres


def _length_for_entropy(logits: Tensor, target: float) -> float:
    """Factor on logits (M,K) that gives their softmax this mean entropy, in nats; by bisection."""
    low, high = -12.0, 12.0
    for _ in range(50):
        middle = (low + high) / 2
        entropy = torch.special.entr((math.exp(middle) * logits).softmax(-1)).sum(-1).mean()
        low, high = (middle, high) if entropy > target else (low, middle)
    return math.exp(low)


def _wide(before: Tensor, after: Tensor) -> Tensor:
    """What .to(dtype) makes of a tensor that trains: below float32 it only moves."""
    return before.to(after.device) if after.dtype in (torch.bfloat16, torch.float16) else after


# ------------------------------------------------------------------------------------------------- the skills


def mix_skills(x: Tensor, A: Tensor, B: Tensor, c: Tensor, scale: float, weight: Tensor | None = None,
               bias: Tensor | None = None) -> Tensor:
    """scale * sum_s c_s B_s A_s x, outputs mixed (Eq. 3 as summarised): two GEMMs of the concatenated rank
    S R. With weight (O,D), and bias (O,) where there is one, on top of weight x + bias.

    x (B,L,D); A (S,R,D); B (S,R,O); c (B,S), (1,S) or per token (B,L,S) -> (B,L,O) in x's dtype."""
    S, R, D = A.shape
    h = F.linear(x, A.reshape(S * R, D).to(x.dtype))  # (B,L,SR)
    # c (B,1 or L,SR) on x's device: a large base may be spread over several
    c = (scale * (c if c.dim() == 3 else c.unsqueeze(1))).to(x).repeat_interleave(R, dim=-1)
    mixed = (h * c) @ B.reshape(S * R, -1).to(x.dtype)
    return mixed if weight is None else F.linear(x, weight, bias).add_(mixed)


class SkillLinear(nn.Linear):
    """A Linear of the base with S skills of rank R: the same object, with its weight, hooks and names, of
    this class in front of its own."""

    skill_base: type = nn.Linear  # the class before

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
        routing, rows, beams = self.skill_routing, x.shape[0], self.skill_beams
        if routing is None:
            raise RuntimeError("a Linear with skills was called outside `with adapters.routed(...)`")
        if beams is not None and routing.shape[0] != rows:
            if routing.shape[0] * beams != rows:
                raise ValueError(f"{rows} rows in a Linear routed for {routing.shape[0]} samples of "
                                 f"{beams} beams; route this very batch, or give beams=")
            routing = routing.repeat_interleave(beams, dim=0)
        if self.skill_task is None or routing.dim() == 2:
            return routing
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(routing.dtype), self.skill_task, self.skill_bias)  # (B,L,K)
            w = logits.softmax(-1) if self.skill_softmax else logits
            return w @ routing.to(x.device)  # (B,L,S)

    def _apply(self, function: Callable, recurse: bool = True) -> nn.Module:
        ours = {id(t) for p in self.skill_parameters().values() for t in (p, p.grad)}
        return super()._apply(lambda t: _wide(t, function(t)) if id(t) in ours else function(t), recurse)

    def __reduce_ex__(self, protocol: int):  # pickle and deepcopy: the class has no name to be found by
        return _unpickled, (type(self).skill_base,), self.__dict__ | {"skill_routing": None}


@functools.cache  # one class for all Linears of a kind, else torch.compile would compile each apart
def _with_skills(base: type) -> type:
    return SkillLinear if base is nn.Linear else type("Skill" + base.__name__, (SkillLinear, base),
                                                      {"skill_base": base})


def _unpickled(base: type) -> SkillLinear:
    return SkillLinear.__new__(_with_skills(base))


def add_skills(linears: dict[str, nn.Linear], ranks: Sequence[int], config: OrchMoEConfig, mix: Mix,
               generator: Generator | None, *, skills: int | None = None) -> dict[str, SkillLinear]:
    """Gives each Linear S skills of its rank, scaled by alpha / rank; LoRA is one skill of rank S R."""
    alpha, S = config.rank if config.alpha is None else config.alpha, skills or config.skills
    for linear, R in zip(linears.values(), ranks, strict=True):
        linear.__class__ = _with_skills(type(linear))
        bound = 1 / math.sqrt(linear.in_features)
        # kaiming_uniform(a = sqrt 5) of each (R,D) slice; drawn where torch makes tensors: the CPU, or meta
        A = torch.empty(S, R, linear.in_features).uniform_(-bound, bound, generator=generator)
        A = A.to(linear.weight.device, torch.promote_types(A.dtype, torch.float32))  # over a bf16 base, too
        linear.skill_A, linear.skill_B = nn.Parameter(A), nn.Parameter(A.new_zeros(S, R, linear.out_features))
        linear.skill_scale, linear.skill_mix = alpha / R, mix
        # Where the Linear computes W0 x + b and nothing else, `mix` does it together with the skills.
        linear.skill_plain = (linear.skill_base.forward is nn.Linear.forward
                              and type(linear._parameters.get("weight")) is nn.Parameter
                              and linear.weight.is_floating_point())
        linear.skill_task = linear.skill_bias = None  # W_task (K,D), b (K) of a router of its own, on tokens
        linear.skill_routing = None  # what Adapters.routed hands out: c (B,S), or Zhat (B,K,S)
        linear.skill_beams = None  # rows that a sample may have; None: any, all are routed alike
        linear.skill_softmax, linear.skill_visited = True, False
    return linears


# ----------------------------------------------------------------------------------------------- the adapters


class Adapters(nn.Identity):  # an nn.Sequential calls whatever is registered on it, its adapters too
    """The door through which adapted Linears get their weights of skills, and the verbs, one at a time. A
    method says in `route`, given what `routed` gets, what these weights are."""

    noise_shape: tuple[int, ...] | None = None  # of one sample's noise, where training wants noise
    router_dropout = 0.0  # share of the samples that training routes by w = 1/K
    _claim = threading.Lock()  # to look and to take are one step: of two threads one is refused

    def __init__(self, module: nn.Module, linears: dict[str, SkillLinear]):
        super().__init__()
        self.linears = linears  # a plain dict: they are registered where they stand in the base
        self._module = [module]  # the base; in a list, so that it is not registered below itself
        self._trained = {n: p.requires_grad for n, p in module.named_parameters(remove_duplicate=False)}
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name.rpartition(".")[2].startswith("skill_"))
        self.router: TaskRouter | None = None  # of samples
        self._open = ""  # the verb that holds the door
        self._routing: Routing | None = None

    def __getstate__(self) -> dict:
        if self._open in ("disabled()", "folded()"):  # then the Linears are of their own classes
            raise RuntimeError(f"{self._open}: leave it before the module is copied or pickled")
        return self.__dict__ | {"_open": "", "_routing": None}

    @torch.no_grad()
    def fit_router(self, embeddings: Iterable[Tensor], masks: Iterable[Tensor] | None = None, *,
                   generator: Generator | None = None) -> None:
        """Once, before training: starts the sample router from batches of training sources (B,L,D) and, where
        there is padding, their masks (B,L). ValueError for fewer sources than K, or than 2."""
        if self.router is None:
            return
        pairs = ((e, None) for e in embeddings) if masks is None else zip(embeddings, masks, strict=True)
        features = [self.router.features(e, m) for e, m in pairs]
        M, K = sum(map(len, features)), self.router.config.tasks
        if M < (least := max(2, K) if self.router.config.router_init == "kmeans" else 2):
            raise ValueError(f"fit_router: {M} sources for K = {K} abstract tasks; give at least {least}, "
                             "better hundreds")
        if not (x_hat := torch.cat(features)).isfinite().all():
            raise ValueError("fit_router: the embeddings of the sources are not all finite")
        with torch.autocast(x_hat.device.type, enabled=False):
            self.router.fit(x_hat, generator)

    @contextmanager
    def routed(self, embeddings: Tensor | None = None, mask: Tensor | None = None, *, beams: int = 1,
               **options: Tensor | None) -> Iterator[Routing]:
        """Routes one batch: inside, every SkillLinear has its c. Stay inside until after backward, which runs
        checkpointed blocks again, or for a whole generate; one `routed` for each micro-batch.

        embeddings (B,L,D) of the SOURCE; mask (B,L), 1 at tokens, the reverse of PyTorch's key_padding_mask;
        beams: consecutive rows of a sample. options: w (K,) or (B,K) for the router's; task_ids (B,); noise u
        (B,N,K,S) and drop (B,), true where router_dropout makes w 1/K, drawn where left out."""
        with self._claimed("routed()") as change:
            routing = self.route(embeddings, mask, **options)
            change(self, "_routing", routing)
            parts = routing.allocation.unbind(1) if routing.c is None else routing.c.unbind(0)
            for linear, part in zip(self.linears.values(), parts, strict=True):
                change(linear, "skill_routing", part)  # for torch.compile an input, and not a constant
                change(linear, "skill_beams", None if routing.shared else beams)
            yield routing
            self._report_unvisited()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the base as it was before attach, to the bit."""
        with self._claimed("disabled()") as change:
            for linear in self.linears.values():
                change(linear, "__class__", linear.skill_base)
            yield

    @contextmanager
    def folded(self, w: Tensor | None = None, **routing: Tensor | None) -> Iterator[None]:
        """Inside, the skills of ONE routing are in the weights, W0 + scale * sum_s c_s B_s A_s: the base's
        speed. It is that of w (K,) or of one sample, embeddings= (1,L,D) and mask=, or task_ids= (1,).
        ValueError for more samples, and where `unfoldable` says why."""
        with self._claimed("folded()") as change:
            for linear, weight in self._folded_weights(w, routing).items():
                change(linear, "__class__", linear.skill_base)  # nothing of ours takes time
                change(linear, "weight", weight)
            yield

    def merge(self, w: Tensor | None = None, **routing: Tensor | None) -> None:
        """`folded` for good, to be served without this code; tied weights are no longer tied."""
        with self._claimed("merge()"):
            for linear, weight in self._folded_weights(w, routing).items():
                linear.weight = weight
            self._leave()

    def detach(self) -> None:
        """Takes the skills out: the module as it was, its classes and what trained included."""
        with self._claimed("detach()"):
            self._leave()

    def unfoldable(self) -> str:
        """Why the skills of one routing cannot go into the weights; empty where they can."""
        if self.training and (self.noise_shape or self.router_dropout):
            return "training draws noise; call .eval() first"
        for name, linear in self.linears.items():
            if linear.skill_task is not None:
                return "with a token router every token has a w of its own, which no one weight equals"
            if not linear.skill_plain:
                return f"{name}: a {linear.skill_base.__name__} computes with more than a plain weight"
        return ""

    @contextmanager
    def _claimed(self, verb: str) -> Iterator[Callable]:
        """One verb at a time. Yields change(owner, name, value), which leaving takes back."""
        with ExitStack() as undo:
            def change(owner, name, value):
                undo.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, value)

            with self._claim:
                if self._open:
                    raise RuntimeError(f"{verb}: {self._open} is already open; leave it first, and let "
                                       "threads take turns")
                if not self.linears:
                    raise RuntimeError("the skills are merged or detached: call the module as it is")
                change(self, "_open", verb)
            yield change

    @torch.no_grad()
    def _folded_weights(self, w: Tensor | None, routing: dict) -> dict[SkillLinear, nn.Parameter]:
        if reason := self.unfoldable():
            raise ValueError(f"{self._open}: {reason}")
        c = self.route(w=w, **routing).c  # (N,1,S)
        if c.shape[1] != 1:
            raise ValueError(f"{self._open}: give one sample or one w (K,), not {c.shape[1]}")
        weights = {}
        for linear, part in zip(self.linears.values(), c, strict=True):
            A, B = linear.skill_A, linear.skill_B
            with torch.autocast(A.device.type, enabled=False):
                eye = torch.eye(linear.in_features, dtype=A.dtype, device=A.device).unsqueeze(0)
                # What the skills make of the rows of I is their matrix, whatever `mix` does.
                weight = linear.weight + linear.skill_mix(eye, A, B, part, linear.skill_scale)[0].T  # (O,D)
            weights[linear] = nn.Parameter(weight.to(linear.weight.dtype), requires_grad=False)
        return weights

    def _leave(self) -> None:
        for linear in self.linears.values():
            linear.__class__ = linear.skill_base
            for name in [*linear._parameters, *vars(linear)]:
                if name.startswith("skill_"):
                    delattr(linear, name)
        module, self.linears = self._module[0], {}
        del module.skill_adapters
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(self._trained.get(name, parameter.requires_grad))

    def keep(self, rows: Tensor) -> None:
        """Drops all but these rows (positions among the current samples): the on_keep of `generate`."""
        alike = self._open in ("folded()", "disabled()") or self.routing().shared  # nothing to drop
        for linear in () if alike else self.linears.values():
            if linear.skill_beams > 1:
                raise ValueError("keep() counts samples, and with beams a sample has several rows")
            linear.skill_routing = linear.skill_routing[rows]

    def routing(self) -> Routing:
        """w, Zhat and c of the batch being routed, as it came; RuntimeError outside `routed`."""
        if self._routing is None:
            raise RuntimeError("no batch is being routed; call inside `with adapters.routed(...)`")
        return self._routing

    def _report_unvisited(self) -> None:
        """Linears whose owner computes with their weights itself would silently stay unadapted."""
        missed = [name for name, linear in self.linears.items() if not linear.skill_visited]
        if missed and (torch.is_grad_enabled() or len(missed) < len(self.linears)):  # else no forward yet
            for name in missed:
                self.linears[name].skill_visited = True  # to be said once
            warnings.warn(f"{len(missed)} of {len(self.linears)} adapted Linears were not called, so their "
                          f"skills cannot train: {', '.join(missed[:3])}", stacklevel=4)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """What trains, by kind, each with a learning rate of its own: 3e-3, 2e-5, 1e-2, 1e-2 in train.py."""
        groups = {kind: [] for kind in ("skills", "router", "token_router", "allocation")}
        for name, parameter in self.named_parameters():
            groups["router" if name.startswith("router") else "allocation"].append(parameter)
        for linear in self.linears.values():
            groups["skills"] += [linear.skill_A, linear.skill_B]
            groups["token_router"] += [p for p in (linear.skill_task, linear.skill_bias) if p is not None]
        return {kind: [p for p in group if p.requires_grad] for kind, group in groups.items()}

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False) -> dict[str, Tensor]:
        """All that training changes: router, Z, and the skills under their Linears' names. Inside the base's
        own state_dict (destination given) the skills are there already."""
        state = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        for owner, linear in self.linears.items() if destination is None else ():
            state |= {f"{prefix}{owner}.{name}": parameter if keep_vars else parameter.detach()
                      for name, parameter in SkillLinear.skill_parameters(linear).items()}  # inside verbs too
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], strict: bool = True) -> None:
        """Copies what `state_dict` gave into place. ValueError for a difference of names or shapes, with
        nothing changed; strict=False lets names differ, never shapes."""
        own = self.state_dict()
        names = own.keys() | state.keys() if strict else own.keys() & state.keys()
        for name in sorted(names):
            given, wanted = (tuple(s[name].shape) if name in s else "missing" for s in (state, own))
            if given != wanted:
                raise ValueError(f"adapter state: {name} is {given}, here {wanted} (a whole model's goes "
                                 "into model.load_state_dict)")
        for name in names:
            own[name].copy_(state[name])

    def _apply(self, function: Callable, recurse: bool = True) -> nn.Module:
        return super()._apply(lambda t: _wide(t, function(t)), recurse)


class OrchMoE(Adapters):
    """Task Router and allocation matrices Z (N,K,S) of all adapted Linears."""

    def __init__(self, module: nn.Module, linears: dict[str, SkillLinear], config: OrchMoEConfig,
                 generator: Generator | None = None, *, width: int | None = None):
        super().__init__(module, linears)
        self.config, self.router_dropout = config, config.router_dropout
        shape = (len(linears), config.tasks, config.skills)
        Z = torch.empty(shape).normal_(0, config.allocation_std, generator=generator)
        self.allocation = nn.Parameter(Z.to(next(iter(linears.values())).skill_A))
        self.noise_shape = shape if config.gumbel else None
        if config.router == "sample":
            widths = [m.embedding_dim for m in module.modules() if isinstance(m, nn.Embedding)]
            widths += [m.in_features for m in module.modules() if isinstance(m, nn.Linear)]
            self.router = TaskRouter(width or widths[0], config, generator).to(self.allocation)
        for linear in linears.values() if config.router == "token" else ():
            start = TaskRouter(linear.in_features, config, generator).to(linear.skill_A)
            linear.skill_task, linear.skill_bias = start.task, start.bias
            linear.skill_softmax = config.router_norm == "softmax"

    def allocation_weights(self, noise: Tensor | None = None) -> Tensor:
        """Zhat (1,N,K,S), or (B,N,K,S) with noise u in [0,1): relaxed Bernoulli (Maddison et al. 2017)."""
        Z = self.allocation.unsqueeze(0)
        if noise is not None:
            Z = Z + noise.to(Z).clamp(1e-6, 1 - 1e-6).logit()  # temperature 1
        return F.logsigmoid(Z).softmax(-1)  # sigmoid(z) / sum sigmoid(z), without an epsilon

    def route(self, embeddings: Tensor | None = None, mask: Tensor | None = None, *,
              task_ids: Tensor | None = None, noise: Tensor | None = None, drop: Tensor | None = None,
              w: Tensor | None = None) -> Routing:
        """w, Zhat and c of all Linears at once. task_ids are not used: OrchMoE needs none."""
        if not (self.training and self.noise_shape):
            noise = None
        elif noise is None:
            if embeddings is None:
                raise ValueError("noise: training with gumbel needs noise (B,N,K,S), or embeddings to know B")
            noise = torch.rand(len(embeddings), *self.noise_shape)
        allocation, K = self.allocation_weights(noise), self.config.tasks
        if w is None and self.config.router == "token":
            return Routing(None, allocation, None, noise is None)
        if w is None:
            w = allocation.new_full((K,), 1 / K) if self.router is None else self.router(embeddings, mask)
            if self.training and self.router_dropout:  # skills that serve the mean w serve unseen tasks
                drop = torch.rand(len(w)) < self.router_dropout if drop is None else drop
                w = torch.where(drop.to(w.device).unsqueeze(1), 1 / K, w)
        if w.shape[-1] != K:
            raise ValueError(f"w: (K,) or (B,K) with K = {K}, not {tuple(w.shape)}")
        with torch.autocast(allocation.device.type, enabled=False):
            c = torch.einsum("bk,bnks->nbs", w.to(allocation).reshape(-1, K), allocation)
        return Routing(w, allocation, c, w.dim() == 1 and noise is None)


def attach(module: nn.Module, config: OrchMoEConfig, mix: Mix = mix_skills, *, width: int | None = None,
           generator: Generator | None = None) -> Adapters:
    """Freezes `module`, gives skills to its Linears named in config.targets, and registers the rest as
    `module.skill_adapters`. Inputs must be batch-first. A head of your own gets its requires_grad_() after.

    mix: mix_skills or kernels.mix_skills. width: `routed`'s D, if not of the first Embedding or else Linear.
    ValueError, with the module as before, where a target is not there or cannot have skills."""
    found = target_linears(module, config.targets)
    linears = add_skills(found, [config.rank] * len(found), config, mix, generator)
    module.skill_adapters = OrchMoE(module, linears, config, generator, width=width).train(module.training)
    return module.skill_adapters


def target_linears(module: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """{path: Linear} of all that `targets` names, in the module's order. ValueError as for `attach`."""
    places = [(owner, name, f"{path}.{name}".lstrip("."), child) for path, owner in module.named_modules()
              for name, child in owner.named_children() if isinstance(child, nn.Linear)]
    there, own = {name for _, name, _, _ in places}, set(targets) - {"all"}
    wanted = own.union(ALL if "all" in targets else ())
    if own - there or not there & wanted:
        raise ValueError(f"targets: no Linear is named {', '.join(sorted(own - there or wanted))}; there are "
                         f"{', '.join(sorted(there)) or 'none'}")
    found: dict[nn.Linear, str] = {}
    for owner, name, path, child in places:
        if isinstance(child, SkillLinear):
            raise ValueError(f"module: {path} has skills already; detach() them first")
        if name not in wanted:
            continue
        if isinstance(owner, nn.MultiheadAttention | nn.TransformerEncoderLayer):
            raise ValueError(f"targets: {path}: a {type(owner).__name__} would bypass its skills")
        if nn.parameter.is_lazy(child.weight):
            raise ValueError(f"targets: {path} has no shape yet; run the module once first")
        if "forward" in vars(child):  # as accelerate gives
            raise ValueError(f"targets: {path} has a forward of its instance, which bypasses skills: drop it")
        found.setdefault(child, path)  # a Linear in two places is one, under its first name
    return {path: child for child, path in found.items()}


