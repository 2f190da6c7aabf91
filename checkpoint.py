"""Weights in and out, whatever the family: Hugging Face folders (safetensors or torch files, whole or in
shards), adapters, PEFT folders. A family brings its config and one list of renames; every tensor of a file
must have its place, and every place its tensor. What is wrong with a file is a ValueError of one line that
names it, or the system's own OSError. Test: pytest tests/test_checkpoint.py"""

import hashlib
import json
import math
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import runtime
from llama import Llama
from model import Backbone
from orchmoe import Adapters, SkillLinear
from t5 import T5

FAMILIES = {"t5": T5, **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), Llama)}  # by model_type
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# ------------------------------------------------------------------------------------------ files of tensors


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, and the file's metadata. The tensors are views of a private memory map: nothing is
    read before it is used, and writing to a tensor changes this process's page and never the file."""
    open(path, "rb").close()  # an OSError that names the file; the package's names none
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except Exception as error:  # the package's own, and torch's where it has no such dtype or shape
        raise ValueError(f"{path}: not a whole safetensors file ({_line(error)}); restore it") from None


def write_safetensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Atomic. `metadata` has one key: the package writes several in another order in each process, and the
    same content shall be the same bytes."""
    assert len(metadata) == 1
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with runtime.atomic_write(path) as file:
        file.write(safetensors.torch.save(tensors, metadata))


def _line(error: Exception) -> str:
    return f"{' '.join(str(error).split()):.150}"


def unpickle(path: str | Path) -> Any:
    """What torch.save wrote, tensors mapped and not read. weights_only: unpickling it runs no code."""
    open(path, "rb").close()
    try:
        mappable = zipfile.is_zipfile(path)  # the format before torch 1.6, of the oldest T5 files, is not
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an unusual pickle protocol, on two lines of its own
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except Exception as error:  # of many types, whatever a damaged or hostile pickle provokes
        raise ValueError(f"{path}: refused, not a file of tensors alone ({_line(error)})") from None


def _read_torch(path: str | Path) -> dict[str, Tensor]:
    """A file of torch.save that holds nothing but named tensors."""
    tensors = unpickle(path)
    for name, tensor in tensors.items() if isinstance(tensors, dict) else [(0, None)]:
        dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_nested
        if not (isinstance(name, str) and dense and tensor.device.type == "cpu"):
            raise ValueError(f"{path}: holds more than dense tensors by name ({name!r:.60})")
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
    shard_of = runtime.read_json(index).get("weight_map")
    if not (isinstance(shard_of, dict) and all(isinstance(shard, str) for shard in shard_of.values())):
        raise ValueError(f"{index}: weight_map must map tensor names to file names")
    tensors = {}
    for shard in sorted(set(shard_of.values())):
        if shard in ("", ".", "..") or re.search(r"[/\\:\0]", shard):  # nothing may lead out of the folder
            raise ValueError(f"{index}: the shard {shard!r:.60} is not a plain file name")
        tensors |= read(index.parent / shard)
    if differing := tensors.keys() ^ shard_of.keys():
        raise ValueError(f"{index}: names other tensors than its shards hold: {_few(differing)}")
    return tensors


def _few(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(f"{name!r:.80}" for name in names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


# --------------------------------------------------------------------------------------- models in and out


def config(path: str | Path) -> Any:
    """What the config.json of a Hugging Face folder describes; ValueError names file and field."""
    values = runtime.read_json(file := runtime.existing(path) / "config.json")
    kind = values.get("model_type")
    if not (isinstance(kind, str) and kind in FAMILIES):
        raise ValueError(f"{file}: model_type is {kind!r:.60}; supported are {', '.join(FAMILIES)}")
    try:
        return FAMILIES[kind].Config.from_hf(values)
    except (TypeError, ValueError) as error:  # TypeError: a field is missing
        raise ValueError(f"{file}: {_line(error)}") from None


def hf_name(module: nn.Module, name: str) -> str:
    """Hugging Face's name of what is called so in a Backbone; any other module's names are its own."""
    for pattern, new in getattr(module, "renames", ()):
        name = re.sub(pattern, new, name)
    return name


def load(path: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
         ) -> Backbone:  # fmt: skip
    """The model in a Hugging Face folder, in eval mode; on the CPU weights of this dtype stay mapped."""
    backbone = mapped(path)
    for weight in runtime.progress(list(backbone.parameters()), "reading weights", unit="tensor"):
        weight.data = weight.data.to(device, dtype).contiguous()  # no more than one tensor exists twice
    return backbone


def mapped(path: str | Path) -> Backbone:
    """The same with all weights as views of the files, in their dtypes: nothing is read before it is used."""
    folder, described, tensors = Path(path), config(path), read_folder(path)
    family = next(family for family in FAMILIES.values() if isinstance(described, family.Config))
    # Modules take time and memory even without their weights, and each block has a tensor of its own.
    if (count := described.num_blocks) > len(tensors):
        raise ValueError(f"{folder}: config.json has {count} blocks, the weights have {len(tensors)} tensors")
    # On the meta device nothing of the size that config.json describes is allocated.
    try:
        described = family.tidy(described, tensors)
        with torch.device("meta"):
            backbone = family(described)
    except (RuntimeError, TypeError) as error:  # sizes beyond 64 bits
        raise ValueError(f"{folder / 'config.json'}: {_line(error)}") from None
    expected = backbone.state_dict()
    names = {ours: hf_name(backbone, ours) for ours in expected}
    if missing := set(names.values()) - tensors.keys():
        raise ValueError(f"{folder}: missing tensors: {_few(missing)}")
    if unexpected := tensors.keys() - set(names.values()):
        raise ValueError(f"{folder}: unexpected tensors: {_few(unexpected)}")
    # Shapes here and not by load_state_dict, whose message has a line for each tensor and our names.
    for ours, theirs in names.items():
        found, due = tensors[theirs], expected[ours]
        if found.shape != due.shape or found.dtype not in FLOATS:
            found, due = f"{found.dtype} {list(found.shape)}", list(due.shape)
            raise ValueError(f"{folder}: {theirs} is {found:.90}; config.json asks for floats {due}")
    backbone.load_state_dict({ours: tensors[theirs] for ours, theirs in names.items()}, assign=True)
    return backbone.eval()


def save(backbone: Backbone, folder: str | Path) -> None:
    """config.json and model.safetensors as transformers reads them; ValueError with adapters attached."""
    with torch.device("meta"):
        bare = type(backbone)(backbone.config)
    names, weights = {ours: hf_name(bare, ours) for ours in bare.state_dict()}, backbone.state_dict()
    if odd := weights.keys() ^ names:
        raise ValueError(f"{folder}: not saved, {_few(odd)} is no weight of the base; detach the adapters")
    tensors = {names[ours]: weight for ours, weight in weights.items()}
    # transformers 4 refuses a file without this format
    write_safetensors(Path(folder) / "model.safetensors", tensors, {"format": "pt"})
    runtime.write_json(Path(folder) / "config.json", backbone.config.to_hf())


def fingerprint(path: str | Path) -> str:
    """16 hex digits that tell one base from another, whatever files it is stored in: of the config and, of
    each tensor, name, dtype, shape and up to 1,024 evenly spaced values; docs/security.md says why."""
    backbone = mapped(path)
    digest = hashlib.sha256(json.dumps(asdict(backbone.config), sort_keys=True).encode())
    for name, weight in sorted(backbone.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        sample = weight.flatten()[:: math.ceil(weight.numel() / 1024)].contiguous()
        digest.update(sample.view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------------------------- adapters


def save_adapter(path: str | Path, state: dict[str, Tensor], *, method: str, config: dict, tasks: list[str],
                 base: str) -> None:  # fmt: skip
    """One safetensors file that says what it is: method, its config, the training tasks in the order of their
    ids, fingerprint of the base."""
    metadata = {"method": method, "config": config, "tasks": tasks, "base": base}
    write_safetensors(path, state, {"adapter": json.dumps(metadata)})


def load_adapter(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """State and {method, config, tasks, base} of a file of save_adapter."""
    path = runtime.existing(path, "name the folder of a run that has kept an adapter")
    state, metadata = read_safetensors(path)
    try:
        read = json.loads(metadata.get("adapter", ""))
    except (ValueError, RecursionError):
        read = None
    kinds = {"method": str, "config": dict, "tasks": list, "base": str}
    if not (isinstance(read, dict) and all(isinstance(read.get(k), kind) for k, kind in kinds.items())):
        raise ValueError(f"{path}: no adapter of this version; train it again")
    return state, read


# --------------------------------------------------------------------------------------- LoRAs in PEFT's form

LORA_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Fields of adapter_config.json with which an adapter is more than W + scale B A in the Linears it names.
REFUSED = ("use_dora", "use_qalora", "lora_bias", "fan_in_fan_out", "modules_to_save", "rank_pattern",
           "alpha_pattern", "layer_replication", "trainable_token_indices", "target_parameters",
           "alora_invocation_tokens")  # fmt: skip


class Lora(NamedTuple):
    """A LoRA that adds B A to the weight of each Linear, by the Linear's name in transformers."""

    factors: dict[str, tuple[Tensor, Tensor]]  # A (r,D), B (O,r) with the scale in it
    rank: int
    base: str  # name or folder of the base, as whoever made it called it
    folder: str


