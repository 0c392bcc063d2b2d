"""Digests of weights. Of those that a reference computes with: the same for the same function.

Tensors stand under the names of the plain model: which modules carry an adapter is no matter, nor
are the tensors of an adapter that is off.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from prefopt.loading import WEIGHT_FILES
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


def same_files(one: Path, other: Path) -> bool:
    """Whether two folders hold the same model: the same folder, or files with the same bytes."""
    if one.absolute().resolve() == other.absolute().resolve():
        return True
    files = [_weight_files(one), _weight_files(other)]
    if not files[0] or [f.name for f in files[0]] != [f.name for f in files[1]]:
        return False
    pairs = list(zip(*files, strict=True))
    if any(a.stat().st_size != b.stat().st_size for a, b in pairs):
        return False
    return all(_sha256(a) == _sha256(b) for a, b in pairs)


def _weight_files(folder: Path) -> list[Path]:
    found = {file for pattern in WEIGHT_FILES for file in folder.glob(pattern)}
    return sorted({*found, *folder.glob("config.json")})


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
