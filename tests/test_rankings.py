"""Rankings: the shapes they come in, what is left out and counted, and their tokens."""

import json

import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from prefopt import InputError
from prefopt.command_inputs import pairs_or_dialogues, pairs_or_feedback, pairs_or_rankings
from prefopt.data.encode import encode_pairs
from prefopt.data.encode_rankings import encode_rankings
from prefopt.data.rankings import load_rankings
from prefopt.data.records import Candidates, Message, Pair, Ranking
from prefopt.data.sources import load_preferences


def answer(text):
    return [Message("assistant", text)]


QUESTION = [Message("user", "Why?")]


def texts(ranking):
    return [response[-1].content for response in ranking.responses]


@pytest.mark.parametrize(
    "row",
    [
        {"responses": ["b", "a", "c"], "scores": [2, 3.5, -1]},
        {"completions": ["b", "a", "c"], "ratings": [0.2, 0.3, 0.1]},
        {"answers": ["b", "a", "c"], "ranks": [2, 1, 3]},
        {"candidates": [{"text": t, "rank": r} for t, r in (("b", 2), ("a", 1), ("c", 9))]},
        {"responses": [{"content": t, "score": s} for t, s in (("b", 5), ("c", 1), ("a", 7))]},
        {"responses": [{"response": t, "rating": s} for t, s in (("a", 5), ("b", 1), ("c", 0))]},
        {"responses": [answer("b"), answer("a"), answer("c")], "scores": [0, 1, -1]},
    ],
)  # fmt: skip
def test_every_shape_becomes_a_ranking_best_first(row):
    if isinstance(next(iter(row.values()))[0], list):
        row["responses"] = [[m._asdict() for m in turns] for turns in row["responses"]]
    (ranking,) = load_rankings([{"prompt": "Why?", **row}])
    assert ranking == Ranking(QUESTION, [answer("a"), answer("b"), answer("c")])


def test_prompts_are_texts_transcripts_or_messages_and_a_system_turn_goes_first():
    rated = {"responses": [" x", "y"], "scores": [1, 0], "source": "here"}
    transcript = "\n\nHuman: Why?\n\nAssistant:"
    rows = [
        {"prompt": "Why?", "system": "Be kind.", **rated},
        {"prompt": transcript, **rated},
        {"prompt": transcript + " ", **rated},
        {"prompt": [{"role": "user", "content": "Why?"}], **rated},
    ]
    kind, bare, spaced, listed = load_rankings(rows)
    assert kind.prompt == [Message("system", "Be kind."), *QUESTION] and kind.source == "here"
    assert bare.prompt == spaced.prompt == listed.prompt == QUESTION
    # The space after the marker stands in the prompt or in the reply.
    assert texts(bare) == ["x", "y"] and texts(spaced) == [" x", "y"]


def test_equal_and_repeated_responses_are_left_out_and_counted():
    rows = [
        {"prompt": "Why?", "responses": ["a", "b", "c", "d"], "scores": [1, 2, 1, 2]},
        {"prompt": "Why?", "responses": ["a", "a", "b"], "scores": [1, 2, 0]},
        {"prompt": "Why?", "responses": ["a", "b"], "scores": [1, 1]},
        {"prompt": "Why?", "responses": ["a", "a"], "scores": [1, 2]},
        {"prompt": "Why?", "responses": ["a"], "scores": [1]},
    ]
    data = load_rankings(rows)
    assert [texts(r) for r in data] == [["b", "a"], ["a", "b"]]
    report = data.report
    assert (report.rows, report.kept, sum(report.dropped.values())) == (5, 2, 3)
    assert set(report.dropped_at.values()) == {"[2]"}
    assert any("as good: 2" in note for note in report.notes)
    assert any("repeat a better one: 1" in note for note in report.notes)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"responses": "a"}, "the responses are str, not a list"),
        ({"responses": None}, "'responses' is null"),
        ({"scores": [1]}, "not as many scores or ranks as responses"),
        ({"scores": [1, "N/A"]}, "fewer than two responses that differ in text and in rank"),
        ({"scores": [1, float("nan")]}, "fewer than two responses that differ in text and in rank"),
        ({"scores": [1, True]}, "fewer than two responses that differ in text and in rank"),
        ({"scores": [None, "?"]}, "no scores or ranks"),
        ({"scores": None}, "'scores' is null"),
        ({"scores": 3}, "the scores or ranks are int, not a list"),
        ({"responses": ["a", 1]}, "a response is int, not text or messages"),
        ({"responses": ["a", {"score": 1}]}, "a response is NoneType, not text or messages"),
        ({"responses": ["a", [{"role": "user", "content": "b"}]]}, "no assistant turn"),
        ({"prompt": None}, "'prompt' is null"),
        ({"prompt": []}, "no prompt"),
        (
            {"prompt": [{"role": "assistant", "content": "I"}]},
            "the prompt ends with an assistant turn",
        ),
        ({"responses": ["a", "\ud800"]}, "text that is not valid Unicode (half a surrogate pair)"),
    ],
)
def test_a_row_of_no_use_is_counted_with_its_reason(change, reason):
    good = {"prompt": "Why?", "responses": ["a", "b"], "scores": [1, 2]}
    data = load_rankings([good, good | change, good])
    assert len(data) == 2 and data.report.dropped == {reason: 1}
    assert data.report.dropped_at == {reason: "[1]"}


