"""Garbage among the rows of every schema: a count and a reason for each row, never a crash."""

import copy
import json
import math
import random

import pytest

from prefopt import (
    InputError,
    encode_pairs,
    load_dialogues,
    load_preferences,
    load_prompts,
    load_rankings,
    loading,
)
from prefopt.data.records import ROLES, SPOKEN, Message

ROWS = 1_000  # of each schema: 25 schemas and more


def said(role, content):
    return {"role": role, "content": content}


TALK = [said("user", "q"), said("assistant", "a"), said("user", "more?")]
ANNOTATED = {"helpfulness": {"Rating": "4"}, "honesty": {"Rating": "N/A"}}
SEEDS = {
    "hh": {
        "chosen": "\n\nHuman: q\n\nAssistant: good",
        "rejected": "\n\nHuman: q\n\nAssistant: bad",
    },
    "strings": {"prompt": "q", "chosen": "good", "rejected": "bad", "margin": 1.5, "source": "s"},
    "transcript prompt": {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " a", "rejected": " b"},
    "messages": {
        "prompt": "q",
        "chosen": [said("user", "q"), said("assistant", "good")],
        "rejected": [said("user", "q"), said("assistant", "bad")],
        "score_chosen": 7.0,
        "score_rejected": 5.0,
    },
    "tools": {
        "prompt": TALK,
        "chosen": [
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
            }
        ],
        "rejected": [said("assistant", "bad")],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
        "prompt": [{"from": "human", "value": "q"}],
    },
    "argilla": {
        "source": "s", "instruction": "q", "chosen_response": "good", "rejected_response": "bad",
        "chosen_avg_rating": 4.5, "rejected_avg_rating": 2.0,
    },
    "orca": {
        "system": "", "input": "q", "chosen": "good", "rejected": "bad", "status": "unchanged",
        "rating": [9.0, 5.0], "chosen_score": 9.0,
    },
    "stack exchange": {"question": "q", "response_j": "good", "response_k": "bad"},
    "shp": {
        "history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 9,
        "score_B": 3, "score_ratio": 3.0, "post_id": "x",
    },
    "webgpt": {
        "question": {"full_text": "q", "id": "1"}, "answer_0": "a", "answer_1": "b",
        "score_0": 0.5, "score_1": -0.5, "quotes_0": {"title": [], "extract": []},
    },
    "summaries": {
        "info": {"id": "1", "post": "text", "title": "t", "subreddit": "s"},
        "summaries": [{"text": " a", "note": None}, {"text": " b", "note": "n"}],
        "choice": 1,
    },
    "helpsteer2 preference": {
        "prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": -2,
    },
    "helpsteer3": {
        "context": TALK, "response1": "a", "response2": "b", "overall_preference": 3,
    },
    "safe": {
        "prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 0,
        "safer_response_id": 1, "is_response_0_safe": True,
    },
    "arena": {
        "conversation_a": [said("user", "q"), said("assistant", "a")],
        "conversation_b": [said("user", "q"), said("assistant", "b")],
        "winner": "model_a", "model_a": "x", "model_b": "y",
    },
    "kaggle": {
        "prompt": '["q", "r"]', "response_a": '["a", "b"]', "response_b": '["c", null]',
        "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0,
    },
    "nectar": {
        "prompt": "\n\nHuman: q\n\nAssistant: ",
        "answers": [{"answer": x, "rank": float(i + 1), "model": "m"} for i, x in enumerate("abc")],
    },
    "ultrafeedback": {
        "instruction": "q",
        "completions": [
            {"response": x, "overall_score": i, "annotations": ANNOTATED}
            for i, x in enumerate("ab")
        ],
    },
    "ranked": {
        "context": TALK,
        "completions": [
            {"rank": i, "completion": [said("assistant", x)]} for i, x in enumerate("abc")
        ],
    },
    "scored": {"prompt": "q", "responses": ["a", "b", "c"], "scores": [1.0, 2.0, 0.5]},
    "oasst": {
        "message_id": "1", "parent_id": None, "text": "q", "role": "prompter", "rank": None,
        "deleted": False, "review_result": True, "lang": "en", "message_tree_id": "1",
    },
    "tree": {
        "message_tree_id": "1",
        "prompt": {
            "text": "q", "role": "prompter", "message_id": "1",
            "replies": [
                {"text": x, "role": "assistant", "rank": i, "replies": [], "message_id": x}
                for i, x in enumerate("ab")
            ],
        },
    },
    "helpsteer2": {"prompt": "q", "response": "a", "helpfulness": 3, "correctness": 2},
    "axis": {
        "info": {"id": "1", "article": "text"},
        "summary": {"text": " a", "axes": {"overall": 5}},
    },
    "kto": {"prompt": "q", "completion": "a", "label": True},
}  # fmt: skip


