"""Skills in the Linear that is there, whatever kind it is, and the verbs: each undoes itself, each is refused
where it makes no sense."""

import contextlib
import copy
import pickle
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import stir
from torch import nn
from torch.nn.utils import parametrizations, prune

import kernels
import orchmoe
from baselines import attach_method
from orchmoe import OrchMoEConfig, SkillLinear, attach

D, B, L = 16, 3, 5
CLOSE = dict(rtol=1e-5, atol=1e-5)
mixes = pytest.mark.parametrize("mix", [kernels.mix_skills, orchmoe.mix_skills], ids=["kernels", "orchmoe"])


class Doubled(nn.Linear):
    """A Linear with a forward of its own."""

    def forward(self, x):
        return 2 * F.linear(x, self.weight, self.bias) + 1


class Int8(nn.Linear):
    """What quantising Linears have in common: whole numbers in `weight`, a scale beside them."""

    def __init__(self):
        super().__init__(D, D)
        whole = (50 * self.weight).round().to(torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)
        self.register_buffer("weight_scale", torch.tensor(1 / 50))

    def forward(self, x):
        return F.linear(x, self.weight.to(x) * self.weight_scale.to(x), self.bias)


class Net(nn.Module):
    """q is adapted, and is what a test makes it; so is v, a plain Linear; the head is not."""

    def __init__(self, q=None):
        super().__init__()
        self.q, self.v, self.head = q or nn.Linear(D, D), nn.Linear(D, D, bias=False), nn.Linear(D, 7)

    def forward(self, x):
        return self.head(F.gelu(self.q(x)) * self.v(x))


def torchao():
    quantization = pytest.importorskip("torchao.quantization")
    one = nn.Sequential(nn.Linear(D, D))
    quantization.quantize_(one, quantization.Int8WeightOnlyConfig())
    return one[0]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def weight_norm():
    return nn.utils.weight_norm(nn.Linear(D, D))


PLAIN = {"plain": lambda: nn.Linear(D, D)}
OTHERS = {"own forward": lambda: Doubled(D, D), "int8": Int8, "torchao": torchao, "weight_norm": weight_norm,
          "parametrized": lambda: parametrizations.weight_norm(nn.Linear(D, D)),
          "pruned": lambda: prune.l1_unstructured(nn.Linear(D, D), "weight", 0.3)}  # fmt: skip
others = pytest.mark.parametrize("kind", OTHERS)
every_kind = pytest.mark.parametrize("kind", PLAIN | OTHERS)
pytestmark = [pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
              pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # fmt: skip


def net(kind="plain"):
    torch.manual_seed(0)
    return Net((PLAIN | OTHERS)[kind]())


def source(samples=B):
    return torch.randn(B, L, D, generator=torch.Generator().manual_seed(1))[:samples]


def attached(base, mix=kernels.mix_skills, **options):
    """Adapters whose B, Z and router all matter."""
    config = OrchMoEConfig(targets=("q", "v"), tasks=5, skills=3, alpha=6.0, **options)
    adapters = attach(base, config, mix, generator=torch.Generator().manual_seed(2))
    stir(adapters, generator := torch.Generator().manual_seed(3))
    if adapters.router is not None:
        nn.init.normal_(adapters.router.task, generator=generator)
    return adapters


def routed(base, x=None, **options):
    x = source() if x is None else x
    with torch.no_grad(), base.skill_adapters.routed(x, **options):
        return base(x)


def skills(linear, x, c):
    """scale * sum_s c_s B_s A_s x, c (B,S)."""
    return linear.skill_scale * torch.einsum("bs,bld,srd,sro->blo", c, x, linear.skill_A, linear.skill_B)


def anatomy(base):
    """All that attach or a verb could leave changed: classes, names, order, values, identity, gradients."""
    classes = [(name, type(module), sorted(vars(module))) for name, module in base.named_modules()]
    parameters = [(name, id(p), p.requires_grad) for name, p in base.named_parameters()]
    values = [(name, value.clone()) for name, value in base.state_dict().items()
              if not nn.parameter.is_lazy(value)]  # fmt: skip
    return classes, parameters, values


def assert_same(found, expected):
    assert found[:2] == expected[:2] and len(found[2]) == len(expected[2])
    for (name, value), (other, wanted) in zip(found[2], expected[2], strict=True):
        assert name == other and same_tensor(value, wanted), name


def same_tensor(a, b):
    """Quantised ones have no equality of their own: by their numbers and scales."""
    inner = a.__tensor_flatten__()[0] if hasattr(a, "__tensor_flatten__") else None
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in inner) if inner else torch.equal(a, b)


