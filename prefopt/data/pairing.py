"""Preference pairs out of n scored responses to one prompt."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

from prefopt.data.records import Message, Pair
from prefopt.errors import InputError

PAIRINGS = ("best_worst", "best_rest", "all")


class Paired(NamedTuple):
    """Pairs, which two responses each was made of (chosen, rejected), and how many comparisons
    made none, for what reason."""

    pairs: list[Pair]
    picks: list[tuple[int, int]]
    dropped: dict[str, int]


def pair_up(
    prompt: list[Message],
    responses: Sequence[str],
    scores: Sequence[float],
    *,
    pairing: str = "best_worst",
    min_gap: float = 0.0,
) -> Paired:
    """Pairs of n responses whose scores [n] say which is the better one.

    ``pairing``: "best_worst" makes at most one pair, "best_rest" sets the best response against
    every other, "all" every two against each other. Equal scores make no pair, nor does a gap below
    ``min_gap``; of equal texts the first one stands for all. ``Pair.margin`` is the gap. Among
    equally good responses the first is the best (the worst) one.
    """
    if pairing not in PAIRINGS:
        raise InputError(f"pairing is {pairing!r}; it is one of {', '.join(PAIRINGS)}")
    if not 0 <= min_gap < math.inf:
        raise InputError(f"min_gap is {min_gap!r}; it must be a number of at least 0")
    if len(responses) != len(scores) or not all(map(math.isfinite, scores)):
        raise ValueError("every response needs one finite score")
    first: dict[str, int] = {}
    for i, text in enumerate(responses):
        first.setdefault(text, i)
    ranked = sorted(first.values(), key=lambda i: -scores[i])  # stable: equals in their order
    if len(ranked) < 2:
        return Paired([], [], {"all responses are the same text": 1})
    if pairing == "best_worst":
        worst = next(i for i in ranked if scores[i] == scores[ranked[-1]])
        candidates = [(ranked[0], worst)]
    elif pairing == "best_rest":
        candidates = [(ranked[0], i) for i in ranked[1:]]
    else:
        candidates = list(combinations(ranked, 2))
    paired, dropped = Paired([], [], {}), Counter()
    for chosen, rejected in candidates:
        gap = scores[chosen] - scores[rejected]
        if gap == 0:
            dropped["equal scores"] += 1
        elif gap < min_gap:
            dropped["gap below min_gap"] += 1
        else:
            sides = ([Message("assistant", responses[i])] for i in (chosen, rejected))
            paired.pairs.append(Pair(prompt, *sides, margin=float(gap)))
            paired.picks.append((chosen, rejected))
    return paired._replace(dropped=dict(dropped))
