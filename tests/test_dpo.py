"""The DPO objective on a real policy: against log_softmax over whole sequences, and against TRL."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from prefopt import (
    DPO,
    InputError,
    LoraConfig,
    PairLogps,
    Policy,
    encode_pairs,
    load_preferences,
    losses,
    pack,
)

TRL_NAMES = {
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
    "logps/chosen", "logps/rejected",
}  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tiny_rows):
    return load_preferences(tiny_rows[:6])


def new_policy(tiny_model, lora=None, dtype="float32"):
    torch.manual_seed(0)
    return Policy.from_pretrained(tiny_model, lora=lora, dtype=dtype)


def moved(policy, size=0.05):
    """The policy some way from its reference."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, p in policy.trainable():
            p.add_(size * torch.randn(p.shape, generator=generator).to(p))
    return policy


def batches_of(policy, encoded, max_tokens=10_000):
    """Packed, with the reference computed before anything moves."""
    out = []
    for batch in pack(encoded, max_tokens=max_tokens, layout=policy.layout):
        with policy.reference(), torch.no_grad():
            out.append(replace(batch, ref_logprobs=policy(batch)))
    return out


def encoded_of(policy, pairs):
    return encode_pairs(pairs, policy.tokenizer, max_length=128)


def summed(model, item):
    """log pi of each response: one sequence at a time, log_softmax over all of the logits."""
    sums = []
    for response in item.responses:
        ids = torch.from_numpy(np.concatenate([item.prompt, response])).long()[None]
        logps = model(ids, use_cache=False).logits[0].double().log_softmax(-1)
        at = torch.arange(len(item.prompt) - 1, ids.shape[1] - 1)
        sums.append(logps[at, ids[0, at + 1]].sum())
    return torch.stack(sums)


@pytest.mark.parametrize("lora", [LoraConfig(r=4), None], ids=["lora", "full"])
def test_at_the_start_the_loss_is_ln_2_and_every_margin_0(tiny_model, pairs, lora):
    policy = new_policy(tiny_model, lora)
    (batch,) = batches_of(policy, encoded_of(policy, pairs))
    total, count, metrics = DPO()(policy, batch)
    assert count == 6 and total.item() / 6 == pytest.approx(math.log(2), abs=1e-6)
    assert metrics.keys() == TRL_NAMES
    assert metrics["rewards/margins"] == metrics["rewards/accuracies"] == 0
    assert torch.equal(DPO().read(policy, batch)[0].margin, torch.zeros(6))


def test_loss_metrics_and_gradient_are_those_of_whole_sequences(tiny_model, pairs):
    policy = new_policy(tiny_model, dtype=torch.float64)
    encoded = encoded_of(policy, pairs)
    (batch,) = batches_of(policy, encoded)
    reference = copy.deepcopy(policy.model)
    moved(policy)
    total, count, metrics = DPO(beta=0.3, label_smoothing=0.1)(policy, batch)
    parameters = [p for _, p in policy.trainable()]
    grads = torch.autograd.grad(total, parameters)

    with policy.plain_attention():
        logps = torch.stack([summed(policy.model, item) for item in encoded])
        reference.set_attn_implementation("sdpa")
        with torch.no_grad():
            ref = torch.stack([summed(reference, item) for item in encoded])
        reward = 0.3 * (logps - ref)
        x = reward[:, 0] - reward[:, 1]
        want = -(0.9 * x.sigmoid().log() + 0.1 * (-x).sigmoid().log()).sum()
        want_grads = torch.autograd.grad(want, parameters)
    assert count == 6 and x.abs().min() > 1e-4
    # Llama's own norms compute in float32 whatever the model's dtype is.
    torch.testing.assert_close(total, want, rtol=1e-7, atol=0)
    for ours, theirs in zip(grads, want_grads, strict=True):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
    by_hand = {
        "rewards/chosen": reward[:, 0], "rewards/rejected": reward[:, 1], "rewards/margins": x,
        "rewards/accuracies": (x > 0).double(), "logps/chosen": logps[:, 0],
        "logps/rejected": logps[:, 1],
    }  # fmt: skip
    for name, value in by_hand.items():
        assert metrics[name].item() == pytest.approx(value.sum().item(), rel=1e-7), name
    assert not any(value.requires_grad for value in metrics.values())


def test_packing_changes_nothing(tiny_model, pairs):
    policy = new_policy(tiny_model, LoraConfig(r=4))
    encoded = encoded_of(policy, pairs)
    whole, small = batches_of(policy, encoded), batches_of(policy, encoded, max_tokens=150)
    assert len(whole) == 1 and len(small) > 2
    moved(policy)
    total, count, metrics = DPO()(policy, whole[0])
    parts = [DPO()(policy, batch) for batch in small]
    assert sum(n for _, n, _ in parts) == count
    torch.testing.assert_close(sum(t for t, _, _ in parts), total, rtol=1e-5, atol=0)
    for name, value in metrics.items():
        part = sum(m[name] for _, _, m in parts)
        torch.testing.assert_close(part, value, rtol=1e-5, atol=1e-5)


