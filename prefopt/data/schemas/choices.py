"""Rows with two responses side by side and a verdict in another column: which one is better."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefopt.data.conversations import compare, read_post, read_prompt, read_response
from prefopt.data.messages import Turns, from_json, message_json
from prefopt.data.records import Message, Pair
from prefopt.data.schemas.base import (
    ABOUT,
    PROMPTS,
    Names,
    Noted,
    RowDict,
    Schema,
    number,
    source_of,
)
from prefopt.data.schemas.verdicts import KINDS, SCORES, Kind, Verdict, read_choice, read_scores

SIDES = ("response_a", "response_b")
CALLED = (
    *(("response_a", "response_b"), ("response_A", "response_B"), ("response_0", "response_1")),
    *(("response_1", "response_2"), ("response1", "response2"), ("answer_a", "answer_b")),
    *(("answer_0", "answer_1"), ("answer_1", "answer_2"), ("completion_a", "completion_b")),
    *(("completion_1", "completion_2"), ("output_a", "output_b"), ("output_1", "output_2")),
    *(("conversation_a", "conversation_b"), ("human_ref_A", "human_ref_B")),
)
DISAGREES = "the scores of the responses say the other one is better; the label decides"
OTHERWISE = "the other verdict beside the one that is read names the other response"


# --- the two responses -------------------------------------------------------------------------


def _sides(row: RowDict) -> tuple[Turns, Turns, Turns] | str:
    """(prompt, first, second response) of texts, conversations or lists of answers."""
    prompt, system, tools = (row.get(key) for key in ("prompt", "system", "tools"))
    first, second = (message_json(row[key]) for key in SIDES)
    if isinstance(first, str) and isinstance(second, str) and not _is_encoded(prompt):
        return _answers(prompt, first, second, system, tools)
    turns = _zipped(prompt, first, second)
    if isinstance(turns, str):
        return turns
    if turns is not None:
        return compare(None, *turns, system, tools)
    if prompt is None or isinstance(first, list) or isinstance(second, list):
        return compare(message_json(prompt), first, second, system, tools)
    return _answers(prompt, first, second, system, tools)


def _answers(
    prompt: Any, first: Any, second: Any, system: Any, tools: Any
) -> tuple[Turns, Turns, Turns] | str:
    """Of one response each to a prompt."""
    opened = read_prompt(message_json(prompt), system, tools)
    if isinstance(opened, str):
        return opened
    turns, answer = opened
    a, b = (read_response(value, answer) for value in (first, second))
    if isinstance(a, str) or isinstance(b, str):
        return a if isinstance(a, str) else str(b)
    return turns, a, b


def _is_encoded(value: Any) -> bool:
    """Whether this looks like the JSON text of a list of texts and nulls."""
    starts = ('["', "[null", "[]")
    return isinstance(value, str) and value.startswith(starts) and value.endswith("]")


def _zipped(*lists: Any) -> tuple[list[Any], list[Any]] | str | None:
    """Two conversations out of lists of prompts and of answers to each, perhaps as JSON text; None
    for anything else."""
    encoded = all(map(_is_encoded, lists))
    read = [from_json(value) if encoded else value for value in lists]
    if not encoded and not all(isinstance(v, list) and v and _are_texts(v) for v in read):
        return None
    if not all(isinstance(value, list) and _are_texts(value) for value in read):
        return "the turns are no lists of texts in JSON"
    asked, *answered = read
    if any(len(side) != len(asked) for side in answered):
        return "not as many answers as prompts"
    if any(text is None for value in read for text in value):
        return "a turn is null"
    roles = ("user", "assistant")
    first, second = (
        [
            {"role": role, "content": text}
            for turn in zip(asked, side, strict=True)
            for role, text in zip(roles, turn, strict=True)
        ]
        for side in answered
    )
    return first, second


def _are_texts(values: list[Any]) -> bool:
    return all(value is None or isinstance(value, str) for value in values)


# --- rows to pairs -----------------------------------------------------------------------------


def _pair(row: RowDict, verdict: Verdict, sides: tuple[Turns, Turns, Turns]) -> Pair:
    """The better response as chosen; of a tie the first one."""
    prompt, first, second = sides
    if verdict.first < 0.5:
        first, second = second, first
    margin = number(row.get("margin")) if verdict.margin is None else verdict.margin
    preference = 0.5 if verdict.first == 0.5 else 1.0
    return Pair(prompt, first, second, margin, source_of(row), preference=preference)


def _convert(kind: Kind) -> Callable[[RowDict], Pair | Noted | str]:
    def convert(row: RowDict) -> Pair | Noted | str:
        verdict = kind.read(row)
        if isinstance(verdict, str):
            return verdict
        sides = _sides(row)
        if isinstance(sides, str):
            return sides
        pair, note = _pair(row, verdict, sides), _note(row, verdict)
        return Noted(pair, note) if note else pair

    return convert


def _note(row: RowDict, verdict: Verdict) -> str | None:
    """Whether something else in the row says that the other response is the better one."""
    if row.get("labels") is not None and row.get("score_a") is not None:
        scores = read_scores(row) if row.get("score_b") is not None else ""
        if isinstance(scores, Verdict) and abs(scores.first - verdict.first) == 1:
            return DISAGREES
    if row.get("other") is not None:
        other = read_choice({"choice": row["other"]})
        if isinstance(other, Verdict) and other.first != verdict.first:
            return OTHERWISE
    return None


def _fits(kind: Kind) -> Callable[[RowDict], bool]:
    def fits(row: RowDict) -> bool:
        kinds: Any = str | list | dict
        return (
            all(isinstance(row.get(key), kinds) for key in SIDES)
            and all(row.get(key) is not None for key in kind.needs)
            and isinstance(kind.read(row), Verdict)
        )

    return fits


# --- summaries ---------------------------------------------------------------------------------


def from_summaries(row: RowDict) -> Pair | str:
    """openai/summarize_from_feedback, `comparisons`: two summaries of a post or an article."""
    verdict = read_choice(row)
    if isinstance(verdict, str):
        return verdict
    prompt = read_post(row["info"])
    if prompt is None:
        return "'info' holds neither a post nor an article"
    summaries = row["summaries"]
    if not isinstance(summaries, list) or len(summaries) != 2:
        return "'summaries' is no list of two"
    texts = [value.get("text") if isinstance(value, dict) else None for value in summaries]
    if not all(isinstance(text, str) for text in texts):
        return "a summary has no text"
    a, b = ([Message("assistant", str(text).removeprefix(" "))] for text in texts)
    return _pair(row, verdict, ([Message("user", prompt)], a, b))


def _schema(kind: Kind) -> Schema:
    sides: Names = dict(zip(SIDES, zip(*CALLED, strict=True), strict=True))
    scores = tuple(SCORES) if "score_a" in kind.names else ()
    return Schema(
        kind.name,
        kind.level,
        {"prompt": PROMPTS, **sides, **ABOUT, **kind.names},
        (*SIDES, *kind.needs),
        f"'prompt' asks, 'response_a' (first) and 'response_b' (second) answer, {kind.how}",
        _fits(kind),
        _convert(kind),
        together=(SIDES, *((scores,) if scores else ())),
        refuse=kind.refuse,
    )


CHOICE_SCHEMAS: list[Schema] = [
    *map(_schema, KINDS),
    Schema(
        "summaries",
        KINDS[0].level,
        {"info": (), "summaries": (), "choice": (), "source": ()},
        ("info", "summaries", "choice"),
        "'info' holds a post or an article, 'summaries' two summaries of it, 'choice' the better "
        "one's index, 0 or 1",
        lambda row: isinstance(row.get("info"), dict) and isinstance(row.get("summaries"), list),
        from_summaries,
    ),
]
