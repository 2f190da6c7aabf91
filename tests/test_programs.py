"""train.py and eval.py as a user runs them, on the bundled data and, where it is given, on the real one."""

import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_data import task_json

import checkpoint
import data
import eval as evaluation
import runtime
import train
from baselines import NoAdapter, attach_method
from orchmoe import OrchMoEConfig

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


def environment(home, **more):
    """No GPU, so that two runs are equal to the last bit, and a token cache of the test's own."""
    own = {"XDG_CACHE_HOME": str(home / "cache"), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own, **more}


def run(program, *arguments, cwd, code=0, **more):
    """stdout of a program that must end with `code`; run outside the repository, with a token cache of its
    own."""
    done = subprocess.run(
        command(program, *arguments),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        env=environment(cwd, **more),
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


def terminate_after(steps, *arguments, cwd, out="run"):
    """Output of a run of train.py into `out` that gets a SIGTERM once it has logged so many steps."""
    process = subprocess.Popen(command("train.py", *arguments, "--out", out), cwd=cwd, text=True,
                               stdout=subprocess.PIPE, env=environment(cwd))  # fmt: skip
    while not (cwd / out / "metrics.jsonl").exists() or len(records(cwd / out)) < steps:
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


@pytest.fixture
def stopped(home):
    """A run of 4,000 steps into `run` that a SIGTERM has ended, with a checkpoint and kept adapters."""
    terminate_after(6, *SHORT, "--steps", "4000", cwd=home)
    return home / "run"


def test_weights_that_are_not_finite_stop_the_run_and_no_file_changes(home, stopped):
    state = checkpoint.load_state(stopped / "checkpoint.pt")
    name = "decoder.blocks.1.attention.v.skill_B"
    state["weights"][name] = state["weights"][name].clone()
    state["weights"][name][1, 0, 3] = float("inf")
    checkpoint.save_state(stopped / "checkpoint.pt", state)
    before = {path: path.read_bytes() for path in stopped.iterdir()}
    error = run("train.py", "--resume", "--out", "run", "--device", "cpu", cwd=home, code=2)
    assert error.count("\n") == 1 and f"step {state['step']} on " in error and "loss nan" in error
    assert f"weight {name}: 1 of 1280 values are not finite" in error
    assert len(re.findall(r"task\d+-[0-9a-f]{32}", error)) == 8  # the ids of the batch
    assert before == {path: path.read_bytes() for path in stopped.iterdir()}


@pytest.mark.parametrize("factor, words", [
    (float("nan"), "256 of 256 values are not finite"), (1e30, "largest value"),  # whose square overflows
])  # fmt: skip
def test_a_gradient_that_is_not_finite_is_named_and_changes_nothing(small_t5, inputs, factor, words):
    adapters = attach_method("lora", small_t5, OrchMoEConfig())
    optimizer = train.make_optimizer(adapters, train.TrainConfig())
    adapters.linears["decoder.blocks.1.attention.v"].skill_B.register_hook(lambda gradient: gradient * factor)
    before = {name: tensor.clone() for name, tensor in adapters.state_dict().items()}
    batch = data.Batch(*inputs, torch.zeros(4, dtype=torch.int64), ["a", "b", "c", "d"])
    with pytest.raises(ValueError, match="^step 7 on a, b, c, d: loss [0-9.]+, gradient norm (nan|inf); "
                       f"gradient of decoder.blocks.1.attention.v.skill_B: {words}.*checkpoint is untouched"):
        train.optimiser_step(small_t5, adapters, optimizer, batch, 7, train.TrainConfig())
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapters.state_dict().items())


def test_a_step_that_breaks_the_weights_is_not_saved(home):
    options = [*SHORT, "--eval-every", "1", "--lr-skills", "3e38", "--warmup", "0", "--schedule", "constant"]
    error = run("train.py", *options, "--out", "run", cwd=home, code=2)
    assert error.count("\n") == 1 and "after step 0 on " in error and "norm of weights nan" in error
    assert not {"checkpoint.pt", "adapter.safetensors"} & {path.name for path in (home / "run").iterdir()}


