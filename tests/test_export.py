"""LoRAs out and in, against peft: every exported folder is the routing that it says, all of them together are
the router, and what peft has made is a skill."""

import json
import re
import shutil
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
import runtime
from baselines import attach_method
from orchmoe import OrchMoEConfig, TaskRouter

K = 3
CONFIG = OrchMoEConfig(tasks=K, alpha=4.0)
BASES = ["tiny", pytest.param("smollm2", marks=pytest.mark.slow)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=BASES)
def folder(request):
    return ROOT / "tiny" if request.param == "tiny" else request.getfixturevalue("smollm2_dir")


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
    """Logits (5,V) behind the source and each of the tokens but the last."""
    newest, state = base.start(ids, torch.ones_like(ids), 6)
    return torch.stack([base.step(newest if t == 0 else tokens[:, t - 1], state)[0] for t in range(5)])


@torch.no_grad()
def theirs(model, ids, tokens):
    """The same of transformers."""
    if model.config.is_encoder_decoder:
        begun = torch.cat((torch.zeros(1, 1, dtype=torch.long), tokens[:, :-1]), 1)
        return model(input_ids=ids, decoder_input_ids=begun).logits[0]
    return model(input_ids=torch.cat((ids, tokens), 1)).logits[0, ids.shape[1] - 1:-1]


def hf_model(folder):
    transformers = pytest.importorskip("transformers")
    kind = transformers.AutoModelForSeq2SeqLM if folder.name == "tiny" else transformers.AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def in_peft(folder, loras):
    """transformers' model with each of the LoRA folders, named as these, in peft."""
    peft = pytest.importorskip("peft")
    first, *rest = loras
    model = peft.PeftModel.from_pretrained(hf_model(folder), first, adapter_name=first.name)
    for lora in rest:
        model.load_adapter(lora, adapter_name=lora.name)
    return model


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_every_abstract_task_is_a_lora_of_peft_and_together_they_are_the_router(folder, tmp_path):
    base, adapters = adapted(folder, extra_rank=3)  # ranks that differ between Linears
    sources = torch.randint(5, 500, (20, 7), generator=generator(3))
    adapters.fit_router([base.embed(sources)])
    loras = [tmp_path / f"abstract-{k + 1}" for k in range(K)]
    for k, lora in enumerate(loras):
        assert checkpoint.save_peft(adapters, torch.eye(K)[k], lora, "base") == 12
    model, (ids, tokens) = in_peft(folder, loras), inputs()
    plain = ours(checkpoint.load(folder, dtype=torch.float32), ids, tokens)
    for k, lora in enumerate(loras):
        model.set_adapter(lora.name)
        with adapters.routed(w=torch.eye(K)[k]):
            due = ours(base, ids, tokens)
        assert (due - plain).abs().max() > 0.01  # else the base would pass for the adapter
        close(theirs(model, ids, tokens), due)
    with adapters.routed(base.embed(ids)) as routing:
        due, w = ours(base, ids, tokens), routing.w[0].tolist()
    assert max(w) < 0.99
    model.add_weighted_adapter([lora.name for lora in loras], w, "mixed", combination_type="cat")
    model.set_adapter("mixed")
    close(theirs(model, ids, tokens), due)


def test_a_fixed_routing_is_what_folded_computes_and_comes_back_as_a_skill(folder, tmp_path):
    base, adapters = adapted(folder)
    w, (ids, tokens) = torch.tensor([0.2, 0.5, 0.3]), inputs()
    assert checkpoint.save_peft(adapters, w, tmp_path / "mean", "base", ranks=(1, 8, 16)) == 8
    with pytest.raises(ValueError, match="too many values"):  # of two samples
        checkpoint.save_peft(adapters, torch.eye(K)[:2], tmp_path / "two", "base")
    with adapters.folded(w):
        due = ours(base, ids, tokens)
    close(theirs(in_peft(folder, [tmp_path / "mean"]), ids, tokens), due)
    lora = checkpoint.load_peft(tmp_path / "mean")
    again, alone = adapted(folder, OrchMoEConfig(tasks=1, skills=1, rank=lora.rank))
    checkpoint.set_skills(alone, [lora])
    with alone.routed(w=torch.ones(1)):
        close(ours(again, ids, tokens), due)
    assert not any(alone.parameter_groups()["skills"])  # frozen


