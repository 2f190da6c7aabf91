"""PEFT folders out and in: save adapters as a LoRA in PEFT's form, and make LoRAs the skills.

OrchMoE is K LoRAs of rank S R, mixed by the router: sum_k w_k LoRA_k. All have the same A, which is
A_1 to A_S below one another. The B of LoRA k is scale * Zhat_ks B_s for s = 1 to S. So adapters
under one routing are a plain LoRA, which `save_peft` writes; integrations/export.py is the program
around it. The other way round, `load_peft` and `set_skills` make existing LoRAs the skills.

Letters: K abstract tasks, S skills, R rank of a skill, r rank of a LoRA, D input width, O output
width, N adapted Linears.

Test: pytest tests/unit/test_export.py tests/parity/test_peft.py
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import checkpoint
from orchmoe import Adapters, Skills
from support import program
from support.program import UserError

LORA_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")

# Fields of adapter_config.json that may have any value in a plain LoRA, whose Linears compute
# W + scale B A. All others must be empty, with the exceptions in `require_plain`.
HARMLESS = (
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "megatron_core",
    "qalora_group_size",
    "eva_config",
    "ensure_weight_tying",
)
# Other ways to start a LoRA change the base: pissa, loftq and more.
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


class Lora(NamedTuple):
    """A LoRA: it adds scale * B A to the weight of each of its Linears."""

    factors: dict[str, tuple[Tensor, Tensor]]  # name in transformers -> A (r,D) and scale * B (O,r)
    rank: int  # r
    folder: str


def skills_by_hf_name(adapters: Adapters) -> dict[str, Skills]:
    """Return the skills by the names that their Linears have in transformers."""
    found = {}
    for name, skills in zip(adapters.linears, adapters.skills.values(), strict=True):
        # The rename rules expect the dot between the name of a module and its parameter.
        hf_name = checkpoint.hf_name(adapters.module, f"{name}.").removesuffix(".")
        found[hf_name] = skills
    return found


@torch.no_grad()
def save_peft(
    adapters: Adapters,
    w: Tensor | None,
    folder: str | Path,
    base: str,
) -> int:
    """Write the skills under one routing as a LoRA in PEFT's form, and return its rank r.

    w: (K,), the weights of the abstract tasks; None for a method without a router.
    base: the name by which a server knows the base.

    Raise UserError if no LoRA equals this routing.
    """
    skills_class = adapters.skills_class
    if not skills_class.is_linear:
        raise UserError("not written: with a token router every token has its own w")
    if skills_class.forward is not Skills.forward:
        raise UserError("not written: skills that mix their factors are no LoRA of rank S R")

    # One rank for all Linears, since servers ignore patterns of ranks.
    by_name = skills_by_hf_name(adapters)
    r = max(skills.A.shape[0] * skills.A.shape[1] for skills in by_name.values())

    c = adapters.route(w=w).c  # (N,1,S)
    if c.shape[1] != 1:
        raise UserError(f"not written: give the w (K,) of one sample, not {c.shape[1]}")

    tensors = {}
    for (name, skills), c_linear in zip(by_name.items(), c.squeeze(1), strict=True):
        A = skills.A.flatten(0, 1)  # (S R,D)
        B = skills.scale * c_linear[:, None, None] * skills.B  # (S,R,O)
        B = B.flatten(0, 1).T  # (O,S R)
        padding = r - len(A)
        tensors[f"base_model.model.{name}.lora_A.weight"] = F.pad(A, (0, 0, 0, padding))  # (r,D)
        tensors[f"base_model.model.{name}.lora_B.weight"] = F.pad(B, (0, padding))  # (O,r)

    # transformers' config says whether there is an encoder; our own T5 has it as a module.
    hf_config = getattr(adapters.module, "config", None)
    has_encoder = getattr(hf_config, "is_encoder_decoder", hasattr(adapters.module, "encoder"))
    peft_config = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if has_encoder else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": r,
        "lora_alpha": r,  # the scale is in B already
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in by_name}),
        "inference_mode": True,
    }
    checkpoint.write_safetensors(
        Path(folder) / "adapter_model.safetensors", tensors, {"format": "pt"}
    )
    program.write_json(Path(folder) / "adapter_config.json", peft_config)
    return r


def load_peft(folder: str | Path) -> Lora:
    """Return the LoRA in a PEFT folder. Raise UserError if it is more than a plain LoRA."""
    folder = Path(folder)
    path = folder / "adapter_config.json"
    program.require_path(path, "name the folder of a LoRA as peft saves it")
    values = program.read_json(path)
    with program.reading(path, "name the folder of a plain LoRA"):
        require_plain(values)
        r = values["r"]
        alpha = values["lora_alpha"]
        if type(r) is not int or r < 1:
            raise ValueError(f"r {r!r:.40} must be a whole number above 0")
        scale = alpha / r
        if values.get("use_rslora"):
            scale = alpha / math.sqrt(r)

    path = folder / "adapter_model.safetensors"
    if not path.exists():
        path = folder / "adapter_model.bin"
    tensors = checkpoint.read_tensors(path)
    with program.reading(path, "name the folder of a plain LoRA"):
        factors = pair_factors(tensors, r, scale)
    return Lora(factors=factors, rank=r, folder=str(folder))


def require_plain(values: dict[str, Any]) -> None:
    """Raise ValueError if an adapter_config.json describes more than a plain LoRA."""
    allowed = {"peft_type": ("LORA",), "bias": (None, "none"), "init_lora_weights": PLAIN_STARTS}
    for field in sorted({"peft_type", *values} - {*HARMLESS}):
        value = values.get(field)
        if value not in allowed.get(field, (None, False, {}, [])):
            raise ValueError(f"{field} {value!r:.60} makes it more than a plain LoRA")


def pair_factors(
    tensors: dict[str, Tensor], r: int, scale: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A (r,D) and scale * B (O,r) by the name of their Linear.

    Raise UserError for a tensor that is no such factor, KeyError for one without its partner.
    """
    names = set()
    for key, tensor in tensors.items():
        match = LORA_KEY.fullmatch(key)
        if match is None or not tensor.is_floating_point():
            raise UserError(f"{key!r:.80} is no factor of a LoRA in a Linear")
        names.add(match[1])
    if not names:
        raise UserError("it is empty")

    factors = {}
    for name in sorted(names):
        A = tensors[f"base_model.model.{name}.lora_A.weight"].float()
        B = scale * tensors[f"base_model.model.{name}.lora_B.weight"].float()
        rank_A, _ = A.shape
        _, rank_B = B.shape
        if rank_A != r or rank_B != r:
            raise UserError(f"{name!r:.80}: the factors are not of rank {r}")
        if not (A.isfinite().all() and B.isfinite().all()):
            raise UserError(f"{name!r:.80}: the factors are not finite")
        factors[name] = (A, B)
    return factors


