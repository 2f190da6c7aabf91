"""Measure how fast this code is beside what one would use instead: the tables of docs/speed.md.

Each figure is a ratio of two times, measured in one process and in turns (A B C, C B A, ...), so
that whatever slows the machine slows all. Beside it are its quartiles over the rounds.

    python -m experiments.bench                               # on the CPU; a T5 of random weights
    python -m experiments.bench --only linear,step --gpu 0
    python -m experiments.bench --only step,generate --model smollm2 --data natural-instructions
    python -m experiments.bench --only peers --model smollm2  # peft's routed adapters
    python -m experiments.bench --only host                   # what Python costs, at tiny shapes

Needs transformers, and a peft that has Lily.
Letters: B batch, L source length, Lt target length, D input width, O output width, S skills,
R rank.
Test: pytest tests/experiments/test_bench.py
"""

import importlib.metadata
import importlib.util
import itertools
import multiprocessing
import os
import re
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
import data
import eval as evaluation
import kernels
import orchmoe
import tokenizer as tokenizers
from baselines import attach_method, without_adapters
from experiments.compare.study import kind_of_cpu
from experiments.computed import MODELS, t5_config
from llama import Llama, LlamaConfig
from model import Backbone
from orchmoe import Adapters, OrchMoEConfig
from support import program, runtime
from support.program import UserError
from t5 import T5
from tasks import DataConfig

HEAD = "| ratio | quartiles | wanted | of | to | what |\n|---|---|---|---|---|---|"
R = 4  # of every contestant; a plain LoRA has rank S R

OURS = "OrchMoE"
POLY = "peft Poly"
LORA = "peft LoRA"
LILY = "peft Lily"
XLORA = "peft X-LoRA"
PACKAGES = ("transformers", "peft")  # what these need

# Steps of these models are nearly all Python.
NARROW_T5 = "T5 with 12 + 12 narrow blocks"
NARROW_LLAMA = "Llama with 12 narrow blocks"
SHAPES = {
    **MODELS,
    NARROW_T5: replace(
        MODELS["T5-base"], vocab_size=1124, d_model=32, d_kv=8, d_ff=48, num_heads=4
    ),
    NARROW_LLAMA: replace(
        MODELS["Llama-3.2-1B"],
        vocab_size=1124,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=False,
    ),
}
# The base where no other one is named.
T5_SMALL = t5_config(512, 1024, 8, 6)
T5_QUICK = replace(t5_config(32, 48, 2, 4), vocab_size=1124, d_kv=8)

Contestants = dict[str, Callable[[], object]]
Times = dict[str, list[float]]  # seconds of each contestant, one for each round


@dataclass(frozen=True)
class BenchConfig:
    """Benchmark: what is measured, on what, and where."""

    only: tuple[str, ...] = ()  # parts to measure (default: all)
    model: str = ""  # folder of a decoder-only base (default: a T5 of random weights)
    quick: bool = False  # small shapes and few rounds: shows that it runs, not how fast
    data: str = str(program.ROOT / "sni")  # folder of SNI, or of that shape (default: sni/)
    gpu: int | None = None  # number of the GPU (default: the CPU)


class Setup(NamedTuple):
    """What all parts share: fields of BenchConfig, and where they compute."""

    quick: bool
    data: str
    model: str
    device: torch.device
    dtype: torch.dtype
    shape: str = ""  # key of SHAPES: the base has random weights in these shapes

    def choose(self, quick: Any, full: Any) -> Any:
        return quick if self.quick else full

    @property
    def base_name(self) -> str:
        return self.shape or Path(self.model).name or "T5 v1.1-small shapes"

    @property
    def is_decoder(self) -> bool:
        """Whether the base is decoder-only."""
        return bool(self.model) or isinstance(SHAPES.get(self.shape), LlamaConfig)

    def adapter(self) -> OrchMoEConfig:
        """Return our skills: in every Linear of a T5 v1.1-small, in q and v of other bases."""
        if self.model or self.shape:
            return OrchMoEConfig(abstract_tasks=8, skills=4, rank=R, targets=("q", "v"))
        return OrchMoEConfig(abstract_tasks=8, skills=8, rank=R, targets=("all",))


