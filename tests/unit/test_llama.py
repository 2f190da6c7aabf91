"""Llama, Mistral, Qwen2, Qwen3. On random models of all of them: rows depend neither on one another
nor on their padding; the cache changes nothing; adapters work; configs that describe another
computation are refused.

parity/test_transformers.py compares loss, greedy tokens and folders with those of transformers.
"""

import copy
import functools
import re

import pytest
import torch
import torch.nn.functional as F

import checkpoint
from helpers import (
    LLAMA3_ROPE,
    LLAMA_SIZES,
    SHORT,
    adapted,
    hf_llama,
    random_batch,
    refusal,
    refused,
    rows_of,
    small_model,
    write_decoder,
    write_words,
)
from llama import Attention, LlamaConfig, causal_attention, rotation


def test_cached_logits_equal_the_teacher_forced_ones(llama_pair, llama_batch):
    own, targets = llama_pair[1], llama_batch[2].clamp(min=10)
    newest, state = own.start(*llama_batch[:2], 6)
    for t in range(6):
        logits = own.step(newest, state)
        for row, (source, _) in enumerate(rows_of(llama_batch)):
            whole = own.hidden(torch.cat((source, targets[row : row + 1, :t]), 1))
            torch.testing.assert_close(logits[row], own.logits(whole)[0, -1], rtol=1e-4, atol=1e-4)
        newest = targets[:, t]


def test_cached_logits_under_autocast_are_near_those_in_float32():
    own = small_model("qwen2")
    batch = random_batch(10, 97)

    def logits_of_two_steps():
        newest, state = own.start(batch.input_ids, batch.attention_mask, 2)
        with torch.no_grad():
            return torch.stack([own.step(newest, state), own.step(newest + 1, state)])

    expected = logits_of_two_steps()
    with torch.autocast("cpu", torch.bfloat16):
        found = logits_of_two_steps()
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_neither_junk_in_the_padding_nor_its_side_matters(llama_pair, llama_batch):
    own = llama_pair[1]
    ids, mask, labels = llama_batch
    junk = torch.where(mask, ids, 50)
    left_mask = mask.flip(1)
    left = torch.full_like(ids, 50)
    left[left_mask] = ids[mask]
    loss = own.loss(ids, mask, labels)
    tokens = own.generate(ids, mask, max_new_tokens=5)
    for other_ids, other_mask in ((junk, mask), (left, left_mask), (ids, mask.long())):
        assert torch.equal(own.loss(other_ids, other_mask, labels), loss)
        assert torch.equal(own.generate(other_ids, other_mask, max_new_tokens=5), tokens)


