"""What the router of a run has learnt: numbers of known tables, and of a run by experiments.plot."""

import json
import math
import os

import pytest
import torch
from conftest import run

from experiments import routing


def test_mutual_information_of_known_tables():
    labels = ["x", "x", "y", "y"]
    assert routing.mutual_information(torch.eye(2)[[0, 0, 1, 1]], labels) == pytest.approx(math.log(2))
    assert routing.mutual_information(torch.eye(4), labels) == pytest.approx(math.log(2))
    assert routing.mutual_information(torch.eye(2)[[0, 1, 0, 1]], labels) == pytest.approx(0)
    assert routing.mutual_information(torch.full((4, 8), 1 / 8), labels) == pytest.approx(0)
    soft = torch.tensor([[0.75, 0.25]] * 2 + [[0.25, 0.75]] * 2)  # ln 2 less the entropy of (3/4, 1/4)
    expected = math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    assert routing.mutual_information(soft, labels) == pytest.approx(expected)


def test_a_runs_routing_is_computed_for_its_figures_and_again_when_it_trains_on(copied):
    pytest.importorskip("matplotlib")
    written = copied / "routing.json"
    out = run("experiments/plot.py", "--run", "run", cwd=copied.parent)
    assert [line.split("/")[-1] for line in out.splitlines()] == [
        "routing.json", "loss.png", "categories-seen.png", "categories-unseen.png", "router.png",
        "allocation.png"]  # fmt: skip
    learnt = json.loads(written.read_text())
    assert learnt["category"].keys() == learnt["w"].keys() and len(learnt["w"]) == 4
    assert len(learnt["skill_use"]) == 20 and 0 < learnt["entropy"] < math.log(8) and learnt["distance"] > 0
    assert "routing.json" not in run("experiments/plot.py", "--run", "run", cwd=copied.parent)
    later = written.stat().st_mtime + 1
    os.utime(copied / "adapter.safetensors", (later, later))
    assert "routing.json" in run("experiments/plot.py", "--run", "run", cwd=copied.parent)
