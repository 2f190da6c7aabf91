"""Parameter counts without building a model, and the ranks that give methods one total size.

Test: pytest tests/unit/test_baselines.py tests/experiments/test_compare.py
"""

import functools
from bisect import bisect_right
from typing import Any

from torch import nn

import checkpoint
from baselines import attach_method, count_parameters
from orchmoe import OrchMoEConfig
from support.program import UserError


def total(method: str, module: nn.Module, config: OrchMoEConfig, **options: int) -> int:
    """Return how many parameters attach_method would train.

    module: best one on the meta device, see checkpoint.on_meta. It is left as it was.
    """
    adapters = attach_method(method, module, config, **options)
    counts = count_parameters(adapters)
    adapters.detach()
    return sum(counts.values())


def rank_for_total(
    target: int, method: str, module: nn.Module, config: OrchMoEConfig, **options: int
) -> int:
    """Return the extra_rank of a method that brings its total nearest to `target`.

    Raise UserError if extra ranks do not change its size. For the other arguments see `total`.
    """

    def size(extra_rank):
        return total(method, module, config, extra_rank=extra_rank, **options)

    if size(2**12) == size(0):  # so many that each Linear gets some
        raise UserError(
            f"--methods {method}: its size does not depend on its rank, so that it cannot get the "
            "size of the others; leave it out"
        )
    too_large = 1
    while size(too_large) <= target:
        too_large *= 2
    higher = bisect_right(range(too_large), target, key=size)  # the lowest that is too large
    return min(higher - 1, higher, key=lambda extra_rank: abs(size(extra_rank) - target))


@functools.cache
def equal_ranks(
    rows: tuple[tuple[str, str, OrchMoEConfig], ...], shape: Any, num_tasks: int
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
