"""train.py and eval.py as a user runs them, on the bundled data and, if it is given, the real data.

`MESSAGES` holds mistakes on the command line and the message of each.
"""

import dataclasses
import importlib
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

import checkpoint
import data
import eval as evaluation
import run_folder
import runtime
import tokenizer as tokenizers
import train
from baselines import NoAdapter, attach_method
from helpers import (
    ROOT,
    SHORT,
    command,
    environment,
    process,
    records,
    run,
    run_shell,
    task_json,
    terminate_after,
    trace,
)
from orchmoe import OrchMoEConfig

CPU = runtime.Device(torch.device("cpu"), torch.float32, "")
RESUME = ["train.py", "--resume", "--out", "run", "--device", "cpu"]
EVALUATE = ["eval.py", "--run", "run", "--split", "seen", "--limit", "2", "--device", "cpu"]


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def change_config(folder, section, **values):
    """Change fields in a section of config.json."""
    config = read_json(folder / "config.json")
    config[section] |= values
    runtime.write_json(folder / "config.json", config)


# ------------------------------------------------------------------------------------ a whole run


def test_run_from_start_to_scores(home):
    arguments = ["--data", "sni/", "--gpu", "0", *SHORT[2:], "--out", "run"]
    output = run("train.py", *arguments, cwd=home)
    assert "| frozen base |" in output
    assert "| orchmoe |" in output
    assert "python train.py --resume --gpu 0 --out run\n" in output
    assert "next: python eval.py --run run --split test\n" in output
    assert "\nrouter on dev: " in output

    folder = home / "run"
    steps = [row["step"] for row in records(folder) if "loss" in row]
    assert steps == list(range(8))
    expected = {"entropy", "normalised_entropy", "largest", "used", "between", "within", "distance"}
    assert records(folder)[-1]["router"].keys() == expected
    scores = read_json(folder / "scores.json")
    assert scores.keys() == {"frozen base", "orchmoe"}
    assert scores["orchmoe"].keys() == {"seen", "unseen"}
    state, metadata = checkpoint.load_adapter(folder / "adapter.safetensors")
    assert metadata["method"] == "orchmoe"
    assert "Z" in state

    # An evaluation gives the same scores, and predictions in the official format.
    evaluate = ["eval.py", "--run", "run", "--split", "seen", "--limit", "8", "--device", "cpu"]
    run(*evaluate, cwd=home)
    again = read_json(folder / "eval-seen-8/scores.json")
    assert again["overall"] == scores["orchmoe"]["seen"]["overall"]
    predictions = (folder / "eval-seen-8/predictions.jsonl").read_text().splitlines()
    assert len(predictions) == 8
    for line in predictions:
        assert json.loads(line).keys() == {"id", "prediction"}


@pytest.mark.parametrize("method", ["lora", "moe-lora", "poly", "mhr", "c-poly", "full"])
def test_every_method_trains_and_is_scored(home, method):
    rate = "--lr-full" if method == "full" else "--lr-skills"
    run("train.py", *SHORT, "--method", method, rate, "0.01", "--out", "run", cwd=home)
    rows = records(home / "run")
    assert all(row.get("entropy") is None for row in rows)  # there is no w, and JSON has no NaN
    first, second = [row["dev_loss"] for row in rows if "dev_loss" in row]
    assert second < first

    run("eval.py", "--run", "run", "--limit", "8", "--device", "cpu", cwd=home)
    scores = read_json(home / "run/scores.json")
    again = read_json(home / "run/eval-test-8/scores.json")
    assert scores[method]["unseen"]["overall"] == again["overall"]


def test_full_weights_are_evaluated_in_float32(home):
    run("train.py", *SHORT, "--method", "full", "--out", "run", cwd=home)
    bfloat16 = CPU._replace(dtype=torch.bfloat16)
    base, _, _ = run_folder.load(bfloat16, run=home / "run")
    assert base.embedding.weight.dtype == torch.float32

    evaluate = ["eval.py", "--run", "run", "--limit", "2", "--device", "cpu"]
    output = run(*evaluate, "--dtype", "bfloat16", cwd=home)
    assert ", float32, torch" in output
    assert read_json(home / "run/eval-test-2/scores.json")["config"]["dtype"] == "float32"

    error = run(*evaluate, "--model", ROOT / "tiny", cwd=home, code=2)
    assert "--model: the run in run has its own weights; leave the flag out" in error
    shutil.rmtree(home / "run/model")
    error = run(*evaluate, cwd=home, code=2)
    assert error.endswith("run/model: does not exist; the run has not saved any weights yet\n")


def test_seed_decides_every_byte(home):
    arguments = ["train.py", *SHORT, "--gumbel", "--seed"]
    run(*arguments, 3, "--out", "one", cwd=home)
    run(*arguments, 4, "--out", "other", cwd=home)
    process(*arguments, 3, "--out", "same", cwd=home, PYTHONHASHSEED="2")
    for name in ("adapter.safetensors", "checkpoint.pt", "scores.json", "config.json"):
        one = (home / "one" / name).read_bytes()
        assert (home / "same" / name).read_bytes() == one, name
        assert (home / "other" / name).read_bytes() != one, name

    logs = {}
    for folder in ("one", "same"):
        logs[folder] = records(home / folder)
        for row in logs[folder]:
            row.pop("tokens_per_s", None)
    assert logs["one"] == logs["same"]
    assert trace(home / "one") != trace(home / "other")


