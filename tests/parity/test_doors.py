"""Every program that loads a run refuses another base, tokenizer or method, and other data.

tests/programs/test_own_data.py compares the prompts of all doors, test_trainer.py the doors of an
adapter.pt.
"""

import importlib.util
import re
import shutil

import pytest
from safetensors.torch import save_file

from experiments.explorer import explorer
from helpers import ROOT, change_config, run, weights_of
from support.program import UserError, read_json, write_json

DOORS = {
    "train": "train.py --resume --out run --device cpu",
    "start": "train.py --start run --out again --device cpu --steps 1 --eval-instances 2",
    "eval": "eval.py --run run --split dev --limit 2 --device cpu --out scores",
    "ask": "eval.py --run run --ask Say --input it --device cpu",
    "explorer": "",
    "export": "integrations/export.py --run run --out again",
    "mean": "integrations/export.py --run run --out again --mean",
}
if importlib.util.find_spec("peft"):
    serve = "integrations/serve.py --served served --base base --prompt a --max-tokens 1"
    DOORS["serve"] = serve


@pytest.fixture(scope="module")
def whole(finished, tmp_path_factory):
    """Return a folder with a run, its base and its data, and with what export.py has written."""
    folder = tmp_path_factory.mktemp("doors")
    shutil.copytree(ROOT / "tiny", folder / "base")
    shutil.copytree(ROOT / "sni", folder / "data")
    shutil.copytree(finished / "run", folder / "run")
    run("integrations/export.py --run run --out served", cwd=folder)
    return folder


@pytest.fixture
def home(whole, tmp_path, monkeypatch):
    """Return a copy of that folder, whose run has the base and the data of the copy."""
    folder = shutil.copytree(whole, tmp_path / "home")
    paths = {"model": str(folder / "base"), "data": str(folder / "data")}
    change_config(folder / "run", "settings", **paths)
    monkeypatch.chdir(folder)
    return folder


def enter(door, code):
    """Use the run in the working folder. Return what is said, or else the refusal."""
    if door != "explorer":
        return run(DOORS[door], code=code)
    if code == 0:
        return str(explorer.load("run"))
    with pytest.raises(UserError) as refusal:
        explorer.load("run")
    return str(refusal.value)


def change_base(home, _other):
    """Change one weight, in a Linear without adapters."""
    weights = weights_of(home / "base")
    weights["encoder.block.0.layer.1.DenseReluDense.wo.weight"][0, 0] += 1
    save_file(weights, home / "base/model.safetensors", {"format": "pt"})


def change_tokenizer(home, other):
    shutil.copy(other / "spiece.model", home / "base/spiece.model")


def change_data(home, _other):
    """Change the output of one row of a training task."""
    name = read_json(home / "run/config.json")["facts"]["tasks"][0]
    path = home / f"data/tasks/{name}.json"
    task = read_json(path)
    task["Instances"][0]["output"] = ["another"]
    write_json(path, task)


def change_method(home, _other):
    change_config(home / "run", "settings", method="moe-lora")


CHANGES = {  # what is changed, which doors must not open then, and what they say
    "nothing": (None, (), "."),
    "base": (change_base, DOORS, "base is .* the run has|not the base"),
    "tokenizer": (
        change_tokenizer,
        DOORS,
        "tokenizer is .* the run has|the tokenizer in base is another",
    ),
    "data": (change_data, ("train", "eval", "explorer", "mean"), "train_tasks is .* the run has"),
    "method": (
        change_method,
        ("train", "start", "eval", "ask", "explorer", "export", "mean"),
        "(method|method_class) is .* the run has|--method moe-lora",
    ),
}


@pytest.mark.parametrize("change, closed, message", CHANGES.values(), ids=CHANGES)
def test_all_doors_are_bound_to_the_same(change, closed, message, home, model_dir):
    if change:
        change(home, model_dir)
    for door in closed or DOORS:
        shutil.rmtree("again", ignore_errors=True)
        said = enter(door, 2 if closed else 0)
        assert re.search(message, said), f"{door}: {said}"