# -------------------------------------------------------------------------------- in the Linear that is there


@mixes
@every_kind
def test_a_linear_is_its_own_forward_and_skills(kind, mix):
    twin, base, x = net(kind), net(kind), source()
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
    with_gradient = {name for name, p in base.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient == {name for name, _ in base.named_parameters() if "skill_" in name}


def test_module_weight_and_own_class_stay():
    base = net("own forward")
    q, weight = base.q, base.q.weight
    attached(base)
    assert base.q is q and base.q.weight is weight and isinstance(base.q, Doubled)
    assert isinstance(base.q, SkillLinear) and type(base.v) is SkillLinear


def test_hooks_fire_throughout():
    base, x, fired = net(), source(), []
    base.q.register_forward_pre_hook(lambda module, args: fired.append("pre"))
    base.q.register_forward_hook(lambda module, args, y: fired.append("post"))
    base.q.register_full_backward_hook(lambda module, dx, dy: fired.append("back"))
    base.q._register_state_dict_hook(lambda module, state, prefix, _: fired.append("state"))
    adapters = attached(base)
    w = torch.full((5,), 0.2)

    def passes():
        fired.clear()
        base(x.clone().requires_grad_()).sum().backward()
        base.state_dict()
        return fired == ["pre", "post", "back", "state"]

    for verb in (adapters.routed(w=w), adapters.disabled(), adapters.folded(w)):
        with verb:
            assert passes()
    adapters.detach()
    assert passes()
    attached(base).merge(w)
    assert passes()


def test_a_hook_may_change_what_a_linear_takes_and_gives():
    base, x = net(), source()
    base.q.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    base.q.register_forward_hook(lambda module, args, y: y + 1)
    adapters = attached(base)
    with torch.no_grad(), adapters.routed(x) as routing:
        base.v(x)
        expected = F.linear(2 * x, base.q.weight, base.q.bias) + skills(base.q, 2 * x, routing.c[0]) + 1
        torch.testing.assert_close(base.q(x), expected, **CLOSE)


def test_buffers_and_parameters_of_a_linear_keep_their_names():
    base = net()
    base.q.register_buffer("steps", torch.tensor(3))
    base.q.gain = nn.Parameter(torch.ones(1))
    before = base.state_dict()
    attached(base)
    after = base.state_dict()
    assert before.keys() < after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert "q.gain" not in base.skill_adapters.state_dict()


def test_a_weight_that_trains_gets_its_gradient():
    base, x = net(), source()
    adapters = attached(base)
    base.q.weight.requires_grad_()
    base.v.register_parameter("bias", nn.Parameter(torch.zeros(D)))
    with adapters.routed(x) as routing:
        base(x).square().sum().backward()
    weight, bias = base.q.weight.detach().requires_grad_(), torch.zeros(D, requires_grad=True)
    q = F.linear(x, weight, base.q.bias) + skills(base.q, x, routing.c[0]).detach()
    v = F.linear(x, base.v.weight, bias) + skills(base.v, x, routing.c[1]).detach()
    base.head(F.gelu(q) * v).square().sum().backward()
    torch.testing.assert_close(base.q.weight.grad, weight.grad, **CLOSE)
    torch.testing.assert_close(base.v.bias.grad, bias.grad, **CLOSE)
    assert base.v.weight.grad is None and base.q.skill_B.grad.any()


@every_kind
def test_a_deepcopy_is_a_model_of_its_own(kind):
    base = net(kind)
    attached(base)
    expected = routed(base)
    twin = copy.deepcopy(base)
    with torch.no_grad():
        base.q.skill_B.zero_()
        base.v.weight.zero_()
    assert torch.equal(routed(twin), expected)
    assert twin.skill_adapters.linears["q"] is twin.q is not base.q and type(twin.q) is type(base.q)
    twin.skill_adapters.detach()
    assert not isinstance(twin.q, SkillLinear) and isinstance(base.q, SkillLinear)


@pytest.mark.parametrize("kind", ["plain", "own forward", "int8"])
def test_a_whole_model_is_pickled(kind):
    base = net(kind)
    attached(base)
    twin = pickle.loads(pickle.dumps(base))
    assert torch.equal(routed(twin), routed(base)) and type(twin.q) is type(base.q)
    twin.skill_adapters.detach()
    assert type(twin.q) is type(net(kind).q) and not hasattr(twin, "skill_adapters")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda base: pickle.loads(pickle.dumps(base))])
