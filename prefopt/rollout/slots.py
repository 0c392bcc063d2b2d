"""A cache of keys and values with a slot for each response, and the attention that reads it.

Hangs on transformers' AttentionInterface as prefopt.attention does. The tokens of one forward lie
in one row: first one token of each live response, then whole prompts that are read for the first
time. The attention function itself writes what the first bring to their slots, and hands out what
the prompts bring: a prompt is copied into the slots of all its samples.

Shapes: S slots of M places, of which m are read, H query heads, G key/value heads, r = H / G,
d head size, e that of the values.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefopt.attention import REFUSED, Runs, run_attention

NAME = "prefopt-slots"
SHORT = 64  # tokens of prompts that are read together, as rows of a table
PLACES = 32  # a slot grows, and is read, in multiples of so many tokens

Prefix = list[Tensor]  # of one prompt, in the order of Slots.blocks: [layers, G, P, d]


class Slots:
    """Keys and values of up to ``count`` responses.

    Layers whose keys (or values) have one shape lie in one block [layers, S, G, M, d], so that a
    prompt or a response is copied in one go. Keys are kept in float32, which scores are computed
    in, and are turned in memory ([layers, S, G, d, M]), which small products read faster. What is
    not written yet is 0, never NaN: it is read with weight 0.
    """

    def __init__(self, count: int):
        self.count, self.places = count, 0
        self.blocks: list[Tensor] = []
        self.at: list[tuple[int, int]] = []  # (block, layer within) of k, v of layer 0, 1, ...

    def lay_out(self, brought: Sequence[Tensor]) -> None:
        """Make the blocks for what a forward brought: k and v of each layer, [G, T, d] each."""
        kinds: dict[tuple[Any, ...], int] = {}  # how many layers there are of each
        for i, x in enumerate(brought):
            kind = (i % 2 == 0, x.shape[0], x.shape[2], x.dtype)
            kinds.setdefault(kind, 0)
            self.at.append((list(kinds).index(kind), kinds[kind]))
            kinds[kind] += 1
        for (key, heads, size, dtype), layers in kinds.items():
            empty = torch.zeros(0, dtype=dtype, device=brought[0].device)
            shape = layers, self.count, heads, self.places, size
            self.blocks.append(_zeros(empty, shape, turned=key))

    def reserve(self, places: int) -> None:
        """Room for so many tokens in every slot; what is there stays."""
        if places <= self.places:
            return
        self.places = _round_up(max(places, self.places * 3 // 2), PLACES)
        for i, block in enumerate(self.blocks):
            layers, count, heads, before, size = block.shape
            shape = layers, count, heads, self.places, size
            self.blocks[i] = _zeros(block, shape, turned=not block.is_contiguous())
            self.blocks[i][:, :, :, :before] = block

    def layer(self, number: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [S, G, M, d] and [S, G, M, e]."""
        (block, i), (other, j) = self.at[2 * number], self.at[2 * number + 1]
        return self.blocks[block][i], self.blocks[other][j]

    def prefixes(self, brought: Sequence[Tensor], bounds: Sequence[tuple[int, int]]):
        """What a forward brought, as one Prefix for each (start, end) among its tokens."""
        parts: list[list[Tensor]] = [[] for _ in self.blocks]
        for (block, _), x in zip(self.at, brought, strict=True):
            parts[block].append(x)
        stacked = [torch.stack(part) for part in parts]
        return [[x[:, :, start:end] for x in stacked] for start, end in bounds]

    def put(self, slot: int, prefix: Prefix) -> None:
        """Start a slot with the keys and values of a prompt."""
        for block, x in zip(self.blocks, prefix, strict=False):
            block[:, slot, :, : x.shape[2]] = x

    def move(self, source: int, target: int, length: int) -> None:
        for block in self.blocks:
            block[:, target, :, :length] = block[:, source, :, :length]


