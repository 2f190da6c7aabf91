"""Super-NaturalInstructions (arXiv 2204.07705) from its JSON files to batches: SentencePiece, the official
prompt, disjoint sets by seed, a memory-mapped token cache, batches that are a pure function of (seed, step),
T5's span corruption for plain text. Takes github.com/allenai/natural-instructions, or a folder of the same
shape, as it is. Test: `pytest tests/test_data.py`.

    examples = load_examples(DataConfig(data="sni/"), Tokenizer("tiny/"), "train", seed=0)
    chosen = batch_at(examples.source_lengths, 8, seed=0, step=0)
    batch = collate([examples[i] for i in chosen], seed=0, step=0)

Letters: B batch, L source length, Lt target length.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import lzma
import mmap
import multiprocessing
import os
import pickle
import random
import string
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
import torch

from runtime import (
    LARGEST_JSON,
    atomic_write,
    end_with_parent,
    first_of_node_first,
    progress,
    require_least,
    require_model,
    without_duplicates,
)

CACHE_VERSION = 1  # part of every cache key: raise it when a prompt, a set or the layout changes
LARGEST_MODEL = 1e8  # bytes of a SentencePiece model; T5's has 8e5, mT5's 4e6
LONGEST_TEXT = 10**6  # characters of one text in a task file; SNI's longest are far below
POOL_BYTES = 20e6  # of task files; from here on worker processes pay for their start
SETS = ("train", "dev", "seen", "test")
PROMPT_OPTIONS = ("definition", "num_pos", "num_neg", "explanation", "max_source_length")
warn_once = functools.cache(logging.getLogger(__name__).warning)  # four loads of one folder say it once


@dataclass(frozen=True)
class DataConfig:
    """Data: which tasks are read, how a prompt is built, where tokens are cached."""

    data: str = "sni/"  # folder with tasks/*.json and splits/, e.g. the Super-NaturalInstructions repository
    splits: str = "default"  # folder of split lists under splits/
    definition: bool = True  # put the task definition into the prompt
    num_pos: int = 2  # positive examples in the prompt, as far as they fit
    num_neg: int = 0  # negative examples in the prompt, as far as they fit
    explanation: bool = False  # add the explanations of these examples
    max_source_length: int = 1024  # tokens of a source, with EOS
    max_target_length: int = 128  # tokens of a target, with EOS
    train_instances: int = 100  # training instances of each task
    max_tasks: int = 0  # first N tasks of each list, for quick looks; 0 for all
    cache: str = ""  # folder of the token cache; empty for $XDG_CACHE_HOME/orchmoe or ~/.cache/orchmoe
    text: str = ""  # file of plain text lines (.xz accepted) for span corruption, with --method full
    text_ratio: float = 0.5  # share of the batches that comes from --text

    def __post_init__(self) -> None:
        require_least(self, num_pos=0, num_neg=0, max_tasks=0, train_instances=1, max_source_length=2,
                      max_target_length=2)
        if not 0 <= self.text_ratio <= 1:
            raise ValueError(f"--text-ratio {self.text_ratio}: give a share between 0 and 1")
        _plain_name(self.splits, "--splits")


# -------------------------------------------------------------------------------------------------- tokenizer


class Tokenizer:
    """T5's tokenizer: the pieces of `spiece.model`, then 100 sentinels in descending order, sentinel 0 last.
    Text never yields pad, EOS or sentinels, even where it spells their names.

    path: model folder or .model file; ValueError when there is none or its first pieces are not T5's.
    """

    pad_id, eos_id, unk_id = 0, 1, 2
    # the English clean-up that Hugging Face calls clean_up_tokenization_spaces, in its order
    CLEAN_UP = {" .": ".", " ?": "?", " !": "!", " ,": ",", " ' ": "'",
                " n't": "n't", " 'm": "'m", " 's": "'s", " 've": "'ve", " 're": "'re"}

    def __init__(self, path: str | os.PathLike):
        require_model(path)
        self.path = Path(path) / "spiece.model" if Path(path).is_dir() else Path(path)
        if not self.path.is_file():
            raise ValueError(f"{self.path}: no such file; give a T5 folder with spiece.model, or that file")
        if self.path.stat().st_size > LARGEST_MODEL:
            raise ValueError(f"{self.path}: larger than {LARGEST_MODEL:.0f} bytes; download it again")
        model = self.path.read_bytes()
        self.fingerprint = hashlib.sha256(model).hexdigest()
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_proto=model)
            first = [self.sp.id_to_piece(i) for i in range(self.sp.get_piece_size())][:3]  # all are text
        except (RuntimeError, IndexError, UnicodeDecodeError):
            raise ValueError(f"{self.path}: not a SentencePiece model; download it again") from None
        if first != ["<pad>", "</s>", "<unk>"]:
            raise ValueError(f"{self.path}: pieces 0 to 2 are {first}; a T5 model has <pad>, </s>, <unk>")
        self.size = self.sp.get_piece_size()

    def __reduce__(self):  # a worker process loads the model once, not for every task it is handed
        return _load_tokenizer, (self.path,)

    def __len__(self) -> int:
        return self.size + 100

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, EOS last."""
        return [*self.sp.encode(text), self.eos_id]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without special and sentinel ids, spaces cleaned up, stripped."""
        text = self.sp.decode([i for i in map(int, ids) if self.unk_id < i < self.size])
        for spaced, tight in self.CLEAN_UP.items():
            text = text.replace(spaced, tight)
        return text.strip()

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the model as spiece.model into `folder`."""
        with atomic_write(Path(folder) / "spiece.model") as file:
            file.write(self.path.read_bytes())

    def sentinel(self, k: int) -> int:
        """Id of <extra_id_k>, 0 <= k < 100."""
        return self.size + 99 - k


