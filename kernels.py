"""The fast form of orchmoe.mix_skills, and compilation of the blocks of a model.

`mix_skills` computes the same as orchmoe.mix_skills, which is its plain specification and has the
same signature. `compile_blocks` compiles blocks for training, with the skills in their graphs.
transformers 5.25 and later need a package of the same name, `kernels`. They find this file in its
place, and fail: give your copy of this file another name, or take an older transformers.

    orchmoe.attach(model, config, mix=kernels.mix_skills)
    kernels.compile_blocks(model.blocks)

Letters: B batch, L length, D input width, O output width, S skills, R rank.
Test: pytest tests/unit/test_kernels.py tests/unit/test_compile.py
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mix_skills(x: Tensor, y: Tensor, A: Tensor, B: Tensor, c: Tensor, scale: float) -> Tensor:
    """Return y + scale * sum_s c_s B_s A_s x, in two matrix products for all skills and samples.

    The skills are laid side by side as one LoRA of rank S R. The scale and the sum with y are part
    of the second product.

    x (B,L,D); y (B,L,O), the output of the Linear; A (S,R,D); B (S,R,O); c (B,S), or (1,S) for all
    samples, or (B,L,S) per token. Returns (B,L,O).
    """
    S, R, _ = A.shape
    if c.dim() == 2:
        c = c.unsqueeze(1)  # (B,1,S): the same for all tokens
    h = F.linear(x, A.flatten(0, 1))  # (B,L,S R): all A_s x, one skill after the other
    ch = c.unsqueeze(-1) * h.unflatten(-1, (S, R))  # (B,L,S,R): c_s A_s x
    ch = ch.reshape(-1, S * R)  # (B L,S R)
    mixed = torch.addmm(y.flatten(0, 1), ch, B.flatten(0, 1), alpha=scale)  # (B L,O)
    return mixed.view(y.shape)


# ------------------------------------------------------------------------------------ compilation


def compile_blocks(blocks: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Compile the blocks of a model for training, each as one graph. Call it after `attach`.

    The first input of a block must be x (B,L,D). Evaluation and generation stay uncompiled. A block
    that torch cannot compile raises torch's error. This changes settings of torch for the whole
    process.
    """
    # c is an attribute of a module. By default torch compiles anew for each shape of it.
    torch._dynamo.config.force_nn_module_property_static_shapes = False
    # The scale is a constant. As an input it would be a number on the CPU, with its own kernel.
    torch._dynamo.config.specialize_float = True
    # Two sizes that are equal in one batch must not be taken for the same size.
    torch.fx.experimental._config.use_duck_shape = False
    # torch makes a graph for each combination of: kind of block, one row or several, one token or
    # several in its other inputs. The default limit is 8.
    torch._dynamo.config.recompile_limit = 64
    for block in blocks:
        block.compile(dynamic=True, fullgraph=True, backend=backend)
        # nn.Module.__call__ calls this in place of forward.
        block._compiled_call_impl = partial(run_block, block, block._compiled_call_impl)


def run_block(block: nn.Module, compiled: Callable, x: Tensor, *inputs: Any, **options: Any) -> Any:
    """Return the output of a block for x (B,L,D), compiled where that is worth a graph.

    Two cases would need graphs of their own, and run uncompiled: x without a gradient, as in
    evaluation and in the first block of an adapted model, and rows of one token.
    """
    if x.requires_grad and x.shape[1] > 1:
        return compiled(x, *inputs, **options)
    return block._call_impl(x, *inputs, **options)
