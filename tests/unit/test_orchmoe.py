"""Test the equations of orchmoe.py against loops and special cases, and test its invariances.

B and Z are random here. With their initial values, the outputs would not depend on the router.
"""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kernels
import orchmoe
from helpers import refusal, seeded_generator, stir, teacher_forced
from orchmoe import Adapters, OrchMoE, OrchMoEConfig, Routing, TaskRouter, attach
from variants import RouterWithoutAttention, TokenRouted

EXACT = dict(rtol=1e-10, atol=1e-12)
sample_and_token = pytest.mark.parametrize("method", [OrchMoE, TokenRouted])


def attached(base, method=OrchMoE, **options):
    """Return adapters in `base`, all in float64, whose outputs depend on B, Z and the router."""
    config = OrchMoEConfig(**{"abstract_tasks": 5, "skills": 3, "rank": 2, **options})
    adapters = attach(base, config, method, generator=seeded_generator(2))
    base.double()
    generator = seeded_generator(3)
    stir(adapters, generator)
    if adapters.router is not None:
        nn.init.normal_(adapters.router.W_task, generator=generator)
    return adapters


def small(method=OrchMoE, **options):
    """Return such adapters of a model that is a single Linear."""
    return attached(nn.Sequential(nn.Linear(16, 4)), method, targets=("0",), **options)


def random(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=seeded_generator(4))


def routed(base, inputs):
    """Return the context in which the batch is routed by its own embeddings."""
    embeddings = base.embed(inputs.input_ids)
    return base.skill_adapters.routed(embeddings, inputs.attention_mask)


def logits(base, inputs):
    """Return teacher-forced logits (B,Lt,V) of the routed batch."""
    decoder_ids = inputs.labels.clamp(min=0)
    with routed(base, inputs):
        return teacher_forced(base, inputs.input_ids, inputs.attention_mask, decoder_ids)


def assert_linears(adapters, expected, **options):
    """Compare what skills add with expected(skills, x, their Z (K,S), the routing)."""
    x = random(4, 9, 32)
    parts = zip(adapters.linears.values(), adapters.skills.values(), adapters.Z, strict=True)
    with adapters.routed(**options) as routing:
        for linear, skills, Z in parts:
            added = linear(x) - x @ linear.weight.T
            torch.testing.assert_close(added, expected(skills, x, Z, routing), **EXACT)


# ------------------------------------------------------------------------------------ the equations


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def w_in_numpy(router, embeddings, mask):
    """Return w (B,K) by the formula, one sample at a time, without its padding."""
    state = {name: tensor.numpy() for name, tensor in router.state_dict().items()}
    rows = []
    for E, is_real in zip(embeddings.numpy(), mask.numpy(), strict=True):
        X = E[is_real]  # (L,D)
        X = X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-6)
        X_hat = softmax(X @ X.T / np.sqrt(X.shape[-1])) @ X + X
        x_hat = (X_hat.mean(0) - state["mu"]) / state["sd"]  # (D,)
        rows.append(softmax(state["W_task"] @ x_hat + state["bias"]))  # (K,)
    return torch.from_numpy(np.stack(rows))


def test_w_is_the_formula_in_numpy():
    router = TaskRouter(24, 5).double()
    generator = seeded_generator()
    for tensor in router.state_dict().values():
        tensor.uniform_(0.5, 1, generator=generator)
    embeddings = random(6, 11, 24)
    mask = torch.rand(6, 11, generator=generator) < 0.6  # padding in the middle and at both ends
    mask[:, 4] = True
    expected = w_in_numpy(router, embeddings, mask)
    assert expected.std(0).min() > 0.02
    torch.testing.assert_close(router(embeddings, mask).detach(), expected, **EXACT)
    # Without a mask there is no padding.
    assert torch.equal(router(embeddings), router(embeddings, torch.ones(6, 11).bool()))


