"""The tokens of the data: from prompts and answers to batches.

tasks.py reads the texts and splits them into sets. Here they become token ids (a Sample for each
row; the cache keeps them), then an Example for each row, then batches. A list is that of the
training or of the test tasks, as in tasks.py. The indices of a batch depend only on the source
lengths, batch size, seed and step.

    examples = load_sets(DataConfig(data="sni/"), tokenizer.load("tiny/"))["train"]
    chosen = BatchOrder(examples.source_lengths, 8, seed=0).at(step=0)
    batch = collate([examples[i] for i in chosen], seed=0, step=0)

Letters: B batch, L source length, Lt target length.

Test: pytest tests/unit/test_data.py
"""

import hashlib
import itertools
import json
import math
import os
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from support import program
from support.program import UserError, require_text
from tasks import (
    FILE_FIELDS,
    NO_TASK,
    DataConfig,
    Prompts,
    RowSplit,
    hash_of,
    read_rows,
    read_splits,
    read_task,
    split_instances,
)
from tokenizer import Tokenizer

SETS_OF_LIST = {"train": ("train", "dev", "seen"), "test": ("test",)}
LEAST_PROMPTS = 40  # of a JSONL file that trains
LEAST_ROWS = {"train": 1, "dev": 5, "seen": 5, "test": 1}  # of a JSONL file
UNKNOWN_CHARACTERS = (
    "characters that the tokenizer does not know, so the model neither reads nor writes them"
)
# The cached tokens depend on this code. After a change of the code they are made again.
CODE_FILES = [Path(__file__).with_name(name) for name in ("data.py", "tasks.py", "tokenizer.py")]
CODE = hashlib.sha256(b"".join(path.read_bytes() for path in CODE_FILES)).hexdigest()


# ------------------------------------------------------------------------------------------ samples


class Sample(NamedTuple):
    """A prompt and its answers as ids."""

    source: list[int]
    targets: list[list[int]]  # one for each answer
    is_cut: bool  # the prompt was longer than allowed; tasks.render_prompt cuts SNI's before
    cut_targets: int  # the number of answers that were longer than allowed
    has_unknown: bool  # the texts have characters that the tokenizer does not know


def _limit(ids, length, tokenizer):
    """Return at most `length` ids. EOS at the end stays there."""
    if len(ids) > length and ids[-1] in tokenizer.eos_ids:
        return ids[: length - 1] + ids[-1:]
    return ids[:length]


def build_samples(
    prompts: Sequence[str],
    answers: Sequence[Sequence[str]],
    tokenizer: Tokenizer,
    config: DataConfig,
) -> Iterator[Sample]:
    """Yield one Sample for each prompt and its answers. tasks.Prompts makes the prompts.

    Every program gets the ids of a prompt here, so that a question has the ids that the same text
    has in training. Prompt and answers are tokenised apart: no id of a prompt depends on an answer.
    In the row of a decoder, SNI's form has one space between them, and the texts of JSONL rows are
    joined as they stand.
    """
    sources = tokenizer.sources(prompts, spaced=config.is_official)
    targets = tokenizer.targets(list(itertools.chain(*answers)), spaced=config.is_official)
    limit = config.max_target_length
    for source, texts in zip(sources, answers, strict=True):
        own_targets = list(itertools.islice(targets, len(texts)))  # `targets` is flat
        cut_source = _limit(source, config.max_source_length, tokenizer)
        short_targets = [_limit(ids, limit, tokenizer) for ids in own_targets]
        yield Sample(
            source=cut_source,
            targets=short_targets,
            is_cut=len(source) > config.max_source_length,
            cut_targets=sum(len(ids) > limit for ids in own_targets),
            has_unknown=any(tokenizer.unknown_id in ids for ids in [cut_source, *short_targets]),
        )


def _lost_its_end(prompt, sample, config):
    """Return whether `render_prompt` or `build_samples` has cut off the end of a prompt."""
    if config.is_official:
        return not prompt.endswith("Output: ")  # every complete prompt ends like this
    return sample.is_cut


# -------------------------------------------------------------------------------------------- cache


def cached(key: list, files: Sequence[Path], make: Callable[[], Any]) -> Any:
    """Return make(), or the result of an earlier call with the same key and unchanged files.

    key: JSON values. The result must depend on nothing but them and the content of the files.
    files: they count as unchanged if their sizes and modification times are unchanged.
    make: its result may consist of tensors, lists, tuples, dicts, strings and numbers.

    Results are kept in $XDG_CACHE_HOME/orchmoe or ~/.cache/orchmoe, one file for each key. Whenever
    one is written, those older than 30 days are removed.
    """
    full_key = json.dumps([CODE, key, [os.path.realpath(file) for file in files]])
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
        for file in path.parent.glob("*.tokens*"):  # and what killed processes left
            with suppress(FileNotFoundError):  # another process renames or removes its own files
                if time.time() - file.stat().st_mtime > 30 * 24 * 3600:
                    file.unlink()
    except OSError as error:
        problem = f"cannot save tokens ({error.strerror}); the next start tokenises again"
        program.warn(f"{path.parent}: {problem}")
    return result


