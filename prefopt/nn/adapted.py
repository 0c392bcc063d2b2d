"""What all adapted modules share: a frozen base, adapters by name, one of them active."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from prefopt.errors import InputError
from prefopt.nn.lora_config import LoraConfig


class Adapted(nn.Module):
    """A frozen module and its adapters. A subclass says what an adapter adds to it.

    `active` None, or a name this module does not have: exactly the base. `merged`: the adapter
    whose effect the weights of the base hold already; then too it is the base that computes.
    """

    base: Any
    unmerged: nn.Module | None

    def __init__(self, base: nn.Module, active: str | None = None) -> None:
        super().__init__()
        self.base = base
        self.configs: dict[str, LoraConfig] = {}
        self.scaling: dict[str, float] = {}  # s of those with low-rank factors
        self.active = active
        self.merged: str | None = None
        self.register_module("unmerged", None)  # the base before a merge
        self.train(base.training)  # an adapter added to a model in evaluation drops nothing

    def __getattr__(self, name: str) -> Any:
        # Model code may ask a layer for its weight, its bias, its width.
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base")
            if base is None:
                raise
            return getattr(base, name)

    @property
    def names(self) -> list[str]:
        """The adapters of this module, oldest first."""
        return list(self.configs)

    @property
    def on(self) -> str | None:
        """The adapter that computes now; None: the base alone."""
        return self.active if self.merged is None and self.active in self.configs else None

    def add(self, name: str, config: LoraConfig, path: str = "") -> None:
        """Adds adapter `name`; `path` is the name of this module, for the patterns of `config`."""
        raise NotImplementedError

    def parts(self, name: str) -> dict[str, nn.Parameter]:
        """The trained tensors of adapter `name`, by their short names."""
        raise NotImplementedError

    def part_name(self, part: str, name: str) -> str:
        """The name among named_parameters() of what parts(name)[part] is."""
        return f"{part}.{name}"

    def is_zero(self, name: str) -> bool:
        """Whether the module with adapter `name` is the base, bit for bit."""
        raise NotImplementedError

    def copy(self, src: str, dst: str) -> None:
        """Adds `dst`, a frozen copy of `src` without dropout."""
        self._copy_tensors(src, dst)
        self.configs[dst] = replace(self.configs[src], dropout=0.0)

    def remove(self, name: str) -> None:
        """Takes adapter `name` off, if it is there."""
        self.configs.pop(name, None)
        self.scaling.pop(name, None)
        for group in self.children():
            if isinstance(group, Masters | nn.ModuleDict) and group is not self.base:
                if name in group:
                    del group[name]

    def _copy_tensors(self, src: str, dst: str) -> None:
        if src in self.scaling:
            self.scaling[dst] = self.scaling[src]
        for group in self.children():
            if isinstance(group, Masters) and src in group:
                group.put(dst, group[src].detach().clone(), trainable=False)

    def refuse_trainable_base(self) -> None:
        """No gradient is computed for what is under an adapter; InputError if one is asked for."""
        if any(p.requires_grad for p in self.base._parameters.values() if p is not None):
            raise InputError(
                "a layer under a LoRA is trainable, but no gradient is computed for it; "
                "freeze its weight and bias, or train the model in full"
            )


class Masters(nn.ParameterDict):
    """Parameters that follow the model to a device, but not to another dtype."""

    def put(self, name: str, tensor: Tensor, *, trainable: bool) -> None:
        """Adds or replaces one."""
        self[name] = nn.Parameter(tensor, requires_grad=trainable)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return keep_dtypes(self, lambda: super(Masters, self)._apply(fn, recurse))


def keep_dtypes(module: nn.Module, apply: Callable[[], object]) -> Any:
    """Runs `apply` (behind .to(), .half(), ...) and undoes what it did to dtypes, bit for bit."""
    before = [
        (p, p.data, None if p.grad is None else p.grad.data)
        for p in module.parameters()
        if p.is_floating_point()
    ]
    apply()
    for p, data, grad in before:
        if p.dtype != data.dtype:
            p.grad = None
            p.data = data.to(p.device)
            p.grad = None if grad is None else grad.to(p.device)
    return module


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """named_modules() without the model itself and without the inside of adapted modules."""
    inside = None
    for name, module in model.named_modules():
        if name and not (inside and name.startswith(inside)):
            inside = f"{name}." if isinstance(module, Adapted) else None
            yield name, module


def adapted_modules(model: nn.Module) -> list[tuple[str, Adapted]]:
    """(module name, module) of all that carries an adapter, in the order of the model."""
    return [(name, m) for name, m in base_modules(model) if isinstance(m, Adapted)]
