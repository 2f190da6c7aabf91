"""The comparison on the miniature, and with it the framework of the studies.

Equal sizes, cells that carry their settings and are not run twice, ablations, and controls of the
router.
"""

import copy
import gc
import math
import multiprocessing
import os
import re
import signal
import subprocess
import time
import weakref
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import baselines
import data
import eval as evaluation
import run_folder
import train
from baselines import attach_method
from experiments.compare import compare, routers, sizes, study, tables
from experiments.compare.search import Search
from experiments.compare.study import Cell, StudyConfig, Variant
from experiments.explorer import explorer
from helpers import (
    CPU,
    ROOT,
    links,
    make_example,
    refusal,
    refused,
    spied,
)
from helpers import run as run_program
from orchmoe import OrchMoE, OrchMoEConfig
from support import program, runtime
from support.program import UserError, read_json
from tasks import DataConfig
from tokenizer import load as load_tokenizer

pytestmark = pytest.mark.usefixtures("short_answers")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return links(tmp_path_factory.mktemp("compare"))


COMPARE = "experiments/compare/compare.py"


def run(home, flags, *more):
    return run_program(f"{COMPARE} {flags}", *more, cwd=home)


# -------------------------------------------------------------------------------------- ablations


@pytest.mark.parametrize("name", compare.ABLATIONS)
def test_ablation_is_one_difference_at_one_size_and_scale(name, small_t5):
    def size_and_scales(adapter):
        adapters = attach_method("orchmoe", small_t5, adapter)
        scales = {skills.scale / adapter.skills for skills in adapters.skills.values()}
        adapters.detach()
        return adapter.skills * adapter.rank, scales

    for given in ({}, {"rank": 4, "alpha": 8.0}):
        default = study.Study(train.Settings(**given), CPU, StudyConfig(), {}).settings
        row = compare.ablation(name, default, num_tasks=5)
        settings = study.changed(default, row.settings)
        assert size_and_scales(settings) == size_and_scales(default)
    differences = [row.w, *compare.ABLATIONS[name].settings]
    assert len(list(filter(None, differences))) == (name != "default")


# ---------------------------------------------------------------------------------------- routers

# Settings of a short run.
FEW = {"max_tasks": 2, "eval_instances": 2, "train_instances": 8, "steps": 1, "batch_size": 2}
FEW |= {"max_source_length": 64, "abstract_tasks": 2, "dtype": "float32"}


def test_ablations_that_are_not_possible_are_left_out_unless_they_are_named(capsys):
    every = list(compare.ABLATIONS)
    assert list(compare.ablations([], train.Settings(), 5)) == every
    assert capsys.readouterr().err == ""
    every.remove(compare.TOLD_THE_TASK)
    every.remove("S = 8")
    assert list(compare.ablations([], train.Settings(skills=4, rank=1), 0)) == every
    warned = capsys.readouterr().err
    assert "left out: --rows S = 8: S R = 4 is no multiple of 8" in warned
    named = compare.ablations(["K = 4", "default"], train.Settings(), 0)
    assert list(named) == ["default", "K = 4"]
    with refusal(r"--rows told the true task \(K = T\): a row of"):
        compare.ablations([compare.TOLD_THE_TASK], train.Settings(), 0)
    for name, options in (("K = 4", {"abstract_tasks": 4}), ("S = 1", {"skills": 1})):
        with refusal(f"--rows {name}: changes nothing in this study"):
            compare.ablations([name], train.Settings(**options), 5)


@pytest.mark.parametrize("K", [8, 24])
def test_random_router_depends_only_on_the_sample_and_is_as_sharp_as_a_start(K):
    rng = torch.Generator().manual_seed(0)
    router = routers.RandomRouter(32, K, rng)
    similar = torch.randn(1, 9, 32, generator=rng)
    embeddings = similar + 0.1 * torch.randn(400, 9, 32, generator=rng)
    mask = torch.ones(400, 9, dtype=torch.bool)
    mask[::2, 6:] = 0
    w = router(embeddings, mask)
    alone = router(embeddings[2:3, :6], mask[2:3, :6])
    assert torch.allclose(w[2:3], alone, atol=5e-2)  # no padding, no neighbours
    entropy = torch.special.entr(w).sum(-1).mean()
    assert entropy == pytest.approx(math.log(K) / 3, rel=0.1)
    # Similar samples share nothing.
    assert torch.corrcoef(torch.stack([w[:-1, 0], w[1:, 0]]))[0, 1].abs() < 0.2


