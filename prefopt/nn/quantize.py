"""Quantise a model's linear layers to 4 bits: in place, or while it is read from its files.

A model that is read is never whole in memory in its dense form: each weight is read, cast to the
model's dtype, quantised and dropped before the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.errors import InputError
from prefopt.nn import heads
from prefopt.nn.bnb_format import check_config, read_bnb, weight_names
from prefopt.nn.empty_model import (
    Places,
    auto_class,
    empty_model,
    first_line,
    mismatch,
    read_config,
    scores_texts,
)
from prefopt.nn.nf4 import Packed4, quantize_nf4
from prefopt.nn.nf4_linear import NF4Linear
from prefopt.nn.quant_layers import HEAD, check_finite, choose_layers
from prefopt.nn.quant_report import QuantReport, measured, total_bytes
from prefopt.nn.tensor_files import INDEX, WHOLE, TensorFiles

log = logging.getLogger("prefopt")


def quantize_model(
    model: Any,
    skip: Sequence[str] = (HEAD,),
    *,
    device: torch.device | None = None,
    **options: Any,
) -> QuantReport:
    """Replaces the linear layers of `model` by NF4Linear, in place, one after the other.

    skip: modules left alone, by name, last part of a name, or container. options: those of
    quantize_nf4. device: where each weight is quantised, and stays (None: where it is).
    InputError, before anything is changed, for adapters, a model that is quantised already, values
    that are not finite, an option or an entry of `skip` that fits nothing, and nothing to quantise.
    """
    chosen, skipped = choose_layers(model, skip)
    quantize_nf4(torch.zeros(1), **options)  # an unknown option is found before anything is done
    for name, layer in chosen.items():
        check_finite(name, layer.weight)
    report = _report(model, skipped, options)
    for name in list(chosen):
        layer = chosen.pop(name)
        weight = layer.weight.detach()
        packed = quantize_nf4(weight.to(device or weight.device), **options)
        report.layers.append(measured(name, weight, packed))
        _replace(model, name, packed, layer)
        del layer, weight
    report.after = total_bytes(model)
    return report


def load_quantized(
    base: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    kind: str = "nf4",
    double: bool = True,
    search: str | None = None,
    skip: Sequence[str] = (HEAD,),
    head: str = heads.LM,
) -> tuple[Any, QuantReport | None]:
    """A language (or reward) model of a folder or hub id with its linear layers in 4 bits, and what
    was done; None for a folder that holds 4-bit weights (bitsandbytes' format), which are taken as
    they are. Everything else is in `dtype`, but for the head of a reward model: it is in float32,
    and if the files are a language model's its values are the caller's to draw.

    Files whose tensors are not the model's one to one (.bin, fused experts, old names) are loaded
    whole by transformers first, which takes the memory of the dense model, and the log says so.
    InputError for what cannot be read, other quantisations, and missing weights.
    """
    folder = _folder(base)
    config = read_config(folder)
    if getattr(config, "quantization_config", None) is not None:
        return _load_packed(base, folder, config, dtype, device, head), None
    options = {"kind": kind, "double": double, "search": search}
    quantize_nf4(torch.zeros(1), **options)
    fresh = head == heads.SCORE and not scores_texts(config)
    model = empty_model(config, dtype, head)
    places = Places(model)
    reason = _why_whole(folder, places, dtype, fresh)
    if reason is not None:
        log.info("%s is loaded whole before it is quantised: %s", base, reason)
        del model, places
        model = load_whole(folder, dtype, head)
        report = quantize_model(model, skip, device=device, **options)
        return model.to(device), report
    report = _fill_quantized(TensorFiles(folder), places, device, skip, options)
    return _finished(model, base, folder, device), report


# ---- parts ----


def _replace(model: nn.Module, name: str, packed: Packed4, layer: nn.Linear) -> None:
    bias = layer.bias
    if bias is not None and not bias.is_meta:  # from files the bias may come after the weight
        bias = bias.to(packed.codes.device)
    model.set_submodule(name, NF4Linear(packed, bias).train(layer.training))
    if packed.codes.device.type == "cpu":
        _give_back()


def _give_back() -> None:
    """Hands freed memory back to the system. glibc keeps it while something small above it lives,
    here the packed weight, and the size of a dense model would pile up."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _report(model: nn.Module, skipped: dict[str, str], options: dict[str, Any]) -> QuantReport:
    kind, double = options.get("kind", "nf4"), options.get("double", True)
    return QuantReport(kind, double, total_bytes(model), skipped=skipped)


def _folder(base: str) -> Path:
    """The local folder of a model; a hub id is downloaded, as naming one asks for."""
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "model*.safetensors", "pytorch_model*.bin"]
    try:
        return Path(snapshot_download(base, allow_patterns=patterns))
    except Exception as error:
        raise InputError(f"cannot load a model from {base}: {first_line(error)}") from None


def _why_whole(folder: Path, places: Places, dtype: torch.dtype, fresh: bool) -> str | None:
    """Why the files cannot be quantised tensor by tensor; None if they can."""
    if not (folder / WHOLE).is_file() and not (folder / INDEX).is_file():
        return f"it has no {WHOLE}"
    model: Any = places.model
    for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        if getattr(model, name, None) and dtype != torch.float32:
            return "its class keeps some modules in float32"
    files = TensorFiles(folder)
    return mismatch(places, set(files.names), files, fresh_head=fresh)


