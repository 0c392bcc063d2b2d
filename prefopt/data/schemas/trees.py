"""Trees of messages, as OpenAssistant has them: ranked replies of an assistant to one message.

They come as a table of messages that name their parent, in any order, or as a tree in each row. A
conversation is the way from the root to a message; compared are the ranked replies to one of them,
of which rank 0 is the best. The ranks of users' messages say nothing about an assistant.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from prefopt.data.files import Row
from prefopt.data.records import Candidates, Message
from prefopt.data.schemas.base import (
    TREES,
    Item,
    Names,
    RowDict,
    Schema,
    number,
    source_of,
    strings,
)
from prefopt.data.spool import Lines

SPEAKERS = {"prompter": "user", "assistant": "assistant"}
IDS = ("message_id", "parent_id", "text", "role", "rank")
NAMES: Names = dict.fromkeys((*IDS, "deleted", "review_result", "source"), tuple[str, ...]())


def _obstacle(message: Mapping[str, Any]) -> str | None:
    """Why a message is not read, or None."""
    if not isinstance(message.get("text"), str):
        return f"'text' is {type(message.get('text')).__name__}, not text"
    role = message.get("role")
    if not isinstance(role, str) or role not in SPEAKERS:
        return f"unknown role {role!r:.40}"
    if str(message.get("deleted")).lower() == "true":
        return "the message is deleted"
    if str(message.get("review_result")).lower() == "false":
        return "the message did not pass review"
    return None


# --- a table of messages -----------------------------------------------------------------------


class _Node(NamedTuple):
    """A message that was read."""

    where: str
    role: str
    text: str
    source: str | None


class _Messages:
    """Messages on a temporary file; memory holds the id, parent, rank and role of each."""

    def __init__(self) -> None:
        self.lines = Lines()
        self.ids: dict[bytes, int] = {}
        self.parents: list[bytes | None] = []
        self.ranks, self.spoken = array("d"), bytearray()

    def add(self, where: str, row: RowDict) -> str | None:
        """Keep the message of a row, or say why not."""
        if reason := _obstacle(row):
            return reason
        own, parent = row.get("message_id"), row.get("parent_id")
        if not isinstance(own, str) or not (parent is None or isinstance(parent, str)):
            return "'message_id' or 'parent_id' is no text"
        key = _digest(own)
        if key in self.ids:
            return "a message with the same 'message_id' came before"
        self.ids[key] = len(self.ids)
        self.parents.append(_digest(parent) if parent else None)
        rank = number(row.get("rank"))
        self.ranks.append(math.nan if rank is None else rank)
        self.spoken.append(row["role"] == "assistant")
        node = _Node(where, SPEAKERS[row["role"]], row["text"], source_of(row))
        self.lines.append(json.dumps(node).encode())
        return None

    def __getitem__(self, index: int) -> _Node:
        return _Node(*json.loads(self.lines[index]))

    def parent_indices(self) -> np.ndarray:
        """Of every message the index of its parent, -1 for a root, -2 for one that is not here."""
        found = (-1 if key is None else self.ids.get(key, -2) for key in self.parents)
        return np.fromiter(found, np.int64, len(self.parents))


def _digest(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def gather_messages(rows: Iterator[Row]) -> Iterator[Item]:
    """The ranked replies to each message; a message counts where it is first of use."""
    messages = _Messages()
    for where, row in rows:
        if reason := messages.add(where, row):
            yield Item(where, reason)
    parents = messages.parent_indices()
    ways = _Ways(parents)
    used = np.zeros(len(parents), bool)
    unused = np.full(len(parents), "", object)
    for parent, replies in _replies(messages, parents):
        way = ways.to(parent)
        reason = way if isinstance(way, str) else None
        if isinstance(way, list) and messages.spoken[parent]:
            reason = "the message answers one of an assistant"
        if len(replies) < 2:
            reason = "the only ranked reply to its message"
        if reason or isinstance(way, str):
            unused[replies] = reason
            continue
        new = [at for at in (*way, *replies) if not used[at]]
        used[new] = True
        yield Item(messages[replies[0]].where, _candidates(messages, way, replies), len(new))
    for at in np.flatnonzero(~used).tolist():
        yield Item(messages[at].where, unused[at] or _why_unused(messages, at, parents))


def _replies(messages: _Messages, parents: np.ndarray) -> Iterator[tuple[int, list[int]]]:
    """(parent, the ranked replies of an assistant to it), in the order of the first replies."""
    ranked = ~np.isnan(np.frombuffer(messages.ranks)) if len(parents) else np.zeros(0, bool)
    spoken = np.frombuffer(messages.spoken, np.uint8).astype(bool)
    at = np.flatnonzero(ranked & spoken & (parents >= 0))
    if not len(at):
        return
    at = at[np.argsort(parents[at], kind="stable")]
    groups = np.split(at, np.flatnonzero(np.diff(parents[at])) + 1)
    for replies in sorted(groups, key=lambda group: group[0]):
        yield int(parents[replies[0]]), replies.tolist()


class _Ways:
    """The ways from the roots to messages, each checked once."""

    def __init__(self, parents: np.ndarray):
        self.parents = parents
        self.state = np.zeros(len(parents), np.int8)  # 1 leads to a root, 2 to nothing, 3 to itself

    def to(self, index: int) -> list[int] | str:
        """From the root to a message, or why there is no such way."""
        way, seen, at = [], set[int](), index
        while at >= 0 and at not in seen and self.state[at] < 2:
            way.append(at)
            seen.add(at)
            at = int(self.parents[at])
        state = 1 if at == -1 else 2 if at == -2 else 3 if at in seen else int(self.state[at])
        self.state[way] = state
        if state == 1:
            return way[::-1]
        return "an earlier message is missing" if state == 2 else "its messages answer each other"


def _candidates(messages: _Messages, way: list[int], replies: list[int]) -> Candidates:
    asked, answers = ([messages[at] for at in part] for part in (way, replies))
    return Candidates(
        [Message(node.role, node.text) for node in asked],
        [[Message(node.role, node.text)] for node in answers],
        [0.0 - messages.ranks[at] for at in replies],
        answers[0].source,
    )


def _why_unused(messages: _Messages, at: int, parents: np.ndarray) -> str:
    if not messages.spoken[at]:
        return "a user's message without ranked replies"
    if parents[at] < 0:
        return "an earlier message is missing" if parents[at] == -2 else "a reply to nothing"
    return "a reply without a rank"


# --- a tree in each row ------------------------------------------------------------------------


class _Turn(NamedTuple):
    """A message and the way to it."""

    message: Message
    before: _Turn | None


def read_tree(row: RowDict) -> list[Candidates] | str:
    """The ranked replies to each message of a tree; without recursion, however deep it is."""
    found: list[Candidates] = []
    stack: list[tuple[Any, _Turn | None]] = [(row["prompt"], None)]
    while stack:
        node, before = stack.pop()
        if not isinstance(node, Mapping) or _obstacle(node):
            continue
        turn = _Turn(Message(SPEAKERS[node["role"]], node["text"]), before)
        replies = node.get("replies")
        replies = replies if isinstance(replies, list) else []
        rated = [(reply, rank) for reply in replies if (rank := _rank(reply)) is not None]
        if turn.message.role == "user" and len(rated) > 1:
            responses = [[Message("assistant", reply["text"])] for reply, _ in rated]
            scores = [0.0 - rank for _, rank in rated]
            found.append(Candidates(_way(turn), responses, scores, source_of(row)))
        stack += [(reply, turn) for reply in reversed(replies)]
    return found or "no message with two ranked replies"


def _rank(node: Any) -> float | None:
    """The rank of a reply of an assistant that is of use."""
    if not isinstance(node, Mapping) or node.get("role") != "assistant" or _obstacle(node):
        return None
    return number(node.get("rank"))


def _way(turn: _Turn | None) -> list[Message]:
    way: list[Message] = []
    while turn is not None:
        way.append(turn.message)
        turn = turn.before
    return way[::-1]


# --- which rows they read ----------------------------------------------------------------------


def _is_message(row: RowDict) -> bool:
    return strings(row, "message_id", "text", "role") and row["role"] in SPEAKERS


def _is_tree(row: RowDict) -> bool:
    root = row.get("prompt")
    return isinstance(root, Mapping) and "replies" in root and "text" in root


TREE_SCHEMAS: list[Schema] = [
    Schema(
        "trees of messages",
        TREES,
        NAMES,
        IDS,
        "one message of a tree in each row; ranked replies to one message are compared, 'rank' 0 "
        "is the best",
        _is_message,
        lambda row: "",
        gather_messages,
    ),
    Schema(
        "nested trees",
        TREES,
        {"prompt": (), "source": ()},
        ("prompt",),
        "a tree of messages in each row; ranked replies to one message are compared, 'rank' 0 is "
        "the best",
        _is_tree,
        read_tree,
    ),
]
