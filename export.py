"""A trained run as plain LoRAs for servers. OrchMoE is K LoRAs of rank S R that share one A, weighted by the
router: sum_k w_k LoRA_k with B_k = scale * Zhat_ks B_s. Written as PEFT folders, with the router beside them;
docs/serving.md says how to load them. Test: pytest tests/test_export.py

    python export.py --run runs/orchmoe-1 --out served                     # abstract-1 .. abstract-K, router
    python export.py --run runs/orchmoe-1 --out served --routing mean      # and one for the mean w of dev
    python export.py --run runs/lora-1 --out served                        # a LoRA: one folder
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import checkpoint
import data
import eval as evaluation
import runtime
from model import Backbone
from orchmoe import Adapters, TaskRouter
from tokenizer import Tokenizer

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has kernels for


@dataclass(frozen=True)
class ExportConfig:
    """Export: which run, what of it, and where to."""

    run: str = ""  # folder of a run of train.py
    out: str = ""  # folder of what is written, one below it for each LoRA
    model: str = ""  # where the run's base is now, if it has moved
    data: str = ""  # where its data is now, which --routing mean reads
    base: str = ""  # what the server knows the base by (default: the folder)
    pad_rank: bool = False  # fill the ranks up with zeros to the next one that vLLM takes
    routing: Literal["mean", "sample", ""] = ""  # one LoRA more: the mean w of dev, or the w of --input
    input: str = ""  # the whole prompt that --routing sample is of
    w: tuple[str, ...] = ()  # or the K weights themselves; the first negative: --w=-1,2

    def __post_init__(self) -> None:
        if not (self.run and self.out):
            raise ValueError("give --run, the folder of a run, and --out, a folder to write")
        if ((self.routing == "sample") != bool(self.input.strip()) or (self.routing and self.w)
                or (self.data and self.routing != "mean")):  # fmt: skip
            raise ValueError('--routing sample goes with --input "prompt", --data with --routing mean alone, '
                             "and --w with neither")


@torch.no_grad()
def fixed_routing(config: ExportConfig, run: evaluation.Run, base: Backbone, adapters: Adapters,
                  tokenizer: Tokenizer) -> Tensor:
    """w (K,) of --w, of the one prompt, or the mean over dev."""
    if config.w:
        K = adapters.config.tasks
        try:
            w = torch.tensor([float(value) for value in config.w])
        except ValueError as error:
            raise ValueError(f"--w: {error}; give numbers, with commas between") from None
        if len(w) != K or not w.isfinite().all():
            raise ValueError(f"--w {','.join(config.w)}: give K = {K} finite numbers")
        return w
    if adapters.router is None:
        raise ValueError(f"--routing {config.routing}: the run has no router; give --w")
    if config.routing == "sample":
        prompt = data.text_of(config.input, "--input")
        return adapters.router(base.embed(torch.tensor([tokenizer.source(prompt)])))[0]
    options = run.configs(config.run, data=data.DataConfig)["data"]
    options = replace(options, data=config.data or options.data)
    dev = data.load_sets(options, tokenizer, ["dev"], training=run.tasks)["dev"]
    run.require_same(config.run, digests=run.digests | {"train": dev.digest})
    batches = evaluation.routed_batches(base, adapters, dev, 64, "router")
    return torch.stack([routing.w.sum(0) for *_, routing in batches]).sum(0) / len(dev)


def save_router(router: TaskRouter, embedding: str, loras: list[str], folder: Path) -> None:
    """router.safetensors: W_task as task (K,D), b as bias (K), mu and sd (D); router.json: what else w needs,
    and whose weights w holds, in its order."""
    checkpoint.write_safetensors(folder / "router.safetensors", router.state_dict(), {"format": "pt"})
    runtime.write_json(folder / "router.json", {
        "loras": loras, "embedding": embedding, "attention": router.config.router_attention,
        "norm": router.config.router_norm})


def export(config: ExportConfig, place: runtime.Device) -> None:
    """Writes all that the config asks for below --out, and says what."""
    run, out = evaluation.Run.read(config.run), Path(config.out)
    method, router = run.train["method"], run.adapter.get("router", "sample")
    if method not in ("orchmoe", "lora") or (method == "orchmoe" and router == "token"):
        token = " --router token" * (method == "orchmoe")
        raise ValueError(f"{config.run}: --method {method}{token}: no LoRAs with fixed weights are the same "
                         "function; export takes orchmoe with a router of samples, and lora")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: not empty; name another folder by --out")
    base, adapters, tokenizer = evaluation.load(place, run=config.run, model=config.model)
    name = config.base or str(Path(config.model or run.train["model"]).resolve())
    routings: dict[str, Tensor | None] = {"lora": None}
    if method == "orchmoe":
        K = adapters.config.tasks
        routings = {f"abstract-{k + 1}": torch.eye(K)[k] for k in range(K)}
        if config.routing or config.w:
            routings[config.routing or "w"] = fixed_routing(config, run, base, adapters, tokenizer)
    elif config.routing or config.w:
        raise ValueError(f"{config.run}: --method lora has no routing; leave out --routing and --w")
    for folder, w in routings.items():
        rank = checkpoint.save_peft(adapters, w, out / folder, name, ranks=RANKS if config.pad_rank else ())
    if adapters.router is not None:
        embedding = checkpoint.hf_name(base, "embedding.weight")
        save_router(adapters.router, embedding, [f"abstract-{k + 1}" for k in range(K)], out)
    runtime.say(f"written: {out}/ with {', '.join(routings)}, LoRAs of rank {rank} for {name}"
                + ", and router.safetensors" * (adapters.router is not None))


def main() -> None:
    config = runtime.from_flags(ExportConfig, runtime.read_flags(__doc__, ExportConfig))
    runtime.require_alone()
    export(config, runtime.pick_device(device="cpu", dtype="float32"))


if __name__ == "__main__":
    runtime.run_program(main)
