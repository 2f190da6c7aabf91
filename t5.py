"""T5 from scratch. v1.0 (relu, tied and scaled head) and v1.1, Flan and LM-adapted (gated GELU, a
separate head) differ only in T5Config.

Sources: Raffel et al., arXiv 1910.10683, section 2.1; Shazeer, arXiv 2002.05202 (gated FFN).
This file knows nothing of adapters. They find its Linears by their names: q, k, v, o, wi, wi_0,
wi_1, wo and head.

Letters: B batch, L length (Ls source, Lt target where both occur), D d_model, H heads, E d_kv,
F d_ff, V vocabulary.
Test: pytest tests/unit/test_model.py tests/parity/test_transformers.py
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import IGNORED, Backbone, Config, aligned, to_device


@dataclass(frozen=True)
class T5Config(Config):
    """Fields are named as in Hugging Face's config.json, except `tied_head`."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"  # or "gated-gelu", whose GELU is the tanh form
    scale_decoder_outputs: bool = True  # by d_model^-0.5 before the head
    tied_head: bool = True  # the head is the embedding table
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0

    only = {"feed_forward_proj": ("relu", "gated-gelu")}

    def __post_init__(self):
        super().__post_init__()
        # Else `relative_buckets` has no exact buckets, or no range for the logarithmic ones.
        if not 4 <= self.relative_attention_num_buckets < 2 * self.relative_attention_max_distance:
            raise ValueError(
                "relative_attention_num_buckets must be at least 4 and below "
                "2 * relative_attention_max_distance"
            )

    @property
    def num_blocks(self) -> int:
        return self.num_layers + self.num_decoder_layers

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return (self.eos_token_id,)

    @classmethod
    def from_hf(cls, values: dict) -> "T5Config":
        """Return the config that the values of a config.json describe."""
        values = {name: value for name, value in values.items() if value is not None}
        tied_head = values.get("tie_word_embeddings", True)
        values["tied_head"] = tied_head
        # T5 v1.1 does not scale its output. Files of transformers 4 show it only by an untied head.
        values.setdefault("scale_decoder_outputs", tied_head)
        values.setdefault("num_decoder_layers", values.get("num_layers"))
        values.setdefault("decoder_start_token_id", values.get("pad_token_id", 0))
        return cls.of(values)


# ---------------------------------------------------------------------------------------- attention


def masked_score(dtype: torch.dtype) -> float:
    """Return what is added to the score of a key that must not be seen.

    It is finite, so that a row without any key is uniform and not NaN. It is half of the lowest
    number, so that its sum with a position bias is finite too, also in bfloat16.
    """
    return torch.finfo(dtype).min / 2


def padding_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the bias (B,1,1,L) that hides padding, given mask (B,L), true at real tokens."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    bias.masked_fill_(~mask.bool(), masked_score(dtype))
    return bias[:, None, None, :]


def relative_buckets(
    distance: Tensor, *, bidirectional: bool, buckets: int, max_distance: int
) -> Tensor:
    """Return the bucket number of each distance = key position - query position.

    If `bidirectional`, each sign has half of the buckets; if not, the past has all. Half of the
    buckets of a sign hold one distance each. The others cover ranges of distances that grow
    logarithmically up to max_distance.
    """
    if bidirectional:
        buckets //= 2
        offset = (distance > 0) * buckets
        distance = distance.abs()
    else:
        offset = 0
        distance = (-distance).clamp(min=0)

    # In float32 and in this order: rounding decides the bucket, and published weights rely on it.
    exact = buckets // 2
    log_ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = exact + (log_ratio * (buckets - exact)).long()
    far = far.clamp(max=buckets - 1)
    return offset + torch.where(distance < exact, distance, far)


class RelativeBias(nn.Module):
    """The position bias of one stack, shared by its blocks. If `causal`, it hides the future."""

    def __init__(self, config: T5Config, *, causal: bool):
        super().__init__()
        self.causal = causal
        self.max_distance = config.relative_attention_max_distance
        buckets = config.relative_attention_num_buckets
        self.weight = nn.Parameter(torch.zeros(buckets, config.num_heads))

    def strip(self, length: int) -> Tensor:
        """Return the bias (H,2L-1) of all distances in order, from 1 - L to L - 1."""
        distance = torch.arange(1 - length, length, device=self.weight.device)
        numbers = relative_buckets(
            distance,
            bidirectional=not self.causal,
            buckets=len(self.weight),
            max_distance=self.max_distance,
        )
        # Contiguous, since attention on a GPU reads the positions of a head one after another.
        strip = F.embedding(numbers, self.weight).T.contiguous()  # (H,2L-1)
        if self.causal:
            strip = strip.masked_fill(distance > 0, masked_score(strip.dtype))
        return strip

    def forward(self, length: int) -> Tensor:
        """Return the bias (1,H,L,L) of each query position and key position.

        Query q sees the keys at distances -q ... L-1-q, which is a window of the strip:

            strip    -2 -1  0  1  2       L = 3
            q = 2    -2 -1  0             first window
            q = 1       -1  0  1          second
            q = 0           0  1  2       last: so the windows are flipped

        This looks up 2L-1 entries of the table, in the backward pass too, instead of L^2.
        """
        windows = self.strip(length).unfold(1, length, 1)  # (H,L,L)
        return windows.flip(1)[None]


