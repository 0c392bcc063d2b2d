"""adapter_config.json, PEFT's description of an adapter, from and to a LoraConfig."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from prefopt.errors import InputError
from prefopt.nn import heads
from prefopt.nn.adapted import Adapted, base_modules
from prefopt.nn.lora_config import LoraConfig, name_matches, pattern_matches
from prefopt.nn.lora_linear import LoraLinear
from prefopt.nn.saved_module import SavedModule
from prefopt.nn.targets import select

CONFIG = "adapter_config.json"

# The keys of PEFT's configuration that load_adapter acts on, and those that change no result here.
# Whatever else is set (a bias, single layers by number, a later version's idea) is refused.
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora"}
_READ |= {"init_lora_weights", "rank_pattern", "alpha_pattern", "modules_to_save"}
_READ |= {"exclude_modules"}
_NO_EFFECT = {"auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "fan_in_fan_out"}
_NO_EFFECT |= {"inference_mode", "megatron_core", "peft_version", "qalora_group_size", "revision"}
_NO_EFFECT |= {"task_type"}
_UNSET = (None, False, "none", {}, [])
# Initialisations that leave the base weights alone; after PiSSA and others the base is another one.
_PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva")


def read_config(folder: Path) -> LoraConfig:
    """The LoraConfig that the folder's adapter_config.json stands for."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} has no {CONFIG}; check the path") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}); save the adapter again") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise InputError(f'{path} does not describe a LoRA adapter ("peft_type": "LORA")')
    for key in ("r", "lora_alpha", "target_modules"):
        if config.get(key) is None:
            raise InputError(f"{path} does not say {key}; save the adapter again")
    for key, value in config.items():
        if key not in _READ | _NO_EFFECT and value not in _UNSET:
            raise InputError(f"{path} sets {key} to {value!r}, which is not supported yet")
    init = config.get("init_lora_weights")
    if init not in _PLAIN_INITS:
        raise InputError(
            f"{path} sets init_lora_weights to {init!r}, which changes the base weights and is not "
            "supported yet; convert the adapter to plain LoRA"
        )
    try:
        return LoraConfig(
            r=config["r"],
            alpha=config["lora_alpha"],
            dropout=config.get("lora_dropout", 0.0),
            targets=config["target_modules"],
            use_rslora=config.get("use_rslora", False),
            use_dora=config.get("use_dora", False),
            exclude=config.get("exclude_modules") or [],
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
            modules_to_save=config.get("modules_to_save") or [],
            init="gaussian" if init == "gaussian" else "kaiming",
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def config_dict(model: nn.Module, modules: dict[str, Adapted], name: str) -> dict[str, Any]:
    """adapter_config.json, but for the name of the base."""
    lora = next(iter(modules.values())).configs[name]
    saved = [path for path, module in modules.items() if isinstance(module, SavedModule)]
    adapted = [path for path in modules if path not in saved]
    twice = (1, 1)
    if lora.init == "pissa":  # the rank doubles, and the scale stays
        twice = (2, math.sqrt(2) if lora.use_rslora else 2)
    transposed = (m.transposed for m in modules.values() if isinstance(m, LoraLinear))
    config = {
        "alpha_pattern": {k: _whole(v * twice[1]) for k, v in lora.alpha_pattern.items()},
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": any(transposed),
        "inference_mode": True,
        "init_lora_weights": "gaussian" if lora.init == "gaussian" else True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": _whole(lora.alpha * twice[1]),
        "lora_dropout": lora.dropout,
        "modules_to_save": _names(model, saved, _peft_saves) or None,
        "peft_type": "LORA",
        "r": lora.r * twice[0],
        "rank_pattern": {k: v * twice[0] for k, v in lora.rank_pattern.items()},
        "revision": None,
        "target_modules": _names(model, adapted, _selects(lora.exclude, saved)),
        "task_type": "SEQ_CLS" if hasattr(model, heads.SCORE) else "CAUSAL_LM",
        "use_dora": lora.use_dora,
        "use_rslora": lora.use_rslora,
    }
    exclude = _in_use(lora.exclude, _named(model, config["target_modules"]))
    if exclude:  # not a key of PEFT's early versions
        config["exclude_modules"] = exclude
    return config


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


def _names(model: nn.Module, chosen: list[str], rule: Callable[[str, str], bool]) -> list[str]:
    """The last parts of the names where they select just these modules, else the full names."""
    leaves = {path.rpartition(".")[2] for path in chosen}
    paths = [path for path, _ in base_modules(model)]
    selected = [path for path in paths if any(rule(leaf, path) for leaf in leaves)]
    return sorted(leaves if selected == chosen else chosen)


def _named(model: nn.Module, names: list[str]) -> list[str]:
    return [path for path, _ in base_modules(model) if name_matches(names, path)]


def _in_use(exclude: str | list[str], paths: list[str]) -> Any:
    """Those that keep one of these modules out."""
    if isinstance(exclude, str):
        return exclude if any(name_matches(exclude, path) for path in paths) else []
    return [entry for entry in exclude if any(name_matches([entry], path) for path in paths)]


def _peft_saves(entry: str, path: str) -> bool:
    return path.endswith(entry)  # for modules_to_save, PEFT does not ask for a dot before it


def _selects(exclude: str | list[str], saved: list[str]) -> Callable[[str, str], bool]:
    def rule(entry: str, path: str) -> bool:
        out = name_matches(exclude, path) if exclude else False
        inside = any(f"{path}.".startswith(f"{module}.") for module in saved)
        return name_matches([entry], path) and not out and not inside

    return rule


def only_matching(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """PEFT allows entries that match nothing; the tensors decide what fits and what does not."""
    paths = [path for path, _ in base_modules(model)]
    saved = [path for path in paths if any(_peft_saves(m, path) for m in config.modules_to_save)]
    config = replace(config, modules_to_save=saved or config.modules_to_save)
    if not isinstance(config.targets, str):
        found = [t for t in config.targets if any(name_matches([t], path) for path in paths)]
        config = replace(config, targets=found or config.targets)
    plain = select(model, replace(config, exclude=[], rank_pattern={}, alpha_pattern={}))
    used = _in_use(config.exclude, plain.lora)
    left = [path for path in plain.lora if not (used and name_matches(used, path))]
    patterns = {
        setting: {
            key: value
            for key, value in getattr(config, setting).items()
            if any(pattern_matches(key, path) for path in left)
        }
        for setting in ("rank_pattern", "alpha_pattern")
    }
    return replace(config, exclude=used, **patterns)
