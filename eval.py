"""Scores a run, a bare model or a model-free heuristic with Super-NaturalInstructions' official metric.
Writes predictions.jsonl, the official script's own input, and scores.json. With --ask it answers one
instruction of yours instead, and says which abstract tasks the router saw in it. A run brings its own
settings of the data, as far as no flag says otherwise.

    python eval.py --run runs/orchmoe-1 --split test --gpu 0
    python eval.py --run runs/orchmoe-1 --ask "Write the first word of the list." --input "lion, June, wolf"
    python eval.py --heuristic copy-demo --data natural-instructions/
"""

import functools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

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
from orchmoe import Adapters, OrchMoEConfig, Routing


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation: what is scored, on what, and where."""

    run: str = ""  # folder of a run of train.py
    model: str = ""  # Hugging Face folder, scored as it is; with --run: where the run's base is now
    heuristic: Literal["copy-demo", "copy-input", ""] = ""  # copies the first example's output, or the input
    ask: str = ""  # an instruction to answer instead of a set, with --run or --model
    input: str = ""  # the text that this instruction is about
    split: Literal["train", "dev", "seen", "test"] = "test"  # seen, test: held-out instances, unseen tasks
    out: str = ""  # folder of what is written (default: eval-.. in the run's folder or, without one, here)
    limit: int = 0  # at most this many instances, evenly over the set (0: all)
    batch_size: int = 64  # samples generated at once
    max_new_tokens: int = 127  # the official 128 less the start token
    gpu: int | None = None  # number of the GPU (default: 0, where there is one)
    device: Literal["cpu", ""] = ""  # no GPU even if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the base; auto: bfloat16 where faster
    shard: bool = False  # split the frozen base over the processes of torchrun

    def __post_init__(self) -> None:
        runtime.require_least(self, batch_size=1, max_new_tokens=1)
        if bool(self.run or self.model) == bool(self.heuristic):
            raise ValueError("give one of --run, --model and --heuristic")
        if any(asked := (self.ask, self.input)) and (
                self.heuristic or self.out or not all(map(str.strip, asked))):
            raise ValueError('give --ask "instruction" and --input "text", with --run or --model; no --out')

    @property
    def folder(self) -> Path:
        """--out, or a name that tells this evaluation from others of the same run or model."""
        bare = "" if self.run else self.heuristic or Path(self.model).resolve().name
        parts = ("eval", bare, self.split, str(self.limit or ""))
        return Path(self.out or Path(self.run) / "-".join(filter(None, parts)))


# ---------------------------------------------------------------------------------------- one pass over a set


def routed(base: Backbone, adapters: Adapters, batch: data.Batch, **options: Any):
    """The routing context of one batch: by its sources or, with methods that want them, its task ids."""
    embeddings = base.embed(batch.input_ids)
    return adapters.routed(embeddings, batch.attention_mask, task_ids=batch.task_ids, **options)


def routed_batches(base: Backbone, adapters: Adapters, examples: Sequence[data.Example], batch_size: int,
                   desc: str, w: Tensor | None = None) -> Iterator[tuple[list[int], data.Batch, Routing]]:
    """(positions, batch, routing) of this process's share, each inside its routing context; w (M,K): a row
    for each example, instead of the router's."""
    base.eval()
    ours = runtime.rank(), runtime.world_size()
    for rows, batch in data.batches(examples, batch_size, base.device, desc, *ours):
        given = None if w is None else w[rows or [0]].to(base.device)
        with routed(base, adapters, batch, w=given) as routing:
            yield rows, batch, routing


def in_order(found: dict[int, Any]) -> list[Any]:
    """By position, what all processes have found."""
    found = {i: value for part in runtime.all_gather(found) for i, value in part.items()}
    return [found[i] for i in sorted(found)]


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
    """Greedy predictions, in the order of the examples; w as in `routed_batches`."""
    require_fit(base, tokenizer, examples, max_new_tokens)
    texts: dict[int, str] = {}
    sharded = any(hasattr(parameter, "to_local") for parameter in base.parameters())
    agree = runtime.any_rank if sharded else bool  # all gather the weights at each token
    for rows, batch, _ in routed_batches(base, adapters, examples, batch_size, desc, w):
        tokens = base.generate(batch.input_ids, batch.attention_mask, max_new_tokens=max_new_tokens,
                               on_keep=adapters.keep, agree=agree)
        ended = torch.isin(tokens, tokens.new_tensor(base.config.eos_ids)).cumsum(1) > 0
        said = tokens.masked_fill(ended, -1).tolist()  # EOS and what fills a row up behind it: no text
        texts.update((i, tokenizer.decode(ids)) for i, ids in zip(rows, said, strict=bool(rows)))
    return in_order(texts)


