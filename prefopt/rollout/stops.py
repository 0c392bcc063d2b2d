"""When a response ends: stop tokens, stop texts, the limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefopt.rollout.types import Generation, Sample, SamplingParams


def stop_ids(params: SamplingParams, model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Those of ``params``; else what training ends a response with stops one, and so does what the
    model's authors chose."""
    if params.stop_ids is not None:
        return tuple(sorted(set(params.stop_ids)))
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list | tuple) else [ends]), tokenizer.eos_token_id}
    return tuple(sorted(ends - {None}))


class StopTexts:
    """Whether the last token of a response completes one of ``texts``, asked after every token.

    Looked for in the text of the last tokens: as many as the longest stop text has bytes, for a
    token may be one byte, and a few more, because a tokenizer may treat the first one in its own
    way (SentencePiece drops its space) and what was cut through a character shows as another.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Any):
        self.texts, self.tokenizer = tuple(texts), tokenizer
        self.reach = max((len(text.encode()) for text in texts), default=0) + 5

    def found(self, tokens: Sequence[int]) -> bool:
        """tokens: the whole response so far."""
        return bool(_completed(tokens[-self.reach :], self.texts, self.tokenizer))


def as_text(
    sample: Sample, params: SamplingParams, stops: Sequence[int], tokenizer: Any
) -> Generation:
    """What people read of a response: without its stop token, and up to its stop text."""
    tokens = sample.tokens.tolist()
    if sample.finish == "length":
        return Generation(_text(tokens, tokenizer), sample.finish, len(tokens))
    if tokens[-1] in stops:
        return Generation(_text(tokens[:-1], tokenizer), sample.finish, len(tokens) - 1)
    text = _text(tokens, tokenizer)
    done = _completed(tokens, params.stop, tokenizer)
    end = min((text.rfind(stop) for stop in done), default=len(text))
    return Generation(text[:end], sample.finish, len(tokens))


def _completed(tokens: Sequence[int], texts: Sequence[str], tokenizer: Any) -> list[str]:
    """Those of ``texts`` that are there once more with the last token than without it."""
    now = _text(tokens, tokenizer)
    there = [text for text in texts if text in now]
    before = _text(tokens[:-1], tokenizer) if there else ""
    return [text for text in there if now.count(text) > before.count(text)]


def _text(tokens: Sequence[int], tokenizer: Any) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True)
