"""Compare models, folders and tokenizers with those of transformers."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import checkpoint
import tokenizer
from checkpoint import load, save
from helpers import (
    T5_CONFIGS,
    TOKENIZER_TEXTS,
    both_t5,
    check_equal,
    random_t5,
    rows_of,
    sentences,
    source_of,
    t5_batch,
    teacher_forced,
    weights_of,
    write_pieces,
    write_words,
)
from llama import LlamaConfig
from model import IGNORED
from t5 import T5

transformers = pytest.importorskip("transformers")


# ----------------------------------------------------------------------------------------------- T5


def as_transformers(t5: T5, folder: Path):
    """Return the same weights in transformers' class, which reads what `save` has written."""
    save(t5, folder)
    hf = transformers.T5ForConditionalGeneration
    return hf.from_pretrained(folder, dtype=torch.float32)


@both_t5
def test_t5_logits_loss_and_gradients_equal_those_of_transformers(kind, tmp_path):
    t5 = random_t5(replace(T5_CONFIGS[kind], decoder_start_token_id=5))
    hf = as_transformers(t5, tmp_path)
    input_ids, mask, labels = t5_batch((60, 75, 30, 1), target=40)  # also beyond the span of 20
    labels[0, 2] = IGNORED  # read as padding by the decoder, with targets behind it
    labels[3] = IGNORED  # a row without any target
    output = hf(input_ids=input_ids, attention_mask=mask.long(), labels=labels)
    shifted = hf.prepare_decoder_input_ids_from_labels(labels)
    found = teacher_forced(t5, input_ids, mask, shifted)
    torch.testing.assert_close(found, output.logits, atol=1e-4, rtol=1e-4)
    assert output.logits.std() > 0.2  # logits that hardly differ would agree by themselves

    loss = t5.loss(input_ids, mask.long(), labels)
    expected = output.loss * (labels != IGNORED).sum()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    grads = {name: weight.grad for name, weight in hf.named_parameters()}
    for name, weight in t5.named_parameters():
        grad = grads[checkpoint.hf_name(t5, name)]
        assert torch.allclose(weight.grad, grad, atol=1e-3, rtol=1e-3), name


# ------------------------------------------------------------------------------------ folders of T5

# Old files hold this tensor, which nothing reads.
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def rewrite_as_bin(folder: Path, name: str, *, legacy: bool):
    """Store the folder as transformers 4 did: a torch file, with all names of a shared tensor."""
    weights = weights_of(folder)
    table = weights["shared.weight"]
    weights["encoder.embed_tokens.weight"] = table
    weights["decoder.embed_tokens.weight"] = table
    weights.setdefault("lm_head.weight", table)
    weights[UNUSED] = torch.zeros(8, 3)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / name, _use_new_zipfile_serialization=not legacy)


