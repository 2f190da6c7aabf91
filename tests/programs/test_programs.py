"""train.py and eval.py as a user runs them, on the bundled data and, if it is given, the real data.

`MISTAKES` holds mistakes on the command line and in files, and the message of each.
"""

import contextlib
import dataclasses
import json
import math
import re
import shutil
import signal
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
    assert ("\nrouter: " in output) == (method == "orchmoe")
    assert ("\nlora of rank 8: trains 51,200 parameters on " in output) == (method == "lora")
    assert (" in routing) on " in output) == (method != "lora")
    assert "\nscoring frozen base on 4 seen rows\n" in output
    assert f"\nscoring {method} on 4 unseen rows\n" in output
    assert re.search(r"\nstep 8 of 8: dev loss \d\S*, best so far; \S+ s a step\n", output)

    rows = records(home / "run")
    assert [row["step"] for row in rows if "loss" in row] == list(range(8))
    first, second = [row["dev_loss"] for row in rows if "dev_loss" in row]
    assert second < first

    run("eval.py --run run --limit 4 --device cpu")
    scores = read_json(home / "run/scores.json")
    again = read_json(home / "run/eval-test-4/scores.json")
    assert scores[method]["unseen"]["overall"] == again["overall"]


def test_own_rows_train_and_their_scores_name_the_rules(home):
    """README's commands give no --out. They give --gpu 0, which works without a GPU, too."""
    write_rows(home / "other.jsonl", own_rows(9))
    own = "--data sni/own.jsonl --test other.jsonl --eval-instances 8 --steps 4 --eval-every 2"
    own += " --batch-size 8 --warmup 2 --gpu 0"
    output = run(f"train.py {own}")
    assert output.startswith("device: cpu, ") != torch.cuda.is_available()
    assert "rows: 158 train, 8 dev, 8 seen, 8 unseen; runs/orchmoe-1 has all scores" in output
    assert "\nROUGE-L and exact match in per cent, by the rules for rows of JSONL" in output
    scores = read_json(home / "runs/orchmoe-1/scores.json")
    assert scores["orchmoe"]["seen"]["metric_rules"] == "unicode"


def test_table_has_each_score_under_its_heading(capsys):
    seen = {"overall": {"exact_match": 1.0, "rougeL": 2.0, "loss": 5.0}}
    unseen = {"overall": {"exact_match": 3.0, "rougeL": 4.0, "loss": None}}  # it was NaN
    all_scores = {"lora": {"seen": seen}, "orchmoe": {"seen": seen, "unseen": unseen}}
    sizes = {"train": 9, "seen": 40, "unseen": 100}
    train.print_table(all_scores, run_folder.Path("run"), sizes, "official")
    output = capsys.readouterr().out
    names = "loss | seen ROUGE-L | seen exact match | unseen loss | unseen ROUGE-L | unseen exact"
    assert f"| model | seen {names} match |\n| --- | --- |" in output
    assert "| orchmoe | 5.000 | 2.00 | 1.00 | - | 4.00 | 3.00 |\n" in output
    assert "| lora | 5.000 | 2.00 | 1.00 | - | - | - |\n" in output
    assert "rows: 9 train, 40 seen, 100 unseen; run has all scores\n" in output
    assert "seen has few rows (40): one answer is 2.5 points of exact match\n" in output
    assert "unseen has few rows" not in output