def peft_made(folder, out, rank, seed, **options):
    """A LoRA that peft itself has made."""
    peft = pytest.importorskip("peft")
    names = {"tiny": ["q", "v"]}.get(folder.name, ["q_proj", "v_proj"])
    config = peft.LoraConfig(r=rank, lora_alpha=5, target_modules=names, **options)
    model = peft.get_peft_model(hf_model(folder), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator(seed))
    model.save_pretrained(out)
    return out


def test_existing_loras_become_the_skills(folder, tmp_path):
    loras = [peft_made(folder, tmp_path / "a", 2, 4)]
    loras.append(peft_made(folder, tmp_path / "b", 3, 5, use_rslora=True))
    read = [checkpoint.load_peft(lora) for lora in loras]
    assert [lora.rank for lora in read] == [2, 3]
    base, adapters = adapted(folder, OrchMoEConfig(tasks=2, skills=2, rank=3, alpha=1.5, allocation_std=0.0))
    checkpoint.set_skills(adapters, read)
    model, (ids, tokens) = in_peft(folder, loras), inputs()
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "average", combination_type="cat")
    for name, allocation in (("average", [0.0, 0.0]), ("a", [40.0, -40.0]), ("b", [-40.0, 40.0])):
        adapters.allocation.data[:] = torch.tensor(allocation)
        model.set_adapter(name)
        with adapters.routed(w=torch.full((2,), 0.5)):
            close(ours(base, ids, tokens), theirs(model, ids, tokens))


def test_a_server_finds_nothing_to_drop(tmp_path):
    _, adapters = adapted(ROOT / "tiny")
    checkpoint.save_peft(adapters, torch.eye(K)[0], tmp_path, "google/flan-t5-base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8 and config["target_modules"] == ["q", "v"]
    assert config["base_model_name_or_path"] == "google/flan-t5-base"
    assert not any(name in config for name in checkpoint.REFUSED)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(adapters.linears)
    name = "base_model.model.decoder.block.0.layer.1.EncDecAttention.q.lora_B.weight"
    assert tensors[name].shape == (160, 8)


@pytest.mark.parametrize("method, options", [("moe-lora", {}), ("orchmoe-factors", {})])
def test_what_is_no_lora_is_not_written(method, options, tmp_path):
    _, adapters = adapted(ROOT / "tiny", method=method, **options)
    with pytest.raises(ValueError, match="not written: .*(token router|factors)"):
        checkpoint.save_peft(adapters, torch.eye(K)[0], tmp_path / "out", "base")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ a program


def w_of(run_folder, prompt):
    base, adapters, tokenizer = evaluation.load(runtime.pick_device(device="cpu"), run=run_folder)
    ids = torch.tensor([tokenizer.source(prompt)])
    with torch.no_grad():
        return adapters.router(base.embed(ids))[0]


def test_a_run_as_folders_with_its_router(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "RANKS", (1, 12, 16))  # 8, the run's, is one of the real ones
    said = run("export.py", "--run", "run", "--out", tmp_path / "served", "--routing", "mean", "--pad-rank",
               cwd=finished)
    assert "mean" in said and "rank 12" in said
    assert sorted(path.name for path in (tmp_path / "served").iterdir()) == [
        *(f"abstract-{k}" for k in range(1, 9)), "mean", "router.json", "router.safetensors"]
    mean = load_file(tmp_path / "served/mean/adapter_model.safetensors")
    parts = [load_file(tmp_path / f"served/abstract-{k}/adapter_model.safetensors") for k in range(1, 9)]
    key = next(key for key in mean if key.endswith("B.weight"))
    base, adapters, tokenizer = evaluation.load(runtime.pick_device(device="cpu"), run=finished / "run")
    kept = evaluation.Run.read(finished / "run").configs(finished / "run", data=data.DataConfig)["data"]
    _, w = evaluation.measure(base, adapters, data.load_sets(kept, tokenizer, ["dev"])["dev"])
    wanted = sum(w_k * part[key] for w_k, part in zip(w.mean(0), parts, strict=True))
    torch.testing.assert_close(mean[key], wanted)
    shutil.copytree(ROOT / "sni", tmp_path / "moved")
    reads = []
    monkeypatch.setattr(data, "load_sets", lambda config, *rest, load=data.load_sets, **options:
                        reads.append(config.data) or load(config, *rest, **options))
    run("export.py", "--run", "run", "--out", tmp_path / "again", "--routing", "mean", "--pad-rank",
        "--data", tmp_path / "moved", cwd=finished)
    assert reads == [str(tmp_path / "moved")]
    assert torch.equal(load_file(tmp_path / "again/mean/adapter_model.safetensors")[key], mean[key])
    assert json.loads((tmp_path / "served/router.json").read_text())["attention"] is True
    assert "not empty" in run("export.py", "--run", "run", "--out", tmp_path / "served", cwd=finished, code=2)
    monkeypatch.setattr(export, "RANKS", (1, 4))
    said = run("export.py", "--run", "run", "--out", tmp_path / "large", "--pad-rank", cwd=finished, code=2)
    assert "not written: its rank 8 is above all that were to be filled up to, (1, 4)" in said
    assert not (tmp_path / "large").exists()


def test_the_server_knows_the_base_by_the_name_that_is_given(tmp_path, monkeypatch):
    base = checkpoint.load(ROOT / "tiny")
    adapters = attach_method("orchmoe", base, CONFIG).eval()
    began = SimpleNamespace(train={"method": "orchmoe", "model": "there"}, adapter={})
    monkeypatch.setattr(evaluation.Run, "read", lambda folder: began)
    monkeypatch.setattr(evaluation, "load", lambda *_, **__: (base, adapters, None))
    for name, due in ("google/flan-t5-base",) * 2, ("", str(Path("there").resolve())):
        out = tmp_path / str(len(name))
        export.export(export.ExportConfig(run="r", out=str(out), base=name), None)
        written = json.loads((out / "abstract-1/adapter_config.json").read_text())
        assert (written["base_model_name_or_path"], written["task_type"]) == (due, "SEQ_2_SEQ_LM")


def test_a_router_without_attention_or_softmax_says_so(tmp_path):
    router = TaskRouter(4, OrchMoEConfig(router_attention=False, router_norm="none"))
    export.save_router(router, "table", ["abstract-1"], tmp_path)
    said = json.loads((tmp_path / "router.json").read_text())
    assert said == {"loras": ["abstract-1"], "embedding": "table", "attention": False, "norm": "none"}


def test_the_routing_of_one_prompt_and_given_weights(finished, tmp_path):
    prompt = "Definition: Say the first word."
    run("export.py", "--run", "run", "--out", tmp_path / "a", "--routing", "sample", "--input", prompt,
        cwd=finished)
    w = ",".join(map(str, w_of(finished / "run", prompt).tolist()))
    run("export.py", "--run", "run", "--out", tmp_path / "b", "--w", w, cwd=finished)
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a/sample", "b/w"))
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name])


