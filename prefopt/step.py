"""One optimizer step: the only place in the library that calls backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from prefopt.data.packing import Batch


class StepStats(NamedTuple):
    """What a step did: mean loss, items counted, gradient norm before clipping, metric sums.

    ``applied`` is False when a float16 gradient overflowed, so that the step was skipped and the
    loss scale lowered.
    """

    loss: Tensor
    count: int
    grad_norm: Tensor
    metrics: dict[str, Tensor]
    applied: bool


def optimizer_step(
    policy: torch.nn.Module,
    objective: Callable,
    microbatches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    *,
    max_norm: float | None = 1.0,
    scaler: torch.amp.GradScaler | None = None,
) -> StepStats:
    """Accumulate ``objective`` over the micro-batches, divide once by the global count, clip, step.

    ``objective(policy, batch) -> (loss sum, count, metric sums)``. Sum and count travel separately,
    so how the items were split into micro-batches does not change the gradient; an objective whose
    losses look at the whole step has a method ``over(policy, batches)``, which gives the objective
    to use for these. ``max_norm`` None or 0: no clipping. Raises FloatingPointError, before the
    optimizer has moved anything, when the loss or the gradient is not finite.
    """
    device = next(policy.parameters()).device
    optimizer.zero_grad(set_to_none=True)
    if hasattr(objective, "over"):
        microbatches = list(microbatches)
        objective = objective.over(policy, microbatches)  # pyright: ignore[reportFunctionMemberAccess]
    total, count, sums = torch.zeros((), device=device), 0, {}
    for batch in microbatches:
        loss, n, metrics = objective(policy, batch.to(device))
        (scaler.scale(loss) if scaler else loss).backward()
        total, count = total + loss.detach(), count + n
        sums = {k: sums.get(k, 0) + v for k, v in metrics.items()}
    if count == 0:
        raise ValueError("an optimizer step needs at least one item")

    if scaler:
        scaler.unscale_(optimizer)
    grads = [
        p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    ]
    torch._foreach_mul_(grads, 1.0 / count)
    norm = torch.nn.utils.get_total_norm(grads)
    if max_norm:
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))

    loss_ok, norm_ok = torch.stack([total.isfinite(), norm.isfinite()]).tolist()  # the one sync
    if not loss_ok or not (norm_ok or scaler):
        what = "gradient" if loss_ok else "loss"
        raise FloatingPointError(
            f"the {what} is not finite (loss {total.item() / count:.4g}, gradient norm "
            f"{norm.item():.4g}), so the optimizer step was not taken; lower the learning rate, or "
            "compute in bfloat16 or float32"
        )
    if scaler:
        scaler.step(optimizer)  # skips by itself when unscale_ found an overflow
        scaler.update()
    else:
        optimizer.step()
    return StepStats(total / count, count, norm, sums, norm_ok)
