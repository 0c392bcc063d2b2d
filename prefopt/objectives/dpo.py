"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) and every pair loss.

Shapes: B pairs, R = 2B responses (chosen, rejected, chosen, ...), N scored tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prefopt.data.packing import Batch
from prefopt.errors import InputError
from prefopt.logprobs import sequence_logprobs
from prefopt.losses import PairLogps, loss_from


class DPO:
    """An objective from a loss on pairs: a name of LOSSES, or any callable PairLogps -> [B].

    ``beta`` scales the implicit rewards that are logged, beta * (log pi - log ref), and is handed
    to the loss if it is named and takes one; other keyword arguments go to the named loss.
    """

    def __init__(
        self, loss: str | Callable[[PairLogps], Tensor] = "dpo", beta: float = 0.1, **kwargs: Any
    ):
        if not beta > 0:
            raise InputError(f"beta is {beta!r}; it must be above 0")
        if not 0 <= kwargs.get("label_smoothing", 0.0) < 0.5:
            raise InputError(
                f"label_smoothing is {kwargs['label_smoothing']!r}; it must be in [0, 0.5)"
            )
        self.beta = beta
        if isinstance(loss, str):
            self.name, self.loss = loss, loss_from(loss, beta=beta, **kwargs)
        elif kwargs:
            raise InputError(f"bind {', '.join(kwargs)} to your loss with functools.partial")
        else:
            self.name, self.loss = getattr(loss, "__name__", "custom"), loss

    def __call__(self, policy, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
        """(sum of the losses of B pairs, B, sums over the pairs of what TRL logs as means)."""
        pairs = self.pair_logps(policy, batch)
        losses = self.losses(pairs, batch)
        return losses.sum(), len(losses), {k: v.sum() for k, v in self.metrics(pairs).items()}

    def pair_logps(self, policy, batch: Batch) -> PairLogps:
        """Summed log-probs of each pair under the policy and the reference."""
        if batch.ref_logprobs is None:
            raise InputError(
                "the batch has no reference log-probs; fill ref_logprobs from "
                "ReferenceCache.logprobs, or compute it under `with policy.reference()`"
            )
        ids, r = batch.response_ids, batch.num_responses
        if r != 2 * batch.num_groups:
            raise InputError(f"{r} responses to {batch.num_groups} prompts are not pairs")
        logps = sequence_logprobs(policy(batch), ids, r)
        ref = sequence_logprobs(batch.ref_logprobs, ids, r)
        lengths = torch.bincount(ids, minlength=r)
        return PairLogps(logps[::2], logps[1::2], ref[::2], ref[1::2], lengths[::2], lengths[1::2])

    def losses(self, pairs: PairLogps, batch: Batch) -> Tensor:
        """Loss of each pair, weighted, [B]."""
        losses = self.loss(pairs)
        if losses.shape != pairs.chosen.shape:
            raise InputError(
                f"loss {self.name!r} returned shape {tuple(losses.shape)} for "
                f"{len(pairs.chosen)} pairs; it must return one number per pair"
            )
        return losses if batch.weights is None else losses * batch.weights[::2]

    @torch.no_grad()
    def metrics(self, pairs: PairLogps) -> dict[str, Tensor]:
        """Per pair, [B], under TRL's names."""
        chosen = self.beta * (pairs.chosen - pairs.ref_chosen)
        rejected = self.beta * (pairs.rejected - pairs.ref_rejected)
        return {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "logps/chosen": pairs.chosen.detach(),
            "logps/rejected": pairs.rejected.detach(),
        }
