"""Test orchmoe.py in other models: an nn.Sequential, and T5 and Llama of transformers.

Each is tested with gradient checkpointing, compiled and in bfloat16. The reference is a model that
is merged or folded for one sample, since it has plain Linears and none of our code in its forward.
The snippets of the pages are run as printed.
"""

import copy
import functools
import os
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

import orchmoe
from baselines import attach_method
from helpers import ROOT, stir, teacher_forced
from orchmoe import OrchMoEConfig, SkillLinear, attach

VOCABULARY, WIDTH = 64, 32
# Padded on the left.
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]])
CLOSE = dict(rtol=1e-5, atol=1e-5)  # for different orders of summation in float32


def random_ids(*shape, seed=0):
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


class Sequential(nn.Sequential):
    """A plain stack of layers, with the `gradient_checkpointing_enable` of transformers."""

    source = torch.randn(3, 6, WIDTH, generator=torch.Generator().manual_seed(1))
    checkpointed = False

    def __init__(self):
        super().__init__(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH))

    def gradient_checkpointing_enable(self, **_options):
        self.checkpointed = True

    def forward(self, x):
        layers = list(self)
        if self.checkpointed:
            return checkpoint_sequential(layers, 2, x, use_reentrant=False)
        return super().forward(x)


class Case(NamedTuple):
    """A model, and three samples for it."""

    base: nn.Module
    targets: tuple[str, ...]
    inputs: dict[str, torch.Tensor]  # arguments of forward, one row per sample
    source: dict[str, torch.Tensor]  # arguments of generate; empty if the model has no generate

    def embeddings(self):
        """Return the embeddings of the source, and its mask, for the router."""
        if not self.source:
            return self.inputs["x"], None
        return self.base.get_input_embeddings()(self.source["input_ids"]), self.source[
            "attention_mask"
        ]

    def logits(self, base=None, rows=slice(None)):
        base = self.base if base is None else base
        out = base(**{name: tensor[rows] for name, tensor in self.inputs.items()})
        return getattr(out, "logits", out)

    def generate(self, base=None, rows=slice(None), **options):
        """Return twelve new tokens for each row."""
        source = {name: tensor[rows] for name, tensor in self.source.items()}
        greedy = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
        options = greedy | options
        base = self.base if base is None else base
        return base.generate(**source, **options)[:, -12:]

    def one(self, row):
        """Return the arguments of `folded` and `merge` for the sample of this row."""
        embeddings, mask = self.embeddings()
        if mask is not None:
            mask = mask[row : row + 1]
        return {"embeddings": embeddings[row : row + 1], "mask": mask}

    def merged(self, row):
        """Return a copy of the model, merged for the sample of this row."""
        twin = copy.deepcopy(self.base)
        twin.skill_adapters.merge(**self.one(row))
        return twin


def sequential():
    torch.manual_seed(0)
    return Case(Sequential(), ("0", "2"), {"x": Sequential.source.clone()}, {})


@functools.cache
def t5_base():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    base = transformers.T5ForConditionalGeneration(config)
    # With sharper attention and stronger positions it does not repeat one token.
    with torch.no_grad():
        for name, weight in base.named_parameters():
            if "shared" in name:
                weight.mul_(0.3)
            elif "norm" not in name:
                weight.mul_(3)
    return base


def t5():
    base = copy.deepcopy(t5_base())
    source = {"input_ids": random_ids(3, 6) * MASK.flip(1), "attention_mask": MASK.flip(1)}
    inputs = source | {"decoder_input_ids": random_ids(3, 5, seed=1)}
    return Case(base, ("q", "v", "wo"), inputs, source)


@functools.cache
def llama_base():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return transformers.LlamaForCausalLM(config)


def llama():
    base = copy.deepcopy(llama_base())
    source = {"input_ids": random_ids(3, 6) * MASK, "attention_mask": MASK}
    answer = random_ids(3, 5, seed=1)
    inputs = {
        "input_ids": torch.cat([source["input_ids"], answer], 1),
        "attention_mask": torch.cat([MASK, torch.ones_like(answer)], 1),
    }
    return Case(base, ("q_proj", "v_proj", "down_proj"), inputs, source)


