"""Sources to dialogues: what is imitated, what is dropped, what is said."""

import gzip
import json
from dataclasses import replace

import pytest

import prefopt.data.spool as spool_module
from prefopt.data.dialogues import load_dialogues
from prefopt.data.records import Dialogue, Message, Pair
from prefopt.data.sources import load_preferences
from prefopt.errors import InputError


def said(*contents, system=None, roles=("user", "assistant")):
    turns = [Message("system", system)] if system is not None else []
    return Dialogue([*turns, *(Message(roles[i % 2], c) for i, c in enumerate(contents))])


def roles(*contents, keys=("role", "content"), speakers=("user", "assistant")):
    return [{keys[0]: speakers[i % 2], keys[1]: text} for i, text in enumerate(contents)]


def sharegpt(*contents):
    return roles(*contents, keys=("from", "value"), speakers=("human", "gpt"))


def hh(*turns):
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


def one(row, **options):
    """The only dialogue of a one-row source, with nothing dropped."""
    dialogues = load_dialogues([row], **options)
    assert len(dialogues) == 1 and dialogues.report.dropped == {}
    return dialogues[0]


# --- schemas -----------------------------------------------------------------------------------

QA = said("q", "a")


@pytest.mark.parametrize(
    "row, schema, expected",
    [
        ({"messages": roles("q", "a", "r", "b"), "prompt": "q"}, "messages", said(*"qarb")),
        ({"messages": sharegpt("q", "a")}, "messages", QA),
        ({"conversations": sharegpt("q", "a")}, "conversations", QA),
        ({"conversations": roles("q", "a")}, "conversations", QA),
        ({"prompt": "q", "completion": "a"}, "prompt and completion", QA),
        ({"prompt": " q\n", "completion": " a "}, "prompt and completion", said(" q\n", " a ")),
        ({"prompt": "q", "response": "a"}, "prompt and response", QA),
        ({"prompt": roles("q", "a", "r"), "completion": "b"}, "prompt and completion",
         said(*"qarb")),
        ({"prompt": "q", "completion": roles("a", speakers=("assistant", "user"))},
         "prompt and completion", QA),
        ({"prompt": "\n\nHuman: q\n\nAssistant:", "completion": " a"}, "prompt and completion", QA),
        ({"prompt": "\n\nHuman: q\n\nAssistant: ", "completion": "a"}, "prompt and completion", QA),
        ({"prompt": hh("q", "a", "r") + "\n\nAssistant:", "response": " b"}, "prompt and response",
         said(*"qarb")),
        ({"prompt": hh("q"), "completion": "a"}, "prompt and completion", said(hh("q"), "a")),
        ({"prompt": hh("q", "a"), "completion": "b"}, "prompt and completion",
         said(hh("q", "a"), "b")),
        ({"prompt": "x\n\nAssistant:", "completion": "a"}, "prompt and completion",
         said("x\n\nAssistant:", "a")),
        ({"text": hh("only a question")}, "plain text", Dialogue([], hh("only a question"))),
        ({"instruction": "q", "input": "", "output": "a", "text": "Below is..."},
         "instruction and output", QA),
        ({"instruction": "q", "input": None, "output": "a"}, "instruction and output", QA),
        ({"instruction": "q", "input": "x y", "output": "a"}, "instruction and output",
         said("q\n\nx y", "a")),
        ({"instruction": "q", "response": "a"}, "instruction and response", QA),
        ({"text": "Once upon a time."}, "plain text", Dialogue([], "Once upon a time.")),
        ({"text": hh("q", "a", "r", "b")}, "transcripts", said(*"qarb")),
        ({"text": "x" + hh("q", "a")}, "plain text", Dialogue([], "x" + hh("q", "a"))),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference pairs, plain strings", QA),
        ({"chosen": hh("q", "a", "r", "b"), "rejected": hh("q", "a", "r", "c")},
         "preference pairs, transcripts", said(*"qarb")),
        ({"chosen": roles("q", "a"), "rejected": roles("q", "b")},
         "preference pairs, messages", QA),
    ],
)  # fmt: skip
def test_every_shape(row, schema, expected):
    dialogues = load_dialogues([row])
    if schema.startswith(("prompt and", "preference pairs")):  # all but the answer is given
        expected = replace(expected, context=len(expected.turns) - 1)
    assert list(dialogues) == [expected]
    assert dialogues.report.schema == schema and dialogues.report.rows == 1
    assert "imitated" in dialogues.report.reason or schema.startswith("instruction")
    with_more = one({**row, "system": "S", "source": "here", "id": 3})
    assert with_more.source == "here" and with_more.text == expected.text
    system = [Message("system", "S")] if expected.text is None else []
    assert with_more.turns == system + expected.turns


