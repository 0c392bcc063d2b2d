"""What an update of online reinforcement learning minimises, for the policy and for its critic.

Losses are those of `prefopt.rl_losses`, unreduced on rows [R, T]; here they meet the policy and a
batch. Both objectives return (loss sum, count, sums), so that micro-batches do not change the
gradient: the sum over tokens of weight times loss, with the weights of the aggregation, is divided
by the count of the whole minibatch.

Shapes: N tokens of a batch, R responses, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prefopt.data.packing import Batch
from prefopt.rl_losses import (
    count_of,
    importance_weights,
    kl_loss,
    policy_loss_from,
    ppo_value_loss,
    token_weights,
)

Sums = dict[str, Tensor]
EXTREMES = {"policy/ratio_max": torch.maximum, "policy/ratio_min": torch.minimum}


class PPO:
    """The policy's objective, and the value loss with it where the critic is a trunk.

    ``batch.columns`` holds, [N] each: advantages; kept (1 where the token is learnt from); old, the
    log-probs before the update, without which those of this forward are taken, so that the ratio is
    exactly 1; ref with ``kl_loss_kind``; sampled with ``importance``; values and returns with
    ``value_coef``. ``temperature`` and ``closed`` are those of the sampling, for every log-prob
    (see Policy.forward). ``on_logprobs(batch, logprobs)`` is called with every forward's.
    """

    def __init__(
        self,
        loss: str = "ppo",
        *,
        temperature: float = 1.0,
        closed: tuple[int, tuple[int, ...]] | None = None,
        aggregation: str = "token-mean",
        denom: float | None = None,
        kl_loss_kind: str | None = None,
        beta: float = 0.0,
        entropy_coef: float = 0.0,
        importance: str = "none",
        importance_cap: float = 2.0,
        value_coef: float | None = None,
        value_clip: float | None = 0.2,
        on_logprobs: Callable[[Batch, Tensor], None] | None = None,
        **options: Any,
    ):
        self.loss = policy_loss_from(loss, **options)
        self.name, self.scoring = loss, {"temperature": temperature, "closed": closed}
        self.aggregation, self.denom = aggregation, denom
        self.kl_loss_kind, self.beta, self.entropy_coef = kl_loss_kind, beta, entropy_coef
        self.importance, self.importance_cap = importance, importance_cap
        self.value_coef, self.value_clip = value_coef, value_clip
        self.on_logprobs = on_logprobs
        self.extremes: Sums = {}

    def __call__(self, policy, batch: Batch) -> tuple[Tensor, Tensor, Sums]:
        known: Any = batch.columns
        rows = _Rows(batch)
        asked = {"entropy": self.entropy_coef > 0, "values": self.value_coef is not None}
        asked = {name: True for name, wanted in asked.items() if wanted}
        given = policy(batch, **self.scoring, **asked)
        columns = list(given) if asked else [given]
        logp = columns.pop(0)
        if self.on_logprobs is not None:
            self.on_logprobs(batch, logp.detach())
        old = known.get("old", logp.detach())
        logp, old, advantages = (rows(x) for x in (logp, old, known["advantages"]))
        mask = rows(known["kept"]) > 0
        losses = self.loss(logp, old, advantages, mask)
        sums: Sums = {}
        if self.importance != "none":
            weights = importance_weights(
                old, rows(known["sampled"]), mask, kind=self.importance, cap=self.importance_cap
            )
            losses = losses * weights
            cut = (weights == 0) | (weights >= self.importance_cap)
            sums["rollout/importance_clipped"] = (cut & mask).sum()
        if self.kl_loss_kind is not None:
            ref = rows(known["ref"])
            losses = losses + self.beta * kl_loss(logp, old, ref, kind=self.kl_loss_kind)
        if self.entropy_coef:
            losses = losses - self.entropy_coef * rows(columns.pop(0))
        weights, count = self._weights(mask, losses.dtype)
        total = (weights * losses.where(mask, 0.0)).sum()
        sums["loss/policy"] = total.detach()
        if self.value_coef is not None:
            values, old_values = rows(columns.pop(0)), rows(known["values"])
            wrong = ppo_value_loss(values, old_values, rows(known["returns"]), clip=self.value_clip)
            wrong = (weights * wrong.where(mask, 0.0)).sum()
            sums["loss/value"] = wrong.detach()
            total = total + self.value_coef * wrong
        found = self.loss.statistics(logp, old, advantages, mask)
        for name, of_two in EXTREMES.items():  # no sums
            value = found.pop(name)
            before = self.extremes.get(name, value)
            self.extremes[name] = of_two(before, value)
        return total, count, {**sums, **found}

    def take_extremes(self) -> dict[str, float]:
        """The largest and smallest ratio since the last call."""
        found = {name: value.item() for name, value in self.extremes.items()}
        self.extremes = {}
        return found

    def _weights(self, mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Any]:
        lengths = mask.sum(1)
        tokens, responses = int(lengths.sum()), int((lengths > 0).sum())
        given = lengths[:, None].to(dtype)
        weights = token_weights(given, self.aggregation, denom=self.denom)
        return weights, count_of(self.aggregation, tokens, responses)


class ValueLoss:
    """The objective of a critic of its own: half the squared error, a mean over tokens."""

    def __init__(self, clip: float | None = 0.2):
        self.clip = clip

    def __call__(self, critic, batch: Batch) -> tuple[Tensor, int, Sums]:
        known: Any = batch.columns
        values, kept = critic.values(batch), known["kept"]
        losses = ppo_value_loss(values, known["values"], known["returns"], clip=self.clip)
        clipped = torch.zeros(())
        if self.clip is not None:
            clipped = (((values - known["values"]).abs() > self.clip) & (kept > 0)).sum()
        sums = {"value/clipfrac": clipped}
        return (losses * kept).sum(), int(kept.sum()), sums


class _Rows:
    """[N] -> [R, T], 0 behind the end of a response."""

    def __init__(self, batch: Batch):
        lengths = torch.bincount(batch.response_ids, minlength=batch.num_responses)
        longest = int(lengths.max())
        self.mask = torch.arange(longest, device=lengths.device) < lengths[:, None]

    def __call__(self, flat: Tensor) -> Tensor:
        return flat.new_zeros(self.mask.shape).masked_scatter(self.mask, flat)
