"""Train adapters of a frozen transformer on SNI or on your own rows, then score them.

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
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

import checkpoint
import data
import metrics
from baselines import OWN_METHODS, attach_method, count_parameters, load_method
from data import Batch, Example, Examples
from eval import (
    LOSS_NOTE,
    START_NOTE,
    mean_loss,
    measure,
    print_if_few,
    require_fit,
    routed,
    router_report,
    router_weights,
    score_rows,
)
from model import Backbone
from orchmoe import Adapters, OrchMoEConfig
from run_folder import (
    PATHS,
    RATES,
    Model,
    Progress,
    Run,
    Settings,
    TrainConfig,
    attach_adapters,
    kind_of,
    new_folder,
    read_run,
    unread_settings,
)
from support import program, runtime
from support.program import UserError
from tasks import FILE_FIELDS, DataConfig
from tokenizer import load as load_tokenizer
from variants import VARIANTS

# ---------------------------------------------------------------------------------- settings

LARGEST_NORM = 1.0  # gradients are clipped to this norm
# Compiling takes about a minute. For each block and step it saves 0.4 to 0.5 ms if q and v are
# adapted, and 1 ms if all Linears are. These savings are computed, not measured; see docs/speed.md.
COMPILE_FROM = 150_000  # steps times blocks from which --compile auto compiles
# A user who gives one of these flags has chosen settings for the base.
CHOSEN = {"steps", "epochs", "batch_size", "abstract_tasks", "rank", *RATES}


@dataclass(frozen=True)
class LaunchConfig:
    """Launch: where the run computes and writes. Nothing here is saved with the run."""

    out: str = ""  # run folder (default: runs/METHOD-N, the first that is free)
    resume: bool = False  # resume the run in --out with its own settings
    gpu: int | None = None  # number of the GPU (default: 0, if there is one)
    device: Literal["cpu", ""] = ""  # use the CPU even if there is a GPU
    shard: bool = False  # split the frozen base over the processes of torchrun


def read_settings(flags: dict[str, Any], launch: LaunchConfig) -> Settings:
    """Return the settings that the flags describe. `flags` holds only what was given.

    Raise UserError for a flag that would have no effect, and if --out holds a run already.
    """
    if launch.resume:
        return settings_to_resume(flags, launch.out)

    values = flags
    unread = {}
    if "start" in flags:
        of_start = values_of_start(flags)
        fixed = {"method", "extra_rank", *(field.name for field in fields(OrchMoEConfig))}
        unread = dict.fromkeys(fixed, "with --start")
        values = of_start | flags
    settings = program.from_flags(Settings, values)
    if launch.out:
        Run(launch.out, settings, {}).require_new()
    program.refuse_unread(flags, unread_settings(settings) | unread)
    return settings


def settings_to_resume(flags: dict[str, Any], run_dir: str) -> Settings:
    """Return the settings of the run in a folder. Flags may change only paths and --compile."""
    if not run_dir:
        raise UserError("--resume: give the folder of the run with --out")
    saved = vars(read_run(run_dir).settings)
    if "epochs" in flags:
        raise UserError(
            f"--epochs: the run in {run_dir} has {saved['steps']} steps already; leave it out"
        )
    for name in sorted(flags.keys() & saved.keys()):
        value = flags[name]
        if name == "start":
            value = str(Path(value).absolute())  # as a run saves it
        # Paths may change, but not be added. Another machine may have no compiler.
        may_change = name == "compile" or (name in PATHS and saved[name])
        if value != saved[name] and not may_change:
            raise UserError(
                f"{program.flag(name)} {flags[name]}: the run in {run_dir} has {saved[name]!r}; "
                "leave it out"
            )
    return program.from_flags(Settings, saved | flags)


def values_of_start(flags: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the run in --start: its base, method, adapters and data settings."""
    start = read_run(flags["start"]).settings
    if start.method not in ("orchmoe", "lora", "moe-lora", *VARIANTS):
        raise UserError(
            f"--start {flags['start']}: --method {start.method} cannot continue on other tasks; "
            "start from a run of orchmoe, lora or moe-lora"
        )
    values = {name: getattr(start, name) for name in ("model", "method", "extra_rank")}
    values |= asdict(start.part(OrchMoEConfig)) | asdict(start.part(DataConfig))
    if "data" in flags:  # what else chooses rows belongs to the data of that run
        for name in FILE_FIELDS | {"train_instances"}:
            del values[name]
    return values


