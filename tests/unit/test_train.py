"""One step and one run of train.py: rates, schedule, clipping, the log, and which weights are kept.

The first tests take single steps on a small random T5, the last ones run the whole program.
"""

import json
import math

import pytest
import torch

import checkpoint
import data
import eval as evaluation
import runtime
import tokenizer as tokenizers
import train
from baselines import NoAdapter, attach_method
from helpers import SHORT, records, run, stir, task_json, write_lists, write_task
from orchmoe import OrchMoEConfig

RATES = {
    "lr_skills": 1.0,
    "lr_router": 2.0,
    "lr_token_router": 3.0,
    "lr_allocation": 4.0,
    "lr_full": 5.0,
}


@pytest.fixture
def batch(inputs):
    return data.Batch(*inputs, torch.arange(4), ["a", "b", "c", "d"])


def adapted(base, method="orchmoe", **options):
    """Return adapters of `base` in float64, with values that matter."""
    config = OrchMoEConfig(router_init="normal", **options)
    generator = runtime.generator(0)
    adapters = attach_method(method, base, config, num_tasks=4, generator=generator)
    stir(adapters, torch.Generator().manual_seed(0))
    return adapters.double()


def make_example(name, task, source_ids=None, target_ids=()):
    return data.Example(
        id=name,
        task=task,
        category="c",
        source_ids=source_ids,
        target_ids=list(target_ids),
        references=[],
    )


# ---------------------------------------------------------------------------------- rates and norm


@pytest.mark.parametrize(
    "method, options, rates",
    [
        ("orchmoe", {}, {1.0, 2.0, 4.0}),
        ("orchmoe", {"router": "token"}, {1.0, 3.0, 4.0}),
        ("moe-lora", {}, {1.0, 3.0}),
        ("lora", {}, {1.0}),
        ("poly", {}, {1.0, 4.0}),
        ("full", {}, {5.0}),
    ],
)
def test_each_kind_of_parameter_has_its_own_rate(small_t5, method, options, rates):
    adapters = attach_method(method, small_t5, OrchMoEConfig(**options), num_tasks=4)
    groups = train.make_optimizer(adapters, train.TrainConfig(**RATES)).param_groups
    assert {group["max_lr"] for group in groups} == rates

    rate_of_parameter = {}
    for group in groups:
        assert group["betas"] == (0.9, 0.999)
        assert group["weight_decay"] == 0
        for parameter in group["params"]:
            rate_of_parameter[id(parameter)] = group["max_lr"]
    for kind, parameters in adapters.parameter_groups().items():
        for parameter in parameters:
            assert rate_of_parameter[id(parameter)] == RATES[f"lr_{kind}"]


