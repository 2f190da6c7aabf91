"""The benchmark runs on small shapes, its contestants compute the same, and it prints the tables
of docs/speed.md. How fast anything is, is not a matter for a test.
"""

import os
import re
import subprocess
import sys

import pytest
import torch

import kernels
import orchmoe
import runtime
from experiments import bench
from helpers import ROOT

SIDE = r"(.+), [\d.e+-]+ \S+"
LINE = re.compile(rf"\| \*\*([\d.]+)\*\* \| ([\d.]+) - ([\d.]+) \| [^|]*\| {SIDE} \| {SIDE} \| ")

LINEAR = {
    ("routed Linear", "frozen Linear"),
    ("routed Linear", "peft LoRA"),
    ("plain twin", "routed Linear"),
    ("loop over skills", "routed Linear"),
    ("einsum with expert axis", "routed Linear"),
    ("routed, S 16", "routed, S 4"),
    ("own forward, routed", "own forward, peft LoRA"),
}
DECODE = {
    ("folded", "bare base"),
    ("routed", "bare base"),
    ("folding and restoring", "a token of the bare base"),
    ("a batch of 4 tasks", "a batch of one task"),
}
OTHERS = {
    ("peft Poly", "OrchMoE"),
    ("peft LoRA", "OrchMoE"),
    ("peft Poly", "OrchMoE, --accumulate 2"),
    ("rouge_score", "metrics.rouge_l"),
    ("transformers, file order", "ours, longest first"),
    ("first start", "second start"),
}


def rows(output):
    """Return (of, to) of each row."""
    about, table = output.split(f"\n\n{bench.HEAD}\n")
    assert "torch " in about
    assert " threads, float32 " in about
    found = []
    for line in table.splitlines():
        ratio, low, high, of, to = LINE.match(line).groups()
        assert 0 < float(low) <= float(ratio) <= float(high)
        found.append((of, to))
    return found


def printed(monkeypatch, capsys, *flags):
    """Return what the program prints."""
    monkeypatch.setattr(sys, "argv", ["bench.py", "--quick", *map(str, flags)])
    bench.main()
    return capsys.readouterr().out


def test_linear_and_decode_have_the_rows_of_the_page(monkeypatch, capsys):
    pytest.importorskip("peft")
    monkeypatch.setattr(bench, "CPU", "model name : A\nflags : avx512_bf16")
    output = printed(monkeypatch, capsys, "--only", "linear,decode")
    found = rows(output)
    assert set(found) == LINEAR | DECODE | {("routed Linear", "peft LoRA all in bf16")}
    assert found.count(("routed Linear", "peft LoRA")) == 2
    assert output.count(" in bfloat16, ") == 8
    assert output.startswith("A, ")
    assert "folded gives the same tokens as routed" in output
    assert f"\n{bench.HEAD}\n" in (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_decoder_against_transformers_and_peft(smollm2_dir, monkeypatch, capsys):
    pytest.importorskip("peft")
    flags = ["--only", "decoder", "--model", smollm2_dir, "--data", ROOT / "sni"]
    lora = "transformers + peft LoRA"
    assert rows(printed(monkeypatch, capsys, *flags)) == [
        (f"{lora}, bf16", "OrchMoE, bf16"),
        (f"{lora} all in bf16", "OrchMoE, bf16"),
        (f"{lora}, float32", "OrchMoE, bf16"),
        (f"{lora}, float32", "OrchMoE, bf16, --compile"),
        ("OrchMoE, bf16", "OrchMoE, bf16, --compile"),
        (f"{lora}, float32", "OrchMoE, float32"),
        ("OrchMoE, float32", "OrchMoE, bf16"),
        ("transformers, file order", "ours, longest first"),
    ]


@pytest.mark.slow
def test_every_part(tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("rouge_score")
    variables = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "experiments.bench", "--quick"],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = rows(done.stdout)
    assert set(found) >= LINEAR | DECODE | OTHERS
    assert found.count(("peft Poly", "OrchMoE")) == 3  # a step, its memory, an epoch


@pytest.mark.parametrize("mix", [bench.skills_loop, bench.skills_einsum])
def test_contestants_compute_the_same(mix):
    shapes = ((2, 3, 5), (4, 2, 5), (4, 2, 7), (2, 4), (7, 5))
    x, A, B, c, weight = (torch.randn(shape) for shape in shapes)
    expected = orchmoe.mix_skills(x, A, B, c, 0.5, weight)
    torch.testing.assert_close(mix(x, A, B, c, 0.5, weight), expected)


def test_flops_counts_products_in_place():
    """The fused function has as many as its plain twin."""
    shapes = ((2, 3, 5), (4, 2, 5), (4, 2, 7), (2, 4))
    x, A, B, c = (torch.randn(shape, requires_grad=True) for shape in shapes)
    weight = torch.randn(7, 5)
    counts = []
    for mix in (orchmoe.mix_skills, kernels.mix_skills):
        step = lambda mix=mix: mix(x, A, B, c, 0.5, weight).sum().backward()  # noqa: E731
        counts.append(bench.flops(step))
    expected = 2 * 2 * 6 * 5 * 7 + 3 * 2 * 6 * 8 * (5 + 7)
    assert counts == [expected, expected]


TWO_PROCESSES = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "TORCHELASTIC_RUN_ID": "none",
}


@pytest.mark.parametrize(
    "flags, variables, words",
    [
        (["--only", "kernel"], {}, "--only kernel: choose from linear, step, "),
        (["--only", "decoder"], {}, "--only decoder: give the folder of a decoder-only base"),
        ([], TWO_PROCESSES, "this program runs in one process"),
    ],
)
def test_bench_refuses(flags, variables, words, monkeypatch, capsys):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags])
    with pytest.raises(SystemExit) as end:
        runtime.run_program(bench.main)
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.startswith(f"bench.py: error: {words}")
    assert error.count("\n") == 1
