"""How fast this code is beside what one would use instead. Each figure is a ratio of two times taken in one
process, in turns (A B C, C B A, ...), so that whatever slows the machine slows all; beside it its quartiles
over the rounds. Rows that compare with transformers, peft or rouge-score are left out where they are not
installed. Prints the table of docs/speed.md.

    python -m experiments.bench                                # all on the CPU, with sni/ and tiny/
    python -m experiments.bench --only linear,step --gpu 0
    python -m experiments.bench --data natural-instructions    # real prompts: epoch, generate, rouge, start
    python -m experiments.bench --only decoder --model smollm2 # a decoder-only base

B batch, L length, D d_in, O d_out, S skills, R rank.  Test: pytest tests/experiments/test_bench.py"""

from __future__ import annotations

import copy
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
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

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
S, R = 8, 4  # skills and rank of every contestant; one LoRA has rank S R
OURS, POLY, LORA = "OrchMoE", "peft Poly", "peft LoRA"
ACCUMULATED = f"{OURS}, --accumulate 2"  # two micro-batches, each cut to its own longest source
HEAD = "| ratio | quartiles | wanted | of | to | what |\n|---|---|---|---|---|---|"
Contestants = dict[str, Callable[[], object]]
Times = dict[str, list[float]]  # of each contestant, one a round, in seconds


@dataclass(frozen=True)
class BenchConfig:
    """Benchmark: what is measured, on what, and where."""

    only: tuple[str, ...] = ("linear", "step", "epoch", "generate", "decode", "rouge", "start")  # parts
    model: str = ""  # folder of a decoder-only base, for one part more: decoder
    quick: bool = False  # small shapes and few rounds: shows that it runs, not how fast
    data: str = "sni/"  # folder of Super-NaturalInstructions, or of that shape
    gpu: int | None = None  # number of the GPU; left out: the CPU


# ------------------------------------------------------------------------------------------------- measuring


def interleave(contestants: Contestants, rounds: int, device: torch.device, warm: int = 1) -> Times:
    """Times of each contestant in turns, the order reversed at every other round."""
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    times: Times = {name: [] for name in contestants}
    for i in runtime.progress(range(-warm, rounds), ", ".join(contestants), unit="round"):
        for name in list(contestants)[:: 1 if i % 2 else -1]:
            began = now()
            contestants[name]()
            times[name].append(now() - began)
    return {name: taken[warm:] for name, taken in times.items()}


def row(what: str, of: str, to: str, values: Times, wanted: str = "", unit: str = "ms", factor: float = 1e3
        ) -> str:
    """A line of the table: median ratio of two contestants; `factor` turns their values into `unit`."""
    low, ratio, high = np.quantile(np.divide(values[of], values[to]), [0.25, 0.5, 0.75])
    a, b = (f"{name}, {factor * np.median(values[name]):.4g} {unit}" for name in (of, to))
    return f"| **{ratio:.2f}** | {low:.2f} - {high:.2f} | {wanted} | {a} | {b} | {what} |"


def flops(function: Callable[[], object]) -> int:
    """Floating point operations of the matrix products and attention of one call."""
    def addmm_(_y, a, b, **_options) -> int:  # of shapes; torch itself counts addmm alone
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_}) as counter:
        function()
    return counter.get_total_flops()


def installed(package: str) -> bool:
    if found := importlib.util.find_spec(package) is not None:
        return found
    runtime.warn(f"{package} is not installed: the rows that compare with it are left out")
    return False


# ------------------------------------------------------------------------------------------------ one Linear


def skills_loop(x: Tensor, A: Tensor, B: Tensor, c: Tensor, scale: float, weight: Tensor,
                bias: Tensor | None = None) -> Tensor:
    """orchmoe.mix_skills as the equation has it, one skill after the other; c (B,S)."""
    A, B, c = A.to(x.dtype), B.to(x.dtype), (scale * c).to(x.dtype)
    y = F.linear(x, weight, bias)
    for s in range(len(A)):
        y = y + c[:, s, None, None] * (x @ A[s].T @ B[s])
    return y


def skills_einsum(x: Tensor, A: Tensor, B: Tensor, c: Tensor, scale: float, weight: Tensor,
                  bias: Tensor | None = None) -> Tensor:
    """The form that keeps the expert axis, as in MoLoRA and peft's Arrow: every skill's output is stored."""
    A, B, c = A.to(x.dtype), B.to(x.dtype), (scale * c).to(x.dtype)
    outputs = torch.einsum("blsr,sro->blso", torch.einsum("bld,srd->blsr", x, A), B)
    return F.linear(x, weight, bias) + torch.einsum("bs,blso->blo", c, outputs)


