"""The equations of orchmoe.py: against themselves written out in loops, against the methods they reduce to,
and the invariances that make routing trustworthy. B and Z are random here: at their start the allocation
would hide the router."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import stir, teacher_forced
from torch import nn

import kernels
import orchmoe
from orchmoe import OrchMoEConfig, attach, target_linears

EXACT = dict(rtol=1e-10, atol=1e-12)


def attached(base, **options):
    """Adapters in `base` whose B, Z and router all matter; float64 throughout."""
    config = OrchMoEConfig(**{"tasks": 5, "skills": 3, "rank": 2, **options})
    adapters = attach(base, config, generator=torch.Generator().manual_seed(2))
    base.double()
    generator = torch.Generator().manual_seed(3)
    stir(adapters, generator)
    if adapters.router is not None:
        nn.init.normal_(adapters.router.task, generator=generator)
    return adapters


def logits(base, adapters, inputs, **options):
    """Teacher-forced logits (B,Lt,V) with the batch routed by its own embeddings."""
    decoder_ids = inputs.labels.clamp(min=0)
    with adapters.routed(base.embed(inputs.input_ids), inputs.attention_mask, **options):
        return teacher_forced(base, inputs.input_ids, inputs.attention_mask, decoder_ids)


def gradients(base, adapters, inputs, **options):
    base.zero_grad()
    with adapters.routed(base.embed(inputs.input_ids), inputs.attention_mask, **options):
        base.loss(*inputs).backward()
    return {
        f"{kind}{i}": p.grad
        for kind, group in adapters.parameter_groups().items()
        for i, p in enumerate(group)
    }


# --------------------------------------------------------------------------------------------- the equations


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def w_in_numpy(router, embeddings, mask):
    """w (B,K) in float64 as the formula has it, a sample at a time, its real tokens alone."""
    task, bias, mu, sd = (t.detach().double().numpy() for t in
                          (router.task, router.bias, router.mu, router.sd))  # fmt: skip
    rows = []
    for E, real in zip(embeddings.double().numpy(), mask.numpy(), strict=True):
        X = E[real]  # (L,D)
        X = X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-6)
        X_hat = softmax(X @ X.T / np.sqrt(X.shape[-1])) @ X + X if router.config.router_attention else X
        logits = task @ ((X_hat.mean(0) - mu) / sd) + bias
        rows.append(softmax(logits) if router.config.router_norm == "softmax" else logits)
    return np.stack(rows)


@pytest.mark.parametrize("options", [{}, {"router_attention": False}, {"router_norm": "none"}])
def test_w_is_the_formula_in_numpy(options):
    generator = torch.Generator().manual_seed(0)
    router = orchmoe.TaskRouter(24, OrchMoEConfig(tasks=5, **options))
    assert {name: tuple(p.shape) for name, p in router.named_parameters()} == {"task": (5, 24), "bias": (5,)}
    for tensor in (router.task.data, router.bias.data, router.mu):
        tensor.normal_(0, 0.5, generator=generator)
    router.sd.uniform_(0.5, 2, generator=generator)
    embeddings = 3 * torch.randn(6, 11, 24, generator=generator)
    mask = torch.rand(6, 11, generator=generator) < 0.6  # holes and both ends
    mask[:, 4] = True
    w = router(embeddings, mask).detach()
    expected = torch.from_numpy(w_in_numpy(router, embeddings, mask))
    assert w.dtype == torch.float32 and expected.std(0).min() > 0.02
    torch.testing.assert_close(w.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", [True, False])
def test_a_source_of_padding_alone_is_the_zero_feature(attention):
    router = orchmoe.TaskRouter(16, OrchMoEConfig(router_attention=attention))
    embeddings, mask = torch.randn(3, 5, 16), torch.tensor([[1], [0], [1]]).expand(3, 5)
    assert not router.features(embeddings, mask)[1].any()
    w = router(embeddings, mask)
    torch.testing.assert_close(w[[0, 2]], router(embeddings[[0, 2]], mask[[0, 2]]))
    w.log().sum().backward()
    assert router.task.grad.isfinite().all() and router.task.grad.any()


def test_linear_is_the_equation_written_out(small_t5, inputs):
    adapters = attached(small_t5, alpha=6.0)
    name, linear = next(iter(adapters.linears.items()))
    n = list(adapters.linears).index(name)
    x = torch.randn(4, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    with adapters.routed(small_t5.embed(inputs.input_ids), inputs.attention_mask) as routing:
        y = linear(x)
        small_t5.loss(*inputs)  # all Linears are called once, or a warning would say so
    assert linear.skill_A.shape == (3, 2, 32) and adapters.allocation.shape == (len(adapters.linears), 5, 3)
    for b in range(4):
        expected = x[b] @ linear.weight.T
        for i in range(5):  # sum_i sum_j w_i phi_ij: Eq. 3, as summarised
            row = adapters.allocation[n, i].sigmoid()
            for j in range(3):
                skill = x[b] @ linear.skill_A[j].T @ linear.skill_B[j]
                expected = expected + 6.0 / 2 * routing.w[b, i] * row[j] / row.sum() * skill
        torch.testing.assert_close(y[b], expected, **EXACT)


def test_relaxed_bernoulli_noise_enters_as_stated(small_t5):
    adapters = attached(small_t5, gumbel=True).train()
    u = torch.rand(4, *adapters.noise_shape, dtype=torch.float64)
    u[0, 0, 0] = 0.0  # clamped: a row of infinite logits would be NaN
    u[1, 0, 0, 0] = 1 - 1e-9
    clamped = u.clamp(1e-6, 1 - 1e-6)
    relaxed = (adapters.allocation + (clamped / (1 - clamped)).log()).sigmoid()
    torch.testing.assert_close(
        adapters.allocation_weights(u), relaxed / relaxed.sum(-1, keepdim=True), **EXACT
    )


def test_noise_acts_in_training_only(small_t5, inputs):
    adapters = attached(small_t5, gumbel=True)
    noise = torch.rand(4, *adapters.noise_shape)
    assert torch.equal(logits(small_t5, adapters, inputs, noise=noise), logits(small_t5, adapters, inputs))
    adapters.train()
    assert not torch.equal(
        logits(small_t5, adapters, inputs, noise=noise), logits(small_t5, adapters, inputs)
    )


def test_every_slice_of_A_starts_as_a_lora_of_its_rank():
    base = nn.Sequential(nn.Linear(400, 8))
    linear = attach(base, OrchMoEConfig(targets=("0",), skills=4, rank=8)).linears["0"]
    bound = math.sqrt(6 / ((1 + 5) * 400))  # kaiming_uniform, a = sqrt 5, fan_in = D
    assert bound * 0.97 < linear.skill_A.abs().amax() <= bound
    assert linear.skill_A.abs().amax((1, 2)).min() > bound * 0.95 and not linear.skill_B.any()


# ---------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("std", [0.0, 0.5, 3.0])
def test_the_allocation_starts_as_wide_as_is_asked_for(std):
    config = OrchMoEConfig(targets=("0",), tasks=64, skills=32, allocation_std=std)
    allocation = attach(nn.Sequential(nn.Linear(4, 4)), config).allocation
    assert allocation.std().item() == pytest.approx(std, rel=0.1)


def test_zero_B_is_the_base_bit_for_bit_and_only_B_gets_a_gradient(small_t5, inputs):
    with torch.no_grad():
        before = teacher_forced(small_t5, inputs.input_ids, inputs.attention_mask, inputs.labels.clamp(min=0))
        adapters = attach(small_t5, OrchMoEConfig(targets=("all",)))
        assert torch.equal(logits(small_t5, adapters, inputs), before)
    gradients(small_t5, adapters, inputs)
    moved = {name for name, p in small_t5.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {name for name, _ in small_t5.named_parameters() if name.endswith("skill_B")}
    assert all(p.requires_grad == ("skill_" in name) for name, p in small_t5.named_parameters())


def lora(x, linear, scale):
    """LoRA of rank S R with the factors of `linear` stacked."""
    return x @ linear.weight.T + scale * (x @ linear.skill_A.flatten(0, 1).T) @ linear.skill_B.flatten(0, 1)


def test_equal_weights_are_the_matched_lora(small_t5, inputs):
    adapters = attached(small_t5, alpha=5.0)
    with torch.no_grad():
        adapters.allocation.zero_()
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
        adapters.allocation.copy_(torch.eye(3).mul(200).sub(100))  # sigmoid: the identity
    x = torch.randn(4, 9, 32, dtype=torch.float64)
    with adapters.routed():
        for linear in adapters.linears.values():
            gate = (x @ linear.skill_task.T + linear.skill_bias).softmax(-1)  # (B,L,S)
            experts = torch.einsum("bld,srd,sro->blso", x, linear.skill_A, linear.skill_B)
            expected = x @ linear.weight.T + torch.einsum("bls,blso->blo", gate, experts)
            torch.testing.assert_close(linear(x), expected, rtol=1e-6, atol=1e-6)  # the gate is float32


@pytest.mark.parametrize("norm", ["softmax", "none"])
def test_w_of_a_token_has_the_norm_that_is_asked_for(norm):
    base, x = nn.Sequential(nn.Linear(16, 4)), torch.randn(3, 5, 16)
    adapters = attach(base, OrchMoEConfig(targets=("0",), router="token", router_norm=norm))
    stir(adapters, torch.Generator().manual_seed(0))
    w = F.linear(x, base[0].skill_task, base[0].skill_bias)  # (B,L,K)
    w = w.softmax(-1) if norm == "softmax" else w
    with torch.no_grad(), adapters.routed():
        torch.testing.assert_close(base[0]._skill_weights(x), w @ adapters.allocation_weights()[0, 0])


def test_one_hot_w_is_poly_that_mixes_outputs(small_t5, inputs):
    adapters = attached(small_t5)
    task = torch.tensor([4, 0, 4, 2])
    x = torch.randn(4, 9, 32, dtype=torch.float64)
    with adapters.routed(w=F.one_hot(task, 5)):
        for n, linear in enumerate(adapters.linears.values()):
            rows = adapters.allocation[n, task].sigmoid()
            c = rows / rows.sum(-1, keepdim=True)
            expected = x @ linear.weight.T + torch.einsum(
                "bs,bld,srd,sro->blo", c, x, linear.skill_A, linear.skill_B
            )
            torch.testing.assert_close(linear(x), expected, **EXACT)


def test_router_none_is_the_mean_row_for_every_sample(small_t5, inputs):
    adapters = attached(small_t5, router="none")
    with adapters.routed() as routing:
        torch.testing.assert_close(routing.c[:, 0], adapters.allocation_weights()[0].mean(1), **EXACT)
        small_t5.loss(*inputs)


@pytest.mark.parametrize("norm, start", [("softmax", 0.0), ("none", 1 / 5)])
def test_b_starts_where_a_w_of_zero_features_is_uniform(norm, start):
    router = orchmoe.TaskRouter(16, OrchMoEConfig(tasks=5, router_norm=norm))
    assert router.bias.tolist() == pytest.approx([start] * 5)
    torch.testing.assert_close(router(torch.zeros(1, 3, 16)), torch.full((1, 5), 1 / 5))


# ------------------------------------------------------------------------------------------- routing dropout


def routed_by(adapters, x, **options):
    with torch.no_grad(), adapters.routed(x, **options) as routing:
        return routing


def small(**options):
    generator = torch.Generator().manual_seed(0)
    adapters = attach(nn.Sequential(nn.Linear(16, 4)), OrchMoEConfig(targets=("0",), **options),
                      generator=generator)  # fmt: skip
    nn.init.normal_(adapters.router.task, generator=generator)
    return adapters


def test_dropped_samples_have_the_mean_routing_exactly():
    adapters, x = small(router_dropout=0.3).train(), torch.randn(3, 5, 16)
    drop = torch.tensor([False, True, False])
    quiet = routed_by(adapters, x, drop=torch.zeros(3, dtype=torch.bool))
    routing = routed_by(adapters, x, drop=drop)
    assert (routing.w[1] == 1 / 8).all() and torch.equal(routing.w[[0, 2]], quiet.w[[0, 2]])
    torch.testing.assert_close(routing.c[0, 1], adapters.allocation_weights()[0, 0].mean(0))
    assert torch.equal(quiet.w, adapters.router(x)) and not routing.shared
    fixed = torch.eye(8)[:3]  # a w that is given is not dropped
    assert torch.equal(routed_by(adapters, x, w=fixed, drop=drop).w, fixed)
    adapters.route(x, drop=drop).w[1].square().sum().backward()
    assert not adapters.router.task.grad.any()


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_share_that_is_dropped_is_the_one_asked_for(share):
    torch.manual_seed(0)
    adapters = small(router_dropout=share).train()
    w = routed_by(adapters, torch.randn(2000, 2, 16)).w
    assert (w == 1 / 8).all(1).float().mean().item() == pytest.approx(share, abs=0.03)


def test_nothing_is_dropped_in_evaluation_or_without_the_option(small_t5, inputs):
    x, drop = torch.randn(3, 5, 16), torch.ones(3, dtype=torch.bool)
    for adapters in (small(router_dropout=0.5).eval(), small().train()):
        assert torch.equal(routed_by(adapters, x, drop=drop).w, adapters.router(x))
    twin = copy.deepcopy(small_t5)  # so in evaluation every closed form holds as it does without
    found = [logits(base, attached(base, router_dropout=share), inputs)
             for base, share in ((small_t5, 0.5), (twin, 0.0))]  # fmt: skip
    assert torch.equal(*found)


# ----------------------------------------------------------------------------------------------- invariances


def test_permuting_skills_changes_nothing(small_t5, inputs):
    adapters = attached(small_t5)
    before = logits(small_t5, adapters, inputs)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        adapters.allocation.copy_(adapters.allocation[..., order])
        for linear in adapters.linears.values():
            linear.skill_A.copy_(linear.skill_A[order])
            linear.skill_B.copy_(linear.skill_B[order])
    torch.testing.assert_close(logits(small_t5, adapters, inputs), before, **EXACT)


@pytest.mark.parametrize("router", ["sample", "token"])
def test_a_sample_alone_is_as_in_a_padded_batch(small_t5, inputs, router):
    adapters = attached(small_t5, router=router)
    together = logits(small_t5, adapters, inputs)
    for row, length in enumerate(inputs.attention_mask.sum(1)):
        alone = logits(
            small_t5,
            adapters,
            type(inputs)(*[x[row : row + 1] for x in inputs])._replace(
                input_ids=inputs.input_ids[row : row + 1, :length],
                attention_mask=inputs.attention_mask[row : row + 1, :length],
            ),
        )
        torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-5)  # the router is float32


def test_junk_in_the_padding_changes_nothing(small_t5, inputs):
    adapters = attached(small_t5)
    junk = inputs.input_ids.masked_fill(~inputs.attention_mask, 37)
    before, after = (
        logits(small_t5, adapters, inputs),
        logits(small_t5, adapters, inputs._replace(input_ids=junk)),
    )
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
    embeddings = small_t5.embed(inputs.input_ids)
    infinite = embeddings.masked_fill(~inputs.attention_mask[..., None], math.inf)
    w = adapters.router(embeddings, inputs.attention_mask)
    torch.testing.assert_close(adapters.router(infinite, inputs.attention_mask), w, **EXACT)


def test_evaluation_is_deterministic(small_t5, inputs):
    adapters = attached(small_t5, gumbel=True)
    assert torch.equal(logits(small_t5, adapters, inputs), logits(small_t5, adapters, inputs))


@pytest.mark.parametrize("router", ["sample", "token"])
def test_keep_cuts_what_each_linear_has(router):
    base = nn.Sequential(nn.Linear(16, 4))
    adapters = attach(base, OrchMoEConfig(targets=("0",), router=router), kernels.mix_skills)
    stir(adapters, torch.Generator().manual_seed(0))
    x, rows = torch.randn(4, 5, 16), torch.tensor([3, 1])
    with torch.no_grad(), adapters.routed(x) as routing:
        expected = base(x)
        adapters.keep(rows)
        torch.testing.assert_close(base(x[rows]), expected[rows])
        if router == "sample":
            assert torch.equal(base[0].skill_routing, routing.c[0, rows])
            with pytest.raises(ValueError, match="4 rows in a Linear routed for 2 samples"):
                base(x)
        adapters.keep(torch.tensor([1]))  # counted among those that are left
        torch.testing.assert_close(base(x[[1]]), expected[[1]])
    with torch.no_grad(), adapters.routed(x, w=torch.full((8,), 1 / 8)):
        adapters.keep(rows)
        assert base(x).shape == (4, 5, 4)  # one w for all: any rows
    if router == "sample":
        with torch.no_grad(), adapters.routed(x, beams=2), pytest.raises(ValueError, match="beams"):
            adapters.keep(rows)
    with pytest.raises(RuntimeError, match="routed"):
        adapters.keep(rows)


@pytest.mark.parametrize("router", ["sample", "token"])
def test_cached_generation_is_teacher_forced(small_t5, inputs, router):
    adapters = attached(small_t5, router=router)
    with torch.no_grad(), adapters.routed(small_t5.embed(inputs.input_ids), inputs.attention_mask):
        tokens = small_t5.generate(
            inputs.input_ids, inputs.attention_mask, max_new_tokens=12, on_keep=adapters.keep
        )
    shifted = torch.cat([tokens.new_zeros(4, 1), tokens[:, :-1]], 1)
    with adapters.routed(small_t5.embed(inputs.input_ids), inputs.attention_mask):
        expected = teacher_forced(small_t5, inputs.input_ids, inputs.attention_mask, shifted).argmax(-1)
    alive = (tokens == 1).cumsum(1) - (tokens == 1).int() == 0  # up to and with EOS
    assert torch.equal(tokens[alive], expected[alive]) and tokens[alive].unique().numel() > 3


def test_rows_dropped_while_generating_keep_their_own_routing(small_t5, inputs):
    adapters = attached(small_t5)
    with torch.no_grad():
        small_t5.head.weight[1] *= 6  # EOS comes early, at different steps
        for linear in adapters.linears.values():
            linear.skill_B *= 5  # another sample's routing gives other tokens
    kept = []

    def on_keep(rows):
        kept.append(rows)
        adapters.keep(rows)

    def generate(batch, hook):
        with torch.no_grad(), adapters.routed(small_t5.embed(batch.input_ids), batch.attention_mask):
            return small_t5.generate(batch.input_ids, batch.attention_mask, max_new_tokens=20, on_keep=hook)

    together = generate(inputs, on_keep)
    assert kept, "no row was dropped: the test shows nothing"
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
    """T5.loss in float64, which itself takes the cross-entropy in float32."""
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
        flat, index, step, losses = group[0].data.view(-1), int(found[f"{kind}0"].abs().argmax()), 1e-5, []
        for sign in (1, -1):
            flat[index] += sign * step
            losses.append(loss64(small_t5, adapters, inputs))
            flat[index] -= sign * step
        slope = (losses[0] - losses[1]) / (2 * step)
        assert slope == pytest.approx(found[f"{kind}0"].view(-1)[index].item(), rel=1e-4), kind


# ----------------------------------------------------------------------------------------------- the one door


def test_outside_routed_a_linear_raises(small_t5, inputs):
    adapters = attached(small_t5)
    with pytest.raises(RuntimeError, match="outside"):
        small_t5.loss(*inputs)
    logits(small_t5, adapters, inputs)
    with pytest.raises(RuntimeError, match="outside"):  # leaving clears
        small_t5.loss(*inputs)
    with pytest.raises(RuntimeError, match="inside"):
        adapters.routing()


def test_nesting_raises_and_an_error_inside_clears(small_t5, inputs):
    adapters = attached(small_t5)
    embeddings = small_t5.embed(inputs.input_ids)
    with pytest.raises(RuntimeError, match="already open"), adapters.routed(embeddings):
        with adapters.routed(embeddings):
            pass
    logits(small_t5, adapters, inputs)


def test_a_routing_that_cannot_be_handed_out_clears_too(small_t5, inputs, monkeypatch):
    adapters = attached(small_t5)
    routing = adapters.route(w=torch.ones(5))
    with monkeypatch.context() as patch, pytest.raises(ValueError):
        patch.setattr(adapters, "route", lambda *_args, **_kwargs: routing._replace(c=routing.c[:2]))
        with adapters.routed():
            pass
    assert adapters.linears and all(linear.skill_routing is None for linear in adapters.linears.values())
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
                c = base[0]._skill_weights(x) if router == "token" else routing.c
        fitted = [adapters.router.mu, adapters.router.task] if router == "sample" else []
        found.append([tensor.clone() for tensor in (c, *fitted)])
    for half, exact in zip(*found, strict=True):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, exact, **EXACT)


@pytest.mark.parametrize("mix", [orchmoe.mix_skills, kernels.mix_skills])
@pytest.mark.parametrize("shape", [(0, 5, 16), (3, 0, 16), (3, 16), (3, 2, 5, 16), (16,)])
def test_all_shapes_that_a_linear_takes(shape, mix):
    base = nn.Sequential(nn.Linear(16, 4))
    adapters = attach(base, OrchMoEConfig(targets=("0",)), mix)
    stir(adapters, torch.Generator().manual_seed(0))
    x, A, B = torch.randn(shape), base[0].skill_A, base[0].skill_B
    samples = shape[0] if len(shape) > 1 else 1
    with adapters.routed(w=torch.eye(8)[torch.arange(samples) % 8]) as routing:
        y = base[0](x)
    c = routing.c[0].view(*(samples, *[1] * (len(shape) - 2)) if len(shape) > 1 else (), 4)
    expected = F.linear(x, base[0].weight, base[0].bias) + torch.einsum("...d,srd,sro,...s->...o", x, A, B, c)
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
    with (
        pytest.raises(ValueError, match="4 rows"),
        adapters.routed(small_t5.embed(inputs.input_ids[:samples])),
    ):
        small_t5.loss(*inputs)


@pytest.mark.parametrize("options, words", [
    ({"targets": ("q", "value")}, "no Linear is named value"), ({"targets": "q"}, "targets"),
    ({"targets": ("all", "lm_haed")}, "no Linear is named lm_haed"),
    ({"router": "tokens"}, "router: 'tokens'"), ({"router_norm": "sigmoid"}, "router_norm: 'sigmoid'"),
    ({"router_init": "kmean"}, "router_init: 'kmean'"),
])  # fmt: skip
def test_a_config_with_a_typing_error_is_refused(small_t5, options, words):
    with pytest.raises(ValueError, match=words):
        attach(small_t5, OrchMoEConfig(**options))


@pytest.mark.parametrize("shape", [(3,), (16,), (4, 9)])  # K = 8: 16 would pass for two samples
def test_a_w_of_another_length_is_refused(small_t5, shape):
    with pytest.raises(ValueError, match=r"w: \(K,\)"), attached(small_t5).routed(w=torch.rand(shape)):
        pass


def test_beams_share_their_sample(small_t5, inputs):
    adapters = attached(small_t5)
    expected = logits(small_t5, adapters, inputs).repeat_interleave(3, 0)
    rows = type(inputs)(*[x.repeat_interleave(3, 0) for x in inputs])
    with adapters.routed(small_t5.embed(inputs.input_ids), inputs.attention_mask, beams=3):
        found = teacher_forced(small_t5, rows.input_ids, rows.attention_mask, rows.labels.clamp(min=0))
        small_t5.encode(inputs.input_ids, inputs.attention_mask)  # the encoder runs before beams are made
    torch.testing.assert_close(found, expected, **EXACT)


def test_the_sample_router_wants_embeddings(small_t5):
    with pytest.raises(ValueError, match="embeddings"), attached(small_t5).routed():
        pass


def test_linears_that_are_never_called_are_reported_once():
    class Bypass(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.bypassed = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return F.linear(self.used(x), self.bypassed.weight)

    base = Bypass()
    adapters = attach(base, OrchMoEConfig(targets=("used", "bypassed")))
    with (
        pytest.warns(UserWarning, match="1 of 2 adapted Linears .*bypassed"),
        adapters.routed(torch.randn(2, 3, 4)),
    ):
        base(torch.randn(2, 3, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with adapters.routed(torch.randn(2, 3, 4)):
            base(torch.randn(2, 3, 4))


# ------------------------------------------------------------------------------------------- attach and state


def test_base_names_survive_and_new_ones_carry_skill(small_t5):
    before = set(small_t5.state_dict())
    weights = {name: p.data_ptr() for name, p in small_t5.named_parameters()}
    attach(small_t5, OrchMoEConfig())
    after = set(small_t5.state_dict())
    assert before < after and all("skill_" in name for name in after - before)
    assert all(p.data_ptr() == weights[name] for name, p in small_t5.named_parameters() if name in weights)


def replaced_forward(linear):  # as accelerate does where it offloads
    linear.forward = linear.forward
    return linear


def test_all_can_be_joined_by_other_names():
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
        (nn.Sequential(nn.Linear(2, 2)), ("q",), "there are 0"),
        (nn.MultiheadAttention(4, 2), ("out_proj",), "bypass"),
        (nn.TransformerEncoderLayer(4, 2), ("linear1",), "targets: linear1: .* bypass"),
        (nn.Sequential(replaced_forward(nn.Linear(2, 2))), ("0",), "0 has a forward of its instance"),
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
        ({"allocation_std": -1.0}, "allocation_std: -1.0"),
        ({"router_dropout": 1.5}, "router_dropout: 1.5"),
        ({"router_dropout": 0.5, "router": "token"}, "router_dropout: 0.5 .* of the sample router"),
        ({"targets": ()}, "targets"),
    ],
)
def test_config_refuses_nonsense(options, message):
    with pytest.raises(ValueError, match=message):
        OrchMoEConfig(**options)


def test_a_source_of_another_shape_is_refused_with_what_came(small_t5, inputs):
    adapters = attached(small_t5)
    embeddings, mask = small_t5.embed(inputs.input_ids), inputs.attention_mask
    refusals = [(inputs.input_ids, mask, r"embeddings: .* D = 32 \(token ids must be .* not \(4, 9\)"),
                (embeddings[0], mask[0], r"embeddings: .* not \(9, 32\)"),
                (embeddings[..., :31], mask, r"embeddings: .* not \(4, 9, 31\)"),
                (embeddings, mask[:, :8], r"mask: \(B,L\) = \(4, 9\), not \(4, 8\)"),
                (embeddings, mask[0], r"mask: .* not \(9,\)"),
                (embeddings, mask[..., None], r"mask: .* not \(4, 9, 1\)")]  # fmt: skip
    for source, of, message in refusals:
        with pytest.raises(ValueError, match=message), adapters.routed(source, of):
            pass
        with pytest.raises(ValueError, match=message):
            adapters.fit_router([source], [of])
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
            for p in group:
                p.normal_()
    assert not torch.allclose(logits(small_t5, adapters, inputs), expected)
    adapters.load_state_dict(state)
    assert torch.equal(logits(small_t5, adapters, inputs), expected)


def test_a_state_that_does_not_fit_changes_nothing(small_t5):
    adapters = attached(small_t5)
    state = adapters.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    odd = {name: tensor + 1 for name, tensor in state.items()}
    odd["allocation"] = torch.zeros(1, 5, 3)
    with pytest.raises(ValueError, match=r"allocation is \(1, 5, 3\)"):
        adapters.load_state_dict(odd)
    with pytest.raises(ValueError, match="router.bias is missing"):
        adapters.load_state_dict({name: tensor for name, tensor in state.items() if name != "router.bias"})
    with pytest.raises(ValueError, match="a whole model.s goes into model.load_state_dict"):
        adapters.load_state_dict(small_t5.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapters.state_dict().items())


def test_names_may_differ_where_that_is_asked_for_and_shapes_never(small_t5):
    adapters = attached(small_t5)
    part = {"router.bias": adapters.router.bias.detach() + 1, "other": torch.ones(1)}
    adapters.load_state_dict(part, strict=False)
    assert torch.equal(adapters.router.bias, part["router.bias"])
    with pytest.raises(ValueError, match=r"router.bias is \(1,\), here \(5,\)"):
        adapters.load_state_dict({"router.bias": torch.ones(1)}, strict=False)


# ---------------------------------------------------------------------------------------- the router's start


def clustered(seed=0):
    """96 features in 4 clusters of different sizes, and the cluster of each."""
    generator = torch.Generator().manual_seed(seed)
    cluster = torch.arange(4).repeat_interleave(torch.tensor([12, 24, 24, 36]))
    centres = 3 * torch.randn(4, 32, generator=generator)
    return centres[cluster] + 0.3 * torch.randn(96, 32, generator=generator), cluster


def test_kmeans_start_tells_clusters_apart_without_labels(small_t5):
    features, cluster = clustered()
    router = attach(small_t5, OrchMoEConfig(tasks=4)).router
    router.fit(features, torch.Generator().manual_seed(0))
    w = F.linear((features - router.mu) / router.sd, router.task, router.bias).softmax(-1)
    winners = {tuple(w[cluster == c].argmax(1).unique().tolist()) for c in range(4)}
    assert len(winners) == 4 and all(len(winner) == 1 for winner in winners)
    assert torch.special.entr(w).sum(-1).mean().item() == pytest.approx(math.log(4) / 3, rel=1e-3)


def test_without_softmax_w_starts_spread_by_one_over_k():
    features, router = torch.randn(96, 32), orchmoe.TaskRouter(32, OrchMoEConfig(tasks=4, router_norm="none"))
    router.fit(features, torch.Generator().manual_seed(0))
    w = F.linear((features - router.mu) / router.sd, router.task)
    assert w.std().item() == pytest.approx(1 / 4, rel=1e-3)


def test_normal_start_only_standardises(small_t5):
    features, _ = clustered()
    router = attach(small_t5, OrchMoEConfig(tasks=4, router_init="normal")).router
    before = router.task.clone()
    router.fit(features)
    assert torch.equal(router.task, before)
    torch.testing.assert_close(router.mu, features.mean(0))
    torch.testing.assert_close(router.sd, features.std(0, correction=0))


def test_sources_that_are_not_finite_start_no_router(small_t5):
    embeddings = torch.randn(9, 3, small_t5.config.d_model)
    embeddings[2, 1, 4] = torch.nan
    with pytest.raises(ValueError, match="fit_router: the embeddings of the sources are not all finite"):
        attach(small_t5, OrchMoEConfig()).fit_router([embeddings])


def test_fit_router_reads_padded_batches(small_t5, inputs):
    adapters = attached(small_t5, tasks=2)
    embeddings = small_t5.embed(inputs.input_ids)
    adapters.fit_router(
        [embeddings[:3], embeddings[3:]],
        [inputs.attention_mask[:3], inputs.attention_mask[3:]],
        generator=torch.Generator().manual_seed(0),
    )
    features = adapters.router.features(embeddings, inputs.attention_mask)
    torch.testing.assert_close(adapters.router.mu.float(), features.mean(0).float())
    one = OrchMoEConfig(tasks=1)
    orchmoe.TaskRouter(32, one).fit(features.float())  # K = 1: nothing to tell apart, and no error


def test_without_masks_there_is_no_padding(small_t5):
    adapters, x = attached(small_t5), torch.randn(6, 7, 32)
    found = []
    for masks in (None, iter([torch.ones(6, 7)])):
        adapters.fit_router(iter([x]), masks, generator=torch.Generator().manual_seed(0))
        found.append(adapters.router.task.clone())
    assert torch.equal(*found)


@pytest.mark.parametrize("options, sources, least", [
    ({}, 0, 8), ({}, 7, 8), ({"tasks": 1}, 1, 2), ({"router_init": "normal"}, 1, 2)])  # fmt: skip
def test_too_few_sources_are_refused(small_t5, options, sources, least):
    adapters = attach(small_t5.float(), OrchMoEConfig(**options))
    before = {name: tensor.clone() for name, tensor in adapters.state_dict().items()}
    K = adapters.config.tasks
    words = f"{sources} sources for K = {K} abstract tasks; give at least {least}, better hundreds"
    with pytest.raises(ValueError, match=f"fit_router: {words}"):
        adapters.fit_router(torch.randn(sources, 1, 7, 32))
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapters.state_dict().items())
    adapters.fit_router(torch.randn(least, 1, 7, 32))


def test_kmeans_centres_are_those_of_the_clusters():
    features, cluster = clustered()
    centres = orchmoe.spherical_kmeans(features, 4, torch.Generator().manual_seed(0))
    points = F.normalize(features, dim=-1)
    means = F.normalize(torch.stack([points[cluster == c].sum(0) for c in range(4)]), dim=-1)
    torch.testing.assert_close((means @ centres.T).amax(1), torch.ones(4))


def test_a_centre_without_points_stays_where_it_was():
    centres = orchmoe.spherical_kmeans(torch.eye(3), 8, torch.Generator().manual_seed(0))  # 5 have none
    torch.testing.assert_close(centres.norm(dim=-1), torch.ones(8))
    assert set(centres.argmax(-1).tolist()) == {0, 1, 2}


def test_the_start_of_kmeans_looks_for_what_is_far_off():
    crowd = torch.eye(32)[0] + 0.001 * torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
    far = torch.eye(32)[1:4]  # one point each, which a start among the crowd would miss
    for seed in range(5):
        centres = orchmoe.spherical_kmeans(torch.cat([crowd, far]), 4, torch.Generator().manual_seed(seed))
        torch.testing.assert_close((far @ centres.T).amax(1), torch.ones(3))


def test_a_feature_that_was_nearly_constant_does_not_decide():
    features, cluster = clustered()
    features[:, 5] = 1 + 1e-5 * torch.randn(96, generator=torch.Generator().manual_seed(1))
    router = orchmoe.TaskRouter(32, OrchMoEConfig(tasks=4))
    router.fit(features, torch.Generator().manual_seed(0))
    sd = features.std(0, correction=0)
    assert router.sd[5].item() == pytest.approx(0.1 * sd.median().item())
    others = torch.arange(32) != 5
    torch.testing.assert_close(router.sd[others], sd[others])

    alive = features.clone()
    alive[:, 5] += sd.median()  # alive now, as the others are
    w = [F.linear((x - router.mu) / router.sd, router.task).softmax(-1) for x in (features, alive)]
    before, after = (torch.special.entr(rows).sum(-1).mean().item() for rows in w)
    assert after == pytest.approx(before, rel=0.1) and torch.equal(*(rows.argmax(1) for rows in w))
    slope = torch.autograd.grad(w[1].log()[:, 0].sum(), router.task)[0].abs().amax(0)
    assert slope[5] < 100 * slope[others].median()  # one step at the floor of before would saturate w
    router.fit(torch.ones(4, 32), torch.Generator().manual_seed(0))  # all constant: nothing is divided by 0
    assert router.sd.min() > 0 and router.task.isfinite().all()
