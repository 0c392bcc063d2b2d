"""What rewards are given besides prompts and responses: columns of the data, and tokens."""

import datetime
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefopt import InputError, Message, Policy, TrainConfig
from prefopt.data.prompts import columns_of, load_prompts
from prefopt.metrics import Progress
from prefopt.pair_making import make_pairs
from prefopt.rewards import (
    Scored,
    check_columns,
    check_reward,
    load_rewards,
    score,
    score_tokens,
    takes_tokens,
)
from prefopt.rounds import iterate
from prefopt.sampling import Sampler, answer_all
from prefopt.stop import StopSignal


def ask(text):
    return [Message("user", text)]


PROMPTS = [ask("2 + 2?"), ask("2 + 2?"), ask("3 + 3?")]
RESPONSES = ["4", "5", "6"]
COLUMNS = {"answer": ["4", "4", "6"], "level": [1, 1, 2]}


def right(prompts, responses, answer):
    return [float(a == r) for a, r in zip(answer, responses, strict=True)]


# -- columns


def test_a_function_gets_the_columns_it_names():
    def keyword(prompts, responses, *, level):
        return level

    def all_of_them(prompts, responses, **columns):
        assert columns == COLUMNS
        return columns["level"]

    def some(prompts, responses, answer, **others):
        assert answer == COLUMNS["answer"] and others == {"level": [1, 1, 2]}
        return [0, 0, 0]

    def none(prompts, responses):
        return [7, 7, 7]

    def perhaps(prompts, responses, answer=None, hint="x"):
        assert answer == COLUMNS["answer"] and hint == "x"
        return [1, 1, 1]

    class Judge:
        def __call__(self, questions, texts, answer):
            return right(questions, texts, answer)

    cases = ((right, [1, 0, 1]), (keyword, [1, 1, 2]), (all_of_them, [1, 1, 2]), (some, [0] * 3))
    for reward, want in (*cases, (none, [7] * 3), (perhaps, [1] * 3), (Judge(), [1, 0, 1])):
        check_reward(reward, "r")
        assert score(reward, "r", PROMPTS, RESPONSES, COLUMNS) == want
    assert score(none, "r", PROMPTS, RESPONSES) == [7] * 3


def test_a_column_that_the_data_lacks():
    message = (
        r"reward 'right' asks for the column 'answer', which the rows of the prompts do not have "
        r"\(did you mean 'answers'\?\); their other columns: answers, level"
    )
    with pytest.raises(InputError, match=message):
        score(right, "right", PROMPTS, RESPONSES, {"answers": ["4"] * 3, "level": [1] * 3})
    with pytest.raises(InputError, match="their other columns: none"):
        score(right, "right", PROMPTS, RESPONSES)
    with pytest.raises(InputError, match=message):  # before anything is sampled
        check_columns({"n": lambda p, r: [], "right": right}, ["answers", "level"])
    check_columns({"n": lambda p, r: [], "right": right}, ["answer"])


def test_what_can_be_given_in_no_way():
    def third(prompts, responses, answer, /):
        return []

    with pytest.raises(InputError, match=r"takes \(prompts, responses, answer, /\)"):
        check_reward(third, "r")
    with pytest.raises(InputError, match="takes"):
        check_reward(lambda responses, *, answer: [], "r")


def test_an_exception_names_the_sample_whose_column_it_is():
    def divide(prompts, responses, answer, **rest):
        return [1 / (len(a) - 2 * len(x)) for a, x in zip(answer, rest["more"], strict=True)]

    columns = {"answer": ["aaa", "bb", "ccc"], "more": ["x", "y", "z"]}
    with pytest.raises(InputError, match=r"failed for the response '5' to the prompt '2 \+ 2\?'"):
        score(divide, "r", PROMPTS, RESPONSES, columns)