def score(examples: Sequence[data.Example], predictions: Sequence[str]) -> dict[str, dict]:
    """{"overall", "tasks", "categories"}, see metrics.score."""
    pairs = runtime.progress(zip(examples, predictions, strict=True), "score", total=len(examples), unit="ex")
    return metrics.score({**example._asdict(), "prediction": said} for example, said in pairs)


@torch.no_grad()
def measure(base: Backbone, adapters: Adapters, examples: Sequence[data.Example], *, batch_size: int = 64,
            w: Tensor | None = None) -> tuple[float, Tensor | None]:
    """Cross-entropy per target token of the first references, in nats; w (M,K) of the examples, on the CPU,
    None for a method without one router for the sample. w as in `routed_batches`."""
    total, tokens, weights = 0.0, 0, {}
    for rows, batch, routing in routed_batches(base, adapters, examples, batch_size, "loss", w):
        total += base.loss(batch.input_ids, batch.attention_mask, batch.labels).item()
        tokens += batch.target_tokens
        if not (routing.w is None or routing.shared):
            weights.update(zip(rows, routing.w.tolist(), strict=bool(rows)))
    total, tokens = runtime.all_reduce([], total, tokens)
    rows = in_order(weights)
    return total / tokens, torch.tensor(rows) if rows else None


@torch.no_grad()
def mean_entropy(w: Tensor | None) -> float:
    """Mean entropy of the rows of w (M,K), nats; NaN for no w or no distributions (--router-norm none)."""
    if w is None or w.min() < 0 or not torch.allclose(w.sum(-1), w.new_ones(w.shape[:-1]), atol=1e-3):
        return math.nan
    return torch.special.entr(w).sum(-1).mean().item()


def report_router(w: Tensor, examples: Sequence[data.Example]) -> dict[str, float]:
    """How w (M,K) spreads over M examples of several real tasks: `entropy`, see mean_entropy; the standard
    deviation `between` tasks of their mean w, mean over K, and `within` a task, mean over tasks and K; the
    `largest` mean weight of one abstract task. Warns where w is uniform or has collapsed to one of them."""
    tasks, K = np.array([example.task for example in examples]), w.shape[1]
    groups = [w[tasks == task] for task in sorted(set(tasks))]
    means = torch.stack([group.mean(0) for group in groups])  # (T,K)
    within = torch.stack([group.std(0, correction=0).mean() for group in groups]).mean().item()
    entropy, largest = mean_entropy(w), w.mean(0).max().item()
    if K > 1 and entropy > 0.98 * math.log(K):
        runtime.warn("the router is uniform: w hardly depends on the sample; see --router-init, --lr-router")
    elif K > 1 and entropy >= 0 and largest > 0.9:  # no NaN
        runtime.warn("the router has collapsed to one abstract task; lower --lr-router")
    return {"entropy": entropy, "between": means.std(0, correction=0).mean().item(), "within": within,
            "largest": largest}


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
    def read(cls, folder: str | Path) -> "Run":
        path = runtime.existing(Path(folder) / "config.json", "name the folder of a run of train.py")
        return runtime.from_json(cls, runtime.read_json(path), path)

    def configs(self, folder: str | Path, **classes: type) -> dict[str, Any]:
        """The sections so named as configs of these classes; ValueError names the file in `folder`."""
        path = Path(folder) / "config.json"
        return {name: runtime.from_json(cls, getattr(self, name), path) for name, cls in classes.items()}

    def __post_init__(self) -> None:
        if not all(isinstance(self.train.get(name), str) for name in ("model", "method")):
            raise ValueError("train: model and method must be texts")

    def require_same(self, folder: str | Path, **found: Any) -> None:
        """ValueError that names the first of the fields in `found` that is not the run's."""
        for name, value in found.items():
            if value != getattr(self, name):
                raise ValueError(f"not the {name} that the run in {folder} began with; restore it, name its "
                                 "place by --model or --data, or start a new run")

    def kept(self, folder: str | Path) -> tuple[dict[str, Tensor], dict]:
        """State and metadata of the adapters that were best on dev; ValueError where they are another's."""
        state, saved = checkpoint.load_adapter(path := Path(folder) / "adapter.safetensors")
        due = {"base": self.base, "method": self.train["method"], "tasks": list(self.tasks)}
        if other := [name for name, value in due.items() if saved[name] != value]:
            raise ValueError(f"{path}: its {other[0]}, {saved[other[0]]!r:.60}, is not the run's; restore it")
        return state, saved


