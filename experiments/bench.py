"""Measure how fast this code is beside what one would use instead: the tables of docs/speed.md.

Each figure is a ratio of two times, measured in one process and in turns (A B C, C B A, ...), so
that whatever slows the machine slows all. Beside it are its quartiles over the rounds. Rows that
compare with transformers, peft or rouge-score are left out where these are not installed.

    python -m experiments.bench                                 # on the CPU, with sni/ and tiny/
    python -m experiments.bench --only linear,step --gpu 0
    python -m experiments.bench --data natural-instructions     # with real prompts
    python -m experiments.bench --only decoder --model smollm2  # a decoder-only base

Letters: B batch, L source length, Lt target length, D input width, O output width, S skills,
R rank.
Test: pytest tests/experiments/test_bench.py
"""

import copy
import functools
import importlib.metadata
import importlib.util
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import data
import eval as evaluation
import kernels
import metrics
import orchmoe
import runtime
import t5
import tokenizer as tokenizers
from baselines import NoAdapter, attach_method
from experiments.pretrain import init_weights
from model import Backbone
from orchmoe import Adapters, OrchMoEConfig

CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
HEAD = "| ratio | quartiles | wanted | of | to | what |\n|---|---|---|---|---|---|"
S, R = 8, 4  # of every contestant; a plain LoRA has rank S R

OURS = "OrchMoE"
ACCUMULATED = "OrchMoE, --accumulate 2"  # two micro-batches, each cut to its own longest source
POLY = "peft Poly"
LORA = "peft LoRA"

Contestants = dict[str, Callable[[], object]]
Times = dict[str, list[float]]  # seconds of each contestant, one for each round
Step = Callable[[data.Batch], float]


# The parts that need no --model.
ALWAYS = ("linear", "step", "epoch", "generate", "decode", "rouge", "start")


@dataclass(frozen=True)
class BenchConfig:
    """Benchmark: what is measured, on what, and where."""

    only: tuple[str, ...] = ALWAYS  # parts to measure
    model: str = ""  # folder of a decoder-only base, for the further part decoder
    quick: bool = False  # small shapes and few rounds: shows that it runs, not how fast
    data: str = "sni/"  # folder of Super-NaturalInstructions, or of that shape
    gpu: int | None = None  # number of the GPU (default: the CPU)


class Setup(NamedTuple):
    """What all parts share: fields of BenchConfig, and where they compute."""

    quick: bool
    data: str
    model: str
    device: torch.device
    dtype: torch.dtype

    def choose(self, quick: Any, full: Any) -> Any:
        return quick if self.quick else full


# ------------------------------------------------------------------------------------- measuring


def interleave(setup: Setup, contestants: Contestants, rounds: int, warm: int = 1) -> Times:
    """Time the contestants in turns, in reverse order in every other round."""

    def now():
        if setup.device.type == "cuda":
            torch.cuda.synchronize(setup.device)
        return time.perf_counter()

    times: Times = {name: [] for name in contestants}
    for i in runtime.progress(range(-warm, rounds), ", ".join(contestants), unit="round"):
        names = list(contestants)
        if i % 2 == 1:
            names.reverse()
        for name in names:
            started = now()
            contestants[name]()
            times[name].append(now() - started)
    return {name: seconds[warm:] for name, seconds in times.items()}


def row(
    what: str,
    of: str,
    to: str,
    values: Times,
    wanted: str = "",
    unit: str = "ms",
    factor: float = 1e3,
) -> str:
    """Return a line of the table: the median ratio of two contestants.

    wanted: the bar that the project set itself. factor: turns the values into `unit`.
    """
    low, ratio, high = np.quantile(np.divide(values[of], values[to]), [0.25, 0.5, 0.75])
    sides = []
    for name in (of, to):
        sides.append(f"{name}, {factor * np.median(values[name]):.4g} {unit}")
    cells = [f"**{ratio:.2f}**", f"{low:.2f} - {high:.2f}", wanted, *sides, what]
    return f"| {' | '.join(cells)} |"


