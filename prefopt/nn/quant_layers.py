"""Which layers of a model are quantised, and why the others are not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.errors import InputError
from prefopt.nn.adapted import Adapted
from prefopt.nn.heads import SCORE
from prefopt.nn.linear import CpuLinear
from prefopt.nn.lora_linear import is_conv1d
from prefopt.nn.nf4_linear import NF4Linear

PLAIN = (nn.Linear, CpuLinear)
HEAD = "lm_head"  # in `skip` it stands for the output embedding whatever its name


def choose_layers(model: Any, skip: Sequence[str]) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """The layers to quantise, and what is left alone with the reason."""
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    kept = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    owners = _owners(model)
    chosen: dict[str, nn.Linear] = {}
    skipped: dict[str, str] = {}
    used: set[str] = set()
    for name, module in model.named_modules():
        _refuse(name, module)
        entry = next((s for s in skip if _covers(s, name)), None)
        if entry is None and module is head and HEAD in skip:
            entry = HEAD
        if entry is not None:
            used.add(entry)
        reason = _why_not(module)
        if type(module) in PLAIN:
            others = owners[id(module.weight)]
            if module is head and entry is not None:
                reason = "the output embedding"
            elif entry is not None:
                reason = f"{entry} is in skip"
            elif len(others) > 1:
                reason = f"tied to {next(o for o in others if o != f'{name}.weight')}"
            elif any(_covers(pattern, name) for pattern in kept):
                reason = "the model keeps it in float32"
            elif name == SCORE:
                reason = "the head of a reward model"
            if reason is None:
                chosen[name] = module
        if reason is not None:
            skipped[name] = reason
    unused = [s for s in skip if s not in used and s != HEAD]
    if unused:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in chosen}))
        raise InputError(f'skip has "{unused[0]}", which is no module; linear layers are {known}')
    if not chosen:
        left = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise InputError(f"the model has no linear layer to quantise ({left or 'none at all'})")
    return chosen, skipped


def _covers(entry: str, name: str) -> bool:
    return (
        name == entry
        or name.endswith(f".{entry}")
        or name.startswith(f"{entry}.")
        or (f".{entry}." in name)
    )


def _why_not(module: nn.Module) -> str | None:
    """Why a module with a matrix is not quantised; None for what can be, and for all the rest."""
    if is_conv1d(module):
        return "a Conv1D, whose weight is stored the other way round"
    if isinstance(module, nn.Linear) and type(module) not in PLAIN:
        return f"a {type(module).__name__}, which may compute more than a linear layer"
    if any(p is not None and p.dim() == 3 for p in module._parameters.values()):
        if not isinstance(module, nn.modules.conv._ConvNd):
            return "a 3-D weight (experts in one tensor)"
    return None


def _refuse(name: str, module: nn.Module) -> None:
    if isinstance(module, Adapted):
        raise InputError(f"{name} has an adapter; quantise the base model, then add adapters")
    weight = module._parameters.get("weight")
    quantised = isinstance(weight, Tensor) and not weight.is_floating_point()
    quantised |= hasattr(weight, "quant_state")  # of bitsandbytes, whose type may be a float
    if isinstance(module, NF4Linear) or (isinstance(module, nn.Linear) and quantised):
        raise InputError(
            f"{name} is quantised already ({type(module).__name__}); load the original"
        )


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """id of a parameter -> all its names."""
    owners: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name)
    return owners


def check_finite(name: str, weight: Tensor) -> None:
    low, high = torch.aminmax(weight.detach())
    if not bool(low.float().isfinite() & high.float().isfinite()):
        bad = weight.numel() - int(weight.detach().float().isfinite().sum())
        raise InputError(
            f"{name}.weight has {bad} NaN or infinite values; repair the checkpoint before it is "
            "quantised"
        )
