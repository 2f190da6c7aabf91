"""The published study of the paper's claim: its recomputation, and its numbers on the pages."""

import math
import re
import subprocess
import sys
from statistics import fmean

import numpy as np
import pytest

from experiments.compare.tables import interval, signed, t_p_value
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


def size_of(method):
    """Return how many weights of a method train."""
    for _, _, cell in program.read_jsonl(RESULTS / "cells.jsonl"):
        if cell["name"].startswith(f"first/{method}-s"):
            return sum(cell["parameters"].values())


def per_cent(values):
    """Return mean, low and high as changes of the perplexity: ["-2.2", "-3.1", "-1.3"]."""
    return [f"{100 * math.expm1(value):+.1f}" for value in interval(values)]


@pytest.mark.parametrize("other", NAMES)
def test_the_evidence_has_the_differences(other):
    first, second = published("first", other), published("second", other)
    nats = [signed(interval(values)) for values in (first, second, first - second)]
    evidence = text_of("docs/evidence.md")
    [row] = re.findall(rf"^\| {NAMES[other]}, earlier.*", evidence, re.MULTILINE)
    cells = row.strip(" |").split(" | ")
    mean, low, high = per_cent(first)
    assert cells[2:5] == [nats[0], "OrchMoE is better", f"{mean} % [{low}, {high}]"]
    assert cells[-1] == f"{size_of(other):,}"
    [row] = re.findall(rf"^\| {NAMES[other]} \| [-+]0.*", evidence, re.MULTILINE)
    assert [cell for cell in row.strip(" |").split(" | ") if "[" in cell] == nats


@pytest.mark.parametrize("other", ["moe-lora", "poly"])
def test_the_readme_has_the_differences(other):
    mean, low, high = per_cent(published("first", other))
    [row] = re.findall(rf"^\| {NAMES[other]}[ ,].*", text_of("README.md"), re.MULTILINE)
    assert row.split(" | ")[1:3] == [f"{mean} %", f"{low} to {high} %"]


def test_the_page_of_the_paper_has_the_changes_of_the_perplexity():
    changes = {name: 100 * -math.expm1(published("first", name).mean()) for name in NAMES}
    words = "by {moe-lora:.1f}, {poly:.1f} and {mhr:.1f} % of perplexity".format(**changes)
    assert words in " ".join(text_of("docs/paper.md").split())


def test_the_evidence_has_the_p_values_with_15_examples():
    p_values = [t_p_value(published("second", other)) for other in NAMES]
    words = "p = {:.3f}, {:.2f} and {:.3f}, in table order".format(*p_values)
    assert words in " ".join(text_of("docs/evidence.md").split())


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


def test_the_page_of_the_claim_says_which_way_the_answers_lean():
    rouge, of_mhr = (published("first", other, "ROUGE-L") for other in ("moe-lora", "mhr"))
    words = f"MoE-LoRA {signed(interval(rouge), 2)} and "
    words += f"{published('first', 'moe-lora', 'exact match').mean():+.2f}, MHR "
    words += f"{of_mhr.mean():+.2f} and {published('first', 'mhr', 'exact match').mean():+.2f}"
    assert words in " ".join(text_of(RESULTS / "README.md").split())


def test_the_evidence_has_how_blunt_the_answers_are(beyond_plan):
    [[line]] = [line for line in beyond_plan if "exact match with 60" in line[0]]
    change = line.partition(": ")[2]
    assert f"exact match by {change}" in " ".join(text_of("docs/evidence.md").split())


def test_no_trial_of_a_further_row_is_published():
    trials = [path.name for path in (RESULTS / "tune").iterdir()]
    assert {name.partition("_")[0] for name in trials} == METHODS
    assert program.read_json(RESULTS / "values.json").keys() == METHODS
