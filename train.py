"""Trains adapters (or with --method full every weight) of a transformer on Super-NaturalInstructions; ends
with a table of the frozen and the adapted model on seen and unseen tasks. A run folder holds config.json,
metrics.jsonl, checkpoint.pt (the last state), the adapter that was best on dev as adapter.safetensors
(--method full: model/) and scores.json.

    python train.py --data sni/ --gpu 0
    python train.py --method lora --steps 200 --device cpu --out runs/lora
    python train.py --resume --out runs/lora --device cpu    # after an interruption
    python train.py --start runs/orchmoe-1 --trainable mixture --data new/    # a new task from a few examples
"""

import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch.optim import Optimizer

import checkpoint
import data
import eval as evaluation
import runtime
import tokenizer as tokenizers
from baselines import METHODS, attach_method, count
from model import Backbone
from orchmoe import Adapters, OrchMoEConfig

TRAINED = {  # kinds of parameters by --trainable; of a mixture's router the bias alone
    "all": {"skills", "router", "token_router", "allocation", "full"}, "router": {"router", "token_router"},
    "allocation": {"allocation"}, "mixture": {"router"},
}  # fmt: skip
CLIP = 1.0  # largest norm of the gradient


@dataclass(frozen=True)
class TrainConfig:
    """Training: model, method, steps and rates."""

    model: str = str(runtime.ROOT / "tiny")  # Hugging Face folder (default: tiny/ of this repository)
    method: Literal[METHODS] = "orchmoe"  # what trains
    seed: int = 0  # of order, initial values, noise
    steps: int = 600  # optimiser steps
    batch_size: int = 16  # examples of one optimiser step; four times as many are evaluated at once
    accumulate: int = 1  # micro-batches that a step is computed in
    lr_skills: float = 3e-3  # peak learning rate of A and B
    lr_router: float = 2e-5  # of the sample's router, whose features are standardised
    lr_token_router: float = 1e-2  # of routers that read raw tokens: --router token, moe-lora
    lr_allocation: float = 1e-2  # of the allocation matrices, and of --trainable mixture
    lr_full: float = 5e-5  # of every weight, with --method full
    warmup: int = 50  # steps of linear warm-up
    schedule: Literal["linear", "constant"] = "linear"  # after warm-up: down towards 0, or level
    eval_every: int = 100  # steps between dev losses and checkpoints
    eval_instances: int = 2000  # at most this many of each evaluated set, evenly over it (0: all)
    checkpoint_blocks: bool = False  # recompute each block in the backward: less memory, more time
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the base; auto: bfloat16 where faster
    start: str = ""  # folder of a run to begin with: its base, method and adapters
    trainable: Literal[tuple(TRAINED)] = "all"  # what of it trains; mixture: one w for all samples
    loras: tuple[str, ...] = ()  # folders of LoRAs by peft, which become the skills and stay as they are
    extra_rank: int = 0  # ranks on top, for comparisons at equal size

    def __post_init__(self) -> None:
        runtime.require_least(self, steps=1, batch_size=1, accumulate=1, eval_every=1)
        if self.start and self.loras or self.trainable != "all" and not self.start:
            raise ValueError("--start, which --trainable goes with, and --loras: give one of the two")

    @property
    def eval_batch_size(self) -> int:
        return 4 * self.batch_size


@dataclass(frozen=True)
class PlaceConfig:
    """Place: where the run computes and what it writes."""

    out: str = ""  # run folder (default: runs/METHOD-N, the first that is free)
    resume: bool = False  # go on with the run in --out, with its own settings
    gpu: int | None = None  # number of the GPU (default: 0, where there is one)
    device: Literal["cpu", ""] = ""  # no GPU even if there is one
    shard: bool = False  # split the frozen base over the processes of torchrun
    compile: bool = False  # torch.compile each block: a minute at the start, then faster steps

    def __post_init__(self) -> None:
        if self.shard and self.compile:  # FSDP2's hooks stand inside the blocks, and no graph takes them
            raise ValueError("--shard and --compile: give one of the two")


