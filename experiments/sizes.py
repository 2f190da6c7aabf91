"""How many parameters a method trains, before anything is built, and the ranks that make methods of equal
total size, for comparisons. Test: pytest tests/unit/test_baselines.py tests/experiments/test_compare.py"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import checkpoint
from baselines import attach_method, count_parameters
from model import Backbone
from orchmoe import OrchMoEConfig


def on_meta(described: Any) -> Backbone:
    """The model that a family's config describes, without memory."""
    family = next(kind for kind in checkpoint.FAMILIES.values() if isinstance(described, kind.Config))
    with torch.device("meta"):
        return family(described)


def parameters(name: str, module: nn.Module, config: OrchMoEConfig, **options: int) -> dict[str, int]:
    """The `count` of what attach_method(name, module, config, **options) would train. The module, best one on
    the meta device, is left as it was."""
    adapters = attach_method(name, module, config, **options)
    counted = count_parameters(adapters)
    adapters.detach()
    return counted


def budget(names: Sequence[str], module: nn.Module, config: OrchMoEConfig, num_tasks: int = 0,
           least: int = 0) -> dict[str, int]:
    """The extra_rank of each method that makes all of one total size: the budget is the least total, `least`
    or more, that every method reaches with S and R as they are, hence that of the method with the dearest
    routing; the others come as near to it as whole extra ranks can, one Linear at a time. c-poly, which grows
    with T, cannot stand in it. module: best one on the meta device."""
    def total(name: str, extra: int) -> int:
        return sum(parameters(name, module, config, extra_rank=extra, num_tasks=num_tasks).values())

    target = max(least, *(total(name, 0) for name in names))
    chosen = {}
    for name in names:
        low, high = 0, 1  # total(low) <= target < total(high)
        while total(name, high) <= target:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if total(name, middle) <= target else (low, middle)
        chosen[name] = min(low, high, key=lambda extra: abs(total(name, extra) - target))
    return chosen
