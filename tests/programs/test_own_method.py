"""A method from a file, `--method FILE.py:Class`, in every program, and what is refused.

The file of the example, examples/hydra_lora.py, is explained in docs/use.md. OWN below is another
method: it has noise, task ids, and a parameter of its own. GATED has a router, but no w, and a
state with integers, truth values, -inf and a tied parameter.
"""

import re
import shutil
from unittest import mock

import pytest
import torch

import baselines
import data
import orchmoe
import train
from baselines import attach_method, load_method
from eval import mean_loss, measure
from experiments.explorer import explorer
from helpers import (
    CPU,
    RESUME,
    ROOT,
    SHORT,
    change_config,
    check_equal,
    interrupted,
    links,
    records,
    refused,
    run,
    seeded_generator,
    snippets,
    state_of,
    stir,
    text_of,
    torchrun,
    trace,
)
from orchmoe import OrchMoEConfig
from run_folder import load, read_run
from support.program import UserError
from tasks import DataConfig

HYDRA = f"{ROOT / 'examples/hydra_lora.py'}:HydraLoRA"
OWN = '''
import torch
from torch import nn

from orchmoe import Adapters, Routing


class ByTask(Adapters):
    """Weights of the skills for each task, with noise in training."""

    rates = Adapters.rates | {"table": "allocation"}

    def __init__(self, *inputs, num_tasks=0, **options):
        super().__init__(*inputs, **options)
        N, S = len(self.linears), self.config.skills
        self.table = nn.Parameter(torch.zeros(N, num_tasks + 1, S))  # the last row: unseen
        self.noise_shape = (N, S)
        self.router = nn.Identity()  # no TaskRouter, so nothing is fitted

    def route(self, embeddings, mask=None, *, task_ids, noise=None, **_options):
        logits = self.table[:, task_ids]  # (N,B,S)
        if self.training:
            logits = logits + noise.transpose(0, 1).to(logits)
        return Routing(logits.softmax(-1))
'''

GATED = '''
import torch
from torch import nn

from orchmoe import Adapters, Routing, TaskRouter


class Gated(Adapters):
    """Weights of the skills from a router, as a user may write them."""

    rates = Adapters.rates | {"router": "router", "table": "allocation", "again": "allocation"}

    def __init__(self, *inputs, width, generator=None, **options):
        super().__init__(*inputs, generator=generator, **options)
        config = self.config
        self.router = TaskRouter(width, config.abstract_tasks, generator)
        table = torch.randn(config.abstract_tasks, config.skills, generator=generator)
        self.table = nn.Parameter(table)
        self.again = self.table
        self.norm = nn.BatchNorm1d(config.skills, affine=False)
        self.register_buffer("used", torch.tensor([True, False]))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

    def route(self, embeddings, mask=None, **_options):
        w = self.router(embeddings, mask)
        c = self.norm(w @ self.again).softmax(-1)
        return Routing(c.expand(len(self.linears), -1, -1))
'''


BRIEF = (
    "--device cpu --max-tasks 2 --max-source-length 64 --eval-instances 2 --steps 4 "
    "--eval-every 2 --batch-size 4 --warmup 1"
)


@pytest.fixture(autouse=True)
def no_method_is_known():
    """Each test begins like a new process."""
    with mock.patch.dict(baselines.OWN_METHODS, clear=True):
        yield
    assert not hasattr(orchmoe.OrchMoE, "kind")  # no file has changed a built-in method


