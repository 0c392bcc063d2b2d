"""Messages, transcripts, tools and two conversations side by side; and rows of garbage."""

import datetime
import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.data.conversations import (
    compare,
    opened,
    part,
    read_extra_id,
    read_post,
    read_prompt,
    read_response,
    read_transcript,
)
from prefopt.data.messages import message_json, read_calls, read_messages, read_tools
from prefopt.data.records import SPOKEN, Message
from prefopt.data.sources import load_preferences
from tests.preference_rows import A, U
from tests.test_choice_schemas import SETS as CHOICES
from tests.test_pair_schemas import SETS as PAIRS

# --- messages ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message, expected",
    [
        ({"role": "user", "content": " x\n"}, [U(" x\n")]),
        ({"content": "x", "role": "assistant"}, [A("x")]),
        ({"role": "User", "content": "x", "name": "me"}, [U("x")]),
        ({"from": "human", "value": "x", "weight": None}, [U("x")]),
        ({"from": "gpt", "value": ""}, [A("")]),
        ({"from": "prompter", "value": "x"}, [U("x")]),
        ({"role": None, "content": None, "from": "bot", "value": "x"}, [A("x")]),
        ({"role": "developer", "content": "x"}, [Message("developer", "x")]),
        ({"role": "ipython", "content": "x"}, [Message("tool", "x")]),
        ({"role": "function", "name": "f", "content": "x"}, [Message("tool", "x")]),
        ({"from": "observation", "value": "x"}, [Message("tool", "x")]),
        ({"role": "tool", "content": {"a": "é"}}, [Message("tool", '{"a": "é"}')]),
        ({"role": "user", "content": [{"type": "text", "text": "x"}, "y"]}, [U("xy")]),
        ({"role": "user", "content": [{"text": "x", "type": None}]}, [U("x")]),
        ({"role": "user", "content": []}, [U("")]),
        ({"role": "assistant", "content": "x", "tool_calls": []}, [A("x")]),
        ({"role": "assistant", "content": "x", "tool_calls": None}, [A("x")]),
        ({"role": "user", "content": [{"type": "image"}]}, "a message has parts that are not text"),
        (
            {"role": "user", "content": [{"type": "image", "text": "x"}]},
            "a message has parts that are not text",
        ),
        ({"role": "user", "content": None}, "a message's content is NoneType, not text"),
        ({"role": "user", "content": 3}, "a message's content is int, not text"),
        ({"role": "narrator", "content": "x"}, "unknown role 'narrator'"),
        ({"role": 3, "content": "x"}, "unknown role int"),
        ({"role": "user"}, "a message lacks 'role' or 'content'"),
        ({"content": "x"}, "a message lacks 'role' or 'content'"),
        ("x", "a message is str, not an object"),
        (None, "a message is NoneType, not an object"),
    ],
)
def test_one_message(message, expected):
    assert read_messages([message], "user") == expected
    assert isinstance(expected, str) or isinstance(expected[0], Message)


def test_text_is_one_message_and_anything_else_none():
    assert read_messages("x", "assistant") == [A("x")]
    assert read_messages((), "user") == []
    for value in (3, None, b"x", {1}):
        assert str(read_messages(value, "user")).startswith("a conversation is ")


