"""Score a run or a bare model by exact match and ROUGE, for SNI by its official rules.

Writes predictions.jsonl, which the official scoring script can read too, and scores.json. With
--ask or --prompt it prints one answer instead, and the router's weight of each abstract task. A run
is scored with its own data settings, unless flags override them.

    python eval.py --run runs/orchmoe-1 --split test --gpu 0
    python eval.py --run runs/orchmoe-1 --ask "Find the vehicle." --input "apple, bus, shirt"
    python eval.py --model tiny/ --split seen --limit 100 --device cpu

Letters: M examples, K abstract tasks.
Test: pytest tests/unit/test_eval.py tests/programs/test_programs.py
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import data
import metrics
import run_folder
from data import Example
from model import Backbone
from orchmoe import Adapters, Routing
from run_folder import Model, Run
from support import program, runtime
from support.program import UserError, require_text
from tasks import FILE_FIELDS, NO_TASK, DataConfig, row_of_prompt, row_of_question
from tokenizer import Tokenizer

LOSS_NOTE = "loss: nats per target token, the mean over tasks; lower is better"
START_NOTE = (
    "may be training rows of the run in --start, or of a run that it started from, if that "
    "run had other data"
)

# --------------------------------------------------------------------------- one pass over a set


def routed(
    base: Backbone, adapters: Adapters, batch: data.Batch, **options: Any
) -> AbstractContextManager[Routing]:
    """Return a context manager that routes the batch by its sources or its task ids.

    The batch may be on the CPU: a copy of it on the device of the base is read.
    """
    on_device = batch.to(base.device)
    return adapters.routed(
        base.embed(on_device.input_ids),
        on_device.attention_mask,
        task_ids=on_device.task_ids,
        **options,
    )


def routed_batches(
    base: Backbone,
    adapters: Adapters,
    examples: Sequence[Example],
    batch_size: int,
    description: str,
    w: Tensor | None = None,
) -> Iterator[tuple[list[int], data.Batch, Routing]]:
    """Yield (rows, batch, routing) for each batch of this process, while its routing is active.

    rows: positions of the batch in `examples`. If this process has none left, rows is empty and
    the batch is one dummy row, which has no labels and so no loss: all processes must take the
    same number of steps.
    w (M,K): weights of the abstract tasks to use instead of the router's.
    """
    base.eval()
    rank, ranks = program.rank(), program.world_size()
    for rows, batch in data.batches(examples, batch_size, base.device, description, rank, ranks):
        given = None
        if w is not None:
            # For a dummy row any weights will do.
            given = w[rows or [0]].to(base.device)
        with routed(base, adapters, batch, w=given) as routing:
            yield rows, batch, routing


def in_order(results: dict[int, Any]) -> list[Any]:
    """Return the results of all processes, ordered by their positions."""
    merged = {}
    for part in runtime.gather_from_ranks(results):
        merged |= part
    return [merged[position] for position in sorted(merged)]


@torch.no_grad()
def predict(
    base: Backbone,
    adapters: Adapters,
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    batch_size: int = 64,
    max_new_tokens: int = 127,
    w: Tensor | None = None,
) -> list[str]:
    """Return greedy predictions in the order of the examples. For w see `routed_batches`."""
    require_fit(base, tokenizer, examples, max_new_tokens)
    # The parameters of a sharded base are DTensors, which have `to_local`. All processes gather
    # them at every token, so no process may stop generating before all can.
    sharded = any(hasattr(parameter, "to_local") for parameter in base.parameters())
    agree = runtime.any_rank if sharded else None

    texts = {}
    for rows, batch, _ in routed_batches(base, adapters, examples, batch_size, "generate", w):
        tokens = base.generate(
            batch.input_ids,
            batch.attention_mask,
            max_new_tokens=max_new_tokens,
            on_keep=adapters.keep,
            agree=agree,
        )
        # A process without rows has a dummy batch of one, which zip drops here and in the
        # functions below.
        texts.update(zip(rows, decoded(tokens, base, tokenizer), strict=False))
    return in_order(texts)


def decoded(tokens: Tensor, base: Backbone, tokenizer: Tokenizer) -> list[str]:
    """Return the text of each row of generated tokens (B,n), which ends before the first EOS."""
    is_eos = torch.isin(tokens, tokens.new_tensor(base.config.eos_ids))
    ended = is_eos.cumsum(dim=1) > 0
    tokens = tokens.masked_fill(ended, -1)  # `decode` skips -1
    return [tokenizer.decode(ids) for ids in tokens.tolist()]


class RowLoss(NamedTuple):
    """The cross-entropy of the first reference of an example."""

    nats: float  # the sum over the tokens
    tokens: int


@torch.no_grad()
def measure(
    base: Backbone,
    adapters: Adapters,
    examples: Sequence[Example],
    *,
    batch_size: int = 64,
    w: Tensor | None = None,
) -> list[RowLoss]:
    """Return the loss of each example, in their order. For w see `routed_batches`."""
    losses = {}
    for rows, batch, _ in routed_batches(base, adapters, examples, batch_size, "loss", w):
        nats = base.loss(batch.input_ids, batch.attention_mask, batch.labels, per_row=True)
        for position, loss in zip(rows, nats.tolist(), strict=False):
            losses[position] = RowLoss(loss, tokens=len(examples[position].target_ids[0]))
    return in_order(losses)


def mean_loss(losses: Sequence[RowLoss]) -> float:
    """Return the mean loss in nats per target token, over the tokens of all examples."""
    return sum(loss.nats for loss in losses) / sum(loss.tokens for loss in losses)


def losses_by_task(
    examples: Sequence[Example], losses: Sequence[RowLoss]
) -> dict[str, list[float]]:
    """Return the losses of each task in nats per target token, from the losses of its examples.

    A named task has one: the sum of its nats divided by the number of its tokens. Examples that
    name no task have one loss for each different prompt.
    """
    totals = {}  # {task: {prompt: RowLoss}}; a named task has one entry, b""
    for example, loss in zip(examples, losses, strict=True):
        task_totals = totals.setdefault(example.task, {})
        prompt = example.source_ids.tobytes() if example.task == NO_TASK else b""
        total = task_totals.get(prompt, RowLoss(nats=0.0, tokens=0))
        task_totals[prompt] = RowLoss(total.nats + loss.nats, total.tokens + loss.tokens)
    means = {}
    for task, task_totals in totals.items():
        means[task] = [total.nats / total.tokens for total in task_totals.values()]
    return means


@torch.no_grad()
def router_weights(
    base: Backbone, adapters: Adapters, examples: Sequence[Example], batch_size: int = 64
) -> Tensor | None:
    """Return the router's w (M,K) on the CPU without running the base.

    Return None if the method has no w, or one w for all samples.
    """
    weights = {}
    for rows, _, routing in routed_batches(base, adapters, examples, batch_size, "router"):
        if routing.w is None or routing.shared:
            return None
        weights.update(zip(rows, routing.w.tolist(), strict=False))
    return torch.tensor(in_order(weights))


def score(
    examples: Sequence[Example],
    predictions: Sequence[str],
    metric_rules: str,
    losses: Sequence[RowLoss] | None = None,
) -> dict[str, Any]:
    """Return the scores, see metrics.score.

    With `losses`, each task has its "loss", too, and "overall" has their mean, so that no task
    weighs more because its targets are long. Each prompt that names no task counts as a task.
    """
    records = []
    for example, prediction in zip(examples, predictions, strict=True):
        records.append({**example._asdict(), "prediction": prediction})
    scores = metrics.score(program.progress(records, "score", unit="ex"), metric_rules)
    if losses is not None:
        every_loss = []
        for task, task_losses in losses_by_task(examples, losses).items():
            scores["tasks"][task]["loss"] = fmean(task_losses)
            every_loss += task_losses
        scores["overall"]["loss"] = fmean(every_loss)
    return scores


def print_if_few(name: str, count: int) -> None:
    """Print how much one answer counts if the set `name` has fewer than 100 rows."""
    if 0 < count < 100:
        program.print_line(
            f"{name} has few rows ({count}): one answer is {100 / count:.1f} points of exact match"
        )


def mean_entropy(w: Tensor) -> float:
    """Return the mean entropy in nats of the rows of w (M,K), NaN if they are not distributions."""
    sums = w.sum(dim=-1)
    is_distribution = (w >= 0).all() & torch.isclose(sums, torch.ones_like(sums), atol=1e-3).all()
    if not is_distribution:  # with --method orchmoe-no-softmax
        return math.nan
    return torch.special.entr(w).sum(dim=-1).mean().item()


def router_report(w: Tensor, initial_w: Tensor) -> dict[str, float]:
    """Return how w (M,K) of M examples is spread over the abstract tasks.

    entropy: mean over the examples in nats, NaN if the rows of w are not distributions.
    largest: the largest of the mean weights of the abstract tasks.
    used: the number of abstract tasks whose mean weight is above 40 % of an equal share, 1/K.
    distance: mean KL(w || initial_w) in nats, where initial_w (M,K) is the router's w before
    training. It is left out if the rows of w are not distributions.

    Warn if w is nearly uniform, or has collapsed to one abstract task.
    """
    K = w.shape[1]
    mean_w = w.mean(dim=0)  # (K,)
    entropy = mean_entropy(w)
    report = {
        "entropy": entropy,
        "largest": mean_w.max().item(),
        "used": int((mean_w > 0.4 / K).sum()),
    }
    if not math.isnan(entropy):
        log_ratio = w.clamp(min=1e-12).log() - initial_w.clamp(min=1e-12).log()
        report["distance"] = (w * log_ratio).sum(dim=-1).mean().item()

    if K > 1 and not math.isnan(entropy):
        if entropy > 0.98 * math.log(K):
            program.warn(
                "the router is uniform: every sample has nearly the same w; train with another "
                "--lr-router"
            )
        elif report["largest"] > 0.9:
            program.warn(
                "the router has collapsed to one abstract task; train with a lower --lr-router"
            )
    return report


def require_fit(
    base: Backbone,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    max_new_tokens: int,
) -> None:
    """Raise UserError if an example is too long, or the tokenizer does not fit the model."""
    longest = 0
    for example in examples:
        targets = [len(ids) for ids in example.target_ids]
        length = len(example.source_ids) + max(max_new_tokens, *targets)
        longest = max(longest, length - 1)  # the last token is only predicted
    if base.longest is not None and longest > base.longest:
        raise UserError(
            f"--max-source-length: an example and an answer need up to {longest} positions, but "
            f"the model has {base.longest} positions; lower it"
        )
    if tokenizer.size > base.config.vocab_size:
        raise UserError(
            f"tokenizer: it has {tokenizer.size} tokens, the model {base.config.vocab_size}; "
            "the tokenizer in the folder belongs to another model"
        )
    if set(tokenizer.eos_ids).isdisjoint(base.config.eos_ids):
        raise UserError(
            f"eos_token_id: {base.config.eos_ids} in generation_config.json or config.json, "
            f"{tokenizer.eos_ids} in the tokenizer; correct one of them"
        )


# ------------------------------------------------------------------------------------ the program


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation: what is scored, on what, and where."""

    run: str = ""  # folder of a run of train.py
    model: str = ""  # folder of a bare model; with --run: the folder to which its base has moved
    method: str = ""  # FILE.py:Class of a run whose method is from a file
    ask: str = ""  # instruction to answer, in the form of --data: JSONL or SNI
    input: str = ""  # input text for --ask; not needed if the data are a JSONL file
    prompt: str = ""  # whole prompt to answer as it stands, instead of --ask
    split: Literal["train", "dev", "seen", "test"] = "test"  # seen: new instances; test: new tasks
    out: str = ""  # folder of the results (default: eval-... in the run's folder, or here)
    overwrite: bool = False  # replace the results that are there
    limit: int = 0  # score at most this many instances, evenly spaced (0: all)
    batch_size: int = 64  # samples generated at once
    max_new_tokens: int = 0  # longest answer (0: 127, or more if the run trained on longer targets)
    gpu: int | None = None  # number of the GPU (default: 0, if there is one)
    device: Literal["cpu", ""] = ""  # use the CPU even if there is a GPU
    dtype: runtime.DtypeChoice = "auto"  # dtype of the base (auto: that of the run, or the faster)
    shard: bool = False  # split the frozen base over the processes of torchrun

    def __post_init__(self) -> None:
        program.require_least(self, batch_size=1)
        if not (self.run or self.model):
            raise UserError("give --run, the folder of a run, or --model, the folder of a model")
        for name in ("ask", "input"):
            require_text(program.flag(name), getattr(self, name))
        if self.prompt and (self.ask or self.input):
            raise UserError("--prompt: it is a whole prompt; leave out --ask and --input")
        if self.prompt:
            program.require_prompt("--prompt", self.prompt)

    @property
    def out_dir(self) -> Path:
        """Folder of the results: --out, or eval-... named after what is scored, split and limit."""
        if self.out:
            return Path(self.out)
        name = "eval"
        if not self.run:
            name += f"-{Path(self.model).resolve().name}"
        name += f"-{self.split}"
        if self.limit:
            name += f"-{self.limit}"
        return Path(self.run) / name

    @property
    def predictions_path(self) -> Path:
        return self.out_dir / "predictions.jsonl"

    @property
    def scores_path(self) -> Path:
        return self.out_dir / "scores.json"


