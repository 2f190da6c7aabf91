"""The text of the data: tasks, prompts, and the rows of each set.

`sni_rows` reads a folder in the form of Super-NaturalInstructions (SNI): task files, and lists of
tasks. `jsonl_rows` reads a JSONL file. Both make Rows, and data.py turns rows into tokens.

SNI is arXiv 2204.07705, github.com/allenai/natural-instructions. With --bare-share 0 all prompts
equal those of the official code. By default half of the training prompts have no examples.

A row has a prompt and its references, which are the texts that count as right answers. The model
reads the prompt as its source, and learns one reference as its target.

A row belongs to one set:
    train  trains the weights
    dev    chooses the weights: its loss decides which step is kept
    seen   is only scored: held-out rows of the training tasks
    test   is only scored: rows of other tasks, or of the file in --test

The flag --split names a set. The flag --splits names a folder with two lists of tasks:
train_tasks.txt (for train, dev and seen) and test_tasks.txt (for test).

Test: pytest tests/unit/test_tasks.py
"""

import hashlib
import os
import random
import re
import string
from bisect import bisect_left
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from support import program
from support.program import UserError, require_text

# Fields of DataConfig that only choose files.
FILE_FIELDS = {"data", "test", "splits", "max_tasks"}
NO_TASK = "-"  # the task of a row without one
PROMPT_END = "\nOutput: "  # of every complete prompt in SNI's form
# Other names that fields of a JSONL row may have, as in Dolly.
OTHER_NAMES = {"context": "input", "completion": "output", "response": "output"}
# Fields of Alpaca files that are parts of the prompt there. Without them it has another meaning.
REFUSED_FIELDS = ("system", "history")


@dataclass(frozen=True)
class DataConfig:
    """Data: which tasks are read and how a prompt is built."""

    data: str = str(program.ROOT / "sni")  # DIR with tasks/, or FILE.jsonl (default: bundled sni/)
    test: str = ""  # JSONL file of unseen tasks, beside a JSONL file in --data
    splits: str = "default"  # folder of split lists under splits/
    definition: bool = True  # put the task definition into the prompt
    num_pos: int = 2  # positive examples in the prompt, as far as they fit
    bare_share: float = 0.5  # share of the training prompts without examples, as in a question
    num_neg: int = 0  # negative examples in the prompt, as far as they fit
    explanation: bool = False  # add the explanations of these examples
    max_source_length: int = 1024  # longest source in tokens, EOS included
    max_target_length: int = 128  # longest target in tokens, EOS included
    train_instances: int | None = None  # at most N per task (0: all; default: 100, with JSONL: all)
    max_tasks: int = 0  # read only the first N tasks of each list (0: all)

    def __post_init__(self) -> None:
        program.check(self, max_source_length=2, max_target_length=2)
        if not 0 <= self.bare_share <= 1:
            raise UserError(f"--bare-share {self.bare_share}: give a number from 0 to 1")

    @property
    def is_jsonl(self) -> bool:
        return self.data.endswith(".jsonl")

    @property
    def metric_rules(self) -> str:
        """Return the name of the rules in metrics.RULES that score predictions."""
        return "unicode" if self.is_jsonl else "official"

    @property
    def train_limit(self) -> int | None:
        """Return the most training instances of each task, None for all."""
        if self.train_instances is None and not self.is_jsonl:
            return 100
        return self.train_instances or None

    @property
    def max_new_tokens(self) -> int:
        """Return the most tokens to generate, so that the longest target fits without its EOS.

        It is at least 127, as in the official code, which generates 128 with the start token.
        """
        return max(127, self.max_target_length - 1)

    @property
    def idle(self) -> set[str]:
        """Return the names of the fields that have no effect on this kind of data."""
        if self.is_jsonl:
            of_prompt = {"definition", "num_pos", "num_neg", "explanation", "bare_share"}
            return {"splits", "max_tasks", *of_prompt}
        return {"test"}


class Row(NamedTuple):
    """A prompt and its references as text."""

    set: str  # train, dev, seen, test or question; "" before the rows are split
    task: str
    category: str
    id: str
    position: int  # index in its task file, or among the rows of its JSONL file; unique, unlike id
    prompt: str
    references: list[str]  # the right answers
    is_cut: bool = False  # whether the prompt has lost its end, see render_prompt
    input: str | None = None  # that of the instance, in SNI's form


# --------------------------------------------------------------------------------- tasks and splits


def _first(value):
    """Return the first item of a non-empty list, and anything else unchanged."""
    if isinstance(value, list) and value:
        return value[0]
    return value