def test_prompts_keep_the_other_columns_of_their_rows():
    rows = [
        {"prompt": "a", "answer": "1", "level": {"n": [1, 2]}, "system": "S", "tokens": 9},
        {"prompt": " ", "answer": "dropped"},
        {"prompt": "b", "answer": math.nan, "when": datetime.date(2026, 1, 2)},
        {"prompt": "a", "answer": "another", "system": "S"},  # the same prompt again
        {"prompt": "c", "answer": np.arange(3), "source": "web", "half": "\ud800"},
    ]
    prompts = load_prompts(rows)
    assert [prompt[-1].content for prompt in prompts] == ["a", "b", "c"]
    assert prompts.columns(0) == {"answer": "1", "level": {"n": [1, 2]}}
    assert math.isnan(prompts.columns(1)["answer"]) and prompts.columns(1)["when"] == "2026-01-02"
    assert prompts.columns(-1) == {"answer": [0, 1, 2], "source": "web", "half": "\ud800"}
    assert [*prompts.names] == ["answer", "level", "when", "source", "half"]
    assert prompts.report.rows == 5 and prompts.report.kept == 3
    found = columns_of(prompts, [2, 0, 0])
    assert found["answer"] == [[0, 1, 2], "1", "1"] and found["source"] == ["web", None, None]
    assert all(len(values) == 3 for values in found.values())


@pytest.mark.parametrize(
    ("row", "rest"),
    [
        ({"question": "q", "answer": "42"}, {"answer": "42"}),
        ({"instruction": "i", "input": "x", "output": "o"}, {"output": "o"}),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "gold": 1}, {"gold": 1}),
        ({"messages": [{"role": "user", "content": "m"}], "answer": "1"}, {"answer": "1"}),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2.0, "source": "s"},
            {"margin": 2.0, "source": "s"},
        ),
    ],
)
def test_what_the_prompt_was_read_from_is_no_column(row, rest):
    assert load_prompts([row]).columns(0) == rest


def test_a_renamed_prompt_is_no_column_either():
    prompts = load_prompts([{"ask": "a", "prompt": "no", "answer": 1}], columns={"prompt": "ask"})
    assert prompts.columns(0) == {"answer": 1}


def test_what_was_no_row_has_no_columns(tmp_path):
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    for source in (["a", "b"], [ask("a"), ask("b")], tmp_path / "p.txt"):
        prompts = load_prompts(source)
        assert prompts.columns(1) == {} and columns_of(prompts, [0, 1]) == {}
    assert columns_of([ask("a")], [0]) == {}


def test_columns_of_a_file(tmp_path):
    rows = [{"question": f"{n} + {n}?", "answer": str(2 * n)} for n in range(50)]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = load_prompts(path)
    asked = [prompts[n] for n in (3, 3, 4)]
    assert score(right, "r", asked, ["6", "7", "8"], columns_of(prompts, (3, 3, 4))) == [1, 0, 1]


def test_pairs_are_judged_with_the_columns_of_their_rows():
    rows = [
        {"prompt": "2 + 2?", "responses": ["3", "4"], "answer": "4"},
        {"prompt": "3 + 3?", "responses": ["6", "7"], "answer": "6"},
    ]
    pairs = make_pairs(rows, right, quiet=True)
    assert [pair["chosen"][-1]["content"] for pair in pairs] == ["4", "6"]
    with pytest.raises(InputError, match="asks for the column 'answer'"):
        make_pairs(
            [{k: row[k] for k in ("prompt", "responses")} for row in rows], right, quiet=True
        )


def test_rounds_judge_with_the_columns_of_their_prompts(tiny_model, tmp_path):
    rows = [{"prompt": f"Tell me {n}", "answer": n} for n in range(3)]
    prompts, policy = load_prompts(rows), Policy.from_pretrained(tiny_model)

    def numbers(asked, responses, answer):
        assert [turns[-1].content for turns in asked] == [f"Tell me {n}" for n in answer]
        return answer

    path, columns = tmp_path / "a.jsonl", partial(columns_of, prompts)
    sampler = Sampler(n=2, temperature=1.0, max_new_tokens=3, template="auto", seed=0)
    with Progress(quiet=True) as progress, StopSignal() as stop:
        answers = answer_all(
            policy, {2: prompts[2], 1: prompts[1]}, {"n": numbers}, sampler, path, (0,),
            progress, stop, columns=columns,
        )  # fmt: skip
    assert [answer.scores for answer in answers] == [{"n": [2.0, 2.0]}, {"n": [1.0, 1.0]}]
    config = TrainConfig(str(tmp_path / "out"))
    with pytest.raises(InputError, match="asks for the column 'answer'"):
        iterate(str(tiny_model), ["a", "b"], numbers, config, rounds=1, quiet=True)
    assert not (tmp_path / "out").exists()


