"""checkpoint.py: folders, equal bytes, hostile files.

parity/test_transformers.py compares folders with those of transformers.
"""

import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
from checkpoint import fingerprint, load, read_folder, read_safetensors, save, write_safetensors
from helpers import (
    PT,
    ROOT,
    T5_CONFIGS,
    both_t5,
    check_equal,
    random_t5,
    safetensors_bytes,
    safetensors_entry,
    t5_batch,
    weights_of,
)


def check_one_line(error: Exception, path: Path):
    """The message is one line that names the path."""
    assert str(path) in str(error) and "\n" not in str(error)


def change_json(path: Path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ----------------------------------------------------------------------------------- safetensors

PROGRAM = """
import sys, torch, checkpoint
dtypes = (torch.float32, torch.bfloat16, torch.int64, torch.bool)
tensors = {str(dtype): torch.arange(6).to(dtype) for dtype in dtypes}
tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}
tensors |= {"strided": torch.arange(24.0).view(4, 6).T[::2]}
state = dict(sorted(tensors.items(), reverse="reversed" in sys.argv))
config = {"targets": ["q", "v"], "rank": 2, "alpha": None}
checkpoint.save_adapter(
    sys.argv[1], state, method="é", config=config, tasks=["b", "a"], base="0" * 16
)
"""


def test_two_processes_write_the_same_bytes(tmp_path):
    for order in ("sorted", "reversed"):
        command = [sys.executable, "-c", PROGRAM, tmp_path / order, order]
        subprocess.run(command, cwd=ROOT, check=True)
    assert (tmp_path / "sorted").read_bytes() == (tmp_path / "reversed").read_bytes()

    state, info = checkpoint.load_adapter(tmp_path / "sorted")
    assert info == {
        "method": "é",
        "config": {"targets": ["q", "v"], "rank": 2, "alpha": None},
        "tasks": ["b", "a"],
        "base": "0" * 16,
    }
    assert state["scalar"] == 2.5 and state["empty"].shape == (0, 4)
    assert torch.equal(state["strided"], torch.arange(24.0).view(4, 6).T[::2])
    assert torch.equal(state["torch.bfloat16"], torch.arange(6).bfloat16())


@pytest.mark.parametrize(
    "metadata",
    [
        PT,
        {"adapter": "{"},
        {"adapter": "[" * 100_000},
        {"adapter": '{"method": "lora"}'},
        {"adapter": '{"method": "lora", "config": [], "tasks": [], "base": ""}'},
    ],
)
def test_an_adapter_without_its_metadata_is_refused(metadata, tmp_path):
    path = tmp_path / "a"
    write_safetensors(path, {"x": torch.ones(2)}, metadata)
    with pytest.raises(ValueError, match=f"^{path}: .*; this is no adapter of this version"):
        checkpoint.load_adapter(path)


def test_tensors_are_mapped_and_writing_to_them_leaves_the_file_alone(tmp_path):
    path = tmp_path / "a"
    write_safetensors(path, {"x": torch.zeros(1000), "y": torch.ones(1000)}, PT)
    before = path.read_bytes()
    tensors, metadata = read_safetensors(path)
    tensors["x"].fill_(5)
    assert path.read_bytes() == before and metadata == PT
    assert read_safetensors(path)[0]["x"].sum() == 0


HOSTILE = {
    "empty file": b"",
    "header beyond the file": struct.pack("<Q", 10**6) + b"{}",
    "header of 2^64-1 bytes": b"\xff" * 8 + b"{}",
    "not UTF-8": safetensors_bytes(b"\xff\xfe"),
    "not JSON": safetensors_bytes(b"{"),
    "deep nesting": safetensors_bytes(b"[" * 100_000),
    "a name of two lines": safetensors_bytes(
        {"x\ny" * 999: safetensors_entry(shape=[-1])}, bytes(8)
    ),
    "twice the same field": safetensors_bytes(
        b'{"x":{"dtype":"U8","dtype":"I8","shape":[],"data_offsets":[0,1]}}', b"1"
    ),
    "missing field": safetensors_bytes({"x": {"dtype": "F32", "shape": [0]}}),
    "unknown dtype": safetensors_bytes({"x": safetensors_entry("F9", [8])}, bytes(8)),
    "negative sizes whose product fits": safetensors_bytes(
        {"x": safetensors_entry(shape=[-1, -2])}, bytes(8)
    ),
    "product wraps to 2 in 64 bits": safetensors_bytes(
        {"x": safetensors_entry(shape=[2**63 + 1, 2])}, bytes(8)
    ),
    "offsets reversed": safetensors_bytes({"x": safetensors_entry(offsets=[8, 0])}, bytes(8)),
    "beyond the end": safetensors_bytes(
        {"x": safetensors_entry(shape=[2**40], offsets=[0, 2**42])}, bytes(8)
    ),
    "data cut": safetensors_bytes({"x": safetensors_entry()}, bytes(7)),
    "bytes left over": safetensors_bytes({"x": safetensors_entry()}, bytes(9)),
    "gap": safetensors_bytes(
        {"x": safetensors_entry(), "y": safetensors_entry(offsets=[16, 24])}, bytes(24)
    ),
    "overlap": safetensors_bytes(
        {"x": safetensors_entry(), "y": safetensors_entry(offsets=[4, 12])}, bytes(12)
    ),
    "metadata of numbers": safetensors_bytes({"__metadata__": {"a": 1}}),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_safetensors_are_refused_in_one_line(content, tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}: ") as refusal:
        read_safetensors(path)
    check_one_line(refusal.value, path)
    assert len(str(refusal.value)) < len(str(path)) + 250


def test_an_endless_header_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "a"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 2**40))
        file.truncate(2**41)  # a sparse file takes no room
    with pytest.raises(ValueError, match=f"^{path}: .*header"):
        read_safetensors(path)


