"""export.py against peft.

Every exported folder is the routing that it says, all of them together are the router, and a LoRA
that peft has made becomes a skill.
"""

import json
import math
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run, stir
from safetensors.torch import load_file, save_file

import checkpoint
import data
import eval as evaluation
import export
import run_folder
import runtime
import tokenizer as tokenizers
from baselines import attach_method
from llama import Llama, LlamaConfig
from orchmoe import OrchMoEConfig, TaskRouter

K = 3
CONFIG = OrchMoEConfig(tasks=K, alpha=4.0)
BASES = ["tiny", pytest.param("smollm2", marks=pytest.mark.slow)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=BASES)
def folder(request):
    if request.param == "tiny":
        return ROOT / "tiny"
    return request.getfixturevalue("smollm2_dir")


def adapted(folder, config=CONFIG, method="orchmoe", **options):
    base = checkpoint.load(folder, dtype=torch.float32)
    adapters = attach_method(method, base, config, generator=generator(), **options).eval()
    stir(adapters, generator(1))
    for linear in adapters.linears.values():
        linear.skill_B.data *= 0.1
    return base, adapters


def inputs(seed=2):
    ids, tokens = torch.randint(5, 500, (2, 1, 9), generator=generator(seed))
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


# ------------------------------------------------------------------------------- folders for peft


def test_every_abstract_task_is_a_lora_of_peft_and_together_they_are_the_router(folder, tmp_path):
    base, adapters = adapted(folder, extra_rank=3)  # ranks that differ between Linears
    sources = torch.randint(5, 500, (20, 7), generator=generator(3))
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
    base, adapters = adapted(folder)
    w = torch.tensor([0.2, 0.5, 0.3])
    ids, tokens = inputs()
    assert export.save_peft(adapters, w, tmp_path / "mean", "base", ranks=(1, 8, 16)) == 8
    with pytest.raises(ValueError, match="one sample, not 2"):
        export.save_peft(adapters, torch.eye(K)[:2], tmp_path / "two", "base")
    with adapters.folded(w):
        expected = ours(base, ids, tokens)
    assert_close(theirs(in_peft(folder, [tmp_path / "mean"]), ids, tokens), expected)

    lora = export.load_peft(tmp_path / "mean")
    again, alone = adapted(folder, OrchMoEConfig(tasks=1, skills=1, rank=lora.rank))
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
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator(seed))
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
    base, adapters = adapted(folder, config)
    export.set_skills(adapters, loras)

    model = in_peft(folder, folders)
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "average", combination_type="cat")
    ids, tokens = inputs()
    for name, Z in (("average", [0.0, 0.0]), ("a", [40.0, -40.0]), ("b", [-40.0, 40.0])):
        adapters.Z.data[:] = torch.tensor(Z)
        model.set_adapter(name)
        with adapters.routed(w=torch.full((2,), 0.5)):
            assert_close(ours(base, ids, tokens), theirs(model, ids, tokens))