def _references(name, value):
    """Return a text, or a list of texts, as a list. Raise ValueError if it is neither."""
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
        texts = [category, definition]
        positive = list(task.get("Positive Examples", []))
        negative = list(task.get("Negative Examples", []))
        for example in positive + negative:
            texts += [example["input"], example["output"], example.get("explanation", "")]

        instances = []
        for number, row in enumerate(task["Instances"]):
            instance_id = row.get("id")
            if instance_id is None:
                instance_id = f"{path.stem}-{number}"
            instance_id = str(instance_id)
            references = _references("output", row["output"])
            texts += [instance_id, row["input"]]
            instances.append({"id": instance_id, "input": row["input"], "output": references})
        if not instances:
            raise ValueError("Instances is empty")
        for text in texts:
            require_text("each text", text)

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
    """Return the task names of the lists in splits/<splits>/ as {"train": [...], "test": [...]}.

    The names have the order of the lists. Tasks without a file in tasks/ are left out with a
    warning. Raise UserError if a list is missing, or if a task with a file is on both lists.
    """
    root = Path(root)
    _require_plain_name(splits, "--splits")
    folder = root / "splits" / splits
    found = {"train": [], "test": []}
    missing = []
    for list_name in found:
        path = folder / f"{list_name}_tasks.txt"
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; --data takes FILE.jsonl, or a folder with splits/ and "
                "tasks/, e.g. from git clone https://github.com/allenai/natural-instructions"
            )
        lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
        names = [line.strip() for line in lines if line.strip()]
        for name in dict.fromkeys(names):  # each name once, in order
            _require_plain_name(name, path)
            if (root / "tasks" / f"{name}.json").is_file():
                found[list_name].append(name)
            else:
                missing.append(name)

    both = set(found["train"]) & set(found["test"])
    if both:
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
    name: the name of the task, which seeds the shuffle.
    limit: the largest number of training instances, None for all.

    1. The instances are shuffled.
    2. The first copy of each content is found. There are n different contents.
    3. The last 20 of these first copies are "seen", and the 20 before them are "dev". If n < 100,
       each of the two has n // 5. Other copies of the same contents are in no set.
    4. All instances with other contents, copies included, are for "train", which has the first
       `limit` of them in shuffled order. So a smaller "train" is the start of a larger one.
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

    The positive examples of the task are added in order, as long as the prompt has at most
    `max_source_length` tokens; then the negative ones in the same way. Each attempt is tokenised as
    a whole, because the token counts of parts do not add up. A prompt that is too long even without
    examples is cut at its end.
    """
    head = ""  # the prompt before `tail`: the definition, then examples
    if definition:
        head = _line("Definition", task["definition"]) + "\n\n"
    tail = "Now complete the following example -\n"
    tail += _line("Input", instance["input"]) + PROMPT_END

    # The official code measures another text than the prompt: `measured` is `head` with a space
    # between the examples of one kind.
    measured = head
    for kind, limit in (("Positive", num_pos), ("Negative", num_neg)):
        examples = task.get(kind.lower(), [])
        separator = ""
        for number, example in enumerate(examples[:limit], start=1):
            lines = [  # the spaces at the start are official, too
                f" {kind} Example {number} -",
                _line("Input", example["input"]),
                _line(" Output", example["output"]),
            ]
            if explanation and "explanation" in example:
                lines.append(_line(" Explanation", example["explanation"]))
            example_text = "\n".join(lines) + "\n\n"
            # There is no space before the example that is tried. This is official, too.
            if len(tokenizer.encode(measured + example_text + tail)) > max_source_length:
                break
            head += example_text
            measured += separator + example_text
            separator = " "

    prompt = head + tail
    ids = tokenizer.encode(prompt)
    if len(ids) > max_source_length:
        # The text that is left will get an EOS again, so data.tokenise may cut one token more.
        # A character of several tokens may be cut in two. Its first part decodes to U+FFFD.
        prompt = tokenizer.decode(ids[:max_source_length]).rstrip("\ufffd")
    return prompt


# ------------------------------------------------------------------------------------- rows of SNI


def hash_of(text: str) -> int:
    """Return a 64-bit hash of the text, the same on every machine."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "little")


def is_bare(task: dict, instance: dict, share: float) -> bool:
    """Return whether the training prompt of an instance has no examples. A hash decides.

    share: the share of instances for which this is so, from 0 to 1.

    A question of a user has no examples, and a model that always trained with them answers it
    badly: experiments/results/questions.md.
    """
    return hash_of(f"{task['name']}/{instance['id']}") < share * 2**64


