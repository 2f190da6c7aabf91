"""Test integrations/export.py and peft_folder.py: files, the program, and what they refuse.

parity/test_peft.py compares the logits of exported folders with those of peft.
"""

import re
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import checkpoint
import data
import eval as evaluation
import run_folder
from helpers import (
    CPU,
    EXPORT_CONFIG,
    ROOT,
    change_config,
    check_equal,
    factors_in,
    interrupted,
    load_adapted,
    refusal,
    refused,
    run,
    seeded_generator,
    stir,
)
from integrations import export, serve
from integrations.peft_folder import load_peft, save_peft, set_skills
from integrations.trainer import base_fingerprint, base_weights
from orchmoe import OrchMoEConfig, TaskRouter, attach
from support.program import read_json, write_json
from tasks import DataConfig

K = EXPORT_CONFIG.abstract_tasks
EXPORT = "integrations/export.py"


def config_of(lora):
    return read_json(lora / "adapter_config.json")


# ------------------------------------------------------------------------------- folders for peft


@pytest.mark.parametrize(
    "method, w, reason",
    [
        ("moe-lora", torch.eye(K)[0], "token router"),
        ("orchmoe-factors", torch.eye(K)[0], "skills that mix their factors are no"),
        ("orchmoe", torch.eye(K)[:2], "one sample, not 2"),
    ],
)
def test_save_peft_refuses_what_no_lora_computes(method, w, reason, tmp_path):
    _, adapters = load_adapted(ROOT / "tiny", method=method)
    with refusal(f"not written: .*{reason}"):
        save_peft(adapters, w, tmp_path / "out", "base")
    assert not (tmp_path / "out").exists()


class OwnLinear(nn.Linear):
    """A Linear whose forward is its own, as that of a quantised one."""

    def forward(self, x):
        return super().forward(x)


def test_save_peft_takes_linears_that_cannot_be_folded(tmp_path):
    for linear in (nn.Linear, OwnLinear):
        base = nn.Sequential(OrderedDict(q=linear(6, 5)))
        adapters = attach(base, OrchMoEConfig(targets=("q",)), generator=seeded_generator())
        stir(adapters, seeded_generator(1))
        save_peft(adapters, torch.eye(8)[0], tmp_path / linear.__name__, "base")
    with refusal("this OwnLinear computes more than a plain product"):
        adapters.merge(torch.eye(8)[0])
    check_equal(factors_in(tmp_path / "OwnLinear"), factors_in(tmp_path / "Linear"))


# ------------------------------------------------------------------------------------ the program


def test_program_writes_the_abstract_tasks_their_mean_and_the_router(copied):
    """The mean is that of dev, from the data in its new place."""
    base, adapters, tokenizer = run_folder.load(CPU, run_dir=copied)
    config = run_folder.read_run(copied).settings.part(DataConfig)
    dev = data.load_sets(config, tokenizer)["dev"]
    w = evaluation.router_weights(base, adapters, dev)

    change_config(copied, "settings", data="moved")
    run(f"{EXPORT} --run run --out served --mean --data", ROOT / "sni")
    served = copied.parent / "served"
    names = [f"abstract-{k}" for k in range(1, 9)]
    written = sorted(path.name for path in served.iterdir())
    assert written == [*names, "mean", "router.json", "router.safetensors"]
    assert config_of(served / "mean") == {  # there is nothing that a server ignores
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM",
        "base_model_name_or_path": str(ROOT / "tiny"),
        "r": 8,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q", "v"],
        "inference_mode": True,
    }

    # The LoRA `mean` is the sum of the others by the mean w.
    mean = factors_in(served / "mean")
    key = next(key for key in mean if key.endswith("B.weight"))
    expected = torch.zeros_like(mean[key])
    for w_k, name in zip(w.mean(0), names, strict=True):
        expected += w_k * factors_in(served / name)[key]
    torch.testing.assert_close(mean[key], expected)

    # A server cuts prompts as the run did.
    rule = read_json(served / "router.json")["prompt"]
    texts = serve.RunTokenizer(ROOT / "tiny", rule)
    assert len(texts.encode("word " * 99)) == config.max_source_length == 64


def test_an_interrupted_export_leaves_nothing_and_can_be_repeated(copied):
    command = f"{EXPORT} --run run --out new/served"
    new = copied.parent / "new"
    with interrupted(export, "save_router", 1, KeyboardInterrupt):  # after all LoRAs
        run(command, code=130)
    assert not list(new.iterdir())
    run(command)
    assert (new / "served").stat().st_mode == new.stat().st_mode  # a server may read it


def test_a_server_computes_the_w_of_the_router(tmp_path):
    router = TaskRouter(160, 3, seeded_generator())
    facts = {"loras": list("abc"), "embedding": "shared.weight"}
    facts |= {"dtype": "float32", "max_new_tokens": 9, "prompt": None}
    export.save_router(router, facts, ROOT / "tiny", tmp_path)
    ids = torch.arange(5, 12)
    w = serve.Router(tmp_path, ROOT / "tiny")(ids)
    base = checkpoint.load(ROOT / "tiny")
    torch.testing.assert_close(w, router(base.embed(ids[None]))[0])


def test_program_takes_given_weights(finished, tmp_path):
    w = torch.tensor([-1.0, 2, 0, 0, 0, 0, 0, 0.5])
    given = ",".join(map(str, w.tolist()))
    run(f"{EXPORT} --run run --w={given} --out", tmp_path / "out", cwd=finished)
    _, adapters, _ = run_folder.load(CPU, run_dir=finished / "run")
    save_peft(adapters, w, tmp_path / "expected", "base")
    check_equal(factors_in(tmp_path / "out/w"), factors_in(tmp_path / "expected"))