@pytest.mark.slow
def test_accumulation_does_not_change_the_step(home):
    for parts in (1, 3):
        arguments = [*SHORT, "--gumbel", "--accumulate", parts, "--out", f"run{parts}"]
        run("train.py", *arguments, cwd=home)
    whole = trace(home / "run1")
    parts = trace(home / "run3")
    # Loss and gradient norm before any update.
    assert whole[0] == pytest.approx(parts[0], rel=1e-5)
    # Later norms are left out: Adam enlarges the rounding of tiny gradients to whole steps.
    for one, three in zip(whole, parts, strict=True):
        step, loss, _, dev_loss = one
        its_step, its_loss, _, its_dev_loss = three
        found = (its_step, its_loss, its_dev_loss)
        assert (step, loss, dev_loss) == pytest.approx(found, rel=1e-4)


def test_table_has_each_score_under_its_heading(capsys):
    seen = {"overall": {"exact_match": 1.0, "rougeL": 2.0}}
    unseen = {"overall": {"exact_match": 3.0, "rougeL": 4.0}}
    rows = {"lora": {"seen": seen}, "orchmoe": {"seen": seen, "unseen": unseen}}
    train.print_table(rows, run_folder.RunFolder("run"), train.TrainConfig())
    output = capsys.readouterr().out
    names = "seen ROUGE-L | seen exact match | unseen ROUGE-L | unseen exact match"
    assert f"| model | {names} |\n" in output
    assert "| orchmoe | 2.00 | 1.00 | 4.00 | 3.00 |\n" in output
    assert "| lora | 2.00 | 1.00 | - | - |\n" in output


# ---------------------------------------------------------------------- interruptions and resuming


def test_killed_run_resumes_bit_for_bit(home):
    run("train.py", *SHORT, "--gumbel", "--out", "whole", cwd=home)
    killed = home / "killed"
    started = subprocess.Popen(
        command("train.py", *SHORT, "--gumbel", "--out", "killed"),
        cwd=home,
        stdout=subprocess.DEVNULL,
        env=environment(),
    )
    while not (killed / "metrics.jsonl").exists() or len(trace(killed)) < 6:  # past a checkpoint
        time.sleep(0.01)
        assert started.poll() is None
    started.kill()
    started.wait()
    assert (killed / "checkpoint.pt").exists()
    assert "orchmoe" not in (killed / "scores.json").read_text()

    run("train.py", "--resume", "--out", "killed", "--device", "cpu", cwd=home)
    assert trace(killed) == trace(home / "whole")
    for name in ("adapter.safetensors", "scores.json"):
        assert (killed / name).read_bytes() == (home / "whole" / name).read_bytes()
    # The distance of the router is measured from the start of the run, not from the checkpoint.
    assert records(killed)[-1]["router"] == records(home / "whole")[-1]["router"]


def test_sigterm_finishes_the_step_and_saves(home):
    output = terminate_after(6, *SHORT, "--steps", "4000", cwd=home)
    assert f"{ROOT / 'train.py'} --resume --device cpu --out run\n" in output
    state = checkpoint.read_torch(home / "run/checkpoint.pt")
    assert state["step"] == records(home / "run")[-1]["step"] + 1


def test_loss_that_is_not_finite_stops_the_run_and_changes_no_file(copied):
    change_config(copied, "train", steps=16)
    path = copied / "checkpoint.pt"
    state = checkpoint.read_torch(path)
    name = "decoder.blocks.1.attention.v.skill_B"
    state["weights"][name] = state["weights"][name].clone()
    state["weights"][name][1, 0, 3] = float("inf")
    with runtime.atomic_write(path) as file:  # the old file stays for the tensors mapped from it
        torch.save(state, file)

    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    error = run(*RESUME, cwd=copied.parent, code=2)
    assert error.count("\n") == 1
    assert f"step {state['step']} on " in error
    assert "the loss is nan; the last checkpoint is intact" in error
    assert len(re.findall(r"task\d+-[0-9a-f]{32}", error)) == 8  # the ids of the batch
    assert before == {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}


@pytest.mark.parametrize("factor", [float("nan"), 1e30])  # the square of 1e30 overflows
def test_gradient_that_is_not_finite_changes_no_weight(small_t5, inputs, factor):
    adapters = attach_method("lora", small_t5, OrchMoEConfig())
    optimizer = train.make_optimizer(adapters, train.TrainConfig())
    B = adapters.linears["decoder.blocks.1.attention.v"].skill_B
    B.register_hook(lambda gradient: gradient * factor)
    before = {name: tensor.clone() for name, tensor in adapters.state_dict().items()}
    batch = data.Batch(*inputs, torch.zeros(4, dtype=torch.int64), ["a", "b", "c", "d"])
    message = "^step 7 on a, b, c, d: the gradient norm is (nan|inf); the last checkpoint is intact"
    with pytest.raises(ValueError, match=message):
        train.train_step(small_t5, adapters, optimizer, batch, 7, train.TrainConfig())
    for name, tensor in adapters.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_step_that_breaks_the_weights_is_not_saved(home, monkeypatch):
    train_step = train.train_step

    def step_to_infinity(base, adapters, *arguments):
        record = train_step(base, adapters, *arguments)
        adapters.Z.data[0, 1, 2] = float("inf")
        return record

    monkeypatch.setattr(train, "train_step", step_to_infinity)
    error = run("train.py", *SHORT, "--eval-every", "1", "--out", "run", cwd=home, code=2)
    assert error.count("\n") == 1
    assert "step 0 on " in error
    assert "the norm of the weights is inf" in error
    assert not (home / "run/checkpoint.pt").exists()
    assert not (home / "run/adapter.safetensors").exists()


