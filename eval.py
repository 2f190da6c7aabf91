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

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace
from itertools import takewhile
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import data
import metrics
import run_folder
from baselines import load_method
from data import Example
from model import Backbone
from orchmoe import Adapters, Routing
from run_folder import Model, Run
from support import program, runtime
from support.program import UserError, require_text
from tasks import FILE_FIELDS, NO_TASK, DataConfig, row_of_prompt, row_of_question
from tokenizer import Tokenizer
from tokenizer import load as load_tokenizer

# --------------------------------------------------------------------------- one pass over a set


def routed(
    base: Backbone, adapters: Adapters, batch: data.Batch, **options: Any
) -> AbstractContextManager[Routing]:
    """Return a context manager that routes the batch by its sources or its task ids.

    The batch may be on the CPU. A copy of it goes to the device of the base.
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

    rows: indices of the batch into `examples`. They are empty if the batch is a dummy, see
    data.shares, so that a caller's zip(rows, ...) drops its results. w (M,K): weights of the
    abstract tasks to use instead of the router's.
    """
    base.eval()
    rank, ranks = program.rank(), program.world_size()
    for rows, batch in data.batches(examples, batch_size, base.device, description, rank, ranks):
        given = None
        if w is not None:
            given = w[rows or [0]].to(base.device)  # for a dummy any weights will do
        with routed(base, adapters, batch, w=given) as routing:
            yield rows, batch, routing


def in_order(results: dict[int, Any]) -> list[Any]:
    """Return the results {row: result} of all processes as a list, in the order of the rows."""
    merged = {}
    for part in runtime.gather_from_ranks(results):
        merged |= part
    return [merged[row] for row in sorted(merged)]


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
    require_fit(base, examples, max_new_tokens)
    texts = {}
    for rows, batch, _ in routed_batches(base, adapters, examples, batch_size, "generate", w):
        tokens = base.generate(
            batch.input_ids,
            batch.attention_mask,
            max_new_tokens=max_new_tokens,
            on_keep=adapters.keep,
            agree=runtime.any_rank,  # a sharded base is gathered at every token, by all processes
        )
        for row, ids in zip(rows, tokens.tolist(), strict=False):
            answer_ids = takewhile(lambda token: token not in base.config.eos_ids, ids)
            texts[row] = tokenizer.decode(list(answer_ids))
    return in_order(texts)


