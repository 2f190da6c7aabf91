"""The comparison on the miniature, and with it the framework of the studies.

Equal sizes, cells that carry their settings and are not run twice, ablations, controls of the
router, and figures.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
import runtime
import train
from baselines import attach_method
from experiments import compare, plot, routers, study
from experiments.study import Cell, Row, StudyConfig
from helpers import ROOT
from helpers import run as run_program
from orchmoe import OrchMoE, OrchMoEConfig, TaskRouter

# ------------------------------------------------------------------------------------------ sizes


def test_dry_run_says_sizes_and_memory(home):
    out = run(home, "--dry-run", "--methods", "lora,c-poly", "--model", "t5-small")
    assert "base: 76,961,152 parameters" in out
    assert "| lora | 8 | 110 | 442,624 | 0 | 442,624 |" in out
    assert "1.77 MB" in out
    assert "* at equal S R only" in out


def test_dry_run_of_a_llama_needs_its_config_alone(home, tmp_path):
    llama = {
        "model_type": "llama",
        "vocab_size": 500,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "eos_token_id": 2,
        "max_position_embeddings": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(llama))
    out = run(home, "--dry-run", "--methods", "lora,moe-lora", "--model", tmp_path)
    ranks = int(re.search(r"\| lora \| 8 \| (\d+) \|", out)[1])
    # One rank of q and of v in two blocks. The extra ranks go evenly over these four.
    widths = [48 + 48, 48 + 24] * 2
    skills = 0
    for n, width in enumerate(widths):
        skills += width * (8 + (n + 1) * ranks // 4 - n * ranks // 4)
    assert f"| lora | 8 | {ranks} | {skills:,} | 0 | {skills:,} |" in out
    assert re.search(rf"\| moe-lora \| 8 \| \d+ \| [\d,]+ \| {4 * 4 * 48} \|", out)


# In the process itself: what wait4 tells of a child includes the memory of its parent.
MEASURED = """import re, time; from experiments import compare; compare.main()
print(time.process_time(), re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_dry_run_of_t5_xxl_is_quick_and_small(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(compare.SIZES["t5-xxl"].to_hf()))
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, "--dry-run", "--model", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "base: 11,135,332,352 parameters" in done.stdout
    assert "| moe-lora | 8 | 0 |" in done.stdout
    seconds, peak = map(float, done.stdout.splitlines()[-1].split())
    assert seconds < 20
    assert peak < 2e6  # kB


# -------------------------------------------------------------------------------------- ablations


@pytest.mark.parametrize("given", [{}, {"rank": 4, "alpha": 8.0}], ids=str)
def test_ablation_is_one_difference_at_one_size_and_scale(given):
    default = OrchMoEConfig(**given)
    base = checkpoint.on_meta(checkpoint.read_config(ROOT / "tiny"))

    def scales(adapter):
        adapters = attach_method("orchmoe", base, adapter)
        found = {linear.skill_scale / adapter.skills for linear in adapters.linears.values()}
        adapters.detach()
        return found

    assert len(scales(default)) == 1
    for name in compare.ABLATIONS:
        row = compare.ablation(name, default)
        settings = study.changed(train.Settings(adapter=default), row.settings)
        adapter = settings.adapter
        assert adapter.skills * adapter.rank == default.skills * default.rank
        assert scales(adapter) == scales(default)
        differences = [row.router, row.w, *compare.ABLATIONS[name].settings]
        assert len([difference for difference in differences if difference]) == (name != "default")


def test_ablation_that_changes_nothing_or_is_not_possible_is_refused():
    with pytest.raises(ValueError, match="--rows K = 4: the given settings are the same already"):
        compare.ablation("K = 4", OrchMoEConfig(tasks=4))
    with pytest.raises(ValueError, match="--rows S = 8: S R = 12 is no multiple of 8"):
        compare.ablation("S = 8", OrchMoEConfig(rank=3))
    for name, row in compare.ABLATIONS.items():
        if row.w:
            with pytest.raises(ValueError, match=f"--rows {name}: --router none has no w"):
                compare.ablation(name, OrchMoEConfig(router="none"))


def test_changed_refuses_a_field_that_does_not_exist():
    with pytest.raises(ValueError, match="rnak: no field of the settings"):
        study.changed(train.Settings(), {"rnak": 4})


# ---------------------------------------------------------------------------------------- routers


def test_random_router_depends_on_the_sample_alone_and_is_as_sharp_as_a_start():
    config = OrchMoEConfig()
    router = routers.RandomRouter(32, config)
    rng = torch.Generator().manual_seed(0)
    embeddings = torch.randn(1, 9, 32, generator=rng)
    embeddings = embeddings + 0.1 * torch.randn(400, 9, 32, generator=rng)
    mask = torch.ones(400, 9)
    mask[::2, 6:] = 0
    w = router(embeddings, mask)
    alone = router(embeddings[2:3, :6], mask[2:3, :6])
    assert torch.allclose(w[2:3], alone, atol=5e-2)  # no padding, no neighbours
    entropy = torch.special.entr(w).sum(-1).mean()
    assert entropy == pytest.approx(math.log(config.tasks) / 3, rel=0.1)
    # Of different abstract tasks 1/7, since w sums to one; of similar samples nothing.
    assert torch.corrcoef(w.T).fill_diagonal_(0).abs().max() < 0.35
    assert torch.corrcoef(torch.stack([w[:-1, 0], w[1:, 0]]))[0, 1].abs() < 0.2


def test_random_router_takes_the_place_of_the_learnt_one(small_t5):
    attach = routers.attach_with("random", train.Settings())
    generator = torch.Generator().manual_seed(0)
    adapters = attach("orchmoe", small_t5, OrchMoEConfig(), generator=generator)
    assert small_t5.skill_adapters is adapters
    assert type(adapters.router) is routers.RandomRouter
    state = adapters.state_dict()
    adapters.detach()
    generator.manual_seed(0)
    learnt = attach_method("orchmoe", small_t5, OrchMoEConfig(), generator=generator)
    assert type(learnt.router) is TaskRouter
    learnt.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in learnt.state_dict().items())