CONFIGS = {"train": TrainConfig, "data": data.DataConfig, "adapter": OrchMoEConfig}
HIDDEN = ("extra_rank",)  # flags that only the comparison gives
STARTED = ("orchmoe", "orchmoe-factors", "lora", "moe-lora")  # methods that --start goes on with
# places that a run has may change from start to resume; what is there may not
MOVABLE = {"model", "data", "text", "start", "loras"}
SIZES, ROUTED = {"skills", "rank", "alpha", "targets", "lr_skills"}, {"lr_allocation"}
USED = {  # of the adapter's settings and the rates, what each method but orchmoe reads
    "lora": SIZES, "moe-lora": SIZES | {"lr_token_router"}, "poly": SIZES | ROUTED, "mhr": SIZES | ROUTED,
    "c-poly": SIZES | ROUTED, "full": {"lr_full"},
}  # fmt: skip
IDLE = {  # of the same, what orchmoe leaves unread with each router
    "sample": {"lr_token_router"}, "token": {"lr_router", "router_attention", "router_init"},
    "none": {"lr_router", "lr_token_router", "router_attention", "router_init", "router_norm"},
}  # fmt: skip


def read_configs(flags: dict[str, Any], where: PlaceConfig, classes: dict[str, type] = CONFIGS
                 ) -> dict[str, Any]:
    """The configs by name; with --resume those of the run, which flags must not contradict. ValueError for a
    flag that would be ignored."""
    if where.resume:
        if not where.out:
            raise ValueError("--resume: name the folder of the run by --out")
        configs = evaluation.Run.read(where.out).configs(where.out, **classes)
        kept = {name: value for config in configs.values() for name, value in vars(config).items()}
        for name in sorted(flags.keys() & kept.keys() - {name for name in MOVABLE if kept.get(name)}):
            if flags[name] != kept[name]:
                raise ValueError(f"--{name.replace('_', '-')} {flags[name]}: the run in {where.out} has "
                                 f"{kept[name]!r}; leave it out")
        return {name: runtime.from_flags(cls, kept | flags) for name, cls in classes.items()}
    if where.out and any(Path(where.out).glob("*.json*")):  # of a run, or of an evaluation
        raise ValueError(f"--out {where.out}: holds a run already; add --resume, or name another folder")
    fixed, free = brought(flags)
    configs = {name: runtime.from_flags(cls, free | flags | fixed) for name, cls in classes.items()}
    config, rates = configs["train"], {name for name in vars(TrainConfig()) if name[:3] == "lr_"}
    method, every = config.method, rates | vars(OrchMoEConfig()).keys()
    unused = every - USED.get(method, every - {"lr_full"} - IDLE[configs["adapter"].router])
    idle = rates - set(rates_of(config).values())
    for name in sorted(flags.keys() & (fixed.keys() | unused | idle)):
        router = f" --router {configs['adapter'].router}" if method not in USED else ""
        why = ("comes with --start or --loras" if name in fixed else
               f"not used by --method {method}{router}" if name in unused else "nothing of that rate trains")
        raise ValueError(f"--{name.replace('_', '-')}: {why}; leave it out")
    return configs


def rates_of(config: TrainConfig) -> dict[str, str]:
    """{kind of what trains: the field of its peak rate}; a mixture is a row of an allocation."""
    kinds = TRAINED[config.trainable] - ({"skills"} if config.loras else set())
    return {kind: "lr_allocation" if config.trainable == "mixture" else f"lr_{kind}" for kind in kinds}


