"""Compare metrics.py with rouge_score on random texts."""

import random

import pytest

import metrics


def random_text(rng: random.Random) -> str:
    words = [
        "running",
        "runs",
        "Run",
        "the",
        "it's",
        "ABC-12",
        "",
        "\n",
        "über",
        "flies",
        "12.5",
        "!?",
        "dying",
        "die",
        "oings",
        "o",
        "ueds",
        "Die",
        "adding",
        "ADS",
        "ad",
    ]
    return " ".join(rng.choices(words, k=rng.randrange(0, 90)))


def test_equals_rouge_score():
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    rng = random.Random(0)
    for _ in range(300):
        prediction, reference = random_text(rng), random_text(rng)
        wanted = scorer.score(reference, prediction)
        assert metrics.rouge_1(prediction, [reference]) == pytest.approx(
            wanted["rouge1"].fmeasure, abs=1e-12
        )
        assert metrics.rouge_l(prediction, [reference]) == pytest.approx(
            wanted["rougeL"].fmeasure, abs=1e-12
        )