def test_roles_of_every_kind():
    names = ["system", "human", "gpt", "observation", "chatgpt", "prompter", "bot"]
    row = {"conversations": [{"from": name, "value": name} for name in names]}
    assert [turn.role for turn in one(row).turns] == [
        *("system", "user", "assistant", "tool", "assistant", "user", "assistant")
    ]
    both = {"role": "user", "from": "someone", "content": "q"}
    assert one({"messages": [both, *roles("a", speakers=("assistant",))]}) == QA
    own = one({**row, "system": "another"})  # a system turn of the conversation's own stays
    assert own.turns[0] == Message("system", "system") and len(own.turns) == 7


def test_drops_are_counted_with_their_first_position():
    rows = [
        {"messages": value}
        for value in [
            roles("q", "a"),
            roles("q"),
            [],
            roles("q", " \n"),
            roles("q", "", "r", "b"),
            [{"role": "robot", "content": "x"}],
            [{"role": ["user"], "content": "x"}],
            [{"from": "alien", "value": "x"}],
            [{"from": ["human"], "value": "x"}],
            [{"role": "user"}],
            roles("q", None),
            sharegpt("q", None),
            "text",
            None,
            roles("q", "\ud83d"),
            [{"role": "assistant", "content": "a"}],
            roles("q", "a", "r"),
        ]
    ] + [{"id": 1}]
    dialogues = load_dialogues(rows)
    assert list(dialogues) == [said("q", "a"), said("q", "a", "r")]
    report = dialogues.report
    assert report.dropped == {
        "no assistant turn": 2,
        "an assistant turn is empty": 2,
        "unknown role 'robot'": 1,
        "unknown role list": 2,
        "unknown role 'alien'": 1,
        "a message lacks 'role' or 'content'": 1,
        "a message's content is NoneType, not text": 2,
        "a conversation is str, not a list of messages": 1,
        "'messages' is null": 1,
        "'messages' is missing": 1,
        "text that is not valid Unicode (half a surrogate pair)": 1,
        "nothing comes before the assistant's turn": 1,
    }
    assert report.dropped_at["an assistant turn is empty"] == "[3]"
    assert report.rows == len(rows) == report.kept + sum(report.dropped.values())
    assert json.loads(json.dumps(report.to_dict()))["kept"] == 2


@pytest.mark.parametrize(
    "good, bad, reason",
    [
        ({"text": "a"}, {"text": " \n"}, "the text is empty"),
        ({"text": "a"}, {"text": 3}, "'text' is int, not text"),
        ({"text": hh("q", "a")}, {"text": 3}, "'text' is int, not text"),
        ({"text": hh("q", "a")}, {"text": "no turns"}, "no assistant turn"),
        ({"text": hh("q", "a")}, {"text": hh("q", "")}, "an assistant turn is empty"),
        ({"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": ""},
         "an assistant turn is empty"),
        ({"prompt": "q", "completion": "a"}, {"prompt": 3, "completion": "a"},
         "the prompt is int, not text or messages"),
        ({"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": None},
         "'completion' is null"),
        ({"instruction": "q", "output": "a"}, {"instruction": "q", "input": 3, "output": "a"},
         "a column is int, not text"),
        ({"instruction": "q", "output": "a"}, {"instruction": "q", "output": 3},
         "a column is int, not text"),
        ({"chosen": hh("q", "a"), "rejected": hh("q", "b")},
         {"chosen": hh("q", "a"), "rejected": hh("r", "b")}, "contexts differ"),
    ],
)  # fmt: skip
def test_unusable_rows_of_every_shape(good, bad, reason):
    dialogues = load_dialogues([good, good, bad])
    assert len(dialogues) == 2 and dialogues.report.dropped == {reason: 1}
    assert dialogues.report.dropped_at == {reason: "[2]"}