@functools.lru_cache(maxsize=2)
def _load_tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(path)


# ------------------------------------------------------------------------------------------------ tasks, sets


def read_task(path: str | os.PathLike, raw: bytes | None = None) -> dict:
    """One task file: {name, category, definition, positive, negative, instances: [{id, input, output: []}]}.

    Takes what upstream has or had: a str as Definition or output, no ids, no explanations, NaN, a byte order
    mark. ValueError with file, field and remedy for the rest. Text that UTF-8 cannot hold (JSON can spell a
    lone surrogate, \\ud800) is refused, not repaired: a repair would change prompts and references unseen.
    raw: the content, where it has been read already.
    """
    path = Path(path)

    def check(good: bool, field: str, wanted: str) -> None:
        if not good:
            raise ValueError(f"{path}: {field}: expected {wanted}; mend it or take the task off the list")

    def text(value: Any, field: str) -> str:
        check(isinstance(value, str), field, "a string")
        check(len(value) <= LONGEST_TEXT, field, f"at most {LONGEST_TEXT} characters")
        try:
            value.encode()
        except UnicodeEncodeError:
            check(False, field, "text without lone surrogates (\\ud800 to \\udfff)")
        return value

    def rows(field: str) -> list[dict]:
        value = task.get(field, [])
        is_list = isinstance(value, list) and all(isinstance(row, dict) for row in value)
        check(is_list, field, "a list of objects")
        return value

    def examples(field: str) -> list[dict]:
        return [{key: text(row.get(key), f"{field}[{i}].{key}") for key in ("input", "output", "explanation")
                 if key in row or key != "explanation"} for i, row in enumerate(rows(field))]

    def instance(i: int, row: dict) -> dict:
        field, name, output = f"Instances[{i}]", row.get("id"), row.get("output")
        output = [output] if isinstance(output, str) else output
        check(isinstance(output, list) and len(output) > 0, f"{field}.output", "a string or a list of some")
        return {"id": text(f"{path.stem}-{i}" if name is None else str(name), f"{field}.id"),
                "input": text(row.get("input"), f"{field}.input"),
                "output": [text(reference, f"{field}.output") for reference in output]}

    try:
        raw = _read_task_file(path) if raw is None else raw
        task = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON in UTF-8 ({error}); restore the file") from None
    check(isinstance(task, dict), "top level", "an object")
    check(bool(task.get("Instances")), "Instances", "a list of objects, not empty")
    return {"name": path.stem,
            "category": text(_first(task.get("Categories")) or "Unknown", "Categories"),
            "definition": text(_first(task.get("Definition")), "Definition"),
            "positive": examples("Positive Examples"), "negative": examples("Negative Examples"),
            "instances": [instance(i, row) for i, row in enumerate(rows("Instances"))]}


def _read_task_file(path: Path) -> bytes:
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path}: larger than {LARGEST_JSON} bytes; split it into several tasks")
    return path.read_bytes()


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


