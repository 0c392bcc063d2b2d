"""Whether a model can share prompts: tried on a few tokens, not looked up in a list."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from prefopt import attention, loading
from prefopt.attention import Runs
from prefopt.data.encode import Encoded
from prefopt.data.packing import pack
from prefopt.nn import heads


def why_not(policy: Any) -> str | None:
    """None if ``policy`` computes under a shared prompt what it computes without, else the reason.

    Every layer must come by the attention of this library, with the window that its mask would
    have had, and the log-probs or scores must be those of the padded layout.
    """
    kind = policy.model.config.model_type
    if not getattr(policy.model, "_supports_attention_backend", False):
        return f"{kind} models take no attention function from outside"
    try:
        return _try(policy)
    except Exception as error:  # a model that expects a mask may fail in any way without
        return f"{kind} failed with a shared prompt: {loading.first_line(error)}"


@torch.no_grad()
def _try(policy: Any) -> str | None:
    config = policy.model.config.get_text_config()
    ids = (np.arange(12, dtype=np.int32) * 7 + 3) % config.vocab_size
    group = Encoded(prompt=ids[:5], responses=(ids[5:9], ids[8:12]), index=0)
    shared, padded = (
        next(iter(pack([group], max_tokens=64, layout=how, ends=True))).to(policy.device)
        for how in ("shared", "padded")
    )
    runs = Runs(shared.segments, policy.device)
    attention.asked_windows.clear()
    policy.attend(attention.register())
    heads.backbone(policy.model)(
        shared.input_ids[None], position_ids=shared.position_ids[None], segments=runs,
        use_cache=False,
    )  # fmt: skip
    policy.head_size = runs.head_size
    kind, layers = config.model_type, config.num_hidden_layers
    if runs.calls != layers:
        return f"{kind} has {layers} layers and called {runs.calls} times for attention"
    if windows := attention.asked_windows - runs.windows:
        return f"{kind} limits attention to {max(windows)} tokens in a mask of its own"
    difference = (policy(shared) - policy(padded)).abs().max().item()
    if not difference <= {torch.float32: 1e-3, torch.float64: 1e-6}.get(policy.dtype, 0.25):
        return f"what is read under a shared prompt differs by {difference:.2g} in {kind}"
    return None