def test_preference_rows_and_records_are_rankings_of_two(hh_path, tmp_path):
    pairs = load_preferences(hh_path)
    rankings = load_rankings(hh_path)
    assert len(rankings) == len(pairs) and "rankings of two" in rankings.report.reason
    for of in (rankings, load_rankings(pairs), load_rankings(pairs[:9]), load_rankings(rankings)):
        assert of[7] == Ranking(pairs[7].prompt, [pairs[7].chosen, pairs[7].rejected])
    named = [{"prompt": "Why?", "good": "a", "bad": "b"}]
    (one,) = load_rankings(named, columns={"chosen": "good", "rejected": "bad"})
    assert texts(one) == ["a", "b"]
    three = [Ranking(QUESTION, [answer("a"), answer("b"), answer("c")], "here")]
    assert list(load_rankings(three)) == three
    file = tmp_path / "rankings.jsonl"
    rows = [{"prompt": "Why?", "responses": ["a", "b", "c"], "ranks": [3, 2, 1]}] * 2
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [texts(r) for r in load_rankings(file)] == [["c", "b", "a"]] * 2


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([{"prompt": "p", "text": "a"}], {}, "or a list of responses with scores or ranks"),
        ([{"responses": ["a", "b"], "ask": "p"}], {}, "no column holds the prompt"),
        ([{"prompt": "p", "responses": [], "answers": [], "ranks": []}], {},
         "'responses' and 'answers' may both hold what is called 'responses'"),
        ([{"prompt": "p", "responses": [], "scores": [], "rank": []}], {}, "hide one"),
        ([{"prompt": "p", "responses": []}], {"responses": "respones"}, "nearest: 'responses'"),
        ([{"prompt": "p", "responses": []}], {"answer": "responses"}, "cannot map 'answer'"),
        ([{"prompt": "p", "responses": ["a", "b"]}], {}, "says which response is better"),
        ([{"prompt": "p", "responses": ["a"], "scores": [1]}], {},
         "No usable ranking among the 1 rows"),
        ([Ranking([], [answer("a"), answer("b")])], {}, "no prompt"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_says_why(rows, columns, message):
    with pytest.raises(InputError, match=message):
        load_rankings(rows, columns=columns)


def test_columns_win_and_hide():
    row = {"q": "Why?", "answers": ["a", "b"], "rank": [2, 1], "scores": [1, 0]}
    (by_rank,) = load_rankings([row], columns={"prompt": "q", "scores": None})
    (by_score,) = load_rankings([row], columns={"prompt": "q", "ranks": None})
    assert (texts(by_rank), texts(by_score)) == (["b", "a"], ["a", "b"])


# --- tokens ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return transformers.AutoTokenizer.from_pretrained(tiny_model)


def test_two_responses_are_encoded_as_a_pair_is(tokenizer, tiny_rows):
    pairs = load_preferences(tiny_rows)
    rankings = load_rankings(tiny_rows)
    for length in (64, 40):
        a = encode_pairs(pairs, tokenizer, max_length=length)
        b = encode_rankings(rankings, tokenizer, max_length=length)
        assert [x.index for x in a] == [x.index for x in b] and a.template == b.template
        for x, y in zip(a, b, strict=True):
            assert np.array_equal(x.prompt, y.prompt)
            assert all(map(np.array_equal, x.responses, y.responses))
        assert a.counts["truncated"] == b.counts["truncated"]


def test_responses_that_are_the_same_after_truncation_are_left_out_and_counted(tokenizer):
    long = "I will gladly help, " + "really " * 40
    four = [answer(text) for text in (long, long + "more", "No.", long + "again")]
    data = [Ranking(QUESTION, four), Ranking(QUESTION, four[:2])]
    encoded = encode_rankings(data, tokenizer, max_length=30)
    assert [item.index for item in encoded] == [0] and len(encoded[0].responses) == 2
    assert encoded.counts["responses identical to a better one"] == 3
    assert encoded.counts["dropped: fewer than two different responses"] == 1
    best, second = encoded[0].responses
    assert best[-1] != tokenizer.eos_token_id == second[-1]  # the best one is cut
    assert tokenizer.decode(second[:-1]).strip() == "No."
    with pytest.raises(InputError, match="No ranking is left"):
        encode_rankings(data, tokenizer, max_length=2)


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)


