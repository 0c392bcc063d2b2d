"""`load_dialogues`: any source of conversations or plain text to a sequence of `Dialogue`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from prefopt.data.columns import Columns, Keys
from prefopt.data.records import (
    SPOKEN,
    Candidates,
    DataReport,
    Dialogue,
    Message,
    Pair,
    are_messages,
)
from prefopt.data.schemas.base import RowDict
from prefopt.data.schemas.dialogues import CHOSEN, DIALOGUES, IMITATED, from_preference
from prefopt.data.sources import Preferences, read_items
from prefopt.data.spool import Spool

NEEDED = (
    "needed are message lists ('messages' or 'conversations'), texts or message lists in 'prompt' "
    "and 'completion', 'instruction' and 'output', or 'text', or preference pairs"
)


class Dialogues(Spool[Dialogue]):
    """Dialogues on a spool, read one at a time; `report` says how they came about."""

    def __init__(self, report: DataReport):
        super().__init__(report, _decode)


def _decode(fields: list[Any]) -> Dialogue:
    turns, *rest = fields
    return Dialogue([Message(*turn) for turn in turns], *rest)


def load_dialogues(
    source: Any, *, split: str | None = None, columns: Columns | None = None
) -> Dialogues:
    """What to imitate, from a file, folder, hub id, `datasets` object or list (see `open_rows`).

    Read are message lists (`messages`, `conversations`; role/content or from/value), `prompt` with
    `completion` or `response` (texts or message lists), `instruction` with `input` and `output`,
    plain `text` (a Human/Assistant transcript in it becomes turns), preferences in any shape that
    `load_preferences` reads (the chosen or best response), and lists of `Dialogue` or `Pair`.
    `columns` maps these names to the source's own and always wins (None hides a column). The schema
    is decided from the first rows and said in `.report`, with a count per reason for every row that
    was dropped. Raises InputError for what cannot be read, for no or ambiguous columns, and when no
    row is usable.
    """
    if isinstance(source, Dialogues):
        return source
    given = isinstance(source, list | tuple) and source and isinstance(source[0], Dialogue | Pair)
    if given or isinstance(source, Preferences):
        kind = type(source[0]).__name__
        reason = IMITATED if kind == "Pair" else f"the items are {kind} records already"
        report = DataReport(f"list of {kind}", kind, reason)
        return _collect(((f"[{i}]", item, 1) for i, item in enumerate(source)), report)
    report, items = read_items(source, split, columns, [*DIALOGUES, *CHOSEN], _nothing_fits)
    return _collect(((item.where, item.record, item.rows) for item in items), report)


def _nothing_fits(sample: Sequence[RowDict], columns: Columns, keys: Keys, name: str) -> str:
    """What the rows have, what they would need, and a `columns=` where the names suggest one."""
    known = {key for schema in DIALOGUES for key in schema.needs} | {"chosen", "rejected"}
    here = {key: columns.get(key, key) for key in sorted(known)}
    kinds = {
        key: type(row[column]).__name__
        for row in sample
        for key, column in here.items()
        if column is not None and row.get(column) is not None
    }
    if kinds:
        have = ", ".join(f"{key!r} is {kind}" for key, kind in kinds.items())
        lack = f"The rows of {name!r} cannot be read as dialogues: {have}"
    else:
        lack = f"The rows of {name!r} hold no dialogue: found {', '.join(keys) or 'no column'}"
    prompt = next((k for k in ("question", "query", "instruction", "input") if k in keys), None)
    answer = next((k for k in ("answer", "output", "target", "response") if k in keys), None)
    example = {"prompt": prompt or "...", "completion": answer or "..."}
    return f"{lack}; {NEEDED}; map other names with columns={example}."


# --- what is kept ------------------------------------------------------------------------------


def _record(item: Any) -> Dialogue | str:
    """A record as a `Dialogue`, or what is wrong with it."""
    if isinstance(item, str):
        return item
    if isinstance(item, Pair | Candidates):
        item = from_preference(item)
        return item if isinstance(item, str) else _record(item)
    if not isinstance(item, Dialogue):
        return f"a {type(item).__name__} among the records"
    if item.text is not None:
        text_only = isinstance(item.text, str) and not item.turns
        return item if text_only else "a record with a text that is no text, or turns beside it"
    if not are_messages(item.turns):
        return "turns that are not a list of Message(role, content) with text"
    return item


def _usable(dialogue: Dialogue) -> tuple[Dialogue | str, int]:
    """(the dialogue or why it is of no use, how many turns were cut: those of an assistant that
    opens the conversation, because they answer nothing)."""
    if dialogue.text is not None:
        return (dialogue if dialogue.text.strip() else "the text is empty"), 0
    turns, given = dialogue.turns, dialogue.context
    first = next((i for i, turn in enumerate(turns) if turn.role not in SPOKEN), len(turns))
    first = 0 if given else first  # what is given stays as it is
    answers = [turn for turn in turns[first + given :] if turn.role in SPOKEN]
    if not answers:
        return ("nothing comes before the assistant's turn" if first else "no assistant turn"), 0
    if not all(turn.content.strip() for turn in answers):
        return "an assistant turn is empty", 0
    return replace(dialogue, turns=turns[first:]), first


def _collect(items: Iterable[tuple[str, Any, int]], report: DataReport) -> Dialogues:
    """Spool what is usable of (position, record or records, rows), count what is not; InputError if
    nothing is left."""
    out, opened = Dialogues(report), 0
    for where, record, rows in items:
        made = [_record(one) for one in (record if isinstance(record, list) else [record])]
        cut = [(one, 0) if isinstance(one, str) else _usable(one) for one in made]
        kept = [(one, n) for one, n in cut if isinstance(one, Dialogue)]
        fields = [[one.turns, one.text, one.source, one.weight, one.context] for one, _ in kept]
        if out.take(where, fields or str(cut[0][0]), rows):
            opened += sum(n > 0 for _, n in kept)
    if opened:
        report.notes.append(f"opened with an assistant turn, which was cut: {opened:,}")
    out.check("dialogue")
    return out
