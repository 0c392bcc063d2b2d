"""Pairs out of rated responses: which ones, what they say they were made of, and the file."""

import itertools
import json
import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefopt import InputError, Policy
from prefopt.cli import main
from prefopt.data.records import Candidates, Message, Pair
from prefopt.data.sources import load_preferences
from prefopt.pair_making import make_pairs
from prefopt.rewards import combine, load_reward, score


def length(prompts, responses):
    assert all(prompt[-1].role == "user" for prompt in prompts)
    return [len(text) for text in responses]


def vowels(prompts, responses):
    return [sum(letter in "aeiou" for letter in text) for text in responses]


UNRATED = [
    {"prompt": "q0", "responses": ["bb", "a", "cccc"], "id": 0},
    {"prompt": "q1", "responses": ["same", "same"]},
    {"prompt": "q2", "responses": ["xx", "yy"]},
    {"prompt": "q3", "responses": "text"},
    {"prompt": [{"role": "user", "content": "q4"}], "responses": [{"text": "e"}, {"text": "ttt"}]},
    {"prompt": "q5", "responses": ["one", None]},
    {"prompt": None, "responses": ["one", "two"]},
]


def sides(row):
    return tuple(row[key][-1]["content"] for key in ("chosen", "rejected"))


# --- by what the data says -----------------------------------------------------------------------


def test_by_the_scores_of_the_data():
    rows = [
        {"prompt": "q", "answers": [{"answer": t, "rank": r} for t, r in (("b", 3), ("a", 1))]},
        {"prompt": "r", "answers": [{"answer": t, "rank": 1} for t in "xy"]},
    ]
    made = make_pairs(rows, ties="soft")
    best, tie = made
    assert best == {
        "prompt": [{"role": "user", "content": "q"}],
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
        "margin": 2.0,
        "lineage": {
            "data": "list of rows",
            "schema": "list with rank",
            "pairing": "best_worst",
            "where": "[0]",
            "picks": [1, 0],
            "scores": {"data": [-1.0, -3.0]},
        },
    }
    assert tie["preference"] == 0.5 and tie["lineage"]["scores"] == {"data": [-1.0, -1.0]}
    assert sides(tie) == ("x", "y") and tie["lineage"]["where"] == "[1]"


SOURCES = {
    "lists": [
        {"prompt": f"q{i}", "responses": ["b", "a", "c"], "scores": [1, i, 2]} for i in (0, 3)
    ],
    "pairs": [{"prompt": "q", "chosen": "a", "rejected": "b", "margin": 2, "source": "s"}],
    "talks": [
        {
            "conversation_a": [{"role": r, "content": c} for r, c in talk],
            "conversation_b": [{"role": r, "content": c[::-1]} for r, c in talk],
            "winner": "model_b",
        }
        for talk in [[("user", "uu"), ("assistant", "xy"), ("user", "vv"), ("assistant", "zw")]]
    ],
    "scored": [{"prompt": "q", "response": f"r{i}", "score": i % 3} for i in range(6)],
    "labelled": [{"prompt": "q", "completion": f"r{i}", "label": i % 2 == 0} for i in range(4)],
    "tools": [
        {"prompt": [{"role": "user", "content": "q"}], "tools": '[{"name": "f"}]',
         "chosen": [{"role": "assistant", "content": None,
                     "tool_calls": [{"name": "f", "arguments": {}}]}],
         "rejected": [{"role": "assistant", "content": "no"}]},
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("pairing", ["best_worst", "all"])
@pytest.mark.parametrize("ties", ["soft", "keep"])
def test_the_rows_are_read_back_as_the_pairs_of_the_source(name, pairing, ties, tmp_path):
    options = {"pairing": pairing, "ties": ties}
    direct = list(load_preferences(SOURCES[name], **options))
    made = make_pairs(SOURCES[name], **options)
    assert list(load_preferences(list(made), ties=ties)) == direct
    source, out = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in SOURCES[name]))
    flags = [f"--{key}={value}" for key, value in options.items()]
    assert main(["data", "pairs", "--data", str(source), "--out", str(out), *flags]) == 0
    assert list(load_preferences(out, ties=ties)) == direct
    for row in map(json.loads, out.read_text().splitlines()):
        line = int(row["lineage"]["where"].rpartition(":")[2]) - 1
        assert row["lineage"]["data"] == str(source) and 0 <= line < len(SOURCES[name])


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)


