"""Going on from what is there: a finished run with one part of it training (--start, --trainable), and
existing LoRAs as skills (--loras)."""

import json
import shutil

import pytest
import torch
from conftest import ROOT, process, run, terminate_after, trace

import checkpoint
import eval as evaluation
import runtime
import train

NEW = ["--train-instances", "16", "--steps", "4", "--eval-every", "4", "--batch-size", "8", "--warmup", "0",
       "--device", "cpu", "--eval-instances", "8"]  # fmt: skip
FAST = ["--lr-allocation", "0.1"]


@pytest.fixture
def new(finished, tmp_path):
    """A folder with the finished run and, as `data`, one task that it has not seen."""
    (tmp_path / "run").symlink_to(finished / "run")
    lists = tmp_path / "data/splits/default"
    lists.mkdir(parents=True)
    (tmp_path / "data/tasks").symlink_to(ROOT / "sni/tasks")
    unseen = (ROOT / "sni/splits/default/test_tasks.txt").read_text().split()[0]
    (lists / "train_tasks.txt").write_text(unseen + "\n")
    (lists / "test_tasks.txt").write_text("")
    return tmp_path


def state(folder):
    return checkpoint.load_adapter(folder / "adapter.safetensors")[0]


PARTS = {
    "mixture": (8, {"router.bias", "router.task"}),  # W_task, once: it is zero from then on
    "router": (8 * 160 + 8, {"router.bias", "router.task"}),
    "allocation": (20 * 8 * 4, {"allocation"}),
    "all": (53128, {"router.bias", "router.task", "allocation", "skills"}),
}


@pytest.mark.parametrize("part", PARTS)
def test_that_part_alone_trains(part, new):
    rates = FAST if part != "router" else []
    said = run("train.py", "--start", "run", "--trainable", part, "--data", "data", *NEW, *rates, "--out",
               "on", cwd=new)  # fmt: skip
    count, moved = PARTS[part]
    assert f"= {count:,} parameters train" in said and "| start |" in said and "--split seen\n" in said
    before, after = state(new / "run"), state(new / "on")
    changed = {"skills" if "skill_" in name else name for name in before
               if not torch.equal(before[name], after[name])}  # fmt: skip
    assert changed == moved
    assert "1 dev tasks" in run("eval.py", "--run", "on", "--split", "dev", "--device", "cpu", cwd=new)


def test_a_mixture_begins_at_the_mean_of_the_router_and_is_one_w_for_all_samples(new, monkeypatch):
    monkeypatch.chdir(new)
    place, flags = runtime.pick_device(device="cpu"), {"start": "run", "data": "data", "train_instances": 16}
    configs = train.read_configs(flags, train.PlaceConfig())
    before = train.build(configs, place)
    _, w = evaluation.measure(before.base, before.adapters, before.train_set)
    after = train.build(train.read_configs(flags | {"trainable": "mixture"}, train.PlaceConfig()), place)
    _, mixed = evaluation.measure(after.base, after.adapters, after.sets["dev"])
    torch.testing.assert_close(mixed, w.mean(0).expand_as(mixed))
    assert w.std(0).max() > 1e-3  # else any router would pass


def test_the_start_is_scored_as_the_run_that_it_is(new):
    sizes = ["--eval-instances", "8", "--max-tasks", "4"]  # as the finished run has it
    run("train.py", "--start", "run", *NEW[:-2], *sizes, "--out", "on", cwd=new)
    scores = json.loads((new / "on/scores.json").read_text())
    assert scores["start"] == json.loads((new / "run/scores.json").read_text())["orchmoe"]


def test_a_start_has_kept_its_own_adapters(new, tmp_path):
    shutil.copytree(new / "run", tmp_path / "other")
    path = tmp_path / "other/adapter.safetensors"
    state, saved = checkpoint.load_adapter(path)
    checkpoint.save_adapter(path, state, **saved | {"base": "0" * 16})
    error = run("train.py", "--start", tmp_path / "other", *NEW, "--out", "on", cwd=new, code=2)
    assert "adapter.safetensors: its base, '0000000000000000', is not the run's" in error


