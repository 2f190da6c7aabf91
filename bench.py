"""How fast this code is beside what a user would take instead. Each figure is a ratio of two times taken in
one process, in turns (A B B A ...), so that whatever slows the machine slows both; the ratio comes first,
then its quartiles over the rounds. transformers, peft and rouge-score are measured where they are installed;
rows whose other side is missing are left out, and that is said.

    python bench.py                                   # all on the CPU, sni/ and tiny/: a Markdown table, JSON
    python bench.py --only kernels,step --gpu 0
    python bench.py --data natural-instructions       # real prompts for epoch, generate, metrics, data

B batch, L length, D d_in, O d_out, S skills, R rank.  Test: pytest tests/test_bench.py"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import data
import eval as evaluation
import kernels
import metrics
import runtime
import t5
import tokenizer
from baselines import attach_method
from orchmoe import OrchMoEConfig

S, R = 8, 4  # skills and rank of every contestant; one LoRA has rank S R
NAMES = ("q", "k", "v", "o", "wi_0", "wi_1", "wo")
OURS, POLY, LORA = "OrchMoE", "peft Poly", "peft LoRA"
PARTS_OF_STEP = 2  # micro-batches, each cut to its own longest source, of the contestant named so
IN_PARTS = f"{OURS}, --accumulate {PARTS_OF_STEP}"


@dataclass(frozen=True)
class BenchConfig:
    """Benchmark: what is measured, on what, and where."""

    only: tuple[str, ...] = ("kernels", "step", "epoch", "generate", "metrics", "data")  # parts to measure
    quick: bool = False  # small shapes and few rounds: shows that it runs, not how fast
    data: str = "sni/"  # Super-NaturalInstructions, or a folder of that shape
    rounds: int = 0  # turns of each side (0: as many as the part needs)
    out: str = "results/bench.json"  # JSON file of all rows and the machine
    gpu: int | None = None  # number of the GPU; left out: the CPU
    peak: str = ""  # used by bench.py itself: print the peak memory of this contestant's training step


@dataclass(frozen=True)
class Row:
    """One figure: `ratio` is the time of `over` divided by the time of `under` (medians over rounds)."""

    part: str
    over: str
    under: str
    ratio: float
    quartiles: tuple[float, float]  # of the ratio of each round
    over_median: float
    under_median: float
    unit: str
    bar: str = ""  # what the ratio should be


# ------------------------------------------------------------------------------------------------ measuring


def seconds(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def in_turns(sides: dict[str, Callable[[], object]], rounds: int, device: torch.device, warm: int = 1
             ) -> dict[str, list[float]]:
    """Times of each side, the order reversed at every other round."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in runtime.progress(range(-warm, rounds), ", ".join(sides), unit="round"):
        for name in list(sides)[:: 1 if i % 2 else -1]:
            taken = seconds(sides[name], device)
            if i >= 0:
                times[name].append(taken)
    return times


def quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def ratio(part: str, over: str, under: str, times: dict[str, list[float]], bar: str = "", unit: str = "ms",
          factor: float = 1e3) -> Row:
    """The row of two sides of `in_turns`; its ratio is the median of the rounds' own ratios."""
    ratios = [a / b for a, b in zip(times[over], times[under], strict=True)]
    return Row(part, over, under, statistics.median(ratios), quartiles(ratios),
               factor * statistics.median(times[over]), factor * statistics.median(times[under]), unit, bar)


# -------------------------------------------------------------------------------------------------- kernels


def mix_skills_loop(x, A, B, c, scale):
    """As the equation has it: a loop over skills."""
    c = c if c.dim() == 3 else c.unsqueeze(1)  # (B,1 or L,S)
    return scale * sum(c[..., s, None] * (x @ A[s].T @ B[s]) for s in range(len(A)))


def einsum_skills(x: Tensor, A: Tensor, B: Tensor, c: Tensor, scale: float) -> Tensor:
    """The form that keeps the expert axis, as in MoLoRA and peft's Arrow: every skill's output is stored."""
    outputs = torch.einsum("blsr,sro->blso", torch.einsum("bld,srd->blsr", x, A), B)
    return scale * torch.einsum("bs,blso->blo", c, outputs)


