"""What the row kernels share: a logit's transform, the online log-sum-exp of one row, the gradient.

z' = cap(scale * (raw + bias)) / temperature with cap(x) = softcap * tanh(x / softcap), and
slope = 1 - tanh(x / softcap)^2 (without softcap cap(x) = x and slope = 1). To the kernels the three
numbers arrive as two (`factors`):

    no softcap:  z' = inner * (raw + bias)               inner = scale / temperature
    softcap:     z' = outer * tanh(inner * (raw + bias)) inner = scale / softcap,
                                                         outer = softcap / temperature

A program goes along one row in blocks of BLOCK columns and keeps the running maximum m as one
number and the sums of e = exp(z' - m) and of e (z' - m) in BLOCK lanes each, so a block costs one
exponential an element and one reduction across lanes, and each lane adds in column order. z' - m is
formed before it is multiplied by log2(e): logits of 3e4 lose no digits to the change of base, and
whether the compiler contracts the multiplication and the subtraction changes last bits only.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from prefopt_kernels import tuning

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEG_INF = tl.constexpr(float("-inf"))
# exp2 of it is 0 in float32. Stands for -inf where a product with 0 must be 0.
GONE = tl.constexpr(-200.0)
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


# ---- on the host ----


def factors(scale: float, softcap: float | None, temperature: float) -> tuple[float, float]:
    """(inner, outer) of the module's docstring; outer is 1 and unused without softcap."""
    if softcap is None:
        return float(scale) / float(temperature), 1.0
    return float(scale) / float(softcap), float(softcap) / float(temperature)


