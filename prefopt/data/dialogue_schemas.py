"""The shapes that rows of conversations and plain text come in, and how each becomes a `Dialogue`.

As in schemas.py, a shape is a `Schema`; here the first of `DIALOGUES` that fits a row is the row's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from prefopt.data.conversations import ASSISTANT, MARKER, read_messages, read_transcript
from prefopt.data.detect import Columns
from prefopt.data.files import Row
from prefopt.data.pair_schemas import PAIR_SCHEMAS
from prefopt.data.records import Dialogue, Message, Pair
from prefopt.data.schemas import RowDict

NAMES = (
    *("messages", "conversations", "prompt", "completion", "response"),
    *("instruction", "input", "output", "text", "chosen", "rejected", "system", "source"),
)


class Shape(NamedTuple):
    """One shape of rows."""

    name: str
    needs: tuple[str, ...]
    how: str
    fits: Callable[[RowDict], bool]
    convert: Callable[[RowDict], Any]


def convert_rows(
    rows: Iterator[Row], shape: Shape, columns: Columns, names: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    """(position, the record that `shape` makes of the row, or why it makes none) of every row."""
    for where, row in rows:
        row = only_columns(row, columns, names) if columns else row
        absent = [key for key in shape.needs if row.get(key) is None]
        if absent:
            yield where, f"{absent[0]!r} is {'null' if absent[0] in row else 'missing'}"
        else:
            yield where, shape.convert(row)


def only_columns(row: RowDict, columns: Columns, names: Sequence[str]) -> RowDict:
    """The row under canonical names; only canonical columns survive. A None hides a column."""
    out = {key: row[key] for key in names if key in row and key not in columns}
    return out | {key: row[name] for key, name in columns.items() if name in row}


# --- one function per shape --------------------------------------------------------------------


def from_messages(row: RowDict, column: str) -> Dialogue | str:
    """A list of {role, content} or {from, value}."""
    if isinstance(row[column], str):
        return "a conversation is str, not a list of messages"
    return _dialogue(row, read_messages(row[column], "user"))


def from_prompt(row: RowDict, answer: str) -> Dialogue | str:
    """A prompt and the answer to it, each a text or a message list."""
    prompt, reply = row["prompt"], row[answer]
    if isinstance(prompt, str) and isinstance(reply, str) and MARKER.match(prompt):
        context, marker, opening = prompt.rpartition(ASSISTANT)
        if marker and not opening.strip():  # the space after the marker is the marker's
            reply = reply if opening else reply.removeprefix(" ")
            turns = read_transcript(context)
            return _dialogue(row, [*turns, Message("assistant", reply)], len(turns))
    asked, answered = read_messages(prompt, "user"), read_messages(reply, "assistant")
    if isinstance(asked, str) or isinstance(answered, str):
        return asked if isinstance(asked, str) else str(answered)
    return _dialogue(row, asked + answered, len(asked))


def from_instruction(row: RowDict, answer: str) -> Dialogue | str:
    """Alpaca: an instruction, perhaps with an input below it, and the answer."""
    parts = [row["instruction"], row.get("input") or "", row[answer]]
    wrong = [type(part).__name__ for part in parts if not isinstance(part, str)]
    if wrong:
        return f"a column is {wrong[0]}, not text"
    asked = "\n\n".join(part for part in parts[:2] if part.strip())
    return _dialogue(row, [Message("user", asked), Message("assistant", parts[2])])


def from_text(row: RowDict) -> Dialogue | str:
    """Plain text, without speakers."""
    if not isinstance(row["text"], str):
        return f"'text' is {type(row['text']).__name__}, not text"
    return Dialogue([], row["text"], _source(row))


def from_text_transcript(row: RowDict) -> Dialogue | str:
    """A Human/Assistant transcript in `text`."""
    if not isinstance(row["text"], str):
        return f"'text' is {type(row['text']).__name__}, not text"
    return _dialogue(row, read_transcript(row["text"]) if ASSISTANT in row["text"] else [])


def from_pair(pair: Pair | str) -> Dialogue | str:
    """The conversation that was preferred."""
    if isinstance(pair, str):
        return pair
    turns, given = pair.prompt + pair.chosen, len(pair.prompt)
    return Dialogue(turns, None, pair.source, pair.weight, given)


def _dialogue(row: RowDict, turns: list[Message] | str, context: int = 0) -> Dialogue | str:
    if isinstance(turns, str):
        return turns
    system = row.get("system")
    if isinstance(system, str) and system and not (turns and turns[0].role == "system"):
        turns, context = [Message("system", system), *turns], context + (context > 0)
    return Dialogue(turns, None, _source(row), context=context)


def _source(row: RowDict) -> str | None:
    return row["source"] if isinstance(row.get("source"), str) else None


# --- the list of them -------------------------------------------------------------------------

IMITATED = "chosen responses are imitated"
EVERY = "every assistant turn is imitated"


def _messages_schema(column: str) -> Shape:
    how = f"{column!r} holds message lists; {EVERY}"
    return Shape(
        column,
        (column,),
        how,
        lambda row: isinstance(row.get(column), list),
        lambda row: from_messages(row, column),
    )


def _prompt_schema(answer: str) -> Shape:
    return Shape(
        f"prompt and {answer}",
        ("prompt", answer),
        f"{answer!r} answers 'prompt' and is imitated",
        lambda row: all(isinstance(row.get(key), str | list) for key in ("prompt", answer)),
        lambda row: from_prompt(row, answer),
    )


def _instruction_schema(answer: str) -> Shape:
    return Shape(
        f"instruction and {answer}",
        ("instruction", answer),
        f"{answer!r} answers 'instruction', with 'input' below it where there is one",
        lambda row: all(isinstance(row.get(key), str) for key in ("instruction", answer)),
        lambda row: from_instruction(row, answer),
    )


def _preference_schema(pairs: Any) -> Shape:
    how = f"{IMITATED}: {pairs.how}"
    name = f"preference pairs, {pairs.name}"
    return Shape(name, pairs.needs, how, pairs.fits, lambda row: from_pair(pairs.convert(row)))


def _is_transcript(row: RowDict) -> bool:
    text = row.get("text")
    return isinstance(text, str) and bool(MARKER.match(text)) and ASSISTANT in text


# The first that fits a row is the row's: a formatted `text` beside the columns it was made of, say.
DIALOGUES: list[Shape] = [
    *map(_messages_schema, ("messages", "conversations")),
    *map(_prompt_schema, ("completion", "response")),
    *map(_instruction_schema, ("output", "response")),
    *map(_preference_schema, PAIR_SCHEMAS),
    Shape(
        "transcripts",
        ("text",),
        f"'text' is a Human/Assistant transcript; {EVERY}",
        _is_transcript,
        from_text_transcript,
    ),
    Shape(
        "plain text",
        ("text",),
        "'text' is text without speakers; all of it is imitated",
        lambda row: isinstance(row.get("text"), str) and not _is_transcript(row),
        from_text,
    ),
]