@pytest.mark.slow
def test_a_start_that_was_stopped_goes_on_bit_for_bit(new):
    arguments = ["--start", "run", "--trainable", "mixture", "--data", "data", *NEW, "--steps", "12"]
    process("train.py", *arguments, "--out", "whole", cwd=new)
    terminate_after(3, *arguments, cwd=new, out="stopped")
    process("train.py", "--resume", "--out", "stopped", "--device", "cpu", cwd=new)
    assert trace(new / "whole") == trace(new / "stopped")
    whole, stopped = ((new / name / "adapter.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert whole == stopped


def test_a_start_that_was_stopped_before_its_first_checkpoint_goes_on_from_anywhere(new, tmp_path_factory):
    arguments = ["--start", "run", "--trainable", "mixture", "--data", "data", *NEW]
    run("train.py", *arguments, "--out", "on", cwd=new)
    whole = (new / "on/adapter.safetensors").read_bytes()
    for name in ("checkpoint.pt", "adapter.safetensors", "metrics.jsonl", "scores.json"):
        (new / "on" / name).unlink()
    elsewhere = tmp_path_factory.mktemp("x")
    said = run("train.py", "--resume", "--out", new / "on", "--device", "cpu", cwd=elsewhere)
    assert (new / "on/adapter.safetensors").read_bytes() == whole and "| start |" in said
    (new / "on/scores.json").unlink()  # the weights are no longer those of the start, and pass for none
    said = run("train.py", "--resume", "--out", "on", "--device", "cpu", cwd=new)
    assert "| start |" not in said and "| orchmoe |" in said


def test_a_mixture_survives_a_router_that_is_sharp(new, monkeypatch):
    monkeypatch.chdir(new)
    w = torch.eye(8)[:1]
    monkeypatch.setattr(evaluation, "measure", lambda *_args, **_options: (0.0, w))
    flags = {"start": "run", "trainable": "mixture", "data": "data"}
    configs = train.read_configs(flags, train.PlaceConfig())
    parts = train.build(configs, runtime.pick_device(device="cpu"))
    torch.testing.assert_close(parts.adapters.router.bias.softmax(-1), w[0], atol=1e-4, rtol=0)
    assert parts.adapters.router.bias.isfinite().all()


@pytest.fixture(scope="session")
def exported(finished, tmp_path_factory):
    """The finished run as LoRAs; not to be changed."""
    folder = tmp_path_factory.mktemp("exported")
    run("export.py", "--run", finished / "run", "--out", folder / "served", cwd=folder)
    return folder / "served"


@pytest.fixture
def served(new, exported):
    (new / "served").symlink_to(exported)
    return new


def test_loras_are_skills_that_stay_as_they_are(served):
    said = run("train.py", "--loras", "served/abstract-1,served/abstract-2", "--data", "data", *NEW, *FAST,
               "--out", "on", cwd=served)  # fmt: skip
    assert "orchmoe: 0 in skills + 1,608 in routing" in said and "| start |" in said
    after, saved = checkpoint.load_adapter(served / "on/adapter.safetensors")
    assert saved["config"] | {"skills": 2, "rank": 8, "alpha": None, "allocation_std": 0.0} == saved["config"]
    name, theirs = "encoder.blocks.0.attention.q", "encoder.block.0.layer.0.SelfAttention.q"
    for s, lora in enumerate(("abstract-1", "abstract-2")):
        A, B = checkpoint.load_peft(served / "served" / lora).factors[theirs]
        assert torch.equal(after[f"{name}.skill_A"][s], A) and torch.equal(after[f"{name}.skill_B"][s], B.T)
    assert after["allocation"].abs().max() > 0.01  # from 0 on
    assert "dev tasks" in run("eval.py", "--run", "on", "--split", "dev", "--device", "cpu", cwd=served)


@pytest.mark.parametrize("arguments, beginning", [
    (["--trainable", "router"], "--start, which --trainable goes with"),
    (["--start", "run", "--loras", "served/abstract-1"], "--start, which --trainable goes with, and --loras"),
    (["--start", "run", "--rank", "4"], "--rank: comes with --start"),
    (["--start", "run", "--method", "lora"], "--method: comes with --start"),
    (["--start", "nowhere"], "nowhere/config.json: not there"),
    (["--start", "run", "--model", "other"], "not the base that the run in run began with"),
    (["--loras", "served/abstract-1,nowhere"], "nowhere/adapter_config.json: not there"),
    (["--loras", "served/abstract-1,foreign"], "--loras: of different bases"),
    (["--loras", "served/abstract-1", "--targets", "q"],
     "served/abstract-1: 'decoder.block.0.layer.0.SelfAttention.v'"),
    (["--start", "run", "--trainable", "mixture", "--lr-router", "1"],
     "--lr-router: nothing of that rate trains"),
    (["--loras", "served/abstract-1", "--lr-skills", "1"], "--lr-skills: nothing of that rate trains"),
    (["--loras", "served/abstract-1", "--skills", "2"], "--skills: comes with --start or --loras"),
    (["--loras", "served/abstract-1", "--method", "moe-lora"], "--method: comes with --start or --loras"),
])  # fmt: skip
def test_mistakes_are_one_line_and_leave_nothing(arguments, beginning, served):
    if "other" in arguments:
        base = checkpoint.load(ROOT / "tiny")
        base.embedding.weight.data[0] += 1
        checkpoint.save(base, served / "other")
        (served / "other/spiece.model").symlink_to(ROOT / "tiny/spiece.model")
    (served / "foreign").mkdir()
    config = json.loads((served / "served/abstract-2/adapter_config.json").read_text())
    (served / "foreign/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "x"}))
    (served / "foreign/adapter_model.safetensors").symlink_to(
        served / "served/abstract-2/adapter_model.safetensors")
    said = run("train.py", *arguments, "--data", "data", *NEW, "--out", "on", cwd=served, code=2)
    assert said.startswith(f"train.py: error: {beginning}") and said.count("\n") == 1
    assert not (served / "on").exists()


def test_a_run_does_not_go_on_from_what_it_did_not_begin_with(finished):
    for flag in ("--start", "--loras"):
        said = run("train.py", "--resume", "--out", "run", flag, "other", cwd=finished, code=2)
        assert "the run in run has" in said and said.startswith(f"train.py: error: {flag}")


@pytest.mark.parametrize("section, field, value, flags, words", [
    ("train", "method", "poly", [], "--start run: a run of --method poly; only adapters without task ids"),
    *(("adapter", "router", "none", ["--trainable", part],
       f"--trainable {part}: the run in run has no such part") for part in ("mixture", "router"))])
def test_what_a_run_does_not_have_does_not_go_on(section, field, value, flags, words, copied):
    config = json.loads((copied / "config.json").read_text())
    config[section][field] = value
    (copied / "config.json").write_text(json.dumps(config))
    assert words in run("train.py", "--start", "run", *flags, *NEW, "--out", "on", cwd=copied.parent, code=2)
