"""Texts that are nearly the same: MinHash with banding for duplicates, word n-grams for overlap.

Near-duplicates are found by their character shingles, so that any language will do: banding
(Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3) proposes, the exact Jaccard
similarity decides. So nothing is called a near-duplicate that is none; one is overlooked with the
probability (1 - s^6)^20 at similarity s: 0.2% at the threshold of 0.8, less above.

Overlap with a benchmark is asymmetric, a question may stand inside a longer prompt: it is the share
of the question's word 8-grams that the prompt holds, at least 0.7 as for PaLM (Chowdhery et al.,
2022, section 8). 13-grams, as for GPT-3, do not see questions of fewer than 13 words.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache
from hashlib import blake2b
from heapq import nsmallest
from typing import NamedTuple
from zlib import crc32

import numpy as np

SHINGLE = 5  # characters
SIMILAR = 0.8  # Jaccard similarity from which on two texts are near-duplicates
BANDS, WIDTH = 20, 6  # of MinHash values
NGRAM = 8  # words
CONTAINED = 0.7  # share of a benchmark text's n-grams from which on it counts as contained
BUCKET, COMPARED = 64, 16  # most texts of one bucket, and of all, that a text is compared with
_BLOCK = 4096  # shingles hashed at a time

_random = np.random.default_rng(20)
_FACTORS = _random.integers(0, 2**31, BANDS * WIDTH, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
_SHIFTS = _random.integers(0, 2**32, BANDS * WIDTH, dtype=np.uint32)
_PRIME = np.uint64(0x9E3779B97F4A7C15)
# A word, or one character of the scripts that put no spaces between words.
_UNSPACED = "\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")


def plain(text: str) -> str:
    """The text without what does not make it another one: case, white space, Unicode forms."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def shingles(text: str) -> np.ndarray:
    """Hashes uint64 of the character 5-grams of `plain` text, sorted, each once; of a shorter text
    the one of its whole, of an empty one none."""
    return np.unique(_grams(_letters(text), SHINGLE))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Size of the intersection over size of the union of two sorted sets; of empty ones 0."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    union = len(a) + len(b) - shared
    return shared / union if union else 0.0


def band_keys(text: str) -> np.ndarray:
    """[BANDS] uint64: texts that agree in one of them are worth comparing. 160 bytes a text."""
    hashes = (_grams(_letters(text), SHINGLE) >> np.uint64(32)).astype(np.uint32)
    least = np.full(BANDS * WIDTH, 2**32 - 1, dtype=np.uint32)
    for start in range(0, len(hashes), _BLOCK):
        block = hashes[start : start + _BLOCK, None] * _FACTORS + _SHIFTS
        np.minimum(least, block.min(axis=0), out=least)
    return _fold(least.reshape(BANDS, WIDTH).T.astype(np.uint64))


def neighbours(
    keys: np.ndarray, text: Callable[[int], str], held: np.ndarray | None = None
) -> dict[int, int]:
    """i -> a text j of similarity >= SIMILAR, for texts whose `band_keys` are keys [n, BANDS].

    j is an earlier text than i. With held [n] bool, i is one that is not held and j one that is.
    Of the first BUCKET texts in each of its buckets, a text is compared with the COMPARED that it
    shares most buckets with: that bounds the work where thousands have much in common.
    """
    found: dict[int, int] = {}
    if not len(keys):
        return found
    shingled = lru_cache(maxsize=4096)(lambda i: shingles(text(i)))
    buckets = [_buckets(column, held) for column in keys.T]
    several = np.add.reduce([last - first for _, first, last in buckets])
    several -= BANDS if held is None else 0  # every text shares its buckets with itself
    for i in np.flatnonzero(several > 0).tolist():
        if held is not None and held[i]:
            continue
        shared: Counter[int] = Counter()
        for order, first, last in buckets:
            for j in order[first[i] : min(last[i], first[i] + BUCKET)].tolist():
                if held is None and j >= i:
                    break
                shared[j] += 1
        closest = nsmallest(COMPARED, shared.items(), key=lambda item: (-item[1], item[0]))
        for j, _ in closest:
            if jaccard(shingled(i), shingled(j)) >= SIMILAR:
                found[i] = j
                break
    return found


