"""The tokens of the data: from rows of text to batches.

tasks.py reads the texts as Rows. `tokenise` makes an Example of each row, and `load_sets` returns
those of each set. `BatchOrder` chooses the examples of each training step, which depend only on the
source lengths, the batch size, the seed and the step. `draw_targets` chooses one target of each,
and `collate` makes a Batch of them.

    examples = load_sets(DataConfig(data="sni/"), tokenizer.load("tiny/"))["train"]
    chosen = BatchOrder(examples.source_lengths, 8, seed=0).at(step=0)
    batch = collate([examples[i] for i in chosen])

Letters: B batch, L source length, Lt target length.

Test: pytest tests/unit/test_data.py
"""

import functools
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from support import program
from support.program import UserError
from tasks import NO_TASK, DataConfig, Row, find_files, hash_of, jsonl_rows, sni_rows
from tokenizer import Tokenizer

UNKNOWN_CHARACTERS = (
    "characters that the tokenizer does not know, so the model neither reads nor writes them"
)

# ------------------------------------------------------------------------------------------- tokens


class Example(NamedTuple):
    """One row as tokens."""

    id: str
    task: str
    category: str
    source_ids: np.ndarray  # (L,) int32
    target_ids: list[np.ndarray]  # (Lt,) int32, one for each reference
    references: list[str]
    task_index: int = -1  # index among the training tasks, -1 for other tasks
    position: int = -1  # see tasks.Row
    input: str | None = None  # see tasks.Row


def _limit(ids: list[int], length: int, tokenizer: Tokenizer) -> np.ndarray:
    """Return the ids as an array, cut to at most `length`. An EOS at the end is kept."""
    if len(ids) > length and ids[-1] in tokenizer.eos_ids:
        ids = ids[: length - 1] + ids[-1:]
    return np.array(ids[:length], np.int32)


def _origin(row: Row, config: DataConfig) -> str:
    """Return the words that tell a user where a row is."""
    if row.set == "question":
        return "the prompt"
    path = config.data
    if row.set == "test":
        path = config.test or config.data
    return f"{path}, row {row.id}"


def tokenise(
    rows: Iterable[Row], tokenizer: Tokenizer, config: DataConfig
) -> tuple[dict[str, list[Example]], Counter[str]]:
    """Return {name of a set: the examples of its rows}, and counts of what was lost.

    All programs tokenise prompts here, so that the same text always gets the same ids. A prompt is
    tokenised without its references. A decoder reads prompt and reference as one text: SNI's form
    puts one space between them, and the texts of JSONL rows are joined unchanged. Raise UserError
    for a prompt without any token, such as a zero-width space.

    The counts are those of cut sources ("source"), of cut targets ("target"), and of rows with
    unknown characters ("characters").
    """
    spaced = not config.is_jsonl
    [without_text] = tokenizer.sources([""])  # BOS, or the EOS of T5, or nothing
    examples = {}
    lost = Counter()

    rows = iter(rows)
    while chunk := list(itertools.islice(rows, 1000)):  # the tokenizer takes many texts at once
        prompts = []
        references = []
        for row in chunk:
            prompts.append(row.prompt)
            references.extend(row.references)
        sources = tokenizer.sources(prompts, spaced=spaced)
        # An iterator over the targets of all rows. Each row takes its own.
        targets = tokenizer.targets(references, spaced=spaced)

        for row, source in zip(chunk, sources, strict=True):
            if source == without_text:
                raise UserError(
                    f"{_origin(row, config)}: the tokenizer has no tokens for the prompt "
                    f"{row.prompt!r:.40}; change it, or leave it out"
                )
            if row.is_cut or len(source) > config.max_source_length:
                lost["source"] += 1
            source_ids = _limit(source, config.max_source_length, tokenizer)
            target_ids = []
            for target in itertools.islice(targets, len(row.references)):
                if len(target) > config.max_target_length:
                    lost["target"] += 1
                target_ids.append(_limit(target, config.max_target_length, tokenizer))
            if any(tokenizer.unknown_id in ids for ids in (source_ids, *target_ids)):
                lost["characters"] += 1

            example = Example(
                id=row.id,
                task=row.task,
                category=row.category,
                source_ids=source_ids,
                target_ids=target_ids,
                references=row.references,
                position=row.position,
                input=row.input,
            )
            examples.setdefault(row.set, []).append(example)
    return examples, lost


