"""Test full disks, hostile files, code in pickles, and unusual ways to start a program.

Bad input is refused in one line, in bounded time and memory, and the last good state stays.
"""

import contextlib
import io
import json
import os
import pickle
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

import checkpoint
import data
import run_folder
import runtime
import tokenizer as tokenizers
import train
from experiments import plot, spans
from experiments.pretrain import random_base
from export import load_peft
from helpers import ROOT, SHORT, command, environment, links, run, run_shell, terminate_after, trace
from run_folder import RunFolder

CPU = runtime.Device(torch.device("cpu"), torch.float32, "")


def require_one_line(error, path):
    """Fail unless the message of the error is one printable line that begins with the path."""
    message = str(error)
    assert message.startswith(f"{path}: ") and message.isprintable(), message


def change_json(path, change):
    """Rewrite a JSON file: `change` changes its value in place."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def change_state(path, change):
    """Rewrite a checkpoint.pt: `change` changes its value in place."""
    state = checkpoint.read_torch(path)
    change(state)
    with runtime.atomic_write(path) as file:  # not in place: the tensors of `state` are mapped
        torch.save(state, file)


# ------------------------------------------------------------------------------------- full disk


@contextlib.contextmanager
def small_disk(folder, size):
    """Make `folder` a file system of `size` bytes. Skip the test if this user may not mount."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


LONG = [*SHORT, "--steps", "24", "--eval-every", "8", "--eval-instances", "4"]
RESUME = ["train.py", "--resume", "--device", "cpu", "--out"]


def check_intact(folder, before, error, expected):
    """Check that the error is the expected line and that the last checkpoint is untouched."""
    assert error.count("\n") == 1 and re.search(expected, error), error
    assert not list(folder.rglob("*.tmp"))
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert checkpoint.read_torch(folder / "checkpoint.pt")["step"] < 24


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_can_resume(home):
    run("train.py", *LONG, "--out", "whole", cwd=home)
    folder = home / "disk/run"
    junk = home / "disk/junk"
    with small_disk(home / "disk", 4_000_000):
        terminate_after(1, *LONG, cwd=home, out="disk/run")
        before = (folder / "checkpoint.pt").read_bytes()
        with pytest.raises(OSError), open(junk, "wb", buffering=0) as file:
            while True:
                assert file.write(bytes(4096)), "full"

        # Room for config.json, which a resumed run writes again.
        os.truncate(junk, junk.stat().st_size - 8192)
        error = run(*RESUME, "disk/run", cwd=home, code=2)
        files = "metrics.jsonl|adapter.safetensors|checkpoint.pt"
        check_intact(folder, before, error, rf"disk/run/({files}): No space left on device")

        # Room for the log too.
        os.truncate(junk, junk.stat().st_size - 100_000)
        error = run(*RESUME, "disk/run", cwd=home, code=2)
        expected = r"disk/run/(adapter.safetensors|checkpoint.pt): No space left on device; not"
        check_intact(folder, before, error, expected)

        junk.unlink()
        run(*RESUME, "disk/run", cwd=home)
        assert trace(folder) == trace(home / "whole")


@pytest.mark.slow
def test_a_limit_on_file_sizes_leaves_the_last_checkpoint(home):
    """Write under a limit, like that of a quota, that only checkpoint.pt exceeds."""
    terminate_after(1, *LONG, cwd=home)
    before = (home / "run/checkpoint.pt").read_bytes()
    done = subprocess.run(
        command(*RESUME, "run"),
        cwd=home,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000)),
    )
    assert done.returncode == 2, done.stderr
    expected = "run/checkpoint.pt: File too large; not written"
    check_intact(home / "run", before, done.stderr, expected)


def test_without_room_for_the_token_cache_a_program_warns_and_goes_on(home, copied):
    evaluate = ["eval.py", "--run", "run", "--limit", "8", "--device", "cpu", "--out"]
    run(*evaluate, "expected", cwd=home)
    with small_disk(home / "disk", 40_000):
        done = run_shell(command(*evaluate, "found"), home, XDG_CACHE_HOME=str(home / "disk"))
        assert done.returncode == 0 and done.stderr.count("\n") == 1, done.stderr
        assert (
            "disk/orchmoe: cannot save tokens (No space left on device; not written" in done.stderr
        )
        assert not list((home / "disk/orchmoe").iterdir())
    expected = (home / "expected/predictions.jsonl").read_bytes()
    assert (home / "found/predictions.jsonl").read_bytes() == expected


