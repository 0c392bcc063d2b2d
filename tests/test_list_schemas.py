"""Rows with a list of responses: which one is the best, and which are left out and said to be.

The texts of the fixtures say what must be chosen: GOOD before OK before BAD. A response that says
NEVER must not be in any pair.
"""

import csv
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt import InputError
from prefopt.data.dialogues import load_dialogues
from prefopt.data.pairing import PAIRINGS
from prefopt.data.prompts import load_prompts
from prefopt.data.rankings import load_rankings
from prefopt.data.records import Message
from prefopt.data.sources import load_preferences


def user(text):
    return [Message("user", text)]


def texts(pair):
    return (pair.chosen[-1].content, pair.rejected[-1].content, pair.margin)


# --- berkeley-nest/Nectar: 1 is the best ---------------------------------------------------------


def nectar(number, *answers):
    return {
        "prompt": f"\n\nHuman: Question {number}?\n\nAssistant: ",
        "answers": [{"answer": text, "model": "m", "rank": rank} for text, rank in answers],
        "turns": 1,
        "num_responses": len(answers),
        "source": ["lmsys-chat-1m"],
        "good_natured": True,
    }


NECTAR = [
    nectar(1, ("OK", 2.0), ("BAD", 3.0), ("GOOD", 1.0)),
    nectar(2, ("GOOD", 1.0), ("OK", 2.0), ("OK too", 2.0), ("BAD", 4.0)),
    nectar(3, ("BAD", 7.0), ("GOOD", 3.0), ("NEVER", None)),  # ranks of which some are gone
    nectar(4, ("same", 1.0), ("same", 2.0)),
    nectar(5, ("tied", 1.0), ("tied too", 1.0)),
    {**nectar(6, ("BAD", 2.0), ("GOOD", 1.0)), "prompt": "\n\nHuman: Question 6?\n\nAssistant: Hi."
     "\n\nHuman: And?\n\nAssistant: "},
    {**nectar(7, ("a", 1.0), ("b", 2.0)), "answers": "no list"},
    nectar(8, ("only", 1.0), ("NEVER", None)),
]  # fmt: skip


def test_nectar_best_against_worst():
    pairs = load_preferences(NECTAR)
    assert [texts(pair) for pair in pairs] == [
        ("GOOD", "BAD", 2.0),
        ("GOOD", "BAD", 3.0),
        ("GOOD", "BAD", 4.0),
        ("GOOD", "BAD", 1.0),
    ]
    assert [pair.prompt for pair in pairs] == [
        user("Question 1?"),
        user("Question 2?"),
        user("Question 3?"),
        [*user("Question 6?"), Message("assistant", "Hi."), *user("And?")],
    ]
    assert pairs.report.dropped == {
        "all responses are the same text": 1,
        "tie": 1,
        "the responses are str, not a list": 1,
        "fewer than two responses with a score": 1,
    }
    assert pairs.report.dropped_at["tie"] == "[4]"
    assert "'rank' of each (the smallest is the best)" in pairs.report.reason
    left_out = "comparisons left out of rows that make others, a response has no score: 1"
    assert pairs.report.notes == [left_out]


def test_nectar_in_every_policy():
    def made(row, **options):
        return [texts(pair)[:2] for pair in load_preferences([row], **options)]

    row = nectar(9, ("OK", 2.0), ("BAD", 4.0), ("GOOD", 1.0), ("OK too", 2.0))
    assert made(row, pairing="best_rest") == [("GOOD", "OK"), ("GOOD", "OK too"), ("GOOD", "BAD")]
    assert made(row, pairing="adjacent") == [("GOOD", "OK"), ("OK too", "BAD")]
    every = [("GOOD", "OK"), ("GOOD", "OK too"), ("GOOD", "BAD"), ("OK", "BAD"), ("OK too", "BAD")]
    assert made(row, pairing="all") == every
    assert made(row, pairing="all", max_pairs=2) == [("GOOD", "BAD"), ("OK", "BAD")]
    assert made(row, pairing="all", min_gap=2) == [
        ("GOOD", "BAD"),
        ("OK", "BAD"),
        ("OK too", "BAD"),
    ]
    both = load_preferences([row], pairing="adjacent", ties="soft")
    assert [(*texts(p)[:2], p.preference) for p in both] == [
        ("GOOD", "OK", 1.0), ("OK", "OK too", 0.5), ("OK too", "BAD", 1.0),
    ]  # fmt: skip