def test_signal_during_the_last_evaluation_stops_before_the_scores(home, monkeypatch):
    measure = evaluation.measure
    calls = []

    def signal_in_second_call(*arguments, **options):
        calls.append(None)
        if len(calls) == 2:  # of 8 steps with an evaluation after every 4
            signal.raise_signal(signal.SIGTERM)
        return measure(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "measure", signal_in_second_call)
        run("train.py", *SHORT, "--out", "run", cwd=home, code=130)
    assert len(calls) == 2
    assert read_json(home / "run/scores.json").keys() == {"frozen base"}
    assert "| orchmoe |" in run(*RESUME, cwd=home)


def test_run_keeps_the_dtype_that_auto_has_chosen(home, monkeypatch):
    run("train.py", *SHORT, "--out", "run", cwd=home)
    assert read_json(home / "run/config.json")["train"]["dtype"] == "float32"

    monkeypatch.setattr(runtime, "_cpu_gains_from_bfloat16", lambda base: True)
    # bfloat16 is slow on a CPU that does not multiply it.
    short = [*SHORT, "--steps", "1", "--eval-instances", "2", "--out", "other"]
    assert "bfloat16" in run("train.py", *short, cwd=home).splitlines()[0]
    assert "float32" in run(*RESUME, cwd=home).splitlines()[0]


def test_run_is_not_resumed_on_another_base_or_other_tasks(copied):
    config = read_json(copied / "config.json")
    changes = {
        "base": "0" * 16,
        "tokenizer": "0",
        "tasks": config["tasks"][1:],
        "digests": {"train": "0"},
    }
    for name, value in changes.items():
        (copied / "config.json").write_text(json.dumps({**config, name: value}))
        error = run(*RESUME, cwd=copied.parent, code=2)
        assert f"run: {name} changed since the run began" in error

    for damaged in ("[]", "{}", "nonsense"):
        (copied / "config.json").write_text(damaged)
        for line in (RESUME, EVALUATE):
            assert "run/config.json: " in run(*line, cwd=copied.parent, code=2)


def test_run_is_bound_to_the_contents_of_its_data_and_tokenizer(copied, tmp_path):
    shutil.copytree(ROOT / "sni", tmp_path / "sni")
    shutil.copytree(ROOT / "tiny", tmp_path / "tiny")
    config = read_json(copied / "config.json")
    assert config["train"]["model"].startswith("/")
    assert config["data"]["data"].startswith("/")
    change_config(copied, "data", data=str(tmp_path / "sni"))
    change_config(copied, "train", model=str(tmp_path / "tiny"))
    run(*EVALUATE, cwd=tmp_path)

    # An output in a task file changes after the start.
    path = tmp_path / "sni/tasks" / f"{config['tasks'][0]}.json"
    task = read_json(path)
    task["Instances"][0]["output"] = ["changed"]
    path.write_text(json.dumps(task))
    export = ["export.py", "--run", "run", "--out", "served", "--routing", "mean"]
    for line in (EVALUATE, RESUME, export):
        error = run(*line, cwd=tmp_path, code=2)
        assert "run: digests changed since the run began" in error
        assert error.count("\n") == 1

    # The same data in another place is accepted.
    moved = ["--data", ROOT / "sni"]
    run(*RESUME, *moved, cwd=tmp_path)
    process(*EVALUATE, *moved, cwd=tmp_path)

    # A field that SentencePiece does not know: the same pieces in another file.
    with open(tmp_path / "tiny/spiece.model", "ab") as file:
        file.write(b"\xfa\x7f\x00")
    error = run(*EVALUATE, *moved, cwd=tmp_path, code=2)
    assert "run: tokenizer changed since the run began" in error


def test_moved_base_is_given_with_model(copied, tmp_path):
    change_config(copied, "train", model=str(tmp_path / "gone"))
    assert "gone: does not exist" in run(*EVALUATE, cwd=tmp_path, code=2)
    run(*EVALUATE, "--model", ROOT / "tiny", cwd=tmp_path)
    run(*RESUME, "--model", ROOT / "tiny", cwd=tmp_path)
    run(*EVALUATE, cwd=tmp_path)  # the resumed run has noted the new place


# -------------------------------------------------------------------------------------- evaluation


def test_other_data_gives_a_warning(copied, capsys):
    saved = run_folder.read_config(copied)
    tokenizer = tokenizers.load(ROOT / "tiny")
    config = evaluation.EvalConfig(run=str(copied), split="seen", limit=2)
    own_data = saved.section(data.DataConfig, "data")
    runtime.warn.cache_clear()
    evaluation.load_examples(config, own_data, saved, tokenizer)
    assert not capsys.readouterr().err

    other_data = dataclasses.replace(own_data, max_tasks=5)
    evaluation.load_examples(config, other_data, saved, tokenizer)
    warning = capsys.readouterr().err
    assert warning.endswith("sni: these are not the task files of the run\n")


def test_task_ids_are_those_of_the_run_on_any_data(home):
    run("train.py", *SHORT, "--method", "poly", "--out", "run", cwd=home)
    run(*EVALUATE, "--max-tasks", "6", "--limit", "12", cwd=home)
    scores = read_json(home / "run/eval-seen-12/scores.json")
    assert len(scores["tasks"]) == 6  # two of them have no id


