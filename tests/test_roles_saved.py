"""Roles from and to folders: reward models on the policy's base, critics that start from them, and
how much memory all of it takes."""

import json
import re
import shutil
from typing import Any

import numpy as np
import pytest
import torch

from prefopt import InputError, LoraConfig, Message, Policy
from prefopt.nn.heads import ScoreStats
from prefopt.policy import ADAPTER
from prefopt.rewards import RewardModel, load_rewards
from prefopt.roles import add_critic, add_reward_role, load_critic, make_critic, save_critic
from tests.test_reward_model import write_model
from tests.test_roles import LORA, batch_of, load, moved

STATS = ScoreStats(0.7, 2.5, 100)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("saved") / "base", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def rewards(base, tmp_path_factory):
    """Folders of reward models on the base, by what they are."""
    root, lora = tmp_path_factory.mktemp("saved"), LoraConfig(r=3, alpha=5, dropout=0.1)
    kinds = {
        "plain": {"lora": lora},
        "dora": {"lora": LoraConfig(r=3, use_dora=True)},
        "pissa": {"lora": LoraConfig(r=3, init="pissa")},
        "nf4": {"lora": lora, "quantize": "nf4"},
        "full": {},
    }
    for name, options in kinds.items():
        policy = moved(load(base, head="score", **options), seed=3)
        policy.score_stats = STATS
        policy.save_pretrained(root / name)
    return root


def texts():
    rng = np.random.default_rng(0)
    say = lambda n: " ".join(f"w{i}" for i in rng.integers(3, 61, n))  # noqa: E731
    prompts = [[Message("user", say(n))] for n in (5, 5, 9)]
    return [prompts[0], prompts[0], prompts[2]], [say(n) for n in (7, 2, 11)]


@pytest.mark.parametrize("kind", ["plain", "dora", "pissa", "nf4"])
def test_a_shared_reward_model_scores_as_it_does_alone(base, rewards, kind):
    alone = RewardModel(rewards / kind)
    policy = moved(load(base, lora=LORA, quantize="nf4" if kind == "nf4" else None)).train()
    add_critic(policy)
    (shared,) = load_rewards(str(rewards / kind), share=policy).values()
    assert isinstance(shared, RewardModel) and shared.policy is policy
    assert shared.score_stats == alone.score_stats == STATS and shared.not_shared is None
    want = alone(*texts())
    assert shared(*texts()) == want and len(set(want)) == 3  # float32, bit for bit
    policy.checkpoint_activations()
    assert shared(*texts()) == want
    with policy.reference():
        assert shared(*texts()) == want
    assert policy.training  # and nothing of it trains or is saved
    assert not any("reward" in name for name, _ in policy.trainable() + policy.resumable("value"))


def test_several_reward_models_share_the_base(base, rewards):
    policy = load(base, lora=LORA)
    both = load_rewards({n: str(rewards / n) for n in ("plain", "dora")}, share=policy)
    for name, reward in both.items():
        assert reward.policy is policy and reward(*texts()) == RewardModel(rewards / name)(*texts())


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("full", {"lora": LORA}, "is a full model, not an adapter on the policy's base"),
        ("plain", {}, "the policy trains all weights of its base"),
        ("plain", {"lora": LORA, "quantize": "nf4"}, "reward model is as stored, .* policy nf4"),
        ("nf4", {"lora": LORA}, "reward model is nf4, .* policy as stored"),
    ],
)
def test_what_cannot_share_is_loaded_beside(base, rewards, kind, options, reason):
    policy = load(base, **options)
    with pytest.raises(InputError, match=reason):
        add_reward_role(policy, rewards / kind)
    names = [name for name, _ in policy.model.named_parameters()]
    reward = RewardModel(rewards / kind, share=policy)
    assert reward.policy is not policy and re.search(reason, str(reward.not_shared))
    assert reward(*texts()) == RewardModel(rewards / kind)(*texts())
    assert [name for name, _ in policy.model.named_parameters()] == names


def test_bases_are_the_same_by_their_files_not_by_their_place(base, rewards, tmp_path):
    shutil.copytree(base, tmp_path / "copy")
    policy = load(tmp_path / "copy", lora=LORA)
    assert RewardModel(rewards / "plain", share=policy).policy is policy
    other = tmp_path / "other"
    shutil.copytree(base, other)
    file = other / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # of the same size, one weight in its last bit
    file.write_bytes(data)
    policy = load(other, lora=LORA)
    assert "stands on" in str(RewardModel(rewards / "plain", share=policy).not_shared)


