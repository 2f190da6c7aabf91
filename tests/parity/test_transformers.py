"""Compare models, folders and tokenizers with those of transformers."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import checkpoint
import data
import t5 as t5_module
import tokenizer
from checkpoint import fingerprint, load, mapped, read_folder, read_safetensors, save
from helpers import (
    PT,
    T5_CONFIGS,
    TOKENIZER_TEXTS,
    both_t5,
    check_equal,
    random_t5,
    rows_of,
    sentences,
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


def as_transformers(t5: T5):
    """Return the same weights in transformers' class."""
    values = t5.config.to_hf()
    hf = transformers.T5ForConditionalGeneration(transformers.T5Config(**values)).eval()
    weights = {}
    for name, weight in t5.state_dict().items():
        weights[checkpoint.hf_name(t5, name)] = weight.clone()
    if not t5.config.tied_head:  # transformers 5 ties it at first
        hf.lm_head.weight = torch.nn.Parameter(weights["lm_head.weight"])
    missing, unexpected = hf.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {*T5.tables, "lm_head.weight"}
    return hf


@both_t5
def test_t5_logits_equal_those_of_transformers(kind):
    t5 = random_t5(T5_CONFIGS[kind])
    input_ids, mask, labels = t5_batch((60, 75, 30, 1), target=40)  # also beyond the span of 20
    decoder_input_ids = labels.clamp(min=0)
    output = as_transformers(t5)(
        input_ids=input_ids, attention_mask=mask.long(), decoder_input_ids=decoder_input_ids
    )
    expected = output.logits
    found = teacher_forced(t5, input_ids, mask, decoder_input_ids)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.2  # logits that hardly differ would agree by themselves


@both_t5
def test_every_gradient_of_t5_equals_that_of_transformers(kind):
    t5 = random_t5(T5_CONFIGS[kind])
    hf = as_transformers(t5)
    input_ids, mask, labels = t5_batch()
    labels[0, 2] = IGNORED  # read as padding by the decoder, with targets behind it
    loss = t5.loss(input_ids, mask, labels)
    loss.backward()
    count = (labels != IGNORED).sum()
    expected = hf(input_ids=input_ids, attention_mask=mask.long(), labels=labels).loss * count
    expected.backward()
    torch.testing.assert_close(loss, expected)
    grads = {name: weight.grad for name, weight in hf.named_parameters()}
    for name, weight in t5.named_parameters():
        grad = grads[checkpoint.hf_name(t5, name)]
        assert torch.allclose(weight.grad, grad, atol=1e-3, rtol=1e-3), name


@both_t5
def test_t5_greedy_tokens_equal_those_of_transformers(kind):
    t5 = random_t5(T5_CONFIGS[kind])
    input_ids, mask, _ = t5_batch((9, 14, 5, 1, 12, 7, 3, 14))
    hf = as_transformers(t5)
    # No cache: transformers 5 sizes it by the encoder's depth and fails if the decoder is deeper.
    options = dict(max_new_tokens=20, do_sample=False, num_beams=1, use_cache=False)
    expected = hf.generate(input_ids=input_ids, attention_mask=mask.long(), **options)
    tokens = t5.generate(input_ids, mask, max_new_tokens=20)
    assert torch.equal(tokens, expected[:, 1:])  # transformers keeps the start token
    assert len(tokens.unique()) > 5


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (8, 20), (4, 3)])
def test_t5_buckets_equal_those_of_transformers(bidirectional, buckets, max_distance):
    attention = pytest.importorskip("transformers.models.t5.modeling_t5").T5Attention
    distance = torch.arange(-3000, 3001)
    options = dict(bidirectional=bidirectional, max_distance=max_distance)
    expected = attention._relative_position_bucket(distance, num_buckets=buckets, **options)
    found = t5_module.relative_buckets(distance, buckets=buckets, **options)
    assert torch.equal(found, expected)


# ------------------------------------------------------------------------------------ folders of T5

# Old files hold this tensor, which nothing reads.
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def check_logits(t5, hf):
    input_ids, mask, labels = t5_batch()
    decoder_input_ids = labels.clamp(min=0)
    theirs = hf(
        input_ids=input_ids, attention_mask=mask.long(), decoder_input_ids=decoder_input_ids
    )
    ours = teacher_forced(t5, input_ids, mask, decoder_input_ids)
    torch.testing.assert_close(ours, theirs.logits, atol=1e-4, rtol=1e-4)


