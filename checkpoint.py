"""Weights in and out: safetensors files (own reader and writer, format of huggingface/safetensors, whose
header is checked before anything is believed), torch files (weights_only), and T5 folders in Hugging Face's
layout, loaded through a key table that accounts for every tensor. Whatever is wrong with a file is a
ValueError of one line. Test: pytest tests/test_checkpoint.py"""

import functools
import hashlib
import json
import math
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

import runtime
from t5 import T5, T5Config

# ------------------------------------------------------------------------------------------------ safetensors

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_HEADER = 100_000_000  # bytes; the limit of the official reader


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, and the file's metadata. The tensors are views of a private memory map: nothing is
    read before it is used, and writing to a tensor changes this process's page and never the file."""
    header, start, size = _read_header(path)
    metadata = header.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise ValueError(f"{path}: __metadata__ must map names to strings")
    extents = {name: _extent(path, name, entry) for name, entry in header.items()}
    end = 0
    for name, (_, _, begin, stop) in sorted(extents.items(), key=lambda item: item[1][2:]):
        if begin != end:
            fault = "a gap" if begin > end else "an overlap"
            raise ValueError(f"{path}: tensor {name!r:.60} begins at byte {begin} and not at {end}: {fault}")
        end = stop
    if start + end != size:
        raise ValueError(f"{path}: cut or damaged: the header describes {start + end} bytes of {size}")
    storage = torch.UntypedStorage.from_file(str(path), False, size)  # False: private, copy on write
    data = torch.empty(0, dtype=torch.uint8).set_(storage)
    tensors = {}
    for name, (dtype, shape, begin, stop) in extents.items():
        raw = data[start + begin : start + stop]
        if (start + begin) % dtype.itemsize:
            raw = raw.clone()  # by writers that pad nothing; a view must begin at a multiple of the item size
        tensors[name] = raw.view(dtype).view(shape)
    return tensors, metadata


def _read_header(path: str | Path) -> tuple[dict, int, int]:
    """The JSON header, the position of the first byte of data, and the size of the file."""
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise ValueError(f"{path}: not a safetensors file (header of {length} bytes, file of {size})")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=runtime.without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the safetensors header is not valid JSON ({error!s:.80})") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the safetensors header must be a JSON object")
    return header, 8 + length, size


def _extent(path: str | Path, name: str, entry: object) -> tuple[torch.dtype, list[int], int, int]:
    """Header entry -> dtype, shape, first and last byte (exclusive) in the data; checked against one
    another."""

    def whole(values: object) -> bool:  # bool is an int to isinstance, and a float may be 3.0
        return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)

    tensor = f"{path}: tensor {name!r:.60}"
    if not (isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}):
        raise ValueError(f"{tensor} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(dtype, str) and dtype in DTYPES):
        raise ValueError(f"{tensor} has dtype {dtype!r:.30}; known are {', '.join(DTYPES)}")
    # The product of the sizes above 0 is bounded too: [0, 2^62, 2^62] is empty, but its strides overflow.
    if not (whole(shape) and len(shape) <= 64 and math.prod(max(1, length) for length in shape) < 2**60):
        raise ValueError(f"{tensor} has the impossible shape {shape!r:.60}")
    if not (whole(offsets) and len(offsets) == 2):
        raise ValueError(f"{tensor} has the impossible data_offsets {offsets!r:.60}")
    begin, stop = offsets
    if stop - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{tensor} is {dtype} {shape!r:.60}, which does not fill bytes {begin} to {stop}")
    return DTYPES[dtype], shape, begin, stop


def write_safetensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None):
    """Atomic, and the same bytes for the same tensors. Larger item sizes come first, so that all data is
    aligned."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in order:
        tensor = tensors[name]
        dtype, shape = tensor.dtype, list(tensor.shape)
        if dtype not in NAMES or tensor.layout != torch.strided or tensor.is_meta:
            kind = f"{dtype}, {tensor.layout}, {tensor.device}"
            raise ValueError(f"{path}: tensor {name!r} cannot be stored ({kind})")
        begin, end = end, end + tensor.numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    with runtime.atomic_write(path) as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name in order:
            file.write(_raw(tensors[name]))


def _raw(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


# ------------------------------------------------------------------------------------------ files and folders


def _open(path: str | Path):
    try:
        return open(path, "rb")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


def _unpickle(path: str | Path) -> object:
    """What torch.save wrote, tensors mapped and not read. weights_only: unpickling it runs no code."""
    _open(path).close()
    try:
        mappable = zipfile.is_zipfile(path)  # the format before torch 1.6, of the oldest T5 files, is not
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an unusual pickle protocol, on two lines of its own
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except Exception as error:  # of many types, whatever a damaged or hostile pickle provokes
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"{path}: refused, not a file of tensors alone ({reason:.120})") from None


def _read_torch(path: str | Path) -> dict[str, Tensor]:
    """A file of torch.save that holds nothing but named tensors."""
    tensors = _unpickle(path)
    if not (isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)):
        raise ValueError(f"{path}: must hold a dictionary of tensors")
    for name, tensor in tensors.items():
        dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not dense:
            raise ValueError(f"{path}: entry {name!r:.60} is not a dense tensor")
    return tensors


def read_folder(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face folder: the first of model.safetensors, its sharded form,
    pytorch_model.bin, its sharded form that is there."""
    folder = Path(path)
    readers = {"model.safetensors": lambda path: read_safetensors(path)[0], "pytorch_model.bin": _read_torch}
    for file, read in readers.items():
        if (folder / file).exists():
            return read(folder / file)
        if (index := folder / f"{file}.index.json").exists():
            return _read_shards(index, read)
    raise ValueError(f"{folder}: no weights ({' or '.join(readers)}, whole or with .index.json)")


