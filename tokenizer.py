"""Tokenizers of Hugging Face model folders: ids and texts are those of transformers.

T5 has a SentencePiece model (spiece.model). Decoder-only models have a tokenizer.json, which needs
the package `tokenizers`. Five things differ from transformers:

- A special token that a text spells out, such as "</s>", is encoded as ordinary text.
- Decoded texts have no outer white space. Those of T5 have no spaces before punctuation either, as
  by default in transformers 4.
- A T5 to which tokens were added is refused: its spiece.model lacks them.
- `encode` always adds EOS.
- A text that starts with a space gets the ids of SentencePiece. transformers 5 gives it other ids
  for some of Llama 2's tokenizer.json files.

Test: pytest tests/unit/test_tokenizer.py
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from support.program import DOWNLOAD, UserError, read_json, reading, require_path

REMEDY = "download it again"

# Hugging Face's clean_up_tokenization_spaces removes the spaces around these, in this order.
CLEAN_UP = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")

# A tokenizer.json may add a space before every text. These replacements in the file prevent it.
ADDED_SPACE = (
    (r'"prepend_scheme":"\w+"', '"prepend_scheme":"never"'),
    (r'"add_prefix_space":true', '"add_prefix_space":false'),
    (r'{"type":"Prepend","prepend":"[^"]*"}', '{"type":"Sequence","normalizers":[]}'),
)


class Tokenizer:
    """What all tokenizers have in common.

    A subclass defines three methods:

    _setup(content): read the content of its file, and set the attributes below.
    _encode(texts, inside=False): return the ids of each text, without BOS and EOS. `inside` says
        that the texts are inside a row, where no space is added before them.
    _decode(ids): return the text of ids that exist.

    `spaced` is an argument of `sources` and `targets`, for decoder-only models, which have prompt
    and answer in one row. It says that one space separates the two, as in SNI's form. A token
    includes the space before its word, so this space is encoded with the answer: `sources` removes
    it from the prompt, and `targets` puts it before the answer. Without `spaced` both texts are
    encoded as they stand. T5 reads prompt and answer apart, and `spaced` changes nothing.
    """

    size: int  # every id is below it
    eos_ids: tuple[int, ...]
    bos_ids: tuple[int, ...] = ()  # at the start of a source
    one_row = False  # a decoder-only model has prompt and answer in one row
    unknown_id: int | None = None  # T5: it stands for characters that have no piece
    target_prefix = ""  # put before a spaced target: the space that `sources` removes
    fingerprint: str  # 64 hex digits of the file and the options that the ids depend on

    def __init__(self, path: Path):
        self.path = path
        content = path.read_bytes()
        self._setup(content)
        options = f"{self.bos_ids}{self.eos_ids}{self.target_prefix}"
        self.fingerprint = hashlib.sha256(content + options.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, from BOS (if there is one) to EOS."""
        [ids] = self._encode([text])
        return [*self.bos_ids, *ids, *self.eos_ids]

    def sources(self, texts: list[str], *, spaced: bool = True) -> Iterator[list[int]]:
        """Yield the ids of each prompt."""
        if spaced:
            texts = [text.removesuffix(" ") for text in texts]
        for ids in self._encode(texts):
            yield [*self.bos_ids, *ids]

    def targets(self, texts: list[str], *, spaced: bool = True) -> Iterator[list[int]]:
        """Yield the ids of each answer, with EOS at the end."""
        if spaced:
            texts = [self.target_prefix + text for text in texts]
        for ids in self._encode(texts, inside=not spaced):
            yield [*ids, *self.eos_ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids` without special tokens and outer white space.

        Ids that are no tokens, such as -1, are skipped.
        """
        known = [i for i in map(int, ids) if 0 <= i < self.size]
        return self._decode(known).strip()


class T5Tokenizer(Tokenizer):
    """T5's SentencePiece model. 100 sentinels follow its pieces; the last is <extra_id_0>."""

    eos_ids = (1,)

    def _setup(self, content):
        with reading(self.path, REMEDY):
            self.sp = sentencepiece.SentencePieceProcessor()
            self.sp.LoadFromSerializedProto(content)
            self.num_pieces = self.sp.get_piece_size()
            for i in range(self.num_pieces):
                self.sp.id_to_piece(i)  # fails for damaged text
        self.unknown_id = self.sp.unk_id()
        self.size = self.num_pieces + 100
        self._refuse_added_tokens()

    def _refuse_added_tokens(self):
        """Raise UserError if other files of the folder have tokens that spiece.model lacks."""
        for name in ("added_tokens.json", "tokenizer.json"):
            path = self.path.with_name(name)
            if not path.is_file():
                continue
            content = read_json(path)
            with reading(path, "tokens that were added to those of T5 are not supported"):
                ids = content.values()
                if name == "tokenizer.json":
                    ids = [token["id"] for token in content.get("added_tokens", [])]
                if max(ids, default=0) >= self.size:
                    raise ValueError(f"has a token {max(ids)}")

    def sources(self, texts: list[str], *, spaced: bool = True) -> Iterator[list[int]]:
        for ids in self._encode(texts):
            yield [*ids, *self.eos_ids]  # a source of T5 has EOS, as a target has

    def _encode(self, texts, inside=False):
        return self.sp.encode(texts)

    def _decode(self, ids):
        # Leave out sentinels and <unk>. Control pieces have no text anyway.
        known = [i for i in ids if i < self.num_pieces and not self.sp.is_unknown(i)]
        text = self.sp.decode(known)
        for with_spaces in CLEAN_UP:
            text = text.replace(with_spaces, with_spaces.strip())
        return text


class JsonTokenizer(Tokenizer):
    """A tokenizer.json, whose EOS is named in tokenizer_config.json."""

    one_row = True

    def _setup(self, content):
        with reading(self.path, "pip install tokenizers"):
            import tokenizers  # optional: T5 does not need it
        eos = self._read_eos()

        with reading(self.path, REMEDY):
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
            self._tokenizer.no_truncation()  # the file may ask for truncation and padding
            self._tokenizer.no_padding()
            self._tokenizer.encode_special_tokens = True  # one that a text spells out is text

            eos_id = self._tokenizer.token_to_id(eos)
            if eos_id is None:
                raise ValueError(f"lacks the eos_token {eos!r:.40} of tokenizer_config.json")
            self.eos_ids = (eos_id,)

            # What the template of the file adds before a text is BOS. The setting add_bos_token has
            # no effect, as in transformers 5.
            plain = self._tokenizer.encode("a", add_special_tokens=False)
            full = self._tokenizer.encode("a")
            start = len(full.ids) - len(plain.ids)
            if full.ids[start:] != plain.ids:
                raise ValueError(
                    "ends prompts with EOS; a T5 needs its spiece.model, a decoder another template"
                )
            self.bos_ids = tuple(full.ids[:start])

            self._tokenizer.add_special_tokens([eos])  # so that EOS is never decoded as text
            self.size = 1 + max(self._tokenizer.get_vocab().values())
            if max(self.bos_ids, default=0) >= self.size:
                raise ValueError("its template adds a token that is not in the vocabulary")

            # Some tokenizers put a space before every text. `_inside` is the same without it.
            adds_space = "".join(plain.tokens).startswith(("▁", "Ġ"))
            if adds_space:
                edited = self._tokenizer.to_str()
                for pattern, replacement in ADDED_SPACE:
                    edited = re.sub(pattern, replacement, edited)
                self._inside = tokenizers.Tokenizer.from_str(edited)
                self._inside.encode_special_tokens = True
            else:
                self._inside = self._tokenizer
                self.target_prefix = " "  # since it adds none, a spaced target begins with its own

    def _read_eos(self):
        """Return the EOS token that tokenizer_config.json names."""
        path = self.path.with_name("tokenizer_config.json")
        eos = read_json(path).get("eos_token")
        with reading(path, REMEDY):
            if isinstance(eos, dict):  # an AddedToken of transformers
                eos = eos.get("content")
            if not isinstance(eos, str):
                raise ValueError("names no eos_token")
        return eos

    def _encode(self, texts, inside=False):
        with reading(self.path, REMEDY):  # some damage shows only when a text is encoded
            tokenizer = self._inside if inside else self._tokenizer
            rows = tokenizer.encode_batch(texts, add_special_tokens=False)
            return [row.ids for row in rows]

    def _decode(self, ids):
        with reading(self.path, REMEDY):
            return self._tokenizer.decode(ids, skip_special_tokens=True)


KINDS = {"spiece.model": T5Tokenizer, "tokenizer.json": JsonTokenizer}


def load(folder: str | os.PathLike) -> Tokenizer:
    """Return the tokenizer of a model folder. Raise UserError if there is none or it is damaged."""
    folder = require_path(folder, DOWNLOAD)
    for name, kind in KINDS.items():
        if (folder / name).is_file():
            return kind(folder / name)
    raise UserError(
        f"{folder}: no {' or '.join(KINDS)}; copy the tokenizer of the model into the folder "
        "(AutoTokenizer of transformers makes a tokenizer.json from a tokenizer.model)"
    )
