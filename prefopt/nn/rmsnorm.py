"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467) that keeps its input and one number a row.

    y = w * round(x r)    r = 1 / sqrt(mean(x^2) + eps)    x, y [M, D], w [D], r [M, 1] float32
    dx = r (g w - n mean(g w n))    dw = sum over rows of g round(n)    n = x r

Autograd keeps x and x r in float32 and round(x r) beside them: in 16 bits ten bytes for each of the
two that x has, and x is kept anyway, as the layer's input. Rows go through in blocks that stay in
the cache.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BLOCK = 1 << 19  # elements in float32 at a time
# The forward of Llama, Mistral, Qwen 2 and 3, Phi 3, SmolLM 3 ...: only a module whose source says
# exactly this is changed.
_FORWARD = """
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)
"""


class _RMSNorm(torch.autograd.Function):
    """x [M, D], weight [D] of one dtype -> [M, D]"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, r = torch.empty_like(x), x.new_empty(len(x), 1, dtype=torch.float32)
        for at in _blocks(x):
            h = x[at].float()
            torch.rsqrt(h.pow(2).mean(-1, keepdim=True).add_(eps), out=r[at])
            torch.mul(weight, (h * r[at]).to(x.dtype), out=y[at])
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        x, weight, r = ctx.saved_tensors
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        sums = []
        for at in _blocks(x):
            n = x[at].float() * r[at]
            if ctx.needs_input_grad[1]:
                sums.append((grad[at] * n.to(x.dtype)).sum(0, dtype=torch.float32))
            if dx is not None:
                g = (grad[at] * weight).float()
                g.sub_(n.mul_((g * n).mean(-1, keepdim=True)))
                dx[at] = g.mul_(r[at])
        dw = torch.stack(sums).sum(0).to(weight.dtype) if sums else None
        return dx, dw, None


def _blocks(x: Tensor) -> Iterator[slice]:
    step = max(1, BLOCK // x.shape[1]) if x.device.type == "cpu" else max(1, len(x))
    return (slice(start, start + step) for start in range(0, len(x), step))


def _forward(norm: Any, x: Tensor) -> Tensor:
    if x.dtype != norm.weight.dtype or x.dtype == torch.float64:
        return type(norm).forward(norm, x)
    flat = x.reshape(-1, x.shape[-1])
    y = _RMSNorm.apply(flat, norm.weight, norm.variance_epsilon)
    return torch.ops.aten._unsafe_view(y, x.shape)


def use_lean_rmsnorm(model: nn.Module) -> int:
    """Let every RMSNorm of ``model`` keep less for the backward pass; returns how many."""
    found = [m for m in model.modules() if _is_rmsnorm(m)]
    for norm in found:
        norm.forward = functools.partial(_forward, norm)
    return len(found)


def _is_rmsnorm(module: nn.Module) -> bool:
    if not hasattr(module, "variance_epsilon"):
        return False
    return inspect.getsource(type(module).forward).endswith(_FORWARD.lstrip("\n"))
