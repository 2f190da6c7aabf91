"""The numbers of docs/annotated.html, from one finished run: docs/explorer.json.

`collect` adds to what the explorer shows of a run: the answers of its samples, what routing does
for each task and in each Linear, the router, the training step by step, and the walk, one sample
from its prompt to its gradients. The walk computes each step as its equation says, and checks that
the model computes the same. "hash" tells the adapter of the run from any other.

`collect` trains the run again, twice: as it was, and with a router that stays at its start. Each
training stops for an evaluation ten times, and saves progress.pt, which is read from its folder.

Letters: B batch, L source length, D input width, O output width, K abstract tasks, N adapted
Linears, S skills, R rank, M samples.  Test: pytest tests/repo/test_annotate.py
"""

import base64
import hashlib
import math
import tempfile
import textwrap
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

import checkpoint
import data
import eval as evaluation
import tokenizer
import train
from baselines import attach_method
from experiments.compare.study import router_report
from experiments.explorer import explorer
from experiments.explorer.explorer import Loaded, rounded, rows_by_task
from support import program, runtime

LISTED = 12  # samples of each task whose w is listed
STOPS = 10  # evaluations of a training that is shown step by step
# The two trainings that are shown, with the settings that differ.
TWINS = {"trained": {}, "frozen": {"lr_router": 0.0}}
BASE = program.ROOT / "tiny"  # the base of the run that the page shows
COMPARED = ("own", "mean", "uniform", "other", "off")  # settings whose loss is measured on all
LINEAR = "decoder.blocks.2.cross_attention.v"  # the Linear that the walk looks into
LINEARS = ("encoder.blocks.0.attention.q", "decoder.blocks.0.cross_attention.q", LINEAR)


