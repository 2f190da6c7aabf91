"""What tests share: paths, folders of real data, a small T5, and helpers that run the programs."""

import contextlib
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the models are tiny: more threads would only wait for each other

import runtime  # noqa: E402  (after the path is set)
from experiments.pretrain import init_weights  # noqa: E402
from t5 import T5, T5Config  # noqa: E402

try:  # pytest tests/test_fuzz.py --hypothesis-profile=long
    from hypothesis import HealthCheck, settings

    settings.register_profile("long", max_examples=10_000, deadline=5000)
    settings.register_profile(
        "short",
        max_examples=150,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("short")
except ImportError:
    pass

# One token cache for the whole session.
CACHE = tempfile.TemporaryDirectory()
os.environ["XDG_CACHE_HOME"] = CACHE.name

# Flags of a short training run.
SHORT = "--device cpu --max-tasks 4 --eval-instances 8 --steps 8 --eval-every 4".split()
SHORT += "--batch-size 8 --warmup 2".split()


# ------------------------------------------------------------------------------------- real data


def _folder(variable: str) -> Path:
    if not os.environ.get(variable):
        pytest.skip(f"{variable} is not set")
    return Path(os.environ[variable])


@pytest.fixture(scope="session")
def sni_dir() -> Path:
    """Return the real Super-NaturalInstructions (tasks/, splits/)."""
    return _folder("SNI_DIR")


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """Return the folder that `python -m experiments.smollm2 --out DIR` has made."""
    return _folder("SMOLLM2_DIR")


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Return the folder of prompts.jsonl and metrics.jsonl, made with the official code."""
    return _folder("SNI_GOLDEN")


# ---------------------------------------------------------------------------------- the programs


def command(program, *arguments):
    """Return the words that start a program of the project."""
    return [sys.executable, str(ROOT / program), *map(str, arguments)]


def environment(**more):
    """Return the environment of a process. Without a GPU two runs are equal bit for bit."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **more}


def run(program, *arguments, cwd, code=0):
    """Run a program in this process, which saves the imports. It must end with `code`.

    Return its stdout or, for another code than 0, its stderr.
    """
    module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
    runtime.warn.cache_clear()
    words = [program, *map(str, arguments)]
    output = io.StringIO()
    errors = io.StringIO()
    previous_folder = os.getcwd()
    os.chdir(cwd)
    try:
        with (
            mock.patch.object(sys, "argv", words),
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(errors),
            pytest.raises(SystemExit) as end,
        ):
            runtime.run_program(module.main)
    finally:
        os.chdir(previous_folder)
    assert end.value.code == code, output.getvalue() + errors.getvalue()
    return (output if code == 0 else errors).getvalue()


def process(program, *arguments, cwd, code=0, **variables):
    """Do the same as `run` in another process, with more variables in its environment."""
    done = subprocess.run(
        command(program, *arguments),
        cwd=cwd,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def terminate_after(steps, *arguments, cwd, out="run"):
    """Start train.py with --out `out`, send SIGTERM after some logged steps, return its stdout."""
    program = subprocess.Popen(
        command("train.py", *arguments, "--out", out),
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    while not (cwd / out / "metrics.jsonl").exists() or len(records(cwd / out)) < steps:
        time.sleep(0.02)
        assert program.poll() is None
    program.send_signal(signal.SIGTERM)
    output, _ = program.communicate(timeout=120)
    assert program.returncode == 130
    return output


def records(folder):
    """Return the lines of metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def trace(folder):
    """Return all losses, norms and dev losses. They must not depend on interruptions."""
    names = ("step", "loss", "norm", "dev_loss")
    return [[row.get(name, 0.0) for name in names] for row in records(folder)]


def links(folder):
    """Link the bundled data and base into `folder`, so that README's commands work in it."""
    for name in ("sni", "tiny"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture
def home(tmp_path):
    """Return an empty folder with the bundled data and base."""
    return links(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Return a folder with `run`, a finished run of OrchMoE. Tests must not change it."""
    folder = links(tmp_path_factory.mktemp("finished"))
    run("train.py", *SHORT, "--out", "run", cwd=folder)
    return folder


@pytest.fixture
def copied(finished, tmp_path, monkeypatch):
    """Return a copy of that run, which tests may change. Its parent is the working folder."""
    shutil.copytree(finished / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


# ------------------------------------------------------------------------------------ the models


def stir(adapters: nn.Module, generator: torch.Generator) -> None:
    """Set B and the token routers to random values, so that the outputs depend on the routing."""
    for linear in adapters.linears.values():
        nn.init.normal_(linear.skill_B, std=0.3, generator=generator)
        if linear.skill_W_task is not None:
            nn.init.normal_(linear.skill_W_task, generator=generator)


class Inputs(NamedTuple):
    """A batch for `small_t5`."""

    input_ids: torch.Tensor  # (B,L)
    attention_mask: torch.Tensor  # (B,L)
    labels: torch.Tensor  # (B,Lt)


def teacher_forced(t5: T5, *inputs: torch.Tensor) -> torch.Tensor:
    """Return logits (B,Lt,V) for sources (B,Ls), their mask, and targets so far (B,Lt)."""
    return t5.logits(t5.hidden(*inputs))


@pytest.fixture
def small_t5() -> T5:
    """Return a random v1.1-shaped T5 in float64. Its outputs differ clearly between samples."""
    base = T5(
        T5Config(
            vocab_size=64,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            scale_decoder_outputs=False,
            tied_head=False,
        )
    )
    init_weights(base, 0)
    return base.double().eval()


@pytest.fixture
def inputs() -> Inputs:
    """Return four sources and targets of different lengths, padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 60, (4, 9), generator=generator)
    labels = torch.randint(2, 60, (4, 6), generator=generator)
    mask = torch.arange(9) < torch.tensor([9, 4, 7, 2])[:, None]
    labels[1, 3:] = -100
    labels[3, 2:] = -100
    return Inputs(ids.masked_fill(~mask, 0), mask, labels)
