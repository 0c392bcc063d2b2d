"""Model folders -> a transformers model and its tokenizer, with clear errors and no surprises."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prefopt.errors import InputError
from prefopt.nn import heads
from prefopt.nn.empty_model import first_line, read_config, scores_texts
from prefopt.nn.nf4 import CODEBOOKS
from prefopt.nn.quantize import QuantReport, load_quantized, load_whole

EMBEDDED = Path(__file__).parent / "assets"  # the tiny model and preference data of `prefopt demo`
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*")
QUANTIZATION = "base_quantization.json"  # in an adapter's folder: {"kind": "nf4"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Source:
    """What a path names: a base model (folder or hub id), perhaps an adapter folder on it, and the
    4-bit kind that the base was quantised to and the head it had when the adapter was trained."""

    base: str
    adapter: Path | None = None
    kind: str | None = None
    head: str | None = None

    @property
    def folder(self) -> Path:
        """Where the weights that were trained last are."""
        return self.adapter or Path(self.base)


def resolve(path: str | Path) -> Source:
    """A model folder, an adapter folder, a run folder, "embedded" or a hub id -> Source."""
    if str(path) == "embedded":
        return Source(str(EMBEDDED / "model"))
    folder = Path(path)
    if (folder / "model").is_dir() and (folder / "config.yaml").is_file():
        folder = folder / "model"  # a run folder
    if (folder / "adapter_config.json").is_file():
        base = _base_of_adapter(folder)
        return Source(base, folder, _trained_on(folder), _head_of_adapter(folder))
    if folder.is_dir():
        _check_model_folder(folder)
        return Source(str(folder))
    if folder.exists():
        raise InputError(f"{folder} is a file; a model is a folder with config.json and weights")
    if str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        raise InputError(f"there is no model folder {folder} (absolute: {folder.absolute()})")
    return Source(str(path))


def _base_of_adapter(folder: Path) -> str:
    file = folder / "adapter_config.json"
    try:
        base = json.loads(file.read_text())["base_model_name_or_path"]
    except (KeyError, ValueError) as error:
        raise InputError(f"{file} does not name its base_model_name_or_path ({error!r})") from None
    if not base:
        raise InputError(f"{file} has an empty base_model_name_or_path; write the base model there")
    if not Path(base).is_absolute() and (folder / base).is_dir():
        base = str(folder / base)
    return base if resolve(base).adapter is None else _base_of_adapter(Path(base))


def _head_of_adapter(folder: Path) -> str:
    """PEFT's name for it is a task type; without one, what is stored beside the factors says it."""
    config = json.loads((folder / "adapter_config.json").read_text())
    saved = config.get("modules_to_save") or ()
    scores = config.get("task_type") == "SEQ_CLS" or heads.SCORE in saved
    return heads.SCORE if scores else heads.LM


def pick_head(source: Source, asked: str | None) -> str | None:
    """ "lm", "score", or None for what the base is: what an adapter says, or what is asked for."""
    if asked not in (None, heads.LM, heads.SCORE):
        raise InputError(f"head is 'lm' or 'score', not {asked!r}")
    if asked == heads.SCORE and source.head == heads.LM:
        raise InputError(
            f"{source.adapter} is the adapter of a language model; to train a reward model from "
            "it, merge it first (prefopt merge)"
        )
    if asked == heads.LM and source.head == heads.SCORE:
        raise InputError(f"{source.adapter} is the adapter of a reward model: head is 'score'")
    return heads.SCORE if source.head == heads.SCORE else asked


