"""The comparison on rows of JSONL, from start to verdict.

The numbers of the verdict are computed again from the cells, by code that shares nothing with
experiments/compare/tables.py. It is the code of experiments/results/compare/recompute.py; if there
are few tasks, it is in this file.
"""

import json
import re
from collections import defaultdict
from statistics import fmean

import pytest

from experiments.results.compare import recompute
from helpers import links, run, write_rows

pytestmark = pytest.mark.usefixtures("short_answers")

COMPARE = (
    "experiments/compare/compare.py --device cpu --methods orchmoe,lora --seeds 2 --jobs 1 "
    "--eval-every 2 --batch-size 4 --no-tune --max-source-length 128 --out out"
)


def read_cells(home, name, seeds=2):
    paths = [home / f"out/methods/{name}-s{seed}.json" for seed in range(1, seeds + 1)]
    return [json.loads(path.read_text()) for path in paths]


# ------------------------------------------------------------------------- the independent numbers


def expected_line(first, second, which):
    """Return "mean [low, high]" of the loss of two rows with two cells each."""
    seeds = range(2)
    prompts = [[cell[which]["prompts"] for cell in cells] for cells in (first, second)]
    tasks = [prompts[0][0]["tasks"][number] for number in prompts[0][0]["task"]]
    tokens = prompts[0][0]["tokens"]
    members = defaultdict(list)
    for u, task in enumerate(tasks):
        members[u if task == "-" else task].append(u)

    def difference(u, s):
        return prompts[0][s]["loss"][u] - prompts[1][s]["loss"][u]

    means = {}
    for group, rows in members.items():
        total = sum(tokens[u] for u in rows)
        means[group] = [sum(difference(u, s) for u in rows) / total for s in seeds]

    if len(members) >= 6:
        mean, half = recompute.interval(list(means.values()))
    else:  # the variance of each task's ratio, summed over the tasks
        by_seed = [fmean(values[s] for values in means.values()) for s in seeds]
        mean = fmean(by_seed)
        of_mean, of_rest = 0.0, 0.0
        for group, rows in members.items():
            total = sum(tokens[u] for u in rows)
            factor = len(rows) / (len(rows) - 1) / (total * len(members)) ** 2
            for u in rows:
                left = [difference(u, s) - tokens[u] * means[group][s] for s in seeds]
                of_mean += factor * fmean(left) ** 2
                of_rest += factor * sum((value - fmean(left)) ** 2 for value in left)
        units, freedom = len(tasks), len(tasks) - len(members)
        of_seeds = units * sum((value - mean) ** 2 for value in by_seed)
        half = recompute.half_width(
            2 * units * of_mean, of_seeds, units * of_rest, units, len(seeds), freedom
        )
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


# ------------------------------------------------------------------------------------ the programs


def test_a_comparison_of_bundled_rows_ends_in_a_verdict(tmp_path):
    home = links(tmp_path)
    out = run(f"{COMPARE} --steps 4 --data sni/own.jsonl", cwd=home)
    orchmoe, lora = read_cells(home, "orchmoe"), read_cells(home, "lora")
    prompts = len(orchmoe[0]["seen"]["prompts"]["task"])
    assert re.search(rf"rows of data: \d+ train, \d+ dev, {prompts} seen\n", out)
    assert "plan: orchmoe, lora with seeds 1 to 2\n" in out
    estimate = r"\n4 runs of about (\d+) s on an otherwise idle machine "
    estimate += r"\(\d\S* s a step\), (\d+) s with 1 at a time"
    of_a_run, in_all = map(int, re.search(estimate, out).groups())
    assert abs(in_all - 4 * of_a_run) <= 2  # both are rounded
    left = re.findall(r"methods/\S+\.json, \d+ s, .*, (\d) of 4 runs, about \d+ s left", out)
    assert left == ["1", "2", "3"]

    assert "| frozen base |" in out
    assert "unseen" not in out
    assert "punctuation counts" in out

    line = re.search(r"- seen: (.*): \*\*(\w+)\*\*\. (.*)", out)
    assert line.group(1) == expected_line(orchmoe, lora, "seen")
    low, high = map(float, re.findall(r"[-+][\d.]+", line.group(1))[1:])
    assert line.group(2) == ("better" if high < 0 else "worse" if low > 0 else "undecided")
    assert line.group(3).startswith(f"Over {prompts} prompts and 2 seeds. It speaks of prompts")
    results = (home / "out/results.md").read_text()
    assert results.rstrip().endswith(("not shown to be better.", "Use orchmoe.", "Use lora."))
    assert results in out
    use = "orchmoe" if line.group(2) == "better" else "lora"
    assert f"the best run of {use} on dev, to use it:" in out


TASKS = ("count", "reverse", "name")


@pytest.fixture(scope="module")
def decoder(decoder_dir, tmp_path_factory):
    """Return a folder with rows of three tasks, rows of another task, and a random decoder."""
    home = links(tmp_path_factory.mktemp("verdict"))
    (home / "llama").symlink_to(decoder_dir)
    rows = []
    for number in range(300):
        task = TASKS[number % 3]
        answer = " ".join(["one", "two", "three"][: 1 + number % 2 + number % 3])
        rows.append({"instruction": f"{task} {number}", "output": answer, "task": task})
    write_rows(home / "own.jsonl", rows)
    new = [{"instruction": f"add {i}", "output": f"{i}", "task": "add"} for i in range(12)]
    write_rows(home / "new.jsonl", new)
    return home


def test_a_comparison_of_rows_with_tasks(decoder):
    files = "--data own.jsonl --test new.jsonl --model llama"
    out = run(f"{COMPARE} --epochs 1 --train-instances 5 {files}", cwd=decoder)
    assert "\n4 steps of 4 rows are 1.0 epochs\n" in out
    assert "The training was short" not in out
    cells = [read_cells(decoder, name) for name in ("orchmoe", "lora")]
    lines = dict(re.findall(r"- (seen|unseen): (.*): \*\*", out))
    for which in ("seen", "unseen"):
        assert lines[which] == expected_line(*cells, which)
    assert "prompts of 3 tasks and 2 seeds. It speaks of these tasks only." in out
    assert "12 prompts of 1 task and 2 seeds. It speaks of these tasks only." in out
