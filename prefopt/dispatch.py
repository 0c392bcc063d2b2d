"""Which implementation runs an operation, and why not the faster one."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from prefopt.errors import InputError


def why_not(op: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> str | None:
    """None if ``impl="auto"`` runs the Triton kernel of ``op`` on ``device``, else why it does not.

    op: "gather", "logprob", or "fused", which "auto" never takes and ``impl="fused"`` asks for.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return f"the {op} kernel needs a CUDA or ROCm device and this tensor is on {device.type}"
    return _cannot_run(op, device, dtype)


def _cannot_run(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if not _importable("triton"):
        return "triton is not installed"
    if not _importable("prefopt_kernels"):
        return "prefopt_kernels is not importable (install the project: pip install -e .)"
    if not _importable(f"prefopt_kernels.{op}"):
        return f"prefopt_kernels has no {op} kernel"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the {op} kernel has no {str(dtype).removeprefix('torch.')} variant"
    if op == "fused":  # the only one that needs matrix units
        return kernels("fused").supported(kernels("tuning").arch(device))
    return None


@functools.cache
def _importable(module: str) -> bool:
    """Asked for in every call of an operation, and looked up on disk once."""
    return importlib.util.find_spec(module) is not None


def choose(op: str, device: torch.device, impl: str, dtype: torch.dtype = torch.float32) -> str:
    """Resolve ``impl`` for one call of "gather" or "logprob": "torch", "triton" or "fused".

    "auto" takes the Triton kernels on a GPU that runs them. A kernel asked for by name that cannot
    run is an InputError; under TRITON_INTERPRET=1 those by name run on the CPU too, slowly.
    """
    known = ("auto", "torch", "triton", *(("fused",) if op == "logprob" else ()))
    if impl not in known:
        raise InputError(f"impl is one of {', '.join(map(repr, known))}, not {impl!r}")
    if impl == "torch":
        return "torch"
    if impl == "auto":
        return "torch" if why_not(op, device, dtype) else "triton"
    for needed in (op, "fused") if impl == "fused" else (op,):
        interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        reason = (_cannot_run if interpreted else why_not)(needed, device, dtype)
        if reason:
            raise InputError(f"impl={impl!r} cannot run: {reason}; use impl='auto' or 'torch'")
    return impl


def kernels(module: str) -> ModuleType:
    """A module of prefopt_kernels, by its name; loads triton."""
    return importlib.import_module(f"prefopt_kernels.{module}")


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


@functools.cache
def _wide_gemm(device: torch.device) -> bool:
    """Whether a 16-bit product on this device can be added up and left in float32."""
    x = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    try:
        torch.addmm(x.float(), x, x, out_dtype=torch.float32)
    except (RuntimeError, TypeError):
        return False
    return True


def add_mm_nt(total: Tensor | None, x: Tensor, w: Tensor) -> Tensor:
    """total + x @ w.T (None: 0), [M, N], [M, K], [N, K]; into `total`, in float32 or float64."""
    if x.dtype.itemsize == 2 and x.device.type == "cuda" and _wide_gemm(x.device):
        if total is None:
            return torch.mm(x, w.t(), out_dtype=torch.float32)
        return torch.addmm(total, x, w.t(), out_dtype=torch.float32, out=total)
    part = mm_nt(x, w)
    if total is None:
        return part.to(torch.float64 if part.dtype == torch.float64 else torch.float32)
    return total.add_(part)
