"""The T5 of t5.py against what must hold for any T5. Random weights of a tiny size, on the CPU.

parity/test_transformers.py compares it with that of transformers.
"""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import checkpoint
import t5 as t5_module
from experiments.pretrain import init_weights
from helpers import T5_CONFIGS, both_t5, random_t5, t5_batch, teacher_forced
from model import IGNORED, Backbone
from t5 import T5, T5Config

# --------------------------------------------------------------------------------------- generation


def test_rows_end_at_different_steps_and_each_equals_itself_alone(monkeypatch):
    t5 = random_t5(T5_CONFIGS["v1.1"], seed=3)  # a seed whose rows end at many different steps
    lengths = (14, 9, 5, 1, 12, 7, 3, 11)
    input_ids, mask, _ = t5_batch(lengths)
    names = torch.arange(len(lengths))  # of the rows that are still in the batch
    calls, source_lengths = [], []

    def on_keep(rows):
        nonlocal names
        names = names[rows]
        calls.append(names.tolist())

    keep = t5_module.State.keep

    def spy(state, rows):
        keep(state, rows)
        source_lengths.append(state.caches[0].source.shape[3])

    monkeypatch.setattr(t5_module.State, "keep", spy)
    tokens = t5.generate(input_ids, mask, max_new_tokens=30, on_keep=on_keep)

    ends = [row.tolist().index(1) + 1 if 1 in row else 99 for row in tokens]  # lengths with EOS
    assert len(set(ends)) >= 5, "the rows of this seed end too much alike"
    expected = []
    for step in sorted(set(ends)):
        expected.append([row for row, end in enumerate(ends) if end > step])
    assert calls == [rows for rows in expected if rows]

    longest = max(lengths[row] for row in calls[-1])
    assert source_lengths[-1] == longest < 14  # cut to the rows that stay
    for row, length in enumerate(lengths):
        one = (slice(row, row + 1), slice(length))
        alone = t5.generate(input_ids[one], mask[one], max_new_tokens=30)[0]
        assert torch.equal(tokens[row, : len(alone)], alone)
        assert (tokens[row, len(alone) :] == 0).all()


@both_t5
def test_cached_logits_equal_the_teacher_forced_ones(kind, monkeypatch):
    config = replace(T5_CONFIGS[kind], eos_token_id=36)
    t5 = random_t5(config).double()
    input_ids, mask, _ = t5_batch()
    weight = t5.embedding.weight if t5.head is None else t5.head.weight
    weight.data[36] = 0  # EOS hardly ever has the largest logit, so all rows go on to the end
    steps = []
    logits = t5.logits

    def spy(hidden):
        steps.append(logits(hidden))
        return steps[-1]

    monkeypatch.setattr(t5, "logits", spy)
    tokens = t5.generate(input_ids, mask, max_new_tokens=12)
    assert len(steps) == 12 and (tokens != 36).all()
    monkeypatch.undo()
    start = torch.zeros(len(tokens), 1, dtype=torch.long)
    forced = teacher_forced(t5, input_ids, mask, torch.cat((start, tokens[:, :-1]), 1))
    torch.testing.assert_close(torch.stack(steps, 1), forced, atol=1e-9, rtol=1e-9)


def test_generate_stops_when_all_rows_have_ended():
    t5 = random_t5(T5_CONFIGS["v1.1"])
    input_ids, mask, _ = t5_batch()
    t5.head.weight.data.zero_()  # all logits are equal, so token 0 comes first
    t5.config = replace(t5.config, eos_token_id=0, pad_token_id=3)
    calls = []
    assert t5.generate(input_ids, mask, on_keep=calls.append).tolist() == [[0]] * 4
    assert calls == []  # on_keep is not called if no row stays
    with pytest.raises(ValueError, match="max_new_tokens"):
        t5.generate(input_ids, mask, max_new_tokens=0)


class Countdown(Backbone):
    """Count down from the last real token of each row. The cache is written in place."""

    def __init__(self, config):
        super().__init__(config)
        self.embedding = torch.nn.Embedding(20, 1)

    def start(self, input_ids, attention_mask, max_new_tokens):
        self.state = SimpleNamespace(cache=torch.zeros(len(input_ids), max_new_tokens), read=0)
        self.state.keep = lambda rows: vars(self.state).update(cache=self.state.cache[rows])
        last = attention_mask.sum(1, keepdim=True) - 1
        return input_ids.gather(1, last)[:, 0], self.state

    def step(self, newest, state):
        state.cache[:, state.read] = newest
        state.read += 1
        return F.one_hot(newest - 1, 20).float()