def brought(flags: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that --start and --loras bring: those that no flag may name, and those that it may."""
    if folder := flags.get("start"):
        configs = evaluation.Run.read(folder).configs(folder, **CONFIGS)
        began, prompts, adapter = (vars(config) for config in configs.values())
        if began["method"] not in STARTED:
            raise ValueError(f"--start {folder}: a run of --method {began['method']}; only adapters without "
                             f"task ids go on, those of {', '.join(STARTED)}")
        return (adapter | {name: began[name] for name in ("method", "extra_rank")},
                prompts | {"model": began["model"]})
    if folders := flags.get("loras"):
        loras = [checkpoint.load_peft(folder) for folder in folders]
        if bases := {lora.base for lora in loras if lora.base != loras[0].base}:
            raise ValueError(f"--loras: of different bases, {loras[0].base} and {min(bases)}")
        return ({"method": "orchmoe", "skills": len(loras), "rank": max(lora.rank for lora in loras),
                 "alpha": None}, {"allocation_std": 0.0})  # from their average on
    return {}, {}


# ----------------------------------------------------------------------------------------------------- pieces


def begin(base: Backbone, adapters: Adapters, examples: data.Examples, config: TrainConfig) -> None:
    """What does not start at random: the adapters of --start; the skills of --loras; the router, from at most
    2,000 training sources, see Adapters.fit_router. A mixture is a router without W_task: softmax(b), at
    first the mean w of these sources."""
    few = data.subsample(examples, 2000)
    if config.start:
        adapters.load_state_dict(evaluation.Run.read(config.start).kept(config.start)[0])
        if config.trainable == "mixture":
            w = evaluation.measure(base, adapters, few, batch_size=config.eval_batch_size)[1].mean(0)
            softmax = adapters.router.config.router_norm == "softmax"
            adapters.router.task.data.zero_()
            adapters.router.bias.data.copy_(w.clamp(min=1e-6).log() if softmax else w)
        return
    if config.loras:
        checkpoint.set_skills(adapters, [checkpoint.load_peft(folder) for folder in config.loras])
    size = min(8, config.eval_batch_size)  # its (B,L,L) scores outgrow every cache; larger is slower
    parts = [part for _, part in data.batches(few, size, base.device, "router start")]
    adapters.fit_router((base.embed(part.input_ids) for part in parts),
                        (part.attention_mask for part in parts), generator=runtime.generator(config.seed, 1))


def freeze(adapters: Adapters, config: TrainConfig) -> None:
    """Leaves training to what --trainable names; ValueError where the run has none of it."""
    for kind, group in adapters.parameter_groups().items():
        for parameter in group:
            fits = parameter.dim() == 1 or config.trainable != "mixture"
            parameter.requires_grad_(kind in rates_of(config) and fits)
    if not any(adapters.parameter_groups().values()):
        raise ValueError(f"--trainable {config.trainable}: the run in {config.start} has no such part")


def make_optimizer(adapters: Adapters, config: TrainConfig) -> Optimizer:
    """AdamW without weight decay, with a peak rate for each kind of parameter."""
    groups = [{"params": parameters, "max_lr": getattr(config, rates_of(config)[kind])}
              for kind, parameters in adapters.parameter_groups().items() if parameters]
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=0.0, fused=True)


def lr_factor(step: int, config: TrainConfig) -> float:
    """Factor of the peak learning rates at `step`: linear warm-up, then linear to 0 or level."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    left = (config.steps - step) / max(1, config.steps - config.warmup)
    return min(warm, left) if config.schedule == "linear" else warm


def require_finite(where: str, **values: float) -> None:
    """ValueError that says where, unless all values are finite numbers."""
    if not all(map(math.isfinite, values.values())):
        said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())
        raise ValueError(f"{where}: {said}; the last checkpoint is untouched; start anew with lower learning "
                         "rates or --dtype float32")


# --------------------------------------------------------------------------------------------------- training


def train_step(base: Backbone, adapters: Adapters, optimizer: Optimizer, batch: data.Batch, step: int,
               config: TrainConfig) -> dict[str, float]:
    """One step: the loss is the sum over the target tokens of all micro-batches, of all processes, divided by
    their count. Returns loss, norm of the gradient, mean entropy of w and target tokens."""
    base.train()
    optimizer.zero_grad(set_to_none=True)
    loss = entropy = 0.0
    for rows, part in batch.split(config.accumulate, runtime.rank(), runtime.world_size()):
        ours = config.seed, step, rows or [0]  # noise is a function of seed, step and row
        noise = adapters.noise_shape and runtime.uniform_noise(*ours, adapters.noise_shape)
        drop = runtime.uniform_noise(*ours, (), 1) < share if (share := adapters.router_dropout) else None
        part = part.to(base.device)
        with evaluation.routed(base, adapters, part, noise=noise, drop=drop) as routing:
            part_loss = base.loss(part.input_ids, part.attention_mask, part.labels) / batch.target_tokens
            part_loss.backward()
        loss += part_loss.item()
        entropy += evaluation.mean_entropy(routing.w) * len(rows) / len(batch.ids)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    loss, entropy = runtime.all_reduce(gradients, loss, entropy)  # of all processes
    norm = torch.nn.utils.get_total_norm(gradients)
    require_finite(f"step {step} on {', '.join(batch.ids)}", loss=loss, gradient_norm=norm.item())
    torch.nn.utils.clip_grads_with_norm_(parameters, CLIP, norm)
    for group in optimizer.param_groups:
        group["lr"] = group["max_lr"] * lr_factor(step, config)
    optimizer.step()
    return {"loss": loss, "norm": norm.item(), "entropy": entropy, "target_tokens": batch.target_tokens}


