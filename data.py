"""Super-NaturalInstructions: from task files to batches.

Data: arXiv 2204.07705, github.com/allenai/natural-instructions. Prompts equal those of the
official code. Each training task is shuffled with its name as the seed and split into three sets:
train, dev and seen, where "seen" holds other instances of the tasks that are trained on. Tokens are
cached. The indices of a batch depend only on the source lengths, batch size, seed and step.

Words: a source is a prompt, a target is a reference (one right answer). A list is train_tasks.txt
or test_tasks.txt; it names tasks. A set is train, dev, seen or test; it holds examples.

    examples = load_sets(DataConfig(data="sni/"), tokenizer.load("tiny/"))["train"]
    chosen = batch_at(examples.source_lengths, 8, seed=0, step=0)
    batch = collate([examples[i] for i in chosen], seed=0, step=0)

Letters: B batch, L source length, Lt target length.

Test: pytest tests/unit/test_data.py
"""

import hashlib
import itertools
import json
import math
import os
import random
import re
import string
import time
from array import array
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from support import program
from support.program import UserError, require_text
from tokenizer import Tokenizer

# Fields of DataConfig that only choose files. The cache key has the paths instead.
FILE_FIELDS = {"data", "test", "splits", "max_tasks"}
LEAST_ROWS = {"train": 1, "dev": 5, "seen": 5, "test": 1}  # of a JSONL file
NO_TASK = "-"  # the task of a row without one
# The cached tokens depend on this code. After a change of the code they are made again.
CODE_FILES = (Path(__file__), Path(__file__).with_name("tokenizer.py"))
CODE = hashlib.sha256(b"".join(path.read_bytes() for path in CODE_FILES)).hexdigest()


@dataclass(frozen=True)
class DataConfig:
    """Data: which tasks are read and how a prompt is built."""

    data: str = str(program.ROOT / "sni")  # DIR with tasks/, or FILE.jsonl (default: bundled sni/)
    test: str = ""  # JSONL file of unseen tasks, beside a JSONL file in --data
    wrapper: bool = False  # put the rows of a JSONL file into SNI's prompt
    splits: str = "default"  # folder of split lists under splits/
    definition: bool = True  # put the task definition into the prompt
    num_pos: int = 2  # positive examples in the prompt, as far as they fit
    num_neg: int = 0  # negative examples in the prompt, as far as they fit
    explanation: bool = False  # add the explanations of these examples
    max_source_length: int = 1024  # most tokens of a source, EOS included
    max_target_length: int = 128  # most tokens of a target, EOS included
    train_instances: int | None = None  # most of each task, 0: all (default: 100, of JSONL all)
    max_tasks: int = 0  # first N tasks of each list, for quick looks; 0 for all

    def __post_init__(self) -> None:
        program.require_least(self, max_source_length=2, max_target_length=2)
        if self.train_limit < 0:
            raise UserError(f"--train-instances {self.train_instances}: give 0 or more")

    @property
    def is_jsonl(self) -> bool:
        return self.data.endswith(".jsonl")

    @property
    def is_official(self) -> bool:
        """Return whether prompts have SNI's form, rather than that of the rows of a file."""
        return not self.is_jsonl or self.wrapper

    @property
    def train_limit(self) -> int:
        """Return the most training instances of each task, 0 for all."""
        if self.train_instances is None:
            return 0 if self.is_jsonl else 100
        return self.train_instances

    @property
    def max_new_tokens(self) -> int:
        """Return the most tokens to generate: those of the longest target before its EOS.

        They are at least 127, as in the official code, whose 128 include the start token.
        """
        return max(127, self.max_target_length - 1)

    @property
    def idle(self) -> set[str]:
        """Return the fields without effect on this kind of data."""
        if self.is_jsonl:
            return {"splits", "max_tasks", "definition", "num_pos", "num_neg", "explanation"}
        return {"test", "wrapper"}


# ------------------------------------------------------------------------------ tasks and splits


