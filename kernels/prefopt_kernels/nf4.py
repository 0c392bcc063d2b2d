"""4-bit codes -> dense weights in one launch (QLoRA, arXiv:2305.14314; bitsandbytes' layout).

Element i of the flattened weight has its code in byte i // 2, the even one in the high nibble, and
its scale at i // block:

    w[i] = codebook[code] * scale                                 one rounding each, in float32
    scale = scales[i // block]                                    float32 scales, or
    scale = dynamic[scales[j]] * nested[j // 256] + offset        uint8 scales, j = i // block

Each product and the sum is rounded by itself: contracted to a fused multiply-add the sum would
differ in its last bit from what bitsandbytes and torch compute, so contraction is off here by name.
w is rounded to the type it was quantised from, and then to the type of the output. The result does
not depend on tile, architecture or the place in the grid. Bytes moved an element: 1/2 read, plus
1/64 (4/64 with float32 scales) at block 64, plus the output.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefopt_kernels import tuning
from prefopt_kernels.rows import FLOATS, narrow, on_device

NESTED_BLOCK = tl.constexpr(256)
_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def dequantize_kernel(
    codes_ptr, scales_ptr, nested_ptr, offset_ptr, codebook_ptr, dynamic_ptr, out_ptr, n, size,
    DOUBLE: tl.constexpr, MIDDLE: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK of the `size` bytes: BLOCK / HALF quantisation blocks, 2 HALF weights
    each. (Compared with `size`, not with n, four bytes share a mask and become one load.)"""
    rows: tl.constexpr = BLOCK // HALF
    block = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    packed = tl.load(codes_ptr + byte, mask=byte < size, other=0)
    there = block * (2 * HALF) < n
    scale = tl.load(scales_ptr + block, mask=there, other=0)
    if DOUBLE:
        coarse = tl.load(nested_ptr + block // NESTED_BLOCK, mask=there, other=0.0)
        scale = tl.load(dynamic_ptr + scale) * coarse + tl.load(offset_ptr)
    first = tl.load(codebook_ptr + (packed >> 4)) * scale[:, None]
    second = tl.load(codebook_ptr + (packed & 15)) * scale[:, None]
    w = tl.interleave(first, second)
    if MIDDLE != tl.float32:
        w = narrow(w, MIDDLE).to(tl.float32)
    element = block[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(out_ptr + element, narrow(w, out_ptr.dtype.element_ty), mask=element < n)


def dequantize(
    codes: Tensor,
    scales: Tensor,
    nested: Tensor | None,
    offset: Tensor | None,
    codebook: Tensor,
    dynamic: Tensor | None,
    n: int,
    block: int,
    dtype_mid: torch.dtype,
    out: Tensor,
) -> Tensor:
    """Writes the n weights to `out` (n elements, contiguous, float32, bfloat16 or float16).

    codes uint8, ceil(n / 2) of them; codebook float32 [16]; block a power of two from 32 to 4096.
    Single scales: scales float32, ceil(n / block), the others None. Double quantisation: scales
    uint8, nested float32, ceil(len(scales) / 256), offset float32 [] and dynamic float32 [256].
    Values are rounded to `dtype_mid` on their way. Raises AssertionError on what it does not take.
    """
    double = nested is not None
    blocks = -(-n // block)
    assert block in (32, 64, 128, 256, 512, 1024, 2048, 4096), f"block is {block}"
    _check(codes, "codes", torch.uint8, -(-n // 2), out)
    _check(scales, "scales", torch.uint8 if double else torch.float32, blocks, out)
    _check(codebook, "codebook", torch.float32, 16, out)
    if double:
        assert offset is not None and dynamic is not None, "double quantisation needs all its parts"
        _check(nested, "nested", torch.float32, -(-blocks // 256), out)
        _check(offset, "offset", torch.float32, 1, out)
        _check(dynamic, "dynamic", torch.float32, 256, out)
    assert dtype_mid in FLOATS, f"dtype_mid is {dtype_mid}"
    assert out.dtype in FLOATS and out.numel() == n, f"out is {out.dtype}, {out.numel()} for {n}"
    assert out.is_contiguous(), "out is not contiguous"
    if not n:
        return out
    unused = codebook
    # Rounding to the output's type does nothing to what has that type already.
    middle = torch.float32 if dtype_mid == out.dtype else dtype_mid

    def run(config: tuning.Rows) -> None:
        width = max(config.block, block // 2)
        kernel: Any = dequantize_kernel
        kernel[(triton.cdiv(codes.numel(), width),)](
            codes, scales, nested if double else unused, offset if double else unused, codebook,
            dynamic if double else unused, out, n, codes.numel(),
            DOUBLE=double, MIDDLE=_TRITON[middle], HALF=block // 2, BLOCK=width,
            num_warps=config.warps, enable_fp_fusion=False,
        )  # fmt: skip

    with on_device(out):
        run(tuning.dequantize_config(out, run))
    return out


def _check(x: Tensor, name: str, dtype: torch.dtype, length: int, like: Tensor) -> None:
    assert x.dtype == dtype, f"{name} is {x.dtype}, not {dtype}"
    assert x.numel() == length, f"{name} has {x.numel()} elements, not {length}"
    assert x.is_contiguous(), f"{name} is not contiguous"
    assert x.device == like.device, f"{name} is on {x.device}, not {like.device}"
