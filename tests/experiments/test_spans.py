"""experiments/spans.py and pretrain.py: nothing of a text is lost, and batches are pure."""

import lzma

import numpy as np
import pytest
import torch

import checkpoint
import tokenizer as tokenizers
from experiments.spans import TextStream, corrupt_spans
from helpers import ROOT, records, run, sentences


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.load(ROOT / "tiny")


def restore(source: list[int], target: list[int], tokenizer) -> list[int]:
    """Return the window of a source and a target, which ends with one more sentinel and EOS."""
    assert source[-1] == target[-1] == 1
    spans = {}
    first_sentinel = tokenizer.size - 1
    newest = None
    for token in target[:-1]:
        if token == first_sentinel - len(spans):
            newest = spans[token] = []
        else:
            newest.append(token)
    assert spans.pop(first_sentinel - len(spans) + 1) == []
    assert all(spans.values())
    assert [token for token in source if token > first_sentinel - 100] == list(spans)
    window = []
    for token in source[:-1]:
        window += spans.get(token, [token])
    return window


@pytest.mark.parametrize("length", [2, 3, 7, 20, 512, 4000])
def test_corrupt_spans_loses_nothing(tokenizer, length):
    pieces = len(tokenizer.pieces)
    for seed in range(20):
        window = np.random.default_rng(seed).integers(3, pieces, length).astype(np.uint16)
        source, target = corrupt_spans(window, tokenizer, np.random.default_rng(seed))
        assert restore(source.tolist(), target.tolist(), tokenizer) == window.tolist()
        lost = sum(2 < token < pieces for token in target.tolist())
        assert lost == max(1, round(0.15 * length))
        if length == 512:
            assert len(target) - lost - 2 == round(lost / 3)  # spans of 3 tokens on average


def test_corrupt_spans_takes_spans_from_anywhere(tokenizer):
    window = np.arange(3, 103)
    lost = np.zeros(103)
    assert len(tokenizer.pieces) > 103
    for seed in range(500):
        _, target = corrupt_spans(window, tokenizer, np.random.default_rng(seed))
        lost[[token for token in target if 3 <= token < 103]] += 1
    assert lost[20:90].min() > 25  # 75 are expected
    assert lost[20:90].max() < 150


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(sentences(400)))
    return path


def test_text_stream_is_pure_and_covers_the_text(text, tokenizer):
    stream = TextStream(text, tokenizer, length=32, seed=3)
    tokens = []
    for line in sentences(400):
        tokens += tokenizer.encode(line)[:-1]
    windows = len(tokens) // 32
    steps = -(-windows // 8)  # of one epoch
    batches = [stream.batch_at(step, 8) for step in range(2 * steps)]
    again = TextStream(text, tokenizer, length=32, seed=3)
    for step in (2 * steps - 1, 0, 5):
        other = again.batch_at(step, 8)
        assert torch.equal(batches[step].input_ids, other.input_ids)
        assert torch.equal(batches[step].attention_mask, other.attention_mask)
        assert torch.equal(batches[step].labels, other.labels)

    # Each epoch has every window once, in another order.
    names = [name for batch in batches for name in batch.ids]
    assert len(set(names[:windows])) == windows
    assert set(names[windows : 2 * windows]) == set(names[:windows])
    assert names[:windows] != names[windows : 2 * windows]

    # The windows are those of the text.
    first = batches[0]
    for row, name in enumerate(first.ids):
        source = first.input_ids[row][first.attention_mask[row]].tolist()
        target = [token for token in first.labels[row].tolist() if token != -100]
        start = 32 * int(name.removeprefix("text-"))
        assert restore(source, target, tokenizer) == tokens[start : start + 32]
    other = TextStream(text, tokenizer, length=32, seed=4).batch_at(0, 8)
    assert other.ids != first.ids
    assert other.task_ids.tolist() == [-1] * 8


def test_text_stream_corrupts_a_window_anew_in_each_epoch(tmp_path, tokenizer):
    (tmp_path / "text").write_text("\n".join(sentences(20)))
    stream = TextStream(tmp_path / "text", tokenizer, length=32, seed=3)
    n = len(stream._windows)
    targets = {}
    for step in range(2 * n):
        batch = stream.batch_at(step, 1)
        targets.setdefault(batch.ids[0], set()).add(tuple(batch.labels[0].tolist()))
    assert len(targets) == n
    assert sum(len(different) == 2 for different in targets.values()) > n / 2


def test_text_is_tokenised_once(text, tokenizer, monkeypatch):
    TextStream(text, tokenizer, length=32, seed=3)
    calls = []
    encode = tokenizers.Tokenizer.encode

    def watched(self, line):
        calls.append(line)
        return encode(self, line)

    monkeypatch.setattr(tokenizers.Tokenizer, "encode", watched)
    again = TextStream(text, tokenizer, length=64, seed=0)
    assert not calls
    assert again.batch_at(0, 2).input_ids.shape[0] == 2
    text.write_text("\n".join(sentences(300, seed=9)))
    TextStream(text, tokenizer, length=32, seed=3)
    assert calls


def test_text_in_xz_is_the_same(text, tokenizer, tmp_path):
    plain = TextStream(text, tokenizer, length=32, seed=3)
    (tmp_path / "text.xz").write_bytes(lzma.compress(text.read_bytes()))
    packed = TextStream(tmp_path / "text.xz", tokenizer, length=32, seed=3)
    assert torch.equal(plain.batch_at(1, 4).input_ids, packed.batch_at(1, 4).input_ids)


CUT = lzma.compress(b"a line\n" * 999)[:-99]
BAD = {"a.txt": b"\xff\xfe", "b.xz": b"no xz", "c.xz": CUT, "d.txt": b"", "e.txt": b"few"}


@pytest.mark.parametrize("name, content", BAD.items())
def test_bad_text_is_refused(tokenizer, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name) as caught:
        TextStream(tmp_path / name, tokenizer, length=512, seed=0)
    assert "\n" not in str(caught.value)


def test_pretraining_resumes_from_anywhere(home, tmp_path_factory):
    (home / "text.txt").write_text("The river ran past the old mill and on to the sea.\n" * 60)
    flags = "--model tiny --data sni --text text.txt --text-length 32 --steps 4 --eval-every 2"
    flags += " --eval-instances 4 --batch-size 4 --max-tasks 3 --warmup 0 --lr-full 1e-3"
    program = "experiments/pretrain.py"
    run(program, *flags.split(), "--device", "cpu", "--out", "base", cwd=home)
    folder = home / "base"
    weights = folder / "model/model.safetensors"
    whole = weights.read_bytes()
    assert checkpoint.load(folder / "model").config == checkpoint.read_config(ROOT / "tiny")
    fingerprint = tokenizers.load(ROOT / "tiny").fingerprint
    assert tokenizers.load(folder / "model").fingerprint == fingerprint
    assert [row["step"] for row in records(folder) if "loss" in row] == list(range(4))

    for path in (folder / "checkpoint.pt", folder / "metrics.jsonl", weights):
        path.unlink()
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    run(program, "--resume", "--out", folder, "--device", "cpu", cwd=elsewhere)
    assert weights.read_bytes() == whole

    other = ["--resume", "--out", folder, "--device", "cpu", "--text-length", "64"]
    error = run(program, *other, cwd=elsewhere, code=2)
    assert f"--text-length 64: the run in {folder} has 32; leave it out" in error
