"""Dialogues and plain text to token ids, with a mask of what is imitated.

The rules:
- The tokens are those of the whole conversation, up to the end of its last assistant turn.
- An assistant turn is what the model has to write: it begins where a prompt that asks for it ends
  (`encode_prompts`), and it ends with the token that ends the turn, if the template writes one.
  White space and the next speaker's header behind that are not scored.
- Both ends are found in tokens, as the longest run with which the whole conversation and the
  conversation up to there begin. A token that holds a piece of the next turn too is not scored.
- The last turn is scored as `encode_pairs` scores a response: with the EOS that ends it, or with
  one appended.
- Some chat templates write a turn otherwise once others follow (they leave out what was thought).
  Such a turn is no longer what the model would write, so it is context and not scored.
- Plain text has no template: its first token is given and all others are scored, EOS appended.
- What is longer than `max_length` is cut at its end.
"""

from __future__ import annotations

import os.path
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from prefopt.data.encode import (
    BATCH,
    Encoded,
    EncodedSet,
    check_limits,
    common_prefix,
    decode,
    ended,
    nothing_left,
    tokenize,
)
from prefopt.data.records import Dialogue, Message
from prefopt.data.template import choose_template, render_conversation, render_prompt
from prefopt.errors import InputError

LOSS_ON = ("assistant", "all")
REWRITTEN = "assistant turns that the chat template rewrites, not scored"


class _Texts(NamedTuple):
    """A conversation as text, and up to where each of its assistant turns begins and ends.

    The last turn ends where the conversation does (None). Without turns, all of it is scored.
    """

    whole: str
    turns: list[tuple[str, str | None]] | None
    rewritten: int = 0


def encode_dialogues(
    dialogues: Iterable[Dialogue],
    tokenizer: Any,
    *,
    max_length: int = 1024,
    template: str = "auto",
    loss_on: str = "assistant",
) -> EncodedSet:
    """Encode each dialogue as a prompt with one response; see the rules above.

    The prompt is what comes before the first scored token, the response all that follows up to the
    last one, `scored` [n] says which of its tokens count (None: all). loss_on: "assistant", or
    "all" for every token but the first. Dropped, and counted: dialogues of which nothing scored is
    left, conversations the chat template refuses. Raises InputError for a tokenizer without EOS and
    when every dialogue is dropped.
    """
    check_limits(tokenizer, max_length)
    if loss_on not in LOSS_ON:
        raise InputError(f"loss_on={loss_on!r} is not one of {', '.join(LOSS_ON)}.")
    chosen = choose_template(tokenizer, template)
    counts: Counter[str] = Counter(truncated=0)
    items: list[Encoded] = []
    prompt_lengths: list[int] = []
    spoken = False
    ends = _turn_ends(tokenizer)
    for index, dialogue, texts, ids in _tokenized(dialogues, tokenizer, chosen.name, loss_on):
        spoken |= dialogue.text is None
        if isinstance(texts, str):
            counts[f"dropped: {texts}"] += 1
            continue
        counts[REWRITTEN] += texts.rewritten
        tokens, scored = _scored(texts, ids, tokenizer, ends, counts)
        scored[:1] = False  # there is nothing to predict the first token from
        at = np.flatnonzero(scored)
        if not len(at):
            counts["dropped: no token to score"] += 1
            continue
        prompt_lengths.append(int(at[0]))
        at = at[at < max_length]
        if not len(at):
            counts["dropped: prompt fills max_length"] += 1
            continue
        counts["truncated"] += len(tokens) > max_length
        response = slice(at[0], at[-1] + 1)
        items.append(
            Encoded(
                tokens[: at[0]].copy(),
                (tokens[response].copy(),),
                index,
                dialogue.weight,
                source=dialogue.source,
                scored=None if scored[response].all() else scored[response].copy(),
            )
        )
    counts = Counter({key: n for key, n in counts.items() if n or key == "truncated"})
    if not items:
        raise InputError(nothing_left(counts, prompt_lengths, max_length, "dialogue"))
    return EncodedSet(items, dict(counts), str(chosen) if spoken else "none: text without speakers")


# --- text to tokens ----------------------------------------------------------------------------


