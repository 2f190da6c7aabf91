"""Tests of data.py (task files, sets, prompt, cache, batches) and of T5's tokenizer.

Only the test that takes `sni_dir` needs files from outside the repository.
parity/test_official_sni.py compares prompts with the official ones.
"""

import errno
import io
import json
import os
import re
from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest
import sentencepiece
import torch

import data
import eval as evaluation
import tokenizer as tokenizers
from data import (
    DataConfig,
    batch_at,
    collate,
    load_sets,
    read_splits,
    read_task,
    render_prompt,
    split_instances,
)
from helpers import ROOT, Bytes, count_encodes, make_example, task_json, write_lists, write_task


@pytest.fixture
def repository(tmp_path):
    """Training tasks of 10, 30 and 150 instances, a test task of 130, files that are no tasks."""
    for name, n in (("task3_c", 10), ("task1_a", 30), ("task2_b", 150), ("task9_t", 130)):
        write_task(tmp_path / "sni", name, task_json(n))
    for name in ("README.md", ".DS_Store", "task1_a.json.swp"):
        (tmp_path / "sni" / "tasks" / name).write_bytes(b"\xff not a task")
    write_lists(tmp_path / "sni", ["task3_c", "task1_a", "task2_b"], ["task9_t"])
    return tmp_path / "sni"