def attached(case, router="sample", mix=orchmoe.mix_skills):
    """Return adapters that change the outputs a lot, and differently for each sample."""
    config = OrchMoEConfig(targets=case.targets, router=router, tasks=5, skills=3, alpha=4.0)
    adapters = attach(case.base.eval(), config, mix, generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(3)
    stir(adapters, generator)
    if adapters.router is not None:
        # fit_router would refuse three samples, because they are fewer than K.
        x_hat = adapters.router.summarise(*case.embeddings())
        adapters.router.fit(x_hat, generator)
    return adapters


def gradients(case, adapters, forward=None):
    """Return the gradients of all adapter parameters by name."""
    case.base.zero_grad()
    with adapters.routed(*case.embeddings()):
        (forward or case.logits)().float().square().mean().backward()
    return {name: p.grad for name, p in case.base.named_parameters() if "skill_" in name}


CASES = {"sequential": sequential, "t5": t5, "llama": llama}
every_case = pytest.mark.parametrize("make", CASES.values(), ids=CASES)
generators = pytest.mark.parametrize("make", [t5, llama], ids=["t5", "llama"])
routers = pytest.mark.parametrize("router", ["sample", "token"])


# -------------------------------------------------------------------------------------------- merge


@every_case
@torch.no_grad()
def test_a_merged_model_equals_the_routed_one_and_has_the_names_of_the_base(make):
    case = make()
    names, before = list(case.base.state_dict()), case.logits()
    adapters = attached(case)
    w = torch.tensor([0.5, 0.0, 0.2, 0.3, 0.0])
    with adapters.routed(w=w):
        expected = case.logits()
    assert (expected - before).abs().max() > 0.1, "the skills change nothing"
    adapters.merge(w)
    torch.testing.assert_close(case.logits(), expected, **CLOSE)
    assert list(case.base.state_dict()) == names
    for module in case.base.modules():
        assert not isinstance(module, SkillLinear | orchmoe.Adapters)
    with pytest.raises(RuntimeError, match="merged"), adapters.routed(w=w):
        pass
    with pytest.raises(RuntimeError, match="merged"):
        adapters.merge(w)


@torch.no_grad()
def test_our_t5_merged_equals_the_routed_one(small_t5, inputs):
    small_t5.float()
    names = list(small_t5.state_dict())
    torch.manual_seed(0)
    adapters = attach(small_t5, OrchMoEConfig(targets=("all",)))
    for linear in adapters.linears.values():
        nn.init.normal_(linear.skill_B, std=0.2)
    ids, mask, labels = [tensor[:1] for tensor in inputs]
    embeddings, decoder_ids = small_t5.embed(ids), labels.clamp(min=0)
    with adapters.routed(embeddings, mask):
        expected = teacher_forced(small_t5, ids, mask, decoder_ids)
    adapters.merge(embeddings=embeddings, mask=mask)
    found = teacher_forced(small_t5, ids, mask, decoder_ids)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert list(small_t5.state_dict()) == names


METHODS = {  # the arguments of `routed` for one sample
    "orchmoe": {"w": torch.full((8,), 1 / 8)},
    "orchmoe-factors": {"w": torch.eye(8)[2]},
    "lora": {},
    "poly": {"task_ids": torch.tensor([1])},
    "mhr": {"task_ids": torch.tensor([-1])},
    "c-poly": {"task_ids": torch.tensor([2])},
    "full": {},
}


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_every_method_that_routes_by_sample_can_be_merged(name):
    case, routing = sequential(), METHODS[name]
    config = OrchMoEConfig(targets=case.targets, alpha=4.0)
    adapters = attach_method(name, case.base.eval(), config, num_tasks=3)
    for group in adapters.parameter_groups().values():
        for parameter in group:
            nn.init.normal_(parameter, std=0.3)
    with adapters.routed(**routing):
        expected = case.base(case.inputs["x"][:1])
    adapters.merge(**routing)
    torch.testing.assert_close(case.base(case.inputs["x"][:1]), expected, **CLOSE)


def test_methods_that_route_by_token_or_draw_noise_cannot_be_merged():
    with pytest.raises(ValueError, match="every token has its own w"):
        attach_method("moe-lora", Sequential(), OrchMoEConfig(targets=("0", "2"))).merge()
    task = torch.tensor([1])
    noisy = attach_method("poly", Sequential(), OrchMoEConfig(targets=("0",)), num_tasks=3)
    with pytest.raises(ValueError, match="noise"):
        noisy.merge(task_ids=task)
    noisy.eval().merge(task_ids=task)


@torch.no_grad()
def test_a_tied_weight_is_merged_only_in_its_linear():
    base = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 10, bias=False))
    base[1].weight = base[0].weight
    adapters = attach(base, OrchMoEConfig(targets=("1",)))
    nn.init.normal_(adapters.linears["1"].skill_B)
    before, w = base[0].weight.clone(), torch.eye(8)[0]
    ids = torch.arange(10).reshape(2, 5)
    with adapters.routed(w=w):
        expected = base(ids)
    adapters.merge(w)
    assert torch.equal(base[0].weight, before)
    torch.testing.assert_close(base(ids), expected, **CLOSE)