@pytest.fixture
def home(home):
    """Return the folder of a test, with the bundled data and base, and the file of ByTask."""
    (home / "own.py").write_text(OWN)
    return home


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a run of ByTask. Tests must not change it."""
    folder = links(tmp_path_factory.mktemp("own"))
    (folder / "own.py").write_text(OWN)
    run(f"train.py {BRIEF} --method own.py:ByTask --out own", cwd=folder)
    return folder / "own"


@pytest.fixture
def own(whole, home):
    """Return a copy of that run, in the folder of the test."""
    return shutil.copytree(whole, home / "own")


# ------------------------------------------------------------------------------------ the example


def test_the_tutorial_is_the_file_of_the_example():
    section = text_of("docs/use.md").partition("## A method of your own")[2].split("\n## ")[0]
    file = text_of("examples/hydra_lora.py")
    pieces = snippets(section)[1:]  # without the gate
    assert len(pieces) >= 3
    code = file[file.index("import torch.nn") :]
    assert re.sub(r"\s+", "", "".join(pieces)) == re.sub(r"\s+", "", code)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_of_the_page_weighs_the_skills_of_each_sample(small_t5, inputs, dtype):
    [code] = snippets(text_of("docs/use.md"), "class Gated")
    names = {}
    exec(code, names)
    base = small_t5.to(dtype)
    adapters = attach_method(names["Gated"], base, OrchMoEConfig(skills=3, targets=("q", "wi_0")))
    stir(adapters, seeded_generator())
    embeddings = base.embed(inputs.input_ids)
    with adapters.routed(embeddings, inputs.attention_mask) as routing:
        base.loss(*inputs).backward()
    means = torch.stack(
        [E[real].float().mean(0) for E, real in zip(embeddings, inputs.attention_mask, strict=True)]
    )
    expected = (means @ adapters.gate.float().T).softmax(-1)
    for c in routing.c:
        torch.testing.assert_close(c.float(), expected, rtol=1e-2, atol=1e-2)
    assert adapters.gate.grad.any() and adapters.parameter_groups()["router"] == [adapters.gate]
    without_mask = adapters.route(embeddings).c
    assert torch.equal(without_mask, adapters.route(embeddings, torch.ones(4, 9).bool()).c)


def test_the_gate_of_the_page_trains_by_its_file(home):
    [code] = snippets(text_of("docs/use.md"), "class Gated")
    (home / "gated.py").write_text(code)
    run(f"train.py {BRIEF} --method gated.py:Gated --out gated")
    assert state_of(home / "gated")["gate"].any()


# ------------------------------------------------------------------------------------ the programs


@pytest.mark.parametrize("name, source", [("ByTask", OWN), ("Gated", GATED)])
def test_a_stopped_run_resumes_bit_for_bit_and_is_scored(name, source, home):
    (home / "own.py").write_text(source)
    train_it = f"train.py {BRIEF} --method own.py:{name} --out"
    run(f"{train_it} whole")
    with interrupted(train, "train_step", 4, KeyboardInterrupt):
        run(f"{train_it} own", code=130)
    baselines.OWN_METHODS.clear()
    resume = f"{RESUME} own"
    refused("for a method of your own give its file and its class, --method FILE.py:", resume)
    (home / "own.py").rename(home / "elsewhere.py")
    moved = f"--method elsewhere.py:{name}"
    output = run(f"{resume} {moved}")
    assert f"\nnext: python eval.py --run own {moved} --split seen" in output
    assert trace(home / "own") == trace(home / "whole")
    state = state_of(home / "own")
    check_equal(state, state_of(home / "whole"))
    assert state["table"].any()

    baselines.OWN_METHODS.clear()
    evaluate = "eval.py --run own --device cpu --split seen --limit 4"
    refused("--method FILE.py:", evaluate)
    assert "4 seen instances" in run(f"{evaluate} {moved}")

    if name == "Gated":
        assert not any("router" in row for row in records(home / "own"))  # no w was returned
        assert state["norm.num_batches_tracked"] > 0 and torch.equal(state["table"], state["again"])
        assert state["used"].tolist() == [True, False] and state["mask"][1] == -torch.inf
        explore = f"experiments/explorer/explorer.py --run own {moved}"
        refused("own: has no sample router", explore)  # that of OrchMoE


BY_TASK = '''
import torch
from torch import nn

from orchmoe import Adapters, Routing


class ByTask(Adapters):
    """A parameter for each task. Each gets a gradient from its own samples only."""

    rates = Adapters.rates | {"rows": "allocation"}

    def __init__(self, *inputs, num_tasks=0, **options):
        super().__init__(*inputs, **options)
        row = torch.ones(len(self.linears), self.config.skills)
        self.rows = nn.ParameterList(row.clone() for _ in range(num_tasks))

    def route(self, *_inputs, task_ids, **_options):
        used = [self.rows[task] for task in task_ids.tolist()]
        return Routing(torch.stack(used, dim=1).softmax(-1))
'''


@pytest.mark.slow
def test_a_parameter_without_a_gradient_in_one_process_gets_that_of_the_other(home):
    (home / "own.py").write_text(BY_TASK)
    # The skills take small steps, because Adam turns rounding of tiny gradients into steps.
    flags = f"{SHORT} --method own.py:ByTask --lr-skills 2e-4"
    run(f"train.py {flags} --out one")
    torchrun(2, ROOT / "train.py", f"{flags} --out two")
    state, expected = state_of(home / "two"), state_of(home / "one")
    for name in [f"rows.{task}" for task in range(4)]:
        torch.testing.assert_close(state[name], expected[name], atol=1e-3, rtol=0)
        assert (expected[name] - 1).abs().max() > 1e-2


# --------------------------------------------------------------------- what a constructor may draw

DRAWS = OWN.replace(
    "        self.router",
    "        self.drawn = 3 * torch.randn(S, generator=options['generator'])\n        self.router",
).replace("self.table[:, task_ids]", "self.table[:, task_ids] + self.drawn")


def test_what_the_constructor_draws_with_generator_is_the_same_when_loaded(home):
    (home / "own.py").write_text(DRAWS)
    run(f"train.py {BRIEF} --method own.py:ByTask --out own")
    losses = [row["dev_loss"] for row in records(home / "own") if "dev_loss" in row]
    base, adapters, tokenizer = load(CPU, run_dir=home / "own")
    config = read_run(home / "own").settings.part(DataConfig)
    dev = data.subsample(data.load_sets(config, tokenizer)["dev"], 2)
    row_losses = measure(base, adapters, dev, batch_size=16)
    assert mean_loss(row_losses) == min(losses)


# ---------------------------------------------------------------------------------------- refusals

WITHOUT_RATE = OWN.replace('    rates = Adapters.rates | {"table": "allocation"}\n', "")
NO_METHOD = "own.py: defines no class ByTask that derives orchmoe.Adapters"
BAD_FILES = {
    "a file that does not exist": (None, "own.py: does not exist; give --method FILE.py:Class"),
    "no Python": ("def", "own.py: SyntaxError: .*; correct the file"),
    "no such class": ("", NO_METHOD),
    "a built-in class": ("from orchmoe import OrchMoE as ByTask", NO_METHOD),
    "another name of a built-in class": ("import orchmoe\n\nByTask = orchmoe.OrchMoE", NO_METHOD),
    "no rate": (
        WITHOUT_RATE,
        "ByTask.rates: table needs one of skills, router, token_router, allocation",
    ),
}


@pytest.mark.parametrize("source, message", BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_is_no_method_is_refused_in_one_line(source, message, home):
    if source is None:
        (home / "own.py").unlink()
    else:
        (home / "own.py").write_text(source)
    said = refused("", f"train.py {BRIEF} --method own.py:ByTask --out run")
    assert re.match(f"train.py: error: {message}", said)
    assert not (home / "run").exists()


def test_a_bug_in_the_file_keeps_its_traceback(home):
    path = home / "own.py"
    path.write_text("import torch\n\nnothing_of_this_name.call()\n")
    with pytest.raises(NameError) as error:
        load_method(f"{path}:ByTask")
    assert (str(error.traceback[-1].path), error.traceback[-1].lineno) == (str(path), 2)  # from 0


@pytest.mark.parametrize("line", ["N, B, S = mask.shape", "nn.init.xavier_uniform_(mask[0])"])
def test_a_bug_in_a_method_keeps_its_traceback_in_every_program(line, home):
    """The second line fails inside torch."""
    source = OWN.replace("logits = self.table[:, task_ids]", f"{line}\n        logits = 0")
    (home / "own.py").write_text(source)
    place = source.splitlines().index(f"        {line}")  # from 0
    compare = "experiments/compare/compare.py --no-tune --jobs 1 --methods lora,own.py:ByTask"
    for command in ("train.py --method own.py:ByTask", compare):
        with pytest.raises(ValueError) as error:
            run(f"{command} {BRIEF}")
        assert not isinstance(error.value, UserError)
        lines = [(entry.path.name, entry.lineno) for entry in error.traceback]
        assert ("own.py", place) in lines


def test_a_method_that_fails_leaves_the_module_unchanged(small_t5, home):
    path = home / "own.py"
    path.write_text(OWN.replace("self.noise_shape", "self.no_such_name.noise_shape"))
    method = load_method(f"{path}:ByTask")
    with pytest.raises(AttributeError):
        attach_method(method, small_t5, OrchMoEConfig(), num_tasks=1)
    assert all(parameter.requires_grad for parameter in small_t5.parameters())
    attach_method("orchmoe", small_t5, OrchMoEConfig())


def test_the_name_of_a_built_in_method_is_refused(home):
    (home / "own.py").write_text(OWN.replace("ByTask", "lora"))
    message = "own.py:lora: a built-in method has this name; rename the class"
    refused(message, f"train.py {BRIEF} --method own.py:lora")


def test_a_changed_file_is_refused(own, home):
    (home / "own.py").write_text(OWN + "# one more line\n")
    for command in ("train.py --resume --out own", "eval.py --run own"):
        message = "own: method_class is 'ByTask of"
        refused(message, f"{command} --method own.py:ByTask --device cpu")


def test_code_is_never_taken_from_a_saved_run(own, home):
    """config.json is not trusted: even if it names a file, the file is not run."""
    (home / "evil.py").write_text("raise SystemExit('this ran')")
    change_config(own, "settings", method=f"{home / 'evil.py'}:ByTask")
    for command in (
        f"{RESUME} own",
        "train.py --start own --device cpu",
        "eval.py --run own --device cpu",
        "integrations/export.py --run own --out served",
    ):
        said = refused("", command)
        assert "evil.py:ByTask" in said or "method is 'ByTask', but the run has" in said


@pytest.mark.parametrize(
    "command, message",
    [
        ("eval.py --run own --method {hydra}", "method is 'HydraLoRA', but the run has 'ByTask'"),
        ("eval.py --model tiny --method {hydra}", "has no effect without --run"),
        ("train.py --resume --out own --method {hydra}", "method is 'HydraLoRA', but the run has"),
        ("train.py --start own --method {own} --max-tasks 1", "own: tasks is ["),
        ("integrations/export.py --run own --out out", "no LoRAs with fixed weights"),
    ],
)
def test_a_program_that_cannot_use_a_method_of_ones_own_says_so(command, message, own, home):
    refused(message, command.format(hydra=HYDRA, own="own.py:ByTask"))


def test_the_explorer_loads_a_method_with_a_router(home, monkeypatch):
    (home / "own.py").write_text(
        "from orchmoe import OrchMoE\n\n\nclass Mine(OrchMoE):\n    pass\n"
    )
    method = "--method own.py:Mine"
    run(f"train.py {BRIEF} {method} --out run")
    baselines.OWN_METHODS.clear()
    explore = "experiments/explorer/explorer.py --run run"
    refused("--method Mine: choose one of", explore)

    def checked(loaded, port):
        assert type(loaded.adapters).__name__ == "Mine"
        raise UserError("it is loaded")

    monkeypatch.setattr(explorer, "Server", checked)
    refused("it is loaded", f"{explore} {method}")