def rewrite_as_bin(folder: Path, *, legacy: bool = False, **more: torch.Tensor):
    """Store the folder as transformers 4 did: one torch file, with all names of a shared tensor."""
    weights = weights_of(folder)
    table = weights["shared.weight"]
    weights["encoder.embed_tokens.weight"] = table
    weights["decoder.embed_tokens.weight"] = table
    weights.setdefault("lm_head.weight", table)
    (folder / "model.safetensors").unlink()
    torch.save(
        weights | more,
        folder / "pytorch_model.bin",
        _use_new_zipfile_serialization=not legacy,
    )


def split_bin(folder: Path):
    """Split pytorch_model.bin into two shards with an index."""
    weights = read_folder(folder)
    shards = {"pytorch_model-0.bin": {}, "pytorch_model-1.bin": {}}
    weight_map = {}
    for number, name in enumerate(weights):
        shard = f"pytorch_model-{number % 2}.bin"
        shards[shard][name] = weights[name]
        weight_map[name] = shard
    for shard, tensors in shards.items():
        torch.save(tensors, folder / shard)
    index = json.dumps({"weight_map": weight_map})
    (folder / "pytorch_model.bin.index.json").write_text(index)
    (folder / "pytorch_model.bin").unlink()


@both_t5
@pytest.mark.parametrize("stored", ["whole", "sharded", "bin", "legacy bin", "sharded bin"])
def test_t5_folders_of_transformers_load_and_agree(kind, stored, tmp_path):
    t5 = random_t5(T5_CONFIGS[kind])
    hf = as_transformers(t5)
    size = "20KB" if stored == "sharded" else "1GB"
    hf.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (stored == "sharded")
    whole = fingerprint(tmp_path)
    if "bin" in stored:
        rewrite_as_bin(tmp_path, legacy="legacy" in stored, **{UNUSED: torch.zeros(8, 3)})
    if stored == "sharded bin":
        split_bin(tmp_path)

    loaded = load(tmp_path)
    assert loaded.config == t5.config and not loaded.training
    check_equal(loaded.state_dict(), t5.state_dict())
    assert fingerprint(tmp_path) == whole
    check_logits(loaded, hf)


@both_t5
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_transformers_reads_what_save_writes(kind, dtype, tmp_path):
    t5 = random_t5(T5_CONFIGS[kind]).to(dtype)
    save(t5, tmp_path)
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["config.json", "model.safetensors"]
    _, metadata = read_safetensors(tmp_path / "model.safetensors")
    assert metadata == PT  # transformers 4 asks for it
    check_equal(mapped(tmp_path).state_dict(), t5.state_dict())
    hf = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    check_logits(load(tmp_path, dtype=torch.float32), hf.eval())


# -------------------------------------------------------------------------- Llama and its relatives


def test_llama_loss_equals_that_of_transformers(llama_pair, llama_batch):
    model, own = llama_pair
    for row, (source, target) in enumerate(rows_of(llama_batch)):
        logits = model(torch.cat((source, target), 1)).logits[0, source.shape[1] - 1 : -1]
        expected = F.cross_entropy(logits, target[0], reduction="sum")
        padded = own.loss(*(x[row : row + 1] for x in llama_batch))
        torch.testing.assert_close(padded, expected, rtol=1e-4, atol=0)


def test_llama_greedy_tokens_equal_those_of_transformers(llama_pair, llama_batch):
    model, own = llama_pair
    got = own.generate(*llama_batch[:2], max_new_tokens=20)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    for tokens, (source, _) in zip(got.tolist(), rows_of(llama_batch), strict=True):
        whole = model.generate(source, attention_mask=torch.ones_like(source), **options)
        expected = whole[0, source.shape[1] :].tolist()
        assert tokens[: len(expected)] == expected
        assert set(tokens[len(expected) :]) <= {own.config.pad_token_id}


def test_llama_folders_go_to_transformers_and_back_bit_for_bit(llama_pair, tmp_path):
    model, own = llama_pair
    checkpoint.save(own, tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    back = checkpoint.load(tmp_path)
    assert back.config == own.config
    for ours, again in zip(own.parameters(), back.parameters(), strict=True):
        assert torch.equal(ours, again)


def test_llama_configs_survive_the_way_out_and_back(llama_pair):
    model, own = llama_pair
    values = own.config.to_hf()
    assert LlamaConfig.from_hf(values) == own.config
    assert LlamaConfig.from_hf(json.loads(json.dumps(values))) == own.config
    again = transformers.AutoConfig.for_model(**values)
    assert LlamaConfig.from_hf(again.to_dict()) == own.config
    assert again.rope_parameters == pytest.approx(model.config.rope_parameters)


@pytest.mark.parametrize(
    "count",
    [pytest.param(10, marks=pytest.mark.slow), pytest.param(50, marks=pytest.mark.soak)],
)
def test_smollm2_answers_real_prompts_as_in_transformers(count, smollm2_dir, sni_dir):
    own, words = checkpoint.load(smollm2_dir, dtype=torch.float32), tokenizer.load(smollm2_dir)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_dir, dtype=torch.float32
    ).eval()
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_dir)
    prompts = []
    for name in data.read_splits(sni_dir)["test"][:count]:
        task = data.read_task(sni_dir / "tasks" / f"{name}.json")
        instance = task["instances"][0]
        prompts.append(data.render_prompt(task, instance, words, max_source_length=400))
    sources = [words.source(prompt) for prompt in prompts]
    assert sources == [theirs(prompt.removesuffix(" "))["input_ids"] for prompt in prompts]
    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in sources], batch_first=True)
    lengths = torch.tensor([len(ids) for ids in sources])
    mask = torch.arange(rows.shape[1]) < lengths[:, None]
    for start in range(0, count, 5):
        part = slice(start, start + 5)
        got = own.generate(rows[part], mask[part], max_new_tokens=20).tolist()
        for ids, tokens in zip(sources[part], got, strict=True):
            whole = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0]
            assert tokens[: len(whole) - len(ids)] == whole[len(ids) :].tolist()


