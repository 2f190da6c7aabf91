"""The numbers of a comparison: intervals and their coverage, verdicts, and what the tables say."""

import math
import re

import numpy as np
import pytest

from experiments.compare import tables
from experiments.results.compare import recompute
from helpers import ROOT, text_of
from support.program import UserError
from tasks import NO_TASK

# ---------------------------------------------------------------------------------------- coverage

# (groups, prompts of each group, seeds), whether rows name tasks, and sds of the effects of a task,
# of a prompt, of a seed, and of what is left. With one seed there is no effect of the seed.
DESIGNS = {
    "12 tasks, 5 seeds": ((12, 4, 5), True, (0, 1, 1, 1)),
    "6 tasks, 2 seeds": ((6, 8, 2), True, (1, 1, 0.3, 1)),
    "16 prompts, 2 seeds": ((16, 1, 2), False, (1, 0, 1, 1)),
    "8 prompts, 1 seed": ((8, 1, 1), False, (1, 0, 0, 1)),
    "3 tasks, 2 seeds": ((3, 30, 2), True, (2, 1, 0.3, 1)),
    "1 task, 3 seeds": ((1, 40, 3), True, (2, 1, 0.1, 1)),
    "5 tasks, 1 seed": ((5, 8, 1), True, (2, 1, 0, 1)),
}


def simulated(shape, is_named, sds, rng, draws):
    """Return cells of two rows for each draw, and the difference that an interval should cover."""
    G, prompts, seeds = shape
    U = G * prompts
    group = np.repeat(np.arange(G), prompts)
    names = [f"task{i}" if is_named else NO_TASK for i in group]
    tasks = sds[0] * rng.normal(size=(draws, G, 1))
    truth = np.zeros(draws)
    if G < tables.LEAST_GROUPS:  # these tasks are the ones that are asked about
        truth = tasks.mean(axis=(1, 2))
    effects = tasks[:, group]
    effects = effects + sds[1] * rng.normal(size=(draws, U, 1))
    effects = effects + sds[2] * rng.normal(size=(draws, 1, seeds))
    effects = effects + sds[3] * rng.normal(size=(draws, U, seeds))
    tokens = rng.integers(2, 9, size=U).tolist()
    common = 5 * rng.normal(size=(draws, U, 1))  # what both rows share does not count
    for i in range(draws):
        rows = []
        for of_row in (common[i] + effects[i], common[i] + 0 * effects[i]):
            rows.append([cell(names, of_seed, tokens) for of_seed in of_row.T])
        yield *rows, truth[i]


@pytest.mark.parametrize("shape, is_named, sds", DESIGNS.values(), ids=DESIGNS)
def test_interval_covers_the_truth(shape, is_named, sds, monkeypatch):
    # Many draws ask for a quantile. It is nearly linear in 1 / freedom.
    shares = np.linspace(0.001, 1, 40)
    quantiles = [tables.t_quantile(1 / share) for share in shares]
    monkeypatch.setattr(
        tables, "t_quantile", lambda freedom: np.interp(1 / freedom, shares, quantiles)
    )
    covered = []
    for one, other, truth in simulated(shape, is_named, sds, np.random.default_rng(0), 1000):
        found = tables.paired(one, other, "seen", "loss")
        _, low, high = tables.interval(found.values, found.freedom)
        covered.append(low <= truth <= high)
    least = 0.90 if shape[2] == 2 else 0.92
    assert np.mean(covered) >= least


# --------------------------------------------------------------------------------------- intervals


COMPARE = ROOT / "experiments/results/compare"


@pytest.fixture(scope="module")
def compared():
    """Return a function: the differences of two rows of the miniature, as words of a table."""
    cells = recompute.read_cells()

    def differences(row, reference, metrics):
        found = []
        for which in ("seen", "unseen"):
            for metric, digits in metrics.items():
                values, freedom, *_ = tables.paired(cells[row], cells[reference], which, metric)
                found.append(tables.signed(tables.interval(values, freedom), digits))
        return found

    return differences


