"""`prefopt ppo` as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from prefopt.cli import main
from prefopt.rundir import RunDir
from tests.online_case import differences, left_behind, rows_of

ROOT = Path(__file__).resolve().parents[1]
REWARD = """
import os, time

def short(prompts, responses):
    return [-len(text) / 10 for text in responses]

def by_answer(prompts, responses, answer):
    return [float(a in r) for a, r in zip(answer, responses)]

def fails(prompts, responses):
    raise KeyError("nothing")

def slow(prompts, responses):
    with open(os.environ["CALLED"], "a") as file:
        file.write("x")
    time.sleep(0.3)
    return short(prompts, responses)

def no_function(prompts):
    return []
"""
FLAGS = [
    "--batch_size", "4", "--max_new_tokens", "6", "--max_length", "128", "--max_steps", "2",
    "--lora.r", "4", "--lr", "1e-2", "--eval_fraction", "0.1", "--eval_prompts", "2",
    "--template", "plain",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with rewards and prompts, from which commands are run."""
    where = tmp_path_factory.mktemp("ppo")
    (where / "wishes.py").write_text(REWARD)
    rows = [{"prompt": f"Tell me of {i}.", "answer": str(i)} for i in range(12)]
    (where / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return where


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))


@pytest.fixture
def no_report(monkeypatch):
    """Drawing one takes longer than the runs of these tests."""
    monkeypatch.setattr(RunDir, "report", lambda self: None)


@pytest.fixture
def flags(tiny_model):
    return ["--model", str(tiny_model), "--data", "prompts.jsonl", *FLAGS]


def test_the_embedded_model_learns_from_a_function(tmp_path, capsys):
    out = tmp_path / "run"
    more = ["--out", str(out), "--reward", "wishes:short", "--kl.beta", "0.1", "--loss.clip", "0.3"]
    assert main(["ppo", *FLAGS, "--max_new_tokens", "8", "--max_steps", "1", *more]) == 0
    shown = capsys.readouterr()
    assert "report.html" in shown.out and (out / "report.html").stat().st_size > 1000
    assert "Traceback" not in shown.err
    settings = yaml.safe_load((out / "config.yaml").read_text())
    assert settings["estimator"] == "gae" and settings["reward"] == "wishes:short"
    assert settings["kl"]["beta"] == 0.1 and settings["loss_options"] == {"clip": 0.3}
    assert settings["loss"] == "ppo" and settings["model"] == "embedded"
    rows = rows_of(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 1] and rows[1]["policy/ratio_first"] == 0
    files = {path.name for path in out.iterdir()}
    assert files >= {"config.yaml", "env.json", "metrics.jsonl", "samples.jsonl", "model", "critic",
                     "data_report.json", "evaluation.json"}  # fmt: skip
    assert (out / "model" / "adapter_model.safetensors").is_file()


