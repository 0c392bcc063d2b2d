"""The objective of reward models: loss, metrics, evaluation, training, resuming."""

import dataclasses
import importlib.util
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from prefopt import InputError, LoraConfig, Policy, TrainConfig, load_preferences, pack, train
from prefopt.data.encode import Encoded
from prefopt.data.records import Message, Pair, Ranking
from prefopt.evaluate import evaluate
from prefopt.nn.heads import ScoreStats
from prefopt.objectives.reward import Reward
from prefopt.ranking import bradley_terry
from prefopt.stats import calibration
from prefopt.step import optimizer_step

LORA = LoraConfig(r=4, alpha=8)


def load(path, seed=0, **kwargs) -> Policy:
    torch.manual_seed(seed)
    return Policy.from_pretrained(path, head="score", **kwargs)


@pytest.fixture(scope="module")
def policy(tiny_model) -> Policy:
    return load(tiny_model)


def groups(*sizes, margins=None, weights=None) -> list[Encoded]:
    rng = np.random.default_rng(1)

    def tokens(n):
        return rng.integers(3, 260, n).astype(np.int32)

    margins, weights = margins or [None] * len(sizes), weights or [1.0] * len(sizes)
    return [
        Encoded(
            tokens(rng.integers(1, 9)),
            tuple(tokens(rng.integers(1, 12)) for _ in range(k)),
            i,
            weight=weights[i],
            margin=margins[i],
        )
        for i, k in enumerate(sizes)
    ]


def batches_of(policy, items, max_tokens=1 << 20, layout=None):
    return list(pack(items, max_tokens=max_tokens, layout=layout or policy.layout, ends=True))


def scores_of(policy, items) -> list[list[float]]:
    with torch.no_grad():
        scores = policy(batches_of(policy, items)[0])
    return [s.tolist() for s in scores.split([len(item.responses) for item in items])]


def ranked_loss(scores, center=0.0, margin=0.0):
    """-log of the product of the softmax of each place among those not yet placed."""
    total = center * (2 * sum(scores) / len(scores)) ** 2
    for i in range(len(scores) - 1):
        rest = [s - scores[i] for s in scores[i + 1 :]]
        rest = [r + margin for r in rest]
        total += math.log(1 + sum(map(math.exp, rest)))
    return total


def test_the_loss_is_that_of_a_plain_oracle_over_mixed_groups(policy):
    items = groups(2, 3, 2, 5, weights=[1.0, 2.0, 0.5, 1.0])
    (batch,) = batches_of(policy, items)
    loss, count, _ = Reward(center=0.3)(policy, batch)
    want = sum(
        item.weight * ranked_loss(s, 0.3)
        for item, s in zip(items, scores_of(policy, items), strict=True)
    )
    assert count == 4 and loss.item() == pytest.approx(want, rel=1e-5)


def test_margins_are_scaled_and_missing_ones_are_0(policy):
    items = groups(2, 2, 2, margins=[2.0, None, -1.0])
    (batch,) = batches_of(policy, items)
    loss, _, _ = Reward(margin=0.5)(policy, batch)
    by_hand = zip(scores_of(policy, items), (1.0, 0.0, -0.5), strict=True)
    want = sum(ranked_loss(s, margin=m) for s, m in by_hand)
    assert loss.item() == pytest.approx(want, rel=1e-5)
    plain, _, _ = Reward()(policy, batch)
    assert plain.item() != pytest.approx(want, rel=1e-3)
    with pytest.raises(InputError, match="margins are of pairs"):
        Reward(margin=1.0)(policy, batches_of(policy, groups(2, 3, margins=[1.0, None]))[0])


