"""Test skills in Linears of all kinds, and routed, disabled, folded, merge and detach.

What they change comes back in the end, and each is refused where it makes no sense.
"""

import contextlib
import copy
import pickle
import threading
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from helpers import adapted, check_equal, refusal, seeded_generator, stir
from orchmoe import OrchMoEConfig, attach

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


def attached(base, method="orchmoe"):
    """Return adapters of q and v whose outputs depend on B, Z and the router."""
    sizes = {"abstract_tasks": 5, "skills": 3, "alpha": 6.0}
    adapters = adapted(base, method, targets=("q", "v"), **sizes)
    if adapters.router is not None:
        nn.init.normal_(adapters.router.W_task, generator=seeded_generator(3))
    return adapters


@torch.no_grad()
def routed(base, x=X, **options):
    """Return the output of the model for x, routed by x."""
    with base.skill_adapters.routed(x, **options):
        return base(x)


def skills(base, name, x, c):
    """Return scale * sum_s c_s B_s A_s x of the Linear of this name, for c (B,S)."""
    part = base.skill_adapters.skills[name]
    return part.scale * torch.einsum("bs,bld,srd,sro->blo", c, x, part.A, part.B)


class Anatomy(NamedTuple):
    """All that attach or a method of the adapters could leave changed."""

    modules: list  # (name, class, names of the attributes, number of hooks) of each module
    parameters: list  # (name, identity, requires_grad) of each parameter
    values: dict  # a copy of each tensor of the state that is not quantised


def anatomy(base):
    state = base.state_dict().items()
    modules = []
    for name, module in base.named_modules():
        modules.append((name, type(module), sorted(vars(module)), len(module._forward_hooks)))
    return Anatomy(
        modules=modules,
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
            added = skills(base, name, X, c)
            assert added.abs().max() > 0.1
            torch.testing.assert_close(linear(X), twin.get_submodule(name)(X) + added, **CLOSE)
        base(X).square().sum().backward()
    for name, parameter in base.named_parameters():
        has_gradient = parameter.grad is not None and bool(parameter.grad.any())
        assert has_gradient == name.startswith("skill_adapters."), name
    trained = [p for p in base.parameters() if p.requires_grad]
    assert {*adapters.parameters()} == {*trained}


def test_hooks_act_with_skills_and_without():
    """A hook on the output gets it with skills."""
    base, twin = net(), net()
    for model in (base, twin):
        model.q.register_forward_pre_hook(lambda _module, args: (2 * args[0],))
        model.q.register_forward_hook(lambda _module, _args, y: 3 * y)
    adapters = attached(base)
    with adapters.routed(X) as routing:
        base.v(X)
        expected = twin.q(X) + 3 * skills(base, "q", 2 * X, routing.c[0])
        torch.testing.assert_close(base.q(X), expected, **CLOSE)
    with adapters.disabled():
        assert torch.equal(base(X), twin(X))


def pickled(base):
    return pickle.loads(pickle.dumps(base))


COPIES = [copy.deepcopy, pickled]


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_shares_nothing_with_its_original(copied):
    base = net()
    adapters = attached(base)
    expected = routed(base)
    twin = copied(base)
    with torch.no_grad():
        adapters.skills["q"].B.zero_()
        base.v.weight.zero_()
    assert torch.equal(routed(twin), expected)
    assert twin.skill_adapters.linears["q"] is twin.q
    twin.skill_adapters.detach()
    assert not twin.q._forward_hooks and base.q._forward_hooks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["orchmoe", "orchmoe-token"])
def test_a_change_of_dtype_leaves_the_adapters_in_float32(method, dtype):
    base = net()
    adapters = attached(base, method)
    with adapters.routed(X):
        base(X).sum().backward()  # so that there are gradients, which change with their parameters
    before = {name: value.clone() for name, value in adapters.state_dict().items()}
    base.to(dtype)
    check_equal(adapters.state_dict(), before)
    for name, p in base.named_parameters():
        assert p.dtype == (torch.float32 if name.startswith("skill_adapters.") else dtype), name
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
    "method", ["orchmoe", "orchmoe-no-softmax", "orchmoe-gumbel", "orchmoe-factors"]
)
@torch.no_grad()
def test_folded_equals_routed_for_any_number_of_rows(method):
    base = net().eval()
    adapters = attached(base, method)
    one, mask = X[:1], torch.arange(L)[None] < 3
    before = anatomy(base)
    for routing, expected in [
        ({"w": W}, routed(base, w=W)),
        ({"embeddings": one, "mask": mask}, routed(base, one, mask=mask)),
    ]:
        with adapters.folded(**routing):
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
    assert torch.equal(routed(base), expected)


def test_a_fold_of_a_bfloat16_base_is_rounded_once():
    base = net().bfloat16()
    adapters = attached(base)
    with torch.autocast("cpu", torch.bfloat16), adapters.folded(W):
        folded = base.q.weight
    c = adapters.route(w=W).c[0]
    update = skills(base, "q", torch.eye(D)[None], c)[0].T
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
    assert after.modules == before.modules
    assert after.values.keys() == before.values.keys()


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


