"""Test skills in Linears of all kinds, and routed, disabled, folded, merge and detach.

Each of these methods must undo itself, and must be refused where it makes no sense.
"""

import contextlib
import copy
import pickle
import threading
import warnings
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import kernels
import orchmoe
from baselines import attach_method
from helpers import stir
from orchmoe import OrchMoEConfig, SkillLinear, attach

D, B, L = 16, 3, 5
CLOSE = dict(rtol=1e-5, atol=1e-5)
mixes = pytest.mark.parametrize(
    "mix", [kernels.mix_skills, orchmoe.mix_skills], ids=["kernels", "orchmoe"]
)


class Doubled(nn.Linear):
    """A Linear with a forward of its own."""

    def forward(self, x):
        return 2 * F.linear(x, self.weight, self.bias) + 1


class Int8(nn.Linear):
    """A Linear with integers in `weight` and a separate scale, as quantised Linears have."""

    def __init__(self):
        super().__init__(D, D)
        integers = (50 * self.weight).round().to(torch.int8)
        self.weight = nn.Parameter(integers, requires_grad=False)
        self.register_buffer("weight_scale", torch.tensor(1 / 50))

    def forward(self, x):
        return F.linear(x, self.weight.to(x) * self.weight_scale.to(x), self.bias)


class Net(nn.Module):
    """A model with three Linears: q, of a kind that the test chooses, v and head.

    q and v are adapted; head is not.
    """

    def __init__(self, q=None):
        super().__init__()
        self.q = q or nn.Linear(D, D)
        self.v = nn.Linear(D, D, bias=False)
        self.head = nn.Linear(D, 7)

    def forward(self, x):
        return self.head(F.gelu(self.q(x)) * self.v(x))


def torchao():
    quantization = pytest.importorskip("torchao.quantization")
    wrapper = nn.Sequential(nn.Linear(D, D))
    quantization.quantize_(wrapper, quantization.Int8WeightOnlyConfig())
    return wrapper[0]


def weight_norm():
    return nn.utils.weight_norm(nn.Linear(D, D))


PLAIN = {"plain": lambda: nn.Linear(D, D)}
OTHERS = {
    "own forward": lambda: Doubled(D, D),
    "int8": Int8,
    "torchao": torchao,
    "weight_norm": weight_norm,
    "parametrized": lambda: parametrizations.weight_norm(nn.Linear(D, D)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(D, D), "weight", 0.3),
}
others = pytest.mark.parametrize("kind", OTHERS)
every_kind = pytest.mark.parametrize("kind", PLAIN | OTHERS)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def net(kind="plain"):
    torch.manual_seed(0)
    return Net((PLAIN | OTHERS)[kind]())


def source(samples=B):
    return torch.randn(B, L, D, generator=torch.Generator().manual_seed(1))[:samples]


