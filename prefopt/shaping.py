"""What is done to log-probs before a loss reads them: other divergences than the reverse KL, less
weight on length, and weights that make pairs look sampled from the policy.

Shapes: N scored tokens, R = 2B responses (chosen, rejected, chosen, ...), B pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.errors import InputError
from prefopt.logprobs import sequence_logprobs
from prefopt.losses import PairLogps

CAP = 30.0  # exp(x) goes on as its tangent above this, so that squares stay finite in float32

DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda r, alpha: r,
    "forward_kl": lambda r, alpha: -_expm1(-r),
    "js_divergence": lambda r, alpha: math.log(2) + F.logsigmoid(r),
    "alpha_divergence": lambda r, alpha: -_expm1(-alpha * r) / alpha,
}


def f_divergence(p: PairLogps, *, kind: str = "reverse_kl", alpha: float = 0.5) -> PairLogps:
    """Pairs whose log-ratios r = log u became f'(u), by references that are moved for it.

    The implicit reward of a policy held to its reference by D_f is beta f'(pi / ref):

        reverse_kl        log u               forward_kl        1 - 1 / u
        js_divergence     log(2u / (1 + u))   alpha_divergence  (1 - u^-alpha) / alpha

    with 0 < alpha < 1, reverse KL at 0 and forward KL at 1. f is given up to a multiple of u - 1,
    which changes no divergence; f'(1) = 0 is chosen, so that a policy at its reference has reward
    0 also in losses of single log-ratios. Powers of u above e^30 go on as their tangent, in r.
    Gradients go through ref_chosen and ref_rejected. Wang et al. 2023 (arXiv 2309.16240, table 1).
    """
    check_divergence(kind, alpha)
    slope = DIVERGENCES[kind]
    chosen = p.chosen - slope(p.chosen - p.ref_chosen, alpha)
    rejected = p.rejected - slope(p.rejected - p.ref_rejected, alpha)
    return p._replace(ref_chosen=chosen, ref_rejected=rejected)


def check_divergence(kind: str, alpha: float) -> None:
    """InputError for a divergence that there is not, or an alpha out of range."""
    if kind not in DIVERGENCES:
        raise InputError(f"divergence is {kind!r}; it is one of {', '.join(DIVERGENCES)}")
    if not 0 < alpha < 1:
        raise InputError(f"the alpha of a divergence is {alpha!r}; it must be above 0 and below 1")


def _expm1(x: Tensor) -> Tensor:
    low = x.clamp_max(CAP)
    return low.expm1() + low.exp() * (x - low)


def desensitised(
    logprobs: Tensor, response_ids: Tensor, num_responses: int, *, alpha: float
) -> Tensor:
    """Sums over responses that count the tokens by which one of a pair is longer only by alpha.

    sum_{t <= l} log p_t + alpha sum_{t > l} log p_t with l = min(|y_w|, |y_l|); logprobs [N],
    response_ids [N] int64 -> [R]. alpha = 1 is `sequence_logprobs`. For policy and reference
    alike. Liu et al. 2024 (LD-DPO, arXiv 2409.06411).
    """
    assert num_responses % 2 == 0, f"{num_responses} responses are not pairs"
    if not 0 <= alpha <= 1:
        raise InputError(f"ld_alpha is {alpha!r}; it must be in [0, 1]")
    lengths = torch.bincount(response_ids, minlength=num_responses)
    shared = lengths.view(-1, 2).amin(1).repeat_interleave(2)
    order = response_ids.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    place = place - (lengths.cumsum(0) - lengths)[response_ids]
    counted = torch.where(place < shared[response_ids], logprobs, alpha * logprobs)
    return sequence_logprobs(counted, response_ids, num_responses)


@torch.no_grad()
def wpo_weights(
    logprobs: Tensor, collisions: Tensor, response_ids: Tensor, num_responses: int
) -> Tensor:
    """w(y_w) w(y_l) with w(y) = exp(mean_t (log pi(y_t) - log sum_v pi(v)^2)), without gradient.

    logprobs [N] and collisions [N], which is log sum_v pi(v)^2, of the policy -> [B]. Around 1 for
    what the policy would sample itself; not clamped. Zhou et al. 2024 (WPO, arXiv 2406.11827,
    eq. 2).
    """
    assert collisions.shape == logprobs.shape and num_responses % 2 == 0
    aligned = sequence_logprobs(logprobs - collisions, response_ids, num_responses, average=True)
    return (aligned[::2] + aligned[1::2]).exp()