def test_a_copy_made_inside_routed_is_outside(copied):
    """What is best is saved where it was found: before the batch is left."""
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
    for verb in (adapters.disabled(), adapters.folded(torch.ones(5) / 5)):
        with verb:
            assert all(torch.equal(state[f"p.{name}"], kept) for name, kept in adapters.state_dict().items())
            with pytest.raises(RuntimeError, match="leave it before the module is copied"):
                copied(base)
    assert torch.equal(routed(copied(base)), routed(base))


@pytest.mark.parametrize("router", ["sample", "token"])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_what_trains_is_float32_or_wider_whatever_the_default(default, router):
    base = net()
    try:
        torch.set_default_dtype(default)
        adapters = attached(base, router=router)
    finally:
        torch.set_default_dtype(torch.float32)
    kinds = {p.dtype for p in (*adapters.state_dict().values(), *base.q.skill_parameters().values())}
    assert kinds == {torch.promote_types(default, torch.float32)}


def test_k_means_starts_alike_whatever_the_default_device():
    points = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    expected = orchmoe.spherical_kmeans(points, 3, torch.Generator().manual_seed(1))
    with torch.device("meta"):
        found = orchmoe.spherical_kmeans(points, 3, torch.Generator().manual_seed(1))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("router", ["sample", "token"])
def test_a_change_of_dtype_leaves_what_trains_in_float32(router, dtype):
    base, x = net(), source()
    adapters = attached(base, router=router)
    with adapters.routed(x):
        base(x).sum().backward()  # gradients change with their parameters
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
    base.double()  # wider they may be
    assert {p.dtype for p in base.parameters()} == {torch.float64}


@pytest.mark.parametrize("kind", ["plain", "parametrized"])
def test_one_graph_without_breaks(kind):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    base, x = net(kind), source()
    adapters = attached(base)
    compiled = torch.compile(base, backend="aot_eager", fullgraph=True)
    for sign in (1, -1):  # the second routing is another tensor, not the first one's constant
        found = []
        for function in (base, compiled):
            base.zero_grad()
            with adapters.routed(sign * x):
                (y := function(x)).square().sum().backward()
            found.append([y.detach(), *(p.grad for p in base.parameters() if p.requires_grad)])
        for eager, other in zip(*found, strict=True):
            torch.testing.assert_close(other, eager, **CLOSE)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_a_tied_weight_is_adapted_in_its_linear_alone():
    base = nn.Sequential(nn.Embedding(10, D), nn.Linear(D, 10, bias=False))
    base[1].weight, ids = base[0].weight, torch.arange(10).view(2, 5)
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


def test_a_linear_in_two_places_is_one():
    base = nn.ModuleDict({"q": nn.Linear(D, D)})
    base["v"] = base["q"]
    adapters = attach(base, OrchMoEConfig(targets=("q",)))
    assert list(adapters.linears) == ["q"] and base["v"] is base["q"]
    adapters.detach()
    assert type(base["v"]) is nn.Linear


# ------------------------------------------------------------------------------------------------- the verbs


@every_kind
def test_disabled_is_the_base_bit_for_bit(kind):
    base, x = net(kind), source()
    base(x)  # old weight_norm and prune compute `weight` in a hook
    with torch.no_grad():
        expected = base(x)
    attached(base)
    adapted, before = routed(base), anatomy(base)
    assert not torch.allclose(adapted, expected)
    with torch.no_grad(), base.skill_adapters.disabled():
        assert torch.equal(base(x), expected) and type(base.v) is nn.Linear
        base.skill_adapters.keep(torch.tensor([0]))  # a row that has ended: nothing to drop
    assert torch.equal(routed(base), adapted)
    assert_same(anatomy(base), before)


@mixes
@pytest.mark.parametrize("options", [{}, {"router_norm": "none"}, {"gumbel": True, "router_dropout": 0.5}])
def test_folded_is_routed_for_any_number_of_rows(options, mix):
    base, x = net().eval(), source()
    adapters = attached(base, mix, **options)
    w, one = torch.tensor([0.5, 0.0, 0.2, 0.3, 0.0]), x[:1]
    before = anatomy(base)
    for routing, expected in ({"w": w}, routed(base, w=w)), ({"embeddings": one}, routed(base, one)):
        with torch.no_grad(), adapters.folded(**routing):
            assert type(base.q) is nn.Linear
            torch.testing.assert_close(base(x)[: len(expected)], expected, **CLOSE)
            adapters.keep(torch.tensor([0, 2]))  # a row that has ended: nothing to drop
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
    update = base.q.skill_scale * torch.einsum("s,srd,sro->od", c[0], base.q.skill_A, base.q.skill_B)
    assert folded.dtype == torch.bfloat16
    exact = base.q.weight.float() + update
    assert (folded.float() - exact).abs().max() <= exact.abs().max() * 2**-8