def steps_of_epoch(settings: Settings, train_set: Examples) -> int:
    """Return the number of steps of an epoch, whose last batch may be short."""
    return math.ceil(len(train_set) / settings.batch_size)


def with_steps(settings: Settings, train_set: Examples) -> Settings:
    """Return the settings with the number of steps that --epochs means for these rows."""
    if not settings.epochs:
        return settings
    steps = settings.epochs * steps_of_epoch(settings, train_set)
    return replace(settings, steps=steps, epochs=0)


def length_of_training(settings: Settings, train_set: Examples) -> str:
    """Return in words how long the training is: "600 steps of 16 are 35 epochs of 272 rows"."""
    epochs = settings.steps / steps_of_epoch(settings, train_set)
    count = f"{epochs:.0f}" if epochs >= 10 else f"{epochs:.2g}"
    unit = "epoch" if count == "1" else "epochs"
    text = f"{settings.steps} steps of {settings.batch_size} are {count} {unit}"
    return f"{text} of {len(train_set):,} rows"


def recommend(flags: dict[str, Any], model: str) -> None:
    """Print where settings for another base than the bundled one are, unless the user gave some."""
    is_bundled = Path(model).resolve() == Path(TrainConfig.model)
    if not is_bundled and CHOSEN.isdisjoint(flags):
        program.print_line(
            "the default settings are for the bundled T5; docs/use.md has a table of recommended "
            "settings for larger bases"
        )


# ---------------------------------------------------------------------------------- optimizer


def computes_as_base(adapters: Adapters) -> bool:
    """Return whether all B are 0, so that the adapted model computes what its base does."""
    return not any(skills.B.any() for skills in adapters.skills.values())


def freeze_parts(adapters: Adapters, settings: TrainConfig) -> None:
    """Freeze the parameters whose learning rate is 0. Raise UserError if nothing can train."""
    groups = adapters.parameter_groups()
    for kind, parameters in groups.items():
        for parameter in parameters:
            parameter.requires_grad_(getattr(settings, f"lr_{kind}") > 0)
    if settings.lr_skills == 0 and not settings.start and computes_as_base(adapters):
        raise UserError(
            "--lr-skills 0: the skills start with B = 0, so that nothing can train; give another "
            "rate, or --start"
        )
    if not any(parameter.requires_grad for parameter in sum(groups.values(), [])):
        raise UserError(
            f"--method {settings.method}: each of its learning rates is 0, so that nothing trains; "
            "give at least one above 0"
        )


def make_optimizer(adapters: Adapters, settings: TrainConfig) -> Optimizer:
    """Return AdamW without weight decay, with a peak learning rate for each kind of parameter."""
    groups = []
    for kind, parameters in adapters.parameter_groups().items():
        # train_step sets lr = max_lr * factor before each step.
        if parameters:
            groups.append({"params": parameters, "max_lr": getattr(settings, f"lr_{kind}")})
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=0.0, fused=True)


def learning_rate_factor(step: int, settings: TrainConfig) -> float:
    """Return the factor on the peak rates: warm-up to 1, then linear decay, or constant 1."""
    steps = settings.steps
    warmup = settings.warmup
    if warmup >= steps:  # so that a short run also reaches its peak rates
        warmup = steps // 10
    rise = min(1.0, (step + 1) / max(1, warmup))
    if settings.schedule == "constant":
        return rise
    fall = (steps - step) / max(1, steps - warmup)
    return min(rise, fall)


# --------------------------------------------------------------------------------- initial values


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


def give_initial_values(
    model: Model, facts: dict[str, Any], train_set: Examples, settings: Settings
) -> str | None:
    """Load the adapters of the run in --start, or fit the router to training examples.

    facts: those of the new run. Return a hash of the loaded adapters, None without --start.
    """
    base, adapters, _ = model
    if not settings.start:
        if adapters.router is not None:
            fit_router(base, adapters, train_set, settings)
        return None
    start = read_run(settings.start)
    start.require_same(**{name: facts[name] for name in ("base", "tokenizer", "method")})
    start.warn_if_unfinished()
    start.load_best(adapters)
    return start.adapter_digest()


# ---------------------------------------------------------------------------------- compilation


