"""Measure how fast this code is beside what one would use instead: the tables of docs/speed.md.

Each figure is a ratio of two times, measured in one process and in turns (A B C, C B A, ...), so
that whatever slows the machine slows all. Beside it are its quartiles over the rounds.

    python -m experiments.bench                               # on the CPU; a T5 of random weights
    python -m experiments.bench --gpu 0                       # and what only a GPU shows
    python -m experiments.bench --only step,generate --model smollm2 --data natural-instructions

- linear: forward and backward of one Linear. The plain twin has orchmoe.mix_skills. A compiled
  mix_skills is left out: it costs the host 1.4 to 1.8 times as long (commit 74a5b2c), and on a GPU
  the host must keep ahead of the kernels.
- step: a training step, and its peak memory. peft's Poly has the shapes of OrchMoE.
- methods: what a step, its memory, an answer and the adapter file of each method cost (--model).
- decode: one sample, with the skills routed, folded and left out.
- generate: greedy answers to real prompts.
- host: training steps of models so narrow that Python's part is left.
- large (GPU): T5-base and Llama-3.2-1B: a step compiled and not, memory with and without
  --checkpoint-blocks, and decoding.
- lengths (GPU): the same bases, where every batch has a new shape, with cuDNN's attention and
  without. cuDNN makes a plan for each new shape, so the programs leave it out (support/runtime.py).

Needs transformers and peft.
Letters: B batch, L source length, Lt target length, D input width, O output width, S skills,
R rank.
Test: pytest tests/experiments/test_bench.py
"""

import gc
import importlib.metadata
import importlib.util
import itertools
import multiprocessing
import os
import re
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint
import data
import eval as evaluation
import kernels
import orchmoe
import tokenizer as tokenizers
from baselines import attach_method, load_method, without_adapters
from experiments.compare.sizes import equal_ranks
from experiments.compare.study import kind_of_cpu
from experiments.compare.tables import table as columns
from experiments.computed import MODELS, t5_config
from llama import Llama, LlamaConfig
from model import Backbone
from orchmoe import Adapters, OrchMoEConfig
from support import program, runtime
from support.program import UserError
from t5 import T5
from tasks import DataConfig

HEAD = "| ratio | quartiles | of | to |\n|---|---|---|---|"
R = 4  # of every contestant; a plain LoRA has rank S R

OURS = "OrchMoE"
HYDRA_LORA = f"{program.ROOT / 'examples/hydra_lora.py'}:HydraLoRA"
METHODS = ("orchmoe", "lora", "moe-lora", "poly", "mhr", HYDRA_LORA)
ANSWERED = 32  # tokens of an answer
TASKS = 8  # for methods that route by task
POLY = "peft Poly"
LORA = "peft LoRA"
COMPILED = "OrchMoE, --compile"
PACKAGES = ("transformers", "peft")  # what these need
VERSIONS = ("torch", *PACKAGES)  # whose versions are printed

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


def table(what: str, values: Times, pairs: Sequence[tuple[str, str]], unit: str = "ms") -> str:
    """Return a table of the median ratios of pairs of contestants, below what was measured."""
    factor = 1000 if unit == "ms" else 1
    lines = []
    for of, to in pairs:
        ratios = np.divide(values[of], values[to])
        low, ratio, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        cells = [f"**{ratio:.2f}**", f"{low:.2f}–{high:.2f}"]
        for name in (of, to):
            cells.append(f"{name}, {factor * np.median(values[name]):.4g} {unit}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([f"{what}:", "", HEAD, *lines, ""])


# ----------------------------------------------------------------------------- adapters of peft


def add_peft(
    name: str, model: nn.Module, skills: int, wide: bool = True, **options: Any
) -> nn.Module:
    """Return the model with adapters of peft that have as many weights as our skills.

    wide: keep A and B in float32, which is the default of peft.
    options: target_modules and task_type, for every config of peft.
    """
    import peft

    rank = skills * R
    if name == LORA:
        config = peft.LoraConfig(r=rank, lora_alpha=rank, **options)
    else:
        config = peft.PolyConfig(r=R, n_skills=skills, n_tasks=8, **options)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=wide)


# ------------------------------------------------------------------------------------ one Linear


