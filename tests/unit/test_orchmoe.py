"""Test the equations of orchmoe.py against loops and special cases, and test its invariances.

B and Z are random here. With their initial values, the outputs would not depend on the router.
"""

import copy
import math
import re
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kernels
import orchmoe
from helpers import stir, teacher_forced
from orchmoe import OrchMoEConfig, attach, target_linears

EXACT = dict(rtol=1e-10, atol=1e-12)


def attached(base, **options):
    """Return adapters in `base`, all in float64, whose outputs depend on B, Z and the router."""
    config = OrchMoEConfig(**{"tasks": 5, "skills": 3, "rank": 2, **options})
    adapters = attach(base, config, generator=torch.Generator().manual_seed(2))
    base.double()
    generator = torch.Generator().manual_seed(3)
    stir(adapters, generator)
    if adapters.router is not None:
        nn.init.normal_(adapters.router.W_task, generator=generator)
    return adapters


def logits(base, adapters, inputs, **options):
    """Return teacher-forced logits (B,Lt,V), with the batch routed by its own embeddings."""
    decoder_ids = inputs.labels.clamp(min=0)
    with adapters.routed(base.embed(inputs.input_ids), inputs.attention_mask, **options):
        return teacher_forced(base, inputs.input_ids, inputs.attention_mask, decoder_ids)


def gradients(base, adapters, inputs, **options):
    """Return the gradients of all adapter parameters by kind and number, such as "skills0"."""
    base.zero_grad()
    with adapters.routed(base.embed(inputs.input_ids), inputs.attention_mask, **options):
        base.loss(*inputs).backward()
    found = {}
    for kind, group in adapters.parameter_groups().items():
        for i, parameter in enumerate(group):
            found[f"{kind}{i}"] = parameter.grad
    return found


def numpy64(tensor):
    return tensor.detach().double().numpy()


# ------------------------------------------------------------------------------------ the equations


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def w_in_numpy(router, embeddings, mask):
    """Return w (B,K) in float64 by the formula, one sample at a time, without its padding."""
    W_task, bias = numpy64(router.W_task), numpy64(router.bias)
    mu, sd = numpy64(router.mu), numpy64(router.sd)
    rows = []
    for E, is_real in zip(numpy64(embeddings), mask.numpy(), strict=True):
        X = E[is_real]  # (L,D)
        X = X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-6)
        X_hat = X
        if router.config.router_attention:
            X_hat = softmax(X @ X.T / np.sqrt(X.shape[-1])) @ X + X
        x_hat = (X_hat.mean(0) - mu) / sd  # (D,)
        w = W_task @ x_hat + bias  # (K,)
        if router.config.router_norm == "softmax":
            w = softmax(w)
        rows.append(w)
    return np.stack(rows)


