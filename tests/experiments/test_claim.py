"""The study of the paper's claim: what it makes, what it keeps secret, and what its tables say."""

import math
import re
import subprocess
import sys

import numpy as np
import pytest

from experiments import claim
from experiments.compare.study import kind_of_cpu
from experiments.compare.tables import interval, signed
from experiments.results.replication import recompute as replication
from helpers import ROOT, run, text_of
from support import program
from tasks import read_splits

SEEDS = (200, 201)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Return flags of a study with two draws of three tasks, two trials, and four steps."""
    tasks = read_splits(ROOT / "sni")["train"]
    program.write_json(tmp_path / "tuning.json", {"train": tasks[:3]})
    program.write_json(tmp_path / "draws.json", {"100": tasks[3:6], "101": tasks[6:9]})
    sizes = {"TRIALS": 2, "MORE_TRIALS": 1, "BEST_POINTS": 1, "FURTHER_SEEDS": (1001,)}
    sizes |= {"TUNING_TASKS": tmp_path / "tuning.json", "DRAWS": tmp_path / "draws.json"}
    for name, value in sizes.items():
        monkeypatch.setattr(claim, name, value)
    settings = {"dtype": "float32", "steps": 4, "eval_every": 4, "eval_instances": 3}
    settings |= {"abstract_tasks": 3, "warmup": 1}
    monkeypatch.setattr(claim, "DEFAULTS", claim.DEFAULTS | settings)
    monkeypatch.setattr(claim, "EXAMPLES", {"first": 8, "second": 4, "further": 8})
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr("experiments.compare.study.tree", lambda: "abc")
    flags = ["--data", ROOT / "sni", "--model", ROOT / "tiny", "--device", "cpu", "--jobs", 1]
    return [*flags, "--results", "kept", "--out", "out"]


@pytest.fixture
def tuned(small, tmp_path):
    """Return the same flags, of a study that has its values."""
    values = {name: {"chosen": {"alpha": 1.0}, "trials": [1, 2]} for name in claim.COMPARED}
    program.write_json(tmp_path / "kept/values.json", values)
    return small


def stage(name, flags, tmp_path, code=0):
    return run(f"experiments/claim.py --stage {name}", *flags, cwd=tmp_path, code=code)


def lines_of(script, *arguments):
    """Return the lines that a program prints."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def row_of(name):
    """Return the stage of a line of recompute.py, and the beginning of its row in the tables."""
    if name.startswith("lead over"):
        return "second", f"| {name} | loss |"
    stage, pair, outcome = name.replace("_", " ").replace("rougeL", "ROUGE-L").split(", ")
    if outcome == "p and verdict":
        outcome = "loss"
    return stage, f"| {pair} | {outcome} |"


def lines_in_tables(script, tables):
    """Return the lines that recompute.py prints. Each stands in its row of the tables."""
    sections = {text.split()[0].lower(): text for text in tables.split("\n## ")}
    lines = lines_of(script)
    for line in lines:
        name, _, shown = line.partition(": ")
        if name.endswith(", answer"):
            assert shown in sections[name.removesuffix(", answer")]
        else:
            stage, beginning = row_of(name)
            rows = sections[stage].splitlines()
            [row] = [row for row in rows if row.startswith(beginning)]
            assert f"| {shown} |" in row
    return lines


@pytest.mark.slow
def test_the_study_ends_in_its_tables_and_a_second_computation_agrees(small, tmp_path):
    kept = tmp_path / "kept"
    error = stage("first", small, tmp_path, code=2)
    assert "run --stage tune first" in error

    stage("tune", small, tmp_path)
    values = program.read_json(kept / "values.json")
    assert values.keys() == claim.COMPARED.keys()
    # Two trials leave an edge, so that every method gets one more.
    assert {len(report["trials"]) for report in values.values()} == {3}
    assert values["orchmoe"]["chosen"].keys() == claim.START.keys() - {"lr_token_router"}

    for name in ("first", "second"):
        out = stage(name, small, tmp_path)
        assert "loss" not in out and "ROUGE" not in out
        made = sorted(path.stem for path in (kept / name).iterdir())
        assert made == sorted(f"{row}-s{seed}" for row in claim.COMPARED for seed in SEEDS)
    repeated = program.read_json(kept / "repeated/orchmoe-s200.json")
    assert repeated["seen"] == program.read_json(kept / "first/orchmoe-s200.json")["seen"]
    out = stage("further", small, tmp_path)
    cells = claim.read_cells(kept)
    assert len(cells) == 2 * (4 + 4 + 4)
    assert cells["further/frozen_router-s200"]["router"]["distance"] == 0
    assert cells["further/poly_of_clusters-s200"]["settings"]["replaced_router"] == "cluster"
    of_stages = [cells[f"{name}/orchmoe-s200"] for name in ("first", "second")]
    assert [cell["settings"]["train_instances"] for cell in of_stages] == [8, 4]
    assert cells["first/mhr-s201"]["seen"]["tasks"].keys() == set(claim.draws()[201])

    out = stage("tables", small, tmp_path)
    assert not list((kept / "first").iterdir())
    assert claim.read_cells(kept) == cells
    assert stage("tables", small, tmp_path) == out  # from the joined file
    script = kept / "recompute.py"
    script.write_bytes((claim.RESULTS / "recompute.py").read_bytes())
    lines = lines_in_tables(script, out)
    families = 2 * (3 * 3 + 3 + 1)  # differences, verdicts and the answer
    leads = 3 * 3 + 1
    assert len(lines) == families + leads + 4 * 3  # and the further rows


