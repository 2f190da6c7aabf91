"""The code for CUDA is written and built without a GPU, or a line says why it cannot be."""

import importlib.util
import shutil

import pytest

from experiments import cuda_code
from helpers import run

PROGRAM = "experiments/cuda_code.py"


def test_what_is_missing_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "found")
    monkeypatch.setattr(cuda_code.torch.version, "cuda", "13.0")
    assert run(PROGRAM, cwd=tmp_path).startswith("skipped: this torch is built for CUDA;")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("CXX", "no-compiler")
    assert run(PROGRAM, cwd=tmp_path).endswith("there is no C++ compiler (no-compiler)\n")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = "skipped: triton is not installed; pip install -r requirements-dev.txt\n"
    assert run(PROGRAM, cwd=tmp_path) == line


def test_unknown_blocks_are_refused(tmp_path):
    message = run(PROGRAM, "--only", "T5", cwd=tmp_path, code=2)
    assert "--only T5: choose from T5-base encoder, T5-base decoder, Llama-3.2-1B\n" in message


def test_private_names_that_changed_are_named(monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setattr(cuda_code, "H100_FUNCTIONS", {"torch.cuda.no_such_name": None})
    cuda_code.print_rows(["T5-base encoder"])
    assert "other private names: " in capsys.readouterr().out
