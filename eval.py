"""Scores a run, a bare model or a model-free heuristic with Super-NaturalInstructions' official metric.
Writes predictions.jsonl, the official script's own input, and scores.json. With --ask it answers one
instruction of yours instead, and says which abstract tasks the router saw in it. A run brings its own
settings of the data, as far as no flag says otherwise.

    python eval.py --run runs/orchmoe-1 --split test --data sni/
    python eval.py --run runs/orchmoe-1 --ask "Write the first word of the list." --input "lion, June, wolf"
    python eval.py --heuristic copy-demo --data natural-instructions/"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
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
from baselines import NoAdapter, attach_method
from model import Backbone
from orchmoe import Adapters, OrchMoEConfig


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation: what is scored, on what, and where."""

    run: str = ""  # folder of a run of train.py
    model: str = ""  # or a Hugging Face T5 folder, scored as it is
    heuristic: Literal["copy-demo", "copy-input", ""] = ""  # or the first example's output, or the input
    ask: str = ""  # text of an instruction to answer instead of a set, with --run or --model
    input: str = ""  # the text that this instruction is about
    split: Literal["train", "dev", "seen", "test"] = "test"  # seen: held-out instances of training tasks
    out: str = ""  # folder of predictions.jsonl and scores.json (default: RUN/eval-SPLIT, else eval-SPLIT)
    limit: int = 0  # at most this many instances, evenly over the set (0: all)
    batch_size: int = 64  # samples generated at once
    max_new_tokens: int = 127  # the official 128 less the start token
    seed: int = 0  # of the split into train, dev and seen; a run brings its own
    gpu: int | None = None  # number of the GPU
    device: Literal["cpu", ""] = ""  # cpu: no GPU even if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the base; auto: bfloat16 on a GPU
    shard: bool = False  # split the frozen base over the processes of torchrun

    def __post_init__(self) -> None:
        runtime.require_least(self, limit=0, batch_size=1, max_new_tokens=1, seed=0)


# ---------------------------------------------------------------------------------------- one pass over a set


