"""Pairs of scored responses: which two, how far apart, and what makes none."""

import math
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt import InputError, Message
from prefopt.data.pairing import PAIRINGS, TIES, pair_items, pair_up
from prefopt.data.records import Candidates, Pair
from prefopt.data.schemas.base import Item
from prefopt.data.sources import load_preferences

PROMPT = [Message("user", "a question")]


def say(text):
    return [Message("assistant", text)]


def candidates(scores, texts=None, prompt="a question"):
    texts = texts or [f"answer {i}" for i in range(len(scores))]
    return Candidates([Message("user", prompt)], [say(text) for text in texts], scores)


def picks(scores, texts=None, **options):
    return pair_up(candidates(scores, texts), **options)


def test_the_best_and_the_worst():
    paired = picks([0.5, 2.0, -1.0, 1.0])
    assert paired.picks == [(1, 2)] and paired.dropped == {}
    (pair,) = paired.pairs
    assert pair == Pair(PROMPT, say("answer 1"), say("answer 2"), margin=3.0)


def test_the_best_against_every_other():
    assert picks([0.5, 2.0, -1.0, 1.0], pairing="best_rest").picks == [(1, 3), (1, 0), (1, 2)]


def test_each_against_the_next():
    paired = picks([0.5, 2.0, -1.0, 1.0], pairing="adjacent")
    assert paired.picks == [(1, 3), (3, 0), (0, 2)]
    assert [pair.margin for pair in paired.pairs] == [1.0, 0.5, 1.5]


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


def test_equal_scores_make_a_soft_pair_or_one_for_the_first():
    for ties, preference in (("soft", 0.5), ("keep", 1.0)):
        paired = picks([1.0, 0.0, 1.0], pairing="best_rest", ties=ties)
        assert paired.picks == [(0, 2), (0, 1)] and paired.dropped == {}
        assert [pair.preference for pair in paired.pairs] == [preference, 1.0]
        assert [pair.margin for pair in paired.pairs] == [0.0, 1.0]
    soft = picks([1.0, 1.0, 0.5], pairing="all", ties="soft", min_gap=1)
    assert soft.picks == [(0, 1)] and soft.dropped == {"gap below min_gap": 2}
    assert picks([1.0, 1.0], ties="keep", min_gap=1).dropped == {"gap below min_gap": 1}


def test_among_equals_the_first_is_taken():
    assert picks([0.0, 3.0, 3.0, 0.0]).picks == [(1, 0)]


def test_a_gap_below_the_least_makes_no_pair():
    assert picks([0.0, 0.4], min_gap=0.5).dropped == {"gap below min_gap": 1}
    assert picks([0.0, 0.5], min_gap=0.5).picks == [(1, 0)]
    rest = picks([1.0, 0.75, 0.0], min_gap=0.5, pairing="best_rest")
    assert rest.picks == [(0, 2)] and rest.dropped == {"gap below min_gap": 1}


def test_the_largest_gaps_stay():
    every = picks([0.0, 1.0, 3.0], pairing="all", max_pairs=2)
    assert every.picks == [(2, 1), (2, 0)] and every.dropped == {"more than max_pairs": 1}
    assert picks([0.0, 1.0, 2.0], pairing="all", max_pairs=1).picks == [(2, 0)]
    assert picks([0.0, 1.0], max_pairs=5).dropped == {}


def test_of_equal_texts_the_first_stands_for_all():
    assert picks([1.0, 0.0, 2.0], ["a", "b", "a"]).picks == [(0, 1)]  # "a" counts as its first: 1.0
    assert picks([1.0, 0.0], ["a", "a"]).dropped == {"all responses are the same text": 1}


def test_what_is_not_rated_is_left_out():
    nan = math.nan
    assert picks([1.0, nan, 0.0]).picks == [(0, 2)]
    assert picks([1.0, nan, 0.0]).dropped == {"a response has no score": 1}
    assert picks([nan, 1.0, nan]).dropped == {"fewer than two responses with a score": 1}
    assert picks([1.0], ["a"]).dropped == {"fewer than two responses with a score": 1}
    assert picks([nan, 1.0, 0.0], ["a", "a", "b"]).picks == [(1, 2)]


