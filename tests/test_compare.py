"""The comparison: parameter counts against closed forms, budgets, the bootstrap, mutual information, cells
that are not run twice, and figures."""

import json
import math
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import compare
import eval as evaluation
import plot
from orchmoe import OrchMoE, OrchMoEConfig
from t5 import T5Config

ROOT = Path(__file__).resolve().parent.parent
SMALL = T5Config(64, 32, 8, 48, 2, 2, 4, feed_forward_proj="gated-gelu", scale_decoder_outputs=False,
                 tied_head=False)  # fmt: skip
T = 5


def test_dry_run_of_t5_xxl_is_quick_and_small(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(compare.SIZES["t5-xxl"].to_hf()))  # the config alone
    program = [sys.executable, str(ROOT / "compare.py"), "--dry-run", "--model", str(tmp_path)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "base: 11,135,332,352 parameters" in done.stdout and "| moe-lora | 8 | 0 |" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 20
    assert after.ru_maxrss < 2e6  # kB, of the largest child so far


def test_an_unknown_model_is_one_line(tmp_path):
    program = [sys.executable, str(ROOT / "compare.py"), "--dry-run", "--model", "t5-xxs"]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "t5-xxl" in done.stderr


def test_bootstrap_of_known_differences():
    assert compare.bootstrap([2.0] * 9) == (2.0, 2.0, 2.0)
    generator = torch.Generator().manual_seed(0)
    values = (1 + torch.randn(400, generator=generator)).tolist()
    mean, low, high = compare.bootstrap(values)
    error = torch.tensor(values).std().item() / 20  # of the mean of 400
    assert mean == pytest.approx(sum(values) / 400)
    assert low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)
    assert compare.bootstrap(values) == (mean, low, high)


def test_summary_pairs_tasks_and_averages_seeds_first():
    def cell(row, seed, scores):
        tasks = {task: {"rougeL": value, "exact_match": 0.0} for task, value in scores.items()}
        overall = {"rougeL": sum(scores.values()) / len(scores), "exact_match": 0.0}
        return {"row": row, "size": 9, "seed": seed, "seen": {"overall": overall, "tasks": tasks}}

    cells = [cell("orchmoe", 0, {"a": 10, "b": 90}), cell("orchmoe", 1, {"a": 20, "b": 92}),
             cell("lora", 0, {"b": 80, "a": 5}), cell("lora", 1, {"b": 80, "a": 5})]  # fmt: skip
    own, lora = compare.summarise(cells, "orchmoe")
    assert own["seen rougeL"] == {"mean": 53, "sd": pytest.approx(3 * math.sqrt(2)), "difference": None}
    assert lora["seen rougeL"]["difference"] == (10.5, 10, 11)  # of a: 15 - 5, of b: 91 - 80


def test_w_that_is_no_distribution_has_no_entropy_in_the_summary():
    learnt = {"entropy": None, "distance": 0.1, "largest": 2.0}
    learnt["mutual_information"] = evaluation.mutual_information(torch.tensor([[-1.0, 2.0]]), ["x"])
    cell = {"row": "w without softmax", "size": 9, "learnt": learnt}
    (entry,) = compare.summarise([cell, cell], "default")
    assert "learnt entropy" not in entry and entry["learnt distance"] == pytest.approx(0.1)
    assert "| w without softmax | 9 | - | - | - | 2.000 | 0.100 |" in compare.markdown([entry], "default", {})


def test_mutual_information_of_known_tables():
    labels = ["x", "x", "y", "y"]
    assert evaluation.mutual_information(torch.eye(2)[[0, 0, 1, 1]], labels) == pytest.approx(math.log(2))
    assert evaluation.mutual_information(torch.eye(4), labels) == pytest.approx(math.log(2))
    assert evaluation.mutual_information(torch.eye(2)[[0, 1, 0, 1]], labels) == pytest.approx(0)
    assert evaluation.mutual_information(torch.full((4, 8), 1 / 8), labels) == pytest.approx(0)
    soft = torch.tensor([[0.75, 0.25]] * 2 + [[0.25, 0.75]] * 2)  # ln 2 less the entropy of (3/4, 1/4)
    expected = math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    assert evaluation.mutual_information(soft, labels) == pytest.approx(expected)