def attached(base, mix=kernels.mix_skills, **options):
    """Return adapters of q and v whose outputs depend on B, Z and the router."""
    config = OrchMoEConfig(targets=("q", "v"), tasks=5, skills=3, alpha=6.0, **options)
    adapters = attach(base, config, mix, generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(3)
    stir(adapters, generator)
    if adapters.router is not None:
        nn.init.normal_(adapters.router.W_task, generator=generator)
    return adapters


def routed(base, x=None, **options):
    """Return the output of the model for x, routed by x."""
    x = source() if x is None else x
    with torch.no_grad(), base.skill_adapters.routed(x, **options):
        return base(x)


def skills(linear, x, c):
    """Return scale * sum_s c_s B_s A_s x for c (B,S)."""
    A, B = linear.skill_A, linear.skill_B
    return linear.skill_scale * torch.einsum("bs,bld,srd,sro->blo", c, x, A, B)


class Anatomy(NamedTuple):
    """All that attach or a method of the adapters could leave changed."""

    classes: list  # (name, class, names of the attributes) of each module
    parameters: list  # (name, identity, requires_grad) of each parameter
    values: list  # (name, copy) of each tensor of the state


def anatomy(base):
    modules = base.named_modules()
    values = []
    for name, value in base.state_dict().items():
        if not nn.parameter.is_lazy(value):
            values.append((name, value.clone()))
    return Anatomy(
        classes=[(name, type(module), sorted(vars(module))) for name, module in modules],
        parameters=[(name, id(p), p.requires_grad) for name, p in base.named_parameters()],
        values=values,
    )


def assert_same(found, expected):
    assert found.classes == expected.classes
    assert found.parameters == expected.parameters
    for (name, value), (other, wanted) in zip(found.values, expected.values, strict=True):
        assert name == other and same_tensor(value, wanted), name


def same_tensor(a, b):
    """Compare two tensors. Quantised ones are compared by their integers and scales."""
    if not hasattr(a, "__tensor_flatten__"):
        return torch.equal(a, b)
    names, _ = a.__tensor_flatten__()
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


# ------------------------------------------------------------------- skills in Linears of all kinds


@mixes
@every_kind
def test_a_linear_returns_its_own_output_plus_the_skills(kind, mix):
    twin, base = net(kind), net(kind)
    x = source()
    adapters = attached(base, mix)
    with torch.no_grad(), adapters.routed(x) as routing:
        for (name, linear), c in zip(adapters.linears.items(), routing.c, strict=True):
            added = skills(linear, x, c)
            assert added.abs().max() > 0.1
            torch.testing.assert_close(linear(x), twin.get_submodule(name)(x) + added, **CLOSE)
    assert base.q.skill_plain == (kind == "plain") and base.v.skill_plain


@every_kind
def test_skills_of_any_linear_train_and_its_weight_does_not(kind):
    base, x = net(kind), source()
    adapters = attached(base)
    with adapters.routed(x):
        base(x).square().sum().backward()
    for name, parameter in base.named_parameters():
        has_gradient = parameter.grad is not None and bool(parameter.grad.any())
        assert has_gradient == ("skill_" in name), name


def test_attach_keeps_the_module_the_weight_and_the_class():
    base = net("own forward")
    q, weight = base.q, base.q.weight
    attached(base)
    assert base.q is q and base.q.weight is weight and isinstance(base.q, Doubled)
    assert isinstance(base.q, SkillLinear) and type(base.v) is SkillLinear


def test_hooks_fire_with_skills_and_without():
    base, x = net(), source()
    fired = []
    base.q.register_forward_pre_hook(lambda module, args: fired.append("pre"))
    base.q.register_forward_hook(lambda module, args, y: fired.append("post"))
    base.q.register_full_backward_hook(lambda module, dx, dy: fired.append("back"))
    base.q._register_state_dict_hook(lambda module, state, prefix, _: fired.append("state"))
    adapters = attached(base)
    w = torch.full((5,), 0.2)

    def all_hooks_fire():
        fired.clear()
        base(x.clone().requires_grad_()).sum().backward()
        base.state_dict()
        return fired == ["pre", "post", "back", "state"]

    for context in (adapters.routed(w=w), adapters.disabled(), adapters.folded(w)):
        with context:
            assert all_hooks_fire()
    adapters.detach()
    assert all_hooks_fire()
    attached(base).merge(w)
    assert all_hooks_fire()


def test_hooks_may_change_the_input_and_the_output_of_a_linear():
    base, x = net(), source()
    base.q.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    base.q.register_forward_hook(lambda module, args, y: y + 1)
    adapters = attached(base)
    with torch.no_grad(), adapters.routed(x) as routing:
        base.v(x)
        y = F.linear(2 * x, base.q.weight, base.q.bias)
        expected = y + skills(base.q, 2 * x, routing.c[0]) + 1
        torch.testing.assert_close(base.q(x), expected, **CLOSE)


def test_buffers_and_parameters_of_a_linear_keep_their_names():
    base = net()
    base.q.register_buffer("steps", torch.tensor(3))
    base.q.gain = nn.Parameter(torch.ones(1))
    before = base.state_dict()
    attached(base)
    after = base.state_dict()
    assert before.keys() < after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert "q.gain" not in base.skill_adapters.state_dict()


def test_a_weight_that_trains_gets_its_gradient():
    base, x = net(), source()
    adapters = attached(base)
    base.q.weight.requires_grad_()
    base.v.register_parameter("bias", nn.Parameter(torch.zeros(D)))
    with adapters.routed(x) as routing:
        base(x).square().sum().backward()

    # The same with plain tensors.
    weight = base.q.weight.detach().requires_grad_()
    bias = torch.zeros(D, requires_grad=True)
    q = F.linear(x, weight, base.q.bias) + skills(base.q, x, routing.c[0]).detach()
    v = F.linear(x, base.v.weight, bias) + skills(base.v, x, routing.c[1]).detach()
    base.head(F.gelu(q) * v).square().sum().backward()
    torch.testing.assert_close(base.q.weight.grad, weight.grad, **CLOSE)
    torch.testing.assert_close(base.v.bias.grad, bias.grad, **CLOSE)
    assert base.v.weight.grad is None and base.q.skill_B.grad.any()


@every_kind
def test_a_deepcopy_shares_nothing_with_its_original(kind):
    base = net(kind)
    attached(base)
    expected = routed(base)
    twin = copy.deepcopy(base)
    with torch.no_grad():
        base.q.skill_B.zero_()
        base.v.weight.zero_()
    assert torch.equal(routed(twin), expected)
    assert twin.skill_adapters.linears["q"] is twin.q and twin.q is not base.q
    assert type(twin.q) is type(base.q)
    twin.skill_adapters.detach()
    assert not isinstance(twin.q, SkillLinear) and isinstance(base.q, SkillLinear)


@pytest.mark.parametrize("kind", ["plain", "own forward", "int8"])
def test_a_whole_model_can_be_pickled(kind):
    base = net(kind)
    attached(base)
    twin = pickle.loads(pickle.dumps(base))
    assert torch.equal(routed(twin), routed(base)) and type(twin.q) is type(base.q)
    twin.skill_adapters.detach()
    assert type(twin.q) is type(net(kind).q) and not hasattr(twin, "skill_adapters")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda base: pickle.loads(pickle.dumps(base))])
