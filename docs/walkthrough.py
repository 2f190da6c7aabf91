"""Write walkthrough.md beside this file: one sample of sni/ from its prompt to its loss.

The numbers are those of a run that is trained here and now. Each section computes its step as the
equation says, and checks that the model computes the same.

    python -m docs.walkthrough        # half a minute on one core

Letters: B batch, L source length, Lt target length, D input width, O output width, K abstract
tasks, N adapted Linears, S skills, R rank.  Test: pytest tests/repo/test_docs.py
"""

import math
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

import checkpoint
import data
import eval as evaluation
import run_folder
import runtime
import tokenizer
import train
from model import Backbone
from orchmoe import Adapters, Routing, SkillLinear

TASK = "task117_thing_with_adjective"  # the task of the sample
OTHER = "task108_count_the_fruits"  # a task to compare with
LINEAR = "decoder.blocks.2.cross_attention.v"  # the Linear that is looked into
LINEARS = ("encoder.blocks.0.attention.q", "decoder.blocks.0.attention.v", LINEAR)
SETTINGS = train.Settings.from_flags({"steps": 100, "eval_instances": 56})


class Shown(NamedTuple):
    """The run, and the sample that is followed through it."""

    frozen: Backbone  # the base without adapters
    base: Backbone
    adapters: Adapters
    tokenizer: tokenizer.Tokenizer
    seen: list[data.Example]  # of TASK and OTHER
    batch: data.Batch  # the sample alone: B = 1
    routing: Routing
    loss: Tensor
    x: Tensor  # (L,D), input of LINEAR
    y: Tensor  # (L,O), output of LINEAR

    def pieces(self, ids: Iterable) -> list[str]:
        return [f"`{self.tokenizer.sp.id_to_piece(int(i))}`" for i in ids]

    def position(self, name: str) -> int:
        """Return the position of a Linear among the N adapted ones."""
        return list(self.adapters.linears).index(name)


def page() -> str:
    """Train the run and return the whole page."""
    with tempfile.TemporaryDirectory() as folder:
        device = runtime.pick_device(device="cpu")
        launch = train.LaunchConfig(out=f"{folder}/run")
        train.train(SETTINGS, device, launch, final_scores=False)
        base, adapters, words = run_folder.load(device, run=launch.out)
    seen = data.load_sets(SETTINGS.dataset, words, ["seen"])["seen"]
    seen = [example for example in seen if example.task in (TASK, OTHER)]
    seen.sort(key=lambda example: example.task != TASK)
    shown = follow(base, adapters, words, seen)

    sections = [opening, prompt, features, task_weights, allocation, skill_weights]
    sections += [two_gemms, loss, backward]
    with torch.no_grad():
        texts = [section(shown).strip() for section in sections]
    return "\n\n".join(texts) + "\n"


