"""bench.py runs on small shapes and reports every figure as a ratio; how large is not a matter for a test."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("rouge_score")
ROOT = Path(__file__).resolve().parent.parent


def bench(*flags, cwd, code=0):
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench.py"), "--data", str(ROOT / "sni"), *flags],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "XDG_CACHE_HOME": str(cwd / "cache"), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def test_every_part_gives_ratios_in_a_table_and_a_file(tmp_path):
    out = bench("--quick", "--out", "bench.json", cwd=tmp_path)
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["quick"] is True and {"device", "threads", "dtype", "torch"} <= found["machine"].keys()
    rows = found["rows"]
    assert out.count("| **") == len(rows)
    for row in rows:
        low, high = row["quartiles"]
        assert row["ratio"] > 0 and 0 < low <= high < math.inf, row
        assert row["over_median"] > 0 and row["under_median"] > 0, row
    pairs = {(row["over"], row["under"]) for row in rows}
    assert pairs >= {
        ("mix_skills", "frozen Linear"),
        ("mix_skills", "one LoRA of rank S R"),
        ("loop over skills", "mix_skills"),
        ("einsum with expert axis", "mix_skills"),
        ("mix_skills, S 16", "mix_skills, S 4"),
        ("peft Poly", "OrchMoE"),
        ("peft LoRA", "OrchMoE"),
        ("peft Poly", "OrchMoE, --accumulate 2"),
        ("transformers, file order", "ours, longest first"),
        ("rouge_score", "metrics.rouge_l"),
        ("first start", "second start"),
    }
    assert sum((row["over"], row["under"]) == ("peft Poly", "OrchMoE") for row in rows) == 3


def test_an_unknown_part_is_refused_in_one_line(tmp_path):
    error = bench("--only", "kernel", cwd=tmp_path, code=2)
    assert "--only kernel" in error and error.count("\n") == 1
