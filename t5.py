"""T5 from scratch: v1.0 (relu, tied and scaled head) and v1.1 / Flan / LM-adapt (gated GELU, own head) differ
only in T5Config. Sources: Raffel et al., arXiv 1910.10683, section 2.1; Shazeer, arXiv 2002.05202 (gated
FFN). Knows nothing of adapters: the Linears are called q, k, v, o, wi, wi_0, wi_1, wo, and whoever wants to
wrap them does it by these names. Test: pytest tests/test_model.py

Dimensions: B batch, L length (Ls source, Lt target where both occur), D d_model, H heads, E d_kv, F d_ff,
V vocabulary."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import IGNORED, Backbone

# The largest value believed for each size; T5-11B has d_ff 65,536 and 128 heads of 128. A typing error or a
# hostile file is refused by these before it can ask for memory.
LARGEST = {
    "vocab_size": 2**22, "d_model": 2**16, "d_kv": 2**12, "d_ff": 2**20, "num_layers": 1024,
    "num_decoder_layers": 1024, "num_heads": 1024, "relative_attention_num_buckets": 4096,
    "relative_attention_max_distance": 2**20,
}  # fmt: skip


LARGEST_CONFIG = 2**20  # bytes of a config.json


@dataclass(frozen=True)
class T5Config:
    """Field names are those of Hugging Face's config.json, but for `tied_head`, which that file cannot
    tell."""

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

    def __post_init__(self):
        def require(name: str, good: bool, what: str):
            if not good:
                raise ValueError(f"{name} must be {what}, not {getattr(self, name)!r:.60}")

        for name, largest in LARGEST.items():
            value = getattr(self, name)
            require(name, type(value) is int and 1 <= value <= largest, f"a whole number from 1 to {largest}")
        for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
            value = getattr(self, name)
            require(name, type(value) is int and 0 <= value < self.vocab_size, "a token id below vocab_size")
        for name in ("scale_decoder_outputs", "tied_head"):
            require(name, isinstance(getattr(self, name), bool), "true or false")
        eps, buckets = self.layer_norm_epsilon, self.relative_attention_num_buckets
        require("layer_norm_epsilon", type(eps) in (int, float) and 0 < eps < 1, "a number between 0 and 1")
        feed_forward = ("relu", "gated-gelu")
        require("feed_forward_proj", self.feed_forward_proj in feed_forward, "'relu' or 'gated-gelu'")
        # With fewer than four buckets, or a span that ends before the logarithmic ones begin, there is no
        # function.
        require("relative_attention_num_buckets", buckets >= 4, "at least 4")
        require("relative_attention_max_distance", self.relative_attention_max_distance > buckets // 2,
                f"above half of relative_attention_num_buckets ({buckets})")  # fmt: skip

    @classmethod
    def from_json(cls, path: str | Path) -> "T5Config":
        """Reads a Hugging Face config.json; its many other keys are ignored. A ValueError names file and
        field."""
        try:
            with open(path, "rb") as file:
                values = json.loads(file.read(LARGEST_CONFIG + 1)[:LARGEST_CONFIG].decode())  # cut: not JSON
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError):
            raise ValueError(f"{path}: not JSON") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}: must hold a JSON object")
        if values.get("model_type", "t5") != "t5":
            kind = values["model_type"]
            raise ValueError(f"{path}: model_type is {kind!r:.60}; only 't5' (T5, Flan-T5) is supported")
        values = {name: value for name, value in values.items() if value is not None}
        values["tied_head"] = tied = values.get("tie_word_embeddings", True)
        if not isinstance(tied, bool):
            raise ValueError(f"{path}: tie_word_embeddings must be true or false, not {tied!r:.60}")
        # Files of transformers 4 say only through the untied head that T5 v1.1 does not scale its output.
        values.setdefault("scale_decoder_outputs", tied)
        values.setdefault("num_decoder_layers", values.get("num_layers"))
        values.setdefault("decoder_start_token_id", values.get("pad_token_id", 0))
        for name in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"):
            if name not in values:
                raise ValueError(f"{path}: {name} is missing")
        try:
            return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return (self.eos_token_id,)

    def to_hf(self) -> dict:
        """The values of a config.json that transformers (4 and 5) and `from_json` read."""
        values = asdict(self)
        values["tie_word_embeddings"] = values.pop("tied_head")
        architectures = ["T5ForConditionalGeneration"]
        return {"architectures": architectures, "model_type": "t5", "is_encoder_decoder": True, **values}


def lowest(dtype: torch.dtype) -> float:
    """What is added to the score of a key that must not be seen. Finite, so that a row without any key is
    uniform and not NaN; half of the lowest number, so that the sum with a position bias, or a cast to
    bfloat16, stays finite too."""
    return torch.finfo(dtype).min / 2


def padding_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """mask (B,L), true at real tokens -> additive bias (B,1,1,L)."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill_(~mask.bool(), lowest(dtype))[:, None, None, :]


