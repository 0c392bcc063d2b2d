"""A policy -> a folder: a PEFT adapter, or a model that transformers and vLLM load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from prefopt import durable
from prefopt.loading import QUANTIZATION
from prefopt.nn import heads
from prefopt.nn.bnb_format import save_bnb
from prefopt.nn.nf4_linear import NF4Linear
from prefopt.nn.peft_format import save_adapter


def save_policy(policy: Any, folder: Path) -> None:
    """The adapter's folder, or that of a model without one; whole, or not there.

    With it go the tokenizer and, of a reward model, the statistics of its scores.
    """
    if policy.adapter is not None:
        save_adapter(policy.model, folder, policy.adapter, base_model_name_or_path=policy.base)
        if policy.kind:
            durable.write_json(folder / QUANTIZATION, {"kind": policy.kind})
        else:
            (folder / QUANTIZATION).unlink(missing_ok=True)  # of what was here before
        _save_rest(policy, folder)
        return
    with durable.new_dir(folder) as partial, policy.plain_attention():
        if any(isinstance(module, NF4Linear) for module in policy.model.modules()):
            save_bnb(policy.model, partial)
        else:
            save_model(policy.model, partial, policy.autocast)
        _save_rest(policy, partial)


def _save_rest(policy: Any, folder: Path) -> None:
    copy_tokenizer(policy.base, policy.tokenizer, folder)
    if policy.new_padding:
        policy.tokenizer.save_pretrained(folder)
    if policy.score_stats is not None:
        policy.score_stats.write(folder)
    else:
        (folder / heads.STATS).unlink(missing_ok=True)  # of what was here before


def save_model(model: Any, folder: Path, dtype: torch.dtype | None) -> None:
    """transformers' own format, with floating-point weights as ``dtype`` if one is given, but for
    the head of a reward model."""
    state = model.state_dict()
    if dtype is None:
        model.save_pretrained(folder, state_dict=state)
        return
    # Converted once per tensor, so that tied weights stay one.
    seen: dict[int, torch.Tensor] = {}
    for name, tensor in state.items():
        if tensor.is_floating_point() and not name.startswith(f"{heads.SCORE}."):
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
