"""Tests of the bundled miniature of Super-NaturalInstructions: its format and its splits."""

import json
import re
from pathlib import Path

import pytest

from helpers import run
from sni import make_sni

SNI = Path(make_sni.__file__).parent
KEYS = (
    "Contributors/Source/URL/Categories/Reasoning/Definition/Input_language/Output_language/"
    "Instruction_language/Domains/Positive Examples/Negative Examples/Instances/Instance License"
).split("/")
TASKS = {path.stem: json.loads(path.read_text("utf-8")) for path in (SNI / "tasks").glob("*.json")}


def task_list(name: str) -> list[str]:
    return (SNI / f"splits/{name}_tasks.txt").read_text("utf-8").split()


def test_differences_name_files_that_are_not_what_the_script_writes(tmp_path, monkeypatch):
    files = make_sni.all_files()
    monkeypatch.setattr(make_sni, "all_files", lambda: files)  # which takes a second
    assert make_sni.differences() == []

    make_sni.write(tmp_path)
    changed = ["splits/default/test_tasks.txt", "tasks/task001_first_word_of_list.json"]
    (tmp_path / changed[0]).write_text("")
    (tmp_path / changed[1]).unlink()
    (tmp_path / "tasks/task999_stranger.json").touch()
    (tmp_path / "own.jsonl").write_text("")
    changed = ["own.jsonl", *changed, "tasks/task999_stranger.json"]
    assert make_sni.differences(tmp_path) == changed


def test_programs_that_make_data_and_base_overwrite_nothing(tmp_path):
    (tmp_path / "tasks").mkdir()
    for program in ("sni/make_sni.py", "experiments/smollm2.py"):
        error = run(program, "--out", ".", cwd=tmp_path, code=2)
        assert "nothing is overwritten" in error


@pytest.mark.parametrize("name", TASKS)
def test_task_has_the_official_format_and_no_input_twice(name):
    task = TASKS[name]
    assert list(task) == KEYS
    assert len(task["Definition"]) == len(task["Categories"]) == 1
    assert 2 <= len(task["Positive Examples"]) <= 4
    assert len(task["Negative Examples"]) == 2

    rows = task["Instances"] + task["Positive Examples"] + task["Negative Examples"]
    assert len({row["input"] for row in rows}) == len(rows)
    for row in task["Instances"]:
        assert re.fullmatch(name[:7] + "-[0-9a-f]{32}", row["id"])
        assert len(set(row["output"])) == len(row["output"]) > 0
        for text in [row["input"], *row["output"]]:
            assert text.strip()


def test_each_task_is_on_one_list_of_each_split():
    for split in ("default", "pretrain"):
        listed = []
        for part in ("train", "test", "excluded"):
            listed += task_list(f"{split}/{part}")
        assert sorted(listed) == sorted(TASKS)
    assert task_list("pretrain/train") == task_list("default/excluded")
