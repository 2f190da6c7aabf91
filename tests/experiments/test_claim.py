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


def lines_of(script):
    """Return the lines that a program prints."""
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
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
PAGES = ("README.md", "docs/evidence.md")


def published(stage, other):
    """Return OrchMoE's loss minus that of another method (draws,), in nats."""
    losses = {"orchmoe": [], other: []}
    for _, _, cell in program.read_jsonl(RESULTS / "cells.jsonl"):
        of_stage, _, name = cell["name"].partition("/")
        row = name.rpartition("-s")[0]
        if of_stage == stage and row in losses:
            losses[row].append(fmean(task["loss"] for task in cell["seen"]["tasks"].values()))
    return np.array(losses["orchmoe"]) - np.array(losses[other])


@pytest.mark.parametrize("other", NAMES)
def test_the_pages_have_the_differences(other):
    first, second = published("first", other), published("second", other)
    nats = [signed(interval(values[:, None])) for values in (first, second, first - second)]
    [row] = re.findall(rf"^\| {NAMES[other]} \|.*", text_of("docs/evidence.md"), re.MULTILINE)
    assert [cell for cell in row.strip(" |").split(" | ") if "[" in cell] == nats
    assert nats[0] in " ".join(text_of("README.md").split())


@pytest.mark.parametrize("page", PAGES)
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


def test_the_pages_have_what_was_not_planned():
    lines = lines_of(RESULTS / "beyond_plan.py")
    assert len(lines) == 12
    for line in lines:
        assert line in text_of(RESULTS / "README.md")
    [of_mhr] = [line for line in lines if "| first, mhr" in line]
    _, _, median, _, _, largest_p, *_ = of_mhr.split(" | ")
    evidence = " ".join(text_of("docs/evidence.md").split())
    assert median in evidence
    assert f"up to {float(largest_p):.3f} without one of the draws" in evidence
