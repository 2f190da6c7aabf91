"""The text of the data: task files, split lists, rows of JSONL, both ways to split instances into
sets, and the prompt.

Data: Super-NaturalInstructions, arXiv 2204.07705, github.com/allenai/natural-instructions. Prompts
equal those of the official code. data.py makes tokens of them.

Words: a source is a prompt, a target is a reference (one right answer). A list is train_tasks.txt
or test_tasks.txt; it names tasks. A set is train, dev, seen or test; it holds instances. The flag
--split names a set; --splits names a folder of lists.

Test: pytest tests/unit/test_tasks.py
"""

import hashlib
import os
import random
import re
import string
from bisect import bisect_left
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import program
from support.program import UserError, require_text
from tokenizer import Tokenizer

# Fields of DataConfig that only choose files. The cache key has the paths instead.
FILE_FIELDS = {"data", "test", "splits", "max_tasks"}
NO_TASK = "-"  # the task of a row without one


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
    max_source_length: int = 1024  # longest source in tokens, EOS included
    max_target_length: int = 128  # longest target in tokens, EOS included
    train_instances: int | None = None  # at most N per task (0: all; default: 100, with JSONL: all)
    max_tasks: int = 0  # read only the first N tasks of each list (0: all)

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
    def metric_rules(self) -> str:
        """Return by which of metrics.RULES predictions are scored: "unicode" for rows of JSONL."""
        return "unicode" if self.is_jsonl else "official"

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


# --------------------------------------------------------------------------------- tasks and splits


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
                location = f"{kind} Examples[{number}]"
                require_text(f"{location}: input", example["input"])
                require_text(f"{location}: output", example["output"])
                require_text(f"{location}: explanation", example.get("explanation", ""))

        instances = []
        for number, row in enumerate(task["Instances"]):
            location = f"Instances[{number}]"
            instance_id = row.get("id")
            if instance_id is None:
                instance_id = f"{path.stem}-{number}"
            instance_id = str(instance_id)
            require_text(f"{location}: id", instance_id)
            require_text(f"{location}: input", row["input"])
            references = _references(f"{location}: output", row["output"])
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


def _require_plain_name(name, origin):
    """Raise UserError for a name that is too long or could lead out of its folder."""
    if ".." in name or not re.fullmatch(r"[^/\\\0]{1,240}", name):
        raise UserError(f"{origin}: {name!r:.80} is not a plain name; give a short file name")


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


