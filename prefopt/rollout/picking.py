"""Hidden states to tokens: the head, the temperature, one uniform number, the inverse of the CDF.

Shapes: R rows, D hidden size, V vocabulary, B blocks of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt import dispatch, tiles
from prefopt.nn import heads
from prefopt.rollout.types import SamplingParams
from prefopt.tiles import Head

BLOCK = 1024  # words whose probabilities are added up at a time


class Picker:
    """Draws the next token of each row and keeps its log-prob, the one that training computes.

    ``options``: softcap and scale of the head. ``early``: tokens that have probability 0 in rows
    that are told so.
    """

    def __init__(
        self, model: Any, options: dict[str, Any], params: SamplingParams, early: Sequence[int]
    ):
        head = model.get_output_embeddings()
        weight = heads.weight_of(getattr(head, "base", head))
        width, device = weight.shape[1], weight.device
        empty = torch.zeros(0, width, dtype=weight.dtype, device=device)
        _, self.weight, self.bias = heads.project(model, empty)
        self.low: Tensor | None = None  # [D, r] of an adapter on the head
        if self.weight.shape[1] > width:
            eye = torch.eye(width, dtype=weight.dtype, device=device)
            self.low = heads.project(model, eye)[0][:, width:]
        self.params = params
        self.head = Head(**{"temperature": params.temperature or 1.0, **options})
        self.early = torch.tensor(sorted(early), dtype=torch.int64, device=device)

    def __call__(self, hidden: Tensor, uniform: Tensor, early: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [R, D], uniform [R] float64, early [R] bool -> tokens [R] int64 and log-probs [R]
        float32. Greedy at temperature 0, with the log-probs of temperature 1."""
        hidden = self._widened(hidden)
        z, _ = tiles.transform(self._product(hidden), self.bias, self.head)
        if len(self.early) and bool(early.any()):
            rows = early.nonzero()
            z[rows, self.early] = float("-inf")
        top = z.amax(1, keepdim=True)
        p = (z - top).exp_()
        sums = p.sum(1, dtype=torch.float64)
        if self.params.temperature == 0:
            tokens = z.argmax(1)
        elif self.params.top_p < 1 or 0 < self.params.top_k < z.shape[1]:
            tokens = inverse_cdf(_likeliest(p, self.params.top_p, self.params.top_k), uniform)
        else:
            tokens = inverse_cdf(p, uniform)
        return tokens, self._logprobs(hidden, tokens, z, p, top, sums)

    def _widened(self, hidden: Tensor) -> Tensor:
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        hidden = hidden.to(self.weight.dtype) if hidden.dtype.itemsize > 4 else hidden
        return hidden if self.low is None else torch.cat([hidden, hidden @ self.low.to(hidden)], 1)

    def _product(self, hidden: Tensor) -> Tensor:
        z = dispatch.mm_nt(hidden, self.weight.to(hidden.dtype))
        return z.to(tiles.wide(z.dtype))

    def _logprobs(self, hidden, tokens, z, p, top, sums) -> Tensor:
        """log(p_y / sum p). In 16 bits training forms the token's own logit again in float32 (see
        token_logprobs), and puts it in the place of the rounded one in the sum."""
        column, row = tokens[:, None], top[:, 0]
        target = z.gather(1, column)[:, 0]
        if hidden.dtype.itemsize == 2:
            raw = tiles.target_dot(hidden, self.weight.to(hidden.dtype), tokens)
            bias = None if self.bias is None else self.bias[tokens]
            target, _ = tiles.transform(raw, bias, self.head)
            sums = sums - p.gather(1, column)[:, 0] + (target - row).double().exp()
        return (target - row - sums.log()).float()


def inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """The token where the cumulated weights [R, V] pass uniform [R] times their sum, [R] int64.

    Sums are float64. A token of weight 0 is never drawn, not even where rounding carries a number
    near 1 past the end. Large vocabularies are looked up in two levels, block then word.
    """
    rows, words = weights.shape
    if words <= 2 * BLOCK:
        totals = weights.cumsum(1, dtype=torch.float64)
        return _passes(totals, uniform[:, None] * totals[:, -1:])[:, 0]
    blocks = F.pad(weights, (0, -words % BLOCK)).view(rows, -1, BLOCK)
    sums = blocks.sum(2, dtype=torch.float64)
    totals = sums.cumsum(1)
    wanted = uniform[:, None] * totals[:, -1:]
    block = _passes(totals, wanted)
    rest = wanted - (totals - sums).gather(1, block)
    inside = blocks[torch.arange(rows, device=weights.device), block[:, 0]]
    return (block * BLOCK + _passes(inside.cumsum(1, dtype=torch.float64), rest))[:, 0]


def _passes(totals: Tensor, wanted: Tensor) -> Tensor:
    """Where running totals [R, C] first pass wanted [R, 1], [R, 1]; at most the last that adds."""
    last = torch.searchsorted(totals, totals[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(totals, wanted, right=True), last)


def _likeliest(p: Tensor, top_p: float, top_k: int) -> Tensor:
    """p [R, V] with all but the likeliest words at 0: the fewest that have ``top_p`` of the mass,
    and no more than ``top_k`` of them where it is not 0."""
    values, order = p.sort(1, descending=True)
    before = values.cumsum(1, dtype=torch.float64) - values
    drop = before >= top_p * values.sum(1, keepdim=True, dtype=torch.float64)
    if top_k:
        drop[:, top_k:] = True
    drop[:, 0] = False
    return torch.zeros_like(p).scatter_(1, order, values.masked_fill_(drop, 0.0))
