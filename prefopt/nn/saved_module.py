"""A module that is trained in full beside the adapters and stored with them (modules_to_save)."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from prefopt.nn.adapted import Adapted, keep_dtypes
from prefopt.nn.lora_config import LoraConfig


class SavedModule(Adapted):
    """A frozen module and, for each adapter, a float32 master copy of it.

    With an adapter on, the base computes with the copy's values, rounded to its own dtype: so the
    start is bitwise the base, and small steps are not lost. `weight` and the other parameters that
    model code asks for are those that would compute, with their gradient.
    """

    def __init__(self, base: nn.Module, active: str | None = None) -> None:
        super().__init__(base, active)
        self.copies = _Copies()

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name not in modules and "copies" in modules:
            adapter, own = self.on, modules["base"]._parameters.get(name)
            if adapter is not None and own is not None:
                return modules["copies"][adapter].get_parameter(name).to(own.dtype)
        return super().__getattr__(name)

    def add(self, name: str, config: LoraConfig, path: str = "") -> None:
        """Adds adapter `name`, equal to the base."""
        master = copy.deepcopy(self.base)
        for p in master.parameters():
            p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))
            p.requires_grad_(True)
        self.copies[name] = master
        self.configs[name] = config

    def _copy_tensors(self, src: str, dst: str) -> None:
        self.copies[dst] = copy.deepcopy(self.copies[src]).requires_grad_(False)

    def parts(self, name: str) -> dict[str, nn.Parameter]:
        return dict(self.copies[name].named_parameters())

    def part_name(self, part: str, name: str) -> str:
        return f"copies.{name}.{part}"

    def is_zero(self, name: str) -> bool:
        own = dict(self.base.named_parameters())
        return all(torch.equal(t, own[key]) for key, t in self.merged_state(name).items())

    @torch.no_grad()
    def merged_state(self, name: str) -> dict[str, Tensor]:
        """The copy's parameters in the dtypes of the base's, which they take the place of."""
        own = dict(self.base.named_parameters())
        return {key: p.to(own[key].dtype) for key, p in self.parts(name).items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        name = self.on
        if name is None:
            return self.base(*args, **kwargs)
        own = dict(self.base.named_parameters())
        values = {key: p.to(own[key].dtype) for key, p in self.parts(name).items()}
        return functional_call(self.base, values, args, kwargs, tie_weights=False)


class _Copies(nn.ModuleDict):
    """Modules that follow the model to a device, but not to another dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return keep_dtypes(self, lambda: super(_Copies, self)._apply(fn, recurse))


def why_not_saved(module: nn.Module) -> str | None:
    """None for a module that can be trained in full, else the reason."""
    parameters = dict(module.named_parameters())
    if not parameters:
        return f"a module of class {type(module).__name__} has no weights"
    if any(isinstance(inner, Adapted) for inner in module.modules()):
        return "an adapter is on it already"
    if not all(p.is_floating_point() for p in parameters.values()):
        return "its weights are quantised"
    return None
