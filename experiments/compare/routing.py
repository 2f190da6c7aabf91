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


def skill_cosine(adapters: Adapters) -> float:
    """Return how alike the skills are: the cosine of B_s A_s and B_t A_t, as flat vectors.

    It is the mean over all pairs of skills and all Linears. Return NaN if there are no pairs, or
    if a skill is zero.
    """
    cosines = []
    for linear in adapters.linears.values():
        A = linear.skill_A.double()  # (S,R,D)
        B = linear.skill_B.double()  # (S,R,O)
        # <B_s A_s, B_t A_t> without a matrix (O,D): sum over ranks of (A_s A_t^T) * (B_s B_t^T).
        of_A = torch.einsum("srd,tqd->strq", A, A)
        of_B = torch.einsum("sro,tqo->strq", B, B)
        products = (of_A * of_B).sum(dim=(2, 3))  # (S,S)
        norms = products.diagonal().sqrt()
        cosine = products / (norms[:, None] * norms)
        pairs = torch.ones_like(cosine).triu(1).bool()
        cosines.append(cosine[pairs])
    return torch.cat(cosines).mean().item()


@torch.no_grad()
def report(
    base: Backbone, adapters: Adapters, examples: Sequence[data.Example], *, batch_size: int = 64
) -> dict[str, float]:
    """Return numbers about the routing of M examples.

    distance_from_equal: mean of |c - 1/S|. skill_cosine: how alike the skills are. With a router of
    samples also eval.router_report, and if there are several categories mutual_information with
    the category. Return {} for methods without one c for a sample.
    """
    if not isinstance(adapters.method, OrchMoE):
        return {}
    w = evaluation.router_weights(base, adapters, examples, batch_size)
    task_ids = torch.tensor([example.task_index for example in examples])
    routing = adapters.route(w=w, task_ids=task_ids.to(base.device))
    if routing.c is None:
        return {}
    c = routing.c.float()  # (N,M,S), or (N,1,S) if all samples share it
    found = {
        "distance_from_equal": (c - 1 / c.shape[-1]).abs().mean().item(),
        "skill_cosine": skill_cosine(adapters),
    }
    if not routing.shared:
        w = routing.w.float().cpu()
        found |= evaluation.router_report(w)
        categories = [example.category for example in examples]
        if len(set(categories)) > 1:
            found["mutual_information"] = mutual_information(w, categories)
    return found
