"""Every reader against input that nobody meant, and the batcher and the metric against any input. What comes
out is a right answer or a ValueError of one line that names the file, never another exception. 150 inputs
each; by hand 10,000 each, at most 5 s an input: pytest tests/test_fuzz.py --hypothesis-profile=long"""

import contextlib
import dataclasses
import io
import json
import math
import os
import resource
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file
from test_checkpoint import entry, safetensors_bytes
from test_data import Bytes, example, task_json
from test_tokenizer import write_pieces

import checkpoint
import data
import metrics
import runtime
import tokenizer
import train
from llama import LlamaConfig
from orchmoe import OrchMoEConfig
from t5 import T5Config

pytest.importorskip("hypothesis")
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402


@pytest.fixture(autouse=True)
def little_memory():
    """Each property makes the process grow by less than 500 MB, with what hypothesis itself remembers."""
    with contextlib.suppress(OSError):  # Linux: the peak of a test before would hide this one's
        Path("/proc/self/clear_refs").write_text("5")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
    print(f"\npeak memory grew by {grown:.0f} MB")
    assert grown < 500


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with torch.device("meta"):  # what torch imports for the first tensor there is no input's time or memory
        torch.nn.Linear(2, 2)
    return tmp_path_factory.mktemp("fuzz")


texts = st.text(max_size=40) | st.sampled_from(["", "\ud800", "\0", "../x", "NaN", "\u2028", "a" * 3000])
numbers = st.integers() | st.sampled_from([2**31, 2**63, -1, 10**400]) | st.floats()
leaves = st.none() | st.booleans() | numbers | texts
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4)
                      | st.dictionaries(texts, inner, max_size=4), max_leaves=8)  # fmt: skip


