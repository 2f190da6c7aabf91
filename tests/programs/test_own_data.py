"""Rows of JSONL in every program: one way to build a sample, changed data, --start."""

import json
import re
import shutil
from unittest import mock

import pytest

import eval as evaluation
import run_folder
import train
from experiments.explorer import explorer
from helpers import (
    CPU,
    RESUME,
    ROOT,
    change_config,
    ids_of_question,
    own_rows,
    refused,
    run,
    spied,
    task_json,
    write_decoder,
    write_lists,
    write_pieces,
    write_rows,
    write_task,
    write_words,
)
from integrations import serve
from support import program
from support.program import read_json
from tasks import DataConfig
from tokenizer import load as load_tokenizer

BRIEF = "--device cpu --steps 1 --eval-every 1 --batch-size 4 --eval-instances 2"


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    """Return a function that gives the folder of a T5, or of a decoder with one of two tokenizers.

    The decoders need optional packages; without these only their tests are skipped.
    """
    made = {"t5": ROOT / "tiny"}
    writers = {"words": write_words, "pieces": write_pieces}
    sizes = {"vocab_size": 600, "max_position_embeddings": 512}

    def base_of(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = write_decoder(folder, writers[kind], **sizes)
        return made[kind]

    return base_of


# --------------------------------------------------------------------------------- one way to build

# By name: the fields of a row, the text that a decoder reads as prompt, and that of the answer.
FORMS = {
    "SNI": (
        {"input": "{}", "output": "{}!"},
        "Definition: Say it.\n\nNow complete the following example -\nInput: {}.\nOutput:",
        " {}!",
    ),
    "prompt": ({"prompt": "Say {}:\n", "completion": "{}"}, "Say {}:\n", "{}"),
    "prompt before a space": ({"prompt": "Say {}", "output": " {}"}, "Say {}", " {}"),
    "prompt with a space": ({"prompt": "Say {} ", "output": "{}"}, "Say {} ", "{}"),
    "instruction": ({"instruction": "Say {}.", "output": "{}"}, "Say {}.\n\n", "{}"),
    "instruction and context": (
        {"instruction": "Say it.", "context": "{}", "response": "{}"},
        "Say it.\n\n{}\n\n",
        "{}",
    ),
}


# test_tokenizer.py tests the other tokenizers: how they join prompts and answers.
KINDS_AND_FORMS = [("words", name) for name in FORMS]
KINDS_AND_FORMS += [("t5", "SNI"), ("t5", "prompt"), ("pieces", "instruction and context")]


@pytest.mark.parametrize("kind, name", KINDS_AND_FORMS)
def test_every_program_gives_a_text_the_same_ids(kind, name, base_of, tmp_path):
    fields, prompt, answer = FORMS[name]
    rows = [{field: text.format(i) for field, text in fields.items()} for i in range(400)]
    flags = {"data": "own.jsonl", "train_instances": 16}
    if name == "SNI":
        rows = [row | {"id": f"{i + 1}", "output": [row["output"]]} for i, row in enumerate(rows)]
        write_task(tmp_path, "task1_a", task_json(Instances=rows, Definition=["Say it."]))
        write_lists(tmp_path, ["task1_a"], [])
        flags = {"data": ".", "num_pos": 0, "train_instances": 16}
    else:
        write_rows(tmp_path / "own.jsonl", rows)
    flags |= {"model": str(base_of(kind)), "steps": 1, "eval_instances": 2, "batch_size": 16}

    # Training.
    launch = train.LaunchConfig(out="run")
    with spied(train, "train_step") as step:
        train.train(train.Settings(**flags), CPU, launch)
    example = step.call_args.args[3][0]
    source = example.source_ids.tolist()
    target = example.target_ids[0].tolist()
    number = int(example.id) - 1
    prompt, answer = prompt.format(number), answer.format(number)
    tokenizer = load_tokenizer(base_of(kind))
    if tokenizer.one_row:
        text = tokenizer._tokenizer.decode(source + target, skip_special_tokens=True)
        assert text.removeprefix(" ") == prompt + answer
        assert source == tokenizer.encode(prompt)[:-1]
    else:
        assert source == tokenizer.encode(prompt)
        assert target == tokenizer.encode(answer)

    # Evaluation.
    saved = run_folder.read_run("run")
    data_config = saved.settings.part(DataConfig)
    eval_config = evaluation.EvalConfig(run="run", split="train")
    examples = evaluation.rows_of_split(eval_config, data_config, tokenizer, saved)
    (scored,) = [other for other in examples if other.id == example.id]
    assert scored.source_ids.tolist() == source
    assert [ids.tolist() for ids in scored.target_ids] == [target]

    # --ask takes an instruction, and --prompt the whole prompt.
    row = rows[number]
    whole = prompt + " " if name == "SNI" else prompt
    if "prompt" not in row:
        question = ["--ask", row.get("instruction", "Say it.")]
        if "input" in row or "context" in row:
            question += ["--input", row.get("input") or row.get("context")]
        assert ids_of_question(*question) == source
    assert ids_of_question("--prompt", whole) == source

    # The explorer, which shows this prompt and takes it back.
    loaded = explorer.load("run")
    shown = explorer.texts_of(loaded, "seen", scored)[1]
    assert shown == whole
    request = {"prompt": shown, "references": scored.references, "w": None}
    with mock.patch.object(evaluation, "predict", return_value=["a text"]) as predict:
        reply = explorer.reply(loaded, json.dumps(request).encode())
        (example,) = predict.call_args.args[2]
        request["prompt"] = shown.rstrip("\n")
        without_line = explorer.reply(loaded, json.dumps(request).encode())
    assert example.source_ids.tolist() == source
    assert [ids.tolist() for ids in example.target_ids] == [target]
    assert reply["warning"] == ""
    # A decoder reads the empty line after an instruction.
    warns = "does not end in an empty line" in without_line["warning"]
    assert warns == (tokenizer.one_row and "instruction" in row)

    # A server, which takes the same prompt, and instructions if the rows are some.
    run("integrations/export.py --run run --out served")
    rule = read_json("served/router.json")["prompt"]
    server = serve.RunTokenizer(base_of(kind), rule)
    assert server.encode(whole) == source
    assert server.instructions == {"SNI": None}.get(name, "instruction" in row)


@pytest.mark.parametrize("kind, warns", [("words", True), ("t5", False)])
def test_an_instruction_for_a_decoder_whose_rows_are_prompts_gives_a_warning(
    kind, warns, base_of, tmp_path
):
    """T5 reads both alike. Not all rows of this file are instructions."""
    asked = [{"instruction": f"Ask {i}.", "output": f"{i}"} for i in range(400)]
    write_rows(tmp_path / "both.jsonl", asked + own_rows(300))
    flags = {"data": "both.jsonl", "model": str(base_of(kind)), "steps": 1}
    launch = train.LaunchConfig(out="run")
    train.train(train.Settings(**flags), CPU, launch)
    tokenizer = load_tokenizer(base_of(kind))

    def ids_of(text):
        return next(tokenizer.sources([text], spaced=False))

    questions = (
        (("--ask", "Say it."), "Say it.\n\n", warns),
        (("--ask", "Say it.", "--input", "now"), "Say it.\n\nnow\n\n", False),
        (("--prompt", "Say it."), "Say it.", False),
    )
    for words, text, is_warned in questions:
        with mock.patch.object(program, "warn") as warn:
            assert ids_of_question(*words) == ids_of(text)
        assert warn.called == is_warned

    # The same in a server.
    run("integrations/export.py --run run --out served")
    serve_it = ("integrations/serve.py --served served --base", base_of(kind))
    for words, text, is_warned in questions:
        with (
            mock.patch.object(serve, "PeftModel") as model,
            mock.patch.object(program, "warn") as warn,
        ):
            model.return_value.answer.return_value = []
            assert run(*serve_it, *words).endswith(" -> (empty)\n")
        assert model.return_value.answer.call_args.args[0].tolist() == ids_of(text)
        assert warn.called == is_warned


# --------------------------------------------------------------------- what a run has been bound to


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Return a folder with a run of T5 on rows of JSONL. Tests copy what they change."""
    folder = tmp_path_factory.mktemp("own")
    write_rows(folder / "own.jsonl", own_rows(300, task="t"))
    tests = [{"prompt": f"Tell {i}", "completion": f"{i}"} for i in range(3)]
    write_rows(folder / "test.jsonl", tests)
    files = "--data own.jsonl --test test.jsonl"
    run(f"train.py {files} --max-source-length 99 --out t5 {BRIEF}", cwd=folder)
    return folder


@pytest.fixture
def changed(own, tmp_path):
    """Return a copy of that folder, whose run has the data of the copy."""
    folder = shutil.copytree(own, tmp_path, dirs_exist_ok=True)
    paths = {"data": str(folder / "own.jsonl"), "test": str(folder / "test.jsonl")}
    change_config(folder / "t5", "settings", **paths)
    return folder


# Command lines that load the run.
PROGRAMS = (
    f"{RESUME} t5",
    "eval.py --run t5 --split seen --device cpu",
    "experiments/explorer/explorer.py --run t5",
    "integrations/export.py --run t5 --mean --out served",
    "eval.py --run t5 --ask 'Name 3:' --device cpu",
    "eval.py --run t5 --split test --limit 1 --device cpu",
)


def test_changed_rows_are_refused_except_for_questions_and_new_rows(changed):
    """The run has trained on rows that are now in dev and seen."""
    write_rows(changed / "own.jsonl", own_rows(100, task="new"))
    *need_the_rows, ask, new_rows = PROGRAMS
    for line in need_the_rows:
        error = refused("t5: ", line)
        assert re.search("(train_tasks|held_out) is .*, but the run has", error)
        assert error.strip().endswith(f"; {run_folder.RESTORE}")
    run(ask)
    run(new_rows)


def test_only_unseen_rows_need_the_file_of_test(changed):
    (changed / "test.jsonl").unlink()
    _, seen, _, export, *_ = PROGRAMS
    assert "; written to t5/eval-seen\n" in run(f"{seen} --limit 2")
    assert "abstract-8, mean" in run(export)


def test_other_rows_of_test_need_their_flag(changed):
    evaluate = "eval.py --run t5 --device cpu"
    other = [{"prompt": "Other", "completion": "x"}]
    write_rows(changed / "other.jsonl", other)
    assert "1 test instances: " in run(f"{evaluate} --test other.jsonl --out out")
    write_rows(changed / "test.jsonl", other)
    refused("t5: test_tasks is '", evaluate)


# ------------------------------------------------------------------------------------------ --start


def test_start_with_other_data_drops_the_test_rows(own):
    start = {"start": str(own / "t5")}
    same = train.read_settings(start, train.LaunchConfig())
    assert (same.test, same.max_source_length) == (str(own / "test.jsonl"), 99)
    other = start | {"data": "new.jsonl"}
    settings = train.read_settings(other, train.LaunchConfig())
    assert (settings.test, settings.max_source_length) == ("", 99)
    replaced = other | {"test": "b.jsonl"}
    assert train.read_settings(replaced, train.LaunchConfig()).test == "b.jsonl"