def _trained_on(folder: Path) -> str | None:
    """PEFT's format does not say what the base was quantised to; this file beside it does."""
    file = folder / QUANTIZATION
    if not file.is_file():
        return None
    try:
        return check_kind(json.loads(file.read_text())["kind"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file} does not name a kind of 4-bit weights ({error})") from None


def check_kind(kind: str) -> str:
    """The kind; InputError for one that is not known."""
    if kind not in CODEBOOKS:
        raise InputError(f"quantize is {kind!r}; it must be one of {', '.join(CODEBOOKS)}")
    return kind


def _check_model_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json, so it is not a Hugging Face model folder")
    if not any(f for pattern in WEIGHT_FILES for f in folder.glob(pattern)):
        raise InputError(
            f"{folder} has a config.json but no weights (model.safetensors or its shards); "
            "copy them there or name another model folder"
        )


def pick_device(device: str) -> torch.device:
    """ "auto": cuda (ROCm too), xpu, mps or cpu, whichever is there."""
    if device != "auto":
        if device.partition(":")[0] not in ("cpu", "cuda", "xpu", "mps"):
            raise InputError(f"device is auto, cpu, cuda, cuda:1, xpu or mps, not {device!r}")
        try:
            return torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"there is no device {device!r} here: {first_line(error)}") from None
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.xpu.is_available():
        return torch.device("xpu")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """ "auto": bfloat16 where the GPU has it, float16 on GPUs without, float32 elsewhere."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        if device.type == "cuda":
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            return torch.bfloat16 if has_bf16 else torch.float16
        return torch.bfloat16 if device.type == "xpu" else torch.float32
    if dtype not in DTYPES:
        raise InputError(f"dtype is 'auto', {', '.join(map(repr, DTYPES))}, not {dtype!r}")
    return DTYPES[dtype]


def load_model(
    base: str,
    dtype: torch.dtype,
    device: torch.device,
    kind: str | None = None,
    head: str | None = None,
    **options: Any,
) -> tuple[Any, Any, QuantReport | None]:
    """(model, tokenizer, what became 4-bit) of a folder or hub id.

    ``head``: "lm" or "score", None for what the folder is; a score head that is not in the folder
    is drawn from torch's generator. ``kind``: "nf4" or "fp4" quantises the linear layers while they
    are read (``options``: those of ``load_quantized``); a folder whose weights are 4-bit already is
    read as it is. Every failure is an InputError.
    """
    tokenizer, stored = load_tokenizer(base), stored_kind(base)
    if kind and stored and kind != stored:
        raise InputError(f"the weights of {base} are {stored} already; they cannot become {kind}")
    head, report = head_of(base, head), None
    if kind or stored:
        options |= {"kind": kind or stored, "head": head}
        model, report = load_quantized(base, dtype, device, **options)
    else:
        model = load_whole(base, dtype, head).to(device)
    if head == heads.SCORE and not scores_texts(read_config(base)):
        heads.draw_score(model)
    return model, tokenizer, report


def load_tokenizer(base: str) -> Any:
    """The tokenizer of a folder or hub id; every failure is an InputError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base)
    except Exception as error:  # a damaged file raises whatever its parser likes
        raise InputError(f"cannot load a tokenizer from {base}: {first_line(error)}") from None


def head_of(base: str, asked: str | None) -> str:
    """What the weights are, or for a language model's what is asked for."""
    if not scores_texts(read_config(base)):
        return asked or heads.LM
    if asked == heads.LM:
        raise InputError(f"{base} is a reward model, which has no head of words: head is 'score'")
    return heads.SCORE


def stored_kind(base: str) -> str | None:
    """ "nf4" or "fp4" for a model whose weights are stored in 4 bits (bitsandbytes' format)."""
    config = getattr(read_config(base), "quantization_config", None) or {}
    config = config if isinstance(config, dict) else config.to_dict()
    return config.get("bnb_4bit_quant_type") if config.get("load_in_4bit") else None


def context_length(model: Any) -> int:
    """The most tokens it reads; without a limit of its own, more than there are."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30


def remove_dropout(model: torch.nn.Module) -> None:
    """Set every dropout of the base model to zero.

    A preference margin compares policy and reference on the same text: noise in one of the two
    would be noise in the margin. Likewise routers' jitter and layers left out at random
    (layerdrop). LoRA's own dropout is added later and stays.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            noise = "drop" in name or name in ("jitter_noise", "input_jitter_noise")
            if noise and isinstance(value, float):
                setattr(module, name, 0.0)


def absolute(base: str) -> str:
    """A local model folder by its absolute path, so that an adapter finds it from anywhere."""
    return str(Path(base).absolute()) if Path(base).is_dir() else base
