"""Tokenizers of Hugging Face folders, with the ids and texts of transformers: T5's SentencePiece; of decoders
Llama's and Mistral's SentencePiece, or a tokenizer.json (by the package tokenizers). Special tokens that a
text spells are text. Test: pytest tests/test_tokenizer.py"""

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import sentencepiece

from runtime import atomic_write, existing, read_json

LARGEST_FILE = 1e8  # bytes; T5's has 8e5, mT5's 4e6, Llama 3's 1.7e7
# the English clean-up that Hugging Face calls clean_up_tokenization_spaces, in its order
CLEAN_UP = {" .": ".", " ?": "?", " !": "!", " ,": ",", " ' ": "'",
            " n't": "n't", " 'm": "'m", " 's": "'s", " 've": "'ve", " 're": "'re"}  # fmt: skip


class Tokenizer:
    """What all have in common; a kind brings _read, _ids and _text. pad_id is for masked positions,
    fingerprint 64 hex digits of all that ids depend on."""

    size: int  # ids are below it
    pad_id: int
    eos_ids: tuple[int, ...]
    bos_ids: tuple[int, ...] = ()  # what a source begins with
    lead = ""  # what a target begins with, in place of the space that its source has given away

    def __init__(self, path: Path):
        files = [path, *filter(Path.is_file, [path.with_name("tokenizer_config.json")])]
        for file in files:
            if file.stat().st_size > LARGEST_FILE:
                raise ValueError(f"{file}: larger than {LARGEST_FILE:.0f} bytes; download it again")
        self.path, self._files = path, {file.name: file.read_bytes() for file in files}
        self._read(content := self._files[path.name])
        habits = f"{self.bos_ids}{self.eos_ids}{self.lead}"
        self.fingerprint = hashlib.sha256(content + habits.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, EOS last."""
        return [*self.bos_ids, *self._ids(text), *self.eos_ids]

    def source(self, text: str) -> list[int]:
        """Ids of a prompt. A word of these vocabularies includes the space before it: the one that a prompt
        ends with goes to what follows."""
        return [*self.bos_ids, *self._ids(text.removesuffix(" "))]

    def target(self, text: str) -> list[int]:
        """Ids of an answer, EOS last."""
        return [*self._ids(self.lead + text), *self.eos_ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without special ids, stripped; of T5's with the spaces cleaned up."""
        return self._text([i for i in map(int, ids) if 0 <= i < self.size]).strip()

    def save(self, folder: str | os.PathLike) -> None:
        for name, content in self._files.items():
            with atomic_write(Path(folder) / name) as file:
                file.write(content)

    def _settings(self) -> dict:
        path = self.path.with_name("tokenizer_config.json")
        return read_json(path) if path.name in self._files else {}


class Pieces(Tokenizer):
    """A SentencePiece model."""

    def _read(self, model: bytes) -> None:
        try:
            self.sp = sentencepiece.SentencePieceProcessor()
            self.sp.LoadFromSerializedProto(model)
            self.pieces = [self.sp.id_to_piece(i) for i in range(self.sp.get_piece_size())]
            self.size = len(self.pieces)
        except (RuntimeError, IndexError, UnicodeDecodeError):
            raise ValueError(f"{self.path}: not a SentencePiece model; download it again") from None

    def _ids(self, text: str) -> list[int]:
        return self.sp.encode(text)

    def _text(self, ids: list[int]) -> str:
        # Beyond the pieces are T5's sentinels; control pieces have no text, an unknown one would have.
        return self.sp.decode([i for i in ids if i < len(self.pieces) and not self.sp.is_unknown(i)])


class T5Pieces(Pieces):
    """After the pieces 100 sentinels, sentinel 0 as the last id; no text yields one."""

    pad_id, eos_ids = 0, (1,)

    def _read(self, model: bytes) -> None:
        super()._read(model)
        self._files, self.size = {"spiece.model": model}, len(self.pieces) + 100
        if self.pieces[:3] != ["<pad>", "</s>", "<unk>"]:
            raise ValueError(f"{self.path}: pieces 0 to 2 are not T5's <pad>, </s>, <unk>")

    source = target = Tokenizer.encode  # T5 reads a prompt and writes an answer in the same way

    def _text(self, ids: list[int]) -> str:
        text = super()._text(ids)
        for spaced, tight in CLEAN_UP.items():
            text = text.replace(spaced, tight)
        return text


class LlamaPieces(Pieces):
    """It puts a space before every text by itself, so that no target needs one."""

    def _read(self, model: bytes) -> None:
        super()._read(model)
        bos, eos = self.sp.bos_id(), self.sp.eos_id()
        if min(bos, eos) < 0:
            raise ValueError(f"{self.path}: has no BOS or no EOS, which Llama's and Mistral's have")
        self.bos_ids = (bos,) if self._settings().get("add_bos_token", True) else ()
        self.pad_id, self.eos_ids = eos, (eos,)


class Words(Tokenizer):
    """A tokenizer.json, with its EOS and its habits in tokenizer_config.json."""

    def _read(self, content: bytes) -> None:
        try:
            import tokenizers  # not required: T5 and Llama 2 do without
        except ImportError:
            raise ValueError(f"{self.path}: needs the package tokenizers; pip install tokenizers") from None
        self._words = words = self._call(tokenizers.Tokenizer.from_buffer, content)
        words.no_truncation()  # a file may ask for both
        words.no_padding()
        words.encode_special_tokens = True  # as text, where a text spells them
        probe, bare = (self._call(words.encode, "a", add_special_tokens=special) for special in (True, False))
        name = self._settings().get("eos_token")
        name = name.get("content") if isinstance(name, dict) else name
        eos = self._call(words.token_to_id, name) if isinstance(name, str) else None
        if eos is None:
            raise ValueError(f"{self.path}: has no eos_token of tokenizer_config.json; mend one of them")
        words.add_special_tokens([name])  # whatever the file calls it, EOS is no text
        # As transformers 5: add_bos_token of the settings counts for nothing beside the file's own template.
        begins = len(probe.ids) - len(bare.ids)
        if probe.ids[begins:] != bare.ids:
            raise ValueError(f"{self.path}: ends prompts with EOS, as T5's; put its spiece.model beside it")
        self.bos_ids, self.pad_id, self.eos_ids = tuple(probe.ids[:begins]), eos, (eos,)
        self.size = 1 + max(words.get_vocab().values())
        # A word's space: where the tokenizer does not put one before every text by itself, targets bring it.
        self.lead = "" if "".join(bare.tokens).startswith(("▁", "Ġ")) else " "

    def _call(self, function: Callable, *values: Any, **options: Any) -> Any:
        try:  # what is wrong with a file may show at a text alone
            return function(*values, **options)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the package's Rust is no Exception
            said = " ".join(str(error).split())
            raise ValueError(f"{self.path}: not a tokenizer ({said:.100}); download it again") from None

    def _ids(self, text: str) -> list[int]:
        return self._call(self._words.encode, text, add_special_tokens=False).ids

    def _text(self, ids: list[int]) -> str:
        return self._call(self._words.decode, ids, skip_special_tokens=True)


KINDS = {"spiece.model": T5Pieces, "tokenizer.model": LlamaPieces, "tokenizer.json": Words}


def load(folder: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a model folder, or of T5's .model file; ValueError where there is no whole one."""
    existing(folder)
    path = next((path for name in KINDS if (path := Path(folder) / name).is_file()), Path(folder))
    if not path.is_file():
        raise ValueError(f"{path}: no {' or '.join(KINDS)}; copy the model's own there")
    return KINDS.get(path.name, T5Pieces)(path)
