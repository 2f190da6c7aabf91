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
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import kernels
from orchmoe import Adapters, OrchMoE, OrchMoEConfig, Routing, attach, target_linears
from support import program
from support.program import UserError
from variants import VARIANTS, FactorSkills, TokenSkills

# ------------------------------------------------------------------------------- the methods


class LoRA(Adapters):
    """One adapter of rank S R: y = W0 x + scale * B A x with A (SR,D) and B (SR,O).

    It starts as OrchMoE's skills do. Its scale is 1/S of theirs, so that OrchMoE with c = 1/S
    computes the same.
    Source: Hu et al. 2021, arXiv 2106.09685.
    """

    @classmethod
    def skill_shape(cls, config: OrchMoEConfig, num_tasks: int) -> tuple[int, int]:
        return 1, config.skills * config.rank

    def route(self, *_inputs: Any, **_options: Any) -> Routing:
        """Return c = 1 (N,1,1) for the one skill of each Linear."""
        A = next(self.parameters())
        return Routing(A.new_ones(len(self.skills), 1, 1), shared=True)


class MoELoRA(Adapters):
    """Experts mixed for each token: y = W0 x + scale * sum_s c_s B_s A_s x, c = softmax(W_task x).

    This is OrchMoE's token router with K = S and Zhat = I, without its bias. There is no balance
    loss.
    Source: MoLoRA, Zadouri et al. 2023, arXiv 2309.05444, whose experts are LoRA or (IA)^3.
    """

    skills_class = TokenSkills
    rates = Adapters.rates | {"W_task": "token_router"}

    def __init__(self, *inputs: Any, generator: Generator | None = None, **options: Any):
        super().__init__(*inputs, generator=generator, **options)
        for skills in self.skills.values():
            skills.draw_router(self.config.skills, generator)

    def route(self, *_inputs: Any, **_options: Any) -> Routing:
        """Return a c (N,1,S) that no Linear reads, since each computes its own."""
        A = next(self.parameters())
        return Routing(A.new_ones(len(self.skills), 1, self.config.skills), shared=True)


class Poly(Adapters):
    """Factors mixed by task: y = W0 x + scale * (sum_s c_s B_s) (sum_s c_s A_s) x.

        c = sigmoid(Z[task]), divided by its sum over the skills          (N,B,H,S)

    In training Z (N,T,H,S) gets logistic noise, so that sigmoid(Z) is a relaxed Bernoulli variable.
    Without it (`noisy`) training computes c as evaluation does. A sample of an unseen task gets the
    mean of c over the training tasks.
    Source: Polytropon, Ponti et al. 2023, arXiv 2202.13914.

    The paper then learns allocations for new tasks. We do not, because our comparisons do not train
    on new tasks.
    """

    skills_class = FactorSkills
    rates = Adapters.rates | {"Z": "allocation"}
    heads = 1  # H
    noisy = True  # whether Z gets noise in training
    private = 0  # how many of the S skills each task has for itself

    def __init__(
        self, *inputs: Any, num_tasks: int = 0, generator: Generator | None = None, **options: Any
    ):
        if num_tasks < 1:
            raise ValueError(
                f"{type(self).__name__} routes by task id: every JSONL row needs a `task`; give "
                "it, or choose another method (in Python: num_tasks=)"
            )
        super().__init__(*inputs, num_tasks=num_tasks, generator=generator, **options)
        N, S = len(self.skills), self.config.skills - self.private
        if self.noisy:
            self.noise_shape = (N, self.heads, S)
        Z = torch.empty(N, num_tasks, self.heads, S).uniform_(-1e-3, 1e-3, generator=generator)
        self.Z = nn.Parameter(Z.to(next(self.parameters())))

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
        return Routing(c)


class HeadSkills(FactorSkills):
    """Skills whose factors are mixed by a c (B,H,S), which has weights for each of H heads.

    Head h mixes its part of A, which reads D/H inputs, and its part of B, which writes O/H outputs.
    A part of A starts within 1/sqrt(D/H), as in peft.
    """

    heads = 4  # H

    def __init__(self, *inputs: Any):
        super().__init__(*inputs)
        self.A.data *= self.heads**0.5

    def shape_of_c(self) -> tuple[int, ...]:
        return self.heads, len(self.B)

    def mixed_factors(self, factors: Tensor, c: Tensor) -> Tensor:
        parts = factors.unflatten(-1, (self.heads, -1))  # (S,R,H,D/H)
        return torch.einsum("bhs,srhd->brhd", c, parts).flatten(2)  # (B,R,D)


