"""Super-NaturalInstructions (arXiv 2204.07705, github.com/allenai/natural-instructions) from JSON files to
batches: the official prompt, disjoint sets by task name, a memory-mapped token cache, batches that are a pure
function of (seed, step). Test: pytest tests/test_data.py

    examples = load_sets(DataConfig(data="sni/"), tokenizer.load("tiny/"))["train"]
    chosen = batch_at(examples.source_lengths, 8, seed=0, step=0)
    batch = collate([examples[i] for i in chosen], seed=0, step=0)

Letters: B batch, L source length, Lt target length.
"""

import functools
import hashlib
import json
import os
import random
import string
import zipfile
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import runtime
from tokenizer import Tokenizer

CACHE_VERSION = 5  # part of every cache key: raise it when a prompt, a set or the layout changes
LONGEST_TEXT = 10**6  # characters of one text in a task file; SNI's longest are far below
SETS = ("train", "dev", "seen", "test")
WHERE = {"data", "splits", "max_tasks"}  # options that no token depends on


@dataclass(frozen=True)
class DataConfig:
    """Data: which tasks are read, how a prompt is built."""

    data: str = str(runtime.ROOT / "sni")  # folder with tasks/ and splits/ (default: this repository's sni/)
    splits: str = "default"  # folder of split lists under splits/
    definition: bool = True  # put the task definition into the prompt
    num_pos: int = 2  # positive examples in the prompt, as far as they fit
    num_neg: int = 0  # negative examples in the prompt, as far as they fit
    explanation: bool = False  # add the explanations of these examples
    max_source_length: int = 1024  # tokens of a source, with EOS
    max_target_length: int = 128  # tokens of a target, with EOS
    train_instances: int = 100  # training instances of each task
    max_tasks: int = 0  # first N tasks of each list, for quick looks; 0 for all

    def __post_init__(self) -> None:
        runtime.require_least(self, train_instances=1, max_source_length=2, max_target_length=2)


# ------------------------------------------------------------------------------------------------ tasks, sets


def read_task(path: str | os.PathLike) -> dict:
    """One task file: {name, category, definition, positive, negative, instances: [{id, input, output: []}]}.

    Takes what upstream has or had: a str as Definition or output, no ids, no explanations, NaN, a byte order
    mark. ValueError with file, field and remedy for the rest. Text that UTF-8 cannot hold (JSON can spell a
    lone surrogate, \\ud800) is refused, not repaired: a repair would change prompts and references unseen."""
    path = Path(path)
    task = runtime.read_json(path)
    try:
        read = {"name": path.stem, "instances": [],
                "category": text_of(_first(task.get("Categories")) or "Unknown", "Categories"),
                "definition": text_of(_first(task.get("Definition")), "Definition")}
        for kind in ("Positive", "Negative"):
            read[kind.lower()] = [
                {key: text_of(row.get(key), f"{field}.{key}") for key in ("input", "output", "explanation")
                 if key in row or key != "explanation"} for field, row in _rows(task, f"{kind} Examples")]
        for i, (field, row) in enumerate(_rows(task, "Instances")):
            own_id, output = row.get("id"), row.get("output")
            output = output if isinstance(output, list) else [output]
            _require(len(output) > 0, f"{field}.output", "a string or a list of some")
            read["instances"].append({
                "id": text_of(f"{path.stem}-{i}" if own_id is None else str(own_id), f"{field}.id"),
                "input": text_of(row.get("input"), f"{field}.input"),
                "output": [text_of(reference, f"{field}.output") for reference in output]})
        _require(len(read["instances"]) > 0, "Instances", "a list of objects, not empty")
        return read
    except ValueError as error:
        raise ValueError(f"{path}: {error}; mend it or take the task off the list") from None


def _require(good: bool, field: str, wanted: str) -> None:
    if not good:
        raise ValueError(f"{field}: expected {wanted}")


def text_of(value: Any, field: str) -> str:
    _require(isinstance(value, str), field, "a string")
    _require(len(value) <= LONGEST_TEXT, field, f"at most {LONGEST_TEXT} characters")
    _require(value.encode(errors="replace").decode() == value, field, "text without lone surrogates")
    return value


