"""Scores a run, a bare model or a model-free heuristic with Super-NaturalInstructions' official metric.
Writes predictions.jsonl, the official script's own input, and scores.json. With --ask it answers one
instruction of yours instead, and says which abstract tasks the router saw in it. A run brings its own
settings of the data, as far as no flag says otherwise.

    python eval.py --run runs/orchmoe-1 --split test --gpu 0
    python eval.py --run runs/orchmoe-1 --ask "Write the first word of the list." --input "lion, June, wolf"
    python eval.py --heuristic copy-demo --data natural-instructions/
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

import checkpoint
import data
import metrics
import runtime
import tokenizer as tokenizers
from baselines import NoAdapter, attach_method
from model import Backbone
from orchmoe import Adapters, OrchMoEConfig


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation: what is scored, on what, and where."""

    run: str = ""  # folder of a run of train.py
    model: str = ""  # Hugging Face folder, scored as it is; with --run: where the run's base is now
    heuristic: Literal["copy-demo", "copy-input", ""] = ""  # or the first example's output, or the input
    ask: str = ""  # an instruction to answer instead of a set, with --run or --model
    input: str = ""  # the text that this instruction is about
    split: Literal["train", "dev", "seen", "test"] = "test"  # seen: held-out instances of training tasks
    out: str = ""  # folder of what is written (default: eval-.. that says what was evaluated, in the run's)
    limit: int = 0  # at most this many instances, evenly over the set (0: all)
    batch_size: int = 64  # samples generated at once
    max_new_tokens: int = 127  # the official 128 less the start token
    gpu: int | None = None  # number of the GPU
    device: Literal["cpu", ""] = ""  # no GPU even if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the base; auto: bfloat16 where faster
    shard: bool = False  # split the frozen base over the processes of torchrun

    def __post_init__(self) -> None:
        runtime.require_least(self, limit=0, batch_size=1, max_new_tokens=1)
        if bool(self.run or self.model) == bool(self.heuristic):
            raise ValueError("give one of --run, --model and --heuristic")
        if bool(self.ask.strip()) != bool(self.input.strip()) or self.ask and self.heuristic:
            raise ValueError('give both --ask "instruction" and --input "text", with --run or --model')

    @property
    def folder(self) -> Path:
        """--out, or a name that tells this evaluation from others of the same run or model."""
        bare = "" if self.run else self.heuristic or Path(self.model).resolve().name
        parts = ("eval", bare, self.split, str(self.limit or ""))
        return Path(self.out or Path(self.run) / "-".join(filter(None, parts)))


# ---------------------------------------------------------------------------------------- one pass over a set


def routed(base: Backbone, adapters: Adapters, batch: data.Batch, **options: Any):
    """The routing context of one batch: embeddings and mask of the sources, task ids for the methods that
    want them."""
    embeddings = base.embed(batch.input_ids)
    return adapters.routed(embeddings, batch.attention_mask, task_ids=batch.task_ids, **options)


def require_fit(base: Backbone, tokenizer: tokenizers.Tokenizer, examples: Sequence[data.Example],
                max_new_tokens: int = 127) -> None:
    """ValueError, before anything is computed, where rows, token ids or EOS are not of this model."""
    rows = [(example.source_ids, *example.target_ids) for example in examples]
    longest = max((len(row[0]) + max(max_new_tokens, *map(len, row[1:])) for row in rows), default=0)
    largest = max((int(ids.max()) for row in rows for ids in row if len(ids)), default=0)
    if longest > (base.longest or longest):
        raise ValueError(f"rows of {longest} tokens, the model has {base.longest} positions; lower "
                         "--max-source-length")
    if largest >= (size := base.config.vocab_size):
        raise ValueError(f"token id {largest}: the model has {size}; the tokenizer beside it is another's")
    if not set(tokenizer.eos_ids) & set(base.config.eos_ids):
        raise ValueError(f"eos_token_id {base.config.eos_ids} of config.json: the tokenizer's is "
                         f"{tokenizer.eos_ids}; mend one of them")