def test_random_router_is_another_one_for_each_seed(small_t5):
    drawn = []
    for seed in (0, 0, 1):
        base = copy.deepcopy(small_t5)
        adapters = attach_method(
            "RandomRouting", base, OrchMoEConfig(), generator=runtime.generator(seed)
        )
        drawn.append(adapters.router.directions)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_oracle_has_an_abstract_task_for_each_task(small_t5):
    adapters = attach_method("Oracle", small_t5, OrchMoEConfig(), num_tasks=28)
    unseen, *known = adapters.route(task_ids=torch.arange(-1, 28)).w
    assert unseen.tolist() == [pytest.approx(1 / 28)] * 28
    assert torch.equal(torch.stack(known), torch.eye(28))


@pytest.mark.parametrize("name", ["RandomRouting", "Oracle", "OracleOfFactors"])
def test_weights_that_are_not_read_are_not_counted(name, small_t5):
    adapters = attach_method(name, small_t5, OrchMoEConfig(), num_tasks=28)
    names = dict(adapters.named_parameters())
    assert [name for name in names if not name.startswith("skills.")] == ["Z"]


def test_a_method_of_a_fixed_size_cannot_get_the_size_of_the_others(small_t5):
    class Fixed(OrchMoE):
        def __init__(self, *inputs, **options):
            super().__init__(*inputs, **options | {"extra_rank": 0})

    with refusal("its size does not depend on its rank", UserError):
        sizes.rank_for_total(10**5, Fixed, small_t5, OrchMoEConfig(), num_tasks=3)


def test_run_with_a_replaced_router_belongs_to_its_study(tmp_path):
    """Only studies import the file of its method."""
    launch = train.LaunchConfig(out=str(tmp_path / "task"))
    run = train.train(train.Settings(**FEW, method="Oracle"), CPU, launch)
    run_folder.load(CPU, run_dir=run.path)
    with mock.patch.dict(baselines.OWN_METHODS, clear=True):
        with refusal("--method Oracle: choose one of", UserError):
            run_folder.load(CPU, run_dir=run.path)
        baselines.load_method(f"{routers.__file__}:Oracle")
        run_folder.load(CPU, run_dir=run.path)


# ------------------------------------------------------------------------------------ the program


SMALL = (
    "--device cpu --max-tasks 3 --eval-instances 6 --steps 2 --eval-every 2 --batch-size 2 "
    "--seeds 1 --train-instances 8 --trials 2 --jobs 1 --max-source-length 64 --out out"
)
METHODS = f"{SMALL} --methods orchmoe,lora,c-poly"


@pytest.fixture(scope="module")
def small(home):
    """Return the folder of a finished comparison of three methods."""
    run(home, METHODS)
    return home / "out"


def test_each_method_gets_its_best_trial_and_another_seed(small):
    cells = {path.stem: read_json(path) for path in small.glob("methods/*.json")}
    assert len(cells) == 4  # the frozen base, three methods
    text = (small / "results.md").read_text()
    assert "\n\nc-poly: told the task of each seen row." in text
    short = "The training was short: each run read 17 % of the training rows."
    assert short in text[: text.index("Verdict by the loss")]
    of_skills = r"lr_skills \S+, alpha \S+"
    for name in ("orchmoe", "lora", "c-poly"):
        # Equal effort, over the rates and the scale that the method has.
        assert re.search(rf"\n\| {name} \| 2 \| {of_skills} \| [\d.]+ \| ", text)
        trials = [read_json(path) for path in small.glob(f"tune/{name}_*.json")]
        assert len(trials) == 2
        # What is compared has the best values on dev, and a seed that did not tune.
        best = min(trials, key=lambda trial: trial["dev_loss"])
        assert best["settings"]["seed"] == 0
        assert best["settings"] | {"seed": 1} == cells[f"{name}-s1"]["settings"]


def test_compare_remakes_only_lost_cells(small, home):
    files = [*small.glob("tune/*.json"), *small.glob("methods/*.json")]
    assert len(files) == 10  # 6 of the tuning, 4 of the comparison
    files += small.rglob("metrics.jsonl")
    stamps = {path: path.stat().st_mtime_ns for path in files}
    lost = small / "methods/lora-s1.json"
    saved = read_json(lost)
    lost.unlink()  # as if it had been stopped before the end
    with spied(evaluation, "predict") as predict:
        out = run(home, METHODS)
    assert {call.kwargs["max_new_tokens"] for call in predict.call_args_list} == {8}
    assert (small / "results.md").read_text().strip() in out
    assert "one seed: no verdict" in out
    # The run was finished, so it is scored, and not trained again.
    assert {path for path in files if path.stat().st_mtime_ns != stamps[path]} == {lost}
    assert read_json(lost) | {"seconds": 0} == saved | {"seconds": 0}