@pytest.mark.parametrize("options", [{}, {"router_attention": False}, {"router_norm": "none"}])
def test_w_is_the_formula_in_numpy(options):
    generator = torch.Generator().manual_seed(0)
    router = orchmoe.TaskRouter(24, OrchMoEConfig(tasks=5, **options))
    shapes = {name: tuple(p.shape) for name, p in router.named_parameters()}
    assert shapes == {"W_task": (5, 24), "bias": (5,)}
    for tensor in (router.W_task.data, router.bias.data, router.mu):
        tensor.normal_(0, 0.5, generator=generator)
    router.sd.uniform_(0.5, 2, generator=generator)
    embeddings = 3 * torch.randn(6, 11, 24, generator=generator)
    mask = torch.rand(6, 11, generator=generator) < 0.6  # padding in the middle and at both ends
    mask[:, 4] = True
    w = router(embeddings, mask).detach()
    expected = torch.from_numpy(w_in_numpy(router, embeddings, mask))
    assert w.dtype == torch.float32 and expected.std(0).min() > 0.02
    torch.testing.assert_close(w.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", [True, False])
def test_a_source_of_padding_alone_has_zero_x_hat(attention):
    router = orchmoe.TaskRouter(16, OrchMoEConfig(router_attention=attention))
    embeddings = torch.randn(3, 5, 16, requires_grad=True)
    mask = torch.tensor([[1], [0], [1]]).expand(3, 5)
    assert not router.summarise(embeddings, mask)[1].any()
    w = router(embeddings, mask)
    torch.testing.assert_close(w[[0, 2]], router(embeddings[[0, 2]], mask[[0, 2]]))
    w.log().sum().backward()
    assert router.W_task.grad.isfinite().all() and router.W_task.grad.any()
    assert embeddings.grad.isfinite().all() and embeddings.grad.any()


def test_linear_is_the_equation_written_out(small_t5, inputs):
    adapters = attached(small_t5, alpha=6.0)
    name, linear = next(iter(adapters.linears.items()))
    n = list(adapters.linears).index(name)
    x = torch.randn(4, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    with adapters.routed(small_t5.embed(inputs.input_ids), inputs.attention_mask) as routing:
        y = linear(x)
        small_t5.loss(*inputs)  # calls every Linear; otherwise there would be a warning
    assert linear.skill_A.shape == (3, 2, 32) and adapters.Z.shape == (len(adapters.linears), 5, 3)
    for b in range(4):
        expected = x[b] @ linear.weight.T
        for i in range(5):  # sum_i sum_j w_i phi_ij x (Eq. 3, as summarised)
            row = adapters.Z[n, i].sigmoid()
            for j in range(3):
                skill = x[b] @ linear.skill_A[j].T @ linear.skill_B[j]
                weight = routing.w[b, i] * row[j] / row.sum()
                expected = expected + 6.0 / 2 * weight * skill
        torch.testing.assert_close(y[b], expected, **EXACT)


def test_relaxed_bernoulli_noise_enters_as_stated(small_t5):
    adapters = attached(small_t5, gumbel=True).train()
    u = torch.rand(4, *adapters.noise_shape, dtype=torch.float64)
    u[0, 0, 0] = 0.0  # it must be clamped: a row of infinite logits would give NaN
    u[1, 0, 0, 0] = 1 - 1e-9
    clamped = u.clamp(1e-6, 1 - 1e-6)
    relaxed = (adapters.Z + (clamped / (1 - clamped)).log()).sigmoid()
    expected = relaxed / relaxed.sum(-1, keepdim=True)
    torch.testing.assert_close(adapters.allocation_weights(u), expected, **EXACT)


def test_noise_acts_in_training_only(small_t5, inputs):
    adapters = attached(small_t5, gumbel=True)
    noise = torch.rand(4, *adapters.noise_shape)
    given = logits(small_t5, adapters, inputs, noise=noise)
    assert torch.equal(given, logits(small_t5, adapters, inputs))
    adapters.train()
    given = logits(small_t5, adapters, inputs, noise=noise)
    assert not torch.equal(given, logits(small_t5, adapters, inputs))


def test_every_slice_of_A_starts_as_a_lora_of_its_rank():
    base = nn.Sequential(nn.Linear(400, 8))
    linear = attach(base, OrchMoEConfig(targets=("0",), skills=4, rank=8)).linears["0"]
    bound = math.sqrt(6 / ((1 + 5) * 400))  # kaiming_uniform with a = sqrt 5 and fan_in = D
    largest = linear.skill_A.abs().amax((1, 2))  # (S,)
    assert bound * 0.97 < largest.max() <= bound and largest.min() > bound * 0.95
    assert not linear.skill_B.any()


# ------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("std", [0.0, 0.5, 3.0])
def test_Z_starts_with_the_given_standard_deviation(std):
    config = OrchMoEConfig(targets=("0",), tasks=64, skills=32, allocation_std=std)
    Z = attach(nn.Sequential(nn.Linear(4, 4)), config).Z
    assert Z.std().item() == pytest.approx(std, rel=0.1)


def test_zero_B_is_the_base_bit_for_bit_and_only_B_gets_a_gradient(small_t5, inputs):
    decoder_ids = inputs.labels.clamp(min=0)
    with torch.no_grad():
        before = teacher_forced(small_t5, inputs.input_ids, inputs.attention_mask, decoder_ids)
        adapters = attach(small_t5, OrchMoEConfig(targets=("all",)))
        assert torch.equal(logits(small_t5, adapters, inputs), before)
    gradients(small_t5, adapters, inputs)
    for name, parameter in small_t5.named_parameters():
        has_gradient = parameter.grad is not None and bool(parameter.grad.any())
        assert has_gradient == name.endswith("skill_B"), name
        assert parameter.requires_grad == ("skill_" in name), name


def lora(x, linear, scale):
    """Return the output of a LoRA of rank S R, with the factors of `linear` stacked."""
    A, B = linear.skill_A.flatten(0, 1), linear.skill_B.flatten(0, 1)  # (S R,D), (S R,O)
    return x @ linear.weight.T + scale * (x @ A.T) @ B


def test_equal_weights_are_the_matched_lora(small_t5, inputs):
    adapters = attached(small_t5, alpha=5.0)
    with torch.no_grad():
        adapters.Z.zero_()
    x = torch.randn(4, 9, 32, dtype=torch.float64)
    with adapters.routed(small_t5.embed(inputs.input_ids), inputs.attention_mask):
        for linear in adapters.linears.values():
            torch.testing.assert_close(linear(x), lora(x, linear, 5.0 / (3 * 2)), **EXACT)


def test_one_skill_is_lora(small_t5, inputs):
    adapters = attached(small_t5, skills=1, alpha=5.0)
    x = torch.randn(4, 9, 32, dtype=torch.float64)
    with adapters.routed(small_t5.embed(inputs.input_ids), inputs.attention_mask):
        for linear in adapters.linears.values():
            torch.testing.assert_close(linear(x), lora(x, linear, 5.0 / 2), **EXACT)


def test_token_router_with_identity_allocation_is_moe_lora(small_t5, inputs):
    adapters = attached(small_t5, router="token", tasks=3)
    with torch.no_grad():
        adapters.Z.copy_(torch.eye(3).mul(200).sub(100))  # so that sigmoid(Z) is the identity
    x = torch.randn(4, 9, 32, dtype=torch.float64)
    with adapters.routed():
        for linear in adapters.linears.values():
            gate = (x @ linear.skill_W_task.T + linear.skill_bias).softmax(-1)  # (B,L,S)
            experts = torch.einsum("bld,srd,sro->blso", x, linear.skill_A, linear.skill_B)
            expected = x @ linear.weight.T + torch.einsum("bls,blso->blo", gate, experts)
            # The model computes its gate in float32.
            torch.testing.assert_close(linear(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("norm", ["softmax", "none"])
def test_w_of_a_token_is_normalised_as_configured(norm):
    base = nn.Sequential(nn.Linear(16, 4))
    x = torch.randn(3, 5, 16)
    adapters = attach(base, OrchMoEConfig(targets=("0",), router="token", router_norm=norm))
    stir(adapters, torch.Generator().manual_seed(0))
    w = F.linear(x, base[0].skill_W_task, base[0].skill_bias)  # (B,L,K)
    if norm == "softmax":
        w = w.softmax(-1)
    with torch.no_grad(), adapters.routed():
        torch.testing.assert_close(base[0].skill_c(x), w @ adapters.allocation_weights()[0, 0])


def test_one_hot_w_is_poly_with_mixed_outputs(small_t5, inputs):
    adapters = attached(small_t5)
    task = torch.tensor([4, 0, 4, 2])
    x = torch.randn(4, 9, 32, dtype=torch.float64)
    with adapters.routed(w=F.one_hot(task, 5)):
        for n, linear in enumerate(adapters.linears.values()):
            rows = adapters.Z[n, task].sigmoid()
            c = rows / rows.sum(-1, keepdim=True)  # (B,S)
            A, B = linear.skill_A, linear.skill_B
            expected = x @ linear.weight.T + torch.einsum("bs,bld,srd,sro->blo", c, x, A, B)
            torch.testing.assert_close(linear(x), expected, **EXACT)


def test_router_none_is_the_mean_row_for_every_sample(small_t5, inputs):
    adapters = attached(small_t5, router="none")
    mean_row = adapters.allocation_weights()[0].mean(1)  # (N,S)
    with adapters.routed() as routing:
        torch.testing.assert_close(routing.c[:, 0], mean_row, **EXACT)
        small_t5.loss(*inputs)


@pytest.mark.parametrize("norm, start", [("softmax", 0.0), ("none", 1 / 5)])
def test_the_initial_bias_gives_uniform_w_for_zero_x_hat(norm, start):
    router = orchmoe.TaskRouter(16, OrchMoEConfig(tasks=5, router_norm=norm))
    assert router.bias.tolist() == pytest.approx([start] * 5)
    torch.testing.assert_close(router(torch.zeros(1, 3, 16)), torch.full((1, 5), 1 / 5))


# ---------------------------------------------------------------------------------- routing dropout


def routed_by(adapters, x, **options):
    with torch.no_grad(), adapters.routed(x, **options) as routing:
        return routing


def small(**options):
    """Return the adapters of a single Linear, with a router that matters."""
    generator = torch.Generator().manual_seed(0)
    config = OrchMoEConfig(targets=("0",), **options)
    adapters = attach(nn.Sequential(nn.Linear(16, 4)), config, generator=generator)
    nn.init.normal_(adapters.router.W_task, generator=generator)
    return adapters


def test_dropped_samples_have_exactly_the_mean_routing():
    adapters = small(router_dropout=0.3).train()
    x = torch.randn(3, 5, 16)
    drop = torch.tensor([False, True, False])
    undropped = routed_by(adapters, x, drop=torch.zeros(3, dtype=torch.bool))
    routing = routed_by(adapters, x, drop=drop)
    assert (routing.w[1] == 1 / 8).all()
    assert torch.equal(routing.w[[0, 2]], undropped.w[[0, 2]])
    torch.testing.assert_close(routing.c[0, 1], adapters.allocation_weights()[0, 0].mean(0))
    assert torch.equal(undropped.w, adapters.router(x)) and not routing.shared
    given = torch.eye(8)[:3]  # a given w is not dropped
    assert torch.equal(routed_by(adapters, x, w=given, drop=drop).w, given)
    adapters.route(x, drop=drop).w[1].square().sum().backward()
    assert not adapters.router.W_task.grad.any()


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_configured_share_of_samples_is_dropped(share):
    torch.manual_seed(0)
    adapters = small(router_dropout=share).train()
    w = routed_by(adapters, torch.randn(2000, 2, 16)).w
    assert (w == 1 / 8).all(1).float().mean().item() == pytest.approx(share, abs=0.03)


def test_nothing_is_dropped_in_evaluation_or_without_the_option(small_t5, inputs):
    x = torch.randn(3, 5, 16)
    drop = torch.ones(3, dtype=torch.bool)
    for adapters in (small(router_dropout=0.5).eval(), small().train()):
        assert torch.equal(routed_by(adapters, x, drop=drop).w, adapters.router(x))
    # So every closed form that holds without dropout also holds with it in evaluation.
    twin = copy.deepcopy(small_t5)
    with_dropout = logits(small_t5, attached(small_t5, router_dropout=0.5), inputs)
    without = logits(twin, attached(twin, router_dropout=0.0), inputs)
    assert torch.equal(with_dropout, without)


# -------------------------------------------------------------------------------------- invariances


def test_permuting_skills_changes_nothing(small_t5, inputs):
    adapters = attached(small_t5)
    before = logits(small_t5, adapters, inputs)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        adapters.Z.copy_(adapters.Z[..., order])
        for linear in adapters.linears.values():
            linear.skill_A.copy_(linear.skill_A[order])
            linear.skill_B.copy_(linear.skill_B[order])
    torch.testing.assert_close(logits(small_t5, adapters, inputs), before, **EXACT)


@pytest.mark.parametrize("router", ["sample", "token"])
def test_a_sample_alone_is_as_in_a_padded_batch(small_t5, inputs, router):
    adapters = attached(small_t5, router=router)
    together = logits(small_t5, adapters, inputs)
    for row, length in enumerate(inputs.attention_mask.sum(1)):
        sample = type(inputs)(
            input_ids=inputs.input_ids[row : row + 1, :length],
            attention_mask=inputs.attention_mask[row : row + 1, :length],
            labels=inputs.labels[row : row + 1],
        )
        alone = logits(small_t5, adapters, sample)
        # Not exact, because the routing is computed in float32.
        torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-5)


def test_junk_in_the_padding_changes_nothing(small_t5, inputs):
    adapters = attached(small_t5)
    junk = inputs.input_ids.masked_fill(~inputs.attention_mask, 37)
    before = logits(small_t5, adapters, inputs)
    after = logits(small_t5, adapters, inputs._replace(input_ids=junk))
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
    embeddings = small_t5.embed(inputs.input_ids)
    infinite = embeddings.masked_fill(~inputs.attention_mask[..., None], math.inf)
    w = adapters.router(embeddings, inputs.attention_mask)
    torch.testing.assert_close(adapters.router(infinite, inputs.attention_mask), w, **EXACT)


def test_evaluation_is_deterministic(small_t5, inputs):
    adapters = attached(small_t5, gumbel=True)
    assert torch.equal(logits(small_t5, adapters, inputs), logits(small_t5, adapters, inputs))


@pytest.mark.parametrize("router", ["sample", "token"])
def test_keep_drops_the_other_samples_in_each_linear(router):
    base = nn.Sequential(nn.Linear(16, 4))
    adapters = attach(base, OrchMoEConfig(targets=("0",), router=router), kernels.mix_skills)
    stir(adapters, torch.Generator().manual_seed(0))
    x = torch.randn(4, 5, 16)
    rows = torch.tensor([3, 1])
    with torch.no_grad(), adapters.routed(x) as routing:
        expected = base(x)
        adapters.keep(rows)
        torch.testing.assert_close(base(x[rows]), expected[rows])
        if router == "sample":
            assert torch.equal(base[0].skill_weights, routing.c[0, rows])
            message = "the batch has 4 rows, but 2 samples of 1 beams were routed"
            with pytest.raises(ValueError, match=message):
                base(x)
        adapters.keep(torch.tensor([1]))  # the position among the samples that are left
        torch.testing.assert_close(base(x[[1]]), expected[[1]])
    with torch.no_grad(), adapters.routed(x, w=torch.full((8,), 1 / 8)):
        adapters.keep(rows)
        assert base(x).shape == (4, 5, 4)  # all samples share w, so any number of rows is right
    if router == "sample":
        with torch.no_grad(), adapters.routed(x, beams=2), pytest.raises(ValueError, match="beams"):
            adapters.keep(rows)
    with pytest.raises(RuntimeError, match="routed"):
        adapters.keep(rows)


@pytest.mark.parametrize("router", ["sample", "token"])
def test_cached_generation_equals_teacher_forcing(small_t5, inputs, router):
    adapters = attached(small_t5, router=router)
    ids, mask = inputs.input_ids, inputs.attention_mask
    with torch.no_grad(), adapters.routed(small_t5.embed(ids), mask):
        tokens = small_t5.generate(ids, mask, max_new_tokens=12, on_keep=adapters.keep)
    shifted = torch.cat([tokens.new_zeros(4, 1), tokens[:, :-1]], 1)
    with adapters.routed(small_t5.embed(ids), mask):
        expected = teacher_forced(small_t5, ids, mask, shifted).argmax(-1)
    is_eos = tokens == 1
    alive = is_eos.cumsum(1) - is_eos.int() == 0  # the tokens up to EOS, with EOS itself
    assert torch.equal(tokens[alive], expected[alive]) and tokens[alive].unique().numel() > 3


def test_rows_keep_their_own_routing_when_others_are_dropped_while_generating(small_t5, inputs):
    adapters = attached(small_t5)
    with torch.no_grad():
        small_t5.head.weight[1] *= 6  # so that EOS comes early, at different steps
        for linear in adapters.linears.values():
            linear.skill_B *= 5  # so that the routing of another sample gives other tokens
    kept = []

    def on_keep(rows):
        kept.append(rows)
        adapters.keep(rows)

    def generate(batch, hook):
        ids, mask = batch.input_ids, batch.attention_mask
        with torch.no_grad(), adapters.routed(small_t5.embed(ids), mask):
            return small_t5.generate(ids, mask, max_new_tokens=20, on_keep=hook)

    together = generate(inputs, on_keep)
    assert kept, "no row was dropped, so the test shows nothing"
    for row in range(4):
        alone = generate(type(inputs)(*[x[row : row + 1] for x in inputs]), adapters.keep)[0]
        assert torch.equal(alone[alone != 0], together[row][together[row] != 0])


@pytest.mark.parametrize("router", ["sample", "token"])
def test_gradient_checkpointing_changes_nothing(small_t5, inputs, router):
    adapters = attached(small_t5, router=router, gumbel=True)
    small_t5.train()
    noise = torch.rand(4, *adapters.noise_shape)
    plain = gradients(small_t5, adapters, inputs, noise=noise)
    small_t5.checkpoint_blocks = True
    again = gradients(small_t5, adapters, inputs, noise=noise)
    assert plain.keys() == again.keys() and all(grad.any() for grad in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, **EXACT)


@torch.no_grad()
def loss64(base, adapters, inputs):
    """Return T5.loss, but with the cross-entropy in float64 and not in float32."""
    shifted = torch.cat([inputs.labels.new_zeros(4, 1), inputs.labels[:, :-1].clamp(min=0)], 1)
    with adapters.routed(base.embed(inputs.input_ids), inputs.attention_mask):
        found = teacher_forced(base, inputs.input_ids, inputs.attention_mask, shifted)
    return F.cross_entropy(found.transpose(1, 2), inputs.labels, reduction="sum").item()


def test_gradients_equal_finite_differences(small_t5, inputs):
    adapters = attached(small_t5)
    found = gradients(small_t5, adapters, inputs)
    groups = {kind: group for kind, group in adapters.parameter_groups().items() if group}
    assert groups.keys() == {"skills", "router", "allocation"}
    for kind, group in groups.items():
        values, gradient = group[0].data.view(-1), found[f"{kind}0"].view(-1)
        index = int(gradient.abs().argmax())
        step = 1e-5
        losses = []
        for change in (step, -step):
            values[index] += change
            losses.append(loss64(small_t5, adapters, inputs))
            values[index] -= change
        slope = (losses[0] - losses[1]) / (2 * step)
        assert slope == pytest.approx(gradient[index].item(), rel=1e-4), kind


# -------------------------------------------------------------------- routed, the only way to route


def test_outside_routed_a_linear_raises(small_t5, inputs):
    adapters = attached(small_t5)
    with pytest.raises(RuntimeError, match="outside"):
        small_t5.loss(*inputs)
    logits(small_t5, adapters, inputs)
    with pytest.raises(RuntimeError, match="outside"):  # the routing is cleared on leaving
        small_t5.loss(*inputs)
    with pytest.raises(RuntimeError, match="inside"):
        adapters.routing()


def test_nesting_raises_and_an_error_inside_clears(small_t5, inputs):
    adapters = attached(small_t5)
    embeddings = small_t5.embed(inputs.input_ids)
    with (
        pytest.raises(RuntimeError, match="is active; leave it first"),
        adapters.routed(embeddings),
    ):
        with adapters.routed(embeddings):
            pass
    logits(small_t5, adapters, inputs)


def test_a_routing_of_too_few_linears_clears_too(small_t5, inputs, monkeypatch):
    adapters = attached(small_t5)
    routing = adapters.route(w=torch.ones(5))
    too_short = routing._replace(c=routing.c[:2])
    with monkeypatch.context() as patch, pytest.raises(ValueError):
        patch.setattr(adapters, "route", lambda *_args, **_kwargs: too_short)
        with adapters.routed():
            pass
    assert adapters.linears
    assert all(linear.skill_weights is None for linear in adapters.linears.values())
    logits(small_t5, adapters, inputs)


@pytest.mark.parametrize("router", ["sample", "token"])
def test_under_autocast_routing_stays_float32(router):
    base = nn.Sequential(nn.Linear(16, 16))
    adapters = attach(base, OrchMoEConfig(targets=("0",), router=router))
    stir(adapters, torch.Generator().manual_seed(0))
    x = torch.randn(12, 5, 16, generator=torch.Generator().manual_seed(1))
    found = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            adapters.fit_router([x], generator=torch.Generator().manual_seed(2))
            with torch.no_grad(), adapters.routed(x) as routing:
                if router == "token":
                    tensors = [base[0].skill_c(x)]
                else:
                    tensors = [routing.c, adapters.router.mu, adapters.router.W_task]
        found.append([tensor.clone() for tensor in tensors])
    for half, exact in zip(*found, strict=True):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, exact, **EXACT)


@pytest.mark.parametrize("mix", [orchmoe.mix_skills, kernels.mix_skills])
@pytest.mark.parametrize(
    "shape, c_shape",
    [
        ((0, 5, 16), (0, 1, 4)),
        ((3, 0, 16), (3, 1, 4)),
        ((3, 16), (3, 4)),
        ((3, 2, 5, 16), (3, 1, 1, 4)),
        ((16,), (4,)),
    ],
)
def test_a_linear_with_skills_takes_all_shapes_of_a_linear(shape, c_shape, mix):
    base = nn.Sequential(nn.Linear(16, 4))
    adapters = attach(base, OrchMoEConfig(targets=("0",)), mix)
    stir(adapters, torch.Generator().manual_seed(0))
    linear, x = base[0], torch.randn(shape)
    samples = 1 if len(shape) == 1 else shape[0]
    with adapters.routed(w=torch.eye(8)[torch.arange(samples) % 8]) as routing:
        y = linear(x)
    c = routing.c[0].view(c_shape)
    added = torch.einsum("...d,srd,sro,...s->...o", x, linear.skill_A, linear.skill_B, c)
    expected = F.linear(x, linear.weight, linear.bias) + added
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mix", [orchmoe.mix_skills, kernels.mix_skills])
def test_c_goes_to_the_device_of_its_linear(mix):
    base = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4, device="meta"))
    adapters = attach(base, OrchMoEConfig(targets=("0", "1")), mix)
    with adapters.routed(torch.randn(3, 5, 16)):
        assert base[1](base[0](torch.randn(3, 5, 16)).to("meta")).shape == (3, 5, 4)


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_rows_of_another_batch_are_refused(small_t5, inputs, samples):
    adapters = attached(small_t5)
    embeddings = small_t5.embed(inputs.input_ids[:samples])
    message = f"the batch has 4 rows, but {samples} samples of 1 beams were routed"
    with pytest.raises(ValueError, match=message), adapters.routed(embeddings):
        small_t5.loss(*inputs)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"targets": ("q", "value")}, "no Linear has the name value; the model has .*q"),
        ({"targets": "q"}, "targets: 'q'"),
        ({"targets": ("all", "lm_haed")}, "no Linear has the name lm_haed; the model has .*q"),
        ({"router": "tokens"}, "router: 'tokens'"),
        ({"router_norm": "sigmoid"}, "router_norm: 'sigmoid'"),
        ({"router_init": "kmean"}, "router_init: 'kmean'"),
    ],
)
def test_a_config_with_a_spelling_mistake_is_refused(small_t5, options, message):
    with pytest.raises(ValueError, match=message):
        attach(small_t5, OrchMoEConfig(**options))


