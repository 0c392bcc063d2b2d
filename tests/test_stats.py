"""Bootstrap intervals against brute force and simulation; the preference summary by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt import stats
from prefopt.stats import bootstrap_ci, preference_summary

# Multiples of 1/4: their sums are exact, so equality below does not depend on summation order.
quarters = st.integers(-40, 40).map(lambda k: k / 4)
rows = st.lists(st.tuples(quarters, st.integers(0, 5)), min_size=2, max_size=25)


def brute_force(values, clusters, statistic, resamples, seed):
    """Copies the rows of the drawn clusters and calls numpy's mean or median: the definition."""
    groups = [values[clusters == label] for label in np.unique(clusters)]
    groups.sort(key=lambda group: (group.sum(), len(group)))
    rng, drawn = np.random.default_rng(seed), []
    for picks in rng.integers(0, len(groups), (resamples, len(groups))):
        drawn.append(getattr(np, statistic)(np.concatenate([groups[i] for i in picks])))
    return tuple(np.quantile(drawn, [0.025, 0.975]))


@given(rows, st.sampled_from(["mean", "median"]), st.integers(0, 3))
def test_equals_resampling_by_copying(data, statistic, seed):
    values, clusters = (np.array(column) for column in zip(*data, strict=True))
    got = bootstrap_ci(values, clusters, statistic=statistic, resamples=40, seed=seed)
    if len(set(clusters)) == 1:
        assert all(math.isnan(bound) for bound in got)
    else:
        assert got == pytest.approx(brute_force(values, clusters, statistic, 40, seed), abs=1e-12)


@given(rows, st.randoms(use_true_random=False), st.sampled_from(["mean", "median"]))
def test_order_of_rows_does_not_matter(data, random, statistic):
    shuffled = random.sample(data, len(data))
    results = []
    for version in (data, shuffled):
        values, clusters = (np.array(column) for column in zip(*version, strict=True))
        # no rounding to 1/4 here: summation order must not matter either
        results.append(bootstrap_ci(np.sin(values), clusters, statistic=statistic, resamples=30))
    assert results[0] == results[1] or all(math.isnan(x) for pair in results for x in pair)


@given(rows)
def test_one_cluster_a_row_is_no_clusters(data):
    values = np.sin([value for value, _ in data])
    labels = np.random.default_rng(0).permutation(len(values)).astype(str)
    assert bootstrap_ci(values, labels, resamples=50) == bootstrap_ci(values, resamples=50)


def test_long_inputs_are_resampled_in_blocks(monkeypatch):
    values = np.random.default_rng(0).normal(size=200)
    whole = bootstrap_ci(values, np.arange(200) // 2, resamples=64, statistic="median")
    monkeypatch.setattr(stats, "_CELLS", 700)
    assert bootstrap_ci(values, np.arange(200) // 2, resamples=64, statistic="median") == whole


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_coverage_on_clustered_data(statistic):
    """True value 0, rows of a prompt share a large effect. 95% intervals over prompts cover it
    about 95% of the time; intervals that take rows for independent are far too narrow."""
    rng = np.random.default_rng(7)
    clusters = np.repeat(np.arange(50), 6)
    hits = {True: 0, False: 0}
    for trial in range(200):
        values = rng.normal(size=50)[clusters] + 0.3 * rng.normal(size=300)
        for clustered in hits:
            labels = clusters if clustered else None
            low, high = bootstrap_ci(values, labels, statistic=statistic, resamples=200, seed=trial)
            hits[clustered] += low <= 0 <= high
    assert 0.88 <= hits[True] / 200 <= 0.99
    assert hits[False] / 200 < 0.75


def test_width_follows_the_standard_error():
    values = np.random.default_rng(3).normal(size=2000)
    low, high = bootstrap_ci(values)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / math.sqrt(2000), rel=0.08)
    assert low < values.mean() < high
    narrow = bootstrap_ci(values, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_deterministic_and_seeded():
    values = np.random.default_rng(3).normal(size=50)
    assert bootstrap_ci(values) == bootstrap_ci(values)
    assert bootstrap_ci(values) != bootstrap_ci(values, seed=1)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"values": []}, "shape"),
        ({"values": [1.0, math.nan]}, "finite"),
        ({"values": [[1.0]]}, "shape"),
        ({"values": [1.0, 2.0], "clusters": [1]}, "one label a value"),
        ({"values": [1.0, 2.0], "statistic": "mode"}, "'mean' or 'median'"),
        ({"values": [1.0, 2.0], "confidence": 95}, "between 0 and 1"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        bootstrap_ci(**arguments)


def test_summary_by_hand():
    margins = np.array([2.0, 0.0, -1.0, 3.0, 0.5])
    chosen, rejected = np.array([9, 9, 5, 4, 7]), np.array([3, 3, 8, 9, 7])
    summary = preference_summary(margins, chosen, rejected, np.array(["a", "a", "b", "c", "d"]))
    assert summary["n"] == 5 and summary["prompts"] == 4 and summary["ties"] == 1
    assert summary["accuracy"] == 0.6, "the tie is not right, and not half right"
    assert summary["margin_mean"] == pytest.approx(0.9)
    assert summary["margin_median"] == 0.5
    assert summary["margin_quantiles"]["0.25"] == 0.0
    assert (summary["n_chosen_longer"], summary["n_chosen_shorter"]) == (2, 2)
    assert summary["accuracy_chosen_longer"] == 0.5
    assert summary["accuracy_chosen_shorter"] == 0.5
    assert summary["accuracy_low"] <= 0.6 <= summary["accuracy_high"]
    assert summary["margin_low"] <= 0.9 <= summary["margin_high"]


@given(rows)
def test_summary_does_not_depend_on_row_order(data):
    margins, prompts = (np.array(column) for column in zip(*data, strict=True))
    lengths = np.abs(prompts * 3 - 4)
    forward = preference_summary(margins, lengths, prompts, prompts)
    back = preference_summary(margins[::-1], lengths[::-1], prompts[::-1], prompts[::-1])
    assert forward == back
    flipped = preference_summary(-margins, lengths, prompts, prompts)
    assert flipped["accuracy"] + forward["accuracy"] == pytest.approx(
        1 - forward["ties"] / len(data)
    )


def test_summary_of_a_policy_that_is_its_reference():
    zeros, lengths = np.zeros(4), np.arange(4)
    summary = preference_summary(zeros, lengths, lengths, np.arange(4))
    assert summary["accuracy"] == 0 and summary["ties"] == 4
    assert summary["accuracy_chosen_longer"] is None


def test_summary_of_one_prompt_has_no_interval():
    summary = preference_summary(np.ones(3), np.ones(3), np.ones(3), np.zeros(3))
    assert summary["accuracy"] == 1
    for name in ("accuracy_low", "accuracy_high", "margin_low", "margin_high"):
        assert summary[name] is None


@pytest.mark.parametrize("margins", [[], [1.0, math.inf]])
def test_summary_refuses_nothing_and_non_finite(margins):
    ones = np.ones(len(margins))
    with pytest.raises(ValueError, match="at least one pair"):
        preference_summary(np.array(margins), ones, ones, ones)
