"""Train adapters of a frozen transformer on Super-NaturalInstructions, then score them.

The program ends with a table that compares the frozen and the adapted model on seen and unseen
tasks. It writes its results to a run folder; run_folder.py lists the files.

    python train.py --data sni/ --gpu 0
    python train.py --method lora --steps 200 --device cpu --out runs/lora
    python train.py --resume --out runs/lora --device cpu             # after an interruption
    python train.py --start runs/orchmoe-1 --data new/      # go on from its skills, on other tasks

Test: pytest tests/unit/test_train.py tests/programs/test_programs.py
"""

import math
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

import checkpoint
import data
import kernels
import metrics
from baselines import (
    OWN_METHODS,
    attach_method,
    count_parameters,
    load_method,
    method_class,
    settings_of_method,
)
from data import Batch, Examples
from eval import (
    LOSS_NOTE,
    mean_entropy,
    mean_loss,
    measure,
    predict,
    print_if_few,
    require_fit,
    routed,
    router_report,
    router_weights,
    score,
)
from model import Backbone
from orchmoe import Adapters, OrchMoEConfig
from run_folder import PATHS, RunConfig, RunFolder, kind_of, new_folder, read_config
from support import program, runtime
from support.program import UserError
from tasks import DataConfig
from tokenizer import Tokenizer
from tokenizer import load as load_tokenizer

# ---------------------------------------------------------------------------------- settings

LARGEST_NORM = 1.0  # gradients are clipped to this norm
# Compiling takes about a minute. For each block and step it saves 0.4 to 0.5 ms if q and v are
# adapted, and 1 ms if all Linears are. These savings are computed, not measured; see docs/speed.md.
COMPILE_FROM = 150_000  # steps times blocks from which --compile auto compiles


@dataclass(frozen=True)
class TrainConfig:
    """Training: model, method, steps and learning rates."""

    model: str = str(program.ROOT / "tiny")  # Hugging Face folder (default: tiny/ of the project)
    method: str = "orchmoe"  # orchmoe, lora, moe-lora, poly, mhr, c-poly or FILE.py:Class
    seed: int = 0  # random seed (data order, initialisation, noise)
    steps: int = 600  # optimiser steps
    batch_size: int = 16  # examples per optimiser step; evaluation takes four times as many
    accumulate: int = 1  # micro-batches per optimiser step
    lr_skills: float = 1e-2  # peak learning rate of the skills, A and B; with 0 they do not train
    lr_router: float = 1e-3  # peak learning rate of the sample router
    lr_token_router: float = 1e-2  # peak learning rate of token routers, also in moe-lora
    lr_allocation: float = 1e-2  # peak learning rate of the allocation
    warmup: int = 50  # steps of linear warm-up (a tenth of --steps, unless --steps is larger)
    schedule: Literal["linear", "constant"] = "linear"  # rate after warm-up; linear: falls to 0
    eval_every: int = 100  # steps between evaluations on dev; each also saves progress.pt
    eval_instances: int = 2000  # evaluate at most this many instances of each set (0: all)
    checkpoint_blocks: bool = False  # gradient checkpointing: less memory, more time
    dtype: runtime.DtypeChoice = "auto"  # dtype of the frozen base (auto: the faster one here)
    compile: Literal["auto", "on", "off"] = "auto"  # compile the blocks; auto: in long runs on CUDA
    start: str = ""  # a finished run to start from: its base, method, adapters, data settings

    def __post_init__(self) -> None:
        program.require_least(self, steps=1, batch_size=1, accumulate=1, eval_every=1)

    @property
    def eval_batch_size(self) -> int:
        return 4 * self.batch_size


RATES = {name for name in vars(TrainConfig()) if name.startswith("lr_")}  # the learning rates


@dataclass(frozen=True)
class LaunchConfig:
    """Launch: where the run computes and writes. Nothing here is saved with the run."""

    out: str = ""  # run folder (default: runs/METHOD-N, the first that is free)
    resume: bool = False  # resume the run in --out with its own settings
    gpu: int | None = None  # number of the GPU (default: 0, if there is one)
    device: Literal["cpu", ""] = ""  # use the CPU even if there is a GPU
    shard: bool = False  # split the frozen base over the processes of torchrun