# ------------------------------------------------------------------------------- samples of a batch


@every_case
@torch.no_grad()
def test_each_sample_of_a_batch_is_as_in_a_model_merged_for_it(make):
    case = make()
    adapters = attached(case)
    with adapters.routed(*case.embeddings()) as routing:
        together = case.logits()
    assert routing.w.std(0).max() > 0.05, "all samples are routed alike"
    for row in range(3):
        alone = case.logits(case.merged(row), slice(row, row + 1))
        torch.testing.assert_close(together[row : row + 1], alone, **CLOSE)


@pytest.mark.parametrize("beams", [1, 3])
@generators
def test_each_sample_is_generated_as_by_the_model_folded_for_it(make, beams):
    case = make()
    adapters = attached(case)
    with adapters.routed(*case.embeddings(), beams=beams):
        together = case.generate(num_beams=beams)
    for row in range(3):
        with adapters.folded(**case.one(row)):
            alone = case.generate(rows=slice(row, row + 1), num_beams=beams)
        assert torch.equal(together[row], alone[0])
    assert len(together.unique(dim=0)) == 3
    if beams > 1:
        with pytest.raises(ValueError, match="beams"), adapters.routed(*case.embeddings()):
            case.generate(num_beams=beams)


@routers
@generators
def test_generation_is_the_same_with_and_without_a_cache(make, router):
    case = make()
    adapters = attached(case, router)
    with adapters.routed(*case.embeddings()):
        cached = case.generate()
        assert torch.equal(case.generate(use_cache=False), cached)
    assert cached.unique().numel() > 3


@torch.no_grad()
def test_a_token_router_cannot_see_the_future():
    case = llama()
    adapters = attached(case, "token")
    with adapters.routed():
        before = case.logits()
        case.inputs["input_ids"][:, -1] = 5
        after = case.logits()
    torch.testing.assert_close(after[:, :-1], before[:, :-1], **CLOSE)
    assert not torch.allclose(after[:, -1], before[:, -1])


# ----------------------------------------------------------------- checkpointing, compile, bfloat16


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@routers
@every_case
def test_gradient_checkpointing_changes_nothing(make, router):
    calls = []

    def counting(*arguments):
        calls.append(1)
        return orchmoe.mix_skills(*arguments)

    case = make()
    adapters = attached(case, router, counting)
    case.base.train()
    expected = gradients(case, adapters)
    once = len(calls)
    # From version 6, transformers calls it activation_checkpointing_enable.
    case.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = gradients(case, adapters)
    assert len(calls) > 2 * once, "nothing was computed a second time"
    assert all(gradient is not None and gradient.any() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, **CLOSE)


@pytest.mark.parametrize(
    "make, router",
    [(sequential, "sample"), (sequential, "token"), (t5, "sample"), (llama, "token")],
)
def test_compiling_changes_nothing(make, router):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    case = make()
    adapters = attached(case, router)
    case.base.train()
    # tests/unit/test_compile.py also tests other backends.
    compiled = torch.compile(case.base, backend="eager", fullgraph=True)
    expected = gradients(case, adapters)
    for _ in range(2):  # the second routing must not be a constant of the first graph
        found = gradients(case, adapters, lambda: case.logits(compiled))
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, **CLOSE)
        with torch.no_grad():
            adapters.Z.mul_(-1)
        expected = gradients(case, adapters)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def error(found, expected):
    """Return the mean squared error, relative to the mean square of `expected`."""
    return (found - expected).square().mean() / expected.square().mean()


