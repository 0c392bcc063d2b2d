"""Prompts that stand in several places: in other pairs, in held-out data, in a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from prefopt.data.audit.facts import Facts, prompt_text, text_key
from prefopt.data.audit.findings import Book
from prefopt.data.audit.labels import repeats
from prefopt.data.audit.near import Ngrams, band_keys, neighbours
from prefopt.data.prompts import Prompts
from prefopt.data.sources import Preferences
from prefopt.data.split import split_pairs


class HeldOut(NamedTuple):
    """Prompts to keep apart from the pairs: what they are, and a sequence with `where`."""

    name: str
    prompts: Preferences | Prompts


def note_prompts(book: Book, facts: Facts) -> None:
    """Prompts of several pairs, and those that are nearly the same as an earlier one."""
    book.note("duplicate prompts", repeats(facts.group))
    own = _Prompts(book.pairs, facts.distinct)
    found = neighbours(facts.bands, own.text)
    near = _mask(found, len(facts.distinct))[facts.group] & ~repeats(facts.group)
    book.note("near-duplicate prompts", near, like=lambda i: own.where(found[facts.group[i]]))


def note_held_out(book: Book, facts: Facts, held_out: HeldOut | None, fraction: float) -> str:
    """Prompts that stand on both sides, and those that nearly do; what was held out."""
    pairs, mine = book.pairs, len(facts.distinct)
    own = _Prompts(pairs, facts.distinct)
    bands, texts, name = facts.bands, facts.texts, "nothing"
    held = np.zeros(mine, bool)
    other = own
    if held_out is not None:
        name, records = held_out
        name, other = f"{name}, {len(records):,} prompts", _Prompts(records, range(len(records)))
        theirs = [(band_keys(text), text_key(text)) for text in map(other.text, other.at)]
        bands = np.concatenate([bands, np.array([keys for keys, _ in theirs])])
        texts = np.concatenate([texts, np.array([key for _, key in theirs], np.uint64)])
        held = np.arange(len(texts)) >= mine
    elif fraction:
        name = f"{fraction:.0%} of the prompts, by their hash, as in training"
        held[facts.group[split_pairs(pairs, fraction)[1]]] = True
    start = mine if held_out is not None else 0  # of the other's prompts among all
    near = neighbours(bands, lambda d: own.text(d) if d < mine else other.text(d - start), held)
    # Training holds out by the whole prompt, so the same words in other letters are a near miss.
    same = np.isin(texts, texts[held]) & ~held if held_out else np.zeros(len(texts), bool)
    near = {d: j for d, j in near.items() if not same[d]}
    equal = {
        d: int(np.flatnonzero(held & (texts == texts[d]))[0]) for d in np.flatnonzero(same).tolist()
    }
    for check, found in (
        ("held-out prompts", equal),
        ("near-duplicates of held-out prompts", near),
    ):
        hit = _mask(found, len(held))[:mine][facts.group]
        like = {d: other.where(j - start) for d, j in found.items()}
        book.note(check, hit, like=lambda i, like=like: like[facts.group[i]])
    return name


def note_benchmarks(book: Book, facts: Facts, benchmarks: Sequence[Prompts]) -> None:
    """Prompts that `benchmarks` hold too; `facts` were gathered with their `benchmark_index`."""
    where = [benchmark.where(i) for benchmark in benchmarks for i in range(len(benchmark))]
    inside = facts.overlap[:, 0] >= 0
    exact = inside & (facts.overlap[:, 1] == 1)

    def like(i: int) -> str:
        return where[facts.overlap[i, 0]]

    book.note("benchmark prompts", exact, like=like)
    book.note("overlap with a benchmark", inside & ~exact, like=like)


def benchmark_index(benchmarks: Sequence[Prompts]) -> Ngrams | None:
    """All prompts of all benchmarks, to look up whether a text holds one of them."""
    if not benchmarks:
        return None
    return Ngrams(prompt_text(prompt) for benchmark in benchmarks for prompt in benchmark)


class _Prompts(NamedTuple):
    """Some prompts of a source: what they ask and where they stand."""

    source: Preferences | Prompts
    at: Sequence[int] | np.ndarray

    def text(self, d: int) -> str:
        record: Any = self.source[self.at[d]]
        return prompt_text(getattr(record, "prompt", record))

    def where(self, d: int) -> str:
        return self.source.where(self.at[d])


def _mask(found: dict[int, int], size: int) -> np.ndarray:
    out = np.zeros(size, bool)
    out[list(found)] = True
    return out
