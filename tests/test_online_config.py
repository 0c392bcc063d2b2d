"""Every field of an online run's configuration does something, and what cannot be is refused."""

import dataclasses
import json

import pytest

from prefopt import InputError, KLConfig, PPOConfig
from prefopt.rundir import RunDir
from tests.online_case import differences, left_behind, rows_of, train, write_case


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_case(tmp_path_factory.mktemp("online") / "base")


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(RunDir, "report", lambda self: None)


# -- what is refused


REFUSED = [
    ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
    ({"samples_per_prompt": 0}, "samples_per_prompt is 0; it must be at least 1"),
    ({"minibatches": 0}, "minibatches is 0; it must be at least 1"),
    ({"ppo_epochs": 0}, "ppo_epochs is 0"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
    ({"temperature": float("nan")}, "temperature is nan; it must be above 0"),
    ({"lr": -1.0}, "lr is -1.0; it must be above 0"),
    ({"clip_scores": 0.0}, "clip_scores is 0.0; it must be above 0"),
    ({"value_clip": 0.0}, "value_clip is 0.0; it must be above 0"),
    ({"importance_cap": 0.0}, "importance_cap is 0.0; it must be above 0"),
    ({"early_stop_kl": 0.0}, "early_stop_kl is 0.0; it must be above 0"),
    ({"gamma": 1.01}, "gamma is 1.01; it must be in [0, 1]"),
    ({"lam": -0.1}, "lam is -0.1; it must be in [0, 1]"),
    ({"eval_fraction": 1.0}, "eval_fraction is 1.0; it must be in [0, 1)"),
    ({"entropy_coef": -1.0}, "entropy_coef is -1.0; it must be at least 0"),
    ({"missing_stop_penalty": -1.0}, "missing_stop_penalty is -1.0; it must be at least 0"),
    ({"missing_stop_score": float("inf")}, "missing_stop_score is inf, no finite number"),
    (
        {"missing_stop_score": -1.0, "missing_stop_penalty": 1.0},
        "missing_stop_score replaces the score that the penalty lowers",
    ),
    ({"overlong_buffer": 200}, "overlong_buffer is 200, above max_new_tokens 128"),
    ({"top_p": 0.9}, "top_p and top_k would sample from a truncated distribution"),
    ({"top_k": 5}, "top_p and top_k would sample from a truncated distribution"),
    ({"min_new_tokens": 129}, "min_new_tokens is 129 and max_new_tokens 128"),
    ({"max_length": 128}, "leaves no room for a prompt within max_length 128"),
    ({"estimator": "gea"}, "estimator is 'gea'; it is one of gae, reinforce++, rloo, grpo"),
    ({"loss": "pop"}, "loss is 'pop'; it is one of ppo, gspo, cispo, reinforce, dpo"),
    ({"aggregation": "mean"}, "aggregation is 'mean'; it is one of token-mean, seq-mean"),
    ({"engine": "vllm"}, "engine is 'vllm'; it is one of torch, continuous"),
    ({"truncated": "yes"}, "truncated is 'yes'; it is one of terminal, bootstrap, mask"),
    ({"normalize_scores": "off"}, "normalize_scores is 'off'; it is one of none, running"),
    ({"importance": "tis"}, "importance is 'tis'; it is one of none, truncate, mask"),
    ({"schedule": "poly"}, "schedule is 'poly'; it is one of linear, cosine, constant"),
    ({"critic_start": "one"}, "critic_start is 'one'; it is one of zero, reward"),
    ({"template": "chatml"}, "template is 'chatml'; it is one of auto, chat"),
    ({"loss_options": {"clp": 0.1}}, "policy loss 'ppo' takes no 'clp' (did you mean 'clip'?)"),
    ({"loss_options": {"clip": -0.1}}, "clip is -0.1; it must be in (0, 1]"),
    ({"loss": "reinforce", "loss_options": {"clip": 0.1}}, "it takes: no options"),
    ({"estimator": "grpo", "samples_per_prompt": 1}, "estimator grpo needs at least 2"),
    ({"loss": "dpo", "samples_per_prompt": 1}, "loss dpo needs at least 2"),
    ({"loss": "dpo", "kl": {"beta": 0.0}}, "loss dpo takes its beta from kl.beta, above 0"),
    ({"loss": "dpo", "kl": {"target": 1.0}}, "no kl.target"),
    ({"loss": "dpo", "loss_options": {"beta": 1.0}}, "it has no loss options"),
    ({"loss": "dpo", "entropy_coef": 0.1}, "loss dpo has no entropy_coef; leave it out"),
    ({"loss": "dpo", "aggregation": "token-mean"}, "loss dpo has no aggregation; leave it out"),
    ({"loss": "dpo", "importance": "mask"}, "loss dpo has no importance; leave it out"),
    ({"loss": "dpo", "early_stop_kl": 0.1}, "loss dpo has no early_stop_kl; leave it out"),
    ({"loss": "dpo", "whiten_rewards": True}, "loss dpo has no whiten_rewards; leave it out"),
    ({"estimator": "rloo", "truncated": "bootstrap"}, "truncated bootstrap needs the critic"),
    ({"loss": "dpo", "truncated": "bootstrap"}, "truncated bootstrap needs the critic"),
    ({"estimator": "rloo", "critic_warmup": 1}, "critic_warmup is about the critic of estimator"),
    ({"estimator": "rloo", "critic": "trunk"}, "critic is about the critic of estimator gae"),
    ({"loss": "dpo", "critic_lr": 1e-3}, "critic_lr is about the critic of estimator gae"),
    ({"estimator": "grpo", "critic_start": "reward"}, "critic_start is about the critic"),
    ({"kl": {"kind": "k3"}}, "kl kind k3 in the reward does not have the gradient of a KL penalty"),
    ({"kl": {"kind": "k2"}}, "kl kind k2 in the reward"),
    ({"kl": {"placement": "loss"}}, "kl kind k1 in the loss has a gradient of mean zero"),
    ({"kl": {"kind": "k4"}}, "kind is 'k4'; it is one of k1, k2, k3"),
    ({"kl": {"placement": "rewards"}}, "placement is 'rewards'; it is one of reward, loss"),
    ({"kl": {"beta": -0.1}}, "kl.beta is -0.1; it must be at least 0"),
    ({"kl": {"target": 0.0}}, "kl.target is 0.0; it must be above 0"),
    ({"kl": {"target": 1.0, "horizon": 0}}, "kl.horizon is 0; it must be above 0"),
    ({"kl": {"target": 1.0, "beta": 0.0}}, "kl.target steers kl.beta, which has to start above 0"),
]


@pytest.mark.parametrize(("fields", "sentence"), REFUSED, ids=lambda x: str(x)[:60])
def test_what_cannot_be_is_refused(fields, sentence):
    with pytest.raises(InputError) as error:
        fields = dict(fields)
        if "kl" in fields:
            fields["kl"] = KLConfig(**fields["kl"])
        PPOConfig(out="nowhere", **fields)
    assert sentence in str(error.value)


def test_more_processes_than_one_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="trains in one process"):
        PPOConfig(out="nowhere")


