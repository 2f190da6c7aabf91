"""Compare prompts and scores with those of the official code of Super-NaturalInstructions."""

import json
from itertools import groupby
from operator import itemgetter

import pytest

import metrics
from data import read_task, render_prompt
from helpers import Bytes


def test_prompts_equal_the_official_ones(sni_dir, golden_dir):
    rows = [json.loads(line) for line in open(golden_dir / "prompts.jsonl", encoding="utf-8")]
    rows.sort(key=itemgetter("task"))
    for name, of_task in groupby(rows, itemgetter("task")):  # a whole file takes seconds to read
        path = sni_dir / "tasks" / f"{name}.json"
        tasks = (json.loads(path.read_bytes()), "Instances"), (read_task(path), "instances")
        for row in of_task:
            names = row["encoding"].split("_")
            options = dict(
                definition="def" in names,
                explanation="expl" in names,
                num_pos=2 * ("pos2" in names),
                num_neg=2 * ("neg2" in names),
                max_source_length=row["max_source_length"],
            )
            for task, field in tasks:
                source = render_prompt(task, task[field][row["instance"]], Bytes(), **options)
                assert source == row["source"], row["id"]
    assert len(rows) == 240


def test_golden_rows(golden_dir):
    rows = [json.loads(line) for line in open(golden_dir / "metrics.jsonl", encoding="utf-8")]
    assert len(rows) == 311
    for row in rows:
        arguments = row["prediction"], row["references"]
        assert metrics.exact_match(*arguments) == float(row["exact_match"])
        assert metrics.rouge_1(*arguments) == pytest.approx(row["rouge1"], abs=1e-9)
        assert metrics.rouge_l(*arguments) == pytest.approx(row["rougeL"], abs=1e-9)
