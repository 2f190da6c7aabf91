"""Test orchmoe.py in T5 and Llama of transformers, and run the snippets of the pages.

The reference is a model that is merged or folded for one sample, since it has plain Linears and
none of our code in its forward.
"""

import functools
import shutil
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import kernels
from helpers import (
    ROOT,
    check_equal,
    hf_llama,
    seeded_generator,
    snippets,
    stir,
    text_of,
    write_words,
)
from orchmoe import OrchMoEConfig, attach

transformers = pytest.importorskip("transformers")

ROWS = [0, 1, 2]
# Padded on the left.
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]])
CLOSE = dict(rtol=1e-5, atol=1e-5)  # for different orders of summation in float32


def random_ids(length, seed):
    return torch.randint(3, 97, (3, length), generator=seeded_generator(seed))


class Case(NamedTuple):
    """A model, and three samples for it."""

    base: nn.Module
    targets: tuple[str, ...]
    source: dict[str, torch.Tensor]  # arguments of generate
    inputs: dict[str, torch.Tensor]  # arguments of forward

    def router_input(self, rows=ROWS):
        """Return the arguments of `routed`, `folded` and `merge` for the samples of these rows."""
        embeddings = self.base.get_input_embeddings()(self.source["input_ids"][rows])
        return {"embeddings": embeddings, "mask": self.source["attention_mask"][rows]}

    def logits(self, base, rows=ROWS):
        return base(**{name: tensor[rows] for name, tensor in self.inputs.items()}).logits

    def generate(self, rows=ROWS, **options):
        """Return twelve new tokens for each row."""
        source = {name: tensor[rows] for name, tensor in self.source.items()}
        length = dict(max_new_tokens=12, min_new_tokens=12, pad_token_id=0)
        return self.base.generate(**source, **length, **options)[:, -12:]


def t5():
    kind = transformers.T5ForConditionalGeneration
    options = dict(num_layers=1, num_decoder_layers=1, dropout_rate=0.0, dtype=torch.float32)
    base = kind.from_pretrained(ROOT / "tiny", **options)
    mask = MASK.flip(1)
    source = {"input_ids": random_ids(6, 0) * mask, "attention_mask": mask}
    inputs = source | {"decoder_input_ids": random_ids(5, 1)}
    return Case(base, ("q", "v", "wo"), source, inputs)


def llama():
    source = {"input_ids": random_ids(6, 0) * MASK, "attention_mask": MASK}
    answer = random_ids(5, 1)
    inputs = {
        "input_ids": torch.cat([source["input_ids"], answer], 1),
        "attention_mask": torch.cat([MASK, torch.ones_like(answer)], 1),
    }
    return Case(hf_llama("llama2"), ("q_proj", "v_proj", "down_proj"), source, inputs)


def attached(case):
    """Return adapters that change the outputs a lot, and differently for each sample."""
    config = OrchMoEConfig(targets=case.targets, abstract_tasks=5, skills=3, alpha=4.0)
    adapters = attach(case.base.eval(), config, generator=seeded_generator(2))
    stir(adapters, seeded_generator(3))
    # fit_router would refuse three samples, because they are fewer than K.
    x_hat = adapters.router.summarise(**case.router_input())
    adapters.router.fit(x_hat, seeded_generator(4))
    return adapters


def gradients(case, adapters, base):
    """Return the gradients of all adapter parameters by name."""
    case.base.zero_grad()
    with adapters.routed(**case.router_input()):
        case.logits(base).float().square().mean().backward()
    return {name: p.grad for name, p in adapters.named_parameters()}


def assert_close(found, expected):
    for name, gradient in expected.items():
        assert gradient.any(), name
        torch.testing.assert_close(found[name], gradient, **CLOSE)


def test_all_leaves_the_output_head_as_it_is():
    """test_llama.py attaches to a base that is not wrapped."""
    base = llama().base
    adapters = attach(nn.Sequential(base), OrchMoEConfig(targets=("all",)))
    linears = [module for module in base.modules() if isinstance(module, nn.Linear)]
    assert [module for module in linears if module not in adapters.linears.values()] == [
        base.lm_head
    ]


# ------------------------------------------------------------------------------- samples of a batch


