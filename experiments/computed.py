"""Compute what a training step needs at sizes that this machine cannot hold: a table in Markdown.

The step runs on FakeTensors, which have shapes but no values. Each operation of torch is counted:

- operations: those of matrix products and attention, by torch.utils.flop_counter;
- bytes moved: every operation reads its inputs and writes its outputs once, without compilation;
- peak: all tensors that exist at one time, with weights, gradients and the moments of AdamW;
- least time on an H100: of the operations alone, and of the bytes alone.

With 4-bit weights, the Linears of the blocks take half a byte per weight, and one of them at a time
exists in bfloat16. The operations and bytes that unpack them are not counted.

    python -m experiments.computed > experiments/results/computed.md

Letters: B rows, Ls source length, Lt target length.
Test: pytest tests/experiments/test_computed.py
"""

import itertools
import weakref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import checkpoint
from baselines import attach_method
from experiments.compare.tables import table
from llama import LlamaConfig
from model import Backbone, Config
from orchmoe import OrchMoEConfig
from support import program
from t5 import T5Config

B, LS, LT = 8, 512, 128
FLOP_RATE = 989e12  # of an H100 in bfloat16, per second
BYTE_RATE = 3.35e12
TITLE = (
    f"Computed by `python -m experiments.computed`: a step of {B} rows of {LS} source and {LT} "
    "target tokens, the base in bfloat16, with the default adapters or a LoRA of the same rank S R."
)
HEAD = "model,method,checkpoint blocks,TFLOP,GB moved,peak GB,ms for FLOP,ms for bytes"
FOUR_BITS = "Qwen3-8B with 4-bit weights"


def t5_config(width: int, feed_forward: int, blocks: int, heads: int) -> T5Config:
    """Return a T5 v1.1 of this size."""
    return T5Config(
        vocab_size=32128,
        d_model=width,
        d_kv=64,
        d_ff=feed_forward,
        num_layers=blocks,
        num_decoder_layers=blocks,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        scale_decoder_outputs=False,
        tied_head=False,
    )


# Sizes of a decoder: vocabulary, width, feed-forward, blocks, heads of queries, longest row, heads
# of keys, width of a head, EOS.
MODELS = {
    "T5-base": t5_config(768, 2048, 12, 12),
    "T5-XL": t5_config(2048, 5120, 24, 32),
    "T5-XXL": t5_config(4096, 10240, 24, 64),
    "Llama-3.2-1B": LlamaConfig(
        "llama", 128256, 2048, 8192, 16, 32, 640, 8, 64, (0,), tie_word_embeddings=True
    ),
    "Qwen2.5-7B": LlamaConfig("qwen2", 152064, 3584, 18944, 28, 28, 640, 4, 128, (0,)),
    FOUR_BITS: LlamaConfig("qwen3", 151936, 4096, 12288, 36, 32, 640, 8, 128, (0,)),
}

aten = torch.ops.aten
FLOPS = dict(flop_registry)
FLOPS[aten.addmm_] = FLOPS[aten.addmm]
for direction in ("", "_backward"):  # attention on the CPU, which the FakeTensors are on
    name = "_scaled_dot_product_flash_attention"
    on_cpu = getattr(aten, f"{name}_for_cpu{direction}")
    FLOPS[on_cpu] = FLOPS[getattr(aten, name + direction)]


class Counter(TorchDispatchMode):
    """Count what the operations within a `with` block compute, move and hold."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.bytes = 0
        self.held: dict[int, int] = {}  # bytes of each storage that exists, by its address
        self.total = 0  # the sum of these
        self.peak = 0

    def hold(self, tensor: Tensor) -> None:
        """Count the memory of a tensor until nothing refers to it any more."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.held:
            self.held[key] = storage.nbytes()
            self.total += storage.nbytes()
            self.peak = max(self.peak, self.total)
            weakref.finalize(storage, self.release, key)

    def release(self, key: int) -> None:
        self.total -= self.held.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function._overloadpacket in FLOPS:
            self.operations += FLOPS[function._overloadpacket](*args, **kwargs, out_val=result)
        read = [item for item in tree_leaves((args, kwargs)) if isinstance(item, Tensor)]
        written = [item for item in tree_leaves(result) if isinstance(item, Tensor)]
        if written and not function.is_view and function is not aten._unsafe_view.default:
            self.bytes += sum(tensor.nbytes for tensor in read + written)
        for tensor in written:
            self.hold(tensor)
        return result


