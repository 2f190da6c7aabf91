"""The generation loop of model.py, and the T5 of t5.py against what must hold for any T5. Random
weights of a tiny size, on the CPU.

parity/test_transformers.py compares loss and gradients with those of transformers, and
parity/test_serve.py compares answers.
"""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import checkpoint
from helpers import (
    T5_CONFIGS,
    both_t5,
    random_batch,
    random_t5,
    refusal,
    small_model,
    t5_batch,
    t5_values,
    teacher_forced,
)
from model import IGNORED, Backbone, aligned
from t5 import padding_bias

# --------------------------------------------------------------------------------------- generation


class Countdown(Backbone):
    """Count down from the token of each row. It is its own state: what each row read."""

    def __init__(self, *eos_ids, pad_token_id):
        super().__init__(SimpleNamespace(eos_ids=eos_ids, pad_token_id=pad_token_id))

    def start(self, input_ids, attention_mask, max_new_tokens):
        self.read = input_ids
        return input_ids[:, 0], self

    def step(self, newest, state):
        self.read = torch.cat((self.read, newest[:, None]), 1)
        return F.one_hot(newest - 1, 20).float()

    def keep(self, rows):
        self.read = self.read[rows]


@pytest.mark.parametrize("pad", [0, 3])  # padding may be an EOS
def test_generate_drops_a_row_at_any_eos(pad):
    backbone = Countdown(3, 7, pad_token_id=pad)
    input_ids = torch.tensor([[6], [12], [5]])
    kept = []
    tokens = backbone.generate(input_ids, None, on_keep=lambda rows: kept.append(rows.tolist()))
    expected = [[5, 4, 3, pad, pad], [11, 10, 9, 8, 7], [4, 3, pad, pad, pad]]
    assert tokens.tolist() == expected
    assert kept == [[0, 1], [1]]  # it is not called when no row stays
    assert backbone.read.tolist() == [[12, 12, 11, 10, 9, 8]]


@both_t5
def test_cached_logits_equal_the_teacher_forced_ones_also_when_rows_are_dropped(kind):
    t5 = random_t5(replace(T5_CONFIGS[kind], decoder_start_token_id=5)).double()
    input_ids, mask, labels = t5_batch()
    mask[0, 3] = False
    targets = F.pad(labels.clamp(min=2), (1, 0), value=5)  # behind the start token
    expected = teacher_forced(t5, input_ids, mask, targets)
    newest, state = t5.start(input_ids, mask, 8)
    assert torch.equal(newest, targets[:, 0])
    rows = torch.arange(4)
    for t in range(8):
        logits = t5.step(targets[rows, t], state)
        torch.testing.assert_close(logits, expected[rows, t], atol=1e-9, rtol=1e-9)
        if t == 3:
            rows = torch.tensor([0, 2, 3])
            state.keep(rows)


# ---------------------------------------------------------------------------- loss, masks, training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_without_any_real_token_gives_no_nan(dtype):
    t5 = random_t5(T5_CONFIGS["v1.0"]).to(dtype)
    input_ids, mask, labels = t5_batch()
    mask[2] = False
    bias = padding_bias(mask, dtype) + t5.encoder.position(14)
    assert bias.bfloat16().isfinite().all()  # as under autocast
    loss = t5.loss(input_ids, mask, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(weight.grad.isfinite().all() for weight in t5.parameters())
    assert t5.loss(input_ids, mask, torch.full_like(labels, IGNORED)) == 0


def test_rows_of_a_bias_are_aligned_only_on_a_gpu():
    """Rows are padded even if L is a multiple of 8, so that one graph serves every L.

    test_device.py tests other L.
    """
    bias = torch.zeros(2, 4, 8, 8)
    assert aligned(bias) is bias
    assert aligned(bias.to("meta")).stride(2) == 16


@pytest.mark.parametrize("name", ["v1.1", "llama3"])
def test_gradient_checkpointing_changes_nothing_but_memory(name):
    def step(checkpointed):
        """Return all gradients, and how many numbers backward needs."""
        base = small_model(name).train()
        base.checkpoint_blocks = checkpointed
        saved = []

        def pack(tensor):
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = base.loss(*random_batch(10, 37))
        loss.backward()
        return {name: weight.grad for name, weight in base.named_parameters()}, sum(saved)

    grads, saved = step(False)
    grads_checkpointed, saved_checkpointed = step(True)
    assert saved_checkpointed < saved / 2
    torch.testing.assert_close(grads_checkpointed, grads)


# ------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    "tied",
    [
        {},
        {"tie_word_embeddings": False},  # v1.1 by transformers 4
        {"tie_word_embeddings": True, "scale_decoder_outputs": False},  # v1.1 by transformers 5
    ],
)
def test_a_config_has_the_defaults_of_transformers(tied, tmp_path):
    values = dict(vocab_size=37, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=3)
    values |= {"model_type": "t5", "decoder_start_token_id": None}
    values |= tied
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = checkpoint.read_config(tmp_path)
    expected = pytest.importorskip("transformers").T5Config(**values)
    assert config.tied_head == tied.get("tie_word_embeddings", True)
    assert config.decoder_start_token_id == 0
    for name in ("scale_decoder_outputs", "num_decoder_layers", "feed_forward_proj"):
        assert getattr(config, name) == getattr(expected, name)


REFUSED = [
    ("model_type", ["t5"]),
    ("model_type", "\ud800"),
    ("feed_forward_proj", "gated-silu"),
    ("d_model", 0),
    ("d_model", 32.0),
    ("d_model", 10**30),
    ("layer_norm_epsilon", math.nan),
    ("pad_token_id", -1),
    ("relative_attention_num_buckets", 2),
    ("relative_attention_max_distance", 4),
    ("eos_token_id", 37),
    ("scale_decoder_outputs", 1),
]


@pytest.mark.parametrize("field, value", REFUSED)
def test_a_config_with_an_impossible_field_is_refused_by_its_name(field, value, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(t5_values(T5_CONFIGS["v1.0"]) | {field: value}))
    with refusal(f"^{path}: .*{field}.*$") as refused:
        checkpoint.read_config(tmp_path)
    assert str(refused.value).isprintable()