def test_one_seed_gives_the_same_bytes_and_another_other(home):
    for out, seed, salt in (("one", 3, "1"), ("same", 3, "2"), ("other", 4, "1")):
        run("train.py", *SHORT, "--gumbel", "--seed", seed, "--out", out, cwd=home, PYTHONHASHSEED=salt)
    one, same, other = (home / name for name in ("one", "same", "other"))
    for name in ("adapter.safetensors", "checkpoint.pt", "scores.json", "config.json"):
        assert (one / name).read_bytes() == (same / name).read_bytes(), name
        assert (one / name).read_bytes() != (other / name).read_bytes(), name
    logs = [[{k: v for k, v in row.items() if k != "tokens_per_s"} for row in records(folder)]
            for folder in (one, same)]  # fmt: skip
    assert logs[0] == logs[1] and trace(one) != trace(other)


def test_a_second_run_on_a_folder_is_refused_while_the_first_lives(home):
    first = subprocess.Popen(command("train.py", *SHORT, "--steps", "4000", "--out", "run"), cwd=home,
                             stdout=subprocess.DEVNULL, env=environment(home))  # fmt: skip
    while not (home / "run/checkpoint.pt").exists():
        time.sleep(0.02)
        assert first.poll() is None
    error = run("train.py", "--resume", "--out", "run", "--device", "cpu", cwd=home, code=2)
    assert error.count("\n") == 1 and "run: another process is writing this run" in error
    first.kill()
    first.wait()
    (home / "run/.checkpoint.pt.7.tmp").write_text("half a save")
    with runtime.locked(home / "run"):  # nobody is left to free the lock, and it is free
        assert not (home / "run/.checkpoint.pt.7.tmp").exists()
        with pytest.raises(ValueError, match="another process"), runtime.locked(home / "run"):
            pass


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


def ask(model, *arguments, cwd):
    """What eval.py says behind the line about the device."""
    question = ["--ask", "Write the first word of the list.", "--input", "lion, June, wolf"]
    return run("eval.py", *model, *question, "--device", "cpu", *arguments, cwd=cwd).splitlines()[1:]


def test_a_run_answers_by_hand_and_says_where_the_router_put_it(home):
    run("train.py", *SHORT, "--out", "run", cwd=home)
    said, answer, verdict = ask(["--run", "run"], cwd=home)
    alone = "the prompt is instruction and input alone, without examples"
    assert said == f"asked: run (orchmoe on tiny/); {alone}"
    base, adapters = evaluation.load_run(home / "run", runtime.pick_device(device="cpu"))
    tokenizer = data.Tokenizer(home / "tiny")
    source = ("Definition: Write the first word of the list.\n\n"
              "Now complete the following example -\nInput: lion, June, wolf.\nOutput: ")  # fmt: skip
    ids = torch.tensor([tokenizer.encode(source)])
    with torch.no_grad(), adapters.routed(base.embed(ids)) as routing:
        tokens = base.generate(ids, torch.ones_like(ids))[0]
    assert answer == f"answer: {tokenizer.decode(tokens)}"
    order = routing.w[0].argsort(descending=True).tolist()
    shares = ", ".join(f"{k + 1} at {100 * routing.w[0, k]:.1f} %" for k in order)
    assert verdict == f"router: abstract task {shares} (numbered as in plot.py's figures)"
    said, answer = ask(["--model", "tiny"], "--max-new-tokens", "1", cwd=home)
    assert said == f"asked: tiny; {alone}"
    bare = checkpoint.load(home / "tiny")
    first = bare.generate(ids, torch.ones_like(ids), max_new_tokens=1)[0]
    assert answer == f"answer: {tokenizer.decode(first)}"


