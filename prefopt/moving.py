"""A reference that follows the policy (TR-DPO, Gorbatovski et al. 2024, arXiv 2404.09656).

Its weights are a copy of what trains, all weights or the adapter's, moved every so many steps to
alpha * policy + (1 - alpha) * reference. Of LoRA the factors A and B are averaged, not their
product, which would not stay of rank r.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Named = Iterable[tuple[str, nn.Parameter]]


def copy_weights(trainable: Named) -> dict[str, Tensor]:
    """What trains, as it is now."""
    return {name: p.detach().clone() for name, p in trainable}


@torch.no_grad()
def move(reference: dict[str, Tensor], trainable: Named, alpha: float) -> None:
    """reference <- alpha * policy + (1 - alpha) * reference, in place."""
    for name, p in trainable:
        reference[name].lerp_(p, alpha)


@contextmanager
def swapped(trainable: Named, reference: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the model computes with the reference's weights; no graph may be alive across it."""
    parameters = dict(trainable)
    own = {name: p.data for name, p in parameters.items()}
    for name, p in parameters.items():
        p.data = reference[name]
    try:
        yield
    finally:
        for name, p in parameters.items():
            p.data = own[name]