def of_kind(explored: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """Return the seen or the unseen tasks."""
    return [task for task in explored["tasks"] if task["kind"] == kind]


def collect(run: str | Path) -> dict[str, Any]:
    """Return all numbers of the page, as plain JSON values."""
    loaded = explorer.load(run)
    explored = explorer.collect(loaded)
    adapter = loaded.run.path / "adapter.safetensors"
    explored["hash"] = hashlib.sha256(adapter.read_bytes()).hexdigest()[:16]
    explored["steps"] = loaded.run.settings.steps
    for kind in ("seen", "unseen"):
        add_results(explored, loaded, kind)
    explored["first"] = first_sample(explored)
    explored["without_one"] = without_one(loaded)
    explored["walk"] = walk(loaded, explored)
    router = loaded.adapters.router
    explored["router"] = {
        name: rounded(getattr(router, name), 5) for name in ("W_task", "bias", "mu", "sd")
    }
    add_training(explored, loaded)
    return explored


# ------------------------------------------------------------------- the router in the browser


@torch.no_grad()
def reader() -> dict[str, Any]:
    """Return what a page needs to tokenise and embed a text as the bundled base does.

    pieces: [text, score] of each piece, with a score of None for those that no text has.
    embeddings: a table of as many rows, in half precision and base64.
    """
    sp = tokenizer.load(BASE).sp
    pieces = []
    for i in range(sp.get_piece_size()):
        is_text = not (sp.is_control(i) or sp.is_unknown(i))
        # The shortest digits that give the same float32.
        score = float(str(np.float32(sp.get_score(i)))) if is_text else None
        pieces.append([sp.id_to_piece(i), score])
    table = checkpoint.load(BASE).embed(torch.arange(len(pieces))[None])[0]
    embeddings = base64.b64encode(table.half().numpy().tobytes()).decode()
    return {"pieces": pieces, "unknown": sp.unk_id(), "eos": sp.eos_id(), "embeddings": embeddings}


# -------------------------------------------------------------------------- training, step by step


def add_training(explored: dict[str, Any], loaded: Loaded) -> None:
    """Add "training": {twin: stops}. Add "distance": how far training moved w from its start.

    The first stop is the start. The adapters of `loaded` are those of the run again afterwards.
    """
    adapters = loaded.adapters
    best = {name: value.clone() for name, value in adapters.state_dict().items()}
    w = {kind: weights(loaded, kind) for kind in ("seen", "unseen")}
    start = start_of(loaded)
    adapters.load_state_dict(start)
    start_w = {kind: weights(loaded, kind) for kind in w}
    explored["distance"] = {kind: distance(w[kind], start_w[kind]) for kind in w}
    explored["training"] = {}
    for twin, changes in TWINS.items():
        with tempfile.TemporaryDirectory() as folder:
            states = {0: start} | train_again(loaded, Path(folder, twin), changes)
        stops = []
        for step, state in states.items():
            adapters.load_state_dict(state)
            stops.append({"step": step, **stop(loaded, start_w["seen"])})
        explored["training"][twin] = stops
    adapters.load_state_dict(best)


def weights(loaded: Loaded, kind: str) -> Tensor:
    """Return w (M,K) of the seen or the unseen samples."""
    return evaluation.router_weights(loaded.base, loaded.adapters, loaded.sets[kind])


def distance(w: Tensor, start_w: Tensor) -> float:
    """Return the mean Kullback-Leibler divergence of w from its start, in nats."""
    return round(router_report(w, start_w)["distance"], 4)


def start_of(loaded: Loaded) -> dict[str, Tensor]:
    """Return the state of the adapters before training. It depends on the sources and the seed."""
    settings = loaded.run.settings
    base = checkpoint.load(settings.model)
    random = runtime.generator(settings.seed, 0)  # stream 0: initial values
    adapters = attach_method(settings.method, base, settings, generator=random)
    train.fit_router(base, adapters, loaded.sets["train"], settings)
    return adapters.state_dict()


def train_again(
    loaded: Loaded, folder: Path, changes: dict[str, float]
) -> dict[int, dict[str, Tensor]]:
    """Train with these changes of the settings. Return {step: state of the adapters}."""
    settings = loaded.run.settings
    settings = replace(settings, eval_every=settings.steps // STOPS, **changes)
    states = {}

    def keep_state(_line: str = "") -> None:
        """Keep the state in progress.pt. train.py saves it after each evaluation."""
        if (folder / "progress.pt").exists():
            saved = checkpoint.read_torch(folder / "progress.pt")
            states[saved["progress"]["next_step"]] = saved["adapters"]

    device = runtime.pick_device(device="cpu", dtype=settings.dtype)
    launch = train.LaunchConfig(out=str(folder))
    train.train(settings, device, launch, say=keep_state)  # a line comes before each saving
    keep_state()
    return states


def stop(loaded: Loaded, start_w: Tensor) -> dict[str, Any]:
    """Return what the page shows of the adapters as they are, over the seen samples.

    w: of each task in per cent. Zhat: of LINEAR. start_w: (M,K) before training.
    """
    adapters, examples = loaded.adapters, loaded.sets["seen"]
    w = weights(loaded, "seen")
    of_tasks = torch.stack([w[rows].mean(dim=0) for rows in rows_by_task(examples)])  # (T,K)
    n = list(adapters.linears).index(LINEAR)
    rows = evaluation.measure(loaded.base, adapters, examples)
    losses = evaluation.losses_by_task(examples, rows)
    return {
        "loss": round(fmean(loss for [loss] in losses.values()), 3),
        "distance": distance(w, start_w),
        "w": (100 * of_tasks).round().int().tolist(),
        "Zhat": rounded(adapters.allocation_weights()[n], 2),
    }


# ------------------------------------------------------------------------- answers of all samples


def settings_of(w: Tensor) -> dict[str, Tensor]:
    """Return the ways to route M samples whose own weights are w (M,K): {name: (M,K)}.

    explorer.js lists the results of a sample in this order.
    """
    M, K = w.shape
    settings = {
        "own": w,
        "mean": w.mean(dim=0).expand(M, K),
        "uniform": torch.full_like(w, 1 / K),
        "other": w.roll(-(M // 2), dims=0),  # as explorer.add_task chooses it
        "off": torch.zeros_like(w),
    }
    for k in range(K):
        settings[str(k + 1)] = torch.eye(K)[k].expand(M, K)
    return settings


@torch.no_grad()
def add_results(explored: dict[str, Any], loaded: Loaded, kind: str) -> None:
    """Add the results of one set to its tasks and to its shown samples."""
    base, adapters = loaded.base, loaded.adapters
    examples = loaded.sets[kind]
    w = evaluation.router_weights(base, adapters, examples)
    settings = settings_of(w)

    numbers = {}  # {row: number of the shown sample}
    for number, sample in enumerate(explored["samples"]):
        task = explored["tasks"][sample["task"]]
        if task["kind"] == kind:
            row = sample["row"]
            numbers[row] = number
            sample["results"] = [
                explorer.answer(loaded, examples[row], given[row]) for given in settings.values()
            ]

    tasks = of_kind(explored, kind)
    for task, rows in zip(tasks, rows_by_task(examples), strict=True):
        part = [examples[row] for row in rows]
        for name in COMPARED:
            losses = evaluation.measure(base, adapters, part, w=settings[name][rows])
            task[name] = round(evaluation.mean_loss(losses), 4)
        predictions = explorer.predict(loaded, part, w[rows])
        task["right"] = 0
        for prediction, example in zip(predictions, part, strict=True):
            task["right"] += int(explorer.is_right(loaded, example, prediction))
        listed = sorted({*data.subsample(rows, LISTED), *(row for row in rows if row in numbers)})
        task["listed"] = []
        for row in listed:
            text, _ = explorer.texts_of(loaded, kind, examples[row])
            shares = (100 * w[row]).round().int().tolist()
            text = textwrap.shorten(text, 44, placeholder=" …")
            task["listed"].append([text, shares, numbers.get(row, -1)])


def first_sample(explored: dict[str, Any]) -> int:
    """Return the number of the seen sample with which the page opens: one where routing matters.

    Samples that are right with their own w, and wrong with the mean w and with w = 1/K, come before
    all others. Among equals, it is the one whose loss rises most with w = 1/K.
    """

    def gain(number: int) -> tuple[bool, float]:
        sample = explored["samples"][number]
        own, mean, uniform = sample["results"][:3]
        matters = own[2] and not mean[2] and not uniform[2]
        return matters, uniform[1] - own[1]

    return max(explorer.seen_numbers(explored), key=gain)


@torch.no_grad()
def without_one(loaded: Loaded) -> dict[str, list[float]]:
    """Return what each Linear loses, over the seen samples, if only this Linear is not routed.

    spread: how far c differs between samples, as the mean of |c - mean c|. rise: how much the loss
    rises if this Linear, and no other, uses the mean c for all samples.
    """
    base, adapters, examples = loaded.base, loaded.adapters, loaded.sets["seen"]
    w = evaluation.router_weights(base, adapters, examples)
    c = adapters.route(w=w).c  # (N,M,S)
    mean_c = c.mean(dim=1, keepdim=True)  # (N,1,S)
    spread = (c - mean_c).abs().mean(dim=(1, 2))  # (N,)

    losses = []
    skills = list(adapters.skills.values())
    for n in range(-1, len(skills)):  # -1: all are routed
        total = 0.0
        tokens = 0
        for _, batch, _ in evaluation.routed_batches(base, adapters, examples, 64, "Linears"):
            if n >= 0:
                skills[n].c = mean_c[n].expand(len(batch.input_ids), -1)
            total += base.loss(batch.input_ids, batch.attention_mask, batch.labels).item()
            tokens += int((batch.labels != -100).sum())
        losses.append(total / tokens)
    return {
        "spread": rounded(spread),
        "rise": [round(loss - losses[0], 4) for loss in losses[1:]],
    }


# ------------------------------------------------------------------------------------- one sample


def walk(loaded: Loaded, explored: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of the first sample at each step: texts, and tables as lists of rows.

    Every step is computed as its equation says, and compared with what the model computes.
    """
    base, adapters = loaded.base, loaded.adapters
    sample = explored["samples"][explored["first"]]
    example = loaded.sets["seen"][sample["row"]]
    batch = data.collate([example])
    calls = {}  # {Linear: (input, output)}
    hooks = []
    for name, linear in adapters.linears.items():

        def remember(_: Any, inputs: tuple, output: Tensor, name: str = name) -> None:
            calls[name] = (inputs[0][0].detach(), output[0].detach())

        hooks.append(linear.register_forward_hook(remember))
    with evaluation.routed(base, adapters, batch) as routing:
        loss = base.loss(batch.input_ids, batch.attention_mask, batch.labels)
        loss = loss / (batch.labels != -100).sum()
        loss.backward()
    for hook in hooks:
        hook.remove()

    trained = adapters.parameter_groups()
    found = {
        "other": sample["other_task"],
        "frozen": f"{sum(p.numel() for n, p in base.named_parameters() if 'skill_' not in n):,}",
        "trained": f"{sum(p.numel() for group in trained.values() for p in group):,}",
        "prompt": explored["tasks"][sample["task"]]["head"] + sample["tail"],
        "references": " or ".join(sample["references"]),
        "answer": sample["results"][0][0],
        "answer_uniform": sample["results"][2][0],
        "length": str(batch.input_ids.shape[1]),
    }
    with torch.no_grad():
        found |= walk_router(loaded, explored, sample, batch, routing)
        found |= walk_linear(loaded, routing, calls)
        found |= walk_loss(loaded, batch, routing, loss)
    norms = {}
    for name, group in trained.items():
        if group:
            norms[name] = torch.cat([parameter.grad.flatten() for parameter in group]).norm()
    rates = [getattr(loaded.run.settings, f"lr_{name}") for name in norms]
    found["gradients"] = [
        ["", *norms],
        ["norm of the gradient", *decimals(norms.values())],
        ["highest rate of the schedule", *(f"{rate:g}" for rate in rates)],
    ]
    base.zero_grad()
    return found


def walk_router(
    loaded: Loaded, explored: dict, sample: dict, batch: data.Batch, routing: Any
) -> dict[str, Any]:
    """Return the numbers from the embeddings to c."""
    router = loaded.adapters.router
    embeddings = loaded.base.embed(batch.input_ids)
    D = embeddings.shape[-1]
    X = F.rms_norm(embeddings, (D,), eps=1e-6)  # (1,L,D)
    P = (X @ X.mT / math.sqrt(D)).softmax(dim=-1)  # (1,L,L)
    X_hat = P @ X + X  # (1,L,D)
    x_hat = X_hat.mean(dim=1)  # (1,D)
    assert_close(x_hat, router.summarise(embeddings, batch.attention_mask))
    standard = (x_hat - router.mu) / router.sd
    logits = standard @ router.W_task.T + router.bias  # (1,K)
    w = logits.softmax(dim=-1)
    assert_close(w, routing.w)

    ids = batch.input_ids[0]
    same_id = ids.unsqueeze(1) == ids  # (L,L)
    mean = X.mean(dim=1)
    own_task = explored["tasks"][sample["task"]]
    other_task = next(t for t in explored["tasks"] if t["name"] == sample["other_task"])
    K = w.shape[1]

    n = list(loaded.adapters.linears).index(LINEAR)
    Z = loaded.adapters.Z[n]  # (K,S)
    Zhat = Z.sigmoid() / Z.sigmoid().sum(dim=-1, keepdim=True)
    all_Zhat = loaded.adapters.allocation_weights()  # (N,K,S)
    assert_close(Zhat, all_Zhat[n])
    skills = [f"skill {s + 1}" for s in range(Zhat.shape[1])]
    c_rows = []
    for name in LINEARS:
        position = list(loaded.adapters.linears).index(name)
        c = routing.w[0] @ all_Zhat[position]  # (S,)
        assert_close(c, routing.c[position, 0])
        c_rows.append([name, *decimals(c)])
    return {
        "width": str(D),
        "to_itself": f"{P[0, same_id].sum() / len(ids):.4f}",
        "moved": f"{((P @ X).mean(dim=1) - mean).norm() / mean.norm():.5f}",
        "features": [
            ["", "1", "2", "3", "4", "length"],
            [r"$\hat x$", *decimals([*x_hat[0, :4], x_hat.norm()])],
            [r"$(\hat x - \mu) / \text{sd}$", *decimals([*standard[0, :4], standard.norm()])],
        ],
        "weights": [
            ["abstract task", *map(str, range(1, K + 1))],
            [r"$W_\text{task} \hat x + b$", *decimals(logits[0], 2)],
            ["$w$", *decimals(w[0], 2)],
            ["mean $w$ of its task", *decimals(own_task["w"], 2)],
            ["mean $w$ of the other task", *decimals(other_task["w"], 2)],
        ],
        "entropy": f"{torch.special.entr(w).sum(dim=-1).mean():.2f}",
        "most_entropy": f"{math.log(K):.2f}",
        "allocation": [
            ["abstract task", *skills],
            *([str(k + 1), *decimals(row)] for k, row in enumerate(Zhat)),
        ],
        "c": [["Linear", *skills], *c_rows],
    }


def walk_linear(loaded: Loaded, routing: Any, calls: dict) -> dict[str, Any]:
    """Return the numbers of one Linear, and how large the skills' part is in all of them."""
    linears = loaded.adapters.linears
    shares = []
    for name, linear in linears.items():
        x, y = calls[name]
        frozen = F.linear(x, linear.weight, linear.bias)
        shares.append(((y - frozen).norm() / frozen.norm()).item())

    n = list(linears).index(LINEAR)
    linear = linears[LINEAR]
    x, y = calls[LINEAR]  # (L,D), (L,O)
    c = routing.c[n, 0]  # (S,)
    skills = list(loaded.adapters.skills.values())[n]
    S, R, D = skills.A.shape
    A = skills.A.reshape(S * R, D)
    B = skills.B.reshape(S * R, -1)
    h = x @ A.T  # (L,S R)
    weights = skills.scale * c.repeat_interleave(R)  # (S R,)
    added = (weights * h) @ B  # (L,O)
    frozen = x @ linear.weight.T  # (L,O)
    assert_close(frozen + added, y)

    ranks = []
    for s in range(S):
        ranks += [f"{s + 1}.{r + 1}" for r in range(R)]
    outputs = []
    for name, value in (("$W_0 x$", frozen), ("skills", added), ("$y$", y)):
        outputs.append([name, *decimals([*value[-1, :4], value[-1].norm()], 2)])
    return {
        "linear": LINEAR,
        "ranks": [
            ["", *ranks],
            ["$h = A x$", *decimals(h[-1], 2)],
            [r"$\text{scale}\, c$", *decimals(weights, 2)],
            [r"$\text{scale}\, c h$", *decimals(weights * h[-1], 2)],
        ],
        "outputs": [["", "1", "2", "3", "4", "length"], *outputs],
        "share": f"{shares[n]:.2f}",
        "share_least": f"{min(shares):.2f}",
        "share_most": f"{max(shares):.2f}",
        "products": f"{S * R * (D + linear.out_features):,}",
        "products_frozen": f"{D * linear.out_features:,}",
    }


def walk_loss(loaded: Loaded, batch: data.Batch, routing: Any, loss: Tensor) -> dict[str, Any]:
    """Return -ln p of each target token."""
    K = routing.w.shape[1]
    rows = []
    for name, w in (
        ("w = 0: the frozen base", torch.zeros(K)),
        ("w = 1/K", torch.full((K,), 1 / K)),
        ("its own w", routing.w[0]),
    ):
        with loaded.adapters.routed(w=w):
            losses = token_losses(loaded, batch)
        rows.append([name, *decimals([*losses, losses.mean()])])
    assert_close(losses.mean(), loss)
    words = [loaded.tokenizer.sp.id_to_piece(i) for i in batch.labels[0].tolist()]
    return {"token_losses": [["", *words, "mean"], *rows]}


def token_losses(loaded: Loaded, batch: data.Batch) -> Tensor:
    """Return -ln p of each target token, (Lt,)."""
    base = loaded.base
    start = batch.labels.new_full((1, 1), base.config.decoder_start_token_id)
    read = torch.cat((start, batch.labels[:, :-1]), dim=1)
    hidden = base.hidden(batch.input_ids, batch.attention_mask, read)
    return F.cross_entropy(base.logits(hidden)[0], batch.labels[0], reduction="none")


def decimals(values: Iterable, digits: int = 3) -> list[str]:
    """Return numbers as texts. Adding 0 takes the sign from what rounds to zero."""
    return [f"{round(float(value), digits) + 0.0:.{digits}f}" for value in values]
