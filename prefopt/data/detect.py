"""Which shape the rows of a source have, and which of its columns is which."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

from prefopt.data.choice_schemas import CHOICE_SCHEMAS
from prefopt.data.files import Row
from prefopt.data.grouped_schemas import GROUPED_SCHEMAS
from prefopt.data.list_schemas import LIST_SCHEMAS
from prefopt.data.pair_schemas import PAIR_SCHEMAS
from prefopt.data.readers import Unreadable
from prefopt.data.schemas import CHOICES, PAIRS, Item, RowDict, Schema, Within
from prefopt.errors import InputError

SAMPLE = 64  # rows looked at to decide the schema
SCHEMAS = [*PAIR_SCHEMAS, *CHOICE_SCHEMAS, *LIST_SCHEMAS, *GROUPED_SCHEMAS]
Columns = Mapping[str, str | None]


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
    unfit: Callable[[Sequence[RowDict], Columns, Sequence[str], str], str] | None = None,
) -> Decision:
    """Which schema reads these rows, by vote over the sample (the first rows of source `name`).

    Only schemas that read all that `columns` names count. Of those that read at least half as many
    rows as any does, the ones of the lowest level count, and of these the one that reads most.
    `unfit` says of (sample, columns, keys, name) what is missing where no schema fits any row.
    Raises InputError for that, when `columns` names what is not there, when the names leave open
    which columns are meant, and when another schema reads as many rows, but not the same ones.
    """
    keys = list(dict.fromkeys(str(key) for row in sample for key in row))
    canonical = list(dict.fromkeys(key for schema in schemas for key in schema.names))
    columns = _within(columns, keys, sample)
    check_columns(columns, keys, name, canonical)
    asked = {key for key, column in columns.items() if column is not None}
    able = [schema for schema in schemas if asked <= schema.names.keys()]
    fits = [fit for schema in able if (fit := _fit(schema, sample, keys, columns))]
    if not fits:
        raise InputError((unfit or _nothing_fits)(sample, columns, keys, name))
    most = max(fit.votes for fit in fits)
    fits = [fit for fit in fits if 2 * fit.votes >= most]
    _check_levels(fits, name)
    lowest = min(fit.schema.level for fit in fits)
    every, fits = fits, [fit for fit in fits if fit.schema.level == lowest]
    most = max(fit.votes for fit in fits)
    best, *others = [fit for fit in fits if fit.votes == most]
    others += [fit for fit in every if fit.votes == most and fit.read.isdisjoint(best.read)]
    if others:
        raise InputError(_two_fit(best, others[0], name))
    schema, found, _ = best
    _check_rivals(schema, found, columns, keys, name)
    looked = f"{most} of the first {len(sample)} rows" if len(sample) > 1 else "the only row"
    renamed = [f"{key!r} from {col!r}" for key, col in found.items() if col and col != key]
    how = f"{schema.how}; {', '.join(renamed)}" if renamed else schema.how
    return Decision(schema, f"{how} (so in {looked})", found)


def _fit(
    schema: Schema, sample: Sequence[RowDict], keys: list[str], columns: Columns
) -> _Fit | None:
    """The columns that the schema reads and how many rows of the sample it does; None for none."""
    found = resolve(schema, keys, columns)
    if any(found.get(key) is None for key in schema.needs):
        return None
    read = [i for i, row in enumerate(sample) if schema.fits(apply_columns(row, found))]
    return _Fit(schema, found, frozenset(read)) if read else None


def _two_fit(a: _Fit, b: _Fit, source: str) -> str:
    """What to do where two schemas read equally many rows, other ones or the same."""
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


def _within(columns: Columns, keys: Sequence[str], sample: Sequence[RowDict]) -> Columns:
    """`columns`, with what is no column but a key of objects within one marked as that: what a
    response is rated by (`Within`) may stand there."""
    rated = [key for key in ("scores", "ranks", "score") if columns.get(key) not in (None, *keys)]
    if not rated:
        return columns
    inner = {key for row in sample for value in row.values() for key in _keys(value, 4)}
    marked = {key: Within(columns[key]) for key in rated if columns[key] in inner}
    return {**columns, **marked}


def _keys(value: Any, depth: int) -> Iterator[str]:
    """The keys of objects in a value, in lists and in each other."""
    if isinstance(value, Mapping) and depth:
        yield from map(str, value)
    if isinstance(value, Mapping | list) and depth:
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _keys(inner, depth - 1)


def resolve(schema: Schema, keys: Sequence[str], columns: Columns) -> dict[str, str | None]:
    """Canonical name -> the column that holds it: the one in `columns`, else the best known one.

    A None in `columns` hides a column.
    """
    found = dict(columns)
    for canonical in schema.names.keys() - columns.keys():
        if here := _known(schema, canonical, keys, columns):
            found[canonical] = here[0]
    return {key: found[key] for key in [*schema.names, *columns] if key in found}


def _known(schema: Schema, canonical: str, keys: Sequence[str], columns: Columns) -> list[str]:
    """The columns that may hold what the schema calls `canonical`, best known first."""
    names = schema.names[canonical] or (canonical,)
    return [name for name in names if name in keys and name not in columns.values()]


# Where a column under the canonical name itself does not settle it: which responses are meant.
STRICT = {"chosen", "rejected", "response_a", "response_b", "responses"}


def _check_rivals(
    schema: Schema, found: Columns, columns: Columns, keys: Sequence[str], source: str
) -> None:
    """InputError where several columns may hold the same thing."""
    for canonical in schema.names.keys() - columns.keys():
        rivals = _known(schema, canonical, keys, columns)
        if len(rivals) > 1 and (canonical in STRICT or canonical not in rivals):
            sides = [key for key in schema.names if key in STRICT and key in found]
            keep = sides if canonical in STRICT else [canonical]
            ways = [
                {key: _known(schema, key, keys, columns)[i : i + 1] for key in keep}
                for i in range(len(rivals))
            ]
            shown = " or ".join(
                f"columns={ {key: here[0] for key, here in way.items() if here} }" for way in ways
            )
            raise InputError(
                f"In {source!r}, {' and '.join(map(repr, rivals))} may both hold what is called "
                f"{canonical!r} here: pass {shown} to say which does."
            )


def _check_levels(fits: Sequence[_Fit], source: str) -> None:
    """InputError where columns that name the chosen response stand beside two responses with a
    verdict: nothing says that both mean the same."""
    levels = {fit.schema.level: fit for fit in fits}
    if PAIRS in levels and CHOICES in levels:
        pair, choice = levels[PAIRS].columns, levels[CHOICES].columns
        raise InputError(
            f"In {source!r}, {pair['chosen']!r}/{pair['rejected']!r} and "
            f"{choice['response_a']!r}/{choice['response_b']!r} may both hold the responses: pass "
            f"columns={ {key: pair[key] for key in ('chosen', 'rejected')} } or hide them with "
            "columns={'chosen': None}."
        )


def apply_columns(row: RowDict, columns: Columns) -> RowDict:
    """The row with its columns under canonical names as well; a None hides one."""
    out = row | {key: row[name] for key, name in columns.items() if name in row and name != key}
    out |= {key: name for key, name in columns.items() if isinstance(name, Within)}
    return {key: value for key, value in out.items() if columns.get(key, "") is not None}


def converted(rows: Iterator[Row], decision: Decision) -> Iterator[Item]:
    """What the schema makes of the rows."""
    schema, columns = decision.schema, decision.columns
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
            absent = [key for key in schema.needs if row.get(key) is None]
            if absent:
                yield Item(where, f"{absent[0]!r} is {'null' if absent[0] in row else 'missing'}")
            else:
                yield Item(where, schema.convert(row))
    yield from unreadable


def check_columns(columns: Columns, keys: Sequence[str], source: str, names: Sequence[str]) -> None:
    """InputError unless `columns` maps canonical names to columns that the source has."""
    for canonical, name in columns.items():
        if canonical not in names:
            raise InputError(
                f"columns= cannot map {canonical!r}{nearest(canonical, names)}: it maps "
                f"{', '.join(names)}."
            )
        if name is not None and name not in keys and not isinstance(name, Within):
            raise InputError(
                f"columns= takes {canonical!r} from {name!r}, which {source!r} does not have"
                f"{nearest(name, keys)}: its columns are {', '.join(keys)}."
            )


def nearest(name: str, names: Sequence[str]) -> str:
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    return f" (nearest: {near[0]!r})" if near else ""


def _nothing_fits(
    sample: Sequence[RowDict], columns: Columns, keys: Sequence[str], source: str
) -> str:
    """What the rows have, what they would need, and a `columns=` where the names suggest one."""
    schema = PAIR_SCHEMAS[0]
    found = resolve(schema, keys, columns)
    missing = [key for key in ("chosen", "rejected") if found.get(key) is None]
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
