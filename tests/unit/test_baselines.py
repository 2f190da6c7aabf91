"""The baselines against their equations written out, and parameter counts against closed forms.

parity/test_peft.py compares LoRA, Poly and MHR with those of peft.
"""

from dataclasses import fields, replace

import pytest
import torch
from torch import nn

import train
from baselines import METHODS, NoAdapter, attach_method, settings_of_method
from experiments.sizes import equal_ranks, parameters, total
from helpers import stir
from orchmoe import OrchMoEConfig, target_linears
from t5 import T5, T5Config

S, R, T, D = 3, 2, 5, 32
CONFIG = OrchMoEConfig(skills=S, rank=R, tasks=4, alpha=5.0)
TASK_IDS = torch.tensor([4, 0, -1, 2])
EXACT = dict(rtol=1e-10, atol=1e-12)
# Most tests call only one of the adapted Linears.
pytestmark = pytest.mark.filterwarnings("ignore:.*adapted Linears were not called")


def attached(name, base, **options):
    """Return the method with random B and Z in float64, one of its Linears, and an input for it."""
    generator = torch.Generator().manual_seed(0)
    adapters = attach_method(name, base, CONFIG, num_tasks=T, generator=generator, **options)
    base.double()
    stir(adapters, generator)
    if hasattr(adapters, "Z"):
        nn.init.normal_(adapters.Z, generator=generator)
    linear = next(iter(adapters.linears.values()))
    return adapters, linear, torch.randn(4, 7, D, dtype=torch.float64, generator=generator)


def normalised(z):
    return z.sigmoid() / z.sigmoid().sum(-1, keepdim=True)


def task_rows(z):
    """Return the normalised rows of Z (T,...) for TASK_IDS; their mean for the unseen task."""
    rows = normalised(z)
    return torch.stack([rows[i] if i >= 0 else rows.mean(0) for i in TASK_IDS])


def base_output(linear, x):
    return x @ linear.weight.T


def test_lora_is_one_adapter_of_the_whole_rank(small_t5):
    adapters, linear, x = attached("lora", small_t5)
    assert linear.skill_A.shape == (1, S * R, D)
    with adapters.routed():
        mixed = x @ linear.skill_A[0].T @ linear.skill_B[0]
        expected = base_output(linear, x) + 5.0 / (S * R) * mixed
        torch.testing.assert_close(linear(x), expected, **EXACT)


def test_moe_lora_is_a_softmax_over_experts_for_each_token(small_t5):
    adapters, linear, x = attached("moe-lora", small_t5)
    assert linear.skill_W_task.shape == (S, D) and linear.skill_bias is None
    with adapters.routed():
        gate = (x @ linear.skill_W_task.T).softmax(-1)
        mixed = torch.einsum("bls,bld,srd,sro->blo", gate, x, linear.skill_A, linear.skill_B)
        expected = base_output(linear, x) + 5.0 / R * mixed
        torch.testing.assert_close(linear(x), expected, **EXACT)


def test_poly_mixes_factors_by_task(small_t5):
    adapters, linear, x = attached("poly", small_t5)
    c = task_rows(adapters.Z[0, :, 0])  # (B,S)
    with adapters.routed(task_ids=TASK_IDS):
        y = linear(x)
    for b in range(4):
        A = torch.tensordot(c[b], linear.skill_A, 1)
        B = torch.tensordot(c[b], linear.skill_B, 1)
        expected = base_output(linear, x[b]) + 5.0 / R * x[b] @ A.T @ B
        torch.testing.assert_close(y[b], expected, **EXACT)


def test_mhr_mixes_factors_by_task_and_head(small_t5):
    adapters, linear, x = attached("mhr", small_t5, heads=4)
    c = task_rows(adapters.Z[0])  # (B,H,S)

    def mixed(factors, c):
        """Mix the factors (S,R,D) with one mixture c (H,S) for each head."""
        heads = []
        for h, part in enumerate(factors.chunk(4, -1)):
            heads.append(torch.tensordot(c[h], part, 1))
        return torch.cat(heads, -1)  # (R,D)

    with adapters.routed(task_ids=TASK_IDS):
        y = linear(x)
    for b in range(4):
        A = mixed(linear.skill_A, c[b])
        B = mixed(linear.skill_B, c[b])
        expected = base_output(linear, x[b]) + 5.0 / R * x[b] @ A.T @ B
        torch.testing.assert_close(y[b], expected, **EXACT)


def test_mhr_refuses_widths_that_its_heads_do_not_divide():
    module = torch.nn.Sequential(torch.nn.Linear(12, 10))
    message = r"--method mhr: 0, Linear\(.*out_features=10.*into 4 heads"
    with pytest.raises(ValueError, match=message):
        attach_method("mhr", module, OrchMoEConfig(targets=("0",)), num_tasks=2)


