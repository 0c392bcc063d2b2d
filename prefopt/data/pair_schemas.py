"""Rows with one preferred and one other response in columns that say which is which."""

from __future__ import annotations

from collections.abc import Sequence

from prefopt.data.conversations import (
    ASSISTANT,
    HUMAN,
    MARKER,
    Turns,
    is_open_transcript,
    opened,
    part,
    read_messages,
    read_transcript,
    reply,
)
from prefopt.data.records import SPOKEN, Message, Pair
from prefopt.data.schemas import (
    ABOUT,
    PAIRS,
    PROMPTS,
    RowDict,
    Schema,
    number,
    source_of,
    strings,
    wrong_type,
)

SIDES = ("chosen", "rejected")
NEEDED = ("prompt", *SIDES)
NAMES = {
    "prompt": PROMPTS,
    "chosen": ("chosen", "chosen_response", "response_j"),
    "rejected": ("rejected", "rejected_response", "response_k"),
    **ABOUT,
}


# --- one function per schema -------------------------------------------------------------------


def from_transcripts(row: RowDict) -> Pair | str:
    """HH-RLHF: whole transcripts; the last assistant turn differs, everything before must not."""
    if not strings(row, *SIDES):
        return wrong_type(row, *SIDES)
    chosen_context, marker, chosen = row["chosen"].rpartition(ASSISTANT)
    rejected_context, other_marker, rejected = row["rejected"].rpartition(ASSISTANT)
    if not marker or not other_marker:
        return "no assistant turn"
    if HUMAN in chosen or HUMAN in rejected:
        return "the transcript ends with a human turn"
    if chosen_context != rejected_context:
        return "contexts differ"
    return _pair(row, read_transcript(chosen_context), reply(chosen), reply(rejected))


def from_transcript_prompt(row: RowDict) -> Pair | str:
    """A transcript that ends in an open assistant turn as prompt, and plain replies to it."""
    if not strings(row, *NEEDED):
        return wrong_type(row, *NEEDED)
    context, marker, opening = row["prompt"].rpartition(ASSISTANT)
    if not marker or opening.strip():
        return "the prompt does not end with an open assistant turn"
    # The space after the marker stands in the prompt or in the reply, according to the file.
    turns = (lambda text: [Message("assistant", text)]) if opening else reply
    return _pair(row, read_transcript(context), turns(row["chosen"]), turns(row["rejected"]))


def from_strings(row: RowDict) -> Pair | str:
    """Three plain strings, kept exactly: one user turn and one assistant turn each way."""
    if not strings(row, *NEEDED):
        return wrong_type(row, *NEEDED)
    return _pair(
        row,
        [Message("user", row["prompt"])],
        [Message("assistant", row["chosen"])],
        [Message("assistant", row["rejected"])],
    )


def from_messages(row: RowDict) -> Pair | str:
    """Message lists: whole conversations or last turns, with or without a `prompt` column."""
    sides: list[Turns] = []
    for key in SIDES:
        turns = read_messages(row[key], "assistant")
        if isinstance(turns, str):
            return turns
        if not turns or turns[-1].role not in SPOKEN:
            return "no assistant turn"
        sides.append(turns)
    shared = part(*sides)
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


def _join_prompt(prompt: Turns, shared: Turns, plain: bool) -> Turns | str:
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


def _pair(
    row: RowDict, prompt: Turns, chosen: Sequence[Message], rejected: Sequence[Message]
) -> Pair | str:
    """Add system turn, margin and source."""
    turns = opened(prompt, row.get("system"))
    if isinstance(turns, str):
        return turns
    margin = number(row.get("margin"))
    return Pair(turns, list(chosen), list(rejected), margin, source_of(row))


# --- which rows they read ----------------------------------------------------------------------


def _has_markers(row: RowDict) -> bool:
    return ASSISTANT in row["chosen"] and ASSISTANT in row["rejected"]


def _is_transcript(row: RowDict) -> bool:
    """Both responses open like a transcript and have an assistant turn."""
    return all(MARKER.match(row[key]) for key in SIDES) and _has_markers(row)


PAIR_SCHEMAS: list[Schema] = [
    Schema(
        "transcripts",
        PAIRS,
        NAMES,
        SIDES,
        "'chosen' and 'rejected' are Human/Assistant transcripts; the prompt is everything before "
        "the last '\\n\\nAssistant:'",
        lambda row: (
            strings(row, *SIDES)
            and (_is_transcript(row) or ("prompt" not in row and _has_markers(row)))
        ),
        from_transcripts,
    ),
    Schema(
        "transcript prompt",
        PAIRS,
        NAMES,
        NEEDED,
        "'prompt' is a Human/Assistant transcript; 'chosen' and 'rejected' are replies to it",
        lambda row: (
            strings(row, *NEEDED) and not _is_transcript(row) and is_open_transcript(row["prompt"])
        ),
        from_transcript_prompt,
    ),
    Schema(
        "plain strings",
        PAIRS,
        NAMES,
        NEEDED,
        "'prompt', 'chosen' and 'rejected' are strings: one user turn, one assistant turn",
        lambda row: (
            strings(row, *NEEDED)
            and not _is_transcript(row)
            and not is_open_transcript(row["prompt"])
        ),
        from_strings,
    ),
    Schema(
        "messages",
        PAIRS,
        NAMES,
        SIDES,
        "message lists; the prompt is the turns that both conversations share, or its own column",
        lambda row: (
            all(isinstance(row.get(key), list | str) for key in SIDES)
            and any(isinstance(row.get(key), list) for key in NEEDED)
        ),
        from_messages,
    ),
]