def require_fit(base: Backbone, examples: Sequence[Example], max_new_tokens: int) -> None:
    """Raise UserError if an example, with its target or an answer, is too long for the base."""
    longest = 0
    for example in examples:
        answer_length = max(max_new_tokens, *(len(ids) for ids in example.target_ids))
        # The last token is only predicted.
        longest = max(longest, len(example.source_ids) + answer_length - 1)
    if base.longest is not None and longest > base.longest:
        raise UserError(
            f"--max-source-length: an example and an answer need up to {longest} positions, but "
            f"the model has {base.longest} positions; lower it, or the longest target or answer"
        )


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
        for row, loss in zip(rows, nats.tolist(), strict=False):
            losses[row] = RowLoss(loss, tokens=len(examples[row].target_ids[0]))
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
    totals = {}  # {(task, prompt): (nats, tokens)}
    for example, loss in zip(examples, losses, strict=True):
        key = (example.task, b"")  # all prompts of a named task count together
        if example.task == NO_TASK:
            key = (example.task, example.source_ids.tobytes())
        nats, tokens = totals.get(key, (0.0, 0))
        totals[key] = (nats + loss.nats, tokens + loss.tokens)
    means = {}
    for (task, _), (nats, tokens) in totals.items():
        means.setdefault(task, []).append(nats / tokens)
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
    require_fit(base, examples, max_new_tokens)
    # First the loss: if its logits are too large for the memory, no answers are lost.
    losses = measure(base, adapters, examples, batch_size=batch_size)
    predictions = predict(
        base,
        adapters,
        examples,
        tokenizer,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    return predictions, score(examples, predictions, metric_rules, losses)


def note(metric_rules: str) -> str:
    """Return what the scores are, for the line below them."""
    return (
        "loss: nats per target token, the mean over tasks; lower is better. ROUGE and exact match "
        f"in per cent, by {metrics.RULES[metric_rules].description}"
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
    out: str = ""  # folder of the results (default: eval-SPLIT in the run's folder, or here)
    limit: int = 0  # score at most this many instances, evenly spaced (0: all)
    batch_size: int = 64  # samples generated at once
    max_new_tokens: int = 0  # longest answer (0: 127, or more if the run trained on longer targets)
    gpu: int | None = None  # number of the GPU (default: 0, if there is one)
    device: Literal["cpu", ""] = ""  # use the CPU even if there is a GPU
    dtype: runtime.DtypeChoice = "auto"  # dtype of the base; auto: the faster (default: the run's)
    shard: bool = False  # split the frozen base over the processes of torchrun

    def __post_init__(self) -> None:
        program.check(self, batch_size=1)
        if not (self.run or self.model):
            raise UserError("give --run, the folder of a run, or --model, the folder of a model")
        for name in ("ask", "input", "prompt"):
            require_text(program.flag(name), getattr(self, name))

    @property
    def results(self) -> tuple[Path, Path]:
        """Return the paths of the predictions and of the scores."""
        folder = Path(self.out or Path(self.run, f"eval-{self.split}"))
        return folder / "predictions.jsonl", folder / "scores.json"


def answer(model: Model, config: EvalConfig, data_config: DataConfig, run: Run | None) -> None:
    """Print the answer to --ask and --input, or to --prompt, and w if there is a sample router."""
    base, adapters, tokenizer = model
    if config.prompt:
        row = row_of_prompt(config.prompt)
    else:
        row = row_of_question(config.ask, config.input, tokenizer, data_config)
        # T5 ignores the final empty line, and with --input the form of an instruction is meant.
        rows_are_prompts = run is not None and not run.facts.get("instructions", True)
        if rows_are_prompts and tokenizer.one_row and not config.input:
            program.warn(
                f"--ask: the rows of {config.run} are whole prompts, and an instruction ends in an "
                "empty line; give --prompt to ask in their form"
            )
    example = data.example_of(row, tokenizer, data_config)
    [text] = predict(base, adapters, [example], tokenizer, max_new_tokens=config.max_new_tokens)
    program.print_line(f"answer: {text or '(empty)'}")

    w = router_weights(base, adapters, [example])
    if w is not None:
        order = w[0].argsort(descending=True).tolist()
        # Without a softmax a weight may be negative.
        weights = [f"{k + 1} at {w[0, k]:.3f}" for k in order if abs(w[0, k]) >= 0.01]
        weights = ", ".join(weights) or "none"
        program.print_line(f"router: abstract task {weights} (numbered from 1; others below 0.01)")


def rows_of_split(
    config: EvalConfig, data_config: DataConfig, tokenizer: Tokenizer, run: Run | None
) -> list[Example]:
    """Return the examples of --split, with the task ids of the run.

    The task files must be those of the run: others are split differently, so that rows which
    trained could be scored. Only for the test set may flags name other files.
    """
    is_test = config.split == "test"
    sets = data.load_sets(data_config, tokenizer, only_test=is_test)
    examples = data.require_set(sets, config.split, data_config)
    if run is not None:
        files, of_run = vars(data_config), vars(run.settings)
        if not is_test or all(files[name] == of_run[name] for name in FILE_FIELDS):
            run.require_same({f"{'test' if is_test else 'train'}_tasks": examples.digest})
        examples = data.with_task_index(examples, run.facts["tasks"])
        if is_test:
            data.warn_of_known(examples, data_config)
    return data.subsample(examples, config.limit)


def score_split(
    model: Model, config: EvalConfig, data_config: DataConfig, examples: Sequence[Example]
) -> None:
    """Score the examples, write predictions.jsonl and scores.json, and print the means."""
    predictions_path, scores_path = config.results
    out = scores_path.parent
    with program.locked_folder(out, "wait, or choose another --out"):
        program.require_new(config.results, "choose another --out")
        program.print_line(f"scoring {len(examples)} rows")
        predictions, scores = score_rows(
            model,
            examples,
            data_config.metric_rules,
            batch_size=config.batch_size,
            max_new_tokens=config.max_new_tokens,
        )
        if program.rank() == 0:
            with program.atomic_write(predictions_path) as file:
                for example, prediction in zip(examples, predictions, strict=True):
                    row = {"id": example.id, "task": example.task, "prediction": prediction}
                    file.write(program.to_json(row, ensure_ascii=False))
        settings = asdict(config) | asdict(data_config)
        program.write_json(scores_path, {**scores, "config": settings})

    overall = ", ".join(f"{name} {value:.4f}" for name, value in scores["overall"].items())
    program.print_line(f"{len(examples)} {config.split} instances: {overall}; written to {out}")
    program.print_line(note(data_config.metric_rules))


def main() -> None:
    # Settings. A run has its own data settings, which flags override. Its --test is dropped if
    # --data names other rows, or if another split is scored.
    flags = program.read_flags(__doc__, EvalConfig, DataConfig)
    config = program.from_flags(EvalConfig, flags)
    method = load_method(config.method) if config.method else ""
    run = run_folder.read_run(config.run) if config.run else None
    if run and method:
        run.require_same({"method": method}, remedy="give the file and the class of the run")
    settings = run.settings if run else run_folder.Settings(model=config.model)
    values = vars(settings) | flags
    if "data" in flags or config.split != "test":
        values["test"] = flags.get("test", "")
    data_config = program.from_flags(DataConfig, values)

    unread = dict.fromkeys(data_config.idle, f"with --data {data_config.data}")
    if config.ask:
        unread["prompt"] = "with --ask"
    else:
        unread["input"] = "without --ask"
    if not config.run:
        unread["method"] = "without --run"
    if config.split != "test":
        unread["test"] = f"with --split {config.split}"
    is_question = config.ask or config.prompt
    if is_question:
        of_rows = {"split", "limit", "out", "batch_size"} | {f.name for f in fields(DataConfig)}
        of_rows -= {"data", "max_source_length", "max_target_length"}
        unread |= dict.fromkeys(of_rows, "with a question")
    else:
        program.require_new(config.results, "choose another --out")
    program.refuse_unread(flags, unread)

    # Where to compute. The default is the dtype of the run, since another one changes the scores.
    dtype = flags.get("dtype", settings.dtype)
    base_folder = config.model or settings.model
    device = runtime.pick_device(config.gpu, config.device, dtype, base=base_folder)
    program.print_line(device.description)
    config = replace(  # scores.json says what was used
        config,
        dtype=runtime.dtype_name(device.dtype),
        max_new_tokens=config.max_new_tokens or data_config.max_new_tokens,
    )
    with runtime.distributed(device.torch_device, config.shard):
        if not is_question:  # before the base, which may be large, takes memory
            examples = rows_of_split(config, data_config, load_tokenizer(base_folder), run)
        model = run_folder.load(device, run_dir=config.run, model=config.model, shard=config.shard)
        if is_question:
            answer(model, config, data_config, run)
        else:
            score_split(model, config, data_config, examples)


if __name__ == "__main__":
    program.run_program(main)