def test_what_the_assistant_opens_with_is_cut_and_said():
    rows = [
        {"messages": [*roles("hi", speakers=("assistant",)) * 2, *roles("q", "a")]},
        {"messages": roles("q", "a")},
    ]
    dialogues = load_dialogues(rows)
    assert list(dialogues) == [said("q", "a")] * 2
    assert dialogues.report.notes == ["opened with an assistant turn, which was cut: 1"]
    greeted = one({**rows[0], "system": "S"})  # a system turn is something to open for
    assert [turn.content for turn in greeted.turns] == ["S", "hi", "hi", "q", "a"]


# --- columns -----------------------------------------------------------------------------------


def test_columns_win_over_what_is_there():
    row = {"question": "q", "answer": "a", "messages": roles("other", "one"), "system": "S"}
    columns = {"prompt": "question", "completion": "answer"}
    assert one(row, columns=columns) == replace(said("q", "a", system="S"), context=2)
    alone = one(row, columns={**columns, "system": None})
    assert alone == replace(said("q", "a"), context=1)
    hidden = one(row, columns={"messages": None, **columns})
    assert hidden == replace(said("q", "a", system="S"), context=2)
    assert one({"chat": sharegpt("q", "a")}, columns={"messages": "chat"}) == said("q", "a")
    assert one({"story": "once"}, columns={"text": "story"}) == Dialogue([], "once")


@pytest.mark.parametrize("a, b, rest", [
    ("completion", "response", {"prompt": "q"}),
    ("output", "response", {"instruction": "q"}),
])  # fmt: skip
def test_two_answers_are_refused_and_columns_settle_it(a, b, rest):
    row = {**rest, a: "first", b: "second"}
    with pytest.raises(InputError, match=rf"columns={{'{a}': None}} or columns={{'{b}': None}}"):
        load_dialogues([row])
    assert one(row, columns={b: None}).turns[-1].content == "first"
    assert one(row, columns={a: None}).turns[-1].content == "second"
    mapped = one({**rest, "mine": "third", b: "second"}, columns={a: "mine"})
    assert mapped.turns[-1].content == "third"


def test_two_conversations_are_refused():
    row = {"messages": roles("q", "a"), "conversations": sharegpt("q", "b")}
    with pytest.raises(InputError, match=r"in two ways .messages and conversations.: hide one"):
        load_dialogues([row])
    assert one(row, columns={"messages": None}) == said("q", "b")
    assert one({**row, "conversations": None}) == said("q", "a")


@pytest.mark.parametrize(
    "rows, options, words",
    [
        ([{"question": "q", "answer": "a"}], {}, [
            "found question, answer", "columns={'prompt': 'question', 'completion': 'answer'}",
        ]),
        ([{"id": 1}], {}, ["found id", "'messages' or 'conversations'", "{'prompt': '...'"]),
        ([{"messages": 3}], {}, ["'messages' is int"]),
        ([{"prompt": "q"}], {}, ["'prompt' is str", "'completion'"]),
        ([{"text": "a"}], {"columns": {"text": "txt"}}, ["'txt'", "its columns are text"]),
        ([{"text": "a"}], {"columns": {"txt": "text"}}, ["'txt'", "nearest: 'text'"]),
        ([{"text": "a"}, {"messages": roles("q", "a")}], {}, [
            "mixes rows of several kinds (plain text and messages)",
        ]),
        ([{"messages": roles("q")}] * 3, {}, [
            "No usable dialogue among the 3 rows", "no assistant turn (3); first at [0]",
        ]),
        ([], {}, ["empty"]),
        ([3], {}, ["[0]", "int"]),
        ("no/where.jsonl", {}, ["No file or folder"]),
        ({"text": ["a"]}, {}, ["dict"]),
    ],
)  # fmt: skip
def test_unusable_sources_are_one_clear_error(rows, options, words):
    with pytest.raises(InputError) as error:
        load_dialogues(rows, **options)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_most_rows_decide():
    rows = [{"text": "a"}, {"messages": roles("q", "a")}, {"text": "b"}]
    dialogues = load_dialogues(rows)
    assert [d.text for d in dialogues] == ["a", "b"]
    assert dialogues.report.dropped == {"'text' is missing": 1}
    assert "2 of the first 3 rows" in dialogues.report.reason