def test_evaluation_passes_its_options_and_names_its_instances(home, monkeypatch):
    given = {}

    def predict(base, adapters, examples, tokenizer, **options):
        given.update(options)
        return [example.task for example in examples]

    monkeypatch.setattr(evaluation, "predict", predict)
    arguments = ["--model", "tiny", "--limit", "4", "--max-tasks", "2", "--batch-size", "3"]
    arguments += ["--max-new-tokens", "5", "--device", "cpu", "--out", "out"]
    run("eval.py", *arguments, cwd=home)
    assert given == {"batch_size": 3, "max_new_tokens": 5}

    tokenizer = tokenizers.load(ROOT / "tiny")
    test_set = data.load_sets(data.DataConfig(max_tasks=2), tokenizer, ["test"])["test"]
    expected = []
    for example in data.subsample(test_set, 4):
        expected.append({"id": example.id, "prediction": example.task})
    lines = (home / "out/predictions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == expected


def test_evaluation_does_not_replace_another_one(copied):
    cwd = copied.parent
    run(*EVALUATE, cwd=cwd)
    run(*EVALUATE, "--batch-size", "1", cwd=cwd)  # the same evaluation
    before = (copied / "eval-seen-2/predictions.jsonl").stat().st_mtime_ns
    refused = "holds a run or a different evaluation; choose another --out"
    assert f"run/eval-seen-2: {refused}" in run(*EVALUATE, "--num-pos", "0", cwd=cwd, code=2)
    assert f"run: {refused}" in run(*EVALUATE, "--out", "run", cwd=cwd, code=2)
    assert (copied / "eval-seen-2/predictions.jsonl").stat().st_mtime_ns == before

    copies = ["eval.py", "--heuristic", "copy-input", "--split", "dev", "--limit", "2"]
    copies += ["--out", "kept"]
    run(*copies, "--gpu", "0", cwd=cwd)  # a heuristic takes no GPU, even if there is none
    for change in ("--heuristic copy-demo", "--split seen", "--limit 3"):
        assert f"kept: {refused}" in run(*copies, *change.split(), cwd=cwd, code=2)
    for damaged in ("{}", '{"config": ["split"]}', '{"config": 3}'):
        (cwd / "kept/scores.json").write_text(damaged)
        assert f"kept: {refused}" in run(*copies, cwd=cwd, code=2)


def test_new_predictions_delete_the_old_scores(copied, monkeypatch):
    run(*EVALUATE, cwd=copied.parent)
    folder = copied / "eval-seen-2"
    written = {path.name for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "score", mock.Mock(side_effect=KeyboardInterrupt))
        run(*EVALUATE, cwd=copied.parent, code=130)
    assert {path.name for path in folder.iterdir()} == written - {"scores.json"}
    run(*EVALUATE, cwd=copied.parent)
    assert {path.name for path in folder.iterdir()} == written


def test_output_folder_is_made_before_anything_is_generated(copied, monkeypatch):
    monkeypatch.setattr(evaluation, "predict", None)
    (copied.parent / "file").touch()
    monkeypatch.setattr(sys, "argv", ["eval.py", "--run", "run", "--limit", "2", "--out", "file"])
    with pytest.raises(FileExistsError):
        evaluation.main()


def test_folder_of_an_evaluation_has_its_name():
    folders = {
        "r/eval-test": {"run": "r"},
        "r/eval-test-3": {"run": "r", "limit": 3},
        "eval-copy-demo-test": {"heuristic": "copy-demo"},
        "eval-base-seen": {"model": "a/base/", "split": "seen"},
        "o": {"run": "r", "out": "o"},
    }
    for folder, options in folders.items():
        assert evaluation.EvalConfig(**options).folder == Path(folder)


def ask(model, *arguments, cwd):
    """Return what eval.py prints after the line about the device."""
    question = ["--ask", "Write the first word of the list.", "--input", "lion, June, wolf"]
    output = run("eval.py", *model, *question, "--device", "cpu", *arguments, cwd=cwd)
    return output.splitlines()[1:]


def test_ask_prints_the_answer_and_the_weights_of_the_router(home, finished):
    base, adapters, tokenizer = run_folder.load(CPU, run=finished / "run")
    source = (
        "Definition: Write the first word of the list.\n\n"
        "Now complete the following example -\nInput: lion, June, wolf.\nOutput: "
    )
    ids = torch.tensor([tokenizer.encode(source)])
    with torch.no_grad(), adapters.routed(base.embed(ids)) as routing:
        tokens = base.generate(ids, torch.ones_like(ids))[0]
    w = routing.w[0]
    shares = [f"{k + 1} at {100 * w[k]:.1f} %" for k in w.argsort(descending=True).tolist()]
    assert ask(["--run", "run"], cwd=finished) == [
        "run: the prompt has no examples",
        f"answer: {tokenizer.decode(tokens)}",
        f"router: abstract task {', '.join(shares)} (numbered as in the figures)",
    ]

    bare = checkpoint.load(home / "tiny")
    first = bare.generate(ids, torch.ones_like(ids), max_new_tokens=1)[0]
    assert ask(["--model", "tiny"], "--max-new-tokens", "1", cwd=home) == [
        "tiny: the prompt has no examples",
        f"answer: {tokenizer.decode(first)}",
    ]


# ----------------------------------------------------------------------------- pages and real data


@pytest.mark.slow
def test_first_row_of_the_readme(home):
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    row = re.search(r"^\| frozen base \|(.*)\|$", page, re.MULTILINE)[1]
    found = []
    for split in ("seen", "test"):
        arguments = ["--model", "tiny", "--split", split, "--device", "cpu", "--out", split]
        run("eval.py", *arguments, cwd=home)
        overall = read_json(home / split / "scores.json")["overall"]
        found += [overall["rougeL"], overall["exact_match"]]
    assert found == pytest.approx([float(cell) for cell in row.split("|")], abs=0.1)


@pytest.mark.slow
def test_merged_model_of_the_page_predicts_as_the_run(home):
    """docs/use.md merges a run under the mean w of a task. The run routed by that w is the same."""
    page = (ROOT / "docs/use.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    [snippet] = [block for block in blocks if ".merge(" in block]
    rates = ["--lr-skills", "0.03", "--steps", "20"]
    run("train.py", *SHORT, *rates, "--out", "runs/orchmoe-1", cwd=home)
    variables = environment(PYTHONPATH=str(ROOT))
    program = [sys.executable, "-c", snippet]
    subprocess.run(program, cwd=home, env=variables, check=True, timeout=300)

    base, adapters, _ = run_folder.load(CPU, run=home / "runs/orchmoe-1")
    tokenizer = tokenizers.load(home / "merged")
    config = data.DataConfig(data=str(home / "sni"), max_tasks=1)
    test_set = data.load_sets(config, tokenizer)["test"]
    examples = data.subsample(test_set, 16)
    _, w = evaluation.measure(base, adapters, test_set)
    mean_w = w.mean(0).expand(len(examples), -1)
    routed = evaluation.predict(base, adapters, examples, tokenizer, w=mean_w)

    def predict(model):
        return evaluation.predict(model, NoAdapter(model, full=False), examples, tokenizer)

    assert predict(checkpoint.load(home / "merged")) == routed
    assert predict(checkpoint.load(home / "tiny")) != routed


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, rouge_l, exact, published",
    [("copy-demo", 29.6919, 23.3748, 28.54), ("copy-input", 16.5341, 0.3112, 14.20)],
)
def test_heuristics_on_the_official_test_tasks(home, sni_dir, kind, rouge_l, exact, published):
    run("eval.py", "--heuristic", kind, "--data", sni_dir, "--out", "out", cwd=home)
    scores = read_json(home / "out/scores.json")
    if len(scores["tasks"]) == 119:  # all test tasks: the published scores
        assert scores["overall"]["rougeL"] == pytest.approx(published, abs=0.05)
    else:  # a sample of them, which the official code has scored
        assert len(scores["tasks"]) == 58
        assert scores["overall"]["rougeL"] == pytest.approx(rouge_l, abs=5e-5)
        assert scores["overall"]["exact_match"] == pytest.approx(exact, abs=5e-5)


@pytest.mark.slow
def test_thirty_steps_on_the_real_tasks(home, sni_dir):
    """Stop, resume and evaluate a run with the default sizes of prompts on all training tasks."""
    sizes = "--steps 30 --batch-size 4 --warmup 5 --eval-every 15 --eval-instances 32"
    terminate_after(4, "--data", sni_dir, "--device", "cpu", *sizes.split(), cwd=home)
    run(*RESUME, cwd=home)
    steps = [row["step"] for row in records(home / "run") if "loss" in row]
    assert steps == list(range(30))
    evaluate = ["eval.py", "--run", "run", "--max-tasks", "3", "--limit", "24", "--device", "cpu"]
    run(*evaluate, cwd=home)
    assert len(read_json(home / "run/eval-test-24/scores.json")["tasks"]) == 3


# ---------------------------------------------------------------------------- how a program ends

MEMORY = "train.py: error: out of memory ("
COMPILER = "train.py: error: torch.compile finds no C compiler; install gcc"


@pytest.mark.parametrize(
    "error, code, beginning",
    [
        (MemoryError("a list"), 2, MEMORY + "a list); lower"),
        (torch.OutOfMemoryError("CUDA"), 2, MEMORY + "CUDA);"),
        (RuntimeError("DefaultCPUAllocator: no 9 bytes"), 2, MEMORY + "DefaultCPUAllocator"),
        (RuntimeError("Failed to find C compiler. Please specify"), 2, COMPILER),  # by Triton
        (
            RuntimeError("InvalidCxxCompiler: No working C++ compiler found"),
            2,
            COMPILER,
        ),  # by torch
        (KeyboardInterrupt(), 130, ""),
        (RuntimeError("a bug"), None, ""),
    ],
)
def test_how_a_program_ends(error, code, beginning, monkeypatch, capsys):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["train.py"])
    expected = RuntimeError if code is None else SystemExit
    with pytest.raises(expected) as end:
        runtime.run_program(main)
    if code is not None:
        assert end.value.code == code
    message = capsys.readouterr().err
    assert message.startswith(beginning)
    assert message.count("\n") == bool(beginning)


@pytest.mark.parametrize(
    "joined, expected", [(False, ""), (True, "train.py: error on rank 1: bad\n")]
)
def test_failing_process_names_its_rank(joined, expected, monkeypatch, capsys):
    """Before the processes have joined, all meet the same error, and rank 0 prints it."""

    def main():
        raise ValueError("bad")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(runtime, "rank", lambda: 1)
    monkeypatch.setattr(runtime, "local_rank", lambda: 1)
    monkeypatch.setattr(runtime.dist, "is_initialized", lambda: joined)
    with pytest.raises(SystemExit):
        runtime.run_program(main)
    assert capsys.readouterr().err == expected


def test_stop_signals_are_noted_and_their_handlers_are_restored():
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(kind) for kind in kinds]
    for kind in kinds:
        with runtime.stop_signals() as stop_requested:
            assert not stop_requested()
            for _ in range(2):  # a second signal is no different
                signal.raise_signal(kind)
                assert stop_requested()
        assert [signal.getsignal(each) for each in kinds] == before