def test_any_of_several_eos_ids_ends_a_row_and_the_padding_may_be_one_of_them():
    backbone = Countdown(SimpleNamespace(eos_ids=(3, 7), pad_token_id=3))
    input_ids = torch.tensor([[9, 12], [6, 3], [5, 3]])
    mask = torch.tensor([[1, 1], [1, 0], [1, 0]])
    tokens = backbone.generate(input_ids, mask, max_new_tokens=8)
    assert tokens.tolist() == [[11, 10, 9, 8, 7], [5, 4, 3, 3, 3], [4, 3, 3, 3, 3]]
    assert backbone.state.cache.tolist() == [[12, 11, 10, 9, 8, 0, 0, 0]]


# ---------------------------------------------------------------------------- loss, masks, training


@both_t5
def test_loss_equals_the_cross_entropy_of_the_full_logits(kind):
    t5 = random_t5(T5_CONFIGS[kind])
    input_ids, mask, labels = t5_batch()
    labels[3] = IGNORED  # a row without any target
    shifted = torch.cat((torch.zeros(4, 1, dtype=torch.long), labels[:, :-1].clamp(min=0)), 1)
    logits = teacher_forced(t5, input_ids, mask, shifted)
    expected = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    torch.testing.assert_close(t5.loss(input_ids, mask, labels), expected)
    assert t5.loss(input_ids, mask, torch.full_like(labels, IGNORED)) == 0


def test_loss_starts_from_the_configured_token():
    t5 = random_t5(T5_CONFIGS["v1.0"])
    input_ids, mask, labels = t5_batch()
    before = t5.loss(input_ids, mask, labels)
    t5.config = replace(t5.config, decoder_start_token_id=5)
    assert not torch.allclose(t5.loss(input_ids, mask, labels), before)


