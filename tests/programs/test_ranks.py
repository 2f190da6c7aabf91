"""Test several processes under torchrun, with gloo on the CPU.

The result does not depend on the number of processes, on --shard or on --accumulate. A run can be
resumed with another number of processes. When one process dies, the run ends.

This file is also the program that torchrun starts, see `trace`, `loading` and `dying`.
"""

import dataclasses
import json
import os
import re
import signal
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch

import checkpoint
import data
import t5
import train
from baselines import attach_method
from helpers import (
    ROOT,
    SMALL_T5,
    interrupted,
    records,
    run,
    state_of,
    t5_values,
    torchrun,
)
from orchmoe import OrchMoEConfig
from random_t5 import init_weights
from support import program, runtime
from tasks import DataConfig
from tokenizer import load as load_tokenizer

CPU = torch.device("cpu")
SMALL = dataclasses.replace(SMALL_T5, vocab_size=1000)

# (--shard, --accumulate, --method). A batch has 7 rows, so with 3 processes and 4 micro-batches
# some processes have no row of the last one.
NOISY = "orchmoe-gumbel"
CASES = [(False, 4, NOISY), (True, 2, NOISY), (True, 4, NOISY), (True, 1, "poly")]


# -------------------------------------------------------------------------- what torchrun starts


def trace(shard, accumulate, method):
    """Train 12 steps in float64, with noise and clipped gradients.

    Return the loss and the norm of the gradient of each step, and the final adapter.
    """
    config = train.TrainConfig(batch_size=7, accumulate=accumulate, warmup=0, steps=12)
    data_config = DataConfig(max_tasks=6, max_source_length=48)
    tokenizer = load_tokenizer(config.model)
    examples = data.load_sets(data_config, tokenizer)["train"]

    base = init_weights(t5.T5(SMALL), 0)
    options = OrchMoEConfig(targets=("all",))
    generator = runtime.generator(0)
    adapters = attach_method(method, base, options, num_tasks=6, generator=generator)
    base.double()
    base.checkpoint_blocks = accumulate == 2
    if shard:
        for parameter in base.parameters():
            if parameter.dim() == 2 and not parameter.requires_grad:
                # Transposed in memory, as old torch files hold weights.
                parameter.data = parameter.data.T.contiguous().T
        runtime.shard(base, base.blocks, runtime.Device(CPU, torch.float64, ""))

    optimizer = train.make_optimizer(adapters, config)
    batch_order = data.BatchOrder(examples.source_lengths, config.batch_size, config.seed)
    losses_and_norms = []
    for step in range(config.steps):
        of_step = train.examples_of_step(examples, batch_order, step)
        with mock.patch.object(train, "LARGEST_NORM", 0.1):
            record = train.train_step(base, adapters, optimizer, of_step, step, config)
        losses_and_norms.append([record["loss"], record["norm"]])
    return torch.tensor(losses_and_norms, dtype=torch.float64), dict(adapters.state_dict())


def loading(folder):
    """Return the peak memory of loading a sharded base, and the size of a share, in bytes.

    Mapped files are not counted.
    """
    device = runtime.Device(CPU, torch.float32, "")
    # First a small base, so that imports and thread pools are not counted.
    warm = t5.T5(SMALL).requires_grad_(False)
    runtime.shard(warm, warm.blocks, device)

    sizes = [resident_bytes()]
    done = threading.Event()

    def watch():
        while not done.wait(0.001):
            sizes.append(resident_bytes())

    threading.Thread(target=watch).start()
    base = checkpoint.load(folder, dtype=None)
    whole = sum(4 * weight.numel() for weight in base.parameters())
    attach_method("orchmoe", base, OrchMoEConfig(), generator=runtime.generator(0))
    runtime.shard(base, base.blocks, device)
    done.set()
    return max(sizes) - sizes[0], whole / program.world_size()


def resident_bytes():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])


def dying(*flags):
    """Run train.py. The process of rank 1 dies in step 6."""
    sys.argv[1:] = flags
    number = 7 if program.rank() == 1 else 0
    with interrupted(train, "train_step", number, kind=signal.SIGKILL):
        program.run_program(train.main)


if __name__ == "__main__":
    part, *arguments = sys.argv[1:]
    if part == "dying":
        dying(*arguments)
    with runtime.distributed(CPU):
        if part == "trace":
            results = [trace(*case) for case in json.loads(arguments[1])]
            if program.rank() == 0:
                torch.save(results, arguments[0])
        else:
            print(json.dumps(loading(*arguments)), flush=True)
    os._exit(0)  # threads of gloo may abort while Python shuts down, see program.run_program


# ------------------------------------------------------------------------------------- the tests


@pytest.mark.slow
def test_the_trace_of_three_processes_is_that_of_one(tmp_path):
    path = tmp_path / "results.pt"
    torchrun(3, __file__, "trace", path, json.dumps(CASES))
    results = torch.load(path, weights_only=True)
    expected = {method: trace(False, 1, method) for _, _, method in CASES}
    for case, (losses_and_norms, state) in zip(CASES, results, strict=True):
        expected_values, expected_state = expected[case[2]]
        torch.testing.assert_close(losses_and_norms, expected_values, atol=1e-10, rtol=0)
        torch.testing.assert_close(state, expected_state, atol=1e-7, rtol=0)


