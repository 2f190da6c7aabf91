"""The benchmark runs on small shapes, its contestants compute the same, and it prints the tables
of docs/speed.md. Speed is not tested.
"""

import importlib.util
import re
import sys

import pytest
import torch

import orchmoe
from experiments import bench
from helpers import LLAMA_SIZES, ROOT
from support import runtime

transformers = pytest.importorskip("transformers")
if not hasattr(pytest.importorskip("peft"), "LilyConfig"):
    pytest.skip("the benchmark needs a peft that has Lily", allow_module_level=True)

SIDE = r"([^|]+), [\d.e+-]+ \S+"
LINE = rf"\| \*\*[\d.]+\*\* \| [\d.]+ - [\d.]+ \| [^|]*\| {SIDE} \| {SIDE} \| (\w+)"


def rows(text, *kinds):
    """Return (of, to, kind) of each row. The kind is the first word of what it measures."""
    assert f"\n{bench.HEAD}\n" in text
    lines = re.findall(LINE, text)
    assert len(lines) == text.count("\n| **") > 0
    return {line for line in lines if line[-1] in kinds}


PAGE = (ROOT / "docs/speed.md").read_text(encoding="utf-8")


@pytest.fixture
def printed(monkeypatch, capsys):
    """Return what the program prints."""

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["bench.py", "--quick", *map(str, flags)])
        bench.main()
        return capsys.readouterr().out

    return run


def test_linear_and_decoding_have_the_rows_of_the_page(printed):
    output = printed("--only", "linear,decode,generate")
    kinds = ("forward", "decoding", "greedy")
    assert rows(output, *kinds) == rows(PAGE, *kinds)
    assert "folded gives the same tokens as routed" in output
    assert "8 outputs equal" in output


def test_host_time_is_measured_for_all_ways_to_mix(printed, monkeypatch):
    monkeypatch.setattr(bench, "host_steps", lambda setup: [])
    lines = printed("--only", "host").splitlines()
    found = {line.split("|")[4].rpartition(",")[0].strip() for line in lines if "host time" in line}
    blocks = {f"{mix}, block" for mix in ("compiled mix", "--compile")}
    assert found == blocks | {f"{name} and backward" for name in blocks}


@pytest.mark.slow
def test_host_time_is_measured_for_whole_steps(setup):
    """The contestants train as many weights of A and B, and start with the same loss."""
    lines = bench.host_steps(setup)
    pairs = [re.match(LINE, line).groups()[:2] for line in lines]
    compiled = (f"{bench.OURS}, --compile", bench.LORA)
    others = [(bench.OURS, name) for name in (bench.LORA, bench.POLY, "frozen base")]
    assert pairs == 2 * [others[0], compiled, *others[1:]]
    for base, line in zip((bench.NARROW_T5, bench.NARROW_LLAMA), lines[::4], strict=True):
        assert f"training step, {base}, 2 x 8 tokens, targets of 4" in line
        narrow = setup._replace(model="", shape=base)
        weights = [bench.adapter_weights(bench.our_step(narrow).model)]
        for name in (bench.LORA, bench.POLY):
            weights.append(bench.adapter_weights(bench.their_step(narrow, name).model))
        assert len(set(weights)) == 1


@pytest.mark.slow
def test_training_has_the_rows_of_the_page(printed, setup):
    kinds = ("training", "peak")
    of_t5 = rows(printed("--only", "step,peers"), *kinds)
    of_decoder = rows(printed("--only", "step,peers", "--model", setup.model), *kinds)
    assert of_t5 | of_decoder == rows(PAGE, *kinds)


@pytest.mark.slow
def test_generation_of_a_decoder_is_that_of_transformers(setup, smollm2_dir):
    """In float32: rounding to bfloat16 decides between tokens that are almost equally likely."""
    (row,) = bench.bench_generate(setup._replace(model=str(smollm2_dir)))
    assert "8 outputs equal" in row


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """Return the settings of a quick run, with a random Llama as the decoder-only base."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = LLAMA_SIZES | {"vocab_size": 1000, "tie_word_embeddings": True}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(folder)
    return bench.Setup(True, "sni/", str(folder), torch.device("cpu"), torch.float32)


ON_T5 = [(bench.POLY, True), (bench.LILY, True)]
ON_DECODER = [(bench.POLY, False), (bench.LILY, False), (bench.XLORA, False)]


@pytest.mark.parametrize("name, on_t5", ON_T5 + ON_DECODER)
def test_peers_have_as_many_adapter_weights_as_ours_and_train(name, on_t5, setup):
    if on_t5:
        setup = setup._replace(model="")
    step = bench.their_step(setup, name)
    ours = bench.adapter_weights(bench.our_step(setup).model)
    assert abs(bench.adapter_weights(step.model) - ours) <= 0.03 * ours

    before = {}
    for key, parameter in step.model.named_parameters():
        if parameter.requires_grad:
            assert re.search("lora_|lily_|poly_|xlora_", key)  # the base is frozen
            before[key] = parameter.detach().clone()
    batch = bench.random_batch(setup, 2, 12, 4)
    step(batch)
    step(batch)  # until B differs from 0, the others get no gradient
    after = dict(step.model.named_parameters())
    for key, tensor in before.items():
        assert not after[key].equal(tensor), key


def test_xlora_cannot_be_built_on_a_t5(setup):
    """If this fails, a newer peft can: give bench_peers the rows of X-LoRA on a T5."""
    with pytest.raises(ValueError, match="unexpected keys"):
        bench.their_step(setup._replace(model=""), bench.XLORA)


@pytest.mark.parametrize("name, runs", [(bench.LILY, 1), (bench.XLORA, 2)])
def test_what_the_page_says_of_the_routers_of_peers(name, runs, setup):
    """X-LoRA runs the base twice. In Lily, the output of a sample depends on the other samples."""
    model = bench.their_adapters(setup, name, bench.their_base(setup)).eval()
    for key, parameter in model.named_parameters():
        if re.search("lora_[AB]|lily_", key):
            torch.nn.init.normal_(parameter, generator=runtime.generator(0))
    calls = []
    model.get_input_embeddings().register_forward_hook(lambda *call: calls.append(call))
    ids = bench.random_batch(setup, 2, 12, 4).input_ids
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0]
        assert len(calls) == runs
        changed = torch.stack([ids[0], ids[1].flip(0)])
        difference = (logits - model(input_ids=changed, use_cache=False).logits[0]).abs().max()
    assert (difference > 1e-3 * logits.std()) == (name == bench.LILY)


@pytest.mark.parametrize("mix", [bench.skills_loop, bench.skills_einsum])
def test_contestants_compute_the_same(mix):
    shapes = ((2, 3, 5), (4, 2, 5), (4, 2, 7), (2, 4), (7, 5))
    x, A, B, c, weight = (torch.randn(shape) for shape in shapes)
    expected = orchmoe.mix_skills(x, A, B, c, 0.5, weight)
    torch.testing.assert_close(mix(x, A, B, c, 0.5, weight), expected)


def test_bench_refuses_unknown_parts_and_needs_peft(printed, monkeypatch):
    with pytest.raises(ValueError, match="--only kernel: choose from linear, step, "):
        printed("--only", "kernel")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="transformers is not installed; pip install"):
        printed()