# --------------------------------------------------------------------------------- folders of T5


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_loaded_weights_have_one_dtype_whatever_those_of_the_file(stored, tmp_path):
    save(random_t5(T5_CONFIGS["v1.1"]).to(stored), tmp_path)
    weights = weights_of(tmp_path)
    for name in weights:
        if "wo" in name:
            weights[name] = weights[name].float()
    write_safetensors(tmp_path / "model.safetensors", weights, PT)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = load(tmp_path, dtype=dtype)
        assert {weight.dtype for weight in loaded.parameters()} == {dtype}


@both_t5
def test_full_fine_tuning_of_a_loaded_base_works_and_leaves_the_file_alone(kind, tmp_path):
    save(random_t5(T5_CONFIGS[kind]), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    t5 = load(tmp_path).train()
    optimizer = torch.optim.SGD(t5.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        losses.append(t5.loss(*t5_batch()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[2] < losses[0]
    assert (tmp_path / "model.safetensors").read_bytes() == before

    save(t5, tmp_path)  # over the file that the weights are mapped from
    check_equal(load(tmp_path).state_dict(), t5.state_dict())


@pytest.mark.parametrize("name", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"])
def test_the_table_may_be_stored_under_either_stack(name, tmp_path):
    t5 = random_t5(T5_CONFIGS["v1.0"])
    save(t5, tmp_path)
    weights = weights_of(tmp_path)
    weights[name] = weights.pop("shared.weight")
    write_safetensors(tmp_path / "model.safetensors", weights, PT)
    check_equal(load(tmp_path).state_dict(), t5.state_dict())


def test_a_head_that_equals_the_table_is_tied_unless_the_config_says_otherwise(tmp_path):
    save(random_t5(T5_CONFIGS["v1.0"]), tmp_path)
    weights = weights_of(tmp_path)
    table = weights["shared.weight"].clone()
    path = tmp_path / "model.safetensors"
    write_safetensors(path, weights | {"lm_head.weight": table}, PT)
    assert load(tmp_path).config.tied_head

    config = (tmp_path / "config.json").read_text()
    change_json(tmp_path / "config.json", tie_word_embeddings=False)
    assert not load(tmp_path).config.tied_head

    (tmp_path / "config.json").write_text(config)
    write_safetensors(path, weights | {"lm_head.weight": table + 1}, PT)
    assert not load(tmp_path).config.tied_head

    path.unlink()
    table = table.to(torch.float8_e8m0fnu)  # torch does not compare tensors of this dtype
    weights |= {"shared.weight": table, "lm_head.weight": table}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"^{tmp_path}: .*not implemented for 'Float8_e8m0fnu'"):
        load(tmp_path)


# -------------------------------------------------------------------------------------- refusals


@pytest.fixture
def folder(tmp_path) -> Path:
    save(random_t5(T5_CONFIGS["v1.1"]), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "change, message",
    [
        ({"encoder.final_layer_norm.weight": None}, "missing .*'encoder.final_layer_norm.weight';"),
        ({"shared.weight": None}, "missing .*'shared.weight'"),
        ({"encoder.block.3.layer.0.SelfAttention.q.weight": (24, 32)}, "unexpected .*block.3"),
        ({"encoder.block.01.layer.0.SelfAttention.q.weight": (24, 32)}, "unexpected .*block.01"),
        (
            {f"junk{i}": (2,) for i in range(5)},
            r"unexpected tensors \(5\): \['junk0', 'junk1', 'junk2'\];",
        ),
        (
            {"decoder.block.0.layer.2.DenseReluDense.wi_0.weight": (48, 31)},
            r"wi_0.* \[48, 31\].*\[48, 32\]",
        ),
        ({"lm_head.weight": (38, 32)}, r"lm_head.weight is .*\[38, 32\]"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message, folder):
    weights = weights_of(folder)
    for name, shape in change.items():
        if shape is None:
            del weights[name]
        else:
            weights[name] = torch.zeros(shape)
    write_safetensors(folder / "model.safetensors", weights, PT)
    with pytest.raises(ValueError, match=message) as refusal:
        load(folder)
    check_one_line(refusal.value, folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"num_layers": 10**9},
            f"config.json has {10**9 + 1} blocks, but the weights have only 47 tensors",
        ),
        (
            {"d_model": 2**40},
            r"shared.weight is .*\[37, 32\], .* asks for floats \[37, 1099511627776\]",
        ),
        ({"d_model": 2**62, "d_ff": 2**62}, "config.json: "),  # more bytes than 64 bits count
        ({"d_model": 10**30}, "config.json: "),
    ],
)
def test_what_a_config_describes_is_bounded_by_the_weights(change, message, folder):
    change_json(folder / "config.json", **change)
    with pytest.raises(ValueError, match=message) as refusal:
        load(folder)
    check_one_line(refusal.value, folder)


def test_integer_weights_are_refused(folder):
    weights = {name: tensor.long() for name, tensor in read_folder(folder).items()}
    write_safetensors(folder / "model.safetensors", weights, PT)
    with pytest.raises(ValueError, match="asks for floats"):
        load(folder)


def test_save_refuses_foreign_tensors(folder):
    t5 = random_t5(T5_CONFIGS["v1.0"])
    t5.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'extra.bias', 'extra.weight'"):
        save(t5, folder)


def test_a_folder_without_weights_or_config_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"^{folder}: no weights"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        load(folder)
    with pytest.raises(ValueError, match="elsewhere: does not exist"):
        load(folder / "elsewhere")


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": ["shard"]},
        {"weight_map": {"x": 0}},
        {},
        [],
    ],
)
def test_bad_shard_indices_are_refused(index, tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"^{path}: .*(weight_map|list|string|object)"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/passwd", ".", "..", "a\\b", "c:a", "", "a\0b", "a\n"]
)
def test_shards_outside_of_the_folder_are_refused(shard, tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(ValueError, match=f"^{path}: the shard .* is not a plain file name"):
        read_folder(tmp_path)


def test_a_shard_that_the_index_leaves_out_is_missed(folder):
    (folder / "model.safetensors").rename(folder / "first.safetensors")
    weights, _ = read_safetensors(folder / "first.safetensors")
    last = "shared.weight"
    rest = {name: tensor for name, tensor in weights.items() if name != last}
    write_safetensors(folder / "first.safetensors", rest, PT)
    write_safetensors(folder / "last.safetensors", {last: weights[last]}, PT)

    weight_map = dict.fromkeys(rest, "first.safetensors") | {last: "last.safetensors"}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    load(folder)
    weight_map[last] = "first.safetensors"
    path.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=f"^{folder}: missing tensor '{last}'"):
        load(folder)


class Bomb:
    """An object whose pickle runs code: it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["torch.save", "plain pickle", "legacy"])
def test_a_malicious_pickle_does_not_run(form, folder):
    (folder / "model.safetensors").unlink()
    bomb = {"shared.weight": Bomb(folder / "ran")}
    path = folder / "pytorch_model.bin"
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(bomb))
    else:
        torch.save(bomb, path, _use_new_zipfile_serialization=form == "torch.save")
    with pytest.raises(ValueError, match=f"^{path}: refused") as refusal:
        load(folder)
    check_one_line(refusal.value, path)
    assert not (folder / "ran").exists()

    # The pickle would have run.
    pickle.loads(pickle.dumps(bomb))
    assert (folder / "ran").exists()


ONES = torch.ones(2, 2)


@pytest.mark.parametrize(
    "content", [[ONES], {1: ONES}, {"x": 3}, {"x": ONES.to_sparse()}, {"x": ONES.to("meta")}]
)
def test_torch_files_of_anything_but_named_dense_tensors_are_refused(content, tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save(content, path)
    with pytest.raises(ValueError, match=f"^{path}: "):
        read_folder(tmp_path)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_refused_although_its_layout_is_dense(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"x": torch.nested.nested_tensor([ONES])}, path)
    with pytest.raises(ValueError, match=f"^{path}: 'x' is not the name of a dense tensor"):
        read_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"junk" * 100, pickle.dumps(None)])
def test_damaged_torch_files_are_refused(content, tmp_path):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}: "):
        read_folder(tmp_path)


# ----------------------------------------------------------------------------------- fingerprint


def test_the_fingerprint_of_the_bundled_base_stays():
    assert fingerprint(ROOT / "tiny") == "3e15fe89e93a5f49"  # runs are bound to it


def test_fingerprint_tells_bases_apart_and_reads_little(folder):
    first = fingerprint(folder)
    assert len(first) == 16 and fingerprint(folder) == first

    weights = weights_of(folder)
    weights["decoder.final_layer_norm.weight"][0] += 1e-3
    write_safetensors(folder / "model.safetensors", weights, PT)
    second = fingerprint(folder)

    config = (folder / "config.json").read_text()
    change_json(folder / "config.json", layer_norm_epsilon=1e-5)
    third = fingerprint(folder)
    assert len({first, second, third}) == 3

    # These fields change nothing here.
    (folder / "config.json").write_text(config)
    change_json(folder / "config.json", use_cache=False, dropout_rate=0.5)
    assert fingerprint(folder) == second

    # Every second of the 37 x 32 values is read.
    weights["shared.weight"].view(-1)[1] += 1
    write_safetensors(folder / "model.safetensors", weights, PT)
    assert fingerprint(folder) == second
