"""Writes walkthrough.md beside it: one sample of sni/ from its prompt to its loss, with the numbers of a run
that is trained here and now. Each section computes its step as the equation stands and checks that the model
computes the same. Test: pytest tests/repo/test_docs.py

    python -m docs.walkthrough        # half a minute on one core"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

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

ROOT = Path(__file__).resolve().parent.parent
TASK, OTHER = "task117_thing_with_adjective", "task108_count_the_fruits"
LINEAR = "decoder.blocks.2.cross_attention.v"  # the one that is looked into
LINEARS = ("encoder.blocks.0.attention.q", "decoder.blocks.0.attention.v", LINEAR)
CONFIGS = train.Settings(train.TrainConfig(model=str(ROOT / "tiny"), steps=100, eval_instances=56),
                         data.DataConfig(data=str(ROOT / "sni")))  # fmt: skip


class Shown(NamedTuple):
    """The run, and the sample that is followed through it."""

    frozen: Backbone
    base: Backbone
    adapters: Adapters
    tokenizer: tokenizer.Tokenizer
    seen: list[data.Example]  # of TASK and OTHER
    batch: data.Batch  # the sample alone: B = 1
    routing: Routing
    loss: Tensor
    x: Tensor  # (L,D), what LINEAR was given
    y: Tensor  # (L,O), what it made of it

    def pieces(self, ids: Iterable) -> list[str]:
        return [f"`{self.tokenizer.sp.id_to_piece(int(i))}`" for i in ids]


def page() -> str:
    """The whole page."""
    with tempfile.TemporaryDirectory() as folder:
        place = runtime.pick_device(device="cpu")
        launch = train.LaunchConfig(out=str(Path(folder, "run")))
        train.train(CONFIGS, place, launch, final_scores=False)
        base, adapters, words = run_folder.load(place, run=Path(folder, "run"))
        seen = [row for row in data.load_sets(CONFIGS.data, words, ["seen"])["seen"]
                if row.task in (TASK, OTHER)]
        seen.sort(key=lambda row: row.task != TASK)
        shown = follow(base, adapters, words, seen)
    sections = (opening, prompt, features, task_weights, allocation, skill_weights, two_gemms, loss, backward)
    with torch.no_grad():
        return "\n\n".join(section(shown).strip() for section in sections) + "\n"


def follow(base: Backbone, adapters: Adapters, words: tokenizer.Tokenizer, seen: list[data.Example]) -> Shown:
    """Forward and backward of the first of the `seen` instances, as train.train_step does it."""
    batch, calls = data.collate(seen[:1]), []
    hook = adapters.linears[LINEAR].register_forward_hook(
        lambda _, inputs, output: calls.append((inputs[0][0].detach(), output[0].detach())))
    with evaluation.routed(base, adapters, batch) as routing:
        loss = base.loss(batch.input_ids, batch.attention_mask, batch.labels) / batch.target_tokens
        loss.backward()
    hook.remove()
    return Shown(checkpoint.load(ROOT / "tiny"), base, adapters, words, seen, batch,
                 routing, loss, *calls[0])


# ----------------------------------------------------------------------------------------------- the sections


def opening(s: Shown) -> str:
    frozen = sum(p.numel() for p in s.frozen.parameters())
    trained = sum(p.numel() for group in s.adapters.parameter_groups().values() for p in group)
    return f"""
# One sample, step by step

Written by `python -m docs.walkthrough`, not by hand: a test trains the run again and compares every word
and, up to rounding, every number. **The run** is that of

```
python train.py --steps {CONFIGS.train.steps} --device cpu
```

on `sni/` and `tiny/`, seed 0: {frozen:,} frozen weights, {trained:,} that train, a sixth of the default's
steps. It has only begun to learn; what matters here is the arithmetic, which is the same at any step. What
the paper fixes of it and what was chosen is graded in [docs/paper.md](paper.md).

![The Task Router makes w of the source's embeddings; w and the allocation matrices give each Linear its
weights of skills.](architecture.svg)

The letters are those of the figure; here B = 1."""


def prompt(s: Shown) -> str:
    example, words = s.seen[0], s.tokenizer
    task = data.read_task(ROOT / "sni" / "tasks" / f"{TASK}.json")
    instance = next(row for row in task["instances"] if row["id"] == example.id)
    text = data.render_prompt(task, instance, words)
    assert words.encode(text) == example.source_ids.tolist() == s.batch.input_ids[0].tolist()
    return f"""
## 1. Prompt and tokens: `render_prompt`, `Tokenizer.encode`, `collate`

A held-out instance of the training task `{TASK}`. The official prompt is definition, two
positive examples, and the input:

```
{text}
```

Right is {" or ".join(f"`{text}`" for text in example.references)}; the first is the target here.
SentencePiece makes {len(example.source_ids)} tokens of the source and {s.batch.labels.shape[1]} of the
target, both with EOS:

{table(["", "1", "2", "3", "4", "5", "6", "7", "8"],
       [["source", *s.pieces(example.source_ids[:8])], ["id", *map(str, example.source_ids[:8])],
        ["target", *pad(s.pieces(s.batch.labels[0]))], ["id", *pad(map(str, s.batch.labels[0].tolist()))]])}

