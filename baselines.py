"""The methods that OrchMoE is compared with, and methods from a file of yours.

`attach_method(name, module, config)` returns Adapters, whatever the method. Every method adapts the
same Linears of a frozen module. The scale is alpha / R, or alpha / (S R) for LoRA. docs/use.md
explains how to write a method of your own.

Letters: B batch, L length, D input width, O output width, T real tasks, S skills, R rank, H heads,
N adapted Linears.
Test: pytest tests/unit/test_baselines.py tests/programs/test_own_method.py
    tests/parity/test_peft.py
"""

import hashlib
import sys
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import kernels
from orchmoe import (
    Adapters,
    Linears,
    Method,
    OrchMoE,
    OrchMoEConfig,
    Routing,
    Skills,
    attach,
    embedding_width,
    mix_factors,
    target_linears,
)
from support import program
from support.program import UserError

# ------------------------------------------------------------------------------- the methods


class LoRA(Method):
    """One adapter of rank S R: y = W0 x + scale * B A x with A (SR,D) and B (SR,O).

    It starts as OrchMoE's skills do. Its scale is 1/S of theirs, so that OrchMoE with c = 1/S
    computes the same.
    Source: Hu et al. 2021, arXiv 2106.09685.
    """

    mixes_by_sample = False

    def __init__(self, linears: Linears, skills: Skills, config: OrchMoEConfig, **_options: Any):
        super().__init__()
        A = skills[0]["skill_A"]  # of the first Linear
        c = A.new_ones(len(linears), 1, 1)  # (N,1,1): there is one skill
        self.register_buffer("c", c, persistent=False)

    @classmethod
    def skill_shape(cls, config: OrchMoEConfig, num_tasks: int) -> tuple[int, int]:
        return 1, config.skills * config.rank

    def route(self, *_inputs: Any, **_options: Any) -> Routing:
        return Routing(c=self.c, shared=True)


class MoELoRA(Method):
    """Experts mixed for each token: y = W0 x + scale * sum_s c_s B_s A_s x, c = softmax(W_task x).

    W_task (S,D) of each Linear starts at N(0, 0.02²). There is no bias and no balance loss. The
    softmax is computed in float32. This is OrchMoE's token router with K = S and Zhat = I, without
    its bias.
    Source: MoLoRA, Zadouri et al. 2023, arXiv 2309.05444, whose experts are LoRA or (IA)^3.
    """

    rates = Method.rates | {"skill_W_task": "token_router"}
    mixes_by_sample = False

    def __init__(
        self,
        linears: Linears,
        skills: Skills,
        config: OrchMoEConfig,
        *,
        generator: Generator | None = None,
        **_options: Any,
    ):
        super().__init__()
        for attributes in skills:
            A = attributes["skill_A"]
            W_task = torch.empty(len(A), A.shape[-1]).normal_(0, 0.02, generator=generator)
            attributes["skill_W_task"] = nn.Parameter(W_task.to(A))
        A = skills[0]["skill_A"]
        identity = torch.eye(len(A)).to(A).expand(1, len(linears), -1, -1)  # (1,N,S,S)
        self.register_buffer("identity", identity, persistent=False)

    def route(self, *_inputs: Any, **_options: Any) -> Routing:
        return Routing(Zhat=self.identity, shared=True)


