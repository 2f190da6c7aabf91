"""Tests of the bundled miniature of Super-NaturalInstructions: format, splits, balance, answers.

The answers are found a second time here, by other means than those of sni/make_sni.py.
"""

import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from sni import make_sni

SNI = Path(make_sni.__file__).parent
KEYS = [
    "Contributors",
    "Source",
    "URL",
    "Categories",
    "Reasoning",
    "Definition",
    "Input_language",
    "Output_language",
    "Instruction_language",
    "Domains",
    "Positive Examples",
    "Negative Examples",
    "Instances",
    "Instance License",
]
TASKS = {
    path.stem: json.loads(path.read_text("utf-8"))
    for path in sorted((SNI / "tasks").glob("task*.json"))
}


def names(split: str, part: str) -> list[str]:
    return (SNI / f"splits/{split}/{part}_tasks.txt").read_text("utf-8").split()


def inputs(task: dict) -> list[str]:
    return [instance["input"] for instance in task["Instances"]]


def words(*texts: str) -> set[str]:
    return set(re.findall(r"\w+", " ".join(texts)))


def test_disk_holds_what_the_script_writes(tmp_path):
    assert make_sni.differences() == []
    make_sni.write(tmp_path)
    (tmp_path / "tasks" / "task001_first_word_of_list.json").unlink()
    (tmp_path / "tasks" / "task999_stranger.json").touch()
    (tmp_path / "splits" / "default" / "test_tasks.txt").write_text("")
    assert make_sni.differences(tmp_path) == [
        "splits/default/test_tasks.txt",
        "tasks/task001_first_word_of_list.json",
        "tasks/task999_stranger.json",
    ]


def test_it_is_small_and_varied():
    assert (
        sum(path.stat().st_size for path in SNI.rglob("*.*") if "__pycache__" not in path.parts)
        <= 5e6
    )
    assert len(TASKS) >= 40
    for part in ("train", "test", "excluded"):
        assert len({TASKS[name]["Categories"][0] for name in names("default", part)}) >= 8
    definitions = [task["Definition"][0] for task in TASKS.values()]
    assert len(set(definitions)) == len(definitions)
    several = [
        task for task in TASKS.values() if any(len(i["output"]) > 1 for i in task["Instances"])
    ]
    assert len(several) >= len(TASKS) / 4


@pytest.mark.parametrize("name", TASKS)
def test_format(name):
    task = TASKS[name]
    assert list(task) == KEYS
    assert len(task["Definition"]) == len(task["Categories"]) == 1
    assert 2 <= len(task["Positive Examples"]) <= 4 and len(task["Negative Examples"]) == 2
    assert len(task["Instances"]) >= 100
    ids = [instance["id"] for instance in task["Instances"]]
    assert len(set(ids)) == len(ids) and all(
        re.fullmatch(name[:7] + "-[0-9a-f]{32}", i) for i in ids
    )
    for instance in task["Instances"]:
        assert set(instance) == {"id", "input", "output"} and instance["input"].strip()
        references = instance["output"]
        assert isinstance(references, list) and 1 <= len(references) <= 4
        assert all(isinstance(r, str) and r.strip() for r in references)
        assert len(set(references)) == len(references)


@pytest.mark.parametrize("name", TASKS)
def test_no_input_comes_twice(name):
    examples = TASKS[name]["Positive Examples"] + TASKS[name]["Negative Examples"]
    assert all(isinstance(e[key], str) and e[key].strip() for e in examples for key in e)
    everything = inputs(TASKS[name]) + [example["input"] for example in examples]
    assert len(set(everything)) == len(everything)
    right = [example["output"] for example in TASKS[name]["Positive Examples"]]
    assert len(set(right)) == len(right)


def test_splits_are_disjoint_and_complete():
    for split in ("default", "pretrain"):
        listed = [name for part in ("train", "test", "excluded") for name in names(split, part)]
        assert sorted(listed) == sorted(TASKS)
    assert names("pretrain", "test") == []
    assert names("pretrain", "train") == names("default", "excluded")
    assert {len(TASKS[name]["Instances"]) for name in names("default", "train")} == {140}
    assert {len(TASKS[name]["Instances"]) for name in names("default", "test")} == {100}


def test_labels_are_balanced():
    """A task whose answers are at most four words or numbers is a classification."""
    balanced = []
    for name, task in TASKS.items():
        times = Counter(instance["output"][0] for instance in task["Instances"])
        if len(times) <= 4:
            balanced.append(name)
            assert max(times.values()) - min(times.values()) <= (
                name not in names("default", "test")
            )
    assert len(balanced) >= 10 and len(set(balanced) & set(names("default", "test"))) >= 2


def test_text_holds_every_word_that_adapters_meet():
    rng = Random(0)
    text = words(*(make_sni.text_line(rng) for _ in range(10_000)))
    for name in names("default", "train") + names("default", "test"):
        outputs = [
            reference for instance in TASKS[name]["Instances"] for reference in instance["output"]
        ]
        assert words(*TASKS[name]["Definition"], *inputs(TASKS[name]), *outputs) <= text, name


