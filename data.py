"""The tokens of the data: from rows of text to batches.

tasks.py reads the texts as Rows. `load_sets` tokenises them, or takes their tokens from the cache,
and returns the Examples of each set. `BatchOrder` chooses the examples of each training step, which
depend only on the source lengths, the batch size, the seed and the step. `collate` makes a Batch of
examples.

    examples = load_sets(DataConfig(data="sni/"), tokenizer.load("tiny/"))["train"]
    chosen = BatchOrder(examples.source_lengths, 8, seed=0).at(step=0)
    batch = collate([examples[i] for i in chosen], seed=0, step=0)

Letters: B batch, L source length, Lt target length.

Test: pytest tests/unit/test_data.py
"""

import functools
import hashlib
import itertools
import json
import math
import os
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from support import program
from support.program import UserError
from tasks import FILE_FIELDS, NO_TASK, DataConfig, Row, find_files, hash_of, jsonl_rows, sni_rows
from tokenizer import Tokenizer

UNKNOWN_CHARACTERS = (
    "characters that the tokenizer does not know, so the model neither reads nor writes them"
)
# A hash of this code is a part of each cache key.
CODE_FILES = [Path(__file__).with_name(name) for name in ("data.py", "tasks.py", "tokenizer.py")]
CODE = hashlib.sha256(b"".join(path.read_bytes() for path in CODE_FILES)).hexdigest()


# ------------------------------------------------------------------------------------------- tokens


class Tokens(NamedTuple):
    """The tokens of many rows, in a few flat values that are fast to save and to load.

    rows: JSON texts. Each is a list of up to 1,000 rows, and a row is a list of its set, task,
        category, id, position and references.
    ids: int32, the tokens of all rows. For each row they are its source, then its targets.
    lengths: int32, the number of tokens of each source and target, in the order of `ids`.
    tasks: the names of the tasks of "train", sorted; empty if one of its rows names none.
    lost: the number of cut sources ("source"), of cut targets ("target"), and of rows with unknown
        characters ("characters").
    """

    rows: list[str]
    ids: Tensor
    lengths: Tensor
    tasks: list[str]
    lost: dict[str, int]


def _limit(ids, length, tokenizer):
    """Return the ids, cut to at most `length`. An EOS at the end is kept."""
    if len(ids) > length and ids[-1] in tokenizer.eos_ids:
        return ids[: length - 1] + ids[-1:]
    return ids[:length]


def tokenise(rows: Iterable[Row], tokenizer: Tokenizer, config: DataConfig) -> Tokens:
    """Return the tokens of the rows.

    All programs tokenise prompts here, so that the same text always gets the same ids. A prompt is
    tokenised without its references. A decoder reads prompt and reference as one text: SNI's form
    puts one space between them, and the texts of JSONL rows are joined unchanged. Raise UserError
    for a prompt without any token, such as a zero-width space.
    """
    spaced = not config.is_jsonl
    saved_rows = []
    tasks = set()
    ids = array("i")
    lengths = array("i")
    lost = Counter(source=0, target=0, characters=0)
    [without_text] = tokenizer.sources([""])  # BOS, or the EOS of T5, or nothing

    rows = iter(rows)
    while chunk := list(itertools.islice(rows, 1000)):  # the tokenizer takes many texts at once
        prompts = []
        references = []
        for row in chunk:
            prompts.append(row.prompt)
            references.extend(row.references)
        sources = tokenizer.sources(prompts, spaced=spaced)
        targets = tokenizer.targets(references, spaced=spaced)  # an iterator over all of them

        rows_of_chunk = []
        for row, source in zip(chunk, sources, strict=True):
            if source == without_text:
                origin = f"{config.data}, row {row.id}"
                if row.set == "test":
                    origin = f"{config.test or config.data}, row {row.id}"
                elif row.set == "question":
                    origin = "the prompt"
                raise UserError(
                    f"{origin}: the tokenizer has no tokens for the prompt {row.prompt!r:.40}; "
                    "change it, or leave it out"
                )
            row_targets = list(itertools.islice(targets, len(row.references)))
            if row.is_cut or len(source) > config.max_source_length:
                lost["source"] += 1
            pieces = [_limit(source, config.max_source_length, tokenizer)]
            for target in row_targets:
                if len(target) > config.max_target_length:
                    lost["target"] += 1
                pieces.append(_limit(target, config.max_target_length, tokenizer))
            if any(tokenizer.unknown_id in piece for piece in pieces):
                lost["characters"] += 1

            for piece in pieces:
                ids.extend(piece)
                lengths.append(len(piece))
            values = [row.set, row.task, row.category, row.id, row.position, row.references]
            rows_of_chunk.append(values)
            if row.set == "train":
                tasks.add(row.task)
        saved_rows.append(json.dumps(rows_of_chunk))

    return Tokens(
        rows=saved_rows,
        ids=torch.from_numpy(np.array(ids, np.int32)),
        lengths=torch.from_numpy(np.array(lengths, np.int32)),
        tasks=[] if NO_TASK in tasks else sorted(tasks),
        lost=dict(lost),
    )


