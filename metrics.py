"""Super-NaturalInstructions' metric: exact match, ROUGE-1 and ROUGE-L, each the maximum over an instance's
references, averaged over instances, in per cent. Same numbers as the official script (rouge_score with NLTK's
Porter stemmer), made fast by a bit-parallel longest common subsequence and by stemming each word once.
`pytest tests/test_metrics.py` compares both."""

import os
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache

if os.path.expanduser("~") == "~":  # no HOME and an unknown user: NLTK's import would fail
    os.environ["HOME"] = os.sep
from nltk.stem.porter import PorterStemmer  # noqa: E402

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WORD_BYTES = bytes(i if chr(i).isascii() and chr(i).isalnum() else ord(" ") for i in range(256))
_porter = lru_cache(maxsize=2**20)(PorterStemmer().stem)  # words come again and again


def _normalise(text: str) -> str:
    """Lower case, no ASCII punctuation, single spaces; articles stay."""
    return " ".join(text.lower().translate(_PUNCTUATION).split())


@lru_cache(maxsize=2**16)
def _stems(text: str) -> list[str]:
    """Runs of [a-z0-9] in the lower-case text; those of more than three characters stemmed."""
    words = text.lower().encode("ascii", "replace").translate(_WORD_BYTES).decode().split()
    return [_porter(word) if len(word) > 3 else word for word in words]


def _lcs(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence: one integer operation per token of `b` (Hyyro, 2004). Bit i
    of `row` is 0 where the dynamic programme's row grows at a[i]; an addition carries every such step along
    at once."""
    places: dict[str, int] = defaultdict(int)
    for i, token in enumerate(a):
        places[token] |= 1 << i
    row = full = (1 << len(a)) - 1
    for token in b:
        matched = row & places.get(token, 0)
        row = ((row + matched) | (row - matched)) & full
    return len(a) - row.bit_count()


def _unigrams(a: Sequence[str], b: Sequence[str]) -> int:
    return (Counter(a) & Counter(b)).total()


def _f_measure(prediction: str, reference: str, overlap: Callable[[list[str], list[str]], int]) -> float:
    """2 P R / (P + R) of the shares of the prediction's and the reference's stems that `overlap` counts."""
    said, wanted = _stems(prediction), _stems(reference)
    if not (common := overlap(said, wanted)):
        return 0.0
    precision, recall = common / len(said), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def exact_match(prediction: str, references: Iterable[str]) -> float:
    """1.0 if the prediction equals a reference up to case, ASCII punctuation and white space, else 0.0."""
    wanted = _normalise(prediction)
    return float(any(_normalise(reference) == wanted for reference in references))


def rouge_1(prediction: str, references: Iterable[str]) -> float:
    """Best F-measure of unigram overlap over the references, in [0, 1]; 0 where either side has no token."""
    return max(_f_measure(prediction, reference, _unigrams) for reference in references)


def rouge_l(prediction: str, references: Iterable[str]) -> float:
    """Best F-measure of the longest common subsequence over the references, in [0, 1]; 0 as for rouge_1."""
    return max(_f_measure(prediction, reference, _lcs) for reference in references)


METRICS = {"exact_match": exact_match, "rouge1": rouge_1, "rougeL": rouge_l}


def score(records: Iterable[Mapping]) -> dict[str, dict]:
    """Scores of records with keys task, category, prediction (str), references (list of str, not empty).

    Returns {"overall": {exact_match, rouge1, rougeL}, "tasks": {task: ...}, "categories": {category: ...}}:
    means over instances, in per cent. ValueError where there is nothing to score."""
    groups: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    for record in records:
        values = [metric(record["prediction"], record["references"]) for metric in METRICS.values()]
        for group in (("overall", ""), ("tasks", record["task"]), ("categories", record["category"])):
            groups[group].append(values)
    if not groups:
        raise ValueError("no instance to score; choose a split that has tasks")
    means = {group: {name: 100 * sum(row[i] for row in rows) / len(rows) for i, name in enumerate(METRICS)}
             for group, rows in groups.items()}
    scores: dict[str, dict] = {"overall": means.pop(("overall", "")), "tasks": {}, "categories": {}}
    for (kind, name), mean in sorted(means.items()):
        scores[kind][name] = mean
    return scores
