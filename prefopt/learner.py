"""The learning half of an update: optimizer steps of the policy and of its critic."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from prefopt import checkpoint
from prefopt.collect import scoring
from prefopt.data.encoded import Encoded
from prefopt.data.packing import Batch, pack
from prefopt.experience import Experience
from prefopt.objectives.dpo import DPO
from prefopt.objectives.ppo import PPO, ValueLoss
from prefopt.online_config import PPOConfig
from prefopt.optim import make_optimizer, make_scaler
from prefopt.step import StepStats, optimizer_step

LR, LR_FULL = 1e-4, 3e-6  # of an adapter, of all weights


class Side:
    """What one optimizer moves: the policy, with a trunk's value head, or a critic of its own."""

    def __init__(self, model: Any, groups: list[dict[str, Any]], named: Any, config: PPOConfig):
        self.model = model
        self.optimizer = make_optimizer(
            groups, groups[0]["lr"], weight_decay=config.weight_decay, eps=config.adam_eps
        )
        names = {id(p): name for name, p in named}
        self.names = [names[id(p)] for group in groups for p in group["params"]]
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = make_scaler(model.autocast or model.dtype, model.device)

    def scale_lr(self, factor: float) -> None:
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, the rest) for a checkpoint."""
        tensors, rest = checkpoint.optimizer_tensors(self.optimizer, self.names)
        return tensors, {**rest, "scaler": self.scaler.state_dict() if self.scaler else None}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        checkpoint.load_optimizer(self.optimizer, self.names, tensors, state)
        if self.scaler and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


class Learner:
    """Takes optimizer steps on the samples of an update; ``critic`` None: there is none."""

    def __init__(self, policy: Any, critic: Any, config: PPOConfig):
        self.policy, self.critic, self.config = policy, critic, config
        self.trunk = critic is policy and policy.critic_kind == "trunk"
        lr = config.lr or (LR if policy.adapter else LR_FULL)
        groups, named = policy.parameter_groups(lr), policy.trainable()
        self.critic_side = None
        if critic is not None:
            critic_lr = config.critic_lr or 2 * lr
            value_groups = critic.parameter_groups(critic_lr, role="value")
            value_named = critic.trainable(role="value")
            if self.trunk:
                groups, named = groups + value_groups, [*named, *value_named]
            else:
                self.critic_side = Side(critic, value_groups, value_named, config)
        self.side = Side(policy, groups, named, config)
        self.objective: Any = DPO(beta=config.kl.beta) if config.loss == "dpo" else self._ppo()
        self.value_objective = ValueLoss(config.value_clip)

    def _ppo(self) -> PPO:
        config, kl = self.config, self.config.kl
        in_loss = kl.placement == "loss" and kl.beta > 0
        importance = config.importance
        if importance is None:
            same = self.policy.dtype == torch.float32 and self.policy.autocast is None
            importance = "none" if same and config.engine == "torch" else "truncate"
        return PPO(
            config.loss,
            **scoring(self.policy, config),
            aggregation=config.mode,
            denom=float(config.max_new_tokens),
            kl_loss_kind=kl.kind if in_loss else None,
            beta=kl.beta,
            entropy_coef=config.entropy_coef,
            importance=importance,
            importance_cap=config.importance_cap,
            value_coef=config.value_coef if self.trunk else None,
            value_clip=config.value_clip,
            **(config.loss_options or {}),
        )

    @property
    def sides(self) -> dict[str, Side]:
        """By the name of their files in a checkpoint."""
        both = {"optimizer": self.side, "critic_optimizer": self.critic_side}
        return {name: side for name, side in both.items() if side is not None}

    def set_beta(self, beta: float) -> None:
        """Of the KL in the loss, where it is there."""
        if self.config.loss != "dpo":
            self.objective.beta = beta

    def step(self, exp: Experience, places: Sequence[int], *, warming_up: bool) -> dict[str, float]:
        """One optimizer step on the groups at ``places``; the critic alone while it warms up.
        Returns what happened, as means over tokens or pairs; {} where nothing could be learnt."""
        row: dict[str, float] = {}
        if not exp.kept.view(-1, exp.n)[list(places)].any():
            return row
        if self.config.loss == "dpo":
            batches = list(self._pairs(exp, places))
            return self._take(self.side, self.objective, batches) if batches else row
        batches = list(exp.batches(places, self.policy, self.config.micro_tokens))
        if not warming_up:
            if "old" not in exp.columns:
                self.objective.on_logprobs = lambda batch, logp: exp.record("old", batch, logp)
            row = self._take(self.side, self.objective, batches) | self.objective.take_extremes()
            self.objective.on_logprobs = None
        elif self.trunk:
            with _held(self.policy):
                row = self._take_values(self.side, batches)
        if self.critic_side is not None:
            row |= self._take_values(self.critic_side, batches)
        return row

    def _take_values(self, side: Side, batches: list[Batch]) -> dict[str, float]:
        taken = self._take(side, self.value_objective, batches)
        names = {"loss": "loss/value", "grad_norm": "value/grad_norm"}
        return {names.get(name, name): value for name, value in taken.items()}

    def _take(self, side: Side, objective: Any, batches: list[Batch]) -> dict[str, float]:
        stats = optimizer_step(
            side.model, objective, batches, side.optimizer,
            max_norm=self.config.max_norm, scaler=side.scaler,
        )  # fmt: skip
        return _means(stats)

    def _pairs(self, exp: Experience, places: Sequence[int]) -> Iterator[Batch]:
        """The best and the worst of the samples of each prompt that are learnt from, the first of
        equals; none where all are equal."""
        items, rows = [], []
        for place in places:
            part = slice(place * exp.n, (place + 1) * exp.n)
            kept = exp.kept[part].nonzero().flatten()
            worth = exp.worth[part][kept]
            if not len(kept) or worth.max() == worth.min():
                continue
            best, worst = (int(kept[at]) for at in (worth.argmax(), worth.argmin()))
            group = exp.groups[place]
            pair = (group.responses[best], group.responses[worst])
            items.append(Encoded(group.prompt, pair, len(rows) // 2))
            rows += [place * exp.n + best, place * exp.n + worst]
        ref, mask = exp.columns["ref"][rows], exp.mask[rows]
        start = 0
        for batch in pack(items, max_tokens=self.config.micro_tokens, layout=self.policy.layout):
            part = slice(start, start := start + batch.num_responses)
            yield dataclasses.replace(batch, ref_logprobs=ref[part][mask[part]])


@contextlib.contextmanager
def _held(policy: Any) -> Iterator[None]:
    """Inside, a trunk's value head trains alone."""
    parameters = [p for _, p in policy.trainable()]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def _means(stats: StepStats) -> dict[str, float]:
    """What a step did, with its sums divided by what they were taken over."""
    sums = {name: float(value) for name, value in stats.metrics.items()}
    tokens = sums.pop("tokens", float(stats.count))
    means = {
        name: value / (stats.count if name.startswith("loss/") else tokens)
        for name, value in sums.items()
    }
    means["loss"] = float(stats.loss)
    if stats.applied:
        means["grad_norm"] = float(stats.grad_norm)
    return means