@pytest.mark.parametrize("shape", [(3,), (10,), (4, 9)])  # (10,) must not pass for two samples
def test_a_w_of_another_length_is_refused(small_t5, shape):
    message = re.escape(f"w: expected (K,) or (B,K) with K = 5, got {shape}")
    with pytest.raises(ValueError, match=message), attached(small_t5).routed(w=torch.rand(shape)):
        pass


def test_beams_share_their_sample(small_t5, inputs):
    adapters = attached(small_t5)
    expected = logits(small_t5, adapters, inputs).repeat_interleave(3, 0)
    rows = type(inputs)(*[x.repeat_interleave(3, 0) for x in inputs])
    with adapters.routed(small_t5.embed(inputs.input_ids), inputs.attention_mask, beams=3):
        decoder_ids = rows.labels.clamp(min=0)
        found = teacher_forced(small_t5, rows.input_ids, rows.attention_mask, decoder_ids)
        # In beam search the encoder sees each sample once, before there are beams.
        small_t5.encode(inputs.input_ids, inputs.attention_mask)
    torch.testing.assert_close(found, expected, **EXACT)


def test_the_sample_router_needs_embeddings(small_t5):
    with pytest.raises(ValueError, match="embeddings"), attached(small_t5).routed():
        pass


def test_linears_that_are_never_called_are_reported_once():
    class Bypass(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.Linear(4, 4)
            self.bypassed = nn.Linear(4, 4)

        def forward(self, x):
            return F.linear(self.used(x), self.bypassed.weight)

    base, x = Bypass(), torch.randn(2, 3, 4)
    adapters = attach(base, OrchMoEConfig(targets=("used", "bypassed")))
    message = "1 of 2 adapted Linears .*bypassed"
    with pytest.warns(UserWarning, match=message), adapters.routed(x):
        base(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with adapters.routed(x):
            base(x)


# --------------------------------------------------------------------------------- attach and state


def test_names_of_the_base_survive_and_new_ones_contain_skill(small_t5):
    before = set(small_t5.state_dict())
    weights = {name: p.data_ptr() for name, p in small_t5.named_parameters()}
    attach(small_t5, OrchMoEConfig())
    after = set(small_t5.state_dict())
    assert before < after and all("skill_" in name for name in after - before)
    parameters = dict(small_t5.named_parameters())
    assert all(parameters[name].data_ptr() == address for name, address in weights.items())


def with_own_forward(linear):
    """Set `forward` on the instance, as accelerate does to offload weights."""
    linear.forward = linear.forward
    return linear


def test_all_can_be_combined_with_other_names():
    base = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("q", "wo", "lm_head", "other")})
    config = OrchMoEConfig(targets=("all", "lm_head"))
    assert len(target_linears(base, config.targets)) == 3
    assert list(attach(base, config).linears) == ["q", "wo", "lm_head"]


