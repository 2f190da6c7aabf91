"""Fuzz every reader with damaged input, and the batcher and the metrics with any input.

A reader returns a right answer or raises a ValueError of one line that names the file. Each test
tries 150 inputs. By hand it tries 10,000 with at most 5 seconds for each:

    pytest tests/programs/test_fuzz.py --hypothesis-profile=long
"""

import contextlib
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
from safetensors.torch import save_file

import checkpoint
import data
import export
import metrics
import runtime
import tokenizer as tokenizers
from helpers import (
    ROOT,
    Bytes,
    make_example,
    safetensors_bytes,
    safetensors_entry,
    task_json,
    write_pieces,
)
from orchmoe import OrchMoEConfig
from run_folder import RunFolder

pytest.importorskip("hypothesis")
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402


@pytest.fixture(autouse=True)
def little_memory():
    """Fail if the process grows by 500 MB or more, including what hypothesis remembers."""
    with contextlib.suppress(OSError):  # Linux: reset the peak, which an earlier test may have set
        Path("/proc/self/clear_refs").write_text("5")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
    print(f"\npeak memory grew by {grown:.0f} MB")
    assert grown < 500


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # Import what torch needs for its first meta tensor. No input should be charged for it.
    with torch.device("meta"):
        torch.nn.Linear(2, 2)
    return tmp_path_factory.mktemp("fuzz")


# ----------------------------------------------------------------------------------- any content

ODD_TEXTS = ["", "\ud800", "\0", "../x", "NaN", "\u2028", "a" * 3000]
ODD_NUMBERS = [2**31, 2**63, -1, 10**400]
texts = st.text(max_size=40) | st.sampled_from(ODD_TEXTS)
numbers = st.integers() | st.sampled_from(ODD_NUMBERS) | st.floats()
leaves = st.none() | st.booleans() | numbers | texts


def containers(inner):
    return st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4)


values = st.recursive(leaves, containers, max_leaves=8)


@st.composite
def damaged(draw, whole: bytes):
    """Draw `whole` with up to four damages: bytes changed, removed, doubled, cut off or added."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        kind = draw(st.sampled_from(["set", "remove", "double", "cut off", "add"]))
        size = draw(st.integers(1, 40))
        if kind == "set" and content:
            content[at] = draw(st.integers(0, 255))
        elif kind == "remove":
            del content[at : at + size]
        elif kind == "double":
            content[at:at] = content[at : at + size]
        elif kind == "cut off":
            del content[at:]
        else:
            content[at:at] = draw(st.binary(max_size=20))
    return bytes(content)


@st.composite
def changed(draw, whole: dict):
    """Draw `whole` as JSON with up to three fields, at any depth, removed or replaced."""
    result = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(0, 3))):
        container = result
        while True:
            keys = sorted(container) if isinstance(container, dict) else range(len(container))
            if not keys:
                break
            key = draw(st.sampled_from(list(keys)))
            can_descend = isinstance(container[key], dict | list) and container[key]
            if not can_descend or draw(st.booleans()):
                break
            container = container[key]
        if keys and draw(st.integers(0, 4)) > 0:
            container[key] = draw(values)
        elif keys:
            del container[key]
    return json.dumps(result).encode()


@st.composite
def one_byte_changed(draw, whole: bytes):
    content = bytearray(whole)
    content[draw(st.integers(0, len(whole) - 1))] ^= draw(st.integers(1, 255))
    return bytes(content)


def json_of(value):
    return json.dumps(value).encode()


def damaged_or_changed(whole: dict):
    return damaged(json_of(whole)) | changed(whole)


@contextlib.contextmanager
def refusing(*paths):
    """Allow a ValueError inside the block if it has one line that names one of the paths."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        assert any(str(path) in message for path in paths), message
        assert "\n" not in message and len(message) < 1000


def read(reader, path, content: bytes, whole: bytes | None = None):
    """Return what the reader returns for this content, None if it refuses it.

    It must not refuse the content `whole`.
    """
    path.write_bytes(content)
    with refusing(path, path.with_name("tokenizer_config.json")):
        try:
            return reader(path)
        except ValueError:
            assert content != whole, "undamaged, but refused"
            raise


# --------------------------------------------------------------------------------------- readers

TASK = task_json(3, URL=[])


