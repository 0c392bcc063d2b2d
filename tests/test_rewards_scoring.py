"""From what a reward says to the score that is learnt from."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefopt import InputError
from prefopt.nn.heads import ScoreStats
from prefopt.rl import RunningMoments
from prefopt.scoring import overlong_penalty, penalised, standardised

SCORES = torch.tensor([1.0, -2.0, 0.5, 3.0])
STOPPED = torch.tensor([True, False, True, False])


def test_a_missing_stop_is_punished_or_settles_the_score():
    assert torch.equal(penalised(SCORES, STOPPED), SCORES)
    lower = penalised(SCORES, STOPPED, missing_stop_penalty=1.5)
    assert lower.tolist() == [1.0, -3.5, 0.5, 1.5]
    settled = penalised(SCORES, STOPPED, missing_stop_score=-1.0)
    assert settled.tolist() == [1.0, -1.0, 0.5, -1.0]
    assert penalised(SCORES, STOPPED, missing_stop_score=0.0).tolist() == [1.0, 0.0, 0.5, 0.0]
    assert SCORES.tolist() == [1.0, -2.0, 0.5, 3.0]


@given(st.integers(1, 200), st.integers(1, 200), st.floats(0, 10), st.integers(0, 400))
def test_overlong_is_the_published_formula(limit, buffer, factor, length):
    if buffer > limit:
        with pytest.raises(InputError, match="buffer is above 0 and at most the limit"):
            overlong_penalty(torch.tensor([length]), limit, buffer, factor)
        return
    if length <= limit - buffer:  # DAPO, equation 13
        want = 0.0
    elif length <= limit:
        want = ((limit - buffer) - length) / buffer
    else:
        want = -1.0
    got = overlong_penalty(torch.tensor([length]), limit, buffer, factor).item()
    assert got == pytest.approx(factor * want, abs=1e-12)


def test_both_penalties_add_up():
    lengths = torch.tensor([5, 10, 8, 12])
    got = penalised(SCORES, STOPPED, lengths, missing_stop_score=-1.0, overlong=(10, 4, 2.0))
    assert got.tolist() == [1.0, -3.0, -0.5, -3.0] and got.dtype == torch.float32


def test_by_known_or_running_moments_then_clipped():
    stats = ScoreStats(0.5, 2.0, 10)
    assert torch.equal(standardised(SCORES, stats), stats.apply(SCORES))
    assert standardised(SCORES, stats, clip=0.5).tolist() == [0.25, -0.5, 0.0, 0.5]
    assert standardised(SCORES, None, clip=1.5).tolist() == [1.0, -1.5, 0.5, 1.5]
    moments = RunningMoments()
    moments.update(SCORES)
    got = standardised(SCORES, moments)
    assert got.mean().item() == pytest.approx(0, abs=1e-6)
    assert got.std(correction=0).item() == pytest.approx(1, rel=1e-6)
    constant = torch.full((3,), 4.0)
    same = RunningMoments()
    same.update(constant)
    assert standardised(constant, same).tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: penalised(SCORES, STOPPED, missing_stop_penalty=-1), "must be at least 0"),
        (
            lambda: penalised(SCORES, STOPPED, missing_stop_penalty=1, missing_stop_score=0.0),
            "give one",
        ),
        (lambda: overlong_penalty(torch.tensor([3]), 5, 0), "buffer is above 0"),
        (lambda: overlong_penalty(torch.tensor([3]), 5, 2, -1.0), "factor at least 0"),
        (lambda: standardised(SCORES, None, clip=0.0), "must be above 0"),
        (lambda: standardised(SCORES, None, clip=math.inf), "must be above 0"),
    ],
)
def test_bad_numbers(call, message):
    with pytest.raises(InputError, match=message):
        call()