def warn_of_lost(lost: Counter[str], config: DataConfig, name: str) -> None:
    """Warn of sources and targets that are cut, and of rows with unknown characters."""
    limits = {"source": config.max_source_length, "target": config.max_target_length}
    for kind, limit in limits.items():
        if lost[kind]:
            count = f"{lost[kind]} {kind}s are too long and lose their ends"
            program.warn(f"--max-{kind}-length {limit}: {count}")
    if lost["characters"]:
        program.warn(f"{name}: {lost['characters']} rows have {UNKNOWN_CHARACTERS}")


def example_of(row: Row, tokenizer: Tokenizer, config: DataConfig) -> Example:
    """Return the example of one row, such as a question. Warn if a part of it is lost."""
    examples, lost = tokenise([row], tokenizer, config)
    if lost["source"]:
        program.warn(f"a prompt has more than {config.max_source_length} tokens and loses its end")
    if lost["characters"]:
        program.warn(f"a prompt has {UNKNOWN_CHARACTERS}")
    return examples[row.set][0]


# --------------------------------------------------------------------------------- sets of examples


class Examples(list[Example]):
    """The examples of one set.

    tasks: the names of the training tasks, sorted; empty unless each row of "train" names its task.
    digest: a hash of the files of the set, see `digest_of`.
    facts: facts about the rows of a JSONL file, see tasks.jsonl_rows; empty for a folder.
    """

    def __init__(
        self, examples: Sequence[Example], tasks: list[str], digest: str, facts: dict[str, Any]
    ):
        super().__init__(examples)
        self.tasks = tasks
        self.digest = digest
        self.facts = facts
        self.source_lengths = np.array([len(example.source_ids) for example in examples])


def with_task_index(examples: Sequence[Example], tasks: Sequence[str]) -> list[Example]:
    """Return the examples with indices into these training tasks."""
    index = {task: i for i, task in enumerate(tasks)}
    return [example._replace(task_index=index.get(example.task, -1)) for example in examples]


def warn_of_known(test: Sequence[Example], config: DataConfig) -> None:
    """Warn if examples of "test" belong to training tasks."""
    known = sum(example.task_index >= 0 for example in test)
    if known:
        program.warn(
            f"{config.test or config.data}: {known} of {len(test)} test rows belong to training "
            "tasks, which are not unseen; methods that route by task use their ids"
        )


def _key(example: Example) -> Hashable:
    """Return the key by which two rows count as the same.

    In SNI's form it is the task and the input: prompts of one input differ, since some of them have
    no examples. For JSONL it is the tokens of the prompt.
    """
    if example.input is not None:
        return example.task, example.input
    return example.source_ids.tobytes()


def _remove_used_rows(examples: dict[str, list[Example]], config: DataConfig) -> None:
    """Remove rows of dev whose key train has, and rows of seen whose key train or dev has.

    Rows of "test" are only counted.
    """
    shared = "tokens" if config.is_jsonl else "inputs"
    used = {_key(row) for row in examples.get("train", [])}
    for name, earlier in (("dev", "training"), ("seen", "training or dev")):
        rows = examples.get(name, [])
        unused = [row for row in rows if _key(row) not in used]
        if len(unused) < len(rows):
            examples[name] = unused
            lost = f"{len(rows) - len(unused)} of {len(rows)} {name} rows"
            program.warn(
                f"{config.data}: {lost} have the {shared} of {earlier} rows and are left out"
            )
        if name == "dev":  # seen is compared with train and dev
            used |= {_key(row) for row in rows}

    test = examples.get("test", [])
    known = sum(_key(row) in used for row in test)
    if known:
        program.warn(
            f"{config.test}: {known} of {len(test)} test rows have the {shared} of training or dev "
            "rows, so they are not unseen"
        )