@dataclass
class Cache:
    """Keys and values of one decoder block while it generates."""

    source: Tensor  # (2,B,H,Ls,E), of the encoded source; computed once
    target: Tensor  # (2,B,H,t,E), of the tokens read so far


class Attention(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.d_kv = config.d_kv
        inner = config.num_heads * config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.d_kv)).transpose(1, 2)  # (B,L,HE) -> (B,H,L,E)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values (B,H,L,E) of x (B,L,D)."""
        return self.split_heads(self.k(x)), self.split_heads(self.v(x))

    def forward(
        self,
        x: Tensor,
        bias: Tensor,
        keys_values: tuple[Tensor, Tensor] | Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return the output of attention (B,L,D) for x (B,L,D).

        With `keys_values`, a pair of (B,H,L,E) or one tensor (2,B,H,L,E), this is cross-attention.
        Without, x attends to itself. If there is a cache, the keys and values of x are first
        appended to it, and x attends to all target tokens in it.
        """
        q = self.split_heads(self.q(x))  # (B,H,L,E)
        if keys_values is None:
            keys_values = self.keys_values(x)
        if cache is not None:
            cache.target = torch.cat((cache.target, torch.stack(keys_values)), dim=3)
            keys_values = cache.target
        k, v = keys_values

        # T5 does not divide by sqrt(E): its initialisation of q makes up for it.
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)  # (B,H,L,E)
        return self.o(x.transpose(1, 2).flatten(2))  # (B,L,HE) -> (B,L,D)


# ------------------------------------------------------------------------------------------- blocks


class FeedForward(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.gated = config.feed_forward_proj == "gated-gelu"
        if self.gated:
            self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
            self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        else:
            self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            h = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)  # (B,L,F)
        else:
            h = F.relu(self.wi(x))
        return self.wo(h)  # (B,L,D)


def norm(config: T5Config) -> nn.RMSNorm:
    # T5's layer norm: no mean, no bias, accumulated in float32 for bfloat16 inputs too.
    return nn.RMSNorm(config.d_model, eps=config.layer_norm_epsilon)


class Block(nn.Module):
    """A block of the encoder or, if `cross`, of the decoder, which reads the encoded source too."""

    fsdp_methods = ("start",)  # see Backbone

    def __init__(self, config: T5Config, *, cross: bool):
        super().__init__()
        self.attention_norm = norm(config)
        self.attention = Attention(config)
        if cross:
            self.cross_norm = norm(config)
            self.cross_attention = Attention(config)
        self.ffn_norm = norm(config)
        self.ffn = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        bias: Tensor,
        encoded: Tensor | None = None,
        source_bias: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return the output (B,L,D) for whole rows x (B,L,D) and encoded sources (B,Ls,D).

        With a cache instead of `encoded`, x (B,1,D) is the next token of each row. `bias` is that
        of the self-attention, `source_bias` that of the cross-attention.
        """
        # Keys and values of the cross-attention. They do not depend on x.
        cross_keys_values = None
        if encoded is not None:
            cross_keys_values = self.cross_attention.keys_values(encoded)
        elif cache is not None:
            cross_keys_values = cache.source  # computed once
        x = x + self.attention(self.attention_norm(x), bias, cache=cache)
        if cross_keys_values is not None:
            x = x + self.cross_attention(self.cross_norm(x), source_bias, cross_keys_values)
        return x + self.ffn(self.ffn_norm(x))

    def start(self, encoded: Tensor) -> Cache:
        """Return the cache that generation starts with, given the encoded sources (B,Ls,D)."""
        source = torch.stack(self.cross_attention.keys_values(encoded))
        return Cache(source, target=source[:, :, :, :0])


class Stack(nn.Module):
    """Encoder or decoder: the blocks, and the position bias that they share."""

    def __init__(self, config: T5Config, count: int, *, decoder: bool):
        super().__init__()
        self.position = RelativeBias(config, causal=decoder)
        self.blocks = nn.ModuleList(Block(config, cross=decoder) for _ in range(count))
        self.norm = norm(config)

    def forward(self, x: Tensor, *context: Tensor, run_block: Callable[..., Tensor]) -> Tensor:
        """Return the last hidden states (B,L,D). Each block gets x and the `context`."""
        for block in self.blocks:
            x = run_block(block, x, *context)
        return self.norm(x)


# ---------------------------------------------------------------------------------------- the model


@dataclass
class State:
    """The state of `generate` between two tokens."""

    source_bias: Tensor  # (B,1,1,Ls), hides the padding of the sources
    caches: list[Cache]  # of the decoder's blocks
    strip: Tensor  # (H,2n-1), the position bias of all distances, for n new tokens

    def bias(self) -> Tensor:
        """Return the position bias (1,H,1,t+1) of the next token, at distances -t ... 0."""
        t = self.caches[0].target.shape[3]  # tokens read so far
        zero = self.strip.shape[1] // 2  # the place of distance 0
        return self.strip[:, zero - t : zero + 1][None, :, None]

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self.source_bias = aligned(self.source_bias[rows])  # indexing packs the rows again
        for cache in self.caches:
            cache.source = cache.source.index_select(1, rows)
            cache.target = cache.target.index_select(1, rows)


class T5(Backbone):
    Config = T5Config
    renames = (
        (r"^embedding", "shared"),
        (r"^head", "lm_head"),
        (r"^(encoder|decoder)\.norm", r"\1.final_layer_norm"),
        (r"\.position\.", ".block.0.layer.0.SelfAttention.relative_attention_bias."),
        (r"\.blocks\.", ".block."),
        (r"attention_norm", "layer.0.layer_norm"),
        (r"\.attention\.", ".layer.0.SelfAttention."),
        (r"cross_norm", "layer.1.layer_norm"),
        (r"cross_attention", "layer.1.EncDecAttention"),
        (r"^(encoder.*)\.ffn", r"\1.layer.1.ffn"),
        (r"^(decoder.*)\.ffn", r"\1.layer.2.ffn"),
        (r"ffn_norm", "layer_norm"),
        (r"ffn\.", "DenseReluDense."),
    )
    tables = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    # Files of the first T5 models have this tensor, which T5 does not use.
    unused = r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias"

    def __init__(self, config: T5Config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, config.num_layers, decoder=False)
        self.decoder = Stack(config, config.num_decoder_layers, decoder=True)
        self.head = None
        if not config.tied_head:
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    @property
    def blocks(self) -> tuple[Block, ...]:
        return (*self.encoder.blocks, *self.decoder.blocks)

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the encoded sources (B,Ls,D) of tokens (B,Ls).

        attention_mask (B,Ls): true or 1 at real tokens.
        """
        x = self.embedding(input_ids)
        bias = self.encoder.position(x.shape[1]) + padding_bias(attention_mask, x.dtype)
        # Reassigning `bias` frees the unaligned tensor before the blocks run.
        bias = aligned(bias)  # (B,H,Ls,Ls)
        return self.encoder(x, bias, run_block=self.run_block)

    def hidden(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor
    ) -> Tensor:
        """Return the hidden states (B,Lt,D) that `logits` takes, given the target so far (B,Lt)."""
        encoded = self.encode(input_ids, attention_mask)
        x = self.embedding(decoder_input_ids)
        # Padding of the target needs no mask: it comes last, so no real position sees it.
        bias = aligned(self.decoder.position(x.shape[1]))
        source_bias = aligned(padding_bias(attention_mask, x.dtype))
        return self.decoder(x, bias, encoded, source_bias, run_block=self.run_block)

    def logits(self, hidden: Tensor) -> Tensor:
        if self.config.scale_decoder_outputs:
            hidden = hidden * self.config.d_model**-0.5
        return super().logits(hidden)

    def loss(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, *, per_row: bool = False
    ) -> Tensor:
        input_ids = to_device(input_ids, self.device)
        attention_mask = to_device(attention_mask, self.device)
        # The decoder reads the labels shifted right, after the start token.
        start = labels.new_full((len(labels), 1), self.config.decoder_start_token_id)
        shifted = torch.cat((start, labels[:, :-1]), 1)  # (B,Lt)
        shifted = shifted.masked_fill(shifted == IGNORED, self.config.pad_token_id)
        hidden = self.hidden(input_ids, attention_mask, to_device(shifted, self.device))
        return self.cross_entropy(hidden, labels, per_row)

    def start(
        self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int
    ) -> tuple[Tensor, State]:
        encoded = self.encode(input_ids, attention_mask)
        state = State(
            source_bias=aligned(padding_bias(attention_mask, encoded.dtype)),
            caches=[block.start(encoded) for block in self.decoder.blocks],
            strip=self.decoder.position.strip(max_new_tokens),
        )
        first = input_ids.new_full((len(input_ids),), self.config.decoder_start_token_id)
        return first, state

    def step(self, newest: Tensor, state: State) -> Tensor:
        x = self.embedding(newest[:, None])  # (B,1,D)
        bias = aligned(state.bias())
        for block, cache in zip(self.decoder.blocks, state.caches, strict=True):
            x = block(x, bias, source_bias=state.source_bias, cache=cache)
        return self.logits(self.decoder.norm(x)[:, 0])

    @classmethod
    def tidy(cls, config: T5Config, tensors: dict[str, Tensor]) -> T5Config:
        # A head in the file is used even if tie_word_embeddings is true, which transformers 5
        # writes for every T5.
        config = super().tidy(config, tensors)
        has_head = "lm_head.weight" in tensors
        return replace(config, tied_head=config.tied_head and not has_head)