def test_a_server_finds_nothing_to_ignore(tmp_path):
    _, adapters = adapted(ROOT / "tiny")
    export.save_peft(adapters, torch.eye(K)[0], tmp_path, "google/flan-t5-base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8
    assert config["target_modules"] == ["q", "v"]
    assert config["base_model_name_or_path"] == "google/flan-t5-base"
    assert not config.keys() & set(export.REFUSED)

    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(adapters.linears)
    name = "base_model.model.decoder.block.0.layer.1.EncDecAttention.q.lora_B.weight"
    assert tensors[name].shape == (160, 8)


@pytest.mark.parametrize(
    "method, reason", [("moe-lora", "token router"), ("orchmoe-factors", "factors")]
)
def test_what_is_no_lora_is_not_written(method, reason, tmp_path):
    _, adapters = adapted(ROOT / "tiny", method=method)
    with pytest.raises(ValueError, match=f"not written: .*{reason}"):
        export.save_peft(adapters, torch.eye(K)[0], tmp_path / "out", "base")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------ the program


def load_run(folder):
    return run_folder.load(runtime.pick_device(device="cpu"), run=folder)


@torch.no_grad()
def w_of(folder, prompt):
    base, adapters, tokenizer = load_run(folder)
    ids = torch.tensor([tokenizer.source(prompt)])
    return adapters.router(base.embed(ids))[0]


def factors_in(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_a_run_as_folders_with_its_router(finished, tmp_path, monkeypatch):
    def exported(name, *arguments, code=0):
        out = ("--run", "run", "--out", tmp_path / name)
        return run("export.py", *out, *arguments, cwd=finished, code=code)

    monkeypatch.setattr(export, "VLLM_RANKS", (1, 12, 16))  # the rank of the run, 8, is a real one
    said = exported("served", "--routing", "mean", "--pad-rank")
    assert "mean" in said and "rank 12" in said
    names = [f"abstract-{k}" for k in range(1, 9)]
    written = sorted(path.name for path in (tmp_path / "served").iterdir())
    assert written == [*names, "mean", "router.json", "router.safetensors"]
    assert json.loads((tmp_path / "served/router.json").read_text())["attention"] is True
    router = load_file(tmp_path / "served/router.safetensors")
    assert router.keys() == {"W_task", "bias", "mu", "sd"}

    # The LoRA `mean` is the sum of the others by the mean w of dev.
    mean = factors_in(tmp_path / "served/mean")
    key = next(key for key in mean if key.endswith("B.weight"))
    base, adapters, tokenizer = load_run(finished / "run")
    config = run_folder.read_config(finished / "run").section(data.DataConfig, "data")
    dev = data.load_sets(config, tokenizer, ["dev"])["dev"]
    _, w = evaluation.measure(base, adapters, dev)
    expected = torch.zeros_like(mean[key])
    for w_k, name in zip(w.mean(0), names, strict=True):
        expected += w_k * factors_in(tmp_path / "served" / name)[key]
    torch.testing.assert_close(mean[key], expected)

    # --data names the place where the data of the run is now.
    shutil.copytree(ROOT / "sni", tmp_path / "moved")
    places = []
    load_sets = data.load_sets

    def remember_place(config, *arguments, **options):
        places.append(config.data)
        return load_sets(config, *arguments, **options)

    monkeypatch.setattr(data, "load_sets", remember_place)
    exported("again", "--routing", "mean", "--pad-rank", "--data", tmp_path / "moved")
    assert places == [str(tmp_path / "moved")]
    assert torch.equal(factors_in(tmp_path / "again/mean")[key], mean[key])

    assert "not empty" in exported("served", code=2)
    monkeypatch.setattr(export, "VLLM_RANKS", (1, 4))
    said = exported("large", "--pad-rank", code=2)
    assert "not written: its rank 8 is above all of (1, 4)" in said
    assert not (tmp_path / "large").exists()


def test_the_server_knows_the_base_by_the_name_that_is_given(tmp_path, monkeypatch):
    base = checkpoint.load(ROOT / "tiny")
    adapters = attach_method("orchmoe", base, CONFIG).eval()
    config = SimpleNamespace(train={"method": "orchmoe", "model": "there"}, adapter={})
    monkeypatch.setattr(run_folder, "read_config", lambda folder: config)
    monkeypatch.setattr(run_folder, "load", lambda *_, **__: (base, adapters, None))
    names = {"google/flan-t5-base": "google/flan-t5-base", "": str(Path("there").resolve())}
    for given, expected in names.items():
        out = tmp_path / str(len(given))
        export.export(export.ExportConfig(run="r", out=str(out), base=given), None)
        written = json.loads((out / "abstract-1/adapter_config.json").read_text())
        assert written["base_model_name_or_path"] == expected
        assert written["task_type"] == "SEQ_2_SEQ_LM"


def test_a_router_without_attention_or_softmax_says_so(tmp_path):
    router = TaskRouter(4, OrchMoEConfig(router_attention=False, router_norm="none"))
    export.save_router(router, "table", ["abstract-1"], tmp_path)
    assert json.loads((tmp_path / "router.json").read_text()) == {
        "loras": ["abstract-1"],
        "embedding": "table",
        "attention": False,
        "norm": "none",
    }


def test_the_routing_of_one_prompt_and_given_weights(finished, tmp_path):
    prompt = "Definition: Say the first word."
    arguments = ("--out", tmp_path / "a", "--routing", "sample", "--input", prompt)
    run("export.py", "--run", "run", *arguments, cwd=finished)
    w = ",".join(str(value) for value in w_of(finished / "run", prompt).tolist())
    run("export.py", "--run", "run", "--out", tmp_path / "b", "--w", w, cwd=finished)
    expected = factors_in(tmp_path / "b/w")
    for name, tensor in factors_in(tmp_path / "a/sample").items():
        torch.testing.assert_close(tensor, expected[name])


GIVEN = ["--run", "run", "--out", "x"]


@pytest.mark.parametrize(
    "arguments, beginning",
    [
        ([], "give --run"),
        ([*GIVEN, "--routing", "sample"], "--routing sample needs --input"),
        ([*GIVEN, "--routing", "sample", "--input", " "], "--routing sample needs --input"),
        ([*GIVEN, "--input", "a"], "--routing sample needs --input"),
        ([*GIVEN, "--w", "1,2"], "--w: 2 numbers"),
        (
            [*GIVEN, "--w", "1,0,0,0,0,0,0,nan"],
            "--w: 8 numbers, or some are not finite; give K = 8",
        ),
        ([*GIVEN, "--w", "1,two"], "--w: could not convert"),
        ([*GIVEN, "--w", "1,2", "--routing", "mean"], "--w and --routing: give one"),
        ([*GIVEN, "--data", "sni"], "--data: only --routing mean reads data"),
        (["--run", "nowhere", "--out", "x"], "nowhere/config.json: does not exist"),
    ],
)
def test_mistakes_are_one_line(arguments, beginning, copied):
    said = run("export.py", *arguments, cwd=copied.parent, code=2)
    assert said.startswith(f"export.py: error: {beginning}") and said.count("\n") == 1


def test_a_run_that_is_no_loras_is_refused_by_its_method(copied):
    config = json.loads((copied / "config.json").read_text())
    config["train"]["method"] = "moe-lora"
    (copied / "config.json").write_text(json.dumps(config))
    said = run("export.py", *GIVEN, cwd=copied.parent, code=2)
    assert "run: --method moe-lora: no LoRAs" in said


def test_the_snippet_of_the_readme_computes_w(finished, tmp_path):
    pytest.importorskip("transformers")
    run("export.py", "--run", "run", "--out", tmp_path / "served", cwd=finished)
    shutil.copytree(ROOT / "tiny", tmp_path / "base")
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(import json.*?)```", page, re.DOTALL)
    snippet = snippet.replace("served/", f"{tmp_path}/served/")
    snippet = snippet.replace("flan-t5-base", f"{tmp_path}/base")
    found = {"prompt": "Definition: Say the first word."}
    exec(snippet, found)
    expected = w_of(finished / "run", found["prompt"])
    torch.testing.assert_close(found["w"], expected, atol=1e-5, rtol=1e-4)
    assert [entry["id"] for entry in found["lora"]] == list(range(8))


# -------------------------------------------------------------------------------------- --check


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
    base, adapters = adapted(folder, method=method)
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


def test_check_without_peft_is_refused_before_anything_is_written(finished, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    arguments = ("--out", tmp_path / "served", "--check")
    said = run("export.py", "--run", "run", *arguments, cwd=finished, code=2)
    assert "--check: peft is not installed" in said
    assert not (tmp_path / "served").exists()


# ----------------------------------------------------------------------- folders that others made


@pytest.fixture
def lora(tmp_path):
    _, adapters = adapted(ROOT / "tiny")
    export.save_peft(adapters, torch.eye(K)[0], tmp_path / "lora", "base")
    return tmp_path / "lora"


@pytest.mark.parametrize(
    "change, named",
    [
        ({"use_dora": True}, "use_dora True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias 'all'"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"rank_pattern": {"q": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q": 4}}, "alpha_pattern"),
        ({"r": 0}, "r 0"),
        ({"r": "8"}, "r '8'"),
        ({"r": 4}, "not of rank 4"),
        ({"lora_alpha": "8"}, "adapter_config.json: TypeError"),
        ({"lora_alpha": float("inf")}, "not finite"),
        ({"lora_alpha": 10**400}, "adapter_config.json: OverflowError"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path None"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),
    ],
)
def test_what_is_more_than_a_lora_is_refused_by_name(change, named, lora):
    path = lora / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=re.escape(named)) as refusal:
        export.load_peft(lora)
    assert str(lora) in str(refusal.value) and "\n" not in str(refusal.value)


def test_tensors_that_are_no_lora_are_refused(lora):
    path = lora / "adapter_model.safetensors"
    whole = load_file(path)
    linear = "base_model.model.encoder.block.0.layer.0.SelfAttention.q"
    A, B = f"{linear}.lora_A.weight", f"{linear}.lora_B.weight"
    without_A, without_B = dict(whole), dict(whole)
    del without_A[A], without_B[B]
    for broken, named in (
        (without_A, A),
        (without_B, B),
        (whole | {"base_model.model.lm_head.weight": torch.ones(2, 2)}, "lm_head.weight"),
        (whole | {A: torch.full_like(whole[A], torch.nan)}, "not finite"),
        (whole | {A: whole[A].int()}, A),
        (whole | {A: whole[A].unsqueeze(2)}, "unpack"),
        ({}, "it is empty"),
    ):
        save_file(broken, path)
        with pytest.raises(ValueError, match=f"^{path}: .*{re.escape(named)}"):
            export.load_peft(lora)
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=f"^{path}: "):
        export.load_peft(lora)
    path.unlink()
    with pytest.raises(OSError, match="adapter_model.bin"):
        export.load_peft(lora)


def test_another_base_or_other_targets_are_refused_with_names(lora, small_t5):
    read = export.load_peft(lora)
    config = OrchMoEConfig(skills=1, rank=8)
    adapters = attach_method("orchmoe", small_t5, config, generator=generator())
    with pytest.raises(ValueError, match=f"^{lora}: its Linears are not those .*SelfAttention.q"):
        export.set_skills(adapters, [read])
    adapters.detach()

    config = OrchMoEConfig(skills=1, rank=8, targets=("q",))
    adapters = attach_method("orchmoe", small_t5, config)
    with pytest.raises(
        ValueError, match=r"'decoder.block.0.layer.0.SelfAttention.v', \(160, 160\)"
    ):
        export.set_skills(adapters, [read])
    # Nothing is frozen.
    assert len(adapters.parameter_groups()["skills"]) == 2 * len(adapters.linears)


def test_other_shapes_numbers_and_ranks_are_refused(lora):
    read = export.load_peft(lora)
    narrow = {name: (A[:, :-1], B) for name, (A, B) in read.factors.items()}
    cases = [
        (8, [read._replace(factors=narrow)], r"SelfAttention.q', \(160, 159\).*\(160, 160\)"),
        (4, [read], r"LoRAs of ranks \[8\] do not fit 1 skills of rank 4"),
        (8, [read, read], r"LoRAs of ranks \[8, 8\] do not fit 1 skills of rank 8"),
    ]
    for rank, loras, message in cases:
        _, adapters = adapted(ROOT / "tiny", OrchMoEConfig(skills=1, rank=rank))
        with pytest.raises(ValueError, match=message):
            export.set_skills(adapters, loras)