@dataclass(frozen=True)
class Settings:
    """All settings that decide the result of a run."""

    training: TrainConfig = field(default_factory=TrainConfig)
    dataset: DataConfig = field(default_factory=DataConfig)
    adapter: OrchMoEConfig = field(default_factory=OrchMoEConfig)

    @classmethod
    def from_flags(cls, flags: dict[str, Any]) -> "Settings":
        """Make settings from flags by field name. Fields that are not given have defaults."""
        return cls(
            training=program.from_flags(TrainConfig, flags),
            dataset=program.from_flags(DataConfig, flags),
            adapter=program.from_flags(OrchMoEConfig, flags),
        )

    def as_flags(self) -> dict[str, Any]:
        """Return all settings by field name, as `from_flags` takes them."""
        return {**vars(self.training), **vars(self.dataset), **vars(self.adapter)}


def saved_settings(run_config: RunConfig) -> Settings:
    """Return the settings of a run."""
    return Settings(
        training=run_config.section(TrainConfig, "training"),
        dataset=run_config.section(DataConfig, "dataset"),
        adapter=run_config.section(OrchMoEConfig, "adapter"),
    )


def read_settings(flags: dict[str, Any], launch: LaunchConfig) -> Settings:
    """Return the settings that the flags describe. `flags` holds only what was given.

    With --resume they are those of the run in --out, and flags may change only paths and
    --compile. Raise UserError for a flag that would have no effect.
    """
    if launch.resume:
        if not launch.out:
            raise UserError("--resume: give the folder of the run with --out")
        saved = saved_settings(read_config(launch.out)).as_flags()
        for name in sorted(flags.keys() & saved.keys()):
            # Paths may change, but not be added. Another machine may have no compiler.
            may_change = name == "compile" or (name in PATHS and saved[name])
            if flags[name] != saved[name] and not may_change:
                raise UserError(
                    f"{program.flag(name)} {flags[name]}: the run in {launch.out} has "
                    f"{saved[name]!r}; leave it out"
                )
        settings = Settings.from_flags(saved | flags)
        method_class(settings.training.method)  # UserError unless it is known
        return settings

    fixed, defaults = settings_of_start(flags)
    settings = Settings.from_flags(defaults | flags | fixed)

    config = settings.training
    if launch.out:
        RunFolder(launch.out).require_new()

    # The method must use every given flag.
    method, router = config.method, settings.adapter.router
    unread = unread_settings(method, router)
    for name in sorted(flags):
        reason = ""
        if name in fixed:
            reason = "is fixed by --start"
        elif name in unread:
            options = f"--method {method}"
            if "router" not in unread:
                options += f" with --router {router}"
            reason = f"{options} does not use it"
        elif name in settings.dataset.idle:
            reason = f"--data {settings.dataset.data} does not use it"
        if reason:
            raise UserError(f"{program.flag(name)}: {reason}; leave it out")
    if "warmup" in flags and config.warmup >= config.steps:
        raise UserError(f"--warmup {config.warmup}: give fewer than --steps {config.steps}")
    return settings


def unread_settings(method: str, router: str) -> set[str]:
    """Return the fields of OrchMoEConfig, and the learning rates, that a method does not read."""
    return {*vars(OrchMoEConfig()), *RATES} - settings_of_method(method, router)


