"""Files in and out: folders of transformers, what two processes write, and hostile files."""

import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, teacher_forced
from test_model import CONFIGS, as_transformers, batch, both, random_t5

import checkpoint
from checkpoint import fingerprint, load, mapped, read_folder, read_safetensors, save, write_safetensors

PT = {"format": "pt"}
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"  # of old files


def check_equal(found: dict, expected: dict):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def check_logits(t5, hf):
    input_ids, mask, labels = batch()
    decoder_input_ids = labels.clamp(min=0)
    expected = hf(input_ids=input_ids, attention_mask=mask.long(), decoder_input_ids=decoder_input_ids).logits
    found = teacher_forced(t5, input_ids, mask, decoder_input_ids)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8), **more) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets} | more


# ------------------------------------------------------------------------------------------------ safetensors


PROGRAM = """
import sys, torch, checkpoint
tensors = {str(d): torch.arange(6).to(d) for d in (torch.float32, torch.bfloat16, torch.int64, torch.bool)}
tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}
tensors |= {"strided": torch.arange(24.0).view(4, 6).T[::2]}
state = dict(sorted(tensors.items(), reverse="reversed" in sys.argv))
metadata = {"targets": ["q", "v"], "rank": 2, "alpha": None}
checkpoint.save_adapter(sys.argv[1], state, method="é", config=metadata, tasks=["b", "a"], base="0" * 16)
"""


def test_two_processes_write_the_same_bytes(tmp_path):
    paths = tmp_path / "a", tmp_path / "b"
    for path, order in zip(paths, ("sorted", "reversed"), strict=True):
        subprocess.run([sys.executable, "-c", PROGRAM, path, order], cwd=ROOT, check=True)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    state, info = checkpoint.load_adapter(paths[0])
    assert info == {"method": "é", "config": {"targets": ["q", "v"], "rank": 2, "alpha": None},
                    "tasks": ["b", "a"], "base": "0" * 16}  # fmt: skip
    assert state["scalar"] == 2.5 and state["empty"].shape == (0, 4)
    assert torch.equal(state["strided"], torch.arange(24.0).view(4, 6).T[::2])
    assert torch.equal(state["torch.bfloat16"], torch.arange(6).bfloat16())


def test_an_adapter_without_its_metadata_is_refused(tmp_path):
    for metadata in (PT, {"adapter": "{"}, {"adapter": "[" * 100_000}, {"adapter": '{"method": "lora"}'}):
        write_safetensors(tmp_path / "a", {"x": torch.ones(2)}, metadata)
        with pytest.raises(ValueError, match=f"^{tmp_path / 'a'}: no adapter of this version"):
            checkpoint.load_adapter(tmp_path / "a")


def test_tensors_are_mapped_and_writing_to_them_stays_here(tmp_path):
    path = tmp_path / "a"
    write_safetensors(path, {"x": torch.zeros(1000), "y": torch.ones(1000)}, PT)
    before, (tensors, metadata) = path.read_bytes(), read_safetensors(path)
    tensors["x"].fill_(5)
    assert path.read_bytes() == before and read_safetensors(path)[0]["x"].sum() == 0 and metadata == PT