def test_a_run_is_exported_as_the_readme_prints_it(home):
    """Merged under the mean w of a task: the same predictions as from the run routed by that w."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [snippet] = [text for text in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if ".merge(" in text]
    rates = ["--lr-skills", "0.03", "--steps", "20"]
    run("train.py", *SHORT, *rates, "--out", "runs/orchmoe-1", cwd=home)
    paths = {**environment(home), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", snippet], cwd=home, env=paths, check=True, timeout=300)
    base, adapters = evaluation.load_run(home / "runs/orchmoe-1", runtime.pick_device(device="cpu"))
    tokenizer, cache = data.Tokenizer(home / "merged"), str(home / "cache/orchmoe")
    config = data.DataConfig(data=str(home / "sni"), max_tasks=1, cache=cache)
    examples = evaluation.evenly(data.load_examples(config, tokenizer, "test"), 16)
    w = evaluation.router_weights(base, adapters, data.load_examples(config, tokenizer, "test")).mean(0)
    routed = evaluation.predict(base, adapters, examples, tokenizer, w=w)
    merged = checkpoint.load(home / "merged")
    plain = evaluation.predict(merged, NoAdapter(merged, full=False), examples, tokenizer)
    assert plain == routed
    bare = checkpoint.load(home / "tiny")
    assert plain != evaluation.predict(bare, NoAdapter(bare, full=False), examples, tokenizer)


CHOICE = "invalid choice: "  # argparse's own; what follows differs between versions of Python
DOWNLOAD = "no such folder; name a local one, nothing is downloaded here; `hf download NAME --local-dir DIR`"
MESSAGES = {  # command line: how the one line goes on behind "PROGRAM: error: "
    "train.py --data nowhere": "nowhere/splits/default/train_tasks.txt: no such file; --data takes a folder",
    "train.py --splits nowhere": "sni/splits/nowhere/train_tasks.txt: no such file; --data takes a folder",
    "train.py --splits ../x": "--splits: '../x' is no plain name; give a short one",
    "train.py --model google/flan-t5-base": f"google/flan-t5-base: {DOWNLOAD}",
    "train.py --model file": "file: not a SentencePiece model; download it again",
    "train.py --out file": "file: File exists",
    "train.py --out file/run": "file/run: Not a directory",
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
    "train.py --preset fast": f"argument --preset: {CHOICE}'fast'",
    "train.py --schedule cosine": f"argument --schedule: {CHOICE}'cosine'",
    "train.py --router oracle": f"argument --router: {CHOICE}'oracle'",
    "train.py --router-norm sigmoid": f"argument --router-norm: {CHOICE}'sigmoid'",
    "train.py --router-init zeros": f"argument --router-init: {CHOICE}'zeros'",
    "train.py --device tpu": f"argument --device: {CHOICE}'tpu'",
    "train.py --gpu one": "argument --gpu: invalid int value: 'one'; see --help",
    "train.py --gpu -1": "--gpu -1: there are ",
    "train.py --gpu 0 --device cpu": "--gpu 0 --device cpu: give one of the two",
    "train.py --from-scratch --method lora": "--from-scratch --method lora: random weights go with --method",
    "train.py --text words.txt": "--text: span corruption goes with --method full",
    "train.py --text words.txt --method full": "words.txt: No such file or directory",
    "train.py --text-ratio 1.5": "--text-ratio 1.5: give a share between 0 and 1",
    "train.py --text-ratio nan": "--text-ratio nan: give a share between 0 and 1",
    "train.py --beta2 1": "--beta2 1.0: give 0 or more, and less than 1",
    "train.py --dropout nan": "--dropout nan: give 0 or more, and less than 1",
    "train.py --seed 9223372036854775808": "--seed 9223372036854775808: give less than 2^63",
    "train.py --targets z": "targets: no Linear is named z; there are head, k, o, q, v, wi_0, wi_1, wo",
    "train.py --targets ,": "targets: name at least one Linear",
    "train.py --tasks 0": "tasks: 0 must be from 1 to 4096",
    "train.py --skills 4097": "skills: 4097 must be from 1 to 4096",
    "train.py --rank 0": "rank: 0 must be from 1 to 4096",
    "train.py --skills 0": "skills: 0 must be 1 or more",
    "train.py --extra-rank -1": "--extra-rank -1: give 0 or more",
    "train.py --alpha 0": "alpha: 0.0 must be a number above 0",
    "train.py --alpha nan": "alpha: nan must be a number above 0",
    "train.py --allocation-std -1": "allocation_std: -1.0 must be a number from 0",
    "train.py --method orchmoe-factors --router token": "--method orchmoe-factors --router token: factors",
    "eval.py": "give one of --run, --model and --heuristic",
    "eval.py --run a --model b": "give one of --run, --model and --heuristic",
    "eval.py --run nowhere": "nowhere/config.json: not there; name the folder of a run of train.py",
    "eval.py --model google/flan-t5-base": f"google/flan-t5-base: {DOWNLOAD}",
    "eval.py --heuristic copy": f"argument --heuristic: {CHOICE}'copy'",
    "eval.py --heuristic copy-demo --split all": f"argument --split: {CHOICE}'all'",
    "eval.py --heuristic copy-demo --data nowhere": "nowhere/splits/default/train_tasks.txt: no such file",
    "eval.py --heuristic copy-demo --limit 1 --out file": "file: File exists",
    "eval.py --heuristic copy-demo --batch-size 0": "--batch-size 0: give 1 or more",
    "eval.py --heuristic copy-demo --limit -1": "--limit -1: give 0 or more",
    "eval.py --heuristic copy-demo --max-new-tokens 0": "--max-new-tokens 0: give 1 or more",
    "eval.py --heuristic copy-demo --seed -1": "--seed -1: give 0 or more",
    "eval.py --model tiny --ask Go": 'give both: --ask "instruction" and --input "text"',
    "eval.py --model tiny --input word": 'give both: --ask "instruction" and --input "text"',
    "eval.py --model tiny --ask ' ' --input word": 'give both: --ask "instruction" and --input "text"',
    "eval.py --model tiny --ask Go --input \udcff": "--input: not UTF-8; give it in that encoding",
    "eval.py --ask Go --input word": "give one of --run, --model and --heuristic",
    "eval.py --heuristic copy-demo --ask Go --input word": "--heuristic: not used with --ask; leave it out",
    "eval.py --run r --split test --ask Go --input word": "--split: not used with --ask; leave it out",
    "eval.py --run nowhere --ask Go --input word": "nowhere/config.json: not there; name the folder",
    "plot.py": "give one of --run and --results",
    "plot.py --run a --results b": "give one of --run and --results",
    "plot.py --run nowhere": "nowhere/metrics.jsonl: not there; name the folder of a run",
    "plot.py --results nowhere": "nowhere: no results.json or ablations.json; name a comparison's --out",
}
LEAST = {"steps": 1, "batch-size": 1, "accumulate": 1, "eval-every": 1, "eval-batch-size": 1,
         "text-length": 2, "train-instances": 1, "max-source-length": 2, "max-target-length": 2, "num-pos": 0,
         "num-neg": 0, "max-tasks": 0, "eval-instances": 0, "warmup": 0, "seed": 0}
MESSAGES |= {f"train.py --{flag} {least - 1}": f"--{flag} {least - 1}: give {least} or more"
             for flag, least in LEAST.items()}
MESSAGES |= {f"train.py --{flag} {value}": f"--{flag} {value}: give 0 or more"
             for flag in ("lr-skills", "lr-router", "lr-allocation", "lr-full", "weight-decay", "clip")
             for value in ("-0.5", "nan", "inf")}  # fmt: skip


@pytest.fixture
def refusal(home, monkeypatch, capsys):
    """The line on stderr of a command line that must end with exit code 2, nothing but that line, and no file
    left behind; in this process, which spares the imports."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    (home / "file").write_text("a file")

    def files():
        return [path for path in sorted(home.rglob("*")) if home / "cache" not in (path, *path.parents)]

    def refused(line):
        program, *arguments = shlex.split(line)
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        before = files()
        with pytest.raises(SystemExit) as end:
            runtime.run_program(importlib.import_module(program.removesuffix(".py")).main)
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.count("\n") == 1, error
        assert files() == before
        return error.removeprefix(f"{program}: error: ")

    return refused


