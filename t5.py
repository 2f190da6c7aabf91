"""T5 from scratch: v1.0 (relu, tied and scaled head) and v1.1 / Flan / LM-adapt (gated GELU, own head) differ
only in T5Config. Sources: Raffel et al., arXiv 1910.10683, section 2.1; Shazeer, arXiv 2002.05202 (gated
FFN). Knows nothing of adapters: the Linears are called q, k, v, o, wi, wi_0, wi_1, wo, and whoever wants to
wrap them does it by these names. Test: pytest tests/test_model.py

Dimensions: B batch, L length (Ls source, Lt target where both occur), D d_model, H heads, E d_kv, F d_ff,
V vocabulary."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import IGNORED, Backbone, Config


@dataclass(frozen=True)
class T5Config(Config):
    """Field names are those of Hugging Face's config.json, but for `tied_head`, which that cannot tell."""

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
        if max(self.pad_token_id, self.eos_token_id, self.decoder_start_token_id) >= self.vocab_size:
            raise ValueError(f"vocab_size {self.vocab_size} is not above pad, eos, decoder_start_token_id")
        # Logarithmic buckets begin above 0 and end beyond their beginning, see `relative_buckets`.
        if not 4 <= self.relative_attention_num_buckets < 2 * self.relative_attention_max_distance:
            raise ValueError("relative_attention_num_buckets not from 4 to 2 relative_attention_max_distance")

    num_blocks = property(lambda self: self.num_layers + self.num_decoder_layers)
    eos_ids = property(lambda self: (self.eos_token_id,))

    @classmethod
    def from_hf(cls, values: dict) -> "T5Config":
        values = {name: value for name, value in values.items() if value is not None}
        values["tied_head"] = values.get("tie_word_embeddings", True)
        # Files of transformers 4 say only through the untied head that T5 v1.1 does not scale its output.
        values.setdefault("scale_decoder_outputs", values["tied_head"])
        values.setdefault("num_decoder_layers", values.get("num_layers"))
        values.setdefault("decoder_start_token_id", values.get("pad_token_id", 0))
        return cls.of(values)

    def to_hf(self) -> dict:
        values = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}
        values |= {"is_encoder_decoder": True, **asdict(self)}
        return values | {"tie_word_embeddings": values.pop("tied_head")}


def lowest(dtype: torch.dtype) -> float:
    # Added to the score of a key that must not be seen. Finite, so that a row without any key is uniform and
    # not NaN; half of the lowest number, so that its sum with a position bias stays finite, in bfloat16 too.
    return torch.finfo(dtype).min / 2


def padding_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)  # (B,L), mask true at real tokens
    return bias.masked_fill_(~mask.bool(), lowest(dtype))[:, None, None, :]  # (B,1,1,L)


def relative_buckets(distance: Tensor, *, bidirectional: bool, buckets: int, max_distance: int) -> Tensor:
    """distance = key position - query position -> bucket numbers. Half of the buckets hold one distance each,
    the others grow logarithmically up to max_distance; `bidirectional`: each sign has its own."""
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
        self.causal, self.max_distance = causal, config.relative_attention_max_distance
        self.weight = nn.Parameter(torch.zeros(config.relative_attention_num_buckets, config.num_heads))

    def strip(self, length: int) -> Tensor:
        """The bias of every distance from 1 - length to length - 1: (H, 2 length - 1)."""
        distance = torch.arange(1 - length, length, device=self.weight.device)
        numbers = relative_buckets(distance, bidirectional=not self.causal, buckets=len(self.weight),
                                   max_distance=self.max_distance)  # fmt: skip
        strip = F.embedding(numbers, self.weight).T  # (H, 2L-1)
        return strip.masked_fill(distance > 0, lowest(strip.dtype)) if self.causal else strip

    def forward(self, length: int) -> Tensor:
        """(1,H,L,L). The matrix is constant along its diagonals, so row q is the window of the strip that
        begins at distance -q: 2L-1 table look-ups, also in the backward, where the plain form needs L^2."""
        return self.strip(length).unfold(1, length, 1).flip(1)[None]