@both_t5
@pytest.mark.parametrize("stored", ["whole", "sharded", "bin", "legacy bin", "sharded bin"])
def test_t5_folders_of_transformers_load(kind, stored, tmp_path):
    t5 = random_t5(T5_CONFIGS[kind])
    size = "20KB" if stored == "sharded" else "1GB"
    as_transformers(t5, tmp_path / "ours").save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (stored == "sharded")
    whole = checkpoint.load(tmp_path).fingerprint
    if stored == "sharded bin":
        rewrite_as_bin(tmp_path, "shard.bin", legacy=False)
        shard_of = dict.fromkeys(checkpoint.read_torch(tmp_path / "shard.bin"), "shard.bin")
        index = json.dumps({"weight_map": shard_of})
        (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    elif "bin" in stored:
        rewrite_as_bin(tmp_path, "pytorch_model.bin", legacy="legacy" in stored)

    loaded = load(tmp_path)
    assert loaded.config == t5.config and not loaded.training
    check_equal(loaded.state_dict(), t5.state_dict())
    assert checkpoint.load(tmp_path).fingerprint == whole


# -------------------------------------------------------------------------- Llama and its relatives


def test_llama_loss_equals_that_of_transformers(llama_pair, llama_batch):
    model, own = llama_pair
    expected = 0
    for source, target in rows_of(llama_batch):
        logits = model(torch.cat((source, target), 1)).logits[0, source.shape[1] - 1 : -1]
        expected += F.cross_entropy(logits, target[0], reduction="sum")
    torch.testing.assert_close(own.loss(*llama_batch), expected, rtol=1e-4, atol=0)


def test_llama_greedy_tokens_equal_those_of_transformers(llama_pair, llama_batch):
    model, own = llama_pair
    got = own.generate(*llama_batch[:2], max_new_tokens=20)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    for tokens, (source, _) in zip(got.tolist(), rows_of(llama_batch), strict=True):
        whole = model.generate(source, attention_mask=torch.ones_like(source), **options)
        expected = whole[0, source.shape[1] :].tolist()
        assert tokens[: len(expected)] == expected


def test_llama_folders_go_to_transformers_and_back_bit_for_bit(llama_pair, tmp_path):
    model, own = llama_pair
    save(own, tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    check_equal(again.state_dict(), model.state_dict())
    assert again.config.rope_parameters == pytest.approx(model.config.rope_parameters)
    assert LlamaConfig.from_hf(again.config.to_dict()) == own.config
    back = load(tmp_path)
    assert back.config == own.config
    check_equal(back.state_dict(), own.state_dict())


# --------------------------------------------------------------------------------------- tokenizers


def test_t5_ids_and_texts_are_those_of_transformers(tokenizer, model_dir):
    pytest.importorskip("google.protobuf", reason="transformers reads spiece.model with protobuf")
    t5_tokenizer = transformers.T5Tokenizer.from_pretrained(model_dir)
    texts = sentences(300, seed=1)
    texts += ["", "  two  spaces\n\nand\tlines ", "\u4e16\u754c x", "\ufb01 \u00a0 x"]
    assert [tokenizer.encode(text) for text in texts] == t5_tokenizer(texts)["input_ids"]
    assert tokenizer.size == len(t5_tokenizer)
    sentinels = t5_tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_99>"])
    assert sentinels == [tokenizer.size - 1, tokenizer.size - 100]

    rng = random.Random(0)
    rows = [rng.choices(range(tokenizer.size), k=k % 30) for k in range(300)]
    text = "the river . the ? the ! the , we do n't , he 's I 'm they 've we 're the ' s"
    rows.append(np.array(tokenizer.encode(text)))
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": True}
    theirs = t5_tokenizer.batch_decode(rows, **options)
    assert [tokenizer.decode(row) for row in rows] == [text.strip() for text in theirs]


KINDS = {
    "no bos": {},
    "bos by template": {"post": "<s> $A"},
    "a template counts, not the setting": {"post": "<s> $A", "add_bos_token": False},
    "add_bos_token adds no BOS": {"add_bos_token": True},
    "the clean-up setting is ignored": {"clean_up_tokenization_spaces": True},
    "eos as an object": {"eos_token": {"content": "</s>", "__type": "AddedToken"}},
}


@pytest.mark.parametrize("kind", [*KINDS, "pieces of Llama 2"])
def test_ids_and_texts_are_those_of_transformers(tmp_path, kind):
    if kind in KINDS:
        folder = write_words(tmp_path / "words", **KINDS[kind])
    else:
        folder = write_pieces(tmp_path / "pieces")
    own, theirs = tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in TOKENIZER_TEXTS:
        expected = theirs(text)["input_ids"]
        assert own.encode(text) == [*expected, *own.eos_ids]
        assert source_of(own, text + " ") == expected
    rows = [list(range(i, i + 9)) for i in range(0, own.size - 9, 9)]
    rows += [theirs(text)["input_ids"] for text in TOKENIZER_TEXTS]
    decoded = theirs.batch_decode(rows, skip_special_tokens=True)
    assert [own.decode(row) for row in rows] == [text.strip() for text in decoded]