def test_what_null_means():
    """Samples of a prompt, aggregation and critic where the configuration does not say."""
    of = lambda **fields: PPOConfig(out="x", **fields)  # noqa: E731
    assert [of().n, of(estimator="rloo").n, of(loss="dpo").n, of(samples_per_prompt=7).n] == [
        1, 4, 2, 7,
    ]  # fmt: skip
    assert of(estimator="reinforce++").n == 1
    modes = [of(), of(estimator="dr_grpo"), of(estimator="grpo", loss="gspo")]
    assert [config.mode for config in modes] == [
        "token-mean", "token-sum-const", "seq-mean-token-mean",
    ]  # fmt: skip
    assert of(estimator="dr_grpo", aggregation="token-mean").mode == "token-mean"
    assert of().has_critic and not of(estimator="rloo").has_critic and not of(loss="dpo").has_critic
    sampling = of(stop=["x"], stop_ids=[3], min_new_tokens=2, temperature=0.5).sampling
    assert (sampling.stop, sampling.stop_ids) == (("x",), (3,))
    assert (sampling.min_new_tokens, sampling.temperature, sampling.top_p) == (2, 0.5, 1.0)


# -- every field does something

LEARNT = "checkpoint/weights.safetensors"
VALUED = "checkpoint/critic.safetensors"
# field: (its value, other fields of both runs, what must differ, what must not)
FIELDS = {
    "estimator": ("reinforce++", {}, LEARNT, None),
    "loss": ("reinforce", {"lr": 1e-2}, LEARNT, VALUED),
    "loss_options": ({"clip": 1e-3}, {}, LEARNT, None),
    "aggregation": ("seq-mean-token-mean", {}, LEARNT, VALUED),
    "kl": (KLConfig(beta=3.0), {"max_steps": 2}, LEARNT, None),
    "entropy_coef": (1.0, {}, LEARNT, VALUED),
    "batch_size": (2, {}, LEARNT, None),
    "samples_per_prompt": (2, {}, LEARNT, None),
    "minibatches": (3, {}, LEARNT, None),
    "ppo_epochs": (3, {}, LEARNT, None),
    "max_length": (12, {"batch_size": 9}, LEARNT, None),
    "max_new_tokens": (6, {}, LEARNT, None),
    "min_new_tokens": (7, {}, LEARNT, None),
    "temperature": (0.5, {}, LEARNT, None),
    "stop": (["w7", "w8", "w10", "w11", "w12", "w13"], {"batch_size": 9}, LEARNT, None),
    "stop_ids": ([4, 5, 6, 7, 8], {}, LEARNT, None),
    "truncated": ("mask", {}, LEARNT, None),
    "missing_stop_penalty": (5.0, {}, LEARNT, None),
    "missing_stop_score": (-3.0, {}, LEARNT, None),
    "overlong_buffer": (7, {}, LEARNT, None),
    "overlong_factor": (9.0, {"overlong_buffer": 7}, LEARNT, None),
    "normalize_scores": ("running", {}, VALUED, None),
    "clip_scores": (0.1, {}, LEARNT, None),
    "whiten_rewards": (True, {}, VALUED, None),
    "whiten_advantages": (False, {}, LEARNT, VALUED),
    "gamma": (0.8, {}, LEARNT, None),
    "lam": (0.1, {}, LEARNT, None),
    "importance": ("truncate", {"importance_cap": 0.5}, LEARNT, VALUED),
    "importance_cap": (0.5, {"importance": "truncate"}, LEARNT, VALUED),
    "critic": ("trunk", {}, LEARNT, None),
    "critic_lr": (0.1, {}, VALUED, LEARNT),
    "critic_warmup": (1, {}, LEARNT, VALUED),
    "value_coef": (1.0, {"critic": "trunk"}, LEARNT, None),
    "value_clip": (1e-3, {"ppo_epochs": 3, "critic_lr": 1e-2}, VALUED, LEARNT),
    "lr": (1e-4, {"critic_lr": 1e-3}, LEARNT, VALUED),
    "epochs": (2, {"max_steps": None, "batch_size": 9}, "checkpoint", None),
    "max_steps": (2, {}, "checkpoint", None),
    "early_stop_kl": (1e-6, {"ppo_epochs": 3}, LEARNT, None),
    "max_norm": (0.01, {"adam_eps": 1.0}, LEARNT, None),
    "warmup": (2.0, {}, LEARNT, None),
    "schedule": ("constant", {"max_steps": 2}, LEARNT, None),
    "weight_decay": (10.0, {}, LEARNT, None),
    "adam_eps": (1.0, {}, LEARNT, None),
    "eval_fraction": (0.3, {}, "evaluation", None),
    "eval_prompts": (1, {"eval_fraction": 0.4}, "evaluation", LEARNT),
    "eval_every": (1, {"eval_fraction": 0.3, "max_steps": 3}, "metrics", LEARNT),
    "samples": (1, {}, "samples", LEARNT),
    "seed": (1, {}, LEARNT, None),
    "template": ("transcript", {}, LEARNT, None),
    "save_every": (2, {"max_steps": 3, "keep": 9}, "files", "model/adapter_model.safetensors"),
    "keep": (1, {"max_steps": 3}, "files", LEARNT),
}
ELSEWHERE = {
    "out": "every test", "resume": "test_online_resume", "parallel": "has one value",
    "micro_tokens": "test_online_invariance", "slots": "test_online_invariance",
    "gradient_checkpointing": "test_online_invariance", "critic_start": "test_online",
    "engine": "below", "top_p": "refused", "top_k": "refused",
}  # fmt: skip