def test_a_copy_made_inside_routed_is_not_routed(copied):
    base, x = net(), source()
    adapters = attached(base)
    with adapters.routed(x):
        base(x).sum().backward()
        twin = copied(base)
    with pytest.raises(RuntimeError, match="outside"):
        twin(x)
    assert torch.equal(routed(twin), routed(base))
    state = adapters.state_dict(prefix="p.")
    assert state.keys() == {f"p.{name}" for name in adapters.state_dict()}
    contexts = {
        r"disabled\(\)": adapters.disabled(),
        r"folded\(\)": adapters.folded(torch.ones(5) / 5),
    }
    for name, context in contexts.items():
        with context:
            inside = adapters.state_dict(prefix="p.")
            assert inside.keys() == state.keys()
            assert all(torch.equal(inside[key], value) for key, value in state.items())
            message = f"^{name}: leave it before the model is copied or pickled"
            with pytest.raises(RuntimeError, match=message):
                copied(base)
    assert torch.equal(routed(copied(base)), routed(base))


@pytest.mark.parametrize("router", ["sample", "token"])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_adapters_are_float32_or_wider_under_any_default_dtype(default, router):
    base = net()
    try:
        torch.set_default_dtype(default)
        adapters = attached(base, router=router)
    finally:
        torch.set_default_dtype(torch.float32)
    tensors = [*adapters.state_dict().values(), *base.q.skill_parameters().values()]
    assert {p.dtype for p in tensors} == {torch.promote_types(default, torch.float32)}


def test_kmeans_gives_the_same_under_any_default_device():
    points = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    expected = orchmoe.spherical_kmeans(points, 3, torch.Generator().manual_seed(1))
    with torch.device("meta"):
        found = orchmoe.spherical_kmeans(points, 3, torch.Generator().manual_seed(1))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("router", ["sample", "token"])
