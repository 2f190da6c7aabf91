"""Trains tiny/'s SentencePiece model as T5's was trained (unigram; pad 0, EOS 1, unknown 2) on lines of text
and on the pre-training tasks.

    python tiny/make_tokenizer.py TEXT SNI SPIECE_MODEL"""

import io
import json
import os
import re
import string
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

PIECES = 924  # at most; with the 100 sentinels within 1,024 ids
PROMPT = "Definition: Positive Example 1 - 2 - Now complete the following example - Input: Output:"


def lines(text: Path, sni: Path) -> Iterator[str]:
    yield from text.read_text(encoding="utf-8").splitlines()
    for name in (sni / "splits/pretrain/train_tasks.txt").read_text(encoding="utf-8").split():
        task = json.loads((sni / "tasks" / f"{name}.json").read_text(encoding="utf-8"))
        for row in task["Instances"]:
            yield from (PROMPT, task["Definition"][0], row["input"], *row["output"])


def candidates(corpus: list[str]) -> Counter[str]:
    """Whole words, their beginnings and ends: in so small a world most words have one form, and the trainer
    itself proposes only what stands in two different words."""
    counts: Counter[str] = Counter()
    for word, count in Counter(re.findall(r"\w+", " ".join(corpus))).items():
        marked = "\u2581" + word
        for piece in {marked} | {marked[:i] for i in range(3, len(word))} | {word[-i:] for i in range(2, 4)}:
            counts[piece] += count
    return counts


def main() -> None:
    text, sni, target = (Path(argument).resolve() for argument in sys.argv[1:])
    corpus, model = list(lines(text, sni)), io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # the model keeps the name of the candidates' file: a relative one
        with open("candidates.tsv", "w", encoding="utf-8") as file:
            rows = sorted(candidates(corpus).items())
            file.writelines(f"{piece}\t{count}\n" for piece, count in rows)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus), model_writer=model, vocab_size=PIECES, model_type="unigram",
            seed_sentencepieces_file="candidates.tsv", hard_vocab_limit=False, character_coverage=1.0,
            required_chars=string.printable.strip(), pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1,
            minloglevel=1)
        os.chdir(target.parent)
    target.write_bytes(model.getvalue())


if __name__ == "__main__":
    main()
