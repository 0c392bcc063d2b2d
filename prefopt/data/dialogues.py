"""`load_dialogues`: any source of conversations or plain text to a sequence of `Dialogue`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any

from prefopt.data.detect import SAMPLE, Columns, check_columns
from prefopt.data.dialogue_schemas import (
    DIALOGUES,
    IMITATED,
    NAMES,
    Shape,
    convert_rows,
    from_pair,
    only_columns,
)
from prefopt.data.files import open_rows
from prefopt.data.records import DataReport, Dialogue, Message, Pair, are_messages
from prefopt.data.schemas import RowDict
from prefopt.data.sources import Preferences
from prefopt.data.spool import Spool
from prefopt.errors import InputError

# Two columns that may both hold what is imitated, so that the names alone do not say which does.
RIVALS = (("messages", "conversations"), ("completion", "response"), ("output", "response"))


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
    plain `text` (a Human/Assistant transcript in it becomes turns), preference rows (prompt and
    chosen response), and lists of `Dialogue` or `Pair`. `columns` maps the names in NAMES to the
    source's own and always wins (None hides a column). The schema is decided from the first rows
    and said in `.report`, with a count per reason for every row that was dropped. Raises InputError
    for what cannot be read, for no or ambiguous columns, and when no row is usable.
    """
    if isinstance(source, Dialogues):
        return source
    given = isinstance(source, list | tuple) and source and isinstance(source[0], Dialogue | Pair)
    if given or isinstance(source, Preferences):
        kind = type(source[0]).__name__
        reason = IMITATED if kind == "Pair" else f"the items are {kind} records already"
        report = DataReport(f"list of {kind}", kind, reason)
        return _collect(((f"[{i}]", _record(item)) for i, item in enumerate(source)), report)
    name, rows = open_rows(source, split)
    columns = dict(columns or {})
    sample = list(islice(rows, SAMPLE))
    schema, reason = detect_dialogues([row for _, row in sample], columns, name)
    report = DataReport(name, schema.name, reason)
    return _collect(convert_rows(chain(sample, rows), schema, columns, NAMES), report)


# --- which shape -------------------------------------------------------------------------------


def detect_dialogues(sample: Sequence[RowDict], columns: Columns, name: str) -> tuple[Shape, str]:
    """(the schema that reads most of these rows, why), of those that use a column of `columns`.

    Raises InputError when `columns` names what is not there, when two columns may hold what is
    imitated, and when no schema fits any row.
    """
    keys = list(dict.fromkeys(str(key) for row in sample for key in row))
    check_columns(columns, keys, name, NAMES)
    mapped = [only_columns(row, columns, NAMES) for row in sample] if columns else sample
    asked = {key for key, column in columns.items() if column is not None}
    schemas = [schema for schema in DIALOGUES if asked & set(schema.needs)] or DIALOGUES
    fitting = (next((s for s in schemas if s.fits(row)), None) for row in mapped)
    votes = Counter(schema.name for schema in fitting if schema)
    if not votes:
        raise InputError(_nothing_fits(mapped, keys, name))
    (best, most), *others = votes.most_common()
    if others and others[0][1] == most:
        kinds = " and ".join(kind for kind, count in votes.items() if count == most)
        raise InputError(f"{name!r} mixes rows of several kinds ({kinds}): separate them.")
    schema = next(schema for schema in schemas if schema.name == best)
    _check_rivals(schema, mapped, columns, name)
    looked = f"{most} of the first {len(sample)} rows" if len(sample) > 1 else "the only row"
    return schema, f"{schema.how} (so in {looked})"


def _check_rivals(schema: Shape, rows: Sequence[RowDict], columns: Columns, name: str) -> None:
    for pair in RIVALS:
        if not set(pair) & set(schema.needs) or set(pair) & columns.keys():
            continue
        if any(row.get(pair[0]) is not None and row.get(pair[1]) is not None for row in rows):
            a, b = pair
            raise InputError(
                f"In {name!r}, {a!r} and {b!r} may both hold what is to be imitated: hide one with "
                f"columns={{{a!r}: None}} or columns={{{b!r}: None}}."
            )


def _nothing_fits(mapped: Sequence[RowDict], keys: list[str], name: str) -> str:
    """What the rows have, what they would need, and a `columns=` where the names suggest one."""
    kinds = {
        key: type(row[key]).__name__
        for row in mapped
        for key in row
        if key in NAMES[:9] and row[key] is not None
    }
    if kinds:
        have = ", ".join(f"{key!r} is {kind}" for key, kind in kinds.items())
        lack = f"The rows of {name!r} cannot be read as dialogues: {have}"
    else:
        lack = f"The rows of {name!r} hold no dialogue: found {', '.join(keys) or 'no column'}"
    prompt = next((k for k in ("question", "query", "instruction", "input") if k in keys), None)
    answer = next((k for k in ("answer", "output", "target", "response") if k in keys), None)
    example = {"prompt": prompt or "...", "completion": answer or "..."}
    return (
        f"{lack}; needed are message lists ('messages' or 'conversations'), texts or message lists "
        "in 'prompt' and 'completion', 'instruction' and 'output', or 'text'; map other names with "
        f"columns={example}."
    )


# --- what is kept ------------------------------------------------------------------------------


def _record(item: Any) -> Dialogue | str:
    """A record made by the caller, as a `Dialogue`, or what is wrong with it."""
    if isinstance(item, Pair):
        item = from_pair(item)
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
    first = next((i for i, turn in enumerate(turns) if turn.role != "assistant"), len(turns))
    first = 0 if given else first  # what is given stays as it is
    answers = [turn for turn in turns[first + given :] if turn.role == "assistant"]
    if not answers:
        return ("nothing comes before the assistant's turn" if first else "no assistant turn"), 0
    if not all(turn.content.strip() for turn in answers):
        return "an assistant turn is empty", 0
    return replace(dialogue, turns=turns[first:]), first


def _collect(dialogues: Iterable[tuple[str, Any]], report: DataReport) -> Dialogues:
    """Spool what is usable, count what is not; InputError if nothing is left."""
    out, opened = Dialogues(report), 0
    for where, dialogue in dialogues:
        usable, cut = (dialogue, 0) if isinstance(dialogue, str) else _usable(dialogue)
        if not isinstance(usable, str):
            about = [usable.text, usable.source, usable.weight, usable.context]
            usable = [[usable.turns, *about]]
        opened += out.take(where, usable) and cut > 0
    if opened:
        report.notes.append(f"opened with an assistant turn, which was cut: {opened:,}")
    out.check("dialogue")
    return out
