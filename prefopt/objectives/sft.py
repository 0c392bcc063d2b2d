"""Supervised fine-tuning: the negative log-likelihood of what is imitated, per token.

Shapes: R dialogues, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from prefopt.data.encode import Encoded, EncodedSet
from prefopt.data.encode_dialogues import LOSS_ON, encode_dialogues
from prefopt.data.packing import Batch
from prefopt.data.records import Dialogue, Pair
from prefopt.data.schemas.dialogues import from_pair
from prefopt.errors import InputError
from prefopt.logprobs import sequence_logprobs
from prefopt.stats import Evaluation, bootstrap_ci


class Likelihood(NamedTuple):
    """-sum of log p over the scored tokens of each dialogue, and how many those are, [R]."""

    nll: Tensor
    tokens: Tensor


class SFT:
    """An objective from dialogues or plain text; of pairs the chosen response is imitated.

    The loss is the mean of -log p over all scored tokens of a step, so a token counts the same in a
    short answer and in a long one, however a step is packed or split. loss_on: "assistant" scores
    the assistant's turns, "all" every token but the first.
    """

    name = "sft"
    needs_reference, ends, unit, samples = False, False, "dialogues", True

    def __init__(self, loss_on: str = "assistant"):
        if loss_on not in LOSS_ON:
            raise InputError(f"loss_on is {loss_on!r}; it is one of {', '.join(LOSS_ON)}")
        self.loss_on = loss_on

    def encode(self, data: Any, tokenizer: Any, **options: Any) -> EncodedSet:
        return encode_dialogues(_dialogues(data), tokenizer, loss_on=self.loss_on, **options)

    def __call__(self, policy, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
        """(sum of -log p over N scored tokens, each times its dialogue's weight, N, nothing)."""
        read, weights = self.read(policy, batch)
        return (read.nll * weights).sum(), len(batch.targets), {}

    def read(self, policy, batch: Batch) -> tuple[Likelihood, Tensor]:
        """(negative log-likelihoods, weights of the dialogues [R])."""
        ids, r = batch.response_ids, batch.num_responses
        nll = -sequence_logprobs(policy(batch), ids, r)
        weights = torch.ones_like(nll) if batch.weights is None else batch.weights
        return Likelihood(nll, torch.bincount(ids, minlength=r)), weights

    def evaluation(self, read: Likelihood, weights: Tensor, items: Sequence[Encoded]) -> Evaluation:
        """Loss as in training, and perplexity exp(sum nll / sum tokens) with a 95% bootstrap
        interval over dialogues (None for a single one)."""
        nll, tokens = read.nll.double().numpy(), read.tokens.numpy()
        total = int(tokens.sum())
        loss = float((nll * weights.double().numpy()).sum() / total)
        perplexity = float(np.exp(nll.sum() / total))
        # Each dialogue is a cluster of its tokens: the mean over the tokens of drawn dialogues.
        dialogue = np.repeat(np.arange(len(nll)), tokens)
        low, high = np.exp(bootstrap_ci((nll / tokens)[dialogue], dialogue)).tolist()
        several = len(nll) > 1
        summary = {
            "n": len(nll),
            "tokens": total,
            "loss": loss,
            "perplexity": perplexity,
            "perplexity_low": low if several else None,
            "perplexity_high": high if several else None,
        }
        return Evaluation({"loss": loss, "perplexity": perplexity}, summary, np.empty(0))


def _dialogues(data: Any) -> Iterator[Dialogue]:
    for i, record in enumerate(data):
        if isinstance(record, Pair):
            record = from_pair(record)
        if not isinstance(record, Dialogue):
            raise InputError(
                f"record {i} is a {type(record).__name__}, and SFT learns from Dialogue or Pair "
                "records: read the data with load_dialogues"
            )
        yield record
