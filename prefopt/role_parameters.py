"""Whose parameters are whose: those of a policy and those of its critic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from prefopt.errors import InputError
from prefopt.nn import lora as lora_module
from prefopt.nn.nf4_linear import NF4Linear

POLICY, VALUE = "policy", "value"


def named(policy: Any, role: str) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of all but those of other roles; InputError for a role it has not."""
    if role not in (POLICY, VALUE):
        raise InputError(f"the roles that train are {POLICY!r} and {VALUE!r}, not {role!r}")
    if role == VALUE and policy.value_head is None:
        raise InputError(f"{policy.base} has no critic here; roles.add_critic gives it one")
    apart = policy.critic_kind == "adapter"
    critics = set(map(id, lora_module.all_parameters(policy.model, VALUE))) if apart else set()
    for name, p in policy.model.named_parameters():
        of_critic = policy.critic_kind == "model" or id(p) in critics
        if of_critic == (role == VALUE):
            yield name, p
    if role == VALUE:
        yield from policy.value_head.named_parameters("value_head")


def groups(policy: Any, lr: float, lora_plus: float, role: str) -> list[dict[str, Any]]:
    """What an optimizer of this role takes (see Policy.parameter_groups)."""
    if policy.adapter is None and any(isinstance(m, NF4Linear) for m in policy.model.modules()):
        raise InputError("4-bit weights cannot be trained; train an adapter on them (--lora.r)")
    trained = [p for _, p in policy.trainable(role)]
    if lora_plus == 1:
        return [{"params": trained, "lr": lr}]
    if policy.adapter is None:
        raise InputError("lora_plus is about the two factors of LoRA, and there is no adapter")
    name = VALUE if role == VALUE and policy.critic_kind == "adapter" else policy.adapter
    parts = lora_module.lora_plus_groups(policy.model, name, lr, lora_plus)
    if role == VALUE:
        parts[0]["params"].extend(policy.value_head.parameters())
    return parts
