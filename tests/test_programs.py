"""train.py and eval.py as a user runs them, on the bundled data and, where it is given, on the real one."""

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import ROOT, SHORT, command, environment, process, records, run, terminate_after, trace
from test_data import task_json

import checkpoint
import data
import eval as evaluation
import runtime
import tokenizer as tokenizers
import train
from baselines import NoAdapter, attach_method
from orchmoe import OrchMoEConfig


def test_a_run_from_start_to_scores(home):
    out = run("train.py", "--data", "sni/", "--gpu", "0", *SHORT[2:], "--out", "run", cwd=home)
    assert "| frozen base |" in out and "| orchmoe |" in out
    folder = home / "run"
    assert [row["step"] for row in records(folder) if "loss" in row] == list(range(8))
    assert {"entropy", "between", "within", "largest"} == records(folder)[-1]["router"].keys()
    scores = json.loads((folder / "scores.json").read_text())
    assert scores.keys() == {"frozen base", "orchmoe"} and scores["orchmoe"].keys() == {"seen", "unseen"}
    state, info = checkpoint.load_adapter(folder / "adapter.safetensors")
    assert info["method"] == "orchmoe" and "allocation" in state
    assert "python train.py --resume --gpu 0 --out run\n" in out
    assert "next: python eval.py --run run --split test\n" in out

    run("eval.py", "--run", "run", "--split", "seen", "--limit", "8", "--device", "cpu", cwd=home)
    again = json.loads((folder / "eval-seen-8/scores.json").read_text())
    assert again["overall"] == scores["orchmoe"]["seen"]["overall"]
    predictions = (folder / "eval-seen-8/predictions.jsonl").read_text().splitlines()
    assert len(predictions) == 8
    assert all(json.loads(row).keys() == {"id", "prediction"} for row in predictions)


def test_a_killed_run_resumes_bit_for_bit(home):
    run("train.py", *SHORT, "--gumbel", "--out", "whole", cwd=home)
    killed = home / "killed"
    started = subprocess.Popen(command("train.py", *SHORT, "--gumbel", "--out", "killed"), cwd=home,
                               stdout=subprocess.DEVNULL, env=environment())  # fmt: skip
    while not (killed / "metrics.jsonl").exists() or len(trace(killed)) < 6:  # past a checkpoint
        time.sleep(0.01)
        assert started.poll() is None
    started.kill()
    started.wait()
    assert (killed / "checkpoint.pt").exists() and "orchmoe" not in (killed / "scores.json").read_text()
    run("train.py", "--resume", "--out", "killed", "--device", "cpu", cwd=home)
    assert trace(killed) == trace(home / "whole")
    for name in ("adapter.safetensors", "scores.json"):
        assert (killed / name).read_bytes() == (home / "whole" / name).read_bytes()


def test_a_run_keeps_the_dtype_that_auto_gave_it(home, monkeypatch):
    folder = home / "run"
    run("train.py", *SHORT, "--out", "run", cwd=home)
    assert json.loads((folder / "config.json").read_text())["train"]["dtype"] == "float32"
    monkeypatch.setattr(runtime, "_cpu_gains", lambda base: True)  # as on another machine
    short = [*SHORT, "--steps", "1", "--eval-instances", "2"]  # without its units bfloat16 takes its time
    assert "bfloat16" in run("train.py", *short, "--out", "other", cwd=home).splitlines()[0]
    resumed = run("train.py", "--resume", "--out", "run", "--device", "cpu", cwd=home)
    assert "float32" in resumed.splitlines()[0]


def test_sigterm_finishes_the_step_saves_and_says_how_to_resume(home):
    """And then weights that are not finite stop the run, and no file changes."""
    out = terminate_after(6, *SHORT, "--steps", "4000", cwd=home)
    assert f"{ROOT / 'train.py'} --resume --device cpu --out run\n" in out
    folder = home / "run"
    state = checkpoint.unpickle(folder / "checkpoint.pt")
    assert state["step"] == records(folder)[-1]["step"] + 1
    name = "decoder.blocks.1.attention.v.skill_B"
    state["weights"][name] = state["weights"][name].clone()
    state["weights"][name][1, 0, 3] = float("inf")
    with runtime.atomic_write(folder / "checkpoint.pt") as file:  # what `state` maps stays
        torch.save(state, file)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    error = run("train.py", "--resume", "--out", "run", "--device", "cpu", cwd=home, code=2)
    assert error.count("\n") == 1 and f"step {state['step']} on " in error and "loss nan" in error
    assert len(re.findall(r"task\d+-[0-9a-f]{32}", error)) == 8  # the ids of the batch
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("factor", [float("nan"), 1e30])  # whose square overflows
def test_a_gradient_that_is_not_finite_is_said_and_changes_nothing(small_t5, inputs, factor):
    adapters = attach_method("lora", small_t5, OrchMoEConfig())
    optimizer = train.make_optimizer(adapters, train.TrainConfig())
    adapters.linears["decoder.blocks.1.attention.v"].skill_B.register_hook(lambda gradient: gradient * factor)
    before = {name: tensor.clone() for name, tensor in adapters.state_dict().items()}
    batch = data.Batch(*inputs, torch.zeros(4, dtype=torch.int64), ["a", "b", "c", "d"])
    with pytest.raises(ValueError, match="^step 7 on a, b, c, d: loss [0-9.]+, gradient norm (nan|inf); "
                       "the last checkpoint is untouched"):
        train.train_step(small_t5, adapters, optimizer, batch, 7, train.TrainConfig())
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapters.state_dict().items())


