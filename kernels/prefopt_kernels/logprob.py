"""Row kernels over one tile of logits: what a loop over vocabulary tiles calls between its GEMMs.

The target's column is left out of every sum; the caller holds the target's logit in float32 and
adds its share at the end (`prefopt.tiles` has the torch specification of each function here).
Notation and method: rows.py. Shapes: R rows, C columns of the tile, D hidden size, V vocabulary.
Bytes moved a row (b per logit): fold C b, with p as well up to 3 C b of which the second read finds
the tile in L2; dlogits 2 C b, or C b written where the row's gradient is zero.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefopt_kernels import tuning
from prefopt_kernels.rows import (
    GONE,
    LN2,
    LOG2E,
    NEG_INF,
    check_matrix,
    check_vector,
    column_in,
    factors,
    fold_row,
    gradient_block,
    launch,
    narrow,
    on_device,
    origin_of,
    raw_logits,
    transform,
)


@triton.jit(do_not_specialize=["p_rows", "carried"])
def fold_kernel(
    z_ptr, y_ptr, lse_ptr, share_ptr, entropy_ptr, p_ptr, bias_ptr,
    width, z_stride, p_stride, p_rows, carried,
    inner: tl.float32, outer: tl.float32,  # pyright: ignore[reportInvalidTypeForm]
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
    WRITE_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row. `carried` 0: nothing was folded before, lse and entropy are not read."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * z_stride
    y = column_in(tl.load(y_ptr + row), width)
    before = tl.load(lse_ptr + row, mask=carried != 0, other=NEG_INF)
    # What was folded before is one more term: exp(before), and its sum of e (z' - m) is -entropy.
    m, s, w = fold_row(
        z_ptr, bias_ptr, width, y, before, inner, outer, HAS_BIAS, HAS_SOFTCAP, ENTROPY, BLOCK
    )
    origin = origin_of(m)
    drop = (before - origin) * LOG2E
    old = tl.exp2(drop)
    alone = tl.where(s != 0, 1.0 / tl.where(s != 0, s, 1.0), 0.0)  # s != 0 also if NaN
    total = s + old
    some = total != 0
    log_s = tl.log(tl.where(some, total, 1.0))
    scale = tl.where(some, 1.0 / tl.where(some, total, 1.0), 0.0)
    tl.store(share_ptr + row, s * scale)
    tl.store(lse_ptr + row, tl.where(some, origin + log_s, NEG_INF))
    if ENTROPY:
        h = tl.load(entropy_ptr + row, mask=carried != 0, other=0.0)
        w += old * (tl.maximum(drop, GONE) - h * LOG2E)
        tl.store(entropy_ptr + row, log_s - w * LN2 * scale)
    if WRITE_P:
        if row < p_rows:
            p_ptr += row * p_stride
            lanes = tl.arange(0, BLOCK)
            for start in range(0, width, BLOCK):
                cols = start + lanes
                inside = cols < width
                x = tl.load(z_ptr + cols, mask=inside, other=0.0)
                x = raw_logits(x, bias_ptr, cols, inside, HAS_BIAS)
                z, slope = transform(x, inner, outer, HAS_SOFTCAP)
                z = tl.where(inside & (cols != y), z, NEG_INF)
                p = tl.exp2((z - origin) * LOG2E) * alone
                if HAS_SOFTCAP:
                    p *= slope
                tl.store(p_ptr + cols, narrow(p, p_ptr.dtype.element_ty), mask=inside)


def fold(
    z: Tensor,
    y: Tensor,
    lse: Tensor,
    share: Tensor,
    *,
    entropy: Tensor | None = None,
    p: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    first: bool = False,
) -> None:
    """Take a tile of raw logits z [R, C] into the lse [R] and entropy [R] of the others so far.

    y [R] int64: the target's column in this tile, anything outside [0, C) if it is not in it.
    lse, entropy: float32, natural log, updated in place; with `first` what they held is ignored.
    share [R] becomes exp(lse of this tile - new lse). p [<= R, C] (it may be z; any of the three
    types): softmax over this tile alone, times slope, so that ``mean.lerp_(p @ W, share)`` goes on.
    bias [C] contiguous. Raises AssertionError on shapes, types or strides it does not take.
    """
    check_matrix(z, "z")
    check_vector(y, z, torch.int64, "y")
    for vector, name in ((lse, "lse"), (share, "share"), (entropy, "entropy")):
        check_vector(vector, z, torch.float32, name)
    check_vector(bias, z.t(), z.dtype if bias is None else bias.dtype, "bias")
    if p is not None:
        check_matrix(p, "p")
        assert p.shape[1] == z.shape[1] and len(p) <= len(z), (tuple(p.shape), tuple(z.shape))
    if not len(z):
        return
    heads = factors(scale, softcap, temperature)

    def run(config: tuning.Rows, lse=lse, share=share, entropy=entropy, p=p) -> None:
        launch(
            fold_kernel, len(z), config,
            z, y, lse, share, lse if entropy is None else entropy, z if p is None else p,
            z if bias is None else bias, z.shape[1], z.stride(0), 0 if p is None else p.stride(0),
            0 if p is None else len(p), int(not first), *heads,
            HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None,
            ENTROPY=entropy is not None, WRITE_P=p is not None,
        )  # fmt: skip

    def trial():
        outputs = (lse, share, entropy, p)
        scratch: Any = [None if t is None else torch.empty_like(t) for t in outputs]
        return lambda config: run(config, *scratch)

    with on_device(z):
        run(tuning.rows("fold", z, trial))


@triton.jit
def dlogits_kernel(
    z_ptr, y_ptr, lse_ptr, entropy_ptr, g_ptr, g_entropy_ptr, bias_ptr, out_ptr,
    width, z_stride, out_stride,
    inner: tl.float32, outer: tl.float32,  # pyright: ignore[reportInvalidTypeForm]
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK columns of a row."""
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    out_ptr += row * out_stride
    g = tl.load(g_ptr + row)
    live = g != 0
    g_entropy = 0.0
    entropy = 0.0
    if HAS_ENTROPY:
        g_entropy = tl.load(g_entropy_ptr + row)
        entropy = tl.load(entropy_ptr + row)
        live = live | (g_entropy != 0)
    if live:
        x = tl.load(z_ptr + row * z_stride + cols, mask=inside, other=0.0)
        x = raw_logits(x, bias_ptr, cols, inside, HAS_BIAS)
        # At -inf either p or the slope is 0.
        x = tl.where(inside & (cols != column_in(tl.load(y_ptr + row), width)), x, NEG_INF)
        d, _ = gradient_block(
            x, tl.load(lse_ptr + row), entropy, -g, g_entropy,
            inner, outer, HAS_SOFTCAP, HAS_ENTROPY,
        )  # fmt: skip
        tl.store(out_ptr + cols, narrow(d, out_ptr.dtype.element_ty), mask=inside)
    else:
        zeros = tl.zeros([BLOCK], out_ptr.dtype.element_ty)
        tl.store(out_ptr + cols, zeros, mask=inside)


