"""T5's span corruption of plain text (arXiv 1910.10683, section 3.1.4), in batches.

Test: pytest tests/experiments/test_spans.py
"""

import functools
import lzma
import os
from array import array
from pathlib import Path

import numpy as np
import torch

import runtime
from data import Batch, Example, cached, collate
from runtime import UserError
from tokenizer import Tokenizer


class TextStream:
    """Span corruption over the lines of a text file, plain or .xz.

    The lines are packed with nothing between them, as in T5's preprocessing: an EOS inside a target
    would teach it to stop early. They are cut into windows of `length` tokens, which are permuted
    by (seed, epoch). The file is tokenised once and cached.
    """

    def __init__(self, path: str | os.PathLike, tokenizer: Tokenizer, *, length: int, seed: int):
        path = Path(path)
        content = cached(
            ["text", tokenizer.fingerprint],
            [path.resolve()],
            lambda: {"tokens": torch.from_numpy(_encode_lines(path, tokenizer))},
        )
        tokens = content["tokens"].numpy()
        n = len(tokens) // length
        if length < 2 or n == 0:
            raise UserError(
                f"{path}: {len(tokens)} tokens, no window of {length}; give a longer text"
            )
        self._windows = tokens[: n * length].reshape(n, length)
        self._tokenizer = tokenizer
        self._seed = seed

    def batch_at(self, step: int, batch_size: int) -> Batch:
        """Return the batch of a step. It depends on (seed, step, batch_size) alone."""
        n = len(self._windows)
        examples = []
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
    tokens = array("H" if tokenizer.size <= 2**16 else "i")  # 2 bytes a token, if they suffice
    open_text = lzma.open if path.suffix == ".xz" else open
    with runtime.reading(path, "give UTF-8 text, plain or .xz"):
        with open_text(path, "rt", encoding="utf-8") as lines:
            for line in runtime.progress(lines, "tokenising text", unit="line"):
                tokens.extend(tokenizer.encode(line)[:-1])
    return np.array(tokens)


def corrupt_spans(
    tokens: np.ndarray, tokenizer: Tokenizer, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return source and target of one window. 15 % of it is lost, in spans of 3 tokens on average.

    As in figure 2 of the paper: the source has a sentinel in place of each span. The target has
    each span behind its sentinel, and one more sentinel. Both end with EOS. Kept and lost stretches
    alternate, and all choices of their lengths are equally likely, as in T5's
    random_spans_noise_mask.
    """
    lost = min(max(round(len(tokens) * 0.15), 1), len(tokens) - 1)
    kept = len(tokens) - lost
    spans = min(max(round(lost / 3), 1), kept, 99)  # the 100th sentinel ends the target
    kept_lengths = _composition(kept, spans, rng)
    lost_lengths = _composition(lost, spans, rng)
    lengths = np.stack([kept_lengths, lost_lengths], axis=1)
    stretches = np.split(tokens, np.cumsum(lengths)[:-1])

    source = []
    target = []
    for k in range(spans):
        sentinel = [tokenizer.size - 1 - k]
        source += [stretches[2 * k], sentinel]
        target += [sentinel, stretches[2 * k + 1]]
    end = list(tokenizer.eos_ids)
    target.append([tokenizer.size - 1 - spans])
    return np.concatenate([*source, end]), np.concatenate([*target, end])


def _composition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Return `parts` positive numbers with the sum `total`, each such list equally likely."""
    cuts = np.sort(rng.choice(np.arange(1, total), parts - 1, replace=False))
    return np.diff(cuts, prepend=0, append=total)