def _tokenized(
    dialogues: Iterable[Dialogue], tokenizer: Any, template: str, loss_on: str
) -> Iterator[tuple[int, Dialogue, _Texts | str, dict[str, np.ndarray]]]:
    """(index, dialogue, its texts or why it has none, tokens of each of its texts), in at most two
    calls of the tokenizer a batch."""
    numbered = enumerate(dialogues)
    while batch := list(islice(numbered, BATCH)):
        rendered = [_render(dialogue, tokenizer, template, loss_on) for _, dialogue in batch]
        kinds: dict[str, dict[str, None]] = {template: {}, "plain": {}}  # sets that keep order
        for (_, dialogue), texts in zip(batch, rendered, strict=True):
            if not isinstance(texts, str):
                kind = kinds[template if dialogue.text is None else "plain"]
                kind |= dict.fromkeys([texts.whole])
                for turn in texts.turns or []:
                    kind |= dict.fromkeys(text for text in turn if text is not None)
        ids = {
            kind: dict(zip(texts, tokenize(list(texts), tokenizer, kind), strict=True))
            for kind, texts in kinds.items()
        }
        for (index, dialogue), texts in zip(batch, rendered, strict=True):
            yield index, dialogue, texts, ids[template if dialogue.text is None else "plain"]


def _render(dialogue: Dialogue, tokenizer: Any, template: str, loss_on: str) -> _Texts | str:
    if dialogue.text is not None:
        return _Texts(dialogue.text, None)
    spoken = (i for i, turn in enumerate(dialogue.turns) if turn.role == "assistant")
    answers = [i for i in spoken if i >= dialogue.context]
    if not answers:
        return "no assistant turn"
    turns = dialogue.turns[: answers[-1] + 1]  # what follows answers nothing
    try:
        whole = render_conversation(turns, [], tokenizer, template)
    except InputError as error:
        return str(error)
    if loss_on == "all":
        return _Texts(whole, None)
    found: list[tuple[str, str | None]] = []
    for i in answers:
        before = _cut(turns[:i], whole, tokenizer, template) if i else None
        after = _cut(turns[: i + 1], whole, tokenizer, template) if i < answers[-1] else (None, "")
        if before and after:
            found.append((before[1], after[0]))
    return _Texts(whole, found, len(answers) - len(found))


def _cut(
    turns: Sequence[Message], whole: str, tokenizer: Any, template: str
) -> tuple[str, str] | None:
    """The conversation up to here, (as it stands, with what opens an assistant turn), or None where
    the whole conversation begins otherwise: where what both have in common is not in it."""
    try:
        closed = render_conversation(turns, [], tokenizer, template)
        opened = render_prompt(turns, tokenizer, template)
    except InputError:
        return None
    known = whole.startswith((closed, opened)) or whole.startswith(
        os.path.commonprefix([closed, opened])  # noqa: RUF071, characters are meant
    )
    return (closed, opened) if known else None


# --- which tokens are scored -------------------------------------------------------------------


def _scored(
    texts: _Texts, ids: dict[str, np.ndarray], tokenizer: Any, ends: list[int], counts: Counter[str]
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [T] of the conversation, which of them are scored [T] bool)."""
    whole = ids[texts.whole]
    if texts.turns is None:
        tokens = ended(whole, tokenizer)
        return tokens, np.ones(len(tokens), dtype=bool)
    tokens, spans = whole, []
    for opening, closing in texts.turns:
        start = common_prefix(ids[opening], whole)
        counts["prompt not a prefix of its conversation, in tokens"] += start < len(ids[opening])
        if closing is None:
            tokens = np.concatenate([whole[:start], ended(whole[start:], tokenizer)])
            spans.append((start, len(tokens)))
        else:
            turn = whole[start : common_prefix(ids[closing], whole)]
            spans.append((start, start + _without_tail(turn, tokenizer, ends)))
    scored = np.zeros(len(tokens), dtype=bool)
    for start, end in spans:
        scored[start:end] = True
        counts["responses with an EOS token inside"] += bool(
            (tokens[start : end - 1] == tokenizer.eos_token_id).any()
        )
    return tokens, scored


def _turn_ends(tokenizer: Any) -> list[int]:
    """Ids of the tokens that may end a turn: the special ones."""
    added = tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(i for i, token in added if token.special)}
    return sorted(special - {tokenizer.unk_token_id})


def _without_tail(turn: np.ndarray, tokenizer: Any, ends: list[int]) -> int:
    """Length of the turn up to the token that ends it, where only white space follows that."""
    at = np.flatnonzero(np.isin(turn, ends))
    if len(at) and not decode(turn[at[-1] + 1 :], tokenizer).strip():
        return int(at[-1]) + 1
    return len(turn)
