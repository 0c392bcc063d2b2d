"""Generation with a model's own cache, for models that the slots cannot serve: state-space layers,
position biases, attention of their own. Responses to prompts of one length are written together,
without padding, until the last of them is done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from prefopt.nn import heads
from prefopt.rollout.drafts import Drafts, Request
from prefopt.rollout.picking import Picker
from prefopt.rollout.types import Sample

CACHES = ("past_key_values", "cache_params", "state")  # what models call it, in and out


class How(NamedTuple):
    """How much of a model's cache is right: several rows at a time, one, or no cache at all."""

    rows: int
    cached: bool


def write(
    policy: Any, work: Any, drafts: Drafts, pick: Picker, done: Callable[[Request, Sample], None]
) -> None:
    """All responses that ``work`` asks for; ``drafts`` has a row for each of a group."""
    policy.attend(policy._own_attention)
    how = _how(policy, len(drafts.requests))
    by_length: dict[int, list[Request]] = {}
    for number, prompt in enumerate(work.prompts):
        requests = [Request(number, sample) for sample in range(work.n)]
        by_length.setdefault(len(prompt), []).extend(requests)
    for requests in by_length.values():
        for start in range(0, len(requests), how.rows):
            _write_group(policy, work, requests[start : start + how.rows], drafts, pick, done, how)


def _how(policy: Any, rows: int) -> How:
    """Tried out on a few tokens: RWKV's cache is wrong for more than one row."""
    config = policy.model.config.get_text_config()
    ids = torch.arange(12, device=policy.device).view(2, 6) * 7 % config.vocab_size
    wanted = _read(policy, ids, None)[0]
    bound = 0.1 if (policy.autocast or policy.dtype).itemsize == 2 else 1e-3
    for count in (2, 1):
        hidden, cache = _read(policy, ids[:count, :5], None, cached=True)
        if cache is None:
            return How(rows, False)
        hidden = _read(policy, ids[:count, 5:], cache, cached=True)[0]
        if (hidden - wanted[:count]).norm() <= bound * wanted[:count].norm():
            return How(rows if count == 2 else 1, True)
    return How(rows, False)


def _read(policy: Any, ids: Tensor, cache: tuple[str, Any] | None, *, cached: bool = False):
    """Last hidden states [R, D] of the last of ids [R, L], which continue what is in ``cache``; and
    the cache then, as (its name, itself)."""
    before = {} if cache is None else dict([cache])
    out = heads.backbone(policy.model)(ids, **before, use_cache=cached)
    after = ((name, out.get(name)) for name in CACHES)
    found = next((pair for pair in after if pair[1] is not None), None)
    return out.last_hidden_state[:, -1], found


def _write_group(
    policy: Any, work: Any, requests: list[Request], drafts: Drafts, pick: Picker, done, how: How
) -> None:
    for request in requests:
        work.start(drafts, request)
    texts = np.stack([work.prompts[r.prompt] for r in requests]).astype(np.int64)
    order = np.arange(len(requests))  # order[i]: which row of the model's draft i has
    cache, unread = None, texts
    while drafts.live:
        ids = torch.from_numpy(unread).to(policy.device)
        hidden, cache = _read(policy, ids, cache if how.cached else None, cached=how.cached)
        hidden = hidden[torch.from_numpy(order).to(hidden.device)]
        _extend(drafts, order, pick, hidden, done)
        order = order[: drafts.live]
        last = np.zeros((len(requests), 1), dtype=np.int64)
        last[order, 0] = drafts.last[: drafts.live]
        texts = np.concatenate([texts, last], 1)
        unread = last if how.cached else texts


def _extend(drafts: Drafts, order: np.ndarray, pick: Picker, hidden: Tensor, done) -> None:
    uniform, early = (torch.from_numpy(x).to(hidden.device) for x in drafts.draws(drafts.live))
    tokens, logprobs = pick(hidden, uniform, early)
    for row, finish in drafts.add(tokens.cpu().numpy(), logprobs.cpu().numpy()):
        request, sample = drafts.requests[row], drafts.take(row, finish)
        order[row] = order[drafts.drop(row)]
        done(request, sample)
