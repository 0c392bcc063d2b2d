"""Reward models: one score per response, trained so that better responses score higher.

Of pairs the Bradley-Terry loss (Stiennon et al. 2020, arXiv 2009.01325), of K ranked responses the
Plackett-Luce loss. Shapes: G groups (prompts), R responses, best first in each group, P ordered
pairs (a response and one ranked below it).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefopt.data.encode import Encoded, EncodedSet, encode_pairs
from prefopt.data.encode_rankings import encode_rankings
from prefopt.data.packing import Batch, preferences_of
from prefopt.data.records import Ranking
from prefopt.errors import InputError
from prefopt.nn.heads import ScoreStats
from prefopt.ranking import bradley_terry, plackett_luce
from prefopt.stats import Evaluation, preference_evaluation

STATS_RESPONSES = 1000  # whose scores the statistics are of


class Scored(NamedTuple):
    """Score and number of tokens of R responses, [R]."""

    scores: Tensor
    lengths: Tensor


class Reward:
    """An objective from Pair or Ranking records, for a policy loaded with head="score".

    margin: times a pair's own margin is by how much its chosen response should win; pairs without
    one count as 0. center: weight of (c + r)^2, which pulls the scores, known up to a constant, to
    mean 0 (0.01 is common). A score is read at the EOS token that ends a response: where a chat
    template writes a line break behind it, other programs must cut that off to get the same score.
    """

    needs_reference, ends, samples = False, True, False

    def __init__(self, margin: float = 0.0, center: float = 0.0):
        for name, value in (("margin", margin), ("center", center)):
            if not 0 <= value < math.inf:
                raise InputError(f"{name} is {value!r}; it must be a number of at least 0")
        self.name, self.unit = "reward", "pairs"
        self.margin, self.center = margin, center

    def encode(self, data: Any, tokenizer: Any, **options: Any) -> EncodedSet:
        ranked = len(data) and isinstance(data[0], Ranking)
        self.unit = "rankings" if ranked else "pairs"
        encode = encode_rankings if ranked else encode_pairs
        return encode(data, tokenizer, **options)

    def __call__(self, policy, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
        """(sum of the losses of G groups, G, sums over the groups of what TRL logs as means)."""
        read, weights = self.read(policy, batch)
        sizes = [len(item.responses) for item in batch.encoded]
        losses = self.losses(read.scores, sizes, batch.margins, batch.preferences)
        weights = weights[_starts(sizes, weights.device)]
        sums = {k: v.sum() for k, v in self.metrics(read.scores, sizes, batch.preferences).items()}
        return (losses * weights).sum(), len(losses), sums

    def read(self, policy, batch: Batch) -> tuple[Scored, Tensor]:
        """(scores of the responses, their weights [R])."""
        if not getattr(policy, "is_reward_model", True):  # a wrapper of DDP or FSDP does not say
            raise InputError("the model scores no text: load it with head='score'")
        if any(len(item.responses) < 2 for item in batch.encoded):
            raise InputError("a prompt has one response only: there is nothing to compare it with")
        scores = policy(batch)
        lengths = torch.bincount(batch.response_ids, minlength=batch.num_responses)
        weights = torch.ones_like(scores) if batch.weights is None else batch.weights
        return Scored(scores, lengths), weights.detach()

    def losses(
        self,
        scores: Tensor,
        sizes: Sequence[int],
        margins: Tensor | None,
        preferences: Tensor | None = None,
    ) -> Tensor:
        """Loss of each group, [G]; sizes, margins and preferences are of the groups."""
        margins = None if margins is None or not self.margin else self.margin * margins
        if all(size == 2 for size in sizes):
            about = {"margin": margins, "preference": preferences, "center": self.center}
            return bradley_terry(scores[::2], scores[1::2], **about)
        if margins is not None:
            raise InputError("margins are of pairs, and a prompt has more than two responses")
        return plackett_luce(
            scores, _groups(sizes).to(scores.device), len(sizes), center=self.center
        )

    @torch.no_grad()
    def metrics(
        self, scores: Tensor, sizes: Sequence[int], preferences: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Per group, [G]: least, mean and greatest score of its responses; over its ordered pairs
        the mean score of the better and of the worse response, of their difference, and the share
        in which the better one scores higher (a tie in the data is half right). `min_reward` is
        thus the mean of the groups' least scores, where TRL has the least of a whole batch, which
        depends on the size of that."""
        better, worse, owner = (x.to(scores.device) for x in _ordered_pairs(sizes))
        groups, empty = _groups(sizes).to(scores.device), scores.new_zeros(len(sizes))

        def over(index: Tensor, x: Tensor, how: str = "mean") -> Tensor:
            return empty.scatter_reduce(0, index, x, how, include_self=False)

        chosen, rejected = scores[better], scores[worse]
        right, margin = over(owner, (chosen > rejected).to(scores)), over(owner, chosen - rejected)
        if preferences is not None:  # of pairs
            other = over(owner, (rejected > chosen).to(scores))
            right = preferences * right + (1 - preferences) * other
        return {
            "min_reward": over(groups, scores, "amin"),
            "mean_reward": over(groups, scores),
            "max_reward": over(groups, scores, "amax"),
            "accuracy": right,
            "margin": margin,
            "rewards/chosen": over(owner, chosen),
            "rewards/rejected": over(owner, rejected),
            "rewards/margins": margin,
            "rewards/accuracies": right,
        }

    def evaluation(self, read: Scored, weights: Tensor, items: Sequence[Encoded]) -> Evaluation:
        """Of all held-out groups at once: all their ordered pairs, in clusters of their prompts."""
        sizes = [len(item.responses) for item in items]
        known = [item.margin for item in items]
        margins = torch.tensor([m or 0.0 for m in known]) if any(known) else None
        preferences = preferences_of(items)
        losses = self.losses(read.scores, sizes, margins, preferences)
        columns = self.metrics(read.scores, sizes, preferences)
        columns["loss"] = losses * weights[_starts(sizes, weights.device)]
        metrics = {k: v.double().mean().item() for k, v in columns.items()}
        better, worse, owner = _ordered_pairs(sizes)
        gaps = (read.scores[better] - read.scores[worse]).numpy()
        lengths = read.lengths[better].numpy(), read.lengths[worse].numpy()
        of = [items[i] for i in owner.tolist()]
        return preference_evaluation(gaps, *lengths, of, metrics)

    @torch.no_grad()
    def finish(self, policy, batches: Iterable[Batch]) -> None:
        """Mean and standard deviation of the scores of training responses, kept with the model."""
        training, found, count = policy.training, [], 0
        policy.eval()
        try:
            for batch in batches:
                found.append(policy(batch.to(policy.device)).cpu())
                count += batch.num_responses
                if count >= STATS_RESPONSES:
                    break
        finally:
            policy.train(training)
        if found:
            policy.score_stats = ScoreStats.of(torch.cat(found)[:STATS_RESPONSES])


def _groups(sizes: Sequence[int]) -> Tensor:
    """The group of each response, [R]."""
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


def _starts(sizes: Sequence[int], device: torch.device) -> Tensor:
    """The first response of each group, [G]."""
    ends = torch.tensor(sizes).cumsum(0)
    return (ends - torch.tensor(sizes)).to(device)


def _ordered_pairs(sizes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(better response, worse response, group) of every ordered pair, [P] each, group by group."""
    better, worse, owner, start = [], [], [], 0
    for group, size in enumerate(sizes):
        i, j = torch.triu_indices(size, size, 1)
        better.append(i + start)
        worse.append(j + start)
        owner.append(torch.full_like(i, group))
        start += size
    return torch.cat(better), torch.cat(worse), torch.cat(owner)