class Poly(Method):
    """Factors mixed by task: y = W0 x + scale * (sum_s c_s B_s) (sum_s c_s A_s) x.

        c = sigmoid(Z[task]), divided by its sum over the skills          (N,B,H,S)

    In training Z (N,T,H,S) gets logistic noise, so that sigmoid(Z) is a relaxed Bernoulli variable.
    Without it (`noisy`) training computes c as evaluation does. A sample of an unseen task gets the
    mean of c over the training tasks.
    Source: Polytropon, Ponti et al. 2023, arXiv 2202.13914.

    The paper then learns allocations for new tasks. We do not, because our comparisons do not train
    on new tasks.
    """

    rates = Method.rates | {"Z": "allocation"}
    heads = 1  # H
    noisy = True  # whether Z gets noise in training
    private = 0  # how many of the S skills each task has for itself

    def __init__(
        self,
        linears: Linears,
        skills: Skills,
        config: OrchMoEConfig,
        *,
        num_tasks: int = 0,
        generator: Generator | None = None,
        **_options: Any,
    ):
        super().__init__()
        if num_tasks < 1:
            raise ValueError(
                f"{type(self).__name__} routes by task id: every JSONL row needs a `task`; give "
                "it, or choose another method (in Python: num_tasks=)"
            )
        for attributes in skills:
            attributes["skill_mix"] = mix_factors if self.heads == 1 else kernels.mix_heads
            # A head reads D/H inputs, so its part of A starts within sqrt(H/D), as in peft. With
            # one head nothing changes.
            attributes["skill_A"].data *= self.heads**0.5
        S = config.skills - self.private
        if self.noisy:
            self.noise_shape = (len(linears), self.heads, S)
        shape = (len(linears), num_tasks, self.heads, S)  # (N,T,H,S)
        Z = torch.empty(shape).uniform_(-1e-3, 1e-3, generator=generator)
        self.Z = nn.Parameter(Z.to(skills[0]["skill_A"]))

    def route(
        self,
        *_inputs: Any,
        task_ids: Tensor,
        noise: Tensor | None = None,
        **_options: Any,
    ) -> Routing:
        """Return c (N,B,S), or (N,B,H,S) with heads.

        task_ids: (B,), the training task of each sample, or -1. noise: u (B,N,H,S) in [0,1), in
        training; drawn here if None. Without `noisy` it is not read.
        """
        Z = self.Z[:, task_ids.clamp(min=0)]  # (N,B,H,S)
        if self.training and self.noisy:
            if noise is None:
                noise = torch.rand(len(task_ids), *self.noise_shape)
            u = noise.transpose(0, 1).to(Z, non_blocking=True).clamp(1e-6, 1 - 1e-6)
            Z = Z + u.logit()  # temperature 1

        # sigmoid(Z) / sum_s sigmoid(Z), as in OrchMoE.allocation_weights.
        seen = F.logsigmoid(Z).softmax(-1)
        unseen = F.logsigmoid(self.Z).softmax(-1).mean(1, keepdim=True)  # (N,1,H,S)
        is_seen = (task_ids >= 0).view(1, -1, 1, 1)
        c = torch.where(is_seen, seen, unseen)  # (N,B,H,S)
        if self.heads == 1:
            c = c.squeeze(2)
        return Routing(c=c)


class MHR(Poly):
    """Poly with a mixture for each of H heads: parts of a Linear's input and output.

    H is our choice, and must divide both widths. A starts as in peft: uniform within 1/sqrt(D/H).
    So does the noise follow peft, which always trains with it. The authors have published settings
    with noise and without it.
    Source: Multi-Head Routing, Caccia et al. 2023, arXiv 2211.03831.
    """

    heads = 4


class CPoly(Poly):
    """Common and private skills: y = W0 x + scale * (sum_s c_s B_s) (sum_s c_s A_s) x.

    s runs over S - 1 common and T private skills, one for each task. For the common skills c is
    that of Poly. The private skills have the weights Z_private[task], which are not normalised;
    Z_private (N,T,T) starts at I. A sample of an unseen task uses no private skill.
    Source: C-Poly, Wang et al. 2024, arXiv 2312.03248. Its authors' code mixes factors, and not
    outputs, see docs/paper.md.

    Its size grows with T, so it cannot take part in a comparison at equal total size.
    """

    rates = Poly.rates | {"Z_private": "allocation"}
    private = 1

    def __init__(
        self,
        linears: Linears,
        skills: Skills,
        config: OrchMoEConfig,
        *,
        num_tasks: int = 0,
        **options: Any,
    ):
        super().__init__(linears, skills, config, num_tasks=num_tasks, **options)
        Z_private = torch.eye(num_tasks).repeat(len(linears), 1, 1)
        self.Z_private = nn.Parameter(Z_private.to(self.Z))

    @classmethod
    def skill_shape(cls, config: OrchMoEConfig, num_tasks: int) -> tuple[int, int]:
        return config.skills - 1 + num_tasks, config.rank

    def route(self, *inputs: Any, task_ids: Tensor, **options: Any) -> Routing:
        """Return c (N,B,S-1+T). noise: u (B,N,1,S-1) in [0,1), in training; drawn if None."""
        common = super().route(*inputs, task_ids=task_ids, **options).c  # (N,B,S-1)
        is_seen = (task_ids >= 0).unsqueeze(-1)  # (B,1)
        private = self.Z_private[:, task_ids.clamp(min=0)] * is_seen  # (N,B,T)
        return Routing(c=torch.cat([common, private], dim=-1))


