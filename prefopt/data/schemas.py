"""The shapes preference rows come in, and how each becomes a `Pair`.

A schema is a name, the columns it needs, a test of whether one row has its shape, and a function
that makes a `Pair` of a row (none of the needed columns null) or says why the row is dropped. To
support another shape, write one small function and append a `Schema` to `DETECTORS`; a row should
fit at most one of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from prefopt.data.records import Message, Pair

RowDict = dict[str, Any]

ROLES = {"system", "user", "assistant", "tool", "developer"}
NEEDED = ("prompt", "chosen", "rejected")
CANONICAL = (*NEEDED, "system", "margin", "source")
# Pairs of columns whose names say which response is the better one...
RANKED_COLUMNS = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("response_j", "response_k"),
)
# ... and pairs whose names do not: a label in another column says it.
LABELLED_COLUMNS = (
    ("response_a", "response_b"),
    ("response_0", "response_1"),
    ("response_1", "response_2"),
    ("response1", "response2"),
    ("answer_0", "answer_1"),
    ("human_ref_A", "human_ref_B"),
    ("conversation_a", "conversation_b"),
)

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
MARKER = re.compile(r"(?:\n\n|\A\s*)(Human|Assistant):")


class Schema(NamedTuple):
    """One shape of rows."""

    name: str
    needs: tuple[str, ...]
    how: str  # one clause for the report: where prompt and responses come from
    fits: Callable[[RowDict], bool]
    convert: Callable[[RowDict], Any]  # a record, or why the row is dropped


# --- one function per schema -------------------------------------------------------------------


def from_transcripts(row: RowDict) -> Pair | str:
    """HH-RLHF: whole transcripts; the last assistant turn differs, everything before must not."""
    if not _strings(row, "chosen", "rejected"):
        return _wrong_type(row, "chosen", "rejected")
    chosen_context, marker, chosen = row["chosen"].rpartition(ASSISTANT)
    rejected_context, other_marker, rejected = row["rejected"].rpartition(ASSISTANT)
    if not marker or not other_marker:
        return "no assistant turn"
    if HUMAN in chosen or HUMAN in rejected:
        return "the transcript ends with a human turn"
    if chosen_context != rejected_context:
        return "contexts differ"
    return _pair(row, read_transcript(chosen_context), _reply(chosen), _reply(rejected))


def from_transcript_prompt(row: RowDict) -> Pair | str:
    """A transcript that ends in an open assistant turn as prompt, and plain replies to it."""
    if not _strings(row, *NEEDED):
        return _wrong_type(row, *NEEDED)
    context, marker, opening = row["prompt"].rpartition(ASSISTANT)
    if not marker or opening.strip():
        return "the prompt does not end with an open assistant turn"
    # The space after the marker stands in the prompt or in the reply, according to the file.
    reply = (lambda text: [Message("assistant", text)]) if opening else _reply
    return _pair(row, read_transcript(context), reply(row["chosen"]), reply(row["rejected"]))


def from_strings(row: RowDict) -> Pair | str:
    """Three plain strings, kept exactly: one user turn and one assistant turn each way."""
    if not _strings(row, *NEEDED):
        return _wrong_type(row, *NEEDED)
    return _pair(
        row,
        [Message("user", row["prompt"])],
        [Message("assistant", row["chosen"])],
        [Message("assistant", row["rejected"])],
    )


def from_messages(row: RowDict) -> Pair | str:
    """Message lists: whole conversations or last turns, with or without a `prompt` column."""
    sides = []
    for key in ("chosen", "rejected"):
        turns = read_messages(row[key], "assistant")
        if isinstance(turns, str):
            return turns
        if not turns or turns[-1].role != "assistant":
            return "no assistant turn"
        sides.append(turns)
    shared = _shared_prompt(*sides)
    if shared is None:
        return "contexts differ"
    given = row.get("prompt")
    prompt = read_messages(given, "user") if given is not None else []
    if isinstance(prompt, str):
        return prompt
    prompt = _join_prompt(prompt, shared, isinstance(given, str))
    if isinstance(prompt, str):
        return prompt
    return _pair(row, prompt, *(turns[len(shared) :] for turns in sides))


DETECTORS: list[Schema] = [
    Schema(
        "transcripts",
        ("chosen", "rejected"),
        "'chosen' and 'rejected' are Human/Assistant transcripts; the prompt is everything before "
        "the last '\\n\\nAssistant:'",
        lambda row: (
            _strings(row, "chosen", "rejected")
            and (_is_transcript(row) or ("prompt" not in row and _has_markers(row)))
        ),
        from_transcripts,
    ),
    Schema(
        "transcript prompt",
        NEEDED,
        "'prompt' is a Human/Assistant transcript; 'chosen' and 'rejected' are replies to it",
        lambda row: _strings(row, *NEEDED) and not _is_transcript(row) and _is_open(row),
        from_transcript_prompt,
    ),
    Schema(
        "plain strings",
        NEEDED,
        "'prompt', 'chosen' and 'rejected' are strings: one user turn, one assistant turn",
        lambda row: _strings(row, *NEEDED) and not _is_transcript(row) and not _is_open(row),
        from_strings,
    ),
    Schema(
        "messages",
        ("chosen", "rejected"),
        "message lists; the prompt is the turns that both conversations share, or its own column",
        lambda row: (
            all(isinstance(row.get(key), list | str) for key in ("chosen", "rejected"))
            and any(isinstance(row.get(key), list) for key in NEEDED)
        ),
        from_messages,
    ),
]


# --- transcripts -------------------------------------------------------------------------------


def _has_markers(row: RowDict) -> bool:
    return ASSISTANT in row["chosen"] and ASSISTANT in row["rejected"]


def _is_transcript(row: RowDict) -> bool:
    """Both responses open like a transcript and have an assistant turn."""
    opens = all(MARKER.match(row[key]) for key in ("chosen", "rejected"))
    return opens and _has_markers(row)


def _is_open(row: RowDict) -> bool:
    """The prompt opens like a transcript and ends where the assistant is to speak."""
    return bool(MARKER.match(row["prompt"])) and row["prompt"].rstrip().endswith(ASSISTANT)


def read_transcript(context: str) -> list[Message]:
    """Alternating turns of a transcript; text before the first marker is a system turn.

    A marker that would repeat the speaker, or one not at the start of a paragraph, is text.
    """
    turns: list[Message] = []
    role, start = "system", 0
    for match in MARKER.finditer(context):
        speaker = "user" if match[1] == "Human" else "assistant"
        if speaker != role:
            turns.append(Message(role, context[start : match.start()]))
            role, start = speaker, match.end()
    turns.append(Message(role, context[start:]))
    preamble = turns[0].content.strip()
    spoken = [Message(turn.role, turn.content.removeprefix(" ")) for turn in turns[1:]]
    return [Message("system", preamble), *spoken] if preamble else spoken


def _reply(text: str) -> list[Message]:
    """The one space after the marker belongs to the marker."""
    return [Message("assistant", text.removeprefix(" "))]


# --- message lists -----------------------------------------------------------------------------


def read_messages(value: Any, role: str) -> list[Message] | str:
    """Messages of a list of {role, content} (or of a plain string, as `role`), or a reason."""
    if isinstance(value, str):
        return [Message(role, value)]
    if not isinstance(value, list):
        return f"a conversation is {type(value).__name__}, not a list of messages"
    out = []
    for message in value:
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            return "a message lacks 'role' or 'content'"
        if not isinstance(message["role"], str) or message["role"] not in ROLES:
            return f"unknown role {message['role']!r}"
        if not isinstance(message["content"], str):
            return f"a message's content is {type(message['content']).__name__}, not text"
        out.append(Message(message["role"], message["content"]))
    return out


def _shared_prompt(chosen: list[Message], rejected: list[Message]) -> list[Message] | None:
    """The longest common prefix that ends before an assistant turn; None if contexts differ.

    Both conversations end with an assistant turn. What follows the prefix may hold assistant and
    tool turns only: a user turn there means that the two answered different things.
    """
    shortest, n = min(len(chosen), len(rejected)), 0
    while n < shortest and chosen[n] == rejected[n]:
        n += 1
    while n > 0 and (n == shortest or chosen[n - 1].role == "assistant"):
        n -= 1
    for rest in (chosen[n:], rejected[n:]):
        if rest[0].role != "assistant" or any(m.role not in ("assistant", "tool") for m in rest):
            return None
    return chosen[:n]


def _join_prompt(prompt: list[Message], shared: list[Message], plain: bool) -> list[Message] | str:
    """One prompt from the `prompt` column and the turns that the conversations share."""
    if not prompt:
        return shared or "no prompt"
    if not shared:
        return prompt
    if plain:  # a string beside whole conversations repeats one of their turns
        text = prompt[0].content.strip()
        repeated = any(m.role == "user" and m.content.strip() == text for m in shared)
    else:
        repeated = shared[: len(prompt)] == prompt or shared[-len(prompt) :] == prompt
    if repeated:
        return shared
    if not plain and prompt[-1].role != "user":
        return prompt + shared
    return "the prompt column is not in the conversation"


# --- shared ------------------------------------------------------------------------------------


def _strings(row: RowDict, *keys: str) -> bool:
    return all(isinstance(row.get(key), str) for key in keys)


def _wrong_type(row: RowDict, *keys: str) -> str:
    wrong = [key for key in keys if not isinstance(row[key], str)]
    return ", ".join(f"{key!r} is {type(row[key]).__name__}, not text" for key in wrong)


def _pair(
    row: RowDict,
    prompt: list[Message],
    chosen: Sequence[Message],
    rejected: Sequence[Message],
) -> Pair | str:
    """Add system turn, margin and source; the prompt must leave the word to the assistant."""
    system = row.get("system")
    if isinstance(system, str) and system and not (prompt and prompt[0].role == "system"):
        prompt = [Message("system", system), *prompt]
    if not prompt:
        return "no prompt"
    if prompt[-1].role == "assistant":
        return "the prompt ends with an assistant turn"
    margin, source = row.get("margin"), row.get("source")
    return Pair(
        prompt,
        list(chosen),
        list(rejected),
        margin=float(margin) if isinstance(margin, int | float) and math.isfinite(margin) else None,
        source=source if isinstance(source, str) else None,
    )
