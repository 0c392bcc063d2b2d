"""4-bit weights in blocks: NF4 (Dettmers et al. 2023, arXiv 2305.14314) and FP4, as bitsandbytes
stores them.

n = elements of the weight, row-major; a block is `block` of them in a row, and may span rows.
    w_i = c[q_i] * a_b        c = codebook [16], q_i = 4-bit code, a_b = scale of the block of i
The scale is the largest magnitude of its block, a float32, or, doubly quantised, 8 bits:
    a_b = d[k_b] * A_g + o    d = dynamic map [256], A_g = scale of 256 blocks, o = mean of all a
Every product and sum is rounded to float32 on its own (no fused multiply-add), so that each
implementation has the same bits; w is then rounded once, to the dtype that was quantised.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from prefopt import dispatch
from prefopt.errors import InputError
from prefopt.nn import nf4_cpu
from prefopt.nn.scale_search import best_scales

NESTED = 256  # scales in a block of the second quantisation
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# Quantiles of the normal distribution, with an exact 0 (arXiv 2305.14314, appendix E).
_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
# A sign, two exponent bits and one of mantissa, in twelfths; the second zero is +0.0.
_FP4 = [0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3]
CODEBOOKS = {
    "nf4": torch.tensor(_NF4, dtype=torch.float32, device="cpu"),
    "fp4": torch.tensor(_FP4, dtype=torch.float32, device="cpu").div_(12),
}

_ENCODE = 1 << 18  # elements that are encoded at a time: what the caches hold
_DECODE = 1 << 18  # the same for decoding: 2^17 bytes of codes
_TINY = 1e-38  # a smaller scale has no float32 reciprocal to speak of; its block becomes 0
_HURTS = 1e-3  # see _hurts


class Packed4(NamedTuple):
    """A weight of n elements in 4 bits each; all that it takes to have it back."""

    codes: Tensor  # uint8 [ceil(n / 2)], the first of two elements in the high half
    scales: Tensor  # float32 [ceil(n / block)], or uint8 when quantised themselves
    nested: Tensor | None  # float32 [ceil(blocks / 256)] then
    offset: Tensor | None  # float32 [] then
    shape: torch.Size
    dtype: torch.dtype  # of the weight that was quantised
    kind: str = "nf4"
    block: int = 64


def quantize_nf4(
    w: Tensor,
    *,
    block: int = 64,
    double: bool = True,
    kind: str = "nf4",
    search: str | None = None,
    rounding: str = "nearest",
) -> Packed4:
    """w [...] in any floating dtype -> Packed4, on the device of w.

    double: the scales in 8 bits, unless that would hurt this weight (see _hurts). search: the
    scale of each block is the one with the least squared error instead of the largest magnitude
    ("signed" tries both signs), and codes are rounded to the scale as it is stored; the format is
    the same. rounding: "nearest", or "bnb_cpu" for the bits of bitsandbytes on a CPU, which rounds
    8-bit scales by way of 16 bits. float64 is rounded to float32 first.
    InputError for NaN and infinite values, no values, values that are no floats, unknown options.
    """
    _check(w, block, kind, search, rounding)
    flat = w.detach().reshape(-1)
    scales = torch.cat([part.abs().amax(1) for part in _blocks(flat, block)])
    if not bool(scales.isfinite().all()):
        bad = w.numel() - int(flat.float().isfinite().sum())
        raise InputError(
            f"{bad} of the {w.numel()} values of this weight are NaN or infinite in float32; "
            "repair the checkpoint before it is quantised"
        )
    if search is not None:
        book, bounds, _ = _sorted_codebook(kind, w.device)
        parts = zip(_blocks(flat, block), scales.split(_ENCODE // block), strict=True)
        scales = torch.cat([best_scales(x, a, book, bounds, search == "signed") for x, a in parts])
    bnb_tail = rounding == "bnb_cpu" and flat.numel() % block > 0
    if bnb_tail:
        scales[-1].clamp_(min=_TINY)
    p = Packed4(flat.new_empty(0), scales, None, None, w.shape, w.dtype, kind, block)
    stored = scales
    if double:
        nested = p._replace(**_nest(scales, rounding))
        if not _hurts(scales, absmax(nested)):
            p, stored = nested, absmax(nested) if search is not None else scales
    codes = [
        _encode(x, a, kind)
        for x, a in zip(_blocks(flat, block), stored.split(_ENCODE // block), strict=True)
    ]
    if bnb_tail:  # divided by its scale there, where full blocks are multiplied by the reciprocal
        tail = F.pad(flat[-(flat.numel() % block) :].float() / stored[-1], (0, block))[:block]
        codes[-1][-1] = _encode(tail[None], torch.ones_like(stored[-1:]), kind)
    return p._replace(codes=torch.cat([c.view(-1) for c in codes])[: (w.numel() + 1) // 2])


def dequantize_nf4(
    p: Packed4, dtype: torch.dtype | None = None, *, out: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """p -> the weight [*p.shape] in `dtype` (None: that of `out`, else p.dtype).

    c[q] a in float32, rounded to p.dtype, and only then to `dtype`, so that the weight is the same
    number in every dtype that holds it. out: contiguous, of as many elements, on the device of p.
    impl: "torch" (the specification), "triton", or "auto": Triton on a GPU, compiled C on a CPU.
    """
    n = p.shape.numel()
    if dtype is None:
        dtype = p.dtype if out is None else out.dtype
    if out is None:
        out = torch.empty(p.shape, dtype=dtype, device=p.codes.device)
    good = out.dtype == dtype and out.numel() == n and out.device == p.codes.device
    if not good or not out.is_contiguous():
        raise InputError(
            f"out is {list(out.shape)}, {out.dtype} on {out.device}; it must be contiguous with "
            f"{n} elements, {dtype} on {p.codes.device}"
        )
    flat = out.view(-1)
    between = torch.float32 if p.dtype == torch.float64 else p.dtype
    if dispatch.choose("nf4", out.device, impl, dtype) == "triton":
        dispatch.kernels("nf4").dequantize(
            p.codes, p.scales, p.nested, p.offset, _codebook(p.kind, out.device),
            _dynamic(out.device), n, p.block, between, flat,
        )  # fmt: skip
    else:
        _decode(p, flat, between, compiled=impl == "auto" and out.device.type == "cpu")
    return out.view(p.shape)


def absmax(p: Packed4) -> Tensor:
    """The scales of the blocks, float32 [blocks]."""
    if p.nested is None or p.offset is None:
        return p.scales
    d = _dynamic(p.scales.device).index_select(0, p.scales.int())
    return d.mul_(p.nested.repeat_interleave(NESTED)[: len(d)]).add_(p.offset)


def bytes_per_parameter(p: Packed4) -> float:
    tensors = (p.codes, p.scales, p.nested, p.offset)
    return sum(t.nbytes for t in tensors if t is not None) / p.shape.numel()


@functools.cache
@torch.inference_mode(False)
def dynamic_map() -> Tensor:
    """d [256], ascending, from -0.993 to 1: an exponent of up to 7 bits in unary, the rest linear
    (Dettmers 2016, arXiv 1511.04561)."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        means = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)).tolist()
        values += [*means, *(-m for m in means)]
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


