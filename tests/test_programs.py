"""train.py and eval.py as a user runs them, on the bundled data and, where it is given, on the real one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import checkpoint

ROOT = Path(__file__).resolve().parent.parent
SHORT = [
    "--device",
    "cpu",
    "--max-tasks",
    "4",
    "--eval-instances",
    "16",
    "--steps",
    "8",
    "--eval-every",
    "4",
    "--batch-size",
    "8",
    "--warmup",
    "2",
]


def command(program, *arguments):
    return [sys.executable, str(ROOT / program), *map(str, arguments)]


def environment(home):
    """No GPU, so that two runs are equal to the last bit, and a token cache of the test's own."""
    own = {"XDG_CACHE_HOME": str(home / "cache"), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own}


def run(program, *arguments, cwd, code=0):
    """stdout of a program that must end with `code`; run outside the repository, with a token cache of its
    own."""
    done = subprocess.run(
        command(program, *arguments),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        env=environment(cwd),
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture
def home(tmp_path):
    """An empty folder from which the bundled data and base can be named as the README names them."""
    for name in ("sni", "tiny"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def records(folder):
    return [json.loads(line) for line in open(folder / "metrics.jsonl", encoding="utf-8")]


def trace(folder):
    """The losses of all steps and the dev losses: what must not depend on interruptions."""
    names = ("step", "loss", "norm", "dev_loss")
    return [tuple(row.get(name, 0.0) for name in names) for row in records(folder)]


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
    routing = json.loads((folder / "routing.json").read_text())
    assert routing["category"].keys() == routing["w"].keys() and len(routing["w"]) == 4
    assert "python train.py --resume --out run --gpu 0" in out
    assert "python eval.py --run run --split test --gpu 0" in out and "python plot.py --run run" in out

    out = run("eval.py", "--run", "run", "--split", "seen", "--limit", "16", "--device", "cpu", cwd=home)
    again = json.loads((folder / "eval-seen" / "scores.json").read_text())
    assert again["overall"] == scores["orchmoe"]["seen"]["overall"]
    predictions = [
        json.loads(line) for line in open(folder / "eval-seen" / "predictions.jsonl", encoding="utf-8")
    ]
    assert len(predictions) == 16 and all(row.keys() == {"id", "prediction"} for row in predictions)


def test_a_killed_run_resumes_bit_for_bit(home):
    run("train.py", *SHORT, "--gumbel", "--out", "whole", cwd=home)
    process = subprocess.Popen(
        command("train.py", *SHORT, "--gumbel", "--out", "killed"),
        cwd=home,
        stdout=subprocess.DEVNULL,
        env=environment(home),
    )
    while (
        len(trace(home / "killed") if (home / "killed/metrics.jsonl").exists() else []) < 6
    ):  # past a checkpoint
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (home / "killed/checkpoint.pt").exists() and len(trace(home / "killed")) < 10
    run("train.py", "--resume", "--out", "killed", "--device", "cpu", cwd=home)
    assert trace(home / "killed") == trace(home / "whole")
    for name in ("adapter.safetensors", "scores.json"):
        assert (home / "killed" / name).read_bytes() == (home / "whole" / name).read_bytes()


def terminate_after(steps, *arguments, cwd):
    """Output of a run of train.py into `run` that gets a SIGTERM once it has logged so many steps."""
    process = subprocess.Popen(command("train.py", *arguments, "--out", "run"), cwd=cwd, text=True,
                               stdout=subprocess.PIPE, env=environment(cwd))  # fmt: skip
    while not (cwd / "run/metrics.jsonl").exists() or len(records(cwd / "run")) < steps:
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    return out


def test_sigterm_finishes_the_step_saves_and_says_how_to_resume(home):
    out = terminate_after(1, *SHORT, "--steps", "4000", cwd=home)
    assert "train.py --resume --out run" in out
    saved = checkpoint.load_state(home / "run/checkpoint.pt")["step"]
    assert saved == records(home / "run")[-1]["step"] + 1


@pytest.mark.parametrize("method", ["lora", "moe-lora", "poly", "mhr", "c-poly", "full"])
def test_every_method_trains_and_is_scored(home, method):
    rate = "--lr-full" if method == "full" else "--lr-skills"
    run("train.py", *SHORT, "--method", method, rate, "0.01", "--out", "run", cwd=home)
    losses = [row["dev_loss"] for row in records(home / "run") if "dev_loss" in row]
    assert losses[1] < losses[0]
    run("eval.py", "--run", "run", "--limit", "16", "--device", "cpu", cwd=home)
    scores = json.loads((home / "run/scores.json").read_text())
    again = json.loads((home / "run/eval-test/scores.json").read_text())
    assert scores[method]["unseen"]["overall"] == again["overall"]


def test_task_ids_are_those_of_the_run_whatever_is_evaluated(home):
    run("train.py", *SHORT, "--method", "poly", "--out", "run", cwd=home)
    run("eval.py", "--run", "run", "--split", "seen", "--max-tasks", "6", "--device", "cpu", cwd=home)
    scores = json.loads((home / "run/eval-seen/scores.json").read_text())
    assert len(scores["tasks"]) == 6  # two of them without an id


def test_a_run_is_not_resumed_on_another_base_or_other_tasks(home):
    run("train.py", *SHORT, "--out", "run", cwd=home)
    config = json.loads((home / "run/config.json").read_text())
    for field, value, named in (("base", "0" * 16, "tiny"), ("tasks", config["tasks"][1:], "sni")):
        (home / "run/config.json").write_text(json.dumps({**config, field: value}))
        assert named in run("train.py", "--resume", "--out", "run", "--device", "cpu", cwd=home, code=2)
    for damaged in ("[]", "{}", "nonsense"):
        (home / "run/config.json").write_text(damaged)
        for program in (["train.py", "--resume", "--out"], ["eval.py", "--device", "cpu", "--run"]):
            assert "run/config.json" in run(*program, "run", cwd=home, code=2)


def test_accumulation_does_not_change_the_step(home):
    for parts in (1, 3):
        run("train.py", *SHORT, "--gumbel", "--accumulate", parts, "--out", f"run{parts}", cwd=home)
    whole, parts = trace(home / "run1"), trace(home / "run3")
    assert whole[0] == pytest.approx(parts[0], rel=1e-5)  # loss and gradient norm before any update
    # Adam makes whole steps of the rounding of tiny gradients
    for one, three in zip(whole, parts, strict=True):
        assert (one[0], one[1], one[3]) == pytest.approx((three[0], three[1], three[3]), rel=1e-4)


MESSAGES = [  # program, arguments, words that the one line must have
    ("train.py", ["--data", "nowhere"], ["nowhere/splits/default/train_tasks.txt", "no such file"]),
    ("train.py", ["--model", "nowhere"], ["nowhere"]),
    ("train.py", ["--steps", "many"], ["--steps", "many"]),
    ("train.py", ["--stepz", "3"], ["--stepz"]),
    ("train.py", ["--dtype", "float16"], ["--dtype", "float16"]),
    ("train.py", ["--device", "tpu"], ["--device tpu"]),
    ("train.py", ["--gpu", "-1"], ["--gpu -1"]),
    ("train.py", ["--resume", "--out", "nowhere"], ["nowhere/config.json"]),
    ("train.py", ["--method", "lora", "--from-scratch"], ["--from-scratch"]),
    ("train.py", ["--targets", "z"], ["targets", "z"]),
    ("train.py", ["--num-pos", "-1"], ["--num-pos -1"]),
    ("train.py", ["--batch-size", "0"], ["--batch-size 0"]),
    ("train.py", ["--accumulate", "0"], ["--accumulate 0"]),
    ("train.py", ["--eval-every", "0"], ["--eval-every 0"]),
    ("train.py", ["--steps", "0"], ["--steps 0"]),
    ("train.py", ["--text", "words.txt"], ["--text", "--method full"]),
    ("train.py", ["--allocation-init", "normal:3e-"], ["allocation_init", "normal:3e-"]),
    ("eval.py", ["--heuristic", "copy-demo", "--batch-size", "0"], ["--batch-size 0"]),
    ("eval.py", [], ["--run", "--model", "--heuristic"]),
    ("eval.py", ["--run", "nowhere"], ["nowhere/config.json"]),
    ("eval.py", ["--heuristic", "copy-demo", "--data", "nowhere"], ["nowhere/splits"]),
    ("eval.py", ["--split", "all", "--heuristic", "copy-demo"], ["--split", "all"]),
]


@pytest.mark.parametrize(
    "program, arguments, words", MESSAGES, ids=lambda value: " ".join(value) if value else "none"
)
def test_bad_input_is_one_line_and_exit_code_2(home, program, arguments, words):
    error = run(program, *arguments, cwd=home, code=2)
    assert error.count("\n") == 1 and error.startswith(f"{program}: error: "), error
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    "kind, rouge_l, exact", [("copy-demo", 29.6919, 23.3748), ("copy-input", 16.5341, 0.3112)]
)
def test_heuristics_on_the_official_test_tasks(home, sni_dir, kind, rouge_l, exact):
    run("eval.py", "--heuristic", kind, "--data", sni_dir, "--out", "out", cwd=home)
    overall = json.loads((home / "out/scores.json").read_text())["overall"]
    assert overall["rougeL"] == pytest.approx(rouge_l, abs=5e-5)
    assert overall["exact_match"] == pytest.approx(exact, abs=5e-5)


@pytest.mark.slow
def test_thirty_steps_on_the_real_tasks(home, sni_dir):
    """All training tasks, definition and 2 examples, 1,024 / 128 tokens: stopped, resumed and evaluated."""
    sizes = "--steps 30 --batch-size 4 --warmup 5 --eval-every 15 --eval-instances 32 --eval-batch-size 16"
    terminate_after(4, "--data", sni_dir, "--device", "cpu", *sizes.split(), cwd=home)
    run("train.py", "--resume", "--out", "run", "--device", "cpu", cwd=home)
    assert [row["step"] for row in records(home / "run") if "loss" in row] == list(range(30))
    run("eval.py", "--run", "run", "--max-tasks", "3", "--limit", "24", "--device", "cpu", cwd=home)
    assert len(json.loads((home / "run/eval-test/scores.json").read_text())["tasks"]) == 3