`input_ids` {shape(s.batch.input_ids)}, `labels` {shape(s.batch.labels)}. No task id goes further than this:
`OrchMoE.route` does not use it."""


def features(s: Shown) -> str:
    router, embeddings = s.adapters.router, s.base.embed(s.batch.input_ids)
    X = F.rms_norm(embeddings, embeddings.shape[-1:], eps=1e-6)  # (1,L,D)
    scores = X @ X.mT / math.sqrt(X.shape[-1])
    P = scores.softmax(-1)  # (1,L,L)
    x_hat = (X + P @ X).mean(1)  # (1,D)
    assert_close(x_hat, router.summarise(embeddings, s.batch.attention_mask))
    standard = (x_hat - router.mu) / router.sd
    ids = s.batch.input_ids[0]
    itself = P[0, ids.unsqueeze(1) == ids].sum() / len(ids)
    moved = ((P @ X).mean(1) - X.mean(1)).norm() / X.mean(1).norm()
    return f"""
## 2. What the router reads: `TaskRouter.summarise`

X = rmsnorm(E), E the embeddings of the source, {shape(X)}: before the encoder, so nothing of the target can
reach the router.

P = softmax(X Xᵀ / √D), {shape(P)}, with D = {X.shape[-1]} and nothing learned. After rmsnorm a token's
product with itself is D, far above that with any other, so it reads itself: {itself:.4f} of P lies on
tokens of the query's own id, and the mean of P X is that of X but for {moved:.5f} of its length. So X̂
is nearly 2 X, and standardising undoes the 2.

x̂ = mean_L(X + P X), {shape(x_hat)}, then standardised by μ and sd, which one pass over the training
sources set before the first step (`TaskRouter.fit`). The first four of its {x_hat.shape[1]} numbers, and its
length:

{table(["", "1", "2", "3", "4", "length"],
       [["x̂", *numbers([*x_hat[0, :4], x_hat.norm()])],
        ["(x̂ − μ) / sd", *numbers([*standard[0, :4], standard.norm()])]])}"""


def task_weights(s: Shown) -> str:
    router = s.adapters.router
    raw = router.summarise(s.base.embed(s.batch.input_ids), s.batch.attention_mask)
    logits = (raw - router.mu) / router.sd @ router.W_task.T + router.bias  # (1,K)
    w = logits.softmax(-1)
    assert_close(w, s.routing.w)
    _, everyone = evaluation.measure(s.base, s.adapters, s.seen)
    own, other = (everyone[[row.task == name for row in s.seen]].mean(0) for name in (TASK, OTHER))
    return f"""
## 3. Which abstract tasks this is: `TaskRouter.forward`

