"""PEFT folders in and out, and the program that writes a trained run as plain LoRAs for servers.

OrchMoE is K LoRAs of rank S R, mixed by the router: sum_k w_k LoRA_k. All have the same A, which is
A_1 to A_S below one another. The B of LoRA k is scale * Zhat_ks B_s for s = 1 to S. The program
writes each LoRA as a folder in PEFT's form, and the router beside them; docs/serving.md says how to
load them. The other way round, LoRAs that exist already can become skills: `load_peft` and
`set_skills`.

    python export.py --run runs/orchmoe-1 --out served                 # K LoRAs and the router
    python export.py --run runs/orchmoe-1 --out served --routing mean  # one more, for the mean w
    python export.py --run runs/lora-1 --out served                    # one LoRA

Letters: K abstract tasks, S skills, R rank of a skill, r rank of a LoRA, D input width, O output
width, N adapted Linears, B batch, L length, V vocabulary.

Test: pytest tests/unit/test_export.py tests/parity/test_peft.py
"""

import importlib.util
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
import data
import eval as evaluation
import kernels
import run_folder
import runtime
from model import Backbone
from orchmoe import Adapters, SkillLinear, TaskRouter
from tokenizer import Tokenizer

# --------------------------------------------------------------------------- LoRAs in PEFT's form

LORA_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")

# Fields of adapter_config.json that make an adapter more than W + scale B A in some Linears.
REFUSED = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "fan_in_fan_out",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
)
# Other ways to start a LoRA change the base: pissa, loftq and more.
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


class Lora(NamedTuple):
    """A LoRA: it adds scale * B A to the weight of each of its Linears."""

    factors: dict[str, tuple[Tensor, Tensor]]  # name in transformers -> A (r,D) and scale * B (O,r)
    rank: int  # r
    base: str  # name or folder of the base, as adapter_config.json has it
    folder: str


def linears_by_hf_name(adapters: Adapters) -> dict[str, SkillLinear]:
    """Return the adapted Linears by the names that they have in transformers."""
    linears = {}
    for name, linear in adapters.linears.items():
        # The rename rules expect the dot between the name of a module and its parameter.
        hf_name = checkpoint.hf_name(adapters.module, f"{name}.").removesuffix(".")
        linears[hf_name] = linear
    return linears


@torch.no_grad()
def save_peft(
    adapters: Adapters,
    w: Tensor | None,
    folder: str | Path,
    base: str,
    *,
    ranks: Sequence[int] = (),
) -> int:
    """Write the skills under one routing as a LoRA in PEFT's form, and return its rank r.

    w: (K,), the weights of the abstract tasks; None for a method without a router.
    base: the name by which a server knows the base.
    ranks: r is S R or, if `ranks` are given, the smallest of them that is at least S R; the
        factors are filled up with zeros.

    Raise ValueError if no LoRA equals this routing, or if all `ranks` are below S R.
    """
    linears = linears_by_hf_name(adapters)

    reason = adapters.unfoldable()
    if any(linear.skill_mix is kernels.mix_factors for linear in linears.values()):
        reason = "skills that mix their factors are no LoRA of rank S R"
    if reason:
        raise ValueError(f"{folder}: not written: {reason}")

    # One rank for all Linears, since servers ignore patterns of ranks.
    r = max(linear.skill_A.shape[0] * linear.skill_A.shape[1] for linear in linears.values())
    if ranks:
        large_enough = [rank for rank in ranks if rank >= r]
        if not large_enough:
            raise ValueError(f"{folder}: not written: its rank {r} is above all of {ranks}")
        r = min(large_enough)

    c = adapters.route(w=w).c  # (N,1,S)
    if c.shape[1] != 1:
        raise ValueError(f"{folder}: not written: give the w (K,) of one sample, not {c.shape[1]}")

    tensors = {}
    for (name, linear), c_linear in zip(linears.items(), c.squeeze(1), strict=True):
        A = linear.skill_A.flatten(0, 1)  # (S R,D)
        B = linear.skill_scale * c_linear[:, None, None] * linear.skill_B  # (S,R,O)
        B = B.flatten(0, 1).T  # (O,S R)
        padding = r - len(A)
        tensors[f"base_model.model.{name}.lora_A.weight"] = F.pad(A, (0, 0, 0, padding))  # (r,D)
        tensors[f"base_model.model.{name}.lora_B.weight"] = F.pad(B, (0, padding))  # (O,r)

    task_type = "SEQ_2_SEQ_LM" if hasattr(adapters.module, "encoder") else "CAUSAL_LM"
    peft_config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "r": r,
        "lora_alpha": r,  # the scale is in B already
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in linears}),
        "inference_mode": True,
    }
    checkpoint.write_safetensors(
        Path(folder) / "adapter_model.safetensors", tensors, {"format": "pt"}
    )
    runtime.write_json(Path(folder) / "adapter_config.json", peft_config)
    return r