def _zeros(like: Tensor, shape: Sequence[int], *, turned: bool) -> Tensor:
    if not turned:
        return like.new_zeros(shape)
    *rest, places, size = shape
    return like.new_zeros(*rest, size, places).transpose(-1, -2)


class Step:
    """What the layers of one forward share: which tokens are whose."""

    def __init__(self, slots: Slots, position: np.ndarray, prompts: Sequence[int], device: Any):
        """position [live] of the responses' tokens, lengths of the prompts behind them."""
        self.slots, self.live = slots, len(position)
        self.brought: list[Tensor] = []  # k and v of the prompts, layer by layer
        self.asked: list[dict[str, Any]] = []  # what each layer that came by asked attention for
        ends = np.cumsum([0, *prompts]).tolist()
        self.bounds = list(itertools.pairwise(ends))
        rows = [(start, end, start, start) for start, end in self.bounds]
        self.runs = Runs(torch.tensor(rows, dtype=torch.int64).view(-1, 4), device)
        self.position = torch.from_numpy(position).to(device)
        self.reach = min(_round_up(int(position.max(initial=0)) + 1, PLACES), slots.places)
        self.table = _table(self.bounds).to(device) if _are_short(self.bounds) else None
        self._places: dict[tuple[int, int], Tensor] = {}
        self._hidden: dict[tuple[int, int | None], Tensor] = {}

    @functools.cached_property
    def rows(self) -> Tensor:
        """Where the tokens of the prompts stand in the table, [T]."""
        assert self.table is not None
        width = self.table.shape[1]
        rows = [i * width + j for i, (a, b) in enumerate(self.bounds) for j in range(b - a)]
        return torch.tensor(rows, device=self.table.device)

    def places(self, heads: int, size: int = 1) -> Tensor:
        """Where what is new of each response and head goes in values seen as [S G M, e], or, with
        the size of a head, in turned keys seen as [S G d M]."""
        if (heads, size) not in self._places:
            rows = torch.arange(self.live * heads * size, device=self.position.device)
            place = rows.view(self.live, -1) * self.slots.places + self.position[:, None]
            self._places[heads, size] = place.flatten()
        return self._places[heads, size]

    def hidden(self, heads: int, window: int | None) -> Tensor:
        """[live G, 1, m] float32: 0 where a response looks, -inf where it does not."""
        if (heads, window) not in self._hidden:
            place = torch.arange(self.reach, device=self.position.device)
            distance = self.position[:, None] - place
            blind = distance < 0 if window is None else (distance < 0) | (distance >= window)
            mask = torch.zeros(blind.shape, device=blind.device).masked_fill_(blind, -torch.inf)
            self._hidden[heads, window] = mask.repeat_interleave(heads, 0)[:, None]
        return self._hidden[heads, window]


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    slots: Step,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **unused,
) -> tuple[Tensor, None]:
    """query [1, H, T, d], key [1, G, T, d], value [1, G, T, e] -> ([1, T, H, e], None).

    The tokens of ``slots``, and behind them padding that sees nothing.
    """
    assert attention_mask is None and not any(unused.get(name) is not None for name in REFUSED)
    step, live = slots, slots.live
    number = len(step.asked)
    step.asked.append({"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap})
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast(device, enabled=False):
        how = scale, sliding_window, softcap
        written = _decode(step, number, query, key, value, *how) if live else None
    if written is not None and live == query.shape[2]:
        return written[None], None
    tokens = live + (step.bounds[-1][1] if step.bounds else 0)
    out = query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1])
    if tokens > live:
        q, k, v = (x[:, :, live:tokens] for x in (query, key, value))
        step.brought += [k[0].to(_score_dtype(k)), v[0]]
        if step.table is not None:
            with torch.autocast(device, enabled=False):
                out[0, live:tokens] = _read_together(step, q[0], k[0], v[0], *how)
        else:
            out[:, live:tokens], _ = run_attention(
                module, q, k, v, None,
                segments=step.runs, scaling=scale, sliding_window=sliding_window, softcap=softcap,
            )  # fmt: skip
    if written is not None:
        out[0, :live] = written
    return out, None