def _check(w: Tensor, block: int, kind: str, search: str | None, rounding: str) -> None:
    options = {
        "block": (block, BLOCKS),
        "kind": (kind, tuple(CODEBOOKS)),
        "search": (search, (None, "unsigned", "signed")),
        "rounding": (rounding, ("nearest", "bnb_cpu")),
    }
    for name, (value, allowed) in options.items():
        if value not in allowed:
            known = ", ".join(map(repr, allowed))
            raise InputError(f"{name} is {value!r} for a 4-bit weight; it must be one of {known}")
    if not w.is_floating_point() or w.numel() == 0 or w.is_meta:
        what = f"{list(w.shape)} of {w.dtype} on {w.device}"
        raise InputError(f"a weight of {what} cannot be quantised; it must hold floating numbers")


def _blocks(flat: Tensor, block: int) -> Iterator[Tensor]:
    """flat [n] -> float32 [m, block], piece by piece; zeros fill the last block."""
    for part in flat.split(_ENCODE):
        x = part.float()
        missing = -len(x) % block
        yield (F.pad(x, (0, missing)) if missing else x).view(-1, block)


def _encode(x: Tensor, scales: Tensor, kind: str) -> Tensor:
    """The nearest codes, of two the lower one: x [m, block], [m] -> uint8 [m, block / 2]."""
    _, bounds, order = _sorted_codebook(kind, x.device)
    x = x * safe_reciprocal(scales)[:, None]
    # Comparisons of whole pieces in the cache; torch.bucketize searches for each element.
    q = (x > bounds[0]).view(torch.uint8)
    for bound in bounds[1:]:
        q += (x > bound).view(torch.uint8)
    if kind != "nf4":
        q = order.index_select(0, q.view(-1).int()).view_as(q)
    return (q[:, ::2] << 4) | q[:, 1::2]


