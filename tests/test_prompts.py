"""Prompts from any source: what is asked, in which shape, and each only once."""

import gzip
import json

import pytest

from prefopt import InputError, Message, Pair, load_preferences
from prefopt.data.dialogues import load_dialogues
from prefopt.data.prompts import load_prompts
from prefopt.data.records import Dialogue, Feedback


def user(text):
    return [Message("user", text)]


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Bye"},
]
TALK = "\n\nHuman: Hello\n\nAssistant: Hi.\n\nHuman: Bye\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "prompt", "schema"),
    [
        ({"prompt": "Why?", "chosen": "a", "rejected": "b"}, user("Why?"), "plain strings"),
        (
            {"chosen": f"{TALK} a", "rejected": f"{TALK} b"},
            [Message("user", "Hello"), Message("assistant", "Hi."), Message("user", "Bye")],
            "transcripts",
        ),
        (
            {
                "chosen": [*CHAT[1:2], {"role": "assistant", "content": "a"}],
                "rejected": [*CHAT[1:2], {"role": "assistant", "content": "b"}],
            },
            user("Hello"),
            "preference pairs, messages",
        ),
        ({"prompt": "Why?"}, user("Why?"), "prompt"),
        ({"prompt": "Why?", "completion": "So."}, user("Why?"), "prompt"),
        ({"prompt": "Why?", "system": "S"}, [Message("system", "S"), *user("Why?")], "prompt"),
        ({"prompt": CHAT}, [Message(**m) for m in CHAT], "prompt"),
        ({"prompt": TALK}, [Message(**m) for m in CHAT[1:]], "prompt"),
        ({"prompt": "Human: no transcript"}, user("Human: no transcript"), "prompt"),
        ({"question": "Why?", "answer": "So."}, user("Why?"), "question"),
        ({"query": "Why?"}, user("Why?"), "query"),
        ({"instruction": "Add", "input": "1 2", "output": "3"}, user("Add\n\n1 2"), "instruction"),
        ({"instruction": "Add", "input": "", "output": "3"}, user("Add"), "instruction"),
        ({"messages": CHAT}, [Message(**m) for m in CHAT], "messages"),
        ({"messages": CHAT[:3]}, [Message(**m) for m in CHAT[:2]], "messages"),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
            user("Hi"),
            "conversations",
        ),
        ({"text": f"{TALK} Goodbye."}, user("Hello"), "transcripts"),
    ],
)
def test_every_shape_of_row(row, prompt, schema):
    prompts = load_prompts([row])
    assert list(prompts) == [prompt] and prompts[0][-1].role == "user"
    assert schema in prompts.report.schema and prompts.report.reason
    assert all(isinstance(turn, Message) for turn in prompts[0])


def test_every_prompt_once():
    rows = [{"prompt": text} for text in ("a", "b", "a", "a ", "b")]
    prompts = load_prompts(rows)
    assert [p[0].content for p in prompts] == ["a", "b", "a "]
    report = prompts.report
    assert report.dropped == {"the same prompt as an earlier one": 2} and report.kept == 3
    assert report.dropped_at == {"the same prompt as an earlier one": "[2]"} and report.rows == 5


def test_what_cannot_be_answered_is_counted():
    rows = [
        {"prompt": "good"},
        {"prompt": "  "},
        {"prompt": None},
        {"prompt": 3},
        {"prompt": [{"role": "wizard", "content": "x"}]},
        {"prompt": [{"role": "system", "content": "x"}]},
        {"prompt": CHAT[1:3]},
        {"prompt": "half \ud800"},
    ]
    report = load_prompts(rows).report
    assert report.dropped == {
        "the prompt is empty": 2,
        "'prompt' is null": 1,
        "the prompt is int, not text or messages": 1,
        "unknown role 'wizard'": 1,
        "the prompt ends with an assistant turn": 1,
        "text that is not valid Unicode (half a surrogate pair)": 1,
    }
    assert report.kept == 1 and report.rows == 8 == report.kept + sum(report.dropped.values())


def test_lists_of_texts_messages_and_records():
    pair = Pair(user("p"), [Message("assistant", "a")], [Message("assistant", "b")])
    talk = Dialogue([Message(**m) for m in CHAT])
    said = Feedback(user("f"), [Message("assistant", "a")], True)
    assert list(load_prompts(["x", "y"])) == [user("x"), user("y")]
    assert list(load_prompts([user("x"), CHAT])) == [user("x"), [Message(**m) for m in CHAT]]
    assert list(load_prompts([pair])) == [user("p")]
    assert list(load_prompts([talk])) == [[Message(**m) for m in CHAT[:2]]]
    assert list(load_prompts([said])) == [user("f")]