@given(damaged_or_changed(TASK) | st.binary(max_size=60))
def test_tasks(folder, content):
    task = read(data.read_task, folder / "task1_a.json", content, json_of(TASK))
    if task is None:
        return
    assert task["instances"]
    for instance in task["instances"]:
        assert instance["output"]
        data.render_prompt(task, instance, Bytes()).encode()


task_names = texts | st.sampled_from(["task1_a", "task2_b", "task9_t"])


@given(st.lists(task_names, max_size=5), st.binary(max_size=20))
def test_split_lists(folder, names, junk):
    lists = folder / "splits/default"
    for needed in (lists, folder / "tasks"):
        needed.mkdir(parents=True, exist_ok=True)
    for name in ("task1_a", "task9_t"):
        (folder / f"tasks/{name}.json").write_text("{}")
    (lists / "test_tasks.txt").write_text("task9_t")
    lines = "\n".join(names).encode(errors="surrogatepass")
    (lists / "train_tasks.txt").write_bytes(lines + junk)
    with refusing(lists):
        found = data.read_splits(folder)
        assert found["test"] == ["task9_t"]
        assert found["train"] in ([], ["task1_a"])


def small_safetensors() -> bytes:
    header = {
        "a": safetensors_entry("F32", [2], [0, 8]),
        "b": safetensors_entry("I8", [2, 2], [8, 12]),
        "__metadata__": {"x": "y"},
    }
    return safetensors_bytes(header, bytes(range(12)))


BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I8": 1, "BOOL": 1, "F8_E4M3": 1}
sizes = st.integers(-2, 9) | st.sampled_from([2**31, 2**62, 2**63, 2**64, 10**30])
shapes = st.lists(sizes, max_size=4)
any_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*BYTES, "F9"]) | leaves,
        "shape": shapes | values,
        "data_offsets": st.lists(sizes, min_size=2, max_size=2) | values,
    }
)


def consistent_entry(dtype, shape):
    """Return an entry that is consistent in itself, though perhaps not with the file."""
    return safetensors_entry(dtype, shape, [0, math.prod(shape) * BYTES[dtype]])


entries = st.builds(consistent_entry, st.sampled_from(sorted(BYTES)), shapes) | any_entries | values
headers = st.dictionaries(texts, entries, max_size=3)
hostile_safetensors = st.builds(safetensors_bytes, headers, st.binary(max_size=16))


@given(damaged(small_safetensors()) | hostile_safetensors)
def test_safetensors(folder, content):
    path = folder / "a.safetensors"
    found = read(checkpoint.read_safetensors, path, content, small_safetensors())
    if found is None:
        return
    tensors, metadata = found
    assert sum(tensor.nbytes for tensor in tensors.values()) <= len(content)
    for tensor in tensors.values():
        assert tensor.clone().shape == tensor.shape  # every value can be read
    for value in metadata.values():
        assert isinstance(value, str)


ADAPTER = {"method": "lora", "config": {"a": [1]}, "tasks": ["a", "b"], "base": "0" * 16}


@given(damaged_or_changed(ADAPTER))
def test_adapters(folder, info):
    metadata = {"adapter": info.decode(errors="replace")}
    header = {"__metadata__": metadata, "a": safetensors_entry("F32", [2], [0, 8])}
    content = safetensors_bytes(header, bytes(8))
    found = read(checkpoint.load_adapter, folder / "a.safetensors", content)
    if found is not None:
        _, info = found
        assert isinstance(info["config"], dict) and isinstance(info["tasks"], list)


LORA = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "base_model_name_or_path": "base",
    "bias": "none",
    "target_modules": ["q"],
    **dict.fromkeys(export.REFUSED),
}
FACTORS = {
    "base_model.model.q.lora_A.weight": torch.ones(2, 3),
    "base_model.model.q.lora_B.weight": torch.ones(3, 2),
}
KEYS = [*FACTORS]
for key in FACTORS:
    KEYS += [key.replace("q", "a.q"), key.replace("weight", "bias"), key.removesuffix(".weight")]
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int64])


def filled(shape, dtype, is_nan):
    tensor = torch.ones(shape, dtype=dtype)
    if is_nan and dtype.is_floating_point:
        tensor *= math.nan
    return tensor


factors = st.builds(filled, st.lists(st.integers(0, 3), max_size=3), dtypes, st.booleans())
keys = st.sampled_from(KEYS) | texts.filter(str.isprintable)