def test_the_report_on_a_w_that_is_no_distribution_has_no_nan(capsys):
    train.print_router({"used": 2, "entropy": math.nan}, K=8)
    assert capsys.readouterr().out.endswith(" of an equal share on dev\n")


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
        (train, "mean_loss", 2, None, 8),  # the last evaluation
        (train, "train_step", 3, KeyboardInterrupt, 0),  # as a kill: nothing was saved
    ],
    ids=["SIGTERM in a step", "SIGTERM in the last evaluation", "kill before a save"],
)
def test_interrupted_run_resumes_bit_for_bit(home, whole, module, name, number, error, step):
    """Log and files equal those of an uninterrupted run. Only the times in the log may differ."""
    with interrupted(module, name, number, error):
        output = run(f"train.py {NOISY} --out run", code=130)
    resumed = home / "run"
    resume = "--resume --out run --device cpu"
    if step == 0:
        assert len(records(resumed)) == 2  # these steps are run again
        assert not (resumed / "progress.pt").exists()
    else:
        assert checkpoint.read_torch(resumed / "progress.pt")["progress"]["next_step"] == step
        assert f"\nstopped; resume with {resume}, on the same" in output
    assert read_json(resumed / "scores.json").keys() == {"frozen base"}

    run(f"train.py {resume}")
    for name in ("adapter.safetensors", "scores.json", "config.json"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name
    for part in ("progress", "adapters", "optimizer"):
        check_equal(*(checkpoint.read_torch(at / "progress.pt")[part] for at in (resumed, whole)))
    for row, expected in zip(records(resumed), records(whole), strict=True):
        assert row | {"seconds": 0} == expected | {"seconds": 0}


def test_who_reads_a_run_that_is_not_finished_is_told(home, monkeypatch):
    monkeypatch.setattr(evaluation, "predict", lambda *inputs, **_: ["a"] * len(inputs[2]))
    with interrupted(train, "train_step", 6):
        run(f"train.py {SHORT} --out run", code=130)
    on = f"train.py --start run {BRIEF} --out"
    told = mock.call(
        "run: this run has saved 6 of its 8 steps, so its weights are only the best so far; "
        "train.py --resume goes on"
    )
    with mock.patch.object(program, "warn") as warn:
        run(EVALUATE)
        run(f"{on} on")
        assert warn.mock_calls.count(told) == 2
    run(RESUME_RUN)
    with mock.patch.object(program, "warn") as warn:
        run(f"{EVALUATE} --overwrite")
        run(f"{on} again")
        assert "has saved" not in str(warn.mock_calls)


def test_stop_signals_are_noted_and_their_handlers_are_restored():
    for kind in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(kind)
        with program.stop_signals() as stop_requested:
            assert not stop_requested()
            signal.raise_signal(kind)
            assert stop_requested()
            signal.raise_signal(signal.SIGTERM)
            second = kind == signal.SIGINT  # a second Ctrl-C ends the program
            with pytest.raises(KeyboardInterrupt) if second else contextlib.nullcontext():
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(kind) == handler


def test_weights_that_give_no_loss_are_not_saved(home, monkeypatch):
    monkeypatch.setattr(train, "mean_loss", lambda losses: math.nan)
    message = "error: step 1: the dev loss is nan; what was saved"
    refused(message, f"train.py {SHORT} --eval-every 1 --out run")
    names = {path.name for path in (home / "run").iterdir()}
    assert not names & {"progress.pt", "adapter.safetensors"}


def test_run_keeps_the_dtype_that_auto_has_chosen(copied, monkeypatch):
    monkeypatch.setattr(runtime, "_cpu_gains_from_bfloat16", lambda base: True)
    assert runtime.pick_device(device="cpu", base="a base").dtype == torch.bfloat16
    assert ", float32, torch" in run(RESUME_RUN)
    assert ", float32, torch" in run(EVALUATE)
    chosen = f"{EVALUATE} --dtype bfloat16 --overwrite"
    assert ", bfloat16, torch" in run(chosen)


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
    run(f"{EVALUATE} --overwrite")  # the resumed run has noted the new places


def choose_rows(saved, capsys, split="seen", limit=0, **changes):
    """Return the rows that eval.py chooses from changed data, and what it says."""
    program.warn.cache_clear()
    config = evaluation.EvalConfig(run="run", split=split, limit=limit)
    data_config = dataclasses.replace(saved.settings.part(DataConfig), **changes)
    tokenizer = load_tokenizer(ROOT / "tiny")
    examples, _ = evaluation.choose_rows(config, data_config, saved, tokenizer)
    return examples, capsys.readouterr().err


def test_other_data_gives_a_warning_and_keeps_the_task_ids(copied, capsys):
    saved = run_folder.read_run(copied)
    assert choose_rows(saved, capsys)[1] == ""
    examples, said = choose_rows(saved, capsys, max_tasks=5, train_instances=1)
    assert "these are not the task files of the run" in said
    # The run has four tasks. The other one has no id.
    assert {example.task_index for example in examples} == {0, 1, 2, 3, -1}


def test_unseen_rows_of_other_data_that_belong_to_training_tasks_are_counted(copied, capsys):
    saved = run_folder.read_run(copied)
    folder = copied.parent / "other"
    name = saved.facts["tasks"][0]
    write_lists(folder, [], [name])
    write_task(folder, name, task_json(3))
    examples, said = choose_rows(saved, capsys, "test", data=str(folder))
    assert [example.task_index for example in examples] == [0, 0, 0]
    assert "other: 3 of 3 test rows belong to training tasks" in said


def test_the_first_test_rows_of_a_run_are_no_cause_for_a_warning(tmp_path, capsys):
    facts = {"tasks": ["a"], "train_tasks": "digest", "test_tasks": ""}
    saved = run_folder.Run("run", run_folder.Settings(data=str(ROOT / "sni/own.jsonl")), facts)
    test = write_rows(tmp_path / "new.jsonl", own_rows(3))
    examples, said = choose_rows(saved, capsys, "test", test=str(test))
    assert len(examples) == 3 and not said
    # A folder that had no test tasks has some now: its path is that of the run.
    saved.settings = dataclasses.replace(saved.settings, test=str(test))
    examples, said = choose_rows(saved, capsys, "test")
    assert len(examples) == 3 and not said


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
    assert "2 test instances of 1 tasks" in run(*evaluate)
    refused("task1_a.json: JSONDecodeError", *evaluate, "--split", "dev")


def test_evaluation_replaces_its_results_only_with_overwrite(copied, monkeypatch):
    monkeypatch.setattr(evaluation, "predict", lambda *_, **__: ["a", "b"])
    cwd = links(copied.parent)
    tiny = "eval.py --model tiny --split dev --limit 2 --device cpu --out"
    run(f"{tiny} kept")
    paths = [cwd / "kept/predictions.jsonl", cwd / "kept/scores.json"]
    before = [path.read_bytes() for path in paths]
    exists = "exists, and nothing is overwritten; add --overwrite, or choose another --out"
    with mock.patch.object(runtime, "pick_device", None):  # it is refused before anything is loaded
        refused(f"kept/predictions.jsonl: {exists}", f"{tiny} kept")
        paths[0].rename(cwd / "moved")
        refused(f"kept/scores.json: {exists}", f"{tiny} kept")
        (cwd / "moved").rename(paths[0])
    assert [path.read_bytes() for path in paths] == before

    monkeypatch.setattr(evaluation, "predict", lambda *_, **__: ["c", "d"])
    run(f"{tiny} kept --overwrite")
    assert '"prediction": "c"' in paths[0].read_text()
    (copied / "scores.json").unlink()  # as before the end of the run
    for flag in ("", "--overwrite"):
        message = "run: has a config.json, as a run or a model has; choose another --out"
        refused(message, f"{tiny} run {flag}")


def test_two_evaluations_at_once_do_not_replace_each_others_results(copied, monkeypatch):
    load = run_folder.load

    def predict(*inputs, **_):
        """Return answers when a second evaluation has been refused."""
        predict_alone = mock.Mock(return_value=["the first"] * len(inputs[2]))
        monkeypatch.setattr(evaluation, "predict", predict_alone)
        words = "run/eval-seen-2: another process is writing here; wait, or choose another --out"
        refused(words, f"{EVALUATE} --num-pos 0")
        return predict_alone()

    def load_slowly(*inputs, **options):
        """Return the model when another evaluation has just been finished."""
        with mock.patch.object(run_folder, "load", load):
            run(f"{EVALUATE} --overwrite")
        return load(*inputs, **options)

    monkeypatch.setattr(evaluation, "predict", predict)
    run(EVALUATE)
    evaluation.predict.assert_called_once_with()
    monkeypatch.setattr(run_folder, "load", load_slowly)
    shutil.rmtree(copied / "eval-seen-2")
    refused("predictions.jsonl: exists, and nothing is overwritten", f"{EVALUATE} --num-pos 0")


def test_no_scores_stand_beside_the_predictions_of_another_evaluation(copied):
    run(EVALUATE)
    folder = copied / "eval-seen-2"
    with interrupted(program, "write_json", 1, KeyboardInterrupt):
        run(f"{EVALUATE} --overwrite", code=130)
    assert (folder / "predictions.jsonl").exists() and not (folder / "scores.json").exists()
    run(f"{EVALUATE} --overwrite")
    assert "overall" in read_json(folder / "scores.json")


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
    shares = [f"{k + 1} at {100 * w[k]:.1f} %" for k in w.argsort(descending=True).tolist()]
    expected = [
        f"answer: {tokenizer.decode(tokens)}",
        f"router: abstract task {', '.join(shares)} (numbered from 1)",
    ]
    question = "--ask 'Write the first word of the list.' --input 'lion, June, wolf'"
    ask = f"eval.py --device cpu {question}"
    assert run(f"{ask} --run run", cwd=finished).splitlines()[1:] == expected

    # A bare model has no router.
    output = run(f"{ask} --model tiny --max-new-tokens 1", cwd=finished)
    tokens = checkpoint.load(ROOT / "tiny").generate(ids, torch.ones_like(ids), max_new_tokens=1)
    assert output.splitlines()[1:] == [f"answer: {tokenizer.decode(tokens[0])}"]


def test_a_run_of_rows_is_scored_on_a_folder_and_asked_in_its_form(capsys):
    """A folder has no `held_out` to compare with rows. `--ask --data DIR` asks in DIR's form."""
    facts = {"tasks": ["a"], "train_tasks": "digest", "held_out": [[3, 0], [17, 0]]}
    saved = run_folder.Run("run", run_folder.Settings(data=str(ROOT / "sni/own.jsonl")), facts)
    examples, said = choose_rows(saved, capsys, limit=2, data=str(ROOT / "sni"), max_tasks=1)
    assert len(examples) == 2 and "these are not the task files of the run" in said

    config = evaluation.EvalConfig(run="run", ask="Go.", input="word")
    evaluation.refuse_idle_flags({"data": "sni"}, config, DataConfig(data="sni"))


def test_ask_prints_a_w_that_is_no_distribution_as_numbers_and_an_empty_answer(
    tiny_words, capsys, monkeypatch
):
    monkeypatch.setattr(evaluation, "predict", lambda *_inputs, **_options: [""])
    monkeypatch.setattr(evaluation, "router_weights", lambda *_: torch.tensor([[-0.25, 1.5]]))
    config = evaluation.EvalConfig(model="tiny", ask="Write a word.", input="lion")
    model = run_folder.Model(None, None, tiny_words)
    evaluation.answer(model, config, DataConfig(), run=None)
    assert capsys.readouterr().out.splitlines() == [
        "answer: (empty)",
        "router: abstract task 2 at 1.500, 1 at -0.250 (numbered from 1)",
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
    assert "2 test instances of 2 tasks" in run(f"{EVALUATE} --split test")


# ---------------------------------------------------------------------------- how a program ends


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("a list"),
        torch.OutOfMemoryError("CUDA"),
        RuntimeError("DefaultCPUAllocator: no 9 bytes"),
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
    "train.py --targets ,": "--targets: empty; give a value, or leave it out",
    "train.py --data small": "small: 0 rows in the set dev, 1 needed; add task files of train_",
    "experiments/heuristics.py copy-demo --data bare": "bare/tasks/task2_b.json: no Positive",
    "train.py --data sni/own.jsonl --test no.jsonl": "no.jsonl: it has no rows",
    "train.py --data none.jsonl": "none.jsonl: No such file or directory",
    f"{ASK} --data nothing.jsonl": "nothing.jsonl: does not exist; give --data DIR or FILE.jsonl",
    f"{TINY} --data sni/own.jsonl --split test": "sni/own.jsonl: 0 rows in the set test, 1 needed; "
    "give --test OTHER.jsonl, or --split seen",
    # Values.
    "train.py --step 3": "unrecognized arguments: --step 3; see --help",  # no abbreviations
    "train.py --dtype float16": "argument --dtype: invalid choice: 'float16'",
    "train.py --gpu -1": "--gpu -1: there are ",
    "train.py --max-tasks 1 --train-instances 5": "5 different training sources are too few",
    "train.py --steps -1": "--steps -1: give 1 or more",
    "train.py --max-source-length 1": "--max-source-length 1: give 2 or more",
    "train.py --lr-skills nan": "--lr-skills nan: give 0 or more",
    f"{TINY} --batch-size 0": "--batch-size 0: give 1 or more",
    # Flags that do not fit together.
    "train.py --shard": "--shard: splits the base over processes; start it with torchrun",
    "train.py --shard --compile on": "--shard and --compile: give one of the two",
    "train.py --gpu 0 --device cpu": "--gpu 0 --device cpu: give one of the two",
    "eval.py": ONE_OF,
    f"{TINY} --ask Go": BOTH,
    f"{TINY} --ask ' ' --input word": BOTH,
    f"{TINY} --prompt ' '": "--prompt: it is empty",
    f"{TINY} --ask a\udcff --input word": "--ask is not valid Unicode (lone surrogate)",
    f"{TINY} --ask Go --prompt Go": "--prompt: it is a whole prompt; leave out --ask and --input",
    f"{TINY} --prompt Go --input word": "--prompt: it is a whole prompt; leave out",
    # Flags that have no effect.
    "train.py --method lora --lr-router 1": "--lr-router: has no effect with --method lora; leave",
    "train.py --lr-token-router 3": "--lr-token-router: has no effect with --method",
    "train.py --lr-skills 0": "--lr-skills 0: the skills start with B = 0, so that nothing can",
    f"{TINY} --input word": "--input: has no effect without --ask",
    f"{TINY} --split seen --test x": "--test: has no effect with --split seen",
    "train.py --data sni/own.jsonl --num-pos 1": "--num-pos: has no effect with --data",
    "train.py --data sni/own.jsonl --method poly": "Poly routes by task id: every",
    f"{ASK} --split seen": "--split: has no effect with a question",
    f"{ASK} --num-pos 1": "--num-pos: has no effect with a question",
    f"{ASK} --overwrite": "--overwrite: has no effect with a question",
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