# ------------------------------------------------------------------- mistakes on the command line

CHOICE = "invalid choice: "  # the rest of argparse's message depends on the version of Python
DOWNLOAD = "does not exist; name a local folder"
NO_LIST = "train_tasks.txt: no such file; --data takes a folder with splits/ and tasks/"
NO_RUN = "nowhere/config.json: does not exist; name the folder of a run of train.py"
ONE_OF = "give --run or --model, or --heuristic alone"
BOTH = 'give both --ask "instruction" and --input "text"'
ALONE = "--ask: it cannot be combined with --heuristic or --out"
HEURISTIC = "eval.py --heuristic copy-demo"
TOO_FEW = "too few for K = 8 abstract tasks; give at least 8"
FACTORS = "--method orchmoe-factors --router token"
UNUSED = "does not use it; leave it out"

MESSAGES = {  # command line -> beginning of the message after "PROGRAM: error: "
    # Files and folders.
    "train.py --data nowhere": f"nowhere/splits/default/{NO_LIST}",
    "train.py --splits nowhere": f"{ROOT}/sni/splits/nowhere/{NO_LIST}",
    "train.py --splits ../x": "--splits: '../x' is not a plain name; give a short",
    "train.py --model google/flan-t5-base": f"google/flan-t5-base: {DOWNLOAD}",
    "train.py --model file": "file: not a SentencePiece model; download it again",
    "train.py --out file": "file: File exists",
    "train.py --out file/run": "file/run: Not a directory",
    "train.py --out x\udcff": "an argument is not UTF-8; rename the file or folder that it names",
    "train.py --resume": "--resume: give the folder of the run with --out",
    "train.py --resume --out nowhere": NO_RUN,
    "eval.py --run nowhere": NO_RUN,
    "eval.py --run nowhere --ask Go --input word": NO_RUN,
    "eval.py --model google/flan-t5-base": f"google/flan-t5-base: {DOWNLOAD}",
    f"{HEURISTIC} --data nowhere": f"nowhere/splits/default/{NO_LIST}",
    f"{HEURISTIC} --limit 1 --out file": "file: File exists",
    "experiments/plot.py --run nowhere": "nowhere/metrics.jsonl: does not exist; name the folder",
    "experiments/plot.py --results nowhere": "nowhere: no results.json or ablations.json",
    # Flags that argparse refuses.
    "train.py --steps": "argument --steps: expected one argument; see --help",
    "train.py --steps many": "argument --steps: invalid int value: 'many'; see --help",
    "train.py --steps 1.5": "argument --steps: invalid int value: '1.5'; see --help",
    "train.py --stepz 3": "unrecognized arguments: --stepz 3; see --help",
    "train.py sni": "unrecognized arguments: sni; see --help",
    "train.py --lr-skills fast": "argument --lr-skills: invalid float value: 'fast'; see --help",
    "train.py --gpu one": "argument --gpu: invalid int value: 'one'; see --help",
    "train.py --dtype float16": f"argument --dtype: {CHOICE}'float16'",
    "train.py --method loha": f"argument --method: {CHOICE}'loha'",
    "train.py --schedule cosine": f"argument --schedule: {CHOICE}'cosine'",
    "train.py --router oracle": f"argument --router: {CHOICE}'oracle'",
    "train.py --router-norm sigmoid": f"argument --router-norm: {CHOICE}'sigmoid'",
    "train.py --router-init zeros": f"argument --router-init: {CHOICE}'zeros'",
    "train.py --device tpu": f"argument --device: {CHOICE}'tpu'",
    "eval.py --heuristic copy": f"argument --heuristic: {CHOICE}'copy'",
    f"{HEURISTIC} --split all": f"argument --split: {CHOICE}'all'",
    # Values out of range.
    "train.py --gpu -1": "--gpu -1: there are ",
    "train.py --tasks 0": "tasks: 0 must be from 1 to 2^20",
    "train.py --rank 0": "rank: 0 must be from 1 to 2^20",
    "train.py --skills 0": "skills: 0 must be from 1 to 2^20",
    "train.py --alpha 0": "alpha: 0.0 must be above 0",
    "train.py --alpha nan": "alpha: nan must be above 0",
    "train.py --allocation-std -1": "allocation_std: -1.0 must be at least 0",
    "train.py --extra-rank -1": "--extra-rank -1: give 0 or more",
    "train.py --targets ,": "targets: () must be a tuple of names",
    "train.py --targets z": "targets: no Linear has the name z; the model has head, k, o, q, v, wi",
    "train.py --train-instances 5": f"fit_router: 5 sources are {TOO_FEW}",
    f"{HEURISTIC} --batch-size 0": "--batch-size 0: give 1 or more",
    f"{HEURISTIC} --limit -1": "--limit -1: give 0 or more",
    f"{HEURISTIC} --max-new-tokens 0": "--max-new-tokens 0: give 1 or more",
    # Flags that do not fit together.
    "train.py --shard --compile": "--shard and --compile: give one of the two",
    "train.py --gpu 0 --device cpu": "--gpu 0 --device cpu: give one of the two",
    f"train.py {FACTORS}": f"{FACTORS}: factors",
    "eval.py": ONE_OF,
    "eval.py --run a --heuristic copy-demo": ONE_OF,
    "eval.py --ask Go --input word": ONE_OF,
    "eval.py --model tiny --ask Go": BOTH,
    "eval.py --model tiny --input word": BOTH,
    "eval.py --model tiny --ask ' ' --input ' '": BOTH,
    f"{HEURISTIC} --ask Go --input word": ALONE,
    "eval.py --model tiny --ask Go --input word --out x": ALONE,
    "experiments/plot.py": "give one of --run and --results",
    "experiments/plot.py --run a --results b": "give one of --run and --results",
}
for method, setting in (
    ("lora", "--gumbel"),
    ("lora", "--lr-router 1"),
    ("poly", "--tasks 64"),
    ("full", "--rank 3"),
):
    line = f"train.py --method {method} {setting}"
    MESSAGES[line] = f"{setting.split()[0]}: --method {method} {UNUSED}"
