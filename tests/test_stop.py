"""SIGTERM in every phase of a run, and what a killed process leaves to go on from."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prefopt import DPO, LoraConfig, Policy, ReferenceCache, TrainConfig, load_preferences, train
from prefopt.cli import main
from prefopt.metrics import Progress
from prefopt.rundir import RunDir
from prefopt.stop import Stopped, StopSignal
from prefopt.train import Run

ROOT = Path(__file__).resolve().parents[1]
TIMING = {"tokens_per_s", "flop_utilization", "elapsed_s", "peak_memory_bytes"}


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


# -- the signal itself


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_for_the_next_check(number):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        stop.check()
        os.kill(os.getpid(), number)
        done = True
        with pytest.raises(Stopped):
            stop.check()
    assert done and signal.getsignal(number) is before


def test_at_once_does_not_wait():
    with pytest.raises(Stopped), StopSignal(at_once=True):
        terminate()
        time.sleep(60)


def test_a_second_ctrl_c_interrupts_and_a_second_sigterm_does_not():
    with StopSignal() as stop:
        terminate()
        terminate()
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_stopping_is_no_error_that_a_library_could_swallow():
    assert not issubclass(Stopped, Exception)


def test_outside_the_main_thread_it_does_nothing():
    before, raised = signal.getsignal(signal.SIGTERM), []

    def work():
        try:
            with StopSignal() as stop:
                stop.check()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not raised and signal.getsignal(signal.SIGTERM) is before


# -- every phase of training


@pytest.fixture(scope="module")
def go(tmp_path_factory, tiny_model, tiny_rows):
    """Trains in a folder of its own; the cache of the reference is that of the folder."""
    pairs = load_preferences(tiny_rows)

    def run(root: Path, resume=None):
        torch.manual_seed(0)
        policy = Policy.from_pretrained(tiny_model, lora=LoraConfig(r=2, dropout=0.1))
        config = TrainConfig(
            str(root / "out"), batch_size=6, micro_tokens=300, lr=5e-3, epochs=2,
            eval_fraction=0.25, samples=1, sample_tokens=2, cache=str(root / "cache"),
            resume=resume,
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RunDir, "report", lambda self: None)
            return train(DPO(), policy, pairs, config, quiet=True)

    return run


@pytest.fixture(scope="module")
def whole(go, tmp_path_factory):
    return go(tmp_path_factory.mktemp("whole"))


@contextlib.contextmanager
def sigterm_at(phase, count):
    """Sends it as a phase begins for the ``count``-th time; ("step", n): when step n is done;
    ("evaluated", n): when the n-th evaluation is."""
    seen, real_phase, real_update = [], Progress.phase, Progress.update

    def began(self, name, total):
        seen.append(name)
        if name == phase and seen.count(name) == count:
            terminate()
        real_phase(self, name, total)

    def updated(self, step, metrics=None):
        if phase == "step" and seen[-1] == "train" and step == count:
            terminate()
        if phase == "evaluated" and seen[-1] == "evaluate" and seen.count("evaluate") == count:
            terminate()
        real_update(self, step, metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "phase", began)
        patch.setattr(Progress, "update", updated)
        yield


def check_same(run: Run, whole: Run):
    a, b = (load_file(r.dir / "model" / "adapter_model.safetensors") for r in (run, whole))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

    def numbers(r):
        return [{k: v for k, v in row.items() if k not in TIMING} for row in r.metrics]

    assert numbers(run) == numbers(whole)


@pytest.mark.parametrize(
    ("phase", "count", "saved"),
    [
        ("reference", 1, None),
        ("evaluate", 1, None),  # before
        ("sample", 1, None),
        ("step", 1, 1),
        ("step", 3, 3),  # and with it the evaluation after the first epoch
        ("evaluate", 2, 3),
        ("evaluated", 2, 3),
        ("step", 6, 6),
        ("evaluate", 3, 6),  # after
        ("evaluated", 3, 6),
    ],
)
def test_sigterm_saves_and_the_run_goes_on_as_if_nothing_had_been(
    go, whole, tmp_path, phase, count, saved
):
    with sigterm_at(phase, count):
        stopped = go(tmp_path)
    assert stopped.stopped and not (tmp_path / "out" / "model").exists()
    checkpoints = [p.name for p in (tmp_path / "out" / "checkpoints").glob("step-*")]
    assert checkpoints == ([] if saved is None else [f"step-{saved:06d}"])
    done = go(tmp_path, resume="auto")
    assert not done.stopped
    check_same(done, whole)


def test_stopped_before_training_it_leaves_no_run_folder_but_what_was_computed(go, tmp_path):
    with sigterm_at("reference", 1):
        go(tmp_path)
    assert not (tmp_path / "out").exists()
    (info,) = ReferenceCache(tmp_path / "cache").info()
    assert info["responses"] > 0
    assert not go(tmp_path).stopped, "so the same command can be given again"


def test_sigterm_while_the_last_samples_are_written_lets_the_run_finish(go, whole, tmp_path):
    with sigterm_at("sample", 2):
        done = go(tmp_path)
    assert not done.stopped
    check_same(done, whole)


def test_sigterm_while_tokenizing_stops_at_once(go, tmp_path, monkeypatch):
    def encode(*args, **kwargs):
        terminate()
        time.sleep(60)

    monkeypatch.setattr(sys.modules["prefopt.objectives.dpo"], "encode_pairs", encode)
    assert go(tmp_path).stopped and not any(tmp_path.iterdir())


# -- real processes


def command(*arguments, script):
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


TERMINATED = """
import os, signal, sys
from prefopt.cli import main
from prefopt.metrics import Progress
update = Progress.update
def asks(self, step, metrics=None):
    if metrics and step == 4:
        os.kill(os.getpid(), signal.SIGTERM)
    update(self, step, metrics)
