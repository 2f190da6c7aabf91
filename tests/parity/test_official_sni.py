"""Compare prompts and scores with those of the official code of Super-NaturalInstructions."""

import functools
import json

import pytest

import metrics
from helpers import Bytes, text_of
from tasks import read_task, render_prompt


def test_prompts_equal_the_official_ones(sni_dir, golden_dir):
    lines = text_of(golden_dir / "prompts.jsonl").splitlines()
    assert len(lines) == 240
    read = functools.cache(read_task)  # a whole file takes seconds to read
    for line in lines:
        row = json.loads(line)
        task = read(sni_dir / "tasks" / f"{row['task']}.json")
        names = row["encoding"].split("_")
        options = dict(
            definition="def" in names,
            explanation="expl" in names,
            num_pos=2 * names.count("pos2"),
            num_neg=2 * names.count("neg2"),
            max_source_length=row["max_source_length"],
        )
        source = render_prompt(task, task["instances"][row["instance"]], Bytes(), **options)
        assert source == row["source"], row["id"]


def test_scores_equal_the_official_ones(golden_dir):
    lines = text_of(golden_dir / "metrics.jsonl").splitlines()
    assert len(lines) == 311
    for line in lines:
        row = json.loads(line)
        for name, metric in metrics.METRICS.items():
            found = metric(row["prediction"], row["references"])
            assert found == pytest.approx(float(row[name]), abs=1e-9), row
