"""The few-shot study on one task and one run: every way trains what it says, of the same size, and the same
command goes on."""

import json
import shutil

import numpy as np
import pytest

import checkpoint
import data
import runtime
from experiments import fewshot
from experiments.sizes import on_meta, parameters
from helpers import ROOT, run
from orchmoe import OrchMoEConfig


@pytest.fixture
def small(monkeypatch):
    few = {name: way._replace(values=way.values[1:2]) for name, way in fewshot.WAYS.items()}
    monkeypatch.setattr(fewshot, "WAYS", few)


@pytest.mark.slow
def test_a_table_of_all_ways(finished, tmp_path, small, monkeypatch):
    arguments = [
        "--runs",
        finished / "run",
        "--out",
        tmp_path / "few",
        "--examples",
        "2,5",
        "--steps",
        "2",
        "--max-tasks",
        "2",
        "--tuned",
        "1",
        "--device",
        "cpu",
        "--jobs",
        "1",
    ]
    said = run("experiments/fewshot.py", *arguments, cwd=tmp_path)
    lines = [line.split(" | ") for line in said.splitlines() if line.startswith("| ")]
    ways = ["mixture", "router", "all", "fresh LoRA"]
    rows = [("as it is", "0"), *((way, size) for size in ("2", "5") for way in ways)]
    assert [(line[0][2:], line[1]) for line in lines if line[1] in "025"] == rows
    task = data.read_splits(ROOT / "sni")["test"][0]
    sizes = {}
    for way, trainable in zip(ways, ("mixture", "router", "all", "all"), strict=True):
        rate = fewshot.WAYS[way].values[0]
        folder = tmp_path / "few/cells" / f"{way.replace(' ', '_')}-5-s0_{rate:g}" / task
        scores, config = (
            json.loads((folder / name).read_text()) for name in ("scores.json", "config.json")
        )
        sizes[way] = sum(scores["parameters"].values())
        assert config["tasks"] == [task] and config["data"]["train_instances"] == 5
        assert (
            config["train"]["trainable"] == trainable
            and config["train"][fewshot.WAYS[way].rate] == rate
        )
        assert bool(config["train"]["start"]) == (way != "fresh LoRA")
    assert abs(sizes["fresh LoRA"] - sizes["all"]) < 0.03 * sizes["all"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "few/cells").rglob("*.json")}
    assert (
        run("experiments/fewshot.py", *arguments, cwd=tmp_path).splitlines()[-1]
        == said.splitlines()[-1]
    )
    assert before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "few/cells").rglob("*.json")
    }


def test_each_seed_goes_on_from_its_own_run(finished, copied):
    config = fewshot.FewShotConfig(runs=(str(finished / "run"), str(copied)))
    study = fewshot.Study(config, {"t": ROOT}, {"t": {}}, ["", ""])
    starts = [study.cell("all", "t", 4, seed, {}).configs.train.start for seed in (0, 1)]
    assert starts == [str(finished / "run"), str(copied)]


def test_data_without_test_tasks_has_no_new_ones(copied, tmp_path):
    saved = json.loads((copied / "config.json").read_text())
    few = fewshot.subset(tmp_path / "few", ROOT / "sni", ["task201_opposite_of_second_word"])
    saved["data"]["data"] = str(few)
    (copied / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="splits/default has no test tasks"):
        fewshot.fewshot(
            fewshot.FewShotConfig(runs=(str(copied),)), runtime.pick_device(None, "cpu")
        )


def test_a_fresh_lora_is_as_large_as_a_run_with_extra_ranks(copied):
    saved = json.loads((copied / "config.json").read_text())
    saved["train"]["extra_rank"] = 8
    (copied / "config.json").write_text(json.dumps(saved))
    extra = fewshot.as_large(str(copied))["extra_rank"]
    base, config = on_meta(checkpoint.read_config(ROOT / "tiny")), OrchMoEConfig(**saved["adapter"])
    own, lora = (
        sum(parameters(name, base, config, extra_rank=ranks).values())
        for name, ranks in (("orchmoe", 8), ("lora", extra))
    )
    assert abs(own - lora) < 0.03 * own


def test_each_row_stands_beside_the_lora_of_as_many_examples():
    loss = {
        ("as it is", 0): 3.0,
        ("mixture", 2): 2.0,
        ("mixture", 5): 1.0,
        (fewshot.LORA, 2): 2.5,
        (fewshot.LORA, 5): 1.25,
    }
    found = {
        key: {"rougeL": np.full((3, 2), 9.0), "loss": np.full((3, 2), x)} for key, x in loss.items()
    }
    said = fewshot.table(found, [2, 5], {}, {})
    assert "| as it is | 0 | 9.00 | 3.000 | +0.500 [+0.500, +0.500] |" in said
    assert "| mixture | 2 | 9.00 | 2.000 | -0.500 [-0.500, -0.500] |" in said
    assert "| mixture | 5 | 9.00 | 1.000 | -0.250 [-0.250, -0.250] |" in said


def test_the_study_of_one_task_is_on_that_task_alone(tmp_path):
    folder = fewshot.subset(tmp_path / "one", ROOT / "sni", ["task201_opposite_of_second_word"])
    assert data.read_splits(folder) == {"train": ["task201_opposite_of_second_word"], "test": []}
    with open(
        folder / "splits/default/train_tasks.txt"
    ) as read:  # by another process, before it is anew
        fewshot.subset(folder, ROOT / "sni", ["task1"])
        assert read.read() == "task201_opposite_of_second_word\n"
    moved = tmp_path / "moved"
    shutil.copytree(ROOT / "sni/tasks", moved / "tasks")
    fewshot.subset(folder, moved, ["task201_opposite_of_second_word"])
    assert (folder / "tasks").resolve() == moved / "tasks"


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"runs": ("a",), "examples": ("4", "x")},
        {"runs": ("a",), "examples": ()},
        {"runs": ("a",), "tuned": 0},
    ],
)
def test_mistakes(flags):
    with pytest.raises(ValueError, match="give"):
        runtime.from_flags(fewshot.FewShotConfig, flags)
