"""Shared by all tests: the project's root on the path, two threads, and the folders of the real data where
they are given."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(2)


def _folder(variable: str) -> Path:
    if not os.environ.get(variable):
        pytest.skip(f"{variable} is not set")
    return Path(os.environ[variable])


@pytest.fixture(scope="session")
def sni_dir() -> Path:
    """The real Super-NaturalInstructions (tasks/, splits/), by the environment variable SNI_DIR."""
    return _folder("SNI_DIR")


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """prompts.jsonl and metrics.jsonl made with the official code, by the environment variable SNI_GOLDEN."""
    return _folder("SNI_GOLDEN")