def made_up(row, seed, loss):
    """Return a finished cell with three tasks."""
    tasks = {task: {"loss": loss + i} for task, i in (("a", -1), ("b", 0), ("c", 1))}
    answers = {task: {"rougeL": 10 * loss, "exact_match": loss} for task in tasks}
    settings = {"row": row, "seed": seed, "cpu": kind_of_cpu(), "computed": "x"}
    settings |= {"base": "b", "tokenizer": "t", "train_tasks": str(seed)}
    return {
        "settings": settings,
        "seen": {"tasks": tasks},
        "answers": {"tasks": answers},
        "parameters": {"skills": 2, "routing": 1},
        "tree": "abc",
        "torch": "2",
        "threads": 1,
    }


def write_cells(folder, orchmoe):
    """Write the 128 cells of both families. The lead of OrchMoE is larger in the second one.

    orchmoe: its loss. That of the other methods is 1.1 to 1.3, and 1.2 to 1.4 in the second family.
    """
    random = np.random.default_rng(0)
    level = {"orchmoe": orchmoe, "moe-lora": 1.1, "poly": 1.2, "mhr": 1.3}
    for name, more in (("first", 0.0), ("second", 0.1)):
        for row in claim.COMPARED:
            extra = 0.0 if row == "orchmoe" else more
            for seed in claim.draws():
                loss = level[row] + extra + random.normal(0, 0.02)
                cell = made_up(row, seed, loss)
                program.write_json(folder / name / f"{row}-s{seed}.json", cell)
                if (name, row, seed) == ("first", "orchmoe", 200):
                    program.write_json(folder / "repeated" / f"{row}-s{seed}.json", cell)


@pytest.fixture
def cells(tmp_path):
    """Write the cells of both families, in which OrchMoE is clearly better. Return their folder."""
    folder = tmp_path / "kept"
    write_cells(folder, orchmoe=1.0)
    return folder


def tables(cells, code=0):
    return run("experiments/claim.py --results", cells, cwd=cells.parent, code=code)


def test_a_family_is_decided_by_all_its_cells(cells):
    out = tables(cells)
    assert len(re.findall(r"\| better \|", out)) == 6
    assert out.count("Better than all 3: yes.") == 2
    assert "Needs fewer examples than all 3: yes." in out
    assert (
        "Further rows, 60 examples of each task\n\nNot complete: cells that are missing: 64." in out
    )


def test_a_method_that_is_behind_does_not_need_fewer_examples(tmp_path):
    write_cells(tmp_path / "kept", orchmoe=1.35)
    out = tables(tmp_path / "kept")
    assert (
        "all 3: no: with fewer examples it is still behind moe-lora and poly, but by less." in out
    )


def test_nothing_of_a_family_is_shown_before_all_its_cells_are_there(cells):
    (cells / "second/mhr-s203.json").unlink()
    out = tables(cells)
    assert (
        "Second family, 15 examples of each task\n\nNot complete: cells that are missing: 1." in out
    )
    assert out.count("Better than all 3") == 1 and "lead over" not in out
    assert len(list((cells / "second").iterdir())) == 63  # and none is joined


def change(path, name, value):
    """Change a setting of a cell, or another value of it."""
    cell = program.read_json(path)
    part = cell["settings"] if name in cell["settings"] else cell
    part[name] = value
    program.write_json(path, cell)


FACTS = ["cpu", "computed", "train_tasks", "tree", "torch", "threads", "base", "tokenizer"]


@pytest.mark.parametrize("name", FACTS)
def test_cells_that_cannot_be_subtracted_are_refused(cells, name):
    change(cells / "second/poly-s207.json", name, "another")
    assert re.search(f"second/poly-s207: {name}( of draw 207)? is another", tables(cells, code=2))


