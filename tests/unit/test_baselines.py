"""The baselines against their equations, and parameter counts against closed forms.

parity/test_peft.py compares Poly and MHR with those of peft.
"""

from dataclasses import fields, replace

import pytest
import torch
from torch import nn

import train
from baselines import BUILT_IN, MHR, attach_method, load_method, settings_of_method
from experiments.compare.sizes import total
from helpers import ROOT, check_equal, refusal, seeded_generator, stir
from orchmoe import OrchMoEConfig, target_linears
from variants import VARIANTS

S, R, T, D = 3, 2, 5, 32
CONFIG = OrchMoEConfig(skills=S, rank=R, abstract_tasks=4, alpha=5.0)
TASK_IDS = torch.tensor([4, 0, -1, 2])
BY_TASK_ID = ("poly", "mhr", "c-poly")
HYDRA = load_method(f"{ROOT / 'examples/hydra_lora.py'}:HydraLoRA")


def attached(name, base):
    """Return the method in float64, with random values for all that is 0 or nearly equal."""
    generator = seeded_generator()
    adapters = attach_method(name, base, CONFIG, num_tasks=T, generator=generator)
    base.double()
    stir(adapters, generator)
    if name in BY_TASK_ID:
        nn.init.normal_(adapters.Z, generator=generator)
    if name == "c-poly":
        nn.init.normal_(adapters.Z_private, generator=generator)
    return adapters


def normalised(z):
    return z.sigmoid() / z.sigmoid().sum(-1, keepdim=True)


def rows_of_tasks(rows, unseen):
    """Return the rows (T,...) of TASK_IDS, with `unseen` for the task that is not seen."""
    return torch.stack([rows[i] if i >= 0 else unseen for i in TASK_IDS])


def expected_weights(name, adapters):
    """Return the weights c (B,H,S) of the first Linear's skills, as the papers have them."""
    rows = normalised(adapters.Z[0])  # (T,H,S)
    common = rows_of_tasks(rows, unseen=rows.mean(0))
    if name != "c-poly":
        return common
    private = rows_of_tasks(adapters.Z_private[0], unseen=torch.zeros(T))
    return torch.cat([common, private[:, None]], -1)  # (B,1,S-1+T)


def mixed_outputs(x, A, B, c):
    """Return sum_s c_s B_s A_s x for c (B,L,S)."""
    return torch.einsum("bld,srd,sro,bls->blo", x, A.expand(len(B), -1, -1), B, c)


def mixed_factors(x, A, B, c):
    """Return (sum_s c_s B_s) (sum_s c_s A_s) x, for c (B,H,S) with its own mix in each head."""
    weights = c.mT[:, :, None, :, None]  # (B,S,1,H,1)

    def mixed(factors):
        heads = factors.unflatten(-1, (c.shape[1], -1))  # (S,R,H,D/H)
        return (weights * heads).sum(1).flatten(2)  # (B,R,D)

    return x @ mixed(A).mT @ mixed(B)