def _read_shards(index: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    content = runtime.read_json(index)
    shard_of = content.get("weight_map") if isinstance(content, dict) else None
    if not (isinstance(shard_of, dict) and all(isinstance(shard, str) for shard in shard_of.values())):
        raise ValueError(f"{index}: weight_map must map tensor names to file names")
    tensors = {}
    for shard in sorted(set(shard_of.values())):
        if shard in ("", ".", "..") or re.search(r"[/\\:\0]", shard):  # nothing may lead out of the folder
            raise ValueError(f"{index}: the shard {shard!r:.60} is not a plain file name")
        found = read(index.parent / shard)
        named = {name for name, owner in shard_of.items() if owner == shard}
        if differing := found.keys() ^ named:
            raise ValueError(f"{index.parent / shard}: not the tensors the index names: {_few(differing)}")
        tensors |= found
    return tensors


def _few(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"{name!r:.80}" for name in names[:3]) + more


# ---------------------------------------------------------------------------------------------- T5 in and out

# Hugging Face's name <-> ours, both without the ".weight" that ends every one. The words in braces are those
# below; the table is read in both directions.
KEYS = (
    ("shared", "embedding"),
    ("lm_head", "head"),
    ("{stack}.final_layer_norm", "{stack}.norm"),
    ("{stack}.block.0.layer.0.SelfAttention.relative_attention_bias", "{stack}.position"),
    ("{stack}.block.{n}.layer.0.layer_norm", "{stack}.blocks.{n}.attention_norm"),
    ("{stack}.block.{n}.layer.0.SelfAttention.{qkvo}", "{stack}.blocks.{n}.attention.{qkvo}"),
    ("encoder.block.{n}.layer.1.layer_norm", "encoder.blocks.{n}.ffn_norm"),
    ("encoder.block.{n}.layer.1.DenseReluDense.{w}", "encoder.blocks.{n}.ffn.{w}"),
    ("decoder.block.{n}.layer.1.layer_norm", "decoder.blocks.{n}.cross_norm"),
    ("decoder.block.{n}.layer.1.EncDecAttention.{qkvo}", "decoder.blocks.{n}.cross_attention.{qkvo}"),
    ("decoder.block.{n}.layer.2.layer_norm", "decoder.blocks.{n}.ffn_norm"),
    ("decoder.block.{n}.layer.2.DenseReluDense.{w}", "decoder.blocks.{n}.ffn.{w}"),
)
WORDS = {"stack": "encoder|decoder", "n": "0|[1-9][0-9]*", "qkvo": "[qkvo]", "w": "wi|wi_0|wi_1|wo"}
TO_OURS, TO_HF = KEYS, tuple((ours, theirs) for theirs, ours in KEYS)
EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # one table
IGNORED = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"}  # of old files; unused


def _rename(tensors: dict[str, Tensor], keys: Iterable[tuple[str, str]], source: object) -> dict[str, Tensor]:
    """Every tensor under the one new name that the table of (old, new) templates gives it."""

    def pattern(template: str) -> re.Pattern:
        words = re.sub(r"\\{(\w+)\\}", lambda m: f"(?P<{m[1]}>{WORDS[m[1]]})", re.escape(template))
        return re.compile(words + r"\.weight")

    rules = [(pattern(old), new + ".weight") for old, new in keys]
    renamed, unexpected = {}, []
    for name, tensor in tensors.items():
        targets = [new.format(**match.groupdict()) for rule, new in rules if (match := rule.fullmatch(name))]
        assert len(targets) <= 1, f"the key table has two rules for {name}"
        if not targets:
            unexpected.append(name)
        elif targets[0] in renamed:
            raise ValueError(f"{source}: {name} fills {targets[0]} a second time")
        else:
            renamed[targets[0]] = tensor
    if unexpected:
        raise ValueError(f"{source}: unexpected tensors: {_few(unexpected)}")
    return renamed


def _read_t5(path: str | Path) -> tuple[T5Config, dict[str, Tensor]]:
    """Config and weights (our names, the file's dtypes) of a Hugging Face folder: complete, and of the right
    shapes."""
    runtime.require_model(folder := Path(path))
    config = T5Config.from_json(folder / "config.json")
    tensors = {name: tensor for name, tensor in read_folder(folder).items() if name not in IGNORED}
    tables = [tensors.pop(name) for name in EMBEDDINGS if name in tensors]
    if tables:
        tensors["shared.weight"] = tables[0]
    # The file decides whether there is a head of its own, not tie_word_embeddings, which transformers 5
    # writes as true for every T5. Torch files store a tied head too: a copy of the table, where the config
    # ties, is no head.
    head = tensors.get("lm_head.weight")
    if head is not None and config.tied_head and tables and torch.equal(head, tables[0]):
        del tensors["lm_head.weight"]
    config = replace(config, tied_head="lm_head.weight" not in tensors)
    with torch.device("meta"):
        expected = _rename(T5(config).state_dict(), TO_HF, folder)
    for what, names in (("missing", expected.keys() - tensors), ("unexpected", tensors.keys() - expected)):
        if names:
            raise ValueError(f"{folder}: {what} tensors: {_few(names)}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or not tensor.is_floating_point():
            found, due = f"{tensor.dtype} {list(tensor.shape)}", list(expected[name].shape)
            raise ValueError(f"{folder}: {name} is {found}; config.json asks for floats {due}")
    return config, _rename(tensors, TO_OURS, folder)


def map_t5(path: str | Path) -> T5:
    """The T5 in a Hugging Face folder, in eval mode on the CPU, in the dtypes of its files: the weights are
    views of the mapped files, of which nothing is read before it is used."""
    config, weights = _read_t5(path)
    with torch.device("meta"):
        model = T5(config)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def load_t5(path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> T5:
    """The T5 in a Hugging Face folder, in eval mode. dtype None keeps the file's, but a float16 file becomes
    float32: T5 overflows in half precision. On the CPU, weights that need no conversion stay views of the
    mapped file."""
    model = map_t5(path)
    weights = list(model.parameters())
    if dtype is None:  # one for all, wide enough for each
        dtype = functools.reduce(torch.promote_types, {weight.dtype for weight in weights})
        dtype = torch.float32 if dtype == torch.float16 else dtype
    for weight in runtime.progress(weights, "reading weights", unit="tensor"):
        weight.data = weight.data.to(device, dtype).contiguous()  # no more than one tensor exists twice
    return model


def save_t5(model: T5, path: str | Path, *, dtype: torch.dtype | None = None):
    """config.json and model.safetensors as transformers reads them; `dtype` converts on the way out."""
    folder = Path(path)
    weights = _rename(model.state_dict(), TO_HF, folder)
    write_safetensors(
        folder / "model.safetensors",
        {name: weight.to(dtype or weight.dtype) for name, weight in weights.items()},
        {"format": "pt"},  # transformers 4 refuses a file without it
    )
    runtime.write_json(folder / "config.json", model.config.to_hf())


def fingerprint(path: str | Path) -> str:
    """16 hex digits that tell one base from another, whatever files it is stored in: its config, and of each
    tensor the name, dtype, shape and up to 1,024 evenly spaced values. Cheap for any size; depends on the
    stored dtype."""
    config, weights = _read_t5(path)
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for name in sorted(weights):
        weight = weights[name].contiguous().flatten()
        digest.update(f"{name} {weight.dtype} {list(weights[name].shape)}".encode())
        digest.update(_raw(weight[:: math.ceil(len(weight) / 1024)]))
    return digest.hexdigest()[:16]


# ----------------------------------------------------------------------------------- adapters, training state


def save_adapter(path: str | Path, state: dict[str, Tensor], *, method: str, config: dict, tasks: list[str],
                 base: str):
    """One safetensors file that says what it is: method, its config, the training tasks in the order of their
    ids, fingerprint of the base."""
    info = {"method": method, "config": json.dumps(config), "tasks": json.dumps(tasks), "base": base}
    write_safetensors(path, state, info)


def load_adapter(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """State and {method, config, tasks, base} of a file of save_adapter."""
    state, info = read_safetensors(existing(path, "name the folder of a run that has kept an adapter"))
    try:
        config, tasks = json.loads(info["config"]), json.loads(info["tasks"])
        read = {"method": info["method"], "base": info["base"], "config": config, "tasks": tasks}
        good = isinstance(config, dict) and isinstance(tasks, list) and all(isinstance(t, str) for t in tasks)
    except (KeyError, ValueError, RecursionError):
        good = False
    if not good:
        raise ValueError(f"{path}: not an adapter of this project (no method, config, tasks, base)")
    return state, read


def save_state(path: str | Path, state: dict):
    """Everything that training resumes from, whole or not at all."""
    with runtime.atomic_write(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's complaint about what a failed write left behind
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_state(path: str | Path) -> dict:
    """What save_state wrote; ValueError for anything else."""
    state = _unpickle(path)
    kinds = {"step": int, "best": float, "tokens": int, "weights": dict, "optimizer": dict}
    if not (isinstance(state, dict) and all(isinstance(state.get(k), kind) for k, kind in kinds.items())):
        raise ValueError(f"{path}: not a training state of this project ({', '.join(kinds)}); restore it")
    return state


def existing(path: str | Path, remedy: str) -> Path:
    """`path`, or a ValueError that says what to do where it is not there."""
    if not Path(path).exists():
        raise ValueError(f"{path}: not there; {remedy}")
    return Path(path)