def test_ties_are_dropped_kept_or_soft():
    soft = load_preferences([NECTAR[4]], ties="soft")
    assert [(texts(p), p.preference) for p in soft] == [(("tied", "tied too", 0.0), 0.5)]
    kept = load_preferences([NECTAR[4]], ties="keep")
    assert [(texts(p), p.preference) for p in kept] == [(("tied", "tied too", 0.0), 1.0)]
    with pytest.raises(InputError, match=r"tie \(1\)"):
        load_preferences([NECTAR[4]])


# --- openbmb/UltraFeedback: ratings as text, and a score that is wrong ---------------------------


def rated(text, helpfulness, honesty, overall):
    annotations = {
        "helpfulness": {"Rating": helpfulness, "Rationale": "...", "Type": ["1"]},
        "honesty": {"Rating": honesty, "Rationale": "..."},
    }
    return {"response": text, "model": "m", "annotations": annotations, "overall_score": overall,
            "fine-grained_score": 3.0}  # fmt: skip


ULTRAFEEDBACK = [
    {
        "source": "flan",
        "instruction": f"Question {number}?",
        "models": ["m"] * len(completions),
        "completions": completions,
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
    }
    for number, completions in enumerate(
        [
            [rated("GOOD", "5", "5", 1.0), rated("BAD", "1", "2", 8.0), rated("OK", "3", "3", 3.0)],
            [rated("BAD", "2", "N/A", 9.0), rated("GOOD", "3", "4", 6.0)],
            [rated("NEVER", "N/A", "N/A", 10.0), rated("BAD", "1", "1", 2.0),
             rated("GOOD", "4", "N/A", 3.0)],
            [rated("tied", "4", "2", 5.0), rated("tied too", "3", "3", 4.0)],
            [rated("only", "4", "2", 5.0), rated("NEVER", "N/A", None, None)],
            [],
        ]
    )
]  # fmt: skip


def test_ultrafeedback_by_the_mean_of_the_annotations():
    pairs = load_preferences(ULTRAFEEDBACK)
    made = [texts(pair) for pair in pairs]
    assert made == [("GOOD", "BAD", 3.5), ("GOOD", "BAD", 1.5), ("GOOD", "BAD", 3.0)]
    assert [pair.prompt for pair in pairs] == [user(f"Question {i}?") for i in range(3)]
    assert pairs.report.dropped == {"tie": 1, "fewer than two responses with a score": 2}
    assert {pair.source for pair in pairs} == {"flan"}
    assert "mean rating in the 'annotations'" in pairs.report.reason


def test_ultrafeedback_by_another_score():
    by_helpfulness = load_preferences(ULTRAFEEDBACK, columns={"scores": "helpfulness"})
    made = [texts(pair) for pair in by_helpfulness]
    assert made == [("GOOD", "BAD", 4.0), ("GOOD", "BAD", 1.0), ("GOOD", "BAD", 3.0),
                    ("tied", "tied too", 1.0)]  # fmt: skip
    by_overall = load_preferences(ULTRAFEEDBACK, columns={"scores": "overall_score"})
    assert [texts(pair) for pair in by_overall] == [
        ("BAD", "GOOD", 7.0),
        ("BAD", "GOOD", 3.0),
        ("NEVER", "BAD", 8.0),
        ("tied", "tied too", 1.0),
    ]
    assert "'scores' from 'overall_score'" in by_overall.report.reason
    with pytest.raises(InputError, match="'overal_score', which 'list of rows' does not have"):
        load_preferences(ULTRAFEEDBACK, columns={"scores": "overal_score"})
    with pytest.raises(InputError, match="does not have"):  # only a score may stand in a response
        load_preferences(ULTRAFEEDBACK, columns={"prompt": "model"})


# --- NeMo-RL: 0 is the best, completions are message lists ---------------------------------------


def nemo(*completions, context=None):
    return {
        "context": context or [{"role": "user", "content": "Question?"}],
        "completions": [
            {"rank": rank, "completion": [{"role": "assistant", "content": text}]}
            for text, rank in completions
        ],
        "task_name": "preference",
    }


