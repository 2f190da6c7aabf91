"""The metrics of Super-NaturalInstructions: exact match, ROUGE-1 and ROUGE-L.

Each metric is the maximum over the references of an instance. `score` averages over instances and
gives per cent. The numbers equal those of the official script, which uses the package rouge_score
with NLTK's Porter stemmer. This file is faster: it finds the longest common subsequence with bit
operations, and it stems each word once.

Test: pytest tests/unit/test_metrics.py; tests/parity compares with official numbers and rouge_score
"""

import re
import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from functools import lru_cache

from nltk.stem.porter import PorterStemmer

_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)
_porter = lru_cache(maxsize=2**20)(PorterStemmer().stem)  # the same words occur again and again


def _normalise(text):
    """Return the text in lower case, without ASCII punctuation, with single spaces."""
    words = text.lower().translate(_DELETE_PUNCTUATION).split()
    return " ".join(words)


@lru_cache(maxsize=2**16)
def _stems(text):
    """Return the words of the text: runs of [a-z0-9], stemmed if longer than three characters."""
    stems = []
    for word in re.findall("[a-z0-9]+", text.lower()):
        if len(word) > 3:
            word = _porter(word)
        stems.append(word)
    return stems


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


def _f_measure(prediction, reference, overlap):
    """Return 2 P R / (P + R), where `overlap` counts the stems that both texts have in common."""
    predicted = _stems(prediction)
    expected = _stems(reference)
    common = overlap(predicted, expected)
    if common == 0:
        return 0.0
    precision = common / len(predicted)
    recall = common / len(expected)
    return 2 * precision * recall / (precision + recall)


def exact_match(prediction: str, references: Iterable[str]) -> float:
    """Return 1.0 if the prediction equals a reference, else 0.0.

    Case, ASCII punctuation and the amount of white space do not count. Articles do.
    """
    predicted = _normalise(prediction)
    matches = any(_normalise(reference) == predicted for reference in references)
    return float(matches)


def rouge_1(prediction: str, references: Iterable[str]) -> float:
    """Return the best F-measure of the unigram overlap over the references, in [0, 1].

    It is 0 if the prediction or the reference has no token, even if both are equal.
    """
    return max(_f_measure(prediction, reference, _unigram_overlap) for reference in references)


def rouge_l(prediction: str, references: Iterable[str]) -> float:
    """Return the best F-measure of the longest common subsequence over the references, in [0, 1].

    It is 0 if the prediction or the reference has no token, even if both are equal.
    """
    return max(_f_measure(prediction, reference, _lcs) for reference in references)


METRICS = {"exact_match": exact_match, "rouge1": rouge_1, "rougeL": rouge_l}


def score(records: Iterable[Mapping]) -> dict[str, dict]:
    """Return the mean of each metric over all instances, per task and per category, in per cent.

    records: mappings with task, category, prediction (str) and references (non-empty list of str).
    The result is {"overall": {"exact_match", "rouge1", "rougeL"}, "tasks": {task: {...}},
    "categories": {category: {...}}}. There must be a record.
    """
    overall = []
    tasks = defaultdict(list)
    categories = defaultdict(list)
    for record in records:
        texts = record["prediction"], record["references"]
        values = {name: metric(*texts) for name, metric in METRICS.items()}
        overall.append(values)
        tasks[record["task"]].append(values)
        categories[record["category"]].append(values)

    return {
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
