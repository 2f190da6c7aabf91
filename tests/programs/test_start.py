"""Runs that start from a finished run (--start) or from LoRAs (docs/use.md)."""

import json
import re
import shutil
from dataclasses import replace
from unittest import mock

import pytest
import torch

import baselines
import checkpoint
import train
from helpers import (
    RESUME,
    ROOT,
    change_config,
    check_equal,
    interrupted,
    refused,
    run,
    snippets,
    state_of,
    text_of,
    trace,
    write_lists,
)
from integrations.peft_folder import load_peft
from run_folder import read_run
from support.program import read_json
from tasks import DataConfig

SIZES = (
    "--train-instances 16 --max-source-length 64 --eval-instances 8 --device cpu "
    "--steps 4 --eval-every 4 --batch-size 4 --warmup 0"
)


@pytest.fixture(scope="module")
def home(finished, tmp_path_factory):
    """Return the working folder of the tests, which give their runs different names.

    It has `run`, the finished run; `served`, that run as LoRAs; `data`, with
    one task that the run has not seen; and `poly`, the config of a run that routes by task.
    """
    folder = tmp_path_factory.mktemp("start")
    (folder / "run").symlink_to(finished / "run")
    run("integrations/export.py --run run --out served", cwd=folder)
    unseen = (ROOT / "sni/splits/default/test_tasks.txt").read_text().split()[0]
    write_lists(folder / "data", [unseen], [])
    (folder / "data/tasks").symlink_to(ROOT / "sni/tasks")
    (folder / "poly").mkdir()
    shutil.copy(finished / "run/config.json", folder / "poly")
    change_config(folder / "poly", "settings", method="poly")
    change_config(folder / "poly", "facts", method_class="Poly")
    return folder


@pytest.fixture(autouse=True)
def inside(home, monkeypatch):
    monkeypatch.chdir(home)


# -- --start

# Rates of zero: how many parameters train, and which change.
ROUTER_ONLY = "--lr-skills 0 --lr-allocation 0"
ALLOCATION_ONLY = "--lr-skills 0 --lr-router 0"
PARTS = {
    "router": (ROUTER_ONLY, 8 * 160 + 8, {"router.bias", "router.W_task"}),
    "allocation": (ALLOCATION_ONLY, 20 * 8 * 4, {"Z"}),
}


@pytest.mark.parametrize("part", PARTS)
def test_only_the_parts_with_a_rate_change(part, home):
    rates, count, expected = PARTS[part]
    output = run(f"train.py --start run {rates} --data data {SIZES} --out {part}")
    assert f"orchmoe trains {count:,} parameters in 4 steps" in output

    before = state_of(home / "run")
    after = checkpoint.read_torch(home / part / "progress.pt")["adapters"]
    assert {name for name in before if not torch.equal(before[name], after[name])} == expected
    run(f"eval.py --run {part} --split dev --limit 2 --device cpu")


def test_limits_of_the_rows_belong_to_the_data_of_the_start(home):
    started = read_run("run").settings
    assert started.max_tasks == 4
    same = train.read_settings({"start": "run"}, train.LaunchConfig())
    assert same.part(DataConfig) == started.part(DataConfig)
    other = train.read_settings({"start": "run", "data": "data"}, train.LaunchConfig())
    assert other.part(DataConfig) == replace(
        DataConfig(data="data"), max_source_length=started.max_source_length
    )


def test_epochs_of_the_start_count_the_new_rows(home):
    (home / "epochs").mkdir()
    shutil.copy(home / "run/config.json", home / "epochs")
    change_config(home / "epochs", "settings", epochs=2)
    flags = {"start": "epochs", "data": "data"}
    settings = train.read_settings(flags, train.LaunchConfig())
    assert train.steps_of(settings, range(settings.batch_size + 1)) == 4
    settings = train.read_settings({**flags, "steps": 9}, train.LaunchConfig())
    assert train.steps_of(settings, range(settings.batch_size + 1)) == 9