CALLS = [
    {"name": "f", "arguments": {"a": 1}},
    {"function": {"name": "f", "arguments": {"a": 1}}, "type": "function"},
    {"function": {"name": "f", "arguments": '{"a": 1}'}},
    {"name": "f", "parameters": {"a": 1}},
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("wrap", [list, lambda calls: calls[0], json.dumps])
def test_calls_in_every_form_read_the_same(call, wrap):
    expected = [Message("tool_calls", '[{"name": "f", "arguments": {"a": 1}}]')]
    assert read_calls(wrap([call])) == expected
    assert read_calls(expected[0].content) == expected  # what is written is read back
    message = {"role": "assistant", "content": None, "tool_calls": wrap([call])}
    assert read_messages([message], "user") == expected
    assert read_messages([{**message, "content": "text"}], "user") == [A("text"), *expected]
    shared = {"from": "function_call", "value": json.dumps(call)}
    assert read_messages([shared], "user") == expected
    written = {"role": "tool_calls", "content": expected[0].content}
    assert read_messages([written], "user") == expected


def test_an_old_function_call_and_no_arguments():
    message = {"role": "assistant", "content": None, "function_call": CALLS[0]}
    assert read_messages([message], "user") == read_calls(CALLS[0])
    for arguments in (None, "", " ", {}, "{}"):
        assert read_calls([{"name": "f", "arguments": arguments}]) == [
            Message("tool_calls", '[{"name": "f", "arguments": {}}]')
        ]


@pytest.mark.parametrize(
    "value, reason",
    [
        ("no JSON", "tool calls that are no list of objects"),
        (3, "tool calls that are no list of objects"),
        ([3], "a tool call without a name"),
        ([{"arguments": {}}], "a tool call without a name"),
        ([{"name": "f", "arguments": "[1]"}], "a tool call's arguments are not an object"),
        ([{"name": "f", "arguments": "{"}], "a tool call's arguments are not an object"),
        ([{"name": "f", "arguments": {"a": b"x"}}], "tool calls that are no JSON"),
        ([{"name": "f", "arguments": {"a": float("nan")}}], "tool calls that are no JSON"),
    ],
)
def test_calls_that_cannot_be_read(value, reason):
    assert read_calls(value) == reason


def test_tools():
    tools = [{"name": "f", "parameters": {"é": 1}}]
    turn = [Message("tools", '[{"name": "f", "parameters": {"é": 1}}]')]
    for value in (tools, tools[0], json.dumps(tools), [json.dumps(tools[0])], tuple(tools)):
        assert read_tools(value) == turn
    assert read_tools(turn[0].content) == turn
    for value in (None, "", [], "[]", "null"):
        assert read_tools(value) == []
    for value in ("x", 3, [3], ["x"], [b"x"], [{"a": b"x"}]):
        assert read_tools(value) == "the tools are no list of functions"


def test_what_opens_a_prompt_comes_in_one_order():
    head = [Message("tools", '[{"name": "f"}]'), Message("system", "s")]
    assert opened([U("q")], "s", [{"name": "f"}]) == [*head, U("q")]
    assert opened([*head, U("q")], "other", [{"name": "g"}]) == [*head, U("q")]
    assert opened([head[0], U("q")], "s") == [*head, U("q")]
    developer = [Message("developer", "d"), U("q")]
    assert opened(developer, "s") == developer
    assert opened([U("q")], "", None) == opened([U("q")], None, []) == [U("q")]
    assert opened([]) == "no prompt"
    for last in SPOKEN:
        assert opened([U("q"), Message(last, "x")]) == "the prompt ends with an assistant turn"


def test_lists_of_messages_as_json_text():
    turns = [{"role": "user", "content": "q"}]
    assert message_json(json.dumps(turns)) == turns
    assert message_json(json.dumps(turns, indent=1)) == turns
    for text in ("[]", "[1]", "[{}]", '[{"a": 1}]', '[{"role": 1}', "q", "", "[{" * 100_000):
        assert message_json(text) == text
    assert message_json(turns) is turns


# --- prompts -----------------------------------------------------------------------------------


TURNS = st.lists(
    st.text(alphabet="ab\n <>_:HumanAst", max_size=12).filter(lambda t: "\n\n" not in t),
    min_size=1,
    max_size=6,
)


@settings(max_examples=200, deadline=None)
@given(TURNS)
def test_turns_between_markers_are_read_back(texts):
    texts = [text.strip("\n") for text in texts]
    roles = [("user", "Assistant"), ("assistant", "User")]
    turns = [Message(roles[i % 2][0], text) for i, text in enumerate(texts)]
    for gap in ("\n", "\n\n"):
        whole = texts[0] + "".join(
            f"{gap}<extra_id_1>{roles[(i - 1) % 2][1]}\n{text}" for i, text in enumerate(texts) if i
        )
        assert read_extra_id(whole) == (turns if len(texts) > 1 else None)
    transcript = "".join(
        f"\n\n{'Human' if i % 2 == 0 else 'Assistant'}: {text}" for i, text in enumerate(texts)
    )
    assert read_transcript(transcript) == turns


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "what is <extra_id_1> in T5?",
        "a<extra_id_1>User\nb",  # two turns of one speaker
        "a<extra_id_1>Robot\nb",
        "a<extra_id_1>Assistant",
        "a<extra_id_1>Assistant\nb<extra_id_1>Assistant\nc",
    ],
)
def test_other_texts_with_the_marker_stay_texts(text):
    assert read_extra_id(text) is None
    prompt = read_prompt(text)
    assert not isinstance(prompt, str) and prompt[0] == [U(text)]