def read_splits(root: str | os.PathLike, splits: str = "default") -> dict[str, list[str]]:
    """{"train": names, "test": names}: the tasks that splits/<splits>/ lists and tasks/ holds, in the order
    of the lists. A warning says how many are missing; ValueError when all are, or when a list itself is."""
    root, listed = Path(root), {}
    for split in ("train", "test"):
        path = root / "splits" / _plain_name(splits, "--splits") / f"{split}_tasks.txt"
        if not path.is_file():
            raise ValueError(f"{path}: no such file; --data takes a folder with splits/ and tasks/, "
                             "e.g. from git clone https://github.com/allenai/natural-instructions")
        lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
        names = [_plain_name(line.strip(), str(path)) for line in lines if line.strip()]
        listed[split] = list(dict.fromkeys(names))
    found = {split: [name for name in listed[split] if _task_path(root, name).is_file()] for split in listed}
    total, there = (sum(map(len, names.values())) for names in (listed, found))
    if total and not there:
        raise ValueError(f"{root / 'tasks'}: has none of the {total} tasks of splits/{splits}; complete it")
    if there < total:
        warn_once(f"{root / 'tasks'}: {total - there} of the {total} tasks of splits/{splits} are missing")
    return found


def _task_path(root: Path, name: str) -> Path:
    return root / "tasks" / f"{name}.json"


def _plain_name(name: str, field: str) -> str:
    """`name`, if it cannot lead out of its folder."""
    if not name or ".." in name or set(name) & set("/\\\0") or len(name.encode(errors="replace")) > 240:
        raise ValueError(f"{field}: {name!r:.80} is no plain name; give a short one, no '/', '\\' or '..'")
    return name


def split_instances(n: int, seed: int, name: str, train_instances: int) -> tuple[list[int], ...]:
    """Disjoint indices (train, dev, seen) of a training task with n instances, shuffled by (seed, name).

    Dev and seen are the end of the shuffle: 20 each from n = 140 on, n // 5 each below, so `train_instances`
    does not touch them. Train is its beginning, so a smaller training set lies within a larger one. With
    n < 5 all instances train and the other two are empty.
    """
    order = list(range(n))
    random.Random(f"{seed}/{name}").shuffle(order)
    held = 20 if n >= 140 else n // 5
    rest = n - 2 * held
    return order[:min(train_instances, rest)], order[rest:rest + held], order[rest + held:]


# ----------------------------------------------------------------------------------------------------- prompt


def render_prompt(task: dict, instance: dict, tokenizer: Any, *, definition: bool = True, num_pos: int = 2,
                  num_neg: int = 0, explanation: bool = False, max_source_length: int = 1024) -> str:
    """The source of `instance` in the official encoding of Tk-Instruct, to the letter.

    task, instance: dicts as in the JSON files or from `read_task`. tokenizer: anything with encode(str) ->
    ids, EOS last, and decode(ids) -> str. Examples are taken in order while the whole fits, tokenised anew
    each time, since counts of subwords do not add up over parts; a source too long without any is cut.
    """
    head = _dot(f"Definition: {_first(task.get('Definition', task.get('definition'))).strip()}") + "\n\n"
    head = checked = head if definition else ""
    tail = f"Now complete the following example -\n{_dot('Input: ' + instance['input'].strip())}\nOutput: "
    for kind, most in (("Positive", num_pos), ("Negative", num_neg)):
        taken: list[str] = []
        for number, example in enumerate(task.get(f"{kind} Examples", task.get(kind.lower(), []))[:most], 1):
            shown = f" {kind} Example {number} -\n{_demonstration(example, explanation)}\n\n"
            # the official check joins examples with a space, the official prompt with nothing
            if len(tokenizer.encode(checked + " ".join(taken) + shown + tail)) > max_source_length:
                break
            taken.append(shown)
        head, checked = head + "".join(taken), checked + " ".join(taken)
    ids = tokenizer.encode(head + tail)
    return head + tail if len(ids) <= max_source_length else tokenizer.decode(ids[:max_source_length])


def _demonstration(example: dict, explanation: bool) -> str:
    lines = [_dot(f"Input: {example['input'].strip()}"), _dot(f" Output: {example['output'].strip()}")]
    if explanation and "explanation" in example:
        lines.append(_dot(f" Explanation: {example['explanation'].strip()}"))
    return "\n".join(lines)


