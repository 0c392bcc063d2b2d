"""Checkpoints: resume is bitwise, damage is found and named, and no crash, kill or full disk at any
moment leaves a run without a whole checkpoint."""

import errno
import json
import logging
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from prefopt import InputError, checkpoint, durable
from prefopt.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    load_optimizer,
    optimizer_tensors,
    rng_state,
    save_checkpoint,
    set_rng_state,
    verify_checkpoint,
)

ROOT = Path(__file__).resolve().parents[1]
FILES = ("rng.safetensors", "weights.safetensors", "state.json", "manifest.json")


def save(root: Path, step: int, keep: int | None = None) -> Path:
    groups = {
        "weights": {"w": torch.full((5,), float(step)), "b": torch.zeros(0)},
        "rng": {"torch": torch.arange(40, dtype=torch.uint8)},
    }
    return save_checkpoint(root, step, groups, {"step": step}, keep=keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def holds(path: Path | None, step: int) -> bool:
    assert path is not None
    tensors, state = load_checkpoint(path)
    return state == {"step": step} and bool((tensors["weights"]["w"] == step).all())


# Writing and reading


def test_what_was_saved_comes_back(tmp_path):
    groups = {
        "weights": {"a.w": torch.randn(3, 4), "half": torch.randn(2).bfloat16()},
        "empty": {},
    }
    state = {"step": 7, "lr": 0.1, "nested": {"π": [1, None, "x"]}}
    path = save_checkpoint(tmp_path / "new" / "checkpoints", 7, groups, state)
    assert path == tmp_path / "new" / "checkpoints" / "step-000007"
    assert names(path) == [
        "empty.safetensors",
        "manifest.json",
        "state.json",
        "weights.safetensors",
    ]
    assert names(path.parent) == ["latest", "step-000007"]
    assert (path.parent / "latest").read_text() == "step-000007\n"
    tensors, loaded = load_checkpoint(path)
    assert loaded == state
    assert tensors.keys() == groups.keys() and tensors["empty"] == {}
    for name, value in groups["weights"].items():
        assert tensors["weights"][name].dtype == value.dtype
        assert torch.equal(tensors["weights"][name], value)


def test_a_loaded_tensor_may_be_changed_without_changing_the_file(tmp_path):
    path = save(tmp_path, 1)
    load_checkpoint(path)[0]["weights"]["w"].fill_(9)
    assert holds(path, 1)


def test_old_ones_go_and_latest_is_the_new_one(tmp_path):
    for step in range(10, 60, 10):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["latest", "step-000040", "step-000050"]
    save(tmp_path, 60)
    assert len(names(tmp_path)) == 4
    save(tmp_path, 1_000_000, keep=1)
    assert names(tmp_path) == ["latest", "step-1000000"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-1000000"


def test_a_new_run_in_an_old_folder_keeps_its_own_checkpoint(tmp_path):
    """Resumed at step 10 of a run to 50: the new step 20 is latest and is not what is removed."""
    for step in (10, 50):
        save(tmp_path, step)
    path = save(tmp_path, 20, keep=1)
    assert names(tmp_path) == ["latest", "step-000020", "step-000050"]
    assert latest_checkpoint(tmp_path) == path


def test_the_same_step_is_replaced(tmp_path):
    save_checkpoint(tmp_path, 3, {"other": {}}, {"step": -1})
    assert holds(save(tmp_path, 3), 3)
    assert "other.safetensors" not in names(tmp_path / "step-000003")


# Damage


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found(tmp_path, name):
    path = save(tmp_path, 1)
    file = path / name
    whole = file.read_bytes()
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            verify_checkpoint(path)
        except InputError as error:
            if name != "manifest.json":  # damage there may well accuse another file
                assert f"{file} does not have the sha256" in str(error)
        else:  # only white space of the manifest says nothing
            assert name == "manifest.json"
            assert json.loads(file.read_bytes()) == json.loads(whole)
    file.write_bytes(whole)
    verify_checkpoint(path)


@pytest.mark.parametrize("name", FILES)
def test_a_cut_a_longer_and_a_missing_file_are_named(tmp_path, name):
    path = save(tmp_path, 1)
    file = path / name
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], b"", whole + b"x"):
        file.write_bytes(damaged)
        if name == "manifest.json" and damaged == whole[:-1]:
            continue  # the last newline
        with pytest.raises(InputError, match=f"{name} (has [0-9]+ bytes where|is damaged)"):
            verify_checkpoint(path)
    file.unlink()
    with pytest.raises(InputError, match=f"{name} is missing"):
        load_checkpoint(path)