def test_nemo():
    system = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Question?"}]
    rows = [
        nemo(("GOOD", 0), ("BAD", 1)),
        nemo(("BAD", 2), ("OK", 1), ("GOOD", 0)),
        nemo(("BAD", 1), ("GOOD", 0), context=system),
        nemo(("GOOD", 0), ("BAD", 1), context=[*system, {"role": "assistant", "content": "Hi."}]),
        nemo(("one", 0), ("two", 0)),
        {**nemo(), "completions": [{"rank": 0, "completion": []}, {"rank": 1, "completion": []}]},
    ]
    pairs = load_preferences(rows)
    assert [texts(p) for p in pairs] == [("GOOD", "BAD", float(n)) for n in (1, 2, 1)]
    assert pairs[2].prompt == [Message("system", "Be kind."), *user("Question?")]
    assert pairs.report.dropped == {
        "the prompt ends with an assistant turn": 1,
        "tie": 1,
        "no assistant turn": 1,
    }


# --- distilabel and generic lists ----------------------------------------------------------------


def test_generations_and_rating():
    rows = [
        {"instruction": f"Question {i}?", "input": "", "generations": generations, "rating": rating}
        for i, (generations, rating) in enumerate(
            [
                (["BAD", "GOOD"], [1, 5]),
                (["GOOD", "OK", "BAD"], [9.5, 8.0, "7"]),
                (["GOOD", None, "BAD"], [4, None, 2]),
                (["a", "b"], None),
                (["a", "b"], [None, None]),
                (["a", "b"], [1, 2, 3]),
                (["a", None], [1, 2]),
                (["tied", "tied too"], [3, 3]),
            ]
        )
    ]
    pairs = load_preferences(rows)
    assert [texts(p) for p in pairs] == [("GOOD", "BAD", m) for m in (4.0, 2.5, 2.0)]
    assert pairs.report.dropped == {
        "'rating' is null": 1,
        "no scores or ranks": 1,
        "not as many scores or ranks as responses": 1,
        "a response is NoneType, not text or messages": 1,
        "tie": 1,
    }
    own = {"chosen": "GOOD", "rejected": "BAD"}  # which two are meant is said already
    labelled = load_preferences([{**row, **own, "rating": [5, 1]} for row in rows])
    assert {texts(p)[:2] for p in labelled} == {("GOOD", "BAD")}
    assert labelled.report.schema == "plain strings" and labelled.report.kept == len(rows)


BEST_FIRST = {"GOOD": 3.5, "OK": 2.0, "BAD": -1.0}
ORDER = ("OK", "GOOD", "BAD")


@pytest.mark.parametrize("responses", ["responses", "completions", "answers", "candidates"])
@pytest.mark.parametrize("prompt", ["prompt", "question", "instruction"])
@pytest.mark.parametrize(
    "values",
    [{key: [BEST_FIRST[t] for t in ORDER]} for key in ("scores", "ratings", "rewards", "rating")]
    + [{"ranks": [2, 1, 3]}, {"rank": [10, 5, 20]}],
    ids=lambda values: next(iter(values)),
)
def test_lists_beside_the_responses(prompt, responses, values):
    row = {prompt: "Question?", responses: list(ORDER), **values, "id": 7}
    (pair,) = load_preferences([row])
    assert texts(pair)[:2] == ("GOOD", "BAD") and pair.prompt == user("Question?")
    (ranking,) = load_rankings([row])
    assert [turns[0].content for turns in ranking.responses] == ["GOOD", "OK", "BAD"]
    (dialogue,) = load_dialogues([row])
    assert dialogue.turns == [*user("Question?"), Message("assistant", "GOOD")]
    assert dialogue.context == 1
    assert list(load_prompts([row])) == [user("Question?")]
    (key,) = values
    mapped = {"prompt": prompt, "responses": responses, "scores": key}
    if key in ("ranks", "rank"):
        mapped["ranks"] = mapped.pop("scores")
    assert list(load_preferences([row], columns=mapped)) == [pair]


@pytest.mark.parametrize("text", ["text", "content", "response", "answer"])
@pytest.mark.parametrize("key", ["score", "rating", "reward", "rank"])
def test_scores_in_each_response(text, key):
    sign = -1 if key == "rank" else 1
    responses = [{text: t, key: sign * BEST_FIRST[t]} for t in ORDER]
    row = {"prompt": "Question?", "responses": responses}
    (pair,) = load_preferences([row])
    assert texts(pair) == ("GOOD", "BAD", 4.5)
    as_text = {"prompt": "Question?", "responses": json.dumps(responses)}
    assert list(load_preferences([as_text])) == [pair]


