"""Rankings to token ids: one prompt and K responses, by the rules of encode.py."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prefopt.data.encode import encode_groups
from prefopt.data.encoded import EncodedSet
from prefopt.data.recipe import Recipe
from prefopt.data.records import Ranking


def encode_rankings(
    rankings: Iterable[Ranking],
    tokenizer: Any,
    *,
    max_length: int = 1024,
    template: str = "auto",
    cache: Path | None = None,
    workers: int | None = None,
) -> EncodedSet:
    """Encode each ranking as a prompt with its responses, the best one first.

    As `encode_pairs`, for any number of responses. Of responses whose scored tokens are the same,
    before or after truncation, nothing says which is better: all but the first are dropped, and
    counted. Dropped, and counted: rankings with fewer than two responses left, prompts that leave
    no room, conversations the chat template refuses. Raises InputError for a tokenizer without EOS
    and when every ranking is dropped.
    """
    recipe = Recipe("ranking", template, max_length)
    return encode_groups(rankings, tokenizer, recipe, cache=cache, workers=workers)