def test_another_format_is_told_apart_from_damage(tmp_path):
    path = save(tmp_path, 1)
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(InputError, match="format 2 and this version reads 1"):
        verify_checkpoint(path)


def test_a_folder_that_does_not_exist_is_bad_input(tmp_path):
    with pytest.raises(InputError, match=r"step-000009/manifest\.json is missing"):
        load_checkpoint(tmp_path / "step-000009")


def test_a_damaged_latest_falls_back_loudly(tmp_path, caplog):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000004"
    assert caplog.records == []
    (tmp_path / "step-000004" / "state.json").unlink()
    with (tmp_path / "step-000003" / "weights.safetensors").open("r+b") as file:
        file.seek(100)
        file.write(b"damage")
    with caplog.at_level(logging.WARNING, "prefopt"):
        assert holds(latest_checkpoint(tmp_path), 2)
    first, second = (record.getMessage() for record in caplog.records)
    assert "step-000004: " in first and "state.json is missing" in first
    assert "step-000003: " in second and "weights.safetensors" in second


@pytest.mark.parametrize("pointer", [None, "", "step-000009\n", "../x", "\xff\x00"])
def test_without_a_good_pointer_the_newest_is_taken(tmp_path, caplog, pointer):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "latest").unlink()
    if pointer is not None:
        (tmp_path / "latest").write_text(pointer, encoding="latin-1")
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000002"
    assert len(caplog.records) == (pointer is not None)


def test_a_half_written_folder_is_never_taken_and_is_swept(tmp_path):
    save(tmp_path, 1)
    child = subprocess.Popen(["true"])
    child.wait()
    half = tmp_path / f".tmp-{durable._HOST}-{child.pid}-0"
    shutil.copytree(tmp_path / "step-000001", half)
    (half / "manifest.json").unlink()
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000001"
    save(tmp_path, 2)
    assert names(tmp_path) == ["latest", "step-000001", "step-000002"]


def test_nothing_good_is_none(tmp_path):
    assert latest_checkpoint(tmp_path / "absent") is None
    (tmp_path / "step-notes").mkdir()
    assert latest_checkpoint(tmp_path) is None
    (save(tmp_path, 1) / "manifest.json").unlink()
    assert latest_checkpoint(tmp_path) is None


# Full disks and kills


def test_no_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"a checkpoint needs 1 MB and the disk of .* has 0 MB"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["latest", "step-000001"]


def test_an_error_at_any_call_leaves_what_was_there(tmp_path, monkeypatch):
    """Every write, fsync and rename of a save fails once."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    failed_at = -1
    while True:
        failed_at += 1
        count = iter(range(1000))
        with monkeypatch.context() as patch:
            for name in ("write", "fsync", "replace", "rename"):
                real = getattr(os, name)

                def call(*args, real=real, count=count, n=failed_at):
                    if next(count) == n:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    return real(*args)

                patch.setattr(os, name, call)
            try:
                save(tmp_path, 3, keep=3)
                break
            except OSError as error:
                assert error.errno == errno.ENOSPC
        found = names(tmp_path)
        assert found in (
            ["latest", "step-000001", "step-000002"],
            ["latest", "step-000001", "step-000002", "step-000003"],
        ), (failed_at, found)
        latest = latest_checkpoint(tmp_path)
        assert holds(latest, 2) or ("step-000003" in found and holds(latest, 3))
        if "step-000003" in found:
            assert holds(tmp_path / "step-000003", 3)
            shutil.rmtree(tmp_path / "step-000003")
            (tmp_path / "latest").write_text("step-000002\n")
    assert failed_at > 20, "the calls were not reached"
    assert holds(latest_checkpoint(tmp_path), 3)


# One interpreter that forks the writers it kills: importing torch for each would take minutes.
KILLED_WRITERS = """
import logging, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
# A kill loses nothing that is written, only a power cut does; this one only counts as a call.
os.fsync = lambda fd: None
CALLS = ("open", "write", "fsync", "replace", "rename", "unlink", "mkdir", "rmdir")
from prefopt.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint

warnings = []
logging.getLogger("prefopt").addHandler(logging.Handler())
logging.getLogger("prefopt").handlers[0].emit = lambda record: warnings.append(record.getMessage())