def test_a_ranking_of_two_is_a_pair_bit_for_bit(policy):
    items = groups(2, 2, 2)
    s = torch.tensor(list(itertools.chain(*scores_of(policy, items))), requires_grad=True)
    both = Reward(center=0.1).losses(s, [2, 2, 2], None)
    three = Reward(center=0.1).losses(torch.cat([s, torch.zeros(3)]), [2, 2, 2, 3], None)[:3]
    assert torch.equal(both, three)
    assert torch.equal(both, bradley_terry(s[::2], s[1::2], center=0.1))
    (a,), (b,) = (torch.autograd.grad(x.sum(), s) for x in (both, three))
    assert (a - b).abs().max() < 1e-7


@pytest.mark.parametrize("sizes", [(2,) * 6, (2, 4, 3, 2, 2, 5)])
def test_packing_layout_order_and_micro_batches_change_no_loss_and_no_gradient(policy, sizes):
    items = groups(*sizes, margins=[0.5] * 6 if set(sizes) == {2} else None)
    objective = Reward(margin=float(set(sizes) == {2}), center=0.1)

    def step(batches):
        policy.zero_grad()
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
        stats = optimizer_step(policy, objective, batches, optimizer, max_norm=None)
        grads = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
        return stats.loss.item(), grads, stats.metrics

    loss, grads, metrics = step(batches_of(policy, items))
    scale = max(g.abs().max().item() for g in grads.values())
    for batches in (
        batches_of(policy, items, max_tokens=40),
        batches_of(policy, items, layout="padded"),
        batches_of(policy, items[::-1]),
        [b for item in items for b in batches_of(policy, [item])],
        batches_of(policy, items)[0].split(40),
    ):
        other, by_other, sums = step(batches)
        assert other == pytest.approx(loss, abs=1e-6)
        for name, grad in grads.items():
            assert (by_other[name] - grad).abs().max() <= 1e-6 * max(1.0, scale), name
        for name, value in metrics.items():
            assert sums[name].item() == pytest.approx(value.item(), abs=1e-5), name


def test_metrics_are_those_of_a_plain_count(policy):
    items = groups(2, 3, 4)
    (batch,) = batches_of(policy, items)
    _, _, sums = Reward()(policy, batch)
    want = dict.fromkeys(("min_reward", "mean_reward", "max_reward", "accuracy", "margin"), 0.0)
    for s in scores_of(policy, items):
        pairs = [(a, b) for i, a in enumerate(s) for b in s[i + 1 :]]
        want["min_reward"] += min(s)
        want["mean_reward"] += sum(s) / len(s)
        want["max_reward"] += max(s)
        want["accuracy"] += sum(a > b for a, b in pairs) / len(pairs)
        want["margin"] += sum(a - b for a, b in pairs) / len(pairs)
    got = {name: value.item() for name, value in sums.items()}
    for name, value in want.items():
        assert got[name] == pytest.approx(value, abs=1e-5), name
    assert got["rewards/margins"] == pytest.approx(
        got["rewards/chosen"] - got["rewards/rejected"], abs=1e-5
    )


def test_an_evaluation_counts_every_ordered_pair_whatever_the_batches(policy):
    items = groups(2, 3, 4, 2, 2)
    objective = Reward()
    results = [
        evaluate(policy, batches_of(policy, items, max_tokens=size), objective)
        for size in (1 << 20, 30)
    ]
    for result in results:
        all_scores = scores_of(policy, items)
        gaps = [a - b for s in all_scores for i, a in enumerate(s) for b in s[i + 1 :]]
        assert np.abs(result.margins - gaps).max() < 1e-5
        assert result.summary["n"] == 12 and result.summary["prompts"] == 5
        assert result.summary["accuracy"] == pytest.approx(np.mean(np.array(gaps) > 0))
        lengths = [[len(r) for r in item.responses] for item in items]
        longer = sum(a > b for n in lengths for i, a in enumerate(n) for b in n[i + 1 :])
        shorter = sum(a < b for n in lengths for i, a in enumerate(n) for b in n[i + 1 :])
        assert longer != shorter == result.summary["n_chosen_shorter"]
        assert longer == result.summary["n_chosen_longer"]
        loss = np.mean([ranked_loss(s) for s in all_scores])
        assert result.metrics["loss"] == pytest.approx(loss, rel=1e-5)
        assert result.summary["calibration"]["ece"] == calibration(result.margins)["ece"]
        json.dumps(result.summary)


