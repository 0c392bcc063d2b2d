"""Which tokens of a conversation the model has to write.

The rules:
- An assistant turn begins where a prompt that asks for it ends (`render_prompt`), and it ends with
  the token that ends the turn, if the template writes one. White space and the next speaker's
  header behind that are not scored. The calls of tools belong to the turn that makes them.
- Both ends are found in tokens, as the longest run with which the whole conversation and the
  conversation up to there begin. A token that holds a piece of the next turn too is not scored.
- The last turn ends with the EOS that ends the conversation, or with one appended.
- Some chat templates write a turn otherwise once others follow (they leave out what was thought).
  Such a turn is no longer what the model would write, so it is context and not scored.
"""

from __future__ import annotations

import os.path
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from prefopt.data.records import SPOKEN, Message
from prefopt.data.template import render_conversation, render_prompt
from prefopt.data.tokens import TextTokenizer
from prefopt.errors import InputError

REWRITTEN = "assistant turns that the chat template rewrites, not scored"
NOT_A_PREFIX = "prompt not a prefix of its conversation, in tokens"
EOS_INSIDE = "responses with an EOS token inside"


class Texts(NamedTuple):
    """A conversation as text, and up to where each turn that is scored begins and ends.

    The last turn ends where the conversation does (None). Without turns, all of it is scored.
    """

    whole: str
    turns: list[tuple[str, str | None]] | None
    rewritten: int = 0

    def all(self) -> list[str]:
        """Every text whose tokens `scored_tokens` asks for."""
        cuts = (text for turn in self.turns or [] for text in turn if text is not None)
        return [self.whole, *cuts]


def spoken_turns(turns: Sequence[Message], first: int) -> list[tuple[int, int]]:
    """(start, end) of each assistant turn from `first` on, with the calls that it makes."""
    found: list[tuple[int, int]] = []
    for i in range(first, len(turns)):
        if turns[i].role not in SPOKEN:
            continue
        if turns[i].role == "tool_calls" and found and found[-1][1] == i:
            found[-1] = (found[-1][0], i + 1)
        else:
            found.append((i, i + 1))
    return found


def conversation_texts(
    turns: Sequence[Message], spoken: Sequence[tuple[int, int]], tokenizer: TextTokenizer
) -> Texts:
    """The conversation up to the end of the last of the `spoken` turns (at least one), all of which
    are scored. Raises InputError where the template refuses it."""
    turns = turns[: spoken[-1][1]]  # what follows answers nothing
    whole = render_conversation(turns, [], tokenizer.tokenizer, tokenizer.template)
    found: list[tuple[str, str | None]] = []
    for start, end in spoken:
        before = _cut(turns[:start], whole, tokenizer) if start else None
        after = (None, "") if end == len(turns) else _cut(turns[:end], whole, tokenizer)
        if before and after:
            found.append((before[1], after[0]))
    return Texts(whole, found, len(spoken) - len(found))


def _cut(turns: Sequence[Message], whole: str, tokenizer: TextTokenizer) -> tuple[str, str] | None:
    """The conversation up to here, (as it stands, with what opens an assistant turn), or None where
    the whole conversation begins otherwise: where what both have in common is not in it."""
    try:
        closed = render_conversation(turns, [], tokenizer.tokenizer, tokenizer.template)
        opened = render_prompt(turns, tokenizer.tokenizer, tokenizer.template)
    except InputError:
        return None
    known = whole.startswith((closed, opened)) or whole.startswith(
        os.path.commonprefix([closed, opened])  # noqa: RUF071, characters are meant
    )
    return (closed, opened) if known else None


def scored_tokens(
    texts: Texts, ids: Mapping[str, np.ndarray], tokenizer: TextTokenizer, counts: Counter[str]
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """(tokens of the conversation up to its end, where the turns that are scored start and end);
    `ids` has the tokens of every text."""
    whole = ids[texts.whole]
    if texts.turns is None:
        tokens = ended(whole, tokenizer)
        return tokens, [(0, len(tokens))]
    tokens, spans = whole, []
    for opening, closing in texts.turns:
        start = common_prefix(ids[opening], whole)
        counts[NOT_A_PREFIX] += start < len(ids[opening])
        if closing is None:
            tokens = np.concatenate([whole[:start], ended(whole[start:], tokenizer)])
            spans.append((start, len(tokens)))
        else:
            turn = whole[start : common_prefix(ids[closing], whole)]
            spans.append((start, start + _without_tail(turn, tokenizer)))
    for start, end in spans:
        inside = tokens[start : end - 1] == tokenizer.eos
        counts[EOS_INSIDE] += bool(inside.any())
    return tokens, spans


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix of two id arrays."""
    size = min(len(a), len(b))
    different = np.flatnonzero(a[:size] != b[:size])
    return int(different[0]) if len(different) else size


def ended(response: np.ndarray, tokenizer: TextTokenizer) -> np.ndarray:
    """The response up to the EOS that ends it (only white space may follow), or with one added."""
    ends = np.flatnonzero(response == tokenizer.eos)
    if len(ends) and tokenizer.blank(response[ends[-1] + 1 :]):
        return response[: ends[-1] + 1]
    return np.append(response, np.int32(tokenizer.eos))


def _without_tail(turn: np.ndarray, tokenizer: TextTokenizer) -> int:
    """Length of the turn up to the token that ends it, where only white space follows that."""
    at = np.flatnonzero(np.isin(turn, tokenizer.turn_ends))
    if len(at) and tokenizer.blank(turn[at[-1] + 1 :]):
        return int(at[-1]) + 1
    return len(turn)
