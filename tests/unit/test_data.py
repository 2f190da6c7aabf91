"""Tests of data.py: tokens, sets of examples, batches."""

import math
import os
import re
from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

import data
from data import BatchOrder, collate, load_sets
from helpers import (
    check_equal,
    make_example,
    own_rows,
    refusal,
    task_json,
    write_lists,
    write_rows,
    write_task,
    write_words,
)
from support import program, runtime
from tasks import (
    DataConfig,
    Row,
    is_bare,
    read_task,
    render_prompt,
    row_of_prompt,
    row_of_question,
    split_instances,
    split_key,
)
from tokenizer import load as load_tokenizer


@pytest.fixture
def config(repository):
    """Return the settings for `repository`."""
    return DataConfig(data=str(repository))


@pytest.fixture
def own(tmp_path):
    """Return a function that writes rows, and test rows, and returns the settings for them."""

    def write(rows, test_rows=None, **options):
        if test_rows is not None:
            options["test"] = str(write_rows(tmp_path / "other.jsonl", test_rows))
        return DataConfig(data=str(write_rows(tmp_path / "own.jsonl", rows)), **options)

    return write


# ------------------------------------------------------------------------------------ rows of JSONL


def test_rows_become_examples_as_they_are(own, tiny_words):
    rows = own_rows(300, id="same", task="b")
    rows[5:7] = [{"instruction": "Sort.", "input": f"b {i}", "output": ["a", "c"]} for i in (1, 2)]
    config = own(rows, own_rows(3, task="c"))
    sets = load_sets(config, tiny_words)
    assert sets["train"].tasks == []  # not all rows have one
    everything = [*sets["train"], *sets["dev"], *sets["seen"]]
    assert sorted(example.position for example in everything) == list(range(300))
    (example,) = [example for example in everything if example.id == "7"]  # its line
    assert example.source_ids.tolist() == tiny_words.encode("Sort.\n\nb 2")
    assert example.references == ["a", "c"]
    assert [ids.tolist() for ids in example.target_ids] == [tiny_words.encode(t) for t in "ac"]

    # A limit of the training rows of each task. 0 is no limit.
    for limit, count in ((0, len(sets["train"])), (1, 2)):
        limited = load_sets(replace(config, train_instances=limit), tiny_words)
        assert (len(limited["train"]), len(limited["test"])) == (count, 3)


def test_held_out_rows_with_the_tokens_of_training_rows_are_left_out(own, tiny_words, capsys):
    rows = own_rows(900)
    ends = ["", "\n", " ", "\n\n"]  # SentencePiece drops them
    copies = [row | {"prompt": row["prompt"] + end} for row in rows[:100] for end in ends]
    config = own(copies + rows[100:])
    sets = load_sets(config, tiny_words)
    train, dev, seen = [
        {tuple(e.source_ids) for e in sets[name]} for name in ("train", "dev", "seen")
    ]
    assert not train & (dev | seen)
    assert len(train | dev | seen) == 900
    left_out = 1200 - sum(len(sets[name]) for name in ("train", "dev", "seen"))
    assert left_out > 5
    warning = r"(\d+) of \d+ (?:dev|seen) rows have the tokens of training .*rows and are left out"
    counts = re.findall(warning, capsys.readouterr().err)
    assert sum(map(int, counts)) == left_out

    # Prompts that are cut to the same tokens count, too.
    long = [row | {"prompt": "word " * 40 + row["prompt"]} for row in rows]
    cut = own(long, max_source_length=20)
    refused = "own.jsonl: 0 rows in the set dev, 5 needed; add other prompts"
    with refusal(refused, program.UserError):
        data.require_set(load_sets(cut, tiny_words), "dev", cut)


def test_seen_and_test_rows_with_the_tokens_of_dev_rows_are_found(own, tiny_words, capsys):
    """Prompts that differ in white space have the same tokens, and may be in different sets."""
    rows = own_rows(5000)  # so many that a prompt has its set by itself
    of_dev = next(row for row in rows if split_key(row["prompt"]) < (2, 0))
    ends = (" " * i for i in range(1, 999))
    end_for_seen = next(end for end in ends if split_key(of_dev["prompt"] + end)[0] in range(2, 6))
    others = [of_dev, {"prompt": "Tell.", "completion": "x"}]
    whole = load_sets(own(rows, others), tiny_words)
    warning = "other.jsonl: 1 of 2 test rows have the tokens of training or dev rows, so they are"
    assert warning in capsys.readouterr().err

    rows.append(of_dev | {"prompt": of_dev["prompt"] + end_for_seen})
    sets = load_sets(own(rows, others), tiny_words)
    assert [len(examples) for examples in sets.values()] == [len(e) for e in whole.values()]
    count = len(sets["seen"]) + 1
    warning = f"own.jsonl: 1 of {count} seen rows have the tokens of training or dev rows and are"
    assert warning in capsys.readouterr().err


