"""Alarms of an online run: silent on noise, loud on the planted fault, said once, resumed."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.errors import InputError
from prefopt.online_checks import CLEAR, Watch, repetition
from prefopt.online_findings import CHECKS, RISE
from prefopt.online_history import RECENT, apart, trend


def healthy(step, rng):
    """A run that learns well: its score rises, KL and length with it, all with noise."""
    done = min(1.0, step / 200)
    return {
        "step": step,
        "objective/scores": 0.5 + done + rng.normal(0, 0.15),
        "objective/scores_std": 0.8 + rng.normal(0, 0.05),
        "objective/held_out_scores": 0.3 + 0.5 * done + rng.normal(0, 0.15),
        "objective/kl": (0.0 if step == 1 else 4 * done + rng.normal(0, 0.15)),
        "objective/kl_token": (0.0 if step == 1 else 0.08 * done + rng.normal(0, 0.003)),
        "objective/kl_k3": 4 * done if step > 1 else 0.0,
        "objective/entropy": 2.0 - 0.8 * done + rng.normal(0, 0.05),
        "policy/ratio_first": 1e-6,
        "policy/clipfrac": 0.12 + rng.normal(0, 0.03),
        "value/explained_variance": 0.5 * done + rng.normal(0, 0.15),
        "lengths/mean": 50 * (1 + 0.2 * done) + rng.normal(0, 3),
        "lengths/stop_rate": 0.85 + rng.normal(0, 0.05),
        "groups/zero_variance": 0.3 + rng.normal(0, 0.08),
        "rollout/logprob_gap_mean": 2e-6,
        "rollout/logprob_gap_max": 2e-5,
        "repetition": 0.04 + rng.normal(0, 0.02),
    }


def run(rows, **options):
    watch = Watch(**options)
    return [finding for row in rows for finding in watch.update(row)]


def planted(change, steps=120, seed=0):
    rng = np.random.default_rng(seed)
    return [(row := healthy(step, rng)) | change(step, row, rng) for step in range(1, steps + 1)]


def names(findings):
    return [finding.name for finding in findings]


# ---------------------------------------------------------------- silence


def test_a_healthy_run_raises_nothing():
    """12 runs of 250 updates: 3000 updates, each under all checks."""
    assert len(CHECKS) == 14
    for seed in range(12):
        rng = np.random.default_rng(seed)
        rows = [healthy(step, rng) for step in range(1, 251)]
        assert run(rows, kl_target=4.0) == []


def test_noise_around_no_kl_is_no_negative_kl():
    """A policy that does not move: the estimate is noise around 0, below it half of the time."""
    alarms = 0
    for seed in range(40):
        kl = np.random.default_rng(seed).normal(0, 1, 300)
        rows = [
            {"step": i + 1, "objective/kl": x, "objective/kl_token": x / 50}
            for i, x in enumerate(kl)
        ]
        alarms += bool(run(rows))
    assert alarms <= 1


@pytest.mark.parametrize("lingers", [0.0, 0.3])
def test_noise_of_the_held_out_reward_is_no_hacking(lingers):
    """Its score rises steadily, what is held out only wanders: 20 runs of 300 updates."""
    alarms = 0
    for seed in range(20):
        rng, noise, rows = np.random.default_rng(seed), 0.0, []
        for step in range(1, 301):
            noise = lingers * noise + rng.normal()
            scores = {"objective/scores": step / 10, "objective/held_out_scores": noise}
            rows.append({"step": step} | scores)
        alarms += "reward_hacking" in names(run(rows))
    assert alarms == 0


def test_a_trend_is_not_seen_in_noise_that_lingers():
    """4000 windows of autoregressive noise. A t statistic of 4 is for one in 3000 if it does not
    linger; with a correlation of one half it is passed 36 times without the term in 1 / n."""
    for lingers, most in ((0.0, 2), (0.5, 28)):
        noise = np.random.default_rng(0).normal(size=(4000, RECENT))
        noise[:, 0] /= math.sqrt(1 - lingers**2)
        for i in range(1, RECENT):
            noise[:, i] += lingers * noise[:, i - 1]
        seen = sum(abs(trend(window)) > RISE for window in noise)
        assert seen <= most, f"{seen} of 4000 at correlation {lingers}"


def test_rows_that_lack_metrics_or_hold_nan_are_no_reason_to_stop():
    assert (
        run([{"step": 1}, {"step": 2, "loss": 0.5}, {"step": 3, "objective/kl": None}] * 30) == []
    )
    row = healthy(7, np.random.default_rng(0))
    for broken in (math.nan, math.inf, None, "much", True):
        assert run([dict.fromkeys(row, broken) | {"step": step} for step in range(1, 41)]) == []


# ---------------------------------------------------------------- planted faults

FAULTS = {
    "ratio": lambda step, row, rng: {"policy/ratio_first": 0.3 if step > 50 else 0.0},
    "kl_at_start": lambda step, row, rng: {"objective/kl_k3": 3.0} if step == 1 else {},
    "negative_kl": lambda step, row, rng: {
        "objective/kl": -2 + rng.normal(0, 0.5),
        "objective/kl_token": -0.04,
    },
    "sampler_gap": lambda step, row, rng: {"rollout/logprob_gap_mean": 0.05},
    "no_stop": lambda step, row, rng: {"lengths/stop_rate": 0.01},
    "stops_fall": lambda step, row, rng: {
        "lengths/stop_rate": 0.9 - 0.4 * min(1, step / 60) + rng.normal(0, 0.05)
    },
    "zero_variance": lambda step, row, rng: {"groups/zero_variance": 0.85},
    "explained_variance": lambda step, row, rng: {
        "value/explained_variance": -0.3 + rng.normal(0, 0.2)
    },
    "entropy": lambda step, row, rng: {"objective/entropy": 2 * math.exp(-step / 20)},
    "clip_fraction": lambda step, row, rng: {"policy/clipfrac": 0.5},
    "kl_budget": lambda step, row, rng: {"objective/kl": 0.2 * step},
    "reward_hacking": lambda step, row, rng: {
        "objective/held_out_scores": 2 - 0.02 * step + rng.normal(0, 0.1)
    },
    "length_drift": lambda step, row, rng: {"lengths/mean": 40 + step + rng.normal(0, 4)},
    "repetition": lambda step, row, rng: {"repetition": min(0.5, 0.01 * step)},
}


def test_every_check_has_a_fault_that_trips_it():
    assert set(FAULTS) == set(CHECKS)


@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_is_found_and_no_other(name):
    found = run(planted(FAULTS[name]), kl_target=4.0)
    assert set(names(found)) == {name}, found
    for finding in found:
        assert finding.message.endswith(".") and finding.remedy.endswith(".")
        assert any(c.isdigit() for c in finding.message), "a figure says how bad it is"
        assert json.loads(json.dumps(finding._asdict()))["step"] == finding.step


def test_the_same_score_for_everything_is_said():
    rows = planted(lambda step, row, rng: {"objective/scores_std": 0.0, "objective/scores": 0.0})
    found = [f for f in run(rows) if f.name == "zero_variance"]
    assert "the same score, 0," in found[0].message and found[0].step == 3


def test_slow_hacking_is_found_over_the_whole_run():
    """Too slow for a window of 32 updates, whose noise is three times the fall in it."""

    def slow(step, row, rng):
        scores = {"objective/scores": 0.01 * step, "objective/held_out_scores": -0.01 * step}
        return {name: value + rng.normal(0, 1) for name, value in scores.items()}

    found = [f for f in run(planted(slow, 1200)) if f.name == "reward_hacking"]
    assert found and "Over the last" in found[0].message
    assert found[0].step > 2 * RECENT


def test_hacking_needs_both():
    def both_fall(step, row, rng):
        return {
            name: -step + rng.normal() for name in ("objective/scores", "objective/held_out_scores")
        }

    assert "reward_hacking" not in names(run(planted(both_fall)))


def test_shorter_is_drift_too():
    found = run(planted(lambda step, row, rng: {"lengths/mean": max(8, 50 - step)}))
    assert names(found)[0] == "length_drift" and "shorter: 46 tokens" in found[0].message


# ---------------------------------------------------------------- how often it is said


def ratios(values):
    return [
        f.step
        for f in run([{"step": i + 1, "policy/ratio_first": v} for i, v in enumerate(values)])
    ]


def test_said_once_and_again_when_twice_as_bad():
    assert ratios([0.1] * 50) == [1]
    assert ratios([0.1, 0.19, 0.2, 0.39, 0.4]) == [1, 3, 5]


def test_said_again_when_it_comes_back_after_a_clear_stretch():
    assert ratios([0.1] + [0.0] * CLEAR + [0.1]) == [1, CLEAR + 2]
    assert ratios([0.1] + [0.0] * (CLEAR - 1) + [0.1]) == [1]
    assert ratios([0.1, *[0.0] * (CLEAR - 1), 0.1, *[0.0] * (CLEAR - 1), 0.1]) == [1]


def test_rounding_is_allowed_for_by_dtype():
    for dtype, fine, bad in (
        ("float32", 9e-5, 2e-4),
        ("float16", 0.09, 0.2),
        ("torch.bfloat16", 0.7, 1.5),
    ):
        assert run([{"step": 1, "policy/ratio_first": fine}], dtype=dtype) == []
        assert names(run([{"step": 1, "policy/ratio_first": bad}], dtype=dtype)) == ["ratio"]
    with pytest.raises(InputError, match=r"float8.*float32"):
        Watch(dtype="float8")


def test_kl_at_the_start_is_asked_of_the_first_update_only():
    row = {"objective/kl_k3": 2.0, "lengths/mean": 50.0, "objective/kl": 2.0}
    assert names(run([{"step": 1} | row])) == ["kl_at_start"]
    assert run([{"step": 2} | row]) == []
    assert run([{"step": 1} | row | {"objective/kl_k3": 3e-4}]) == [], "rounding, over 50 tokens"


def test_the_budget_is_the_target_or_half_a_nat_per_token():
    rows = [{"step": i, "objective/kl": 5.0, "objective/kl_token": 0.1} for i in range(1, 20)]
    assert run(rows, kl_target=4.0) == run(rows) == []
    assert names(run(rows, kl_target=3.0)) == ["kl_budget"]
    wide = [row | {"objective/kl_token": 0.6} for row in rows]
    assert names(run(wide)) == ["kl_budget"] and run(wide, kl_target=4.0) == []


# ---------------------------------------------------------------- state


@settings(max_examples=20)
@given(st.integers(0, 150), st.sampled_from(sorted(FAULTS)))
def test_a_watch_restored_from_json_goes_on_to_the_bit(cut, name):
    rows = planted(FAULTS[name], steps=150, seed=3)
    whole, first, second = Watch(kl_target=4.0), Watch(kl_target=4.0), Watch(kl_target=4.0)
    said = [finding for row in rows for finding in whole.update(row)]
    before = [finding for row in rows[:cut] for finding in first.update(row)]
    second.restore(json.loads(json.dumps(first.state(), allow_nan=False)))
    assert before + [finding for row in rows[cut:] for finding in second.update(row)] == said
    assert second.state() == whole.state()


def test_a_state_is_of_its_moment():
    watch, rng = Watch(), np.random.default_rng(0)
    ratio = {"policy/ratio_first": 0.2}
    for step in range(1, 70):
        watch.update(healthy(step, rng) | ratio)
    state = watch.state()
    text = json.dumps(state)
    other = Watch()
    other.restore(state)
    for step in range(70, 90):
        watch.update(healthy(step, rng))
        other.update(healthy(step, rng))
    assert json.dumps(state) == text
    history = state["history"]
    kept = [*history["start"].values(), *history["recent"].values(), history["both"]]
    assert max(map(len, kept)) <= RECENT and len(history["stretches"]) < 2 * RECENT


# ---------------------------------------------------------------- repetition, trend


@given(st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=5), st.integers(1, 4))
def test_repetition_against_a_count(rows, n):
    grams = [[tuple(row[i : i + n]) for i in range(len(row) - n + 1)] for row in rows]
    total, distinct = sum(map(len, grams)), sum(len(set(g)) for g in grams)
    expected = 1 - distinct / total if total else 0.0
    assert repetition(rows, n) == expected


def test_repetition_by_hand():
    assert repetition([[1, 2, 3, 4, 5, 6]]) == 0
    assert repetition([[7] * 13]) == pytest.approx(0.9)
    assert repetition([[1, 2, 3, 4], [1, 2, 3, 4]]) == 0, "another response is no repetition"
    assert repetition([np.array([1, 2, 3], dtype=np.int32), []]) == 0


@given(st.lists(st.floats(-10, 10), min_size=8, max_size=32), st.floats(0.1, 5), st.floats(-5, 5))
def test_trend_knows_no_units(values, scale, shift):
    y = np.round(np.array(values), 3)
    if np.ptp(y) < 0.1 or abs(trend(y)) > 1e4:
        return
    assert trend(scale * y + shift) == pytest.approx(trend(y), rel=1e-5, abs=1e-6)
    assert trend(-y) == pytest.approx(-trend(y), rel=1e-9, abs=1e-9)


def test_trend_is_the_t_statistic_of_the_slope():
    """Against least squares written out, on noise whose residuals do not linger."""
    x = np.arange(16.0)
    y = 0.3 * x + np.where(x % 2, 1.0, -1.0)
    design = np.stack([np.ones(16), x], 1)
    beta, rest, *_ = np.linalg.lstsq(design, y, rcond=None)
    error = math.sqrt(rest[0] / 14 * np.linalg.inv(design.T @ design)[1, 1])
    assert trend(y) == pytest.approx(beta[1] / error, rel=1e-9)


def test_trend_of_what_does_not_move_or_moves_exactly():
    assert trend([0.1] * 20) == trend([1, 2, 3]) == 0
    assert trend(np.arange(20.0)) == math.inf and trend(-np.arange(20.0)) == -math.inf
    assert RISE < trend(np.arange(RECENT) * 0.3 + np.random.default_rng(0).normal(size=RECENT))


def test_apart_is_welchs_statistic():
    a, b = [1.0, 2.0, 4.0], [5.0, 9.0, 7.0, 7.0]
    expected = (7 - 7 / 3) / math.sqrt((7 / 3) / 3 + (8 / 3) / 4)
    assert apart(a, b) == pytest.approx(expected)
    assert apart([1, 1], [1, 1]) == 0 and apart([1, 1], [2, 2]) == math.inf
