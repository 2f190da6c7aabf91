"""The published study of the paper's claim: its recomputation, and its numbers on the pages."""

import math
import re
import subprocess
import sys
from statistics import fmean

import numpy as np
import pytest

from experiments.compare.tables import interval, signed, t_p_value
from experiments.results.replication import recompute as replication
from helpers import ROOT, text_of
from support import program

RESULTS = ROOT / "experiments/results/claim"
METHODS = {"orchmoe", "moe-lora", "poly", "mhr"}
# The part of a cell and its name there.
OUTCOMES = {
    "loss": ("seen", "loss"),
    "ROUGE-L": ("answers", "rougeL"),
    "exact match": ("answers", "exact_match"),
}


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


def test_a_second_computation_agrees_with_the_published_tables():
    assert lines_in_tables(RESULTS / "recompute.py", text_of(RESULTS / "tables.md"))


NAMES = {"moe-lora": "MoE-LoRA", "poly": "Poly", "mhr": "MHR"}


def published(stage, other, outcome="loss"):
    """Return OrchMoE's score minus that of another method (draws, 1)."""
    part, score = OUTCOMES[outcome]
    means = {"orchmoe": [], other: []}
    for _, _, cell in program.read_jsonl(RESULTS / "cells.jsonl"):
        of_stage, _, name = cell["name"].partition("/")
        row = name.rpartition("-s")[0]
        if of_stage == stage and row in means:
            means[row].append([fmean(task[score] for task in cell[part]["tasks"].values())])
    return np.array(means["orchmoe"]) - np.array(means[other])


@pytest.mark.parametrize("other", NAMES)
def test_the_pages_have_the_differences(other):
    first, second = published("first", other), published("second", other)
    nats = [signed(interval(values)) for values in (first, second, first - second)]
    [row] = re.findall(rf"^\| {NAMES[other]} \|.*", text_of("docs/evidence.md"), re.MULTILINE)
    assert [cell for cell in row.strip(" |").split(" | ") if "[" in cell] == nats
    # README has them as perplexity, which is lower by so much.
    mean, low, high = (-100 * math.expm1(value) for value in interval(first))
    [row] = re.findall(rf"^\| {NAMES[other]}[ ,].*", text_of("README.md"), re.MULTILINE)
    assert row.split(" | ")[1:3] == [f"{mean:.1f} %", f"{high:.1f} to {low:.1f} %"]


@pytest.mark.parametrize("page", ["docs/evidence.md", "docs/paper.md"])
def test_the_pages_have_the_range_of_the_perplexity(page):
    changes = [-100 * math.expm1(published("first", other).mean()) for other in NAMES]
    assert f"{min(changes):.1f} to {max(changes):.1f} %" in " ".join(text_of(page).split())


def test_the_evidence_has_the_leads_and_the_p_values():
    leads = [-published("first", other).mean() for other in NAMES]
    p_values = [t_p_value(published("second", other)) for other in NAMES]
    of_mhr = t_p_value(published("first", "mhr"))
    evidence = " ".join(text_of("docs/evidence.md").split())
    assert f"{min(leads):.3f} to {max(leads):.3f} nats lower" in evidence
    assert "p = {:.3f}, {:.2f} and {:.3f}, in table order".format(*p_values) in evidence
    assert f"The lead over MHR is least sure: p = {of_mhr:.3f}" in evidence


@pytest.fixture(scope="module")
def beyond_plan():
    """Return the lines about what was not planned, as cells of a table."""
    return [line.strip("| ").split(" | ") for line in lines_of(RESULTS / "beyond_plan.py")]


def test_the_page_of_the_claim_has_what_was_not_planned():
    page = text_of(RESULTS / "README.md").splitlines()
    lines = lines_of(RESULTS / "beyond_plan.py")
    assert len(lines) == 8 + 8 + 6 + 7 + 6 + 4  # and four lines are empty
    for line in lines:
        assert line in page


def test_the_page_of_the_claim_has_the_kinds_of_answers(sni_dir):
    shown = lines_of(RESULTS / "beyond_plan.py", sni_dir)[-6:]
    assert "\n".join(shown) in text_of(RESULTS / "README.md")


def test_the_evidence_has_how_much_single_draws_count(beyond_plan):
    [of_mhr] = [line for line in beyond_plan if line[0] == "first, mhr" and len(line) == 5]
    _, _, median, _, largest_p = of_mhr
    evidence = " ".join(text_of("docs/evidence.md").split())
    assert median in evidence
    assert f"up to {float(largest_p):.3f} without one of the draws" in evidence


def test_the_pages_have_the_differences_from_a_lora(beyond_plan):
    text = " ".join(text_of("docs/evidence.md").split())
    shown = {line[0]: line[1] for line in beyond_plan if len(line) == 4}
    undecided = []
    for name in NAMES:
        assert f"{NAMES[name]} {shown[name]}" in text
        low, high = re.search(r"\[(\S+), (\S+)\]", shown[name]).groups()
        if float(low) < 0 < float(high):
            undecided.append(NAMES[name])
    readme = " ".join(text_of("README.md").split())
    assert f"{' and '.join(undecided)} may be weak: in an unplanned comparison neither" in readme
    weights = replication.read_cells("tuned/cells")["tuned lora"][100]["parameters"]
    assert f"({weights['skills']:,} weights)" in text


def test_the_evidence_says_which_way_the_answers_lean():
    rouge, of_mhr = (published("first", other, "ROUGE-L") for other in ("moe-lora", "mhr"))
    words = f"MoE-LoRA {signed(interval(rouge), 2)} and "
    words += f"{published('first', 'moe-lora', 'exact match').mean():+.2f}, MHR "
    words += f"{of_mhr.mean():+.2f} and {published('first', 'mhr', 'exact match').mean():+.2f}"
    assert words in " ".join(text_of("docs/evidence.md").split())


def test_the_evidence_has_how_blunt_the_answers_are(beyond_plan):
    [[line]] = [line for line in beyond_plan if "exact match with 60" in line[0]]
    change = line.partition(": ")[2]
    assert f"exact match by {change}" in " ".join(text_of("docs/evidence.md").split())


def test_no_trial_of_a_further_row_is_published():
    trials = [path.name for path in (RESULTS / "tune").iterdir()]
    assert {name.partition("_")[0] for name in trials} == METHODS
    assert program.read_json(RESULTS / "values.json").keys() == METHODS