@given(damaged_or_changed(LORA), st.just(FACTORS) | st.dictionaries(keys, factors, min_size=1))
def test_peft_folders(folder, config, tensors):
    """A LoRA that is accepted has finite factors in pairs of one rank."""
    path = folder / "lora"
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_bytes(config)
    save_file(tensors, path / "adapter_model.safetensors")
    with refusing(path):
        lora = export.load_peft(path)
        assert isinstance(lora.base, str)
        assert 2 * len(lora.factors) == len(tensors) > 0
        for name, (A, B) in lora.factors.items():
            for side in "AB":
                assert f"base_model.model.{name}.lora_{side}.weight" in tensors
            assert A.shape[0] == B.shape[1] == lora.rank
            assert A.isfinite().all() and B.isfinite().all()


def checkpoint_bytes() -> bytes:
    state = {
        "step": 1,
        "best": 0.5,
        "start_w": None,
        "weights": {"a": torch.ones(3)},
        "optimizer": {"state": {}},
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


CHECKPOINT = checkpoint_bytes()


@given(damaged(CHECKPOINT))
def test_checkpoints(folder, content):
    # They accept any state.
    adapters = mock.MagicMock()
    optimizer = mock.MagicMock(state={})

    def reader(path):
        return RunFolder(path.parent).load_progress(adapters, optimizer)

    found = read(reader, folder / "checkpoint.pt", content, CHECKPOINT)
    if found is not None:
        step, best, _ = found
        assert type(step) is int and type(best) is float


T5_CONFIG = json.loads((ROOT / "tiny/config.json").read_text())
LLAMA_CONFIG = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 160,
    "intermediate_size": 400,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "max_position_embeddings": 64,
    "eos_token_id": [1, 5],
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
MISTRAL_CONFIG = {**LLAMA_CONFIG, "model_type": "mistral", "sliding_window": 32}


@pytest.mark.parametrize("whole", [T5_CONFIG, LLAMA_CONFIG, MISTRAL_CONFIG])
@given(st.data())
def test_model_configs(folder, whole, drawn):
    """A config that is accepted survives a round trip, and is compared with the weights."""
    model = folder / "model"
    if not model.exists():
        model.mkdir()
        (model / "model.safetensors").symlink_to(ROOT / "tiny/model.safetensors")
    path = model / "config.json"

    def reader(path):
        return checkpoint.read_config(path.parent)

    config = read(reader, path, drawn.draw(damaged_or_changed(whole)), json_of(whole))
    if config is None:
        return
    # With a factor of 1 the other numbers of the rope scaling have no effect and are not kept.
    assert getattr(config, "factor", 0) == 1 or type(config).from_hf(config.to_hf()) == config
    with refusing(model):
        checkpoint.mapped(model)


ADAPTER_CONFIG = json.loads(json.dumps(vars(OrchMoEConfig())))


@given(damaged_or_changed(ADAPTER_CONFIG))
def test_adapter_configs(folder, content):
    def reader(path):
        with runtime.reading(path):
            return runtime.from_json(OrchMoEConfig, runtime.read_json(path))

    config = read(reader, folder / "adapter.json", content, json_of(ADAPTER_CONFIG))
    assert config is None or isinstance(config, OrchMoEConfig)


PIECES = (ROOT / "tiny/spiece.model").read_bytes()
positions = st.integers(0, 400) | st.integers(0, len(PIECES) - 1)
edits = st.lists(st.tuples(positions, st.integers(0, 255)), max_size=6)


@given(edits, st.just(len(PIECES)) | st.integers(0, len(PIECES)))
def test_t5_pieces(folder, edits, end):
    content = bytearray(PIECES)
    for position, value in edits:
        content[position] = value
    found = read(tokenizers.load, folder / "spiece.model", bytes(content[:end]), PIECES)
    if found is not None:
        assert found.encode("a small test")[-1] == 1
        assert isinstance(found.decode(range(9)), str)


def check_tokenizer(found):
    ids = found.encode("ab ba the dog </s>")
    assert ids[-1] == found.eos_ids[0]
    assert all(type(i) is int and 0 <= i < found.size for i in ids)
    assert type(found.decode(range(-1, found.size + 1))) is str


def special_token(number: int, content: str) -> dict:
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    return {"id": number, "content": content, "special": True, **flags}


BPE = {
    "type": "BPE",
    "vocab": {"a": 0, "b": 1, "ab": 2, "\u0120": 3},
    "merges": [["a", "b"]],
    "unk_token": None,
    "dropout": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}
BYTE_LEVEL = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
START = {"SpecialToken": {"id": "<s>", "type_id": 0}}
SEQUENCE = {"Sequence": {"id": "A", "type_id": 0}}
WORDS = {
    "version": "1.0",
    "added_tokens": [special_token(4, "<s>"), special_token(5, "</s>")],
    "truncation": None,
    "padding": None,
    "normalizer": None,
    "pre_tokenizer": {**BYTE_LEVEL, "add_prefix_space": False},
    "post_processor": {
        "type": "TemplateProcessing",
        "pair": [],
        "single": [START, SEQUENCE],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [4], "tokens": ["<s>"]}},
    },
    "decoder": {**BYTE_LEVEL, "add_prefix_space": True},
    "model": BPE,
}
WORDS_SETTINGS = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True}


