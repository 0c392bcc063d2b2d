"""Which layers of a model an adapter goes to, and why not to the others."""

import re
from collections import defaultdict
from collections.abc import Iterator
from difflib import get_close_matches

from torch import Tensor, nn

from prefopt.errors import InputError
from prefopt.nn.lora_linear import ALL_LINEAR, LoraLinear, is_conv1d


def match_targets(model: nn.Module, targets: str | list[str]) -> tuple[list[str], dict[str, str]]:
    """The modules that `targets` (see LoraConfig) selects, and those left out with the reason.

    Names in the order of the model. InputError for a pattern without a match, and for a match with
    weights that cannot be adapted: not linear, quantised, or shared with another module.
    """
    modules = dict(base_modules(model))
    chosen = _all_linear(modules) if targets == ALL_LINEAR else _matches(modules, targets)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    shared = _shared_weights(model)
    names: list[str] = []
    skipped: dict[str, str] = {}
    for name in chosen:
        module = modules[name]
        reason = why_not_linear(module)
        if reason is None and name in shared:
            reason = f"it shares its weight with {shared[name]}"
        if targets == ALL_LINEAR and module is head:
            reason = "it is the output embedding"
        if reason is None:
            names.append(name)
        elif targets == ALL_LINEAR or next(module.parameters(recurse=False), None) is None:
            # The latter is a container or a dropout that a regex happened to match.
            skipped[name] = reason
        else:
            raise InputError(f"LoRA cannot adapt {name}: {reason}; take it out of lora.targets")
    if not names:
        raise InputError(f"lora.targets {targets!r} matches no linear layer; {_known(modules)}")
    return names, skipped


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """named_modules() without the model itself and without the inside of adapted layers."""
    inside = None
    for name, module in model.named_modules():
        if name and not (inside and name.startswith(inside)):
            inside = f"{name}." if isinstance(module, LoraLinear) else None
            yield name, module


def why_not_linear(module: nn.Module) -> str | None:
    """None for a linear layer that can be adapted (or is), else the reason."""
    if isinstance(module, LoraLinear):
        return None
    kind = type(module).__name__
    if not isinstance(module, nn.Linear) and not is_conv1d(module):
        return f"a module of class {kind} is not a linear layer"
    weight = module.weight
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        return f"its weight is quantised ({kind})"
    return None


def _all_linear(modules: dict[str, nn.Module]) -> list[str]:
    return [name for name, module in modules.items() if why_not_linear(module) is None]


def _matches(modules: dict[str, nn.Module], targets: str | list[str]) -> list[str]:
    if isinstance(targets, str):
        pattern = re.compile(targets)
        return [name for name in modules if pattern.fullmatch(name)]
    chosen: set[str] = set()
    for target in targets:
        found = [name for name in modules if name == target or name.endswith(f".{target}")]
        if not found:
            raise InputError(f'LoRA target "{target}" matches no module; {_known(modules, target)}')
        chosen.update(found)
    return [name for name in modules if name in chosen]


def _known(modules: dict[str, nn.Module], target: str = "") -> str:
    """What could have been meant: the nearest name first, then all."""
    leaves = sorted({name.rpartition(".")[2] for name in _all_linear(modules)})
    near = get_close_matches(target, leaves, n=1)
    guess = f'did you mean "{near[0]}"? ' if near else ""
    return f"{guess}the model's linear layers are {', '.join(leaves) or 'none'}"


def _shared_weights(model: nn.Module) -> dict[str, str]:
    """Module name -> the name of another module with the very same weight."""
    owners: defaultdict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        if weight is not None:
            owners[id(weight)].append(name)
    return {
        name: names[1] if name == names[0] else names[0]
        for names in owners.values()
        if len(names) > 1
        for name in names
    }