def digest_of(paths: Iterable[Path], *, with_names: bool) -> str:
    """Return a hash of the contents of the files, and of their names if asked, 16 hex digits."""
    digest = hashlib.sha256()
    for path in paths:
        if with_names:
            digest.update(hashlib.sha256(path.stem.encode()).digest())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def load_sets(
    config: DataConfig, tokenizer: Tokenizer, *, only_test: bool = False
) -> dict[str, Examples]:
    """Return {name: set}, for those of "train", "dev", "seen" and "test" that have rows.

    tasks.sni_rows and tasks.jsonl_rows say which rows a set has. `_remove_used_rows` then removes
    those that an earlier set has, too: instances of SNI's form may have one input and different
    outputs, and prompts of JSONL may have equal tokens, for example after cutting. A set may be
    missing or empty, so take it with `require_set`. Raise UserError for bad files.

    only_test: read no training tasks of a folder, because tokenising all of them takes long.
    """
    files = find_files(config)
    if only_test and not config.is_jsonl:
        files["train"] = []
    # In a folder a file is named after its task, and the split depends on this name.
    with_names = not config.is_jsonl
    digests = {name: digest_of(paths, with_names=with_names) for name, paths in files.items()}
    if config.is_jsonl and digests["test"] == digests["train"]:
        raise UserError(f"--test {config.test}: is a copy of --data; give rows that do not train")

    facts = {}
    if config.is_jsonl:
        rows, facts = jsonl_rows(files, config.train_limit)
    else:
        rows = sni_rows(files, tokenizer, config)
    examples, lost = tokenise(rows, tokenizer, config)
    origin = f"{config.data} and {config.test}" if config.test else config.data
    warn_of_lost(lost, config, origin)
    tasks = sorted({example.task for example in examples.get("train", [])})
    if NO_TASK in tasks:  # methods that route by task need the task of every row
        tasks = []
    _remove_used_rows(examples, config)

    sets = {}
    for set_name, of_set in examples.items():
        digest = digests["test" if set_name == "test" else "train"]
        sets[set_name] = Examples(with_task_index(of_set, tasks), tasks, digest, facts)
    return sets


def require_set(sets: dict[str, Examples], name: str, config: DataConfig) -> Examples:
    """Return a set of `load_sets`. Raise UserError if it is missing or too small."""
    least = 1
    if config.is_jsonl and name in ("dev", "seen"):
        least = 5  # `split_prompts` chooses at least 8, and `_remove_used_rows` may leave fewer
    found = len(sets.get(name, ()))
    if found >= least:
        return sets[name]

    program.require_path(config.data, "give the data with --data")
    if config.is_jsonl and name == "test":
        remedy = "give --test OTHER.jsonl, or --split seen"
    elif config.is_jsonl:
        remedy = "add other prompts; 40 are enough, if their tokens differ after cutting"
    elif name == "test":
        remedy = "add task files of test_tasks.txt, or give --split seen"
    else:
        remedy = "add task files of train_tasks.txt, with 5 or more different inputs each"
    raise UserError(f"{config.data}: {found} rows in the set {name}, {least} needed; {remedy}")


# ------------------------------------------------------------------------------------------ batches


class Batch(NamedTuple):
    input_ids: Tensor  # (B,L) int64
    attention_mask: Tensor  # (B,L) bool
    labels: Tensor  # (B,Lt) int64, -100 at padding
    task_ids: Tensor  # (B,) int64, task_index of each Example

    def to(self, device: torch.device) -> "Batch":
        """Return the same batch on `device`."""
        return Batch(*[tensor.to(device, non_blocking=True) for tensor in self])


