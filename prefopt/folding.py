"""Hidden states -> the target's logit and the log-sum-exp of the others, tile by tile.

The logits exist one tile at a time: rows x columns of hidden @ weight.T, folded into running
statistics by `tiles` (torch) or `prefopt_kernels.logprob` (Triton). Three backward passes:

- *unit*, where only the hidden states want a gradient: d t / d h = W[y] and d lse / d h = the
  softmax's mean of W need nothing from upstream, so the forward takes that mean along while the
  tile is at hand. 4 N D V flops in all, and neither hidden states nor logits are kept.
- *retain*, where the head trains or the entropy is wanted and the logits fit `RETAIN_BYTES`: 6 NDV.
- *recompute* otherwise: tiles are formed again, 8 N D V (6 where the head is frozen).

Shapes: N rows, D hidden size, V vocabulary, R x C one tile; see tiles.py for z' and "others".
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prefopt import dispatch, tiles
from prefopt.tiles import Head, wide

RETAIN_BYTES = {"cpu": 256 << 20}  # of logits kept for the backward; other devices: 1 GiB
TILE = {"cpu": 2 << 20}  # elements of a tile; other devices: 16 Mi (32 MiB in 16 bits: the L2)
UNIT_TILE = {"cpu": 2 << 20}  # the same where a tile meets two products; other devices: 128 Mi


class Folded(NamedTuple):
    """Differentiable pieces of log p(target): [N] each, float32 (float64 for float64 input)."""

    target: Tensor  # z' of the target; 0 where it is not in this part of the vocabulary
    lse: Tensor  # log-sum-exp of z' over all other columns
    entropy: Tensor | None  # of the softmax over those
    ref_target: Tensor | None  # the first two again for `ref_hidden`, without gradient
    ref_lse: Tensor | None


class Call(NamedTuple):
    head: Head
    entropy: bool
    ops: Any  # the module with fold, dlogits and target_dot
    fused: Any  # the module with fused_fold, or None


def fold_vocabulary(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    head: Head,
    entropy: bool = False,
    ref_hidden: Tensor | None = None,
    impl: str = "auto",
) -> Folded:
    """hidden [N, D], weight [V, D], targets [N] int64, bias [V], ref_hidden [N, D] -> Folded.

    A target outside [0, V) belongs to another shard of the vocabulary. `ref_hidden`: a second set
    of rows with the same head and targets, in the same products, without gradient.
    """
    chosen = dispatch.choose("logprob", hidden.device, impl, hidden.dtype)
    ops = tiles if chosen == "torch" else dispatch.kernels("logprob")
    fused = dispatch.kernels("fused") if chosen == "fused" else None
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        ref_hidden = None if ref_hidden is None else ref_hidden.to(dtype)
    if device == "cpu":
        _keep_freed_memory()
    if ops is not tiles:  # the kernels go along rows
        hidden, weight = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden, weight))
    with torch.autocast(device, enabled=False):
        call = Call(head, entropy, ops, fused)
        found = _Fold.apply(hidden, weight, bias, targets.contiguous(), ref_hidden, call)
    target, lse, entropies, ref_target, ref_lse = found
    refs = (None, None) if ref_hidden is None else (ref_target, ref_lse)
    return Folded(target, lse, entropies if entropy else None, *refs)


@functools.cache
def _keep_freed_memory() -> None:
    """Have glibc keep freed blocks of up to 31 MiB for the next tile instead of unmapping them.

    It adapts to the largest block it has seen come and go (mallopt(3), M_MMAP_THRESHOLD). Until it
    has, every tile's pages may be taken and zeroed anew.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def tile_shape(n: int, v: int, device: str, *, unit: bool, trains_head: bool) -> tuple[int, int]:
    """Rows and columns of a tile.

    A weight's gradient sums over all rows: with all of them in one tile it is one product per
    column tile, rounded once. Otherwise 1024 rows keep the weight's traffic small beside the
    arithmetic, and the rest of the budget goes to columns.
    """
    budget = (UNIT_TILE if unit else TILE).get(device, (128 if unit else 16) << 20)
    most = 8192 if trains_head else 1024 if device == "cpu" else 4096
    if unit and device != "cpu":
        most = min(most, max(512, budget // v))  # whole rows, if that leaves enough of them
    parts = -(-n // most)
    rows = -(-n // max(1, parts))
    rows = max(16, -(-rows // 16) * 16)  # even parts; each new row count costs oneDNN a compilation
    columns = max(256, min(budget // rows, 4096 if device == "cpu" else v) // 256 * 256)
    return rows, min(columns, v)


def _spans(n: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]


def _options(call: Call, bias: Tensor | None, columns: slice) -> dict[str, Any]:
    return call.head._asdict() | {"bias": None if bias is None else bias[columns]}


def _fold_rows(h, y, weight, bias, call: Call, columns: int, units: int, kept: list[Tensor] | None):
    """A chunk of rows over the vocabulary -> lse, entropy, and the mean of W for `units` rows."""
    out = wide(h.dtype)
    lse, share = h.new_empty(len(h), dtype=out), h.new_empty(len(h), dtype=out)
    entropy = h.new_empty(len(h), dtype=out) if call.entropy else None
    mean = None
    for part in _spans(len(weight), columns):
        z = dispatch.mm_nt(h, weight[part])
        p = None if not units else z if units == len(h) else z[:units]
        call.ops.fold(
            z, y - part.start, lse, share, entropy=entropy, p=p, first=part.start == 0,
            **_options(call, bias, part),
        )  # fmt: skip
        if p is not None:
            values = dispatch.add_mm_nt(None, p, weight[part].t())
            mean = values if mean is None else mean.lerp_(values, share[:units, None])
        if kept is not None:
            kept.append(z)
    return lse, entropy, mean


def _fused_rows(h, y, weight, bias, call: Call):
    options = _options(call, bias, slice(None))
    return *call.fused.fused_fold(h, weight, y, entropy=call.entropy, **options), None


def _target(h, y, weight, bias, call: Call) -> Tensor:
    """z' of the target, from a product in float32 whatever the type of h; 0 where y is outside."""
    raw, inside = call.ops.target_dot(h, weight, y), (y >= 0) & (y < len(weight))
    own_bias = None if bias is None else bias[torch.where(inside, y, 0)]
    return torch.where(inside, tiles.transform(raw, own_bias, call.head)[0], 0.0)


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, targets, ref_hidden, call: Call):
        wants_hidden, *wants_head = ctx.needs_input_grad[:3]
        n, v, out = len(targets), len(weight), wide(hidden.dtype)
        trains_head = any(wants_head)
        grad = wants_hidden or trains_head
        unit = wants_hidden and not (trains_head or call.entropy or call.fused)
        shape = tile_shape(n, v, hidden.device.type, unit=unit, trains_head=trains_head)
        fits = n * v * hidden.itemsize <= RETAIN_BYTES.get(hidden.device.type, 1 << 30)
        kept = [] if grad and fits and not (unit or call.fused or ref_hidden is not None) else None
        sets = 1 if ref_hidden is None else 2
        target = hidden.new_empty(sets, n, dtype=out)
        lse = hidden.new_empty(sets, n, dtype=out)
        entropy = hidden.new_empty(n if call.entropy else 0, dtype=out)
        mean = hidden.new_empty(hidden.shape, dtype=out) if unit else None
        for rows in _spans(n, shape[0]):
            h, y = hidden[rows], targets[rows]
            if ref_hidden is not None:
                h, y = torch.cat([h, ref_hidden[rows]]), torch.cat([y, y])
            target[:, rows] = _target(h, y, weight, bias, call).view(sets, -1)
            units = rows.stop - rows.start if unit else 0
            row_lse, row_entropy, row_mean = (
                _fold_rows(h, y, weight, bias, call, shape[1], units, kept)
                if call.fused is None
                else _fused_rows(h, y, weight, bias, call)
            )
            lse[:, rows] = row_lse.view(sets, -1)
            if row_entropy is not None:
                entropy[rows] = row_entropy
            if mean is not None:
                mean[rows] = row_mean
        ctx.call, ctx.shape, ctx.has_bias = call, shape, bias is not None
        ctx.hidden_dtype, ctx.unit = hidden.dtype, unit
        saved = [weight, targets, target[0], *([bias] if bias is not None else [])]
        if unit:
            ctx.save_for_backward(*saved, mean)
        elif grad:
            ctx.save_for_backward(*saved, hidden, lse[0], entropy, *(kept or ()))
        refs = (target[1], lse[1]) if sets == 2 else (target[:0], lse[:0])
        ctx.mark_non_differentiable(*refs, *(() if call.entropy else (entropy,)))
        return target[0], lse[0], entropy, *refs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_target, g_lse, g_entropy, *_):  # type: ignore[override]
        weight, targets, target, *rest = ctx.saved_tensors
        bias = rest.pop(0) if ctx.has_bias else None
        # what reaches the target's raw logit
        own = g_target * ctx.call.head.gain
        if ctx.call.head.softcap is not None:
            own *= 1 - (target * (ctx.call.head.temperature / ctx.call.head.softcap)) ** 2
        own = torch.where((targets >= 0) & (targets < len(weight)), own, 0.0)
        if ctx.unit:
            grads = (_unit_backward(ctx, weight, targets, rest[0], own, g_lse), None, None)
        else:
            upstream = own, g_lse, g_entropy.contiguous() if ctx.call.entropy else None
            grads = _tile_backward(ctx, weight, bias, targets, upstream, *rest)
        return (*grads, None, None, None)


def _unit_backward(ctx, weight, targets, mean, own, g_lse) -> Tensor:
    grad = mean.new_empty(mean.shape, dtype=ctx.hidden_dtype)
    y, gain = targets.clamp(0, len(weight) - 1), ctx.call.head.gain
    for rows in _spans(len(y), ctx.shape[0]):
        part = weight.index_select(0, y[rows]).to(mean.dtype).mul_(own[rows, None])
        grad[rows] = part.addcmul_(mean[rows], (g_lse[rows] * gain)[:, None])
    return grad


def _tile_backward(ctx, weight, bias, targets, upstream, hidden, lse, entropy, *kept):
    """Drops the rows that no gradient reaches (on the CPU: elsewhere finding them would sync)."""
    rows = (targets, *upstream, hidden, lse, entropy if upstream[2] is not None else None)
    live = None
    if not kept and hidden.device.type == "cpu":
        live = torch.stack([x != 0 for x in upstream if x is not None]).any(0)
        rows = tuple(x if x is None else x[live] for x in rows) if not live.all() else rows
    d_hidden, d_weight, d_bias = _tile_gradients(ctx, weight, bias, rows, kept)
    if d_hidden is not None and live is not None and len(d_hidden) < len(hidden):
        d_hidden = torch.zeros_like(hidden).masked_scatter_(live[:, None], d_hidden)
    return d_hidden, d_weight, None if d_bias is None else d_bias.to(bias.dtype)


def _tile_gradients(ctx, weight, bias, rows, kept):
    """A trained head goes column by column over all rows: each part of its gradient is summed in
    float32 and rounded once, without a float32 copy of the whole. A frozen one goes row by row.
    """
    targets, own, g_lse, g_entropy, hidden, lse, entropy = rows
    (wants_hidden, *wants_head), call = ctx.needs_input_grad[:3], ctx.call
    n, out = len(hidden), wide(hidden.dtype)
    d_hidden = torch.empty_like(hidden) if wants_hidden else None
    d_weight = torch.zeros_like(weight) if wants_head[0] else None
    d_bias = weight.new_zeros(len(weight), dtype=out) if wants_head[1] else None
    parts = _spans(len(weight), ctx.shape[1])
    for block in _spans(n, n if any(wants_head) else ctx.shape[0]) if n else ():
        dx = hidden.new_zeros(block.stop - block.start, hidden.shape[1], dtype=out)
        for j, part in enumerate(parts):
            dw = None
            for r in _spans(block.stop - block.start, ctx.shape[0]):
                at = slice(block.start + r.start, block.start + r.stop)
                w, h, y = weight[part], hidden[at], targets[at] - part.start
                if kept:
                    z = kept[at.start // ctx.shape[0] * len(parts) + j]
                    dz = torch.empty_like(z)
                else:
                    z = dz = dispatch.mm_nt(h, w)
                call.ops.dlogits(
                    z, y, lse[at], -g_lse[at], dz,
                    g_entropy=None if g_entropy is None else g_entropy[at],
                    entropy=None if g_entropy is None else entropy[at],
                    **_options(call, bias, part),
                )  # fmt: skip
                if wants_hidden:  # without the target, whose term is added in float32 below
                    dispatch.add_mm_nt(dx[r], dz, w.t())
                if d_weight is not None:
                    dw = _add_weight(dw, dz, h, y, own[at])
                if d_bias is not None:
                    _put(dz, y, own[at])
                    d_bias[part] += dz.sum(0, dtype=out)
            if d_weight is not None and dw is not None:
                d_weight[part] = dw
        if d_hidden is not None:
            _add_own(d_hidden[block], dx, weight, targets[block], own[block], ctx.shape[0])
    return d_hidden, d_weight, d_bias


def _add_weight(dw: Tensor | None, dz: Tensor, h: Tensor, y: Tensor, own: Tensor) -> Tensor:
    """dw + (dz with the targets' own terms).T @ h, [C, D] in float32."""
    if h.device.type != "cpu":
        _put(dz, y, own)
        return dispatch.add_mm_nt(dw, dz.t(), h.t())
    # Out of the 16-bit product: the largest terms keep their digits. Elsewhere finding the rows
    # would wait for the device, and adding them up in no fixed order would not be repeatable.
    dw = dispatch.add_mm_nt(dw, dz.t(), h.t())
    rows = ((y >= 0) & (y < dz.shape[1])).nonzero()[:, 0]
    return dw.index_add_(0, y[rows], h[rows].to(dw.dtype).mul_(own[rows, None]))


def _put(dz: Tensor, y: Tensor, own: Tensor) -> None:
    """dz[r, y_r] = own[r] where y_r is a column of this tile."""
    inside, column = ((y >= 0) & (y < dz.shape[1]))[:, None], y.clamp(0, dz.shape[1] - 1)[:, None]
    dz.scatter_(1, column, torch.where(inside, own[:, None].to(dz.dtype), dz.gather(1, column)))


def _add_own(grad: Tensor, others: Tensor, weight: Tensor, y: Tensor, own: Tensor, step: int):
    """grad = own * W[y] + others, [N, D], rounded once."""
    y = y.clamp(0, len(weight) - 1)
    for rows in _spans(len(y), step):
        chosen = weight.index_select(0, y[rows]).to(others.dtype)
        grad[rows] = others[rows].addcmul_(chosen, own[rows, None])