def test_no_field_is_forgotten():
    fields = {field.name for field in dataclasses.fields(PPOConfig)}
    assert fields == FIELDS.keys() | ELSEWHERE.keys() and not FIELDS.keys() & ELSEWHERE.keys()


@pytest.fixture(scope="module")
def plain_runs(base, tmp_path_factory):
    """What runs without the field leave behind, by their settings."""
    known = {}

    def run(settings):
        key = repr(sorted(settings.items(), key=str))
        if key not in known:
            known[key] = outcome(base, tmp_path_factory.mktemp("plain") / "run", settings)
        return known[key]

    return run


def outcome(base, out, settings):
    train(base, out, **{"max_steps": 1, **settings})
    found = left_behind(out)
    found["files"] = sorted(path.name for path in (out / "checkpoints").iterdir())
    return found


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_does_something(base, plain_runs, tmp_path, name):
    value, others, differs, stays = FIELDS[name]
    plain = plain_runs(others)
    changed = outcome(base, tmp_path / "run", {**others, name: value})
    different = differences(plain, changed)
    assert differs in different
    assert stays is None or (stays in plain and stays not in different)


def test_the_continuous_engine_samples_another_way(base, tmp_path):
    """Of the same distribution: its log-probs are those of the trainer."""
    train(base, tmp_path / "run", engine="continuous", minibatches=2, max_steps=1)
    (row,) = rows_of(tmp_path / "run" / "metrics.jsonl")
    assert 0 < row["rollout/logprob_gap_max"] < 1e-4 and row["policy/ratio_first"] == 0.0
    told = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert told["objective"] == "ppo"