def _linears(adapters: Adapters) -> dict[str, SkillLinear]:
    """The adapted Linears by their names in transformers."""
    return {hf_name(adapters._module[0], f"{name}.")[:-1]: each for name, each in adapters.linears.items()}


@torch.no_grad()
def save_peft(adapters: Adapters, w: Tensor | None, folder: str | Path, base: str, *,
              ranks: Sequence[int] = ()) -> int:  # fmt: skip
    """Writes the LoRA that the skills are under ONE routing, w (K,) or, for a method without a router, None,
    as PEFT reads it, and returns its rank r: S R, filled up with zeros to the first of `ranks` that is no
    less. The scale is in B, so lora_alpha = r, one for all Linears: servers drop what says otherwise. base:
    what a server knows the base by. ValueError where no LoRA is this routing, or all of `ranks` are less."""
    linears, module = _linears(adapters), adapters._module[0]
    factors = any(linear.skill_mix.__name__ == "mix_factors" for linear in linears.values())
    least, tensors = max(linear.skill_A.shape[:2].numel() for linear in linears.values()), {}
    r = next((rank for rank in ranks or (least,) if rank >= least), 0)
    if reason := (adapters.unfoldable() or factors * "skills that mix their factors are no LoRA of rank S R"
                  or (r == 0) * f"its rank {least} is above all that were to be filled up to, {ranks}"):
        raise ValueError(f"{folder}: not written: {reason}")
    for (c,), (name, linear) in zip(adapters.route(w=w).c, linears.items(), strict=True):  # of one sample
        A = linear.skill_A.flatten(0, 1)  # (S R,D)
        B = (linear.skill_scale * c[:, None, None] * linear.skill_B).flatten(0, 1).T  # (O,S R)
        key, pad = f"base_model.model.{name}.lora_", r - len(A)
        tensors[f"{key}A.weight"], tensors[f"{key}B.weight"] = F.pad(A, (0, 0, 0, pad)), F.pad(B, (0, pad))
    write_safetensors(Path(folder) / "adapter_model.safetensors", tensors, {"format": "pt"})
    runtime.write_json(Path(folder) / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "SEQ_2_SEQ_LM" if hasattr(module, "encoder") else "CAUSAL_LM",
        "base_model_name_or_path": base, "r": r, "lora_alpha": r, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in linears}), "inference_mode": True})
    return r


