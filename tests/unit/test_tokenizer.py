"""Tests of tokenizer.py for decoder-only models. T5's tokenizer is tested in test_data.py.

The tokenizers are trained here. Special tokens that a text spells out are text. The space between
prompt and answer occurs once. A bad file gives one line. parity/test_transformers.py compares ids
and texts with those of transformers.
"""

import json
import pickle
import sys

import pytest

import tokenizer
from helpers import PROMPT, ROOT, TOKENIZER_SETTINGS, TOKENIZER_TEXTS, write_pieces, write_words

tokenizers = pytest.importorskip("tokenizers")


def both(tmp_path, corpus):
    words = write_words(tmp_path / "words", corpus, post="<s> $A")
    return [tokenizer.load(folder) for folder in (words, write_pieces(tmp_path / "pieces", corpus))]


def test_the_space_before_an_answer_is_there_once(tmp_path, corpus):
    for words in both(tmp_path, corpus):
        source, target = words.source(PROMPT), words.target("12 345")
        assert words.source(PROMPT) == words.source(PROMPT.rstrip())
        assert target[-1:] == list(words.eos_ids)
        assert words.decode(source + target) == PROMPT + "12 345"
        # The model meets the very ids of the whole text, as it did when it was trained.
        assert source + target == words.encode(PROMPT + "12 345")
        assert words.source("a  ") == words.encode("a ")[:-1]  # one space alone is the answer's


def test_special_tokens_in_a_text_are_text(tmp_path, corpus):
    for words in both(tmp_path, corpus):
        ids = words.encode("a </s> <s> <unk> b")
        assert not {*words.eos_ids, *words.bos_ids} & set(ids[1:-1])
        assert words.decode(ids) == "a </s> <s> <unk> b"


@pytest.mark.parametrize("added", [[], None])  # EOS is in the vocabulary alone, or added as a word
def test_eos_is_no_text_whatever_the_file_calls_it(tmp_path, corpus, added):
    path = write_words(tmp_path / "words", corpus) / "tokenizer.json"
    content = json.loads(path.read_text())
    ordinary = [{**token, "special": False} for token in content["added_tokens"]]
    path.write_text(json.dumps(content | {"added_tokens": ordinary if added is None else added}))
    words = tokenizer.load(path.parent)
    assert words.decode([*words.target("Hello"), 1, 1]) == "Hello"
    assert 1 not in words.source("a </s>") and words.decode(words.source("a </s>")) == "a </s>"


def test_ids_beyond_the_vocabulary_have_no_text(tmp_path, corpus):
    for words in both(tmp_path, corpus):
        ids = words.target("Hello")
        assert words.decode([-1, *ids, words.size, 10**9]) == "Hello"


def test_ids_may_leave_gaps(tmp_path, corpus):
    path = write_words(tmp_path / "words", corpus) / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    last, top = max(values["model"]["vocab"].items(), key=lambda item: item[1])
    values["model"]["vocab"][last] = top + 9
    path.write_text(json.dumps(values), encoding="utf-8")
    words = tokenizer.load(path.parent)
    assert (
        words.size == top + 10 and words.decode([top + 9]) == last.replace("Ġ", " ").strip() != ""
    )


def test_a_tokenizer_json_that_puts_a_space_before_every_text_gets_no_second(tmp_path, corpus):
    path = write_words(tmp_path / "words", corpus) / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["normalizer"] = {"type": "Prepend", "prepend": " "}  # as Llama 2's
    path.write_text(json.dumps(values), encoding="utf-8")
    words = tokenizer.load(path.parent)
    assert words.target("12 345") == words.encode("12 345")


def test_t5_reads_prompts_and_answers_alike():
    words = tokenizer.load(ROOT / "tiny")
    assert words.source(PROMPT) == words.target(PROMPT) == words.encode(PROMPT)


def test_texts_are_stripped(tmp_path, corpus):
    for words in both(tmp_path, corpus):
        assert words.decode(words.encode("\n a b \n")) == "a b"