def settings_of_start(flags: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings that --start fixes, and defaults that flags may change."""
    run_dir = flags.get("start")
    if not run_dir:
        return {}, {}
    settings = saved_settings(read_config(run_dir))
    method = settings.training.method
    if method not in ("orchmoe", "lora", "moe-lora"):
        raise UserError(
            f"--start {run_dir}: --method {method} cannot continue on other tasks; start from a "
            "run of orchmoe, lora or moe-lora"
        )
    fixed = {**vars(settings.adapter), "method": method}
    data_config = settings.dataset
    if "data" in flags:
        data_config = replace(data_config, data=flags["data"], test="")  # --test belongs to --data
        changed = []  # those that differ from their defaults
        for name, value in vars(data_config).items():
            if value != getattr(DataConfig, name) and name not in data_config.idle | flags.keys():
                changed.append(f"{name} {value}")
        if changed:
            program.print_line(f"data settings kept from {run_dir}: {', '.join(changed)}")
    return fixed, {**vars(data_config), "model": settings.training.model}


# ---------------------------------------------------------------------------------- optimizer


def freeze_parts(adapters: Adapters, config: TrainConfig) -> None:
    """Freeze the kinds of parameters whose learning rate is 0. Raise UserError if none is left."""
    groups = adapters.parameter_groups()
    trained = []
    for kind, parameters in groups.items():
        if getattr(config, f"lr_{kind}") > 0:
            trained += parameters
        for parameter in parameters:
            parameter.requires_grad_(getattr(config, f"lr_{kind}") > 0)
    if not trained:
        rates = ", ".join(program.flag(f"lr_{kind}") for kind, found in groups.items() if found)
        raise UserError(f"{rates}: they are all 0, so that nothing trains; give one of them")


def make_optimizer(adapters: Adapters, config: TrainConfig) -> Optimizer:
    """Return AdamW without weight decay, with a peak learning rate for each kind of parameter."""
    groups = []
    for kind, parameters in adapters.parameter_groups().items():
        # train_step sets lr = max_lr * factor before each step.
        if parameters:
            groups.append({"params": parameters, "max_lr": getattr(config, f"lr_{kind}")})
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=0.0, fused=True)


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Return the factor on the peak rates: warm-up to 1, then linear decay, or constant 1."""
    steps = config.steps
    warmup = config.warmup if config.warmup < steps else steps // 10
    rise = min(1.0, (step + 1) / max(1, warmup))
    if config.schedule == "constant":
        return rise
    fall = (steps - step) / max(1, steps - warmup)
    return min(rise, fall)


# --------------------------------------------------------------------------------- initial values


def fit_router(base: Backbone, adapters: Adapters, examples: Examples, config: TrainConfig) -> None:
    """Initialise the router from at most 2,000 training examples, see Adapters.fit_router."""
    sources = data.subsample(examples, 2000)
    # Larger batches are slower on a CPU: their attention scores (B,L,L) do not fit its caches.
    batches = [batch for _, batch in data.batches(sources, 8, base.device, "router start")]
    with program.checking_settings():  # there may be too few
        adapters.fit_router(
            (base.embed(batch.input_ids) for batch in batches),
            (batch.attention_mask for batch in batches),
            generator=runtime.generator(config.seed, 1),  # stream 1: k-means
        )


def choose_compile(
    config: TrainConfig, base: Backbone, device: torch.device, shard: bool
) -> Literal["on", "off"]:
    """Return whether to compile the blocks, and print why.

    Raise UserError if --compile on is not possible.
    """
    if config.compile == "on" and shard:  # FSDP2 puts hooks into the blocks
        raise UserError("--shard and --compile: give one of the two")

    size = f"{config.steps} steps x {len(base.blocks)} blocks"
    if config.compile != "auto":
        choice, reason = config.compile, f"--compile is {config.compile}"
    elif device.type != "cuda":
        choice, reason = "off", "--compile auto does so only on CUDA"
    elif shard:
        choice, reason = "off", "--compile auto does not do so with --shard"
    elif config.steps * len(base.blocks) < COMPILE_FROM:
        choice, reason = "off", f"{size} are fewer than {COMPILE_FROM:,}, too few to gain from it"
    else:
        choice, reason = "on", f"{size} are at least {COMPILE_FROM:,}"

    if choice == "on":
        try:
            kernels.require_compiler(device)
        except RuntimeError as error:
            if config.compile == "on":
                raise UserError(
                    f"--compile on: torch cannot compile here ({error!s:.100}); install gcc, or "
                    "give --compile off"
                ) from None
            choice, reason = "off", "torch cannot compile here"
            program.warn(f"{reason}: {error!s:.100}")
    verb = "are" if choice == "on" else "are not"
    program.print_line(f"blocks {verb} compiled: {reason}")
    return choice


# ----------------------------------------------------------------------------------- one step


def train_step(
    base: Backbone,
    adapters: Adapters,
    optimizer: Optimizer,
    batch: Batch,
    step: int,
    config: TrainConfig,
) -> dict[str, float]:
    """Run one optimiser step. Return loss, gradient norm, routing entropy and target tokens.

    The loss is summed over the target tokens and divided by their number in the whole step. So it
    does not depend on how the step is cut into micro-batches and processes.
    """
    base.train()
    optimizer.zero_grad()
    loss = 0.0
    entropy = 0.0
    for rows, micro_batch in batch.split(config.accumulate, program.rank(), program.world_size()):
        noise = routing_noise(adapters, config.seed, step, rows)
        # The router reads a copy of the batch on the device. base.loss takes the batch on the CPU:
        # it finds the label positions there, and does not wait for the forward pass on a GPU.
        with routed(base, adapters, micro_batch, noise=noise) as routing:
            micro_loss = base.loss(
                micro_batch.input_ids, micro_batch.attention_mask, micro_batch.labels
            )
            micro_loss = micro_loss / batch.target_tokens
            micro_loss.backward()
        loss += micro_loss.item()
        entropy += mean_entropy(routing.w) * len(rows) / len(batch.ids)  # 0 for a dummy row

    parameters = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    for parameter in parameters:
        if parameter.grad is None:  # no forward pass of this step used it
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters]
    loss, entropy = runtime.sum_over_ranks(gradients, loss, entropy)

    norm = get_total_norm(gradients)
    norm_value = norm.item()
    require_finite(step, batch.ids, loss=loss, gradient_norm=norm_value)
    clip_grads_with_norm_(parameters, LARGEST_NORM, norm)
    for group in optimizer.param_groups:
        group["lr"] = group["max_lr"] * learning_rate_factor(step, config)
    optimizer.step()
    return {
        "loss": loss,
        "norm": norm_value,
        "entropy": entropy,
        "target_tokens": batch.target_tokens,
    }