# ------------------------------------------------------------------------------------- measuring


def interleave(setup: Setup, contestants: Contestants, rounds: int) -> Times:
    """Time the contestants in turns, in reverse order in every other round.

    The first round is dropped.
    """

    def now():
        if setup.device.type == "cuda":
            torch.cuda.synchronize(setup.device)
        return time.perf_counter()

    times = {name: [] for name in contestants}
    for i in program.progress(range(rounds + 1), ", ".join(contestants), unit="round"):
        names = list(contestants)
        if i % 2 == 1:
            names.reverse()
        for name in names:
            started = now()
            contestants[name]()
            times[name].append(now() - started)
    return {name: seconds[1:] for name, seconds in times.items()}


def row(what: str, of: str, to: str, values: Times, wanted: str = "", unit: str = "ms") -> str:
    """Return a line of the table: the median ratio of two contestants."""
    low, ratio, high = np.quantile(np.divide(values[of], values[to]), [0.25, 0.5, 0.75])
    factor = {"ms": 1e3, "us": 1e6}.get(unit, 1)
    sides = []
    for name in (of, to):
        sides.append(f"{name}, {factor * np.median(values[name]):.4g} {unit}")
    cells = [f"**{ratio:.2f}**", f"{low:.2f} - {high:.2f}", wanted, *sides, what]
    return f"| {' | '.join(cells)} |"


# ----------------------------------------------------------------------------- adapters of peft


def adapter_weights(model: nn.Module) -> int:
    """Return the number of weights in A and B, of our adapters or of peft's."""
    count = 0
    for name, parameter in model.named_parameters():
        if re.search(r"(skill|lora|lily)_[AB]\b", name):
            count += parameter.numel()
    return count