def test_c_poly_adds_a_private_skill_to_common_ones(small_t5):
    adapters, linear, x = attached("c-poly", small_t5)
    assert torch.equal(adapters.Z_private[0], torch.eye(T, dtype=torch.float64))
    with torch.no_grad():
        adapters.Z_private.normal_()
    common = task_rows(adapters.Z[0, :, 0])  # (B,S-1)
    private = torch.stack([adapters.Z_private[0, i] * (i >= 0) for i in TASK_IDS])
    c = torch.cat([common, private], 1)
    with adapters.routed(task_ids=TASK_IDS):
        mixed = torch.einsum("bs,bld,srd,sro->blo", c, x, linear.skill_A, linear.skill_B)
        expected = base_output(linear, x) + 5.0 / R * mixed
        torch.testing.assert_close(linear(x), expected, **EXACT)


@pytest.mark.parametrize("name", ["poly", "mhr", "c-poly"])
def test_noise_relaxes_the_rows_in_training_only(small_t5, name):
    adapters, linear, x = attached(name, small_t5)
    noise = torch.rand(4, *adapters.noise_shape)
    with adapters.routed(task_ids=TASK_IDS, noise=noise) as quiet:
        pass
    adapters.train()
    with adapters.routed(task_ids=TASK_IDS, noise=noise) as noisy, torch.no_grad():
        logistic = noise.double().clamp(1e-6, 1 - 1e-6).logit().transpose(0, 1)
        z = adapters.Z[:, TASK_IDS.clamp(min=0)] + logistic
        expected = normalised(z)[:, 0]  # of sample 0, whose task is seen
    found = noisy.c[:, 0]
    if name == "c-poly":
        found = found[:, None, : S - 1]  # the common skills
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(noisy.c, quiet.c)


@pytest.mark.parametrize("name", ["poly", "mhr", "c-poly"])
def test_methods_with_task_ids_ask_for_them(small_t5, name):
    with pytest.raises(ValueError, match="num_tasks"):
        attach_method(name, small_t5, CONFIG)
    adapters, *_ = attached(name, small_t5)
    with pytest.raises(ValueError, match="task_ids"), adapters.routed():
        pass


@pytest.mark.parametrize("name", METHODS)
def test_all_methods_start_as_the_base_train_and_generate(small_t5, inputs, name):
    small_t5.requires_grad_(False)
    before = small_t5.loss(*inputs)
    generator = torch.Generator().manual_seed(0)
    adapters = attach_method(name, small_t5, CONFIG, num_tasks=T, generator=generator)
    ids, mask, _ = inputs
    embeddings = small_t5.embed(ids)
    with adapters.routed(embeddings, mask, task_ids=TASK_IDS):
        loss = small_t5.loss(*inputs)
        loss.backward()
    torch.testing.assert_close(loss, before)
    group = adapters.parameter_groups()["full" if name == "full" else "skills"]
    assert any(p.grad is not None and p.grad.any() for p in group)
    with torch.no_grad(), adapters.routed(embeddings, mask, task_ids=TASK_IDS):
        small_t5.generate(ids, mask, max_new_tokens=4, on_keep=adapters.keep)


@pytest.mark.parametrize("name", ["lora", "moe-lora", "poly", "mhr", "c-poly"])
def test_the_baselines_refuse_weights_of_abstract_tasks(small_t5, name):
    adapters, *_ = attached(name, small_t5)
    with pytest.raises(ValueError, match="w: only OrchMoE"):
        with adapters.routed(task_ids=TASK_IDS, w=torch.ones(4)):
            pass


SKILLS = {"skills", "rank", "alpha", "targets", "lr_skills"}
FIELDS = {field.name for field in fields(OrchMoEConfig)}
ORCHMOE = FIELDS | {"lr_skills", "lr_allocation"}
READ = {
    ("lora", "sample"): SKILLS,
    ("moe-lora", "sample"): SKILLS | {"lr_token_router"},
    ("poly", "sample"): SKILLS | {"lr_allocation"},
    ("mhr", "sample"): SKILLS | {"lr_allocation"},
    ("c-poly", "sample"): SKILLS | {"lr_allocation"},
    ("full", "sample"): {"lr_full"},
    ("orchmoe", "sample"): ORCHMOE | {"lr_router"},
    ("orchmoe", "token"): (ORCHMOE | {"lr_token_router"}) - {"router_attention", "router_init"},
    ("orchmoe", "none"): ORCHMOE - {"router_attention", "router_init", "router_norm"},
    ("orchmoe-factors", "sample"): ORCHMOE | {"lr_router"},
    ("orchmoe-factors", "none"): ORCHMOE - {"router_attention", "router_init", "router_norm"},
}


@pytest.mark.parametrize("method, router", READ)
def test_settings_read_are_those_that_the_method_uses(small_t5, method, router):
    read = settings_of_method(method, router)
    assert read == READ[method, router]
    assert read <= FIELDS | {field.name for field in fields(train.TrainConfig)}

    # There is a learning rate for each kind of parameter that trains, and no other.
    config = OrchMoEConfig(router=router)
    adapters = attach_method(method, small_t5, config, num_tasks=T)
    kinds = {kind for kind, group in adapters.parameter_groups().items() if group}
    assert {f"lr_{kind}" for kind in kinds} == read - FIELDS


def test_every_method_has_settings():
    assert {method for method, _ in READ} == set(METHODS)


