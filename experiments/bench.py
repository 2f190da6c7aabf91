"""Measure how fast this code is beside what one would use instead: the tables of docs/speed.md.

Each figure is a ratio of two times, measured in one process and in turns (A B C, C B A, ...), so
that whatever slows the machine slows all. Beside it are its quartiles over the rounds. Rows that
compare with transformers, peft or rouge-score are left out where these are not installed.

    python -m experiments.bench                                 # on the CPU, with sni/ and tiny/
    python -m experiments.bench --only linear,step --gpu 0
    python -m experiments.bench --data natural-instructions     # with real prompts
    python -m experiments.bench --only decoder --model smollm2  # a decoder-only base
    python -m experiments.bench --only peers --model smollm2    # peft's routed adapters

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
from collections.abc import Callable, Iterator, Sequence
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
LILY = "peft Lily"
XLORA = "peft X-LoRA"

Contestants = dict[str, Callable[[], object]]
Times = dict[str, list[float]]  # seconds of each contestant, one for each round

# The parts that need no --model.
ALWAYS = ("linear", "step", "epoch", "generate", "decode", "rouge", "start")


@dataclass(frozen=True)
class BenchConfig:
    """Benchmark: what is measured, on what, and where."""

    only: tuple[str, ...] = ALWAYS  # parts to measure
    model: str = ""  # folder of a decoder-only base, for the further parts decoder and peers
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


# ----------------------------------------------------------------------------- adapters of peft

# The routed adapters of peft, and the classes that an older peft lacks.
PEERS = {POLY: "PolyConfig", LILY: "LilyConfig", XLORA: "XLoraConfig"}


def available_peers() -> list[str]:
    """Return the PEERS that the installed peft has. Warn of each other one."""
    if not installed("peft"):
        return []
    import peft

    found = []
    for name, cls in PEERS.items():
        if hasattr(peft, cls):
            found.append(name)
        else:
            runtime.warn(f"peft {peft.__version__} has no {cls}: the rows of {name} are left out")
    return found


def adapter_weights(model: nn.Module) -> int:
    """Return the number of weights in A and B, of our adapters or of peft's."""
    count = 0
    for name, parameter in model.named_parameters():
        if re.search(r"(skill|lora|lily)_[AB]\b", name):
            count += parameter.numel()
    return count