def test_a_change_of_dtype_leaves_the_adapters_in_float32(router, dtype):
    base, x = net(), source()
    adapters = attached(base, router=router)
    with adapters.routed(x):
        base(x).sum().backward()  # so that there are gradients, which change with their parameters
    before = {name: value.clone() for name, value in adapters.state_dict().items()}
    expected = routed(base)
    base.to(dtype)
    assert all(torch.equal(value, before[name]) for name, value in adapters.state_dict().items())
    for name, p in base.named_parameters():
        assert p.dtype == (torch.float32 if "skill_" in name else dtype), name
        assert p.grad is None or p.grad.dtype == p.dtype, name
    found = routed(base, x.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)
    base.double()  # a wider dtype is allowed
    assert {p.dtype for p in base.parameters()} == {torch.float64}


@pytest.mark.parametrize("kind", ["plain", "parametrized"])
def test_a_compiled_model_is_one_graph_without_breaks(kind):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    base, x = net(kind), source()
    adapters = attached(base)
    compiled = torch.compile(base, backend="aot_eager", fullgraph=True)
    for sign in (1, -1):  # the second routing must not be a constant of the first graph
        found = []
        for function in (base, compiled):
            base.zero_grad()
            with adapters.routed(sign * x):
                y = function(x)
                y.square().sum().backward()
            found.append([y.detach(), *(p.grad for p in base.parameters() if p.requires_grad)])
        for eager, other in zip(*found, strict=True):
            torch.testing.assert_close(other, eager, **CLOSE)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_a_tied_weight_is_adapted_only_in_its_linear():
    base = nn.Sequential(nn.Embedding(10, D), nn.Linear(D, 10, bias=False))
    base[1].weight = base[0].weight
    ids = torch.arange(10).view(2, 5)
    expected = base(ids)
    adapters = attach(base, OrchMoEConfig(targets=("1",), tasks=5), kernels.mix_skills)
    assert base[1].weight is base[0].weight
    nn.init.normal_(adapters.linears["1"].skill_B)
    with torch.no_grad(), adapters.routed(w=torch.full((5,), 0.2)):
        adapted = base(ids)
    with torch.no_grad(), adapters.folded(torch.full((5,), 0.2)):
        torch.testing.assert_close(base(ids), adapted, **CLOSE)
        assert base[1].weight is not base[0].weight
    assert base[1].weight is base[0].weight and not torch.allclose(adapted, expected)
    with adapters.disabled():
        assert torch.equal(base(ids), expected)


def test_a_linear_in_two_places_is_adapted_once():
    base = nn.ModuleDict({"q": nn.Linear(D, D)})
    base["v"] = base["q"]
    adapters = attach(base, OrchMoEConfig(targets=("q",)))
    assert list(adapters.linears) == ["q"] and base["v"] is base["q"]
    adapters.detach()
    assert type(base["v"]) is nn.Linear


# --------------------------------------------------------------- disabled, folded, merge and detach


@every_kind
def test_disabled_is_the_base_bit_for_bit(kind):
    base, x = net(kind), source()
    base(x)  # the old weight_norm and prune compute `weight` in a hook
    with torch.no_grad():
        expected = base(x)
    attached(base)
    adapted, before = routed(base), anatomy(base)
    assert not torch.allclose(adapted, expected)
    with torch.no_grad(), base.skill_adapters.disabled():
        assert torch.equal(base(x), expected) and type(base.v) is nn.Linear
        base.skill_adapters.keep(torch.tensor([0]))  # does nothing, because nothing is routed
    assert torch.equal(routed(base), adapted)
    assert_same(anatomy(base), before)


