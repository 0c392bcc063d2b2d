"""Held-out evaluation: its numbers by hand, and that it leaves the policy as it was."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from prefopt import (
    DPO,
    InputError,
    LoraConfig,
    Policy,
    encode_pairs,
    evaluate,
    load_preferences,
    pack,
)
from prefopt.stats import calibration, preference_summary


@pytest.fixture(scope="module")
def policy(tiny_model):
    """An adapter with dropout, some way from its reference."""
    torch.manual_seed(0)
    policy = Policy.from_pretrained(tiny_model, lora=LoraConfig(r=4, dropout=0.5))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, p in policy.trainable():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return policy


@pytest.fixture(scope="module")
def encoded(policy, tiny_rows):
    """Ten pairs on eight prompts, some the other way round."""
    rows = [dict(row) for row in tiny_rows[:10]]
    for row in rows[::3]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    rows[8]["prompt"], rows[9]["prompt"] = rows[0]["prompt"], rows[1]["prompt"]
    return encode_pairs(load_preferences(rows), policy.tokenizer, max_length=128)


def batches(policy, encoded, max_tokens=10_000):
    for batch in pack(encoded, max_tokens=max_tokens):
        with policy.reference(), torch.no_grad():
            reference = policy(batch)
        yield replace(batch, ref_logprobs=reference)


def test_the_numbers_are_means_over_the_pairs(policy, encoded):
    objective = DPO(beta=0.3)
    result = evaluate(policy, batches(policy, encoded), objective)
    (whole,) = batches(policy, encoded)
    policy.eval()
    with torch.no_grad():
        p = objective.read(policy, whole)[0]
    policy.train()
    chosen, rejected = 0.3 * (p.chosen - p.ref_chosen), 0.3 * (p.rejected - p.ref_rejected)
    want = {
        "loss": -torch.nn.functional.logsigmoid(chosen - rejected),
        "rewards/chosen": chosen, "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "logps/chosen": p.chosen, "logps/rejected": p.rejected,
        "logps/accuracies": (p.chosen > p.rejected).float(),
    }  # fmt: skip
    assert result.metrics.keys() == want.keys()
    for name, values in want.items():
        assert result.metrics[name] == pytest.approx(values.double().mean().item(), rel=1e-5), name
    assert 0 < result.metrics["rewards/accuracies"] < 1, "the example decides something"
    np.testing.assert_allclose(result.margins, (chosen - rejected).numpy(), rtol=1e-5, atol=1e-7)


def test_the_summary_groups_pairs_by_prompt(policy, encoded):
    result = evaluate(policy, batches(policy, encoded))
    lengths = [[len(r) for r in item.responses] for item in encoded]
    prompts = [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
    chosen, rejected = np.array(lengths).T
    want = preference_summary(result.margins, chosen, rejected, np.array(prompts))
    assert result.summary == {**want, "calibration": calibration(result.margins)}
    assert result.summary["n"] == 10 and result.summary["prompts"] == 8
    assert result.summary["accuracy"] == pytest.approx(result.metrics["rewards/accuracies"])


def test_packing_changes_nothing(policy, encoded):
    whole = evaluate(policy, batches(policy, encoded))
    small = evaluate(policy, batches(policy, encoded, max_tokens=100))
    np.testing.assert_allclose(small.margins, whole.margins, rtol=1e-4, atol=1e-6)
    assert small.metrics == pytest.approx(whole.metrics, rel=1e-5)
    assert small.summary["prompts"] == 8


def test_a_policy_that_is_its_reference_only_ties(tiny_model, encoded):
    base = Policy.from_pretrained(tiny_model, lora=LoraConfig(r=4))
    result = evaluate(base, batches(base, encoded))
    assert result.summary["ties"] == 10 and result.summary["accuracy"] == 0
    assert result.metrics["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert 0 <= result.metrics["logps/accuracies"] <= 1


@pytest.mark.parametrize("training", [True, False])
def test_the_policy_is_left_as_it_was(policy, encoded, training):
    policy.train(training)
    before = {name: p.clone() for name, p in policy.state_dict().items()}
    state = torch.get_rng_state()
    first = evaluate(policy, batches(policy, encoded))
    second = evaluate(policy, batches(policy, encoded))
    assert np.array_equal(first.margins, second.margins), "dropout is off"
    assert policy.training is training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in policy.state_dict().items())
    assert all(p.grad is None for p in policy.parameters())
    with pytest.raises(KeyError):
        evaluate(policy, batches(policy, encoded), on_batch=lambda batch: {}["stop"])
    assert policy.training is training
    policy.train()


def test_on_batch_sees_every_batch(policy, encoded):
    seen = []
    evaluate(policy, batches(policy, encoded, 200), on_batch=lambda b: seen.append(b.num_groups))
    assert sum(seen) == 10 and len(seen) > 2


def test_without_pairs_there_is_nothing_to_say(policy):
    with pytest.raises(InputError, match="no pairs to evaluate"):
        evaluate(policy, [])


def test_the_loss_is_the_objectives_own(policy, encoded):
    result = evaluate(policy, batches(policy, encoded), DPO(loss=lambda p: p.margin**2, beta=0.5))
    assert result.metrics["loss"] == pytest.approx(
        float((result.margins / 0.5) ** 2 @ np.ones(10)) / 10
    )
