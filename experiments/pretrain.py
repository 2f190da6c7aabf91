"""Pre-train a T5 from random weights, on span corruption of plain text and on instances of tasks.

Gives a base for adapters where none can be downloaded. The folder of --model needs config.json and
the tokenizer alone. The run folder gets the model with the lowest dev loss as model/.

    python -m experiments.pretrain --model tiny --data runs/tiny/sni --splits pretrain \\
        --text text.txt --steps 9000 --lr-full 1e-2 --out runs/base
    python -m experiments.pretrain --resume --out runs/base

Test: pytest tests/experiments/test_spans.py
"""

from __future__ import annotations

import math
import os
import shlex
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

import checkpoint
import data
import eval as evaluation
import runtime
import tokenizer as tokenizers
import train
from baselines import NoAdapter
from experiments.spans import TextStream
from orchmoe import Adapters, OrchMoEConfig
from run_folder import RunConfig, RunFolder, read_config
from runtime import UserError
from t5 import T5


@dataclass(frozen=True)
class PretrainConfig:
    """Pre-training: the text beside the tasks, and the optimizer."""

    text: str = ""  # file of plain text lines (.xz accepted)
    text_ratio: float = 0.5  # share of the batches that are of this text
    text_length: int = 256  # tokens in one row of text
    beta2: float = 0.98  # of AdamW

    def __post_init__(self) -> None:
        runtime.require_least(self, text_length=2)
        for name in ("text_ratio", "beta2"):
            value = getattr(self, name)
            if not 0 <= value <= 1 or (name == "beta2" and value == 1):
                raise UserError(f"{runtime.flag(name)} {value}: give a share from 0 to 1")


CLASSES = (train.LaunchConfig, train.TrainConfig, data.DataConfig, OrchMoEConfig, PretrainConfig)
# Flags of train.py that have no meaning here, or that are always the same.
HIDDEN = (
    "method",
    "lr_skills",
    "lr_router",
    "lr_token_router",
    "lr_allocation",
    "start",
    "trainable",
    *(field.name for field in fields(OrchMoEConfig)),
)


# ------------------------------------------------------------------------------- where it starts


@torch.no_grad()
def init_weights(base: T5, seed: int) -> T5:
    """Initialise as T5 does. The weights depend on the seed alone, on any device."""
    config = base.config
    generator = torch.Generator().manual_seed(seed)
    std = {
        "embedding": 1.0,
        "q": (config.d_model * config.d_kv) ** -0.5,  # in place of 1/sqrt(E) on the scores
        "o": (config.num_heads * config.d_kv) ** -0.5,
        "wo": config.d_ff**-0.5,
        # Logits start with unit variance, whether the decoder's output or the head scales them.
        "head": 1.0 if config.scale_decoder_outputs else config.d_model**-0.5,
    }
    for name, weight in base.named_parameters():
        owner = name.split(".")[-2]
        if owner.endswith("norm"):
            weight.fill_(1.0)
        else:
            values = torch.randn(weight.shape, generator=generator)
            weight.copy_(values * std.get(owner, config.d_model**-0.5))
    return base


def random_base(model: str, seed: int, device: torch.device) -> T5:
    """Return the T5 that config.json in `model` describes, with random weights."""
    config = checkpoint.read_config(model)
    if not isinstance(config, T5.Config):
        raise UserError(f"{model}/config.json: not a T5; only a T5 is started from random weights")
    with torch.device("meta"):
        size = 4 * sum(parameter.numel() for parameter in T5(config).parameters())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise UserError(
            f"{model}/config.json: describes {size:.3g} bytes of weights, but this machine has "
            f"{memory:.3g}; give a smaller model"
        )
    return init_weights(T5(config), seed).to(device)


def make_optimizer(adapters: Adapters, lr: float, beta2: float) -> Optimizer:
    """Return AdamW with a rate for each tensor, relative to the root mean square of its start.

    This is the relative rate of Adafactor (Shazeer and Stern 2018). T5 starts its embeddings at
    1.0 and its queries at 0.01, and no single rate serves both.
    """
    groups = []
    for weight in adapters.parameter_groups()["full"]:
        size = weight.detach().pow(2).mean().sqrt().item()
        groups.append({"params": [weight], "max_lr": lr * max(size, 1e-3)})
    return torch.optim.AdamW(groups, betas=(0.9, beta2), weight_decay=0.0, fused=True)


# -------------------------------------------------------------------------------------- training


def batch_at(
    step: int,
    tasks: data.Examples,
    text: TextStream | None,
    config: train.TrainConfig,
    ratio: float,
) -> data.Batch:
    """Return the batch of a step, which depends on (seed, step). A share `ratio` are text."""
    texts = int(step * ratio) if text else 0  # batches of text before this step
    if text and int((step + 1) * ratio) > texts:
        return text.batch_at(texts, config.batch_size)
    return train.training_batch(tasks, step - texts, config)


