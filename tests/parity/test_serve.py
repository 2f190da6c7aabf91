"""integrations/serve.py: the answers of a run, a stand-in for llama-server, and refusals."""

import json
import re
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import data
import eval as evaluation
import run_folder
import train
from experiments.explorer import explorer
from helpers import (
    CPU,
    ROOT,
    refusal,
    refused,
    run,
    seeded_generator,
    snippets,
    stir,
    text_of,
    write_rows,
)
from integrations.serve import PeftModel, Router
from support import program
from support.program import UserError, read_json, write_json
from tasks import DataConfig, row_of_prompt

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

only_t5 = pytest.mark.parametrize("home", ["t5"], indirect=True)


@pytest.fixture(scope="module", params=["t5", "decoder"])
def home(request, tmp_path_factory):
    """Return a folder with `base`, `run`, whose answers depend on the routing, and `served`."""
    base = ROOT / "tiny" if request.param == "t5" else request.getfixturevalue("decoder_dir")
    folder = tmp_path_factory.mktemp("serve")
    (folder / "base").symlink_to(base)
    sizes = {"max_tasks": 4, "max_source_length": 512, "eval_instances": 2, "steps": 1}
    launch = train.LaunchConfig(out=str(folder / "run"))
    train.train(train.Settings(model=str(base), **sizes), CPU, launch)
    _, adapters, _ = run_folder.load(CPU, run_dir=folder / "run")
    stir(adapters, seeded_generator())
    run_folder.read_run(folder / "run").save_best(adapters)
    run("integrations/export.py --run run --out served", cwd=folder)
    return folder


@pytest.fixture
def copy(home, tmp_path):
    """Return a copy of `home`, which tests may change."""
    shutil.copytree(home, tmp_path / "home", symlinks=True)
    return tmp_path / "home"


SERVE = "integrations/serve.py --served served --base base"


@pytest.fixture(scope="module")
def asked(home):
    """Return prompts of the run, the answers of eval.py, and the ids and w of each prompt."""
    loaded = explorer.load(home / "run")
    examples = data.subsample(loaded.sets["seen"], 8)
    prompts = [explorer.texts_of(loaded, "seen", example)[1] for example in examples]
    models = (loaded.base, loaded.adapters, examples, loaded.tokenizer)
    answers = evaluation.predict(*models, max_new_tokens=9)
    assert len(set(answers)) > 2
    w = evaluation.router_weights(loaded.base, loaded.adapters, examples)
    return prompts, answers, [example.source_ids.tolist() for example in examples], w


def test_answers_are_those_of_eval_without_the_tokenizer_of_transformers(home, asked):
    prompts, answers, *_ = asked
    expected = [f"{prompt} -> {answer}\n" for prompt, answer in zip(prompts, answers, strict=True)]
    with mock.patch.object(transformers.AutoTokenizer, "from_pretrained", side_effect=ImportError):
        said = run(f"{SERVE} --max-tokens 9 --prompt", *prompts, cwd=home)
    assert said == "".join(expected)


TEXTS = {  # answer: text with a number
    "Yes": "Olga the pilot has a red hat and {} apples.",
    "No": "On Monday, Paul needed {} boats in Oslo.",
    "cook": "Zoe wrote {} letters.",
}


def test_a_run_in_bfloat16_is_served_in_bfloat16(tmp_path):
    """The file of the base is in float16, and peft would keep a LoRA in float32. Two programs round
    differently in bfloat16, so the answers must be clear, as they are after training.
    """
    (tmp_path / "base").symlink_to(ROOT / "tiny")
    rows = []
    for number in range(100, 200):
        for answer, text in TEXTS.items():
            rows.append({"prompt": text.format(number), "completion": answer})
    write_rows(tmp_path / "own.jsonl", rows)
    run(
        "train.py --device cpu --model base --data own.jsonl --steps 30 --warmup 4 "
        "--eval-instances 8 --dtype bfloat16 --out run"
    )
    run("integrations/export.py --run run --out served")
    scored = "--split seen --limit 20 --max-new-tokens 9 --batch-size 16 --out scored"
    run(f"eval.py --run run --device cpu {scored}")
    expected = ""
    prompts = []
    for _, _, row in program.read_jsonl("scored/predictions.jsonl"):
        prompts.append(rows[int(row["id"]) - 1]["prompt"])
        expected += f"{prompts[-1]} -> {row['prediction']}\n"
    assert all(f" -> {answer}\n" in expected for answer in TEXTS)

    assert run(f"{SERVE} --max-tokens 9 --prompt", *prompts) == expected

    router = Router(Path("served"), Path("base"))
    model = PeftModel(Path("base"), router.loras, router.dtype).model
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    device = CPU._replace(dtype=torch.bfloat16)
    base, adapters, tokenizer = run_folder.load(device, run_dir="run")
    config = run_folder.read_run("run").settings.part(DataConfig)
    example = data.example_of(row_of_prompt(prompts[0]), tokenizer, config)
    [expected_w] = evaluation.router_weights(base, adapters, [example])
    w = router(torch.from_numpy(example.source_ids))
    torch.testing.assert_close(w, expected_w, rtol=0, atol=1e-6)