def _rows(task: dict, field: str) -> list[tuple[str, dict]]:
    rows = task.get(field, [])
    are_objects = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    _require(are_objects, field, "a list of objects")
    return [(f"{field}[{i}]", row) for i, row in enumerate(rows)]


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


def read_splits(root: str | os.PathLike, splits: str = "default") -> dict[str, list[str]]:
    """{"train": names, "test": names}: the tasks that splits/<splits>/ lists and tasks/ holds, in the lists'
    order; a warning says how many are missing. ValueError when all are, or a list, or a task is on both."""
    root, listed, found = Path(root), {}, {}
    for split in ("train", "test"):
        path = root / "splits" / _plain_name(splits, "--splits") / f"{split}_tasks.txt"
        if not path.is_file():
            raise ValueError(f"{path}: no such file; --data takes a folder with splits/ and tasks/, "
                             "e.g. from git clone https://github.com/allenai/natural-instructions")
        lines = map(str.strip, path.read_text(encoding="utf-8-sig", errors="replace").split("\n"))
        listed[split] = list(dict.fromkeys(_plain_name(line, str(path)) for line in lines if line))
        found[split] = [name for name in listed[split] if (root / "tasks" / f"{name}.json").is_file()]
    if both := set(listed["train"]) & set(listed["test"]):
        raise ValueError(f"{path}: {min(both)} is in train_tasks.txt too; take it off one of the two")
    total, there = (sum(map(len, names.values())) for names in (listed, found))
    if total and not there:
        raise ValueError(f"{root / 'tasks'}: has none of the {total} tasks of splits/{splits}; complete it")
    if there < total:
        runtime.warn(f"{root / 'tasks'}: {total - there} of the {total} tasks of splits/{splits} are missing")
    return found


def _plain_name(name: str, field: str) -> str:
    """`name`, if it cannot lead out of its folder."""
    if not name or ".." in name or set(name) & set("/\\\0") or len(name.encode(errors="replace")) > 240:
        raise ValueError(f"{field}: {name!r:.80} is no plain name; give a short one, no '/', '\\' or '..'")
    return name


def split_instances(contents: Sequence[Hashable], name: str, train_instances: int) -> tuple[list[int], ...]:
    """Disjoint indices (train, dev, seen) of the instances of a training task, shuffled by its name alone.

    Of n different contents dev and seen are the last of the shuffle: 20 each from n = 140 on, else n // 5
    each, whatever `train_instances` is; no copy of theirs trains. Train is the first of the shuffle, so a
    smaller training set lies within a larger one."""
    order = list(range(len(contents)))
    random.Random(f"0/{name}").shuffle(order)
    first = {contents[i]: i for i in reversed(order)}  # of equal contents, in the order of the shuffle
    unique = [i for i in order if first[contents[i]] == i]
    held = 20 if len(unique) >= 140 else len(unique) // 5
    rest = len(unique) - 2 * held
    training = {contents[i] for i in unique[:rest]}
    train = [i for i in order if contents[i] in training]
    return train[:train_instances], unique[rest:rest + held], unique[rest + held:]


# ----------------------------------------------------------------------------------------------------- prompt


def render_prompt(task: dict, instance: dict, tokenizer: Any, *, definition: bool = True, num_pos: int = 2,
                  num_neg: int = 0, explanation: bool = False, max_source_length: int = 1024) -> str:
    """The source of `instance` in the official encoding of Tk-Instruct, to the letter.

    task, instance: dicts as in the JSON files or from `read_task`. tokenizer: anything with encode(str) ->
    ids, EOS last, and decode(ids) -> str. Examples are taken in order while the whole fits, tokenised anew
    each time, since counts of subwords do not add up over parts; a source too long without any is cut."""
    head = _dot(f"Definition: {_first(task.get('Definition', task.get('definition'))).strip()}") + "\n\n"
    head = checked = head if definition else ""
    tail = f"Now complete the following example -\n{_dot('Input: ' + instance['input'].strip())}\nOutput: "
    for kind, most in (("Positive", num_pos), ("Negative", num_neg)):
        taken: list[str] = []
        for number, example in enumerate(task.get(f"{kind} Examples", task.get(kind.lower(), []))[:most], 1):
            fields = ("Input", " Output", *[" Explanation"] * (explanation and "explanation" in example))
            shown = "\n".join(_dot(f"{name}: {example[name.strip().lower()].strip()}") for name in fields)
            shown = f" {kind} Example {number} -\n{shown}\n\n"
            # the official check joins examples with a space, the official prompt with nothing
            if len(tokenizer.encode(checked + " ".join(taken) + shown + tail)) > max_source_length:
                break
            taken.append(shown)
        head, checked = head + "".join(taken), checked + " ".join(taken)
    ids = tokenizer.encode(head + tail)
    return head + tail if len(ids) <= max_source_length else tokenizer.decode(ids[:max_source_length])