def sni_row(set_name: str, task: dict, position: int, tokenizer: Any, config: DataConfig) -> Row:
    """Return the row of one instance of a task, a dict from `read_task`."""
    instance = task["instances"][position]
    num_pos = config.num_pos
    num_neg = config.num_neg
    if set_name == "train" and is_bare(task, instance, config.bare_share):
        num_pos = 0
        num_neg = 0
    prompt = render_prompt(
        task,
        instance,
        tokenizer,
        definition=config.definition,
        num_pos=num_pos,
        num_neg=num_neg,
        explanation=config.explanation,
        max_source_length=config.max_source_length,
    )
    return Row(
        set=set_name,
        task=task["name"],
        category=task["category"],
        id=instance["id"],
        position=position,
        prompt=prompt,
        references=instance["output"],
        is_cut=not prompt.endswith(PROMPT_END),
        input=instance["input"],
    )


def sni_rows(files: dict[str, list[Path]], tokenizer: Any, config: DataConfig) -> Iterator[Row]:
    """Yield the rows of the task files that `find_files` returns.

    `split_instances` divides the instances of a training task into sets. The first 100 instances of
    a test task are "test", as in the official evaluation.
    """
    for list_name, paths in files.items():
        for path in program.progress(paths, "tokenising", unit="file"):
            task = read_task(path)
            instances = task["instances"]
            if list_name == "test":
                positions = {"test": range(min(100, len(instances)))}
            else:
                contents = [(instance["input"], *instance["output"]) for instance in instances]
                train, dev, seen = split_instances(contents, task["name"], config.train_limit)
                positions = {"train": train, "dev": dev, "seen": seen}
            for set_name, chosen in positions.items():
                for position in chosen:
                    yield sni_row(set_name, task, position, tokenizer, config)


# ------------------------------------------------------------------------------------ rows of JSONL


def _is_chat(fields):
    """Return whether a row has a list of chat messages, in one of the usual fields."""
    names = ("messages", "conversations", "prompt")
    return any(isinstance(fields.get(name), list) for name in names)


def instruction_prompt(instruction: str, text: str) -> str:
    """Return the prompt of an instruction and its input, which may be empty.

    An empty line follows each of them. A decoder reads the final empty line before the answer. T5's
    tokenizer drops it.
    """
    prompt = f"{instruction}\n\n"
    if text:
        prompt += f"{text}\n\n"
    return prompt


def _parse_row(fields, number, position):
    """Return the Row of line `number`. It belongs to no set yet."""
    given = {}
    for name, value in fields.items():
        if value is None:
            continue
        if name in REFUSED_FIELDS and value:
            raise ValueError(f"{name}: it is not read; write it into the prompt or instruction")
        field = OTHER_NAMES.get(name, name)
        if field in given:
            raise ValueError(f"{name}: the row has this field by another name, too; give one")
        given[field] = value

    given["id"] = str(given.get("id", number))
    for name in ("prompt", "instruction", "input", "task", "id"):
        require_text(name, given.setdefault(name, ""))
    prompt = given["prompt"]
    instruction = given["instruction"]
    text = given["input"]
    task = given["task"] or NO_TASK  # a table may have an empty cell

    if prompt and (instruction or text):
        raise ValueError("prompt: it is the whole prompt; leave out instruction, input and context")
    if instruction.strip():
        prompt = instruction_prompt(instruction, text)
    if not prompt.strip() or "output" not in given:
        raise ValueError(
            "give a prompt or an instruction that is not blank, and a completion or an output that "
            f"is not null; the fields are {list(fields)!r:.80}"
        )
    return Row(
        set="",
        task=task,
        category=task,
        id=given["id"],
        position=position,
        prompt=prompt,
        references=_references("the answer", given["output"]),
    )


def read_rows(path: str | os.PathLike) -> list[Row]:
    """Return the rows of a JSONL file in the order of its lines. They belong to no set yet.

    A line is an object with `prompt` or `instruction`, and with `completion`, `output` or
    `response`: one reference, or a list of references. Optional are `input` or `context` beside an
    instruction, `task` and `id`. A null counts as absent, and so does an empty task. Raise
    UserError with the number of a bad line. A line is also refused if one of these fields would be
    ignored, or is given under two names, or if it has a field of REFUSED_FIELDS. Other fields are
    not read.
    """
    rows = []
    for location, number, fields in program.read_jsonl(path):
        if _is_chat(fields):
            raise UserError(
                f"{location}: it has chat messages, whose template depends on the model; train "
                "with TRL's SFTTrainer, see docs/use.md, or write each prompt as a text"
            )
        with program.reading(location, "repair the line"):
            rows.append(_parse_row(fields, number, position=len(rows)))
    if not rows:
        raise UserError(f"{path}: it has no rows")
    return rows