def load_progress(path: Path, adapters: Adapters, optimizer: Optimizer) -> tuple[int, float]:
    """(next step, best dev loss) of a checkpoint, whose weights and moments go into place."""
    if not path.exists():
        return 0, math.inf
    state = checkpoint.unpickle(path)
    try:
        adapters.load_state_dict(state["weights"])
        # of its groups the parameters' state alone: rates are the config's
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state["optimizer"]["state"]})
        for parameter, moments in optimizer.state.items():  # whose shapes torch does not compare
            if any(moments[name].shape != parameter.shape for name in ("exp_avg", "exp_avg_sq")):
                raise ValueError("the optimizer's moments are of other shapes")
        if (type(state["step"]), type(state["best"])) != (int, float):
            raise ValueError("step or best is of another type")
    except Exception as error:  # of many types, whatever a state of another run or a damaged one provokes
        raise ValueError(f"{path}: not of this run ({error!s:.200}); restore it, or start anew") from None
    return state["step"], state["best"]


def save_progress(path: Path, adapters: Adapters, optimizer: Optimizer, **progress: float) -> None:
    if runtime.rank() == 0:
        with runtime.atomic_write(path) as file:
            torch.save(dict(progress, weights=adapters.state_dict(), optimizer=optimizer.state_dict()), file)


def train(base: Backbone, adapters: Adapters, optimizer: Optimizer, batch_at: Callable[[int], data.Batch],
          dev: Sequence[data.Example], folder: Path, config: TrainConfig, keep_best: Callable[[], None], *,
          autocast: bool = False) -> bool:
    """From the last checkpoint, where there is one, to the last step; false if a signal stopped it before. At
    each --eval-every the dev loss is taken, and keep_best() called if it is the lowest so far. batch_at(step)
    must depend on nothing else, so that a run can resume. autocast: bf16 arithmetic on float32 weights."""
    path, log = folder / "checkpoint.pt", folder / "metrics.jsonl"
    first, best = load_progress(path, adapters, optimizer)
    runtime.truncate_log(log, first)
    runtime.broadcast(adapters.state_dict().values())  # processes that begin alike stay alike
    with runtime.stop_signals() as asked, runtime.progress(
            range(first, config.steps), "train", total=config.steps, unit="step", initial=first) as bar:
        for step in bar:
            began, batch = time.monotonic(), batch_at(step)
            with torch.autocast(base.device.type, torch.bfloat16, enabled=autocast):
                record = train_step(base, adapters, optimizer, batch, step, config)
            size = batch.input_ids.numel() + batch.labels.numel()  # padding included
            speed = round(size / (time.monotonic() - began))
            runtime.append_json(log, step=step, **record, tokens_per_s=speed)
            bar.set_postfix(loss=f"{record['loss']:.4g}", tokens_per_s=speed, refresh=False)
            stopping = runtime.any_rank(asked())  # so that all processes stop behind the same step
            due = (step + 1) % config.eval_every == 0 or step + 1 == config.steps
            if not (due or stopping):
                continue
            where = f"after step {step} on {', '.join(batch.ids)}"
            norm = torch.nn.utils.get_total_norm(adapters.state_dict().values()).item()
            require_finite(where, norm_of_weights=norm)  # a finite gradient may yet have broken them
            if due:
                loss, w = evaluation.measure(base, adapters, dev, batch_size=config.eval_batch_size)
                require_finite(where, dev_loss=loss)
                routed = w is not None and config.trainable != "mixture"  # which has one w for all
                router = {"router": evaluation.report_router(w, dev)} if routed else {}
                runtime.append_json(log, step=step, dev_loss=loss, **router)
                if loss < best:
                    best = loss
                    keep_best()
            save_progress(path, adapters, optimizer, step=step + 1, best=best)
            if stopping:
                return False
        return not runtime.any_rank(asked())  # during the last dev loss, too


# ------------------------------------------------------------------------------------------------ the program


class Parts(NamedTuple):
    """What a run consists of."""

    base: Backbone
    adapters: Adapters
    tokenizer: tokenizers.Tokenizer
    train_set: data.Examples
    sets: dict[str, list[data.Example]]  # dev, seen, unseen, of at most --eval-instances
    bound: dict[str, Any]  # fingerprints, tasks and digests that must be the same when the run goes on


