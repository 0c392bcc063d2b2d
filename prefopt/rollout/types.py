"""What is asked of a rollout engine, and what it gives back: tokens, never text.

Nothing is read from token ids afterwards: how long a response is and why it ended is what the
engine says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from prefopt.errors import InputError
from prefopt.loading import context_length


@dataclass(frozen=True)
class SamplingParams:
    """How to sample.

    Attributes:
        max_new_tokens: most tokens of a response, its stop token included.
        min_new_tokens: stop tokens have probability 0 before so many tokens are there; the other
            probabilities, and the log-probs, are those of what remains.
        temperature: logits are divided by it; 0 takes the likeliest token, and the log-probs are
            those of temperature 1.
        top_p, top_k: only the likeliest tokens, up to this mass or number; log-probs are then those
            of the whole distribution, so such samples are not for training.
        stop: texts that end a response, besides the stop tokens; the token that completes one is
            the last.
        stop_ids: token ids that end a response; None is what the model and its tokenizer say.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        wrong = None
        if self.max_new_tokens < 1:
            wrong = f"max_new_tokens is {self.max_new_tokens!r}; it must be at least 1"
        elif not 0 <= self.min_new_tokens <= self.max_new_tokens:
            wrong = f"min_new_tokens is {self.min_new_tokens!r}; it must be 0 to max_new_tokens"
        elif not 0 <= self.temperature < float("inf"):
            wrong = f"temperature is {self.temperature!r}; it must be at least 0"
        elif not 0 < self.top_p <= 1:
            wrong = f"top_p is {self.top_p!r}; it must be above 0 and at most 1"
        elif self.top_k < 0:
            wrong = f"top_k is {self.top_k!r}; it must be at least 0, which means all words"
        elif isinstance(self.stop, str) or not all(self.stop):
            wrong = f"stop is {self.stop!r}; it must be a tuple of texts that are not empty"
        if wrong is not None:
            raise InputError(wrong)


@dataclass(frozen=True)
class Sample:
    """One response: tokens [n] int32, its stop token included, and their log-probs [n] float32
    under the distribution that was sampled from. ``finish``: "stop" at a stop token or text,
    "length" at the limit."""

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


def check_prompts(
    model: Any, prompts: Sequence[np.ndarray], params: SamplingParams, n: int, keys: Sequence[int]
) -> None:
    """InputError for a prompt without tokens, or too long for the model's context with what is
    asked for behind it; for fewer samples than one; for keys that are not one to a prompt."""
    if n < 1:
        raise InputError(f"n is {n!r}; ask for at least 1 sample of each prompt")
    if len(keys) != len(prompts):
        raise InputError(f"{len(keys)} keys for {len(prompts)} prompts: give one for each")
    room = context_length(model)
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise InputError(f"Prompt {i} is empty: it has no token to start from.")
        if len(prompt) + params.max_new_tokens > room:
            raise InputError(
                f"Prompt {i} has {len(prompt)} tokens, and with {params.max_new_tokens} new ones "
                f"it would not fit into the model's context of {room}; shorten it or ask for fewer"
            )


@contextlib.contextmanager
def evaluating(policy: Any) -> Iterator[None]:
    """Evaluation mode; afterwards every module, and the attention, is as it was, whatever
    happened."""
    modes = [(module, module.training) for module in policy.modules()]
    attention = policy.model.config._attn_implementation
    policy.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        policy.attend(attention)


@dataclass(frozen=True)
class Generation:
    """One response as text; ``finish`` is "stop" at a stop token or text and "length" at the
    limit. ``tokens``: how many were sampled, the stop token not counted."""

    text: str
    finish: str
    tokens: int