def routing_noise(adapters: Adapters, seed: int, step: int, rows: Sequence[int]) -> Tensor | None:
    """Return noise u (B, *noise_shape) in [0,1) on the CPU, None if the method uses none.

    The noise of a row depends only on (seed, step, row), so a resumed run draws the same numbers.
    """
    if adapters.noise_shape is None:
        return None
    noise = []
    for row in rows or [0]:  # a process without rows has a dummy row, see Batch.split
        generator = runtime.generator(seed, step, row)
        noise.append(torch.rand(adapters.noise_shape, generator=generator))
    return torch.stack(noise)


class DivergedError(UserError):
    """A loss, a gradient or a weight is not a finite number."""


def require_finite(step: int, ids: Sequence[str] = (), **values: float) -> None:
    """Raise DivergedError if a value is not a finite number.

    ids: those of the examples that the values were computed from, if these are one batch.
    """
    location = f"step {step + 1}"  # the progress lines count from 1, too
    if ids:
        location += f" on {', '.join(ids)}"
    for name, value in values.items():
        if not math.isfinite(value):
            raise DivergedError(
                f"{location}: the {name.replace('_', ' ')} is {value}; "
                "what was saved is intact, but a resumed run would repeat this; start a new "
                "run with lower learning rates or --dtype float32"
            )


# -------------------------------------------------------------------------------- the whole run