HOSTILE = {
    "empty file": b"",
    "header beyond the file": struct.pack("<Q", 10**6) + b"{}",
    "header of 2^64-1 bytes": b"\xff" * 8 + b"{}",
    "not UTF-8": safetensors_bytes(b"\xff\xfe"),
    "not JSON": safetensors_bytes(b"{"),
    "deep nesting": safetensors_bytes(b"[" * 100_000),
    "a name of two lines": safetensors_bytes({"x\ny" * 999: entry(shape=[-1])}, bytes(8)),
    "twice the same field": safetensors_bytes(
        b'{"x":{"dtype":"U8","dtype":"I8","shape":[],"data_offsets":[0,1]}}', b"1"
    ),
    "missing field": safetensors_bytes({"x": {"dtype": "F32", "shape": [0]}}),
    "unknown dtype": safetensors_bytes({"x": entry("F9", [8])}, bytes(8)),
    "negative sizes whose product fits": safetensors_bytes({"x": entry(shape=[-1, -2])}, bytes(8)),
    "product wraps to 2 in 64 bits": safetensors_bytes({"x": entry(shape=[2**63 + 1, 2])}, bytes(8)),
    "offsets reversed": safetensors_bytes({"x": entry(offsets=[8, 0])}, bytes(8)),
    "beyond the end": safetensors_bytes({"x": entry(shape=[2**40], offsets=[0, 2**42])}, bytes(8)),
    "data cut": safetensors_bytes({"x": entry()}, bytes(7)),
    "bytes left over": safetensors_bytes({"x": entry()}, bytes(9)),
    "gap": safetensors_bytes({"x": entry(), "y": entry(offsets=[16, 24])}, bytes(24)),
    "overlap": safetensors_bytes({"x": entry(), "y": entry(offsets=[4, 12])}, bytes(12)),
    "metadata of numbers": safetensors_bytes({"__metadata__": {"a": 1}}),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_safetensors_are_refused_in_one_line(content, tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError) as refusal:
        read_safetensors(path)
    message = str(refusal.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < len(str(path)) + 250


def test_an_endless_header_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "a", "wb") as file:
        file.write(struct.pack("<Q", 2**40))
        file.truncate(2**41)  # sparse: it takes no room
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_safetensors(tmp_path / "a")


# ---------------------------------------------------------------------------------- folders from transformers


def rewrite_as_bin(folder: Path, *, legacy: bool = False, **more: torch.Tensor):
    """The folder as transformers 4 wrote it: a torch file, with every name that shares a tensor."""
    weights = {name: tensor.clone() for name, tensor in read_folder(folder).items()}
    weights |= {f"{stack}.embed_tokens.weight": weights["shared.weight"] for stack in ("encoder", "decoder")}
    weights = {"lm_head.weight": weights["shared.weight"]} | weights | more
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)