SHORT = (
    "--max-tasks 6 --max-source-length 64 --batch-size 8 --eval-instances 6 "
    "--eval-every 4 --steps 12 --device cpu"
)
# Small steps, because Adam turns the rounding of tiny gradients into steps.
SMALL_STEPS = "--warmup 10 --lr-skills 2e-3 --lr-router 2e-4 --lr-allocation 2e-3"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return the folder of a run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    run(f"train.py {SHORT} {SMALL_STEPS} --out run", cwd=folder)
    return folder / "run"


def assert_same_adapter(folder, expected, atol):
    torch.testing.assert_close(state_of(folder), state_of(expected), atol=atol, rtol=0)


def assert_same_run(folder, expected):
    """Check that log, adapter and scores of two runs agree."""
    tolerances = {"loss": 1e-5, "dev_loss": 1e-5, "router_entropy": 1e-4}
    for row, expected_row in zip(records(folder), records(expected), strict=True):
        for name, tolerance in tolerances.items():
            assert row.get(name) == pytest.approx(expected_row.get(name), abs=tolerance)
    assert_same_adapter(folder, expected, atol=1e-4)
    scores = program.read_json(folder / "scores.json")
    for model, sets in program.read_json(expected / "scores.json").items():
        for which, expected_scores in sets.items():
            overall = pytest.approx(expected_scores["overall"], abs=1e-4)
            assert scores[model][which]["overall"] == overall


@pytest.mark.slow
def test_programs_give_the_same_run_and_scores(alone, tmp_path):
    flags = f"{SHORT} {SMALL_STEPS} --shard --accumulate 2 --out run"
    torchrun(2, ROOT / "train.py", flags)
    assert_same_run(tmp_path / "run", alone)

    flags = "--run run --split seen --limit 7 --batch-size 2 --device cpu --out"
    done = torchrun(2, ROOT / "eval.py", f"{flags} two --shard")
    assert done.stdout.count("7 seen instances") == 1  # only rank 0 prints
    run(f"eval.py {flags} one")
    predictions = (tmp_path / "two/predictions.jsonl").read_bytes()
    assert predictions == (tmp_path / "one/predictions.jsonl").read_bytes()


@pytest.mark.slow
def test_adapters_that_do_not_train_are_not_sharded(finished, tmp_path):
    flags = f"{SHORT} --steps 4 --lr-skills 0 --lr-allocation 0 --start"
    torchrun(2, ROOT / "train.py", f"--shard --out two {flags}", finished / "run")
    run(f"train.py --out one {flags}", finished / "run")
    assert_same_adapter(tmp_path / "two", tmp_path / "one", atol=1e-5)


@pytest.mark.slow
def test_a_run_that_lost_a_process_ends_and_resumes_with_another_number(alone, tmp_path):
    flags = f"{SHORT} {SMALL_STEPS} --out run"
    done = torchrun(2, __file__, f"dying {flags}", code=1)
    assert "Signal 9" in done.stderr
    torchrun(3, ROOT / "train.py", "--resume --device cpu --out run --shard")
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_loading_a_sharded_base_takes_the_memory_of_a_share_and_few_blocks(tmp_path):
    """Each of the 8 blocks has an eighth of 450 MB. The file is bfloat16, a share float32."""
    sizes = {"d_model": 512, "d_ff": 9000, "num_layers": 4, "num_decoder_layers": 4}
    base = t5.T5(dataclasses.replace(SMALL, **sizes))
    base.hf_config = t5_values(base.config)
    checkpoint.save(base.bfloat16(), tmp_path)
    lines = torchrun(2, __file__, "loading", tmp_path).stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        added, share = json.loads(line)
        assert 0.9 * share < added < 1.75 * share  # less than a share and three blocks


def test_generation_waits_for_other_processes(small_t5, inputs):
    """Rows that have ended stay as they are however long the other processes go on."""
    agree = mock.Mock(return_value=True)
    ids = inputs.input_ids
    mask = inputs.attention_mask
    first = small_t5.generate(ids, mask, max_new_tokens=1)[0].item()
    # With this token as EOS all rows end.
    small_t5.config = dataclasses.replace(small_t5.config, eos_token_id=first)
    alone = small_t5.generate(ids, mask, max_new_tokens=40)
    together = small_t5.generate(ids, mask, max_new_tokens=40, agree=agree)
    length = alone.shape[1]
    assert 2 < length < 40
    assert together.shape[1] == agree.call_count == 40
    assert agree.call_args.args == (False,)
    assert torch.equal(together[:, :length], alone)


def test_variables_of_a_cluster_are_not_those_of_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "3")
    assert (program.rank(), program.world_size()) == (0, 1)
    with runtime.distributed(CPU):
        assert runtime.gather_from_ranks("alone") == ["alone"]
