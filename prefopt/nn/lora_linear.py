"""LoRA (Hu et al. 2021, arXiv 2106.09685) on one layer: y = W x + b + s B A x, W and b frozen.

M = rows (tokens); in, out = features of the layer; r = rank; g = dL/dy.
    x [M, in]    y, g [M, out]    W [out, in] (Conv1D: [in, out])    A [r, in]    B [out, r]
    h = x A^T [M, r]    s = alpha / r, or for rsLoRA (Kalajdzievski 2023, arXiv 2312.03732)
    alpha / sqrt(r)

A and B are float32 masters whatever the model's dtype: at the learning rates of preference training
a bf16 A does not move. They are cast to the dtype of the computation in each call; x never is, and
of the activations only x and h are kept for backward.
"""

import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prefopt import dispatch
from prefopt.errors import InputError

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoraConfig:
    """What to adapt and how; a bad value raises InputError.

    targets: "all-linear" (every linear layer but the output embedding), a list of names (a module
    matches when its name is one of them or ends in ".<name>"), or a regular expression that matches
    the whole module name. dropout: on the input of A, in training. init: of A, "kaiming" (uniform
    in +-1/sqrt(in)) or "gaussian" (standard deviation 1/r); B is 0, so that the start is the base.
    """

    r: int = 16
    alpha: float = 16
    dropout: float = 0.0
    targets: str | list[str] = ALL_LINEAR
    use_rslora: bool = False
    init: str = "kaiming"

    def __post_init__(self) -> None:
        checks = {
            "r": (_is_number(self.r, int) and self.r >= 1, "a whole number of at least 1"),
            "alpha": (_is_number(self.alpha) and 0 < self.alpha < math.inf, "a number above 0"),
            "dropout": (
                _is_number(self.dropout) and 0 <= self.dropout < 1,
                "a number of at least 0 and below 1",
            ),
            "targets": (
                _are_targets(self.targets),
                '"all-linear", a list of module names, or a valid regular expression',
            ),
            "use_rslora": (isinstance(self.use_rslora, bool), "true or false"),
            "init": (self.init in ("kaiming", "gaussian"), '"kaiming" or "gaussian"'),
        }
        for key, (good, allowed) in checks.items():
            if not good:
                raise InputError(f"lora.{key} is {getattr(self, key)!r}; it must be {allowed}")

    @property
    def scaling(self) -> float:
        """s"""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class LoraLinear(nn.Module):
    """A frozen linear layer (nn.Linear or transformers' Conv1D) and its adapters, one active.

    `active` None, or a name this layer does not have: exactly base(x). With B = 0: bitwise base(x).
    """

    unmerged_weight: Tensor | None

    def __init__(self, base: nn.Linear, active: str | None = None) -> None:
        super().__init__()
        self.base = base
        self.A = nn.ParameterDict()
        self.B = nn.ParameterDict()
        self.configs: dict[str, LoraConfig] = {}
        self.scaling: dict[str, float] = {}
        self.active = active
        self.merged: str | None = None
        self.transposed = is_conv1d(base)
        # The weight before a merge: a buffer, so that it follows the module to another device.
        self.register_buffer("unmerged_weight", None, persistent=False)
        self.train(base.training)  # an adapter added to a model in evaluation drops nothing

    @property
    def weight(self) -> Tensor:
        return self.base.weight  # model code may ask a layer for its dtype or device

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def add(self, name: str, config: LoraConfig) -> None:
        """Adds adapter `name`: B = 0, A from torch's global CPU generator on every device."""
        rows, columns = self.base.weight.shape
        out, width = (columns, rows) if self.transposed else (rows, columns)
        A = torch.empty(config.r, width, dtype=torch.float32, device="cpu")
        if config.init == "kaiming":
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        else:
            nn.init.normal_(A, std=1 / config.r)
        self._put(name, config, A, torch.zeros(out, config.r, dtype=torch.float32), True)

    def copy(self, src: str, dst: str) -> None:
        """Adds `dst`, a frozen copy of `src` without dropout."""
        A, B = self.A[src].detach().clone(), self.B[src].detach().clone()
        self._put(dst, replace(self.configs[src], dropout=0.0), A, B, False)

    def delta(self, name: str) -> Tensor:
        """s B A in float32, in the layout of the base weight."""
        delta = (self.B[name].detach() @ self.A[name].detach()).mul_(self.scaling[name])
        return delta.t() if self.transposed else delta

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        name = self.active
        if name is None or self.merged is not None or name not in self.scaling:
            return self.base(x)
        weight, bias = self.base.weight, self.base.bias
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            raise InputError(
                "a layer under a LoRA is trainable, but no gradient is computed for it; "
                "freeze its weight and bias, or train the model in full"
            )
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        dropout = self.configs[name].dropout if self.training else 0.0
        scale = self.scaling[name]
        return _Lora.apply(
            x, self.A[name], self.B[name], weight, self.base, scale, dropout, self.transposed
        )

    def extra_repr(self) -> str:
        return f"adapters={list(self.scaling)}, active={self.active!r}, merged={self.merged!r}"

    def _put(self, name: str, config: LoraConfig, A: Tensor, B: Tensor, trainable: bool) -> None:
        device = self.base.weight.device
        self.A[name] = nn.Parameter(A.to(device), requires_grad=trainable)
        self.B[name] = nn.Parameter(B.to(device), requires_grad=trainable)
        self.configs[name] = config
        self.scaling[name] = config.scaling

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Behind .to(), .half(), ...: masters follow to a device, but stay float32, bit for bit."""
        masters = [(group, name, p.data) for group in (self.A, self.B) for name, p in group.items()]
        super()._apply(fn, recurse)
        for group, name, before in masters:
            if group[name].dtype != before.dtype:
                group[name].data = before.to(group[name].device)
        return self


class _Lora(torch.autograd.Function):
    """y = base(x) + s (x A^T) B^T as one node of the graph, every product in the dtype of x.

    dx = g W + s (g B) A        dA = s (g B)^T x        dB = s g^T h        nothing for W
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        weight: Tensor,
        base: nn.Linear,
        scale: float,
        dropout: float,
        transposed: bool,
    ) -> Tensor:
        need_x, need_A, need_B = ctx.needs_input_grad[:3]
        y = base(x)
        x, kept = torch.native_dropout(x, dropout, True) if dropout else (x, None)
        x = x.reshape(-1, x.shape[-1])
        h = dispatch.mm_nt(x, A.to(x.dtype))
        y.view(-1, y.shape[-1]).addmm_(h, B.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(
            x if need_A else None, h if need_B else None, kept, A, B, weight if need_x else None
        )
        ctx.scale, ctx.dropout, ctx.transposed = scale, dropout, transposed
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, kept, A, B, weight = ctx.saved_tensors
        need_x, need_A, need_B = ctx.needs_input_grad[:3]
        s, g = ctx.scale, grad.reshape(-1, grad.shape[-1])
        dx = dA = dB = None
        gB = dispatch.mm_nt(g, B.to(g.dtype).t())
        if need_x:
            W = weight.to(g.dtype)  # a copy under autocast only
            dx = dispatch.mm_nt(g, W if ctx.transposed else W.t())
            if kept is None:
                dx.addmm_(gB, A.to(g.dtype), alpha=s)
            else:
                through_A = (gB @ A.to(g.dtype)).mul_(kept.view_as(dx))
                dx.add_(through_A, alpha=s / (1 - ctx.dropout))
            dx = dx.view(*grad.shape[:-1], dx.shape[-1])
        if need_A:
            dA = (gB.t() @ x).to(A.dtype).mul_(s)
        if need_B:
            # As (h^T g)^T: on CPU a product with its long side last is the faster one.
            dB = (h.t() @ g).t().to(B.dtype, memory_format=torch.contiguous_format).mul_(s)
        return dx, dA, dB, None, None, None, None, None


def is_conv1d(layer: nn.Module) -> bool:
    """Whether this is transformers' Conv1D (there is none where transformers is not loaded)."""
    module = sys.modules.get("transformers.pytorch_utils")
    return module is not None and isinstance(layer, module.Conv1D)


def _is_number(value: object, kind: Any = int | float) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _are_targets(targets: object) -> bool:
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error:
            return False
        return bool(targets)
    if not isinstance(targets, list | tuple):
        return False
    return bool(targets) and all(isinstance(name, str) and name for name in targets)
