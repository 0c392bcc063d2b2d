"""LoRA adapters as files, in PEFT's format, both ways.

A folder with two files. `adapter_model.safetensors`: tensors `base_model.model.<module>.<what>`,

    linear, Conv1D too   lora_A.weight [r, in]    lora_B.weight [out, r]    float32
    with DoRA            lora_magnitude_vector [out]
    embedding            lora_embedding_A [r, vocabulary]    lora_embedding_B [dim, r]
    modules_to_save      the module's own names, in the dtype of the base

`adapter_config.json`: the keys that PEFT has had from its early versions on, so that old and new
ones read it without a warning. There is one adapter per folder, and its name is not in the files.
A PiSSA adapter is stored as plain LoRA of twice the rank, which is right on the original base.
"""

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.durable import load_tensors, new_dir, save_tensors, write_json
from prefopt.errors import InputError
from prefopt.nn import pissa
from prefopt.nn.adapted import Adapted, adapted_modules, base_modules
from prefopt.nn.lora import LoraConfig, add_lora, require
from prefopt.nn.lora_config import name_matches, pattern_matches
from prefopt.nn.lora_embedding import LoraEmbedding
from prefopt.nn.lora_linear import LoraLinear, dense_shape
from prefopt.nn.saved_module import SavedModule
from prefopt.nn.targets import select

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
LINEAR = {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"}
EMBEDDING = {"A": "lora_embedding_A", "B": "lora_embedding_B"}

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
    modules = dict(require(model, name))
    if not any(isinstance(module, LoraLinear | LoraEmbedding) for module in modules.values()):
        raise InputError(f'adapter "{name}" has no low-rank part, which a PEFT adapter must have')
    tensors = {
        f"{PREFIX}{path}.{key}": tensor
        for path, module in modules.items()
        for key, tensor in _stored(module, name).items()
    }
    if base_model_name_or_path is None:
        base_model_name_or_path = getattr(getattr(model, "config", None), "name_or_path", None)
    config = _config(model, modules, name) | {
        "base_model_name_or_path": base_model_name_or_path or None
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
    config = _only_matching(model, read_config(folder))
    tensors = load_tensors(folder / TENSORS)
    modules = {path: m for path, m in adapted_modules(model) if name in m.names}
    if modules:
        _check_same(modules, config, name, folder)
        paths = list(modules)
    else:
        selection = select(model, config)
        paths = [*selection.lora, *selection.saved]
    problems = _compare(model, tensors, _expected(model, paths, config), folder / TENSORS)
    if strict and problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise InputError(f"{folder} does not fit the model: {'; '.join(problems[:4])}{more}")
    if not modules:
        add_lora(model, config, name)
    with torch.no_grad():
        for path, module in require(model, name):
            keys = _keys(module, config)
            for part, parameter in module.parts(name).items():
                if (tensor := tensors.get(f"{PREFIX}{path}.{keys[part]}")) is not None:
                    parameter.copy_(tensor)
                parameter.requires_grad_(trainable)
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
            use_dora=config.get("use_dora", False),
            exclude=config.get("exclude_modules") or [],
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
            modules_to_save=config.get("modules_to_save") or [],
            init="gaussian" if init == "gaussian" else "kaiming",
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    save_tensors(folder / TENSORS, tensors, metadata={"format": "pt"})
    write_json(folder / CONFIG, config)


def _stored(module: Adapted, name: str) -> dict[str, Tensor]:
    """The tensors of a module's adapter as the file has them."""
    if isinstance(module, SavedModule):
        return dict(module.base.state_dict()) | module.merged_state(name)
    parts: dict[str, Tensor] = {part: p.detach() for part, p in module.parts(name).items()}
    if isinstance(module, LoraLinear) and name in module.A0:
        start = module.A0[name].detach(), module.B0[name].detach()
        parts["A"], parts["B"] = pissa.exported(parts["A"], parts["B"], *start)
    elif module.configs[name].init == "pissa":  # an embedding: of twice the rank like the others
        zero = (torch.zeros_like(parts[part]) for part in ("A", "B"))
        parts["A"], parts["B"] = pissa.exported(parts["A"], parts["B"], *zero)
    keys = _keys(module, module.configs[name])
    return {keys[part]: tensor for part, tensor in parts.items()}


def _keys(module: nn.Module, config: LoraConfig) -> dict[str, str]:
    """Short name of each trained tensor (see Adapted.parts) -> its name in the file."""
    if isinstance(module, LoraEmbedding | nn.Embedding):
        return EMBEDDING
    if isinstance(module, SavedModule):
        return {key: key for key, _ in module.base.named_parameters()}
    return LINEAR if config.use_dora else {part: LINEAR[part] for part in ("A", "B")}


def _config(model: nn.Module, modules: dict[str, Adapted], name: str) -> dict[str, Any]:
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
        "task_type": "CAUSAL_LM",
        "use_dora": lora.use_dora,
        "use_rslora": lora.use_rslora,
    }
    if lora.exclude:  # not a key of PEFT's early versions
        config["exclude_modules"] = lora.exclude
    return config


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


def _names(model: nn.Module, chosen: list[str], rule: Callable[[str, str], bool]) -> list[str]:
    """The last parts of the names where they select just these modules, else the full names."""
    leaves = {path.rpartition(".")[2] for path in chosen}
    paths = [path for path, _ in base_modules(model)]
    selected = [path for path in paths if any(rule(leaf, path) for leaf in leaves)]
    return sorted(leaves if selected == chosen else chosen)


def _peft_saves(entry: str, path: str) -> bool:
    return path.endswith(entry)  # for modules_to_save, PEFT does not ask for a dot before it


def _selects(exclude: str | list[str], saved: list[str]) -> Callable[[str, str], bool]:
    def rule(entry: str, path: str) -> bool:
        out = name_matches(exclude, path) if exclude else False
        inside = any(f"{path}.".startswith(f"{module}.") for module in saved)
        return name_matches([entry], path) and not out and not inside

    return rule


def _only_matching(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """PEFT allows entries that match nothing; the tensors decide what fits and what does not."""
    paths = [path for path, _ in base_modules(model)]
    saved = [path for path in paths if any(_peft_saves(m, path) for m in config.modules_to_save)]
    config = replace(config, modules_to_save=saved or config.modules_to_save)
    if not isinstance(config.targets, str):
        found = [t for t in config.targets if any(name_matches([t], path) for path in paths)]
        config = replace(config, targets=found or config.targets)
    plain = select(model, replace(config, exclude=[], rank_pattern={}, alpha_pattern={}))
    used: Any = config.exclude
    if isinstance(used, str):
        used = used if any(name_matches(used, path) for path in plain.lora) else []
    else:
        used = [e for e in used if any(name_matches([e], path) for path in plain.lora)]
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


def _check_same(modules: dict[str, Adapted], config: LoraConfig, name: str, folder: Path) -> None:
    """The adapter that is there must compute as the one in the folder does."""
    for path, module in modules.items():
        if not isinstance(module, LoraLinear | LoraEmbedding):
            continue
        have = module.factors(name)[0].shape[0] if isinstance(module, LoraLinear) else None
        have, scale = have or module.A[name].shape[0], module.scaling[name]
        if (have, scale) != (config.rank(path), config.scale(path)):
            raise InputError(
                f"{folder} has rank {config.rank(path)} and scale {config.scale(path):g}, the "
                f'adapter "{name}" of the model {have} and {scale:g} at {path}; '
                "load it under another name"
            )


def _expected(
    model: nn.Module, paths: Iterable[str], config: LoraConfig
) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors that the file must have."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        module: Any = model.get_submodule(path)
        base = module.base if isinstance(module, Adapted) else module
        if path in config.modules_to_save or isinstance(module, SavedModule):
            own = {key: tuple(p.shape) for key, p in base.named_parameters()}
        else:
            r = config.rank(path)
            if isinstance(base, nn.Embedding):
                width, out = base.weight.shape
            else:
                out, width = dense_shape(base)
            all_shapes = {"A": (r, width), "B": (out, r), "m": (out,)}
            own = {key: all_shapes[part] for part, key in _keys(base, config).items()}
        shapes |= {f"{PREFIX}{path}.{key}": shape for key, shape in own.items()}
    return shapes


def _compare(
    model: nn.Module,
    tensors: dict[str, Tensor],
    expected: dict[str, tuple[int, ...]],
    file: Path,
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
    problems = [f"{key} is missing" for key in expected if key not in tensors]
    for key in tensors:
        if key in expected:
            continue
        own = _of_the_base(model, key)
        if own is None:
            problems.append(f"{key} is not in the model")
        elif own.shape != tensors[key].shape or not torch.equal(tensors[key].to(own), own):
            problems.append(f"{key} is not what the model has")
    return problems


def _of_the_base(model: nn.Module, key: str) -> Tensor | None:
    """The tensor of the base that a surplus one is a copy of: PEFT stores embeddings like that."""
    path, _, leaf = key.removeprefix(PREFIX).replace(".base_layer.", ".").rpartition(".")
    module = dict(base_modules(model)).get(path)
    module = module.base if isinstance(module, Adapted) else module
    return None if module is None else {**module._parameters, **module._buffers}.get(leaf)
