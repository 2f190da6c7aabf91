"""What the router of a finished run has learnt, as numbers for the file of a cell.

Letters: M samples, K abstract tasks, N adapted Linears, S skills.
Test: pytest tests/experiments/test_routing.py
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

import data
import eval as evaluation
from model import Backbone
from orchmoe import Adapters, OrchMoE


def mutual_information(w: Tensor, labels: Sequence[str]) -> float:
    """Return the mutual information, in nats, of the label of a sample and its abstract task.

    The abstract task is drawn from w (M,K). It is 0 where w does not depend on the label, and at
    most the smaller of their two entropies. NaN if the rows of w are no distributions.
    """
    if math.isnan(evaluation.mean_entropy(w)):
        return math.nan
    known = sorted(set(labels))
    rows = torch.tensor([known.index(label) for label in labels])
    joint = torch.zeros(len(known), w.shape[1], dtype=torch.float64)
    joint.index_add_(0, rows, w.double() / len(w))  # p(label, k)
    independent = joint.sum(dim=1, keepdim=True) * joint.sum(dim=0, keepdim=True)
    ratio = joint / independent.clamp(min=1e-300)
    return torch.special.xlogy(joint, ratio).sum().item()


@torch.no_grad()
def report(
    base: Backbone, adapters: Adapters, examples: Sequence[data.Example], *, batch_size: int = 64
) -> dict[str, float]:
    """Return numbers about the routing of M examples.

    distance_from_equal: mean of |c - 1/S|. mutual_information: that of w and the category, if there
    are several. The rest: see eval.router_report. Return {} if samples have no w of OrchMoE.
    """
    if not isinstance(adapters.method, OrchMoE):
        return {}
    w = evaluation.router_weights(base, adapters, examples, batch_size)  # (M,K)
    if w is None:
        return {}
    c = adapters.route(w=w).c.float()  # (N,M,S)
    distance = (c - 1 / c.shape[-1]).abs().mean().item()
    found = {"distance_from_equal": distance, **evaluation.router_report(w)}
    categories = [example.category for example in examples]
    if len(set(categories)) > 1:
        found["mutual_information"] = mutual_information(w, categories)
    return found
