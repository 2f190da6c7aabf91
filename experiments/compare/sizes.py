"""Parameter counts without building a model, and the ranks that give methods one total size.

Test: pytest tests/unit/test_baselines.py tests/experiments/test_compare.py
"""

import functools
from typing import Any

from torch import Generator, nn

import checkpoint
import kernels
from baselines import attach_method, count_parameters, method_class
from orchmoe import (
    Adapters,
    Method,
    OrchMoEConfig,
    embedding_width,
    new_skills,
    target_linears,
)


def attach_larger(
    method: str | type[Method],
    module: nn.Module,
    config: OrchMoEConfig,
    *,
    extra_rank: int = 0,
    num_tasks: int = 0,
    generator: Generator | None = None,
) -> Adapters:
    """Do the same as attach_method, with `extra_rank` more ranks in total over the Linears.

    The Linears share them evenly: the first n of N together get floor(n * extra_rank / N).
    """
    options = {"num_tasks": num_tasks, "generator": generator}
    if extra_rank == 0:
        return attach_method(method, module, config, **options)
    cls = method_class(method)
    linears = target_linears(module, config.targets)
    N = len(linears)
    S, R = cls.skill_shape(config, num_tasks)
    alpha = config.rank if config.alpha is None else config.alpha
    skills = []
    for n, linear in enumerate(linears.values()):
        rank = R + (n + 1) * extra_rank // N - n * extra_rank // N
        skills.append(new_skills(linear, S, rank, alpha / rank, kernels.mix_skills, generator))
    weights = cls(linears, skills, config, width=embedding_width(module), **options)
    adapters = Adapters(module, linears, skills, weights)
    module.skill_adapters = adapters.train(module.training)
    return adapters


def total(method: str, module: nn.Module, config: OrchMoEConfig, **options: int) -> int:
    """Return how many parameters attach_larger would train.

    module: best one on the meta device, see checkpoint.on_meta. It is left as it was.
    """
    adapters = attach_larger(method, module, config, **options)
    counts = count_parameters(adapters)
    adapters.detach()
    return sum(counts.values())


def rank_for_total(target: int, *method: Any, **options: int) -> int:
    """Return the extra_rank of a method that brings its total nearest to `target`."""

    def distance(extra_rank):
        return total(*method, extra_rank=extra_rank, **options) - target

    low = 0
    high = 1
    while distance(high) <= 0:
        low = high
        high = 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if distance(middle) <= 0:
            low = middle
        else:
            high = middle
    return low if abs(distance(low)) <= abs(distance(high)) else high


@functools.cache
def equal_ranks(
    rows: tuple[tuple[str, str, OrchMoEConfig], ...], shape: Any, num_tasks: int = 0
) -> dict[str, int]:
    """Return the extra_rank that gives each row (name, method, config) the same total size.

    This is the size of the largest row with S and R of its config. The others come as near to it
    as whole ranks can. c-poly cannot take part, since its size grows with num_tasks.
    shape: config of the base, see checkpoint.read_config.
    """
    base = checkpoint.on_meta(shape)
    options = {"num_tasks": num_tasks}
    target = max(total(method, base, config, **options) for _, method, config in rows)
    ranks = {}
    for name, method, config in rows:
        ranks[name] = rank_for_total(target, method, base, config, **options)
    return ranks
