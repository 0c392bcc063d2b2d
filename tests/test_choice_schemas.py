"""Two responses and a verdict: every such data set by name, with its traps.

The rows are written by hand after each data set's columns. What is to be chosen says GOOD, what is
to be rejected BAD, so that an inverted verdict cannot pass.
"""

import csv
import json
from dataclasses import replace

import pytest

from prefopt.data.records import Message
from prefopt.data.sources import load_preferences
from prefopt.errors import InputError
from tests.preference_rows import A, U, pair, said

DISAGREES = "the scores of the responses say the other one is better; the label decides"
OTHERWISE = "the other verdict beside the one that is read names the other response"

# name: (rows, the pairs with ties="soft", what else is dropped, notes, columns= that says the same,
# what turns a row into the same comparison with its sides exchanged)
SETS = {}


def exchange(*two, **verdicts):
    """A function that exchanges columns two by two, and turns the verdicts with functions."""

    def turn(row):
        out = dict(row)
        for a, b in zip(two[::2], two[1::2], strict=True):
            out[a], out[b] = row[b], row[a]
        return out | {key: function(row[key]) for key, function in verdicts.items()}

    return turn


def other_index(value):
    return 1 - value if type(value) is int and value in (0, 1) else value


def negated(value):
    return -value if isinstance(value, int | float) else value


def shp(n, a, b, labels, scores=(10, 5), ratio=2.0):
    return {
        "post_id": f"p{n}",
        "domain": "askbaking_train",
        "upvote_ratio": 0.98,
        "history": f"q{n}",
        "c_root_id_A": "a",
        "c_root_id_B": "b",
        "score_A": scores[0],
        "score_B": scores[1],
        "human_ref_A": a,
        "human_ref_B": b,
        "labels": labels,
        "seconds_difference": 60.0,
        "score_ratio": ratio,
    }


SETS["shp"] = (
    [
        shp(1, "GOOD &amp; more", "BAD", 1),  # 1 is A
        shp(2, "BAD", "GOOD", 0, (4, 12), 3.0),
        shp(3, "GOOD", "BAD", 1, (3, 9)),  # the scores say otherwise
        shp(4, "BAD", "GOOD", 0, (-2, 0), None),  # SHP-2: no ratio of such scores
        shp(5, "GOOD", "BAD", 2),
        shp(6, "GOOD", "BAD", None),
        shp(7, "same", "same", 1),
    ],
    [
        pair("q1", "GOOD &amp; more", "BAD", 2.0),
        pair("q2", "GOOD", "BAD", 3.0),
        pair("q3", "GOOD", "BAD", 2.0),
        pair("q4", "GOOD", "BAD"),
    ],
    {"the label is 2, not 0 or 1": 1, "'labels' is null": 1, "identical": 1},
    [f"{DISAGREES}: 1"],
    {
        **{"prompt": "history", "response_a": "human_ref_A", "response_b": "human_ref_B"},
        **{"labels": "labels", "margin": "score_ratio"},
    },
    exchange("human_ref_A", "human_ref_B", "score_A", "score_B", labels=other_index),
)


def webgpt(n, first, second, scores):
    return {
        "question": {"dataset": "triviaqa", "id": str(n), "full_text": f"q{n}?"},
        "quotes_0": {"title": ["t"], "extract": ["e"]} if n % 2 else None,
        "answer_0": first,
        "tokens_0": {"prefix": [1], "completion": [2]},
        "score_0": scores[0],
        "quotes_1": None,
        "answer_1": second,
        "tokens_1": {"prefix": [1], "completion": [2]},
        "score_1": scores[1],
    }


