"""Useful floating-point operations: what a batch needs if nothing is padded or computed twice."""

from __future__ import annotations

from torch import nn

from prefopt.data.packing import Batch
from prefopt.nn.nf4_linear import NF4Linear
from prefopt.policy import REFERENCE, Policy


def useful_flops(policy: Policy, batch: Batch, *, backward: bool) -> float:
    """FLOPs of the matrix products of one forward, or of forward and backward.

    Per token 2 FLOPs per weight and pass: forward, the gradient of the activations and, where the
    weight trains, its own. Each prompt counts once, the head counts on scored rows only, of a layer
    of experts (weights [experts, out, in]) those that a token is sent to; attention scores (under
    5% at preference lengths) are left out.
    """
    head, config = policy.model.get_output_embeddings(), policy.model.config.get_text_config()
    tables = (m.weight for m in policy.model.modules() if isinstance(m, nn.Embedding))
    skip = set(map(id, [*tables, *([] if head is None else [head.weight])]))
    chosen = getattr(config, "num_experts_per_tok", None)
    packed = [m for m in policy.model.modules() if isinstance(m, NF4Linear)]
    skip |= {id(p) for m in packed for p in m.parameters()}  # half a byte a weight, and scales
    frozen = sum(m.in_features * m.out_features for m in packed if m is not head)
    body = frozen * (1.0 + backward)
    for name, p in policy.model.named_parameters():
        if p.dim() not in (2, 3) or id(p) in skip or name.endswith(f".{REFERENCE}"):
            continue  # the reference copy of an adapter takes turns with it
        share = chosen / len(p) if chosen and p.dim() == 3 else 1.0
        body += share * p.numel() * (1 + backward * (1 + p.requires_grad))
    tokens = sum(len(e.prompt) + sum(len(r) - 1 for r in e.responses) for e in batch.encoded)
    if head is None:  # a reward model, whose head is one vector
        return 2.0 * tokens * body
    size = head.in_features * head.out_features if head in packed else head.weight.numel()
    scored = size * (1 + backward * (1 + head.weight.requires_grad))
    return 2.0 * (tokens * body + len(batch.targets) * scored)