@routers
@every_case
def test_in_bfloat16_the_skills_stay_float32_and_train(make, router):
    exact, case = make(), make()
    wanted = attached(exact, router)
    case.base.bfloat16()
    for name, tensor in case.inputs.items():
        if tensor.is_floating_point():
            case.inputs[name] = tensor.bfloat16()
    adapters = attached(case, router)
    adapters.load_state_dict(wanted.state_dict())
    seen = []
    hooks = []
    for name, linear in adapters.linears.items():

        def remember(_module, inputs, y, name=name):
            seen.append((name, inputs[0], y))

        hooks.append(linear.register_forward_hook(remember))
    embeddings, mask = case.embeddings()
    with (
        torch.no_grad(),
        adapters.routed(embeddings, mask),
        wanted.routed(embeddings.float(), mask),
    ):
        found = case.logits()
        for hook in hooks:
            hook.remove()
        # Compare each Linear with its twin for the same input, since a whole T5 amplifies the
        # rounding errors of its base.
        assert {name for name, _, _ in seen} == wanted.linears.keys()
        for name, x, y in seen:
            linear, twin = adapters.linears[name], wanted.linears[name]
            torch.testing.assert_close(linear.skill_c(x), twin.skill_c(x.float()))
            assert y.dtype == torch.bfloat16 and error(y, twin(x.float())) < 1e-4, name
    assert found.dtype == torch.bfloat16
    if make is not t5:
        with torch.no_grad(), wanted.routed(*exact.embeddings()):
            assert error(found, exact.logits()) < 0.01
    for name, gradient in gradients(case, adapters).items():
        assert gradient.dtype == torch.float32 and gradient.isfinite().all() and gradient.any(), (
            name
        )
    if case.source:
        with adapters.routed(*case.embeddings(), beams=2):
            case.generate(num_beams=2)
    if router == "sample":
        twin = case.merged(0)
        assert {p.dtype for p in twin.parameters()} == {torch.bfloat16}


# ---------------------------------------------------------------------------- snippets of the pages

PAGES = "".join(
    page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *ROOT.glob("docs/use.md"))
)
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGES, re.DOTALL)


def run_printed(about, folder, checks):
    """Run the one snippet that contains `about`, and then `checks`. Return what they print.

    They run in `folder`, beside a copy of orchmoe.py. Models of the Hub are local folders there.
    """
    [snippet] = [snippet for snippet in SNIPPETS if about in snippet]
    shutil.copy(ROOT / "orchmoe.py", folder)
    done = subprocess.run(
        [sys.executable, "-c", snippet + checks],
        cwd=folder,
        text=True,
        timeout=300,
        capture_output=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


TRAINED = "assert all(linear.skill_B.grad.any() for linear in adapters.linears.values())\n"


def test_snippets_are_short():
    assert all(len(snippet.splitlines()) <= 12 for snippet in SNIPPETS)


LOADED = """
trained = [linear.skill_B for linear in adapters.linears.values()]
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 4))
{line}
assert model.skill_adapters.config == adapters.config
found = [linear.skill_B for linear in model.skill_adapters.linears.values()]
assert all(B.any() and torch.equal(B, other) for B, other in zip(trained, found, strict=True))
"""


def test_the_snippet_of_a_sequential_runs_and_saves_what_can_be_loaded(tmp_path):
    [save] = re.findall("`(torch.save.*?)`", PAGES)
    [load] = re.findall("`(saved = torch.load.*?)`", PAGES)
    run_printed("torch.nn.Sequential", tmp_path, TRAINED + save + LOADED.format(line=load))


@pytest.mark.slow
def test_the_snippet_of_t5_runs(tmp_path):
    case, folder = t5(), tmp_path / "google" / "flan-t5-base"
    case.base.resize_token_embeddings(1024 + 100)
    case.base.save_pretrained(folder)
    shutil.copy(ROOT / "tiny" / "spiece.model", folder)
    assert run_printed("T5ForConditionalGeneration", tmp_path, TRAINED).startswith("[")


@pytest.mark.slow
def test_the_snippet_of_a_llama_runs(tmp_path):
    case, folder = llama(), tmp_path / "HuggingFaceTB" / "SmolLM2-135M"
    case.base.resize_token_embeddings(257)
    case.base.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    assert run_printed("LlamaForCausalLM", tmp_path, TRAINED).startswith("['Hot is not")


def byte_tokenizer():
    """Return a tokenizer like that of Llama models, with one token per byte."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "<end>"])}
    bytewise = Tokenizer(models.BPE(vocabulary, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<end>")
