"""Tests of metrics.py against scores by hand.

parity/ compares with the official numbers and with rouge_score.
"""

import pytest

import metrics


def test_exact_match_keeps_articles_and_drops_punctuation():
    assert metrics.exact_match(" The  cat. ", ["no", "the cat"]) == 1
    assert metrics.exact_match("cat", ["the cat"]) == 0


def test_texts_without_a_token_match_but_do_not_overlap():
    assert metrics.exact_match("", [""]) == 1
    assert metrics.rouge_l("?!", ["?!"]) == metrics.rouge_1("", [""]) == 0


def test_score_takes_the_best_reference_and_averages_over_instances():
    fields = ("task", "category", "prediction", "references")
    rows = [
        ("t1", "c", "a b", ["x", "a b", "b"]),
        ("t1", "c", "", ["y"]),
        ("t2", "c", "q q w", ["w q q"]),
        ("t3", "d", "n m", ["n"]),
    ]
    scores = metrics.score([dict(zip(fields, row, strict=True)) for row in rows])
    assert scores["tasks"]["t1"] == {"exact_match": 50, "rouge1": 50, "rougeL": 50}
    assert scores["categories"]["c"]["rougeL"] == pytest.approx((100 + 200 / 3) / 3)
    assert scores["overall"]["rouge1"] == pytest.approx((200 + 200 / 3) / 4)
