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

import os
from collections.abc import Iterable
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
from prefopt.nn.lora_embedding import LoraEmbedding
from prefopt.nn.lora_linear import LoraLinear, dense_shape
from prefopt.nn.peft_config import CONFIG, config_dict, only_matching, read_config
from prefopt.nn.saved_module import SavedModule
from prefopt.nn.targets import select

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
LINEAR = {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"}
EMBEDDING = {"A": "lora_embedding_A", "B": "lora_embedding_B"}


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
    config = config_dict(model, modules, name) | {
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
    without: str | None = None,
) -> list[str]:
    """Loads the adapter in the folder `dir` as `name`, added to the model if it is not there.

    InputError, before the model is touched, for a missing or damaged file, a setting that is not
    supported, a tensor of another shape, and (strict) a missing or surplus tensor. With
    strict=False these two are returned, one line each; a missing tensor keeps what the model has.
    `without` names a module that was stored with the adapter and is left out: the head of another
    kind of model on the same base.
    """
    folder = Path(dir)
    config, tensors = read_config(folder), load_tensors(folder / TENSORS)
    if without is not None:
        tensors = {k: t for k, t in tensors.items() if not k.startswith(f"{PREFIX}{without}.")}
        # PEFT names both "classifier" and "score", whichever the model has.
        kept = [
            entry for entry in config.modules_to_save if any(f".{entry}." in k for k in tensors)
        ]
        config = replace(config, modules_to_save=kept)
    config = only_matching(model, config)
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


def _check_same(modules: dict[str, Adapted], config: LoraConfig, name: str, folder: Path) -> None:
    """The adapter that is there must compute as the one in the folder does."""
    for path, module in modules.items():
        if not isinstance(module, LoraLinear | LoraEmbedding):
            continue
        if isinstance(module, LoraLinear) and name in module.A0:
            raise InputError(
                f'the adapter "{name}" of the model is PiSSA, which {folder} holds as plain LoRA; '
                "load it under another name"
            )
        if isinstance(module, LoraLinear) and (name in module.m) != config.use_dora:
            raise InputError(
                f'only one of {folder} and the adapter "{name}" of the model is DoRA; '
                "load it under another name"
            )
        have, scale = module.A[name].shape[0], module.scaling[name]
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