SETS["webgpt"] = (
    [
        webgpt(1, "GOOD [1].", "BAD", (0.75, -0.75)),
        webgpt(2, "BAD", "GOOD [1, 2]", (-1.0, 1.0)),
        webgpt(3, "one", "other", (0.0, 0.0)),
        webgpt(4, "GOOD", "", (0.5, -0.5)),
        webgpt(5, None, "BAD", (0.5, -0.5)),
        webgpt(6, "GOOD", "BAD", (None, -0.5)),
        {**webgpt(7, "GOOD", "BAD", (0.5, -0.5)), "question": {"dataset": "x"}},
    ],
    [
        pair("q1?", "GOOD [1].", "BAD", 1.5),
        pair("q2?", "GOOD [1, 2]", "BAD", 2.0),
        pair("q3?", "one", "other", 0.0, 0.5),
        pair("q4?", "GOOD", "", 1.0),
    ],
    {
        "'answer_0' is null": 1,
        "'score_0' is null": 1,
        "the prompt is NoneType, not text or messages": 1,
    },
    ["kept although one response is empty: 1"],
    {
        **{"prompt": "question", "response_a": "answer_0", "response_b": "answer_1"},
        **{"score_a": "score_0", "score_b": "score_1"},
    },
    exchange("answer_0", "answer_1", "score_0", "score_1"),
)


def summary(n, texts, choice, **info):
    about = {"id": f"t{n}", "post": f"post {n}", "title": "a title", "subreddit": "tifu"}
    return {
        "info": about | {"site": None, "article": None} | info,
        "summaries": [{"text": t, "policy": "sup4", "note": None} for t in texts],
        "choice": choice,
        "worker": "w",
        "batch": "batch3",
        "split": "train",
        "extra": {"confidence": None},
    }


POST = "SUBREDDIT: r/tifu\n\nTITLE: a title\n\nPOST: post {}\n\nTL;DR:"
ARTICLE = {"post": None, "title": None, "subreddit": None, "article": "An article."}
SETS["summarize_from_feedback"] = (
    [
        summary(1, [" GOOD", " BAD"], 0),
        summary(2, [" BAD", "  GOOD"], 1),  # one leading space goes, another stays
        summary(1, [" BAD", " GOOD"], 0) | {"summaries": [{"text": "GOOD"}, {"text": "BAD"}]},
        summary(4, [" BAD", " GOOD"], 1, **ARTICLE),
        summary(5, [" GOOD", " BAD"], 0, post=None),
        summary(6, [" GOOD", " BAD"], 2),
        summary(7, [" GOOD", None], 0),
        summary(8, [" GOOD"], 0),
        summary(9, [" GOOD", " BAD"], 0) | {"info": None},
    ],
    [
        pair(POST.format(1), "GOOD", "BAD"),
        pair(POST.format(2), " GOOD", "BAD"),
        pair(POST.format(1), "GOOD", "BAD"),
        pair("Article:\nAn article.\n\nTL;DR:", "GOOD", "BAD"),
    ],
    {
        "'info' holds neither a post nor an article": 1,
        "the choice is 2, not 0 or 1": 1,
        "a summary has no text": 1,
        "'summaries' is no list of two": 1,
        "'info' is null": 1,
    },
    [],
    {"info": "info", "summaries": "summaries", "choice": "choice"},
    lambda row: {
        **row,
        "summaries": row["summaries"][::-1],
        "choice": other_index(row["choice"]),
    },
)


def helpsteer2(n, first, second, strength, prompt=None):
    return {
        "split": "train",
        "prompt": f"q{n}" if prompt is None else prompt,
        "response_1": first,
        "response_2": second,
        "preference_strength": strength,
        "preference_statement": "Response 1 is better",
        "preference_elaboration": "because",
    }


TURNS = "a\n\n<extra_id_1>Assistant\nb\n\nc\n\n<extra_id_1>User\nd\n"
SETS["helpsteer2"] = (
    [
        helpsteer2(1, "GOOD", "BAD", -3),  # below 0: the first
        helpsteer2(2, "BAD", "GOOD", 1),
        helpsteer2(3, "one", "other", 0),
        helpsteer2(4, "BAD", "GOOD", 2, TURNS),
        helpsteer2(5, "GOOD", "BAD", -1, "what is <extra_id_1> in T5?"),
        helpsteer2(6, "GOOD", "BAD", float("nan")),
    ],
    [
        pair("q1", "GOOD", "BAD", 3.0),
        pair("q2", "GOOD", "BAD", 1.0),
        pair("q3", "one", "other", 0.0, 0.5),
        pair([U("a"), A("b\n\nc"), U("d\n")], "GOOD", "BAD", 2.0),
        pair("what is <extra_id_1> in T5?", "GOOD", "BAD", 1.0),
    ],
    {"the strength of the preference is nan, not a number": 1},
    [],
    {
        **{"prompt": "prompt", "response_a": "response_1", "response_b": "response_2"},
        "strength": "preference_strength",
    },
    exchange("response_1", "response_2", preference_strength=negated),
)


