"""`load_preferences`: any source of preference rows to a sequence of `Pair` with a report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

from prefopt.data.detect import SAMPLE, SCHEMAS, Columns, converted, detect
from prefopt.data.files import open_rows
from prefopt.data.pairing import check_pairing, notes_of, pair_items, said, why_none
from prefopt.data.records import (
    SPOKEN,
    Candidates,
    DataReport,
    Message,
    Pair,
    Ranking,
    are_messages,
)
from prefopt.data.schemas.base import Item, Schema
from prefopt.data.spool import Spool
from prefopt.errors import InputError

RECORDS = (Pair, Candidates, Ranking)


class Preferences(Spool[Pair]):
    """Pairs on a spool, read one at a time; `report` says how they came about."""

    def __init__(self, report: DataReport):
        super().__init__(report, _pair)


def _pair(fields: list[Any]) -> Pair:
    *turns, margin, source, weight, preference = fields
    prompt, chosen, rejected = ([Message(*message) for message in side] for side in turns)
    return Pair(prompt, chosen, rejected, margin, source, weight, preference)


def load_preferences(
    source: Any,
    *,
    split: str | None = None,
    columns: Columns | None = None,
    ties: str = "drop",
    empty: str = "keep",
    pairing: str = "best_worst",
    max_pairs: int | None = None,
    min_gap: float = 0.0,
) -> Preferences:
    """Preference pairs from a file, folder, hub id, `datasets` object, list of dicts or of `Pair`.

    The schema is decided from the first rows and said in `.report`, with a count per reason for
    every row that was dropped. `columns` maps canonical names (prompt, chosen, rejected, system,
    tools, margin, source; response_a, response_b with winner, choice or strength; responses,
    scores, ranks; ...) to the source's own names and always wins (None hides a column).

    ties: what becomes of two responses that are equally good: "drop", "soft" (a pair with
    `preference` 0.5) or "keep" (the first one counts as chosen). empty: whether pairs of which one
    response says nothing stay ("keep") or not ("drop"). pairing: which pairs are made of K ranked
    or scored responses (`pairing.pair_up`). max_pairs: most pairs of one prompt, over all its rows.
    min_gap: the least `margin`; pairs without one stay. What this function returned before is
    returned as it is.

    Raises InputError for what cannot be read, for no or ambiguous columns, and when no row is
    usable.
    """
    check_pairing(pairing, max_pairs, min_gap, ties, empty)
    if isinstance(source, Preferences):
        return source
    report, items = read_items(source, split, columns)
    policy = {"pairing": pairing, "max_pairs": max_pairs, "min_gap": min_gap}
    return _collect(items, report, {**policy, "ties": ties, "empty": empty})


def read_items(
    source: Any,
    split: str | None,
    columns: Columns | None,
    schemas: Sequence[Schema] = SCHEMAS,
    unfit: Callable[..., str] | None = None,
) -> tuple[DataReport, Iterator[Item]]:
    """How the rows of a source are read, and what each is made into, before any is left out.

    `schemas` and `unfit` as in `detect`.
    """
    held = isinstance(source, Sequence) and len(source) and not isinstance(source, str)
    if held and isinstance(source[0], RECORDS):
        kind = type(source[0]).__name__
        report = DataReport(f"list of {kind}", "pairs", f"the items are {kind} records already")
        return report, (Item(f"[{i}]", _checked(item)) for i, item in enumerate(source))
    name, rows = open_rows(source, split)
    sample = list(islice(rows, SAMPLE))
    decision = detect([row for _, row in sample], dict(columns or {}), name, schemas, unfit)
    report = DataReport(name, decision.schema.name, decision.reason)
    return report, converted(chain(sample, rows), decision)


def level_of(source: Any, split: str | None, columns: Columns | None) -> int | None:
    """The level of the schema that a source is read with; None if none is found."""
    try:
        name, rows = open_rows(source, split)
        sample = [row for _, row in islice(rows, SAMPLE)]
        return detect(sample, dict(columns or {}), name).schema.level
    except InputError:
        return None


def _collect(items: Iterator[Item], report: DataReport, policy: dict[str, Any]) -> Preferences:
    """Spool what is usable, count what is not; InputError if nothing is left."""
    out, others, noted, half_empty = Preferences(report), Counter[str](), Counter[str](), 0
    for item, choices, reasons in pair_items(items, **policy):
        if not choices:
            out.take(item.where, why_none(reasons), item.rows)
            continue
        others.update(reasons)
        pairs = [choice.pair for choice in choices]
        if out.take(item.where, [_fields(pair) for pair in pairs], item.rows):
            half_empty += sum(not (said(p.chosen) and said(p.rejected)) for p in pairs)
            noted.update([item.note] if item.note else [])
    report.notes += notes_of(others, noted)
    if half_empty:
        report.notes.append(f"kept although one response is empty: {half_empty:,}")
    if set(report.dropped) == {"identical"} and not report.kept:
        raise InputError(
            f"All {report.rows:,} pairs of {report.source!r} are identical: 'chosen' equals "
            "'rejected' in every row, so there is no preference to learn."
        )
    out.check("pair")
    return out


def _fields(p: Pair) -> list[Any]:
    return [p.prompt, p.chosen, p.rejected, p.margin, p.source, p.weight, p.preference]


def _checked(item: Any) -> Pair | Candidates | str:
    """A record made by the caller, or what is wrong with it."""
    if isinstance(item, Pair):
        responses = [item.chosen, item.rejected]
    elif isinstance(item, Candidates | Ranking):
        responses = item.responses
    else:
        return f"a {type(item).__name__} among the records"
    if not all(map(are_messages, (item.prompt, *responses))):
        return "a side that is not a list of Message(role, content) with text"
    if not item.prompt:
        return "no prompt"
    if not all(side and side[-1].role in SPOKEN for side in responses):
        return "no assistant turn"
    if isinstance(item, Ranking):  # the best first, no two alike
        item = Candidates(
            item.prompt, responses, [-float(i) for i in range(len(responses))], item.source
        )
    if isinstance(item, Candidates) and len(item.scores) != len(responses):
        return "not as many scores as responses"
    if isinstance(item, Candidates) and any(map(math.isinf, item.scores)):
        return "an infinite score"
    return item
