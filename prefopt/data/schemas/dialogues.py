"""The shapes that rows of conversations and plain text come in, and how each becomes a `Dialogue`.

As in base.py, a shape is a `Schema`; of preferences, in any shape, the chosen response is read.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from prefopt.data.conversations import (
    ASSISTANT,
    MARKER,
    introduced,
    read_prompt,
    read_response,
    read_transcript,
)
from prefopt.data.detect import SCHEMAS
from prefopt.data.messages import read_messages
from prefopt.data.records import Candidates, Dialogue, Message, Pair
from prefopt.data.schemas.base import RowDict, Schema, source_of
from prefopt.data.schemas.grouped import read_label

# Levels, beside those of preferences: a formatted `text` beside the columns it was made of, say.
CONVERSATION, ANSWERED, INSTRUCTED, TEXT = -3, -2, -1, 20
ABOUT = ("system", "source", "tools")


# --- one function per shape --------------------------------------------------------------------


def from_messages(row: RowDict, column: str) -> Dialogue | str:
    """A list of {role, content} or {from, value}."""
    if isinstance(row[column], str):
        return "a conversation is str, not a list of messages"
    return _dialogue(row, read_messages(row[column], "user"))


def from_prompt(row: RowDict, answer: str) -> Dialogue | str:
    """A prompt and the answer to it, each a text or a message list."""
    if read_label(row.get("label")) is False:
        return "labelled as a bad response"
    asked = read_prompt(row["prompt"], row.get("system"), row.get("tools"))
    if isinstance(asked, str):
        return asked
    prompt, reply = asked
    turns = read_response(row[answer], reply)
    if isinstance(turns, str):
        return turns
    return Dialogue(prompt + turns, None, source_of(row), context=len(prompt))


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
    return Dialogue([], row["text"], source_of(row))


def from_text_transcript(row: RowDict) -> Dialogue | str:
    """A Human/Assistant transcript in `text`."""
    if not isinstance(row["text"], str):
        return f"'text' is {type(row['text']).__name__}, not text"
    return _dialogue(row, read_transcript(row["text"]) if ASSISTANT in row["text"] else [])


def from_pair(pair: Pair) -> Dialogue:
    """The conversation that was preferred."""
    turns, given = pair.prompt + pair.chosen, len(pair.prompt)
    return Dialogue(turns, None, pair.source, pair.weight, given)


def from_preference(record: Pair | Candidates) -> Dialogue | str:
    """The conversation with the chosen or the best response."""
    if isinstance(record, Pair):
        return "tie" if record.preference == 0.5 else from_pair(record)
    rated = [i for i, score in enumerate(record.scores) if not math.isnan(score)]
    if not rated:
        return "no response has a score"
    best = max(rated, key=lambda i: record.scores[i])
    if len(rated) > 1 and record.scores[best] == min(record.scores[i] for i in rated):
        return "tie"
    turns = record.prompt + record.responses[best]
    return Dialogue(turns, None, record.source, context=len(record.prompt))


def _dialogue(row: RowDict, turns: list[Message] | str) -> Dialogue | str:
    if not isinstance(turns, str):
        turns = introduced(turns, row.get("system"), row.get("tools"))
    return turns if isinstance(turns, str) else Dialogue(turns, None, source_of(row))


# --- the list of them -------------------------------------------------------------------------

IMITATED = "chosen responses are imitated"
EVERY = "every assistant turn is imitated"


# Two columns that may both hold what is imitated, so that the names alone do not say which does.
RIVALS = (("messages", "conversations"), ("completion", "response"), ("output", "response"))


def _schema(
    name: str, level: int, needs: tuple[str, ...], how: str, fits: Any, convert: Any, *more: str
) -> Schema:
    names = dict.fromkeys((*needs, *more, *ABOUT), ()) | {"system": ("system", "system_prompt")}
    rivals = [two for two in RIVALS if set(two) & set(needs)]

    def refuse(rows: Sequence[RowDict], settled: Collection[str]) -> str | None:
        for a, b in rivals:
            both = any(row.get(a) is not None and row.get(b) is not None for row in rows)
            if both and not {a, b} & set(settled):
                return (
                    f"{a!r} and {b!r} may both hold what is to be imitated: hide one with "
                    f"columns={{{a!r}: None}} or columns={{{b!r}: None}}"
                )
        return None

    return Schema(name, level, names, needs, how, fits, convert, refuse=refuse)


def _messages_schema(column: str) -> Schema:
    return _schema(
        column,
        CONVERSATION,
        (column,),
        f"{column!r} holds message lists; {EVERY}",
        lambda row: isinstance(row.get(column), list),
        lambda row: from_messages(row, column),
    )


def _prompt_schema(answer: str) -> Schema:
    return _schema(
        f"prompt and {answer}",
        ANSWERED,
        ("prompt", answer),
        f"{answer!r} answers 'prompt' and is imitated, unless 'label' says that it is a bad one",
        lambda row: all(isinstance(row.get(key), str | list) for key in ("prompt", answer)),
        lambda row: from_prompt(row, answer),
        "label",
    )


def _instruction_schema(answer: str) -> Schema:
    return _schema(
        f"instruction and {answer}",
        INSTRUCTED,
        ("instruction", answer),
        f"{answer!r} answers 'instruction', with 'input' below it where there is one",
        lambda row: all(isinstance(row.get(key), str) for key in ("instruction", answer)),
        lambda row: from_instruction(row, answer),
        "input",
    )


def _is_transcript(row: RowDict) -> bool:
    text = row.get("text")
    return isinstance(text, str) and bool(MARKER.match(text)) and ASSISTANT in text


DIALOGUES: list[Schema] = [
    *map(_messages_schema, ("messages", "conversations")),
    *map(_prompt_schema, ("completion", "response")),
    *map(_instruction_schema, ("output", "response")),
    _schema(
        "transcripts",
        TEXT,
        ("text",),
        f"'text' is a Human/Assistant transcript; {EVERY}",
        _is_transcript,
        from_text_transcript,
    ),
    _schema(
        "plain text",
        TEXT,
        ("text",),
        "'text' is text without speakers; all of it is imitated",
        lambda row: isinstance(row.get("text"), str) and not _is_transcript(row),
        from_text,
    ),
]
# Preferences in any shape, read for the responses that were preferred.
CHOSEN: list[Schema] = [
    schema._replace(name=f"preference pairs, {schema.name}", how=f"{IMITATED}: {schema.how}")
    for schema in SCHEMAS
]
