"""LoRA adapters as files, in PEFT's format, both ways.

A folder with two files. `adapter_model.safetensors`: float32 tensors
`base_model.model.<module>.lora_A.weight` [r, in] and `....lora_B.weight` [out, r], for Conv1D too.
`adapter_config.json`: the keys that PEFT has had from its early versions on, so that old and new
ones read it without a warning. There is one adapter per folder, and its name is not in the files.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.durable import load_tensors, new_dir, save_tensors, write_json
from prefopt.errors import InputError
from prefopt.nn.lora import LoraConfig, LoraLinear, add_lora, lora_layers, lora_parameters
from prefopt.nn.lora_linear import is_conv1d
from prefopt.nn.targets import base_modules, match_targets

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# The keys of PEFT's configuration that load_adapter acts on, and those that change no result here.
# Whatever else is set (a bias, DoRA, patterns, modules_to_save, a later version's idea) is refused:
# what comes to be supported moves up from there.
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora"}
_READ |= {"init_lora_weights"}
_NO_EFFECT = {"auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "fan_in_fan_out"}
_NO_EFFECT |= {"inference_mode", "megatron_core", "peft_version", "qalora_group_size", "revision"}
_NO_EFFECT |= {"task_type"}
_UNSET = (None, False, "none", {}, [])
# Initialisations that leave the base weights alone; after PiSSA and others the base is another one.
_PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva")


def save_adapter(
    model: nn.Module,
    dir: str | os.PathLike[str],
    name: str = "default",
    base_model_name_or_path: str | None = None,
) -> None:
    """Writes adapter `name` to the folder `dir`, which appears whole or not at all.

    In an existing folder other files stay, and the adapter's two are replaced. InputError for an
    unknown adapter. The name of the base defaults to what the model says it was loaded from.
    """
    lora_parameters(model, name)  # an unknown name: InputError
    layers = {path: layer for path, layer in lora_layers(model) if name in layer.scaling}
    tensors = {}
    for path, layer in layers.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = layer.A[name].detach()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = layer.B[name].detach()
    if base_model_name_or_path is None:
        base_model_name_or_path = getattr(getattr(model, "config", None), "name_or_path", None)
    lora = next(iter(layers.values())).configs[name]
    config = {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name_or_path or None,
        "bias": "none",
        "fan_in_fan_out": any(layer.transposed for layer in layers.values()),
        "inference_mode": True,
        "init_lora_weights": True if lora.init == "kaiming" else lora.init,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.r,
        "rank_pattern": {},
        "revision": None,
        "target_modules": _target_modules(model, list(layers)),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": lora.use_rslora,
    }
    folder = Path(dir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder for the adapter")
    if folder.exists():
        # Without its configuration a half replaced adapter is refused, not taken for whole.
        (folder / CONFIG).unlink(missing_ok=True)
        _write(folder, config, tensors)
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_dir(folder) as tmp:
            _write(tmp, config, tensors)


def load_adapter(
    model: nn.Module,
    dir: str | os.PathLike[str],
    name: str = "default",
    strict: bool = True,
    trainable: bool = True,
) -> list[str]:
    """Loads the adapter in the folder `dir` as `name`, added to the model if it is not there.

    InputError, before the model is touched, for a missing or damaged file, a setting that is not
    supported, a tensor of another shape, and (strict) a missing or surplus tensor. With
    strict=False these two are returned, one line each; a missing tensor keeps what the model has.
    """
    folder = Path(dir)
    config = read_config(folder)
    tensors = load_tensors(folder / TENSORS)
    layers = {path: layer for path, layer in lora_layers(model) if name in layer.scaling}
    for path, layer in layers.items():
        if (layer.configs[name].r, layer.scaling[name]) != (config.r, config.scaling):
            raise InputError(
                f'{folder} has rank {config.r} and scale {config.scaling:g}, the adapter "{name}" '
                f"of the model {layer.configs[name].r} and {layer.scaling[name]:g} at {path}; "
                "load it under another name"
            )
    config = _only_matching(model, config)
    paths = list(layers) or match_targets(model, config.targets)[0]
    problems = _compare(tensors, _expected(model, paths, config.r), folder / TENSORS)
    if strict and problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise InputError(f"{folder} does not fit the model: {'; '.join(problems[:4])}{more}")
    if not layers:
        add_lora(model, config, name)
        layers = dict(lora_layers(model))
    with torch.no_grad():
        for path in paths:
            for letter, group in (("A", layers[path].A), ("B", layers[path].B)):
                if (tensor := tensors.get(f"{PREFIX}{path}.lora_{letter}.weight")) is not None:
                    group[name].copy_(tensor)
                group[name].requires_grad_(trainable)
    return problems


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
            init="gaussian" if init == "gaussian" else "kaiming",
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    save_tensors(folder / TENSORS, tensors, metadata={"format": "pt"})
    write_json(folder / CONFIG, config)


def _target_modules(model: nn.Module, adapted: list[str]) -> list[str]:
    """The last parts of the names where they select just these modules, else the full names."""
    leaves = {path.rpartition(".")[2] for path in adapted}
    selected = [path for path, _ in base_modules(model) if path.rpartition(".")[2] in leaves]
    return sorted(leaves if selected == adapted else adapted)


def _only_matching(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """PEFT allows names in the list that match nothing as long as one does; the tensors decide."""
    if isinstance(config.targets, str):
        return config
    paths = [path for path, _ in base_modules(model)]
    found = [t for t in config.targets if any(f".{path}".endswith(f".{t}") for path in paths)]
    return replace(config, targets=found or config.targets)


def _expected(model: nn.Module, paths: Iterable[str], r: int) -> dict[str, tuple[int, int]]:
    shapes = {}
    for path in paths:
        layer: Any = model.get_submodule(path)
        rows, columns = layer.weight.shape
        transposed = layer.transposed if isinstance(layer, LoraLinear) else is_conv1d(layer)
        out, width = (columns, rows) if transposed else (rows, columns)
        shapes[f"{PREFIX}{path}.lora_A.weight"] = (r, width)
        shapes[f"{PREFIX}{path}.lora_B.weight"] = (out, r)
    return shapes


def _compare(
    tensors: dict[str, Tensor], expected: dict[str, tuple[int, int]], file: Path
) -> list[str]:
    """What is missing and what is too much; InputError for a tensor that cannot be copied."""
    if not expected.keys() & tensors.keys():
        have, want = next(iter(tensors), "nothing"), next(iter(expected))
        raise InputError(f"{file} has no tensor for this model: it has {have}, not {want}")
    for key, shape in expected.items():
        tensor = tensors.get(key)
        if tensor is not None and (tensor.shape != shape or not tensor.is_floating_point()):
            have = f"{tensor.dtype} {list(tensor.shape)}"
            raise InputError(f"{file} has {key} as {have}, but the model needs {list(shape)}")
    missing = [f"{key} is missing" for key in expected if key not in tensors]
    return missing + [f"{key} is not in the model" for key in tensors if key not in expected]