def split_key(prompt: str) -> tuple[int, int]:
    """Return (hash % 100, hash) of a prompt. `split_prompts` orders prompts by it.

    A final empty line does not count, so that a text has one key as a prompt and as an instruction.
    """
    prompt_hash = hash_of(prompt.removesuffix("\n\n"))
    return prompt_hash % 100, prompt_hash


def split_prompts(prompts: Iterable[str]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the keys at which "dev" and "seen" end, given all prompts of a JSONL file.

    In the order of `split_key` the prompts of "dev" come first, then those of "seen", and then
    those of "train". n is the number of different prompts.

    dev: the prompts with hash % 100 < 2, or the first clamp(n / 10, 8, 50) if these are more.
    seen: the next ones with hash % 100 < 6, or the next clamp(n / 5, 8, 100) if these are more.

    So rows with equal prompts are in one set, whatever the order of the lines is. Above n = 2,500
    the shares of the hash exceed the bounds on average, and above some 4,000 practically always.
    Then a row stays in its set whatever lines are added.
    """
    keys = sorted({split_key(prompt) for prompt in prompts})
    least_dev = min(50, max(8, len(keys) // 10))
    least_seen = min(100, max(8, len(keys) // 5))

    # There may be fewer prompts than that. (100, 0) is larger than the keys of all prompts.
    keys += [(100, 0)] * (least_dev + least_seen)
    dev_end = max((2, 0), keys[least_dev])
    dev_count = bisect_left(keys, dev_end)
    seen_end = max((6, 0), keys[dev_count + least_seen])
    return dev_end, seen_end


def jsonl_rows(
    files: dict[str, list[Path]], train_limit: int | None
) -> tuple[list[Row], dict[str, Any]]:
    """Return the rows of the JSONL files that `find_files` returns, and facts about --data.

    train_limit: the most rows of each task in "train", None for all.

    The facts are JSON values. "held_out" has the keys at which "dev" and "seen" end, see
    `split_prompts`. "instructions" is whether each prompt ends in an empty line, as those of
    instructions do.
    """
    data_rows = []
    for path in files["train"]:
        data_rows += read_rows(path)
    prompts = [row.prompt for row in data_rows]
    dev_end, seen_end = split_prompts(prompts)

    rows = []
    train_counts = Counter()  # of each task
    for row in data_rows:
        key = split_key(row.prompt)
        if key < dev_end:
            set_name = "dev"
        elif key < seen_end:
            set_name = "seen"
        else:
            set_name = "train"
            train_counts[row.task] += 1
            if train_limit is not None and train_counts[row.task] > train_limit:
                continue
        rows.append(row._replace(set=set_name))

    for path in files["test"]:
        for row in read_rows(path):
            rows.append(row._replace(set="test"))
    facts = {
        "held_out": [list(dev_end), list(seen_end)],
        "instructions": all(prompt.endswith("\n\n") for prompt in prompts),
    }
    return rows, facts


# -------------------------------------------------------------------------- files, and typed texts


def find_files(config: DataConfig) -> dict[str, list[Path]]:
    """Return the files to read: {"train": [...], "test": [...]}.

    "train" has the files of "train", "dev" and "seen". With --test the JSONL file in --data may be
    missing: a run may have trained elsewhere.
    """
    files = {"train": [], "test": []}
    path = Path(config.data)
    if config.is_jsonl:
        if path.exists() or not config.test:
            files["train"].append(path)
        if config.test:
            files["test"].append(Path(config.test))
        return files

    for list_name, tasks in read_splits(path, config.splits).items():
        first = tasks[: config.max_tasks or None]  # 0: all
        files[list_name] = [path / "tasks" / f"{task}.json" for task in sorted(first)]
    return files


def row_of_prompt(prompt: str, references: Sequence[str] = ("",)) -> Row:
    """Return the row of a whole prompt that a user typed. Without references its target is EOS."""
    return Row(
        set="question",
        task="question",
        category="question",
        id="question",
        position=-1,
        prompt=prompt,
        references=list(references),
    )


def row_of_question(instruction: str, text: str, tokenizer: Any, config: DataConfig) -> Row:
    """Return the row of an instruction and an input that a user typed.

    Its prompt is built like the prompts of the data. If the data are JSONL, the input may be empty.
    """
    if not instruction.strip() or not (text.strip() or config.is_jsonl):
        raise UserError('give both --ask "instruction" and --input "text"')
    if config.is_jsonl:
        return row_of_prompt(instruction_prompt(instruction, text))
    # The instruction is the definition, also for a run with --no-definition.
    prompt = render_prompt(
        {"definition": instruction},
        {"input": text},
        tokenizer,
        max_source_length=config.max_source_length,
    )
    return row_of_prompt(prompt)._replace(is_cut=not prompt.endswith(PROMPT_END))