@st.composite
def damaged(draw, whole: bytes):
    """`whole` with some bytes changed, some cut out or doubled, the end cut off, or something added."""
    raw = bytearray(whole)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(0, len(raw) - 1)))
        kind, size = draw(st.sampled_from(["set", "cut", "double", "end", "add"])), draw(st.integers(1, 40))
        if kind == "set" and raw:
            raw[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del raw[at:at + size]
        elif kind == "double":
            raw[at:at] = raw[at:at + size]
        elif kind == "end":
            del raw[at:]
        else:
            raw[at:at] = draw(st.binary(max_size=20))
    return bytes(raw)


def changed(whole: dict):
    """`whole` as JSON, with some of its fields, or fields within them, replaced by anything, or gone."""
    @st.composite
    def draw_one(draw):
        result = json.loads(json.dumps(whole))
        for _ in range(draw(st.integers(0, 3))):
            place = result
            while True:
                keys = sorted(place) if isinstance(place, dict) else range(len(place))
                key = draw(st.sampled_from(list(keys))) if keys else None
                inner = place[key] if keys else None
                if not (isinstance(inner, dict | list) and inner and draw(st.booleans())):
                    break
                place = inner
            if keys and draw(st.integers(0, 4)):
                place[key] = draw(values)
            elif keys:
                del place[key]
        return json.dumps(result).encode()

    return draw_one()


def read(reader, path, raw: bytes, whole: bytes | None = None):
    """What the reader makes of these bytes; None where it refuses them as it should, but not
    the `whole` ones."""
    path.write_bytes(raw)
    try:
        return reader(path)
    except ValueError as error:
        assert raw != whole, f"undamaged, and refused: {error}"
        named = str(path) in str(error) or str(path.with_name("tokenizer_config.json")) in str(error)
        assert named and "\n" not in str(error).strip() and len(str(error)) < 1000
        return None


# --------------------------------------------------------------------------------------------------- readers

TASK = task_json(3, URL=[])


@given(damaged(json.dumps(TASK).encode()) | changed(TASK) | st.binary(max_size=60))
def test_tasks(folder, raw):
    task = read(data.read_task, folder / "task1_a.json", raw, json.dumps(TASK).encode())
    if task is not None:
        assert task["instances"] and all(row["output"] for row in task["instances"])
        for row in task["instances"]:
            json.dumps(data.render_prompt(task, row, Bytes()), ensure_ascii=False).encode()


@given(st.lists(texts | st.sampled_from(["task1_a", "task2_b", "task9_t"]), max_size=5).map("\n".join),
       st.binary(max_size=20))  # fmt: skip
def test_split_lists(folder, lines, junk):
    for name in ("splits/default", "tasks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name in ("task1_a", "task9_t"):
        (folder / f"tasks/{name}.json").write_text("{}")
    lists = folder / "splits/default"
    (lists / "test_tasks.txt").write_text("task9_t")
    (lists / "train_tasks.txt").write_bytes(lines.encode(errors="surrogatepass") + junk)
    try:
        found = data.read_splits(folder)
    except ValueError as error:
        assert str(lists) in str(error) and "\n" not in str(error)
    else:
        assert found["test"] == ["task9_t"] and found["train"] in ([], ["task1_a"])


def small_safetensors() -> bytes:
    header = {"a": entry("F32", [2], [0, 8]), "b": entry("I8", [2, 2], [8, 12]), "__metadata__": {"x": "y"}}
    return safetensors_bytes(header, bytes(range(12)))


BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I8": 1, "BOOL": 1, "F8_E4M3": 1}
sizes = st.integers(-2, 9) | st.sampled_from([2**31, 2**62, 2**63, 2**64, 10**30])
entries = st.fixed_dictionaries({
    "dtype": st.sampled_from([*BYTES, "F9"]) | leaves,
    "shape": st.lists(sizes, max_size=4) | values,
    "data_offsets": st.lists(sizes, min_size=2, max_size=2) | values})  # fmt: skip
consistent = st.builds(  # what fits together, if not with the file
    lambda dtype, shape: entry(dtype, shape, [0, math.prod(shape) * BYTES[dtype]]),
    st.sampled_from(sorted(BYTES)), st.lists(sizes, max_size=4))
headers = st.dictionaries(texts, consistent | entries | values, max_size=3)


@given(damaged(small_safetensors()) | st.builds(safetensors_bytes, headers, st.binary(max_size=16)))
def test_safetensors(folder, raw):
    found = read(checkpoint.read_safetensors, folder / "a.safetensors", raw, small_safetensors())
    if found is not None:
        tensors, metadata = found
        assert sum(t.nbytes for t in tensors.values()) <= len(raw)
        assert all(t.clone().shape == t.shape for t in tensors.values())  # every value can be read
        assert all(isinstance(value, str) for value in metadata.values())


ADAPTER = {"method": "lora", "config": {"a": [1]}, "tasks": ["a", "b"], "base": "0" * 16}


@given(changed(ADAPTER) | damaged(json.dumps(ADAPTER).encode()))
def test_adapters(folder, info):
    header = {"__metadata__": {"adapter": info.decode(errors="replace")}, "a": entry("F32", [2], [0, 8])}
    found = read(checkpoint.load_adapter, folder / "a.safetensors", safetensors_bytes(header, bytes(8)))
    if found is not None:
        assert isinstance(found[1]["config"], dict) and isinstance(found[1]["tasks"], list)


def saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


STATE = saved({"step": 1, "best": 0.5, "weights": {"a": torch.ones(3)}, "optimizer": {"state": {}}})


LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "base", "bias": "none",
        "target_modules": ["q"], **dict.fromkeys(checkpoint.REFUSED)}  # fmt: skip
FACTORS = [f"base_model.model.{name}.lora_{side}{end}" for name in ("q", "a.q") for side in "AB"
           for end in (".weight", ".bias", "")]  # fmt: skip


@given(
    changed(LORA) | damaged(json.dumps(LORA).encode()),
    st.dictionaries(st.sampled_from(FACTORS) | texts.filter(str.isprintable),
                    st.tuples(st.lists(st.integers(0, 3), max_size=3),
                              st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
                              st.sampled_from([1, math.nan]))))  # fmt: skip
def test_peft_folders(folder, raw, tensors):
    """A LoRA of finite floats, its factors in pairs of one rank, or one line that names the folder."""
    place = folder / "lora"
    place.mkdir(exist_ok=True)
    (place / "adapter_config.json").write_bytes(raw)
    made = {name: torch.ones(shape, dtype=dtype) * (value if dtype.is_floating_point else 1)
            for name, (shape, dtype, value) in tensors.items()} or {FACTORS[0]: torch.ones(2, 3),
                                                                    FACTORS[3]: torch.ones(3, 2)}
    save_file(made, place / "adapter_model.safetensors")
    try:
        lora = checkpoint.load_peft(place)
    except ValueError as error:
        assert str(place) in str(error) and "\n" not in str(error).strip() and len(str(error)) < 1000
        return
    for name, (A, B) in lora.factors.items():
        assert {f"base_model.model.{name}.lora_{side}.weight" for side in "AB"} <= made.keys()
        assert A.shape[0] == B.shape[1] == lora.rank and A.isfinite().all() and B.isfinite().all()
    assert 2 * len(lora.factors) == len(made) > 0 and isinstance(lora.base, str)


@given(damaged(STATE))
def test_training_states(folder, raw):
    anything = mock.MagicMock(), mock.MagicMock(state={})  # adapters and optimizer that take it
    progress = read(lambda path: train.load_progress(path, *anything), folder / "checkpoint.pt", raw, STATE)
    assert progress is None or list(map(type, progress)) == [int, float]


T5_JSON = json.loads((ROOT / "tiny/config.json").read_text())
LLAMA_JSON = {"model_type": "llama", "vocab_size": 1024, "hidden_size": 160, "intermediate_size": 400,
              "num_hidden_layers": 2, "num_attention_heads": 5, "max_position_embeddings": 64,
              "eos_token_id": [1, 5],
              "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                               "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}  # fmt: skip


MISTRAL_JSON = {**LLAMA_JSON, "model_type": "mistral", "sliding_window": 32}
FIELDS = {field.name for family in (T5Config, LlamaConfig) for field in dataclasses.fields(family)}
FIELDS |= {*LlamaConfig.only, "eos_token_id", "rope_parameters", "sliding_window", "tie_word_embeddings"}


def check_config(folder, raw: bytes, said: set[str]):
    """What these bytes describe is refused, in words of which one is in `said`, or compared with the weights
    before it is built."""
    model = folder / "model"
    if not model.exists():
        model.mkdir()
        (model / "model.safetensors").symlink_to(ROOT / "tiny/model.safetensors")
    path = model / "config.json"
    path.write_bytes(raw)
    try:
        config = checkpoint.config(model)
    except ValueError as error:
        message = str(error)
        assert str(path) in message and "\n" not in message and len(message) < 1000
        assert any(name in message.removeprefix(str(path)) for name in said), message
        return
    unscaled = getattr(config, "factor", 0) == 1  # then the other numbers of Llama 3's scaling are lost
    assert type(config).from_hf(config.to_hf()) == config or unscaled
    try:
        checkpoint.mapped(model)
    except ValueError as error:
        assert str(model) in str(error) and "\n" not in str(error) and len(str(error)) < 1000


@given(changed(T5_JSON))
def test_configs_of_t5(folder, raw):
    check_config(folder, raw, FIELDS)


@given(changed(LLAMA_JSON) | changed(MISTRAL_JSON))
def test_configs_of_llama(folder, raw):
    check_config(folder, raw, FIELDS)


@given(damaged(json.dumps(T5_JSON).encode()) | damaged(json.dumps(LLAMA_JSON).encode()))
def test_damaged_configs(folder, raw):
    check_config(folder, raw, FIELDS | {"not readable as JSON"})


ADAPTER_JSON = json.loads(json.dumps(vars(OrchMoEConfig())))


@given(damaged(json.dumps(ADAPTER_JSON).encode()) | changed(ADAPTER_JSON))
def test_adapter_configs(folder, raw):
    def reader(path):
        return runtime.from_json(OrchMoEConfig, runtime.read_json(path), path)

    config = read(reader, folder / "adapter.json", raw)
    assert config is None or isinstance(config, OrchMoEConfig)


SPIECE = (ROOT / "tiny/spiece.model").read_bytes()


places = st.integers(0, 400) | st.integers(0, len(SPIECE) - 1)


@given(st.lists(st.tuples(places, st.integers(0, 255)), max_size=6),
       st.just(len(SPIECE)) | st.integers(0, len(SPIECE)))  # fmt: skip
def test_tokenizers(folder, edits, end):
    raw = bytearray(SPIECE)
    for at, value in edits:
        raw[at] = value
    found = read(tokenizer.load, folder / "spiece.model", bytes(raw[:end]))
    if found is not None:
        assert found.encode("a small test")[-1] == 1 and isinstance(found.decode(range(9)), str)


def small_words() -> dict:
    """A tokenizer.json of 6 pieces."""
    vocab = {"a": 0, "b": 1, "ab": 2, "\u0120": 3}
    return {"version": "1.0", "added_tokens": [
                {"id": i, "content": name, "special": True, "single_word": False, "lstrip": False,
                 "rstrip": False, "normalized": False} for i, name in ((4, "<s>"), (5, "</s>"))],
            "truncation": None, "padding": None, "normalizer": None,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                              "use_regex": True},
            "post_processor": {"type": "TemplateProcessing", "pair": [],
                               "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                                          {"Sequence": {"id": "A", "type_id": 0}}],
                               "special_tokens": {"<s>": {"id": "<s>", "ids": [4], "tokens": ["<s>"]}}},
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                        "use_regex": True},
            "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]], "unk_token": None,
                      "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}}  # fmt: skip