def test_a_source_of_only_padding_has_zero_x_hat():
    router = TaskRouter(16, 8)
    embeddings = torch.randn(3, 5, 16, requires_grad=True)
    mask = torch.tensor([[1], [0], [1]]).expand(3, 5)
    assert not router.summarise(embeddings, mask)[1].any()
    with torch.autograd.set_detect_anomaly(True):  # no gradient on the way is NaN either
        router(embeddings, mask).log().sum().backward()
    assert router.W_task.grad.isfinite().all()
    assert embeddings.grad.isfinite().all()


@pytest.mark.parametrize("router_class", [TaskRouter, RouterWithoutAttention])
def test_a_float_mask_is_refused(router_class):
    """Some models add a mask of 0 (real) and -inf (padding) to their attention scores.

    Read as booleans, it would say the opposite.
    """
    router, x = router_class(16, 8), torch.randn(2, 3, 16)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert torch.equal(router(x, mask), router(x, mask.bool()))
    with refusal("mask: give booleans or integers, true at real tokens"):
        router(x, mask.log())


def test_a_wrong_name_of_an_argument_is_an_error():
    """It would route without the mask, or without the given w."""
    adapters = small()
    with pytest.raises(TypeError, match="attention_mask"):
        with adapters.routed(torch.randn(2, 3, 16), attention_mask=torch.ones(2, 3)):
            pass


def test_each_batch_of_sources_needs_its_mask():
    adapters = small()
    sources = [torch.randn(8, 3, 16), torch.randn(8, 3, 16)]
    with pytest.raises(ValueError, match="zip"):
        adapters.fit_router(sources, [torch.ones(8, 3, dtype=torch.bool)])


def test_junk_in_the_padding_changes_nothing():
    router = small().router
    embeddings, mask = random(2, 5, 16), torch.arange(5) < torch.tensor([[5], [2]])
    junk = embeddings.masked_fill(~mask[..., None], math.inf)
    torch.testing.assert_close(router(junk, mask), router(embeddings, mask), **EXACT)


def test_skills_are_the_equation_written_out(small_t5, inputs):
    adapters = attached(small_t5, alpha=6.0)

    def expected(skills, x, Z, routing):
        added = 0
        for k in range(5):  # sum_i sum_j w_i phi_ij x (Eq. 3, as summarised)
            row = Z[k].sigmoid()
            for s in range(3):
                skill = x @ skills.A[s].T @ skills.B[s]
                weight = routing.w[:, k] * row[s] / row.sum()
                added = added + 6.0 / 2 * weight[:, None, None] * skill
        return added

    embeddings = small_t5.embed(inputs.input_ids)
    assert_linears(adapters, expected, embeddings=embeddings, mask=inputs.attention_mask)


# ----------------------------------------------------------------------------------- initial values


def test_every_slice_of_A_starts_as_a_lora_of_its_rank():
    base = nn.Sequential(nn.Linear(400, 8))
    [skills] = attach(base, OrchMoEConfig(targets=("0",), rank=8)).skills.values()
    bound = 1 / math.sqrt(400)  # kaiming_uniform with a = sqrt 5
    largest = skills.A.abs().amax((1, 2))  # (S,)
    assert 0.95 * bound < largest.min() and largest.max() <= bound


def test_Z_starts_with_the_given_standard_deviation():
    config = OrchMoEConfig(targets=("0",), abstract_tasks=64, skills=32, allocation_std=1.5)
    Z = attach(nn.Sequential(nn.Linear(4, 4)), config).Z
    assert Z.std().item() == pytest.approx(1.5, rel=0.1)


def test_zero_B_is_the_base_bit_for_bit_and_only_B_gets_a_gradient(small_t5, inputs):
    decoder_ids = inputs.labels.clamp(min=0)
    with torch.no_grad():
        before = teacher_forced(small_t5, inputs.input_ids, inputs.attention_mask, decoder_ids)
        attach(small_t5, OrchMoEConfig(targets=("all",)))
        assert torch.equal(logits(small_t5, inputs), before)
    with routed(small_t5, inputs):
        small_t5.loss(*inputs).backward()
    for name, parameter in small_t5.named_parameters():
        has_gradient = parameter.grad is not None and bool(parameter.grad.any())
        assert has_gradient == name.endswith(".B"), name
        assert parameter.requires_grad == name.startswith("skill_adapters."), name


