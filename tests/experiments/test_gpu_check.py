"""The check of a GPU runs on the CPU at small shapes. Numbers are not tested."""

import importlib.util
import re
import warnings

import pytest
import torch

from experiments import bench, gpu_check
from helpers import run

SETUP = bench.Setup(True, "sni/", "", torch.device("cpu"), torch.float32)
LLAMA = SETUP._replace(shape=bench.NARROW_LLAMA)


def test_without_a_gpu_it_says_so_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = run("experiments/gpu_check.py", cwd=tmp_path, code=2)
    assert message == "gpu_check.py: error: torch finds no GPU here; this program needs one\n"


@pytest.mark.slow
def test_few_graphs_serve_all_shapes():
    assert re.match(r"\| \*\*[1-4]\*\* \|", gpu_check.graphs(SETUP))


@pytest.mark.slow
def test_what_only_cuda_measures():
    rows = gpu_check.step_and_memory(SETUP)
    assert ["--compile" in rows[0], "--checkpoint-blocks" in rows[1]] == [True, True]


def test_cudnn_is_used_in_every_other_step_and_afterwards(monkeypatch):
    """Each of the two sees the same lengths, and none of them twice."""
    seen = {True: [], False: []}
    random_batch = bench.random_batch

    def recorded_batch(setup, B, L, Lt):
        seen[torch.backends.cuda.cudnn_sdp_enabled()].append(L)
        return random_batch(setup, B, L, Lt)

    monkeypatch.setattr(bench, "random_batch", recorded_batch)
    assert "| cuDNN, " in gpu_check.cudnn(LLAMA)
    assert seen[True] == seen[False]
    assert len(set(seen[True])) == 5
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_waits_are_counted_in_a_second_step(monkeypatch):
    """torch warns of each wait in this mode, on CUDA alone."""
    modes = []
    train_step = gpu_check.train.train_step

    def waiting_step(*arguments):
        train_step(*arguments)
        if modes == ["warn"]:
            for text in ("called a synchronizing CUDA operation", "something else"):
                warnings.warn(text, stacklevel=1)

    monkeypatch.setattr(gpu_check.train, "train_step", waiting_step)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    row = gpu_check.waits(LLAMA)
    assert row.startswith("| **1** |  | <= 3 |")
    assert modes == ["warn", "default"]


def test_without_peft_the_other_rows_are_measured(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    of_t5, of_llama, *of_linears, last = gpu_check.check(SETUP)
    assert "attention in a training step" in of_t5
    # Attention is named by the function that computes it.
    function = "_scaled_dot_product_flash_attention_for_cpu"
    assert of_llama.startswith(f"| **12 x {function}, 12 x {function}_backward** |")
    assert any("forward + backward in float32" in row for row in of_linears)
    assert not any("peft" in row for row in (of_t5, of_llama, *of_linears))
    assert "**not measured**" in last and "not installed: transformers, peft" in last
    assert "peft" not in bench.machine(SETUP)
