"""What every transformer here provides, and one greedy generation loop for all of them.

`Backbone` knows no family and no adapters. The families are in t5.py and llama.py.

Letters: B batch, L length (Ls source, Lt target where both occur), D width, V vocabulary.
Test: pytest tests/unit/test_model.py
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORED = -100  # the label of positions that carry no loss


class Config:
    """Base of the frozen dataclass that describes a model of one family.

    Its fields are named as in Hugging Face's config.json. Raise ValueError if a number is out of
    range: numbers must be above 0 and below 2^63, a `..._token_id` at least 0 and below vocab_size.
    """

    # The values that these entries of a config.json may have, if they are there. Other values
    # describe a model that computes something else.
    only: ClassVar[dict[str, tuple]]

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in (int, float):
                lower, upper = 0, 2**63
                if field.name.endswith("_token_id"):
                    lower, upper = -1, self.vocab_size
                if not lower < value < upper:
                    raise ValueError(
                        f"{field.name} must be above {lower} and below {upper}, not {value!r:.60}"
                    )

    @classmethod
    def of(cls, values: dict) -> Any:
        """Return the config made of those `values` that are its fields.

        Raise ValueError for a value that `only` excludes, TypeError if a field is missing.
        checkpoint.read_config compares the types.
        """
        for name, supported in cls.only.items():
            given = values.get(name, [])
            if not isinstance(given, list):  # a list has a value for each block
                given = [given]
            for value in given:
                if value not in supported:
                    choices = supported or "none"
                    raise ValueError(f"{name} {value!r:.60} is not supported; choices: {choices}")

        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on `device`. The host does not wait for what a GPU computes.

    That is safe: a copy from pageable memory returns only after CUDA has read the source.
    """
    return tensor.to(device, non_blocking=True)


def aligned(bias: Tensor) -> Tensor:
    """Return a bias (...,L). On a GPU, lay it out as CUDA's fused attention reads it.

    In this layout the last stride is 1, and rows begin at multiples of 8 numbers in memory. Any
    other bias would be copied in every block, and compiled blocks would need a graph for each
    remainder of L.
    """
    L = bias.shape[-1]
    if bias.device.type == "cpu":
        return bias
    # Also if L % 8 is 0: with a gap behind the rows for every L, one graph serves all lengths.
    return F.pad(bias, (0, 8 - L % 8))[..., :L]