def helpsteer3(first, second, overall, *context):
    return {
        "domain": "general",
        "language": "english",
        "context": said(*context),
        "response1": first,
        "response2": second,
        "overall_preference": overall,
        "individual_preference": [{"score": overall, "reasoning": "r", "feedback1": "f"}],
    }


SETS["helpsteer3"] = (
    [
        helpsteer3("GOOD", "BAD", -2, "U:q"),
        helpsteer3("BAD", "GOOD", 3, "S:s", "U:a", "A:b", "U:c"),
        helpsteer3("one", "other", 0, "U:q"),
        helpsteer3("GOOD", "BAD", -1, "U:q", "A:b"),
        helpsteer3("GOOD", "BAD", None, "U:q"),
        helpsteer3("GOOD", "BAD", -1),
    ],
    [
        pair("q", "GOOD", "BAD", 2.0),
        pair([Message("system", "s"), U("a"), A("b"), U("c")], "GOOD", "BAD", 3.0),
        pair("q", "one", "other", 0.0, 0.5),
    ],
    {
        "the prompt ends with an assistant turn": 1,
        "'overall_preference' is null": 1,
        "no prompt": 1,
    },
    [],
    {
        **{"prompt": "context", "response_a": "response1", "response_b": "response2"},
        "strength": "overall_preference",
    },
    exchange("response1", "response2", overall_preference=negated),
)


def safe(n, first, second, better, safer):
    return {
        "prompt": f"q{n}",
        "response_0": first,
        "response_1": second,
        "prompt_source": "x",
        "is_response_0_safe": safer == 0,
        "is_response_1_safe": safer == 1,
        "response_0_severity_level": 1,
        "response_1_severity_level": 0,
        "better_response_id": better,
        "safer_response_id": safer,
    }


SAFE = [
    safe(1, "GOOD", "BAD", 0, 0),
    safe(2, "BAD", "GOOD", 1, 1),
    safe(3, "GOOD", "BAD", 0, 1),  # the better one is not the safer one
    safe(4, "GOOD", "BAD", -1, 0),
    safe(5, "same", "same", 1, 1),
    safe(6, "BAD", "GOOD", 1, None),
]
SETS["pku-saferlhf"] = (
    SAFE,
    [pair(f"q{n}", "GOOD", "BAD") for n in (1, 2, 3, 6)],
    {"the choice is -1, not 0 or 1": 1, "identical": 1},
    [f"{OTHERWISE}: 1"],
    {
        **{"prompt": "prompt", "response_a": "response_0", "response_b": "response_1"},
        "choice": "better_response_id",
    },
    exchange(
        "response_0", "response_1", better_response_id=other_index, safer_response_id=other_index
    ),
)


def arena(first, second, winner, **more):
    return {
        "question_id": "x",
        "model_a": "m1",
        "model_b": "m2",
        "winner": winner,
        "judge": "j",
        "conversation_a": said(*first),
        "conversation_b": said(*second),
        "turn": 1,
        "language": "English",
    } | more


def other_model(value):
    return {"model_a": "model_b", "model_b": "model_a"}.get(value, value)


