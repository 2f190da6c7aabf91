"""Test several processes under torchrun, with gloo on the CPU.

The result does not depend on the number of processes, on --shard or on --accumulate. A run can be
resumed with another number of processes. When one process dies, the run ends.

This file is also the program that torchrun starts, see `trace` and `loading`.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

import checkpoint
import data
import runtime
import t5
import tokenizer as tokenizers
import train
from baselines import attach_method
from experiments.pretrain import init_weights
from helpers import PYTHONPATH, ROOT, process, records, run
from orchmoe import OrchMoEConfig

CPU = torch.device("cpu")
SMALL = t5.T5Config(
    vocab_size=1000,
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

# By number of processes: (--shard, --accumulate, --method). With and without --shard there are
# 1, 2 and 4 micro-batches, and a process that has no row of one.
CASES = {
    1: [(False, 4, "orchmoe"), (True, 1, "orchmoe")],
    2: [(False, 2, "orchmoe"), (True, 1, "orchmoe"), (True, 4, "orchmoe")],
    3: [
        (False, 1, "orchmoe"),
        (False, 4, "orchmoe"),
        (True, 2, "orchmoe"),
        (True, 4, "orchmoe"),
        (True, 1, "poly"),
    ],
}


def start_torchrun(processes, *arguments, cwd):
    """Start several processes of a program and return torchrun's own process."""
    port = 29500 + os.getpid() % 2000
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", processes, "--master-port", port]
    words = [sys.executable, *launcher, "--", *arguments]  # without "--" it takes --run of eval.py
    return subprocess.Popen(
        [str(word) for word in words],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def torchrun(processes, *arguments, cwd):
    """Run several processes of a program, which must succeed, and return their stdout."""
    program = start_torchrun(processes, *arguments, cwd=cwd)
    output, errors = program.communicate(timeout=300)
    assert program.returncode == 0, errors
    return output


# -------------------------------------------------------------------------- what torchrun starts


def trace(shard, accumulate, method, steps=60):
    """Train 60 steps in float64. Return losses, norms of the gradient, and the final adapter.

    There is Gumbel noise, and gradients are clipped. Each batch has 7 rows, so with 3 processes
    and 4 micro-batches some processes have no row.
    """
    torch.manual_seed(0)
    config = train.TrainConfig(
        steps=steps, batch_size=7, accumulate=accumulate, warmup=0, method=method
    )
    tokenizer = tokenizers.load(ROOT / "tiny")
    data_config = data.DataConfig(data=str(ROOT / "sni"), max_tasks=6, max_source_length=48)
    examples = data.load_sets(data_config, tokenizer, ["train"])["train"]

    base = init_weights(t5.T5(SMALL), 0).double()
    options = OrchMoEConfig(gumbel=True, router_init="normal", targets=("all",))
    generator = runtime.generator(0)
    adapters = attach_method(method, base, options, num_tasks=6, generator=generator)
    for parameter in base.parameters():
        parameter.data = parameter.data.double()
        if shard and parameter.dim() == 2 and not parameter.requires_grad:
            # Transposed in memory, as old torch files hold weights.
            parameter.data = parameter.data.T.contiguous().T
    if shard:
        runtime.shard(base, base.blocks, runtime.Device(CPU, torch.float64, ""))
    base.checkpoint_blocks = accumulate == 2

    optimizer = train.make_optimizer(adapters, config)
    losses = []
    norms = []
    for step in range(steps):
        batch = train.training_batch(examples, step, config)
        with mock.patch.object(train, "LARGEST_NORM", 0.1):
            record = train.train_step(base, adapters, optimizer, batch, step, config)
        losses.append(record["loss"])
        norms.append(record["norm"])
    return losses, norms, adapters.state_dict()


def loading(folder):
    """Return how many bytes of memory the loading of a sharded base takes at most, and a share.

    Mapped files are not counted.
    """
    device = runtime.Device(CPU, torch.float32, "")

    # First a small base, so that imports and thread pools are not counted.
    with torch.device("meta"):
        warm = t5.T5(SMALL)
    warm = warm.to_empty(device="cpu").requires_grad_(False)
    runtime.shard(warm, warm.blocks, device)

    sizes = [resident_bytes()]
    done = threading.Event()

    def watch():
        while not done.wait(0.001):
            sizes.append(resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    base = checkpoint.mapped(folder)
    attach_method("orchmoe", base, OrchMoEConfig(), generator=runtime.generator(0))
    frozen = [weight for weight in base.parameters() if not weight.requires_grad]
    whole = sum(4 * weight.numel() for weight in frozen)
    runtime.shard(base, base.blocks, device)
    done.set()
    watcher.join()
    return max(sizes) - sizes[0], whole / runtime.world_size()


def resident_bytes():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    with runtime.distributed(CPU):
        if sys.argv[1] == "trace":
            results = [trace(*case) for case in json.loads(sys.argv[3])]
            if runtime.rank() == 0:
                torch.save(results, sys.argv[2])
        else:
            print(json.dumps(loading(sys.argv[2])), flush=True)
    os._exit(0)  # threads of gloo may abort while Python shuts down, see runtime.run_program


# ------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def expected_traces():
    """Return the traces of one process that torchrun has not started."""
    return {method: trace(False, 1, method) for method in ("orchmoe", "poly")}


@pytest.mark.slow
@pytest.mark.parametrize("processes", CASES)
def test_the_trace_is_that_of_one_process(processes, expected_traces, tmp_path):
    cases = CASES[processes]
    path = tmp_path / "results.pt"
    torchrun(processes, __file__, "trace", path, json.dumps(cases), cwd=tmp_path)
    results = torch.load(path, weights_only=True)
    assert len(results) == len(cases)
    for case, (losses, norms, state) in zip(cases, results, strict=True):
        expected_losses, expected_norms, expected_state = expected_traces[case[2]]
        assert expected_losses[-1] < expected_losses[0]
        assert losses == pytest.approx(expected_losses, abs=1e-10), case
        assert norms == pytest.approx(expected_norms, abs=1e-10), case
        torch.testing.assert_close(dict(state), dict(expected_state), atol=1e-7, rtol=0)


SHORT = ["--data", ROOT / "sni", "--model", ROOT / "tiny", "--device", "cpu", "--max-tasks", 6]
SHORT += "--max-source-length 64 --batch-size 8 --eval-instances 6".split()
SHORT += "--eval-every 20 --steps 60".split()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return the folder of a run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    process("train.py", *SHORT, "--out", folder / "run", cwd=folder)
    return folder / "run"


def assert_same_run(folder, expected):
    """Check that log, adapter and scores of two runs agree."""
    rows = records(folder)
    expected_rows = records(expected)
    assert len(rows) == len(expected_rows)
    reports = 0
    for row, expected_row in zip(rows, expected_rows, strict=True):
        for name in ("loss", "dev_loss"):
            assert row.get(name) == pytest.approx(expected_row.get(name), abs=1e-5)
        if "router" in row:  # a report on the rows of all processes
            assert row["router"] == pytest.approx(expected_row["router"], abs=1e-4)
            reports += 1
    assert reports == 3

    state, info = checkpoint.load_adapter(folder / "adapter.safetensors")
    expected_state, _ = checkpoint.load_adapter(expected / "adapter.safetensors")
    assert info["method"] == "orchmoe"
    torch.testing.assert_close(state, expected_state, atol=1e-4, rtol=0)
    scores = json.loads((folder / "scores.json").read_text())
    assert scores == json.loads((expected / "scores.json").read_text())


@pytest.mark.slow
def test_programs_give_the_same_run_and_scores(alone, tmp_path):
    flags = [*SHORT, "--shard", "--accumulate", 2, "--out", "run"]
    torchrun(2, ROOT / "train.py", *flags, cwd=tmp_path)
    assert_same_run(tmp_path / "run", alone)
    assert not list((tmp_path / "run").glob(".*.tmp"))

    flags = ["--run", "run", "--data", ROOT / "sni", "--split", "seen", "--limit", 7]
    flags += ["--device", "cpu", "--batch-size", 2, "--out"]
    output = torchrun(3, ROOT / "eval.py", *flags, "three", "--shard", cwd=tmp_path)
    assert output.count("7 instances") == 1  # only rank 0 prints
    process("eval.py", *flags, "one", cwd=tmp_path)
    lines = (tmp_path / "three/predictions.jsonl").read_bytes()
    assert lines == (tmp_path / "one/predictions.jsonl").read_bytes()
    assert lines.count(b"\n") == 7


@pytest.mark.slow
def test_adapters_that_do_not_train_are_not_sharded(finished, tmp_path):
    flags = [*SHORT, "--steps", 4, "--start", finished / "run", "--trainable", "router", "--out"]
    torchrun(2, ROOT / "train.py", *flags, "two", "--shard", cwd=tmp_path)
    process("train.py", *flags, "one", cwd=tmp_path)
    state, _ = checkpoint.load_adapter(tmp_path / "two/adapter.safetensors")
    expected, _ = checkpoint.load_adapter(tmp_path / "one/adapter.safetensors")
    torch.testing.assert_close(state, expected, atol=1e-5, rtol=0)


def process_of_rank(rank, folder):
    """Return the id of the process of this rank that trains in `folder`."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            variables = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        is_this_run = b"--out" in words and str(folder).encode() in words
        if is_this_run and f"RANK={rank}".encode() in variables:
            return int(path.name)
    raise AssertionError("no such process")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_a_run_that_lost_a_process_ends_and_resumes_with_another_number(alone, tmp_path):
    folder = tmp_path / "run"
    program = start_torchrun(2, ROOT / "train.py", *SHORT, "--out", folder, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint.pt").exists():
        assert program.poll() is None and time.monotonic() < deadline, program.stderr.read()
        time.sleep(0.05)
    os.kill(process_of_rank(1, folder), signal.SIGKILL)
    _, errors = program.communicate(timeout=60)
    assert program.returncode != 0 and "Signal 9" in errors

    for processes, flags in ((3, ["--shard"]), (1, [])):
        copy = tmp_path / f"resumed-by-{processes}"
        shutil.copytree(folder, copy)
        words = [ROOT / "train.py", "--resume", "--device", "cpu", *flags, "--out", copy]
        torchrun(processes, *words, cwd=tmp_path)
        assert_same_run(copy, alone)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_loading_a_sharded_base_takes_the_memory_of_a_share(tmp_path):
    """Use layers of the size of T5-XL, one in each stack. The file is bfloat16, a share float32."""
    config = dataclasses.replace(
        SMALL,
        vocab_size=32128,
        d_model=2048,
        d_kv=64,
        d_ff=5120,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=32,
    )
    with torch.device("meta"):
        base = t5.T5(config)
    checkpoint.save(base.bfloat16().to_empty(device="cpu"), tmp_path)
    lines = torchrun(2, __file__, "loading", tmp_path, cwd=tmp_path).splitlines()
    assert len(lines) == 2
    for line in lines:
        added, share = json.loads(line)
        assert 0.9 * share < added < 1.3 * share


@pytest.mark.parametrize("parts, ranks", [(1, 1), (1, 3), (4, 3), (2, 8)])
def test_every_row_is_in_one_share(parts, ranks):
    lengths = range(2, 9)
    examples = []
    for length in lengths:
        row = torch.arange(2, 2 + length).numpy()
        examples.append(data.Example(f"e{length}", "", "", row, [row], []))
    batch = data.collate(examples)

    steps = set()
    taken = []
    for rank in range(ranks):
        pieces = list(batch.split(parts, rank, ranks))
        steps.add(len(pieces))
        for rows, piece in pieces:
            taken += rows
            assert piece.target_tokens == sum(lengths[row] for row in rows)
            width = piece.attention_mask.sum(1).max()
            assert piece.input_ids.shape == (max(1, len(rows)), width)
    assert sorted(taken) == list(range(7))
    assert len(steps) == 1  # all processes take as many steps


def test_generation_waits_for_other_processes(small_t5, inputs):
    """Rows that have ended stay as they are however long the other processes go on."""
    calls = []

    def agree(going):
        calls.append(going)
        return True

    ids = inputs.input_ids
    mask = inputs.attention_mask
    first = small_t5.generate(ids, mask, max_new_tokens=1)[0].item()
    # With this token as EOS all rows end.
    small_t5.config = dataclasses.replace(small_t5.config, eos_token_id=first)
    alone = small_t5.generate(ids, mask, max_new_tokens=40)
    together = small_t5.generate(ids, mask, max_new_tokens=40, agree=agree)
    length = alone.shape[1]
    assert 2 < length < 40 == together.shape[1] == len(calls)
    assert not calls[-1]
    assert torch.equal(together[:, :length], alone)
    assert not together[:, length:].any()


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "splits the base over processes; start it with torchrun"),
        (["--method", "full"], "--method full leaves no frozen base to split; drop --shard"),
    ],
)
def test_what_cannot_be_sharded(flags, message, tmp_path):
    error = run("train.py", *SHORT, "--shard", *flags, cwd=tmp_path, code=2)
    assert error == f"train.py: error: --shard: {message}\n"


def test_variables_of_a_cluster_are_not_those_of_torchrun(monkeypatch):
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "elsewhere")
    assert (runtime.rank(), runtime.local_rank(), runtime.world_size()) == (0, 0, 1)
    assert runtime.launcher() == "python"
    with runtime.distributed(CPU):
        assert runtime.gather_from_ranks("alone") == ["alone"]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_every_rank_refuses_more_processes_than_gpus(monkeypatch, rank):
    """Rank 0, which has a GPU, must refuse too: it alone prints before the processes join."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, rank)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setattr(runtime.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="--gpu 1: there are 1 GPUs.*start as many"):
        runtime.pick_device()


def test_bad_input_is_printed_once_under_torchrun(tmp_path):
    words = [ROOT / "train.py", "--data", "nowhere", "--device", "cpu"]
    program = start_torchrun(2, *words, cwd=tmp_path)
    _, errors = program.communicate(timeout=120)
    assert program.returncode != 0
    assert errors.count("train.py: error: ") == 1
    assert not list(tmp_path.glob("runs/*/config.json"))