def cell_of(folder, name, **options):
    """Return a cell that is never really run."""
    path = folder / f"{name}.json"
    return Cell(name, Variant(), train.Settings(), {}, path, folder / name)._replace(**options)


def base_cell(folder, values):
    """Return a cell that scores the frozen base on the bundled data, with these settings."""
    settings = study.changed(train.Settings(), values)
    facts, _ = study.facts_of(settings.part(DataConfig), settings.model)
    return cell_of(folder, "a", row=Variant(trains=False), settings=settings, facts=facts)


def test_a_cell_is_bound_to_its_settings_data_and_base(tmp_path):
    cell = cell_of(tmp_path, "lora", facts={"base": "one", "train_tasks": "two"})
    cell.require_same()  # there is no file
    program.write_json(cell.path, {"settings": {"row": "lora", **cell.made_with()}})
    cell.require_same()
    others = [cell._replace(settings=study.changed(cell.settings, {"alpha": 3.0}))]
    others += [cell._replace(facts=cell.facts | {name: "other"}) for name in cell.facts]
    for other in others:
        with refusal("lora.json: made with .*; give another --out"):
            other.require_same()
    cell.path.unlink()
    cell.folder.mkdir()
    (cell.folder / "config.json").touch()  # a run that nobody knows
    with refusal("lora/cell.json: made with abstract_tasks None, not 8"):
        cell.require_same()


def test_a_cell_has_the_best_dev_loss_of_its_run_and_what_its_router_did_then(tmp_path, capsys):
    frozen = base_cell(tmp_path, FEW | {"steps": 2, "eval_every": 1})
    cell = frozen._replace(row=Variant())
    assert study.run_cell(cell, CPU)
    assert "dev loss" not in capsys.readouterr().out  # a study does not show it
    log = program.read_jsonl(cell.folder / "metrics.jsonl")
    evaluations = [record for _, _, record in log if "dev_loss" in record]
    best = min(evaluations, key=lambda record: record["dev_loss"])
    assert best is not evaluations[-1]
    result = cell.result()
    assert result["dev_loss"] == best["dev_loss"]
    assert result["router"]["entropy"] == pytest.approx(best["router_entropy"], rel=1e-6)
    assert result["router"]["distance"] == 0  # in the first step B is 0, so the router stays

    settings = study.changed(cell.settings, {"steps": 4, "eval_every": 4, "lr_router": 0.1})
    longer = cell._replace(settings=settings, path=tmp_path / "b.json", folder=tmp_path / "b")
    assert study.run_cell(longer, CPU)
    assert longer.result()["router"]["distance"] > 1e-3


def test_a_cell_begins_without_the_base_of_the_cell_before(tmp_path, small_t5, monkeypatch):
    """Memory may not hold two bases."""
    earlier = copy.deepcopy(small_t5)
    attach_method("lora", earlier, OrchMoEConfig())
    earlier = weakref.ref(earlier)
    found = []
    monkeypatch.setattr(train, "train", lambda *_, **__: found.append(earlier()))
    gc.disable()  # so that it does not run by chance
    try:
        study.train_and_score(cell_of(tmp_path, "a"), CPU)
    finally:
        gc.enable()
    assert found == [None]


def test_rows_with_one_prompt_are_one_entry_of_a_cell():
    examples = []
    for task, text in (("a", "x"), ("b", "x"), ("a", "y z")):
        example = make_example("0", [3, 1], [[1]])
        examples.append(example._replace(task=task, references=[text]))
    losses = [evaluation.RowLoss(nats, tokens) for nats, tokens in ((1.0, 2), (5.0, 3), (2.0, 4))]
    found = study.by_prompt(examples, ["x", "no", "y"], "unicode", losses)
    assert found == {
        "tasks": ["a", "b"],
        "task": [0, 1],
        "rows": [2, 1],
        "tokens": [6, 3],
        "loss": [3.0, 5.0],
        "exact_match": [100.0, 0.0],
        "rougeL": [pytest.approx(100 + 200 / 3), 0.0],
    }


