"""The programs that make the bundled miniature of SNI, and the base SmolLM2."""

from helpers import refused
from sni import make_sni


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
        refused("nothing is overwritten", f"{program} --out .")