class OwnForward(nn.Linear):
    """Not plain, as a quantised Linear is not: its own forward runs, and then the skills."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def linear_contestants(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Contestants:
    """Forward and backward of one frozen Linear, alone and with adapters; x needs a gradient in all."""
    batch, L, D, O = shape  # noqa: E741
    x = torch.randn(batch, L, D, device=device, dtype=dtype).requires_grad_()
    dy = torch.randn(batch, L, O, device=device, dtype=dtype)

    def frozen(kind: type = nn.Linear) -> nn.Module:
        linear = kind(D, O, bias=False, device=device, dtype=dtype)
        return nn.Sequential(OrderedDict(q=linear)).requires_grad_(False)

    def contestant(module: nn.Module, *c: Tensor) -> Callable[[], object]:
        trained = [nn.init.normal_(p, std=0.02) for p in module.parameters() if p.requires_grad]
        return lambda: torch.autograd.grad(module(x), [x, *trained, *c], dy)

    def routed(mix: Callable = kernels.mix_skills, skills: int = S, kind: type = nn.Linear):
        module = frozen(kind)
        orchmoe.attach(module, OrchMoEConfig(skills=skills, rank=R, targets=("q",)), mix)
        c = torch.rand(batch, skills, device=device).requires_grad_()
        module.q.skill_weights = c  # as `routed` does; what makes c, once for all Linears, is in the step
        return contestant(module.q, c)

    def lora(kind: type = nn.Linear, wide: bool = True):
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=S * R, lora_alpha=S * R, target_modules=["q"])
        # wide, its default: A and B are float32 over a bf16 base, and x is cast up to them
        return contestant(get_peft_model(frozen(kind), config, autocast_adapter_dtype=wide))

    found = {"frozen Linear": contestant(frozen()), "routed Linear": routed(),
             "plain twin": routed(orchmoe.mix_skills), "loop over skills": routed(skills_loop),
             "einsum with expert axis": routed(skills_einsum), "routed, S 4": routed(skills=4),
             "routed, S 16": routed(skills=16), "own forward, routed": routed(kind=OwnForward)}
    if installed("peft"):
        found |= {LORA: lora(), f"own forward, {LORA}": lora(OwnForward)}
        if dtype != torch.float32:
            found[f"{LORA} all in bf16"] = lora(wide=False)
    return found


def bench_linear(config: BenchConfig, device: torch.device, _dtype: torch.dtype) -> list[str]:
    shapes = [(2, 16, 64, 96)] if config.quick else [(8, 256, 1024, 2816)]
    if device.type == "cuda" and not config.quick:
        shapes.append((8, 512, 4096, 10240))  # T5-XXL
    dtypes, lines = [torch.float32], []
    if device.type == "cuda" or re.search(r"\b(avx512_bf16|amx_bf16)\b", CPU):
        dtypes.append(torch.bfloat16)
    else:
        runtime.warn("this CPU does not multiply bf16 natively: the rows in bf16 are left out")
    for shape, dtype in ((shape, dtype) for shape in shapes for dtype in dtypes):
        contestants = linear_contestants(shape, device, dtype)
        times = interleave(contestants, 3 if config.quick else 21, device, warm=2)
        what = (f"forward + backward in {str(dtype)[6:]}, {shape[2]} -> {shape[3]}, B {shape[0]}, "
                f"L {shape[1]}, S {S}, R {R}, LoRA of rank {S * R}")
        lines += [row(what, of, to, times, wanted) for of, to, wanted in (
            ("routed Linear", "frozen Linear", "<= 1.20"),
            ("routed Linear", LORA, "<= 1.00" if dtype == torch.float32 else "<= 0.92"),
            ("routed Linear", f"{LORA} all in bf16", ""),
            ("plain twin", "routed Linear", ""),
            ("loop over skills", "routed Linear", ">= 2"),
            ("einsum with expert axis", "routed Linear", ""),
            ("routed, S 16", "routed, S 4", "<= 1.25"),
            ("own forward, routed", f"own forward, {LORA}", "<= 1.15")) if {of, to} <= times.keys()]
    return lines


# ------------------------------------------------------------------------------------------------- training


def make_base(config: BenchConfig, device: torch.device, dtype: torch.dtype) -> t5.T5:
    """T5 v1.1-small shapes with random weights."""
    sizes = (1124, 32, 8, 48, 2, 2, 4) if config.quick else (32128, 512, 64, 1024, 8, 8, 6)
    shape = t5.T5Config(*sizes, feed_forward_proj="gated-gelu", scale_decoder_outputs=False, tied_head=False)
    return init_weights(t5.T5(shape), 0).to(device, dtype)


def attach_skills(base: Backbone, tasks: int = 8, skills: int = S, targets: tuple[str, ...] = ("all",)
                  ) -> Adapters:
    config = OrchMoEConfig(tasks=tasks, skills=skills, rank=R, targets=targets)
    return attach_method("orchmoe", base, config, generator=runtime.generator(0))


def as_transformers(base: t5.T5) -> nn.Module:
    """The same T5, same weights, of transformers."""
    from transformers import T5ForConditionalGeneration, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(base, folder)
        model = T5ForConditionalGeneration.from_pretrained(folder, dtype=base.embedding.weight.dtype,
                                                           dropout_rate=0.0)
        return copy.deepcopy(model).to(base.device)  # into memory of its own, out of the mapped file


def trainer(name: str, config: BenchConfig, device: torch.device, dtype: torch.dtype, tasks: int = 8
            ) -> Callable[[data.Batch], float]:
    """One training step of a contestant, every Linear of attention and FFN adapted, AdamW: batch -> loss."""
    base = make_base(config, device, dtype)
    made = ours(base) if name.startswith(OURS) else theirs(as_transformers(base), name, tasks)
    return stepper(*made, parts=2 if name == ACCUMULATED else 1)


def stepper(model: nn.Module, loss: Callable, parts: int = 1) -> Callable[[data.Batch], float]:
    """One step of AdamW on what trains: batch -> loss per target token."""
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step(batch: data.Batch) -> float:
        total = 0.0
        for _, part in batch.split(parts):
            with loss(part.to(trained[0].device)) as summed:
                (summed / batch.target_tokens).backward()
            total += summed.item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total / batch.target_tokens

    return step


def ours(base: Backbone, **skills: Any) -> tuple[nn.Module, Callable]:
    """The model, and the context of one batch that gives the sum of its loss."""
    adapters = attach_skills(base, **skills)

    @contextmanager
    def loss(batch: data.Batch):
        with evaluation.routed(base, adapters, batch):
            yield base.loss(batch.input_ids, batch.attention_mask, batch.labels)

    return base, loss


def theirs(model: nn.Module, method: str, tasks: int) -> tuple[nn.Module, Callable]:
    """The same of peft."""
    import peft

    options = dict(target_modules=["q", "k", "v", "o", "wi_0", "wi_1", "wo"], task_type="SEQ_2_SEQ_LM")
    model = peft.get_peft_model(model, (
        peft.PolyConfig(r=R, n_skills=S, n_tasks=tasks, poly_type="poly", **options) if method == POLY else
        peft.LoraConfig(r=S * R, lora_alpha=S * R, lora_dropout=0.0, **options)))

    def loss(batch: data.Batch):
        ids = {"task_ids": batch.task_ids % tasks} if method == POLY else {}
        mean = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels,
                     use_cache=False, **ids).loss
        return nullcontext(mean * batch.target_tokens)

    return model, loss


def random_batch(config: BenchConfig) -> data.Batch:
    """8 sources padded to 256, targets to 32, their lengths even between half of that and all."""
    B, L, Lt = (4, 16, 8) if config.quick else (8, 256, 32)
    rng = np.random.default_rng(0)
    examples = [data.Example(str(i), str(i), "", rng.integers(3, 1000, int(L * (1 + i / (B - 1)) / 2)),
                             [rng.integers(3, 1000, int(Lt * (1 + i / (B - 1)) / 2))], [""], i)
                for i in range(B)]
    return data.collate(examples)


def peak_memory(name: str, config: BenchConfig, device: torch.device, dtype: torch.dtype) -> float:
    """MiB that three training steps add to what stood before them: resident set, or CUDA's own count."""
    step, batch = trainer(name, config, device, dtype), random_batch(config)

    def resident(field: str) -> float:
        return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        [step(batch) for _ in range(3)]
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins again from here
    before = resident("VmRSS")
    [step(batch) for _ in range(3)]
    return resident("VmHWM") - before