def test_the_width_can_be_given():
    base = nn.Sequential(nn.Embedding(9, 3), nn.Linear(16, 4))
    with pytest.raises(ValueError, match=r"attach\(..., width=D\)"):
        attach(base, OrchMoEConfig(targets=("1",))).route(torch.randn(2, 5, 16))
    base = nn.Sequential(nn.Embedding(9, 3), nn.Linear(16, 4))
    adapters = attach(base, OrchMoEConfig(targets=("1",)), width=16)
    assert adapters.route(torch.randn(2, 5, 16)).c.shape == (1, 2, 4)


@pytest.mark.parametrize(
    "module, targets, message",
    [
        (nn.Sequential(nn.Linear(2, 2)), ("q",), "no Linear has the name q; the model has 0$"),
        (nn.MultiheadAttention(4, 2), ("out_proj",), "bypass"),
        (nn.TransformerEncoderLayer(4, 2), ("linear1",), "targets: linear1: .* bypass"),
        (
            nn.Sequential(with_own_forward(nn.Linear(2, 2))),
            ("0",),
            "0 has a forward set on the instance, which bypasses skills; delete it",
        ),
    ],
)
def test_attach_refuses_what_it_cannot_adapt(module, targets, message):
    with pytest.raises(ValueError, match=message):
        attach(module, OrchMoEConfig(targets=targets))
    assert all(p.requires_grad for p in module.parameters())  # refused before anything was changed


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tasks": 0}, "tasks"),
        ({"rank": -1}, "rank: -1"),
        ({"alpha": 0.0}, "alpha: 0.0"),
        ({"alpha": math.nan}, "alpha: nan"),
        ({"allocation_std": -1.0}, "allocation_std: -1.0 must be at least 0"),
        ({"router_dropout": 1.5}, "router_dropout: 1.5"),
        ({"router_dropout": 0.5, "router": "token"}, "router_dropout: 0.5 needs the sample router"),
        ({"targets": ()}, "targets"),
    ],
)
def test_a_config_with_an_impossible_value_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        OrchMoEConfig(**options)


