"""Fuzz every reader with damaged input, and the prompt and the metrics with any text.

A reader returns a right answer or raises a ValueError of one line that names the file. Each test
tries 50 inputs. By hand it tries 10,000 with at most 5 seconds for each:

    pytest tests/programs/test_fuzz.py --hypothesis-profile=long
"""

import contextlib
import io
import json
import math

import pytest
import torch
from safetensors.torch import save_file

import checkpoint
import metrics
import tokenizer
from helpers import (
    LLAMA3_ROPE,
    LLAMA_SIZES,
    ROOT,
    Bytes,
    safetensors_bytes,
    safetensors_entry,
    task_json,
    write_words,
)
from integrations import peft_folder
from support import program
from tasks import read_task, render_prompt

pytest.importorskip("hypothesis")
from hypothesis import example, given  # noqa: E402
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
def test_tasks(folder, content):
    task = read(read_task, folder / "task1_a.json", content, TASK)
    if task is not None:
        assert task["instances"]
        for instance in task["instances"]:
            assert instance["output"]
            render_prompt(task, instance, Bytes()).encode()


SMALL = safetensors_bytes(
    {
        "a": safetensors_entry("F32", [2], [0, 8]),
        "b": safetensors_entry("I8", [2, 2], [8, 12]),
        "__metadata__": {"x": "y"},
    },
    bytes(range(12)),
)
sizes = st.integers(-2, 9) | st.sampled_from([2**31, 2**62, 2**63, 2**64, 10**30])
entries = st.builds(
    safetensors_entry,
    st.sampled_from(["F32", "F8_E4M3", "F9"]) | leaves,
    st.lists(sizes, max_size=4) | values,
    st.lists(sizes, min_size=2, max_size=2) | values,
)
BYTES = {"F64": 8, "F32": 4, "BF16": 2, "BOOL": 1}


def consistent_entry(dtype, shape):
    """Return an entry that is consistent in itself, though perhaps not with the file."""
    return safetensors_entry(dtype, shape, [0, math.prod(shape) * BYTES[dtype]])


entries |= st.builds(consistent_entry, st.sampled_from(list(BYTES)), st.lists(sizes, max_size=4))
headers = st.dictionaries(texts, entries | values, max_size=3)
hostile = st.builds(safetensors_bytes, headers, st.binary(max_size=16))


@given(damaged(SMALL) | hostile)
@example(safetensors_bytes({"x\ny" * 999: safetensors_entry(offsets=[8, 0])}))
def test_safetensors(folder, content):
    found = read(checkpoint.read_safetensors, folder / "a.safetensors", content, SMALL)
    if found is not None:
        tensors, metadata = found
        assert sum(tensor.nbytes for tensor in tensors.values()) <= len(content)
        for tensor in tensors.values():
            assert tensor.clone().shape == tensor.shape  # every value can be read
        assert all(isinstance(value, str) for value in metadata.values())


LORA = program.to_json(
    {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "base"}
    | dict.fromkeys(["use_dora", "rank_pattern", "modules_to_save"])
)
KEY_A = "base_model.model.q.lora_A.weight"
KEY_B = KEY_A.replace("A", "B")
FACTORS = {KEY_A: torch.ones(2, 3), KEY_B: torch.ones(3, 2)}
keys = st.sampled_from([KEY_A, KEY_B, KEY_A.replace("q", "a.q")])
shapes = st.lists(st.integers(0, 3), max_size=3)
factors = st.builds(torch.full, shapes, st.sampled_from([1, 1.0, math.nan]))


@given(damaged_or_changed(LORA), st.just(FACTORS) | st.dictionaries(keys, factors, min_size=1))
def test_peft_folders(folder, config, tensors):
    """A LoRA that is accepted has finite factors in pairs of one rank."""
    path = folder / "lora"
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_bytes(config)
    save_file(tensors, path / "adapter_model.safetensors")
    with refusing(path):
        lora = peft_folder.load_peft(path)
        assert 2 * len(lora.factors) == len(tensors) > 0
        for A, B in lora.factors.values():
            assert A.shape[0] == B.shape[1] == lora.rank
            assert A.isfinite().all() and B.isfinite().all()


buffer = io.BytesIO()
torch.save(
    {"step": 1, "best": 0.5, "weights": {"Z": torch.ones(2)}, "optimizer": {"state": {}}}, buffer
)
CHECKPOINT = buffer.getvalue()


@given(damaged(CHECKPOINT))
def test_checkpoints(folder, content):
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
def test_model_configs(folder, whole, drawn):
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
            checkpoint.mapped(model)


TOKENIZER_SETTINGS = b'{"eos_token": {"content": "</s>"}, "add_bos_token": true}'


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """Return a folder with a tokenizer of each kind."""
    path = tmp_path_factory.mktemp("tokenizer")
    write_words(path, ["ab ba the dog"], post="<s> $A")
    (path / "spiece.model").write_bytes((ROOT / "tiny/spiece.model").read_bytes())
    return path


@pytest.mark.parametrize("name", tokenizer.KINDS)
@given(st.data())
def test_tokenizers(folder, tokenizer_folder, name, drawn):
    whole = (tokenizer_folder / name).read_bytes()
    contents = damaged_or_changed(whole) if name == "tokenizer.json" else damaged(whole)
    (folder / name).write_bytes(drawn.draw(contents))
    settings = folder / "tokenizer_config.json"
    settings.write_bytes(drawn.draw(damaged_or_changed(TOKENIZER_SETTINGS)))
    with refusing(folder):
        found = tokenizer.load(folder / name)
        ids = found.encode("ab ba the dog </s>")  # some damage shows only here
        assert ids[-1] == found.eos_ids[0]
        assert all(0 <= i < found.size for i in ids)
        found.decode(range(-1, found.size + 1))


# ---------------------------------------------------------------------------- prompts and metrics

plain = st.text(st.characters(codec="utf-8"), max_size=60)
examples = st.lists(
    st.fixed_dictionaries({"input": plain, "output": plain}, optional={"explanation": plain}),
    max_size=4,
)


@given(plain, plain, examples, examples, st.booleans(), st.integers(2, 500))
def test_prompts(definition, text, positive, negative, has_definition, limit):
    task = {"definition": definition, "positive": positive, "negative": negative}

    def render(**options):
        return render_prompt(task, {"input": text}, Bytes(), definition=has_definition, **options)

    prompt = render(num_pos=3, num_neg=2, explanation=True, max_source_length=limit)
    assert len(Bytes().encode(prompt)) <= limit + 1
    bare = render(num_pos=0, max_source_length=10**6)
    if len(Bytes().encode(bare)) <= limit:
        # It fits: nothing of it is lost, and the examples are in between.
        head, tail = bare.split("Now complete the following example -\n", 1)
        assert prompt.startswith(head) and prompt.endswith(tail) and len(prompt) >= len(bare)
    else:
        assert bare.encode().startswith(prompt.encode())


@given(st.text(), st.text())
def test_metrics(one, other):
    for rules in metrics.RULES:
        for metric in metrics.METRICS.values():
            assert 0 <= metric(one, [other], rules) <= 1
        assert metrics.exact_match(one, [other, one], rules) == 1
