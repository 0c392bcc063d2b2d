"""Several roles on one base: critics and shared reward models, of which the policy sees nothing."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

from prefopt import LoraConfig, Policy, pack
from prefopt.data.encode import Encoded
from prefopt.nn.heads import ScoreStats
from prefopt.role_parameters import VALUE
from prefopt.roles import add_critic, add_reward_role
from tests.test_reward_model import write_model

LORA = LoraConfig(r=4, alpha=8)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("roles") / "base", tie_word_embeddings=False)


def load(path, seed=0, **options) -> Policy:
    torch.manual_seed(seed)
    return Policy.from_pretrained(path, **options)


def moved(policy: Policy, seed=1) -> Policy:
    """With an adapter that is away from where it started."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for role in ("policy", "value") if policy.value_head else ("policy",):
            for _, p in policy.trainable(role):
                p.add_(0.05 * torch.randn(p.shape))
    return policy


@pytest.fixture(scope="module")
def reward_folders(base, tmp_path_factory):
    """Reward models, adapters on the same base, dense and in 4 bits, with the scale of scores."""
    folders = {}
    for quantize in (None, "nf4"):
        lora = LoraConfig(r=3, alpha=5, dropout=0.1)
        policy = moved(load(base, head="score", lora=lora, quantize=quantize), seed=3)
        policy.score_stats = ScoreStats(0.7, 2.5, 100)
        folders[quantize] = tmp_path_factory.mktemp("roles") / f"reward-{quantize}"
        policy.save_pretrained(folders[quantize])
    return folders


def groups(seed=0):
    rng = np.random.default_rng(seed)
    sizes = ((11, (9, 4)), (3, (1, 12)), (6, (5, 2, 7)))
    draw = lambda n: rng.integers(3, 61, n).astype(np.int32)  # noqa: E731
    return [Encoded(draw(p), tuple(draw(n) for n in ns), i) for i, (p, ns) in enumerate(sizes)]


def batch_of(policy, *, layout=None, ends=True):
    (batch,) = pack(groups(), max_tokens=1 << 20, layout=layout or policy.layout, ends=ends)
    return batch.to(policy.device)


def gradients(policy, loss, role="policy"):
    for p in policy.parameters():
        p.grad = None
    loss.backward()
    return {name: p.grad for name, p in policy.trainable(role)}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


ROLES = ("trunk", "adapter", "reward", "all")


def with_roles(policy, which, reward_folder):
    if which in ("trunk", "adapter"):
        add_critic(policy, kind=which)
    if which == "all":
        add_critic(policy, kind="adapter")
    if which in ("reward", "all"):
        add_reward_role(policy, reward_folder)
    return policy


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("which", ROLES)
def test_the_policy_is_bitwise_what_it_is_without_roles(base, reward_folders, which, quantize):
    # The policy's adapter leaves layers alone that the other roles adapt.
    lora = LoraConfig(r=4, alpha=8, targets=["q_proj", "down_proj"])
    alone = moved(load(base, lora=lora, quantize=quantize))
    policy = with_roles(load(base, lora=lora, quantize=quantize), which, reward_folders[quantize])
    after = torch.rand(3)
    torch.manual_seed(1)
    with torch.no_grad():
        for _, p in policy.trainable():
            p.add_(0.05 * torch.randn(p.shape))
    if policy.value_head is not None:
        with torch.no_grad():
            for _, p in policy.trainable("value"):
                p.add_(0.05 * torch.randn(p.shape))
    batch = batch_of(policy)
    assert policy.reference_key() == alone.reference_key()
    want, got = alone(batch), policy(batch)
    assert torch.equal(want, got)
    assert same(gradients(alone, want.sum()), gradients(policy, got.sum()))
    with torch.no_grad(), alone.reference(), policy.reference():
        assert torch.equal(alone(batch), policy(batch))
    # Nor does a role draw from the generator that the policy goes on with.
    load(base, lora=lora, quantize=quantize)
    assert torch.equal(after, torch.rand(3))


