"""What a run of online reinforcement learning keeps to go on from: between two updates, and between
two optimizer steps of one."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefopt import checkpoint
from prefopt.data.encoded import Encoded
from prefopt.errors import InputError
from prefopt.experience import Experience
from prefopt.online_plan import PromptPlan, identity

# Of an Experience, beside its columns.
ROWS = ("mask", "stopped", "kept", "scores", "ends", "worth", "bootstrap")
EXTREMES = {"policy/ratio_max": max, "policy/ratio_min": min}


@dataclass
class Update:
    """The update that is being learnt from: ``done`` optimizer steps are taken. ``row``: what is
    known of it for metrics.jsonl; ``sums``: [sum, count] over its steps."""

    number: int
    epoch: float
    numbers: list[int]  # of the prompts
    exp: Experience
    row: dict[str, float]
    done: int = 0
    sums: dict[str, list[float]] = field(default_factory=dict)

    def add(self, step: dict[str, float]) -> None:
        """Take in what one optimizer step said."""
        for name, value in step.items():
            if name in EXTREMES:
                if self.done == 0:
                    far = abs(value - 1)
                    self.row["policy/ratio_first"] = max(
                        self.row.get("policy/ratio_first", 0.0), far
                    )
                self.row[name] = EXTREMES[name](self.row.get(name, value), value)
            else:
                total, count = self.sums.get(name, (0.0, 0))
                self.sums[name] = [total + value, count + 1]

    @property
    def figures(self) -> dict[str, float]:
        """The row, with the means over the steps."""
        means = {name: total / count for name, (total, count) in self.sums.items()}
        return {**self.row, **means}


def save(loop: Any) -> None:
    """Write a checkpoint of a Loop."""
    learner, pending = loop.learner, loop.pending
    models = {"weights": (learner.policy, "policy"), "critic": (learner.critic, "value")}
    groups: dict[str, dict[str, Tensor]] = {
        name: {key: p.detach() for key, p in model.resumable(role=role)}
        for name, (model, role) in models.items()
        if model is not None
    }
    state: dict[str, Any] = {
        "update": loop.update,
        "identity": identity(loop.plan, loop.config, loop.collector.weights),
        "base": loop.key,
        "kl": loop.beta.state(),
        "moments": loop.collector.moments.state(),
        "watch": loop.watch.state(),
        "pending": None,
    }
    for name, side in learner.sides.items():
        groups[name], state[name] = side.state()
    groups["rng"] = checkpoint.rng_state()
    if pending is not None:
        groups["pending"] = _tensors(pending.exp)
        state["pending"] = {
            key: getattr(pending, key)
            for key in ("number", "epoch", "numbers", "row", "done", "sums")
        }
    root = loop.run_dir.dir / "checkpoints"
    checkpoint.save_checkpoint(root, loop.update, groups, state, keep=loop.config.keep)


@torch.no_grad()
def restore(loop: Any, path: Path) -> None:
    """Put a Loop back where a checkpoint was written; InputError unless it is one of this run."""
    groups, state = checkpoint.load_checkpoint(path)
    learner = loop.learner
    ours = identity(loop.plan, loop.config, loop.collector.weights)
    for name, value in ours.items():
        saved = state.get("identity", {}).get(name)
        if saved != value:
            raise InputError(
                f"{path} was saved with {name} = {saved} and this run has {value}; resume with the "
                "same data and configuration, or start in a new --out"
            )
    if state["base"] != loop.key:
        raise InputError(
            f"{path} was trained from other base weights, or in another dtype; resume with the "
            "model and dtype of the checkpoint"
        )
    _copy(path, groups["weights"], learner.policy.resumable(role="policy"))
    if learner.critic is not None:
        _copy(path, groups["critic"], learner.critic.resumable(role="value"))
    for name, side in learner.sides.items():
        side.restore(groups[name], state[name])
    checkpoint.set_rng_state(groups["rng"])
    loop.beta.restore(state["kl"])
    loop.collector.moments.restore(state["moments"])
    loop.watch.restore(state["watch"])
    loop.update = state["update"]
    if state["pending"] is not None:
        exp = _experience(loop.plan, state["pending"]["numbers"], groups["pending"])
        loop.pending = Update(exp=exp, **state["pending"])


def _copy(path: Path, saved: dict[str, Tensor], parameters: Any) -> None:
    ours = dict(parameters)
    checkpoint.check_shapes(path, saved, ours.items())
    for name, p in ours.items():
        p.copy_(saved[name])


def _tensors(exp: Experience) -> dict[str, Tensor]:
    responses = list(itertools.chain.from_iterable(group.responses for group in exp.groups))
    tokens = torch.from_numpy(np.concatenate(responses).astype(np.int32))
    rows = {name: getattr(exp, name) for name in ROWS}
    return {"tokens": tokens, **rows, **{f"column.{k}": v for k, v in exp.columns.items()}}


def _experience(plan: PromptPlan, numbers: list[int], tensors: dict[str, Tensor]) -> Experience:
    rows = {name: tensors[name] for name in ROWS}
    lengths = rows["mask"].sum(1).tolist()
    flat = np.split(tensors["tokens"].numpy(), np.cumsum(lengths)[:-1])
    n = len(flat) // len(numbers)
    prompts: Any = [plan.ids[i] for i in numbers]
    groups = [
        Encoded(prompt, tuple(flat[place * n : (place + 1) * n]), place)
        for place, prompt in enumerate(prompts)
    ]
    columns = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith("column.")}
    return Experience(groups, **rows, columns=columns)
