"""Rows that make a comparison together: trees of messages, scored and labelled single responses.

The texts of the fixtures say what must be chosen: GOOD before OK before BAD. A response that says
NEVER must not be in any pair.
"""

import csv
import gzip
import itertools
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt import InputError
from prefopt.data.dialogues import load_dialogues
from prefopt.data.feedback import load_feedback
from prefopt.data.prompts import load_prompts
from prefopt.data.rankings import load_rankings
from prefopt.data.records import Message
from prefopt.data.sources import load_preferences


def texts(pair):
    return (pair.chosen[-1].content, pair.rejected[-1].content, pair.margin)


def said(*contents):
    return [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(contents)]


def counted(report):
    return report.rows == report.kept + sum(report.dropped.values())


# --- OpenAssistant, one message in each row ------------------------------------------------------


def message(own, parent, role, text, rank=None, **more):
    about = {"lang": "en", "deleted": False, "review_result": True, "synthetic": False}
    row = {"message_id": own, "parent_id": parent, "text": text, "role": role, "rank": rank}
    return {**row, **about, "message_tree_id": "t", "labels": {"name": ["spam"]}, **more}


OASST = [
    # The answers stand before what they answer; users' messages have ranks that say nothing.
    message("a2", "q", "assistant", "BAD", 2),
    message("a0", "q", "assistant", "GOOD", 0.0),
    message("a1", "q", "assistant", "OK", 1),
    message("a3", "q", "assistant", "NEVER", None),
    message("a4", "q", "assistant", "NEVER", 3, deleted=True),
    message("a5", "q", "assistant", "NEVER", 4, review_result=False),
    message("q", None, "prompter", "question", 0),
    # A conversation that goes on, in another language.
    message("f", "a0", "prompter", "¿y luego?", 1, lang="es"),
    message("f2", "a0", "prompter", "another way", 0),
    message("b1", "f", "assistant", "GOOD 2", 0, lang="es"),
    message("b2", "f", "assistant", "BAD 2", 1, lang="es"),
    # Only one that is ranked.
    message("c1", "f2", "assistant", "NEVER", 0),
    # Equal ranks.
    message("r", None, "prompter", "tied?"),
    message("d1", "r", "assistant", "tied", 0),
    message("d2", "r", "assistant", "tied too", 0),
    # An orphan, and what answers it.
    message("o", "gone", "prompter", "where am I?"),
    message("o1", "o", "assistant", "NEVER", 0),
    message("o2", "o", "assistant", "NEVER", 1),
    # A circle.
    message("x", "y", "prompter", "chicken"),
    message("y", "x", "assistant", "NEVER", 0),
    message("z", "x", "assistant", "NEVER", 1),
    # Below what was deleted.
    message("k", None, "prompter", "deleted", deleted=True),
    message("k1", "k", "assistant", "NEVER", 0),
    message("k2", "k", "assistant", "NEVER", 1),
    # Garbage.
    message(7, None, "prompter", "no text as id"),
    message(["u"], None, "prompter", "no text as id"),
    message("u2", {"a": 1}, "assistant", "no text as parent", 0),
    message("q", None, "prompter", "an id that was there before"),
    message("u3", None, "robot", "?"),
    message("u4", None, None, "?"),
    message("u5", "q", "assistant", None, 0),
    message("u6", "q", "assistant", "NEVER", "best"),
    message("u7", None, "assistant", "a root that speaks", 0),
    message("v", "a1", "assistant", "NEVER", 0),
    message("w", "a1", "assistant", "NEVER", 1),
]


def test_trees_of_messages():
    pairs = load_preferences(OASST)
    assert [texts(pair) for pair in pairs] == [("GOOD", "BAD", 2.0), ("GOOD 2", "BAD 2", 1.0)]
    assert [pair.prompt for pair in pairs] == [
        said("question"),
        said("question", "GOOD", "¿y luego?"),
    ]
    report = pairs.report
    assert report.schema == "trees of messages" and counted(report)
    assert report.rows == len(OASST) and report.kept == 7  # q, a0, a1, a2, and f, b1, b2
    assert report.dropped == {
        "the message is deleted": 2,
        "the message did not pass review": 1,
        "a reply without a rank": 2,
        "the only ranked reply to its message": 1,
        "a user's message without ranked replies": 3,  # f2, o, x
        "tie": 3,  # r and its two
        "an earlier message is missing": 4,
        "its messages answer each other": 2,
        "'message_id' or 'parent_id' is no text": 3,
        "a message with the same 'message_id' came before": 1,
        "unknown role 'robot'": 1,
        "unknown role None": 1,
        "'text' is NoneType, not text": 1,
        "a reply to nothing": 1,
        "the message answers one of an assistant": 2,
    }
    assert report.dropped_at["the message is deleted"] == "[4]"