@pytest.mark.parametrize("arguments, beginning", [
    ([], "give --run"),
    (["--run", "run", "--out", "x", "--routing", "sample"], "--routing sample goes with --input"),
    (["--run", "run", "--out", "x", "--routing", "sample", "--input", " "], "--routing sample goes with"),
    (["--run", "run", "--out", "x", "--w", "1,2"], "--w 1,2: give K = 8 finite numbers"),
    (["--run", "run", "--out", "x", "--w", "1,0,0,0,0,0,0,nan"], "--w 1,0,0,0,0,0,0,nan: give K = 8"),
    (["--run", "run", "--out", "x", "--w", "1,two"], "--w: could not convert"),
    (["--run", "run", "--out", "x", "--data", "sni"], '--routing sample goes with --input "prompt", --data'),
    (["--run", "nowhere", "--out", "x"], "nowhere/config.json: not there"),
])  # fmt: skip
def test_mistakes_are_one_line(arguments, beginning, copied):
    said = run("export.py", *arguments, cwd=copied.parent, code=2)
    assert said.startswith(f"export.py: error: {beginning}") and said.count("\n") == 1


def test_a_run_that_is_no_loras_is_refused_by_its_method(copied):
    config = json.loads((copied / "config.json").read_text())
    config["train"]["method"] = "moe-lora"
    (copied / "config.json").write_text(json.dumps(config))
    assert "run: --method moe-lora: no LoRAs" in run("export.py", "--run", "run", "--out", "x",
                                                     cwd=copied.parent, code=2)


