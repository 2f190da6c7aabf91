"""What must not be lost, and what must not get in: a full disk, hostile files, code in a pickle; and starts
that are not like others. Everything is refused in one line, in bounded time and memory, and the last good
state stays."""

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
from conftest import ROOT, SHORT, command, environment, links, run, terminate_after, trace
from test_programs import MESSAGES

import checkpoint
import data
import eval as evaluation
import runtime
import tokenizer
import train
from experiments import plot, spans
from experiments.pretrain import random_base

CPU = runtime.Device(torch.device("cpu"), torch.float32, "")

# -------------------------------------------------------------------------------------------------- full disk


def mounted(folder, size):
    """The empty folder as a file system of `size` bytes; skips where this user may not mount."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    try:
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting a small tmpfs is not permitted here")
    except OSError:
        pytest.skip("no mount here")


@pytest.fixture
def small_disk(home):
    """A file system of 4 MB."""
    mounted(home / "disk", 4_000_000)
    yield home / "disk"
    subprocess.run(["umount", "-l", str(home / "disk")], check=True)


LONG = [*SHORT, "--steps", "24", "--eval-every", "8", "--eval-instances", "4"]


def check_kept(folder, before, error, named):
    """The error is one line that names the file, nothing half-written is there, the last state loads."""
    assert error.count("\n") == 1 and re.search(named, error), error
    assert not list(folder.rglob("*.tmp"))
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert checkpoint.unpickle(folder / "checkpoint.pt")["step"] < 24


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_state_and_the_run_goes_on(home, small_disk):
    run("train.py", *LONG, "--out", "whole", cwd=home)
    terminate_after(1, *LONG, cwd=home, out="disk/run")
    folder, junk = small_disk / "run", small_disk / "junk"
    before = (folder / "checkpoint.pt").read_bytes()
    resume = ["train.py", "--resume", "--out", "disk/run", "--device", "cpu"]
    with pytest.raises(OSError), open(junk, "wb", buffering=0) as file:
        while True:
            assert file.write(bytes(4096)), "full"
    os.truncate(junk, junk.stat().st_size - 8192)  # config.json, with the places of now, finds room
    named = r"disk/run/(metrics.jsonl|adapter.safetensors|checkpoint.pt): No space left on device"
    check_kept(folder, before, run(*resume, cwd=home, code=2), named)
    with open(junk, "r+b") as file:
        file.truncate(junk.stat().st_size - 100_000)  # room for the log, not for what is saved beside it
    named = r"disk/run/(adapter.safetensors|checkpoint.pt): No space left on device; not written"
    check_kept(folder, before, run(*resume, cwd=home, code=2), named)
    junk.unlink()
    run(*resume, cwd=home)
    assert trace(folder) == trace(home / "whole")


@pytest.mark.slow
def test_a_limit_on_file_sizes_keeps_the_last_state(home):
    """As a quota does it; a checkpoint is larger than that, adapters and log are smaller."""
    terminate_after(1, *LONG, cwd=home)
    before = (home / "run/checkpoint.pt").read_bytes()
    done = subprocess.run(command("train.py", "--resume", "--out", "run", "--device", "cpu"), cwd=home,
                          env=environment(), capture_output=True, text=True, timeout=600,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000)))
    assert done.returncode == 2, done.stderr
    check_kept(home / "run", before, done.stderr, "run/checkpoint.pt: File too large; not written")


def test_a_full_disk_under_the_token_cache_costs_the_cache_alone(home, copied):
    evaluate = ["eval.py", "--run", "run", "--limit", "8", "--device", "cpu"]
    run(*evaluate, "--out", "wanted", cwd=home)
    mounted(home / "disk", 40_000)
    try:
        done = subprocess.run(command(*evaluate, "--out", "found"), cwd=home, text=True, timeout=600,
                              capture_output=True, env=environment(XDG_CACHE_HOME=str(home / "disk")))
        assert done.returncode == 0 and done.stderr.count("\n") == 1, done.stderr
        assert "disk/orchmoe: no token cache (No space left on device; not written" in done.stderr
        assert not list((home / "disk/orchmoe").iterdir())
    finally:
        subprocess.run(["umount", "-l", str(home / "disk")], check=True)
    wanted, found = (home / out / "predictions.jsonl" for out in ("wanted", "found"))
    assert wanted.read_bytes() == found.read_bytes()


@pytest.mark.parametrize("save", [
    lambda path, ones: train.save_progress(path, *[mock.Mock(state_dict=lambda: ones)] * 2),  # torch's error
    lambda path, ones: checkpoint.write_safetensors(path, {"x": ones}, {"format": "pt"}),
], ids=["torch.save", "safetensors"])  # fmt: skip
def test_a_write_that_fails_is_an_error_of_the_file(tmp_path, save):
    save(tmp_path / "file", torch.ones(9))
    before, limits = (tmp_path / "file").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large; not written") as refusal:
            save(tmp_path / "file", torch.ones(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert refusal.value.filename == str(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------------------------------------- hostile files


@pytest.fixture
def bounded():
    """Whatever the test does takes at most 5 seconds of its own time and 500 MB."""
    with contextlib.suppress(OSError):  # Linux: the peak of a test before would hide this one's
        Path("/proc/self/clear_refs").write_text("5")
    peak, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert time.process_time() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 500_000  # kB


def sparse(path, size, head=b""):
    """A file that claims `size` bytes and takes none."""
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(size)


def test_the_largest_config_that_is_believed_is_refused_before_it_allocates(tmp_path, bounded):
    config = json.loads((ROOT / "tiny/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"d_model": 2**16, "vocab_size": 2**22}))
    with pytest.raises(ValueError, match=f"^{tmp_path}/config.json: describes .* bytes of weights, but"):
        random_base(str(tmp_path), 0, CPU)


def read_run_of(path):
    return evaluation.Run.read(path.parent)


def read_model_of(path):
    return checkpoint.config(path.parent)


def read_folder_of(path):
    return checkpoint.read_folder(path.parent)


def read_text(path):
    return spans.TextStream(path, tokenizer.load("tiny"), length=8, seed=0)


DEEP, SURROGATE = b"[" * 100_000, b'{"model_type": "\\ud800"}'
TEXTS = {"deep": DEEP, "surrogate": SURROGATE, "NUL": b"\0", "not UTF-8": b'{"a": "\xff"}', "empty": b"",
         "digits": b"9" * 10_000, "list": b"[]", "pickle": pickle.dumps({})}


@pytest.mark.parametrize("content", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("read", [read_model_of, data.read_task, read_run_of],
                         ids=["model", "task", "run"])
def test_what_is_no_config_is_refused_in_one_line(tmp_path, bounded, read, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{tmp_path}/config.json: ") as refusal:
        read(tmp_path / "config.json")
    assert "\n" not in str(refusal.value) and str(refusal.value).isprintable()


ENDLESS = {"config.json": read_model_of, "run.json": runtime.read_json, "task1_a.json": data.read_task,
           "spiece.model": tokenizer.load, "a.safetensors": checkpoint.read_safetensors,
           "checkpoint.pt": checkpoint.unpickle, "pytorch_model.bin": read_folder_of}


@pytest.mark.parametrize("name, read", ENDLESS.items(), ids=ENDLESS)
def test_files_of_a_terabyte_are_refused_before_they_are_read(tmp_path, bounded, name, read):
    sparse(tmp_path / name, 2**40, b'{"a": "')
    with pytest.raises(ValueError, match=f"^{tmp_path / name}: "):
        read(tmp_path / name)


# ------------------------------------------------------------------------------------------- code in a pickle


class Bomb:
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
    """The examples of sni/, whose token cache, whatever its name, is the content of `path`."""
    raw, config, words = path.read_bytes(), data.DataConfig(data="sni", max_tasks=1), tokenizer.load("tiny")
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(path.parent / "c")):
        whole = [example.id for example in data.load_sets(config, words, ["dev"])["dev"]]
        (cache,) = (path.parent / "c/orchmoe").iterdir()
        cache.write_bytes(raw)
        assert [example.id for example in data.load_sets(config, words, ["dev"])["dev"]] == whole
    raise ValueError("the cache was made again")


def load_lora(path):
    if path.name != "adapter_config.json":
        said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "base"}
        (path.parent / "adapter_config.json").write_text(json.dumps(said))
    return checkpoint.load_peft(path.parent)


PLACES = {
    "pytorch_model.bin": read_folder_of,
    "model.safetensors": read_folder_of,
    "model.safetensors.index.json": read_folder_of,
    "adapter.safetensors": checkpoint.load_adapter,
    "checkpoint.pt": checkpoint.unpickle,
    "config.json": read_run_of,
    "model/config.json": read_model_of,
    "adapter_config.json": load_lora,
    "adapter_model.safetensors": load_lora,
    "adapter_model.bin": load_lora,
    "spiece.model": tokenizer.load,
    "tokenizer.model": tokenizer.load,
    "tokenizer.json": tokenizer.load,
    "task1_a.json": data.read_task,
    "splits/default/train_tasks.txt": lambda path: data.read_splits(path.parents[2]),
    "scores.json": runtime.read_json,
    "metrics.jsonl": lambda path: plot.records(path.parent),
    "text.txt": read_text,
    "text.xz": read_text,
    "x.tokens": load_cached,
}  # fmt: skip


@pytest.mark.parametrize("form", ["pickle", "torch.save", "legacy"])
@pytest.mark.parametrize("name", PLACES)
def test_no_file_that_is_read_runs_code(home, monkeypatch, form, name):
    monkeypatch.chdir(home)
    path = home / "hostile" / name
    path.parent.mkdir(parents=True)
    bomb = {"step": 1, "weights": Bomb(home / "ran")}
    path.write_bytes(pickled(bomb, form))
    with pytest.raises(ValueError):
        PLACES[name](path)
    assert not (home / "ran").exists()
    pickle.loads(pickle.dumps(bomb))
    assert (home / "ran").exists()  # it would have run


def test_an_archive_on_several_disks_is_refused(tmp_path):
    """Of which zipfile itself complains, when it is only asked whether the file is an archive."""
    torch.save({"step": 1}, tmp_path / "state.pt")
    raw = bytearray((tmp_path / "state.pt").read_bytes())
    raw[raw.rindex(b"PK\x06\x07") + 16] = 7  # the number of disks in zip64's locator
    (tmp_path / "state.pt").write_bytes(raw)
    with pytest.raises(ValueError, match="state.pt: refused, not a file of tensors alone"):
        checkpoint.unpickle(tmp_path / "state.pt")


def test_there_is_no_other_way_in():
    """torch.load with weights_only alone, and nothing else that could run what a file says."""
    for path in (*ROOT.glob("*.py"), *ROOT.glob("experiments/*.py")):
        source = path.read_text(encoding="utf-8")
        assert source.count("torch.load(") == source.count("weights_only=True"), path
        called = r"pickle\.loads?|np\.load|marshal\.\w+|(?<![.\w])eval|(?<![.\w])exec"
        assert not re.search(rf"\b(?:{called})\(", source), path


# ---------------------------------------------------------------------------------------- hostile run folders


ADAPTERS = {  # what the file says of itself -> words of the refusal
    "another method": ({"method": "lora"}, "its method, 'lora', is not the run's; restore it"),
    "base": ({"base": "0" * 16}, "its base, '0{16}', is not the run's"),
    "other tasks": ({"order": ["task1"]}, "its tasks, ..task1.., is not the run's"),
    "rank": ({"rank": 3}, "skill_A is .*, here .*not what its config describes"),
    "K": ({"tasks": 9}, "allocation is .*, here "),
    "S a terabyte": ({"skills": 4096, "rank": 4096}, "adapter state: .* is "),
    "S beyond": ({"skills": 2**20}, r"allocation is \(20, 8, 4\), here "),
    "S without end": ({"skills": 10**12}, "skills: 10{12} must be 1 to 2.20"),
    "alpha without end": ({"alpha": 10**400}, "alpha: 10+"),
    "S a text": ({"skills": "4"}, "skills: '4' is of another type"),
    "S true": ({"skills": True}, "skills: True is of another type"),
    "targets a text": ({"targets": "q"}, "targets: 'q' is of another type"),
    "a target that is nowhere": ({"targets": ["z"]}, "no Linear is named z"),
    "router": ({"router": "oracle"}, "router: 'oracle' is of another type, or no choice"),
    "alpha": ({"alpha": -1.0}, "alpha: -1.0 must be"),
    "unknown field": ({"code": "os"}, "got an unexpected keyword argument 'code'"),
}


@pytest.mark.parametrize("change, words", ADAPTERS.values(), ids=ADAPTERS)
def test_adapters_that_are_not_what_they_say_are_refused_by_name(copied, bounded, change, words):
    path = copied / "adapter.safetensors"
    state, info = checkpoint.load_adapter(path)
    state = {name: tensor.clone() for name, tensor in state.items()}
    outer = {name: value for name, value in change.items() if name in info and name != "tasks"}
    inner = {name: value for name, value in change.items() if name not in (*outer, "order")}
    outer |= {"tasks": change["order"]} if "order" in change else {}
    checkpoint.save_adapter(path, state, **{**info, "config": {**info["config"], **inner}, **outer})
    with pytest.raises(ValueError, match=words) as refusal:
        evaluation.load(CPU, run=copied)
    assert str(refusal.value).startswith(f"{path}: ") and "\n" not in str(refusal.value)


STATES = {  # a training state of the right type, but not of this run
    "no step": lambda state: state.pop("step"),
    "step a text": lambda state: state.update(step="5"),
    "weights a list": lambda state: state.update(weights=[]),
    "a name missing": lambda state: state["weights"].pop("allocation"),
    "no tensor": lambda state: state["weights"].update(allocation=3),
    "a shape": lambda state: state["weights"].update(allocation=torch.zeros(2, 2)),
    "no moments": lambda state: state["optimizer"].pop("state"),
    "a moment's shape": lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.zeros(1)),
    "a moment missing": lambda state: state["optimizer"]["state"][0].pop("exp_avg_sq"),
}


@pytest.mark.parametrize("change", STATES.values(), ids=STATES)
def test_training_states_of_something_else_are_refused(copied, change):
    path = copied / "checkpoint.pt"
    state = checkpoint.unpickle(path)
    change(state)
    with runtime.atomic_write(path) as file:  # what `state` maps stays
        torch.save(state, file)
    saved = vars(evaluation.Run.read(copied))
    configs = {name: runtime.from_json(cls, saved[name], "") for name, cls in train.CONFIGS.items()}
    with pytest.raises(ValueError) as refusal:
        train.run(copied, configs, CPU)
    assert str(refusal.value).startswith(f"{path}: not ") and "\n" not in str(refusal.value)


def test_fields_that_an_older_run_does_not_say_have_their_defaults(copied):
    where = train.PlaceConfig(out=str(copied), resume=True)
    before, config = train.read_configs({}, where), json.loads((copied / "config.json").read_text())
    for section, field in (("train", "trainable"), ("data", "explanation"), ("adapter", "router_dropout")):
        del config[section][field]
    del config["torch"], config["pretrain"]
    (copied / "config.json").write_text(json.dumps(config))
    assert train.read_configs({}, where) == before


def test_settings_of_a_training_state_are_not_believed(copied):
    path = copied / "checkpoint.pt"
    state = checkpoint.unpickle(path)
    for group in state["optimizer"]["param_groups"]:
        group.update(eps="nonsense", max_lr=1e9)
    with runtime.atomic_write(path) as file:
        torch.save(state, file)
    config = train.TrainConfig()
    base, adapters, _ = evaluation.load(CPU, run=copied)
    optimizer = train.make_optimizer(adapters, config)
    train.load_progress(path, adapters, optimizer)
    expected = [config.lr_skills, config.lr_router, config.lr_allocation]
    assert [group["max_lr"] for group in optimizer.param_groups] == expected
    assert all(group["eps"] == 1e-8 for group in optimizer.param_groups) and optimizer.state


RUNS = {("train", "seed"): "0", ("train", "steps"): "8", ("train", "method"): 3, ("train", "lr_skills"): None,
        ("train", "stepz"): 8, ("data", "num_pos"): [2], ("data", "data"): 7, ("data", "num_neg"): -1,
        ("adapter", "rank"): 0, ("adapter", "targets"): "q", ("train", "schedule"): "cosine",
        ("train", "lr_router"): 10**400, ("train", "loras"): [1]}


@pytest.mark.parametrize("field, value", RUNS.items(), ids=str)
def test_a_run_with_other_types_or_sizes_is_refused_by_name(copied, bounded, field, value):
    config = json.loads((copied / "config.json").read_text())
    section = config
    for name in field[:-1]:
        section = section[name]
    section[field[-1]] = value
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"config.json: .*{field[-1].replace('_', '.')}"):
        train.read_configs({}, train.PlaceConfig(out=str(copied), resume=True))


# ------------------------------------------------------------------------------------------------- odd starts

BRIEF = ["--device", "cpu", "--max-tasks", "2", "--steps", "1", "--eval-instances", "2", "--batch-size", "2"]
HEURISTIC = ["eval.py", "--heuristic", "copy-demo", "--max-tasks", "2", "--limit", "8", "--out", "out"]


def start(words, cwd, line='exec "$@"', **more):
    """What became of a command in a process of its own, started by a line of shell."""
    return subprocess.run(["sh", "-c", line, "sh", *words], cwd=cwd, env=environment(**more), text=True,
                          capture_output=True, timeout=600)  # fmt: skip


@pytest.mark.parametrize("closed, flag, code", [("1>&-", "--help", 0), ("2>&-", "--stepz", 2)])
def test_what_a_closed_stream_would_say_goes_nowhere(home, closed, flag, code):
    said = start(command("eval.py", flag), home, f'exec "$@" {closed}')
    assert (said.returncode, said.stdout, said.stderr) == (code, "", "")
    done = start(command(*HEURISTIC), home, f'exec "$@" {closed}')
    assert (done.returncode, done.stderr) == (0, "")
    assert len((home / "out/predictions.jsonl").read_text().splitlines()) == 8


def test_letters_that_the_terminal_does_not_have_cost_no_run(home):
    done = start(command(*HEURISTIC[:-1], "it\u2019s"), home, PYTHONIOENCODING="latin-1")
    assert (done.returncode, done.stderr) == (0, "") and "it\\u2019s/predictions.jsonl" in done.stdout


def test_a_reader_that_leaves_early_costs_no_run(home):
    """As `| head -1` does."""
    started = subprocess.Popen(command(*HEURISTIC), cwd=home, env=environment(), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert started.stdout.readline().startswith("device: ")
    started.stdout.close()
    assert (started.stderr.read(), started.wait(timeout=600)) == ("", 0)
    assert (home / "out/scores.json").exists()


def test_a_warning_that_nobody_reads_costs_no_run(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as gone:
        monkeypatch.setattr(sys, "stderr", gone)
        runtime.warn("a warning that nobody reads")
        runtime.warn("nor this")


NAMELESS = """
import os, pwd, runpy, sys
pwd.getpwuid = {}.__getitem__  # KeyError, as for a user without an entry
del os.environ["HOME"], sys.argv[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_user_without_home_and_name(home):
    """Whose ~ is nowhere, which NLTK's import does not bear."""
    words = [sys.executable, "-c", NAMELESS, str(ROOT / "eval.py"), *HEURISTIC[1:]]
    done = start(words, home, XDG_CACHE_HOME=str(home / "cache"))
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in home.iterdir()} == {"sni", "tiny", "out", "cache"}


