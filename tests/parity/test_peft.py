"""Compare methods and exported folders with peft."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

import checkpoint
import data
from baselines import attach_method
from helpers import (
    EXPORT_CONFIG,
    ROOT,
    hf_llama,
    load_adapted,
    records,
    run,
    seeded_generator,
)
from integrations.peft_folder import load_peft, save_peft, set_skills, skills_by_hf_name
from orchmoe import OrchMoEConfig
from support import runtime
from tasks import DataConfig
from tokenizer import load as load_tokenizer

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

# ------------------------------------------------------------------------------------------ methods

S, R, T = 3, 2, 5


@pytest.mark.parametrize("method, heads", [("poly", 1), ("mhr", 4)])
def test_output_equals_that_of_peft(method, heads):
    def model():
        return nn.Sequential(OrderedDict(q=nn.Linear(32, 24, bias=False)))

    torch.manual_seed(0)
    settings = peft.PolyConfig(r=R, n_tasks=T, n_skills=S, n_splits=heads, target_modules=["q"])
    twin = peft.get_peft_model(model(), settings).eval().base_model.model.q

    base = model()
    base.q.weight.data.copy_(twin.base_layer.weight)
    # peft divides the output of Poly by R.
    config = OrchMoEConfig(skills=S, rank=R, targets=("q",), alpha=1.0)
    adapters = attach_method(method, base, config, num_tasks=T).eval()

    [skills] = adapters.skills.values()

    x, task_ids = torch.randn(4, 6, 32), torch.tensor([4, 0, 1, 4])
    # Our parameter, that of peft, and the function from the shape of peft to ours.
    A, B = twin.poly_lora_A["default"], twin.poly_lora_B["default"]  # (H,S,D/H,R), (H,S,R,O/H)
    Z = twin.poly_router["default"].module_logits  # (T,H S)
    parameters = [
        (skills.A, A, lambda a: a.permute(1, 3, 0, 2).flatten(2)),
        (skills.B, B, lambda b: b.permute(1, 2, 0, 3).flatten(2)),
        (adapters.Z, Z, lambda z: z.view(1, T, heads, S)),
    ]
    with torch.no_grad():
        for ours, theirs, arrange in parameters:
            ours.copy_(arrange(nn.init.normal_(theirs, std=0.5)))

    with adapters.routed(task_ids=task_ids):
        torch.testing.assert_close(base(x), twin(x, task_ids=task_ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method, heads", [("poly", 1), ("mhr", 4)])
def test_A_starts_within_the_bounds_of_peft(method, heads):
    """Each head of peft draws its part of A as a matrix of its own, with fewer inputs."""

    def model():
        return nn.Sequential(OrderedDict(q=nn.Linear(512, 24, bias=False)))

    settings = peft.PolyConfig(r=8, n_tasks=T, n_skills=S, n_splits=heads, target_modules=["q"])
    twin = peft.get_peft_model(model(), settings).base_model.model.q.poly_lora_A["default"]
    bound = twin.abs().max().item()
    assert bound == pytest.approx((heads / 512) ** 0.5, rel=0.01)

    base = model()
    config = OrchMoEConfig(skills=S, rank=8, targets=("q",))
    [skills] = attach_method(method, base, config, num_tasks=T).skills.values()
    A = skills.A.detach().unflatten(-1, (heads, -1))  # (S,R,H,D/H)
    for head in range(heads):
        of_head = A[:, :, head]
        assert of_head.abs().max().item() == pytest.approx(bound, rel=0.02)
        assert of_head.std().item() == pytest.approx(twin[head].std().item(), rel=0.05)


# ---------------------------------------------------------------------------------- a run with peft


def arguments_of(batch, base):
    """Return the arguments of transformers' forward for a batch of ours."""
    if hasattr(base, "pack"):  # test_transformers.py tests the loss of packed rows
        ids, labels = base.pack(batch.input_ids, batch.attention_mask, batch.labels)
        return {"input_ids": ids, "labels": labels}
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "labels": batch.labels,
    }


def losses_with_peft(folder, steps, warmup, batch_size, **data_options):
    """Yield the loss of each step of a run with transformers, peft and AdamW of torch.

    Data, their order and the start of A are those of `train.py`. The model is in eval mode, since
    T5 has dropout in training.
    """
    examples = data.load_sets(DataConfig(**data_options), load_tokenizer(folder))["train"]
    ours = attach_method(
        "lora", checkpoint.load(folder), OrchMoEConfig(), generator=runtime.generator(0, 0)
    )
    starts = skills_by_hf_name(ours)
    targets = sorted({name.rpartition(".")[2] for name in starts})
    settings = peft.LoraConfig(r=8, lora_alpha=2, target_modules=targets)
    model = peft.get_peft_model(hf_model(folder), settings).eval()
    for name, skills in starts.items():
        twin = model.base_model.model.get_submodule(name)
        twin.lora_A["default"].weight.data.copy_(skills.A[0])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(parameters) == 2 * len(starts)

    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    batch_order = data.BatchOrder(examples.source_lengths, batch_size, seed=0)
    for step in range(steps):
        rows = [examples[row] for row in batch_order.at(step)]
        batch = data.collate(data.draw_targets(rows, seed=0, step=step))
        loss = model(**arguments_of(batch, ours.module)).loss
        yield loss.item()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        factor = min((step + 1) / warmup, (steps - step) / (steps - warmup))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * factor
        optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, steps, batch_size, length", [("tiny", 100, 16, 1024), ("smollm2", 8, 2, 256)]
)
def test_the_lora_of_the_comparisons_is_that_of_peft(
    name, steps, batch_size, length, request, home
):
    folder = ROOT / "tiny" if name == "tiny" else request.getfixturevalue("smollm2_dir")
    warmup = steps // 4
    numbers = {"steps": steps, "batch-size": batch_size, "warmup": warmup, "eval-every": steps}
    numbers |= {"max-source-length": length, "eval-instances": 4}
    flags = [f"--{flag}={value}" for flag, value in numbers.items()]
    flags += ["--method=lora", "--device=cpu", "--dtype=float32", f"--model={folder}", "--out=run"]
    run("train.py", *flags)
    found = [record["loss"] for record in records(home / "run") if "loss" in record]

    expected = losses_with_peft(folder, steps, warmup, batch_size, max_source_length=length)
    assert found == pytest.approx(list(expected), rel=0, abs=2e-5)