def with_model(model: bytes) -> bytes:
    return json_of(WORDS | {"model": json.loads(model)})


@given(
    damaged_or_changed(WORDS) | changed(BPE).map(with_model),
    changed(WORDS_SETTINGS) | st.just(json_of(WORDS_SETTINGS)),
)
def test_word_tokenizers(folder, words, settings):
    path = folder / "words"
    path.mkdir(exist_ok=True)
    (path / "tokenizer_config.json").write_bytes(settings)

    def reader(path):
        found = tokenizers.load(path)
        check_tokenizer(found)  # some damage shows only here
        return found

    read(reader, path / "tokenizer.json", words)


@pytest.fixture(scope="module")
def llama_pieces(tmp_path_factory) -> bytes:
    task = next((ROOT / "sni/tasks").glob("*.json")).read_text(encoding="utf-8")
    folder = write_pieces(tmp_path_factory.mktemp("pieces"), task.split("\n"))
    return (folder / "tokenizer.model").read_bytes()


@given(st.data())
def test_llama_pieces(folder, llama_pieces, drawn):
    path = folder / "pieces"
    path.mkdir(exist_ok=True)
    settings = drawn.draw(damaged_or_changed({"add_bos_token": True}))
    (path / "tokenizer_config.json").write_bytes(settings)
    content = drawn.draw(damaged(llama_pieces))
    found = read(tokenizers.load, path / "tokenizer.model", content)
    if found is not None:
        check_tokenizer(found)


CACHED = {"a": torch.arange(999), "b": ["\u00fc"]}


@pytest.fixture(scope="module")
def token_cache(folder):
    """Return the only file of a token cache, and its content."""
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(folder / "cache")):
        data.cached(["x"], [], lambda: CACHED)
        (path,) = (folder / "cache/orchmoe").iterdir()
        yield path, path.read_bytes()


@given(st.data())
def test_token_caches(token_cache, drawn):
    path, whole = token_cache
    content = drawn.draw(damaged(whole) | one_byte_changed(whole))
    path.unlink(missing_ok=True)  # not in place: the file may be mapped
    path.write_bytes(content)
    found = data.cached(["x"], [], lambda: CACHED)
    assert found["a"].tolist() == list(range(999)) and found["b"] == ["\u00fc"]


log_lines = changed({"step": 3, "loss": 0.5}) | st.binary(max_size=30)


@given(st.lists(log_lines, max_size=6), st.integers(0, 6))
def test_logs(folder, lines, first_step):
    run = RunFolder(folder)
    run.log_path.write_bytes(b"\n".join(lines))
    run.truncate_log(first_step)
    run.log(step=first_step)
    *kept, added = [json.loads(line) for line in run.log_path.read_bytes().splitlines()]
    assert added == {"step": first_step}
    for row in kept:
        assert row["step"] < first_step


# ------------------------------------------------------------------- prompts, batches and metrics

plain = st.text(st.characters(codec="utf-8"), max_size=60)
shown = st.fixed_dictionaries({"input": plain, "output": plain}, optional={"explanation": plain})


