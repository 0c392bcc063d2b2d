"""Linear layers whose float32 CPU products run through oneDNN (see dispatch.mm_nt)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prefopt import dispatch


class CpuLinear(nn.Linear):
    """nn.Linear with another GEMM; the same parameters, the same state dict."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return F.linear(input, self.weight, self.bias)
        return _Linear.apply(input, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    """y = x W^T + b; x, g [M, K], [M, N] after flattening, W [N, K]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(
            flat if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None
        )
        y = dispatch.mm_nt(flat, weight, bias)
        # A view made in here could not be changed in place, which Llama 4 and Gemma 3n do.
        return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], len(weight)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = dispatch.mm_nt(g, weight.t()).view(*grad.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[1]:
            dw = dispatch.mm_nt(g.t(), x.t())
        if ctx.needs_input_grad[2]:
            db = g.sum(0)
        return dx, dw, db


def use_onednn(model: nn.Module) -> int:
    """Let every float32 CPU nn.Linear of ``model`` compute through oneDNN; returns how many."""
    if not dispatch.onednn_gemm():
        return 0
    found = [
        m
        for m in model.modules()
        if type(m) is nn.Linear
        and m.weight.device.type == "cpu"
        and m.weight.dtype is torch.float32
    ]
    for module in found:
        module.__class__ = CpuLinear
    return len(found)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a product with `x` is computed in: autocast's where it is on."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
