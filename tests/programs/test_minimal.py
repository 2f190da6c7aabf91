"""examples/minimal.py against train.py."""

import pytest

import train
from examples import minimal
from helpers import records
from support import runtime

STEPS = 50


@pytest.mark.slow
def test_losses_are_those_of_train(tmp_path):
    """An OrchMoE that was written from the equations alone has the losses of the default run."""
    flags = {"steps": STEPS, "warmup": 10, "eval_every": STEPS, "eval_instances": 10}
    settings = train.Settings(**flags, dtype="float32")
    device = runtime.pick_device(device="cpu", dtype="float32")
    train.train(settings, device, train.LaunchConfig(out=str(tmp_path)))
    expected = [row["loss"] for row in records(tmp_path) if "loss" in row]

    losses = list(minimal.train(steps=STEPS, warmup=10))
    assert len(expected) == STEPS
    assert losses == pytest.approx(expected, abs=1e-3)
