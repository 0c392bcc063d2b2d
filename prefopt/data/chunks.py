"""Records to encoded groups, a chunk at a time: in memory there is never more than a few chunks.

A chunk is encoded by a function of its records, the tokenizer and a recipe, and of nothing else: so
it does not matter in which process, and what was encoded once can be found again (token_cache.py).
Order and bytes are the same for any number of workers, with a cache and without.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prefopt.data.encoded import EncodedSet
from prefopt.data.template import choose_template
from prefopt.data.tokens import TextTokenizer
from prefopt.errors import InputError

CHUNK = 512  # records


class Recipe(NamedTuple):
    """What besides record and tokenizer decides the tokens; `unit` is what a record is called."""

    unit: str
    template: str
    max_length: int
    loss_on: str = "assistant"


class Chunk(NamedTuple):
    """Of consecutive records: the rows of those that are left, counted from the first of them, what
    `to_record` made of each, the lengths of all prompts in tokens, and counts as of EncodedSet."""

    rows: list[int]
    records: list[bytes]
    prompts: list[int]
    counts: Counter[str]

    @classmethod
    def new(cls) -> Chunk:
        return cls([], [], [], Counter())

    def add(self, row: int, record: bytes) -> None:
        self.rows.append(row)
        self.records.append(record)


Encode = Callable[[Sequence[Any], TextTokenizer, Recipe], Chunk]


def encode_records(
    records: Iterable[Any],
    tokenizer: Any,
    recipe: Recipe,
    encode: Encode,
    *,
    cache: Path | None = None,
    workers: int | None = None,
) -> EncodedSet:
    """All records, encoded by the function, which stands in a module; see encode_pairs."""
    check_limits(tokenizer, recipe.max_length)
    template = choose_template(tokenizer, recipe.template)
    recipe = recipe._replace(template=template.name)
    counts: Counter[str] = Counter(truncated=0)
    encoded, prompts = EncodedSet(template=str(template)), array("I")
    for start, chunk in _chunks(records, tokenizer, recipe, encode, cache, workers):
        counts.update(chunk.counts)
        prompts.extend(chunk.prompts)
        for row, record in zip(chunk.rows, chunk.records, strict=True):
            encoded.add(start + row, record)
    counts = Counter({key: int(n) for key, n in counts.items() if n or key == "truncated"})
    if not len(encoded):
        raise InputError(nothing_left(counts, prompts, recipe.max_length, recipe.unit))
    encoded.counts = dict(counts)
    return encoded


def check_limits(tokenizer: Any, max_length: int) -> None:
    """InputError where no prompt with a response that ends could be encoded."""
    if max_length < 2:
        raise InputError(f"max_length={max_length} leaves no room for a prompt and a response.")
    if tokenizer.eos_token_id is None:
        raise InputError(
            "The tokenizer has no EOS token, so no response could end: set eos_token in the model "
            "folder's tokenizer_config.json."
        )


def nothing_left(
    counts: Counter[str], prompt_lengths: Sequence[int], max_length: int, unit: str = "pair"
) -> str:
    """Why encoding left nothing, and which max_length would."""
    dropped = {k.removeprefix("dropped: "): n for k, n in counts.items() if k.startswith("dropped")}
    if not dropped:
        return f"There are no {unit}s to encode."
    reasons = ", ".join(f"{reason} ({count:,})" for reason, count in dropped.items())
    message = f"No {unit} is left after encoding with max_length={max_length}: {reasons}"
    if not any("max_length" in reason or "truncation" in reason for reason in dropped):
        return f"{message}."
    longest, median = max(prompt_lengths), int(np.median(prompt_lengths))
    return (
        f"{message}; the longest prompt has {longest:,} tokens, the median one {median:,}: set "
        f"max_length well above {median:,}."
    )


def _chunks(
    records: Iterable[Any],
    tokenizer: Any,
    recipe: Recipe,
    encode: Encode,
    cache: Path | None,
    workers: int | None,
) -> Iterator[tuple[int, Chunk]]:
    """(row of its first record, chunk), in the order of the records."""
    store = None
    if cache is not None:
        from prefopt.data.token_cache import TokenCache

        store = TokenCache.of(cache, tokenizer, recipe, encode)
    here = TextTokenizer(tokenizer, recipe.template)
    rows, start = iter(records), 0
    while part := list(islice(rows, CHUNK)):
        chunk = store.read(part) if store else None
        if chunk is None:
            chunk = encode(part, here, recipe)
            if store:
                store.write(part, chunk)
        yield start, chunk
        start += len(part)