def answer(model: Model, config: EvalConfig, data_config: DataConfig, run: Run | None) -> None:
    """Print the answer to --ask and --input, or to --prompt, and w if there is a sample router."""
    base, adapters, tokenizer = model
    if config.prompt:
        row = row_of_prompt(config.prompt)
    else:
        row = row_of_question(config.ask, config.input, tokenizer, data_config)
        rows_are_prompts = run is not None and not run.facts.get("instructions", True)
        # T5 drops the final empty line. A user who gives --input wants the form of an instruction.
        if tokenizer.one_row and rows_are_prompts and not config.input:
            program.warn(
                f"--ask: the rows of {config.run} are whole prompts, and an instruction ends in an "
                "empty line; give --prompt to ask in their form"
            )
    example = data.example_of(row, tokenizer, data_config)
    [text] = predict(base, adapters, [example], tokenizer, max_new_tokens=config.max_new_tokens)
    program.print_line(f"answer: {text or '(empty)'}")

    w = router_weights(base, adapters, [example])
    if w is not None:
        # The entropy is NaN for weights that do not sum to 1 (orchmoe-no-softmax).
        is_distribution = not math.isnan(mean_entropy(w))
        weights = []
        for k in w[0].argsort(descending=True).tolist():
            weight = f"{100 * w[0, k]:.1f} %" if is_distribution else f"{w[0, k]:.3f}"
            weights.append(f"{k + 1} at {weight}")
        program.print_line(f"router: abstract task {', '.join(weights)} (numbered from 1)")


