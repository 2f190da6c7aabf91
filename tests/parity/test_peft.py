"""Compare methods and exported folders with peft."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import checkpoint
import export
import tokenizer as tokenizers
from baselines import attach_method
from helpers import EXPORT_CONFIG, ROOT, factors_in, load_adapted, run, seeded_generator
from llama import Llama, LlamaConfig
from orchmoe import OrchMoEConfig

# ------------------------------------------------------------------------------------------ methods

S, R, T, D = 3, 2, 5, 32


def peft_twin(base, kind):
    """Return the Linear with the same method of peft, which starts at other values."""
    peft = pytest.importorskip("peft")
    if kind == "lora":
        config = peft.LoraConfig(r=S * R, lora_alpha=5, target_modules=["q"], lora_dropout=0)
    else:
        heads = 4 if kind == "mhr" else 1
        config = peft.PolyConfig(r=R, n_tasks=T, n_skills=S, n_splits=heads, target_modules=["q"])
    return peft.get_peft_model(base, config)


@pytest.mark.parametrize("kind", ["lora", "poly", "mhr"])
@pytest.mark.filterwarnings("ignore:.*adapted Linears were not called")
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
            pairs = [
                (linear.skill_A, a, lambda g: g[None]),
                (linear.skill_B, b, lambda g: g.T[None]),
            ]
        else:
            heads = 4 if kind == "mhr" else 1
            nn.init.normal_(adapters.Z)
            a, b = (
                layer.poly_lora_A["default"],
                layer.poly_lora_B["default"],
            )  # (H,S,D/H,R), (H,S,R,O/H)
            z = layer.poly_router["default"].module_logits  # (T,H S)
            a.copy_(linear.skill_A.view(S, R, heads, -1).permute(2, 0, 3, 1))
            b.copy_(linear.skill_B.view(S, R, heads, -1).permute(2, 0, 1, 3))
            z.copy_(adapters.Z[0].flatten(1))
            pairs = [
                (linear.skill_A, a, lambda g: g.permute(1, 3, 0, 2).flatten(2)),
                (linear.skill_B, b, lambda g: g.permute(1, 2, 0, 3).flatten(2)),
                (adapters.Z, z, lambda g: g.view(1, T, heads, S)),
            ]
    x, task_ids = torch.randn(4, 6, D), torch.tensor([4, 0, 1, 4])
    weights = torch.linspace(-1, 1, 4 * 6 * 24).view(4, 6, 24)
    with adapters.routed(task_ids=task_ids):
        y = base(x)
        (y * weights).sum().backward()
    twin_y = layer(x) if kind == "lora" else layer(x, task_ids=task_ids)
    (twin_y * weights).sum().backward()
    torch.testing.assert_close(y, twin_y, rtol=1e-5, atol=1e-5)
    for ours, theirs, arrange in pairs:
        torch.testing.assert_close(ours.grad, arrange(theirs.grad), rtol=1e-5, atol=1e-5)
    similarity = F.cosine_similarity(y.flatten(), (x @ linear.weight.T).flatten(), dim=0)
    assert not similarity.isclose(torch.tensor(1.0))  # the skills do something


# --------------------------------------------------------------------------------- folders for peft

K = EXPORT_CONFIG.tasks
BASES = ["tiny", pytest.param("smollm2", marks=pytest.mark.slow)]


@pytest.fixture(params=BASES)
def folder(request):
    if request.param == "tiny":
        return ROOT / "tiny"
    return request.getfixturevalue("smollm2_dir")


def inputs(seed=2):
    ids, tokens = torch.randint(5, 500, (2, 1, 9), generator=seeded_generator(seed))
    return ids, tokens[:, :5]


@torch.no_grad()
def ours(base, ids, tokens):
    return export.our_logits(base, ids, tokens)


@torch.no_grad()
def theirs(model, ids, tokens):
    return export.peft_logits(model, ids, tokens)


def hf_model(folder):
    transformers = pytest.importorskip("transformers")
    kind = transformers.AutoModelForCausalLM
    if folder.name == "tiny":
        kind = transformers.AutoModelForSeq2SeqLM
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def in_peft(folder, loras):
    """Return the model of transformers with these LoRA folders, each under its name, in peft."""
    peft = pytest.importorskip("peft")
    first, *rest = loras
    model = peft.PeftModel.from_pretrained(hf_model(folder), first, adapter_name=first.name)
    for lora in rest:
        model.load_adapter(lora, adapter_name=lora.name)
    return model


def assert_close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_every_abstract_task_is_a_lora_of_peft_and_together_they_are_the_router(folder, tmp_path):
    base, adapters = load_adapted(folder, extra_rank=3)  # ranks that differ between Linears
    sources = torch.randint(5, 500, (20, 7), generator=seeded_generator(3))
    adapters.fit_router([base.embed(sources)])
    loras = [tmp_path / f"abstract-{k + 1}" for k in range(K)]
    for k, lora in enumerate(loras):
        assert export.save_peft(adapters, torch.eye(K)[k], lora, "base") == 12

    model = in_peft(folder, loras)
    ids, tokens = inputs()
    without = ours(checkpoint.load(folder, dtype=torch.float32), ids, tokens)
    for k, lora in enumerate(loras):
        model.set_adapter(lora.name)
        with adapters.routed(w=torch.eye(K)[k]):
            expected = ours(base, ids, tokens)
        # If the LoRA changed nothing, the base alone would pass the comparison.
        assert (expected - without).abs().max() > 0.01
        assert_close(theirs(model, ids, tokens), expected)

    with adapters.routed(base.embed(ids)) as routing:
        expected = ours(base, ids, tokens)
        w = routing.w[0].tolist()
    assert max(w) < 0.99
    names = [lora.name for lora in loras]
    model.add_weighted_adapter(names, w, "mixed", combination_type="cat")
    model.set_adapter("mixed")
    assert_close(theirs(model, ids, tokens), expected)


def test_a_fixed_routing_is_what_folded_computes_and_comes_back_as_a_skill(folder, tmp_path):
    base, adapters = load_adapted(folder)
    w = torch.tensor([0.2, 0.5, 0.3])
    ids, tokens = inputs()
    assert export.save_peft(adapters, w, tmp_path / "mean", "base", ranks=(1, 8, 16)) == 8
    with pytest.raises(ValueError, match="one sample, not 2"):
        export.save_peft(adapters, torch.eye(K)[:2], tmp_path / "two", "base")
    with adapters.folded(w):
        expected = ours(base, ids, tokens)
    assert_close(theirs(in_peft(folder, [tmp_path / "mean"]), ids, tokens), expected)

    lora = export.load_peft(tmp_path / "mean")
    again, alone = load_adapted(folder, OrchMoEConfig(tasks=1, skills=1, rank=lora.rank))
    export.set_skills(alone, [lora])
    with alone.routed(w=torch.ones(1)):
        assert_close(ours(again, ids, tokens), expected)
    assert not any(alone.parameter_groups()["skills"])  # frozen


def made_by_peft(folder, out, rank, seed, **options):
    """Write a LoRA that peft itself has made, and return its folder."""
    peft = pytest.importorskip("peft")
    targets = ["q", "v"] if folder.name == "tiny" else ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=rank, lora_alpha=5, target_modules=targets, **options)
    model = peft.get_peft_model(hf_model(folder), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=seeded_generator(seed))
    model.save_pretrained(out)
    return out


def test_existing_loras_become_the_skills(folder, tmp_path):
    folders = [
        made_by_peft(folder, tmp_path / "a", 2, 4),
        made_by_peft(folder, tmp_path / "b", 3, 5, use_rslora=True),
    ]
    loras = [export.load_peft(path) for path in folders]
    assert [lora.rank for lora in loras] == [2, 3]
    config = OrchMoEConfig(tasks=2, skills=2, rank=3, alpha=1.5, allocation_std=0.0)
    base, adapters = load_adapted(folder, config)
    export.set_skills(adapters, loras)

    model = in_peft(folder, folders)
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "average", combination_type="cat")
    ids, tokens = inputs()
    for name, Z in (("average", [0.0, 0.0]), ("a", [40.0, -40.0]), ("b", [-40.0, 40.0])):
        adapters.Z.data[:] = torch.tensor(Z)
        model.set_adapter(name)
        with adapters.routed(w=torch.full((2,), 0.5)):
            assert_close(ours(base, ids, tokens), theirs(model, ids, tokens))


# ------------------------------------------------------------------------------------------ --check


def test_check_compares_a_run_with_peft(finished, tmp_path):
    pytest.importorskip("peft")
    arguments = ("--out", tmp_path / "served", "--w", "1,0,0,0,0,0,0,-1", "--check")
    said = run("export.py", "--run", "run", *arguments, cwd=finished)
    found = re.search(r"differ from ours by at most (\S+), the largest logit is (\S+)\n", said)
    difference, largest = map(float, found.groups())
    assert 0 < difference < 1e-5 * largest


def damage(folder, side, factor):
    """Multiply all factors of one side by a number."""
    tensors = factors_in(folder)
    for key in tensors:
        if side in key:
            tensors[key] *= factor
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.fixture
def small_llama(tmp_path):
    """The folder of a random decoder."""
    config = LlamaConfig(
        model_type="llama",
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        eos_ids=(1,),
    )
    torch.manual_seed(0)
    checkpoint.save(Llama(config), tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize(
    "family, method, side, factor",
    [
        ("t5", "orchmoe", "B", 1.01),
        ("llama", "orchmoe", "A", 1.01),
        ("llama", "lora", "B", 1.01),
        ("t5", "lora", "B", math.nan),
    ],
)
def test_check_refuses_folders_with_other_values(
    family, method, side, factor, small_llama, tmp_path
):
    pytest.importorskip("peft")
    folder = small_llama if family == "llama" else ROOT / "tiny"
    base, adapters = load_adapted(folder, method=method)
    routings = {"lora": None}
    if method == "orchmoe":
        routings = {f"abstract-{k + 1}": torch.eye(K)[k] for k in range(K)}
    for name, w in routings.items():
        export.save_peft(adapters, w, tmp_path / name, "base")
    tokenizer = tokenizers.load(ROOT / "tiny")
    arguments = (tmp_path, routings, folder, base, adapters, tokenizer)
    export.check_in_peft(*arguments)

    damage(tmp_path / name, f"lora_{side}", factor)  # the last folder alone
    with pytest.raises(ValueError, match=f"^{tmp_path}: peft computes other logits"):
        export.check_in_peft(*arguments)


def test_check_ends_the_program_when_a_written_file_is_wrong(finished, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    save_peft = export.save_peft

    def save_wrong(adapters, w, folder, *arguments, **options):
        rank = save_peft(adapters, w, folder, *arguments, **options)
        damage(folder, "lora_B", 1.01)
        return rank

    monkeypatch.setattr(export, "save_peft", save_wrong)
    arguments = ("--out", tmp_path / "served", "--check")
    said = run("export.py", "--run", "run", *arguments, cwd=finished, code=2)
    assert "peft computes other logits than the run" in said
