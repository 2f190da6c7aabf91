"""Tests of metrics.py against a quadratic LCS and scores by hand.

parity/ compares with the official numbers and with rouge_score.
"""

import random
import subprocess
import sys
from pathlib import Path

import pytest

import metrics


def test_lcs_equals_the_quadratic_dynamic_programme():
    rng = random.Random(1)
    for _ in range(300):
        a, b = (rng.choices("abcd", k=rng.randrange(0, 150)) for _ in range(2))
        row = [0] * (len(b) + 1)
        for x in a:
            previous = row[:]
            for j, y in enumerate(b):
                row[j + 1] = previous[j] + 1 if x == y else max(previous[j + 1], row[j])
        assert metrics._lcs(a, b) == row[-1]


def test_exact_match_keeps_articles_and_drops_punctuation():
    assert metrics.exact_match(" The  cat. ", ["no", "the cat"]) == 1
    assert metrics.exact_match("cat", ["the cat"]) == 0


def test_texts_without_a_token_score_zero_even_when_equal():
    assert metrics.rouge_l("?!", ["?!"]) == metrics.rouge_1("", [""]) == 0
    assert metrics.exact_match("", [""]) == 1


def test_score_takes_the_best_reference_and_averages_over_instances():
    def record(task, category, prediction, references):
        return {
            "task": task,
            "category": category,
            "prediction": prediction,
            "references": references,
        }

    scores = metrics.score(
        [
            record("t1", "c", "a b", ["x", "a b"]),
            record("t1", "c", "", ["y"]),
            record("t2", "c", "q w", ["q"]),
            record("t3", "d", "n", ["n"]),
        ]
    )
    assert scores["tasks"]["t1"] == {"exact_match": 50, "rouge1": 50, "rougeL": 50}
    assert scores["tasks"]["t2"]["rougeL"] == pytest.approx(200 / 3)
    assert scores["categories"]["c"]["rougeL"] == pytest.approx((100 + 0 + 200 / 3) / 3)
    assert scores["overall"]["rougeL"] == pytest.approx((100 + 0 + 200 / 3 + 100) / 4)
    assert list(scores) == ["overall", "tasks", "categories"] and list(scores["categories"]) == [
        "c",
        "d",
    ]


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="no instance"):
        metrics.score([])


def test_a_user_without_home_or_name_can_score():
    """A container may run under any user number: no HOME, no entry in the table of users."""
    program = (
        "import pwd; pwd.getpwuid = {}.__getitem__; import metrics\n"
        "print(metrics.rouge_l('running dogs', ['run dog']))"
    )
    root = Path(metrics.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("1.0\n", "")