def follow(
    base: Backbone, adapters: Adapters, words: tokenizer.Tokenizer, seen: list[data.Example]
) -> Shown:
    """Do forward and backward of the first of the examples, as train.train_step does."""
    batch = data.collate(seen[:1])
    calls = {}

    def remember(_: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        calls["x"] = inputs[0][0].detach()
        calls["y"] = output[0].detach()

    hook = adapters.linears[LINEAR].register_forward_hook(remember)
    with evaluation.routed(base, adapters, batch) as routing:
        loss = base.loss(batch.input_ids, batch.attention_mask, batch.labels)
        loss = loss / batch.target_tokens
        loss.backward()
    hook.remove()
    return Shown(
        frozen=checkpoint.load(SETTINGS.training.model),
        base=base,
        adapters=adapters,
        tokenizer=words,
        seen=seen,
        batch=batch,
        routing=routing,
        loss=loss,
        **calls,
    )


# ----------------------------------------------------------------------------------- the sections


def opening(shown: Shown) -> str:
    frozen = sum(parameter.numel() for parameter in shown.frozen.parameters())
    trained = 0
    for group in shown.adapters.parameter_groups().values():
        trained += sum(parameter.numel() for parameter in group)
    return f"""
# One sample, step by step

Written by `python -m docs.walkthrough`, not by hand: a test trains the run again and compares every
word, and every number within 1 % or 0.01. **The run** was made by

```
python train.py --steps {SETTINGS.training.steps} --device cpu
```

on `sni/` and `tiny/`, seed 0: {frozen:,} frozen weights, {trained:,} that train. It has a
sixth of the default steps, so it has only begun to learn. What matters here is the arithmetic,
which is the same at any step. [docs/paper.md](paper.md) says what comes from the paper and what we
chose.

![The Task Router makes w of the source's embeddings; w and the allocation matrices give each Linear
its weights of skills.](architecture.svg)

The letters are those of the figure and of README.md; here B = 1."""


def prompt(shown: Shown) -> str:
    example = shown.seen[0]
    words = shown.tokenizer
    task = data.read_task(Path(SETTINGS.dataset.data) / "tasks" / f"{TASK}.json")
    instance = next(row for row in task["instances"] if row["id"] == example.id)
    text = data.render_prompt(task, instance, words)
    ids = example.source_ids.tolist()
    target = shown.batch.labels[0].tolist()
    assert words.encode(text) == ids == shown.batch.input_ids[0].tolist()

    rows = [
        ["source", *shown.pieces(ids[:8])],
        ["id", *map(str, ids[:8])],
        ["target", *pad(shown.pieces(target))],
        ["id", *pad([str(i) for i in target])],
    ]
    right = " or ".join(f"`{reference}`" for reference in example.references)
    return f"""
## 1. Prompt and tokens: `render_prompt`, `Tokenizer.encode`, `collate`

A held-out instance of the training task `{TASK}`. The official prompt is
definition, two positive examples, and the input:

```
{text}
```

The references are {right}; the first is the target here.
SentencePiece makes {len(ids)} tokens of the source and {len(target)} of the
target, both with EOS:

{table(["", "1", "2", "3", "4", "5", "6", "7", "8"], rows)}

`input_ids` {shape(shown.batch.input_ids)}, `labels` {shape(shown.batch.labels)}. The batch
also has a task id, but `OrchMoE.route` ignores it."""


def features(shown: Shown) -> str:
    router = shown.adapters.router
    embeddings = shown.base.embed(shown.batch.input_ids)
    D = embeddings.shape[-1]
    X = F.rms_norm(embeddings, (D,), eps=1e-6)  # (1,L,D)
    scores = X @ X.mT / math.sqrt(D)
    P = scores.softmax(dim=-1)  # (1,L,L)
    X_hat = P @ X + X  # (1,L,D)
    x_hat = X_hat.mean(dim=1)  # (1,D)
    assert_close(x_hat, router.summarise(embeddings, shown.batch.attention_mask))
    standardised = (x_hat - router.mu) / router.sd

    ids = shown.batch.input_ids[0]
    same_id = ids.unsqueeze(1) == ids  # (L,L)
    on_same_id = P[0, same_id].sum() / len(ids)
    mean = X.mean(dim=1)
    moved = ((P @ X).mean(dim=1) - mean).norm() / mean.norm()
    rows = [
        ["x̂", *numbers([*x_hat[0, :4], x_hat.norm()])],
        ["(x̂ − μ) / sd", *numbers([*standardised[0, :4], standardised.norm()])],
    ]
    return f"""
## 2. What the router reads: `TaskRouter.summarise`

X = rmsnorm(E) has shape {shape(X)}. E are the embeddings of the source, before the encoder. The
source holds no target, so the router cannot read the answer.

P = softmax(X Xᵀ / √D) has shape {shape(P)}, with D = {D}. Nothing in it is learned. After rmsnorm a
token's product with itself is D, far above that with any other. So it attends almost only to itself
and to its repetitions: these get {on_same_id:.4f} of the attention. The mean of P X over the tokens
differs from that of X by {moved:.5f} of its length. So X̂ is nearly 2 X, and standardising undoes
the 2.

x̂ = mean_L(P X + X) has shape {shape(x_hat)}. It is standardised by μ and sd, which one pass over at
most 2,000 training sources set before the first step (`TaskRouter.fit`). The table shows the first
four of its {D} numbers, and its length:

{table(["", "1", "2", "3", "4", "length"], rows)}"""


def task_weights(shown: Shown) -> str:
    router = shown.adapters.router
    embeddings = shown.base.embed(shown.batch.input_ids)
    x_hat = router.summarise(embeddings, shown.batch.attention_mask)
    x_hat = (x_hat - router.mu) / router.sd
    logits = x_hat @ router.W_task.T + router.bias  # (1,K)
    w = logits.softmax(dim=-1)
    assert_close(w, shown.routing.w)

    w_seen = evaluation.router_weights(shown.base, shown.adapters, shown.seen)  # (M,K)
    half = len(shown.seen) // 2  # as many of TASK as of OTHER
    K = w.shape[1]
    rows = [
        ["W_task x̂ + b", *numbers(logits[0])],
        ["**w**", *numbers(w[0])],
        ["mean w of its task", *numbers(w_seen[:half].mean(dim=0))],
        ["mean w of the other task", *numbers(w_seen[half:].mean(dim=0))],
    ]
    return f"""
## 3. Which abstract tasks this is: `TaskRouter.forward`

w = softmax(W_task x̂ + b) has shape {shape(w)}, and W_task {shape(router.W_task)}. The table shows
w of this sample and, below it, the mean w of the {half} seen instances of this task and of those of
`{OTHER}`. No label told the router that they are two tasks.

{table(["abstract task", *map(str, range(1, K + 1))], rows)}

Entropy of w: {evaluation.mean_entropy(w):.3f} nats; a uniform w has ln K = {math.log(K):.3f}."""


def allocation(shown: Shown) -> str:
    n = shown.position(LINEAR)
    Z = shown.adapters.Z[n]  # (K,S)
    Zhat = Z.sigmoid() / Z.sigmoid().sum(dim=-1, keepdim=True)
    assert_close(Zhat, shown.routing.Zhat[0, n])
    skills = [f"skill {j + 1}" for j in range(Zhat.shape[1])]
    rows = [[str(k + 1), *numbers(row)] for k, row in enumerate(Zhat)]
    return f"""
## 4. Which skills an abstract task uses: `OrchMoE.allocation_weights`

Every adapted Linear has a matrix Z (K,S) of its own. Ẑ is sigmoid(Z), each row divided by its sum.
For all {len(shown.adapters.linears)} Linears together it has shape {shape(shown.routing.Zhat[0])}.
This is Ẑ of `{LINEAR}`:

{table(["abstract task", *skills], rows)}"""


def skill_weights(shown: Shown) -> str:
    rows = []
    for name in LINEARS:
        n = shown.position(name)
        c = shown.routing.w[0] @ shown.routing.Zhat[0, n]  # (S,)
        assert_close(c, shown.routing.c[n, 0])
        rows.append([f"`{name}`", *numbers(c)])
    skills = [f"skill {j + 1}" for j in range(len(c))]
    return f"""
## 5. The weights of the skills for this sample: `OrchMoE.route`

c = w Ẑ has shape {shape(shown.routing.c)}: one einsum computes all Linears. `Adapters.routed` hands
each Linear its slice. The table shows three of them:

{table(["Linear", *skills], rows)}

Each row sums to 1, as w and the rows of Ẑ do. A row of 1/S would be plain LoRA of rank S R."""


def two_gemms(shown: Shown) -> str:
    linear: SkillLinear = shown.adapters.linears[LINEAR]
    x = shown.x
    c = shown.routing.c[shown.position(LINEAR), 0]  # (S,)
    scale = linear.skill_scale
    S, R, D = linear.skill_A.shape
    O = linear.out_features  # noqa: E741
    A = linear.skill_A.reshape(S * R, D)  # A_cat, a view
    B = linear.skill_B.reshape(S * R, O)  # B_cat, a view

    h = x @ A.T  # (L,SR)
    weights = scale * c.repeat_interleave(R)  # (SR,)
    weighted = weights * h
    skills = weighted @ B  # (L,O)
    frozen = x @ linear.weight.T  # (L,O)
    assert_close(frozen + skills, shown.y)
    one_by_one = torch.zeros_like(skills)
    for s in range(S):
        one_by_one += scale * c[s] * (x @ linear.skill_A[s].T) @ linear.skill_B[s]
    assert_close(one_by_one, skills)

    ranks = []
    for s in range(S):
        ranks += [f"{s + 1}.{r + 1}" for r in range(R)]
    of_ranks = [
        ["h", *numbers(h[-1])],
        ["(α/R) c", *numbers(weights)],
        ["(α/R) c h", *numbers(weighted[-1])],
    ]
    of_outputs = []
    for name, value in (("W₀ x", frozen), ("skills", skills), ("y", shown.y)):
        of_outputs.append([name, *numbers([*value[-1, :4], value[-1].norm()])])
    return f"""
## 6. One Linear: `SkillLinear.forward`, `mix_skills`

y = W₀ x + (α/R) Σ_s c_s B_s A_s x. In `{LINEAR}` x is {shape(x)},
the encoder's states; W₀ is {shape(linear.weight)}, A {shape(linear.skill_A)},
B {shape(linear.skill_B)}, α/R = {scale:g}. The sum over skills is two matrix products:

```
h = x A_catᵀ      {shape(x)} {shape(A.T)} → {shape(h)}
h ← (α/R) c h     each c_s for the {R} ranks of its skill
h B_cat           {shape(h)} {shape(B)} → {shape(skills)}
```

The next table is for the last token of the source. Column s.r is rank r of skill s:

{table(["", *ranks], of_ranks)}

The next one shows the first four of the {O} outputs, and the length of the vector:

{table(["", "1", "2", "3", "4", "length"], of_outputs)}

For each token this costs S R (D + O) = {S * R * (D + O):,} multiplications, beside the D O =
{D * O:,} of W₀."""


def token_losses(base: Backbone, batch: data.Batch) -> Tensor:
    """Return −ln p of each target token, (Lt,)."""
    start = batch.labels.new_full((1, 1), base.config.decoder_start_token_id)
    target = torch.cat((start, batch.labels[:, :-1]), dim=1)
    hidden = base.hidden(batch.input_ids, batch.attention_mask, target)
    return F.cross_entropy(base.logits(hidden)[0], batch.labels[0], reduction="none")


def loss(shown: Shown) -> str:
    before = token_losses(shown.frozen, shown.batch)
    with shown.adapters.routed(w=shown.routing.w):
        after = token_losses(shown.base, shown.batch)
    assert_close(after.mean(), shown.loss)
    rows = [
        ["frozen base", *numbers([*before, before.mean()])],
        ["this run", *numbers([*after, after.mean()])],
    ]
    return f"""
## 7. The loss: `T5.loss`, `train_step`

The decoder reads the target shifted right behind the start token; the loss is −ln p of each target
token, summed and divided by the count of the whole step's target tokens (of this sample alone,
here: {len(after)}). Nothing else is in it: no balance loss, no task labels.

{table(["−ln p", *shown.pieces(shown.batch.labels[0]), "mean"], rows)}"""


def backward(shown: Shown) -> str:
    norms = {}
    for name, group in shown.adapters.parameter_groups().items():
        if group:
            gradients = [parameter.grad.flatten() for parameter in group]
            norms[name] = torch.cat(gradients).norm()
    for name, parameter in shown.base.named_parameters():
        assert "skill_" in name or parameter.grad is None
    rates = [getattr(SETTINGS.training, f"lr_{name}") for name in norms]
    rows = [
        ["norm of the gradient", *numbers(norms.values(), digits=4)],
        ["peak learning rate", *(f"{rate:g}" for rate in rates)],
    ]
    return f"""
## 8. Backward: what learns

The gradient of that loss reaches the skills, and through c the allocation and the router; the base
is frozen and gets none.

{table(["", *norms], rows)}

AdamW normalises each gradient, so the learning rate and not the norm sets the size of a step. So
each kind has a rate of its own (`make_optimizer`). To
see w of every task and Ẑ of every Linear: `python -m experiments.plot --run RUN`."""


# --------------------------------------------------------------------------------------- Markdown


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def numbers(values: Iterable, digits: int = 3) -> list[str]:
    return [f"{float(value):.{digits}f}" for value in values]


def pad(cells: list[str], width: int = 8) -> list[str]:
    """Return `width` cells, with empty ones at the end."""
    return cells[:width] + [""] * (width - len(cells))


def shape(tensor: Tensor) -> str:
    return f"({','.join(map(str, tensor.shape))})"


if __name__ == "__main__":
    text = page()
    with runtime.atomic_write(runtime.ROOT / "docs" / "walkthrough.md") as file:
        file.write(text.encode())
