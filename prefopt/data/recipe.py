"""How records are encoded, and what comes of some of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from prefopt.data.tokens import TextTokenizer


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