def test_an_adapter_that_cannot_be_added_is_loaded_beside(tmp_path):
    """The reward model trains its embedding, which in the language model is the output head too."""
    base = write_model(tmp_path / "tied", tie_word_embeddings=True)
    lora = LoraConfig(r=2, modules_to_save=["embed_tokens"])
    moved(load(base, head="score", lora=lora)).save_pretrained(tmp_path / "reward")
    policy = load(base, lora=LORA)
    reward = RewardModel(tmp_path / "reward", share=policy)
    assert reward.policy is not policy and "embed_tokens" in str(reward.not_shared)
    assert len(reward(*texts())) == 3


# -- a critic that starts from a reward model


@pytest.mark.parametrize(("mean", "std"), [(0.7, 2.5), (-3.0, 0.2), (0.0, 1.0)])
def test_a_critic_starts_with_the_scores_of_the_reward_model(base, rewards, mean, std):
    policy = load(base, lora=LORA)
    add_critic(policy, start=rewards / "plain", scale=ScoreStats(mean, std, 10))
    add_reward_role(policy, rewards / "plain")
    batch = batch_of(policy)
    with torch.no_grad():
        scores, (_, ends) = policy(batch, role="reward"), policy.values(batch, ends=True)
    assert torch.allclose(ends, (scores - mean) / std, rtol=1e-5, atol=1e-5 / std)


def test_without_a_scale_they_are_the_same_numbers(base, rewards):
    policy = load(base, lora=LORA)
    add_critic(policy, start=rewards / "plain")
    add_reward_role(policy, rewards / "plain")
    batch = batch_of(policy)
    assert torch.equal(policy.values(batch, ends=True)[1], policy(batch, role="reward"))
    assert len(policy.trainable("value")) == 28 + 2  # unlike the reward model, it goes on learning


@pytest.mark.parametrize("kind", ["plain", "full"])
def test_a_reward_model_becomes_a_critic_of_its_own(base, rewards, kind):
    critic = load(rewards / kind)
    batch = batch_of(critic)
    scores = critic.scores(batch)
    add_critic(critic, kind="model", scale=STATS)
    assert torch.allclose(critic.values(batch, ends=True)[1], STATS.apply(scores), atol=1e-6)
    names = [name for name, _ in critic.trainable("value")]
    assert critic.trainable() == [] and names[-2:] == ["value_head.weight", "value_head.bias"]
    assert not any("score" in name for name in names)
    assert len(names) == (28 if kind == "plain" else 20) + 2
    critic.values(batch).sum().backward()
    assert all(p.grad is not None for _, p in critic.trainable("value"))


class Asked:
    """The fields of a PPOConfig that say which critic."""

    def __init__(self, critic=None, critic_start="zero", normalize_scores="none"):
        self.critic, self.critic_start = critic, critic_start
        self.normalize_scores = normalize_scores


