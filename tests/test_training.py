"""What one step and one run of train.py do: rates, schedule, clipping, the log's numbers, and which weights
are kept."""

import itertools
import json
import math
from collections import defaultdict

import pytest
import torch
from conftest import SHORT, records, run, stir
from test_data import task_json, write_lists, write_task

import checkpoint
import data
import eval as evaluation
import runtime
import train
from baselines import NoAdapter, attach_method
from orchmoe import OrchMoEConfig


@pytest.fixture
def batch(inputs):
    return data.Batch(*inputs, torch.arange(4), ["a", "b", "c", "d"])


def adapted(base, method="orchmoe", **options):
    adapters = attach_method(method, base, OrchMoEConfig(router_init="normal", **options), num_tasks=4,
                             generator=runtime.generator(0))  # fmt: skip
    stir(adapters, torch.Generator().manual_seed(0))
    return adapters.double()


RATES = {"lr_skills": 1.0, "lr_router": 2.0, "lr_token_router": 3.0, "lr_allocation": 4.0, "lr_full": 5.0}


@pytest.mark.parametrize("method, options, rates", [
    ("orchmoe", {}, {1.0, 2.0, 4.0}), ("orchmoe", {"router": "token"}, {1.0, 3.0, 4.0}),
    ("moe-lora", {}, {1.0, 3.0}), ("lora", {}, {1.0}), ("poly", {}, {1.0, 4.0}), ("full", {}, {5.0}),
])  # fmt: skip
def test_each_kind_of_parameter_has_its_rate(small_t5, method, options, rates):
    adapters = attach_method(method, small_t5, OrchMoEConfig(**options), num_tasks=4)
    groups = train.make_optimizer(adapters, train.TrainConfig(**RATES)).param_groups
    assert {group["max_lr"] for group in groups} == rates
    assert all(group["betas"] == (0.9, 0.999) and group["weight_decay"] == 0 for group in groups)
    for kind, parameters in adapters.parameter_groups().items():
        ours = set(map(id, parameters))
        found = {group["max_lr"] for group in groups for p in group["params"] if id(p) in ours}
        assert found == ({RATES[f"lr_{kind}"]} if parameters else set())


def test_the_schedule(small_t5, batch):
    config = train.TrainConfig(steps=10, warmup=4)
    wanted = [0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert [train.lr_factor(step, config) for step in range(10)] == pytest.approx(wanted)
    level = train.TrainConfig(steps=10, warmup=4, schedule="constant")
    assert [train.lr_factor(step, level) for step in range(10)] == [0.25, 0.5, 0.75] + 7 * [1]
    optimizer = train.make_optimizer(adapters := adapted(small_t5), config)
    train.train_step(small_t5, adapters, optimizer, batch, 1, config)
    assert [group["lr"] / group["max_lr"] for group in optimizer.param_groups] == [0.5] * 3


@pytest.mark.parametrize("clip", [0.01, 1e9])
def test_the_gradient_is_clipped(small_t5, batch, clip, monkeypatch):
    monkeypatch.setattr(train, "CLIP", clip)
    config = train.TrainConfig()
    optimizer = train.make_optimizer(adapters := adapted(small_t5), config)
    norm = train.train_step(small_t5, adapters, optimizer, batch, 0, config)["norm"]
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    after = torch.nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None]).item()
    assert norm > 0.1 and after == pytest.approx(clip if clip == 0.01 else norm, rel=1e-4)


def test_each_step_has_noise_of_its_own_and_drops_the_share_asked_for(small_t5, batch, monkeypatch):
    adapters, given = adapted(small_t5, gumbel=True, router_dropout=0.1), []
    monkeypatch.setattr(adapters, "route", lambda *of, route=adapters.route, **options:
                        given.append(options) or route(*of, **options))
    optimizer = train.make_optimizer(adapters, train.TrainConfig())
    for seed, step in itertools.product((0, 1), range(5)):
        train.train_step(small_t5, adapters, optimizer, batch, step, train.TrainConfig(seed=seed))
    noise, drop = (torch.cat([options[name] for options in given]) for name in ("noise", "drop"))
    assert len(noise.flatten(1)[:, 0].unique()) == 40 and 0 < drop.float().mean() < 0.3


def test_of_several_references_each_step_draws_one(tmp_path, monkeypatch):
    write_task(tmp_path, "task1_a", task_json(10))
    write_lists(tmp_path, ["task1_a"], [])
    configs = {"train": train.TrainConfig(method="lora"), "data": data.DataConfig(data=str(tmp_path)),
               "adapter": OrchMoEConfig()}  # fmt: skip
    said = defaultdict(set)

    def drawn(base, adapters, optimizer, batch_at, *_, **__):
        for batch in map(batch_at, range(12)):
            for own_id, labels in zip(batch.ids, batch.labels.tolist(), strict=True):
                said[own_id].add(tuple(label for label in labels if label != -100))

    monkeypatch.setattr(train, "train", drawn)
    train.run(tmp_path / "run", configs, runtime.pick_device(device="cpu", dtype="float32"), closing=False)
    assert max(map(len, said.values())) == 3


def test_the_last_step_is_evaluated_and_saved(small_t5, batch, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "measure", lambda *_, **__: (1.0, None))
    config, adapters = train.TrainConfig(steps=3, eval_every=2), adapted(small_t5)
    train.train(small_t5, adapters, train.make_optimizer(adapters, config), lambda step: batch, [], tmp_path,
                config, lambda: None)  # fmt: skip
    assert [row["step"] for row in records(tmp_path) if "dev_loss" in row] == [1, 2]
    assert checkpoint.unpickle(tmp_path / "checkpoint.pt")["step"] == 3