def fix_lengths(base: Backbone, length: int) -> None:
    """Replace the methods of `base` that look at values, which FakeTensors do not have.

    The loss stays the same for rows without padding and targets (B,Lt) of this length.
    """

    def pack(source: Tensor, mask: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        ids = torch.cat((source, target), 1)  # (B,Ls+Lt)
        return ids, ids

    def cross_entropy(hidden: Tensor, labels: Tensor, per_row: bool) -> Tensor:
        assert not per_row  # only evaluation asks for the loss of each row
        logits = base.logits(hidden[:, -length:]).flatten(0, 1).float()  # (B Lt,V)
        return F.cross_entropy(logits, labels[:, -length:].flatten(), reduction="sum")

    base.pack = pack  # only a decoder has this method
    base.cross_entropy = cross_entropy


def allocate(base: Backbone, dtype: torch.dtype, device: str = "cpu") -> None:
    """Replace the weights and buffers of `base`, which are on meta, by new ones on the device.

    Frozen weights are in `dtype`. Those that train are in float32, and so are the buffers.
    """
    for module in base.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            trains = weight.requires_grad
            weight_dtype = torch.float32 if trains else dtype
            weight = torch.empty(weight.shape, dtype=weight_dtype, device=device)
            setattr(module, name, nn.Parameter(weight, requires_grad=trains))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, device=device))


def count_step(
    shape: Config, method: str, checkpoint_blocks: bool, rows: int = B, dtype=torch.bfloat16
) -> tuple[Counter, int]:
    """Return the counts of a training step of default adapters, and the bytes held before it.

    shape: config of the base. dtype: of its weights.
    """
    base = checkpoint.on_meta(shape)
    fix_lengths(base, LT)
    with torch.device("meta"):
        adapters = attach_method(method, base, OrchMoEConfig())
    base.train()
    base.checkpoint_blocks = checkpoint_blocks
    counter = Counter()
    with FakeTensorMode(), counter:
        allocate(base, dtype)
        moments = []  # of AdamW
        for weight in base.parameters():
            if weight.requires_grad:
                moments.append(torch.zeros(2, *weight.shape))

        source = torch.zeros(rows, LS, dtype=torch.long)
        target = torch.zeros(rows, LT, dtype=torch.long)
        mask = torch.ones(rows, LS, dtype=torch.bool)
        before = counter.total
        counter.operations = counter.bytes = 0
        with adapters.routed(base.embed(source), mask):
            base.loss(source, mask, target).backward()
    return counter, before


def main() -> None:
    program.read_flags(__doc__)
    rows = []
    for model, method, blocks in itertools.product(MODELS, ("orchmoe", "lora"), ("no", "yes")):
        count, _ = count_step(MODELS[model], method, blocks == "yes")
        peak = count.peak
        if model == FOUR_BITS:
            weights = checkpoint.on_meta(MODELS[model]).blocks.parameters()
            sizes = [weight.numel() for weight in weights]
            peak += 2 * max(sizes) - 1.5 * sum(sizes)
        figures = [count.operations / 1e12, count.bytes / 1e9, peak / 1e9]
        figures += [1e3 * count.operations / FLOP_RATE, 1e3 * count.bytes / BYTE_RATE]
        rows.append([model, method, blocks, *(f"{figure:.1f}" for figure in figures)])
    program.print_line(f"{TITLE}\n\n{table(HEAD.split(','), rows)}")


if __name__ == "__main__":
    program.run_program(main)