SETS["chatbot_arena"] = (
    [
        arena(["U:q", "A:GOOD"], ["U:q", "A:BAD"], "model_a"),
        arena(["U:q", "A:BAD"], ["U:q", "A:GOOD"], "model_b"),
        arena(["U:q", "A:one"], ["U:q", "A:other"], "tie"),
        arena(["U:q", "A:one"], ["U:q", "A:other"], "tie (bothbad)"),
        # They part in the first turn: only the turns of the user are the same.
        arena(
            ["U:q", "A:BAD 1", "U:r", "A:BAD 2"], ["U:q", "A:GOOD 1", "U:r", "A:GOOD 2"], "model_b"
        ),
        arena(["U:q", "A:GOOD"], ["U:r", "A:BAD"], "model_a"),
        arena(["U:q", "A:GOOD", "U:r"], ["U:q", "A:BAD", "U:r"], "model_a"),
        arena(["U:q", "A:GOOD"], ["U:q", "A:BAD"], "model_c"),
        arena(["U:q", "A:GOOD"], ["U:q", "A:BAD"], None),
    ],
    [
        pair("q", "GOOD", "BAD"),
        pair("q", "GOOD", "BAD"),
        pair("q", "one", "other", preference=0.5),
        pair("q", "one", "other", preference=0.5),
        pair("q", [A("GOOD 1"), U("r"), A("GOOD 2")], [A("BAD 1"), U("r"), A("BAD 2")]),
    ],
    {
        "contexts differ": 1,
        "no assistant turn": 1,
        "the winner is 'model_c', not a, b or tie": 1,
        "'winner' is null": 1,
    },
    [],
    {"response_a": "conversation_a", "response_b": "conversation_b", "winner": "winner"},
    exchange("conversation_a", "conversation_b", winner=other_model),
)


def parts(turns):
    """lmarena-ai/arena-human-preference-100k and -140k: the content is a list of parts."""
    return [
        {**turn, "content": [{"type": "text", "text": turn["content"], "image": None}]}
        for turn in said(*turns)
    ]


def arena_parts(first, second, winner):
    about = {"conversation_a": parts(first), "conversation_b": parts(second)}
    return arena([], [], winner, **about)


PICTURE = {"type": "image", "text": None, "image": "x.png"}
SETS["lmarena"] = (
    [
        arena_parts(["U:q", "A:GOOD"], ["U:q", "A:BAD"], "model_a"),
        arena_parts(["U:q", "A:BAD"], ["U:q", "A:GOOD"], "model_b"),
        arena_parts(["U:q", "A:one"], ["U:q", "A:other"], "both_bad"),
        arena_parts(["U:q", "A:one"], ["U:q", "A:other"], "tie"),
        arena_parts(["U:q", "A:x", "U:r", "A:BAD"], ["U:q", "A:x", "U:r", "A:GOOD"], "model_b"),
        arena(
            [],
            [],
            "model_a",
            conversation_a=[{"role": "user", "content": [PICTURE]}, *parts(["A:GOOD"])],
            conversation_b=[{"role": "user", "content": [PICTURE]}, *parts(["A:BAD"])],
        ),
    ],
    [
        pair("q", "GOOD", "BAD"),
        pair("q", "GOOD", "BAD"),
        pair("q", "one", "other", preference=0.5),
        pair("q", "one", "other", preference=0.5),
        pair([U("q"), A("x"), U("r")], "GOOD", "BAD"),
    ],
    {"a message has parts that are not text": 1},
    [],
    {"response_a": "conversation_a", "response_b": "conversation_b", "winner": "winner"},
    exchange("conversation_a", "conversation_b", winner=other_model),
)


def kaggle(prompt, first, second, flags):
    texts = (x if isinstance(x, str) else json.dumps(x) for x in (prompt, first, second))
    return {
        "id": 1,
        "model_a": "m1",
        "model_b": "m2",
        **dict(zip(("prompt", "response_a", "response_b"), texts, strict=True)),
        **dict(zip(("winner_model_a", "winner_model_b", "winner_tie"), flags, strict=True)),
    }