ALL_METRICS = {"loss": 3, "rougeL": 2, "exact_match": 2}


@pytest.mark.parametrize("row", ["moe-lora", "poly", "mhr", "HydraLoRA", "lora"])
def test_the_page_has_the_differences_of_the_miniature(compared, row):
    page = text_of(COMPARE / "README.md")
    found = compared("orchmoe", row, ALL_METRICS)
    assert f"| {row} | {' | '.join(found)} |" in page
    cells = recompute.read_cells()
    assert found[0] == recompute.difference(cells, "orchmoe", row, "seen")
    assert found[3] == recompute.difference(cells, "orchmoe", row, "unseen")


@pytest.mark.parametrize("row", ["moe-lora", "poly", "mhr"])
def test_the_page_of_the_miniature_has_the_differences_from_the_lora(compared, row):
    page = text_of(COMPARE / "README.md")
    assert f"| {row} | {' | '.join(compared(row, 'lora', {'loss': 3}))} |" in page


# ------------------------------------------------------------------------------------- from cells


def cell(tasks, losses, tokens=None, rows=None, **more):
    """Return a cell with a prompt for each task name. Its loss is in nats per token."""
    tokens = tokens or [1] * len(tasks)
    rows = rows or [1] * len(tasks)
    sums = [loss * count for loss, count in zip(losses, tokens, strict=True)]
    matches = [100 * count for count in rows]
    columns = {"tokens": tokens, "rows": rows, "loss": sums}
    prompts = {"tasks": tasks, "task": range(len(tasks)), **columns}
    return {"seen": {"prompts": prompts | {"exact_match": matches, "rougeL": matches}}, **more}


def test_a_score_is_the_mean_within_a_task_by_tokens_and_then_over_tasks():
    found = cell(["a", "b", "a"], [1.0, 5.0, 4.0], tokens=[2, 9, 1])
    assert tables.mean_scores([found], "seen", "loss") == [((2 + 4) / 3 + 5) / 2]
    # Without task names each prompt counts as a task, however many rows and tokens it has.
    found = cell([NO_TASK] * 3, [1.0, 5.0, 4.0], tokens=[2, 9, 1], rows=[2, 1, 1])
    assert tables.mean_scores([found], "seen", "loss") == [10 / 3]
    assert tables.mean_scores([found], "seen", "exact_match") == [100]


@pytest.mark.parametrize(
    "tasks, seeds, over, limits",
    [
        (list("abcdef"), 2, "6 tasks and 2 seeds", ""),
        (list("abcdef"), 1, "6 tasks", "It does not cover what another seed would change."),
        (list("aabbc"), 2, "5 prompts of 3 tasks and 2 seeds", "It speaks of these tasks only."),
        ([NO_TASK] * 8, 2, "8 prompts and 2 seeds", "It speaks of prompts like these only."),
        ([NO_TASK] * 3, 2, "3 prompts and 2 seeds", "It speaks of prompts like these only."),
        (["a"] * 3, 2, "3 prompts of 1 task and 2 seeds", "It speaks of these tasks only."),
    ],
)
def test_an_interval_says_what_it_covers(tasks, seeds, over, limits):
    cells = [cell(tasks, [1.0] * len(tasks)) for _ in range(seeds)]
    found = tables.paired(cells, cells, "seen", "loss")
    assert (found.over, found.limits) == (over, limits)


def test_rows_with_other_prompts_are_not_compared():
    one = cell(["a", "b"], [1.0, 1.0])
    for other in (cell(["a", "a"], [1.0, 1.0]), cell(["a", "b"], [1.0, 1.0], tokens=[1, 2])):
        with pytest.raises(UserError, match="the cells of two rows have different seen rows"):
            tables.paired([one], [other], "seen", "loss")
    with pytest.raises(UserError, match="the cells of a row have different seen rows"):
        tables.paired([one, cell(["a"], [1.0])], [one], "seen", "loss")


