"""The scale of a block that leaves the least squared error, instead of its largest magnitude.

min over a of sum_i (w_i - a c[q_i])^2,   q_i the nearest code of w_i / a
"""

from __future__ import annotations

import torch
from torch import Tensor


def best_scales(
    x: Tensor, scales: Tensor, book: Tensor, bounds: list[float], signed: bool
) -> Tensor:
    """x [m, block], scales = its absmax [m], the codebook ascending [16] and its midpoints -> [m].

    signed: a negative scale turns the codebook round, which is not symmetric.
    """
    best, least = scales.clone(), torch.full_like(scales, float("inf"))
    edges = torch.tensor(bounds, dtype=book.dtype, device=book.device)
    for sign in (1, -1) if signed else (1,):
        for step in range(12):
            a = scales * (sign * (1.05 - 0.03 * step))
            safe = torch.where(a == 0, 1, a)[:, None]
            c = book[torch.bucketize(x / safe, edges, out_int32=True)]
            energy = c.square().sum(1)
            fit = (x * c).sum(1) / energy.clamp(min=1e-30)
            error = x.square().sum(1) - fit.square() * energy
            better = error < least
            best, least = torch.where(better, fit, best), torch.where(better, error, least)
    return best
