"""run_folder.py: the lock, config.json, the log, checkpoints, scores, and new folders."""

import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import run_folder
import runtime
import train
from baselines import attach_method
from helpers import ROOT, environment, records, run, stir
from orchmoe import OrchMoEConfig
from run_folder import RunConfig, RunFolder, new_folder, read_config

# ----------------------------------------------------------------------------------------- the lock


def test_second_run_in_a_folder_is_refused_while_the_first_lives(copied):
    holder = (
        "import time, run_folder\n"
        "with run_folder.RunFolder('run').lock(): print(flush=True); time.sleep(99)"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", holder],
        cwd=copied.parent,
        stdout=subprocess.PIPE,
        env=environment(PYTHONPATH=str(ROOT)),
    )
    first.stdout.readline()
    resume = ["train.py", "--resume", "--out", "run", "--device", "cpu"]
    error = run(*resume, cwd=copied.parent, code=2)
    assert "run: another process is writing this run" in error
    assert error.count("\n") == 1
    first.kill()
    first.wait()

    # The kill has freed the lock.
    with RunFolder(copied).lock():
        with pytest.raises(ValueError, match="another process"), RunFolder(copied).lock():
            pass


def test_lock_removes_half_written_files_of_a_killed_run_alone(copied):
    half_written = [copied / ".checkpoint.pt.7.tmp", copied / "model/.config.json.7.tmp"]
    others = [copied / ".somebody.tmp", copied / "other/.scores.json.7.tmp"]
    for path in (*half_written, *others):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    with RunFolder(copied).lock():
        assert not any(path.exists() for path in half_written)
        assert all(path.exists() for path in others)


def test_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_folder.fcntl, "flock", refuse)
    with RunFolder(tmp_path).lock():
        assert "no lock (Function not implemented)" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- new_folder


def test_simultaneous_starts_get_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(new_folder, ["runs/lora"] * 40))
    assert sorted(folders) == sorted(Path(f"runs/lora-{n}") for n in range(1, 41))


def test_new_folder_below_a_dangling_link_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("lost").symlink_to(tmp_path / "not there")  # as to a disk that is gone
    with pytest.raises(FileExistsError):
        new_folder("lost/lora")


# -------------------------------------------------------------------------------------- config.json


@pytest.fixture
def config():
    return RunConfig(
        folder="",
        train={"model": "tiny", "method": "lora", "start": "", "loras": ("a", "b")},
        data={"data": "sni"},
        adapter={"rank": 2},
        tasks=("task1_a", "task2_b"),
        base="0123",
        tokenizer="4567",
        digests={"train": "89ab"},
    )