def test_a_source_of_another_shape_is_refused_with_the_given_shape(small_t5, inputs):
    adapters = attached(small_t5)
    ids, mask = inputs.input_ids, inputs.attention_mask
    embeddings = small_t5.embed(ids)
    refused = [
        (ids, mask, "embeddings: expected (B,L,D) with D = 32, got (4, 9); embed the token ids"),
        (embeddings[0], mask[0], "embeddings: expected (B,L,D) with D = 32, got (9, 32)"),
        (embeddings[..., :31], mask, "embeddings: expected (B,L,D) with D = 32, got (4, 9, 31)"),
        (embeddings, mask[:, :8], "mask: expected (B,L) = (4, 9), got (4, 8)"),
        (embeddings, mask[0], "mask: expected (B,L) = (4, 9), got (9,)"),
        (embeddings, mask[..., None], "mask: expected (B,L) = (4, 9), got (4, 9, 1)"),
    ]
    for source, its_mask, message in refused:
        with pytest.raises(ValueError, match=re.escape(message)):
            with adapters.routed(source, its_mask):
                pass
        with pytest.raises(ValueError, match=re.escape(message)):
            adapters.fit_router([source], [its_mask])
    router = torch.compile(adapters.router, backend="eager", fullgraph=True)
    torch.testing.assert_close(router(embeddings, mask), adapters.router(embeddings, mask), **EXACT)