def test_the_critic_that_a_configuration_asks_for(base, rewards, tmp_path):
    policy = load(base, lora=LORA)
    assert make_critic(policy, Asked(), {}) is policy and policy.critic_kind == "adapter"
    policy = load(base)
    assert make_critic(policy, Asked(), {}) is policy and policy.critic_kind == "trunk"
    policy = load(base, lora=LORA)
    reward = load_rewards(str(rewards / "plain"), share=policy)
    make_critic(policy, Asked(critic_start="reward", normalize_scores="reference"), reward)
    batch = batch_of(policy)
    want = STATS.apply(policy(batch, role="reward"))
    assert torch.allclose(policy.values(batch, ends=True)[1], want, atol=1e-6)
    for folder, trained in ((base, 30), (rewards / "plain", 30), (rewards / "full", 30)):
        critic = make_critic(load(base, lora=LORA), Asked(critic=str(folder)), {})
        assert critic.critic_kind == "model" and len(critic.trainable("value")) == trained
        values = critic.values(batch_of(critic))
        assert values.any() == (folder != base)
    whole = make_critic(load(base), Asked(critic=str(base)), {})
    assert len(whole.trainable("value")) == 20 + 2
    for asked, message in (
        (Asked(critic="trunk", critic_start="reward"), "start are for a critic that is an adapter"),
        (Asked(critic=str(base), critic_start="reward"), "is a language model"),
    ):
        policy = load(base, lora=LORA)
        with pytest.raises(InputError, match=message):
            make_critic(policy, asked, load_rewards(str(rewards / "plain")))
    with pytest.raises(InputError, match="needs a single reward that is a reward model"):
        make_critic(load(base, lora=LORA), Asked(critic_start="reward"), {"r": len})
    other = write_model(tmp_path / "other", vocab_size=70)
    words = json.loads((other / "tokenizer.json").read_text())
    words["model"]["vocab"]["extra"] = 61
    (other / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(InputError, match="another vocabulary than the policy"):
        make_critic(load(base, lora=LORA), Asked(critic=str(other)), {})


# -- saved and loaded


def test_a_critic_that_needs_padding_is_for_a_policy_that_pads(base, monkeypatch):
    whole = Policy.from_pretrained
    padded = lambda *a, **o: whole(*a, **o, attention="padded")  # noqa: E731
    policy, other = load(base, lora=LORA), padded(base, lora=LORA)
    monkeypatch.setattr(Policy, "from_pretrained", padded)
    with pytest.raises(InputError, match="cannot read what is packed for the policy"):
        make_critic(policy, Asked(critic=str(base)), {})
    critic = make_critic(other, Asked(critic=str(base)), {})
    assert not critic.values(batch_of(other)).any()


def test_a_critic_with_all_weights_is_saved_whole(base, tmp_path):
    critic = load(base)
    add_critic(critic, kind="model")
    moved(critic)
    save_critic(critic, tmp_path / "critic")
    again = load(tmp_path / "critic", seed=5)
    load_critic(again, tmp_path / "critic")
    batch = batch_of(critic)
    assert torch.equal(again.values(batch), critic.values(batch))
    assert again.values(batch).any() and [f.name for f in tmp_path.iterdir()] == ["critic"]


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("kind", ["trunk", "adapter", "model"])
def test_a_critic_is_saved_whole_and_loaded_again(base, tmp_path, kind, quantize):
    lora = LORA if kind == "model" else LoraConfig(r=2)
    policy = load(base, lora=LORA, quantize=quantize)
    add_critic(policy, kind=kind, lora=lora if kind == "adapter" else None)
    moved(policy)
    save_critic(policy, tmp_path / "run" / "critic")
    save_critic(policy, tmp_path / "run" / "critic")  # over the one that is there
    policy.save_pretrained(tmp_path / "policy")
    again = load(tmp_path / ("run/critic" if kind == "model" else "policy"), seed=5)
    load_critic(again, tmp_path / "run" / "critic")
    batch = batch_of(policy)
    assert torch.equal(again.values(batch), policy.values(batch))
    assert again.critic_kind == kind
    names = [name for name, _ in policy.trainable("value")]
    assert [name for name, _ in again.trainable("value")] == names
    if kind == "adapter":
        assert torch.equal(again(batch), policy(batch))


def test_what_the_policy_saves_is_the_policy_alone(base, rewards, tmp_path):
    alone = moved(load(base, lora=LORA))
    alone.save_pretrained(tmp_path / "alone")
    policy = load(base, lora=LORA)
    add_critic(policy)
    add_reward_role(policy, rewards / "plain")
    torch.manual_seed(1)
    with torch.no_grad():
        for _, p in policy.trainable():
            p.add_(0.05 * torch.randn(p.shape))
    policy.save_pretrained(tmp_path / "policy")
    files = sorted(file.name for file in (tmp_path / "alone").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "policy").iterdir())
    for name in files:
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "policy" / name).read_bytes()


def test_peft_reads_the_adapter_of_a_critic(base, tmp_path):
    import peft
    import transformers
    from safetensors.torch import load_file

    policy = load(base, lora=LORA)
    add_critic(policy)
    moved(policy)
    save_critic(policy, tmp_path / "critic")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(model, str(tmp_path / "critic")).eval()
    head = load_file(tmp_path / "critic" / "value_head.safetensors")
    batch = batch_of(policy, layout="padded")
    ids = batch.input_ids.view(batch.shape)
    with torch.no_grad():
        hidden = theirs(ids, output_hidden_states=True).hidden_states[-1].flatten(0, 1)
        want = (hidden @ head["weight"].T + head["bias"])[batch.score_rows, 0]
        got = policy.values(batch)
    assert torch.allclose(got, want, atol=1e-5) and got.std() > 0.01


