"""eval.py: which models fit the examples, answers, losses, scores, and the report on the router.

programs/test_programs.py runs the program.
"""

import math
from types import SimpleNamespace

import pytest
import torch

import data
import eval as evaluation
from helpers import adapted, make_example, refusal, small_model
from support import program
from tasks import NO_TASK

# ------------------------------------------------------------------------------- base and examples


def test_examples_that_need_more_positions_than_there_are_are_refused():
    base = small_model("llama2")  # of 64 positions
    words = SimpleNamespace(eos_ids=base.config.eos_ids, size=9)
    example = make_example("", [9] * 60, [[9] * 5])  # the last token is not read
    evaluation.require_fit(base, words, [example], max_new_tokens=5)
    with refusal("65 positions, but the model has 64"):
        evaluation.require_fit(base, words, [example], max_new_tokens=6)


def test_a_tokenizer_of_another_model_is_refused():
    base = small_model("llama2")  # of 97 tokens, with EOS 3
    words = SimpleNamespace(eos_ids=(3,), size=98)
    with refusal("it has 98 tokens, the model 97; the tokenizer in"):
        evaluation.require_fit(base, words, [], max_new_tokens=0)
    words = SimpleNamespace(eos_ids=(2, 7), size=97)
    with refusal(r"eos_token_id: \(3,\) in generation_config"):
        evaluation.require_fit(base, words, [], max_new_tokens=0)


# ------------------------------------------------------------------------------ answers and scores


def test_predictions_end_before_any_eos():
    base = SimpleNamespace(config=SimpleNamespace(eos_ids=(3, 5)))
    words = SimpleNamespace(decode=lambda ids: [i for i in ids if i >= 0])
    tokens = torch.tensor([[7, 5, 8, 3], [3, 3, 3, 3], [7, 8, 9, 6]])
    assert evaluation.decoded(tokens, base, words) == [[7], [], [7, 8, 9, 6]]


@pytest.mark.parametrize("w", [None, torch.eye(8)[:4].double()], ids=["router", "given"])
def test_losses_of_rows_are_those_of_the_rows_alone(small_t5, examples, w):
    """A loss is the sum over the tokens of the first reference, in batches of any size."""
    adapters = adapted(small_t5).double()
    for batch_size in (1, 3, 4):
        losses = evaluation.measure(small_t5, adapters, examples, batch_size=batch_size, w=w)
        for row, example in enumerate(examples):
            batch = data.collate([example])
            of_row = None if w is None else w[row]
            with evaluation.routed(small_t5, adapters, batch, w=of_row):
                alone = small_t5.loss(batch.input_ids, batch.attention_mask, batch.labels)
            assert losses[row].tokens == len(example.target_ids[0])
            assert losses[row].nats == pytest.approx(alone.item(), rel=1e-9)


def test_loss_is_a_mean_over_tokens_then_over_tasks_and_prompts_without_a_task():
    """Two rows of a task, two rows with one prompt without a task, and another such row."""
    rows = [("a", 5), ("a", 6), (NO_TASK, 7), (NO_TASK, 7), (NO_TASK, 8)]
    examples = [
        make_example(str(i), [prompt], [[1]])._replace(task=task)
        for i, (task, prompt) in enumerate(rows)
    ]
    losses = [(2.0, 1), (4.0, 5), (9.0, 3), (1.0, 1), (0.5, 1)]
    losses = [evaluation.RowLoss(*loss) for loss in losses]
    assert evaluation.losses_by_task(examples, losses) == {"a": [1.0], NO_TASK: [2.5, 0.5]}
    scores = evaluation.score(examples, [""] * 5, "official", losses)
    assert scores["tasks"]["a"]["loss"] == 1.0
    assert scores["tasks"][NO_TASK]["loss"] == 1.5
    assert scores["overall"]["loss"] == pytest.approx(4 / 3)


# ----------------------------------------------------------------------------- report on the router

REPORTS = {  # w of four samples, fields of the report, a word of the warning
    "half": (
        torch.tensor([[0.5, 0.5, 0, 0]] * 4),
        {"used": 2, "entropy": math.log(2), "distance": math.log(2)},
        "",
    ),
    "uniform": (torch.full((4, 4), 1 / 4), {"entropy": math.log(4), "distance": 0}, "uniform"),
    "collapsed": (
        torch.tensor([[0.9, 0.1], [1, 0], [1, 0], [1, 0]]),
        {"largest": 0.975, "used": 1},
        "collapsed",
    ),
    "many": (torch.eye(24), {"used": 24, "entropy": 0}, ""),
    "one": (torch.ones(4, 1), {"entropy": 0}, ""),
    "no distributions": (2 * torch.eye(8)[[3, 3, 3, 3]], {"entropy": math.nan}, ""),
}


@pytest.mark.parametrize("w, expected, warning", REPORTS.values(), ids=REPORTS)
def test_the_router_report_warns_of_uniform_and_collapsed_routing(w, expected, warning, capsys):
    """The distance is that from uniform w."""
    program.warn.cache_clear()
    report = evaluation.router_report(w, torch.full_like(w, 1 / w.shape[1]))
    found = {name: report[name] for name in expected}
    assert found == pytest.approx(expected, nan_ok=True, abs=1e-6)
    assert ("distance" in report) != math.isnan(report["entropy"])  # both are of distributions
    said = capsys.readouterr().err
    assert warning in said
    assert bool(warning) == bool(said)
