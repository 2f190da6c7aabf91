"""The programs on a device that is not the CPU: no tensor is left behind on the other one.

The device of second_device.cpp computes on the CPU, so all numbers must be those of the CPU.
"""

import copy
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import checkpoint
import run_folder
import t5
import train
from baselines import load_method
from device.library import build
from helpers import (
    ROOT,
    adapted,
    examples_of,
    interrupted,
    links,
    random_batch,
    run,
    small_model,
    spied,
    trace,
)
from model import aligned
from support import runtime
from support.program import flag

# --------------------------------------------------------------------------------------- the device

CPU = torch.device("cpu")
SECOND = SimpleNamespace(  # what torch asks the module of a device, here torch.second
    is_available=lambda: False,
    device_count=lambda: 1,
    current_device=lambda: 0,
    manual_seed_all=lambda seed: None,
    _is_in_bad_fork=lambda: False,
    get_amp_supported_dtype=lambda: [torch.bfloat16],
)


@pytest.fixture(scope="module", autouse=True)
def second():
    """Return the second device. The programs pick it unless they get --device cpu."""
    library = build("second_device")
    torch.utils.rename_privateuse1_backend("second")
    torch._register_device_module("second", SECOND)
    torch.ops.load_library(library)
    device = torch.device("second", 0)

    pick_device = runtime.pick_device

    def pick_second(gpu=None, device_flag="", *arguments, **options):
        picked = pick_device(None, "cpu", *arguments, **options)
        return picked if device_flag == "cpu" else picked._replace(torch_device=device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "pick_device", pick_second)
        # Only here: otherwise transformers' Trainer would train on it in the tests of other files.
        patch.setattr(SECOND, "is_available", lambda: True)
        yield device


def test_tensors_of_two_devices_are_refused(second):
    """As CUDA does. A single number may be on the CPU, and so may indices."""
    here = torch.ones(3, 4)
    there = here.to(second)
    index = torch.tensor([0, 2])
    assert torch.equal((there + torch.tensor(1.0))[index].cpu(), here[:2] + 1)
    for mixed in (
        lambda: here + there,
        lambda: torch.cat([there, here]),
        lambda: here[index.to(second)],
        lambda: there.normal_(generator=torch.Generator()),
    ):
        with pytest.raises(RuntimeError, match="device|on the CPU"):
            mixed()


# ------------------------------------------------------------------------------------- the programs