def add_peft(
    name: str, model: nn.Module, skills: int, wide: bool = True, **options: Any
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

    with tempfile.TemporaryDirectory() as folder:
        if name == LORA:
            config = peft.LoraConfig(r=rank, lora_alpha=rank, **options)
        elif name == POLY:
            config = peft.PolyConfig(r=R, n_skills=skills, n_tasks=8, **options)
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


def linear_contestants(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Contestants:
    """Return forward and backward of one frozen Linear, alone and with adapters."""
    samples, L, D, O = shape  # noqa: E741
    x = torch.randn(samples, L, D, device=device, dtype=dtype).requires_grad_()
    dy = torch.randn(samples, L, O, device=device, dtype=dtype)

    def frozen():
        linear = nn.Linear(D, O, bias=False, device=device, dtype=dtype)
        return nn.Sequential(OrderedDict(q=linear)).requires_grad_(False)

    def contestant(linear, *c):
        trained = [p for p in linear.parameters() if p.requires_grad]
        for parameter in trained:
            nn.init.normal_(parameter, std=0.02)
        return lambda: torch.autograd.grad(linear(x), [x, *trained, *c], dy)

    def routed(mix=kernels.mix_skills):
        module = frozen()
        orchmoe.attach(module, OrchMoEConfig(skills=8, rank=R, targets=("q",)), mix)
        # As `routed` does. What makes c, once for all Linears, is in the training step.
        c = torch.rand(samples, 8, device=device).requires_grad_()
        module.q.skill_weights = c
        return contestant(module.q, c)

    def lora(wide):
        module = nn.Sequential(OrderedDict(model=frozen()))  # with the names of a decoder
        add_peft(LORA, module, 8, wide, target_modules=["q"])
        return contestant(module.model.q)

    found = {
        "frozen Linear": contestant(frozen().q),
        "routed Linear": routed(),
        "plain twin": routed(orchmoe.mix_skills),
        "loop over skills": routed(skills_loop),
        "einsum with expert axis": routed(skills_einsum),
    }
    if missing_packages():
        return found
    found[LORA] = lora(wide=True)
    if dtype != torch.float32:
        found[f"{LORA} all in bf16"] = lora(wide=False)
    return found


LINEAR_ROWS = (
    ("routed Linear", "frozen Linear", "<= 1.20"),
    ("routed Linear", LORA, "<= 1.00, in bfloat16 0.92"),
    ("routed Linear", f"{LORA} all in bf16", ""),
    ("plain twin", "routed Linear", ""),
    ("loop over skills", "routed Linear", ">= 2"),
    ("einsum with expert axis", "routed Linear", ""),
)


def linear_cases(setup: Setup) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Return the shapes (B, L, D, O) and dtypes in which one Linear is measured."""
    shapes = [setup.choose((2, 16, 64, 96), (8, 256, 1024, 2816))]
    dtypes = [torch.float32, torch.bfloat16]
    if setup.device.type == "cuda":
        if not setup.quick:
            shapes.append((8, 512, 4096, 10240))  # T5-XXL
        if setup.dtype == torch.float32:
            dtypes.remove(torch.bfloat16)  # an old GPU, which only emulates it
    return list(itertools.product(shapes, dtypes))


def linear_rows(setup: Setup, shape: tuple[int, ...], dtype: torch.dtype) -> list[str]:
    """Return the rows of one Linear."""
    contestants = linear_contestants(shape, setup.device, dtype)
    times = interleave(setup, contestants, setup.choose(3, 21))
    B, L, D, O = shape  # noqa: E741
    what = (
        f"forward + backward in {runtime.dtype_name(dtype)}, {D} -> {O}, B {B}, L {L}, S 8, "
        f"R {R}, LoRA of rank {8 * R}"
    )
    lines = []
    for of, to, wanted in LINEAR_ROWS:
        if of in times and to in times:
            lines.append(row(what, of, to, times, wanted))
    return lines


def bench_linear(setup: Setup) -> list[str]:
    lines = []
    for shape, dtype in linear_cases(setup):
        lines += linear_rows(setup, shape, dtype)
    return lines


# ------------------------------------------------------------------------------ bases and batches


def our_base(setup: Setup) -> Backbone:
    """Return the base of --model, or else one with random weights, as a rule a T5 v1.1-small."""
    if setup.model:
        return checkpoint.load(setup.model, dtype=setup.dtype, device=setup.device)
    torch.manual_seed(0)
    if setup.is_decoder:
        base = Llama(SHAPES[setup.shape])
    else:
        base = T5(SHAPES.get(setup.shape, setup.choose(T5_QUICK, T5_SMALL)))
    return base.to(setup.device, setup.dtype)


def hf_values(config: Any) -> dict[str, Any]:
    """Return the values of the config.json of a base in SHAPES."""
    values = asdict(config)
    values["tie_word_embeddings"] = config.tied_head
    values["eos_token_id"] = list(config.eos_ids)
    return values


def their_base(setup: Setup) -> nn.Module:
    """Return the same base in the class of transformers."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if setup.model:
        cls = transformers.AutoModelForCausalLM
        return cls.from_pretrained(setup.model, dtype=setup.dtype).to(setup.device)
    with tempfile.TemporaryDirectory() as folder:
        base = our_base(setup)
        base.hf_config = hf_values(base.config)
        checkpoint.save(base, folder)
        if setup.is_decoder:
            cls, options = transformers.LlamaForCausalLM, {}
        else:
            cls, options = transformers.T5ForConditionalGeneration, {"dropout_rate": 0.0}
        model = cls.from_pretrained(folder, dtype=setup.dtype, **options)
    return model.to(setup.device)


def our_adapters(setup: Setup, base: Backbone) -> Adapters:
    return attach_method("orchmoe", base, setup.adapter(), generator=runtime.generator(0))


def their_adapters(setup: Setup, name: str, model: nn.Module, wide: bool = True) -> nn.Module:
    """Return the model of `their_base` with adapters of peft in the same Linears as ours."""
    options = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    if not setup.is_decoder:
        targets = ["q", "v"] if setup.shape else ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]
        options = {"target_modules": targets, "task_type": "SEQ_2_SEQ_LM"}
    return add_peft(name, model, setup.adapter().skills, wide, **options)


def random_batch(setup: Setup, B: int, L: int, Lt: int) -> data.Batch:
    """Return a batch without padding for a decoder.

    For a T5 the lengths are evenly spread from half of the longest to the longest.
    """
    rng = np.random.default_rng(0)
    examples = []
    for i in range(B):
        share = 1 if setup.is_decoder or B == 1 else (1 + i / (B - 1)) / 2
        source, target = (rng.integers(3, 1000, int(length * share)) for length in (L, Lt))
        examples.append(data.Example(str(i), "", "", source, [target], [""], i % 8))
    return data.collate(examples)


# ------------------------------------------------------------------------------------- training


class Step:
    """A training step with clipping and AdamW. A call returns the loss per target token.

    backward(batch): computes the gradients, and returns the mean loss of the target tokens.
    """

    def __init__(self, model: nn.Module, backward: Callable[[data.Batch], Tensor]):
        self.model = model.train()
        self.backward = backward
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)

    def __call__(self, batch: data.Batch) -> float:
        loss = self.backward(batch.to(self.trained[0].device))
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def our_step(
    setup: Setup, compiled: bool = False, checkpointed: bool = False, frozen: bool = False
) -> Step:
    """Return the training step of OrchMoE or, if `frozen`, of a base whose embedding trains."""
    base = our_base(setup)
    base.checkpoint_blocks = checkpointed
    if compiled:
        base.compile_blocks(setup.choose("eager", "inductor"))
    if frozen:
        adapters = without_adapters(base)
        base.embedding.requires_grad_(True)  # so that backward passes through all blocks
    else:
        adapters = our_adapters(setup, base)

    def backward(batch):
        with evaluation.routed(base, adapters, batch):
            loss = base.loss(batch.input_ids, batch.attention_mask, batch.labels)
            loss = loss / batch.target_tokens
            loss.backward()
        return loss

    return Step(base, backward)


