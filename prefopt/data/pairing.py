"""Preference pairs out of n scored responses to one prompt, and which pairs are of use."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from hashlib import blake2b
from itertools import combinations, pairwise
from typing import Any, NamedTuple

from prefopt.data.conversations import Turns, part
from prefopt.data.records import SPOKEN, Candidates, Message, Pair
from prefopt.data.schemas.base import Item
from prefopt.errors import InputError

PAIRINGS = ("best_worst", "best_rest", "adjacent", "all")
TIES = ("drop", "soft", "keep")
EMPTY = ("keep", "drop")


class Paired(NamedTuple):
    """Pairs, which two responses each was made of (chosen, rejected), and how many comparisons
    made none, for what reason."""

    pairs: list[Pair]
    picks: list[tuple[int, int]]
    dropped: dict[str, int]


class Choice(NamedTuple):
    """A pair, the record that it was made of, and which two of its responses (chosen, rejected)."""

    pair: Pair
    record: Pair | Candidates
    picks: tuple[int, int]


def pair_items(
    items: Iterable[Item],
    *,
    pairing: str = "best_worst",
    max_pairs: int | None = None,
    min_gap: float = 0.0,
    ties: str = "drop",
    empty: str = "keep",
) -> Iterator[tuple[Item, list[Choice], Counter[str]]]:
    """(item, the pairs that it makes, comparisons that make none by reason) of every item.

    The arguments are those of `pair_up`, which apply to pairs too; ``max_pairs`` is of one prompt,
    over all items. ``empty``: whether pairs stay of which one response says nothing.
    """
    check_pairing(pairing, max_pairs, min_gap, ties, empty)
    options: dict[str, Any] = {"max_pairs": max_pairs, "min_gap": min_gap, "ties": ties}
    of_prompt = Counter[bytes]()
    for item in items:
        made, choices = item.record, list[Choice]()
        reasons = Counter[str]([made] if isinstance(made, str) else [])
        records = [] if isinstance(made, str) else made if isinstance(made, list) else [made]
        for record in records:
            pairs, picks, dropped = _paired(record, pairing, options)
            reasons.update(dropped)
            for pair, two in zip(pairs, picks, strict=True):
                if reason := _unusable(pair, empty, max_pairs, of_prompt):
                    reasons[reason] += 1
                else:
                    choices.append(Choice(pair, record, two))
        yield item, choices, reasons


def notes_of(left_out: Counter[str], noted: Counter[str]) -> list[str]:
    """What a report says of the comparisons that rows did not make beside others, by reason, and
    of the notes of the items that made any."""
    others = "comparisons left out of rows that make others, "
    both = [*((others + reason, n) for reason, n in left_out.items()), *noted.items()]
    return [f"{what}: {count:,}" for what, count in both if count]


def why_none(reasons: Counter[str]) -> str:
    """Why an item makes no pair at all."""
    return reasons.most_common(1)[0][0] if reasons else "no comparison"


def _paired(record: Pair | Candidates, pairing: str, options: dict[str, Any]) -> Paired:
    if isinstance(record, Candidates):
        return pair_up(record, pairing=pairing, **options)
    if record.preference == 0.5 and options["ties"] == "drop":
        return Paired([], [], {"tie": 1})
    if record.preference == 0.5 and options["ties"] == "keep":
        record = replace(record, preference=1.0)
    least = options["min_gap"]  # 0 keeps what the data calls chosen although its score is the lower
    if least and record.margin is not None and record.preference == 1 and record.margin < least:
        return Paired([], [], {"gap below min_gap": 1})
    return Paired([record], [(0, 1)], {})


def _unusable(
    pair: Pair, empty: str, max_pairs: int | None, of_prompt: Counter[bytes]
) -> str | None:
    """Why a pair is left out, or None; then it counts as one of its prompt's."""
    if pair.chosen == pair.rejected:
        return "identical"
    if empty == "drop" and not (said(pair.chosen) and said(pair.rejected)):
        return "an empty response"
    if max_pairs is not None:
        key = blake2b(json.dumps(pair.prompt).encode(), digest_size=16).digest()
        of_prompt[key] += 1
        if of_prompt[key] > max_pairs:
            return "more than max_pairs"
    return None


def said(turns: Turns) -> str:
    """What the model says in these turns."""
    return "".join(turn.content for turn in turns if turn.role in SPOKEN).strip()


