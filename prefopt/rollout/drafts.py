"""Responses that are being written: a table with a row for each, and when one is done.

Shapes: S rows, of which the first ``live`` are in use, T most new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from prefopt.rollout.noise import uniforms
from prefopt.rollout.stops import StopTexts
from prefopt.rollout.types import Sample, SamplingParams


class Request(NamedTuple):
    """Sample number ``sample`` of prompt number ``prompt``."""

    prompt: int
    sample: int


class Drafts:
    """The table. ``position[i]`` is where ``last[i]``, the token to be read next, stands."""

    def __init__(self, rows: int, params: SamplingParams, stops: Sequence[int], texts: StopTexts):
        self.params, self.texts, self.live = params, texts, 0
        self.stops = np.asarray(stops, dtype=np.int64)
        self.requests: list[Request] = [Request(-1, -1)] * rows
        shape = rows, params.max_new_tokens
        self.tokens, self.logprobs = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        self.uniforms = np.full(shape, 0.5)
        self.step, self.position, self.last = (np.zeros(rows, np.int64) for _ in range(3))

    def start(self, request: Request, prompt: np.ndarray, seed: int, key: int) -> int:
        """Takes the next row for a response to ``prompt`` [P]; returns which."""
        row, self.live = self.live, self.live + 1
        self.requests[row] = request
        self.step[row], self.position[row], self.last[row] = 0, len(prompt) - 1, prompt[-1]
        if self.params.temperature:
            steps = self.params.max_new_tokens
            self.uniforms[row] = uniforms(seed, key, request.sample, steps)
        return row

    def draws(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the first rows, the uniform numbers of this step, float64, and which may not stop."""
        step = self.step[:rows]
        return self.uniforms[np.arange(rows), step], step < self.params.min_new_tokens

    def add(self, tokens: np.ndarray, logprobs: np.ndarray) -> list[tuple[int, str]]:
        """One more token for each live row; (row, finish) of those that end with it, last first."""
        n = self.live
        rows, step = np.arange(n), self.step[:n]
        self.tokens[rows, step], self.logprobs[rows, step] = tokens, logprobs
        self.last[:n] = tokens
        self.step[:n] += 1
        self.position[:n] += 1
        stopped = np.isin(tokens, self.stops)
        if self.texts.texts:
            stopped |= [self._says_stop(row) for row in range(n)]
        ended = stopped | (self.step[:n] >= self.params.max_new_tokens)
        found = np.flatnonzero(ended)[::-1].tolist()
        return [(row, "stop" if stopped[row] else "length") for row in found]

    def _says_stop(self, row: int) -> bool:
        step = self.step[row]
        enough = step >= self.params.min_new_tokens
        return bool(enough) and self.texts.found(self.tokens[row, :step].tolist())

    def take(self, row: int, finish: str) -> Sample:
        """The response in a row, as it is now."""
        step = self.step[row]
        return Sample(self.tokens[row, :step].copy(), self.logprobs[row, :step].copy(), finish)

    def drop(self, row: int) -> int:
        """Frees a row: the last live one moves there. Returns which that was."""
        self.live = last = self.live - 1
        for column in (
            *(self.tokens, self.logprobs, self.uniforms),
            *(self.step, self.position, self.last),
        ):
            column[row] = column[last]
        self.requests[row] = self.requests[last]
        self.step[last] = self.position[last] = self.last[last] = 0
        return last