def warn_of_lost(lost: dict[str, int], config: DataConfig, name: str) -> None:
    """Warn of sources and targets that are cut, and of rows with unknown characters."""
    limits = {"source": config.max_source_length, "target": config.max_target_length}
    for kind, limit in limits.items():
        if lost[kind]:
            count = f"{lost[kind]} {kind}s are too long and lose their ends"
            program.warn(f"--max-{kind}-length {limit}: {count}")
    if lost["characters"]:
        program.warn(f"{name}: {lost['characters']} rows have {UNKNOWN_CHARACTERS}")


# -------------------------------------------------------------------------------------------- cache


def cached(key: list, files: Sequence[Path], make: Callable[[], Any]) -> Any:
    """Return make(), or the result of an earlier call with the same key and unchanged files.

    key: JSON values. The result may depend only on them and on the files: their names and content.
    files: a file counts as unchanged if its size and its modification time are unchanged.
    make: its result may consist of tensors, lists, tuples, dicts, strings and numbers.

    Results are kept in $XDG_CACHE_HOME/orchmoe or ~/.cache/orchmoe, one file for each key. Whenever
    one is written, those older than 30 days are removed.
    """
    # The name counts, too: two names may be links to one file, but each names its own task.
    names = [[file.name, os.path.realpath(file)] for file in files]
    full_key = json.dumps([CODE, key, names])
    name = hashlib.sha256(full_key.encode()).hexdigest()[:32]
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = Path(folder, "orchmoe", f"{name}.tokens")
    stamps = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]

    try:
        saved = torch.load(path, weights_only=True)
        if saved["stamps"] == stamps:
            return saved["result"]
    except Exception:  # no cache file yet, or a damaged one: call make()
        pass

    result = make()
    try:
        with program.atomic_write(path) as file:
            torch.save({"stamps": stamps, "result": result}, file)
        for file in path.parent.glob("*.tokens*"):  # also temporary files of killed processes
            with suppress(FileNotFoundError):  # another process renames or removes its own files
                if time.time() - file.stat().st_mtime > 30 * 24 * 3600:
                    file.unlink()
    except OSError as error:
        problem = f"cannot save tokens ({error.strerror}); the next start tokenises again"
        program.warn(f"{path.parent}: {problem}")
    return result


# --------------------------------------------------------------------------------- sets of examples


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