def test_settings_of_a_row_and_of_a_stage_come_before_tuned_ones(tmp_path):
    of_lora = study.Study(train.Settings(), CPU, StudyConfig(out=str(tmp_path)), {})
    of_lora.best = {"lora": {"alpha": 8.0, "lr_skills": 0.5}}
    lora = Variant({"method": "lora"})
    fixed = Variant({"method": "lora", "lr_skills": 0.125}, like="lora")
    for row, given, expected in [
        (lora, {}, (8.0, 0.5)),
        (fixed, {}, (8.0, 0.125)),
        (lora, {"alpha": 2.0}, (2.0, 0.5)),
        (fixed, {"alpha": 2.0}, (2.0, 0.125)),
    ]:
        settings = of_lora.settings_of("lora", row, given)
        assert (settings.alpha, settings.lr_skills) == expected


def test_run_cells_records_a_trial_that_diverges(tmp_path, monkeypatch):
    def diverge(*_, **__):
        raise train.DivergedError("step 3")

    monkeypatch.setattr(train, "train", diverge)
    trial = cell_of(tmp_path, "lora", scores="dev")
    study.run_cells([[trial]], 1, CPU)
    assert trial.result()["diverged"] == "step 3"
    search = Search({"lr_skills": 1e-2}, 1, lambda _: trial)
    assert list(search) == [trial]
    assert search.losses == {(0,): math.inf}
    cells = [cell_of(tmp_path, name, scores="answers") for name in "ab"]
    with refusal("a.json: the run diverged and has no scores"):
        study.run_cells([cells], 1, CPU)
    assert cells[1].path.exists()  # the others are made all the same


def test_steps_are_timed_whatever_the_rates_are():
    """A rate at which training diverges ends a trial, and not the whole comparison."""
    settings = train.Settings(**FEW | {"lr_skills": 1e15, "warmup": 0})
    sets = data.load_sets(settings.part(DataConfig), load_tokenizer(settings.model))
    assert compare.seconds_of_a_step(settings, CPU, sets) > 0


def test_a_cell_with_a_loss_that_is_not_finite_has_diverged(tmp_path, monkeypatch):
    lost = [evaluation.RowLoss(math.nan, tokens=1)] * 2
    monkeypatch.setattr(evaluation, "measure", lambda *_, **__: lost)
    cell = base_cell(tmp_path, {"max_tasks": 2, "eval_instances": 2})
    assert study.run_cell(cell, CPU)
    assert "the loss on this seen instance is nan" in cell.result()["diverged"]


def test_tune_refuses_rates_that_diverge_and_warns_of_an_edge(tmp_path, monkeypatch, capsys):
    losses = {(0, 0): math.inf}

    def search(searches, *_):
        searches[0].losses = losses

    monkeypatch.setattr(study, "run_cells", search)
    of_lora = study.Study(train.Settings(), CPU, StudyConfig(out=str(tmp_path)), {})
    rows = {"lora": Variant({"method": "lora"})}
    with refusal("lora: all trials diverged"):
        of_lora.tune(rows)
    losses |= {(0, 0): 2.0, (1, 0): 1.0, (-1, 0): 3.0, (2, 0): 4.0}
    program.warn.cache_clear()
    of_lora.tune(rows)
    [warning] = capsys.readouterr().err.splitlines()
    assert "lora: the best alpha, 2, is on the edge of what was tried; in another --out" in warning


def test_study_run_refuses_before_any_cell_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "run_cell", lambda cell, _: pytest.fail(cell.name))
    cells = [cell_of(tmp_path, name) for name in "ab"]
    program.write_json(cells[1].path, {"settings": {"row": "other"}})
    with refusal("b.json: made with row other"):
        study.Study(train.Settings(), CPU, StudyConfig(jobs=1), {}).run(cells)


def test_rows_that_change_w_score_the_run_of_the_default(small, home, monkeypatch):
    trained = []
    router_class = baselines.OWN_METHODS["RandomRouting"].router_class
    forward = router_class.forward

    def watched(self, *inputs):
        trained.append(self.training)
        return forward(self, *inputs)

    monkeypatch.setattr(router_class, "forward", watched)
    rows = "w replaced by its mean,w of another sample,K = 1,router: random"
    out = run(home, f"{SMALL} --ablations --rows", rows)
    assert "| w replaced by its mean |" in out
    assert "\n3 runs of about " in out
    # The run of the default is also that of the rows that change its w.
    runs = {path.parent.name for path in small.glob("ablations/*/metrics.jsonl")}
    assert runs == {"default-s1", "K___1-s1", "router__random-s1"}
    assert sum(trained) == 2  # in each training step
    assert not all(trained)  # and in evaluation
    losses = set()
    for name in ("default", "w_replaced_by_its_mean", "w_of_another_sample"):
        result = read_json(small / f"ablations/{name}-s1.json")
        losses.add(*tables.mean_scores([result], "seen", "loss"))
        assert ("dev_loss" in result) == ("router" in result) == (name == "default")
    assert len(losses) == 3