SETS["kaggle-55k"] = (
    [
        kaggle(["q"], ["GOOD"], ["BAD"], (1, 0, 0)),
        kaggle(["q"], ["BAD"], ['"GOOD"\n'], (0, 1, 0)),
        kaggle(["q"], ["one"], ["other"], (0, 0, 1)),
        kaggle(["q", "r"], ["BAD 1", "BAD 2"], ["GOOD 1", "GOOD 2"], (0, 1, 0)),
        kaggle(["q"], [None], ["GOOD"], (0, 1, 0)),
        kaggle(["q", "r"], ["GOOD"], ["BAD", "BAD"], (1, 0, 0)),
        kaggle(["q"], [], ["BAD"], (1, 0, 0)),
        kaggle(["q"], ["GOOD"], ["BAD"], (0, 0, 0)),
        kaggle(["q"], ["GOOD"], ["BAD"], (1, 1, 0)),
        kaggle(["q"], '["GOOD]', ["BAD"], (1, 0, 0)),
        kaggle(["q"], ["GOOD"], ["BAD"], (1, 0, 5)),
    ],
    [
        pair("q", "GOOD", "BAD"),
        pair("q", '"GOOD"\n', "BAD"),
        pair("q", "one", "other", preference=0.5),
        pair("q", [A("GOOD 1"), U("r"), A("GOOD 2")], [A("BAD 1"), U("r"), A("BAD 2")]),
    ],
    {
        "a turn is null": 1,
        "not as many answers as prompts": 2,
        "not exactly one winner column is 1": 2,
        "the turns are no lists of texts in JSON": 1,
        "a winner column is not 0 or 1": 1,
    },
    [],
    {
        **{"prompt": "prompt", "response_a": "response_a", "response_b": "response_b"},
        **{"winner_a": "winner_model_a", "winner_b": "winner_model_b"},
    },
    exchange("response_a", "response_b", "winner_model_a", "winner_model_b"),
)

LETTERS = {"a": "b", "A": "B", "b": "a", "B": "A"}
SETS["plain winner"] = (
    [
        {"instruction": "q", "input": "", "answer_a": "GOOD", "answer_b": "BAD", "winner": "A"},
        {"instruction": "q", "input": "x", "answer_a": "BAD", "answer_b": "GOOD", "winner": "b"},
        {"instruction": "q", "input": "", "answer_a": "one", "answer_b": "other", "winner": "Tie"},
        {"instruction": "q", "input": "", "answer_a": ["x"], "answer_b": "BAD", "winner": "a"},
        {"instruction": 3, "input": "", "answer_a": "GOOD", "answer_b": "BAD", "winner": "a"},
    ],
    [
        pair("q", "GOOD", "BAD"),
        pair("q\n\nx", "GOOD", "BAD"),
        pair("q", "one", "other", preference=0.5),
    ],
    {
        "a message is str, not an object": 1,
        "the prompt is int, not text or messages": 1,
    },
    [],
    {"prompt": "instruction", "input": "input", "winner": "winner"},
    exchange("answer_a", "answer_b", winner=lambda value: LETTERS.get(value, value)),
)


def loaded(rows, **kwargs):
    pairs = load_preferences(rows, **kwargs)
    report = pairs.report
    assert report.rows == len(rows) == report.kept + sum(report.dropped.values())
    return list(pairs), report.dropped, report.notes


@pytest.mark.parametrize("name", SETS)
def test_every_set_gives_exactly_these_pairs(name):
    rows, pairs, dropped, notes, _, _ = SETS[name]
    assert len(rows) >= 5
    assert loaded(rows, ties="soft") == (pairs, dropped, notes)
    for one in pairs:
        texts = ["".join(m.content for m in side) for side in (one.chosen, one.rejected)]
        if one.preference == 1:
            assert "GOOD" in texts[0] and ("BAD" in texts[1] or texts[1] == "")
        assert "BAD" not in texts[0] and "GOOD" not in texts[1]


@pytest.mark.parametrize("name", SETS)
def test_ties_are_dropped_or_the_first_counts_as_chosen(name):
    rows, pairs, dropped, _, _, _ = SETS[name]
    ties = sum(pair.preference == 0.5 for pair in pairs)
    certain = [pair for pair in pairs if pair.preference == 1]
    assert loaded(rows)[:2] == (certain, dropped | ({"tie": ties} if ties else {}))
    every = [replace(pair, preference=1.0) for pair in pairs]
    assert loaded(rows, ties="keep")[:2] == (every, dropped)


@pytest.mark.parametrize("name", SETS)
def test_columns_that_say_the_same_change_nothing(name):
    rows, pairs, dropped, notes, columns, _ = SETS[name]
    assert loaded(rows, ties="soft", columns=columns) == (pairs, dropped, notes)


