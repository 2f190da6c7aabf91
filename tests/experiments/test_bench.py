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


def require_peers(*names):
    """Skip the test if the installed peft, if any, lacks a peer."""
    missing = set(names) - set(bench.available_peers())
    if missing:
        pytest.skip(f"the installed peft lacks {missing}")


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


@pytest.mark.parametrize(
    "name, on_t5",
    [
        (bench.POLY, True),
        (bench.LILY, True),
        (bench.POLY, False),
        (bench.LILY, False),
        (bench.XLORA, False),
    ],
)
def test_peers_have_as_many_adapter_weights_as_ours_and_train(name, on_t5, small_setup):
    require_peers(name)
    make_step, batch = bench.decoder_trainer, bench.decoder_batch(2, 12, 4)
    if on_t5:
        make_step, batch = bench.trainer, bench.random_batch(small_setup)
    ours = bench.adapter_weights(make_step(bench.OURS, small_setup).model)
    step = make_step(name, small_setup)
    assert abs(bench.adapter_weights(step.model) - ours) <= 0.03 * ours

    before = {}
    for key, parameter in step.model.named_parameters():
        if parameter.requires_grad:
            assert re.search("lora_|lily_|poly_|xlora_", key)  # the base is frozen
            before[key] = parameter.detach().clone()
    step(batch)
    step(batch)  # until B differs from 0, the others get no gradient
    after = dict(step.model.named_parameters())
    assert any(not tensor.any() for tensor in before.values())  # weight decay does not move a B
    for key, tensor in before.items():
        # X-LoRA keeps its router in bf16, in which a small step of the bias may round to none.
        if not key.endswith(".bias"):
            assert not after[key].equal(tensor), key


def test_peers_of_one_linear(small_setup):
    require_peers(*bench.PEERS)
    lines = bench.bench_linear(small_setup, list(bench.PEERS))
    found = {LINE.match(line).groups()[3:] for line in lines}
    assert found == {(name, "routed Linear") for name in bench.PEERS}

    base = torch.nn.Sequential(OrderedDict(q=torch.nn.Linear(1024, 2816)))
    lily = bench.add_peft(bench.LILY, base, bench.S, target_modules=["q"])
    ours = bench.S * bench.R * (1024 + 2816)
    assert abs(bench.adapter_weights(lily) - ours) <= 0.03 * ours


def test_xlora_cannot_be_built_on_a_t5(small_setup):
    """If this fails, a newer peft can: give bench_peers the rows of X-LoRA on a T5."""
    require_peers(bench.XLORA)
    with pytest.raises(ValueError, match="unexpected keys"):
        bench.trainer(bench.XLORA, small_setup)


def test_what_the_page_says_of_the_routers_of_peers(small_setup):
    """X-LoRA runs the base twice. In Lily, the output of a sample depends on the other samples."""
    require_peers(*bench.PEERS)
    batch = bench.decoder_batch(2, 12, 4)
    changed = batch.input_ids.clone()
    changed[1] = changed[1].flip(0)
    forwards = {}
    depends = {}
    for name in bench.PEERS:
        model = bench.causal_lm(small_setup, torch.float32, name=name).eval()
        for key, parameter in model.named_parameters():
            if re.search("lora_[AB]|lily_", key):
                torch.nn.init.normal_(parameter, generator=runtime.generator(0))
        calls = []
        hook = lambda *call, calls=calls: calls.append(call)  # noqa: E731
        model.get_input_embeddings().register_forward_hook(hook)
        options = {"task_ids": batch.task_ids} if name == bench.POLY else {}
        with torch.no_grad():
            first = model(input_ids=batch.input_ids, use_cache=False, **options).logits[0]
            forwards[name] = len(calls)
            second = model(input_ids=changed, use_cache=False, **options).logits[0]
        depends[name] = bool((first - second).abs().max() > 1e-3 * first.std())
    assert forwards == {bench.POLY: 1, bench.LILY: 1, bench.XLORA: 2}
    assert depends == {bench.POLY: False, bench.LILY: True, bench.XLORA: False}


def test_peers_that_an_old_peft_lacks_are_left_out(monkeypatch, capsys):
    peft = pytest.importorskip("peft")
    runtime.warn.cache_clear()
    monkeypatch.delattr(peft, "LilyConfig", raising=False)
    assert bench.LILY not in bench.available_peers()
    assert "has no LilyConfig: the rows of peft Lily are left out" in capsys.readouterr().err


@pytest.mark.slow
def test_peers_have_the_rows_of_the_page(small_setup, monkeypatch, capsys):
    require_peers(*bench.PEERS)
    flags = ["--only", "peers", "--model", small_setup.model]
    found = rows(printed(monkeypatch, capsys, *flags))
    assert found.count((bench.POLY, "OrchMoE")) == 4  # step and memory, of a T5 and of a decoder
    assert found.count((bench.LILY, "OrchMoE")) == 4
    assert found.count((bench.XLORA, "OrchMoE")) == 2  # of a decoder


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
