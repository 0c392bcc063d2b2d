"""The optimizer, its learning-rate schedules and the float16 loss scaler."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def make_optimizer(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    lr: float,
    *,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), in one kernel where possible.

    ``parameters``: parameters, or torch's parameter groups, each with a learning rate of its own.
    """
    given: list[Any] = list(parameters)
    first = given[0]["params"][0] if isinstance(given[0], dict) else given[0]
    fused = first.device.type in ("cpu", "cuda", "xpu")
    return torch.optim.AdamW(given, lr, eps=eps, weight_decay=weight_decay, fused=fused)


def warmup_steps(warmup: float, total: int) -> int:
    """``warmup`` below 1 is a fraction of all steps, from 1 on a number of steps."""
    return math.ceil(warmup * total) if warmup < 1 else int(warmup)


def lr_factor(step: int, total: int, *, warmup: int = 0, schedule: str = "linear") -> float:
    """The factor on the learning rate in step 0..total-1: up for ``warmup`` steps, then down.

    "linear" and "cosine" reach 0 one step after the last, "constant" stays at 1.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    return 1.0 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def make_scaler(dtype: torch.dtype, device: torch.device) -> torch.amp.GradScaler | None:
    """Dynamic loss scaling for float16, whose gradients would underflow; None for other dtypes."""
    return torch.amp.GradScaler(device.type) if dtype == torch.float16 else None