def flops(function: Callable[[], object]) -> int:
    """Return the floating point operations of matrix products and attention in one call."""

    def count_addmm_(_, a, b, **_options):
        return 2 * a[0] * a[1] * b[1]

    # torch counts addmm, but not the form in place that kernels.py uses.
    mapping = {torch.ops.aten.addmm_: count_addmm_}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        function()
    return counter.get_total_flops()


def installed(package: str) -> bool:
    """Return whether a package is installed. Warn if it is not."""
    found = importlib.util.find_spec(package) is not None
    if not found:
        runtime.warn(f"{package} is not installed: the rows that compare with it are left out")
    return found


# ------------------------------------------------------------------------------------ one Linear


def skills_loop(
    x: Tensor, A: Tensor, B: Tensor, c: Tensor, scale: float, weight: Tensor, bias: None = None
) -> Tensor:
    """Compute orchmoe.mix_skills one skill after the other, as the equation says; c is (B,S)."""
    A, B, c = A.to(x.dtype), B.to(x.dtype), (scale * c).to(x.dtype)
    y = F.linear(x, weight, bias)
    for s in range(len(A)):
        y = y + c[:, s, None, None] * (x @ A[s].T @ B[s])
    return y


def skills_einsum(
    x: Tensor, A: Tensor, B: Tensor, c: Tensor, scale: float, weight: Tensor, bias: None = None
) -> Tensor:
    """Keep the axis of the skills, as MoLoRA and peft's Arrow do: every output is stored."""
    A, B, c = A.to(x.dtype), B.to(x.dtype), (scale * c).to(x.dtype)
    h = torch.einsum("bld,srd->blsr", x, A)
    outputs = torch.einsum("blsr,sro->blso", h, B)
    return F.linear(x, weight, bias) + torch.einsum("bs,blso->blo", c, outputs)


class OwnForward(nn.Linear):
    """A Linear with a forward of its own, as a quantised one has."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def linear_contestants(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Contestants:
    """Return forward and backward of one frozen Linear, alone and with adapters."""
    samples, L, D, O = shape  # noqa: E741
    x = torch.randn(samples, L, D, device=device, dtype=dtype).requires_grad_()
    dy = torch.randn(samples, L, O, device=device, dtype=dtype)

    def frozen(cls=nn.Linear):
        linear = cls(D, O, bias=False, device=device, dtype=dtype)
        return nn.Sequential(OrderedDict(q=linear)).requires_grad_(False)

    def contestant(module, *c):
        trained = [p for p in module.parameters() if p.requires_grad]
        for parameter in trained:
            nn.init.normal_(parameter, std=0.02)
        return lambda: torch.autograd.grad(module(x), [x, *trained, *c], dy)

    def routed(mix=kernels.mix_skills, skills=S, cls=nn.Linear):
        module = frozen(cls)
        orchmoe.attach(module, OrchMoEConfig(skills=skills, rank=R, targets=("q",)), mix)
        # As `routed` does. What makes c, once for all Linears, is in the training step.
        c = torch.rand(samples, skills, device=device).requires_grad_()
        module.q.skill_weights = c
        return contestant(module.q, c)

    def lora(cls=nn.Linear, wide=True):
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=S * R, lora_alpha=S * R, target_modules=["q"])
        # wide is the default: A and B are float32 over a bf16 base, and x is cast up to them.
        return contestant(get_peft_model(frozen(cls), config, autocast_adapter_dtype=wide))

    found = {
        "frozen Linear": contestant(frozen()),
        "routed Linear": routed(),
        "plain twin": routed(orchmoe.mix_skills),
        "loop over skills": routed(skills_loop),
        "einsum with expert axis": routed(skills_einsum),
        "routed, S 4": routed(skills=4),
        "routed, S 16": routed(skills=16),
        "own forward, routed": routed(cls=OwnForward),
    }
    if installed("peft"):
        found[LORA] = lora()
        found[f"own forward, {LORA}"] = lora(OwnForward)
        if dtype != torch.float32:
            found[f"{LORA} all in bf16"] = lora(wide=False)
    return found


def bench_linear(setup: Setup) -> list[str]:
    shapes = [setup.choose((2, 16, 64, 96), (8, 256, 1024, 2816))]
    on_gpu = setup.device.type == "cuda"
    if on_gpu and not setup.quick:
        shapes.append((8, 512, 4096, 10240))  # T5-XXL
    dtypes = [torch.float32]
    if on_gpu or re.search(r"\b(avx512_bf16|amx_bf16)\b", CPU):
        dtypes.append(torch.bfloat16)
    else:
        runtime.warn("this CPU does not multiply bf16 natively: the rows in bf16 are left out")

    lines = []
    for shape in shapes:
        for dtype in dtypes:
            contestants = linear_contestants(shape, setup.device, dtype)
            times = interleave(setup, contestants, setup.choose(3, 21), warm=2)
            what = (
                f"forward + backward in {runtime.dtype_name(dtype)}, {shape[2]} -> {shape[3]}, "
                f"B {shape[0]}, L {shape[1]}, S {S}, R {R}, LoRA of rank {S * R}"
            )
            for of, to, wanted in (
                ("routed Linear", "frozen Linear", "<= 1.20"),
                ("routed Linear", LORA, "<= 1.00" if dtype == torch.float32 else "<= 0.92"),
                ("routed Linear", f"{LORA} all in bf16", ""),
                ("plain twin", "routed Linear", ""),
                ("loop over skills", "routed Linear", ">= 2"),
                ("einsum with expert axis", "routed Linear", ""),
                ("routed, S 16", "routed, S 4", "<= 1.25"),
                ("own forward, routed", f"own forward, {LORA}", "<= 1.15"),
            ):
                if to in times:
                    lines.append(row(what, of, to, times, wanted))
    return lines


# ------------------------------------------------------------------------------------- training


def make_base(setup: Setup) -> t5.T5:
    """Return a T5 of v1.1-small's shapes with random weights."""
    sizes = setup.choose((1124, 32, 8, 48, 2, 2, 4), (32128, 512, 64, 1024, 8, 8, 6))
    options = {"feed_forward_proj": "gated-gelu", "scale_decoder_outputs": False}
    shape = t5.T5Config(*sizes, **options, tied_head=False)
    return init_weights(t5.T5(shape), 0).to(setup.device, setup.dtype)