@both
@pytest.mark.parametrize("stored", ["whole", "sharded", "bin", "legacy bin", "sharded bin"])
def test_folders_of_transformers_load_and_agree(kind, stored, tmp_path):
    t5 = random_t5(CONFIGS[kind])
    hf = as_transformers(t5)
    hf.save_pretrained(tmp_path, max_shard_size="20KB" if stored == "sharded" else "1GB")
    whole = fingerprint(tmp_path)
    if "bin" in stored:
        rewrite_as_bin(tmp_path, legacy="legacy" in stored, **{UNUSED: torch.zeros(8, 3)})
    if stored == "sharded bin":
        weights, shard_of = read_folder(tmp_path), {}
        for number, name in enumerate(weights):
            shard_of[name] = f"pytorch_model-{number % 2}.bin"
        for shard in set(shard_of.values()):
            torch.save({name: weights[name] for name in weights if shard_of[name] == shard}, tmp_path / shard)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shard_of}))
        (tmp_path / "pytorch_model.bin").unlink()
    assert (tmp_path / "model.safetensors.index.json").exists() == (stored == "sharded")
    loaded = load(tmp_path)
    assert loaded.config == t5.config and not loaded.training
    check_equal(loaded.state_dict(), t5.state_dict())
    assert fingerprint(tmp_path) == whole
    check_logits(loaded, hf)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_transformers_reads_what_save_writes(kind, dtype, tmp_path):
    transformers = pytest.importorskip("transformers")
    t5 = random_t5(CONFIGS[kind]).to(dtype)
    save(t5, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert read_safetensors(tmp_path / "model.safetensors")[1] == PT  # for transformers 4
    check_equal(mapped(tmp_path).state_dict(), t5.state_dict())
    hf = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    check_logits(load(tmp_path, dtype=torch.float32), hf)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_loaded_weights_have_one_dtype_whatever_those_of_the_file(stored, tmp_path):
    save(random_t5(CONFIGS["v1.1"]).to(stored), tmp_path)
    weights = {name: w.float() if "wo" in name else w.clone() for name, w in read_folder(tmp_path).items()}
    write_safetensors(tmp_path / "model.safetensors", weights, PT)
    assert {weight.dtype for weight in load(tmp_path).parameters()} == {torch.float32}
    assert {weight.dtype for weight in load(tmp_path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


@both
def test_full_fine_tuning_of_a_loaded_base_works_and_leaves_the_file_alone(kind, tmp_path):
    save(random_t5(CONFIGS[kind]), tmp_path)
    before, t5 = (tmp_path / "model.safetensors").read_bytes(), load(tmp_path).train()
    optimiser = torch.optim.SGD(t5.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        losses.append(t5.loss(*batch()))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[2] < losses[0]
    assert (tmp_path / "model.safetensors").read_bytes() == before
    save(t5, tmp_path)  # over the file that the weights are mapped from
    check_equal(load(tmp_path).state_dict(), t5.state_dict())


@pytest.mark.parametrize("name", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"])
def test_the_table_may_be_stored_under_either_stack(name, tmp_path):
    t5 = random_t5(CONFIGS["v1.0"])
    save(t5, tmp_path)
    weights = {key: tensor.clone() for key, tensor in read_folder(tmp_path).items()}
    weights[name] = weights.pop("shared.weight")
    write_safetensors(tmp_path / "model.safetensors", weights, PT)
    check_equal(load(tmp_path).state_dict(), t5.state_dict())


def test_a_head_that_equals_the_table_is_tied_unless_the_config_says_otherwise(tmp_path):
    t5 = random_t5(CONFIGS["v1.0"])
    save(t5, tmp_path)
    weights = {name: tensor.clone() for name, tensor in read_folder(tmp_path).items()}
    head = weights["shared.weight"].clone()
    write_safetensors(tmp_path / "model.safetensors", weights | {"lm_head.weight": head}, PT)
    assert load(tmp_path).config.tied_head
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": False}))
    assert not load(tmp_path).config.tied_head
    (tmp_path / "config.json").write_text(json.dumps(values))
    write_safetensors(tmp_path / "model.safetensors", weights | {"lm_head.weight": head + 1}, PT)
    assert not load(tmp_path).config.tied_head
    (tmp_path / "model.safetensors").unlink()
    table = head.to(torch.float8_e8m0fnu)  # which torch does not compare
    torch.save(weights | {"shared.weight": table, "lm_head.weight": table}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not implemented for 'Float8_e8m0fnu'"):
        load(tmp_path)


# --------------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def folder(tmp_path) -> Path:
    save(random_t5(CONFIGS["v1.1"]), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "change, message",
    [
        ({"encoder.final_layer_norm.weight": None}, "missing .*'encoder.final_layer_norm.weight'$"),
        ({"shared.weight": None}, "missing .*'shared.weight'"),
        ({"encoder.block.3.layer.0.SelfAttention.q.weight": (24, 32)}, "unexpected .*block.3"),
        ({"encoder.block.01.layer.0.SelfAttention.q.weight": (24, 32)}, "unexpected .*block.01"),
        ({f"junk{i}": (2,) for i in range(5)}, "'junk0', 'junk1', 'junk2' and 2 more"),
        ({"decoder.block.0.layer.2.DenseReluDense.wi_0.weight": (48, 31)}, r"wi_0.* \[48, 31\].*\[48, 32\]"),
        ({"lm_head.weight": (38, 32)}, r"lm_head.weight is .*\[38, 32\]"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message, folder):
    weights = {name: tensor.clone() for name, tensor in read_folder(folder).items()}
    weights |= {name: shape and torch.zeros(shape) for name, shape in change.items()}
    tensors = {name: tensor for name, tensor in weights.items() if tensor is not None}
    write_safetensors(folder / "model.safetensors", tensors, PT)
    with pytest.raises(ValueError, match=message) as refusal:
        load(folder)
    assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_layers": 10**9}, f"config.json has {10**9 + 1} blocks, the weights have 47 tensors"),
        ({"d_model": 2**40}, r"shared.weight is .*\[37, 32\]; .* asks for floats \[37, 1099511627776\]"),
        ({"d_model": 2**62, "d_ff": 2**62}, "config.json: "),  # more bytes than 64 bits count
        ({"d_model": 10**30}, "config.json: "),
    ],
)
def test_what_a_config_describes_is_bounded_by_the_weights(change, message, folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=message) as refusal:
        load(folder)
    assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)


def test_integer_weights_are_refused(folder):
    weights = {name: tensor.long() for name, tensor in read_folder(folder).items()}
    write_safetensors(folder / "model.safetensors", weights, PT)
    with pytest.raises(ValueError, match="asks for floats"):
        load(folder)


def test_save_refuses_foreign_tensors(folder):
    t5 = random_t5(CONFIGS["v1.0"])
    t5.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'extra.bias', 'extra.weight'"):
        save(t5, folder)


def test_a_folder_without_weights_or_config_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no weights"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        load(folder)
    with pytest.raises(ValueError, match="elsewhere: not there"):
        load(folder / "elsewhere")


@pytest.mark.parametrize(
    "index, message",
    [
        ({"weight_map": {"x": "../model.safetensors"}}, "not a plain file name"),
        ({"weight_map": {"x": "/etc/passwd"}}, "not a plain file name"),
        ({"weight_map": {"x": ".."}}, "not a plain file name"),
        ({"weight_map": {"x": "a\\b"}}, "not a plain file name"),
        ({"weight_map": {"x": ""}}, "not a plain file name"),
        ({"weight_map": {"x": "a\0b"}}, "not a plain file name"),
        ({"weight_map": {"x": "shard-0", "y": "shard-0"}}, "names other tensors than its shards hold: 'y'"),
        ({"weight_map": {"y": "shard-0"}}, "'x', 'y'"),
        ({"weight_map": ["shard-0"]}, "weight_map"),
        ({"weight_map": {"x": 0}}, "weight_map"),
        ({}, "weight_map"),
        ([], "no object at its top"),
    ],
)
def test_bad_shard_indices_are_refused(index, message, tmp_path):
    write_safetensors(tmp_path / "shard-0", {"x": torch.ones(2)}, PT)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message.replace("\\", "\\\\")):
        read_folder(tmp_path)


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["torch.save", "plain pickle", "legacy"])
def test_a_malicious_pickle_does_not_run(form, folder):
    (folder / "model.safetensors").unlink()
    bomb, path = {"shared.weight": Bomb(folder / "ran")}, folder / "pytorch_model.bin"
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(bomb))
    else:
        torch.save(bomb, path, _use_new_zipfile_serialization=form == "torch.save")
    with pytest.raises(ValueError, match="pytorch_model.bin: refused") as refusal:
        load(folder)
    assert not (folder / "ran").exists() and "\n" not in str(refusal.value)
    pickle.loads(pickle.dumps(bomb))
    assert (folder / "ran").exists()  # it would have run


ONES = torch.ones(2, 2)
NO_TENSORS = [[ONES], {1: ONES}, {"x": 3}, {"x": ONES.to_sparse()}, {"x": ONES.to("meta")}]


@pytest.mark.parametrize("content", NO_TENSORS)
def test_torch_files_of_anything_but_named_dense_tensors_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin: "):
        read_folder(tmp_path)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_whose_layout_is_a_dense_ones_is_refused(tmp_path):
    torch.save({"x": torch.nested.nested_tensor([ONES])}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin: holds more than dense tensors"):
        read_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"junk" * 100, pickle.dumps(None)])
def test_damaged_torch_files_are_refused(content, tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match="pytorch_model.bin: "):
        read_folder(tmp_path)


# ------------------------------------------------------------------------------------------------ fingerprint


def test_fingerprint_tells_bases_apart_and_reads_little(folder):
    first = fingerprint(folder)
    assert len(first) == 16 and fingerprint(folder) == first
    weights = {name: tensor.clone() for name, tensor in read_folder(folder).items()}
    weights["decoder.final_layer_norm.weight"][0] += 1e-3
    write_safetensors(folder / "model.safetensors", weights, PT)
    second = fingerprint(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"layer_norm_epsilon": 1e-5}))
    third = fingerprint(folder)
    assert len({first, second, third}) == 3
    (folder / "config.json").write_text(json.dumps(values | {"use_cache": False, "dropout_rate": 0.5}))
    assert fingerprint(folder) == second  # keys that change nothing here
    weights["shared.weight"].view(-1)[1] += 1  # of 37 x 32 values every second is read
    write_safetensors(folder / "model.safetensors", weights, PT)
    assert fingerprint(folder) == second