class Examples(list[Example]):
    """The examples of one set.

    tasks: the names of the training tasks, see Tokens.
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


def examples_by_set(tokens: Tokens) -> dict[str, list[Example]]:
    """Return {name of a set: its examples}, without indices of their tasks."""
    examples = {}
    ends = np.cumsum(tokens.lengths.numpy())
    pieces = iter(np.split(tokens.ids.numpy(), ends[:-1]))  # the sources and targets, in order
    for saved_rows in tokens.rows:
        for set_name, task, category, row_id, position, references in json.loads(saved_rows):
            source_ids = next(pieces)
            target_ids = [next(pieces) for _ in references]
            example = Example(
                id=row_id,
                task=sys.intern(task),  # one object for all rows of a task
                category=sys.intern(category),
                source_ids=source_ids,
                target_ids=target_ids,
                references=references,
                position=position,
            )
            examples.setdefault(set_name, []).append(example)
    return examples


def example_of(row: Row, tokenizer: Tokenizer, config: DataConfig) -> Example:
    """Return the example of one row, such as a question. Warn if a part of it is lost."""
    tokens = tokenise([row], tokenizer, config)
    if tokens.lost["source"]:
        program.warn(f"a prompt has more than {config.max_source_length} tokens and loses its end")
    if tokens.lost["characters"]:
        program.warn(f"a prompt has {UNKNOWN_CHARACTERS}")
    return examples_by_set(tokens)[row.set][0]


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


def _sources(examples):
    """Return the source ids of the examples, as a set of bytes."""
    return {example.source_ids.tobytes() for example in examples}


def _unused(examples, used):
    """Return the examples whose sources are not in `used`."""
    return [example for example in examples if example.source_ids.tobytes() not in used]


def _remove_used_rows(examples: dict[str, list[Example]], config: DataConfig) -> None:
    """Remove rows of dev that train has, and rows of seen that train or dev has.

    Rows are equal if their source tokens are, for example after cutting. Rows of "test" are only
    counted.
    """
    train = _sources(examples.get("train", []))
    used = train | _sources(examples.get("dev", []))
    for name, earlier, kinds in (("dev", train, "training"), ("seen", used, "training or dev")):
        rows = examples.get(name, [])
        unused = _unused(rows, earlier)
        if len(unused) < len(rows):
            examples[name] = unused
            program.warn(
                f"{config.data}: {len(rows) - len(unused)} of {len(rows)} {name} rows have the "
                f"tokens of {kinds} rows and are left out"
            )

    test = examples.get("test", [])
    equal = len(test) - len(_unused(test, used))
    if equal > 0:
        program.warn(
            f"{config.test}: {equal} of {len(test)} test rows have the tokens of "
            "training or dev rows, so they are not unseen"
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
    some rows of a JSONL file. A set may be missing or empty, so take it with `require_set`. Raise
    UserError for bad files.

    only_test: read no training tasks of a folder, because tokenising all of them takes minutes.
    """
    files = find_files(config)
    if only_test and not config.is_jsonl:
        files["train"] = []

    def read_and_tokenise() -> dict[str, Any]:
        if config.is_jsonl:
            rows, facts = jsonl_rows(files, config.train_limit)
        else:
            rows = sni_rows(files, tokenizer, config)
            facts = {}
        tokens = tokenise(rows, tokenizer, config)
        digests = {}
        for list_name, paths in files.items():
            # In a folder a file is named after its task, and the split depends on this name.
            digests[list_name] = digest_of(paths, with_names=not config.is_jsonl)
        return {"tokens": tokens._asdict(), "facts": facts, "digests": digests}

    # The tokens depend on the files and on these values. `counts` says how many of the files are
    # training files: a JSONL file that is --test in one run may be --data in another one.
    options = {name: value for name, value in vars(config).items() if name not in FILE_FIELDS}
    counts = [len(files["train"]), len(files["test"])]
    key = [counts, options, config.is_jsonl, tokenizer.fingerprint, tokenizer.version]
    saved = cached(key, [*files["train"], *files["test"]], read_and_tokenise)

    tokens = Tokens(**saved["tokens"])
    digests = saved["digests"]
    origin = f"{config.data} and {config.test}" if config.test else config.data
    warn_of_lost(tokens.lost, config, origin)
    if config.is_jsonl and digests["test"] == digests["train"]:
        raise UserError(f"--test {config.test}: is a copy of --data; give rows that do not train")

    examples = examples_by_set(tokens)
    if config.is_jsonl:
        _remove_used_rows(examples, config)
    sets = {}
    for set_name, of_set in examples.items():
        list_name = "test" if set_name == "test" else "train"
        indexed = with_task_index(of_set, tokens.tasks)
        sets[set_name] = Examples(indexed, tokens.tasks, digests[list_name], saved["facts"])
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
        remedy = "add task files of train_tasks.txt, with 5 or more different instances each"
    raise UserError(f"{config.data}: {found} rows in the set {name}, {least} needed; {remedy}")


# ------------------------------------------------------------------------------------------ batches