@pytest.mark.parametrize("make", [t5, llama])
def test_routed_sample_is_generated_as_by_the_model_folded_for_it(make):
    case = make()
    adapters = attached(case)
    with adapters.routed(**case.router_input(), beams=3):
        together = case.generate(num_beams=3)
    for row in ROWS:
        with adapters.folded(**case.router_input([row])):
            alone = case.generate([row], num_beams=3)
        assert torch.equal(together[row], alone[0])
    assert len(together.unique(dim=0)) == 3


# ------------------------------------------------------------------- checkpointing, compilation


def test_compiled_model_is_one_graph_with_the_same_gradients(fresh_dynamo):
    """tests/unit/test_compile.py also tests other backends, and a token router."""
    case = t5()
    adapters = attached(case)
    case.base.train()
    compiled = torch.compile(case.base, backend="eager", fullgraph=True)
    for _ in range(2):  # the second routing must not be a constant of the first graph
        expected = gradients(case, adapters, case.base)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_close(gradients(case, adapters, compiled), expected)
        adapters.Z.data *= -1


# ---------------------------------------------------------------------------- snippets of the pages

PAGES = text_of("README.md") + text_of("docs/use.md")


def printed(about):
    """Return the one snippet that contains `about`."""
    [snippet] = snippets(PAGES, about)
    return snippet


def run_printed(about):
    """Run the one snippet that contains `about`, check that it trains, and return its names."""
    names = {}
    exec(printed(about), names)
    assert all(skills.B.grad.any() for skills in names["adapters"].skills.values())
    return names


def test_snippet_of_a_sequential_saves_what_can_be_loaded():
    names = run_printed("torch.nn.Sequential")
    trained = names["adapters"]
    exec(printed("torch.save"), names)
    names["model"] = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))
    exec(printed("torch.load"), names)
    found = names["model"].skill_adapters
    assert found.config == trained.config
    check_equal(found.state_dict(), trained.state_dict())


def check_second_backward(names):
    """Run the snippet that looks at all gradients as the page says, after one step."""
    adapters = names["adapters"]
    parameters = sum(adapters.parameter_groups().values(), [])
    torch.optim.Adam(parameters, lr=0.01).step()
    with adapters.routed(names["embedded"], names["source"].attention_mask):
        names["model"](**names["source"], labels=names["target"].input_ids).loss.backward()
    exec(printed("no gradient"), names)
    adapters.Z.grad = None
    with pytest.raises(AssertionError, match="^allocation: no gradient"):
        exec(printed("no gradient"), names)


def test_snippet_of_t5_trains_and_generates(tmp_path):
    """The name that the Hub would resolve is a local folder."""
    shutil.copytree(ROOT / "tiny", tmp_path / "google" / "flan-t5-base")
    names = run_printed("T5ForConditionalGeneration")
    with pytest.raises(AssertionError, match="^skills: no gradient"):
        exec(printed("no gradient"), names)
    check_second_backward(names)

    names["prompts"] = [f"Opposite of {word}?" for word in "hot big old wet far low new".split()]
    names["prompts"] += ["June, wolf, lion"]
    before = names["adapters"].router.W_task.clone()
    exec(printed("in prompts"), names)
    assert not torch.equal(names["adapters"].router.W_task, before)


def test_snippets_of_a_llama_train_compile_and_generate(tmp_path, monkeypatch, fresh_dynamo):
    folder = tmp_path / "HuggingFaceTB" / "SmolLM2-135M"
    base = hf_llama("llama2")
    base.resize_token_embeddings(500)
    base.save_pretrained(folder)
    write_words(folder, ["Hot is not cold"])
    names = run_printed("LlamaForCausalLM")

    # The snippet that compiles continues this one. `eager` compiles no kernels, which takes long.
    eager = functools.partial(kernels.compile_blocks, backend="eager")
    monkeypatch.setattr(kernels, "compile_blocks", eager)
    gradient = names["adapters"].skills["model-layers-1-self_attn-q_proj"].B.grad
    expected = gradient.clone()
    gradient.zero_()
    exec(printed("compile_blocks"), names)
    torch.testing.assert_close(gradient, expected)
    assert counters["stats"]["unique_graphs"] > 0
