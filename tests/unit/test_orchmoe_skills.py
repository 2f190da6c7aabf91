"""Test skills in Linears of all kinds, and routed, disabled, folded, merge and detach.

What they change comes back in the end, and each is refused where it makes no sense.
"""

import contextlib
import copy
import pickle
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from helpers import adapted, check_equal, refusal, seeded_generator, stir
from orchmoe import OrchMoEConfig, SkillLinear, attach

D, B, L = 16, 3, 5
X = torch.randn(B, L, D, generator=seeded_generator(1))  # a batch, and its own embeddings
W = torch.tensor([0.5, 0.0, 0.2, 0.3, 0.0])
CLOSE = dict(rtol=1e-5, atol=1e-5)


class Squared(nn.Linear):
    """A Linear with a forward of its own."""

    def forward(self, x):
        return super().forward(x).square()


class Net(nn.Module):
    """A model with three Linears: q, of a kind that the test chooses, v and head.

    q and v are adapted; head is not.
    """

    def __init__(self, q):
        super().__init__()
        self.q = q
        self.v = nn.Linear(D, D, bias=False)
        self.head = nn.Linear(D, 7)

    def forward(self, x):
        return self.head(F.gelu(self.q(x)) * self.v(x))


def torchao(linear=None):
    """Return a Linear, a new one if none is given, with a weight that torchao has quantised."""
    quantization = pytest.importorskip("torchao.quantization")
    wrapper = nn.Sequential(linear or nn.Linear(D, D))
    quantization.quantize_(wrapper, quantization.Int8WeightOnlyConfig())
    return wrapper[0]


