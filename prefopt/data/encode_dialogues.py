"""Dialogues and plain text to token ids, with a mask of what is imitated.

The rules:
- The tokens are those of the whole conversation, up to the end of its last assistant turn.
- Which of them the assistant writes, and so are scored, spoken.py says.
- The last turn is scored as `encode_pairs` scores a response: with the EOS that ends it, or with
  one appended.
- Plain text has no template: its first token is given and all others are scored, EOS appended.
- What is longer than `max_length` is cut at its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.data.chunks import encode_records
from prefopt.data.encode import SPELLED_OUT
from prefopt.data.encoded import Encoded, EncodedSet, to_record
from prefopt.data.recipe import Chunk, Recipe
from prefopt.data.records import Dialogue
from prefopt.data.spoken import (
    REWRITTEN,
    Texts,
    conversation_texts,
    scored_tokens,
    spoken_turns,
)
from prefopt.data.template import checked, render_conversation
from prefopt.data.tokens import TextTokenizer
from prefopt.errors import InputError

LOSS_ON = ("assistant", "all")
TALKS = "dialogues with speakers"  # counted to say which template they were written in


def encode_dialogues(
    dialogues: Iterable[Dialogue],
    tokenizer: Any,
    *,
    max_length: int = 1024,
    template: str = "auto",
    loss_on: str = "assistant",
    cache: Path | None = None,
    workers: int | None = None,
) -> EncodedSet:
    """Encode each dialogue as a prompt with one response; see the rules above.

    The prompt is what comes before the first scored token, the response all that follows up to the
    last one, `scored` says which of its tokens count. loss_on: "assistant", or "all" for every
    token but the first. `cache` and `workers` as of `encode_pairs`. Dropped, and counted: dialogues
    of which nothing scored is left, conversations the chat template refuses. Raises InputError for
    a tokenizer without EOS and when every dialogue is dropped.
    """
    if loss_on not in LOSS_ON:
        raise InputError(f"loss_on={loss_on!r} is not one of {', '.join(LOSS_ON)}.")
    recipe = Recipe("dialogue", template, max_length, loss_on)
    encoded = encode_records(
        dialogues, tokenizer, recipe, encode_chunk, cache=cache, workers=workers
    )
    if not encoded.counts.pop(TALKS, 0):
        encoded.template = "none: text without speakers"
    return encoded


def encode_chunk(dialogues: Sequence[Dialogue], tokenizer: TextTokenizer, recipe: Recipe) -> Chunk:
    """The dialogues in order, as many as there are left of them, and what became of the others."""
    chunk = Chunk.new()
    rendered = [_render(dialogue, tokenizer, recipe.loss_on) for dialogue in dialogues]
    kinds = {True: tokenizer, False: tokenizer.plain}
    asked: dict[bool, list[str]] = {True: [], False: []}
    for dialogue, texts in zip(dialogues, rendered, strict=True):
        if not isinstance(texts, str):
            asked[dialogue.text is None] += texts.all()
    ids = {talks: kinds[talks](texts) for talks, texts in asked.items()}
    for row, (dialogue, texts) in enumerate(zip(dialogues, rendered, strict=True)):
        talks = dialogue.text is None
        chunk.counts[TALKS] += talks
        item = texts
        if isinstance(texts, Texts):
            item = _encode(dialogue, texts, ids[talks], kinds[talks], recipe, chunk)
        if isinstance(item, Encoded):
            chunk.add(row, to_record(item))
        else:
            chunk.counts[f"dropped: {item}"] += 1
    return chunk


def _render(dialogue: Dialogue, tokenizer: TextTokenizer, loss_on: str) -> Texts | str:
    """The texts of a dialogue, or why it has none."""
    try:
        if dialogue.text is not None:
            return Texts(checked(dialogue.text), None)
        spoken = spoken_turns(dialogue.turns, dialogue.context)
        if not spoken:
            return "no assistant turn"
        if loss_on == "all":
            turns = dialogue.turns[: spoken[-1][1]]
            text = render_conversation(turns, [], tokenizer.tokenizer, tokenizer.template)
            return Texts(text, None)
        return conversation_texts(dialogue.turns, spoken, tokenizer)
    except InputError as error:
        return str(error)


def _encode(
    dialogue: Dialogue,
    texts: Texts,
    ids: dict[str, np.ndarray],
    tokenizer: TextTokenizer,
    recipe: Recipe,
    chunk: Chunk,
) -> Encoded | str:
    said = (dialogue.text,) if dialogue.text is not None else (m.content for m in dialogue.turns)
    chunk.counts[SPELLED_OUT] += any(map(tokenizer.spelled_out, said))
    chunk.counts[REWRITTEN] += texts.rewritten
    tokens, spans = scored_tokens(texts, ids, tokenizer, chunk.counts)
    scored = np.zeros(len(tokens), dtype=bool)
    for start, end in spans:
        scored[start:end] = True
    scored[:1] = False  # there is nothing to predict the first token from
    at = np.flatnonzero(scored)
    if not len(at):
        return "no token to score"
    chunk.prompts.append(int(at[0]))
    at = at[at < recipe.max_length]
    if not len(at):
        return "prompt fills max_length"
    chunk.counts["truncated"] += len(tokens) > recipe.max_length
    response = slice(at[0], at[-1] + 1)
    return Encoded(
        tokens[: at[0]],
        (tokens[response],),
        0,
        dialogue.weight,
        source=dialogue.source,
        scored=None if scored[response].all() else (scored[response],),
    )
