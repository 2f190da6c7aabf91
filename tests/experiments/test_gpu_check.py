"""The check of a GPU runs on the CPU at small shapes. Numbers are not tested."""

import re

import pytest
import torch

from experiments import bench, gpu_check
from helpers import run

SETUP = bench.Setup(True, "sni/", "", torch.device("cpu"), torch.float32)


@pytest.fixture(autouse=True)
def needs_peft():
    pytest.importorskip("transformers")
    pytest.importorskip("peft")


def test_without_a_gpu_it_says_so_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = run("experiments/gpu_check.py", cwd=tmp_path, code=2)
    assert message == "gpu_check.py: error: torch finds no GPU here; this program needs one\n"


def test_few_graphs_serve_all_shapes():
    assert re.match(r"\| \*\*[1-4]\*\* \|", gpu_check.graphs(SETUP))


def test_what_only_cuda_measures():
    rows = gpu_check.step_and_memory(SETUP)
    assert ["--compile" in rows[0], "--checkpoint-blocks" in rows[1]] == [True, True]
