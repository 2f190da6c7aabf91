"""train.py and eval.py as a user runs them, on the bundled data and, if it is given, the real data.

`MISTAKES` holds mistakes on the command line and in files, and the message of each.
"""

import dataclasses
import json
import math
import re
from unittest import mock

import pytest
import torch

import checkpoint
import data
import eval as evaluation
import run_folder
import train
from helpers import (
    CPU,
    RESUME,
    ROOT,
    SHORT,
    change_config,
    check_equal,
    interrupted,
    links,
    own_rows,
    records,
    refusal,
    refused,
    run,
    task_json,
    text_of,
    write_lists,
    write_rows,
    write_task,
)
from support import program, runtime
from support.program import read_json
from tasks import DataConfig, read_splits
from tokenizer import load as load_tokenizer

RESUME_RUN = f"{RESUME} run"
BRIEF = f"{SHORT} --max-tasks 2 --eval-instances 2 --steps 3"
EVALUATE = "eval.py --run run --split seen --limit 2 --device cpu"

# ------------------------------------------------------------------------------------ a whole run


@pytest.mark.parametrize("method", ["orchmoe", "lora", "poly"])
def test_a_method_trains_and_is_scored(home, method):
    """test_device.py trains the other methods."""
    sizes = f"{SHORT} --batch-size 8 --eval-instances 4 --lr-skills 0.01"
    output = run(f"train.py {sizes} --data sni/ --method {method} --out run")
    assert f"| {method} |" in output
    assert "\nscoring frozen base on 4 seen rows\n" in output
    assert f"\nscoring {method} on 4 unseen rows\n" in output
    dev_loss = r"dev loss \d\S*, best so far; training loss \d\S*, \S+ s a step"
    assert re.search(rf"\nstep 8 of 8: {dev_loss}\n", output)
    assert "\nnext: python eval.py --run run " in output

    rows = records(home / "run")
    assert [row["step"] for row in rows if "loss" in row] == list(range(8))
    first, second = [row["dev_loss"] for row in rows if "dev_loss" in row]
    assert second < first

    entropies = [row["router_entropy"] for row in rows if "router_entropy" in row]
    assert len(entropies) == (2 if method == "orchmoe" else 0)
    assert all(0 <= entropy <= math.log(8) for entropy in entropies)

    run("eval.py --run run --limit 4 --device cpu")
    scores = read_json(home / "run/scores.json")
    again = read_json(home / "run/eval-test/scores.json")
    assert scores[method]["unseen"]["overall"] == again["overall"]


def test_own_rows_train_and_their_scores_name_the_rules(home):
    """README's commands give no --out. They give --gpu 0, which works without a GPU, too."""
    write_rows(home / "other.jsonl", own_rows(9))
    own = "--data sni/own.jsonl --test other.jsonl --eval-instances 8 --steps 4 --eval-every 2"
    own += " --batch-size 8 --warmup 2 --gpu 0"
    output = run(f"train.py {own}")
    assert output.startswith("device: cpu, ") != torch.cuda.is_available()
    assert "\nruns/orchmoe-1: orchmoe trains 53,128 parameters in 4 steps, 0.2 epochs of" in output
    assert "ROUGE and exact match in per cent, by the rules for rows of JSONL" in output
    scores = read_json(home / "runs/orchmoe-1/scores.json")
    assert scores["orchmoe"]["seen"]["metric_rules"] == "unicode"


def test_table_has_each_score_under_its_heading(capsys):
    seen = {"overall": {"exact_match": 1.0, "rougeL": 2.0, "loss": 5.0}}
    unseen = {"overall": {"exact_match": 3.0, "rougeL": 4.0, "loss": math.nan}}
    train.print_table({"frozen base": {"seen": seen, "unseen": unseen}}, "official")
    assert capsys.readouterr().out.splitlines()[:3] == [
        "| model | seen loss | seen ROUGE-L | seen exact match | unseen loss | unseen ROUGE-L | "
        "unseen exact match |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| frozen base | 5.000 | 2.000 | 1.000 | nan | 4.000 | 3.000 |",
    ]
    train.print_table({"frozen base": {"seen": seen}}, "official")  # there are no test tasks
    assert "| frozen base | 5.000 | 2.000 | 1.000 |\n" in capsys.readouterr().out


# ---------------------------------------------------------------------- interruptions and resuming


NOISY = f"{SHORT} --method orchmoe-gumbel --eval-instances 2"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a run with noise that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run(f"train.py {NOISY} --out run", cwd=folder)
    return folder / "run"


