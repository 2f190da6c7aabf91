"""Random weights for a T5, as T5 starts."""

import torch

from t5 import T5


@torch.no_grad()
def init_weights(base: T5, seed: int) -> T5:
    """Initialise as T5 does. The weights depend on the seed alone, on any device."""
    config = base.config
    generator = torch.Generator().manual_seed(seed)
    std = {
        "embedding": 1.0,
        "q": (config.d_model * config.d_kv) ** -0.5,  # in place of 1/sqrt(E) on the scores
        "o": (config.num_heads * config.d_kv) ** -0.5,
        "wo": config.d_ff**-0.5,
    }
    for name, weight in base.named_parameters():
        owner = name.split(".")[-2]
        if owner.endswith("norm"):
            weight.fill_(1.0)
        else:
            values = torch.randn(weight.shape, generator=generator)
            weight.copy_(values * std.get(owner, config.d_model**-0.5))
    return base
