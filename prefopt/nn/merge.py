"""Adapters into the weights they change, and out again.

W' = round(W + s B A), the sum in float32 (with DoRA's magnitudes, or a trained copy, in its place).
In 16 bits a small change is partly lost in the rounding, in 4 bits nearly all of it: how much is in
the report, layer by layer. The weights as they were are kept whole and put back by unmerge, which
therefore subtracts nothing.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prefopt.errors import InputError
from prefopt.nn.adapted import Adapted, adapted_modules
from prefopt.nn.lora import require
from prefopt.nn.lora_embedding import LoraEmbedding
from prefopt.nn.lora_linear import LoraLinear
from prefopt.nn.nf4 import quantize_nf4
from prefopt.nn.nf4_linear import NF4Linear
from prefopt.nn.saved_module import SavedModule


class Change(NamedTuple):
    """What became of the change D = s B A of one layer, with D' = W' - W the change it got.

    lost: |D' - D| / |D|. survived: <D', D> / <D, D>, the part of D' along D; 1 is all.
    """

    lost: float
    survived: float


@dataclass(frozen=True)
class MergeReport:
    """What merge_lora did, by the name of the layer; `requantized`: into 4-bit weights."""

    name: str
    changes: dict[str, Change]
    requantized: bool

    def lines(self) -> list[str]:
        """For the terminal."""
        if not self.changes:
            return [f'merged "{self.name}"; no weight was rounded']
        worst, change = max(self.changes.items(), key=lambda item: item[1].lost)
        least = min(change.survived for change in self.changes.values())
        into = "4-bit weights" if self.requantized else "layers"
        return [
            f'merged "{self.name}" into {len(self.changes)} {into}; rounding lost at most '
            f"{change.lost:.2%} of a layer's change ({worst}), and at least {least:.1%} of each "
            "survived"
        ]


@torch.no_grad()
def merge_lora(
    model: nn.Module, name: str = "default", *, requantize: bool = False, keep: bool = True
) -> MergeReport:
    """Puts adapter `name` into the base weights, added in float32 and rounded once.

    The adapter must be the active one. The weights as they were are kept: until `unmerge` puts them
    back, the base alone cannot be had. keep=False drops them, layer by layer, and cannot be undone:
    for a model that is merged to be saved. A 4-bit base is refused unless `requantize`, because 4
    bits hold next to nothing of a small change: merge into the base in 16 bits (`dequantize_base`),
    or into the weights it was made from.
    """
    layers = require(model, name)
    _check(model, name, requantize)
    changes = {}
    for path, layer in layers:
        new, change = _merged(layer, name)
        layer.unmerged, layer.base = layer.base if keep else None, new
        layer.merged = name
        if change is not None:
            changes[path] = change
    return MergeReport(name, changes, any(isinstance(layer.base, NF4Linear) for _, layer in layers))


def unmerge(model: nn.Module, name: str = "default") -> None:
    """Gives the base the very weights back that it had before merge_lora."""
    layers = [layer for _, layer in require(model, name) if layer.merged == name]
    if not layers:
        raise InputError(f'adapter "{name}" is not merged; there is nothing to unmerge')
    if any(layer.unmerged is None for layer in layers):
        raise InputError(f'"{name}" was merged with keep=False; load the model again')
    for layer in layers:
        layer.base, layer.merged, layer.unmerged = layer.unmerged, None, None


def dequantize_base(model: nn.Module) -> int:
    """Every 4-bit layer of `model` becomes an nn.Linear in the dtype it was quantised from.

    Layer by layer, adapted ones too; returns how many. The model computes what it did.
    """
    found = [(path, m) for path, m in model.named_modules() if isinstance(m, NF4Linear)]
    for path, layer in found:
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _dense(layer))
    return len(found)


def _check(model: nn.Module, name: str, requantize: bool) -> None:
    for path, layer in adapted_modules(model):
        if layer.merged is not None:
            raise InputError(f'adapter "{layer.merged}" is merged already; unmerge it first')
        if layer.active != name:
            raise InputError(f'"{name}" is not active; merge it inside adapters(model, "{name}")')
        if name in layer.names and isinstance(layer.base, NF4Linear) and not requantize:
            raise InputError(
                f'{path} is 4-bit, and rounded to 4 bits again little of "{name}" would be left; '
                "merge into the dense base (dequantize_base), or say requantize=True"
            )


def _merged(layer: Adapted, name: str) -> tuple[nn.Module, Change | None]:
    """A new base that computes what the layer does, and what rounding did to the change."""
    if isinstance(layer, SavedModule):
        new = copy.deepcopy(layer.base)
        new.load_state_dict(layer.merged_state(name), strict=False)
        return new, None
    assert isinstance(layer, LoraLinear | LoraEmbedding)
    want, base = layer.merged_weight(name), layer.base
    if isinstance(base, NF4Linear):
        options = {"kind": base.kind, "block": base.block, "double": base.nested is not None}
        new = NF4Linear(quantize_nf4(want.to(base.dtype), **options), base.bias)
        return new, _change(base.dequantize(), want, new.dequantize())
    weight = nn.Parameter(want.to(base.weight.dtype), requires_grad=False)
    new = copy.copy(base)  # another module over the same tensors, but for this one
    new._parameters = {**base._parameters, "weight": weight}
    return new, _change(base.weight, want, weight)


def _change(old: Tensor, want: Tensor, new: Tensor) -> Change:
    delta, got = want - old, new.to(want.dtype) - old
    size = delta.square().sum().item()
    if size == 0:
        return Change(0.0, 1.0) if torch.equal(old, new) else Change(math.inf, 1.0)
    lost = (got - delta).square().sum().item()
    return Change(math.sqrt(lost / size), (got * delta).sum().item() / size)


def _dense(layer: NF4Linear) -> nn.Linear:
    linear = nn.Linear(
        layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
    )
    linear.weight = nn.Parameter(layer.dequantize(), requires_grad=False)
    if layer.bias is not None:
        linear.bias = layer.bias
    return linear.train(layer.training)