@pytest.mark.parametrize("name", SETS)
def test_exchanged_sides_give_the_same_pairs(name):
    rows, pairs, dropped, notes, _, turned = SETS[name]
    found, found_dropped, found_notes = loaded([turned(row) for row in rows], ties="soft")
    mirrored = [
        replace(p, chosen=p.rejected, rejected=p.chosen) if p.preference == 0.5 else p
        for p in pairs
    ]
    assert found == mirrored and found_notes == notes
    assert sum(found_dropped.values()) == sum(dropped.values())


TABLES = ["shp", "webgpt", "helpsteer2", "helpsteer3", "chatbot_arena", "lmarena", "kaggle-55k"]


@pytest.mark.parametrize("name", TABLES)
def test_rows_through_json_lines_parquet_and_datasets(name, tmp_path):
    import datasets

    rows, pairs, dropped, notes, _, _ = SETS[name]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(tmp_path / "a.parquet")
    for source in (tmp_path / "a.jsonl", tmp_path / "a.parquet", data):
        found = load_preferences(source, ties="soft")
        assert (list(found), found.report.dropped) == (pairs, dropped)
        assert found.report.notes == notes


@pytest.mark.parametrize("name", ["shp", "helpsteer2", "pku-saferlhf", "kaggle-55k"])
def test_flat_rows_through_csv(name, tmp_path):
    """Every cell is text there, and a null is an empty one."""
    rows, pairs, dropped, notes, _, _ = SETS[name]
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    found = load_preferences(tmp_path / "a.csv", ties="soft")
    assert list(found) == pairs and found.report.notes == notes
    assert sum(found.report.dropped.values()) == sum(dropped.values())


# --- verdicts ----------------------------------------------------------------------------------


def row(verdict, first="GOOD", second="BAD"):
    return {"prompt": "q", "response_a": first, "response_b": second, **verdict}


@pytest.mark.parametrize("winner", ["a", "A", " a ", "model_a", "response_a", "Model A", "first"])
def test_words_for_the_first(winner):
    assert load_preferences([row({"winner": winner})])[0] == pair("q", "GOOD", "BAD")
    second = winner.replace("a", "b").replace("A", "B").replace("first", "second")
    turned = [row({"winner": second}, "BAD", "GOOD")]
    assert load_preferences(turned)[0] == pair("q", "GOOD", "BAD")


@pytest.mark.parametrize("names", [("output_1", "output_2"), ("response_A", "response_B")])
def test_other_names_and_a_choice_in_words(names):
    rows = [{"query": "q", names[0]: "BAD", names[1]: "GOOD", "choice": "B"}]
    assert load_preferences(rows)[0] == pair("q", "GOOD", "BAD")


@pytest.mark.parametrize("winner", ["tie", "Tie", "tie (bothbad)", "both_bad", "draw"])
def test_words_for_a_tie(winner):
    (found,) = load_preferences([row({"preference": winner})], ties="soft")
    assert found == pair("q", "GOOD", "BAD", preference=0.5)


def test_the_winner_by_the_name_of_its_column_or_model():
    by_column = {"prompt": "q", "response_1": "BAD", "response_2": "GOOD", "winner": "response_2"}
    assert load_preferences([by_column])[0] == pair("q", "GOOD", "BAD")
    by_column = {"prompt": "q", "response_0": "BAD", "response_1": "GOOD", "winner": "response_1"}
    assert load_preferences([by_column])[0] == pair("q", "GOOD", "BAD")
    by_column = {"prompt": "q", "response_1": "GOOD", "response_2": "BAD", "winner": "response_1"}
    assert load_preferences([by_column])[0] == pair("q", "GOOD", "BAD")
    models = json.loads('{"model_a": "m1", "model_b": "m2", "winner": "m2"}')
    assert load_preferences([row(models, "BAD", "GOOD")])[0] == pair("q", "GOOD", "BAD")
    itself = {"model_a": "m1", "model_b": "m1", "winner": "m1"}
    with pytest.raises(InputError, match="the winner is 'm1'"):
        load_preferences([row(itself)])


