"""The method in eighty lines of torch: the equations of OrchMoE as code, without any plumbing.

The requests are of two kinds, and nobody says which: double a digit, or take it from nine. The base
is frozen, and its tokens never meet before the last layer. So the token of the digit can learn what
to do only from c, which the router computes from the whole request.

    python examples/minimal.py

orchmoe.py has the same equations, and puts them into any model.
Letters: B requests, L tokens, D width, N adapted Linears, S skills of rank R, K abstract tasks.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

N, S, R, K, D = 2, 4, 2, 2, 32


def requests(count):
    """Return the tokens (B,L) and the answers (B) of random requests."""
    digit, kind = torch.randint(10, (count,)), torch.randint(2, (count,))
    words = torch.tensor([[10, 11, 12], [13, 14, 15]])[kind]  # "two times", "nine minus" ...
    answer = torch.where(kind == 0, 2 * digit % 10, 9 - digit)
    return torch.cat([words, digit[:, None]], dim=1), answer


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        # The base. Its random weights are frozen.
        self.embedding = nn.Embedding(16, D)
        self.linears = nn.ModuleList(nn.Linear(D, D) for _ in range(N))
        self.head = nn.Linear(D, 10)
        self.requires_grad_(False)
        # What trains. With B = 0 the model starts as the base.
        bound = 1 / math.sqrt(D)
        self.A = nn.Parameter(torch.empty(N, S, R, D).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(N, S, R, D))
        self.Z = nn.Parameter(3 * torch.randn(N, K, S))
        self.W_task = nn.Parameter(torch.zeros(K, D))
        self.b = nn.Parameter(torch.zeros(K))

    def summarise(self, tokens):
        """Return x_hat (B,D), a vector for each request."""
        X = F.rms_norm(self.embedding(tokens), (D,), eps=1e-6)  # (B,L,D)
        X_hat = (X @ X.mT / math.sqrt(D)).softmax(dim=-1) @ X + X
        return X_hat.mean(dim=1)

    @torch.no_grad()
    def start_router(self, tokens):
        """Set mu, sd and W_task from requests (M,L): a k-means finds the K kinds without labels."""
        x_hat = self.summarise(tokens)
        self.mu, self.sd = x_hat.mean(dim=0), x_hat.std(dim=0, correction=0)
        points = F.normalize((x_hat - self.mu) / self.sd, dim=-1)  # (M,D)
        centres = points[:1]
        while len(centres) < K:  # add the point that is farthest from its nearest centre
            farthest = (points @ centres.T).amax(dim=1).argmin()
            centres = torch.cat([centres, points[farthest, None]])
        for _ in range(10):  # move each centre to the mean of its points
            nearest = (points @ centres.T).argmax(dim=1)
            membership = F.one_hot(nearest, K).float()  # (M,K)
            centres = F.normalize(membership.T @ points, dim=-1)  # (K,D)
        self.W_task.copy_(centres)

    def route(self, tokens):
        """Return w (B,K) and c (N,B,S)."""
        x_hat = (self.summarise(tokens) - self.mu) / self.sd
        w = (x_hat @ self.W_task.T + self.b).softmax(dim=-1)
        Zhat = self.Z.sigmoid() / self.Z.sigmoid().sum(dim=-1, keepdim=True)  # (N,K,S)
        return w, w @ Zhat

    def linear(self, n, x, c):
        """Return W0 x + scale * sum_s c_s B_s A_s x of Linear n, with scale = 1. c: (B,S)."""
        y = self.linears[n](x)
        for s in range(S):
            y = y + c[:, s, None, None] * (x @ self.A[n, s].T @ self.B[n, s])
        return y

    def forward(self, tokens, c):
        """Return logits (B,10) of the answers."""
        x = self.embedding(tokens)  # (B,L,D)
        for n in range(N):
            x = x + F.gelu(self.linear(n, x, c[n]))
        return self.head(x.mean(dim=1))


def main(steps=600):
    torch.manual_seed(0)
    model = Model()
    model.start_router(requests(200)[0])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    for step in range(steps):
        tokens, answer = requests(64)
        w, c = model.route(tokens)
        loss = F.cross_entropy(model(tokens, c), answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.3f}")

    tokens, answer = requests(1000)
    w, c = model.route(tokens)
    for name, weights in (("c of each request", c), ("mean c", c.mean(dim=1, keepdim=True))):
        right = model(tokens, weights.expand_as(c)).argmax(dim=-1) == answer
        print(f"{name}: {100 * right.float().mean():.0f} % of the answers are right")


if __name__ == "__main__":
    main()