def test_a_tree_with_changes_is_no_commit(cells):
    change(cells / "second/poly-s207.json", "tree", "abc-dirty")
    assert "made by the tree 'abc-dirty', which is no commit" in tables(cells, code=2)


@pytest.mark.parametrize("name", ["cpu", "torch"])
def test_trials_that_cannot_be_compared_are_refused(cells, name):
    for row in ("poly", "mhr", "lora"):
        program.write_json(cells / f"tune/{row}_1.json", made_up(row, 0, 1.0))
    tables(cells)
    change(cells / "tune/mhr_1.json", name, "another")
    assert re.search(f"tune/(mhr|poly)_1: {name}.* (is|and) another", tables(cells, code=2))


def test_the_trials_of_a_further_row_may_be_of_another_kind_of_cpu(cells):
    for row, cpu in (("poly", "one"), ("lora", "another"), ("lora_2", "another")):
        path = cells / f"tune/{row}.json"
        program.write_json(path, made_up(row.partition("_")[0], 0, 1.0))
        change(path, "cpu", cpu)
    tables(cells)


@pytest.mark.parametrize("family", ["first", "second"])
def test_a_cell_that_diverged_leaves_no_verdict_of_its_family(family, cells):
    change(cells / family / "poly-s207.json", "diverged", "step 3")
    out = tables(cells)
    assert "Cells of poly diverged.\n\nSo this family has no verdict." in out
    assert out.count("Better than all 3: yes.") == 1 and "lead over" not in out


def test_a_further_row_that_diverged_leaves_the_others(cells):
    for row in claim.ROWS["further"]:
        for seed in claim.draws():
            path = cells / "further" / f"{claim.file_name(row)}-s{seed}.json"
            program.write_json(path, made_up(row, seed, 1.0 + seed % 2))
    change(cells / "further/lora-s203.json", "diverged", "step 3")
    out = tables(cells)
    assert "Cells of lora diverged." in out
    assert "orchmoe - HydraLoRA |" in out and "orchmoe - lora |" not in out


def test_tables_need_the_repetition_of_the_first_cell(cells):
    change(cells / "repeated/orchmoe-s200.json", "answers", {})
    assert "repeated/orchmoe-s200.json: its answers is not that of" in tables(cells, code=2)
    (cells / "repeated/orchmoe-s200.json").unlink()
    assert "repeated/orchmoe-s200.json: " in tables(cells, code=2)


def test_a_chosen_value_at_an_edge_is_named():
    trials = [{"alpha": alpha, "lr_skills": 0.1 * i} for i, alpha in enumerate((1.0, 2.0, 4.0))]
    report = {"best": trials[1], "dev_loss": 1.0, "trials": trials, "all_seeds": []}
    out = claim.values_table({"poly": report | {"chosen": {"alpha": 4.0, "lr_skills": 0.1}}})
    assert out.endswith("| alpha 4, lr_skills 0.1 | alpha |")


def test_a_draw_that_was_begun_on_another_cpu_is_left_out(tuned, tmp_path, monkeypatch):
    cell = made_up("orchmoe", 200, 1.0)
    cell["settings"]["cpu"] = "another"
    program.write_json(tmp_path / "kept/second/orchmoe-s200.json", cell)
    made = []
    monkeypatch.setattr(claim.Study, "run", lambda study, cells: made.extend(cells))
    out = stage("second", tuned, tmp_path)
    assert "draw 200 is left out: it was begun on another" in out
    assert {cell.settings.seed for cell in made} == {201}


def test_cells_that_differ_when_they_are_made_twice_stop_the_study(tuned, tmp_path, monkeypatch):
    losses = iter((1.0, 1.001))  # of the cell, and of the same one once more

    def make(_study, cells):
        for cell in cells:
            program.write_json(cell.path, {"dev_loss": 1, **made_up("orchmoe", 200, next(losses))})

    monkeypatch.setattr(claim.Study, "run", make)
    for _ in range(2):  # also when the stage is run again
        error = stage("first", tuned, tmp_path, code=2)
        assert "repeated/orchmoe-s200.json: its seen is not that of" in error


# ---------------------------------------------------------------------------- the published study


def test_a_second_computation_agrees_with_the_published_tables():
    assert lines_in_tables(claim.RESULTS / "recompute.py", text_of(claim.RESULTS / "tables.md"))


NAMES = {"moe-lora": "MoE-LoRA", "poly": "Poly", "mhr": "MHR"}
PAGES = ("README.md", "docs/evidence.md")


