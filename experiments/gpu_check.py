"""Check the path of CUDA on a GPU and measure it, in a quarter of an hour (an estimate).

    python -m experiments.gpu_check --gpu 0

It prints one Markdown table for docs/speed.md, with the columns of experiments/bench.py, and the
card, the driver and the version of torch above it. A part that fails is a row of the table, and the
others are measured all the same. Without transformers and peft it says which rows are missing.
Test: pytest tests/experiments/test_gpu_check.py tests/device
"""

import gc
import os
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
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


def result(value: object, wanted: str, what: str) -> str:
    """Return a line of bench's table for something that is no ratio."""
    return f"| **{value}** |  | {wanted} |  |  | {what} |"


# ---------------------------------------------------------------------------------- what is checked


def gpu_tests(setup: Setup) -> list[str]:
    """Run the tests that need a GPU in a process that sees only the GPU of the setup."""
    gpu = setup.device.index or 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    number = visible.split(",")[gpu] if visible else str(gpu)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/unit"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": number}
    done = subprocess.run(
        command, cwd=program.ROOT, env=environment, capture_output=True, text=True
    )
    summary = (done.stdout + done.stderr).strip().splitlines()[-1]
    return [result(summary, "none failed", "`pytest -m gpu`")]


def graphs(setup: Setup) -> list[str]:
    """Train with --compile on batches of many shapes, one of a single row, and count the graphs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = bench.our_step(setup, compiled=True)
    for shape in [(1, 40, 8), *np.random.default_rng(0).integers(2, 64, (15, 3))]:
        step(bench.random_batch(setup, *shape))
    count = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return [result(count, "<= 4", "graphs of --compile for 16 shapes of batches")]


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


def attention(setup: Setup) -> list[str]:
    """Return which of torch's functions computes attention in a training step."""
    step = bench.our_step(setup)
    batch = bench.random_batch(setup, *setup.choose((4, 16, 8), (8, 250, 30)))
    with torch.profiler.profile() as profile:
        step(batch)
    names = [event.name.removeprefix("aten::") for event in profile.events()]
    counts = Counter(name for name in names if name.startswith("_scaled_dot_product_"))
    found = ", ".join(f"{count} x {name}" for name, count in sorted(counts.items()))
    return [result(found, "no _math", f"attention in a {bench.describe(setup, batch)}")]


def waits(setup: Setup, micro_batches: int) -> list[str]:
    """Return how often the host waits for the GPU in a training step of train.py."""
    base = bench.our_base(setup)
    adapters = bench.our_adapters(setup, base)
    config = train.TrainConfig(accumulate=micro_batches)
    optimizer = train.make_optimizer(adapters, config)
    batch = bench.random_batch(setup, *setup.choose((4, 16, 8), (8, 256, 32)))
    step = partial(train.train_step, base, adapters, optimizer, batch, 0, config)
    step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    count = sum("synchronizing CUDA" in str(warning.message) for warning in caught)
    what = f"waits for the GPU in {micro_batches} micro-batches, {bench.describe(setup, batch)}"
    return [result(count, f"<= {1 + 2 * micro_batches}", what)]


# ---------------------------------------------------------------------------- shapes that are new

# cuDNN makes a plan for each new shape. The programs leave it out, see runtime.py.


def cudnn(setup: Setup, what: str, work: Callable[[int], object], largest: int) -> list[str]:
    """Return the row of work(size) with cuDNN's attention and without. No size comes twice."""
    rounds = setup.choose(3, 50)
    sizes = np.random.default_rng(0).choice(range(2, largest), rounds + 1, replace=False)
    is_enabled = torch.backends.cuda.cudnn_sdp_enabled()

    def contestant(enabled):
        unused = iter(sizes)

        def call():
            torch.backends.cuda.enable_cudnn_sdp(enabled)
            work(int(next(unused)))

        return call

    contestants = {"cuDNN": contestant(True), "without cuDNN": contestant(False)}
    try:
        times = bench.interleave(setup, contestants, rounds)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(is_enabled)
    return [bench.row(what, "cuDNN", "without cuDNN", times)]