def test_trees_in_every_policy_and_for_rankings_dialogues_and_prompts():
    every = load_preferences(OASST, pairing="all", ties="soft")
    assert [(*texts(pair)[:2], pair.preference) for pair in every] == [
        ("GOOD", "OK", 1.0),
        ("GOOD", "BAD", 1.0),
        ("OK", "BAD", 1.0),
        ("GOOD 2", "BAD 2", 1.0),
        ("tied", "tied too", 0.5),
    ]
    rankings = load_rankings(OASST)
    assert [[r[0].content for r in ranking.responses] for ranking in rankings] == [
        ["GOOD", "OK", "BAD"],
        ["GOOD 2", "BAD 2"],
    ]
    dialogues = load_dialogues(OASST)
    assert [d.turns for d in dialogues] == [
        said("question", "GOOD"),
        said("question", "GOOD", "¿y luego?", "GOOD 2"),
    ]
    assert [d.context for d in dialogues] == [1, 3] and counted(dialogues.report)
    prompts = load_prompts(OASST)
    asked = [said("question"), said("question", "GOOD", "¿y luego?"), said("tied?")]
    assert list(prompts) == asked and counted(prompts.report)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_rows_does_not_matter(seed):
    rows = [row for row in OASST if row["text"] != "an id that was there before"]
    expected, shuffled = load_preferences(rows), rows[:]
    random.Random(seed).shuffle(shuffled)
    pairs = load_preferences(shuffled)
    assert sorted(map(repr, pairs)) == sorted(map(repr, expected))
    assert pairs.report.dropped == expected.report.dropped