class Attention(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.d_kv, inner = config.d_kv, config.num_heads * config.d_kv
        self.q, self.k, self.v = (nn.Linear(config.d_model, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, config.d_model, bias=False)
        self.dropout = nn.Dropout(0.0)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.d_kv)).transpose(1, 2)  # (B,L,HE) -> (B,H,L,E)

    def keys_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        return self.split_heads(self.k(states)), self.split_heads(self.v(states))  # (B,H,L,E)

    def forward(self, x: Tensor, bias: Tensor, keys_values: tuple[Tensor, Tensor] | None = None,
                cache: list[Tensor] | None = None) -> Tensor:  # fmt: skip
        """x (B,L,D) attends to the given keys and values (B,H,Ls,E), without them to itself and the cache."""
        q = self.split_heads(self.q(x))  # (B,H,L,E)
        k, v = keys_values or self.keys_values(x)
        if cache is not None:
            cache[2:] = k, v = torch.cat((cache[2], k), 2), torch.cat((cache[3], v), 2)
        dropout = self.dropout.p if self.training else 0.0
        # T5 has no 1/sqrt(E): its initialisation of q absorbs it.
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=1.0)
        return self.o(x.transpose(1, 2).flatten(2))  # (B,H,L,E) -> (B,L,HE) -> (B,L,D)


class FeedForward(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.gated = config.feed_forward_proj == "gated-gelu"
        for name in ("wi_0", "wi_1") if self.gated else ("wi",):
            self.add_module(name, nn.Linear(config.d_model, config.d_ff, bias=False))
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x) if self.gated else F.relu(self.wi(x))
        return self.wo(self.dropout(x))  # (B,L,F) -> (B,L,D)


def norm(config: T5Config) -> nn.RMSNorm:
    # T5's layer norm: no mean, no bias, accumulated in float32 for bfloat16 inputs too.
    return nn.RMSNorm(config.d_model, eps=config.layer_norm_epsilon)


class Block(nn.Module):
    """Of the decoder where `cross`: between its two sublayers it attends to the encoder's states (B,Ls,D)."""

    entries = ("start", "step")  # called from outside and compute with weights, as forward

    def __init__(self, config: T5Config, *, cross: bool):
        super().__init__()
        self.attention_norm, self.attention = norm(config), Attention(config)
        if cross:
            self.cross_norm, self.cross_attention = norm(config), Attention(config)
        self.ffn_norm, self.ffn = norm(config), FeedForward(config)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor, bias: Tensor, states: Tensor | None = None,
                states_bias: Tensor | None = None) -> Tensor:  # fmt: skip
        keys_values = None if states is None else self.cross_attention.keys_values(states)
        return self.step(x, bias, keys_values, states_bias)

    def start(self, states: Tensor) -> list[Tensor]:
        k, v = self.cross_attention.keys_values(states)
        return [k, v, k[:, :, :0], v[:, :, :0]]

    def step(self, x: Tensor, bias: Tensor, keys_values: tuple[Tensor, Tensor] | None,
             states_bias: Tensor | None, cache: list[Tensor] | None = None) -> Tensor:  # fmt: skip
        """Also of one more token, x (B,1,D), with the cache; not compiled there, since the cache grows."""
        x = x + self.dropout(self.attention(self.attention_norm(x), bias, cache=cache))
        if keys_values is not None:
            x = x + self.dropout(self.cross_attention(self.cross_norm(x), states_bias, keys_values))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))  # (B,L,D)


class Stack(nn.Module):
    """Encoder or decoder: the blocks, and the position bias that they share."""

    def __init__(self, config: T5Config, count: int, *, decoder: bool):
        super().__init__()
        self.position = RelativeBias(config, causal=decoder)
        self.blocks = nn.ModuleList(Block(config, cross=decoder) for _ in range(count))
        self.norm, self.dropout = norm(config), nn.Dropout(0.0)

    def forward(self, x: Tensor, *context: Tensor, run: Callable[..., Tensor]) -> Tensor:
        x = self.dropout(x)
        for block in self.blocks:
            x = run(block, x, *context)
        return self.dropout(self.norm(x))  # (B,L,D)


