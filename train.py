"""Trains adapters (or with --method full every weight) of a T5 on Super-NaturalInstructions; ends with a
table of the frozen and the adapted model on seen and unseen tasks. A run folder holds config.json,
metrics.jsonl, checkpoint.pt (the last state), the adapter that was best on dev as adapter.safetensors
(--method full: model/), scores.json, and what the router does as routing.json.

    python train.py --data sni/ --gpu 0
    python train.py --method lora --steps 200 --device cpu --out runs/lora
    python train.py --resume --out runs/lora --device cpu    # after an interruption"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import checkpoint
import data
import eval as evaluation
import runtime
import t5
from baselines import METHODS, attach_method, count
from experiments import spans
from model import Backbone
from orchmoe import Adapters, OrchMoEConfig


@dataclass(frozen=True)
class TrainConfig:
    """Training: model, method, steps and rates."""

    model: str = "tiny/"  # Hugging Face T5 folder: config.json, weights, spiece.model
    method: Literal[METHODS] = "orchmoe"  # what trains
    from_scratch: bool = False  # random weights instead of those in --model; with --method full
    seed: int = 0  # of everything: splits, order, initial values, noise
    split_seed: int | None = None  # of the splits into train, dev and seen alone (default: the seed)
    steps: int = 1000  # optimiser steps
    batch_size: int = 16  # examples of one optimiser step
    accumulate: int = 1  # micro-batches that a step is computed in
    lr_skills: float = 3e-3  # peak learning rate of A and B
    lr_router: float = 2e-5  # of the router of samples, whose features are standardised
    lr_token_router: float = 1e-2  # of routers of tokens, on raw features: --router token, moe-lora
    lr_allocation: float = 1e-2  # of the allocation matrices
    lr_full: float = 5e-5  # of every weight, with --method full; with --from-scratch relative to its size
    beta2: float = 0.999  # of AdamW
    warmup: int = 50  # steps of linear warm-up
    schedule: Literal["linear", "constant"] = "linear"  # after warm-up: down to 0 at the last step, or level
    weight_decay: float = 0.0  # of A, B and full weights; router and allocation have none
    clip: float = 1.0  # largest norm of the gradient (0: no clipping)
    dropout: float = 0.0  # with --method full
    text_length: int = 256  # tokens of one row of --text
    eval_every: int = 100  # steps between dev losses and checkpoints
    eval_instances: int = 2000  # at most this many of each evaluated set, evenly over it (0: all)
    eval_batch_size: int = 64  # samples evaluated at once
    checkpoint_blocks: bool = False  # recompute each block in the backward: less memory, more time
    extra_rank: int = 0  # ranks on top, evenly over the Linears: for comparisons at equal size
    compile: bool = False  # compile each block of the T5 (torch.compile needs a C++ compiler)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the base; auto: bfloat16 on a GPU

    def __post_init__(self) -> None:
        runtime.require_least(self, steps=1, batch_size=1, accumulate=1, eval_every=1, eval_batch_size=1,
                              text_length=2, eval_instances=0, warmup=0, seed=0, lr_skills=0, lr_router=0,
                              lr_token_router=0, lr_allocation=0, lr_full=0, extra_rank=0, weight_decay=0,
                              clip=0)
        for name in ("beta2", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: give 0 or more, and less than 1")
        if self.seed >= 2**63:
            raise ValueError(f"--seed {self.seed}: give less than 2^63")
        if self.from_scratch and self.method != "full":
            raise ValueError(f"--from-scratch --method {self.method}: random weights go with --method full")


@dataclass(frozen=True)
class PlaceConfig:
    """Place: where the run computes and what it writes."""

    out: str = ""  # run folder (default: runs/METHOD-N, the first that is free)
    resume: bool = False  # go on with the run in --out, with its own settings
    gpu: int | None = None  # number of the GPU
    device: Literal["cpu", ""] = ""  # cpu: no GPU even if there is one
    shard: bool = False  # split the frozen base over the processes of torchrun


# Named settings: lineage starts and relaxes the allocation as Poly does, whose line of papers OrchMoE is in.
PRESETS = {"lineage": {"allocation_std": 0.001, "gumbel": True}}
CONFIGS = {"train": TrainConfig, "data": data.DataConfig, "adapter": OrchMoEConfig}


def read_configs(flags: dict[str, Any], where: PlaceConfig) -> tuple[Path, dict[str, Any]]:
    """Run folder and the configs by name; with --resume those of the run, which flags must not contradict."""
    configs = {name: runtime.from_flags(cls, flags) for name, cls in CONFIGS.items()}
    if where.resume and not where.out:
        raise ValueError("--resume: name the folder of the run by --out")
    if where.resume:
        folder, saved = Path(where.out), evaluation.read_run(where.out)
        configs = {name: runtime.from_json(cls, saved[name], folder / "config.json")
                   for name, cls in CONFIGS.items()}
        kept = {field: value for config in configs.values() for field, value in vars(config).items()}
        for field, value in flags.items():
            if kept.get(field, value) != value:
                flag = "--" + field.replace("_", "-")
                raise ValueError(f"{flag} {value}: the run in {folder} has {kept[field]}; leave it out")
    else:
        folder = Path(where.out) if where.out else first_free(f"runs/{configs['train'].method}")
        if (folder / "config.json").exists():
            raise ValueError(f"--out {folder}: holds a run already; add --resume, or name another folder")
    evaluation.require_frozen(where.shard, configs["train"].method)
    if configs["data"].text and configs["train"].method != "full":
        raise ValueError("--text: span corruption goes with --method full")
    return folder, configs


def first_free(name: str) -> Path:
    return next(path for n in range(1, 10**6) if not ((path := Path(f"{name}-{n}")) / "config.json").exists())


def load_base(config: TrainConfig, place: runtime.Device, shard: bool = False) -> Backbone:
    """The T5 of --model; with --method full in float32, whose small updates bf16 weights would lose."""
    if not config.from_scratch:
        place = place._replace(dtype=torch.float32) if config.method == "full" else place
        return evaluation.load_base(config.model, place, shard)
    path = Path(config.model) / "config.json"
    t5_config = checkpoint.config(config.model)
    with torch.device("meta"):
        size = 4 * sum(p.numel() for p in t5.T5(t5_config).parameters())
    if size > (memory := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")):
        raise ValueError(f"{path}: describes {size:.3g} bytes of weights, but this machine has {memory:.3g}; "
                         "give a smaller model")
    base = t5.T5(t5_config)
    base.init_weights(config.seed)
    return base.to(place.device)


def make_optimizer(adapters: Adapters, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with a peak rate for each kind of parameter. From scratch each tensor's rate is also multiplied
    by the root mean square of its start (the relative steps of Adafactor, Shazeer and Stern 2018): T5 starts
    its embeddings at 1.0 and its queries at 0.01, and no one rate serves both."""
    rates = {"skills": config.lr_skills, "router": config.lr_router, "token_router": config.lr_token_router,
             "allocation": config.lr_allocation, "full": config.lr_full}
    groups = []
    for kind, parameters in adapters.parameter_groups().items():
        decay = config.weight_decay if kind in ("skills", "full") else 0.0
        for part in [[p] for p in parameters] if config.from_scratch else filter(None, [parameters]):
            size = part[0].detach().pow(2).mean().sqrt().item() if config.from_scratch else 1.0
            peak = rates[kind] * max(size, 1e-3)
            groups.append({"params": part, "lr": peak, "peak": peak, "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=(0.9, config.beta2), fused=True)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """load_state_dict, and a ValueError where a moment is not of its parameter's shape, which torch lets
    pass."""
    optimizer.load_state_dict(state)
    for parameter, moments in optimizer.state.items():
        if any(moments[name].shape != parameter.shape for name in ("exp_avg", "exp_avg_sq")):
            raise ValueError("the optimizer's moments are of other shapes")


def rate_factor(step: int, config: TrainConfig) -> float:
    """Factor of the peak learning rates at `step`: linear warm-up, then linear to 0 or level."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    left = (config.steps - step) / max(1, config.steps - config.warmup)
    return min(warm, left) if config.schedule == "linear" else warm


class Source:
    """Batch of each step, a pure function of (seed, step): examples, and a share of text where given."""

    def __init__(self, examples: data.Examples, tokenizer: data.Tokenizer, config: TrainConfig,
                 data_config: data.DataConfig):
        self.examples, self.config = examples, config
        self.text, self.ratio = None, 0.0
        if data_config.text:
            self.text = spans.TextStream(data_config.text, tokenizer, length=config.text_length,
                                         seed=config.seed, cache=data_config.cache)
            self.ratio = data_config.text_ratio

    def batch(self, step: int) -> data.Batch:
        config, texts_before = self.config, int(step * self.ratio)
        if int((step + 1) * self.ratio) > texts_before:
            return self.text.batch_at(texts_before, config.batch_size)
        step -= texts_before
        rows = data.batch_at(self.examples.source_lengths, config.batch_size, config.seed, step)
        return data.collate([self.examples[i] for i in rows], seed=config.seed, step=step)


def fit_router(base: Backbone, adapters: Adapters, examples: data.Examples, config: TrainConfig) -> None:
    """The router's start from at most 2,000 training sources, see OrchMoE.fit_router."""
    sources = evaluation.evenly(examples, 2000)
    size = min(8, config.eval_batch_size)  # its (B,L,L) scores outgrow every cache; larger is slower
    batches = evaluation.batches(sources, size, base.device, "router start")
    parts = [part for _, part in batches]
    adapters.fit_router((base.embed(part.input_ids) for part in parts),
                        (part.attention_mask for part in parts), generator=runtime.generator(config.seed, 1))


def require_finite(base: Backbone, where: str, **values: float) -> None:
    """ValueError that says where and names the tensor at fault, unless all values are finite numbers."""
    if all(map(math.isfinite, values.values())):
        return
    said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())
    raise ValueError(f"{where}: {said}; {offender(base)}; the last checkpoint is untouched; start anew with "
                     "lower learning rates or --dtype float32")


def offender(base: Backbone) -> str:
    """Of the weights, or where these are finite of the gradients, that with the most values that are not;
    without any, the gradient with the largest value."""
    weights = {f"weight {name}": p.to_local() if hasattr(p, "to_local") else p  # of a sharded base its share
               for name, p in base.named_parameters()}
    gradients = {f"gradient of {name}": p.grad for name, p in base.named_parameters() if p.grad is not None}
    for tensors in (weights, gradients):
        faults = {name: int((~tensor.isfinite()).sum()) for name, tensor in tensors.items()}
        worst = max(faults, key=faults.get, default="")
        if faults.get(worst):
            return f"{worst}: {faults[worst]} of {tensors[worst].numel()} values are not finite"
    sizes = {name: tensor.abs().max().item() for name, tensor in gradients.items()}
    return "{}: largest value {:.3g}".format(*max(sizes.items(), key=lambda item: item[1]))


def optimiser_step(base: Backbone, adapters: Adapters, optimizer: torch.optim.Optimizer, batch: data.Batch,
                   step: int, config: TrainConfig) -> dict[str, float | None]:
    """One step: the loss is the sum over the target tokens of all micro-batches, of all processes, divided by
    their count."""
    optimizer.zero_grad(set_to_none=True)
    loss, entropy = 0.0, None
    for rows, part in batch.split(config.accumulate, runtime.rank(), runtime.world_size()):
        noise = adapters.noise_shape and runtime.uniform_noise(config.seed, step, rows or [0],
                                                               adapters.noise_shape)
        share = adapters.router_dropout
        drop = runtime.uniform_noise(config.seed, step, rows or [0], (), 1) < share if share else None
        part = part.to(base.device)
        with evaluation.routed(base, adapters, part, noise=noise, drop=drop) as routing:
            part_loss = base.loss(part.input_ids, part.attention_mask, part.labels) / batch.target_tokens
            part_loss.backward()
        loss += part_loss.item()
        if routing.w is not None:
            entropy = evaluation.mean_entropy(routing.w.detach())
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    loss, = runtime.all_reduce(gradients, loss)  # of all processes
    norm = torch.nn.utils.get_total_norm(gradients)
    require_finite(base, f"step {step} on {', '.join(batch.ids)}", loss=loss, gradient_norm=norm.item())
    if config.clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, config.clip, norm)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * rate_factor(step, config)
    optimizer.step()
    return {"loss": loss, "norm": norm.item(), "entropy": entropy, "target_tokens": batch.target_tokens}