def evenly(examples: Sequence[data.Example], limit: int) -> list[data.Example]:
    """At most `limit` of the examples, evenly spaced; all of them for 0."""
    count = min(limit, len(examples)) if limit else len(examples)
    return [examples[i * len(examples) // count] for i in range(count)]


def batches(examples: Sequence[data.Example], size: int, device: torch.device, desc: str,
            rank: int = 0, ranks: int = 1) -> Iterator[tuple[list[int], data.Batch]]:
    """(positions, batch on the device), longest sources first: little padding, and a lack of memory shows at
    once. Of several processes each takes its part of every batch of size * ranks, see Batch.split; no
    positions where none is left for it."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].source_ids))
    with runtime.progress(None, desc, total=len(order), unit="ex") as bar:
        for start in range(0, len(order), size * ranks):
            rows = order[start:start + size * ranks]
            whole = data.collate([examples[i] for i in rows])
            mine, part = next(whole.split(1, rank, ranks))
            yield [rows[i] for i in mine], part.to(device)
            bar.update(len(rows))


def routed(base: Backbone, adapters: Adapters, batch: data.Batch, **options: Any):
    """The routing context of one batch: embeddings and mask of the sources, task ids for the methods that
    want them."""
    embeddings = base.embed(batch.input_ids)
    return adapters.routed(embeddings, batch.attention_mask, task_ids=batch.task_ids, **options)


@torch.no_grad()
def predict(base: Backbone, adapters: Adapters, examples: Sequence[data.Example],
            tokenizer: data.Tokenizer, *, batch_size: int = 64, max_new_tokens: int = 127,
            desc: str = "generate", w: Tensor | None = None) -> list[str]:
    """Greedy predictions, in the order of the examples; w (M,K), a row for each, instead of the router's."""
    base.eval()
    texts: dict[int, str] = {}
    agree = runtime.any_rank if runtime.is_sharded(base) else bool
    for rows, batch in batches(examples, batch_size, base.device, desc, runtime.rank(), runtime.world_size()):
        with routed(base, adapters, batch, w=None if w is None else w[rows].to(base.device)):
            tokens = base.generate(batch.input_ids, batch.attention_mask, max_new_tokens=max_new_tokens,
                                   on_keep=adapters.keep, agree=agree)
        texts.update((i, tokenizer.decode(ids)) for i, ids in zip(rows, tokens.tolist(), strict=bool(rows)))
    texts = {i: text for part in runtime.all_gather(texts) for i, text in part.items()}
    return [texts[i] for i in range(len(examples))]


def score(examples: Sequence[data.Example], predictions: Sequence[str]) -> dict[str, dict]:
    pairs = runtime.progress(zip(examples, predictions, strict=True), "score", len(examples), "ex")
    return metrics.score({"task": example.task, "category": example.category, "prediction": prediction,
                          "references": example.references} for example, prediction in pairs)


@torch.no_grad()
def mean_loss(base: Backbone, adapters: Adapters, examples: Sequence[data.Example], *, batch_size: int = 64,
              desc: str = "dev loss", w: Tensor | None = None) -> float:
    """Cross-entropy per target token of the first references, in nats; w (M,K) as in `predict`."""
    base.eval()
    total, tokens = 0.0, 0
    for rows, batch in batches(examples, batch_size, base.device, desc, runtime.rank(), runtime.world_size()):
        with routed(base, adapters, batch, w=None if w is None else w[rows].to(base.device)):
            total += base.loss(batch.input_ids, batch.attention_mask, batch.labels).item()
        tokens += batch.target_tokens
    total, tokens = runtime.all_reduce([], total, tokens)
    return total / tokens


# --------------------------------------------------------------------------------------- what the router does


def mean_entropy(w: Tensor) -> float | None:
    """Mean entropy of the rows of w (M,K) in nats; None where they are no distributions (--router-norm
    none)."""
    if w.min() < 0 or not torch.allclose(w.sum(-1), w.new_ones(len(w)), atol=1e-3):
        return None
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
    for rows, batch in batches(examples, batch_size, base.device, "router"):
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
    return RouterReport(mean_entropy(w), means.std(0, correction=0).mean().item(), spreads.mean().item(),
                        w.mean(0).max().item())


def mutual_information(w: Tensor, labels: Sequence[str]) -> float | None:
    """Nats that the abstract task, drawn from w (M,K), and the label of a sample tell of each other: 0 where
    w does not depend on the label, at most the smaller of their two entropies. None where the rows of w are
    no distributions."""
    if mean_entropy(w) is None:
        return None
    rows = np.unique(np.array(labels), return_inverse=True)[1]
    joint = torch.zeros(rows.max() + 1, w.shape[1], dtype=torch.float64)
    joint.index_add_(0, torch.from_numpy(rows.reshape(-1)), w.double() / len(w))  # p(label, k)
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return torch.special.xlogy(joint, joint / apart.clamp(min=1e-300)).sum().item()


@torch.no_grad()
def routing_report(base: Backbone, adapters: Adapters, examples: Sequence[data.Example], *,
                   batch_size: int = 64) -> dict[str, Any]:
    """What the router learnt, as numbers for a JSON file: RouterReport's, mutual information with the real
    category, mean w of each real task (K), mean c of each Linear (S), Zhat (N,K,S) and `distance`, the mean
    |c - 1/S|. {} for methods whose c is not one for the sample."""
    base.eval()
    use, distance, report = 0.0, 0.0, {}
    for rows, batch in batches(examples, batch_size, base.device, "skills in use"):
        with routed(base, adapters, batch) as routing:
            if routing.c is None or routing.allocation is None:
                return {}
            c = routing.c.float().expand(-1, len(rows), -1)  # (N,B,S)
            use = use + c.sum(1) / len(examples)
            distance += (c - 1 / c.shape[-1]).abs().mean().item() * len(rows) / len(examples)
            report["allocation"] = routing.allocation[0].float().cpu().numpy().round(4).tolist()
    names = adapters.linears.keys()
    report |= {"distance": distance, "skill_use": dict(zip(names, use.cpu().tolist(), strict=True))}
    w = router_weights(base, adapters, examples, batch_size=batch_size)
    if w is not None:
        tasks = np.array([example.task for example in examples])
        report |= report_router(w, examples)._asdict()
        report["mutual_information"] = mutual_information(w, [example.category for example in examples])
        report["w"] = {str(task): w[tasks == task].mean(0).tolist() for task in sorted(set(tasks))}
        report["category"] = {example.task: example.category for example in examples}
    return report


# ------------------------------------------------------------------------------------------------ the program


def read_run(folder: str | Path) -> dict:
    """config.json of a run: {"train", "data", "adapter", "base", "tasks", ..}."""
    path = checkpoint.existing(Path(folder) / "config.json", "name the folder of a run of train.py")
    config = runtime.read_json(path)
    sections = {"train": dict, "data": dict, "adapter": dict, "base": str, "tasks": list}
    for name, kind in sections.items():
        if not (isinstance(config, dict) and isinstance(config.get(name), kind)):
            raise ValueError(f"{path}: {name} is missing or of another type; restore the file")
    fields = {"model": str, "method": str, "seed": int, "split_seed": int | None}
    for name, kind in fields.items():
        if not isinstance(config["train"].get(name), kind):
            raise ValueError(f"{path}: {name} is missing or of another type; restore the file")
    if not all(isinstance(task, str) for task in config["tasks"]):
        raise ValueError(f"{path}: tasks must be names; restore the file")
    return config


def load_run(folder: str | Path, place: runtime.Device, shard: bool = False) -> tuple[Backbone, Adapters]:
    """The base with the run's best adapters attached, or the run's best full weights, on the device; with
    `shard` the base is split over all processes."""
    folder, train = Path(folder), read_run(folder)["train"]
    if train["method"] == "full":
        require_frozen(shard, "full")
        base = checkpoint.load(folder / "model", dtype=place.dtype, device=place.device)
        return base, NoAdapter(base, full=True)
    path = folder / "adapter.safetensors"
    state, info = checkpoint.load_adapter(path)
    if (have := checkpoint.fingerprint(train["model"])) != info["base"]:
        raise ValueError(f"{path}: trained on the base {info['base']}, but {train['model']} is {have}; "
                         "restore that model")
    base = load_base(train["model"], place, shard)
    config = runtime.from_json(OrchMoEConfig, info["config"], path)
    sizes = {"num_tasks": len(info["tasks"]), "extra_rank": train.get("extra_rank", 0)}
    with torch.device("meta"):  # names and shapes, before anything of the size they claim is allocated
        bare = type(base)(base.config)
        try:
            attach_method(info["method"], bare, config, **sizes).load_state_dict(state)
        except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a size beyond 64 bits
            raise ValueError(f"{path}: {error}; not what its config describes, restore the file") from None
    adapters = attach_method(info["method"], base, config, **sizes)
    adapters.load_state_dict(state)
    if shard:
        runtime.shard(base, base.blocks, place)
    return base, adapters.eval()


def load_base(path: str | Path, place: runtime.Device, shard: bool) -> Backbone:
    """The frozen T5 of a folder on the device; with `shard` still in its files, for runtime.shard."""
    if shard:
        return checkpoint.load(path, mapped=True)
    return checkpoint.load(path, dtype=place.dtype, device=place.device)


def require_frozen(shard: bool, method: str) -> None:
    if shard and method == "full":
        raise ValueError("--shard: splits a frozen base; not with --method full")


def with_task_ids(examples: Sequence[data.Example], tasks: Sequence[str]) -> list[data.Example]:
    """The examples with the task ids that a run over `tasks` gave, -1 for tasks that it did not train on."""
    index = {task: i for i, task in enumerate(tasks)}
    return [example._replace(task_index=index.get(example.task, -1)) for example in examples]


def copy_heuristic(kind: str, root: str, examples: Sequence[data.Example]) -> list[str]:
    """copy-demo: the output of the task's first positive example; copy-input: the instance's own input."""
    predictions: list[str] = []
    name, path, task = "", Path(), {}
    for example in runtime.progress(examples, kind, unit="ex"):
        if example.task != name:
            name, path = example.task, Path(root) / "tasks" / f"{example.task}.json"
            task = data.read_task(path)
        if kind == "copy-demo" and not task["positive"]:
            raise ValueError(f"{path}: Positive Examples: none to copy from; add one or use copy-input")
        predictions.append(task["positive"][0]["output"] if kind == "copy-demo" else
                           task["instances"][example.place]["input"])
    return predictions


def write_results(folder: Path, examples: Sequence[data.Example], predictions: Sequence[str],
                  scores: dict) -> None:
    with runtime.atomic_write(folder / "predictions.jsonl") as file:
        for example, prediction in zip(examples, predictions, strict=True):
            row = {"id": example.id, "prediction": prediction}
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    runtime.write_json(folder / "scores.json", scores)


# the flags that mean something beside --ask
ASKING = {"run", "model", "ask", "input", "max_source_length", "max_new_tokens", "gpu", "device", "dtype",
          "shard"}


def check_asked(flags: dict[str, Any]) -> None:
    """ValueError for half a question, and for flags that it would not use."""
    for name in ("ask", "input"):
        if not (text := flags.get(name, "")).strip():
            raise ValueError('give both: --ask "instruction" and --input "text"')
        if text.encode(errors="replace").decode() != text:  # bytes of another encoding arrive as surrogates
            raise ValueError(f"--{name}: not UTF-8; give it in that encoding")
    if odd := sorted(flags.keys() - ASKING):
        raise ValueError(f"--{odd[0].replace('_', '-')}: not used with --ask; leave it out")


def answer(base: Backbone, adapters: Adapters, tokenizer: data.Tokenizer, config: EvalConfig,
           data_config: data.DataConfig, who: str) -> None:
    """Says what the model, `who`, answers to --ask and --input and, where one router reads the sample, its w
    by abstract tasks, which are counted from 1 here as in the figures."""
    example = data.asked(config.ask, config.input, tokenizer, data_config)
    runtime.say(f"asked: {who}; the prompt is instruction and input alone, without examples")
    runtime.say("answer: " + predict(base, adapters, [example], tokenizer,
                                     max_new_tokens=config.max_new_tokens)[0])
    w = router_weights(base, adapters, [example])
    if w is not None:
        order = w[0].argsort(descending=True).tolist()
        shares = ", ".join(f"{k + 1} at {100 * w[0, k]:.1f} %" for k in order)
        runtime.say(f"router: abstract task {shares} (numbered as in plot.py's figures)")


def main() -> None:
    parser = runtime.Parser(__doc__)
    for cls in (EvalConfig, data.DataConfig):
        parser.add_dataclass(cls)
    flags = vars(parser.parse_args())
    config = runtime.from_flags(EvalConfig, flags)
    if {"ask", "input"} & flags.keys():
        check_asked(flags)
    if sum(map(bool, (config.run, config.model, config.heuristic))) != 1:
        raise ValueError("give one of --run, --model and --heuristic")
    run, saved = {"train": {"seed": config.seed}, "tasks": []}, data.DataConfig()
    if config.run:
        run = read_run(config.run)
        saved = runtime.from_json(data.DataConfig, run["data"], Path(config.run) / "config.json")
    data_config = replace(saved, **{name: flags[name] for name in vars(saved).keys() & flags.keys()})
    if config.heuristic:
        place = runtime.pick_device(device="cpu")
    else:
        place = runtime.pick_device(config.gpu, config.device, config.dtype)
        runtime.say(place.reason)
    with runtime.joined(place):
        evaluate(config, run, data_config, place)


def evaluate(config: EvalConfig, run: dict, data_config: data.DataConfig, place: runtime.Device) -> None:
    """What main does once its flags are read; `run` is the config.json of the run, if it is one."""
    base, bundled = None, Path(__file__).parent / "tiny"  # whose tokenizer serves the heuristics
    if config.run:
        base, adapters = load_run(config.run, place, config.shard)
    elif config.model:
        base = load_base(config.model, place, config.shard)
        adapters = NoAdapter(base, full=False)
        if config.shard:
            runtime.shard(base, base.blocks, place)
    own = Path(config.run) / "model" if run["train"].get("method") == "full" else run["train"].get("model")
    tokenizer = data.Tokenizer(config.model or own or bundled)
    if config.ask:
        who = config.model or f"{config.run} ({run['train']['method']} on {run['train']['model']})"
        return answer(base, adapters, tokenizer, config, replace(data_config, definition=True), who)
    split_seed = run["train"].get("split_seed")
    seed = run["train"]["seed"] if split_seed is None else split_seed
    examples = evenly(data.load_examples(data_config, tokenizer, config.split, seed=seed), config.limit)
    examples = with_task_ids(examples, run["tasks"])
    if base is None:
        predictions = copy_heuristic(config.heuristic, data_config.data, examples)
    else:
        predictions = predict(base, adapters, examples, tokenizer, batch_size=config.batch_size,
                              max_new_tokens=config.max_new_tokens)
    scores = score(examples, predictions)
    folder = Path(config.out or Path(config.run) / f"eval-{config.split}")
    if runtime.rank() != 0:
        return
    settings = {**asdict(config), **asdict(data_config), "seed": seed, "instances": len(examples)}
    write_results(folder, examples, predictions, {**scores, "config": settings})
    overall = ", ".join(f"{name} {value:.4f}" for name, value in scores["overall"].items())
    runtime.say(f"{len(examples)} instances of {len(scores['tasks'])} {config.split} tasks: {overall}")
    runtime.say(f"written: {folder / 'predictions.jsonl'}, {folder / 'scores.json'}")


if __name__ == "__main__":
    runtime.run_program(main)
