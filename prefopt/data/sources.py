"""`load_preferences`: any source of preference rows to a sequence of `Pair` with a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import chain, islice
from typing import Any, NamedTuple

from prefopt.data.files import Row, open_rows
from prefopt.data.records import DataReport, Message, Pair, are_messages
from prefopt.data.schemas import (
    CANONICAL,
    DETECTORS,
    LABELLED_COLUMNS,
    NEEDED,
    RANKED_COLUMNS,
    RowDict,
    Schema,
)
from prefopt.data.spool import Spool
from prefopt.errors import InputError

SAMPLE = 64  # rows looked at to decide the schema
TIES = ("drop", "soft", "keep")
Columns = Mapping[str, str | None]


class Preferences(Spool[Pair]):
    """Pairs on a spool, read one at a time; `report` says how they came about."""

    def __init__(self, report: DataReport):
        super().__init__(report, _pair)


def _pair(fields: list[Any]) -> Pair:
    *turns, margin, source, weight = fields
    prompt, chosen, rejected = ([Message(*message) for message in side] for side in turns)
    return Pair(prompt, chosen, rejected, margin, source, weight)


def load_preferences(
    source: Any,
    *,
    split: str | None = None,
    columns: Columns | None = None,
    ties: str = "drop",
) -> Preferences:
    """Preference pairs from a file, folder, hub id, `datasets` object, list of dicts or of `Pair`.

    The schema is decided from the first rows and said in `.report`, with a count per reason for
    every row that was dropped. `columns` maps prompt, chosen, rejected, system, margin and source
    to the source's own names and always wins (None hides a column). `ties` says what becomes of
    rows without a winner in schemas that have them ("drop", "soft", "keep"). Raises InputError
    for what cannot be read, for no or ambiguous columns, and when no row is usable.
    """
    if ties not in TIES:
        raise InputError(f"ties={ties!r} is not one of {', '.join(TIES)}.")
    if isinstance(source, Preferences):
        return source
    if isinstance(source, list | tuple) and source and isinstance(source[0], Pair):
        report = DataReport("list of Pair", "pairs", "the items are Pair records already")
        return _collect(((f"[{i}]", _checked(item)) for i, item in enumerate(source)), report)
    name, rows = open_rows(source, split)
    columns = dict(columns or {})
    sample = list(islice(rows, SAMPLE))
    decision = detect([row for _, row in sample], columns, name)
    report = DataReport(name, decision.schema.name, decision.reason)
    return _collect(convert_rows(chain(sample, rows), decision.schema, columns), report)


def convert_rows(
    rows: Iterator[Row], schema: Schema, columns: Columns, names: Sequence[str] = CANONICAL
) -> Iterator[tuple[str, Any]]:
    """(position, the record that `schema` makes of the row, or why it makes none) of every row."""
    for where, row in rows:
        row = apply_columns(row, columns, names) if columns else row
        absent = [key for key in schema.needs if row.get(key) is None]
        if absent:
            yield where, f"{absent[0]!r} is {'null' if absent[0] in row else 'missing'}"
        else:
            yield where, schema.convert(row)


def _collect(pairs: Iterator[tuple[str, Pair | str]], report: DataReport) -> Preferences:
    """Spool what is usable, count what is not; InputError if nothing is left."""
    out, half_empty = Preferences(report), 0
    for where, pair in pairs:
        if isinstance(pair, str):
            out.take(where, pair)
        elif pair.chosen == pair.rejected:
            out.take(where, "identical")
        else:
            about = [pair.margin, pair.source, pair.weight]
            kept = out.take(where, [pair.prompt, pair.chosen, pair.rejected, *about])
            half_empty += kept and not (_text(pair.chosen) and _text(pair.rejected))
    if half_empty:
        report.notes.append(f"kept although one response is empty: {half_empty:,}")
    if set(report.dropped) == {"identical"} and not report.kept:
        raise InputError(
            f"All {report.rows:,} pairs of {report.source!r} are identical: 'chosen' equals "
            "'rejected' in every row, so there is no preference to learn."
        )
    out.check("pair")
    return out


def _text(turns: list[Message]) -> str:
    return "".join(turn.content for turn in turns).strip()


def _checked(pair: Any) -> Pair | str:
    """A `Pair` made by the caller, or what is wrong with it."""
    if not isinstance(pair, Pair):
        return f"a {type(pair).__name__} among Pair records"
    if not all(map(are_messages, (pair.prompt, pair.chosen, pair.rejected))):
        return "a side that is not a list of Message(role, content) with text"
    if not pair.prompt:
        return "no prompt"
    if not all(side and side[-1].role == "assistant" for side in (pair.chosen, pair.rejected)):
        return "no assistant turn"
    return pair


# --- which schema, which columns ---------------------------------------------------------------


class Decision(NamedTuple):
    """The schema a source is read with, and why."""

    schema: Schema
    reason: str


def detect(sample: Sequence[RowDict], columns: Columns, name: str) -> Decision:
    """Which schema reads these rows, by vote over the sample (the first rows of source `name`).

    Raises InputError when `columns` names what is not there, when the names leave open which two
    columns are the responses, and when no schema fits any row.
    """
    keys = list(dict.fromkeys(str(key) for row in sample for key in row))
    check_columns(columns, keys, name)
    if not {"chosen", "rejected"} <= columns.keys():
        _check_ambiguous(keys, name)
    mapped = [apply_columns(row, columns) for row in sample] if columns else sample
    votes = {schema.name: sum(schema.fits(row) for row in mapped) for schema in DETECTORS}
    most = max(votes.values())
    if most == 0:
        raise InputError(_nothing_fits(mapped, keys, name))
    best = [schema for schema in DETECTORS if votes[schema.name] == most]
    if len(best) > 1:
        kinds = " and ".join(schema.name for schema in best)
        raise InputError(f"{name!r} mixes rows of several kinds ({kinds}): separate them.")
    looked = f"{most} of the first {len(sample)} rows" if len(sample) > 1 else "the only row"
    return Decision(best[0], f"{best[0].how} (so in {looked})")


def apply_columns(row: RowDict, columns: Columns, names: Sequence[str] = CANONICAL) -> RowDict:
    """The row under canonical names; only canonical columns survive. A None hides a column."""
    out = {key: row[key] for key in names if key in row and key not in columns}
    return out | {key: row[name] for key, name in columns.items() if name in row}


def check_columns(
    columns: Columns, keys: list[str], source: str, names: Sequence[str] = CANONICAL
) -> None:
    """InputError unless `columns` maps canonical names to columns that the source has."""
    for canonical, name in columns.items():
        if canonical not in names:
            raise InputError(
                f"columns= cannot map {canonical!r}{nearest(canonical, names)}: it maps "
                f"{', '.join(names)}."
            )
        if name is not None and name not in keys:
            raise InputError(
                f"columns= takes {canonical!r} from {name!r}, which {source!r} does not have"
                f"{nearest(name, keys)}: its columns are {', '.join(keys)}."
            )


def _check_ambiguous(keys: list[str], source: str) -> None:
    ranked = [pair for pair in RANKED_COLUMNS if set(pair) <= set(keys)]
    labelled = [pair for pair in LABELLED_COLUMNS if set(pair) <= set(keys)]
    if len(ranked) + len(labelled) > 1 and ranked:
        rivals = " and ".join(f"{a!r}/{b!r}" for a, b in ranked + labelled)
        ways = " or ".join(f"columns={{'chosen': {a!r}, 'rejected': {b!r}}}" for a, b in ranked)
        raise InputError(
            f"In {source!r}, {rivals} may all hold the responses: pass {ways} to say which do."
        )


def nearest(name: str, names: Sequence[str]) -> str:
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    return f" (nearest: {near[0]!r})" if near else ""


def _nothing_fits(mapped: Sequence[RowDict], keys: list[str], source: str) -> str:
    """What the rows have, what they would need, and a `columns=` where the names suggest one."""
    have = {key for row in mapped for key in row}
    missing = [key for key in ("chosen", "rejected") if key not in have]
    texts = any(isinstance(row.get("chosen"), str) for row in mapped)
    if not missing and "prompt" not in have and texts:
        missing = ["prompt"]
    if not missing:
        row = mapped[0]
        kinds = ", ".join(f"{k!r} is {type(row[k]).__name__}" for k in NEEDED if k in row)
        return f"'chosen' and 'rejected' of {source!r} must be text or message lists, but {kinds}."
    message = (
        f"The rows of {source!r} lack {' and '.join(map(repr, missing))}: found "
        f"{', '.join(keys) or 'no column'}; needed are 'prompt', 'chosen' and 'rejected' "
        "('prompt' only where the other two are not whole conversations); "
    )
    example: dict[str, str] = {}
    prompts = [key for key in ("question", "instruction", "input", "query") if key in keys]
    if "prompt" not in have and prompts:
        example["prompt"] = prompts[0]
    ranked = [pair for pair in RANKED_COLUMNS[1:] if set(pair) <= set(keys)]
    if "chosen" in missing and ranked:
        example |= {"chosen": ranked[0][0], "rejected": ranked[0][1]}
    return f"{message}map other names with columns={dict.fromkeys(missing, '...') | example}."