def load(place: runtime.Device, *, run: str | Path = "", model: str | Path = "", shard: bool = False
         ) -> tuple[Backbone, Adapters, tokenizers.Tokenizer]:
    """What a run of train.py has kept, adapters on its base or all weights; without a run the model of a
    folder as it is. model: that folder, or where the run's base is now, if it has moved. shard: split the
    base over all processes."""
    began = Run.read(run) if run else None
    full = began is not None and began.train["method"] == "full"
    if full and model:
        raise ValueError(f"--model: the weights of {run} are its own, of --method full; leave it out")
    path = Path(run, "model") if full else model or began.train["model"]
    if began:
        runtime.existing(path, "the run has kept no weights yet" if full else
                         f"the base of {run}; name by --model where it is now")
    place = place._replace(dtype=torch.float32) if full else place  # as they were trained
    tokenizer = tokenizers.load(path)
    if began:
        began.require_same(run, tokenizer=tokenizer.fingerprint,
                           base=began.base if full else checkpoint.fingerprint(path))
    base = checkpoint.mapped(path) if shard else checkpoint.load(path, dtype=place.dtype, device=place.device)
    adapters = (attach_kept(Path(run), began, base) if began and not full else
                NoAdapter(base, full=full and not shard))
    if shard:
        runtime.shard(base, base.blocks, place)
    return base, adapters.eval(), tokenizer


def attach_kept(folder: Path, run: Run, base: Backbone) -> Adapters:
    """The adapters of the run that were best on dev, on its base."""
    path, (state, saved) = folder / "adapter.safetensors", run.kept(folder)
    config = runtime.from_json(OrchMoEConfig, saved["config"], path)
    sizes = {"num_tasks": len(saved["tasks"]), "extra_rank": run.train.get("extra_rank", 0)}
    try:
        with torch.device("meta"):  # names and shapes, before anything of the size they claim is allocated
            bare = type(base)(base.config)
            attach_method(saved["method"], bare, config, **sizes).load_state_dict(state)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:  # of types, names, sizes
        raise ValueError(f"{path}: {error}; not what its config describes, restore the file") from None
    adapters = attach_method(saved["method"], base, config, **sizes)
    adapters.load_state_dict(state)
    return adapters


def copy_heuristic(kind: str, root: str, examples: Sequence[data.Example]) -> list[str]:
    """copy-demo: the output of the task's first positive example; copy-input: the instance's own input."""
    predictions, read = [], functools.lru_cache(1)(data.read_task)
    for example in runtime.progress(examples, kind, unit="ex"):
        task = read(path := Path(root) / "tasks" / f"{example.task}.json")
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
    text, = predict(base, adapters, [example], tokenizer, max_new_tokens=config.max_new_tokens)
    runtime.say(f"asked {config.run or config.model}: instruction and input alone, without examples")
    runtime.say(f"answer: {text}")
    _, w = measure(base, adapters, [example])
    if w is not None:
        order = w[0].argsort(descending=True).tolist()
        shares = ", ".join(f"{k + 1} at {100 * w[0, k]:.1f} %" for k in order)
        runtime.say(f"router: abstract task {shares} (numbered as in the figures)")


