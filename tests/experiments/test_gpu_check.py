"""The check of a GPU runs on the CPU at small shapes. Numbers are not tested."""

import importlib.util
import re
import shutil
import subprocess
import warnings
from unittest import mock

import pytest
import torch

from experiments import bench, gpu_check
from helpers import CPU, run
from llama import Llama
from support import runtime

SETUP = bench.Setup(True, "sni/", "", torch.device("cpu"), torch.float32)
LLAMA = SETUP._replace(shape=bench.NARROW_LLAMA)


def test_without_a_gpu_it_says_so_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = run("experiments/gpu_check.py", cwd=tmp_path, code=2)
    assert message == "gpu_check.py: error: torch finds no GPU here; this program needs one\n"


def test_without_nvidia_smi_the_driver_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runtime, "pick_device", lambda gpu: CPU)
    monkeypatch.setattr(gpu_check, "check", lambda setup: ["| one row |"])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    output = run("experiments/gpu_check.py", cwd=tmp_path)
    assert output.startswith("driver unknown, ")
    assert output.endswith(f"{bench.HEAD}\n| one row |\n")


@pytest.mark.parametrize("visible, seen", [("", "1"), ("4,6", "6")])
def test_tests_see_the_gpu_that_is_checked(visible, seen, monkeypatch):
    done = mock.Mock(stdout="...\n9 passed in 3 s\n", stderr="")
    monkeypatch.setattr(subprocess, "run", mock.Mock(return_value=done))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (row,) = gpu_check.gpu_tests(SETUP._replace(device=torch.device("cuda", 1)))
    assert "**9 passed in 3 s**" in row
    assert subprocess.run.call_args.kwargs["env"]["CUDA_VISIBLE_DEVICES"] == seen


@pytest.mark.slow
def test_few_graphs_serve_all_shapes():
    assert re.match(r"\| \*\*[1-4]\*\* \|", *gpu_check.graphs(SETUP))


@pytest.mark.slow
def test_what_only_cuda_measures():
    rows = gpu_check.step_and_memory(SETUP)
    assert ["--compile" in rows[0], "--checkpoint-blocks" in rows[1]] == [True, True]


@pytest.mark.parametrize("of, changes", [("sources", 0), ("targets", 1)])
def test_cudnn_is_used_in_every_other_step_and_as_before_afterwards(of, changes, monkeypatch):
    """Each of the two sees the same lengths, and none of them twice."""
    seen = {True: [], False: []}
    random_batch = bench.random_batch

    def recorded_batch(setup, rows, *lengths):
        seen[torch.backends.cuda.cudnn_sdp_enabled()].append(lengths)
        return random_batch(setup, rows, *lengths)

    monkeypatch.setattr(bench, "random_batch", recorded_batch)
    is_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    (row,) = gpu_check.new_lengths(LLAMA, of)
    assert "| cuDNN, " in row
    assert seen[True] == seen[False]
    assert len({lengths[changes] for lengths in seen[True]}) == 4
    assert len({lengths[1 - changes] for lengths in seen[True]}) == 1
    assert torch.backends.cuda.cudnn_sdp_enabled() == is_enabled


def test_decoding_gets_a_new_number_of_rows_each_time(monkeypatch):
    seen = []
    generate = Llama.generate

    def recorded_generate(base, ids, *arguments, **options):
        seen.append(len(ids))
        return generate(base, ids, *arguments, **options)

    monkeypatch.setattr(Llama, "generate", recorded_generate)
    gpu_check.new_batch_sizes(LLAMA)
    assert len(seen) == 8 and len(set(seen)) == 4


@pytest.mark.parametrize("micro_batches, wanted", [(1, 3), (2, 5)])
def test_waits_are_counted_in_a_second_step(micro_batches, wanted, monkeypatch):
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
    (row,) = gpu_check.waits(LLAMA, micro_batches)
    assert row.startswith(f"| **1** |  | <= {wanted} |")
    assert modes == ["warn", "default"]


def test_attention_is_named_by_the_function_that_computes_it():
    function = "_scaled_dot_product_flash_attention_for_cpu"
    (row,) = gpu_check.attention(LLAMA)
    assert row.startswith(f"| **12 x {function}, 12 x {function}_backward** |")


def test_without_peft_the_other_rows_are_measured(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    linears = {name: part for name, part in gpu_check.parts(SETUP).items() if "Linear" in name}
    monkeypatch.setattr(gpu_check, "parts", lambda setup: linears)
    *of_linears, last = gpu_check.check(SETUP)
    assert any("forward + backward in float32" in row for row in of_linears)
    assert not any("peft" in row for row in of_linears)
    assert "**not measured**" in last and "not installed: transformers, peft" in last
    assert "peft" not in bench.machine(SETUP)