def load_sets(config: TrainConfig, data_config: data.DataConfig, tokenizer: tokenizers.Tokenizer
              ) -> tuple[data.Examples, dict[str, list[data.Example]], dict[str, str]]:
    """The training set; {"dev", "seen", "unseen"} of at most --eval-instances, no unseen where the split has
    no test tasks; digests of the task files."""
    sets = data.load_sets(data_config, tokenizer)
    if not sets["dev"]:
        raise ValueError(f"{data_config.data}: no training task has the 5 instances that a dev set needs")
    digests = {name: sets[name].digest for name in ("train", "test") if name in sets}
    held_out = {"unseen" if name == "test" else name: data.subsample(examples, config.eval_instances)
                for name, examples in sets.items() if name != "train"}
    return sets["train"], held_out, digests


def build(configs: dict[str, Any], place: runtime.Device, where: PlaceConfig = PlaceConfig(), *,
          fit: bool = True) -> Parts:
    """Everything at its start; fit: also what `begin` does, which a checkpoint would replace."""
    config = configs["train"]
    tokenizer = tokenizers.load(config.model)
    train_set, sets, digests = load_sets(config, configs["data"], tokenizer)
    # The small updates of full training would be lost in bf16 weights: these stay float32.
    dtype = torch.float32 if config.method == "full" else place.dtype
    base = (checkpoint.mapped(config.model) if where.shard else
            checkpoint.load(config.model, dtype=dtype, device=place.device))
    for examples in (train_set, *sets.values()):
        evaluation.require_fit(base, tokenizer, examples)
    adapters = attach_method(config.method, base, configs["adapter"], num_tasks=len(train_set.tasks),
                             extra_rank=config.extra_rank, generator=runtime.generator(config.seed, 0))
    if where.compile:
        base.compile_blocks()
    if where.shard:
        runtime.shard(base, base.blocks, place)
    base.checkpoint_blocks = config.checkpoint_blocks
    bound = {"tasks": tuple(train_set.tasks), "base": checkpoint.fingerprint(config.model),
             "tokenizer": tokenizer.fingerprint, "digests": digests}
    if fit and config.start:
        same = {name: bound[name] for name in ("base", "tokenizer")}
        evaluation.Run.read(config.start).require_same(config.start, **same)
    freeze(adapters, config)
    if fit:
        begin(base, adapters, train_set, config)
    return Parts(base, adapters, tokenizer, train_set, sets, bound)


def start_run(folder: Path, configs: dict[str, Any], bound: dict[str, Any]) -> None:
    """Writes config.json, with the places of now; ValueError where it is there, bound to something else."""
    if (folder / "config.json").exists():
        evaluation.Run.read(folder).require_same(folder, **bound)
    saved = {name: asdict(config) for name, config in configs.items()}
    for values in saved.values():  # places, to be found from any working folder
        for name in MOVABLE & values.keys():
            values[name] = (list(map(os.path.abspath, place)) if isinstance(place := values[name], tuple) else
                            place and os.path.abspath(place))
    runtime.write_json(folder / "config.json", asdict(evaluation.Run(**saved, **bound)))


def add_scores(folder: Path, parts: Parts, config: TrainConfig, name: str) -> dict[str, dict]:
    """Scores the model as it is on seen and unseen tasks, as row `name` of scores.json; all its rows."""
    path = folder / "scores.json"
    rows = runtime.read_json(path) if path.exists() else {}
    rows[name] = {}
    for which in sorted(parts.sets.keys() - {"dev"}):
        said = evaluation.predict(parts.base, parts.adapters, parts.sets[which], parts.tokenizer,
                                  batch_size=config.eval_batch_size, desc=f"{name}, {which}")
        rows[name][which] = evaluation.score(parts.sets[which], said)
    runtime.write_json(path, rows)
    return rows