@pytest.mark.parametrize("inner", ["routed", "disabled", "folded", "merge"])
@pytest.mark.parametrize("outer", ["routed", "disabled", "folded"])
@torch.no_grad()
def test_a_method_inside_another_is_refused_and_changes_nothing(outer, inner):
    base = net()
    adapters = attached(base)
    with getattr(adapters, outer)(**arguments(outer)):
        inside, output = anatomy(base), base(X)
        with pytest.raises(
            RuntimeError, match="is active; leave it first. Threads must take turns"
        ):
            enter(adapters, inner, **arguments(inner))
        assert_same(base, inside)
        assert torch.equal(base(X), output)


def test_two_threads_do_not_route_at_once():
    base = net()
    adapters = attached(base)
    errors = []

    def route():
        try:
            routed(base)
        except RuntimeError as error:
            errors.append(str(error))

    with torch.no_grad(), adapters.routed(X):
        thread = threading.Thread(target=route)
        thread.start()
        thread.join()
    route()
    assert len(errors) == 1 and "Threads must take turns" in errors[0]


# ----------------------------------------------------------------------------------------- refusals

ONE_SAMPLE = r"give one sample or one w \(K,\), not 2"


@pytest.mark.parametrize("method", ["folded", "merge"])
@pytest.mark.parametrize(
    "kind, name, routing, message",
    [
        ("plain", "orchmoe-token", {}, "every token has its own c"),
        ("plain", "orchmoe", {"embeddings": X[:2]}, ONE_SAMPLE),
        ("plain", "orchmoe", {"w": torch.ones(2, 5)}, ONE_SAMPLE),
        ("own forward", "orchmoe", {"w": W}, "q: this Squared computes more than a plain product"),
        ("pruned", "orchmoe", {"w": W}, "q: this Linear computes more than a plain product"),
        ("parametrized", "orchmoe", {"w": W}, "q: this ParametrizedLinear computes more"),
    ],
)
def test_a_routing_that_no_single_weight_has_is_refused(method, kind, name, routing, message):
    base = net(kind)
    adapters = attached(base, name)
    before = anatomy(base)
    with refusal(message):
        enter(adapters, method, **routing)
    assert_same(base, before)
    enter(adapters, "disabled")  # the refused method is no longer active


def test_a_weight_of_integers_is_not_folded():
    base = net()
    base.q.weight = nn.Parameter(base.q.weight.to(torch.int8), requires_grad=False)
    with refusal("q: this Linear computes more than a plain product"):
        attached(base).merge(W)


@pytest.mark.parametrize(
    "change", [attached, lambda base: base.q.compile(), lambda base: torch.compile(base)]
)
def test_attach_refuses_a_module_that_has_adapters_or_is_compiled(change):
    base = net()
    compiled = change(base)
    module = compiled if isinstance(compiled, torch._dynamo.OptimizedModule) else base
    before = anatomy(module)
    with refusal("module: attach once, and before torch.compile"):
        attach(module, OrchMoEConfig(targets=("head",)))
    assert_same(module, before)


@pytest.mark.parametrize(
    "make, targets, message",
    [
        (net, ("q", "value"), "no Linear has the name value; the model has head, q, v$"),
        (net, ("all", "lm_haed"), "no Linear has the name lm_haed"),
        (nn.Identity, ("all",), "no Linear has the name .*; the model has none"),
    ],
)
def test_attach_refuses_what_it_cannot_adapt(make, targets, message):
    base = nn.Sequential(make())
    before = anatomy(base)
    with refusal(message):
        attach(base, OrchMoEConfig(targets=targets))
    assert_same(base, before)


@pytest.mark.parametrize("training", [True, False])
def test_a_transformer_layer_computes_with_its_skills(training):
    """Without gradients torch has a fast path for it, which reads the weights of its Linears."""
    layer = nn.TransformerEncoderLayer(D, 2, 8, dropout=0.0, batch_first=True).train(training)
    with torch.set_grad_enabled(training):
        before = layer(X)
        adapters = adapted(layer, targets=("linear1", "linear2"))
        with adapters.routed(X):
            assert not torch.allclose(layer(X), before, atol=0.01)
        with adapters.disabled():
            torch.testing.assert_close(layer(X), before, **CLOSE)


def test_an_attention_that_bypasses_its_adapted_linear_is_reported():
    attention = nn.MultiheadAttention(D, 2, batch_first=True)
    adapters = adapted(attention, targets=("out_proj",))
    with pytest.warns(UserWarning, match="1 of 1 adapted Linears were not called"):
        with adapters.routed(X):
            attention(X, X, X)


def test_a_parameter_without_a_learning_rate_is_refused():
    adapters = attached(net())
    adapters.table = nn.Parameter(torch.ones(1))
    with refusal("OrchMoE.rates: table needs one of skills, router, token_router, allocation"):
        adapters.parameter_groups()