for router, setting in (
    ("sample", "--lr-full 3"),
    ("sample", "--lr-token-router 1"),
    ("token", "--lr-router 1"),
    ("none", "--router-norm none"),
):
    line = f"train.py --router {router} {setting}"
    MESSAGES[line] = f"{setting.split()[0]}: --method orchmoe --router {router} {UNUSED}"

SMALLEST = {
    "steps": 1,
    "batch-size": 1,
    "accumulate": 1,
    "eval-every": 1,
    "train-instances": 1,
    "max-source-length": 2,
    "max-target-length": 2,
    "num-pos": 0,
    "num-neg": 0,
    "max-tasks": 0,
    "eval-instances": 0,
    "warmup": 0,
    "seed": 0,
}
for name, smallest in SMALLEST.items():
    flag = f"--{name} {smallest - 1}"
    MESSAGES[f"train.py {flag}"] = f"{flag}: give {smallest} or more"
for rate in ("lr-skills", "lr-router", "lr-token-router", "lr-allocation", "lr-full"):
    for value in ("-0.5", "nan", "inf"):
        MESSAGES[f"train.py --{rate} {value}"] = f"--{rate} {value}: give 0 or more"


@pytest.fixture
def refusal(home, monkeypatch, capsys):
    """Run a command line in this process that must end with code 2, one line and no new file.

    Return the line without its beginning "PROGRAM: error: ".
    """
    monkeypatch.chdir(home)
    (home / "file").write_text("a file")

    def refused(line):
        program, *arguments = shlex.split(line)
        if program in ("train.py", "eval.py"):
            arguments = ["--max-tasks", "1", *arguments]
        module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        monkeypatch.setattr(train, "train_step", None)  # no mistake may come so far
        before = sorted(home.rglob("*"))
        with pytest.raises(SystemExit) as end:
            runtime.run_program(module.main)
        error = capsys.readouterr().err
        assert end.value.code == 2, error
        assert error.count("\n") == 1, error
        assert sorted(home.rglob("*")) == before
        return error.removeprefix(f"{Path(program).name}: error: ")

    return refused