class MHR(Poly):
    """Poly with a mixture for each of H heads: parts of a Linear's input and output.

    H is our choice, and must divide both widths. A starts as in peft: uniform within 1/sqrt(D/H).
    Training adds noise, as peft always does. The authors have published settings with noise and
    without it.
    Source: Multi-Head Routing, Caccia et al. 2023, arXiv 2211.03831.
    """

    skills_class = HeadSkills
    heads = HeadSkills.heads


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

    def __init__(self, *inputs: Any, num_tasks: int = 0, **options: Any):
        super().__init__(*inputs, num_tasks=num_tasks, **options)
        Z_private = torch.eye(num_tasks).repeat(len(self.skills), 1, 1)
        self.Z_private = nn.Parameter(Z_private.to(self.Z))

    @classmethod
    def skill_shape(cls, config: OrchMoEConfig, num_tasks: int) -> tuple[int, int]:
        return config.skills - 1 + num_tasks, config.rank

    def route(self, *inputs: Any, task_ids: Tensor, **options: Any) -> Routing:
        """Return c (N,B,S-1+T). noise: u (B,N,1,S-1) in [0,1), in training; drawn if None."""
        common = super().route(*inputs, task_ids=task_ids, **options).c  # (N,B,S-1)
        is_seen = (task_ids >= 0).unsqueeze(-1)  # (B,1)
        private = self.Z_private[:, task_ids.clamp(min=0)] * is_seen  # (N,B,T)
        return Routing(torch.cat([common, private], dim=-1))


class NoAdapter(Adapters):
    """y = W0 x: the base without skills. Nothing trains."""

    def routed(self, *_inputs: Any, **_options: Any) -> AbstractContextManager[Routing]:
        """Return a context in which nothing is routed."""
        return nullcontext(Routing(torch.empty(0, 1, 0), shared=True))


METHODS = {
    "orchmoe": OrchMoE,
    "lora": LoRA,
    "moe-lora": MoELoRA,
    "poly": Poly,
    "mhr": MHR,
    "c-poly": CPoly,
}
BUILT_IN = METHODS | VARIANTS


# --------------------------------------------------------------------------- a method from a file

# Those that `load_method` has loaded, by class name. `source` of each is the text of its flag.
OWN_METHODS: dict[str, type[Adapters]] = {}


def load_method(text: str) -> str:
    """Load the class that `--method FILE.py:Class` names. Return the name of the method.

    `method_class` then finds the class by this name. The name of a built-in method is returned as
    it is. A run is bound to the content of the file, but not to what the file imports, see
    run_folder.class_of. Raise UserError for an unknown name, a file that is not Python, or a class
    that does not derive Adapters.

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
    is_method = isinstance(method, type) and issubclass(method, Adapters)
    # An imported class is not its own: the lines below would change the built-in method.
    if not is_method or method.__module__ != module.__name__:
        raise UserError(
            f"{path}: defines no class {name} that derives orchmoe.Adapters; correct the file, or "
            "the name behind the colon"
        )
    if name in BUILT_IN:
        raise UserError(f"--method {text}: a built-in method has this name; rename the class")
    method.kind = f"{name} of {digest}"
    method.source = text
    OWN_METHODS[name] = method
    return name


# ------------------------------------------------------------------------------ using the methods


def method_class(method: str | type[Adapters]) -> type[Adapters]:
    """Return the class of a method. Raise UserError if there is none of this name."""
    if isinstance(method, type):
        return method
    known = BUILT_IN | OWN_METHODS
    if method not in known:
        raise UserError(
            f"--method {method}: choose one of {', '.join(BUILT_IN)}; for a method of your own "
            "give its file and its class, --method FILE.py:Class"
        )
    return known[method]


def without_adapters(module: nn.Module) -> Adapters:
    """Freeze `module`. Return Adapters without Linears for it."""
    return NoAdapter(module.requires_grad_(False), {}, OrchMoEConfig())


def attach_method(
    method: str | type[Adapters], module: nn.Module, config: OrchMoEConfig, **options: Any
) -> Adapters:
    """Freeze `module` and attach a method with S = config.skills and R = config.rank.

    method: a name in BUILT_IN or OWN_METHODS, or a class. For the options see orchmoe.attach. The
    skills are mixed by kernels.mix_skills. Raise ValueError, with the module unchanged, for targets
    that the method cannot adapt, or a parameter without a learning rate.
    """
    if getattr(module, "head", None) in target_linears(module, config.targets).values():
        raise ValueError(
            "targets: head reads the tokens of all samples as one list, so that skills cannot be "
            "mixed by sample there; leave it out"
        )
    return attach(module, config, method_class(method), mix=kernels.mix_skills, **options)


def count_parameters(adapters: Adapters) -> dict[str, int]:
    """Return how many parameters train: A and B as "skills", all others as "routing"."""
    counts = {"skills": 0, "routing": 0}
    for kind, group in adapters.parameter_groups().items():
        part = "skills" if kind == "skills" else "routing"
        counts[part] += sum(parameter.numel() for parameter in group)
    return counts


def settings_of_method(method: str) -> set[str]:
    """Return the names of the settings that a method reads.

    These are fields of OrchMoEConfig, and learning rates: lr_skills, lr_router, lr_token_router and
    lr_allocation.
    """
    cls = method_class(method)
    return cls.settings | {f"lr_{kind}" for kind in cls.rates.values()}