def built(**options):
    configs = {"train": train.TrainConfig(**options), "data": data.DataConfig(max_tasks=3, train_instances=8),
               "adapter": OrchMoEConfig()}  # fmt: skip
    return train.build(configs, runtime.pick_device(device="cpu", dtype="bfloat16"))


def test_every_weight_trains_in_float32_and_blocks_are_checkpointed_where_asked():
    parts = built(method="full", checkpoint_blocks=True)
    assert {p.dtype for p in parts.base.parameters()} == {torch.float32} and parts.base.checkpoint_blocks


def test_the_router_starts_from_the_tokens_of_its_sources_alone():
    base, adapters, _, train_set, *_ = built()
    alone = [adapters.router.features(base.embed(torch.from_numpy(e.source_ids).long()[None]))
             for e in train_set]
    assert len(set(train_set.source_lengths)) > 3  # so there was padding
    torch.testing.assert_close(adapters.router.mu, torch.cat(alone).mean(0), rtol=1e-3, atol=1e-4)


def test_the_seed_is_that_of_the_initial_values_too():
    one, other = (built(seed=seed).adapters for seed in (0, 1))
    A, again = (next(iter(adapters.linears.values())).skill_A for adapters in (one, other))
    assert not torch.equal(A, again) and not torch.equal(one.allocation, other.allocation)
    assert not torch.equal(one.router.task, other.router.task)


@pytest.mark.parametrize("options", [{}, {"router_dropout": 0.5}, {"gumbel": True}])
def test_parts_of_a_step_add_up(small_t5, batch, options):
    """Loss, norm and entropy are of all rows; noise and dropped routers belong to a row, not to its part."""
    found = []
    for parts in (1, 3):
        config = train.TrainConfig(accumulate=parts)
        adapters = adapted(small_t5, **options).train()
        optimizer = train.make_optimizer(adapters, config)
        found.append(train.train_step(small_t5, adapters, optimizer, batch, 0, config))
        adapters.detach()
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert 0 < found[0]["entropy"] < math.log(8) and found[0]["target_tokens"] == 17
    if not options:
        with adapted(small_t5).routed(small_t5.embed(batch.input_ids), batch.attention_mask) as routing:
            assert found[0]["entropy"] == pytest.approx(evaluation.mean_entropy(routing.w.detach()), rel=1e-6)


def test_mean_loss_is_per_token(small_t5, batch):
    sources = [ids[mask].numpy() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    targets = [labels[labels != -100].numpy() for labels in batch.labels]
    examples = [data.Example(name, "t", "c", source, [target], ["x"])
                for name, source, target in zip(batch.ids, sources, targets, strict=True)]  # fmt: skip
    total = small_t5.loss(*batch[:3]).item() / batch.target_tokens
    for size in (1, 3, 4):
        found, w = evaluation.measure(small_t5, NoAdapter(small_t5, full=False), examples, batch_size=size)
        assert w is None and found == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("w, words", [
    (torch.full((4, 8), 1 / 8), "the router is uniform"), (torch.eye(8)[[3, 3, 3, 3]], "has collapsed"),
    (torch.eye(8)[[0, 1, 2, 3]], ""), (torch.ones(4, 1), ""), (2 * torch.eye(8)[[3, 3, 3, 3]], ""),
])  # fmt: skip
def test_a_router_that_does_nothing_is_warned_of(w, words, capsys):
    runtime.warn.cache_clear()
    examples = [data.Example(str(i), "ab"[i % 2], "c", None, [], []) for i in range(4)]
    evaluation.report_router(w, examples)
    said = capsys.readouterr().err
    assert words in said and bool(said) == bool(words)


def test_w_is_spread_between_tasks_or_within_them():
    examples = [data.Example(str(i), "aabb"[i], "c", None, [], []) for i in range(4)]
    for rows, between, within in (([0, 0, 1, 1], 0.5, 0), ([0, 1, 0, 1], 0, 0.5)):
        found = evaluation.report_router(torch.eye(2)[rows], examples)
        assert found == {"entropy": 0, "between": between, "within": within, "largest": 0.5}


def test_the_best_weights_are_kept_and_scored(home):
    """A rate that is too high: the dev loss rises after the first step. What is kept and scored is of that
    step, also when the run goes on later."""
    options = [*SHORT, "--eval-every", "1", "--lr-skills", "0.05", "--lr-allocation", "3", "--warmup", "0",
               "--schedule", "constant"]  # fmt: skip
    for steps in (1, 3):
        run("train.py", *options, "--steps", steps, "--out", f"run{steps}", cwd=home)
    one, three = home / "run1", home / "run3"

    def rises():
        first, *later = [row["dev_loss"] for row in records(three) if "dev_loss" in row]
        assert first < min(later)
        wanted, found = (json.loads((folder / "scores.json").read_text()) for folder in (one, three))
        assert found == wanted
        assert (three / "adapter.safetensors").read_bytes() == (one / "adapter.safetensors").read_bytes()

    rises()
    last = checkpoint.unpickle(three / "checkpoint.pt")["weights"]
    kept = checkpoint.load_adapter(three / "adapter.safetensors")[0]
    assert not torch.equal(last["allocation"], kept["allocation"])
    config = json.loads((three / "config.json").read_text())
    config["train"]["steps"] = 4
    (three / "config.json").write_text(json.dumps(config))
    run("train.py", "--resume", "--out", "run3", "--device", "cpu", cwd=home)
    assert records(three)[-1]["step"] == 3
    rises()