def choose_compile(
    settings: TrainConfig, base: Backbone, device: torch.device, shard: bool
) -> Literal["on", "off"]:
    """Return whether to compile the blocks, and print why."""
    size = f"{settings.steps} steps x {len(base.blocks)} blocks"
    if settings.compile != "auto":
        choice, reason = settings.compile, f"compile is {settings.compile}"
    elif device.type != "cuda":
        choice, reason = "off", "--compile auto compiles only on CUDA"
    elif shard:
        choice, reason = "off", "--compile auto does not compile with --shard"
    elif settings.steps * len(base.blocks) < COMPILE_FROM:
        choice, reason = "off", f"{size} are fewer than {COMPILE_FROM:,}, too few to gain from it"
    else:
        choice, reason = "on", f"{size} are at least {COMPILE_FROM:,}"

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
    settings: TrainConfig,
) -> dict[str, float]:
    """Run one optimiser step. Return loss and gradient norm.

    The loss is summed over the target tokens and divided by their number in the whole step. So it
    does not depend on how the step is cut into micro-batches and processes.
    """
    base.train()
    optimizer.zero_grad()
    loss = 0.0
    for rows, micro_batch in batch.split(settings.accumulate, program.rank(), program.world_size()):
        noise = routing_noise(adapters, settings.seed, step, rows)
        # `routed` copies the batch to the device. base.loss takes it on the CPU, where it finds the
        # label positions without waiting for the forward pass on a GPU.
        with routed(base, adapters, micro_batch, noise=noise):
            micro_loss = base.loss(
                micro_batch.input_ids, micro_batch.attention_mask, micro_batch.labels
            )
            micro_loss = micro_loss / batch.target_tokens
            micro_loss.backward()
        loss += micro_loss.item()

    parameters = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    for parameter in parameters:
        if parameter.grad is None:  # unused in this step, but other processes may have used it
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters]
    loss = runtime.sum_over_ranks(gradients, loss)  # and the gradients in place

    norm = get_total_norm(gradients)
    norm_value = norm.item()
    require_finite(step, batch.ids, loss=loss, gradient_norm=norm_value)
    clip_grads_with_norm_(parameters, LARGEST_NORM, norm)
    for group in optimizer.param_groups:
        group["lr"] = group["max_lr"] * learning_rate_factor(step, settings)
    optimizer.step()
    return {"loss": loss, "norm": norm_value}


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
    """A loss or the norm of a gradient is not a finite number."""


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


# --------------------------------------------------------------------------- scores and reports


def held_out_sets(sets: dict[str, Examples], limit: int) -> dict[str, list[Example]]:
    """Return the sets "dev", "seen" and, if there are test tasks, "unseen".

    "seen" holds new instances of the training tasks, "unseen" instances of the test tasks. Each is
    cut to `limit` examples, evenly spaced (0: all).
    """
    held_out = {}
    for name, set_name in (("dev", "dev"), ("seen", "seen"), ("unseen", "test")):
        if set_name in sets:
            held_out[name] = data.subsample(sets[set_name], limit)
    return held_out


def require_all_fit(
    model: Model, train_set: Examples, held_out: dict[str, list[Example]], max_new_tokens: int
) -> None:
    """Raise UserError if the tokenizer is of another base, or an example is too long for it."""
    base, _, tokenizer = model
    require_fit(base, tokenizer, train_set, max_new_tokens=0)  # training generates nothing
    for examples in held_out.values():
        require_fit(base, tokenizer, examples, max_new_tokens)


def score_held_out(
    model: Model, held_out: dict[str, list[Example]], settings: Settings, name: str
) -> dict[str, dict]:
    """Return the scores of the model on seen and unseen tasks."""
    scores = {}
    for set_name, examples in held_out.items():
        if set_name == "dev":  # it chooses the best weights, and is not reported
            continue
        program.print_line(f"scoring {name} on {len(examples)} {set_name} rows")
        _, scores[set_name] = score_rows(
            model,
            examples,
            settings.metric_rules,
            batch_size=settings.eval_batch_size,
            max_new_tokens=settings.max_new_tokens,
        )
    return scores


# The metrics in the table, and their headings.
TABLE = {"loss": "loss", "rougeL": "ROUGE-L", "exact_match": "exact match"}


