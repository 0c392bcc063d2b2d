"""Losses of online reinforcement learning: pure functions on rows of tokens, and their averages.

Shapes: S samples, T tokens of the longest; ``logp`` [S, T] are the log-probs of the sampled tokens
under the policy that learns, ``old_logp`` under the policy before the update, both at the
temperature of sampling; ``advantages`` [S, T] carry no gradient. rho = exp(logp - old_logp) is the
ratio. A loss is unreduced, [S, T], in the units of the advantages; `aggregate` averages it.
``mask`` [S, T] bool: the tokens that count; what stands outside is never read, not even a NaN.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prefopt.errors import InputError
from prefopt.rl import EXPONENT, kl_estimate
from prefopt.user_functions import nearest

# -- of the policy


def ppo_policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """max(-A rho, -A clip(rho, 1 - clip, 1 + clip_high)), any shape.

    ``clip_high`` None is ``clip``; above it (0.28), likelier tokens may grow more (DAPO, arXiv
    2503.14476). ``dual_clip`` c > 1: where A < 0, at most -c A, so that a ratio that has run away
    does not rule the gradient (arXiv 1912.09729). Schulman et al. 2017 (arXiv 1707.06347).
    """
    return _clipped(_ratio(logp, old_logp), advantages, clip, clip_high, dual_clip)


def gspo_policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float = 3e-4,
    clip_high: float | None = 4e-4,
) -> Tensor:
    """PPO's loss with one ratio for a whole response, s = exp(mean over its tokens of log rho).

    Token t has the ratio sg[s] pi_t / sg[pi_t], which is s in value, so that each token gets its
    own gradient. Meant for mode "seq-mean-token-mean". Zheng et al. 2025 (arXiv 2507.18071).
    """
    assert logp.shape == mask.shape, (logp.shape, mask.shape)
    ratio = _sequence_ratio(logp, old_logp, mask) * (logp - logp.detach()).exp()
    return _clipped(ratio, advantages, clip, clip_high, None)


def cispo_policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    *,
    clip: float | None = None,
    clip_high: float = 5.0,
) -> Tensor:
    """-sg[clip(rho, 1 - clip, 1 + clip_high)] A logp: every token keeps a gradient, any shape.

    ``clip`` None bounds rho from above only. MiniMax-M1 (arXiv 2506.13585, eq. 4 and 5).
    """
    low = None if clip is None else 1 - clip
    weight = _ratio(logp.detach(), old_logp).clamp(low, 1 + clip_high)
    return -weight * advantages * logp


def reinforce_policy_loss(logp: Tensor, advantages: Tensor) -> Tensor:
    """-A logp, any shape: right for samples of the policy itself. Williams 1992."""
    return -advantages * logp


@dataclass(frozen=True)
class PolicyLoss:
    """A policy loss with its options bound: (logp, old_logp, advantages, mask) -> [S, T], 0 outside
    the mask, where no gradient arises either. ``options`` holds defaults too."""

    name: str
    function: Callable[..., Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        rows = _inside(mask, logp, old_logp, advantages)
        return self.function(*rows, mask, **self.options).masked_fill(~mask, 0.0)

    def statistics(
        self, logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor
    ) -> dict[str, Tensor]:
        """`ratio_statistics` with the bounds of this loss, of its own ratio; nothing is clipped
        where the loss does not clip."""
        logp, old_logp, advantages = _inside(mask, logp.detach(), old_logp, advantages)
        if self.name == "gspo":
            logp = old_logp + _sequence_ratio(logp, old_logp, mask).log()
        clip, high = (self.options.get(name) for name in ("clip", "clip_high"))
        bounds = {"clip": clip, "clip_high": clip if high is None else high}
        return ratio_statistics(logp, old_logp, advantages, mask, **bounds)


def _ppo(logp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, **options: Any) -> Tensor:
    return ppo_policy_loss(logp, old, adv, **options)


def _cispo(logp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, **options: Any) -> Tensor:
    return cispo_policy_loss(logp, old, adv, **options)


def _reinforce(logp: Tensor, old: Tensor, adv: Tensor, mask: Tensor) -> Tensor:
    return reinforce_policy_loss(logp, adv)


# name -> (the loss whose keywords are its options, the same on (logp, old_logp, advantages, mask))
POLICY_LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "ppo": (ppo_policy_loss, _ppo),
    "gspo": (gspo_policy_loss, gspo_policy_loss),
    "cispo": (cispo_policy_loss, _cispo),
    "reinforce": (reinforce_policy_loss, _reinforce),
}


def policy_loss_from(name: str, **options: Any) -> PolicyLoss:
    """The policy loss called ``name``, one of POLICY_LOSSES; options that are None keep defaults.

    Raises InputError for an unknown name or option, listing the valid ones, and for values out of
    range.
    """
    if name not in POLICY_LOSSES:
        raise InputError(
            f"unknown policy loss {name!r}{nearest(name, POLICY_LOSSES)}; there are: "
            f"{', '.join(POLICY_LOSSES)}"
        )
    public, function = POLICY_LOSSES[name]
    parameters = inspect.signature(public).parameters.values()
    takes = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    options = {key: value for key, value in options.items() if value is not None}
    for key, value in options.items():
        if key not in takes:
            raise InputError(
                f"policy loss {name!r} takes no {key!r}{nearest(key, takes)}; it takes: "
                f"{', '.join(takes) or 'no options'}"
            )
        _check_range(key, value)
    return PolicyLoss(name, function, takes | options)


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "clip": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "clip_high": (lambda x: 0 < x < math.inf, "above 0 and finite"),
    "dual_clip": (lambda x: 1 < x < math.inf, "above 1 and finite"),
}


def _check_range(key: str, value: Any) -> None:
    valid, words = _RANGES[key]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and valid(value)):
        raise InputError(f"{key} is {value!r}; it must be {words}")


def _clipped(
    ratio: Tensor, advantages: Tensor, clip: float, high: float | None, dual: float | None
) -> Tensor:
    bounded = ratio.clamp(1 - clip, 1 + (clip if high is None else high))
    loss = torch.maximum(-advantages * ratio, -advantages * bounded)
    if dual is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -dual * advantages), loss)


def _ratio(logp: Tensor, old_logp: Tensor) -> Tensor:
    assert logp.shape == old_logp.shape, (logp.shape, old_logp.shape)
    return (logp - old_logp.detach()).clamp(-EXPONENT, EXPONENT).exp()


def _sequence_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """exp(mean over the tokens of log rho), [S, 1], without gradient."""
    log_ratio = (logp.detach() - old_logp.detach()).masked_fill(~mask, 0.0)
    mean = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return mean.clamp(-EXPONENT, EXPONENT).exp()


def _inside(mask: Tensor, *rows: Tensor) -> list[Tensor]:
    assert mask.dtype == torch.bool and all(x.shape == mask.shape for x in rows), mask.shape
    return [x.masked_fill(~mask, 0.0) for x in rows]


# -- of the critic and of the KL


def ppo_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None = 0.2
) -> Tensor:
    """0.5 max((V - R)^2, (V_old + clip(V - V_old, -clip, clip) - R)^2), any shape.

    A value that moves further than ``clip`` from that before the update gains nothing. None: half
    the squared error. Schulman et al. 2017, as in openai/baselines.
    """
    error = (values - returns).square()
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (near - returns).square())
    return error / 2


def kl_loss(logp: Tensor, old_logp: Tensor, ref_logp: Tensor, *, kind: str) -> Tensor:
    """sg[rho] times the estimate ``kind`` of KL(pi || ref), k2 or k3, of each token, any shape.

    The gradient's mean over tokens sampled from the old policy is that of KL(pi || ref) for k2 and
    of KL(ref || pi) for k3, where each token's context is taken as it is: what a token does to the
    KL of those behind it is felt through k1 in the reward only. The ratio carries no gradient: with
    one, k2 would descend the mean of k2, which is not a KL, and k3 KL(pi || ref) like k2 with more
    noise. Raises InputError for k1, whose gradient has mean 0.
    """
    if kind == "k1":
        raise InputError(
            "kl kind k1 in the loss has a gradient of mean zero and adds only noise; "
            "put it in the reward, or take k2 or k3"
        )
    return _ratio(logp.detach(), old_logp) * kl_estimate(logp, ref_logp.detach(), kind=kind)


# -- averages

MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "token-sum-const")


def token_weights(lengths: Tensor, mode: str, *, denom: float | None = None) -> Tensor:
    """Weight w of a token of a response with ``lengths`` tokens, any shape, so that the average of
    x is sum(w x) / count, with `count_of`.

    token-mean (DAPO): 1. seq-mean-token-mean (GRPO): 1 / length. seq-mean-token-sum: 1.
    token-sum-const (Dr. GRPO): 1 / ``denom``, such as the most tokens a response can have. Raises
    InputError for another mode, and for a denom that is missing or not above 0.
    """
    _check_mode(mode)
    lengths = lengths if lengths.is_floating_point() else lengths.float()
    if mode == "seq-mean-token-mean":
        return 1 / lengths.clamp(min=1)
    if mode == "token-sum-const":
        if denom is None or not 0 < denom < math.inf:
            raise InputError(
                f"aggregation token-sum-const divides by denom, which is {denom!r}; give a number "
                "above 0, such as the most tokens a response can have"
            )
        return torch.full_like(lengths, 1 / denom)
    return torch.ones_like(lengths)


def count_of(mode: str, n_tokens: Any, n_samples: Any) -> Any:
    """What `token_weights` are to be divided by: the tokens for token-mean, else the samples, all
    those of the optimizer step. Samples without a token that counts are not counted."""
    _check_mode(mode)
    return n_tokens if mode == "token-mean" else n_samples


def aggregate(
    x: Tensor, mask: Tensor, *, mode: str = "token-mean", denom: float | None = None
) -> Tensor:
    """The average of x [S, T] over the mask, a scalar; 0 where the mask is empty.

    token-mean: sum / tokens. seq-mean-token-mean: mean over samples of their means.
    seq-mean-token-sum: mean over samples of their sums. token-sum-const: sum / (denom samples).
    Raises InputError as `token_weights` does.
    """
    assert x.shape == mask.shape and mask.dtype == torch.bool, (x.shape, mask.shape)
    lengths = mask.sum(1).to(x.dtype)
    weights = token_weights(lengths[:, None], mode, denom=denom)
    count = count_of(mode, lengths.sum(), (lengths > 0).sum())
    return (weights * x.masked_fill(~mask, 0.0)).sum() / count.clamp(min=1)


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise InputError(
            f"unknown aggregation {mode!r}{nearest(mode, MODES)}; there are: {', '.join(MODES)}"
        )


# -- between the sampler and the trainer, and what the ratio did


@torch.no_grad()
def importance_weights(
    old_logp: Tensor,
    sampled_logp: Tensor,
    mask: Tensor,
    *,
    kind: str = "truncate",
    cap: float = 2.0,
    floor: float = 0.0,
) -> Tensor:
    """w [S, T] from pi_old / pi_sampler, for samples whose log-probs the sampler (``sampled_logp``)
    and the trainer (``old_logp``) see differently; exactly 1 where they agree, 0 outside the mask.

    truncate: min(w, cap) (TIS). mask: w, or 0 where it is outside [floor, cap] (IcePop takes 0.5
    and 5). sequence-mask: the same for the product of w over the tokens of a response. Raises
    InputError for another kind.
    """
    log_ratio = torch.sub(*_inside(mask, old_logp, sampled_logp))
    if kind == "sequence-mask":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
    weights = log_ratio.clamp(-EXPONENT, EXPONENT).exp()
    if kind == "truncate":
        weights = weights.clamp(max=cap)
    elif kind in ("mask", "sequence-mask"):
        weights = weights.masked_fill((weights < floor) | (weights > cap), 0.0)
    else:
        raise InputError(
            f"importance weights of kind {kind!r}; known: truncate, mask, sequence-mask"
        )
    return weights.masked_fill(~mask, 0.0)


@torch.no_grad()
def ratio_statistics(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float | None = 0.2,
    clip_high: float | None = None,
) -> dict[str, Tensor]:
    """What the ratio rho [S, T] does over the mask: sums over tokens, "tokens" of them.

    policy/approxkl: e^d - 1 - d, d = log rho, which estimates KL(old || pi) and is never below 0.
    policy/ratio: rho. policy/clipfrac_high, _low: tokens without gradient, as A > 0 and rho >
    1 + clip_high, or A < 0 and rho < 1 - clip; policy/clipfrac: both. policy/ratio_max and
    policy/ratio_min are no sums: merge them by max and min. A bound that is None is none;
    ``clip_high`` None is ``clip``.
    """
    logp, old_logp, advantages = _inside(mask, logp, old_logp, advantages)
    ratio = _ratio(logp, old_logp)
    top = clip if clip_high is None else clip_high
    none = torch.zeros_like(mask)
    low = none if clip is None else mask & (advantages < 0) & (ratio < 1 - clip)
    high = none if top is None else mask & (advantages > 0) & (ratio > 1 + top)
    return {
        "tokens": mask.sum(),
        "policy/approxkl": kl_estimate(old_logp, logp, kind="k3").sum(),
        "policy/ratio": ratio.where(mask, 0.0).sum(),
        "policy/clipfrac": (low | high).sum(),
        "policy/clipfrac_low": low.sum(),
        "policy/clipfrac_high": high.sum(),
        "policy/ratio_max": ratio.where(mask, -math.inf).max(),
        "policy/ratio_min": ratio.where(mask, math.inf).min(),
    }
