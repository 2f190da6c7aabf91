"""OrchMoE in one file that needs torch alone: copy it. LoRA skills in frozen Linears, a Task Router that
reads the source sample, a task-skill allocation matrix in each Linear. Unofficial, after Wang et al. 2024
(arXiv 2401.10559), as read here: the README grades what is stated, inferred and chosen. Python >= 3.10,
torch >= 2.6, MIT licence.

    x_hat = mean_L(X + P X),  P = softmax((X Wq)(X Wk)^T / sqrt(d_r))     TaskRouter.features
    w     = softmax(W_task (x_hat - mu) / sd + b)              (B,K)      TaskRouter.forward
    Zhat  = sigmoid(Z), each row divided by its sum            (N,K,S)    OrchMoE.allocation_weights
    c     = w Zhat                                             (N,B,S)    OrchMoE.route
    y     = W0 x + scale * sum_s c_s B_s A_s x                            SkillLinear.forward, mix_skills

X = rmsnorm(E), E the embeddings of the source; B batch, L length, D d_in (of the router: the width of E), O
d_out, K abstract tasks, S skills, R rank, N adapted Linears, d_r width of the router's attention.  Test:
pytest tests/test_orchmoe.py

    adapters = attach(model, OrchMoEConfig())      # freezes the model, puts skills into its q and v
    with adapters.routed(model.embed(ids), mask):  # until after backward, or for a whole generate
        model.loss(ids, mask, labels).backward()
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Mix = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
T5_LINEARS = ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo")  # what the target `all` stands for

LARGEST = 2**12  # of K, S, R and d_r: a typing error must not ask for terabytes


@dataclass(frozen=True)
class OrchMoEConfig:
    """Adapters: what is put into the frozen base."""

    tasks: int = 8  # K, abstract tasks of the router
    skills: int = 4  # S, LoRA skills in each adapted Linear
    rank: int = 2  # R, rank of one skill
    extra_rank: int = 0  # ranks handed out on top, evenly over the Linears: for comparisons at equal size
    alpha: float | None = None  # the skills' output is scaled by alpha / rank; left out: alpha = rank
    targets: tuple[str, ...] = ("q", "v")  # names of the Linears to adapt; all = q,k,v,o,wi,wo
    router: Literal["sample", "token", "none"] = "sample"  # on the source; on each token; w = 1/K
    router_attention: bool = True  # self-attention before the mean over the sample
    router_dim: int | None = None  # d_r, width of that attention; left out: a tenth of D, at most 64
    router_norm: Literal["softmax", "none"] = "softmax"  # none: w = W x_hat + b as it stands
    router_init: Literal["kmeans", "normal"] = "kmeans"  # start of W_task
    allocation_init: str = "normal:3"  # start of Z: normal:SD or uniform:BOUND
    gumbel: bool = False  # relaxed Bernoulli noise on Z in training
    tau: float = 1.0  # temperature of that noise

    def __post_init__(self) -> None:
        for name in ("tasks", "skills", "rank", "router_dim"):
            if (value := getattr(self, name)) is not None and not 1 <= value <= LARGEST:
                raise ValueError(f"{name}: {value} must be from 1 to {LARGEST}")
        if not 0 <= self.extra_rank <= LARGEST**2:
            raise ValueError(f"extra_rank: {self.extra_rank} must be from 0 to {LARGEST**2}")
        if not self.targets or isinstance(self.targets, str):
            raise ValueError(f"targets: name at least one Linear, in a tuple, not {self.targets!r}")
        for name, choices in (("router", ("sample", "token", "none")), ("router_norm", ("softmax", "none")),
                              ("router_init", ("kmeans", "normal"))):
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name}: {value!r} must be one of {', '.join(choices)}")
        for name in ("tau", "alpha"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: {value} must be a number above 0")
        _ = self.allocation_start  # raises where it cannot be read

    @property
    def allocation_start(self) -> tuple[str, float]:
        """("normal", SD) or ("uniform", BOUND)."""
        kind, _, size = self.allocation_init.partition(":")
        try:
            if kind in ("normal", "uniform") and 0 <= float(size) < math.inf:
                return kind, float(size)
        except ValueError:
            pass
        raise ValueError(f"allocation_init: {self.allocation_init!r} must be normal:SD or uniform:BOUND")

    @property
    def bias_start(self) -> float:
        return 0.0 if self.router_norm == "softmax" else 1 / self.tasks

    def scale(self, total_rank: int) -> float:
        """alpha / total_rank. Methods that weigh their skills by c pass the rank of one skill, LoRA, whose
        ranks all add up unweighted, S R: so c = 1/S is LoRA. Extra ranks count in both."""
        return (self.rank if self.alpha is None else self.alpha) / total_rank

    def attention_width(self, width: int) -> int:
        """d_r, the router attention's width for embeddings of `width`."""
        return self.router_dim or max(1, min(64, width // 10))

    def extra_ranks(self, linears: int) -> list[int]:
        """How many of the extra ranks each of N Linears gets."""
        return [(n + 1) * self.extra_rank // linears - n * self.extra_rank // linears for n in range(linears)]


class Routing(NamedTuple):
    """What `routed` computed: w is None for the token router, whose c exists only inside each Linear."""

    w: Tensor | None  # (B,K), or (K,) where it is the same for every sample
    allocation: Tensor | None  # Zhat (N,K,S) as (1,N,K,S), or (B,N,K,S) with noise
    c: Tensor | None  # (N,B,S), or (N,1,S)
    shared: bool  # the same for every sample, so that any number of rows may come


# -------------------------------------------------------------------------------------------- the task router


class TaskRouter(nn.Module):
    """Weights of K abstract tasks for each source sample; computed in its own float32 whatever the base's
    dtype."""

    def __init__(self, width: int, config: OrchMoEConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        d_r = config.attention_width(width)
        if config.router_attention:
            self.query = nn.Parameter(_normal((width, d_r), width**-0.5, generator))
            self.key = nn.Parameter(_normal((width, d_r), width**-0.5, generator))
        self.task = nn.Parameter(_normal((config.tasks, width), 0.02, generator))
        self.bias = nn.Parameter(torch.full((config.tasks,), config.bias_start))
        self.register_buffer("mu", torch.zeros(width))
        self.register_buffer("sd", torch.ones(width))

    def features(self, embeddings: Tensor, mask: Tensor | None = None) -> Tensor:
        """x_hat (B,D) before standardising, of embeddings (B,L,D) and mask (B,L), true at tokens."""
        if embeddings.dim() != 3 or embeddings.shape[-1] != len(self.mu):
            raise ValueError(f"embeddings: (B,L,D) of the source with D = {len(self.mu)}, not "
                             f"{tuple(embeddings.shape)}; token ids must be embedded first, and another D is "
                             "given by attach(..., width=D)")
        if mask is not None and mask.shape != embeddings.shape[:2]:
            raise ValueError(f"mask: (B,L) = {tuple(embeddings.shape[:2])}, not {tuple(mask.shape)}")
        with _without_autocast(embeddings):
            X = F.rms_norm(embeddings.to(self.task.dtype), embeddings.shape[-1:], eps=1e-6)  # (B,L,D)
            mask = X.new_ones(X.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
            X = X.masked_fill(~mask.unsqueeze(-1), 0)  # junk in the padding, even infinite, reaches no sum
            mean = mask.to(X) / mask.sum(1, keepdim=True).clamp(min=1)  # (B,L)
            if self.config.router_attention:
                scores = (X @ self.query) @ (X @ self.key).mT / math.sqrt(self.query.shape[1])  # (B,L,L)
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
    def fit(self, features: Tensor, generator: torch.Generator | None = None) -> None:
        """Sets mu, sd and, with router_init kmeans, W_task from x_hat (M,D) of M training sources, without
        any label: rows along the centres of a spherical k-means, as long as makes the mean entropy of w a
        third of ln K."""
        self.mu.copy_(features.mean(0))
        self.sd.copy_(features.std(0, correction=0).clamp(min=1e-6))
        if self.config.router_init != "kmeans":
            return
        x_hat = (features - self.mu) / self.sd
        logits = x_hat @ (centres := spherical_kmeans(x_hat, self.config.tasks, generator)).T  # (M,K)
        if self.config.router_norm == "none":
            length = 1 / self.config.tasks / logits.std().clamp(min=1e-6)
        else:
            length = _length_for_entropy(logits, math.log(self.config.tasks) / 3)
        self.task.copy_(length * centres)


def spherical_kmeans(points: Tensor, k: int, generator: torch.Generator | None = None) -> Tensor:
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
    """Factor on `logits` (M,K) that makes the mean entropy of their softmax `target` nats, by bisection of
    its logarithm."""
    low, high = -12.0, 12.0
    for _ in range(50):
        middle = (low + high) / 2
        entropy = torch.special.entr((math.exp(middle) * logits).softmax(-1)).sum(-1).mean()
        low, high = (middle, high) if entropy > target else (low, middle)
    return math.exp(low)


def _normal(shape: tuple[int, ...], sd: float, generator: torch.Generator | None,
            device: torch.device | str = "cpu") -> Tensor:
    return _drawn(shape, device, lambda values: values.normal_(0, sd, generator=generator))


def _uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator | None,
             device: torch.device | str = "cpu") -> Tensor:
    return _drawn(shape, device, lambda values: values.uniform_(-bound, bound, generator=generator))


def _drawn(shape: tuple[int, ...], device: torch.device | str, fill: Callable[[Tensor], Tensor]) -> Tensor:
    """Drawn on the CPU, so that no device changes the start; on meta nothing is drawn, or allocated."""
    if torch.device(device).type == "meta":
        return torch.empty(shape, device="meta")
    return fill(torch.empty(shape)).to(device)


def _without_autocast(x: Tensor) -> torch.autocast:
    """The router and c are float32, whatever the base computes in."""
    return torch.autocast(x.device.type, enabled=False)


# ------------------------------------------------------------------------------------------------- the skills


def mix_skills(x: Tensor, A: Tensor, B: Tensor, c: Tensor, scale: float) -> Tensor:
    """scale * sum_s c_s B_s A_s x as two GEMMs of the concatenated rank S R: skills mix their outputs
    (Eq. 3, as summarised).

    x (B,L,D); A (S,R,D); B (S,R,O); c (B,S) per sample, (1,S) for all, or (B,L,S) per token -> (B,L,O) in x's
    dtype."""
    S, R, D = A.shape
    h = F.linear(x, A.reshape(S * R, D).to(x.dtype))  # (B,L,SR)
    c = (scale * c).to(x)  # of x's device too: a large base may be spread over several
    c = (c if c.dim() == 3 else c.unsqueeze(1)).repeat_interleave(R, dim=-1)  # (B,1 or L,SR)
    return (h * c) @ B.reshape(S * R, -1).to(x.dtype)


class SkillLinear(nn.Linear):
    """A frozen Linear with S skills of rank R beside it. Keeps the base's own weight and bias, and their
    names."""

    def __init__(self, base: nn.Linear, skills: int, rank: int, scale: float, mix: Mix,
                 generator: torch.Generator | None = None):
        nn.Module.__init__(self)  # not nn.Linear's: W0 is the base's parameter, never a copy
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        # kaiming_uniform(a = sqrt 5) of each (R,D) slice by itself is U(-1/sqrt D, 1/sqrt D); float32 over a
        # bf16 base
        bound, device = 1 / math.sqrt(self.in_features), self.weight.device
        self.skill_A = nn.Parameter(_uniform((skills, rank, self.in_features), bound, generator, device))
        self.skill_B = nn.Parameter(torch.zeros(skills, rank, self.out_features, device=device))
        self.skill_scale, self.skill_mix = scale, mix
        self.skill_routing: Tensor | None = None  # set by Adapters.routed: c (B,S), or Zhat (B,K,S)
        self.skill_task = self.skill_bias = None  # of the token router
        self.skill_shared, self.skill_beams, self.skill_visited = False, 1, False

    def add_token_router(self, tasks: int, norm: str, bias_start: float | None,
                         generator: torch.Generator | None = None) -> None:
        """Gives this Linear a router of its own, w = softmax(W_task x + b) (B,L,K); without b where None."""
        device = self.weight.device
        self.skill_norm = norm
        self.skill_task = nn.Parameter(_normal((tasks, self.in_features), 0.02, generator, device))
        if bias_start is not None:
            self.skill_bias = nn.Parameter(torch.full((tasks,), bias_start, device=device))

    def skill_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters(recurse=False) if name.startswith("skill_")}

    def forward(self, x: Tensor) -> Tensor:
        """x (B,..,D) -> W0 x + bias + scale * sum_s c_s B_s A_s x, (B,..,O); x (D,) is one sample."""
        rows = x.reshape(x.shape[:-1][:1].numel(), x.shape[1:-1].numel(), self.in_features)  # (B,L,D)
        mixed = self.skill_mix(rows, self.skill_A, self.skill_B, self._weights(rows), self.skill_scale)
        self.skill_visited = True
        y = F.linear(x, self.weight, self.bias)
        return y.add_(mixed.view_as(y))  # in place: one (B,L,O) less to allocate and to write

    def merged(self, c: Tensor) -> nn.Linear:
        """A plain Linear with the skills of c (1,S) in its weight: what they make of the rows of I is their
        matrix, however they are mixed. A weight of its own, since the base's may be tied."""
        A, plain = self.skill_A, nn.Linear(self.in_features, self.out_features, device="meta")
        eye = torch.eye(self.in_features, dtype=A.dtype, device=A.device).unsqueeze(0)
        update = self.skill_mix(eye, A, self.skill_B, c, self.skill_scale)[0].T  # (O,D)
        weight = (self.weight + update).to(self.weight.dtype)
        plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return plain.train(self.training)

    def _weights(self, x: Tensor) -> Tensor:
        """c for x (B,L,D): (B,S) or (1,S) as handed over, repeated for beams, or (B,L,S) from the token
        router."""
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


# ---------------------------------------------------------------------------------------- router + allocation


class Adapters(nn.Module):
    """The one door through which the adapted Linears get their weights of skills. A method says in `route`
    what these are."""

    noise_shape: tuple[int, ...] | None = None  # of one sample's noise, where training wants noise

    def __init__(self, linears: dict[str, SkillLinear]):
        super().__init__()
        self.linears = linears  # a plain dict: they are registered where they stand in the base
        self._module: list[nn.Module] = []  # the base; in a list, so that it is not registered below itself
        self._routing: Routing | None = None
        self._reported = False

    def forward(self, x: Tensor) -> Tensor:
        """x as it is: an nn.Sequential calls whatever is registered on it, its adapters too."""
        return x

    def route(self, embeddings: Tensor | None = None, mask: Tensor | None = None, *,
              task_ids: Tensor | None = None, noise: Tensor | None = None,
              w: Tensor | None = None) -> Routing:
        """What all Linears need for one batch; arguments as for `routed`."""
        raise NotImplementedError

    def fit_router(self, embeddings: Iterable[Tensor], masks: Iterable[Tensor] | None = None, *,
                   generator: torch.Generator | None = None) -> None:
        """Prepares a router that starts from training sources; most methods have none."""

    @contextmanager
    def routed(self, embeddings: Tensor | None = None, mask: Tensor | None = None, *,
               task_ids: Tensor | None = None, noise: Tensor | None = None, w: Tensor | None = None,
               beams: int = 1) -> Iterator[Routing]:
        """Routes one batch: inside, every SkillLinear has its c; leaving clears. Stay inside until after
        backward or for a whole generate. One backward each, and where gradients accumulate one `routed` for
        each micro-batch: checkpointed blocks run again in backward, with the c that they find then, and
        inside another `routed` that would be silently wrong.

        embeddings (B,L,D) of the SOURCE; mask (B,L), 1 or true at tokens and 0 at padding: neither PyTorch's
        key_padding_mask, which is the reverse, nor an additive one. noise u (B,N,K,S) for gumbel, drawn here
        if left out; w (K,) or (B,K) fixes the routing; beams: rows a sample may have instead of one. Nesting
        raises RuntimeError."""
        self._require_free()
        try:
            self._hand_out(self.route(embeddings, mask, task_ids=task_ids, noise=noise, w=w), beams)
            yield self._routing
            self._report_unvisited()
        finally:
            self._routing = None
            for linear in self.linears.values():
                linear.skill_routing = None

    def _require_free(self) -> None:
        if self._routing is not None:
            raise RuntimeError("routed() is already open: leave it before the next batch, or before merge()")
        if not self.linears:
            raise RuntimeError("the skills are merged: call the module as it is")

    def _hand_out(self, routing: Routing, beams: int) -> None:
        """Gives each Linear its slice: a tensor attribute, which torch.compile takes as an input and not as a
        constant."""
        self._routing = routing
        parts = routing.allocation.unbind(1) if routing.c is None else routing.c.unbind(0)
        for linear, part in zip(self.linears.values(), parts, strict=True):
            linear.skill_routing, linear.skill_shared, linear.skill_beams = part, routing.shared, beams

    @torch.no_grad()
    def merge(self, w: Tensor | None = None, *, embeddings: Tensor | None = None, mask: Tensor | None = None,
              task_ids: Tensor | None = None) -> None:
        """For good: adds scale * sum_s c_s B_s A_s of ONE routing to the weights (O,D) and puts plain Linears
        back under the base's own names, to be served without this code; outputs as in `routed` with the same
        arguments: w (K,), or embeddings (1,L,D) and mask (1,L), or task_ids (1,). ValueError for more
        samples, for noise, and for routers of tokens."""
        self._require_free()
        if any(linear.skill_task is not None for linear in self.linears.values()):
            raise ValueError("merge: with a token router every token has a w of its own, which no one weight "
                             "equals")
        if self.training and self.noise_shape:
            raise ValueError("merge: training draws noise; call .eval() first")
        c = self.route(embeddings, mask, task_ids=task_ids, w=w).c
        if c.shape[1] != 1:
            raise ValueError(f"merge: give one sample or one w, not {c.shape[1]}")
        for (name, linear), part in zip(self.linears.items(), c, strict=True):
            owner, _, child = name.rpartition(".")
            setattr(self._module[0].get_submodule(owner), child, linear.merged(part))
        del self._module[0].skill_adapters
        self.linears = {}

    def keep(self, rows: Tensor) -> None:
        """Drops all but the given rows (positions among the current samples) from here on: for T5.generate's
        on_keep."""
        routing = self.routing()
        if any(linear.skill_beams > 1 for linear in self.linears.values()):
            raise ValueError("keep() counts samples, and with beams a sample has several rows")
        if not routing.shared:  # c or, for the token router with noise, the allocation has a row a sample
            w, allocation = routing.w, routing.allocation
            allocation = allocation if allocation is None or len(allocation) == 1 else allocation[rows]
            w = w if w is None or w.dim() == 1 else w[rows]
            c = None if routing.c is None else routing.c[:, rows]
            self._hand_out(Routing(w, allocation, c, False), 1)

    def routing(self) -> Routing:
        """w, Zhat and c of the batch being routed; RuntimeError outside `routed`."""
        if self._routing is None:
            raise RuntimeError("no batch is being routed; call inside `with adapters.routed(...)`")
        return self._routing

    def _report_unvisited(self) -> None:
        """After the first routed batch: Linears whose owner bypasses them (say, a fused kernel) would
        silently stay unadapted."""
        unvisited = [name for name, linear in self.linears.items() if not linear.skill_visited]
        if self._reported or len(unvisited) == len(self.linears):  # said before, or no forward yet
            return
        self._reported = True
        if unvisited:
            dots = ", ..." if len(unvisited) > 3 else ""
            warnings.warn(f"{len(unvisited)} adapted Linears were not called in the first routed batch: "
                          f"{', '.join(unvisited[:3])}{dots}", stacklevel=4)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters under skills, router and allocation: each has a learning rate of its own."""
        groups: dict[str, list[nn.Parameter]] = {"skills": [], "router": [], "allocation": []}
        for name, parameter in self.named_parameters():
            groups["allocation" if name.startswith("allocation") else "router"].append(parameter)
        for linear in self.linears.values():
            for name, parameter in linear.skill_parameters().items():
                groups["skills" if name in ("skill_A", "skill_B") else "router"].append(parameter)
        return groups

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False) -> dict[str, Tensor]:
        """Everything that training changes and nothing of the base: router, Z, and the skills under their
        Linears' names. Inside the base's own state_dict (destination given) router and Z only, since the
        Linears are the base's there."""
        state = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        if destination is None:
            for owner, linear in self.linears.items():
                state |= {f"{owner}.{name}": parameter if keep_vars else parameter.detach()
                          for name, parameter in linear.skill_parameters().items()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], strict: bool = True) -> None:
        """Copies what `state_dict` gave into place. ValueError naming the first difference of names or
        shapes; strict=False lets names differ, never shapes. A whole model's state goes into the model."""
        own = self.state_dict(keep_vars=True)
        odd = sorted(own.keys() ^ state.keys())
        if odd and strict:
            kind = "missing" if odd[0] in own else "unknown"
            whole = any(name.startswith("skill_adapters.") for name in state)
            hint = "; a whole model's state goes into model.load_state_dict" if whole else ""
            raise ValueError(f"adapter state: {odd[0]} is {kind} ({len(odd)} names differ){hint}")
        common = sorted(own.keys() & state.keys())
        for name in common:  # all checks before the first copy: a refused state changes nothing
            if (given := tuple(state[name].shape)) != (wanted := tuple(own[name].shape)):
                raise ValueError(f"adapter state: {name} is {given}, not {wanted}")
        for name in common:
            own[name].copy_(state[name])


class OrchMoE(Adapters):
    """Task Router and allocation matrices Z (N,K,S) of all adapted Linears."""

    def __init__(self, linears: dict[str, SkillLinear], config: OrchMoEConfig, width: int,
                 generator: torch.Generator | None = None):
        super().__init__(linears)
        self.config = config
        device = next(iter(linears.values())).weight.device
        kind, size = config.allocation_start
        draw, shape = _normal if kind == "normal" else _uniform, (len(linears), config.tasks, config.skills)
        self.allocation = nn.Parameter(draw(shape, size, generator, device))
        self.noise_shape = shape if config.gumbel else None
        self.router = TaskRouter(width, config, generator).to(device) if config.router == "sample" else None
        if config.router == "token":
            for linear in linears.values():
                linear.add_token_router(config.tasks, config.router_norm, config.bias_start, generator)

    def allocation_weights(self, noise: Tensor | None = None) -> Tensor:
        """Zhat (N,K,S) as (1,N,K,S), or (B,N,K,S) with noise u (B,N,K,S) in [0,1): relaxed Bernoulli
        (Maddison et al. 2017), each row divided by its sum. softmax of logsigmoid is sigmoid(z) / sum
        sigmoid(z), without an epsilon."""
        Z = self.allocation.unsqueeze(0)
        if noise is not None:
            Z = (Z + noise.to(Z).clamp(1e-6, 1 - 1e-6).logit()) / self.config.tau
        return F.logsigmoid(Z).softmax(-1)

    def route(self, embeddings: Tensor | None = None, mask: Tensor | None = None, *,
              task_ids: Tensor | None = None, noise: Tensor | None = None,
              w: Tensor | None = None) -> Routing:
        """w, Zhat and c of all Linears at once. task_ids are not used: OrchMoE needs none."""
        noise = self._noise(embeddings, noise)
        allocation = self.allocation_weights(noise)
        if w is None and self.config.router == "token":
            return Routing(None, allocation, None, noise is None)
        if w is None:
            w = self._task_weights(embeddings, mask)
        if w.shape[-1] != self.config.tasks:
            raise ValueError(f"w: (K,) or (B,K) with K = {self.config.tasks}, not {tuple(w.shape)}")
        with _without_autocast(allocation):
            c = torch.einsum("bk,bnks->nbs", w.to(allocation).reshape(-1, self.config.tasks), allocation)
        return Routing(w, allocation, c, w.dim() == 1 and noise is None)

    def _task_weights(self, embeddings: Tensor | None, mask: Tensor | None) -> Tensor:
        if self.config.router == "none":
            return self.allocation.new_full((self.config.tasks,), 1 / self.config.tasks)
        if embeddings is None:
            raise ValueError("embeddings: the sample router reads the source's embeddings (B,L,D)")
        return self.router(embeddings, mask)

    def _noise(self, embeddings: Tensor | None, noise: Tensor | None) -> Tensor | None:
        """u (B,N,K,S) for this batch, or None where the allocation is not relaxed: no gumbel, or not
        training."""
        if not (self.config.gumbel and self.training):
            return None
        if noise is None and embeddings is None:
            raise ValueError("noise: with gumbel, training needs noise (B,N,K,S), or embeddings to know B, "
                             "with a token router too")
        return torch.rand(len(embeddings), *self.allocation.shape) if noise is None else noise

    @torch.no_grad()
    def fit_router(self, embeddings: Iterable[Tensor], masks: Iterable[Tensor] | None = None, *,
                   generator: torch.Generator | None = None) -> None:
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
           generator: torch.Generator | None = None) -> Adapters:
    """Freezes `module`, puts skills into its Linears named in config.targets and registers the router as
    `module.skill_adapters`. Base key names survive; every new name carries `skill_`. Inputs must be
    batch-first. Cast the base to bf16 before, since the skills stay float32; a head of your own that is to
    train gets its requires_grad_() after.

    mix: mix_skills, or kernels.mix_skills. width: D of what `routed` gets, where the first nn.Embedding is
    another. generator: of the initial values, on the CPU. ValueError where nothing matches, where adapters
    are there already, and for owners or Linears whose own forward would go round the skills."""
    def with_skills(base: nn.Linear, extra: int) -> SkillLinear:
        rank = config.rank + extra
        return SkillLinear(base, config.skills, rank, config.scale(rank), mix, generator)

    linears = replace_linears(module, config, with_skills)
    width = router_width(module) if width is None else width
    return register(module, OrchMoE(linears, config, width, generator))


def replace_linears(module: nn.Module, config: OrchMoEConfig,
                    make: Callable[[nn.Linear, int], SkillLinear]) -> dict[str, SkillLinear]:
    """Freezes `module` and replaces its target Linears by make(Linear, its extra rank); returns them by name,
    in the module's order."""
    if hasattr(module, "skill_adapters"):
        raise ValueError("module: it has adapters already; attach to a fresh copy")
    found = target_linears(module, config)
    module.requires_grad_(False)
    linears = {}
    for (owner, path, child), extra in zip(found, config.extra_ranks(len(found)), strict=True):
        linears[path] = replacement = make(child, extra)
        replacement.train(child.training)
        setattr(owner, path.rpartition(".")[2], replacement)
    return linears


def target_linears(module: nn.Module, config: OrchMoEConfig) -> list[tuple[nn.Module, str, nn.Linear]]:
    """(owner, its path with the Linear's name, Linear) for all that config.targets names, in the module's
    order. ValueError for a name that is not there, and for what cannot be adapted."""
    children = [(owner, f"{path}.{name}".lstrip("."), child) for path, owner in module.named_modules()
                for name, child in owner.named_children() if isinstance(child, nn.Linear)]
    have = {path.rpartition(".")[2] for _, path, _ in children}
    own = set(config.targets) - {"all"}
    names = own.union(T5_LINEARS if "all" in config.targets else ())
    found = [row for row in children if row[1].rpartition(".")[2] in names]
    if own - have or not found:
        absent, there = ", ".join(sorted(own - have or names)), ", ".join(sorted(have)) or "none"
        raise ValueError(f"targets: no Linear is named {absent}; there are {there}")
    for owner, path, child in found:
        fused = isinstance(owner, nn.MultiheadAttention | nn.TransformerEncoderLayer)
        if fused or type(child) is not nn.Linear:
            kinds = f"{type(child).__name__} in {type(owner).__name__}"
            raise ValueError(f"targets: {path} ({kinds}) would bypass its skills; only a plain nn.Linear "
                             "that its owner calls can be adapted")
        hooked = child._forward_hooks or child._forward_pre_hooks or "forward" in vars(child)
        if hooked or not isinstance(child.weight, nn.Parameter):  # weight_norm, prune, accelerate's offload
            raise ValueError(f"targets: {path} has forward hooks, or a weight that is no Parameter, which "
                             "skills would drop; remove them before attach")
    return found


def register(module: nn.Module, adapters: Adapters) -> Adapters:
    """Makes the adapters a part of `module`, in its mode of training or evaluation."""
    module.skill_adapters, adapters._module = adapters.train(module.training), [module]
    return adapters


def router_width(module: nn.Module) -> int:
    """D of the embeddings that `routed` gets: that of the first nn.Embedding, without one that of the first
    Linear."""
    if embeddings := [m for m in module.modules() if isinstance(m, nn.Embedding)]:
        return embeddings[0].embedding_dim
    return next(m.in_features for m in module.modules() if isinstance(m, nn.Linear))
