"""The counts of experiments/computed.py: by hand, and beside the memory that was measured."""

import re

import pytest
import torch

from experiments import computed
from helpers import LLAMA_FAMILIES, T5_CONFIGS, random_batch, small_model, text_of


def test_counts_of_known_operations():
    x, y = torch.zeros(4, 8), torch.zeros(8, 16)
    with computed.Counter() as counter:
        z = x @ y
        z.view(2, 32)
        z.add_(1.0)
        del z
        x + 1
    assert counter.operations == 2 * 4 * 8 * 16
    read_and_written = (4 * 8 + 8 * 16 + 4 * 16) + 2 * 4 * 16 + 2 * 4 * 8
    assert counter.bytes == 4 * read_and_written
    assert (counter.peak, counter.total) == (4 * 4 * 16, 0)


@pytest.mark.parametrize("name", [*T5_CONFIGS, *LLAMA_FAMILIES])
def test_the_loss_is_that_of_the_model(name):
    base = small_model(name)
    source, mask, target = random_batch(2, 37, lengths=(7, 7), target_lengths=(5, 5))
    expected = base.loss(source, mask, target)
    computed.fix_lengths(base, 5)
    torch.testing.assert_close(base.loss(source, mask, target), expected)


# Bytes by which the memory of a process rose in a step on 1 row: docs/data.md.
@pytest.mark.parametrize("blocks, measured", [(False, 0.485e9), (True, 0.098e9)])
def test_peak_memory_is_the_measured_one(blocks, measured):
    shape = computed.MODELS["T5-base"]
    counter, before = computed.count_step(shape, "orchmoe", blocks, rows=1, dtype=torch.float32)
    assert counter.peak - before == pytest.approx(measured, rel=0.08)


def test_the_page_on_data_has_the_numbers_of_the_table():
    page = text_of("docs/data.md")
    table = text_of("experiments/results/computed.md")
    row = r"^\| (.+) \| orchmoe \| (?:no|yes) \| (\S+) \| \S+ \| (\S+) \|"
    rows = re.findall(row, table, re.MULTILINE)
    assert len(rows) == 2 * len(computed.MODELS)
    for plain, checkpointed in zip(rows[::2], rows[1::2], strict=True):
        name, flop, peak = plain
        assert f"| {name} | {peak} | {checkpointed[2]} | {flop} | {checkpointed[1]} |" in page
