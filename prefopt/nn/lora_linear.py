"""LoRA (Hu et al. 2021, arXiv 2106.09685) on one layer: y = W x + b + s B A x, W and b frozen.

M = rows (tokens); in, out = features of the layer; r = rank; g = dL/dy.
    x [M, in]    y, g [M, out]    W [out, in] (Conv1D: [in, out])    A [r, in]    B [out, r]
    h = x A^T [M, r]    s = alpha / r, or for rsLoRA (Kalajdzievski 2023, arXiv 2312.03732)
    alpha / sqrt(r)

A and B are float32 masters whatever the model's dtype: at the learning rates of preference training
a bf16 A does not move. They are cast to the dtype of the computation in each call; x never is, and
of the activations only x and h are kept for backward. W may be stored in 4 bits (QLoRA, Dettmers et
al. 2023, arXiv 2305.14314): then it is dequantised in forward and again in backward.
"""

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prefopt import dispatch
from prefopt.errors import InputError
from prefopt.nn import dora, pissa
from prefopt.nn.adapted import Adapted, Masters
from prefopt.nn.linear import compute_dtype
from prefopt.nn.lora_config import LoraConfig
from prefopt.nn.nf4_linear import NF4Linear, dense_weight, frozen_tensors


class LoraLinear(Adapted):
    """A frozen linear layer (nn.Linear, NF4Linear or transformers' Conv1D) and its adapters.

    With B = 0: bitwise base(x). `m`: the magnitudes of the adapters that have them (DoRA).
    `A0`, `B0`: the start of those that start elsewhere than at B = 0 (PiSSA).
    """

    def __init__(self, base: nn.Linear | NF4Linear, active: str | None = None) -> None:
        super().__init__(base, active)
        self.A, self.B, self.m = Masters(), Masters(), Masters()
        self.A0, self.B0 = Masters(), Masters()
        self.transposed = is_conv1d(base)
        self._squares: tuple[tuple[object, ...], Tensor] | None = None

    def add(self, name: str, config: LoraConfig, path: str = "") -> None:
        """Adds adapter `name`: random numbers are those of torch's CPU generator everywhere."""
        r, s = config.rank(path), config.scale(path)
        out, width = dense_shape(self.base)
        device = self.base.weight.device
        if config.init == "pissa":
            W = dora.dense_rows(self.base, self.transposed)
            if not W.isfinite().all():
                raise InputError(f"the weight of {path} is not finite; PiSSA cannot start from it")
            A, B = pissa.principal(W, r, s)
            self.A0.put(name, A.clone(), trainable=False)
            self.B0.put(name, B.clone(), trainable=False)
        else:
            A = torch.empty(r, width, dtype=torch.float32, device="cpu")
            if config.init == "kaiming":
                nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            else:
                nn.init.normal_(A, std=1 / r)
            B = torch.zeros(out, r, dtype=torch.float32)
        self.A.put(name, A.to(device), trainable=True)
        self.B.put(name, B.to(device), trainable=True)
        self.configs[name], self.scaling[name] = config, s
        if config.use_dora:
            self.m.put(name, self.row_norms(name), trainable=True)

    def parts(self, name: str) -> dict[str, nn.Parameter]:
        """A and B, and m where there is one"""
        groups = {"A": self.A, "B": self.B, "m": self.m}
        return {part: group[name] for part, group in groups.items() if name in group}

    def starts(self, name: str) -> list[nn.Parameter]:
        """Where A and B began, of those that began elsewhere than at B = 0"""
        return [group[name] for group in (self.A0, self.B0) if name in group]

    def is_zero(self, name: str) -> bool:
        if name in self.A0:
            start = ((self.A, self.A0), (self.B, self.B0))
            zero = all(torch.equal(now[name], first[name]) for now, first in start)
        else:
            zero = not self.B[name].any()
        return zero and (name not in self.m or torch.equal(self.m[name], self.row_norms(name)))

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] such that the layer adds s B A to W; of PiSSA with 2 r."""
        A, B = self.A[name], self.B[name]
        if name in self.A0:
            return pissa.change(A, B, self.A0[name], self.B0[name])
        return A, B

    @torch.no_grad()
    def row_norms(self, name: str) -> Tensor:
        """||W + s B A|| of each output, [out] float32"""
        weight: Any = self.base.weight
        key = (weight.data_ptr(), weight._version, weight.device, weight.dtype)
        if self._squares is None or self._squares[0] != key:
            self._squares = key, dora.squares(self.base, self.transposed)
        A, B = self.factors(name)
        return dora.row_norms(
            self.base, self.transposed, self._squares[1], A, B, self.scaling[name]
        )

    @torch.no_grad()
    def delta(self, name: str) -> Tensor:
        """s B A in float32, in the layout of the base weight."""
        A, B = self.factors(name)
        delta = (B @ A).mul_(self.scaling[name])
        return delta.t() if self.transposed else delta

    @torch.no_grad()
    def merged_weight(self, name: str) -> Tensor:
        """W + s B A, for DoRA with its magnitudes, in float32 and the layout of the base weight."""
        W = dense_weight(self.base, frozen_tensors(self.base), dora.weight_dtype(self.base))
        W = W.to(torch.promote_types(W.dtype, torch.float32)) + self.delta(name)
        if name in self.m:
            c = 1 + dora.excess(self.m[name], self.row_norms(name))
            W.mul_(c if self.transposed else c[:, None])
        return W

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        name = self.on
        if name is None:
            return self.base(x)
        self.refuse_trainable_base()
        x = x.to(compute_dtype(x))
        dropout = self.configs[name].dropout if self.training else 0.0
        A, B = self.factors(name)
        rest = self.base, self.transposed, self.scaling[name], dropout
        if name in self.m:
            return dora.product(x, A, B, self.m[name], self.row_norms(name), *rest)
        return _Lora.apply(x, A, B, *rest)


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
        base: nn.Module,
        transposed: bool,
        scale: float,
        dropout: float,
    ) -> Tensor:
        need_x, need_A, need_B = ctx.needs_input_grad[:3]
        y = base(x)
        x, kept = torch.native_dropout(x, dropout, True) if dropout else (x, None)
        x = x.reshape(-1, x.shape[-1])
        h = dispatch.mm_nt(x, A.to(x.dtype))
        y.view(-1, y.shape[-1]).addmm_(h, B.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(
            x if need_A else None,
            h if need_B else None,
            kept,
            A,
            B,
            *(frozen_tensors(base) if need_x else ()),
        )
        ctx.base, ctx.transposed, ctx.scale, ctx.dropout = base, transposed, scale, dropout
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, kept, A, B, *frozen = ctx.saved_tensors
        need_x, need_A, need_B = ctx.needs_input_grad[:3]
        s, g = ctx.scale, grad.reshape(-1, grad.shape[-1])
        dx = dA = dB = None
        gB = dispatch.mm_nt(g, B.to(g.dtype).t())
        if need_x:
            W = dense_weight(ctx.base, tuple(frozen), g.dtype)
            dx = dispatch.mm_nt(g, W if ctx.transposed else W.t())
            if kept is None:
                dx.addmm_(gB, A.to(g.dtype), alpha=s)
            else:
                through_A = (gB @ A.to(g.dtype)).mul_(kept.view_as(dx))
                dx.add_(through_A, alpha=s / (1 - ctx.dropout))
            dx = dx.view(*grad.shape[:-1], dx.shape[-1])
        if need_A:
            dA = dispatch.mm_nt(gB.t(), x.t()).to(A.dtype).mul_(s)
        if need_B:
            # As (h^T g)^T: on CPU a product with its long side last is the faster one.
            dB = dispatch.mm_nt(h.t(), g.t()).t()
            dB = dB.to(B.dtype, memory_format=torch.contiguous_format).mul_(s)
        return dx, dA, dB, None, None, None, None


def is_conv1d(layer: nn.Module) -> bool:
    """Whether this is transformers' Conv1D (there is none where transformers is not loaded)."""
    module = sys.modules.get("transformers.pytorch_utils")
    return module is not None and isinstance(layer, module.Conv1D)


def dense_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer of any kind, adapted or not."""
    layer = layer.base if isinstance(layer, LoraLinear) else layer
    if isinstance(layer, NF4Linear):
        return layer.out_features, layer.in_features
    weight: Any = layer.weight
    rows, columns = weight.shape
    return (columns, rows) if is_conv1d(layer) else (rows, columns)
