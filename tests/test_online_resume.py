"""Online runs that are stopped, killed or fail, and go on: to the bit what they would have been."""

import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import torch

from prefopt import InputError, KLConfig, LoraConfig, online
from prefopt.learner import Learner
from prefopt.rundir import RunDir
from tests.online_case import (
    LORA,
    PROMPTS,
    differences,
    even_words,
    left_behind,
    one_update,
    policy_of,
    rows_of,
    train,
    write_case,
)

ROOT = Path(__file__).resolve().parents[1]
STEPS = {"ppo_epochs": 2, "minibatches": 2}
CASES = {
    "gae, a critic that is an adapter": {"kl": KLConfig(target=0.5, horizon=20), **STEPS},
    "gae, a trunk, all weights": {"critic": "trunk", "lora": None, "lr": 1e-3, **STEPS},
    "gae, bootstrapped, scores normalised by all so far": {
        "normalize_scores": "running", "truncated": "bootstrap", "ppo_epochs": 3,
        "critic_warmup": 1, "whiten_rewards": True, "eval_fraction": 0.3,
    },
    "grpo, adaptive KL in the loss": {
        "estimator": "grpo", "kl": KLConfig("k2", "loss", 0.1, 0.5, 20), **STEPS,
    },
    "online dpo": {"loss": "dpo", "kl": KLConfig(beta=0.1), "samples_per_prompt": 3, **STEPS},
    "rf++, a KL that ends updates": {
        "estimator": "rf++_baseline", "early_stop_kl": 2e-3, "ppo_epochs": 3, "lr": 1e-2,
        "eval_fraction": 0.3, "eval_every": 1,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_case(tmp_path_factory.mktemp("online") / "base")


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Drawing one takes longer than the runs of these tests."""
    monkeypatch.setattr(RunDir, "report", lambda self: None)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


class Interrupted:
    """A run that gets SIGTERM after every optimizer step, during every other call of its reward and
    at the first finished sample of every third generation, and goes on until it is done."""

    def __init__(self, monkeypatch):
        self.steps, self.calls, self.samplings = count(1), count(1), count(1)
        taken = Learner.step

        def step(learner, *args, **kwargs):
            row = taken(learner, *args, **kwargs)
            next(self.steps)
            terminate()
            return row

        monkeypatch.setattr(Learner, "step", step)

    def reward(self, prompts, responses):
        if next(self.calls) % 2:
            terminate()
        return even_words(prompts, responses)

    def run(self, base, out, **settings):
        """(processes it took, optimizer steps)."""
        for processes in range(1, 60):
            if not train(base, out, self.reward, resume="auto", **settings).stopped:
                return processes, next(self.steps) - 1
        raise AssertionError("it gets nowhere")


@pytest.mark.parametrize("case", CASES)
def test_stopped_at_every_step_and_resumed(base, tmp_path, monkeypatch, case):
    settings = CASES[case]
    train(base, tmp_path / "whole", **settings)
    processes, steps = Interrupted(monkeypatch).run(base, tmp_path / "parts", **settings)
    assert processes > steps >= 2 * (1 if "ends" in case else 3)
    whole, parts = left_behind(tmp_path / "whole"), left_behind(tmp_path / "parts")
    assert differences(whole, parts) == []
    assert len(whole["metrics"]) >= 2 and whole["samples"] and whole["state"]["pending"] is None


def test_a_stop_during_generation_resumes(base, tmp_path, monkeypatch):
    from prefopt.rollout.drafts import Drafts

    taken, at = Drafts.take, count(1)

    def take(drafts, row, finish):
        if next(at) % 2 == 0:
            terminate()
        return taken(drafts, row, finish)

    train(base, tmp_path / "whole", max_steps=1)
    monkeypatch.setattr(Drafts, "take", take)
    assert train(base, tmp_path / "parts", max_steps=1, resume="auto").stopped
    first = tmp_path / "parts" / "checkpoints" / "step-000000"
    assert json.loads((first / "state.json").read_text())["pending"] is None
    monkeypatch.setattr(Drafts, "take", taken)
    assert not train(base, tmp_path / "parts", max_steps=1, resume="auto").stopped
    assert differences(left_behind(tmp_path / "whole"), left_behind(tmp_path / "parts")) == []


def test_a_stop_before_the_first_update_leaves_nothing(base, tmp_path, monkeypatch):
    planned = online.plan_prompts
    monkeypatch.setattr(online, "plan_prompts", lambda *args: (terminate(), planned(*args))[1])
    assert train(base, tmp_path / "run").stopped and not (tmp_path / "run").exists()


def test_an_adapter_that_is_trained_further(base, tmp_path, monkeypatch):
    """Its reference is what it was at the start, not the base; so it is when the run goes on."""
    policy = policy_of(base)
    with torch.no_grad():
        for _, p in policy.trainable():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    policy.save_pretrained(tmp_path / "adapter")
    settings = {"lora": None, "kl": KLConfig(beta=0.5), "minibatches": 2, "ppo_epochs": 1}
    done = one_update(tmp_path / "adapter", tmp_path / "one", **settings)
    assert abs(done.row["objective/kl"]) < 1e-5
    at_base = one_update(base, tmp_path / "two", **{**settings, "lora": LORA})
    assert not torch.equal(done.exp.columns["ref"], at_base.exp.columns["ref"])
    train(tmp_path / "adapter", tmp_path / "whole", **settings)
    Interrupted(monkeypatch).run(tmp_path / "adapter", tmp_path / "parts", **settings)
    whole, parts = left_behind(tmp_path / "whole"), left_behind(tmp_path / "parts")
    assert differences(whole, parts) == [] and whole["metrics"][1]["objective/kl_k3"] > 1e-4


def test_a_critic_of_its_own_resumes(base, tmp_path, monkeypatch):
    critic = write_case(tmp_path / "critic", hidden_size=16, num_hidden_layers=1)
    settings = {"critic": str(critic), "lora": None, "lr": 1e-3, "ppo_epochs": 2}
    train(base, tmp_path / "whole", **settings)
    Interrupted(monkeypatch).run(base, tmp_path / "parts", **settings)
    whole, parts = left_behind(tmp_path / "whole"), left_behind(tmp_path / "parts")
    assert differences(whole, parts) == []
    assert "critic/critic.json" in whole and "checkpoint/critic_optimizer.safetensors" in whole


def test_checkpoints_between_updates_resume_by_name(base, tmp_path):
    train(base, tmp_path / "whole", keep=5, **STEPS)
    settings = {"keep": 5, "resume": str(tmp_path / "whole" / "checkpoints" / "step-000001")}
    train(base, tmp_path / "again", **settings, **STEPS)
    whole, again = left_behind(tmp_path / "whole"), left_behind(tmp_path / "again")
    assert set(differences(whole, again)) == {"metrics", "samples"}  # of the second update alone
    assert whole["metrics"][-1] == again["metrics"][0] and len(again["metrics"]) == 1


def test_what_a_checkpoint_holds(base, tmp_path):
    """Parameters have moved, moments are there: a resumed run does not start the optimizer anew."""
    train(base, tmp_path / "run", kl=KLConfig(target=0.5, horizon=20), **STEPS)
    found = left_behind(tmp_path / "run")
    for name in ("weights", "critic", "optimizer", "critic_optimizer", "rng"):
        assert any(any(tensor) for tensor in found[f"checkpoint/{name}.safetensors"].values())
    assert found["state"]["kl"]["beta"] != 0.05
    assert found["state"]["update"] == 2 and found["state"]["watch"]["history"]["start"]


# -- rewards that fail


def broken(at, how):
    """A reward that fails in its call number ``at``, and only then."""
    calls = count(1)

    def reward(prompts, responses):
        found = even_words(prompts, responses)
        if next(calls) >= at and at:
            if how == "raises":
                raise ZeroDivisionError("no luck")
            found[0] = float("nan")
        return found

    return reward


@pytest.mark.parametrize(("at", "how"), [(1, "raises"), (2, "nan"), (3, "raises")])
def test_a_reward_that_fails_loses_nothing(base, tmp_path, how, at):
    settings = {"eval_fraction": 0.3, "eval_every": 1, "save_every": 0, **STEPS}
    word = "failed for the response" if how == "raises" else "gave nan (float), no finite number"
    with pytest.raises(InputError) as error:
        train(base, tmp_path / "run", broken(at, how), **settings)
    text = str(error.value)
    assert word in text and "to the prompt 'w" in text
    assert ("ZeroDivisionError: no luck" in text) == (how == "raises")
    saved = json.loads(next(tmp_path.glob("run/checkpoints/step-*/state.json")).read_text())
    assert saved["update"] == (at - 1) // 2 and not (tmp_path / "run" / "model").exists()
    with pytest.raises(InputError):  # it fails again, at the same place
        train(base, tmp_path / "run", broken(1, how), resume="auto", **settings)
    train(base, tmp_path / "run", broken(0, how), resume="auto", **settings)
    train(base, tmp_path / "whole", **settings)
    for name in ("metrics", "samples"):
        assert rows_of(tmp_path / "run" / f"{name}.jsonl") == rows_of(
            tmp_path / "whole" / f"{name}.jsonl"
        )
    for file in ("model/adapter_model.safetensors", "critic/value_head.safetensors"):
        ours, theirs = ((tmp_path / run / file).read_bytes() for run in ("run", "whole"))
        assert ours == theirs


# -- checkpoints of something else

BOTH = {"a": even_words, "b": lambda prompts, responses: [len(r) for r in responses]}
REFUSED = {
    "lr": ({"lr": 1e-4}, "was saved with lr = 0.003 and this run has 0.0001"),
    "seed": ({"seed": 1}, "was saved with seed = 0 and this run has 1"),
    "kl": ({"kl": KLConfig(beta=0.1)}, "was saved with kl = KLConfig(kind='k1'"),
    "estimator": ({"estimator": "rloo", "samples_per_prompt": 2}, "was saved with estimator = "),
    "steps": ({"max_steps": 3}, "was saved with max_steps = 2 and this run has 3"),
    "prompts": ({"prompts": PROMPTS[1:]}, "was saved with prompts = "),
    "weights": ({"reward_weights": {"a": 1.0, "b": 2.0}}, "was saved with rewards = a (1), b (1)"),
    "rewards": ({"reward": {"a": even_words, "c": even_words}}, "this run has a (1), c (1)"),
    "base": ({"base": {"rms_norm_eps": 1e-6, "seed": 5}}, "was trained from other base weights"),
    "dtype": ({"load": {"dtype": "bfloat16"}}, "or in another dtype"),
    "rank": ({"lora": LoraConfig(r=2, alpha=8)}, "resume with the LoRA settings of the checkpoint"),
    "no adapter": ({"lora": None}, "resume with the LoRA settings of the checkpoint"),
}


@pytest.fixture(scope="module")
def stopped(base, tmp_path_factory):
    """A run that was stopped after its first update."""
    out = tmp_path_factory.mktemp("online") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDir, "report", lambda self: None)
        train(base, out, BOTH, keep=3)
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "step-000002")
    return out


@pytest.mark.parametrize("name", REFUSED)
def test_checkpoints_of_another_run_are_refused(base, stopped, tmp_path, name):
    changed, sentence = REFUSED[name]
    changed = dict(changed)
    if "base" in changed:
        base = write_case(tmp_path / "base", **changed.pop("base"))
    reward = changed.pop("reward", BOTH)
    path = stopped / "checkpoints" / "step-000001"
    with pytest.raises(InputError) as error:
        train(base, tmp_path / "run", reward, resume=str(path), **changed)
    assert sentence in str(error.value) and str(path) in str(error.value)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_what_does_not_change_a_run_may_change(base, stopped, tmp_path):
    path = stopped / "checkpoints" / "step-000001"
    free = {"save_every": 7, "keep": 1, "samples": 1, "slots": 2}
    train(base, tmp_path / "run", BOTH, resume=str(path), **free)
    assert [row["step"] for row in rows_of(tmp_path / "run" / "metrics.jsonl")] == [2]


def test_a_folder_with_a_run_is_not_overwritten_and_a_finished_one_is_left_alone(base, tmp_path):
    out = tmp_path / "run"
    train(base, out, max_steps=1)
    with pytest.raises(InputError, match="already holds a run; continue it with --resume auto"):
        train(base, out, max_steps=1)
    before = (out / "metrics.jsonl").read_bytes()
    run = train(base, out, max_steps=1, resume="auto")
    assert not run.stopped and (out / "metrics.jsonl").read_bytes() == before


def test_a_damaged_checkpoint_is_passed_over(base, stopped, tmp_path, caplog):
    out = tmp_path / "run"
    train(base, out, max_steps=3, keep=5)
    whole = left_behind(out)
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "step-000003")
    (out / "checkpoints" / "step-000002" / "weights.safetensors").write_bytes(b"cut")
    train(base, out, max_steps=3, keep=5, resume="auto")
    assert "passing over the damaged checkpoint step-000002" in caplog.text
    assert differences(whole, left_behind(out)) == []


# -- killed

KILLED = """
import os, signal, sys
from pathlib import Path
from tests.online_case import even_words, train
calls = [0]
def reward(prompts, responses):
    calls[0] += 1
    if calls[0] == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return even_words(prompts, responses)
train(Path(sys.argv[1]), Path(sys.argv[2]), reward, max_steps=3, save_every=2, resume="auto")
"""


def test_killed_between_checkpoints(base, tmp_path):
    """In its third update, after a checkpoint of the second; it began anew in a folder that had
    rows and no checkpoint, as of a run that was killed before its first."""
    out, settings = tmp_path / "parts", {"max_steps": 3, "save_every": 2}
    train(base, out, **{**settings, "save_every": 0})
    shutil.rmtree(out / "model")
    command = [sys.executable, "-c", KILLED, str(base), str(out), "3"]
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    done = subprocess.run(command, env={**os.environ, **paths}, capture_output=True, timeout=90)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert [row["step"] for row in rows_of(out / "metrics.jsonl")] == [1, 2]
    with (out / "metrics.jsonl").open("a") as file:  # what was being written when it was killed
        file.write('{"step": 3, "los')
    train(base, out, resume="auto", **settings)
    train(base, tmp_path / "whole", **settings)
    assert differences(left_behind(tmp_path / "whole"), left_behind(out)) == []
