"""log softmax(z')[target] of given logits, and its gradient: one launch each way.

z' = cap(scale * logits) / temperature; method and notation in rows.py. Forward: one program a row
keeps the target apart from the others, and with d = lse of the others - z'_target

    log p = -softplus(d), 1 - p = sigmoid(d), H = -p log p + (1 - p) (H of the others - log(1 - p))

so that log p near 0 has all its digits. Forward reads each logit once (V b bytes a row), backward
reads and writes each once (2 V b); a masked row is not read. Shapes: M rows, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefopt_kernels import tuning
from prefopt_kernels.rows import (
    LN2,
    LOG2E,
    NEG_INF,
    check_matrix,
    check_vector,
    column_in,
    factors,
    fold_row,
    gradient_block,
    launch,
    log1p_exp,
    narrow,
    on_device,
    origin_of,
    transform,
)


@triton.jit
def _merge(t, m, s, w, ENTROPY: tl.constexpr):
    """The target's z' and the others' m, s, w (`fold_row`) -> log p, lse, entropy. A side that does
    not contribute (t = -inf, s = 0) has no share; with neither, log p = lse = -inf, entropy 0."""
    some = s != 0  # also if NaN
    gone = t == NEG_INF
    both = some & (t != NEG_INF)
    log_s = tl.log(tl.where(some, s, 1.0))
    others = tl.where(some, origin_of(m) + log_s, NEG_INF)
    t = tl.where(gone, 0.0, t)
    d = tl.where(both, (origin_of(m) - t) + log_s, 0.0)
    bend = log1p_exp(-tl.abs(d))
    minus_logp = tl.maximum(d, 0.0) + bend
    zero = t - t  # log p and entropy of a target alone, where a NaN stays one
    logp = tl.where(both, -minus_logp, tl.where(gone, NEG_INF, zero))
    one = tl.where(some, others, tl.where(gone, NEG_INF, t))
    lse = tl.where(both, tl.where(d > 0, others, t) + bend, one)
    entropy = 0.0
    if ENTROPY:
        h = log_s - w * LN2 / tl.where(some, s, 1.0)
        log_q = d - minus_logp
        mixed = tl.exp2(-minus_logp * LOG2E) * minus_logp + tl.exp2(log_q * LOG2E) * (h - log_q)
        entropy = tl.where(both, mixed, h + zero)
    return logp, lse, entropy


@triton.jit(do_not_specialize=["ignore_index"])
def gather_forward_kernel(
    logits_ptr, target_ptr, logp_ptr, lse_ptr, entropy_ptr, width, stride, ignore_index,
    inner: tl.float32, outer: tl.float32,  # pyright: ignore[reportInvalidTypeForm]
    HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    logp = 0.0
    lse = 0.0
    entropy = 0.0
    if target != ignore_index:
        logits_ptr += row * stride
        y = column_in(target, width)
        # Never out of the row: a target that is no column gives NaN.
        t = tl.load(logits_ptr + y, mask=y >= 0, other=float("nan")).to(tl.float32)
        t, _ = transform(t, inner, outer, HAS_SOFTCAP)
        m = tl.full((), NEG_INF, tl.float32)
        m, s, w = fold_row(
            logits_ptr, logits_ptr, width, y, m, inner, outer, False, HAS_SOFTCAP, ENTROPY, BLOCK
        )
        logp, lse, entropy = _merge(t, m, s, w, ENTROPY)
    tl.store(logp_ptr + row, logp)
    tl.store(lse_ptr + row, lse)
    if ENTROPY:
        tl.store(entropy_ptr + row, entropy)


def gather_forward(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """log p of the targets, log-sum-exp and (with `entropy`) entropy: [M] each, nats, float32.

    logits [M, V] with any row stride, targets [M] int64. Rows whose target is `ignore_index` give 0
    and are not read; another target outside [0, V) gives NaN. Raises AssertionError on shapes,
    types or strides it does not take.
    """
    check_matrix(logits, "logits")
    check_vector(targets, logits, torch.int64, "targets")
    logps, lse = logits.new_empty(2, len(logits), dtype=torch.float32)
    entropies = torch.empty_like(lse) if entropy else None
    if not len(logits):
        return logps, lse, entropies
    heads = factors(scale, softcap, temperature)

    def run(config: tuning.Rows) -> None:
        launch(
            gather_forward_kernel, len(logits), config,
            logits, targets, logps, lse, lse if entropies is None else entropies,
            logits.shape[1], logits.stride(0), ignore_index, *heads,
            HAS_SOFTCAP=softcap is not None, ENTROPY=entropy,
        )  # fmt: skip

    with on_device(logits):
        run(tuning.rows("gather_forward", logits, lambda: run))
    return logps, lse, entropies


@triton.jit(do_not_specialize=["ignore_index"])
def gather_backward_kernel(
    logits_ptr, target_ptr, lse_ptr, entropy_ptr, g_ptr, g_entropy_ptr, g_lse_ptr, out_ptr,
    width, stride, out_stride, ignore_index,
    inner: tl.float32, outer: tl.float32,  # pyright: ignore[reportInvalidTypeForm]
    HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_LSE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK columns of a row."""
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    out_ptr += row * out_stride
    target = tl.load(target_ptr + row)
    g = tl.load(g_ptr + row)
    live = g != 0
    own = -g
    g_entropy = 0.0
    entropy = 0.0
    if HAS_ENTROPY:
        g_entropy = tl.load(g_entropy_ptr + row)
        entropy = tl.load(entropy_ptr + row)
        live = live | (g_entropy != 0)
    if HAS_LSE:
        g_lse = tl.load(g_lse_ptr + row)
        own += g_lse
        live = live | (g_lse != 0)
    if live & (target != ignore_index):
        x = tl.load(logits_ptr + row * stride + cols, mask=inside, other=NEG_INF).to(tl.float32)
        lse = tl.load(lse_ptr + row)
        d, c = gradient_block(
            x, lse, entropy, own, g_entropy,
            inner, outer, HAS_SOFTCAP, HAS_ENTROPY,
        )  # fmt: skip
        onehot = tl.where(lse == NEG_INF, 0.0, g) * c
        d = tl.where(cols == column_in(target, width), d + onehot, d)
        tl.store(out_ptr + cols, narrow(d, out_ptr.dtype.element_ty), mask=inside)
    else:
        zeros = tl.zeros([BLOCK], out_ptr.dtype.element_ty)
        tl.store(out_ptr + cols, zeros, mask=inside)