def bench_step(config: BenchConfig, device: torch.device, dtype: torch.dtype) -> list[str]:
    others = [POLY, LORA] if installed("peft") else []
    steps = {name: trainer(name, config, device, dtype) for name in (OURS, *others, ACCUMULATED)}
    batch = random_batch(config)
    losses = [step(batch) for step in steps.values()]
    if max(losses) - min(losses) > 1e-3 * max(losses) and dtype == torch.float32:
        raise ValueError(f"{', '.join(steps)} differ in their first loss: {losses}")
    contestants = {name: lambda step=step: step(batch) for name, step in steps.items()}
    n = 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    contestants["GEMM"] = lambda: [a @ b for _ in range(4)]
    times = interleave(contestants, 2 if config.quick else 9, device)

    what = "training step, T5 v1.1-small shapes, batch {} x {}, target {}".format(
        *batch.input_ids.shape, batch.labels.shape[1])
    lines = [row(what, other, ours, times, ">= 1.10") for ours in (ACCUMULATED, OURS) for other in others]
    for name in (OURS, *others[:1]):  # how far above the floor each is, and so how much is left to gain
        work = flops(lambda: steps[name](batch))  # noqa: B023
        floor = f"its {work / 1e9:.0f} GFLOP at the rate of a {n} x {n} GEMM"
        times[floor] = [taken * work / (4 * 2 * n**3) for taken in times["GEMM"]]
        lines.append(row(what, name, floor, times))
    if device.type == "cuda" or Path("/proc/self/clear_refs").exists():
        peaks = {}
        for name in (OURS, *others):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                peaks[name] = [fresh.submit(peak_memory, name, config, device, dtype).result()]
        lines += [row(f"peak memory of {what}", other, OURS, peaks, ">= 1", "MiB", 1) for other in others]
    return lines


