"""Tests of metrics.py against scores by hand.

parity/ compares with the official numbers and with rouge_score.
"""

import random
import string
import unicodedata

import pytest

import metrics
from tokenizer import CLEAN_UP


def test_exact_match_keeps_articles_and_drops_punctuation():
    assert metrics.exact_match(" The  cat. ", ["no", "the cat"]) == 1
    assert metrics.exact_match("cat", ["the cat"]) == 0


def test_texts_without_a_token_match_but_do_not_overlap():
    assert metrics.exact_match("", [""]) == 1
    assert metrics.rouge_l("?!", ["?!"]) == metrics.rouge_1("", [""]) == 0


ONLY_PUNCTUATION_DIFFERS = [("", "+"), ("314", "3.14")]


@pytest.mark.parametrize("prediction, reference", ONLY_PUNCTUATION_DIFFERS)
def test_punctuation_tells_answers_of_rows_apart(prediction, reference):
    assert metrics.exact_match(prediction, [reference]) == 1
    assert metrics.exact_match(prediction, [reference], "unicode") == 0
    assert metrics.exact_match(f" {reference.lower()}\n", [reference], "unicode") == 1


@pytest.mark.parametrize("text", ["a , b . c", "do n't", "it ' s 's", "say 'a ' b !", "? a ' ' ?"])
def test_spaces_that_the_tokenizer_drops_do_not_count(text):
    cleaned = text
    for spaced in CLEAN_UP:
        cleaned = cleaned.replace(spaced, spaced.strip())
    assert cleaned != text
    assert metrics.exact_match(cleaned, [text], "unicode") == 1


@pytest.mark.parametrize("text", ["x²", "Wait…", "ﬁne", "Ａ１", "a™", "№ 5", "½ l", "e\u0301"])
def test_a_text_equals_what_the_tokenizer_of_t5_makes_of_it(text):
    """Its SentencePiece writes NFKC forms, so that no T5 can write these texts as they are."""
    written = unicodedata.normalize("NFKC", text)
    assert written != text
    for prediction, reference in ((written, text), (text, written)):
        for metric in metrics.METRICS.values():
            assert metric(prediction, [reference], "unicode") == 1
    assert metrics.exact_match(written, [text]) == 0  # the official rules are as they are


def test_words_of_rows_may_be_of_any_script():
    texts = {
        "привет, Мир": "Мир",
        "日本語です": "本語",
        "ज़िन्दगी हिन्दी": "हिन्दी",
        "éa-2": "2",
        "٣ ½": "٣",
    }
    for prediction, reference in texts.items():
        assert metrics.rouge_l(prediction, [prediction], "unicode") == 1
        assert 0 < metrics.rouge_1(prediction, [reference], "unicode") < 1
    assert metrics.rouge_l("日語本", ["日本語"], "unicode") == pytest.approx(2 / 3)
    assert metrics.rouge_l("हिन्दू", ["हिन्दी"], "unicode") == 0  # a vowel sign belongs to its word
    for one, other in (("\u2600\ufe0f", "\u2764\ufe0f"), ("葛\U000e0100", "城")):  # marks
        assert metrics.rouge_l(one, [other], "unicode") == 0
    assert metrics.rouge_l("葛\U000e0100", ["葛"], "unicode") == 1
    assert metrics.rouge_1("running", ["runs"], "unicode") == 1
    assert metrics.rouge_1("éditions", ["édition"], "unicode") == 0  # no stem


def test_words_of_english_rows_are_the_official_ones():
    rng = random.Random(0)
    for _ in range(300):
        letters = string.printable + "aaeeiinngg ss  ed  "
        texts = ["".join(rng.choices(letters, k=60)) for _ in range(2)]
        for metric in (metrics.rouge_1, metrics.rouge_l):
            assert metric(texts[0], texts[1:], "unicode") == metric(texts[0], texts[1:])


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
    assert scores["metric_rules"] == "official"
    assert scores["overall"]["rouge1"] == pytest.approx((200 + 200 / 3) / 4)
