"""Fuzz the readers with damaged input, and the metrics with any text.

A reader returns a right answer or raises a ValueError of one line that names the file. Each test
tries 50 inputs. By hand it tries 10,000 with at most 5 seconds for each:

    pytest tests/programs/test_fuzz.py --hypothesis-profile=long
"""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch

import checkpoint
import metrics
import tokenizer
from helpers import (
    LLAMA3_ROPE,
    LLAMA_SIZES,
    ROOT,
    Bytes,
    sentences,
    task_json,
    train_pieces,
    write_words,
)
from support import program
from tasks import read_task, render_prompt

pytest.importorskip("hypothesis")
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

pytestmark = pytest.mark.usefixtures("little_memory")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # Import what torch needs for its first meta tensor. No input should be charged for it.
    with torch.device("meta"):
        torch.nn.Linear(2, 2)
    return tmp_path_factory.mktemp("fuzz")


# ----------------------------------------------------------------------------------- any content

texts = st.text(max_size=40)
texts |= st.sampled_from(["", "\ud800", "\0", "../x", "\u2028", "a" * 3000])
numbers = st.integers() | st.sampled_from([2**31, 2**63, -1, 10**400]) | st.floats()
leaves = st.none() | st.booleans() | numbers | texts


def containers(inner):
    return st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4)


values = st.recursive(leaves, containers, max_leaves=8)


@st.composite
def damaged(draw, whole: bytes):
    """Draw `whole` with up to four pieces overwritten, removed, inserted, doubled or cut off."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(content)))
        doubled = st.just(2 * content[start : start + 20])
        piece = draw(st.binary(max_size=1) | st.binary(max_size=20) | doubled)
        length = draw(st.sampled_from([len(piece), 0, 20, len(content)]))
        content[start : start + length] = piece
    return bytes(content)


@st.composite
def changed(draw, whole: bytes):
    """Draw the JSON object `whole` with up to three fields, at any depth, removed or replaced."""
    value = json.loads(whole)
    for _ in range(draw(st.integers(0, 3))):
        container = value
        while True:
            keys = [*container] if isinstance(container, dict) else range(len(container))
            key = draw(st.sampled_from(keys))
            can_descend = isinstance(container[key], dict | list) and container[key]
            if not can_descend or draw(st.booleans()):
                break
            container = container[key]
        container[key] = draw(values)
        if len(value) > 1 and draw(st.booleans()):
            del container[key]
    return json.dumps(value).encode()


def damaged_or_changed(whole: bytes):
    return damaged(whole) | changed(whole)


@contextlib.contextmanager
def refusing(path):
    """Allow a ValueError inside the block if it has one line that names the path."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        assert str(path) in message
        assert "\n" not in message and len(message) < 1000


def read(reader, path, content: bytes, whole: bytes):
    """Return what the reader returns for this content, None if it refuses it.

    It must not refuse the content `whole`.
    """
    path.write_bytes(content)
    with refusing(path):
        try:
            return reader(path)
        except ValueError:
            assert content != whole, "undamaged, but refused"
            raise


# --------------------------------------------------------------------------------------- readers

TASK = program.to_json(task_json(3))


@given(damaged_or_changed(TASK))
def test_damaged_tasks_are_read_or_refused_in_one_line(folder, content):
    task = read(read_task, folder / "task1_a.json", content, TASK)
    if task is not None:
        assert task["instances"]
        for instance in task["instances"]:
            assert instance["output"]
            render_prompt(task, instance, Bytes()).encode()


buffer = io.BytesIO()
torch.save(
    {"step": 1, "best": 0.5, "weights": {"Z": torch.ones(2)}, "optimizer": {"state": {}}}, buffer
)
CHECKPOINT = buffer.getvalue()


@given(damaged(CHECKPOINT))
def test_damaged_checkpoints_are_read_or_refused_in_one_line(folder, content):
    read(checkpoint.read_torch, folder / "progress.pt", content, CHECKPOINT)


T5_CONFIG = (ROOT / "tiny/config.json").read_bytes()
MISTRAL_CONFIG = program.to_json(
    {
        "model_type": "mistral",
        "rope_parameters": LLAMA3_ROPE,
        "sliding_window": 32,
        **LLAMA_SIZES,
    }
)


@pytest.mark.parametrize("whole", [T5_CONFIG, MISTRAL_CONFIG], ids=["t5", "mistral"])
@given(st.data())
def test_damaged_model_configs_are_read_or_refused_in_one_line(folder, whole, drawn):
    """A config that is accepted is compared with the weights."""
    model = folder / "model"
    if not model.exists():
        model.mkdir()
        (model / "model.safetensors").symlink_to(ROOT / "tiny/model.safetensors")

    def reader(path):
        return checkpoint.read_config(path.parent)

    config = read(reader, model / "config.json", drawn.draw(damaged_or_changed(whole)), whole)
    if config is not None:
        with refusing(model):
            checkpoint.load(model, dtype=None)


TOKENIZER_SETTINGS = b'{"eos_token": {"content": "</s>"}, "add_bos_token": true}'


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """Return a folder with a tokenizer of each kind."""
    path = tmp_path_factory.mktemp("tokenizer")
    write_words(path, ["ab ba the dog"], post="<s> $A")
    # Without rules of normalisation the file is small. hypothesis remembers each content it draws.
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    rules = {"normalization_rule_name": "identity", "hard_vocab_limit": False}
    train_pieces(path / "spiece", sentences(200), vocab_size=60, **ids, **rules)
    return path


@pytest.mark.parametrize("name", tokenizer.KINDS)
@given(st.data())
def test_damaged_tokenizers_are_read_or_refused_in_one_line(folder, tokenizer_folder, name, drawn):
    folder = folder / Path(name).stem  # of this kind alone
    folder.mkdir(exist_ok=True)
    whole = (tokenizer_folder / name).read_bytes()
    contents = damaged_or_changed(whole) if name == "tokenizer.json" else damaged(whole)
    (folder / name).write_bytes(drawn.draw(contents))
    settings = folder / "tokenizer_config.json"
    settings.write_bytes(drawn.draw(damaged_or_changed(TOKENIZER_SETTINGS)))
    with refusing(folder):
        found = tokenizer.load(folder)
        ids = found.encode("ab ba the dog </s>")  # some damage shows only here
        assert ids[-1] == found.eos_ids[0]
        assert all(0 <= i < found.size for i in ids)
        found.decode(range(-1, found.size + 1))


# --------------------------------------------------------------------------------------- metrics


@given(st.text(), st.text())
def test_a_score_is_between_0_and_1_and_a_text_matches_itself(one, other):
    for rules in metrics.RULES:
        for metric in metrics.METRICS.values():
            assert 0 <= metric(one, [other], rules) <= 1
        assert metrics.exact_match(one, [other, one], rules) == 1
