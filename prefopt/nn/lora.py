"""Adapters on a model: adding, switching, copying, merging. The layer itself: lora_linear.py."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prefopt.errors import InputError
from prefopt.nn.lora_linear import LoraConfig, LoraLinear
from prefopt.nn.targets import base_modules, match_targets, why_not_linear

__all__ = [
    "LoraConfig",
    "LoraLinear",
    "LoraReport",
    "MergeReport",
    "adapter_names",
    "adapters",
    "add_lora",
    "copy_adapter",
    "has_adapter",
    "is_zero_adapter",
    "lora_layers",
    "lora_parameters",
    "merge_lora",
    "unload_lora",
    "unmerge",
]


@dataclass(frozen=True)
class LoraReport:
    """What add_lora did. `coverage`: the adapted share of the weights of all linear layers."""

    name: str
    adapted: list[str]
    trainable: int
    total: int
    coverage: float
    skipped: dict[str, str]  # module name -> reason

    def lines(self) -> list[str]:
        """For the terminal: what is adapted, its size, what was left out and why."""
        leaves = ", ".join(sorted({name.rpartition(".")[2] for name in self.adapted}))
        share = self.trainable / self.total
        lines = [
            f'LoRA "{self.name}" on {len(self.adapted)} layers ({leaves}), '
            f"{self.coverage:.1%} of the linear weights",
            f"trainable parameters: {self.trainable:,} of {self.total:,} ({share:.2%})",
        ]
        for reason in dict.fromkeys(self.skipped.values()):
            names = [name for name, why in self.skipped.items() if why == reason]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"left out: {', '.join(names[:3])}{more} ({reason})")
        return lines


@dataclass(frozen=True)
class MergeReport:
    """What merge_lora did: per module, the part |W' - W - s B A| / |s B A| lost in rounding W'."""

    name: str
    rounding_error: dict[str, float]

    def lines(self) -> list[str]:
        """For the terminal."""
        worst, error = max(self.rounding_error.items(), key=lambda item: item[1])
        return [
            f'merged "{self.name}" into {len(self.rounding_error)} layers; rounding lost '
            f"at most {error:.2%} of a layer's change ({worst})"
        ]


def add_lora(model: nn.Module, config: LoraConfig, name: str = "default") -> LoraReport:
    """Wraps the matched linear layers of `model` in place by LoraLinear and adds adapter `name`.

    The first adapter freezes the whole base and becomes active; a further one is added beside it,
    inactive (see `adapters`). InputError, before anything is changed: a name in use, a pattern that
    matches nothing, a match that cannot be adapted (embeddings, a head tied to the embedding).
    """
    _check_new_name(model, name)
    names, skipped = match_targets(model, config.targets)
    wrapped: dict[str, LoraLinear] = dict(lora_layers(model))
    if not wrapped:
        model.requires_grad_(False)
    active = next((layer.active for layer in wrapped.values()), name)
    for path in names:
        if path not in wrapped:
            base: Any = model.get_submodule(path)
            wrapped[path] = LoraLinear(base, active)
            _replace(model, path, wrapped[path])
        wrapped[path].add(name, config)
    sizes = {
        path: module.get_parameter("weight").numel()
        for path, module in base_modules(model)
        if why_not_linear(module) is None
    }
    return LoraReport(
        name=name,
        adapted=names,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=sum(p.numel() for p in model.parameters()),
        coverage=sum(sizes[path] for path in names) / sum(sizes.values()),
        skipped=skipped,
    )


@contextmanager
def adapters(model: nn.Module, name: str | None) -> Iterator[None]:
    """Inside, adapter `name` is active (None: the base alone); afterwards what was before.

    May be nested, and changes nothing else. A layer without adapter `name` computes its base.
    Backward does not need the context, except under gradient checkpointing, which runs forward
    again: there, call it inside.
    """
    if name is not None:
        _require(model, name)
    layers = [layer for _, layer in lora_layers(model)]
    for layer in layers:
        if layer.merged not in (None, name):
            raise InputError(f'adapter "{layer.merged}" is merged into the base; unmerge it first')
    before = [layer.active for layer in layers]
    try:
        for layer in layers:
            layer.active = name
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer.active = active


def lora_layers(model: nn.Module) -> list[tuple[str, LoraLinear]]:
    """(module name, layer) of every adapted layer, in the order of the model."""
    return [(name, m) for name, m in base_modules(model) if isinstance(m, LoraLinear)]


def adapter_names(model: nn.Module) -> list[str]:
    """The adapters of the model, oldest first."""
    return list(dict.fromkeys(name for _, layer in lora_layers(model) for name in layer.scaling))


def has_adapter(model: nn.Module) -> bool:
    """Whether any layer of the model is adapted."""
    return any(isinstance(module, LoraLinear) for module in model.modules())


def lora_parameters(model: nn.Module, name: str = "default") -> list[tuple[str, nn.Parameter]]:
    """(full parameter name, A or B) of adapter `name`, in the order of the model."""
    return [
        (f"{path}.{letter}.{name}", group[name])
        for path, layer in _require(model, name)
        for letter, group in (("A", layer.A), ("B", layer.B))
    ]


def is_zero_adapter(model: nn.Module, name: str = "default") -> bool:
    """True when every B is exactly 0: the adapted model is then the base, bit for bit."""
    return not any(bool(layer.B[name].any()) for _, layer in _require(model, name))


def copy_adapter(model: nn.Module, src: str, dst: str) -> None:
    """Adds `dst`, a frozen copy of `src` without dropout and inactive.

    It is the reference of a run whose adapter does not start at 0.
    """
    layers = _require(model, src)
    _check_new_name(model, dst)
    for _, layer in layers:
        layer.copy(src, dst)


def merge_lora(model: nn.Module, name: str = "default") -> MergeReport:
    """Adds s B A to the base weights, in float32 and rounded once; the old weights are kept aside.

    The adapter must be the active one. Until `unmerge` the base alone cannot be had.
    """
    layers = _require(model, name)
    for _, layer in lora_layers(model):
        if layer.merged is not None:
            raise InputError(f'adapter "{layer.merged}" is merged already; unmerge it first')
        if layer.active != name:
            raise InputError(f'"{name}" is not active; merge it inside adapters(model, "{name}")')
    lost = {}
    for path, layer in layers:
        old, delta = layer.base.weight.data, layer.delta(name)
        wide = old.to(torch.promote_types(old.dtype, torch.float32))
        new = (wide + delta).to(old.dtype)
        error = (new.to(wide.dtype) - wide - delta).norm() / delta.norm()
        lost[path] = error.item() if delta.any() else 0.0
        layer.base.weight.data, layer.unmerged_weight, layer.merged = new, old, name
    return MergeReport(name, lost)


def unmerge(model: nn.Module, name: str = "default") -> None:
    """Gives the base the very weights back that it had before merge_lora."""
    layers = [layer for _, layer in _require(model, name) if layer.merged == name]
    if not layers:
        raise InputError(f'adapter "{name}" is not merged; there is nothing to unmerge')
    for layer in layers:
        assert layer.unmerged_weight is not None
        layer.base.weight.data = layer.unmerged_weight
        layer.unmerged_weight = layer.merged = None


def unload_lora(model: nn.Module) -> None:
    """Puts the base layers back in place: with what is merged into them, without the adapters."""
    for path, layer in lora_layers(model):
        _replace(model, path, layer.base)


def _require(model: nn.Module, name: str) -> list[tuple[str, LoraLinear]]:
    """The layers that have adapter `name`; InputError when there are none."""
    layers = [(path, layer) for path, layer in lora_layers(model) if name in layer.scaling]
    if not layers:
        known = ", ".join(adapter_names(model)) or "none"
        raise InputError(f'the model has no adapter "{name}"; it has: {known}')
    return layers


def _check_new_name(model: nn.Module, name: str) -> None:
    # It becomes part of parameter names, and an attribute of a ParameterDict.
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name) or hasattr(nn.ParameterDict(), name):
        raise InputError(f'"{name}" cannot name an adapter; use letters, digits, "_" and "-"')
    if name in adapter_names(model):
        raise InputError(f'the model has an adapter "{name}" already; choose another name')


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
