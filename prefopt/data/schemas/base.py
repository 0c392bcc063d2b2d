"""The shapes preference rows come in, and how each becomes a record.

A shape is a `Schema`: what its columns may be called, a test of whether one row has its shape, and
a function that makes a record of a row or says why the row is dropped. To support another shape,
write one small function and append a `Schema` to one of the lists that `detect.SCHEMAS` joins.

A `Schema` reads rows under canonical names, whatever the source calls its columns: `detect` finds
out which column is which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from prefopt.data.files import Row
from prefopt.data.records import Candidates, Pair

RowDict = dict[str, Any]

# Levels: where rows have several of these shapes, the first is meant. CHOICES have a verdict beside
# two responses, RATED only a score for each.
PAIRS, CHOICES, RATED, LISTS, TREES, SCORED, LABELLED = range(7)

# Canonical name -> what it is called elsewhere, best known first. Of one schema only.
Names = Mapping[str, tuple[str, ...]]

PROMPTS = ("prompt", "instruction", "question", "input", "history", "context", "query")
ABOUT: Names = {
    "input": (),  # stands below an `instruction`
    "system": ("system", "system_prompt"),
    "margin": (),
    "source": (),
    "tools": (),
}


class Within(str):
    """In the place of a column's values: the key of the objects in another column that hold them
    (the `overall_score` of each response, say)."""


class Item(NamedTuple):
    """What `rows` rows, the first of them at `where`, make: one record or several, or why there is
    none."""

    where: str
    record: Pair | Candidates | list[Candidates] | str
    rows: int = 1
    note: str | None = None  # a fact about a row that drops nothing; the report counts them
    rest: RowDict | None = None  # of a row: the columns that no text was read from


class Noted(NamedTuple):
    """A record that a row makes, and the note for its `Item`."""

    record: Pair | Candidates
    note: str


class Schema(NamedTuple):
    """One shape of rows.

    `level`: where two shapes fit, the one with the lower level is meant; of two with the same it is
    not known. `names`: canonical names that it reads, and what they may be called; `needs`: those
    that it cannot do without. `gather`, of shapes in which several rows make one record: turns all
    rows into items (then `convert` is not called). `together`: canonical names whose columns are
    called alike, so that only the n-th names of all of them go together. `refuse` says why rows of
    this shape are not to be read: of a sample, and the canonical names that `columns` settles;
    '...' in it stands for the column of the last of `needs`.
    """

    name: str
    level: int
    names: Names
    needs: tuple[str, ...]
    how: str  # one clause for the report: where prompt and responses come from
    fits: Callable[[RowDict], bool]
    convert: Callable[[RowDict], Any]  # a record, a Noted one, or why the row is dropped
    gather: Callable[[Iterator[Row]], Iterator[Item]] | None = None
    together: tuple[tuple[str, ...], ...] = ()
    refuse: Callable[[Sequence[RowDict], Collection[str]], str | None] | None = None


# --- shared by the schemas ---------------------------------------------------------------------


def strings(row: RowDict, *keys: str) -> bool:
    return all(isinstance(row.get(key), str) for key in keys)


def wrong_type(row: RowDict, *keys: str) -> str:
    wrong = [key for key in keys if not isinstance(row[key], str)]
    return ", ".join(f"{key!r} is {type(row[key]).__name__}, not text" for key in wrong)


def number(value: Any) -> float | None:
    """A finite number (no bool), or a text that is one, as float."""
    if isinstance(value, str):
        try:
            value = float(value) if len(value) < 400 else None
        except ValueError:
            return None
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return float(value) if usable and math.isfinite(value) else None
    except OverflowError:
        return None


def source_of(row: RowDict) -> str | None:
    return row["source"] if isinstance(row.get("source"), str) else None
