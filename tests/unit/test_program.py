"""Tests of support/program.py: files, signals, and what a long computation shows.

programs/test_programs.py and programs/test_faults.py have others.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import data
from support import program


@pytest.fixture
def clock(monkeypatch):
    """Let the tests say what time it is for a bar."""
    now = [0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def lines_shown(capsys):
    lines = capsys.readouterr().err.splitlines()
    return [line.partition(" after ")[0] for line in lines]


def test_a_long_computation_prints_true_lines_without_a_terminal(clock, capsys):
    with program.progress(None, "bars within one another", total=1):
        for step in program.progress(range(20), "train"):
            clock[0] += 25
            if step == 9:
                program.print_line("step 10", sys.stderr)
    expected = [f"train: {n} of 20" for n in range(3, 19, 3)]  # after a minute or more
    expected.insert(3, "step 10")
    assert lines_shown(capsys) == expected
    for _ in program.progress(range(6), "short"):
        pass
    assert capsys.readouterr().err == ""


def test_the_steps_that_tqdm_skips_do_not_make_a_line_false(clock, capsys):
    """After quick steps tqdm would look at the time rarely, and its monitor print an old number."""
    with program.progress(range(1000), "train") as bar:
        for step in bar:
            clock[0] += 1
            if step == 500:
                assert bar.miniters == 1  # so that the monitor prints nothing
    assert lines_shown(capsys)[:2] == ["train: 60 of 1000", "train: 120 of 1000"]


def test_a_batch_of_generation_counts_as_progress(clock, small_t5, examples, capsys):
    for _ in data.batches(examples, 1, small_t5.device, "generate"):
        clock[0] += 70
    assert lines_shown(capsys) == [f"generate: {n} of 4" for n in range(1, 5)]


def test_a_signal_is_answered_at_once():
    said = []
    for kind in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(kind)
        with program.stop_signals(said.append) as stop_requested:
            assert not stop_requested()
            signal.raise_signal(kind)
            assert stop_requested()
            assert said.pop() == "stopping after this step; Ctrl-C stops at once"
            signal.raise_signal(signal.SIGTERM)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(kind) == handler


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_outside_of_training_ends_a_program_with_a_line(kind, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    previous = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            program.run_program(lambda: signal.raise_signal(kind))
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert end.value.code == 130
    assert capsys.readouterr().err == "train.py: stopped\n"


def test_a_closed_stdout_ends_a_program_with_a_line():
    """As in `train.py | head`."""
    code = "from support import program; program.run_program(lambda: program.print_line('a'))"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        cwd=program.ROOT,
    )
    os.close(writing)
    assert done.returncode == 2
    assert done.stderr == "-c: stopped, since nothing reads its output\n"


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