def split_instances(
    contents: Sequence[Hashable], name: str, limit: int | None
) -> tuple[list[int], list[int], list[int]]:
    """Return three lists of indices (train, dev, seen) into the instances of a training task.

    contents: one value for each instance. Instances with equal values are copies of each other.
    name: the name of the task, which seeds the shuffle. limit: the largest number of training
    instances, None for all.

    The instances are shuffled, and the first copy of each of the n different contents is found. The
    last 20 of these are "seen", and the 20 before them "dev" (n // 5 each if n < 100); their other
    copies are in no set. All other instances, copies included, are for "train", which is the first
    `limit` of them. So a smaller "train" is the start of a larger one.
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
    return train[:limit], unique[dev_start:seen_start], unique[seen_start:]


# ------------------------------------------------------------------------------------ rows of JSONL


def _only_field(row, *names):
    """Return the one of these names that the row has."""
    found = [name for name in names if name in row]
    if not found:
        raise ValueError(f"there is no {' or '.join(names)}")
    if len(found) > 1:
        raise ValueError(f"{found[0]} and {found[1]}: give one of them")
    return found[0]


def _is_chat(row):
    """Return whether a row has a list of chat messages, in one of the usual fields."""
    return any(isinstance(row.get(name), list) for name in ("messages", "conversations", "prompt"))


def _read_row(row, number):
    """Return the task and the instance of the row in the line `number`."""
    row = {name: value for name, value in row.items() if value is not None}
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


def read_rows(path: str | os.PathLike) -> list[dict]:
    """Return the rows of a JSONL file as tasks like those of `read_task`, without examples.

    A line is an object with `prompt` or `instruction`, and the answer as `completion`, `output` or
    `response`: a text, or a list of all texts that are right. Optional are `input` or `context`
    beside an instruction, `task` and `id`. A null counts as absent. Raise UserError with the number
    of a bad line. A line is also bad if a text in one of these fields would have no effect.

    The "form" of an instance is "prompt" or "instruction". One with both an instruction and an
    input has the instruction as its "definition".
    """
    tasks = {}
    for location, number, row in program.read_jsonl(path):
        if _is_chat(row):
            raise UserError(
                f"{location}: it has chat messages, whose template depends on the model; train "
                "with TRL's SFTTrainer, see docs/use.md, or write each prompt as a text"
            )
        with program.reading(location, "repair the line"):
            name, instance = _read_row(row, number)
        task = tasks.setdefault(name, {"name": name, "category": name, "instances": []})
        task["instances"].append(instance)
    return list(tasks.values())


def plain_prompt(instance):
    """Return the prompt of a row as the file has it, an empty line between its two parts."""
    if "definition" in instance:
        return f"{instance['definition']}\n\n{instance['input']}"
    return instance["input"]


def hash_of(text: str) -> int:
    """Return a number that depends only on the text, on any machine.

    runtime.generator hashes numbers, in another way. These stay two functions: the sets of JSONL
    rows and the drawn references depend on this one, noise and start values on the other.
    """
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "little")


class RowSplit:
    """Assign each row of a JSONL file to a set: "dev", "seen" or "train".

    A hash of the prompt decides: 2 % of all prompts are in "dev" and the next 4 % in "seen". So
    rows with equal prompts are in one set, and a row stays in its set whatever lines are added. If
    that gives fewer than 8 and 16 prompts, both sets are filled up with the prompts that follow in
    the order of the hash, to at most a fifth of all prompts each.

    instances: all rows of the file.
    num_prompts: the number of different prompts.
    filled: "" if no set was filled up. Otherwise it has the two hashes at which the sets end.
    """

    def __init__(self, instances: Iterable[dict]):
        places = sorted({self._place(instance) for instance in instances})
        self.num_prompts = len(places)
        dev_end = bisect_left(places, (2, 0))
        seen_end = bisect_left(places, (6, 0))
        full_dev_end = max(dev_end, min(8, self.num_prompts // 5))
        full_seen_end = max(seen_end, full_dev_end + min(16, self.num_prompts // 5))

        self.filled = ""
        self.first_seen = (2, 0)
        self.first_train = (6, 0)
        if (full_dev_end, full_seen_end) != (dev_end, seen_end):
            places.append((100, 0))  # behind all others
            self.first_seen = places[full_dev_end]
            self.first_train = places[full_seen_end]
            self.filled = f"{self.first_seen[1]:016x} {self.first_train[1]:016x}"

    def _place(self, instance):
        """Return the place of a prompt in the order in which prompts are held out."""
        number = hash_of(plain_prompt(instance))
        return number % 100, number

    def set_of(self, instance: dict) -> str:
        """Return the name of the set of a row."""
        place = self._place(instance)
        if place < self.first_seen:
            return "dev"
        if place < self.first_train:
            return "seen"
        return "train"


# ------------------------------------------------------------------------------------------- prompt


def _line(name, text):
    """Return "name: text", and add a full stop if it does not end in punctuation."""
    line = f"{name}: {text.strip()}"
    if line[-1] not in string.punctuation:
        line += "."
    return line


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
            # The example that is tried follows without a space.
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


@dataclass(frozen=True)
class Prompts:
    """Build the texts that the model reads.

    Each is made of an instance of the data, of an instruction with an input (`of_question`), or of
    a text that a user typed complete (`of_text`).

    forms: the forms of all rows of the run's JSONL file, "instruction" or "prompt", see
    `read_rows`. Only a decoder needs them: there the text of an instruction ends in an empty line,
    which the answer follows. An instruction without an input, and a typed text, count as
    "instruction" if all rows have this form, and else as "prompt".
    """

    config: DataConfig
    tokenizer: Tokenizer
    forms: Sequence[str] = ()

    @property
    def _form(self):
        """Form of a text that names none."""
        return "instruction" if list(self.forms) == ["instruction"] else "prompt"

    def _ending(self, form):
        is_plain_row = self.tokenizer.one_row and not self.config.is_official
        return "\n\n" if is_plain_row and form == "instruction" else ""

    @property
    def ending(self) -> str:
        """Return what a typed prompt must end in.

        It is an empty line if all rows of a decoder's run are instructions, else nothing.
        """
        return self._ending(self._form)

    def of_instance(self, task: dict, instance: dict) -> str:
        """Return the prompt of an instance of a task, as the settings ask for it."""
        config = self.config
        if not config.is_official:
            return plain_prompt(instance) + self._ending(instance["form"])
        if config.is_jsonl:
            task = instance  # a wrapped row carries its own definition
        return render_prompt(
            task,
            instance,
            self.tokenizer,
            # --definition has no effect on JSONL: the row decides.
            definition=(config.is_jsonl or config.definition) and "definition" in task,
            num_pos=config.num_pos,
            num_neg=config.num_neg,
            explanation=config.explanation,
            max_source_length=config.max_source_length,
        )

    def of_question(self, instruction: str, text: str) -> str:
        """Return the prompt of an instruction and an input, which may be empty with JSONL."""
        question = {"form": "instruction", "definition": instruction, "input": text}
        if not text:
            question = {"form": self._form, "input": instruction}
        # A question is its own task, without examples.
        return self.of_instance(question, question)

    def of_text(self, prompt: str) -> str:
        """Return a text that a user typed, with the ending that it may lack."""
        if prompt.endswith(self.ending):
            return prompt
        return prompt + self.ending
