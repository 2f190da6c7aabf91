"""experiments/spans.py and pretrain.py: no text is lost, batches depend only on their arguments."""

import lzma

import numpy as np
import pytest
import torch

import checkpoint
import tokenizer as tokenizers
from experiments import spans
from experiments.spans import TextStream, corrupt_spans
from helpers import ROOT, records, run, sentences


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.load(ROOT / "tiny")


def restore(source: list[int], target: list[int], tokenizer) -> list[int]:
    """Return the window of a source and a target, which ends with one more sentinel and EOS."""
    assert source[-1] == target[-1] == 1
    first_sentinel = tokenizer.size - 1
    lost = {}
    for token in target[:-1]:
        if token == first_sentinel - len(lost):
            newest = lost[token] = []
        else:
            newest.append(token)
    assert lost.popitem()[1] == []
    assert all(lost.values())
    assert [token for token in source if token > first_sentinel - 100] == list(lost)
    window = []
    for token in source[:-1]:
        window += lost.get(token, [token])
    return window


@pytest.mark.parametrize("length", [2, 3, 20, 512, 4000])
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
    lost = np.zeros(100)
    for seed in range(500):
        _, target = corrupt_spans(np.arange(100), tokenizer, np.random.default_rng(seed))
        lost[target[target < 100]] += 1
    assert lost[20:90].min() > 25  # 75 are expected
    assert lost[20:90].max() < 150


@pytest.fixture
def stream(tmp_path, tokenizer):
    """Return a function that writes lines to a file and opens it."""

    def open_text(lines, name="text.txt", seed=3):
        content = "\n".join(lines).encode()
        if name.endswith(".xz"):
            content = lzma.compress(content)
        (tmp_path / name).write_bytes(content)
        return TextStream(tmp_path / name, tokenizer, length=32, seed=seed)

    return open_text


def test_text_stream_is_pure_and_covers_the_text(stream, tokenizer):
    lines = sentences(20)
    tokens = []
    for line in "\n".join(lines).splitlines(keepends=True):
        tokens += tokenizer.encode(line)[:-1]
    n = len(tokens) // 32
    text = stream(lines)
    epochs = []
    for epoch in range(2):
        targets = {}
        for step in range(epoch * n, (epoch + 1) * n):
            batch = text.batch_at(step, 1)
            assert batch.task_ids.tolist() == [-1]
            start = 32 * int(batch.ids[0].removeprefix("text-"))
            source, target = batch.input_ids[0].tolist(), batch.labels[0].tolist()
            assert restore(source, target, tokenizer) == tokens[start : start + 32]
            targets[start] = target
        epochs.append(targets)

    # Each epoch has every window once, in another order, and most are corrupted anew.
    first, second = epochs
    assert sorted(first) == sorted(second) == list(range(0, 32 * n, 32))
    assert list(first) != list(second)
    assert sum(first[start] != second[start] for start in first) > n / 2

    # A batch depends on (seed, step, batch_size) alone, and not on how the text is packed.
    for again in (stream(lines), stream(lines, "text.xz")):
        for step in (n - 1, 0):
            assert torch.equal(again.batch_at(step, 4).labels, text.batch_at(step, 4).labels)
    assert stream(lines, seed=4).batch_at(0, 4).ids != text.batch_at(0, 4).ids


def test_text_is_tokenised_once(stream, tmp_path, tokenizer, monkeypatch):
    stream(sentences(40))
    monkeypatch.setattr(spans, "_encode_lines", None)
    TextStream(tmp_path / "text.txt", tokenizer, length=64, seed=0)


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
    folder = home / "base"
    common = ["--device", "cpu", "--out", folder]
    run(program, *flags.split(), *common, cwd=home)
    weights = folder / "model/model.safetensors"
    whole = weights.read_bytes()
    checkpoint.load(folder / "model")
    tokenizers.load(folder / "model")
    assert [row["step"] for row in records(folder) if "loss" in row] == list(range(4))

    for path in (folder / "progress.pt", folder / "metrics.jsonl", weights):
        path.unlink()
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    run(program, "--resume", *common, cwd=elsewhere)
    assert weights.read_bytes() == whole
    error = run(program, "--resume", *common, "--text-length", "64", cwd=elsewhere, code=2)
    assert f"--text-length 64: the run in {folder} has 32; leave it out" in error