@pytest.mark.parametrize("line, words", MESSAGES.items(), ids=MESSAGES)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(refusal, line, words):
    assert refusal(line).startswith(words)


@pytest.mark.parametrize("program", ["train.py", "eval.py", "plot.py"])
def test_the_process_says_so_and_ends_with_2(home, program):
    assert run(program, "--stepz", cwd=home, code=2).startswith(f"{program}: error: unrecognized arguments: ")


def task(**changes):
    return json.dumps(task_json(**changes)).encode()


def t5_config(**changes):
    return json.dumps(json.loads((ROOT / "tiny/config.json").read_text()) | changes).encode()


TASK, LISTS = "d/tasks/task1_a.json", "d/splits/default/"
TRAIN, BASE = "train.py --data d", "train.py --model m"
ROW = {"id": "x", "input": "a", "output": ["b"]}
FILES = [  # a file and its content (None: it is gone), the command line, how the message goes on
    (TASK, b"{", TRAIN, f"{TASK}: not JSON in UTF-8 ("),
    (TASK, b"[]", TRAIN, f"{TASK}: top level: expected an object; mend it or take the task off the list"),
    (TASK, task(Definition=3), TRAIN, f"{TASK}: Definition: expected a string; mend it"),
    (TASK, task(Categories=[3]), TRAIN, f"{TASK}: Categories: expected a string; mend it"),
    (TASK, task(Instances=[]), TRAIN, f"{TASK}: Instances: expected a list of objects, not empty; mend it"),
    (TASK, task(Instances=[ROW | {"input": 3}]), TRAIN, f"{TASK}: Instances[0].input: expected a string"),
    (TASK, task(Instances=[ROW | {"output": []}]), TRAIN, f"{TASK}: Instances[0].output: expected a string"),
    (TASK, task(Instances=[ROW]), TRAIN, "d: no training task has the 5 instances that a dev set needs"),
    (TASK, task(**{"Positive Examples": [{"input": "a"}]}), TRAIN, f"{TASK}: Positive Examples[0].output:"),
    (TASK, task(**{"Positive Examples": []}), "eval.py --heuristic copy-demo --data d",
     f"{TASK}: Positive Examples: none to copy from; add one or use copy-input"),
    (TASK, None, TRAIN, "d/tasks: has none of the 2 tasks of splits/default; complete it"),
    (LISTS + "train_tasks.txt", b"../task1_a", TRAIN, f"{LISTS}train_tasks.txt: '../task1_a' is no plain"),
    (LISTS + "train_tasks.txt", b"", TRAIN, "d/tasks: no task of splits/default/train_tasks.txt; complete"),
    (LISTS + "test_tasks.txt", None, TRAIN, f"{LISTS}test_tasks.txt: no such file; --data takes a folder"),
    ("m/config.json", None, BASE, "m/config.json: cannot be read (No such file or directory)"),
    ("m/config.json", b"{", BASE, "m/config.json: not JSON"),
    ("m/config.json", b"[]", BASE, "m/config.json: must hold a JSON object"),
    ("m/config.json", b"{}", BASE, "m/config.json: vocab_size is missing"),
    ("m/config.json", t5_config(d_model=10**12), BASE, "m/config.json: d_model must be a whole number from"),
    ("m/config.json", t5_config(model_type="bart"), BASE, "m/config.json: model_type is 'bart'; only 't5'"),
    ("m/config.json", t5_config(d_ff=8), BASE, "m: decoder.block.0.layer.2.DenseReluDense.wi_0.weight is"),
    ("m/config.json", t5_config(num_layers=9), BASE, "m: missing tensors: 'encoder.block."),
    ("m/model.safetensors", None, BASE, "m: no weights (model.safetensors or pytorch_model.bin"),
    ("m/model.safetensors", b"abcd", BASE, "m/model.safetensors: not a safetensors file (header of"),
    ("m/spiece.model", None, BASE, "m/spiece.model: no such file; give a T5 folder with"),
    ("m/spiece.model", b"abcd", BASE, "m/spiece.model: not a SentencePiece model; download it again"),
    ("r/config.json", b"{", "train.py --resume --out r", "r/config.json: not readable as JSON ("),
    ("r/config.json", b"{}", "train.py --resume --out r", "r/config.json: train is missing or of another"),
    ("r/config.json", b"{}", "eval.py --run r", "r/config.json: train is missing or of another type;"),
    ("r/config.json", b"{}", "train.py --out r", "--out r: holds a run already; add --resume, or name"),
    ("r/metrics.jsonl", b"{", "plot.py --run r", "r/metrics.jsonl: not JSON lines ("),
    ("r/metrics.jsonl", b"", "plot.py --run r", "r/metrics.jsonl: no loss or no dev loss yet; wait for"),
    ("r/results.json", b"{}", "plot.py --results r", "r/results.json: cells and summary are missing; run"),
]


