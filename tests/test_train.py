"""Whole training runs on a tiny model: what is written, what is computed once, and that a run
which was stopped ends up exactly where it would have."""

import contextlib
import json
import logging
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from prefopt import (
    DPO,
    InputError,
    LoraConfig,
    Policy,
    TrainConfig,
    evaluate,
    load_preferences,
    pack,
    train,
)
from prefopt.metrics import gemm_rate
from prefopt.prepare import make_plan, step_groups
from prefopt.rundir import RunDir

TIMING = {"tokens_per_s", "flop_utilization", "elapsed_s", "peak_memory_bytes"}
LORA = LoraConfig(r=4, dropout=0.1)
ROW = {
    "step", "epoch", "loss", "grad_norm", "learning_rate", "rewards/chosen", "rewards/rejected",
    "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
    "tokens_per_s", "flop_utilization", "elapsed_s", "peak_memory_bytes",
}  # fmt: skip
EVAL_ROW = {
    "step", "eval_loss", "eval_accuracy_low", "eval_accuracy_high", "eval_rewards/chosen",
    "eval_rewards/rejected", "eval_rewards/margins", "eval_rewards/accuracies",
    "eval_logps/chosen", "eval_logps/rejected", "eval_logps/accuracies",
}  # fmt: skip


@pytest.fixture
def no_report(monkeypatch):
    """Leaves out report.html: tests that only look at numbers."""
    monkeypatch.setattr(RunDir, "report", lambda self: None)


@pytest.fixture(scope="module")
def pairs(tiny_rows):
    return load_preferences(tiny_rows)


class Bench:
    """Runs on one tiny model and one cache."""

    def __init__(self, root: Path, model: Path, pairs):
        self.root, self.model, self.pairs = root, model, pairs

    def policy(self, lora=LORA, dtype="float32", seed=0):
        torch.manual_seed(seed)
        return Policy.from_pretrained(self.model, lora=lora, dtype=dtype)

    def config(self, out, **changes):
        values = {
            "batch_size": 6, "micro_tokens": 300, "max_length": 128, "lr": 5e-3, "epochs": 2,
            "eval_fraction": 0.25, "schedule": "cosine", "samples": 2, "sample_tokens": 4,
            "save_every": 0, "cache": str(self.root / "cache"),
        }  # fmt: skip
        return TrainConfig(str(self.root / out), **{**values, **changes})

    def run(self, out, *, lora=LORA, dtype="float32", seed=0, beta=0.1, pairs=None, **changes):
        policy = self.policy(lora, dtype, seed)
        config = self.config(out, seed=seed, **changes)
        return train(DPO(beta=beta), policy, pairs or self.pairs, config, quiet=True)


@pytest.fixture
def bench(tmp_path, tiny_model, pairs):
    return Bench(tmp_path, tiny_model, pairs)


def numbers(run):
    return [{k: v for k, v in row.items() if k not in TIMING} for row in run.metrics]


def weights(run):
    (file,) = (run.dir / "model").glob("*.safetensors")
    return load_file(file)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- what a run is


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model, pairs):
    """One run of two epochs, with checkpoints and all its files."""
    bench = Bench(tmp_path_factory.mktemp("run"), tiny_model, pairs)
    return bench.run("out", save_every=2, keep=2)


def test_the_run_folder_holds_what_it_should(finished):
    names = {path.name for path in finished.dir.iterdir()}
    assert names == {
        "config.yaml", "env.json", "metrics.jsonl", "samples.jsonl", "data_report.json",
        "evaluation.json", "checkpoints", "model", "report.html",
    }  # fmt: skip
    config = yaml.safe_load((finished.dir / "config.yaml").read_text())
    assert config["batch_size"] == 6 and config["schedule"] == "cosine" and "resume" not in config
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {
        path.name for path in (finished.dir / "model").iterdir()
    }
    report = json.loads((finished.dir / "data_report.json").read_text())
    assert report["rows"] == 24
    assert report["encoding"]["train pairs"] + report["encoding"]["held-out pairs"] == 24
    assert report["reference"]["responses computed"] == 48
    assert "torch" in json.loads((finished.dir / "env.json").read_text())
    page = (finished.dir / "report.html").read_bytes()
    assert b"</html>" in page
    assert finished.report() == finished.dir / "report.html" and not finished.stopped
    assert (finished.dir / "report.html").read_bytes() == page