@pytest.mark.parametrize(
    "heads, groups, length, large",
    [
        (4, 4, 7, False),
        (9, 3, 50, False),
        (4, 1, 256, False),
        (4, 2, 257, False),
        (4, 2, 50, True),  # scores of hundreds, as the biases of Qwen2 make them
    ],
)
def test_attention_of_short_rows_in_bfloat16_equals_that_of_torch(heads, groups, length, large):
    torch.manual_seed(0)
    half = [torch.randn(2, n, length, 16).bfloat16() for n in (heads, groups, groups)]
    if large:
        half[0] *= 90
    options = {"is_causal": True, "enable_gqa": True}
    attention = functools.partial(F.scaled_dot_product_attention, **options)
    own_attention = functools.partial(causal_attention, large_scores=large)
    y, backward = torch.func.vjp(own_attention, *half)
    y_exact, backward_exact = torch.func.vjp(attention, *(x.double() for x in half))
    dy = torch.randn_like(y)
    exact = (y_exact, *backward_exact(dy.double()))
    for found, expected in zip((y, *backward(dy)), exact, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_qwen_does_not_round_its_scores(model_type):
    config = LlamaConfig.from_hf(VALUES | {"model_type": model_type})
    attention = Attention(config).bfloat16()
    x = torch.randn(2, 9, config.hidden_size).bfloat16()
    turn = rotation(config, torch.arange(9)).bfloat16()
    y = attention(x, turn)
    attention.large_scores = False
    assert not torch.equal(attention(x, turn), y)


# ----------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("method", ["orchmoe", "orchmoe-token"])
def test_adapted_samples_do_not_depend_on_one_another(llama_pair, llama_batch, method):
    own = copy.deepcopy(llama_pair[1])
    adapters = adapted(own, method, targets=("all",))
    assert len(adapters.linears) == 14  # q, k, v, o, gate, up and down of two blocks

    def loss_and_tokens(ids, mask, labels):
        with adapters.routed(own.embed(ids), mask):
            loss = own.loss(ids, mask, labels)
        with adapters.routed(own.embed(ids), mask):
            return loss, own.generate(ids, mask, max_new_tokens=8, on_keep=adapters.keep).tolist()

    mixed, tokens = loss_and_tokens(*llama_batch)
    losses = []
    for row, (source, target) in zip(tokens, rows_of(llama_batch), strict=True):
        loss, [expected] = loss_and_tokens(source, torch.ones_like(source), target)
        losses.append(loss)
        assert row[: len(expected)] == expected
    torch.testing.assert_close(mixed, sum(losses), rtol=1e-4, atol=0)


# ------------------------------------------------------------------------------ configs and folders


def test_a_copy_of_a_tied_table_is_no_head_and_another_is_refused(tmp_path):
    model = hf_llama("smollm2")
    model.config.save_pretrained(tmp_path)
    weights = model.state_dict()  # with lm_head.weight
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    path = tmp_path / "pytorch_model.bin"
    torch.save(weights, path)
    assert checkpoint.load(tmp_path).head is None
    torch.save(weights | {"lm_head.weight": weights["lm_head.weight"] + 1}, path)
    with refusal("unexpected tensors.*lm_head.weight"):
        checkpoint.load(tmp_path)


VALUES = LLAMA_SIZES | {
    "model_type": "llama",
    "num_key_value_heads": None,  # left out
    "max_position_embeddings": 32768,
}
THETA = {"rope_theta": 500}
MISTRAL = {"model_type": "mistral"}
ACCEPTED = [
    # rope_theta in each of its places
    (THETA, "rope_theta", 500),
    ({"rope_scaling": THETA | {"type": "default"}}, "rope_theta", 500),
    ({"rope_parameters": THETA}, "rope_theta", 500),
    ({"rope_parameters": THETA, "rope_scaling": LLAMA3_ROPE | {"rope_theta": 9}}, "rope_theta", 9),
    ({"rope_parameters": THETA, "rope_scaling": {"type": "default"}}, "rope_theta", 10_000),
    # what may be left out
    ({}, "num_key_value_heads", 4),
    ({}, "head_dim", 8),
    ({"model_type": "qwen3"}, "head_dim", 128),
    (MISTRAL, "max_position_embeddings", 4096),
    (MISTRAL | {"sliding_window": None}, "max_position_embeddings", 32768),
]


@pytest.mark.parametrize("change, field, value", ACCEPTED)
def test_from_hf_reads_a_field(change, field, value):
    assert getattr(LlamaConfig.from_hf(VALUES | change), field) == value


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
REFUSED = [
    ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}, "rope_type 'yarn'"),
    ({"rope_scaling": {"type": "yarn", "rope_type": None}}, "rope_type 'yarn'"),
    ({"rope_parameters": {"full_attention": THETA}}, "full_attention"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"use_sliding_window": True}, "use_sliding_window True"),
    ({"is_causal": False}, "is_causal False"),
    ({"num_experts": 8}, "num_experts 8"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types 'sliding_attention'"),
    ({"quantization_config": {"bits": 4}}, "quantization_config {'bits': 4}"),
]


@pytest.mark.parametrize("change, message", REFUSED)
def test_from_hf_refuses_another_computation_by_field_and_value(change, message):
    with refusal(re.escape(message)):
        LlamaConfig.from_hf(VALUES | change)


# ------------------------------------------------------------------------------------- the programs


def test_examples_beyond_the_model_are_refused(tmp_path):
    sizes = {"vocab_size": 512, "max_position_embeddings": 300}
    write_decoder(tmp_path / "model", write_words, **sizes)
    message = "but the model has 300 positions"
    long = "--model model --max-source-length 384 --out run"
    refused(message, f"train.py {SHORT} {long}")
    assert not (tmp_path / "run").exists()
    ask = "eval.py --model model --device cpu --ask Go. --input"
    refused(message, ask, "x" * 600)
    compare = "experiments/compare/compare.py --methods orchmoe,lora --device cpu"
    # The rows fit in training, but not with the longest answers.
    refused(message, f"{compare} --model model --max-source-length 200")


def test_rows_that_need_more_positions_than_there_are_are_refused():
    """A row counts as it is packed, without the padding between its source and its target."""
    base = small_model("llama2")  # of 64 positions
    fits = random_batch(10, 97, (40, 60), (25, 3))  # 65 tokens, the last of which is not read
    base.loss(*fits)
    base.generate(fits.input_ids, fits.attention_mask, max_new_tokens=5)
    message = "a row needs 65 positions, but the model has 64"
    with refusal(message):
        base.loss(*random_batch(10, 97, (40, 60), (26, 3)))
    with refusal(message):
        base.generate(fits.input_ids, fits.attention_mask, max_new_tokens=6)
