"""Generation with transformers' own ``generate``: for samples, evaluation and the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Generation:
    """One sampled response; ``finish`` is "stop" at an end token and "length" at the limit.
    ``tokens``: how many were sampled, the end token not counted."""

    text: str
    finish: str
    tokens: int


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[np.ndarray],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
) -> list[Generation]:
    """One response to each prompt, token ids [P]; temperature 0 is greedy.

    The model is in evaluation mode with an attention that takes masks. What is sampled depends on
    ``seed`` and the batches, and the global random state stays as it was.
    """
    device, results = next(model.parameters()).device, []
    kind = device.type if device.type in ("cuda", "xpu") else "cpu"
    pad, stops = _pad_and_stops(model, tokenizer)
    if len({len(prompt) for prompt in prompts}) > 1 and not _skips_padding(model, pad):
        batch_size = 1
    settings = {"max_new_tokens": max_new_tokens, "pad_token_id": pad, "do_sample": temperature > 0}
    if temperature:
        settings |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng([] if kind == "cpu" else [device], device_type=kind):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            ids, mask = _left_padded(prompts[start : start + batch_size], pad)
            out = model.generate(
                ids.to(device),
                attention_mask=mask.to(device),
                eos_token_id=sorted(stops) or None,
                **settings,
            )
            for tokens in out[:, ids.shape[1] :].tolist():
                end = next((i for i, token in enumerate(tokens) if token in stops), None)
                text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
                finish = "length" if end is None else "stop"
                results.append(Generation(text, finish, len(tokens[:end])))
    return results


def _pad_and_stops(model: Any, tokenizer: Any) -> tuple[int, set[int]]:
    """What training ends a response with stops one, and so does what the model's authors chose."""
    ends = model.generation_config.eos_token_id
    stops = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    pad = tokenizer.pad_token_id
    return next(iter(stops), 0) if pad is None else pad, stops


def _left_padded(prompts: list[np.ndarray], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention mask), each [prompts, longest]: every prompt ends in the last column."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt).long()
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def _skips_padding(model: Any, pad: int) -> bool:
    """Whether padding on the left changes nothing: tried out, as some models ignore the mask."""
    config = model.config.get_text_config()
    ids = torch.arange(3, 8, device=next(model.parameters()).device) % config.vocab_size
    next_token = []
    for padding in (0, 3):
        out = model.generate(
            F.pad(ids, (padding, 0), value=pad)[None],
            attention_mask=F.pad(torch.ones_like(ids), (padding, 0))[None],
            max_new_tokens=1,
            do_sample=False,
            pad_token_id=pad,
            output_logits=True,
            return_dict_in_generate=True,
        )
        next_token.append(out.logits[0].float().softmax(-1))
    distance = (next_token[0] - next_token[1]).abs().sum().item() / 2
    return distance < (1e-3 if model.dtype.itemsize >= 4 else 0.05)