def test_centring_moves_the_mean_score_to_0_and_keeps_the_ranking(tiny_model, tiny_rows):
    means, accuracies = [], []
    for center in (0.0, 1.0):
        policy, objective = load(tiny_model), Reward(center=center)
        data = load_preferences(tiny_rows[:12])
        encoded = objective.encode(data, policy.tokenizer, max_length=64, template="auto")
        (batch,) = batches_of(policy, list(encoded))
        # A mean of 3 to start with: along the mean hidden state all scores move together.
        with torch.no_grad():
            hidden = policy._hidden(batch).flatten(0, -2)[batch.end_rows].mean(0)
            away = 3 - policy(batch).mean()
            policy.model.score.weight += away * hidden / hidden.square().sum()
        # The head alone learns, and its loss is flat along that direction but for the centring.
        policy.model.model.requires_grad_(False)
        optimizer = torch.optim.SGD(policy.model.score.parameters(), lr=1e-2, momentum=0.9)
        for _ in range(80):
            _, _, sums = objective(policy, batch)
            optimizer_step(policy, objective, [batch], optimizer)
        means.append(abs(sums["mean_reward"].item() / len(encoded)))
        accuracies.append(sums["accuracy"].item() / len(encoded))
    assert means[0] > 2 and means[1] < 0.1
    assert min(accuracies) > 0.9


# --- whole runs --------------------------------------------------------------------------------


def config(out, **more):
    small = {"batch_size": 4, "lr": 3e-3, "max_length": 128, "epochs": 2, "eval_fraction": 0.25}
    return TrainConfig(out=str(out), cache=str(out) + "-cache", **small | more)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_run_learns_the_preference_and_leaves_a_scaled_model(
    tiny_model, tiny_data, tmp_path, lora
):
    policy = load(tiny_model, lora=lora)
    data = load_preferences(tiny_data)
    run = train(Reward(), policy, data, config(tmp_path / "run", epochs=4), quiet=True)
    evaluation = json.loads((run.dir / "evaluation.json").read_text())
    assert evaluation["after"]["accuracy"] == 1.0
    assert evaluation["after"]["loss"] < 0.5 * evaluation["before"]["loss"]
    assert evaluation["after"]["calibration"]["log_loss"] == pytest.approx(
        evaluation["after"]["loss"], rel=1e-4
    )
    assert {"accuracy", "margin", "mean_reward", "rewards/margins"} <= run.metrics[1].keys()
    assert not (run.dir / "samples.jsonl").exists()
    again = Policy.from_pretrained(run.dir)  # a run folder says itself what it holds
    stats = again.score_stats
    assert again.is_reward_model and stats is not None and stats == policy.score_stats
    assert stats.n == 36
    items = Reward().encode(data, again.tokenizer, max_length=128, template="auto")
    (batch,) = batches_of(again, list(items))
    with torch.no_grad():
        scores = again.eval().scores(batch)
        assert torch.equal(scores, policy.eval().scores(batch))
    assert again.normalised(scores).mean().abs() < 0.2


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tiny_model, tiny_data, tmp_path, lora):
    """Even from another seed: the head is in the checkpoint."""
    data, more = load_preferences(tiny_data), {"save_every": 2, "max_steps": 5, "epochs": 2}
    whole = load(tiny_model, lora=lora)
    train(Reward(center=0.01), whole, data, config(tmp_path / "a", **more), quiet=True)
    one = sorted((tmp_path / "a" / "checkpoints").glob("step-*"))[0]
    again = load(tiny_model, seed=7, lora=lora)
    resumed = config(tmp_path / "b", resume=str(one), **more)
    train(Reward(center=0.01), again, data, resumed, quiet=True)
    theirs = dict(whole.named_parameters())
    for name, p in again.named_parameters():
        if p.requires_grad:
            assert torch.equal(p, theirs[name]), name
    assert again.score_stats == whole.score_stats


