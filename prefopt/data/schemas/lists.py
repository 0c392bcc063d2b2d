"""Rows with a prompt and a list of responses that are ranked or scored.

The scores or ranks stand in a list beside the responses, or in each response, as an object. A
response whose score is no number (null, "N/A", NaN) counts as not rated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from prefopt.data.conversations import read_prompt, read_response
from prefopt.data.messages import as_list
from prefopt.data.records import Candidates, Message
from prefopt.data.schemas.base import (
    ABOUT,
    LISTS,
    PROMPTS,
    RowDict,
    Schema,
    Within,
    number,
    source_of,
)

# What stands beside a prompt; the margin is the difference of the scores.
AROUND = {key: names for key, names in ABOUT.items() if key != "margin"}
NAMES = {
    "prompt": PROMPTS,
    "responses": ("responses", "completions", "answers", "candidates", "generations"),
    "scores": ("scores", "ratings", "rating", "rewards"),
    "ranks": ("ranks", "rank"),
    **AROUND,
}
# What a response that is an object calls how good it is. UltraFeedback's annotations go before its
# `overall_score`, in which some 1 of 10 stand for 10.
OWN_SCORES = ("annotations", "score", "rating", "reward", "overall_score")
OWN_RANKS = ("rank",)


def read_list(row: RowDict, scores: Any, sign: int) -> Candidates | str:
    """The row's responses, each as good as ``sign`` times its entry of ``scores``: a list, or the
    key of what stands in each response (`Within`)."""
    responses, scores = as_list(row["responses"]), as_list(scores)
    if not isinstance(responses, list):
        return f"the responses are {type(responses).__name__}, not a list"
    values = _values(responses, scores)
    if isinstance(values, str):
        return values
    found = _read_responses(row, responses, values)
    if isinstance(found, str):
        return found
    prompt, turns = found
    return Candidates(prompt, turns, [sign * value + 0.0 for value in values], source_of(row))


def _read_responses(
    row: RowDict, responses: list[Any], values: list[float]
) -> tuple[list[Message], list[list[Message]]] | str:
    """(prompt, the responses, empty where they are not rated and not readable), or what is wrong
    with the row."""
    opened = read_prompt(row["prompt"], row.get("system"), row.get("tools"))
    if isinstance(opened, str):
        return opened
    prompt, answer = opened
    read: list[list[Message]] = []
    for value, response in zip(values, responses, strict=True):
        turns = read_response(response, answer)
        if isinstance(turns, str) and not math.isnan(value):
            return turns
        read.append([] if isinstance(turns, str) else turns)
    return prompt, read


def _values(responses: list[Any], scores: Any) -> list[float] | str:
    """A number for each response, NaN for what is none, or why that is not known."""
    if isinstance(scores, Within):
        scores = [_inner(response, scores) for response in responses]
    if not isinstance(scores, list):
        return f"the scores or ranks are {type(scores).__name__}, not a list"
    if len(scores) != len(responses):
        return "not as many scores or ranks as responses"
    numbers = [number(score) for score in scores]
    if numbers and all(value is None for value in numbers):
        return "no scores or ranks"
    return [math.nan if value is None else value for value in numbers]


def _inner(response: Any, key: str) -> Any:
    """What stands under a key of the response or of its annotations, if it is an object."""
    if not isinstance(response, Mapping):
        return None
    annotations = response.get("annotations")
    about = annotations if isinstance(annotations, Mapping) else {}
    if key == "annotations":
        ratings = [value for inner in about.values() if (value := _rating(inner)) is not None]
        return sum(ratings) / len(ratings) if ratings else None
    return response[key] if key in response else _rating(about.get(key))


def _rating(annotation: Any) -> float | None:
    """UltraFeedback's {"Rating": "4", "Rationale": ...}, or a plain number."""
    return number(annotation.get("Rating") if isinstance(annotation, Mapping) else annotation)


# --- which rows they read ----------------------------------------------------------------------


def _has_lists(row: RowDict, key: str) -> bool:
    return isinstance(as_list(row.get("responses")), list) and (
        isinstance(row.get(key), Within) or isinstance(as_list(row.get(key)), list)
    )


def _has_own(row: RowDict, key: str) -> bool:
    """Some response has a number under this key, and none under one that goes before it."""
    responses = as_list(row.get("responses"))
    if not isinstance(responses, list) or any(row.get(k) is not None for k in ("scores", "ranks")):
        return False
    keys = (own for own in (*OWN_SCORES, *OWN_RANKS) if _any_number(responses, own))
    return next(keys, None) == key


def _any_number(responses: list[Any], key: str) -> bool:
    return any(number(_inner(response, key)) is not None for response in responses)


def _beside(name: str, key: str, sign: int, order: str) -> Schema:
    how = f"a list of responses to 'prompt', best first by {order}"
    needs = ("prompt", "responses", key)
    names = {k: v for k, v in NAMES.items() if k in needs or k not in ("scores", "ranks")}
    fits: Callable[[RowDict], bool] = lambda row: _has_lists(row, key)  # noqa: E731
    return Schema(name, LISTS, names, needs, how, fits, lambda row: read_list(row, row[key], sign))


def _within(key: str, sign: int, order: str) -> Schema:
    how = f"a list of responses to 'prompt', best first by {order}"
    names = {k: v for k, v in NAMES.items() if k not in ("scores", "ranks")}
    return Schema(
        f"list with {key}",
        LISTS,
        names,
        ("prompt", "responses"),
        how,
        lambda row: _has_own(row, key),
        lambda row: read_list(row, Within(key), sign),
    )


LIST_SCHEMAS: list[Schema] = [
    _beside("scored list", "scores", 1, "'scores' (more is better)"),
    _beside("ranked list", "ranks", -1, "'ranks' (the smallest is the best)"),
    _within("annotations", 1, "the mean rating in the 'annotations' of each (more is better)"),
    *(_within(key, 1, f"the {key!r} of each (more is better)") for key in OWN_SCORES[1:]),
    *(_within(key, -1, f"the {key!r} of each (the smallest is the best)") for key in OWN_RANKS),
]


def _read_unrated(row: RowDict) -> Candidates | str:
    responses = as_list(row["responses"])
    if not isinstance(responses, list):
        return f"the responses are {type(responses).__name__}, not a list"
    found = _read_responses(row, responses, [0.0] * len(responses))
    if isinstance(found, str):
        return found
    return Candidates(*found, [0.0] * len(responses), source_of(row))


# For those who rate the responses themselves: all alike.
UNRATED_LIST = Schema(
    "list of responses",
    LISTS,
    {key: names for key, names in NAMES.items() if key not in ("scores", "ranks")},
    ("prompt", "responses"),
    "a list of responses to 'prompt'",
    lambda row: isinstance(as_list(row.get("responses")), list),
    _read_unrated,
)