@pytest.mark.parametrize("name, content, line, words", FILES, ids=[row[3] for row in FILES])
def test_a_mistake_in_a_file_is_one_line_and_exit_code_2(home, refusal, name, content, line, words):
    for folder in ("d/tasks", LISTS, "m", "r"):
        (home / folder).mkdir(parents=True)
    (home / TASK).write_bytes(task())
    for split in ("train", "test"):
        (home / LISTS / f"{split}_tasks.txt").write_text("task1_a")
    for part in ("config.json", "model.safetensors", "spiece.model"):
        (home / "m" / part).symlink_to(ROOT / "tiny" / part)
    (home / name).unlink(missing_ok=True)
    if content is not None:
        (home / name).write_bytes(content)
    assert refusal(f"{line} --device cpu" if not line.startswith("plot") else line).startswith(words)


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
    sizes = "--steps 30 --batch-size 4 --warmup 5 --eval-every 15 --eval-instances 32 --eval-batch-size 16"
    terminate_after(4, "--data", sni_dir, "--device", "cpu", *sizes.split(), cwd=home)
    run("train.py", "--resume", "--out", "run", "--device", "cpu", cwd=home)
    assert [row["step"] for row in records(home / "run") if "loss" in row] == list(range(30))
    run("eval.py", "--run", "run", "--max-tasks", "3", "--limit", "24", "--device", "cpu", cwd=home)
    assert len(json.loads((home / "run/eval-test/scores.json").read_text())["tasks"]) == 3