def save_checkpoint(path, tensor):
    state = mock.Mock(state_dict=lambda: tensor)
    RunFolder(path.parent).save_progress(1, 0.5, state, state)


def save_safetensors(path, tensor):
    checkpoint.write_safetensors(path, {"x": tensor}, {"format": "pt"})


@pytest.mark.parametrize("save", [save_checkpoint, save_safetensors])
def test_a_failed_write_is_an_error_that_names_the_file(tmp_path, save):
    path = tmp_path / "checkpoint.pt"
    save(path, torch.ones(9))
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large; not written") as refusal:
            save(path, torch.ones(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert refusal.value.filename == str(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# --------------------------------------------------------------------------------- hostile files


@pytest.fixture
def bounded():
    """Fail if the test takes more than 5 seconds of processor time or 500 MB."""
    with contextlib.suppress(OSError):  # Linux: reset the peak, which an earlier test may have set
        Path("/proc/self/clear_refs").write_text("5")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    yield
    assert time.process_time() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 500_000  # kB


def test_a_random_model_larger_than_memory_is_refused_before_it_allocates(tmp_path, bounded):
    shutil.copy(ROOT / "tiny/config.json", tmp_path)
    path = tmp_path / "config.json"
    change_json(path, lambda config: config.update(d_model=2**16, vocab_size=2**22))
    with pytest.raises(ValueError, match=f"^{path}: describes .* bytes of weights, but"):
        random_base(str(tmp_path), 0, CPU.device)


def read_run_config(path):
    return run_folder.read_config(path.parent)


def read_model_config(path):
    return checkpoint.read_config(path.parent)


def read_weights(path):
    return checkpoint.read_folder(path.parent)


NO_CONFIG = {
    "deep": b"[" * 100_000,
    "surrogate": b'{"model_type": "\\ud800"}',
    "NUL": b"\0",
    "not UTF-8": b'{"a": "\xff"}',
    "empty": b"",
    "digits": b"9" * 10_000,
    "list": b"[]",
    "pickle": pickle.dumps({}),
}


@pytest.mark.parametrize("content", NO_CONFIG.values(), ids=NO_CONFIG)
@pytest.mark.parametrize("read", [read_model_config, data.read_task, read_run_config])
def test_a_file_that_is_no_config_is_refused_in_one_line(tmp_path, bounded, read, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as refusal:
        read(path)
    require_one_line(refusal.value, path)


TERABYTE = {
    "config.json": read_model_config,
    "run.json": runtime.read_json,
    "task1_a.json": data.read_task,
    "spiece.model": tokenizers.load,
    "a.safetensors": checkpoint.read_safetensors,
    "checkpoint.pt": checkpoint.read_torch,
    "pytorch_model.bin": read_weights,
}


@pytest.mark.parametrize("name, read", TERABYTE.items(), ids=TERABYTE)
def test_a_file_of_a_terabyte_is_refused_before_it_is_read(tmp_path, bounded, name, read):
    path = tmp_path / name
    path.write_bytes(b'{"a": "')
    os.truncate(path, 2**40)  # sparse: it takes no space
    with pytest.raises(ValueError, match=f"^{path}: "):
        read(path)


# ------------------------------------------------------------------------------ code in a pickle


class Bomb:
    """Unpickling this object makes the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def pickled(value, form):
    if form == "pickle":
        return pickle.dumps(value)
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=form == "torch.save")
    return buffer.getvalue()


def load_cached(path):
    """Load a set whose token cache has the content of `path`. The cache must be made again."""
    config = data.DataConfig(data="sni", max_tasks=1)
    tokenizer = tokenizers.load("tiny")
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(path.parent / "cache")):
        expected = data.load_sets(config, tokenizer, ["dev"])["dev"]
        (cache,) = (path.parent / "cache/orchmoe").iterdir()
        shutil.copy(path, cache)
        found = data.load_sets(config, tokenizer, ["dev"])["dev"]
    assert [example.id for example in found] == [example.id for example in expected]
    raise ValueError("the cache was made again")


def load_lora(path):
    if path.name != "adapter_config.json":
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "base"}
        (path.parent / "adapter_config.json").write_text(json.dumps(config))
    return load_peft(path.parent)


def read_text(path):
    return spans.TextStream(path, tokenizers.load("tiny"), length=8, seed=0)


READERS = {
    "pytorch_model.bin": read_weights,
    "model.safetensors": read_weights,
    "model.safetensors.index.json": read_weights,
    "adapter.safetensors": checkpoint.load_adapter,
    "checkpoint.pt": checkpoint.read_torch,
    "config.json": read_run_config,
    "model/config.json": read_model_config,
    "adapter_config.json": load_lora,
    "adapter_model.safetensors": load_lora,
    "adapter_model.bin": load_lora,
    "spiece.model": tokenizers.load,
    "tokenizer.model": tokenizers.load,
    "tokenizer.json": tokenizers.load,
    "task1_a.json": data.read_task,
    "splits/default/train_tasks.txt": lambda path: data.read_splits(path.parents[2]),
    "scores.json": runtime.read_json,
    "metrics.jsonl": lambda path: plot.records(path.parent),
    "text.txt": read_text,
    "text.xz": read_text,
    "x.tokens": load_cached,
}


@pytest.mark.parametrize("form", ["pickle", "torch.save", "legacy"])
@pytest.mark.parametrize("name", READERS)
def test_no_file_can_run_code(home, monkeypatch, form, name):
    monkeypatch.chdir(home)
    path = home / "hostile" / name
    path.parent.mkdir(parents=True)
    bomb = {"step": 1, "weights": Bomb(home / "exploded")}
    path.write_bytes(pickled(bomb, form))
    with pytest.raises(ValueError):
        READERS[name](path)
    assert not (home / "exploded").exists()
    pickle.loads(pickle.dumps(bomb))
    assert (home / "exploded").exists()  # so the bomb works


def test_an_archive_on_several_disks_is_refused(tmp_path):
    """zipfile raises an error for this one when it is asked whether the file is an archive."""
    path = tmp_path / "state.pt"
    torch.save({"step": 1}, path)
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x06\x07") + 16] = 7  # the number of disks in the zip64 locator
    path.write_bytes(content)
    with pytest.raises(ValueError) as refusal:
        checkpoint.read_torch(path)
    require_one_line(refusal.value, path)


def test_torch_load_with_weights_only_is_the_only_unpickling():
    paths = [*ROOT.glob("*.py")]
    for folder in ("docs", "experiments", "integrations"):
        paths += ROOT.glob(f"{folder}/*.py")
    for path in paths:
        source = path.read_text(encoding="utf-8")
        assert source.count("torch.load(") == source.count("weights_only=True"), path
        called = r"pickle\.loads?|np\.load|marshal\.\w+|(?<![.\w])eval|(?<![.\w])exec"
        assert not re.search(rf"\b(?:{called})\(", source), path


# --------------------------------------------------------------------------- hostile run folders

ADAPTERS = {  # changed fields of the metadata of adapter.safetensors, and words of the message
    "another method": ({"method": "lora"}, "its method, 'lora', is not the run's; restore"),
    "another base": ({"base": "0" * 16}, "its base, '0{16}', is not the run's"),
    "other tasks": ({"tasks": ["task1"]}, "its tasks, ..task1.., is not the run's"),
    "another rank": ({"config": {"rank": 3}}, "skill_A"),
    "another K": ({"config": {"tasks": 9}}, r"\bZ\b"),
    "skills of a terabyte": ({"config": {"skills": 4096, "rank": 4096}}, None),
    "too many skills": ({"config": {"skills": 2**20}}, None),
    "far too many skills": ({"config": {"skills": 10**12}}, None),
    "a huge alpha": ({"config": {"alpha": 10**400}}, None),
    "skills as text": ({"config": {"skills": "4"}}, None),
    "skills true": ({"config": {"skills": True}}, None),
    "targets as text": ({"config": {"targets": "q"}}, None),
    "an unknown target": ({"config": {"targets": ["z"]}}, None),
    "an unknown router": ({"config": {"router": "oracle"}}, None),
    "a negative alpha": ({"config": {"alpha": -1.0}}, None),
    "an unknown field": ({"config": {"code": "os"}}, None),
}


@pytest.mark.parametrize("changes, words", ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_that_does_not_fit_its_metadata_is_refused(copied, bounded, changes, words):
    path = copied / "adapter.safetensors"
    state, info = checkpoint.load_adapter(path)
    state = {name: tensor.clone() for name, tensor in state.items()}
    config = info["config"] | changes.get("config", {})
    checkpoint.save_adapter(path, state, **{**info, **changes, "config": config})
    with pytest.raises(ValueError, match=words) as refusal:
        run_folder.load(CPU, run=copied)
    require_one_line(refusal.value, path)


STATES = {  # changes of checkpoint.pt that keep it a file of tensors
    "no step": lambda state: state.pop("step"),
    "step as text": lambda state: state.update(step="5"),
    "weights as a list": lambda state: state.update(weights=[]),
    "a missing weight": lambda state: state["weights"].pop("Z"),
    "no tensor": lambda state: state["weights"].update(Z=3),
    "another shape": lambda state: state["weights"].update(Z=torch.zeros(2, 2)),
    "no moments": lambda state: state["optimizer"].pop("state"),
    "a moment of another shape": lambda state: state["optimizer"]["state"][0].update(
        exp_avg=torch.zeros(1)
    ),
    "a missing moment": lambda state: state["optimizer"]["state"][0].pop("exp_avg_sq"),
}


@pytest.mark.parametrize("change", STATES.values(), ids=STATES)
def test_a_checkpoint_of_something_else_is_refused(copied, change):
    path = copied / "checkpoint.pt"
    change_state(path, change)
    settings = train.saved_settings(run_folder.read_config(copied))
    with pytest.raises(ValueError) as refusal:
        train.train(settings, CPU, train.LaunchConfig(out=str(copied)))
    require_one_line(refusal.value, path)


def resumed(folder):
    return train.read_settings({}, train.LaunchConfig(out=str(folder), resume=True))


def test_fields_that_an_older_run_lacks_have_their_defaults(copied):
    before = resumed(copied)

    def remove_fields(config):
        del config["train"]["trainable"], config["data"]["explanation"]
        del config["adapter"]["router_dropout"], config["torch"], config["pretrain"]

    change_json(copied / "config.json", remove_fields)
    assert resumed(copied) == before


def test_the_settings_in_a_checkpoint_have_no_effect(copied):
    def change_settings(state):
        for group in state["optimizer"]["param_groups"]:
            group.update(eps="nonsense", max_lr=1e9)

    change_state(copied / "checkpoint.pt", change_settings)
    config = train.TrainConfig()
    _, adapters, _ = run_folder.load(CPU, run=copied)
    optimizer = train.make_optimizer(adapters, config)
    RunFolder(copied).load_progress(adapters, optimizer)
    rates = [group["max_lr"] for group in optimizer.param_groups]
    assert rates == [config.lr_skills, config.lr_router, config.lr_allocation]
    assert optimizer.state
    assert all(group["eps"] == 1e-8 for group in optimizer.param_groups)


RUN_FIELDS = [  # values that config.json of a run must not have
    ("train", "seed", "0"),
    ("train", "steps", "8"),
    ("train", "method", 3),
    ("train", "lr_skills", None),
    ("train", "stepz", 8),
    ("train", "schedule", "cosine"),
    ("train", "lr_router", 10**400),
    ("train", "loras", [1]),
    ("data", "num_pos", [2]),
    ("data", "data", 7),
    ("data", "num_neg", -1),
    ("adapter", "rank", 0),
    ("adapter", "targets", "q"),
]


@pytest.mark.parametrize("section, field, value", RUN_FIELDS, ids=str)
def test_a_run_with_a_bad_setting_is_refused(copied, bounded, section, field, value):
    path = copied / "config.json"
    change_json(path, lambda config: config[section].update({field: value}))
    with pytest.raises(ValueError) as refusal:
        resumed(copied)
    require_one_line(refusal.value, path)


@pytest.mark.parametrize("config", [None, [], "text"])
def test_scores_of_something_else_are_not_overwritten(copied, config):
    path = copied.parent / "scores.json"
    path.write_text(json.dumps({"config": config}))
    evaluate = ["eval.py", "--run", "run", "--limit", "2", "--device", "cpu", "--out", "."]
    error = run(*evaluate, cwd=copied.parent, code=2)
    assert (
        error == "eval.py: error: .: holds a run or a different evaluation; choose another --out\n"
    )
    assert json.loads(path.read_text()) == {"config": config}


def test_a_run_that_another_process_has_just_made_is_not_overwritten(finished, home, monkeypatch):
    lock = RunFolder.lock

    def wait_and_lock(folder):
        shutil.copytree(finished / "run", folder.path)
        return lock(folder)

    monkeypatch.setattr(RunFolder, "lock", wait_and_lock)
    error = run("train.py", *SHORT, "--seed", "1", "--out", "run", cwd=home, code=2)
    assert (
        error == "train.py: error: run: another process wrote a checkpoint meanwhile; "
        "give another --out\n"
    )
    for path in (finished / "run").iterdir():
        assert (home / "run" / path.name).read_bytes() == path.read_bytes()


def test_a_resumed_run_without_scores_scores_the_frozen_base_again(copied):
    path = copied / "scores.json"
    before = path.read_text()
    path.unlink()
    run(*RESUME, "run", cwd=copied.parent)
    assert path.read_text() == before


def test_a_run_can_be_resumed_without_the_run_that_it_started_from(copied):
    start = ["--start", "run", "--trainable", "router", "--out", "next"]
    run("train.py", *BRIEF, *start, cwd=copied.parent)
    shutil.rmtree(copied)
    output = run(*RESUME, "next", cwd=copied.parent)
    assert "| start |" in output and "| orchmoe |" in output


# --------------------------------------------------------------------------------- unusual starts

BRIEF = [*SHORT, "--max-tasks", "2", "--steps", "1", "--eval-instances", "2", "--batch-size", "2"]
HEURISTIC = "eval.py --heuristic copy-demo --max-tasks 2 --limit 8 --out out".split()


@pytest.mark.parametrize("closed, flag, code", [("1>&-", "--help", 0), ("2>&-", "--stepz", 2)])
def test_a_closed_stream_does_no_harm(home, closed, flag, code):
    done = run_shell(command("eval.py", flag), home, f'exec "$@" {closed}')
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")
    done = run_shell(command(*HEURISTIC), home, f'exec "$@" {closed}')
    assert (done.returncode, done.stderr) == (0, "")
    assert len((home / "out/predictions.jsonl").read_text().splitlines()) == 8


def test_letters_that_the_terminal_lacks_do_no_harm(home):
    done = run_shell(command(*HEURISTIC[:-1], "it\u2019s"), home, PYTHONIOENCODING="latin-1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "it\\u2019s/predictions.jsonl" in done.stdout


def test_a_reader_of_stdout_that_leaves_does_no_harm(home):
    """`| head -1` is such a reader."""
    program = subprocess.Popen(
        command(*HEURISTIC),
        cwd=home,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert program.stdout.readline().startswith("device: ")
    program.stdout.close()
    assert (program.stderr.read(), program.wait(timeout=600)) == ("", 0)
    assert (home / "out/scores.json").exists()


def test_a_warning_that_nobody_reads_does_no_harm(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as closed:
        monkeypatch.setattr(sys, "stderr", closed)
        runtime.warn("a warning that nobody reads")
        runtime.warn("another one")


NAMELESS = """
import os, pwd, runpy, sys
pwd.getpwuid = {}.__getitem__  # raises KeyError, as for a user without an entry
del os.environ["HOME"], sys.argv[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_user_needs_no_home_and_no_name(home):
    """The import of NLTK fails where ~ cannot be resolved."""
    words = [sys.executable, "-c", NAMELESS, str(ROOT / "eval.py"), *HEURISTIC[1:]]
    done = run_shell(words, home, XDG_CACHE_HOME=str(home / "cache"))
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in home.iterdir()} == {"sni", "tiny", "out", "cache"}


def printed_commands(output):
    """Return the commands that a run has printed for the user."""
    return [line.split(": ", 1)[1] for line in output.splitlines() if ": python " in line]


def test_printed_commands_are_quoted_for_a_shell(home):
    output = run("train.py", *BRIEF, "--out", "it's my run", cwd=home)
    resume, score = map(shlex.split, printed_commands(output))
    assert resume == [*"python train.py --resume --device cpu --out".split(), "it's my run"]
    assert score == ["python", "eval.py", "--run", "it's my run", "--split", "test"]


@pytest.mark.slow
def test_printed_commands_work_from_another_folder_and_with_spaces_in_paths(tmp_path):
    house = tmp_path / "my house"
    cwd = tmp_path / "my work"
    tools = tmp_path / "bin"
    for folder in (house, cwd, tools):
        folder.mkdir()
    links(house)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, house)
    (tools / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tools / "python").chmod(0o755)

    trained = run_shell([sys.executable, str(house / "train.py"), *BRIEF, "--out", "a run"], cwd)
    assert trained.returncode == 0, trained.stderr
    resume, score = printed_commands(trained.stdout)
    path = f"{tools}:{os.environ['PATH']}"
    for line in (resume, f"{score} --limit 2 --device cpu"):
        done = run_shell([], cwd, line, PATH=path)
        assert done.returncode == 0 and not done.stderr, done.stderr
    assert (cwd / "a run/eval-test-2/scores.json").exists()


@pytest.mark.parametrize("program", ["train.py", pytest.param("eval.py", marks=pytest.mark.slow)])
def test_help_works_without_docstrings(home, program):
    shown = run_shell([sys.executable, "-OO", str(ROOT / program), "--help"], home)
    assert shown.returncode == 0 and " --max-source-length N" in shown.stdout, shown.stderr
