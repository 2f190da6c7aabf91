"""Tests of tasks.py: task files, split lists, rows, both splits, the prompt.

parity/test_official_sni.py compares prompts with the official ones.
"""

import json

import numpy as np
import pytest

from helpers import Bytes, task_json, write_lists, write_rows, write_task
from support import program
from tasks import (
    NO_TASK,
    RowSplit,
    hash_of,
    read_rows,
    read_splits,
    read_task,
    render_prompt,
    split_instances,
)

# --------------------------------------------------------------------------------- tasks and splits


def test_read_task_accepts_older_and_odd_forms(tmp_path):
    examples = [{"input": "a", "output": "b"}]  # without explanations
    blank = " \r\n\u00a0\x00"
    task = task_json(
        Definition="Sort them.",
        Categories=["One", "Two"],
        Instances=[
            {"input": "", "output": blank},
            {"id": 7, "input": "a", "output": ["b", "c"]},
            {"id": None, "input": "a", "output": "b"},
        ],
        **{"Positive Examples": examples, "Negative Examples": []},
    )
    # task_json has a NaN, too.
    path = write_task(tmp_path, "task1_x", b"\xef\xbb\xbf" + json.dumps(task).encode())
    assert read_task(path) == {
        "name": "task1_x",
        "category": "One",
        "definition": "Sort them.",
        "positive": examples,
        "negative": [],
        "instances": [
            {"id": "task1_x-0", "input": "", "output": [blank]},
            {"id": "7", "input": "a", "output": ["b", "c"]},
            {"id": "task1_x-2", "input": "a", "output": ["b"]},
        ],
    }
    path = write_task(tmp_path, "task1_x", task_json(Definition=["One.", "Two."], Categories=[]))
    assert read_task(path)["definition"] == "One."
    assert read_task(path)["category"] == "Unknown"


def instance(**row) -> dict:
    return task_json(Instances=[{"input": "b", "output": ["c"]}, {"input": "y", **row}])


BAD_TASKS = {  # what the error says: content of a task file
    "Expecting property name": b"{",
    ": Definition must be a string, not 3;": task_json(Definition=[3]),
    "Instances is empty": task_json(Instances=[]),
    "KeyError: 'output'": instance(),
    r"Instances\[1\]: output is empty": instance(output=[]),
    r"Instances\[1\]: output must be a string, not 3.5": instance(output=["a", 3.5]),
    r"Instances\[1\]: input must be a string, not None": instance(input=None, output="a"),
    r"Negative Examples\[0\]: output must be a string, not 3": task_json(
        **{"Negative Examples": [{"input": "a", "output": 3}]}
    ),
    r"Instances\[1\]: output is not valid Unicode": instance(output=["a", "\ud800"]),
}


