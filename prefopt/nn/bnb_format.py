"""4-bit model folders as transformers writes them for bitsandbytes' load_in_4bit, byte for byte.

Beside X.weight, uint8 [ceil(n / 2), 1] (or the same bytes viewed as a wider type), stand
    X.weight.absmax                                float32 [blocks], doubly quantised uint8 [blocks]
    X.weight.nested_absmax, .nested_quant_map      float32 [ceil(blocks / 256)], [256]: double only
    X.weight.quant_map                             float32 [16], the codebook
    X.weight.quant_state.bitsandbytes__nf4         uint8, JSON: type, block, dtype, shape, offset
in config.json a quantization_config. Keys decide: each weight has its own kind, block and
quantisation of the scales. A codebook that is not the one of its kind is refused on reading, since
bitsandbytes ignores the tensor and decodes with its own.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.durable import new_dir
from prefopt.errors import InputError
from prefopt.nn.adapted import Adapted
from prefopt.nn.nf4 import BLOCKS, CODEBOOKS, NESTED, Packed4, dynamic_map
from prefopt.nn.nf4_linear import NF4Linear
from prefopt.nn.tensor_files import TensorFiles, byte_count, float_dtype, read_json, save_shards

STATE = "quant_state.bitsandbytes__"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
STORAGES = {str(t)[6:]: t for t in (torch.uint8, torch.bfloat16, torch.float16, torch.float32)}


# ---- writing ----


def save_bnb(
    model: Any,
    dir: str | os.PathLike[str],
    *,
    max_shard_size: str | int = "5GB",
    storage: str = "uint8",
) -> None:
    """Writes a transformers model with NF4Linear layers to the folder `dir`: config, weights.

    storage: the type that packed bytes are viewed as ("bfloat16" is what FSDP with bitsandbytes
    wants). The folder is replaced whole, or not at all on an error; the tokenizer is the caller's.
    InputError for a model without 4-bit layers or with adapters, and for an unknown storage.
    """
    limit = byte_count(max_shard_size)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, NF4Linear)}
    _check_savable(model, layers, storage)
    config = quantization_config(model, storage)
    folder = Path(dir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder for the model")
    folder.parent.mkdir(parents=True, exist_ok=True)
    parameters = sum(p.numel() for p in model.parameters() if p.is_floating_point())
    parameters += sum(m.in_features * m.out_features for m in layers.values())
    with new_dir(folder) as tmp:
        _write_config(model, tmp, config)
        save_shards(tmp, _groups(model, layers, STORAGES[storage]), limit, parameters)


def _check_savable(model: Any, layers: dict[str, NF4Linear], storage: str) -> None:
    if storage not in STORAGES:
        known = ", ".join(map(repr, STORAGES))
        raise InputError(f"storage of 4-bit weights is one of {known}, not {storage!r}")
    if adapted := [name for name, m in model.named_modules() if isinstance(m, Adapted)]:
        raise InputError(
            f"{adapted[0]} has an adapter, which this format cannot hold; save the adapter by "
            "itself, or merge it into a dense model"
        )
    if not layers:
        raise InputError("the model has no 4-bit layer; call quantize_model first")
    for name, layer in layers.items():
        if layer.weight.numel() % STORAGES[storage].itemsize:
            raise InputError(
                f"{name} has {layer.weight.numel()} packed bytes, which cannot be viewed as "
                f"{storage}; use storage='uint8'"
            )


def encode(p: Packed4, storage: torch.dtype = torch.uint8) -> dict[str, Tensor]:
    """The tensors of one weight; "" is the key of the codes, the others are what follows a dot."""
    state: dict[str, Any] = {"quant_type": p.kind, "blocksize": p.block}
    state |= {"dtype": str(p.dtype).removeprefix("torch."), "shape": list(p.shape)}
    tensors = {"": p.codes.reshape(-1).view(storage).view(-1, 1), "absmax": p.scales.reshape(-1)}
    tensors["quant_map"] = CODEBOOKS[p.kind]
    if p.nested is not None and p.offset is not None:
        state |= {"nested_blocksize": NESTED, "nested_dtype": "float32"}
        state["nested_offset"] = p.offset.item()
        tensors |= {"nested_absmax": p.nested, "nested_quant_map": dynamic_map()}
    text = json.dumps(state).encode()
    tensors[STATE + p.kind] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return tensors


def _groups(
    model: Any, layers: dict[str, NF4Linear], storage: torch.dtype
) -> Iterator[dict[str, Tensor]]:
    """The model's tensors in its order, each once, a weight with all that belongs to it."""
    seen: set[int] = set()
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    for name, tensor in model.state_dict(keep_vars=True).items():
        path, _, leaf = name.rpartition(".")
        if path in layers and leaf != "bias":
            if leaf == "weight":
                parts = encode(layers[path].packed(), storage)
                yield {f"{name}.{key}".rstrip("."): part for key, part in parts.items()}
        elif id(tensor) not in seen and name not in ignored:
            seen.add(id(tensor))  # a tied weight is written under its first name
            yield {name: tensor.detach()}