REPORTS = {  # w of four samples, fields of the report
    "half": (
        torch.tensor([[0.5, 0.5, 0, 0]] * 4),
        {"used": 2, "entropy": math.log(2), "distance": math.log(2)},
    ),
    "uniform": (torch.full((4, 4), 1 / 4), {"entropy": math.log(4), "distance": 0}),
    "one of two": (
        torch.tensor([[0.9, 0.1], [1, 0], [1, 0], [1, 0]]),
        {"largest": 0.975, "used": 1},
    ),
    "many": (torch.eye(24), {"used": 24, "entropy": 0}),
    "no distributions": (
        2 * torch.eye(8)[[3, 3, 3, 3]],
        {"entropy": math.nan, "distance": math.nan},
    ),
}


@pytest.mark.parametrize("w, expected", REPORTS.values(), ids=REPORTS)
def test_the_router_report_says_how_w_is_spread_and_how_far_it_is_from_uniform(w, expected):
    report = study.router_report(w, torch.full_like(w, 1 / w.shape[1]))
    found = {name: report[name] for name in expected}
    assert found == pytest.approx(expected, nan_ok=True, abs=1e-6)


@pytest.mark.parametrize("name", ["tree", "torch"])
def test_finished_cells_of_another_tree_or_torch_give_one_line(tmp_path, name, capsys):
    cells = [cell_of(tmp_path, cell_name) for cell_name in "ab"]
    program.warn.cache_clear()
    for other, is_warned in ({}, False), ({name: "another"}, True):
        made_by = {"tree": study.tree(), "torch": torch.__version__} | other
        for cell in cells:
            settings = {"row": cell.name, **cell.made_with()}
            program.write_json(cell.path, {"settings": settings, **made_by})
            cell.require_same()
        said = capsys.readouterr().err
        assert said.count("finished cells were made by another tree or torch (tree") == is_warned


def test_the_commit_of_a_cell_has_seven_digits_in_every_clone(tmp_path, monkeypatch):
    """Git shows more digits in a larger clone. Cells of one commit must name it alike."""
    who = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    for words in (
        ["init", "--quiet"],
        [*who, "commit", "--quiet", "--allow-empty", "--message", "first"],
        ["config", "core.abbrev", "12"],
    ):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    monkeypatch.setattr(program, "ROOT", tmp_path)
    assert re.fullmatch("[0-9a-f]{7}", study.tree.__wrapped__())


def test_replaced_w_is_the_mean_of_dev_or_that_of_another_sample(monkeypatch):
    """The mean is that of dev, so that nothing is learnt from what is scored."""
    w = {"dev": torch.eye(2), "seen": torch.eye(4)}
    monkeypatch.setattr(study.evaluation, "router_weights", lambda _, __, which, ___: w[which])

    found = {}
    for kind in ("mean", "other"):
        config = train.TrainConfig()
        found[kind] = study.replaced_w(kind, config, None, None, "dev", "seen").tolist()
    assert found["mean"] == [[0.5, 0.5]] * 4
    assert sorted(found["other"]) == sorted(w["seen"].tolist())
    assert all(own != other for own, other in zip(found["other"], w["seen"].tolist(), strict=True))


# ------------------------------------------------------------------------------ many at a time


def finish(cell, device):
    """Make a cell at once."""
    program.write_json(cell.path, {"seconds": 0, "threads": torch.get_num_threads()})
    return True