def choose_rows(
    config: EvalConfig, data_config: DataConfig, run: Run | None, tokenizer: Tokenizer
) -> tuple[list[Example], str]:
    """Return the examples to score and the digest of their task files.

    Raise UserError if files of the run have changed. If flags name other files, only warn, unless
    rows of JSONL may have changed their set.
    """
    is_test = config.split == "test"
    # No other split needs the file of --test, which may be gone.
    read = data_config if is_test else replace(data_config, test="")
    sets = data.load_sets(read, tokenizer, only_test=is_test)
    examples = data.require_set(sets, config.split, data_config)
    digest = examples.digest
    if run:
        list_name = "test_tasks" if is_test else "train_tasks"
        names_other_files = any(
            getattr(data_config, name) != getattr(run.settings, name) for name in FILE_FIELDS
        )
        if data_config.is_jsonl and not is_test and "held_out" in run.facts:
            run.require_same(held_out=examples.facts["held_out"])
        differ = run.facts[list_name] not in ("", digest)  # "": the run had no test rows
        if differ and names_other_files:
            path = data_config.test or data_config.data
            program.warn(f"{path}: these are not the task files of the run")
        elif differ:
            run.require_same(**{list_name: digest})
        examples = data.with_task_index(examples, run.facts["tasks"])
        if is_test:
            data.warn_of_known(examples, data_config)
        if run.settings.start:
            program.print_line(f"these rows {START_NOTE}")
    return data.subsample(examples, config.limit), digest


