"""Rows that name the chosen response: every such data set by name, with its traps.

The rows are written by hand after each data set's columns. What is to be chosen says GOOD, what is
to be rejected BAD, so that an inverted label cannot pass.
"""

import json
from dataclasses import replace

import pytest

from prefopt.data.records import Message
from prefopt.data.sources import load_preferences
from prefopt.errors import InputError
from tests.preference_rows import A, S, U, pair, said


def shared(*turns):
    roles = {"U": "human", "A": "gpt", "S": "system"}
    return [{"from": roles[who], "value": text} for who, text in (t.split(":", 1) for t in turns)]


OTHERWISE = "kept as the columns name them although the scores say the other response is better"
NO_PROBABILITY = "'preference' is not the chosen response's probability, 0.5 to 1, and is not read"

# name: (rows, the pairs with ties="soft", what else is dropped, notes, columns= that says the same)
SETS = {}

SETS["hh-rlhf"] = (
    [
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: engines?\n\nAssistant: DuckDuck GOOD",
            "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: engines?\n\nAssistant: Duck BAD",
        },
        {
            "chosen": "\n\nHuman: say 'Human: x'\n\nAssistant: ",
            "rejected": "\n\nHuman: say 'Human: x'\n\nAssistant: BAD  two  spaces",
        },
        {  # the contexts differ
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: GOOD",
            "rejected": "\n\nHuman: a\n\nAssistant: x\n\nHuman: c\n\nAssistant: BAD",
        },
        {  # two turns of one speaker: the second marker is text
            "chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: GOOD",
            "rejected": "\n\nHuman: a\n\nHuman: b\n\nAssistant: BAD",
        },
        {
            "chosen": "\n\nHuman: a\n\nAssistant: same",
            "rejected": "\n\nHuman: a\n\nAssistant: same",
        },
        {
            "chosen": "\n\nHuman: a\n\nAssistant: GOOD\n\nHuman: bye",
            "rejected": "\n\nHuman: a\n\nAssistant: BAD",
        },
    ],
    [
        pair([U("a"), A("b"), U("engines?")], "DuckDuck GOOD", "Duck BAD"),
        pair("say 'Human: x'", "", "BAD  two  spaces"),
        pair("a\n\nHuman: b", "GOOD", "BAD"),
    ],
    {"contexts differ": 1, "identical": 1, "the transcript ends with a human turn": 1},
    ["kept although one response is empty: 1"],
    {"chosen": "chosen", "rejected": "rejected"},
)


def cleaned(n, chosen, rejected, ratings, prompt=None):
    """argilla/ultrafeedback-binarized-preferences-cleaned: names with hyphens."""
    return {
        "source": "evol_instruct",
        "prompt": f"q{n}" if prompt is None else prompt,
        "chosen": said(f"U:q{n}", f"A:{chosen}"),
        "chosen-rating": ratings[0],
        "chosen-model": "gpt-4",
        "rejected": said(f"U:q{n}", f"A:{rejected}"),
        "rejected-rating": ratings[1],
        "rejected-model": "alpaca-7b",
    }