def add_peft(
    name: str, model: nn.Module, skills: int, tasks: int = 8, wide: bool = True, **options: Any
) -> nn.Module:
    """Return the model with adapters of peft that have as many weights as our skills.

    wide: keep A and B in float32, which is the default of peft.
    options: target_modules and task_type, for every config of peft.
    """
    import peft

    rank = skills * R

    def weights_at_rank_1(config):
        adapted = peft.get_peft_model(model, config)
        count = adapter_weights(adapted)
        adapted.unload()
        return count

    if name == LORA:
        config = peft.LoraConfig(r=rank, lora_alpha=rank, **options)
    elif name == POLY:
        config = peft.PolyConfig(r=R, n_skills=skills, n_tasks=tasks, **options)
    elif name == LILY:
        # Four layers share an A, and all share four B: equal weights allow a larger rank.
        options |= {"stride_A": 4, "num_B": 4}
        lora = peft.LoraConfig(r=1, target_modules=options["target_modules"])
        ours = rank * weights_at_rank_1(lora)
        rank = round(ours / weights_at_rank_1(peft.LilyConfig(r=1, **options)))
        config = peft.LilyConfig(r=rank, **options)
    else:
        # X-LoRA reads its experts from folders. All start as this one, whose B is 0.
        model.config.use_cache = False
        with tempfile.TemporaryDirectory() as folder:
            expert = peft.get_peft_model(model, peft.LoraConfig(r=R, lora_alpha=R, **options))
            expert.save_pretrained(folder)
            expert.unload()
            config = peft.XLoraConfig(
                hidden_size=model.config.hidden_size,
                adapters={str(i): folder for i in range(skills)},
                use_trainable_adapters=True,
                task_type=options.get("task_type"),
            )
            return peft.get_peft_model(model, config, autocast_adapter_dtype=wide)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=wide)


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
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, peers: Sequence[str] = ()
) -> Contestants:
    """Return forward and backward of one frozen Linear, alone and with adapters."""
    samples, L, D, O = shape  # noqa: E741
    x = torch.randn(samples, L, D, device=device, dtype=dtype).requires_grad_()
    dy = torch.randn(samples, L, O, device=device, dtype=dtype)

    def frozen(cls=nn.Linear):
        linear = cls(D, O, bias=False, device=device, dtype=dtype)
        return nn.Sequential(OrderedDict(q=linear)).requires_grad_(False)

    def contestant(module, *c, **inputs):
        trained = [p for p in module.parameters() if p.requires_grad]
        for parameter in trained:
            nn.init.normal_(parameter, std=0.02)
        return lambda: torch.autograd.grad(module(x, **inputs), [x, *trained, *c], dy)

    def routed(mix=kernels.mix_skills, skills=S, cls=nn.Linear):
        module = frozen(cls)
        orchmoe.attach(module, OrchMoEConfig(skills=skills, rank=R, targets=("q",)), mix)
        # As `routed` does. What makes c, once for all Linears, is in the training step.
        c = torch.rand(samples, skills, device=device).requires_grad_()
        module.q.skill_weights = c
        return contestant(module.q, c)

    def lora(cls=nn.Linear, wide=True):
        return contestant(add_peft(LORA, frozen(cls), S, wide=wide, target_modules=["q"]))

    def peer(name):
        from transformers import PretrainedConfig

        module = nn.Sequential(OrderedDict(model=frozen()))  # with the names of a decoder
        module.config = PretrainedConfig(hidden_size=D)
        add_peft(name, module, S, target_modules=["q"])
        linear = module.model.q
        if name == POLY:
            return contestant(linear, task_ids=torch.arange(samples, device=device))
        if name == XLORA:
            # As with c: what makes these weights, once for all Linears, is in the training step.
            scalings = torch.rand(samples, L, 1, S, device=device).requires_grad_()
            return contestant(linear, scalings, scalings=scalings)
        return contestant(linear)

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
    for name in peers:
        found[name] = peer(name)
    return found


LINEAR_ROWS = (
    ("routed Linear", "frozen Linear", "<= 1.20"),
    ("routed Linear", LORA, "<= 1.00"),
    ("routed Linear", f"{LORA} all in bf16", ""),
    ("plain twin", "routed Linear", ""),
    ("loop over skills", "routed Linear", ">= 2"),
    ("einsum with expert axis", "routed Linear", ""),
    ("routed, S 16", "routed, S 4", "<= 1.25"),
    ("own forward, routed", f"own forward, {LORA}", "<= 1.15"),
)


def bench_linear(setup: Setup, peers: Sequence[str] = ()) -> list[str]:
    """Return the rows of one Linear: those of the peers, or all others."""
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
            contestants = linear_contestants(shape, setup.device, dtype, peers)
            compared = LINEAR_ROWS
            if peers:
                compared = [(peer, "routed Linear", "") for peer in peers]
                contestants = {name: contestants[name] for name in ("routed Linear", *peers)}
            times = interleave(setup, contestants, setup.choose(3, 21), warm=2)
            what = (
                f"forward + backward in {runtime.dtype_name(dtype)}, {shape[2]} -> {shape[3]}, "
                f"B {shape[0]}, L {shape[1]}, S {S}, R {R}, LoRA of rank {S * R}"
            )
            for of, to, wanted in compared:
                if (of, to) == ("routed Linear", LORA) and dtype != torch.float32:
                    wanted = "<= 0.92"
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