# ---------------------------------------------------------------------------------------- verdicts


def cells_of(means, seeds=3, sd=0.1, U=20):
    """Return cells whose loss is about each of these means on 20 prompts without tasks."""
    rng = np.random.default_rng(0)
    found = []
    for mean in means:
        losses = rng.normal(mean, sd, (seeds, U)).tolist()
        found.append([cell([NO_TASK] * U, of_seed) for of_seed in losses])
    return found


@pytest.mark.parametrize(
    "mean, decision, use",
    [
        (1, "better", "orchmoe."),
        (3, "worse", "lora."),
        (2, "undecided", "lora, since orchmoe was not shown to be better."),
    ],
)
def test_the_verdict_follows_the_rule(mean, decision, use):
    one, other = cells_of([mean, 2.0])
    text, chosen = tables.verdicts("orchmoe", one, "lora", other)
    lines = text.splitlines()
    assert lines[0].startswith("Verdict by the loss, orchmoe minus lora")
    assert f"]: **{decision}**. Over 20 prompts and 3 seeds." in lines[1]
    assert lines[-1] == f"Use {use}"
    assert ("decide" in lines[1]) == (decision == "undecided")
    assert chosen == {"seen": "orchmoe" if decision == "better" else "lora"}


def test_of_two_methods_that_are_no_lora_neither_is_simpler():
    one, other = cells_of([2.0, 2.0])
    text, chosen = tables.verdicts("orchmoe", one, "poly", other)
    assert text.endswith("\nNeither was shown to be better.") and chosen == {"seen": ""}
    text, chosen = tables.verdicts("orchmoe", cells_of([3.0, 2.0])[0], "poly", other)
    assert text.endswith("\nUse poly.")


def test_one_prompt_gives_no_verdict():
    one = [cell([NO_TASK], [loss]) for loss in (1.0, 1.01, 1.02)]
    other = [cell([NO_TASK], [2.0])] * 3
    text, chosen = tables.verdicts("orchmoe", one, "lora", other)
    assert "- seen: -0.990 (no interval): **undecided**. Over 1 prompt and 3 seeds." in text
    assert "decide it" not in text and chosen == {"seen": "lora"}


def test_one_seed_gives_a_difference_and_no_verdict():
    one, other = cells_of([1.0, 2.0], seeds=1)
    text, chosen = tables.verdicts("orchmoe", one, "lora", other)
    lines = text.splitlines()
    assert re.search(r"- seen: -[\d.]+ \[.*\]: \*\*one seed: no verdict\*\*\. Over 20", lines[1])
    assert lines[-1] == "Give more --seeds: another seed may reverse the difference."
    assert not chosen
    assert "Use " not in "".join(lines)


def test_the_verdict_names_a_method_for_each_set():
    one, other = cells_of([1.0, 2.0])
    unseen = cells_of([3.0, 2.0])
    for cells, of_unseen in zip((one, other), unseen, strict=True):
        for of_seen, second in zip(cells, of_unseen, strict=True):
            of_seen["unseen"] = second["seen"]
    text, chosen = tables.verdicts("orchmoe", one, "lora", other)
    assert chosen == {"seen": "orchmoe", "unseen": "lora"}
    # The unseen rows may be of new tasks or, with --test, of any kind.
    assert text.endswith("Use orchmoe for inputs like the seen rows and lora for the unseen ones.")


@pytest.mark.parametrize("values", [[1.0, 3.0], [-1.0, -1.2, -0.9]])
def test_the_p_value_of_student_in_closed_form(values):
    values = np.array(values)[:, None]
    t = abs(values.mean()) / (values.std(ddof=1) / len(values) ** 0.5)
    expected = {2: 1 - 2 / np.pi * np.arctan(t), 3: 1 - t / np.sqrt(2 + t * t)}[len(values)]
    assert tables.t_p_value(values) == pytest.approx(expected, rel=1e-4)


