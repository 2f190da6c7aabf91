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
    y     = W0 x + scale * sum_s c_s B_s A_s x            (B,L,O)   mix_skills, in Skills.forward

E: the embeddings of the source. B batch, L length, D input width (in the router: width of E),
O output width, K abstract tasks, S skills, R rank, N adapted Linears. A is stored as (S,R,D), and
B as (S,R,O): each B_s is transposed.

The equations are our reconstruction of the paper. The file has the router and the mix first, then
how the router starts, the skills of a Linear, the adapters, OrchMoE's allocation, and `attach`.

    adapters = attach(model, OrchMoEConfig())             # skills in q and v; all else is frozen
    rates = {"skills": 1e-2, "router": 1e-3, "token_router": 1e-2, "allocation": 1e-2}
    groups = adapters.parameter_groups()                  # adapters.parameters() has all of them
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

import math
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn


@dataclass(frozen=True)
class OrchMoEConfig:
    """Adapters: settings of the skills and of their routing."""

    abstract_tasks: int = 8  # K, number of abstract tasks of the router
    skills: int = 4  # S, number of LoRA skills in each adapted Linear
    rank: int = 2  # R, rank of one skill
    alpha: float | None = None  # scale of the skills is alpha / their rank (default: rank)
    targets: tuple[str, ...] = ("q", "v")  # names of Linears; all: every one but the output head
    allocation_std: float = 3.0  # standard deviation of the initial Z

    def __post_init__(self) -> None:
        for name in ("abstract_tasks", "skills", "rank"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name}: {value!r} must be a whole number (int) from 1")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha: {self.alpha!r} must be a number above 0")
        if not 0 <= self.allocation_std < math.inf:
            raise ValueError(f"allocation_std: {self.allocation_std!r} must be a number from 0")
        if isinstance(self.targets, str) or not self.targets:  # a text would be read as letters
            raise ValueError(f"targets: {self.targets!r} must be a tuple of names")


class Routing(NamedTuple):
    """The result of routing one batch. Linear n mixes its skills with the weights c[n]."""

    c: Tensor  # (N,B,S), or (N,1,S) if all samples share it; for other Skills see shape_of_c
    w: Tensor | None = None  # (B,K), or (K,) if all samples share it
    shared: bool = False  # whether all samples share c, so that it fits any batch


# ----------------------------------------------------------------------------------- the router


