"""Several processes under torchrun, with gloo on the CPU: the result does not depend on their number, on
--shard or on --accumulate; a run goes on with another number; a lost process ends the run. This file is also
the program that torchrun starts: `trace` and `loading` below."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import ROOT, records, run

import checkpoint
import data
import runtime
import t5
import tokenizer as tokenizers
import train
from baselines import attach_method
from experiments.pretrain import init_weights
from orchmoe import OrchMoEConfig

SMALL = t5.T5Config(1000, 32, 8, 48, 2, 2, 4, feed_forward_proj="gated-gelu", scale_decoder_outputs=False,
                       tied_head=False)  # fmt: skip
# By the number of processes: --shard, --accumulate, method. With and without --shard there are 1, 2 and 4
# micro-batches, and a process that has no row of one.
WAYS = {1: [(False, 4, "orchmoe"), (True, 1, "orchmoe")],
        2: [(False, 2, "orchmoe"), (True, 1, "orchmoe"), (True, 4, "orchmoe")],
        3: [(False, 1, "orchmoe"), (False, 4, "orchmoe"), (True, 2, "orchmoe"), (True, 4, "orchmoe"),
            (True, 1, "poly")]}  # fmt: skip


def torchrun(processes, *arguments, cwd, wait=True, timeout=300):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", processes, "--master-port"]
    with_port = [*command, 29500 + os.getpid() % 2000, "--", *arguments]  # or torchrun takes eval's --run
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(list(map(str, with_port)), cwd=cwd, env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    if not wait:
        return process
    out, errors = process.communicate(timeout=timeout)
    assert process.returncode == 0, errors
    return out


def python(*arguments, cwd, **environment):
    """The same in one process: its standard error and exit code."""
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, timeout=600)  # fmt: skip
    return done.stderr, done.returncode


# ------------------------------------------------------------------------------------- what torchrun starts


def trace(shard, accumulate, method, steps=60):
    """Losses, norms of the gradient and final adapter of 60 steps on bundled data in float64, with Gumbel
    noise and gradients that are clipped. Of 7 rows, 3 processes and 4 micro-batches some processes have
    none."""
    torch.manual_seed(0)
    place = runtime.Device(torch.device("cpu"), torch.float64, "")
    config = train.TrainConfig(steps=steps, batch_size=7, accumulate=accumulate, warmup=0, method=method)
    tokenizer = tokenizers.load(ROOT / "tiny")
    data_config = data.DataConfig(data=str(ROOT / "sni"), max_tasks=6, max_source_length=48)
    examples = data.load_sets(data_config, tokenizer, ["train"])["train"]
    base = init_weights(t5.T5(SMALL), 0).double()
    options = OrchMoEConfig(gumbel=True, router_init="normal", targets=("all",))
    adapters = attach_method(method, base, options, num_tasks=6, generator=runtime.generator(0))
    for parameter in base.parameters():
        parameter.data = parameter.data.double()
    if shard:
        for parameter in base.parameters():  # as old torch files hold them
            if parameter.dim() == 2 and not parameter.requires_grad:
                parameter.data = parameter.data.T.contiguous().T
        runtime.shard(base, base.blocks, place)
    base.checkpoint_blocks = accumulate == 2
    optimizer = train.make_optimizer(adapters, config)
    base.train()
    records = []
    for step in range(steps):
        rows = data.batch_at(examples.source_lengths, config.batch_size, config.seed, step)
        batch = data.collate([examples[i] for i in rows], seed=config.seed, step=step)
        with mock.patch.object(train, "CLIP", 0.1):
            records.append(train.train_step(base, adapters, optimizer, batch, step, config))
    return [[record[name] for record in records] for name in ("loss", "norm")], adapters.state_dict()


def loading(folder):
    """Bytes of anonymous memory that loading a sharded base adds at its peak, and its share."""
    place = runtime.Device(torch.device("cpu"), torch.float32, "")
    peak, done = [resident()], threading.Event()

    def watch():
        while not done.wait(0.001):
            peak.append(resident())

    watcher = threading.Thread(target=watch)
    with torch.device("meta"):  # imports and thread pools, before anything is counted
        warm = t5.T5(SMALL)
    warm = warm.to_empty(device="cpu").requires_grad_(False)
    runtime.shard(warm, warm.blocks, place)
    peak[:] = [resident()]
    watcher.start()
    base = checkpoint.mapped(folder)
    attach_method("orchmoe", base, OrchMoEConfig(), generator=runtime.generator(0))
    whole = sum(4 * p.numel() for p in base.parameters() if not p.requires_grad)
    runtime.shard(base, base.blocks, place)
    done.set()
    watcher.join()
    return max(peak) - peak[0], whole / runtime.world_size()


def resident():
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    with runtime.joined(None):
        if sys.argv[1] == "trace":
            results = {tuple(way): trace(*way) for way in json.loads(sys.argv[3])}
            if runtime.rank() == 0:
                torch.save(results, sys.argv[2])
        else:
            print(json.dumps(loading(sys.argv[2])), flush=True)
    os._exit(0)  # as runtime.run_program: a sharded base's gloo threads may abort as Python goes down


# ------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def wanted():
    """The traces of one process, started without torchrun."""
    return {method: trace(False, 1, method) for method in ("orchmoe", "poly")}


@pytest.mark.slow
@pytest.mark.parametrize("processes", WAYS)
def test_the_trace_is_that_of_one_process(processes, wanted, tmp_path):
    ways = WAYS[processes]
    torchrun(processes, __file__, "trace", tmp_path / "results.pt", json.dumps(ways), cwd=tmp_path)
    results = torch.load(tmp_path / "results.pt")
    (first, *_, last), _ = wanted["orchmoe"][0]
    assert last < first
    assert list(results) == ways
    for way, (found, state) in results.items():
        expected, final = wanted[way[2]]
        for numbers, right in zip(found, expected, strict=True):
            assert numbers == pytest.approx(right, abs=1e-10), way
        for name, tensor in final.items():
            torch.testing.assert_close(state[name], tensor, atol=1e-7, rtol=0, msg=f"{way}: {name}")


SHORT = ("--data", ROOT / "sni", "--model", ROOT / "tiny", "--device", "cpu", "--max-tasks", 6,
         "--max-source-length", 64, "--batch-size", 8, "--eval-instances", 6, "--eval-every", 20,
         "--steps", 60)  # fmt: skip


def losses(folder):
    rows = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    return [row.get("loss", row.get("dev_loss")) for row in rows]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    python(ROOT / "train.py", *SHORT, "--out", folder / "run", cwd=folder)
    return folder / "run"


def assert_same_run(folder, alone):
    assert losses(folder) == pytest.approx(losses(alone), abs=1e-5)
    runs = (folder, alone)
    reports, wanted = ([row["router"] for row in records(run) if "router" in row] for run in runs)
    assert len(reports) == 3
    for report, same in zip(reports, wanted, strict=True):  # of w of the rows of all processes
        assert report == pytest.approx(same, abs=1e-4)
    (state, info), (wanted, _) = (checkpoint.load_adapter(run / "adapter.safetensors") for run in runs)
    assert info["method"] == "orchmoe"
    for name, tensor in wanted.items():
        torch.testing.assert_close(state[name], tensor, atol=1e-4, rtol=0, msg=name)
    scores, wanted = (json.loads((run / "scores.json").read_text()) for run in runs)
    assert scores == wanted


@pytest.mark.slow
def test_programs_give_the_same_run_and_scores(alone, tmp_path):
    torchrun(2, ROOT / "train.py", *SHORT, "--shard", "--accumulate", 2, "--out", "run", cwd=tmp_path)
    assert_same_run(tmp_path / "run", alone)
    assert not list((tmp_path / "run").glob(".*.tmp"))
    options = ("--data", ROOT / "sni", "--split", "seen", "--limit", 7, "--device", "cpu", "--batch-size", 2)
    out = torchrun(3, ROOT / "eval.py", "--run", "run", *options, "--shard", "--out", "three", cwd=tmp_path)
    assert out.count("7 instances") == 1  # the first process alone speaks
    python(ROOT / "eval.py", "--run", "run", *options, "--out", "one", cwd=tmp_path)
    lines = (tmp_path / "three/predictions.jsonl").read_bytes()
    assert lines == (tmp_path / "one/predictions.jsonl").read_bytes() and lines.count(b"\n") == 7


def of_rank(rank, folder):
    """The process of that rank in the run on `folder`."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words, variables = ((path / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except OSError:
            continue
        if b"--out" in words and str(folder).encode() in words and f"RANK={rank}".encode() in variables:
            return int(path.name)
    raise AssertionError("no such process")