def dlogits(
    z: Tensor,
    y: Tensor,
    lse: Tensor,
    g: Tensor,
    out: Tensor,
    *,
    g_entropy: Tensor | None = None,
    entropy: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> None:
    """out [R, C] = -p (g + g_entropy (log p + entropy)) slope c, p = exp(z' - lse).

    c = scale / temperature; lse and entropy [R] over all columns of the vocabulary, g and g_entropy
    [R] upstream, all float32. 0 at the target's column (the caller adds that term) and where p = 0;
    rows with g = g_entropy = 0 are zeros and not read. out may be z. AssertionError as in `fold`.
    """
    check_matrix(z, "z")
    check_matrix(out, "out")
    assert out.shape == z.shape, (tuple(out.shape), tuple(z.shape))
    assert g_entropy is None or entropy is not None, "g_entropy needs the entropy"
    check_vector(y, z, torch.int64, "y")
    named = ((lse, "lse"), (g, "g"), (g_entropy, "g_entropy"), (entropy, "entropy"))
    for vector, name in named:
        check_vector(vector, z, torch.float32, name)
    check_vector(bias, z.t(), z.dtype if bias is None else bias.dtype, "bias")
    if not z.numel():
        return
    heads = factors(scale, softcap, temperature)
    with_entropy = g_entropy is not None

    def run(config: tuning.Rows, out=out) -> None:
        launch(
            dlogits_kernel, len(z) * -(-z.shape[1] // config.block), config,
            z, y, lse, entropy if with_entropy else lse, g, g_entropy if with_entropy else g,
            z if bias is None else bias, out, z.shape[1], z.stride(0), out.stride(0), *heads,
            HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, HAS_ENTROPY=with_entropy,
        )  # fmt: skip

    def trial():
        scratch = torch.empty_like(out)
        return lambda config: run(config, out=scratch)

    with on_device(z):
        run(tuning.rows("dlogits", z, trial))


@triton.jit(do_not_specialize=["vocab"])
def target_dot_kernel(
    hidden_ptr, weight_ptr, y_ptr, out_ptr, width, vocab, hidden_stride, weight_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(y_ptr + row)
    total = tl.zeros([BLOCK], tl.float32)
    if (y >= 0) & (y < vocab):
        lanes = tl.arange(0, BLOCK)
        hidden_ptr += row * hidden_stride
        weight_ptr += y * weight_stride
        for start in range(0, width, BLOCK):
            cols = start + lanes
            h = tl.load(hidden_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
            total += h * tl.load(weight_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, tl.sum(total, 0))


def target_dot(hidden: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    """hidden[r] . weight[y_r], products and sum in float32: [R, D], [V, D], [R] int64 -> [R].

    0 where y is outside [0, V). Raises AssertionError as `fold` does.
    """
    check_matrix(hidden, "hidden")
    check_matrix(weight, "weight")
    assert hidden.shape[1] == weight.shape[1], (tuple(hidden.shape), tuple(weight.shape))
    check_vector(y, hidden, torch.int64, "y")
    out = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    if not len(hidden):
        return out

    def run(config: tuning.Rows) -> None:
        launch(
            target_dot_kernel, len(hidden), config,
            hidden, weight, y, out, hidden.shape[1], len(weight), hidden.stride(0),
            weight.stride(0),
        )  # fmt: skip

    with on_device(hidden):
        run(tuning.rows("target_dot", hidden, lambda: run))
    return out