def test_configuration_files(flags, tmp_path, capsys, no_report):
    """What is printed, and what a run wrote down, are configurations that can be run."""
    command = ["ppo", *flags, "--reward", "wishes:short", "--estimator", "grpo", "--seed", "3"]
    command += ["--save_every", "1"]
    assert main([*command, "--out", str(tmp_path / "a"), "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert not (tmp_path / "a").exists()
    config = yaml.safe_load(printed)
    assert config["estimator"] == "grpo" and config["seed"] == 3 and config["kl"]["kind"] == "k1"
    (tmp_path / "run.yaml").write_text(printed)
    for out, source in (("a", None), ("b", tmp_path / "run.yaml"), ("c", "written")):
        where = ["--out", str(tmp_path / out), "--quiet"]
        if source is None:
            assert main([*command, *where]) == 0
        else:
            file = tmp_path / "a" / "config.yaml" if source == "written" else source
            assert main(["ppo", "--config", str(file), *where]) == 0, source
    runs = [left_behind(tmp_path / out) for out in "abc"]
    assert differences(runs[0], runs[1]) == differences(runs[0], runs[2]) == []
    assert capsys.readouterr().out == ""
    more = ["--config", str(tmp_path / "run.yaml"), "--max_steps", "1"]
    assert main(["ppo", *more, "--out", str(tmp_path / "d"), "--quiet"]) == 0
    assert rows_of(tmp_path / "d" / "metrics.jsonl")[-1]["step"] == 1


def test_a_dry_run_says_what_there_would_be(flags, tmp_path, capsys):
    out = tmp_path / "run"
    more = ["--estimator", "rloo", "--minibatches", "2", "--reward", "wishes:short", "--dry_run"]
    assert main(["ppo", *flags, *more, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "prompts to train on, " in shown and "held out" in shown
    assert "2 updates of 16 samples (4 prompts, 4 each) and 4 optimizer steps" in shown
    assert "estimator rloo, loss ppo" in shown and not out.exists()


def test_columns_and_several_rewards(flags, tmp_path, no_report):
    out = tmp_path / "run"
    rewards = ["--reward", "{short: wishes:short, right: wishes:by_answer}", "--quiet"]
    rewards += ["--reward_weights", "{short: 1, right: 2}", "--held_out_reward", "wishes:short"]
    assert main(["ppo", *flags, *rewards, "--out", str(out), "--max_steps", "1"]) == 0
    row = rows_of(out / "metrics.jsonl")[1]
    both = row["objective/scores/short"] + 2 * row["objective/scores/right"]
    assert row["objective/scores"] == pytest.approx(both, rel=1e-5)
    assert row["objective/held_out_scores"] == pytest.approx(row["objective/scores/short"])


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ([], "ppo needs --reward"),
        (["--reward", "nowhere:f"], "there is no module 'nowhere'"),
        (["--reward", "wishes:shrot"], "short"),
        (["--reward", "wishes:no_function"], "is called with (prompts, responses)"),
        (["--reward", "no/such/folder"], "no/such/folder"),
        (["--reward", "wishes:short", "--kl.betta", "1"], "did you mean 'kl.beta'?"),
        (["--reward", "wishes:short", "--loss.clp", "0.1"], "did you mean 'clip'?"),
        (["--reward", "wishes:short", "--ppo_epoch", "3"], "did you mean 'ppo_epochs'?"),
        (["--reward", "wishes:short", "--estimator", "gea"], "estimator"),
        (["--reward", "wishes:short", "--kl.kind", "k3"], "kl kind k3 in the reward"),
        (["--reward", "wishes:short", "--top_p", "0.9"], "truncated distribution"),
        (["--reward", "wishes:short", "--lora.dropout", "0.1"], "set it to 0"),
        (["--reward", "wishes:short", "--critic", "no/such/folder"], "no/such/folder"),
        (["--reward", "wishes:short", "--resume", "no/such/folder"], "no/such/folder"),
        (["--reward", "wishes:short", "--data", "no.jsonl"], "no.jsonl"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)  # fmt: skip
def test_bad_input_is_one_sentence(flags, tmp_path, capsys, more, sentence):
    out = tmp_path / "run"
    assert main(["ppo", *flags, "--out", str(out), *more]) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error
    assert not out.exists()


def test_a_reward_that_fails_is_bad_input_and_leaves_a_checkpoint(
    flags, tmp_path, capsys, no_report
):
    out = tmp_path / "run"
    command = ["ppo", *flags, "--out", str(out), "--quiet"]
    assert main([*command, "--reward", "wishes:fails"]) == 2
    error = capsys.readouterr().err
    assert "reward 'reward' failed for the response" in error and "wishes.py, line" in error
    assert (out / "checkpoints" / "step-000000" / "manifest.json").is_file()
    assert main([*command, "--reward", "wishes:short", "--resume", "auto"]) == 0
    assert main(["ppo", *flags, "--out", str(tmp_path / "b"), "--quiet", "--reward",
                 "wishes:short"]) == 0  # fmt: skip
    assert rows_of(out / "metrics.jsonl") == rows_of(tmp_path / "b" / "metrics.jsonl")
    assert main([*command, "--reward", "wishes:short"]) == 2
    assert "already holds a run; continue it with --resume auto" in capsys.readouterr().err


def test_sigterm_saves_and_the_run_goes_on(folder, flags, tmp_path, monkeypatch):
    """SIGTERM while its second update is scored: exit code 0, a checkpoint, and no model yet."""
    called, out = tmp_path / "called", tmp_path / "run"
    flags = [*flags, "--save_every", "2", "--reward", "wishes:slow", "--eval_fraction", "0"]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    process = subprocess.Popen(
        [sys.executable, "-m", "prefopt", "ppo", *flags, "--out", str(out), "--resume", "auto"],
        cwd=folder, env={**os.environ, "PYTHONPATH": paths, "CALLED": str(called)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    end = time.monotonic() + 90
    while not called.exists() or called.stat().st_size < 2:
        assert time.monotonic() < end, "it does not come to its reward"
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=90)
    assert process.returncode == 0, text
    assert "stopped" in text and not (out / "model").exists()
    state = json.loads((out / "checkpoints" / "step-000001" / "state.json").read_text())
    assert state["update"] == 1 and state["pending"] is None
    monkeypatch.setattr(RunDir, "report", lambda self: None)
    monkeypatch.setenv("CALLED", str(called))
    assert main(["ppo", *flags, "--quiet", "--out", str(out), "--resume", "auto"]) == 0
    assert main(["ppo", *flags, "--quiet", "--out", str(tmp_path / "whole")]) == 0
    assert differences(left_behind(out), left_behind(tmp_path / "whole")) == []