def read_task(path: str | os.PathLike) -> dict:
    """Return a task file as {name, category, definition, positive, negative, instances}.

    positive, negative: lists of {input, output, explanation}; the explanation may be missing.
    instances: list of {id, input, output}, where output is a list of references.

    Older forms of the official files are accepted: a str as Definition or output, no ids, no
    explanations. Raise UserError for everything else.
    """
    path = Path(path)
    task = program.read_json(path)
    with program.reading(path, "repair it or take the task off the list"):
        category = _first(task.get("Categories")) or "Unknown"
        definition = _first(task["Definition"])
        require_text("Categories", category)
        require_text("Definition", definition)

        positive = list(task.get("Positive Examples", []))
        negative = list(task.get("Negative Examples", []))
        for kind, examples in (("Positive", positive), ("Negative", negative)):
            for number, example in enumerate(examples):
                place = f"{kind} Examples[{number}]"
                require_text(f"{place}: input", example["input"])
                require_text(f"{place}: output", example["output"])
                require_text(f"{place}: explanation", example.get("explanation", ""))

        instances = []
        for number, row in enumerate(task["Instances"]):
            place = f"Instances[{number}]"
            instance_id = row.get("id")
            if instance_id is None:
                instance_id = f"{path.stem}-{number}"
            instance_id = str(instance_id)
            require_text(f"{place}: id", instance_id)
            require_text(f"{place}: input", row["input"])
            references = _references(f"{place}: output", row["output"])
            instances.append({"id": instance_id, "input": row["input"], "output": references})
        if not instances:
            raise ValueError("Instances is empty")

    return {
        "name": path.stem,
        "category": category,
        "definition": definition,
        "positive": positive,
        "negative": negative,
        "instances": instances,
    }


def _first(value):
    """Return the first item of a non-empty list, and anything else unchanged."""
    if isinstance(value, list) and value:
        return value[0]
    return value


def _references(name, value):
    """Return an answer, or a list of answers, as a list of texts."""
    references = value if isinstance(value, list) else [value]
    if not references:
        raise ValueError(f"{name} is empty")
    for reference in references:
        require_text(name, reference)
    return references


def read_splits(root: str | os.PathLike, splits: str = "default") -> dict[str, list[str]]:
    """Return the task names on both lists in splits/<splits>/ as {"train": [...], "test": [...]}.

    The order is that of the lists. Tasks without a file in tasks/ are left out with a warning.
    Raise UserError if a list is missing, or if a task with a file is on both lists.
    """
    root = Path(root)
    _require_plain_name(splits, "--splits")
    found = {"train": [], "test": []}
    missing = []
    for list_name in found:
        path = root / "splits" / splits / f"{list_name}_tasks.txt"
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; --data takes FILE.jsonl, or a folder with splits/ and "
                "tasks/, e.g. from git clone https://github.com/allenai/natural-instructions"
            )
        lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
        names = [line.strip() for line in lines if line.strip()]
        for name in dict.fromkeys(names):  # each name once, in order
            _require_plain_name(name, str(path))
            if (root / "tasks" / f"{name}.json").is_file():
                found[list_name].append(name)
            else:
                missing.append(name)

    both = set(found["train"]) & set(found["test"])
    if both:
        folder = root / "splits" / splits
        raise UserError(f"{folder}: {min(both)} is on both lists; take it off one of them")
    if missing:
        problem = f"{len(missing)} tasks of splits/{splits} are missing, such as {missing[0]}"
        program.warn(f"{root / 'tasks'}: {problem}")
    return found


def _require_plain_name(name, origin):
    """Raise UserError for a name that is too long or could lead out of its folder."""
    if ".." in name or not re.fullmatch(r"[^/\\\0]{1,240}", name):
        raise UserError(f"{origin}: {name!r:.80} is not a plain name; give a short file name")