VERDICTS = {
    "labels": [0, 1], "choice": [0, 1], "preference_strength": [-3, 0, 2], "helpfulness": [1, 2, 4],
    "overall_preference": [-1, 0, 3], "better_response_id": [0, 1], "label": [True, False],
    "winner": ["model_a", "model_b", "tie", "tie (bothbad)"],
}  # fmt: skip


class Odd:
    """A value of no kind that a data set has."""


def deep(levels):
    value = "bottom"
    for _ in range(levels):
        value = [value]
    return value


GARBAGE = [
    None, True, False, 0, 1, -1, 3, 2.5, math.nan, math.inf, 10**400, "", " ", "a", "N/A", "null",
    "tie", "model_b", "\ud800", "x\x00y", "é̂\u202e", "[1, 2", '{"role": "user"}', '["a", null]',
    "\n\nHuman: q\n\nAssistant: a", "\n\nAssistant:", "<extra_id_1>User\nq", b"bytes", [], [None],
    {}, {"role": "user"}, {"role": 3, "content": "x"}, {"role": "user", "content": ["a"]},
    {"from": "gpt", "value": None}, [said("assistant", "a")], [said("robot", "a")], [[[]]],
    {"a": {"b": {}}}, [{"rank": 1}], [{"rank": None, "answer": "a"}], (1, 2), {1, 2}, Odd(),
    "[" * 3_000, json.dumps(deep(500)), deep(900), "w " * 5_000,
]  # fmt: skip


def mangled(row, rng):
    """The row with one to three of its values, at any depth, replaced, removed, added or moved."""
    row = copy.deepcopy(row)
    for _ in range(rng.randint(1, 3)):
        at = row
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(at[key], dict | list) and at[key] and rng.random() < 0.6:
                at = at[key]
                continue
            what = rng.randrange(5)
            if what == 0 and isinstance(at, dict):
                del at[key]
            elif what == 1 and isinstance(at, dict):
                at[rng.choice([f"{key}2", 7, "prompt", "winner"])] = rng.choice(GARBAGE)
            elif what == 2:
                at[key] = at[rng.choice(keys)]
            else:
                at[key] = rng.choice(GARBAGE)
            break
    return row


def varied(row, rng):
    """The same row about another of a few prompts, with another verdict."""
    row, n = copy.deepcopy(row), rng.randrange(40)
    for key, verdicts in VERDICTS.items():
        if key in row:
            row[key] = rng.choice(verdicts)
    if "label" in row:
        row["completion"] = f"a {row['label']}"
    if "summary" in row:
        row["summary"] |= {"text": f" a {n}", "axes": {"overall": n % 7}}
    for key in ("prompt", "question", "instruction", "history", "message_id", "response"):
        if isinstance(row.get(key), str) and not row[key].startswith(("[", "\n")):
            row[key] = f"{row[key]} {n}"
    return row


def rows_of(name, seed=0, count=ROWS):
    rng = random.Random(f"{name} {seed}")
    good = [varied(SEEDS[name], rng) for _ in range(40)]
    if name == "oasst":  # roots alone make no pair
        answers = {"role": "assistant", "parent_id": "root", "deleted": False}
        good = [
            {**SEEDS[name], "message_id": "root"},
            *(
                {**SEEDS[name], **answers, "message_id": f"a{i}", "text": f"a{i}", "rank": i}
                for i in range(3)
            ),
        ]
    bad = [mangled(varied(SEEDS[name], rng), rng) for _ in range(count)]
    return good, bad