@pytest.mark.parametrize("router", ["sample", "token"])
def test_adapter_state_alone_restores_the_function(small_t5, inputs, router):
    adapters = attached(small_t5, router=router)
    expected = logits(small_t5, adapters, inputs)
    state = {name: tensor.clone() for name, tensor in adapters.state_dict().items()}
    assert not any(name.endswith((".weight", "q.bias")) for name in state)
    with torch.no_grad():
        for group in adapters.parameter_groups().values():
            for parameter in group:
                parameter.normal_()
    assert not torch.allclose(logits(small_t5, adapters, inputs), expected)
    adapters.load_state_dict(state)
    assert torch.equal(logits(small_t5, adapters, inputs), expected)


def test_a_state_that_does_not_fit_changes_nothing(small_t5):
    adapters = attached(small_t5)
    state = adapters.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}

    changed = {name: tensor + 1 for name, tensor in state.items()}
    changed["Z"] = torch.zeros(1, 5, 3)
    shape = (len(adapters.linears), 5, 3)
    message = re.escape(f"Z has shape (1, 5, 3), expected {shape}")
    with pytest.raises(ValueError, match=message):
        adapters.load_state_dict(changed)

    changed = {name: tensor + 1 for name, tensor in state.items()}
    del changed["router.bias"]
    with pytest.raises(ValueError, match="router.bias is missing in the given state"):
        adapters.load_state_dict(changed)

    whole = {name: tensor + 1 for name, tensor in small_t5.state_dict().items()}
    message = "missing in .*; load the state of a whole model with model.load_state_dict"
    with pytest.raises(ValueError, match=message):
        adapters.load_state_dict(whole)

    other = {name: tensor + 1 for name, tensor in state.items()}
    other["router.other"] = torch.zeros(1)
    with pytest.raises(ValueError, match="router.other is missing in these adapters"):
        adapters.load_state_dict(other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapters.state_dict().items())


