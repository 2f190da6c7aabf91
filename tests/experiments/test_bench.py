"""The benchmark runs on small shapes, its contestants compute the same, and it prints what docs/speed.md
shows. How fast anything is, is not a matter for a test."""

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


def rows(said):
    """(of, to) of each line below the head."""
    about, table = said.split(f"\n\n{bench.HEAD}\n")
    assert "torch " in about and " threads, float32 " in about
    found = [LINE.match(line).groups() for line in table.splitlines()]
    for ratio, low, high, *_ in found:
        assert 0 < float(low) <= float(ratio) <= float(high)
    return [(of, to) for *_, of, to in found]


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


def test_linear_and_decode_as_rows_of_the_page(monkeypatch, capsys):
    pytest.importorskip("peft")
    monkeypatch.setattr(bench, "CPU", "model name : A\nflags : avx512_bf16")
    monkeypatch.setattr(sys, "argv", ["bench.py", "--quick", "--only", "linear,decode"])
    bench.main()
    said = capsys.readouterr().out
    found = rows(said)
    assert set(found) == LINEAR | DECODE | {("routed Linear", "peft LoRA all in bf16")}
    assert found.count(("routed Linear", "peft LoRA")) == 2 and said.count(" in bfloat16, ") == 8
    assert said.startswith("A, ") and "folded gives the same tokens as routed" in said
    assert f"\n{bench.HEAD}\n" in (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_decoder_against_transformers_and_peft(smollm2_dir, monkeypatch, capsys):
    pytest.importorskip("peft")
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "bench.py",
            "--quick",
            "--only",
            "decoder",
            "--model",
            str(smollm2_dir),
            "--data",
            str(ROOT / "sni"),
        ],
    )
    bench.main()
    lora = "transformers + peft LoRA"
    assert rows(capsys.readouterr().out) == [
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
    program = [sys.executable, "-m", "experiments.bench", "--quick"]
    done = subprocess.run(
        program, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found = rows(done.stdout)
    assert set(found) >= LINEAR | DECODE | OTHERS
    assert found.count(("peft Poly", "OrchMoE")) == 3  # a step, its memory, an epoch


@pytest.mark.parametrize("form", [bench.skills_loop, bench.skills_einsum])
def test_contestants_compute_the_same(form):
    x, A, B, c, weight = (torch.randn(s) for s in ((2, 3, 5), (4, 2, 5), (4, 2, 7), (2, 4), (7, 5)))
    wanted = orchmoe.mix_skills(x, A, B, c, 0.5, weight)
    torch.testing.assert_close(form(x, A, B, c, 0.5, weight), wanted)


def test_products_in_place_are_counted():
    """Of the fused function as many as of its plain twin."""
    shapes = ((2, 3, 5), (4, 2, 5), (4, 2, 7), (2, 4))
    x, A, B, c = (torch.randn(s, requires_grad=True) for s in shapes)
    weight = torch.randn(7, 5)
    plain, fused = (
        bench.flops(lambda mix=mix: mix(x, A, B, c, 0.5, weight).sum().backward())
        for mix in (orchmoe.mix_skills, kernels.mix_skills)
    )
    assert fused == plain == 2 * 2 * 6 * 5 * 7 + 3 * 2 * 6 * 8 * (5 + 7)


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--only", "kernel"], "bench.py: error: --only kernel: choose from linear, step, "),
        ([], "bench.py: error: this program runs in one process"),
    ],
)
def test_what_is_refused_in_one_line(flags, told, monkeypatch, capsys):
    if not flags:
        two = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}
        for name, value in two.items():
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags])
    with pytest.raises(SystemExit) as ended:
        runtime.run_program(bench.main)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith(told) and said.count("\n") == 1
