"""Train adapters of a frozen transformer on SNI or on your own rows, then score them.

The program ends with a table that compares the frozen and the adapted model on seen and unseen
tasks. It writes its results to a run folder; run_folder.py lists the files.

    python train.py --data sni/ --gpu 0
    python train.py --method lora --steps 200 --device cpu --out runs/lora
    python train.py --resume --out runs/lora --device cpu             # after an interruption
    python train.py --start runs/orchmoe-1 --data new/      # go on from its skills, on other tasks

Test: pytest tests/unit/test_train.py tests/programs/test_programs.py
"""

import gc
import math
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

import data
import eval as evaluation
import kernels
from baselines import OWN_METHODS, LoRA, MoELoRA, count_parameters, load_method
from data import Example, Examples
from model import Backbone
from orchmoe import Adapters, OrchMoE, OrchMoEConfig
from run_folder import (
    Model,
    Progress,
    Run,
    Settings,
    TrainConfig,
    build,
    class_of,
    load,
    new_folder,
    read_run,
    unread_settings,
)
from support import program, runtime
from support.program import UserError
from tasks import FILE_FIELDS, DataConfig
from tokenizer import load as load_tokenizer

# ---------------------------------------------------------------------------------- settings

LARGEST_NORM = 1.0  # gradients are clipped to this norm


@dataclass(frozen=True)
class LaunchConfig:
    """Launch: where the run computes and writes. Nothing here is saved with the run."""

    out: str = ""  # run folder (default: runs/METHOD-N, the first that is free)
    resume: bool = False  # resume the run in --out with its own settings
    gpu: int | None = None  # number of the GPU (default: 0, if there is one)
    device: Literal["cpu", ""] = ""  # use the CPU even if there is a GPU
    shard: bool = False  # split the frozen base over the processes of torchrun

    def __post_init__(self) -> None:
        if self.resume and not self.out:
            raise UserError("--resume: give the folder of the run with --out")


def read_settings(flags: dict[str, Any], launch: LaunchConfig) -> Settings:
    """Return the settings that the flags describe. `flags` holds only what was given.

    With --resume or --start the settings of that run take the place of the defaults. Raise
    UserError for a flag without effect.
    """
    saved = {}
    if launch.resume:
        saved = dict(vars(read_run(launch.out).settings))
    elif "start" in flags:
        saved = dict(vars(read_run(flags["start"]).settings))
        if "data" in flags:  # what else chooses rows belongs to the data of that run
            for name in FILE_FIELDS | {"train_instances"}:
                del saved[name]
        if "steps" in flags:
            saved["epochs"] = 0
    settings = program.from_flags(Settings, saved | flags)

    unread = unread_settings(settings)
    if launch.resume:
        unread["start"] = "with --resume"
    program.refuse_unread(flags, unread)
    if launch.shard and settings.compile == "on":  # FSDP2 puts hooks into the blocks
        raise UserError("--shard and --compile on: give one of the two")
    return settings


def steps_of(settings: TrainConfig, train_set: Examples) -> int:
    """Return the number of steps: that of --steps, or what --epochs means for these rows."""
    if not settings.epochs:
        return settings.steps
    # The last batch of an epoch may be short.
    return settings.epochs * math.ceil(len(train_set) / settings.batch_size)


# --------------------------------------------------------------------------- data, initial values


def held_out_sets(sets: dict[str, Examples], limit: int) -> dict[str, list[Example]]:
    """Return the sets "dev", "seen" and, if there are test tasks, "unseen".

    "seen" holds new instances of the training tasks, "unseen" instances of the test tasks. Each is
    cut to `limit` examples, evenly spaced (0: all).
    """
    names = {"dev": "dev", "seen": "seen", "unseen": "test"}
    return {new: data.subsample(sets[old], limit) for new, old in names.items() if old in sets}


def require_sets_fit(base: Backbone, sets: dict[str, Examples], max_new_tokens: int) -> None:
    """Raise UserError if a row is too long for the base, before training meets it."""
    for name, examples in sets.items():
        # The training rows need no room for an answer.
        evaluation.require_fit(base, examples, 0 if name == "train" else max_new_tokens)


def facts_of(model: Model, settings: Settings, sets: dict[str, Examples]) -> dict[str, Any]:
    """Return the facts of a Run: what its numbers depend on, apart from the settings."""
    return {
        "base": model.base.fingerprint,
        "tokenizer": model.tokenizer.fingerprint,
        "method_class": class_of(model.adapters),
        "train_tasks": sets["train"].digest,
        "test_tasks": sets["test"].digest if "test" in sets else "",
        # Last, so that a message names one of the short facts first.
        **sets["train"].facts,
        "tasks": list(sets["train"].tasks),
    }


