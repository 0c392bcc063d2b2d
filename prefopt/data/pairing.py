"""Preference pairs out of n scored responses to one prompt."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import combinations, pairwise
from typing import NamedTuple

from prefopt.data.records import Candidates, Pair
from prefopt.errors import InputError

PAIRINGS = ("best_worst", "best_rest", "adjacent", "all")
TIES = ("drop", "soft", "keep")


class Paired(NamedTuple):
    """Pairs, which two responses each was made of (chosen, rejected), and how many comparisons
    made none, for what reason."""

    pairs: list[Pair]
    picks: list[tuple[int, int]]
    dropped: dict[str, int]


def check_pairing(pairing: str, max_pairs: int | None, min_gap: float, ties: str) -> None:
    """InputError for settings that `pair_up` does not take."""
    if pairing not in PAIRINGS:
        raise InputError(f"pairing is {pairing!r}; it is one of {', '.join(PAIRINGS)}")
    if not 0 <= min_gap < math.inf:
        raise InputError(f"min_gap is {min_gap!r}; it must be a number of at least 0")
    if max_pairs is not None and max_pairs < 1:
        raise InputError(f"max_pairs is {max_pairs!r}; it must be at least 1, or None for all")
    if ties not in TIES:
        raise InputError(f"ties={ties!r} is not one of {', '.join(TIES)}.")


def pair_up(
    candidates: Candidates,
    *,
    pairing: str = "best_worst",
    max_pairs: int | None = None,
    min_gap: float = 0.0,
    ties: str = "drop",
) -> Paired:
    """Pairs of n responses whose scores [n] say which is the better one.

    ``pairing``: "best_worst" makes at most one pair, "best_rest" sets the best response against
    every other, "adjacent" each against the next best, "all" every two against each other. Of
    equal responses the first one stands for all. A gap below ``min_gap`` makes no pair; equal
    scores make none either (``ties`` "drop"), one whose ``preference`` is 0.5 ("soft"), or one in
    which the first response counts as chosen ("keep"). Of more than ``max_pairs`` those with the
    largest gaps stay. ``Pair.margin`` is the gap. Among equally good responses the first is the
    best (the worst) one.
    """
    check_pairing(pairing, max_pairs, min_gap, ties)
    responses, scores = candidates.responses, candidates.scores
    if len(responses) != len(scores) or not all(map(math.isfinite, scores)):
        raise ValueError("every response needs one finite score")
    first: dict[str, int] = {}
    for i, turns in enumerate(responses):
        first.setdefault(json.dumps(turns), i)
    ranked = sorted(first.values(), key=lambda i: -scores[i])  # stable: equals in their order
    if len(ranked) < 2:
        return Paired([], [], {"all responses are the same text": 1})
    paired, dropped = Paired([], [], {}), Counter[str]()
    for chosen, rejected in _comparisons(ranked, scores, pairing):
        gap = scores[chosen] - scores[rejected]
        if gap == 0 and ties == "drop":
            dropped["tie"] += 1
        elif gap and gap < min_gap:
            dropped["gap below min_gap"] += 1
        else:
            sides = (responses[i] for i in (chosen, rejected))
            preference = 0.5 if gap == 0 and ties == "soft" else 1.0
            paired.pairs.append(
                Pair(
                    candidates.prompt,
                    *sides,
                    margin=float(gap),
                    source=candidates.source,
                    preference=preference,
                )
            )
            paired.picks.append((chosen, rejected))
    if max_pairs is not None and len(paired.pairs) > max_pairs:
        gaps = [scores[chosen] - scores[rejected] for chosen, rejected in paired.picks]
        kept = sorted(sorted(range(len(gaps)), key=lambda i: -gaps[i])[:max_pairs])
        dropped["more than max_pairs"] += len(gaps) - max_pairs
        paired = Paired([paired.pairs[i] for i in kept], [paired.picks[i] for i in kept], {})
    return paired._replace(dropped=dict(dropped))


def _comparisons(ranked: list[int], scores: list[float], pairing: str) -> list[tuple[int, int]]:
    """(better, worse) of responses that are ranked best first."""
    if pairing == "best_worst":
        return [(ranked[0], next(i for i in ranked[1:] if scores[i] == scores[ranked[-1]]))]
    if pairing == "best_rest":
        return [(ranked[0], i) for i in ranked[1:]]
    return list(pairwise(ranked) if pairing == "adjacent" else combinations(ranked, 2))