def begun(folder, processes, *flags):
    """A run of several processes that has saved its first checkpoint."""
    command = (ROOT / "train.py", *SHORT, *flags, "--out", folder)
    process = torchrun(processes, *command, cwd=folder.parent, wait=False)
    until = time.monotonic() + 120
    while not (folder / "checkpoint.pt").exists():
        assert process.poll() is None and time.monotonic() < until, process.stderr.read()
        time.sleep(0.05)
    return process


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_a_killed_process_ends_the_run_which_goes_on_with_another_number(alone, tmp_path):
    folder = tmp_path / "run"
    process = begun(folder, 2)
    os.kill(of_rank(1, folder), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "Signal 9" in errors
    for processes, flags in ((3, ["--shard"]), (1, [])):
        copy = tmp_path / f"on-{processes}"
        subprocess.run(["cp", "-r", folder, copy], check=True)
        command = (ROOT / "train.py", "--resume", "--device", "cpu", *flags, "--out", copy)
        torchrun(processes, *command, cwd=tmp_path)
        assert_same_run(copy, alone)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_loading_a_sharded_xl_holds_a_share(tmp_path):
    """Layers of T5-XL's size, one in each stack; the file is bfloat16, the share float32."""
    config = t5.T5Config(32128, 2048, 64, 5120, 1, 1, 32, feed_forward_proj="gated-gelu",
                            scale_decoder_outputs=False, tied_head=False)  # fmt: skip
    with torch.device("meta"):
        base = t5.T5(config)
    checkpoint.save(base.bfloat16().to_empty(device="cpu"), tmp_path)
    lines = torchrun(2, __file__, "loading", tmp_path, cwd=tmp_path).splitlines()
    assert len(lines) == 2
    for added, share in map(json.loads, lines):
        assert 0.9 * share < added < 1.3 * share


def test_every_row_is_in_one_share():
    rows = [torch.arange(2, 9)[: 2 + i].numpy() for i in range(7)]
    batch = data.collate([data.Example(f"e{len(row)}", "", "", row, [row], []) for row in rows])
    for parts, ranks in ((1, 1), (1, 3), (4, 3), (2, 8)):
        shares = [list(batch.split(parts, rank, ranks)) for rank in range(ranks)]
        assert len({len(share) for share in shares}) == 1  # as many steps in every process
        taken = [row for share in shares for mine, _ in share for row in mine]
        assert sorted(taken) == list(range(7))
        for mine, part in (pair for share in shares for pair in share):
            assert part.target_tokens == sum(len(rows[i]) for i in mine)
            assert part.input_ids.shape == (max(1, len(mine)), part.attention_mask.sum(1).max())


def test_generation_keeps_step_with_others(small_t5, inputs):
    """Rows that have ended stay as they are however long the others go on."""
    calls = []

    def agree(going):
        calls.append(going)
        return True

    first = small_t5.generate(inputs.input_ids, inputs.attention_mask, max_new_tokens=1)[0].item()
    small_t5.config = dataclasses.replace(small_t5.config, eos_token_id=first)  # then all rows end
    wanted = small_t5.generate(inputs.input_ids, inputs.attention_mask, max_new_tokens=40)
    found = small_t5.generate(inputs.input_ids, inputs.attention_mask, max_new_tokens=40, agree=agree)
    assert 2 < wanted.shape[1] < 40 == found.shape[1] == len(calls) and not calls[-1]
    assert torch.equal(found[:, : wanted.shape[1]], wanted) and not found[:, wanted.shape[1] :].any()


@pytest.mark.parametrize("flags, message", [
    (["--shard"], "--shard: splits the base over the processes of torchrun; start it by that"),
    (["--shard", "--method", "full"], "--shard: splits a frozen base; not with --method full"),
])  # fmt: skip
def test_what_cannot_be_sharded(flags, message, tmp_path):
    assert run("train.py", *SHORT, *flags, cwd=tmp_path, code=2) == f"train.py: error: {message}\n"


def test_what_a_cluster_left_in_the_environment_is_not_torchrun(monkeypatch):
    left = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "elsewhere"}
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert (runtime.rank(), runtime.local_rank(), runtime.world_size()) == (0, 0, 1)
    assert runtime.launcher() == "python"
    with runtime.joined(None):
        assert runtime.all_gather("alone") == ["alone"]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_more_processes_than_gpus_are_refused_by_each(monkeypatch, rank):
    """By the first, too, which alone speaks before they join."""
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runtime.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=f"--gpu {rank}: there are 1 GPUs.*start as many processes"):
        runtime.pick_device()


def test_bad_input_is_said_once_under_torchrun(tmp_path):
    process = torchrun(2, ROOT / "train.py", "--data", "nowhere", "--device", "cpu", cwd=tmp_path, wait=False)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and errors.count("train.py: error: ") == 1
    assert not list(tmp_path.glob("runs/*/config.json"))