def test_the_fingerprint_depends_on_the_pieces(tmp_path, corpus):
    (tmp_path / "other").mkdir()
    for ours, others in zip(
        both(tmp_path, corpus), both(tmp_path / "other", corpus[:-9] * 2), strict=True
    ):
        assert ours.bos_ids == others.bos_ids
        assert ours.eos_ids == others.eos_ids
        assert ours.target_prefix == others.target_prefix
        assert ours.fingerprint != others.fingerprint


@pytest.mark.parametrize(
    "name", ["spiece.model", "tokenizer.model", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_file_too_large_for_a_tokenizer_is_not_read(tmp_path, name):
    (tmp_path / "tokenizer.json").touch()
    with open(tmp_path / name, "wb") as file:
        file.truncate(10**12)  # a sparse file takes no disk space
    with pytest.raises(ValueError, match=f"{name}: larger than"):
        tokenizer.load(tmp_path)


def test_pieces_of_another_kind_are_refused(tmp_path, corpus):
    path = write_pieces(tmp_path / "pieces", corpus) / "tokenizer.model"
    with pytest.raises(ValueError, match="spiece.model: pieces 0 to 2 are not T5's"):
        tokenizer.load(path.rename(path.with_name("spiece.model")))
    write_pieces(tmp_path / "pieces", corpus, eos_id=-1)
    (tmp_path / "pieces/spiece.model").unlink()
    with pytest.raises(ValueError, match="tokenizer.model: has no BOS or no EOS"):
        tokenizer.load(tmp_path / "pieces")


def test_tokenizers_go_to_other_processes_and_folders(tmp_path, corpus):
    for number, words in enumerate(both(tmp_path, corpus)):
        there = pickle.loads(pickle.dumps(words))
        assert [there.encode(text) for text in TOKENIZER_TEXTS] == [
            words.encode(text) for text in TOKENIZER_TEXTS
        ]
        words.save(tmp_path / f"copy{number}")
        assert tokenizer.load(tmp_path / f"copy{number}").fingerprint == words.fingerprint


def test_settings_of_a_file_that_cut_or_pad_are_off(tmp_path, corpus):
    folder = write_words(tmp_path / "words", corpus)
    plain = tokenizer.load(folder).encode(PROMPT)
    words = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    words.enable_truncation(3)
    words.enable_padding(length=64)
    words.save(str(folder / "tokenizer.json"))
    assert tokenizer.load(folder).encode(PROMPT) == plain


def test_bad_files_are_one_line(tmp_path, corpus, monkeypatch):
    folder = write_words(tmp_path / "words", corpus)
    settings, words = folder / "tokenizer_config.json", folder / "tokenizer.json"
    whole = words.read_bytes()

    def refused(expected):
        with pytest.raises(ValueError, match=expected) as caught:
            tokenizer.load(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)

    for content in ("[]", "{"):
        settings.write_text(content)
        refused(settings.name)
    for content in ("{}", '{"eos_token": "</z>"}', '{"eos_token": 7}', '{"eos_token": {}}'):
        settings.write_text(content)
        refused("has no eos_token")
    settings.write_text('{"eos_token": "\\ud800"}')
    refused(words.name)
    settings.write_text(json.dumps(TOKENIZER_SETTINGS))
    panic = whole.replace(
        b'"continuing_subword_prefix": null', b'"continuing_subword_prefix": "long"'
    )
    for content in (b"", b"{}", b"\xff", whole[:-9], b"[" * 10**5, panic):
        words.write_bytes(content)
        refused(words.name)
    unknown = json.loads(whole)
    unknown["model"] |= {"unk_token": "<unk>", "vocab": {"a": 0}, "merges": []}
    words.write_text(json.dumps(unknown | {"added_tokens": unknown["added_tokens"][1:]}))
    with pytest.raises(ValueError, match=f"{words}: .*<unk>"):  # only a text shows it
        tokenizer.load(folder).encode("b")
    write_words(folder, corpus, post="$A </s>")
    refused("ends prompts with EOS as T5 does")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    refused("pip install tokenizers")
