"""run_folder.py: the lock, the identity of a run, the log, checkpoints, and new folders."""

import copy
import math
import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

import checkpoint
import train
from baselines import attach_method
from helpers import PT, check_equal, records, refusal, seeded_generator
from orchmoe import OrchMoEConfig
from run_folder import (
    NOT_BOUND,
    Progress,
    Run,
    Settings,
    new_folder,
    read_run,
    unread_settings,
)
from support import program
from support.program import UserError

FACTS = {
    "base": "0123",
    "tokenizer": "4567",
    "method_class": "LoRA",
    "tasks": ["task1_a", "task2_b"],
    "train_tasks": "89ab",
    "test_tasks": "",
    "held_out": "",
}
SETTINGS = Settings(model="tiny", method="lora", data="sni", rank=3, targets=("q",))


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path, SETTINGS, FACTS)


# ----------------------------------------------------------------------------------------- the lock


def hold(run, held):
    """Lock a run and keep it."""
    with run.open():
        held.set()
        time.sleep(99)


def test_lock_refuses_a_second_process_until_the_first_is_killed(run):
    context = multiprocessing.get_context("fork")
    held = context.Event()
    first = context.Process(target=hold, args=(run, held))
    first.start()
    assert held.wait(60)
    with refusal(f"^{run.path}: another process"), run.open():
        pass
    first.kill()
    first.join()
    with run.open():
        pass


def test_lock_removes_only_half_written_files_of_a_killed_run(run, tmp_path):
    half_written = tmp_path / ".progress.pt.7.tmp"
    others = [tmp_path / ".somebody.7.tmp", tmp_path / "other/.scores.json.7.tmp"]
    for path in (half_written, *others):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    with run.open():
        assert set(tmp_path.rglob("*.tmp")) == set(others)


