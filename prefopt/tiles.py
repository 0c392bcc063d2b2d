"""One tile of logits at a time: the torch specification of `prefopt_kernels.logprob`.

z' = cap(scale * (raw + bias)) / temperature, cap(x) = softcap * tanh(x / softcap), and
slope = d cap / d x. "Others" are the columns besides the row's target: the target is held apart
until the end, so that log p near 0 and 1 - p keep their digits, and so that no matrix product in
16 bits decides over it. Shapes: R rows, C columns of the tile, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

# Stands for -inf in logits and in log-sum-exps: finite, so that no difference of two is NaN. A row
# without any other column keeps it as its lse, and its weight exp(lse - target) is exactly 0.
NEVER = -1e30


class Head(NamedTuple):
    """What turns a raw logit (with its bias) into z'."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def gain(self) -> float:
        """d z' / d raw where the softcap does not bend."""
        return self.scale / self.temperature


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of sums and results: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def transform(x: Tensor, bias: Tensor | None, head: Head) -> tuple[Tensor, Tensor | None]:
    """raw -> z' and slope (None: 1 everywhere); overwrites x."""
    slope = None
    if bias is not None:
        x += bias
    if head.scale != 1.0:
        x *= head.scale
    if head.softcap is not None:
        t = x.div_(head.softcap).tanh_()
        slope = 1 - t * t
        x = t.mul_(head.softcap)
    return (x.div_(head.temperature) if head.temperature != 1.0 else x), slope


class _Tile(NamedTuple):
    z: Tensor | None  # z', kept for the entropy only
    q: Tensor  # softmax over the others of this tile alone, [R, C]
    lse: Tensor  # and their log-sum-exp, [R]
    slope: Tensor | None


def _tile(raw: Tensor, y: Tensor, bias: Tensor | None, head: Head, entropy: bool, overwrite: bool):
    x = raw.to(wide(raw.dtype))
    if x is raw and not overwrite:
        x = raw.clone()
    x, slope = transform(x, bias, head)
    if bias is not None:
        x.clamp_min_(NEVER)
    y = y[:, None]
    column = y.clamp(0, x.shape[1] - 1)
    x.scatter_(1, column, torch.where(column == y, NEVER, x.gather(1, column)))
    top = x.amax(1)
    # One fused, vectorised pass in place of max, subtract, exp, sum and divide. Its largest element
    # is exp(top - lse), which gives the sum without a second pass of exponentials.
    q = torch.softmax(x, 1, out=torch.empty_like(x) if entropy else x)
    return _Tile(x if entropy else None, q, top.sub_(q.amax(1).log_()), slope)


def _own_entropy(tile: _Tile) -> Tensor:
    """Of the others of this tile alone, [R]; overwrites tile.z."""
    assert tile.z is not None
    return -torch.linalg.vecdot(tile.q, tile.z.sub_(tile.lse[:, None]))


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
    """Take a tile of raw logits z [R, C] into the lse [R] and the entropy [R] of the others so far.

    y [R] int64: the target's column in this tile; anything outside [0, C) if it is not in it.
    share [R] becomes the weight of this tile among the columns so far, exp(tile's lse - new lse),
    and p [<= R, C] (it may be z) softmax * slope over this tile alone, so that a mean over all
    columns moves on as ``mean.lerp_(p @ values, share)``. With `first`, what lse and entropy held
    is ignored. Columns of -inf come from the bias alone.
    """
    tile = _tile(z, y, bias, Head(scale, softcap, temperature), entropy is not None, p is z)
    before = lse.clone()
    if first:
        lse.copy_(tile.lse)
        share.fill_(1.0)
    else:
        torch.logaddexp(before, tile.lse, out=lse)
        torch.exp(tile.lse - lse, out=share)
    if entropy is not None:
        # each part's own entropy, moved from its log-sum-exp to the new one: sums of p (lse - z')
        within = _own_entropy(tile).add_(lse - tile.lse)
        if first:
            entropy.copy_(within)
        else:
            entropy.add_(lse - before).lerp_(within, share)
    if p is not None:
        q = tile.q if tile.slope is None else tile.q.mul_(tile.slope)
        p.copy_(q if len(p) == len(q) else q[: len(p)])  # onto itself where it was made in place


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
    """out = -p (g + g_entropy (z' - lse + entropy)) slope scale / temperature, 0 at the target.

    p = exp(z' - lse); z and out (it may be z) [R, C], the others [R]. With the lse and entropy of
    the others this is the gradient of ``g_entropy * entropy - g * lse`` by the raw logits.
    """
    head = Head(scale, softcap, temperature)
    tile = _tile(z, y, bias, head, g_entropy is not None, overwrite=out is z)
    weight = (tile.lse - lse).exp_().mul_(-head.gain)
    q = tile.q
    if g_entropy is not None:
        assert entropy is not None and tile.z is not None
        own = tile.z.sub_((lse - entropy)[:, None]).mul_(g_entropy[:, None]).add_(g[:, None])
        q = q.mul_(weight[:, None]).mul_(own)
    else:
        q = q.mul_((weight * g)[:, None])
    out.copy_(q if tile.slope is None else q.mul_(tile.slope))


