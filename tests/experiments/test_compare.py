"""The comparison: equal sizes, cells that carry their settings and are not run twice, ablations, the controls
of the router, and figures."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch

import checkpoint
import data
import eval as evaluation
import run_folder
import runtime
import train
from baselines import attach_method
from experiments import compare, plot, sizes
from helpers import ROOT
from orchmoe import OrchMoE, OrchMoEConfig, TaskRouter


def test_dry_run_says_sizes_and_memory(run):
    out = run("--dry-run", "--methods", "lora,c-poly", "--model", "t5-small")
    assert (
        "base: 76,961,152 parameters" in out and "| lora | 8 | 110 | 442,624 | 0 | 442,624 |" in out
    )
    assert "1.77 MB" in out and "* at equal S R only" in out


def test_dry_run_of_a_llama_needs_its_config_alone(run, tmp_path):
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
    out = run("--dry-run", "--methods", "lora,moe-lora", "--model", str(tmp_path))
    ranks = int(re.search(r"\| lora \| 8 \| (\d+) \|", out)[1])
    ends = [
        48 + 48,
        48 + 24,
    ] * 2  # one rank of q and of v in two blocks; extra ones go evenly over these
    skills = sum(end * (8 + (n + 1) * ranks // 4 - n * ranks // 4) for n, end in enumerate(ends))
    assert f"| lora | 8 | {ranks} | {skills:,} | 0 | {skills:,} |" in out
    assert re.search(rf"\| moe-lora \| 8 \| \d+ \| [\d,]+ \| {4 * 4 * 48} \|", out)


# Of the process itself: what wait4 tells of a child includes the memory of the parent that it was forked of.
USED = """import re, time; from experiments import compare; compare.main()
print(time.process_time(), re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_dry_run_of_t5_xxl_is_quick_and_small(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(compare.SIZES["t5-xxl"].to_hf())
    )  # the config alone
    done = subprocess.run(
        [sys.executable, "-c", USED, "--dry-run", "--model", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (
        "base: 11,135,332,352 parameters" in done.stdout and "| moe-lora | 8 | 0 |" in done.stdout
    )
    seconds, peak = map(float, done.stdout.splitlines()[-1].split())
    assert seconds < 20
    assert peak < 2e6  # kB


# ------------------------------------------------------------------------------------------------- ablations


@pytest.mark.parametrize("given", [{}, {"rank": 4, "alpha": 8.0}], ids=str)
def test_every_ablation_is_one_difference_at_one_size_and_scale(given):
    default = OrchMoEConfig(**given)

    def scale(adapter):  # of one rank
        adapters = attach_method("orchmoe", sizes.on_meta(base), adapter)
        return {linear.skill_scale / adapter.skills for linear in adapters.linears.values()}

    base = checkpoint.read_config(ROOT / "tiny")
    fields = train.Settings().values().keys()
    for row in compare.ABLATIONS:
        changes = compare.ablation(row, default)
        assert changes.keys() <= fields, row
        adapter = replace(default, **{k: v for k, v in changes.items() if hasattr(default, k)})
        assert adapter.skills * adapter.rank == default.skills * default.rank
        assert scale(adapter) == scale(default) and len(scale(default)) == 1
        evaluated = row in ("default", "router: random", *compare.SCORED_ONLY)
        assert evaluated == (not changes) and len(compare.ABLATIONS[row]) <= 1


def test_an_ablation_that_changes_nothing_or_cannot_be_is_refused():
    with pytest.raises(ValueError, match="--rows K = 4: the settings given have that already"):
        compare.ablation("K = 4", OrchMoEConfig(tasks=4))
    with pytest.raises(ValueError, match="--rows S = 8: S R = 12 is no multiple of 8"):
        compare.ablation("S = 8", OrchMoEConfig(rank=3))
    for row in compare.SCORED_ONLY:
        with pytest.raises(ValueError, match=f"--rows {row}: --router none has no w of a sample"):
            compare.ablation(row, OrchMoEConfig(router="none"))


def test_random_routing_is_of_the_sample_alone_and_as_sharp_as_a_start():
    config = OrchMoEConfig()
    router = TaskRouter(32, config)
    rng = torch.Generator().manual_seed(0)
    embeddings = torch.randn(1, 9, 32, generator=rng) + 0.1 * torch.randn(400, 9, 32, generator=rng)
    mask = torch.ones(400, 9)
    mask[::2, 6:] = 0
    w = compare.random_forward(router, embeddings, mask)
    alone = compare.random_forward(router, embeddings[2:3, :6], mask[2:3, :6])
    assert torch.allclose(w[2:3], alone, atol=5e-2)  # no padding, no neighbours
    assert torch.special.entr(w).sum(-1).mean() == pytest.approx(
        math.log(config.tasks) / 3, rel=0.1
    )
    assert torch.corrcoef(w.T).fill_diagonal_(0).abs().max() < 0.35  # 1/7 apart from the sum of one
    assert (
        torch.corrcoef(torch.stack([w[:-1, 0], w[1:, 0]]))[0, 1].abs() < 0.2
    )  # like samples, unlike w


# ------------------------------------------------------------------------------------------------ the program

SMALL = (
    "--device cpu --max-tasks 3 --eval-instances 6 --steps 3 --eval-every 2 --batch-size 4 "
    "--methods orchmoe,lora,full --seeds 1 --train-instances 8 --trials 2 --jobs 1 --out out"
).split()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    for name in ("sni", "tiny"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture
def run(home, monkeypatch, capsys):
    """compare.py in this process: what it says, on stderr if it is to fail."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))

    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
        with pytest.raises(SystemExit) as end:
            runtime.run_program(compare.main)
        said = capsys.readouterr()
        assert (end.value.code or 0) == code, said
        return said.out if code == 0 else said.err

    return run


@pytest.fixture
def small(run, home):
    """The folder of a finished comparison of three methods."""
    if not (home / "out/results.json").exists():
        run(*SMALL)
    return home / "out"


def test_a_comparison_from_start_to_table(small):
    results, out = (
        json.loads((small / "results.json").read_text()),
        (small / "results.md").read_text(),
    )
    assert "| lora | " in out
    assert (
        len(results["cells"]) == len(results["summary"]) == 6
    )  # base, two heuristics, three methods
    for name, found in results[
        "tuning"
    ].items():  # equal effort; the best on dev is the one that is used
        assert len(found["trials"]) == 2 == len(list((small / "tune" / name).iterdir()))
        best = min(found["trials"], key=lambda trial: trial["dev_loss"])
        assert found["best"].items() < best.items()
        config = json.loads((small / f"cells/{name}-s0/config.json").read_text())
        settings = config["train"] | config["adapter"]
        assert found["best"].items() <= settings.items() and f"| {name} | 2 | " in out
    sizes = [cell["parameters"] for cell in results["cells"] if cell.get("parameters")]
    totals = sorted(sum(size.values()) for size in sizes)
    assert totals.pop() == 2_699_040  # every weight of tiny/
    assert len(totals) == 2 and max(totals) <= 1.03 * min(totals)
    learnt = results["cells"][0]["learnt"]
    assert len(learnt["w"]) == 3 and len(learnt["skill_use"]) == 20 and learnt["distance"] > 0
    for cell in results["cells"][:3]:
        tasks = cell["seen"]["tasks"].values()
        mean = sum(task["loss"] for task in tasks) / len(tasks)
        assert cell["seen"]["overall"]["loss"] == pytest.approx(mean) and mean > 0


def test_finished_cells_are_not_run_again_and_lost_ones_are(small, run):
    files = sorted(
        path for part in ("tune", "cells") for path in (small / part).rglob("scores.json")
    )
    before = {path: path.stat().st_mtime_ns for path in files}
    logs = {log: log.stat().st_mtime_ns for log in small.rglob("metrics.jsonl")}
    lost = small / "cells/lora-s0/scores.json"
    kept = json.loads(lost.read_text())
    lost.unlink()  # as if it had been stopped before the end
    assert (small / "results.md").read_text().strip() in run(*SMALL)
    assert len(files) == 12  # 6 of tuning, 6 of the comparison
    assert {p for p in files if p.stat().st_mtime_ns != before[p]} == {lost}
    assert {p.parent for p, time in logs.items() if p.stat().st_mtime_ns != time} <= {lost.parent}
    assert json.loads(lost.read_text()) | {"seconds": 0} == kept | {"seconds": 0}


@pytest.mark.parametrize(
    "flags, told",
    [
        (
            ["--steps", "4"],
            "out/tune/orchmoe/0.01_2_2e-05_0.01: made with steps 3, not 4; name another folder",
        ),
        (["--max-tasks", "4"], "0.01_2_2e-05_0.01: made with max_tasks 3, not 4"),
        (["--no-tune", "--lr-skills", "5e-3"], "out/cells/orchmoe-s0: made with "),
        (["--rank", "4"], "0.01_2_2e-05_0.01: made with rank 2, not 4"),
        (["--num-pos", "1"], "made with num_pos 2, not 1"),
    ],
)
def test_cells_of_other_settings_are_refused_by_name(small, run, flags, told):
    at = SMALL.index("--trials")
    arguments = SMALL[:at] + SMALL[at + 2 :] if "--no-tune" in flags else SMALL
    if "--rank" in flags:  # the alpha that is left out follows the rank, hence the trial's name
        flags = [*flags, "--alpha", "2"]
    error = run(*arguments, *flags, code=2)
    assert told in error and error.count("\n") == 1


def test_a_folder_that_no_settings_are_known_of_is_refused(small, run):
    (small / "cells/copy-demo/cell.json").rename(small / "kept")
    assert "cells/copy-demo: made with row None, not copy-demo" in run(*SMALL, code=2)
    (small / "kept").rename(small / "cells/copy-demo/cell.json")


def test_a_cell_is_bound_to_its_data_and_its_base(tmp_path):
    configs, facts = train.Settings(), {"base": "one", "train_tasks": "two"}
    cell = compare.Cell("lora", tmp_path, configs, facts)
    cell.check()
    runtime.write_json(tmp_path / "cell.json", cell.settings)
    cell.check()
    for name in facts:
        with pytest.raises(ValueError, match=f"made with {name} {facts[name]}, not other; name"):
            cell._replace(facts=facts | {name: "other"}).check()


def test_controls_of_the_router(small, run, monkeypatch):
    given, route, random, trained = [], OrchMoE.route, compare.random_forward, []
    monkeypatch.setattr(
        compare,
        "random_forward",
        lambda router, *of: trained.append(router.training) or random(router, *of),
    )
    monkeypatch.setattr(
        OrchMoE, "route", lambda *a, w=None, **k: given.append(w) or route(*a, w=w, **k)
    )
    at = SMALL.index("--methods")
    arguments = SMALL[:at] + SMALL[at + 2 :]
    rows = "w replaced by its mean,w of another sample,router: none,router: random"
    out = run(*arguments, "--ablations", "--rows", rows)
    assert "| w replaced by its mean |" in out and "| router: none |" in out
    assert out.count("run folder out/ablations/default-s0") == 1  # trained once, for all
    assert {path.parent.name for path in small.glob("ablations/*/metrics.jsonl")} == {
        "default-s0",
        "router__none-s0",
        "router__random-s0",
    }
    assert sum(trained) == 3 and not all(trained)  # in each training step, and in evaluation
    means = [
        w for w in given if w is not None and torch.equal(w, w[:1].expand_as(w)) and len(w) > 1
    ]
    others = [w for w in given if w is not None and not any(w is mean for mean in means)]
    assert means and others and all(w.shape[1] == 8 for w in (*means, *others))
    scores = [
        json.loads((small / f"ablations/{row}-s0/scores.json").read_text())
        for row in ("default", "w_replaced_by_its_mean", "w_of_another_sample")
    ]
    assert len({score["seen"]["overall"]["loss"] for score in scores}) == 3


def test_several_workers_run_the_cells_of_a_queue_in_turn(home, tmp_path, monkeypatch):
    began = tmp_path / "order"

    def queue(name):
        for i in range(2):
            yield compare.Cell(name, tmp_path / f"{name}{i}", train.Settings(), {})
            began.open("a").write(f"{name}{i} {(tmp_path / f'{name}{i}/scores.json').exists()}\n")

    monkeypatch.setattr(compare, "run_cell", finish)
    place = runtime.pick_device(device="cpu")
    compare.run_cells([queue("a"), queue("b"), queue("c")], compare.CompareConfig(jobs=2), place)
    lines = began.read_text().split("\n")[:-1]
    assert sorted(lines) == sorted(f"{name}{i} True" for name in "abc" for i in range(2))


def test_a_lone_cell_computes_with_the_threads_of_one_among_several(tmp_path, monkeypatch):
    before, seen = torch.get_num_threads(), []

    def count_threads(cell, place):
        seen.append(torch.get_num_threads())
        return finish(cell, place)

    monkeypatch.setattr(compare, "run_cell", count_threads)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    torch.set_num_threads(4)
    try:
        compare.run_cells(
            [[compare.Cell("a", tmp_path / "a", train.Settings(), {})]],
            compare.CompareConfig(jobs=2),
            runtime.pick_device(device="cpu"),
        )
    finally:
        torch.set_num_threads(before)
    assert seen == [2]


def finish(cell, place):
    runtime.write_json(cell.folder / "scores.json", {"seconds": 0})
    return True


def test_a_stopped_cell_ends_the_comparison(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        compare, "run_cell", lambda cell, place: finish(cell, place) and cell.row != "b"
    )
    queues = [[compare.Cell(name, tmp_path / name, train.Settings(), {})] for name in "abc"]
    with pytest.raises(SystemExit) as end:
        compare.run_cells(queues, compare.CompareConfig(jobs=1), runtime.pick_device(device="cpu"))
    assert end.value.code == 130 and "the same command goes on" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


@pytest.mark.parametrize(
    "flags, told",
    {
        "--method lora": "--method: the comparison sets this itself",
        "--extra-rank 3": "--extra-rank: the comparison sets this itself",
        "--methods lora,lora": "--methods lora: choose, once each, of orchmoe, lora",
        "--ablations --rows default,default": "--rows default: choose, once each, of default, router: token",
        "--ablations --methods lora": "--methods: not with --ablations",
        "--rows default": "--rows: goes with --ablations",
        "--no-tune --trials 3": "--trials: not used with --no-tune",
        "--trials 0": "--trials 0: give 1 or more",
        "--seeds 0": "--seeds 0: give 1 or more",
        "--jobs -1": "--jobs -1: give 0 or more",
        "--methods nope": "--methods nope: choose, once each, of orchmoe, lora, moe-lora",
        "--methods ,": "--methods: name at least one of orchmoe, lora, moe-lora, poly, mhr, c-poly",
        "--ablations --rows nope": "--rows nope: choose, once each, of default, router: token",
        "--dry-run --model t5-xxs": "t5-xxs/config.json: does not exist; name a model's folder, or one of",
        "--model nowhere": "nowhere: ",
    }.items(),
)
def test_a_mistake_on_the_command_line_is_one_line(run, home, flags, told):
    error = run(*flags.split(), code=2)
    assert error.startswith(f"compare.py: error: {told}") and error.count("\n") == 1
    assert not (home / "results").exists()


def test_several_processes_are_refused(run, monkeypatch):
    two = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}
    for name, value in two.items():
        monkeypatch.setenv(name, value)
    assert "this program runs in one process" in run(code=2)


def test_figures_are_written(small):
    pytest.importorskip("matplotlib")
    for path in small.glob("*.png"):
        path.unlink()
    names = ["loss", "categories-seen", "categories-unseen", "router", "allocation"]
    names += ["ablations"] * (
        small / "ablations.json"
    ).exists()  # of a test before, where it has run
    written = list(plot.figures(small))
    assert sorted(path.stem for path in written) == sorted(names)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_without_matplotlib_plot_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        plot.pyplot()


def test_the_mean_w_of_a_control_is_that_of_dev(tmp_path, monkeypatch):
    """Nothing is learnt from what is scored."""
    sets = {
        which: [data.Example("", which, "c", None, [], [])] for which in ("dev", "seen", "unseen")
    }
    given, w = [], {"dev": torch.eye(2)[:1], "seen": torch.eye(2)[1:], "unseen": torch.eye(2)[1:]}
    monkeypatch.setattr(compare, "load_sets", lambda *_: sets)
    monkeypatch.setattr(
        run_folder, "load", lambda *_, **__: (None, mock.Mock(parameter_groups=dict), None)
    )
    monkeypatch.setattr(
        evaluation,
        "measure",
        lambda base, adapters, examples, *, batch_size, w=None, of=w: (
            given.append(w) or (1.0, of[examples[0].task])
        ),
    )
    run = compare.Cell("default", tmp_path, train.Settings(), {})
    compare.closing_scores(
        run._replace(row="w replaced by its mean", answers=False, first=run), None
    )
    assert len(given) == 3 and all(torch.equal(each, w["dev"]) for each in given[1:])
