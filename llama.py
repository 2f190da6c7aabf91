"""Llama 2 and 3, Mistral, Qwen2, Qwen3 and SmolLM2 from scratch. They differ only in LlamaConfig.

Sources: Touvron et al., arXiv 2302.13971; Su et al., arXiv 2104.09864 (rotary positions); Ainslie
et al., arXiv 2305.13245 (grouped queries); Shazeer, arXiv 2002.05202 (SwiGLU).

Letters: B batch, L length, D hidden_size, H heads of queries, G heads of keys and values,
E head_dim, V vocabulary.
Test: pytest tests/unit/test_llama.py tests/parity/test_transformers.py
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import IGNORED, Backbone, Config, aligned, to_device

# The numbers of Llama 3's way to scale positions, see `rotation`.
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class LlamaConfig(Config):
    """Fields are named as in Hugging Face's config.json, except `eos_ids`."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int  # tokens of the longest row; for Mistral 0.1, of its window
    num_key_value_heads: int
    head_dim: int
    eos_ids: tuple[int, ...]  # generation ends at any of them
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    factor: float = 1.0  # 1: no scaling of positions
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    attention_bias: bool = False  # q, k, v and o have a bias; in Qwen2 q, k and v always have one
    tie_word_embeddings: bool = False  # the head is the embedding table

    only = {
        "hidden_act": ("silu",),
        "rope_type": ("default", "llama3"),
        "partial_rotary_factor": (1,),
        "mlp_bias": (False,),
        "is_causal": (True,),
        "use_sliding_window": (False,),
        "layer_types": ("full_attention",),
        "num_experts": (),
        "quantization_config": (),
        "full_attention": (),  # a name that rope_parameters has if they differ between blocks
    }

    @property
    def num_blocks(self) -> int:
        return self.num_hidden_layers

    @property
    def tied_head(self) -> bool:
        return self.tie_word_embeddings

    @property
    def pad_token_id(self) -> int:
        return self.eos_ids[0]  # only `generate` writes it, after the end of a row

    @classmethod
    def from_hf(cls, values: dict) -> "LlamaConfig":
        """Return the config that the values of a config.json describe."""
        known = read_rope(values)
        for name, value in values.items():
            if value is not None and name not in LLAMA3:  # these count only in the rope settings
                known.setdefault(name, value)

        heads = known["num_attention_heads"]
        known.setdefault("num_key_value_heads", heads)
        if known["model_type"] == "qwen3":
            known.setdefault("head_dim", 128)
        known.setdefault("head_dim", known["hidden_size"] // heads)

        eos = known["eos_token_id"]
        if not isinstance(eos, list):
            eos = [eos]
        known["eos_ids"] = tuple(eos)

        # A token of Mistral 0.1 sees a window of the last positions. We accept only rows that are
        # no longer than the window, so that it makes no difference. null means no window; if it is
        # missing, transformers takes 4096.
        window = values.get("sliding_window", 4096)
        if known["model_type"] == "mistral" and window is not None:
            longest = min(window, known["max_position_embeddings"])
            known["max_position_embeddings"] = longest
        return cls.of(known)


def read_rope(values: dict) -> dict:
    """Return the rope settings among the values of a config.json, by the names of LlamaConfig.

    transformers 4 writes rope_theta beside all other values and the rest to `rope_scaling`;
    transformers 5 writes everything to `rope_parameters`. If a file has both, rope_scaling counts.
    """
    rope = {"rope_type": "default"}
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    for key, value in given.items():
        if key == "type":  # in old files
            key = "rope_type"
        if value is not None:
            rope[key] = value

    scaling = {name: rope.pop(name, None) for name in LLAMA3}
    if rope["rope_type"] == "llama3":
        rope |= scaling  # no other type uses these numbers
    return rope


# Rotary positions. Components i and i + E/2 of a head are the coordinates of point i in a plane. At
# position p this point is turned by the angle p f_i, where f_i = theta^(-2i/E).
#
#     component i + E/2
#       |     * at p + 1             For E = 8 and theta = 10,000:
#       |    /
#       |   /     * at p             point i   components   f_i     positions in a full turn
#       |  /   /                        0       0 and 4     1             6
#       | / /  <- angle f_i             1       1 and 5     0.1          63
#       |//                             2       2 and 6     0.01        628
#       +-----------> component i       3       3 and 7     0.001     6,283
#
# Turning q and k by the same angle does not change their product. So the product of q at position p
# and k at position p' depends only on p - p'.


def rotation(config: LlamaConfig, positions: Tensor) -> Tensor:
    """Return cos(p f_i) and sin(p f_i) for `rotate`, (2,...,1,E), given positions p (...).

    Each value stands twice along E. The first half of the sines is negated, as `rotate` needs.
    """
    i = torch.arange(config.head_dim // 2, device=positions.device)
    f = 1 / config.rope_theta ** (2 * i / config.head_dim)  # (E/2); float32, as in pretraining
    if config.factor != 1:
        # Llama 3 counts the turns of each point in the context length of its pretraining. Below
        # `low` turns a point is slowed down by `factor`, above `high` not at all, between in part.
        low = config.low_freq_factor
        high = config.high_freq_factor
        turns = config.original_max_position_embeddings * f / (2 * torch.pi)
        unscaled = ((turns - low) / (high - low)).clamp(0, 1)
        f = unscaled * f + (1 - unscaled) * f / config.factor

    angle = positions[..., None, None] * f  # (...,1,E/2)
    cos = angle.cos()
    sin = angle.sin()
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Return x (B,L,heads,E) with every point turned; `turn` is what `rotation` returns.

    With j = i + E/2: (x_i, x_j) -> (x_i cos - x_j sin, x_j cos + x_i sin).
    """
    cos, sin = turn
    other = x.roll(x.shape[-1] // 2, -1)  # x_j at i, and x_i at j
    return torch.addcmul(x * cos, other, sin)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, large_scores: bool) -> Tensor:
    """Return the output of attention (B,H,L,E) where a query sees no later positions than its own.

    q (B,H,L,E); k and v (B,G,L,E). H / G neighbouring heads of q share one head of k and v.
    large_scores: scores may be in the tens or hundreds, where bfloat16 rounds them too much.
    """
    H, L, E = q.shape[1:]
    if q.device.type != "cpu" and q.dtype == torch.float32 and k.shape[1] < H:
        # In float32 no fused attention of CUDA shares heads, and torch would store (B,H,L,L).
        k = k.repeat_interleave(H // k.shape[1], dim=1)
        v = v.repeat_interleave(H // v.shape[1], dim=1)
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or L > 256 or large_scores:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    # The same, written out, but with scores in bfloat16: for short rows on a CPU, torch's function
    # takes twice as long, mostly in its backward. Heads of q that share a head of k are put below
    # one another.
    future = q.new_full((L, L), -torch.inf).triu(1).repeat(H // k.shape[1], 1)  # (HL/G,L)
    q = (q * E**-0.5).reshape(-1, len(future), E)  # (BG,HL/G,E)
    scores = torch.baddbmm(future, q, k.flatten(0, 1).mT)  # (BG,HL/G,L)
    y = scores.softmax(-1) @ v.flatten(0, 1)  # (BG,HL/G,E)
    return y.view(-1, H, L, E)


def cached_attention(q: Tensor, cache: Tensor, bias: Tensor) -> Tensor:
    """Return the output of attention (B,1,H,E) where a query sees the columns that `bias` allows.

    q (B,1,H,E); cache (2,B,columns,G,E): keys and values; bias (B,1,1,columns).
    """
    k, v = cache.transpose(2, 3)  # (B,G,columns,E)
    # The H/G queries of one key head take the place of the positions, so no key is repeated.
    q = q[:, 0].unflatten(1, (k.shape[1], -1))  # (B,G,H/G,E)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # (B,G,H/G,E)
    return y.flatten(1, 2)[:, None]


# Generation caches the keys and values of all tokens that were read, (2,B,columns,G,E). Rows have
# their padding at the end, so the position of a token is also its column in the cache:
#
#     column    0  1  2  3  4  5
#     row 0     a  b  c  d  .  .    its next token has position 4
#     row 1     e  f  .  .  .  .    its next token has position 2
#
# So attention is called in three ways:
#
#                            x                        cache             position and bias
#     training               whole rows               none              none
#     start of generation    whole rows (sources)     gets their tokens none
#     step of generation     one token of each row    gets that token   (B), of that token
#
# The first step reads the last token of each source once more (d at position 3), for its logits.
# The bias (B,1,1,columns) hides the columns after that token from it.
# The start also writes padding to the cache. A row overwrites it before it sees these columns.


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        D = config.hidden_size
        H = config.num_attention_heads
        G = config.num_key_value_heads
        E = config.head_dim
        self.head_dim = E

        bias = config.attention_bias or config.model_type == "qwen2"
        self.q = nn.Linear(D, H * E, bias=bias)
        self.k = nn.Linear(D, G * E, bias=bias)
        self.v = nn.Linear(D, G * E, bias=bias)
        self.o = nn.Linear(H * E, D, bias=config.attention_bias)
        # The biases of Qwen2, and the weights of Qwen3's norms, make them large.
        self.large_scores = bias or config.model_type == "qwen3"

        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()
        if config.model_type == "qwen3":
            self.q_norm = nn.RMSNorm(E, config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(E, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        turn: Tensor,
        cache: Tensor | None = None,
        position: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Return the output of attention (B,L,D) for x (B,L,D), in one of the three ways above."""
        L = x.shape[1]
        q = self.q(x).unflatten(-1, (-1, self.head_dim))  # (B,L,H,E)
        k = self.k(x).unflatten(-1, (-1, self.head_dim))  # (B,L,G,E)
        v = self.v(x).unflatten(-1, (-1, self.head_dim))
        q = rotate(self.q_norm(q), turn)
        k = rotate(self.k_norm(k), turn)

        if position is None:
            if cache is not None:
                cache[0, :, :L] = k
                cache[1, :, :L] = v
            # Padding comes after the real tokens of a row, so the causal mask hides it from them.
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            y = causal_attention(q, k, v, self.large_scores).transpose(1, 2)  # (B,L,H,E)
        else:
            rows = torch.arange(len(x), device=x.device)
            cache[0, rows, position] = k[:, 0]
            # Under autocast v has a lower dtype than the cache. `rotate` has raised that of k.
            cache[1, rows, position] = v[:, 0].to(cache.dtype)
            y = cached_attention(q, cache, bias)  # (B,1,H,E)
        return self.o(y.flatten(2))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        D = config.hidden_size
        inner = config.intermediate_size
        self.attention_norm = nn.RMSNorm(D, config.rms_norm_eps)
        self.ffn_norm = nn.RMSNorm(D, config.rms_norm_eps)
        self.attention = Attention(config)
        self.gate = nn.Linear(D, inner, bias=False)
        self.up = nn.Linear(D, inner, bias=False)
        self.down = nn.Linear(inner, D, bias=False)

    def forward(self, x: Tensor, *context: Tensor | None) -> Tensor:
        """Return the output (B,L,D). `context` goes to the attention: turn, cache and so on."""
        x = x + self.attention(self.attention_norm(x), *context)
        h = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


@dataclass
class State:
    """The state of `generate` between two tokens."""

    caches: list[Tensor]  # of each block: keys and values (2,B,columns,G,E)
    position: Tensor  # (B), of the next token that each row reads

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self.caches = [cache.index_select(1, rows) for cache in self.caches]
        self.position = self.position[rows]


class Llama(Backbone):
    Config = LlamaConfig
    renames = (
        (r"^embedding", "embed_tokens"),
        (r"^blocks", "layers"),
        (r"^(?!head)", "model."),
        (r"^head", "lm_head"),
        (r"attention_norm", "input_layernorm"),
        (r"ffn_norm", "post_attention_layernorm"),
        (r"attention\.", "self_attn."),
        (r"\.([qkvo])\.", r".\1_proj."),
        (r"(gate|up|down)\.", r"mlp.\1_proj."),
    )
    tables = ("model.embed_tokens.weight",)
    unused = r"rotary_emb\.inv_freq$"  # files of the first models have it; the config implies it

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.longest = config.max_position_embeddings
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = None
        if not config.tie_word_embeddings:
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def pack(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return tokens (B,L) and labels (B,L): each source directly followed by its target.

        input_ids (B,Ls): sources; labels (B,Lt): targets. All padding is moved to the end of the
        rows. The new labels are -100 everywhere but on the target. Each row must have a source.
        """
        ids = torch.cat((input_ids, labels), 1)  # (B,Ls+Lt)
        real = torch.cat((attention_mask.bool(), labels != IGNORED), 1)
        length = int(real.sum(1).max())

        # Move the real tokens to the front. A stable sort leaves them in their order.
        order = (~real).byte().argsort(dim=1, stable=True)[:, :length]  # (B,L)
        ids = ids.gather(1, order)
        real = real.gather(1, order)
        in_target = real & (order >= input_ids.shape[1])
        return ids.masked_fill(~real, 0), ids.masked_fill(~in_target, IGNORED)

    def hidden(
        self, ids: Tensor, caches: list[Tensor] | None = None, position: Tensor | None = None
    ) -> Tensor:
        """Return the hidden states (B,L,D) that `logits` takes.

        ids: whole rows (B,L), or with `position` (B) one token of each row (B,1); see Attention.
        Raise ValueError for rows that the model has not enough positions for.
        """
        x = self.embedding(ids)
        bias = None
        if position is None:
            self.require_positions(ids.shape[1])
            positions = torch.arange(ids.shape[1], device=ids.device)  # (L)
        else:
            positions = position[:, None]  # (B,1)
            columns = torch.arange(caches[0].shape[2], device=ids.device)
            bias = x.new_zeros(len(ids), len(columns)).masked_fill(columns > positions, -torch.inf)
            bias = aligned(bias[:, None, None])  # (B,1,1,columns)
        turn = rotation(self.config, positions).to(x.dtype)

        for n, block in enumerate(self.blocks):
            if caches is None:
                x = self.run_block(block, x, turn)
            else:
                x = block(x, turn, caches[n], position, bias)
        return self.norm(x)

    def require_positions(self, count: int) -> None:
        """Raise ValueError if a row needs more positions than the model has."""
        if count > self.longest:
            raise ValueError(f"a row needs {count} positions, but the model has {self.longest}")

    def loss(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, *, per_row: bool = False
    ) -> Tensor:
        ids, labels = self.pack(input_ids, attention_mask, labels)
        hidden = self.hidden(to_device(ids[:, :-1], self.device))
        return self.cross_entropy(hidden, labels[:, 1:], per_row)  # each token predicts the next

    def start(
        self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int
    ) -> tuple[Tensor, State]:
        ids, _ = self.pack(input_ids, attention_mask, input_ids[:, :0])
        columns = ids.shape[1] + max_new_tokens - 1  # the last token is not read
        self.require_positions(columns)

        # Zeros: columns that are not seen enter a sum with weight 0, and 0 times NaN is NaN.
        shape = (2, len(ids), columns, self.config.num_key_value_heads, self.config.head_dim)
        caches = [self.embedding.weight.new_zeros(shape) for _ in self.blocks]
        self.hidden(ids, caches)

        # The first step reads the last token of each source once more, for its logits.
        last = attention_mask.bool().sum(1) - 1  # (B)
        return ids.gather(1, last[:, None])[:, 0], State(caches, position=last)

    def step(self, newest: Tensor, state: State) -> Tensor:
        columns = int(state.position.max()) + 1  # no row has read anything beyond
        caches = [cache[:, :, :columns] for cache in state.caches]  # views, which blocks write to
        hidden = self.hidden(newest[:, None], caches, state.position)  # (B,1,D)
        state.position = state.position + 1
        return self.logits(hidden[:, 0])
