"""The benchmark runs on small shapes, its contestants compute the same, and it prints the tables
of docs/speed.md. How fast anything is, is not a matter for a test.
"""

import os
import re
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch

import kernels
import orchmoe
import runtime
from experiments import bench
from helpers import LLAMA_SIZES, ROOT

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


@pytest.fixture(scope="module")
def small_setup(tmp_path_factory):
    """Return the settings of a quick run, with a random Llama as the decoder-only base."""
    pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = LLAMA_SIZES | {"vocab_size": 1000, "tie_word_embeddings": True}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(folder)
    return bench.Setup(True, "sni/", str(folder), torch.device("cpu"), torch.float32)


def steps_and_batches(setup):
    """Return the kinds of training step, with a batch for each."""
    return {
        "T5": (bench.trainer, bench.random_batch(setup)),
        "decoder": (bench.decoder_trainer, bench.decoder_batch(2, 12, 4)),
    }


@pytest.mark.parametrize(
    "name, base",
    [
        (bench.POLY, "T5"),
        (bench.LILY, "T5"),
        (bench.POLY, "decoder"),
        (bench.LILY, "decoder"),
        (bench.XLORA, "decoder"),
    ],
)
def test_peers_have_as_many_adapter_weights_and_train(name, base, small_setup):
    if name not in bench.available_peers():
        pytest.skip(f"the installed peft has no {name}")
    make_step, batch = steps_and_batches(small_setup)[base]
    ours = bench.adapter_weights(make_step(bench.OURS, small_setup).model)
    step = make_step(name, small_setup)
    assert abs(bench.adapter_weights(step.model) - ours) <= 0.03 * ours

    trained = {n: p for n, p in step.model.named_parameters() if p.requires_grad}
    assert all(re.search("lora_|lily_|poly_|xlora_", n) for n in trained)  # the base is frozen
    zero = [n for n, p in trained.items() if not p.any()]  # B of each Linear and of each expert
    assert zero
    before = {n: p.detach().clone() for n, p in trained.items()}
    step(batch)
    step(batch)
    for n, p in trained.items():
        assert not p.equal(before[n]), n


def test_xlora_cannot_be_built_on_a_t5(small_setup):
    """If this fails, a newer peft can do it: give the T5 rows of X-LoRA to bench_peers."""
    if bench.XLORA not in bench.available_peers():
        pytest.skip("the installed peft has no X-LoRA")
    with pytest.raises(ValueError, match="unexpected keys"):
        bench.trainer(bench.XLORA, small_setup)


def test_one_linear_of_lily_has_as_many_weights():
    pytest.importorskip("peft")
    if bench.LILY not in bench.available_peers():
        pytest.skip("the installed peft has no Lily")
    module = torch.nn.Sequential(OrderedDict(q=torch.nn.Linear(1024, 2816)))
    module = bench.add_peft(bench.LILY, module, bench.S, target_modules=["q"])
    ours = bench.S * bench.R * (1024 + 2816)
    assert abs(bench.adapter_weights(module) - ours) <= 0.03 * ours


def test_what_the_page_says_of_the_routers_of_peers(small_setup):
    """X-LoRA runs the base twice a step. In Lily, an output depends on the other samples."""
    if {bench.LILY, bench.XLORA} - set(bench.available_peers()):
        pytest.skip("the installed peft has no Lily or no X-LoRA")
    batch = bench.decoder_batch(2, 12, 4)
    other = batch.input_ids.clone()
    other[1] = other[1].flip(0)
    forwards = {}
    depends = {}
    for name in (bench.POLY, bench.LILY, bench.XLORA):
        model = bench.causal_lm(small_setup, torch.float32, name=name).eval()
        for n, p in model.named_parameters():
            if "lora_" in n or "lily_" in n:
                torch.nn.init.normal_(p, generator=runtime.generator(0))
        calls = []
        embedding = model.get_input_embeddings()
        embedding.register_forward_hook(lambda *call, calls=calls: calls.append(call))
        inputs = {"task_ids": batch.task_ids} if name == bench.POLY else {}
        with torch.no_grad():
            first = model(input_ids=batch.input_ids, use_cache=False, **inputs).logits[0]
            forwards[name] = len(calls)
            second = model(input_ids=other, use_cache=False, **inputs).logits[0]
        depends[name] = (first - second).abs().max() > 1e-3 * first.std()
    assert forwards == {bench.POLY: 1, bench.LILY: 1, bench.XLORA: 2}
    assert depends == {bench.POLY: False, bench.LILY: True, bench.XLORA: False}


def test_peers_that_an_old_peft_lacks_are_left_out(monkeypatch, capsys):
    peft = pytest.importorskip("peft")
    runtime.warn.cache_clear()
    monkeypatch.delattr(peft, "LilyConfig", raising=False)
    assert bench.LILY not in bench.available_peers()
    assert "has no LilyConfig: the rows of peft Lily are left out" in capsys.readouterr().err


def test_peers_has_the_rows_of_the_page(small_setup, monkeypatch, capsys):
    if len(bench.available_peers()) < 3:
        pytest.skip("the installed peft lacks a peer")
    flags = ["--only", "peers", "--model", small_setup.model]
    found = rows(printed(monkeypatch, capsys, *flags))
    assert {(name, "OrchMoE") for name in bench.PEERS} <= set(found)
    assert {(name, "routed Linear") for name in bench.PEERS} <= set(found)


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
        (["--only", "peers"], {}, "--only peers: give the folder of a decoder-only base"),
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