WORDS_JSON = small_words()
SETTINGS_JSON = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True}


@given(damaged(json.dumps(WORDS_JSON).encode()) | changed(WORDS_JSON) | changed(WORDS_JSON["model"]).map(
           lambda raw: json.dumps(WORDS_JSON | {"model": json.loads(raw)}).encode()),
       changed(SETTINGS_JSON) | st.just(json.dumps(SETTINGS_JSON).encode()))  # fmt: skip
def test_word_tokenizers(folder, raw, settings):
    place = folder / "words"
    place.mkdir(exist_ok=True)
    (place / "tokenizer_config.json").write_bytes(settings)
    read(use_words, place / "tokenizer.json", raw)


def use_words(path):
    found = tokenizer.load(path)
    ids = found.encode("ab ba </s>")
    assert ids[-1] == found.eos_ids[0] and all(type(i) is int for i in ids)
    assert type(found.decode(range(-1, found.size + 1))) is str


@pytest.fixture(scope="module")
def llama_pieces(tmp_path_factory) -> bytes:
    task = next((ROOT / "sni/tasks").glob("*.json")).read_text(encoding="utf-8")
    path = write_pieces(tmp_path_factory.mktemp("pieces"), task.split("\n")) / "tokenizer.model"
    return path.read_bytes()