@torch.no_grad()
def predict(base: Backbone, adapters: Adapters, examples: Sequence[data.Example],
            tokenizer: tokenizers.Tokenizer, *, batch_size: int = 64, max_new_tokens: int = 127,
            desc: str = "generate", w: Tensor | None = None) -> list[str]:
    """Greedy predictions, in the order of the examples; w (M,K), a row for each, instead of the router's."""
    base.eval()
    texts: dict[int, str] = {}
    agree = runtime.any_rank if runtime.is_sharded(base) else bool  # all gather the weights at each token
    ours = runtime.rank(), runtime.world_size()
    for rows, batch in data.batches(examples, batch_size, base.device, desc, *ours):
        with routed(base, adapters, batch, w=None if w is None else w[rows].to(base.device)):
            tokens = base.generate(batch.input_ids, batch.attention_mask, max_new_tokens=max_new_tokens,
                                   on_keep=adapters.keep, agree=agree)
        texts.update((i, tokenizer.decode(ids)) for i, ids in zip(rows, tokens.tolist(), strict=bool(rows)))
    texts = {i: text for part in runtime.all_gather(texts) for i, text in part.items()}
    return [texts[i] for i in range(len(examples))]


def score(examples: Sequence[data.Example], predictions: Sequence[str]) -> dict[str, dict]:
    """{"overall", "tasks", "categories"}, see metrics.score."""
    pairs = runtime.progress(zip(examples, predictions, strict=True), "score", len(examples), "ex")
    return metrics.score({"task": example.task, "category": example.category, "prediction": prediction,
                          "references": example.references} for example, prediction in pairs)


@torch.no_grad()
def mean_loss(base: Backbone, adapters: Adapters, examples: Sequence[data.Example], *, batch_size: int = 64,
              desc: str = "dev loss", w: Tensor | None = None) -> float:
    """Cross-entropy per target token of the first references, in nats; w (M,K) as in `predict`."""
    base.eval()
    total, tokens = 0.0, 0
    ours = runtime.rank(), runtime.world_size()
    for rows, batch in data.batches(examples, batch_size, base.device, desc, *ours):
        with routed(base, adapters, batch, w=None if w is None else w[rows].to(base.device)):
            total += base.loss(batch.input_ids, batch.attention_mask, batch.labels).item()
        tokens += batch.target_tokens
    total, tokens = runtime.all_reduce([], total, tokens)
    return total / tokens


def evaluate(base: Backbone, adapters: Adapters, examples: Sequence[data.Example],
             tokenizer: tokenizers.Tokenizer, **options: Any) -> dict[str, dict]:
    """The scores of greedy predictions; options as for `predict`."""
    return score(examples, predict(base, adapters, examples, tokenizer, **options))


def measure(base: Backbone, adapters: Adapters, examples: Sequence[data.Example], *, batch_size: int = 64
            ) -> dict[str, Any]:
    """{"dev_loss", "router": RouterReport's} for the log, the second where there is a router for the sample,
    with a warning where it does nothing."""
    record: dict[str, Any] = {"dev_loss": mean_loss(base, adapters, examples, batch_size=batch_size)}
    w = router_weights(base, adapters, examples, batch_size=batch_size)
    if w is not None:
        report = report_router(w, examples)
        record["router"] = report._asdict()
        if warning := report.warning(w.shape[1]):
            runtime.warn(warning)
    return record


# --------------------------------------------------------------------------------------- what the router does


def mean_entropy(w: Tensor) -> float:
    """Mean entropy of the rows of w (M,K) in nats; NaN where they are no distributions (--router-norm
    none)."""
    if w.min() < 0 or not torch.allclose(w.sum(-1), w.new_ones(len(w)), atol=1e-3):
        return math.nan
    return torch.special.entr(w).sum(-1).mean().item()