def bench_epoch(config: BenchConfig, device: torch.device, dtype: torch.dtype) -> list[str]:
    if not installed("peft"):
        return []
    examples, count, size = load(config, "train"), 20 if config.quick else 400, 4 if config.quick else 16
    rng = np.random.default_rng(0)
    chosen = [examples[i] for i in rng.permutation(len(examples))[:count]]
    lengths = np.array([len(example.source_ids) for example in chosen])
    orders = {OURS: [data.batch_at(lengths, size, 0, step) for step in range(count // size)],
              POLY: np.split(rng.permutation(count), count // size)}

    def contestant(name: str) -> Callable[[], None]:
        step = trainer(name, config, device, dtype, len(examples.tasks))
        batches = [data.collate([chosen[i] for i in rows]) for rows in orders[name]]
        fifths = iter([batches[i::5] for i in (0, *range(5))])  # the first warms up

        def run() -> None:
            for batch in next(fifths):
                step(batch)

        return run

    times = interleave({name: contestant(name) for name in orders}, 5, device)
    what = f"a fifth of an epoch of {count} examples, batches by length against random ones"
    return [row(what, POLY, OURS, times, ">= 2", "s", 1)]


# --------------------------------------------------------------------------------- generation, metric, start


def load(config: BenchConfig, split: str) -> data.Examples:
    few = data.DataConfig(data=config.data, max_tasks=4 if config.quick else 0)
    return data.load_sets(few, tokenizers.load(runtime.ROOT / "tiny"), [split])[split]


def bench_generate(config: BenchConfig, device: torch.device, dtype: torch.dtype) -> list[str]:
    if not installed("transformers"):
        return []
    count, size, most = (8, 4, 5) if config.quick else (64, 16, 127)
    examples, tokenizer = data.subsample(load(config, "test"), count), tokenizers.load(runtime.ROOT / "tiny")
    base = make_base(config, device, dtype)
    other, texts = as_transformers(base).eval(), {}

    def ours() -> None:
        texts["ours"] = evaluation.predict(base, NoAdapter(base, full=False), examples, tokenizer,
                                           batch_size=size, max_new_tokens=most)

    def theirs() -> None:
        texts["theirs"] = []
        for start in range(0, count, size):
            batch = data.collate(examples[start:start + size]).to(device)
            tokens = other.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(),
                                    max_new_tokens=most, do_sample=False, num_beams=1)
            texts["theirs"] += map(tokenizer.decode, tokens.tolist())

    times = interleave({"ours, longest first": ours, "transformers, file order": theirs},
                       1 if config.quick else 3, device)
    same = sum(a == b for a, b in zip(texts["ours"], texts["theirs"], strict=True))
    what = f"greedy generation, {count} test prompts, batches of {size}, {most} tokens, {same} outputs equal"
    return [row(what, "transformers, file order", "ours, longest first", times, ">= 1.5", "s", 1)]


@torch.no_grad()
def bench_decode(config: BenchConfig, device: torch.device, dtype: torch.dtype) -> list[str]:
    """One sample with its skills in the weights, routed, and without any; then many samples of many tasks."""
    count, length, most, rounds = (4, 16, 6, 2) if config.quick else (64, 128, 64, 15)
    bases = {name: make_base(config, device, dtype).eval() for name in ("bare base", "folded", "routed")}
    folding, routing = (attach_skills(bases[name], count).eval() for name in ("folded", "routed"))
    for adapters in (folding, routing):
        generator = torch.Generator(device).manual_seed(0)
        for linear in adapters.linears.values():
            nn.init.normal_(linear.skill_B, std=0.02, generator=generator)
    ids, tokens = torch.randint(3, 1000, (count, length), device=device), {}
    mask, embeddings = torch.ones_like(ids, dtype=torch.bool), bases["routed"].embed(ids[:1])

    def one(name: str) -> None:
        tokens[name] = bases[name].generate(ids[:1], mask[:1], max_new_tokens=most)

    def many(w: Tensor) -> None:
        with routing.routed(w=w):
            bases["routed"].generate(ids[:, :16], mask[:, :16], max_new_tokens=most // 2,
                                     on_keep=routing.keep)

    def fold() -> None:
        with folding.folded(embeddings=embeddings, mask=mask[:1]):
            pass

    with folding.folded(embeddings=embeddings, mask=mask[:1]), routing.routed(embeddings, mask[:1]):
        times = interleave({name: lambda name=name: one(name) for name in bases}, rounds, device)
    rates = {name: [tokens[name].shape[1] / taken for taken in times[name]] for name in bases}
    times = {"a token of the bare base": [1 / rate for rate in rates["bare base"]]}
    eye = torch.eye(count, device=device)
    times |= interleave({"folding and restoring": fold, "a batch of one task": lambda: many(eye[[0] * count]),
                         f"a batch of {count} tasks": lambda: many(eye)}, rounds, device)
    same = "the same" if torch.equal(tokens["folded"], tokens["routed"]) else "OTHER"
    what = f"decoding one sample, {length} tokens in, {most} out; folded gives {same} tokens as routed"
    return [row(what, "folded", "bare base", rates, ">= 0.97", "tokens/s", 1),
            row(what, "routed", "bare base", rates, "", "tokens/s", 1),
            row(what, "folding and restoring", "a token of the bare base", times),
            row(f"{most // 2} tokens of decode, OrchMoE", f"a batch of {count} tasks", "a batch of one task",
                times, "<= 1.05")]


# --------------------------------------------------------------------------------------- a decoder-only base

DECODER = {"skills": 4, "targets": ("q", "v")}  # S R = 16, as the LoRA beside it
WIDE, NARROW = f"transformers + {LORA}", f"transformers + {LORA} all in bf16"


def causal_lm(config: BenchConfig, device: torch.device, dtype: torch.dtype, wide: bool = True) -> nn.Module:
    """transformers' model of --model with peft's LoRA; wide: A and B in float32, peft's default."""
    import peft
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=dtype).to(device)
    options = peft.LoraConfig(r=DECODER["skills"] * R, lora_alpha=DECODER["skills"] * R,
                              target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, options, autocast_adapter_dtype=wide)


def causal_loss(model: nn.Module) -> Callable:
    def loss(batch: data.Batch):
        tokens = torch.cat((batch.input_ids, batch.labels), 1)  # of rows without padding
        labels = torch.cat((torch.full_like(batch.input_ids, -100), batch.labels), 1)
        mean = model(input_ids=tokens, labels=labels, use_cache=False).loss
        return nullcontext(mean * batch.target_tokens)

    return loss


def bench_decoder(config: BenchConfig, device: torch.device, _dtype: torch.dtype) -> list[str]:
    if not installed("peft"):
        return []
    B, L, Lt = (2, 12, 4) if config.quick else (16, 144, 16)
    rng, narrow, wide = np.random.default_rng(0), torch.bfloat16, torch.float32
    batch = data.collate([data.Example(str(i), "", "", rng.integers(3, 1000, L), [rng.integers(3, 1000, Lt)],
                                       [""]) for i in range(B)])
    models = {f"{WIDE}, bf16": causal_lm(config, device, narrow),
              NARROW: causal_lm(config, device, narrow, wide=False),
              f"{WIDE}, float32": causal_lm(config, device, wide)}
    steps = {name: stepper(model, causal_loss(model)) for name, model in models.items()}
    for name, dtype in (("bf16", narrow), ("float32", wide)):
        base = checkpoint.load(config.model, dtype=dtype, device=device)
        steps[f"{OURS}, {name}"] = stepper(*ours(base, **DECODER))
    base = checkpoint.load(config.model, dtype=narrow, device=device)
    base.compile_blocks("eager" if config.quick else "inductor")  # eager: dynamo alone
    steps[f"{OURS}, bf16, --compile"] = stepper(*ours(base, **DECODER))
    losses = {name: step(batch) for name, step in steps.items()}
    if max(losses.values()) > 1.02 * min(losses.values()):
        raise ValueError(f"the contestants differ in their first loss: {losses}")
    times = interleave({name: lambda step=step: step(batch) for name, step in steps.items()},
                       1 if config.quick else 5, device)
    what = (f"training step, {Path(config.model).name}, {B} x {L + Lt} tokens of which {Lt} labels, q and v, "
            "S R 16")
    lines = [row(what, other, f"{OURS}, {kind}", times, wanted) for other, kind, wanted in (
        (f"{WIDE}, bf16", "bf16", ">= 1.8"), (NARROW, "bf16", ""), (f"{WIDE}, float32", "bf16", ""),
        (f"{WIDE}, float32", "bf16, --compile", ">= 3.3"), (f"{OURS}, bf16", "bf16, --compile", ""),
        (f"{WIDE}, float32", "float32", ""), (f"{OURS}, float32", "bf16", ""))]
    return [*lines, *generate_decoder(config, device)]


def generate_decoder(config: BenchConfig, device: torch.device) -> list[str]:
    """Greedy answers to real prompts in bf16, the adapters as they start, so that all should say the same."""
    count, size, most, longest = (4, 2, 3, 64) if config.quick else (64, 16, 32, 512)
    tokenizer = tokenizers.load(config.model)
    options = data.DataConfig(data=config.data, max_source_length=longest, max_tasks=4 if config.quick else 0)
    examples = data.subsample(data.load_sets(options, tokenizer, ["test"])["test"], count)
    base = checkpoint.load(config.model, dtype=torch.bfloat16, device=device)
    model = causal_lm(config, device, torch.bfloat16).eval()
    adapters, texts = attach_skills(base, **DECODER), {}

    def ours() -> None:
        texts["ours"] = evaluation.predict(base, adapters, examples, tokenizer, batch_size=size,
                                           max_new_tokens=most)

    def theirs() -> None:
        texts["theirs"] = []
        for start in range(0, count, size):
            sources = [torch.from_numpy(e.source_ids).long() for e in examples[start:start + size]]
            ids = nn.utils.rnn.pad_sequence(sources, True, base.config.pad_token_id, "left")
            mask = nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in sources], True, 0, "left")
            tokens = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), do_sample=False,
                                    max_new_tokens=most, pad_token_id=base.config.pad_token_id)
            texts["theirs"] += map(tokenizer.decode, tokens[:, ids.shape[1]:].tolist())

    times = interleave({"ours, longest first": ours, "transformers, file order": theirs},
                       1 if config.quick else 3, device)
    same = sum(a == b for a, b in zip(texts["ours"], texts["theirs"], strict=True))
    what = (f"greedy generation, {Path(config.model).name} in bf16, the other's adapters in float32, "
            f"{count} test prompts, batches of {size}, {most} tokens, {same} outputs equal")
    return [row(what, "transformers, file order", "ours, longest first", times, ">= 1.5", "s", 1)]