def test_a_table_of_messages_in_csv(tmp_path):
    rows = [row for row in OASST if isinstance(row["message_id"], str)]
    rows = [{k: v for k, v in row.items() if k != "labels"} for row in rows]
    rows = [row for row in rows if row["role"] and isinstance(row["parent_id"], str | None)]
    with open(tmp_path / "a.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    pairs = load_preferences(tmp_path / "a.csv")
    assert [texts(pair) for pair in pairs] == [("GOOD", "BAD", 2.0), ("GOOD 2", "BAD 2", 1.0)]
    assert pairs.report.dropped["the message is deleted"] == 2


@given(st.lists(st.integers(-1, 11), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_any_parents_at_all(parents, rng):
    """Forests, orphans and circles: against a walk that follows every parent."""
    names = [str(i) for i in range(len(parents))]
    roles = [rng.choice(["prompter", "assistant"]) for _ in parents]
    rows = [
        message(name, None if p < 0 else str(p), role, name, rng.choice([0, 1, None]))
        for name, p, role in zip(names, parents, roles, strict=True)
    ]
    rows += [message("Q", None, "prompter", "?"), message("A", "Q", "assistant", "GOOD", 0)]
    rows += [message("B", "Q", "assistant", "BAD", 1)]

    def way(name):
        walked = []
        while name is not None:
            if name in walked or name not in by_name:
                return None
            walked.append(name)
            name = by_name[name]["parent_id"]
        return walked[::-1]

    by_name = {row["message_id"]: row for row in rows}
    expected = set()
    for a, b in itertools.combinations(by_name.values(), 2):
        same = a["parent_id"] == b["parent_id"] in by_name and a["role"] == b["role"] == "assistant"
        if same and by_name[a["parent_id"]]["role"] == "prompter" and way(a["parent_id"]):
            if None not in (a["rank"], b["rank"]) and a["rank"] != b["rank"]:
                best, worst = sorted((a, b), key=lambda row: row["rank"])
                expected.add((*way(a["parent_id"]), best["text"], worst["text"]))
    pairs = load_preferences(rows, pairing="all")
    names = {row["text"]: row["message_id"] for row in rows}
    found = [(*(names[m.content] for m in pair.prompt), *texts(pair)[:2]) for pair in pairs]
    assert len(found) == len(set(found)) and set(found) == expected
    assert pairs.report.rows == len(rows) and counted(pairs.report)


# --- OpenAssistant, a tree in each row -----------------------------------------------------------


def node(role, text, *replies, rank=None, **more):
    return {"message_id": text, "text": text, "role": role, "rank": rank, "replies": list(replies),
            "lang": "en", **more}  # fmt: skip


TREE = node(
    "prompter",
    "question",
    node("assistant", "BAD", rank=1),
    node(
        "assistant",
        "GOOD",
        node(
            "prompter",
            "and then?",
            node("assistant", "GOOD 2", rank=0),
            node("assistant", "NEVER", rank=None),
            node("assistant", "BAD 2", rank=3),
        ),
        rank=0,
    ),
    node("assistant", "NEVER", rank=2, deleted=True),
    node("prompter", "NEVER", rank=3),
)
TREES = [
    {"message_tree_id": "1", "tree_state": "ready_for_export", "prompt": TREE},
    {"message_tree_id": "2", "prompt": node("prompter", "alone", node("assistant", "x", rank=0))},
    {"message_tree_id": "3", "prompt": {**TREE, "replies": "none"}},
    {"message_tree_id": "4", "prompt": {**TREE, "deleted": True}},
    {"message_tree_id": "5", "prompt": {**TREE, "replies": [None, 3, "x", [], {"text": 3}]}},
    {"message_tree_id": "6", "prompt": None},
    {"message_tree_id": "7", "prompt": "a text"},
]


def test_nested_trees(tmp_path):
    path = tmp_path / "a.trees.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in TREES).encode()))
    for source in (TREES, path):
        pairs = load_preferences(source)
        assert [texts(pair) for pair in pairs] == [("GOOD", "BAD", 1.0), ("GOOD 2", "BAD 2", 3.0)]
        assert [pair.prompt for pair in pairs] == [
            said("question"),
            said("question", "GOOD", "and then?"),
        ]
        report = pairs.report
        assert report.schema == "nested trees"
        assert (report.rows, report.kept, report.records) == (7, 1, 2)
        none = "no message with two ranked replies"
        assert report.dropped == {none: 5, "'prompt' is null": 1}
    assert [len(r.responses) for r in load_rankings(TREES)] == [2, 2]
    assert [d.turns[-1].content for d in load_dialogues(TREES)] == ["GOOD", "GOOD 2"]
    assert list(load_prompts(TREES[:1])) == [pair.prompt for pair in load_preferences(TREES)]


def test_a_tree_deeper_than_the_stack():
    deepest = tree = node("prompter", "0")
    for depth in range(1, 20_001):
        reply = node(("prompter", "assistant")[depth % 2], str(depth))
        deepest["replies"] = [reply]
        deepest = reply
    deepest["replies"] = [node("assistant", "BAD", rank=1), node("assistant", "GOOD", rank=0)]
    (pair,) = load_preferences([{"prompt": tree}])
    assert texts(pair) == ("GOOD", "BAD", 1.0) and len(pair.prompt) == 20_001


# --- nvidia/HelpSteer2: one response in each row -------------------------------------------------


def helpsteer(prompt, response, helpfulness, correctness=2):
    rest = {"coherence": 4, "complexity": 1, "verbosity": 2}
    rated = {"helpfulness": helpfulness, "correctness": correctness, **rest}
    return {"prompt": prompt, "response": response, **rated}


SERIAL = "How?\n<extra_id_1>Assistant\nThus.\n<extra_id_1>User\nWhy?"
HELPSTEER = [
    helpsteer("q1", "BAD", 1, correctness=4),
    helpsteer("q1", "GOOD", 4, correctness=0),
    helpsteer("q2", "tied", 3),
    helpsteer("q2", "tied too", 3),
    helpsteer("q4", "alone", 3),
    helpsteer(SERIAL, "GOOD", 3),
    helpsteer("q3", "GOOD", 2.0),
    helpsteer("q3", None, 2),
    helpsteer("q3", "NEVER", None),
    helpsteer(["q3"], "NEVER", 3),
    helpsteer("q3", "BAD", "0"),  # far from the other one
    helpsteer(SERIAL, "BAD", 1),
]


def test_helpsteer2():
    pairs = load_preferences(HELPSTEER)
    assert [texts(pair) for pair in pairs] == [
        ("GOOD", "BAD", 3.0),
        ("GOOD", "BAD", 2.0),
        ("GOOD", "BAD", 2.0),
    ]
    assert [pair.prompt for pair in pairs] == [
        said("q1"),
        said("How?", "Thus.", "Why?"),
        said("q3"),
    ]
    report = pairs.report
    assert (report.rows, report.kept, report.records) == (12, 6, 3)
    assert report.dropped == {
        "tie": 2,
        "only one response to its prompt": 1,
        "'response' is null": 1,
        "'score' is null": 1,
        "a message is str, not an object": 1,
    }
    assert counted(report) and report.dropped_at["tie"] == "[2]"
    assert "'score' from 'helpfulness'" in report.reason


def test_helpsteer2_by_another_score():
    (pair,) = load_preferences(HELPSTEER, columns={"score": "correctness"})
    assert texts(pair) == ("BAD", "GOOD", 4.0)
    soft = load_preferences(HELPSTEER, ties="soft")
    assert [(texts(p)[:2], p.preference) for p in soft][1] == (("tied", "tied too"), 0.5)


@pytest.mark.parametrize("prompt", ["prompt", "instruction", "question"])
@pytest.mark.parametrize("response", ["response", "completion", "answer"])
@pytest.mark.parametrize("score", ["score", "rating", "reward"])
def test_generic_scored_rows(prompt, response, score):
    scored = [("OK", 0.5), ("GOOD", 7), ("BAD", -3)]
    rows = [{prompt: "q", response: text, score: value} for text, value in scored]
    rows.insert(1, {prompt: "another", response: "x", score: 1})
    (pair,) = load_preferences(rows)
    assert texts(pair) == ("GOOD", "BAD", 10.0) and pair.prompt == said("q")
    assert len(load_preferences(rows, pairing="all")) == 3
    (ranking,) = load_rankings(rows)
    assert [r[0].content for r in ranking.responses] == ["GOOD", "OK", "BAD"]
    assert len(load_prompts(rows)) == 2  # the one without a comparison, too


def test_one_response_that_was_scored_several_times_has_the_mean():
    rows = [("GOOD", 4), ("BAD", 3), ("GOOD", 1), ("BAD", 1), ("GOOD", 4), ("BAD", 3.5)]
    rows = [{"prompt": "q", "response": text, "score": score} for text, score in rows]
    (pair,) = load_preferences(rows)
    assert texts(pair) == ("GOOD", "BAD", 0.5)
    alone = [{"prompt": "p", "response": "same", "score": score} for score in (1, 2)]
    report = load_preferences([*rows, *alone]).report
    assert report.dropped == {"only one response to its prompt": 2} and report.kept == 6


def test_scores_of_two_kinds_are_refused():
    rows = [{"prompt": "q", "response": t, "rating": 1, "reward": 2} for t in ("a", "b")]
    with pytest.raises(InputError, match="'rating' and 'reward' may both hold what"):
        load_preferences(rows)
    assert (
        len(load_preferences([*rows, {**rows[0], "rating": 3}], columns={"score": "rating"})) == 1
    )


# --- openai/summarize_from_feedback, axis --------------------------------------------------------


def summary(name, text, overall, coverage=1, **info):
    about = {"id": name, "post": name, "title": "T", "subreddit": "r", "article": None}
    axes = {"overall": overall, "accuracy": 7, "coverage": coverage, "coherence": 7}
    return {"info": {**about, **info}, "summary": {"text": text, "policy": "p", "note": None,
            "axes": axes}, "worker": "w", "batch": "b", "split": "test"}  # fmt: skip


def test_rated_summaries():
    article = {"post": None, "title": None, "subreddit": None, "article": "News."}
    rows = [
        summary("post 1", " BAD", 2, coverage=6),
        summary("post 1", " GOOD", 6),
        summary("post 2", " GOOD", 5),
        summary("post 2", " BAD", 2),
        summary("post 2", " GOOD", 6),  # by another worker
        summary("post 2", " NEVER", None),
        summary("x", " GOOD", 5, **article),
        summary("x", " BAD", 4, **article),
        summary("x", " NEVER", 4, post=None),
        {**summary("y", "", 4), "summary": {"text": None, "axes": {"overall": 1}}},
        {**summary("y", "", 4), "summary": "text"},
    ]
    pairs = load_preferences(rows)
    assert [texts(pair) for pair in pairs] == [
        ("GOOD", "BAD", 4.0),
        ("GOOD", "BAD", 3.5),
        ("GOOD", "BAD", 1.0),
    ]
    assert pairs[0].prompt == said("SUBREDDIT: r/r\n\nTITLE: T\n\nPOST: post 1\n\nTL;DR:")
    assert pairs[2].prompt == said("Article:\nNews.\n\nTL;DR:")
    assert counted(pairs.report) and pairs.report.kept == 7
    (other,) = load_preferences(rows, columns={"score": "coverage"})
    assert texts(other) == ("BAD", "GOOD", 5.0)


# --- KTO: good and bad responses of one prompt ---------------------------------------------------

KTO = [
    {"prompt": "q1", "completion": "BAD", "label": False},
    {"prompt": "q2", "completion": "GOOD", "label": 1},
    {"prompt": [{"role": "user", "content": "q3"}], "label": "true",
     "completion": [{"role": "assistant", "content": "GOOD"}]},
    {"prompt": "q4", "completion": "only good", "label": True},
    {"prompt": "q1", "completion": "GOOD", "label": True},
    {"prompt": "q3", "completion": "BAD", "label": 0.0},
    {"prompt": "q2", "completion": "BAD", "label": False},
    {"prompt": "q2", "completion": "BAD too", "label": "0"},
    {"prompt": "q2", "completion": "NEVER", "label": "maybe"},
    {"prompt": "q2", "completion": "NEVER", "label": [True]},
    {"prompt": "q4", "completion": "also good", "label": True},
]  # fmt: skip


def test_labelled_rows():
    pairs = load_preferences(KTO)
    assert [texts(pair)[:2] for pair in pairs] == [("GOOD", "BAD")] * 3
    assert [pair.prompt for pair in pairs] == [said(q) for q in ("q1", "q2", "q3")]
    assert (pairs.report.rows, pairs.report.kept) == (11, 7)
    assert pairs.report.dropped == {
        "the label is 'maybe', neither true nor false": 1,
        "the label is [True], neither true nor false": 1,
        "no response to its prompt has the other label": 2,
    }
    rest = load_preferences(KTO, pairing="all")
    assert [texts(pair)[:2] for pair in rest][1:3] == [("GOOD", "BAD"), ("GOOD", "BAD too")]
    assert len(load_feedback(KTO)) == 9 and load_feedback(KTO).report.dropped.keys() == {
        "the label is 'maybe', neither true nor false",
        "the label is [True], neither true nor false",
    }
    assert [p[-1].content for p in load_prompts(KTO)] == ["q1", "q2", "q3", "q4"]


def test_labels_of_which_no_prompt_has_both():
    with pytest.raises(InputError, match=r"--loss kto \(load_feedback\)"):
        load_preferences([row for row in KTO if row["label"] not in (True, "true")])
    assert len(load_feedback(KTO[:2])) == 2
    with pytest.raises(InputError, match="No usable pair among the 1 rows"):
        load_preferences([{**KTO[0], "label": "maybe"}])


# --- anything ------------------------------------------------------------------------------------

junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
GOOD_ROWS = [
    [helpsteer("q", "GOOD", 4), helpsteer("q", "BAD", 1)],
    [{"prompt": "q", "completion": "GOOD", "label": True},
     {"prompt": "q", "completion": "BAD", "label": False}],
    [message("q", None, "prompter", "q"), message("g", "q", "assistant", "GOOD", 0),
     message("b", "q", "assistant", "BAD", 1)],
    TREES[:1],
    [summary("post 1", " BAD", 2), summary("post 1", " GOOD", 6)],
]  # fmt: skip


@given(st.sampled_from(GOOD_ROWS), st.data())
def test_rows_of_anything_are_counted(good, data):
    keys = list(good[0])
    row = st.fixed_dictionaries({}, optional=dict.fromkeys(keys, junk))
    drawn = [data.draw(row) for _ in range(3)]
    rows = [*good, *({**data.draw(st.sampled_from(good)), **some} for some in drawn)]
    try:
        pairs = load_preferences(rows)
    except InputError as error:
        assert "No usable" in str(error) and _ranks(drawn), error
        return
    assert pairs.report.rows == len(rows) and counted(pairs.report)
    assert any(texts(pair)[:2] == ("GOOD", "BAD") for pair in pairs) or _ranks(drawn)


def _ranks(drawn):
    """Whether what was drawn may be a rank or a label, and make the other response the better."""
    return any(isinstance(value, int | float | str) for some in drawn for value in some.values())


def test_the_rows_stay_on_disk(tmp_path, monkeypatch):
    """Far apart and with long texts: what is held in memory is small beside them."""
    import tracemalloc

    path, n = tmp_path / "a.jsonl", 400
    with open(path, "w") as file:
        for score in (1, 2):
            for i in range(n):
                row = {"prompt": f"q{i}", "response": f"{score} " + "x" * 50_000, "score": score}
                file.write(json.dumps(row) + "\n")
    tracemalloc.start()
    pairs = load_preferences(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(pairs) == n and all(texts(pair)[0].startswith("2 ") for pair in pairs)
    assert 2 * n * 50_000 == 40_000_000 and peak < 25_000_000  # two buffers of 8 MB among them