def gather_backward(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    entropies: Tensor | None,
    g: Tensor,
    *,
    g_entropy: Tensor | None = None,
    g_lse: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient by the logits [M, V], in their type (or out's; out may be logits: in place).

    (g (onehot - p) - g_entropy p (log p + H) + g_lse p) slope scale / temperature with the lse and
    entropies of `gather_forward` and the upstream gradients [M] float32 of its results. Rows whose
    target is `ignore_index`, or all of whose upstream gradients are 0, are zeros and not read.
    Raises AssertionError as `gather_forward` does.
    """
    grad = torch.empty_like(logits) if out is None else out
    check_matrix(logits, "logits")
    check_matrix(grad, "out")
    assert grad.shape == logits.shape, (tuple(grad.shape), tuple(logits.shape))
    assert g_entropy is None or entropies is not None, "g_entropy needs the entropies"
    check_vector(targets, logits, torch.int64, "targets")
    g = g.contiguous()  # upstream gradients of a sum are one number, expanded
    g_entropy, g_lse = (None if x is None else x.contiguous() for x in (g_entropy, g_lse))
    named = {"lse": lse, "entropies": entropies, "g": g, "g_entropy": g_entropy, "g_lse": g_lse}
    for name, vector in named.items():
        check_vector(vector, logits, torch.float32, name)
    if not logits.numel():
        return grad
    heads = factors(scale, softcap, temperature)

    def run(config: tuning.Rows, into: Tensor = grad) -> None:
        launch(
            gather_backward_kernel, len(logits) * -(-logits.shape[1] // config.block), config,
            logits, targets, lse, lse if g_entropy is None else entropies, g,
            g if g_entropy is None else g_entropy, g if g_lse is None else g_lse, into,
            logits.shape[1], logits.stride(0), into.stride(0), ignore_index, *heads,
            HAS_SOFTCAP=softcap is not None, HAS_ENTROPY=g_entropy is not None,
            HAS_LSE=g_lse is not None,
        )  # fmt: skip

    def trial():
        scratch = torch.empty_like(grad)
        return lambda config: run(config, scratch)

    with on_device(logits):
        run(tuning.rows("gather_backward", logits, trial))
    return grad
