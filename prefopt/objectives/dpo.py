"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) and every pair loss.

Shapes: B pairs, R = 2B responses (chosen, rejected, chosen, ...), N scored tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from prefopt.data.encode import Encoded, EncodedSet, encode_pairs
from prefopt.data.packing import Batch, preferences_of
from prefopt.errors import InputError
from prefopt.logprobs import sequence_logprobs
from prefopt.loss_names import loss_from
from prefopt.losses import PairLogps
from prefopt.shaping import check_divergence, desensitised, f_divergence, wpo_weights
from prefopt.stats import Evaluation, preference_evaluation

PER_TOKEN = ("simpo", "orpo", "sigmoid_norm")  # losses of mean log-probs


class DPO:
    """An objective from a loss on pairs: what `loss_from` takes, or any callable PairLogps -> [B].

    beta: handed to the loss if it is named, None for the loss's own default; it also scales the
    implicit rewards that are logged, beta * (log pi - log ref). Other keyword arguments go to the
    named loss. divergence (with alpha): what keeps policy and reference together, in place of the
    reverse KL (f-DPO). ld_alpha: weight of the tokens by which one response of a pair is longer
    (LD-DPO). wpo: weights pairs by how probable the policy finds them (WPO).

    A pair of which the chosen response is the better one with probability p (`Pair.preference`)
    has the loss p L(chosen, rejected) + (1 - p) L(rejected, chosen).
    """

    needs_reference: bool
    ends, unit, samples = False, "pairs", True

    def __init__(
        self,
        loss: str | Callable[[PairLogps], Tensor] = "dpo",
        beta: float | None = None,
        *,
        divergence: str = "reverse_kl",
        divergence_alpha: float = 0.5,
        ld_alpha: float | None = None,
        wpo: bool = False,
        **kwargs: Any,
    ):
        if isinstance(loss, str):
            self.loss: Callable[[PairLogps], Tensor] = loss_from(loss, beta=beta, **kwargs)
        elif kwargs:
            raise InputError(f"bind {', '.join(kwargs)} to your loss with functools.partial")
        else:
            self.loss = loss
        self.name: str = getattr(self.loss, "name", getattr(loss, "__name__", "custom"))
        self.beta: float = getattr(self.loss, "beta", 0.1) if beta is None else beta
        self.needs_reference = not getattr(self.loss, "reference_free", False)
        self.whole_batch: bool = getattr(self.loss, "whole_batch", False)
        if not self.beta > 0:
            raise InputError(f"beta is {self.beta!r}; it must be above 0")
        check_divergence(divergence, divergence_alpha)
        if ld_alpha is not None and not 0 <= ld_alpha <= 1:
            raise InputError(f"ld_alpha is {ld_alpha!r}; it must be in [0, 1]")
        if divergence != "reverse_kl" and not self.needs_reference:
            raise InputError(f"loss {self.name!r} has no reference to diverge from")
        if wpo and self.whole_batch:
            raise InputError(f"loss {self.name!r} sorts pairs over the batch; wpo weights them")
        terms = {term.name for term in getattr(self.loss, "terms", ())}
        if divergence != "reverse_kl" and "aot" in terms:
            raise InputError("loss 'aot' sorts policy and reference apart; a divergence joins them")
        self.divergence = {"kind": divergence, "alpha": divergence_alpha}
        self.ld_alpha, self.wpo = ld_alpha, wpo

    def encode(self, data: Any, tokenizer: Any, **options: Any) -> EncodedSet:
        encoded = encode_pairs(data, tokenizer, **options)
        self._check_whole_batch(encoded)
        return encoded

    def _check_whole_batch(self, items: Iterable[Encoded]) -> None:
        if not self.whole_batch:
            return
        for item in items:
            if item.weight != 1:
                raise InputError(f"loss {self.name!r} sorts pairs, which therefore have no weights")
            if item.preference != 1:
                raise InputError(f"loss {self.name!r} sorts pairs: drop ties, or take another loss")

    def __call__(self, policy, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
        """(sum of the losses of B pairs, B, sums over the pairs of what TRL logs as means)."""
        pairs, weights = self.read(policy, batch)
        losses = self.losses(pairs, batch.preferences) * weights
        sums = {k: v.sum() for k, v in self.metrics(pairs, batch.preferences).items()}
        return losses.sum(), len(losses), sums

    def read(self, policy, batch: Batch) -> tuple[PairLogps, Tensor]:
        """(summed log-probs of the pairs under policy and reference, weights of the pairs [B])."""
        if batch.ref_logprobs is None and self.needs_reference:
            raise InputError(
                "the batch has no reference log-probs; fill ref_logprobs from "
                "ReferenceCache.logprobs, or compute it under `with policy.reference()`"
            )
        ids, r = batch.response_ids, batch.num_responses
        if r != 2 * batch.num_groups:
            raise InputError(f"{r} responses to {batch.num_groups} prompts are not pairs")
        self._check_whole_batch(batch.encoded)
        if batch.weights is None:
            weights = torch.ones(r // 2, device=ids.device)
        else:
            weights = batch.weights[::2]
        if self.wpo:
            logprobs, collisions = policy(batch, collisions=True)
            weights = weights * wpo_weights(logprobs, collisions, ids, r)
        else:
            logprobs = policy(batch)
        logps = self._summed(logprobs, ids, r)
        if batch.ref_logprobs is None:
            ref = torch.zeros_like(logps)
        else:
            ref = self._summed(batch.ref_logprobs, ids, r)
        lengths = torch.bincount(ids, minlength=r)
        pairs = PairLogps(logps[::2], logps[1::2], ref[::2], ref[1::2], lengths[::2], lengths[1::2])
        return pairs, weights

    def _summed(self, logprobs: Tensor, ids: Tensor, r: int) -> Tensor:
        if self.ld_alpha is None:
            return sequence_logprobs(logprobs, ids, r)
        return desensitised(logprobs, ids, r, alpha=self.ld_alpha)

    def losses(self, pairs: PairLogps, preferences: Tensor | None = None) -> Tensor:
        """Loss of each pair, [B]; preferences [B], or None where all are 1."""
        if self.divergence["kind"] != "reverse_kl":
            pairs = f_divergence(pairs, **self.divergence)
        losses = self.loss(pairs)
        if losses.shape != pairs.chosen.shape:
            raise InputError(
                f"loss {self.name!r} returned shape {tuple(losses.shape)} for "
                f"{len(pairs.chosen)} pairs; it must return one number per pair"
            )
        if preferences is None:
            return losses
        return preferences * losses + (1 - preferences) * self.loss(_swapped(pairs))

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """Implicit rewards of chosen and rejected, [B] each: beta * (log pi - log ref), per token
        for losses of means over tokens."""
        chosen, rejected = pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected
        if self.name in PER_TOKEN:
            chosen, rejected = chosen / pairs.chosen_len, rejected / pairs.rejected_len
        return self.beta * chosen, self.beta * rejected

    @torch.no_grad()
    def metrics(self, pairs: PairLogps, preferences: Tensor | None = None) -> dict[str, Tensor]:
        """Per pair, [B], under TRL's names; a tie is half right however it is ordered."""
        chosen, rejected = self.rewards(pairs)
        right = (chosen > rejected).float()
        if preferences is not None:
            right = preferences * right + (1 - preferences) * (rejected > chosen).float()
        return {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": right,
            "logps/chosen": pairs.chosen.detach(),
            "logps/rejected": pairs.rejected.detach(),
        }

    def evaluation(self, pairs: PairLogps, weights: Tensor, items: Sequence[Encoded]) -> Evaluation:
        """Of all held-out pairs at once, so that no loss depends on how they were batched."""
        preferences = preferences_of(items)
        columns = self.metrics(pairs, preferences) | {
            "loss": self.losses(pairs, preferences) * weights,
            "logps/accuracies": (pairs.chosen > pairs.rejected).float(),
        }
        metrics = {k: v.double().mean().item() for k, v in columns.items()}
        chosen, rejected = self.rewards(pairs)
        margins = (chosen - rejected).numpy()
        lengths = pairs.chosen_len.numpy(), pairs.rejected_len.numpy()
        return preference_evaluation(margins, *lengths, items, metrics)

    def over(self, policy, batches: Sequence[Batch]) -> Callable:
        """The objective of one step's micro-batches: for losses that look at the whole step, the
        loss over all pairs, whose gradient by each log-prob is found in a pass of its own."""
        if not self.whole_batch or len(batches) < 2:
            return self
        with torch.no_grad():
            reads = [self.read(policy, batch.to(policy.device))[0] for batch in batches]
        with torch.enable_grad():
            pairs = PairLogps(*(torch.cat(column) for column in zip(*reads, strict=True)))
            chosen, rejected = (x.requires_grad_() for x in pairs[:2])
            losses = self.losses(pairs)
            by_logp = torch.autograd.grad(losses.sum(), (chosen, rejected))
        sizes = [len(read.chosen) for read in reads]
        parts = zip(*(x.detach().split(sizes) for x in (losses, *by_logp)), strict=True)
        return _Linear(self, iter(parts))


def _swapped(p: PairLogps) -> PairLogps:
    return PairLogps(
        p.rejected, p.chosen, p.ref_rejected, p.ref_chosen, p.rejected_len, p.chosen_len
    )


class _Linear:
    """The micro-batches of one step, in order: the known losses, with the known gradients."""

    def __init__(self, objective: DPO, parts):
        self.objective, self.parts = objective, parts

    def __call__(self, policy, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
        losses, by_chosen, by_rejected = next(self.parts)
        pairs, _ = self.objective.read(policy, batch)  # whose weights are all 1
        slope = by_chosen * pairs.chosen + by_rejected * pairs.rejected
        total = (losses + slope - slope.detach()).sum()
        sums = {k: v.sum() for k, v in self.objective.metrics(pairs).items()}
        return total, len(losses), sums
