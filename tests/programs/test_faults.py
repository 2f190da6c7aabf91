"""Test full disks, hostile files, and code in pickles.

Bad input is refused in one line, and the last good state stays.
"""

import contextlib
import pickle
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch

import checkpoint
import run_folder
import train
from helpers import (
    CPU,
    RESUME,
    ROOT,
    SHORT,
    change_config,
    interrupted,
    refusal,
    refused,
    run,
    text_of,
)
from run_folder import Run

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
    start = f"train.py {SHORT} --steps 12 --eval-every 2 --eval-instances 4 --out run"
    with interrupted(train, "train_step", 11):
        run(start, code=130)
    folder = home / "run"
    before = (folder / "progress.pt").read_bytes()
    for name in ("metrics.jsonl", "adapter.safetensors", "progress.pt"):
        size = (folder / name).stat().st_size
        with largest_file(size - 1):
            refused(f"run/{name}: File too large; not written", f"{RESUME} run")
        assert (folder / "progress.pt").read_bytes() == before
        assert not list(folder.rglob("*.tmp"))
    run(f"{RESUME} run")


# --------------------------------------------------------------------------------- hostile files


class Bomb:
    """Unpickling this object makes the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [pickle.dump, torch.save])
def test_no_file_can_run_code(tmp_path, save):
    """The next test shows that no other file is unpickled."""
    bomb = {"step": 1, "weights": Bomb(tmp_path / "exploded")}
    path = tmp_path / "progress.pt"
    with open(path, "wb") as file:
        save(bomb, file)
    with refusal(f"^{path}: refused, it is damaged"):
        checkpoint.read_torch(path)
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


def test_a_run_needs_its_adapter(copied):
    (copied / "adapter.safetensors").unlink()
    missing = "run/adapter.safetensors: does not exist; restore it, or resume the run if it was"
    refused(missing, f"{RESUME} run")


CONFIGS = [  # changed settings, file that the message names, words of the message
    ({"skills": 4096, "rank": 4096}, "adapter.safetensors", "skills is 4,"),  # a terabyte
    ({"alpha": 10**400}, "config.json", "alpha"),
    ({"skills": True}, "config.json", "skills: True"),
    ({"lr_router": 10**400}, "config.json", "lr_router"),
    ({"stepz": 8}, "config.json", "'stepz' is unknown"),
    ({"schedule": "cosine"}, "config.json", "schedule"),
    ({"num_neg": -1}, "config.json", "num_neg"),
]


@pytest.mark.parametrize("change, file, words", CONFIGS, ids=str)
def test_a_run_with_a_bad_setting_is_refused(copied, change, file, words):
    change_config(copied, "settings", **change)
    with refusal(f"^{copied / file}: .*({words})"):
        run_folder.load(CPU, run_dir=copied)


def test_a_run_that_another_process_has_just_made_is_not_overwritten(finished, home, monkeypatch):
    open_now = Run.open

    def wait_and_open(self):
        shutil.copytree(finished / "run", self.path)
        return open_now(self)

    monkeypatch.setattr(Run, "open", wait_and_open)
    message = "train.py: error: run: seed is 1, but the run has 0"
    refused(message, f"train.py {SHORT} --seed 1 --out run")
    for name in ("config.json", "progress.pt"):
        assert (home / "run" / name).read_bytes() == (finished / "run" / name).read_bytes()


def test_a_run_can_be_resumed_without_the_run_that_it_started_from(copied):
    sizes = "--max-tasks 2 --eval-instances 2 --batch-size 2"
    start = f"train.py --start run {SHORT} {sizes} --out next"
    with interrupted(train, "train_step", 1, KeyboardInterrupt):  # as a kill
        run(start, code=130)
    shutil.rmtree(copied)
    output = run(f"{RESUME} next")
    assert "| start |" not in output and "| orchmoe |" in output