def save(root, step, keep):
    groups = {"weights": {"w": torch.full((5000,), float(step))}, "rng": {"t": torch.ones(3)}}
    save_checkpoint(root, step, groups, {"step": step}, keep=keep)

def check(root, least):
    latest = latest_checkpoint(root)
    tensors, state = load_checkpoint(latest)
    assert state["step"] >= least, (state, least)
    assert (tensors["weights"]["w"] == state["step"]).all()
    for path in root.glob("step-*"):
        load_checkpoint(path)
    assert not warnings, warnings
    return state["step"]

def run_and_kill(body, until=None):
    pid = os.fork()
    if pid == 0:
        try:
            body()
        finally:
            os._exit(3)
    if until is not None:
        until(pid)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def at_every_call(root):
    '''Killed before each system call of saving: a new step, then one that is there already.'''
    save(root, 1, 1)
    killed, at = 0, 1
    for same in (False, True):
        for n in range(1000):
            step = at + (not same)
            def body():
                count = 0
                for name in CALLS:
                    def call(*args, real=getattr(os, name), **kwargs):
                        nonlocal count
                        count += 1
                        if count > n:
                            os.kill(os.getpid(), signal.SIGKILL)
                        return real(*args, **kwargs)
                    setattr(os, name, call)
                save(root, step, 1)
                os._exit(0)
            code = run_and_kill(body)
            at = check(root, at)
            if code == 0:
                assert at == step
                break
            assert code == -signal.SIGKILL, code
            killed += 1
    assert killed > 80, killed
    save(root, 1000, 1)
    assert sorted(p.name for p in root.iterdir()) == ["latest", "step-001000"]

def at_random(root, kills):
    save(root, 1, 2)
    rng = random.Random(0)
    for _ in range(kills):
        least = check(root, 1)
        def body():
            for step in range(least + 1, 1_000_000):
                save(root, step, 2)
        def until(pid):
            while (root / "latest").read_text() == f"step-{least:06d}\\n":
                assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the writer failed"
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.05))
        assert run_and_kill(body, until) == -signal.SIGKILL
        check(root, least + 1)