def check_turns(turns):
    assert turns and all(isinstance(turn, Message) and turn.role in ROLES for turn in turns)
    for turn in turns:
        turn.content.encode()


@pytest.mark.parametrize("name", SEEDS)
def test_every_row_is_kept_or_counted_with_a_reason(name):
    good, bad = rows_of(name)
    pairs = load_preferences([*good, *bad], ties="soft", pairing="all")
    report = pairs.report
    assert report.rows == len(good) + len(bad) == report.kept + sum(report.dropped.values())
    assert report.records == len(pairs) > 0 and report.dropped
    for reason, where in report.dropped_at.items():
        assert 0 < len(reason) < 200 and "\n" not in reason and where.startswith("[")
    for pair in pairs:
        check_turns(pair.prompt)
        assert pair.prompt[-1].role not in SPOKEN and pair.chosen != pair.rejected
        for side in (pair.chosen, pair.rejected):
            check_turns(side)
            assert side[-1].role in SPOKEN
        assert pair.margin is None or math.isfinite(pair.margin)
        assert pair.preference in (0.5, 1.0)


def test_what_is_kept_can_be_encoded():
    tokenizer = loading.load_tokenizer(loading.resolve("embedded").base)
    for name in SEEDS.keys() - {"tools"}:  # the template of this tokenizer has no place for them
        good, bad = rows_of(name, seed=2, count=60)
        pairs = load_preferences([*good, *bad], ties="soft", pairing="all")
        encoded = encode_pairs(pairs, tokenizer, max_length=512)
        dropped = sum(n for key, n in encoded.counts.items() if key.startswith("dropped"))
        assert len(encoded) + dropped == len(pairs) and len(encoded)
        for item in encoded:
            for response in item.responses:
                assert len(item.prompt) + len(response) <= 512


@pytest.mark.parametrize("load", [load_rankings, load_dialogues, load_prompts])
@pytest.mark.parametrize("name", SEEDS)
def test_the_other_loaders_take_the_same_rows(load, name):
    good, bad = rows_of(name, seed=1, count=100)
    try:
        found = load([*good, *bad])
    except InputError as error:
        assert len(str(error)) < 2_000
        return
    report = found.report
    assert report.rows == len(good) + len(bad) == report.kept + sum(report.dropped.values())
    assert len(list(found)) == report.records


@pytest.mark.parametrize("seed", range(100))
def test_rows_of_nothing_but_garbage_are_refused_in_a_sentence(seed):
    rng = random.Random(seed)
    names = [key for row in SEEDS.values() for key in row]
    rows = [
        {rng.choice(names): rng.choice(GARBAGE) for _ in range(rng.randint(0, 6))}
        for _ in range(rng.randint(1, 50))
    ]
    try:
        report = load_preferences(rows).report
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 5_000
    else:
        assert report.rows == report.kept + sum(report.dropped.values())


def test_lines_of_a_file_are_counted_too(tmp_path):
    path, huge = tmp_path / "rows.jsonl", "x" * 10_000_000
    lines = [
        json.dumps(SEEDS["strings"]),
        json.dumps({**SEEDS["strings"], "chosen": huge}),
        json.dumps({**SEEDS["strings"], "chosen": None}),
        json.dumps({**SEEDS["strings"], "chosen": deep(400)}),
        '{"prompt": "q", "chosen": "\\ud800", "rejected": "b"}',
        '{"prompt": ' + "[" * 200_000 + "]" * 200_000 + ', "chosen": "a", "rejected": "b"}',
        "[1, 2]",
        "3",
        "null",
    ]
    path.write_text("\n".join(lines))
    pairs = load_preferences(path)
    assert pairs.report.rows == 9 and len(pairs) == 2 and len(pairs[1].chosen[0].content) == 10**7
    assert sum(pairs.report.dropped.values()) == 7
    assert {where.rpartition(":")[2] for where in pairs.report.dropped_at.values()} <= set(
        "3456789"
    )