OUT = "train.py: error: out of memory ("
COMPILER = "train.py: error: torch.compile finds no C compiler; install one"


@pytest.mark.parametrize("error, code, begins", [
    (MemoryError("a list"), 2, OUT + "a list); lower"), (torch.OutOfMemoryError("CUDA"), 2, OUT + "CUDA);"),
    (RuntimeError("DefaultCPUAllocator: no 9 bytes"), 2, OUT + "DefaultCPUAllocator"),
    (RuntimeError("Failed to find C compiler. Please specify"), 2, COMPILER),  # as Triton has it
    (RuntimeError("InvalidCxxCompiler: No working C++ compiler found"), 2, COMPILER),  # as torch has it
    (KeyboardInterrupt(), 130, ""), (RuntimeError("a fault"), None, "")])  # fmt: skip
def test_how_a_program_ends(error, code, begins, monkeypatch, capsys):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(RuntimeError if code is None else SystemExit) as end:
        runtime.run_program(main)
    said = capsys.readouterr().err
    assert code is None or end.value.code == code
    assert said.startswith(begins) and said.count("\n") == bool(begins)


@pytest.mark.parametrize("joined, said", [(False, ""), (True, "train.py: error on rank 1: bad\n")])
def test_a_process_says_which_it_is(joined, said, monkeypatch, capsys):
    def main():
        raise ValueError("bad")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    for name, value in (("rank", 1), ("local_rank", 1)):
        monkeypatch.setattr(runtime, name, lambda value=value: value)
    monkeypatch.setattr(runtime.dist, "is_initialized", lambda: joined)
    with pytest.raises(SystemExit):
        runtime.run_program(main)
    assert capsys.readouterr().err == said


def test_both_signals_wait_for_the_step_and_are_given_back():
    kinds = signal.SIGINT, signal.SIGTERM
    before = [signal.getsignal(kind) for kind in kinds]
    for kind in kinds:
        with runtime.stop_signals() as asked:
            assert not asked()
            for _ in range(2):  # a second one is not treated
                signal.raise_signal(kind)
                assert asked()
        assert [signal.getsignal(each) for each in kinds] == before


def test_a_signal_during_the_last_dev_loss_stops_before_the_scores(home):
    calls, measure = [], evaluation.measure

    def signalled(*arguments, **options):
        calls.append(None)
        if len(calls) == 2:  # of 8 steps, with one behind each 4
            signal.raise_signal(signal.SIGTERM)
        return measure(*arguments, **options)

    with mock.patch.object(evaluation, "measure", signalled):
        run("train.py", *SHORT, "--out", "run", cwd=home, code=130)
    assert len(calls) == 2 and json.loads((home / "run/scores.json").read_text()).keys() == {"frozen base"}
    assert "| orchmoe |" in run("train.py", "--resume", "--out", "run", "--device", "cpu", cwd=home)


def test_a_step_that_breaks_the_weights_is_not_saved(home):
    options = [*SHORT, "--eval-every", "1", "--lr-skills", "3e38", "--warmup", "0", "--schedule", "constant"]
    error = run("train.py", *options, "--out", "run", cwd=home, code=2)
    assert error.count("\n") == 1 and "after step 0 on " in error and "norm of weights nan" in error
    assert not {"checkpoint.pt", "adapter.safetensors"} & {path.name for path in (home / "run").iterdir()}


def test_one_seed_gives_the_same_bytes_and_another_other(home):
    for out, seed in (("one", 3), ("other", 4)):
        run("train.py", *SHORT, "--gumbel", "--seed", seed, "--out", out, cwd=home)
    process("train.py", *SHORT, "--gumbel", "--seed", 3, "--out", "same", cwd=home, PYTHONHASHSEED="2")
    one, same, other = (home / name for name in ("one", "same", "other"))
    for name in ("adapter.safetensors", "checkpoint.pt", "scores.json", "config.json"):
        assert (one / name).read_bytes() == (same / name).read_bytes(), name
        assert (one / name).read_bytes() != (other / name).read_bytes(), name
    logs = [[{k: v for k, v in row.items() if k != "tokens_per_s"} for row in records(folder)]
            for folder in (one, same)]  # fmt: skip
    assert logs[0] == logs[1] and trace(one) != trace(other)


def test_a_second_run_on_a_folder_is_refused_while_the_first_lives(copied):
    holder = ("import runtime, pathlib, time\n"
              "with runtime.locked(pathlib.Path('run')): print(flush=True); time.sleep(99)")  # fmt: skip
    first = subprocess.Popen([sys.executable, "-c", holder], cwd=copied.parent, stdout=subprocess.PIPE,
                             env=environment(PYTHONPATH=str(ROOT)))  # fmt: skip
    first.stdout.readline()
    error = run("train.py", "--resume", "--out", "run", "--device", "cpu", cwd=copied.parent, code=2)
    assert error.count("\n") == 1 and "run: another process is writing this run" in error
    first.kill()
    first.wait()
    (copied / ".checkpoint.pt.7.tmp").write_text("half a save")
    (copied / "other").mkdir()
    others = [copied / ".somebody.tmp", copied / "other/.scores.json.7.tmp"]
    for path in others:
        path.touch()
    with runtime.locked(copied):  # nobody is left to free the lock, and it is free
        assert not (copied / ".checkpoint.pt.7.tmp").exists() and all(path.exists() for path in others)
        with pytest.raises(ValueError, match="another process"), runtime.locked(copied):
            pass