def draw_targets(examples: Sequence[Example], seed: int, step: int) -> list[Example]:
    """Return the examples with one target each. A hash of (seed, step, task, id) chooses it."""
    drawn = []
    for example in examples:
        number = hash_of(f"{seed}/{step}/{example.task}/{example.id}") % len(example.target_ids)
        drawn.append(example._replace(target_ids=[example.target_ids[number]]))
    return drawn


def collate(examples: Sequence[Example]) -> Batch:
    """Return a padded batch with the first target of each example."""
    sources = [torch.from_numpy(example.source_ids).long() for example in examples]
    masks = [torch.ones_like(source, dtype=torch.bool) for source in sources]
    targets = [torch.from_numpy(example.target_ids[0]).long() for example in examples]
    return Batch(
        input_ids=pad_sequence(sources, batch_first=True),
        attention_mask=pad_sequence(masks, batch_first=True),
        labels=pad_sequence(targets, batch_first=True, padding_value=-100),
        task_ids=torch.tensor([example.task_index for example in examples]),
    )


def shares(
    examples: Sequence[Example], size: int, rank: int, ranks: int
) -> Iterator[tuple[range, Batch]]:
    """Cut the examples into pieces of `size`. Yield the share of one process in each piece.

    Process `rank` gets every `ranks`-th example of each piece, starting with number `rank`. Yield
    (rows, Batch of these rows), where `rows` are indices into `examples`.

    A process may get no row of a piece, but every process must run the model equally often. Then
    `rows` is empty, and the Batch is a dummy: the first row of the piece with all labels -100.
    """
    for start in range(0, len(examples), size):
        rows = range(start + rank, min(start + size, len(examples)), ranks)
        batch = collate([examples[row] for row in rows or [start]])
        if not rows:
            batch.labels.fill_(-100)
        yield rows, batch


class BatchOrder:
    """The order in which training examples are used: which of them are in the batch of a step.

    It depends only on the arguments. lengths: source lengths of all examples. Each example occurs
    once in an epoch, and one batch of an epoch may have fewer than `batch_size`.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int):
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.per_epoch = math.ceil(len(lengths) / batch_size)
        # Keeps the batches of the current epoch.
        self.cached_epoch = functools.lru_cache(maxsize=1)(self.of_epoch)

    def at(self, step: int) -> np.ndarray:
        """Return the indices of the examples in the batch of a step. Steps count from 0."""
        epoch, number = divmod(step, self.per_epoch)
        return self.cached_epoch(epoch)[number]

    def of_epoch(self, epoch: int) -> list[np.ndarray]:
        """Return the indices of each batch of an epoch, in the order of the steps.

        Examples are shuffled, and then sorted by length within pools of 50 batches so that a batch
        needs little padding. Then the batches are shuffled.
        """
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths))
        size = self.batch_size
        batches = []
        for pool in np.split(order, range(50 * size, len(order), 50 * size)):
            by_length = pool[np.argsort(self.lengths[pool], kind="stable")]
            batches += np.split(by_length, range(size, len(pool), size))
        return [batches[i] for i in rng.permutation(len(batches))]


def subsample(examples: Sequence[Any], limit: int) -> list[Any]:
    """Return at most `limit` examples, evenly spaced, or all of them if `limit` is 0."""
    if limit == 0 or limit >= len(examples):
        return list(examples)
    return [examples[i * len(examples) // limit] for i in range(limit)]


def batches(
    examples: Sequence[Example],
    batch_size: int,
    device: torch.device,
    description: str,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[tuple[list[int], Batch]]:
    """Yield (indices into `examples`, Batch on the device), the longest sources first.

    In this order batches need little padding, and a batch that exceeds the memory fails early.
    Process `rank` gets at most `batch_size` of every batch_size * ranks examples. If it gets none,
    the list of indices is empty and the Batch is a dummy; see `shares`.
    """
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].source_ids))
    size = batch_size * ranks
    pieces = shares([examples[i] for i in order], size, rank, ranks)
    total = math.ceil(len(order) / size)
    for rows, batch in program.progress(pieces, description, total=total, unit="batch"):
        yield [order[row] for row in rows], batch.to(device)