SETS["ultrafeedback-cleaned"] = (
    [
        cleaned(1, "GOOD &amp; <b>", "BAD", (5.0, 3.5)),
        cleaned(2, "one", "other", (4.0, 4.0)),
        cleaned(3, "GOOD", "BAD", (2.0, 4.5)),  # the ratings say otherwise, the names decide
        cleaned(4, "GOOD", "", (5.0, None)),
        cleaned(5, "same", "same", (4.0, 3.0)),
        cleaned(6, "GOOD", "BAD", (4.0, 3.0), prompt="another question"),
    ],
    [
        pair("q1", "GOOD &amp; <b>", "BAD", 1.5, source="evol_instruct"),
        pair("q2", "one", "other", 0.0, preference=0.5, source="evol_instruct"),
        pair("q3", "GOOD", "BAD", -2.5, source="evol_instruct"),
        pair("q4", "GOOD", "", None, source="evol_instruct"),
    ],
    {"identical": 1, "the prompt column is not in the conversation": 1},
    [f"{OTHERWISE}: 1", "kept although one response is empty: 1"],
    {
        **{"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "source": "source"},
        **{"chosen_score": "chosen-rating", "rejected_score": "rejected-rating"},
    },
)


def flat(n, chosen, rejected, ratings):
    """argilla/ultrafeedback-binarized-preferences: the same data, flat and with other names."""
    return {
        "source": "sharegpt",
        "instruction": f"q{n}",
        "chosen_response": chosen,
        "rejected_response": rejected,
        "chosen_avg_rating": ratings[0],
        "rejected_avg_rating": ratings[1],
        "chosen_model": "bard",
    }


SETS["ultrafeedback-flat"] = (
    [
        flat(1, " GOOD\n", "BAD", (4.75, 2.25)),
        flat(2, "one", "other", (3.0, 3.0)),
        flat(3, None, "BAD", (3.0, 1.0)),
        flat(4, "GOOD", "BAD", ("5", "4")),
        flat(5, "GOOD", "BAD", ("N/A", "4")),
    ],
    [
        pair("q1", " GOOD\n", "BAD", 2.5, source="sharegpt"),
        pair("q2", "one", "other", 0.0, preference=0.5, source="sharegpt"),
        pair("q4", "GOOD", "BAD", 1.0, source="sharegpt"),
        pair("q5", "GOOD", "BAD", None, source="sharegpt"),
    ],
    {"'chosen_response' is null": 1},
    [],
    {
        **{"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
        **{"chosen_score": "chosen_avg_rating", "rejected_score": "rejected_avg_rating"},
    },
)


def h4(n, chosen, rejected, scores, prompt=True, turns=()):
    """HuggingFaceH4/ultrafeedback_binarized; without `prompt` trl-lib's."""
    own = {"prompt": f"q{n}", "prompt_id": f"{n:x}", "messages": said(f"U:q{n}", "A:GOOD")}
    return (own if prompt else {}) | {
        "chosen": said(*turns, f"U:q{n}", f"A:{chosen}"),
        "rejected": said(*turns, f"U:q{n}", f"A:{rejected}"),
        "score_chosen": scores[0],
        "score_rejected": scores[1],
    }


H4 = [
    (1, "GOOD", "BAD", (8.5, 7.0)),
    (2, "one", "other", (7.5, 7.5)),
    (3, "", "BAD", (6.0, 1.0)),
    (4, "GOOD", "BAD", (10.0, 3.0)),
    (5, "same", "same", (10.0, 9.0)),
]
H4_PAIRS = [
    pair("q1", "GOOD", "BAD", 1.5),
    pair("q2", "one", "other", 0.0, preference=0.5),
    pair("q3", "", "BAD", 5.0),
    pair("q4", "GOOD", "BAD", 7.0),
]
BINARIZED = {
    **{"chosen": "chosen", "rejected": "rejected"},
    **{"chosen_score": "score_chosen", "rejected_score": "score_rejected"},
}
EMPTY = ["kept although one response is empty: 1"]
SETS["ultrafeedback-h4"] = ([h4(*x) for x in H4], H4_PAIRS, {"identical": 1}, EMPTY, BINARIZED)
SETS["ultrafeedback-trl"] = (
    [h4(*x, prompt=False) for x in H4],
    H4_PAIRS,
    {"identical": 1},
    EMPTY,
    BINARIZED,
)


def distilabel(n, chosen, rejected, status, rating, score, system=""):
    """argilla/distilabel-intel-orca-dpo-pairs: `generations` stands in the order before labelling,
    and of the ratings only the chosen response's own is named."""
    return {
        "system": system,
        "input": f"q{n}",
        "chosen": chosen,
        "rejected": rejected,
        "generations": [rejected, chosen],
        "order": ["rejected", "chosen"],
        "labelling_model": "gpt-4-1106-preview",
        "rating": rating,
        "rationale": None if rating is None else "because",
        "status": status,
        "original_chosen": rejected if status == "swapped" else chosen,
        "original_rejected": chosen if status == "swapped" else rejected,
        "chosen_score": score,
        "in_gsm8k_train": False,
    }


SETS["distilabel-orca"] = (
    [
        distilabel(1, "GOOD", "BAD", "unchanged", [9.0, 7.0], 9.0, "Be brief."),
        distilabel(2, "GOOD", "BAD", "swapped", [6.0, 9.0], 9.0),
        distilabel(3, "one", "other", "tie", [8.0, 8.0], 8.0),
        distilabel(4, "GOOD", "BAD", "unchanged", None, None),
        distilabel(5, "same", "same", "unchanged", [9.0, 7.0], 9.0),
        distilabel(6, "one", "other", "tie", None, None),
    ],
    [
        pair([S("Be brief."), U("q1")], "GOOD", "BAD", 2.0),
        pair("q2", "GOOD", "BAD", 3.0),
        pair("q3", "one", "other", 0.0, preference=0.5),
        pair("q4", "GOOD", "BAD"),
        pair("q6", "one", "other", preference=0.5),
    ],
    {"identical": 1},
    [],
    {"prompt": "input", "chosen": "chosen", "rejected": "rejected", "system": "system"},
)

SETS["intel-orca"] = (
    [
        {"system": "", "question": "q1", "chosen": "GOOD", "rejected": "BAD"},
        {"system": "You are an AI.", "question": "q2", "chosen": "GOOD", "rejected": " BAD"},
        {"system": None, "question": "q3\n", "chosen": "GOOD", "rejected": "BAD"},
        {"system": "", "question": None, "chosen": "GOOD", "rejected": "BAD"},
        {"system": "", "question": "[1, 2]", "chosen": "[2] GOOD", "rejected": "[1] BAD"},
    ],
    [
        pair("q1", "GOOD", "BAD"),
        pair([S("You are an AI."), U("q2")], "GOOD", " BAD"),
        pair("q3\n", "GOOD", "BAD"),
        pair("[1, 2]", "[2] GOOD", "[1] BAD"),
    ],
    {"'question' is null": 1},
    [],
    {"prompt": "question", "chosen": "chosen", "rejected": "rejected", "system": "system"},
)


def mix(chosen, rejected, ratings, **more):
    """argilla/dpo-mix-7k and distilabel-capybara-dpo-7k."""
    row = {"chosen": chosen, "rejected": rejected}
    return row | dict(zip(("chosen_rating", "rejected_rating"), ratings, strict=True)) | more


SETS["dpo-mix"] = (
    [
        mix(
            said("U:a", "A:b", "U:c", "A:GOOD"),
            said("U:a", "A:b", "U:c", "A:BAD"),
            (5.0, 2.0),
        ),
        mix(said("S:sys", "U:a", "A:GOOD"), said("S:sys", "U:a", "A:BAD"), (4, 3)),
        mix(said("S:sys", "U:a", "A:GOOD"), said("S:other", "U:a", "A:BAD"), (4, 3)),
        mix(said("U:a", "A:one"), said("U:a", "A:other"), (4.0, 4.0)),
        # They part in the first reply: kept whole.
        mix(
            said("U:a", "A:GOOD 1", "U:b", "A:GOOD 2"),
            said("U:a", "A:BAD 1", "U:b", "A:BAD 2"),
            (5.0, 1.0),
        ),
        mix(
            said("U:a", "A:GOOD 1", "U:b", "A:GOOD 2"),
            said("U:a", "A:BAD 1", "U:x", "A:BAD 2"),
            (5.0, 1.0),
        ),
    ],
    [
        pair([U("a"), A("b"), U("c")], "GOOD", "BAD", 3.0),
        pair([S("sys"), U("a")], "GOOD", "BAD", 1.0),
        pair("a", "one", "other", 0.0, preference=0.5),
        pair("a", [A("GOOD 1"), U("b"), A("GOOD 2")], [A("BAD 1"), U("b"), A("BAD 2")], 4.0),
    ],
    {"contexts differ": 2},
    [],
    {"chosen_score": "chosen_rating", "rejected_score": "rejected_rating"},
)

SETS["skywork"] = (
    [
        {
            "chosen": said("U:q", "A:GOOD"),
            "rejected": said("U:q", "A:BAD"),
            "source": "magpie_ultra",
        },
        {"chosen": said("U:q", "A:GOOD"), "rejected": said("U:q", "A:BAD"), "source": None},
        {"chosen": said("U:q", "A:GOOD"), "rejected": said("U:other", "A:BAD"), "source": "w"},
        {"chosen": [], "rejected": said("U:q", "A:BAD"), "source": "w"},
        {"chosen": said("U:q", "A:x", "U:y"), "rejected": said("U:q", "A:BAD"), "source": "w"},
    ],
    [pair("q", "GOOD", "BAD", None, source="magpie_ultra"), pair("q", "GOOD", "BAD")],
    {"contexts differ": 1, "no assistant turn": 2},
    [],
    {"chosen": "chosen", "rejected": "rejected"},
)

SETS["stack-exchange-paired"] = (
    [
        {"qid": 1, "question": "<p>q1</p>", "response_j": "<b>GOOD</b>", "response_k": "BAD"},
        {"qid": 2, "question": "q2", "response_j": "GOOD", "response_k": ""},
        {"qid": 3, "question": "q3", "response_j": "same", "response_k": "same"},
        {"qid": 4, "question": "q4", "response_j": 4, "response_k": "BAD"},
        {"qid": 5, "question": "", "response_j": "GOOD", "response_k": "BAD"},
    ],
    [
        pair("<p>q1</p>", "<b>GOOD</b>", "BAD"),
        pair("q2", "GOOD", ""),
        pair("", "GOOD", "BAD"),
    ],
    {"identical": 1, "'chosen' is int, not text": 1},
    EMPTY,
    {"prompt": "question", "chosen": "response_j", "rejected": "response_k"},
)


def tulu(n, chosen, rejected, ratings=(None, None), prompt=None):
    return {
        "id": str(n),
        "source": "tulu",
        "prompt": prompt or f"q{n}",
        "chosen": chosen,
        "rejected": rejected,
        "chosen_rating": ratings[0],
        "rejected_rating": ratings[1],
        "chosen_model": "m",
        "rejected_model": "m",
    }


SETS["tulu-3"] = (
    [
        tulu(1, said("U:q1", "A:GOOD"), said("U:q1", "A:BAD"), (5.0, 3.0)),
        tulu(2, said("U:q2", "A:x", "U:y", "A:GOOD"), said("U:q2", "A:x", "U:y", "A:BAD")),
        tulu(3, said("U:q3", "A:GOOD"), said("U:q4", "A:BAD"), (5.0, 3.0)),
        tulu(4, said("U:q4", "A:GOOD"), said("U:q4", "A:BAD"), (float("nan"), 3.0)),
        tulu(5, said("U:q5", "A:GOOD"), said("S:s", "U:q5", "A:BAD")),
    ],
    [
        pair("q1", "GOOD", "BAD", 2.0, source="tulu"),
        pair([U("q2"), A("x"), U("y")], "GOOD", "BAD", None, source="tulu"),
        pair("q4", "GOOD", "BAD", None, source="tulu"),
    ],
    {"contexts differ": 2},
    [],
    {"chosen": "chosen", "rejected": "rejected"},
)

# LLaMA-Factory's ranking form: from/value, and each answer one object.
SETS["sharegpt-ranking"] = (
    [
        {
            "conversations": shared("S:sys", "U:a", "A:b", "U:c"),
            "chosen": shared("A:GOOD")[0],
            "rejected": shared("A:BAD")[0],
        },
        {
            "conversations": shared("U:a"),
            "chosen": {"from": "assistant", "value": "GOOD"},
            "rejected": {"from": "chatgpt", "value": "BAD"},
        },
        {
            "conversations": shared("U:a"),
            "chosen": {"from": "robot", "value": "GOOD"},
            "rejected": {"from": "gpt", "value": "BAD"},
        },
        {
            "conversations": shared("U:a"),
            "chosen": {"from": "gpt"},
            "rejected": {"from": "gpt", "value": "BAD"},
        },
        {
            "conversations": shared("U:a", "A:b"),
            "chosen": {"from": "gpt", "value": "GOOD"},
            "rejected": {"from": "gpt", "value": "BAD"},
        },
    ],
    [pair([S("sys"), U("a"), A("b"), U("c")], "GOOD", "BAD"), pair("a", "GOOD", "BAD")],
    {
        "unknown role 'robot'": 1,
        "a message lacks 'role' or 'content'": 1,
        "the prompt ends with an assistant turn": 1,
    },
    [],
    {"prompt": "conversations"},
)

CALL = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"q": "x"}'}}
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {}}}]