class Batch(NamedTuple):
    input_ids: Tensor  # (B,L) int64
    attention_mask: Tensor  # (B,L) bool
    labels: Tensor  # (B,Lt) int64, -100 at padding
    task_ids: Tensor  # (B,) int64, task_index of each Example
    ids: list[str]  # id of each Example

    @property
    def target_tokens(self) -> int:
        """Return the number of target tokens, padding excluded."""
        return int((self.labels != -100).sum())

    def to(self, device: torch.device) -> "Batch":
        """Return the same batch with its tensors on `device`."""
        moved = {
            name: field.to(device, non_blocking=True)
            for name, field in self._asdict().items()
            if name != "ids"
        }
        return self._replace(**moved)

    def split(self, parts: int, rank: int, ranks: int) -> Iterator[tuple[range, "Batch"]]:
        """Cut the batch into at most `parts` pieces. Yield the share of one process in each piece.

        Each piece has ceil(B / parts) rows; the last may have fewer. Process `rank` gets every
        `ranks`-th row of each piece, starting with row number `rank`. Yield (rows, Batch of these
        rows), where `rows` are indices into this batch.

        A process may get no row of a piece, but every process must run the model equally often.
        Then `rows` is empty, and the Batch is a dummy: the first row of the piece with all labels
        -100.
        """
        size = math.ceil(len(self.ids) / parts)
        for start in range(0, len(self.ids), size):
            stop = min(start + size, len(self.ids))
            rows = range(start + rank, stop, ranks)
            indices = list(rows)
            if not rows:
                indices = [start]
            mask = self.attention_mask[indices]
            labels = self.labels[indices]
            if not rows:
                labels = torch.full_like(labels, -100)

            # Drop the columns that are padding in all rows of the share. The rows of a batch are
            # sorted by source length, so that a share is often narrower than its batch.
            source_length = mask.any(dim=0).sum()
            target_length = (labels != -100).any(dim=0).sum().clamp(min=1)
            share = Batch(
                input_ids=self.input_ids[indices, :source_length],
                attention_mask=mask[:, :source_length],
                labels=labels[:, :target_length],
                task_ids=self.task_ids[indices],
                ids=[self.ids[i] for i in indices],
            )
            yield rows, share


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
        # Keeps the batches of one epoch.
        self.latest_epoch = functools.lru_cache(maxsize=1)(self.of_epoch)

    def at(self, step: int) -> np.ndarray:
        """Return the indices of the examples in the batch of a step. Steps count from 0."""
        epoch, number = divmod(step, self.per_epoch)
        return self.latest_epoch(epoch)[number]

    def of_epoch(self, epoch: int) -> list[np.ndarray]:
        """Return the indices of each batch of an epoch, in the order of the steps.

        Examples are shuffled, and then sorted by length within pools of 50 batches so that a batch
        needs little padding. Then the batches are shuffled.
        """
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths))
        batches = []
        for start in range(0, len(order), 50 * self.batch_size):
            pool = order[start : start + 50 * self.batch_size]
            pool = pool[np.argsort(self.lengths[pool], kind="stable")]
            for first in range(0, len(pool), self.batch_size):
                batches.append(pool[first : first + self.batch_size])
        return [batches[i] for i in rng.permutation(len(batches))]


def subsample(examples: Sequence[Any], limit: int) -> list[Any]:
    """Return at most `limit` examples, evenly spaced, or all of them if `limit` is 0."""
    if limit == 0 or limit >= len(examples):
        return list(examples)
    return [examples[i * len(examples) // limit] for i in range(limit)]


def collate(examples: Sequence[Example], *, seed: int | None = None, step: int = 0) -> Batch:
    """Return a padded batch with one reference for each example.

    Without a seed it is the first reference. With a seed, a hash of (seed, step, task, id) chooses
    the reference.
    """
    sources = []
    masks = []
    targets = []
    for example in examples:
        reference_index = 0
        if seed is not None:
            key = f"{seed}/{step}/{example.task}/{example.id}"
            reference_index = hash_of(key) % len(example.target_ids)
        source = torch.from_numpy(example.source_ids).long()
        sources.append(source)
        masks.append(torch.ones_like(source, dtype=torch.bool))
        targets.append(torch.from_numpy(example.target_ids[reference_index]).long())

    return Batch(
        input_ids=pad_sequence(sources, batch_first=True),
        attention_mask=pad_sequence(masks, batch_first=True, padding_value=False),
        labels=pad_sequence(targets, batch_first=True, padding_value=-100),
        task_ids=torch.tensor([example.task_index for example in examples]),
        ids=[example.id for example in examples],
    )


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
    the list of indices is empty and the Batch is a dummy; see Batch.split.
    """
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].source_ids))
    with program.progress(None, description, total=len(order), unit="ex") as bar:
        for start in range(0, len(order), batch_size * ranks):
            indices = order[start : start + batch_size * ranks]
            whole = collate([examples[i] for i in indices])
            # With one part, the only piece is the whole batch. Take the share of this process.
            rows, own = next(whole.split(1, rank, ranks))
            yield [indices[row] for row in rows], own.to(device)
            bar.update(len(indices))