@pytest.mark.parametrize(
    "module, name, number, error, step",
    [
        (train, "train_step", 6, None, 6),
        (train, "evaluate", 2, None, 8),  # the last evaluation
        (train, "train_step", 3, KeyboardInterrupt, 0),  # as a kill: nothing was saved
    ],
    ids=["SIGTERM in a step", "SIGTERM in the last evaluation", "kill before a save"],
)
def test_interrupted_run_resumes_bit_for_bit(home, whole, module, name, number, error, step):
    """Log and files equal those of an uninterrupted run. Only the times in the log may differ."""
    with interrupted(module, name, number, error):
        output = run(f"train.py {NOISY} --out run", code=130)
    resumed = home / "run"
    if step == 0:
        assert len(records(resumed)) == 2  # these steps are run again
        assert not (resumed / "progress.pt").exists()
    else:
        assert checkpoint.read_torch(resumed / "progress.pt")["progress"]["next_step"] == step
        assert "\nstopping after this step" in output and "\nstopped; go on with --resume" in output
    assert not (resumed / "scores.json").exists()

    run(RESUME_RUN)
    for name in ("adapter.safetensors", "scores.json", "config.json"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name
    for part in ("progress", "adapters", "optimizer"):
        check_equal(*(checkpoint.read_torch(at / "progress.pt")[part] for at in (resumed, whole)))
    for row, expected in zip(records(resumed), records(whole), strict=True):
        assert row | {"seconds": 0} == expected | {"seconds": 0}


def test_a_signal_while_scores_are_computed_ends_the_program_at_once(home, whole):
    with interrupted(evaluation, "predict", 2):
        output = run(f"train.py {NOISY} --out run", code=130)
    assert "\nscoring frozen base on 2 unseen rows\n" in output
    assert "\nscoring orchmoe" not in output
    run(RESUME_RUN)
    assert (home / "run/scores.json").read_bytes() == (whole / "scores.json").read_bytes()


def test_weights_that_give_no_loss_are_not_saved(home, monkeypatch):
    monkeypatch.setattr(evaluation, "mean_loss", lambda losses: math.nan)
    message = "error: step 1: the dev loss is nan; start a new run"
    refused(message, f"train.py {SHORT} --eval-every 1 --out run")
    names = {path.name for path in (home / "run").iterdir()}
    assert not names & {"progress.pt", "adapter.safetensors"}


def test_run_keeps_the_dtype_that_auto_has_chosen(copied, monkeypatch):
    monkeypatch.setattr(runtime, "_cpu_gains_from_bfloat16", lambda base: True)
    assert runtime.pick_device(device="cpu", base="a base").dtype == torch.bfloat16
    assert ", float32, torch" in run(RESUME_RUN)
    assert ", float32, torch" in run(f"{EVALUATE} --out out")
    assert ", bfloat16, torch" in run(f"{EVALUATE} --dtype bfloat16 --out chosen")
    assert read_json("out/scores.json")["config"]["dtype"] == "float32"


# ------------------------------------------------- what a run is bound to, see parity/test_doors.py


def test_a_finished_run_without_its_progress_is_not_trained_again(copied):
    (copied / "progress.pt").unlink()
    best = (copied / "adapter.safetensors").read_bytes()
    refused("progress.pt: missing, but the run is finished", RESUME_RUN)
    assert (copied / "adapter.safetensors").read_bytes() == best


def test_moved_base_and_data_are_given_with_flags(copied):
    change_config(copied, "settings", model="gone")
    change_config(copied, "settings", data="gone")
    moved = ["--model", ROOT / "tiny", "--data", ROOT / "sni"]
    refused("gone: does not exist", EVALUATE)
    run(EVALUATE, *moved)
    run(RESUME_RUN, *moved)
    run(f"{EVALUATE} --out out")  # the resumed run has noted the new places


def test_rows_of_the_training_tasks_are_those_of_the_run(copied):
    """In other files, rows that trained may be held out. Test rows may be any that flags name."""
    other = copied.parent / "other"
    first, second, *_ = run_folder.read_run(copied).facts["tasks"]
    write_lists(other, [first], [second])
    for name in (first, second):
        write_task(other, name, task_json(12))
    for split in ("train", "dev", "seen"):
        refused("run: train_tasks is '", f"{EVALUATE} --data other --split {split}")
    with mock.patch.object(program, "warn") as warn:
        output = run(f"{EVALUATE} --data other --split test")
    assert "2 test instances: " in output
    assert "other: 12 of 12 test rows belong to training tasks" in str(warn.mock_calls)


def test_changed_test_rows_are_refused_unless_a_flag_names_them(copied):
    change_config(copied, "facts", test_tasks="digest of others")
    saved = run_folder.read_run(copied)
    tokenizer = load_tokenizer(ROOT / "tiny")
    data_config = saved.settings.part(DataConfig)
    config = evaluation.EvalConfig(run="run", limit=2)
    with refusal("test_tasks is .*, but the run has 'digest of others'"):
        evaluation.rows_of_split(config, data_config, tokenizer, saved)
    named = dataclasses.replace(data_config, data=f"{ROOT}/sni/")
    assert len(evaluation.rows_of_split(config, named, tokenizer, saved)) == 2


# -------------------------------------------------------------------------------------- evaluation


def test_answers_may_be_as_long_as_the_targets_that_trained(home, monkeypatch):
    lengths = []

    def predict(base, adapters, examples, tokenizer, **options):
        lengths.append(options["max_new_tokens"])
        return [""] * len(examples)

    monkeypatch.setattr(evaluation, "predict", predict)
    run(f"train.py {BRIEF} --max-target-length 200 --out run")
    run("eval.py --run run --limit 2 --device cpu")
    assert set(lengths) == {199}
    assert DataConfig(max_target_length=64).max_new_tokens == 127  # the official number


def test_evaluation_passes_its_options_and_names_its_instances(home, monkeypatch):
    def predict(base, adapters, examples, tokenizer, **options):
        assert options == {"batch_size": 3, "max_new_tokens": 5}
        return [f"prediction for {example.task} {example.id}" for example in examples]

    monkeypatch.setattr(evaluation, "predict", predict)
    options = "--limit 4 --batch-size 3 --max-new-tokens 5"
    run(f"eval.py --model tiny {options} --device cpu --out out")
    lines = (home / "out/predictions.jsonl").read_text().splitlines()
    assert len(lines) == 4
    for line in lines:
        row = json.loads(line)
        prediction = f"prediction for {row['task']} {row['id']}"
        assert row == {"id": row["id"], "task": row["task"], "prediction": prediction}


def test_unseen_rows_are_scored_without_reading_the_training_tasks(tmp_path, monkeypatch):
    """To tokenise all training tasks of the real data takes half a minute."""
    write_lists(tmp_path, ["task1_a"], ["task2_b"])
    write_task(tmp_path, "task1_a", b"{")
    write_task(tmp_path, "task2_b", task_json(2))
    monkeypatch.setattr(evaluation, "predict", lambda *_, **__: ["a", "b"])
    evaluate = ["eval.py --data . --device cpu --model", ROOT / "tiny"]
    assert "2 test instances: " in run(*evaluate)
    refused("task1_a.json: JSONDecodeError", *evaluate, "--split", "dev")


def test_evaluation_replaces_no_results(copied, monkeypatch):
    monkeypatch.setattr(evaluation, "predict", lambda *_, **__: ["a", "b"])
    cwd = links(copied.parent)
    tiny = "eval.py --model tiny --split dev --limit 2 --device cpu"
    assert "; written to eval-dev\n" in run(tiny)
    paths = [cwd / "eval-dev/predictions.jsonl", cwd / "eval-dev/scores.json"]
    before = [path.read_bytes() for path in paths]
    exists = "exists, and nothing is overwritten; choose another --out"
    refused(f"eval-dev/predictions.jsonl: {exists}", tiny)
    paths[0].rename(cwd / "moved")
    refused(f"eval-dev/scores.json: {exists}", tiny)
    (cwd / "moved").rename(paths[0])
    assert [path.read_bytes() for path in paths] == before
    refused("run/scores.json: exists", f"{tiny} --out run")


def test_two_evaluations_at_once_do_not_replace_each_others_results(copied, monkeypatch):
    def predict(*inputs, **_):
        """Return answers when a second evaluation has been refused."""
        predict_alone = mock.Mock(return_value=["the first"] * len(inputs[2]))
        monkeypatch.setattr(evaluation, "predict", predict_alone)
        words = "run/eval-seen: another process is writing here; wait, or choose another --out"
        refused(words, f"{EVALUATE} --num-pos 0")
        return predict_alone()

    monkeypatch.setattr(evaluation, "predict", predict)
    run(EVALUATE)
    evaluation.predict.assert_called_once_with()


def test_ask_prints_the_answer_and_the_weights_of_the_router(finished):
    base, adapters, tokenizer = run_folder.load(CPU, run_dir=finished / "run")
    source = (
        "Definition: Write the first word of the list.\n\n"
        "Now complete the following example -\nInput: lion, June, wolf.\nOutput: "
    )
    ids = torch.tensor([tokenizer.encode(source)])
    with torch.no_grad(), adapters.routed(base.embed(ids)) as routing:
        tokens = base.generate(ids, torch.ones_like(ids))[0]
    w = routing.w[0]
    order = [k for k in w.argsort(descending=True).tolist() if w[k] >= 0.01]
    assert len(order) < len(w)
    weights = [f"{k + 1} at {w[k]:.3f}" for k in order]
    expected = [
        f"answer: {tokenizer.decode(tokens)}",
        f"router: abstract task {', '.join(weights)} (numbered from 1; others below 0.01)",
    ]
    question = "--ask 'Write the first word of the list.' --input 'lion, June, wolf'"
    ask = f"eval.py --device cpu {question}"
    assert run(f"{ask} --run run", cwd=finished).splitlines()[1:] == expected

    # A bare model has no router.
    output = run(f"{ask} --model tiny --max-new-tokens 1", cwd=finished)
    tokens = checkpoint.load(ROOT / "tiny").generate(ids, torch.ones_like(ids), max_new_tokens=1)
    assert output.splitlines()[1:] == [f"answer: {tokenizer.decode(tokens[0])}"]


def test_an_empty_answer_is_said(tiny_words, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "predict", lambda *_inputs, **_options: [""])
    monkeypatch.setattr(
        evaluation, "router_weights", lambda *_: torch.tensor([[-0.25, 1.5, 0.009]])
    )
    config = evaluation.EvalConfig(model="tiny", ask="Write a word.", input="lion")
    model = run_folder.Model(None, None, tiny_words)
    evaluation.answer(model, config, DataConfig(), run=None)
    assert capsys.readouterr().out.splitlines() == [
        "answer: (empty)",
        "router: abstract task 2 at 1.500, 1 at -0.250 (numbered from 1; others below 0.01)",
    ]


# ----------------------------------------------------------------------------- pages and real data


@pytest.mark.slow
def test_first_row_of_the_table_of_the_readmes_commands(home):
    page = text_of("experiments/results/README.md")
    row = re.search(r"^\| frozen base \| 0 \|(.*)\|$", page, re.MULTILINE)[1]  # 0 weights train
    cells = [float(cell) for cell in row.split("|")]
    losses = []
    found = []
    for split in ("seen", "test"):
        run(f"eval.py --model tiny --split {split} --device cpu --out {split}")
        overall = read_json(home / split / "scores.json")["overall"]
        losses.append(overall["loss"])
        found += [overall["rougeL"], overall["exact_match"]]
    assert losses == pytest.approx([cells[0], cells[3]], abs=1e-3)
    assert found == pytest.approx([*cells[1:3], *cells[4:]], abs=0.1)


@pytest.mark.slow
def test_training_and_evaluation_on_the_real_tasks(home, sni_dir):
    """Use all training tasks and the default sizes of prompts."""
    sizes = "--steps 2 --batch-size 4 --eval-instances 4 --device cpu --out run"
    run(f"train.py {sizes} --data", sni_dir)
    tasks = program.read_json(home / "run/config.json")["facts"]["tasks"]
    assert len(tasks) == len(read_splits(sni_dir)["train"])
    assert "2 test instances: " in run(f"{EVALUATE} --split test")


# ---------------------------------------------------------------------------- how a program ends


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("a list"),
        torch.OutOfMemoryError("CUDA"),
        RuntimeError("DefaultCPUAllocator: no 9 bytes"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_lack_of_memory_prints_one_line(error, monkeypatch):
    monkeypatch.setattr(train, "main", mock.Mock(side_effect=error))
    refused("train.py: error: out of memory (", "train.py")


def test_bug_keeps_its_traceback(home, monkeypatch):
    """A ValueError of Python is a bug, wherever it is raised. It is no mistake of the user."""
    monkeypatch.setattr(data, "collate", lambda *_, **__: int("a bug"))
    with refusal("^invalid literal for int"):
        run(f"train.py {BRIEF}")


# --------------------------------------------------------------------------------------- mistakes

ONE_OF = "give --run, the folder of a run, or --model, the folder of a model"
BOTH = 'give both --ask "instruction" and --input "text"'
TINY = "eval.py --model tiny"
ASK = f"{TINY} --ask Go --input word"

MISTAKES = {  # command line -> beginning of the message after "PROGRAM: error: "
    # Files and folders.
    "train.py --model google/flan-t5-base": "google/flan-t5-base: does not exist; name a local",
    "train.py --method lora --out file": "file: File exists",
    "train.py --resume": "--resume: give the folder of the run with --out",
    "eval.py --run nowhere": "nowhere/config.json: does not exist; name the folder of a run",
    f"{TINY} --limit 1 --out file": "file: File exists",
    "train.py --out empty": "empty/config.json: exists, and nothing is overwritten; add --resume",
    "train.py --start ''": "--start: empty; give a value, or leave it out",
    "train.py --data small": "small: 0 rows in the set dev, 1 needed; add task files of train_",
    "experiments/heuristics.py copy-demo --data bare": "bare/tasks/task2_b.json: no Positive",
    "train.py --data sni/own.jsonl --test no.jsonl": "no.jsonl: it has no rows",
    "train.py --data none.jsonl": "none.jsonl: No such file or directory",
    "train.py --data file": "file/splits/default/train_tasks.txt: no such file; --data takes FILE",
    f"{TINY} --data sni/own.jsonl": "sni/own.jsonl: 0 rows in the set test, 1 needed; "
    "give --test OTHER.jsonl, or --split seen",
    # Values.
    "train.py --step 3": "unrecognized arguments: --step 3; see --help",  # no abbreviations
    "train.py --dtype float16": "argument --dtype: invalid choice: 'float16'",
    "train.py --compile auto": "argument --compile: invalid choice: 'auto'",
    "train.py --max-tasks 1 --train-instances 5": "5 different training sources are too few",
    "train.py --steps -1": "steps: -1 must be 1 or more, and below 2^53",
    "train.py --lr-skills nan": "lr_skills: nan must be 0 or more",
    # Flags that do not fit together.
    "train.py --shard": "--shard: splits the base over processes; start it with torchrun",
    "train.py --shard --compile on": "--shard and --compile on: give one of the two",
    "eval.py": ONE_OF,
    f"{TINY} --ask Go": BOTH,
    f"{TINY} --ask ' ' --input word": BOTH,
    f"{TINY} --prompt ' '": "the prompt: the tokenizer has no tokens for the prompt ' '",
    f"{TINY} --ask a\udcff --input word": "--ask is not valid Unicode (lone surrogate)",
    # Flags that have no effect.
    "train.py --method lora --lr-router 1": "--lr-router: has no effect with --method lora; leave",
    "train.py --epochs 1 --steps 3": "--steps: has no effect with --epochs; leave it out",
    f"{ASK} --prompt Go": "--prompt: has no effect with --ask",
    f"{ASK} --num-pos 1": "--num-pos: has no effect with a question",
    f"{ASK} --max-tasks 1": "--max-tasks: has no effect with a question",
    f"{TINY} --data sni/own.jsonl --split seen --test x.jsonl": "--test: has no effect with",
    f"{TINY} --input word": "--input: has no effect without --ask",
    f"{TINY} --test x": "--test: has no effect with --data",
    "train.py --data sni/own.jsonl --num-pos 1": "--num-pos: has no effect with --data",
    "train.py --data sni/own.jsonl --method poly": "Poly routes by task id: every",
}


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory):
    """Return a folder with a file, data sets that lack something, and a run without settings."""
    folder = links(tmp_path_factory.mktemp("mistaken"))
    (folder / "file").write_text("a file")
    for name, task in (("small", task_json(1)), ("bare", task_json(**{"Positive Examples": []}))):
        write_lists(folder / name, ["task1_a"], ["task2_b"])
        write_task(folder / name, "task1_a", task)
        write_task(folder / name, "task2_b", task)
    (folder / "no.jsonl").touch()
    (folder / "empty").mkdir()
    (folder / "empty/config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("line, words", MISTAKES.items(), ids=MISTAKES)
def test_mistake_prints_one_line_and_leaves_no_file(mistaken, monkeypatch, line, words):
    monkeypatch.setattr(train, "train_step", None)  # mistakes must be found before training
    monkeypatch.setattr(evaluation, "predict", None)
    before = sorted(mistaken.rglob("*"))
    refused(f": error: {words}", line, cwd=mistaken)
    assert sorted(mistaken.rglob("*")) == before