def test_every_ablation_is_one_difference_that_exists():
    fields = {name for cls in compare.train.CONFIGS.values() for name in cls.__dataclass_fields__}
    default = OrchMoEConfig()
    of_a_rank = 1 / default.skills  # alpha / (S R), with alpha = R
    for row, changes in compare.ABLATIONS.items():
        assert changes.keys() <= fields, row
        adapter = replace(default, **{k: v for k, v in changes.items() if hasattr(default, k)})
        assert adapter.skills * adapter.rank == default.skills * default.rank
        alpha = adapter.rank if adapter.alpha is None else adapter.alpha
        assert alpha / (adapter.skills * adapter.rank) == of_a_rank, row
        assert (adapter != default) or "method" in changes or "lr_router" in changes or not changes
        assert len(changes) <= 1 or row.startswith(("S =", "preset"))


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A comparison of two methods at two sizes with tuning, and its arguments."""
    home = tmp_path_factory.mktemp("compare")
    for name in ("sni", "tiny"):
        (home / name).symlink_to(ROOT / name)
    arguments = ("--device cpu --max-tasks 3 --eval-instances 6 --steps 3 --eval-every 2 --batch-size 4 "
                 "--methods orchmoe,lora,full --seeds 1 --sizes 4,8 --grid 1e-3,3e-3 --full-grid 1e-4 "
                 "--jobs 1 --out out").split()
    return home, arguments, run_compare(home, arguments)


def run_compare(home, arguments, code=0):
    program = [sys.executable, str(ROOT / "compare.py"), *arguments]
    done = subprocess.run(program, cwd=home, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "XDG_CACHE_HOME": str(home / "cache")})  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def test_a_comparison_from_start_to_table(small_run):
    home, _, out = small_run
    results = json.loads((home / "out/results.json").read_text())
    assert "| lora | " in out and (home / "out/results.md").read_text().strip() in out
    assert len(results["cells"]) == len(results["summary"]) == 8  # base, two heuristics, 2 x 2, and full
    rates = json.loads((home / "out/rates.json").read_text())
    for name in ("orchmoe", "lora"):  # equal effort, and the best on dev is the one that is used
        losses = rates[name]["dev_loss"]
        assert list(losses) == ["1e-3", "3e-3"]
        assert rates[name]["rate"] == min((loss, float(rate)) for rate, loss in losses.items())[1]
        config = json.loads((home / f"out/cells/{name}-n8-s0/config.json").read_text())
        assert config["train"]["lr_skills"] == rates[name]["rate"] and config["train"]["split_seed"] == 0
    sizes = [cell["parameters"] for cell in results["cells"] if cell.get("parameters")]
    totals = sorted(sum(size.values()) for size in sizes)
    assert totals.pop() == 2_699_040  # every weight of tiny/
    assert len(totals) == 4 and max(totals) <= 1.03 * min(totals)
    learnt = results["cells"][3]["learnt"]
    assert len(learnt["w"]) == 3 and len(learnt["skill_use"]) == 20 and learnt["distance"] > 0
    assert all(abs(sum(row) - 1) < 1e-5 for row in [*learnt["w"].values(), *learnt["skill_use"].values()])


def test_finished_cells_are_not_run_again_and_lost_ones_are(small_run):
    home, arguments, _ = small_run
    files = sorted((home / "out").rglob("scores.json"))
    before = {path: path.stat().st_mtime_ns for path in files}
    logs = {log: log.stat().st_mtime_ns for log in (home / "out").rglob("metrics.jsonl")}
    lost = home / "out/cells/lora-n4-s0/scores.json"
    kept = json.loads(lost.read_text())
    lost.unlink()  # as if it had been stopped before the end
    run_compare(home, arguments)
    assert len(files) == 13  # 5 of tuning, 8 of the comparison
    assert {p for p in files if p.stat().st_mtime_ns != before[p]} == {lost}
    assert {p.parent for p, time in logs.items() if p.stat().st_mtime_ns != time} <= {lost.parent}
    assert json.loads(lost.read_text()) | {"seconds": 0} == kept | {"seconds": 0}
    assert "made with steps 3, not 4" in run_compare(home, [*arguments, "--steps", "4"], code=2)


def test_w_replaced_by_its_mean_needs_no_training(small_run):
    home, arguments, _ = small_run
    out = run_compare(home, [*arguments, "--ablations", "--rows", "w replaced by its mean,router: none"])
    assert "| w replaced by its mean |" in out and "| router: none |" in out
    assert out.count("run folder out/ablations/default-s0") == 1  # trained once, for both
    assert not (home / "out/ablations/w_replaced_by_its_mean-s0/metrics.jsonl").exists()
    assert len(json.loads((home / "out/ablations.json").read_text())["cells"]) == 3


def test_the_mean_that_replaces_w_is_one_for_all_samples(small_run, monkeypatch):
    home, _, _ = small_run
    monkeypatch.chdir(home)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    folder, given, route = Path("out/cells/orchmoe-n8-s0"), [], OrchMoE.route
    saved = json.loads((folder / "config.json").read_text())
    configs = {name: compare.runtime.from_flags(cls, saved[name])
               for name, cls in compare.train.CONFIGS.items()}  # fmt: skip
    monkeypatch.setattr(OrchMoE, "route", lambda *a, w=None, **k: given.append(w) or route(*a, w=w, **k))
    cell = compare.Cell("mean", Path("out/mean"), configs, mean_of=folder)
    compare.run_cell(cell, compare.runtime.pick_device(device="cpu"))
    means = [w for w in given if w is not None]
    assert given[0] is None and len(means) == 2  # its own on dev; then seen, unseen
    assert means[0].shape == (8,) and means[0].sum().item() == pytest.approx(1)


def test_figures_are_written(small_run):
    pytest.importorskip("matplotlib")
    home, _, _ = small_run
    for path in (home / "out").glob("*.png"):
        path.unlink()
    names = ["loss", "sizes", "categories-seen", "categories-unseen", "router", "allocation"]
    names += ["ablations"] * (home / "out/ablations.json").exists()  # of the test before, where it has run
    done = subprocess.run([sys.executable, str(ROOT / "plot.py"), "--results", "out"], cwd=home, text=True,
                          capture_output=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in names:
        assert (home / f"out/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len(done.stdout.splitlines()) == len(names)


def test_without_matplotlib_plot_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        plot.pyplot()