def real_length(mask: Tensor) -> int:
    """mask (B,L) -> columns up to the last real token of any row, at least 1; beyond them all is padding."""
    return int((mask.bool() * torch.arange(1, mask.shape[1] + 1, device=mask.device)).max().clamp(min=1))


def relative_buckets(distance: Tensor, *, bidirectional: bool, buckets: int, max_distance: int) -> Tensor:
    """distance = key position - query position, any shape -> bucket numbers of that shape. Half of the
    buckets hold one distance each, the others grow logarithmically up to max_distance; `bidirectional`: each
    sign has its own."""
    if bidirectional:
        buckets //= 2
        offset, distance = (distance > 0) * buckets, distance.abs()
    else:
        offset, distance = 0, (-distance).clamp(min=0)
    exact = buckets // 2
    # In float32 and in this order: the truncation decides, and published weights were trained with it.
    log_ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (log_ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    return offset + torch.where(distance < exact, distance, far)


class RelativeBias(nn.Module):
    """The position bias of one stack, shared by its blocks; in the decoder causal, with the future masked."""

    def __init__(self, config: T5Config, *, causal: bool):
        super().__init__()
        self.causal = causal
        self.max_distance = config.relative_attention_max_distance
        self.weight = nn.Parameter(torch.zeros(config.relative_attention_num_buckets, config.num_heads))

    def strip(self, length: int) -> Tensor:
        """The bias of every distance from 1 - length to length - 1: (H, 2 length - 1)."""
        distance = torch.arange(1 - length, length, device=self.weight.device)
        numbers = relative_buckets(
            distance, bidirectional=not self.causal, buckets=len(self.weight), max_distance=self.max_distance
        )
        strip = F.embedding(numbers, self.weight).T  # (H, 2L-1)
        return strip.masked_fill(distance > 0, lowest(strip.dtype)) if self.causal else strip

    def forward(self, length: int) -> Tensor:
        """(1,H,L,L). The matrix is constant along its diagonals, so row q is the window of the strip that
        begins at distance -q: 2L-1 table look-ups, and as many in the backward, where the plain form needs
        L^2."""
        return self.strip(length).unfold(1, length, 1).flip(1)[None]


class Cache:
    """What one decoder block remembers in generation: keys and values of the source, and of the target so
    far."""

    def __init__(self, source_k: Tensor, source_v: Tensor):
        self.source = source_k, source_v  # (B,H,Ls,E) each
        self.target = source_k[:, :, :0], source_v[:, :, :0]  # (B,H,Lt,E) each

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.target = torch.cat((self.target[0], k), 2), torch.cat((self.target[1], v), 2)
        return self.target

    def keep(self, rows: Tensor, source_length: int):
        self.source = tuple(x[:, :, :source_length].index_select(0, rows) for x in self.source)
        self.target = tuple(x.index_select(0, rows) for x in self.target)


def split_heads(x: Tensor, d_kv: int) -> Tensor:
    return x.unflatten(-1, (-1, d_kv)).transpose(1, 2)  # (B,L,HE) -> (B,H,L,E)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dropout: float) -> Tensor:
    # T5 has no 1/sqrt(E): its initialisation of q absorbs it.
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=1.0)
    return x.transpose(1, 2).flatten(2)  # (B,H,L,E) -> (B,L,HE)


class SelfAttention(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.d_kv, inner = config.d_kv, config.num_heads * config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor, bias: Tensor, cache: Cache | None = None) -> Tensor:
        q = split_heads(self.q(x), self.d_kv)  # (B,H,L,E)
        k = split_heads(self.k(x), self.d_kv)
        v = split_heads(self.v(x), self.d_kv)
        if cache is not None:
            k, v = cache.extend(k, v)
        return self.o(attend(q, k, v, bias, self.dropout.p if self.training else 0.0))  # (B,L,D)