def load_peft(folder: str | Path) -> Lora:
    """Return the LoRA in a PEFT folder. Raise ValueError if it is more than a plain LoRA."""
    folder = Path(folder)
    path = folder / "adapter_config.json"
    runtime.require_path(path, "name the folder of a LoRA as peft saves it")
    values = runtime.read_json(path)
    with runtime.reading(path, "name the folder of a plain LoRA"):
        require_plain(values)
        r = values["r"]
        alpha = values["lora_alpha"]
        base = values["base_model_name_or_path"]
        if type(r) is not int or r < 1 or not isinstance(base, str):
            raise ValueError(
                f"r {r!r:.40} must be a whole number above 0, and base_model_name_or_path "
                f"{base!r:.40} a text"
            )
        scale = alpha / r
        if values.get("use_rslora"):
            scale = alpha / math.sqrt(r)

    path = folder / "adapter_model.safetensors"
    if not path.exists():
        path = folder / "adapter_model.bin"
    tensors = checkpoint.read_tensors(path)
    with runtime.reading(path):
        factors = pair_factors(tensors, r, scale)
    return Lora(factors=factors, rank=r, base=base, folder=str(folder))


def require_plain(values: dict[str, Any]) -> None:
    """Raise ValueError if an adapter_config.json describes more than a plain LoRA."""
    allowed = {"peft_type": ("LORA",), "bias": (None, "none"), "init_lora_weights": PLAIN_STARTS}
    for field in REFUSED:
        allowed[field] = (None, False, {}, [])
    for field, choices in allowed.items():
        value = values.get(field)
        if value not in choices:
            raise ValueError(f"{field} {value!r:.60} makes it more than a plain LoRA")


