"""T5's tokenizer: the SentencePiece model of a Hugging Face folder, the same ids and texts as transformers'.
Test: `pytest tests/test_data.py`.

    words = tokenizer.load("tiny/")
    words.decode(words.source("Sort the words."))
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from runtime import atomic_write, require_model

LARGEST_MODEL = 1e8  # bytes of a SentencePiece model; T5's has 8e5, mT5's 4e6
# the English clean-up that Hugging Face calls clean_up_tokenization_spaces, in its order
CLEAN_UP = {" .": ".", " ?": "?", " !": "!", " ,": ",", " ' ": "'",
            " n't": "n't", " 'm": "'m", " 's": "'s", " 've": "'ve", " 're": "'re"}  # fmt: skip


def load(folder: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a model folder or a .model file; ValueError where there is none or it is not T5's."""
    require_model(folder)
    path = Path(folder) / "spiece.model" if Path(folder).is_dir() else Path(folder)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a T5 folder with spiece.model, or that file")
    if path.stat().st_size > LARGEST_MODEL:
        raise ValueError(f"{path}: larger than {LARGEST_MODEL:.0f} bytes; download it again")
    return Tokenizer(path.read_bytes(), path)


class Tokenizer:
    """The pieces of a SentencePiece model, then 100 sentinels in descending order, sentinel 0 last. Text
    never yields pad, EOS or sentinels, even where it spells their names.

    model: the file's content; path: its name, for errors. fingerprint: sha256 of the content.
    """

    pad_id, eos_ids, unk_id = 0, (1,), 2

    def __init__(self, model: bytes, path: Path):
        self.fingerprint, self._model = hashlib.sha256(model).hexdigest(), model
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.size = self.sp.get_piece_size()
            first = [self.sp.id_to_piece(i) for i in range(self.size)][:3]  # all of them are text
        except (RuntimeError, IndexError, UnicodeDecodeError):
            raise ValueError(f"{path}: not a SentencePiece model; download it again") from None
        if first != ["<pad>", "</s>", "<unk>"]:
            raise ValueError(f"{path}: pieces 0 to 2 are {first}; a T5 model has <pad>, </s>, <unk>")

    def __len__(self) -> int:
        return self.size + 100

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, EOS last."""
        return [*self.sp.encode(text), *self.eos_ids]

    source = target = encode  # T5 reads a prompt and writes an answer in the same way

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without special and sentinel ids, spaces cleaned up, stripped."""
        text = self.sp.decode([i for i in map(int, ids) if self.unk_id < i < self.size])
        for spaced, tight in CLEAN_UP.items():
            text = text.replace(spaced, tight)
        return text.strip()

    def sentinel(self, k: int) -> int:
        """Id of <extra_id_k>, 0 <= k < 100."""
        return self.size + 99 - k

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the model as spiece.model into `folder`."""
        with atomic_write(Path(folder) / "spiece.model") as file:
            file.write(self._model)