@pytest.mark.filterwarnings("ignore:.*adapted Linears were not called")
@pytest.mark.parametrize("name", ["lora", "moe-lora", HYDRA, *BY_TASK_ID])
def test_a_linear_is_the_equation_of_its_method(small_t5, name):
    adapters = attached(name, small_t5)
    linear = next(iter(adapters.linears.values()))
    skills = next(iter(adapters.skills.values()))
    x = torch.randn(4, 7, D, dtype=torch.float64)
    A, B = skills.A, skills.B
    if name in BY_TASK_ID:
        mixed = mixed_factors(x, A, B, expected_weights(name, adapters))
    elif name == "lora":
        mixed = x @ A[0].T @ B[0]
    else:
        mixed = mixed_outputs(x, A, B, (x @ skills.W_task.T).softmax(-1))
    rank = S * R if name == "lora" else R
    assert A.shape[1] == rank
    assert len(A) == (1 if name == HYDRA else len(B))
    expected = x @ linear.weight.T + 5.0 / rank * mixed
    with adapters.routed(task_ids=TASK_IDS):
        torch.testing.assert_close(linear(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", BY_TASK_ID)
def test_noise_relaxes_the_rows_in_training_only(small_t5, name):
    adapters = attached(name, small_t5)
    noise = torch.rand(4, *adapters.noise_shape, dtype=torch.float64).clamp(0.01, 0.99)
    in_evaluation = [adapters.route(task_ids=TASK_IDS, noise=u).c for u in (None, noise)]
    assert torch.equal(*in_evaluation)

    adapters.train()
    seen = TASK_IDS >= 0
    z = adapters.Z[:, TASK_IDS[seen]] + noise.logit().transpose(0, 1)[:, seen]
    found = adapters.route(task_ids=TASK_IDS, noise=noise).c[:, seen]
    if name != "mhr":
        found = found[:, :, None]  # one head
    if name == "c-poly":
        found = found[..., : S - 1]  # the common skills
    torch.testing.assert_close(found, normalised(z))


def test_without_noise_training_routes_as_evaluation_does(small_t5):
    class QuietMHR(MHR):
        noisy = False

    adapters = attached(QuietMHR, small_t5)
    in_evaluation = adapters.eval().route(task_ids=TASK_IDS).c
    assert torch.equal(adapters.train().route(task_ids=TASK_IDS).c, in_evaluation)
    assert adapters.noise_shape is None


def test_the_routings_start_as_stated(small_t5):
    every_skills = attach_method("moe-lora", small_t5, OrchMoEConfig()).skills.values()
    start = torch.cat([skills.W_task.flatten() for skills in every_skills])
    assert start.std().item() == pytest.approx(0.02, rel=0.1)
    small_t5.skill_adapters.detach()
    adapters = attach_method("c-poly", small_t5, OrchMoEConfig(), num_tasks=T)
    assert 0.9e-3 < adapters.Z.abs().max() <= 1e-3
    assert torch.equal(adapters.Z_private[0], torch.eye(T))


# ---------------------------------------------------------------------------------------- refusals

HEADS = replace(CONFIG, targets=("q", "head"))
CANNOT_ATTACH = [
    ("loraa", CONFIG, {"num_tasks": T}, "loraa"),
    *((name, CONFIG, {}, "num_tasks") for name in BY_TASK_ID),
    # The head reads the tokens of all samples as one list, so it has no samples to route.
    ("orchmoe", HEADS, {}, "targets: head reads"),
]


@pytest.mark.parametrize("name, config, options, message", CANNOT_ATTACH)
def test_a_method_that_cannot_be_attached_is_refused(small_t5, name, config, options, message):
    with refusal(message):
        attach_method(name, small_t5, config, **options)


# ------------------------------------------------------------------------------ settings and sizes


@pytest.mark.parametrize("method", BUILT_IN)
def test_settings_have_a_learning_rate_for_each_kind_of_parameter_that_trains(small_t5, method):
    names = {field.name for field in fields(OrchMoEConfig)}
    adapters = attach_method(method, small_t5, OrchMoEConfig(), num_tasks=T)
    kinds = {f"lr_{kind}" for kind, group in adapters.parameter_groups().items() if group}
    assert settings_of_method(method) - names == kinds
    assert kinds <= {field.name for field in fields(train.TrainConfig)}
    assert ("abstract_tasks" in settings_of_method(method)) == (method in {"orchmoe", *VARIANTS})


COUNTS = {  # skills, their rank, and parameters of the routing of one Linear D -> O
    "lora": (1, S * R, 0),
    "moe-lora": (S, R, S * D),
    "poly": (S, R, T * S),
    "mhr": (S, R, T * S * 4),
    "c-poly": (S - 1 + T, R, T * (S - 1) + T * T),
    "orchmoe": (S, R, 4 * S),
}


def test_extra_ranks_change_the_ranks_alone(small_t5):
    """With 12 extra ranks each of the 12 Linears is as if R were larger by one."""
    found = []
    for rank, extra in ((R + 1, 0), (R, 12)):
        config = replace(CONFIG, rank=rank)
        options = {"extra_rank": extra, "generator": seeded_generator()}
        adapters = attach_method("orchmoe", small_t5, config, **options)
        scales = [skills.scale for skills in adapters.skills.values()]
        found.append((scales, adapters.state_dict()))
        adapters.detach()
    check_equal(*found)


@pytest.mark.parametrize("extra", [0, 7])
@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_closed_forms(small_t5, name, extra):
    config = replace(CONFIG, targets=("q", "wi_0"))
    found = total(name, small_t5, config, num_tasks=T, extra_rank=extra)
    skills, rank, routing = COUNTS[name]
    linears = target_linears(small_t5, config.targets).values()
    expected = 4 * D + 4 if name == "orchmoe" else 0  # the Task Router
    for n, linear in enumerate(linears):
        # Extra ranks are shared out evenly: the first n Linears have floor(n extra / N).
        more = (n + 1) * extra // len(linears) - n * extra // len(linears)
        expected += skills * (rank + more) * (D + linear.out_features) + routing
    assert found == expected