def test_prompts_of_every_form():
    def turns(value, **kwargs):
        read = read_prompt(value, **kwargs)
        return read if isinstance(read, str) else read[0]

    assert turns("q", system="s") == [Message("system", "s"), U("q")]
    assert turns({"full_text": "q", "dataset": "x"}) == turns([{"role": "user", "content": "q"}])
    assert turns({"messages": [{"role": "user", "content": "q"}]}) == [U("q")]
    assert turns("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:") == [
        *(U("a"), A("b"), U("c"))
    ]
    assert turns({}) == turns(None) == "the prompt is NoneType, not text or messages"
    assert turns([]) == "no prompt"
    assert turns(3) == "the prompt is int, not text or messages"


def test_responses_of_every_form():
    def answer(text):
        return [A(text)]

    for value in ("x", {"text": "x"}, {"role": "assistant", "content": "x"}, ["x"][0]):
        assert read_response(value, answer) == [A("x")]
    assert read_response({"from": "gpt", "value": "x"}, answer) == [A("x")]
    assert read_response([{"role": "user", "content": "x"}], answer) == "no assistant turn"
    assert read_response({}, answer) == "a response is NoneType, not text or messages"
    assert read_response(3, answer) == "a response is int, not text or messages"


def test_what_asks_for_a_summary():
    post = {"post": "p", "title": "t", "subreddit": "s", "article": None}
    assert read_post(post) == "SUBREDDIT: r/s\n\nTITLE: t\n\nPOST: p\n\nTL;DR:"
    assert read_post({**post, "title": None}) == "SUBREDDIT: r/s\n\nPOST: p\n\nTL;DR:"
    assert read_post({"post": None, "article": "a"}) == "Article:\na\n\nTL;DR:"
    for nothing in (None, {}, {"post": " "}, {"post": 3, "article": ""}, "post"):
        assert read_post(nothing) is None


# --- two conversations -------------------------------------------------------------------------

SIDE = st.lists(
    st.builds(Message, st.sampled_from(["user", "assistant", "tool", "tool_calls"]), st.just("x")),
    max_size=5,
).map(lambda turns: [*turns, A("end")])


def parted(one, other):
    """By trying every place: the last one where both only share turns and both sides then let the
    model speak, behind a turn that is not the model's (or at the start)."""
    for n in reversed(range(min(len(one), len(other)))):
        if one[:n] != other[:n] or (n and one[n - 1].role in SPOKEN):
            continue
        users = [[m for m in side[n:] if m.role == "user"] for side in (one, other)]
        spoken = one[n].role in SPOKEN and other[n].role in SPOKEN
        return one[:n] if spoken and users[0] == users[1] else None
    return None


@settings(max_examples=500, deadline=None)
@given(SIDE, SIDE, SIDE)
def test_two_conversations_part_where_the_model_speaks_differently(shared, one, other):
    a, b = shared[:-1] + one, shared[:-1] + other
    assert part(a, b) == part(b, a) == parted(a, b)


def test_an_early_difference_keeps_the_rest_whole():
    def said(*texts):
        return [
            {"role": "user" if i % 2 == 0 else "assistant", "content": text}
            for i, text in enumerate(texts)
        ]

    sides = compare(None, said("q", "GOOD", "r", "s"), said("q", "BAD", "r", "t"))
    assert sides == ([U("q")], [A("GOOD"), U("r"), A("s")], [A("BAD"), U("r"), A("t")])
    assert compare(None, said("q", "a", "r", "s"), said("q", "b", "x", "t")) == "contexts differ"
    assert compare("q", "GOOD", said("q", "BAD")[1:]) == ([U("q")], [A("GOOD")], [A("BAD")])