def _dot(text: str) -> str:
    return text if text[-1] in string.punctuation else text + "."


def _cut(ids: list[int], limit: int) -> list[int]:
    """At most `limit` ids; the last stays EOS."""
    return ids if len(ids) <= limit else [*ids[:limit - 1], ids[-1]]


# ------------------------------------------------------------------------------------------------ cache files
# A file: sha256 of the rest (32 bytes), length of the head (8), head (JSON), arrays, padded to 8 each.

Arrays = dict[str, np.ndarray]


def _write_arrays(path: Path, header: dict, arrays: Arrays) -> None:
    layout = [(name, values.dtype.str, values.size) for name, values in arrays.items()]
    head = json.dumps({"header": header, "layout": layout}).encode()
    head += b" " * (-len(head) % 8)
    parts = [len(head).to_bytes(8, "little"), head]
    for values in arrays.values():
        parts += [values.view(np.uint8).data, bytes(-values.nbytes % 8)]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    with atomic_write(path, each_node=True) as file:
        file.writelines([digest.digest(), *parts])


def _read_arrays(path: Path) -> tuple[dict, Arrays] | None:
    """Header and memory-mapped arrays; None where there is no such file or a byte of it is not as written."""
    try:
        with open(path, "rb") as file:
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError):  # ValueError: an empty file cannot be mapped
        return None
    if hashlib.sha256(view[32:]).digest() != view[:32]:
        return None
    at, arrays = 40 + int.from_bytes(view[32:40], "little"), {}
    try:
        head = json.loads(bytes(view[40:at]))
        for name, dtype, size in head["layout"]:
            arrays[name] = np.frombuffer(view, dtype, size, at)
            at += arrays[name].nbytes + -arrays[name].nbytes % 8
        return head["header"], arrays
    except (ValueError, KeyError, TypeError):  # of somebody else: the sum is right, the content is not ours
        return None