@torch.no_grad()
def test_greedy_tokens_folded_are_those_routed(small_t5, inputs):
    small_t5.float()
    adapters = attach(small_t5, OrchMoEConfig(targets=("all",)), generator=torch.Generator().manual_seed(0))
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
    with adapters.disabled():  # what the skills change shows
        base = small_t5.generate(inputs.input_ids, inputs.attention_mask, max_new_tokens=12,
                                 on_keep=adapters.keep)  # fmt: skip
    assert all(list(row) != base[i, : len(row)].tolist() for i, row in enumerate(found))


@mixes
def test_merge_is_folded_for_good(mix):
    base, x, w = net().eval(), source(), torch.eye(5)[3]
    names, trains = list(base.state_dict()), [p.requires_grad for p in base.parameters()]
    adapters = attached(base, mix)
    expected = routed(base, w=w)
    adapters.merge(w)
    torch.testing.assert_close(base(x), expected, **CLOSE)
    assert list(base.state_dict()) == names and [p.requires_grad for p in base.parameters()] == trains
    assert type(base.q) is nn.Linear and not any("skill" in name for name in (*vars(base.q), *vars(base)))
    for verb in ("routed", "disabled", "folded", "merge", "detach"):
        with pytest.raises(RuntimeError, match="merged or detached"):
            enter(adapters, verb, **given(verb, w))


@every_kind
def test_detach_gives_back_the_module_of_before(kind):
    base, x = net(kind), source()
    base.head.bias.requires_grad_(False)  # the rest trains, this does not: so it is to be again
    with torch.no_grad():
        expected = base(x)
    before = anatomy(base)
    adapters = attached(base)
    with adapters.routed(x):
        base(x).square().sum().backward()
    adapters.detach()
    assert torch.equal(base(x), expected)
    assert_same(anatomy(base), before)
    attached(base)  # nothing is in the way of another
    attached(fresh := net(kind))
    torch.testing.assert_close(routed(base), routed(fresh), **CLOSE)


@pytest.mark.parametrize("verb", ["detach", "merge"])
def test_what_attach_never_saw_is_left_as_it_is(verb):
    base = net()
    base.tied = nn.Linear(D, D, bias=False)
    base.tied.weight = base.v.weight
    adapters = attached(base)
    base.new, base.cold = nn.Linear(7, 2), nn.Linear(7, 2).requires_grad_(False)
    enter(adapters, verb, **given(verb, torch.ones(5) / 5))
    assert {name.partition(".")[0] for name, p in base.named_parameters(remove_duplicate=False)
            if not p.requires_grad} == {"cold"}  # fmt: skip
    assert (base.tied.weight is base.v.weight) == (verb == "detach")


def enter(adapters, verb, **routing):
    """Does a verb, or opens it and leaves."""
    with getattr(adapters, verb)(**routing) or contextlib.nullcontext():
        pass


def given(verb, w):
    return {} if verb in ("disabled", "detach") else {"w": w}


@pytest.mark.parametrize("inner", ["routed", "disabled", "folded", "merge", "detach"])
@pytest.mark.parametrize("outer", ["routed", "disabled", "folded"])
def test_a_verb_inside_another_is_refused_and_changes_nothing(outer, inner):
    base, x, w = net().eval(), source(), torch.eye(5)[3]
    adapters = attached(base)
    expected, before = routed(base), anatomy(base)
    with torch.no_grad(), getattr(adapters, outer)(**given(outer, w)):
        inside, output = anatomy(base), base(x)
        with pytest.raises(RuntimeError, match=rf"^{inner}\(\): {outer}\(\) is already open"):
            enter(adapters, inner, **given(inner, w))
        assert_same(anatomy(base), inside)
        assert torch.equal(base(x), output)
    assert_same(anatomy(base), before)
    assert torch.equal(routed(base), expected)


REFUSED = [  # options of attach, in training, how it is folded, what is named
    ({"router": "token"}, False, {"w": torch.ones(5)}, "a token router every token has a w of its own"),
    ({}, False, {"embeddings": source(2)}, r"one sample or one w \(K,\), not 2"),
    ({}, False, {"w": torch.ones(2, 5)}, r"one sample or one w \(K,\), not 2"),
    ({}, False, {"w": torch.ones(4)}, r"w: \(K,\)"), ({}, False, {}, "embeddings"),
    ({"gumbel": True}, True, {"w": torch.ones(5)}, r"training draws noise; call .eval\(\)"),
    ({"router_dropout": 0.5}, True, {"embeddings": source(1)}, r"training draws noise; call .eval\(\)"),
]  # fmt: skip