def train(base: Backbone, adapters: Adapters, dev: list[data.Example], source: Source, folder: Path,
          config: TrainConfig, bf16: bool, keep_best: Callable[[], None]) -> bool:
    """From the last checkpoint, where there is one, to the last step; false if a signal stopped it before. At
    each --eval-every the dev loss is taken; keep_best() is called whenever it is the lowest so far. bf16: of
    the arithmetic, where the weights themselves are float32."""
    optimizer, path = make_optimizer(adapters, config), folder / "checkpoint.pt"
    first, best, tokens = 0, math.inf, 0  # seen, of sources and targets, padding included
    if path.exists():
        state = checkpoint.load_state(path)
        try:
            adapters.load_state_dict(state["weights"])
            load_optimizer(optimizer, state["optimizer"])
        except Exception as error:  # of many types, whatever a state of another run or a damaged one provokes
            raise ValueError(f"{path}: not of this run ({error!s:.200}); restore it, or start anew") from None
        first, best, tokens = state["step"], state["best"], state["tokens"]
    else:
        fit_router(base, adapters, source.examples, config)
    runtime.broadcast(adapters.state_dict().values())  # processes that begin alike stay alike
    log = folder / "metrics.jsonl"
    if log.exists():
        runtime.truncate_log(log, first)
    steps, before, began = range(first, config.steps), tokens, time.monotonic()
    with runtime.stop_signals() as asked, \
            runtime.progress(steps, "train", total=config.steps, unit="step", initial=first) as bar:
        for step in bar:
            base.train()
            batch = source.batch(step)
            for_dropout = runtime.generator(config.seed, 2, step, runtime.rank())
            torch.manual_seed(for_dropout.initial_seed())
            with torch.autocast(base.device.type, torch.bfloat16, enabled=bf16):
                record = optimiser_step(base, adapters, optimizer, batch, step, config)
            tokens += batch.input_ids.numel() + batch.labels.numel()
            record["tokens"] = tokens
            record["tokens_per_s"] = round((tokens - before) / (time.monotonic() - began))
            runtime.append_json(log, step=step, **record)
            bar.set_postfix({name: f"{record[name]:.4g}" for name in ("loss", "tokens_per_s", "entropy")
                             if record[name] is not None}, refresh=False)
            stopping = runtime.any_rank(asked())  # so that all processes stop behind the same step
            due = (step + 1) % config.eval_every == 0 or step + 1 == config.steps
            if due or stopping:  # a finite gradient and a rate too high may yet have broken the weights
                where, weights = f"after step {step} on {', '.join(batch.ids)}", adapters.parameter_groups()
                size = torch.nn.utils.get_total_norm([p for group in weights.values() for p in group])
                require_finite(base, where, norm_of_weights=size.item())
            paused = time.monotonic()
            if due:
                dev_loss = evaluation.mean_loss(base, adapters, dev, batch_size=config.eval_batch_size)
                require_finite(base, where, dev_loss=dev_loss)
                router = router_record(base, adapters, dev, config)
                runtime.append_json(log, step=step, dev_loss=dev_loss, **router)
                if dev_loss < best:
                    best = dev_loss
                    keep_best()
            if (due or stopping) and runtime.rank() == 0:
                checkpoint.save_state(path, {"step": step + 1, "best": best, "tokens": tokens,
                                             "weights": adapters.state_dict(),
                                             "optimizer": optimizer.state_dict()})
            began += time.monotonic() - paused  # tokens_per_s is of training alone
            if stopping:
                return step + 1 == config.steps
    return True