def skills_loop(x: Tensor, y: Tensor, A: Tensor, B: Tensor, c: Tensor, scale: float) -> Tensor:
    """Compute orchmoe.mix_skills one skill after the other, for c (B,S)."""
    for s in range(len(A)):
        y = y + scale * c[:, s, None, None] * (x @ A[s].T @ B[s])
    return y


def skills_einsum(x: Tensor, y: Tensor, A: Tensor, B: Tensor, c: Tensor, scale: float) -> Tensor:
    """Keep the axis of the skills, as MoLoRA and peft's Arrow do: every output is stored."""
    h = torch.einsum("bld,srd->blsr", x, A)
    outputs = torch.einsum("blsr,sro->blso", h, B)
    return y + torch.einsum("bs,blso->blo", scale * c, outputs)


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

    def contestant(linear, adapter, *c):
        trained = [p for p in adapter.parameters() if p.requires_grad]
        for parameter in trained:
            nn.init.normal_(parameter, std=0.02)
        return lambda: torch.autograd.grad(linear(x), [x, *trained, *c], dy)

    def routed(mix=kernels.mix_skills):
        module = frozen()
        config = OrchMoEConfig(skills=8, rank=R, targets=("q",))
        skills = orchmoe.attach(module, config, mix=mix).skills["q"]
        # As `routed` does. What makes c, once for all Linears, is in the training step.
        c = torch.rand(samples, 8, device=device, dtype=dtype).requires_grad_()
        skills.c = c
        return contestant(module.q, skills, c)

    def lora(wide):
        module = nn.Sequential(OrderedDict(model=frozen()))  # with the names of a decoder
        add_peft(LORA, module, 8, wide, target_modules=["q"])
        return contestant(module.model.q, module)

    found = {
        "frozen Linear": contestant(frozen().q, nn.Identity()),
        "routed Linear": routed(),
        "plain twin": routed(orchmoe.mix_skills),
        "loop over skills": routed(skills_loop),
        "einsum with expert axis": routed(skills_einsum),
    }
    found[LORA] = lora(wide=True)
    if dtype != torch.float32:
        found[f"{LORA} all in bf16"] = lora(wide=False)
    return found


LINEAR_PAIRS = (
    ("routed Linear", "frozen Linear"),
    ("routed Linear", LORA),
    ("routed Linear", f"{LORA} all in bf16"),
    ("plain twin", "routed Linear"),
    ("loop over skills", "routed Linear"),
    ("einsum with expert axis", "routed Linear"),
)


def bench_linear(setup: Setup) -> Iterator[str]:
    shapes = [setup.choose((2, 16, 64, 96), (8, 256, 1024, 2816))]  # (B,L,D,O)
    if setup.device.type == "cuda" and not setup.quick:
        shapes.append((8, 512, 4096, 10240))  # T5-XXL
    for shape, dtype in itertools.product(shapes, (torch.float32, torch.bfloat16)):
        contestants = linear_contestants(shape, setup.device, dtype)
        times = interleave(setup, contestants, setup.choose(3, 21))
        B, L, D, O = shape  # noqa: E741
        what = (
            f"Forward and backward in {runtime.dtype_name(dtype)}, {D} -> {O}, B {B}, L {L}, S 8, "
            f"R {R}, LoRA of rank {8 * R}"
        )
        yield table(what, times, [pair for pair in LINEAR_PAIRS if set(pair) <= times.keys()])


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
        base.hf_config = asdict(base.config)
        base.hf_config["tie_word_embeddings"] = base.config.tied_head
        base.hf_config["eos_token_id"] = list(base.config.eos_ids)
        checkpoint.save(base, folder)
        if setup.is_decoder:
            cls, options = transformers.LlamaForCausalLM, {}
        else:
            cls, options = transformers.T5ForConditionalGeneration, {"dropout_rate": 0.0}
        model = cls.from_pretrained(folder, dtype=setup.dtype, **options)
    return model.to(setup.device)


def our_adapters(setup: Setup, base: Backbone, method: str = "") -> Adapters:
    """Return those of OrchMoE, or of one of METHODS with the ranks that give all one size."""
    config = setup.adapter()
    options = {"generator": runtime.generator(0)}
    if method:
        rows = tuple((name, load_method(name), config) for name in METHODS)
        options["extra_rank"] = equal_ranks(rows, base.config, TASKS)[method]
        options["num_tasks"] = TASKS
    return attach_method(load_method(method or "orchmoe"), base, config, **options)