class TaskRouter(nn.Module):
    """Estimate which abstract tasks a source sample belongs to.

    Learns W_task (K,D) and a bias (K). The self-attention has no parameters.
    """

    def __init__(self, width: int, num_tasks: int, generator: Generator | None = None):
        super().__init__()
        W_task = torch.empty(num_tasks, width).normal_(0, 0.02, generator=generator)
        self.W_task = nn.Parameter(W_task)
        self.bias = nn.Parameter(torch.zeros(num_tasks))
        # Mean and standard deviation of x_hat over training sources. `fit` sets them.
        self.register_buffer("mu", torch.zeros(width))
        self.register_buffer("sd", torch.ones(width))

    def summarise(self, embeddings: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return x_hat (B,D), one vector per sample, before it is standardised.

        embeddings: (B,L,D), the embedded source. mask: (B,L), true at real tokens, booleans or
        integers. Raise ValueError for a mask of floats.
        """
        D = len(self.mu)
        if mask is None:
            mask = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        if mask.is_floating_point():
            # Additive float masks are 0 at real tokens.
            raise ValueError("mask: give booleans or integers, true at real tokens")
        mask = mask.bool()
        X = F.rms_norm(embeddings.to(self.W_task.dtype), (D,), eps=1e-6)  # (B,L,D)
        # Padding may hold any value, even infinity. Set it to zero, so that it enters no sum.
        X = X.masked_fill(~mask[..., None], 0.0)

        scores = X @ X.mT / math.sqrt(D)  # (B,L,L)
        # Not -inf: in a row that is all padding the softmax would give NaN.
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask[:, None, :], lowest)
        P = scores.softmax(dim=-1)
        X_hat = P @ X + X  # (B,L,D)

        return masked_mean(X_hat, mask)  # (B,D)

    def forward(self, embeddings: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return w (B,K), the weight of each abstract task. Rows sum to 1.

        For the arguments see `summarise`.
        """
        x_hat = self.summarise(embeddings, mask)
        x_hat = (x_hat - self.mu) / self.sd
        logits = F.linear(x_hat, self.W_task, self.bias)  # W_task x_hat + b
        return logits.softmax(dim=-1)

    @torch.no_grad()
    def fit(self, x_hat: Tensor, generator: Generator | None = None) -> None:
        """Set mu, sd and W_task from x_hat (M,D) of M sources.

        Each row of W_task becomes a centre of a spherical k-means, times one factor for all rows.
        So the largest w is that of the source's cluster. The factor makes the mean entropy of w
        ln(K) / 3, where 0 is a one-hot w and ln(K) a uniform one.
        """
        K = len(self.W_task)
        self.standardise(x_hat)
        x_hat = (x_hat - self.mu) / self.sd
        centres = spherical_kmeans(x_hat, K, generator)  # (K,D)
        factor = scale_for_entropy(x_hat @ centres.T, math.log(K) / 3)
        self.W_task.copy_(factor * centres)

    def standardise(self, x_hat: Tensor) -> None:
        """Set mu and sd to the mean and the standard deviation of x_hat (M,D)."""
        self.mu.copy_(x_hat.mean(dim=0))
        sd = x_hat.std(dim=0, correction=0)
        # A feature that is nearly constant here, but varies later, must not dominate w.
        smallest = max(0.1 * sd.median().item(), 1e-6)
        self.sd.copy_(sd.clamp(min=smallest))


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean (B,D) of x (B,L,D) over the positions where mask (B,L) is true."""
    total = x.masked_fill(~mask[..., None], 0.0).sum(dim=1)  # (B,D)
    count = mask.sum(dim=1, keepdim=True).clamp(min=1)  # (B,1); a row may be all padding
    return total / count


def full_precision(device: torch.device) -> torch.autocast:
    """Return a context in which autocast is off, so that routing is computed in float32."""
    return torch.autocast(device.type, enabled=False)


# -------------------------------------------------------------------------------------- the mix


def mix_skills(x: Tensor, y: Tensor, A: Tensor, B: Tensor, c: Tensor, scale: float) -> Tensor:
    """Return y + scale * sum_s c_s B_s A_s x.

    The outputs of the skills are mixed, not A and B: our reading of Eq. 3 as a summary quotes it,
    see docs/paper.md. kernels.mix_skills computes the same faster.

    x (B,L,D); y (B,L,O), the output of the Linear; A (S,R,D); B (S,R,O); c (B,S), or (1,S) for all
    samples, or (B,L,S) per token. Returns (B,L,O).
    """
    if c.dim() == 2:
        c = c.unsqueeze(1)  # (B,1,S): the same for all tokens
    h = torch.einsum("bld,srd->blsr", x, A)  # A_s x
    ch = c.unsqueeze(-1) * h  # c_s A_s x
    return y + scale * torch.einsum("blsr,sro->blo", ch, B)  # sum_s B_s (c_s A_s x)


# ---------------------------------------------------------------------------- the router's start


def spherical_kmeans(points: Tensor, k: int, generator: Generator | None = None) -> Tensor:
    """Return k unit vectors (k,D), the centres of points (M,D) by cosine similarity."""
    points = F.normalize(points, dim=-1)

    # k-means++ start: points far from all picked points are more likely to be picked. A distance is
    # 1 - cosine, capped at 1. The draw is on the CPU, like the generator. The clamp keeps the sum
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


class Skills(nn.Module):
    """The S skills of one Linear, each a LoRA of rank R.

    The Linear stays as it is. It calls `hook` after its forward, and returns what that returns.
    """

    is_linear = True  # whether one c makes the skills one matrix, as `folded` needs

    def __init__(
        self,
        linear: nn.Linear,
        num_skills: int,
        rank: int,
        scale: float,
        mix: Callable[..., Tensor],
        generator: Generator | None,
    ):
        super().__init__()
        S, R, D = num_skills, rank, linear.in_features
        # A: kaiming_uniform(a = sqrt 5) of each (R,D) slice. B = 0: the model starts as the base.
        bound = 1 / math.sqrt(D)
        A = torch.empty(S, R, D).uniform_(-bound, bound, generator=generator)
        dtype = torch.promote_types(A.dtype, torch.float32)  # even if the default is bfloat16
        A = A.to(linear.weight.device, dtype)
        self.A = nn.Parameter(A)  # (S,R,D)
        self.B = nn.Parameter(A.new_zeros(S, R, linear.out_features))  # (S,R,O)
        self.scale = scale
        self.mix = mix
        # `routed` sets c, shared and beams for each batch.
        self.c: Tensor | None = None  # (B,S)
        self.shared = False  # whether all samples share c, which is (1,S) then
        self.beams = 1  # how many rows of x belong to one sample
        self.is_off = False  # within `disabled` and `folded`
        self.was_called = False

    def shape_of_c(self) -> tuple[int, ...]:
        """Return the shape of c for one sample."""
        return (len(self.B),)

    def hook(self, _linear: nn.Linear, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """Return what the Linear returns in place of y (B,...,O), for its input x (B,...,D)."""
        if self.is_off:
            return y
        if self.c is None:
            raise RuntimeError("a Linear with skills was called outside `adapters.routed(...)`")
        self.was_called = True
        x = inputs[0]
        if x.dim() == 3:
            return self(x, y)
        batch = 1 if x.dim() == 1 else x.shape[0]  # a single vector is a batch of one
        length = x.shape[1:-1].numel()  # 1 if x is (B,D) or (D,)
        x = x.reshape(batch, length, x.shape[-1])
        return self(x, y.reshape(batch, length, y.shape[-1])).view(y.shape)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y (B,L,O), the output of the Linear, plus the skills of x (B,L,D)."""
        # Cast the skills to y's dtype, never y to theirs. A large base may be on several devices.
        A, B, c = self.A.to(y), self.B.to(y), self.weights(x).to(y)
        return self.mix(x.to(y), y, A, B, c, self.scale)

    def weights(self, x: Tensor) -> Tensor:
        """Return c for x (B,L,D): (B,S), or (1,S) for all samples.

        Raise ValueError if x and the routed batch have different numbers of rows.
        """
        c, beams = self.c, self.beams
        if self.shared or len(c) == len(x):
            return c
        if len(c) * beams != len(x):
            raise ValueError(
                f"the batch has {len(x)} rows, but {len(c)} samples of {beams} beams were routed; "
                "route the same batch, or give routed(..., beams=); a Linear that gets the tokens "
                "of all samples as one list cannot have skills"
            )
        return c.repeat_interleave(beams, dim=0)


# --------------------------------------------------------------------------------- the adapters


class Adapters(nn.Identity):  # as a child of an nn.Sequential it is called, and must pass x on
    """The skills of all adapted Linears, and what computes their weights. `attach` makes it.

    OrchMoE is one method to compute the weights; baselines.py has others. To write your own, derive
    a class with a `route`, and perhaps a class of Skills. docs/use.md explains two examples.
    """

    skills_class = Skills
    settings = frozenset({"skills", "rank", "alpha", "targets"})  # fields of the config it reads
    # {name of an attribute of the Skills or of this class: group of its parameters}. The groups are
    # skills, router, token_router and allocation. Each has its own learning rate.
    rates = {"A": "skills", "B": "skills"}
    noise_shape: tuple[int, ...] | None = None  # shape of one sample's noise, if training uses it

    _lock = threading.Lock()  # two threads must not pass the check in `_open` together

    def __init__(
        self,
        module: nn.Module,
        linears: dict[str, nn.Linear],
        config: OrchMoEConfig,
        *,
        width: int = 0,
        num_tasks: int = 0,
        extra_rank: int = 0,
        mix: Callable[..., Tensor] = mix_skills,
        generator: Generator | None = None,
    ):
        """Make the skills. `module` and its Linears do not change. `width` is for subclasses.

        For the other arguments see `attach`.
        """
        super().__init__()
        self.config = config
        self.router: nn.Module | None = None
        self.linears = linears  # a plain dict: the Linears are registered in the base already
        self.__dict__["module"] = module  # so torch does not register the base below itself
        self._is_open = False
        S, R = self.skill_shape(config, num_tasks)
        alpha = config.rank if config.alpha is None else config.alpha
        N = len(linears)
        self.skills = nn.ModuleDict()
        for n, (path, linear) in enumerate(linears.items()):
            # The first n of the N Linears together have floor(n * extra_rank / N) extra ranks.
            rank = R + ((n + 1) * extra_rank) // N - (n * extra_rank) // N
            skills = self.skills_class(linear, S, rank, alpha / rank, mix, generator)
            self.skills[path.replace(".", "-")] = skills  # names of modules have no dots

    @classmethod
    def skill_shape(cls, config: OrchMoEConfig, num_tasks: int) -> tuple[int, int]:
        """Return how many skills a Linear gets, and their rank."""
        return config.skills, config.rank

    def route(self, *inputs: Tensor, **options: Any) -> Routing:
        """Return the weights of a batch. For the arguments see `routed`."""
        raise NotImplementedError

    @contextmanager
    def routed(
        self,
        embeddings: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        w: Tensor | None = None,
        noise: Tensor | None = None,
        task_ids: Tensor | None = None,
        beams: int = 1,
    ) -> Iterator[Routing]:
        """Route one batch. Within the `with` block every adapted Linear has its weights c.

        Keep it open until after backward, or until the last token of a generation. Open it anew for
        each micro-batch. One backward must not span two routings: to add two losses, route both
        batches as one.

        embeddings: (B,L,D) of the SOURCE. mask: (B,L), true at real tokens (the reverse of
        PyTorch's key_padding_mask; default: all are real). w: (K,) or (B,K), to use instead of the
        router's. noise: u in [0,1), (B,*noise_shape), for training with noise; `route` draws it if
        it is not given. task_ids: (B,), the training task of each sample, or -1; OrchMoE does not
        read them. beams: how many consecutive rows belong to one sample.

        Raise RuntimeError inside routed, disabled or folded of the same model. Raise ValueError as
        `route` does, and if it returns something else than its Skills need.
        """
        with self._open():
            routing = self.route(embeddings, mask, w=w, noise=noise, task_ids=task_ids)
            self._require_routing(routing, embeddings)
            c_of_all = routing.c
            if embeddings is not None:  # cast to the base's dtype here, once for all Linears
                c_of_all = c_of_all.to(embeddings.dtype)
            for skills, c in zip(self.skills.values(), c_of_all.unbind(0), strict=True):
                # Faster than `skills.c = c`, a call of nn.Module.__setattr__.
                vars(skills).update(c=c, shared=routing.shared, beams=beams)
            yield routing
            self._warn_uncalled()

    def _require_routing(self, routing: Routing, embeddings: Tensor | None) -> None:
        """Raise ValueError if `route` has not returned weights for the skills of all Linears."""
        name = f"{type(self).__name__}.route"
        if not isinstance(routing, Routing):
            raise ValueError(f"{name}: return a Routing, not a {type(routing).__name__}")
        samples = routing.c.shape[1:2]  # (B,)
        if routing.shared:
            samples = (1,)
        elif embeddings is not None:
            samples = (len(embeddings),)
        first = next(iter(self.skills.values()))
        expected = (len(self.skills), *samples, *first.shape_of_c())
        if routing.c.shape != expected:
            raise ValueError(
                f"{name}: c has the shape {tuple(routing.c.shape)}, expected {expected}, for N "
                "Linears, B samples and S skills; weights that all samples share have B = 1 and "
                "need shared=True"
            )

    def _set(self, **values: Any) -> None:
        """Set attributes of the skills of all Linears."""
        for skills in self.skills.values():
            vars(skills).update(values)

    def keep(self, positions: Tensor) -> None:
        """Keep only the samples at these positions (B',), as generation drops finished samples."""
        for skills in self.skills.values():
            if skills.c is not None and not skills.shared:
                skills.c = skills.c[positions]

    @torch.no_grad()
    def fit_router(
        self,
        embeddings: Iterable[Tensor],
        masks: Iterable[Tensor] | None = None,
        *,
        generator: Generator | None = None,
    ) -> None:
        """Start the router from training sources. Call it once, before training.

        embeddings: batches (B,L,D) of training sources. masks: their masks (B,L), if any token is
        padding. It does nothing without a TaskRouter. Raise ValueError for fewer than max(2, K)
        different sources: k-means would leave abstract tasks empty.
        """
        if not isinstance(self.router, TaskRouter):
            return
        if masks is None:
            pairs = ((batch, None) for batch in embeddings)
        else:
            pairs = zip(embeddings, masks, strict=True)
        with full_precision(self.router.mu.device):
            summaries = [self.router.summarise(batch, mask) for batch, mask in pairs]
            x_hat = torch.cat(summaries)  # (M,D)
            sources, K = len(x_hat.unique(dim=0)), len(self.router.W_task)
            if sources < max(2, K):
                raise ValueError(
                    f"{sources} different training sources are too few for K = {K} abstract tasks; "
                    f"give at least {max(2, K)}, better hundreds"
                )
            self.router.fit(x_hat, generator)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the `with` block the model is the base as before attach, bit for bit."""
        with self._open():
            self._set(is_off=True)
            yield

    @contextmanager
    def folded(self, w: Tensor | None = None, **options: Any) -> Iterator[None]:
        """Within the `with` block the skills of ONE routing are in the weights, at base speed.

        The weights are W0 + scale * sum_s c_s B_s A_s, for w (K,), or for a single sample given as
        embeddings=(1,L,D) and mask=. Raise ValueError for several samples, token routers, and a
        Linear whose weight cannot hold the skills.
        """
        new_weights = self._folded_weights(w=w, **options)
        originals = {linear: linear.weight for linear in new_weights}
        with self.disabled():
            try:
                self._set_weights(new_weights)
                yield
            finally:
                self._set_weights(originals)

    def merge(self, w: Tensor | None = None, **options: Any) -> None:
        """Fold one routing for good and detach. A tied weight is not tied afterwards.

        For the arguments see `folded`.
        """
        self._set_weights(self._folded_weights(w=w, **options))
        self.detach()

    def detach(self) -> None:
        """Leave the module, and restore the requires_grad of the base.

        A weight that was parametrised after `attach` stays frozen.
        """
        for hook in self.hooks:
            hook.remove()
        del self.module.skill_adapters
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(self.trained_before.get(name, parameter.requires_grad))

    @torch.no_grad()
    def _folded_weights(self, **options: Any) -> dict[nn.Linear, nn.Parameter]:
        """Return W0 + scale * sum_s c_s B_s A_s of each Linear."""
        if not self.skills_class.is_linear:
            raise ValueError("with a token router every token has its own c, so nothing is folded")
        weights = {}
        pairs = zip(self.linears.items(), self.skills.values(), strict=True)
        with self.routed(**options) as routing:
            if routing.c.shape[1] != 1:
                raise ValueError(f"give one sample or one w (K,), not {routing.c.shape[1]}")
            for (path, linear), skills in pairs:
                weight = linear.weight  # no Parameter if it is parametrised
                is_plain = type(weight) is nn.Parameter and weight.is_floating_point()
                if not is_plain or type(linear).forward is not nn.Linear.forward:
                    kind = type(linear).__name__
                    raise ValueError(f"{path}: this {kind} computes more than a plain product")
                # The skills applied to the identity give their matrix (D,O), whatever they mix.
                with full_precision(skills.A.device):
                    eye = torch.eye(linear.in_features).to(skills.A)
                    delta = skills(eye[None], eye.new_zeros(1, len(eye), linear.out_features))
                    new_weight = (weight + delta[0].T).to(weight.dtype)  # (O,D)
                weights[linear] = nn.Parameter(new_weight, requires_grad=False)
        return weights

    @staticmethod
    def _set_weights(weights: dict[nn.Linear, nn.Parameter]) -> None:
        for linear, weight in weights.items():
            linear.weight = weight

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters that train, by kind. Each kind needs its own learning rate."""
        groups = {"skills": [], "router": [], "token_router": [], "allocation": []}
        for name, parameter in self.named_parameters():
            parts = name.split(".")  # router.bias, or skills.blocks-0-q.A
            first = parts[2] if parts[0] == "skills" else parts[0]
            kind = self.rates.get(first)
            if kind not in groups:
                method = type(self).__name__
                raise ValueError(f"{method}.rates: {first} needs one of {', '.join(groups)}")
            if parameter.requires_grad:
                groups[kind].append(parameter)
        return groups

    @contextmanager
    def _open(self) -> Iterator[None]:
        """Open a block, which one thread at a time can do. Afterwards nothing is routed or off."""
        with self._lock:
            if self._is_open:
                raise RuntimeError(
                    "routed, disabled or folded is active; leave it first. Threads must take turns"
                )
            self._is_open = True
        try:
            yield
        finally:
            self._set(c=None, is_off=False)
            self._is_open = False

    def _warn_uncalled(self) -> None:
        """Warn about Linears that were not called. Their owner may read their weights directly."""
        missed = [name for name, skills in self.skills.items() if not skills.was_called]
        # Without gradients `routed` may be opened just to read w.
        nothing_ran = len(missed) == len(self.skills) and not torch.is_grad_enabled()
        if missed and not nothing_ran:
            self._set(was_called=True)  # warn once
            warnings.warn(
                f"{len(missed)} of {len(self.skills)} adapted Linears were not called, so their "
                f"skills cannot train: {', '.join(missed[:3])}",
                stacklevel=4,  # the line of the user's `with`
            )

    def _apply(self, function: Callable, recurse: bool = True) -> nn.Module:
        """Apply .to(), .half() and the like. All tensors here stay in float32 or wider."""

        def apply(tensor: Tensor) -> Tensor:
            moved = function(tensor)
            is_half = moved.dtype in (torch.bfloat16, torch.float16)
            return tensor.to(moved.device) if is_half else moved

        return super()._apply(apply, recurse)


class OrchMoE(Adapters):
    """The Task Router, and the allocation matrices Z (N,K,S) of all adapted Linears."""

    router_class: type[TaskRouter] | None = TaskRouter
    settings = Adapters.settings | {"abstract_tasks", "allocation_std"}
    rates = Adapters.rates | {"Z": "allocation", "router": "router"}

    def __init__(
        self, *inputs: Any, width: int = 0, generator: Generator | None = None, **options: Any
    ):
        """Make the skills, Z and the router. width: D of the embeddings."""
        super().__init__(*inputs, generator=generator, **options)
        N, K, S = len(self.linears), self.config.abstract_tasks, self.config.skills
        Z = torch.empty(N, K, S).normal_(0, self.config.allocation_std, generator=generator)
        self.Z = nn.Parameter(Z.to(next(self.parameters())))  # on the device of the first Linear
        if self.router_class is not None:
            self.router = self.router_class(width, K, generator).to(self.Z)

    def allocation_weights(self, Z: Tensor | None = None) -> Tensor:
        """Return Zhat of these Z (...,K,S), by default of all Linears (N,K,S)."""
        if Z is None:
            Z = self.Z
        # sigmoid(Z) / sum_s sigmoid(Z). In logarithms, so that a row of tiny values is not 0 / 0.
        return F.logsigmoid(Z).softmax(dim=-1)

    def route(
        self,
        embeddings: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        w: Tensor | None = None,
        **_options: Any,
    ) -> Routing:
        """Return w and c of all Linears. For the arguments see `routed`.

        Raise ValueError for a w of a wrong shape.
        """
        Zhat = self.allocation_weights()  # (N,K,S)
        K = Zhat.shape[1]
        with full_precision(Zhat.device):
            if w is None:
                w = self.router(embeddings, mask)
            if w.dim() not in (1, 2) or w.shape[-1] != K:
                raise ValueError(f"w: expected (K,) or (B,K) with K = {K}, got {tuple(w.shape)}")
            c = w.to(Zhat).reshape(-1, K) @ Zhat  # (N,B,S), or (N,1,S) for w (K,)
        return Routing(c, w, shared=w.dim() == 1)


# ------------------------------------------------------------------------------------- attaching


def attach(
    module: nn.Module,
    config: OrchMoEConfig,
    method: type[Adapters] = OrchMoE,
    *,
    width: int | None = None,
    **options: Any,
) -> Adapters:
    """Freeze `module`, give skills to its Linears, and register `module.skill_adapters`.

    The Linears are those named in config.targets. Their inputs must be batch-first. To train a head
    of your own as well, call its requires_grad_() afterwards, and give it to the optimizer. In an
    nn.Sequential, model[-1] is then the Adapters, and no longer your head. Attach, and fit the
    router, before the model is compiled, or wrapped in DistributedDataParallel.

    method: the class that computes the weights. width: D of the embeddings given to `routed`, if it
    is not that of the first Embedding. The options go to the method. num_tasks: how many training
    tasks there are, for methods that read task ids. extra_rank: this many ranks are divided evenly
    among the Linears; one that gets e of them has skills of rank R + e, with the scale
    alpha / (R + e). mix: mix_skills, or the faster kernels.mix_skills. generator: source of the
    initial values.

    Raise ValueError, with the module unchanged, if a target does not exist, or if a part of the
    module is compiled or has adapters already.
    """
    for child in module.modules():
        # Compiled code may go on without the skills.
        if hasattr(child, "_orig_mod") or child._compiled_call_impl or isinstance(child, Adapters):
            raise ValueError("module: attach once, and before torch.compile")
    linears = target_linears(module, config.targets)
    width = width or embedding_width(module)
    adapters = method(module, linears, config, width=width, **options)
    adapters.parameter_groups()  # ValueError if a parameter has no learning rate

    # All that can fail is done. Remember for `detach` what trained, then freeze the base.
    parameters = module.named_parameters(remove_duplicate=False)
    adapters.trained_before = {name: parameter.requires_grad for name, parameter in parameters}
    module.requires_grad_(False)
    adapters.hooks = []
    for linear, skills in zip(linears.values(), adapters.skills.values(), strict=True):
        # In front of the other hooks, which then see the output with skills.
        adapters.hooks.append(linear.register_forward_hook(skills.hook, prepend=True))
    module.skill_adapters = adapters.train(module.training)
    return adapters


def embedding_width(module: nn.Module) -> int:
    """Return the width of the model's first Embedding, or else of its first Linear's input."""
    widths = [child.embedding_dim for child in module.modules() if isinstance(child, nn.Embedding)]
    widths += [child.in_features for child in module.modules() if isinstance(child, nn.Linear)]
    return widths[0]


def target_linears(module: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """Return {path: Linear} of the Linears named in `targets`, in the order of the module.

    "all" stands for every Linear but the output head, which is what a method
    get_output_embeddings() returns. Raise ValueError if a target does not exist.
    """
    heads = []
    for child in module.modules():
        if hasattr(child, "get_output_embeddings"):  # as in transformers
            heads.append(child.get_output_embeddings())

    available = set()
    found = {}
    for path, child in module.named_modules():  # a shared Linear is visited once
        if not isinstance(child, nn.Linear):
            continue
        name = path.rpartition(".")[2]
        available.add(name)
        if name in targets or ("all" in targets and child not in heads):
            found[path] = child

    missing = set(targets) - {"all"} - available
    if missing or not found:
        names = ", ".join(sorted(missing or targets))
        choices = ", ".join(sorted(available)) or "none"
        raise ValueError(f"targets: no Linear has the name {names}; the model has {choices}")
    return found