# ------------------------------------------------ the answers again, from the text of the input

ANTONYMS = [
    set(pair.split("/"))
    for pair in (
        "big/small old/new heavy/light wet/dry clean/dirty cheap/expensive ugly/pretty strong/weak "
        "long/short thick/thin hard/soft rough/smooth hot/cold fast/slow full/empty loud/quiet "
        "high/low wide/narrow sharp/blunt bright/dark safe/dangerous sweet/sour happy/sad "
        "brave/afraid"
    ).split()
]
ANIMALS = set(
    "dog cat cow horse goat hen duck pig bear goose owl frog mouse wolf lion tiger rabbit monkey "
    "fox camel".split()
)
PRAISE = set(
    "wonderful lovely excellent great perfect pleasant superb fantastic amazing charming".split()
)
MOOD = ("negative", "mixed", "positive")
EVENT = re.compile(
    r"(?:(?:In|On) \w+, )?(?P<who>\w+) the (?P<job>\w+) "
    r"(?P<deed>\w+ an? (?P<adj>\w+) (?P<thing>\w+)).*\."
)


def opposite(adjective: str) -> str:
    return next((pair - {adjective}).pop() for pair in ANTONYMS if adjective in pair)


def held(text: str) -> dict[str, int]:
    return {who: int(n) for who, n in re.findall(r"(\w+) has (\d+)", text)}


def has_thing(text: str) -> bool:
    who, thing = re.search(r"Does (\w+) have the (\w+)\?", text).groups()
    return re.search(rf"{who} has an? \w+ {thing}\.", text) is not None


def praised(text: str) -> list[tuple[str, bool]]:
    return [
        (what, adjective in PRAISE)
        for what, adjective in re.findall(r"The (\w+) was (\w+)\.", text)
    ]


def cleft(word: str, text: str) -> str:
    """'It was on Monday that ...' from a sentence with 'on Monday'; or the same with 'in'."""
    name = re.search(rf"\b(?:{word}|{word.title()}) ([A-Z]\w+)", text)[1]
    return EVENT.sub(rf"It was {word} {name} that \g<who> \g<deed>.", text)


def yes_no(truth: bool) -> str:
    return "Yes" if truth else "No"


SOLVERS = {
    "task101_second_word_of_list": lambda t: re.match(r"\w+, (\w+)", t)[1],
    "task102_last_word_of_list": lambda t: re.search(r"\w+$", t)[0],
    "task103_all_but_the_first": lambda t: t.partition(", ")[2],
    "task105_all_animals_of_list": lambda t: ", ".join(w for w in t.split(", ") if w in ANIMALS),
    "task107_contains_opposites": lambda t: yes_no(any(pair <= words(t) for pair in ANTONYMS)),
    "task109_opposite_of_each_adjective": lambda t: re.sub(r"\w+", lambda m: opposite(m[0]), t),
    "task113_largest_number": lambda t: str(sorted(map(int, t.split(",")))[-1]),
    "task114_how_many_more": lambda t: str(abs(int.__sub__(*held(t).values()))),
    "task118_it_was_the_day": lambda t: cleft("on", t),
    "task119_title_with_person_and_thing": lambda t: EVENT.sub(r"\g<who> and the \g<thing>", t),
    "task122_has_the_person_the_thing": lambda t: yes_no(has_thing(t)),
    "task123_question_has_an_answer": lambda t: yes_no(t.count(re.search(r"does (\w+)", t)[1]) > 1),
    "task124_who_has_the_most": lambda t: max(held(t), key=held(t).get),
    "task125_last_place_of_the_trip": lambda t: t.rstrip(".").split()[-1],
    "task126_what_was_good": lambda t: next(what for what, good in praised(t) if good),
    "task127_positive_negative_or_mixed": lambda t: MOOD[sum(good for _, good in praised(t))],
    "task203_last_animal_of_list": lambda t: next(
        w for w in reversed(t.split(", ")) if w in ANIMALS
    ),
    "task204_opposites_of_all_but_the_first": lambda t: ", ".join(map(opposite, t.split(", ")[1:])),
    "task205_second_and_last_are_opposites": lambda t: yes_no(set(t.split(", ")[1::2]) in ANTONYMS),
    "task206_count_the_animals": lambda t: str(len(ANIMALS & words(t))),
    "task207_the_most_things": lambda t: str(max(held(t).values())),
    "task208_opposite_of_the_adjective": lambda t: opposite(EVENT.match(t)["adj"]),
    "task212_it_was_the_city": lambda t: cleft("in", t),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_answers_found_again(name):
    for item in TASKS[name]["Instances"] + TASKS[name]["Positive Examples"]:
        outputs = item["output"] if isinstance(item["output"], list) else [item["output"]]
        assert SOLVERS[name](item["input"]) == outputs[0]
    for item in TASKS[name]["Negative Examples"]:
        assert SOLVERS[name](item["input"]) != item["output"]
