"""Pairs of conversations to token ids, with one boundary between prompt and response.

P = prompt tokens, n_k = tokens of response k, end-of-sequence (EOS) token included.

The rules:
- The boundary is found in tokens. The prompt is the longest run of tokens with which the prompt's
  text and both whole conversations begin, so prompt + response are always the tokens of the whole
  conversation, and the same prompt serves both responses.
- EOS ends every response once: the template's own if it writes one, else one is appended.
- Of a response that is a single assistant turn every token is scored. Of one that holds turns of
  others too (the conversations part early, or a tool answers) only the assistant's turns are, by
  the rules of spoken.py.
- A prompt is never cut. A response is cut at its end to fit `max_length` and then has no EOS.
- A special token that is spelled out in a text is one for the tokenizer too, and for the model, as
  it is in training and serving elsewhere. Such groups are kept and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prefopt.data.chunks import encode_records
from prefopt.data.encoded import Encoded, EncodedSet, to_record
from prefopt.data.fitting import FITS, Response, trimmed
from prefopt.data.recipe import Chunk, Recipe
from prefopt.data.records import Feedback, Message, Pair, Ranking
from prefopt.data.spoken import (
    EOS_INSIDE,
    NOT_A_PREFIX,
    REWRITTEN,
    Texts,
    common_prefix,
    conversation_texts,
    ended,
    scored_tokens,
    spoken_turns,
)
from prefopt.data.template import choose_template, render_conversation, render_prompt
from prefopt.data.tokens import TextTokenizer, decode
from prefopt.errors import InputError

DESIRABLE, UNDESIRABLE, BASELINE = 1, 0, -1  # labels; BASELINE: a response to another prompt
SPELLED_OUT = "special tokens spelled out in the text"
REPEATED = "responses identical to a better one"


class Group(NamedTuple):
    """One record to encode: a prompt, its responses, and the fields of Encoded it decides."""

    prompt: list[Message]
    responses: Sequence[list[Message]]
    about: dict[str, Any]


def encode_pairs(
    pairs: Iterable[Pair],
    tokenizer: Any,
    *,
    max_length: int = 1024,
    template: str = "auto",
    cache: Path | None = None,
    workers: int | None = None,
) -> EncodedSet:
    """Encode each pair as a prompt with two responses (chosen, rejected); see the rules above.

    `max_length` bounds prompt + response in tokens, EOS included. Dropped, and counted: prompts
    that leave no room for a response, pairs whose scored tokens are the same (before or after
    truncation), responses without any, conversations the chat template refuses. `cache`: a folder
    where what was encoded is found again; `workers`: processes to encode in, 0 for none (None: as
    many as are worth it). Neither changes the result. Raises InputError for a tokenizer without EOS
    and when every pair is dropped.
    """
    recipe = Recipe("pair", template, max_length)
    return encode_groups(pairs, tokenizer, recipe, cache=cache, workers=workers)


def encode_feedback(
    feedback: Iterable[Feedback],
    tokenizer: Any,
    *,
    max_length: int = 1024,
    template: str = "auto",
    cache: Path | None = None,
    workers: int | None = None,
) -> EncodedSet:
    """Encode each as a prompt with one labelled response, by the rules of `encode_pairs`."""
    recipe = Recipe("response", template, max_length)
    return encode_groups(feedback, tokenizer, recipe, cache=cache, workers=workers)


def encode_groups(
    groups: Iterable[Pair | Feedback | Ranking | Group],
    tokenizer: Any,
    recipe: Recipe,
    *,
    cache: Path | None = None,
    workers: int | None = None,
) -> EncodedSet:
    """Encode prompts with any number of responses; `recipe.unit`, one of FITS, decides which of
    them stay."""
    return encode_records(groups, tokenizer, recipe, encode_chunk, cache=cache, workers=workers)


def encode_prompts(
    prompts: Sequence[Sequence[Message]], tokenizer: Any, template: str = "auto"
) -> list[np.ndarray]:
    """Token ids [P] int32 of each prompt, up to where the assistant starts to speak."""
    name = choose_template(tokenizer, template).name
    texts = [render_prompt(prompt, tokenizer, name) for prompt in prompts]
    ids = TextTokenizer(tokenizer, name)(texts)
    encoded = [ids[text].copy() for text in texts]
    for i, prompt in enumerate(encoded):
        if len(prompt) == 0:
            raise InputError(f"Prompt {i} is empty: it has no token to start from.")
    return encoded


def preview(encoded: Encoded, tokenizer: Any) -> list[tuple[str, str]]:
    """What the model will see, as (segment, text): the prompt once, then for each response its
    text, with what is not scored of it as more "prompt", and either ("eos", ...) or
    ("truncated", "")."""
    out = [("prompt", decode(encoded.prompt, tokenizer))]
    masks = encoded.scored or (None,) * len(encoded.responses)
    for response, mask in zip(encoded.responses, masks, strict=True):
        whole = response[-1] == tokenizer.eos_token_id
        size = len(response) - whole
        scored = np.ones(size, dtype=bool) if mask is None else mask[:size]
        starts = [0, *(np.flatnonzero(np.diff(scored)) + 1).tolist()]
        for start, end in zip(starts, [*starts[1:], size], strict=True):
            kind = "response" if scored[start:end].all() else "prompt"
            out.append((kind, decode(response[start:end], tokenizer)))
        out.append(("eos", decode(response[-1:], tokenizer)) if whole else ("truncated", ""))
    return out


# --- one chunk ---------------------------------------------------------------------------------


class _Rendered(NamedTuple):
    """The texts of a group: of its prompt, and of each conversation, whose `turns` are None where
    its response is a single turn."""

    prompt: str
    whole: list[Texts]
    spelled_out: bool


def as_group(record: Pair | Feedback | Ranking | Group) -> Group:
    """Prompt, responses and what else a record decides."""
    if isinstance(record, Pair):
        names = ("weight", "margin", "source", "preference")
        about = {name: getattr(record, name) for name in names}
        return Group(record.prompt, (record.chosen, record.rejected), about)
    if isinstance(record, Feedback):
        about = {"labels": (int(record.desirable),), "source": record.source}
        return Group(record.prompt, (record.response,), about)
    if isinstance(record, Ranking):
        return Group(record.prompt, record.responses, {"source": record.source})
    return record


def encode_chunk(records: Sequence[Any], tokenizer: TextTokenizer, recipe: Recipe) -> Chunk:
    """The groups in order, as many as there are left of them, and what became of the others."""
    chunk, groups = Chunk.new(), [as_group(record) for record in records]
    rendered = [_render(group, tokenizer) for group in groups]
    ids = tokenizer(
        text
        for texts in rendered
        if not isinstance(texts, str)
        for text in (texts.prompt, *(cut for whole in texts.whole for cut in whole.all()))
    )
    for row, (group, texts) in enumerate(zip(groups, rendered, strict=True)):
        if isinstance(texts, str):
            chunk.counts[f"dropped: {texts}"] += 1
            continue
        chunk.counts[SPELLED_OUT] += texts.spelled_out
        item = _encode(group, texts, ids, tokenizer, recipe, chunk)
        if isinstance(item, str):
            chunk.counts[f"dropped: {item}"] += 1
        else:
            chunk.add(row, to_record(item))
    return chunk


def _render(group: Group, tokenizer: TextTokenizer) -> _Rendered | str:
    """The texts of a group, or why it has none."""
    name = tokenizer.template
    try:
        prompt = render_prompt(group.prompt, tokenizer.tokenizer, name)
        whole = []
        for response in group.responses:
            turns = [*group.prompt, *response]
            spoken = spoken_turns(turns, len(group.prompt))
            if not spoken:
                return "no assistant turn"
            if spoken == [(len(group.prompt), len(turns))]:
                text = render_conversation(group.prompt, response, tokenizer.tokenizer, name)
                whole.append(Texts(text, None))
            else:
                whole.append(conversation_texts(turns, spoken, tokenizer))
    except InputError as error:
        return str(error)
    messages = (m for side in (group.prompt, *group.responses) for m in side)
    return _Rendered(prompt, whole, any(tokenizer.spelled_out(m.content) for m in messages))


def _encode(
    group: Group,
    texts: _Rendered,
    ids: dict[str, np.ndarray],
    tokenizer: TextTokenizer,
    recipe: Recipe,
    chunk: Chunk,
) -> Encoded | str:
    prompt, counts = ids[texts.prompt], chunk.counts
    size = min(common_prefix(prompt, ids[whole.whole]) for whole in texts.whole)
    counts[NOT_A_PREFIX] += size < len(prompt)
    chunk.prompts.append(size)
    responses = [
        _response(whole, texts.prompt, size, ids, tokenizer, counts) for whole in texts.whole
    ]
    if any(r.scored is not None and not r.scored.any() for r in responses):
        return "no token to score"
    room = recipe.max_length - size
    kept = FITS[recipe.unit](responses, room) if size else "empty prompt"
    if isinstance(kept, str):
        return kept
    counts[REPEATED] += len(responses) - len(kept)
    if len(kept) < min(2, len(responses)):
        return "fewer than two different responses"
    counts["truncated"] += sum(len(r.tokens) > room for r in responses)
    for r in kept:
        counts[EOS_INSIDE] += r.scored is None and tokenizer.eos in r.tokens[:-1]
    scored = tuple(r.scored for r in kept)
    return Encoded(
        prompt[:size],
        tuple(r.tokens for r in kept),
        0,
        scored=None if all(mask is None for mask in scored) else scored,
        **group.about,
    )


def _response(
    texts: Texts,
    prompt: str,
    size: int,
    ids: dict[str, np.ndarray],
    tokenizer: TextTokenizer,
    counts: Counter[str],
) -> Response:
    """What follows the first `size` tokens, the prompt, up to the last token that is scored."""
    if texts.turns is None:
        return Response(ended(ids[texts.whole][size:], tokenizer), None)
    inner: Counter[str] = Counter()
    tokens, spans = scored_tokens(texts, ids, tokenizer, inner)
    counts[EOS_INSIDE] += inner[EOS_INSIDE]
    counts[REWRITTEN] += texts.rewritten
    if texts.turns and texts.turns[0][0] == prompt:
        spans[0] = (size, spans[0][1])
    scored = np.zeros(len(tokens), dtype=bool)
    for start, end in spans:
        scored[start:end] = True
    return trimmed(tokens[size:], scored[size:])