@pytest.mark.parametrize("kind", ["trunk", "adapter"])
def test_values_beside_log_probs(base, kind):
    policy = load(base, lora=LORA)
    add_critic(policy, kind=kind)
    moved(policy)
    batch = batch_of(policy)
    alone = policy(batch)
    logp, entropy, values = policy(batch, entropy=True, values=True)
    assert torch.equal(logp, alone) and logp.shape == entropy.shape == values.shape
    assert torch.equal(values, policy.values(batch)) and values.dtype == torch.float32
    assert values.std() > 0.01


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("kind", ["trunk", "adapter", "model"])
def test_values_are_the_head_on_the_states_of_each_text_alone(base, kind, layout):
    policy = load(base, lora=LORA)
    add_critic(policy, kind=kind)
    moved(policy)
    values, ends = policy.values(batch_of(policy, layout=layout), ends=True)
    twin = copy.deepcopy(policy).double()
    head: Any = twin.value_head
    want, at_end = [], []
    for module in twin.model.modules():
        if hasattr(module, "active") and kind == "adapter":
            module.active = VALUE
    with torch.no_grad(), twin.plain_attention():
        for group in groups():
            for response in group.responses:
                ids = torch.from_numpy(np.concatenate([group.prompt, response])).long()[None]
                hidden = twin.model.model(ids).last_hidden_state[0].double()
                v = (hidden @ head.weight.double().T + head.bias.double())[:, 0]
                want.append(v[len(group.prompt) - 1 : -1])
                at_end.append(v[-1])
    assert torch.allclose(values.double(), torch.cat(want), atol=2e-5)
    assert torch.allclose(ends.double(), torch.stack(at_end), atol=2e-5)


@pytest.mark.parametrize("kind", ["trunk", "adapter"])
def test_the_value_loss_moves_the_critic_and_of_a_trunk_the_policy(base, kind):
    policy = load(base, lora=LORA)
    add_critic(policy, kind=kind)
    moved(policy)
    batch = batch_of(policy)
    own = gradients(policy, policy.values(batch).square().sum(), "value")
    assert all(g is not None and g.any() for g in own.values())
    touched = {name for name, p in policy.trainable() if p.grad is not None and p.grad.any()}
    assert touched == (set(dict(policy.trainable())) if kind == "trunk" else set())
    frozen = {id(p) for role in ("policy", "value") for _, p in policy.trainable(role)}
    assert all(p.grad is None for p in policy.parameters() if id(p) not in frozen)


def test_what_trains_and_what_is_kept_by_role(base, reward_folders):
    names = [name for name, _ in load(base, lora=LORA).trainable()]
    policy = load(base, lora=LORA)
    add_critic(policy, kind="adapter", lora=LoraConfig(r=2, init="pissa"))
    add_reward_role(policy, reward_folders[None])
    assert [name for name, _ in policy.trainable()] == names
    assert [name for name, _ in policy.resumable()] == names
    value = [name for name, _ in policy.trainable("value")]
    assert len(value) == 28 + 2 and value[-2:] == ["value_head.weight", "value_head.bias"]
    assert len(policy.resumable("value")) == 2 * 28 + 2
    groups = policy.parameter_groups(1e-3, 16, role="value")
    assert [len(g["params"]) for g in groups] == [16, 14] and groups[1]["lr"] == 16e-3
    (group,) = policy.parameter_groups(1e-3)
    assert list(map(id, group["params"])) == [id(p) for _, p in policy.trainable()]


@pytest.mark.parametrize("kind", ["trunk", "adapter", "model"])
def test_recomputed_activations_are_those_of_the_role(base, kind):
    """Under gradient checkpointing forward runs again in backward, when the role is over."""
    found = []
    for again in (False, True):
        policy = load(base, lora=LORA)
        add_critic(policy, kind=kind)
        moved(policy).train()
        if again:
            policy.checkpoint_activations()
        batch = batch_of(policy)
        if kind == "model":
            loss = policy.values(batch).square().sum()
            found.append(gradients(policy, loss, "value"))
        else:
            logp, values = policy(batch, values=True)
            both = policy.values(batch).mean() + logp.sum() + values.square().sum()
            grads = gradients(policy, both)
            found.append(grads | {n: p.grad for n, p in policy.trainable("value")})
    assert same(*found)
