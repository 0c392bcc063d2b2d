"""Useful floating-point operations: what a batch needs if nothing is padded or computed twice."""

from __future__ import annotations

from prefopt.data.packing import Batch
from prefopt.policy import Policy


def useful_flops(policy: Policy, batch: Batch, *, backward: bool) -> float:
    """FLOPs of the matrix products of one forward, or of forward and backward.

    Per token 2 FLOPs per weight and pass: forward, the gradient of the activations and, where the
    weight trains, its own. Each prompt counts once and the head counts on scored rows only;
    attention scores (under 5% at preference lengths) are left out.
    """
    head, embedding = policy.model.get_output_embeddings(), policy.model.get_input_embeddings()
    skip = {id(head.weight), id(embedding.weight)}
    tokens = sum(len(e.prompt) + sum(len(r) - 1 for r in e.responses) for e in batch.encoded)
    body = sum(
        p.numel() * (1 + backward * (1 + p.requires_grad))
        for p in policy.model.parameters()
        if p.dim() == 2 and id(p) not in skip
    )
    scored = head.weight.numel() * (1 + backward * (1 + head.weight.requires_grad))
    return 2.0 * (tokens * body + len(batch.targets) * scored)
