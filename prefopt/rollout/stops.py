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
    """Whether a response's text has come to one of ``texts``, asked after every token.

    Looked for in the text of the last tokens: as many as the longest stop text has bytes, for a
    token may be one byte, and a few more, because a tokenizer may treat the first one in its own
    way (SentencePiece drops its space) and what was cut through a character shows as another.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Any):
        self.texts, self.tokenizer = tuple(texts), tokenizer
        self.reach = max((len(text.encode()) for text in texts), default=0) + 5

    def found(self, tokens: Sequence[int]) -> bool:
        """tokens: the whole response so far."""
        tail = self.tokenizer.decode(tokens[-self.reach :], skip_special_tokens=True)
        return any(text in tail for text in self.texts)


def as_text(
    sample: Sample, params: SamplingParams, stops: Sequence[int], tokenizer: Any
) -> Generation:
    """What people read of a response: without its stop token, and up to its stop text."""
    tokens = sample.tokens.tolist()
    if sample.finish == "stop" and tokens[-1] in stops:
        tokens = tokens[:-1]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    at = [text.find(stop) for stop in params.stop if stop in text]
    return Generation(text[: min(at)] if at else text, sample.finish, len(tokens))