# --- garbage -----------------------------------------------------------------------------------


def nested(make, depth=3000):
    value = make("x")
    for _ in range(depth):
        value = make(value)
    return value


class Odd:
    """Equal to everything, and without a hash."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other):
        return True


DEEP = nested(lambda value: [value])
GARBAGE = [
    *(None, True, 0, -1, 2, 3.5, float("nan"), float("inf"), 10**400, "", " ", "1", "\ud800"),
    *("[" * 100_000, '["' + "[" * 100_000 + '"]', "[{" * 50_000, "[null]", "9" * 5000, "x" * 10**5),
    *([], {}, [None], [[]], [DEEP], DEEP, nested(lambda value: {"role": value})),
    *({"role": DEEP, "content": DEEP}, {"full_text": DEEP}, {"messages": {}, "tools": DEEP}),
    [{"role": "user", "content": DEEP}],
    [{"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": DEEP}]}],
    [{"from": "function_call", "value": "[" * 5000}],
    [{"role": "tool", "content": {"a": {1, 2}}}],
    [{"role": [], "content": [{"type": [], "text": "x"}]}],
    *(b"x", (1, 2), {1, 2}, range(3), object(), Odd(), np.array([1, 2]), np.float32(2)),
    datetime.date(2026, 1, 1),
]


@pytest.mark.parametrize("name", [*PAIRS, *CHOICES])
def test_garbage_in_any_column_is_counted_and_harms_no_other_row(name):
    rows, pairs, dropped = ({**PAIRS, **CHOICES})[name][:3]
    repeats = 1 + 64 // len(rows)  # the rows that decide how all are read
    bad = [{**row, key: value} for row in rows[:1] for key in row for value in GARBAGE]
    found = load_preferences(rows * repeats + bad, ties="soft")
    report = found.report
    assert found[: len(pairs) * repeats] == pairs * repeats
    assert report.rows == len(rows) * repeats + len(bad)
    assert report.rows == report.kept + sum(report.dropped.values())
    assert all(report.dropped[reason] >= count for reason, count in dropped.items())
    json.dumps(report.to_dict()).encode()
    assert max(map(len, report.lines())) < 1000


@pytest.mark.parametrize("name", [*PAIRS, *CHOICES])
def test_garbage_in_a_message_is_counted(name):
    rows = ({**PAIRS, **CHOICES})[name][0]
    lists = [(key, v) for key, v in rows[0].items() if isinstance(v, list) and len(v) > 1]
    if not lists or not isinstance(lists[0][1][0], dict):
        return
    repeats = 1 + 64 // len(rows)
    bad = [
        {**rows[0], key: [*value[:at], {**value[at], part: junk}, *value[at + 1 :]]}
        for key, value in lists
        for at in range(len(value))
        for part in ("role", "content", "tool_calls")
        for junk in GARBAGE
    ]
    report = load_preferences(rows * repeats + bad, ties="soft").report
    assert report.rows == report.kept + sum(report.dropped.values())


def test_a_very_long_text_takes_no_time():
    long = "[{ \n\nHuman: word <extra_id_1> " * 300_000  # 9 MB
    rows = [{"prompt": "q", "chosen": long, "rejected": "BAD"}]
    rows += [{"prompt": long, "chosen": "GOOD", "rejected": "BAD"}]
    began = time.process_time()
    assert load_preferences(rows)[0].chosen == [A(long)]
    choice = [{"prompt": long, "answer_a": long, "answer_b": "x", "winner": long}] * 2
    choice += [{"prompt": long, "answer_a": "GOOD", "answer_b": "BAD", "winner": "a"}] * 2
    assert load_preferences(choice).report.dropped == {"the winner is a long text": 2}
    assert time.process_time() - began < 5