def attach_skills(
    base: Backbone, tasks: int = 8, skills: int = S, targets: tuple[str, ...] = ("all",)
) -> Adapters:
    config = OrchMoEConfig(tasks=tasks, skills=skills, rank=R, targets=targets)
    return attach_method("orchmoe", base, config, generator=runtime.generator(0))


def as_transformers(base: t5.T5) -> nn.Module:
    """Return the T5 of transformers with the same weights."""
    from transformers import T5ForConditionalGeneration

    quieten_transformers()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(base, folder)
        options = {"dtype": base.embedding.weight.dtype, "dropout_rate": 0.0}
        model = T5ForConditionalGeneration.from_pretrained(folder, **options)
        return copy.deepcopy(model).to(base.device)  # out of the mapped file


def quieten_transformers() -> None:
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def stepper(model: nn.Module, loss_of: Callable[..., float], parts: int = 1) -> Step:
    """Return a training step with AdamW. It returns the loss per target token.

    loss_of(batch, target_tokens): does forward and backward of one micro-batch of `parts`.
    """
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step(batch):
        loss = 0.0
        for _, part in batch.split(parts):
            loss += loss_of(part.to(trained[0].device), batch.target_tokens)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def our_step(base: Backbone, parts: int = 1, **skills: Any) -> Step:
    """Return the training step of OrchMoE."""
    adapters = attach_skills(base, **skills)

    def loss_of(batch, target_tokens):
        with evaluation.routed(base, adapters, batch):
            loss = base.loss(batch.input_ids, batch.attention_mask, batch.labels) / target_tokens
            loss.backward()
        return loss.item()

    return stepper(base, loss_of, parts)


def their_step(model: nn.Module, inputs_of: Callable[[data.Batch], dict[str, Tensor]]) -> Step:
    """Return the training step of a model of transformers with adapters of peft."""

    def loss_of(batch, target_tokens):
        mean = model(**inputs_of(batch), use_cache=False).loss
        loss = mean * batch.target_tokens / target_tokens
        loss.backward()
        return loss.item()

    return stepper(model, loss_of)