@given(
    st.lists(
        st.tuples(
            st.lists(st.tuples(words, st.integers(-2, 2)), min_size=2, max_size=4),
            st.none() | words,
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(["best_worst", "best_rest", "adjacent", "all"]),
)
def test_any_candidates_are_read_back_as_they_were(samples, pairing):
    records: list[Candidates | Pair] = [
        Candidates(
            [Message("user", f"q{i}")],
            [[Message("assistant", text)] for text, _ in answers],
            [float(value) for _, value in answers],
            source,
        )
        for i, (answers, source) in enumerate(samples)
    ]
    records.append(Pair([Message("user", "q")], *([Message("assistant", x)] for x in "ab")))
    direct = list(load_preferences(records, pairing=pairing, ties="soft"))
    made = make_pairs(records, pairing=pairing, ties="soft")
    assert list(load_preferences(list(made), ties="soft")) == direct


# --- by rewards ----------------------------------------------------------------------------------


def test_by_a_callable():
    made = make_pairs(UNRATED, length, pairing="all")
    assert [sides(row) for row in made] == [
        ("cccc", "bb"),
        ("cccc", "a"),
        ("bb", "a"),
        ("ttt", "e"),
    ]
    assert [row["margin"] for row in made] == [2.0, 3.0, 1.0, 2.0]
    assert made[0]["lineage"] == {
        "data": "list of rows",
        "schema": "list of responses",
        "pairing": "all",
        "rewards": {"reward": f"{__name__}:length"},
        "where": "[0]",
        "picks": [2, 0],
        "scores": {"reward": [4.0, 2.0]},
        "combined": [4.0, 2.0],
    }
    report = made.report
    assert (report.rows, report.kept, report.records) == (7, 2, 4)
    assert report.dropped == {
        "all responses are the same text": 1,
        "tie": 1,
        "the responses are str, not a list": 1,
        "a response is NoneType, not text or messages": 1,
        "'prompt' is null": 1,
    }


def test_by_several_rewards():
    rewards, weights = {"length": length, "vowels": vowels}, {"length": 1.0, "vowels": 2.5}
    rows = [UNRATED[i] for i in (0, 2, 4)]
    made = make_pairs(rows, rewards, reward_weights=weights, pairing="all", ties="keep")
    texts = ["bb", "a", "cccc", "xx", "yy", "e", "ttt"]
    scores = {"length": [len(text) for text in texts], "vowels": vowels([], texts)}
    expected = dict(zip(texts, combine(scores, weights), strict=True))
    assert len(made) == 3 + 1 + 1
    for row in made:
        about = row["lineage"]
        assert about["combined"] == pytest.approx([expected[text] for text in sides(row)])
        assert row["margin"] == pytest.approx(about["combined"][0] - about["combined"][1])
        assert about["scores"]["length"] == [len(text) for text in sides(row)]
        assert about["scores"]["vowels"] == vowels([], sides(row))
    with pytest.raises(InputError, match="weight is given for the reward 'lenght'"):
        make_pairs(rows, rewards, reward_weights={"lenght": 1})


def test_what_people_said_does_not_count_where_a_reward_judges():
    pairs = [{"prompt": "q", "chosen": "short", "rejected": "much longer", "margin": 3}]
    (row,) = make_pairs(pairs, length)
    assert sides(row) == ("much longer", "short") and row["margin"] == 6.0
    lists = [{"prompt": "q", "responses": ["aa", "a", "aaa"], "scores": [1, None, 0]}]
    assert [sides(row) for row in make_pairs(lists, length)] == [("aaa", "a")]
    rows = [{"prompt": f"q{i % 2}", "completion": "x" * i, "label": True} for i in range(4)]
    made = make_pairs(rows, length)
    assert [sides(row) for row in made] == [("xx", ""), ("xxx", "x")]
    assert [row["lineage"]["picks"] for row in made] == [[1, 0], [1, 0]]
    tree = {"text": "q", "role": "prompter", "replies": [
        {"text": text, "role": "assistant", "rank": rank} for text, rank in (("a", 0), ("bb", 1))
    ]}  # fmt: skip
    two = [{"prompt": {**tree, "text": "p"}}, {"prompt": tree}]
    made = make_pairs(two, length)
    assert [(row["prompt"][0]["content"], sides(row)) for row in made] == [
        ("p", ("bb", "a")),
        ("q", ("bb", "a")),
    ]


def test_a_reward_sees_whole_conversations_and_few_prompts_at_a_time():
    asked = []

    def reward(prompts, responses):
        asked.append(len(responses))
        assert [m.content for m in prompts[0]] in (["q", "x", "r"], ["q"])
        return [len(prompt) + len(text) for prompt, text in zip(prompts, responses, strict=True)]

    def turns(*said):
        roles = itertools.cycle(["assistant", "user"])
        return [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]

    row = {"prompt": "q", "responses": [turns("x", "r", "yy"), turns("z", "r", "w")]}
    (made, *_) = make_pairs([row] * 100, reward)
    assert made["lineage"]["scores"] == {"reward": [5.0, 4.0]} and len(made["chosen"]) == 3
    assert sum(asked) == 200 and max(asked) <= 64


def test_responses_wait_on_disk(tmp_path):
    path, n = tmp_path / "a.jsonl", 500
    with open(path, "w") as file:
        for i in range(n):
            texts = [letter * 80_000 for letter in "ab"]
            file.write(json.dumps({"prompt": f"q{i}", "responses": texts}) + "\n")
    tracemalloc.start()
    made = make_pairs(path, lambda prompts, texts: [ord(text[0]) for text in texts], quiet=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(made) == n and all(sides(row)[0][0] == "b" for row in made)
    assert path.stat().st_size > 80_000_000 and peak < 35_000_000  # buffers of 8 MB, and a chunk


def test_a_reward_model(tiny_model, tmp_path):
    torch.manual_seed(1)
    policy = Policy.from_pretrained(tiny_model, head="score", lora=None, dtype="float32")
    policy.save_pretrained(tmp_path / "rm")
    long = "word " * 5_000
    rows = [*UNRATED, {"prompt": long, "responses": ["a", "b"]}]
    made = make_pairs(rows, str(tmp_path / "rm"), pairing="all")
    responses = UNRATED[0]["responses"]
    rm = load_reward(tmp_path / "rm")
    prompts = [[Message("user", "q0")]] * 3
    values = score(rm, "rm", prompts, responses)
    order = sorted(range(3), key=lambda i: -values[i])
    first = [row for row in made if row["lineage"]["where"] == "[0]"]
    assert [tuple(row["lineage"]["picks"]) for row in first] == list(
        itertools.combinations(order, 2)
    )
    assert first[0]["lineage"]["rewards"] == {"reward": str(tmp_path / "rm")}
    assert any("no room for a response" in why for why in made.report.dropped)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda p, r: [float("nan")] * len(r), "no finite number"),
        (lambda p, r: [1.0], "1 scores for"),
        (lambda p, r: 1 / 0, "ZeroDivisionError"),
        (lambda p: [1.0], "is called with"),
        ({}, "there is no reward"),
        ("no_such_module:f", "no_such_module"),
    ],
)
def test_rewards_that_fail(reward, message):
    with pytest.raises(InputError, match=message):
        make_pairs(UNRATED, reward)


