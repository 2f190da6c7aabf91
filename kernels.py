"""The fast form of orchmoe.mix_skills, a mix by heads, and compilation.

`mix_skills` computes the same as orchmoe.mix_skills, which is its plain specification and has the
same signature. It treats a frozen Linear and its skills as one function with its own backward.
`mix_heads` mixes the factors of the skills in each of several heads (MHR).
`compile_blocks` compiles the blocks of a model for training, with the skills in their graphs.
Where Hugging Face's package `kernels` is installed, give your copy of this file another name.
Otherwise transformers imports it in place of the package, and fails.

    orchmoe.attach(model, config, mix=kernels.mix_skills)
    kernels.compile_blocks(model.blocks)

Letters: B batch, L length, D input width, O output width, S skills, R rank, H heads, M = B L,
P and Q any sizes.
Test: pytest tests/unit/test_kernels.py tests/unit/test_compile.py
"""

import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return scale * a b (M,Q), for a (M,P) and b (P,Q). Uncompiled it is one launch."""
    if scale == 1:
        return a @ b
    if torch.compiler.is_compiling():
        return scale * (a @ b)  # Inductor may split addmm, and would then read `unread`
    unread = a.new_empty(a.shape[0], b.shape[1])  # with beta = 0 its content is ignored
    return torch.addmm(unread, a, b, beta=0, alpha=scale)


def add_product(y: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return y + scale * a b (M,Q), for a (M,P) and b (P,Q). It may overwrite y (M,Q)."""
    if torch.compiler.is_compiling():
        # In compiled code an addition in place would first copy y. The compiler makes this one a
        # part of another kernel. It is not torch.add(y, a @ b, alpha=scale), whose alpha Inductor
        # of torch 2.13 drops.
        return y + scale * (a @ b)
    return y.addmm_(a, b, alpha=scale)