@pytest.mark.parametrize("column", ["winner", "preference", "label"])
@pytest.mark.parametrize("values", [(0, 1), (1, 2), (-1, 1), ("0", "1"), (1.0, 0.0), (True, False)])
def test_a_bare_number_may_mean_anything_and_is_refused(column, values):
    rows = [row({column: value}) for value in values]
    with pytest.raises(InputError) as error:
        load_preferences(rows)
    for word in (f"columns={{'choice': {column!r}}}", f"columns={{'strength': {column!r}}}"):
        assert word in str(error.value) and "\n" not in str(error.value)


def test_columns_say_what_a_number_means():
    rows = [row({"preference": 0}), row({"preference": 1}, "BAD", "GOOD")]
    expected = [pair("q", "GOOD", "BAD")] * 2
    assert list(load_preferences(rows, columns={"choice": "preference"})) == expected
    rows = [row({"preference": -1}), row({"preference": 1}, "BAD", "GOOD")]
    expected = [pair("q", "GOOD", "BAD", 1.0)] * 2
    assert list(load_preferences(rows, columns={"strength": "preference"})) == expected
    rows = [row({"label": 1}), row({"label": 0}, "BAD", "GOOD")]
    expected = [pair("q", "GOOD", "BAD")] * 2
    assert list(load_preferences(rows, columns={"labels": "label"})) == expected


def test_labels_are_trusted_only_where_they_are_known():
    rows = [row({"labels": 1}), row({"labels": 0}, "BAD", "GOOD")]
    with pytest.raises(InputError, match=r"columns=\{'labels': 'labels'\} if 1 is the first"):
        load_preferences(rows)
    expected = [pair("q", "GOOD", "BAD")] * 2
    assert list(load_preferences(rows, columns={"labels": "labels"})) == expected
    turned = [pair("q", "BAD", "GOOD")] * 2
    assert list(load_preferences(rows, columns={"choice": "labels"})) == turned


def test_the_safer_response_where_that_is_asked_for():
    found, dropped, notes = loaded(SAFE, columns={"choice": "safer_response_id"})
    texts = [(p.chosen[0].content, p.rejected[0].content) for p in found]
    assert texts == [("GOOD", "BAD"), ("GOOD", "BAD"), ("BAD", "GOOD"), ("GOOD", "BAD")]
    assert dropped == {"identical": 1, "'safer_response_id' is null": 1}
    assert notes == [f"{OTHERWISE}: 1"]


def test_an_index_from_1_is_never_taken_for_one_from_0():
    rows = [row({"choice": 1}), row({"choice": 2}, "BAD", "GOOD")] * 3
    with pytest.raises(InputError, match="1 or 2, never 0"):
        load_preferences(rows)
    numbered = [{"prompt": "q", "response_1": "GOOD", "response_2": "BAD", "choice": 1}]
    with pytest.raises(InputError, match="called 1 and 2, and so may be the better one"):
        load_preferences(numbered)
    with pytest.raises(InputError, match="1 or 2, never 0"):
        load_preferences([*numbered, {**numbered[0], "choice": 2}], columns={"choice": "choice"})
    first = [{**numbered[0], "choice": 0}]
    assert load_preferences(first, columns={"choice": "choice"})[0].chosen == [A("GOOD")]


def test_a_scale_without_a_middle_is_refused():
    rows = [row({"preference_strength": 1 + n % 7}) for n in range(20)]
    with pytest.raises(InputError, match="subtract its middle"):
        load_preferences(rows)
    found = load_preferences(rows, columns={"strength": "preference_strength"})
    assert len(found) == 20 and found[0].chosen == [A("BAD")]


def test_two_verdicts_are_refused_until_one_is_hidden():
    rows = [row({"winner": "a", "choice": 1})]
    with pytest.raises(InputError, match=r"two ways .*columns=\{'winner': None\}"):
        load_preferences(rows)
    assert load_preferences(rows, columns={"winner": None})[0].chosen == [A("BAD")]
    assert load_preferences(rows, columns={"winner": "winner"})[0].chosen == [A("GOOD")]


def test_scores_count_only_without_a_verdict():
    scores = {"score_a": 1, "score_b": 3}
    assert load_preferences([row(scores)])[0] == pair("q", "BAD", "GOOD", 2.0)
    assert load_preferences([row({**scores, "winner": "a"})])[0] == pair("q", "GOOD", "BAD")


