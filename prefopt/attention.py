"""Attention over runs: each prompt encoded once, each response seeing its prompt and itself.

Hangs on transformers' own hooks: an attention function called "prefopt", a mask function that
returns None, and the run table as the extra forward argument ``segments``. A response run attends
to the keys of its prompt and its own, bottom-right causal, which is what it would see alone:

            p0 p1 p2  a0 a1  b0 b1
        a0   x  x  x   x
        a1   x  x  x   x  x
        b0   x  x  x          x
        b1   x  x  x          x  x

In 16 bits on CUDA one varlen call serves all runs, and only the prompt's keys and values are
gathered again. Everywhere else queries go in blocks against the keys they see (``_Blocks``): runs
of preference data are short, and for a few hundred keys plain matrix products beat torch's CPU
flash attention, in the bfloat16 backward by five times (docs/design.md).

Shapes: T tokens, L queries of a block, M keys it sees, H query heads, G key/value heads, r = H / G,
d head size, e that of the values (another one in multi-head latent attention, else d).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

NAME = "prefopt"
QUERY_BLOCK = 128  # bounds the scores in memory to [H, 128, M]
# Of what models hand over, what changes the result: sinks, biases, chosen keys.
REFUSED = ("s_aux", "sinks", "position_bias", "indices", "block_indices")
asked_windows: set[int] = set()  # of all masks that models asked for: see Runs.windows


class Runs:
    """The run table of one batch, and what all layers share of it."""

    def __init__(self, segments: Tensor, device: torch.device):
        self.table: list[tuple[int, int, int, int]] = [tuple(row) for row in segments.tolist()]
        self.device = device
        # How a probe sees that every layer came by, and with the window its mask would have had.
        self.calls = 0
        self.windows: set[int | None] = set()
        self.head_size = 0  # the largest
        self._blocks: dict[int | None, list[_Block]] = {}

    def blocks(self, window: int | None) -> list[_Block]:
        """The queries and keys that every layer with this window goes through."""
        if window not in self._blocks:
            self._blocks[window] = list(_blocks(self, window))
        return self._blocks[window]

    @functools.cached_property
    def varlen(self) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """(rows of K and V to gather [sum M], cu_seq_q, cu_seq_k, longest L, longest M)."""
        keys = [[*range(p0, p1), *range(start, end)] for start, end, p0, p1 in self.table]
        lengths, counts = [b - a for a, b, *_ in self.table], [len(run) for run in keys]
        gather = torch.tensor([i for run in keys for i in run])
        cu_q = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        cu_k = torch.tensor([0, *counts]).cumsum(0, dtype=torch.int32)
        gather, cu_q, cu_k = (x.to(self.device, non_blocking=True) for x in (gather, cu_q, cu_k))
        return gather, cu_q, cu_k, max(lengths), max(counts)


def run_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Runs,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **unused,
) -> tuple[Tensor, None]:
    """query [1, H, T, d], key [1, G, T, d], value [1, G, T, e] -> ([1, T, H, e], None).

    The signature of transformers' AttentionInterface. Arguments that would change the result and
    are not served here (REFUSED, a mask, dropout) raise; the policy then says so and pads. Under
    autocast it works in autocast's dtype, as transformers' own attention does.
    """
    refused = {name: unused.get(name) for name in REFUSED}
    for name, given in (refused | {"mask": attention_mask, "dropout": dropout or None}).items():
        if given is not None:
            raise NotImplementedError(f"attention with {name} cannot share a prompt")
    assert query.shape[0] == 1
    segments.calls += 1
    segments.windows.add(sliding_window)
    segments.head_size = max(segments.head_size, query.shape[-1])
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if softcap is None and value.shape == key.shape and varlen_obstacle(query) is None:
        return _varlen(query, key, value, segments, scale, sliding_window), None
    how = _How(scale, sliding_window, softcap)
    with torch.autocast(device, enabled=False):
        return _Blocks.apply(query[0], key[0], value[0], segments, how)[None], None


class _How(NamedTuple):
    scale: float
    window: int | None
    softcap: float | None


class _Block(NamedTuple):
    """Queries [start, end) and the keys they see: a piece of the prompt and a piece of the run."""

    start: int
    end: int
    prompt: slice
    own: slice
    bias: Tensor | None  # [L, M] float32: -inf where a query must not look, else 0; None: all 0


def _blocks(runs: Runs, window: int | None) -> Iterator[_Block]:
    known: dict[tuple[int, int, int], Tensor] = {}  # runs of one length share a bias
    for run_start, run_end, p0, p1 in runs.table:
        for start in range(run_start, run_end, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, run_end)
            behind = p1 - p0 + start - run_start  # position of the first query in its sequence
            first = 0 if window is None else max(0, behind - window + 1)
            prompt = slice(min(p0 + first, p1), p1)
            own = slice(run_start + max(0, first - (p1 - p0)), end)
            shape = end - start, behind, first
            if end - start > 1 and shape not in known:
                known[shape] = _bias(*shape, window, runs.device)
            yield _Block(start, end, prompt, own, known.get(shape))


def _bias(
    queries: int, behind: int, first: int, window: int | None, device: torch.device
) -> Tensor:
    """Of so many queries from position `behind` on keys from position `first` on, [L, M]."""
    query = torch.arange(behind, behind + queries, device=device)[:, None]
    distance = query - torch.arange(first, behind + queries, device=device)
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    return torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float("-inf"))


def _keys(x: Tensor, block: _Block) -> Tensor:
    """The rows of x [G, T, d] that a block sees, [G, M, d]."""
    if block.prompt.start == block.prompt.stop:
        return x[:, block.own]
    if block.prompt.stop == block.own.start:  # the first response stands right behind its prompt
        return x[:, block.prompt.start : block.own.stop]
    return torch.cat([x[:, block.prompt], x[:, block.own]], 1)


class _Blocks(torch.autograd.Function):
    """Softmax attention of every run, block by block; saves q, k, v and the output only.

    Scores and softmax are float32 (float64 for float64); everything else is in the input's dtype.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, runs: Runs, how: _How) -> Tensor:
        heads, tokens, _ = q.shape
        out = q.new_zeros(tokens, heads, v.shape[-1])  # a row of no run is padding
        for block in runs.blocks(how.window):
            rows = slice(block.start, block.end)
            weights = _scores(q[:, rows], _keys(k, block), block, how).softmax(-1)
            mixed = _product(weights.to(q.dtype), _keys(v, block))  # [G, r L, e]
            out[rows] = mixed.reshape(heads, -1, v.shape[-1]).transpose(0, 1)
        ctx.save_for_backward(q, k, v, out)
        ctx.runs, ctx.how = runs, how
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        q, k, v, out = ctx.saved_tensors
        how, (heads, _, d), groups = ctx.how, q.shape, len(k)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        # sum over d of g * out is what the softmax's Jacobian subtracts from every score
        centre = (grad.to(_wide(q)) * out).sum(-1).t()  # [H, T]
        for block in ctx.runs.blocks(how.window):
            rows = slice(block.start, block.end)
            keys, values = _keys(k, block), _keys(v, block)
            scores = _scores(q[:, rows], keys, block, how)
            slope = None
            if how.softcap is not None:
                capped = scores.nan_to_num(neginf=0.0) / how.softcap
                slope = 1 - capped * capped
            weights = scores.softmax(-1)
            g = grad[rows].transpose(0, 1).reshape(groups, -1, v.shape[-1])
            _add_keys(dv, block, _product(weights.to(g.dtype).transpose(1, 2), g))
            ds = torch.bmm(g, values.transpose(1, 2)).to(weights.dtype)
            ds.sub_(centre[:, rows].reshape(groups, -1, 1)).mul_(weights).mul_(how.scale)
            if slope is not None:
                ds.mul_(slope)
            ds = ds.to(g.dtype)
            dq[:, rows] = _product(ds, keys).reshape(heads, -1, d)
            _add_keys(dk, block, _product(ds.transpose(1, 2), _grouped(q[:, rows], groups)))
        return dq, dk, dv, None, None


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _grouped(q: Tensor, groups: int) -> Tensor:
    """[H, L, d] -> [G, r L, d]: the queries of heads that share a key head, one below another."""
    return q.reshape(groups, -1, q.shape[-1])


