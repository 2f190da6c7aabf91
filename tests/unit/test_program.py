"""Tests of support/program.py: what a long computation shows. Others are where it is used."""

import time

from support import program


def test_a_long_computation_prints_lines_without_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(program, "BETWEEN_LINES", 0.1)
    for _ in program.progress(range(6), "train"):
        time.sleep(0.06)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 5
    assert all(line.startswith("train: ") and " of 6 after 00:00" in line for line in lines)
    for _ in program.progress(range(6), "short"):
        pass
    assert capsys.readouterr().err == ""
