"""The few-shot study on one task and one run.

Every way trains what it says, all are of the same size, and the same command resumes.
"""

import json

import numpy as np
import pytest

import checkpoint
import data
import runtime
from experiments import fewshot
from experiments.sizes import total
from experiments.study import subset
from helpers import ROOT, run
from orchmoe import OrchMoEConfig


@pytest.fixture
def one_rate(monkeypatch):
    """Try one rate for each way."""
    few = {name: way._replace(values=way.values[1:2]) for name, way in fewshot.WAYS.items()}
    monkeypatch.setattr(fewshot, "WAYS", few)


def change_config(run_dir, section, **values):
    """Change config.json of a run."""
    path = run_dir / "config.json"
    saved = json.loads(path.read_text())
    saved[section] |= values
    path.write_text(json.dumps(saved))
    return saved


@pytest.mark.slow
def test_fewshot_table_of_all_ways(finished, tmp_path, one_rate):
    arguments = ["--runs", finished / "run", "--out", tmp_path / "few", "--examples", "2,5"]
    arguments += ["--steps", 2, "--max-tasks", 2, "--tuned", 1, "--device", "cpu", "--jobs", 1]
    program = "experiments/fewshot.py"
    out = run(program, *arguments, cwd=tmp_path)
    lines = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")]
    ways = ["mixture", "router", "all", "fresh LoRA"]
    rows = [("as it is", "0"), *((way, size) for size in ("2", "5") for way in ways)]
    assert [(line[0][2:], line[1]) for line in lines if line[1] in "025"] == rows

    task = data.read_splits(ROOT / "sni")["test"][0]
    sizes = {}
    for way, trainable in zip(ways, ("mixture", "router", "all", "all"), strict=True):
        rate = fewshot.WAYS[way].values[0]
        folder = tmp_path / "few/cells" / f"{way.replace(' ', '_')}-5-s0_{rate:g}"
        result = json.loads((folder / f"{task}.json").read_text())
        config = json.loads((folder / task / "config.json").read_text())
        sizes[way] = sum(result["parameters"].values())
        assert config["tasks"] == [task]
        assert config["data"]["train_instances"] == 5
        assert config["train"]["trainable"] == trainable
        assert config["train"][fewshot.WAYS[way].rate] == rate
        assert bool(config["train"]["start"]) == (way != "fresh LoRA")
    assert abs(sizes["fresh LoRA"] - sizes["all"]) < 0.03 * sizes["all"]

    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "few/cells").rglob("*.json")}
    again = run(program, *arguments, cwd=tmp_path)
    assert again.splitlines()[-1] == out.splitlines()[-1]
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}


def few_shot(*runs):
    config = fewshot.FewShotConfig(runs=tuple(map(str, runs)))
    return fewshot.FewShot(config, runtime.pick_device(device="cpu"))


def test_cell_starts_from_the_run_of_its_seed(finished, copied):
    study = few_shot(finished / "run", copied)
    task = study.tasks[0]
    cells = [study.cell("all", task, 4, seed) for seed in (0, 1)]
    starts = [cell.settings.train.start for cell in cells]
    assert starts == [str(finished / "run"), str(copied)]
    # The digest of the adapter tells the cells of other runs apart, not its place.
    assert cells[0].facts == cells[1].facts
    (copied / "adapter.safetensors").write_bytes(b"other")
    assert cells[0].facts != study.cell("all", task, 4, 1).facts


def test_data_without_test_tasks_is_refused(copied, tmp_path):
    folder = subset(tmp_path / "few", ROOT / "sni", ["task201_opposite_of_second_word"])
    change_config(copied, "data", data=str(folder))
    with pytest.raises(ValueError, match="splits/default has no test tasks"):
        few_shot(copied)


def test_fresh_lora_is_as_large_as_a_run_with_extra_ranks(copied):
    saved = change_config(copied, "train", extra_rank=8)
    extra_rank = fewshot.lora_flags(str(copied))["extra_rank"]
    base = checkpoint.on_meta(checkpoint.read_config(ROOT / "tiny"))
    config = OrchMoEConfig(**saved["adapter"])
    own = total("orchmoe", base, config, extra_rank=8)
    assert abs(own - total("lora", base, config, extra_rank=extra_rank)) < 0.03 * own


def test_tables_rows_stand_beside_the_lora_of_as_many_examples():
    losses = {
        ("as it is", 0): 3.0,
        ("mixture", 2): 2.0,
        ("mixture", 5): 1.0,
        ("fresh LoRA", 2): 2.5,
        ("fresh LoRA", 5): 1.25,
    }
    found = {}
    for kind, loss in losses.items():
        found[kind] = {"rougeL": np.full((3, 2), 9.0), "loss": np.full((3, 2), loss)}
    text = fewshot.tables(found, {}, {})
    assert "| as it is | 0 | 9.00 | 3.000 | +0.500 [+0.500, +0.500] |" in text
    assert "| mixture | 2 | 9.00 | 2.000 | -0.500 [-0.500, -0.500] |" in text
    assert "| mixture | 5 | 9.00 | 1.000 | -0.250 [-0.250, -0.250] |" in text
    assert "| fresh LoRA | 5 | 9.00 | 1.250 | - |" in text


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"runs": ("a",), "examples": ("4", "x")},
        {"runs": ("a",), "examples": ()},
        {"runs": ("a",), "tuned": 0},
    ],
)
def test_few_shot_config_refuses(flags):
    with pytest.raises(ValueError, match="give"):
        runtime.from_flags(fewshot.FewShotConfig, flags)
