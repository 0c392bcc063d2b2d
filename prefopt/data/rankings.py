"""`load_rankings`: any source of prompts with several rated responses to `Ranking` records."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

from prefopt.data.conversations import read_prompt, read_response
from prefopt.data.detect import SAMPLE, Columns, check_columns, converted, detect, nearest
from prefopt.data.files import Row, open_rows
from prefopt.data.records import DataReport, Message, Pair, Ranking, are_messages
from prefopt.data.schemas import RowDict
from prefopt.data.spool import Spool
from prefopt.errors import InputError

RANKED_COLUMNS = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("response_j", "response_k"),
)
RESPONSES = ("responses", "completions", "answers", "candidates")
SCORES, RANKS = ("scores", "ratings"), ("ranks", "rank")  # more is better; 1 is best
NAMES = ("prompt", "responses", "scores", "ranks", "system", "source")
# What a response that is an object calls its parts.
SCORE_KEYS, RANK_KEYS = ("score", "rating", "overall_score"), ("rank",)


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
    """Prompts with K >= 2 responses, best first, from what `open_rows` opens or a list of records.

    A row has a `prompt` (text, an open Human/Assistant transcript or messages) and a list of
    `responses` (also called completions, answers or candidates), with a list of `scores` or
    `ratings` (more is better) or of `ranks` (1 is best) beside it, or in each response, as an
    object, its text and its score, rating or rank. Preference rows in any schema that
    `load_preferences` reads become rankings of two. `columns` maps prompt, responses, scores,
    ranks, system and source to the source's own names and always wins (None hides a column).

    Of responses that are equally good, or the same, only the first is kept. Counted in `.report`,
    with a reason for every row that was dropped: fewer than two are left, or a part is missing or
    of another type. Raises InputError for what cannot be read, for no or ambiguous columns, and
    when no row is usable.
    """
    if isinstance(source, Rankings):
        return source
    if isinstance(source, Sequence) and len(source) and isinstance(source[0], Pair | Ranking):
        kind = type(source[0]).__name__
        report = DataReport(f"list of {kind}", kind, f"the items are {kind} records already")
        return _collect(((f"[{i}]", _of_record(item)) for i, item in enumerate(source)), report)
    name, rows = open_rows(source, split)
    columns = dict(columns or {})
    sample = list(islice(rows, SAMPLE))
    found = _columns_of([row for _, row in sample], columns, name)
    if found is None:
        decision = detect([row for _, row in sample], columns, name)
        report = DataReport(name, decision.schema.name, f"{decision.reason}: rankings of two")
        items = converted(chain(sample, rows), decision)
        return _collect(((item.where, _of_record(item.record)) for item in items), report)
    report = DataReport(name, "rankings", _how(found))
    return _collect(_read(chain(sample, rows), found), report)


class _Ranked(NamedTuple):
    """A ranking, and how many responses it lost because they tell nothing."""

    ranking: Ranking
    equal: int = 0
    repeated: int = 0


def _collect(items: Iterator[tuple[str, _Ranked | str]], report: DataReport) -> Rankings:
    """Spool what is usable, count what is not; InputError if nothing is left."""
    out, equal, repeated = Rankings(report), 0, 0
    for where, item in items:
        if isinstance(item, str):
            out.take(where, item)
            continue
        r = item.ranking
        if out.take(where, [[r.prompt, r.responses, r.source]]):
            equal, repeated = equal + item.equal, repeated + item.repeated
    if equal:
        report.notes.append(f"responses left out because another is as good: {equal:,}")
    if repeated:
        report.notes.append(f"responses left out because they repeat a better one: {repeated:,}")
    out.check("ranking")
    return out


# --- which columns -----------------------------------------------------------------------------


def _columns_of(rows: Sequence[RowDict], columns: Columns, name: str) -> dict[str, str] | None:
    """Canonical name -> the column that holds it; None for rows that are preference pairs."""
    keys = list(dict.fromkeys(str(key) for row in rows for key in row))
    pairs = "chosen" in columns or any(set(two) <= set(keys) for two in RANKED_COLUMNS)
    if pairs and "responses" not in columns and not set(RESPONSES) & set(keys):
        return None
    check_columns(columns, keys, name, NAMES)
    known = {"prompt": ("prompt",), "responses": RESPONSES, "scores": SCORES, "ranks": RANKS}
    known |= {"system": ("system",), "source": ("source",)}
    found: dict[str, str] = {}
    for canonical, names in known.items():
        here = [key for key in names if key in keys and key not in columns.values()]
        if canonical in columns:
            here = [key for key in keys if key == columns[canonical]]
        if len(here) > 1:
            raise InputError(
                f"In {name!r}, {' and '.join(map(repr, here))} may all hold the {canonical}: pass "
                f"columns={{{canonical!r}: {here[0]!r}}} to say which does."
            )
        if here:
            found[canonical] = here[0]
    if missing := [key for key in ("prompt", "responses") if key not in found]:
        raise InputError(_nothing_fits(missing, keys, name))
    if {"scores", "ranks"} <= found.keys():
        raise InputError(
            f"{name!r} has {found['scores']!r} (more is better) and {found['ranks']!r} (1 is "
            "best): hide one with columns={'ranks': None} or columns={'scores': None}."
        )
    return found


def _nothing_fits(missing: list[str], keys: list[str], name: str) -> str:
    near = "".join(nearest(key, keys) for key in missing)
    return (
        f"The rows of {name!r} lack {' and '.join(map(repr, missing))}{near}: found "
        f"{', '.join(keys) or 'no column'}; needed are 'prompt', a list of 'responses' and a list "
        "of 'scores' or 'ranks' (or both in each response), or preference pairs; map other names "
        f"with columns={dict.fromkeys(missing, '...')}."
    )


def _how(found: dict[str, str]) -> str:
    order = "their own score, rating or rank"
    if "scores" in found:
        order = f"{found['scores']!r} (more is better)"
    elif "ranks" in found:
        order = f"{found['ranks']!r} (1 is best)"
    return f"responses in {found['responses']!r} to {found['prompt']!r}, best first by {order}"


# --- rows --------------------------------------------------------------------------------------


def _read(rows: Iterator[Row], found: dict[str, str]) -> Iterator[tuple[str, _Ranked | str]]:
    for where, row in rows:
        yield where, _of_row({name: row.get(key) for name, key in found.items()})


def _of_row(row: RowDict) -> _Ranked | str:
    if not isinstance(row["responses"], list):
        return f"the responses are {type(row['responses']).__name__}, not a list"
    opened = read_prompt(row["prompt"], row.get("system"))
    if isinstance(opened, str):
        return opened
    prompt, reply = opened
    given = row.get("scores") if row.get("scores") is not None else row.get("ranks")
    values = _values(row["responses"], given, worse_is_more=row.get("scores") is None)
    if isinstance(values, str):
        return values
    rated: list[tuple[float, list[Message]]] = []
    for value, response in zip(values, row["responses"], strict=True):
        turns = read_response(response, reply)
        if isinstance(turns, str):
            return turns
        rated.append((value, turns))
    source = row.get("source")
    return _ranked(prompt, rated, source if isinstance(source, str) else None)


def _ranked(
    prompt: list[Message], rated: list[tuple[float, list[Message]]], source: str | None
) -> _Ranked | str:
    """The best first, of equals the first; a response that is there already tells nothing."""
    best: dict[float, list[Message]] = {}
    for value, turns in rated:
        best.setdefault(value, turns)
    kept: list[list[Message]] = []
    for value in sorted(best, reverse=True):
        if best[value] not in kept:
            kept.append(best[value])
    if len(kept) < 2:
        return "fewer than two responses that differ in text and in rank"
    return _Ranked(Ranking(prompt, kept, source), len(rated) - len(best), len(best) - len(kept))


def _values(responses: list[Any], given: Any, *, worse_is_more: bool) -> list[float] | str:
    """How good each response is, more is better, or why that is not known."""
    if given is None:
        return _own_values(responses)
    if not isinstance(given, list):
        return f"the scores or ranks are {type(given).__name__}, not a list"
    if len(given) != len(responses):
        return "not as many scores or ranks as responses"
    if not all(_is_number(value) for value in given):
        return "a score or rank is no number"
    return [-float(value) if worse_is_more else float(value) for value in given]


def _own_values(responses: list[Any]) -> list[float] | str:
    for keys, sign in ((SCORE_KEYS, 1), (RANK_KEYS, -1)):
        for key in keys:
            values: list[Any] = [r.get(key) if isinstance(r, Mapping) else None for r in responses]
            if values and all(_is_number(value) for value in values):
                return [sign * float(value) for value in values]
    return "no scores or ranks"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# --- records -----------------------------------------------------------------------------------


def _of_record(item: Any) -> _Ranked | str:
    """A `Pair` or a `Ranking` made by the caller, or what is wrong with it."""
    if isinstance(item, str):
        return item  # why a row is no pair
    if isinstance(item, Pair):
        item = Ranking(item.prompt, [item.chosen, item.rejected], item.source)
    if not isinstance(item, Ranking):
        return f"a {type(item).__name__} among the records"
    if not all(map(are_messages, (item.prompt, *item.responses))):
        return "a side that is not a list of Message(role, content) with text"
    if not item.prompt:
        return "no prompt"
    if not all(side and side[-1].role == "assistant" for side in item.responses):
        return "no assistant turn"
    rated = [(float(-i), side) for i, side in enumerate(item.responses)]
    return _ranked(item.prompt, rated, item.source)
