"""experiments/spans.py and pretrain.py: nothing of a text is lost, batches are pure, bad text is one line."""

import lzma

import numpy as np
import pytest
import torch

import checkpoint
import tokenizer as tokenizers
from experiments.spans import TextStream, corrupt_spans
from helpers import ROOT, count_encodes, records, run, sentences


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.load(ROOT / "tiny")


def restore(source: list[int], target: list[int], tokenizer) -> list[int]:
    """The window, from a source and a target that ends with one sentinel more and EOS."""
    assert source[-1] == target[-1] == 1
    spans, k, last = {}, 0, tokenizer.size - 1  # last is sentinel 0
    for token in target[:-1]:
        if token == last - k:
            spans[token], k = [], k + 1
        else:
            spans[last - k + 1].append(token)
    assert spans.pop(last - k + 1) == [] and all(spans.values())
    assert [token for token in source if token > last - 100] == list(spans)
    return [token for place in source[:-1] for token in spans.get(place, [place])]


@pytest.mark.parametrize("length", [2, 3, 7, 20, 512, 4000])
def test_corruption_loses_nothing(tokenizer, length):
    for seed in range(20):
        window = (
            np.random.default_rng(seed).integers(3, len(tokenizer.pieces), length).astype(np.uint16)
        )
        source, target = corrupt_spans(window, tokenizer, np.random.default_rng(seed))
        assert restore(source.tolist(), target.tolist(), tokenizer) == window.tolist()
        lost = sum(2 < token < len(tokenizer.pieces) for token in target.tolist())
        assert lost == max(1, round(0.15 * length))
        if length == 512:
            assert len(target) - lost - 2 == round(lost / 3)  # spans of 3 tokens on average


def test_spans_lie_anywhere_in_the_window(tokenizer):
    window, lost = np.arange(3, 103), np.zeros(103)
    assert len(tokenizer.pieces) > 103
    for seed in range(500):
        target = corrupt_spans(window, tokenizer, np.random.default_rng(seed))[1]
        lost[[token for token in target if 3 <= token < 103]] += 1
    assert lost[20:90].min() > 25 and lost[20:90].max() < 150  # 75 expected


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(sentences(400)))
    return path


def test_text_stream_is_pure_and_covers_the_text(text, tokenizer, tmp_path):
    stream = TextStream(text, tokenizer, length=32, seed=3)
    tokens = [token for line in sentences(400) for token in tokenizer.encode(line)[:-1]]
    windows, steps = len(tokens) // 32, -(-(len(tokens) // 32) // 8)
    batches = [stream.batch_at(step, 8) for step in range(2 * steps)]
    again = TextStream(text, tokenizer, length=32, seed=3)
    for step in (2 * steps - 1, 0, 5):
        both = zip(batches[step][:4], again.batch_at(step, 8)[:4], strict=True)
        assert all(torch.equal(one, other) for one, other in both)
    names = [name for batch in batches for name in batch.ids]
    assert len(set(names[:windows])) == windows and set(names[windows : 2 * windows]) == set(
        names[:windows]
    )
    assert names[:windows] != names[windows : 2 * windows]
    for row, name in enumerate(batches[0].ids):
        source = batches[0].input_ids[row][batches[0].attention_mask[row]].tolist()
        target = [token for token in batches[0].labels[row].tolist() if token != -100]
        start = 32 * int(name.removeprefix("text-"))
        assert restore(source, target, tokenizer) == tokens[start : start + 32]
    other = TextStream(text, tokenizer, length=32, seed=4).batch_at(0, 8)
    assert other.ids != batches[0].ids and batches[0].task_ids.tolist() == [-1] * 8


def test_text_is_tokenised_once_and_xz_is_the_same(text, tokenizer, tmp_path, monkeypatch):
    plain = TextStream(text, tokenizer, length=32, seed=3)
    (tmp_path / "text.xz").write_bytes(lzma.compress(text.read_bytes()))
    packed = TextStream(tmp_path / "text.xz", tokenizer, length=32, seed=3)
    assert torch.equal(plain.batch_at(1, 4).input_ids, packed.batch_at(1, 4).input_ids)
    calls = count_encodes(monkeypatch)
    again = TextStream(text, tokenizer, length=64, seed=0)
    assert not calls and again.batch_at(0, 2).input_ids.shape[0] == 2
    text.write_text("\n".join(sentences(300, seed=9)))
    TextStream(text, tokenizer, length=32, seed=3)
    assert calls


def test_bad_text_is_one_line(tokenizer, tmp_path):
    whole = lzma.compress(b"a line\n" * 999)
    files = {
        "a.txt": b"\xff\xfe",
        "b.xz": b"no xz",
        "c.xz": whole[:-99],
        "d.txt": b"",
        "e.txt": b"few",
    }
    for name, raw in files.items():
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(ValueError, match=name) as caught:
            TextStream(tmp_path / name, tokenizer, length=512, seed=0)
        assert "\n" not in str(caught.value)


def test_a_base_is_pretrained_and_goes_on_from_anywhere(home, tmp_path_factory):
    (home / "text.txt").write_text("The river ran past the old mill and on to the sea.\n" * 60)
    run(
        "experiments/pretrain.py",
        "--model",
        "tiny",
        "--data",
        "sni",
        "--text",
        "text.txt",
        "--text-length",
        "32",
        "--steps",
        "4",
        "--eval-every",
        "2",
        "--eval-instances",
        "4",
        "--batch-size",
        "4",
        "--max-tasks",
        "3",
        "--warmup",
        "0",
        "--lr-full",
        "1e-3",
        "--device",
        "cpu",
        "--out",
        "base",
        cwd=home,
    )
    folder = home / "base"
    whole = (folder / "model/model.safetensors").read_bytes()
    assert checkpoint.load(folder / "model").config == checkpoint.read_config(ROOT / "tiny")
    assert (
        tokenizers.load(folder / "model").fingerprint == tokenizers.load(ROOT / "tiny").fingerprint
    )
    assert [row["step"] for row in records(folder) if "loss" in row] == list(range(4))
    for path in (
        folder / "checkpoint.pt",
        folder / "metrics.jsonl",
        folder / "model/model.safetensors",
    ):
        path.unlink()
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    run("experiments/pretrain.py", "--resume", "--out", folder, "--device", "cpu", cwd=elsewhere)
    assert (folder / "model/model.safetensors").read_bytes() == whole


def test_a_window_is_corrupted_anew_in_each_epoch(tmp_path, tokenizer):
    (tmp_path / "text").write_text("\n".join(sentences(20)))
    stream = TextStream(tmp_path / "text", tokenizer, length=32, seed=3)
    n, said = len(stream._windows), {}
    for step in range(2 * n):
        batch = stream.batch_at(step, 1)
        said.setdefault(batch.ids[0], set()).add(tuple(batch.labels[0].tolist()))
    assert len(said) == n and sum(len(targets) == 2 for targets in said.values()) > n / 2