class RouterReport(NamedTuple):
    """How w (M,K) spreads over M samples of several tasks."""

    entropy: float | None  # mean entropy of w, nats; None where w is no distribution
    between: float  # standard deviation over tasks of their mean w, mean over K
    within: float  # standard deviation of w within a task, mean over tasks and K
    largest: float  # largest mean weight of one abstract task

    def warning(self, tasks: int) -> str:
        """One line when w is uniform or collapsed to one abstract task, else empty."""
        if self.entropy is None or tasks == 1:
            return ""
        if self.entropy > 0.98 * math.log(tasks):
            return "the router is uniform: w hardly depends on the sample; see --router-init and --lr-router"
        if self.largest > 0.9:
            return "the router has collapsed to one abstract task; lower --lr-router"
        return ""


@torch.no_grad()
def router_weights(base: Backbone, adapters: Adapters, examples: Sequence[data.Example], *,
                   batch_size: int = 64) -> Tensor | None:
    """w (M,K) of the examples on the CPU; None for a method without one router for the sample."""
    base.eval()
    rows_of: dict[int, Tensor] = {}
    for rows, batch in data.batches(examples, batch_size, base.device, "router"):
        with routed(base, adapters, batch) as routing:
            if routing.w is None or routing.shared:
                return None
            rows_of.update(zip(rows, routing.w.float().cpu(), strict=True))
    return torch.stack([rows_of[i] for i in range(len(examples))])


def report_router(w: Tensor, examples: Sequence[data.Example]) -> RouterReport:
    """The report on w (M,K) of the examples, grouped by their real tasks."""
    tasks = np.array([example.task for example in examples])
    groups = [w[tasks == task] for task in sorted(set(tasks))]
    means = torch.stack([group.mean(0) for group in groups])  # (T,K)
    spreads = torch.stack([group.std(0, correction=0).mean() for group in groups])
    entropy = mean_entropy(w)
    return RouterReport(None if math.isnan(entropy) else entropy, means.std(0, correction=0).mean().item(),
                        spreads.mean().item(), w.mean(0).max().item())


# ------------------------------------------------------------------------------------------------ the program


@dataclass(frozen=True)
class Run:
    """config.json of a run: its settings, and what it is bound to."""

    train: dict  # TrainConfig's fields, as the next two are DataConfig's and OrchMoEConfig's
    data: dict
    adapter: dict
    tasks: tuple[str, ...]  # training tasks, in the order of their ids
    base: str  # fingerprint
    tokenizer: str  # fingerprint
    digests: dict  # of the contents of the task files: {"train": .., "test": ..}
    pretrain: dict | None = None  # of experiments/pretrain.py alone
    torch: str = str(torch.__version__)

    @classmethod
    def read(cls, folder: str | Path) -> Run:
        path = checkpoint.existing(Path(folder) / "config.json", "name the folder of a run of train.py")
        return runtime.from_json(cls, runtime.read_json(path), path)

    def __post_init__(self) -> None:
        for name in ("model", "method"):
            if not isinstance(self.train.get(name), str):
                raise ValueError(f"train: {name} must be a text")

    def require_same(self, folder: str | Path, **found: Any) -> None:
        """ValueError that names the first of the fields in `found` that is not the run's."""
        what = {"base": self.train["model"], "tokenizer": self.train["model"], "tasks": self.data.get("data"),
                "digests": self.data.get("data")}
        for name, value in found.items():
            if value != getattr(self, name):
                raise ValueError(f"{what[name]}: not the {name} that the run in {folder} began with; restore "
                                 "what was there, or start a new run")


