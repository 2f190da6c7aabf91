"""Test of experiments/heuristics.py on the bundled and, if it is given, the real data."""

import re

import pytest

from helpers import ROOT, run

OFFICIAL = {  # ROUGE-L and exact match of 58 test tasks, with the official code
    "copy-demo": (29.6919, 23.3748),
    "copy-input": (16.5341, 0.3112),
}
PUBLISHED = {"copy-demo": 28.54, "copy-input": 14.20}  # ROUGE-L of all 119 test tasks


def scores(kind, data, cwd):
    """Return the number of tasks, ROUGE-L and exact match that the program prints."""
    output = run(f"experiments/heuristics.py {kind} --data", data, cwd=cwd)
    numbers = r" of (\d+) tasks: exact_match (\S+), rouge1 \S+, rougeL (\S+)\n"
    tasks, exact_match, rouge_l = map(float, re.search(numbers, output).groups())
    return tasks, rouge_l, exact_match


def test_heuristics_on_the_bundled_tasks(tmp_path):
    assert scores("copy-demo", ROOT / "sni", tmp_path) == (12, 16.7750, 7.8333)
    assert scores("copy-input", ROOT / "sni", tmp_path) == (12, 20.9104, 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OFFICIAL)
def test_heuristics_on_the_official_test_tasks(tmp_path, sni_dir, kind):
    tasks, *found = scores(kind, sni_dir, tmp_path)
    if tasks == 119:
        assert found[0] == pytest.approx(PUBLISHED[kind], abs=0.05)
    else:
        assert found == pytest.approx(OFFICIAL[kind], abs=5e-5)