# ------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("skills", [1, 3])
def test_equal_weights_are_the_matched_lora(small_t5, skills):
    """A single skill always has the weight 1."""
    adapters = attached(small_t5, skills=skills, alpha=5.0)
    with torch.no_grad():
        adapters.Z.fill_(-1000)  # so small that sigmoid(Z) is 0 in floating point

    def lora(part, x, _Z, _routing):
        A, B = part.A.flatten(0, 1), part.B.flatten(0, 1)  # (S R,D), (S R,O)
        return 5.0 / (skills * 2) * (x @ A.T) @ B

    assert_linears(adapters, lora, w=random(4, 5).softmax(-1))


def test_one_hot_w_is_poly_with_mixed_outputs(small_t5):
    task = torch.tensor([4, 0, 4, 2])

    def poly(skills, x, Z, _routing):
        rows = Z[task].sigmoid()
        c = rows / rows.sum(-1, keepdim=True)  # (B,S)
        return torch.einsum("bs,bld,srd,sro->blo", c, x, skills.A, skills.B)

    assert_linears(attached(small_t5), poly, w=F.one_hot(task, 5))


# -------------------------------------------------------------------------------------- invariances


@sample_and_token
def test_a_sample_alone_is_as_in_a_padded_batch(small_t5, inputs, method):
    attached(small_t5, method)
    together = logits(small_t5, inputs)
    for row, length in enumerate(inputs.attention_mask.sum(1)):
        one = slice(row, row + 1)
        sample = type(inputs)(
            inputs.input_ids[one, :length],
            inputs.attention_mask[one, :length],
            inputs.labels[one],
        )
        torch.testing.assert_close(logits(small_t5, sample), together[one], **EXACT)


def test_a_batch_is_generated_as_each_sample_by_the_model_folded_for_it(small_t5, inputs):
    adapters = attached(small_t5)
    with torch.no_grad():
        small_t5.head.weight[1] *= 4  # so that rows 2 and 1 end early, in this order
        for skills in adapters.skills.values():
            skills.B *= 5  # so that the routing of another sample gives other tokens
    kept = []

    def on_keep(rows):
        kept.append(rows.tolist())
        adapters.keep(rows)

    ids, mask, _ = inputs
    with routed(small_t5, inputs):
        together = small_t5.generate(ids, mask, max_new_tokens=20, on_keep=on_keep)
    assert kept == [[0, 1, 3], [0, 2]]
    for row in range(4):
        one = slice(row, row + 1)
        with adapters.folded(embeddings=small_t5.embed(ids[one]), mask=mask[one]):
            alone = small_t5.generate(ids[one], mask[one], max_new_tokens=20)
        assert torch.equal(alone, together[one, : alone.shape[1]])


# -------------------------------------------------------------------- routed, the only way to route


@sample_and_token
def test_under_autocast_routing_stays_float32(method):
    adapters, x = small(method), random(12, 5, 16).float()
    adapters.module.float()
    [skills] = adapters.skills.values()
    found = []
    for enabled in (True, False):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            adapters.fit_router([x], generator=seeded_generator())
            with adapters.routed(x):
                state = [tensor.clone() for tensor in adapters.state_dict().values()]
                found.append([skills.weights(x), *state])
    torch.testing.assert_close(*found, **EXACT)


@pytest.mark.parametrize(
    "shape, rows",
    [
        ((0, 5, 16), (0, 5, 16)),
        ((3, 0, 16), (3, 0, 16)),
        ((3, 16), (3, 1, 16)),
        ((3, 2, 5, 16), (3, 10, 16)),
        ((16,), (1, 1, 16)),
    ],
)
def test_a_linear_with_skills_takes_all_shapes_of_a_linear(shape, rows):
    adapters, x = small(), random(*shape)
    linear = adapters.module[0]
    with adapters.routed(w=torch.eye(5)[: rows[0]]):
        expected = linear(x.view(rows)).view(*shape[:-1], 4)
        torch.testing.assert_close(linear(x), expected, **EXACT)