def their_adapters(setup: Setup, name: str, model: nn.Module) -> nn.Module:
    """Return the model of `their_base` with adapters of peft in the same Linears as ours."""
    options = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    if not setup.is_decoder:
        targets = ["q", "v"] if setup.shape else ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]
        options = {"target_modules": targets, "task_type": "SEQ_2_SEQ_LM"}
    return add_peft(name, model, setup.adapter().skills, **options)


def random_batch(setup: Setup, B: int, L: int, Lt: int) -> data.Batch:
    """Return a batch without padding for a decoder.

    For a T5 the lengths are evenly spread from half of the longest to the longest.
    """
    rng = np.random.default_rng(0)
    examples = []
    for i in range(B):
        share = 1 if setup.is_decoder else (1 + i / (B - 1)) / 2
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
    setup: Setup,
    compiled: bool = False,
    checkpointed: bool = False,
    frozen: bool = False,
    method: str = "",
) -> Step:
    """Return the training step of OrchMoE or, if `frozen`, of a base whose embedding trains.

    method: see `our_adapters`.
    """
    base = our_base(setup)
    base.checkpoint_blocks = checkpointed
    if frozen:
        adapters = without_adapters(base)
        base.embedding.requires_grad_(True)  # so that backward passes through all blocks
    else:
        adapters = our_adapters(setup, base, method)
    if compiled:
        kernels.compile_blocks(base.blocks, setup.choose("eager", "inductor"))

    def backward(batch):
        with evaluation.routed(base, adapters, batch):
            loss = base.loss(batch.input_ids, batch.attention_mask, batch.labels)
            loss = loss / (batch.labels != -100).sum()
            loss.backward()
        return loss

    return Step(base, backward)


def their_step(setup: Setup, name: str) -> Step:
    """Return the training step of a model of transformers with adapters of peft."""
    model = their_adapters(setup, name, their_base(setup))

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
    if device.type == "cuda":
        runtime.pick_device(device.index)  # in this new process: it switches off cuDNN's attention
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


def memory_table(
    setup: Setup, what: str, makers: dict[str, Callable[[], Step]], batch: data.Batch
) -> Iterator[str]:
    """Yield a table of the peak memory of others beside ours, each in a process of its own."""
    if setup.device.type != "cuda" and not Path("/proc/self/clear_refs").exists():
        return  # the CPU of another system than Linux
    peaks = {}
    for name, make in makers.items():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            peaks[name] = [fresh.submit(peak_memory, make, batch, setup.device).result()]
    pairs = [(name, OURS) for name in makers if name != OURS]
    yield table(f"Peak memory of a {what}", peaks, pairs, unit="MiB")


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


def beside_ours(setup: Setup, names: list[str], sizes: tuple[int, int, int]) -> Iterator[str]:
    """Yield tables of the training step, and of its memory, of adapters of peft beside ours."""
    makers = {OURS: partial(our_step, setup)}
    for name in names:
        makers[name] = partial(their_step, setup, name)
    batch = random_batch(setup, *sizes)
    times = time_steps(setup, {name: make() for name, make in makers.items()}, batch)
    what = describe(setup, batch)
    yield table(f"A {what}", times, [(name, OURS) for name in names])
    yield from memory_table(setup, what, makers, batch)


def bench_step(setup: Setup) -> Iterator[str]:
    if setup.model:
        yield from decoder_steps(setup)
        yield from beside_ours(setup, [POLY], setup.choose((2, 12, 4), (8, 144, 16)))
    else:
        yield from beside_ours(setup, [LORA, POLY], setup.choose((4, 16, 8), (8, 256, 32)))


def decoder_steps(setup: Setup) -> Iterator[str]:
    narrow = setup._replace(dtype=torch.bfloat16)
    wide = setup._replace(dtype=torch.float32)
    steps = {
        f"{LORA}, bf16": their_step(narrow, LORA),
        f"{LORA}, float32": their_step(wide, LORA),
        f"{OURS}, bf16": our_step(narrow),
        f"{COMPILED}, bf16": our_step(narrow, compiled=True),
        f"{OURS}, float32": our_step(wide),
    }
    batch = random_batch(setup, *setup.choose((2, 12, 4), (16, 144, 16)))
    pairs = (
        (f"{LORA}, bf16", f"{OURS}, bf16"),
        (f"{LORA}, float32", f"{OURS}, float32"),
        (f"{OURS}, float32", f"{OURS}, bf16"),
        (f"{OURS}, bf16", f"{COMPILED}, bf16"),
    )
    yield table(f"A {describe(setup, batch)}", time_steps(setup, steps, batch), pairs)