def router_record(base: Backbone, adapters: Adapters, dev: list[data.Example], config: TrainConfig) -> dict:
    """What the router does on dev, for the log, with a warning where it does nothing; {} for methods
    without."""
    w = evaluation.router_weights(base, adapters, dev, batch_size=config.eval_batch_size)
    if w is None:
        return {}
    report = evaluation.report_router(w, dev)
    if warning := report.warning(w.shape[1]):
        runtime.warn(warning)
    return {"router": report._asdict()}


# ------------------------------------------------------------------------------------------------ the program


def load_sets(tokenizer: data.Tokenizer, config: TrainConfig, data_config: data.DataConfig
              ) -> tuple[data.Examples, dict[str, list[data.Example]]]:
    """The training set, and {"dev", "seen", "unseen"} of at most --eval-instances; no unseen where the split
    has no test tasks."""
    seed = config.seed if config.split_seed is None else config.split_seed
    held_out = {"dev": "dev", "seen": "seen"}
    if data.read_splits(data_config.data, data_config.splits)["test"]:
        held_out["unseen"] = "test"
    sets = {name: evaluation.evenly(data.load_examples(data_config, tokenizer, split, seed=seed),
                                    config.eval_instances) for name, split in held_out.items()}
    if not sets["dev"]:
        raise ValueError(f"{data_config.data}: no training task has the 5 instances that a dev set needs")
    return data.load_examples(data_config, tokenizer, "train", seed=seed), sets


