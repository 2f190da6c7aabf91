"""Train the SentencePiece model of tiny/ as T5's was trained.

It is a unigram model with pad 0, EOS 1 and unknown 2, trained on lines of text and on the
pre-training tasks.

    python tiny/make_tokenizer.py TEXT SNI SPIECE_MODEL
"""

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

PIECES = 924  # at most; with the 100 sentinels they are within 1,024 ids
PROMPT = "Definition: Positive Example 1 - 2 - Now complete the following example - Input: Output:"


def lines(text: Path, sni: Path) -> Iterator[str]:
    """Yield the lines of the text, and the texts of the pre-training tasks."""
    yield from text.read_text(encoding="utf-8").splitlines()
    for name in (sni / "splits/pretrain/train_tasks.txt").read_text(encoding="utf-8").split():
        task = json.loads((sni / "tasks" / f"{name}.json").read_text(encoding="utf-8"))
        for row in task["Instances"]:
            yield from (PROMPT, task["Definition"][0], row["input"], *row["output"])


def candidates(corpus: list[str]) -> Counter[str]:
    """Return whole words, and their beginnings and ends, with their numbers.

    In so small a world most words have one form, and the trainer itself proposes only pieces that
    are in two different words.
    """
    counts: Counter[str] = Counter()
    for word, count in Counter(re.findall(r"\w+", " ".join(corpus))).items():
        marked = "\u2581" + word
        pieces = {marked}
        pieces |= {marked[:i] for i in range(3, len(word))}
        pieces |= {word[-i:] for i in range(2, 4)}
        for piece in pieces:
            counts[piece] += count
    return counts


def main() -> None:
    text, sni, target = (Path(argument).resolve() for argument in sys.argv[1:])
    corpus = list(lines(text, sni))
    model = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # the model keeps the name of the candidates' file, which is relative so
        with open("candidates.tsv", "w", encoding="utf-8") as file:
            for piece, count in sorted(candidates(corpus).items()):
                file.write(f"{piece}\t{count}\n")
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_writer=model,
            vocab_size=PIECES,
            model_type="unigram",
            seed_sentencepieces_file="candidates.tsv",
            hard_vocab_limit=False,
            character_coverage=1.0,
            required_chars=string.printable.strip(),
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=1,
            minloglevel=1,
        )
        os.chdir(target.parent)
    target.write_bytes(model.getvalue())


if __name__ == "__main__":
    main()
