"""Adapters on a model: adding, switching, copying. What each kind does: lora_linear.py,
lora_embedding.py, saved_module.py; into the weights and out again: merge.py."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from prefopt.errors import InputError
from prefopt.nn.adapted import Adapted, adapted_modules, base_modules
from prefopt.nn.lora_config import LoraConfig
from prefopt.nn.lora_embedding import LoraEmbedding
from prefopt.nn.lora_linear import LoraLinear, dense_shape
from prefopt.nn.nf4_linear import NF4Linear
from prefopt.nn.saved_module import SavedModule
from prefopt.nn.targets import select, why_not_linear

__all__ = [
    "LoraConfig",
    "LoraLinear",
    "LoraReport",
    "adapted_modules",
    "adapter_names",
    "adapters",
    "add_lora",
    "all_parameters",
    "copy_adapter",
    "has_adapter",
    "is_zero_adapter",
    "lora_layers",
    "lora_parameters",
    "lora_plus_groups",
    "switched",
    "unload_lora",
]


@dataclass(frozen=True)
class LoraReport:
    """What add_lora did. `coverage`: the adapted share of the weights of all linear layers."""

    name: str
    adapted: list[str]
    saved: list[str]  # trained in full
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
        if self.saved:
            lines.insert(1, f"trained in full: {_some(self.saved)}")
        for reason in dict.fromkeys(self.skipped.values()):
            names = [name for name, why in self.skipped.items() if why == reason]
            lines.append(f"left out: {_some(names)} ({reason})")
        return lines


def add_lora(model: nn.Module, config: LoraConfig, name: str = "default") -> LoraReport:
    """Wraps the selected modules of `model` in place and adds adapter `name` to each.

    The first adapter freezes the whole base and becomes active; a further one is added beside it,
    inactive (see `adapters`). InputError, before anything is changed: a name in use, a setting that
    matches nothing, a match that cannot be adapted (a head tied to the embedding, a norm).
    """
    _check_new_name(model, name)
    selection = select(model, config)
    wrapped = dict(adapted_modules(model))
    active = next((module.active for module in wrapped.values()), name)
    new: dict[str, Adapted] = {}
    try:
        for path in (*selection.lora, *selection.saved):
            if path not in wrapped:
                base: Any = model.get_submodule(path)
                kind: Any = LoraEmbedding if isinstance(base, nn.Embedding) else LoraLinear
                new[path] = (SavedModule if path in selection.saved else kind)(base, active)
            (wrapped.get(path) or new[path]).add(name, config, path)
    except BaseException:
        for module in wrapped.values():
            module.remove(name)
        raise
    if not wrapped:
        model.requires_grad_(False)
    for path, module in new.items():
        _replace(model, path, module)
    plain = {p: m.base if isinstance(m, SavedModule) else m for p, m in base_modules(model)}
    linear = {path: m for path, m in plain.items() if why_not_linear(m) is None}
    sizes = {path: math.prod(dense_shape(module)) for path, module in linear.items()}
    adapted = sum(sizes.get(path, 0) for path in (*selection.lora, *selection.saved))
    return LoraReport(
        name=name,
        adapted=selection.lora,
        saved=selection.saved,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=_parameters(model),
        coverage=adapted / (sum(sizes.values()) or 1),
        skipped=selection.skipped,
    )


@contextmanager
def adapters(model: nn.Module, name: str | None) -> Iterator[list[Adapted]]:
    """Inside, adapter `name` is active (None: the base alone); afterwards what was before.

    May be nested, and changes nothing else. A layer without adapter `name` computes its base.
    Backward does not need the context, except under gradient checkpointing, which runs forward
    again: there, call it inside, or run the repetition in `switched` with the modules it yields.
    """
    if name is not None:
        require(model, name)
    modules = [module for _, module in adapted_modules(model)]
    for module in modules:
        if module.merged not in (None, name):
            raise InputError(f'adapter "{module.merged}" is merged into the base; unmerge it first')
    with switched(modules, name):
        yield modules


@contextmanager
def switched(modules: list[Adapted], name: str | None) -> Iterator[None]:
    """Inside, adapter `name` is active in these modules."""
    before = [module.active for module in modules]
    try:
        for module in modules:
            module.active = name
        yield
    finally:
        for module, active in zip(modules, before, strict=True):
            module.active = active


def lora_layers(model: nn.Module) -> list[tuple[str, LoraLinear]]:
    """(module name, layer) of every adapted linear layer, in the order of the model."""
    return [(name, m) for name, m in adapted_modules(model) if isinstance(m, LoraLinear)]


def adapter_names(model: nn.Module) -> list[str]:
    """The adapters of the model, oldest first."""
    return list(dict.fromkeys(name for _, m in adapted_modules(model) for name in m.names))


def has_adapter(model: nn.Module) -> bool:
    """Whether any module of the model is adapted."""
    return any(isinstance(module, Adapted) for module in model.modules())


def lora_parameters(model: nn.Module, name: str = "default") -> list[tuple[str, nn.Parameter]]:
    """(full parameter name, parameter) of all that adapter `name` trains, in the model's order."""
    return [
        (f"{path}.{module.part_name(part, name)}", parameter)
        for path, module in require(model, name)
        for part, parameter in module.parts(name).items()
    ]