@mixes
@pytest.mark.parametrize(
    "options", [{}, {"router_norm": "none"}, {"gumbel": True, "router_dropout": 0.5}]
)
def test_folded_equals_routed_for_any_number_of_rows(options, mix):
    base, x = net().eval(), source()
    adapters = attached(base, mix, **options)
    w, one = torch.tensor([0.5, 0.0, 0.2, 0.3, 0.0]), x[:1]
    before = anatomy(base)
    cases = [({"w": w}, routed(base, w=w)), ({"embeddings": one}, routed(base, one))]
    for routing, expected in cases:
        with torch.no_grad(), adapters.folded(**routing):
            assert type(base.q) is nn.Linear
            torch.testing.assert_close(base(x)[: len(expected)], expected, **CLOSE)
            adapters.keep(torch.tensor([0, 2]))  # does nothing, because all rows are alike
            torch.testing.assert_close(base(x[:2]), base(x)[:2], **CLOSE)
        assert_same(anatomy(base), before)
    mask = torch.arange(L) < 3
    with torch.no_grad(), adapters.folded(embeddings=one, mask=mask[None]):
        masked = base(one)
    torch.testing.assert_close(masked, routed(base, one, mask=mask[None]), **CLOSE)
    assert not torch.allclose(masked, routed(base, one), **CLOSE)


def test_folded_is_undone_after_an_error_inside():
    base, x = net().eval(), source()
    adapters = attached(base)
    expected, before = routed(base), anatomy(base)
    with pytest.raises(KeyError), adapters.folded(torch.ones(5)):
        raise KeyError
    assert_same(anatomy(base), before)
    with pytest.raises(KeyError), adapters.disabled():
        raise KeyError
    assert_same(anatomy(base), before)
    assert torch.equal(routed(base, x), expected)


def test_a_fold_of_a_bfloat16_base_is_rounded_once():
    base = net().bfloat16().eval()
    adapters = attached(base)
    w = torch.full((5,), 0.2)
    with torch.autocast("cpu", torch.bfloat16), adapters.folded(w):
        folded = base.q.weight
    c = adapters.route(w=w).c[0]
    A, B = base.q.skill_A, base.q.skill_B
    update = base.q.skill_scale * torch.einsum("s,srd,sro->od", c[0], A, B)
    assert folded.dtype == torch.bfloat16
    exact = base.q.weight.float() + update
    assert (folded.float() - exact).abs().max() <= exact.abs().max() * 2**-8


@torch.no_grad()
def test_greedy_decoding_gives_the_same_tokens_folded_and_routed(small_t5, inputs):
    small_t5.float()
    generator = torch.Generator().manual_seed(0)
    adapters = attach(small_t5, OrchMoEConfig(targets=("all",)), generator=generator)
    stir(adapters, torch.Generator().manual_seed(1))
    found = []
    for row in range(4):
        ids, mask = inputs.input_ids[row : row + 1], inputs.attention_mask[row : row + 1]
        embeddings = small_t5.embed(ids)
        with adapters.routed(embeddings, mask):
            expected = small_t5.generate(ids, mask, max_new_tokens=12, on_keep=adapters.keep)
        with adapters.folded(embeddings=embeddings, mask=mask):
            assert torch.equal(small_t5.generate(ids, mask, max_new_tokens=12), expected)
        found.append(tuple(expected[0].tolist()))
    with adapters.disabled():  # the base gives other tokens, so the skills matter
        ids, mask = inputs.input_ids, inputs.attention_mask
        base = small_t5.generate(ids, mask, max_new_tokens=12, on_keep=adapters.keep)
    assert all(list(row) != base[i, : len(row)].tolist() for i, row in enumerate(found))


@mixes
def test_merge_folds_for_good(mix):
    base, x, w = net().eval(), source(), torch.eye(5)[3]
    names = list(base.state_dict())
    trains = [p.requires_grad for p in base.parameters()]
    adapters = attached(base, mix)
    expected = routed(base, w=w)
    adapters.merge(w)
    torch.testing.assert_close(base(x), expected, **CLOSE)
    assert list(base.state_dict()) == names
    assert [p.requires_grad for p in base.parameters()] == trains
    assert type(base.q) is nn.Linear
    assert not any("skill" in name for name in (*vars(base.q), *vars(base)))
    for method in ("routed", "disabled", "folded", "merge", "detach"):
        with pytest.raises(RuntimeError, match="merged or detached"):
            enter(adapters, method, **arguments(method, w))