@torch.no_grad()
def set_skills(adapters: Adapters, loras: Sequence[Lora]) -> None:
    """Make each LoRA one skill and freeze the skills, so that only the routing trains.

    The adapters must have one skill for each LoRA, of the largest of their ranks or more.
    Raise UserError if the Linears of a LoRA are not exactly the adapted ones: a Linear that is
    left out in silence would compute as the base.
    """
    by_name = skills_by_hf_name(adapters)
    expected = {}  # (O,D) of each Linear
    for name, skills in by_name.items():
        expected[name] = (skills.B.shape[-1], skills.A.shape[-1])
    for lora in loras:
        found = {name: (len(B), A.shape[1]) for name, (A, B) in lora.factors.items()}
        differing = sorted(found.items() ^ expected.items())
        if differing:
            raise UserError(
                f"{lora.folder}: its Linears are not those of this base and --targets: "
                f"{differing[:3]!s:.300}; give the base and the targets of the LoRA"
            )

    ranks = [lora.rank for lora in loras]
    for name, skills in by_name.items():
        S, R, _ = skills.A.shape
        if len(loras) != S or max(ranks) > R:
            raise UserError(f"{name}: LoRAs of ranks {ranks} do not fit {S} skills of rank {R}")

    for name, skills in by_name.items():
        skills.A.zero_().requires_grad_(False)
        skills.B.zero_().requires_grad_(False)
        for s, lora in enumerate(loras):
            A, B = lora.factors[name]
            skills.A[s, : lora.rank] = A
            skills.B[s, : lora.rank] = B.T / skills.scale