@pytest.mark.parametrize("line, words", MESSAGES.items(), ids=MESSAGES)
def test_mistake_on_the_command_line_prints_one_line(refusal, line, words):
    assert refusal(line).startswith(words)


@pytest.mark.parametrize("program", ["train.py", "eval.py"])
def test_mistake_ends_the_process_with_code_2(home, program):
    error = process(program, "--stepz", cwd=home, code=2)
    assert error.startswith(f"{program}: error: unrecognized arguments: ")


# Runs several command lines in one process, and prints how each has ended.
SEVERAL = """
import contextlib, importlib, io, json, runtime, shlex, sys, train
train.make_optimizer = None  # no command line may come so far
ends = {}
for line in sys.argv[1:]:
    program, *words = shlex.split(line)
    sys.argv[1:] = ["--max-tasks", "1", *words]
    module = importlib.import_module(program.removesuffix(".py"))
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            runtime.run_program(module.main)
        except SystemExit as end:
            ends[line] = end.code, errors.getvalue()
        except Exception as error:
            ends[line] = 1, repr(error)
json.dump(ends, sys.stderr)
"""


@pytest.mark.slow
def test_bad_input_is_refused_without_assert_statements(home):
    """Python -OO removes them. Every third command line of the table is tried."""
    (home / "file").write_text("a file")
    lines = [line for line in MESSAGES if line.startswith(("train.py", "eval.py"))][::3]
    assert len(lines) > 20
    done = run_shell([sys.executable, "-OO", "-c", SEVERAL, *lines], home, PYTHONPATH=str(ROOT))
    for line, (code, error) in json.loads(done.stderr).items():
        assert code == 2 and error.count("\n") == 1, (line, error)
        assert f"error: {MESSAGES[line]}" in error


# ------------------------------------------------------------------------------ mistakes in files


def task(**changes):
    return json.dumps(task_json(**changes)).encode()


def t5_config(**changes):
    return json.dumps(read_json(ROOT / "tiny/config.json") | changes).encode()


TRAIN_TASK = "d/tasks/task1_a.json"
TEST_TASK = "d/tasks/task2_b.json"
TRAIN_LIST = "d/splits/default/train_tasks.txt"
TEST_LIST = "d/splits/default/test_tasks.txt"
ON_DATA = "train.py --data d"
ON_MODEL = "train.py --model m"
RESUMED = "train.py --resume --out r"
ROW = {"id": "x", "input": "a", "output": ["b"]}
HELD = "--out r: holds a run; add --resume, or give another folder"