def on_device(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def launch(kernel: Any, programs: int, config: tuning.Rows, *arguments: Any, **flags: Any) -> None:
    """One 1-D launch. Contraction to fused multiply-adds is on by name: its default may change."""
    kernel[(programs,)](
        *arguments, **flags, BLOCK=config.block, num_warps=config.warps, enable_fp_fusion=True
    )


def check_matrix(x: Tensor, name: str) -> None:
    """AssertionError unless x is [rows, columns] of a kernel's type with columns side by side."""
    assert x.dim() == 2, f"{name} {tuple(x.shape)} is not [rows, columns]"
    assert x.dtype in FLOATS, f"{name} is {x.dtype}"
    assert x.stride(1) == 1 or x.shape[1] <= 1, f"{name}'s columns are {x.stride(1)} apart"


def check_vector(x: Tensor | None, like: Tensor, dtype: torch.dtype, name: str) -> None:
    """AssertionError unless x is None or [rows] of `dtype`, contiguous, beside `like`."""
    if x is not None:
        assert x.shape == like.shape[:1], f"{name} {tuple(x.shape)} for {tuple(like.shape)}"
        assert x.dtype == dtype, f"{name} is {x.dtype}, not {dtype}"
        assert x.is_contiguous(), f"{name} is not contiguous"
        assert x.device == like.device, f"{name} is on {x.device}, not {like.device}"


# ---- in a kernel ----


@triton.jit
def transform(x, inner, outer, HAS_SOFTCAP: tl.constexpr):
    """raw + bias -> z', slope (unused where the caller drops it). tanh by one exponential of a
    negative number, so it never overflows; near 0, where 1 - e would cancel, by a polynomial of
    relative error 8e-8. The slope 4 e / (1 + e)^2 keeps its digits where tanh rounds to 1."""
    if HAS_SOFTCAP:
        x = x * inner
        a = tl.abs(x)
        e = tl.exp2(a * (-2.0 * LOG2E))
        r = 1.0 / (1.0 + e)
        b = tl.minimum(a, 0.5)
        q = b * b
        poly = -0.33333312 + q * (0.13330514 + q * (-0.05339105 + q * 0.01799922))
        t = tl.where(a < 0.5, b + b * q * poly, (1.0 - e) * r)
        return tl.where(x < 0, -t, t) * outer, 4.0 * e * r * r
    else:
        return x * inner, 1.0


@triton.jit
def raw_logits(x, bias_ptr, cols, inside, HAS_BIAS: tl.constexpr):
    """Loaded logits as float32, their bias added."""
    x = x.to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def column_in(y, width):
    """int64 column -> int32, -1 for one that is not in [0, width): compared with 32-bit columns."""
    return tl.where((y >= 0) & (y < width), y, -1).to(tl.int32)


@triton.jit
def origin_of(m):
    """What to subtract from logits whose maximum is m: -inf - -inf would be NaN."""
    return tl.where(m == NEG_INF, 0.0, m)


@triton.jit
def fold_row(
    row_ptr, bias_ptr, width, y, m, inner, outer,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row without column y -> m, s, w: the maximum of the given m and all z', the sums over
    columns of exp(z' - m) and, with ENTROPY, of exp(z' - m) (z' - m) log2(e); all are scalars.
    NaN in the row makes s NaN. If nothing contributes m is what it was and s = w = 0."""
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    ahead = tl.load(row_ptr + lanes, mask=lanes < width, other=0.0)
    for start in range(0, width, BLOCK):
        cols = start + lanes
        inside = cols < width
        x = raw_logits(ahead, bias_ptr, cols, inside, HAS_BIAS)
        # The next block is on its way while this one is worked on.
        ahead = tl.load(row_ptr + cols + BLOCK, mask=cols < width - BLOCK, other=0.0)
        z, _ = transform(x, inner, outer, HAS_SOFTCAP)
        z = tl.where(inside & (cols != y), z, NEG_INF)
        top = tl.maximum(m, tl.max(z, 0))
        origin = origin_of(top)
        drop = (m - origin) * LOG2E
        decay = tl.exp2(drop)
        shifted = (z - origin) * LOG2E
        e = tl.exp2(shifted)
        if ENTROPY:
            moved = weighted + tl.maximum(drop, GONE) * sums
            weighted = decay * moved + e * tl.maximum(shifted, GONE)
        sums = decay * sums + e
        m = top
    return m, tl.sum(sums, 0), tl.sum(weighted, 0)


@triton.jit
def log1p_exp(x):
    """log(1 + exp(x)) for x <= 0 with a relative error of a few ulp: 2 artanh(u / (2 + u)) as a
    series, u = exp(x) <= 1, because log(1 + u) has lost the digits of a small u."""
    u = tl.exp2(tl.maximum(x, GONE) * LOG2E)
    r = u / (2.0 + u)
    q = r * r
    series = 1.0 / 9 + q * (1.0 / 11 + q * (1.0 / 13 + q * (1.0 / 15)))
    return 2.0 * r * (1.0 + q * (1.0 / 3 + q * (0.2 + q * (1.0 / 7 + q * series))))


@triton.jit
def gradient_block(
    x, lse, entropy, own, g_entropy, inner, outer,
    HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr,
):  # fmt: skip
    """x = raw + bias -> p (own - g_entropy (log p + entropy)) slope c, and slope c, where
    p = exp(z' - lse) and c = scale / temperature. p = 0 everywhere if lse is -inf."""
    z, slope = transform(x, inner, outer, HAS_SOFTCAP)  # pyright: ignore[reportGeneralTypeIssues]
    shifted = (z - tl.where(lse == NEG_INF, float("inf"), lse)) * LOG2E
    p = tl.exp2(shifted)
    if HAS_ENTROPY:
        logp = tl.maximum(shifted, GONE) * LN2
        d = p * (own - g_entropy * (logp + entropy))
    else:
        d = p * own
    c = inner * outer
    if HAS_SOFTCAP:
        c = slope * c
    return d * c, c


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 -> dtype, to nearest even. The interpreter cuts bits off on the way to bfloat16; the
    rounding is added there by hand, so that it gives what hardware gives."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x).to(dtype)
    else:
        return x.to(dtype)
