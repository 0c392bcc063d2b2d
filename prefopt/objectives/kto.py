"""KTO (Ethayarajh et al. 2024, arXiv 2402.01306): single responses, each desirable or not.

Its baseline z0 estimates KL(pi || ref) from responses that belong to another prompt: max(0, mean
of log pi(y'|x) - log ref(y'|x)), over all of a step. Such a response stands in the group of its
prompt as one more, labelled BASELINE, so that it shares the prompt and is cached like the others.

Shapes: R responses, N scored tokens.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefopt.data.encode import (
    BASELINE,
    DESIRABLE,
    UNDESIRABLE,
    encode_feedback,
    encode_pairs,
)
from prefopt.data.encoded import Encoded, EncodedSet
from prefopt.data.packing import Batch
from prefopt.data.records import Feedback
from prefopt.errors import InputError
from prefopt.logprobs import sequence_logprobs
from prefopt.losses import kto
from prefopt.stats import Evaluation, preference_evaluation


class Responses(NamedTuple):
    """log pi - log ref, label and length of R responses, [R]."""

    logratios: Tensor
    labels: Tensor
    lengths: Tensor


def next_prompts(encoded: Sequence[Encoded]) -> list[int]:
    """Of each group the position of the next one, around the end, that has another prompt."""
    n, following = len(encoded), list(range(len(encoded)))
    prompts = [blake2b(item.prompt.tobytes(), digest_size=16).digest() for item in encoded]
    if len(set(prompts)) < 2:
        raise InputError("KTO needs responses to two prompts at least, for its baseline")
    for i in reversed(range(2 * n)):  # twice around: the last groups look at the first
        here, after = i % n, (i + 1) % n
        following[here] = after if prompts[here] != prompts[after] else following[after]
    return following


def with_baseline(item: Encoded, other: Encoded, max_length: int) -> Encoded:
    """The group with the first response of another, cut to fit, as one more."""
    room = max_length - len(item.prompt)
    responses = (*item.responses, other.responses[0][:room])
    masks = (*(item.scored or (None,) * len(item.responses)), (other.scored or (None,))[0])
    if masks[-1] is not None:
        masks = (*masks[:-1], masks[-1][:room])
    return dataclasses.replace(
        item,
        responses=responses,
        scored=None if all(mask is None for mask in masks) else masks,
        labels=(*(item.labels or (DESIRABLE, UNDESIRABLE)), BASELINE),
    )


class KTO:
    """An objective from Feedback records, or from pairs: a desirable and an undesirable response.

    The weights balance the two kinds; the paper keeps desirable_weight * n_desirable within 1 to
    4/3 of undesirable_weight * n_undesirable.
    """

    needs_reference, ends, samples = True, False, True

    def __init__(
        self,
        beta: float = 0.1,
        *,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
    ):
        for name, value in (("beta", beta), ("desirable_weight", desirable_weight)):
            if not value > 0:
                raise InputError(f"{name} is {value!r}; it must be above 0")
        if not undesirable_weight >= 0:
            raise InputError(f"undesirable_weight is {undesirable_weight!r}; it must be at least 0")
        self.name, self.unit, self.beta = "kto", "prompts", beta
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight
        self.baseline: Tensor | None = None  # z0, where it is known already: see over()
        self.desirable_share = 0.5  # of the responses; encode() counts it

    def encode(
        self, data: Any, tokenizer: Any, *, max_length: int = 1024, **options: Any
    ) -> EncodedSet:
        """Each group gets the first response to the next other prompt as its BASELINE, cut to fit.

        InputError where there is only one prompt, and for pairs that are ties.
        """
        encode = encode_feedback if isinstance(data[0], Feedback) else encode_pairs
        encoded = encode(data, tokenizer, max_length=max_length, **options)
        labels: Counter[int] = Counter()

        def items() -> Iterator[Encoded]:
            for item, at in zip(encoded, next_prompts(encoded), strict=True):
                if item.preference != 1:
                    raise InputError("kto wants to know which response is good: drop the ties")
                made = with_baseline(item, encoded[at], max_length)
                labels.update(made.labels)
                yield made

        whole = EncodedSet(items(), encoded.counts, encoded.template)
        self.desirable_share = labels[DESIRABLE] / (labels[DESIRABLE] + labels[UNDESIRABLE])
        return whole

    def __call__(self, policy, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
        """(sum of the losses of the responses, how many, sums over them of the metrics)."""
        read, weights = self.read(policy, batch)
        z0 = self._baseline(read) if self.baseline is None else self.baseline
        losses, kept = self._losses(read, z0), read.labels != BASELINE
        sums = {k: v.sum() for k, v in self._metrics(read, z0).items()}
        return (losses * weights[kept]).sum(), len(losses), sums

    def read(self, policy, batch: Batch) -> tuple[Responses, Tensor]:
        """(the responses of the batch, their weights [R])."""
        if batch.labels is None or batch.ref_logprobs is None:
            raise InputError("KTO needs batches with labels and reference log-probs: KTO().encode")
        ids, r = batch.response_ids, batch.num_responses
        logps = sequence_logprobs(policy(batch), ids, r)
        ref = sequence_logprobs(batch.ref_logprobs, ids, r)
        weights = torch.ones_like(ref) if batch.weights is None else batch.weights
        lengths = torch.bincount(ids, minlength=r)
        return Responses(logps - ref, batch.labels, lengths), weights

    def over(self, policy, batches: Sequence[Batch]) -> Callable:
        """With the baseline of a whole step, whose micro-batches hold only parts of it each."""
        if self.baseline is not None or len(batches) < 2:
            return self
        with torch.no_grad():
            reads = [self.read(policy, batch.to(policy.device))[0] for batch in batches]
        z0 = self._baseline(Responses(*(torch.cat(c) for c in zip(*reads, strict=True))))
        known = copy.copy(self)
        known.baseline = z0
        return known

    def _baseline(self, read: Responses) -> Tensor:
        return read.logratios[read.labels == BASELINE].mean().clamp_min(0).detach()

    def _losses(self, read: Responses, z0: Tensor) -> Tensor:
        kept = read.labels != BASELINE
        weights = {
            "desirable_weight": self.desirable_weight,
            "undesirable_weight": self.undesirable_weight,
        }
        desirable = read.labels[kept] == DESIRABLE
        return kto(read.logratios[kept], desirable, z0, beta=self.beta, **weights)

    @torch.no_grad()
    def _metrics(self, read: Responses, z0: Tensor) -> dict[str, Tensor]:
        """Per response that counts. The means of rewards/chosen and rewards/rejected are taken over
        all responses: divided by the share of each kind in the data, they are those of the kind."""
        kept = read.labels != BASELINE
        rewards, good = self.beta * read.logratios[kept], read.labels[kept] == DESIRABLE
        share = min(max(self.desirable_share, 1e-9), 1 - 1e-9)
        chosen, rejected = rewards * good / share, rewards * ~good / (1 - share)
        return {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": ((rewards > self.beta * z0) == good).float(),
            "kl": z0.expand_as(rewards),
        }

    def evaluation(self, read: Responses, weights: Tensor, items: Sequence[Encoded]) -> Evaluation:
        """Of all held-out responses at once. The margin of a pair is the difference of its rewards;
        that of a single response is how far it lies on the right side of the baseline."""
        z0, kept = self._baseline(read), read.labels != BASELINE
        columns = self._metrics(read, z0) | {"loss": self._losses(read, z0) * weights[kept]}
        metrics = {k: v.double().mean().item() for k, v in columns.items()}
        rewards, lengths = self.beta * read.logratios[kept], read.lengths[kept]
        good = read.labels[kept] == DESIRABLE
        if all(len(item.responses) == 3 for item in items):
            margins, longer = rewards[good] - rewards[~good], (lengths[good], lengths[~good])
        else:
            sign = torch.where(good, 1.0, -1.0)
            margins, longer = sign * (rewards - self.beta * z0), (lengths, lengths)
        return preference_evaluation(
            margins.numpy(), longer[0].numpy(), longer[1].numpy(), items, metrics
        )
