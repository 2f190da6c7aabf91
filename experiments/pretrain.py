"""Pre-trains a T5 from random weights, on span corruption of plain text and on the instances of tasks: a base
for adapters where none can be downloaded. --model needs config.json and the tokenizer alone; the run folder
gets the model that was best on dev as model/.

    python -m experiments.pretrain --model tiny --data runs/tiny/sni --splits pretrain --text text.txt \\
        --steps 9000 --lr-full 1e-2 --out runs/base
    python -m experiments.pretrain --resume --out runs/base
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

import checkpoint
import data
import runtime
import tokenizer as tokenizers
import train
from baselines import NoAdapter
from experiments.spans import TextStream
from orchmoe import Adapters
from t5 import T5


@dataclass(frozen=True)
class PretrainConfig:
    """Pre-training: what is read beside the tasks, and how fast."""

    text: str = ""  # file of plain text lines (.xz accepted)
    text_ratio: float = 0.5  # share of the batches that comes from it
    text_length: int = 256  # tokens of one of its rows
    beta2: float = 0.98  # of AdamW

    def __post_init__(self) -> None:
        runtime.require_least(self, text_length=2)
        if not (0 <= self.text_ratio <= 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"--text-ratio {self.text_ratio} --beta2 {self.beta2}: give shares from 0 to 1")


CONFIGS = {**train.CONFIGS, "pretrain": PretrainConfig}
HIDDEN = {"method", "lr_skills", "lr_router", "lr_token_router", "lr_allocation", "start", "trainable",
          "loras", *train.HIDDEN, *train.OrchMoEConfig.__dataclass_fields__}  # fmt: skip


@torch.no_grad()
def init_weights(base: T5, seed: int) -> T5:
    """T5's own initialisation: a function of the seed alone, on any device."""
    config, generator = base.config, torch.Generator().manual_seed(seed)
    std = {
        "embedding": 1.0,
        # The logits begin with unit variance whether the decoder's output is scaled before the head or here.
        "head": 1.0 if config.scale_decoder_outputs else config.d_model**-0.5,
        "q": (config.d_model * config.d_kv) ** -0.5,  # in place of 1/sqrt(E) on the scores
        "o": (config.num_heads * config.d_kv) ** -0.5,
        "wo": config.d_ff**-0.5,
    }
    for name, weight in base.named_parameters():
        owner = name.split(".")[-2]
        if owner.endswith("norm"):
            weight.fill_(1.0)
        else:
            values = torch.randn(weight.shape, generator=generator)
            weight.copy_(values * std.get(owner, config.d_model**-0.5))
    return base


def random_base(model: str, seed: int, place: runtime.Device) -> T5:
    """The T5 that config.json of the folder describes, with random weights."""
    config = checkpoint.config(model)
    if not isinstance(config, T5.Config):
        raise ValueError(f"{model}/config.json: only a T5 is started from random weights here")
    with torch.device("meta"):
        size = 4 * sum(p.numel() for p in T5(config).parameters())
    if size > (memory := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")):
        raise ValueError(f"{model}/config.json: describes {size:.3g} bytes of weights, but this machine has "
                         f"{memory:.3g}; give a smaller model")
    return init_weights(T5(config), seed).to(place.device)


def make_optimizer(adapters: Adapters, lr: float, beta2: float) -> Optimizer:
    """AdamW whose rate for each tensor is relative to the root mean square of its start, as in Adafactor
    (Shazeer and Stern 2018): T5 starts its embeddings at 1.0 and its queries at 0.01, and no one rate serves
    both."""
    groups = []
    for weight in adapters.parameter_groups()["full"]:
        size = weight.detach().pow(2).mean().sqrt().item()
        groups.append({"params": [weight], "max_lr": lr * max(size, 1e-3)})
    return torch.optim.AdamW(groups, betas=(0.9, beta2), weight_decay=0.0, fused=True)


def mixture(tasks: data.Examples, text: TextStream | None, config: train.TrainConfig, ratio: float):
    """Batch of each step, a pure function of (seed, step): of the tasks, and a share `ratio` of text."""
    def batch_at(step: int) -> data.Batch:
        texts = int(step * ratio) if text else 0  # so many came before this step
        if text and int((step + 1) * ratio) > texts:
            return text.batch_at(texts, config.batch_size)
        rows = data.batch_at(tasks.source_lengths, config.batch_size, config.seed, step - texts)
        return data.collate([tasks[i] for i in rows], seed=config.seed, step=step - texts)

    return batch_at


def run(folder: Path, configs: dict[str, Any], place: runtime.Device, resume: str) -> bool:
    """Trains into the run folder, from its checkpoint where it has one; false if a signal stopped it."""
    config, data_config, own = configs["train"], configs["data"], configs["pretrain"]
    tokenizer = tokenizers.load(config.model)
    base = random_base(config.model, config.seed, place)
    base.checkpoint_blocks = config.checkpoint_blocks
    if tokenizer.size > base.config.vocab_size:
        raise ValueError(f"{config.model}/config.json: vocab_size {base.config.vocab_size} is less than the "
                         f"{tokenizer.size} of the tokenizer")
    train_set, sets, digests = train.load_sets(config, data_config, tokenizer)
    text = own.text and TextStream(own.text, tokenizer, length=own.text_length, seed=config.seed)
    adapters = NoAdapter(base, full=True)
    parts = train.Parts(base, adapters, tokenizer, train_set, sets, {
        "tasks": tuple(train_set.tasks), "base": "", "tokenizer": tokenizer.fingerprint, "digests": digests})
    with runtime.locked(folder):
        train.start_run(folder, configs, parts.bound)
        runtime.say(f"should it be interrupted, go on with: {resume}")
        return train.train(base, adapters, make_optimizer(adapters, config.lr_full, own.beta2),
                           mixture(train_set, text or None, config, own.text_ratio), sets["dev"], folder,
                           config, lambda: train.save_best(folder, parts, configs),
                           autocast=place.dtype == torch.bfloat16)


def main() -> int | None:
    flags = runtime.read_flags(__doc__, train.PlaceConfig, *CONFIGS.values(), hidden=HIDDEN)
    flags |= {"method": "full"}
    where = runtime.from_flags(train.PlaceConfig, flags)
    if not where.out or where.shard or where.compile:
        raise ValueError("name the run folder by --out, and leave out --shard and --compile")
    configs = train.read_configs(flags, where, CONFIGS)
    place = runtime.pick_device(where.gpu, where.device, configs["train"].dtype)
    runtime.say(place.reason)
    configs["train"] = replace(configs["train"], dtype=str(place.dtype)[6:])  # as train.py
    launch = runtime.launcher().removesuffix(" --")  # torchrun's own -m
    resume = f"{launch} -m experiments.pretrain --resume --out {shlex.quote(where.out)}"
    resume += f" --gpu {where.gpu}" * (where.gpu is not None) + " --device cpu" * bool(where.device)
    with runtime.joined(place):
        if not run(Path(where.out), configs, place, resume):
            runtime.say(f"stopped; go on with: {resume}")
            return 130


if __name__ == "__main__":
    runtime.run_program(main)
