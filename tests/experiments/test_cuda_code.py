"""The code for CUDA is written and built without a GPU, or a line says why it cannot be."""

import importlib.util
import shutil

import pytest

from experiments import cuda_code
from helpers import run

PROGRAM = "experiments/cuda_code.py"


@pytest.mark.slow
def test_code_of_a_block_is_written_and_built(capfd):
    reason = cuda_code.missing()
    if reason:
        pytest.skip(reason)
    code = cuda_code.run_with_fake_cuda("experiments.cuda_code", "T5-base encoder")
    output, errors = capfd.readouterr()
    assert code == 0, errors
    if output.startswith("skipped: "):
        pytest.skip(output)

    table = {}
    for line in output.partition(cuda_code.HEAD)[2].strip().splitlines():
        _, method, adapted, *cells, _ = [cell.strip() for cell in line.split("|")][1:]
        uncompiled, compiled = ([int(n) for n in cell.split(" + ")] for cell in cells[:2])
        built, on_cpu, items = map(int, cells[2:])
        table[method, adapted] = uncompiled, compiled
        assert sum(compiled) < sum(uncompiled)
        assert 0 < built <= sum(compiled)
        assert (on_cpu, items) == (0, 0)

    # Seven Linears, two norms, attention, GELU, a product and two sums, and what they need to
    # return gradients.
    frozen, _ = table.pop(("frozen", ""))
    assert frozen == [14, 18]
    (of_factors, _), (of_outputs, _) = (
        table.pop(("OrchMoE, factors", "all")),
        table["OrchMoE", "all"],
    )
    assert of_factors > of_outputs
    limits = {"q, v": 2, "all": 7}  # adapted Linears
    assert {adapted for _, adapted in table} == limits.keys()
    for (_, adapted), (uncompiled, _) in table.items():
        added = [count - less for count, less in zip(uncompiled, frozen, strict=True)]
        assert added[0] <= 5 * limits[adapted]
        assert added[1] <= 10 * limits[adapted]


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


def test_private_names_that_changed_are_named(monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setattr(cuda_code, "H100_FUNCTIONS", {"torch.cuda.no_such_name": None})
    cuda_code.with_fake_cuda("T5-base encoder")
    assert "other private names: " in capsys.readouterr().out