def test_with_strict_false_names_may_differ_but_shapes_may_not(small_t5):
    adapters = attached(small_t5)
    part = {"router.bias": adapters.router.bias.detach() + 1, "other": torch.ones(1)}
    adapters.load_state_dict(part, strict=False)
    assert torch.equal(adapters.router.bias, part["router.bias"])
    with pytest.raises(ValueError, match=r"router.bias has shape \(1,\), expected \(5,\)"):
        adapters.load_state_dict({"router.bias": torch.ones(1)}, strict=False)


# ------------------------------------------------------------------------------- the router's start


def clustered(seed=0):
    """Return x_hat (96,32) in 4 clusters of different sizes, and the cluster (96,) of each row."""
    generator = torch.Generator().manual_seed(seed)
    cluster = torch.arange(4).repeat_interleave(torch.tensor([12, 24, 24, 36]))
    centres = 3 * torch.randn(4, 32, generator=generator)
    return centres[cluster] + 0.3 * torch.randn(96, 32, generator=generator), cluster


def test_the_kmeans_start_tells_clusters_apart_without_labels(small_t5):
    x_hat, cluster = clustered()
    router = attach(small_t5, OrchMoEConfig(tasks=4)).router
    router.fit(x_hat, torch.Generator().manual_seed(0))
    w = F.linear((x_hat - router.mu) / router.sd, router.W_task, router.bias).softmax(-1)
    winners = {tuple(w[cluster == c].argmax(1).unique().tolist()) for c in range(4)}
    assert len(winners) == 4 and all(len(winner) == 1 for winner in winners)
    assert torch.special.entr(w).sum(-1).mean().item() == pytest.approx(math.log(4) / 3, rel=1e-3)


def test_without_softmax_w_starts_with_standard_deviation_one_over_k():
    x_hat = torch.randn(96, 32)
    router = orchmoe.TaskRouter(32, OrchMoEConfig(tasks=4, router_norm="none"))
    router.fit(x_hat, torch.Generator().manual_seed(0))
    w = F.linear((x_hat - router.mu) / router.sd, router.W_task)
    assert w.std().item() == pytest.approx(1 / 4, rel=1e-3)