@given(
    task=st.fixed_dictionaries(
        {
            "definition": plain,
            "positive": st.lists(shown, max_size=4),
            "negative": st.lists(shown, max_size=4),
        }
    ),
    text=plain,
    definition=st.booleans(),
    num_pos=st.integers(0, 5),
    num_neg=st.integers(0, 5),
    explanation=st.booleans(),
    limit=st.integers(2, 500),
)
def test_prompts(task, text, definition, num_pos, num_neg, explanation, limit):
    instance = {"input": text}
    prompt = data.render_prompt(
        task,
        instance,
        Bytes(),
        definition=definition,
        num_pos=num_pos,
        num_neg=num_neg,
        explanation=explanation,
        max_source_length=limit,
    )
    assert len(Bytes().encode(prompt)) <= limit + 1

    bare = data.render_prompt(
        task, instance, Bytes(), definition=definition, num_pos=0, max_source_length=10**6
    )
    if len(Bytes().encode(bare)) <= limit:
        # It fits: nothing of it is lost, and the examples are in between.
        head, tail = bare.split("Now complete the following example -\n", 1)
        assert prompt.startswith(head) and prompt.endswith(tail) and len(prompt) >= len(bare)
    else:
        assert bare.encode().startswith(prompt.encode())


@given(st.integers(1, 600), st.integers(1, 20), st.integers(0, 2**40), st.integers(0, 5))
def test_an_epoch_has_each_example_once(count, batch_size, seed, epoch):
    lengths = np.random.default_rng(seed).integers(1, 50, count)
    steps = math.ceil(count / batch_size)
    seen = Counter()
    for step in range(epoch * steps, (epoch + 1) * steps):
        batch = data.batch_at(lengths, batch_size, seed, step)
        assert len(batch) <= batch_size
        seen.update(batch.tolist())
    assert seen == Counter(range(count))


def random_ids(seed, length):
    return np.random.default_rng(seed).integers(2, 99, length).tolist()


# Few draws for many ids, since hypothesis remembers all draws.
rows_of_ids = st.builds(random_ids, st.integers(0, 99), st.integers(1, 9))
pairs = st.tuples(rows_of_ids, st.lists(rows_of_ids, min_size=1, max_size=3))


@given(st.lists(pairs, min_size=1, max_size=9), st.none() | st.integers(0, 9), st.integers(1, 12))
def test_a_batch_has_its_examples_and_nothing_else(drawn, seed, parts):
    examples = []
    for i, (source, targets) in enumerate(drawn):
        examples.append(make_example(f"e{i}", source, targets, i))
    batch = data.collate(examples, seed=seed, step=3)
    for i, (source, targets) in enumerate(drawn):
        labels = batch.labels[i]
        assert batch.input_ids[i][batch.attention_mask[i]].tolist() == source
        assert labels[labels != -100].tolist() in targets

    # Each piece is as wide as its longest row. What is cut off is padding.
    names = []
    for rows, piece in batch.split(parts):
        names += piece.ids
        for field, padding in (("input_ids", 0), ("labels", -100)):
            whole = getattr(batch, field)[rows.start : rows.stop]
            part = getattr(piece, field)
            width = part.shape[1]
            assert torch.equal(part, whole[:, :width])
            assert (whole[:, width:] == padding).all()
    assert names == batch.ids


WORD_LIST = ["the", "cat", "cats", "running", "runs", "x1", "\u00fcber", "!?", "A-b"]
sentences = st.lists(st.sampled_from(WORD_LIST), max_size=12).map(" ".join) | st.text(max_size=40)


def slow_lcs(a, b) -> int:
    """Return the length of the longest common subsequence, by the textbook table."""
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i in range(len(a)):
        for j in range(len(b)):
            if a[i] == b[j]:
                table[i + 1, j + 1] = table[i, j] + 1
            else:
                table[i + 1, j + 1] = max(table[i, j + 1], table[i + 1, j])
    return int(table[-1, -1])


@given(sentences, sentences, st.lists(sentences, max_size=3))
def test_metrics(one, other, more):
    a = metrics._stems(one)
    b = metrics._stems(other)
    total = max(1, len(a) + len(b))
    common = slow_lcs(a, b)
    assert metrics.rouge_l(one, [other]) == pytest.approx(2 * common / total, abs=1e-12)
    overlap = (Counter(a) & Counter(b)).total()
    assert metrics.rouge_1(one, [other]) == pytest.approx(2 * overlap / total, abs=1e-12)

    for metric in metrics.METRICS.values():
        value = metric(one, [other])
        assert 0 <= value <= 1
        assert value == pytest.approx(metric(other, [one]))
        values_of_all = [metric(one, [reference]) for reference in (other, *more)]
        assert metric(one, [other, *more]) == max(values_of_all)
    assert metrics.exact_match(one, [*more, one]) == 1
    assert metrics.rouge_1(one, [one]) == metrics.rouge_l(one, [one]) == float(len(a) > 0)