class Backbone(nn.Module):
    """Base of all families.

    A family defines the names that are annotated below, and three methods:

    loss(input_ids, attention_mask, labels, *, per_row=False): return the SUM of the cross-entropy
        over all labels other than -100 or, if per_row, the sum of each row (B,). The caller
        divides by the number of target tokens of its whole step.
        input_ids (B,Ls): sources; attention_mask (B,Ls): true or 1 at real tokens; labels (B,Lt).
        Give them on the CPU: to find the positions of labels on a GPU, the host would have to wait
        for it. Evaluation gives them on the GPU, since it waits for each loss anyway.
    start(input_ids, attention_mask, max_new_tokens): read the sources (B,Ls). Return the tokens
        (B,) that the first step reads, and the state. The state holds caches and masks. Its method
        keep(rows) keeps only the rows of the current batch with these indices (B').
    step(newest, state): read one more token of each row (B,) into the state. Return the next
        logits (B,V).

    Its config has `num_blocks`, `vocab_size`, `tied_head`, `eos_ids` and `pad_token_id`, which
    `generate` writes after the end of a row.
    """

    # The methods that compute with weights. A sharded model gathers its weights when one of them is
    # called, as FSDP2 by itself does only for forward. None of them calls another.
    fsdp_methods = ("embed", "loss", "generate")

    # Config.from_hf(values of a config.json) returns a config.
    Config: type[Config]
    # Pairs for re.sub, in this order: they turn our names into those of Hugging Face.
    renames: tuple[tuple[str, str], ...]
    # Hugging Face's names of the embedding table. They all name the same tensor.
    tables: tuple[str, ...]
    # Regular expression: names of tensors that a file may hold and the model does not use.
    unused: str

    embedding: nn.Embedding
    head: nn.Linear | None  # None: the embedding table is the head
    blocks: Sequence[nn.Module]
    longest: int | None = None  # tokens of the longest row, in a family that has a limit

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        # The values of the config.json that it was loaded from, which checkpoint.save writes.
        self.hf_config: dict | None = None
        # That of the files which it was loaded from, see checkpoint.fingerprint.
        self.fingerprint: str | None = None
        # In training, keep only the inputs of each block and run it again in the backward pass.
        self.checkpoint_blocks = False

    def get_output_embeddings(self) -> nn.Linear | None:
        """Return the head, which the target "all" leaves out."""
        return self.head

    @classmethod
    def tidy(cls, config: Any, tensors: dict[str, Tensor]) -> Any:
        """Remove unused tensors of a file, and second copies of a table.

        Return the config that describes these tensors.
        """
        for name in list(tensors):
            if re.search(cls.unused, name):
                del tensors[name]

        # Keep the embedding table once, under its first name.
        tables = [tensors.pop(name) for name in cls.tables if name in tensors]
        if tables:
            tensors[cls.tables[0]] = tables[0]

        # Torch files store a tied head, too. A copy of the table is no head of its own.
        head = tensors.get("lm_head.weight")
        if config.tied_head and tables and head is not None and torch.equal(head, tables[0]):
            del tensors["lm_head.weight"]
        return config

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings (B,L,D) of tokens (B,L)."""
        return self.embedding(input_ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (...,V) of the last hidden states (...,D)."""
        if self.head is None:
            return F.linear(hidden, self.embedding.weight)
        return self.head(hidden)

    def cross_entropy(self, hidden: Tensor, labels: Tensor, per_row: bool = False) -> Tensor:
        """Return the sum over labels (B,L) other than -100, given hidden states (B,L,D).

        For per_row, and why the labels may be on the CPU, see `loss` above.
        """
        B, L = labels.shape
        # Select before the head: the logits of all positions would be the largest tensor there is.
        labels = labels.flatten()
        real = (labels != IGNORED).nonzero()[:, 0]  # positions of M real labels
        labels = to_device(labels[real], hidden.device)
        real = to_device(real, hidden.device)
        hidden = hidden.flatten(0, 1).index_select(0, real)
        logits = self.logits(hidden)  # (M,V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if not per_row:
            return F.cross_entropy(logits, labels, reduction="sum")
        losses = F.cross_entropy(logits, labels, reduction="none")  # (M,)
        return losses.new_zeros(B).index_add(0, real // L, losses)

    def run_block(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """Return block(*inputs), with gradient checkpointing where it is set."""
        if self.checkpoint_blocks and self.training:
            # No block draws random numbers, so their state need not be kept.
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        max_new_tokens: int = 127,
        on_keep: Callable[[Tensor], None] | None = None,
        agree: Callable[[bool], bool] | None = None,
    ) -> Tensor:
        """Return the greedy continuation of sources (B,Ls): only the new tokens (B,n).

        A row ends at its first EOS and is padded after it; n <= max_new_tokens. Rows that have
        ended leave the batch: on_keep(staying) gets the indices (B',) of the rows that stay,
        counted in the current batch.

        agree: for processes that share the weights, since all must take the same number of steps.
        It is called after each step, with True if this process has rows that go on, and returns
        whether all processes take another step.
        """
        newest, state = self.start(input_ids, attention_mask, max_new_tokens)
        tokens = newest.new_full((len(newest), max_new_tokens), self.config.pad_token_id)
        eos_ids = newest.new_tensor(self.config.eos_ids)
        alive = torch.arange(len(newest), device=newest.device)  # (B'): rows still in the batch
        all_ended = False

        for t in range(max_new_tokens):
            newest = self.step(newest, state).argmax(-1)  # (B')
            if not all_ended:  # afterwards, only the steps that other processes still need
                tokens[alive, t] = newest
                staying = torch.isin(newest, eos_ids, invert=True).nonzero()[:, 0]
                all_ended = len(staying) == 0

            another_step = not all_ended
            if agree is not None:
                another_step = agree(another_step)
            if not another_step:
                break

            if all_ended:
                # Other processes go on. From now on the batch is one dummy row, whose tokens are
                # discarded.
                staying = staying.new_zeros(1)
            if len(staying) < len(alive):
                alive = alive[staying]
                newest = newest[staying]
                state.keep(staying)
                if on_keep is not None:
                    on_keep(staying)
        return tokens[:, : t + 1]