def _cached(folder: str, key: list, is_fresh: Callable[[dict], bool],
            make: Callable[[], tuple[dict, Arrays]]) -> tuple[dict, Arrays]:
    """What `make` returns, from the cache if a whole and fresh file of that key is there, else made and kept.

    A file's name stands for everything but the content of the sources; their digests are in its header, for
    `is_fresh`. So a first start reads each source once, and a changed source replaces its file.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = hashlib.sha256(json.dumps([CACHE_VERSION, *key]).encode()).hexdigest()[:32]
    path = Path(folder or os.path.join(base, "orchmoe")) / f"{name}.tokens"
    with first_of_node_first():
        found = _read_arrays(path)
        if found and is_fresh(found[0]):
            return found
        made = make()
        try:
            _write_arrays(path, *made)
        except OSError as error:  # a folder that may not be written costs the cache alone
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise OSError(error.errno, f"{error.strerror}; or name another by --cache",
                              str(path)) from None
            warn_once(f"{path.parent}: no token cache ({error.strerror}); the next start tokenises again")
            return made
        return _read_arrays(path) or made  # mapped, so that processes share the memory


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------- examples


class Example(NamedTuple):
    id: str
    task: str
    category: str
    source_ids: np.ndarray  # (L,) int32
    target_ids: list[np.ndarray]  # (Lt,) int32, one for each reference
    references: list[str]
    task_index: int  # place among the sorted training tasks; -1 in the test set


class Examples(Sequence):
    """One set, over memory-mapped arrays: len(), [i] -> Example, `tasks` (sorted), `source_lengths`."""

    def __init__(self, header: dict, arrays: Arrays, split: str):
        self.tasks: list[str] = header["tasks"]
        self._categories, self._arrays, self._split = header["categories"], arrays, split
        self._rows = np.flatnonzero(arrays["set"] == SETS.index(split))
        self.source_lengths = np.diff(arrays["source_at"])[self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Example:
        row = self._rows[i]
        task = int(self._arrays["task"][row])
        outputs = range(*self._arrays["outputs_at"][row:row + 2])
        return Example(self._text("id", row), self.tasks[task], self._categories[task],
                       self._part("source", row), [self._part("target", k) for k in outputs],
                       [self._text("reference", k) for k in outputs], -1 if self._split == "test" else task)

    def _part(self, name: str, row: int) -> np.ndarray:
        start, end = self._arrays[f"{name}_at"][row:row + 2]
        return self._arrays[name][start:end]

    def _text(self, name: str, row: int) -> str:
        return self._part(name, row).tobytes().decode()


def load_examples(config: DataConfig, tokenizer: Tokenizer, split: str, *, seed: int = 0) -> Examples:
    """The set "train", "dev" or "seen" (`split_instances` of each training task, in one cache file) or
    "test" (the first 100 instances of each test task, as they stand). ValueError for bad files."""
    if split not in SETS:
        raise ValueError(f"--split {split}: choose one of {', '.join(SETS)}")
    root, kind = Path(config.data), "test" if split == "test" else "train"
    names = sorted(read_splits(root, config.splits)[kind][:config.max_tasks or None])
    if not names:
        raise ValueError(f"{root / 'tasks'}: no task of splits/{config.splits}/{kind}_tasks.txt; complete it")
    paths = [_task_path(root, name) for name in names]
    draw = None if split == "test" else (seed, config.train_instances)

    def is_fresh(header: dict) -> bool:
        with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
            return header["files"] == list(progress(pool.map(_digest, paths), "reading", len(paths), "task"))

    def make() -> tuple[dict, Arrays]:
        encode = functools.partial(_encode_task, tokenizer=tokenizer, config=config, draw=draw)
        files, categories, columns = zip(*_map_tasks(encode, paths), strict=True)
        arrays = {name: np.concatenate([column[name] for column in columns]) for name in columns[0]}
        for name in ("source", "target", "reference", "id", "outputs"):
            arrays[f"{name}_at"] = np.concatenate([[0], np.cumsum(arrays.pop(f"{name}_size"))])
        arrays["task"] = np.repeat(np.arange(len(names)), [len(column["set"]) for column in columns])
        return {"files": files, "tasks": names, "categories": categories}, arrays

    key = ["examples", str(root.resolve()), names, [getattr(config, option) for option in PROMPT_OPTIONS],
           config.max_target_length, draw, tokenizer.fingerprint]
    return Examples(*_cached(config.cache, key, is_fresh, make), split)


def asked(definition: str, text: str, tokenizer: Tokenizer, config: DataConfig) -> Example:
    """An instruction and an input of one's own as an Example: prompted like every other, with no positive
    examples, since there are none, and no references."""
    options = {option: getattr(config, option) for option in PROMPT_OPTIONS}
    source = render_prompt({"definition": definition}, {"input": text}, tokenizer, **options)
    source_ids = np.array(_cut(tokenizer.encode(source), config.max_source_length), np.int32)
    return Example("asked", "asked", "asked", source_ids, [np.array([tokenizer.eos_id], np.int32)], [], -1)


def _encode_task(path: Path, tokenizer: Tokenizer, config: DataConfig,
                 draw: tuple[int, int] | None) -> tuple[str, str, Arrays]:
    """Digest and category of a task file and the columns of the instances kept, from one read of it."""
    raw = _read_task_file(path)
    task = read_task(path, raw)
    n = len(task["instances"])
    sets = split_instances(n, draw[0], path.stem, draw[1]) if draw else ([], [], [], range(min(n, 100)))
    instances = [task["instances"][i] for i in chain(*sets)]
    outputs = [reference for instance in instances for reference in instance["output"]]
    options = {option: getattr(config, option) for option in PROMPT_OPTIONS}
    sources = [render_prompt(task, instance, tokenizer, **options) for instance in instances]
    columns = {"set": np.repeat(np.arange(len(sets), dtype=np.int8), [len(indices) for indices in sets]),
               "outputs_size": np.array([len(instance["output"]) for instance in instances])}
    for name, dtype, rows in (
            ("source", np.int32, [_cut(tokenizer.encode(s), config.max_source_length) for s in sources]),
            ("target", np.int32, [_cut(tokenizer.encode(s), config.max_target_length) for s in outputs]),
            ("reference", np.uint8, [text.encode() for text in outputs]),
            ("id", np.uint8, [instance["id"].encode() for instance in instances])):
        columns[name] = np.fromiter(chain(*rows), dtype)
        columns[f"{name}_size"] = np.array([len(row) for row in rows])
    return hashlib.sha256(raw).hexdigest(), task["category"], columns


def _map_tasks(function: Callable[[Path], Any], paths: list[Path]) -> list:
    """[function(path), ...], in worker processes where the files are large enough and a pool can be had."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    bar = functools.partial(progress, desc="tokenising", total=len(paths), unit="task")
    if cores > 1 and sum(path.stat().st_size for path in paths) > POOL_BYTES:
        try:  # spawned: a fork of a process in which torch has started threads can hang
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(min(cores, 32), spawn, end_with_parent) as pool:
                return list(bar(pool.map(function, paths, chunksize=4)))
        except (BrokenExecutor, OSError, ImportError, pickle.PicklingError) as error:
            warn_once(f"worker processes failed ({type(error).__name__}); tokenising in this one")
    return [function(path) for path in bar(paths)]