def test_two_responses_without_a_verdict_say_what_is_missing():
    with pytest.raises(InputError) as error:
        load_preferences([row({"quality": "a"})])
    for word in ("'response_a' and 'response_b'", "no column says", "columns={'winner': ...}"):
        assert word in str(error.value)
    assert load_preferences([row({"quality": "a"})], columns={"winner": "quality"})[0].chosen


def test_flags_may_be_booleans_or_text_and_the_tie_may_be_missing():
    for yes, no in ((True, False), ("True", "False"), ("1", "0"), (1.0, 0.0)):
        rows = [row({"winner_a": no, "winner_b": yes}, "BAD", "GOOD")]
        assert load_preferences(rows)[0] == pair("q", "GOOD", "BAD")


def test_texts_that_look_like_json_stay_texts():
    rows = [
        {**row({"winner": "a"}), "prompt": '["sort", "this"]'},
        {**row({"winner": "a"}, '["GOOD"]', "BAD"), "prompt": "[1, 2]"},
        {**row({"winner": "a"}, "[1] GOOD", "[2]"), "prompt": "[0]"},
    ]
    found = load_preferences(rows)
    assert [p.prompt[0].content for p in found] == ['["sort", "this"]', "[1, 2]", "[0]"]
    assert [p.chosen[0].content for p in found] == ["GOOD", '["GOOD"]', "[1] GOOD"]


def test_lists_of_turns_without_json():
    rows = [
        {
            "prompt": ["q", "r"],
            "response_a": ["x", "GOOD"],
            "response_b": ["x", "BAD"],
            "winner": "a",
        }
    ]
    assert load_preferences(rows)[0] == pair([U("q"), A("x"), U("r")], "GOOD", "BAD")


def test_a_system_column_stands_before_turns_and_texts():
    for prompt, first, second in (("q", "GOOD", "BAD"), ('["q"]', '["GOOD"]', '["BAD"]')):
        rows = [{**row({"winner": "a", "system": "s"}, first, second), "prompt": prompt}]
        assert load_preferences(rows)[0] == pair([Message("system", "s"), U("q")], "GOOD", "BAD")


def test_an_input_belongs_to_an_instruction_only():
    rows = [row({"winner": "a", "input": "x"})]
    assert load_preferences(rows)[0].prompt == [U("q")]
    rows = [{"instruction": "q", "input": "x", "winner": "a"}]
    rows[0] |= {"answer_a": "GOOD", "answer_b": "BAD"}
    assert load_preferences(rows)[0].prompt == [U("q\n\nx")]
    assert load_preferences(rows, columns={"input": None})[0].prompt == [U("q")]


def test_the_usual_filter_of_shp_is_a_gap_of_two():
    rows = [shp(n, "GOOD", "BAD", 1, ratio=ratio) for n, ratio in enumerate((1.5, 2.0, 3.0))]
    found = load_preferences(rows, min_gap=2, max_pairs=5)
    assert [p.margin for p in found] == [2.0, 3.0]
    assert found.report.dropped == {"gap below min_gap": 1}


def test_the_report_says_who_answers_and_what_the_verdict_means():
    reason = load_preferences(SETS["shp"][0]).report.reason
    for word in (
        *("'prompt' from 'history'", "'response_a' from 'human_ref_A'", "of the first 7 rows"),
        "'labels' 1 says the first, 0 the second",
    ):
        assert word in reason


def test_chosen_and_rejected_beside_a_verdict_are_refused():
    rows = [{**row({"winner": "b"}), "chosen": "x", "rejected": "y"}]
    with pytest.raises(InputError) as error:
        load_preferences(rows)
    for word in ("'chosen'/'rejected'", "'response_a'/'response_b'/'winner'"):
        assert word in str(error.value)
    hidden = load_preferences(rows, columns={"chosen": None})
    assert hidden[0] == pair("q", "BAD", "GOOD")
    named = load_preferences(rows, columns={"chosen": "chosen", "rejected": "rejected"})
    assert named[0] == pair("q", "x", "y")