def _buckets(
    column: np.ndarray, held: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(texts in the order of their keys, and for each text where in there its own bucket begins and
    ends); with `held` only these are in the buckets."""
    members = np.arange(len(column)) if held is None else np.flatnonzero(held)
    order = members[np.argsort(column[members], kind="stable")]
    ranked = column[order]
    return order, np.searchsorted(ranked, column, "left"), np.searchsorted(ranked, column, "right")


# --- overlap -----------------------------------------------------------------------------------


class Overlap(NamedTuple):
    """The text of an index that another text holds, and how much of it: 1 where they are equal."""

    item: int
    share: float
    exact: bool


class Ngrams:
    """Texts to find inside others, by their words."""

    def __init__(self, texts: Iterable[str]):
        self._exact: dict[bytes, int] = {}
        sizes, grams = [], [np.empty(0, np.uint64)]
        for i, text in enumerate(texts):
            words = _words(text)
            self._exact.setdefault(_whole(words), i)
            own = np.unique(_grams(words, NGRAM)) if len(words) >= NGRAM else grams[0]
            sizes.append(len(own))
            grams.append(own)
        owners = np.repeat(np.arange(len(sizes)), sizes)
        hashes = np.concatenate(grams)
        order = np.argsort(hashes, kind="stable")
        self._grams, self._owners, self._sizes = hashes[order], owners[order], np.array(sizes)

    def inside(self, text: str) -> Overlap | None:
        """The text that this one equals word for word, or of whose word 8-grams it holds the
        largest share, if that is at least CONTAINED."""
        words = _words(text)
        if len(words) and (item := self._exact.get(_whole(words))) is not None:
            return Overlap(item, 1.0, True)
        if len(words) < NGRAM or not len(self._grams):
            return None
        own = np.unique(_grams(words, NGRAM))
        first, last = (np.searchsorted(self._grams, own, side) for side in ("left", "right"))
        hits = np.flatnonzero(last > first)
        if not len(hits):
            return None
        owners = np.concatenate([self._owners[first[k] : last[k]] for k in hits])
        items, counts = np.unique(owners, return_counts=True)
        shares = counts / self._sizes[items]
        best = int(shares.argmax())
        if shares[best] < CONTAINED:
            return None
        return Overlap(int(items[best]), float(shares[best]), False)


# --- hashes ------------------------------------------------------------------------------------


def _letters(text: str) -> np.ndarray:
    """Code points of the plain text."""
    return np.frombuffer(plain(text).encode("utf-32-le", "surrogatepass"), np.uint32)


def _words(text: str) -> np.ndarray:
    found = _WORD.findall(plain(text))
    return np.array([crc32(word.encode("utf-8", "surrogatepass")) for word in found], np.uint32)


def _whole(words: np.ndarray) -> bytes:
    return blake2b(words.tobytes(), digest_size=8).digest()


def _grams(codes: np.ndarray, size: int) -> np.ndarray:
    """uint64 hashes of all runs of `size` codes; of fewer codes the one of all."""
    size = min(size, len(codes))
    count = len(codes) - size + 1
    wide = codes.astype(np.uint64)
    return _fold(np.stack([wide[k : k + count] for k in range(size)])) if size else wide


def _fold(rows: np.ndarray) -> np.ndarray:
    """[k, n] uint64 -> [n]: one well-mixed hash a column."""
    out = np.full(rows.shape[1], len(rows), dtype=np.uint64)
    for row in rows:
        out = (out ^ row) * _PRIME
        out ^= out >> np.uint64(29)
    out *= np.uint64(0xBF58476D1CE4E5B9)
    return out ^ (out >> np.uint64(32))