def test_nothing_to_judge_and_nothing_left():
    with pytest.raises(InputError, match="No usable pair among the 1 rows"):
        make_pairs([UNRATED[1]], length)
    with pytest.raises(InputError, match="No usable pair among the 2 rows"):
        make_pairs([UNRATED[3], UNRATED[5]], {"a": length, "b": vowels})
    with pytest.raises(InputError, match="says which response is better"):
        make_pairs(UNRATED)
    with pytest.raises(InputError, match="min_gap is -1"):
        make_pairs(UNRATED, length, min_gap=-1)


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "def longest(prompts, responses):\n    return [len(text) for text in responses]\n"
        "def broken(prompts, responses):\n    return [None for text in responses]\n"
    )
    rows = "".join(json.dumps(row) + "\n" for row in UNRATED)
    (tmp_path / "a.jsonl").write_text(rows)
    return tmp_path


def test_the_command_with_a_reward(bench, capsys):
    flags = ["--reward", "mine:longest", "--pairing", "all", "--max_pairs", "2"]
    assert main(["data", "pairs", "a.jsonl", "--out", "b.jsonl", *flags]) == 0
    shown = capsys.readouterr().out
    assert "2 of 7 rows kept" in shown and "b.jsonl (3)" in shown
    rows = [json.loads(line) for line in (bench / "b.jsonl").read_text().splitlines()]
    assert [sides(row) for row in rows] == [("cccc", "bb"), ("cccc", "a"), ("ttt", "e")]
    assert rows[0]["lineage"]["rewards"] == {"reward": "mine:longest"}
    two = '{"a": "mine:longest", "b": "mine:longest"}'
    flags = ["--reward", two, "--reward_weights", '{"a": 1, "b": 2}']
    assert main(["data", "pairs", "a.jsonl", "--out", "c.jsonl", *flags]) == 0
    (first, _) = map(json.loads, (bench / "c.jsonl").read_text().splitlines())
    assert first["lineage"]["scores"] == {"a": [4.0, 1.0], "b": [4.0, 1.0]}


def test_nothing_is_overwritten_or_left_half_written(bench, capsys):
    (bench / "b.jsonl").write_text("mine\n")
    run = ["data", "pairs", "a.jsonl", "--reward", "mine:longest", "--out"]
    for out, words in [
        ("b.jsonl", "'b.jsonl' exists; --force replaces it"),
        ("a.jsonl", "--out never writes over its source 'a.jsonl'"),
        ("c.txt", "--out writes JSON lines: 'c.txt' must end in .jsonl"),
        ("no/c.jsonl", "the folder 'no' of --out does not exist"),
    ]:
        assert main([*run, out]) == 2 and words in capsys.readouterr().err
    before = sorted(path.name for path in bench.iterdir())
    bad = ["data", "pairs", "a.jsonl", "--out", "c.jsonl", "--reward", "mine:broken"]
    assert main(bad) == 2 and "no finite number" in capsys.readouterr().err
    assert main(["data", "pairs", "a.jsonl", "--out", "c.jsonl"]) == 2
    assert "says which response is better" in capsys.readouterr().err
    after = {path.name for path in bench.iterdir()} - {"__pycache__"}
    assert after == set(before) - {"__pycache__"} and (bench / "b.jsonl").read_text() == "mine\n"
    assert main([*run, "b.jsonl", "--force"]) == 0
    assert len((bench / "b.jsonl").read_text().splitlines()) == 2
