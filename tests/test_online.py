"""What the options of an online run do, each seen in its effect on the samples, the scores, the
advantages or the steps."""

import json
import os
import signal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from prefopt import InputError, KLConfig, LoraConfig, load_prompts, pack
from prefopt.collect import Collector
from prefopt.data.encoded import Encoded
from prefopt.learner import Learner
from prefopt.rundir import RunDir
from tests.online_case import (
    LORA,
    PROMPTS,
    even_words,
    one_update,
    policy_of,
    rows_of,
    train,
    write_case,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_case(tmp_path_factory.mktemp("online") / "base")


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Drawing one takes longer than the runs of these tests."""
    monkeypatch.setattr(RunDir, "report", lambda self: None)


def same(one, other, role="policy/"):
    """Whether the weights of a role are equal to the bit."""
    names = [name for name in one.weights if name.startswith(role)]
    return all(torch.equal(one.weights[name], other.weights[name]) for name in names)


def start_of(base, **options):
    """The weights that a run starts from."""
    policy = policy_of(base, **options)
    return SimpleNamespace(
        weights={f"policy/{name}": p.detach().clone() for name, p in policy.trainable()}
    )


def text_of(tokens):
    return " ".join(f"w{i}" for i in tokens if i > 2)


# -- advantages, token by token


def by_hand(exp, beta, lam=0.95, gamma=1.0, bootstrap=None):
    """Rewards of tokens and gae of each response in plain Python, float64."""
    found = []
    for i, length in enumerate(exp.lengths.tolist()):
        logp = exp.columns.get("old", exp.columns["sampled"])[i].double()
        ref, values = (exp.columns[name][i].double() for name in ("ref", "values"))
        rewards = [-beta * (logp[t] - ref[t]).item() for t in range(length)]
        rewards[-1] += exp.worth[i].item()
        after, advantage = (0.0 if bootstrap is None else bootstrap[i]), 0.0
        row = [0.0] * length
        for t in reversed(range(length)):
            advantage = rewards[t] + gamma * after - values[t].item() + gamma * lam * advantage
            row[t], after = advantage, values[t].item()
        found.append(row)
    return found


def rows_as_tensor(rows, like):
    found = torch.zeros(like.shape, dtype=torch.float64)
    for i, row in enumerate(rows):
        found[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
    return found


LIVELY = {"critic_lr": 3e-2, "at": 2, "ppo_epochs": 3, "whiten_advantages": False}
TRUE_RATIO = {"minibatches": 2}


def test_gae_of_a_run_by_hand(base, tmp_path):
    """Terminal: nothing is expected behind a cut response. Whitened over all tokens."""
    settings = {**LIVELY, "lam": 0.9, "gamma": 0.97, "kl": KLConfig(beta=0.2), **TRUE_RATIO}
    exp = one_update(base, tmp_path / "a", **settings).exp
    assert exp.columns["values"].abs().max() > 0.05 and not exp.stopped.all()
    want = rows_as_tensor(by_hand(exp, 0.2, 0.9, 0.97), exp.mask)
    assert (exp.columns["advantages"] - want).abs().max() < 1e-5
    assert (exp.columns["returns"] - (want + exp.columns["values"] * exp.mask)).abs().max() < 1e-5
    white = one_update(base, tmp_path / "b", **{**settings, "at": 1, "whiten_advantages": True}).exp
    raw = rows_as_tensor(by_hand(white, 0.2, 0.9, 0.97), white.mask)
    inside = raw[white.mask]
    want = (raw - inside.mean()) / (inside.var(correction=0) + 1e-8).sqrt() * white.mask
    assert (white.columns["advantages"] - want).abs().max() < 1e-5


def test_truncated_bootstrap_continues_with_the_critic(base, tmp_path, monkeypatch):
    expected, taken = [], Collector.read

    def read(collector, exp, order, **how):
        taken(collector, exp, order, **how)
        for group in exp.groups:
            for response in group.responses:  # the value before one token more
                item = Encoded(group.prompt, (np.append(response, 5).astype(np.int32),), 0)
                (batch,) = pack([item], max_tokens=1000, layout="shared")
                with torch.no_grad():
                    expected.append(collector.critic.values(batch)[-1].item())

    monkeypatch.setattr(Collector, "read", read)
    done = one_update(base, tmp_path / "run", **LIVELY, truncated="bootstrap")
    exp = done.exp
    behind = torch.tensor(expected[-len(exp.mask) :])
    assert (exp.bootstrap - behind * ~exp.stopped).abs().max() < 1e-6
    assert behind[~exp.stopped].abs().min() > 1e-3 and exp.stopped.any()
    want = rows_as_tensor(by_hand(exp, 0.05, bootstrap=exp.bootstrap.tolist()), exp.mask)
    assert (exp.columns["advantages"] - want).abs().max() < 1e-5


@pytest.mark.parametrize("loss", ["ppo", "dpo"])
def test_truncated_mask_learns_from_whole_responses_alone(base, tmp_path, monkeypatch, loss):
    """What a cut response says changes nothing: its tokens may be any others."""
    settings = {"truncated": "mask", "loss": loss, "kl": KLConfig(beta=0.1)}
    settings |= {"estimator": "rloo", "samples_per_prompt": 6, "minibatches": 1}
    done = one_update(base, tmp_path / "run", **settings)
    assert torch.equal(done.exp.kept, done.exp.stopped) and 0 < done.exp.kept.sum() < 18
    seen, step = [], Learner.step

    def changed(learner, exp, places, **how):
        for place, group in enumerate(exp.groups):
            for i, response in enumerate(group.responses):
                if not exp.stopped[place * exp.n + i]:
                    response[:] = 3 + (response[::-1] + 5) % 20
                    seen.append(place)
        return step(learner, exp, places, **how)

    monkeypatch.setattr(Learner, "step", changed)
    other = one_update(base, tmp_path / "other", **settings)
    worst = max((a - other.weights[k]).abs().max() for k, a in done.weights.items())
    assert seen and worst < 1e-6
    monkeypatch.undo()
    terminal = one_update(base, tmp_path / "terminal", **{**settings, "truncated": "terminal"})
    assert not same(done, terminal)


def test_an_update_of_nothing_but_cut_responses(base, tmp_path, monkeypatch):
    """Nothing is learnt, nothing breaks, and it can be saved in the middle."""
    settings = {"truncated": "mask", "stop_ids": [], "min_new_tokens": 2, "ppo_epochs": 2}
    step = Learner.step

    def stopping(learner, *args, **how):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(learner, *args, **how)

    monkeypatch.setattr(Learner, "step", stopping)
    assert train(base, tmp_path / "run", **settings).stopped
    monkeypatch.undo()
    done = one_update(base, tmp_path / "run", **settings, resume="auto", at=2)
    assert same(done, start_of(base)) and not done.exp.stopped.any()
    rows = rows_of(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and "objective/scores" in rows[0]


def test_reinforce_with_the_kl_in_the_reward(base, tmp_path):
    """reinforce++: what is still to come, whitened."""
    settings = {"estimator": "reinforce++", "gamma": 0.9, "at": 2, "kl": KLConfig(beta=0.5)}
    exp = one_update(base, tmp_path / "run", **settings, **TRUE_RATIO).exp
    exp.columns["values"] = exp.empty()
    raw = rows_as_tensor(by_hand(exp, 0.5, lam=1.0, gamma=0.9), exp.mask)
    inside = raw[exp.mask]
    want = (raw - inside.mean()) / (inside.var(correction=0) + 1e-8).sqrt() * exp.mask
    assert (exp.columns["advantages"] - want).abs().max() < 1e-5


def test_groups_with_the_kl_in_the_reward(base, tmp_path):
    """rloo: the KL of a whole response is part of what is compared."""
    settings = {"estimator": "rloo", "at": 2, "kl": KLConfig(beta=0.5), **TRUE_RATIO}
    exp = one_update(base, tmp_path / "run", **settings).exp
    kl = ((exp.columns["old"] - exp.columns["ref"]) * exp.mask).sum(1).double()
    total = (exp.worth.double() - 0.5 * kl).view(-1, 4)
    want = total - (total.sum(1, keepdim=True) - total) / 3
    assert kl.abs().max() > 1e-2
    assert (exp.columns["advantages"] - want.flatten()[:, None] * exp.mask).abs().max() < 1e-5


def test_a_kl_in_the_loss_is_not_in_the_reward(base, tmp_path):
    settings = {**LIVELY, "kl": KLConfig("k3", "loss", beta=5.0), **TRUE_RATIO}
    exp = one_update(base, tmp_path / "run", **settings).exp
    assert ((exp.columns["old"] - exp.columns["ref"]) * exp.mask).abs().max() > 1e-2
    want = rows_as_tensor(by_hand(exp, 0.0), exp.mask)
    assert (exp.columns["advantages"] - want).abs().max() < 1e-5


def test_whitened_rewards_keep_their_mean(base, tmp_path):
    plain = one_update(base, tmp_path / "a", whiten_advantages=False, lam=1.0).exp
    white = one_update(base, tmp_path / "b", whiten_advantages=False, lam=1.0, whiten_rewards=True)
    rewards = torch.zeros(plain.mask.shape, dtype=torch.float64)
    rewards[torch.arange(3), plain.lengths - 1] = plain.worth.double()
    inside = rewards[plain.mask]  # without a KL at the start
    scaled = (rewards - inside.mean()) / (inside.var(correction=0) + 1e-8).sqrt() + inside.mean()
    to_go = (scaled * plain.mask).flip(1).cumsum(1).flip(1) * plain.mask
    assert (white.exp.columns["returns"] - to_go).abs().max() < 1e-4


@pytest.mark.parametrize("lora", [LORA, None], ids=["adapter", "all weights"])
def test_the_reference_stays_where_the_run_began(base, tmp_path, lora):
    settings = {"lora": lora, "lr": 1e-2 if lora else 1e-3, "at": 2, **TRUE_RATIO}
    exp = one_update(base, tmp_path / "run", **settings).exp
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    for i, group in enumerate(exp.groups):
        (response,), start = group.responses, len(group.prompt) - 1
        ids = torch.tensor([[*group.prompt.tolist(), *response.tolist()]])
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, start:-1]
        want = logits.log_softmax(-1)[torch.arange(len(response)), ids[0, start + 1 :]]
        assert (exp.columns["ref"][i, : len(response)] - want).abs().max() < 1e-5
        assert (exp.columns["old"][i, : len(response)] - want).abs().max() > 1e-3


# -- scores


def test_what_is_learnt_from_a_score(base, tmp_path):
    """First the penalties, then the scale of all so far, then the clip; reported is what the reward
    said."""
    settings = {"missing_stop_penalty": 2.0, "overlong_buffer": 4, "overlong_factor": 0.5}
    settings |= {"normalize_scores": "running", "clip_scores": 0.9, "batch_size": 4}
    first = one_update(base, tmp_path / "a", **settings, lr=1e-12).exp
    second = one_update(base, tmp_path / "b", **settings, at=2, lr=1e-12)
    raw = [
        exp.scores.double() - 2.0 * ~exp.stopped - 0.5 * (exp.lengths - 4).clamp(0, 4) / 4
        for exp in (first, second.exp)
    ]
    for exp, so_far in ((first, raw[:1]), (second.exp, raw)):
        known = torch.cat(so_far)
        want = ((so_far[-1] - known.mean()) / known.std(correction=0)).clamp(-0.9, 0.9)
        assert (exp.worth - want).abs().max() < 1e-6
    assert second.row["objective/scores"] == pytest.approx(second.exp.scores.mean().item())
    assert first.worth.abs().max() == np.float32(0.9) and not first.stopped.all()


def test_a_missing_stop_has_a_score_of_its_own(base, tmp_path):
    exp = one_update(base, tmp_path / "run", missing_stop_score=-1.5, batch_size=6).exp
    assert torch.equal(exp.worth, exp.scores.where(exp.stopped, -1.5)) and not exp.stopped.all()


class Scaled:
    """A reward that knows the scale of its scores."""

    def __init__(self, mean, std):
        self.score_stats = SimpleNamespace(mean=mean, std=std)

    def __call__(self, prompts, responses):
        return even_words(prompts, responses)


def test_scores_by_the_scale_of_their_reward(base, tmp_path):
    reward = {"a": Scaled(1.0, 2.0), "b": Scaled(-3.0, 0.5)}
    given = {"normalize_scores": "reference", "reward_weights": {"a": 1.0, "b": 0.1}}
    done = one_update(base, tmp_path / "run", reward, **given)
    said = torch.tensor(
        even_words(
            [PROMPTS[i] for i in done.numbers], [text_of(g.responses[0]) for g in done.exp.groups]
        ),
        dtype=torch.float64,
    )
    want = (said - 1.0) / 2.0 + 0.1 * (said + 3.0) / 0.5
    assert (done.exp.worth - want).abs().max() < 1e-6
    assert done.row["objective/scores/a"] == pytest.approx(said.mean().item())
    with pytest.raises(InputError, match="'reward' has no score_stats"):
        train(base, tmp_path / "x", normalize_scores="reference")


def test_several_rewards_are_added_by_weight(base, tmp_path):
    reward = {"even": even_words, "long": lambda prompts, responses: [len(r) for r in responses]}
    done = one_update(base, tmp_path / "a", reward, reward_weights={"even": 2.0, "long": 0.01})
    parts = done.row["objective/scores/even"], done.row["objective/scores/long"]
    assert done.row["objective/scores"] == pytest.approx(2 * parts[0] + 0.01 * parts[1], rel=1e-6)
    with pytest.raises(InputError, match="long"):
        train(base, tmp_path / "x", reward, reward_weights={"even": 1.0, "lang": 1.0})


def test_a_held_out_reward_is_only_watched(base, tmp_path):
    settings: dict[str, Any] = {"eval_fraction": 0.3}
    plain = one_update(base, tmp_path / "a", **settings)
    held = lambda prompts, responses: [-len(r) for r in responses]  # noqa: E731
    watched = one_update(base, tmp_path / "b", **settings, held_out_reward=held)
    assert same(plain, watched) and same(plain, watched, "value/")
    texts = [text_of(group.responses[0]) for group in watched.exp.groups]
    assert watched.row["objective/held_out_scores"] == -np.mean([len(t) for t in texts])
    rows = rows_of(tmp_path / "b" / "metrics.jsonl")
    assert all("eval_held_out_scores" in row for row in rows if "eval_scores" in row)
    with pytest.raises(InputError, match="reward 'held_out_reward' returned 0 scores"):
        train(base, tmp_path / "c", **settings, held_out_reward=lambda prompts, responses: [])


def test_numbers_for_tokens_and_columns_of_the_prompts(base, tmp_path):
    """A reward that speaks of tokens is paid at each; it sees its prompt's row, once a sample."""
    seen = []

    def reward(prompts, responses, answer, tokens):
        seen.append((answer, tokens, [p[0].content for p in prompts]))
        return [[0.5 * (text == "w7") + 0.1 * int(answer[i][1:])  for text in row]
                for i, row in enumerate(tokens)]  # fmt: skip

    rows = [{"prompt": p[0].content, "answer": p[0].content.split()[0]} for p in PROMPTS]
    done = one_update(
        base, tmp_path / "run", reward, prompts=load_prompts(rows), samples_per_prompt=2,
        whiten_advantages=False, lam=1.0, kl=KLConfig(beta=0.0), missing_stop_penalty=3.0,
    )  # fmt: skip
    exp = done.exp
    (answers, tokens, asked), flat = seen[0], [r for g in exp.groups for r in g.responses]
    assert answers == [text.split()[0] for text in asked] and answers[0] == answers[1]
    assert [len(row) for row in tokens] == exp.lengths.tolist()
    want = torch.zeros(exp.mask.shape)
    for i, response in enumerate(flat):
        for t, token in enumerate(response):
            want[i, t] = 0.5 * (token == 7) + 0.1 * int(answers[i][1:])
    assert (exp.columns["token_scores"] - want).abs().max() < 1e-6
    assert (exp.scores - want.sum(1)).abs().max() < 1e-5 and not exp.ends.any()
    worth = want.sum(1) - 3.0 * ~exp.stopped
    assert (exp.worth - worth).abs().max() < 1e-5
    want[torch.arange(6), exp.lengths - 1] -= 3.0 * ~exp.stopped
    to_go = want.flip(1).cumsum(1).flip(1) * exp.mask
    assert "ref" not in exp.columns and "objective/kl" not in done.row
    assert (exp.columns["returns"] - to_go).abs().max() < 1e-5


def test_a_reward_that_asks_for_a_column_that_is_not_there(base, tmp_path):
    def reward(prompts, responses, answer):
        return [0.0] * len(responses)

    with pytest.raises(InputError, match="asks for the column 'answer'"):
        train(base, tmp_path / "run", reward)
    assert not (tmp_path / "run").exists()


# -- the critic


def test_the_critic_warms_up_alone(base, tmp_path):
    settings = {"critic_warmup": 1, "ppo_epochs": 2}
    other = str(write_case(tmp_path / "critic", hidden_size=16, num_attention_heads=2))
    kinds = {
        "adapter": {}, "trunk": {"critic": "trunk"}, "model": {"critic": other},
        "trunk of all weights": {"critic": "trunk", "lora": None, "lr": 1e-3},
    }  # fmt: skip
    for name, more in kinds.items():
        done = one_update(base, tmp_path / name, **settings, **more)
        load = {"lora": more["lora"]} if "lora" in more else {}
        assert same(done, start_of(base, **load)), name
        assert done.weights["value/value_head.weight"].abs().max() > 0, name
        assert "loss/value" in done.row and "loss/policy" not in done.row, name
        second = one_update(base, tmp_path / f"{name} 2", **settings, **more, at=2)
        assert not same(second, done), name
        assert "loss/policy" in second.row


def test_a_critic_starts_from_the_reward_model(base, tmp_path):
    """Then it says of every prefix what the reward model would."""
    torch.manual_seed(3)
    model = policy_of(base, LoraConfig(r=2, alpha=4), head="score")
    with torch.no_grad():
        for _, p in model.trainable():
            p.add_(0.1 * torch.randn(p.shape))
    model.save_pretrained(tmp_path / "rm")
    settings = {"critic_start": "reward", "batch_size": 2}
    exp = one_update(base, tmp_path / "run", str(tmp_path / "rm"), **settings).exp
    for i, group in enumerate(exp.groups):
        for t in range(len(group.responses[0])):
            ids = torch.tensor([[*group.prompt.tolist(), *group.responses[0][:t].tolist()]])
            with torch.no_grad(), model.plain_attention():
                want = model.model(ids, use_cache=False).logits.item()
            assert exp.columns["values"][i, t].item() == pytest.approx(want, abs=1e-5)
    with pytest.raises(InputError, match="needs a single reward that is a reward model"):
        train(base, tmp_path / "x", critic_start="reward")
    plain = one_update(base, tmp_path / "y", str(tmp_path / "rm"), batch_size=2).exp
    assert not plain.columns["values"].any()


def test_a_critic_with_other_words_is_refused(base, tmp_path, tiny_model):
    with pytest.raises(InputError, match="has another vocabulary than the policy"):
        train(base, tmp_path / "run", critic=str(tiny_model))


# -- learning


def steps_of(monkeypatch):
    """Counts the optimizer steps of the policy, by the row each gives."""
    rows, step = [], Learner.step

    def counted(learner, *args, **how):
        rows.append(step(learner, *args, **how))
        return rows[-1]

    monkeypatch.setattr(Learner, "step", counted)
    return rows


def test_early_stop_kl(base, tmp_path, monkeypatch):
    """The step that is too far is the last one of its update."""
    rows = steps_of(monkeypatch)
    settings = {"ppo_epochs": 4, "lr": 1e-2, "max_steps": 1}
    train(base, tmp_path / "all", **settings)
    far = [row["policy/approxkl"] for row in rows]
    assert len(far) == 4 and far[0] == 0.0 and far[1] > 0
    rows.clear()
    train(base, tmp_path / "some", **settings, early_stop_kl=far[1] * 0.9)
    assert [row["policy/approxkl"] for row in rows] == far[:2]
    rows.clear()
    train(base, tmp_path / "one", **settings, early_stop_kl=max(far) * 1.1)
    assert len(rows) == 4


def test_minibatches_cover_the_update_anew_in_every_pass(base, tmp_path, monkeypatch):
    places, step = [], Learner.step

    def noted(learner, exp, at, **how):
        places.append(sorted(at))
        return step(learner, exp, at, **how)

    monkeypatch.setattr(Learner, "step", noted)
    train(base, tmp_path / "run", batch_size=7, minibatches=3, ppo_epochs=2, max_steps=1)
    first, second = places[:3], places[3:]
    for part in (first, second):
        assert sorted(place for places in part for place in places) == list(range(7)) and [
            *map(len, part)
        ] == [3, 2, 2]
    assert first != second


def test_beta_follows_the_kl(base, tmp_path):
    """Ziegler's controller, in nats per response and samples; seen in the next row and the loss."""
    settings = {"kl": KLConfig(beta=0.3, target=2.0, horizon=10), "max_steps": 3, "lr": 1e-2}
    train(base, tmp_path / "run", **settings)
    rows = rows_of(tmp_path / "run" / "metrics.jsonl")
    beta = 0.3
    for row in rows:
        assert row["objective/kl_coef"] == pytest.approx(beta, rel=1e-7)
        error = max(-0.2, min(0.2, row["objective/kl"] / 2.0 - 1))
        beta *= 1 + error * 3 / 10
    assert rows[1]["objective/kl_coef"] == pytest.approx(0.3 * (1 - 0.2 * 0.3))


def test_beta_in_the_loss_is_the_one_that_is_steered(base, tmp_path, monkeypatch):
    seen, step = [], Learner.step

    def noted(learner, *args, **how):
        seen.append(learner.objective.beta)
        return step(learner, *args, **how)

    monkeypatch.setattr(Learner, "step", noted)
    kl = KLConfig("k2", "loss", beta=0.3, target=2.0, horizon=10)
    train(base, tmp_path / "run", kl=kl, max_steps=3, ppo_epochs=1)
    rows = rows_of(tmp_path / "run" / "metrics.jsonl")
    assert seen == pytest.approx([row["objective/kl_coef"] for row in rows], rel=1e-7)
    assert seen[0] == 0.3 > seen[1] > seen[2]


def test_the_learning_rate_of_an_update(base, tmp_path):
    settings = {"max_steps": 3, "lr": 1e-2, "warmup": 1, "schedule": "linear"}
    train(base, tmp_path / "run", **settings)
    rates = [row["learning_rate"] for row in rows_of(tmp_path / "run" / "metrics.jsonl")]
    assert rates == pytest.approx([1e-2, 1e-2, 5e-3])


def test_online_dpo_pairs_the_best_with_the_worst(base, tmp_path, monkeypatch):
    """By the score that is learnt from: the penalty for a missing stop is in it."""
    pairs, take = [], Learner._pairs

    def noted(learner, exp, places):
        for batch in take(learner, exp, places):
            pairs.extend(batch.encoded)
            yield batch

    monkeypatch.setattr(Learner, "_pairs", noted)
    settings = {"loss": "dpo", "kl": KLConfig(beta=0.2), "samples_per_prompt": 4, "batch_size": 9}
    settings |= {"missing_stop_penalty": 100.0, "ppo_epochs": 1}
    done = one_update(base, tmp_path / "run", **settings)
    worth = (done.exp.scores - 100.0 * ~done.exp.stopped).view(9, 4)
    want = [
        [g.responses[int(w.argmax())].tolist(), g.responses[int(w.argmin())].tolist()]
        for g, w in zip(done.exp.groups, worth, strict=True) if w.max() > w.min()
    ]  # fmt: skip
    assert [[r.tolist() for r in item.responses] for item in pairs] == want and len(want) > 5
    assert done.row["loss"] == pytest.approx(np.log(2), abs=1e-5)  # the policy is its reference
    assert done.row["rewards/margins"] == pytest.approx(0, abs=1e-5)
    plain = one_update(base, tmp_path / "x", **{**settings, "missing_stop_penalty": 0.0})
    assert not same(done, plain)


def test_online_dpo_without_a_winner(base, tmp_path):
    flat = lambda prompts, responses: [1.0] * len(responses)  # noqa: E731
    settings = {"loss": "dpo", "kl": KLConfig(beta=0.2)}
    done = one_update(base, tmp_path / "run", flat, **settings)
    assert same(done, start_of(base)) and done.row["groups/zero_variance"] == 1.0


def test_online_dpo_at_another_temperature_knows_no_kl(base, tmp_path):
    """Its reference is at temperature 1 and its samples are not."""
    settings = {"loss": "dpo", "kl": KLConfig(beta=0.2)}
    assert "objective/kl" in one_update(base, tmp_path / "a", **settings).row
    others: Any = {"b": {"temperature": 0.7}, "c": {"min_new_tokens": 3}}
    for name, more in others.items():
        assert "objective/kl" not in one_update(base, tmp_path / name, **settings, **more).row


def test_a_loss_that_is_not_finite_stops_before_it_moves_anything(base, tmp_path):
    reward = lambda prompts, responses: [1e38 * i for i, _ in enumerate(responses)]  # noqa: E731
    with pytest.raises(FloatingPointError, match="not finite"):
        train(base, tmp_path / "run", reward, whiten_advantages=False, value_clip=None)


# -- sampling, evaluation, what people read


def test_stop_tokens_and_stop_texts(base, tmp_path):
    """A response ends with its stop, which is trained; rewards read what comes before."""
    seen = []

    def reward(prompts, responses):
        seen.extend(responses)
        return even_words(prompts, responses)

    settings = {"batch_size": 9, "max_new_tokens": 12, "max_steps": 1}
    exp = one_update(base, tmp_path / "a", reward, **settings, stop_ids=[5, 8]).exp
    flat = [group.responses[0].tolist() for group in exp.groups]
    assert exp.stopped.tolist() == [tokens[-1] in (5, 8) for tokens in flat]
    assert not any({5, 8} & set(tokens[:-1]) for tokens in flat) and exp.stopped.any()
    cut = [t[:-1] if stop else t for t, stop in zip(flat, exp.stopped, strict=True)]
    assert seen == [text_of(tokens) for tokens in cut]
    seen.clear()
    texts = {"stop": ["w7", "w11"], "stop_ids": []}
    exp = one_update(base, tmp_path / "b", reward, **settings, **texts).exp
    flat = [group.responses[0].tolist() for group in exp.groups]
    ends = [tokens[-1] in (7, 11) for tokens in flat]
    assert exp.stopped.tolist() == ends and any(ends) and exp.mask.sum() == sum(map(len, flat))
    rows = rows_of(tmp_path / "b" / "samples.jsonl")
    for text in (*seen, *(row["response"] for row in rows)):
        assert not {"w7", "w11"} & set(text.split())
    assert [row["finish"] for row in rows] == ["stop" if end else "length" for end in ends[:2]]


def test_evaluations_have_the_same_noise(base, tmp_path):
    """An unmoved policy gives the same answers before, during and after; updates differ."""
    settings = {"eval_fraction": 0.4, "eval_every": 1, "lr": 1e-12, "max_steps": 2, "samples": 9}
    train(base, tmp_path / "run", **settings, batch_size=5)
    rows = rows_of(tmp_path / "run" / "samples.jsonl")
    by_stage = {stage: [(r["prompt"], r["response"]) for r in rows if r["stage"] == stage]
                for stage in ("before", "during", "after")}  # fmt: skip
    assert by_stage["before"] == by_stage["during"] == by_stage["after"]
    assert len(by_stage["before"]) >= 2
    trained = {r["prompt"] for r in rows if r["stage"] == "train"}
    assert not trained & {prompt for prompt, _ in by_stage["before"]}
    told = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    metrics = [r for r in rows_of(tmp_path / "run" / "metrics.jsonl") if "eval_scores" in r]
    assert [row["step"] for row in metrics] == [0, 1, 2]
    shown = [r["score"] for r in rows if r["stage"] == "before"]
    assert told["before"]["scores"] == pytest.approx(np.mean(shown))
    assert told["before"]["n"] == len(shown) and told["after"]["step"] == 2
    assert told["before"]["scores_low"] <= told["before"]["scores"] <= told["before"]["scores_high"]
    fewer = one_update(base, tmp_path / "few", **{**settings, "eval_prompts": 1}, batch_size=5)
    assert (
        fewer and json.loads((tmp_path / "few" / "evaluation.json").read_text())["after"]["n"] == 1
    )


def test_samples_for_people(base, tmp_path):
    done = one_update(base, tmp_path / "run", samples=2, samples_per_prompt=2)
    rows = rows_of(tmp_path / "run" / "samples.jsonl")
    assert len(rows) == 2
    for place, row in enumerate(rows):
        at, exp = 2 * place, done.exp
        assert row["prompt"] == PROMPTS[done.numbers[place]][0].content
        assert row["response"] == text_of(
            [t for t in exp.groups[place].responses[0] if t not in (2, 9)]
        )
        assert row["score"] == pytest.approx(exp.scores[at].item())
        assert row["tokens"] == exp.lengths[at] and row["stage"] == "train" and row["step"] == 1
        assert row["finish"] == ("stop" if exp.stopped[at] else "length")


def test_updates_do_not_repeat_their_noise(base, tmp_path):
    """The same prompts sampled anew give other answers; another seed too."""
    settings = {"batch_size": 9, "epochs": 2, "lr": 1e-12}
    first = one_update(base, tmp_path / "a", **{**settings, "at": 1})
    second = one_update(base, tmp_path / "b", **{**settings, "at": 2})
    answers = [
        {n: g.responses[0].tolist() for n, g in zip(d.numbers, d.exp.groups, strict=True)}
        for d in (first, second)
    ]
    assert sum(answers[0][n] == answers[1][n] for n in range(9)) <= 2


def test_prompts_without_room_are_left_out_and_counted(base, tmp_path):
    train(base, tmp_path / "run", max_length=11, max_steps=1)  # of words 1 to 5, with 8 new tokens
    told = json.loads((tmp_path / "run" / "data_report.json").read_text())["encoding"]
    long = sum(len(p[0].content.split()) > 3 for p in PROMPTS)
    assert told["prompts without room"] == long > 0
    assert told["train prompts"] == len(PROMPTS) - long
    with pytest.raises(InputError, match="none of the 9 prompts leaves room for 8 new tokens"):
        train(base, tmp_path / "x", prompts=[[PROMPTS[4][0]._replace(content="w3 " * 40)]] * 9)


def test_texts_as_prompts(base, tmp_path):
    texts = [p[0].content for p in PROMPTS]
    plain = one_update(base, tmp_path / "a")
    assert same(plain, one_update(base, tmp_path / "b", prompts=texts))


def test_what_cannot_be_trained_on_samples(base, tmp_path):
    with pytest.raises(InputError, match=r"lora.dropout is 0.1: with dropout the policy that"):
        train(base, tmp_path / "a", lora=LoraConfig(r=2, dropout=0.1))
    with pytest.raises(InputError, match="is a reward model, which writes no text"):
        train(base, tmp_path / "b", load={"head": "score"})
    assert not any(tmp_path.iterdir())


def test_it_learns(base, tmp_path):
    """Even words become more, with a critic and without."""
    settings = {"max_steps": 10, "epochs": 30, "lr": 1e-2, "samples": 0, "save_every": 0}
    settings |= {"kl": KLConfig(beta=0.01), "batch_size": 9, "samples_per_prompt": 4}
    for name in ("gae", "grpo"):
        train(base, tmp_path / name, estimator=name, **settings)
        scores = [r["objective/scores"] for r in rows_of(tmp_path / name / "metrics.jsonl")]
        assert np.mean(scores[-3:]) > np.mean(scores[:3]) + 1.0, (name, scores)
