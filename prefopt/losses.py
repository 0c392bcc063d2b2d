"""Preference losses: pure functions from the summed log-probs of pairs to one loss per pair.

Anything ``PairLogps -> [B]`` is a loss; the keyword arguments of a loss are its configuration.
Shapes: B pairs. In the formulas r_w = log pi(y_w) - log ref(y_w) is the log-ratio of the chosen
response, r_l that of the rejected one, m = r_w - r_l their margin, |y| a number of tokens, and
s the sigmoid. All in nats. Every loss has finite values and gradients up to log-ratios of 1e4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PairLogps(NamedTuple):
    """Summed log-probs of B pairs under the policy and the reference, and response lengths, [B]."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_len: Tensor
    rejected_len: Tensor

    @property
    def margin(self) -> Tensor:
        """m = (log pi(y_w) - log ref(y_w)) - (log pi(y_l) - log ref(y_l)), [B], in nats."""
        return (self.chosen - self.ref_chosen) - (self.rejected - self.ref_rejected)


# -- of the margin


def dpo(p: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log s(beta m) - e log s(-beta m), with e the label smoothing, [B].

    e > 0 is the conservative form for labels that are wrong with probability e. Rafailov et al.
    2023 (arXiv 2305.18290, eq. 7) and its appendix note on label noise by Mitchell.
    """
    _check(p)
    return _logistic(beta * p.margin, label_smoothing)


def robust(p: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """(-(1 - e) log s(beta m) + e log s(-beta m)) / (1 - 2e), [B]; not bounded below if e > 0.

    Its expectation over labels flipped with probability e is `dpo` on clean ones. Chowdhury et al.
    2024 (arXiv 2403.00409).
    """
    _check(p)
    x, e = beta * p.margin, label_smoothing
    return (e * F.logsigmoid(-x) - (1 - e) * F.logsigmoid(x)) / (1 - 2 * e)


def ipo(p: PairLogps, *, beta: float = 0.1, average: bool = False) -> Tensor:
    """(m - 1 / (2 beta))^2, [B]; with ``average``, of log-ratios divided by their lengths.

    Azar et al. 2023 (arXiv 2310.12036, eq. 17, whose tau is beta). The sum is what the paper
    writes; the average, in nats per token, is what its experiments used, as TRL has it.
    """
    _check(p)
    return (_average_margin(p) if average else p.margin).sub(1 / (2 * beta)) ** 2


def hinge(p: PairLogps, *, beta: float = 0.1) -> Tensor:
    """max(0, 1 - beta m), [B]. Zhao et al. 2023 (SLiC-HF, arXiv 2305.10425), with the reference
    of Liu et al. 2023 (RSO, arXiv 2309.06657)."""
    _check(p)
    return F.relu(1 - beta * p.margin)


def exo_pair(p: PairLogps, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> Tensor:
    """KL(q || (1 - e, e)) with q = (s(beta m), s(-beta m)), [B]; e must be above 0.

    The reverse KL, where `dpo` with label smoothing is the forward one. Ji et al. 2024 (arXiv
    2402.00856, eq. 16).
    """
    _check(p)
    x, e = beta * p.margin, label_smoothing
    chosen = x.sigmoid() * (F.logsigmoid(x) - math.log1p(-e))
    return chosen + (-x).sigmoid() * (F.logsigmoid(-x) - math.log(e))


def discopop(p: PairLogps, *, beta: float = 0.1, tau: float = 0.05) -> Tensor:
    """(1 - s(x / tau)) (-log s(x)) + s(x / tau) exp(-x), x = beta m, [B]; 0 < tau <= 1.

    The log-ratio modulated loss that Lu et al. 2024 found (arXiv 2406.08414, eq. 5). A tau above
    1 would let exp(-x) overflow.
    """
    _check(p)
    x = beta * p.margin
    return (F.logsigmoid(x / tau) - x).exp() - (-x / tau).sigmoid() * F.logsigmoid(x)


def sigmoid_norm(p: PairLogps, *, beta: float = 0.1) -> Tensor:
    """-log s(beta (r_w / |y_w| - r_l / |y_l|)), [B]: DPO on nats per token.

    Length-normalised DPO of Lambert et al. 2024 (Tulu 3, arXiv 2411.15124).
    """
    _check(p)
    return _logistic(beta * _average_margin(p))


# -- of each log-ratio


def nca_pair(p: PairLogps, *, beta: float = 0.1) -> Tensor:
    """-log s(beta r_w) - log s(-beta r_w) / 2 - log s(-beta r_l) / 2, [B].

    Noise contrastive alignment with two responses. Chen et al. 2024 (arXiv 2402.05369).
    """
    chosen, rejected = _ratios(p, beta)
    return _logistic(chosen) + (_logistic(-chosen) + _logistic(-rejected)) / 2


def bco_pair(p: PairLogps, *, beta: float = 0.1) -> Tensor:
    """-log s(beta r_w) - log s(-beta r_l), [B].

    Binary classifier optimisation of Jung et al. 2024 (arXiv 2404.04656) with its reward shift
    left at 0, as in the sum of losses of Wang et al. 2024 (MPO, arXiv 2411.10442).
    """
    chosen, rejected = _ratios(p, beta)
    return _logistic(chosen) + _logistic(-rejected)


def sppo_hard(p: PairLogps, *, beta: float = 0.1) -> Tensor:
    """(r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2, [B].

    Self-play preference optimisation of Wu et al. 2024 (arXiv 2405.00675, eq. 4.7, whose eta is
    1 / beta) where the chosen response wins with probability 1.
    """
    chosen, rejected = _ratios(p)
    return (chosen - 1 / (2 * beta)) ** 2 + (rejected + 1 / (2 * beta)) ** 2


def apo_zero(p: PairLogps, *, beta: float = 0.1) -> Tensor:
    """1 - s(beta r_w) + s(beta r_l), [B]: chosen responses up, rejected down.

    For chosen responses better than the model's own. D'Oosterlinck et al. 2024 (arXiv 2408.06266,
    eq. 7).
    """
    chosen, rejected = _ratios(p, beta)
    return (-chosen).sigmoid() + rejected.sigmoid()


def apo_down(p: PairLogps, *, beta: float = 0.1) -> Tensor:
    """s(beta r_w) + 1 - s(beta m), [B]: chosen responses down, rejected further down.

    For chosen responses worse than the model's own. D'Oosterlinck et al. 2024 (arXiv 2408.06266,
    eq. 8).
    """
    chosen, rejected = _ratios(p, beta)
    return chosen.sigmoid() + (rejected - chosen).sigmoid()


# -- of the whole batch


def aot(p: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """`dpo` on sort(log pi(y_w) - log pi(y_l)) - sort(log ref(y_w) - log ref(y_l)), [B].

    Sorted over the batch it is given: position i holds the loss of the i-th quantile, not of pair
    i. Paired alignment by optimal transport of Melnyk et al. 2024 (arXiv 2406.05882).
    """
    _check(p)
    quantiles = (p.chosen - p.rejected).sort().values
    return _logistic(
        beta * (quantiles - (p.ref_chosen - p.ref_rejected).sort().values), label_smoothing
    )


def aot_unpaired(p: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """`dpo` on sort(r_w) - sort(r_l), [B].

    Sorted over the batch it is given: position i holds the loss of the i-th quantile, not of pair
    i. Unpaired alignment by optimal transport of Melnyk et al. 2024 (arXiv 2406.05882).
    """
    chosen, rejected = _ratios(p, beta)
    return _logistic(chosen.sort().values - rejected.sort().values, label_smoothing)


# -- without a reference


def sft(p: PairLogps) -> Tensor:
    """-log pi(y_w) / |y_w|, [B], nats per token.

    ``dpo + a*sft`` is the loss of Pang et al. 2024 (RPO, arXiv 2404.19733, eq. 1).
    """
    return -_averages(p)[0]


def simpo(
    p: PairLogps, *, beta: float = 2.0, gamma: float = 0.5, label_smoothing: float = 0.0
) -> Tensor:
    """-log s(beta log pi(y_w) / |y_w| - beta log pi(y_l) / |y_l| - gamma), [B].

    Label smoothing as in `dpo`. Meng et al. 2024 (arXiv 2405.14734, eq. 6).
    """
    chosen, rejected = _averages(p)
    return _logistic(beta * (chosen - rejected) - gamma, label_smoothing)


def cpo(
    p: PairLogps, *, beta: float = 0.1, alpha: float = 1.0, label_smoothing: float = 0.0
) -> Tensor:
    """-log s(beta (log pi(y_w) - log pi(y_l))) - alpha log pi(y_w) / |y_w|, [B].

    Label smoothing as in `dpo`. Xu et al. 2024 (arXiv 2401.08417, eq. 3), whose NLL, a sum in the
    paper, is a mean over tokens in its code and here.
    """
    return _logistic(beta * (p.chosen - p.rejected), label_smoothing) + alpha * sft(p)


def orpo(p: PairLogps, *, beta: float = 0.1) -> Tensor:
    """-log pi(y_w) / |y_w| - beta log s(o_w - o_l), [B], with the log-odds o = log(q / (1 - q)) of
    q = exp(log pi(y) / |y|), which is kept a rounding step below 1.

    Hong et al. 2024 (arXiv 2403.07691, eq. 6 and 7), whose lambda is beta.
    """
    chosen, rejected = _averages(p)
    return beta * _logistic(_log_odds(chosen) - _log_odds(rejected)) - chosen


LOSSES: dict[str, Callable[..., Tensor]] = {
    loss.__name__: loss
    for loss in (
        *(dpo, robust, ipo, hinge, exo_pair, nca_pair, bco_pair, sppo_hard, aot, aot_unpaired),
        *(apo_zero, apo_down, discopop, sft, sigmoid_norm, simpo, cpo, orpo),
    )
}
REFERENCE_FREE = frozenset({"sft", "simpo", "cpo", "orpo"})  # ref_chosen, ref_rejected are not read
WHOLE_BATCH = frozenset({"aot", "aot_unpaired"})  # a pair's loss depends on the other pairs


# -- without pairs


def kto(
    logratios: Tensor,
    desirable: Tensor,
    kl: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """w_d (1 - s(beta (r - z))) of desirable responses, w_u (1 - s(beta (z - r))) of the others.

    logratios r [R] = log pi(y) - log ref(y), desirable [R] bool, kl z [] -> [R]. z is the baseline
    max(0, mean log-ratio of responses put to other prompts); no gradient goes through it.
    Ethayarajh et al. 2024 (arXiv 2402.01306).
    """
    assert logratios.dim() == 1 and desirable.shape == logratios.shape and kl.dim() == 0
    assert desirable.dtype == torch.bool, desirable.dtype
    x = beta * (logratios - kl.detach())
    good, bad = desirable_weight * (-x).sigmoid(), undesirable_weight * x.sigmoid()
    return torch.where(desirable, good, bad)


def _check(p: PairLogps) -> None:
    shape = p.chosen.shape
    assert len(shape) == 1 and all(x.shape == shape for x in p), [tuple(x.shape) for x in p]


def _logistic(x: Tensor, label_smoothing: float = 0.0) -> Tensor:
    return -(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)


def _ratios(p: PairLogps, beta: float = 1.0) -> tuple[Tensor, Tensor]:
    _check(p)
    return beta * (p.chosen - p.ref_chosen), beta * (p.rejected - p.ref_rejected)


def _averages(p: PairLogps) -> tuple[Tensor, Tensor]:
    _check(p)
    return p.chosen / p.chosen_len.clamp_min(1), p.rejected / p.rejected_len.clamp_min(1)


def _average_margin(p: PairLogps) -> Tensor:
    chosen, rejected = _ratios(p)
    return chosen / p.chosen_len.clamp_min(1) - rejected / p.rejected_len.clamp_min(1)


def _log_odds(log_q: Tensor) -> Tensor:
    log_q = log_q.clamp_max(-torch.finfo(log_q.dtype).eps)
    return log_q - (-log_q.expm1()).log()