def train(
    settings: Settings,
    device: runtime.Device,
    launch: LaunchConfig = LaunchConfig(),
    *,
    final_scores: bool = True,
    attach_function: Callable[..., Adapters] = attach_method,
) -> Path | None:
    """Train from the start, or from progress.pt in launch.out.

    Return the path of the run folder, or None if a signal stopped the run before its end.

    final_scores: score the frozen base and the trained model on seen and unseen tasks, and print
    a table. Without it there are no lines of progress, either.
    attach_function: a function like baselines.attach_method, for studies that change the routing.
    """
    config = settings.training

    # Tokenizer and data. "seen" holds new instances of the training tasks. The set "test", of the
    # test tasks, is called "unseen" in `held_out` and in the scores. Each evaluated set is cut to
    # --eval-instances.
    tokenizer = load_tokenizer(config.model)
    sets = data.load_sets(settings.dataset, tokenizer)
    for name in ("train", "dev", "seen"):
        data.require_set(sets, name, settings.dataset)
    train_set = sets["train"]
    held_out = held_out_sets(sets, config.eval_instances)

    # The frozen base.
    base = checkpoint.mapped(config.model)  # its weights are views of the files
    base_digest = checkpoint.fingerprint(config.model)
    if not launch.shard:  # runtime.shard moves one block at a time
        base.to(device.torch_device, device.dtype)
    require_fit(base, tokenizer, train_set, max_new_tokens=0)  # training generates nothing
    for examples in held_out.values():
        require_fit(base, tokenizer, examples, settings.dataset.max_new_tokens)

    # The adapters.
    with program.checking_settings():
        adapters = attach_function(
            config.method,
            base,
            settings.adapter,
            num_tasks=len(train_set.tasks),
            generator=runtime.generator(config.seed, 0),  # stream 0: initial values
        )
    # Fail now rather than at the first save.
    with program.reading(f"--method {config.method}", "give it a state of plain tensors"):
        checkpoint.adapter_bytes(adapters.state_dict())
    compiled = choose_compile(config, base, device.torch_device, launch.shard)
    if compiled == "on":
        base.compile_blocks()
    if launch.shard:
        runtime.shard(base, base.blocks, device)
    # Only after sharding, freeze the adapters that do not train: `shard` splits every frozen
    # weight, and adapters must stay whole.
    freeze_parts(adapters, config)
    base.checkpoint_blocks = config.checkpoint_blocks

    # Initial values of the adapters, unless progress.pt is loaded below. A run that was
    # interrupted before its first save starts again at step 0.
    is_new = not launch.out or RunFolder(launch.out).is_new(config.method)
    start_digest = ""
    if is_new and config.start:
        start_config = read_config(config.start)
        start_config.require_same(
            base=base_digest, tokenizer=tokenizer.fingerprint, kind=kind_of(adapters)
        )
        start_config.load_adapter(adapters)
        start_digest = start_config.adapter_digest()
    elif is_new and adapters.router is not None:
        fit_router(base, adapters, train_set, config)

    # What identifies the run. `run.bind` saves it, or compares it in a resumed run.
    run_config = RunConfig(
        run_dir=launch.out,
        training={**asdict(config), "compile": compiled},
        dataset=asdict(settings.dataset),
        adapter=asdict(settings.adapter),
        tasks=tuple(train_set.tasks),
        base=base_digest,
        tokenizer=tokenizer.fingerprint,
        data={name: sets[name].digest for name in ("train", "test") if name in sets},
        kind=kind_of(adapters),
        rule=train_set.facts,
        start=start_digest,
    )
    run = RunFolder(launch.out or new_folder(f"runs/{config.method}"))
    with run.lock():
        run.bind(run_config, is_new)
        counts = count_parameters(adapters)
        skills, routing = counts["skills"], counts["routing"]
        label = config.method
        if label == "lora":
            # A study may give some Linears one rank more than others.
            lora_ranks = sorted({len(linear.skill_A[0]) for linear in adapters.linears.values()})
            label = f"lora of rank {' to '.join(map(str, lora_ranks))}"
        parameters = f"{skills + routing:,} parameters"
        if routing > 0:
            parameters += f" ({skills:,} in skills, {routing:,} in routing)"
        program.print_line(
            f"{label}: trains {parameters} on {len(train_set):,} examples; run folder {run.path}"
        )

        # Score the model as it starts: the frozen base, or the base with the skills that --start or
        # `attach_function` loaded.
        if final_scores and is_new and not run.read_scores():
            # With B = 0 the skills change nothing.
            is_base = not any(linear.skill_B.any() for linear in adapters.linears.values())
            initial_name = "frozen base" if is_base else "start"
            scores = score_held_out(base, adapters, held_out, tokenizer, settings, initial_name)
            run.add_scores(initial_name, scores)

        # Optimizer, and the state of an interrupted run.
        optimizer = make_optimizer(adapters, config)
        if is_new:
            first_step = 0
            best_loss = math.inf
            initial_w = router_weights(base, adapters, held_out["dev"], config.eval_batch_size)
            run.truncate_log(0)
        else:
            first_step, best_loss, initial_w = run.load_progress(
                adapters, optimizer, len(held_out["dev"])
            )
            if best_loss < math.inf:
                run.read_best()  # fail now rather than after the last step
        runtime.broadcast(adapters.state_dict().values())  # all start from the weights of rank 0
        batch_order = data.BatchOrder(train_set.source_lengths, config.batch_size, config.seed)
        with program.stop_signals() as stop_requested:
            steps = range(first_step, config.steps)
            bar = program.progress(
                steps, "train", total=config.steps, initial=first_step, unit="step"
            )
            postfix = {}  # printed after the bar
            step_seconds = []  # of each step since the last evaluation
            for step in bar:
                # One step on a batch that depends only on the data, batch size, seed and step.
                started = time.monotonic()
                batch = training_batch(train_set, batch_order, step)
                record = train_step(base, adapters, optimizer, batch, step, config)
                step_seconds.append(time.monotonic() - started)
                tokens = batch.input_ids.numel() + batch.labels.numel()  # with padding
                record["tokens_per_s"] = round(tokens / step_seconds[-1])
                run.log(step=step, **record)  # counted from 0; messages count from 1
                postfix["loss"] = f"{record['loss']:.4g}"
                bar.set_postfix(postfix, refresh=False)

                # The last step is always followed by an evaluation.
                evaluating = step + 1 == config.steps or (step + 1) % config.eval_every == 0
                stopping = runtime.any_rank(stop_requested())  # all processes stop together
                if not (evaluating or stopping):
                    continue
                trained = sum(adapters.parameter_groups().values(), [])
                weight_norm = get_total_norm(trained)
                require_finite(step, norm_of_the_weights=weight_norm.item())

                # The loss on dev. Keep the weights that are best there.
                if evaluating:
                    losses, w = measure(
                        base, adapters, held_out["dev"], batch_size=config.eval_batch_size
                    )
                    dev_loss = mean_loss(losses)
                    require_finite(step, dev_loss=dev_loss)
                    on_dev = {"dev_loss": dev_loss}
                    if initial_w is not None:
                        on_dev["router"] = router_report(w, initial_w)
                    run.log(step=step, **on_dev)
                    message = f"step {step + 1} of {config.steps}: dev loss {dev_loss:.4g}"
                    if dev_loss < best_loss:
                        best_loss = dev_loss
                        run.save_best(run_config, adapters)
                        message += ", best so far"
                    if final_scores:  # a study decides itself what it shows
                        program.print_progress(f"{message}; {fmean(step_seconds):.2g} s a step")
                    postfix["dev_loss"] = f"{dev_loss:.4g}"
                    step_seconds.clear()

                run.save_progress(step + 1, best_loss, adapters, optimizer, initial_w)
                if stopping:
                    break
            # A signal may also have arrived during the last evaluation.
            stopped = runtime.any_rank(stop_requested())
        if stopped:
            out = shlex.quote(str(run.path))
            program.print_line(
                f"stopped; resume with --resume --out {out}, on the same device (another one "
                "rounds differently)"
            )
            return None

        # The weights that were best on dev, scored on seen and unseen tasks.
        if final_scores:
            run.load_best(adapters)
            scores = score_held_out(base, adapters, held_out, tokenizer, settings, config.method)
            all_scores = run.add_scores(config.method, scores)
            sizes = {"train": len(train_set)}
            sizes |= {set_name: len(examples) for set_name, examples in held_out.items()}
            print_table(all_scores, run, sizes, settings.dataset.metric_rules)
            if initial_w is not None:
                w = router_weights(base, adapters, held_out["dev"], config.eval_batch_size)
                print_router(router_report(w, initial_w), w.shape[1])
    return run.path