def test_what_was_loaded_already():
    rows = [{"prompt": "a", "chosen": "x", "rejected": "y"}]
    prompts = load_prompts(load_preferences(rows))
    assert list(prompts) == [user("a")] and load_prompts(prompts) is prompts
    plain = load_dialogues([{"text": "once upon a time"}])
    with pytest.raises(InputError, match="plain text without a prompt"):
        load_prompts(plain)


def test_the_lines_of_a_text_file(tmp_path):
    text = "first\n\n  \nsecond\r\nfirst\n"
    (tmp_path / "p.txt").write_text(text)
    with gzip.open(tmp_path / "q.txt.gz", "wt") as file:
        file.write(text)
    for name in ("p.txt", "q.txt.gz"):
        prompts = load_prompts(tmp_path / name)
        assert list(prompts) == [user("first"), user("second")]
        (where,) = prompts.report.dropped_at.values()
        assert where.endswith(f"{name}:5")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="not valid UTF-8"):
        load_prompts(tmp_path / "bad.txt")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match="is empty"):
        load_prompts(tmp_path / "empty.txt")
    with pytest.raises(InputError, match="No file or folder"):
        load_prompts(tmp_path / "missing.txt")


def test_a_file_and_columns(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"ask": f"q{i}", "prompt": "no"}) + "\n" for i in range(3)))
    prompts = load_prompts(path, columns={"prompt": "ask"})
    assert [p[0].content for p in prompts] == ["q0", "q1", "q2"]
    with pytest.raises(InputError, match=r"'asc', which .* does not have .nearest: 'ask'"):
        load_prompts(path, columns={"prompt": "asc"})
    with pytest.raises(InputError, match="cannot map 'promt'"):
        load_prompts(path, columns={"promt": "ask"})


def test_columns_win_over_preference_pairs():
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "other": "o"}
    assert list(load_prompts([row], columns={"question": "other", "prompt": None})) == [user("o")]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([{"promt": "x"}], r"'promt' \(nearest: 'prompt'\)"),
        ([{"xyz": "x"}], r"columns=\{'prompt': 'xyz'\}"),
        ([{"prompt": ""}, {"prompt": " "}], r"the prompt is empty \(2\); first at \[0\]"),
        ([], "empty"),
        ([""], "the prompt is empty"),
    ],
)
def test_without_a_prompt(source, message):
    with pytest.raises(InputError, match=message):
        load_prompts(source)


def test_real_pairs(hh_path):
    prompts, pairs = load_prompts(hh_path), load_preferences(hh_path)
    want = list({json.dumps(pair.prompt): pair.prompt for pair in pairs}.values())
    assert list(prompts) == want and len(prompts) == 1497


def test_tools_lists_and_serialised_turns():
    tools = [{"type": "function", "function": {"name": "f"}}]
    (prompt,) = load_prompts([{"prompt": "Why?", "tools": tools, "system": "S"}])
    assert [turn.role for turn in prompt] == ["tools", "system", "user"]
    serial = "How?\n<extra_id_1>Assistant\nThus.\n<extra_id_1>User\nWhy?"
    scored = [{"prompt": serial, "response": text, "helpfulness": 1} for text in "ab"]
    asked = [*user("How?"), Message("assistant", "Thus."), *user("Why?")]
    assert list(load_prompts(scored)) == [asked]
    listed = [
        {"prompt": "a", "responses": ["x", "y"], "scores": [1, 2]},
        {"prompt": "b", "responses": ["x", "y"], "scores": [1, None]},  # asked all the same
    ]
    assert list(load_prompts(listed)) == [user("a"), user("b")]
    unrated = [{"prompt": "a", "responses": ["x", "y"]}]
    assert list(load_prompts(unrated)) == [user("a")]


def test_conversations_without_a_question():
    speak = {"role": "assistant", "content": "Hi."}
    prompts = load_prompts([{"messages": talk} for talk in ([], [speak], CHAT[1:2])])
    assert list(prompts) == [user("Hello")]
    assert prompts.report.dropped == {"the prompt is empty": 2}