class _LinearWithSkills(torch.autograd.Function):
    """y = x W0^T + b + scale * hc B, where h = x A^T and hc = h * c.

    A and B are used as (SR,D) and (SR,O), with the factors of all skills below one another. So two
    products serve all skills and nothing of shape (M,S,O) exists.

    Why this is a function of its own: autograd would compute the same numbers in more launches.
    Here the second term of y (and of dx) is added in place, and the scale is a part of a product.
    W0 and b are frozen and get no gradient.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        c: Tensor,
        scale: float,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        """Return y (M,O).

        The caller makes (B,L,O) of it: autograd forbids in-place changes of a view that a Function
        returns.
        x (B,L,D); A (S,R,D); B (S,R,O); c (B or 1,S) or (B or 1,L,S), in any dtype; weight (O,D)
        and bias (O), in x's dtype.
        """
        ctx.scale = scale
        ctx.by_skill = (*x.shape[:2], *A.shape[:2])  # (B,L,S,R)
        ctx.shape_of_c = c.shape
        ctx.dtypes = A.dtype, B.dtype
        # The skills are cast to x's dtype, never x to theirs.
        x = x.flatten(0, 1)  # (M,D)
        A = A.flatten(0, 1).to(x.dtype)  # (SR,D)
        B = B.flatten(0, 1).to(x.dtype)  # (SR,O)

        if c.dim() == 2:
            c = c.unsqueeze(1)  # (B,1,S): the same for all tokens of a sample
        c = c.unsqueeze(-1)  # (B or 1, L or 1, S, 1): the same for the R columns of a skill

        h = x @ A.T  # (M,SR)
        hc = torch.empty_like(h)  # (M,SR)
        # `out` rounds to x's dtype, even if c is float32.
        torch.mul(h.view(ctx.by_skill), c, out=hc.view(ctx.by_skill))
        if weight is None:
            y = scaled_product(hc, B, scale)  # (M,O)
        else:
            y = add_product(F.linear(x, weight, bias), hc, B, scale)

        ctx.save_for_backward(x, A, B, c, h, hc, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        """Return the gradients of forward's arguments, given that of y (M,O).

        It computes in the dtype of forward, whatever autocast says now.
        """
        if autocast_dtype(dy.device) is None:
            return _gradients(ctx, dy)
        with torch.autocast(dy.device.type, enabled=False):
            return _gradients(ctx, dy)


def _gradients(ctx, dy):
    x, A, B, c, h, hc, weight = ctx.saved_tensors
    needs_x, needs_A, needs_B, needs_c, *_ = ctx.needs_input_grad
    A_dtype, B_dtype = ctx.dtypes
    batch, length, S, R = ctx.by_skill
    dx = None
    dA = None
    dB = None
    dc = None

    # y = x W0^T + b + scale * hc B
    if needs_B:
        dB = scaled_product(hc.T, dy, ctx.scale)  # (SR,O)
        dB = dB.to(B_dtype).view(S, R, dB.shape[1])

    # hc = h * c
    if needs_x or needs_A or needs_c:
        dhc = scaled_product(dy, B.T, ctx.scale)  # (M,SR)
        if needs_c:
            dc = (dhc * h).view(ctx.by_skill)
            # Sum over R (axis 3), and over B or L where all samples or all tokens share c.
            summed = [3]
            for axis in (0, 1):
                if c.shape[axis] == 1:
                    summed.append(axis)
            dc = dc.sum(summed, keepdim=True, dtype=c.dtype).view(ctx.shape_of_c)
        dhc.view(ctx.by_skill).mul_(c)
        dh = dhc  # (M,SR), computed in place

    # h = x A^T
    if needs_A:
        dA = dh.T @ x  # (SR,D)
        dA = dA.to(A_dtype).view(S, R, dA.shape[1])
    if needs_x:
        if weight is None:
            dx = dh @ A  # (M,D)
        else:
            dx = add_product(dy @ weight, dh, A, scale=1)
        dx = dx.view(batch, length, dx.shape[1])
    return dx, dA, dB, dc, None, None, None


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype to which autocast casts on this device, None if it is off."""
    # torch has no autocast for meta. Before 2.12 it cannot trace torch.amp.is_autocast_available.
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def mix_skills(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    c: Tensor,
    scale: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return weight x + bias + scale * sum_s c_s B_s A_s x: the outputs of the skills are mixed.

    x (B,L,D); A (S,R,D); B (S,R,O); c (B,S), (1,S) or (B,L,S) -> (B,L,O) in x's dtype,
    or that of autocast.
    Without `weight` (O,D) the result is only the sum over the skills. weight and bias are frozen
    and get no gradient. Backward keeps x and 2 M S R numbers; there is no second derivative.
    """
    # Autocast casts the inputs of single operations. This is one function, so it casts them here.
    dtype = autocast_dtype(x.device)
    if dtype is not None and x.dtype != torch.float64:  # autocast leaves float64 alone
        x = x.to(dtype)
        if weight is not None:
            weight = weight.to(dtype)
        if bias is not None:
            bias = bias.to(dtype)

    c = c.to(x.device)  # a large base may be spread over several devices
    y = _LinearWithSkills.apply(x, A, B, c, scale, weight, bias)  # (M,O)
    return y.view(*x.shape[:2], y.shape[1])


def mix_heads(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    c: Tensor,
    scale: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return weight x + bias + scale * (sum_s c_s B_s) (sum_s c_s A_s) x with a c for each head.

    Head h mixes its part of A, which reads D/H inputs, and its part of B, which writes O/H outputs.
    With one head it computes the same as orchmoe.mix_factors.

    x (B,L,D); A (S,R,D); B (S,R,O); c (B,H,S), or (1,H,S) for all samples -> (B,L,O) in x's dtype.
    Source: Caccia et al. 2023, arXiv 2211.03831.
    """
    S, R, _ = A.shape
    H = c.shape[1]
    c = c.to(x)
    A = A.to(x.dtype).view(S, R, H, -1)  # (S,R,H,D/H)
    B = B.to(x.dtype).view(S, R, H, -1)  # (S,R,H,O/H)
    A_mix = torch.einsum("bhs,srhd->brhd", c, A).flatten(2)  # (B,R,D)
    B_mix = torch.einsum("bhs,srho->brho", c, B).flatten(2)  # (B,R,O)

    h = x @ A_mix.mT  # (B,L,R)
    mixed = (h * scale) @ B_mix  # (B,L,O)
    if weight is None:
        return mixed
    return F.linear(x, weight, bias).add_(mixed)


# ------------------------------------------------------------------------------------ compilation

# `compile_blocks` hands every call of a block to one BlockCompiler. A call runs compiled if
#   1. `compiles_well` says that its inputs are worth a graph,
#   2. no block of this model has failed to compile so far, or this one has run compiled, and
#   3. torch can compile it. If not, all blocks that have not run compiled stay uncompiled.
# Otherwise the block runs as it is. `BlockCompiler.call` is these three steps.


def compile_blocks(blocks: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Compile the blocks of a model for training, each as one graph. Call it after `attach`.

    The first input of a block must be x (B,L,D). A call runs uncompiled if another input has three
    dimensions, of which the second is 1. Evaluation and generation stay uncompiled. If torch cannot
    compile a block, training goes on uncompiled after one warning. Copies of the model are not
    compiled. Settings of torch change only while a compiled block runs.
    """
    compiler = BlockCompiler(backend)
    for block in blocks:
        # nn.Module.__call__ calls this in place of _call_impl. nn.Module.compile sets it, too.
        block._compiled_call_impl = partial(compiler.call, block)


def compiles_well(values: Sequence[Any]) -> bool:
    """Return whether a block runs compiled, given its inputs: x (B,L,D) first, then its context.

    torch makes a graph for each combination of: kind of block, one row or several, one token or
    several, with or without gradients. Two cases run uncompiled: rows of one token, and x without a
    gradient, as in evaluation and in the first block of an adapted model. That leaves two graphs
    for each kind, for one row and for several.
    """
    tensors = [value for value in values if isinstance(value, Tensor)]
    lengths = [tensor.shape[1] for tensor in tensors if tensor.dim() == 3]
    return len(lengths) > 0 and tensors[0].requires_grad and min(lengths) > 1


def reason_not_to_compile(values: Sequence[Any]) -> str:
    """Return why a block with these inputs must not be compiled, or ""."""
    for value in values:
        if hasattr(value, "get_seq_length"):  # a cache of transformers
            # Each block writes to its own part of the cache, so each would need a graph.
            return f"a block got a {type(value).__name__}; call the model with use_cache=False"
    return ""


class BlockCompiler:
    """Run the blocks of one model compiled, until torch cannot compile one."""

    def __init__(self, backend: str):
        self.compiled = torch.compile(
            lambda block, *inputs, **options: block._call_impl(*inputs, **options),
            dynamic=True,
            fullgraph=True,
            backend=backend,
        )
        # Settings of torch that hold only during compiled calls. Other code keeps its own.
        # Two sizes that are equal in one batch must not be taken for the same size.
        self.different_sizes = torch.fx.experimental._config.patch(use_duck_shape=False)
        # A float, such as the scale, is a constant. As an input it would be computed on the CPU.
        self.constant_floats = torch._dynamo.config.patch(specialize_float=True)
        # Backward is compiled at once, so that its errors are met in `call`, too.
        self.early_backward = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)

        self.has_failed = False
        # The blocks that ran compiled. They stay so even if another fails: checkpointing runs them
        # again in the backward pass, and must get the same tensors.
        self.have_run = set()

    def call(self, block: nn.Module, *inputs: Any, **options: Any) -> Any:
        """Return the output of a block, compiled if that is possible."""
        # 1. Is this call worth a graph?  2. Has no block failed, or did this one run compiled?
        values = [*inputs, *options.values()]
        may_compile = not self.has_failed or block in self.have_run
        if not (may_compile and compiles_well(values)):
            return block._call_impl(*inputs, **options)

        # 3. Can torch compile it?
        reason = reason_not_to_compile(values)
        if not reason:
            errors = torch._dynamo.exc
            try:
                with self.different_sizes, self.constant_floats, self.early_backward:
                    output = self.compiled(block, *inputs, **options)
                self.have_run.add(block)
                return output
            except (errors.TorchDynamoException, errors.FailOnRecompileLimitHit) as error:
                reason = repr(error)

        output = block._call_impl(*inputs, **options)  # raises what is an error of the block itself
        if not self.has_failed:
            warnings.warn(f"no further blocks are compiled: {reason:.300}", stacklevel=2)
        self.has_failed = True
        self.have_run.discard(block)
        return output
