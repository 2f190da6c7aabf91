"""The numbers of the sixteen replicates on the pages are those of their cells."""

import importlib.util
import re

import pytest

from helpers import ROOT

FOLDER = ROOT / "experiments/results/replication"
TABLES = {"cells": FOLDER / "tables.md", "tuned/cells": FOLDER / "tuned/tables.md"}


@pytest.fixture(scope="module")
def recompute():
    """Return the program beside the cells, which imports nothing of this project."""
    spec = importlib.util.spec_from_file_location("recompute", FOLDER / "recompute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("folder", TABLES)
def test_the_tables_have_the_numbers_of_the_cells(recompute, folder):
    published = TABLES[folder].read_text(encoding="utf-8")
    lines = recompute.planned_lines(recompute.read_cells(folder), recompute.PAIRS[folder])
    assert lines
    for line in lines:
        pair, _, numbers = line.partition(": ")
        pair = pair.replace("exact_match", "exact match").replace("rougeL", "ROUGE-L")
        assert f"| {pair.replace(', ', ' | ')} | {numbers} |" in published


@pytest.mark.parametrize("folder, row", [("tuned/cells", "tuned lora"), ("cells", "lora")])
def test_the_pages_have_the_leads_of_the_cells(recompute, folder, row):
    cells = recompute.read_cells(folder)
    lead = recompute.interval(
        recompute.means_of(recompute.differences(cells["orchmoe"], cells[row]))
    )
    mean, low, high = (-value for value in recompute.in_per_cent(lead))
    in_words = rf"{mean:.1f} %[^\[%]*\[{high:.1f}, {low:.1f}\]"
    evidence = (ROOT / "docs/evidence.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in (evidence, readme):
        assert recompute.written(lead, 3) in page
    assert re.search(in_words, evidence)
    assert folder == "cells" or re.search(in_words, readme)