class NoAdapter(Method):
    """y = W0 x: the base without skills. Nothing trains."""

    def route(self, *_inputs: Any, **_options: Any) -> Routing:
        """Return an empty c."""
        return Routing(c=torch.empty(0, 1, 0), shared=True)


METHODS = {
    "orchmoe": OrchMoE,
    "lora": LoRA,
    "moe-lora": MoELoRA,
    "poly": Poly,
    "mhr": MHR,
    "c-poly": CPoly,
}


# --------------------------------------------------------------------------- a method from a file

# Those that `load_method` has loaded, by class name. `source` of each is the text of its flag.
OWN_METHODS: dict[str, type[Method]] = {}


def load_method(text: str) -> str:
    """Load the class that `--method FILE.py:Class` names. Return the name of the method.

    `method_class` then finds the class by this name. The name of a built-in method is returned as
    it is. A run is bound to the content of the file, but not to what the file imports, see
    run_folder.kind_of. Raise UserError for an unknown name, a file that is not Python, or a class
    that is not a Method.

    This runs the file, so `text` must come from the command line, and never from a saved file.
    """
    path, _, name = text.rpartition(":")
    if not path:
        method_class(text)
        return text

    source = program.require_path(path, "give --method FILE.py:Class").read_bytes()
    digest = hashlib.sha256(source).hexdigest()[:16]
    module = types.ModuleType(f"{program.OWN_METHOD}{digest}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # where torch.compile looks for it
    with program.reading(path, "correct the file"):
        code = compile(source, path, "exec")
    exec(code, vars(module))  # a bug in the file keeps its traceback
    method = getattr(module, name, None)
    is_method = isinstance(method, type) and issubclass(method, Method)
    if not is_method or method in (Method, *METHODS.values()):  # imported ones are not its own
        raise UserError(
            f"{path}: defines no class {name} that is an orchmoe.Method; correct the file, or the "
            "name behind the colon"
        )
    if name in METHODS:
        raise UserError(f"--method {text}: a built-in method has this name; rename the class")
    method.kind = f"{name} of {digest}"
    method.source = text
    OWN_METHODS[name] = method
    return name


@torch.no_grad()
def require_routing(adapters: Adapters) -> None:
    """Raise ValueError if `route` gives a wrong shape, or weights that depend on other samples.

    Either could go unnoticed and make the results wrong. Two samples show it.
    """
    linear = next(iter(adapters.linears.values()))
    A = linear.skill_A
    if A.is_meta:  # `route` may look at values
        return
    width = embedding_width(adapters.module)
    embeddings = torch.linspace(-1, 1, 2 * 3 * width).view(2, 3, width).to(A)
    mask = torch.ones(2, 3, dtype=torch.bool, device=A.device)
    task_ids = torch.tensor([0, -1], device=A.device)  # a training task, and an unseen one

    def route(samples: slice) -> Routing:
        return adapters.route(embeddings[samples], mask[samples], task_ids=task_ids[samples])

    def weights(routing: Routing) -> Tensor:
        """Return c (N,B,S), or Zhat (N,B,K,S) where each Linear computes c."""
        return routing.Zhat.transpose(0, 1) if routing.c is None else routing.c

    was_training = adapters.training
    adapters.eval()  # no noise
    both = route(slice(0, 2))
    second = route(slice(1, 2))
    adapters.train(was_training)

    name = f"{type(adapters.method).__name__}.route"
    N, S = len(adapters.linears), len(linear.skill_B)
    B = 1 if both.shared else 2
    shape = weights(both).shape
    if len(shape) < 3 or (shape[0], shape[1], shape[-1]) != (N, B, S):
        found = both.Zhat if both.c is None else both.c
        raise ValueError(
            f"{name}: expected c (N,B,S) = ({N},{B},{S}), or Zhat ({B},{N},K,{S}), for 2 samples "
            f"with shared={both.shared}, got {tuple(found.shape)}; weights that all samples share "
            "have B = 1 and need shared=True"
        )
    if not torch.allclose(weights(both)[:, -1], weights(second)[:, -1], rtol=1e-3, atol=1e-5):
        raise ValueError(
            f"{name}: the weights of a sample depend on the other samples of its batch; give it "
            "the same weights in any batch"
        )


# ------------------------------------------------------------------------------ using the methods


def method_class(method: str | type[Method]) -> type[Method]:
    """Return the class of a method. Raise UserError if there is none of this name."""
    if isinstance(method, type):
        return method
    known = METHODS | OWN_METHODS
    if method not in known:
        raise UserError(
            f"--method {method}: choose one of {', '.join(METHODS)}; for a method of your own give "
            "its file and its class, --method FILE.py:Class"
        )
    return known[method]


def without_adapters(module: nn.Module) -> Adapters:
    """Return Adapters without Linears for a frozen base."""
    return Adapters(module, {}, [], NoAdapter())


def attach_method(
    method: str | type[Method],
    module: nn.Module,
    config: OrchMoEConfig,
    *,
    num_tasks: int = 0,
    extra_rank: int = 0,
    generator: Generator | None = None,
) -> Adapters:
    """Freeze `module` and attach a method with S = config.skills and R = config.rank.

    method: a name in METHODS or OWN_METHODS, or a class. num_tasks: T, for methods that route by
    task id. extra_rank: as in orchmoe.attach. Raise ValueError, with the module unchanged, for a
    missing T, or targets that the method cannot adapt.
    """
    method = method_class(method)
    head = getattr(module, "head", None)
    if method.mixes_by_sample and head in target_linears(module, config.targets).values():
        raise ValueError(
            "targets: head reads the tokens of all samples as one list, so that no method can mix "
            f"skills by sample there, as {method.__name__} may do; leave it out (for a method of "
            "your own see Method.mixes_by_sample)"
        )
    adapters = attach(
        module,
        config,
        kernels.mix_skills,
        method=method,
        num_tasks=num_tasks,
        extra_rank=extra_rank,
        generator=generator,
    )
    try:
        adapters.parameter_groups()  # ValueError if a parameter has no learning rate
        if method in OWN_METHODS.values():
            require_routing(adapters)
    except Exception:  # also a bug in a method of one's own
        adapters.detach()
        raise
    return adapters


def count_parameters(adapters: Adapters) -> dict[str, int]:
    """Return how many parameters train: A and B as "skills", all others as "routing"."""
    counts = {"skills": 0, "routing": 0}
    for kind, group in adapters.parameter_groups().items():
        part = "skills" if kind == "skills" else "routing"
        counts[part] += sum(parameter.numel() for parameter in group)
    return counts


# Settings that OrchMoE does not read with this router.
UNREAD_WITH_ROUTER = {
    "sample": {"lr_token_router"},
    "token": {"lr_router", "router_attention", "router_init", "mixing"},
}


def settings_of_method(method: str, router: str) -> set[str]:
    """Return the names of the settings that a method reads.

    These are fields of OrchMoEConfig, and learning rates: lr_skills, lr_router, lr_token_router and
    lr_allocation. `router` matters only to OrchMoE.
    """
    cls = method_class(method)
    read = cls.settings | {f"lr_{kind}" for kind in cls.rates.values()}
    if issubclass(cls, OrchMoE):
        read -= UNREAD_WITH_ROUTER[router]
    return read
