"""run_folder.py: the lock, what a run is bound to, the log, checkpoints, and new folders."""

import copy
import json
import math
import multiprocessing
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace

import pytest
import torch

import checkpoint
import train
from baselines import attach_method
from helpers import PT, check_equal, records, refusal, seeded_generator
from orchmoe import OrchMoEConfig
from run_folder import Progress, Run, Settings, new_folder, read_run, unread_settings
from support import program
from support.program import UserError

FACTS = {
    "base": "0123",
    "tokenizer": "4567",
    "method": "LoRA, NoneType",
    "tasks": ["task1_a", "task2_b"],
    "train_tasks": "89ab",
    "test_tasks": "",
    "held_out": "",
    "start": None,
}
SETTINGS = Settings(model="tiny", method="lora", data="sni", rank=3, targets=("q",))


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path, SETTINGS, FACTS)


# ----------------------------------------------------------------------------------------- the lock


def hold(run, held):
    """Lock a run and keep it."""
    with run.lock():
        held.set()
        time.sleep(99)


def test_lock_refuses_a_second_process_until_the_first_is_killed(run):
    context = multiprocessing.get_context("fork")
    held = context.Event()
    first = context.Process(target=hold, args=(run, held))
    first.start()
    assert held.wait(60)
    with refusal(f"^{run.path}: another process"), run.lock():
        pass
    first.kill()
    first.join()
    with run.lock():
        pass


def test_lock_removes_only_half_written_files_of_a_killed_run(run, tmp_path):
    half_written = tmp_path / ".progress.pt.7.tmp"
    others = [tmp_path / ".somebody.tmp", tmp_path / "other/.scores.json.7.tmp"]
    for path in (half_written, *others):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    with run.lock():
        assert set(tmp_path.rglob("*.tmp")) == set(others)


def test_file_system_without_locks_gives_a_warning(run, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with run.lock():
        assert "no lock (Function not implemented)" in capsys.readouterr().err


def test_a_system_without_locks_is_refused(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with refusal("on Windows use WSL", UserError), run.lock():
        pass


# --------------------------------------------------------------------------------------- new_folder


def test_simultaneous_starts_get_a_folder_each(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(new_folder, [f"{tmp_path}/runs/lora"] * 40))
    assert sorted(folders) == sorted(tmp_path / f"runs/lora-{n}" for n in range(1, 41))


def test_new_folder_below_a_dangling_link_is_an_error(tmp_path):
    (tmp_path / "lost").symlink_to(tmp_path / "not there")  # as to a disk that is gone
    with pytest.raises(FileExistsError):
        new_folder(f"{tmp_path}/lost/lora")


# --------------------------------------------------------------------------------- what binds a run


def test_bind_writes_settings_with_absolute_paths_and_the_facts(tmp_path):
    # The same base and data may have been somewhere else.
    Run("run", replace(SETTINGS, model="elsewhere"), FACTS).bind()
    Run("run", SETTINGS, FACTS).bind()
    saved = read_run("run")
    places = {"model": f"{tmp_path}/tiny", "data": f"{tmp_path}/sni"}
    assert saved.settings == replace(SETTINGS, **places)
    assert saved.facts == FACTS


def test_bind_refuses_a_folder_with_a_file_that_the_run_writes(run, tmp_path):
    run.adapter_path.symlink_to(tmp_path / "not there")  # as to a disk that is gone
    with refusal(f"^{run.adapter_path}: exists", UserError):
        run.bind()


@pytest.mark.parametrize("name", FACTS)
def test_bind_refuses_another_fact_and_changes_nothing(run, tmp_path, name):
    run.bind()
    before = run.config_path.read_bytes()
    other = Run(tmp_path, SETTINGS, FACTS | {name: "x"})
    with refusal(f"^{tmp_path}: {name} is .*, but the run began with "):
        other.bind()
    assert run.config_path.read_bytes() == before


# Other paths, another start (whose adapter is a fact) and compiled blocks leave the run the same.
SAME_RUN = {"model", "data", "test", "start", "compile"}


def test_the_id_of_a_run_depends_on_every_setting_but_paths(run):
    same = set()
    for field in fields(Settings):
        settings = replace(SETTINGS)
        vars(settings)[field.name] = "another value"  # of whatever type
        if Run(run.path, settings, FACTS).run_id == run.run_id:
            same.add(field.name)
    assert same == SAME_RUN


def test_the_id_of_a_run_depends_on_every_fact(run):
    ids = {Run(run.path, SETTINGS, FACTS | {name: "x"}).run_id for name in FACTS}
    assert len(ids - {run.run_id}) == len(FACTS)


# ------------------------------------------------------------------------------------------ the log


def test_resume_cuts_the_log_to_where_it_was_saved(run, trained):
    run.log(step=0, loss=3.0, entropy=math.nan)
    run.save_progress(Progress(1), *trained(seed=1))
    run.log(step=1, loss=2.0)
    with open(run.log_path, "ab") as file:
        file.write(b'{"step": 2, "lo')
    run.resume(*trained(seed=2))
    assert records(run.path) == [{"step": 0, "loss": 3.0, "entropy": None}]  # JSON has no NaN

    run.log_path.unlink()
    run.resume(*trained(seed=2))  # the lines are lost, and the run goes on
    assert not run.log_path.exists()


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
    saved = Progress(7, math.inf, torch.rand(3, 8))
    run.save_progress(saved, adapters, optimizer)
    loaded, its_optimizer = trained(seed=2)
    found = run.resume(loaded, its_optimizer)
    states = [loaded.state_dict(), its_optimizer.state_dict()]
    expected = [vars(saved), adapters.state_dict(), optimizer.state_dict()]
    check_equal([vars(found), *states], expected)


DAMAGES = {  # changes of progress.pt that keep it a file of tensors
    "no id": lambda state: {"progress": state["progress"]},
    "the id of another run": lambda state: state | {"run_id": "0" * 16},
    "unknown progress": lambda state: state | {"progress": {"step": 1}},
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_resume_refuses_a_damaged_or_foreign_file(run, trained, damage):
    run.save_progress(Progress(7), *trained(seed=1))
    torch.save(damage(torch.load(run.progress_path)), run.progress_path)
    with refusal(f"^{run.progress_path}: .*restore the file, or train"):
        run.resume(*trained(seed=2))


def test_the_best_adapter_says_what_it_is_and_belongs_to_its_run(run, trained):
    adapters, _ = trained(seed=1)
    run.save_best(adapters)
    _, metadata = checkpoint.read_safetensors(run.adapter_path)
    about = json.loads(metadata["adapter"])
    assert about["base"] == FACTS["base"] and about["method"] == FACTS["method"]
    assert OrchMoEConfig(**about["config"] | {"targets": ("q",)}).rank == 3
    loaded, _ = trained(seed=2)
    run.load_best(loaded)
    check_equal(loaded.state_dict(), adapters.state_dict())

    other = Run(run.path, replace(SETTINGS, alpha=7.0), FACTS)
    with refusal(f"^{run.adapter_path}: belongs to another run, with oth", UserError):
        other.read_best()
    checkpoint.write_safetensors(run.adapter_path, {}, PT)
    with refusal(f"^{run.adapter_path}: KeyError: 'adapter'; restore the", UserError):
        run.read_best()


# ----------------------------------------------------------------------------------------- the rest


def test_only_rank_0_writes(run, monkeypatch):
    monkeypatch.setattr(program, "rank", lambda: 1)
    with run.lock():
        run.bind()
        run.log(step=0, loss=1.0)
        run.save_progress(Progress(), None, None)
        run.save_best(None)
        run.add_scores("lora", {})
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