def test_holm_by_hand():
    assert tables.holm([0.01, 0.049, 0.024]) == [True] * 3  # below 0.05 / 3, / 1 and / 2
    assert tables.holm([0.01, 0.06, 0.024]) == [True, False, True]
    assert tables.holm([0.01, 0.03, 0.026]) == [True, False, False]  # 0.026 > 0.05 / 2 ends it
    assert tables.holm([0.02, 0.03, 0.04]) == [False] * 3


def test_what_would_decide_by_hand():
    signs = np.resize([1.0, -1.0], 50)
    # Prompts differ with a variance of 50 / 49: 1.973 (50 / 49 / 177) ** 0.5 is 0.15.
    values = np.repeat(0.15 + signs[:, None], 2, axis=1)
    found = tables.Paired(values, 49, "50 prompts and 2 seeds", "", "prompts")
    assert "about 3.5 times the prompts would decide" in tables.what_would_decide(found)
    # 2.009 (50 / 49 / 50) ** 0.5 is 0.287, and a single further prompt would be enough.
    # 1.960 (50 / 49 / 4988) ** 0.5 is 0.02804.
    for mean, times in ((0.286, "1.1"), (0.02804, "99.8")):
        found = found._replace(values=values + mean - 0.15)
        assert f"about {times} times the prompts would decide" in tables.what_would_decide(found)
    # Seeds differ with a variance of 0.02: 2.571 (0.02 / 6) ** 0.5 is 0.148.
    values = np.repeat(np.array([[0.05, 0.25]]), 50, axis=0)
    found = tables.Paired(values, 49, "50 prompts and 2 seeds", "", "prompts")
    assert "about 6 seeds would decide" in tables.what_would_decide(found)


def test_what_would_decide_says_if_nothing_would():
    close = np.array([[1.0, -1.0], [-1.0, 1.001], [0.5, -0.5]])
    found = tables.Paired(close, 2, "3 prompts and 2 seeds", "", "prompts")
    assert "too small for 100 seeds or 100 times the rows" in tables.what_would_decide(found)


# ------------------------------------------------------------------------------------------ tables


def test_markdown_pairs_tasks_and_seeds():
    def of_seed(*losses):
        return cell(list("abcdef"), losses)

    rows = {
        "orchmoe": [of_seed(1, 9, 1, 1, 1, 1), of_seed(2, 9, 1, 1, 1, 1)],
        "lora": [of_seed(5, 8, 1, 1, 1, 1)] * 2,
    }
    text = tables.markdown(rows, {}, "official rules")
    sd = 1 / 6 / math.sqrt(2)
    assert f"| orchmoe | - | - | {(14 / 6 + 15 / 6) / 2:.3f} ({sd:.3f}) | 100.00 (0.00) |" in text
    differences = np.array([[-4.0, -3.0], [1.0, 1.0], *[[0.0, 0.0]] * 4])
    assert f"| lora | {tables.signed(tables.interval(differences))} | +0.00 (no interval) |" in text
    assert "of the 1 here about 0.1 would exclude zero" in text
    assert "over 6 tasks and 2 seeds (seen)" in text and "per cent, by official rules." in text


def test_markdown_of_a_w_without_entropy():
    """Without the softmax w is no distribution, and a cell has no number for what it lacks."""
    router = {"entropy": None, "largest": 2.0, "used": 3}
    rows = {"lora": [cell(["a"], [1.0])], "w without softmax": [cell(["a"], [1.0], router=router)]}
    text = tables.markdown(rows, {}, "official rules")
    assert "| w without softmax | - | 2.000 | 3.000 | - |" in text
    assert text.count("| lora |") == 1  # it has no router
    assert "+0.000 (no interval)" in text
