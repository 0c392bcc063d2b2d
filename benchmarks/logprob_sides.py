"""The sides of bench_logprob.py: what each computes per token, what they are given, what is exact.

A side is built for a case and a device, or says why it cannot be (`Absent`); built, it is a
function (hidden [M, H], weight [V, H], targets [M]) -> (log-probs [M],) or (log-probs, entropies).
Peers are called as their own trainers call them. Nothing here is timed.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Forward = Callable[..., tuple[Tensor, ...]]
HEADS = ("forward", "frozen", "trained")  # without gradient; of the hidden states; of both
COMPILED = ("compile", "cce")  # compiled by inductor on the CPU too
GEMMS = {"forward": 1, "frozen": 2, "trained": 3}  # products of 2MHV that nothing can avoid


class Absent(Exception):
    """Why a side has no figure here."""


class Case(NamedTuple):
    dtype: str
    h: int
    v: int
    m: int
    head: str = "frozen"
    entropy: bool = False

    @property
    def flops(self) -> float:
        return 2.0 * GEMMS[self.head] * self.m * self.h * self.v

    @property
    def itemsize(self) -> int:
        return getattr(torch, self.dtype).itemsize

    @property
    def bytes(self) -> float:
        """Each input read once, each output written once."""
        h, w = self.m * self.h, self.v * self.h
        moved = h + w + (h if self.head != "forward" else 0) + (w if self.head == "trained" else 0)
        return float(moved * self.itemsize + 20 * self.m)

    @property
    def shape(self) -> str:
        return f"{self.h}x{self.v}"

    def __str__(self) -> str:
        entropy = " with entropy" if self.entropy else ""
        return f"{self.dtype} H {self.h} V {self.v} M {self.m} {self.head}{entropy}"


# --- what all are given --------------------------------------------------------------------------


class Problem(NamedTuple):
    case: Case
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    upstream: tuple[Tensor, ...]  # gradients of the log-probs and of the entropies, float32 [M]

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What takes a gradient."""
        return tuple(x for x in (self.hidden, self.weight) if x.requires_grad)

    def rows(self, count: int) -> Problem:
        """The first rows of it."""
        hidden = self.hidden.detach()[:count].requires_grad_(self.hidden.requires_grad)
        upstream = tuple(g[:count] for g in self.upstream)
        return self._replace(hidden=hidden, targets=self.targets[:count], upstream=upstream)


@functools.lru_cache(maxsize=1)
def _weight(h: int, v: int, dtype: str, device: str) -> Tensor:
    """Rows of about unit length, so that a logit has the spread of the hidden state's noise."""
    torch.manual_seed(0)
    weight = torch.randn(v, h, device=device)
    return weight.div_(h**0.5).to(getattr(torch, dtype))


def problem(case: Case, device: str) -> Problem:
    """Random weights, and hidden states mixed with the direction of their target: |z| <= 20 or so.

    The target's logit is between 3 and 15 on average, all others have a deviation of 2, so the
    log-probs go from hopeless to nearly 0, as those of sampled text do.
    """
    weight = _weight(case.h, case.v, case.dtype, device).detach()
    torch.manual_seed(1)
    targets = torch.randint(0, case.v, (case.m,), device=device)
    toward = torch.rand(case.m, 1, device=device) * 12 + 3
    noise = 2 * torch.randn(case.m, case.h, device=device)
    hidden = (toward * weight[targets].float() + noise).to(weight.dtype)
    upstream = tuple(torch.randn(case.m, device=device) for _ in range(1 + case.entropy))
    hidden.requires_grad_(case.head != "forward")
    weight.requires_grad_(case.head == "trained")
    return Problem(case, hidden, weight, targets, upstream)


def step(forward: Forward, p: Problem, mark: Callable[[], None] = lambda: None):
    """Forward and backward -> (outputs, gradients); `mark` is called in between."""
    with torch.set_grad_enabled(bool(p.inputs)):
        outputs = forward(p.hidden, p.weight, p.targets)
    mark()
    if not p.inputs:
        return outputs, ()
    upstream = [g.to(x.dtype) for g, x in zip(p.upstream, outputs, strict=True)]
    return outputs, torch.autograd.grad(outputs, p.inputs, upstream)


