"""Tests of tokenizer.py with small tokenizers that are trained here.

parity/test_transformers.py compares ids and texts with those of transformers.
"""

import functools
import shutil
import sys

import pytest

import tokenizer
from helpers import PROMPT, ROOT, refusal, source_of, target_of, write_pieces, write_words
from support.program import read_json, write_json

write_words_with_bos = functools.partial(write_words, post="<s> $A")


@pytest.fixture(scope="module", params=[write_words_with_bos, write_pieces])
def words(request, tmp_path_factory):
    """Return a tokenizer of each kind for decoder-only models."""
    return tokenizer.load(request.param(tmp_path_factory.mktemp("model")))


@pytest.fixture
def folder(tmp_path):
    """Return a folder with a tokenizer.json without BOS."""
    return write_words(tmp_path / "words")


@pytest.fixture
def load_changed(folder):
    """Return a function that loads the tokenizer of `folder` after a change of its JSON."""
    path = folder / "tokenizer.json"

    def load(change):
        values = read_json(path)
        change(values)
        write_json(path, values)
        return tokenizer.load(folder)

    return load


# ------------------------------------------------------------------------------------ ids and texts


def test_space_before_an_answer_is_there_once(words):
    source = source_of(words, PROMPT)
    target = target_of(words, "12 345")
    assert source == source_of(words, PROMPT.rstrip())
    assert words.decode(source + target) == PROMPT + "12 345"
    # The model meets the very ids of the whole text, as it did when it was trained.
    assert source + target == words.encode(PROMPT + "12 345")
    assert source_of(words, "a  ") == words.encode("a ")[:-1]  # one space alone is the answer's


def write_old_pieces(folder):
    """Write pieces with the normalizers of Llama 2's first tokenizer.json."""
    path = write_pieces(folder) / "tokenizer.json"
    values = read_json(path)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    steps = [{"type": "Prepend", "prepend": "\u2581"}, replace]
    normalizer = {"type": "Sequence", "normalizers": steps}
    write_json(path, values | {"normalizer": normalizer, "pre_tokenizer": None})
    return folder


def write_words_with_space(folder):
    path = write_words(folder) / "tokenizer.json"
    values = read_json(path)
    values["pre_tokenizer"]["add_prefix_space"] = True
    write_json(path, values)
    return folder


WRITERS = [write_words_with_bos, write_words_with_space, write_pieces, write_old_pieces]


@pytest.mark.parametrize("write", WRITERS)
def test_texts_are_joined_as_they_stand(write, tmp_path):
    each = tokenizer.load(write(tmp_path / "words"))
    pairs = [
        ("Hot is not", " cold"),
        ("A:\n", "cold"),
        ("Hot is ", "it"),
        ("a", "\n\n b "),
        ("a", ""),
    ]
    prompts, completions = zip(*pairs, strict=True)
    sources = each.sources(prompts, spaced=False)
    targets = each.targets(completions, spaced=False)
    for pair, source, target in zip(pairs, sources, targets, strict=True):
        text = each._tokenizer.decode(source + target, skip_special_tokens=True)
        assert text.removeprefix(" ") == "".join(pair)
        assert target[-1:] == list(each.eos_ids)


def test_special_tokens_in_a_text_are_text(words, tiny_words):
    text = "a </s> <s> <unk> <pad> <extra_id_0> b"
    assert words.decode(words.encode(text)) == text
    for each in (words, tiny_words):
        special = {*each.eos_ids, *each.bos_ids}
        assert not special & set(each.encode(text)[1:-1])


def test_decode_drops_unknown_ids_and_outer_space(words):
    ids = target_of(words, "\n Hello \n")
    assert words.decode([-1, *ids, words.size, 10**9]) == "Hello"