# ---------------------------------------------------------------------------- each method


def bench_methods(setup: Setup) -> Iterator[str]:
    """Yield a table of what each method costs, with those of peft below."""
    if not setup.model:
        return
    makers = {}
    for method in METHODS:
        makers[method.rpartition(":")[2]] = partial(our_step, setup, method=method)
    for name in (LORA, POLY):
        makers[name] = partial(their_step, setup, name)
    batch = random_batch(setup, *setup.choose((2, 12, 4), (8, 144, 16)))
    steps = {name: make() for name, make in makers.items()}
    times = time_steps(setup, steps, batch, rounds=7)
    answers = {name: partial(answer, step.model, batch, name) for name, step in steps.items()}
    answer_times = interleave(setup, answers, setup.choose(1, 3))
    lines = []
    for name, make in makers.items():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            peak = fresh.submit(peak_memory, make, batch, setup.device).result()
        weights = sum(parameter.numel() for parameter in steps[name].trained)
        line = [name, f"{weights:,}", f"{np.median(times[name]):.2f}", f"{peak:.0f}"]
        size = file_size(steps[name].model)
        lines.append([*line, f"{np.median(answer_times[name]):.2f}", f"{size / 1e6:.2f}"])
    head = ["method", "weights", "step, s", "its peak, MiB", "answers, s", "adapter file, MB"]
    yield f"Each method, {describe(setup, batch)}, and answers of {ANSWERED} tokens:\n"
    yield columns(head, lines)


@torch.no_grad()
def answer(model: nn.Module, batch: data.Batch, name: str) -> None:
    """Generate ANSWERED tokens for each source of the batch, with our Backbone or with peft."""
    model.eval()
    if isinstance(model, Backbone):
        adapters = model.skill_adapters
        with evaluation.routed(model, adapters, batch):
            model.generate(
                batch.input_ids,
                batch.attention_mask,
                max_new_tokens=ANSWERED,
                on_keep=adapters.keep,
            )
        return
    options = {"task_ids": batch.task_ids} if name == POLY else {}
    model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask.long(),
        max_new_tokens=ANSWERED,
        do_sample=False,
        pad_token_id=0,
        **options,
    )


def file_size(model: nn.Module) -> int:
    """Return the bytes of the file of the adapters, ours or those of peft."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "adapter_model.safetensors")
        if isinstance(model, Backbone):
            checkpoint.write_safetensors(path, model.skill_adapters.state_dict(), {})
        else:
            model.save_pretrained(folder)
        return path.stat().st_size


# ------------------------------------------------------------------------------------ host time


def bench_host(setup: Setup) -> Iterator[str]:
    """Yield tables of training steps of models that are so narrow that Python is left."""
    for shape in (NARROW_T5, NARROW_LLAMA):
        narrow = setup._replace(model="", shape=shape)
        steps = {
            "frozen base": our_step(narrow, frozen=True),
            OURS: our_step(narrow),
            COMPILED: our_step(narrow, compiled=True),
            LORA: their_step(narrow, LORA),
        }
        batch = random_batch(narrow, 2, 8, 4)
        times = time_steps(narrow, steps, batch, rounds=100)
        pairs = ((OURS, LORA), (COMPILED, LORA), (OURS, "frozen base"))
        yield table(f"Host time of a {describe(narrow, batch)}", times, pairs)


# ----------------------------------------------------------------------------------- generation


def bench_generate(setup: Setup) -> Iterator[str]:
    """Yield a table of greedy generation from real prompts.

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
    count = len(examples)  # there may be fewer
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
        f"Greedy generation, {setup.base_name}, {count} prompts, batches of {size}, {most} tokens, "
        f"{equal} outputs equal"
    )
    yield table(what, times, [(of, to)], "s")


@torch.no_grad()
def bench_decode(setup: Setup) -> Iterator[str]:
    """Yield a table of decoding one sample with no skills beside folded and routed ones."""
    length, most, rounds = setup.choose((16, 6, 2), (128, 64, 15))
    bare, folded, routed = (our_base(setup).eval() for _ in range(3))
    adapters = []
    for base in (folded, routed):
        adapters.append(our_adapters(setup, base).eval())
        torch.manual_seed(0)
        for skills in adapters[-1].skills.values():
            nn.init.normal_(skills.B, std=0.02)
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
        f"Decoding one sample, {setup.base_name}, {length} tokens in, {most} out; folded gives "
        f"{same} tokens as routed"
    )
    yield table(what, times, [("bare base", "folded"), ("bare base", "routed")])