@dataclass
class State:
    """Of a generation."""

    mask: Tensor  # (B,Ls) of the sources
    caches: list[list[Tensor]]  # of each block: keys and values of source (B,H,Ls,E), of target (B,H,t,E)
    strip: Tensor  # the position bias of all distances

    def bias(self) -> Tensor:
        """Of the next token, at distances -t ... 0: (1,H,1,t+1)."""
        t = self.caches[0][2].shape[2]  # tokens read so far
        zero = self.strip.shape[1] // 2  # where distance 0 stands
        return self.strip[:, zero - t : zero + 1][None, :, None]

    def keep(self, rows: Tensor):
        mask = self.mask[rows]
        length = int(mask.cumsum(1).argmax(1).max()) + 1  # beyond the last real token all is padding
        self.mask = mask[:, :length]
        for cache in self.caches:
            cache[:2] = (x[:, :, :length] for x in cache[:2])
            cache[:] = (x.index_select(0, rows) for x in cache)


class T5(Backbone):
    """Its dropout: embeddings, attention weights, inside the FFN, each sublayer's output, each stack's end"""

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
    unused = r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias"  # of old files

    def __init__(self, config: T5Config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, config.num_layers, decoder=False)
        self.decoder = Stack(config, config.num_decoder_layers, decoder=True)
        self.head = None if config.tied_head else nn.Linear(config.d_model, config.vocab_size, bias=False)

    blocks = property(lambda self: (*self.encoder.blocks, *self.decoder.blocks))

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Source (B,Ls), mask true (or 1) at real tokens -> encoder states (B,Ls,D)."""
        x = self.embedding(input_ids)
        bias = self.encoder.position(x.shape[1]) + padding_bias(attention_mask, x.dtype)  # (B,H,Ls,Ls)
        return self.encoder(x, bias, run=self.run)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
        """(B,Ls), (B,Ls), target so far (B,Lt) -> hidden states (B,Lt,D), which `logits` takes."""
        states, x = self.encode(input_ids, attention_mask), self.embedding(decoder_input_ids)
        # Target padding needs no mask: it comes last, so no real target position sees it.
        bias, states_bias = self.decoder.position(x.shape[1]), padding_bias(attention_mask, x.dtype)
        return self.decoder(x, bias, states, states_bias, run=self.run)

    def logits(self, hidden: Tensor) -> Tensor:
        if self.config.scale_decoder_outputs:
            hidden = hidden * self.config.d_model**-0.5
        return super().logits(hidden)

    def loss(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        # The decoder reads the labels shifted right, behind the start token.
        start = labels.new_full((len(labels), 1), self.config.decoder_start_token_id)
        shifted = torch.cat((start, labels[:, :-1]), 1)  # (B,Lt)
        shifted = shifted.masked_fill(shifted == IGNORED, self.config.pad_token_id)
        return self.cross_entropy(self.hidden(input_ids, attention_mask, shifted), labels)

    def start(self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int) -> tuple[Tensor, State]:
        states = self.encode(input_ids, attention_mask)
        caches = [block.start(states) for block in self.decoder.blocks]
        strip = self.decoder.position.strip(max_new_tokens)  # (H, 2n-1)
        first = input_ids.new_full((len(input_ids),), self.config.decoder_start_token_id)
        return first, State(attention_mask, caches, strip)

    def step(self, newest: Tensor, state: State) -> Tensor:
        x, bias = self.embedding(newest[:, None]), state.bias()  # (B,1,D), (1,H,1,t+1)
        states_bias = padding_bias(state.mask, x.dtype)
        for block, cache in zip(self.decoder.blocks, state.caches, strict=True):
            x = block.step(x, bias, (cache[0], cache[1]), states_bias, cache)
        return self.logits(self.decoder.norm(x)[:, 0])

    @classmethod
    def tidy(cls, config: T5Config, tensors: dict[str, Tensor]) -> T5Config:
        # The file decides whether there is a head of its own, not tie_word_embeddings, which transformers 5
        # writes as true for every T5.
        config = super().tidy(config, tensors)
        return replace(config, tied_head=config.tied_head and "lm_head.weight" not in tensors)
