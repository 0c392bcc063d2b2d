"""Shapes in which the responses to a prompt stand in rows of their own: with a score, or a label.

Rows are grouped by the content of the prompt, wherever in the source they stand. What they say is
kept on a temporary file until all are read.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from prefopt.data.conversations import read_post, read_prompt, read_response
from prefopt.data.files import Row
from prefopt.data.records import Candidates, Message
from prefopt.data.schemas.base import (
    LABELLED,
    PROMPTS,
    SCORED,
    Item,
    RowDict,
    Schema,
    Within,
    number,
    source_of,
)
from prefopt.data.schemas.lists import AROUND
from prefopt.data.schemas.trees import TREE_SCHEMAS
from prefopt.data.spool import Lines
from prefopt.errors import InputError

NAMES = {
    "prompt": PROMPTS,
    "response": ("response", "completion", "answer"),
    "score": ("score", "rating", "reward", "helpfulness"),
    **AROUND,
}
LABELS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
LABEL_NAMES = {
    "prompt": PROMPTS,
    "completion": ("completion", "response", "answer"),
    "label": (),
    **AROUND,
}


class Rated(NamedTuple):
    """One response to a prompt and how good it is."""

    prompt: list[Message]
    response: list[Message]
    score: float
    source: str | None


# --- one row -----------------------------------------------------------------------------------


def read_scored(row: RowDict) -> Rated | str:
    """A prompt, one response and its score."""
    score = number(row["score"])
    if score is None:
        return "the score is no number"
    return _read(row, row["response"], score)


def read_summary(row: RowDict) -> Rated | str:
    """A post, one summary of it and what it is rated on one of the axes."""
    summary, prompt = row["summary"], read_post(row["info"])
    if not isinstance(summary, dict):
        return f"the summary is {type(summary).__name__}, no object"
    axes, text, by = summary.get("axes"), summary.get("text"), row.get("score")
    key = by if isinstance(by, Within) else "overall"
    score = number(axes.get(key)) if isinstance(axes, dict) else None
    if score is None:
        return "the score is no number"
    if prompt is None:
        return "'info' holds neither a post nor an article"
    if not isinstance(text, str):
        return "the summary has no text"
    said = [Message("assistant", text.removeprefix(" "))]
    return Rated([Message("user", prompt)], said, score, source_of(row))


def read_labelled(row: RowDict) -> Rated | str:
    """A prompt, one response and whether it is a good one (score 1) or not (0)."""
    label = read_label(row["label"])
    if label is None:
        return f"the label is {row['label']!r:.40}, neither true nor false"
    return _read(row, row["completion"], float(label))


def read_label(value: Any) -> bool | None:
    """Whether a response is a good one; None for what is neither true nor false."""
    return LABELS.get(str(value).lower()) if _is_plain(value) else None


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def _read(row: RowDict, response: Any, score: float) -> Rated | str:
    opened = read_prompt(row["prompt"], row.get("system"), row.get("tools"))
    if isinstance(opened, str):
        return opened
    prompt, answer = opened
    turns = read_response(response, answer)
    return turns if isinstance(turns, str) else Rated(prompt, turns, score, source_of(row))


# --- all rows ----------------------------------------------------------------------------------


class _Groups:
    """Rated responses on a temporary file, by prompt: memory holds a number for each row and a
    digest for each prompt."""

    def __init__(self) -> None:
        self.lines, self.group = Lines(), array("q")
        self.known: dict[bytes, int] = {}

    def add(self, where: str, rated: Rated) -> None:
        prompt = json.dumps(rated.prompt)
        key = blake2b(prompt.encode(), digest_size=16).digest()
        self.group.append(self.known.setdefault(key, len(self.known)))
        self.lines.append(json.dumps([where, *rated]).encode())

    def __iter__(self) -> Iterator[tuple[str, list[Rated]]]:
        """(where the first one stands, all of one prompt) in the order of the first ones."""
        group = np.frombuffer(self.group, dtype=np.int64)
        order = np.argsort(group, kind="stable")
        ends = np.flatnonzero(np.diff(group[order], append=-1)) + 1
        for rows in np.split(order, ends[:-1]) if len(group) else []:
            read = [json.loads(self.lines[row]) for row in rows]
            yield read[0][0], [_rated(*fields) for _, *fields in read]


def _rated(prompt: Any, response: Any, score: float, source: str | None) -> Rated:
    turns = [[Message(*turn) for turn in side] for side in (prompt, response)]
    return Rated(turns[0], turns[1], score, source)


def _gathered(rows: Iterator[Row], schema: Schema, groups: _Groups) -> Iterator[Item]:
    """The rows that are of no use; the others go to the groups."""
    for where, row in rows:
        absent = [key for key in schema.needs if row.get(key) is None]
        rated = (
            f"{absent[0]!r} is {'null' if absent[0] in row else 'missing'}"
            if absent
            else schema.convert(row)
        )
        if isinstance(rated, str):
            yield Item(where, rated)
        else:
            groups.add(where, rated)


def _gather(schema: Schema) -> Schema:
    """The schema, with the responses to each prompt gathered: the mean score of one that is there
    several times."""

    def gather(rows: Iterator[Row]) -> Iterator[Item]:
        groups = _Groups()
        yield from _gathered(rows, schema, groups)
        for where, group in groups:
            made = _mean_scores(group)
            alone = "only one response to its prompt" if len(made.responses) < 2 else None
            yield Item(where, alone or made, len(group))

    return schema._replace(gather=gather)


def _mean_scores(group: list[Rated]) -> Candidates:
    scores: dict[tuple[Message, ...], list[float]] = {}
    for rated in group:
        scores.setdefault(tuple(rated.response), []).append(rated.score)
    means = [sum(values) / len(values) for values in scores.values()]
    return Candidates(group[0].prompt, [list(turns) for turns in scores], means, group[0].source)


def gather_labelled(rows: Iterator[Row]) -> Iterator[Item]:
    """The good and the bad responses to each prompt that has both; InputError if none has."""
    groups, both = _Groups(), 0
    yield from _gathered(rows, LABELLED_ROWS, groups)
    for where, group in groups:
        made: Candidates | str = "no response to its prompt has the other label"
        if len({rated.score for rated in group}) > 1:
            responses, scores = [r.response for r in group], [r.score for r in group]
            made, both = Candidates(group[0].prompt, responses, scores, group[0].source), both + 1
        yield Item(where, made, len(group))
    if len(groups.known) and not both:
        raise InputError(
            "The rows are single responses with a label, and no prompt has one that is good and "
            "one that is not: there are no pairs; train on them as they are with --loss kto "
            "(load_feedback)."
        )


# --- which rows they read ----------------------------------------------------------------------


def _has_texts(row: RowDict, response: str) -> bool:
    return all(isinstance(row.get(key), str | list) for key in ("prompt", response))


SCORED_ROWS = _gather(
    Schema(
        "scored rows",
        SCORED,
        NAMES,
        ("prompt", "response", "score"),
        "one 'response' to 'prompt' in each row, with its 'score' (more is better); grouped by "
        "prompt",
        lambda row: _has_texts(row, "response") and number(row.get("score")) is not None,
        read_scored,
    )
)
# openai/summarize_from_feedback, `axis`.
SUMMARIES = _gather(
    Schema(
        "rated summaries",
        SCORED,
        {"info": (), "summary": (), "score": (), "source": ()},
        ("info", "summary"),
        "'info' holds a post or an article, 'summary' one summary of it, rated on 'axes' (more is "
        "better), by default 'overall'; grouped by post",
        lambda row: isinstance(row.get("info"), dict) and isinstance(row.get("summary"), dict),
        read_summary,
    )
)
# For those who rate the responses themselves: all alike.
UNRATED_ROWS = _gather(
    Schema(
        "rows of responses",
        SCORED,
        {key: names for key, names in NAMES.items() if key != "score"},
        ("prompt", "response"),
        "one 'response' to 'prompt' in each row; grouped by prompt",
        lambda row: _has_texts(row, "response"),
        lambda row: _read(row, row["response"], 0.0),
    )
)
LABELLED_ROWS = Schema(
    "labelled rows",
    LABELLED,
    LABEL_NAMES,
    ("prompt", "completion", "label"),
    "one 'completion' of 'prompt' in each row, good or not by its 'label'; grouped by prompt",
    lambda row: _has_texts(row, "completion") and _is_plain(row.get("label")),
    read_labelled,
    gather_labelled,
)
GROUPED_SCHEMAS: list[Schema] = [*TREE_SCHEMAS, SCORED_ROWS, SUMMARIES, LABELLED_ROWS]
