"""The numbers of the replicates and of the real run on the pages are those of their files."""

import statistics

import pytest

from experiments.results.real import recompute as real
from experiments.results.replication import recompute
from helpers import ROOT, text_of

FOLDER = ROOT / "experiments/results/replication"
TABLES = {"cells": FOLDER / "tables.md", "tuned/cells": FOLDER / "tuned/tables.md"}


@pytest.mark.parametrize("folder", TABLES)
def test_the_tables_have_the_numbers_of_the_cells(folder):
    published = text_of(TABLES[folder])
    lines = recompute.planned_lines(recompute.read_cells(folder), recompute.PAIRS[folder])
    assert lines
    for line in lines:
        pair, _, numbers = line.partition(": ")
        pair = pair.replace("exact_match", "exact match").replace("rougeL", "ROUGE-L")
        assert f"| {pair.replace(', ', ' | ')} | {numbers} |" in published


@pytest.fixture
def evidence():
    return " ".join(text_of("docs/evidence.md").split())


def in_words(change):
    """Return a change of the loss as one of the perplexity: "-1.5 % [-2.6, -0.3]"."""
    return recompute.written(recompute.in_per_cent(change), 1).replace(" ", " % ", 1)


@pytest.mark.parametrize("folder, row", [("tuned/cells", "tuned lora"), ("cells", "lora")])
def test_the_pages_have_the_leads_of_the_cells(evidence, folder, row):
    cells = recompute.read_cells(folder)
    replicates = recompute.differences(cells["orchmoe"], cells[row])
    lead = recompute.interval(recompute.means_of(replicates))
    assert recompute.written(lead, 3) in evidence
    assert in_words(lead) in evidence


def test_the_page_of_the_replicates_has_the_median_task_of_the_cells():
    cells = recompute.read_cells("tuned/cells")
    replicates = recompute.differences(cells["orchmoe"], cells["tuned lora"])
    median = recompute.interval([statistics.median(tasks) for tasks in replicates])
    assert f"medians of the replicates | {in_words(median)} |" in text_of(FOLDER / "README.md")


def test_the_evidence_has_what_the_router_and_K_do_in_the_cells(evidence):
    cells = recompute.read_cells("tuned/cells")
    replicates = recompute.differences(cells["orchmoe"], cells["frozen router"])
    assert in_words(recompute.interval(recompute.means_of(replicates))) in evidence
    replicates = recompute.differences(cells["orchmoe k8"], cells["orchmoe"])
    _, low, high = recompute.interval(recompute.means_of(replicates))
    assert f"between {low:+.3f} and {high:+.3f}" in evidence


def test_the_pages_have_the_table_of_the_real_run():
    of_tasks, overall = real.read_scores()
    for model, which, score in overall:
        if score == "loss":
            mean = statistics.fmean(of_tasks[model, which, score])
            assert overall[model, which, score] == pytest.approx(mean, abs=1e-4)
    page = text_of("experiments/results/real/README.md")
    for model in real.MODELS:
        assert f" | {' | '.join(real.cells_of(overall, model))} |" in page
    for lora in real.LORAS:
        for which in real.T:
            words = real.difference(of_tasks, lora, which, "loss")
            assert words in " ".join(page.split())