def published(stage, other, outcome="loss"):
    """Return OrchMoE's score minus that of another method (draws, 1)."""
    rows, _ = claim.rows_of(claim.read_cells(claim.RESULTS), stage)
    return claim.means(rows["orchmoe"], outcome) - claim.means(rows[other], outcome)


@pytest.mark.parametrize("other", NAMES)
def test_the_pages_have_the_differences(other):
    first, second = published("first", other), published("second", other)
    nats = [signed(interval(values)) for values in (first, second, first - second)]
    [row] = re.findall(rf"^\| {NAMES[other]} \|.*", text_of("docs/evidence.md"), re.MULTILINE)
    assert [cell for cell in row.strip(" |").split(" | ") if "[" in cell] == nats
    assert nats[0] in " ".join(text_of("README.md").split())


@pytest.mark.parametrize("page", (*PAGES, "docs/paper.md"))
def test_the_pages_have_the_range_of_the_perplexity(page):
    changes = [-100 * math.expm1(published("first", other).mean()) for other in NAMES]
    assert f"{min(changes):.1f} to {max(changes):.1f} %" in " ".join(text_of(page).split())


def test_the_evidence_has_the_leads_and_the_p_values():
    leads = [-published("first", other).mean() for other in NAMES]
    p_values = [claim.t_p_value(published("second", other)) for other in NAMES]
    of_mhr = claim.t_p_value(published("first", "mhr"))
    evidence = " ".join(text_of("docs/evidence.md").split())
    assert f"{min(leads):.3f} to {max(leads):.3f} nats lower" in evidence
    assert "p = {:.3f}, {:.2f} and {:.3f}, in table order".format(*p_values) in evidence
    assert f"The lead over MHR is least sure: p = {of_mhr:.3f}" in evidence


@pytest.fixture(scope="module")
def beyond_plan():
    """Return the lines about what was not planned, as cells of a table."""
    return [line.strip("| ").split(" | ") for line in lines_of(claim.RESULTS / "beyond_plan.py")]


def test_the_page_of_the_claim_has_what_was_not_planned():
    page = text_of(claim.RESULTS / "README.md").splitlines()
    lines = lines_of(claim.RESULTS / "beyond_plan.py")
    assert len(lines) == 8 + 8 + 6 + 7 + 6 + 4  # and four lines are empty
    for line in lines:
        assert line in page


def test_the_page_of_the_claim_has_the_kinds_of_answers(sni_dir):
    shown = lines_of(claim.RESULTS / "beyond_plan.py", sni_dir)[-6:]
    assert "\n".join(shown) in text_of(claim.RESULTS / "README.md")


def test_the_evidence_has_how_much_single_draws_count(beyond_plan):
    [of_mhr] = [line for line in beyond_plan if line[0] == "first, mhr" and len(line) == 5]
    _, _, median, _, largest_p = of_mhr
    evidence = " ".join(text_of("docs/evidence.md").split())
    assert median in evidence
    assert f"up to {float(largest_p):.3f} without one of the draws" in evidence


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_have_the_differences_from_a_lora(beyond_plan, page):
    text = " ".join(text_of(page).split())
    shown = {line[0]: line[1] for line in beyond_plan if len(line) == 4}
    for name in NAMES:
        assert f"{NAMES[name]} {shown[name]}" in text
    weights = replication.read_cells("tuned/cells")["tuned lora"][100]["parameters"]
    assert f"({weights['skills']:,} weights)" in text


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_say_which_way_the_answers_lean(page):
    rouge, of_mhr = (published("first", other, "ROUGE-L") for other in ("moe-lora", "mhr"))
    words = f"MoE-LoRA {signed(interval(rouge), 2)} and "
    words += f"{published('first', 'moe-lora', 'exact match').mean():+.2f}, MHR "
    words += f"{of_mhr.mean():+.2f} and {published('first', 'mhr', 'exact match').mean():+.2f}"
    assert words in " ".join(text_of(page).split())


def test_the_evidence_has_how_blunt_the_answers_are(beyond_plan):
    [[line]] = [line for line in beyond_plan if "exact match with 60" in line[0]]
    change = line.partition(": ")[2]
    assert f"exact match by {change}" in " ".join(text_of("docs/evidence.md").split())


def test_no_trial_of_a_further_row_is_published():
    trials = [path.name for path in (claim.RESULTS / "tune").iterdir()]
    assert {name.partition("_")[0] for name in trials} == claim.COMPARED.keys()
    assert program.read_json(claim.RESULTS / "values.json").keys() == claim.COMPARED.keys()