def _dot(text: str) -> str:
    return text if text[-1] in string.punctuation else text + "."


def _prompt(task: dict, instance: dict, tokenizer: Tokenizer, config: DataConfig) -> str:
    options = {name: getattr(config, name) for name in render_prompt.__kwdefaults__}
    return render_prompt(task, instance, tokenizer, **options)


def _cut(ids: list[int], limit: int) -> np.ndarray:
    """At most `limit` ids; the last stays EOS."""
    return np.array(ids if len(ids) <= limit else [*ids[:limit - 1], ids[-1]], np.int32)


# ------------------------------------------------------------------------------------------ examples, tokens


def cached(key: list, files: Sequence[Path], make: Callable[[], dict]) -> dict:
    """What `make` returns from `files` (tensors, lists, numbers, strings), made once and then mapped from
    $XDG_CACHE_HOME/orchmoe or ~/.cache/orchmoe. `key`: JSON values, what it depends on beside the files;
    these count as unchanged while size and time of change are the same, else the cache file, whose name the
    key decides, is replaced."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    key = [CACHE_VERSION, *key, list(map(str, files))]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    path = Path(base, "orchmoe", f"{name}.tokens")
    key.append([[path.stat().st_size, path.stat().st_mtime_ns] for path in files])
    if found := _read_cache(path, key):
        return found
    made = {"key": key, **make()}  # processes that start together each make it, the last stays
    try:
        with runtime.atomic_write(path) as file:
            torch.save(made, file)
    except OSError as error:  # a folder that is full, or may not be written, costs the cache alone
        runtime.warn(f"{path.parent}: no token cache ({error.strerror}); the next start tokenises again")
    return _read_cache(path, key) or made  # mapped, so that processes share the memory


def _read_cache(path: Path, key: list) -> dict | None:
    """The content of a whole cache file of this key, its tensors mapped; None for any other."""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch writes checksums, but does not look at them
        found = torch.load(path, mmap=True, weights_only=True)
        return None if damaged or found["key"] != key else found
    except Exception:  # of many types, whatever a damaged file or somebody else's provokes
        return None


class Example(NamedTuple):
    id: str
    task: str
    category: str
    source_ids: np.ndarray  # (L,) int32
    target_ids: list[np.ndarray]  # (Lt,) int32, one for each reference
    references: list[str]
    task_index: int = -1  # place among the sorted training tasks; -1 where it is none of them
    place: int = -1  # among the Instances of its task file, where ids may repeat


class Examples(list[Example]):
    """One set. tasks: their names, sorted; digest: 16 hex digits of the contents of their files."""

    def __init__(self, examples: Sequence[Example], tasks: list[str], digest: str):
        super().__init__(examples)
        self.tasks, self.digest = tasks, digest
        self.source_lengths = np.array([len(example.source_ids) for example in examples])


def load_sets(config: DataConfig, tokenizer: Tokenizer, names: Sequence[str] = (), *,
              training: Sequence[str] | None = None) -> dict[str, Examples]:
    """{name: set} of the names: "train", "dev", "seen" (`split_instances` of each training task) and "test"
    (the first 100 instances of each test task, as they stand); without names all, and "test" where there are
    test tasks. training: the tasks among which `task_index` is a place, those of a run; without, those of
    `config`. ValueError for bad files."""
    listed = {kind: sorted(tasks[:config.max_tasks or None])
              for kind, tasks in read_splits(config.data, config.splits).items()}
    index = {task: i for i, task in enumerate(listed["train"] if training is None else training)}
    sets, names = {}, names or [name for name in SETS if listed["test"] or name != "test"]
    for kind in {"test" if name == "test" else "train": None for name in names}:
        sets |= _load_tasks(config, tokenizer, kind, listed[kind], index)
    return {name: sets[name] for name in names}


def _load_tasks(config: DataConfig, tokenizer: Tokenizer, kind: str, tasks: list[str],
                index: dict[str, int]) -> dict[str, Examples]:
    """The sets of the training or of the test tasks, their tokens from the cache where it has them."""
    folder = Path(config.data) / "tasks"
    if not tasks:
        raise ValueError(f"{folder}: no task of splits/{config.splits}/{kind}_tasks.txt; complete it")
    paths = [folder.resolve() / f"{task}.json" for task in tasks]
    options = {name: value for name, value in vars(config).items() if name not in WHERE}
    made = cached([kind, options, tokenizer.fingerprint], paths, lambda: {"tasks": [
        _encode_task(path, kind, tokenizer, config)
        for path in runtime.progress(paths, "tokenising", unit="task")]})["tasks"]
    if copies := sum(task["copies"] for task in made):
        runtime.warn(f"{folder}: {copies} instances repeat another of their task; none is on two sides of "
                     "train, dev and seen")
    if cut := sum(task["cut"] for task in made):
        runtime.warn(f"--max-source-length {config.max_source_length}: the ends of {cut} sources are cut off")
    sets: dict[str, list[Example]] = {name: [] for name in SETS if (name == "test") == (kind == "test")}
    for name, task in zip(tasks, made, strict=True):
        rows = json.loads(task["rows"])
        ends = np.cumsum([size for *_, sizes in rows for size in sizes])
        pieces = iter(np.split(task["ids"].numpy(), ends[:-1]))
        for split, place, own_id, references, sizes in rows:
            source, *targets = [next(pieces) for _ in sizes]
            sets[split].append(Example(own_id, name, task["category"], source, targets, references,
                                       index.get(name, -1), place))
    digest = hashlib.sha256("".join(task["digest"] for task in made).encode()).hexdigest()[:16]
    return {name: Examples(examples, tasks, digest) for name, examples in sets.items()}


def _encode_task(path: Path, kind: str, tokenizer: Tokenizer, config: DataConfig) -> dict[str, Any]:
    """What is kept of a task file; `ids` holds each row's source and, behind it, its targets."""
    task, rows, ids, cut = read_task(path), [], [], 0
    contents = [(instance["input"], *instance["output"]) for instance in task["instances"]]
    sets = {"test": range(min(len(contents), 100))}
    if kind == "train":
        sets = dict(zip(SETS, split_instances(contents, path.stem, config.train_instances), strict=False))
    for split, place in [(split, place) for split, places in sets.items() for place in places]:
        instance = task["instances"][place]
        prompt = _prompt(task, instance, tokenizer, config)
        cut += not prompt.endswith("Output: ")  # as every whole prompt does
        pieces = [_cut(tokenizer.source(prompt), config.max_source_length)]
        pieces += [_cut(tokenizer.target(text), config.max_target_length) for text in instance["output"]]
        rows.append((split, place, instance["id"], instance["output"], list(map(len, pieces))))
        ids += pieces
    copies = len(contents) - len(set(contents)) if kind == "train" else 0
    return {"digest": hashlib.sha256(path.read_bytes()).hexdigest(), "category": task["category"],
            "copies": copies, "cut": cut, "rows": json.dumps(rows),
            "ids": torch.from_numpy(np.concatenate(ids))}