def bench_rouge(config: BenchConfig, device: torch.device, _dtype: torch.dtype) -> list[str]:
    if not installed("rouge_score"):
        return []
    from rouge_score.rouge_scorer import RougeScorer

    scorer, count, lines = RougeScorer(["rougeL"], use_stemmer=True), 50 if config.quick else 5000, []
    examples = data.subsample(load(config, "test"), count)
    for kind in ("copy-input", "copy-demo"):  # the longest predictions there are, and as short as references
        predictions = evaluation.copy_heuristic(kind, config.data, examples)
        pairs = [(said, e.references[0]) for said, e in zip(predictions, examples, strict=True)]
        scores = {}

        def ours(pairs=pairs, scores=scores) -> None:
            metrics._stems.cache_clear()
            metrics._porter.cache_clear()  # as a fresh evaluation would begin
            scores["ours"] = [metrics.rouge_l(said, [reference]) for said, reference in pairs]

        def theirs(pairs=pairs, scores=scores) -> None:
            scores["theirs"] = [scorer.score(reference, said)["rougeL"].fmeasure for said, reference in pairs]

        times = interleave({"metrics.rouge_l": ours, "rouge_score": theirs}, 1 if config.quick else 3, device)
        worst = max(abs(a - b) for a, b in zip(scores["ours"], scores["theirs"], strict=True))
        if worst > 1e-9:
            raise ValueError(f"metrics.rouge_l differs from rouge_score by {worst}")
        what = f"ROUGE-L of {len(pairs)} pairs, {kind}, no stem known before; largest difference {worst:.0e}"
        lines.append(row(what, "rouge_score", "metrics.rouge_l", times, ">= 10", "s", 1))
    return lines