def check_pairing(
    pairing: str, max_pairs: int | None, min_gap: float, ties: str, empty: str = "keep"
) -> None:
    """InputError for settings that `pair_items` does not take."""
    if pairing not in PAIRINGS:
        raise InputError(f"pairing is {pairing!r}; it is one of {', '.join(PAIRINGS)}")
    if not 0 <= min_gap < math.inf:
        raise InputError(f"min_gap is {min_gap!r}; it must be a number of at least 0")
    if max_pairs is not None and max_pairs < 1:
        raise InputError(f"max_pairs is {max_pairs!r}; it must be at least 1, or None for all")
    if ties not in TIES:
        raise InputError(f"ties={ties!r} is not one of {', '.join(TIES)}.")
    if empty not in EMPTY:
        raise InputError(f"empty={empty!r} is not one of {', '.join(EMPTY)}.")


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
    every other, "adjacent" each against the next best, "all" every two against each other. Equal
    scores make no pair (``ties`` "drop"), one whose ``preference`` is 0.5 ("soft"), or one in which
    the first response counts as chosen ("keep"); any other gap below ``min_gap`` makes none either.
    Of more than ``max_pairs`` those with the largest gaps stay. ``Pair.margin`` is the gap. Among
    equally good responses the first is the best (the worst) one, and of those that are the same
    text the first stands for all; those whose score is NaN are left out. What two responses have in
    common before they part becomes prompt.
    """
    check_pairing(pairing, max_pairs, min_gap, ties)
    responses, scores = candidates.responses, candidates.scores
    if len(responses) != len(scores) or any(map(math.isinf, scores)):
        raise ValueError("every response needs one score, finite or NaN")
    rated = [i for i, score in enumerate(scores) if not math.isnan(score)]
    if len(rated) < 2:
        return Paired([], [], {"fewer than two responses with a score": 1})
    first: dict[tuple[Message, ...], int] = {}
    for i in rated:
        first.setdefault(tuple(responses[i]), i)
    ranked = sorted(first.values(), key=lambda i: -scores[i])  # stable: equals in their order
    if len(ranked) < 2:
        return Paired([], [], {"all responses are the same text": 1})
    made: list[tuple[Pair, tuple[int, int]]] = []
    dropped = Counter[str]()
    if len(rated) < len(scores):
        dropped["a response has no score"] = len(scores) - len(rated)
    for two in _comparisons(ranked, scores, pairing):
        pair = _pair(candidates, *two, ties, min_gap)
        if isinstance(pair, str):
            dropped[pair] += 1
        else:
            made.append((pair, two))
    if max_pairs is not None and len(made) > max_pairs:
        dropped["more than max_pairs"] += len(made) - max_pairs
        widest = sorted(range(len(made)), key=lambda i: -(made[i][0].margin or 0))[:max_pairs]
        made = [made[i] for i in sorted(widest)]
    return Paired([pair for pair, _ in made], [two for _, two in made], dict(dropped))


def _pair(
    candidates: Candidates, chosen: int, rejected: int, ties: str, min_gap: float
) -> Pair | str:
    """The pair of two responses, or why they make none."""
    gap = candidates.scores[chosen] - candidates.scores[rejected]
    soft = gap == 0 and ties == "soft"
    if gap == 0 and ties == "drop":
        return "tie"
    if gap < min_gap and not soft:
        return "gap below min_gap"
    sides = [candidates.responses[i] for i in (chosen, rejected)]
    shared = part(*sides) if min(map(len, sides)) > 1 else []
    if shared is None:
        return "contexts differ"
    prompt, (good, bad) = candidates.prompt + shared, (side[len(shared) :] for side in sides)
    preference = 0.5 if soft else 1.0
    return Pair(prompt, good, bad, float(gap), candidates.source, preference=preference)


def _comparisons(ranked: list[int], scores: list[float], pairing: str) -> list[tuple[int, int]]:
    """(better, worse) of responses that are ranked best first."""
    if pairing == "best_worst":
        return [(ranked[0], next(i for i in ranked[1:] if scores[i] == scores[ranked[-1]]))]
    if pairing == "best_rest":
        return [(ranked[0], i) for i in ranked[1:]]
    return list(pairwise(ranked) if pairing == "adjacent" else combinations(ranked, 2))