def test_test_rows_have_the_ids_of_training_tasks_and_are_counted(own, tiny_words, capsys):
    rows = own_rows(300)
    for i, row in enumerate(rows):
        row["task"] = f"t{i % 3}"
    others = [{"prompt": f"Tell {i}.", "completion": "x", "task": f"t{i}"} for i in range(5)]
    others += [*rows[3:5], {"prompt": "Tell.", "completion": "x"}]
    expected = [0, 1, 2, -1, -1, 0, 1, -1]  # of t0 to t4, of two training rows, and of no task
    config = own(rows, others)
    examples = load_sets(config, tiny_words)["test"]
    assert [example.task_index for example in examples] == expected
    data.warn_of_known(examples, config)
    warnings = capsys.readouterr().err.splitlines()
    assert "other.jsonl: 2 of 8 test rows have the tokens of training or dev rows" in warnings[0]
    assert "other.jsonl: 5 of 8 test rows belong to training tasks" in warnings[1]
    assert len(warnings) == 2


def test_test_rows_that_are_the_training_rows_are_refused(own, tiny_words):
    config = own(own_rows(300), own_rows(300))
    with refusal("--test .*other.jsonl: is a copy of --data", program.UserError):
        load_sets(config, tiny_words)


def test_test_rows_need_no_training_rows(own, tiny_words, capsys):
    """The training rows may be few or missing if only the test rows are scored."""
    config = own(own_rows(3), [{"prompt": "Tell.", "completion": "x"}])
    assert len(load_sets(config, tiny_words)["test"]) == 1
    os.remove(config.data)
    sets = load_sets(config, tiny_words)
    assert len(sets["test"]) == 1
    assert not capsys.readouterr().err
    with refusal("own.jsonl: does not exist; give the data with", program.UserError):
        data.require_set(sets, "train", config)


@pytest.mark.parametrize("name, least", [("train", 1), ("dev", 5), ("seen", 5), ("test", 1)])
def test_a_missing_or_small_set_is_refused(own, tmp_path, name, least):
    rows = [make_example("a", [5], [[6]])] * least
    config = own([])
    assert data.require_set({name: rows}, name, config) == rows
    problem = f"own.jsonl: {least - 1} rows in the set {name}, {least} needed; "
    with refusal(problem, program.UserError):
        data.require_set({name: rows[1:]}, name, config)
    with refusal(f"0 rows in the set {name}, 1 .*_tasks.txt", program.UserError):
        data.require_set({}, name, DataConfig(data=str(tmp_path)))


# --------------------------------------------------------------------------------- sets of examples


def test_load_sets_gives_what_the_files_say(config, repository, tokenizer):
    write_task(repository, "task9_t", task_json(101))
    sets = load_sets(config, tokenizer)
    tasks = ["task1_a", "task2_b", "task3_c"]
    for index, name in enumerate(tasks):
        task = read_task(repository / "tasks" / f"{name}.json")
        parts = split_instances(range(len(task["instances"])), name, 100)
        for part, positions in zip(("train", "dev", "seen"), parts, strict=True):
            of_task = [e for e in sets[part] if e.task == name]
            assert [e.position for e in of_task] == positions
            example = of_task[1]
            instance = task["instances"][example.position]
            assert (example.id, example.references) == (instance["id"], instance["output"])
            assert (example.task_index, example.category) == (index, "Sorting")
            bare = part == "train" and is_bare(task, instance, config.bare_share)
            prompt = render_prompt(task, instance, tokenizer, num_pos=0 if bare else 2)
            assert example.source_ids.tolist() == tokenizer.encode(prompt)
            targets = [tokenizer.encode(text) for text in instance["output"]]
            assert [ids.tolist() for ids in example.target_ids] == targets
    assert sets["seen"].tasks == tasks
    assert sets["dev"].source_lengths.tolist() == [len(e.source_ids) for e in sets["dev"]]
    assert [e.id for e in sets["test"]] == [f"id-{i}" for i in range(100)]
    assert {e.task_index for e in sets["test"]} == {-1}


