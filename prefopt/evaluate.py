"""Held-out preference evaluation: against its reference, does the policy prefer what people did?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from prefopt.data.packing import Batch
from prefopt.errors import InputError
from prefopt.losses import PairLogps
from prefopt.metrics import Meter
from prefopt.objectives.dpo import DPO
from prefopt.stats import preference_summary


@dataclass(frozen=True)
class Evaluation:
    """``metrics``: means over the pairs under TRL's names (no prefix); ``summary``: accuracy and
    margin with 95% bootstrap intervals over prompts; ``margins`` [n]: beta times the margin."""

    metrics: dict[str, float]
    summary: dict[str, Any]
    margins: np.ndarray


@torch.no_grad()
def evaluate(
    policy,
    batches: Iterable[Batch],
    objective: DPO | None = None,
    *,
    on_batch: Callable[[Batch], None] | None = None,
) -> Evaluation:
    """Score pairs whose ``ref_logprobs`` are filled; dropout off, nothing is changed.

    Accuracy is the share of pairs with a margin strictly above 0: where policy and reference are
    the same model every margin is 0 and so is the accuracy; ``logps/accuracies`` is the share with
    log pi(chosen) > log pi(rejected), which needs no reference.
    """
    objective = objective or DPO()
    meter, collected, prompts = Meter(), [], []
    training = policy.training
    policy.eval()
    try:
        for batch in batches:
            batch = batch.to(policy.device)
            pairs = objective.pair_logps(policy, batch)
            sums = {k: v.sum() for k, v in objective.metrics(pairs).items()}
            sums["loss"] = objective.losses(pairs, batch).sum()
            sums["logps/accuracies"] = (pairs.chosen > pairs.rejected).float().sum()
            meter.add(sums, batch.num_groups)
            collected.append(PairLogps(*(x.cpu() for x in pairs)))
            prompts += [item.prompt.tobytes() for item in batch.encoded]
            if on_batch is not None:
                on_batch(batch)
    finally:
        policy.train(training)
    if not collected:
        raise InputError("there is no pair to evaluate on")
    columns = [torch.cat(column) for column in zip(*collected, strict=True)]
    pairs = PairLogps(*columns)
    margins = (objective.beta * pairs.margin).numpy()
    summary = preference_summary(
        margins,
        pairs.chosen_len.numpy(),
        pairs.rejected_len.numpy(),
        np.unique(np.array(prompts, dtype=object), return_inverse=True)[1],
    )
    return Evaluation(meter.flush(), summary, margins)