def test_two_starts_without_out_get_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(runtime.new_folder, ["runs/lora"] * 40))
    assert sorted(folders) == sorted(Path(f"runs/lora-{n}") for n in range(1, 41))
    Path("lost").symlink_to(tmp_path / "not there")  # as to a disk that is gone: not tried forever
    with pytest.raises(FileExistsError):
        runtime.new_folder("lost/lora")


def test_a_file_system_without_locks_costs_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(runtime.fcntl, "flock", refuse)
    with runtime.locked(tmp_path):
        assert "no lock (Function not implemented)" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["lora", "moe-lora", "poly", "mhr", "c-poly", "full"])
def test_every_method_trains_and_is_scored(home, method):
    rate = "--lr-full" if method == "full" else "--lr-skills"
    run("train.py", *SHORT, "--method", method, rate, "0.01", "--out", "run", cwd=home)
    assert all(row.get("entropy") is None for row in records(home / "run"))  # no w; JSON has no NaN
    losses = [row["dev_loss"] for row in records(home / "run") if "dev_loss" in row]
    assert losses[1] < losses[0]
    run("eval.py", "--run", "run", "--limit", "8", "--device", "cpu", cwd=home)
    scores = json.loads((home / "run/scores.json").read_text())
    again = json.loads((home / "run/eval-test-8/scores.json").read_text())
    assert scores[method]["unseen"]["overall"] == again["overall"]
    if method == "full":
        error = run("eval.py", "--run", "run", "--model", ROOT / "tiny", "--device", "cpu", cwd=home, code=2)
        assert "--model: the weights of run are its own, of --method full" in error


def test_task_ids_are_those_of_the_run_whatever_is_evaluated(home):
    run("train.py", *SHORT, "--method", "poly", "--out", "run", cwd=home)
    evaluate = ("eval.py", "--run", "run", "--split", "seen", "--max-tasks", "6", "--limit", "12")
    run(*evaluate, "--device", "cpu", cwd=home)
    scores = json.loads((home / "run/eval-seen-12/scores.json").read_text())
    assert len(scores["tasks"]) == 6  # two of them without an id


def test_an_evaluation_generates_as_it_is_told_and_names_its_instances(home, monkeypatch):
    told = {}
    monkeypatch.setattr(evaluation, "predict", lambda base, adapters, examples, tokenizer, **options:
                        told.update(options) or [e.task for e in examples])
    run("eval.py", "--model", "tiny", "--limit", "4", "--max-tasks", "2", "--batch-size", "3",
        "--max-new-tokens", "5", "--device", "cpu", "--out", "out", cwd=home)
    assert told == {"batch_size": 3, "max_new_tokens": 5}
    test = data.load_sets(data.DataConfig(max_tasks=2), tokenizers.load(ROOT / "tiny"), ["test"])["test"]
    rows = map(json.loads, (home / "out/predictions.jsonl").read_text().splitlines())
    assert [(row["id"], row["prediction"]) for row in rows] == [
        (e.id, e.task) for e in data.subsample(test, 4)]  # fmt: skip


def test_the_table_at_the_end_has_each_score_under_its_head(capsys):
    seen, unseen = ({"overall": {"exact_match": a, "rougeL": b}} for a, b in ((1.0, 2.0), (3.0, 4.0)))
    train.say_scores(Path("run"), {"orchmoe": {"seen": seen, "unseen": unseen}}, train.TrainConfig())
    assert "| orchmoe | 2.00 | 1.00 | 4.00 | 3.00 |" in capsys.readouterr().out


def test_a_run_is_not_resumed_on_another_base_or_other_tasks(copied):
    config = json.loads((copied / "config.json").read_text())
    for field, value in (("base", "0" * 16), ("tokenizer", "0"), ("tasks", config["tasks"][1:]),
                         ("digests", {"train": "0"})):
        (copied / "config.json").write_text(json.dumps({**config, field: value}))
        error = run("train.py", "--resume", "--out", "run", "--device", "cpu", cwd=copied.parent, code=2)
        assert f"not the {field} that the run in run began with" in error
    for damaged in ("[]", "{}", "nonsense"):
        (copied / "config.json").write_text(damaged)
        for program in (["train.py", "--resume", "--out"], ["eval.py", "--device", "cpu", "--run"]):
            assert "run/config.json" in run(*program, "run", cwd=copied.parent, code=2)