# --- the sides -----------------------------------------------------------------------------------


def _prefopt(case: Case, device: str, impl: str = "auto") -> Forward:
    from prefopt.logprobs import token_logprobs

    def forward(hidden, weight, targets):
        found = token_logprobs(hidden, weight, targets, entropy=case.entropy, impl=impl)
        return found if case.entropy else (found,)

    return forward


def _prefopt_fused(case: Case, device: str) -> Forward:
    _cuda_only(device, "prefopt's fused kernel")
    return _prefopt(case, device, "fused")


def _full_logits(entropy: bool) -> Forward:
    def forward(hidden, weight, targets):
        logps = F.linear(hidden, weight).float().log_softmax(-1)
        chosen = logps.gather(1, targets[:, None])[:, 0]
        return (chosen, -(logps.exp() * logps).sum(-1)) if entropy else (chosen,)

    return forward


def _naive(case: Case, device: str) -> Forward:
    return _full_logits(case.entropy)


@functools.cache
def _compiled(dtype: str, head: str, entropy: bool) -> Forward:
    _more_graphs()
    return torch.compile(_full_logits(entropy), dynamic=True)


def _compile(case: Case, device: str) -> Forward:
    return _compiled(case.dtype, case.head, case.entropy)


def _more_graphs() -> None:
    """One graph a dtype and kind of head; past the default limit of 8 dynamo would give up."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 64


def _no_entropy(case: Case, who: str) -> None:
    if case.entropy:
        raise Absent(f"{who} has no entropy")


def _cuda_only(device: str, who: str) -> None:
    if torch.device(device).type != "cuda":
        raise Absent(f"{who} needs a CUDA device")


def _import(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except Exception as error:  # peers fail in many ways to import beside another Triton or torch
        raise Absent(f"cannot import {name}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def _torch_lce(case: Case, device: str, **options: Any) -> Forward:
    """`F.linear_cross_entropy`, chunked; without options it picks the chunk and the precision."""
    _no_entropy(case, "F.linear_cross_entropy")
    if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Absent(f"torch {torch.__version__} has no chunked F.linear_cross_entropy")
    chosen = torch.nn.LinearCrossEntropyOptions(**options)

    def forward(hidden, weight, targets):
        return (-F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=chosen),)

    return forward


def _torch_lce_rows(case: Case, device: str) -> Forward:
    """As many rows a chunk as pay: 256 on a CPU (see anchors), 2048 on a GPU."""
    return _torch_lce(case, device, batch_chunk_size=256 if device == "cpu" else 2048)


def _torch_lce_low(case: Case, device: str) -> Forward:
    """The same, adding up in the inputs' own 16 bits: its fastest on a CPU, and its least exact."""
    if case.dtype == "float32":
        raise Absent("the same as torch-lce-rows in float32")
    rows = 256 if device == "cpu" else 2048
    return _torch_lce(case, device, batch_chunk_size=rows, acc_policy="balanced")


def _trl_module() -> Any:
    """trl.kernels.chunked_logprob. Its backward asks trl.trainer.utils for a context that gathers
    ZeRO-3 shards; that module needs `datasets`, so where it cannot be had a null context stands in.
    """
    module = _import("trl.kernels.chunked_logprob")
    try:
        _import("trl.trainer.utils")
    except Absent:
        _import("trl.trainer")
        stub = types.ModuleType("trl.trainer.utils")
        stub.maybe_gather_lm_head_ctx = lambda *parameters: contextlib.nullcontext()
        sys.modules["trl.trainer.utils"] = stub
    return module


def _trl(case: Case, device: str) -> Forward:
    """TRL's chunked log-probs with its trainers' chunk of 32768 columns; torch tiles on a CPU."""
    function = _trl_module().ChunkedLogProbFunction
    wanted = ("entropy",) if case.entropy else ()

    def forward(hidden, weight, targets):
        out = function.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, wanted)
        return out[: 1 + case.entropy]

    return forward


