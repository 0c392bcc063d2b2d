"""What a run of online reinforcement learning decides before its first update: which prompts, in
which order, how many updates. All of it follows from data, configuration and seed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from prefopt.data.records import Message, Pair
from prefopt.data.split import split_pairs
from prefopt.errors import InputError
from prefopt.loading import context_length
from prefopt.online_config import PPOConfig
from prefopt.sampling import prompt_ids


@dataclass(frozen=True)
class PromptPlan:
    """prompts: the source, by number; ids: their tokens, None of those left out; train, held_out:
    numbers; updates: how many; notes: for data_report.json."""

    prompts: Sequence[list[Message]]
    ids: list[np.ndarray | None]
    train: list[int]
    held_out: list[int]
    updates: int
    notes: dict[str, Any]


def plan_prompts(policy: Any, prompts: Sequence[list[Message]], config: PPOConfig) -> PromptPlan:
    """Encode, leave out what has no room for an answer, split; InputError if nothing is left."""
    longest = min(config.max_length, context_length(policy.model))
    ids = prompt_ids(list(prompts), policy.tokenizer, config.template)
    room = longest - config.max_new_tokens
    ids = [None if found is None or len(found) > room else found for found in ids]
    fitting = [i for i, found in enumerate(ids) if found is not None]
    if not fitting:
        raise InputError(
            f"none of the {len(ids):,} prompts leaves room for {config.max_new_tokens} new tokens "
            f"within {longest}; lower max_new_tokens or raise max_length"
        )
    train, held_out = split_pairs([Pair(prompts[i], [], []) for i in fitting], config.eval_fraction)
    train, held_out = ([fitting[i] for i in part] for part in (train, held_out))
    updates = sum(1 for _ in islice(update_groups(train, config), config.max_steps))
    report = getattr(prompts, "report", None)
    notes = {
        **(report.to_dict() if report else {"source": "prompts", "rows": len(ids)}),
        "objective": "dpo" if config.loss == "dpo" else "ppo",
        "unit": "prompts",
        "encoding": {
            "max_length": longest,
            "train prompts": len(train),
            "held-out prompts": len(held_out),
            "prompts without room": len(ids) - len(fitting),
        },
    }
    return PromptPlan(prompts, ids, train, held_out, updates, notes)


def update_groups(train: list[int], config: PPOConfig) -> Iterator[tuple[float, list[int]]]:
    """(epoch reached, prompt numbers) of every update, shuffled by (seed, epoch)."""
    for epoch in range(config.epochs):
        order = np.random.default_rng((config.seed, epoch)).permutation(train).tolist()
        for start in range(0, len(order), config.batch_size):
            numbers = order[start : start + config.batch_size]
            yield epoch + (start + len(numbers)) / len(order), numbers


def minibatches(groups: int, update: int, epoch: int, config: PPOConfig) -> list[list[int]]:
    """Places of the groups of each optimizer step of one pass, reshuffled by (seed, update, pass);
    as even as they can be. A single minibatch keeps the order."""
    if config.minibatches == 1:
        return [list(range(groups))]
    order = np.random.default_rng((config.seed, update, epoch)).permutation(groups)
    return [part.tolist() for part in np.array_split(order, config.minibatches) if len(part)]


def identity(plan: PromptPlan, config: PPOConfig, weights: Mapping[str, float]) -> dict[str, Any]:
    """What must be equal for a resumed run: it decides what an update sees and does.
    ``weights``: of the rewards, by their names."""
    free = ("out", "resume", "save_every", "keep", "samples", "parallel", "slots")
    settings = {
        name: repr(getattr(config, name))
        for name in config.__dataclass_fields__
        if name not in free
    }
    tokens = hashlib.sha256(b"".join(plan.ids[i].tobytes() + b"|" for i in plan.train))  # type: ignore[union-attr]
    return {
        **settings,
        "rewards": ", ".join(f"{name} ({weight:g})" for name, weight in weights.items()),
        "updates": plan.updates,
        "prompts": tokens.hexdigest()[:16],
    }
