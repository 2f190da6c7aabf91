"""HydraLoRA as an example of a method of your own. docs/use.md explains it line by line.

Each Linear has one A and S matrices B. A token router weighs the B anew for each token:
y = W0 x + scale * sum_s c_s B_s A x with c = softmax(W_task x).
Source: Tian et al. 2024, arXiv 2404.19245.

    python train.py --method examples/hydra_lora.py:HydraLoRA --device cpu

Letters: B batch, L length, D input width, O output width, S matrices B, R rank.
Test: pytest tests/programs/test_own_method.py
"""

import torch.nn.functional as F
from torch import nn

from baselines import MoELoRA
from variants import TokenSkills


class HydraSkills(TokenSkills):
    def __init__(self, *inputs):
        super().__init__(*inputs)
        self.A = nn.Parameter(self.A[:1].detach().clone())  # one A for all B

    def forward(self, x, y):
        """Return y + scale * sum_s c_s B_s A x: x (B,L,D), y (B,L,O) -> (B,L,O)."""
        h = F.linear(x.to(y), self.A[0].to(y))  # (B,L,R)
        c = self.weights(x)  # (B,L,S)
        hc = (self.scale * c).to(y)[..., None] * h[..., None, :]  # (B,L,S,R)
        return y + hc.flatten(-2) @ self.B.flatten(0, 1).to(y)


class HydraLoRA(MoELoRA):
    skills_class = HydraSkills
