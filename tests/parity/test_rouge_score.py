"""Compare metrics.py with rouge_score on random texts."""

import random

import pytest

import metrics

WORDS = (
    "running runs Run the it's ABC-12  \n über flies 12.5 !? dying die oings o ueds Die adding "
    "ADS ad"
).split(" ")


def random_text(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randrange(90)))


def test_rouge_equals_that_of_rouge_score():
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    rng = random.Random(0)
    for _ in range(300):
        prediction = random_text(rng)
        reference = random_text(rng)
        for name, expected in scorer.score(reference, prediction).items():
            found = metrics.METRICS[name](prediction, [reference])
            assert found == pytest.approx(expected.fmeasure, abs=1e-12)
