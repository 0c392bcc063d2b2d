"""`load_rankings`: any source of preferences to `Ranking` records, the best response first."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from prefopt.data.columns import Columns
from prefopt.data.records import Candidates, DataReport, Message, Pair, Ranking
from prefopt.data.schemas.base import Item
from prefopt.data.sources import read_items
from prefopt.data.spool import Spool

EQUAL = "responses left out because another is as good"
REPEATED = "responses left out because they repeat a better one"
UNRATED = "responses left out because they have no score"


class Rankings(Spool[Ranking]):
    """Rankings on a spool, read one at a time; `report` says how they came about."""

    def __init__(self, report: DataReport):
        super().__init__(report, _decode)


def _decode(fields: list[Any]) -> Ranking:
    prompt, responses, source = fields
    turns = [[Message(*message) for message in side] for side in (prompt, *responses)]
    return Ranking(turns[0], turns[1:], source)


def load_rankings(
    source: Any, *, split: str | None = None, columns: Columns | None = None
) -> Rankings:
    """Prompts with K >= 2 responses, best first, from what `load_preferences` reads or a list of
    `Ranking`.

    Lists of responses with scores or ranks, trees and scored rows become rankings of all responses
    to a prompt, pairs and choices between two become rankings of two. `columns` as there.

    Of responses that are equally good, or the same, only the first is kept. Counted in `.report`,
    with a reason for every row that was dropped: fewer than two are left, or a part is missing or
    of another type. Raises InputError for what cannot be read, for no or ambiguous columns, and
    when no row is usable.
    """
    if isinstance(source, Rankings):
        return source
    report, items = read_items(source, split, columns)
    return _collect(items, report)


def _collect(items: Iterable[Item], report: DataReport) -> Rankings:
    """Spool what is usable, count what is not; InputError if nothing is left."""
    out, left_out, longest = Rankings(report), Counter[str](), 2
    for item in items:
        made = item.record if isinstance(item.record, list) else [item.record]
        ranked = [_ranked(record) for record in made]
        usable = [(ranking, why) for ranking, why in ranked if isinstance(ranking, Ranking)]
        if not usable:
            out.take(item.where, str(ranked[0][0]), item.rows)
            continue
        fields = [[r.prompt, r.responses, r.source] for r, _ in usable]
        if out.take(item.where, fields, item.rows):
            left_out.update([item.note] if item.note else [])
            for ranking, why in usable:
                left_out.update(why)
                longest = max(longest, len(ranking.responses))
    report.reason += ": rankings of two" if longest == 2 else ""
    report.notes += [f"{why}: {count:,}" for why, count in left_out.items() if count]
    out.check("ranking")
    return out


def _ranked(record: Any) -> tuple[Ranking | str, dict[str, int]]:
    """(the best first, of equals the first; how many responses are left out, by reason): one that
    is there already tells nothing. Or why there is no ranking."""
    if isinstance(record, str):
        return record, {}
    if isinstance(record, Pair):
        scores = [0.0, 0.0] if record.preference == 0.5 else [1.0, 0.0]
        record = Candidates(record.prompt, [record.chosen, record.rejected], scores, record.source)
    best: dict[float, list[Message]] = {}
    rated = [s for s in zip(record.scores, record.responses, strict=True) if not math.isnan(s[0])]
    for value, turns in rated:
        best.setdefault(value, turns)
    kept: dict[tuple[Message, ...], list[Message]] = {}
    for value in sorted(best, reverse=True):
        kept.setdefault(tuple(best[value]), best[value])
    if len(kept) < 2:
        return "fewer than two responses that differ in text and in rank", {}
    why = {
        EQUAL: len(rated) - len(best),
        REPEATED: len(best) - len(kept),
        UNRATED: len(record.scores) - len(rated),
    }
    return Ranking(record.prompt, list(kept.values()), record.source), why
