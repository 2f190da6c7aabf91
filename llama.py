"""Llama 2 and 3, Mistral, Qwen2, Qwen3, SmolLM2 from scratch: they differ in LlamaConfig alone. Sources:
Touvron et al., arXiv 2302.13971; Su et al., arXiv 2104.09864 (rotary positions); Ainslie et al., arXiv
2305.13245 (grouped queries); Shazeer, arXiv 2002.05202 (SwiGLU). Test: pytest tests/test_llama.py

Dimensions: B batch, L length, D hidden_size, H heads of queries, G of keys and values, E head_dim."""

from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Backbone, Config, causal_attention


@dataclass(frozen=True)
class LlamaConfig(Config):
    """Field names are those of Hugging Face's config.json, but for `eos_ids`."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int  # of the longest row; at most the window that Mistral 0.1 looks back on
    num_key_value_heads: int
    head_dim: int
    eos_ids: tuple  # generation ends at any of them
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    factor: float = 1.0  # the four of Llama 3's scaling of the positions, see `rotation`; 1: none
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    attention_bias: bool = False  # of q, k, v and o; in Qwen2 q, k and v have one whatever this says
    tie_word_embeddings: bool = False  # the head is the embedding table

    llama3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    only = {  # other values describe other computations
        "hidden_act": ("silu",), "rope_type": ("default", "llama3"), "partial_rotary_factor": (1,),
        "mlp_bias": (False,), "use_sliding_window": (False,), "layer_types": ("full_attention",),
        "num_experts": (), "quantization_config": (), "full_attention": (),
    }  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_key_value_heads {self.num_key_value_heads} must divide heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: rotary positions turn pairs")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(f"low_freq_factor {self.low_freq_factor} must be below high_freq_factor")
        if not self.eos_ids or not all(type(i) is int and 0 <= i < self.vocab_size for i in self.eos_ids):
            raise ValueError(f"eos_token_id {self.eos_ids!r:.60} must be token ids below vocab_size")

    num_blocks = property(lambda self: self.num_hidden_layers)
    tied_head = property(lambda self: self.tie_word_embeddings)
    pad_token_id = property(lambda self: self.eos_ids[0])  # fills up `generate`'s rows; nothing reads it

    @classmethod
    def from_hf(cls, values: dict) -> "LlamaConfig":
        window = values.get("sliding_window", 4096)  # Mistral's default, as below 128 is Qwen3's
        # transformers 4: rope_theta at the top, all else in rope_scaling, which wins; 5: in rope_parameters.
        parts = [values.get(name) or {} for name in ("rope_parameters", "rope_scaling")]
        if not all(isinstance(part, dict) for part in parts):
            raise ValueError(f"rope_parameters and rope_scaling must be objects, not {parts!r:.60}")
        parts = [part | {"rope_type": part.get("rope_type") or part.get("type")} for part in parts]  # old
        rope = {name: value for part in parts for name, value in part.items() if value is not None}
        values = {**values, "rope_type": "default", **rope}
        values = {k: v for k, v in values.items() if v is not None and k not in cls.llama3}
        if values.get("rope_type") == "llama3":
            values |= {name: rope.get(name) for name in cls.llama3}
        eos, heads = values.get("eos_token_id"), values.get("num_attention_heads")
        values["eos_ids"] = tuple(eos if isinstance(eos, list) else [eos])
        config = cls.of({"num_key_value_heads": heads, "head_dim": 128} | values)
        if "head_dim" not in values and config.model_type != "qwen3":
            config = replace(config, head_dim=config.hidden_size // config.num_attention_heads)
        if config.model_type == "mistral" and window is not None:
            if type(window) is not int:
                raise ValueError(f"sliding_window must be int, not {window!r:.60}")
            config = replace(config, max_position_embeddings=min(window, config.max_position_embeddings))
        return config

    def to_hf(self) -> dict:
        values = asdict(self) | {"sliding_window": None, "hidden_act": "silu"}
        values["eos_token_id"] = list(values.pop("eos_ids"))
        numbers = {name: values.pop(name) for name in self.llama3}
        rope = {"rope_type": "default"} if self.factor == 1 else {"rope_type": "llama3", **numbers}
        values |= {"rope_scaling": rope, "rope_parameters": {"rope_theta": self.rope_theta, **rope}}
        return {"architectures": [self.model_type.capitalize() + "ForCausalLM"], **values}


# Rotary positions: numbers i and i + E/2 of a head are one point of the plane. At position p it is turned by
# the angle p f_i with f_i = theta^(-2i/E); for E = 8 and theta = 10,000:
#
#      number i + E/2                           point   numbers      f_i    a full turn in
#        |     * at p + 1                         0      0 and 4     1           6 tokens
#        |    /    * at p                         1      1 and 5     0.1        63
#        |   / f_i                                2      2 and 6     0.01      628
#        |  /  .                                  3      3 and 7     0.001   6,283
#        +--------------> number i
#
# The product of q at p and k at p' depends on p - p' alone: turning both by one angle does not change it.
def rotation(config: LlamaConfig, positions: Tensor) -> Tensor:
    """Positions p (...) -> (2,...,1,E): cos(p f_i), and sin(p f_i) with the sign that `rotate` wants."""
    i = torch.arange(config.head_dim // 2, device=positions.device)
    f = 1 / config.rope_theta ** (2 * i / config.head_dim)  # (E/2); in float32, as the weights were trained
    if config.factor != 1:
        # Points that turn less than `low` times in the context of the pretraining are slowed by `factor`,
        # those that turn more than `high` times are not, and those between are mixed.
        low, high = config.low_freq_factor, config.high_freq_factor
        turns = config.original_max_position_embeddings * f / (2 * torch.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        f = kept * f + (1 - kept) * f / config.factor
    angle = positions[..., None, None] * f  # (...,1,E/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    # (x_i, x_j) -> (x_i cos - x_j sin, x_j cos + x_i sin), j = i + E/2
    return torch.addcmul(x * turn[0], x.roll(x.shape[-1] // 2, -1), turn[1])  # (B,L,heads,E)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, E, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        H, G, bias = config.num_attention_heads, config.num_key_value_heads, config.attention_bias
        qkv_bias, normed = bias or config.model_type == "qwen2", config.model_type == "qwen3"
        self.head_dim = E
        self.q, self.k, self.v = (nn.Linear(D, heads * E, bias=qkv_bias) for heads in (H, G, G))
        self.o = nn.Linear(H * E, D, bias=bias)
        self.q_norm, self.k_norm = (nn.RMSNorm(E, eps) if normed else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, turn: Tensor, cache: Tensor | None = None,
                at: Tensor | None = None) -> Tensor:  # fmt: skip
        """x (B,L,D): whole rows, which fill the cache (2,B,columns,G,E) of keys and values if there is one;
        with at (B): one token of each row, which goes to that column and sees it and all before."""
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_dim)) for linear in (self.q, self.k, self.v))
        q, k = rotate(self.q_norm(q), turn), rotate(self.k_norm(k), turn)  # (B,L,H,E), (B,L,G,E)
        if at is None:
            if cache is not None:
                cache[0, :, : x.shape[1]], cache[1, :, : x.shape[1]] = k, v
            # Padding stands behind all real tokens: the causal mask hides it, and no other is needed.
            y = causal_attention(*(heads.transpose(1, 2) for heads in (q, k, v))).transpose(1, 2)
        else:
            rows = torch.arange(len(x), device=x.device)
            cache[0, rows, at], cache[1, rows, at] = k[:, 0], v[:, 0]
            k, v = cache.transpose(2, 3)  # (B,G,columns,E)
            seen = torch.arange(k.shape[2], device=x.device) <= at[:, None, None, None]  # (B,1,1,columns)
            # The H/G queries of one key stand where positions do, so that no key is repeated.
            q = q[:, 0].unflatten(1, (k.shape[1], -1))  # (B,G,H/G,E)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).flatten(1, 2)[:, None]  # (B,1,H,E)
        return self.o(y.flatten(2))  # (B,L,D)


class Block(nn.Module):
    entries = ("read",)  # called from outside and computes with weights, as forward

    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, inner, eps = config.hidden_size, config.intermediate_size, config.rms_norm_eps
        self.attention_norm, self.ffn_norm = nn.RMSNorm(D, eps), nn.RMSNorm(D, eps)
        self.attention = Attention(config)
        self.gate, self.up = (nn.Linear(D, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, D, bias=False)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor, *where: Tensor | None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), *where))
        h = self.ffn_norm(x)
        return x + self.dropout(self.down(F.silu(self.gate(h)) * self.up(h)))  # (B,L,D)

    read = forward  # in generation: never compiled, since rows and columns come and go


@dataclass
class State:
    """Of a generation."""

    caches: list[Tensor]  # of each block: keys and values (2,B,columns,G,E)
    at: Tensor  # (B): the column of each row's next token

    def keep(self, rows: Tensor) -> None:
        self.caches, self.at = [cache.index_select(1, rows) for cache in self.caches], self.at[rows]


class Llama(Backbone):
    """Its dropout: what attention and FFN add."""

    Config = LlamaConfig
    renames = (
        ("^embedding", "embed_tokens"), ("^blocks", "layers"), ("^(?!head)", "model."), ("^head", "lm_head"),
        ("attention_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm"),
        (r"attention\.", "self_attn."), (r"\.([qkvo])\.", r".\1_proj."),
        (r"(gate|up|down)\.", r"mlp.\1_proj."),
    )  # fmt: skip
    tables = ("model.embed_tokens.weight",)
    unused = r"rotary_emb\.inv_freq$"  # of the first files; follows from the config

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        D, V, self.longest = config.hidden_size, config.vocab_size, config.max_position_embeddings
        self.embedding = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(D, config.rms_norm_eps)
        self.head = None if config.tie_word_embeddings else nn.Linear(D, V, bias=False)

    def hidden(self, ids: Tensor, caches: list[Tensor] | None = None, at: Tensor | None = None) -> Tensor:
        """Whole rows (B,L), or with at (B) a token of each (B,1) -> hidden states (B,L,D); see Attention."""
        x = self.embedding(ids)  # (B,L,D)
        positions = torch.arange(ids.shape[1], device=ids.device) if at is None else at[:, None]
        turn = rotation(self.config, positions).to(x.dtype)  # (2,L,1,E) or (2,B,1,1,E)
        for n, block in enumerate(self.blocks):
            x = self.run(block, x, turn) if caches is None else block.read(x, turn, caches[n], at)
        return self.norm(x)

    def loss(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        ids, labels = self.pack(input_ids, attention_mask, labels)
        return self.cross_entropy(self.hidden(ids[:, :-1]), labels[:, 1:])  # each token predicts the next

    def start(self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int) -> tuple[Tensor, State]:
        ids, _ = self.pack(input_ids, attention_mask, input_ids[:, :0], more := max_new_tokens - 1)
        # Zeros: a column that is not seen yet enters the sum of values with weight 0, and 0 times NaN is NaN.
        shape = 2, len(ids), ids.shape[1] + more, self.config.num_key_value_heads, self.config.head_dim
        caches = [self.embedding.weight.new_zeros(shape) for _ in self.blocks]
        self.hidden(ids, caches)
        last = attention_mask.bool().sum(1) - 1  # (B); the first step reads it once more, for its logits
        return ids.gather(1, last[:, None])[:, 0], State(caches, last)

    def step(self, newest: Tensor, state: State) -> Tensor:
        columns = int(state.at.max()) + 1  # beyond them no row has read anything
        hidden = self.hidden(newest[:, None], [cache[:, :, :columns] for cache in state.caches], state.at)
        state.at = state.at + 1
        return self.logits(hidden[:, 0])  # (B,V)
