"""checkpoint.py: folders, equal bytes, hostile files.

parity/test_transformers.py compares folders with those of transformers.
"""

import re

import pytest
import torch

import checkpoint
from checkpoint import load, read_folder, save, write_safetensors
from helpers import (
    PT,
    ROOT,
    T5_CONFIGS,
    check_equal,
    random_t5,
    refusal,
    small_model,
    t5_batch,
    weights_of,
)
from support.program import UserError, read_json, write_json


def change_config(folder, **changes):
    path = folder / "config.json"
    write_json(path, read_json(path) | changes)


def write_weights(folder, weights):
    write_safetensors(folder / "model.safetensors", weights, PT)


def check_refused(read, path, words=""):
    """Reading must raise a short error of one line that names the path first."""
    with refusal(f"^{re.escape(str(path))}.*: .*{words}"):
        read(path)


@pytest.fixture
def folder(tmp_path):
    """Return the folder of a T5 whose head is the embedding table."""
    save(random_t5(T5_CONFIGS["v1.0"]), tmp_path)
    return tmp_path


# ------------------------------------------------------------------------------ files of tensors


def test_tensors_come_back_and_their_order_does_not_matter(tmp_path):
    state = {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4, dtype=torch.bool)}
    state["strided"] = torch.arange(24).view(4, 6).T[::2]
    state["bfloat16"] = torch.arange(6).bfloat16()
    write_safetensors(tmp_path / "a", state, {"about": "é"})
    write_safetensors(tmp_path / "b", dict(reversed(state.items())), {"about": "é"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    found, metadata = checkpoint.read_safetensors(tmp_path / "a")
    check_equal(found, state)
    assert metadata == {"about": "é"}


# --------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_weights_have_one_dtype_whatever_those_of_the_file(dtype, folder):
    weights = weights_of(folder)
    for name in weights:
        if "wo" in name:
            weights[name] = weights[name].half()
    write_weights(folder, weights)
    assert {weight.dtype for weight in load(folder, dtype=dtype).parameters()} == {dtype}


def test_load_refuses_a_t5_in_float16(folder):
    with refusal("a T5 overflows in float16; use bfloat16 or"):
        load(folder, dtype=torch.float16)


def test_training_of_a_loaded_base_leaves_the_file_alone(folder):
    before = (folder / "model.safetensors").read_bytes()
    t5 = load(folder)
    t5.loss(*t5_batch()).backward()
    torch.optim.SGD(t5.parameters(), lr=1e-3).step()
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_base_is_saved_over_the_file_that_its_weights_are_mapped_from(folder):
    t5 = load(folder)
    with torch.no_grad():
        t5.embedding.weight.add_(1)
    save(t5, folder)
    # transformers 4 asks for these metadata.
    assert checkpoint.read_safetensors(folder / "model.safetensors")[1] == PT
    check_equal(load(folder).state_dict(), t5.state_dict())


def test_a_saved_base_has_the_config_that_it_was_loaded_with(folder, tmp_path):
    change_config(folder, task_specific_params={"a": 1}, dtype="float16")
    before = read_json(folder / "config.json")
    save(load(folder), tmp_path / "saved")
    del before["dtype"]  # transformers takes that of the weights
    assert read_json(tmp_path / "saved/config.json") == before


def test_a_base_without_a_config_cannot_be_saved(folder, tmp_path):
    base = load(folder)
    base.hf_config = None
    with refusal("^hf_config: the backbone was not loaded"):
        save(base, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    "kind, eos, expected",
    [("qwen2", [7, 5], (7, 5)), ("qwen2", 7, (7,)), ("qwen2", None, (3,)), ("v1.0", [1], (1,))],
)
def test_a_decoder_has_the_eos_ids_of_generation_config(kind, eos, expected, tmp_path):
    """A T5 does not read that file."""
    save(small_model(kind), tmp_path)
    path = tmp_path / "generation_config.json"
    write_json(path, {"eos_token_id": eos})
    loaded = load(tmp_path)
    assert loaded.config.eos_ids == expected

    path.unlink()
    save(loaded, tmp_path)
    assert load(tmp_path).config == loaded.config


@pytest.mark.parametrize("eos", ["7", [7, None], True])
def test_eos_ids_that_are_no_integers_are_refused(eos, tmp_path):
    save(small_model("qwen2"), tmp_path)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": eos})
    with refusal("config.json: eos_ids: .* has the wrong type", UserError):
        load(tmp_path)


@pytest.mark.parametrize("name", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"])
def test_the_table_may_be_stored_under_either_stack(name, folder):
    before = load(folder).state_dict()
    weights = weights_of(folder)
    weights[name] = weights.pop("shared.weight")
    write_weights(folder, weights)
    check_equal(load(folder).state_dict(), before)


@pytest.mark.parametrize(
    "tie_word_embeddings, difference, is_tied",
    [(True, 0, True), (False, 0, False), (True, 1, False)],
)
def test_a_head_that_equals_the_table_is_tied_unless_the_config_says_otherwise(
    tie_word_embeddings, difference, is_tied, folder
):
    weights = weights_of(folder)
    weights["lm_head.weight"] = weights["shared.weight"] + difference
    write_weights(folder, weights)
    change_config(folder, tie_word_embeddings=tie_word_embeddings)
    assert load(folder).config.tied_head is is_tied


def test_safetensors_are_preferred_to_torch_files(folder):
    (folder / "pytorch_model.bin").write_bytes(b"")
    load(folder)


# -------------------------------------------------------------------------------------- refusals


def test_a_torch_file_without_names_is_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save([torch.ones(2, 2)], path)
    check_refused(checkpoint.read_tensors, path)


def test_a_damaged_torch_file_is_named_once(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1")  # git left the weights out
    with refusal("refused, it is damaged") as caught:
        checkpoint.read_tensors(path)
    assert str(caught.value).count(path.name) == 1


def test_a_tensor_is_read_from_the_shard_that_the_index_names(tmp_path):
    shard_of = {"x": "b.safetensors", "y": "c.safetensors"}
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": shard_of})
    for number, shard in enumerate("abc"):
        tensors = {name: torch.full((2,), number) for name in "xy"}
        write_safetensors(tmp_path / f"{shard}.safetensors", tensors, PT)
    found = {name: tensor.tolist() for name, tensor in read_folder(tmp_path).items()}
    assert found == {"x": [1, 1], "y": [2, 2]}


NAMES = ["../model.safetensors", "/etc/passwd", "..", "a\\b", "", "a\n"]
INDICES = [[], {}, {"weight_map": ["shard"]}, {"weight_map": {"x": 0}}]
INDICES += [{"weight_map": {"x": name}} for name in NAMES]


@pytest.mark.parametrize("index", INDICES)
def test_an_index_that_is_damaged_or_leads_out_of_its_folder_is_refused(index, tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    write_json(path, index)
    check_refused(lambda _: read_folder(tmp_path), path)


WI = "decoder.block.0.layer.2.DenseReluDense.wi.weight"
DO_NOT_FIT = [  # changes of config.json and of the tensors
    ({"num_layers": 3}, {}, "missing tensor 'encoder.block.2"),
    ({}, {"junk": torch.ones(2)}, r"unexpected tensors \(1\): \['junk'\]"),
    ({}, {WI: torch.ones(48, 31)}, r"wi.* shape torch.Size\(\[48, 31\]\)"),
    ({"num_layers": 10**9}, {}, "blocks are more than 1000"),
    ({"d_model": 2**62, "d_ff": 2**62}, {}, ""),  # more bytes than 64 bits count
]


@pytest.mark.parametrize("config, tensors, words", DO_NOT_FIT)
def test_load_refuses_weights_that_do_not_fit(config, tensors, words, folder):
    change_config(folder, **config)
    write_weights(folder, weights_of(folder) | tensors)
    check_refused(load, folder, words)


def test_load_refuses_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    check_refused(load, folder, "no weights")


# ----------------------------------------------------------------------------------- fingerprint


def test_fingerprint_of_the_bundled_base_stays():
    assert load(ROOT / "tiny").fingerprint == "3e15fe89e93a5f49"  # runs are bound to it


def test_fingerprint_depends_on_config_and_weights_and_reads_little(folder):
    first = load(folder).fingerprint
    weights = weights_of(folder)
    weights["decoder.final_layer_norm.weight"][0] += 1e-3
    write_weights(folder, weights)
    second = load(folder).fingerprint

    # Every second of the 37 x 32 values is read. These fields change nothing here.
    weights["shared.weight"].view(-1)[1] += 1
    write_weights(folder, weights)
    change_config(folder, use_cache=False, dropout_rate=0.5)
    assert load(folder).fingerprint == second

    change_config(folder, layer_norm_epsilon=1e-5)
    assert len({first, second, load(folder).fingerprint}) == 3