@pytest.mark.parametrize("mix", [orchmoe.mix_skills, kernels.mix_skills])
def test_c_goes_to_the_device_of_its_linear(mix):
    base = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4, device="meta"))
    adapters = attach(base, OrchMoEConfig(targets=("0", "1")), mix=mix)
    x = torch.randn(3, 5, 16)
    with adapters.routed(x):
        assert base[1](base[0](x).to("meta")).shape == (3, 5, 4)


@pytest.mark.parametrize("routing", [{"embeddings": random(1, 5, 16)}, {"w": torch.ones(1, 5)}])
def test_a_routed_batch_of_one_sample_does_not_serve_other_rows(routing):
    adapters, x = small(), random(4, 5, 16)
    message = "the batch has 4 rows, but 1 samples of 1 beams were routed"
    with refusal(message), adapters.routed(**routing):
        adapters.module(x)


def test_one_w_serves_a_batch_of_any_size_and_generation_keeps_it():
    adapters, w = small(), torch.ones(5)
    x = random(4, 5, 16)
    with adapters.routed(w=w.expand(4, 5)):
        expected = adapters.module(x)
    with adapters.routed(w=w):
        torch.testing.assert_close(adapters.module(x), expected, **EXACT)
        adapters.keep(torch.tensor([2]))
        torch.testing.assert_close(adapters.module(x[:3]), expected[:3], **EXACT)


class Bad(Adapters):
    """A method whose routing the test chooses."""

    def route(self, *_inputs, **_options):
        return self.answer


BAD_ROUTINGS = [
    (torch.ones(2, 4, 3), "Bad.route: return a Routing, not a Tensor"),
    (Routing(torch.ones(1, 4, 3)), r"the shape \(1, 4, 3\), expected \(2, 4, 3\)"),
    (Routing(torch.ones(2, 4, 1)), r"the shape \(2, 4, 1\), expected \(2, 4, 3\)"),
    (Routing(torch.ones(2, 1, 3)), r"expected \(2, 4, 3\).* share have B = 1 and need shared=True"),
    (Routing(torch.ones(2, 4, 3), shared=True), r"expected \(2, 1, 3\)"),
]


@pytest.mark.parametrize("answer, message", BAD_ROUTINGS)
def test_a_route_that_returns_something_else_is_refused_in_a_sentence(answer, message):
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    adapters = attach(base, OrchMoEConfig(skills=3, targets=("0", "1")), Bad)
    adapters.answer = answer
    with refusal(message), adapters.routed(torch.ones(4, 5, 4)):
        pass


@pytest.mark.parametrize("shape", [(10,), (), (1, 2, 5)])
def test_a_w_of_another_shape_is_refused(shape):
    """(10,) could be taken for two samples, and (1,2,5) too."""
    message = re.escape(f"w: expected (K,) or (B,K) with K = 5, got {shape}")
    with refusal(message):
        small().route(w=torch.rand(shape))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("called, trains, message", [(0, True, "2 of 2"), (1, False, "1 of 2")])
def test_linears_that_are_never_called_are_reported_once(called, trains, message):
    base, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 3, 4)
    adapters = attach(base, OrchMoEConfig(targets=("0", "1")))
    with torch.no_grad(), adapters.routed(x):  # no forward, for example to look at w
        pass
    with pytest.raises(KeyError), adapters.routed(x):  # after an error there is no warning
        raise KeyError
    with torch.set_grad_enabled(trains):
        with pytest.warns(UserWarning, match=f"{message} adapted Linears .*1$") as caught:
            with adapters.routed(x):
                base[:called](x)
        assert caught[0].filename == __file__
        with adapters.routed(x):
            base[:called](x)


# ----------------------------------------------------------------------------- settings and shapes


def test_the_width_can_be_given():
    base = nn.Sequential(nn.Embedding(9, 3), nn.Linear(16, 4))
    adapters = attach(base, OrchMoEConfig(targets=("1",)), width=16)
    assert adapters.router.W_task.shape[1] == 16