class CrossAttention(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.d_kv, inner = config.d_kv, config.num_heads * config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        self.dropout = nn.Dropout(0.0)

    def keys_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder states (B,Ls,D) -> (B,H,Ls,E) each; in generation computed once."""
        return split_heads(self.k(states), self.d_kv), split_heads(self.v(states), self.d_kv)

    def forward(self, x: Tensor, bias: Tensor, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        q = split_heads(self.q(x), self.d_kv)  # (B,H,Lt,E)
        return self.o(attend(q, *keys_values, bias, self.dropout.p if self.training else 0.0))  # (B,Lt,D)


class FeedForward(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.gated = config.feed_forward_proj == "gated-gelu"
        for name in ("wi_0", "wi_1") if self.gated else ("wi",):
            self.add_module(name, nn.Linear(config.d_model, config.d_ff, bias=False))
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            x = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)  # (B,L,F)
        else:
            x = F.relu(self.wi(x))
        return self.wo(self.dropout(x))  # (B,L,D)


def norm(config: T5Config) -> nn.RMSNorm:
    # T5's layer norm: no mean, no bias, accumulated in float32 for bfloat16 inputs too.
    return nn.RMSNorm(config.d_model, eps=config.layer_norm_epsilon)


class EncoderBlock(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.attention_norm, self.attention = norm(config), SelfAttention(config)
        self.ffn_norm, self.ffn = norm(config), FeedForward(config)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), bias))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))  # (B,Ls,D)


class DecoderBlock(nn.Module):
    entries = ("start", "step")  # methods that are called from outside and compute with weights, as forward

    def __init__(self, config: T5Config):
        super().__init__()
        self.attention_norm, self.attention = norm(config), SelfAttention(config)
        self.cross_norm, self.cross_attention = norm(config), CrossAttention(config)
        self.ffn_norm, self.ffn = norm(config), FeedForward(config)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor, bias: Tensor, states: Tensor, states_bias: Tensor) -> Tensor:
        return self.layers(x, bias, self.cross_attention.keys_values(states), states_bias)

    def start(self, states: Tensor) -> Cache:
        """The cache of a generation from encoder states (B,Ls,D)."""
        return Cache(*self.cross_attention.keys_values(states))

    def step(self, x: Tensor, bias: Tensor, states_bias: Tensor, cache: Cache) -> Tensor:
        """The newest token alone, x (B,1,D). Never compiled: the cache grows by a token."""
        return self.layers(x, bias, cache.source, states_bias, cache)

    def layers(self, x: Tensor, bias: Tensor, keys_values: tuple[Tensor, Tensor], states_bias: Tensor,
               cache: Cache | None = None) -> Tensor:  # fmt: skip
        x = x + self.dropout(self.attention(self.attention_norm(x), bias, cache))
        x = x + self.dropout(self.cross_attention(self.cross_norm(x), states_bias, keys_values))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))  # (B,Lt,D)


class Encoder(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.position = RelativeBias(config, causal=False)
        self.blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.num_layers))
        self.norm, self.dropout = norm(config), nn.Dropout(0.0)

    def forward(self, x: Tensor, mask: Tensor, run: Callable[..., Tensor]) -> Tensor:
        bias = self.position(x.shape[1]) + padding_bias(mask, x.dtype)  # (B,H,Ls,Ls), once for all blocks
        x = self.dropout(x)
        for block in self.blocks:
            x = run(block, x, bias)
        return self.dropout(self.norm(x))  # (B,Ls,D)


class Decoder(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.position = RelativeBias(config, causal=True)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.num_decoder_layers))
        self.norm, self.dropout = norm(config), nn.Dropout(0.0)

    def forward(self, x: Tensor, states: Tensor, mask: Tensor, run: Callable[..., Tensor]) -> Tensor:
        # Target padding needs no mask: it comes last, so no real target position sees it.
        bias, states_bias = self.position(x.shape[1]), padding_bias(mask, x.dtype)  # (1,H,Lt,Lt), (B,1,1,Ls)
        x = self.dropout(x)
        for block in self.blocks:
            x = run(block, x, bias, states, states_bias)
        return self.dropout(self.norm(x))  # (B,Lt,D)

    def step(self, x: Tensor, bias: Tensor, mask: Tensor, caches: list[Cache]) -> Tensor:
        """One more token: x (B,1,D), bias (1,H,1,Lt) = the causal row of this token -> (B,1,D)."""
        states_bias = padding_bias(mask, x.dtype)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block.step(x, bias, states_bias, cache)
        return self.norm(x)


class Decoding:
    """The state of a generation: the mask of the sources, the caches, the position bias of all distances."""

    def __init__(self, mask: Tensor, caches: list[Cache], strip: Tensor):
        self.mask, self.caches, self.strip = mask, caches, strip

    def bias(self) -> Tensor:
        """Of the next token, at distances -t ... 0: (1,H,1,t+1)."""
        t = self.caches[0].target[0].shape[2]  # tokens read so far
        zero = self.strip.shape[1] // 2  # where distance 0 stands
        return self.strip[:, zero - t : zero + 1][None, :, None]

    def keep(self, rows: Tensor):
        self.mask = self.mask[rows]
        self.mask = self.mask[:, : real_length(self.mask)]
        for cache in self.caches:
            cache.keep(rows, self.mask.shape[1])


class T5(Backbone):
    """Its dropout: embeddings, attention weights, inside the FFN, each sublayer's output, each stack's end"""

    def __init__(self, config: T5Config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.head = None if config.tied_head else nn.Linear(config.d_model, config.vocab_size, bias=False)

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        return (*self.encoder.blocks, *self.decoder.blocks)

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Source (B,Ls), mask true (or 1) at real tokens -> encoder states (B,Ls,D)."""
        return self.encoder(self.embedding(input_ids), attention_mask, self.run)

    def decode(self, decoder_input_ids: Tensor, states: Tensor, attention_mask: Tensor) -> Tensor:
        """Target so far (B,Lt), encoder states and their mask -> hidden states (B,Lt,D) for `logits`."""
        return self.decoder(self.embedding(decoder_input_ids), states, attention_mask, self.run)

    def logits(self, hidden: Tensor) -> Tensor:
        if self.config.scale_decoder_outputs:
            hidden = hidden * self.config.d_model**-0.5
        return F.linear(hidden, self.embedding.weight) if self.head is None else self.head(hidden)  # (...,V)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
        """(B,Ls), (B,Ls), (B,Lt) -> logits (B,Lt,V)."""
        states = self.encode(input_ids, attention_mask)  # (B,Ls,D)
        return self.logits(self.decode(decoder_input_ids, states, attention_mask))

    def loss(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        # The decoder reads the labels shifted right, behind the start token.
        start = labels.new_full((len(labels), 1), self.config.decoder_start_token_id)
        shifted = torch.cat((start, labels[:, :-1]), 1)  # (B,Lt)
        shifted = shifted.masked_fill(shifted == IGNORED, self.config.pad_token_id)
        hidden = self.decode(shifted, self.encode(input_ids, attention_mask), attention_mask)
        return self.cross_entropy(hidden, labels)

    def start(
        self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int
    ) -> tuple[Tensor, Decoding]:
        states = self.encode(input_ids, attention_mask)
        caches = [block.start(states) for block in self.decoder.blocks]
        strip = self.decoder.position.strip(max_new_tokens)  # (H, 2n-1)
        first = input_ids.new_full((len(input_ids),), self.config.decoder_start_token_id)
        return first, Decoding(attention_mask, caches, strip)

    def step(self, newest: Tensor, state: Decoding) -> Tensor:
        x = self.embedding(newest[:, None])  # (B,1,D)
        return self.logits(self.decoder.step(x, state.bias(), state.mask, state.caches)[:, 0])

    @torch.no_grad()
    def init_weights(self, seed: int) -> "T5":
        """T5's own initialisation, for training from scratch: a function of the seed alone, on any device."""
        config, generator = self.config, torch.Generator().manual_seed(seed)
        std = {
            "embedding": 1.0,
            # The logits begin with unit variance whether the decoder's output is scaled before the head or
            # here.
            "head": 1.0 if config.scale_decoder_outputs else config.d_model**-0.5,
            "q": (config.d_model * config.d_kv) ** -0.5,  # in place of 1/sqrt(E) on the scores
            "o": (config.num_heads * config.d_kv) ** -0.5,
            "wo": config.d_ff**-0.5,
        }
        for name, weight in self.named_parameters():
            owner = name.split(".")[-2]
            if owner.endswith("norm"):
                weight.fill_(1.0)
            else:
                values = torch.randn(weight.shape, generator=generator)
                weight.copy_(values * std.get(owner, config.d_model**-0.5))
        return self