# --- sources -----------------------------------------------------------------------------------


def test_files_of_several_kinds(tmp_path):
    rows = [{"messages": roles("q", "a")}, {"messages": roles("r \u2028", "b 🐟", "s", "c")}]
    expected = [said("q", "a"), said("r \u2028", "b 🐟", "s", "c")]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.json").write_text(json.dumps(rows))
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    for path in sorted(tmp_path.iterdir()):
        dialogues = load_dialogues(path)
        assert list(dialogues) == expected and dialogues.report.source == str(path)
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(lines + b'{"messages": []}\n')
    assert load_dialogues(bad).report.dropped_at["no assistant turn"] == f"{bad}:3"


def test_a_dataset_and_its_split():
    import datasets

    parts = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "test")}
    source = datasets.DatasetDict(parts)
    assert [d.text for d in load_dialogues(source)] == ["train"]
    assert [d.text for d in load_dialogues(source, split="test")] == ["test"]
    turns = datasets.Dataset.from_list([{"messages": roles("q", "a")}])
    assert list(load_dialogues(turns)) == [QA]


@pytest.mark.parametrize("spool", [1, 1 << 20])
def test_dialogues_are_a_sequence_on_disk_or_in_memory(monkeypatch, spool):
    monkeypatch.setattr(spool_module, "SPOOL_BYTES", spool)
    records = [said("q", "a"), Dialogue([], "text", "here"), said("r", "b", system="S")]
    dialogues = load_dialogues(records)
    assert list(dialogues) == records and dialogues[-1] == records[2]
    assert dialogues[1:] == records[1:] and isinstance(dialogues[0].turns[0], Message)
    assert load_dialogues(dialogues) is dialogues


def test_records_of_the_caller_are_checked():
    bad = [
        Dialogue([("user", "q")]),
        Dialogue("text"),
        Dialogue([Message("user", 3)]),
        Dialogue([Message("user", "q")], "and text"),
        Dialogue([], 3),
        {"text": "a"},
    ]
    dialogues = load_dialogues([QA, *bad])
    assert list(dialogues) == [QA]
    assert sum(dialogues.report.dropped.values()) == len(bad)
    assert dialogues.report.dropped["a dict among the records"] == 1


def test_pairs_are_imitated():
    sides = [Message("assistant", "a")], [Message("assistant", "b")]
    pair = Pair([Message("user", "q")], *sides, source="here", weight=2.5)
    for source in ([pair], load_preferences([pair])):
        dialogues = load_dialogues(source)
        assert list(dialogues) == [Dialogue(QA.turns, None, "here", 2.5, context=1)]
        assert "chosen" in dialogues.report.reason