def test_given_weights_are_one_hot_and_uniform_for_unseen_tasks():
    w = routers.given_weights(["b", "a", "b"], 4)
    expected = [[0, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0.25] * 4]
    assert w.tolist() == expected
    with pytest.raises(ValueError, match="--tasks 1: the training tasks have 2 labels"):
        routers.given_weights(["b", "a"], 1)


def test_oracle_of_the_task_has_an_abstract_task_for_each_real_one(small_t5, home, monkeypatch):
    monkeypatch.chdir(home)
    settings = train.Settings.from_flags({"data": "sni", "model": "tiny", "max_tasks": 3})
    attach = routers.attach_with("task", settings)
    config = OrchMoEConfig(router="none")
    adapters = attach("orchmoe", small_t5, config, num_tasks=3)
    routing = adapters.route(task_ids=torch.tensor([2, -1, 0]))
    assert routing.w.tolist() == [[0, 0, 1], pytest.approx([1 / 3] * 3), [1, 0, 0]]
    assert adapters.route(w=torch.tensor([0.0, 1.0, 0.0])).w.tolist() == [0, 1, 0]


# ------------------------------------------------------------------------------------ the program


METHODS = ["--methods", "orchmoe,lora,full"]
SMALL = (
    "--device cpu --max-tasks 3 --eval-instances 6 --steps 3 --eval-every 2 --batch-size 4 "
    "--seeds 1 --train-instances 8 --trials 2 --jobs 1 --out out"
).split()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    for name in ("sni", "tiny"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(home, *arguments, code=0):
    return run_program("experiments/compare.py", *arguments, cwd=home, code=code)


@pytest.fixture(scope="module")
def small(home):
    """Return the folder of a finished comparison of three methods."""
    run(home, *SMALL, *METHODS)
    return home / "out"


def test_compare_from_start_to_table(small):
    results = json.loads((small / "results.json").read_text())
    out = (small / "results.md").read_text()
    assert "| lora | " in out
    # The frozen base, two heuristics, three methods.
    assert len(results["cells"]) == 6
    for name, report in results["tuning"].items():
        # Equal effort. The best on dev is the one that is used.
        assert len(report["trials"]) == 2 == len(list((small / "tune").glob(f"{name}_*.json")))
        best = min(report["trials"], key=lambda trial: trial["dev_loss"])
        assert report["best"].items() < best.items()
        config = json.loads((small / f"methods/{name}-s0/config.json").read_text())
        settings = config["train"] | config["adapter"]
        assert report["best"].items() <= settings.items()
        assert f"| {name} | 2 | " in out
    sizes = [cell["parameters"] for cell in results["cells"] if "parameters" in cell]
    totals = sorted(sum(size.values()) for size in sizes)
    assert totals.pop() == 2_699_040  # every weight of tiny/
    assert len(totals) == 2
    assert max(totals) <= 1.03 * min(totals)
    learnt = json.loads((small / "methods/orchmoe-s0/routing.json").read_text())
    assert len(learnt["w"]) == 3
    assert len(learnt["skill_use"]) == 20
    assert learnt["distance"] == results["cells"][0]["learnt"]["distance"] > 0
    for cell in results["cells"][:3]:
        losses = [task["loss"] for task in cell["seen"]["tasks"].values()]
        mean = sum(losses) / len(losses)
        assert cell["seen"]["overall"]["loss"] == pytest.approx(mean)
        assert mean > 0


def test_compare_makes_lost_cells_alone(small, home):
    cells = sorted([*small.glob("tune/*.json"), *small.glob("methods/*.json")])
    assert len(cells) == 12  # 6 of the tuning, 6 of the comparison
    stamps = {path: path.stat().st_mtime_ns for path in cells}
    logs = {path: path.stat().st_mtime_ns for path in small.rglob("metrics.jsonl")}
    lost = small / "methods/lora-s0.json"
    saved = json.loads(lost.read_text())
    lost.unlink()  # as if it had been stopped before the end
    assert (small / "results.md").read_text().strip() in run(home, *SMALL, *METHODS)
    assert {path for path in cells if path.stat().st_mtime_ns != stamps[path]} == {lost}
    changed = {path.parent for path in logs if path.stat().st_mtime_ns != logs[path]}
    assert changed <= {small / "methods/lora-s0"}
    # The run was finished, so it is scored, and not trained again.
    assert json.loads(lost.read_text()) | {"seconds": 0} == saved | {"seconds": 0}


FIRST = "out/tune/orchmoe_0.01_2_2e-05_0.01.json: made with "


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--steps", "4"], f"{FIRST}steps 3, not 4; name another folder"),
        (["--max-tasks", "4"], f"{FIRST}max_tasks 3, not 4"),
        # A rank changes the alpha that is left out, and so the name of the trial.
        (["--rank", "4", "--alpha", "2"], f"{FIRST}rank 2, not 4"),
        (["--num-pos", "1"], f"{FIRST}num_pos 2, not 1"),
        (["--no-tune", "--lr-skills", "5e-3"], "out/methods/orchmoe-s0.json: made with "),
    ],
    ids=str,
)
def test_compare_refuses_cells_of_other_settings(small, home, flags, words):
    arguments = [*SMALL, *METHODS]
    if "--no-tune" in flags:
        at = arguments.index("--trials")
        del arguments[at : at + 2]
    error = run(home, *arguments, *flags, code=2)
    assert words in error
    assert error.count("\n") == 1