def openai(n, *turns, tools=None, good="GOOD", bad="BAD"):
    """OpenAI's form for preferences."""
    return {
        "input": {"messages": said(*turns, f"U:q{n}"), "tools": tools or []},
        "preferred_output": [{"role": "assistant", "content": good}],
        "non_preferred_output": [{"role": "assistant", "content": bad}],
    }


SETS["openai"] = (
    [
        openai(1),
        openai(2, "S:sys", "U:a", "A:b"),
        openai(3, tools=TOOLS),
        openai(4, good=[{"type": "text", "text": "GO"}, {"type": "text", "text": "OD"}]),
        openai(5, bad=[{"type": "image_url", "image_url": {"url": "x"}}]),
        openai(6, good=None),
    ],
    [
        pair("q1", "GOOD", "BAD"),
        pair([S("sys"), U("a"), A("b"), U("q2")], "GOOD", "BAD"),
        pair([Message("tools", json.dumps(TOOLS)), U("q3")], "GOOD", "BAD"),
        pair("q4", "GOOD", "BAD"),
    ],
    {
        "a message has parts that are not text": 1,
        "a message's content is NoneType, not text": 1,
    },
    [],
    {"prompt": "input", "chosen": "preferred_output", "rejected": "non_preferred_output"},
)

TOOL = {"role": "tool", "content": "found it", "tool_call_id": "c1"}
ASKS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
SHARED_CALL = {"from": "function_call", "value": '{"name": "find", "arguments": {"q": "x"}}'}
READ = '[{"name": "find", "arguments": {"q": "x"}, "id": "c1"}]'
READ_SHARED = '[{"name": "find", "arguments": {"q": "x"}}]'
HEAD = [Message("tools", json.dumps(TOOLS)), S("sys"), U("q")]
SETS["tools"] = (
    [
        {  # the calls are shared, the answer behind the result differs
            "tools": TOOLS,
            "chosen": [*said("S:sys", "U:q"), ASKS, TOOL, *said("A:GOOD")],
            "rejected": [*said("S:sys", "U:q"), ASKS, TOOL, *said("A:BAD")],
        },
        {  # the one calls, the other makes something up
            "tools": json.dumps(TOOLS),
            "chosen": [*said("S:sys", "U:q"), ASKS, TOOL, *said("A:GOOD")],
            "rejected": said("S:sys", "U:q", "A:BAD"),
        },
        {
            "tools": None,
            "chosen": [
                *shared("U:q"),
                SHARED_CALL,
                {"from": "observation", "value": "r"},
                *shared("A:GOOD"),
            ],
            "rejected": [
                *shared("U:q"),
                SHARED_CALL,
                {"from": "observation", "value": "r"},
                *shared("A:BAD"),
            ],
        },
        {  # text and a call in one turn
            "tools": "",
            "chosen": [*said("U:q"), {**ASKS, "content": "GOOD"}],
            "rejected": said("U:q", "A:BAD"),
        },
        {
            "tools": TOOLS,
            "chosen": [
                *said("U:q"),
                {**ASKS, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            ],
            "rejected": said("U:q", "A:BAD"),
        },
        {
            "tools": "no JSON",
            "chosen": said("U:q", "A:GOOD"),
            "rejected": said("U:q", "A:BAD"),
        },
    ],
    [
        pair([*HEAD, Message("tool_calls", READ), Message("tool", "found it")], "GOOD", "BAD"),
        pair(
            HEAD,
            [Message("tool_calls", READ), Message("tool", "found it"), A("GOOD")],
            "BAD",
        ),
        pair([U("q"), Message("tool_calls", READ_SHARED), Message("tool", "r")], "GOOD", "BAD"),
        pair("q", [A("GOOD"), Message("tool_calls", READ)], "BAD"),
    ],
    {
        "a tool call's arguments are not an object": 1,
        "the tools are no list of functions": 1,
    },
    [],
    {"tools": "tools"},
)

# Message lists as JSON text, as they come out of a CSV file.
SETS["json-text"] = (
    [
        {
            "prompt": "q",
            "chosen": json.dumps(said("U:q", "A:GOOD")),
            "rejected": json.dumps(said("U:q", "A:BAD")),
            "margin": "1.5",
        },
        {
            "prompt": json.dumps(said("S:s", "U:q")),
            "chosen": json.dumps(said("A:GOOD")),
            "rejected": json.dumps(shared("A:BAD")),
            "margin": "",
        },
        {
            "prompt": "q",
            "chosen": json.dumps(said("U:q", "A:GOOD"))[:-1],
            "rejected": json.dumps(said("U:q", "A:BAD")),
            "margin": "1",
        },
        {
            "prompt": "q",
            "chosen": json.dumps(said("U:q", "A:barely GOOD")),
            "rejected": json.dumps(said("U:q", "A:BAD")),
            "margin": "0",
        },
        {
            "prompt": "q",
            "chosen": json.dumps(said("U:q", "A:same")),
            "rejected": json.dumps(said("U:q", "A:same")),
            "margin": "0.5",
        },
    ],
    [
        pair("q", "GOOD", "BAD", 1.5),
        pair([S("s"), U("q")], "GOOD", "BAD"),
        pair("q", "barely GOOD", "BAD", 0.0),
    ],
    {"identical": 1, "'chosen' is not JSON text of messages": 1},
    [],
    {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "margin": "margin"},
)

# Alpaca's instruction with an input below it.
SETS["alpaca"] = (
    [
        {"instruction": "Add.", "input": "1 and 2", "chosen": "3 GOOD", "rejected": "4 BAD"},
        {"instruction": "Sing.", "input": "", "chosen": "GOOD", "rejected": "BAD"},
        {"instruction": "Sing.", "input": None, "chosen": "GOOD", "rejected": "BAD"},
        {"instruction": "Sing.", "input": " \n", "chosen": "GOOD", "rejected": "BAD"},
        {"instruction": None, "input": "x", "chosen": "GOOD", "rejected": "BAD"},
    ],
    [pair("Add.\n\n1 and 2", "3 GOOD", "4 BAD"), *[pair("Sing.", "GOOD", "BAD")] * 3],
    {"'instruction' is null": 1},
    [],
    {"prompt": "instruction", "input": "input"},
)


def loaded(rows, **kwargs):
    pairs = load_preferences(rows, **kwargs)
    report = pairs.report
    assert report.rows == len(rows) == report.kept + sum(report.dropped.values())
    return list(pairs), report.dropped, report.notes


@pytest.mark.parametrize("name", SETS)
def test_every_set_gives_exactly_these_pairs(name):
    rows, pairs, dropped, notes, _ = SETS[name]
    assert len(rows) >= 5
    assert loaded(rows, ties="soft") == (pairs, dropped, notes)
    for one in pairs:
        texts = [[m.content for m in side] for side in (one.chosen, one.rejected)]
        if one.preference == 1:
            assert any("GOOD" in text for text in texts[0]) or texts == [[""], texts[1]]
            assert any("BAD" in text for text in texts[1]) or texts == [texts[0], [""]]
        assert "BAD" not in "".join(texts[0]) and "GOOD" not in "".join(texts[1])


@pytest.mark.parametrize("name", SETS)
def test_ties_are_dropped_or_the_first_counts_as_chosen(name):
    rows, pairs, dropped, _, _ = SETS[name]
    ties = sum(pair.preference == 0.5 for pair in pairs)
    certain = [pair for pair in pairs if pair.preference == 1]
    assert loaded(rows)[:2] == (certain, dropped | ({"tie": ties} if ties else {}))
    every = [replace(pair, preference=1.0) for pair in pairs]
    assert loaded(rows, ties="keep")[:2] == (every, dropped)


@pytest.mark.parametrize("name", SETS)
def test_columns_that_say_the_same_change_nothing(name):
    rows, pairs, dropped, notes, columns = SETS[name]
    assert loaded(rows, ties="soft", columns=columns) == (pairs, dropped, notes)


@pytest.mark.parametrize("name", SETS)
def test_the_names_of_columns_decide_and_not_their_order(name):
    rows, pairs, dropped, notes, _ = SETS[name]
    reversed_rows = [dict(reversed(row.items())) for row in rows]
    assert loaded(reversed_rows, ties="soft") == (pairs, dropped, notes)
    # With the names of the two sides exchanged, chosen and rejected are exchanged.
    row = rows[0]
    sides = [
        next(n for n in names if n in row)
        for names in (
            ("chosen", "chosen_response", "response_j", "preferred_output"),
            ("rejected", "rejected_response", "response_k", "non_preferred_output"),
        )
    ]
    exchanged = [{**row, sides[0]: row[sides[1]], sides[1]: row[sides[0]]} for row in rows]
    found = load_preferences(exchanged, ties="soft")
    mirrored = [(p.prompt, p.rejected, p.chosen) for p in pairs]
    assert [(p.prompt, p.chosen, p.rejected) for p in found] == mirrored


@pytest.mark.parametrize("name", ["stack-exchange-paired", "json-text", "ultrafeedback-flat"])
def test_flat_rows_through_csv(name, tmp_path):
    import csv

    rows, _, _, _, _ = SETS[name]
    rows = [row for row in rows if all(isinstance(v, str | int | float) for v in row.values())]
    rows = [row for row in rows if row.get("response_j") != 4]  # is text in a CSV file
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert list(load_preferences(tmp_path / "a.csv", ties="soft")) == loaded(rows, ties="soft")[0]


# A column of one type, as tables have them, holds no row of another.
TABLES = ["ultrafeedback-cleaned", "ultrafeedback-h4", "distilabel-orca", "skywork", "tulu-3"]


@pytest.mark.parametrize("name", TABLES)
def test_rows_through_json_lines_parquet_and_datasets(name, tmp_path):
    import datasets

    rows, pairs, dropped, notes, _ = SETS[name]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(tmp_path / "a.parquet")
    for source in (tmp_path / "a.jsonl", tmp_path / "a.parquet", data):
        found = load_preferences(source, ties="soft")
        assert (list(found), found.report.dropped) == (pairs, dropped)
        assert found.report.notes == notes


def test_tools_through_parquet_with_every_key_in_every_message(tmp_path):
    """Tables give every object every key, null where it was not there."""
    import datasets

    rows, pairs, _, _, _ = SETS["tools"]
    rows = [rows[0], {**rows[1], "tools": TOOLS}]
    data = datasets.Dataset.from_list(rows)
    assert "tool_calls" in data[0]["chosen"][0]
    found = list(load_preferences(data))
    assert [one.chosen for one in found] == [one.chosen for one in pairs[:2]]
    assert [one.prompt[1:] for one in found] == [one.prompt[1:] for one in pairs[:2]]


def test_arrays_and_tuples_are_lists():
    import numpy as np

    rows, pairs, dropped, notes, _ = SETS["dpo-mix"]
    for kind in (tuple, lambda value: np.array(value, dtype=object)):
        other = [
            {
                **row,
                "chosen": kind(row["chosen"]),
                "chosen_rating": np.float64(row["chosen_rating"]),
            }
            for row in rows
        ]
        assert loaded(other, ties="soft") == (pairs, dropped, notes)
    flags = [{"prompt": "q", "chosen": "GOOD", "rejected": "BAD", "margin": np.int64(2)}]
    assert load_preferences(flags)[0].margin == 2.0


# --- columns -----------------------------------------------------------------------------------


def plain(**more):
    return {"chosen": "GOOD", "rejected": "BAD", **more}


def test_several_columns_that_may_be_the_prompt_are_refused():
    row = plain(question="q", context="c")
    with pytest.raises(InputError) as error:
        load_preferences([row])
    for word in ("'question' and 'context'", "columns={'prompt': 'question'} or columns="):
        assert word in str(error.value)
    assert load_preferences([row], columns={"prompt": "context"})[0].prompt == [U("c")]
    both = {"prompt": "question", "input": "context"}
    assert load_preferences([row], columns=both)[0].prompt == [U("q\n\nc")]
    assert load_preferences([plain(prompt="p", question="q")])[0].prompt == [U("p")]
    hidden = {"question": "q", "context": "c", "chosen": "GOOD", "rejected": "BAD"}
    with pytest.raises(InputError, match="'question'"):
        load_preferences([hidden], columns={"chosen": "chosen"})


def test_responses_that_go_by_other_names_go_together():
    row = {"prompt": "q", "chosen": "GOOD", "rejected_response": "BAD"}
    with pytest.raises(InputError, match="lack 'rejected'"):
        load_preferences([row])
    columns = {"rejected": "rejected_response"}
    assert load_preferences([row], columns=columns)[0] == pair("q", "GOOD", "BAD")
    row = {"prompt": "q", "chosen": "GOOD", "rejected": "BAD", "chosen_score": 5.0}
    row |= {"score_chosen": 3.0, "score_rejected": 1.0}  # the pair of names that is whole
    assert load_preferences([row])[0].margin == 2.0


def test_replies_that_quote_a_transcript_beside_a_prompt_stay_texts():
    good, bad = (f"so:\n\nHuman: x\n\nAssistant: {text}" for text in ("GOOD", "BAD"))
    found = load_preferences([{"prompt": "q", "chosen": good, "rejected": bad}])
    assert found.report.schema == "plain strings" and found[0] == pair("q", good, bad)


def test_scores_and_a_stated_preference():
    assert load_preferences([plain(prompt="q", margin=3, score_chosen=1)])[0].margin == 3.0
    certain = plain(prompt="q", preference=0.8, margin=-1)
    (found,) = load_preferences([certain])
    assert (found.preference, found.margin) == (0.8, -1.0)
    (tie,) = load_preferences([plain(prompt="q", preference=0.5)], ties="soft")
    assert tie.preference == 0.5 and tie.margin is None
    (small,) = load_preferences([plain(prompt="q", margin=0.0)])  # the name decides, only barely
    assert small.preference == 1.0 and small.margin == 0.0
    for index in (0, 0.2, -1, 7):  # of the better response, perhaps, or a sign
        read = load_preferences([plain(prompt="q", preference=index)])
        assert read[0].preference == 1.0 and read.report.notes == [f"{NO_PROBABILITY}: 1"]
    (named,) = load_preferences([plain(prompt="q", preference="chosen")])
    assert named.preference == 1.0


def test_a_list_of_ratings_counts_where_it_is_known_whose_they_are():
    def margin(**more):
        return load_preferences([plain(prompt="q", **more)], ties="soft")[0].margin

    assert margin(rating=[9, 4], chosen_score=9) == margin(rating=[4, 9], chosen_score=9) == 5.0
    assert margin(rating=[9, 4]) is None
    assert margin(rating=[9, 4], chosen_score=7) is None
    assert margin(rating=[4, 4]) == 0.0
    assert margin(rating="[4.0, 9.0]", chosen_score="9") == 5.0
    for rating in ([], [1], [1, 2, 3], [None, 2], "x", 3, {}, [[1], 2]):
        assert margin(rating=rating, chosen_score=2) is None


def test_min_gap_leaves_out_small_and_contrary_margins_only_where_it_is_asked_for():
    rows = [plain(prompt=f"q{margin}", margin=margin) for margin in (-1, 0.5, 2, None)]
    assert [p.margin for p in load_preferences(rows)] == [-1, 0.5, 2, None]
    found = load_preferences(rows, min_gap=1)
    assert [p.margin for p in found] == [2, None]
    assert found.report.dropped == {"gap below min_gap": 2}


def test_the_report_says_how_the_rows_are_read():
    rows = SETS["ultrafeedback-flat"][0]
    reason = load_preferences(rows).report.reason
    assert "'chosen' from 'chosen_response'" in reason and "'prompt' from 'instruction'" in reason
    assert "4 of the first 5 rows" in reason