def safe_reciprocal(scales: Tensor) -> Tensor:
    return 1 / torch.where(scales.abs() < _TINY, _TINY, scales)


def _nest(scales: Tensor, rounding: str) -> dict[str, Tensor]:
    """Scales float32 [blocks] -> the fields of their second quantisation."""
    d = _dynamic(scales.device)
    bounds = (d[1:] + d[:-1]) / 2
    offset = scales.mean()
    z = F.pad(scales - offset, (0, -len(scales) % NESTED)).view(-1, NESTED)
    nested = z.abs().amax(1)
    v = (z * (1 / nested)[:, None]).nan_to_num_(-1.0, 1.0, -1.0)  # equal scales: 0/0, code 0
    if rounding == "bnb_cpu":
        steps = ((v + 1) * 0.5 * 65535 + 0.5).int().clamp_(0, 65535)
        v = steps.float() / 65535 * 2 - 1
    k = torch.bucketize(v, bounds, out_int32=True).to(torch.uint8)
    return {"scales": k.view(-1)[: len(scales)], "nested": nested, "offset": offset}


def _hurts(scales: Tensor, decoded: Tensor) -> bool:
    """Whether 8-bit scales would damage a weight whose blocks differ by orders of magnitude.

    Measured on the tensor: the mean over its blocks of min(1, (a'/a - 1)^2), a' the scale after
    the round trip. 1e-3, a tenth of what NF4 itself loses, is passed when one block in a thousand
    is lost (the error is absolute: small scales drown in their large neighbours' and may even
    change their sign).
    """
    live = scales != 0
    loss = (decoded[live] / scales[live] - 1).square().clamp_(max=1)
    return bool(live.any()) and not bool(loss.mean() <= _HURTS)


def _decode(p: Packed4, out: Tensor, between: torch.dtype, compiled: bool) -> None:
    """Into out [n]: in one call where one rounding does, else piece by piece."""
    book, direct = _codebook(p.kind, out.device), between in (torch.float32, out.dtype)
    rest = _dynamic(out.device), book, p.block
    if compiled and direct and nf4_cpu.decode(p.codes, p.scales, p.nested, p.offset, *rest, out):
        return
    scales = absmax(p)
    step = _DECODE if out.device.type == "cpu" else 1 << 24
    for begin in range(0, len(out), step):
        part = out[begin : begin + step]
        codes = p.codes[begin // 2 : (begin + step) // 2]
        a = scales[begin // p.block : (begin + step) // p.block]
        x = part if direct else torch.empty_like(part, dtype=between)
        if not compiled or not nf4_cpu.decode(codes, a, None, None, *rest, x):
            _look_up(codes, a, p.kind, p.block, x)
        if x is not part:
            part.copy_(x)


def _look_up(codes: Tensor, scales: Tensor, kind: str, block: int, out: Tensor) -> None:
    """Both elements of a byte by one lookup of eight bytes; out [n] rounds once."""
    pairs = _pairs(kind, codes.device).index_select(0, codes.int()).view(torch.float32)
    full = len(out) // block
    pairs[: full * block].view(full, block).mul_(scales[:full, None])
    pairs[full * block :].mul_(scales[-1])
    out.copy_(pairs[: len(out)])


@functools.cache
@torch.inference_mode(False)
def _codebook(kind: str, device: torch.device) -> Tensor:
    return CODEBOOKS[kind].to(device)


@functools.cache
@torch.inference_mode(False)
def _dynamic(device: torch.device) -> Tensor:
    return dynamic_map().to(device)


@functools.cache
@torch.inference_mode(False)
def _sorted_codebook(kind: str, device: torch.device) -> tuple[Tensor, list[float], Tensor]:
    """Ascending values [16], the 15 midpoints between them, and the code of each value."""
    values, order = CODEBOOKS[kind].sort(stable=True)
    bounds = ((values[:-1] + values[1:]) / 2).tolist()
    return values.to(device), bounds, order.to(device, torch.uint8)


@functools.cache
@torch.inference_mode(False)
def _pairs(kind: str, device: torch.device) -> Tensor:
    """int64 [256]: for each byte the bits of its two elements, side by side."""
    byte, book = torch.arange(256, device="cpu"), CODEBOOKS[kind]
    both = torch.stack([book[byte >> 4], book[byte & 15]], 1)
    return both.view(torch.int64).view(-1).to(device)