@pytest.fixture
def forked(monkeypatch):
    """Fork the workers, which saves the imports. Studies spawn theirs."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: fork)
    return fork


@pytest.fixture
def finished_at_once(monkeypatch):
    monkeypatch.setattr(study, "run_cell", finish)


def test_run_cells_makes_the_cells_of_a_queue_in_turn(tmp_path, finished_at_once, forked):
    made = []

    def queue(name):
        for i in range(2):
            cell = cell_of(tmp_path, f"{name}{i}")
            yield cell
            made.append((cell.name, cell.path.exists()))

    study.run_cells([queue("c"), queue("d"), queue("e")], 2, CPU)
    assert sorted(made) == [(f"{name}{i}", True) for name in "cde" for i in range(2)]


def test_run_cells_gives_one_cell_the_threads_of_one_among_several(
    tmp_path, finished_at_once, monkeypatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    cell = cell_of(tmp_path, "a")
    torch.set_num_threads(4)
    try:
        study.run_cells([[cell]], 2, CPU)
    finally:
        torch.set_num_threads(1)
    assert cell.result()["threads"] == 2


def fail_or_wait(cell, device):
    """Save a cell that gets a signal. One named c fails when the other one has begun."""
    if cell.name != "c":
        return run_until_signal(cell, device)
    wait_for(cell.folder.with_name("d").exists)
    raise UserError("c failed")


def test_a_cell_that_fails_stops_the_others(tmp_path, forked, monkeypatch):
    """The one that fails is not the one that began first."""
    monkeypatch.setattr(study, "run_cell", fail_or_wait)
    cells = {name: cell_of(tmp_path, name) for name in "dc"}
    with refusal("c failed"):
        study.run_cells([[cell] for cell in cells.values()], 2, CPU)
    assert cells["d"].path.exists()


@pytest.mark.parametrize("device, picked", [("cuda:1", [mock.call(1)]), ("cpu", [])])
def test_a_worker_applies_the_settings_of_its_gpu(device, picked, monkeypatch):
    """pick_device changes torch in the process that calls it."""
    monkeypatch.setattr(runtime, "pick_device", mock.Mock())
    monkeypatch.setattr(study.threading, "Thread", mock.Mock())
    monkeypatch.setattr(study.signal, "signal", mock.Mock())
    study._start_worker(torch.get_num_threads(), [], torch.device(device))
    assert runtime.pick_device.mock_calls == picked


def run_until_signal(cell, device):
    """Save a cell when a signal comes, as a training run does. Without one, end the process."""
    signal.alarm(30)
    cell.folder.mkdir()
    with program.stop_signals(study.say_nothing) as stop_requested:
        wait_for(stop_requested)
    program.write_json(cell.path, {})
    return False


def test_workers_save_their_cells_when_the_parent_is_killed(tmp_path, forked, monkeypatch):
    monkeypatch.setattr(study, "run_cell", run_until_signal)
    # A worker is forked with the pipes of those before it, which see the end of the parent only
    # when this worker has ended, too.
    monkeypatch.setattr(study, "GRACE", 2)
    cells = [cell_of(tmp_path, name) for name in "cd"]
    kind = signal.SIGKILL
    assert stop_when_running(cells, 2, forked, os.kill, kind) == -kind
    wait_for(lambda: all(cell.path.exists() for cell in cells))


def run_in_own_group(cells, jobs):
    os.setpgrp()
    # As in a terminal. A shell that starts a program in the background makes it ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    program.run_program(lambda: study.run_cells([[cell] for cell in cells], jobs, CPU))


def stop_when_running(cells, jobs, fork, send, kind):
    """Run two cells in a process group of its own. Signal it when they run. Return its code."""
    parent = fork.Process(target=run_in_own_group, args=(cells, jobs))
    parent.start()
    wait_for(lambda: all(cell.folder.exists() for cell in cells[:jobs]))
    send(parent.pid, kind)
    parent.join()
    return parent.exitcode


def sleep(cell, device):
    cell.folder.mkdir()
    time.sleep(60)


def never_notice_signals(cell, device):
    """Make no cell, as a worker that is still starting."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sleep(cell, device)


SIGTERM = (os.kill, signal.SIGTERM)  # to the parent
CTRL_C = (os.killpg, signal.SIGINT)  # to all processes of a terminal
STOPS = {  # what a cell does, how many at a time, and the signal
    "training": (run_until_signal, 1, *CTRL_C),
    "two that train": (run_until_signal, 2, *CTRL_C),
    "two that train, SIGTERM": (run_until_signal, 2, *SIGTERM),
    "scoring": (sleep, 1, *CTRL_C),
    "two that score": (sleep, 2, *CTRL_C),
    "workers that start": (never_notice_signals, 2, *CTRL_C),
}


@pytest.mark.parametrize("make, jobs, send, kind", STOPS.values(), ids=STOPS)
def test_after_a_signal_what_trains_is_saved_and_only_the_parent_speaks(
    make, jobs, send, kind, tmp_path, forked, monkeypatch, capfd
):
    never_starts = make is never_notice_signals
    monkeypatch.setattr(study, "_in_worker" if never_starts else "run_cell", make)
    cells = [cell_of(tmp_path, name) for name in "cd"]
    assert stop_when_running(cells, jobs, forked, send, kind) == 130
    assert capfd.readouterr() == ("stopped; run the same command to continue\n", "")
    saved = [cell.path.exists() for cell in cells[:jobs]]
    assert saved == [make is run_until_signal] * jobs


def end(cell, device):
    os._exit(1)


