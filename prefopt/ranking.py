"""Losses of reward models, from the scores of responses.

Shapes: B pairs, R responses in G groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    margin: Tensor | None = None,
    preference: Tensor | None = None,
    center: float = 0.0,
) -> Tensor:
    """-log sigmoid(g) + center (c + r)^2, g = c - r - margin, scores c, r and margin [B] -> [B].

    margin is by how much the chosen response should win (Touvron et al. 2023, arXiv 2307.09288,
    eq. 2); preference [B] the probability p that it is the better one, 1 if None: the loss is then
    the cross-entropy -p log sigmoid(g) - (1 - p) log sigmoid(-g); center > 0 pulls scores, which
    are known up to a constant, to mean 0 (Eisenstein et al. 2023, arXiv 2312.09244).
    """
    assert chosen_scores.shape == rejected_scores.shape and chosen_scores.dim() == 1
    gap = chosen_scores - rejected_scores
    if margin is not None:
        assert margin.shape == gap.shape, (margin.shape, gap.shape)
        gap = gap - margin
    loss = -F.logsigmoid(gap)
    if preference is not None:
        loss = loss + (1 - preference) * gap  # -log sigmoid(-g) = -log sigmoid(g) + g
    return loss + center * (chosen_scores + rejected_scores) ** 2 if center else loss


def plackett_luce(
    scores: Tensor, groups: Tensor, num_groups: int, *, center: float = 0.0
) -> Tensor:
    """-log of the probability that each group is ranked as given, best first.

    sum_{i < K} log sum_{j >= i} exp(s_j - s_i) + center (2 mean s)^2, over the K responses of a
    group, any K: scores [R] best first within their group, groups [R] int64 ascending -> [G]; 0 for
    K = 1. With K = 2 it is `bradley_terry`, bit for bit. Plackett 1975; for reward models Zhu et
    al. 2023 (arXiv 2301.11270, section 4).
    """
    assert scores.shape == groups.shape and scores.dim() == 1
    sizes = torch.bincount(groups, minlength=num_groups)
    assert len(sizes) == num_groups and bool((groups.diff() >= 0).all()), "groups must ascend"
    width = int(sizes.max()) if num_groups else 0
    place = torch.arange(len(groups), device=groups.device) - (sizes.cumsum(0) - sizes)[groups]
    table = scores.new_zeros(num_groups, width).index_put((groups, place), scores)  # [G, K]
    real = torch.arange(width, device=groups.device) < sizes[:, None]
    below = real[:, None, :] & real.new_ones(width, width).triu(1)  # [G, K, K]: j is ranked below i
    of, i = below.any(2).nonzero(as_tuple=True)
    gaps = (table[of] - table[of, i][:, None]).masked_fill(~below[of, i], -torch.inf)
    losses = scores.new_zeros(num_groups).index_add(0, of, -F.logsigmoid(-gaps.logsumexp(1)))
    if center:
        losses = losses + center * (2 * table.sum(1) / sizes.clamp_min(1)) ** 2
    return losses
