"""The metrics: exact match, ROUGE-1 and ROUGE-L, by one of two sets of rules.

Each metric is the maximum over the references of an instance. `score` averages over instances and
gives per cent. RULES says how a text is read, and scores name their rules:

- "official": the numbers equal those of the script of Super-NaturalInstructions, which uses the
  package rouge_score with NLTK's Porter stemmer. Data in SNI's form have these rules.
- "unicode": punctuation counts in exact match, words may be of any script, and texts are compared
  in their NFKC forms ("x2" for "x²"), which are all that the tokenizer of T5 can write. Rows of
  JSONL have these rules.

This file is faster than that script: it finds the longest common subsequence with bit operations,
and it stems each word once.

Test: pytest tests/unit/test_metrics.py; tests/parity compares with official numbers and rouge_score
"""

import re
import string
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from nltk.stem.porter import PorterStemmer

_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Kana and Chinese characters: these scripts put no spaces between words.
_CJK = re.compile(
    "[\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)
_porter = lru_cache(maxsize=2**20)(PorterStemmer().stem)  # the same words occur again and again


# ------------------------------------------------------------------------------------------ rules


def _official_form(text):
    """Return the text in lower case, without ASCII punctuation, with single spaces."""
    words = text.lower().translate(_DELETE_PUNCTUATION).split()
    return " ".join(words)


def _plain(text):
    """Return the NFKC form of a text in lower case."""
    return unicodedata.normalize("NFKC", text).lower()


def _unicode_form(text):
    """Return the plain text with single spaces.

    T5's tokenizer drops spaces before . ? ! , and n't, and around ', so they do not count.
    """
    text = " ".join(_plain(text).split())
    return re.sub(r" (?=[.?!,']|n't)|(?<=') ", "", text)


def _official_words(text):
    """Return the runs of [a-z0-9] in the text in lower case."""
    return re.findall("[a-z0-9]+", text.lower())


def _unicode_words(text):
    """Return the runs of letters and digits, with their marks. A CJK character is a word."""
    spaced = []
    for character in _plain(text):
        category = unicodedata.category(character)[0]  # L letter, N number, M mark
        if category == "M" and (not spaced or spaced[-1].endswith(" ")):
            continue  # a mark of no letter, such as that of an emoji
        if category not in "LNM":
            character = " "
        elif _CJK.match(character):
            character = f" {character} "
        spaced.append(character)
    return "".join(spaced).split()


class Rules(NamedTuple):
    """How the metrics read a text."""

    description: str  # as in "by SNI's official rules"
    form: Callable[[str], str]  # two texts match exactly if their forms are equal
    words: Callable[[str], list[str]]  # the words of a text, for ROUGE


RULES = {
    "official": Rules(
        "SNI's official rules (punctuation is ignored; words are runs of a-z and 0-9)",
        _official_form,
        _official_words,
    ),
    "unicode": Rules(
        "the rules for rows of JSONL (punctuation counts in exact match; words are of any script)",
        _unicode_form,
        _unicode_words,
    ),
}


@lru_cache(maxsize=2**16)
def _stems(text, rules):
    """Return the words of the text. ASCII words of more than three characters are stemmed."""
    stems = []
    for word in RULES[rules].words(text):
        if len(word) > 3 and word.isascii():
            word = _porter(word)
        stems.append(word)
    return stems


# ---------------------------------------------------------------------------------------- metrics


def _unigram_overlap(a, b):
    """Return the number of tokens that a and b share, counted with multiplicity."""
    return (Counter(a) & Counter(b)).total()


def _lcs(a, b):
    """Return the length of the longest common subsequence.

    This is the usual dynamic programme, with each of its rows in one integer (Hyyro, 2004). Bit i
    is 0 where LCS(a[:i+1], b so far) exceeds LCS(a[:i], b so far). The addition carries all steps
    of a row at once, so that each token of b costs a few integer operations.
    """
    # Bit i of positions[token] is 1 where a[i] is the token.
    positions = defaultdict(int)
    for i, token in enumerate(a):
        positions[token] |= 1 << i

    all_bits = (1 << len(a)) - 1
    bits = all_bits
    for token in b:
        matched = bits & positions.get(token, 0)
        bits = ((bits + matched) | (bits - matched)) & all_bits
    return len(a) - bits.bit_count()


def _f_measure(prediction, reference, overlap, rules):
    """Return 2 P R / (P + R), where `overlap` counts the stems that both texts have in common."""
    predicted = _stems(prediction, rules)
    expected = _stems(reference, rules)
    common = overlap(predicted, expected)
    if common == 0:
        return 0.0
    precision = common / len(predicted)
    recall = common / len(expected)
    return 2 * precision * recall / (precision + recall)


def exact_match(prediction: str, references: Iterable[str], rules: str = "official") -> float:
    """Return 1.0 if the prediction equals a reference, else 0.0.

    Case and the amount of white space do not count, nor does ASCII punctuation by the official
    rules. Articles do.
    """
    form = RULES[rules].form
    predicted = form(prediction)
    matches = any(form(reference) == predicted for reference in references)
    return float(matches)


def rouge_1(prediction: str, references: Iterable[str], rules: str = "official") -> float:
    """Return the best F-measure of the unigram overlap over the references, in [0, 1].

    It is 0 if the prediction or the reference has no word, even if both are equal.
    """
    return max(_f_measure(prediction, text, _unigram_overlap, rules) for text in references)


def rouge_l(prediction: str, references: Iterable[str], rules: str = "official") -> float:
    """Return the best F-measure of the longest common subsequence over the references, in [0, 1].

    It is 0 if the prediction or the reference has no word, even if both are equal.
    """
    return max(_f_measure(prediction, text, _lcs, rules) for text in references)


METRICS = {"exact_match": exact_match, "rouge1": rouge_1, "rougeL": rouge_l}


def score(records: Iterable[Mapping], rules: str = "official") -> dict[str, dict | str]:
    """Return the mean of each metric over all instances, per task and per category, in per cent.

    records: mappings with task, category, prediction (str) and references (non-empty list of str).
    rules: a name in RULES. The result is {"metric_rules": rules, "overall": {"exact_match",
    "rouge1", "rougeL"}, "tasks": {task: {...}}, "categories": {category: {...}}}. There must be a
    record.
    """
    overall = []
    tasks = defaultdict(list)
    categories = defaultdict(list)
    for record in records:
        texts = record["prediction"], record["references"]
        values = {name: metric(*texts, rules) for name, metric in METRICS.items()}
        overall.append(values)
        tasks[record["task"]].append(values)
        categories[record["category"]].append(values)

    return {
        "metric_rules": rules,
        "overall": _mean(overall),
        "tasks": {task: _mean(rows) for task, rows in sorted(tasks.items())},
        "categories": {category: _mean(rows) for category, rows in sorted(categories.items())},
    }


def _mean(rows):
    """Return the mean of each metric over the rows, in per cent."""
    means = {}
    for name in METRICS:
        means[name] = 100 * sum(row[name] for row in rows) / len(rows)
    return means
