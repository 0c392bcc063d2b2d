"""`load_feedback`: any source of single labelled responses to `Feedback` records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from prefopt.data.columns import Columns, Keys, nearest
from prefopt.data.records import DataReport, Feedback, Message
from prefopt.data.schemas.base import RowDict, Schema
from prefopt.data.schemas.grouped import LABELLED_ROWS, Rated, read_labelled
from prefopt.data.sources import read_items
from prefopt.data.spool import Spool

FEEDBACK: Schema = LABELLED_ROWS._replace(
    name="feedback",
    how="one 'completion' of 'prompt' in each row, desirable or not by its 'label'",
    fits=lambda row: True,
    convert=read_labelled,
    gather=None,
)


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
    report, items = read_items(source, split, columns, [FEEDBACK], _nothing_fits)
    return _collect(((item.where, _feedback(item.record)) for item in items), report)


def _nothing_fits(sample: Sequence[RowDict], columns: Columns, keys: Keys, name: str) -> str:
    missing = [
        key
        for key in FEEDBACK.needs
        if not {columns.get(key), *(FEEDBACK.names[key] or (key,))} & set(keys)
    ]
    near = "".join(nearest(key, list(keys)) for key in missing)
    return (
        f"The rows of {name!r} lack {' and '.join(map(repr, missing))}{near}: found "
        f"{', '.join(keys) or 'no column'}; single responses need 'prompt', 'completion' and "
        f"'label'; map other names with columns={dict.fromkeys(missing, '...')}."
    )


def _feedback(read: Any) -> Feedback | str:
    if not isinstance(read, Rated):
        return read
    return Feedback(read.prompt, read.response, read.score == 1, read.source)


def _collect(items: Iterable[tuple[str, Feedback | str]], report: DataReport) -> Spool[Feedback]:
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
