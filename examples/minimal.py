"""The method in eighty lines: the equations of OrchMoE as code, without any of the plumbing.

`python -m examples.minimal` trains the bundled T5 on the CPU, and prints the losses that
`python train.py --device cpu` has.

Letters: B batch, L length, D width, N adapted Linears, S skills of rank R, K abstract tasks, M
prompts.
"""

import math

import torch

import checkpoint
import data
import tokenizer
from orchmoe import scale_for_entropy, spherical_kmeans
from support import program, runtime
from tasks import DataConfig


def summarise(base, batch):
    """Return x_hat (B,D), a vector for each source of the batch, whose embeddings are E."""
    E = base.embed(batch.input_ids)  # (B,L,D)
    mask = batch.attention_mask[..., None]  # (B,L,1)
    X = mask * E / (E.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    scores = (X @ X.mT / math.sqrt(X.shape[2])).masked_fill(~mask.mT, -math.inf)  # (B,L,L)
    X_hat = scores.softmax(dim=-1) @ X + X
    return (mask * X_hat).sum(dim=1) / mask.sum(dim=1)


def train(steps=600, warmup=50, K=8, S=4, R=2):
    """Yield the loss of each step in nats per target token."""
    base = checkpoint.load(program.ROOT / "tiny").requires_grad_(False)
    examples = data.load_sets(DataConfig(), tokenizer.load(program.ROOT / "tiny"))["train"]
    linears = [module for name, module in base.named_modules() if name.endswith((".q", ".v"))]
    N = len(linears)
    D = linears[0].in_features

    # The skills A and B, and the allocation matrices Z. With B = 0 the model starts as the base.
    random = runtime.generator(0, 0)
    A = torch.empty(N, S, R, D).uniform_(-1 / math.sqrt(D), 1 / math.sqrt(D), generator=random)
    B = torch.zeros(N, S, R, linears[0].out_features)
    Z = torch.empty(N, K, S).normal_(0, 3, generator=random)

    sources = data.batches(data.subsample(examples, 2000), 8, base.device, "router start")
    x_hat = torch.cat([summarise(base, batch) for _, batch in sources])  # (M,D)
    mu, sd = x_hat.mean(dim=0), x_hat.std(dim=0, correction=0)
    x_hat = (x_hat - mu) / sd
    centres = spherical_kmeans(x_hat, K, runtime.generator(0, 1))  # (K,D), the start of the router
    W_task = centres * scale_for_entropy(x_hat @ centres.T, math.log(K) / 3)
    b = torch.zeros(K)

    # y = W0 x + scale * sum_s c_s B_s A_s x, with scale = 1. Each step below sets c (N,B,S) first.
    def add_skills(linear, inputs, y):
        x = inputs[0]
        n = linears.index(linear)
        for s in range(S):
            y = y + c[n, :, s, None, None] * (x @ A[n, s].T @ B[n, s])
        return y

    for linear in linears:
        linear.register_forward_hook(add_skills)
    groups = [{"params": [A, B, Z], "max_lr": 1e-2}, {"params": [W_task, b], "max_lr": 1e-3}]
    trained = [A, B, Z, W_task, b]
    for tensor in trained:
        tensor.requires_grad_()
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    batch_order = data.BatchOrder(examples.source_lengths, batch_size=16, seed=0)
    for step in range(steps):
        batch = data.collate([examples[i] for i in batch_order.at(step)], seed=0, step=step)
        x_hat = (summarise(base, batch) - mu) / sd  # (B,D)
        w = (x_hat @ W_task.T + b).softmax(dim=-1)  # (B,K)
        Zhat = Z.sigmoid() / Z.sigmoid().sum(dim=-1, keepdim=True)  # (N,K,S)
        c = w @ Zhat  # (N,B,S)
        loss = base.loss(batch.input_ids, batch.attention_mask, batch.labels) / batch.target_tokens
        yield loss.item()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, max_norm=1.0)
        for group in optimizer.param_groups:
            fall = (steps - step) / (steps - warmup)
            group["lr"] = group["max_lr"] * min((step + 1) / warmup, fall)
        optimizer.step()


if __name__ == "__main__":
    for step, loss in enumerate(train()):
        print(f"step {step}: loss {loss:.4f}")
