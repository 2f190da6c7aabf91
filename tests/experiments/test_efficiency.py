"""How many examples a method needs: the order of its cells, and what the tables say."""

import importlib.util

import program
from experiments import efficiency
from helpers import run


def test_efficiency_scores_the_best_trial_as_seed_0(tmp_path, monkeypatch):
    small = {"steps": 2, "eval_every": 1, "eval_instances": 28, "num_pos": 0, "batch_size": 2}
    small |= {"seeds": 2, "trials": 2}
    monkeypatch.setattr(efficiency, "DEFAULTS", efficiency.DEFAULTS | small)
    monkeypatch.setattr(efficiency, "EXAMPLES", (2, 4))
    monkeypatch.setattr(efficiency, "EXAMPLES_IN_ORDER", (2, 4))
    monkeypatch.setattr(efficiency, "METHODS_IN_ORDER", (("orchmoe", "lora"),))
    flags = ["--results", "kept", "--out", "out", "--device", "cpu", "--jobs", 1]
    out = run("experiments/efficiency.py", "--stage", "cells", *flags, cwd=tmp_path)

    kept = tmp_path / "kept"
    names = sorted(path.stem for path in kept.glob("4/cells/*.json"))
    assert names == ["lora-s0", "lora-s1", "orchmoe-s0", "orchmoe-s1"]
    best = program.read_json(kept / "4/tuning.json")["lora"]
    cell = program.read_json(kept / "4/cells/lora-s0.json")
    assert cell["dev_loss"] == best["dev_loss"]
    assert cell["settings"]["alpha"] == best["best"]["alpha"]
    assert cell["settings"]["train_instances"] == 4
    assert not (tmp_path / "out/4/cells/lora-s0").exists()  # it is not trained once more
    assert (tmp_path / "out/4/cells/lora-s1").exists()
    assert "| 2 examples: orchmoe - lora | 2 | " in out
    assert "On unseen tasks OrchMoE has the loss of a LoRA with 4 examples with " in out
    (kept / "4/cells/orchmoe-s1.json").unlink()
    out = run("experiments/efficiency.py", "--results", "kept", cwd=tmp_path)
    assert "| 4 examples: orchmoe - lora | 1, unfinished | " in out
    assert "has the loss of a LoRA" not in out
    assert (kept / "efficiency.png").exists() or not importlib.util.find_spec("matplotlib")


def test_examples_needed_is_read_off_between_two_numbers():
    def needed(*losses):
        return efficiency.examples_needed(1.0, dict(zip((10, 25, 50, 100), losses, strict=True)))

    assert needed(2.0, 1.5, 0.5, 0.4) == "35"  # half way between 25 and 50 on a log scale
    assert needed(0.9, 0.8, 0.7, 0.6) == "at most 10"
    assert needed(2.0, 1.9, 1.8, 1.7) == "more than 100"