DEFAULTS = vars(OrchMoEConfig())
GIVEN = "--run run --out x"
MISTAKES = {  # flags -> beginning of the message
    "": "give --run, the folder of a run, or --adapter",
    f"{GIVEN} --adapter a --model b": "give --run, the folder of a run, or --adapter",
    "--run run": "give --out",
    "--adapter a --out x": "--adapter: give the folder of its base",
    "--adapter a --model b --out x --mean": "--mean: only a run knows its dev set",
    "--adapter a --model b --out x": "a: does not exist",
    f"{GIVEN} --w 1,2": "--w: 2 numbers; give K = 8 finite",
    f"{GIVEN} --w 1,0,0,0,0,0,0,nan": "--w: a number is not finite; give K = 8 finite",
    f"{GIVEN} --w 1,two": "--w: could not convert",
    f"{GIVEN} --data sni": "--data: only --mean reads data",
    "--run run --out empty": "empty: exists",
    "--run run --out link": "link: exists",  # a link to nowhere
}


@pytest.mark.parametrize("flags, beginning", MISTAKES.items(), ids=MISTAKES)
def test_mistake_prints_one_line(flags, beginning, copied):
    (copied.parent / "empty").mkdir()
    (copied.parent / "link").symlink_to("nowhere")
    refused(f"export.py: error: {beginning}", f"{EXPORT} {flags}")


def test_a_w_for_a_run_of_lora_is_refused(copied):
    """programs/test_own_method.py exports a run of a method whose weights are not fixed."""
    change_config(copied, "settings", method="lora")
    refused("run: --method lora has no routing", f"{EXPORT} {GIVEN} --w 1")


@pytest.mark.parametrize(
    "options, change, message",
    [
        ({}, {"config": DEFAULTS | {"tasks": 8}}, "OrchMoEConfig has no field 'tasks'; name an ad"),
        ({}, {"base": None}, "it has no 'base'.*; integrations/trainer.py did not write it"),
        ({}, {"base": "0" * 16}, ".*as in an MoE.; base must be the base"),
        ({"targets": ("k",)}, {}, "RuntimeError: .*Missing key.*base must be the base"),
    ],
)
def test_adapter_that_does_not_fit_is_refused(options, change, message, tmp_path):
    transformers = pytest.importorskip("transformers")
    base = transformers.T5ForConditionalGeneration.from_pretrained(ROOT / "tiny")
    base.save_pretrained(tmp_path / "base")
    adapters = attach(base, OrchMoEConfig(**options))
    saved = {
        "method": "OrchMoE",
        "config": DEFAULTS,
        "base": base_fingerprint(base),
        "dtypes": dict.fromkeys(base_weights(base), "float32"),
        "state": adapters.state_dict(),
    }
    saved |= change
    saved = {name: value for name, value in saved.items() if value is not None}
    torch.save(saved, tmp_path / "adapter.pt")
    said = refused("export.py", f"{EXPORT} --adapter adapter.pt --model base --out served")
    assert re.match(f"export.py: error: (adapter.pt: .*)?{message}", said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.pt", "base"]


# ----------------------------------------------------------------------- folders that others made


@pytest.fixture
def lora(tmp_path):
    _, adapters = load_adapted(ROOT / "tiny")
    save_peft(adapters, torch.eye(K)[0], tmp_path / "lora", "base")
    return tmp_path / "lora"


A = "base_model.model.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight"


@pytest.mark.parametrize(
    "config, tensors",
    [
        ({"use_dora": True}, {}),
        ({"setting_of_a_later_version": True}, {}),
        ({"init_lora_weights": "pissa_niter_4"}, {}),
        ({"r": 8.0}, {}),
        ({"r": 4}, {}),
        ({}, {"base_model.model.lm_head.weight": torch.ones(2, 2)}),
        ({}, {A: torch.full((8, 160), torch.nan)}),
    ],
)
def test_load_peft_refuses_what_is_no_plain_lora(config, tensors, lora):
    write_json(lora / "adapter_config.json", config_of(lora) | config)
    save_file(factors_in(lora) | tensors, lora / "adapter_model.safetensors")
    with refusal(f"^{lora}/adapter_.*: "):
        load_peft(lora)


@pytest.mark.parametrize(
    "options, loras, message",
    [
        ({"targets": ("q",)}, 1, "its Linears are not those .*SelfAttention.v"),
        ({"targets": ("all",)}, 1, "its Linears are not those .*SelfAttention.k"),
        ({"rank": 4}, 1, r"LoRAs of ranks \[8\] do not fit 1 skills of rank 4"),
        ({}, 2, r"LoRAs of ranks \[8, 8\] do not fit 1 skills of rank 8"),
    ],
)
def test_set_skills_refuses_loras_that_do_not_fit(options, loras, message, lora):
    config = OrchMoEConfig(**{"skills": 1, "rank": 8, **options})
    _, adapters = load_adapted(ROOT / "tiny", config)
    with refusal(message):
        set_skills(adapters, loras * [load_peft(lora)])
    # Nothing is frozen.
    assert len(adapters.parameter_groups()["skills"]) == 2 * len(adapters.linears)


def test_loras_become_skills_of_linears_whose_weights_are_packed(lora):
    """As those of bitsandbytes are, in another shape than (O,D)."""
    _, adapters = load_adapted(ROOT / "tiny", OrchMoEConfig(skills=1, rank=8))
    for linear in adapters.linears.values():
        linear.weight = torch.nn.Parameter(linear.weight.reshape(-1, 1), requires_grad=False)
    set_skills(adapters, [load_peft(lora)])
    assert not any(skills.A.requires_grad for skills in adapters.skills.values())