def print_table(
    all_scores: dict[str, dict], run_dir: Path, sizes: dict[str, int], metric_rules: str
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
    program.print_line(f"rows: {counts}; {run_dir} has all scores")
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


def report(
    run: Run,
    model: Model,
    progress: Progress,
    train_set: Examples,
    held_out: dict[str, list[Example]],
) -> None:
    """Score the weights that were best on dev on seen and unseen tasks, and print the table."""
    settings = run.settings
    run.load_best(model.adapters)
    scores = score_held_out(model, held_out, settings, settings.method)
    all_scores = run.add_scores(settings.method, scores)
    sizes = {"train": len(train_set)}
    sizes |= {set_name: len(examples) for set_name, examples in held_out.items()}
    print_table(all_scores, run.path, sizes, settings.metric_rules)
    if settings.start:
        program.print_line(f"rows in this table {START_NOTE}")
    if progress.best_router is not None:
        print_router(progress.best_router, K=progress.initial_w.shape[1])


# ---------------------------------------------------------------------------- the training loop


def training_batch(train_set: Examples, batch_order: data.BatchOrder, step: int) -> Batch:
    """Return the batch of a step. It depends only on the data, batch size, seed and step."""
    rows = batch_order.at(step)
    return data.collate([train_set[row] for row in rows], seed=batch_order.seed, step=step)


def evaluate(run: Run, model: Model, progress: Progress, dev: Sequence[Example], step: int) -> str:
    """Measure the loss on dev, and keep the weights if it is the lowest. Return what to print.

    step: the last step that was made, -1 before the first one.
    """
    base, adapters, _ = model
    settings = run.settings
    loss = mean_loss(measure(base, adapters, dev, batch_size=settings.eval_batch_size))
    require_finite(step, dev_loss=loss)
    record = {"dev_loss": loss}
    if progress.initial_w is not None:
        w = router_weights(base, adapters, dev, settings.eval_batch_size)
        record["router"] = router_report(w, progress.initial_w)
    run.log(step=step, **record)
    message = f"step {step + 1} of {settings.steps}: dev loss {loss:.4g}"
    if loss < progress.best_loss:
        progress.best_loss = loss
        progress.best_router = record.get("router")
        run.save_best(adapters)
        message += ", best so far"
    return message


def fit(
    run: Run,
    model: Model,
    optimizer: Optimizer,
    progress: Progress,
    train_set: Examples,
    dev: Sequence[Example],
    final_scores: bool,
) -> bool:
    """Train to the last step. Return False if a signal arrived before the end.

    Keep the weights that are best on dev, and save after each evaluation and before stopping.
    """
    base, adapters, _ = model
    settings = run.settings
    batch_order = data.BatchOrder(train_set.source_lengths, settings.batch_size, settings.seed)
    first_step = progress.next_step
    steps = range(first_step, settings.steps)
    bar = program.progress(steps, "train", total=settings.steps, initial=first_step, unit="step")
    step_seconds = []  # of each step since the last evaluation
    with program.stop_signals() as stop_requested:
        for step in bar:
            started = time.monotonic()
            batch = training_batch(train_set, batch_order, step)
            record = train_step(base, adapters, optimizer, batch, step, settings)
            step_seconds.append(time.monotonic() - started)
            # Steps count from 0 here, and from 1 in messages.
            run.log(step=step, **record, seconds=step_seconds[-1])
            if final_scores:  # a study decides itself what it shows
                shown = {"loss": record["loss"], "best dev loss": progress.best_loss}
                bar.set_postfix(shown, refresh=False)

            # The last step is always followed by an evaluation.
            evaluating = step + 1 == settings.steps or (step + 1) % settings.eval_every == 0
            stopping = runtime.any_rank(stop_requested())  # all processes stop together
            if not (evaluating or stopping):
                continue
            if evaluating:
                message = evaluate(run, model, progress, dev, step)
                if final_scores:
                    program.print_line(f"{message}; {fmean(step_seconds):.2g} s a step")
                step_seconds.clear()
            progress.next_step = step + 1
            run.save_progress(progress, adapters, optimizer)
            if stopping:
                break
        # Ask again: a signal may have come during the last evaluation. Then a resumed run goes on
        # with the final scores.
        return not runtime.any_rank(stop_requested())


# -------------------------------------------------------------------------------- the whole run


def build(
    settings: Settings,
    device: runtime.Device,
    num_tasks: int,
    attach_function: Callable[..., Adapters],
    shard: bool = False,
) -> tuple[Backbone, Adapters]:
    """Return the frozen base and its adapters, as they are before the router is fitted.

    num_tasks: number of training tasks. shard: split the base over the processes of torchrun. Raise
    UserError if the adapters do not fit, or if nothing can train.
    """
    base = checkpoint.mapped(settings.model)  # its weights are views of the files
    base.checkpoint_blocks = settings.checkpoint_blocks
    if not shard:  # runtime.shard moves one block at a time
        base.to(device.torch_device, device.dtype)
    adapters = attach_adapters(settings, base, num_tasks, attach_function)
    if shard:
        runtime.shard(base, base.blocks, device)
    # After sharding, because `shard` would also split adapters that are frozen.
    freeze_parts(adapters, settings)
    return base, adapters


def print_size(run: Run, adapters: Adapters, train_set: Examples) -> None:
    """Print what trains, on how many examples, and where the results will be."""
    label = run.settings.method
    if label == "lora":
        # With --extra-rank some Linears may have one rank more than others.
        ranks = sorted({skills.A.shape[1] for skills in adapters.skills.values()})
        label = f"lora of rank {' to '.join(map(str, ranks))}"
    counts = count_parameters(adapters)
    skills, routing = counts["skills"], counts["routing"]
    parameters = f"{skills + routing:,} parameters"
    if routing > 0:
        parameters += f" ({skills:,} in skills, {routing:,} in routing)"
    program.print_line(
        f"{label}: trains {parameters} on {len(train_set):,} examples; run folder {run.path}"
    )


def begin(
    run: Run,
    model: Model,
    optimizer: Optimizer,
    held_out: dict[str, list[Example]],
    final_scores: bool,
) -> Progress:
    """Score the model as it starts, and return the progress of a new run.

    Skills that --start or `attach_function` has loaded stay the best until a step is better on dev.
    """
    settings = run.settings
    base, adapters, _ = model
    is_base = computes_as_base(adapters)
    if final_scores and not run.read_scores():  # an interrupted run may have them already
        name = "frozen base" if is_base else "start"
        run.add_scores(name, score_held_out(model, held_out, settings, name))
    initial_w = router_weights(base, adapters, held_out["dev"], settings.eval_batch_size)
    progress = Progress(initial_w=initial_w)
    if not is_base:
        message = evaluate(run, model, progress, held_out["dev"], step=-1)
        if final_scores:
            program.print_line(message)
        run.save_progress(progress, adapters, optimizer)
    return progress


def train(
    settings: Settings,
    device: runtime.Device,
    launch: LaunchConfig = LaunchConfig(),
    *,
    final_scores: bool = True,
    attach_function: Callable[..., Adapters] = attach_method,
) -> Path | None:
    """Train from the start, or from progress.pt in launch.out.

    Return the path of the run folder, or None if a signal stopped the run before its final scores.

    final_scores: score the frozen base and the trained model on seen and unseen tasks, and print
    a table. Without it no dev losses are printed, either.
    attach_function: a function like baselines.attach_method, for studies that change the routing.
    """
    # Build: the data, the frozen base, and its adapters.
    tokenizer = load_tokenizer(settings.model)
    data_config = settings.part(DataConfig)
    sets = data.load_sets(data_config, tokenizer)
    data.warn_of_known(sets.get("test", ()), data_config)
    for name in ("train", "dev", "seen"):
        data.require_set(sets, name, settings)
    train_set = sets["train"]
    settings = with_steps(settings, train_set)
    held_out = held_out_sets(sets, settings.eval_instances)
    base, adapters = build(settings, device, len(train_set.tasks), attach_function, launch.shard)
    model = Model(base, adapters, tokenizer)
    require_all_fit(model, train_set, held_out, settings.max_new_tokens)
    compiled = choose_compile(settings, base, device.torch_device, launch.shard)
    if compiled == "on":
        base.compile_blocks()

    # Bind: the final settings, and the facts that the result depends on.
    settings = replace(settings, compile=compiled, dtype=runtime.dtype_name(device.dtype))
    facts = {
        "base": checkpoint.fingerprint(settings.model),
        "tokenizer": tokenizer.fingerprint,
        "method": kind_of(adapters),
        **train_set.facts,
        "train_tasks": train_set.digest,
        "test_tasks": sets["test"].digest if "test" in sets else "",
        # Last: if other facts differ, too, a message names them and not the beginning of this list.
        "tasks": list(train_set.tasks),
    }
    # A run without progress.pt begins, even with --resume.
    if launch.out and Path(launch.out, "progress.pt").exists():
        # progress.pt has the weights, so the folder of --start may be gone.
        facts["start"] = read_run(launch.out).facts.get("start")
    else:
        facts["start"] = give_initial_values(model, facts, train_set, settings)

    run = Run(launch.out or new_folder(f"runs/{settings.method}"), settings, facts)
    with run.lock():
        run.bind()
        print_size(run, adapters, train_set)
        if final_scores:  # a study prints it once for all runs
            program.print_line(length_of_training(settings, train_set))

        # Resume or begin.
        optimizer = make_optimizer(adapters, settings)
        progress = run.resume(adapters, optimizer)
        runtime.broadcast(adapters.state_dict().values())  # so that all ranks have equal weights
        if progress is None:
            progress = begin(run, model, optimizer, held_out, final_scores)

        finished = fit(run, model, optimizer, progress, train_set, held_out["dev"], final_scores)
        if not finished:
            if final_scores:  # a study resumes its runs itself
                words = ["--resume", "--out", str(run.path), *device_flags(launch)]
                if settings.method in OWN_METHODS:  # its file is loaded by the flag alone
                    words += ["--method", OWN_METHODS[settings.method].source]
                program.print_line(
                    f"stopped; resume with {shlex.join(words)}, on the same device (another one "
                    "rounds differently)"
                )
            return None
        if final_scores:
            report(run, model, progress, train_set, held_out)
    return run.path


# ---------------------------------------------------------------------------------- the program


def flags_of(settings: Settings, left_out: Sequence[str] = ()) -> list[str]:
    """Return the flags that give these settings. Defaults, and what has no effect, are left out."""
    unread = unread_settings(settings)
    words = []
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value == field.default or field.name in unread or field.name in left_out:
            continue
        if field.name == "method" and value in OWN_METHODS:
            value = OWN_METHODS[value].source
        words += program.flag_words(field.name, value)
    return words


def device_flags(config: Any) -> list[str]:
    """Return --gpu and --device of a config as they were given."""
    words = []
    if config.gpu is not None:
        words += program.flag_words("gpu", config.gpu)
    if config.device:
        words += program.flag_words("device", config.device)
    return words


def print_next_commands(run_dir: Path, settings: Settings, launch: LaunchConfig) -> None:
    """Print two commands that a user may want after a run."""
    method = settings.method
    look = ["python", "eval.py", "--run", str(run_dir), "--split", "train", *device_flags(launch)]
    if method == "orchmoe":
        look = ["python", "-m", "experiments.explorer", "--run", str(run_dir)]  # on the CPU
    elif method in OWN_METHODS:
        method = OWN_METHODS[method].source
        look += ["--method", method]

    rival = "orchmoe" if method == "lora" else method
    compare = ["python", "-m", "experiments.compare", "--methods", f"{rival},lora"]
    compare += flags_of(settings, ("method", "seed", "start", "extra_rank"))  # compare sets these
    compare += device_flags(launch)
    program.print_line("next:")
    program.print_line(f"  {shlex.join(look)}  # see what it learnt")
    program.print_line(f"  {shlex.join(compare)}  # is {rival} better than lora?")


def main() -> int:
    # Settings: from the command line, or from the run folder if the run is resumed.
    configs = (LaunchConfig, TrainConfig, DataConfig, OrchMoEConfig)
    flags = program.read_flags(__doc__, *configs)
    if "method" in flags:
        flags["method"] = load_method(flags["method"])
    launch = program.from_flags(LaunchConfig, flags)
    settings = read_settings(flags, launch)
    if launch.shard and settings.compile == "on":  # FSDP2 puts hooks into the blocks
        raise UserError(
            "--shard and --compile: give one of the two (a resumed run may need --compile off)"
        )

    # Where to compute. A resumed run keeps its dtype on another machine.
    device = runtime.pick_device(launch.gpu, launch.device, settings.dtype, base=settings.model)
    program.print_line(device.description)
    if not launch.resume:
        recommend(flags, settings.model)
    with runtime.distributed(device.torch_device, launch.shard):
        run_dir = train(settings, device, launch)
    if run_dir is None:
        return 130  # stopped by a signal
    print_next_commands(run_dir, settings, launch)
    return 0


if __name__ == "__main__":
    program.run_program(main)