def held_out_sets(sets: dict[str, Examples], limit: int) -> dict[str, list[data.Example]]:
    """Return the sets "dev", "seen" and, if there are test tasks, "unseen".

    Each is cut to `limit` examples, evenly spaced (0: all).
    """
    held_out = {
        "dev": data.subsample(sets["dev"], limit),
        "seen": data.subsample(sets["seen"], limit),
    }
    if "test" in sets:
        held_out["unseen"] = data.subsample(sets["test"], limit)
    return held_out


def training_batch(train_set: Examples, batch_order: data.BatchOrder, step: int) -> Batch:
    """Return the batch of a step. It depends only on the data, batch size, seed and step."""
    rows = batch_order.at(step)
    return data.collate([train_set[row] for row in rows], seed=batch_order.seed, step=step)


def score_held_out(
    base: Backbone,
    adapters: Adapters,
    held_out: dict[str, list[data.Example]],
    tokenizer: Tokenizer,
    settings: Settings,
    name: str,
) -> dict[str, dict]:
    """Return the scores of the current model on seen and unseen tasks."""
    batch_size = settings.training.eval_batch_size
    scores = {}
    for set_name, examples in held_out.items():
        if set_name == "dev":  # it chooses the best weights, and is not reported
            continue
        program.print_progress(f"scoring {name} on {len(examples)} {set_name} rows")
        losses, _ = measure(
            base,
            adapters,
            examples,
            batch_size=batch_size,
            description=f"{name}, loss of {set_name}",
        )
        predictions = predict(
            base,
            adapters,
            examples,
            tokenizer,
            batch_size=batch_size,
            max_new_tokens=settings.dataset.max_new_tokens,
            description=f"{name}, {set_name}",
        )
        scores[set_name] = score(examples, predictions, settings.dataset.metric_rules, losses)
    return scores


