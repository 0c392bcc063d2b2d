"""log-sum-exp of hidden @ weight.T without the logits: product and fold in one kernel, and a row's
result is bitwise the same whatever batch it is in.

    z' = cap(scale * (hidden @ weight.T + bias)) / temperature

One program takes a block of rows through a few tiles of the vocabulary (a split), keeps the float32
logits of a tile in registers, and folds them into three numbers a row: the maximum m, the sum
s = Σ exp(z' - m), and for the entropy w = Σ exp(z' - m) (z' - m). They go to [splits, M] arrays,
and a second, small kernel goes through the splits in order. No atomics, no locks.

Why a row does not see its batch: tile and splits are fixed by the architecture, the type, H and V.
M enters the grid, the mask of the last store and nothing else, not even the compiled code
(`do_not_specialize`, `_one_layout`). A row is multiplied in the same steps over H wherever in a
block it lies, and rows are never added to one another.
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
    INTERPRETED,
    LOG2E,
    NEG_INF,
    check_matrix,
    check_vector,
    column_in,
    factors,
    on_device,
    origin_of,
)

_GROUP = tl.constexpr(16)  # row blocks that go through the vocabulary together


@triton.jit
def _moved(m, s, w, new_m):
    """s = Σ exp(z' - m) and w = Σ exp(z' - m) (z' - m), taken to a maximum new_m >= m."""
    drop = m - origin_of(new_m)
    decay = tl.exp2(drop * LOG2E)
    return decay * s, decay * (w + tl.maximum(drop, GONE) * s)


@triton.jit
def _capped(x, inner, outer, HAS_SOFTCAP: tl.constexpr):
    """z' of x = raw + bias. tanh costs one exponential and one division and is right to 1e-7 of the
    cap; that of rows.py is right to 1e-7 of itself, but has no room in the registers of a tile."""
    if HAS_SOFTCAP:
        power = tl.minimum(x * (2.0 * LOG2E * inner), 99.0, propagate_nan=tl.PropagateNan.ALL)
        return outer - 2.0 * outer / (1.0 + tl.exp2(power))
    else:
        return x * inner


@triton.jit
def _product(
    hidden_ptr, weight_ptr, depth, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_V] float32 from pointers to the rows, [BLOCK_M, 1] and [1, BLOCK_V]."""
    k = tl.arange(0, BLOCK_K)
    a_ptr = hidden_ptr + k[None, :]
    b_ptr = weight_ptr + k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for start in range(0, depth, BLOCK_K):
        if EVEN:
            a = tl.load(a_ptr + start)
            b = tl.load(b_ptr + start)
        else:
            inside = k < depth - start
            a = tl.load(a_ptr + start, mask=inside[None, :], other=0.0)
            b = tl.load(b_ptr + start, mask=inside[:, None], other=0.0)
        if INTERPRETED:
            # It would multiply bfloat16 as the integers that store it, and the float32 sums of its
            # BLAS depend on a row's place; in float64 these sums hardly round at all.
            acc += tl.dot(a.to(tl.float64), b.to(tl.float64)).to(tl.float32)
        else:
            acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit(
    do_not_specialize=["rows"],
    do_not_specialize_on_alignment=["y_ptr", "bias_ptr", "m_ptr", "s_ptr", "w_ptr"],
)
def fold_tiles_kernel(
    hidden_ptr, weight_ptr, bias_ptr, y_ptr, m_ptr, s_ptr, w_ptr,
    rows, columns, depth, hidden_stride, weight_stride,
    inner: tl.float32, outer: tl.float32,  # pyright: ignore[reportInvalidTypeForm]
    HAS_SOFTCAP: tl.constexpr, EVEN: tl.constexpr, TILES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK_M rows and TILES tiles of BLOCK_V columns. bias_ptr and w_ptr may be
    None; EVEN: BLOCK_K divides depth."""
    row_blocks = tl.cdiv(rows, BLOCK_M)
    tiles = tl.cdiv(columns, BLOCK_V)
    splits = tl.cdiv(tiles, TILES)

    # Programs that run at the same time share 16 blocks of hidden and a handful of tiles of the
    # weight, which the L2 cache holds.
    group = tl.program_id(0) // (_GROUP * splits)
    within = tl.program_id(0) % (_GROUP * splits)
    group_size = tl.minimum(row_blocks - group * _GROUP, _GROUP)
    row_block = group * _GROUP + within % group_size
    split = within // group_size

    # int64 before any product with a stride. Rows past the end read the last one; they are not
    # stored.
    row = row_block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    read_row = tl.minimum(row, rows - 1)
    hidden_ptr += (read_row * hidden_stride)[:, None]
    y = column_in(tl.load(y_ptr + read_row), columns)

    m = tl.full([BLOCK_M], NEG_INF, tl.float32)
    s = tl.zeros([BLOCK_M], tl.float32)
    w = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(split * TILES, tl.minimum(split * TILES + TILES, tiles)):
        column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        read_column = tl.minimum(column, columns - 1)
        x = _product(
            hidden_ptr, weight_ptr + (read_column.to(tl.int64) * weight_stride)[None, :], depth,
            EVEN, BLOCK_M, BLOCK_V, BLOCK_K,
        )  # fmt: skip
        if bias_ptr is not None:
            x += tl.load(bias_ptr + read_column).to(tl.float32)[None, :]
        z = _capped(x, inner, outer, HAS_SOFTCAP)
        z += tl.where(column < columns, 0.0, NEG_INF)[None, :]
        z = tl.where(column[None, :] == y[:, None], NEG_INF, z)

        new_m = tl.maximum(m, tl.max(z, 1))
        s, w = _moved(m, s, w, new_m)
        m = new_m
        shift = z - origin_of(m)[:, None]
        e = tl.exp2(shift * LOG2E)
        s += tl.sum(e, 1)
        if w_ptr is not None:
            w += tl.sum(e * tl.maximum(shift, GONE), 1)

    at = split.to(tl.int64) * rows + row
    tl.store(m_ptr + at, m, mask=row < rows)
    tl.store(s_ptr + at, s, mask=row < rows)
    if w_ptr is not None:
        tl.store(w_ptr + at, w, mask=row < rows)


@triton.jit(
    do_not_specialize=["rows", "splits"],
    do_not_specialize_on_alignment=["m_ptr", "s_ptr", "w_ptr", "lse_ptr", "entropy_ptr"],
)
def combine_kernel(
    m_ptr, s_ptr, w_ptr, lse_ptr, entropy_ptr, rows, splits,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """m, s, w [splits, rows] -> lse, entropy [rows]. w_ptr and entropy_ptr may be None."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m = tl.full([BLOCK_M], NEG_INF, tl.float32)
    s = tl.zeros([BLOCK_M], tl.float32)
    w = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        at = split.to(tl.int64)[:, None] * rows + row[None, :]
        there = (split < splits)[:, None] & (row < rows)[None, :]
        part_m = tl.load(m_ptr + at, mask=there, other=NEG_INF)
        part_s = tl.load(s_ptr + at, mask=there, other=0.0)
        part_w = tl.zeros([BLOCK_S, BLOCK_M], tl.float32)
        if w_ptr is not None:
            part_w = tl.load(w_ptr + at, mask=there, other=0.0)

        new_m = tl.maximum(m, tl.max(part_m, 0))
        s, w = _moved(m, s, w, new_m)
        m = new_m
        part_s, part_w = _moved(part_m, part_s, part_w, m[None, :])
        s += tl.sum(part_s, 0)
        w += tl.sum(part_w, 0)

    # s >= 1 where any column contributes, else s = 0 and m = -inf.
    s = tl.where(s == 0, 1.0, s)
    log_s = tl.log(s)
    tl.store(lse_ptr + row, m + log_s, mask=row < rows)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, log_s - w / s, mask=row < rows)


def supported(arch: str) -> str | None:
    """None if this kernel is meant for architecture `arch`, else a sentence that says why not."""
    if arch in (tuning.INTERPRETER, "gfx90a", "gfx942", "gfx950"):
        return None
    if arch.startswith("sm_") and int(arch[3:]) >= 80:
        return None
    if arch.startswith("sm_"):
        return (
            f"Triton has no matrix instructions for {arch} (they start at sm_80): the fused kernel "
            'would be many times slower than impl="triton", whose product is cuBLAS'
        )
    return (
        f"the fused kernel is compiled and checked for sm_80 and newer, gfx90a, gfx942 and gfx950, "
        f'not for {arch}; impl="triton" takes its product from the vendor\'s library'
    )


def fused_fold(
    hidden: Tensor,
    weight: Tensor,
    y: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-sum-exp of z' over all columns but each row's own y, and its softmax's entropy.

    hidden [M, H] and weight [V, H] of one type (float32, bfloat16, float16), any row stride; y [M]
    int64, outside [0, V): no column is left out; bias [V] contiguous. Returns (lse, entropies or
    None), float32 [M], in nats; a row to which no column contributes has lse -inf and entropy 0. A
    row's results are bitwise the same in every batch. Raises ValueError on an architecture that
    `supported` refuses, AssertionError on shapes, types or strides it does not take.
    """
    arch = tuning.arch(hidden.device)
    if reason := supported(arch):
        raise ValueError(reason)
    hidden = _one_layout(hidden)
    check_matrix(hidden, "hidden")
    check_matrix(weight, "weight")
    assert hidden.shape[1] == weight.shape[1], (tuple(hidden.shape), tuple(weight.shape))
    assert hidden.dtype == weight.dtype, (hidden.dtype, weight.dtype)
    check_vector(y, hidden, torch.int64, "y")
    check_vector(bias, weight, weight.dtype if bias is None else bias.dtype, "bias")
    tile = tuning.fused_tile(arch, hidden.dtype, hidden.shape[1])
    return launch(
        hidden, weight, y, bias, *factors(scale, softcap, temperature),
        has_softcap=softcap is not None, entropy=entropy, tile=tile,
    )  # fmt: skip


def launch(
    hidden: Tensor, weight: Tensor, y: Tensor, bias: Tensor | None, inner: float, outer: float, *,
    has_softcap: bool, entropy: bool, tile: tuning.Tile, tiles: int = tuning.TILES_PER_SPLIT,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """fused_fold on checked arguments, with `tiles` tiles of the caller's choice to a split."""
    (rows, depth), columns = hidden.shape, len(weight)
    splits = -(-columns // (tile.columns * tiles))
    parts = hidden.new_empty(3 if entropy else 2, splits, rows, dtype=torch.float32)
    m, s, w = parts[0], parts[1], parts[2] if entropy else None
    lse = parts.new_empty(rows)
    entropies = parts.new_empty(rows) if entropy else None
    with on_device(hidden):  # without rows or columns a grid is empty, and triton launches nothing
        _start(
            fold_tiles_kernel, -(-rows // tile.rows) * splits,
            hidden, weight, bias, y, m, s, w,
            rows, columns, depth, hidden.stride(0), weight.stride(0), inner, outer,
            HAS_SOFTCAP=has_softcap, EVEN=depth % tile.depth == 0,
            TILES=tiles, BLOCK_M=tile.rows, BLOCK_V=tile.columns, BLOCK_K=tile.depth,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        _start(
            combine_kernel, -(-rows // 32),
            m, s, w, lse, entropies, rows, splits, BLOCK_M=32, BLOCK_S=32, num_warps=4,
        )  # fmt: skip
    return lse, entropies


def _start(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """One launch. Contraction to fused multiply-adds is on by name: its default may change."""
    kernel[(programs,)](*arguments, **options, enable_fp_fusion=True)


def _one_layout(hidden: Tensor) -> Tensor:
    """hidden, or a copy where Triton would compile other code for it than for a fresh tensor.

    It compiles for the 16-byte alignment of pointers and for strides that 16 divides: a batch that
    is a slice at an odd address must not run other code than the whole.
    """
    depth, stride = hidden.shape[-1], hidden.stride(0)
    regular = stride % 16 == 0 if depth % 16 == 0 else stride == depth
    if regular and hidden.stride(-1) == 1 and hidden.data_ptr() % 16 == 0:
        return hidden
    return torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device).copy_(hidden)