def target_dot(hidden: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    """hidden[r] . weight[y_r] in float32: [R, D], [V, D], [R] int64 -> [R]; 0 for y outside."""
    inside = (y >= 0) & (y < len(weight))
    own = weight.index_select(0, torch.where(inside, y, 0)).to(wide(weight.dtype))
    return torch.where(inside, torch.linalg.vecdot(hidden.to(own.dtype), own), 0.0)


def _given(logits: Tensor) -> Tensor:
    return logits.to(wide(logits.dtype)).clamp_min(NEVER)  # always a copy, to work in


def _gather_chunks(logits: Tensor) -> list[slice]:
    """Rows such that a float32 copy of them takes 8 MiB on the CPU, 256 MiB elsewhere."""
    budget = (2 if logits.device.type == "cpu" else 64) << 20
    step = max(1, budget // max(1, logits.shape[1]))
    return [slice(i, i + step) for i in range(0, len(logits), step)]


def gather_forward(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """log p(target), log-sum-exp and entropy of given logits: [N, V], [N] int64 -> [N] each.

    Rows whose target is `ignore_index` give 0 in all three.
    """
    head, n, out = Head(scale, softcap, temperature), len(targets), wide(logits.dtype)
    logps, lse = logits.new_zeros(n, dtype=out), logits.new_zeros(n, dtype=out)
    entropies = logits.new_zeros(n, dtype=out) if entropy else None
    for rows in _gather_chunks(logits):
        y = targets[rows]
        live = y != ignore_index
        target = transform(_given(logits[rows].gather(1, y.clamp_min(0)[:, None])), None, head)[0]
        tile = _tile(_given(logits[rows]), y, None, head, entropy, overwrite=True)
        x = target[:, 0] - tile.lse
        log_p, log_q = logsigmoid(x), logsigmoid(-x)
        logps[rows] = torch.where(live, log_p, 0.0)
        lse[rows] = torch.where(live, torch.logaddexp(target[:, 0], tile.lse), 0.0)
        if entropies is not None:
            both = log_q.exp() * (_own_entropy(tile) - log_q.clamp_min(NEVER))
            entropies[rows] = torch.where(live, both - log_p.exp() * log_p.clamp_min(NEVER), 0.0)
    return logps, lse, entropies


def gather_backward(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    entropies: Tensor | None,
    g: Tensor,
    *,
    g_entropy: Tensor | None = None,
    g_lse: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient of what `gather_forward` gives by the logits [N, V]; `out` may be the logits."""
    head = Head(scale, softcap, temperature)
    grad = torch.empty_like(logits) if out is None else out
    for rows in _gather_chunks(logits):
        y, live = targets[rows], (targets[rows] != ignore_index)[:, None]
        at = y.clamp_min(0)[:, None]
        log_p, slope = transform(_given(logits[rows].gather(1, at)), None, head)
        log_p = log_p[:, 0] - lse[rows]
        own = -g[rows] * log_p.expm1()
        others = g[rows]
        options = head._asdict()
        if g_lse is not None:
            own, others = own + g_lse[rows] * log_p.exp(), others - g_lse[rows]
        if g_entropy is not None:
            assert entropies is not None
            own = own - g_entropy[rows] * log_p.exp() * (log_p.clamp_min(NEVER) + entropies[rows])
            options |= {"g_entropy": g_entropy[rows], "entropy": entropies[rows]}
        dz = _given(logits[rows])
        dlogits(dz, y, lse[rows], others, dz, **options)
        own = own[:, None] * head.gain
        dz.scatter_(1, at, own if slope is None else own * slope)
        grad[rows] = torch.where(live, dz, 0.0)
    return grad