def their_step(setup: Setup, name: str, wide: bool = True) -> Step:
    """Return the training step of a model of transformers with adapters of peft."""
    model = their_adapters(setup, name, their_base(setup), wide)

    def backward(batch):
        inputs = {"attention_mask": batch.attention_mask}
        inputs |= {"input_ids": batch.input_ids, "labels": batch.labels}
        if setup.is_decoder:  # source and target in one row, without padding
            no_labels = torch.full_like(batch.input_ids, -100)
            inputs = {"input_ids": torch.cat((batch.input_ids, batch.labels), 1)}
            inputs["labels"] = torch.cat((no_labels, batch.labels), 1)
        if name == POLY:
            inputs["task_ids"] = batch.task_ids
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        return loss

    return Step(model, backward)


def peak_memory(make_step: Callable[[], Step], batch: data.Batch, device: torch.device) -> float:
    """Return the MiB that three training steps add to what was there before them.

    On the CPU it is the resident set of the process, on CUDA what torch counts.
    """
    step = make_step()
    for parameter in step.model.parameters():
        parameter.sum()  # reads weights that still lie in a mapped file

    def resident(field):
        status = Path("/proc/self/status").read_text()
        return int(re.search(rf"{field}:\s+(\d+)", status)[1]) / 1024

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) / 2**20
    else:
        Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark again
        before = resident("VmRSS")
    for _ in range(3):
        step(batch)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20 - before
    return resident("VmHWM") - before


def memory_rows(
    setup: Setup, what: str, makers: dict[str, Callable[[], Step]], batch: data.Batch
) -> list[str]:
    """Return rows of the peak memory of others beside ours, each in a process of its own."""
    on_linux = setup.device.type == "cpu" and Path("/proc/self/clear_refs").exists()
    if setup.device.type != "cuda" and not on_linux:
        return []
    peaks = {}
    for name, make in makers.items():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            peaks[name] = [fresh.submit(peak_memory, make, batch, setup.device).result()]
    lines = []
    for name in makers:
        if name != OURS:
            lines.append(row(f"peak memory of {what}", name, OURS, peaks, unit="MiB"))
    return lines


