"""Compiled blocks: the same numbers, and few graphs without breaks for any sequence of batches.

If torch cannot compile, or hits a limit, training goes on uncompiled, after one warning.
"""

import copy
import functools
import warnings

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.utils import fresh_cache
from torch.utils.checkpoint import checkpoint

import kernels
import orchmoe
import run_folder
import train
from baselines import load_method
from helpers import (
    ROOT,
    SHORT,
    adapted,
    random_batch,
    run,
    small_model,
    trace,
)
from model import Backbone

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def base_in_training(family="v1.1", method="orchmoe", **options):
    """Return a base with adapters."""
    base = small_model(family)
    adapted(base, method, **options)
    return base.double().train()


# Rows, the longest source and the longest target. Sizes of 1, equal sizes, a short last batch.
BATCHES = [(4, 9, 6), (1, 5, 3), (8, 8, 8), (3, 1, 2), (3, 4, 1), (1, 1, 1), (1, 7, 9), (2, 2, 2)]


def losses_and_gradients(base, batches):
    """Return the losses and gradients of several batches, with evaluations between them."""
    adapters = base.skill_adapters
    parameters = sum(adapters.parameter_groups().values(), [])
    found = []
    for rows, source, target in batches:
        ids, mask, labels = random_batch(10, 37, [source] * rows, [target] * rows)
        with adapters.routed(base.embed(ids), mask):
            loss = base.loss(ids, mask, labels)
            found += [loss, *torch.autograd.grad(loss, parameters, allow_unused=True)]

        base.eval()
        with torch.no_grad(), adapters.routed(base.embed(ids), mask):
            found.append(base.loss(ids, mask, labels))
            found.append(base.generate(ids, mask, max_new_tokens=2, on_keep=adapters.keep))
        base.train()
    return found


def check(base, backend, batches=BATCHES, checkpointed=False):
    """Require the numbers of the uncompiled base. Return the number of graphs."""
    expected = losses_and_gradients(copy.deepcopy(base), batches)
    base.checkpoint_blocks = checkpointed
    base.compile_blocks(backend)
    torch.testing.assert_close(losses_and_gradients(base, batches), expected, rtol=1e-6, atol=1e-8)
    return counters["stats"]["unique_graphs"]


HYDRA_LORA = load_method(f"{ROOT / 'examples/hydra_lora.py'}:HydraLoRA")
CASES = [  # family, method, router, checkpointed, backend
    ("v1.1", "orchmoe", "sample", True, "eager"),  # dynamo alone, in a quarter of the time
    ("qwen3", "orchmoe", "token", True, "eager"),
    ("v1.1", HYDRA_LORA, "sample", True, "eager"),
    pytest.param("v1.1", "lora", "sample", False, "inductor", marks=pytest.mark.slow),
]


@pytest.mark.filterwarnings("error:no further blocks are compiled")
@pytest.mark.parametrize("family, method, router, checkpointed, backend", CASES)
def test_few_graphs_serve_all_batches(family, method, router, checkpointed, backend):
    base = base_in_training(family, method, router=router, targets=("q",), alpha=3.0)
    graphs = check(base, backend, checkpointed=checkpointed)
    kinds = 2 if family == "v1.1" else 1  # encoder and decoder
    assert 0 < graphs <= 2 * kinds  # for one row and for more


@pytest.mark.parametrize("mix", [kernels.mix_skills, orchmoe.mix_factors])
def test_the_scale_is_a_constant_of_the_graph(mix):
    """As an input it would be a number on the CPU, with a kernel of its own in each step."""
    shapes = []

    def backend(graph, inputs):
        shapes.extend(tensor.shape for tensor in inputs if isinstance(tensor, torch.Tensor))
        return graph

    base = base_in_training(alpha=3.0)
    for linear in base.skill_adapters.linears.values():
        linear.skill_mix = mix
    check(base, backend, BATCHES[:1])
    assert len(shapes) > 0 and () not in shapes


def test_a_copy_of_a_compiled_model_is_not_compiled():
    base = base_in_training()
    base.compile_blocks("eager")
    losses_and_gradients(copy.deepcopy(base), BATCHES[:1])
    assert counters["stats"]["unique_graphs"] == 0


def settings_of_torch():
    """Return the settings that compiled blocks need."""
    return [
        torch.fx.experimental._config.use_duck_shape,
        torch._dynamo.config.specialize_float,
        torch._functorch.config.force_non_lazy_backward_lowering,
    ]


