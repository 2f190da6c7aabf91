"""Weights in and out: files of tensors, and Hugging Face folders.

A Hugging Face folder holds config.json and the weights: a safetensors file or a torch file, whole
or in shards. Each family (t5.py, llama.py) brings its config and a table of rename rules. Loading
checks that every tensor of the files has a place in the model (or is one that the family does not
use), that every place has a tensor, and that all shapes are equal. A damaged or foreign file raises
one UserError that names the file.

Test: pytest tests/unit/test_checkpoint.py
"""

import hashlib
import json
import math
import pickle
import re
import warnings
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from llama import Llama
from model import Backbone
from support import program
from support.program import UserError
from t5 import T5

# By model_type, as config.json has it.
FAMILIES = {"t5": T5, "llama": Llama, "mistral": Llama, "qwen2": Llama, "qwen3": Llama}
FAMILY_OF_CONFIG = {family.Config: family for family in FAMILIES.values()}
LARGEST_DEPTH = 1000  # blocks of a model

# ----------------------------------------------------------------------------- files of tensors


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file by name, and the metadata of the file.

    The tensors are views of a private memory map: no value is read before it is used, and writing
    to a tensor changes the memory of this process but never the file.
    """
    with program.reading(path):
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return tensors, file.metadata() or {}


def write_safetensors(
    path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write a safetensors file. The same content always gives the same bytes.

    metadata: only one entry, since the package writes several in an order that changes.
    """
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with program.atomic_write(path) as file:
        file.write(safetensors.torch.save(contiguous, metadata))