Progress.update = asks
sys.exit(main(sys.argv[1:]))
"""


def test_a_process_that_gets_sigterm_exits_with_0_and_goes_on_to_the_same_end(
    tiny_model, tiny_data, tmp_path
):
    flags = [
        "--model", tiny_model, "--data", tiny_data, "--cache", tmp_path / "cache",
        "--lora.r", "2", "--lora.dropout", "0.1", "--epochs", "2", "--micro_tokens", "300",
        "--lr", "1e-3", "--save_every", "1000", "--samples", "0",
    ]  # fmt: skip
    process = command("dpo", *flags, "--out", tmp_path / "out", script=TERMINATED)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "stopped; --resume auto continues from step-000004" in out
    assert not (tmp_path / "out" / "model").exists()
    arguments = ["dpo", *map(str, flags), "--quiet"]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--resume", "auto"]) == 0
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    check_same(Run(tmp_path / "out"), Run(tmp_path / "whole"))


KILLED = """
import os, signal, sys
from prefopt.cli import main
from prefopt.reference import ReferenceCache
forward = ReferenceCache._forward
def dies(self, *arguments):
    if self.forwards == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(self, *arguments)
ReferenceCache._forward = dies
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_cache_build_loses_the_batch_in_flight_only(
    tiny_model, tiny_data, tmp_path, capsys
):
    flags = [
        "cache", "build", "--model", tiny_model, "--data", tiny_data,
        "--cache", tmp_path / "cache", "--batch_size", "4",
    ]  # fmt: skip
    process = command(*flags, script=KILLED)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    (info,) = ReferenceCache(tmp_path / "cache").info()
    held_out_and_two_batches = info["responses"]
    assert held_out_and_two_batches >= 2 * 2 * 4 and info["incomplete"] == 0
    assert main([str(flag) for flag in flags]) == 0
    missing = 48 - held_out_and_two_batches
    out = capsys.readouterr().out
    assert f"{held_out_and_two_batches} responses on disk, {missing} computed now in" in out
    assert main([str(flag) for flag in flags]) == 0
    assert "48 responses on disk, 0 computed now in 0 forward passes" in capsys.readouterr().out