@every_kind
def test_detach_restores_the_module(kind):
    base, x = net(kind), source()
    base.head.bias.requires_grad_(False)  # it must not train after detach, while the rest must
    with torch.no_grad():
        expected = base(x)
    before = anatomy(base)
    adapters = attached(base)
    with adapters.routed(x):
        base(x).square().sum().backward()
    adapters.detach()
    assert torch.equal(base(x), expected)
    assert_same(anatomy(base), before)

    # The module can be adapted again.
    attached(base)
    fresh = net(kind)
    attached(fresh)
    torch.testing.assert_close(routed(base), routed(fresh), **CLOSE)


@pytest.mark.parametrize("method", ["detach", "merge"])
def test_modules_added_after_attach_are_left_unchanged(method):
    base = net()
    base.tied = nn.Linear(D, D, bias=False)
    base.tied.weight = base.v.weight
    adapters = attached(base)
    base.new = nn.Linear(7, 2)
    base.frozen = nn.Linear(7, 2).requires_grad_(False)
    enter(adapters, method, **arguments(method, torch.ones(5) / 5))
    for name, parameter in base.named_parameters(remove_duplicate=False):
        assert parameter.requires_grad == (not name.startswith("frozen.")), name
    assert (base.tied.weight is base.v.weight) == (method == "detach")


def enter(adapters, method, **routing):
    """Call a method of the adapters. If it returns a context, enter and leave it."""
    with getattr(adapters, method)(**routing) or contextlib.nullcontext():
        pass


def arguments(method, w):
    return {} if method in ("disabled", "detach") else {"w": w}


@pytest.mark.parametrize("inner", ["routed", "disabled", "folded", "merge", "detach"])
@pytest.mark.parametrize("outer", ["routed", "disabled", "folded"])
def test_a_method_inside_another_is_refused_and_changes_nothing(outer, inner):
    base, x, w = net().eval(), source(), torch.eye(5)[3]
    adapters = attached(base)
    expected, before = routed(base), anatomy(base)
    with torch.no_grad(), getattr(adapters, outer)(**arguments(outer, w)):
        inside, output = anatomy(base), base(x)
        message = rf"^{inner}\(\): {outer}\(\) is active; leave it first"
        with pytest.raises(RuntimeError, match=message):
            enter(adapters, inner, **arguments(inner, w))
        assert_same(anatomy(base), inside)
        assert torch.equal(base(x), output)
    assert_same(anatomy(base), before)
    assert torch.equal(routed(base), expected)


ONE_SAMPLE = r"give one sample or one w \(K,\), not 2"
NOISE = r"training draws noise; call .eval\(\)"
REFUSED = [  # options of attach, whether it trains, arguments of folded, the message
    ({"router": "token"}, False, {"w": torch.ones(5)}, "a token router every token has its own w"),
    ({}, False, {"embeddings": source(2)}, ONE_SAMPLE),
    ({}, False, {"w": torch.ones(2, 5)}, ONE_SAMPLE),
    ({}, False, {"w": torch.ones(4)}, r"w: expected \(K,\) or \(B,K\) with K = 5, got \(4,\)"),
    ({}, False, {}, "embeddings"),
    ({"gumbel": True}, True, {"w": torch.ones(5)}, NOISE),
    ({"router_dropout": 0.5}, True, {"embeddings": source(1)}, NOISE),
]


def assert_refused(base, method, message, **routing):
    before = anatomy(base)
    with pytest.raises(ValueError, match=message):
        enter(base.skill_adapters, method, **routing)
    assert_same(anatomy(base), before)
    enter(base.skill_adapters, "disabled")  # the refused method is no longer active


@pytest.mark.parametrize("method", ["folded", "merge"])
@pytest.mark.parametrize("options, training, routing, message", REFUSED)
def test_a_routing_that_no_single_weight_has_is_refused(
    method, options, training, routing, message
):
    base = net()
    attached(base, **options)
    base.train(training)
    assert_refused(base, method, message, **routing)