# The metrics in the table, and their headings.
TABLE = {"loss": "loss", "rougeL": "ROUGE-L", "exact_match": "exact match"}


def print_table(
    all_scores: dict[str, dict], run: RunFolder, sizes: dict[str, int], metric_rules: str
) -> None:
    """Print the scores as a table in Markdown, with a line for each model, see `add_scores`.

    sizes: how many examples of each set were used.
    """
    headings = ["model"]
    for set_name in ("seen", "unseen"):
        headings += [f"{set_name} {metric}" for metric in TABLE.values()]
    program.print_line(f"| {' | '.join(headings)} |")
    program.print_line("| --- " * len(headings) + "|")
    for name, scores in all_scores.items():
        cells = [name]
        for set_name in ("seen", "unseen"):
            overall = scores.get(set_name, {}).get("overall", {})
            for metric in TABLE:
                value = overall.get(metric)
                digits = 3 if metric == "loss" else 2
                cells.append("-" if value is None else f"{value:.{digits}f}")
        program.print_line(f"| {' | '.join(cells)} |")

    program.print_line(f"{LOSS_NOTE} (the dev loss above is the mean over tokens)")
    rules = metrics.RULES[metric_rules].description
    program.print_line(f"ROUGE-L and exact match in per cent, by {rules}")
    counts = ", ".join(f"{size} {set_name}" for set_name, size in sizes.items())
    program.print_line(f"rows: {counts}; {run.path} has all scores")
    for set_name in ("seen", "unseen"):
        print_if_few(set_name, sizes.get(set_name, 0))


def print_router(report: dict[str, float], K: int) -> None:
    """Print in words how the router spreads the samples of dev over the abstract tasks."""
    used = report["used"]
    text = f"router: {used} of {K} abstract tasks have more than 40 % of an equal share on dev"
    if not math.isnan(report["entropy"]):  # each w is a distribution
        # A uniform w over n abstract tasks has the entropy ln(n).
        spread = math.exp(report["entropy"])
        text += f"; a sample is spread over about {spread:.1f} of them"
    program.print_line(text)


def print_next_commands(run_dir: Path, settings: Settings, flags: dict[str, Any]) -> None:
    """Print two commands that a user may want next. flags: those of the finished run."""
    config = settings.training
    run_flag = f"--run {shlex.quote(str(run_dir))}"
    program.print_line("next:")
    if config.method == "orchmoe" and settings.adapter.router == "sample":
        program.print_line(
            f"  python -m experiments.explorer {run_flag}  # see in a browser what its router does"
        )
    else:
        if config.method in OWN_METHODS:
            run_flag += f" --method {shlex.quote(OWN_METHODS[config.method].source)}"
        program.print_line(
            f"  python eval.py {run_flag} --split train  # scores on the rows that trained"
        )

    if config.start or flags.get("resume") or program.world_size() > 1:
        return
    other = "orchmoe" if config.method == "lora" else "lora"
    words = ["python", "train.py", "--method", other]
    left_out = {"method", "out", "resume"} | unread_settings(other, "sample")
    for name, value in flags.items():
        if name not in left_out:
            words += program.flag_words(name, value)
    program.print_line(f"  {shlex.join(words)}  # the same with --method {other}, to compare")


def main() -> int:
    # Settings: from the command line, or from the run folder if the run is resumed.
    configs = (LaunchConfig, TrainConfig, DataConfig, OrchMoEConfig)
    flags = program.read_flags(__doc__, *configs)
    if "method" in flags:
        flags["method"] = load_method(flags["method"])
    launch = program.from_flags(LaunchConfig, flags)
    settings = read_settings(flags, launch)

    # Where to compute. The dtype is saved, so that a resumed run keeps it on another machine.
    config = settings.training
    device = runtime.pick_device(launch.gpu, launch.device, config.dtype, base=config.model)
    program.print_line(device.description)
    config = replace(config, dtype=runtime.dtype_name(device.dtype))
    settings = replace(settings, training=config)

    with runtime.distributed(device.torch_device):
        run_dir = train(settings, device, launch)
    if run_dir is None:
        return 130  # stopped by a signal
    print_next_commands(run_dir, settings, flags)
    return 0


if __name__ == "__main__":
    program.run_program(main)
