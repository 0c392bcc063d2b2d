"""A digest of the weights that a reference computes with: the same for the same function.

Tensors stand under the names of the plain model: which modules carry an adapter is no matter, nor
are the tensors of an adapter that is off.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from prefopt.nn.adapted import adapted_modules
from prefopt.nn.heads import SCORE


def digest(model: nn.Module, adapter: str) -> str:
    """sha256 over names, shapes, dtypes and bytes of the base and of `adapter`, if it is there;
    without the head of a reward model, which always trains and may have been drawn at random."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors(model, adapter), key=lambda item: item[0]):
        if name.startswith(f"{SCORE}."):
            continue
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        total.update(flat.view(torch.uint8).numpy().data)
    for path, module in adapted_modules(model):
        if scale := getattr(module, "scaling", {}).get(adapter):
            total.update(f"{path} {scale}\n".encode())  # the same A and B with another alpha differ
    return total.hexdigest()


def tensors(model: nn.Module, adapter: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the base, in memory <module>.base.<name>, and of `adapter`,
    <module>.<part>.<adapter>."""
    adapted = [f"{path}." for path, _ in adapted_modules(model)]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        prefix = next((p for p in adapted if name.startswith(p)), None)
        rest = name.removeprefix(prefix or "")
        if prefix is None:
            yield name, tensor
        elif rest.startswith("base."):
            yield prefix + rest.removeprefix("base."), tensor
        elif rest.split(".")[1] == adapter:
            yield name, tensor