@pytest.mark.parametrize("is_added", [False, True])
def test_eos_is_never_decoded_as_text(load_changed, is_added):
    """EOS may be in the vocabulary alone, or added as an ordinary word."""

    def change(values):
        for token in values["added_tokens"]:
            token["special"] = False
        if not is_added:
            values["added_tokens"] = []

    words = load_changed(change)
    assert words.decode([*target_of(words, "Hello"), 1]) == "Hello"
    assert words.decode(source_of(words, "a </s>")) == "a </s>"
    assert 1 not in source_of(words, "a </s>")


def test_ids_may_leave_gaps(load_changed):
    words = load_changed(lambda values: values["model"]["vocab"].update({"!": 999}))
    assert words.size == 1000
    assert words.decode([999]) == "!"


def test_truncation_and_padding_of_a_file_are_off(folder):
    tokenizers = pytest.importorskip("tokenizers")
    plain = tokenizer.load(folder).encode(PROMPT)
    path = str(folder / "tokenizer.json")
    words = tokenizers.Tokenizer.from_file(path)
    words.enable_truncation(3)
    words.enable_padding(length=64)
    words.save(path)
    assert tokenizer.load(folder).encode(PROMPT) == plain


def test_fingerprint_depends_on_eos(folder):
    before = tokenizer.load(folder).fingerprint
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')
    assert tokenizer.load(folder).fingerprint != before


# --------------------------------------------------------------------------------------- bad files


def refused(folder, expected):
    with refusal(f"{folder}.*{expected}"):
        tokenizer.load(folder)


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("tokenizer_config.json", b"[]", "config.json: not a JSON object"),
        ("tokenizer_config.json", b'{"eos_token": 7}', "config.json: names no eos_token"),
        ("tokenizer_config.json", b'{"eos_token": "end"}', "lacks the eos_token 'end' of"),
        ("tokenizer_config.json", b'{"eos_token": "\\ud800"}', "tokenizer.json"),
        ("tokenizer.json", b"{}", "tokenizer.json"),
        ("tokenizer.json", b"[" * 200, "tokenizer.json"),
    ],
)
def test_bad_file_is_refused(folder, name, content, expected):
    (folder / name).write_bytes(content)
    refused(folder, expected)


def test_missing_or_damaged_pieces_are_refused(tmp_path):
    refused(tmp_path, "no spiece.model or")
    content = (ROOT / "tiny/spiece.model").read_bytes()
    for damaged in (b"not a model", content.replace(b"\xe2\x96\x81", b"\xe2\x96\xff")):
        (tmp_path / "spiece.model").write_bytes(damaged)
        refused(tmp_path, "spiece.model: .*; download it again")


@pytest.mark.parametrize(
    "name, content",
    [
        ("added_tokens.json", {"<extra_id_0>": 997, "{": 998}),
        ("tokenizer.json", {"added_tokens": [{"id": 997}, {"id": 998}]}),
    ],
)
def test_a_t5_with_added_tokens_is_refused(tmp_path, name, content):
    shutil.copy(ROOT / "tiny/spiece.model", tmp_path)
    assert tokenizer.load(tmp_path).size == 998
    write_json(tmp_path / name, content)
    refused(tmp_path, f"{name}: has a token 998; tokens that were added to those of T5 are not")


def test_word_tokenizer_of_another_kind_is_refused(folder, load_changed):
    with refusal("tokenizer.json"):  # the package panics
        load_changed(lambda values: values["model"].update(continuing_subword_prefix="long"))

    unknown = {"unk_token": "<unk>", "vocab": {"a": 0}, "merges": []}
    write_words(folder)
    with refusal("tokenizer.json: .*<unk>"):  # only a text shows it
        load_changed(lambda values: values["model"].update(unknown)).encode("b")

    def add_unknown_bos(values):
        values["post_processor"]["special_tokens"]["<s>"]["ids"] = [999]

    write_words(folder, post="<s> $A")
    with refusal("its template adds a token that is not in the vocabulary"):
        load_changed(add_unknown_bos)

    write_words(folder, post="$A </s>")
    refused(folder, "ends prompts with EOS; a T5 needs its spiece.model")


def test_a_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    refused(folder, "pip install tokenizers")