def test_the_commands_that_a_run_says_are_for_a_shell(home):
    out = run("train.py", *BRIEF, "--out", "it's my run", cwd=home)
    said = [shlex.split(line.split(": ", 1)[1]) for line in out.splitlines() if ": python " in line]
    assert said == [["python", "train.py", "--resume", "--device", "cpu", "--out", "it's my run"],
                    ["python", "eval.py", "--run", "it's my run", "--split", "test"]]  # fmt: skip


@pytest.mark.slow
def test_programs_in_a_path_with_spaces_started_from_elsewhere(tmp_path):
    """What they say is run as it stands."""
    house, cwd, tools = (tmp_path / name for name in ("my house", "my work", "bin"))
    for folder in (house, cwd, tools):
        folder.mkdir()
    for path in links(house) and ROOT.glob("*.py"):
        shutil.copy(path, house)
    (tools / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tools / "python").chmod(0o755)
    trained = start([sys.executable, str(house / "train.py"), *BRIEF, "--out", "a run"], cwd)
    assert trained.returncode == 0, trained.stderr
    commands = [line.split(": ", 1)[1] for line in trained.stdout.splitlines() if ": python " in line]
    assert len(commands) == 2
    for line, few in zip(commands, ([], ["--limit", "2", "--device", "cpu"]), strict=True):
        done = start(few, cwd, f'{line} "$@"', PATH=f"{tools}:{os.environ['PATH']}")
        assert done.returncode == 0 and not done.stderr, done.stderr
    assert (cwd / "a run/eval-test-2/scores.json").exists()


