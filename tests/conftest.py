"""Shared by all tests: the project's root on the path, one thread, the folders of the real data where they
are given, `stir` for adapters, and a T5 small enough to be compared in float64."""

import os
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other

from t5 import T5, T5Config  # noqa: E402  (the path comes first)

try:  # pytest tests/test_fuzz.py --hypothesis-profile=long
    from hypothesis import HealthCheck, settings

    settings.register_profile("long", max_examples=10_000, deadline=5000)
    settings.register_profile("short", max_examples=150, deadline=None, derandomize=True, database=None,
                              suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
    settings.load_profile("short")
except ImportError:
    pass


def _folder(variable: str) -> Path:
    if not os.environ.get(variable):
        pytest.skip(f"{variable} is not set")
    return Path(os.environ[variable])


@pytest.fixture(scope="session")
def sni_dir() -> Path:
    """The real Super-NaturalInstructions (tasks/, splits/), by the environment variable SNI_DIR."""
    return _folder("SNI_DIR")


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """What `python -m experiments.smollm2 --out DIR` makes, by the environment variable SMOLLM2_DIR."""
    return _folder("SMOLLM2_DIR")


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """prompts.jsonl and metrics.jsonl made with the official code, by the environment variable SNI_GOLDEN."""
    return _folder("SNI_GOLDEN")


def stir(adapters: nn.Module, generator: torch.Generator) -> None:
    """Values that matter for B and for the routers of tokens: at their start they would hide the routing."""
    for linear in adapters.linears.values():
        nn.init.normal_(linear.skill_B, std=0.3, generator=generator)
        if linear.skill_task is not None:
            nn.init.normal_(linear.skill_task, generator=generator)


class Inputs(NamedTuple):
    input_ids: torch.Tensor  # (B,L)
    attention_mask: torch.Tensor  # (B,L)
    labels: torch.Tensor  # (B,Lt)


@pytest.fixture
def small_t5() -> T5:
    """A random v1.1-shaped T5 in float64, whose outputs differ enough between samples to be told apart."""
    base = T5(
        T5Config(
            vocab_size=64,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            scale_decoder_outputs=False,
            tied_head=False,
        )
    )
    base.init_weights(0)
    return base.double().eval()


@pytest.fixture
def inputs() -> Inputs:
    """Four sources of different lengths, padded; targets likewise."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 60, (4, 9), generator=generator)
    labels = torch.randint(2, 60, (4, 6), generator=generator)
    mask = torch.arange(9) < torch.tensor([9, 4, 7, 2])[:, None]
    labels[1, 3:] = labels[3, 2:] = -100
    return Inputs(ids.masked_fill(~mask, 0), mask, labels)
