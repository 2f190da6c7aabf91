"""run_folder.py: the lock, config.json, the log, checkpoints, scores, and new folders."""

import math
import multiprocessing
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import train
from baselines import attach_method
from helpers import records, seeded_generator
from orchmoe import OrchMoEConfig
from run_folder import RunConfig, RunFolder, new_folder, read_config
from support import program
from support.program import UserError

# ----------------------------------------------------------------------------------------- the lock


def hold(folder, held):
    """Lock a run and keep it."""
    with folder.lock():
        held.set()
        time.sleep(99)


def test_lock_refuses_a_second_process_until_the_first_is_killed(tmp_path):
    folder = RunFolder(tmp_path)
    context = multiprocessing.get_context("fork")
    held = context.Event()
    first = context.Process(target=hold, args=(folder, held))
    first.start()
    assert held.wait(60)
    with pytest.raises(ValueError, match=f"^{tmp_path}: another process"), folder.lock():
        pass
    first.kill()
    first.join()
    with folder.lock():
        pass


def test_lock_removes_only_half_written_files_of_a_killed_run(tmp_path):
    half_written = tmp_path / ".progress.pt.7.tmp"
    others = [tmp_path / ".somebody.tmp", tmp_path / "other/.scores.json.7.tmp"]
    for path in (half_written, *others):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    with RunFolder(tmp_path).lock():
        assert set(tmp_path.rglob("*.tmp")) == set(others)


def test_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with RunFolder(tmp_path).lock():
        assert "no lock (Function not implemented)" in capsys.readouterr().err


def test_system_without_locks_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(UserError, match="on Windows use WSL"), RunFolder(tmp_path).lock():
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


# -------------------------------------------------------------------------------------- config.json


@pytest.fixture
def config():
    return RunConfig(
        run_dir="",
        training={"model": "tiny", "method": "lora", "start": ""},
        dataset={"data": "sni"},
        adapter={"rank": 2},
        tasks=("task1_a", "task2_b"),
        base="0123",
        tokenizer="4567",
        data={"train": "89ab"},
        kind="LoRA, NoneType",
        rule={},
        start="",
    )