def split_instances(
    contents: Sequence[Hashable], name: str, train_instances: int | None
) -> tuple[list[int], list[int], list[int]]:
    """Return three lists of indices (train, dev, seen) into the instances of a training task.

    contents: one value for each instance. Instances with equal values are copies of each other.
    name: the name of the task, which seeds the shuffle.

    The n different contents are put in the order of their first copies in the shuffle. The last 20
    of them give one instance each to "seen", and the 20 before them one each to "dev" (n // 5 each
    if n < 100). "train" is the first `train_instances` instances, in shuffled order, of all other
    contents, copies included. So a smaller "train" is the start of a larger one, and no copy of an
    instance in "dev" or "seen" is in "train".
    """
    order = list(range(len(contents)))
    random.Random(f"0/{name}").shuffle(order)  # fixed seed "0/...": the sets never change

    # The first copy of each content, in shuffled order.
    first_copy = {}
    for i in order:
        first_copy.setdefault(contents[i], i)
    unique = list(first_copy.values())

    held_out = min(20, len(unique) // 5)
    dev_start = len(unique) - 2 * held_out
    seen_start = len(unique) - held_out
    training_contents = {contents[i] for i in unique[:dev_start]}
    train = [i for i in order if contents[i] in training_contents]
    return train[:train_instances], unique[dev_start:seen_start], unique[seen_start:]


# ---------------------------------------------------------------------------------- rows of JSONL


def read_rows(path: str | os.PathLike) -> list[dict]:
    """Return the rows of a JSONL file as tasks like those of `read_task`, without examples.

    A line is an object with `prompt` or `instruction`, and the answer as `completion`, `output` or
    `response`: a text, or a list of all texts that are right. Optional are `input` or `context`
    beside an instruction, `task` and `id`. A null counts as absent. Raise UserError with the number
    of a bad line; a line is bad, too, if a text in one of these fields would have no effect.

    The "form" of an instance is "prompt" or "instruction". One with both an instruction and an
    input has the instruction as its "definition".
    """
    tasks = {}
    for name, instance in program.read_jsonl(path, _read_row):
        task = tasks.setdefault(name, {"name": name, "category": name, "instances": []})
        task["instances"].append(instance)
    return list(tasks.values())


def _read_row(row, number):
    """Return the task and the instance in a row, which stands in the line `number`."""
    row = {name: value for name, value in row.items() if value is not None}
    if "messages" in row:
        raise ValueError("chat templates are left to TRL, see docs/use.md")

    form = _only_field(row, "prompt", "instruction")
    answer = _only_field(row, "completion", "output", "response")
    extra = [name for name in ("input", "context") if row.get(name, "") != ""]
    if form == "prompt" and extra:
        raise ValueError(f"prompt and {extra[0]}: write the whole prompt, or use instruction")
    if len(extra) > 1:
        raise ValueError("input and context: give one of them")
    row = {"id": number, "task": NO_TASK} | row
    row["id"] = str(row["id"])
    for name in (form, *extra, "task", "id"):
        require_text(name, row[name])
    if not row[form].strip():
        raise ValueError(f"{form} is empty")

    references = _references(answer, row[answer])
    instance = {"id": row["id"], "form": form, "input": row[form], "output": references}
    if extra:
        instance |= {"definition": row[form], "input": row[extra[0]]}
    return row["task"], instance


def _only_field(row, *names):
    """Return the one of these names that the row has."""
    found = [name for name in names if name in row]
    if not found:
        raise ValueError(f"there is no {' or '.join(names)}")
    if len(found) > 1:
        raise ValueError(f"{found[0]} and {found[1]}: give one of them")
    return found[0]


def split_rows(instances: Sequence[dict]) -> dict[str, list[int]]:
    """Return indices of rows: 2 % of all prompts in "dev", 4 % in "seen", all others in "train".

    A hash of the prompt decides. So rows with equal prompts are in one set, and a row stays in its
    set whatever lines are added.
    """
    positions = {"train": [], "dev": [], "seen": []}
    for position, instance in enumerate(instances):
        percent = hash_of(_plain_prompt(instance)) % 100
        name = "train"
        if percent < 2:
            name = "dev"
        elif percent < 6:
            name = "seen"
        positions[name].append(position)
    return positions


def hash_of(text: str) -> int:
    """Return a number that depends on the text alone, on any machine."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "little")


def _plain_prompt(instance):
    """Return the prompt of a row as the file has it, an empty line between its two parts."""
    if "definition" in instance:
        return f"{instance['definition']}\n\n{instance['input']}"
    return instance["input"]


# ---------------------------------------------------------------------------------------- prompt


def render_prompt(
    task: dict,
    instance: dict,
    tokenizer: Any,
    *,
    definition: bool = True,
    num_pos: int = 2,
    num_neg: int = 0,
    explanation: bool = False,
    max_source_length: int = 1024,
) -> str:
    """Return the prompt of an instance, exactly as the official Tk-Instruct code builds it.

    task, instance: dicts from `read_task`. The lists of examples may be missing.
    tokenizer: anything with encode(text) -> ids with EOS at the end, and decode(ids) -> text.

    First positive, then negative examples of the task are added in order. The first one with which
    the prompt would exceed `max_source_length` tokens is left out, and so are the later ones of its
    kind; the other kind is still tried. Each attempt is tokenised as a whole, because token counts
    of parts do not add up. A prompt that is too long even without examples is cut at its end.
    """
    head = ""
    if definition:
        head = _line("Definition", task["definition"]) + "\n\n"
    tail = "Now complete the following example -\n"
    tail += _line("Input", instance["input"]) + "\nOutput: "

    # The official code joins the examples with a space for the length check, and with nothing
    # for the prompt. `checked_head` is `head` as the length check has it. The spaces at the start
    # of some lines are official too.
    checked_head = head
    for kind, limit in (("Positive", num_pos), ("Negative", num_neg)):
        examples = task.get(kind.lower(), [])
        fitting = []
        for number, example in enumerate(examples[:limit], start=1):
            lines = [
                f" {kind} Example {number} -",
                _line("Input", example["input"]),
                _line(" Output", example["output"]),
            ]
            if explanation and "explanation" in example:
                lines.append(_line(" Explanation", example["explanation"]))
            shown = "\n".join(lines) + "\n\n"
            attempt = checked_head + " ".join(fitting) + shown + tail
            if len(tokenizer.encode(attempt)) > max_source_length:
                break
            fitting.append(shown)
        head += "".join(fitting)
        checked_head += " ".join(fitting)

    prompt = head + tail
    ids = tokenizer.encode(prompt)
    if len(ids) > max_source_length:
        # A character of several tokens may be cut in two. Its first part decodes to U+FFFD.
        prompt = tokenizer.decode(ids[:max_source_length]).rstrip("\ufffd")
    return prompt


def _line(name, text):
    """Return "name: text", and add a full stop if it does not end in punctuation."""
    line = f"{name}: {text.strip()}"
    if line[-1] not in string.punctuation:
        line += "."
    return line


def prompt_of(task: dict, instance: dict, tokenizer: Tokenizer, config: DataConfig) -> str:
    """Return the prompt of an instance as the settings ask for it.

    In a decoder, an instruction of a JSONL row ends in an empty line, which the answer follows.
    """
    if not config.is_official:
        prompt = _plain_prompt(instance)
        if tokenizer.one_row and instance["form"] == "instruction":
            prompt += "\n\n"
        return prompt
    if config.is_jsonl:
        task = instance
    return render_prompt(
        task,
        instance,
        tokenizer,
        definition=(config.is_jsonl or config.definition) and "definition" in task,
        num_pos=config.num_pos,
        num_neg=config.num_neg,
        explanation=config.explanation,
        max_source_length=config.max_source_length,
    )


class Sample(NamedTuple):
    """A prompt and its answers as ids."""

    source: list[int]
    targets: list[list[int]]  # one for each answer
    is_cut: bool  # the prompt was longer than allowed
    cut_targets: int  # the number of answers that were longer than allowed


def build_samples(
    prompts: Sequence[str],
    answers: Sequence[Sequence[str]],
    tokenizer: Tokenizer,
    config: DataConfig,
) -> Iterator[Sample]:
    """Yield the sample of each whole prompt, see `prompt_of`, and its list of answers.

    Every program gets the ids of a prompt here, so that a question has the ids that the same text
    has in training. Prompt and answers are tokenised apart: no id of a prompt depends on an answer.
    In the row of a decoder, SNI's form has one space between them, and the texts of JSONL rows are
    joined as they stand.
    """
    sources = tokenizer.sources(prompts, spaced=config.is_official)
    targets = tokenizer.targets(list(itertools.chain(*answers)), spaced=config.is_official)
    for source, texts in zip(sources, answers, strict=True):
        own_targets = list(itertools.islice(targets, len(texts)))
        limit = config.max_target_length
        yield Sample(
            source=_limit(source, config.max_source_length, tokenizer),
            targets=[_limit(ids, limit, tokenizer) for ids in own_targets],
            is_cut=len(source) > config.max_source_length,
            cut_targets=sum(len(ids) > limit for ids in own_targets),
        )


def _limit(ids, length, tokenizer):
    """Return at most `length` ids. EOS at the end stays there."""
    if len(ids) > length and ids[-1] in tokenizer.eos_ids:
        return ids[: length - 1] + ids[-1:]
    return ids[:length]


def _lost_its_end(prompt, sample, config):
    """Return whether `render_prompt` or `build_samples` has cut off the end of a prompt."""
    if config.is_official:
        return not prompt.endswith("Output: ")  # every complete prompt ends like this
    return sample.is_cut


# ----------------------------------------------------------------------------------------- cache


def cached(key: list, files: Sequence[Path], make: Callable[[], Any]) -> Any:
    """Return make(), or the result of an earlier call with the same key and unchanged files.

    key: JSON values. The result must depend on nothing but them and the content of the files.
    files: they count as unchanged if their sizes and modification times are unchanged.
    make: its result may consist of tensors, lists, tuples, dicts, strings and numbers.

    Results are kept in $XDG_CACHE_HOME/orchmoe or ~/.cache/orchmoe, one file for each key. Whenever
    one is written, those older than 30 days are removed.
    """
    full_key = json.dumps([CODE, key, [str(file.resolve()) for file in files]])
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
            if time.time() - file.stat().st_mtime > 30 * 24 * 3600:
                file.unlink()
    except OSError as error:
        problem = f"cannot save tokens ({error.strerror}); the next start tokenises again"
        program.warn(f"{path.parent}: {problem}")
    return result


# -------------------------------------------------------------------------------------- examples


class Example(NamedTuple):
    """One instance as tokens."""

    id: str
    task: str
    category: str
    source_ids: np.ndarray  # (L,) int32
    target_ids: list[np.ndarray]  # (Lt,) int32, one for each reference; EOS alone if there is none
    references: list[str]
    task_index: int = -1  # index among the training tasks, -1 for other tasks
    position: int = -1  # index in Instances of the task file (unique, unlike id); -1 without a file


class Examples(list[Example]):
    """The examples of one set.

    tasks: names of all tasks of the list or file, sorted. Rows that name no task have none.
    digest: a hash of the contents of the files of these tasks, 16 hex digits.
    rule: how JSONL rows became samples, where older versions did otherwise. "forms": the forms of
    all rows, see `read_rows`, if a decoder reads them as they stand. "left_out": the number of dev
    and seen rows that were left out, see `load_sets`.
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


def load_sets(
    config: DataConfig,
    tokenizer: Tokenizer,
    names: Sequence[str] = (),
    *,
    training: Sequence[str] | None = None,
) -> dict[str, Examples]:
    """Return {name: set} for the given names of sets.

    names: by default "train", "dev", "seen" and, if there are test tasks, "test".
    training: the training tasks of the run. Example.task_index is an index into them. The default
    is the training tasks that are read here.

    In a folder, each training task gives "train", "dev" and "seen" (see `split_instances`), and
    "test" is the first 100 instances of each test task, as in the official evaluation. With a JSONL
    file, `split_rows` gives these three sets, and "test" is the whole file --test. A row of "dev"
    or "seen" whose source has the tokens of a training row is left out; such rows of "test" are
    only counted. Raise UserError for bad files, or if there is nothing for a needed set.
    """
    files = _files(config)
    if not names:
        names = ["train", "dev", "seen"]
        if files["test"]:
            names.append("test")

    # --test is compared with the rows that train, unless the file of these is gone.
    compared = config.is_jsonl and "test" in names and files["train"][0].exists()
    sets = {}
    if compared or set(names) - {"test"}:
        sets |= _load_list(config, tokenizer, "train", files["train"], training, names)
        if training is None:
            training = sets["train"].tasks
    if "test" in names:
        sets |= _load_list(config, tokenizer, "test", files["test"], training or [], names)
        _compare_test(config, sets)
    return {name: sets[name] for name in names}


def _compare_test(config, sets):
    """Warn if rows of "test" belong to training tasks, or have the tokens of training rows."""
    test = sets["test"]
    path = config.test or config.data
    known = sum(example.task_index >= 0 for example in test)
    if known:
        program.warn(
            f"{path}: {known} of {len(test)} test rows belong to training tasks, which are not "
            "unseen; methods that route by task use their ids"
        )
    if "train" not in sets or not config.is_jsonl:
        return
    if test.digest == sets["train"].digest:
        raise UserError(
            f"--test {config.test}: has the rows of --data; give rows that do not train"
        )
    equal = len(test) - len(_unlike(sets["train"], test))
    if equal:
        program.warn(
            f"{path}: {equal} of {len(test)} test rows have the tokens of training rows, so they "
            "are not unseen"
        )


def _unlike(train, examples):
    """Return the examples whose sources do not have the tokens of a training row."""
    trained = {e.source_ids.tobytes() for e in train}
    return [e for e in examples if e.source_ids.tobytes() not in trained]


def _files(config):
    """Return the files of the training tasks and of the test tasks."""
    if config.is_jsonl:
        return {
            "train": [Path(config.data)],
            "test": [Path(config.test)] if config.test else [],
        }
    files = {}
    for list_name, tasks in read_splits(config.data, config.splits).items():
        chosen = sorted(tasks[: config.max_tasks or None])
        files[list_name] = [Path(config.data, "tasks", f"{task}.json") for task in chosen]
    return files


def _load_list(
    config: DataConfig,
    tokenizer: Tokenizer,
    list_name: str,
    paths: list[Path],
    training: Sequence[str] | None,
    needed: Sequence[str],
) -> dict[str, Examples]:
    """Return all sets of one list ("train" or "test"), with tokens from the cache if possible.

    needed: names of the sets that must have enough rows.
    """
    if not paths:
        raise UserError(
            f"{config.data}: no task of {list_name}_tasks.txt is here; complete the folder "
            "(for a JSONL file: --test OTHER, or --split seen)"
        )
    options = {name: value for name, value in vars(config).items() if name not in FILE_FIELDS}

    def encode_all() -> list[dict]:
        result = []
        for path in program.progress(paths, "tokenising", unit="file"):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            for task in read_rows(path) if config.is_jsonl else [read_task(path)]:
                encoded_task = _encode_task(task, list_name, tokenizer, config)
                result.append({"digest": digest, **encoded_task})
        return result

    key = [list_name, options, config.is_jsonl, tokenizer.fingerprint, tokenizer.version]
    encoded = cached(key, paths, encode_all)
    tasks = sorted(task["name"] for task in encoded)
    if NO_TASK in tasks:
        tasks = []  # not all rows name a task
    if training is None:
        training = tasks

    # Turn the plain values of the cache into examples.
    task_index = {task: i for i, task in enumerate(training)}
    set_names = ("test",) if list_name == "test" else ("train", "dev", "seen")
    examples = {name: [] for name in set_names}
    digest = hashlib.sha256()
    lost = Counter()
    forms = set()
    for task in encoded:
        digest.update(task["digest"].encode())
        lost.update(task["lost"])
        forms.update(task["forms"])
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

    if list_name == "test" or "train" not in needed:
        del lost["target"]  # nothing trains on these; the metrics read the references uncut
    _warn_of_lost(lost, config, paths[0] if config.is_jsonl else config.data)

    # Different texts may have equal tokens, as when they are cut.
    rule = {}
    left_out = 0
    if config.is_jsonl and list_name == "train":
        for name in ("dev", "seen"):
            kept = _unlike(examples["train"], examples[name])
            left_out += len(examples[name]) - len(kept)
            examples[name] = kept
    if left_out:
        rule["left_out"] = left_out
        program.warn(
            f"{paths[0]}: {left_out} rows of dev and seen have the tokens of training rows and are "
            "left out"
        )
    for name, found in examples.items():
        if config.is_jsonl and name in needed and len(found) < LEAST_ROWS[name]:
            raise UserError(
                f"{paths[0]}: {len(found)} of its rows are in the set {name!r}, which needs "
                f"{LEAST_ROWS[name]}; add rows with other prompts"
            )

    if tokenizer.one_row and not config.is_official:
        rule["forms"] = sorted(forms)
    short_digest = digest.hexdigest()[:16]
    return {name: Examples(found, tasks, short_digest, rule) for name, found in examples.items()}


def _warn_of_lost(lost, config, path):
    """Warn of sources and targets that are cut, and of rows with unknown characters."""
    limits = {"source": config.max_source_length, "target": config.max_target_length}
    for name, limit in limits.items():
        if lost[name]:
            count = f"{lost[name]} {name}s are too long and lose their ends"
            program.warn(f"--max-{name}-length {limit}: {count}")
    if lost["characters"]:
        program.warn(
            f"{path}: {lost['characters']} rows have characters that the tokenizer does not "
            "know, so the model neither reads nor writes them"
        )


def _encode_task(
    task: dict, list_name: str, tokenizer: Tokenizer, config: DataConfig
) -> dict[str, Any]:
    """Return what the cache keeps of a task, as few plain values.

    rows: [set, position, id, references] of each row, see Example; as JSON, which is read fast.
    ids: the tokens of all rows in one tensor, for each row the source and then the targets.
    lengths: the number of tokens of each of these sources and targets, in the same order.
    lost: what the samples lack of their texts, see `_warn_of_lost`.
    forms: the different forms of all rows, see `read_rows`.
    """
    instances = task["instances"]
    limit = config.train_limit or None  # a slice up to None has all
    if list_name == "test":
        last = None if config.is_jsonl else 100
        positions = {"test": range(len(instances))[:last]}
    elif config.is_jsonl:
        positions = split_rows(instances)
        positions["train"] = positions["train"][:limit]
    else:
        contents = [(instance["input"], *instance["output"]) for instance in instances]
        split = split_instances(contents, task["name"], limit)
        positions = dict(zip(("train", "dev", "seen"), split, strict=True))

    rows = []
    prompts = []
    answers = []
    for set_name, chosen in positions.items():
        for position in chosen:
            instance = instances[position]
            rows.append([set_name, position, instance["id"], instance["output"]])
            prompts.append(prompt_of(task, instance, tokenizer, config))
            answers.append(instance["output"])

    ids = array("i")
    lengths = array("i")
    lost = Counter()
    samples = build_samples(prompts, answers, tokenizer, config)
    for prompt, sample in zip(prompts, samples, strict=True):
        lost["source"] += _lost_its_end(prompt, sample, config)
        lost["target"] += sample.cut_targets
        pieces = (sample.source, *sample.targets)
        lost["characters"] += any(tokenizer.unknown_id in piece for piece in pieces)
        for piece in pieces:
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


def make_example(
    definition: str, text: str, tokenizer: Tokenizer, config: DataConfig, form: str = "prompt"
) -> Example:
    """Return an Example without references for an instruction and an input of the user.

    The prompt is built like those of the data. If the data are JSONL, the input may be empty.
    form: "prompt" or "instruction", as in `read_rows`. It counts only if there is no input.
    """
    if not definition.strip() or not (text.strip() or config.is_jsonl):
        raise UserError('give both --ask "instruction" and --input "text"')
    with program.checking_settings():
        require_text("--ask", definition)
        require_text("--input", text)
    instance = {"form": "instruction", "definition": definition, "input": text}
    if not text:
        instance = {"form": form, "input": definition}
    prompt = prompt_of(instance, instance, tokenizer, config)
    [sample] = build_samples([prompt], [[]], tokenizer, config)
    if _lost_its_end(prompt, sample, config):
        program.warn(
            f"--max-source-length {config.max_source_length}: the end of the input is cut off"
        )
    return Example(
        id="question",
        task="question",
        category="question",
        source_ids=np.array(sample.source, np.int32),
        target_ids=[np.array(tokenizer.eos_ids[-1:], np.int32)],  # so that collate works
        references=[],
    )


# --------------------------------------------------------------------------------------- batches


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

            # Drop the columns that are padding in all rows of the piece. Batches are sorted by
            # source length, so that a piece is often shorter than its batch.
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


class Batches:
    """The order in which training examples are used: which of them are in the batch of a step.

    It depends on the arguments alone. lengths: source lengths of all examples. Each example occurs
    once in an epoch, and one batch of an epoch may have fewer than `batch_size`.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int):
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.per_epoch = math.ceil(len(lengths) / batch_size)
        self.epoch = -1  # of `batches`; none yet
        self.batches: list[np.ndarray] = []

    def at(self, step: int) -> np.ndarray:
        """Return the indices of the examples in the batch of a step. Steps count from 0."""
        epoch, number = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.batches = self.of_epoch(epoch)
            self.epoch = epoch
        return self.batches[number]

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


def subsample(examples: Sequence[Example], limit: int) -> list[Example]:
    """Return at most `limit` examples, evenly spaced, or all of them if `limit` is 0."""
    count = len(examples)
    if limit:
        count = min(count, limit)
    return [examples[i * len(examples) // count] for i in range(count)]


def batches(
    examples: Sequence[Example],
    size: int,
    device: torch.device,
    description: str,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[tuple[list[int], Batch]]:
    """Yield (indices into `examples`, Batch on the device), the longest sources first.

    In this order batches need little padding, and a batch that exceeds the memory fails early.
    Process `rank` gets at most `size` of every size * ranks examples. If it gets none, the list of
    indices is empty and the Batch is a placeholder; see Batch.split.
    """
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].source_ids))
    with program.progress(None, description, total=len(order), unit="ex") as bar:
        for start in range(0, len(order), size * ranks):
            indices = order[start : start + size * ranks]
            whole = collate([examples[i] for i in indices])
            rows, own = next(whole.split(1, rank, ranks))
            yield [indices[row] for row in rows], own.to(device)
            bar.update(len(indices))