# -- tokens

TOKENS = [["4"], ["5", ".", "</s>"], ["6", "!"]]


def per_token(prompts, responses, tokens):
    return [[float(len(token)) for token in each] for each in tokens]


def test_numbers_per_token_and_per_response():
    def both(prompts, responses, tokens, answer):
        return [1.5, np.array([1.0, 2.0, 3.0]), torch.tensor([0.25, 0.5])]

    assert takes_tokens(both) and not takes_tokens(right) and not takes_tokens(dict)
    got = score_tokens(both, "r", PROMPTS, RESPONSES, COLUMNS, TOKENS)
    assert got == Scored([1.5, 0.0, 0.0], [None, [1.0, 2.0, 3.0], [0.25, 0.5]])
    assert got.totals == [1.5, 6.0, 0.75]
    rows = torch.tensor([[0.0, 0, 0, 0], [1, 2, 3, 0], [0.25, 0.5, 0, 0]])
    assert torch.equal(got.rows(4), rows)
    plain = score_tokens(right, "r", PROMPTS, RESPONSES, COLUMNS, TOKENS)
    assert plain == Scored([1, 0, 1], [None] * 3) and not plain.rows(2).any()


@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=5), min_size=1, max_size=4))
def test_totals_are_what_is_said_of_all_tokens(numbers):
    n = len(numbers)
    tokens = [["x"] * len(some) for some in numbers]
    got = score_tokens(
        lambda prompts, responses, tokens: numbers, "r", [ask("?")] * n, ["x"] * n, {}, tokens
    )
    assert got.tokens == numbers and got.totals == pytest.approx([math.fsum(s) for s in numbers])


def test_as_many_numbers_as_tokens():
    def short(prompts, responses, tokens):
        return [[0.0], [0.0, 1.0], [0.0, 1.0]]

    message = r"reward 'r' returned 2 numbers for 3 tokens for the response '5' to the prompt '2 \+"
    with pytest.raises(InputError, match=message):
        score_tokens(short, "r", PROMPTS, RESPONSES, {}, TOKENS)


@pytest.mark.parametrize("bad", [math.nan, math.inf, None, "1"])
def test_every_number_of_a_token_is_finite(bad):
    def wrong(prompts, responses, tokens):
        return [[0.0], [0.0, 1.0, bad], 1.0]

    with pytest.raises(InputError, match="no finite number, for the response '5'"):
        score_tokens(wrong, "r", PROMPTS, RESPONSES, {}, TOKENS)


def test_lists_are_for_those_that_look_at_tokens():
    with pytest.raises(InputError, match="no finite number"):
        score_tokens(lambda p, r: [[1.0], [1.0] * 3, 1], "r", PROMPTS, RESPONSES, {}, TOKENS)
    with pytest.raises(InputError, match="asks for the tokens of responses, which are known while"):
        score(per_token, "r", PROMPTS, RESPONSES, COLUMNS)
    with pytest.raises(InputError, match="asks for the tokens"):
        check_columns({"r": per_token}, ["answer"])
    check_columns({"r": per_token}, ["answer"], tokens=True)


def test_an_exception_about_tokens_names_its_sample():
    def wrong(prompts, responses, tokens):
        return [[1 / (3 - len(each))] * len(each) for each in tokens]

    with pytest.raises(InputError, match=r"failed for the response '5' .* ZeroDivisionError"):
        score_tokens(wrong, "r", PROMPTS, RESPONSES, {}, TOKENS)


def test_what_may_be_left_out_is():
    def perhaps(prompts, responses, tokens=None):
        return [0.0 if tokens is None else [1.0] * len(tokens[i]) for i in range(len(responses))]

    (reward,) = load_rewards(perhaps).values()
    assert score(reward, "r", PROMPTS, RESPONSES) == [0.0] * 3
    assert score_tokens(reward, "r", PROMPTS, RESPONSES, {}, TOKENS).totals == [1.0, 3.0, 2.0]
