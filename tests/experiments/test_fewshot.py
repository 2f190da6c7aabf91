"""The few-shot study on one task and one run.

Every way trains what it says, and all are of the same size.
"""

import json

import numpy as np
import pytest

import checkpoint
import data
import runtime
from experiments import fewshot
from experiments.sizes import total
from helpers import ROOT, run
from orchmoe import OrchMoEConfig


@pytest.mark.slow
def test_fewshot_table_of_all_ways(finished, tmp_path, monkeypatch):
    for name, way in fewshot.WAYS.items():  # one rate for each
        monkeypatch.setitem(fewshot.WAYS, name, way._replace(values=way.values[1:2]))
    flags = "--examples 2,5 --steps 2 --max-tasks 2 --tuned 1 --device cpu --jobs 1 --out few"
    arguments = ["--runs", finished / "run", *flags.split()]
    out = run("experiments/fewshot.py", *arguments, cwd=tmp_path)

    task = data.read_splits(ROOT / "sni")["test"][0]
    for name, way in fewshot.WAYS.items():
        folder = tmp_path / f"few/cells/{name.replace(' ', '_')}-5-s0_{way.values[0]:g}"
        config = json.loads((folder / task / "config.json").read_text())
        assert f"| {name} | 2 | " in out
        assert f"| {name} | 5 | " in out
        assert config["tasks"] == [task]
        assert config["dataset"]["train_instances"] == 5
        assert config["training"]["trainable"] == way.flags.get("trainable", "all")
        assert config["training"][way.rate] == way.values[0]
        assert bool(config["training"]["start"]) == (name != fewshot.LORA)


def few_shot(*runs):
    config = fewshot.FewShotConfig(runs=tuple(map(str, runs)))
    return fewshot.FewShot(config, runtime.pick_device(device="cpu"))


def test_cell_starts_from_the_run_of_its_seed(finished, copied):
    study = few_shot(finished / "run", copied)
    cells = [study.cell("all", study.tasks[0], 4, seed) for seed in (0, 1)]
    starts = [cell.settings.training.start for cell in cells]
    assert starts == [str(finished / "run"), str(copied)]
    # The digest of the adapter tells the cells of other runs apart, not its place.
    assert cells[0].facts == cells[1].facts
    (copied / "adapter.safetensors").write_bytes(b"other")
    assert cells[0].facts != study.cell("all", study.tasks[0], 4, 1).facts


def test_fresh_lora_is_as_large_as_the_run(copied):
    saved = json.loads((copied / "config.json").read_text())
    _, extra_rank = fewshot.lora_flags(str(copied))
    base = checkpoint.on_meta(checkpoint.read_config(ROOT / "tiny"))
    config = OrchMoEConfig(**saved["adapter"])
    own = total("orchmoe", base, config)
    assert abs(own - total("lora", base, config, extra_rank=extra_rank)) < 0.03 * own


def test_tables_rows_stand_beside_the_lora_of_as_many_examples():
    found = {}
    for way, size, loss in (
        (fewshot.AS_IT_IS, 0, 3.0),
        ("mixture", 2, 2.0),
        ("mixture", 5, 1.0),
        (fewshot.LORA, 2, 2.5),
        (fewshot.LORA, 5, 1.25),
    ):
        scores = np.full((3, 2), loss)
        found[way, size] = {"rougeL": scores, "loss": scores}
    text = fewshot.tables(found, {}, {})
    assert "| as it is | 0 | 3.00 | 3.000 | +0.500 [+0.500, +0.500] |" in text
    assert "| mixture | 2 | 2.00 | 2.000 | -0.500 [-0.500, -0.500] |" in text
    assert "| mixture | 5 | 1.00 | 1.000 | -0.250 [-0.250, -0.250] |" in text


@pytest.mark.parametrize("flags", [{}, {"runs": ("a",), "examples": ("4", "x")}])
def test_few_shot_config_refuses(flags):
    with pytest.raises(ValueError, match="give --runs, folders of runs, and --examples"):
        fewshot.FewShotConfig(**flags)