def test_compare_refuses_a_run_of_unknown_settings(small, home):
    lost = small / "methods/lora-s0/cell.json"
    cell = small / "methods/lora-s0.json"
    saved = {path: path.read_bytes() for path in (lost, cell)}
    for path in saved:
        path.unlink()
    error = run(home, *SMALL, *METHODS, code=2)
    for path, content in saved.items():
        path.write_bytes(content)
    assert "methods/lora-s0/cell.json: made with replaced_router None, not " in error


def cell_of(folder, name, **options):
    """Return a cell that is never really run."""
    path = folder / f"{name}.json"
    return Cell(name, Row(), train.Settings(), {}, path, folder / name)._replace(**options)


def test_cell_require_same_facts(tmp_path):
    """A cell is bound to its data and its base."""
    facts = {"base": "one", "train_tasks": "two"}
    cell = cell_of(tmp_path, "lora", facts=facts)
    cell.require_same()
    runtime.write_json(cell.path, {"settings": {"row": "lora", **cell.values()}})
    cell.require_same()
    for name in facts:
        other = cell._replace(facts=facts | {name: "other"})
        with pytest.raises(ValueError, match=f"made with {name} {facts[name]}, not other; name"):
            other.require_same()


def test_cell_require_same_accepts_a_file_from_before_a_setting(tmp_path):
    cell = cell_of(tmp_path, "lora")
    saved = {"row": "lora", **cell.values()}
    del saved["router_dropout"]
    runtime.write_json(cell.path, {"settings": saved})
    cell.require_same()
    settings = study.changed(cell.settings, {"router_dropout": 0.5})
    with pytest.raises(ValueError, match="made with router_dropout 0.0, not 0.5"):
        cell._replace(settings=settings).require_same()