def quantization_config(model: Any, storage: str = "uint8") -> dict[str, Any]:
    """What config.json says of the quantisation."""
    layers = [m for m in model.modules() if isinstance(m, NF4Linear)]
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": str(layers[0].dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": storage,
        "bnb_4bit_quant_type": Counter(m.kind for m in layers).most_common(1)[0][0],
        "bnb_4bit_use_double_quant": any(m.nested is not None for m in layers),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": _skip_modules(model),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def _skip_modules(model: Any) -> list[str] | None:
    """None where transformers' own choice (the output embedding, tied weights, the module of the
    last parameter) leaves just the same linear layers alone; else all of them by name, the output
    embedding too, because a list replaces that choice."""
    linear = {name: m for name, m in model.named_modules() if type(m) in (nn.Linear, NF4Linear)}
    dense = {name for name, m in linear.items() if type(m) is nn.Linear}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    counts = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    last = list(model.named_parameters())[-1][0]
    default = {
        name
        for name, m in linear.items()
        if m is head or counts[id(m.weight)] > 1 or f"{name}.weight" == last
    }
    return None if dense == default else sorted(dense)


def _write_config(model: Any, folder: Path, quantization: dict[str, Any]) -> None:
    before = model.config.dtype, model.config.architectures
    floats = (p.dtype for p in model.parameters() if p.is_floating_point())
    try:
        model.config.dtype = str(next(floats, torch.float32)).removeprefix("torch.")
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
    finally:
        model.config.dtype, model.config.architectures = before
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    file = folder / "config.json"
    config = read_json(file) | {"quantization_config": quantization}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# ---- reading ----


def load_bnb(dir: str | os.PathLike[str]) -> dict[str, Packed4 | Tensor]:
    """All tensors of a 4-bit folder on the CPU: 4-bit weights as Packed4, the others as stored.

    InputError, naming file and key, for a folder that is not bitsandbytes' 4-bit, a part of a
    weight that is missing or superfluous, and a codebook, type or size that does not fit.
    """
    return dict(read_bnb(TensorFiles(dir)))


def read_bnb(files: TensorFiles) -> Iterator[tuple[str, Packed4 | Tensor]]:
    """load_bnb one weight at a time; all names are checked before the first one is read."""
    check_config(files.folder)
    packed = _packed_names(files)
    for name in weight_names(files):
        if name in packed:
            yield name, _decode(files, name, packed[name])
        else:
            yield name, files.read(name)[0]


def weight_names(files: TensorFiles) -> list[str]:
    """The names of the tensors that the model has, 4-bit ones and others."""
    packed = _packed_names(files)
    parts = {f"{name}.{part}" for name, parts in packed.items() for part in parts}
    return [name for name in files.names if name not in parts]


def check_config(folder: Path) -> None:
    """InputError unless the folder's config.json, if it has one, describes bitsandbytes' 4 bits."""
    if not (folder / "config.json").is_file():
        return
    settings = read_json(folder / "config.json").get("quantization_config")
    if not isinstance(settings, dict):
        raise InputError(
            f"{folder / 'config.json'} has no quantization_config; it is a dense model"
        )
    if (method := settings.get("quant_method")) != "bitsandbytes":
        raise InputError(f"{folder} is quantised by {method}; only 4-bit bitsandbytes is read here")
    if not settings.get("load_in_4bit"):
        raise InputError(f"{folder} is quantised to 8 bits; only 4-bit bitsandbytes is read here")


