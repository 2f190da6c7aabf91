"""eval.py: which examples fit a model, answers, losses and scores.

programs/test_programs.py runs the program.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import data
import eval as evaluation
from helpers import adapted, make_example, refusal, small_model
from tasks import NO_TASK

# ------------------------------------------------------------------------------- base and examples


def test_examples_that_need_more_positions_than_there_are_are_refused():
    base = small_model("llama2")  # of 64 positions
    example = make_example("", [9] * 60, [[9] * 5])  # the last token is not read
    evaluation.require_fit(base, [example], max_new_tokens=5)
    with refusal("65 positions, but the model has 64"):
        evaluation.require_fit(base, [example], max_new_tokens=6)


# ------------------------------------------------------------------------------ answers and scores


def test_predictions_end_before_any_eos(small_t5, examples, monkeypatch):
    small_t5.config = replace(small_t5.config, eos_token_id=5)
    words = SimpleNamespace(decode=lambda ids: ids)
    tokens = torch.tensor([[7, 5, 8, 3], [5, 5, 5, 5], [7, 8, 9, 6], [1, 1, 5, 5]])
    monkeypatch.setattr(small_t5, "generate", lambda *_, **__: tokens)
    adapters = adapted(small_t5).double()
    found = evaluation.predict(small_t5, adapters, examples, words)
    assert sorted(found) == [[], [1, 1], [7], [7, 8, 9, 6]]


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
