"""Records to encoded groups, a chunk at a time: in memory there is never more than a few chunks.

A chunk is encoded by a function of its records, the tokenizer and a recipe, and of nothing else: so
it does not matter in which process, and what was encoded once can be found again (token_cache.py).
Order and bytes are the same for any number of workers, with a cache and without.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prefopt.data.encoded import EncodedSet
from prefopt.data.recipe import Chunk, Encode, Recipe
from prefopt.data.template import choose_template
from prefopt.data.tokens import TextTokenizer
from prefopt.data.workers import Worker, worth_it
from prefopt.errors import InputError

if TYPE_CHECKING:
    from prefopt.data.token_cache import TokenCache

CHUNK = 512  # records


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
        from prefopt.data.token_cache import open_cache

        store = open_cache(cache, tokenizer, recipe, encode)
    here = TextTokenizer(tokenizer, recipe.template)
    count = worth_it(records, tokenizer) if workers is None else workers
    idle: list[Worker] = []
    busy: deque[_Task] = deque()  # in order; with at most `count` chunks in work

    def done(task: _Task) -> tuple[int, Chunk]:
        chunk = task.chunk
        if chunk is None:
            chunk = (
                encode(task.records, here, recipe) if task.worker is None else task.worker.result()
            )
            if task.worker:
                idle.append(task.worker)
            if store and task.path:
                store.write(task.path, chunk)
        return task.start, chunk

    everyone: list[Worker] = []
    try:
        for task in _tasks(records, store):
            if task.chunk is None and count:
                if len(everyone) < count:
                    everyone.append(Worker(encode, tokenizer, recipe))
                    idle.append(everyone[-1])
                while not idle:
                    yield done(busy.popleft())
                task.worker = idle.pop()
                task.worker.send(task.records)
            busy.append(task)
            while len(busy) > count:
                yield done(busy.popleft())
        while busy:
            yield done(busy.popleft())
    finally:
        for worker in everyone:
            worker.stop()


@dataclass
class _Task:
    """A chunk to come: the row of its first record, its records, and itself if it was kept."""

    start: int
    records: list[Any]
    path: Path | None  # where to keep it
    chunk: Chunk | None
    worker: Worker | None = None


def _tasks(records: Iterable[Any], store: TokenCache | None) -> Iterator[_Task]:
    rows, start = iter(records), 0
    while part := list(islice(rows, CHUNK)):
        path = store.name(part) if store else None
        yield _Task(start, part, path, store.read(path) if store and path else None)
        start += len(part)
