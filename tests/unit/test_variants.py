"""Each variant of OrchMoE against its own equation. The rest of it is that of OrchMoE."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from baselines import attach_method
from helpers import seeded_generator, stir
from orchmoe import OrchMoEConfig, TaskRouter
from variants import VARIANTS, RouterFromNormal, RouterWithoutAttention, RouterWithoutSoftmax

EXACT = dict(rtol=1e-10, atol=1e-12)
K, S, R, D, O = 5, 3, 2, 16, 4  # noqa: E741


def small(name):
    """Return adapters in float64 of a single Linear."""
    config = OrchMoEConfig(abstract_tasks=K, skills=S, rank=R, alpha=3.0, targets=("0",))
    base = nn.Sequential(nn.Linear(D, O, bias=False))
    adapters = attach_method(name, base, config, generator=seeded_generator(1))
    base.double()
    stir(adapters, seeded_generator(2))
    return adapters


def random(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=seeded_generator(3))


def sources():
    """Return x_hat (40,D) of sources in several directions."""
    return random(8, D).repeat(5, 1) + 0.1 * random(40, D)


def normalised(Z):
    return Z.sigmoid() / Z.sigmoid().sum(-1, keepdim=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_starts_as_the_base_and_then_trains_all_its_parameters(name):
    adapters, x = small(name), random(3, 7, D)
    base = adapters.module
    for skills in adapters.skills.values():
        skills.B.data.zero_()
    with adapters.disabled():
        expected = base(x)
    with adapters.routed(x):
        assert torch.equal(base(x), expected)
    stir(adapters, seeded_generator(2))
    with adapters.routed(x):
        base(x).square().sum().backward()
    assert all(parameter.grad.any() for parameter in adapters.parameters())


# ----------------------------------------------------------------------------------- the router


def test_without_attention_x_hat_is_the_mean_of_X():
    x, mask = random(2, 6, D), torch.arange(6) < torch.tensor([[6], [3]])
    found = RouterWithoutAttention(D, K).double().summarise(x, mask)
    X = F.rms_norm(x, (D,), eps=1e-6)
    torch.testing.assert_close(found, torch.stack([X[0].mean(0), X[1, :3].mean(0)]), **EXACT)


def test_without_softmax_w_is_linear_and_starts_around_one_over_k():
    router = RouterWithoutSoftmax(D, K).double()
    x_hat = sources()
    router.fit(x_hat, seeded_generator())
    standardised = (x_hat - router.mu) / router.sd
    w = standardised @ router.W_task.T
    assert w.std().item() == pytest.approx(1 / K)
    # Each row still points to a centre of the k-means.
    as_usual = TaskRouter(D, K).double()
    as_usual.fit(x_hat, seeded_generator())
    rows, centres = F.normalize(router.W_task), F.normalize(as_usual.W_task)
    torch.testing.assert_close(rows, centres, **EXACT)

    x = random(4, 3, D)
    x_hat = (router.summarise(x) - router.mu) / router.sd
    expected = x_hat @ router.W_task.T + 1 / K
    torch.testing.assert_close(router(x), expected, rtol=0, atol=1e-7)  # the bias was in float32


def test_the_normal_start_only_standardises():
    router = RouterFromNormal(D, K, seeded_generator(1)).double()
    before = router.W_task.clone()
    router.fit(sources())
    assert torch.equal(router.W_task, before)
    torch.testing.assert_close(router.mu, sources().mean(0))


# ----------------------------------------------------------------------------- the token router


def test_each_token_has_its_own_w():
    adapters, x = small("orchmoe-token"), random(4, 9, D)
    [skills] = adapters.skills.values()
    nn.init.normal_(skills.bias, generator=seeded_generator())
    w = (x @ skills.W_task.T + skills.bias).softmax(-1)  # (B,L,K)
    c = w @ normalised(adapters.Z[0])  # (B,L,S)
    experts = torch.einsum("bld,srd,sro->blso", x, skills.A, skills.B)
    expected = x @ adapters.module[0].weight.T + 1.5 * torch.einsum("bls,blso->blo", c, experts)
    with adapters.routed(random(4, 2, D)):  # it does not read the source
        torch.testing.assert_close(adapters.module(x), expected, **EXACT)
        adapters.keep(torch.tensor([2]))  # all samples share Zhat
        torch.testing.assert_close(adapters.module(x), expected, **EXACT)


# --------------------------------------------------------------------------- noise, and factors


def test_relaxed_bernoulli_noise_enters_as_stated():
    adapters, x = small("orchmoe-gumbel").train(), random(4, 5, D)
    u = torch.rand(4, *adapters.noise_shape, dtype=torch.float64)
    u[0, 0, 0] = 0.0  # it must be clamped: a row of infinite logits would give NaN
    u[1, 0, 0, 0] = 1 - 1e-9
    clamped = u.clamp(1e-6, 1 - 1e-6)
    Zhat = normalised(adapters.Z + (clamped / (1 - clamped)).log())  # (B,N,K,S)
    routing = adapters.route(x, noise=u)
    expected = torch.einsum("bk,bnks->nbs", routing.w, Zhat)
    torch.testing.assert_close(routing.c, expected, **EXACT)


def test_noise_acts_in_training_only():
    adapters, x = small("orchmoe-gumbel").train(), random(4, 5, D)
    drawn = adapters.route(x[[0, 0]]).c
    assert not torch.equal(drawn[:, 0], drawn[:, 1])  # each sample has its own
    noise = torch.rand(4, *adapters.noise_shape)
    given = adapters.route(x, noise=noise).c
    without = adapters.eval().route(x).c
    assert torch.equal(adapters.route(x, noise=noise).c, without)
    assert not torch.allclose(given, without)


def test_factors_are_mixed_before_they_multiply():
    adapters, x = small("orchmoe-factors"), random(4, 9, D)
    [skills] = adapters.skills.values()
    with adapters.routed(x) as routing:
        [c] = routing.c
        A = torch.einsum("bs,srd->brd", c, skills.A)
        B = torch.einsum("bs,sro->bro", c, skills.B)
        expected = x @ adapters.module[0].weight.T + 1.5 * (x @ A.mT @ B)
        torch.testing.assert_close(adapters.module(x), expected, **EXACT)