def test_settings_of_torch_change_only_while_a_compiled_block_runs():
    """Otherwise other code of the process would be compiled differently."""
    inside = []

    def backend(graph, inputs):
        inside.append(settings_of_torch())
        return graph

    before = settings_of_torch()
    block = torch.nn.Linear(4, 4)
    kernels.compile_blocks([block], backend)
    block(torch.ones(2, 3, 4, requires_grad=True))
    assert inside == [[False, True, True]]
    assert settings_of_torch() == before


# ------------------------------------------------------------------------ what torch cannot compile


def fails(graph, inputs):
    raise NotImplementedError("no such kernel")


def boxed(graph, inputs):
    return make_boxed_func(graph)


def fails_backward(graph, inputs):
    compile_graph = aot_autograd(fw_compiler=boxed, bw_compiler=fails)
    return compile_graph(graph, inputs)


@pytest.mark.parametrize("backend, checkpointed", [("eager", True), (fails_backward, False)])
def test_training_goes_on_uncompiled_with_one_warning(backend, checkpointed):
    base = base_in_training()
    with (
        torch._dynamo.config.patch(recompile_limit=1),
        pytest.warns(UserWarning, match="^no further blocks are compiled: .*$") as seen,
    ):
        check(base, backend, [(4, 9, 6), (1, 5, 3)], checkpointed)
    assert len(seen) == 1


def test_blocks_that_ran_compiled_stay_so_when_another_fails():
    """Checkpointing runs them again in backward, and needs the tensors that they saved."""
    graphs = []

    def fails_at_the_second_graph(graph, inputs):
        graphs.append(graph)
        if len(graphs) == 2:
            fails(graph, inputs)
        partition = min_cut_rematerialization_partition  # as in inductor
        compile_graph = aot_autograd(fw_compiler=boxed, bw_compiler=boxed, partition_fn=partition)
        return compile_graph(graph, inputs)

    blocks = []
    for activation in (torch.nn.GELU, torch.nn.GELU, torch.nn.Tanh, torch.nn.Tanh):
        blocks.append(torch.nn.Sequential(torch.nn.Linear(4, 4), activation()))
    x = torch.randn(2, 3, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(torch.nn.Sequential(*blocks)(x).sum(), x)

    kernels.compile_blocks(blocks, fails_at_the_second_graph)
    texts = []
    for _ in range(2):
        y = x
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for block in blocks:
                y = checkpoint(block, y, use_reentrant=False)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected)
        texts += [str(warning.message) for warning in seen]
    assert len(texts) == 1 and texts[0].startswith("no further blocks are compiled: ")


def test_an_error_of_a_block_itself_does_not_end_compilation():
    block = torch.nn.Sequential(torch.nn.Linear(4, 4))
    adapters = orchmoe.attach(block, orchmoe.OrchMoEConfig(targets=("0",)))
    kernels.compile_blocks([block], "eager")
    x = torch.randn(2, 3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="called outside"):
        block(x)
    with adapters.routed(x):
        block(x)
    assert counters["stats"]["unique_graphs"] == 1


def test_training_goes_on_without_a_compiler():
    block = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())
    kernels.compile_blocks([block])
    x = torch.randn(2, 3, 4, requires_grad=True)
    with (
        fresh_cache(),
        torch._inductor.config.patch({"cpp.cxx": (None, "/no/compiler")}),
        pytest.warns(
            UserWarning, match=r"no further blocks are compiled: .*No working C\+\+ compiler"
        ),
    ):
        block(x).sum().backward()


# -------------------------------------------------------------------------- --compile of train.py


def test_the_choice_is_saved_and_only_a_flag_changes_it(copied):
    assert run_folder.read_run(copied).settings.compile == "off"
    launch = train.LaunchConfig(out=str(copied), resume=True)
    assert train.read_settings({}, launch).compile == "off"
    assert train.read_settings({"compile": "on"}, launch).compile == "on"


@pytest.mark.slow
def test_a_run_with_compiled_blocks_is_the_same_run(tmp_path, monkeypatch):
    eager = functools.partialmethod(Backbone.compile_blocks, "eager")
    monkeypatch.setattr(Backbone, "compile_blocks", eager)

    def losses(name, flags=""):
        run(f"train.py {SHORT} --steps 4 {flags} --out {name}")
        return [row[1] for row in trace(tmp_path / name)]

    assert losses("compiled", "--compile on") == pytest.approx(losses("plain"), rel=1e-6)
    assert counters["stats"]["unique_graphs"] > 0