class Step:
    """A training step with AdamW. A call returns the loss per target token.

    loss_of(batch, target_tokens): does forward and backward of one micro-batch of `parts`.
    """

    def __init__(self, model: nn.Module, loss_of: Callable[..., float], parts: int = 1):
        self.model = model.train()
        self.loss_of = loss_of
        self.parts = parts
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)

    def __call__(self, batch: data.Batch) -> float:
        loss = 0.0
        for _, part in batch.split(self.parts):
            loss += self.loss_of(part.to(self.trained[0].device), batch.target_tokens)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def our_step(base: Backbone, parts: int = 1, **skills: Any) -> Step:
    """Return the training step of OrchMoE."""
    adapters = attach_skills(base, **skills)

    def loss_of(batch, target_tokens):
        with evaluation.routed(base, adapters, batch):
            loss = base.loss(batch.input_ids, batch.attention_mask, batch.labels) / target_tokens
            loss.backward()
        return loss.item()

    return Step(base, loss_of, parts)


def their_step(model: nn.Module, inputs_of: Callable[[data.Batch], dict[str, Tensor]]) -> Step:
    """Return the training step of a model of transformers with adapters of peft."""

    def loss_of(batch, target_tokens):
        mean = model(**inputs_of(batch), use_cache=False).loss
        loss = mean * batch.target_tokens / target_tokens
        loss.backward()
        return loss.item()

    return Step(model, loss_of)


def trainer(name: str, setup: Setup, tasks: int = 8) -> Step:
    """Return the training step of a contestant, with adapters in every Linear of a block."""
    base = make_base(setup)
    if name in (OURS, ACCUMULATED):
        return our_step(base, parts=2 if name == ACCUMULATED else 1)
    targets = ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]
    options = {"target_modules": targets, "task_type": "SEQ_2_SEQ_LM"}
    model = add_peft(name, as_transformers(base), S, tasks, **options)

    def inputs_of(batch):
        inputs = batch._asdict()
        del inputs["ids"]
        inputs["task_ids"] = batch.task_ids % tasks
        if name != POLY:
            del inputs["task_ids"]
        return inputs

    return their_step(model, inputs_of)


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


def peak_memory(make_step: Callable[[], Step], batch: data.Batch, setup: Setup) -> float:
    """Return the MiB that three training steps add to what was there before them.

    On the CPU it is the resident set of the process, on CUDA what torch counts.
    """
    step = make_step()
    for parameter in step.model.parameters():
        parameter.sum()  # reads weights that still lie in a mapped file

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


def memory_rows(
    setup: Setup,
    what: str,
    makers: dict[str, Callable[[], Step]],
    batch: data.Batch,
    wanted: str = "",
) -> list[str]:
    """Return rows of the peak memory of others beside ours, each in a process of its own."""
    if setup.device.type != "cuda" and not Path("/proc/self/clear_refs").exists():
        return []
    peaks = {}
    for name, make_step in makers.items():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            peaks[name] = [fresh.submit(peak_memory, make_step, batch, setup).result()]
    lines = []
    for name in makers:
        if name != OURS:
            lines.append(row(f"peak memory of {what}", name, OURS, peaks, wanted, "MiB", 1))
    return lines


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

    makers = {name: functools.partial(trainer, name, setup) for name in (OURS, *others)}
    return lines + memory_rows(setup, what, makers, batch, ">= 1")


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


def causal_lm(setup: Setup, dtype: torch.dtype, wide: bool = True, name: str = LORA) -> nn.Module:
    """Return the model of transformers with adapters of peft."""
    from transformers import AutoModelForCausalLM

    quieten_transformers()
    base = AutoModelForCausalLM.from_pretrained(setup.model, dtype=dtype).to(setup.device)
    options = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return add_peft(name, base, DECODER["skills"], wide=wide, **options)


def causal_inputs(batch: data.Batch) -> dict[str, Tensor]:
    """Return source and target in one row, for rows without padding."""
    no_labels = torch.full_like(batch.input_ids, -100)
    return {
        "input_ids": torch.cat((batch.input_ids, batch.labels), 1),
        "labels": torch.cat((no_labels, batch.labels), 1),
    }


