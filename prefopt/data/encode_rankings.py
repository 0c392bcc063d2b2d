"""Rankings to token ids: one prompt and K responses, by the rules of encode.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from prefopt.data.encode import (
    BATCH,
    Encoded,
    EncodedSet,
    check_limits,
    common_prefix,
    ended,
    nothing_left,
    tokenize,
)
from prefopt.data.records import Ranking
from prefopt.data.template import choose_template, render_conversation, render_prompt
from prefopt.errors import InputError


def encode_rankings(
    rankings: Iterable[Ranking],
    tokenizer: Any,
    *,
    max_length: int = 1024,
    template: str = "auto",
) -> EncodedSet:
    """Encode each ranking as a prompt with its responses, the best one first.

    As `encode_pairs`, for any number of responses. Of responses that are the same in tokens, before
    or after truncation, nothing says which is better: all but the first are dropped, and counted.
    Dropped, and counted: rankings with fewer than two responses left, prompts that leave no room,
    conversations the chat template refuses. Raises InputError for a tokenizer without EOS and when
    every ranking is dropped.
    """
    check_limits(tokenizer, max_length)
    chosen_template = choose_template(tokenizer, template)
    counts: Counter[str] = Counter(truncated=0)
    items: list[Encoded] = []
    prompt_lengths: list[int] = []
    for index, ranking, tokens in _tokenized(rankings, tokenizer, chosen_template.name):
        if isinstance(tokens, str):
            counts[f"dropped: {tokens}"] += 1
            continue
        prompt, *wholes = tokens
        size = min(common_prefix(prompt, whole) for whole in wholes)
        counts["prompt not a prefix of its conversation, in tokens"] += size < len(prompt)
        prompt_lengths.append(size)
        room = max_length - size
        if not size or room <= 0:
            counts["dropped: prompt fills max_length" if size else "dropped: empty prompt"] += 1
            continue
        responses = [ended(whole[size:], tokenizer) for whole in wholes]
        kept = _different(responses, room, counts)
        if len(kept) < 2:
            counts["dropped: fewer than two different responses"] += 1
            continue
        counts["truncated"] += sum(len(r) > room for r in responses)
        inside = sum(tokenizer.eos_token_id in response[:-1] for response in kept)
        counts["responses with an EOS token inside"] += inside
        items.append(Encoded(prompt[:size].copy(), kept, index, source=ranking.source))
    counts = Counter({key: n for key, n in counts.items() if n or key == "truncated"})
    if not items:
        raise InputError(nothing_left(counts, prompt_lengths, max_length, "ranking"))
    return EncodedSet(items, dict(counts), str(chosen_template))


def _different(
    responses: list[np.ndarray], room: int, counts: Counter[str]
) -> tuple[np.ndarray, ...]:
    """The responses cut to `room` tokens, each once."""
    kept: dict[bytes, np.ndarray] = {}
    for response in responses:
        cut = response[:room].copy()
        counts["responses identical to a better one"] += cut.tobytes() in kept
        kept.setdefault(cut.tobytes(), cut)
    return tuple(kept.values())


def _tokenized(
    rankings: Iterable[Ranking], tokenizer: Any, template: str
) -> Iterator[tuple[int, Ranking, list[np.ndarray] | str]]:
    """(index, ranking, [prompt, whole of each response] or why it cannot be rendered)."""
    numbered = enumerate(rankings)
    while batch := list(islice(numbered, BATCH)):
        texts: list[str] = []
        refused: dict[int, str] = {}
        for index, ranking in batch:
            try:
                texts += [
                    render_prompt(ranking.prompt, tokenizer, template),
                    *(
                        render_conversation(ranking.prompt, response, tokenizer, template)
                        for response in ranking.responses
                    ),
                ]
            except InputError as error:
                refused[index] = str(error)
        ids = iter(tokenize(texts, tokenizer, template))
        for index, ranking in batch:
            size = 1 + len(ranking.responses)
            yield index, ranking, refused.get(index) or [next(ids) for _ in range(size)]