@given(st.data())
def test_llama_pieces(folder, llama_pieces, draw):
    place = folder / "pieces"
    place.mkdir(exist_ok=True)
    habit = {"add_bos_token": True}
    settings = changed(habit) | damaged(json.dumps(habit).encode())
    (place / "tokenizer_config.json").write_bytes(draw.draw(settings))
    found = read(tokenizer.load, place / "tokenizer.model", draw.draw(damaged(llama_pieces)))
    if found is not None:
        ids = found.encode("the dog </s>")
        assert ids[-1] == found.eos_ids[0] and all(type(i) is int and 0 <= i < found.size for i in ids)
        assert type(found.decode(range(-1, found.size + 1))) is str


@pytest.fixture(scope="module")
def cache_file(folder):
    """The only file of a token cache, its content, and a call that reads it or makes it anew."""
    def content() -> dict:
        made = {"a": torch.arange(999), "b": ["\u00fc"]}
        return data.cached(["x"], [], lambda: made)

    with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(folder / "cache")):
        content()
        path, = (folder / "cache/orchmoe").iterdir()
        yield path, path.read_bytes(), content


@given(st.data())
def test_token_caches(cache_file, draw):
    path, whole, content = cache_file
    raw = draw.draw(damaged(whole))
    path.unlink(missing_ok=True)  # what is mapped lives on
    path.write_bytes(raw)
    found = content()
    assert found["a"].tolist() == list(range(999)) and found["b"] == ["\u00fc"]


@given(st.lists(changed({"step": 3, "loss": 0.5}) | st.binary(max_size=30), max_size=6), st.integers(-1, 5))
def test_logs(folder, lines, last):
    path = folder / "metrics.jsonl"
    path.write_bytes(b"\n".join(lines))
    runtime.truncate_log(path, last + 1)
    runtime.append_json(path, step=last + 1)
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert all(row["step"] <= last for row in rows[:-1]) and rows[-1] == {"step": last + 1}


# ------------------------------------------------------------------------------------ prompt, batches, metric

plain = st.text(st.characters(codec="utf-8"), max_size=60)
shown = st.lists(st.fixed_dictionaries({"input": plain, "output": plain}, optional={"explanation": plain}),
                 max_size=4)  # fmt: skip


@given(plain, shown, shown, plain, st.integers(0, 5), st.integers(0, 5), st.booleans(), st.booleans(),
       st.integers(2, 500))  # fmt: skip