def fit_router(
    base: Backbone, adapters: Adapters, examples: Examples, settings: TrainConfig
) -> None:
    """Initialise the router from at most 2,000 training examples, see Adapters.fit_router."""
    sources = data.subsample(examples, 2000)
    # Larger batches are slower on a CPU: their attention scores (B,L,L) do not fit its caches.
    batches = [batch for _, batch in data.batches(sources, 8, base.device, "router start")]
    with program.checking_settings():  # there may be too few
        adapters.fit_router(
            (base.embed(batch.input_ids) for batch in batches),
            (batch.attention_mask for batch in batches),
            generator=runtime.generator(settings.seed, 1),  # stream 1: k-means
        )


def load_start(run: Run, adapters: Adapters) -> None:
    """Load the adapters of the run in --start. Raise UserError if they do not fit this run."""
    start = read_run(run.settings.start)
    names = ["base", "tokenizer", "method_class", "extra_rank", *vars(OrchMoEConfig())]
    if not isinstance(adapters, OrchMoE | LoRA | MoELoRA):
        names.append("tasks")  # the method may have weights for each task
    remedy = "a run that starts from it needs the same"
    start.require_same({name: run.identity[name] for name in names}, remedy=remedy)
    adapters.load_state_dict(start.read_best())


# ----------------------------------------------------------------------------------- one step


def make_optimizer(adapters: Adapters, settings: TrainConfig) -> Optimizer:
    """Return AdamW without weight decay, with a peak learning rate for each kind of parameter.

    Parameters whose rate is 0 are frozen. Raise UserError if nothing trains.
    """
    groups = []
    for kind, parameters in adapters.parameter_groups().items():
        max_lr = getattr(settings, f"lr_{kind}")
        for parameter in parameters:
            parameter.requires_grad_(max_lr > 0)
        if parameters and max_lr > 0:
            groups.append({"params": parameters, "max_lr": max_lr})  # train_step sets "lr"
    if not groups:
        raise UserError(f"--method {settings.method}: each of its learning rates is 0")
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


def learning_rate_factor(step: int, settings: TrainConfig) -> float:
    """Return the factor on the peak rates: warm-up to 1, then linear decay, or constant 1."""
    steps = settings.steps
    warmup = settings.warmup
    if warmup >= steps:  # so that a short run also reaches its peak rates
        warmup = steps // 10
    rise = min(1.0, (step + 1) / max(1, warmup))
    if settings.schedule == "constant":
        return rise
    fall = (steps - step) / (steps - warmup)
    return min(rise, fall)


def routing_noise(adapters: Adapters, seed: int, step: int, rows: Sequence[int]) -> Tensor | None:
    """Return noise u (B, *noise_shape) in [0,1) on the CPU, None if the method uses none.

    The noise of a row depends only on (seed, step, row), so a resumed run draws the same numbers.
    """
    if adapters.noise_shape is None:
        return None
    noise = []
    for row in rows or [0]:  # a process without rows has a dummy row, see data.shares
        generator = runtime.generator(seed, step, row)
        noise.append(torch.rand(adapters.noise_shape, generator=generator))
    return torch.stack(noise)


class DivergedError(UserError):
    """A loss or the norm of a gradient is not a finite number."""


def require_finite(what: str, value: float) -> None:
    """Raise DivergedError if a value is not a finite number. what: "step 3: the dev loss"."""
    if not math.isfinite(value):
        raise DivergedError(
            f"{what} is {value}; start a new run with lower learning rates or --dtype float32 "
            "(a resumed run would repeat this)"
        )


def train_step(
    base: Backbone,
    adapters: Adapters,
    optimizer: Optimizer,
    examples: Sequence[Example],
    step: int,
    settings: TrainConfig,
) -> dict[str, float]:
    """Run one optimiser step on the first target of each example. Return loss and gradient norm.

    The loss is summed over the target tokens and divided by their number in the whole step. So it
    does not depend on how the step is cut into micro-batches and processes.
    """
    base.train()
    optimizer.zero_grad()
    loss = 0.0
    target_tokens = sum(len(example.target_ids[0]) for example in examples)
    size = math.ceil(len(examples) / settings.accumulate)
    for rows, micro_batch in data.shares(examples, size, program.rank(), program.world_size()):
        noise = routing_noise(adapters, settings.seed, step, rows)
        # evaluation.routed copies the batch to the device. base.loss takes it on the CPU, where it
        # finds the label positions without waiting for the forward pass on a GPU.
        with evaluation.routed(base, adapters, micro_batch, noise=noise):
            micro_loss = base.loss(
                micro_batch.input_ids, micro_batch.attention_mask, micro_batch.labels
            )
            micro_loss = micro_loss / target_tokens
            micro_loss.backward()
        loss += micro_loss.item()

    parameters = []
    for group in optimizer.param_groups:
        group["lr"] = group["max_lr"] * learning_rate_factor(step, settings)
        parameters += group["params"]
    for parameter in parameters:
        if parameter.grad is None:  # unused in this step, but other processes may have used it
            parameter.grad = torch.zeros_like(parameter)
    total_loss = torch.tensor(loss, dtype=torch.float64)
    runtime.sum_over_ranks([*(parameter.grad for parameter in parameters), total_loss])
    norm = clip_grad_norm_(parameters, LARGEST_NORM).item()  # waits for the device, once
    ids = ", ".join(example.id for example in examples)
    require_finite(f"step {step + 1} on {ids}: the loss", total_loss.item())
    require_finite(f"step {step + 1} on {ids}: the gradient norm", norm)
    optimizer.step()
    return {"loss": total_loss.item(), "norm": norm}


