"""Rewards and advantages of online reinforcement learning: pure functions on rows of tokens.

Shapes: S samples, T tokens of the longest. Whatever is [S, T] belongs to the tokens of the
responses; ``mask`` [S, T] bool says where there is one that counts: rows may end early and may have
gaps (tokens of a tool or of the user). What stands outside the mask is never read, not even a NaN,
and results are 0 there. Log-probs, KL and entropy are in nats. float32 gives float32, float64
gives float64; results carry no gradient but for `kl_estimate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from prefopt.errors import InputError

EXPONENT = 20.0  # log-ratios are exponentiated within +-20: e^20 is 5e8, and nothing overflows
EPS_GROUP, EPS_VARIANCE = 1e-6, 1e-8

# -- rewards of tokens


def kl_estimate(logp: Tensor, ref_logp: Tensor, *, kind: str = "k1") -> Tensor:
    """Estimate of KL(pi || ref) from one token sampled from pi, any shape; d = logp - ref_logp.

    k1 = d; k2 = d^2 / 2; k3 = e^-d - 1 + d. k1 and k3 have the divergence as their mean, k3 with
    less noise and never below 0; k2 is biased, and small where pi is near ref. What their
    gradients are is another matter: `check_kl`. Schulman 2020 (joschu.net/blog/kl-approx.html).
    Raises InputError for another kind.
    """
    assert logp.shape == ref_logp.shape, (logp.shape, ref_logp.shape)
    d = logp - ref_logp
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return (-d).clamp(max=EXPONENT).expm1() + d
    raise InputError(f"kl kind is {kind!r}; it must be k1, k2 or k3")


def check_kl(kind: str, placement: str) -> None:
    """Raises InputError unless estimator ``kind`` means a KL penalty where it is placed.

    The gradient of KL(pi || ref) is what k1 gives in the reward, and k2 in the loss. In the loss,
    k3 gives that of KL(ref || pi), and k1 has mean 0. In the reward, k3 gives grad KL(pi || ref) -
    grad KL(ref || pi), which vanishes near the reference. arXiv 2510.01555, 2512.21852.
    """
    if kind not in ("k1", "k2", "k3"):
        raise InputError(f"kl kind is {kind!r}; it must be k1, k2 or k3")
    if placement not in ("reward", "loss"):
        raise InputError(f"kl placement is {placement!r}; it must be reward or loss")
    if placement == "loss" and kind == "k1":
        raise InputError(
            "kl kind k1 in the loss has a gradient of mean zero and adds only noise; "
            "put it in the reward, or take k2 or k3"
        )
    if placement == "reward" and kind != "k1":
        raise InputError(
            f"kl kind {kind} in the reward does not have the gradient of a KL penalty and can push "
            "the policy off the reference; put k1 in the reward, or this kind in the loss"
        )


@torch.no_grad()
def shape_rewards(
    scores: Tensor, kl: Tensor, mask: Tensor, *, beta: float, token_scores: Tensor | None = None
) -> Tensor:
    """Rewards of tokens [S, T]: -beta kl_t, + token_scores_t, + the score at the last token.

    ``scores`` [S] judge whole responses; ``kl`` [S, T] estimates the divergence of each token;
    ``token_scores`` [S, T] judge tokens. The last token is the last one in the mask: a stop token,
    if there was one. A row without tokens gets nothing. Ziegler et al. 2019 (arXiv 1909.08593).
    """
    _same_shape(mask, kl, token_scores)
    assert scores.shape == mask.shape[:1], (scores.shape, mask.shape)
    rewards = -beta * kl.masked_fill(~mask, 0.0)
    if token_scores is not None:
        rewards = rewards + token_scores.masked_fill(~mask, 0.0)
    last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    return torch.where(last, rewards + scores.to(rewards.dtype)[:, None], rewards)


# -- advantages


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantages and returns, [S, T] each.

    delta_t = r_t + gamma V_t' - V_t; A_t = delta_t + gamma lam A_t'; return R_t = A_t + V_t, where
    t' is the next token in the mask: gaps are stepped over. V_t is the value before token t.
    Behind the last token V is ``bootstrap`` [S], 0 without: the value of what a response that was
    cut would have gone on to. Schulman et al. 2015 (arXiv 1506.02438).
    """
    _same_shape(mask, rewards, values)
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    found, advantage = torch.zeros_like(values), torch.zeros_like(values[:, :1]).squeeze(1)
    next_value = advantage if bootstrap is None else bootstrap.to(values.dtype)
    for t in reversed(range(mask.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        found[:, t] = advantage
    found = found.masked_fill(~mask, 0.0)
    return found, found + values


@torch.no_grad()
def group_advantages(rewards: Tensor, group_ids: Tensor, *, kind: str = "grpo") -> Tensor:
    """Advantages [S] of samples over the others of their group; n samples, rewards R [S].

    dr_grpo: R - mean. grpo: (R - mean) / (std + 1e-6), the deviation of the sample (n - 1). rloo:
    R - mean of the others = n / (n - 1) (R - mean). rf++_baseline: (R - mean), whitened over the
    whole batch. ``group_ids`` [S]: equal for samples of the same prompt, in any order. Where all
    rewards of a group are equal, its advantages are exactly 0 (for rf++_baseline, up to the mean
    of the batch). Raises InputError for a group of one and for another kind.

    DeepSeekMath (arXiv 2402.03300), Dr. GRPO (2503.20783), RLOO (2402.14740), REINFORCE++
    (2501.03262).
    """
    assert rewards.ndim == 1 and rewards.shape == group_ids.shape, (rewards.shape, group_ids.shape)
    if kind not in GROUPED:
        raise InputError(f"group advantages of kind {kind!r}; known: {', '.join(GROUPED)}")
    ids, place, n = torch.unique(group_ids, return_inverse=True, return_counts=True)
    if (n < 2).any():
        one = ids[int(n.argmin())].item()
        raise InputError(
            f"estimator {kind} compares samples of one prompt, and group {one} has a single one; "
            "take at least 2 samples per prompt"
        )

    def total(x: Tensor) -> Tensor:
        return x.new_zeros(len(ids)).index_add(0, place, x)[place]

    wide, n = rewards.double(), n[place]
    # taken off a member of the group first, equal rewards leave no rounding error to divide by
    wide = (
        wide
        - wide.new_zeros(len(ids)).scatter_reduce(0, place, wide, "amin", include_self=False)[place]
    )
    centred = wide - total(wide) / n
    if kind == "rloo":
        centred = centred * n / (n - 1)
    elif kind == "grpo":
        centred = centred / ((total(centred.square()) / (n - 1)).sqrt() + EPS_GROUP)
    elif kind == "rf++_baseline":
        centred = whiten(centred, torch.ones_like(centred, dtype=torch.bool))
    return centred.to(rewards.dtype)


@torch.no_grad()
def reinforce_advantages(
    rewards: Tensor, mask: Tensor, *, gamma: float = 1.0, bootstrap: Tensor | None = None
) -> Tensor:
    """G_t = sum over later tokens k of gamma^(k-t) r_k, whitened over the mask, [S, T].

    REINFORCE++ (arXiv 2501.03262). ``bootstrap`` as in `gae`.
    """
    zeros = torch.zeros_like(rewards)
    to_go, _ = gae(rewards, zeros, mask, gamma=gamma, lam=1.0, bootstrap=bootstrap)
    return whiten(to_go, mask)


def advantages(
    rewards: Tensor,
    mask: Tensor,
    *,
    estimator: str,
    group_ids: Tensor | None = None,
    values: Tensor | None = None,
    bootstrap: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Tensor, Tensor | None]:
    """(advantages [S, T], returns [S, T] or None) of token rewards [S, T] by one of ESTIMATORS.

    gae takes ``values`` [S, T] and ``bootstrap`` [S], and is not whitened here; reinforce++ takes
    the discounted reward to come, whitened; the others sum the rewards of each sample, compare it
    within its group (``group_ids`` [S]) and give all its tokens the same advantage. Raises
    InputError for an unknown estimator and for one that lacks what it needs.
    """
    if estimator not in ESTIMATORS:
        raise InputError(f"estimator is {estimator!r}; known: {', '.join(ESTIMATORS)}")
    needed, name = (values, "values") if estimator == "gae" else (group_ids, "group_ids")
    if needed is None and estimator != "reinforce++":
        raise InputError(f"estimator {estimator} needs {name}")
    given = {"group_ids": group_ids, "values": values, "bootstrap": bootstrap}
    return ESTIMATORS[estimator](rewards, mask, **given, gamma=gamma, lam=lam)


def _by_gae(rewards: Tensor, mask: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    del given["group_ids"]
    return gae(rewards, given.pop("values"), mask, **given)


def _by_reinforce(rewards: Tensor, mask: Tensor, **given: Any) -> tuple[Tensor, None]:
    kept = {name: given[name] for name in ("gamma", "bootstrap")}
    return reinforce_advantages(rewards, mask, **kept), None


def _by_group(kind: str) -> Callable[..., tuple[Tensor, None]]:
    def estimate(rewards: Tensor, mask: Tensor, **given: Any) -> tuple[Tensor, None]:
        _same_shape(mask, rewards)
        total = rewards.double().masked_fill(~mask, 0.0).sum(1)
        found = group_advantages(total, given["group_ids"], kind=kind).to(rewards.dtype)
        return torch.where(mask, found[:, None], 0.0), None

    return estimate


GROUPED = ("rloo", "grpo", "dr_grpo", "rf++_baseline")
ESTIMATORS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "gae": _by_gae,
    "reinforce++": _by_reinforce,
    **{kind: _by_group(kind) for kind in GROUPED},
}

# -- statistics


@torch.no_grad()
def moments(x: Tensor, mask: Tensor) -> Tensor:
    """[3] float64: sum, sum of squares and number of x [S, T] over the mask. Those of several
    processes add up to those of all their tokens."""
    _same_shape(mask, x)
    kept = x.double().masked_fill(~mask, 0.0)
    return torch.stack([kept.sum(), kept.square().sum(), mask.sum().double()])


_moments = moments  # where an argument has its name


@torch.no_grad()
def whiten(
    x: Tensor, mask: Tensor, *, center: bool = True, moments: Tensor | None = None
) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8) over the mask, population variance; any shape.

    center=False adds the mean again, so that only the deviation changes. ``moments`` [3] from
    `moments`, summed over processes, whitens by the statistics of all.
    """
    total, squares, n = _moments(x, mask) if moments is None else moments
    n = n.clamp(min=1.0)
    mean = total / n
    variance = (squares / n - mean.square()).clamp(min=0.0)
    found = (x.double() - mean) / (variance + EPS_VARIANCE).sqrt()
    if not center:
        found = found + mean
    return found.to(x.dtype).masked_fill(~mask, 0.0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over the mask [S, T]: 1 is a perfect critic, 0 one
    that says the same of everything. NaN where all returns are equal."""
    _same_shape(mask, values, returns)
    target = returns.detach()[mask].double()
    error = target - values.detach()[mask].double()
    if not len(target) or (target == target[0]).all():
        return float("nan")
    return (1 - error.var(correction=0) / target.var(correction=0)).item()


class RunningMoments:
    """Mean and population deviation of all numbers so far, in float64, without keeping them.

    Chan, Golub and LeVeque 1979: batches merge by their means and sums of squared deviations, so
    no digits are lost where the mean is large. 0 before the first.
    """

    def __init__(self) -> None:
        self.n, self.mean, self._squares = 0, 0.0, 0.0

    @property
    def std(self) -> float:
        return (self._squares / self.n) ** 0.5 if self.n else 0.0

    def update(self, x: Tensor) -> None:
        """Takes in the numbers of x, any shape."""
        x = x.detach().double()
        if not x.numel():
            return
        mean, both = x.mean().item(), self.n + x.numel()
        away = mean - self.mean
        self._squares += (x - mean).square().sum().item() + away**2 * self.n * x.numel() / both
        self.mean += away * x.numel() / both
        self.n = both

    def state(self) -> dict[str, float]:
        return {"n": self.n, "mean": self.mean, "squares": self._squares}

    def restore(self, state: Mapping[str, float]) -> None:
        """Continues from what `state` gave, to the bit."""
        self.n, self.mean, self._squares = int(state["n"]), state["mean"], state["squares"]


class AdaptiveKL:
    """The weight ``beta`` of the KL penalty, steered so that the KL comes to ``target``.

    e = clip(kl / target - 1, -0.2, 0.2); beta <- beta (1 + e min(n / horizon, 1)), where ``kl`` is
    the mean of n samples in nats per SEQUENCE (the sum over its tokens), as ``target`` is, and
    ``horizon`` is in samples. ``target`` None: beta stays. Ziegler et al. 2019 (arXiv 1909.08593).
    Raises InputError for a target or horizon that is not above 0, or a beta below 0.
    """

    def __init__(self, init: float, target: float | None, horizon: float) -> None:
        if not 0 <= init < float("inf"):
            raise InputError(f"beta is {init!r}; it must be at least 0 and finite")
        for name, value in (("kl target", target), ("kl horizon", horizon)):
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"{name} is {value!r}; it must be above 0 and finite")
        self.beta, self.target, self.horizon = init, target, horizon

    def update(self, kl: float, n: int) -> float:
        """Takes in the KL of n samples and returns the new beta."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.beta *= 1 + error * min(n / self.horizon, 1.0)
        return self.beta

    def state(self) -> dict[str, float]:
        return {"beta": self.beta}

    def restore(self, state: Mapping[str, float]) -> None:
        self.beta = state["beta"]


def _same_shape(mask: Tensor, *rows: Tensor | None) -> None:
    assert mask.dtype == torch.bool, mask.dtype
    shapes = [tuple(x.shape) for x in rows if x is not None]
    assert all(shape == mask.shape for shape in shapes), (tuple(mask.shape), shapes)