def test_a_worker_that_is_killed_gives_one_line(tmp_path, forked, monkeypatch):
    cells = [cell_of(tmp_path, name) for name in "cd"]
    monkeypatch.setattr(study, "run_cell", end)
    with refusal("a process was killed .* with fewer --jobs", program.UserError):
        study.run_cells([[cell] for cell in cells], 2, CPU)


def wait_for(condition):
    """Wait until the condition holds, for at most a minute."""
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise TimeoutError


# ------------------------------------------------------------------------- a comparison as a whole


def test_all_programs_open_the_runs_of_a_comparison(home):
    """The methods get extra ranks, so that all have one size."""
    hydra = f"{ROOT / 'examples/hydra_lora.py'}:HydraLoRA"
    methods = f"orchmoe,lora,mhr,{hydra}"
    untuned = SMALL.replace("--trials 2", "--no-tune")
    out = run(home, f"{untuned} --seeds 2 --out all --methods", methods)
    sizes = []
    for name in ("orchmoe", "lora", "mhr", "HydraLoRA"):
        folder = f"all/methods/{name}-s1"
        sizes.append(sum(read_json(home / f"{folder}.json")["parameters"].values()))
        question = "--ask 'Find it.' --input 'a, b' --max-new-tokens 2"
        own = ["--method", hydra] if name == "HydraLoRA" else []
        run_program(f"eval.py --run {folder} --device cpu {question}", *own, cwd=home)
        if name in ("orchmoe", "lora"):
            run_program(f"integrations/export.py --run {folder} --out served-{name}", cwd=home)
    assert max(sizes) <= 1.03 * min(sizes)
    explorer.load(home / "all/methods/orchmoe-s1")

    # The last lines have commands that use the best run of a recommended method.
    lines = out[out.rindex("the best run of ") :].splitlines()
    assert lines[1].startswith("  python eval.py --run all/methods/lora-s")
    assert lines[2].startswith("  python -m integrations.export --run all/methods/lora-s")


@pytest.mark.parametrize("trains", [True, False])
def test_a_cell_of_data_that_changed_is_not_saved(tmp_path, trains):
    """The rows may change while a comparison runs, which takes hours."""
    row = Variant(trains=trains)
    settings = train.Settings(**FEW)
    facts = {"train_tasks": "another", "test_tasks": "another"}
    scores = "dev" if trains else "answers"
    cell = cell_of(tmp_path, "a", row=row, settings=settings, facts=facts, scores=scores)
    with refusal("the train rows changed while cells were made; .*a.json", UserError):
        study.run_cell(cell, CPU)
    assert not cell.path.exists()


def test_a_cell_of_a_method_whose_file_changed_is_not_made(tmp_path, monkeypatch):
    """Workers start again for each stage, and read the file then."""
    edited = SimpleNamespace(kind="Mine of 2", source="mine.py:Mine")
    monkeypatch.setitem(study.OWN_METHODS, "Mine", edited)
    monkeypatch.setattr(train, "train", lambda *_, **__: None)
    settings = train.Settings(method="Mine")
    cell = cell_of(tmp_path, "a", settings=settings, facts={"method_file": "Mine of 1"})
    with refusal("mine.py:Mine: the file changed while cells were made", UserError):
        study.run_cell(cell, CPU)
    assert study.run_cell(cell._replace(facts={"method_file": "Mine of 2"}), CPU) is False


def test_runs_that_begin_before_their_trials_are_refused_at_once(small, home):
    """Their values may not be the best ones. After the trials it would be too late to say so."""
    trials = sorted(small.glob("tune/*"))
    message = "orchmoe-s1.json: begun before the 3 trials of orchmoe, which choose its"
    refused(message, f"{COMPARE} {METHODS} --trials 3", cwd=home)
    assert sorted(small.glob("tune/*")) == trials


def test_a_search_counts_the_trials_that_it_will_make(tmp_path):
    def cell(values):
        return cell_of(tmp_path, f"lora_{values['lr_skills']:g}")

    search = Search({"lr_skills": 1e-2}, 3, cell)
    assert search.count_missing() == 3
    for name, loss in (("lora_0.01", 1.0), ("lora_0.5", 0.0)):  # no trial of this search has 0.5
        made = cell_of(tmp_path, name)
        settings = {"row": name, **made.made_with()}
        program.write_json(made.path, {"dev_loss": loss, "settings": settings})
    assert search.count_missing() == 2
    assert Search({"lr_skills": 1e-2}, 1, cell).count_missing() == 0