at_every_call(Path(sys.argv[1]) / "every")
at_random(Path(sys.argv[1]) / "random", 20)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_kill_at_any_moment_leaves_a_good_latest(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WRITERS, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


# Generators and optimizers


def draw() -> list[float]:
    return [
        *torch.rand(3).tolist(),
        *np.random.random(3),
        np.random.normal(),
        *(random.random() for _ in range(3)),
        random.gauss(0, 1),
    ]


def test_the_generators_go_back_to_where_they_were(tmp_path):
    draw()  # leaves a second normal number waiting in numpy's and Python's generators
    path = save_checkpoint(tmp_path, 1, {"rng": rng_state()}, {})
    expected = [draw() for _ in range(3)]
    set_rng_state(load_checkpoint(path)[0]["rng"])
    assert [draw() for _ in range(3)] == expected


@pytest.mark.gpu
def test_the_cuda_generators_go_back_to_where_they_were():
    torch.rand(3, device="cuda")
    state = rng_state()
    expected = torch.rand(5, device="cuda")
    set_rng_state(state)
    assert torch.equal(torch.rand(5, device="cuda"), expected)


class Training:
    """A few steps of a net with dropout, on data that is drawn from all three generators."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 1))
        self.model.to(dtype)
        named = dict(self.model.named_parameters())
        decay = [name for name in named if name.endswith("weight")]
        self.names = [*decay, *(name for name in named if name not in decay)]
        groups = [
            {"params": [named[name] for name in decay], "weight_decay": 0.1},
            {"params": [named[name] for name in self.names[len(decay) :]], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95))
        self.step = 0

    def run(self, until: int) -> None:
        while self.step < until:
            for group in self.optimizer.param_groups:
                group["lr"] = 1e-2 / (1 + self.step / 3)
            x = torch.rand(6, 4) + np.random.normal() + random.random()
            loss = self.model(x.to(self.model[0].weight.dtype)).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.step += 1

    def save(self, root: Path) -> Path:
        tensors, optimizer = optimizer_tensors(self.optimizer, self.names)
        groups = {"weights": self.model.state_dict(), "optimizer": tensors, "rng": rng_state()}
        return save_checkpoint(root, self.step, groups, {"step": self.step, "optim": optimizer})

    def load(self, path: Path) -> None:
        tensors, state = load_checkpoint(path)
        self.model.load_state_dict(tensors["weights"])
        load_optimizer(self.optimizer, self.names, tensors["optimizer"], state["optim"])
        set_rng_state(tensors["rng"])
        self.step = state["step"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resume_is_bitwise_from_every_step(tmp_path, dtype):
    whole = Training(dtype)
    whole.run(8)
    expected = {**whole.model.state_dict(), **optimizer_tensors(whole.optimizer, whole.names)[0]}
    for at in range(8):
        first = Training(dtype)
        first.run(at)
        path = first.save(tmp_path)
        second = Training(dtype)
        second.run(3)  # whatever a fresh process has done before it resumes
        second.load(path)
        second.run(8)
        found = {
            **second.model.state_dict(),
            **optimizer_tensors(second.optimizer, second.names)[0],
        }
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), at
        groups = zip(whole.optimizer.param_groups, second.optimizer.param_groups, strict=True)
        for a, b in groups:
            assert {k: v for k, v in a.items() if k != "params"} == {
                k: v for k, v in b.items() if k != "params"
            }


def test_moments_keep_a_wider_dtype_than_their_parameters(tmp_path):
    """load_state_dict would round float32 moments of bf16 parameters to bf16."""
    param = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([param])
    moment = torch.tensor([1 / 3, 1e-9, 2 / 7])
    optimizer.state[param] = {"step": torch.tensor(5.0), "exp_avg": moment, "kind": "x"}
    tensors, state = optimizer_tensors(optimizer, ["w"])
    assert tensors.keys() == {"step/w", "exp_avg/w"}
    fresh = torch.optim.AdamW([param])
    load_optimizer(fresh, ["w"], tensors, json.loads(json.dumps(state)))
    assert fresh.state[param]["exp_avg"].dtype == torch.float32
    assert torch.equal(fresh.state[param]["exp_avg"], moment)
    assert fresh.state[param]["kind"] == "x"
    fresh.state[param]["exp_avg"].zero_()
    assert moment[0] != 0, "the loaded state is a copy"


@pytest.mark.gpu
def test_the_step_counter_lies_where_the_update_needs_it():
    for fused in (False, True):
        param = nn.Parameter(torch.zeros(3, device="cuda"))
        optimizer = torch.optim.AdamW([param], fused=fused)
        param.grad = torch.ones_like(param)
        optimizer.step()
        device = optimizer.state[param]["step"].device
        tensors, state = optimizer_tensors(optimizer, ["w"])
        load_optimizer(optimizer, ["w"], {k: v.cpu() for k, v in tensors.items()}, state)
        assert optimizer.state[param]["step"].device == device
        assert optimizer.state[param]["exp_avg"].is_cuda
        optimizer.step()


def test_a_tensor_learning_rate_stays_one():
    param = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([param], lr=torch.tensor(0.5, dtype=torch.float64))
    _, state = optimizer_tensors(optimizer, ["w"])
    fresh = torch.optim.AdamW([param], lr=torch.tensor(0.1, dtype=torch.float64))
    load_optimizer(fresh, ["w"], {}, json.loads(json.dumps(state)))
    assert isinstance(fresh.param_groups[0]["lr"], torch.Tensor)
    assert fresh.param_groups[0]["lr"] == 0.5
    assert fresh.param_groups[0]["betas"] == (0.9, 0.999)


def test_another_models_optimizer_is_refused_and_changes_nothing():
    a, b, c = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    tensors, state = optimizer_tensors(torch.optim.AdamW([a, b]), ["a", "b"])
    optimizer = torch.optim.AdamW([a, c], lr=0.5)
    with pytest.raises(InputError, match=r"holds 2 .* trains 2, b only in the checkpoint"):
        load_optimizer(optimizer, ["a", "c"], tensors, state)
    with pytest.raises(InputError, match=r"holds 2 .* trains 3, c only in this run"):
        load_optimizer(torch.optim.AdamW([a, b, c]), ["a", "b", "c"], tensors, state)
    two_groups = torch.optim.AdamW([{"params": [a]}, {"params": [b]}])
    with pytest.raises(InputError, match="groups its parameters in another way"):
        load_optimizer(two_groups, ["a", "b"], tensors, state)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_nothing_in_the_module_can_unpickle():
    source = Path(checkpoint.__file__).read_text()
    assert "import pickle" not in source and "torch.load" not in source