# File; its content, or None if it is missing; command line; beginning of the message.
FILES = [
    (TRAIN_TASK, b"{", ON_DATA, f"{TRAIN_TASK}: JSONDecodeError: "),
    (TRAIN_TASK, b"[]", ON_DATA, f"{TRAIN_TASK}: not a JSON object"),
    (TRAIN_TASK, task(Definition=3), ON_DATA, f"{TRAIN_TASK}: Definition: expected a string"),
    (TRAIN_TASK, task(Categories=[3]), ON_DATA, f"{TRAIN_TASK}: Categories: expected a string"),
    (TRAIN_TASK, task(Instances=[]), ON_DATA, f"{TRAIN_TASK}: Instances is empty"),
    (
        TRAIN_TASK,
        task(Instances=[ROW | {"input": 3}]),
        ON_DATA,
        f"{TRAIN_TASK}: Instances[0]: expected a string",
    ),
    (
        TRAIN_TASK,
        task(Instances=[ROW | {"output": []}]),
        ON_DATA,
        f"{TRAIN_TASK}: Instances[0]: output is empty",
    ),
    (TRAIN_TASK, task(Instances=[ROW]), ON_DATA, "d: no training task has the 5 instances"),
    (
        TRAIN_TASK,
        task(**{"Positive Examples": [{"input": "a"}]}),
        ON_DATA,
        f"{TRAIN_TASK}: KeyError: 'output'",
    ),
    (
        TEST_TASK,
        task(**{"Positive Examples": []}),
        f"{HEURISTIC} --data d",
        f"{TEST_TASK}: no Positive Examples to copy; use --heuristic copy-input",
    ),
    (TRAIN_LIST, b"../task1_a", ON_DATA, f"{TRAIN_LIST}: '../task1_a' is not a plain name"),
    (TRAIN_LIST, b"", ON_DATA, "d/tasks: no task of train_tasks.txt is here"),
    (TEST_LIST, None, ON_DATA, f"{TEST_LIST}: no such file; --data takes a folder"),
    ("m/config.json", None, ON_MODEL, "m/config.json: No such file or directory"),
    ("m/config.json", b"{", ON_MODEL, "m/config.json: JSONDecodeError: "),
    ("m/config.json", b"[]", ON_MODEL, "m/config.json: not a JSON object"),
    (
        "m/config.json",
        b'{"model_type": "t5"}',
        ON_MODEL,
        "m/config.json: TypeError: T5Config.__init__() missing 6 required",
    ),
    (
        "m/config.json",
        t5_config(d_model=10**12),
        ON_MODEL,
        "m: shared.weight is torch.float16 [1024, 160]",
    ),
    (
        "m/config.json",
        t5_config(model_type="bart"),
        ON_MODEL,
        "m/config.json: model_type 'bart' is none of t5, llama, mistral, qwen2, qwen3",
    ),
    (
        "m/config.json",
        t5_config(d_ff=8),
        ON_MODEL,
        "m: encoder.block.0.layer.1.DenseReluDense.wi_0.weight is",
    ),
    ("m/config.json", t5_config(num_layers=9), ON_MODEL, "m: missing tensor 'encoder.block."),
    ("m/model.safetensors", None, ON_MODEL, "m: no weights here; add model.safetensors or pyt"),
    ("m/model.safetensors", b"abcd", ON_MODEL, "m/model.safetensors: SafetensorError: "),
    ("m/spiece.model", None, ON_MODEL, "m: no spiece.model or tokenizer.model or tokenizer.json"),
    ("m/spiece.model", b"abcd", ON_MODEL, "m/spiece.model: not a SentencePiece model; download"),
    ("r/config.json", b"{", RESUMED, "r/config.json: JSONDecodeError: "),
    ("r/config.json", b"{}", RESUMED, "r/config.json: TypeError: RunConfig.__init__() missing 7 "),
    ("r/config.json", b"{}", "eval.py --run r", "r/config.json: TypeError: RunConfig.__init__() "),
    ("r/config.json", b"{}", "train.py --out r", HELD),
    ("r/scores.json", b"{}", "train.py --out r", HELD),
    ("r/metrics.jsonl", b"{", "experiments/plot.py --run r", "r/metrics.jsonl: JSONDecodeError: "),
    ("r/metrics.jsonl", b"", "experiments/plot.py --run r", "r/metrics.jsonl: no loss yet; resume"),
    ("r/metrics.jsonl", b"5\n", "experiments/plot.py --run r", "r/metrics.jsonl: TypeError: "),
    (
        "r/results.json",
        b"{}",
        "experiments/plot.py --results r",
        "r/results.json: KeyError: 'cells'; run",
    ),
]


@pytest.mark.parametrize("name, content, line, words", FILES, ids=[row[3] for row in FILES])
def test_mistake_in_a_file_prints_one_line(home, refusal, name, content, line, words):
    for folder in ("d/tasks", "d/splits/default", "m", "r"):
        (home / folder).mkdir(parents=True)
    for task_path, list_path in ((TRAIN_TASK, TRAIN_LIST), (TEST_TASK, TEST_LIST)):
        (home / task_path).write_bytes(task())
        (home / list_path).write_text(Path(task_path).stem)
    for part in ("config.json", "model.safetensors", "spiece.model"):
        (home / "m" / part).symlink_to(ROOT / "tiny" / part)

    (home / name).unlink(missing_ok=True)
    if content is not None:
        (home / name).write_bytes(content)
    if not line.startswith("experiments"):
        line += " --device cpu"
    error = refusal(line).removeprefix(f"{home}/")
    assert error.startswith(words)
