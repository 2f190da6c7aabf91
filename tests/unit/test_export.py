"""Test export.py: the files that it writes and reads, the program, and what it refuses.

parity/test_peft.py compares the logits of exported folders with those of peft.
"""

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import data
import eval as evaluation
import export
import run_folder
import runtime
from baselines import attach_method
from helpers import EXPORT_CONFIG, ROOT, factors_in, load_adapted, run, seeded_generator
from orchmoe import OrchMoEConfig, TaskRouter

K = EXPORT_CONFIG.tasks

# ------------------------------------------------------------------------------- folders for peft


def test_a_server_finds_nothing_to_ignore(tmp_path):
    _, adapters = load_adapted(ROOT / "tiny")
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
    _, adapters = load_adapted(ROOT / "tiny", method=method)
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
    adapters = attach_method("orchmoe", base, EXPORT_CONFIG).eval()
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


def test_the_snippet_of_the_serving_page_computes_w(finished, tmp_path):
    pytest.importorskip("transformers")
    run("export.py", "--run", "run", "--out", tmp_path / "served", cwd=finished)
    shutil.copytree(ROOT / "tiny", tmp_path / "base")
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(import json.*?)```", page, re.DOTALL)
    snippet = snippet.replace("served/", f"{tmp_path}/served/")
    snippet = snippet.replace("flan-t5-base", f"{tmp_path}/base")
    found = {"prompt": "Definition: Say the first word."}
    exec(snippet, found)
    expected = w_of(finished / "run", found["prompt"])
    torch.testing.assert_close(found["w"], expected, atol=1e-5, rtol=1e-4)
    assert [entry["id"] for entry in found["lora"]] == list(range(8))


# -------------------------------------------------------------------------------------- --check


def test_check_without_peft_is_refused_before_anything_is_written(finished, tmp_path, monkeypatch):
    pytest.importorskip("transformers")  # it is looked for first
    monkeypatch.setitem(sys.modules, "peft", None)
    arguments = ("--out", tmp_path / "served", "--check")
    said = run("export.py", "--run", "run", *arguments, cwd=finished, code=2)
    assert "--check: peft is not installed" in said
    assert not (tmp_path / "served").exists()


# ----------------------------------------------------------------------- folders that others made


@pytest.fixture
def lora(tmp_path):
    _, adapters = load_adapted(ROOT / "tiny")
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
    adapters = attach_method("orchmoe", small_t5, config, generator=seeded_generator())
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
        _, adapters = load_adapted(ROOT / "tiny", OrchMoEConfig(skills=1, rank=rank))
        with pytest.raises(ValueError, match=message):
            export.set_skills(adapters, loras)