def run(folder: Path | None, configs: dict[str, Any], place: runtime.Device,
        where: PlaceConfig = PlaceConfig(), *, closing: bool = True, resume: str = "") -> bool:
    """Trains into the run folder (None: the first free one), from its checkpoint where it has one; false if a
    signal stopped it. where: its `shard` and `compile`. closing: score the frozen base and the trained model
    on seen and unseen tasks, and say so. resume: the command that goes on with a run, but for its folder, to
    be said."""
    config, full = configs["train"], configs["train"].method == "full"
    parts = build(configs, place, where, fit=not (folder and (folder / "checkpoint.pt").exists()))
    train_set = parts.train_set
    folder = folder or runtime.new_folder(f"runs/{config.method}")
    resume = resume and f"{resume} --out {shlex.quote(str(folder))}"

    def batch_at(step: int) -> data.Batch:
        rows = data.batch_at(train_set.source_lengths, config.batch_size, config.seed, step)
        return data.collate([train_set[i] for i in rows], seed=config.seed, step=step)

    with runtime.locked(folder):
        start_run(folder, configs, parts.bound)
        skills, routing = count(parts.adapters).values()
        runtime.say(f"{config.method}: {skills:,} in skills + {routing:,} in routing = {skills + routing:,} "
                    f"parameters train; on {len(train_set)} examples of {len(train_set.tasks)} tasks; run "
                    f"folder {folder}")
        if resume:
            runtime.say(f"should it be interrupted, go on with: {resume}")
        start = "start" if config.start or config.loras else "frozen base"  # what B = 0 is, to the bit
        begun = (folder / "checkpoint.pt").exists() and start == "start"  # then it is not what `parts` holds
        if closing and not (begun or (folder / "scores.json").exists()):
            add_scores(folder, parts, config, start)
        if not train(parts.base, parts.adapters, make_optimizer(parts.adapters, config), batch_at,
                     parts.sets["dev"], folder, config, lambda: save_best(folder, parts, configs),
                     autocast=full and place.dtype == torch.bfloat16):
            runtime.say(f"stopped; go on with: {resume}" if resume else f"{folder}: stopped")
            return False
        if closing:
            runtime.any_rank(False)  # waits for the first process, which may still be writing what was best
            parts.adapters.load_state_dict(checkpoint.load(folder / "model").state_dict() if full else
                                           checkpoint.load_adapter(folder / "adapter.safetensors")[0])
            say_scores(folder, add_scores(folder, parts, config, config.method), config)
    return True


def say_scores(folder: Path, rows: dict[str, dict], config: TrainConfig) -> None:
    """A table in Markdown, and what comes next."""
    runtime.say("| model | seen ROUGE-L | seen exact match | unseen ROUGE-L | unseen exact match |\n"
                "| --- | --- | --- | --- | --- |")
    for name, scores in rows.items():
        cells = (f"{scores[which]['overall'][metric]:.2f}" if which in scores else "-"
                 for which in ("seen", "unseen") for metric in ("rougeL", "exact_match"))
        runtime.say(f"| {' | '.join((name, *cells))} |")
    most = f"at most {config.eval_instances}" if config.eval_instances else "all"
    runtime.say(f"of {most} instances each; in {folder}: what was best on dev, scores.json, metrics.jsonl")
    program = shlex.quote(str(Path(sys.argv[0]).with_name("eval.py")))
    split = "test" if "unseen" in scores else "seen"
    runtime.say(f"next: {runtime.launcher()} {program} --run {shlex.quote(str(folder))} --split {split}")


def save_best(folder: Path, parts: Parts, configs: dict[str, Any]) -> None:
    if runtime.rank() != 0:
        return
    method = configs["train"].method
    if method == "full":
        parts.tokenizer.save(folder / "model")
        checkpoint.save(parts.base, folder / "model")
    else:
        checkpoint.save_adapter(folder / "adapter.safetensors", parts.adapters.state_dict(), method=method,
                                config=asdict(configs["adapter"]), tasks=list(parts.bound["tasks"]),
                                base=parts.bound["base"])


def main() -> int:
    flags = runtime.read_flags(__doc__, PlaceConfig, *CONFIGS.values(), hidden=HIDDEN)
    where = runtime.from_flags(PlaceConfig, flags)
    configs = read_configs(flags, where)
    config = configs["train"]
    place = runtime.pick_device(where.gpu, where.device, config.dtype, base=config.model)
    runtime.say(place.reason)
    configs["train"] = replace(config, dtype=str(place.dtype)[6:])  # a resume elsewhere must not change it
    resume = f"{runtime.launcher()} {shlex.quote(sys.argv[0])} --resume"
    resume += f" --gpu {where.gpu}" if where.gpu is not None else ""
    resume += " --device cpu" * bool(where.device) + " --shard" * where.shard + " --compile" * where.compile
    with runtime.joined(place):
        return 0 if run(where.out and Path(where.out), configs, place, where, resume=resume) else 130


if __name__ == "__main__":
    runtime.run_program(main)
