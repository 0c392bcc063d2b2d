"""Whole runs with other objectives than plain DPO: a reference that follows, losses without one,
losses over the whole step, KTO."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from prefopt import DPO, InputError, LoraConfig, Policy, TrainConfig, load_preferences, train
from prefopt.checkpoint import load_checkpoint
from prefopt.objectives.kto import KTO
from prefopt.rundir import RunDir

TIMING = {"tokens_per_s", "flop_utilization", "elapsed_s", "peak_memory_bytes"}


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(RunDir, "report", lambda self: None)


@pytest.fixture
def run(tmp_path, tiny_model, tiny_rows):
    pairs = load_preferences(tiny_rows)

    def call(out, objective=None, lora=LoraConfig(r=4), **changes):  # noqa: B008 - frozen
        torch.manual_seed(0)
        policy = Policy.from_pretrained(tiny_model, lora=lora, dtype="float32")
        values = {
            "batch_size": 4, "micro_tokens": 100, "max_length": 128, "lr": 5e-3, "samples": 0,
            "eval_fraction": 0.25, "save_every": 1, "keep": 50, "cache": str(tmp_path / "cache"),
            "max_steps": 5, "epochs": 3,
        }  # fmt: skip
        config = TrainConfig(str(tmp_path / out), **{**values, **changes})
        return train(objective or DPO(), policy, pairs, config, quiet=True)

    return call


def numbers(run):
    return [{k: v for k, v in row.items() if k not in TIMING} for row in run.metrics]


def steps(run, key):
    return [row[key] for row in run.metrics if "loss" in row]


def final(run):
    (file,) = (run.dir / "model").glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("lora", [LoraConfig(r=4), None], ids=["adapter", "all weights"])
def test_a_reference_that_becomes_the_policy(run, lora):
    """Right after each move policy and reference agree in every bit, and never else."""
    done = run("out", lora=lora, ref_sync_steps=2, ref_sync_alpha=1.0, lr=1e-3)
    margins, losses = steps(done, "rewards/margins"), steps(done, "loss")
    assert [m == 0.0 for m in margins] == [True, False, True, False, True]
    assert losses[2] == pytest.approx(math.log(2), abs=1e-7) and losses[3] != losses[2]
    still = run("still", lora=lora, lr=1e-3)
    assert numbers(done)[:3] == numbers(still)[:3], "before its first move nothing is different"
    assert 0.0 not in steps(still, "rewards/margins")[1:]


def test_the_reference_is_a_moving_average_of_the_policy(run):
    done = run("out", ref_sync_steps=2, ref_sync_alpha=0.3)
    folders = [done.dir / "checkpoints" / f"step-{i:06d}" for i in (1, 2, 3, 4)]
    first, second, third, fourth = (load_checkpoint(folder)[0] for folder in folders)
    assert not load_checkpoint(folders[0])[1]["reference moved"]
    assert load_checkpoint(folders[1])[1]["reference moved"]
    for name, start in first["reference"].items():
        once = 0.3 * second["weights"][name] + 0.7 * start
        assert torch.allclose(second["reference"][name], once, rtol=1e-5, atol=1e-7)
        assert torch.equal(third["reference"][name], second["reference"][name])
        twice = 0.3 * fourth["weights"][name] + 0.7 * once
        assert torch.allclose(fourth["reference"][name], twice, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("what", "step"), [("follows", 1), ("follows", 2), ("follows", 3), ("kto", 2), ("aot", 3)]
)
def test_resume_is_bitwise(run, what, step, tmp_path):
    changes = {"ref_sync_steps": 2} if what == "follows" else {}
    objective = {"follows": DPO(), "kto": KTO(), "aot": DPO("aot")}[what]
    whole = run("whole", objective, **changes)
    path = str(whole.dir / "checkpoints" / f"step-{step:06d}")
    again = run("again", objective, resume=path, **changes)
    a, b = final(whole), final(again)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert numbers(whole)[-1] == numbers(again)[-1]


def test_evaluation_stays_against_the_start(run, tmp_path):
    moving = run("moving", ref_sync_steps=5, ref_sync_alpha=1.0)
    still = run("still")
    for one, other in ((moving, still),):
        a, b = (json.loads((r.dir / "evaluation.json").read_text())["after"] for r in (one, other))
        assert a == b and a["margin_mean"] != 0.0


def test_what_a_moved_reference_says_is_not_kept(run, tmp_path):
    """Only the pairs seen before the first move, and those held out, are in the cache."""
    done = run("out", ref_sync_steps=2)
    notes = json.loads((done.dir / "data_report.json").read_text())
    held_out = notes["encoding"]["held-out pairs"]
    assert notes["reference"]["responses computed"] == 2 * (held_out + 2 * 4)
    assert len(list((tmp_path / "cache").glob("*/key.json"))) == 1


def test_a_loss_without_reference_has_none(run, tmp_path):
    done = run("out", DPO("simpo"))
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["tokens"]
    assert len(steps(done, "loss")) == 5
    with pytest.raises(InputError, match="ref_sync_steps moves a reference, and simpo has none"):
        run("other", DPO("simpo"), ref_sync_steps=2)


def test_micro_batches_change_no_run_of_a_loss_over_the_step(run):
    """One epoch, so that the sorting and the baseline of every step are over the same items."""
    for objective in (DPO("aot"), DPO("aot_unpaired"), KTO()):
        small = run(f"{objective.name} small", objective, save_every=0, micro_tokens=60)
        large = run(f"{objective.name} large", objective, save_every=0, micro_tokens=4000)
        a, b = steps(small, "loss"), steps(large, "loss")
        assert a == pytest.approx(b, rel=1e-5) and len(set(a)) == 5


def test_kto_learns_and_says_its_baseline(run):
    done = run("out", KTO(), max_steps=9, save_every=0)
    first, last = done.metrics[1], done.metrics[-2]
    assert first["kl"] == 0.0 and first["loss"] == pytest.approx(0.5)
    assert last["loss"] < 0.5 and last["rewards/margins"] > 0.01
    after = json.loads((done.dir / "evaluation.json").read_text())["after"]
    assert after["accuracy"] > 0.6 and after["margin_mean"] > 0


def test_a_run_is_not_resumed_with_another_loss(run):
    whole = run("whole", DPO("ipo"), max_steps=2)
    path = str(whole.dir / "checkpoints" / "step-000001")
    with pytest.raises(InputError, match="saved with objective = ipo and this run has hinge"):
        run("other", DPO("hinge"), max_steps=2, resume=path)


def test_a_run_is_not_resumed_with_another_reference(run):
    whole = run("whole", max_steps=2)
    path = str(whole.dir / "checkpoints" / "step-000001")
    with pytest.raises(InputError, match="saved with ref_sync_steps = None and this run has 2"):
        run("other", max_steps=2, resume=path, ref_sync_steps=2)