def new_lengths(setup: Setup, of: str) -> list[str]:
    """Return the row of training steps whose sources, or targets, always have a new length."""
    step = bench.our_step(setup)
    source, target, largest = setup.choose((16, 8, 12), (250, 30, 512))

    def work(length):
        lengths = (length, target) if of == "sources" else (source, length)
        return step(bench.random_batch(setup, 8, *lengths))

    what = f"training step, {setup.base_name}, 8 rows, each time a new length of the {of}"
    return cudnn(setup, what, work, largest)


@torch.no_grad()
def new_batch_sizes(setup: Setup) -> list[str]:
    """Return the row of decoding batches that always have a new number of rows."""
    base = bench.our_base(setup).eval()
    length, most, largest = setup.choose((16, 3, 8), (128, 16, 64))
    ids = torch.randint(3, 1000, (largest, length), device=setup.device)
    mask = torch.ones_like(ids, dtype=torch.bool)

    def work(rows):
        return base.generate(ids[:rows], mask[:rows], max_new_tokens=most)

    what = f"decoding {most} tokens, {setup.base_name}, each time a new number of rows"
    return cudnn(setup, what, work, largest)


# ------------------------------------------------------------------------------------- the program


def parts(setup: Setup) -> dict[str, Callable[[], list[str]]]:
    """Return what is checked, by name. Each part returns its rows of the table."""
    t5 = setup._replace(shape=setup.choose(bench.NARROW_T5, "T5-base"))
    llama = setup._replace(shape=setup.choose(bench.NARROW_LLAMA, "Llama-3.2-1B"))
    found = {
        "tests": partial(gpu_tests, setup),
        "graphs": partial(graphs, setup),
        "step and memory": partial(step_and_memory, t5),
    }
    for base in (t5, llama):
        name = base.base_name
        found[f"attention, {name}"] = partial(attention, base)
        for micro_batches in (1, 2):
            found[f"waits in {micro_batches}, {name}"] = partial(waits, base, micro_batches)
        for of in ("sources", "targets"):
            found[f"new lengths of {of}, {name}"] = partial(new_lengths, base, of)
        found[f"new batch sizes, {name}"] = partial(new_batch_sizes, base)
        found[f"decoding, {name}"] = partial(bench.bench_decode, base)
    for shape, dtype in bench.linear_cases(setup):
        found[f"Linear, {shape}, {dtype}"] = partial(bench.linear_rows, setup, shape, dtype)
    if not bench.missing_packages():
        found["step beside peft"] = partial(bench.bench_step, setup)
        found["generation beside transformers"] = partial(bench.bench_generate, setup)
    return found


def check(setup: Setup) -> Iterator[str]:
    """Yield the rows. A part that raises an exception is a row, too."""
    for name, part in parts(setup).items():
        try:
            yield from part()
        except Exception as error:  # the other parts can still be measured
            reason = f"{type(error).__name__}: {error!s:.200}".replace("|", "/")
            yield result("failed", "", f"{name}: {' '.join(reason.split())}")
        release_memory()
    missing = bench.missing_packages()
    if missing:
        what = f"rows beside transformers and peft; not installed: {', '.join(missing)}"
        yield result("not measured", "", what)


def release_memory() -> None:
    """Free the models of a part. Base and adapters refer to each other, so this takes a search."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def driver() -> str:
    """Return the version of the GPU's driver, "unknown" without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True).stdout.split()
    return lines[0] if lines else "unknown"


def main() -> None:
    config = program.from_flags(GPUCheckConfig, program.read_flags(__doc__, GPUCheckConfig))
    if not torch.cuda.is_available():
        raise program.UserError("torch finds no GPU here; this program needs one")
    device, dtype, _ = runtime.pick_device(config.gpu)
    setup = Setup(False, str(program.ROOT / "sni"), "", device, dtype)
    program.print_line(f"driver {driver()}, {bench.machine(setup)}\n\n{bench.HEAD}")
    for line in check(setup):
        program.print_line(line)


if __name__ == "__main__":
    program.run_program(main)
