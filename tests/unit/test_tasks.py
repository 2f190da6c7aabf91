"""Tests of tasks.py: task files, split lists, both splits, the prompt, rows.

parity/test_official_sni.py compares prompts with the official ones.
"""

import json

import numpy as np
import pytest

from helpers import ROOT, Bytes, own_rows, refusal, task_json, write_lists, write_rows, write_task
from support import program
from tasks import (
    NO_TASK,
    DataConfig,
    find_files,
    hash_of,
    jsonl_rows,
    read_rows,
    read_splits,
    read_task,
    render_prompt,
    row_of_question,
    sni_rows,
    split_instances,
    split_key,
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


def instance(**row):
    return task_json(Instances=[{"input": "b", "output": ["c"]}, {"input": "y", **row}])


BAD_TASKS = {  # what the error says: content of a task file
    "Expecting property name": b"{",
    "RecursionError": b"[" * 100_000,
    "not a JSON object": b"[]",
    "an object gives the key 'Definition' twice": b'{"Definition": ["a"], "Definition": ["b"]}',
    ": each text must be a string, not 3;": task_json(Definition=[3]),
    "Instances is empty": task_json(Instances=[]),
    "KeyError: 'output'": instance(),
    ": output is empty": instance(output=[]),
    "output must be a string, not 3.5": instance(output=["a", 3.5]),
    "each text must be a string, not None": instance(input=None, output="a"),
    "each text must be a string, not 4": task_json(
        **{"Negative Examples": [{"input": "a", "output": 4}]}
    ),
    "output is not valid Unicode": instance(output=["a", "\ud800"]),
}


@pytest.mark.parametrize("problem, content", BAD_TASKS.items(), ids=BAD_TASKS)
def test_read_task_refuses_a_bad_file_in_one_line_that_names_it(tmp_path, problem, content):
    path = write_task(tmp_path, "task1_x", content)
    with refusal(f"^{path}.*{problem}"):
        read_task(path)


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
    with refusal(problem):
        read_splits(repository)


def test_read_splits_needs_a_plain_folder(repository):
    with refusal("--splits: .* plain name"):
        read_splits(repository, "../splits/default")
    with refusal("train_tasks.txt.*git clone"):
        read_splits(repository, "other")


@pytest.mark.parametrize("n", [0, 4, 5, 30, 139, 140, 1000])
def test_split_instances_gives_disjoint_sets_and_the_start_of_a_larger_train(n):
    train, dev, seen = split_instances(range(n), "task1_a", 1000)
    assert sorted(train + dev + seen) == list(range(n))
    assert len(dev) == len(seen) == min(20, n // 5)
    assert split_instances(range(n), "task1_a", 10) == (train[:10], dev, seen)


def test_the_sets_of_instances_and_prompts_never_change():
    """A run that is evaluated, or resumed, years later must find its own sets."""
    assert split_key("Say 1.") == (7, 18308017611245504807)
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
    lines = [
        b'\xef\xbb\xbf{"prompt": "Say\\u0000 it.", "completion": ["y", "n"], '
        b'"task": "t", "id": 7, "input": ""}',
        b'{"instruction": "Sort.", "input": "b a", "output": "a b", "task": null, "prompt": null}',
        {"instruction": "Sort.", "context": "", "response": "a b", "category": "c", "task": ""},
        b" \r",
        b'{"instruction": "Sort.", "input": null, "output": "", "task": "t", "id": null}',
        {"instruction": "Sort.", "input": None, "context": "b a", "output": "a b"},
        {"prompt": "Sort.\n", "completion": "a", "system": "", "history": []},
    ]
    rows = read_rows(write_rows(tmp_path / "own.jsonl", lines))
    found = [(row.id, row.task, row.prompt, row.references) for row in rows]
    assert found == [
        ("7", "t", "Say\0 it.", ["y", "n"]),
        ("2", NO_TASK, "Sort.\n\nb a\n\n", ["a b"]),
        ("3", NO_TASK, "Sort.\n\n", ["a b"]),
        ("5", "t", "Sort.\n\n", [""]),  # a blank line counts as a line
        ("6", NO_TASK, "Sort.\n\nb a\n\n", ["a b"]),
        ("7", NO_TASK, "Sort.\n", ["a"]),
    ]
    assert [row.position for row in rows] == list(range(6))


BAD_ROWS = {  # what the error says: a line of a JSONL file
    r"that is not null; the fields are \['question', 'answer', 'prompt'\]; repair": {
        "question": "a",
        "answer": "b",
        "prompt": None,
    },
    r"the fields are \['d{78}; repair": {"d" * 999: 1},
    r"the fields are \['prompt'\]": {"prompt": "a"},
    "JSONDecodeError: Invalid control": b'{"prompt": "a\0"}',
    "not a JSON object": 3,
    "an object gives the key 'prompt' twice": b'{"prompt": "a", "prompt": "b", "completion": "c"}',
    "system: it is not read; write it into": {"system": "Be brief.", "prompt": "a", "output": "b"},
    "history: it is not read": {"instruction": "a", "output": "b", "history": [["c", "d"]]},
    "UnicodeDecodeError: 'utf-8'": '{"prompt": "a"}'.encode("utf-16"),
    "messages, .* SFTTrainer, see docs/use.md, or write each": {"messages": []},
    "chat messages, whose template": {"conversations": [{"from": "human"}]},
    "it has chat messages, whose": {"prompt": [{"role": "user"}], "completion": "b"},
    "prompt must be a string, not 3; repair the line": {"prompt": 3, "completion": "b"},
    "task must be a string, not 3": {"prompt": "a", "completion": "b", "task": 3},
    "task must be a string, not 0": {"prompt": "a", "completion": "b", "task": 0},
    "the answer must be a string, not 3": {"prompt": "a", "completion": ["b", 3]},
    r"input must be a string, not \[\]": {"instruction": "a", "context": [], "output": "b"},
    "prompt: it is the whole prompt; leave out instruction, input and": {
        "prompt": "a",
        "input": "c",
        "output": "b",
    },
    "context: the row has this field by another name, too": {
        "instruction": "a",
        "input": "c",
        "context": "d",
        "output": "b",
    },
    "prompt: it is the whole": {"prompt": "a", "instruction": "c", "output": "b"},
    "give a prompt or an instruction that is not blank": {"prompt": " ", "completion": "b"},
    "the answer is empty": {"prompt": "a", "completion": []},
}


@pytest.mark.parametrize("problem, row", BAD_ROWS.items(), ids=BAD_ROWS)
def test_read_rows_refuses_a_bad_line_in_one_line_that_names_it(tmp_path, problem, row):
    good = {"prompt": "a", "completion": "b"}
    path = write_rows(tmp_path / "own.jsonl", [good, row, good])
    with refusal(f"^{path}, line 2: .*{problem}", program.UserError):
        read_rows(path)


def prompts_by_set(tmp_path, rows, train_limit=None):
    """Return {set: prompts in order} of a file of these rows, and the facts about it."""
    path = write_rows(tmp_path / "own.jsonl", rows)
    found, facts = jsonl_rows({"train": [path], "test": []}, train_limit)
    sets = {"train": [], "dev": [], "seen": []}
    for row in found:
        sets[row.set].append(row.prompt)
    return sets, facts


@pytest.mark.parametrize("count", [17, 40, 300, 2700, 5000])
def test_the_order_of_the_hash_decides_the_set(tmp_path, count):
    """The expected sets follow the words of the rule, and hold sort keys in place of prompts."""
    rows = own_rows(count)
    order = sorted((hash_of(row["prompt"]) % 100, hash_of(row["prompt"])) for row in rows)
    dev_end = sum(remainder < 2 for remainder, _ in order)
    dev_end = max(dev_end, min(50, max(8, count // 10)))
    seen_end = sum(remainder < 6 for remainder, _ in order)
    seen_end = max(seen_end, dev_end + min(100, max(8, count // 5)))

    sets, _ = prompts_by_set(tmp_path, rows + rows[: count // 2])  # half of them occur twice
    found = {}
    for name, prompts in sets.items():
        found[name] = sorted((hash_of(prompt) % 100, hash_of(prompt)) for prompt in set(prompts))
    expected = {"dev": order[:dev_end], "seen": order[dev_end:seen_end], "train": order[seen_end:]}
    assert found == expected


def test_rows_of_a_large_file_stay_in_their_sets_when_lines_are_added(tmp_path):
    sets, facts = prompts_by_set(tmp_path, own_rows(5000))
    assert facts["held_out"] == [[2, 0], [6, 0]]
    more, facts_of_more = prompts_by_set(tmp_path, own_rows(7000)[::-1])
    assert facts_of_more == facts
    for name, prompts in sets.items():
        assert set(prompts) <= set(more[name])


def test_an_instruction_and_its_text_as_a_prompt_are_in_one_set(tmp_path):
    """Only the empty line at the end of an instruction tells the two prompts apart."""
    rows = own_rows(60)
    asked = [{"instruction": row["prompt"], "output": "a"} for row in rows]
    sets, _ = prompts_by_set(tmp_path, rows + asked)
    for prompts in sets.values():
        texts = sorted(prompt.removesuffix("\n\n") for prompt in prompts)
        assert texts[::2] == texts[1::2]


def test_training_rows_are_the_first_of_each_task(tmp_path):
    rows = [row | {"task": "ab"[i % 3 == 0]} for i, row in enumerate(own_rows(100))]
    whole, facts = prompts_by_set(tmp_path, rows)
    part, facts_of_part = prompts_by_set(tmp_path, rows, train_limit=3)
    assert facts_of_part == facts and part["dev"] == whole["dev"] and part["seen"] == whole["seen"]
    expected = []
    for name in "ab":
        prompts = [row["prompt"] for row in rows if row["task"] == name]
        expected += [prompt for prompt in whole["train"] if prompt in prompts][:3]
    assert sorted(part["train"]) == sorted(expected)


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


# -------------------------------------------------------------------------------------- rows of SNI


def test_a_question_has_no_examples_and_always_its_instruction():
    config = DataConfig(data="sni", definition=False)
    row = row_of_question("Sort them.", "b a", Bytes(), config)
    assert row.prompt == (
        "Definition: Sort them.\n\nNow complete the following example -\nInput: b a.\nOutput: "
    )


def test_instances_with_equal_inputs_and_outputs_are_in_one_set(repository):
    rows = [{"input": f"{i}", "output": output} for i in range(30) for output in "aab"]
    write_task(repository, "task3_c", task_json(Instances=rows))
    write_lists(repository, ["task3_c"], [])
    config = DataConfig(data=str(repository))
    found = {}
    for row in sni_rows(find_files(config), Bytes(), config):
        content = (rows[row.position]["input"], *row.references)
        found.setdefault(row.set, set()).add(content)
    train, dev, seen = found.values()
    assert len(train) + len(dev) + len(seen) == len(train | dev | seen) == 60


def test_a_share_of_the_training_prompts_has_no_examples():
    def with_examples(share):
        config = DataConfig(data=str(ROOT / "sni"), bare_share=share, max_tasks=4)
        found = {}
        for row in sni_rows(find_files(config), Bytes(), config):
            found.setdefault(row.set, []).append("Positive Example 1" in row.prompt)
        return found

    half = with_examples(0.5)
    assert 0.4 < sum(half["train"]) / len(half["train"]) < 0.6
    assert half == with_examples(0.5)
    for name in ("dev", "seen", "test"):  # these have the official prompt
        assert all(half[name])
    assert all(with_examples(0.0)["train"])
    assert not any(with_examples(1.0)["train"])
