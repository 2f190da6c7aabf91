"""Shared by all tests: the project's root on the path, one thread, one token cache, the folders of the real
data where they are given, the programs as a user starts them, one finished run, `stir` for adapters, and a T5
small enough to be compared in float64."""

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
torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other

import runtime  # noqa: E402  (the path comes first)
from experiments.pretrain import init_weights  # noqa: E402
from t5 import T5, T5Config  # noqa: E402

try:  # pytest tests/test_fuzz.py --hypothesis-profile=long
    from hypothesis import HealthCheck, settings

    settings.register_profile("long", max_examples=10_000, deadline=5000)
    settings.register_profile("short", max_examples=150, deadline=None, derandomize=True, database=None,
                              suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
    settings.load_profile("short")
except ImportError:
    pass


def _folder(variable: str) -> Path:
    if not os.environ.get(variable):
        pytest.skip(f"{variable} is not set")
    return Path(os.environ[variable])


@pytest.fixture(scope="session")
def sni_dir() -> Path:
    """The real Super-NaturalInstructions (tasks/, splits/), by the environment variable SNI_DIR."""
    return _folder("SNI_DIR")


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """What `python -m experiments.smollm2 --out DIR` makes, by the environment variable SMOLLM2_DIR."""
    return _folder("SMOLLM2_DIR")


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """prompts.jsonl and metrics.jsonl made with the official code, by the environment variable SNI_GOLDEN."""
    return _folder("SNI_GOLDEN")


CACHE = tempfile.TemporaryDirectory()  # of tokens, for the whole session
os.environ["XDG_CACHE_HOME"] = CACHE.name
SHORT = ["--device", "cpu", "--max-tasks", "4", "--eval-instances", "8", "--steps", "8", "--eval-every", "4",
         "--batch-size", "8", "--warmup", "2"]  # fmt: skip


def command(program, *arguments):
    return [sys.executable, str(ROOT / program), *map(str, arguments)]


def environment(**more):
    """Of a process: no GPU, so that two runs are equal to the last bit."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **more}


def run(program, *arguments, cwd, code=0):
    """stdout (with another code: stderr) of a program that must end with `code`; in this process, which
    spares the imports."""
    main = importlib.import_module(program.removesuffix(".py").replace("/", ".")).main
    runtime.warn.cache_clear()
    out, errors, before = io.StringIO(), io.StringIO(), os.getcwd()
    os.chdir(cwd)
    try:
        with (mock.patch.object(sys, "argv", [program, *map(str, arguments)]),
              pytest.raises(SystemExit) as end, contextlib.redirect_stdout(out),
              contextlib.redirect_stderr(errors)):
            runtime.run_program(main)
    finally:
        os.chdir(before)
    assert end.value.code == code, out.getvalue() + errors.getvalue()
    return out.getvalue() if code == 0 else errors.getvalue()


def process(program, *arguments, cwd, code=0, **more):
    """The same in a process of its own, with more in its environment."""
    done = subprocess.run(command(program, *arguments), cwd=cwd, capture_output=True, text=True, timeout=600,
                          env=environment(**more))  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def records(folder):
    return [json.loads(line) for line in open(folder / "metrics.jsonl", encoding="utf-8")]


def trace(folder):
    """The losses of all steps and the dev losses: what must not depend on interruptions."""
    names = ("step", "loss", "norm", "dev_loss")
    return [tuple(row.get(name, 0.0) for name in names) for row in records(folder)]


def terminate_after(steps, *arguments, cwd, out="run"):
    """Output of a run of train.py into `out` that gets a SIGTERM once it has logged so many steps."""
    started = subprocess.Popen(command("train.py", *arguments, "--out", out), cwd=cwd, text=True,
                               stdout=subprocess.PIPE, env=environment())  # fmt: skip
    while not (cwd / out / "metrics.jsonl").exists() or len(records(cwd / out)) < steps:
        time.sleep(0.02)
        assert started.poll() is None
    started.send_signal(signal.SIGTERM)
    said, _ = started.communicate(timeout=120)
    assert started.returncode == 130
    return said


def links(folder):
    """The bundled data and base, to be named in `folder` as the README names them."""
    for name in ("sni", "tiny"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture
def home(tmp_path):
    return links(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A folder with `run`, a finished run of OrchMoE on the bundled data; not to be changed."""
    folder = links(tmp_path_factory.mktemp("finished"))
    run("train.py", *SHORT, "--out", "run", cwd=folder)
    return folder


@pytest.fixture
def copied(finished, tmp_path, monkeypatch):
    """A copy of that run, to be changed; the working folder is the run's."""
    shutil.copytree(finished / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def stir(adapters: nn.Module, generator: torch.Generator) -> None:
    """Values that matter for B and for the routers of tokens: at their start they would hide the routing."""
    for linear in adapters.linears.values():
        nn.init.normal_(linear.skill_B, std=0.3, generator=generator)
        if linear.skill_task is not None:
            nn.init.normal_(linear.skill_task, generator=generator)


class Inputs(NamedTuple):
    input_ids: torch.Tensor  # (B,L)
    attention_mask: torch.Tensor  # (B,L)
    labels: torch.Tensor  # (B,Lt)


def teacher_forced(t5: T5, *inputs: torch.Tensor) -> torch.Tensor:
    """Sources (B,Ls), their mask, targets so far (B,Lt) -> logits (B,Lt,V)."""
    return t5.logits(t5.hidden(*inputs))


@pytest.fixture
def small_t5() -> T5:
    """A random v1.1-shaped T5 in float64, whose outputs differ enough between samples to be told apart."""
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
    """Four sources of different lengths, padded; targets likewise."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 60, (4, 9), generator=generator)
    labels = torch.randint(2, 60, (4, 6), generator=generator)
    mask = torch.arange(9) < torch.tensor([9, 4, 7, 2])[:, None]
    labels[1, 3:] = labels[3, 2:] = -100
    return Inputs(ids.masked_fill(~mask, 0), mask, labels)
