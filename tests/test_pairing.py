"""Pairs of scored responses: which two, how far apart, and what makes none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt import InputError, Message
from prefopt.data.pairing import PAIRINGS, pair_up
from prefopt.data.records import Candidates

PROMPT = [Message("user", "a question")]


def picks(scores, texts=None, **options):
    texts = texts or [f"answer {i}" for i in range(len(scores))]
    responses = [[Message("assistant", text)] for text in texts]
    return pair_up(Candidates(PROMPT, responses, scores), **options)


def test_the_best_and_the_worst():
    paired = picks([0.5, 2.0, -1.0, 1.0])
    assert paired.picks == [(1, 2)] and paired.dropped == {}
    (pair,) = paired.pairs
    assert pair.prompt == PROMPT and pair.margin == 3.0
    assert pair.chosen == [Message("assistant", "answer 1")]
    assert pair.rejected == [Message("assistant", "answer 2")]


def test_the_best_against_every_other():
    assert picks([0.5, 2.0, -1.0, 1.0], pairing="best_rest").picks == [(1, 3), (1, 0), (1, 2)]


def test_every_two():
    paired = picks([0.0, 2.0, 1.0], pairing="all")
    assert paired.picks == [(1, 2), (1, 0), (2, 0)]
    assert [pair.margin for pair in paired.pairs] == [1.0, 2.0, 1.0]


def test_equal_scores_make_no_pair():
    assert picks([1.0, 1.0, 1.0]).dropped == {"tie": 1}
    rest = picks([1.0, 0.0, 1.0], pairing="best_rest")
    assert rest.picks == [(0, 1)] and rest.dropped == {"tie": 1}
    every = picks([1.0, 0.0, 1.0, 0.0], pairing="all")
    assert every.picks == [(0, 1), (0, 3), (2, 1), (2, 3)] and every.dropped == {"tie": 2}


def test_among_equals_the_first_is_taken():
    assert picks([0.0, 3.0, 3.0, 0.0]).picks == [(1, 0)]


def test_a_gap_below_the_least_makes_no_pair():
    assert picks([0.0, 0.4], min_gap=0.5).dropped == {"gap below min_gap": 1}
    assert picks([0.0, 0.5], min_gap=0.5).picks == [(1, 0)]
    rest = picks([1.0, 0.75, 0.0], min_gap=0.5, pairing="best_rest")
    assert rest.picks == [(0, 2)] and rest.dropped == {"gap below min_gap": 1}


def test_of_equal_texts_the_first_stands_for_all():
    assert picks([1.0, 0.0, 2.0], ["a", "b", "a"]).picks == [(0, 1)]  # "a" counts as its first: 1.0
    assert picks([1.0, 0.0], ["a", "a"]).dropped == {"all responses are the same text": 1}
    assert picks([1.0], ["a"]).dropped == {"all responses are the same text": 1}


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(-3, 3)), min_size=1, max_size=8),
    st.sampled_from(PAIRINGS),
    st.sampled_from([0.0, 1.0, 2.5]),
)
def test_what_holds_for_any_responses(samples, pairing, gap):
    texts, scores = [t for t, _ in samples], [float(s) for _, s in samples]
    paired = picks(scores, texts, pairing=pairing, min_gap=gap)
    different = len(set(texts))
    tried = {
        "best_worst": 1,
        "best_rest": different - 1,
        "all": different * (different - 1) // 2,
    }[pairing]
    assert len(paired.picks) + sum(paired.dropped.values()) == (tried if different > 1 else 1)
    for (chosen, rejected), pair in zip(paired.picks, paired.pairs, strict=True):
        assert texts[chosen] != texts[rejected] and scores[chosen] > scores[rejected]
        assert pair.margin == scores[chosen] - scores[rejected] >= gap
        assert pair.chosen[0].content == texts[chosen] != pair.rejected[0].content
        assert texts.index(texts[chosen]) == chosen and texts.index(texts[rejected]) == rejected
        if pairing != "all":
            assert scores[chosen] == max(scores[texts.index(t)] for t in texts)
        if pairing == "best_worst":
            assert scores[rejected] == min(scores[texts.index(t)] for t in texts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pairing": "best"},
            "pairing is 'best'; it is one of best_worst, best_rest, adjacent, all",
        ),
        ({"min_gap": -1.0}, "min_gap is -1.0"),
        ({"min_gap": float("nan")}, "min_gap is nan"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        picks([0.0, 1.0], **options)


def test_every_response_needs_a_score():
    with pytest.raises(ValueError, match="one finite score"):
        picks([0.0], ["a", "b"])
    with pytest.raises(ValueError, match="one finite score"):
        picks([0.0, float("nan")])