@pytest.mark.parametrize("method", ["folded", "merge"])
@others
def test_folding_a_linear_that_is_not_plain_names_it(kind, method):
    base = net(kind).eval()
    adapters = attached(base)
    class_before = type(net(kind).q).__name__
    message = rf"^{method}\(\): q: {class_before} computes more than a plain product"
    assert_refused(base, method, message, w=torch.ones(5))
    assert adapters.unfoldable().startswith("q: ") and not attached(net()).unfoldable()


def test_an_integer_weight_is_not_plain():
    base = net()
    base.q.weight = nn.Parameter(base.q.weight.to(torch.int8), requires_grad=False)
    assert attached(base).unfoldable() == "q: Linear computes more than a plain product"


@pytest.mark.parametrize(
    "attach_again",
    [
        lambda base: attached(base),
        lambda base: attach(nn.Sequential(base), OrchMoEConfig(targets=("head",))),
        lambda base: attach_method("lora", base, OrchMoEConfig()),
    ],
)
def test_a_second_attach_names_an_adapted_linear_and_changes_nothing(attach_again):
    base = net()
    attached(base)
    before = anatomy(base)
    with pytest.raises(ValueError, match=r"module: \S*q has skills already; detach\(\) them"):
        attach_again(base)
    assert_same(anatomy(base), before)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda base: setattr(base, "v", nn.LazyLinear(D)), "v has no shape yet"),
        (
            lambda base: setattr(base.v, "forward", base.v.forward),
            "v has a forward set on the instance, which bypasses skills; delete it",
        ),
        (
            lambda base: setattr(base, "v", nn.MultiheadAttention(D, 2)),
            "no Linear has the name v; the model has .*q",
        ),
    ],
)
def test_a_refused_attach_leaves_the_module_as_it_was(change, message):
    base = net()
    change(base)
    before = anatomy(base)
    with pytest.raises(ValueError, match=message):
        attached(base)
    assert_same(anatomy(base), before)


# ----------------------------------------------------------------------------- threads and warnings


def test_of_two_threads_the_second_is_refused(monkeypatch):
    base, x = net(), source()
    adapters = attached(base)
    computing, refused = threading.Event(), threading.Event()
    found = []
    route = adapters.route

    def slow(*args, **options):
        computing.set()
        assert refused.wait(20)
        return route(*args, **options)

    expected = routed(base)
    monkeypatch.setattr(adapters, "route", slow)
    first = threading.Thread(target=lambda: found.append(routed(base)))
    first.start()
    assert computing.wait(20)
    message = r"routed\(\): routed\(\) is active; leave it first. Threads must take turns"
    with pytest.raises(RuntimeError, match=message):
        with adapters.routed(x.flip(0)):
            pass
    refused.set()
    first.join()
    assert torch.equal(found[0], expected)


class Bypass(Net):
    """A model that reads the weights of its Linears and never calls them."""

    def forward(self, x):
        return self.head(F.linear(x, self.q.weight) * F.linear(x, self.v.weight))


def test_linears_that_a_training_forward_never_calls_are_reported():
    base, x = Bypass(), source()
    adapters = attached(base)
    base.head.requires_grad_()  # otherwise backward itself would fail
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad(), adapters.routed(x):  # no forward, for example to look at w
            pass
        with pytest.raises(KeyError), adapters.routed(x):  # after an error there is no warning
            raise KeyError
    message = r"2 of 2 adapted Linears were not called.*train: q, v"
    with pytest.warns(UserWarning, match=message) as caught:
        with adapters.routed(x):
            base(x).sum().backward()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():  # the warning comes once
        warnings.simplefilter("error")
        with adapters.routed(x):
            base(x)


def test_a_module_of_the_base_whose_name_starts_with_skill_is_frozen_too():
    base = nn.ModuleDict({"skill_head": nn.Linear(4, 4), "q": nn.Linear(4, 4)})
    attach(base, OrchMoEConfig(targets=("q",)))
    assert not any(p.requires_grad for p in base["skill_head"].parameters())
    assert base["q"].skill_A.requires_grad
