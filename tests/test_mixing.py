"""Several sources of pairs as one: whose share of the loss is what was asked for."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefopt import DPO, InputError, Message, Pair, Policy, encode_pairs, load_preferences, pack
from prefopt.data.mixing import mix


def pairs(n, mark=""):
    def say(role, text):
        return [Message(role, text)]

    return [
        Pair(say("user", f"{mark}{i}?"), say("assistant", f"yes {mark}"), say("assistant", "no"))
        for i in range(n)
    ]


def test_it_is_the_sources_one_after_the_other():
    mixed = mix({"a": pairs(2, "a"), "b": pairs(3, "b")})
    assert len(mixed) == 5
    assert [p.prompt[0].content for p in mixed] == ["a0?", "a1?", "b0?", "b1?", "b2?"]
    assert [p.source for p in mixed] == ["a", "a", "b", "b", "b"]
    assert [p.weight for p in mixed] == [1.0] * 5
    assert mixed[-1] == mixed[4] and mixed[1:3] == [mixed[1], mixed[2]]
    for bad in (5, -6):
        with pytest.raises(IndexError):
            mixed[bad]


def test_a_spool_stays_where_it_is():
    spool = load_preferences([{"prompt": f"{i}", "chosen": "a", "rejected": "b"} for i in range(3)])
    mixed = mix({"one": spool}, {"one": 5})
    assert [p.weight for p in mixed] == [1.0] * 3 and mixed[2].prompt == spool[2].prompt


@given(
    st.lists(st.tuples(st.integers(1, 6), st.floats(0.01, 100)), min_size=1, max_size=4),
    st.integers(0, 9),
)
def test_the_mean_loss_is_the_weighted_sum_of_the_sources_means(parts, seed):
    sources = {f"s{i}": pairs(n, f"s{i}") for i, (n, _) in enumerate(parts)}
    mixed = mix(sources, {f"s{i}": w for i, (_, w) in enumerate(parts)})
    losses = np.random.default_rng(seed).normal(size=len(mixed))
    got = float(np.mean([p.weight * x for p, x in zip(mixed, losses, strict=True)]))
    names = np.array([p.source for p in mixed])
    total = sum(w for _, w in parts)
    want = sum(w / total * losses[names == f"s{i}"].mean() for i, (_, w) in enumerate(parts))
    assert math.isclose(got, want, rel_tol=1e-9, abs_tol=1e-12)


def test_weights_that_are_there_are_kept():
    heavy = [replace(p, weight=3.0) for p in pairs(2)]
    assert [p.weight for p in mix({"a": heavy, "b": pairs(2)}, {"a": 1, "b": 1})] == [3, 3, 1, 1]


def test_the_weights_reach_the_loss(tiny_model):
    """The mean loss of the objective, on a batch, is the weighted sum over the sources."""
    policy = Policy.from_pretrained(tiny_model, dtype="float32")
    sources = {"a": pairs(2, "cats"), "b": pairs(3, "dogs")}

    def losses(data):
        encoded = encode_pairs(data, policy.tokenizer)
        (batch,) = pack(encoded, max_tokens=10_000, layout=policy.layout)
        batch = replace(batch, ref_logprobs=torch.full((len(batch.targets),), -5.0))
        total, count, _ = DPO(beta=1.0)(policy, batch)
        return total.item() / count

    want = 0.75 * losses(sources["a"]) + 0.25 * losses(sources["b"])
    got = losses(mix(sources, {"a": 3, "b": 1}))
    assert got == pytest.approx(want, rel=1e-6)
    assert got != pytest.approx(losses(mix(sources)), rel=1e-3)


def test_a_pair_keeps_its_weight_on_the_spool_and_when_encoded(tiny_model):
    from transformers import AutoTokenizer

    given = [replace(p, weight=0.25) for p in pairs(2)]
    loaded = load_preferences(given)
    assert [p.weight for p in loaded] == [0.25, 0.25]
    encoded = encode_pairs(loaded, AutoTokenizer.from_pretrained(tiny_model))
    assert [item.weight for item in encoded] == [0.25, 0.25]


def test_the_report_sums_up_the_parts():
    rows: list[dict] = [{"prompt": "p", "chosen": "a", "rejected": r} for r in ("b", "a", "a")]
    rows.append({"prompt": "p", "chosen": None, "rejected": "b"})
    report = mix({"x": load_preferences(rows), "y": pairs(2)}, {"x": 1, "y": 3}).report
    assert report.rows == 6 and report.kept == 3
    assert report.dropped == {"x: identical": 2, "x: 'chosen' is null": 1}
    assert report.dropped_at == {"x: identical": "[1]", "x: 'chosen' is null": "[3]"}
    assert report.rows == report.kept + sum(report.dropped.values())
    text = "\n".join(report.lines())
    assert "x (list of rows) as plain strings; y (pairs) as pairs" in text
    assert "x: 1 pairs, each weighing 0.75" in text and "y: 2 pairs, each weighing 1.125" in text


@pytest.mark.parametrize(
    ("sources", "weights", "message"),
    [
        ({}, None, "no source of pairs"),
        ({"a": []}, None, "'a' holds no pairs"),
        ({"helpful": pairs(1)}, {"helpfull": 1}, r"'helpfull' \(nearest: 'helpful'\)"),
        ({"a": pairs(1), "b": pairs(1)}, {"a": 1}, "the source 'b' has no weight"),
        ({"a": pairs(1)}, {"a": 0}, "weight of the source 'a' is 0; give one above 0"),
        ({"a": pairs(1)}, {"a": -1.5}, "is -1.5"),
        ({"a": pairs(1)}, {"a": float("nan")}, "is nan"),
        ({"a": pairs(1)}, {"a": float("inf")}, "is inf"),
        ({"a": pairs(1)}, {"a": "2"}, "is '2'"),
        ({"a": pairs(1)}, {"a": True}, "is True"),
    ],
)
def test_bad_mixtures(sources, weights, message):
    with pytest.raises(InputError, match=message):
        mix(sources, weights)
