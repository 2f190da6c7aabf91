"""What the router of a finished run has learnt, as numbers for a JSON file: that of a run for
experiments.plot, that of each cell for experiments.compare. Test: pytest tests/experiments/test_routing.py"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import data
import eval as evaluation
import run_folder
import runtime
import train
from model import Backbone
from orchmoe import Adapters


def mutual_information(w: Tensor, labels: Sequence[str]) -> float:
    """Nats that the abstract task, drawn from w (M,K), and the label of a sample tell of each other: 0 where
    w does not depend on the label, at most the smaller of their two entropies. NaN where the rows of w are
    no distributions."""
    if math.isnan(evaluation.mean_entropy(w)):
        return math.nan
    rows = np.unique(np.array(labels), return_inverse=True)[1]
    joint = torch.zeros(rows.max() + 1, w.shape[1], dtype=torch.float64)
    joint.index_add_(0, torch.from_numpy(rows.reshape(-1)), w.double() / len(w))  # p(label, k)
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return torch.special.xlogy(joint, joint / apart.clamp(min=1e-300)).sum().item()


@torch.no_grad()
def report(base: Backbone, adapters: Adapters, examples: Sequence[data.Example], *, batch_size: int = 64
           ) -> dict[str, Any]:
    """What router_report says, mutual information with the real category, mean w of each real task (K), mean
    c of each Linear (S), Zhat (N,K,S) and `distance`, the mean |c - 1/S|. {} for methods whose c is not one
    for the sample."""
    use, distance, learnt, w = 0.0, 0.0, {}, {}
    for rows, _, routing in evaluation.routed_batches(base, adapters, examples, batch_size, "skills in use"):
        if routing.c is None or routing.Zhat is None:
            return {}
        c = routing.c.float().expand(-1, len(rows), -1)  # (N,B,S)
        use = use + c.sum(1) / len(examples)
        distance += (c - 1 / c.shape[-1]).abs().mean().item() * len(rows) / len(examples)
        learnt["allocation"] = routing.Zhat[0].float().cpu().numpy().round(4).tolist()
        if not routing.shared:
            w |= dict(zip(rows, routing.w.float().cpu(), strict=True))
    names = adapters.linears.keys()
    learnt |= {"distance": distance, "skill_use": dict(zip(names, use.cpu().tolist(), strict=True))}
    if w:
        w = torch.stack([w[i] for i in range(len(examples))])  # (M,K)
        tasks = np.array([example.task for example in examples])
        learnt |= evaluation.router_report(w, examples)
        learnt["mutual_information"] = mutual_information(w, [example.category for example in examples])
        learnt["w"] = {str(task): w[tasks == task].mean(0).tolist() for task in sorted(set(tasks))}
        learnt["category"] = {example.task: example.category for example in examples}
    return learnt


def of_run(folder: Path, place: runtime.Device, *, model: str = "") -> dict[str, Any]:
    """`report` on the seen instances that a run of train.py was scored on. model: where the run's base is
    now, if it has moved."""
    run = run_folder.read_config(folder)
    config, data_config = run.section(train.TrainConfig, "train"), run.section(data.DataConfig, "data")
    base, adapters, tokenizer = run_folder.load(place, run=folder, model=model)
    which = evaluation.EvalConfig(run=str(folder), split="seen", limit=config.eval_instances)
    seen, _ = evaluation.load_examples(which, data_config, run, tokenizer)
    return report(base, adapters, seen, batch_size=config.eval_batch_size)