def test_bind_writes_a_config_with_absolute_paths(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The same base and data may have been somewhere else.
    RunFolder("run").bind(
        replace(config, training=config.training | {"model": "elsewhere"}), is_new=True
    )
    RunFolder("run").bind(config, is_new=True)
    assert read_config("run") == replace(
        config,
        run_dir="run",
        training=config.training | {"model": f"{tmp_path}/tiny"},
        dataset={"data": f"{tmp_path}/sni"},
    )


@pytest.mark.parametrize("is_link", [False, True])
def test_bind_refuses_a_folder_with_a_file_that_the_run_writes(config, tmp_path, is_link):
    folder = RunFolder(tmp_path)
    if is_link:
        folder.adapter_path.symlink_to(tmp_path / "not there")  # as to a disk that is gone
    else:
        folder.adapter_path.write_text("an adapter")
    with pytest.raises(UserError, match=f"^{folder.adapter_path}: exists"):
        folder.bind(config, is_new=True)


@pytest.mark.parametrize(
    "name, value",
    [
        ("tasks", ("task1_a",)),
        ("base", "x"),
        ("tokenizer", "x"),
        ("data", {"train": "x"}),
        ("kind", "LoRA, RandomRouter"),
        ("rule", {"forms": ["prompt"]}),
    ],
)
def test_bind_refuses_another_base_or_data_and_changes_nothing(config, tmp_path, name, value):
    folder = RunFolder(tmp_path)
    folder.bind(config, is_new=True)
    before = folder.config_path.read_bytes()
    with pytest.raises(ValueError, match=f"^{tmp_path}: {name} changed since the run began, from"):
        folder.bind(replace(config, **{name: value}), is_new=True)
    assert folder.config_path.read_bytes() == before


# ------------------------------------------------------------------------------------------ the log


def test_load_progress_cuts_the_log_to_where_it_was_saved(trained, tmp_path, capsys):
    folder = RunFolder(tmp_path)
    folder.log(step=0, loss=3.0, entropy=math.nan)
    folder.save_progress(1, 1.25, *trained(seed=1), torch.rand(3, 8))
    folder.log(step=1, loss=2.0)
    with open(folder.log_path, "ab") as file:
        file.write(b'{"step": 2, "lo')
    folder.load_progress(*trained(seed=2), 3)
    assert records(tmp_path) == [{"step": 0, "loss": 3.0, "entropy": None}]  # JSON has no NaN

    assert not capsys.readouterr().err
    folder.log_path.unlink()
    folder.load_progress(*trained(seed=2), 3)
    assert not folder.log_path.exists()
    assert "metrics.jsonl: lines are missing that were there" in capsys.readouterr().err


# -------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def trained(small_t5):
    """Return a function that makes adapters and their optimizer, after a step with noise."""

    def make(seed):
        generator = seeded_generator(seed)
        config = OrchMoEConfig(router_init="normal")
        adapters = attach_method("orchmoe", small_t5, config, generator=generator)
        optimizer = train.make_optimizer(adapters, train.TrainConfig())
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.rand(parameter.shape, generator=generator)
        optimizer.step()
        adapters.detach()
        return adapters, optimizer

    return make


def change_checkpoint(folder, change):
    """Rewrite progress.pt: `change` changes its state in place."""
    state = torch.load(folder.progress_path)
    change(state)
    torch.save(state, folder.progress_path)


def test_load_progress_restores_weights_and_moments_and_no_settings(trained, tmp_path):
    folder = RunFolder(tmp_path)
    adapters, optimizer = trained(seed=1)
    initial_w = torch.rand(3, 8)
    folder.save_progress(7, 1.25, adapters, optimizer, initial_w)
    change_checkpoint(
        folder, lambda state: state["optimizer"]["param_groups"][0].update(eps="x", max_lr=1e9)
    )
    loaded, its_optimizer = trained(seed=2)
    found = folder.load_progress(loaded, its_optimizer, 3)
    states = [loaded.state_dict(), its_optimizer.state_dict()]
    expected = [7, 1.25, initial_w, adapters.state_dict(), optimizer.state_dict()]
    torch.testing.assert_close([*found, *states], expected, rtol=0, atol=0)


def moments(state):
    return state["optimizer"]["state"][0]


OTHER_STATES = {  # changes of progress.pt that keep it a file of tensors
    "no start": lambda state: state.pop("start_w"),
    "a start of other examples": lambda state: state.update(start_w=torch.rand(2, 8)),
    "step as text": lambda state: state.update(step="5"),
    "weights as a list": lambda state: state.update(weights=[]),
    "a moment of another shape": lambda state: moments(state).update(exp_avg=torch.zeros(1)),
    "a missing moment": lambda state: moments(state).pop("exp_avg_sq"),
}


@pytest.mark.parametrize("change", OTHER_STATES.values(), ids=OTHER_STATES)
def test_load_progress_refuses_a_checkpoint_of_something_else(trained, tmp_path, change):
    folder = RunFolder(tmp_path)
    folder.save_progress(7, 1.25, *trained(seed=1), torch.rand(3, 8))
    change_checkpoint(folder, change)
    with pytest.raises(ValueError, match=f"^{folder.progress_path}: .*; restore the file"):
        folder.load_progress(*trained(seed=2), 3)


# ----------------------------------------------------------------------------------------- the rest


def test_only_rank_0_writes(config, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "rank", lambda: 1)
    folder = RunFolder(tmp_path)
    with folder.lock():
        folder.bind(config, is_new=True)
        folder.log(step=0, loss=1.0)
        folder.save_progress(1, 1.0, None, None)
        folder.save_best(config, None)
        folder.add_scores("lora", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("section", ["training", "dataset", "adapter", None])
def test_config_without_a_field_of_today_is_refused(copied, section):
    path = copied / "config.json"
    values = program.read_json(path)
    fields = values if section is None else values[section]
    name = sorted(fields)[-1]
    del fields[name]
    program.write_json(path, values)
    with pytest.raises(UserError, match=f"config.json: .*: {name} is missing; .* older version"):
        train.saved_settings(read_config(copied))


def test_scores_without_a_loss_are_read(tmp_path):
    folder = RunFolder(tmp_path)
    old = {"seen": {"overall": {"rougeL": 1.0, "exact_match": 2.0}}}
    nan = {"seen": {"overall": {"rougeL": 1.0, "exact_match": 2.0, "loss": math.nan}}}
    folder.add_scores("frozen base", old)
    folder.add_scores("lora", nan)
    nan["seen"]["overall"]["loss"] = None
    assert folder.read_scores() == {"frozen base": old, "lora": nan}
    folder.add_scores("lora", {"seen": {"overall": old["seen"]["overall"] | {"loss": "1"}}})
    with pytest.raises(UserError, match="loss must be a number, not '1'"):
        folder.read_scores()