def read_torch(path: str | Path) -> Any:
    """Return what torch.save wrote: tensors in dicts and lists, numbers and strings.

    Tensors are mapped: no value is read before it is used. The file cannot run code.
    """
    with program.reading(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of unusual pickle protocols
        # Files from before torch 1.6, as the oldest of T5 are, are no zip and cannot be mapped.
        mmap = zipfile.is_zipfile(path)
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError:
            # torch's own message advises to load the file in a way that does run code.
            raise ValueError("refused, it is damaged or holds more than tensors") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file or, with any other ending, a torch file."""
    if path.suffix == ".safetensors":
        tensors, _ = read_safetensors(path)
        return tensors

    content = read_torch(path)
    with program.reading(path):
        if not isinstance(content, dict):
            raise ValueError("holds no tensors with names")
        return content


def read_folder(folder: str | Path) -> dict[str, Tensor]:
    """Return all tensors of a Hugging Face folder, from safetensors if there are both formats."""
    folder = Path(folder)
    for name in ("model.safetensors", "pytorch_model.bin"):
        whole = folder / name
        index = folder / f"{name}.index.json"
        if whole.exists():
            return read_tensors(whole)
        if index.exists():
            return _read_shards(index)
    raise UserError(
        f"{folder}: no weights here; add model.safetensors or pytorch_model.bin, whole or in shards"
    )


def _read_shards(index):
    """Return the tensors that an index file names, each from the shard that it names."""
    values = program.read_json(index)
    with program.reading(index):
        shard_of = values["weight_map"]
        shards = sorted(set(shard_of.values()))
        for shard in shards:
            # A path could lead out of the folder.
            if not re.fullmatch(r"\w[\w.-]*", shard):
                raise ValueError(f"the shard {shard!r:.60} is not a plain file name")

    tensors = {}
    for shard in shards:
        for name, tensor in read_tensors(index.parent / shard).items():
            if shard_of.get(name) == shard:
                tensors[name] = tensor
    return tensors


# ------------------------------------------------------------------------------ models in and out


def read_values(folder: Path) -> dict[str, Any]:
    """Return the values of config.json of a Hugging Face folder.

    As in transformers, a decoder ends at the EOS ids of generation_config.json, if this file names
    any. Those of Qwen's chat models are more than config.json has.
    """
    values = program.read_json(folder / "config.json")
    path = folder / "generation_config.json"
    if values.get("model_type") != "t5" and path.exists():
        eos = program.read_json(path).get("eos_token_id")
        if eos is not None:
            values["eos_token_id"] = eos
    return values


def read_config(folder: str | Path) -> Any:
    """Return what config.json of a Hugging Face folder describes: a T5Config or LlamaConfig."""
    folder = program.require_path(folder, program.DOWNLOAD)
    path = folder / "config.json"
    values = read_values(folder)
    with program.reading(path, "restore the file, or name another model"):
        model_type = values.get("model_type")
        supported = list(FAMILIES)
        if model_type not in supported:
            raise ValueError(f"model_type {model_type!r:.60} is none of {', '.join(supported)}")
        config = FAMILIES[model_type].Config.from_hf(values)
        program.from_json(type(config), vars(config))  # ValueError for a value of another type
        # Modules take memory even without their weights: about 100 kB a block.
        if config.num_blocks > LARGEST_DEPTH:
            raise ValueError(f"{config.num_blocks} blocks are more than {LARGEST_DEPTH}")
        return config


def on_meta(config: Any) -> Backbone:
    """Return the model of a config on the meta device: names and shapes, but no values."""
    family = FAMILY_OF_CONFIG[type(config)]
    with torch.device("meta"):
        return family(config)


def hf_name(module: nn.Module, name: str) -> str:
    """Return Hugging Face's name of a parameter.

    For a submodule give its name with a dot behind it. A Backbone has rename rules; the names of
    any other module stay as they are.
    """
    for pattern, replacement in getattr(module, "renames", ()):
        name = re.sub(pattern, replacement, name)
    return name


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
) -> Backbone:
    """Return the model in a Hugging Face folder, in eval mode.

    dtype: that of all weights, None for those of the files. On the CPU, weights that have their
    dtype already are views of the files: beside the sample for the fingerprint, no value is read
    before it is used. Raise UserError for a T5 in float16, in which its activations overflow.
    """
    folder = Path(folder)
    config = read_config(folder)
    tensors = read_folder(folder)

    # Every parameter gets one tensor, and every tensor is used once. torch compares the shapes.
    with program.reading(folder):
        family = FAMILY_OF_CONFIG[type(config)]
        config = family.tidy(config, tensors)
        backbone = on_meta(config)  # fails for sizes beyond 64 bits
        state = {}
        for name in backbone.state_dict():
            source = hf_name(backbone, name)
            if source not in tensors:
                raise ValueError(f"missing tensor {source!r}")
            state[name] = tensors.pop(source)
        if tensors:
            raise ValueError(f"unexpected tensors ({len(tensors)}): {sorted(tensors)[:3]}")
        backbone.load_state_dict(state, assign=True)
    if isinstance(backbone, T5) and dtype == torch.float16:
        raise UserError(f"{folder}: a T5 overflows in float16; use bfloat16 or float32")
    backbone.hf_config = read_values(folder)
    backbone.fingerprint = fingerprint(backbone)
    return backbone.to(device=device, dtype=dtype).eval()


def save(backbone: Backbone, folder: str | Path) -> None:
    """Write model.safetensors, and the config.json that the backbone was loaded with.

    It has the EOS ids of generation_config.json, see `read_values`, and no dtype: transformers
    takes that of the weights. Raise ValueError for a backbone that was made in another way and has
    no `hf_config`.
    Detach the adapters first: their tensors would be written too, and `load` refuses them.
    """
    if backbone.hf_config is None:
        raise ValueError("hf_config: the backbone was not loaded; give it values of a config.json")
    values = dict(backbone.hf_config)
    for name in ("dtype", "torch_dtype"):
        values.pop(name, None)
    folder = Path(folder)
    state = backbone.state_dict()
    tensors = {hf_name(backbone, name): weight for name, weight in state.items()}
    # transformers 4 refuses a file without this entry.
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    program.write_json(folder / "config.json", values)


def fingerprint(backbone: Backbone) -> str:
    """Return 16 hex digits that tell one base from another, in whatever files it is stored.

    They cover the config and, of each tensor, name, dtype, shape and up to 1,024 evenly spaced
    values. They detect mistakes, not malice.
    """
    digest = hashlib.sha256(json.dumps(asdict(backbone.config), sort_keys=True).encode())
    for name, weight in sorted(backbone.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        stride = math.ceil(weight.numel() / 1024)
        sample = weight.flatten()[::stride].contiguous()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