def asked(definition: str, text: str, tokenizer: Tokenizer, config: DataConfig) -> Example:
    """An instruction and an input of one's own as an Example without positive examples and references."""
    definition, text = text_of(definition, "--ask"), text_of(text, "--input")
    prompt = _prompt({"definition": definition}, {"input": text}, tokenizer, config)
    if not prompt.endswith("Output: "):
        runtime.warn(f"--max-source-length {config.max_source_length}: the end of the input is cut off")
    source_ids = _cut(tokenizer.source(prompt), config.max_source_length)
    return Example("asked", "asked", "asked", source_ids, [_cut(tokenizer.target(""), 1)], [])


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

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device`."""
        return Batch(*[field.to(device, non_blocking=True) for field in self[:-1]], self.ids)

    def split(self, parts: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[range, "Batch"]]:
        """(rows, batch of these rows) for up to `parts` pieces of nearly equal size. Of each piece process
        `rank` takes every `ranks`-th row; where none is left for it, `rows` is empty and the batch is the
        first row without its target, since all processes must take the same steps."""
        size = -(-len(self.ids) // parts)
        for start in range(0, len(self.ids), size):
            rows = range(len(self.ids))[start:start + size][rank::ranks]
            where = slice(start, start + 1) if not rows else slice(rows.start, rows.stop, ranks)
            ids, mask, labels, *rest = [field[where] for field in self]
            labels = labels if rows else torch.full_like(labels, -100)
            # Batches hold rows in order of length: cut to its own longest, a piece pads less than the whole.
            source, target = mask.any(0).sum(), (labels != -100).any(0).sum()
            yield rows, Batch(ids[:, :source], mask[:, :source], labels[:, :max(1, target)], *rest)


def batch_at(lengths: np.ndarray, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Indices of the batch of `step` = 0, 1, .. by these arguments alone; an epoch has each example once."""
    epoch, place = divmod(step, -(-len(lengths) // batch_size))
    return _epoch(np.asarray(lengths, np.int64).tobytes(), batch_size, seed, epoch)[place]


@functools.lru_cache(maxsize=2)
def _epoch(lengths: bytes, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Shuffled by (seed, epoch), sorted by length within pools of 50 batches so that a batch pads little, the
    batches shuffled again."""
    lengths, rng, batches = np.frombuffer(lengths, np.int64), np.random.default_rng([seed, epoch]), []
    order = rng.permutation(len(lengths))
    for start in range(0, len(order), 50 * batch_size):
        pool = order[start:start + 50 * batch_size]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[i:i + batch_size] for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def collate(examples: Sequence[Example], *, seed: int | None = None, step: int = 0, pad_id: int = 0) -> Batch:
    """Padded batch with one reference an example: the first, or one drawn by (seed, step, task, id)."""
    sources, targets = [torch.from_numpy(example.source_ids).long() for example in examples], []
    for example in examples:
        name = f"{seed}/{step}/{example.task}/{example.id}".encode()
        draw = 0 if seed is None else int.from_bytes(hashlib.sha256(name).digest()[:8], "little")
        targets.append(torch.from_numpy(example.target_ids[draw % len(example.target_ids)]).long())
    return Batch(pad_sequence(sources, batch_first=True, padding_value=pad_id),
                 pad_sequence([torch.ones_like(ids, dtype=torch.bool) for ids in sources], batch_first=True),
                 pad_sequence(targets, batch_first=True, padding_value=-100),
                 torch.tensor([example.task_index for example in examples]), [e.id for e in examples])


def subsample(examples: Sequence[Example], limit: int) -> list[Example]:
    """At most `limit` of the examples, evenly spaced; all of them for 0."""
    count = min(limit, len(examples)) if limit else len(examples)
    return [examples[i * len(examples) // count] for i in range(count)]


def batches(examples: Sequence[Example], size: int, device: torch.device, desc: str, rank: int = 0,
            ranks: int = 1) -> Iterator[tuple[list[int], Batch]]:
    """(positions, batch on the device), longest sources first: little padding, and a lack of memory shows at
    once. Of several processes each takes its part of every size * ranks examples, see Batch.split."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].source_ids))
    with runtime.progress(None, desc, total=len(order), unit="ex") as bar:
        for start in range(0, len(order), size * ranks):
            rows = order[start:start + size * ranks]
            mine, part = next(collate([examples[i] for i in rows]).split(1, rank, ranks))
            yield [rows[i] for i in mine], part.to(device)
            bar.update(len(rows))