def time_steps(setup: Setup, steps: dict[str, Step], batch: data.Batch, rounds: int = 9) -> Times:
    """Time training steps. Raise ValueError if the losses of the first ones differ."""
    losses = {name: step(batch) for name, step in steps.items()}
    if max(losses.values()) > 1.02 * min(losses.values()):
        raise ValueError(f"the first losses of the contestants differ: {losses}")
    contestants = {name: partial(step, batch) for name, step in steps.items()}
    return interleave(setup, contestants, setup.choose(2, rounds))


def describe(setup: Setup, batch: data.Batch) -> str:
    B, L = batch.input_ids.shape
    return f"training step, {setup.base_name}, {B} x {L} tokens, targets of {batch.labels.shape[1]}"


def beside_ours(setup: Setup, names: list[str], wanted: str = "") -> list[str]:
    """Return rows of the training step, and of its memory, of adapters of peft beside ours."""
    sizes = setup.choose((4, 16, 8), (8, 256, 32))
    if setup.model:
        sizes = setup.choose((2, 12, 4), (8, 144, 16))
    makers = {OURS: partial(our_step, setup)}
    for name in names:
        makers[name] = partial(their_step, setup, name)
    batch = random_batch(setup, *sizes)
    steps = {name: make() for name, make in makers.items()}
    weights = [f"{name} {adapter_weights(step.model):,}" for name, step in steps.items()]
    what = f"{describe(setup, batch)}; weights in A and B: {', '.join(weights)}"
    times = time_steps(setup, steps, batch)
    lines = [row(what, name, OURS, times, wanted) for name in names]
    return lines + memory_rows(setup, what, makers, batch)


def bench_step(setup: Setup) -> list[str]:
    if setup.model:
        return decoder_steps(setup)
    return beside_ours(setup, [LORA], ">= 1.10")


def decoder_steps(setup: Setup) -> list[str]:
    narrow = setup._replace(dtype=torch.bfloat16)
    wide = setup._replace(dtype=torch.float32)
    steps = {
        f"{LORA}, bf16": their_step(narrow, LORA),
        f"{LORA} all in bf16": their_step(narrow, LORA, wide=False),
        f"{LORA}, float32": their_step(wide, LORA),
        f"{OURS}, bf16": our_step(narrow),
        f"{OURS}, bf16, --compile": our_step(narrow, compiled=True),
        f"{OURS}, float32": our_step(wide),
    }
    batch = random_batch(setup, *setup.choose((2, 12, 4), (16, 144, 16)))
    times = time_steps(setup, steps, batch)
    lines = []
    for of, to, wanted in (
        (f"{LORA}, bf16", "bf16", ">= 1.8"),
        (f"{LORA} all in bf16", "bf16", ""),
        (f"{LORA}, float32", "bf16", ""),
        (f"{LORA}, float32", "bf16, --compile", ">= 3.3"),
        (f"{OURS}, bf16", "bf16, --compile", ""),
        (f"{LORA}, float32", "float32", ""),
        (f"{OURS}, float32", "bf16", ""),
    ):
        lines.append(row(describe(setup, batch), of, f"{OURS}, {to}", times, wanted))
    return lines


def bench_peers(setup: Setup) -> list[str]:
    """Compare with the routed adapters of peft, which have as many adapter weights as ours."""
    if setup.model:
        return beside_ours(setup, [POLY, LILY, XLORA])
    # In peft 0.21 X-LoRA cannot load its experts into a T5: it changes the names of the weights.
    return beside_ours(setup, [POLY, LILY])


# ------------------------------------------------------------------------------------ host time

MIXES = {
    "routed": kernels.mix_skills,
    "compiled mix": torch.compile(kernels.mix_skills, dynamic=True),
    "--compile": kernels.mix_skills,
}


