"""Hidden states or logits -> log-probs of given tokens, without keeping ``[N, V]``.

This file is the specification: plain torch, chunked over rows so that the logits in memory never
exceed a fixed workspace. Two backward passes (docs/design.md has the derivations):

- *unit*, when the head is frozen: d log p(y) / d h = W[y] - softmax(z) @ W needs nothing from
  upstream, so the forward forms it while the logits are at hand. 4 N D V flops in all.
- *recompute*, when the head trains or the entropy is wanted: the logits are formed again.

z = cap(scale * (h @ W.T + bias)) / temperature, cap(x) = softcap * tanh(x / softcap).
Shapes: N rows, D hidden size, V vocabulary, R responses, C rows of one chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prefopt import dispatch

WORKSPACE_BYTES = {"cpu": 16 << 20}  # for the logits of one chunk; other devices: 256 MiB


class _Head(NamedTuple):
    """What turns hidden states into logits, besides the weight."""

    temperature: float
    softcap: float | None
    scale: float


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    entropy: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(z)[targets] for z = head(hidden), and optionally the entropy of softmax(z).

    hidden [N, D], weight [V, D], targets [N] int64, bias [V] -> [N], or ([N], [N]) in nats;
    float32, or float64 for float64 input. 16-bit inputs are multiplied in their own precision and
    accumulated in float32; the target's logit is formed again in float32, because rounding that
    one number would move the sum over a response by 0.1 nats and more.
    """
    assert hidden.dim() == 2 and weight.dim() == 2 and hidden.shape[1] == weight.shape[1]
    assert targets.shape == hidden.shape[:1], (targets.shape, hidden.shape)
    dispatch.choose("logprob", hidden.device, impl)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    head = _Head(temperature, softcap, scale)
    with torch.autocast(device, enabled=False):
        logps, entropies = _TokenLogprobs.apply(hidden, weight, bias, targets, head, entropy)
    return (logps, entropies) if entropy else logps


def _result_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _row_chunks(rows: int, columns: int, like: Tensor) -> range:
    budget = WORKSPACE_BYTES.get(like.device.type, 256 << 20)
    return range(0, rows, max(1, budget // (columns * _result_dtype(like).itemsize)))


def _logits(h: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, head: _Head):
    """z [C, V] in the result dtype, and its derivative by the raw logit (None: a constant)."""
    z = dispatch.mm_nt(h, weight).to(_result_dtype(h))
    if h.dtype.itemsize == 2:
        exact = (h.float() * weight[y].float()).sum(1, keepdim=True)
        z.scatter_(1, y[:, None], exact)
    if bias is not None:
        z += bias
    if head.scale != 1.0:
        z *= head.scale
    slope = None
    if head.softcap is not None:
        t = z.div_(head.softcap).tanh_()
        slope = 1 - t * t
        z = t * head.softcap
    return (z.div_(head.temperature) if head.temperature != 1.0 else z), slope


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, targets, head: _Head, entropy: bool):
        trains_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        unit = ctx.needs_input_grad[0] and not trains_head and not entropy
        n, out = len(targets), _result_dtype(hidden)
        logps, lse = hidden.new_empty(n, dtype=out), hidden.new_empty(n, dtype=out)
        entropies = hidden.new_empty(n if entropy else 0, dtype=out)
        units = torch.empty_like(hidden, dtype=out) if unit else None  # rounded once, by backward
        chunks = _row_chunks(n, len(weight), hidden)
        for start in chunks:
            rows = slice(start, start + chunks.step)
            y = targets[rows]
            z, slope = _logits(hidden[rows], weight, bias, y, head)
            top = z.amax(1, keepdim=True)
            target_z = z.gather(1, y[:, None])
            p = z.sub_(top).exp_() if not entropy else z.sub(top).exp_()
            total = p.sum(1, keepdim=True)
            log_total = total.log()
            lse[rows] = (log_total + top)[:, 0]
            logps[rows] = (target_z - top - log_total)[:, 0]
            if entropy:
                zp = torch.where(p > 0, z * p, 0).sum(1, keepdim=True)  # 0 log 0 = 0, also at -inf
                entropies[rows] = (log_total + top - zp / total)[:, 0]
            if units is not None:
                units[rows] = _unit(p.div_(total), slope, weight, y, head)
        ctx.unit, ctx.head, ctx.has_bias = unit, head, bias is not None
        ctx.hidden_dtype = hidden.dtype
        if unit:
            ctx.save_for_backward(units)
        elif any(ctx.needs_input_grad):
            saved = (hidden, weight, targets, lse, entropies)
            ctx.save_for_backward(*saved, *((bias,) if bias is not None else ()))
        ctx.mark_non_differentiable(*(() if entropy else (entropies,)))
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, g_entropy: Tensor):  # type: ignore[override]
        if ctx.unit:
            (units,) = ctx.saved_tensors
            return ((units * g[:, None]).to(ctx.hidden_dtype), *(None,) * 5)
        hidden, weight, targets, lse, entropies, *bias = ctx.saved_tensors
        if not entropies.numel():
            g_entropy = torch.zeros_like(g)
        grads = _recompute_backward(
            (hidden, weight, bias[0] if bias else None, targets, lse, entropies),
            (g, g_entropy), ctx.head, ctx.needs_input_grad[:3],
        )  # fmt: skip
        return (*grads, None, None, None)