def test_the_normal_start_only_standardises(small_t5):
    x_hat, _ = clustered()
    router = attach(small_t5, OrchMoEConfig(tasks=4, router_init="normal")).router
    before = router.W_task.clone()
    router.fit(x_hat)
    assert torch.equal(router.W_task, before)
    torch.testing.assert_close(router.mu, x_hat.mean(0))
    torch.testing.assert_close(router.sd, x_hat.std(0, correction=0))


def test_fit_router_refuses_sources_that_are_not_finite(small_t5):
    embeddings = torch.randn(9, 3, small_t5.config.d_model)
    embeddings[2, 1, 4] = torch.nan
    message = "fit_router: the embeddings of the sources are not all finite"
    with pytest.raises(ValueError, match=message):
        attach(small_t5, OrchMoEConfig()).fit_router([embeddings])


def test_fit_router_reads_padded_batches(small_t5, inputs):
    adapters = attached(small_t5, tasks=2)
    embeddings = small_t5.embed(inputs.input_ids)
    adapters.fit_router(
        [embeddings[:3], embeddings[3:]],
        [inputs.attention_mask[:3], inputs.attention_mask[3:]],
        generator=torch.Generator().manual_seed(0),
    )
    x_hat = adapters.router.summarise(embeddings, inputs.attention_mask)
    torch.testing.assert_close(adapters.router.mu.float(), x_hat.mean(0).float())
    one_task = OrchMoEConfig(tasks=1)
    orchmoe.TaskRouter(32, one_task).fit(x_hat.float())  # with K = 1 there is no error


def test_without_masks_there_is_no_padding(small_t5):
    adapters, x = attached(small_t5), torch.randn(6, 7, 32)
    found = []
    for masks in (None, iter([torch.ones(6, 7)])):
        adapters.fit_router(iter([x]), masks, generator=torch.Generator().manual_seed(0))
        found.append(adapters.router.W_task.clone())
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "options, sources, least",
    [({}, 0, 8), ({}, 7, 8), ({"tasks": 1}, 1, 2), ({"router_init": "normal"}, 1, 2)],
)
def test_too_few_sources_are_refused(small_t5, options, sources, least):
    adapters = attach(small_t5.float(), OrchMoEConfig(**options))
    before = {name: tensor.clone() for name, tensor in adapters.state_dict().items()}
    K = adapters.config.tasks
    message = (
        f"fit_router: {sources} sources are too few for K = {K} abstract tasks; "
        f"give at least {least}, better hundreds"
    )
    with pytest.raises(ValueError, match=message):
        adapters.fit_router(torch.randn(sources, 1, 7, 32))
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapters.state_dict().items())
    adapters.fit_router(torch.randn(least, 1, 7, 32))


def test_kmeans_centres_are_those_of_the_clusters():
    x_hat, cluster = clustered()
    centres = orchmoe.spherical_kmeans(x_hat, 4, torch.Generator().manual_seed(0))
    points = F.normalize(x_hat, dim=-1)
    means = F.normalize(torch.stack([points[cluster == c].sum(0) for c in range(4)]), dim=-1)
    torch.testing.assert_close((means @ centres.T).amax(1), torch.ones(4))


def test_a_centre_without_points_stays_where_it_was():
    # At least 5 of the 8 centres have no point.
    centres = orchmoe.spherical_kmeans(torch.eye(3), 8, torch.Generator().manual_seed(0))
    torch.testing.assert_close(centres.norm(dim=-1), torch.ones(8))
    assert set(centres.argmax(-1).tolist()) == {0, 1, 2}


def test_the_start_of_kmeans_prefers_points_that_are_far_away():
    noise = torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
    crowd = torch.eye(32)[0] + 0.001 * noise
    far = torch.eye(32)[1:4]  # single points, which a start from random points would miss
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        centres = orchmoe.spherical_kmeans(torch.cat([crowd, far]), 4, generator)
        torch.testing.assert_close((far @ centres.T).amax(1), torch.ones(3))


def test_a_feature_that_was_nearly_constant_does_not_decide():
    x_hat, _ = clustered()
    x_hat[:, 5] = 1 + 1e-5 * torch.randn(96, generator=torch.Generator().manual_seed(1))
    router = orchmoe.TaskRouter(32, OrchMoEConfig(tasks=4))
    router.fit(x_hat, torch.Generator().manual_seed(0))
    sd = x_hat.std(0, correction=0)
    assert router.sd[5].item() == pytest.approx(0.1 * sd.median().item())
    others = torch.arange(32) != 5
    torch.testing.assert_close(router.sd[others], sd[others])

    # Feature 5 varies now as much as the others do.
    varied = x_hat.clone()
    varied[:, 5] += sd.median()
    w_before = F.linear((x_hat - router.mu) / router.sd, router.W_task).softmax(-1)
    w_after = F.linear((varied - router.mu) / router.sd, router.W_task).softmax(-1)
    entropy_before = torch.special.entr(w_before).sum(-1).mean().item()
    entropy_after = torch.special.entr(w_after).sum(-1).mean().item()
    assert entropy_after == pytest.approx(entropy_before, rel=0.1)
    assert torch.equal(w_before.argmax(1), w_after.argmax(1))

    # With a much smaller floor of sd, one optimiser step would saturate w.
    slope = torch.autograd.grad(w_after.log()[:, 0].sum(), router.W_task)[0].abs().amax(0)
    assert slope[5] < 100 * slope[others].median()

    # If all features are constant, nothing is divided by 0.
    router.fit(torch.ones(4, 32), torch.Generator().manual_seed(0))
    assert router.sd.min() > 0 and router.W_task.isfinite().all()