def test_weights_scale_the_loss_of_their_pair_only(tiny_model, pairs):
    policy = new_policy(tiny_model)
    encoded = [
        replace(e, weight=w) for e, w in zip(encoded_of(policy, pairs), range(6), strict=True)
    ]
    (batch,) = batches_of(policy, encoded)
    moved(policy)
    objective = DPO()
    total, count, metrics = objective(policy, batch)
    p = objective.read(policy, batch)[0]
    expected = (losses.dpo(p) * torch.arange(6)).sum()
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    assert count == 6
    plain = objective(policy, replace(batch, weights=None))[2]
    assert all(torch.equal(metrics[name], plain[name]) for name in plain)


def test_lengths_are_the_scored_tokens(tiny_model, pairs):
    policy = new_policy(tiny_model)
    encoded = encoded_of(policy, pairs)
    (batch,) = batches_of(policy, encoded)
    p = DPO().read(policy, batch)[0]
    assert p.chosen_len.tolist() == [len(e.responses[0]) for e in encoded]
    assert p.rejected_len.tolist() == [len(e.responses[1]) for e in encoded]


# -- losses of one's own, and what is refused


def test_any_callable_is_a_loss(tiny_model, pairs):
    policy = new_policy(tiny_model)
    (batch,) = batches_of(policy, encoded_of(policy, pairs))
    moved(policy)

    def squared(p: PairLogps):
        return (p.margin - 1) ** 2

    objective = DPO(loss=squared, beta=0.2)
    total, _, metrics = objective(policy, batch)
    margin = objective.read(policy, batch)[0].margin
    torch.testing.assert_close(total, ((margin - 1) ** 2).sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(metrics["rewards/margins"], (0.2 * margin).sum(), rtol=1e-4, atol=0)
    assert objective.name == "squared" and DPO().name == "dpo"


def test_a_loss_must_give_one_number_a_pair(tiny_model, pairs):
    policy = new_policy(tiny_model)
    (batch,) = batches_of(policy, encoded_of(policy, pairs))
    with pytest.raises(InputError, match=r"'<lambda>' returned shape \(\) for 6 pairs"):
        DPO(loss=lambda p: p.margin.mean())(policy, batch)


def test_what_a_batch_must_have(tiny_model, pairs):
    policy = new_policy(tiny_model)
    encoded = encoded_of(policy, pairs)
    (batch,) = pack(encoded, max_tokens=10_000)
    with pytest.raises(InputError, match=r"no reference log-probs.*ReferenceCache"):
        DPO()(policy, batch)
    single = [replace(e, responses=e.responses[:1]) for e in encoded]
    (batch,) = batches_of(policy, single)
    with pytest.raises(InputError, match="6 responses to 6 prompts are not pairs"):
        DPO()(policy, batch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 0.0}, "beta is 0.0; it must be above 0"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5; it must be in"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ({"loss": "dpoo"}, "did you mean 'dpo'"),
        ({"gamma": 0.5}, "takes no 'gamma'.*it takes: beta, label_smoothing"),
        ({"loss": lambda p: p.margin, "gamma": 0.5}, "bind gamma to your loss"),
        ({"divergence": "kl"}, "divergence is 'kl'; it is one of reverse_kl, forward_kl"),
        ({"loss": "simpo", "divergence": "forward_kl"}, "'simpo' has no reference to diverge from"),
        ({"loss": "aot", "divergence": "forward_kl"}, "sorts policy and reference apart"),
        ({"loss": "aot_unpaired", "wpo": True}, "sorts pairs over the batch; wpo weights them"),
        ({"divergence": "alpha_divergence", "divergence_alpha": 2.0}, "alpha of a divergence is 2"),
        ({"loss": "dpo + 0.5*aot", "divergence": "forward_kl"}, "sorts policy and reference apart"),
        ({"ld_alpha": 1.5}, r"ld_alpha is 1.5; it must be in \[0, 1\]"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        DPO(**arguments)


def test_rewards_are_per_token_where_the_loss_is(tiny_model, pairs):
    policy = new_policy(tiny_model)
    (batch,) = batches_of(policy, encoded_of(policy, pairs))
    whole, mean = DPO("dpo", beta=2.0), DPO("simpo")
    read, _ = whole.read(policy, batch)
    for loss, by in ((whole, 1), (mean, read.chosen_len)):
        got = loss.metrics(read)["rewards/chosen"]
        assert torch.allclose(got, 2.0 * (read.chosen - read.ref_chosen) / by)


def test_the_reference_free_need_none(tiny_model, pairs):
    policy = new_policy(tiny_model)
    (batch,) = pack(encoded_of(policy, pairs), max_tokens=10_000)
    total, count, metrics = DPO("simpo", gamma=0.3)(policy, batch)
    assert torch.isfinite(total) and count == 6
    assert metrics["rewards/accuracies"] == (metrics["rewards/accuracies"]).round()


def test_weights_are_refused_before_anything_is_done_by_a_loss_that_sorts(tiny_model, pairs):
    policy = new_policy(tiny_model)
    weighted = [replace(pair, weight=2.0) for pair in pairs]
    options = {"max_length": 128, "template": "auto"}
    with pytest.raises(InputError, match="'aot' sorts pairs, which therefore have no weights"):
        DPO("aot").encode(weighted, policy.tokenizer, **options)
    encoded = DPO("dpo").encode(weighted, policy.tokenizer, **options)
    (batch,) = batches_of(policy, list(encoded))
    with pytest.raises(InputError, match="no weights"):
        DPO("aot")(policy, batch)