def _scores(q: Tensor, keys: Tensor, block: _Block, how: _How) -> Tensor:
    """cap(scale q k^T) with -inf where hidden, [G, r L, M]; Gemma 2 caps: c tanh(x / c)."""
    q2, k2 = _grouped(q, len(keys)).to(_wide(q)), keys.to(_wide(q))
    scores = torch.baddbmm(q2.new_zeros(1, 1, 1), q2, k2.transpose(1, 2), beta=0, alpha=how.scale)
    if how.softcap is not None:
        scores = scores.div_(how.softcap).tanh_().mul_(how.softcap)
    if block.bias is not None:
        scores.view(len(keys), -1, *block.bias.shape).add_(block.bias)
    return scores


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [G, n, m] @ b [G, m, d]. Of narrow heads as the transpose of b^T a^T, which fills the
    registers of MKL's kernels; wide ones fill them anyway."""
    if b.shape[-1] >= 32 or b.device.type != "cpu":
        return torch.bmm(a, b)
    return torch.bmm(b.transpose(1, 2), a.transpose(1, 2)).transpose(1, 2)


def _add_keys(target: Tensor, block: _Block, grad: Tensor) -> None:
    """Adds grad [G, M, d] to the rows of target [G, T, d] that ``_keys`` read."""
    prompt = block.prompt.stop - block.prompt.start
    target[:, block.prompt] += grad[:, :prompt]
    target[:, block.own] += grad[:, prompt:]


def varlen_obstacle(query: Tensor) -> str | None:
    """Why the varlen kernel cannot take this query, or None."""
    if query.device.type != "cuda":
        return f"varlen attention needs a CUDA or ROCm device, not {query.device.type}"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"varlen attention works in 16 bits, not {query.dtype}"
    if query.shape[-1] > 256 or query.shape[-1] % 8:
        return f"head size {query.shape[-1]} is over 256 or not a multiple of 8"
    if torch.version.cuda and torch.cuda.get_device_capability(query.device) < (8, 0):
        return "varlen attention needs an sm_80 or newer GPU"
    if _varlen_attn() is None:
        return "this torch has no varlen attention with windows and grouped heads"
    return None


@functools.cache
def _varlen_attn() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= known.keys() else None


def _varlen(q4: Tensor, k4: Tensor, v4: Tensor, runs: Runs, scale, window) -> Tensor:
    varlen_attn = _varlen_attn()
    assert varlen_attn is not None
    gather, cu_q, cu_k, max_q, max_k = runs.varlen
    q = q4[0].transpose(0, 1)
    k, v = (x[0].transpose(0, 1).index_select(0, gather) for x in (k4, v4))
    window_size = (-1 if window is None else window - 1, 0)
    out = varlen_attn(
        q, k, v, cu_q, cu_k, max_q, max_k,
        scale=scale, window_size=window_size, enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out[None]


@functools.cache
def register() -> str:
    """Make ``attn_implementation="prefopt"`` known to transformers; returns the name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    def no_mask(*args, local_size: int | None = None, **kwargs) -> None:
        if local_size:
            asked_windows.add(local_size)

    AttentionInterface.register(NAME, run_attention)
    AttentionMaskInterface.register(NAME, no_mask)
    return NAME
