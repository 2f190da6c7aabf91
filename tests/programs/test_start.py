"""Runs that start from a finished run (--start, --trainable) or from LoRAs (--loras)."""

import json
import shutil

import pytest
import torch

import checkpoint
import data
import eval as evaluation
import export
import run_folder
import runtime
import train
from helpers import ROOT, process, run, terminate_after, trace

CPU = runtime.Device(torch.device("cpu"), torch.float32, "")
SIZES = ["--train-instances", "16", "--steps", "4", "--eval-every", "4", "--batch-size", "8"]
SIZES += ["--warmup", "0", "--device", "cpu", "--eval-instances", "8"]
FAST = ["--lr-allocation", "0.1"]


@pytest.fixture
def new(finished, tmp_path):
    """A folder with `run`, the finished run, and `data` with one task that the run has not seen."""
    (tmp_path / "run").symlink_to(finished / "run")
    lists = tmp_path / "data/splits/default"
    lists.mkdir(parents=True)
    (tmp_path / "data/tasks").symlink_to(ROOT / "sni/tasks")
    unseen = (ROOT / "sni/splits/default/test_tasks.txt").read_text().split()[0]
    (lists / "train_tasks.txt").write_text(unseen + "\n")
    (lists / "test_tasks.txt").write_text("")
    return tmp_path


def load_state(folder):
    state, _ = checkpoint.load_adapter(folder / "adapter.safetensors")
    return state


# ------------------------------------------------------------------------------------------ --start

# By --trainable: how many parameters train, and which change. The W_task of a mixture changes
# once, at the start, and is zero from then on.
PARTS = {
    "mixture": (8, {"router.bias", "router.W_task"}),
    "router": (8 * 160 + 8, {"router.bias", "router.W_task"}),
    "allocation": (20 * 8 * 4, {"Z"}),
    "all": (53128, {"router.bias", "router.W_task", "Z", "skills"}),
}


@pytest.mark.parametrize("part", PARTS)
def test_only_the_trainable_part_changes(part, new):
    arguments = ["--start", "run", "--trainable", part, "--data", "data", *SIZES, "--out", "on"]
    if part != "router":
        arguments += FAST
    output = run("train.py", *arguments, cwd=new)
    count, expected = PARTS[part]
    assert f"= {count:,} parameters train" in output
    assert "| start |" in output
    assert "--split seen\n" in output  # there are no unseen tasks

    before = load_state(new / "run")
    after = load_state(new / "on")
    changed = set()
    for name in before:
        if not torch.equal(before[name], after[name]):
            changed.add("skills" if "skill_" in name else name)
    assert changed == expected
    evaluated = run("eval.py", "--run", "on", "--split", "dev", "--device", "cpu", cwd=new)
    assert "1 dev tasks" in evaluated


class FirstStep(Exception):
    """Ends a run at its first step. Holds the base and the adapters."""

    def __init__(self, base, adapters):
        self.base = base
        self.adapters = adapters


@pytest.fixture
def first_step(new, monkeypatch):
    """Start a run from `run` that ends at the first step. Return what it trained there."""

    def end(base, adapters, *_):
        raise FirstStep(base, adapters)

    def begin(**flags):
        flags |= {"start": "run", "data": "data", "train_instances": 16}
        launch = train.LaunchConfig(out="on")
        settings = train.read_settings(flags, launch)
        with pytest.raises(FirstStep) as reached:
            train.train(settings, CPU, launch, final_scores=False)
        return reached.value

    monkeypatch.chdir(new)
    monkeypatch.setattr(train, "train_step", end)
    return begin


def test_mixture_starts_at_the_mean_w_and_has_one_w_for_all_samples(first_step, new):
    base, adapters, tokenizer = run_folder.load(CPU, run="run")
    config = data.DataConfig(data="data", train_instances=16)
    sets = data.load_sets(config, tokenizer)
    _, w = evaluation.measure(base, adapters, sets["train"])
    assert w.std(0).max() > 1e-3  # otherwise any router would pass

    mixture = first_step(trainable="mixture")
    _, mixed = evaluation.measure(mixture.base, mixture.adapters, sets["dev"])
    torch.testing.assert_close(mixed, w.mean(0).expand_as(mixed))