def load_run(folder: str | Path, place: runtime.Device, *, shard: bool = False, model: str | Path = ""
             ) -> tuple[Backbone, Adapters]:
    """The base with the run's best adapters attached, or the run's best full weights, on the device. shard:
    split the base over all processes. model: where the base is now, if it has moved."""
    folder, train = Path(folder), Run.read(folder).train
    if train["method"] == "full":
        base = checkpoint.load(folder / "model", dtype=place.dtype, device=place.device)
        return base, NoAdapter(base, full=True)
    path = folder / "adapter.safetensors"
    state, saved = checkpoint.load_adapter(path)
    model = model or train["model"]
    if (have := checkpoint.fingerprint(model)) != saved["base"]:
        raise ValueError(f"{path}: trained on the base {saved['base']}, but {model} is {have}; restore that "
                         "model, or name its place by --model")
    base = load_base(model, place, shard)
    config = runtime.from_json(OrchMoEConfig, saved["config"], path)
    sizes = {"num_tasks": len(saved["tasks"]), "extra_rank": train.get("extra_rank", 0)}
    try:
        with torch.device("meta"):  # names and shapes, before anything of the size they claim is allocated
            bare = type(base)(base.config)
            attach_method(saved["method"], bare, config, **sizes).load_state_dict(state)
    except (TypeError, ValueError, RuntimeError) as error:  # of types, names, and sizes beyond 64 bits
        raise ValueError(f"{path}: {error}; not what its config describes, restore the file") from None
    adapters = attach_method(saved["method"], base, config, **sizes)
    adapters.load_state_dict(state)
    if shard:
        runtime.shard(base, base.blocks, place)
    return base, adapters.eval()


def load_base(path: str | Path, place: runtime.Device, shard: bool = False) -> Backbone:
    """The model of a folder on the device; with `shard` still in its files, for runtime.shard."""
    if shard:
        return checkpoint.mapped(path)
    return checkpoint.load(path, dtype=place.dtype, device=place.device)


def copy_heuristic(kind: str, root: str, examples: Sequence[data.Example]) -> list[str]:
    """copy-demo: the output of the task's first positive example; copy-input: the instance's own input."""
    predictions: list[str] = []
    name, path, task = "", Path(), {}
    for example in runtime.progress(examples, kind, unit="ex"):
        if example.task != name:
            name, path = example.task, Path(root) / "tasks" / f"{example.task}.json"
            task = data.read_task(path)
        if kind == "copy-input":
            predictions.append(task["instances"][example.place]["input"])
        elif task["positive"]:
            predictions.append(task["positive"][0]["output"])
        else:
            raise ValueError(f"{path}: Positive Examples: none to copy from; add one or use copy-input")
    return predictions


def answer(base: Backbone, adapters: Adapters, tokenizer: tokenizers.Tokenizer, config: EvalConfig,
           data_config: data.DataConfig) -> None:
    """Says what the model answers to --ask and --input and, where one router reads the sample, its w by
    abstract tasks, which are counted from 1 here as in the figures."""
    example = data.asked(config.ask, config.input, tokenizer, replace(data_config, definition=True))
    batch = data.collate([example]).to(base.device)
    base.eval()
    ids, mask = batch.input_ids, batch.attention_mask
    if adapters.unfoldable() or runtime.is_sharded(base):
        text, = predict(base, adapters, [example], tokenizer, max_new_tokens=config.max_new_tokens)
    else:  # one routing for all of the answer, so it goes into the weights
        with adapters.folded(embeddings=base.embed(ids), mask=mask, task_ids=batch.task_ids):
            tokens = base.generate(ids, mask, max_new_tokens=config.max_new_tokens)[0]
        text = tokenizer.decode(tokens.tolist())
    runtime.say(f"asked {config.run or config.model}: instruction and input alone, without examples")
    runtime.say(f"answer: {text}")
    w = router_weights(base, adapters, [example])
    if w is not None:
        order = w[0].argsort(descending=True).tolist()
        shares = ", ".join(f"{k + 1} at {100 * w[0, k]:.1f} %" for k in order)
        runtime.say(f"router: abstract task {shares} (numbered as in the figures)")


