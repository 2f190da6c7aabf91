"""Test full disks, hostile files, code in pickles, and unusual ways to start a program.

Bad input is refused in one line, and the last good state stays.
"""

import contextlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
import run_folder
import train
from helpers import CPU, RESUME, ROOT, SHORT, change_config, interrupted, run, text_of
from integrations.peft_folder import load_peft
from run_folder import Run
from support import program


@contextlib.contextmanager
def refusal(path, words=None):
    """Require a ValueError whose message is one printable line that begins with the path."""
    with pytest.raises(ValueError, match=words) as refused:
        yield
    message = str(refused.value)
    assert message.startswith(f"{path}: ") and message.isprintable(), message


# ------------------------------------------------------------------------------------- full disk


@contextlib.contextmanager
def largest_file(size):
    """Let writes beyond `size` bytes of a file fail, as a quota does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_failed_write_leaves_the_last_checkpoint_and_the_run_can_resume(home):
    start = f"train.py {SHORT} --eval-every 2 --eval-instances 4 --out run"
    with interrupted(train, "train_step", 7):
        run(start, cwd=home, code=130)
    folder = home / "run"
    before = (folder / "progress.pt").read_bytes()
    for name in ("metrics.jsonl", "adapter.safetensors", "progress.pt"):
        size = (folder / name).stat().st_size
        with largest_file(size - 1):
            error = run(f"{RESUME} run", cwd=home, code=2)
        assert f"run/{name}: File too large; not written" in error
        assert (folder / "progress.pt").read_bytes() == before
        assert not list(folder.rglob("*.tmp"))
    run(f"{RESUME} run", cwd=home)


# --------------------------------------------------------------------------------- hostile files


def of_folder(read):
    """Return a reader of a file that gives `read` its folder."""
    return lambda path: read(path.parent)


READERS = {
    "pytorch_model.bin": of_folder(checkpoint.read_folder),
    "progress.pt": checkpoint.read_torch,
    "adapter_model.bin": of_folder(load_peft),
}
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "base"}


class Bomb:
    """Unpickling this object makes the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def save_legacy(value, file):
    torch.save(value, file, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("save", [pickle.dump, torch.save, save_legacy])
@pytest.mark.parametrize("name", READERS)
def test_no_file_can_run_code(tmp_path, save, name):
    """The next test shows that no other file is unpickled."""
    bomb = {"step": 1, "weights": Bomb(tmp_path / "exploded")}
    (tmp_path / "adapter_config.json").write_text(json.dumps(LORA))
    path = tmp_path / name
    with open(path, "wb") as file:
        save(bomb, file)
    with refusal(path, "refused, it is damaged"):
        READERS[name](path)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(bomb))
    assert (tmp_path / "exploded").exists()  # so the bomb works


def test_torch_load_with_weights_only_is_the_only_unpickling():
    called = r"\b(pickle\.loads?|np\.load|marshal\.\w+|(?<![.\w])eval|(?<![.\w])exec)\("
    own_file = "exec(code, vars(module))"  # of --method FILE.py:Class
    for path in ROOT.rglob("*.py"):
        if not {"tests", "site-packages"} & set(path.relative_to(ROOT).parts):
            source = text_of(path).replace(own_file, "")
            assert source.count("torch.load(") == source.count("weights_only=True"), path
            assert not re.search(called, source), path


# --------------------------------------------------------------------------- hostile run folders


def test_resumed_run_needs_its_adapter(copied):
    (copied / "adapter.safetensors").unlink()
    error = run(f"{RESUME} run", cwd=copied.parent, code=2)
    missing = "run/adapter.safetensors: does not exist; restore it, resume the run if it was never "
    assert f"{missing}evaluated, or start a new run" in error


CONFIGS = [  # changed settings, file that the message names, words of the message
    ({"skills": 4096, "rank": 4096}, "adapter.safetensors", "belongs to"),  # a terabyte
    ({"alpha": 10**400}, "config.json", "alpha"),
    ({"skills": True}, "config.json", "skills: True"),
    ({"targets": ["z"]}, "adapter.safetensors", "belongs to"),
    ({"seed": "0"}, "config.json", "seed"),
    ({"lr_router": 10**400}, "config.json", "lr_router|lr-router"),
    ({"stepz": 8}, "config.json", "no field 'stepz'"),
    ({"schedule": "cosine"}, "config.json", "schedule"),
    ({"num_neg": -1}, "config.json", "num-neg"),
]


@pytest.mark.parametrize("change, file, words", CONFIGS, ids=str)
def test_a_run_with_a_bad_setting_is_refused(copied, change, file, words):
    change_config(copied, "settings", **change)
    with refusal(copied / file, words):
        run_folder.load(CPU, run_dir=copied)


def test_a_run_that_another_process_has_just_made_is_not_overwritten(finished, home, monkeypatch):
    lock = Run.lock

    def wait_and_lock(self):
        shutil.copytree(finished / "run", self.path)
        return lock(self)

    monkeypatch.setattr(Run, "lock", wait_and_lock)
    error = run(f"train.py {SHORT} --seed 1 --out run", cwd=home, code=2)
    assert error.startswith("train.py: error: run/config.json: belongs to another run, with oth")
    for name in ("config.json", "progress.pt"):
        assert (home / "run" / name).read_bytes() == (finished / "run" / name).read_bytes()


def test_a_run_can_be_resumed_without_the_run_that_it_started_from(copied):
    sizes = "--max-tasks 2 --eval-instances 2 --batch-size 2"
    start = f"train.py --start run {SHORT} {sizes} --out next"
    with interrupted(train, "train_step", 1, KeyboardInterrupt):  # as a kill
        run(start, cwd=copied.parent, code=130)
    shutil.rmtree(copied)
    output = run(f"{RESUME} next", cwd=copied.parent)
    assert "| start |" in output and "| orchmoe |" in output


# --------------------------------------------------------------------------------- unusual starts


def test_a_stdout_of_few_letters_does_no_harm(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stdout)
    with pytest.raises(SystemExit) as end:
        program.run_program(lambda: program.print_line("it\u2019s"))
    assert end.value.code == 0
    assert stdout.buffer.getvalue() == b"it\\u2019s\n"


def test_a_line_that_nobody_reads_does_no_harm():
    """`| head -1` leaves such a stream."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as closed:
        program.print_line("a line that nobody reads", closed)
        program.print_line("another one", closed)