def test_a_run_on_rankings_learns_them(tiny_model, tmp_path):
    words = ["I will gladly help you there.", "Perhaps.", "No."]
    rows = [
        Ranking(
            [Message("user", f"Tell me about {thing} {n}.")],
            [[Message("assistant", text)] for text in words[: 2 + n % 2]],
        )
        for thing in ("cats", "dogs", "rain", "bread")
        for n in range(5)
    ]
    objective, policy = Reward(), load(tiny_model)
    run = train(objective, policy, rows, config(tmp_path / "run", epochs=4), quiet=True)
    after = json.loads((run.dir / "evaluation.json").read_text())["after"]
    assert objective.unit == "rankings" and after["accuracy"] == 1.0
    report = json.loads((run.dir / "data_report.json").read_text())
    assert report["encoding"]["train rankings"] + report["encoding"]["held-out rankings"] == 20


@pytest.mark.parametrize("model", ["stories", "embedded"])
def test_real_pairs_train_real_models(model, stories_path, hh_path, tmp_path):
    policy = load(stories_path if model == "stories" else "embedded", dtype="float32")
    data = load_preferences(hh_path)[:60]
    run = train(
        Reward(), policy, data, config(tmp_path / "run", max_steps=2, max_length=256), quiet=True
    )
    evaluation = json.loads((run.dir / "evaluation.json").read_text())
    assert 0 <= evaluation["after"]["accuracy_low"] <= evaluation["after"]["accuracy_high"] <= 1
    assert policy.score_stats is not None and policy.score_stats.n > 50


# --- calibration -------------------------------------------------------------------------------


def test_calibration_of_a_model_that_is_right_as_often_as_it_says_and_of_one_that_is_not():
    rng = np.random.default_rng(0)
    margins = rng.normal(0, 2, 40_000)
    honest = np.where(rng.random(40_000) < 1 / (1 + np.exp(-np.abs(margins))), 1, -1)
    good = calibration(np.abs(margins) * honest)
    assert good["ece"] < 0.01
    assert good["brier"] < 0.25 and good["log_loss"] < math.log(2)
    bold = calibration(3 * np.abs(margins) * honest)
    assert bold["ece"] > 0.1 and bold["log_loss"] > good["log_loss"]
    assert sum(row["n"] for row in good["bins"]) == 40_000
    for row in good["bins"]:
        assert row["low"] <= row["confidence"] <= row["high"]
        assert row["accuracy"] == pytest.approx(row["confidence"], abs=0.03)


def test_calibration_by_hand():
    two = math.log(3)  # a confidence of 3/4
    result = calibration(np.array([two, -two, two, 0.0]), bins=2)
    assert result["ece"] == pytest.approx((1 * 0.5 + 3 * abs(2 / 3 - 0.75)) / 4)
    assert result["brier"] == pytest.approx((2 * 0.25**2 + 0.75**2 + 0.25) / 4)
    assert result["log_loss"] == pytest.approx(
        (2 * math.log(4 / 3) + math.log(4) + math.log(2)) / 4
    )
    tie, sure = result["bins"]
    assert (tie["n"], tie["confidence"], tie["accuracy"]) == (1, 0.5, 0.0)  # a tie is not right
    assert sure["n"] == 3 and sure["high"] == 1
    alone = calibration(np.array([800.0]), bins=2)
    assert alone["bins"][0]["confidence"] is None and alone["ece"] == 0
    for bad in ([], [np.nan], [[1.0]]):
        with pytest.raises(ValueError, match="finite margins"):
            calibration(np.array(bad))


# --- what is refused ---------------------------------------------------------------------------


