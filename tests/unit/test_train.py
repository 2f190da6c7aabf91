"""Steps of train.py and the start of a run: rates, schedule, clipping, the router, initial values.

The first tests take single steps on a small random T5, the last ones start a run.
programs/test_start.py tests which weights are kept, and parts with a rate of zero.
"""

import math
import tempfile
from unittest import mock

import pytest
import torch

import data
import eval as evaluation
import train
from baselines import attach_method
from helpers import CPU, adapted, check_equal, make_example, refusal
from model import Backbone
from orchmoe import OrchMoEConfig

DEFAULTS = train.TrainConfig()


@pytest.fixture
def take_step(small_t5, examples):
    """Take one step with new adapters. Return its record and the optimizer."""

    def take(step=0, config=DEFAULTS, **options):
        adapters = adapted(small_t5, **options).double()
        optimizer = train.make_optimizer(adapters, config)
        record = train.train_step(small_t5, adapters, optimizer, examples, step, config)
        adapters.detach()
        return record, optimizer

    return take


# ---------------------------------------------------------------------------------- rates and norm


RATES = {"skills": 1, "router": 2, "token_router": 3, "allocation": 4}


@pytest.mark.parametrize("method", ["orchmoe", "orchmoe-token"])
def test_each_kind_of_parameter_has_its_own_rate(small_t5, method):
    config = train.TrainConfig(**{f"lr_{kind}": rate for kind, rate in RATES.items()})
    adapters = attach_method(method, small_t5, OrchMoEConfig())
    optimizer = train.make_optimizer(adapters, config)
    found = {group["max_lr"]: group["params"] for group in optimizer.param_groups}
    groups = adapters.parameter_groups()
    assert found == {RATES[kind]: group for kind, group in groups.items() if group}
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    assert optimizer.defaults["weight_decay"] == 0


@pytest.mark.parametrize(
    "schedule, later",
    [("linear", [1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]), ("constant", [1] * 7)],
)
def test_schedule_warms_up_and_then_decays_or_stays_constant(take_step, schedule, later):
    config = train.TrainConfig(steps=10, warmup=4, schedule=schedule)
    factors = [train.learning_rate_factor(step, config) for step in range(10)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, *later])
    brief = train.TrainConfig(steps=20, warmup=20, schedule=schedule)
    assert train.learning_rate_factor(0, brief) == 0.5  # a tenth of the steps
    _, optimizer = take_step(1, config)
    for group in optimizer.param_groups:
        assert group["lr"] == 0.5 * group["max_lr"]


def test_epochs_become_steps():
    rows = range(20)
    settings = train.Settings(epochs=3, batch_size=8)
    assert train.steps_of(settings, rows) == 9  # an epoch ends with a batch of 4
    assert train.steps_of(train.Settings(steps=7), rows) == 7


@pytest.mark.parametrize("largest", [0.01, 1e9])
def test_gradient_is_clipped_to_the_largest_norm(take_step, largest, monkeypatch):
    monkeypatch.setattr(train, "LARGEST_NORM", largest)
    record, optimizer = take_step()
    gradients = []
    for group in optimizer.param_groups:
        gradients += [parameter.grad for parameter in group["params"]]
    norm = record["norm"]  # before clipping
    assert norm > 0.1
    clipped = torch.nn.utils.get_total_norm(gradients).item()
    assert clipped == pytest.approx(min(norm, largest), rel=1e-4)


# --------------------------------------------------------------------------------------- one step


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda B: B.data.fill_(math.inf), "the loss is nan"),
        (lambda B: B.register_hook(lambda gradient: 1e30 * gradient), "the gradient norm is inf"),
    ],
)
def test_step_that_is_not_finite_changes_no_weight(small_t5, examples, damage, words):
    adapters = attach_method("lora", small_t5, OrchMoEConfig())
    optimizer = train.make_optimizer(adapters, DEFAULTS)
    damage(adapters.skills["decoder-blocks-1-attention-v"].B)
    before = {name: tensor.clone() for name, tensor in adapters.state_dict().items()}
    message = f"^step 8 on a, b, c, d: {words}; start a new run with lower"
    with refusal(message):
        train.train_step(small_t5, adapters, optimizer, examples, 7, DEFAULTS)
    check_equal(adapters.state_dict(), before)


def test_routing_noise_of_a_row_is_its_own(small_t5):
    noise = train.routing_noise(adapted(small_t5, "orchmoe-gumbel"), 0, 0, range(400))
    assert len(noise.flatten(1)[:, 0].unique()) == 400


@pytest.mark.parametrize("options", [{}, {"method": "orchmoe-gumbel"}])
def test_micro_batches_add_up_to_the_whole_step(take_step, options):
    """Loss and norm are those of all rows. Noise belongs to a row, not to its part."""
    whole, _ = take_step(**options)
    parts, _ = take_step(config=train.TrainConfig(accumulate=3), **options)
    assert whole == pytest.approx(parts, rel=1e-6)
    if options:  # noise depends on the step and the seed
        seed_1 = train.TrainConfig(seed=1)
        for other, _ in (take_step(), take_step(1, **options), take_step(0, seed_1, **options)):
            assert other["loss"] != pytest.approx(whole["loss"], rel=1e-6)