def refuse_idle_flags(flags: dict[str, Any], config: EvalConfig, data_config: DataConfig) -> None:
    """Raise UserError for a given flag that would have no effect."""
    unread = dict.fromkeys(data_config.idle, f"with --data {data_config.data}")
    if not config.run:
        unread["method"] = "without --run"
    if config.split != "train":
        names = ("train_instances", "bare_share")
        unread |= dict.fromkeys(names, f"with --split {config.split}")
    if config.split != "test":
        unread["test"] = f"with --split {config.split}"
    if config.ask or config.prompt:
        # Of the data settings only those that shape a question or its answer have an effect.
        read = {"data", "max_source_length", "max_target_length"}
        of_scores = {"split", "out", "overwrite", "limit", "batch_size"}
        unread |= dict.fromkeys(of_scores | (vars(data_config).keys() - read), "with a question")
    else:
        unread["input"] = "without --ask"
    program.refuse_unread(flags, unread)


def score_rows(
    model: Model,
    examples: Sequence[Example],
    metric_rules: str,
    *,
    batch_size: int,
    max_new_tokens: int,
) -> tuple[list[str], dict[str, Any]]:
    """Return the predictions and the scores of the examples."""
    base, adapters, tokenizer = model
    predictions = predict(
        base,
        adapters,
        examples,
        tokenizer,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    losses = measure(base, adapters, examples, batch_size=batch_size)
    return predictions, score(examples, predictions, metric_rules, losses)


def require_new_results(config: EvalConfig) -> None:
    """Raise UserError if there are results in --out already, unless --overwrite is given."""
    if os.path.lexists(config.out_dir / "config.json"):
        raise UserError(
            f"{config.out_dir}: has a config.json, as a run or a model has; choose another --out"
        )
    if not config.overwrite:
        program.require_new(
            [config.predictions_path, config.scores_path],
            "add --overwrite, or choose another --out",
        )


def write_results(
    config: EvalConfig,
    examples: Sequence[Example],
    predictions: Sequence[str],
    scores: dict[str, Any],
    scored: dict[str, Any],
) -> None:
    """Write predictions.jsonl and scores.json. scored: what was scored, for scores.json."""
    if program.rank() != 0:
        return
    # No scores may stand beside predictions that are not theirs.
    config.scores_path.unlink(missing_ok=True)
    with program.atomic_write(config.predictions_path) as file:
        for example, prediction in zip(examples, predictions, strict=True):
            row = {"id": example.id, "task": example.task, "prediction": prediction}
            file.write(program.to_json(row, ensure_ascii=False))
    program.write_json(config.scores_path, {**scores, "config": scored})


def main() -> None:
    # Settings. A run has its own data settings, which flags override.
    flags = program.read_flags(__doc__, EvalConfig, DataConfig)
    config = program.from_flags(EvalConfig, flags)
    run = run_folder.read_run(config.run) if config.run else None
    if run and config.method:
        run_folder.load_own_method(run, config.method)
    saved = vars(run.settings.part(DataConfig)) if run else {}
    if "data" in flags:
        program.require_path(flags["data"], "give --data DIR or FILE.jsonl")
        saved = saved | {"test": ""}  # the run's --test belongs to its own --data
    data_config = program.from_flags(DataConfig, saved | flags)
    is_question = bool(config.ask or config.prompt)
    if "split" not in flags and data_config.is_jsonl and not (data_config.test or is_question):
        config = replace(config, split="seen")
        program.print_line(f"{data_config.data}: there is no --test, so the set seen is scored")
    config = replace(config, max_new_tokens=config.max_new_tokens or data_config.max_new_tokens)

    refuse_idle_flags(flags, config, data_config)
    if not is_question:
        require_new_results(config)

    # Where to compute.
    base_folder = config.model or run.settings.model
    dtype = config.dtype
    if run and dtype == "auto":  # otherwise its scores could differ from those of train.py
        dtype = run.settings.dtype
    device = runtime.pick_device(config.gpu, config.device, dtype, base=base_folder)
    program.print_line(device.description)

    with runtime.distributed(device.torch_device, config.shard):
        model = run_folder.load(device, run_dir=config.run, model=config.model, shard=config.shard)
        if is_question:
            answer(model, config, data_config, run)
            return

        # Choose the rows, score them, and write the results.
        examples, digest = choose_rows(config, data_config, run, model.tokenizer)
        rules = data_config.metric_rules
        scored = {
            "scored": config.run or config.model,
            "split": config.split,
            "limit": config.limit,
            "max_new_tokens": config.max_new_tokens,
            **asdict(data_config),
            "dtype": runtime.dtype_name(device.dtype),
            "digest": digest,
            "instances": len(examples),
        }
        with program.locked_folder(config.out_dir, "wait, or choose another --out"):
            require_new_results(config)  # another process may have written while the model loaded
            program.print_line(f"scoring {len(examples)} rows")
            predictions, scores = score_rows(
                model,
                examples,
                rules,
                batch_size=config.batch_size,
                max_new_tokens=config.max_new_tokens,
            )
            write_results(config, examples, predictions, scores, scored)

        overall = ", ".join(f"{name} {value:.4f}" for name, value in scores["overall"].items())
        of_tasks = "" if NO_TASK in scores["tasks"] else f" of {len(scores['tasks'])} tasks"
        program.print_line(f"{len(examples)} {config.split} instances{of_tasks}: {overall}")
        program.print_line(LOSS_NOTE)
        description = metrics.RULES[rules].description
        program.print_line(f"ROUGE and exact match in per cent, by {description}")
        print_if_few(config.split, len(examples))
        program.print_line(f"written: {config.predictions_path}, {config.scores_path}")


if __name__ == "__main__":
    program.run_program(main)