@both_t5
def test_content_of_the_padding_changes_nothing(kind):
    t5 = random_t5(T5_CONFIGS[kind])
    input_ids, mask, labels = t5_batch()
    junk = torch.where(mask, input_ids, torch.randint(2, 37, mask.shape))
    assert torch.equal(t5.loss(junk, mask, labels), t5.loss(input_ids, mask, labels))
    tokens = t5.generate(input_ids, mask, max_new_tokens=9)
    assert torch.equal(t5.generate(junk, mask, max_new_tokens=9), tokens)
    alone = t5.encode(input_ids[:1, :9], mask[:1, :9])
    torch.testing.assert_close(t5.encode(junk, mask)[:1, :9], alone, atol=1e-5, rtol=1e-5)
    assert torch.equal(t5.loss(input_ids, mask.long(), labels), t5.loss(input_ids, mask, labels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_without_any_real_token_gives_no_nan(dtype):
    t5 = random_t5(T5_CONFIGS["v1.0"]).to(dtype)
    input_ids, mask, labels = t5_batch()
    mask[2] = False
    bias = t5_module.padding_bias(mask, dtype) + t5.encoder.position(14)
    assert bias.isfinite().all()
    assert bias.bfloat16().isfinite().all()  # as under autocast
    loss = t5.loss(input_ids, mask, labels)
    loss.backward()
    assert loss.isfinite()
    assert all(weight.grad.isfinite().all() for weight in t5.parameters())
    assert t5.generate(input_ids[2:3], mask[2:3], max_new_tokens=4).shape[1] <= 4


def test_gradient_checkpointing_changes_nothing_but_memory():
    def step(checkpointed):
        """Return the loss, all gradients, and how many numbers backward needs."""
        t5 = random_t5(T5_CONFIGS["v1.1"]).train()
        t5.checkpoint_blocks = checkpointed
        saved = []

        def pack(tensor):
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = t5.loss(*t5_batch())
        loss.backward()
        return loss, {name: weight.grad for name, weight in t5.named_parameters()}, sum(saved)

    loss, grads, saved = step(False)
    loss_checkpointed, grads_checkpointed, saved_checkpointed = step(True)
    assert saved_checkpointed < saved / 2
    assert torch.equal(loss, loss_checkpointed)
    torch.testing.assert_close(grads_checkpointed, grads)


# --------------------------------------------------------------------- number formats, construction


@both_t5
def test_float32_and_bfloat16_follow_float64(kind):
    t5 = random_t5(T5_CONFIGS[kind])
    input_ids, mask, labels = t5_batch()
    decoder_input_ids = labels.clamp(min=0)
    with torch.no_grad():
        single = teacher_forced(t5, input_ids, mask, decoder_input_ids)
        half_t5 = T5(t5.config).eval()
        half_t5.load_state_dict(t5.state_dict())
        half = teacher_forced(half_t5.bfloat16(), input_ids, mask, decoder_input_ids)
        exact = teacher_forced(t5.double(), input_ids, mask, decoder_input_ids)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(single.double(), exact, atol=1e-4, rtol=1e-4)
    assert (half - exact).square().mean().sqrt() < 0.05 * exact.std()


@both_t5
def test_initial_weights_are_a_function_of_the_seed_and_fit_the_task(kind):
    config = replace(T5_CONFIGS[kind], vocab_size=500, d_model=64, d_ff=128)
    t5, same, other = (init_weights(T5(config), seed) for seed in (7, 7, 8))
    for name, weight in t5.state_dict().items():
        assert torch.equal(weight, same.state_dict()[name])
        assert torch.equal(weight, other.state_dict()[name]) == ("norm" in name)
    q_std = t5.encoder.blocks[0].attention.q.weight.std().item()
    wo_std = t5.decoder.blocks[0].ffn.wo.weight.std().item()
    assert q_std == pytest.approx((64 * 8) ** -0.5, rel=0.1)
    assert wo_std == pytest.approx(128**-0.5, rel=0.1)
    input_ids, mask, labels = t5_batch()
    loss = t5.loss(input_ids, mask, labels) / (labels != IGNORED).sum()
    assert abs(loss.item() - math.log(500)) < 2


def test_builds_on_the_meta_device_and_holds_no_buffers():
    huge = replace(T5_CONFIGS["v1.1"], vocab_size=2**20, d_model=2**14, d_ff=2**18)
    with torch.device("meta"):
        t5 = T5(huge)
    assert all(weight.is_meta for weight in t5.parameters())
    assert not list(t5.buffers())


# ------------------------------------------------------------------------------------------- config


def test_config_survives_its_file_and_takes_the_defaults_of_transformers(tmp_path):
    path = tmp_path / "config.json"
    for config in T5_CONFIGS.values():
        path.write_text(json.dumps(config.to_hf()))
        assert checkpoint.read_config(tmp_path) == config
    least = dict(vocab_size=37, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=3)
    more = {"model_type": "t5", "task_specific_params": {}, "decoder_start_token_id": None}
    path.write_text(json.dumps(least | more))
    assert checkpoint.read_config(tmp_path) == T5Config(**least, num_decoder_layers=2)


@pytest.mark.parametrize(
    "values, scaled",
    [
        ({}, True),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),  # v1.1 by transformers 4
        (
            {"tie_word_embeddings": True, "scale_decoder_outputs": False},
            False,
        ),  # v1.1 by transformers 5
    ],
)
def test_scale_rule(values, scaled):
    sizes = T5_CONFIGS["v1.0"].to_hf()
    del sizes["scale_decoder_outputs"], sizes["tie_word_embeddings"]
    assert T5Config.from_hf(sizes | values).scale_decoder_outputs is scaled
    hf = pytest.importorskip("transformers").T5Config(**sizes | values)
    assert hf.scale_decoder_outputs is scaled


REFUSED = [
    ("model_type", "bart"),
    ("model_type", 5),
    ("model_type", ["t5"]),
    ("model_type", None),
    ("feed_forward_proj", "gated-silu"),
    ("feed_forward_proj", ["relu"]),
    ("d_model", 0),
    ("d_model", -32),
    ("d_model", 32.0),
    ("d_model", "32"),
    ("d_model", True),
    ("d_ff", None),
    ("num_decoder_layers", 0),
    ("num_heads", [3]),
    ("d_kv", {}),
    ("layer_norm_epsilon", "1e-6"),
    ("pad_token_id", -1),
    ("relative_attention_num_buckets", 2),
    ("relative_attention_max_distance", 4),
    ("eos_token_id", [1, 2]),
    ("vocab_size", 1),
    ("scale_decoder_outputs", 1),
]


@pytest.mark.parametrize("field, value", REFUSED)
def test_config_refuses(field, value, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(T5_CONFIGS["v1.0"].to_hf() | {field: value}))
    with pytest.raises(ValueError) as refusal:
        checkpoint.read_config(tmp_path)
    message = str(refusal.value)
    assert message.startswith(str(path))
    assert field in message.removeprefix(str(path))
    assert "\n" not in message


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000, '"\\ud800"', "\0"])
def test_config_refuses_what_is_not_an_object(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json"):
        checkpoint.read_config(tmp_path)
