"""From what a reward says of a sample to the score that is learnt from.

In this order: `penalised`, for the missing stop and for the length; then `standardised`, by a scale
and clipped. What ended and how long it is comes from the sampler, never from token ids. Shapes: S
samples.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

from torch import Tensor

from prefopt.errors import InputError


class Scale(Protocol):
    """Mean and standard deviation of scores: a `ScoreStats` or a `RunningMoments`."""

    @property
    def mean(self) -> Any: ...

    @property
    def std(self) -> Any: ...


def penalised(
    scores: Tensor,
    stopped: Tensor,
    lengths: Tensor | None = None,
    *,
    missing_stop_penalty: float = 0.0,
    missing_stop_score: float | None = None,
    overlong: tuple[int, int, float] | None = None,
) -> Tensor:
    """Scores [S] with the penalty for what did not stop, and for what is nearly too long.

    A sample that is not ``stopped`` [S] bool has its score lowered by ``missing_stop_penalty``, or
    gets ``missing_stop_score`` whatever it was (Ziegler et al. 2019, arXiv 1909.08593).
    ``overlong`` (limit, buffer, factor) adds `overlong_penalty` of ``lengths`` [S]. InputError for
    both ways of punishing a missing stop, and for bad numbers.
    """
    if missing_stop_score is not None and missing_stop_penalty:
        raise InputError(
            "missing_stop_score replaces the score that missing_stop_penalty lowers; give one"
        )
    if not 0 <= missing_stop_penalty < math.inf:
        raise InputError(f"missing_stop_penalty is {missing_stop_penalty}; it must be at least 0")
    if missing_stop_score is not None:
        scores = scores.where(stopped, missing_stop_score)
    elif missing_stop_penalty:
        scores = scores.where(stopped, scores - missing_stop_penalty)
    if overlong is not None:
        assert lengths is not None, "the penalty for length needs lengths"
        scores = scores + overlong_penalty(lengths, *overlong).to(scores.dtype)
    return scores


def overlong_penalty(lengths: Tensor, limit: int, buffer: int, factor: float = 1.0) -> Tensor:
    """-factor * min(max(L - (limit - buffer), 0), buffer) / buffer of lengths [S] -> [S] float64.

    0 up to limit - buffer tokens, then falling linearly to -factor at the limit: the soft overlong
    punishment of DAPO (Yu et al. 2025, arXiv 2503.14476). InputError unless 0 < buffer <= limit.
    """
    if not 0 < buffer <= limit or not 0 <= factor < math.inf:
        raise InputError(
            f"overlong is (limit {limit}, buffer {buffer}, factor {factor}); the buffer is above 0 "
            "and at most the limit, the factor at least 0"
        )
    return -factor * (lengths.double() - (limit - buffer)).clamp(0, buffer) / buffer


def standardised(scores: Tensor, scale: Scale | None, *, clip: float | None = None) -> Tensor:
    """(scores - mean) / std [S] of a ``scale``, then cut to +-clip.

    Without a scale, or without spread in it, nothing is divided; without spread the mean is taken
    off all the same. InputError for a clip that is not above 0.
    """
    if scale is not None:
        scores = (scores - scale.mean) / (scale.std or 1.0)
    if clip is not None:
        if not 0 < clip < math.inf:
            raise InputError(f"clip_scores is {clip}; it must be above 0")
        scores = scores.clamp(-clip, clip)
    return scores