@pytest.fixture
def config(repository, tmp_path, monkeypatch):
    """The settings for `repository`, with a token cache of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return DataConfig(data=str(repository))


# --------------------------------------------------------------------------------------- tokenizer


def test_spelt_out_special_tokens_stay_text(tokenizer):
    ids = tokenizer.encode("</s> <pad> <extra_id_0>")
    assert ids[-1] == 1 and not {0, 1} & set(ids[:-1]) and max(ids) < tokenizer.size


def test_bad_tokenizer_is_one_line(tmp_path, model_dir):
    (tmp_path / "bad.model").write_bytes(b"not a model")
    (tmp_path / "empty.model").write_bytes(b"")
    sentencepiece.SentencePieceTrainer.train(
        input=str(model_dir / "text"),
        model_prefix=str(tmp_path / "other"),
        vocab_size=100,
        minloglevel=2,
    )
    for path, words in (
        (tmp_path, "spiece.model"),
        (tmp_path / "bad.model", "not a SentencePiece model"),
        (tmp_path / "empty.model", r"empty.model: (not a SentencePiece|pieces 0)"),
        (tmp_path / "other.model", "pieces 0 to 2"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            tokenizers.load(path)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------- tasks, sets

ODD = {
    "definition a str": ({"Definition": "Sort them."}, lambda t: t["definition"] == "Sort them."),
    "two definitions": ({"Definition": ["One.", "Two."]}, lambda t: t["definition"] == "One."),
    "no id": (
        {"Instances": [{"input": "a", "output": ["b"]}] * 2},
        lambda t: [i["id"] for i in t["instances"]] == ["task1_x-0", "task1_x-1"],
    ),
    "output a str": (
        {"Instances": [{"output": "b", "input": "a", "id": "x"}]},
        lambda t: t["instances"] == [{"id": "x", "input": "a", "output": ["b"]}],
    ),
    "no explanation": (
        {"Positive Examples": [{"input": "a", "output": "b"}]},
        lambda t: t["positive"] == [{"input": "a", "output": "b"}],
    ),
    "blank texts": (
        {"Instances": [{"id": "x", "input": "", "output": ["", " \r\n\u00a0\x00"]}]},
        lambda t: t["instances"][0]["output"] == ["", " \r\n\u00a0\x00"],
    ),
    "no categories": ({"Categories": []}, lambda t: t["category"] == "Unknown"),
    "category": ({}, lambda t: (t["name"], t["category"]) == ("task1_x", "Sorting")),
}


def test_a_question_of_other_bytes_than_text_is_refused():
    words, config = tokenizers.load(ROOT / "tiny"), data.DataConfig()
    for texts, field in (("\udce9", "x"), "--ask"), (("x", "\udce9"), "--input"):
        with pytest.raises(ValueError, match=f"{field}: expected text without lone surrogates"):
            data.make_example(*texts, words, config)


@pytest.mark.parametrize("changes, holds", ODD.values(), ids=ODD)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "bom"])
def test_irregular_files_are_read(tmp_path, changes, holds, mark):
    path = write_task(tmp_path, "task1_x", mark + json.dumps(task_json(**changes)).encode())
    assert b"NaN" in path.read_bytes() and holds(read_task(path))


def without(key: str) -> dict:
    return {name: value for name, value in task_json().items() if name != key}


def instance(**row) -> dict:
    return task_json(Instances=[{"input": "b", "output": ["c"]}, {"input": "y", **row}])


BAD = {  # content of a task file: what the error says
    "not JSON": (b"{", "Expecting property name"),
    "not UTF-8": (b'{"a": "\xff"}', "utf-8"),
    "a list": (b"[]", "not a JSON object"),
    "too deep": (b"[" * 200_000, "recursion"),
    "a number of 5000 digits": (b"[" + b"9" * 5000 + b"]", "digits"),
    "no definition": (without("Definition"), "Definition"),
    "definition a number": (task_json(Definition=[3]), "Definition: expected a string"),
    "no instances": (without("Instances"), "Instances"),
    "instances an object": (task_json(Instances={"a": 1}), "'str' object"),
    "instances empty": (task_json(Instances=[]), "Instances is empty"),
    "instance a str": (task_json(Instances=["a"]), "'str' object"),
    "no output": (instance(), "output"),
    "output empty": (instance(output=[]), r"Instances\[1\]: output is empty"),
    "output a number": (instance(output=3), r"Instances\[1\]: expected a string"),
    "output an object": (instance(output={"a": "b"}), r"Instances\[1\]: expected a string"),
    "output of numbers": (instance(output=["a", 3]), r"Instances\[1\]: expected a string"),
    "input null": (instance(input=None, output="a"), r"Instances\[1\]: expected a string"),
    "lone surrogate": (instance(output=["a\ud800"]), r"Instances\[1\]: .* lone surrogates"),
    "examples a str": (task_json(**{"Positive Examples": "a"}), "string indices"),
    "no example output": (task_json(**{"Negative Examples": [{"input": "a"}]}), "output"),
    "example a number": (
        task_json(**{"Negative Examples": [{"input": "a", "output": 3}]}),
        "Negative Examples: expected a string",
    ),
}


@pytest.mark.parametrize("content, problem", BAD.values(), ids=BAD)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, content, problem):
    path = write_task(tmp_path, "task1_x", content)
    with pytest.raises(ValueError, match=problem) as caught:
        read_task(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_splits_skip_missing_tasks_with_one_warning(repository, capsys):
    write_lists(
        repository, ["task3_c", "task404_gone", "", "task1_a", "task3_c"], ["task9_t", "task5_gone"]
    )
    for _ in range(2):
        assert read_splits(repository) == {"train": ["task3_c", "task1_a"], "test": ["task9_t"]}
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.endswith("sni/tasks: 2 tasks of splits/default are missing")


def test_splits_without_lists_or_tasks(repository, tmp_path):
    write_lists(repository, [], ["task9_t"])
    assert read_splits(repository) == {"train": [], "test": ["task9_t"]}
    write_lists(repository, ["task404_gone"], [])
    with pytest.raises(
        ValueError, match="1 tasks of splits/default are missing, which is all of them"
    ):
        read_splits(repository)
    with pytest.raises(ValueError, match="train_tasks.txt.*git clone"):
        read_splits(tmp_path)


def test_a_task_on_both_lists_is_refused(repository):
    write_lists(repository, ["task1_a", "task9_t", "task2_b"], ["task9_t"])
    problem = "splits/default: task9_t is on both lists; take it off one of them"
    with pytest.raises(ValueError, match=problem):
        read_splits(repository)


@pytest.mark.parametrize(
    "name", ["../task1_a", "a/b", "a\\b", "..", "/etc/passwd", "\0", "a" * 999]
)
def test_names_do_not_leave_their_folder(repository, name):
    write_lists(repository, [name], ["task9_t"])
    with pytest.raises(ValueError, match="plain name"):
        read_splits(repository)
    with pytest.raises(ValueError, match="--splits: .* plain name"):
        read_splits(repository, name)


@pytest.mark.parametrize("n", [0, 1, 4, 5, 30, 99, 100, 139, 140, 1000])
def test_sets_are_disjoint_nested_and_fixed(n):
    sets = {size: split_instances(range(n), "task1_a", size) for size in (10, 30, 100, 500)}
    for size, (train, dev, seen) in sets.items():
        assert len({*train, *dev, *seen}) == len(train) + len(dev) + len(seen)
        assert {*train, *dev, *seen} <= set(range(n))
        assert len(train) == min(size, n - len(dev) - len(seen))
        assert (dev, seen) == sets[100][1:]
        assert len(dev) == len(seen) == (20 if n >= 140 else n // 5)
        assert (dev != [] and seen != []) == (n >= 5) and set(train) <= set(sets[500][0])
    assert set(sets[10][0]) <= set(sets[30][0]) <= set(sets[100][0])
    if n > 20:
        assert sets[100] != split_instances(range(n), "task1_b", 100)


def test_a_split_is_the_same_for_ever():
    """A run that is evaluated, or resumed, years later must find its own sets."""
    assert split_instances(range(12), "task1_a", 5) == ([6, 7, 8, 9, 2], [5, 4], [1, 10])


def test_repeated_instances_are_on_one_side():
    """Half of the contents occur three times. None is in two sets. Dev and seen have each once."""
    contents = [*range(100), *range(50), *range(50)]
    parts = split_instances(contents, "task1_a", 500)
    train, dev, seen = ([contents[i] for i in part] for part in parts)
    assert not {*train} & {*dev} and not {*train} & {*seen}
    assert {*train, *dev, *seen} == {*range(100)}
    assert len({*dev, *seen}) == len(dev) + len(seen) == 40
    assert all(train.count(content) == (3 if content < 50 else 1) for content in train)


# ------------------------------------------------------------------------------------------ prompt


def test_examples_are_taken_while_the_whole_fits():
    task = task_json(**{"Positive Examples": [{"input": "a", "output": "b"}] * 3})
    full = len(Bytes().encode(render_prompt(task, {"input": "x"}, Bytes(), num_pos=3)))
    for limit, count in ((full + 1, 3), (full, 2)):  # with three, the check has one space more
        source = render_prompt(task, {"input": "x"}, Bytes(), num_pos=3, max_source_length=limit)
        assert source.count("Positive Example") == count and source.endswith("Input: x.\nOutput: ")
    cut = render_prompt(task, {"input": "x" * 50}, Bytes(), max_source_length=60)
    assert cut.startswith("Definition: Sort the words.\n\nNow complete") and len(cut) == 60


# ------------------------------------------------------------------------------------------- cache


def contents(examples) -> list:
    return [
        (
            e.id,
            e.task,
            e.category,
            e.source_ids.tolist(),
            [ids.tolist() for ids in e.target_ids],
            e.references,
            e.task_index,
        )
        for e in examples
    ]


def load_all(config, tokenizer) -> dict[str, list]:
    return {name: contents(examples) for name, examples in load_sets(config, tokenizer).items()}


def test_sets_hold_what_the_files_say(config, repository, tokenizer):
    sets = load_sets(config, tokenizer)
    sizes = {name: len(examples) for name, examples in sets.items()}
    assert sizes == dict(train=6 + 18 + 100, dev=2 + 6 + 20, seen=2 + 6 + 20, test=100)
    for which, examples in enumerate((sets["train"], sets["dev"], sets["seen"])):
        assert examples.tasks == ["task1_a", "task2_b", "task3_c"]
        assert examples.source_lengths.tolist() == [len(e.source_ids) for e in examples]
        for index, (name, n) in enumerate((("task1_a", 30), ("task2_b", 150), ("task3_c", 10))):
            task = read_task(repository / "tasks" / f"{name}.json")
            of_task = [e for e in examples if e.task == name]
            assert [e.position for e in of_task] == split_instances(range(n), name, 100)[which]
            example, instance = of_task[1], task["instances"][of_task[1].position]
            assert (example.id, example.references) == (instance["id"], instance["output"])
            assert (example.task_index, example.category) == (index, "Sorting")
            assert example.source_ids.dtype == np.int32
            prompt = render_prompt(task, instance, tokenizer)
            assert example.source_ids.tolist() == tokenizer.encode(prompt)
            targets = [tokenizer.encode(text) for text in instance["output"]]
            assert [ids.tolist() for ids in example.target_ids] == targets
    assert [e.id for e in sets["test"]] == [f"id-{i}" for i in range(100)]
    assert {e.task_index for e in sets["test"]} == {-1}


def test_max_tasks_are_the_first_of_the_list(config, tokenizer):
    sets = load_sets(replace(config, max_tasks=2), tokenizer)
    assert sets["train"].tasks == ["task1_a", "task3_c"]


def test_a_subsample_is_spread_evenly_over_the_set():
    assert data.subsample(range(10), 4) == [0, 2, 5, 7]
    assert data.subsample(range(3), 0) == data.subsample(range(3), 9) == [0, 1, 2]


def test_task_ids_are_those_of_the_run(config, tokenizer):
    run = ["task0_x", "task2_b", "task3_c"]
    seen = load_sets(config, tokenizer, ["seen"], training=run)["seen"]
    assert {(e.task, e.task_index) for e in seen} == {
        ("task1_a", -1),
        ("task2_b", 1),
        ("task3_c", 2),
    }


def test_long_sources_and_targets_are_cut_and_keep_eos(repository, tmp_path, tokenizer):
    config = DataConfig(data=str(repository), max_source_length=20, max_target_length=3)
    for example in load_sets(config, tokenizer)["train"]:
        assert len(example.source_ids) <= 20 and example.source_ids[-1] == 1
        assert all(len(ids) <= 3 and ids[-1] == 1 for ids in example.target_ids)


def test_a_question_that_is_cut_is_reported(tokenizer, capsys):
    data.make_example("Say it.", "word", tokenizer, data.DataConfig())
    assert not capsys.readouterr().err
    data.make_example("Say it.", "word " * 3000, tokenizer, data.DataConfig(max_source_length=999))
    assert "--max-source-length 999: the end of the input is cut off" in capsys.readouterr().err


def test_sources_that_are_cut_are_counted(config, repository, tokenizer, capsys):
    texts = [{"input": "river " * n, "output": "stone"} for n in range(1, 100)]
    write_task(repository, "task3_c", task_json(Instances=texts))
    short = replace(config, max_source_length=60)
    for _ in range(2):  # made, and from the cache
        sets = load_sets(short, tokenizer, ["train", "dev", "seen"])
    shown = [tokenizer.decode(e.source_ids) for examples in sets.values() for e in examples]
    cut = sum(not text.endswith("Output:") for text in shown)
    (warning,) = capsys.readouterr().err.splitlines()
    assert 10 < cut and warning.endswith(
        f"--max-source-length 60: {cut} sources are too long and lose their ends"
    )
    load_sets(config, tokenizer)
    assert not capsys.readouterr().err


def test_equal_ids_are_told_apart_by_position(config, repository, tokenizer):
    instances = [{"id": "same", "input": f"{i}", "output": [f"{i}"]} for i in range(30)]
    write_task(repository, "task1_a", task_json(Instances=instances))
    of_task = [e for e in load_sets(config, tokenizer)["train"] if e.task == "task1_a"]
    assert len({e.position for e in of_task}) == 18
    inputs = evaluation.copy_heuristic("copy-input", config.data, of_task)
    assert all(
        e.references == [str(e.position)] == [said] for e, said in zip(of_task, inputs, strict=True)
    )


def test_second_load_does_not_tokenise(config, tokenizer, monkeypatch):
    calls = count_encodes(monkeypatch)
    first = load_all(config, tokenizer)
    assert calls
    calls.clear()
    assert load_all(config, tokenizer) == first and not calls


def test_train_dev_and_seen_share_one_cache_file(config, tokenizer, tmp_path, monkeypatch):
    load_sets(config, tokenizer, ["train"])
    calls = count_encodes(monkeypatch)
    load_sets(config, tokenizer, ["dev", "seen"])
    assert not calls and len(list((tmp_path / "orchmoe").iterdir())) == 1


@pytest.mark.parametrize(
    "change",
    [
        dict(num_pos=1),
        dict(num_neg=1),
        dict(definition=False),
        dict(explanation=True),
        dict(max_tasks=1),
        dict(max_source_length=50),
        dict(max_target_length=2),
        dict(train_instances=5),
    ],
    ids=str,
)
def test_the_cache_tells_options_apart(config, tokenizer, change, monkeypatch, tmp_path):
    before, changed = load_all(config, tokenizer), replace(config, **change)
    found = load_all(changed, tokenizer)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "fresh"))
    assert before != found == load_all(changed, tokenizer)


def test_the_cache_tells_tokenizers_apart(config, tokenizer, monkeypatch, tmp_path):
    other, before = tokenizers.load(ROOT / "tiny"), load_all(config, tokenizer)
    found = load_all(config, other)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "fresh"))
    assert before != found == load_all(config, other)


def test_a_changed_file_is_read_anew_and_replaces_its_cache(
    config, repository, tokenizer, tmp_path
):
    before = load_all(config, tokenizer)
    path = repository / "tasks/task3_c.json"
    size = path.stat().st_size
    write_task(repository, "task3_c", task_json(Definition=["Swap the words."]))
    assert path.stat().st_size == size
    after = load_all(config, tokenizer)
    assert after["train"] != before["train"] and after["test"] == before["test"]
    assert len(list((tmp_path / "orchmoe").iterdir())) == 2


def test_the_digest_is_of_the_contents_of_the_tasks(config, repository, tokenizer):
    def digests() -> dict[str, str]:
        return {name: examples.digest for name, examples in load_sets(config, tokenizer).items()}

    first = digests()
    assert re.fullmatch("[0-9a-f]{16}", first["train"])
    assert first["train"] == first["dev"] == first["seen"]
    path = repository / "tasks/task2_b.json"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"maybe so", b"maybe no"))
    assert digests()["train"] != first["train"]
    assert digests()["test"] == first["test"] != first["train"]
    path.write_bytes(whole)
    assert digests() == first


def saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


DAMAGE = {
    "short": lambda raw: raw[:-1],
    "stub": lambda raw: raw[:20],
    "empty": lambda raw: b"",
    "of somebody else": lambda raw: saved({"other": 1}),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_cache_is_remade(config, tokenizer, tmp_path, damage):
    first = load_all(config, tokenizer)
    for path in (tmp_path / "orchmoe").iterdir():
        whole = path.read_bytes()
        path.write_bytes(damage(whole))
        assert load_all(config, tokenizer) == first and path.read_bytes() == whole


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["full", "broken"])
def test_a_write_that_breaks_off_leaves_nothing(
    config, tokenizer, tmp_path, monkeypatch, capsys, number
):
    def breaks(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", breaks)
        whole = load_all(config, tokenizer)  # goes on without a cache
    assert f"cannot save tokens ({os.strerror(number)}" in capsys.readouterr().err
    assert list((tmp_path / "orchmoe").iterdir()) == []
    assert load_all(config, tokenizer) == whole and len(list((tmp_path / "orchmoe").iterdir())) == 2


def test_a_cache_that_cannot_be_written_costs_one_warning(
    config, tokenizer, tmp_path, monkeypatch, capsys
):
    whole = load_all(config, tokenizer)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load_all(config, tokenizer) == whole
    (warning,) = capsys.readouterr().err.splitlines()
    assert "cannot save tokens" in warning


def test_errors_of_a_load_are_one_line(config, repository, tokenizer):
    for name, value in dict(num_pos=-1, train_instances=0, max_source_length=1).items():
        with pytest.raises(ValueError, match="--" + name.replace("_", "-")):
            DataConfig(**{name: value})
    write_lists(repository, [], ["task9_t"])
    with pytest.raises(ValueError, match="train_tasks.txt"):
        load_sets(config, tokenizer, ["train"])
    assert load_sets(config, tokenizer, ["test"])


def test_real_files_are_read(sni_dir):
    """Read all files of the sample, whose tasks are cut to 100 instances.

    Of the whole repository, read 100 MB (small files first) and the largest file.
    """
    splits = read_splits(sni_dir)
    whole = (len(splits["train"]), len(splits["test"])) == (756, 119)
    assert whole or (len(splits["train"]), len(splits["test"])) == (687, 58)
    paths = [sni_dir / "tasks" / f"{name}.json" for names in splits.values() for name in names]
    paths.sort(key=lambda path: path.stat().st_size)
    sizes = accumulate(path.stat().st_size for path in paths)
    small = [path for path, size in zip(paths, sizes, strict=True) if size < 100e6]
    counts = [len(read_task(path)["instances"]) for path in {*small, paths[-1]}]
    assert max(counts) > 1000 if whole else (len(counts), max(counts)) == (745, 100)
    assert whole or sum(count == 100 for count in counts) > 700


# ----------------------------------------------------------------------------------------- batches

LENGTHS = np.random.default_rng(0).integers(10, 1000, 1003)


def epoch_of(seed: int, epoch: int) -> list[np.ndarray]:
    return [batch_at(LENGTHS, 8, seed, step) for step in range(epoch * 126, (epoch + 1) * 126)]


def test_an_epoch_has_each_example_once_and_is_pure():
    epochs = [epoch_of(5, epoch) for epoch in range(3)]
    for batches in epochs:
        assert sorted(np.concatenate(batches).tolist()) == list(range(1003))
        assert sorted(map(len, batches)) == [3] + [8] * 125
    data._epoch.cache_clear()
    for before, after in zip(epochs[1], epoch_of(5, 1), strict=True):
        assert before.tolist() == after.tolist()
    firsts = [epoch_of(*of)[0].tolist() for of in ((5, 0), (5, 1), (6, 0))]
    assert len(set(map(tuple, firsts))) == 3


def test_batch_at_forgets_nothing_and_mixes_nothing_up():
    found = [
        batch_at(lengths, 8, seed, step).tolist()
        for seed in (0, 1)
        for lengths in (LENGTHS, LENGTHS[::-1])
        for step in (3, 400, 3)
    ]
    data._epoch.cache_clear()
    assert found[::3] == found[2::3] and len(set(map(tuple, found))) == 8
    assert found[-1] == batch_at(LENGTHS[::-1], 8, 1, 3).tolist()


def test_bucketing_pads_far_less_than_random_batches():
    def padded(batches: list) -> int:
        return sum(len(batch) * LENGTHS[batch].max() - LENGTHS[batch].sum() for batch in batches)

    order = np.random.default_rng(1).permutation(len(LENGTHS))
    bucketed = epoch_of(0, 0)
    assert padded(bucketed) < 0.2 * padded([order[i : i + 8] for i in range(0, len(order), 8)])
    means = [LENGTHS[batch].mean() for batch in bucketed]
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.3  # batches are not served by length


def test_collate_pads_masks_and_shifts():
    rows = [
        make_example("a", [5, 6, 1], [[7, 4, 1]], 3),
        make_example("b", [8, 1], [[1], [9, 1]], -1),
    ]
    batch = collate(rows, pad_id=4)
    assert batch.input_ids.tolist() == [[5, 6, 1], [8, 1, 4]]
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.attention_mask.tolist() == [[True, True, True], [True, True, False]]
    assert batch.labels.tolist() == [[7, 4, 1], [1, -100, -100]]
    assert batch.task_ids.tolist() == [3, -1] and batch.ids == ["a", "b"]


def test_a_batch_splits_into_its_rows():
    batch = collate([make_example(f"e{i}", [i + 5, 1], [[i + 9, 1]], i) for i in range(7)])
    for parts, sizes in ((1, [7]), (3, [3, 3, 1]), (7, [1] * 7), (9, [1] * 7)):
        pieces = list(batch.split(parts))
        assert [len(rows) for rows, _ in pieces] == sizes
        assert [i for rows, _ in pieces for i in rows] == list(range(7))
        for rows, piece in pieces:
            assert piece.ids == [f"e{i}" for i in rows] and piece.task_ids.tolist() == list(rows)
    assert batch.target_tokens == 14
    assert torch.equal(batch.to(torch.device("cpu")).labels, batch.labels)


def test_pieces_of_a_batch_are_cut_to_their_longest():
    batch = collate([make_example(f"e{i}", [5] * (i + 1), [[9] * (4 - i)], i) for i in range(4)])
    (_, short), (_, long) = batch.split(2)
    assert short.input_ids.shape == short.attention_mask.shape == (2, 2)
    assert short.labels.shape == (2, 4)
    assert long.input_ids.shape == long.attention_mask.shape == (2, 4)
    assert long.labels.shape == (2, 2)
    assert short.attention_mask.tolist() == [[True, False], [True, True]]
    assert short.target_tokens + long.target_tokens == batch.target_tokens


def test_reference_drawing_is_pure_and_reaches_all():
    examples = [make_example(f"e{i}", [1], [[10 + k, 1] for k in range(3)]) for i in range(8)]

    def drawn(rows, seed, step):
        return collate(rows, seed=seed, step=step).labels[:, 0].tolist()

    assert collate(examples).labels[:, 0].tolist() == [10] * 8
    draws = [drawn(examples, 0, step) for step in range(60)]
    assert draws == [drawn(examples, 0, step) for step in range(60)]
    assert draws[7] == [drawn([e], 0, 7)[0] for e in examples] != drawn(examples, 1, 7)
    counts = np.bincount(np.concatenate(draws) - 10)
    assert len(counts) == 3 and counts.min() > 120  # 160 expected
    elsewhere = [e._replace(task="task2_b") for e in examples]  # tasks may share ids
    assert draws != [drawn(elsewhere, 0, step) for step in range(60)]
