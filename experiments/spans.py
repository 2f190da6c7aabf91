"""T5's span corruption (arXiv 1910.10683, section 3.1.4) for plain text: windows of a text file as batches
that are a pure function of (seed, step). Test: `pytest tests/experiments/test_spans.py`."""

from __future__ import annotations

import functools
import lzma
import os
from array import array
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from data import Batch, Example, cached, collate
from runtime import progress
from tokenizer import Tokenizer


class TextStream:
    """T5's span corruption (arXiv 1910.10683, section 3.1.4) over the lines of a text file, plain or .xz.

    Lines are packed with nothing between them, as in T5's preprocessing (an EOS inside a target would teach
    it to stop early), and cut into windows of `length` tokens, permuted by (seed, epoch). The file is
    tokenised once, at two bytes a token in memory and in the cache (four beyond 65,536 pieces).
    """

    def __init__(self, path: str | os.PathLike, tokenizer: Tokenizer, *, length: int, seed: int):
        path = Path(path)
        content = cached(["text", tokenizer.fingerprint], [path.resolve()],
                         lambda: {"tokens": torch.from_numpy(_encode_lines(path, tokenizer))})
        tokens = content["tokens"].numpy()
        if length < 2 or len(tokens) < length:
            raise ValueError(f"{path}: {len(tokens)} tokens, no window of {length}; give more text")
        self._windows = tokens[:len(tokens) // length * length].reshape(-1, length)
        self._tokenizer, self._seed = tokenizer, seed

    def batch_at(self, step: int, batch_size: int) -> Batch:
        """The batch of `step`, a pure function of (seed, step, batch_size)."""
        n, examples = len(self._windows), []
        for item in range(step * batch_size, (step + 1) * batch_size):
            window = _permutation(n, self._seed, item // n)[item % n]
            rng = np.random.default_rng([1, self._seed, item])
            source, target = corrupt_spans(self._windows[window], self._tokenizer, rng)
            examples.append(Example(f"text-{window}", "text", "text", source, [target], []))
        return collate(examples, pad_id=self._tokenizer.pad_id)


@functools.lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([0, seed, epoch]).permutation(n)


def _encode_lines(path: Path, tokenizer: Tokenizer) -> np.ndarray:
    tokens = array("H" if tokenizer.size <= 1 << 16 else "i")
    try:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as lines:
            for line in progress(lines, "tokenising text", unit="line"):
                tokens.extend(tokenizer.encode(line)[:-1])
    except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path}: not UTF-8 text, plain or .xz ({error}); restore the file") from None
    return np.array(tokens)


def corrupt_spans(tokens: np.ndarray, tokenizer: Tokenizer, rng: np.random.Generator
                  ) -> tuple[np.ndarray, np.ndarray]:
    """(source, target) of one window; a share of 0.15 falls out, in spans of 3 on average.

    As in figure 2 of the paper: the source has a sentinel in place of each span; the target has each span
    behind its sentinel, then one more sentinel; both end with EOS. Kept and lost stretches alternate, kept
    first, every choice of their lengths being equally likely, as in T5's random_spans_noise_mask.
    """
    lost = min(max(round(len(tokens) * 0.15), 1), len(tokens) - 1)
    spans = min(max(round(lost / 3), 1), len(tokens) - lost, 99)  # the 100th sentinel ends the target
    sizes = np.stack([_composition(len(tokens) - lost, spans, rng), _composition(lost, spans, rng)], 1)
    stretches = np.split(tokens, np.cumsum(sizes)[:-1])
    marks = [[tokenizer.size - 1 - k] for k in range(spans + 1)]  # sentinel k
    end = list(tokenizer.eos_ids)
    source = chain.from_iterable(zip(stretches[::2], marks[:-1], strict=True))
    target = chain.from_iterable(zip(marks[:-1], stretches[1::2], strict=True))
    return np.concatenate([*source, end]), np.concatenate([*target, marks[-1], end])


def _composition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """`parts` positive numbers with sum `total`, each such list equally likely."""
    cuts = np.sort(rng.choice(np.arange(1, total), parts - 1, replace=False))
    return np.diff(cuts, prepend=0, append=total)