w = softmax(W_task x̂ + b), with W_task {shape(router.W_task)}: {shape(w)}. Below it the mean w of the
{len(s.seen) // 2} seen instances of this task, and of those of `{OTHER}`: no label told the router
that they are two tasks.

{table(["abstract task", *map(str, range(1, w.shape[1] + 1))],
       [["W_task x̂ + b", *numbers(logits[0])], ["**w**", *numbers(w[0])],
        ["its task, mean w", *numbers(own)], ["the other, mean w", *numbers(other)]])}

Entropy of w: {evaluation.mean_entropy(w):.3f} nats; were it uniform, ln K = {math.log(w.shape[1]):.3f}."""


def allocation(s: Shown) -> str:
    names = list(s.adapters.linears)
    gates = s.adapters.Z[names.index(LINEAR)].sigmoid()  # (K,S)
    Zhat = gates / gates.sum(-1, keepdim=True)
    assert_close(Zhat, s.routing.Zhat[0, names.index(LINEAR)])
    return f"""
## 4. Which skills an abstract task uses: `OrchMoE.allocation_weights`

Every adapted Linear has a matrix Z (K,S) of its own; Ẑ = sigmoid(Z), each row divided by its sum,
{shape(s.routing.Zhat[0])} for all {len(names)} Linears. That of `{LINEAR}`:

{table(["abstract task", *(f"skill {j + 1}" for j in range(Zhat.shape[1]))],
       [[str(k + 1), *numbers(row)] for k, row in enumerate(Zhat)])}"""


def skill_weights(s: Shown) -> str:
    names = list(s.adapters.linears)
    c = {name: s.routing.w[0] @ s.routing.Zhat[0, names.index(name)] for name in LINEARS}
    for name, value in c.items():
        assert_close(value, s.routing.c[names.index(name), 0])
    return f"""
## 5. The weights of the skills for this sample: `OrchMoE.route`

c = w Ẑ, {shape(s.routing.c)}, all Linears in one einsum. `Adapters.routed` hands each Linear its slice.
Three of them:

{table(["Linear", *(f"skill {j + 1}" for j in range(len(c[LINEAR])))],
       [[f"`{name}`", *numbers(value)] for name, value in c.items()])}

Each row sums to 1, as w and the rows of Ẑ do. A row of 1/S would be plain LoRA of rank S R."""


def two_gemms(s: Shown) -> str:
    linear: SkillLinear = s.adapters.linears[LINEAR]
    c, x, scale = s.routing.c[list(s.adapters.linears).index(LINEAR), 0], s.x, linear.skill_scale
    (S, R, D), O = linear.skill_A.shape, linear.out_features  # noqa: E741
    A, B = linear.skill_A.reshape(S * R, D), linear.skill_B.reshape(S * R, O)  # A_cat, B_cat: views
    h = x @ A.T  # (L,SR)
    weighted = scale * c.repeat_interleave(R) * h
    skills, frozen = weighted @ B, x @ linear.weight.T  # (L,O)
    assert_close(frozen + skills, s.y)
    one_by_one = sum(c[j] * (x @ linear.skill_A[j].T) @ linear.skill_B[j] for j in range(S))
    assert_close(scale * one_by_one, skills)
    names = [f"{j + 1}.{r + 1}" for j in range(S) for r in range(R)]
    return f"""
## 6. One Linear: `SkillLinear.forward`, `mix_skills`

y = W₀ x + (α/R) Σ_s c_s B_s A_s x. In `{LINEAR}` x is {shape(x)}, the encoder's
states; W₀ is {shape(linear.weight)}, A {shape(linear.skill_A)}, B {shape(linear.skill_B)}, α/R = {scale:g}.
The sum over skills is two matrix products:

```
h = x A_catᵀ      {shape(x)} {shape(A.T)} → {shape(h)}
h ← (α/R) c h     each c_s for the {R} ranks of its skill
h B_cat           {shape(h)} {shape(B)} → {shape(skills)}
```

At the source's last token, column s.r being rank r of skill s:

{table(["", *names], [["h", *numbers(h[-1])], ["(α/R) c", *numbers(scale * c.repeat_interleave(R))],
                      ["(α/R) c h", *numbers(weighted[-1])]])}

and of the {O} outputs the first four, and the length of the vector:

{table(["", "1", "2", "3", "4", "length"],
       [[name, *numbers([*value[-1, :4], value[-1].norm()])] for name, value in
        (("W₀ x", frozen), ("skills", skills), ("y", s.y))])}

This costs S R (D + O) = {S * R * (D + O):,} multiplications a token beside the D O = {D * O:,} of W₀."""


def token_losses(base: Backbone, batch: data.Batch) -> Tensor:
    """−ln p of each target token, (Lt,)."""
    start = batch.labels.new_full((1, 1), base.config.decoder_start_token_id)
    target = torch.cat((start, batch.labels[:, :-1]), 1)
    logits = base.logits(base.hidden(batch.input_ids, batch.attention_mask, target))
    return F.cross_entropy(logits[0], batch.labels[0], reduction="none")


def loss(s: Shown) -> str:
    before = token_losses(s.frozen, s.batch)
    with s.adapters.routed(w=s.routing.w):
        after = token_losses(s.base, s.batch)
    assert_close(after.mean(), s.loss)
    return f"""
## 7. The loss: `T5.loss`, `train_step`

The decoder reads the target shifted right behind the start token; the loss is −ln p of each target token,
summed and divided by the count of the whole step's target tokens (of this sample alone, here: {len(after)}).
Nothing else is in it: no balance loss, no task labels.

{table(["−ln p", *s.pieces(s.batch.labels[0]), "mean"],
       [["frozen base", *numbers([*before, before.mean()])],
        ["this run", *numbers([*after, after.mean()])]])}"""


def backward(s: Shown) -> str:
    groups = {name: torch.cat([p.grad.flatten() for p in group]).norm()
              for name, group in s.adapters.parameter_groups().items() if group}
    assert all(p.grad is None for name, p in s.base.named_parameters() if "skill_" not in name)
    rates = (CONFIGS.train.lr_skills, CONFIGS.train.lr_router, CONFIGS.train.lr_allocation)
    return f"""
## 8. Backward: what learns

The gradient of that loss reaches the skills, and through c the allocation and the router; the base is frozen
and gets none.

{table(["", *groups], [["norm of the gradient", *numbers(groups.values(), 4)],
                       ["peak learning rate", *(f"{rate:g}" for rate in rates)]])}

AdamW steps by its rate whatever the norm, so each kind has a rate of its own (`make_optimizer`). To see w of
every task and Ẑ of every Linear: `python -m experiments.plot --run RUN`."""


# -------------------------------------------------------------------------------------------------- Markdown


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def numbers(values: Iterable, digits: int = 3) -> list[str]:
    return [f"{float(value):.{digits}f}" for value in values]


def pad(cells: Iterable[str], width: int = 8) -> list[str]:
    cells = list(cells)[:width]
    return cells + [""] * (width - len(cells))


def shape(tensor: Tensor) -> str:
    return f"({','.join(map(str, tensor.shape))})"


if __name__ == "__main__":
    text = page()
    with runtime.atomic_write(ROOT / "docs" / "walkthrough.md") as file:
        file.write(text.encode())