def test_the_snippet_of_the_readme_computes_w(finished, tmp_path):
    run("export.py", "--run", "run", "--out", tmp_path / "served", cwd=finished)
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    snippet, = re.findall(r"```python\n(import json.*?)```", page, re.DOTALL)
    pytest.importorskip("transformers")
    shutil.copytree(ROOT / "tiny", tmp_path / "base")
    prompt = "Definition: Say the first word."
    there = {"served/": f"{tmp_path}/served/", "flan-t5-base": f"{tmp_path}/base"}
    for name, path in there.items():
        snippet = snippet.replace(name, path)
    found = {"prompt": prompt}
    exec(snippet, found)
    torch.testing.assert_close(found["w"], w_of(finished / "run", prompt), atol=1e-5, rtol=1e-4)
    assert [entry["id"] for entry in found["lora"]] == list(range(8))


# ---------------------------------------------------------------------------------------- strangers' folders


@pytest.fixture
def lora(tmp_path):
    _, adapters = adapted(ROOT / "tiny")
    checkpoint.save_peft(adapters, torch.eye(K)[0], tmp_path / "lora", "base")
    return tmp_path / "lora"


@pytest.mark.parametrize("change, named", [
    ({"use_dora": True}, "use_dora True"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"bias": "all"}, "bias 'all'"),
    ({"peft_type": "IA3"}, "peft_type 'IA3'"),
    ({"rank_pattern": {"q": 4}}, "rank_pattern"),
    ({"alpha_pattern": {"q": 4}}, "alpha_pattern"),
    ({"r": 0}, "r 0"), ({"r": "8"}, "r '8'"), ({"lora_alpha": float("inf")}, "lora_alpha inf"),
    ({"lora_alpha": 10**400}, "lora_alpha 1000"),
    ({"base_model_name_or_path": None}, "base_model_name_or_path None"),
    ({"r": 4}, "not of rank 4"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),
])  # fmt: skip
def test_what_is_more_than_a_lora_is_refused_by_name(change, named, lora):
    values = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=re.escape(named)) as caught:
        checkpoint.load_peft(lora)
    assert str(lora) in str(caught.value) and "\n" not in str(caught.value)


def test_tensors_that_are_no_lora_are_refused(lora):
    path = lora / "adapter_model.safetensors"
    whole = load_file(path)
    key = "base_model.model.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight"
    for broken, named in (
        ({name: tensor for name, tensor in whole.items() if name != key}, "a factor is missing"),
        (whole | {"base_model.model.lm_head.weight": torch.ones(2, 2)}, "lm_head.weight"),
        (whole | {key: torch.full_like(whole[key], torch.nan)}, "not finite"),
        (whole | {key: whole[key].int()}, "SelfAttention.q.lora_A"),
        ({}, "it is empty"),
    ):
        save_file(broken, path)
        with pytest.raises(ValueError, match=named):
            checkpoint.load_peft(lora)
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        checkpoint.load_peft(lora)
    path.unlink()
    with pytest.raises(OSError, match="adapter_model.bin"):
        checkpoint.load_peft(lora)


def test_another_base_or_other_targets_are_refused_with_names(lora, small_t5):
    read = checkpoint.load_peft(lora)
    adapters = attach_method("orchmoe", small_t5, OrchMoEConfig(skills=1, rank=8), generator=generator())
    with pytest.raises(ValueError, match="SelfAttention.q.* is not in both"):
        checkpoint.set_skills(adapters, [read])
    adapters.detach()
    adapters = attach_method("orchmoe", small_t5, OrchMoEConfig(skills=1, rank=8, targets=("q",)))
    with pytest.raises(ValueError, match=r"'decoder.block.0.layer.0.SelfAttention.v'.* and \d+ more"):
        checkpoint.set_skills(adapters, [read])
    assert len(adapters.parameter_groups()["skills"]) == 2 * len(adapters.linears)  # as they were


@pytest.mark.parametrize("rank, copies, words", [
    (8, 1, r"is of \[160, 159\], in this base \[160, 160\]"), (4, 1, "1 LoRAs, this one of rank 8, for"),
    (8, 2, "2 LoRAs, this one of rank 8, for")])  # fmt: skip
def test_other_shapes_numbers_and_ranks_are_refused(rank, copies, words, lora):
    read = checkpoint.load_peft(lora)
    if "base" in words:
        read = read._replace(factors={name: (A[:, :-1], B) for name, (A, B) in read.factors.items()})
    _, adapters = adapted(ROOT / "tiny", OrchMoEConfig(skills=1, rank=rank))
    with pytest.raises(ValueError, match=words):
        checkpoint.set_skills(adapters, [read] * copies)