def test_a_run_is_bound_to_its_tasks_and_its_tokenizer(copied, tmp_path):
    """Outputs of a task file that were changed after the start; other data that is named is only said."""
    shutil.copytree(ROOT / "sni", tmp_path / "sni")
    shutil.copytree(ROOT / "tiny", tmp_path / "tiny")
    config = json.loads((copied / "config.json").read_text())
    assert config["train"]["model"].startswith("/") and config["data"]["data"].startswith("/")
    config["data"]["data"], config["train"]["model"] = str(tmp_path / "sni"), str(tmp_path / "tiny")
    (copied / "config.json").write_text(json.dumps(config))
    evaluate = ("eval.py", "--run", "run", "--split", "seen", "--limit", "2", "--device", "cpu")
    run(*evaluate, cwd=tmp_path)
    path = tmp_path / "sni/tasks" / f"{config['tasks'][0]}.json"
    task = json.loads(path.read_text())
    task["Instances"][0]["output"] = ["changed"]
    path.write_text(json.dumps(task))
    error = run(*evaluate, cwd=tmp_path, code=2)
    assert error.count("\n") == 1 and "not the digests that the run in run began with" in error
    error = run("train.py", "--resume", "--out", "run", "--device", "cpu", cwd=tmp_path, code=2)
    assert "not the digests that the run in run began with" in error
    served = "export.py", "--run", "run", "--out", "served", "--routing", "mean"
    assert "not the digests that the run in run" in run(*served, cwd=tmp_path, code=2)
    run("train.py", "--resume", "--out", "run", "--device", "cpu", "--data", ROOT / "sni", cwd=tmp_path)
    process(*evaluate, "--data", ROOT / "sni", cwd=tmp_path)
    with open(tmp_path / "tiny/spiece.model", "ab") as file:
        file.write(b"\xfa\x7f\x00")  # a field that SentencePiece does not know: the same pieces, another file
    assert "not the tokenizer that" in run(*evaluate, "--data", ROOT / "sni", cwd=tmp_path, code=2)


def test_other_data_that_is_named_costs_a_warning(copied, capsys):
    began, words = evaluation.Run.read(copied), tokenizers.load(ROOT / "tiny")
    asked = evaluation.EvalConfig(run=str(copied), split="seen", limit=2)
    kept = began.configs(copied, data=data.DataConfig)["data"]
    runtime.warn.cache_clear()
    evaluation.load_examples(asked, kept, began, words)
    assert not capsys.readouterr().err
    evaluation.load_examples(asked, dataclasses.replace(kept, max_tasks=5), began, words)
    assert capsys.readouterr().err.endswith("sni: other tasks than those of the run\n")


def test_an_evaluation_replaces_no_other(copied):
    evaluate = ("eval.py", "--run", "run", "--split", "seen", "--limit", "2", "--device", "cpu")
    run(*evaluate, cwd=copied.parent)
    run(*evaluate, "--batch-size", "1", cwd=copied.parent)  # the same by other means
    before = (copied / "eval-seen-2/predictions.jsonl").stat().st_mtime_ns
    for more, folder in ((["--num-pos", "0"], "run/eval-seen-2"), (["--out", "run"], "run")):
        error = run(*evaluate, *more, cwd=copied.parent, code=2)
        assert f"{folder}: holds a run, or another evaluation; name another by --out" in error
    assert before == (copied / "eval-seen-2/predictions.jsonl").stat().st_mtime_ns
    copies = ("eval.py", "--heuristic", "copy-input", "--split", "dev", "--limit", "2", "--out", "kept")
    run(*copies, "--gpu", "0", cwd=copied.parent)  # what computes nothing takes no GPU, there or not
    for more in (["--heuristic", "copy-demo"], ["--split", "seen"], ["--limit", "3"]):
        assert "kept: holds a run, or another" in run(*copies, *more, cwd=copied.parent, code=2)
    for damaged in ("{}", '{"config": ["split"]}'):
        (copied.parent / "kept/scores.json").write_text(damaged)
        assert "kept: holds a run, or another" in run(*copies, cwd=copied.parent, code=2)


def test_no_scores_stand_beside_the_predictions_of_another_time(copied, monkeypatch):
    evaluate = ("eval.py", "--run", "run", "--split", "seen", "--limit", "2", "--device", "cpu")
    run(*evaluate, cwd=copied.parent)
    folder = copied / "eval-seen-2"
    written = {path.name for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "score", mock.Mock(side_effect=KeyboardInterrupt))
        run(*evaluate, cwd=copied.parent, code=130)
    assert {path.name for path in folder.iterdir()} == written - {"scores.json"}
    run(*evaluate, cwd=copied.parent)
    assert {path.name for path in folder.iterdir()} == written


def test_where_nothing_can_be_written_nothing_is_computed(copied, monkeypatch):
    monkeypatch.setattr(evaluation, "predict", None)
    (copied.parent / "file").touch()
    monkeypatch.setattr(sys, "argv", ["eval.py", "--run", "run", "--limit", "2", "--out", "file"])
    with pytest.raises(FileExistsError):
        evaluation.main()


def test_full_weights_are_evaluated_as_they_were_trained(home):
    run("train.py", *SHORT, "--method", "full", "--out", "run", cwd=home)
    place = runtime.pick_device(device="cpu", dtype="bfloat16")
    assert evaluation.load(place, run=home / "run")[0].embedding.weight.dtype == torch.float32
    said = run("eval.py", "--run", "run", "--limit", "2", "--device", "cpu", "--dtype", "bfloat16", cwd=home)
    kept = json.loads((home / "run/eval-test-2/scores.json").read_text())["config"]["dtype"]
    assert ", float32, torch" in said and kept == "float32"
    shutil.rmtree(home / "run/model")
    error = run("eval.py", "--run", "run", "--device", "cpu", cwd=home, code=2)
    assert error.endswith("run/model: not there; the run has kept no weights yet\n")


