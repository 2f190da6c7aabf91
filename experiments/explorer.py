"""The routing explorer: one HTML page that shows what the router of a run does with single samples.

`collect` computes the numbers from a finished run, `section` turns them into HTML with an inline
script. The page needs no network. Made by `python -m experiments.plot --run RUN --html page.html`;
docs/annotated.html ends with the explorer of the default run.

Letters: M samples, K abstract tasks, S skills, N adapted Linears, L length, D width.
Test: pytest tests/repo/test_annotate.py
"""

import html
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import data
import eval as evaluation
import run_folder
import runtime
import tokenizer as tokenizers
from model import Backbone
from orchmoe import OrchMoE

SAMPLES = 20  # seen ones, and as many unseen ones


@torch.no_grad()
def collect(run: str | Path, *, model: str = "") -> dict[str, Any]:
    """Return what the explorer shows of the run, as plain JSON values. Computes on the CPU.

    model: where the base of the run is now, if it has moved. Raise ValueError if the run has no
    sample router.
    """
    device = runtime.pick_device(device="cpu", dtype="float32")
    base, adapters, tokenizer = run_folder.load(device, run=run, model=model)
    if adapters.router is None:
        raise ValueError(f"{run}: has no sample router, so there is no routing of samples to show")
    config = run_folder.read_config(run)
    data_config = config.section(data.DataConfig, "data")
    sets = data.load_sets(data_config, tokenizer, training=config.tasks)

    shown = []
    for kind, name in (("seen", "seen"), ("unseen", "test")):
        if name not in sets:
            continue
        w = evaluation.router_weights(base, adapters, sets[name])  # (M,K)
        mean_w = w.mean(dim=0)
        tasks = [example.task for example in sets[name]]
        for row in spread(tasks, SAMPLES):
            example = sets[name][row]
            same_task = [i for i, task in enumerate(tasks) if task == example.task]
            other = (row + len(tasks) // 2) % len(tasks)  # far away, so most likely another task
            routings = {
                "own": w[row],
                "mean": mean_w,
                "other": w[other],
                "uniform": torch.full_like(w[row], 1 / w.shape[1]),
            }
            losses = {}
            for routing, weights in routings.items():
                loss, _ = evaluation.measure(base, adapters, [example], w=weights[None])
                losses[routing] = round(loss, 4)
            answer = evaluation.predict(base, adapters, [example], tokenizer)[0]
            shown.append(
                {
                    "kind": kind,
                    "id": example.id,
                    "task": example.task,
                    "category": example.category,
                    "prompt": prompt_of(data_config, example, tokenizer),
                    "answer": answer,
                    "references": example.references[:3],
                    "w": rounded(w[row]),
                    "task_w": rounded(w[same_task].mean(dim=0)),
                    "other_w": rounded(w[other]),
                    "other_task": tasks[other],
                    "mean_w": rounded(mean_w),
                    "losses": losses,
                }
            )
    return {
        "walk": walk(base, adapters, sets["seen"][0]),
        "run": Path(run).name,
        "steps": config.train["steps"],
        "linears": list(adapters.linears),
        "Zhat": rounded(adapters.allocation_weights()[0]),  # (N,K,S)
        "samples": shown,
    }


def spread(tasks: list[str], count: int) -> list[int]:
    """Return `count` positions, evenly over the set, with at most two of one task."""
    rows = []
    for row in data.subsample(range(len(tasks)), 4 * count):
        if len(rows) < count and [tasks[i] for i in rows].count(tasks[row]) < 2:
            rows.append(row)
    return rows


def prompt_of(
    data_config: data.DataConfig, example: data.Example, tokenizer: tokenizers.Tokenizer
) -> str:
    """Return the prompt of an example as text."""
    task = data.read_task(Path(data_config.data) / "tasks" / f"{example.task}.json")
    names = ("definition", "num_pos", "num_neg", "explanation", "max_source_length")
    options = {name: getattr(data_config, name) for name in names}
    return data.render_prompt(task, task["instances"][example.position], tokenizer, **options)


def walk(base: Backbone, adapters: OrchMoE, example: data.Example) -> dict[str, list[str]]:
    """Return the numbers of one sample at each step of orchmoe.py, as lines of text."""
    router = adapters.router
    batch = data.collate([example])
    embeddings = base.embed(batch.input_ids)
    path, linear = next(iter(adapters.linears.items()))
    inputs = []
    hook = linear.register_forward_hook(lambda _, given, output: inputs.append((given[0], output)))
    with evaluation.routed(base, adapters, batch) as routing:
        base.loss(batch.input_ids, batch.attention_mask, batch.labels)
    hook.remove()
    x, y = inputs[0]
    frozen = F.linear(x, linear.weight, linear.bias)

    _, L, D = embeddings.shape
    X = F.rms_norm(embeddings, (D,), eps=1e-6)
    P = (X @ X.mT / math.sqrt(D)).softmax(dim=-1)  # (1,L,L)
    same_token = batch.input_ids[:, :, None] == batch.input_ids[:, None, :]
    on_same_token = (P * same_token).sum(dim=-1).mean()
    x_hat = router.summarise(embeddings)
    standard = (x_hat - router.mu) / router.sd
    logits = F.linear(standard, router.W_task, router.bias)
    N, K, S = adapters.Z.shape
    return {
        "TaskRouter.summarise": [
            f"sample {example.id}: L = {L}, D = {D}",
            f"mean attention of a token to itself and its repetitions: {on_same_token:.4f}",
            f"x_hat = [{numbers(x_hat[0, :4])}, ...]",
        ],
        "TaskRouter.forward": [
            f"standardised x_hat = [{numbers(standard[0, :4])}, ...]",
            f"W_task x_hat + b = [{numbers(logits[0])}]",
            f"w = [{numbers(routing.w[0])}], sum {routing.w.sum():.4f}",
        ],
        "OrchMoE.__init__": [f"N = {N} adapted Linears, K = {K}, S = {S}"],
        "OrchMoE.allocation_weights": [
            f"{path}, row of the largest w:",
            f"Zhat = [{numbers(routing.Zhat[0, 0, routing.w[0].argmax()])}]",
        ],
        "OrchMoE.route": [f"{path}: c = [{numbers(routing.c[0, 0])}]"],
        "SkillLinear.forward": [
            f"{path}: x {tuple(x.shape)} -> y {tuple(y.shape)}",
            f"norm of W0 x: {frozen.norm():.2f}, of the skills' part: {(y - frozen).norm():.2f}",
        ],
        "mix_skills": [
            f"A {tuple(linear.skill_A.shape)}, B {tuple(linear.skill_B.shape)}: "
            f"one LoRA of rank {linear.skill_A.shape[0] * linear.skill_A.shape[1]}",
        ],
    }


def numbers(values: Tensor) -> str:
    return ", ".join(f"{value:.3f}" for value in values.tolist())


def save_page(run: str | Path, path: str | Path, *, model: str = "") -> None:
    """Write the explorer of a run to an HTML page."""
    text = page(collect(run, model=model))
    with runtime.atomic_write(path) as file:
        file.write(text.encode())


def rounded(values: Tensor) -> list:
    """Return a tensor as nested lists with four decimals."""
    return torch.round(values.float().cpu(), decimals=4).double().round(decimals=4).tolist()


# ----------------------------------------------------------------------------------------- the page


def section(explored: dict[str, Any]) -> str:
    """Return the explorer as HTML: style, markup, numbers and script, from explorer.html."""
    template = Path(__file__).with_name("explorer.html").read_text(encoding="utf-8")
    numbers = json.dumps(explored, ensure_ascii=False, separators=(",", ":"))
    numbers = numbers.replace("</", "<\\/")  # "</script>" in a prompt must not end the element
    return template.replace("@NUMBERS@", numbers)


def page(explored: dict[str, Any]) -> str:
    """Return the page of one run."""
    title = html.escape(f"What the router of {explored['run']} does")
    body_style = "max-width: 80rem; margin: 1.5rem auto; padding: 0 1rem; line-height: 1.4"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title></head>\n"
        f'<body style="font-family: system-ui, sans-serif; {body_style}"><h1>{title}</h1>\n'
        f"{section(explored)}</body></html>\n"
    )
