"""Which shape the rows of a source have, and which of its columns is which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from prefopt.data.columns import (
    Columns,
    Keys,
    apply_columns,
    check_columns,
    check_rivals,
    resolve,
    within,
)
from prefopt.data.columns import nearest as nearest
from prefopt.data.files import Row
from prefopt.data.readers import Unreadable
from prefopt.data.schemas.base import CHOICES, PAIRS, RATED, Item, Noted, RowDict, Schema
from prefopt.data.schemas.choices import CHOICE_SCHEMAS, SIDES
from prefopt.data.schemas.grouped import GROUPED_SCHEMAS
from prefopt.data.schemas.lists import LIST_SCHEMAS
from prefopt.data.schemas.pairs import PAIR_SCHEMAS
from prefopt.errors import InputError

SAMPLE = 64  # rows looked at to decide the schema
LABELS = ("source", "margin")  # canonical columns that hold no text
SCHEMAS = [*PAIR_SCHEMAS, *CHOICE_SCHEMAS, *LIST_SCHEMAS, *GROUPED_SCHEMAS]


class Decision(NamedTuple):
    """The schema a source is read with, why, and under which names it has the canonical columns."""

    schema: Schema
    reason: str
    columns: dict[str, str | None]


class _Fit(NamedTuple):
    schema: Schema
    columns: dict[str, str | None]
    read: frozenset[int]  # which rows of the sample

    @property
    def votes(self) -> int:
        return len(self.read)


def detect(
    sample: Sequence[RowDict],
    columns: Columns,
    name: str,
    schemas: Sequence[Schema] = SCHEMAS,
    unfit: Callable[[Sequence[RowDict], Columns, Keys, str], str] | None = None,
) -> Decision:
    """Which schema reads these rows, by vote over the sample (the first rows of source `name`).

    Only schemas that read all that `columns` names count. Of those that read at least half as many
    rows as any does, some of them the same, the ones of the lowest level count, and of these the
    one that reads most.
    `unfit` says of (sample, columns, keys, name) what is missing where no schema fits any row.
    Raises InputError for that, when `columns` names what is not there, when the names leave open
    which columns are meant, and when another schema reads as many rows, but not the same ones.
    """
    keys = Counter(str(key) for row in sample for key in row)
    canonical = list(dict.fromkeys(key for schema in schemas for key in schema.names))
    columns = within(columns, keys, sample)
    check_columns(columns, keys, name, canonical)
    asked = {key for key, column in columns.items() if column is not None}
    able = [schema for schema in schemas if asked <= schema.names.keys()]
    fits = [fit for schema in able if (fit := _fit(schema, sample, keys, columns))]
    if not fits:
        raise InputError((unfit or _nothing_fits)(sample, columns, keys, name))
    most = max(fit.votes for fit in fits)
    widest = frozenset[int]().union(*(fit.read for fit in fits if fit.votes == most))
    fits = [fit for fit in fits if 2 * fit.votes >= most and fit.read & widest]
    _check_levels(fits, name)
    lowest = min(fit.schema.level for fit in fits)
    every, fits = fits, [fit for fit in fits if fit.schema.level == lowest]
    most = max(fit.votes for fit in fits)
    best, *others = [fit for fit in fits if fit.votes == most]
    others += [fit for fit in every if fit.votes == most and fit.read.isdisjoint(best.read)]
    if others:
        raise InputError(_two_fit(best, others[0], name))
    schema, found, _ = best
    check_rivals(schema, keys, columns, name)
    _check_refused(schema, sample, found, columns, name)
    looked = f"{most} of the first {len(sample)} rows" if len(sample) > 1 else "the only row"
    renamed = [f"{key!r} from {col!r}" for key, col in found.items() if col and col != key]
    how = f"{schema.how}; {', '.join(renamed)}" if renamed else schema.how
    return Decision(schema, f"{how} (so in {looked})", found)


def _fit(schema: Schema, sample: Sequence[RowDict], keys: Keys, columns: Columns) -> _Fit | None:
    """The columns that the schema reads and how many rows of the sample it does; None for none."""
    found = resolve(schema, keys, columns)
    if any(found.get(key) is None for key in schema.needs):
        return None
    read = [i for i, row in enumerate(sample) if schema.fits(apply_columns(row, found))]
    return _Fit(schema, found, frozenset(read)) if read else None


def _two_fit(a: _Fit, b: _Fit, source: str) -> str:
    """What to do where two schemas read equally many rows, other ones or the same."""
    a, b = sorted((a, b), key=lambda fit: min(fit.read))
    kinds = f"({a.schema.name} and {b.schema.name})"
    if a.read.isdisjoint(b.read):
        return f"{source!r} mixes rows of several kinds {kinds}: separate them."
    ways = []
    for one, other in ((a, b), (b, a)):
        own = [key for key in one.schema.needs if key not in other.schema.needs]
        ways += [f"columns={{{key!r}: None}}" for key in own[:1]]
    return f"The rows of {source!r} can be read in two ways {kinds}: hide one with " + (
        " or ".join(ways) or "columns="
    )


def _check_levels(fits: Sequence[_Fit], source: str) -> None:
    """InputError where columns that name the chosen response stand beside two responses with a
    verdict: nothing says that both mean the same."""
    pairs = [fit.columns for fit in fits if fit.schema.level == PAIRS]
    choices = [fit for fit in fits if fit.schema.level in (CHOICES, RATED)]
    if pairs and choices:
        others = "/".join(repr(choices[0].columns[key]) for key in choices[0].schema.needs)
        sides = {key: pairs[0][key] for key in ("chosen", "rejected")}
        raise InputError(
            f"In {source!r}, {'/'.join(map(repr, sides.values()))} and {others} may both say which "
            f"response is the better one: pass columns={sides} to read the first, or "
            "columns={'chosen': None} for the others."
        )


def _check_refused(
    schema: Schema, sample: Sequence[RowDict], found: Columns, columns: Columns, source: str
) -> None:
    """InputError where the schema does not trust these rows."""
    if schema.refuse is None:
        return
    rows = [apply_columns(row, found) for row in sample]
    if why := schema.refuse(rows, columns.keys()):
        why = why.replace("'...'", repr(found[schema.needs[-1]]))
        raise InputError(f"In {source!r}, {why}.")


def converted(rows: Iterator[Row], decision: Decision) -> Iterator[Item]:
    """What the schema makes of the rows."""
    schema, columns = decision.schema, decision.columns
    read = {*columns, *columns.values()} - {*LABELS, *(columns.get(key) for key in LABELS)}
    unreadable: list[Item] = []

    def readable() -> Iterator[Row]:
        for where, row in rows:
            if isinstance(row, Unreadable):
                unreadable.append(Item(where, row.reason))
            else:
                yield where, apply_columns(row, columns)

    if schema.gather is not None:
        yield from schema.gather(readable())
    else:
        for where, row in readable():
            absent = next((key for key in schema.needs if row.get(key) is None), None)
            if absent is not None:
                name = columns.get(absent) or absent
                yield Item(where, f"{name!r} is {'null' if absent in row else 'missing'}")
                continue
            made = schema.convert(row)
            rest = {key: value for key, value in row.items() if key not in read}
            if isinstance(made, Noted):
                yield Item(where, made.record, note=made.note, rest=rest)
            else:
                yield Item(where, made, rest=rest)
    yield from unreadable


def _nothing_fits(sample: Sequence[RowDict], columns: Columns, keys: Keys, source: str) -> str:
    """What the rows have, what they would need, and a `columns=` where the names suggest one."""
    for schema in CHOICE_SCHEMAS:
        found = resolve(schema, keys, columns)
        mapped = (apply_columns(row, found) for row in sample)
        whole = (row for row in mapped if all(row.get(key) is not None for key in schema.needs))
        if (row := next(whole, None)) is not None:
            why = schema.convert(row)
            if isinstance(why, str):
                shown = ", ".join(repr(found[key]) for key in schema.needs)
                why = why.replace("'...'", repr(found[schema.needs[-1]]))
                return f"In {source!r}, {shown} cannot be read as {schema.name}: {why}."
    found = resolve(CHOICE_SCHEMAS[0], keys, columns)
    if all(found.get(key) is not None for key in SIDES):
        two = " and ".join(repr(found[key]) for key in SIDES)
        return (
            f"In {source!r}, {two} look like two responses, but no column says which is better: "
            "pass columns={'winner': ...} (a text: a, b, tie), {'choice': ...} (the better one's "
            "index from 0) or {'strength': ...} (below 0: the first is better). Found "
            f"{', '.join(keys)}."
        )
    found = resolve(LIST_SCHEMAS[0], keys, columns)
    if any(isinstance(row.get(found.get("responses") or ""), list) for row in sample):
        lacks, ways = "no column holds the prompt", "{'prompt': ...}"
        if found.get("prompt") is not None:
            lacks = "neither it nor another column says which response is better"
            ways = "{'scores': ...} (more is better) or {'ranks': ...} (the smallest is the best)"
        return (
            f"In {source!r}, {found['responses']!r} is a list, of responses perhaps, but {lacks}: "
            f"pass columns={ways}. Found {', '.join(keys)}."
        )
    schema = PAIR_SCHEMAS[0]
    found = resolve(schema, keys, columns)
    missing = [key for key in ("chosen", "rejected") if found.get(key) is None]
    missing = [key for key in missing if columns.get(key, key) not in keys] or missing
    rows = [apply_columns(row, found) for row in sample]
    texts = any(isinstance(row.get("chosen"), str) for row in rows)
    if not missing and found.get("prompt") is None and texts:
        missing = ["prompt"]
    if not missing:
        row = rows[0]
        kinds = ", ".join(
            f"{key!r} is {type(row[key]).__name__}"
            for key in ("prompt", "chosen", "rejected")
            if key in row
        )
        return f"'chosen' and 'rejected' of {source!r} must be text or message lists, but {kinds}."
    return (
        f"The rows of {source!r} lack {' and '.join(map(repr, missing))}: found "
        f"{', '.join(keys) or 'no column'}; needed are 'prompt', 'chosen' and 'rejected' "
        "('prompt' only where the other two are not whole conversations), two responses with a "
        "verdict, or a list of responses with scores or ranks; map other names with "
        f"columns={dict.fromkeys(missing, '...')}."
    )