def test_bind_writes_a_config_with_absolute_paths(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    RunFolder("run").bind(config)
    found = read_config("run")
    expected = replace(
        config,
        folder="run",
        train={
            "model": f"{tmp_path}/tiny",
            "method": "lora",
            "start": "",
            "loras": [f"{tmp_path}/a", f"{tmp_path}/b"],
        },
        data={"data": f"{tmp_path}/sni"},
    )
    assert found == expected
    assert "folder" not in json.loads(Path("run/config.json").read_text())


@pytest.mark.parametrize(
    "name, value",
    [("tasks", ("task1_a",)), ("base", "x"), ("tokenizer", "x"), ("digests", {"train": "x"})],
)
def test_bind_refuses_another_base_or_data_and_changes_nothing(config, tmp_path, name, value):
    folder = RunFolder(tmp_path)
    folder.bind(config)
    before = folder.config_path.read_bytes()
    with pytest.raises(ValueError, match=f"{tmp_path}: {name} changed since the run began"):
        folder.bind(replace(config, **{name: value}))
    assert folder.config_path.read_bytes() == before


def test_bind_accepts_the_same_base_and_data_in_other_places(config, tmp_path):
    folder = RunFolder(tmp_path)
    folder.bind(config)
    moved = replace(config, train=config.train | {"model": "/elsewhere"})
    folder.bind(moved)
    assert read_config(tmp_path).train["model"] == "/elsewhere"


# ------------------------------------------------------------------------------------------ the log


def write_log(folder):
    """Write two steps with an evaluation, and a third step."""
    folder.log(step=0, loss=3.0, entropy=math.nan)
    folder.log(step=1, loss=2.0)
    folder.log(step=1, dev_loss=2.5)
    folder.log(step=2, loss=1.0)


def test_log_has_one_line_of_json_for_each_record(tmp_path):
    write_log(RunFolder(tmp_path))
    assert records(tmp_path) == [
        {"step": 0, "loss": 3.0, "entropy": None},  # JSON has no NaN
        {"step": 1, "loss": 2.0},
        {"step": 1, "dev_loss": 2.5},
        {"step": 2, "loss": 1.0},
    ]


@pytest.mark.parametrize("first_step, lines", [(0, 0), (1, 1), (2, 3), (3, 4), (9, 4)])
def test_truncate_log_keeps_the_lines_before_a_step(tmp_path, first_step, lines):
    folder = RunFolder(tmp_path)
    write_log(folder)
    whole = records(tmp_path)
    folder.truncate_log(first_step)
    assert records(tmp_path) == whole[:lines]


DAMAGE = {
    "half a record": b'{"step": 3, "lo',
    "record without its newline": b'{"step": 3}',
    "two records on one line": b'{"step": 3}{"step": 4}\n',
    "empty line": b"\n",
    "number": b"5\n",
    "step a text": b'{"step": "3"}\n',
    "deep": b"[" * 10**5 + b"\n",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_truncate_log_cuts_before_a_damaged_line(tmp_path, damage):
    folder = RunFolder(tmp_path)
    write_log(folder)
    whole = folder.log_path.read_bytes()
    if damage.endswith(b"\n"):
        damage += b'{"step": 4}\n'  # the lines after a damaged one go, too
    folder.log_path.write_bytes(whole + damage)
    folder.truncate_log(9)
    assert folder.log_path.read_bytes() == whole


def test_truncate_log_without_a_log_does_nothing(tmp_path):
    RunFolder(tmp_path).truncate_log(0)
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def trained(small_t5, inputs):
    """Return a function that attaches adapters and takes one step with them."""

    def make(seed):
        adapters = attach_method("orchmoe", small_t5, OrchMoEConfig(router_init="normal"))
        stir(adapters, runtime.generator(seed))
        adapters.double()
        optimizer = train.make_optimizer(adapters, train.TrainConfig())
        embeddings = small_t5.embed(inputs.input_ids)
        with adapters.routed(embeddings, inputs.attention_mask):
            small_t5.loss(*inputs).backward()
        for group in optimizer.param_groups:
            group["lr"] = group["max_lr"]
        optimizer.step()
        adapters.detach()
        return adapters, optimizer

    return make


def require_equal_states(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, dict):
            require_equal_states(value, other[name])
        else:
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[name]))


def test_load_progress_restores_what_save_progress_wrote(trained, tmp_path):
    folder = RunFolder(tmp_path)
    adapters, optimizer = trained(seed=1)
    start_w = torch.rand(3, 8)
    folder.save_progress(7, 1.25, adapters, optimizer, start_w)

    loaded, its_optimizer = trained(seed=2)
    assert not torch.equal(loaded.Z, adapters.Z)
    step, best, its_start_w = folder.load_progress(loaded, its_optimizer)
    assert (step, best) == (7, 1.25)
    assert torch.equal(its_start_w, start_w)
    require_equal_states(adapters.state_dict(), loaded.state_dict())
    require_equal_states(optimizer.state_dict()["state"], its_optimizer.state_dict()["state"])


def test_load_progress_names_the_file_that_has_no_step(trained, tmp_path):
    folder = RunFolder(tmp_path)
    adapters, optimizer = trained(seed=1)
    for missing in ("step", "best", "weights", "optimizer", "start_w"):
        folder.save_progress(7, 1.25, adapters, optimizer)
        state = torch.load(folder.checkpoint_path, weights_only=True)
        del state[missing]
        torch.save(state, folder.checkpoint_path)
        with pytest.raises(ValueError, match=f"^{folder.checkpoint_path}: .*{missing}"):
            folder.load_progress(adapters, optimizer)


# ----------------------------------------------------------------------------------------- the rest


def test_add_scores_keeps_the_rows_that_are_there(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.add_scores("frozen base", {"seen": {}}) == {"frozen base": {"seen": {}}}
    rows = folder.add_scores("lora", {"seen": {}, "unseen": {}})
    assert list(rows) == ["frozen base", "lora"]
    assert json.loads(folder.scores_path.read_text()) == rows


def test_only_rank_0_writes(trained, config, tmp_path, monkeypatch):
    adapters, optimizer = trained(seed=1)
    monkeypatch.setattr(runtime, "rank", lambda: 1)
    folder = RunFolder(tmp_path)
    with folder.lock():
        folder.bind(config)
        folder.log(step=0, loss=1.0)
        folder.truncate_log(0)
        folder.save_progress(1, 1.0, adapters, optimizer)
        folder.save_best(config, None, adapters, None)
        folder.add_scores("lora", {})
    assert not list(tmp_path.iterdir())