def test_a_score_in_each_response_goes_before_its_rank():
    responses = [{"text": "GOOD", "score": 2, "rank": 2}, {"text": "BAD", "score": 1, "rank": 1}]
    (pair,) = load_preferences([{"prompt": "q", "responses": responses}])
    assert texts(pair)[:2] == ("GOOD", "BAD")
    (other,) = load_preferences(
        [{"prompt": "q", "responses": responses}], columns={"ranks": "rank"}
    )
    assert texts(other)[:2] == ("BAD", "GOOD")


def test_scores_and_ranks_beside_each_other_are_refused():
    row = {"prompt": "q", "responses": ["GOOD", "BAD"], "scores": [2, 1], "ranks": [1, 2]}
    with pytest.raises(InputError, match=r"in two ways .scored list and ranked list.: hide one"):
        load_preferences([row])
    for hidden in ("scores", "ranks"):
        (pair,) = load_preferences([row], columns={hidden: None})
        assert texts(pair)[:2] == ("GOOD", "BAD")


def test_multi_turn_responses_share_what_they_have_in_common():
    def talk(*said):
        roles = ("assistant", "user")
        return [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]

    row = {
        "prompt": "q",
        "responses": [talk("a", "b", "GOOD"), talk("a", "b", "BAD"), talk("x", "b", "OK")],
        "scores": [3, 1, 2],
    }
    (pair,) = load_preferences([row])
    assert pair.prompt == [*user("q"), Message("assistant", "a"), Message("user", "b")]
    assert texts(pair) == ("GOOD", "BAD", 2.0) and len(pair.chosen) == 1
    best, second, _ = load_preferences([row], pairing="all")
    assert second.prompt == pair.prompt and best.prompt == user("q") and len(best.chosen) == 3
    assert texts(best)[:2] == ("GOOD", "OK")


def test_csv_parquet_and_datasets_give_the_same(tmp_path):
    import datasets

    rows = [
        {"prompt": f"q{i}", "responses": ["OK", "GOOD", "BAD"], "scores": [2.0, 3.0, 1.0]}
        for i in range(5)
    ]
    expected = list(load_preferences(rows))
    assert {texts(pair) for pair in expected} == {("GOOD", "BAD", 2.0)}
    with open(tmp_path / "a.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(
            {k: v if k == "prompt" else json.dumps(v) for k, v in r.items()} for r in rows
        )
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(tmp_path / "a.parquet")
    for source in (tmp_path / "a.csv", tmp_path / "a.parquet", data):
        assert list(load_preferences(source)) == expected


# --- anything ------------------------------------------------------------------------------------

KEYS = st.sampled_from(["text", "score", "rank", "annotations", "role"])
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
junk = st.recursive(
    plain | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


@given(
    st.lists(
        st.fixed_dictionaries({}, optional=dict.fromkeys(("prompt", "responses", "scores"), junk)),
        max_size=4,
    ),
    st.sampled_from(PAIRINGS),
)
def test_rows_of_anything_are_counted(rows, pairing):
    good = {"prompt": "q", "responses": ["GOOD", "BAD"], "scores": [2, 1]}
    rows = [good, *rows, *[good] * 5]
    pairs = load_preferences(rows, pairing=pairing)
    report = pairs.report
    assert report.rows == len(rows) == report.kept + sum(report.dropped.values())
    assert sum(texts(pair) == ("GOOD", "BAD", 1.0) for pair in pairs) >= 6
    rankings = load_rankings(rows).report
    assert rankings.rows == len(rows) == rankings.kept + sum(rankings.dropped.values())


def test_a_long_deep_and_a_broken_row():
    deep = '{"a":' * 50_000 + "1" + "}" * 50_000
    good = {"prompt": "q", "responses": ["GOOD", "BAD"], "scores": [2, 1]}
    rows = [
        *[good] * 4,
        {**good, "responses": "[" * 50_000},
        {**good, "responses": f"[{deep}]"},
        {**good, "scores": [float("inf"), 1]},
        {**good, "responses": ["x" * 10_000_000, "\ud800"]},
        {**good, "prompt": {"messages": deep}},
    ]
    report = load_preferences(rows).report
    assert report.kept >= 4 and report.rows == report.kept + sum(report.dropped.values())