def test_file_system_without_locks_gives_a_warning(run, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with run.open():
        assert "no lock (Function not implemented)" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- new_folder


def test_simultaneous_starts_get_a_folder_each(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(new_folder, [f"{tmp_path}/runs/lora"] * 40))
    assert sorted(folders) == sorted(tmp_path / f"runs/lora-{n}" for n in range(1, 41))


def test_new_folder_below_a_dangling_link_is_an_error(tmp_path):
    (tmp_path / "lost").symlink_to(tmp_path / "not there")  # as to a disk that is gone
    with pytest.raises(FileExistsError):
        new_folder(f"{tmp_path}/lost/lora")


# ------------------------------------------------------------------------------ identity of a run


def bind(run):
    """Write config.json, or compare with it."""
    with run.open():
        pass


def test_config_has_settings_with_absolute_paths_and_the_facts(tmp_path):
    # The same base and data may have been somewhere else.
    bind(Run(Path("run"), replace(SETTINGS, model="elsewhere"), FACTS))
    bind(Run(Path("run"), SETTINGS, FACTS))
    saved = read_run("run")
    places = {"model": f"{tmp_path}/tiny", "data": f"{tmp_path}/sni"}
    assert saved.settings == replace(SETTINGS, **places)
    assert saved.facts == FACTS


def test_a_folder_with_a_file_that_the_run_writes_is_refused(run, tmp_path):
    adapter_path = tmp_path / "adapter.safetensors"
    adapter_path.symlink_to(tmp_path / "not there")  # as to a disk that is gone
    with refusal(f"^{adapter_path}: exists", UserError):
        bind(run)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("name", FACTS)
def test_a_folder_with_another_fact_is_refused_and_stays(run, tmp_path, name):
    bind(run)
    before = (tmp_path / "config.json").read_bytes()
    with refusal(f"^{tmp_path}: {name} is .*, but the run has "):
        bind(Run(tmp_path, SETTINGS, FACTS | {name: "x"}))
    assert (tmp_path / "config.json").read_bytes() == before


def test_every_setting_but_paths_is_a_part_of_the_identity(run):
    same = set()
    for field in fields(Settings):
        settings = replace(SETTINGS)
        vars(settings)[field.name] = "another value"  # of whatever type
        if Run(run.path, settings, FACTS).identity == run.identity:
            same.add(field.name)
    paths = {"model", "data", "test", "start"}
    assert same == NOT_BOUND == {*paths, "compile", "accumulate", "checkpoint_blocks"}


# ------------------------------------------------------------------------------------------ the log


def test_resume_cuts_the_log_to_where_it_was_saved(run, trained):
    log_path = run.path / "metrics.jsonl"
    run.log(step=0, loss=3.0, entropy=math.nan)
    run.save_progress(Progress(1), *trained(seed=1))
    run.log(step=1, loss=2.0)
    with open(log_path, "ab") as file:
        file.write(b'{"step": 2, "lo')
    run.resume(*trained(seed=2))
    assert records(run.path) == [{"step": 0, "loss": 3.0, "entropy": None}]  # JSON has no NaN

    log_path.unlink()
    run.resume(*trained(seed=2))  # the lines are lost, and the run goes on
    assert records(run.path) == []


# -------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def trained(small_t5):
    """Return a function that makes adapters and their optimizer, after a step with noise."""

    def make(seed):
        generator = seeded_generator(seed)
        base = copy.deepcopy(small_t5)
        adapters = attach_method("orchmoe", base, OrchMoEConfig(), generator=generator)
        optimizer = train.make_optimizer(adapters, train.TrainConfig())
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.rand(parameter.shape, generator=generator)
        optimizer.step()
        return adapters, optimizer

    return make


def test_resume_restores_weights_moments_and_progress(run, trained):
    adapters, optimizer = trained(seed=1)
    saved = Progress(7, 2.5)
    run.log(step=6, loss=3.0)
    run.save_progress(saved, adapters, optimizer)
    loaded, its_optimizer = trained(seed=2)
    found = run.resume(loaded, its_optimizer)
    states = [loaded.state_dict(), its_optimizer.state_dict()]
    expected = [vars(saved), adapters.state_dict(), optimizer.state_dict()]
    check_equal([vars(found), *states], expected)


DAMAGES = {  # changes of progress.pt that keep it a file of tensors
    "no identity": lambda state: {"progress": state["progress"]},
    "another identity": lambda state: state | {"run": state["run"] | {"rank": 4}},
    "unknown progress": lambda state: state | {"progress": {"step": 1}},
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_resume_refuses_a_damaged_or_foreign_file(run, trained, damage):
    path = run.path / "progress.pt"
    run.log(step=6, loss=3.0)
    run.save_progress(Progress(7), *trained(seed=1))
    torch.save(damage(torch.load(path)), path)
    with refusal(f"^{path}: .*restore the file, or train"):
        run.resume(*trained(seed=2))


def test_the_best_adapter_belongs_to_its_run(run, trained):
    path = run.path / "adapter.safetensors"
    adapters, _ = trained(seed=1)
    run.save_best(adapters)
    check_equal(run.read_best(), dict(adapters.state_dict()))

    other = Run(run.path, replace(SETTINGS, alpha=7.0), FACTS)
    with refusal(f"^{path}: .*alpha is None, but the run has 7.0", UserError):
        other.read_best()
    checkpoint.write_safetensors(path, {}, PT)
    with refusal(f"^{path}: KeyError: 'run'; restore the", UserError):
        run.read_best()


# ----------------------------------------------------------------------------------------- the rest


def test_only_rank_0_writes(run, monkeypatch):
    monkeypatch.setattr(program, "rank", lambda: 1)
    with run.open():
        run.log(step=0, loss=1.0)
        run.save_progress(Progress(), None, None)
        run.save_best(None)
    assert not list(run.path.iterdir())


@pytest.mark.parametrize("part", ["settings", "facts", None])
def test_config_without_a_part_or_a_setting_of_today_is_refused(copied, part):
    path = copied / "config.json"
    values = program.read_json(path)
    if part is None:
        del values["settings"]["rank"]
    else:
        del values[part]
    program.write_json(path, values)
    with refusal(f"^{path}: .*; name the folder of a run", UserError):
        read_run(copied)


UNREAD = {
    "orchmoe": ({}, {"lr_token_router"}, {"lr_router", "allocation_std"}),
    "token": ({"method": "orchmoe-token"}, {"lr_router"}, {"lr_token_router", "allocation_std"}),
    "lora": ({"method": "lora"}, {"abstract_tasks", "lr_allocation"}, {"rank", "lr_skills"}),
    "jsonl": ({"data": "a.jsonl"}, {"num_pos", "splits"}, {"test"}),
}


@pytest.mark.parametrize("values, unread, read", UNREAD.values(), ids=UNREAD)
def test_settings_that_the_method_or_the_data_do_not_read_are_known(values, unread, read):
    found = unread_settings(Settings(**values)).keys()
    assert unread <= found and not read & found
