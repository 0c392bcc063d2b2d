"""Rankings to token ids: one prompt and K responses, by the rules of encode.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from prefopt.data.encode import EncodedSet, Group, cut, encode_groups
from prefopt.data.records import Ranking


def encode_rankings(
    rankings: Iterable[Ranking],
    tokenizer: Any,
    *,
    max_length: int = 1024,
    template: str = "auto",
) -> EncodedSet:
    """Encode each ranking as a prompt with its responses, the best one first.

    As `encode_pairs`, for any number of responses. Of responses that are the same in tokens, before
    or after truncation, nothing says which is better: all but the first are dropped, and counted.
    Dropped, and counted: rankings with fewer than two responses left, prompts that leave no room,
    conversations the chat template refuses. Raises InputError for a tokenizer without EOS and when
    every ranking is dropped.
    """
    repeated = 0

    def different(responses: list[np.ndarray], room: int) -> tuple[np.ndarray, ...] | str:
        nonlocal repeated
        kept = cut(responses, room)
        if isinstance(kept, str):
            return kept
        unique = {response.tobytes(): response for response in kept}  # in order of the first
        repeated += len(kept) - len(unique)
        if len(unique) < 2:
            return "fewer than two different responses"
        return tuple(unique.values())

    groups = (Group(r.prompt, r.responses, {"source": r.source}) for r in rankings)
    encoded = encode_groups(groups, tokenizer, different, max_length, template, "ranking")
    if repeated:
        encoded.counts["responses identical to a better one"] = repeated
    return encoded