def test_mixture_of_a_one_hot_router_is_finite(first_step, monkeypatch):
    w = torch.eye(8)[:1]
    monkeypatch.setattr(evaluation, "measure", lambda *_arguments, **_options: (0.0, w))
    bias = first_step(trainable="mixture").adapters.router.bias
    torch.testing.assert_close(bias.softmax(-1), w[0], atol=1e-4, rtol=0)
    assert bias.isfinite().all()


def test_start_is_scored_as_the_finished_run_was(new):
    sizes = [*SIZES, "--max-tasks", "4"]  # with the sizes of the finished run
    run("train.py", "--start", "run", *sizes, "--out", "on", cwd=new)
    start = json.loads((new / "on/scores.json").read_text())["start"]
    assert start == json.loads((new / "run/scores.json").read_text())["orchmoe"]


def test_adapter_of_another_run_is_refused(new, tmp_path):
    shutil.copytree(new / "run", tmp_path / "other")
    path = tmp_path / "other/adapter.safetensors"
    state, metadata = checkpoint.load_adapter(path)
    checkpoint.save_adapter(path, state, **metadata | {"base": "0" * 16})
    error = run("train.py", "--start", tmp_path / "other", *SIZES, "--out", "on", cwd=new, code=2)
    assert "adapter.safetensors: its base, '0000000000000000', is not the run's" in error


@pytest.mark.slow
def test_stopped_start_resumes_bit_for_bit(new):
    arguments = ["--start", "run", "--trainable", "mixture", "--data", "data", *SIZES]
    arguments += ["--steps", "12"]
    process("train.py", *arguments, "--out", "whole", cwd=new)
    terminate_after(3, *arguments, cwd=new, out="stopped")
    process("train.py", "--resume", "--out", "stopped", "--device", "cpu", cwd=new)
    assert trace(new / "whole") == trace(new / "stopped")
    whole = (new / "whole/adapter.safetensors").read_bytes()
    assert (new / "stopped/adapter.safetensors").read_bytes() == whole


def test_start_without_a_checkpoint_resumes_from_any_working_folder(new, tmp_path_factory):
    arguments = ["--start", "run", "--trainable", "mixture", "--data", "data", *SIZES]
    run("train.py", *arguments, "--out", "on", cwd=new)
    whole = (new / "on/adapter.safetensors").read_bytes()
    for name in ("checkpoint.pt", "adapter.safetensors", "metrics.jsonl", "scores.json"):
        (new / "on" / name).unlink()
    elsewhere = tmp_path_factory.mktemp("x")
    resume = ["train.py", "--resume", "--device", "cpu", "--out", new / "on"]
    output = run(*resume, cwd=elsewhere)
    assert (new / "on/adapter.safetensors").read_bytes() == whole
    assert "| start |" in output

    # With a checkpoint, the weights are no longer those of the start and are not scored as such.
    (new / "on/scores.json").unlink()
    output = run(*resume, cwd=new)
    assert "| start |" not in output
    assert "| orchmoe |" in output


# ------------------------------------------------------------------------------------------ --loras


@pytest.fixture(scope="session")
def exported(finished, tmp_path_factory):
    """The finished run as LoRAs. Tests must not change it."""
    folder = tmp_path_factory.mktemp("exported")
    run("export.py", "--run", finished / "run", "--out", folder / "served", cwd=folder)
    return folder / "served"


@pytest.fixture
def served(new, exported):
    (new / "served").symlink_to(exported)
    return new


