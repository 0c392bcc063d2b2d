"""Rows with one preferred and one other response in columns that say which is which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from prefopt.data.conversations import (
    ASSISTANT,
    HUMAN,
    MARKER,
    compare,
    is_open_transcript,
    opened,
    read_extra_id,
    read_prompt,
    read_transcript,
    reply,
)
from prefopt.data.messages import Turns, as_list, message_json
from prefopt.data.records import Message, Pair
from prefopt.data.schemas.base import (
    ABOUT,
    PAIRS,
    PROMPTS,
    Noted,
    RowDict,
    Schema,
    number,
    source_of,
    strings,
    wrong_type,
)

SIDES = ("chosen", "rejected")
NEEDED = ("prompt", *SIDES)
SCORES = ("chosen_score", "rejected_score")
NAMES = {
    "prompt": (*PROMPTS, "conversations"),
    "chosen": (
        *("chosen", "chosen_response", "response_j", "response_chosen", "chosen_answer"),
        *("preferred_output", "preferred"),
    ),
    "rejected": (
        *("rejected", "rejected_response", "response_k", "response_rejected", "rejected_answer"),
        *("non_preferred_output", "dispreferred"),
    ),
    "chosen_score": (
        *("chosen_score", "score_chosen", "chosen-rating", "chosen_rating", "rating_chosen"),
        "chosen_avg_rating",
    ),
    "rejected_score": (
        *("rejected_score", "score_rejected", "rejected-rating", "rejected_rating"),
        *("rating_rejected", "rejected_avg_rating"),
    ),
    # Both ratings in a list, in an order that is not known, beside the chosen response's own.
    "ratings": ("rating", "ratings"),
    "own_rating": ("chosen_score",),
    "status": (),
    "preference": (),
    **ABOUT,
}
TOGETHER = (SIDES, SCORES)
NO_PROBABILITY = "'preference' is not the chosen response's probability, 0.5 to 1, and is not read"
OTHERWISE = "kept as the columns name them although the scores say the other response is better"


# --- one function per schema -------------------------------------------------------------------


def from_transcripts(row: RowDict) -> Pair | Noted | str:
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


def from_transcript_prompt(row: RowDict) -> Pair | Noted | str:
    """A transcript that ends in an open assistant turn as prompt, and plain replies to it."""
    if not strings(row, *NEEDED):
        return wrong_type(row, *NEEDED)
    if not is_open_transcript(row["prompt"]):
        return "the prompt does not end with an open assistant turn"
    read = read_prompt(row["prompt"])
    if isinstance(read, str):
        return read
    turns, answer = read
    return _pair(row, turns, answer(row["chosen"]), answer(row["rejected"]))


def from_strings(row: RowDict) -> Pair | Noted | str:
    """Three plain strings, kept exactly: one user turn and one assistant turn each way."""
    if not strings(row, *NEEDED):
        return wrong_type(row, *NEEDED)
    return _pair(
        row,
        read_extra_id(row["prompt"]) or [Message("user", row["prompt"])],
        [Message("assistant", row["chosen"])],
        [Message("assistant", row["rejected"])],
    )


def from_messages(row: RowDict) -> Pair | Noted | str:
    """Message lists: whole conversations or last turns, with or without a `prompt` column."""
    sides = compare(row.get("prompt"), row["chosen"], row["rejected"])
    return sides if isinstance(sides, str) else _pair(row, *sides)


def from_json_messages(row: RowDict) -> Pair | Noted | str:
    """Message lists as JSON text."""
    read = {key: message_json(row.get(key)) for key in NEEDED}
    wrong = next((key for key in SIDES if not isinstance(read[key], list)), None)
    return f"{wrong!r} is not JSON text of messages" if wrong else from_messages({**row, **read})


# --- what stands beside the two responses ------------------------------------------------------


class _Gap(NamedTuple):
    """By how much the chosen response is the better one, and with which probability."""

    margin: float | None
    preference: float = 1.0
    note: str | None = None


def _pair(row: RowDict, prompt: Turns, chosen: Turns, rejected: Turns) -> Pair | Noted | str:
    """Add system turn, tools, margin, source, and whether it is a tie."""
    turns = opened(prompt, row.get("system"), row.get("tools"))
    if isinstance(turns, str):
        return turns
    gap = _gap(row)
    pair = Pair(turns, chosen, rejected, gap.margin, source_of(row), preference=gap.preference)
    return Noted(pair, gap.note) if gap.note else pair


def _gap(row: RowDict) -> _Gap:
    rated, given = _rated(row), number(row.get("margin"))
    margin = rated if given is None else given
    preference = number(row.get("preference"))
    if preference is not None and 0.5 <= preference <= 1:
        return _Gap(margin, preference)
    if preference is not None:
        return _Gap(margin, 1.0, NO_PROBABILITY)
    if rated == 0 or row.get("status") == "tie":  # a `margin` of 0 is a small one
        return _Gap(margin, 0.5)
    return _Gap(margin, 1.0, OTHERWISE if margin is not None and margin < 0 else None)


def _rated(row: RowDict) -> float | None:
    """The chosen response's score less the other's, as far as the row says."""
    chosen, rejected = (number(row.get(key)) for key in SCORES)
    if chosen is not None and rejected is not None:
        return chosen - rejected
    ratings = as_list(row.get("ratings"))
    if not isinstance(ratings, list) or len(ratings) != 2:
        return None
    first, second = map(number, ratings)
    if first is None or second is None:
        return None
    own = first if first == second else number(row.get("own_rating"))
    return 2 * own - first - second if own in (first, second) else None


# --- which rows they read ----------------------------------------------------------------------


def _has_markers(row: RowDict) -> bool:
    return ASSISTANT in row["chosen"] and ASSISTANT in row["rejected"]


def _is_transcript(row: RowDict) -> bool:
    """Both responses open like a transcript and have an assistant turn."""
    return all(MARKER.match(row[key]) for key in SIDES) and _has_markers(row)


def _is_json(row: RowDict) -> bool:
    return strings(row, *SIDES) and all(isinstance(message_json(row[k]), list) for k in SIDES)


def _are_messages(row: RowDict) -> bool:
    kinds: Any = list | Mapping
    return all(isinstance(row.get(key), kinds | str) for key in SIDES) and any(
        isinstance(row.get(key), kinds) for key in NEEDED
    )


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
            and (_is_transcript(row) or (row.get("prompt") is None and _has_markers(row)))
        ),
        from_transcripts,
        together=TOGETHER,
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
        together=TOGETHER,
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
            and not _is_json(row)
        ),
        from_strings,
        together=TOGETHER,
    ),
    Schema(
        "messages",
        PAIRS,
        NAMES,
        SIDES,
        "message lists; the prompt is the turns that both conversations share, or its own column",
        _are_messages,
        from_messages,
        together=TOGETHER,
    ),
    Schema(
        "messages as JSON",
        PAIRS,
        NAMES,
        SIDES,
        "message lists in JSON text; the prompt is the turns that both conversations share, or its "
        "own column",
        _is_json,
        from_json_messages,
        together=TOGETHER,
    ),
]