def test_schedule_warms_up_and_then_decays_or_stays_constant(small_t5, batch):
    linear = train.TrainConfig(steps=10, warmup=4)
    factors = [train.learning_rate_factor(step, linear) for step in range(10)]
    expected = [0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert factors == pytest.approx(expected)

    constant = train.TrainConfig(steps=10, warmup=4, schedule="constant")
    factors = [train.learning_rate_factor(step, constant) for step in range(10)]
    assert factors == [0.25, 0.5, 0.75] + 7 * [1]

    # A step applies the factor to all rates.
    adapters = adapted(small_t5)
    optimizer = train.make_optimizer(adapters, linear)
    train.train_step(small_t5, adapters, optimizer, batch, 1, linear)
    assert [group["lr"] / group["max_lr"] for group in optimizer.param_groups] == [0.5] * 3


@pytest.mark.parametrize("largest", [0.01, 1e9])
def test_gradient_is_clipped_to_the_largest_norm(small_t5, batch, largest, monkeypatch):
    monkeypatch.setattr(train, "LARGEST_NORM", largest)
    config = train.TrainConfig()
    adapters = adapted(small_t5)
    optimizer = train.make_optimizer(adapters, config)
    norm = train.train_step(small_t5, adapters, optimizer, batch, 0, config)["norm"]
    assert norm > 0.1  # the norm before clipping

    gradients = []
    for group in optimizer.param_groups:
        gradients += [p.grad for p in group["params"] if p.grad is not None]
    clipped = torch.nn.utils.get_total_norm(gradients).item()
    assert clipped == pytest.approx(min(norm, largest), rel=1e-4)


# --------------------------------------------------------------------------------------- one step


def test_each_step_draws_its_own_noise_and_drops_the_given_share(small_t5, batch, monkeypatch):
    adapters = adapted(small_t5, gumbel=True, router_dropout=0.1)
    noises = []
    drops = []
    route = adapters.route

    def spy(*arguments, **options):
        noises.append(options["noise"])
        drops.append(options["drop"])
        return route(*arguments, **options)

    monkeypatch.setattr(adapters, "route", spy)
    optimizer = train.make_optimizer(adapters, train.TrainConfig())
    for seed in (0, 1):
        for step in range(5):
            config = train.TrainConfig(seed=seed)
            train.train_step(small_t5, adapters, optimizer, batch, step, config)

    first_values = torch.cat(noises).flatten(1)[:, 0]
    assert len(first_values.unique()) == 2 * 5 * 4  # seeds, steps, rows
    assert 0 < torch.cat(drops).float().mean() < 0.3


@pytest.mark.parametrize("options", [{}, {"router_dropout": 0.5}, {"gumbel": True}])
def test_micro_batches_add_up_to_the_whole_step(small_t5, batch, options):
    """Loss, norm and entropy are those of all rows. Noise belongs to a row, not to its part."""
    results = []
    for accumulate in (1, 3):
        config = train.TrainConfig(accumulate=accumulate)
        adapters = adapted(small_t5, **options).train()
        optimizer = train.make_optimizer(adapters, config)
        results.append(train.train_step(small_t5, adapters, optimizer, batch, 0, config))
        adapters.detach()
    whole, parts = results
    assert whole == pytest.approx(parts, rel=1e-6)
    assert 0 < whole["entropy"] < math.log(8)
    assert whole["target_tokens"] == 17

    if not options:
        embeddings = small_t5.embed(batch.input_ids)
        w = adapted(small_t5).route(embeddings, batch.attention_mask).w
        entropy = evaluation.mean_entropy(w)
        assert whole["entropy"] == pytest.approx(entropy, rel=1e-6)


def test_dev_loss_is_a_mean_over_target_tokens(small_t5, batch):
    examples = []
    for row, name in enumerate(batch.ids):
        source = batch.input_ids[row][batch.attention_mask[row]].numpy()
        labels = batch.labels[row]
        target = labels[labels != -100].numpy()
        examples.append(make_example(name, "t", source, [target]))

    total = small_t5.loss(batch.input_ids, batch.attention_mask, batch.labels).item()
    frozen = NoAdapter(small_t5, full=False)
    for batch_size in (1, 3, 4):
        loss, w = evaluation.measure(small_t5, frozen, examples, batch_size=batch_size)
        assert w is None
        assert loss == pytest.approx(total / batch.target_tokens, rel=1e-9)


# ----------------------------------------------------------------------------- report on the router


@pytest.mark.parametrize(
    "w, words",
    [
        (torch.full((4, 8), 1 / 8), "the router is uniform"),
        (torch.eye(8)[[3, 3, 3, 3]], "has collapsed"),
        (torch.eye(8)[[0, 1, 2, 3]], ""),
        (torch.ones(4, 1), ""),
        (2 * torch.eye(8)[[3, 3, 3, 3]], ""),
    ],
)
def test_uniform_or_collapsed_router_gives_a_warning(w, words, capsys):
    runtime.warn.cache_clear()
    examples = [make_example(str(i), "ab"[i % 2]) for i in range(4)]
    evaluation.router_report(w, examples)
    warning = capsys.readouterr().err
    assert words in warning
    assert bool(warning) == bool(words)


def test_router_report_separates_spread_between_tasks_from_spread_within():
    examples = [make_example(str(i), "aabb"[i]) for i in range(4)]
    for rows, between, within in (([0, 0, 1, 1], 0.5, 0), ([0, 1, 0, 1], 0, 0.5)):
        report = evaluation.router_report(torch.eye(2)[rows], examples)
        assert report == {
            "entropy": 0,
            "normalised_entropy": 0,
            "largest": 0.5,
            "used": 2,
            "between": between,
            "within": within,
        }


def test_router_report_counts_used_abstract_tasks_and_measures_the_distance_from_the_start():
    examples = [make_example(str(i), "aabb"[i]) for i in range(4)]
    uniform = torch.full((4, 4), 1 / 4)
    half = torch.tensor([0.5, 0.5, 0, 0]).expand(4, -1)
    report = evaluation.router_report(half, examples, uniform)
    assert report["used"] == 2
    assert report["normalised_entropy"] == pytest.approx(0.5)
    assert report["distance"] == pytest.approx(math.log(2))  # KL divergence of half from uniform
    assert evaluation.router_report(half, examples, half)["distance"] == 0


# ---------------------------------------------------------------------------------------- one run

CPU = runtime.Device(torch.device("cpu"), torch.float32, "")


class FirstStep(Exception):
    """Ends a run at its first step. Holds the base and the adapters."""

    def __init__(self, base, adapters):
        self.base = base
        self.adapters = adapters
        self.autocast = torch.is_autocast_enabled("cpu")


@pytest.fixture
def first_step(tmp_path, monkeypatch):
    """Start runs of train.train that end at the first step. Return what they trained there."""

    def end(base, adapters, *_):
        raise FirstStep(base, adapters)

    def begin(device=CPU, **options):
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        settings = train.Settings(
            train=train.TrainConfig(**options),
            data=data.DataConfig(max_tasks=3, train_instances=8),
        )
        launch = train.LaunchConfig(out=str(folder))
        with pytest.raises(FirstStep) as reached:
            train.train(settings, device, launch, final_scores=False)
        return reached.value

    monkeypatch.setattr(train, "train_step", end)
    return begin


def test_full_training_keeps_float32_weights_and_computes_in_bfloat16(first_step):
    bfloat16 = CPU._replace(dtype=torch.bfloat16)
    full = first_step(bfloat16, method="full")
    assert {parameter.dtype for parameter in full.base.parameters()} == {torch.float32}
    assert full.autocast

    lora = first_step(bfloat16, method="lora")
    assert lora.base.embedding.weight.dtype == torch.bfloat16
    assert not lora.autocast


def test_blocks_are_checkpointed_only_if_the_flag_is_given(first_step):
    assert first_step(method="lora", checkpoint_blocks=True).base.checkpoint_blocks
    assert not first_step(method="lora").base.checkpoint_blocks


def test_router_start_ignores_the_padding_of_its_sources(first_step):
    run = first_step()
    router = run.adapters.router
    config = data.DataConfig(max_tasks=3, train_instances=8)
    tokenizer = tokenizers.load(runtime.ROOT / "tiny")
    train_set = data.load_sets(config, tokenizer, ["train"])["train"]
    assert len(set(train_set.source_lengths)) > 3  # so there was padding

    summaries = []
    for example in train_set:
        input_ids = torch.from_numpy(example.source_ids).long()[None]
        embeddings = run.base.embed(input_ids)
        mask = torch.ones_like(input_ids, dtype=torch.bool)
        summaries.append(router.summarise(embeddings, mask))
    mean = torch.cat(summaries).mean(0)
    torch.testing.assert_close(router.mu, mean, rtol=1e-3, atol=1e-4)


def test_the_seed_decides_the_initial_values(first_step):
    one = first_step(seed=0).adapters
    same = first_step(seed=0).adapters
    other = first_step(seed=1).adapters
    name = next(iter(one.linears))
    values = {
        "skill_A": [run.linears[name].skill_A for run in (one, same, other)],
        "Z": [run.Z for run in (one, same, other)],
        "W_task": [run.router.W_task for run in (one, same, other)],
    }
    for first, again, different in values.values():
        assert torch.equal(first, again)
        assert not torch.equal(first, different)


def test_each_step_draws_one_of_several_references(tmp_path):
    write_task(tmp_path, "task1_a", task_json(10))
    write_lists(tmp_path, ["task1_a"], [])
    tokenizer = tokenizers.load(runtime.ROOT / "tiny")
    train_set = data.load_sets(data.DataConfig(data=str(tmp_path)), tokenizer, ["train"])["train"]

    config = train.TrainConfig(batch_size=4)
    drawn: dict[str, set] = {}
    for step in range(12):
        batch = train.training_batch(train_set, step, config)
        for own_id, labels in zip(batch.ids, batch.labels, strict=True):
            target = tuple(labels[labels != -100].tolist())
            drawn.setdefault(own_id, set()).add(target)
    assert max(len(targets) for targets in drawn.values()) == 3


def test_last_step_is_evaluated_and_saved(tmp_path):
    settings = train.Settings(
        train=train.TrainConfig(method="lora", steps=3, eval_every=2, eval_instances=8),
        data=data.DataConfig(max_tasks=2, train_instances=8),
    )
    launch = train.LaunchConfig(out=str(tmp_path))
    assert train.train(settings, CPU, launch, final_scores=False)
    evaluated = [row["step"] for row in records(tmp_path) if "dev_loss" in row]
    assert evaluated == [1, 2]
    assert checkpoint.read_torch(tmp_path / "checkpoint.pt")["step"] == 3
    assert not (tmp_path / "scores.json").exists()  # final_scores=False


def test_best_weights_on_dev_are_kept_and_scored(home):
    """With a rate that is too high, the dev loss rises after the first step.

    The weights of that step are kept and scored, also if the run is resumed later.
    """
    options = [*SHORT, "--eval-every", "1", "--lr-skills", "0.05", "--lr-allocation", "3"]
    options += ["--warmup", "0", "--schedule", "constant"]
    for steps in (1, 3):
        run("train.py", *options, "--steps", steps, "--out", f"run{steps}", cwd=home)
    one = home / "run1"
    three = home / "run3"

    def require_first_step_is_kept():
        first, *later = [row["dev_loss"] for row in records(three) if "dev_loss" in row]
        assert first < min(later)
        for name in ("scores.json", "adapter.safetensors"):
            assert (three / name).read_bytes() == (one / name).read_bytes()

    require_first_step_is_kept()
    last = checkpoint.read_torch(three / "checkpoint.pt")["weights"]
    best, _ = checkpoint.load_adapter(three / "adapter.safetensors")
    assert not torch.equal(last["Z"], best["Z"])

    config = json.loads((three / "config.json").read_text())
    config["train"]["steps"] = 4
    (three / "config.json").write_text(json.dumps(config))
    run("train.py", "--resume", "--out", "run3", "--device", "cpu", cwd=home)
    assert records(three)[-1]["step"] == 3
    require_first_step_is_kept()