KINDS = {
    "plain": lambda: nn.Linear(D, D),
    "own forward": lambda: Squared(D, D),
    "torchao": torchao,
    "parametrized": lambda: parametrizations.weight_norm(nn.Linear(D, D)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(D, D), "weight", 0.3),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def net(kind="plain"):
    torch.manual_seed(0)
    return Net(KINDS[kind]())


def attached(base, **options):
    """Return adapters of q and v whose outputs depend on B, Z and the router."""
    sizes = {"abstract_tasks": 5, "skills": 3, "alpha": 6.0}
    adapters = adapted(base, targets=("q", "v"), **sizes, **options)
    if adapters.router is not None:
        nn.init.normal_(adapters.router.W_task, generator=seeded_generator(3))
    return adapters


@torch.no_grad()
def routed(base, x=X, **options):
    """Return the output of the model for x, routed by x."""
    with base.skill_adapters.routed(x, **options):
        return base(x)


def skills(linear, x, c):
    """Return scale * sum_s c_s B_s A_s x for c (B,S)."""
    A, B = linear.skill_A, linear.skill_B
    return linear.skill_scale * torch.einsum("bs,bld,srd,sro->blo", c, x, A, B)


class Anatomy(NamedTuple):
    """All that attach or a method of the adapters could leave changed."""

    classes: list  # (name, class, names of the attributes) of each module
    parameters: list  # (name, identity, requires_grad) of each parameter
    values: dict  # a copy of each tensor of the state that is not quantised


def anatomy(base):
    modules = base.named_modules()
    state = base.state_dict().items()
    return Anatomy(
        classes=[(name, type(module), sorted(vars(module))) for name, module in modules],
        parameters=[(name, id(p), p.requires_grad) for name, p in base.named_parameters()],
        values={name: value.clone() for name, value in state if type(value) is torch.Tensor},
    )


def assert_same(base, expected):
    found = anatomy(base)
    assert found[:2] == expected[:2]
    check_equal(found.values, expected.values)


# ------------------------------------------------------------------- skills in Linears of all kinds


@every_kind
def test_a_linear_returns_its_own_output_plus_the_skills_and_only_they_train(kind):
    twin, base = net(kind), net(kind)
    adapters = attached(base)
    with adapters.routed(X) as routing:
        for (name, linear), c in zip(adapters.linears.items(), routing.c, strict=True):
            added = skills(linear, X, c)
            assert added.abs().max() > 0.1
            torch.testing.assert_close(linear(X), twin.get_submodule(name)(X) + added, **CLOSE)
        base(X).square().sum().backward()
    for name, parameter in base.named_parameters():
        has_gradient = parameter.grad is not None and bool(parameter.grad.any())
        assert has_gradient == ("skill_" in name), name


def test_hooks_act_with_skills_and_without():
    base, twin = net(), net()
    for model in (base, twin):
        model.q.register_forward_pre_hook(lambda _module, args: (2 * args[0],))
        model.q.register_forward_hook(lambda _module, _args, y: y + 1)
    adapters = attached(base)
    with adapters.routed(X) as routing:
        base.v(X)
        expected = twin.q(X) + skills(base.q, 2 * X, routing.c[0])
        torch.testing.assert_close(base.q(X), expected, **CLOSE)
    with adapters.disabled():
        assert torch.equal(base(X), twin(X))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_weight_that_trains_gets_its_gradient(name):
    base, twin = net(), net()
    adapters = attached(base)
    base.q.get_parameter(name).requires_grad_()
    with adapters.routed(X) as routing:
        base.v(X)
        base.q(X).square().sum().backward()
    (twin.q(X) + skills(base.q, X, routing.c[0]).detach()).square().sum().backward()
    expected = twin.q.get_parameter(name).grad
    torch.testing.assert_close(base.q.get_parameter(name).grad, expected, **CLOSE)


def pickled(base):
    return pickle.loads(pickle.dumps(base))


COPIES = [(copy.deepcopy, kind) for kind in KINDS]
COPIES += [(pickled, "plain"), (pickled, "own forward")]


@pytest.mark.parametrize("copied, kind", COPIES)
def test_a_copy_shares_nothing_with_its_original(copied, kind):
    base = net(kind)
    attached(base)
    expected = routed(base)
    twin = copied(base)
    with torch.no_grad():
        base.q.skill_B.zero_()
        base.v.weight.zero_()
    assert torch.equal(routed(twin), expected)
    assert twin.skill_adapters.linears["q"] is twin.q and type(twin.q) is type(base.q)
    twin.skill_adapters.detach()
    assert not isinstance(twin.q, SkillLinear) and isinstance(base.q, SkillLinear)


def test_a_copy_of_a_compiled_linear_is_not_compiled():
    """torch leaves the compiled call, which is that of the original, out of every copy."""
    base = net()
    attached(base)
    base.q.compile(backend="eager")
    torch.testing.assert_close(routed(copy.deepcopy(base)), routed(base), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("router", ["sample", "token"])
def test_a_change_of_dtype_leaves_the_adapters_in_float32(router, dtype):
    base = net()
    adapters = attached(base, router=router)
    with adapters.routed(X):
        base(X).sum().backward()  # so that there are gradients, which change with their parameters
    before = {name: value.clone() for name, value in adapters.state_dict().items()}
    base.to(dtype)
    check_equal(adapters.state_dict(), before)
    for name, p in base.named_parameters():
        assert p.dtype == (torch.float32 if "skill_" in name else dtype), name
        assert p.grad is None or p.grad.dtype == p.dtype, name
    assert routed(base, X.to(dtype)).dtype == dtype


def test_a_tied_weight_is_adapted_only_in_its_linear():
    base = nn.Sequential(nn.Embedding(10, D), nn.Linear(D, 10, bias=False))
    base[1].weight = base[0].weight
    ids = torch.arange(10).view(2, 5)
    adapters = attach(base, OrchMoEConfig(targets=("1",), abstract_tasks=5))
    stir(adapters, seeded_generator())
    with adapters.routed(w=W):
        adapted = base(ids)
    with adapters.folded(W):
        torch.testing.assert_close(base(ids), adapted, **CLOSE)
    assert base[1].weight is base[0].weight


# --------------------------------------------------------------- disabled, folded, merge and detach


def arguments(method):
    return {} if method in ("disabled", "detach") else {"w": W}


def enter(adapters, method, **routing):
    """Call a method of the adapters. If it returns a context, enter and leave it."""
    with getattr(adapters, method)(**routing) or contextlib.nullcontext():
        pass


@every_kind
@torch.no_grad()
def test_disabled_is_the_base_bit_for_bit(kind):
    base = net(kind)
    expected = base(X)
    adapters = attached(base)
    before = anatomy(base)
    with adapters.disabled():
        assert torch.equal(base(X), expected)
        adapters.keep(torch.tensor([0]))  # does nothing, because nothing is routed
    assert_same(base, before)


@pytest.mark.parametrize(
    "options", [{}, {"router_norm": "none"}, {"gumbel": True}, {"mixing": "factors"}]
)
@torch.no_grad()
def test_folded_equals_routed_for_any_number_of_rows(options):
    base = net().eval()
    adapters = attached(base, **options)
    one, mask = X[:1], torch.arange(L)[None] < 3
    before = anatomy(base)
    for routing, expected in [
        ({"w": W}, routed(base, w=W)),
        ({"embeddings": one, "mask": mask}, routed(base, one, mask=mask)),
    ]:
        with adapters.folded(**routing):
            assert type(base.q) is nn.Linear
            torch.testing.assert_close(base(X)[: len(expected)], expected, **CLOSE)
            adapters.keep(torch.tensor([0, 2]))  # does nothing, because all rows are alike
        assert_same(base, before)


@pytest.mark.parametrize("method", ["routed", "disabled", "folded"])
def test_a_method_is_undone_after_an_error_inside(method):
    base = net()
    adapters = attached(base)
    expected, before = routed(base), anatomy(base)
    with pytest.raises(KeyError), getattr(adapters, method)(**arguments(method)):
        raise KeyError
    assert_same(base, before)
    with pytest.raises(RuntimeError, match="outside"):
        base(X)
    with pytest.raises(RuntimeError, match="inside"):
        adapters.routing()
    assert torch.equal(routed(base), expected)


def test_a_fold_of_a_bfloat16_base_is_rounded_once():
    base = net().bfloat16()
    adapters = attached(base)
    with torch.autocast("cpu", torch.bfloat16), adapters.folded(W):
        folded = base.q.weight
    c = adapters.route(w=W).c[0]
    update = skills(base.q, torch.eye(D)[None], c)[0].T
    exact = base.q.weight.float() + update
    assert folded.dtype == torch.bfloat16
    torch.testing.assert_close(folded.float(), exact, rtol=2**-8, atol=0)


def test_merge_folds_for_good():
    base = net()
    before = anatomy(base)
    adapters = attached(base)
    expected = routed(base, w=W)
    adapters.merge(W)
    torch.testing.assert_close(base(X), expected, **CLOSE)
    after = anatomy(base)
    assert after.classes == before.classes
    assert after.values.keys() == before.values.keys()
    for method in ("routed", "disabled", "folded", "merge", "detach"):
        with pytest.raises(RuntimeError, match="merged or detached"):
            enter(adapters, method, **arguments(method))
    with pytest.raises(RuntimeError, match="merged or detached"):
        adapters.state_dict()  # it would lack the skills


@every_kind
def test_detach_restores_the_module(kind):
    base = net(kind)
    base.head.bias.requires_grad_(False)  # it must not train after detach, while the rest must
    expected, before = base(X), anatomy(base)
    adapters = attached(base)
    adapted = routed(base)
    adapters.detach()
    assert torch.equal(base(X), expected)
    assert_same(base, before)
    attached(base)  # the module can be adapted again
    assert torch.equal(routed(base), adapted)


def test_a_compiled_model_has_the_names_of_its_original():
    base, twin = net(), net()
    compiled = torch.compile(base, backend="eager")
    adapters = attached(compiled)
    assert adapters.state_dict().keys() == attached(twin).state_dict().keys()
    expected = routed(compiled, w=W)
    torch.testing.assert_close(expected, routed(twin, w=W), **CLOSE)
    adapters.merge(W)
    torch.testing.assert_close(compiled(X), expected, **CLOSE)


@pytest.mark.parametrize("method", ["detach", "merge"])
def test_modules_added_after_attach_are_left_unchanged(method):
    base = net()
    base.tied = nn.Linear(D, D, bias=False)
    base.tied.weight = base.v.weight
    adapters = attached(base)
    base.new = nn.Linear(7, 2)
    base.frozen = nn.Linear(7, 2).requires_grad_(False)
    enter(adapters, method, **arguments(method))
    for name, parameter in base.named_parameters(remove_duplicate=False):
        assert parameter.requires_grad == (not name.startswith("frozen.")), name
    assert (base.tied.weight is base.v.weight) == (method == "detach")


@pytest.mark.parametrize("inner", ["routed", "disabled", "folded", "merge", "detach"])
@pytest.mark.parametrize("outer", ["routed", "disabled", "folded"])
@torch.no_grad()
def test_a_method_inside_another_is_refused_and_changes_nothing(outer, inner):
    base = net()
    adapters = attached(base)
    with getattr(adapters, outer)(**arguments(outer)):
        inside, output = anatomy(base), base(X)
        message = rf"^{inner}\(\): {outer}\(\) is active; leave it first. Threads must take turns"
        with pytest.raises(RuntimeError, match=message):
            enter(adapters, inner, **arguments(inner))
        assert_same(base, inside)
        assert torch.equal(base(X), output)


@pytest.mark.parametrize("method", ["routed", "disabled", "folded"])
@torch.no_grad()
def test_a_model_is_not_copied_inside_a_method(method):
    base = net()
    with getattr(attached(base), method)(**arguments(method)):
        message = rf"^{method}\(\): leave it before the model is copied"
        with pytest.raises(RuntimeError, match=message):
            copy.deepcopy(base)


CHANGES = {
    "torchao": torchao,
    "weight_norm": parametrizations.weight_norm,
    "weight_norm and bias": lambda linear: parametrizations.spectral_norm(
        parametrizations.weight_norm(linear), "bias"
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_linear_may_be_changed_after_attach(change):
    twin, base = net(), net()
    change(twin.q)
    adapters = attached(base)
    change(base.q)
    x = X.clone().requires_grad_()  # so that a gradient flows through the weight
    with adapters.routed(x) as routing:
        added = skills(base.q, x, routing.c[0])
        torch.testing.assert_close(base.q(x), twin.q(x) + added, **CLOSE)
        base(x).sum().backward()
    assert x.grad.any()
    torch.testing.assert_close(routed(copy.deepcopy(base)), routed(base))
    with adapters.disabled():
        torch.testing.assert_close(base(X), twin(X))
        assert type(base.q).__name__ == type(twin.q).__name__
    adapters.detach()
    torch.testing.assert_close(base(X), twin(X))
    if parametrize.is_parametrized(base.q):
        for name in list(base.q.parametrizations):
            parametrize.remove_parametrizations(base.q, name)
        torch.testing.assert_close(base(X), twin(X))
    assert type(base.q) is nn.Linear


# ----------------------------------------------------------------------------------------- refusals

ONE_SAMPLE = r"give one sample or one w \(K,\), not 2"
NOISE = r"training draws noise; call .eval\(\)"


@pytest.mark.parametrize("method", ["folded", "merge"])
@pytest.mark.parametrize(
    "kind, options, routing, message",
    [
        ("plain", {"router": "token"}, {"w": W}, "every token has its own w"),
        ("plain", {}, {"embeddings": X[:2]}, ONE_SAMPLE),
        ("plain", {}, {"w": torch.ones(2, 5)}, ONE_SAMPLE),
        ("plain", {"gumbel": True}, {"w": W}, NOISE),
        ("own forward", {}, {"w": W}, "q: this Squared or its weight computes more than a plain"),
        ("pruned", {}, {"w": W}, "q: this Linear or its weight computes more"),
    ],
)
def test_a_routing_that_no_single_weight_has_is_refused(method, kind, options, routing, message):
    base = net(kind)
    adapters = attached(base, **options)
    before = anatomy(base)
    with refusal(rf"^{method}\(\): .*{message}"):
        enter(adapters, method, **routing)
    assert_same(base, before)
    enter(adapters, "disabled")  # the refused method is no longer active


NOT_PLAIN = "q: this Linear or its weight computes more than a plain product"


def test_a_weight_that_is_an_integer_or_pruned_after_attach_is_not_plain():
    base = net()
    base.q.weight = nn.Parameter(base.q.weight.to(torch.int8), requires_grad=False)
    assert attached(base).unfoldable() == NOT_PLAIN
    base = net()
    adapters = attached(base)
    prune.l1_unstructured(base.q, "weight", 0.5)
    assert adapters.unfoldable() == NOT_PLAIN


def test_attach_is_refused_where_the_linears_have_their_own_class():
    base = net()
    with attached(base).disabled():
        with refusal(r"q has skills already; detach\(\) them first"):
            attach(base, OrchMoEConfig(targets=("head",)))


@pytest.mark.parametrize(
    "make, targets, message",
    [
        (net, ("q", "value"), "no Linear has the name value; the model has head, q, v$"),
        (net, ("all", "lm_haed"), "no Linear has the name lm_haed"),
        (nn.Identity, ("all",), "no Linear has the name .*; the model has none"),
        (lambda: nn.MultiheadAttention(4, 2), ("out_proj",), "0.out_proj: .* bypass"),
        (lambda: nn.TransformerEncoderLayer(4, 2), ("linear1",), "0.linear1: .* bypass"),
    ],
)
def test_attach_refuses_what_it_cannot_adapt(make, targets, message):
    base = nn.Sequential(make())
    before = anatomy(base)
    with refusal(message):
        attach(base, OrchMoEConfig(targets=targets))
    assert_same(base, before)


def test_adapters_that_were_frozen_after_attach_are_refused():
    """peft freezes every parameter of a model, also those that it did not make."""
    base = net()
    adapters = attached(base)
    base.requires_grad_(False)
    with refusal("all parameters of the adapters are frozen; attach them"):
        adapters.parameter_groups()


def test_linears_must_not_share_a_parameter():
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    adapters = attach(base, OrchMoEConfig(targets=("0", "1")))
    base[1].skill_A = base[0].skill_A
    with refusal("two Linears train the same parameter"):
        adapters.parameter_groups()
