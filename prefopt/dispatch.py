"""Which implementation runs an operation, and why not the faster one."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from prefopt.errors import InputError


def why_not(op: str, device: torch.device | str) -> str | None:
    """None if the Triton kernel of ``op`` runs on ``device``, else a sentence that says why not."""
    device = torch.device(device)
    if device.type != "cuda":
        return f"the {op} kernel needs a CUDA or ROCm device and this tensor is on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if importlib.util.find_spec("prefopt_kernels") is None:
        return "prefopt_kernels is not importable (install the project: pip install -e .)"
    if importlib.util.find_spec(f"prefopt_kernels.{op}") is None:
        return f"prefopt_kernels has no {op} kernel"
    return None


def choose(op: str, device: torch.device, impl: str) -> str:
    """Resolve ``impl`` ("auto", "torch", "triton") for one call; InputError where it cannot run."""
    if impl == "torch":
        return impl
    if impl not in ("auto", "triton"):
        raise InputError(f"impl is 'auto', 'torch' or 'triton', not {impl!r}")
    reason = why_not(op, device)
    if impl == "triton" and reason:
        raise InputError(f"impl='triton' cannot run: {reason}; use impl='auto' or 'torch'")
    return "torch" if reason else "triton"


@functools.cache
def onednn_gemm() -> bool:
    """Whether this torch build can run a float32 CPU GEMM through oneDNN."""
    try:
        x = torch.ones(2, 2)
        return bool((_onednn(x, x, None) == 2).all())
    except (AttributeError, RuntimeError):
        return False


def _onednn(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "")


def mm_nt(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ w.T + bias, [M, K], [N, K], [N] -> [M, N]; not differentiable, for use inside Functions.

    For float32 on the CPU torch calls MKL, whose kernels leave the AVX-512 units of CPUs that are
    not Intel's idle; oneDNN uses them (2.1 times faster on a Zen 5, see docs/design.md).
    """
    if x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() and onednn_gemm():
        return _onednn(x, w, bias)
    return torch.nn.functional.linear(x, w, bias)