@given(st.lists(st.tuples(words, st.integers(-3, 3)), min_size=2, max_size=6))
def test_best_first_no_two_equal_and_every_response_accounted_for(rated):
    row = {"prompt": "Why?", "responses": [t for t, _ in rated], "scores": [s for _, s in rated]}
    best = {}
    for text, score in rated:
        best.setdefault(score, text)
    want = list(dict.fromkeys(best[score] for score in sorted(best, reverse=True)))
    if len(want) < 2:
        with pytest.raises(InputError, match="fewer than two responses"):
            load_rankings([row])
        return
    (ranking,) = load_rankings([row])
    assert texts(ranking) == want


def test_a_pair_with_a_source_keeps_it():
    pair = Pair(QUESTION, answer("a"), answer("b"), margin=2.0, source="there")
    assert load_rankings([pair])[0].source == "there"


def test_rankings_and_candidates_are_a_source_of_both():
    ranked = [Ranking(QUESTION, [answer("a"), answer("b"), answer("c")], "here")]
    two = load_preferences(ranked, pairing="adjacent")
    assert [(texts_of(p.chosen), texts_of(p.rejected), p.margin, p.source) for p in two] == [
        ("a", "b", 1.0, "here"),
        ("b", "c", 1.0, "here"),
    ]
    rated = [
        Candidates(QUESTION, [answer("b"), answer("x"), answer("a")], [1.0, float("nan"), 2.0])
    ]
    found = load_rankings(rated)
    assert list(found) == [Ranking(QUESTION, [answer("a"), answer("b")])]
    assert found.report.notes == ["responses left out because they have no score: 1"]


def test_a_tie_of_two_is_no_ranking_and_a_soft_one_neither():
    pair = Pair(QUESTION, answer("a"), answer("b"), preference=0.5)
    found = load_rankings([pair, Pair(QUESTION, answer("a"), answer("b"))])
    assert len(found) == 1 and set(found.report.dropped_at.values()) == {"[0]"}
    rows = [
        {"prompt": "q", "response_a": "GOOD", "response_b": "BAD", "winner": winner}
        for winner in ("a", "tie", "a")
    ]
    found = load_rankings(rows)
    assert [texts(r) for r in found] == [["GOOD", "BAD"]] * 2 and found.report.kept == 2
    assert "rankings of two" in found.report.reason


def texts_of(turns):
    return turns[-1].content


ROWS = {
    "pairs": [{"prompt": "q", "chosen": "a", "rejected": "b"}],
    "choices": [{"prompt": "q", "response_a": "a", "response_b": "b", "winner": "a"}],
    "lists": [{"prompt": "q", "responses": ["a", "b"], "scores": [2, 1]}],
    "scored": [{"prompt": "q", "response": t, "score": s} for t, s in (("a", 2), ("b", 1))],
    "labelled": [{"prompt": "q", "completion": t, "label": t == "a"} for t in "ab"],
    "talks": [{"messages": [{"role": r, "content": "a"} for r in ("user", "assistant")]}],
    "texts": [{"text": "once upon a time"}],
}


@pytest.mark.parametrize(
    ("load", "kinds"),
    [
        (pairs_or_rankings, "Pair Pair Ranking Ranking Ranking - -"),
        (pairs_or_dialogues, "Pair Pair Pair Dialogue Dialogue Dialogue Dialogue"),
        (pairs_or_feedback, "Pair Pair Pair Pair Feedback - -"),
    ],
)
def test_what_each_command_makes_of_rows(load, kinds):
    for rows, kind in zip(ROWS.values(), kinds.split(), strict=True):
        if kind == "-":
            with pytest.raises(InputError):
                load(rows)
        else:
            assert {type(record).__name__ for record in load(rows)} == {kind}
    with pytest.raises(InputError, match="does not have"):
        load(ROWS["pairs"], columns={"prompt": "promt"})