def _unit(p, slope, weight, y, head: _Head) -> Tensor:
    """d log p(y) / d h = c * (slope_y (1 - p_y) W[y] - sum_{k != y} slope_k p_k W[k]), [C, D].

    c = scale / temperature. The target stays out of the matrix product: with p_y near 1 the two
    terms would cancel in 16 bits, and 1 - p_y is exact as the sum of the others.
    """
    p.scatter_(1, y[:, None], 0)
    own = p.sum(1, keepdim=True) * weight[y].to(p.dtype)
    if slope is not None:
        p, own = p.mul_(slope), own.mul_(slope.gather(1, y[:, None]))
    others = dispatch.mm_nt(p.to(weight.dtype), weight.t()).to(p.dtype)
    return own.sub_(others).mul_(head.scale / head.temperature)


def _recompute_backward(saved, upstream, head: _Head, needs):
    hidden, weight, bias, targets, lse, entropies = saved
    wants_hidden, wants_weight, wants_bias = needs
    out = _result_dtype(hidden)
    d_hidden = torch.zeros_like(hidden) if wants_hidden else None
    d_weight = torch.zeros_like(weight, dtype=out) if wants_weight else None
    d_bias = torch.zeros(len(weight), dtype=out, device=weight.device) if wants_bias else None
    live = (upstream[0] != 0) | (upstream[1] != 0)  # a row without upstream gradient costs nothing
    alive = live.nonzero()[:, 0] if hidden.device.type == "cpu" else None  # no sync elsewhere
    count = len(targets) if alive is None else len(alive)
    chunks = _row_chunks(count, len(weight), hidden)
    for start in chunks:
        end = min(start + chunks.step, count)
        rows = slice(start, end) if alive is None else alive[start:end]
        h, y, g, gh = hidden[rows], targets[rows], upstream[0][rows, None], upstream[1][rows, None]
        z, slope = _logits(h, weight, bias, y, head)
        logp = z - lse[rows, None]
        p = logp.exp()
        if entropies.numel():
            # d H / d z = -p (log p + H), and p log p -> 0 where p = 0
            dz = -p * (g + gh * (logp.clamp_min_(-1e30) + entropies[rows, None]))
        else:
            dz = p.mul_(-g)
        dz.scatter_add_(1, y[:, None], g.to(dz.dtype))
        dz *= head.scale / head.temperature
        if slope is not None:
            dz *= slope
        if d_bias is not None:
            d_bias += dz.sum(0)
        dz = dz.to(hidden.dtype)
        if d_hidden is not None:
            d_hidden[rows] = dispatch.mm_nt(dz, weight.t())
        if d_weight is not None:
            d_weight += dispatch.mm_nt(dz.t(), h.t())
    return (
        d_hidden,
        d_weight.to(weight.dtype) if d_weight is not None else None,
        d_bias.to(bias.dtype) if d_bias is not None else None,
    )


def gather_logprobs(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, impl: str = "auto"
) -> Tensor:
    """log softmax(logits / temperature)[targets]: [..., V], [...] int64 -> [...], float32 or 64."""
    assert logits.shape[:-1] == targets.shape, (logits.shape, targets.shape)
    dispatch.choose("gather", logits.device, impl)
    flat = _GatherLogprobs.apply(logits.flatten(0, -2), targets.flatten(), temperature)
    return flat.view(targets.shape)


class _GatherLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits, targets, temperature: float):
        n, out = len(targets), _result_dtype(logits)
        lse = logits.new_empty(n, dtype=out)
        chunks = _row_chunks(n, max(1, logits.shape[1]), logits)
        for start in chunks:
            rows = slice(start, start + chunks.step)
            lse[rows] = (logits[rows].to(out) / temperature).logsumexp(1)
        ctx.save_for_backward(logits, targets, lse)
        ctx.temperature = temperature
        return logits.gather(1, targets[:, None])[:, 0].to(out) / temperature - lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor):  # type: ignore[override]
        logits, targets, lse = ctx.saved_tensors
        grad, t = torch.empty_like(logits), ctx.temperature
        chunks = _row_chunks(len(targets), max(1, logits.shape[1]), logits)
        for start in chunks:
            rows = slice(start, start + chunks.step)
            dz = (logits[rows].to(lse.dtype) / t - lse[rows, None]).exp_().mul_(-g[rows, None])
            dz.scatter_add_(1, targets[rows, None], g[rows, None])
            grad[rows] = dz.div_(t)
        return grad, None, None


def sequence_logprobs(
    logprobs: Tensor, response_ids: Tensor, num_responses: int, *, average: bool = False
) -> Tensor:
    """Sum (or mean) of the token log-probs of each response: [N], [N] int64 -> [R].

    Added up in float64, one response after another in token order, so that neither packing nor the
    place in a batch changes a bit of the result.
    """
    assert logprobs.shape == response_ids.shape and logprobs.dim() == 1
    order = response_ids.argsort(stable=True)
    lengths = torch.bincount(response_ids, minlength=num_responses)
    assert len(lengths) == num_responses, "response_ids beyond num_responses"
    ordered = logprobs[order]
    if ordered.device.type != "mps":  # which has no float64
        ordered = ordered.double()
    sums = torch.segment_reduce(ordered, "sum", lengths=lengths, unsafe=True)
    if average:
        sums = sums / lengths.clamp_min(1)
    return sums.to(logprobs.dtype)
