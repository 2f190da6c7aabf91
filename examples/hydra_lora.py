"""HydraLoRA as an example of a method of your own. docs/use.md explains it line by line.

Each Linear has one A and S matrices B. A token router weighs the B anew for each token:
y = W0 x + scale * sum_s c_s B_s A x with c = softmax(W_task x).
Source: Tian et al. 2024, arXiv 2404.19245.

    python train.py --method examples/hydra_lora.py:HydraLoRA --device cpu

Letters: B batch, L length, D input width, O output width, S matrices B, R rank, N Linears.
Test: pytest tests/programs/test_own_method.py
"""

import torch
import torch.nn.functional as F
from torch import nn

from orchmoe import Method, Routing


def mix_shared_A(x, A, B, c, scale, weight=None, bias=None):
    """Return weight x + bias + scale * sum_s c_s B_s A x: x (B,L,D), c (B,L,S) -> (B,L,O)."""
    h = F.linear(x, A[0].to(x.dtype))  # (B,L,R)
    hc = (scale * c).to(x.dtype)[..., None] * h[..., None, :]  # (B,L,S,R)
    mixed = hc.flatten(-2) @ B.flatten(0, 1).to(x.dtype)  # (B,L,O)
    if weight is None:
        return mixed
    return F.linear(x, weight, bias) + mixed


class HydraLoRA(Method):
    rates = Method.rates | {"skill_W_task": "token_router"}

    def __init__(self, linears, skills, config, *, width, num_tasks=0, generator=None):
        super().__init__()
        S = config.skills
        for attributes in skills:
            A = attributes["skill_A"].detach()  # (S,R,D)
            W_task = torch.empty(S, A.shape[-1]).normal_(0, 0.02, generator=generator)
            attributes["skill_A"] = nn.Parameter(A[:1].clone())  # one A for all B
            attributes["skill_W_task"] = nn.Parameter(W_task.to(A))
            attributes["skill_mix"] = mix_shared_A
        identity = torch.eye(S).to(A).expand(1, len(linears), -1, -1)  # (1,N,S,S)
        self.register_buffer("identity", identity, persistent=False)

    def route(self, embeddings=None, mask=None, *, w=None, noise=None, task_ids=None):
        return Routing(Zhat=self.identity, shared=True)