def refuses(base, verb, words, **routing):
    before = anatomy(base)
    with pytest.raises(ValueError, match=words):
        enter(base.skill_adapters, verb, **routing)
    assert_same(anatomy(base), before)
    enter(base.skill_adapters, "disabled")  # the door is not left shut


@pytest.mark.parametrize("verb", ["folded", "merge"])
@pytest.mark.parametrize("options, training, routing, words", REFUSED)
def test_what_is_no_one_weight_is_refused(verb, options, training, routing, words):
    base = net()
    attached(base, **options)
    base.train(training)
    refuses(base, verb, words, **routing)


@pytest.mark.parametrize("verb", ["folded", "merge"])
@others
def test_a_fold_of_what_is_no_plain_weight_names_its_linear(kind, verb):
    base = net(kind).eval()
    adapters = attached(base)
    class_before = type(net(kind).q).__name__
    refuses(base, verb, rf"^{verb}\(\): q: a {class_before} computes with more than a plain weight",
            w=torch.ones(5))  # fmt: skip
    assert adapters.unfoldable().startswith("q: ") and not attached(net()).unfoldable()


def test_a_weight_of_whole_numbers_is_not_plain():
    base = net()
    base.q.weight = nn.Parameter(base.q.weight.to(torch.int8), requires_grad=False)
    assert attached(base).unfoldable().startswith("q: a Linear computes with more")


def test_a_second_attach_names_what_is_there_and_changes_nothing():
    base = net()
    attached(base)
    before = anatomy(base)
    head = OrchMoEConfig(targets=("head",))
    for again in (lambda: attached(base), lambda: attach(nn.Sequential(base), head),
                  lambda: attach_method("lora", base, OrchMoEConfig())):  # fmt: skip
        with pytest.raises(ValueError, match=r"module: \S*q has skills already; detach\(\) them"):
            again()
    assert_same(anatomy(base), before)


@pytest.mark.parametrize("spoil, words", [
    (lambda base: setattr(base, "v", nn.LazyLinear(D)), "v has no shape yet"),
    (lambda base: setattr(base.v, "forward", base.v.forward), "v has a forward of its instance"),
    (lambda base: setattr(base, "v", nn.MultiheadAttention(D, 2)), "no Linear is named v"),
])  # fmt: skip
def test_a_refused_attach_leaves_the_module_as_it_was(spoil, words):
    base = net()
    spoil(base)
    before = anatomy(base)
    with pytest.raises(ValueError, match=words):
        attached(base)
    assert_same(anatomy(base), before)


# --------------------------------------------------------------------------------------- threads and warnings


def test_of_two_threads_the_second_is_refused(monkeypatch):
    base, x = net(), source()
    adapters = attached(base)
    computing, refused, found = threading.Event(), threading.Event(), []
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
    with pytest.raises(RuntimeError, match=r"routed\(\): routed\(\) is already open.*threads"):
        with adapters.routed(x.flip(0)):
            pass
    refused.set()
    first.join()
    assert torch.equal(found[0], expected)


class Bypass(Net):
    """Its Linears are never called."""

    def forward(self, x):
        return self.head(F.linear(x, self.q.weight) * F.linear(x, self.v.weight))


def test_linears_that_a_training_forward_never_calls_are_reported():
    base, x = Bypass(), source()
    adapters = attached(base)
    base.head.requires_grad_()  # else backward itself would fail
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad(), adapters.routed(x):  # no forward yet: to look at w, say
            pass
        with pytest.raises(KeyError), adapters.routed(x):  # an error says enough
            raise KeyError
    with pytest.warns(UserWarning, match=r"2 of 2 adapted Linears were not called.*train: q, v") as said:
        with adapters.routed(x):
            base(x).sum().backward()
    assert said[0].filename == __file__
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        with adapters.routed(x):
            base(x)


def test_a_module_of_the_base_that_is_called_skill_is_frozen_too():
    base = nn.ModuleDict({"skill_head": nn.Linear(4, 4), "q": nn.Linear(4, 4)})
    attach(base, OrchMoEConfig(targets=("q",)))
    assert not any(p.requires_grad for p in base["skill_head"].parameters())
    assert base["q"].skill_A.requires_grad