def closing_scores(base: Backbone, adapters: Adapters, sets: dict[str, list[data.Example]],
                   tokenizer: data.Tokenizer, config: TrainConfig, name: str) -> dict[str, dict]:
    """{"seen": scores, "unseen": scores} of the model as it is."""
    scores = {}
    for which in sorted(sets.keys() - {"dev"}):  # in this order in every process
        predictions = evaluation.predict(base, adapters, sets[which], tokenizer, desc=f"{name}, {which}",
                                         batch_size=config.eval_batch_size)
        scores[which] = evaluation.score(sets[which], predictions)
    return scores


TITLES = {"rougeL": "ROUGE-L", "exact_match": "exact match"}


def table(rows: dict[str, dict[str, dict]]) -> str:
    """ROUGE-L and exact match of each row's model on seen and unseen tasks, as Markdown."""
    columns = [(which, metric) for which in ("seen", "unseen") for metric in ("rougeL", "exact_match")]
    lines = ["| model | " + " | ".join(f"{which} {TITLES[metric]}" for which, metric in columns) + " |",
             "|---|" + "---|" * len(columns)]
    for name, scores in rows.items():
        cells = [f"{scores[which]['overall'][metric]:.2f}" if which in scores else "-"
                 for which, metric in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def check_unchanged(saved: dict, facts: dict, config: TrainConfig, data_config: data.DataConfig) -> None:
    """ValueError where base or training tasks are not those that the run began with."""
    if saved["base"] != facts["base"]:
        raise ValueError(f"{config.model}: not the base that the run began with; restore it to resume")
    if saved["tasks"] != facts["tasks"]:
        raise ValueError(f"{data_config.data}: not the training tasks that the run began with; restore them")


def run(folder: Path, configs: dict[str, Any], place: runtime.Device, *, closing: bool = True,
        shard: bool = False, resume: str = "") -> bool:
    """Trains into the run folder, from its checkpoint where it has one; false if a signal stopped it.
    closing: score the frozen base and the trained model on seen and unseen tasks, and say so. shard: split
    the base over all processes. resume: the command to say that goes on with the run."""
    config, data_config, adapter_config = configs["train"], configs["data"], configs["adapter"]
    torch.manual_seed(config.seed)
    tokenizer = data.Tokenizer(config.model)
    train_set, sets = load_sets(tokenizer, config, data_config)
    source = Source(train_set, tokenizer, config, data_config)
    base = load_base(config, place, shard)
    adapters = attach_method(config.method, base, adapter_config, extra_rank=config.extra_rank,
                             num_tasks=len(train_set.tasks),
                             generator=runtime.generator(config.seed, 0))
    if shard:
        runtime.shard(base, base.blocks, place)
    base.set_dropout(config.dropout if config.method == "full" else 0.0)
    base.checkpoint_blocks = config.checkpoint_blocks
    if config.compile:
        base.compile_blocks()
    rank = "" if config.method == "full" else f", S R = {adapter_config.skills * adapter_config.rank}"
    runtime.say(f"{config.method}: {count(adapters)} parameters train{rank}; on {len(train_set)} examples of "
                f"{len(train_set.tasks)} tasks; run folder {folder}")

    base_print = "" if config.from_scratch else checkpoint.fingerprint(config.model)
    facts = {"base": base_print, "tasks": train_set.tasks}
    with runtime.locked(folder):
        scores_file, scores = folder / "scores.json", {}
        if (folder / "config.json").exists():
            check_unchanged(evaluation.read_run(folder), facts, config, data_config)
            scores = runtime.read_json(scores_file) if scores_file.exists() else {}
        else:
            settings = {name: asdict(value) for name, value in configs.items()}
            runtime.write_json(folder / "config.json", settings | facts | {"torch": torch.__version__})
        if resume:
            runtime.say(f"should it be interrupted, go on with: {resume}")
        if closing and not (scores or config.from_scratch):  # every method starts as the base, bit for bit
            scores["frozen base"] = closing_scores(base, adapters, sets, tokenizer, config, "frozen base")
            runtime.write_json(scores_file, scores)

        def keep_best() -> None:
            if runtime.rank() != 0:
                return
            if config.method == "full":
                tokenizer.save(folder / "model")
                checkpoint.save(base, folder / "model")
            else:
                checkpoint.save_adapter(folder / "adapter.safetensors", adapters.state_dict(),
                                        method=config.method, config=asdict(adapter_config), **facts)

        bf16 = config.method == "full" and place.dtype == torch.bfloat16
        if not train(base, adapters, sets["dev"], source, folder, config, bf16, keep_best):
            return False
        if not closing:
            return True
        runtime.barrier()  # the first process has written what all read now
        adapters.load_state_dict(checkpoint.load(folder / "model").state_dict() if config.method == "full"
                                 else checkpoint.load_adapter(folder / "adapter.safetensors")[0])
        scores[config.method] = closing_scores(base, adapters, sets, tokenizer, config, config.method)
        runtime.write_json(scores_file, scores)
        report = evaluation.routing_report(base, adapters, sets["seen"], batch_size=config.eval_batch_size)
        if report:
            runtime.write_json(folder / "routing.json", report)
        runtime.say(table(scores))
        sizes = ", ".join(f"{len(sets[which])} {which}" for which in scores[config.method])
        limited = any(len(sets[which]) == config.eval_instances for which in scores[config.method])
        runtime.say(f"on {sizes} instances" + "; --eval-instances 0 takes all" * limited)
        return True


def closing_words(folder: Path, method: str, device: str) -> str:
    """Where things are, and what to do next; `device` is the flag that the run was given, if any."""
    weights = "model/" if method == "full" else "adapter.safetensors"
    return (f"in {folder}: {weights} (best on dev), scores.json, metrics.jsonl, checkpoint.pt (last step)\n"
            f"next:  python eval.py --run {folder} --split test{device}    # predictions.jsonl, all scores\n"
            f"       python plot.py --run {folder}    # figures; needs matplotlib")


def main() -> None:
    parser = runtime.Parser(__doc__)
    parser.add_argument("--preset", choices=PRESETS, help="lineage: --allocation-std 0.001 --gumbel")
    for cls in (PlaceConfig, *CONFIGS.values()):
        parser.add_dataclass(cls)
    flags = vars(parser.parse_args())
    flags = PRESETS.get(flags.pop("preset"), {}) | flags
    where = runtime.from_flags(PlaceConfig, flags)
    folder, configs = read_configs(flags, where)
    place = runtime.pick_device(where.gpu, where.device, configs["train"].dtype)
    runtime.say(place.reason)
    device = f" --gpu {where.gpu}" if where.gpu is not None else ""
    device += f" --device {where.device}" if where.device else ""
    resume = f"{runtime.launcher()} train.py --resume --out {folder}{device}{' --shard' * where.shard}"
    with runtime.joined(place):
        whole = run(folder, configs, place, shard=where.shard, resume=resume)
    if not whole:
        runtime.say(f"stopped; go on with: {resume}")
        raise SystemExit(130)
    runtime.say(closing_words(folder, configs["train"].method, device))


if __name__ == "__main__":
    runtime.run_program(main)