def load_whole(base: str | Path, dtype: torch.dtype, head: str = heads.LM) -> Any:
    """The dense language or reward model of a folder or hub id; every failure is an InputError.

    The head of a reward model is in float32, and a language model's folder leaves it to be drawn.
    """
    config = read_config(base)
    loader = auto_class(config, head)
    fresh_head = head == heads.SCORE and not scores_texts(config)
    try:
        with warnings.catch_warnings(), _quiet(fresh_head):
            warnings.simplefilter("ignore")
            loaded: Any = loader.from_pretrained(
                base, config=config, dtype=dtype, output_loading_info=True
            )
            model, info = loaded
    except Exception as error:
        raise InputError(f"cannot load a model from {base}: {first_line(error)}") from None
    missing = set(info["missing_keys"])
    if head == heads.SCORE:
        heads.check_score_head(model)
        missing -= {f"{heads.SCORE}.weight"} if fresh_head else set()
        _read_score(model, Path(base))
    if missing:
        names = ", ".join(sorted(missing)[:3])
        raise InputError(f"{base} lacks weights the model needs: {names}; the folder is damaged")
    return model


@contextlib.contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """Without transformers' table of the weights that are missing: a new head is meant to be."""
    from transformers.utils import logging as logs

    before = logs.get_verbosity()
    logs.set_verbosity(logs.ERROR if quiet else before)
    try:
        yield
    finally:
        logs.set_verbosity(before)


def _read_score(model: Any, folder: Path) -> None:
    """The head in float32, and as the file has it, which transformers has cast to 16 bits."""
    heads.widen_score(model)
    name = f"{heads.SCORE}.weight"
    if (folder / WHOLE).is_file() or (folder / INDEX).is_file():
        files = TensorFiles(folder)
        if name in files.names:
            (weight,) = files.read(name)
            model.score.weight.data.copy_(weight)


def _fill_quantized(
    files: TensorFiles,
    places: Places,
    device: torch.device,
    skip: Sequence[str],
    options: dict[str, Any],
) -> QuantReport:
    """Fills the empty model from its files; what is quantised is dense for a moment only."""
    model = places.model
    chosen, skipped = choose_layers(model, skip)
    report = _report(model, skipped, options)
    order = {name: i for i, name in enumerate(chosen)}
    for name in files.names:
        if name not in places.names:
            continue
        (tensor,) = files.read(name)
        _check_shape(files, name, tensor.shape, places.tensors[name].shape)
        path = name.removesuffix(".weight")
        if path not in chosen or path == name:
            places.fill(name, tensor, device)
            continue
        weight = tensor.to(device, places.tensors[name].dtype)
        del tensor
        check_finite(path, weight)
        packed = quantize_nf4(weight, **options)
        report.layers.append(measured(path, weight, packed))
        del weight
        _replace(model, path, packed, chosen[path])
    report.layers.sort(key=lambda layer: order[layer.name])
    report.after = total_bytes(model)
    return report


def _load_packed(
    base: str, folder: Path, config: Any, dtype: torch.dtype, device: torch.device, head: str
) -> Any:
    """The model of a 4-bit folder, without bitsandbytes."""
    check_config(folder)
    del config.quantization_config
    files = TensorFiles(folder)
    fresh = head == heads.SCORE and not scores_texts(config)
    model = empty_model(config, dtype, head)
    places = Places(model)
    if reason := mismatch(places, set(weight_names(files)), files, fresh_head=fresh):
        raise InputError(f"{folder} does not fit {type(model).__name__}: {reason}")
    for name, value in read_bnb(files):
        if name not in places.names:
            continue
        _check_shape(files, name, value.shape, places.tensors[name].shape)
        if isinstance(value, Tensor):
            places.fill(name, value, device)
            continue
        path = name.removesuffix(".weight")
        layer = model.get_submodule(path) if path != name else None
        if type(layer) is not nn.Linear:
            raise InputError(f"{files.names[name]} has {name} in 4 bits, which is no linear layer")
        _replace(model, path, _moved(value, device), layer)
    return _finished(model, base, folder, device)


def _moved(p: Packed4, device: torch.device) -> Packed4:
    nested = None if p.nested is None else p.nested.to(device)
    offset = None if p.offset is None else p.offset.to(device)
    return p._replace(
        codes=p.codes.to(device), scales=p.scales.to(device), nested=nested, offset=offset
    )


def _check_shape(files: TensorFiles, name: str, have: torch.Size, want: torch.Size) -> None:
    if have != want:
        raise InputError(
            f"{files.names[name]} has {name} as {list(have)}, but its config asks for {list(want)}"
        )


def _finished(model: Any, base: str, folder: Path, device: torch.device) -> Any:
    from transformers import GenerationConfig

    left = [name for name, p in model.named_parameters() if p.is_meta]
    assert not left, f"{left[:3]} were not filled"
    model.config._name_or_path = model.name_or_path = base
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.to(device)