def test_loras_become_skills_and_stay_frozen(served):
    arguments = ["--loras", "served/abstract-1,served/abstract-2", "--data", "data", *SIZES, *FAST]
    output = run("train.py", *arguments, "--out", "on", cwd=served)
    assert "orchmoe: 0 in skills + 1,608 in routing" in output
    assert "| start |" in output

    after, metadata = checkpoint.load_adapter(served / "on/adapter.safetensors")
    for name, value in {"skills": 2, "rank": 8, "alpha": None, "allocation_std": 0.0}.items():
        assert metadata["config"][name] == value
    ours = "encoder.blocks.0.attention.q"
    theirs = "encoder.block.0.layer.0.SelfAttention.q"
    for s, folder in enumerate(("abstract-1", "abstract-2")):
        A, B = export.load_peft(served / "served" / folder).factors[theirs]
        assert torch.equal(after[f"{ours}.skill_A"][s], A)
        assert torch.equal(after[f"{ours}.skill_B"][s], B.T)
    assert after["Z"].abs().max() > 0.01  # it started at 0

    evaluated = run("eval.py", "--run", "on", "--split", "dev", "--device", "cpu", cwd=served)
    assert "dev tasks" in evaluated


# ----------------------------------------------------------------------------------------- mistakes

LORA = "--loras served/abstract-1"
MISTAKES = {  # flags -> beginning of the message
    "--trainable router": "--trainable router: give --start with it",
    f"--start run {LORA}": "--start and --loras: give one of the two",
    "--start run --rank 4": "--rank: is fixed by --start",
    "--start run --method lora": "--method: is fixed by --start",
    "--start nowhere": "nowhere/config.json: does not exist",
    "--start run --model other": "run: base changed since the run began",
    f"{LORA},nowhere": "nowhere/adapter_config.json: does not exist",
    f"{LORA},foreign": "--loras: different bases",
    f"{LORA} --targets q": "served/abstract-1: its Linears are not those of this base and "
    "--targets: [('decoder.block.0.layer.0.SelfAttention.v'",
    "--start run --trainable mixture --lr-router 1": "--lr-router: nothing trains at that rate",
    f"{LORA} --lr-skills 1": "--lr-skills: nothing trains at that rate",
    f"{LORA} --skills 2": "--skills: is fixed by --start or --loras",
    f"{LORA} --method moe-lora": "--method: is fixed by --start or --loras",
}


@pytest.mark.parametrize("flags, beginning", MISTAKES.items(), ids=MISTAKES)
def test_mistake_prints_one_line_and_leaves_no_folder(flags, beginning, served):
    if "other" in flags:
        base = checkpoint.load(ROOT / "tiny")
        base.embedding.weight.data[0] += 1
        checkpoint.save(base, served / "other")
        (served / "other/spiece.model").symlink_to(ROOT / "tiny/spiece.model")
    if "foreign" in flags:
        lora = served / "served/abstract-2"
        (served / "foreign").mkdir()
        config = json.loads((lora / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "x"
        (served / "foreign/adapter_config.json").write_text(json.dumps(config))
        weights = "adapter_model.safetensors"
        (served / "foreign" / weights).symlink_to(lora / weights)

    arguments = [*flags.split(), "--data", "data", *SIZES, "--out", "on"]
    error = run("train.py", *arguments, cwd=served, code=2)
    assert error.startswith(f"train.py: error: {beginning}")
    assert error.count("\n") == 1
    assert not (served / "on").exists()


def test_resumed_run_refuses_another_start(finished):
    for flag in ("--start", "--loras"):
        error = run("train.py", "--resume", "--out", "run", flag, "other", cwd=finished, code=2)
        assert error.startswith(f"train.py: error: {flag}")
        assert "the run in run has" in error


@pytest.mark.parametrize(
    "section, change, flags, words",
    [
        (
            "train",
            {"method": "poly"},
            "",
            "--method poly cannot continue on other tasks; start from a run of orchmoe",
        ),
        (
            "adapter",
            {"router": "none"},
            "--trainable mixture",
            "--trainable mixture: run has no such parameters",
        ),
        (
            "adapter",
            {"router": "none"},
            "--trainable router",
            "--trainable router: run has no such parameters",
        ),
    ],
)
def test_start_refuses_a_run_without_the_needed_part(section, change, flags, words, copied):
    config = json.loads((copied / "config.json").read_text())
    config[section] |= change
    (copied / "config.json").write_text(json.dumps(config))
    arguments = ["--start", "run", *flags.split(), *SIZES, "--out", "on"]
    error = run("train.py", *arguments, cwd=copied.parent, code=2)
    assert words in error