def pretrain(
    settings: train.Settings,
    own: PretrainConfig,
    device: runtime.Device,
    folder: str,
    resume_command: str,
) -> bool:
    """Train, from the last checkpoint if there is one. Return False if a signal stopped it."""
    config = settings.training

    # Tokenizer, model and data.
    tokenizer = tokenizers.load(config.model)
    base = random_base(config.model, config.seed, device.device)
    base.checkpoint_blocks = config.checkpoint_blocks
    if tokenizer.size > base.config.vocab_size:
        raise UserError(
            f"{config.model}/config.json: vocab_size {base.config.vocab_size} is less than the "
            f"{tokenizer.size} of the tokenizer"
        )
    sets = data.load_sets(settings.dataset, tokenizer)
    dev = data.subsample(sets["dev"], config.eval_instances)
    if not dev:
        raise UserError(f"{settings.dataset.data}: no task has the 5 instances for a dev set")
    text = None
    if own.text:
        text = TextStream(own.text, tokenizer, length=own.text_length, seed=config.seed)
        own = replace(own, text=str(Path(own.text).absolute()))

    adapters = NoAdapter(base, full=True)
    optimizer = make_optimizer(adapters, config.lr_full, own.beta2)
    bound = RunConfig(
        folder=folder,
        training=asdict(config),
        dataset=asdict(settings.dataset),
        adapter=asdict(settings.adapter),
        tasks=tuple(sets["train"].tasks),
        base="",
        tokenizer=tokenizer.fingerprint,
        digests={name: sets[name].digest for name in ("train", "test") if name in sets},
        pretrain=asdict(own),
    )
    run = RunFolder(folder)
    with run.lock():
        run.bind(bound)
        runtime.print_line(f"after an interruption, resume with: {resume_command}")
        first_step, best_loss = 0, math.inf
        if run.progress_path.exists():
            first_step, best_loss, _ = run.load_progress(adapters, optimizer)
        run.truncate_log(first_step)
        runtime.broadcast(adapters.state_dict().values())

        with runtime.stop_signals() as stop_requested:
            steps = range(first_step, config.steps)
            options = {"total": config.steps, "initial": first_step, "unit": "step"}
            for step in runtime.progress(steps, "train", **options):
                started = time.monotonic()
                batch = batch_at(step, sets["train"], text, config, own.text_ratio)
                narrow = device.dtype == torch.bfloat16
                with torch.autocast(device.device.type, torch.bfloat16, enabled=narrow):
                    record = train.train_step(base, adapters, optimizer, batch, step, config)
                tokens = batch.input_ids.numel() + batch.labels.numel()  # with padding
                record["tokens_per_s"] = round(tokens / (time.monotonic() - started))
                run.log(step=step, **record)

                evaluating = (step + 1) % config.eval_every == 0 or step + 1 == config.steps
                stopping = runtime.any_rank(stop_requested())
                if not (evaluating or stopping):
                    continue
                weights = get_total_norm(adapters.state_dict().values())
                train.require_finite(step, batch, norm_of_the_weights=weights.item())
                if evaluating:
                    loss, _ = evaluation.measure(
                        base, adapters, dev, batch_size=config.eval_batch_size
                    )
                    train.require_finite(step, batch, dev_loss=loss)
                    run.log(step=step, dev_loss=loss)
                    if loss < best_loss:
                        best_loss = loss
                        run.save_best(bound, base, adapters, tokenizer)
                run.save_progress(step + 1, best_loss, adapters, optimizer)
                if stopping:
                    break
            stopped = runtime.any_rank(stop_requested())
    if stopped:
        runtime.print_line(f"stopped; resume with: {resume_command}")
    return not stopped


# ----------------------------------------------------------------------------------- the program


def read_own_settings(flags: dict[str, Any], launch: train.LaunchConfig) -> PretrainConfig:
    """Return the settings of pre-training: those of the flags, or of the run that is resumed."""
    if not launch.resume:
        return runtime.from_flags(PretrainConfig, flags)
    saved = vars(read_config(launch.out).section(PretrainConfig, "pretrain"))
    train.require_unchanged(flags, saved, launch.out)
    return runtime.from_flags(PretrainConfig, saved | flags)


def main() -> int:
    flags = runtime.read_flags(__doc__, *CLASSES, hidden=HIDDEN)
    flags["method"] = "full"
    launch = runtime.from_flags(train.LaunchConfig, flags)
    if not launch.out or launch.shard or launch.compile:
        raise UserError("name the run folder with --out, and leave out --shard and --compile")
    settings = train.read_settings(flags, launch)
    own = read_own_settings(flags, launch)

    device = runtime.pick_device(launch.gpu, launch.device, settings.training.dtype)
    runtime.print_line(device.description)
    config = replace(settings.training, dtype=runtime.dtype_name(device.dtype))
    settings = replace(settings, training=config)

    launcher = runtime.launcher().removesuffix(" --")  # torchrun has a flag -m of its own
    command = f"{launcher} -m experiments.pretrain --resume --out {shlex.quote(launch.out)}"
    if launch.gpu is not None:
        command += f" --gpu {launch.gpu}"
    if launch.device:
        command += f" --device {launch.device}"
    with runtime.distributed(device.device):
        finished = pretrain(settings, own, device, launch.out, command)
    return 0 if finished else 130


if __name__ == "__main__":
    runtime.run_program(main)
