"""The recipes' own helpers on the bundled miniature; and that each stage names flags that exist."""

import importlib.util
import re
import subprocess

import pytest
from conftest import ROOT

import checkpoint
import compare
import data
import plot
import tokenizer
import train


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_splits_share_no_category(tmp_path):
    script("prepare").make_splits(ROOT / "sni", tmp_path, train=5, test=3)
    lists = {name: data.read_splits(tmp_path, name) for name in ("instruct", "adapt")}
    official = data.read_splits(ROOT / "sni")
    assert len(lists["instruct"]["train"]) >= len(official["train"]) / 3 and not lists["instruct"]["test"]
    assert len(lists["adapt"]["train"]) == 5 and len(lists["adapt"]["test"]) == 3
    assert set(lists["adapt"]["test"]) <= set(official["test"])
    tasks = tmp_path / "tasks"
    instruct, adapt = ({data.read_task(tasks / f"{task}.json")["category"] for task in found["train"]}
                       for found in lists.values())  # fmt: skip
    assert instruct and adapt and not instruct & adapt


def test_tokenizer_and_config_make_a_shape(tmp_path):
    prepare = script("prepare")
    prepare.make_tokenizer(ROOT / "README.md", 300, tmp_path / "shape")
    prepare.make_config(tmp_path / "shape", 300, 32, 8, 48, 2, 4)
    words = tokenizer.load(tmp_path / "shape")
    config = checkpoint.config(tmp_path / "shape")
    assert config.vocab_size == 300 + prepare.SENTINELS and not config.tied_head
    assert words.decode(words.encode("The base is frozen.")) == "The base is frozen."


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.sh")), ids=lambda path: path.stem)
def test_stages_are_shell_and_name_flags_that_exist(path):
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    configs = (*train.CONFIGS.values(), train.PlaceConfig, compare.CompareConfig, plot.PlotConfig)
    fields = {"--" + field.replace("_", "-") for cls in configs for field in cls.__dataclass_fields__}
    assert set(re.findall(r"--[a-z][a-z0-9-]+", path.read_text())) <= fields
