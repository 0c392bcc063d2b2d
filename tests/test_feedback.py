"""Single labelled responses: what is read, what is dropped and why, and what KTO makes of it."""

import json

import pytest
import torch

from prefopt import InputError, Policy
from prefopt.cli import main
from prefopt.data.encode import BASELINE, DESIRABLE, UNDESIRABLE
from prefopt.data.feedback import load_feedback
from prefopt.data.records import Feedback, Message
from prefopt.objectives.kto import KTO

ROWS = [
    {"prompt": "Say hello.", "completion": "Hello.", "label": True},
    {"prompt": "Say hello.", "completion": "No.", "label": False},
    {"prompt": [{"role": "user", "content": "Add 1 and 1."}], "label": 1,
     "completion": [{"role": "assistant", "content": "2"}]},
    {"prompt": "\n\nHuman: Sing.\n\nAssistant:", "completion": " La la.", "label": "False"},
]  # fmt: skip


def one(role, text):
    return [Message(role, text)]


def test_rows_as_they_come():
    found = load_feedback(ROWS)
    assert list(found) == [
        Feedback(one("user", "Say hello."), one("assistant", "Hello."), True),
        Feedback(one("user", "Say hello."), one("assistant", "No."), False),
        Feedback(one("user", "Add 1 and 1."), one("assistant", "2"), True),
        Feedback(one("user", "Sing."), one("assistant", "La la."), False),
    ]
    assert found.report.notes == ["desirable: 2 of 4"] and found.report.kept == 4


def test_what_is_of_no_use_is_counted():
    bad = [
        {"prompt": "a", "completion": "b", "label": "maybe"},
        {"prompt": "a", "completion": "  ", "label": True},
        {"prompt": 3, "completion": "b", "label": True},
        {"prompt": "a", "completion": None, "label": True},
        {"prompt": "a", "completion": "\ud800", "label": True},
    ]
    report = load_feedback([*ROWS, *bad]).report
    assert (report.rows, report.kept, sum(report.dropped.values())) == (9, 4, 5)
    assert "the label is 'maybe', neither true nor false" in report.dropped
    with pytest.raises(InputError, match=r"No usable response among the 5 rows"):
        load_feedback(bad)


def test_columns():
    rows = [{"q": "a", "reply": "b", "ok": False}]
    (item,) = load_feedback(rows, columns={"prompt": "q", "completion": "reply", "label": "ok"})
    assert item == Feedback(one("user", "a"), one("assistant", "b"), False)
    with pytest.raises(InputError, match="lack 'completion' and 'label'"):
        load_feedback(rows, columns={"prompt": "q"})


@pytest.fixture(scope="module")
def policy(tiny_model):
    torch.manual_seed(0)
    return Policy.from_pretrained(tiny_model)


def test_each_prompt_gets_the_next_ones_response_as_baseline(policy):
    objective = KTO()
    items = objective.encode(load_feedback(ROWS), policy.tokenizer, max_length=64, template="auto")
    labels = [DESIRABLE, UNDESIRABLE, DESIRABLE, UNDESIRABLE]
    assert [item.labels for item in items] == [(label, BASELINE) for label in labels]
    for item, other in zip(items, (2, 2, 3, 0), strict=True):  # the first two ask the same
        assert item.responses[1].tolist() == items[other].responses[0].tolist()
    assert objective.desirable_share == 0.5
    with pytest.raises(InputError, match="two prompts at least"):
        KTO().encode(load_feedback(ROWS[:1]), policy.tokenizer, max_length=64, template="auto")


def test_the_baseline_is_cut_to_fit(policy):
    rows = [
        {**ROWS[0], "prompt": "Say hello to everybody here."},
        {**ROWS[1], "completion": "no " * 40},
    ]
    items = KTO().encode(load_feedback(rows), policy.tokenizer, max_length=60, template="auto")
    assert all(len(item.prompt) + len(r) <= 60 for item in items for r in item.responses)


def test_a_run_on_feedback(tiny_model, tmp_path, capsys):
    file = tmp_path / "feedback.jsonl"
    rows = [
        {"prompt": f"Say {word} please.", "completion": word if good else "no", "label": good}
        for word in "one two three four five six seven eight".split()
        for good in (True, False)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run"
    flags = [
        "--model",
        str(tiny_model),
        "--data",
        str(file),
        "--out",
        str(out),
        "--loss",
        "kto",
        "--loss.desirable_weight",
        "1.2",
        "--lr",
        "1e-2",
        "--epochs",
        "6",
        "--eval_fraction",
        "0.25",
        "--cache",
        str(tmp_path / "cache"),
        "--samples",
        "0",
    ]
    assert main(["dpo", *flags]) == 0
    shown = capsys.readouterr().out
    assert "read as feedback" in shown and "desirable: 8 of 16" in shown
    after = json.loads((out / "evaluation.json").read_text())["after"]
    before = json.loads((out / "evaluation.json").read_text())["before"]
    assert before["loss"] == pytest.approx(0.55) and after["loss"] < 0.5
    assert main(["dpo", *flags[:4], "--out", str(tmp_path / "x"), "--loss", "kto", "--wpo"]) == 2
    assert "kto has none" in capsys.readouterr().err