@pytest.mark.parametrize("problem, content", BAD_TASKS.items(), ids=BAD_TASKS)
def test_read_task_refuses_a_bad_file_in_one_line_that_names_it(tmp_path, problem, content):
    path = write_task(tmp_path, "task1_x", content)
    with pytest.raises(ValueError, match=problem) as caught:
        read_task(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_read_splits_skips_missing_tasks_with_one_warning(repository, capsys):
    train = ["task3_c", "task404_gone", "", "task1_a", "task3_c"]
    write_lists(repository, train, ["task9_t", "task5_gone"])
    for _ in range(2):
        assert read_splits(repository) == {"train": ["task3_c", "task1_a"], "test": ["task9_t"]}
    (warning,) = capsys.readouterr().err.splitlines()
    missing = "sni/tasks: 2 tasks of splits/default are missing, such as task404_gone"
    assert warning.endswith(missing)


@pytest.mark.parametrize(
    "train, problem",
    [
        (["task1_a", "task9_t"], "splits/default: task9_t is on both lists"),
        (["a/b"], "plain name"),
        (["a\\b"], "plain name"),
        ([".."], "plain name"),
        (["\0"], "plain name"),
        (["a" * 999], "plain name"),
    ],
)
def test_read_splits_refuses_bad_lists(repository, train, problem):
    write_lists(repository, train, ["task9_t"])
    with pytest.raises(ValueError, match=problem):
        read_splits(repository)


def test_read_splits_needs_a_plain_folder(repository):
    with pytest.raises(ValueError, match="--splits: .* plain name"):
        read_splits(repository, "../splits/default")
    with pytest.raises(ValueError, match="train_tasks.txt.*git clone"):
        read_splits(repository, "other")


@pytest.mark.parametrize("n", [0, 4, 5, 30, 139, 140, 1000])
def test_split_instances_gives_disjoint_sets_and_the_start_of_a_larger_train(n):
    train, dev, seen = split_instances(range(n), "task1_a", 1000)
    assert sorted(train + dev + seen) == list(range(n))
    assert len(dev) == len(seen) == min(20, n // 5)
    assert split_instances(range(n), "task1_a", 10) == (train[:10], dev, seen)


def test_split_instances_never_changes():
    """A run that is evaluated, or resumed, years later must find its own sets."""
    sets = split_instances(range(12), "task1_a", 5)
    assert sets == ([6, 7, 8, 9, 2], [5, 4], [1, 10])
    assert sets != split_instances(range(12), "task1_b", 5)


def test_split_instances_keeps_copies_on_one_side():
    """Half of the contents occur three times. None is in two sets. Dev and seen have each once."""
    contents = np.array([*range(100), *range(50), *range(50)])
    parts = split_instances(contents.tolist(), "task1_a", 500)
    train, dev, seen = [contents[part].tolist() for part in parts]
    assert len(dev) == len(seen) == 20
    assert sorted([*set(train), *dev, *seen]) == list(range(100))
    for content in train:
        assert train.count(content) == (3 if content < 50 else 1)


# ------------------------------------------------------------------------------------ rows of JSONL


def test_read_rows_takes_the_usual_fields(tmp_path):
    rows = [
        b'\xef\xbb\xbf{"prompt": "Say\\u0000 it.", "completion": ["y", "n"], '
        b'"task": "t", "id": 7, "input": ""}',
        b'{"instruction": "Sort.", "input": "b a", "output": "a b", "task": null, "prompt": null}',
        {"instruction": "Sort.", "context": "", "response": "a b", "category": "c"},
        b" \r",
        b'{"instruction": "Sort.", "input": null, "output": "", "task": "t", "id": null}',
        {"instruction": "Sort.", "input": "", "context": "b a", "output": "a b", "messages": None},
    ]
    asked = {"form": "instruction", "output": ["a b"]}
    expected = {
        "t": [
            {"id": "7", "form": "prompt", "input": "Say\0 it.", "output": ["y", "n"]},
            asked | {"id": "5", "input": "Sort.", "output": [""]},  # a blank line counts as a line
        ],
        NO_TASK: [
            asked | {"id": "2", "input": "b a", "definition": "Sort."},
            asked | {"id": "3", "input": "Sort."},
            asked | {"id": "6", "input": "b a", "definition": "Sort."},
        ],
    }
    tasks = read_rows(write_rows(tmp_path / "own.jsonl", rows))
    assert {task["name"]: task["instances"] for task in tasks} == expected


BAD_ROWS = {  # what the error says: a line of a JSONL file
    "there is no prompt or instruction": {"text": "a"},
    "there is no completion or output or response": {"prompt": "a"},
    "JSONDecodeError: Invalid control": b'{"prompt": "a\0"}',
    "longer than 1000000 bytes": b'{"prompt": "%s", "completion": "b"}' % (b"a" * 10**6),
    "not a JSON object": 3,
    "UnicodeDecodeError": '{"prompt": "\u00e9"}'.encode("latin-1"),
    "messages, .* SFTTrainer, see docs/use.md, or write each": {"messages": []},
    "chat messages, whose template": {"conversations": [{"from": "human"}]},
    "it has chat messages, whose": {"prompt": [{"role": "user"}], "completion": "b"},
    "prompt must be a string, not 3; repair the line": {"prompt": 3, "completion": "b"},
    "task must be a string, not 3": {"prompt": "a", "completion": "b", "task": 3},
    "completion must be a string, not 3": {"prompt": "a", "completion": ["b", 3]},
    r"context must be a string, not \[\]": {"instruction": "a", "context": [], "output": "b"},
    "prompt and input: write the whole": {"prompt": "a", "input": "c", "output": "b"},
    "input and context: give one": {
        "instruction": "a",
        "input": "c",
        "context": "d",
        "output": "b",
    },
    "prompt and instruction: give one": {"prompt": "a", "instruction": "c", "output": "b"},
    "output and response: give one": {"prompt": "a", "output": "b", "response": "c"},
    "prompt is empty": {"prompt": " ", "completion": "b"},
    "completion is empty": {"prompt": "a", "completion": []},
}


@pytest.mark.parametrize("problem, row", BAD_ROWS.items(), ids=BAD_ROWS)
def test_read_rows_refuses_a_bad_line_in_one_line_that_names_it(tmp_path, problem, row):
    good = {"prompt": "a", "completion": "b"}
    path = write_rows(tmp_path / "own.jsonl", [good, row, good])
    with pytest.raises(program.UserError, match=problem) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def split(count, prefix="Say"):
    """Return {set: prompts} of a file with so many different prompts, and how it was filled."""
    instances = [{"input": f"{prefix} {i}."} for i in range(count)]
    row_split = RowSplit(instances + instances[: count // 2])
    assert row_split.num_prompts == count
    sets = {"train": set(), "dev": set(), "seen": set()}
    for instance in instances:
        sets[row_split.set_of(instance)].add(instance["input"])
    return sets, row_split.filled


def test_rows_stay_in_their_sets_when_lines_are_added():
    found, filled = split(3000)
    assert [len(found[name]) for name in ("train", "dev", "seen")] == [2823, 62, 115]
    assert not filled
    more, _ = split(4000)
    for name, texts in found.items():
        assert texts <= more[name]


@pytest.mark.parametrize("count", [1, 7, 40, 100, 200, 1000])
def test_small_sets_of_rows_are_filled_up_in_the_order_of_the_hash(count):
    """This counts in another way than RowSplit: in a list of (hash % 100, hash)."""
    hashes = {text: hash_of(text) for text in (f"Say {i}." for i in range(count))}
    order = sorted(hashes, key=lambda text: (hashes[text] % 100, hashes[text]))
    dev = [text for text in order if hashes[text] % 100 < 2]
    dev = order[: max(len(dev), min(8, count // 5))]
    rest = order[len(dev) :]
    in_range = [text for text in rest if hashes[text] % 100 < 6]
    seen = rest[: max(len(in_range), min(16, count // 5))]

    sets, filled = split(count)
    assert sets["dev"] == set(dev)
    assert sets["seen"] == set(seen)
    own = (sum(hash_of(t) % 100 < 2 for t in order), sum(hash_of(t) % 100 < 6 for t in order))
    assert bool(filled) == (own != (len(dev), len(dev) + len(seen)))
    if count >= 40:
        assert min(len(dev), len(seen)) >= 8


def test_how_sets_were_filled_tells_two_files_apart():
    filled = {split(100, prefix)[1] for prefix in ("Say", "Tell")} | {split(80)[1]}
    assert len(filled) == 3


# ------------------------------------------------------------------------------------------- prompt


def test_prompt_has_the_official_parts():
    example = {"input": "river", "output": "stone", "explanation": "So it is."}
    task = {"definition": "Sort the words.", "positive": [example] * 2, "negative": [example]}
    prompt = render_prompt(task, {"input": " x! "}, Bytes(), num_pos=1, num_neg=1, explanation=True)
    assert prompt == (
        "Definition: Sort the words.\n\n"
        " Positive Example 1 -\nInput: river.\n Output: stone.\n Explanation: So it is.\n\n"
        " Negative Example 1 -\nInput: river.\n Output: stone.\n Explanation: So it is.\n\n"
        "Now complete the following example -\nInput: x!\nOutput: "
    )


def test_prompt_takes_examples_while_the_whole_fits():
    task = {"definition": "Sort the words.", "positive": [{"input": "a", "output": "b"}] * 3}
    full = len(Bytes().encode(render_prompt(task, {"input": "x"}, Bytes(), num_pos=3)))
    for limit, count in ((full + 1, 3), (full, 2)):  # with three, the check has one space more
        source = render_prompt(task, {"input": "x"}, Bytes(), num_pos=3, max_source_length=limit)
        assert source.count("Positive Example") == count
        assert source.endswith("Input: x.\nOutput: ")
    cut = render_prompt(task, {"input": "x" * 50}, Bytes(), max_source_length=60)
    assert cut.startswith("Definition: Sort the words.\n\nNow complete")
    assert len(cut) == 60
