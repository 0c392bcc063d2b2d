"""`load_feedback`: any source of single labelled responses to `Feedback` records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any

from prefopt.data.conversations import read_prompt, read_response
from prefopt.data.detect import SAMPLE, Columns, check_columns, nearest
from prefopt.data.files import open_rows
from prefopt.data.records import DataReport, Feedback, Message
from prefopt.data.schemas import RowDict
from prefopt.data.spool import Spool
from prefopt.errors import InputError

RESPONSES = ("completion", "response", "answer")
NAMES = ("prompt", "completion", "label", "system", "source")
LABELS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


def load_feedback(
    source: Any, *, split: str | None = None, columns: Columns | None = None
) -> Spool[Feedback]:
    """Single responses, each desirable or not, from what `open_rows` opens or a list of Feedback.

    A row has a `prompt` (text, an open Human/Assistant transcript or messages), a `completion`
    (also called response or answer) and a `label` (true or false, 1 or 0). `columns` maps prompt,
    completion, label, system and source to the source's own names. What was read, and a count per
    reason for every row that was dropped, is in `.report`. Raises InputError for what cannot be
    read, for missing columns, and when no row is usable.
    """
    if isinstance(source, Sequence) and len(source) and isinstance(source[0], Feedback):
        report = DataReport("list of Feedback", "feedback", "the items are records already")
        return _collect(((f"[{i}]", item) for i, item in enumerate(source)), report)
    name, rows = open_rows(source, split)
    sample = list(islice(rows, SAMPLE))
    found = columns_of([row for _, row in sample], dict(columns or {}), name)
    report = DataReport(
        name, "feedback", f"one response to {found['prompt']!r} in {found['completion']!r}, "
        f"labelled by {found['label']!r}",
    )  # fmt: skip
    read = (
        (where, _of_row({key: row.get(column) for key, column in found.items()}))
        for where, row in chain(sample, rows)
    )
    return _collect(read, report)


def columns_of(rows: Sequence[RowDict], columns: Columns, name: str) -> dict[str, str]:
    """Canonical name -> the column that holds it."""
    keys = list(dict.fromkeys(str(key) for row in rows for key in row))
    check_columns(columns, keys, name, NAMES)
    found = {key: str(column) for key, column in columns.items() if column is not None}
    for canonical in NAMES:
        names = RESPONSES if canonical == "completion" else (canonical,)
        here = [key for key in names if key in keys]
        if canonical not in columns and here:
            found[canonical] = here[0]
    if missing := [key for key in ("prompt", "completion", "label") if key not in found]:
        near = "".join(nearest(key, keys) for key in missing)
        raise InputError(
            f"The rows of {name!r} lack {' and '.join(map(repr, missing))}{near}: found "
            f"{', '.join(keys) or 'no column'}; single responses need 'prompt', 'completion' and "
            f"'label'; map other names with columns={dict.fromkeys(missing, '...')}."
        )
    return found


def _of_row(row: RowDict) -> Feedback | str:
    opened = read_prompt(row["prompt"], row.get("system"))
    if isinstance(opened, str):
        return opened
    prompt, reply = opened
    response = read_response(row["completion"], reply)
    if isinstance(response, str):
        return response
    label = LABELS.get(str(row["label"]).lower())
    if label is None:
        return f"the label is {row['label']!r}, neither true nor false"
    source = row.get("source")
    return Feedback(prompt, response, label, source if isinstance(source, str) else None)


def _collect(items: Iterator[tuple[str, Feedback | str]], report: DataReport) -> Spool[Feedback]:
    out, good = Spool(report, _decode), 0
    for where, item in items:
        fields: list[list[Any]] | str = item if isinstance(item, str) else "an empty response"
        if not isinstance(item, str) and "".join(t.content for t in item.response).strip():
            fields = [[item.prompt, item.response, item.desirable, item.source]]
        kept = out.take(where, fields)
        good += kept and not isinstance(item, str) and item.desirable
    out.check("response")
    report.notes.append(f"desirable: {good:,} of {report.kept:,}")
    return out


def _decode(fields: list[Any]) -> Feedback:
    prompt, response, desirable, source = fields
    turns = [[Message(*message) for message in side] for side in (prompt, response)]
    return Feedback(turns[0], turns[1], desirable, source)