def expected(scores, texts, pairing, gap, ties, most):
    """Which (chosen, rejected), spelled out without sorting."""
    at = [i for i, t in enumerate(texts) if texts.index(t) == i]
    order = list(at)
    for _ in at:  # bubbles
        for k in range(len(order) - 1):
            if scores[order[k]] < scores[order[k + 1]]:
                order[k], order[k + 1] = order[k + 1], order[k]
    worst = min((scores[i] for i in at), default=None)
    last = next((i for i in order[1:] if scores[i] == worst), None)
    two = {
        "best_worst": [(order[0], last)] if last is not None else [],
        "best_rest": [(order[0], i) for i in order[1:]],
        "adjacent": [(order[k], order[k + 1]) for k in range(len(order) - 1)],
        "all": list(combinations(order, 2)),
    }[pairing]
    wide = [(a, b) for a, b in two if scores[a] - scores[b] >= gap and scores[a] != scores[b]]
    if ties == "soft" or (ties == "keep" and gap == 0):
        wide = [(a, b) for a, b in two if (a, b) in wide or scores[a] == scores[b]]
    while most is not None and len(wide) > most:
        least = min(scores[a] - scores[b] for a, b in wide)
        wide.remove([two for two in wide if scores[two[0]] - scores[two[1]] == least][-1])
    return two, wide


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(-3, 3)), min_size=2, max_size=8),
    st.sampled_from(PAIRINGS),
    st.sampled_from([0.0, 1.0, 2.5]),
    st.sampled_from(TIES),
    st.sampled_from([None, 1, 2, 5]),
)
def test_what_holds_for_any_responses(samples, pairing, gap, ties, most):
    texts, scores = [t for t, _ in samples], [float(s) for _, s in samples]
    options = {"pairing": pairing, "min_gap": gap, "ties": ties, "max_pairs": most}
    paired = picks(scores, texts, **options)
    tried, wanted = expected(scores, texts, pairing, gap, ties, most)
    assert paired.picks == wanted
    assert len(paired.picks) + sum(paired.dropped.values()) == (len(tried) or 1)
    for (chosen, rejected), pair in zip(paired.picks, paired.pairs, strict=True):
        assert texts[chosen] != texts[rejected] and scores[chosen] >= scores[rejected]
        tie = scores[chosen] == scores[rejected]
        assert pair.preference == (0.5 if tie and ties == "soft" else 1.0)
        assert pair.margin == scores[chosen] - scores[rejected]
        assert pair.chosen == say(texts[chosen]) and pair.rejected == say(texts[rejected])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pairing": "best"},
            "pairing is 'best'; it is one of best_worst, best_rest, adjacent, all",
        ),
        ({"min_gap": -1.0}, "min_gap is -1.0"),
        ({"min_gap": float("nan")}, "min_gap is nan"),
        ({"max_pairs": 0}, "max_pairs is 0; it must be at least 1"),
        ({"ties": "maybe"}, "ties='maybe' is not one of drop, soft, keep"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        picks([0.0, 1.0], **options)
    with pytest.raises(InputError, match=message):
        load_preferences([candidates([0.0, 1.0])], **options)


def test_every_response_needs_a_score():
    for scores in ([0.0], [0.0, float("inf")]):
        with pytest.raises(ValueError, match="one score, finite or NaN"):
            picks(scores, ["a", "b"])
        with pytest.raises(InputError, match="score"):
            load_preferences([candidates(scores, ["a", "b"])])


# --- pairs of many items -------------------------------------------------------------------------


def made(items, **options):
    return list(pair_items([Item(f"[{i}]", item) for i, item in enumerate(items)], **options))


def test_pairs_follow_the_rules_of_lists():
    """A pair and a list of the same two responses make the same, whatever the rules."""
    for scores in ([2.0, 1.0], [1.0, 1.0], [1.25, 1.0]):
        listed = candidates(scores)
        tie, gap = scores[0] == scores[1], scores[0] - scores[1]
        pair = Pair(PROMPT, *listed.responses, gap, preference=0.5 if tie else 1.0)
        for ties in TIES:
            for min_gap in (0.0, 0.5):
                (a,), (b,) = (made([x], ties=ties, min_gap=min_gap) for x in (listed, pair))
                assert [c.pair for c in a[1]] == [c.pair for c in b[1]] and a[2] == b[2]
                assert [c.picks for c in a[1]] == [c.picks for c in b[1]]


def test_the_most_pairs_of_a_prompt_over_all_rows():
    rows = [
        candidates([3.0, 2.0, 1.0]),
        candidates([3.0, 0.0, 1.0], ["x", "y", "z"]),
        Pair(PROMPT, say("p"), say("q")),
        candidates([1.0, 0.0], prompt="another"),
    ]
    found = made(rows, pairing="all", max_pairs=3)
    assert [[c.picks for c in choices] for _, choices, _ in found] == [
        [(0, 1), (0, 2), (1, 2)],
        [],
        [],
        [(0, 1)],
    ]
    assert found[1][2] == {"more than max_pairs": 3} and found[2][2] == {"more than max_pairs": 1}
    two = load_preferences(rows, pairing="all", max_pairs=2)
    assert Counter(pair.prompt[0].content for pair in two) == {"a question": 2, "another": 1}
    assert two.report.dropped == {"more than max_pairs": 2}


def test_several_records_of_one_item_and_reasons():
    several = [candidates([1.0, 0.0]), candidates([1.0, 1.0]), candidates([0.0, 2.0])]
    items = [Item("here", several, 5), Item("there", "no good", 2)]
    (_, choices, reasons), (_, none, why) = pair_items(items)
    assert [c.picks for c in choices] == [(0, 1), (1, 0)] and reasons == {"tie": 1}
    assert [c.record for c in choices] == [several[0], several[2]]
    assert none == [] and why == {"no good": 1}


def test_empty_responses_stay_or_go():
    rows = [candidates([2.0, 1.0, 0.0], ["good", " \n", "bad"]), Pair(PROMPT, say(""), say("b"))]
    kept = load_preferences(rows, pairing="all")
    assert len(kept) == 4 and kept.report.notes == ["kept although one response is empty: 3"]
    dropped = load_preferences(rows, pairing="all", empty="drop")
    assert [(p.chosen[0].content, p.rejected[0].content) for p in dropped] == [("good", "bad")]
    assert dropped.report.dropped == {"an empty response": 1}
    with pytest.raises(InputError, match="empty='maybe' is not one of keep, drop"):
        load_preferences(rows, empty="maybe")