def bench_host(setup: Setup) -> list[str]:
    """Return the rows of what Python costs in a block and in a step, where kernels are tiny."""
    tiny = setup._replace(quick=True, model="")
    contestants = {}
    with ExitStack() as stack:
        for name, mix in MIXES.items():
            base = our_base(tiny).train()
            block = base.encoder.blocks[1]
            adapters = orchmoe.attach(block, tiny.adapter(), mix)
            x = base.embed(torch.ones(2, 4, dtype=torch.long, device=base.device))
            stack.enter_context(adapters.routed(x))
            x = x.detach().requires_grad_()
            if name == "--compile":
                base.compile_blocks(setup.choose("eager", "inductor"))
            call = partial(base.run_block, block, x, base.encoder.position(4))
            trained = [x, *adapters.parameter_groups()["skills"]]
            trained += [linear.skill_weights for linear in adapters.linears.values()]
            contestants[f"{name}, block"] = call
            contestants[f"{name}, block and backward"] = partial(gradients, call, trained)
        times = interleave(setup, contestants, setup.choose(3, 1000))
    what = "host time, 2 x 4 tokens, every Linear of a block adapted"
    lines = []
    for name in times:
        mix, part = name.split(", ")
        if mix != "routed":
            lines.append(row(what, name, f"routed, {part}", times, unit="us"))
    return lines + host_steps(setup)


def gradients(call: Callable[[], Tensor], trained: list[Tensor]) -> None:
    y = call()
    torch.autograd.grad(y, trained, torch.ones_like(y), allow_unused=True)


def host_steps(setup: Setup) -> list[str]:
    """Return the rows of whole training steps of models that are so narrow that Python is left."""
    lines = []
    for shape, wanted, wanted_compiled in (
        (NARROW_T5, "<= 0.75", "<= 0.50"),
        (NARROW_LLAMA, "<= 0.85", "<= 0.65"),
    ):
        narrow = setup._replace(model="", shape=shape)
        compiled = f"{OURS}, --compile"
        steps = {
            "frozen base": our_step(narrow, frozen=True),
            OURS: our_step(narrow),
            compiled: our_step(narrow, compiled=True),
            LORA: their_step(narrow, LORA),
            POLY: their_step(narrow, POLY),
        }
        batch = random_batch(narrow, 2, 8, 4)
        times = time_steps(narrow, steps, batch, rounds=100)
        what = f"host time, {describe(narrow, batch)}"
        lines += [
            row(what, OURS, LORA, times, wanted),
            row(what, compiled, LORA, times, wanted_compiled),
            row(what, OURS, POLY, times),
            row(what, OURS, "frozen base", times),
        ]
    return lines


# ----------------------------------------------------------------------------------- generation


def bench_generate(setup: Setup) -> list[str]:
    """Return the row of greedy generation from real prompts.

    A decoder has adapters, as they start: all outputs are those of the base.
    """
    count, size, most, longest = setup.choose((8, 4, 5, 64), (64, 16, 127, 1024))
    base = our_base(setup)
    model = their_base(setup)
    adapters = without_adapters(base)
    if setup.model:
        most, longest = setup.choose((3, 64), (32, 512))
        adapters = our_adapters(setup, base)
        model = their_adapters(setup, LORA, model)
    model.eval()
    tokenizer = tokenizers.load(setup.model or program.ROOT / "tiny")
    tasks = setup.choose(4, 0)
    options = DataConfig(data=setup.data, max_tasks=tasks, max_source_length=longest)
    sets = data.load_sets(options, tokenizer, only_test=True)
    examples = data.require_set(sets, "test", options)
    examples = data.subsample(examples, count)
    texts = {}

    def ours():
        options = {"batch_size": size, "max_new_tokens": most}
        texts["ours"] = evaluation.predict(base, adapters, examples, tokenizer, **options)

    def theirs():
        texts["theirs"] = []
        for start in range(0, count, size):
            batch = examples[start : start + size]
            sources = [torch.from_numpy(example.source_ids).long() for example in batch]
            ids = nn.utils.rnn.pad_sequence(sources, True, -1, "left").to(setup.device)
            tokens = model.generate(
                input_ids=ids.clamp(min=0),
                attention_mask=(ids >= 0).long(),
                max_new_tokens=most,
                do_sample=False,
                pad_token_id=base.config.pad_token_id,
            )
            if setup.model:
                tokens = tokens[:, ids.shape[1] :]
            texts["theirs"] += [tokenizer.decode(row) for row in tokens.tolist()]

    of, to = "transformers, file order", "ours, longest first"
    times = interleave(setup, {to: ours, of: theirs}, setup.choose(1, 3))
    pairs = zip(texts["ours"], texts["theirs"], strict=True)
    equal = sum(ours == theirs for ours, theirs in pairs)
    what = (
        f"greedy generation, {setup.base_name}, {count} prompts, batches of {size}, {most} tokens"
    )
    return [row(f"{what}, {equal} outputs equal", of, to, times, ">= 1.5", "s")]


