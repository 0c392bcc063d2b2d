"""What a run decides before its first step: the pairs, their order, the reference, the checkpoint.

All of it follows from data, configuration and seed, so a resumed run decides the same again.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from prefopt import checkpoint
from prefopt.config import TrainConfig, default_cache
from prefopt.data.encoded import EncodedSet
from prefopt.data.packing import pack
from prefopt.data.records import Message
from prefopt.data.split import split_pairs
from prefopt.errors import InputError
from prefopt.loading import context_length
from prefopt.metrics import Progress
from prefopt.online_config import PPOConfig
from prefopt.policy import Policy
from prefopt.reference import ReferenceCache
from prefopt.sampling import prompt_ids
from prefopt.stop import StopSignal


@dataclasses.dataclass(frozen=True)
class Plan:
    """The encoded items, which of them train, and how many steps that makes."""

    encoded: EncodedSet
    train: list[int]  # positions in encoded
    held_out: list[int]
    steps: int
    prompts: list[list[Message]]  # held-out prompts to answer before and after
    notes: dict[str, Any]  # for data_report.json


def make_plan(
    objective: Any,
    policy: Policy,
    data: Sequence[Any],
    config: TrainConfig,
    *,
    dry_run: bool = False,
) -> Plan:
    """Encode, split by prompt and count the steps; InputError if nothing is left to train on.

    Tokens are kept beside the reference log-probs, and found there again; not on a dry run.
    """
    longest = min(config.max_length, context_length(policy.model))
    encoded = objective.encode(
        data,
        policy.tokenizer,
        max_length=longest,
        template=config.template,
        cache=None if dry_run else Path(config.cache or default_cache()) / "tokens",
    )
    unit = objective.unit  # which may depend on the records
    at = np.full(len(data), -1)
    at[encoded.indices] = np.arange(len(encoded))
    train, held_out = split_pairs(data, config.eval_fraction)
    train, held_rows = (
        [int(at[i]) for i in train if at[i] >= 0],
        [i for i in held_out if at[i] >= 0],
    )
    if not train:
        raise InputError(f"no {unit} are left to train on; lower eval_fraction or give more data")
    plan_steps = sum(1 for _ in step_groups(encoded, train, config))
    steps = min(plan_steps, config.max_steps or plan_steps)
    prompts = []
    if objective.samples:
        asked = (data[i].prompt for i in held_rows)
        asked = (p for p in asked if p and p[0].role != "text" and _has_room(p, policy, config))
        prompts = _distinct(asked, config.samples)
    report = getattr(data, "report", None)
    notes = {
        **(report.to_dict() if report else {"source": unit, "rows": len(data)}),
        "objective": objective.name,
        "unit": unit,
        "encoding": {
            "template": encoded.template,
            "max_length": longest,
            **encoded.counts,
            f"train {unit}": len(train),
            f"held-out {unit}": len(held_rows),
        },
    }
    return Plan(encoded, train, [int(at[i]) for i in held_rows], steps, prompts, notes)


def _has_room(prompt: list[Message], policy: Policy, config: TrainConfig) -> bool:
    """Whether an answer of sample_tokens to it fits the model's context."""
    (ids,) = prompt_ids([prompt], policy.tokenizer, config.template)
    room = context_length(policy.model) - config.sample_tokens
    return ids is not None and len(ids) <= room


def _distinct(prompts: Iterable[list[Message]], most: int) -> list[list[Message]]:
    """The first that differ."""
    found: dict[str, list[Message]] = {}
    for prompt in prompts:
        if len(found) == most:
            break
        found.setdefault(str(prompt), prompt)
    return list(found.values())


def step_groups(
    encoded: EncodedSet, train: list[int], config: TrainConfig
) -> Iterator[tuple[float, list[int]]]:
    """(epoch reached, items) of every step of every epoch; shuffled by (seed, epoch)."""
    inputs = encoded.sizes - encoded.num_responses  # the last token of a response is none
    for epoch in range(config.epochs):
        order = np.random.default_rng((config.seed, epoch)).permutation(train).tolist()
        done, group, tokens = 0, [], 0
        for i in order:
            size = int(inputs[i])
            if group and (
                tokens + size > config.batch_tokens
                if config.batch_tokens
                else len(group) == config.batch_size
            ):
                done += len(group)
                yield epoch + done / len(order), group
                group, tokens = [], 0
            group.append(i)
            tokens += size
        yield float(epoch + 1), group


def fill_cache(
    cache: ReferenceCache,
    policy: Policy,
    plan: Plan,
    config: TrainConfig,
    key: dict[str, str],
    progress: Progress,
    stop: StopSignal,
) -> None:
    """All reference passes before the first step, packed as the first epoch will be, so that
    policy and reference round alike and every margin starts at exactly 0."""
    once = dataclasses.replace(config, epochs=1)
    steps = min(plan.steps, config.ref_sync_steps or plan.steps)  # until the reference moves
    first_epoch = islice(step_groups(plan.encoded, plan.train, once), steps)
    groups = [plan.held_out, *(group for _, group in first_epoch)]
    progress.phase("reference", len(groups))
    for done, group in enumerate(groups, 1):
        items = (plan.encoded[i] for i in group)
        batches = pack(items, max_tokens=config.micro_tokens, layout=policy.layout)
        for _ in cache.logprobs(policy, batches, key=key):
            stop.check()
        progress.update(done)


def find_checkpoint(config: TrainConfig | PPOConfig) -> Path | None:
    """The checkpoint to resume from, or None to start; a bad explicit path is an InputError."""
    root = Path(config.out) / "checkpoints"
    if config.resume is None:
        return None
    if config.resume != "auto":
        path = Path(config.resume)
        checkpoint.verify_checkpoint(path)
        return path
    found = checkpoint.latest_checkpoint(root) if root.is_dir() else None
    if found is None and root.is_dir() and any(root.glob("step-*")):
        raise InputError(f"every checkpoint in {root} is damaged; remove the folder to start again")
    return found


def order_of(plan: Plan, config: TrainConfig) -> dict[str, Any]:
    """What decides which items a step sees, and what it does: must be equal for a resumed run."""
    keys = ("seed", "batch_size", "batch_tokens", "micro_tokens", "max_length", "eval_fraction")
    keys += ("ref_sync_steps", "ref_sync_alpha")
    digest = hashlib.sha256(plan.encoded.digests[plan.train].tobytes())
    settings = {k: getattr(config, k) for k in keys}
    settings["objective"] = plan.notes["objective"]
    return {**settings, "steps": plan.steps, "token ids": digest.hexdigest()[:16]}


def read_checkpoint(
    path: Path, order: dict[str, Any], key: dict[str, str], policy: Policy
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """A checkpoint's tensors and state; InputError unless it is one of this run."""
    groups, state = checkpoint.load_checkpoint(path)
    for name, value in order.items():
        if state["order"].get(name) != value:
            raise InputError(
                f"{path} was saved with {name} = {state['order'].get(name)} and this run has "
                f"{value}; resume with the same data and configuration, or start in a new --out"
            )
    if state["reference"] != key:
        raise InputError(
            f"{path} was trained from other base weights, or in another dtype; resume with the "
            "model and dtype of the checkpoint"
        )
    checkpoint.check_shapes(path, groups["weights"], policy.resumable())
    return groups, state