def _packed_names(files: TensorFiles) -> dict[str, list[str]]:
    """4-bit weights -> the parts each has; every part must be there, and belong to a weight."""
    packed: dict[str, list[str]] = {}
    for name in files.names:
        for part in (*PARTS, *(STATE + kind for kind in CODEBOOKS)):
            if name.endswith(f".{part}"):
                packed.setdefault(name.removesuffix(f".{part}"), []).append(part)
    for name, parts in packed.items():
        at = files.names[f"{name}.{parts[0]}"]
        if name not in files.names:
            raise InputError(f"{at} has {name}.{parts[0]} without {name} itself; get another copy")
        if sum(part.startswith(STATE) for part in parts) != 1:
            raise InputError(f"{at} needs {name}.{STATE}nf4 or the same of fp4; get another copy")
        needed = {"absmax", "quant_map"}
        if "nested_absmax" in parts or "nested_quant_map" in parts:
            needed = set(PARTS)
        if missing := sorted(needed - set(parts)):
            raise InputError(f"{at} lacks {name}.{missing[0]}; get another copy")
    if not packed:
        raise InputError(f"{files.folder} has no 4-bit weights; it is a dense model")
    return packed


def _decode(files: TensorFiles, name: str, parts: list[str]) -> Packed4:
    at = files.names[name]
    codes, *rest = files.read(name, *(f"{name}.{part}" for part in parts))
    tensors = dict(zip(parts, rest, strict=True))
    key = next(part for part in parts if part.startswith(STATE))
    state = _state(tensors.pop(key), f"{at}: {name}.{key}", key.removeprefix(STATE))
    kind, block, double = state["quant_type"], state["blocksize"], "nested_absmax" in parts
    shape = torch.Size(state["shape"])
    blocks = -(-shape.numel() // block)

    def check(tensor: Tensor, part: str, dtype: torch.dtype, length: int) -> Tensor:
        if tensor.dtype != dtype or tensor.numel() != length:
            have = f"{tensor.numel()} of {tensor.dtype}"
            raise InputError(f"{at}: {name}{part} is {have}, not {length} of {dtype}")
        return tensor.reshape(-1)

    if codes.dtype not in STORAGES.values():
        raise InputError(f"{at}: {name} is stored as {codes.dtype}, which no 4-bit weight is")
    codes = codes.reshape(-1).view(torch.uint8)
    check(codes, "", torch.uint8, -(-shape.numel() // 2))
    scales = check(tensors["absmax"], ".absmax", torch.uint8 if double else torch.float32, blocks)
    expected = {"quant_map": CODEBOOKS[kind]}
    nested = offset = None
    if double:
        nested = tensors["nested_absmax"]
        nested = check(nested, ".nested_absmax", torch.float32, -(-blocks // NESTED))
        expected["nested_quant_map"] = dynamic_map()
        offset = _offset(state, f"{at}: {name}.{key}")
    for part, book in expected.items():
        if not torch.equal(check(tensors[part], f".{part}", torch.float32, len(book)), book):
            raise InputError(f"{at}: {name}.{part} is not the codebook of {kind}; get another copy")
    dtype: Any = float_dtype(state["dtype"])
    return Packed4(codes, scales, nested, offset, shape, dtype, kind, block)


def _state(tensor: Tensor, at: str, kind: str) -> dict[str, Any]:
    try:
        state = json.loads(bytes(tensor.tolist()))
    except (ValueError, TypeError) as error:
        raise InputError(f"{at} is damaged ({error}); get another copy") from None
    shape = state.get("shape") if isinstance(state, dict) else None
    good = (
        isinstance(shape, list)
        and all(type(side) is int and side > 0 for side in shape)
        and state.get("quant_type") == kind
        and state.get("blocksize") in BLOCKS
        and float_dtype(state.get("dtype")) is not None
    )
    if not good:
        raise InputError(f"{at} does not describe a {kind} weight: {state}; get another copy")
    return state


def _offset(state: dict[str, Any], at: str) -> Tensor:
    offset: Any = state.get("nested_offset")
    like = state.get("nested_blocksize"), state.get("nested_dtype")
    good = isinstance(offset, float | int) and math.isfinite(offset)
    if not good or like != (NESTED, "float32"):
        raise InputError(f"{at} does not describe quantised scales: {state}; get another copy")
    return torch.tensor(offset, dtype=torch.float32)
