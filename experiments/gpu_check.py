"""Check the path of CUDA on a GPU and measure it, in about ten minutes.

    python -m experiments.gpu_check --gpu 0

It prints one Markdown table for docs/speed.md, with the columns of experiments/bench.py, and the
card, the driver and the version of torch above it. Without transformers and peft it says which rows
are missing.
Test: pytest tests/experiments/test_gpu_check.py
"""

import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

import train
from experiments import bench
from experiments.bench import OURS, Setup
from support import program, runtime


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


def attention(setup: Setup) -> str:
    """Return which of torch's functions computes attention in a training step."""
    step = bench.our_step(setup)
    batch = bench.random_batch(setup, *setup.choose((4, 16, 8), (8, 250, 30)))
    with torch.profiler.profile() as profile:
        step(batch)
    names = [event.name.removeprefix("aten::") for event in profile.events()]
    counts = Counter(name for name in names if name.startswith("_scaled_dot_product_"))
    found = ", ".join(f"{count} x {name}" for name, count in sorted(counts.items()))
    return result(found, "no _math", f"attention in a {bench.describe(setup, batch)}")


def cudnn(setup: Setup) -> str:
    """Return the row of steps on lengths that are always new, with attention of cuDNN and without.

    cuDNN makes a plan for each new shape. TORCH_CUDNN_SDPA_DEPRIORITIZED=1 has torch leave it out.
    """
    step = bench.our_step(setup)
    rounds, longest = setup.choose((4, 32), (50, 512))
    lengths = np.random.default_rng(0).choice(range(8, longest), rounds + 1, replace=False)

    def steps(enabled):
        for length in lengths:
            torch.backends.cuda.enable_cudnn_sdp(enabled)
            yield step(bench.random_batch(setup, 8, length, 30))

    kinds = {"cuDNN": steps(True), "without cuDNN": steps(False)}
    contestants = {name: partial(next, generator) for name, generator in kinds.items()}
    times = bench.interleave(setup, contestants, rounds)
    torch.backends.cuda.enable_cudnn_sdp(True)
    what = f"training step, {setup.base_name}, 8 rows of {rounds} lengths below {longest}, each new"
    return bench.row(what, "cuDNN", "without cuDNN", times)


def waits(setup: Setup) -> str:
    """Return how often the host waits for the GPU in a training step of train.py."""
    base = bench.our_base(setup)
    adapters = bench.our_adapters(setup, base)
    config = train.TrainConfig()
    optimizer = train.make_optimizer(adapters, config)
    batch = bench.random_batch(setup, *setup.choose((4, 16, 8), (8, 256, 32)))
    step = partial(train.train_step, base, adapters, optimizer, batch, 0, config)
    step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    count = sum("synchronizing CUDA" in str(warning.message) for warning in caught)
    return result(count, "<= 3", f"waits for the GPU, {bench.describe(setup, batch)}")


def check(setup: Setup) -> Iterator[str]:
    """Yield the rows. A device that is not CUDA neither compiles nor counts its memory."""
    t5_base = setup._replace(shape=setup.choose(bench.NARROW_T5, "T5-base"))
    llama = setup._replace(shape=setup.choose(bench.NARROW_LLAMA, "Llama-3.2-1B"))
    if setup.device.type == "cuda":
        yield gpu_tests()
        yield graphs(setup)
        yield from step_and_memory(t5_base)
        yield cudnn(t5_base)
        yield waits(t5_base)
        yield waits(llama)
    yield attention(t5_base)
    yield attention(llama)
    yield from bench.bench_linear(setup)
    missing = bench.missing_packages()
    if missing:
        what = f"rows beside transformers and peft; not installed: {', '.join(missing)}"
        yield result("not measured", "", what)
    else:
        yield from bench.bench_step(setup)
        yield from bench.bench_generate(setup)


def main() -> None:
    config = program.from_flags(GPUCheckConfig, program.read_flags(__doc__, GPUCheckConfig))
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