def _decode(
    step: Step, number: int, query, key, value, scale: float, window: int | None, softcap
) -> Tensor:
    """[live, H, e]: one query of each response over its slot of layer ``number``, after writing
    its key and value there."""
    (_, heads, _, size), groups, live = query.shape, key.shape[1], step.live
    keys, values = step.slots.layer(number)
    new_keys, new_values = (
        x[0, :, :live].transpose(0, 1).reshape(live * groups, -1) for x in (key, value)
    )
    turned = keys.transpose(2, 3)  # [S, G, d, M] as it lies in memory
    turned.view(-1).index_copy_(0, step.places(groups, size), new_keys.to(keys.dtype).view(-1))
    values.view(-1, values.shape[-1]).index_copy_(0, step.places(groups), new_values)
    turned = turned[:live].view(live * groups, size, -1)[:, :, : step.reach]
    values = values[:live].view(live * groups, -1, values.shape[-1])[:, : step.reach]
    q = query[0, :, :live].transpose(0, 1).reshape(live * groups, heads // groups, size)
    hidden = step.hidden(groups, window)
    q = q.to(keys.dtype)
    if softcap is None:
        scores = torch.baddbmm(hidden.to(q.dtype), q, turned, alpha=scale)
    else:
        scores = torch.bmm(q, turned).mul_(scale / softcap).tanh_().mul_(softcap).add_(hidden)
    weights = scores.softmax(-1).to(values.dtype)
    return torch.bmm(weights, values).view(live, heads, -1)


def _are_short(bounds: Sequence[tuple[int, int]]) -> bool:
    """Whether prompts go into one table: for few tokens that is quicker than one by one."""
    return bool(bounds) and max(end - start for start, end in bounds) <= SHORT


def _table(bounds: Sequence[tuple[int, int]]) -> Tensor:
    """[prompts, longest] numbers of their tokens; behind a prompt stands token 0, which no token of
    the prompt looks at."""
    width = _round_up(max(end - start for start, end in bounds), PLACES)
    table = np.zeros((len(bounds), width), np.int64)
    for row, (start, end) in enumerate(bounds):
        table[row, : end - start] = np.arange(start, end)
    return torch.from_numpy(table)


def _read_together(
    step: Step, query, key, value, scale: float, window: int | None, softcap
) -> Tensor:
    """Causal attention within each prompt, all at once: query [H, T, d], key [G, T, d], value
    [G, T, e] -> [T, H, e]."""
    assert step.table is not None
    (count, width), groups, heads = step.table.shape, len(key), len(query)
    flat = step.table.flatten()
    q, k, v = (
        x.index_select(1, flat).view(len(x), count, width, -1).transpose(0, 1)
        for x in (query, key, value)
    )
    wide = _score_dtype(query)
    q = q.reshape(count * groups, -1, q.shape[-1]).to(wide)  # [., r L, d]
    k, v = (x.reshape(count * groups, width, -1) for x in (k, v))
    scores = torch.bmm(q, k.to(wide).transpose(1, 2)).mul_(scale)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    place = torch.arange(width, device=query.device)
    distance = place[:, None] - place
    blind = distance < 0 if window is None else (distance < 0) | (distance >= window)
    scores.view(count * groups, -1, width, width).masked_fill_(blind, -torch.inf)
    mixed = torch.bmm(scores.softmax(-1).to(v.dtype), v)
    mixed = mixed.view(count, heads, width, -1).transpose(1, 2).reshape(count * width, heads, -1)
    return mixed.index_select(0, step.rows)


def _score_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@functools.cache
def register() -> str:
    """Make ``attn_implementation="prefopt-slots"`` known to transformers; returns the name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, slot_attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    return NAME