def test_the_step_that_a_run_has_reached_is_read_from_its_log(tmp_path):
    cell = cell_of(tmp_path, "a")
    assert study.reached(cell) == "a: step 0 of 600"
    cell.folder.mkdir()
    log = cell.folder / "metrics.jsonl"
    log.write_text('{"step": 0, "loss": 1}\n{"step": 1, "loss": 1}\n{"step": 2, "lo')
    assert study.reached(cell) == "a: step 2 of 600"
    log.write_text('{"step": 599, "dev_loss": 1}\n')
    assert study.reached(cell) == "a: being scored"
    frozen = cell_of(tmp_path, "b")._replace(row=study.Variant(trains=False))
    assert study.reached(frozen) == "b: being scored"


def test_a_lora_is_compared_last(home, monkeypatch):
    """Otherwise an undecided comparison would recommend the other method."""
    compared = []
    monkeypatch.setattr(compare, "compare", lambda _study, rows: compared.extend(rows))
    run(home, "--methods lora,poly,orchmoe --device cpu")
    assert compared == ["poly", "orchmoe", "lora"]


def test_a_file_that_is_not_of_the_comparison_is_not_replaced(small, home):
    (home / "notes/results.md").parent.mkdir()
    (home / "notes/results.md").write_text("my own notes")
    message = "notes/results.md: exists, and nothing is overwritten; give another --out"
    refused(message, f"{COMPARE} {METHODS} --out notes", cwd=home)


@pytest.mark.parametrize(
    "method, is_exported",
    [("orchmoe", True), ("orchmoe-token", False), ("orchmoe-factors", False)],
)
def test_the_commands_are_those_of_the_best_run_and_export_what_can_be_exported(
    tmp_path, method, is_exported, monkeypatch, capsys
):
    cells = [cell_of(tmp_path, name, settings=train.Settings(method=method)) for name in "abc"]
    for cell, loss in zip(cells, (2.0, 1.0, 3.0), strict=True):
        program.write_json(cell.path, {"dev_loss": loss})
    monkeypatch.setattr(run_folder, "read_run", lambda folder: SimpleNamespace(facts={}))
    compare.print_next_commands(cells)
    first, eval_command, *export = capsys.readouterr().out.splitlines()
    assert first == "the best run of b on dev, to use it:"
    assert eval_command.startswith(f"  python eval.py --run {tmp_path / 'b'} --ask ")
    assert bool(export) == is_exported
    if is_exported:  # in a folder that no other method takes
        assert export[0].endswith("/b --out served-orchmoe")


def test_after_a_comparison_of_whole_prompts_it_says_how_to_write_one(
    tmp_path, monkeypatch, capsys
):
    cell = cell_of(tmp_path, "a", settings=train.Settings(data="own.jsonl"))
    program.write_json(cell.path, {"dev_loss": 1.0})
    facts = SimpleNamespace(facts={"instructions": False})
    monkeypatch.setattr(run_folder, "read_run", lambda folder: facts)
    compare.print_next_commands([cell])
    said = capsys.readouterr().out.splitlines()
    assert said[1].endswith(" --prompt 'YOUR WHOLE PROMPT'")
    assert said[-1].startswith("a whole prompt is written as in own.jsonl: all that stands before")


REFUSED = {
    "--method lora": "--method: the study sets this itself; leave it out",
    "--methods lora,lora": "--methods lora: choose, once each, of orchmoe, lora",
    "--ablations --rows nope": "--rows nope: choose, once each, of default, w replaced",
    "--ablations --methods lora": "--methods: has no effect with --ablations",
    "--rows default": "--rows: has no effect without --ablations",
    "--axes warmup": "--axes warmup: choose, once each, of lr_skills, alpha",
    "--no-tune --trials 3": "--trials: has no effect with --no-tune",
    "--no-tune --axes alpha": "--axes: has no effect with --no-tune",
    "--methods lora,poly --axes alpha,lr_router": "--axes lr_router: has no effect in this",
    "--methods lora,orchmoe --axes lr_router --data sni/own.jsonl": "--axes lr_router: lora has",
    "--methods lora,c-poly --data sni/own.jsonl": "CPoly routes by task id: every JSONL",
    "--methods lora,poly --lr-router 1": "--lr-router: has no effect in this comparison",
}


@pytest.mark.parametrize("flags, words", REFUSED.items())
def test_compare_refuses_a_wrong_command_line_before_anything_trains(
    home, flags, words, monkeypatch
):
    monkeypatch.setattr(study, "run_cells", None)
    refused(f"compare.py: error: {words}", f"{COMPARE} {flags}", cwd=home)