def load_peft(folder: str | Path) -> Lora:
    """A PEFT folder of a plain LoRA; ValueError names the file and the field of what it is beyond that."""
    path = Path(folder) / "adapter_config.json"
    values = runtime.read_json(runtime.existing(path, "name the folder of a LoRA as peft saves it"))
    starts = (None, True, False, "gaussian", "eva", "orthogonal")  # others change the base: pissa, loftq, ..
    plain = {"peft_type": ("LORA",), "bias": (None, "none"), "init_lora_weights": starts,
             **dict.fromkeys(REFUSED, (None, False, {}, []))}
    for name, allowed in plain.items():
        if (value := values.get(name)) not in allowed:
            raise ValueError(f"{path}: {name} {value!r:.60}: not a plain LoRA, which alone can be a skill")
    r, alpha, base = (values.get(name) for name in ("r", "lora_alpha", "base_model_name_or_path"))
    good = type(r) is int and 0 < r < 10**6 and type(alpha) in (int, float) and abs(alpha) < 1e9
    if not (good and isinstance(base, str)):
        raise ValueError(f"{path}: r {r!r:.40}, lora_alpha {alpha!r:.40}, base_model_name_or_path "
                         f"{base!r:.40}: expected a whole number above 0, a number, a text")
    scale = alpha / (math.sqrt(r) if values.get("use_rslora") else r)
    path = Path(folder) / "adapter_model.safetensors"
    tensors = read_safetensors(path)[0] if path.exists() else _read_torch(path := path.with_suffix(".bin"))
    sides: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    for key, tensor in tensors.items():
        match = LORA_KEY.fullmatch(key)
        fits = match and tensor.dim() == 2 and tensor.shape[match[2] == "B"] == r
        if not (fits and tensor.dtype in FLOATS and tensor.isfinite().all()):
            raise ValueError(f"{path}: {key!r:.80}: no factor of a LoRA in a Linear, not of rank {r}, or not "
                             "finite")
        sides[match[2]][match[1]] = tensor.float()
    if not tensors or (lone := sides["A"].keys() ^ sides["B"].keys()):
        raise ValueError(f"{path}: a factor is missing: {_few(lone) if tensors else 'it is empty'}")
    return Lora({name: (A, scale * sides["B"][name]) for name, A in sides["A"].items()}, r, base,
                str(folder))