def one_lora(x: Tensor, A: Tensor, B: Tensor, _c: Tensor, scale: float) -> Tensor:
    return F.linear(F.linear(x, A.flatten(0, 1)), B.flatten(0, 1).T) * scale


def adapted(mix: Callable | None, shape: tuple[int, ...], skills: int, rank: int, device: torch.device,
            dtype: torch.dtype) -> Callable[[], object]:
    """Forward and backward of a frozen Linear with the adapter `mix` beside it; without one, alone."""
    generator = torch.Generator().manual_seed(0)
    batch, L, D, O = shape  # noqa: E741

    def draw(*size: int) -> Tensor:
        return (torch.randn(size, generator=generator) / size[-1] ** 0.5).to(device, dtype)

    x, W, grad = draw(batch, L, D), draw(O, D), draw(batch, L, O)
    A, B, c = draw(skills, rank, D), draw(skills, rank, O), torch.rand(batch, skills, generator=generator)
    inputs = [t.requires_grad_() for t in ([x, A, B, c.to(device, dtype)] if mix else [x])]

    def run() -> None:
        y = F.linear(x, W)
        if mix:
            y += mix(*inputs, 0.5)
        y.backward(grad, inputs=inputs)
        for tensor in inputs:
            tensor.grad = None

    return run


def bench_kernels(config: BenchConfig, place: runtime.Device) -> list[Row]:
    shapes = [(2, 16, 64, 96)] if config.quick else [(8, 256, 1024, 2816)]
    if place.device.type == "cuda" and not config.quick:
        shapes.append((8, 512, 4096, 10240))  # T5-XXL
    rounds, rows = config.rounds or (3 if config.quick else 21), []
    for shape in shapes:
        forms = {"frozen Linear": None, "one LoRA of rank S R": one_lora, "mix_skills": kernels.mix_skills,
                 "loop over skills": mix_skills_loop, "einsum with expert axis": einsum_skills}
        sides = {name: adapted(form, shape, S, R, place.device, place.dtype) for name, form in forms.items()}
        wide = {f"mix_skills, S {s}": adapted(kernels.mix_skills, shape, s, R, place.device, place.dtype)
                for s in (4, 16)}
        times = in_turns(sides, rounds, place.device, 2) | in_turns(wide, rounds, place.device, 2)
        part = f"forward + backward, {shape[2]} -> {shape[3]}, B {shape[0]}, L {shape[1]}, S {S}, R {R}"
        rows += [ratio(part, "mix_skills", "frozen Linear", times, "<= 1.35"),
                 ratio(part, "mix_skills", "one LoRA of rank S R", times, "<= 1.10"),
                 ratio(part, "loop over skills", "mix_skills", times, ">= 2"),
                 ratio(part, "einsum with expert axis", "mix_skills", times),
                 ratio(part, "mix_skills, S 16", "mix_skills, S 4", times, "<= 1.25")]
    return rows


# ------------------------------------------------------------------------------------------------- training


def make_base(config: BenchConfig, place: runtime.Device) -> t5.T5:
    """T5 v1.1-small shapes with random weights."""
    if config.quick:
        shape = t5.T5Config(1124, 32, 8, 48, 2, 2, 4, feed_forward_proj="gated-gelu",
                               scale_decoder_outputs=False, tied_head=False)
    else:
        shape = t5.T5Config(32128, 512, 64, 1024, 8, 8, 6, feed_forward_proj="gated-gelu",
                               scale_decoder_outputs=False, tied_head=False)
    return t5.T5(shape).init_weights(0).to(place.device, place.dtype)


def as_transformers(base: t5.T5) -> torch.nn.Module:
    """The same T5, same weights, of transformers."""
    from transformers import T5ForConditionalGeneration, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(base, folder)
        return T5ForConditionalGeneration.from_pretrained(folder, dtype=base.embedding.weight.dtype,
                                                          dropout_rate=0.0).to(base.device)