# ------------------------------------------------------------------------------------- the training


def examples_of_step(train_set: Examples, batch_order: data.BatchOrder, step: int) -> list[Example]:
    """Return the examples of a step, with one target each.

    They depend only on the data, the batch size, the seed and the step.
    """
    examples = [train_set[row] for row in batch_order.at(step)]
    return data.draw_targets(examples, batch_order.seed, step)


def evaluate(run: Run, model: Model, progress: Progress, dev: Sequence[Example], step: int) -> str:
    """Measure the loss on dev, and keep the weights if it is the lowest. Return what to print.

    step: the last step that was made, -1 before the first one.
    """
    base, adapters, _ = model
    batch_size = run.settings.eval_batch_size
    loss = evaluation.mean_loss(evaluation.measure(base, adapters, dev, batch_size=batch_size))
    require_finite(f"step {step + 1}: the dev loss", loss)
    record = {"dev_loss": loss}
    w = evaluation.router_weights(base, adapters, dev, batch_size)
    if w is not None:  # in nats: ln(K) if all w are uniform, 0 if each chooses one abstract task
        record["router_entropy"] = torch.special.entr(w).sum(dim=-1).mean().item()
    run.log(step=step, **record)
    message = f"step {step + 1} of {run.settings.steps}: dev loss {loss:.4g}"
    if loss < progress.best_loss:
        progress.best_loss = loss
        run.save_best(adapters)
        message += ", best so far"
    return message


def train(
    settings: Settings,
    device: runtime.Device,
    launch: LaunchConfig = LaunchConfig(),
    *,
    say: Callable[[str], None] = program.print_line,
) -> Run | None:
    """Train from step 0, or from progress.pt in launch.out. Return None if a signal stopped it.

    say: prints a line. Studies replace it.
    """
    # Build: the data, the frozen base with its adapters, the optimiser.
    data_config = settings.part(DataConfig)
    sets = data.load_sets(data_config, load_tokenizer(settings.model))
    for name in ("train", "dev", "seen"):
        data.require_set(sets, name, data_config)
    data.warn_of_known(sets.get("test", ()), data_config)
    train_set = sets["train"]
    dev = data.subsample(sets["dev"], settings.eval_instances)
    settings = replace(
        settings,
        steps=steps_of(settings, train_set),
        dtype=runtime.dtype_name(device.dtype),
    )
    model = build(settings, device, len(train_set.tasks), launch.shard)
    base, adapters, _ = model
    require_sets_fit(base, sets, settings.max_new_tokens)
    if settings.compile == "on":
        kernels.compile_blocks(base.blocks)
    optimizer = make_optimizer(adapters, settings)
    run = Run(Path(launch.out), settings, facts_of(model, settings, sets))
    # A resumed run loads progress.pt and does not need the run in --start, which may be gone.
    if not (launch.out and (run.path / "progress.pt").exists()):
        if settings.start:
            load_start(run, adapters)
        elif adapters.router is not None:
            fit_router(base, adapters, train_set, settings)
    if not launch.out:  # only now, so that a run that cannot begin leaves no empty folder
        run.path = new_folder(f"runs/{settings.method}")

    with run.open(), program.stop_signals(say) as stop_requested:
        # Resume or begin. With --start the loaded skills are the best so far.
        progress = run.resume(adapters, optimizer)
        runtime.broadcast(adapters.state_dict().values())  # so that all ranks have equal weights
        if progress is None:
            progress = Progress()
            if settings.start:
                say(evaluate(run, model, progress, dev, step=-1))
                run.save_progress(progress, adapters, optimizer)
        size = sum(count_parameters(adapters).values())
        batch_order = data.BatchOrder(train_set.source_lengths, settings.batch_size, settings.seed)
        epochs = settings.steps / batch_order.per_epoch
        say(
            f"{run.path}: {settings.method} trains {size:,} parameters in {settings.steps} steps, "
            f"{epochs:.1f} epochs of {len(train_set):,} rows"
        )

        first, end = progress.next_step, settings.steps
        for step in program.progress(range(first, end), "train", initial=first, total=end):
            started = time.monotonic()
            examples = examples_of_step(train_set, batch_order, step)
            record = train_step(base, adapters, optimizer, examples, step, settings)
            seconds = time.monotonic() - started
            run.log(step=step, **record, seconds=seconds)  # steps from 0; messages count from 1

            evaluating = (step + 1) % settings.eval_every == 0 or step + 1 == end
            stopping = runtime.any_rank(stop_requested())  # all processes stop together
            if evaluating:
                message = evaluate(run, model, progress, dev, step)
                say(f"{message}; training loss {record['loss']:.4g}, {seconds:.2g} s a step")
            if evaluating or stopping:
                progress.next_step = step + 1
                run.save_progress(progress, adapters, optimizer)
            if stopping:
                break
        # Ask again: a signal may have come during the last evaluation.
        return None if runtime.any_rank(stop_requested()) else run


