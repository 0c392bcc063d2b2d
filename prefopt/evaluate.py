"""Held-out evaluation: does the policy prefer, score or predict what people did?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from prefopt.data.packing import Batch
from prefopt.errors import InputError
from prefopt.objectives.dpo import DPO
from prefopt.stats import Evaluation


@torch.no_grad()
def evaluate(
    policy,
    batches: Iterable[Batch],
    objective: Any = None,
    *,
    on_batch: Callable[[Batch], None] | None = None,
) -> Evaluation:
    """Judge the policy on batches by ``objective`` (default DPO()); dropout off, nothing changes.

    An objective that compares with the reference needs batches whose ``ref_logprobs`` are filled.
    Accuracy is the share of pairs with a margin strictly above 0: where policy and reference are
    the same model every margin is 0 and so is the accuracy; ``logps/accuracies`` is the share with
    log pi(chosen) > log pi(rejected), which needs no reference.
    """
    objective = objective or DPO()
    reads: list[Any] = []
    weights: list[Tensor] = []
    items = []
    training = policy.training
    policy.eval()
    try:
        for batch in batches:
            read, weight = objective.read(policy, batch.to(policy.device))
            reads.append(type(read)(*(column.cpu() for column in read)))
            weights.append(weight.cpu())
            items += batch.encoded
            if on_batch is not None:
                on_batch(batch)
    finally:
        policy.train(training)
    if not items:
        raise InputError(f"there are no {objective.unit} to evaluate on")
    whole = type(reads[0])(*(torch.cat(column) for column in zip(*reads, strict=True)))
    return objective.evaluation(whole, torch.cat(weights), items)