# ----------------------------------------------------------------------------------------- examples


class Example(NamedTuple):
    """One instance as tokens."""

    id: str
    task: str
    category: str
    source_ids: np.ndarray  # (L,) int32
    target_ids: list[np.ndarray]  # (Lt,) int32, one for each reference; for --ask only EOS
    references: list[str]
    task_index: int = -1  # index among the training tasks, -1 for other tasks
    position: int = (
        -1
    )  # index among the instances of its task (unique there, unlike id); -1 for --ask


class Examples(list[Example]):
    """The examples of one set.

    tasks: names of all tasks of the list or file, sorted; empty if any row of the file names no
    task.
    digest: a hash of the contents of the files of these tasks, 16 hex digits.
    rule: facts about how the rows of a JSONL file became samples. A run is refused if they change.
    "forms": the forms of all rows, see `read_rows`, if a decoder reads them as they stand.
    "wrapper": True, if they are in SNI's prompt. "filled": see `RowSplit`, if a set was filled up.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tasks: list[str],
        digest: str,
        rule: dict[str, Any],
    ):
        super().__init__(examples)
        self.tasks = tasks
        self.digest = digest
        self.rule = rule
        self.source_lengths = np.array([len(example.source_ids) for example in examples])


def example_of_question(instruction: str, text: str, prompts: Prompts) -> Example:
    """Return an Example without references for an instruction and an input of the user.

    If the data are JSONL, the input may be empty.
    """
    config, tokenizer = prompts.config, prompts.tokenizer
    if not instruction.strip() or not (text.strip() or config.is_jsonl):
        raise UserError('give both --ask "instruction" and --input "text"')
    with program.checking_settings():
        require_text("--ask", instruction)
        require_text("--input", text)
    prompt = prompts.of_question(instruction, text)
    [sample] = build_samples([prompt], [[]], tokenizer, config)
    if _lost_its_end(prompt, sample, config):
        program.warn(
            f"--max-source-length {config.max_source_length}: the end of the input is cut off"
        )
    if sample.has_unknown:
        program.warn(f"--ask or --input has {UNKNOWN_CHARACTERS}")
    return Example(
        id="question",
        task="question",
        category="question",
        source_ids=np.array(sample.source, np.int32),
        target_ids=[np.array(tokenizer.eos_ids[-1:], np.int32)],  # so that collate works
        references=[],
    )


# ------------------------------------------------------------------------------------------- sets


def _paths_of_lists(config):
    """Return the paths of the files of each list: {"train": [...], "test": [...]}."""
    if config.is_jsonl:
        return {
            "train": [Path(config.data)],
            "test": [Path(config.test)] if config.test else [],
        }
    paths = {}
    for list_name, tasks in read_splits(config.data, config.splits).items():
        chosen = sorted(tasks[: config.max_tasks or None])
        paths[list_name] = [Path(config.data, "tasks", f"{task}.json") for task in chosen]
    return paths


def _tokenise_task(
    task: dict, positions: dict[str, Sequence[int]], prompts: Prompts
) -> dict[str, Any]:
    """Return what the cache keeps of a task, as few plain values.

    positions: {set: positions of its instances in the task}.

    rows: [set, position, id, references] of each row, see Example; as JSON, which is read fast.
    ids: the tokens of all rows in one tensor, for each row the source and then the targets.
    lengths: the number of tokens of each of these sources and targets, in the same order.
    lost: how many sources and targets are cut, and how many rows have unknown characters.
    forms: the different forms of all instances, see `read_rows`.
    """
    instances = task["instances"]
    rows = []
    texts = []
    answers = []
    for set_name, chosen in positions.items():
        for position in chosen:
            instance = instances[position]
            rows.append([set_name, position, instance["id"], instance["output"]])
            texts.append(prompts.of_instance(task, instance))
            answers.append(instance["output"])

    ids = array("i")
    lengths = array("i")
    lost = Counter()
    samples = build_samples(texts, answers, prompts.tokenizer, prompts.config)
    for text, sample in zip(texts, samples, strict=True):
        lost["source"] += _lost_its_end(text, sample, prompts.config)
        lost["target"] += sample.cut_targets
        lost["characters"] += sample.has_unknown
        for piece in (sample.source, *sample.targets):
            ids.extend(piece)
            lengths.append(len(piece))
    return {
        "name": task["name"],
        "category": task["category"],
        "rows": json.dumps(rows),
        "ids": torch.from_numpy(np.array(ids, np.int32)),
        "lengths": list(lengths),
        "lost": dict(lost),
        "forms": list({instance.get("form", "") for instance in instances}),
    }


def _tokenise_task_file(path, list_name, prompts):
    """Return what the cache keeps of a task file of SNI: its task, see `_tokenise_task`."""
    task = read_task(path)
    instances = task["instances"]
    if list_name == "test":
        positions = {"test": range(len(instances))[:100]}
    else:
        contents = [(instance["input"], *instance["output"]) for instance in instances]
        limit = prompts.config.train_limit or None  # a slice up to None has all
        split = split_instances(contents, task["name"], limit)
        positions = dict(zip(("train", "dev", "seen"), split, strict=True))
    return {"tasks": [_tokenise_task(task, positions, prompts)]}


def _tokenise_rows(path, list_name, prompts):
    """Return what the cache keeps of a JSONL file: its tasks, see `_tokenise_task`, and its split.

    num_prompts, filled: facts of the split, see `RowSplit`.
    """
    tasks = read_rows(path)
    split = RowSplit(itertools.chain(*[task["instances"] for task in tasks]))
    tokenised = []
    for task in tasks:
        positions = defaultdict(list)
        for position, instance in enumerate(task["instances"]):
            set_name = "test" if list_name == "test" else split.set_of(instance)
            positions[set_name].append(position)
        positions["train"] = positions["train"][: prompts.config.train_limit or None]
        tokenised.append(_tokenise_task(task, positions, prompts))
    return {"tasks": tokenised, "num_prompts": split.num_prompts, "filled": split.filled}


def _read_tokens(
    config: DataConfig, tokenizer: Tokenizer, list_name: str, paths: list[Path]
) -> list[dict[str, Any]]:
    """Return the tokens of each file of a list, from the cache if possible.

    Each is the result of `_tokenise_task_file` or `_tokenise_rows`, with a hash as its "digest".
    """

    def tokenise_all() -> list[dict]:
        result = []
        for path in program.progress(paths, "tokenising", unit="file"):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            tokenise = _tokenise_rows if config.is_jsonl else _tokenise_task_file
            tokens = tokenise(path, list_name, Prompts(config, tokenizer))
            result.append({"digest": digest, **tokens})
        return result

    options = {name: value for name, value in vars(config).items() if name not in FILE_FIELDS}
    key = [list_name, options, config.is_jsonl, tokenizer.fingerprint, tokenizer.version]
    return cached(key, paths, tokenise_all)


def _examples_of(tasks: list[dict], run_tasks: Sequence[str]) -> dict[str, list[Example]]:
    """Return {set: examples} from what the cache keeps of the tasks of a list."""
    task_index = {task: i for i, task in enumerate(run_tasks)}
    examples = defaultdict(list)
    for task in tasks:
        ends = np.cumsum(task["lengths"])
        pieces = iter(np.split(task["ids"].numpy(), ends[:-1]))
        for set_name, position, instance_id, references in json.loads(task["rows"]):
            example = Example(
                id=instance_id,
                task=task["name"],
                category=task["category"],
                source_ids=next(pieces),
                target_ids=[next(pieces) for _ in references],
                references=references,
                task_index=task_index.get(task["name"], -1),
                position=position,
            )
            examples[set_name].append(example)
    return examples


def _warn_of_lost(lost, config, path):
    """Warn of sources and targets that are cut, and of rows with unknown characters."""
    limits = {"source": config.max_source_length, "target": config.max_target_length}
    for name, limit in limits.items():
        if lost[name]:
            count = f"{lost[name]} {name}s are too long and lose their ends"
            program.warn(f"--max-{name}-length {limit}: {count}")
    if lost["characters"]:
        program.warn(f"{path}: {lost['characters']} rows have {UNKNOWN_CHARACTERS}")


def _untrained(examples, train):
    """Return the examples whose sources do not have the tokens of a row of `train`."""
    trained = {e.source_ids.tobytes() for e in train}
    return [e for e in examples if e.source_ids.tobytes() not in trained]


def _leave_out_trained(examples: dict[str, list[Example]], path: Path) -> None:
    """Leave out rows of "dev" and "seen" whose sources have the tokens of training rows.

    Different texts may have equal tokens, as when they are cut.
    """
    left_out = 0
    for set_name in ("dev", "seen"):
        untrained = _untrained(examples[set_name], examples["train"])
        left_out += len(examples[set_name]) - len(untrained)
        examples[set_name] = untrained
    if left_out:
        program.warn(
            f"{path}: {left_out} rows of dev and seen have the tokens of training rows and are "
            "left out"
        )


def _require_enough_rows(
    examples: dict[str, list[Example]], wanted: Sequence[str], num_prompts: int, path: Path
) -> None:
    """Raise UserError if a JSONL file has too few rows for one of the wanted sets.

    num_prompts: the number of different prompts in the file.
    """
    for set_name in wanted:
        if set_name != "test" and num_prompts < LEAST_PROMPTS:
            raise UserError(
                f"{path}: it has {num_prompts} different prompts; give at least {LEAST_PROMPTS}, "
                "of which 8 are held out as dev and 8 as seen"
            )
        rows = len(examples[set_name])
        if rows < LEAST_ROWS[set_name]:
            raise UserError(
                f"{path}: {rows} of its rows are in the set {set_name!r}, which needs "
                f"{LEAST_ROWS[set_name]}; add rows with other prompts"
            )


def _load_list(
    config: DataConfig,
    tokenizer: Tokenizer,
    list_name: str,
    paths: list[Path],
    run_tasks: Sequence[str] | None,
    wanted: Sequence[str],
) -> dict[str, Examples]:
    """Return all sets of one list, "train" or "test".

    run_tasks: see `load_sets`. wanted: those of its sets that will be used. The others may lack
    rows.
    """
    tokenised_files = _read_tokens(config, tokenizer, list_name, paths)
    tokenised_tasks = []
    digest = hashlib.sha256()
    lost = Counter()
    forms = set()
    for tokenised_file in tokenised_files:
        for task in tokenised_file["tasks"]:
            tokenised_tasks.append(task)
            # The digest of the file, once for each of its tasks: saved runs have it like this.
            digest.update(tokenised_file["digest"].encode())
            lost.update(task["lost"])
            forms.update(task["forms"])

    _warn_of_lost(lost, config, paths[0] if config.is_jsonl else config.data)

    task_names = sorted(task["name"] for task in tokenised_tasks)
    if NO_TASK in task_names:
        task_names = []  # a row of the file names no task
    examples = _examples_of(tokenised_tasks, task_names if run_tasks is None else run_tasks)

    rule = {}
    if config.is_jsonl:
        [path], [tokenised_file] = paths, tokenised_files
        if list_name == "train":
            _leave_out_trained(examples, path)
            if tokenised_file["filled"]:
                rule["filled"] = tokenised_file["filled"]
        _require_enough_rows(examples, wanted, tokenised_file["num_prompts"], path)
        if config.wrapper:
            rule["wrapper"] = True
        elif tokenizer.one_row:
            rule["forms"] = sorted(forms)

    sets = {}
    for set_name in SETS_OF_LIST[list_name]:
        sets[set_name] = Examples(examples[set_name], task_names, digest.hexdigest()[:16], rule)
    return sets


def _warn_of_known(config, test):
    """Warn if rows of "test" belong to training tasks."""
    known = sum(example.task_index >= 0 for example in test)
    if known:
        program.warn(
            f"{config.test or config.data}: {known} of {len(test)} test rows belong to training "
            "tasks, which are not unseen; methods that route by task use their ids"
        )


def _compare_test(config, train, test):
    """Warn if rows of --test have the tokens of training rows. Raise UserError if all are equal."""
    if test.digest == train.digest:
        raise UserError(
            f"--test {config.test}: has the rows of --data; give rows that do not train"
        )
    equal = len(test) - len(_untrained(test, train))
    if equal:
        program.warn(
            f"{config.test}: {equal} of {len(test)} test rows have the tokens of training rows, so "
            "they are not unseen"
        )


def load_sets(
    config: DataConfig,
    tokenizer: Tokenizer,
    wanted: Sequence[str] = (),
    *,
    run_tasks: Sequence[str] | None = None,
) -> dict[str, Examples]:
    """Return {name: set} for the wanted sets.

    wanted: by default "train", "dev", "seen" and, if there are test tasks, "test".
    run_tasks: the training tasks of the run. Example.task_index is an index into them. The default
    is the training tasks that are read here.

    In a folder, each training task gives "train", "dev" and "seen" (see `split_instances`), and
    "test" is the first 100 instances of each test task, as in the official evaluation. With a JSONL
    file, `RowSplit` gives these three sets, and "test" is the whole file --test. There a row of
    "dev" or "seen" whose source has the tokens of a training row is left out, and such rows of
    "test" are only counted. Raise UserError for bad files, or if there is nothing for a wanted set.
    """
    paths = _paths_of_lists(config)
    if not wanted:
        wanted = ["train", "dev", "seen"]
        if paths["test"]:
            wanted.append("test")
    of_train = [name for name in wanted if name != "test"]

    sets = {}
    if of_train:
        if not paths["train"]:
            raise UserError(
                f"{config.data}: no task of train_tasks.txt is here; complete the folder"
            )
        sets |= _load_list(config, tokenizer, "train", paths["train"], run_tasks, of_train)
    elif config.is_jsonl and paths["train"][0].exists():
        # Only --test is wanted. It is compared with the rows that train, if they can be read.
        try:
            sets |= _load_list(config, tokenizer, "train", paths["train"], run_tasks, [])
        except (UserError, OSError) as error:
            program.warn(f"the test rows are not compared with the training rows: {error}")
    if run_tasks is None:
        run_tasks = sets["train"].tasks if sets else []

    if "test" in wanted:
        if not paths["test"]:
            if config.is_jsonl:
                raise UserError(f"{config.data}: give --test OTHER.jsonl, or --split seen")
            raise UserError(
                f"{config.data}: no task of test_tasks.txt is here; complete the folder, or give "
                "--split seen"
            )
        sets |= _load_list(config, tokenizer, "test", paths["test"], run_tasks, ["test"])
        _warn_of_known(config, sets["test"])
        if config.is_jsonl and "train" in sets:
            _compare_test(config, sets["train"], sets["test"])
    return {name: sets[name] for name in wanted}


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

    def split(self, parts: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[range, "Batch"]]:
        """Cut the batch into at most `parts` pieces. Yield the share of one process in each piece.

        All pieces have ceil(B / parts) rows, but the last may have fewer. Process `rank` gets every
        `ranks`-th row of each piece, starting with row number `rank`. Yield (rows, Batch
        of these rows), where `rows` are indices into this batch. A process without a row gets an
        empty `rows` and the first row of the piece with all labels -100, because every process
        must run the model equally often.
        """
        size = math.ceil(len(self.ids) / parts)
        for start in range(0, len(self.ids), size):
            stop = min(start + size, len(self.ids))
            rows = range(start + rank, stop, ranks)
            index = list(rows) or [start]
            mask = self.attention_mask[index]
            labels = self.labels[index]
            if not rows:
                labels = torch.full_like(labels, -100)

            # Drop the columns that are padding in all rows of the piece. The rows of a batch are
            # sorted by source length, so that a piece is often shorter than its batch.
            source_length = mask.any(dim=0).sum()
            target_length = (labels != -100).any(dim=0).sum().clamp(min=1)
            piece = Batch(
                input_ids=self.input_ids[index, :source_length],
                attention_mask=mask[:, :source_length],
                labels=labels[:, :target_length],
                task_ids=self.task_ids[index],
                ids=[self.ids[i] for i in index],
            )
            yield rows, piece


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
        self.epoch = -1  # the epoch of self.epoch_batches; -1: none yet
        self.epoch_batches: list[np.ndarray] = []

    def at(self, step: int) -> np.ndarray:
        """Return the indices of the examples in the batch of a step. Steps count from 0."""
        epoch, number = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch_batches = self.of_epoch(epoch)
            self.epoch = epoch
        return self.epoch_batches[number]

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


def subsample(examples: Sequence[Example], limit: int) -> list[Example]:
    """Return at most `limit` examples, evenly spaced, or all of them if `limit` is 0."""
    count = len(examples)
    if limit:
        count = min(count, limit)
    return [examples[i * len(examples) // count] for i in range(count)]


def collate(examples: Sequence[Example], *, seed: int | None = None, step: int = 0) -> Batch:
    """Return a padded batch with one reference for each example.

    Without a seed this is the first reference. With a seed, a hash of (seed, step, task, id)
    chooses it.
    """
    sources = []
    masks = []
    targets = []
    for example in examples:
        number = 0
        if seed is not None:
            key = f"{seed}/{step}/{example.task}/{example.id}"
            number = hash_of(key) % len(example.target_ids)
        source = torch.from_numpy(example.source_ids).long()
        sources.append(source)
        masks.append(torch.ones_like(source, dtype=torch.bool))
        targets.append(torch.from_numpy(example.target_ids[number]).long())

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
            # One piece, which is the whole batch: of it, this process takes its rows.
            rows, own = next(whole.split(1, rank, ranks))
            yield [indices[row] for row in rows], own.to(device)
            bar.update(len(indices))