# ---------------------------------------------------------------------------------- the program

# The metrics in the table, and their headings.
TABLE = {"loss": "loss", "rougeL": "ROUGE-L", "exact_match": "exact match"}


def score_run(run: Run, device: runtime.Device, shard: bool) -> dict[str, dict]:
    """Score the frozen base, the run in --start and this run on seen and unseen rows.

    Write scores.json: {name of a model: {"seen": ..., "unseen": ...}}, and return its content.
    """
    settings = run.settings
    sets = data.load_sets(settings.part(DataConfig), load_tokenizer(settings.model))
    held_out = held_out_sets(sets, settings.eval_instances)
    del held_out["dev"]  # it chose the weights
    run_dirs = {"frozen base": ""}
    if settings.start and Path(settings.start, "adapter.safetensors").exists():  # it may be gone
        run_dirs["start"] = settings.start
    run_dirs[settings.method] = run.path

    all_scores = {}
    for name, run_dir in run_dirs.items():
        gc.collect()  # frees the base before: it and its adapters refer to each other
        model = load(device, run_dir=run_dir, model=settings.model, shard=shard)
        all_scores[name] = {}
        for which, examples in held_out.items():
            program.print_line(f"scoring {name} on {len(examples)} {which} rows")
            _, all_scores[name][which] = evaluation.score_rows(
                model,
                examples,
                settings.metric_rules,
                batch_size=settings.eval_batch_size,
                max_new_tokens=settings.max_new_tokens,
            )
        del model
    program.write_json(run.path / "scores.json", all_scores)
    return all_scores


def print_table(all_scores: dict[str, dict], metric_rules: str) -> None:
    """Print the scores as a table in Markdown, with a line for each model, see `score_run`."""
    columns = [(which, metric) for which in all_scores["frozen base"] for metric in TABLE]
    headings = ["model", *(f"{which} {TABLE[metric]}" for which, metric in columns)]
    rows = [headings, ["---"] * len(headings)]
    for name, scores in all_scores.items():
        means = [scores[which]["overall"][metric] for which, metric in columns]
        rows.append([name, *(f"{mean:.3f}" for mean in means)])
    for row in rows:
        program.print_line(f"| {' | '.join(row)} |")
    program.print_line(evaluation.note(metric_rules))


def main() -> int:
    flags = program.read_flags(__doc__, LaunchConfig, TrainConfig, DataConfig, OrchMoEConfig)
    if "method" in flags:
        flags["method"] = load_method(flags["method"])
    launch = program.from_flags(LaunchConfig, flags)
    settings = read_settings(flags, launch)
    if launch.out and not launch.resume:
        path = Path(launch.out, "config.json")
        program.require_new([path], "add --resume, or give another --out")

    # A resumed run keeps its dtype on another machine.
    device = runtime.pick_device(launch.gpu, launch.device, settings.dtype, base=settings.model)
    program.print_line(device.description)
    with runtime.distributed(device.torch_device, launch.shard):
        run = train(settings, device, launch)
        if run is None:
            program.print_line(
                "stopped; go on with --resume, the same --out and the same device (another one "
                "rounds differently)"
            )
            return 130
        print_table(score_run(run, device, launch.shard), settings.metric_rules)
    command = ["python", "eval.py", "--run", str(run.path)]
    if settings.method in OWN_METHODS:
        command += ["--method", OWN_METHODS[settings.method].source]
    program.print_line(f"next: {shlex.join(command)} --split seen  # or --ask QUESTION")
    return 0


if __name__ == "__main__":
    program.run_program(main)