def all_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """Those that adapter `name` trains, and where PiSSA started."""
    modules = [module for _, module in require(model, name)]
    starts = [p for m in modules if isinstance(m, LoraLinear) for p in m.starts(name)]
    return [p for _, p in lora_parameters(model, name)] + starts


def lora_plus_groups(model: nn.Module, name: str, lr: float, ratio: float) -> list[dict[str, Any]]:
    """Parameter groups of LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B of linear layers learns
    `ratio` times as fast. Each group in the order of the model; no group is empty."""
    groups: list[dict[str, Any]] = [{"params": [], "lr": lr}, {"params": [], "lr": lr * ratio}]
    for _, module in require(model, name):
        for part, parameter in module.parts(name).items():
            if parameter.requires_grad:
                fast = part == "B" and isinstance(module, LoraLinear)
                groups[fast]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def is_zero_adapter(model: nn.Module, name: str = "default") -> bool:
    """True when the adapted model is the base, bit for bit, as a fresh adapter leaves it."""
    return all(module.is_zero(name) for _, module in require(model, name))


def copy_adapter(model: nn.Module, src: str, dst: str) -> None:
    """Adds `dst`, a frozen copy of `src` without dropout and inactive.

    It is the reference of a run whose adapter does not start at 0.
    """
    modules = require(model, src)
    _check_new_name(model, dst)
    for _, module in modules:
        module.copy(src, dst)


def unload_lora(model: nn.Module) -> None:
    """Puts the base layers back in place: with what is merged into them, without the adapters."""
    for path, module in adapted_modules(model):
        _replace(model, path, module.base)


def require(model: nn.Module, name: str) -> list[tuple[str, Adapted]]:
    """The modules that have adapter `name`; InputError when there are none."""
    modules = [(path, module) for path, module in adapted_modules(model) if name in module.names]
    if not modules:
        known = ", ".join(adapter_names(model)) or "none"
        raise InputError(f'the model has no adapter "{name}"; it has: {known}')
    return modules


def _check_new_name(model: nn.Module, name: str) -> None:
    # It becomes part of parameter names, and an attribute of a ParameterDict.
    if (
        not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name)
        or hasattr(nn.ModuleDict(), name)
        or hasattr(nn.ParameterDict(), name)
    ):
        raise InputError(f'"{name}" cannot name an adapter; use letters, digits, "_" and "-"')
    if name in adapter_names(model):
        raise InputError(f'the model has an adapter "{name}" already; choose another name')


def _parameters(model: nn.Module) -> int:
    """Their number; a weight in 4 bits counts as many as it stands for."""
    total = sum(p.numel() for p in model.parameters())
    for module in model.modules():
        if isinstance(module, NF4Linear):
            stored = module.weight.numel() + module.scales.numel()
            total += math.prod(dense_shape(module)) - stored
    return total


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
