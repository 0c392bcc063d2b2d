"""Which comparisons the labels of pairs contradict, repeat or leave open."""

from __future__ import annotations

import numpy as np

from prefopt.data.audit.facts import Facts
from prefopt.data.audit.findings import Book


def note_labels(book: Book, facts: Facts, ties: str) -> None:
    """Ties, conflicts, duplicates and ratings; `ties`: what becomes of ties in a cleaned copy."""
    use = decided(facts)
    tied = ~use
    book.note("ties", tied, drop=tied if ties == "drop" else np.zeros_like(tied))
    book.note("ratings against the label", use & (facts.margin < 0))
    low, high = np.minimum(facts.chosen, facts.rejected), np.maximum(facts.chosen, facts.rejected)
    same = groups(facts.prompt, low, high)
    # The probability that the response with the lower hash is the better one.
    odds = np.where(facts.chosen == low, facts.preference, 1 - facts.preference).round(9)
    book.note("duplicate pairs", repeats(groups(same, odds)))
    ups, downs = (np.bincount(same, weights=side)[same] for side in (odds > 0.5, odds < 0.5))
    conflict = use & (ups > 0) & (downs > 0)
    minority = conflict & ((ups == downs) | ((odds > 0.5) != (ups > downs)))
    book.note("conflicting labels", conflict, drop=minority)
    book.note("chosen here, rejected there", _both_ways(facts, use & ~conflict))


def decided(facts: Facts) -> np.ndarray:
    """Which pairs are no ties, [n] bool."""
    return facts.preference != 0.5


def _both_ways(facts: Facts, use: np.ndarray) -> np.ndarray:
    """Which of the pairs of `use` [n] have a response that wins in one of them and loses in
    another."""
    n, flipped = len(use), facts.preference < 0.5
    better = np.where(flipped, facts.rejected, facts.chosen)
    worse = np.where(flipped, facts.chosen, facts.rejected)
    sides = groups(np.tile(facts.prompt, 2), np.concatenate([better, worse]))
    won, lost = (np.bincount(sides[part], weights=use, minlength=2 * n)[sides] > 0
                 for part in (slice(n), slice(n, None)))  # fmt: skip
    both = won & lost
    return use & (both[:n] | both[n:])


def groups(*columns: np.ndarray) -> np.ndarray:
    """[n] -> [n]: the number of the distinct row that each row of these columns is."""
    out = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        _, own = np.unique(column, return_inverse=True)
        _, out = np.unique(out * (own.max(initial=0) + 1) + own, return_inverse=True)
    return out


def repeats(groups: np.ndarray) -> np.ndarray:
    """Which rows are of a group that an earlier row is of."""
    again = np.ones(len(groups), bool)
    again[np.unique(groups, return_index=True)[1]] = False
    return again