def test_prompts(definition, positive, negative, text, num_pos, num_neg, explanation, with_definition, limit):
    task = {"definition": definition, "positive": positive, "negative": negative}
    prompt = data.render_prompt(task, {"input": text}, Bytes(), definition=with_definition, num_pos=num_pos,
                                num_neg=num_neg, explanation=explanation, max_source_length=limit)
    assert len(Bytes().encode(prompt)) <= max(limit, 2) + 1
    bare = data.render_prompt(task, {"input": text}, Bytes(), definition=with_definition, num_pos=0,
                              max_source_length=10**6)
    if len(Bytes().encode(bare)) <= limit:  # it fits: nothing of it is lost, and examples come in between
        head, tail = bare.split("Now complete the following example -\n", 1)
        assert prompt.startswith(head) and prompt.endswith(tail) and len(prompt) >= len(bare)
    else:
        assert bare.encode().startswith(prompt.encode())


@given(st.integers(1, 600), st.integers(1, 20), st.integers(0, 2**40), st.integers(0, 5))
def test_each_example_is_in_an_epoch_once(count, batch_size, seed, epoch):
    lengths, steps = np.random.default_rng(seed).integers(1, 50, count), -(-count // batch_size)
    batches = [data.batch_at(lengths, batch_size, seed, epoch * steps + step) for step in range(steps)]
    assert Counter(np.concatenate(batches).tolist()) == Counter(range(len(lengths)))
    assert all(len(batch) <= batch_size for batch in batches)


rows = st.tuples(st.integers(0, 99), st.integers(1, 9)).map(  # few draws, since hypothesis remembers all
    lambda seed_size: np.random.default_rng(seed_size[0]).integers(2, 99, seed_size[1]).tolist())


@given(st.lists(st.tuples(rows, st.lists(rows, min_size=1, max_size=3)), min_size=1, max_size=9),
       st.none() | st.integers(0, 9), st.integers(1, 12))  # fmt: skip
def test_a_batch_holds_its_examples_and_nothing_else(drawn, seed, parts):
    examples = [example(f"e{i}", *row, i) for i, row in enumerate(drawn)]
    batch = data.collate(examples, seed=seed, step=3)
    for i, (source, targets) in enumerate(drawn):
        assert batch.input_ids[i][batch.attention_mask[i]].tolist() == source
        assert batch.labels[i][batch.labels[i] != -100].tolist() in targets
    pieces = list(batch.split(parts))
    for field in ("input_ids", "labels"):  # each piece as wide as its longest row, the rest padding
        whole = getattr(batch, field)
        for rows, piece in pieces:
            part = getattr(piece, field)
            cut = whole[rows.start:rows.stop, part.shape[1]:]
            assert torch.equal(part, whole[rows.start:rows.stop, :part.shape[1]])
            assert (cut == (0 if field == "input_ids" else -100)).all()
    assert [name for _, piece in pieces for name in piece.ids] == batch.ids


words = st.lists(st.sampled_from(["the", "cat", "cats", "running", "runs", "x1", "\u00fcber", "!?", "A-b"]),
                 max_size=12)  # fmt: skip
said = words.map(" ".join) | st.text(max_size=40)


def slow_lcs(a, b) -> int:
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i, j] = table[i - 1, j - 1] + 1 if x == y else max(table[i - 1, j], table[i, j - 1])
    return int(table[-1, -1])


@given(said, said, st.lists(said, max_size=3))
def test_metric(one, other, more):
    ours, theirs = metrics._stems(one), metrics._stems(other)
    common = slow_lcs(ours, theirs)
    expected = 2 * common / (len(ours) + len(theirs)) if common else 0.0
    assert metrics.rouge_l(one, [other]) == pytest.approx(expected, abs=1e-12)
    overlap = sum(min(ours.count(token), theirs.count(token)) for token in set(ours))
    expected = 2 * overlap / (len(ours) + len(theirs)) if overlap else 0.0
    assert metrics.rouge_1(one, [other]) == pytest.approx(expected, abs=1e-12)
    for metric in metrics.METRICS.values():
        assert 0 <= metric(one, [other]) <= 1 and metric(one, [other]) == pytest.approx(metric(other, [one]))
        assert metric(one, [other, *more]) == max(metric(one, [reference]) for reference in (other, *more))
    assert metrics.exact_match(one, [*more, one]) == 1
    assert metrics.rouge_1(one, [one]) == metrics.rouge_l(one, [one]) == float(bool(ours))
