"""The scale of a block that leaves the least squared error, instead of its largest magnitude.

    min over a of E(a) = sum_i (w_i - a c_i)^2,   c_i = the codebook's value nearest to w_i / a

E is piecewise quadratic in a: for fixed c its minimum is a = <w, c> / <c, c>, and what it takes off
|w|^2 is <w, c>^2 / <c, c>. So the codes of a few scales around the largest magnitude are tried, and
of the best the minimum is taken. A negative scale turns the codebook round, which is worth trying
as NF4 is not symmetric (the idea of BOF4-S, arXiv 2505.06653, without another format).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Around 1, so that the search is never worse than none; finer grids gain next to nothing.
FACTORS = tuple(i / 100 for i in range(70, 107, 3))


def best_scales(
    x: Tensor, largest: Tensor, book: Tensor, bounds: list[float], signed: bool
) -> Tensor:
    """float32 x [m, block] and its largest magnitudes [m], the codebook ascending [16], the 15
    midpoints of it -> the scales [m]; that of a block of zeros is 0."""
    u = x / largest.clamp(min=1e-38)[:, None]
    best, gain = torch.ones_like(largest), torch.zeros_like(largest)
    for sign in (1, -1) if signed else (1,):
        for factor in FACTORS:
            c = _nearest(u, book, [b * factor for b in bounds])
            uc, cc = (u * c).sum(1), c.square().sum(1).clamp_(min=1e-30)
            fit = uc / cc
            better = fit * uc > gain
            best, gain = torch.where(better, sign * fit, best), torch.where(better, fit * uc, gain)
        u = -u
    return best * largest


def _nearest(u: Tensor, book: Tensor, bounds: list[float]) -> Tensor:
    """The value of the codebook for each element, by the bounds between them."""
    q = (u > bounds[0]).view(torch.uint8)
    for bound in bounds[1:]:
        q += (u > bound).view(torch.uint8)
    return book.index_select(0, q.view(-1).int()).view_as(u)