def trainer(name: str, setup: Setup, tasks: int = 8) -> Step:
    """Return the training step of a contestant, with adapters in every Linear of a block."""
    base = make_base(setup)
    if name in (OURS, ACCUMULATED):
        return our_step(base, parts=2 if name == ACCUMULATED else 1)
    import peft

    targets = ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]
    options = {"target_modules": targets, "task_type": "SEQ_2_SEQ_LM"}
    if name == POLY:
        adapter = peft.PolyConfig(r=R, n_skills=S, n_tasks=tasks, poly_type="poly", **options)
    else:
        adapter = peft.LoraConfig(r=S * R, lora_alpha=S * R, lora_dropout=0.0, **options)

    def inputs_of(batch):
        inputs = batch._asdict()
        del inputs["ids"]
        inputs["task_ids"] = batch.task_ids % tasks
        if name == LORA:
            del inputs["task_ids"]
        return inputs

    return their_step(peft.get_peft_model(as_transformers(base), adapter), inputs_of)


def random_batch(setup: Setup) -> data.Batch:
    """Return a batch whose lengths are evenly spread from half of the longest to the longest."""
    B, L, Lt = setup.choose((4, 16, 8), (8, 256, 32))
    rng = np.random.default_rng(0)
    examples = []
    for i in range(B):
        share = (1 + i / (B - 1)) / 2
        source, target = (rng.integers(3, 1000, int(length * share)) for length in (L, Lt))
        examples.append(data.Example(str(i), str(i), "", source, [target], [""], i))
    return data.collate(examples)


def peak_memory(name: str, setup: Setup) -> float:
    """Return the MiB that three training steps add to what was there before them.

    On the CPU it is the resident set of the process, on CUDA what torch counts.
    """
    step = trainer(name, setup)
    batch = random_batch(setup)

    def resident(field):
        status = Path("/proc/self/status").read_text()
        return int(re.search(rf"{field}:\s+(\d+)", status)[1]) / 1024

    on_gpu = setup.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(setup.device)
        before = torch.cuda.memory_allocated(setup.device) / 2**20
    else:
        Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark again
        before = resident("VmRSS")
    for _ in range(3):
        step(batch)
    if on_gpu:
        return torch.cuda.max_memory_allocated(setup.device) / 2**20 - before
    return resident("VmHWM") - before


def bench_step(setup: Setup) -> list[str]:
    others = [POLY, LORA] if installed("peft") else []
    steps = {name: trainer(name, setup) for name in (OURS, *others, ACCUMULATED)}
    batch = random_batch(setup)
    losses = [step(batch) for step in steps.values()]
    if max(losses) - min(losses) > 1e-3 * max(losses) and setup.dtype == torch.float32:
        raise ValueError(f"{', '.join(steps)}: their first losses differ: {losses}")

    contestants = bind(steps, batch)
    n = 2048
    a, b = torch.randn(2, n, n, device=setup.device, dtype=setup.dtype)
    contestants["GEMM"] = lambda: [a @ b for _ in range(4)]
    times = interleave(setup, contestants, setup.choose(2, 9))
    B, L = batch.input_ids.shape
    what = f"training step, T5 v1.1-small shapes, batch {B} x {L}, target {batch.labels.shape[1]}"
    lines = []
    for ours in (ACCUMULATED, OURS):
        lines += [row(what, other, ours, times, ">= 1.10") for other in others]

    # How far above the floor each is, and so how much is left to gain.
    for name in (OURS, *others[:1]):
        work = flops(contestants[name])
        floor = f"its {work / 1e9:.0f} GFLOP at the rate of a {n} x {n} GEMM"
        times[floor] = [seconds * work / (4 * 2 * n**3) for seconds in times["GEMM"]]
        lines.append(row(what, name, floor, times))

    if setup.device.type == "cuda" or Path("/proc/self/clear_refs").exists():
        peaks = {}
        for name in (OURS, *others):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                peaks[name] = [fresh.submit(peak_memory, name, setup).result()]
        for other in others:
            lines.append(row(f"peak memory of {what}", other, OURS, peaks, ">= 1", "MiB", 1))
    return lines