def test_what_cannot_be_a_reward_run_is_an_input_error(policy, tiny_model, tiny_rows):
    for bad in ({"margin": -1.0}, {"center": math.nan}, {"center": math.inf}):
        with pytest.raises(InputError, match="must be a number of at least 0"):
            Reward(**bad)
    (batch,) = batches_of(policy, groups(2, 2))
    with pytest.raises(InputError, match="head='score'"):
        Reward()(Policy.from_pretrained(tiny_model), batch)
    with pytest.raises(InputError, match="ends=True"):
        Reward()(policy, next(pack(groups(2), max_tokens=99)))
    with pytest.raises(InputError, match="one response only"):
        Reward()(policy, batches_of(policy, groups(2, 1))[0])
    with pytest.raises(InputError, match="no pairs to encode"):
        Reward().encode([], policy.tokenizer, max_length=64, template="auto")


def test_finish_takes_at_most_a_thousand_responses_and_leaves_the_mode_alone(policy):
    (batch,) = batches_of(policy, groups(2, 2, 2))
    policy.train()
    seen = []

    def endless():
        while True:
            seen.append(1)
            yield batch

    Reward().finish(policy, endless())
    assert policy.training and policy.score_stats.n == 1000 and len(seen) == 167
    stats = dataclasses.asdict(policy.score_stats)
    Reward().finish(policy, [])
    assert dataclasses.asdict(policy.score_stats) == stats
    policy.score_stats = None


def test_finish_takes_scores_without_the_dropout_of_an_adapter(tiny_model):
    policy = load(tiny_model, lora=LoraConfig(r=4, dropout=0.5, init="gaussian"))
    with torch.no_grad():
        for _, p in policy.trainable():
            p.add_(0.1)
    (batch,) = batches_of(policy, groups(2, 2, 2))
    policy.train()
    Reward().finish(policy, [batch])
    with torch.no_grad():
        noisy, plain = policy(batch), policy.eval()(batch)
    assert policy.score_stats == ScoreStats.of(plain) != ScoreStats.of(noisy)


def test_pairs_with_sources_are_judged_by_source(tiny_model, tiny_rows):
    policy = load(tiny_model)
    pairs = [
        Pair(
            [Message("user", row["prompt"])],
            [Message("assistant", row["chosen"])],
            [Message("assistant", row["rejected"])],
            source=f"s{i % 2}",
        )
        for i, row in enumerate(tiny_rows)
    ]
    encoded = Reward().encode(pairs, policy.tokenizer, max_length=64, template="auto")
    result = evaluate(policy, batches_of(policy, list(encoded)), Reward())
    assert result.summary["sources"].keys() == {"s0", "s1"}
    assert "rewards/accuracies/s0" in result.metrics


def test_the_example_ends_with_both_answers_scored_by_transformers(tmp_path, capsys, monkeypatch):
    path = Path(__file__).parents[1] / "examples" / "reward_model.py"
    spec = importlib.util.spec_from_file_location("reward_example", path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    few = load_preferences(example.EMBEDDED / "preferences.jsonl.gz")[:80]
    monkeypatch.setattr(example, "load_preferences", lambda path: few)
    example.main(str(tmp_path / "run"))
    *_, accuracy, good, bad = capsys.readouterr().out.strip().splitlines()
    assert accuracy.startswith("held-out accuracy")
    assert float(good.split()[0]) > float(bad.split()[0])
    policy = Policy.from_pretrained(tmp_path / "run")
    chosen, rejected = ([Message("assistant", answer)] for answer in example.ANSWERS)
    pair = Pair([Message(**example.QUESTION)], chosen, rejected)
    items = Reward().encode([pair], policy.tokenizer, max_length=128, template="auto")
    with torch.no_grad():
        ours = policy.normalised(policy(batches_of(policy, list(items))[0]))
    assert [f"{s:+.2f}" for s in ours.tolist()] == [good.split()[0], bad.split()[0]]