def test_rows_with_an_input_of_an_earlier_set_are_left_out(config, repository, tiny_words, capsys):
    """An input may have several outputs, each in an instance of its own. Half of the training
    prompts have no examples, so their tokens are not those of the held-out prompts.
    """
    instances = [{"input": f"{i % 40} words", "output": f"{i}"} for i in range(100)]
    write_task(repository, "task3_c", task_json(Instances=instances))
    write_lists(repository, ["task3_c"], [])
    sets = {}
    for name, positions in zip(
        ("train", "dev", "seen"), split_instances(range(100), "task3_c", 100), strict=True
    ):
        sets[name] = [instances[i]["input"] for i in positions]
    train, dev, seen = sets.values()
    expected = {
        "train": train,  # its own copies stay
        "dev": [text for text in dev if text not in train],
        "seen": [text for text in seen if text not in train + dev],
    }
    found = load_sets(config, tiny_words)
    assert {name: [row.input for row in rows] for name, rows in found.items()} == expected
    of_dev, of_seen = capsys.readouterr().err.splitlines()
    left_out = 20 - len(expected["dev"])
    assert f"sni: {left_out} of 20 dev rows have the inputs of training rows and are left" in of_dev
    assert " of 20 seen rows have the inputs of training or dev rows and are left out" in of_seen

    # Equal inputs of different tasks are different questions.
    for name in ("task1_a", "task3_c"):
        write_task(repository, name, task_json(Instances=instances[:40]))
    write_lists(repository, ["task3_c", "task1_a"], [])
    load_sets(config, tiny_words)
    assert not capsys.readouterr().err


def test_subsample_is_spread_evenly_over_the_set():
    assert data.subsample(range(10), 4) == [0, 2, 5, 7]
    assert data.subsample(range(3), 0) == data.subsample(range(3), 9) == [0, 1, 2]


def test_tasks_are_the_first_of_the_list(config, tokenizer):
    sets = load_sets(replace(config, max_tasks=2), tokenizer)
    assert sets["seen"].tasks == ["task1_a", "task3_c"]


def test_long_sources_and_targets_are_cut_and_keep_eos(config, tokenizer):
    short = replace(config, max_source_length=20, max_target_length=3)
    whole = load_sets(config, tokenizer)["train"]
    for example, uncut in zip(load_sets(short, tokenizer)["train"], whole, strict=True):
        assert 19 <= len(example.source_ids) <= 20  # the cut text may have fewer tokens
        for ids, all_ids in zip(example.target_ids, uncut.target_ids, strict=True):
            assert len(ids) == min(3, len(all_ids))
        for ids in [example.source_ids, *example.target_ids]:
            assert ids[-1] == 1


def question(words, text, **settings):
    """Return the example of a question as --ask builds it."""
    config = DataConfig(**settings)
    return data.example_of(row_of_question("Say it.", text, words, config), words, config)


def test_a_question_belongs_to_no_training_task(tiny_words):
    """A method that routes by task would route it as a training task."""
    assert question(tiny_words, "a").task_index == -1


def test_a_prompt_is_cut_between_two_characters(tmp_path):
    """A character beyond ASCII has two to four tokens. What is left is the start of the whole."""
    words = load_tokenizer(write_words(tmp_path / "words"))
    text = "a\u00e9\u6f22\U0001f600" * 9
    whole = question(words, text).source_ids.tolist()
    for limit in range(50, len(whole)):
        source = question(words, text, max_source_length=limit).source_ids.tolist()
        assert source == whole[: len(source)]
        assert limit - 4 < len(source) <= limit


def test_texts_that_lose_their_ends_are_counted(config, repository, tokenizer, capsys):
    rows = [{"input": "river " * n, "output": "a"} for n in (*range(1, 20), 300, 301, 302)]
    rows[0]["output"] = ["a", "a " * 200]
    write_task(repository, "task3_c", task_json(Instances=rows))
    short = replace(config, max_source_length=250, max_target_length=100)
    load_sets(short, tokenizer)
    lines = capsys.readouterr().err.splitlines()
    sources, targets = [line for line in lines if "lose their ends" in line]
    assert sources.endswith("length 250: 3 sources are too long and lose their ends")
    assert targets.endswith("length 100: 1 targets are too long and lose their ends")