def bench_start(config: BenchConfig, _device: torch.device, _dtype: torch.dtype) -> list[str]:
    """From the command to the first line of the log, the token cache cold and then warm."""
    def start(folder: Path) -> float:
        log, said, began = folder / "metrics.jsonl", folder.with_suffix(".said"), time.perf_counter()
        command = [sys.executable, runtime.ROOT / "train.py", "--data", config.data, "--model",
                   runtime.ROOT / "tiny", "--out", folder, "--steps", "100000", "--device", "cpu",
                   "--eval-instances", "1", *(["--max-tasks", "4"] if config.quick else [])]
        with open(said, "w") as file, subprocess.Popen(
                command, stdout=file, stderr=file, env=os.environ | {"XDG_CACHE_HOME": str(folder.parent)}
        ) as process:
            while not (log.exists() and log.stat().st_size):
                if process.poll() is not None:
                    raise ValueError(f"train.py ended: {said.read_text().strip()[-300:]}")
                time.sleep(0.02)
            process.kill()
        return time.perf_counter() - began

    with tempfile.TemporaryDirectory() as folder:
        first, *later = [start(Path(folder, str(i))) for i in range(2 if config.quick else 4)]
    times = {"first start": [first] * len(later), "second start": later}
    return [row(f"from command to first step on {Path(config.data).name}", "first start", "second start",
                times, "second <= 8 s", "s", 1)]


