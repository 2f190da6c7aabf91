"""Tests of support/program.py: files, and what a long computation shows.

programs/test_programs.py and programs/test_faults.py have others.
"""

import multiprocessing
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from support import program


def test_a_long_computation_prints_lines_without_a_terminal(monkeypatch, capsys):
    now = [0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with program.progress(None, "bars within one another", total=1):
        for _ in program.progress(range(20), "train"):
            now[0] += 25
    lines = capsys.readouterr().err.splitlines()
    shown = [line.partition(" after ")[0] for line in lines]
    assert shown == [f"train: {n} of 20" for n in range(3, 19, 3)]  # after a minute or more
    for _ in program.progress(range(6), "short"):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("parent, shown", [(None, True), ("a parent", False)])
def test_a_bar_is_shown_on_a_terminal_and_not_by_a_worker(parent, shown, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: parent)
    bar = program.progress(range(4), "train")
    assert bar.disable != shown
    assert not shown or bar.delay == 1  # short loops have no bar
    bar.close()


def test_threads_write_one_file_at_the_same_time(tmp_path):
    path = tmp_path / "file"
    both_write = threading.Barrier(2, timeout=60)

    def write(content):
        with program.atomic_write(path) as file:
            both_write.wait()
            file.write(content)

    contents = [b"one" * 10000, b"other" * 10000]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(write, contents))
    assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]