def test_a_start_that_training_only_harms_stays_the_result(home):
    harm = f"--lr-skills 1 {SIZES} --out harmed"
    output = run(f"train.py --start run --data data {harm}")
    assert re.findall(r"\nstep (\d) of 4: dev loss \S+, best so far\n", output) == ["0"]
    check_equal(state_of(home / "harmed"), state_of(home / "run"))
    scores = read_json(home / "harmed/scores.json")
    assert scores["orchmoe"] == scores["start"]


def test_interrupted_start_resumes_bit_for_bit_from_any_folder(home, tmp_path_factory):
    start_it = f"train.py --start run {ALLOCATION_ONLY} {SIZES} --out"
    run(f"{start_it} whole")
    start = read_json(home / "whole/scores.json")["start"]
    assert start == read_json(home / "run/scores.json")["orchmoe"]

    with interrupted(train, "train_step", 3):
        run(f"{start_it} on", code=130)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    assert "| start |" in run(RESUME, home / "on", cwd=elsewhere)
    assert trace(home / "on") == trace(home / "whole")

    for name in ("progress.pt", "adapter.safetensors", "metrics.jsonl", "scores.json"):
        (home / "on" / name).unlink()
    run(RESUME, home / "on", cwd=elsewhere)
    for name in ("adapter.safetensors", "scores.json"):
        assert (home / "on" / name).read_bytes() == (home / "whole" / name).read_bytes()


# ------------------------------------------------------------------------- existing LoRAs as skills


def test_snippet_of_the_page_makes_loras_the_skills_which_stay_frozen(home):
    [snippet] = snippets(text_of("docs/use.md"), "set_skills")
    (home / "from_loras.py").write_text(snippet)
    commands = re.findall(r"^python (.*from_loras\.py.*)", text_of("docs/use.md"), re.MULTILINE)
    of_train, of_eval = [line.replace("--model tiny ", "") for line in commands]
    for name, number in (("lora-a", 1), ("lora-b", 2)):
        (home / name).symlink_to(f"served/abstract-{number}")
    with mock.patch.dict(baselines.OWN_METHODS):  # no other test knows the method
        run(f"{of_train} {SIZES}")
        run(f"{of_eval} --split dev --limit 2 --device cpu")
    after, metadata = checkpoint.read_safetensors(home / "runs/loras/adapter.safetensors")
    config = json.loads(metadata["run"])
    assert config["skills"] == 2 and config["rank"] == 8
    A, _ = load_peft("lora-b").factors["encoder.block.0.layer.0.SelfAttention.q"]
    last = checkpoint.read_torch(home / "runs/loras/progress.pt")["adapters"]
    assert last["Z"].abs().max() > 0.01  # it started at 0
    for state in (last, after):
        assert torch.equal(state["skills.encoder-blocks-0-attention-q.A"][1], A)


# ----------------------------------------------------------------------------------------- mistakes

MISTAKES = {  # flags -> beginning of the message
    "--start run --rank 4": "run: rank is 4, but the run has 2; a run that starts from it",
    "--start run --method lora": "run: method_class is 'LoRA', but the run has 'OrchMoE",
    "--start run --lr-skills 0 --lr-allocation 0 --lr-router 0": "--method orchmoe: each of its",
    "--start poly": "poly: tasks is ['",
    "--resume --out run --start other": "--start: has no effect with --resume",
    "--resume --out run --epochs 1": "run: steps is 15, but the run has 8",
    "--resume --out run --test x.jsonl": "--test: has no effect with --data",
}


@pytest.mark.parametrize("flags, beginning", MISTAKES.items(), ids=MISTAKES)
def test_mistake_prints_one_line_and_leaves_no_folder(flags, beginning, home, monkeypatch):
    monkeypatch.setattr(train, "train_step", None)  # mistakes must be found before training
    refused(f"train.py: error: {beginning}", f"train.py --data data --out refused {flags}")
    assert not (home / "refused").exists()