def main() -> None:
    flags = runtime.read_flags(__doc__, EvalConfig, data.DataConfig)
    config = runtime.from_flags(EvalConfig, flags)
    run = Run.read(config.run) if config.run else None
    saved = runtime.from_json(data.DataConfig, run.data, config.run) if run else data.DataConfig()
    data_config = replace(saved, **{name: flags[name] for name in vars(saved).keys() & flags.keys()})
    device = "cpu" if config.heuristic else config.device
    model = config.model or (run.train["model"] if run else "")
    place = runtime.pick_device(config.gpu, device, config.dtype, base=model)
    runtime.say(place.reason)
    with runtime.joined(place):
        if config.heuristic:
            tokenizer = tokenizers.load(runtime.ROOT / "tiny")  # of no consequence for what is copied
            base = adapters = None
        else:
            base, adapters, tokenizer = load(config, run, place)
        if config.ask:
            return answer(base, adapters, tokenizer, config, data_config)
        examples = load_examples(config, run, saved, data_config, tokenizer)
        if config.heuristic:
            predictions = copy_heuristic(config.heuristic, data_config.data, examples)
        else:
            require_fit(base, tokenizer, examples, config.max_new_tokens)
            predictions = predict(base, adapters, examples, tokenizer, batch_size=config.batch_size,
                                  max_new_tokens=config.max_new_tokens)
        if runtime.rank() == 0:
            write_results(config, data_config, examples, predictions)


def load(config: EvalConfig, run: Run | None, place: runtime.Device
         ) -> tuple[Backbone, Adapters, tokenizers.Tokenizer]:
    """What --run and --model name."""
    if run is None:
        base = load_base(config.model, place, config.shard)
        adapters = NoAdapter(base, full=False)
        if config.shard:
            runtime.shard(base, base.blocks, place)
        return base, adapters, tokenizers.load(config.model)
    full = run.train["method"] == "full"
    if full and config.shard:
        raise ValueError("--shard: splits a frozen base; not with a run of --method full")
    base, adapters = load_run(config.run, place, shard=config.shard, model=config.model)
    tokenizer = tokenizers.load(Path(config.run) / "model" if full else config.model or run.train["model"])
    run.require_same(config.run, tokenizer=tokenizer.fingerprint)
    return base, adapters, tokenizer


def load_examples(config: EvalConfig, run: Run | None, saved: data.DataConfig, data_config: data.DataConfig,
                  tokenizer: tokenizers.Tokenizer) -> list[data.Example]:
    """The set to evaluate, its task ids those of the run. Of the run's own data the task files must be those
    of then; other data that flags name are only said to be other."""
    training = run.tasks if run else None
    examples = data.load_sets(data_config, tokenizer, [config.split], training=training)[config.split]
    began = run and run.digests.get("test" if config.split == "test" else "train")
    if began and examples.digest != began:
        where = [(each.data, each.splits, each.max_tasks) for each in (saved, data_config)]
        if where[0] == where[1]:
            raise ValueError(f"{data_config.data}: the {config.split} tasks are not those that the run in "
                             f"{config.run} began with; restore them, or name others by --data")
        runtime.warn(f"{data_config.data}: other tasks than those of the run")
    return data.subsample(examples, config.limit)


def write_results(config: EvalConfig, data_config: data.DataConfig, examples: Sequence[data.Example],
                  predictions: Sequence[str]) -> None:
    scores, folder = score(examples, predictions), config.folder
    with runtime.atomic_write(folder / "predictions.jsonl") as file:
        for example, prediction in zip(examples, predictions, strict=True):
            row = {"id": example.id, "prediction": prediction}
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    settings = {**asdict(config), **asdict(data_config), "instances": len(examples)}
    runtime.write_json(folder / "scores.json", {**scores, "config": settings})
    overall = ", ".join(f"{name} {value:.4f}" for name, value in scores["overall"].items())
    runtime.say(f"{len(examples)} instances of {len(scores['tasks'])} {config.split} tasks: {overall}")
    runtime.say(f"written: {folder / 'predictions.jsonl'}, {folder / 'scores.json'}")


if __name__ == "__main__":
    runtime.run_program(main)
