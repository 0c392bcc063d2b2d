"""silu(gate) * up (SwiGLU, Shazeer 2020, arXiv 2002.05202) that keeps two activations, not three.

Autograd keeps gate, silu(gate) and up for the backward pass; silu(gate) is cheap to form again, and
of everything a Llama layer keeps it is a fifth. Forward and backward have the bits of autograd's.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# The forward of Llama, Mistral, Qwen 2 and 3, OLMo 2, SmolLM 3 ...: only a module whose source says
# exactly this is changed.
_FORWARD = "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"


class _GatedSilu(torch.autograd.Function):
    """gate, up [..., I] -> [..., I]"""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor):  # type: ignore[override]
        gate, up = ctx.saved_tensors
        d_gate = torch.ops.aten.silu_backward(g * up, gate) if ctx.needs_input_grad[0] else None
        return d_gate, F.silu(gate).mul_(g) if ctx.needs_input_grad[1] else None


def _forward(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down_proj(_GatedSilu.apply(mlp.gate_proj(x), mlp.up_proj(x)))


def use_lean_swiglu(model: nn.Module) -> int:
    """Let every SwiGLU block of ``model`` keep less for the backward pass; returns how many."""
    found = [m for m in model.modules() if _is_swiglu(m)]
    for mlp in found:
        mlp.forward = functools.partial(_forward, mlp)
    return len(found)


def _is_swiglu(module: nn.Module) -> bool:
    activation = getattr(module, "act_fn", None)
    if not isinstance(activation, nn.SiLU) and type(activation).__name__ != "SiLUActivation":
        return False
    return _FORWARD in inspect.getsource(type(module).forward)