# ------------------------------------------------------------------------------ what a GPU shows


def large_bases(setup: Setup) -> list[Setup]:
    return [
        setup._replace(model="", shape=setup.choose(NARROW_T5, "T5-base")),
        setup._replace(model="", shape=setup.choose(NARROW_LLAMA, "Llama-3.2-1B")),
    ]


def bench_large(setup: Setup) -> Iterator[str]:
    for base in large_bases(setup):
        batch = random_batch(base, *setup.choose((4, 16, 8), (8, 256, 32)))
        what = describe(base, batch)
        steps = {OURS: our_step(base), COMPILED: our_step(base, compiled=True)}
        yield table(f"A {what}", time_steps(base, steps, batch), [(OURS, COMPILED)])
        del steps
        makers = {
            OURS: partial(our_step, base),
            f"{OURS}, --checkpoint-blocks": partial(our_step, base, checkpointed=True),
        }
        yield from memory_table(base, what, makers, batch)
        yield from bench_decode(base)


def bench_lengths(setup: Setup) -> Iterator[str]:
    for base in large_bases(setup):
        yield new_lengths(base, "sources")
        yield new_lengths(base, "targets")


def with_and_without_cudnn(
    setup: Setup, what: str, work: Callable[[int], object], largest: int
) -> str:
    """Return the table of work(size) with cuDNN's attention and without. No size comes twice."""
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
        times = interleave(setup, contestants, rounds)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(is_enabled)
    return table(what, times, [("cuDNN", "without cuDNN")])


def new_lengths(setup: Setup, of: str) -> str:
    """Return the table of training steps whose sources, or targets, always have a new length."""
    step = our_step(setup)
    source, target, largest = setup.choose((16, 8, 12), (250, 30, 512))

    def work(length):
        lengths = (length, target) if of == "sources" else (source, length)
        return step(random_batch(setup, 8, *lengths))

    what = f"A training step, {setup.base_name}, 8 rows, each time a new length of the {of}"
    return with_and_without_cudnn(setup, what, work, largest)


# ----------------------------------------------------------------------------------- the program

PARTS = {
    "linear": bench_linear,
    "step": bench_step,
    "methods": bench_methods,
    "decode": bench_decode,
    "generate": bench_generate,
    "host": bench_host,
}
GPU_PARTS = {"large": bench_large, "lengths": bench_lengths}


def machine(setup: Setup) -> str:
    """Return one line about the machine and the versions."""
    name = kind_of_cpu()
    if setup.device.type == "cuda":
        name = torch.cuda.get_device_name(setup.device)
    versions = [f"{package} {importlib.metadata.version(package)}" for package in VERSIONS]
    return (
        f"{name}, {torch.get_num_threads()} threads, {runtime.dtype_name(setup.dtype)} where "
        f"nothing else is said, {', '.join(versions)}, {date.today():%d %B %Y}; load before it "
        f"{os.getloadavg()[0]:.2f}."
    )


def main() -> None:
    config = program.from_flags(BenchConfig, program.read_flags(__doc__, BenchConfig))
    device, dtype, _ = runtime.pick_device(config.gpu, "cpu" if config.gpu is None else "")
    parts = PARTS | GPU_PARTS if device.type == "cuda" else PARTS
    for part in config.only:
        if part in GPU_PARTS and part not in parts:
            raise UserError(f"--only {part}: it needs a GPU")
        if part not in parts:
            raise UserError(f"--only {part}: choose from {', '.join(parts)}")
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed; pip install -r requirements-dev.txt")
    if config.model:
        if not isinstance(checkpoint.read_config(config.model), LlamaConfig):
            raise UserError(f"--model {config.model}: give a decoder-only base")
        dtype = torch.bfloat16
    setup = Setup(config.quick, config.data, config.model, device, dtype)
    program.print_line(f"{machine(setup)}\n")
    for part in config.only or parts:
        for text in parts[part](setup):
            program.print_line(text)
        # Free the models. A base and its adapters refer to each other, so this takes a search.
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    program.run_program(main)