def test_a_llama_server_gets_ids_and_w_of_training_and_peft_is_not_needed(home, asked, monkeypatch):
    prompts, _, ids, w = asked
    monkeypatch.setitem(sys.modules, "peft", None)
    with mock.patch("urllib.request.urlopen") as urlopen:
        urlopen.return_value.__enter__.return_value.read.return_value = b'{"content": "red"}'
        said = run(f"{SERVE} --server http://host/ --prompt", prompts[0], cwd=home)
    assert said == f"{prompts[0]} -> red\n"
    url, content = urlopen.call_args.args
    request = json.loads(content)
    assert url == "http://host/completion"
    assert request["prompt"] == ids[0] and not request["cache_prompt"]
    assert request["n_predict"] == 127, "as long as the longest target of the run"
    assert [lora["scale"] for lora in request["lora"]] == pytest.approx(w[0].tolist(), rel=1e-4)
    refused('pip install "transformers<5.25" peft', f"{SERVE} --prompt a", cwd=home)


MISTAKES = {  # flags -> what is said
    "--served nope": "nope/router.json: does not exist; name a folder that",
    "--base nope": "nope: does not exist; name a local folder",
    "--ask=": "--ask: it is empty",
    "--prompt \udcff": "--prompt is not valid Unicode",
    "--ask a": "--ask: only a run on rows of JSONL has instructions; give --prompt",
    "--prompt a --input b": "--input: a whole prompt has no other input; leave it out",
    "--max-tokens 0": "--max-tokens 0: give 1 or more",
    "--server http://localhost:9": "--server http://localhost:9: .*refused.*; start llama-server",
}


@only_t5
@pytest.mark.parametrize("flags, message", MISTAKES.items(), ids=MISTAKES)
def test_a_mistake_is_one_line(flags, message, home):
    if "--ask" not in flags and "--prompt" not in flags:
        flags = "--prompt a " + flags
    said = refused("serve.py: error: ", f"{SERVE} {flags}", cwd=home)
    assert re.search(f": error: {message}", said)


def damage(served):
    """Yield what is wrong with the folder, one thing after the other."""
    path = served / "router.json"
    facts = read_json(path)
    for change, message in (
        ({"loras": 3}, "served/router.json: TypeError"),
        ({"loras": ["../a"]}, "served/router.json: loras: '../a' is not a plain folder name; "),
        ({"max_new_tokens": -3}, "served/router.json: max_new_tokens: -3 is no positive int; "),
        ({"embedding": "none"}, "served/router.json: KeyError: 'none'; export it again"),
        ({"dtype": "int8"}, "served/router.json: KeyError: 'int8'; export it again"),
    ):
        write_json(path, facts | change)
        yield message
    write_json(path, facts)
    shutil.rmtree(served / "abstract-3")
    yield "served/abstract-3/adapter_config.json: does not exist"
    (served / "router.safetensors").unlink()
    yield "served/router.safetensors: "
    path.write_text("{")
    yield "served/router.json: JSONDecodeError"


@only_t5
def test_a_damaged_export_is_one_line(copy):
    for message in damage(copy / "served"):
        refused(f"serve.py: error: {message}", f"{SERVE} --prompt a", cwd=copy)


def test_the_snippet_of_the_page_gives_the_answer_of_the_mean_w(decoder_dir, tmp_path, capsys):
    """docs/data.md loads an export with the mean w in peft."""
    (tmp_path / "smollm2").symlink_to(decoder_dir)
    rows = [{"instruction": f"Say {i}.", "output": f"{i}"} for i in range(60)]
    write_rows(tmp_path / "rows.jsonl", rows)
    settings = train.Settings(data="rows.jsonl", model="smollm2", steps=1)
    train.train(settings, CPU, train.LaunchConfig(out="run"))
    base, adapters, tokenizer = run_folder.load(CPU, run_dir="run")
    stir(adapters, seeded_generator())
    run_folder.read_run("run").save_best(adapters)
    run("integrations/export.py --run run --mean --out served")
    config = run_folder.read_run("run").settings.part(DataConfig)

    names = {}
    (with_mean,) = snippets(text_of("docs/data.md"), "served")
    exec(with_mean, names)
    dev = data.load_sets(config, tokenizer)["dev"]
    w = evaluation.router_weights(base, adapters, dev).mean(dim=0, keepdim=True)
    example = data.example_of(row_of_prompt(names["prompt"]), tokenizer, config)
    asked = (base, adapters, [example], tokenizer)
    (answer,) = evaluation.predict(*asked, max_new_tokens=20, w=w)
    assert capsys.readouterr().out.endswith(f"\n{answer}\n")


@only_t5
def test_code_in_the_folder_of_the_base_does_not_run(home, tmp_path, monkeypatch):
    values = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    write_json(tmp_path / "config.json", values)
    (tmp_path / "own.py").write_text("raise SystemExit")
    monkeypatch.setattr("builtins.input", lambda _question: "y")
    with refusal("custom code", UserError):
        PeftModel(tmp_path, [home / "served/abstract-1"], torch.float32)
