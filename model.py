"""The contract of every transformer here: what the programs ask of it, and the one greedy generation that all
families share. Knows no family and no adapters; t5.py is the first family. Test: pytest tests/test_model.py

Dimensions: B batch, L length (Ls source, Lt target where both occur), D width, V vocabulary."""

import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORED = -100  # the label of positions that carry no loss


class Config:
    """Base of a family's frozen dataclass, with the names of Hugging Face's config.json. ValueError names the
    first field that is not of its type, or a number not above 0 (token ids: -1) and within 64 bits."""

    only: ClassVar[dict[str, tuple]]  # what an entry of a config.json may say, if it is there

    def __post_init__(self):
        for field in fields(self):
            value, kinds = getattr(self, field.name), (int, float) if field.type is float else (field.type,)
            least = -1 if field.name.endswith("_token_id") else 0
            if type(value) not in kinds or (int in kinds and not least < value < 2**63):
                kind = field.type.__name__ + f" above {least}" * (int in kinds)
                raise ValueError(f"{field.name} must be {kind}, not {value!r:.60}")

    @classmethod
    def of(cls, values: dict) -> Any:
        """Of the values that are fields. ValueError names what `only` excludes, TypeError what is missing."""
        for name, known in cls.only.items():
            given = values.get(name, [])
            for value in given if isinstance(given, list) else [given]:
                if value not in known:
                    raise ValueError(f"{name} {value!r:.60} is not supported, only {known}")
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B,H,L,E), k and v (B,G,L,E), with H / G neighbouring heads of q to each -> (B,H,L,E)."""
    L, E = q.shape[2:]
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or L > 256:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    # Of short rows torch's own takes twice as long on a CPU in bfloat16, most of it in its backward.
    future = q.new_full((L, L), -torch.inf).triu(1).repeat(q.shape[1] // k.shape[1], 1)  # (HL/G,L)
    rows = (q * E**-0.5).reshape(-1, len(future), E)  # (BG,HL/G,E)
    p = torch.baddbmm(future, rows, k.flatten(0, 1).mT).softmax(-1)
    return (p @ v.flatten(0, 1)).view(q.shape)


class Backbone(nn.Module):
    """A family defines what is annotated below and each method that raises. Its config has `num_blocks`,
    `vocab_size`, `tied_head`, `eos_ids`, and `pad_token_id`, which fills up `generate`'s rows."""

    entries = ("embed", "loss", "generate")  # called from outside, compute with weights; none calls another
    Config: type[Config]  # from_hf(values of a config.json) -> config, config.to_hf() -> such values
    renames: tuple[tuple[str, str], ...]  # our names -> Hugging Face's, for re.sub, in this order
    tables: tuple[str, ...]  # Hugging Face's names of the embedding table: each of them is one and the same
    unused: str  # regular expression of the names of tensors in a file that nothing reads
    embedding: nn.Embedding
    head: nn.Linear | None  # None: tied, the embedding table
    blocks: tuple[nn.Module, ...]
    longest: int | None = None  # tokens of a row, in a family that counts positions

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.checkpoint_blocks = False  # in training, trade each block's activations for a second forward
        self.dropout_rate = 0.0

    @classmethod
    def tidy(cls, config: Any, tensors: dict[str, Tensor]) -> Any:
        """Takes what is unused or there twice out of a file's tensors; returns the config as they have it."""
        for name in [name for name in tensors if re.search(cls.unused, name)]:
            del tensors[name]
        tables = [tensors.pop(name) for name in cls.tables if name in tensors][:1]
        tensors |= zip(cls.tables, tables, strict=False)
        head = tensors.get("lm_head.weight")
        # Torch files store a tied head too: a copy of the table is no head.
        if config.tied_head and tables and head is not None and torch.equal(head, tables[0]):
            del tensors["lm_head.weight"]
        return config

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.embedding(input_ids)  # (B,L) -> (B,L,D)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embedding.weight) if self.head is None else self.head(hidden)  # (...,V)

    def loss(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """SUM of the cross-entropy over labels (B,Lt) other than -100, given sources (B,Ls) whose mask is
        true (or 1) at real tokens; the caller divides by the token count of its whole step."""
        raise NotImplementedError

    def start(self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int) -> tuple[Tensor, Any]:
        """Reads the sources (B,Ls); returns the tokens (B,) that the first step reads, and the state: caches,
        masks, and keep(rows), which drops all but those rows, positions (B',) among the current ones."""
        raise NotImplementedError

    def step(self, newest: Tensor, state: Any) -> Tensor:
        """Reads one more token a row (B,), also into the state; returns the logits of the next (B,V)."""
        raise NotImplementedError

    def pack(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, more: int = 0
             ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """For decoders alone: sources (B,Ls), targets (B,Lt) -> tokens and labels (B,L): a row is its source
        and, right behind, its target, with all padding at the end; labels are -100 but on the target.
        ValueError where a row has no source, or with `more` tokens is longer than the model allows."""
        if not attention_mask.any(1).all():
            raise ValueError("input_ids: a row has no source, from which alone a token can be predicted")
        real = torch.cat((attention_mask.bool(), labels != IGNORED), 1)
        length = int(real.sum(1).max())
        if length + more > self.longest:
            raise ValueError(f"a row of {length + more} tokens, but the model has {self.longest} positions; "
                             "lower --max-source-length, --max-target-length or --max-new-tokens")
        order = (~real).byte().argsort(dim=1, stable=True)[:, :length]  # real tokens first
        ids, real = torch.cat((input_ids, labels), 1).gather(1, order), real.gather(1, order)
        target = real & (order >= input_ids.shape[1])
        return ids.masked_fill(~real, 0), ids.masked_fill(~target, IGNORED)

    def cross_entropy(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Hidden states (B,L,D), labels (B,L) -> sum over labels other than -100, of at least float32."""
        real = labels != IGNORED  # before the head: full logits are the largest tensor there is
        logits = self.logits(hidden[real])  # (M,V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, labels[real], reduction="sum")

    def run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """The block; in training with `checkpoint_blocks` it keeps its inputs alone."""
        if not (self.checkpoint_blocks and self.training):
            return block(*inputs)
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=self.dropout_rate > 0)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, *, max_new_tokens: int = 127,
                 on_keep: Callable[[Tensor], None] | None = None,
                 agree: Callable[[bool], bool] = bool) -> Tensor:  # fmt: skip
        """Greedy: sources (B,Ls) -> new tokens alone (B,n), n <= max_new_tokens, padded after EOS. Rows that
        have ended are dropped from the work; on_keep(rows) tells which of the current rows stay, (B',).
        agree(whether any row goes on) says after each token whether to compute another: where processes share
        the weights, all of them must take the same number of steps."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        newest, state = self.start(input_ids, attention_mask, max_new_tokens)
        tokens = newest.new_full((len(newest), max_new_tokens), self.config.pad_token_id)
        eos_ids = newest.new_tensor(self.config.eos_ids)
        alive, ended = torch.arange(len(newest), device=newest.device), False
        for t in range(max_new_tokens):
            newest = self.step(newest, state).argmax(-1)  # (B')
            if not ended:
                tokens[alive, t] = newest
                rows = torch.isin(newest, eos_ids, invert=True).nonzero()[:, 0]
                ended = len(rows) == 0
            if not agree(not ended):
                break
            if ended:  # one row keeps step with the other processes; nothing of it is kept
                rows = rows.new_zeros(1)
            if len(rows) < len(alive):
                alive, newest = alive[rows], newest[rows]
                state.keep(rows)
                if on_keep is not None:
                    on_keep(rows)
        return tokens[:, : t + 1]

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compiles each block as one graph for all lengths; blocks of a kind share their code. Call it when
        the adapters are attached; generation decodes uncompiled."""
        for block in self.blocks:
            block.compile(dynamic=True, fullgraph=True, backend=backend)

    def set_dropout(self, p: float) -> None:
        """At the places where the family has dropout; 0 at first."""
        if not 0 <= p < 1:
            raise ValueError(f"dropout must be in [0, 1), not {p}")
        self.dropout_rate = p
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = p
