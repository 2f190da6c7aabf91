"""The baselines against their equations written out, against OrchMoE where they coincide, against peft where
it is installed, and their parameter counts against closed forms."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import stir
from torch import nn

from baselines import METHODS, NoAdapter, attach_method
from experiments.sizes import budget, parameters
from orchmoe import OrchMoEConfig, target_linears
from t5 import T5, T5Config

S, R, T, D = 3, 2, 5, 32
CONFIG = OrchMoEConfig(skills=S, rank=R, tasks=4, alpha=5.0)
TASK_IDS = torch.tensor([4, 0, -1, 2])
EXACT = dict(rtol=1e-10, atol=1e-12)
pytestmark = pytest.mark.filterwarnings("ignore:.*adapted Linears were not called")  # one is enough here


def attached(name, base, **options):
    """The method with random B and allocation, in float64, and one of its Linears with an input for it."""
    generator = torch.Generator().manual_seed(0)
    adapters = attach_method(name, base, CONFIG, num_tasks=T, generator=generator, **options)
    base.double()
    stir(adapters, generator)
    if hasattr(adapters, "allocation"):
        nn.init.normal_(adapters.allocation, generator=generator)
    linear = next(iter(adapters.linears.values()))
    return adapters, linear, torch.randn(4, 7, D, dtype=torch.float64, generator=generator)


def normalised(z):
    return z.sigmoid() / z.sigmoid().sum(-1, keepdim=True)


def task_rows(z):
    """Rows of Z (T,..) for TASK_IDS; the mean of the normalised rows for the unseen task."""
    rows = normalised(z)
    return torch.stack([rows[i] if i >= 0 else rows.mean(0) for i in TASK_IDS])


def test_lora_is_one_adapter_of_the_whole_rank(small_t5):
    adapters, linear, x = attached("lora", small_t5)
    assert linear.skill_A.shape == (1, S * R, D)
    with adapters.routed():
        expected = x @ linear.weight.T + 5.0 / (S * R) * x @ linear.skill_A[0].T @ linear.skill_B[0]
        torch.testing.assert_close(linear(x), expected, **EXACT)


def test_moe_lora_is_a_softmax_over_experts_for_each_token(small_t5):
    adapters, linear, x = attached("moe-lora", small_t5)
    assert linear.skill_task.shape == (S, D) and linear.skill_bias is None
    with adapters.routed():
        gate = (x @ linear.skill_task.T).softmax(-1)
        mixed = torch.einsum("bls,bld,srd,sro->blo", gate, x, linear.skill_A, linear.skill_B)
        torch.testing.assert_close(linear(x), x @ linear.weight.T + 5.0 / R * mixed, **EXACT)


def test_poly_mixes_factors_by_task(small_t5):
    adapters, linear, x = attached("poly", small_t5)
    c = task_rows(adapters.allocation[0, :, 0])
    with adapters.routed(task_ids=TASK_IDS):
        y = linear(x)
    for b in range(4):
        A, B = (torch.tensordot(c[b], bank, 1) for bank in (linear.skill_A, linear.skill_B))
        torch.testing.assert_close(y[b], x[b] @ linear.weight.T + 5.0 / R * x[b] @ A.T @ B, **EXACT)


def test_mhr_mixes_factors_by_task_and_head(small_t5):
    adapters, linear, x = attached("mhr", small_t5, heads=4)
    c = task_rows(adapters.allocation[0])  # (B,H,S)
    with adapters.routed(task_ids=TASK_IDS):
        y = linear(x)
    for b in range(4):
        A, B = (
            torch.cat([torch.tensordot(c[b, h], part, 1) for h, part in enumerate(bank.chunk(4, -1))], -1)
            for bank in (linear.skill_A, linear.skill_B)
        )
        torch.testing.assert_close(y[b], x[b] @ linear.weight.T + 5.0 / R * x[b] @ A.T @ B, **EXACT)


def test_mhr_refuses_widths_that_its_heads_do_not_divide():
    module = torch.nn.Sequential(torch.nn.Linear(12, 10))
    with pytest.raises(ValueError, match=r"--method mhr: 0, Linear\(.*out_features=10.*into 4 heads"):
        attach_method("mhr", module, OrchMoEConfig(targets=("0",)), num_tasks=2)


def test_c_poly_adds_a_private_skill_to_common_ones(small_t5):
    adapters, linear, x = attached("c-poly", small_t5)
    assert torch.equal(adapters.allocation_private[0], torch.eye(T, dtype=torch.float64))
    with torch.no_grad():
        adapters.allocation_private.normal_()
    common = task_rows(adapters.allocation[0, :, 0])  # (B,S-1)
    private = torch.stack([adapters.allocation_private[0, i] * (i >= 0) for i in TASK_IDS])
    with adapters.routed(task_ids=TASK_IDS):
        mixed = torch.einsum(
            "bs,bld,srd,sro->blo", torch.cat([common, private], 1), x, linear.skill_A, linear.skill_B
        )
        torch.testing.assert_close(linear(x), x @ linear.weight.T + 5.0 / R * mixed, **EXACT)


@pytest.mark.parametrize("name", ["poly", "mhr", "c-poly"])
def test_noise_relaxes_the_rows_in_training_only(small_t5, name):
    adapters, linear, x = attached(name, small_t5)
    noise = torch.rand(4, *adapters.noise_shape)
    with adapters.routed(task_ids=TASK_IDS, noise=noise) as quiet:
        pass
    adapters.train()
    with adapters.routed(task_ids=TASK_IDS, noise=noise) as noisy, torch.no_grad():
        z = adapters.allocation[:, TASK_IDS.clamp(min=0)] + noise.double().clamp(
            1e-6, 1 - 1e-6
        ).logit().transpose(0, 1)
        wanted = normalised(z)[:, 0]  # sample 0, a seen task
    found = noisy.c[:, 0] if name != "c-poly" else noisy.c[:, 0, None, : S - 1]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(noisy.c, quiet.c)


@pytest.mark.parametrize("name", ["poly", "mhr", "c-poly"])
def test_methods_with_ids_ask_for_them(small_t5, name):
    with pytest.raises(ValueError, match="num_tasks"):
        attach_method(name, small_t5, CONFIG)
    adapters, *_ = attached(name, small_t5)
    with pytest.raises(ValueError, match="task_ids"), adapters.routed():
        pass


@pytest.mark.parametrize("name", METHODS)
def test_all_start_as_the_base_train_and_generate(small_t5, inputs, name):
    small_t5.requires_grad_(False)
    before = small_t5.loss(*inputs)
    adapters = attach_method(name, small_t5, CONFIG, num_tasks=T, generator=torch.Generator().manual_seed(0))
    embeddings = small_t5.embed(inputs.input_ids)
    with adapters.routed(embeddings, inputs.attention_mask, task_ids=TASK_IDS):
        loss = small_t5.loss(*inputs)
        loss.backward()
    torch.testing.assert_close(loss, before)
    groups = adapters.parameter_groups()
    assert any(p.grad is not None and p.grad.any() for p in groups["full" if name == "full" else "skills"])
    with torch.no_grad(), adapters.routed(embeddings, inputs.attention_mask, task_ids=TASK_IDS):
        small_t5.generate(inputs.input_ids, inputs.attention_mask, max_new_tokens=4, on_keep=adapters.keep)


def test_unknown_method_is_refused(small_t5):
    with pytest.raises(ValueError, match="loraa"):
        attach_method("loraa", small_t5, CONFIG)


def test_a_head_has_no_rows_to_route(small_t5):
    """It reads the labels of all samples in one row after another; a LoRA is the same for each of them."""
    config = replace(CONFIG, targets=("q", "head"))
    for name in sorted(set(METHODS) - {"lora", "moe-lora", "full"}):
        with pytest.raises(ValueError, match="targets: head reads labels of all samples at once; not with"):
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
    before = {key: value.clone() for key, value in small_t5.state_dict().items()}
    anatomy = [(type(module), [p.requires_grad for p in module.parameters()])
               for module in small_t5.modules()]
    found = parameters(name, small_t5, CONFIG, num_tasks=T, extra_rank=extra)
    shapes = [(linear.in_features, linear.out_features)
              for linear in target_linears(small_t5, CONFIG.targets).values()]
    expected = sum(COUNTS[name](*shape) for shape in shapes) + (4 * D + 4 if name == "orchmoe" else 0)
    ends = [(n + 1) * extra // len(shapes) for n in range(len(shapes))]  # handed out evenly
    banks = {"lora": 1, "c-poly": S - 1 + T}.get(name, S)  # a rank more in each of so many skills
    expected += sum((end - start) * banks * sum(shape)
                    for start, end, shape in zip([0, *ends], ends, shapes, strict=False))
    assert sum(found.values()) == expected
    after = small_t5.state_dict()  # as it was before anything was counted
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert anatomy == [(type(module), [p.requires_grad for p in module.parameters()])
                       for module in small_t5.modules()]


@pytest.mark.parametrize("targets", [("q", "v"), ("all",)])
def test_a_budget_makes_totals_equal_within_three_per_cent(small_t5, targets):
    names, config = ["orchmoe", "lora", "moe-lora", "poly", "mhr"], OrchMoEConfig(targets=targets)
    extra = budget(names, small_t5, config, num_tasks=28)
    totals = [sum(parameters(name, small_t5, config, extra_rank=extra[name], num_tasks=28).values())
              for name in names]
    least = max(sum(parameters(name, small_t5, config, num_tasks=28).values()) for name in names)
    assert max(totals) <= 1.03 * min(totals) and all(abs(total - least) <= 0.03 * least for total in totals)
    for name in names:  # the scale: alpha / the rank that adds up
        adapters = attach_method(name, small_t5, config, extra_rank=extra[name], num_tasks=28)
        for linear in adapters.linears.values():
            assert linear.skill_scale == config.rank / linear.skill_A.shape[1]
        adapters.detach()


@pytest.mark.parametrize("way", ["routed", "folded", "disabled"])
def test_without_adapters_every_way_is_the_base(way, small_t5, inputs):
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
    assert sum(p.numel() for group in adapters.parameter_groups().values() for p in group) == 9_441_792


def peft_twin(base, kind):
    """The same Linear under peft, with the factors and allocation of ours copied in."""
    peft = pytest.importorskip("peft")
    if kind == "lora":
        return peft.get_peft_model(
            base, peft.LoraConfig(r=S * R, lora_alpha=5, target_modules=["q"], lora_dropout=0)
        )
    heads = 4 if kind == "mhr" else 1
    return peft.get_peft_model(
        base, peft.PolyConfig(r=R, n_tasks=T, n_skills=S, n_splits=heads, target_modules=["q"])
    )


@pytest.mark.parametrize("kind", ["lora", "poly", "mhr"])
def test_output_and_gradients_equal_peft(kind):
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(D, 24, bias=False)

        def forward(self, x, task_ids=None):
            return self.q(x)

    torch.manual_seed(0)
    base = One()
    twin = peft_twin(One(), kind)
    alpha = 5.0 if kind == "lora" else 1.0  # peft divides the output of Poly by R
    config = OrchMoEConfig(skills=S, rank=R, targets=("q",), alpha=alpha)
    adapters = attach_method(kind, base, config, num_tasks=T, heads=4)
    adapters.eval()
    twin.eval()
    linear = base.q
    nn.init.normal_(linear.skill_B)
    layer = twin.base_model.model.q
    layer.base_layer.weight.data.copy_(linear.weight)
    with torch.no_grad():
        if kind == "lora":
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            a.copy_(linear.skill_A[0])
            b.copy_(linear.skill_B[0].T)
            pairs = [(linear.skill_A, a, lambda g: g[None]), (linear.skill_B, b, lambda g: g.T[None])]
        else:
            heads = 4 if kind == "mhr" else 1
            nn.init.normal_(adapters.allocation)
            a, b = layer.poly_lora_A["default"], layer.poly_lora_B["default"]  # (H,S,D/H,R), (H,S,R,O/H)
            z = layer.poly_router["default"].module_logits  # (T,H S)
            a.copy_(linear.skill_A.view(S, R, heads, -1).permute(2, 0, 3, 1))
            b.copy_(linear.skill_B.view(S, R, heads, -1).permute(2, 0, 1, 3))
            z.copy_(adapters.allocation[0].flatten(1))
            pairs = [
                (linear.skill_A, a, lambda g: g.permute(1, 3, 0, 2).flatten(2)),
                (linear.skill_B, b, lambda g: g.permute(1, 2, 0, 3).flatten(2)),
                (adapters.allocation, z, lambda g: g.view(1, T, heads, S)),
            ]
    x, task_ids = torch.randn(4, 6, D), torch.tensor([4, 0, 1, 4])
    with adapters.routed(task_ids=task_ids):
        y = base(x)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    twin_y = layer(x) if kind == "lora" else layer(x, task_ids=task_ids)
    (twin_y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    torch.testing.assert_close(y, twin_y, rtol=1e-5, atol=1e-5)
    for ours, theirs, arrange in pairs:
        torch.testing.assert_close(ours.grad, arrange(theirs.grad), rtol=1e-5, atol=1e-5)
    assert not F.cosine_similarity(y.flatten(), (x @ linear.weight.T).flatten(), dim=0).isclose(
        torch.tensor(1.0)
    )


def test_the_routings_start_as_stated(small_t5):
    linears = attach_method("moe-lora", small_t5, OrchMoEConfig()).linears.values()
    start = torch.cat([linear.skill_task.flatten() for linear in linears])
    assert start.std().item() == pytest.approx(0.02, rel=0.1)
    small_t5.skill_adapters.detach()
    Z = attach_method("poly", small_t5, OrchMoEConfig(), num_tasks=T).allocation
    assert 0.9e-3 < Z.abs().max() <= 1e-3