def decoder_batch(B: int, L: int, Lt: int) -> data.Batch:
    """Return a batch without padding."""
    rng = np.random.default_rng(0)
    examples = []
    for i in range(B):
        source, target = rng.integers(3, 1000, L), rng.integers(3, 1000, Lt)
        examples.append(data.Example(str(i), "", "", source, [target], [""], i % 8))
    return data.collate(examples)


def check_first_losses(steps: dict[str, Step], batch: data.Batch) -> None:
    """Take a step of each contestant. Raise ValueError if their losses differ."""
    losses = {name: step(batch) for name, step in steps.items()}
    if max(losses.values()) > 1.02 * min(losses.values()):
        raise ValueError(f"the first losses of the contestants differ: {losses}")


def bench_decoder(setup: Setup) -> list[str]:
    if not installed("peft"):
        return []
    B, L, Lt = setup.choose((2, 12, 4), (16, 144, 16))
    batch = decoder_batch(B, L, Lt)

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
    check_first_losses(steps, batch)

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


# ------------------------------------------------------------------------- routed adapters of peft


def decoder_trainer(name: str, setup: Setup) -> Step:
    """Return the training step of a contestant over the base of --model, in bf16."""
    if name == OURS:
        base = checkpoint.load(setup.model, dtype=torch.bfloat16, device=setup.device)
        return our_step(base, **DECODER)

    def inputs_of(batch):
        inputs = causal_inputs(batch)
        if name == POLY:
            inputs["task_ids"] = batch.task_ids
        return inputs

    return their_step(causal_lm(setup, torch.bfloat16, name=name), inputs_of)


def compare_peers(
    setup: Setup,
    what: str,
    make_step: Callable[[str, Setup], Step],
    peers: Sequence[str],
    batch: data.Batch,
) -> list[str]:
    """Return the rows of a training step and of its memory."""
    makers = {name: functools.partial(make_step, name, setup) for name in (OURS, *peers)}
    steps = {name: make() for name, make in makers.items()}
    weights = [f"{name} {adapter_weights(step.model):,}" for name, step in steps.items()]
    what = f"training step, {what}; weights in A and B: {', '.join(weights)}"
    check_first_losses(steps, batch)
    times = interleave(setup, bind(steps, batch), setup.choose(1, 5))
    lines = [row(what, name, OURS, times) for name in peers]
    return lines + memory_rows(setup, what, makers, batch)


def bench_peers(setup: Setup) -> Iterator[str]:
    """Compare with the routed adapters of peft, which have as many adapter weights as ours."""
    peers = available_peers()
    if not peers:
        return
    yield from bench_linear(setup, peers)

    batch = random_batch(setup)
    B, L = batch.input_ids.shape
    what = f"T5 v1.1-small shapes, batch {B} x {L}"
    # X-LoRA of peft 0.21 cannot load its experts into a T5: it changes the names of the weights.
    seq2seq = [name for name in peers if name != XLORA]
    yield from compare_peers(setup, what, trainer, seq2seq, batch)

    B, L, Lt = setup.choose((2, 12, 4), (8, 144, 16))
    what = f"{Path(setup.model).name} in bf16, {B} x {L + Lt} tokens, q and v"
    batch = decoder_batch(B, L, Lt)
    yield from compare_peers(setup, what, decoder_trainer, peers, batch)


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
    "peers": bench_peers,
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
        if part in ("decoder", "peers") and not config.model:
            raise ValueError(f"--only {part}: give the folder of a decoder-only base with --model")
    device, dtype, _ = runtime.pick_device(config.gpu, "cpu" if config.gpu is None else "")
    setup = Setup(config.quick, config.data, config.model, device, dtype)
    runtime.print_line(f"{machine(setup)}\n\n{HEAD}")
    for part in config.only:
        for line in PARTS[part](setup):
            runtime.print_line(line)


if __name__ == "__main__":
    runtime.run_program(main)