# --------------------------------------------------------------------------------------- tokenizers


@pytest.fixture(scope="session")
def t5_tokenizer(model_dir):
    pytest.importorskip("google.protobuf", reason="transformers reads spiece.model with protobuf")
    return transformers.T5Tokenizer.from_pretrained(model_dir)


def test_encode_equals_transformers(tokenizer, t5_tokenizer):
    texts = [
        *sentences(300, seed=1),
        "",
        "  two  spaces\n\nand\tlines ",
        "\u4e16\u754c x",
        "\ufb01 \u00a0 x",
    ]
    assert [tokenizer.encode(text) for text in texts] == t5_tokenizer(texts)["input_ids"]
    assert tokenizer.size == len(t5_tokenizer)


def test_decode_equals_transformers(tokenizer, t5_tokenizer):
    rng = random.Random(0)
    rows = [[rng.randrange(tokenizer.size) for _ in range(rng.randrange(30))] for _ in range(300)]
    text = "the river . the ? the ! the , we do n't , he 's I 'm they 've we 're the ' s"
    rows.append(tokenizer.encode(text))
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": True}
    theirs = t5_tokenizer.batch_decode(rows, **options)
    assert [tokenizer.decode(row) for row in rows] == [text.strip() for text in theirs]
    assert tokenizer.decode(np.array(rows[-1], np.int32)) == theirs[-1].strip()


def test_sentinels_are_the_last_hundred_ids(tokenizer, t5_tokenizer):
    names = [f"<extra_id_{k}>" for k in range(100)]
    last = tokenizer.size - 1
    assert [last - k for k in range(100)] == t5_tokenizer.convert_tokens_to_ids(names)


KINDS = {
    "no bos": {},
    "bos by template": {"post": "<s> $A"},
    "a template counts, not the setting": {"post": "<s> $A", "add_bos_token": False},
    "nor does it add one": {"add_bos_token": True},
    "not cleaned up": {"clean_up_tokenization_spaces": True},
    "eos as an object": {"eos_token": {"content": "</s>", "__type": "AddedToken"}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_byte_level_ids_and_texts_are_those_of_transformers(tmp_path, corpus, kind):
    folder = write_words(tmp_path / "words", corpus, **KINDS[kind])
    own, theirs = tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in TOKENIZER_TEXTS:
        expected = theirs(text)["input_ids"]
        assert own.encode(text) == [*expected, 1]
        assert own.source(text + " ") == expected
    rows = [list(range(i, i + 9)) for i in range(0, own.size - 9, 9)]
    rows += [theirs(text)["input_ids"] for text in TOKENIZER_TEXTS]
    decoded = theirs.batch_decode(rows, skip_special_tokens=True)
    assert [own.decode(row) for row in rows] == [text.strip() for text in decoded]


def test_llama_pieces_are_those_of_transformers(tmp_path, corpus):
    folder = write_pieces(tmp_path / "pieces", corpus)
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    own, converted = tokenizer.load(folder), transformers.LlamaTokenizer.from_pretrained(folder)
    for text in TOKENIZER_TEXTS:
        if text.startswith(" "):  # transformers 5 loses a space there, which SentencePiece keeps
            continue
        expected = converted(text)["input_ids"]
        assert own.encode(text) == [*expected, 2]
        assert own.decode(expected) == converted.decode(expected, skip_special_tokens=True).strip()
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    without = tokenizer.load(folder)
    assert without.source("a") == own.source("a")[1:] and without.fingerprint != own.fingerprint
    (folder / "tokenizer_config.json").unlink()
    assert tokenizer.load(folder).source("a") == own.source("a")