def test_rows_at_exactly_the_limit_are_not_cut(tiny_words):
    """A text of exactly the limit does not count as cut. One with one token more does."""
    row = Row("train", "t", "t", "1", 0, "Say it.", ["a b", "a"])
    whole = data.example_of(row, tiny_words, DataConfig())
    source, target = len(whole.source_ids), len(whole.target_ids[0])
    for path in ("own.jsonl", "sni/"):
        for less in (0, 1):
            config = DataConfig(
                data=path, max_source_length=source - less, max_target_length=target - less
            )
            sets, lost = data.tokenise([row], tiny_words, config)
            assert lost == Counter(source=less, target=less)
            [example] = sets["train"]
            assert np.array_equal(example.source_ids, whole.source_ids) == (not less)


def test_rows_and_questions_with_unknown_characters_are_reported(own, tiny_words, capsys):
    rows = own_rows(60)
    rows[3]["prompt"] = rows[5]["completion"] = "\u65e5\u672c"
    config = own(rows, rows[3:4])
    load_sets(config, tiny_words)
    warning = capsys.readouterr().err.splitlines()[0]
    assert f"{config.data} and {config.test}: 3 rows have characters that the tokenizer" in warning

    question(tiny_words, "a")
    assert not capsys.readouterr().err
    question(tiny_words, "a \u65e5")
    error = capsys.readouterr().err
    assert "a prompt has characters that the tokenizer does not know" in error
    data.example_of(row_of_prompt("a " * 9), tiny_words, DataConfig(max_source_length=8))
    error = capsys.readouterr().err
    assert "a prompt has more than 8 tokens and loses its end" in error


@pytest.mark.parametrize("post", [None, "<s> $A"], ids=["without BOS", "with BOS"])
def test_a_prompt_without_a_token_is_refused(post, tmp_path, tiny_words):
    """The tokenizer of a decoder may drop characters that it does not know, as T5's drops some."""
    path = write_words(tmp_path / "words", post=post) / "tokenizer.json"
    drops = {"type": "Replace", "pattern": {"String": "\u65e5"}, "content": ""}
    program.write_json(path, program.read_json(path) | {"normalizer": drops})
    words = load_tokenizer(path.parent)
    config = DataConfig(data="own.jsonl")
    assert len(data.example_of(row_of_prompt("\u65e5a"), words, config).source_ids) > 0
    problem = "the prompt: the tokenizer has no tokens for the prompt '\u65e5\u65e5'; change it"
    with refusal(problem, program.UserError):
        data.example_of(row_of_prompt("\u65e5\u65e5"), words, config)
    row = row_of_prompt("\u200b")._replace(set="dev", id="7")
    with refusal("own.jsonl, row 7: the tokenizer has no tokens", program.UserError):
        data.example_of(row, tiny_words, config)


def test_a_changed_file_changes_the_digest(config, repository, tokenizer):
    before = load_sets(config, tokenizer)
    assert before["train"].digest == before["dev"].digest != before["test"].digest
    path = repository / "tasks/task3_c.json"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"Sort the words", b"Swap the words"))
    after = load_sets(config, tokenizer)
    assert repr(after["train"]) != repr(before["train"])
    assert after["train"].digest != before["train"].digest
    assert after["test"].digest == before["test"].digest
    path.write_bytes(whole)
    assert load_sets(config, tokenizer)["train"].digest == before["train"].digest


def test_a_task_file_of_another_name_is_another_task(config, repository, tokenizer):
    """The name decides which rows train. So after a renaming the digest must differ."""
    before = load_sets(config, tokenizer)
    (repository / "tasks/task3_c.json").rename(repository / "tasks/task3_x.json")
    write_lists(repository, ["task3_x", "task1_a", "task2_b"], ["task9_t"])
    after = load_sets(config, tokenizer)
    assert after["train"].digest != before["train"].digest
    assert after["test"].digest == before["test"].digest


def test_only_tasks_of_training_rows_are_training_tasks(own, tiny_words):
    rows = own_rows(60)
    for i, row in enumerate(rows):
        row["task"] = f"t{i}"
    sets = load_sets(own(rows), tiny_words)
    assert sets["train"].tasks == sorted(example.task for example in sets["train"])
    assert {example.task_index for example in sets["seen"]} == {-1}


