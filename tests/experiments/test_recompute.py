"""The numbers of the sixteen replicates on the pages are those of their cells."""

import importlib.util
import math
import re

import pytest

from helpers import ROOT

FOLDER = ROOT / "experiments/results/replication"
TABLES = {"first": FOLDER / "tables.md", "tuned": FOLDER / "tuned/tables.md"}


@pytest.fixture(scope="module")
def recompute():
    """Return the program beside the cells, which imports nothing of this project."""
    spec = importlib.util.spec_from_file_location("recompute", FOLDER / "recompute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("comparison", TABLES)
def test_the_tables_have_the_numbers_of_the_cells(recompute, comparison):
    published = TABLES[comparison].read_text(encoding="utf-8")
    lines = recompute.planned_lines(recompute.read_cells(comparison), recompute.PAIRS[comparison])
    assert lines
    for line in lines:
        pair, _, numbers = line.partition(": ")
        pair = pair.replace("exact_match", "exact match").replace("rougeL", "ROUGE-L")
        assert f"| {pair.replace(', ', ' | ')} | {numbers} |" in published


@pytest.mark.parametrize("comparison, row", [("tuned", "tuned lora"), ("first", "lora")])
def test_the_pages_have_the_leads_of_the_cells(recompute, comparison, row):
    cells = recompute.read_cells(comparison)
    lead = recompute.interval(recompute.differences(cells, "orchmoe", row))
    mean, low, high = (-100 * math.expm1(value) for value in lead)
    in_words = rf"{mean:.1f} %[^\[%]*\[{high:.1f}, {low:.1f}\]"
    evidence = (ROOT / "docs/evidence.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in (evidence, readme):
        assert recompute.written(lead, 3) in page
    assert re.search(in_words, evidence)
    assert comparison == "first" or re.search(in_words, readme)
