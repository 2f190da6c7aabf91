"""examples/minimal.py against orchmoe.py."""

import re

import torch
from torch import nn

from examples import minimal
from orchmoe import OrchMoEConfig, attach

K, S, R, N, D = minimal.K, minimal.S, minimal.R, minimal.N, minimal.D
CLOSE = dict(rtol=1e-5, atol=1e-6)


def test_w_c_and_y_are_those_of_orchmoe():
    model = minimal.Model()
    tokens, _ = minimal.requests(200)
    model.start_router(tokens)
    nn.init.normal_(model.B)
    nn.init.normal_(model.b)

    base = nn.Sequential(*model.linears)
    config = OrchMoEConfig(abstract_tasks=K, skills=S, rank=R, targets=("0", "1"))
    adapters = attach(base, config)
    state = {"Z": model.Z, "router.W_task": model.W_task, "router.bias": model.b}
    state |= {"router.mu": model.mu, "router.sd": model.sd}
    for n in range(N):
        state |= {f"skills.{n}.A": model.A[n], f"skills.{n}.B": model.B[n]}
    adapters.load_state_dict(state)

    tokens, _ = minimal.requests(20)
    w, c = model.route(tokens)
    x = torch.randn(20, 3, D)
    with adapters.routed(model.embedding(tokens)) as routing:
        torch.testing.assert_close(w, routing.w, **CLOSE)
        torch.testing.assert_close(c, routing.c, **CLOSE)
        found = [base[n](x) for n in range(N)]
    with adapters.disabled():
        expected = [model.linear(n, x, c[n]) for n in range(N)]
    torch.testing.assert_close(found, expected, **CLOSE)


def test_its_router_starts_with_the_kinds_of_the_requests():
    model = minimal.Model()
    tokens, _ = minimal.requests(200)
    model.start_router(tokens)
    w, _ = model.route(tokens)
    kind = (tokens[:, 0] == 13).long()
    winner = w.argmax(dim=1)
    assert torch.equal(winner, kind) or torch.equal(winner, 1 - kind)
    assert w.amax(dim=1).min() > 0.9


def test_it_learns_both_kinds_which_one_c_for_all_cannot(capsys):
    minimal.main(steps=200)
    lines = capsys.readouterr().out.splitlines()
    own, mean = (float(re.search(r"(\d+) %", line)[1]) for line in lines[-2:])
    assert own > 95 and mean < 60