def trl_gather(entropy: bool, device: str) -> Callable[..., tuple[Tensor, ...]]:
    """TRL's log-probs (and entropies) of targets on full logits."""
    if torch.device(device).type == "cuda":
        kernel = _import("trl.kernels.logprob_entropy").selective_log_softmax_and_entropy
        return lambda logits, targets: kernel(logits, targets)[: 1 + entropy]
    utils = _import("trl.trainer.utils")
    if entropy:
        return utils.selective_log_softmax_and_entropy
    return lambda logits, targets: (utils.selective_log_softmax(logits, targets),)


def _trl_full(case: Case, device: str) -> Forward:
    gather = trl_gather(case.entropy, device)
    return lambda hidden, weight, targets: gather(F.linear(hidden, weight), targets)


def _liger(case: Case, device: str) -> Forward:
    """Liger's per-token loss: CuTe on Hopper where it is installed, else chunks of 512 in torch."""
    module = _import("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    function = module.LigerFusedLinearScaledCrossEntropyFunction.apply
    try:
        module._resolve_implementation(torch.device(device))
    except ImportError:
        fallback = module._FusedLinearPPOFallbackFunction.apply

        def function(hidden, weight, targets, temperature, ignored, _tiles, entropy):
            return fallback(hidden, weight, targets, temperature, ignored, entropy)

    def forward(hidden, weight, targets):
        out = function(hidden, weight, targets, 1.0, -100, 1, case.entropy)
        return (-out[0], out[1]) if case.entropy else (-out,)

    return forward


def _liger_flce(case: Case, device: str) -> Forward:
    _no_entropy(case, "Liger's fused linear cross entropy")
    _cuda_only(device, "Liger's Triton kernel")
    function = _import("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    return lambda hidden, weight, targets: (-function(hidden, weight, targets, reduction="none"),)


def _cce(case: Case, device: str, **options: Any) -> Forward:
    """Cut cross entropy; on a CPU its torch.compile implementation, which keeps all logits."""
    _no_entropy(case, "CCE")
    _more_graphs()
    function = _import("cut_cross_entropy").linear_cross_entropy
    options["impl"] = "cce" if torch.device(device).type == "cuda" else "torch_compile"
    return lambda hidden, weight, targets: (
        -function(hidden, weight, targets, reduction="none", **options),
    )


def _cce_exact(case: Case, device: str) -> Forward:
    """Without the filter that drops small gradients."""
    _cuda_only(device, "CCE's kernel")
    return _cce(case, device, filter_eps=None)


OURS = {"prefopt": _prefopt, "prefopt-fused": _prefopt_fused}
PEERS = {
    "naive": _naive,
    "compile": _compile,
    "torch-lce": _torch_lce,
    "torch-lce-rows": _torch_lce_rows,
    "torch-lce-low": _torch_lce_low,
    "trl": _trl,
    "trl-full": _trl_full,
    "liger": _liger,
    "liger-flce": _liger_flce,
    "cce": _cce,
    "cce-exact": _cce_exact,
}
SIDES: dict[str, Callable[[Case, str], Forward]] = OURS | PEERS
FULL_LOGITS = {"naive": 16, "compile": 12, "trl-full": 16, "cce": 12}  # bytes an M*V element, rough


def needed_bytes(side: str, case: Case, device: str) -> float:
    """About what a side allocates at its peak, inputs included: enough to leave it out in time."""
    weight = case.v * case.h
    total = case.itemsize * weight * (2 if case.head == "trained" else 1)
    if side in FULL_LOGITS and not (side == "cce" and device != "cpu"):
        total += case.m * case.v * (FULL_LOGITS[side] + (12 if case.entropy else 0))
    elif side.startswith("liger"):
        total += min(case.m, 512) * case.v * (24 if case.entropy else 16) + 2 * weight
    elif not side.startswith("prefopt"):
        total += 4 * weight * (2 if case.head == "trained" else 1) + min(case.m, 4096) * 32768 * 16
    return total


# --- the products that nothing can avoid ---------------------------------------------------------


CPU_BLOCKS = [(1024, 2048), (512, 4096)]  # rows, columns


def _onednn(x: Tensor, w: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")


def bare_gemms(p: Problem) -> dict[str, Callable[[], None]]:
    """Ways to do the two products (one forward, three with a trained head) and nothing else.

    hidden @ W.T, then the result as if it were P: P @ W, and P.T @ hidden. Whole, or block by
    block with the sum over blocks left out: a bound, not an implementation.
    """
    case, cuda = p.case, p.hidden.device.type == "cuda"
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"linear": F.linear}
    if not cuda and case.dtype == "float32" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        ways["onednn"] = _onednn
    blocks = {"whole": (case.m, case.v)}
    blocks |= {f"{r}x{c}": (r, c) for r, c in ([(4096, case.v)] if cuda else CPU_BLOCKS)}
    h, w = p.hidden.detach(), p.weight.detach()

    def products(mm_nt: Callable[[Tensor, Tensor], Tensor], r: int, c: int) -> None:
        for rows in h.split(r):
            for columns in w.split(c):
                z = mm_nt(rows, columns)
                if case.head != "forward":
                    mm_nt(z, columns.t())
                if case.head == "trained":
                    mm_nt(z.t(), rows.t())

    return {
        f"{name} {label}": functools.partial(products, way, *block)
        for name, way in ways.items()
        for label, block in blocks.items()
    }


# --- what is exact -------------------------------------------------------------------------------


class Exact(NamedTuple):
    """In float64, from the same rounded inputs."""

    logps: Tensor
    entropies: Tensor
    d_hidden: Tensor | None
    d_logits: Tensor | None  # [M, V], kept for the head's gradient


def exact(p: Problem, columns: int = 8192) -> Exact:
    h, w = p.hidden.detach().double(), p.weight.detach()
    parts = [slice(i, i + columns) for i in range(0, len(w), columns)]
    logp = torch.empty(len(h), len(w), dtype=torch.float64, device=h.device)
    for part in parts:
        logp[:, part] = h @ w[part].double().t()
    logp -= logp.logsumexp(1, keepdim=True)
    prob = logp.exp()
    entropies = -(prob * logp).sum(1)
    chosen = logp.gather(1, p.targets[:, None])[:, 0]
    if not p.inputs:
        return Exact(chosen, entropies, None, None)
    up = [g.double()[:, None] for g in p.upstream]
    dz = prob * -up[0]
    dz.scatter_add_(1, p.targets[:, None], up[0])
    if p.case.entropy:
        dz -= up[1] * prob * (logp + entropies[:, None])
    d_hidden = torch.zeros_like(h)
    for part in parts:
        d_hidden += dz[:, part] @ w[part].double()
    return Exact(chosen, entropies, d_hidden, dz if p.case.head == "trained" else None)


def errors(outputs, gradients, right: Exact, p: Problem, columns: int = 8192) -> dict[str, float]:
    """Largest error of a token, error of the sum of all, relative L2 errors of the gradients."""
    off = outputs[0].detach().double() - right.logps
    found = {"token_max": off.abs().max().item(), "sum": off.sum().abs().item()}
    if p.case.entropy:
        found["entropy_max"] = (outputs[1].detach().double() - right.entropies).abs().max().item()
    if gradients:
        d_hidden = gradients[0].double()
        found["d_hidden"] = ((d_hidden - right.d_hidden).norm() / right.d_hidden.norm()).item()
    if right.d_logits is not None:
        h, square, total = p.hidden.detach().double(), 0.0, 0.0
        for i in range(0, p.case.v, columns):
            true = right.d_logits[:, i : i + columns].t() @ h
            square += (gradients[1][i : i + columns].double() - true).square().sum().item()
            total += true.square().sum().item()
        found["d_weight"] = (square / total) ** 0.5
    return found


# --- log-softmax and gather on given logits ------------------------------------------------------


def _gather_prefopt(device: str) -> Forward:
    from prefopt.logprobs import gather_logprobs

    return lambda logits, targets: (gather_logprobs(logits, targets),)


def _gather_torch(device: str) -> Forward:
    return lambda logits, targets: (
        logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0],
    )


GATHER: dict[str, Callable[[str], Forward]] = {
    "prefopt": _gather_prefopt,
    "torch": _gather_torch,
    "compile": lambda device: torch.compile(_gather_torch(device), dynamic=True),
    "trl": lambda device: trl_gather(False, device),
}