def test_hh_rlhf(hh_path):
    """Independent of the parser: turns of the chosen transcript cut at every marker."""
    with gzip.open(hh_path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    dialogues = load_dialogues(hh_path)
    assert "imitated" in dialogues.report.reason and dialogues.report.rows == len(rows)
    texts = {row["chosen"] for row in rows}
    names = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
    for dialogue in dialogues:
        written = "".join(names[turn.role] + turn.content for turn in dialogue.turns)
        assert written in texts or written.replace(": ", ":") in {
            t.replace(": ", ":") for t in texts
        }
    assert dialogues.report.dropped["an assistant turn is empty"] > 0


def test_what_is_given_is_not_imitated_and_decides_what_is_held_out():
    """Of a pair only the chosen response, of a prompt of several turns only the completion."""
    turns = said(*"qarb").turns
    pair = Pair(turns[:3], turns[3:], [Message("assistant", "c")])
    row = {"prompt": roles("q", "a", "r"), "completion": "b"}
    for dialogue in (load_dialogues([pair])[0], one(row)):
        assert dialogue == Dialogue(turns, context=3) and dialogue.prompt == pair.prompt
    opened = {"prompt": [{"role": "assistant", "content": "hi"}, *roles("q")], "completion": "a"}
    assert [turn.content for turn in one(opened).turns] == ["hi", "q", "a"], "given as it is"
    assert one(opened).prompt == one(opened).turns[:2]


# --- preferences and tools -----------------------------------------------------------------------


def test_of_preferences_in_any_shape_the_best_response_is_imitated():
    listed = [
        {"prompt": "q", "responses": ["OK", "GOOD", "BAD"], "scores": [2, 3, None]},
        {"prompt": "q", "responses": ["tied", "tied too"], "scores": [2, 2]},
        {"prompt": "q", "responses": ["GOOD", "BAD"], "scores": [0, None]},
    ]
    dialogues = load_dialogues(listed)
    assert list(dialogues) == [replace(said("q", "GOOD"), context=1)] * 2
    assert dialogues.report.dropped == {"tie": 1} and "imitated" in dialogues.report.reason
    choices = [
        {"prompt": "q", "response_a": "BAD", "response_b": "GOOD", "winner": winner}
        for winner in ("b", "tie", "b", "b")
    ]
    dialogues = load_dialogues(choices)
    assert list(dialogues) == [replace(said("q", "GOOD"), context=1)] * 3
    assert dialogues.report.dropped == {"tie": 1}


def test_what_is_labelled_as_bad_is_not_imitated():
    rows = [
        {"prompt": "q", "completion": text, "label": label}
        for text, label in [("GOOD", True), ("BAD", False), ("GOOD 2", 1), ("BAD", "false")]
    ]
    dialogues = load_dialogues([*rows, {"prompt": "q", "completion": "unlabelled"}])
    said_last = [d.turns[-1].content for d in dialogues]
    assert said_last == ["GOOD", "GOOD 2", "unlabelled"]
    assert dialogues.report.dropped == {"labelled as a bad response": 2}
    assert len(load_dialogues(rows, columns={"label": None})) == 4


def test_messages_beside_preferences_are_what_is_imitated():
    pair = {"chosen": roles("q", "GOOD"), "rejected": roles("q", "BAD")}
    row = {"prompt": "q", "messages": roles("q", "GOOD"), **pair}
    dialogues = load_dialogues([row] * 3)
    assert list(dialogues) == [said("q", "GOOD")] * 3 and dialogues.report.schema == "messages"


def test_tools_are_the_first_turn_and_calls_are_imitated():
    call = {"name": "f", "arguments": {"x": 1}}
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": [{"function": call}]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "a"},
        ],
        "tools": json.dumps(tools),
        "system": "S",
    }
    turns = one(row).turns
    order = ["tools", "system", "user", "tool_calls", "tool", "assistant"]
    assert [turn.role for turn in turns] == order
    assert json.loads(turns[0].content) == tools
    assert json.loads(turns[3].content)[0]["arguments"] == {"x": 1}
    assert one(row).prompt == turns[:3]
    only = {**row, "messages": row["messages"][:2]}
    assert one(only).turns == turns[:4]
    asked = {"prompt": "q", "tools": tools, "completion": row["messages"][1:2]}
    assert [turn.role for turn in one(asked).turns] == ["tools", "user", "tool_calls"]
    assert one(asked).context == 2
