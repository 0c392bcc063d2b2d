"""Hidden states or logits -> log-probs of given tokens, without keeping ``[N, V]``.

With t the target's logit and l the log-sum-exp of all *other* logits, log p = logsigmoid(t - l):
exact also where p is nearly 1, and its gradient 1 - p comes out without a subtraction. Everything
here is that formula, around `fold_vocabulary`, which forms t and l tile by tile.

z = cap(scale * (h @ W.T + bias)) / temperature, cap(x) = softcap * tanh(x / softcap).
Shapes: N rows, D hidden size, V vocabulary, R responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

from prefopt import dispatch, tiles
from prefopt.folding import Folded, fold_vocabulary
from prefopt.tiles import Head


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    entropy: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(z)[targets] for z = head(hidden), and optionally the entropy of softmax(z).

    hidden [N, D], weight [V, D], targets [N] int64, bias [V] -> [N], or ([N], [N]) in nats;
    float32, or float64 for float64 input. 16-bit inputs are multiplied in their own precision and
    accumulated in float32; the target's logit is formed again in float32, because rounding that
    one number would move the sum over a response by 0.1 nats and more.

    impl: "torch", "triton" (cuBLAS tiles and fold kernels), "fused" (one kernel whose rows do not
    depend on the batch they stand in, bit for bit) or "auto"; `dispatch.why_not` explains it.
    """
    _check(hidden, weight, targets)
    head = Head(scale, softcap, temperature)
    folded = fold_vocabulary(
        hidden, weight, targets, bias=bias, head=head, entropy=entropy, impl=impl
    )
    logps = logsigmoid(folded.target - folded.lse)
    return (logps, _entropy(folded)) if entropy else logps


def token_logprobs_and_reference(
    hidden: Tensor,
    ref_hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """token_logprobs of a policy and of its reference, which share the head, in the same products.

    hidden, ref_hidden [N, D] -> [N], [N]; the second takes no gradient.
    """
    _check(hidden, weight, targets)
    assert ref_hidden.shape == hidden.shape, (ref_hidden.shape, hidden.shape)
    head = Head(scale, softcap, temperature)
    folded = fold_vocabulary(
        hidden, weight, targets, bias=bias, head=head, ref_hidden=ref_hidden.detach(), impl=impl
    )
    assert folded.ref_target is not None and folded.ref_lse is not None
    logps = logsigmoid(folded.target - folded.lse)
    return logps, logsigmoid(folded.ref_target - folded.ref_lse)


def shard_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    start: int,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    entropy: bool = False,
    impl: str = "auto",
) -> Tensor:
    """What rows start : start + len(weight) of a head, split by vocabulary, know about each token.

    -> [2, N], or [3, N] with entropy: the target's logit (0 where another shard has it), the
    log-sum-exp of this shard's other logits, and their entropy. Differentiable; `join_shards`
    turns those of all shards into log-probs.
    """
    _check(hidden, weight, targets)
    head = Head(scale, softcap, temperature)
    folded = fold_vocabulary(
        hidden, weight, targets - start, bias=bias, head=head, entropy=entropy, impl=impl
    )
    return torch.stack([x for x in folded[:3] if x is not None])


def join_shards(statistics: Sequence[Tensor]) -> Tensor | tuple[Tensor, Tensor]:
    """The `shard_statistics` of all shards, in their order -> what token_logprobs returns."""
    target, lse, *entropies = torch.stack(list(statistics), 1)
    total = lse.logsumexp(0)
    folded = Folded(target.sum(0), total, None, None, None)
    logps = logsigmoid(folded.target - folded.lse)
    if not entropies:
        return logps
    share = (lse - total).exp()
    gap = torch.where(share > 0, total - lse, 0.0)  # a shard without weight may be inf away
    return logps, _entropy(folded._replace(entropy=(share * (entropies[0] + gap)).sum(0)))


def _check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    assert hidden.dim() == 2 and weight.dim() == 2 and hidden.shape[1] == weight.shape[1]
    assert targets.shape == hidden.shape[:1], (targets.shape, hidden.shape)


def _entropy(folded: Folded) -> Tensor:
    """Of two groups, the target with log-odds x and the others: both shares times their own."""
    assert folded.entropy is not None
    x = (folded.target - folded.lse).clamp(-100, 100)  # p log p is below 1e-40 beyond
    log_p, log_q = logsigmoid(x), logsigmoid(-x)
    return log_q.exp() * (folded.entropy - log_q) - log_p.exp() * log_p


def gather_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(z)[targets] and optionally the entropy, for z = cap(logits) / temperature.

    logits [..., V], targets [...] int64 -> [...] in nats, float32 (float64 for float64 input). A
    target of -100 masks its row: 0, with a gradient of 0, whatever its logits are.
    """
    assert logits.shape[:-1] == targets.shape, (logits.shape, targets.shape)
    chosen = dispatch.choose("gather", logits.device, impl, logits.dtype)
    ops = tiles if chosen == "torch" else dispatch.kernels("gather")
    head = Head(1.0, softcap, temperature)
    flat = logits.flatten(0, -2) if logits.dim() > 1 else logits[None]
    logps, entropies = _Gather.apply(flat, targets.flatten(), head, entropy, ops)
    logps = logps.view(targets.shape)
    return (logps, entropies.view(targets.shape)) if entropy else logps


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits, targets, head: Head, entropy: bool, ops):
        options = head._asdict()
        logps, lse, entropies = ops.gather_forward(logits, targets, entropy=entropy, **options)
        if entropies is None:
            entropies = lse[:0]
            ctx.mark_non_differentiable(entropies)
        ctx.options, ctx.ops, ctx.entropy = options, ops, entropy
        ctx.save_for_backward(logits, targets, lse, entropies)
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, g_entropy: Tensor):  # type: ignore[override]
        logits, targets, lse, entropies = ctx.saved_tensors
        if ctx.entropy:
            entropy = {"entropies": entropies, "g_entropy": g_entropy.contiguous()}
        else:
            entropy = {"entropies": None, "g_entropy": None}
        upstream = {"g": g.contiguous(), **entropy, **ctx.options}
        return ctx.ops.gather_backward(logits, targets, lse, **upstream), None, None, None, None


def sequence_logprobs(
    logprobs: Tensor, response_ids: Tensor, num_responses: int, *, average: bool = False
) -> Tensor:
    """Sum (or mean) of the token log-probs of each response: [N], [N] int64 -> [R].

    Added up in float64, one response after another in token order, so that neither packing nor the
    place in a batch changes a bit of the result.
    """
    assert logprobs.shape == response_ids.shape and logprobs.dim() == 1
    order = response_ids.argsort(stable=True)
    lengths = torch.bincount(response_ids, minlength=num_responses)
    assert len(lengths) == num_responses, "response_ids beyond num_responses"
    ordered = logprobs[order]
    if ordered.device.type != "mps":  # which has no float64
        ordered = ordered.double()
    sums = torch.segment_reduce(ordered, "sum", lengths=lengths, unsafe=True)
    if average:
        sums = sums / lengths.clamp_min(1)
    return sums.to(logprobs.dtype)
