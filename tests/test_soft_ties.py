"""Ties as labels of one half: from the data through the losses to the figures."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from prefopt import (
    DPO,
    KTO,
    InputError,
    Pair,
    Policy,
    Reward,
    load_preferences,
    losses,
    pack,
    train,
)
from prefopt.config import TrainConfig
from prefopt.data.mixing import mix
from prefopt.evaluate import evaluate
from prefopt.losses import LOSSES, WHOLE_BATCH, PairLogps
from prefopt.ranking import bradley_terry
from prefopt.step import optimizer_step

SETTINGS = {"max_length": 128, "template": "auto"}


@pytest.fixture(scope="module")
def pairs(tiny_rows):
    """Every other one a tie."""
    found = list(load_preferences(tiny_rows[:6]))
    return [replace(p, preference=0.5) if i % 2 else p for i, p in enumerate(found)]


@pytest.fixture(scope="module")
def policy(tiny_model):
    torch.manual_seed(0)
    return Policy.from_pretrained(tiny_model, dtype="float32")


def swapped(pair: Pair) -> Pair:
    return replace(pair, chosen=pair.rejected, rejected=pair.chosen)


def batch_of(policy, objective, pairs, seed=0):
    encoded = objective.encode(pairs, policy.tokenizer, **SETTINGS)
    (batch,) = pack(encoded, max_tokens=100_000, layout=policy.layout, ends=objective.ends)
    noise = torch.Generator().manual_seed(seed)
    return replace(batch, ref_logprobs=-5 * torch.rand(len(batch.targets), generator=noise))


def loss_and_gradient(policy, objective, batch):
    policy.zero_grad()
    loss, count, _ = objective(policy, batch)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for _, p in policy.trainable()])
    return loss.detach(), count, gradient.clone()


def logps(seed, size=7):
    noise = torch.Generator().manual_seed(seed)
    four = [-30 * torch.rand(size, generator=noise, dtype=torch.float64) for _ in range(4)]
    lengths = [torch.randint(1, 40, (size,), generator=noise) for _ in range(2)]
    return PairLogps(*four, *lengths)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - WHOLE_BATCH))
def test_a_soft_pair_has_the_mean_of_both_orders(name):
    p, preferences = logps(1), torch.tensor([1, 0.5, 0.25, 0, 1, 0.5, 0.75], dtype=torch.float64)
    q = PairLogps(p[1], p[0], p[3], p[2], p[5], p[4])
    objective = DPO(name)
    found = objective.losses(p, preferences)
    for i, w in enumerate(preferences.tolist()):
        expected = w * LOSSES[name](p)[i] + (1 - w) * LOSSES[name](q)[i]
        assert found[i].item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_tie_under_dpo_is_the_published_smoothing():
    p = logps(2)
    margin = 0.1 * ((p.chosen - p.ref_chosen) - (p.rejected - p.ref_rejected))
    half = torch.full_like(p.chosen, 0.5)
    expected = -0.5 * F.logsigmoid(margin) - 0.5 * F.logsigmoid(-margin)
    torch.testing.assert_close(DPO().losses(p, half), expected, rtol=1e-12, atol=0)
    smooth = losses.dpo(p, label_smoothing=0.3)  # and any other probability
    torch.testing.assert_close(DPO().losses(p, half * 1.4), smooth, rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo", "dpo + 0.2*sft"])
def test_the_order_of_a_tie_changes_nothing(policy, pairs, loss):
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, p in policy.trainable():
            p.add_(0.01 * torch.randn(p.shape, generator=noise))
    objective, turned = DPO(loss), [swapped(p) if p.preference == 0.5 else p for p in pairs]
    one, other = (batch_of(policy, objective, side) for side in (pairs, turned))
    free = {"ref_logprobs": torch.zeros_like(one.ref_logprobs)}  # the same for both orders
    a = loss_and_gradient(policy, objective, replace(one, **free))
    b = loss_and_gradient(policy, objective, replace(other, **free))
    assert a[1] == b[1] == 6
    torch.testing.assert_close(a[0], b[0], rtol=1e-6, atol=0)
    assert (a[2] - b[2]).norm() <= 1e-5 * a[2].norm()
    plain = [replace(p, preference=1.0) for p in pairs]
    c = loss_and_gradient(policy, objective, replace(batch_of(policy, objective, plain), **free))
    assert (a[2] - c[2]).norm() > 1e-2 * a[2].norm()


def test_reward_models_learn_that_a_tie_is_one(tiny_model, pairs):
    torch.manual_seed(0)
    policy = Policy.from_pretrained(tiny_model, dtype="float32", head="score")
    objective = Reward(center=0.1)
    turned = [swapped(p) if p.preference == 0.5 else p for p in pairs]
    a, b = (
        loss_and_gradient(policy, objective, batch_of(policy, objective, side))
        for side in (pairs, turned)
    )
    torch.testing.assert_close(a[0], b[0], rtol=1e-6, atol=0)
    assert (a[2] - b[2]).norm() <= 1e-5 * a[2].norm()
    c, r, m = (torch.randn(5, dtype=torch.float64) for _ in range(3))
    p = torch.rand(5, dtype=torch.float64)
    expected = -p * F.logsigmoid(c - r - m) - (1 - p) * F.logsigmoid(m + r - c)
    torch.testing.assert_close(
        bradley_terry(c, r, margin=m, preference=p), expected, rtol=1e-12, atol=1e-12
    )


def test_micro_batches_and_splitting_keep_the_labels(tiny_model, pairs):
    torch.manual_seed(0)
    policy = Policy.from_pretrained(tiny_model, dtype="float32")
    whole = batch_of(policy, DPO(), pairs)
    parts = whole.split(60)
    assert len(parts) > 1
    labels = [1.0 if part.preferences is None else part.preferences for part in parts]
    assert (
        torch.cat(
            [
                torch.ones(part.num_groups) if isinstance(one, float) else one
                for part, one in zip(parts, labels, strict=True)
            ]
        ).tolist()
        == [1, 0.5] * 3
    )
    found = []
    for batches in ([whole], parts):
        twin = copy.deepcopy(policy)
        optimizer = torch.optim.SGD([p for _, p in twin.trainable()], lr=0.0)
        found.append(optimizer_step(twin, DPO(), batches, optimizer).loss)
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)


def test_ties_are_left_out_of_accuracy_and_counted(policy, pairs):
    objective = DPO()
    result = evaluate(policy, [batch_of(policy, objective, pairs)], objective)
    assert result.summary["n"] == 3 and result.summary["tied_in_data"] == 3
    decided = [p for p in pairs if p.preference == 1]
    batch = batch_of(policy, objective, pairs)
    rows = np.flatnonzero((batch.response_ids // 2 % 2 == 0).numpy())
    alone = batch_of(policy, objective, decided)
    alone = replace(alone, ref_logprobs=batch.ref_logprobs[torch.from_numpy(rows)])
    expected = evaluate(policy, [alone], objective).summary
    assert result.summary["accuracy"] == expected["accuracy"]
    assert result.summary["margin_mean"] == pytest.approx(expected["margin_mean"], rel=1e-5)
    only = [p for p in pairs if p.preference == 0.5]
    assert evaluate(policy, [batch_of(policy, objective, only)], objective).summary["n"] == 3


def test_without_ties_no_loss_looks_at_the_other_order(policy, pairs):
    """Which may be infinite there, and 0 times that is no number."""
    seen = []

    def one_way(p):
        seen.append(p)
        return losses.dpo(p)

    objective = DPO(one_way)
    decided = [p for p in pairs if p.preference == 1]
    evaluate(policy, [batch_of(policy, objective, decided)], objective)
    assert len(seen) == 1


def test_a_tie_is_half_right_while_training(policy, pairs):
    objective = DPO()
    only = [p for p in pairs if p.preference == 0.5]
    _, count, sums = objective(policy, batch_of(policy, objective, only))
    assert count == 3 and sums["rewards/accuracies"].item() == 1.5


def test_losses_that_need_a_winner_refuse_ties(policy, pairs):
    for objective in (DPO("aot"), DPO("dpo + aot_unpaired"), KTO()):
        with pytest.raises(InputError, match="ties"):
            objective.encode(pairs, policy.tokenizer, **SETTINGS)


def test_from_the_rows_to_the_loss(tmp_path, tiny_model, tiny_rows):
    rows = [
        {"prompt": f"q {i}", "response_a": "one answer", "response_b": f"other {i}", "winner": w}
        for i, w in enumerate(["a", "tie", "b", "tie", "a", "tie"])
    ]
    soft = load_preferences(rows, ties="soft")
    assert [p.preference for p in soft] == [1, 0.5, 1, 0.5, 1, 0.5]
    assert len(load_preferences(rows)) == 3
    assert [p.preference for p in load_preferences(rows, ties="keep")] == [1] * 6
    assert [p.preference for p in mix({"a": soft})] == [1, 0.5, 1, 0.5, 1, 0.5]
    torch.manual_seed(0)
    policy = Policy.from_pretrained(tiny_model, dtype="float32")
    config = TrainConfig(str(tmp_path / "run"), max_steps=2, eval_fraction=0.0, batch_size=6,
                         cache=str(tmp_path / "cache"), samples=0)  # fmt: skip
    run = train(DPO(), policy, soft, config, quiet=True)
    assert run.metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