def test_controls_of_the_router(small, home, monkeypatch):
    given = []
    trained = []
    route = OrchMoE.route
    random_forward = routers.RandomRouter.forward

    def watched_route(self, *inputs, w=None, **options):
        given.append(w)
        return route(self, *inputs, w=w, **options)

    def watched_forward(self, *inputs):
        trained.append(self.training)
        return random_forward(self, *inputs)

    monkeypatch.setattr(OrchMoE, "route", watched_route)
    monkeypatch.setattr(routers.RandomRouter, "forward", watched_forward)
    rows = "w replaced by its mean,w of another sample,router: none,router: random"
    out = run(home, *SMALL, "--ablations", "--rows", rows)
    assert "| w replaced by its mean |" in out
    assert "| router: none |" in out
    assert out.count("run folder out/ablations/default-s0") == 1  # trained once, for all
    runs = {path.parent.name for path in small.glob("ablations/*/metrics.jsonl")}
    assert runs == {"default-s0", "router__none-s0", "router__random-s0"}
    assert sum(trained) == 3  # in each training step
    assert not all(trained)  # and in evaluation

    given = [w for w in given if w is not None and len(w) > 1]
    means = [w for w in given if torch.equal(w, w[:1].expand_as(w))]
    assert 0 < len(means) < len(given)
    assert all(w.shape[1] == 8 for w in given)
    losses = set()
    for name in ("default", "w_replaced_by_its_mean", "w_of_another_sample"):
        result = json.loads((small / f"ablations/{name}-s0.json").read_text())
        losses.add(result["seen"]["overall"]["loss"])
        assert ("dev_loss" in result) == ("learnt" in result) == (name == "default")
    assert len(losses) == 3


def test_replaced_w_is_the_mean_of_dev(monkeypatch):
    """Nothing is learnt from what is scored."""
    w = {"dev": torch.eye(2), "seen": torch.eye(4)}
    monkeypatch.setattr(
        study.evaluation, "router_weights", lambda base, adapters, which, _: w[which]
    )
    settings = train.Settings()
    found = study.replaced_w("mean", settings.train, None, None, "dev", "seen")
    assert found.tolist() == [[0.5, 0.5]] * 4
    found = study.replaced_w("other", settings.train, None, None, "dev", "seen")
    assert sorted(found.tolist()) == sorted(w["seen"].tolist())
    assert not torch.equal(found, w["seen"])
    assert study.replaced_w("", settings.train, None, None, "dev", "seen") is None


# ------------------------------------------------------------------------------ many at a time


def finish(cell, device):
    runtime.write_json(cell.path, {"seconds": 0})
    return True


def test_run_cells_makes_the_cells_of_a_queue_in_turn(tmp_path, monkeypatch):
    order = tmp_path / "order"

    def queue(name):
        for i in range(2):
            cell = cell_of(tmp_path, f"{name}{i}")
            yield cell
            with open(order, "a") as file:
                file.write(f"{name}{i} {cell.path.exists()}\n")

    monkeypatch.setattr(study, "run_cell", finish)
    device = runtime.pick_device(device="cpu")
    study.run_cells([queue("a"), queue("b"), queue("c")], 2, device)
    lines = order.read_text().splitlines()
    assert sorted(lines) == sorted(f"{name}{i} True" for name in "abc" for i in range(2))


def test_run_cells_gives_one_cell_the_threads_of_one_among_several(tmp_path, monkeypatch):
    seen = []

    def count_threads(cell, device):
        seen.append(torch.get_num_threads())
        return finish(cell, device)

    monkeypatch.setattr(study, "run_cell", count_threads)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        study.run_cells([[cell_of(tmp_path, "a")]], 2, runtime.pick_device(device="cpu"))
    finally:
        torch.set_num_threads(before)
    assert seen == [2]


def test_run_cells_ends_when_a_cell_is_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        study, "run_cell", lambda cell, device: cell.name != "b" and finish(cell, device)
    )
    queues = [[cell_of(tmp_path, name)] for name in "abc"]
    with pytest.raises(SystemExit) as end:
        study.run_cells(queues, 1, runtime.pick_device(device="cpu"))
    assert end.value.code == 130
    assert "the same command goes on" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"a.json"}


def test_run_cells_ends_when_a_cell_of_several_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "run_cell", finish)
    wrong = cell_of(tmp_path, "a")
    runtime.write_json(wrong.path, {"settings": {"row": "b"}})
    queues = [[wrong], [cell_of(tmp_path, "c")]]
    with pytest.raises(ValueError, match="a.json: made with row b, not a"):
        study.run_cells(queues, 2, runtime.pick_device(device="cpu"))


# --------------------------------------------------------------------------------------- refusals