SMALL = {"max_tasks": 2, "train_instances": 5, "eval_instances": 3, "max_source_length": 64}
SMALL |= {"steps": 2, "eval_every": 1, "batch_size": 2, "warmup": 1}
SMALL_FLAGS = [f"{flag(name)}={value}" for name, value in SMALL.items()]
ANSWER = "--split seen --limit 2 --max-new-tokens 3"
ON_CPU = "--device cpu"
QUESTION = "--ask 'Write the first word.' --input 'lion, June, wolf'"
CASES = [
    {"accumulate": 2, "method": "orchmoe-gumbel"},
    {"method": "moe-lora", "checkpoint_blocks": True},
    {"method": "c-poly"},  # Poly is the code of its common skills
    {"method": "mhr"},
    {"method": load_method(f"{ROOT / 'examples/hydra_lora.py'}:HydraLoRA")},
    {"method": "orchmoe-token"},
    {"dtype": "bfloat16"},
    {"start": "run"},
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Return a folder with `run`, trained on the second device."""
    folder = links(tmp_path_factory.mktemp("second"))
    output = run("train.py --out run", *SMALL_FLAGS, cwd=folder)
    assert "| orchmoe |" in output
    return folder


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_is_that_of_the_cpu(case, second, home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    settings = train.Settings(**SMALL | case)
    dtype = getattr(torch, settings.dtype.replace("auto", "float32"))
    losses = []
    for device in (CPU, second):
        out = tmp_path / device.type
        launch = train.LaunchConfig(out=str(out))
        picked = runtime.Device(device, dtype, "")
        with spied(train, "train_step") as train_step:
            train.train(settings, picked, launch)
        assert [call.args[0].device for call in train_step.call_args_list] == [device] * 2
        losses.append(trace(out))
    rtol = 0.02 if dtype == torch.bfloat16 else 1e-3
    torch.testing.assert_close(*losses, rtol=rtol, atol=1e-5)
    run(f"eval.py {ANSWER} --run", out)


@pytest.mark.parametrize("first, then", [("", ON_CPU), (ON_CPU, "")])
def test_a_run_resumes_on_the_other_device(first, then, home, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "score_run", lambda *_: {"frozen base": {}})
    with interrupted(train, "train_step", 1):
        run(f"train.py --out run {first}", *SMALL_FLAGS, code=130)
    run(f"train.py --resume --out run {then}")
    found, expected = trace(tmp_path / "run"), trace(home / "run")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("model", ["--run run", "--model tiny"])
def test_answers_are_those_of_the_cpu(model, second, home):
    base, _, _ = run_folder.load(runtime.pick_device(), model=home / "tiny")
    assert base.device == second
    answers = []
    for device in ("", ON_CPU):
        output = run(f"eval.py {model} {QUESTION} {device}", cwd=home)
        answers.append(output.splitlines()[1:])  # the first line names the device
    assert answers[0] == answers[1]
    run(f"eval.py {model} {ANSWER}", cwd=home)


# --------------------------------------------------------------------------------------- the models


def test_a_base_is_loaded_to_the_device(second):
    base = checkpoint.load(ROOT / "tiny", device=second)
    assert {tensor.device for tensor in base.state_dict().values()} == {second}


def test_a_row_that_ends_leaves_the_batch(second):
    base = small_model("llama3").eval()
    ids, mask, _ = random_batch(2, 37)
    first = base.generate(ids, mask, max_new_tokens=1)[:, 0]
    assert len(first.unique()) > 1
    base.config = replace(base.config, eos_ids=(int(first[0]),))
    expected = base.generate(ids, mask, max_new_tokens=3)
    base.to(second)
    found = base.generate(ids.to(second), mask.to(second), max_new_tokens=3)
    assert torch.equal(found.cpu(), expected)


def test_verbs_of_the_adapters_are_those_of_the_cpu(second):
    """The programs above train and generate, too."""
    results = []
    for device in (CPU, second):
        base = small_model("v1.1")
        adapters = adapted(base, targets=("all",))
        base.to(device)
        batch = [tensor.to(device) for tensor in random_batch(2, 37)]
        ids, mask, labels = batch
        embeddings = base.embed(ids)
        one = {"embeddings": embeddings[:1], "mask": mask[:1]}

        values = []
        with torch.no_grad():
            with adapters.routed(embeddings, mask):
                adapters.keep(torch.tensor([0, 2], device=device))
                values.append(base.loss(ids[[0, 2]], mask[[0, 2]], labels[[0, 2]]))
            with adapters.disabled():
                values.append(base.loss(*batch))
            with adapters.folded(**one):
                values.append(base.loss(*batch))
            copied = copy.deepcopy(base)
            copied.skill_adapters.merge(**one)
            values.append(copied.loss(*batch))
            adapters.detach()
            values.append(base.loss(*batch))
        results.append([value.cpu() for value in values])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["v1.1", "llama3"])
def test_a_mask_is_one_that_fused_attention_takes(name, second):
    """On CUDA torch takes a slow form, or copies the mask in every block, for other strides."""
    base = small_model(name).to(second)
    ids, mask, labels = (tensor.to(second) for tensor in random_batch(10, 37))
    with spied(F, "scaled_dot_product_attention") as attention:
        for is_training in (True, False):
            base.train(is_training)
            base.loss(ids, mask, labels)
        with torch.no_grad():
            newest, state = base.start(ids, mask, 5)
            for rows in ([0, 1, 2], [1, 2], [1]):
                rows = torch.tensor(rows, device=second)
                base.step(newest, state)
                state.keep(rows)
                newest = newest[rows]
    strides = []
    for call in attention.call_args_list:
        attn_mask = call.kwargs.get("attn_mask")
        if attn_mask is not None:
            strides.append(attn_mask.stride())
            assert attn_mask.dtype == call.args[0].dtype
    # Of two blocks or more in three steps. A decoder-only model has masks only in steps.
    assert len(strides) >= 6
    for stride in strides:
        assert stride[-1] == 1 and all(one % 8 == 0 for one in stride[:-1]), stride


def test_the_bias_of_the_encoder_exists_once_while_its_blocks_run(second, monkeypatch):
    base = small_model("v1.1").to(second)
    unpadded = []
    alive = []

    def recorded(bias):
        unpadded.append(weakref.ref(bias))
        return aligned(bias)

    def look(block, inputs):
        alive.append(unpadded[0]())

    monkeypatch.setattr(t5, "aligned", recorded)
    base.encoder.blocks[0].register_forward_pre_hook(look)
    ids, mask, _ = random_batch(10, 37)
    base.encode(ids.to(second), mask.to(second))
    assert alive == [None]


def test_attention_in_float32_gets_as_many_heads_of_keys_as_of_queries(second):
    """Otherwise no fused attention of CUDA would take them."""
    base = small_model("llama3")
    batch = random_batch(10, 37)
    with spied(F, "scaled_dot_product_attention") as attention:
        expected = base.loss(*batch)
        found = base.to(second).loss(*batch)
        base.bfloat16().loss(*batch)
    torch.testing.assert_close(found.cpu(), expected)
    heads = [[tensor.shape[1] for tensor in call.args] for call in attention.call_args_list]
    blocks = len(base.blocks)
    grouped, repeated = [4, 2, 2], [4, 4, 4]  # 4 heads of queries, 2 of keys and values
    assert heads == [grouped] * blocks + [repeated] * blocks + [grouped] * blocks


class Waits(TorchDispatchMode):
    """Count the operations that make the host wait for the second device, as CUDA would."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        self.count += self.waits(operation.name(), args, kwargs, result)
        return result

    def waits(self, name, args, kwargs, result):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_second = [tensor for tensor in tensors if tensor.device.type == "second"]
        on_cpu = [tensor for tensor in tensors if tensor.device == CPU]
        indexes = name.startswith("aten::index")
        if on_second:
            # Sizes that depend on values: nonzero, and what calls it.
            by_mask = indexes and any(tensor.dtype == torch.bool for tensor in on_second[1:])
            if by_mask or "nonzero" in name or "masked_select" in name:
                return True
            to_cpu = isinstance(result, torch.Tensor) and result.device == CPU
            if to_cpu or name == "aten::_local_scalar_dense":
                return True
            if name == "aten::lift_fresh":  # torch.tensor(..., device=) has made it on the CPU
                return True
        # From the CPU the host waits for a copy, unless it is non_blocking. An index is copied.
        to_second = isinstance(result, torch.Tensor) and result.device.type == "second"
        if not (on_cpu and to_second):
            return False
        if name == "aten::_to_copy":
            return not kwargs.get("non_blocking", False)
        if name == "aten::copy_":
            return not kwargs.get("non_blocking", args[2:] == (True,))
        return indexes


@pytest.mark.parametrize("method", ["orchmoe", "lora", "poly", "orchmoe-gumbel"])
@pytest.mark.parametrize("name", ["v1.1", "llama3"])
def test_a_step_waits_once_for_each_micro_batch_and_once_more(name, method, second):
    base = small_model(name)
    adapters = adapted(base, method)
    base.to(second)
    config = train.TrainConfig(accumulate=2)
    optimizer = train.make_optimizer(adapters, config)
    examples = examples_of(random_batch(10, 37))
    with torch.autograd.set_multithreading_enabled(False), Waits() as waits:
        train.train_step(base, adapters, optimizer, examples, 0, config)
    assert waits.count == config.accumulate + 1  # the losses, and the norm of the gradient