# ------------------------------------------------------------------------------------------------ the program

PARTS = {"linear": bench_linear, "step": bench_step, "epoch": bench_epoch, "generate": bench_generate,
         "decode": bench_decode, "decoder": bench_decoder, "rouge": bench_rouge, "start": bench_start}


def machine(device: torch.device, dtype: torch.dtype) -> str:
    cpu = re.search(r"model name\s*:\s*(.+)", CPU)
    name = cpu[1] if cpu else platform.processor() or platform.machine()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else name
    versions = [f"{package} {importlib.metadata.version(package)}"
                for package in ("torch", "transformers", "peft") if importlib.util.find_spec(package)]
    return (f"{name}, {torch.get_num_threads()} threads, {str(dtype)[6:]} where nothing else is said, "
            f"{', '.join(versions)}, {date.today():%d %B %Y}; load before it {os.getloadavg()[0]:.2f}.")


def main() -> None:
    config = runtime.from_flags(BenchConfig, runtime.read_flags(__doc__, BenchConfig))
    runtime.require_single_process()
    if unknown := [part for part in config.only if part not in PARTS]:
        raise ValueError(f"--only {unknown[0]}: choose from {', '.join(PARTS)}")
    if "decoder" in config.only and not config.model:
        raise ValueError("--only decoder: name the folder of a decoder-only base by --model")
    device, dtype, reason = runtime.pick_device(config.gpu, "" if config.gpu is not None else "cpu")
    if config.gpu is not None:
        runtime.print_line(reason)
    runtime.print_line(f"{machine(device, dtype)}\n\n{HEAD}")
    for part in config.only:
        for line in PARTS[part](config, device, dtype):
            runtime.print_line(line)


if __name__ == "__main__":
    runtime.run_program(main)
