"""DoRA (Liu et al. 2024, arXiv 2402.09353): a trained length m of each row of W + s B A.

    y = c (x W^T + s h B^T) + b    h = x A^T    c = m / n [out]    n = ||W + s B A|| of each row
    dL/dm = sum over tokens of g p / n, with p the bracket; n counts as a constant (section 4.3)

With dropout, x' = dropout(x), as PEFT has it: y = x W^T + b + (c - 1) x' W^T + c s h' B^T.
Neither B A nor a float32 copy of W is ever formed:
    n^2 = ||W||^2 + 2 s sum((W A^T) * B) + s^2 sum((B (A A^T)) * B)
with ||W||^2 taken once and W A^T block of rows by block of rows. Everything is computed from c - 1,
which is exactly 0 at the start, so that with B = 0 the layer is bitwise the base.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prefopt import dispatch
from prefopt.nn.nf4_linear import NF4Linear, dense_weight, frozen_tensors

BLOCK = 1 << 20  # elements of W that are in float32 at a time


def squares(base: nn.Module, transposed: bool) -> Tensor:
    """||W||^2 of each row, [out], in float32."""
    return torch.cat([rows.square().sum(1) for _, rows in _blocks(base, transposed)])


def row_norms(
    base: nn.Module, transposed: bool, squares: Tensor, A: Tensor, B: Tensor, scale: float
) -> Tensor:
    """||W + s B A|| of each row, [out], in float32; A [r, in], B [out, r]."""
    cross = torch.cat(
        [(dispatch.mm_nt(W, A.to(W)) * B[at]).sum(1) for at, W in _blocks(base, transposed)]
    )
    own = ((B @ (A @ A.t())) * B).sum(1)
    return (squares + 2 * scale * cross + scale**2 * own).clamp_min_(0).sqrt_()


def excess(m: Tensor, norms: Tensor) -> Tensor:
    """c - 1; 0 where the row is 0, which any c leaves as it is."""
    nonzero = norms > 0
    return torch.where(nonzero, m / torch.where(nonzero, norms, 1) - 1, 0)


def product(x: Tensor, A: Tensor, B: Tensor, m: Tensor, norms: Tensor, *rest: Any) -> Tensor:
    """y [..., out] of x [..., in]; rest: base, transposed, scale, dropout."""
    return _Dora.apply(x, A, B, m, norms, *rest)


def weight_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype of a layer's weight; of a 4-bit one, that of the weight that was quantised."""
    return layer.dtype if isinstance(layer, NF4Linear) else layer.weight.dtype  # type: ignore


def dense_rows(base: nn.Module, transposed: bool) -> Tensor:
    """W [out, in] as stored (dequantised), perhaps in memory that the next call overwrites."""
    W = dense_weight(base, frozen_tensors(base), weight_dtype(base))
    return W.t() if transposed else W


def _blocks(base: nn.Module, transposed: bool) -> Iterator[tuple[slice, Tensor]]:
    W = dense_rows(base, transposed)
    wide = torch.promote_types(W.dtype, torch.float32)
    step = max(1, BLOCK // W.shape[1])
    for start in range(0, len(W), step):
        at = slice(start, start + step)
        yield at, W[at].to(wide)


class _Dora(torch.autograd.Function):
    """As one node of the graph, every product in the dtype of x. With e = c - 1, g' = c g:

    no dropout: dx = g' W + s (g' B) A        else: dx = g W + mask * (e g W + s (g' B) A)
    dA = s (g' B)^T x'        dB = s g'^T h'        dm = sum(g p) / n
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        m: Tensor,
        norms: Tensor,
        base: nn.Module,
        transposed: bool,
        scale: float,
        dropout: float,
    ) -> Tensor:
        need_x, need_A, need_B, need_m = ctx.needs_input_grad[:4]
        y = base(x)
        kept, out = None, y.view(-1, y.shape[-1])
        if dropout:
            x, kept = torch.native_dropout(x, dropout, True)
        x = x.reshape(-1, x.shape[-1])
        h = dispatch.mm_nt(x, A.to(x.dtype))
        Bt, frozen = B.to(x.dtype).t(), frozen_tensors(base)
        out.addmm_(h, Bt, alpha=scale)
        if dropout:
            W = dense_weight(base, frozen, x.dtype)
            p = dispatch.mm_nt(x, W.t() if transposed else W).addmm_(h, Bt, alpha=scale)
        else:
            bias: Any = base.bias
            p = out if bias is None else out - bias.to(out.dtype)
        e = excess(m, norms).to(x.dtype)
        ctx.save_for_backward(
            x if need_A else None,
            h if need_B else None,
            kept,
            p if need_m else None,
            A,
            B,
            m,
            norms,
            e,
            *(frozen if need_x else ()),
        )
        ctx.base, ctx.transposed, ctx.scale, ctx.dropout = base, transposed, scale, dropout
        result = torch.addcmul(out, p, e)
        # A view made in here could not be changed in place, which Llama 4 and Gemma 3n do.
        return torch.ops.aten._unsafe_view(result, y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, kept, p, A, B, m, norms, e, *frozen = ctx.saved_tensors
        need_x, need_A, need_B, need_m = ctx.needs_input_grad[:4]
        s, g = ctx.scale, grad.reshape(-1, grad.shape[-1])
        dx = dA = dB = dm = None
        eg = g * e
        cg = g + eg
        cgB = dispatch.mm_nt(cg, B.to(g.dtype).t())
        if need_x:
            W = dense_weight(ctx.base, tuple(frozen), g.dtype)
            W = W if ctx.transposed else W.t()
            dx = dispatch.mm_nt(cg if kept is None else eg, W)
            dx.addmm_(cgB, A.to(g.dtype), alpha=s)
            if kept is not None:
                dx.mul_(kept.view_as(dx)).mul_(1 / (1 - ctx.dropout)).add_(dispatch.mm_nt(g, W))
            dx = dx.view(*grad.shape[:-1], dx.shape[-1])
        if need_A:
            dA = dispatch.mm_nt(cgB.t(), x.t()).to(A.dtype).mul_(s)
        if need_B:
            # As (h^T g)^T: on CPU a product with its long side last is the faster one.
            dB = dispatch.mm_nt(h.t(), cg.t()).t()
            dB = dB.to(B.dtype, memory_format=torch.contiguous_format).mul_(s)
        if need_m:
            wide = torch.promote_types(g.dtype, m.dtype)
            step = max(1, BLOCK // g.shape[1])
            blocks = zip(g.split(step), p.split(step), strict=True)
            total = sum(((a.to(wide) * b).sum(0) for a, b in blocks), torch.zeros_like(m))
            dm = torch.where(norms > 0, total / torch.where(norms > 0, norms, 1), 0).to(m.dtype)
        return dx, dA, dB, dm, *[None] * 5