def test_a_base_that_has_moved_is_named_by_model(copied, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    config["train"]["model"] = str(tmp_path / "gone")
    (copied / "config.json").write_text(json.dumps(config))
    evaluate = ("eval.py", "--run", "run", "--limit", "2", "--device", "cpu")
    assert "gone: not there" in run(*evaluate, cwd=tmp_path, code=2)
    run(*evaluate, "--model", ROOT / "tiny", cwd=tmp_path)
    run("train.py", "--resume", "--out", "run", "--device", "cpu", "--model", ROOT / "tiny", cwd=tmp_path)
    run("eval.py", "--run", "run", "--split", "seen", "--limit", "2", "--device", "cpu", cwd=tmp_path)


def test_what_was_evaluated_is_in_the_name_of_its_folder():
    def folder(**options):
        return evaluation.EvalConfig(**options).folder

    assert folder(run="r") == Path("r/eval-test") and folder(run="r", limit=3) == Path("r/eval-test-3")
    assert folder(heuristic="copy-demo") == Path("eval-copy-demo-test")
    assert folder(model="a/base/", split="seen") == Path("eval-base-seen")
    assert folder(run="r", out="o") == Path("o")


@pytest.mark.slow
def test_accumulation_does_not_change_the_step(home):
    for parts in (1, 3):
        run("train.py", *SHORT, "--gumbel", "--accumulate", parts, "--out", f"run{parts}", cwd=home)
    whole, parts = trace(home / "run1"), trace(home / "run3")
    assert whole[0] == pytest.approx(parts[0], rel=1e-5)  # loss and gradient norm before any update
    # Adam makes whole steps of the rounding of tiny gradients
    for one, three in zip(whole, parts, strict=True):
        assert (one[0], one[1], one[3]) == pytest.approx((three[0], three[1], three[3]), rel=1e-4)


def ask(model, *arguments, cwd):
    """What eval.py says behind the line about the device."""
    question = ["--ask", "Write the first word of the list.", "--input", "lion, June, wolf"]
    return run("eval.py", *model, *question, "--device", "cpu", *arguments, cwd=cwd).splitlines()[1:]


def test_a_run_answers_by_hand_and_says_where_the_router_put_it(home, finished):
    said, answer, verdict = ask(["--run", "run"], cwd=finished)
    alone = "instruction and input alone, without examples"
    assert said == f"asked run: {alone}"
    base, adapters, tokenizer = evaluation.load(runtime.pick_device(device="cpu"), run=finished / "run")
    source = ("Definition: Write the first word of the list.\n\n"
              "Now complete the following example -\nInput: lion, June, wolf.\nOutput: ")  # fmt: skip
    ids = torch.tensor([tokenizer.encode(source)])
    with torch.no_grad(), adapters.routed(base.embed(ids)) as routing:
        tokens = base.generate(ids, torch.ones_like(ids))[0]
    assert answer == f"answer: {tokenizer.decode(tokens)}"
    order = routing.w[0].argsort(descending=True).tolist()
    shares = ", ".join(f"{k + 1} at {100 * routing.w[0, k]:.1f} %" for k in order)
    assert verdict == f"router: abstract task {shares} (numbered as in the figures)"
    said, answer = ask(["--model", "tiny"], "--max-new-tokens", "1", cwd=home)
    assert said == f"asked tiny: {alone}"
    bare = checkpoint.load(home / "tiny")
    first = bare.generate(ids, torch.ones_like(ids), max_new_tokens=1)[0]
    assert answer == f"answer: {tokenizer.decode(first)}"


@pytest.mark.slow
def test_the_first_row_of_the_readme(home):
    page, found = (ROOT / "README.md").read_text(encoding="utf-8"), []
    row = re.search(r"^\| frozen base \|(.*)\|$", page, re.MULTILINE)[1]
    for split in ("seen", "test"):
        run("eval.py", "--model", "tiny", "--split", split, "--device", "cpu", "--out", split, cwd=home)
        overall = json.loads((home / split / "scores.json").read_text())["overall"]
        found += [overall["rougeL"], overall["exact_match"]]
    assert found == pytest.approx(list(map(float, row.split("|"))), abs=0.1)


@pytest.mark.slow
def test_a_run_is_merged_as_the_page_prints_it(home):
    """Merged under the mean w of a task: the same predictions as from the run routed by that w."""
    page = (ROOT / "docs/use.md").read_text(encoding="utf-8")
    [snippet] = [text for text in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if ".merge(" in text]
    rates = ["--lr-skills", "0.03", "--steps", "20"]
    run("train.py", *SHORT, *rates, "--out", "runs/orchmoe-1", cwd=home)
    paths = environment(PYTHONPATH=str(ROOT))
    subprocess.run([sys.executable, "-c", snippet], cwd=home, env=paths, check=True, timeout=300)
    base, adapters, _ = evaluation.load(runtime.pick_device(device="cpu"), run=home / "runs/orchmoe-1")
    tokenizer = tokenizers.load(home / "merged")
    config = data.DataConfig(data=str(home / "sni"), max_tasks=1)
    examples = data.subsample(data.load_sets(config, tokenizer)["test"], 16)
    w = evaluation.measure(base, adapters, data.load_sets(config, tokenizer)["test"])[1].mean(0)
    routed = evaluation.predict(base, adapters, examples, tokenizer, w=w.expand(len(examples), -1))
    merged = checkpoint.load(home / "merged")
    plain = evaluation.predict(merged, NoAdapter(merged, full=False), examples, tokenizer)
    assert plain == routed
    bare = checkpoint.load(home / "tiny")
    assert plain != evaluation.predict(bare, NoAdapter(bare, full=False), examples, tokenizer)


CHOICE = "invalid choice: "  # argparse's own; what follows differs between versions of Python
DOWNLOAD = "not there; name a local folder, nothing is downloaded here; `hf download NAME --local-dir DIR`"
MESSAGES = {  # command line: how the one line goes on behind "PROGRAM: error: "
    "train.py --data nowhere": "nowhere/splits/default/train_tasks.txt: no such file; --data takes a folder",
    "train.py --splits nowhere": f"{ROOT}/sni/splits/nowhere/train_tasks.txt: no such file; --data takes",
    "train.py --splits ../x": "--splits: '../x' is no plain name; give a short one",
    "train.py --model google/flan-t5-base": f"google/flan-t5-base: {DOWNLOAD}",
    "train.py --model file": "file: not a SentencePiece model; download it again",
    "train.py --out file": "file: File exists",
    "train.py --out file/run": "file/run: Not a directory",
    "train.py --out x\udcff": "an argument is not UTF-8; rename what it names; see --help",
    "train.py --resume": "--resume: name the folder of the run by --out",
    "train.py --resume --out nowhere": "nowhere/config.json: not there; name the folder of a run of train.py",
    "train.py --steps": "argument --steps: expected one argument; see --help",
    "train.py --steps many": "argument --steps: invalid int value: 'many'; see --help",
    "train.py --steps 1.5": "argument --steps: invalid int value: '1.5'; see --help",
    "train.py --stepz 3": "unrecognized arguments: --stepz 3; see --help",
    "train.py sni": "unrecognized arguments: sni; see --help",
    "train.py --lr-skills fast": "argument --lr-skills: invalid float value: 'fast'; see --help",
    "train.py --dtype float16": f"argument --dtype: {CHOICE}'float16'",
    "train.py --method loha": f"argument --method: {CHOICE}'loha'",
    "train.py --shard --compile": "--shard and --compile: give one of the two",
    "train.py --schedule cosine": f"argument --schedule: {CHOICE}'cosine'",
    "train.py --router oracle": f"argument --router: {CHOICE}'oracle'",
    "train.py --router-norm sigmoid": f"argument --router-norm: {CHOICE}'sigmoid'",
    "train.py --router-init zeros": f"argument --router-init: {CHOICE}'zeros'",
    "train.py --device tpu": f"argument --device: {CHOICE}'tpu'",
    "train.py --gpu one": "argument --gpu: invalid int value: 'one'; see --help",
    "train.py --gpu -1": "--gpu -1: there are ",
    "train.py --gpu 0 --device cpu": "--gpu 0 --device cpu: give one of the two",
    "train.py --targets z": "targets: no Linear is named z; there are head, k, o, q, v, wi_0, wi_1, wo",
    "train.py --targets ,": "targets: () must be a tuple of names",
    "train.py --tasks 0": "tasks: 0 must be 1 to 2^20",
    "train.py --rank 0": "rank: 0 must be 1 to 2^20",
    "train.py --skills 0": "skills: 0 must be 1 to 2^20",
    "train.py --train-instances 5": "fit_router: 5 sources for K = 8 abstract tasks; give at least 8, better",
    "train.py --extra-rank -1": "--extra-rank -1: give 0 or more",
    "train.py --alpha 0": "alpha: 0.0 must be a number above 0",
    "train.py --alpha nan": "alpha: nan must be a number above 0",
    "train.py --allocation-std -1": "allocation_std: -1.0 must be a number from 0",
    "train.py --method orchmoe-factors --router token": "--method orchmoe-factors --router token: factors",
    "eval.py": "give one of --run, --model and --heuristic",
    "eval.py --run a --heuristic copy-demo": "give one of --run, --model and --heuristic",
    "train.py --method lora --gumbel": "--gumbel: not used by --method lora; leave it out",
    "train.py --method lora --lr-router 1": "--lr-router: not used by --method lora; leave it out",
    "train.py --method poly --tasks 64": "--tasks: not used by --method poly; leave it out",
    "train.py --method full --rank 3": "--rank: not used by --method full; leave it out",
    "train.py --lr-full 3": "--lr-full: not used by --method orchmoe --router sample; leave it out",
    "train.py --lr-token-router 1": "--lr-token-router: not used by --method orchmoe --router sample",
    "train.py --router token --lr-router 1": "--lr-router: not used by --method orchmoe --router token",
    "train.py --router none --router-norm none": "--router-norm: not used by --method orchmoe --router none",
    "eval.py --run nowhere": "nowhere/config.json: not there; name the folder of a run of train.py",
    "eval.py --model google/flan-t5-base": f"google/flan-t5-base: {DOWNLOAD}",
    "eval.py --heuristic copy": f"argument --heuristic: {CHOICE}'copy'",
    "eval.py --heuristic copy-demo --split all": f"argument --split: {CHOICE}'all'",
    "eval.py --heuristic copy-demo --data nowhere": "nowhere/splits/default/train_tasks.txt: no such file",
    "eval.py --heuristic copy-demo --limit 1 --out file": "file: File exists",
    "eval.py --heuristic copy-demo --batch-size 0": "--batch-size 0: give 1 or more",
    "eval.py --heuristic copy-demo --limit -1": "--limit -1: give 0 or more",
    "eval.py --heuristic copy-demo --max-new-tokens 0": "--max-new-tokens 0: give 1 or more",
    "eval.py --model tiny --ask Go": 'give --ask "instruction" and --input "text", with --run or',
    "eval.py --heuristic copy-demo --ask Go --input word": 'give --ask "instruction" and --input',
    "eval.py --model tiny --ask ' ' --input ' '": 'give --ask "instruction" and --input "text", with',
    "eval.py --model tiny --ask Go --input word --out x": 'give --ask "instruction" and --input "text", with',
    "eval.py --model tiny --input word": 'give --ask "instruction" and --input "text", with --run or',
    "eval.py --ask Go --input word": "give one of --run, --model and --heuristic",
    "eval.py --run nowhere --ask Go --input word": "nowhere/config.json: not there; name the folder",
    "experiments/plot.py": "give one of --run and --results",
    "experiments/plot.py --run a --results b": "give one of --run and --results",
    "experiments/plot.py --run nowhere": "nowhere/metrics.jsonl: not there; name the folder of a run",
    "experiments/plot.py --results nowhere": "nowhere: no results.json or ablations.json; name a comparison",
}
LEAST = {"steps": 1, "batch-size": 1, "accumulate": 1, "eval-every": 1, "train-instances": 1,
         "max-source-length": 2, "max-target-length": 2, "num-pos": 0,
         "num-neg": 0, "max-tasks": 0, "eval-instances": 0, "warmup": 0, "seed": 0}
MESSAGES |= {f"train.py --{flag} {least - 1}": f"--{flag} {least - 1}: give {least} or more"
             for flag, least in LEAST.items()}
MESSAGES |= {f"train.py --{flag} {value}": f"--{flag} {value}: give 0 or more"
             for flag in ("lr-skills", "lr-router", "lr-token-router", "lr-allocation", "lr-full")
             for value in ("-0.5", "nan", "inf")}  # fmt: skip


@pytest.fixture
def refusal(home, monkeypatch, capsys):
    """The line on stderr of a command line that must end with exit code 2, nothing but that line, and no file
    left behind; in this process, which spares the imports."""
    monkeypatch.chdir(home)
    (home / "file").write_text("a file")

    def files():
        return sorted(home.rglob("*"))

    def refused(line):
        program, *arguments = shlex.split(line)
        few = ["--max-tasks", "1"] if program in ("train.py", "eval.py") else []
        monkeypatch.setattr(sys, "argv", [program, *few, *arguments])
        monkeypatch.setattr(train, "train", None)  # nothing here may come so far
        before = files()
        with pytest.raises(SystemExit) as end:
            runtime.run_program(importlib.import_module(program.removesuffix(".py").replace("/", ".")).main)
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.count("\n") == 1, error
        assert files() == before
        return error.removeprefix(f"{Path(program).name}: error: ")

    return refused


@pytest.mark.parametrize("line, words", MESSAGES.items(), ids=MESSAGES)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(refusal, line, words):
    assert refusal(line).startswith(words)


@pytest.mark.parametrize("program", ["train.py", "eval.py"])
def test_the_process_says_so_and_ends_with_2(home, program):
    said = process(program, "--stepz", cwd=home, code=2)
    assert said.startswith(f"{program}: error: unrecognized arguments: ")


def task(**changes):
    return json.dumps(task_json(**changes)).encode()


def t5_config(**changes):
    return json.dumps(json.loads((ROOT / "tiny/config.json").read_text()) | changes).encode()


TASK, TEST, LISTS = "d/tasks/task1_a.json", "d/tasks/task2_b.json", "d/splits/default/"
TRAIN, BASE = "train.py --data d", "train.py --model m"
ROW = {"id": "x", "input": "a", "output": ["b"]}
FILES = [  # a file and its content (None: it is gone), the command line, how the message goes on
    (TASK, b"{", TRAIN, f"{TASK}: not readable as JSON ("),
    (TASK, b"[]", TRAIN, f"{TASK}: not readable as JSON (no object at its top); restore the file"),
    (TASK, task(Definition=3), TRAIN, f"{TASK}: Definition: expected a string; mend it"),
    (TASK, task(Categories=[3]), TRAIN, f"{TASK}: Categories: expected a string; mend it"),
    (TASK, task(Instances=[]), TRAIN, f"{TASK}: Instances: expected a list of objects, not empty; mend it"),
    (TASK, task(Instances=[ROW | {"input": 3}]), TRAIN, f"{TASK}: Instances[0].input: expected a string"),
    (TASK, task(Instances=[ROW | {"output": []}]), TRAIN, f"{TASK}: Instances[0].output: expected a string"),
    (TASK, task(Instances=[ROW]), TRAIN, "d: no training task has the 5 instances that a dev set needs"),
    (TASK, task(**{"Positive Examples": [{"input": "a"}]}), TRAIN, f"{TASK}: Positive Examples[0].output:"),
    (TEST, task(**{"Positive Examples": []}), "eval.py --heuristic copy-demo --data d",
     f"{TEST}: Positive Examples: none to copy from; add one or use copy-input"),
    (LISTS + "train_tasks.txt", b"../task1_a", TRAIN, f"{LISTS}train_tasks.txt: '../task1_a' is no plain"),
    (LISTS + "train_tasks.txt", b"", TRAIN, "d/tasks: no task of splits/default/train_tasks.txt; complete"),
    (LISTS + "test_tasks.txt", None, TRAIN, f"{LISTS}test_tasks.txt: no such file; --data takes a folder"),
    ("m/config.json", None, BASE, "m/config.json: No such file or directory"),
    ("m/config.json", b"{", BASE, "m/config.json: not readable as JSON ("),
    ("m/config.json", b"[]", BASE, "m/config.json: not readable as JSON (no object at its top)"),
    ("m/config.json", b'{"model_type": "t5"}', BASE, "m/config.json: T5Config.__init__() mis"),
    ("m/config.json", t5_config(d_model=10**12), BASE, "m: shared.weight is torch.float16 [1024, 160]"),
    ("m/config.json", t5_config(model_type="bart"), BASE, "m/config.json: model_type is 'bart'; suppo"),
    ("m/config.json", t5_config(d_ff=8), BASE, "m: encoder.block.0.layer.1.DenseReluDense.wi_0.weight is"),
    ("m/config.json", t5_config(num_layers=9), BASE, "m: missing tensors: 'encoder.block."),
    ("m/model.safetensors", None, BASE, "m: no weights (model.safetensors or pytorch_model.bin"),
    ("m/model.safetensors", b"abcd", BASE, "m/model.safetensors: not a whole safetensors file ("),
    ("m/spiece.model", None, BASE, "m: no spiece.model or tokenizer.model or tokenizer.json; copy"),
    ("m/spiece.model", b"abcd", BASE, "m/spiece.model: not a SentencePiece model; download it again"),
    ("r/config.json", b"{", "train.py --resume --out r", "r/config.json: not readable as JSON ("),
    ("r/config.json", b"{}", "train.py --resume --out r", "r/config.json: Run: missing 7 required"),
    ("r/config.json", b"{}", "eval.py --run r", "r/config.json: Run: missing 7 required"),
    ("r/config.json", b"{}", "train.py --out r", "--out r: holds a run already; add --resume, or name"),
    ("r/scores.json", b"{}", "train.py --out r", "--out r: holds a run already; add --resume, or name"),
    ("r/metrics.jsonl", b"{", "experiments/plot.py --run r", "r/metrics.jsonl: not JSON lines ("),
    ("r/metrics.jsonl", b"", "experiments/plot.py --run r", "r/metrics.jsonl: no loss or no dev loss yet;"),
    ("r/metrics.jsonl", b"5\n", "experiments/plot.py --run r", "r/metrics.jsonl: a line is no object;"),
    ("r/results.json", b"{}", "experiments/plot.py --results r", "r/results.json: cells and summary are"),
]


@pytest.mark.parametrize("name, content, line, words", FILES, ids=[row[3] for row in FILES])
def test_a_mistake_in_a_file_is_one_line_and_exit_code_2(home, refusal, name, content, line, words):
    for folder in ("d/tasks", LISTS, "m", "r"):
        (home / folder).mkdir(parents=True)
    for name_of, split in (("task1_a", "train"), ("task2_b", "test")):
        (home / f"d/tasks/{name_of}.json").write_bytes(task())
        (home / LISTS / f"{split}_tasks.txt").write_text(name_of)
    for part in ("config.json", "model.safetensors", "spiece.model"):
        (home / "m" / part).symlink_to(ROOT / "tiny" / part)
    (home / name).unlink(missing_ok=True)
    if content is not None:
        (home / name).write_bytes(content)
    said = refusal(f"{line} --device cpu" if not line.startswith("experiments") else line)
    assert said.removeprefix(f"{home}/").startswith(words)


@pytest.mark.slow
@pytest.mark.parametrize("kind, rouge_l, exact, published", [
    ("copy-demo", 29.6919, 23.3748, 28.54), ("copy-input", 16.5341, 0.3112, 14.20)])  # fmt: skip
def test_heuristics_on_the_official_test_tasks(home, sni_dir, kind, rouge_l, exact, published):
    run("eval.py", "--heuristic", kind, "--data", sni_dir, "--out", "out", cwd=home)
    scores = json.loads((home / "out/scores.json").read_text())
    if len(scores["tasks"]) == 119:  # all of them: as published
        assert scores["overall"]["rougeL"] == pytest.approx(published, abs=0.05)
    else:  # the sample: as the official code scored it
        assert len(scores["tasks"]) == 58
        assert scores["overall"]["rougeL"] == pytest.approx(rouge_l, abs=5e-5)
        assert scores["overall"]["exact_match"] == pytest.approx(exact, abs=5e-5)


@pytest.mark.slow
def test_thirty_steps_on_the_real_tasks(home, sni_dir):
    """All training tasks, definition and 2 examples, 1,024 / 128 tokens: stopped, resumed and evaluated."""
    sizes = "--steps 30 --batch-size 4 --warmup 5 --eval-every 15 --eval-instances 32"
    terminate_after(4, "--data", sni_dir, "--device", "cpu", *sizes.split(), cwd=home)
    run("train.py", "--resume", "--out", "run", "--device", "cpu", cwd=home)
    assert [row["step"] for row in records(home / "run") if "loss" in row] == list(range(30))
    run("eval.py", "--run", "run", "--max-tasks", "3", "--limit", "24", "--device", "cpu", cwd=home)
    assert len(json.loads((home / "run/eval-test-24/scores.json").read_text())["tasks"]) == 3