# --------------------------------------------------------------------------------- folders for peft

K = EXPORT_CONFIG.abstract_tasks


@pytest.fixture(params=["tiny", "llama"])
def folder(request, tmp_path):
    if request.param == "tiny":
        return ROOT / "tiny"
    hf_llama("llama2").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def random_ids(*shape, seed=2):
    return torch.randint(5, 97, shape, generator=seeded_generator(seed))


IDS, TOKENS = random_ids(1, 9), random_ids(1, 5, seed=3)


@torch.no_grad()
def ours(base):
    """Return the logits (n,V) that predict each of the TOKENS after IDS."""
    newest, state = base.start(IDS, torch.ones_like(IDS), TOKENS.shape[1])
    logits = []
    for token in TOKENS.T:
        logits.append(base.step(newest, state)[0])
        newest = token
    return torch.stack(logits)


@torch.no_grad()
def theirs(model, lora):
    """Return the same logits, computed by peft with this LoRA."""
    model.set_adapter(lora)
    if model.config.is_encoder_decoder:
        return model(input_ids=IDS, labels=TOKENS).logits[0]
    return model(torch.cat((IDS, TOKENS), 1)).logits[0, IDS.shape[1] - 1 : -1]


def hf_model(folder):
    kind = transformers.AutoModelForCausalLM
    if folder.name == "tiny":
        kind = transformers.AutoModelForSeq2SeqLM
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def in_peft(folder, loras):
    """Return the model of transformers with these LoRA folders, each under its name, in peft."""
    first, *rest = loras
    model = peft.PeftModel.from_pretrained(hf_model(folder), first, adapter_name=first.name)
    for lora in rest:
        model.load_adapter(lora, adapter_name=lora.name)
    return model


def assert_close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_saved_abstract_tasks_are_loras_and_their_mixture_is_the_router(folder, tmp_path):
    without = ours(checkpoint.load(folder, dtype=torch.float32))
    # With ranks that differ between Linears.
    base, adapters = load_adapted(folder, extra_rank=3)
    adapters.fit_router([base.embed(random_ids(20, 7))])
    loras = [tmp_path / f"abstract-{k + 1}" for k in range(K)]
    for k, lora in enumerate(loras):
        assert save_peft(adapters, torch.eye(K)[k], lora, "base") == 12

    model = in_peft(folder, loras)
    for k, lora in enumerate(loras):
        with adapters.routed(w=torch.eye(K)[k]):
            expected = ours(base)
        # If the LoRA changed nothing, the base alone would pass the comparison.
        assert (expected - without).abs().max() > 0.01
        assert_close(theirs(model, lora.name), expected)

    with adapters.routed(base.embed(IDS)) as routing:
        expected = ours(base)
        w = routing.w[0].tolist()
    assert max(w) < 0.99
    names = [lora.name for lora in loras]
    model.add_weighted_adapter(names, w, "mixed", combination_type="cat")
    assert_close(theirs(model, "mixed"), expected)


def made_by_peft(folder, out, **options):
    """Write a LoRA that peft itself has made, and return its folder."""
    settings = peft.LoraConfig(lora_alpha=5, **options)
    torch.manual_seed(0)
    model = peft.get_peft_model(hf_model(folder), settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(out)
    return out


def test_loras_of_peft_become_the_skills(folder, tmp_path):
    folders = [
        made_by_peft(folder, tmp_path / "a", r=2),
        made_by_peft(folder, tmp_path / "b", r=3, use_rslora=True),
    ]
    config = OrchMoEConfig(abstract_tasks=2, skills=2, rank=3, alpha=1.5, allocation_std=0.0)
    base, adapters = load_adapted(folder, config)
    set_skills(adapters, [load_peft(path) for path in folders])
    assert not any(adapters.parameter_groups()["skills"])  # frozen

    model = in_peft(folder, folders)
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "average", combination_type="cat")
    for name, Z in (("average", [0.0, 0.0]), ("a", [40.0, -40.0]), ("b", [-40.0, 40.0])):
        adapters.Z.data[:] = torch.tensor(Z)
        with adapters.routed(w=torch.full((2,), 0.5)):
            assert_close(ours(base), theirs(model, name))