# ------------------------------------------------------------------------------------------ batches

LENGTHS = np.random.default_rng(0).integers(10, 1000, 1003)


@pytest.mark.parametrize("count", [1003, 16, 3])
def test_an_epoch_has_each_example_once_in_full_batches_but_one(count):
    steps = math.ceil(count / 8)
    for first in (0, steps, 2 * steps):
        batches = [BatchOrder(LENGTHS[:count], 8, 5).at(first + step) for step in range(steps)]
        assert sorted(np.concatenate(batches)) == list(range(count))
        assert sorted(map(len, batches))[1:] == [8] * (steps - 1)


def test_the_order_of_the_data_and_the_numbers_of_a_seed_never_change():
    """A run that is resumed years later must go on with its own batches and noise."""
    assert runtime.generator(0, 1).initial_seed() == 6312281913021032635
    first_batch = BatchOrder(np.arange(1000) % 7, 8, 0).at(0)
    assert first_batch.tolist() == [51, 856, 135, 492, 772, 352, 695, 751]


def test_batches_depend_only_on_lengths_seed_and_step():
    found = set()
    for lengths, seed in product((LENGTHS, LENGTHS[::-1]), (0, 1)):
        batch_order = BatchOrder(lengths, 8, seed)
        of_steps = [tuple(batch_order.at(step)) for step in (3, 129, 400)]
        assert [tuple(batch_order.at(step)) for step in (400, 129, 3)] == of_steps[::-1]
        found.update(of_steps)
    assert len(found) == 12  # epochs, seeds and lengths have their own orders


def test_bucketing_pads_far_less_than_random_batches():
    def padding(batches):
        return sum(len(batch) * LENGTHS[batch].max() - LENGTHS[batch].sum() for batch in batches)

    order = np.random.default_rng(1).permutation(len(LENGTHS))
    bucketed = [BatchOrder(LENGTHS, 8, 0).at(step) for step in range(126)]
    assert padding(bucketed) < 0.2 * padding(np.array_split(order, 126))
    means = [LENGTHS[batch].mean() for batch in bucketed]
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.3  # batches are not served by length


def test_collate_pads_and_masks():
    rows = [
        make_example("a", [5, 6, 1], [[7, 4, 1]], 3),
        make_example("b", [8, 1], [[1], [9, 1]], -1),
    ]
    batch = collate(rows)
    assert batch.input_ids.tolist() == [[5, 6, 1], [8, 1, 0]]
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.attention_mask.tolist() == [[True, True, True], [True, True, False]]
    assert batch.labels.tolist() == [[7, 4, 1], [1, -100, -100]]
    assert batch.task_ids.tolist() == [3, -1]


def test_shares_are_all_rows_each_as_wide_as_its_longest():
    examples = [make_example(f"e{i}", [5] * (i + 1), [[9] * (7 - i)], i) for i in range(7)]
    for size, ranks, count in ((3, 1, 3), (1, 1, 7), (2, 3, 4), (4, 8, 2)):
        taken = []
        for rank in range(ranks):
            pieces = list(data.shares(examples, size, rank, ranks))
            assert len(pieces) == count  # all processes take as many steps
            for rows, piece in pieces:
                taken += rows
                if not rows:
                    assert (piece.labels == -100).all()
                    continue
                check_equal(piece, collate([examples[row] for row in rows]))
        assert sorted(taken) == list(range(7))


def test_targets_are_drawn_by_seed_step_task_and_id():
    examples = [make_example(f"e{i}", [1], [[10], [11], [12]]) for i in range(8)]
    elsewhere = [e._replace(task="task2_b") for e in examples]  # tasks may share ids

    def drawn(rows, seed=0):
        found = []
        for step in range(60):
            chosen = data.draw_targets(rows, seed, step)
            found.append([int(example.target_ids[0][0]) for example in chosen])
        return found

    assert collate(examples).labels[:, 0].tolist() == [10] * 8
    draws = drawn(examples)
    [alone] = data.draw_targets(examples[3:4], 0, 7)
    assert draws[7][3] == alone.target_ids[0][0]
    assert draws != drawn(examples, seed=1)
    assert draws != drawn(elsewhere)
    counts = np.bincount(np.concatenate(draws))[10:]
    assert len(counts) == 3 and counts.min() > 120  # 160 expected
