"""The benchmark runs on small shapes, its contestants compute the same, and it prints the tables
of docs/speed.md. Speed is not tested.
"""

import importlib.util
import re

import pytest
import torch

import orchmoe
from experiments import bench
from helpers import LLAMA_SIZES, ROOT, run, text_of

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

SIDE = r"([^|]+), [\d.e+-]+ \S+"
LINE = rf"\| \*\*[\d.]+\*\* \| [\d.]+–[\d.]+ \| {SIDE} \| {SIDE} \|"


TABLE = rf"((?:.+\n)+)\n{re.escape(bench.HEAD)}\n((?:\|.+\n)+)"


def rows(text, *kinds):
    """Return (kind, of, to) of each row. A kind is how the line above a table begins."""
    found = set()
    for what, lines in re.findall(TABLE, text):
        for kind in kinds:
            if what.startswith(kind):
                found |= {(kind, *pair) for pair in re.findall(LINE, lines)}
    assert found, text  # otherwise no table would equal no table
    return found


NARROW = bench.Setup(
    True, str(ROOT / "sni"), "", torch.device("cpu"), torch.float32, shape=bench.NARROW_LLAMA
)
PAGE = text_of("docs/speed.md")


def printed(flags="", *more, code=0):
    """Return what the program prints."""
    return run(f"experiments/bench.py --quick {flags}", *more, cwd=ROOT, code=code)


def test_linear_and_decoding_have_the_rows_of_the_page():
    output = printed("--only linear,decode,generate")
    kinds = ("Forward", "Decoding", "Greedy")
    assert rows(output, *kinds) == rows(PAGE, *kinds)
    assert "folded gives the same tokens as routed" in output
    assert "8 outputs equal" in output


@pytest.mark.slow
def test_host_time_has_the_rows_of_the_page():
    assert rows(printed("--only host"), "Host") == rows(PAGE, "Host")


@pytest.mark.slow
def test_training_has_the_rows_of_the_page(setup):
    kinds = ("A training step", "Peak memory")
    of_t5 = rows(printed("--only step"), *kinds)
    of_decoder = rows(printed("--only step --model", setup.model), *kinds)
    assert of_t5 | of_decoder == rows(PAGE, *kinds)


@pytest.mark.slow
def test_generation_of_a_decoder_is_that_of_transformers(setup, smollm2_dir):
    """In float32: rounding to bfloat16 decides between tokens that are almost equally likely."""
    (text,) = bench.bench_generate(setup._replace(model=str(smollm2_dir)))
    assert "8 outputs equal" in text


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """Return the settings of a quick run, with a random Llama as the decoder-only base."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = LLAMA_SIZES | {"vocab_size": 1000, "tie_word_embeddings": True}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(folder)
    return NARROW._replace(model=str(folder), shape="")


def adapter_weights(model):
    """Return the number of weights in A and B, of our adapters or of peft's."""
    count = 0
    for name, parameter in model.named_parameters():
        if re.search(r"skills.*\.[AB]$|lora_[AB]\b", name):
            count += parameter.numel()
    return count


@pytest.mark.parametrize("on_t5", [True, False])
@pytest.mark.parametrize("name", [bench.LORA, bench.POLY])
def test_adapters_of_peft_have_as_many_weights_as_ours_and_train(name, on_t5, setup):
    if on_t5:
        setup = setup._replace(model="")
    step = bench.their_step(setup, name)
    assert adapter_weights(step.model) == adapter_weights(bench.our_step(setup).model)

    before = {}
    for key, parameter in step.model.named_parameters():
        if parameter.requires_grad:
            assert re.search("lora_|poly_", key)  # the base is frozen
            before[key] = parameter.detach().clone()
    batch = bench.random_batch(setup, 2, 12, 4)
    step(batch)
    step(batch)  # until B differs from 0, the others get no gradient
    after = dict(step.model.named_parameters())
    for key, tensor in before.items():
        assert not after[key].equal(tensor), key


@pytest.mark.parametrize("mix", [bench.skills_loop, bench.skills_einsum])
def test_contestants_compute_the_same(mix):
    shapes = ((2, 3, 5), (2, 3, 7), (4, 2, 5), (4, 2, 7), (2, 4))
    given = [torch.randn(shape) for shape in shapes]  # x, y, A, B, c
    torch.testing.assert_close(mix(*given, 0.5), orchmoe.mix_skills(*given, 0.5))


# --------------------------------------------------------------------- what only a GPU shows, here


@pytest.mark.slow
def test_the_large_bases_go_through_every_part(setup):
    texts = list(bench.bench_large(setup))
    kinds = [text.split(maxsplit=1)[0] for text in texts]
    assert kinds == 2 * ["A", "Peak", "Decoding"]


@pytest.mark.parametrize("of, changes", [("sources", 0), ("targets", 1)])
def test_cudnn_is_timed_with_the_same_lengths_and_as_before_afterwards(of, changes, monkeypatch):
    """With cuDNN and without, each length comes once."""
    seen = {True: [], False: []}
    random_batch = bench.random_batch

    def recorded_batch(setup, rows, *lengths):
        seen[torch.backends.cuda.cudnn_sdp_enabled()].append(lengths)
        return random_batch(setup, rows, *lengths)

    monkeypatch.setattr(bench, "random_batch", recorded_batch)
    torch.backends.cuda.enable_cudnn_sdp(False)
    assert "| cuDNN, " in bench.new_lengths(NARROW, of)
    assert seen[True] == seen[False]
    assert len({lengths[changes] for lengths in seen[True]}) == 4
    assert len({lengths[1 - changes] for lengths in seen[True]}) == 1
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_bench_refuses_unknown_parts_and_needs_peft(monkeypatch):
    assert "--only kernel: choose from linear, step, " in printed("--only kernel", code=2)
    assert "--only large: it needs a GPU" in printed("--only large", code=2)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "transformers is not installed; pip install" in printed(code=2)
