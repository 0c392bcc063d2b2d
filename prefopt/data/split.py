"""A held-out part of the pairs that shares no prompt with the rest."""

from __future__ import annotations

import json
from collections.abc import Iterable
from hashlib import blake2b

from prefopt.data.records import Dialogue, Feedback, Message, Pair, Ranking
from prefopt.errors import InputError


def split_pairs(
    pairs: Iterable[Pair | Dialogue | Ranking | Feedback], fraction: float
) -> tuple[list[int], list[int]]:
    """(train indices, held-out indices) of records, ascending, by a hash of the prompt.

    A prompt is held out if its hash, as a number in [0, 1), is below `fraction` (0 <= fraction <
    1): all its pairs go to one side, whatever their order and whatever other rows there are. With
    fraction > 0 and at least two distinct prompts neither side is empty: the prompt with the
    smallest (largest) hash is held out (kept) if need be.
    """
    if not 0.0 <= fraction < 1.0:
        raise InputError(f"The held-out fraction must be in [0, 1), not {fraction}.")
    places = [_place(pair.prompt) for pair in pairs]
    distinct = sorted(set(places))
    below = 0.0
    if fraction > 0.0 and len(distinct) > 1:
        below = fraction if fraction > distinct[0] else distinct[1]
        below = min(below, distinct[-1])
    train = [i for i, place in enumerate(places) if place >= below]
    held_out = [i for i, place in enumerate(places) if place < below]
    return train, held_out


def _place(prompt: list[Message]) -> float:
    """Where a prompt falls in [0, 1): the first 53 bits of its blake2b digest."""
    text = json.dumps([[message.role, message.content] for message in prompt])
    return (int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) >> 11) / 2**53