def test_dev_loss_and_w_are_those_of_a_step(take_step, small_t5, examples):
    record, _ = take_step()
    adapters = adapted(small_t5).double()
    batch = data.collate(examples)
    expected_w = adapters.route(small_t5.embed(batch.input_ids), batch.attention_mask).w.float()
    losses = evaluation.measure(small_t5, adapters, examples)
    assert evaluation.mean_loss(losses) == pytest.approx(record["loss"], rel=1e-6)
    for batch_size in (1, 3, 4):
        w = evaluation.router_weights(small_t5, adapters, examples, batch_size)
        torch.testing.assert_close(w, expected_w)


def test_examples_of_a_step_depend_on_seed_and_step():
    """Both change the order, and which references of an example are its targets."""
    examples = [make_example(f"e{i}", [5], [[7], [8], [9]]) for i in range(8)]
    train_set = data.Examples(examples, ["task1_a"], "", {})

    def ids_and_targets(seed, step):
        batch_order = data.BatchOrder(train_set.source_lengths, 8, seed)
        found = train.examples_of_step(train_set, batch_order, step)
        targets = {example.id: example.target_ids[0].tolist() for example in found}
        return list(targets), targets

    ids, targets = ids_and_targets(0, 0)
    for other_ids, other_targets in (ids_and_targets(0, 1), ids_and_targets(1, 0)):
        assert other_ids != ids
        assert other_targets != targets


# ---------------------------------------------------------------------------------------- one run


@pytest.fixture
def first_step(tmp_path):
    """Start runs of train.train that end at the first step. Return the base and the adapters."""

    def begin(device=CPU, **options):
        settings = train.Settings(max_tasks=3, train_instances=8, **options)
        launch = train.LaunchConfig(out=tempfile.mkdtemp(dir=tmp_path))
        with (
            mock.patch.object(train, "train_step", side_effect=KeyboardInterrupt) as train_step,
            pytest.raises(KeyboardInterrupt),
        ):
            train.train(settings, device, launch)
        return train_step.call_args.args[:2]

    return begin


def test_a_study_sees_all_that_a_run_says(tmp_path, capsys):
    said = []
    settings = train.Settings(max_tasks=3, train_instances=8, steps=1, eval_instances=2)
    launch = train.LaunchConfig(out=str(tmp_path / "run"))
    run = train.train(settings, CPU, launch, say=said.append)
    assert run.path == tmp_path / "run" and not (run.path / "scores.json").exists()
    assert [line.partition(": ")[0] for line in said] == [str(run.path), "step 1 of 1"]
    assert capsys.readouterr().out == ""


def test_a_row_that_is_too_long_for_the_base_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(Backbone, "longest", 150)
    monkeypatch.setattr(train, "train_step", None)
    settings = train.Settings(max_tasks=3, max_source_length=64)
    launch = train.LaunchConfig(out=str(tmp_path / "run"))
    with refusal("^--max-source-length: an example and an answer need up to 178 positions"):
        train.train(settings, CPU, launch)
    assert not (tmp_path / "run").exists()


def test_the_frozen_base_alone_is_in_bfloat16_and_blocks_are_checkpointed(first_step):
    bfloat16 = CPU._replace(dtype=torch.bfloat16)
    base, adapters = first_step(bfloat16, method="lora", checkpoint_blocks=True)
    assert base.embedding.weight.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in adapters.state_dict().values()} == {torch.float32}
    assert base.checkpoint_blocks


def test_router_start_ignores_the_padding_of_its_sources(small_t5, examples):
    adapters = attach_method("orchmoe", small_t5, OrchMoEConfig(abstract_tasks=2)).double()
    train.fit_router(small_t5, adapters, examples, DEFAULTS)
    summaries = []
    for example in examples:
        input_ids = torch.as_tensor(example.source_ids)[None]
        summaries.append(adapters.router.summarise(small_t5.embed(input_ids)))
    torch.testing.assert_close(adapters.router.mu, torch.cat(summaries).mean(0))


def test_router_start_reads_evenly_spaced_examples(small_t5):
    """Half of the examples that are read come from the second half of the set."""
    examples = [make_example(str(i), [5 + 3 * (i >= 2500)], [[7]]) for i in range(5000)]
    adapters = attach_method("orchmoe", small_t5, OrchMoEConfig(abstract_tasks=2)).double()
    train.fit_router(small_t5, adapters, examples, DEFAULTS)
    both = adapters.router.summarise(small_t5.embed(torch.tensor([[5], [8]])))
    torch.testing.assert_close(adapters.router.mu, both.mean(0))


def test_the_seed_decides_the_initial_values(first_step):
    states = []
    for seed in (0, 0, 1):
        _, adapters = first_step(seed=seed)
        states.append(adapters.state_dict())
    for name in ("Z", "router.W_task", "skills.decoder-blocks-1-attention-v.A"):
        one, same, other = [state[name] for state in states]
        assert torch.equal(one, same)
        assert not torch.equal(one, other)