@torch.no_grad()
def bench_decode(setup: Setup) -> list[str]:
    """Return the rows of decoding one sample with no skills beside folded and routed ones."""
    length, most, rounds = setup.choose((16, 6, 2), (128, 64, 15))
    bare, folded, routed = (our_base(setup).eval() for _ in range(3))
    adapters = []
    for base in (folded, routed):
        adapters.append(our_adapters(setup, base).eval())
        torch.manual_seed(0)
        for linear in adapters[-1].linears.values():
            nn.init.normal_(linear.skill_B, std=0.02)
    to_fold, to_route = adapters
    ids = torch.randint(3, 1000, (1, length), device=setup.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    sample = {"embeddings": bare.embed(ids), "mask": mask}

    def decode(base):
        return base.generate(ids, mask, max_new_tokens=most)

    contestants = {
        "bare base": partial(decode, bare),
        "folded": partial(decode, folded),
        "routed": partial(decode, routed),
    }
    with to_fold.folded(**sample), to_route.routed(**sample):
        same = "the same" if torch.equal(decode(folded), decode(routed)) else "other"
        times = interleave(setup, contestants, rounds)
    what = (
        f"decoding one sample, {setup.base_name}, {length} tokens in, {most} out; folded gives "
        f"{same} tokens as routed"
    )
    return [
        row(what, "bare base", "folded", times, ">= 0.97"),
        row(what, "bare base", "routed", times),
    ]


# ----------------------------------------------------------------------------------- the program

PARTS = {
    "linear": bench_linear,
    "step": bench_step,
    "decode": bench_decode,
    "generate": bench_generate,
    "peers": bench_peers,
    "host": bench_host,
}


def machine(setup: Setup) -> str:
    """Return one line about the machine and the versions."""
    name = kind_of_cpu()
    if setup.device.type == "cuda":
        name = torch.cuda.get_device_name(setup.device)
    versions = []
    for package in ("torch", *PACKAGES):
        if package not in missing_packages():
            versions.append(f"{package} {importlib.metadata.version(package)}")
    return (
        f"{name}, {torch.get_num_threads()} threads, {runtime.dtype_name(setup.dtype)} where "
        f"nothing else is said, {', '.join(versions)}, {date.today():%d %B %Y}; load before it "
        f"{os.getloadavg()[0]:.2f}."
    )


def missing_packages() -> list[str]:
    """Return which of PACKAGES are not installed."""
    return [package for package in PACKAGES if importlib.util.find_spec(package) is None]


def main() -> None:
    config = program.from_flags(BenchConfig, program.read_flags(__doc__, BenchConfig))
    for part in config.only:
        if part not in PARTS:
            raise UserError(f"--only {part}: choose from {', '.join(PARTS)}")
    missing = missing_packages()
    if missing:
        raise UserError(f"{missing[0]} is not installed; pip install -r requirements-dev.txt")
    device, dtype, _ = runtime.pick_device(config.gpu, "cpu" if config.gpu is None else "")
    if config.model:
        dtype = torch.bfloat16
    setup = Setup(config.quick, config.data, config.model, device, dtype)
    program.print_line(f"{machine(setup)}\n\n{HEAD}")
    for part in config.only or PARTS:
        for line in PARTS[part](setup):
            program.print_line(line)


if __name__ == "__main__":
    program.run_program(main)