def bind(functions: dict[str, Callable], argument: Any) -> Contestants:
    """Return functions without arguments."""
    return {name: functools.partial(function, argument) for name, function in functions.items()}


def bench_epoch(setup: Setup) -> list[str]:
    if not installed("peft"):
        return []
    _, examples = load(setup, "train")
    tasks = len({example.task for example in examples})
    count, size = setup.choose((20, 4), (400, 16))
    rng = np.random.default_rng(0)
    chosen = [examples[i] for i in rng.permutation(len(examples))[:count]]
    lengths = np.array([len(example.source_ids) for example in chosen])
    orders = {
        OURS: [data.batch_at(lengths, size, 0, step) for step in range(count // size)],
        POLY: np.split(rng.permutation(count), count // size),
    }

    def contestant(name):
        step = trainer(name, setup, tasks)
        batches = []
        for rows in orders[name]:
            batches.append(data.collate([chosen[i] for i in rows]))
        fifths = iter([batches[i::5] for i in (0, 0, 1, 2, 3, 4)])  # the first one warms up

        def run():
            for batch in next(fifths):
                step(batch)

        return run

    times = interleave(setup, {name: contestant(name) for name in orders}, 5)
    what = f"a fifth of an epoch of {count} examples, batches by length against random ones"
    return [row(what, POLY, OURS, times, ">= 2", "s", 1)]


# ----------------------------------------------------------------------------------- generation


def load(
    setup: Setup, split: str, count: int = 0, model: str = "", length: int = 1024
) -> tuple[tokenizers.Tokenizer, Sequence[data.Example]]:
    """Return a tokenizer (of tiny/, or of a model), and `count` examples of a set (0: all)."""
    tokenizer = tokenizers.load(model or runtime.ROOT / "tiny")
    tasks = setup.choose(4, 0)
    options = data.DataConfig(data=setup.data, max_tasks=tasks, max_source_length=length)
    examples = data.load_sets(options, tokenizer, [split])[split]
    return tokenizer, data.subsample(examples, count)


def generation(
    setup: Setup,
    what: str,
    size: int,
    examples: Sequence[data.Example],
    tokenizer: tokenizers.Tokenizer,
    our_texts: Callable[[], list[str]],
    their_tokens: Callable[[Sequence[data.Example]], Tensor],
) -> list[str]:
    """Return the row of greedy generation in batches of `size`.

    their_tokens: generates with transformers and returns the new tokens of a batch.
    """
    texts = {}

    def ours():
        texts["ours"] = our_texts()

    def theirs():
        texts["theirs"] = []
        for start in range(0, len(examples), size):
            tokens = their_tokens(examples[start : start + size])
            texts["theirs"] += [tokenizer.decode(ids) for ids in tokens.tolist()]

    contestants = {"ours, longest first": ours, "transformers, file order": theirs}
    times = interleave(setup, contestants, setup.choose(1, 3))
    equal = sum(map(str.__eq__, texts["ours"], texts["theirs"]))
    of, to = reversed(contestants)
    return [
        row(f"greedy generation, {what}, {equal} outputs equal", of, to, times, ">= 1.5", "s", 1)
    ]


def bench_generate(setup: Setup) -> list[str]:
    if not installed("transformers"):
        return []
    count, size, most = setup.choose((8, 4, 5), (64, 16, 127))
    base = make_base(setup)
    model = as_transformers(base).eval()
    tokenizer, examples = load(setup, "test", count)
    ours = functools.partial(
        evaluation.predict,
        base,
        NoAdapter(base, full=False),
        examples,
        tokenizer,
        batch_size=size,
        max_new_tokens=most,
    )

    def theirs(examples):
        batch = data.collate(examples).to(setup.device)
        mask = batch.attention_mask.long()
        options = {"max_new_tokens": most, "do_sample": False, "num_beams": 1}
        return model.generate(input_ids=batch.input_ids, attention_mask=mask, **options)

    what = f"{count} test prompts, batches of {size}, {most} tokens"
    return generation(setup, what, size, examples, tokenizer, ours, theirs)


@torch.no_grad()
def bench_decode(setup: Setup) -> list[str]:
    """Decode one sample with folded, routed and no skills; then many samples of many tasks."""
    count, length, most, rounds = setup.choose((4, 16, 6, 2), (64, 128, 64, 15))
    names = ("bare base", "folded", "routed")
    bases = {name: make_base(setup).eval() for name in names}
    adapters = {name: attach_skills(bases[name], count).eval() for name in names[1:]}
    for each in adapters.values():
        generator = torch.Generator(setup.device).manual_seed(0)
        for linear in each.linears.values():
            nn.init.normal_(linear.skill_B, std=0.02, generator=generator)
    ids = torch.randint(3, 1000, (count, length), device=setup.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    sample = {"embeddings": bases["routed"].embed(ids[:1]), "mask": mask[:1]}
    tokens = {}

    def one(name):
        tokens[name] = bases[name].generate(ids[:1], mask[:1], max_new_tokens=most)

    def many(w):
        routed = adapters["routed"]
        options = {"max_new_tokens": most // 2, "on_keep": routed.keep}
        with routed.routed(w=w):
            bases["routed"].generate(ids[:, :16], mask[:, :16], **options)

    def fold():
        with adapters["folded"].folded(**sample):
            pass

    contestants = {name: functools.partial(one, name) for name in names}
    with adapters["folded"].folded(**sample), adapters["routed"].routed(**sample):
        times = interleave(setup, contestants, rounds)
    rates = {}
    for name in names:
        rates[name] = [tokens[name].shape[1] / seconds for seconds in times[name]]
    times = {"a token of the bare base": [1 / rate for rate in rates["bare base"]]}

    each_its_own = torch.eye(count, device=setup.device)
    contestants = {
        "folding and restoring": fold,
        "a batch of one task": lambda: many(each_its_own[[0] * count]),
        f"a batch of {count} tasks": lambda: many(each_its_own),
    }
    times |= interleave(setup, contestants, rounds)
    same = "the same" if torch.equal(tokens["folded"], tokens["routed"]) else "OTHER"
    what = (
        f"decoding one sample, {length} tokens in, {most} out; folded gives {same} tokens as routed"
    )
    fold, one_task, all_tasks = contestants
    of_many = f"{most // 2} tokens of decode, OrchMoE"
    return [
        row(what, "folded", "bare base", rates, ">= 0.97", "tokens/s", 1),
        row(what, "routed", "bare base", rates, "", "tokens/s", 1),
        row(what, fold, "a token of the bare base", times),
        row(of_many, all_tasks, one_task, times, "<= 1.05"),
    ]


# --------------------------------------------------------------------------- a decoder-only base

DECODER = {"skills": 4, "targets": ("q", "v")}  # S R = 16, as the LoRA beside it
WIDE = f"transformers + {LORA}"
NARROW = f"transformers + {LORA} all in bf16"


def causal_lm(setup: Setup, dtype: torch.dtype, wide: bool = True) -> nn.Module:
    """Return the model of transformers with a LoRA of peft.

    wide: keep A and B in float32, which is the default of peft.
    """
    import peft
    from transformers import AutoModelForCausalLM

    quieten_transformers()
    base = AutoModelForCausalLM.from_pretrained(setup.model, dtype=dtype).to(setup.device)
    rank = DECODER["skills"] * R
    targets = ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, task_type="CAUSAL_LM")
    return peft.get_peft_model(base, config, autocast_adapter_dtype=wide)


def causal_inputs(batch: data.Batch) -> dict[str, Tensor]:
    """Return source and target in one row, for rows without padding."""
    no_labels = torch.full_like(batch.input_ids, -100)
    return {
        "input_ids": torch.cat((batch.input_ids, batch.labels), 1),
        "labels": torch.cat((no_labels, batch.labels), 1),
    }


def bench_decoder(setup: Setup) -> list[str]:
    if not installed("peft"):
        return []
    B, L, Lt = setup.choose((2, 12, 4), (16, 144, 16))
    rng = np.random.default_rng(0)
    examples = []
    for i in range(B):
        source, target = rng.integers(3, 1000, L), rng.integers(3, 1000, Lt)
        examples.append(data.Example(str(i), "", "", source, [target], [""]))
    batch = data.collate(examples)

    def loaded(dtype):
        return checkpoint.load(setup.model, dtype=dtype, device=setup.device)

    narrow, wide = torch.bfloat16, torch.float32
    compiled = loaded(narrow)
    compiled.compile_blocks(setup.choose("eager", "inductor"))
    models = {
        f"{WIDE}, bf16": causal_lm(setup, narrow),
        NARROW: causal_lm(setup, narrow, wide=False),
        f"{WIDE}, float32": causal_lm(setup, wide),
    }
    steps = {name: their_step(model, causal_inputs) for name, model in models.items()}
    steps[f"{OURS}, bf16"] = our_step(loaded(narrow), **DECODER)
    steps[f"{OURS}, float32"] = our_step(loaded(wide), **DECODER)
    steps[f"{OURS}, bf16, --compile"] = our_step(compiled, **DECODER)
    losses = {name: step(batch) for name, step in steps.items()}
    if max(losses.values()) > 1.02 * min(losses.values()):
        raise ValueError(f"the first losses of the contestants differ: {losses}")

    times = interleave(setup, bind(steps, batch), setup.choose(1, 5))
    model = Path(setup.model).name
    what = f"training step, {model}, {B} x {L + Lt} tokens of which {Lt} labels, q and v, S R 16"
    lines = []
    for of, kind, wanted in (
        (f"{WIDE}, bf16", "bf16", ">= 1.8"),
        (NARROW, "bf16", ""),
        (f"{WIDE}, float32", "bf16", ""),
        (f"{WIDE}, float32", "bf16, --compile", ">= 3.3"),
        (f"{OURS}, bf16", "bf16, --compile", ""),
        (f"{WIDE}, float32", "float32", ""),
        (f"{OURS}, float32", "bf16", ""),
    ):
        lines.append(row(what, of, f"{OURS}, {kind}", times, wanted))
    return lines + generate_decoder(setup)


def generate_decoder(setup: Setup) -> list[str]:
    """Return the row of generation in bf16. The adapters are as they start: all are the base."""
    count, size, most, longest = setup.choose((4, 2, 3, 64), (64, 16, 32, 512))
    base = checkpoint.load(setup.model, dtype=torch.bfloat16, device=setup.device)
    model = causal_lm(setup, torch.bfloat16).eval()
    tokenizer, examples = load(setup, "test", count, setup.model, longest)
    ours = functools.partial(
        evaluation.predict,
        base,
        attach_skills(base, **DECODER),
        examples,
        tokenizer,
        batch_size=size,
        max_new_tokens=most,
    )
    pad = base.config.pad_token_id

    def theirs(examples):
        sources = [torch.from_numpy(example.source_ids).long() for example in examples]
        masks = [torch.ones_like(source) for source in sources]
        ids = nn.utils.rnn.pad_sequence(sources, True, pad, "left").to(setup.device)
        mask = nn.utils.rnn.pad_sequence(masks, True, 0, "left").to(setup.device)
        options = {"max_new_tokens": most, "do_sample": False, "pad_token_id": pad}
        return model.generate(input_ids=ids, attention_mask=mask, **options)[:, ids.shape[1] :]

    what = (
        f"{Path(setup.model).name} in bf16, the other's adapters in float32, {count} test prompts, "
        f"batches of {size}, {most} tokens"
    )
    return generation(setup, what, size, examples, tokenizer, ours, theirs)


# -------------------------------------------------------------------------------- metric, start


def bench_rouge(setup: Setup) -> list[str]:
    if not installed("rouge_score"):
        return []
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    _, examples = load(setup, "test", setup.choose(50, 5000))
    references = [example.references[0] for example in examples]

    def ours(predictions):
        metrics._stems.cache_clear()  # as a new evaluation starts
        metrics._porter.cache_clear()
        pairs = zip(predictions, references, strict=True)
        return [metrics.rouge_l(prediction, [reference]) for prediction, reference in pairs]

    def theirs(predictions):
        found = map(scorer.score, references, predictions)
        return [score["rougeL"].fmeasure for score in found]

    lines = []
    # The longest predictions that there are, and predictions as short as references.
    for kind in ("copy-input", "copy-demo"):
        predictions = evaluation.copy_heuristic(kind, setup.data, examples)
        worst = np.abs(np.subtract(ours(predictions), theirs(predictions))).max()
        if worst > 1e-9:
            raise ValueError(f"metrics.rouge_l differs from rouge_score by {worst}")
        contestants = bind({"metrics.rouge_l": ours, "rouge_score": theirs}, predictions)
        times = interleave(setup, contestants, setup.choose(1, 3))
        what = (
            f"ROUGE-L of {len(examples)} pairs, {kind}, no stem known before; largest difference "
            f"{worst:.0e}"
        )
        lines.append(row(what, "rouge_score", "metrics.rouge_l", times, ">= 10", "s", 1))
    return lines


def bench_start(setup: Setup) -> list[str]:
    """Time from the command to the first line of the log, without and with a token cache."""
    program = [sys.executable, runtime.ROOT / "train.py", "--device", "cpu", "--data", setup.data]
    program += ["--steps", "100000", "--eval-instances", "1"]
    if setup.quick:
        program += ["--max-tasks", "4"]

    def start(folder):
        log = folder / "metrics.jsonl"
        output = folder.with_suffix(".txt")
        started = time.perf_counter()
        variables = os.environ | {"XDG_CACHE_HOME": str(folder.parent)}
        with open(output, "w") as file:
            process = subprocess.Popen(
                [*program, "--out", folder], stdout=file, stderr=file, env=variables
            )
            while not (log.exists() and log.stat().st_size):
                if process.poll() is not None:
                    raise ValueError(f"train.py ended: {output.read_text().strip()[-300:]}")
                time.sleep(0.02)
            seconds = time.perf_counter() - started
            process.kill()
            process.wait()
        return seconds

    with tempfile.TemporaryDirectory() as folder:
        first, *later = [start(Path(folder, str(i))) for i in range(setup.choose(2, 4))]
    times = {"first start": [first] * len(later), "second start": later}
    what = f"from command to first step on {Path(setup.data).name}"
    return [row(what, "first start", "second start", times, "second <= 8 s", "s", 1)]


# ----------------------------------------------------------------------------------- the program

PARTS = {
    "linear": bench_linear,
    "step": bench_step,
    "epoch": bench_epoch,
    "generate": bench_generate,
    "decode": bench_decode,
    "decoder": bench_decoder,
    "rouge": bench_rouge,
    "start": bench_start,
}


def machine(setup: Setup) -> str:
    """Return one line about the machine and the versions."""
    cpu = re.search(r"model name\s*:\s*(.+)", CPU)
    name = cpu[1] if cpu else platform.processor()
    if setup.device.type == "cuda":
        name = torch.cuda.get_device_name(setup.device)
    versions = []
    for package in ("torch", "transformers", "peft"):
        if importlib.util.find_spec(package):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    return (
        f"{name}, {torch.get_num_threads()} threads, {runtime.dtype_name(setup.dtype)} where "
        f"nothing else is said, {', '.join(versions)}, {date.today():%d %B %Y}; load before it "
        f"{os.getloadavg()[0]:.2f}."
    )


def main() -> None:
    config = runtime.from_flags(BenchConfig, runtime.read_flags(__doc__, BenchConfig))
    runtime.require_single_process()
    for part in config.only:
        if part not in PARTS:
            raise ValueError(f"--only {part}: choose from {', '.join(PARTS)}")
    if "decoder" in config.only and not config.model:
        raise ValueError("--only decoder: give the folder of a decoder-only base with --model")
    device, dtype, _ = runtime.pick_device(config.gpu, "cpu" if config.gpu is None else "")
    setup = Setup(config.quick, config.data, config.model, device, dtype)
    runtime.print_line(f"{machine(setup)}\n\n{HEAD}")
    for part in config.only:
        for line in PARTS[part](setup):
            runtime.print_line(line)


if __name__ == "__main__":
    runtime.run_program(main)