def test_the_first_loss_is_ln_2_and_all_margins_are_0(finished):
    before, first = finished.metrics[0], finished.metrics[1]
    assert before["step"] == 0 and before["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert before["eval_rewards/margins"] == 0 and before["eval_rewards/accuracies"] == 0
    assert first["step"] == 1 and first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == 0 == first["rewards/accuracies"]
    assert first["rewards/chosen"] == 0 == first["rewards/rejected"]
    evaluation = json.loads((finished.dir / "evaluation.json").read_text())
    assert evaluation["before"]["ties"] == evaluation["before"]["n"] > 1


def test_they_are_0_too_where_all_weights_train(bench, no_report):
    first = bench.run("out", lora=None, max_steps=1).metrics[1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == 0 == first["rewards/accuracies"]
    assert first["rewards/chosen"] == 0 == first["rewards/rejected"]


def test_the_rows_have_the_agreed_names(finished):
    rows = finished.metrics
    training, evals = [r for r in rows if "loss" in r], [r for r in rows if "eval_loss" in r]
    assert [r["step"] for r in training] == list(range(1, 7))
    assert [r["step"] for r in evals] == [0, 3, 6]
    assert [r["epoch"] for r in training if r["step"] in (3, 6)] == [1, 2]
    assert all(row.keys() == ROW for row in training)
    assert all(row.keys() == EVAL_ROW for row in evals)


def test_training_works(finished):
    rows = finished.metrics
    training, evals = [r for r in rows if "loss" in r], [r for r in rows if "eval_loss" in r]
    assert training[-1]["loss"] < training[0]["loss"] - 0.1
    assert evals[-1]["eval_loss"] < evals[0]["eval_loss"] - 0.1
    assert evals[-1]["eval_rewards/margins"] > 0.1 and evals[-1]["eval_rewards/accuracies"] == 1
    evaluation = json.loads((finished.dir / "evaluation.json").read_text())
    assert evaluation["after"]["accuracy"] == 1.0 and evaluation.keys() == {
        "before", "during", "after",
    }  # fmt: skip


def test_the_learning_rate_follows_the_schedule(finished):
    rates = [row["learning_rate"] for row in finished.metrics if "loss" in row]
    want = [5e-3 * 0.5 * (1 + math.cos(math.pi * s / 5)) for s in range(5)]
    assert rates == pytest.approx([5e-3, *want])  # one step of warm-up: a tenth of six, rounded up


def test_samples_before_and_after(finished):
    rows = [json.loads(line) for line in (finished.dir / "samples.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [("before", 0)] * 2 + [("after", 6)] * 2
    assert rows[0]["prompt"] == rows[2]["prompt"] and rows[0]["prompt"].startswith("Tell me about")
    assert all(row["finish"] in ("stop", "length") for row in rows)


def test_prompts_that_leave_no_room_for_an_answer_are_not_sampled(tiny_model, pairs):
    policy = Policy.from_pretrained(tiny_model)
    for tokens, some in ((8, True), (1_000_000, False)):
        config = TrainConfig("x", max_length=128, eval_fraction=0.25, sample_tokens=tokens)
        assert bool(make_plan(DPO(), policy, pairs, config).prompts) is some


def test_checkpoints_are_kept_as_asked(finished):
    folder = finished.dir / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"latest", "step-000002", "step-000004"}
    assert {path.name for path in (folder / "step-000004").iterdir()} == {
        "weights.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json",
        "manifest.json",
    }  # fmt: skip


def test_the_model_is_the_trained_policy(finished, tiny_model, pairs):
    policy = Policy.from_pretrained(finished.dir)
    saved = weights(finished)
    assert any(v.abs().sum() > 0 for k, v in saved.items() if "lora_B" in k)
    plan = make_plan(DPO(), policy, pairs, TrainConfig("x", max_length=128, eval_fraction=0.25))
    base = Policy.from_pretrained(tiny_model)

    def batches():
        items = [plan.encoded[i] for i in plan.held_out]
        for batch in pack(items, max_tokens=4096):
            with torch.no_grad():
                yield replace(batch, ref_logprobs=base(batch))

    result = evaluate(policy, batches(), DPO())
    last = [row for row in finished.metrics if "eval_loss" in row][-1]
    assert result.metrics["loss"] == pytest.approx(last["eval_loss"], rel=1e-5)


def test_a_run_can_be_repeated_to_the_bit(finished, bench, no_report):
    again = bench.run("again")
    assert same(weights(again), weights(finished)), "neither the cache nor checkpoints matter"
    assert numbers(again) == numbers(finished)
    other = bench.run("other", seed=1)
    assert numbers(other) != numbers(finished)


def test_measuring_the_machine_draws_no_random_number():
    """It draws more or less of them by the clock, so a run would depend on how busy it was."""
    before = torch.get_rng_state()
    gemm_rate.__wrapped__("cpu", torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


# -- nothing is computed twice


@contextlib.contextmanager
def counted(monkeypatch):
    """How often a policy was asked for its reference."""
    calls, real = [], Policy.reference

    @contextlib.contextmanager
    def reference(self):
        calls.append(1)
        with real(self):
            yield

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "reference", reference)
        yield calls


def test_a_second_run_makes_no_reference_pass(bench, no_report, monkeypatch):
    with counted(monkeypatch) as calls:
        bench.run("first")
    assert len(calls) > 2
    with counted(monkeypatch) as calls:
        run = bench.run("second", lora=LoraConfig(r=2, alpha=7), lr=1e-3, beta=0.5, epochs=1)
        full = bench.run("third", lora=None, epochs=1, batch_size=3, seed=5)
    assert not calls
    for each in (run, full):
        notes = json.loads((each.dir / "data_report.json").read_text())["reference"]
        assert notes["forward passes"] == notes["responses computed"] == 0


def test_a_changed_token_weight_or_dtype_is_a_miss(bench, no_report, tiny_rows, tmp_path):
    bench.run("first", epochs=1)

    def computed(out, **changes):
        run = bench.run(out, epochs=1, **changes)
        return json.loads((run.dir / "data_report.json").read_text())["reference"]

    changed = [dict(row) for row in tiny_rows]
    changed[5]["chosen"] += "!"
    assert computed("token", pairs=load_preferences(changed))["responses computed"] == 1
    assert computed("dtype", dtype="bfloat16")["responses computed"] == 48
    copy = shutil.copytree(bench.model, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] += 1e-3
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    bench.model = copy
    assert computed("weight")["responses computed"] == 48


# -- stopping and going on


def stop_at(run, step, out):
    """What a run leaves behind that was killed a while after its checkpoint of ``step``."""
    shutil.copytree(run.dir, out)
    shutil.rmtree(out / "model")
    for folder in (out / "checkpoints").glob("step-*"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    (out / "checkpoints" / "latest").write_text(f"step-{step:06d}\n")


def check_resumption(bench, steps, lora, **changes):
    """A run stopped after each of ``steps`` (None: all) ends up where the whole one did."""
    whole = bench.run("whole", lora=lora, save_every=1, keep=99, **changes)
    last = max(row["step"] for row in whole.metrics)
    assert last >= 6
    for step in steps or range(1, last):
        out = bench.root / f"stopped-{step}"
        stop_at(whole, step, out)
        torch.rand(3)  # whatever state the generators are in
        resumed = bench.run(out.name, lora=lora, resume="auto", **changes)
        assert same(weights(resumed), weights(whole)), f"weights, from step {step}"
        assert numbers(resumed) == numbers(whole), f"metrics, from step {step}"
    evaluation = json.loads((resumed.dir / "evaluation.json").read_text())
    assert evaluation == json.loads((whole.dir / "evaluation.json").read_text())


def test_resuming_at_any_step_is_exact_for_an_adapter(bench, no_report):
    """With dropout, and several micro-batches a step."""
    check_resumption(bench, None, LORA, micro_tokens=150)


def test_resuming_at_any_step_is_exact_for_all_weights(bench, no_report):
    """Also between two rows of the metrics, each of which is a mean over four steps."""
    check_resumption(bench, None, None, eval_every=2, log_every=4)


@pytest.mark.parametrize(
    ("lora", "changes"),
    [
        (LORA, {"dtype": "float16", "log_every": 3, "batch_tokens": 500}),
        (None, {"dtype": "bfloat16", "gradient_checkpointing": True, "weight_decay": 0.1}),
    ],
    ids=["float16", "bfloat16"],
)
def test_resuming_is_exact_in_16_bits(bench, no_report, lora, changes):
    check_resumption(bench, (2, 5), lora, **changes)


def test_the_loss_scale_goes_on_where_it_was(bench, no_report, monkeypatch):
    """The first step overflows at 2**40; a scale that was forgotten would overflow again."""

    def high(*_):
        return torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-24)

    monkeypatch.setattr(sys.modules["prefopt.train"], "make_scaler", high)
    check_resumption(bench, (1, 3), LORA, dtype="float16")


def test_an_explicit_checkpoint_of_another_folder(bench, no_report):
    whole = bench.run("whole", save_every=2)
    path = whole.dir / "checkpoints" / "step-000004"
    resumed = bench.run("elsewhere", resume=str(path))
    assert same(weights(resumed), weights(whole))
    tail = [row for row in numbers(whole) if row["step"] > 4]
    assert numbers(resumed) == tail


def test_a_finished_run_is_left_alone(bench, no_report, caplog):
    run = bench.run("out", save_every=2)
    files = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in run.dir.rglob("*")}
    with caplog.at_level(logging.INFO, "prefopt"):
        again = bench.run("out", resume="auto", lr=1.0)
    assert "is finished" in caplog.text and not again.stopped
    assert files == {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in run.dir.rglob("*")}


def test_auto_without_a_checkpoint_starts_from_the_beginning(bench, no_report):
    whole = bench.run("whole")
    fresh = bench.run("fresh", resume="auto")  # no folder yet
    assert numbers(fresh) == numbers(whole)
    shutil.rmtree(whole.dir / "model")  # killed before its first checkpoint, some rows written
    again = bench.run("whole", resume="auto")
    assert numbers(again) == numbers(fresh), "no row stands there twice"
    assert same(weights(again), weights(fresh))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"seed": 1}, "seed = 0"),
        ({"batch_size": 5}, "batch_size = 6"),
        ({"micro_tokens": 200}, "micro_tokens = 300"),
        ({"epochs": 3}, "steps = 6"),
        ({"eval_fraction": 0.1}, "eval_fraction = 0.25"),
        ({"pairs": "reversed"}, "token ids = "),
        ({"lora": LoraConfig(r=2)}, "LoRA settings of the checkpoint"),
        ({"lora": LoraConfig(r=4, targets=["q_proj"])}, "LoRA settings of the checkpoint"),
        ({"dtype": "bfloat16"}, "other base weights, or in another dtype"),
    ],
)
def test_resuming_with_what_changes_the_run_is_refused(
    bench, no_report, finished, tiny_rows, changes, name
):
    out = bench.root / "out"
    stop_at(finished, 4, out)
    files = {p.name: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    if changes.get("pairs"):
        changes = {"pairs": load_preferences(tiny_rows[::-1])}
    with pytest.raises(InputError) as error:
        bench.run("out", resume="auto", **changes)
    message = str(error.value)
    assert name in message and "step-000004" in message and "resume with" in message
    assert files == {p.name: p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_another_learning_rate_may_go_on(bench, no_report, finished):
    out = bench.root / "out"
    stop_at(finished, 4, out)
    run = bench.run("out", resume="auto", lr=1e-3)
    assert not same(weights(run), weights(finished))
    assert yaml.safe_load((out / "config.yaml").read_text())["lr"] == 1e-3


def damage(checkpoint):
    file = checkpoint / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_passed_over_loudly(bench, no_report, finished, caplog):
    out = bench.root / "out"
    stop_at(finished, 4, out)
    damage(out / "checkpoints" / "step-000004")
    with caplog.at_level(logging.WARNING, "prefopt"):
        run = bench.run("out", resume="auto")
    assert "damaged checkpoint step-000004" in caplog.text
    assert same(weights(run), weights(finished)) and numbers(run) == numbers(finished)


def test_a_bad_explicit_checkpoint_is_an_error(bench, no_report, finished):
    out = bench.root / "out"
    stop_at(finished, 4, out)
    damage(out / "checkpoints" / "step-000004")
    with pytest.raises(InputError, match=r"optimizer\.safetensors .* damaged; use another"):
        bench.run("out", resume=str(out / "checkpoints" / "step-000004"))
    with pytest.raises(InputError, match=r"manifest\.json is missing"):
        bench.run("new", resume=str(bench.root / "nowhere"))
    damage(out / "checkpoints" / "step-000002")
    with pytest.raises(InputError, match=r"every checkpoint in .* is damaged"):
        bench.run("out", resume="auto")
    assert not (out / "model").exists() and not (bench.root / "new").exists()


# -- options


def test_save_every_0_keeps_only_the_model(bench, no_report):
    run = bench.run("out", save_every=0, epochs=1)
    assert not (run.dir / "checkpoints").exists() and (run.dir / "model").is_dir()


def test_max_steps(bench, no_report):
    run = bench.run("out", max_steps=4)
    assert [row["step"] for row in run.metrics if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in run.metrics if "eval_loss" in row] == [0, 3, 4]
    assert run.metrics[-2]["learning_rate"] < 2e-3, "the schedule ends with the run"


def test_without_held_out_prompts(bench, no_report):
    run = bench.run("out", eval_fraction=0.0, epochs=1)
    assert len(run.metrics) == 4 and not any("eval_loss" in row for row in run.metrics)
    assert not (run.dir / "evaluation.json").exists()
    assert not (run.dir / "samples.jsonl").exists()


def test_rows_are_means_over_their_steps(bench, no_report):
    every, some, one = (
        [row for row in bench.run(f"every-{n}", batch_size=5, log_every=n).metrics if "loss" in row]
        for n in (1, 4, 10)
    )
    assert [row["step"] for row in some] == [4, 8] and [row["step"] for row in one] == [8]
    pairs = [5, 5, 5, 3] * 2  # of the 18 of an epoch
    for row, steps in ((some[0], range(4)), (some[1], range(4, 8)), (one[0], range(8))):
        losses, norms = ([every[s][key] for s in steps] for key in ("loss", "grad_norm"))
        sizes = [pairs[s] for s in steps]
        mean = sum(n * x for n, x in zip(sizes, losses, strict=True)) / sum(sizes)
        assert row["loss"] == pytest.approx(mean, rel=1e-6)
        assert row["grad_norm"] == pytest.approx(sum(norms) / len(norms), rel=1e-6)


def test_batches_by_tokens(bench, no_report, pairs):
    policy, config = bench.policy(), bench.config("out", batch_tokens=400, epochs=1)
    plan = make_plan(DPO(), policy, pairs, config)
    groups = [group for _, group in step_groups(plan.encoded, plan.train, config)]
    assert sorted(i for group in groups for i in group) == sorted(plan.train)

    def tokens(i):
        return len(plan.encoded[i].prompt) + sum(len(r) - 1 for r in plan.encoded[i].responses)

    sizes = [sum(map(tokens, group)) for group in groups]
    assert max(sizes) <= 400 and len({len(group) for group in groups}) > 1
    for size, group, after in zip(sizes, groups, groups[1:], strict=False):
        assert size + tokens(after[0]) > 400, f"{group} could have held one more"
    run = bench.run("out", batch_tokens=400, epochs=1)
    assert [row["step"] for row in run.metrics if "loss" in row] == list(range(1, len(groups) + 1))


def test_every_epoch_has_its_own_order(bench, pairs):
    config = bench.config("out")
    plan = make_plan(DPO(), bench.policy(), pairs, config)
    groups = [group for _, group in step_groups(plan.encoded, plan.train, config)]
    first, second = ([i for group in half for i in group] for half in (groups[:3], groups[3:]))
    in_order = sorted(plan.train)
    assert sorted(first) == sorted(second) == in_order
    assert first != second and first != in_order != second
    other = step_groups(plan.encoded, plan.train, replace(config, seed=1))
    assert [i for _, group in other for i in group] != first + second
    assert not set(plan.train) & set(plan.held_out)


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_gradient_checkpointing_gives_the_same_curve(bench, no_report, lora):
    plain = bench.run("plain", lora=lora)
    less = bench.run("less", lora=lora, gradient_checkpointing=True)
    for a, b in zip(numbers(plain), numbers(less), strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert b[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_gradient_checkpointing_recomputes(bench, no_report, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls, real = [], LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda *a: (calls.append(1), real(*a))[1])
    bench.run("fill", max_steps=1, eval_fraction=0.0)
    calls.clear()
    bench.run("plain", max_steps=1, eval_fraction=0.0)
    plain = len(calls)
    calls.clear()
    bench.run("less", max_steps=1, eval_fraction=0.0, gradient_checkpointing=True)
    assert len(calls) > plain


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_runs(bench, no_report, lora, dtype):
    run = bench.run("out", lora=lora, dtype=dtype)
    training = [row for row in run.metrics if "loss" in row]
    assert training[0]["loss"] == pytest.approx(math.log(2), abs=0.02)
    assert training[-1]["loss"] < training[0]["loss"] - 0.02
    assert all("skipped" in row for row in training) == (dtype == "float16")
    saved = {v.dtype for v in weights(run).values()}
    assert saved == {torch.float32 if lora else getattr(torch, dtype)}


def test_a_float16_overflow_is_skipped_and_said(bench, no_report, monkeypatch):
    high = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    monkeypatch.setattr(sys.modules["prefopt.train"], "make_scaler", lambda *_: high)
    run = bench.run("out", dtype="float16", epochs=1, lora=None)
    rows = [row for row in run.metrics if "loss" in row]
    assert rows[0]["skipped"] == 1.0 and "grad_norm" not in rows[0]
    assert high.get_scale() < 2.0**40


def test_a_diverging_run_stops_before_the_step(bench, monkeypatch):
    calls, real = [], DPO.losses

    def losses(self, pairs, preferences):
        calls.append(1)
        return real(self, pairs, preferences) * (math.nan if len(calls) > 6 else 1.0)

    monkeypatch.setattr(DPO, "losses", losses)
    with pytest.raises(FloatingPointError, match="loss is not finite"):
        bench.run("out", save_every=1, eval_fraction=0.0)
    out = bench.root / "out"
    assert (out / "report.html").exists() and not (out / "model").exists()
    assert list((out / "checkpoints").glob("step-*"))


# -- real pairs, on a real pretrained model


@pytest.mark.parametrize("lora", [LoraConfig(r=8), None], ids=["lora", "full"])
def test_real_pairs_on_a_real_model(hh_path, stories_path, no_report, tmp_path, lora):
    pairs = list(load_preferences(hh_path)[:16])
    torch.manual_seed(0)
    policy = Policy.from_pretrained(stories_path, lora=lora)
    config = TrainConfig(
        str(tmp_path / "out"), lr=2e-3 if lora else 2e-4, epochs=3, eval_fraction=0.2, samples=0,
        save_every=0, warmup=0.0, cache=str(tmp_path / "cache"),
    )  # fmt: skip
    run = train(DPO(), policy, pairs, config, quiet=True)
    before, first, *_, last, _ = run.metrics
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == 0 == before["eval_rewards/margins"]
    assert last["loss"] < 0.66 and last["rewards/margins"] > 0.05
    assert last["rewards/accuracies"] > 0.8


# -- bad input leaves nothing behind


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 8}, "max_length"),
        ({"template": "chat"}, "chat template"),
    ],
)
def test_bad_input_writes_nothing(bench, changes, message):
    with pytest.raises(InputError, match=message):
        bench.run("out", **changes)
    assert not (bench.root / "out").exists()


def test_a_damaged_cache_writes_nothing(bench, no_report):
    shutil.rmtree(bench.run("first", epochs=1).dir)
    (part,) = (bench.root / "cache").glob("*/part-*.bin")
    data = bytearray(part.read_bytes())
    data[40] ^= 1
    part.write_bytes(data)
    with pytest.raises(InputError, match="is damaged at byte 0; delete it"):
        bench.run("second", epochs=1)
    assert not (bench.root / "second").exists()


def test_a_folder_with_a_run_is_refused(bench, no_report):
    run = bench.run("out", epochs=1)
    before = {p: p.stat().st_mtime_ns for p in run.dir.rglob("*")}
    with pytest.raises(InputError, match="already holds a run; continue it with --resume auto"):
        bench.run("out")
    (bench.root / "file").write_text("")
    with pytest.raises(InputError, match="is a file; name a folder"):
        bench.run("file")
    assert before == {p: p.stat().st_mtime_ns for p in run.dir.rglob("*")}
