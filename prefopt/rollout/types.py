"""What is asked of a rollout engine, and what it gives back: tokens, never text.

Nothing is read from token ids afterwards: how long a response is and why it ended is what the
engine says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class SamplingParams:
    """How to sample.

    Attributes:
        max_new_tokens: most tokens of a response, its stop token included.
        min_new_tokens: stop tokens have probability 0 before so many tokens are there; the other
            probabilities, and the log-probs, are those of what remains.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_p, top_k: only the likeliest tokens, up to this mass or number; log-probs are then those
            of the whole distribution, so such samples are not for training.
        stop: texts that end a response, besides the stop tokens.
        stop_ids: token ids that end a response; None is what the model and its tokenizer say.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Sample:
    """One response: tokens [n] int32, its stop token included, and their log-probs [n] float32 under
    the distribution that was sampled from. ``finish``: "stop" at a stop token or text, "length" at
    the limit."""

    tokens: np.ndarray
    logprobs: np.ndarray
    finish: str


class RolloutEngine(Protocol):
    """Answers prompts of token ids. What is sampled depends on the weights, the parameters and
    (seed, key of the prompt, number of the sample, step) alone, not on what else is in the batch.
    """

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        params: SamplingParams,
        *,
        n: int = 1,
        seed: int = 0,
        keys: Sequence[int] | None = None,
        on_sample: Callable[[int], None] | None = None,
    ) -> list[list[Sample]]:
        """n samples of each prompt [P] int32. ``keys`` name the prompts in the noise, 0, 1, ... if
        None; ``on_sample`` is called with the number of finished samples."""
        ...