@pytest.mark.parametrize(
    "options",
    [
        {"abstract_tasks": 0},
        {"abstract_tasks": 8.0},
        {"alpha": 0.0},
        {"alpha": math.nan},
        {"alpha": math.inf},
        {"allocation_std": -1.0},
        {"allocation_std": math.inf},
        {"targets": ()},
        {"targets": "q"},
    ],
)
def test_a_config_with_an_impossible_value_is_refused(options):
    name, value = next(iter(options.items()))
    with refusal(re.escape(f"{name}: {value!r}")):
        OrchMoEConfig(**options)


# ------------------------------------------------------------------------------- the router's start


def clustered():
    """Return x_hat (96,32) in 4 clusters of different sizes, and the cluster (96,) of each row."""
    generator = seeded_generator()
    cluster = torch.arange(4).repeat_interleave(torch.tensor([12, 24, 24, 36]))
    centres = 3 * torch.randn(4, 32, generator=generator)
    return centres[cluster] + 0.3 * torch.randn(96, 32, generator=generator), cluster


def fitted(x_hat):
    """Return a router that was fitted to x_hat (M,32), and the logits (M,4) without their bias."""
    router = TaskRouter(32, 4, seeded_generator(1))
    router.fit(x_hat, seeded_generator())
    return router, F.linear((x_hat - router.mu) / router.sd, router.W_task.detach())


def test_the_kmeans_start_tells_clusters_apart_without_labels():
    x_hat, cluster = clustered()
    router, logits = fitted(x_hat)
    torch.testing.assert_close(router.mu, x_hat.mean(0))
    torch.testing.assert_close(router.sd, x_hat.std(0, correction=0))
    w = logits.softmax(-1)
    winner = w.argmax(1)
    assert len(winner.unique()) == 4
    assert len(set(zip(cluster.tolist(), winner.tolist(), strict=True))) == 4
    assert torch.special.entr(w).sum(-1).mean().item() == pytest.approx(math.log(4) / 3, rel=1e-3)


def test_a_feature_that_was_nearly_constant_does_not_decide():
    x_hat, _ = clustered()
    x_hat[:, 5] = 1 + 1e-5 * x_hat[:, 5]
    sd = x_hat.std(0, correction=0)
    assert fitted(x_hat)[0].sd[5].item() == pytest.approx(0.1 * sd.median().item())
    # If all features are constant, nothing is divided by 0.
    assert fitted(torch.ones(4, 32))[0].W_task.isfinite().all()


@pytest.mark.parametrize("options, least", [({}, 5), ({"abstract_tasks": 1}, 2)])
def test_too_few_sources_are_refused(options, least):
    adapters, x = small(**options), random(least, 7, 16)
    message = f"^{least - 1} different training sources .* at least {least}"
    with refusal(message):
        adapters.fit_router([x[1:]] * 9)
    assert not adapters.router.mu.any()  # as before
    adapters.fit_router([x])
    assert adapters.router.mu.any()


def test_kmeans_centres_are_those_of_the_clusters():
    x_hat, cluster = clustered()
    lengths = torch.arange(1, 97)[:, None]  # they do not matter to cosine similarity
    centres = orchmoe.spherical_kmeans(lengths * x_hat, 4, seeded_generator())
    sums = F.one_hot(cluster).float().T @ F.normalize(x_hat, dim=-1)  # (4,32)
    means = F.normalize(sums, dim=-1)
    torch.testing.assert_close((means @ centres.T).amax(1), torch.ones(4))


def test_a_centre_without_points_stays_where_it_was():
    # At least 5 of the 8 centres have no point.
    centres = orchmoe.spherical_kmeans(torch.eye(3), 8, seeded_generator())
    torch.testing.assert_close(centres.norm(dim=-1), torch.ones(8))
    assert set(centres.argmax(-1).tolist()) == {0, 1, 2}


def test_the_start_of_kmeans_prefers_points_that_are_far_away():
    crowd = torch.eye(32)[0] + 0.001 * torch.randn(300, 32, generator=seeded_generator())
    far = torch.eye(32)[1:4]  # single points, which a start from random points would miss
    for seed in range(5):
        generator = seeded_generator(seed)
        centres = orchmoe.spherical_kmeans(torch.cat([crowd, far]), 4, generator)
        torch.testing.assert_close((far @ centres.T).amax(1), torch.ones(3))
