"""Check the path of CUDA on a GPU and measure it, in about ten minutes.

    python -m experiments.gpu_check --gpu 0

It prints one Markdown table for docs/speed.md, with the columns of experiments/bench.py, and the
card, the driver and the version of torch above it. It needs transformers and peft.
Test: pytest tests/experiments/test_gpu_check.py
"""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

import program
import runtime
from experiments import bench
from experiments.bench import OURS, Setup


@dataclass(frozen=True)
class GPUCheckConfig:
    """Check of a GPU: which one."""

    gpu: int = 0  # number of the GPU


def result(value: str, wanted: str, what: str) -> str:
    """Return a line of bench's table for something that is no ratio."""
    return f"| **{value}** |  | {wanted} |  |  | {what} |"


def gpu_tests() -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/unit"]
    done = subprocess.run(command, cwd=program.ROOT, capture_output=True, text=True)
    summary = done.stdout.strip().splitlines()[-1]
    return result(summary, "none failed", "`pytest -m gpu`")


def graphs(setup: Setup) -> str:
    """Train with --compile on batches of many shapes, one of a single row, and count the graphs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = bench.our_step(setup, compiled=True)
    for shape in [(1, 40, 8), *np.random.default_rng(0).integers(2, 64, (15, 3))]:
        step(bench.random_batch(setup, *shape))
    count = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return result(count, "<= 4", "graphs of --compile for 16 shapes of batches")


def step_and_memory(setup: Setup) -> list[str]:
    """Return the rows of a training step with --compile, and of its memory with checkpoints."""
    batch = bench.random_batch(setup, *setup.choose((4, 16, 8), (8, 256, 32)))
    what = bench.describe(setup, batch)
    compiled = f"{OURS}, --compile"
    steps = {OURS: bench.our_step(setup), compiled: bench.our_step(setup, compiled=True)}
    times = bench.time_steps(setup, steps, batch)
    makers = {
        OURS: partial(bench.our_step, setup),
        f"{OURS}, --checkpoint-blocks": partial(bench.our_step, setup, checkpointed=True),
    }
    rows = bench.memory_rows(setup, what, makers, batch)
    return [bench.row(what, OURS, compiled, times), *rows]


def check(setup: Setup) -> Iterator[str]:
    """Yield the rows. A device that is not CUDA neither compiles nor counts its memory."""
    if setup.device.type == "cuda":
        yield gpu_tests()
        yield graphs(setup)
        yield from step_and_memory(setup)
    for part in (bench.bench_linear, bench.bench_step, bench.bench_generate):
        yield from part(setup)


def main() -> None:
    config = program.from_flags(GPUCheckConfig, program.read_flags(__doc__, GPUCheckConfig))
    bench.require_packages()
    if not torch.cuda.is_available():
        raise program.UserError("torch finds no GPU here; this program needs one")
    device, dtype, _ = runtime.pick_device(config.gpu)
    setup = Setup(False, str(program.ROOT / "sni"), "", device, dtype)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.split()[:1]
    program.print_line(f"driver {driver}, {bench.machine(setup)}\n\n{bench.HEAD}")
    for line in check(setup):
        program.print_line(line)


if __name__ == "__main__":
    program.run_program(main)