REFUSED = {
    "--method lora": "--method: the study sets this itself",
    "--extra-rank 3": "--extra-rank: the study sets this itself",
    "--methods lora,lora": "--methods lora: choose, once each, of orchmoe, lora",
    "--ablations --rows default,default": "--rows default: choose, once each, of default, w re",
    "--ablations --methods lora": "--methods: not with --ablations",
    "--rows default": "--rows: it goes with --ablations",
    "--no-tune --trials 3": "--trials: not with --no-tune",
    "--trials 0": "--trials 0: give 1 or more",
    "--seeds 0": "--seeds 0: give 1 or more",
    "--jobs -1": "--jobs -1: give 0 or more",
    "--methods nope": "--methods nope: choose, once each, of orchmoe, lora, moe-lora",
    "--methods ,": "--methods: name at least one of orchmoe, lora, moe-lora, poly, mhr, c-poly",
    "--ablations --rows nope": "--rows nope: choose, once each, of default, w replaced",
    "--dry-run --model t5-xxs": "t5-xxs/config.json: does not exist; name a model's folder",
    "--model nowhere": "nowhere: ",
}


@pytest.mark.parametrize("flags, words", REFUSED.items())
def test_compare_refuses_a_wrong_command_line(home, flags, words):
    error = run(home, *flags.split(), code=2)
    assert error.startswith(f"compare.py: error: {words}")
    assert error.count("\n") == 1
    assert not (home / "results").exists()


def test_compare_refuses_several_processes(home, monkeypatch):
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert "this program runs in one process" in run(home, code=2)


# ---------------------------------------------------------------------------------------- figures


def test_figures_of_a_comparison(small, home, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(home)
    for path in small.glob("*.png"):
        path.unlink()
    names = ["loss", "categories-seen", "categories-unseen", "router", "allocation"]
    if (small / "ablations.json").exists():  # from another test
        names.append("ablations")
    written = list(plot.figures(small))
    assert sorted(path.stem for path in written) == sorted(names)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_pyplot_without_matplotlib_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        plot.pyplot()


def test_cells_of_all_seeds_are_runs_of_their_own(tmp_path):
    config = StudyConfig(seeds=2, tune=False, out=str(tmp_path))
    settings = train.Settings.from_flags({"max_tasks": 3, "train_instances": 8})
    device = runtime.pick_device(device="cpu")
    of_all = study.Study(settings, device, config, compare.EQUAL)
    methods, _ = compare.method_cells(compare.CompareConfig(methods=("lora",)), of_all)
    ablations, _ = compare.ablation_cells(compare.CompareConfig(rows=("K = 1",)), of_all)
    for cells, name in ((methods, "lora"), (ablations, "K = 1")):
        chosen = [cell for cell in cells if cell.name == name]
        assert [cell.settings.train.seed for cell in chosen] == [0, 1]
        assert [cell.path.stem[-3:] for cell in chosen] == ["-s0", "-s1"]
        assert [Path(cell.folder).name[-3:] for cell in chosen] == ["-s0", "-s1"]


def test_study_of_a_grid_with_a_ceiling_and_a_floor(home, monkeypatch):
    """A study is declared by rows, points and seeds. All rows have one size at each point."""
    monkeypatch.chdir(home)
    flags = "data=sni model=tiny max_tasks=3 train_instances=8 eval_instances=6 batch_size=4"
    values = dict(flag.split("=") for flag in flags.split())
    numbers = {name: int(value) for name, value in values.items() if value.isdecimal()}
    settings = train.Settings.from_flags(values | numbers)
    rows = {"orchmoe": Row(), "lora": Row({"method": "lora"})}
    controls = {
        "ceiling": Row({"router": "none"}, like="orchmoe", router="task"),
        "floor": Row({"router": "none"}, like="orchmoe"),
    }
    points = {}
    for rank, steps in ((1, 2), (3, 4)):
        points[f"r{rank}-t{steps}"] = {"rank": rank, "steps": steps}
    config = StudyConfig(out="grid", jobs=1)
    grid = study.Study(settings, runtime.pick_device(device="cpu"), config, equal=rows)
    cells = grid.cells("grid", rows | controls, points, [0], "losses")
    grid.run(cells)

    found = {cell.path.stem: cell.result() for cell in cells}
    assert len(found) == 8
    for tag, values in points.items():
        sizes = [sum(found[f"{row}-{tag}-s0"]["parameters"].values()) for row in rows]
        assert max(sizes) <= 1.03 * min(sizes)
        log = plot.records(f"grid/grid/lora-{tag}-s0")
        assert sum("loss" in line for line in log) == values["steps"]
    ceiling = found["ceiling-r3-t4-s0"]
    assert ceiling["parameters"]["routing"] == 20 * 3 * 4  # Z of 20 Linears: K = T = 3, S = 4
    assert ceiling["learnt"]["mutual_information"] == 0  # one category
    assert ceiling["learnt"]["largest"] == pytest.approx(1 / 3)
    assert found["orchmoe-r3-t4-s0"]["router"]["distance"] > 0  # of the router from its start