def test_unknown_method_is_refused(small_t5):
    with pytest.raises(ValueError, match="loraa"):
        attach_method("loraa", small_t5, CONFIG)


def test_a_head_has_no_rows_to_route(small_t5):
    """The head reads the labels of all samples one after another; a LoRA is the same for all."""
    config = replace(CONFIG, targets=("q", "head"))
    for name in sorted(set(METHODS) - {"lora", "moe-lora", "full"}):
        with pytest.raises(ValueError, match="targets: head reads labels of all samples at once"):
            attach_method(name, small_t5, config, num_tasks=T)
    assert "head" in attach_method("lora", small_t5, config).linears


COUNTS = {  # parameters of one Linear, D -> O: the table of the methods
    "lora": lambda d, o: S * R * (d + o),
    "moe-lora": lambda d, o: S * R * (d + o) + S * d,
    "poly": lambda d, o: S * R * (d + o) + T * S,
    "mhr": lambda d, o: S * R * (d + o) + T * S * 4,
    "c-poly": lambda d, o: (S - 1 + T) * R * (d + o) + T * (S - 1) + T * T,
    "orchmoe": lambda d, o: S * R * (d + o) + 4 * S,
}


@pytest.mark.parametrize("extra", [0, 7])
@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_closed_forms(small_t5, name, extra):
    def anatomy():
        """Return the class of each module, and which of its parameters train."""
        found = []
        for module in small_t5.modules():
            found.append((type(module), [p.requires_grad for p in module.parameters()]))
        return found

    before = {key: value.clone() for key, value in small_t5.state_dict().items()}
    anatomy_before = anatomy()
    found = parameters(name, small_t5, CONFIG, num_tasks=T, extra_rank=extra)

    linears = list(target_linears(small_t5, CONFIG.targets).values())
    skills = {"lora": 1, "c-poly": S - 1 + T}.get(name, S)
    expected = 4 * D + 4 if name == "orchmoe" else 0  # the Task Router
    for n, linear in enumerate(linears):
        d, o = linear.in_features, linear.out_features
        # Extra ranks are shared out evenly: the first n Linears have floor(n extra / N).
        more = (n + 1) * extra // len(linears) - n * extra // len(linears)
        expected += COUNTS[name](d, o) + more * skills * (d + o)
    assert sum(found.values()) == expected

    # Counting leaves the model as it was.
    after = small_t5.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert anatomy() == anatomy_before


@pytest.mark.parametrize("targets", [("q", "v"), ("all",)])
def test_equal_ranks_make_totals_equal_within_three_per_cent(small_t5, targets):
    names = ["orchmoe", "lora", "moe-lora", "poly", "mhr"]
    config = OrchMoEConfig(targets=targets)
    rows = tuple((name, name, config) for name in names)
    extra = equal_ranks(rows, small_t5.config, num_tasks=28)

    def total_with(name, extra_rank):
        return total(name, small_t5, config, extra_rank=extra_rank, num_tasks=28)

    least = max(total_with(name, 0) for name in names)
    totals = [total_with(name, extra[name]) for name in names]
    assert max(totals) <= 1.03 * min(totals)
    assert all(abs(size - least) <= 0.03 * least for size in totals)
    for name in names:  # the scale: alpha / the rank that adds up
        adapters = attach_method(name, small_t5, config, extra_rank=extra[name], num_tasks=28)
        for linear in adapters.linears.values():
            assert linear.skill_scale == config.rank / linear.skill_A.shape[1]
        adapters.detach()


@pytest.mark.parametrize("way", ["routed", "folded", "disabled"])
def test_without_adapters_every_way_gives_the_base(way, small_t5, inputs):
    expected = small_t5.loss(*inputs)
    with getattr(NoAdapter(small_t5, full=False), way)():
        assert torch.equal(small_t5.loss(*inputs), expected)


def test_mhr_on_flan_t5_xl_has_the_published_size():
    config = T5Config(
        vocab_size=32128,
        d_model=2048,
        d_kv=64,
        d_ff=5120,
        num_layers=24,
        num_decoder_layers=24,
        num_heads=32,
        feed_forward_proj="gated-gelu",
        scale_decoder_outputs=False,
        tied_head=False,
    )
    with torch.device("meta"):
        base = T5(config)
    adapters = attach_method("mhr", base, OrchMoEConfig(skills=2, rank=8), num_tasks=4, heads=4)
    assert len(adapters.linears) == 144
    assert (
        sum(p.numel() for group in adapters.parameter_groups().values() for p in group) == 9_441_792
    )


def test_the_routings_start_as_stated(small_t5):
    linears = attach_method("moe-lora", small_t5, OrchMoEConfig()).linears.values()
    start = torch.cat([linear.skill_W_task.flatten() for linear in linears])
    assert start.std().item() == pytest.approx(0.02, rel=0.1)
    small_t5.skill_adapters.detach()
    Z = attach_method("poly", small_t5, OrchMoEConfig(), num_tasks=T).Z
    assert 0.9e-3 < Z.abs().max() <= 1e-3