# ---------------------------------------------------------------------------------------------------- batches


class Batch(NamedTuple):
    input_ids: torch.Tensor  # (B,L) int64
    attention_mask: torch.Tensor  # (B,L) bool
    labels: torch.Tensor  # (B,Lt) int64, -100 at padding
    task_ids: torch.Tensor  # (B,) int64, -1 where it is no training task
    ids: list[str]

    @property
    def target_tokens(self) -> int:
        return int((self.labels != -100).sum())

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        return Batch(*[field.to(device, non_blocking=True) for field in self[:-1]], self.ids)

    def split(self, parts: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[range, Batch]]:
        """(rows, batch of these rows) for up to `parts` pieces of nearly equal size, each cut to its own
        longest source and target: batches hold rows in order of length, so pieces pad less than the whole.
        Of each piece process `rank` takes every `ranks`-th row; where none is left for it the first one,
        without its target, since all processes must take the same steps: then the rows are empty."""
        size = -(-len(self.ids) // parts)
        for start in range(0, len(self.ids), size):
            rows = range(start, min(start + size, len(self.ids)))[rank::ranks]
            piece = Batch(*[field[start:start + size][rank::ranks] if rows else field[start:start + 1]
                            for field in self])
            if not rows:
                piece = piece._replace(labels=torch.full_like(piece.labels, -100))
            source, target = piece.attention_mask.any(0).sum(), (piece.labels != -100).any(0).sum()
            yield rows, piece._replace(
                input_ids=piece.input_ids[:, :source], attention_mask=piece.attention_mask[:, :source],
                labels=piece.labels[:, :max(1, target)])


def batch_order(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Batches of indices, each example once. Shuffled by (seed, epoch), sorted by length within pools of 50
    batches so that a batch pads little, the batches shuffled again; one is smaller where a rest remains."""
    rng = np.random.default_rng([seed, epoch])
    order, batches = rng.permutation(len(lengths)), []
    for start in range(0, len(order), 50 * batch_size):
        pool = order[start:start + 50 * batch_size]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[i:i + batch_size] for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def batch_at(lengths: np.ndarray, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Indices of the batch of `step` = 0, 1, ..., decided by these arguments alone, so a run can resume."""
    lengths = np.asarray(lengths, dtype=np.int64)
    epoch, place = divmod(step, -(-len(lengths) // batch_size))
    return _epoch_order(lengths.tobytes(), batch_size, seed, epoch)[place]


@functools.lru_cache(maxsize=2)
def _epoch_order(lengths: bytes, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    return batch_order(np.frombuffer(lengths, np.int64), batch_size, seed, epoch)


def collate(examples: Sequence[Example], *, seed: int | None = None, step: int = 0, pad_id: int = 0) -> Batch:
    """Padded batch with one reference an example: the first, or with a seed one drawn from (seed, step, task,
    id), so the same whatever batch, micro-batch or rank the example is in."""
    targets = []
    for example in examples:
        name = f"{seed}/{step}/{example.task}/{example.id}".encode()
        draw = 0 if seed is None else int.from_bytes(hashlib.sha256(name).digest()[:8], "little")
        targets.append(example.target_ids[draw % len(example.target_ids)])
    return _batch([example.source_ids for example in examples], targets,
                  [example.task_index for example in examples], [example.id for example in examples], pad_id)


def _batch(sources: list, targets: list, task_ids: list[int], ids: list[str], pad_id: int) -> Batch:
    input_ids, mask = _pad(sources, pad_id)
    labels, real = _pad(targets, pad_id)
    return Batch(input_ids, mask, labels.masked_fill(~real, -100), torch.tensor(task_ids), ids)


def _pad(rows: list[np.ndarray], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids as one matrix, and the mask of where it holds them."""
    sizes = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(sizes.max())) < sizes[:, None]
    matrix = torch.full(mask.shape, pad_id)
    matrix[mask] = torch.from_numpy(np.concatenate(rows, dtype=np.int64))
    return matrix, mask


# -------------------------------------------------------------------------------------------- span corruption


class TextStream:
    """T5's span corruption (arXiv 1910.10683, section 3.1.4) over the lines of a text file, plain or .xz.

    Lines are packed with nothing between them, as in T5's preprocessing (an EOS inside a target would teach
    it to stop early), and cut into windows of `length` tokens, permuted by (seed, epoch). The file is
    tokenised once, at two bytes a token in memory and in the cache (four beyond 65,536 pieces).
    """

    def __init__(self, path: str | os.PathLike, tokenizer: Tokenizer, *, length: int, seed: int,
                 cache: str = ""):
        path = Path(path)
        _, arrays = _cached(cache, ["text", str(path.resolve()), tokenizer.fingerprint],
                            lambda header: header["file"] == _digest(path),
                            lambda: ({"file": _digest(path)}, {"tokens": _encode_lines(path, tokenizer)}))
        if length < 2 or len(arrays["tokens"]) < length:
            raise ValueError(f"{path}: {len(arrays['tokens'])} tokens, no window of {length}; give more text")
        self._windows = arrays["tokens"][:len(arrays["tokens"]) // length * length].reshape(-1, length)
        self._tokenizer, self._seed = tokenizer, seed

    def batch_at(self, step: int, batch_size: int) -> Batch:
        """The batch of `step`, a pure function of (seed, step, batch_size)."""
        n, pairs, ids = len(self._windows), [], []
        for item in range(step * batch_size, (step + 1) * batch_size):
            window = _permutation(n, self._seed, item // n)[item % n]
            rng = np.random.default_rng([1, self._seed, item])
            pairs.append(corrupt_spans(self._windows[window], self._tokenizer, rng))
            ids.append(f"text-{window}")
        sources, targets = zip(*pairs, strict=True)
        return _batch(sources, targets, [-1] * batch_size, ids, self._tokenizer.pad_id)


@functools.lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([0, seed, epoch]).permutation(n)


def _encode_lines(path: Path, tokenizer: Tokenizer) -> np.ndarray:
    tokens = array("H" if len(tokenizer) <= 1 << 16 else "i")
    try:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as lines:
            for line in progress(lines, "tokenising text", unit="line"):
                tokens.extend(tokenizer.encode(line)[:-1])
    except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path}: not UTF-8 text, plain or .xz ({error}); restore the file") from None
    return np.array(tokens)


def corrupt_spans(tokens: np.ndarray, tokenizer: Tokenizer, rng: np.random.Generator, *,
                  density: float = 0.15, mean_span: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """(source, target) of one window; a share of `density` falls out, in spans of `mean_span` on average.

    As in figure 2 of the paper: the source has a sentinel in place of each span; the target has each span
    behind its sentinel, then one more sentinel; both end with EOS. Kept and lost stretches alternate, kept
    first, every choice of their lengths being equally likely, as in T5's random_spans_noise_mask.
    """
    lost = min(max(round(len(tokens) * density), 1), len(tokens) - 1)
    spans = min(max(round(lost / mean_span), 1), len(tokens) - lost, 99)  # the 100th sentinel ends the target
    sizes = np.stack([_composition(len(tokens) - lost, spans, rng), _composition(lost, spans, rng)], 1)
    stretches = np.split(tokens, np.cumsum(sizes)[:-1])
    marks = [[tokenizer.sentinel(k)] for k in range(spans + 1)]
    end = [tokenizer.eos_id]
    source = chain.from_iterable(zip(stretches[::2], marks[:-1], strict=True))
    target = chain.from_iterable(zip(marks[:-1], stretches[1::2], strict=True))
    return np.concatenate([*source, end]), np.concatenate([*target, marks[-1], end])


def _composition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """`parts` positive numbers with sum `total`, each such list equally likely."""
    cuts = np.sort(rng.choice(np.arange(1, total), parts - 1, replace=False))
    return np.diff(cuts, prepend=0, append=total)
