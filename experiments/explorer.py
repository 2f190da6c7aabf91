"""The routing explorer: one HTML page that shows what the router of a run does with single samples.

`collect` computes the numbers from a finished run, `section` turns them into HTML with an inline
script. The page needs no network. Made by `python -m experiments.plot --run RUN --html page.html`;
docs/annotated.html ends with the explorer of the default run.

Letters: M samples, K abstract tasks, S skills, N adapted Linears.
Test: pytest tests/repo/test_annotate.py
"""

import html
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import data
import eval as evaluation
import run_folder
import runtime
import tokenizer as tokenizers
from runtime import UserError

SAMPLES = 20  # seen ones, and as many unseen ones


@torch.no_grad()
def collect(run: str | Path, *, model: str = "") -> dict[str, Any]:
    """Return what the explorer shows of the run, as plain JSON values. Computes on the CPU.

    model: where the base of the run is now, if it has moved. Raise UserError if the run has no
    sample router.
    """
    device = runtime.pick_device(device="cpu", dtype="float32")
    base, adapters, tokenizer = run_folder.load(device, run=run, model=model)
    if adapters.router is None:
        raise UserError(f"{run}: has no sample router, so there is no routing of samples to show")
    config = run_folder.read_config(run)
    data_config = config.section(data.DataConfig, "dataset")
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
        "run": Path(run).name,
        "steps": config.training["steps"],
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
