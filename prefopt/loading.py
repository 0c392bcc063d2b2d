"""Model folders -> a transformers model and its tokenizer, with clear errors and no surprises."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefopt.errors import InputError
from prefopt.logprobs import token_logprobs
from prefopt.nn.empty_model import first_line, read_config
from prefopt.nn.nf4 import CODEBOOKS
from prefopt.nn.nf4_linear import NF4Linear
from prefopt.nn.quantize import QuantReport, load_quantized, load_whole

EMBEDDED = Path(__file__).parent / "assets"  # the tiny model and preference data of `prefopt demo`
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*")
QUANTIZATION = "base_quantization.json"  # in an adapter's folder: {"kind": "nf4"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Source:
    """What a path names: a base model (folder or hub id), perhaps an adapter folder on it, and the
    4-bit kind that the base was quantised to when the adapter was trained."""

    base: str
    adapter: Path | None = None
    kind: str | None = None


def resolve(path: str | Path) -> Source:
    """A model folder, an adapter folder, a run folder, "embedded" or a hub id -> Source."""
    if str(path) == "embedded":
        return Source(str(EMBEDDED / "model"))
    folder = Path(path)
    if (folder / "model").is_dir() and (folder / "config.yaml").is_file():
        folder = folder / "model"  # a run folder
    if (folder / "adapter_config.json").is_file():
        return Source(_base_of_adapter(folder), folder, _trained_on(folder))
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
    base: str, dtype: torch.dtype, device: torch.device, kind: str | None = None, **options: Any
) -> tuple[Any, Any, QuantReport | None]:
    """(causal language model, tokenizer, what became 4-bit) of a folder or hub id.

    ``kind``: "nf4" or "fp4" quantises the linear layers while they are read (``options``: those of
    ``load_quantized``); a folder whose weights are 4-bit already is read as it is. Every failure
    is an InputError.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
    except Exception as error:  # a damaged file raises whatever its parser likes
        raise InputError(f"cannot load a tokenizer from {base}: {first_line(error)}") from None
    stored = stored_kind(base)
    if kind and stored and kind != stored:
        raise InputError(f"the weights of {base} are {stored} already; they cannot become {kind}")
    if kind or stored:
        model, report = load_quantized(base, dtype, device, kind=kind or stored or "nf4", **options)
        return model, tokenizer, report
    return load_whole(base, dtype).to(device), tokenizer, None


def stored_kind(base: str) -> str | None:
    """ "nf4" or "fp4" for a model whose weights are stored in 4 bits (bitsandbytes' format)."""
    config = getattr(read_config(base), "quantization_config", None) or {}
    config = config if isinstance(config, dict) else config.to_dict()
    return config.get("bnb_4bit_quant_type") if config.get("load_in_4bit") else None


def backbone(model: Any) -> Any:
    """The model without its output head (Llama 4's is not where its class says)."""
    return getattr(model, "model", model) if model.base_model is model else model.base_model


def head_weight(head: Any) -> Tensor:
    """The output head's weight [V, D], dequantised where it is 4-bit."""
    return head.dequantize() if isinstance(head, NF4Linear) else head.weight


@torch.no_grad()
def head_options(model: Any) -> dict[str, Any]:
    """Softcap and scale between hidden states and logits, checked against the model's logits."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    options: dict[str, Any] = {}
    for name in ("final_logit_softcapping", "logits_soft_cap"):  # Gemma, RecurrentGemma
        if getattr(config, name, None):
            options["softcap"] = getattr(config, name)
    if getattr(config, "logit_scale", None):  # Cohere
        options["scale"] = config.logit_scale
    if getattr(config, "logits_scaling", None):  # Granite
        options["scale"] = 1 / config.logits_scaling
    device = next(model.parameters()).device
    ids = torch.arange(3, 10, device=device)[None] % config.vocab_size
    targets = torch.arange(6, device=device)

    weight = head_weight(head)
    dtype = torch.promote_types(weight.dtype, torch.float32)

    def logprobs(tokens: int) -> Tensor:
        logits = model(ids[:, :tokens], use_cache=False).logits[0, :6]
        return logits.to(dtype).log_softmax(-1)[targets, targets]

    want, bound = logprobs(7), 1e-3 if weight.dtype.itemsize >= 4 else 0.25
    hidden = backbone(model)(ids[:, :6], use_cache=False)[0][0]
    difference = math.inf
    if hidden.shape[-1] == weight.shape[1]:
        got = token_logprobs(hidden, weight, targets, bias=head.bias, **options)
        assert isinstance(got, Tensor)
        difference = (got - want).abs().max().item()
    if difference <= bound:
        return options
    if not (logprobs(6) - want).abs().max().item() <= bound:
        raise InputError(
            f"this {config.model_type} model sees the tokens behind the one it predicts, so it "
            "has no log-probs of a response; use a causal language model"
        )
    raise InputError(
        f"the output head of {config.model_type} does more than a linear layer, a scale and a "
        f"softcap (log-probs differ by {difference:.2g}), so its hidden states cannot be scored"
    )


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


def save_model(model: Any, folder: Path, dtype: torch.dtype | None) -> None:
    """transformers' own format, with floating-point weights as ``dtype`` if one is given."""
    state = model.state_dict()
    if dtype is None:
        model.save_pretrained(folder, state_dict=state)
        return
    # Converted once per tensor, so that tied weights stay one.
    seen: dict[int, torch.Tensor] = {}
    for name, tensor in state.items():
        if tensor.is_floating_point():
            if (place := tensor.data_ptr()) not in seen:
                seen[place] = tensor.to(dtype)
            state[name] = seen[place]
    model.save_pretrained(folder, state_dict=state)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def copy_tokenizer(base: str, tokenizer: Any, folder: Path) -> None:
    """Tokenizer and generation files byte for byte: re-saving them changes hashes others check."""
    source, kept = Path(base), ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges")
    names = (*kept, "chat_template", "generation_config")
    files = [f for f in source.glob("*") if f.name.startswith(names)] if source.is_dir() else []
    for file in files:
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    if not files:
        tokenizer.save_pretrained(folder)


def absolute(base: str) -> str:
    """A local model folder by its absolute path, so that an adapter finds it from anywhere."""
    return str(Path(base).absolute()) if Path(base).is_dir() else base