@torch.no_grad()
def set_skills(adapters: Adapters, loras: Sequence[Lora]) -> None:
    """Makes each LoRA one skill, and freezes the skills: what trains from here on is the routing. The config
    has skills = len(loras) and the largest of their ranks. ValueError where the names or shapes are not those
    of the adapted Linears: a LoRA that is left out in silence would be the base."""
    linears = _linears(adapters)
    for lora in loras:
        if differing := lora.factors.keys() ^ linears.keys():
            raise ValueError(f"{lora.folder}: {_few(differing)} is not in both it and --targets")
        for name, (A, B) in lora.factors.items():
            if (shape := (B.shape[0], A.shape[1])) != linears[name].weight.shape:
                raise ValueError(f"{lora.folder}: {name} is of {list(shape)}, in this base "
                                 f"{list(linears[name].weight.shape)}")
            if len(loras) != len(linears[name].skill_A) or len(A) > linears[name].skill_A.shape[1]:
                raise ValueError(f"{lora.folder}: {len(loras)} LoRAs, this one of rank {lora.rank}, for "
                                 f"{list(linears[name].skill_A.shape[:2])} skills and ranks")
    for name, linear in linears.items():
        for skill in (linear.skill_A, linear.skill_B):
            skill.zero_().requires_grad_(False)
        for s, (A, B) in enumerate(lora.factors[name] for lora in loras):
            linear.skill_A[s, :len(A)], linear.skill_B[s, :len(A)] = A, B.T / linear.skill_scale