def trainer(name: str, config: BenchConfig, place: runtime.Device, tasks: int = 8
            ) -> Callable[[data.Batch], float]:
    """One training step of a contestant, every Linear of attention and FFN adapted, AdamW: batch -> loss."""
    base = make_base(config, place)
    if name.startswith(OURS):
        adapters = attach_method("orchmoe", base, OrchMoEConfig(skills=S, rank=R, targets=("all",)),
                                 generator=runtime.generator(0))
        parameters = [p for group in adapters.parameter_groups().values() for p in group]
        base.train()

        def backward(batch: data.Batch) -> float:
            loss = 0.0
            for _, part in batch.split(PARTS_OF_STEP if name == IN_PARTS else 1):
                part = part.to(place.device)
                with evaluation.routed(base, adapters, part):
                    total = base.loss(part.input_ids, part.attention_mask, part.labels)
                    (total / batch.target_tokens).backward()
                loss += total.item()
            return loss / batch.target_tokens
    else:
        import peft

        options = dict(target_modules=list(NAMES), task_type="SEQ_2_SEQ_LM")
        other = peft.get_peft_model(as_transformers(base), (
            peft.PolyConfig(r=R, n_skills=S, n_tasks=tasks, poly_type="poly", **options) if name == POLY else
            peft.LoraConfig(r=S * R, lora_alpha=S * R, lora_dropout=0.0, **options))).train()
        parameters = [p for p in other.parameters() if p.requires_grad]
        del base

        def backward(batch: data.Batch) -> float:
            batch = batch.to(place.device)
            ids = {"task_ids": batch.task_ids % tasks} if name == POLY else {}
            loss = other(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels,
                         **ids).loss
            loss.backward()
            return loss.item()

    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step(batch: data.Batch) -> float:
        loss = backward(batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def random_batch(config: BenchConfig, tasks: int = 8) -> data.Batch:
    """8 sources padded to 256, targets to 32, their lengths even between half of that and all."""
    B, L, Lt = (4, 16, 8) if config.quick else (8, 256, 32)
    rng = np.random.default_rng(0)
    examples = [data.Example(str(i), str(i), "", rng.integers(3, 1000, int(L * (1 + i / (B - 1)) / 2)),
                             [rng.integers(3, 1000, int(Lt * (1 + i / (B - 1)) / 2))], [""], i % tasks)
                for i in range(B)]
    return data.collate(examples)


def floor(step: Callable[[data.Batch], float], batch: data.Batch, place: runtime.Device, rounds: int
          ) -> tuple[str, list[float]]:
    """The floor of a training step and its seconds: the floating point operations of its matrix products and
    attention over the rate of one large GEMM, measured as often as the step."""
    with FlopCounterMode(display=False) as counter:
        step(batch)
    n = 2048
    a, b = (torch.randn(n, n, device=place.device, dtype=place.dtype) for _ in range(2))
    times = in_turns({"GEMM": lambda: [a @ b for _ in range(4)]}, rounds, place.device)["GEMM"]
    flops = counter.get_total_flops()
    return (f"its {flops / 1e9:.0f} GFLOP at the rate of a {n} x {n} GEMM",
            [flops * taken / (4 * 2 * n**3) for taken in times])


def peak_memory(name: str, config: BenchConfig, place: runtime.Device) -> float:
    """MiB that three training steps add to what stood before them: anonymous resident set, or CUDA's own
    count."""
    step, batch = trainer(name, config, place), random_batch(config)
    if place.device.type == "cuda":
        before = torch.cuda.memory_allocated(place.device)
        [step(batch) for _ in range(3)]
        return (torch.cuda.max_memory_allocated(place.device) - before) / 2**20
    seen, done = [resident()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    [step(batch) for _ in range(3)]
    done.set()
    watcher.join()
    return max(seen) - seen[0]


def resident() -> float:
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def bench_step(config: BenchConfig, place: runtime.Device) -> list[Row]:
    names = [OURS, POLY, LORA, IN_PARTS] if has("peft") else [OURS, IN_PARTS]
    steps = {name: trainer(name, config, place) for name in names}
    many = f"{OURS}, every sample another task"
    steps[many] = steps[OURS]  # the very same code: no task id enters it
    batch, alone = random_batch(config), random_batch(config, tasks=1)
    first = {name: steps[name](batch) for name in names}
    spread = max(first.values()) - min(first.values())
    if spread > 1e-3 * max(first.values()) and place.dtype == torch.float32:
        raise ValueError(f"contestants disagree on the first loss: {first}")
    sides = {name: lambda step=step, name=name: step(alone if name == OURS else batch)
             for name, step in steps.items()}
    times = in_turns(sides, config.rounds or (2 if config.quick else 9), place.device)
    part = "training step, T5 v1.1-small shapes, batch {} x {}, target {}".format(
        *batch.input_ids.shape, batch.labels.shape[1])
    rows = [ratio(part, name, ours, times, ">= 1.10") for ours in (IN_PARTS, OURS) for name in names[1:-1]]
    rows.append(ratio(part, many, OURS, times, "<= 1.05"))
    for name in names[:2]:  # how far above the floor each is, and so how much is left to gain
        under, floors = floor(steps[name], batch, place, len(times[name]))
        rows.append(ratio(part, name, under, {name: times[name], under: floors}))
    if Path("/proc/self/status").exists():
        peaks = {name: [float(own_output("--peak", name, *(["--quick"] if config.quick else []), *(
            ["--gpu", str(config.gpu)] if config.gpu is not None else [])))] for name in names[:-1]}
        rows += [ratio("peak memory of " + part, name, OURS, peaks, ">= 1", "MiB", 1) for name in names[1:-1]]
    return rows


def own_output(*flags: str) -> str:
    done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"bench.py {' '.join(flags)}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.split()[-1]


def has(package: str) -> bool:
    if found := importlib.util.find_spec(package) is not None:
        return found
    runtime.say(f"{package} is not installed: the rows that compare with it are left out")
    return False


def load(config: BenchConfig, split: str) -> data.Examples:
    few = 4 if config.quick else 0
    words = tokenizer.load(Path(__file__).parent / "tiny")
    return data.load_sets(data.DataConfig(data=config.data, max_tasks=few), words, [split])[split]


def bench_epoch(config: BenchConfig, place: runtime.Device) -> list[Row]:
    if not has("peft"):
        return []
    examples, count, size = load(config, "train"), 16 if config.quick else 400, 4 if config.quick else 16
    rng = np.random.default_rng(0)
    chosen = [examples[i] for i in rng.permutation(len(examples))[:count]]
    tasks = len(examples.tasks)
    lengths = np.array([len(example.source_ids) for example in chosen])
    orders = {OURS: data.batch_order(lengths, size, 0, 0),
              POLY: np.split(rng.permutation(count), count // size)}
    steps = {name: trainer(name, config, place, tasks) for name in orders}
    pieces, place_in = min(5, count // size), count // size // min(5, count // size)
    times: dict[str, list[float]] = {name: [] for name in orders}

    def run(name: str, piece: int) -> None:
        for rows in orders[name][piece * place_in:(piece + 1) * place_in]:
            steps[name](data.collate([chosen[i] for i in rows]))

    for name, order in orders.items():
        steps[name](data.collate([chosen[i] for i in order[0]]))  # warm
    for piece in range(pieces):
        for name in list(orders)[:: 1 if piece % 2 else -1]:
            times[name].append(seconds(lambda: run(name, piece), place.device))  # noqa: B023
    row = ratio(f"epoch of {count} examples, batches by length against random ones", POLY, OURS, times,
                ">= 2", "s", 1)
    totals = {name: sum(values) for name, values in times.items()}
    return [Row(row.part, POLY, OURS, totals[POLY] / totals[OURS], row.quartiles, totals[POLY], totals[OURS],
                "s", row.bar)]


# ----------------------------------------------------------------------------- generation, metrics, data


def bench_generate(config: BenchConfig, place: runtime.Device) -> list[Row]:
    count, size, most = (8, 4, 5) if config.quick else (64, 16, 127)
    examples = evaluation.evenly(load(config, "test"), count)
    base = make_base(config, place).eval()
    tokens: dict[str, list] = {}

    def ours() -> None:
        rows_of = {}
        for rows, batch in evaluation.batches(examples, size, place.device, "generate"):
            found = base.generate(batch.input_ids, batch.attention_mask, max_new_tokens=most)
            rows_of.update(zip(rows, found.tolist(), strict=True))
        tokens["ours"] = [rows_of[i] for i in range(count)]

    sides, rows = {"ours, longest first": ours}, []
    if has("transformers"):
        other = as_transformers(base).eval()

        def theirs() -> None:
            found = []
            for start in range(0, count, size):
                batch = data.collate(examples[start:start + size]).to(place.device)
                found += other.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(),
                                        max_new_tokens=most, do_sample=False, num_beams=1)[:, 1:].tolist()
            tokens["theirs"] = found

        sides["transformers, file order"] = theirs
        times = in_turns(sides, config.rounds or (1 if config.quick else 3), place.device)
        same = sum(a[:len(b)] == b[:len(a)] for a, b in zip(tokens["ours"], tokens["theirs"], strict=True))
        part = (f"greedy generation, {count} test prompts, batches of {size}, {most} tokens, "
                f"{same} outputs equal")
        rows.append(ratio(part, "transformers, file order", "ours, longest first", times, ">= 1.5", "s", 1))
    adapters = attach_method("orchmoe", base, OrchMoEConfig(skills=S, rank=R, tasks=count, targets=("all",)),
                             generator=runtime.generator(0)).eval()
    batch = data.collate([example._replace(source_ids=example.source_ids[:16]) for example in examples])
    batch = batch.to(place.device)

    def decode(w: Tensor) -> None:
        with adapters.routed(w=w.to(place.device)):
            base.generate(batch.input_ids, batch.attention_mask, max_new_tokens=min(most, 32),
                          on_keep=adapters.keep)

    eye = torch.eye(count)
    one, mixed = "a batch of one task", f"a batch of {count} tasks"
    times = in_turns({one: lambda: decode(eye[:1].expand(count, -1)), mixed: lambda: decode(eye)},
                     config.rounds or (2 if config.quick else 15), place.device)
    rows.append(ratio(f"{min(most, 32)} tokens of decode, OrchMoE", mixed, one, times, "<= 1.05"))
    return rows


def bench_metrics(config: BenchConfig, place: runtime.Device) -> list[Row]:
    if not has("rouge_score"):
        return []
    from rouge_score.rouge_scorer import RougeScorer

    examples = evaluation.evenly(load(config, "test"), 50 if config.quick else 5000)
    scorer, scores, rows = RougeScorer(["rougeL"], use_stemmer=True), {}, []
    for kind in ("copy-input", "copy-demo"):  # the longest predictions there are, and as short as references
        predictions = evaluation.copy_heuristic(kind, config.data, examples)
        pairs = [(said, example.references[0])
                 for said, example in zip(predictions, examples, strict=True)]

        def ours(pairs: list = pairs) -> None:
            metrics._stems.cache_clear()
            metrics._porter.cache_clear()  # as a fresh evaluation would begin
            scores["ours"] = [metrics.rouge_l(said, [wanted]) for said, wanted in pairs]

        def theirs(pairs: list = pairs) -> None:
            scores["theirs"] = [scorer.score(wanted, said)["rougeL"].fmeasure for said, wanted in pairs]

        times = in_turns({"metrics.rouge_l": ours, "rouge_score": theirs},
                         config.rounds or (1 if config.quick else 3), torch.device("cpu"))
        worst = max(abs(a - b) for a, b in zip(scores["ours"], scores["theirs"], strict=True))
        if worst > 1e-9:
            raise ValueError(f"metrics.rouge_l differs from rouge_score by {worst}")
        part = f"ROUGE-L of {len(pairs)} pairs, {kind}, no stem known before; largest difference {worst:.0e}"
        rows.append(ratio(part, "rouge_score", "metrics.rouge_l", times, ">= 10", "s", 1))
    return rows


def bench_data(config: BenchConfig, place: runtime.Device) -> list[Row]:
    """From the command to the first line of the log, the token cache cold and then warm."""
    times: dict[str, list[float]] = {"first start": [], "second start": []}
    with tempfile.TemporaryDirectory() as folder:
        for i, name in enumerate(["first start"] + ["second start"] * (1 if config.quick else 3)):
            run = Path(folder, str(i))
            command = [sys.executable, str(Path(__file__).parent / "train.py"), "--data", config.data,
                       "--model", str(Path(__file__).parent / "tiny"), "--out", str(run), "--cache", folder,
                       "--steps", "100000", "--eval-instances", "1", "--device", "cpu",
                       *(["--max-tasks", "4"] if config.quick else [])]
            began = time.perf_counter()
            with open(Path(folder, "log"), "w") as log:
                process = subprocess.Popen(command, stdout=log, stderr=log)
                while not ((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size):
                    if process.poll() is not None:
                        raise ValueError(f"train.py ended: {Path(folder, 'log').read_text().strip()[-300:]}")
                    time.sleep(0.02)
                times[name].append(time.perf_counter() - began)
                process.kill()
                process.wait()
    first, second = times["first start"], times["second start"]
    ratios = [first[0] / value for value in second]
    return [Row(f"from command to first step on {Path(config.data).name}", "first start", "second start",
                statistics.median(ratios), quartiles(ratios), first[0], statistics.median(second), "s",
                "second <= 8 s")]


# --------------------------------------------------------------------------------------------- the program

PARTS = {"kernels": bench_kernels, "step": bench_step, "epoch": bench_epoch, "generate": bench_generate,
         "metrics": bench_metrics, "data": bench_data}


def machine(place: runtime.Device) -> dict[str, str]:
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        cpu = found[1]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")
                if importlib.util.find_spec(name)}
    load = f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown"
    device = torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else cpu
    return {"device": device, "threads": str(torch.get_num_threads()), "dtype": str(place.dtype)[6:],
            "load before": load, **versions}


def table(rows: list[Row]) -> str:
    lines = ["| ratio | quartiles | wanted | of | to | what |", "|---|---|---|---|---|---|"]
    for row in rows:
        low, high = row.quartiles
        lines.append(f"| **{row.ratio:.2f}** | {low:.2f} - {high:.2f} | {row.bar} | "
                     f"{row.over}, {row.over_median:.4g} {row.unit} | "
                     f"{row.under}, {row.under_median:.4g} {row.unit} | {row.part} |")
    return "\n".join(lines)


def main() -> None:
    parser = runtime.Parser(__doc__)
    parser.add_dataclass(BenchConfig)
    config = runtime.from_flags(BenchConfig, vars(parser.parse_args()))
    runtime.require_alone()
    place = runtime.pick_device(config.gpu, "" if config.gpu is not None else "cpu")
    if unknown := [part for part in config.only if part not in PARTS]:
        raise ValueError(f"--only {unknown[0]}: choose from {', '.join(PARTS)}")
    if config.peak:
        return print(peak_memory(config.peak, config, place))
    about = machine(place)
    runtime.say(", ".join(f"{name} {value}" for name, value in about.items()))
    rows: list[Row] = []
    for part in config.only:
        rows += (found := PARTS[part](config, place))
        runtime.say(table(found) if len(config.only) == 1 else f"{part}: {len(found)} rows")
        runtime.write_json(config.out, {"machine": about, "quick": config.quick,
                                        "rows": [*map(asdict, rows)]})
    if len(config.only) > 1:
        runtime.say(table(rows))
    runtime.say(f"written: {config.out}")


if __name__ == "__main__":
    runtime.run_program(main)
