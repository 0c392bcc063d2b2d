"""A frozen linear layer with a 4-bit weight (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).

M = rows (tokens); in, out = features.    y = x W^T + b [M, out]    dx = g W [M, in]
W is dequantised for each product and kept by nobody: backward does it again. All that is stored is
uint8, the float32 scales by their bytes, so that no .half(), .to(dtype) or mixed-precision policy
can round it, and with whole blocks in a row FSDP2 may shard every tensor by rows.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prefopt import dispatch
from prefopt.errors import InputError
from prefopt.nn.linear import compute_dtype
from prefopt.nn.nf4 import Packed4, dequantize_nf4, quantize_nf4


class NF4Linear(nn.Module):
    """y = x W^T + b with W [out, in] in 4 bits; computes in the dtype of x.

    weight  uint8 [out, in / 2]; [ceil(n / 2), 1] where blocks span rows (in % block != 0)
    scales  uint8 [out, blocks in a row * 4] or, doubly quantised, [out, blocks in a row]; flat too
    nested  uint8 buffer: float32 [ceil(blocks / 256) + 1], the offset last; None if not double
    bias    as the layer had it
    """

    nested: Tensor | None

    def __init__(self, p: Packed4, bias: Tensor | None = None) -> None:
        """p of a weight [out, in]; its tensors are taken, not copied. InputError if they differ."""
        super().__init__()
        if len(p.shape) != 2 or (bias is not None and bias.shape != p.shape[:1]):
            raise InputError(
                f"a 4-bit linear layer takes a weight [out, in] and a bias [out], not "
                f"{list(p.shape)} and {None if bias is None else list(bias.shape)}"
            )
        self.out_features, self.in_features = p.shape
        self.kind, self.block, self.dtype = p.kind, p.block, p.dtype
        rows = self.out_features if self.in_features % p.block == 0 else -1
        columns = -1 if rows > 0 else 1
        self.weight = _frozen(p.codes.view(rows, columns))
        self.scales = _frozen(p.scales.view(torch.uint8).view(rows, columns))
        self.bias = None if bias is None else _frozen(bias.detach())
        nested = None
        if p.nested is not None and p.offset is not None:
            nested = torch.cat([p.nested, p.offset.view(1)]).view(torch.uint8)
        self.register_buffer("nested", nested)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> NF4Linear:
        """options: those of quantize_nf4. The layer itself is left as it is."""
        if not isinstance(linear, nn.Linear):
            raise InputError(
                f"a layer of class {type(linear).__name__} cannot be quantised to 4 bits; only "
                "nn.Linear can, whose weight is [out, in]"
            )
        return cls(quantize_nf4(linear.weight, **options), linear.bias)

    def packed(self) -> Packed4:
        """The weight as stored: views, no copies."""
        return _packed(self, frozen_tensors(self))

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W [out, in], a tensor of its own, in `dtype` (None: the one that was quantised)."""
        return dequantize_nf4(self.packed(), dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        return _Product.apply(x.to(compute_dtype(x)), self.bias, self, *frozen_tensors(self))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, kind={self.kind}, block={self.block}, "
            f"double={self.nested is not None}, dtype={self.dtype}"
        )


class _Product(torch.autograd.Function):
    """y = x W^T + b. Of the inputs only the packed weight is kept, by reference."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: NF4Linear, *tensors: Tensor):
        ctx.save_for_backward(*tensors)
        ctx.layer = layer
        if x.shape[-1] != layer.in_features:
            raise RuntimeError(f"x is {list(x.shape)}, but the layer takes {layer.in_features}")
        W = dense_weight(layer, tensors, x.dtype)
        b = None if bias is None else bias.to(x.dtype)
        y = dispatch.mm_nt(x.reshape(-1, x.shape[-1]), W, b)
        # A view made in here could not be changed in place, which Llama 4 and Gemma 3n do.
        return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], layer.out_features])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx = db = None
        g = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[0]:
            W = dense_weight(ctx.layer, ctx.saved_tensors, g.dtype)
            dx = dispatch.mm_nt(g, W.t()).view(*grad.shape[:-1], ctx.layer.in_features)
        if ctx.needs_input_grad[1]:
            db = g.sum(0)
        return (dx, db, *[None] * (len(ctx.needs_input_grad) - 2))


def frozen_tensors(layer: nn.Module) -> tuple[Tensor, ...]:
    """What a Function keeps of a frozen layer for backward: references to its weight as stored.

    nn.Linear, Conv1D: (weight,); NF4Linear: (weight, scales) and nested where there is one.
    """
    if not isinstance(layer, NF4Linear):
        return (layer.weight,)  # type: ignore[return-value]
    return tuple(t for t in (layer.weight, layer.scales, layer.nested) if t is not None)


def dense_weight(layer: nn.Module, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """The weight behind frozen_tensors(layer), laid out as the layer's, in `dtype`.

    For use at once: that of an NF4Linear on a CPU stands in memory that the next call overwrites,
    since the page faults of fresh memory would take longer than the decoding.
    """
    if not isinstance(layer, NF4Linear):
        return tensors[0].detach().to(dtype)
    p = _packed(layer, tensors)
    out = _scratch(p.shape, dtype) if p.codes.device.type == "cpu" else None
    return dequantize_nf4(p, dtype, out=out)


def _packed(layer: NF4Linear, tensors: tuple[Tensor, ...]) -> Packed4:
    codes, scales, *rest = (t.detach().view(-1) for t in tensors)
    shape = torch.Size((layer.out_features, layer.in_features))
    nested = offset = None
    if rest:
        values = rest[0].view(torch.float32)
        nested, offset = values[:-1], values[-1]
    else:
        scales = scales.view(torch.float32)
    return Packed4(codes, scales, nested, offset, shape, layer.dtype, layer.kind, layer.block)


def _frozen(t: Tensor) -> nn.Parameter:
    return nn.Parameter(t, requires_grad=False)


_of_thread = threading.local()


@torch.inference_mode(False)
def _scratch(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Uninitialised memory of this thread, as large as the largest weight so far."""
    size = math.prod(shape) * dtype.itemsize
    memory = getattr(_of_thread, "memory", None)
    if memory is None or memory.nbytes < size:
        memory = _of_thread.memory = torch.empty(size, dtype=torch.uint8, device="cpu")
    return memory[:size].view(dtype).view(shape)