OPTIMISED = """
import contextlib, importlib, io, json, runtime, shlex, sys, train
train.train, ended = None, {}
for line in sys.argv[1:]:
    program, *words = shlex.split(line)
    sys.argv[1:] = ["--max-tasks", "1", *words]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            runtime.run_program(importlib.import_module(program.removesuffix(".py").replace("/", ".")).main)
        except SystemExit as end:
            ended[line] = end.code, said.getvalue()
        except Exception as error:
            ended[line] = 1, repr(error)
json.dump(ended, sys.stderr)
"""


@pytest.mark.parametrize("program", ["train.py", pytest.param("eval.py", marks=pytest.mark.slow)])
def test_help_without_docstrings(home, program):
    shown = start([sys.executable, "-OO", str(ROOT / program), "--help"], home)
    assert shown.returncode == 0 and " --max-source-length N" in shown.stdout, shown.stderr


@pytest.mark.slow
def test_no_assert_is_what_refuses_bad_input(home):
    """Every third mistake of the table."""
    (home / "file").write_text("a file")
    lines = {line: words for line, words in MESSAGES.items() if line.startswith(("train.py", "eval.py"))}
    done = start([sys.executable, "-OO", "-c", OPTIMISED, *list(lines)[::3]], home, PYTHONPATH=str(ROOT))
    ended = json.loads(done.stderr)
    assert len(ended) > 20
    for line, (code, said) in ended.items():
        assert code == 2 and said.count("\n") == 1 and f"error: {lines[line]}" in said, (line, said)