def main() -> None:
    flags = runtime.read_flags(__doc__, EvalConfig, data.DataConfig)
    config = runtime.from_flags(EvalConfig, flags)
    run = Run.read(config.run) if config.run else None
    saved = vars(run.configs(config.run, data=data.DataConfig)["data"]) if run else {}
    data_config = runtime.from_flags(data.DataConfig, saved | flags)
    where = (None, "cpu") if config.heuristic else (config.gpu, config.device)
    full = run is not None and run.train["method"] == "full"  # whose weights stay as they were trained
    place = runtime.pick_device(*where, "float32" if full else config.dtype,
                                base=config.model or (run.train["model"] if run else ""))
    runtime.say(place.reason)
    with runtime.joined(place):
        if config.heuristic:
            tokenizer = tokenizers.load(runtime.ROOT / "tiny")  # of no consequence for what is copied
        else:
            base, adapters, tokenizer = load(place, run=config.run, model=config.model, shard=config.shard)
        if config.ask:
            return answer(base, adapters, tokenizer, config, data_config)
        examples, digest = load_examples(config, data_config, run, tokenizer)
        settings = {**asdict(config), **asdict(data_config), "dtype": str(place.dtype)[6:],
                    "digest": digest, "instances": len(examples)}
        require_free(config, settings)
        if config.heuristic:
            predictions = copy_heuristic(config.heuristic, data_config.data, examples)
        else:
            require_fit(base, tokenizer, examples, config.max_new_tokens)
            config.folder.mkdir(parents=True, exist_ok=True)  # before hours of generation, not after them
            predictions = predict(base, adapters, examples, tokenizer, batch_size=config.batch_size,
                                  max_new_tokens=config.max_new_tokens)
        if runtime.rank() == 0:
            write_results(config.folder, settings, examples, predictions)


def load_examples(config: EvalConfig, data_config: data.DataConfig, run: Run | None,
                  tokenizer: tokenizers.Tokenizer) -> tuple[list[data.Example], str]:
    """The set to evaluate, its task ids those of the run, and the digest of its files. Of the run's own data
    the task files must be those of then; other data that flags name are only said to be other."""
    training, kind = run.tasks if run else None, "test" if config.split == "test" else "train"
    examples = data.load_sets(data_config, tokenizer, [config.split], training=training)[config.split]
    if run and examples.digest != run.digests.get(kind, examples.digest):
        if all(getattr(data_config, name) == run.data.get(name) for name in data.WHERE):
            run.require_same(config.run, digests={kind: examples.digest})
        runtime.warn(f"{data_config.data}: other tasks than those of the run")
    return data.subsample(examples, config.limit), examples.digest


def require_free(config: EvalConfig, settings: dict[str, Any]) -> None:
    """ValueError where the folder holds a run, or an evaluation of something else."""
    folder, same = config.folder, {"digest", *vars(data.DataConfig())} - data.WHERE
    if config.out or not config.run:  # else its place and name say the rest
        same |= {"run", "model", "heuristic", "split", "limit"}
    kept = runtime.read_json(at).get("config", ()) if (at := folder / "scores.json").exists() else settings
    other = any(name not in kept or kept[name] != settings[name] for name in same)
    if (folder / "config.json").exists() or other:
        raise ValueError(f"{folder}: holds a run, or another evaluation; name another by --out")


def write_results(folder: Path, settings: dict[str, Any], examples: Sequence[data.Example],
                  predictions: Sequence[str]) -> None:
    with runtime.atomic_write(folder / "predictions.jsonl") as file:
        for example, prediction in zip(examples, predictions, strict=True):
            row = {"id": example.id, "prediction": prediction}
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    (folder / "scores.json").unlink(missing_ok=True)  # of other predictions
    scores = score(examples, predictions)
    runtime.write_json(folder / "scores.json", {**scores, "config": settings})
    overall = ", ".join(f"{name} {value:.4f}" for name, value in scores["overall"].items())
    runtime.say(f"{len(examples)} instances of {len(scores['tasks'])} {settings['split']} tasks: {overall}")
    runtime.say(f"written: {folder / 'predictions.jsonl'}, {folder / 'scores.json'}")


if __name__ == "__main__":
    runtime.run_program(main)