def pair_factors(
    tensors: dict[str, Tensor], r: int, scale: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A (r,D) and scale * B (O,r) by the name of their Linear.

    Raise an error for a tensor that is no such factor, and for a factor without its partner.
    """
    names = set()
    for key, tensor in tensors.items():
        match = LORA_KEY.fullmatch(key)
        if match is None or tensor.dtype not in checkpoint.FLOAT_DTYPES:
            raise ValueError(f"{key!r:.80} is no factor of a LoRA in a Linear")
        names.add(match[1])
    if not names:
        raise ValueError("it is empty")

    factors = {}
    for name in sorted(names):
        A = tensors[f"base_model.model.{name}.lora_A.weight"].float()
        B = scale * tensors[f"base_model.model.{name}.lora_B.weight"].float()
        rank_A, _ = A.shape
        _, rank_B = B.shape
        if rank_A != r or rank_B != r:
            raise ValueError(f"{name!r:.80}: the factors are not of rank {r}")
        if not (A.isfinite().all() and B.isfinite().all()):
            raise ValueError(f"{name!r:.80}: the factors are not finite")
        factors[name] = (A, B)
    return factors


@torch.no_grad()
def set_skills(adapters: Adapters, loras: Sequence[Lora]) -> None:
    """Make each LoRA one skill and freeze the skills, so that only the routing trains.

    The adapters must have one skill for each LoRA, of the largest of their ranks or more.
    Raise ValueError if the Linears of a LoRA are not exactly the adapted ones: a Linear that is
    left out in silence would compute as the base.
    """
    linears = linears_by_hf_name(adapters)
    expected = {name: tuple(linear.weight.shape) for name, linear in linears.items()}  # (O,D)
    for lora in loras:
        found = {name: (len(B), A.shape[1]) for name, (A, B) in lora.factors.items()}
        differing = sorted(found.items() ^ expected.items())
        if differing:
            raise ValueError(
                f"{lora.folder}: its Linears are not those of this base and --targets: "
                f"{differing[:3]!s:.300}; give the base and the targets of the LoRA"
            )

    ranks = [lora.rank for lora in loras]
    for name, linear in linears.items():
        S, R, _ = linear.skill_A.shape
        if len(loras) != S or max(ranks) > R:
            raise ValueError(f"{name}: LoRAs of ranks {ranks} do not fit {S} skills of rank {R}")

    for name, linear in linears.items():
        linear.skill_A.zero_().requires_grad_(False)
        linear.skill_B.zero_().requires_grad_(False)
        for s, lora in enumerate(loras):
            A, B = lora.factors[name]
            linear.skill_A[s, : lora.rank] = A
            linear.skill_B[s, : lora.rank] = B.T / linear.skill_scale


# ------------------------------------------------------------------------------------- a run out

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM has kernels for these


@dataclass(frozen=True)
class ExportConfig:
    """Export: which run, what of it, and where to."""

    run: str = ""  # folder of a run of train.py
    out: str = ""  # folder to write; each LoRA gets a folder inside
    model: str = ""  # where the run's base is now, if it has moved
    data: str = ""  # where the run's data is now, if it has moved; for --routing mean
    base: str = ""  # name by which the server knows the base (default: its folder)
    pad_rank: bool = False  # fill ranks up with zeros to the next rank that vLLM supports
    routing: Literal["mean", "sample", ""] = ""  # add a LoRA for the mean w of dev, or w of --input
    input: str = ""  # whole prompt for --routing sample
    w: tuple[str, ...] = ()  # add a LoRA for these K weights; if the first is negative: --w=-1,2
    check: bool = False  # compare what is written, in transformers and peft, with the run

    def __post_init__(self) -> None:
        if not (self.run and self.out):
            raise ValueError("give --run, the folder of a run, and --out, a folder to write")
        if (self.routing == "sample") != bool(self.input.strip()):
            raise ValueError('--routing sample needs --input "prompt", and --input needs it')
        if self.data and self.routing != "mean":
            raise ValueError("--data: only --routing mean reads data; leave it out")
        if self.w and self.routing:
            raise ValueError("--w and --routing: give one of the two")


@torch.no_grad()
def fixed_routing(
    config: ExportConfig,
    run: run_folder.RunConfig,
    base: Backbone,
    adapters: Adapters,
    tokenizer: Tokenizer,
) -> Tensor:
    """Return w (K,): the weights of --w, the w of the prompt --input, or the mean w of dev."""
    if config.w:
        K = adapters.config.tasks
        with runtime.reading("--w", f"give K = {K} finite numbers with commas between"):
            w = torch.tensor([float(value) for value in config.w])
            if len(w) != K or not w.isfinite().all():
                raise ValueError(f"{len(w)} numbers, or some are not finite")
        return w

    if adapters.router is None:
        raise ValueError(f"--routing {config.routing}: the run has no router; give --w")
    if config.routing == "sample":
        prompt = data.require_text(config.input, "--input")
        input_ids = torch.tensor([tokenizer.source(prompt)])
        return adapters.router(base.embed(input_ids))[0]

    data_config = run.section(data.DataConfig, "data")
    if config.data:
        data_config = replace(data_config, data=config.data)
    dev = data.load_sets(data_config, tokenizer, ["dev"], training=run.tasks)["dev"]
    run.require_same(digests=run.digests | {"train": dev.digest})
    sums = []
    for _, _, routing in evaluation.routed_batches(base, adapters, dev, 64, "router"):
        sums.append(routing.w.sum(0))
    return torch.stack(sums).sum(0) / len(dev)


def save_router(router: TaskRouter, embedding: str, loras: list[str], folder: Path) -> None:
    """Write what a server needs to compute w of a prompt.

    router.safetensors: W_task (K,D), bias (K), mu and sd (D). router.json: the settings of the
    router, the name of the embedding table, and the LoRAs whose weights w holds, in this order.
    """
    checkpoint.write_safetensors(
        folder / "router.safetensors", router.state_dict(), {"format": "pt"}
    )
    settings = {
        "loras": loras,
        "embedding": embedding,
        "attention": router.config.router_attention,
        "norm": router.config.router_norm,
    }
    runtime.write_json(folder / "router.json", settings)


# ----------------------------------------------------------------------------------- the check

# Pairs of a source and an answer. The logits at each token of the answer are compared.
CHECK_PROMPTS = (
    ("Definition: Name the first animal. Input: June, wolf, lion. Output:", " wolf and lion"),
    ("Definition: Is the review positive? Input: I would not buy it. Output:", " no, it is not"),
    ("Definition: Add the two numbers. Input: 17 and 25. Output:", " 42 is the sum"),
)
# Share of the largest logit by which the logits may differ. float32 rounds by 6e-8. Over the
# blocks of a model this grows: 7e-7 was seen with 7 blocks, 5e-6 with 30. The limit is ten times
# the larger one.
CHECK_TOLERANCE = 5e-5


def require_packages() -> None:
    """Raise ValueError if a package that --check needs is not installed."""
    for package in ("transformers", "peft"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"--check: {package} is not installed; pip install {package}")


@torch.no_grad()
def check_in_peft(
    out: Path,
    routings: dict[str, Tensor | None],
    base_folder: Path,
    base: Backbone,
    adapters: Adapters,
    tokenizer: Tokenizer,
) -> None:
    """Compare the logits that transformers and peft compute from the written folders with ours.

    Every LoRA is compared alone and, for OrchMoE, their mixture by the router's w of each prompt.
    Raise ValueError if the logits differ by more than CHECK_TOLERANCE times the largest logit.
    """
    # Imported here, since no other use of this file needs these packages.
    import peft
    import transformers

    model_class = transformers.AutoModelForCausalLM
    if hasattr(base, "encoder"):
        model_class = transformers.AutoModelForSeq2SeqLM
    model = model_class.from_pretrained(base_folder).float().eval()
    first, *others = routings
    model = peft.PeftModel.from_pretrained(model, out / first, adapter_name=first)
    for name in others:
        model.load_adapter(out / name, adapter_name=name)

    abstract = [name for name in routings if name.startswith("abstract-")]
    differences = []
    largest_logits = []
    for number, (source, target) in enumerate(CHECK_PROMPTS):
        input_ids = torch.tensor([tokenizer.source(source)])  # (1,L)
        answer = torch.tensor([tokenizer.target(target)])  # (1,n)

        cases = dict(routings)
        if abstract:
            mixture = f"mixture-{number}"
            w = adapters.route(base.embed(input_ids)).w.flatten()  # (K,)
            model.add_weighted_adapter(abstract, w.tolist(), mixture, combination_type="cat")
            cases[mixture] = w

        for name, w in cases.items():
            with adapters.routed(w=w):
                ours = our_logits(base, input_ids, answer)
            model.set_adapter(name)
            theirs = peft_logits(model, input_ids, answer)
            differences.append((ours - theirs).abs().max())
            largest_logits.append(ours.abs().max())

    difference = torch.stack(differences).max().item()
    largest_logit = torch.stack(largest_logits).max().item()
    runtime.print_line(
        f"check: the logits of peft differ from ours by at most {difference:.2g}, "
        f"the largest logit is {largest_logit:.3g}"
    )
    tolerance = CHECK_TOLERANCE * largest_logit
    if not difference <= tolerance:  # true for NaN, too
        raise ValueError(
            f"{out}: peft computes other logits than the run, by {difference:.2g}, and rounding "
            f"explains at most {tolerance:.2g}; do not serve these folders"
        )


def our_logits(base: Backbone, input_ids: Tensor, answer: Tensor) -> Tensor:
    """Return the logits (n,V) that predict each token of the answer (1,n) to the source (1,L)."""
    newest, state = base.start(input_ids, torch.ones_like(input_ids), answer.shape[1])
    logits = []
    for t in range(answer.shape[1]):
        logits.append(base.step(newest, state)[0])
        newest = answer[:, t]
    return torch.stack(logits)


def peft_logits(model: nn.Module, input_ids: Tensor, answer: Tensor) -> Tensor:
    """Return the same logits (n,V), computed by a model of transformers."""
    if model.config.is_encoder_decoder:
        return model(input_ids=input_ids, labels=answer).logits[0]
    row = torch.cat((input_ids, answer), 1)
    L = input_ids.shape[1]
    return model(input_ids=row).logits[0, L - 1 : -1]


# --------------------------------------------------------------------------------- the program


def export(config: ExportConfig, device: runtime.Device) -> None:
    """Write the LoRAs that the config asks for, and the router."""
    run = run_folder.read_config(config.run)
    method = run.train["method"]
    out = Path(config.out)
    if method not in ("orchmoe", "lora"):
        raise ValueError(
            f"{config.run}: --method {method}: no LoRAs with fixed weights compute the same; "
            "export runs of orchmoe or lora"
        )
    if method == "lora" and (config.routing or config.w):
        raise ValueError(f"{config.run}: --method lora has no routing; leave out --routing and --w")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: not empty; name another folder by --out")
    if config.check:
        require_packages()

    base, adapters, tokenizer = run_folder.load(device, run=config.run, model=config.model)
    base_folder = Path(config.model or run.train["model"]).resolve()

    # The routing of each LoRA, by the name of its folder. LoRA k has w = 1 for abstract task k.
    routings: dict[str, Tensor | None] = {"lora": None}
    if method == "orchmoe":
        one_hot = torch.eye(adapters.config.tasks)
        routings = {f"abstract-{k + 1}": w for k, w in enumerate(one_hot)}
    abstract = list(routings)
    if config.routing or config.w:
        w = fixed_routing(config, run, base, adapters, tokenizer)
        routings[config.routing or "w"] = w

    ranks = VLLM_RANKS if config.pad_rank else ()
    base_name = config.base or str(base_folder)
    for name, w in routings.items():
        rank = save_peft(adapters, w, out / name, base_name, ranks=ranks)
    runtime.print_line(
        f"written to {out}: LoRAs of rank {rank} for {base_name}: {', '.join(routings)}"
    )

    if adapters.router is not None:
        embedding = checkpoint.hf_name(base, "embedding.weight")
        save_router(adapters.router, embedding, abstract, out)
        runtime.print_line(f"written to {out}: router.safetensors and router.json")

    if config.check:
        check_in_peft(out, routings, base_folder, base, adapters, tokenizer)


def main() -> None:
    config = runtime.from_flags(ExportConfig, runtime.read_flags(__doc__, ExportConfig))
    runtime.require_single_process()
    export(config, runtime.pick_device(device="cpu", dtype="float32"))


if __name__ == "__main__":
    runtime.run_program(main)
