"""Which column of a source holds what a schema reads under a name of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from prefopt.data.messages import BASIC, plain
from prefopt.data.schemas.base import RowDict, Schema, Within
from prefopt.errors import InputError

Columns = Mapping[str, str | None]
Keys = Mapping[str, int]  # the columns of the rows that were looked at, and how many have each
STRAY = 10
# Where a column under the canonical name itself does not settle it: which responses are meant.
STRICT = {"chosen", "rejected", "response_a", "response_b", "responses"}


def resolve(schema: Schema, keys: Keys, columns: Columns) -> dict[str, str | None]:
    """Canonical name -> the column that holds it: the one in `columns`, else the best known one of
    those that are not stray: ten times as many rows have another.

    A None hides a column: one in `columns`, or one that goes by a canonical name but is read under
    another.
    """
    found: dict[str, str | None] = {key: None for key in schema.names if key in keys}
    for group, options in _readings(schema, keys, columns):
        found |= dict(zip(group, options[0], strict=True)) if options else {}
    if "prompt" in schema.names and found.get("prompt") != "instruction":
        found.pop("input", None)
    found |= columns
    return {key: found[key] for key in [*schema.names, *columns] if key in found}


def _readings(
    schema: Schema, keys: Keys, columns: Columns
) -> Iterator[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """(canonical names, the columns that may hold them, best known first): names that go together,
    then each of the others; those in `columns` are settled."""
    used = set(columns.values())
    alone = [key for key in schema.names if not any(key in group for group in schema.together)]
    for names in [*schema.together, *((key,) for key in alone)]:
        group = tuple(key for key in names if key not in columns)
        if not group:
            continue
        called = zip(*(schema.names[key] or (key,) for key in group), strict=True)
        options = [two for two in called if all(key in keys and key not in used for key in two)]
        most = max((_rows(keys, two) for two in options), default=0)
        options = [two for two in options if STRAY * _rows(keys, two) >= most]
        if ("instruction",) in options and "input" in schema.names:
            options = [one for one in options if one != ("input",)]
        if options:
            used |= set(options[0])
        yield group, options


def _rows(keys: Keys, names: tuple[str, ...]) -> int:
    """How many rows have all of these columns, at most."""
    return min(keys[name] for name in names)


def check_rivals(schema: Schema, keys: Keys, columns: Columns, source: str) -> None:
    """InputError where several columns may hold the same thing."""
    for group, options in _readings(schema, keys, columns):
        if len(options) < 2 or not (STRICT & set(group) or group not in options):
            continue
        shown = " or ".join(
            f"columns={dict(zip(group, columns, strict=True))}" for columns in options
        )
        rivals = " and ".join("/".join(map(repr, columns)) for columns in options)
        what = "/".join(map(repr, group))
        raise InputError(
            f"In {source!r}, {rivals} may both hold what is called {what} here: pass {shown} to "
            "say which does."
        )


def apply_columns(row: RowDict, columns: Columns) -> RowDict:
    """The row with its columns under canonical names as well; a None hides one."""
    out = row
    for key, name in columns.items():
        value = None if name is None else row.get(name)
        if isinstance(name, Within):
            value = name
        elif name == key and type(value) in BASIC:
            continue
        if out is row:
            out = dict(row)
        if name is None or (name not in row and value is None):
            out.pop(key, None)
        else:
            out[key] = plain(value)
    below = out.get("input") if "input" in columns else None
    if isinstance(below, str) and below.strip() and isinstance(out.get("prompt"), str):
        return {**out, "prompt": f"{out['prompt']}\n\n{below}"}
    return out


def check_columns(columns: Columns, keys: Keys, source: str, names: Sequence[str]) -> None:
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
                f"{nearest(name, list(keys))}: its columns are {', '.join(keys)}."
            )


def nearest(name: str, names: Sequence[str]) -> str:
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    return f" (nearest: {near[0]!r})" if near else ""


def within(columns: Columns, keys: Keys, sample: Sequence[RowDict]) -> Columns:
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