def test_a_folder_that_is_not_this_critic(base, tmp_path):
    policy = load(base, lora=LORA)
    add_critic(policy)
    save_critic(policy, tmp_path / "critic")
    with pytest.raises(InputError, match="has a critic already"):
        load_critic(policy, tmp_path / "critic")
    with pytest.raises(InputError, match="not the folder of a critic"):
        load_critic(load(base, lora=LORA), base)
    narrow = write_model(tmp_path / "narrow", hidden_size=16, num_attention_heads=2)
    fresh = load(narrow, lora=LORA)
    names = [name for name, _ in fresh.model.named_parameters()]
    with pytest.raises(InputError, match=r"holds .*32.* critic of this model has .*16"):
        load_critic(fresh, tmp_path / "critic")
    assert fresh.critic_kind is None
    assert [name for name, _ in fresh.model.named_parameters()] == names
    (tmp_path / "critic" / "critic.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        load_critic(load(base, lora=LORA), tmp_path / "critic")


def test_an_interrupted_save_leaves_the_old_critic(base, tmp_path, monkeypatch):
    policy = load(base, lora=LORA)
    add_critic(policy)
    save_critic(policy, tmp_path / "critic")
    before = {f.name: f.read_bytes() for f in (tmp_path / "critic").iterdir()}
    moved(policy)
    monkeypatch.setattr("prefopt.durable.write_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_critic(policy, tmp_path / "critic")
    assert before == {f.name: f.read_bytes() for f in (tmp_path / "critic").iterdir()}
    assert [f.name for f in tmp_path.iterdir()] == ["critic"]


# -- what is refused


@pytest.mark.parametrize(
    ("options", "asked", "message"),
    [
        ({}, {"kind": "adapter"}, "needs a base that stays, and here all weights train"),
        ({"lora": LORA}, {"kind": "head"}, "trunk, adapter, model, not 'head'"),
        ({"lora": LORA}, {"kind": "trunk", "lora": LORA}, "for a critic that is an adapter"),
        ({"lora": LORA, "head": "score"}, {"kind": "adapter"}, "is of kind 'model'"),
        ({"lora": LORA}, {"start": "full"}, "is a full model"),
        ({"lora": LORA}, {"start": "plain", "lora": LORA}, "leave out lora"),
        ({"lora": LORA}, {"start": "plain", "scale": ScoreStats(1, 0, 3)}, "no scale in them"),
    ],
)
def test_critics_that_cannot_be(base, rewards, options, asked, message):
    policy = load(base, **options)
    if "start" in asked:
        asked = {**asked, "start": rewards / asked["start"]}
    with pytest.raises(InputError, match=message):
        add_critic(policy, **asked)
    assert policy.critic_kind is None and policy.value_head is None


def test_without_a_critic_there_are_no_values(base):
    policy = load(base, lora=LORA)
    batch = batch_of(policy)
    beside, trained = lambda b: policy(b, values=True), lambda _: policy.trainable("value")
    for ask in (policy.values, beside, trained):
        with pytest.raises(InputError, match="has no critic"):
            ask(batch)
    with pytest.raises(InputError, match="not 'reward'"):
        policy.trainable("reward")
    add_critic(policy)
    with pytest.raises(InputError, match="ends=True"):
        policy.values(batch_of(policy, ends=False), ends=True)
    with pytest.raises(InputError, match="has a critic already"):
        add_critic(policy)


def test_the_critic_leaves_the_output_head_alone(base):
    """An adapter on it would put the policy's log-probs through another product."""
    lora = LoraConfig(r=2, targets=["lm_head", "q_proj"])
    alone, policy = moved(load(base, lora=lora)), load(base, lora=lora)
    add_critic(policy)
    assert len(policy.trainable("value")) == 2 * 2 + 2
    torch.manual_seed(1)
    with torch.no_grad():
        for _, p in policy.trainable():
            p.add_(0.05 * torch.randn(p.shape))
    batch = batch_of(policy)
    assert torch.equal(alone(batch), policy(batch))


# -- memory


def size(policy) -> int:
    """Bytes of all weights, each storage once."""
    tensors = [*policy.parameters(), *policy.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_four_roles_take_one_base(tmp_path, quantize):
    """Policy, reference, critic and reward model; the shape is that of a small Llama, thinner."""
    sizes: Any = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4}
    base = write_model(tmp_path / "base", **sizes, vocab_size=2048, num_hidden_layers=2)
    one = size(load(base, quantize=quantize))
    lora = LoraConfig(r=2)
    load(base, head="score", lora=lora, quantize=quantize).save_pretrained(tmp_path / "reward")
    policy = load(base, lora=lora, quantize=quantize)
    assert policy.adapter == ADAPTER and not policy.has_reference_copy
    add_critic(policy)
    add_reward_role(policy, tmp_path / "reward")
    assert one < size(policy) <= 1.15 * one
