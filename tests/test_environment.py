"""The environment: complete, JSON-ready, private, and never in the way."""

import getpass
import json
import os
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from prefopt import environment as module
from prefopt.environment import environment, environment_lines


def test_names_the_versions_and_is_json():
    env = json.loads(json.dumps(environment(), allow_nan=False))
    assert env["torch"] == torch.__version__
    assert env["python"].startswith(platform.python_version())
    assert env["packages"]["numpy"] == metadata.version("numpy")
    assert env["cpu_count"] == os.cpu_count()
    assert env["prefopt"]


def test_tells_nothing_about_who_and_where(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "s3cret-value")
    text = json.dumps(environment()) + "\n".join(environment_lines(environment()))
    private = [
        "s3cret-value",
        str(Path.home()),
        str(Path(module.__file__).parent),
        socket.gethostname(),
        os.getcwd(),
    ]
    try:
        private.append(getpass.getuser())
    except (KeyError, OSError):
        pass
    # A one-word user or host name such as "linux" may also be a word of the platform string.
    allowed = platform.platform().lower()
    for value in private:
        if len(value) > 2 and value.lower() not in allowed:
            assert value not in text, value


def test_never_fails(monkeypatch):
    def broken(*_, **__):
        raise OSError("no")

    for target, name in (
        (platform, "platform"),
        (subprocess, "run"),
        (metadata, "version"),
        (os, "sysconf"),
        (torch.cuda, "is_available"),
        (Path, "read_text"),
    ):
        monkeypatch.setattr(target, name, broken)
    env = environment()
    assert env["platform"] is None and env["memory_bytes"] is None and env["gpus"] == []
    assert any("not recorded" in line for line in environment_lines(env))


@pytest.mark.parametrize("env", [{}, {"gpus": 3, "packages": [], "git": "x", "memory_bytes": "y"}])
def test_lines_of_a_foreign_description(env):
    assert len(environment_lines(env)) >= 6


def test_lines_show_gpus_and_the_commit():
    env = environment() | {
        "gpus": [{"name": "NVIDIA H200", "capability": "sm_90", "memory_bytes": 150 << 30}],
        "git": {"commit": "0123456789abcdef", "dirty": True},
    }
    text = "\n".join(environment_lines(env))
    assert "NVIDIA H200, sm_90, 150 GiB" in text
    assert "commit 0123456789ab with local changes" in text


def git(folder, *arguments):
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(folder), *arguments]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    if not any((Path(p) / "git").exists() for p in os.environ.get("PATH", "").split(os.pathsep)):
        pytest.skip("git is not installed")
    (tmp_path / "prefopt").mkdir()
    (tmp_path / "prefopt" / "x.py").write_text("1")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "x", "--no-gpg-sign")
    monkeypatch.setattr(module, "_ROOT", tmp_path)
    return tmp_path


def test_commit_of_a_checkout_and_whether_it_was_changed(checkout):
    found = environment()["git"]
    assert len(found["commit"]) == 40 and found["dirty"] is False
    (checkout / "prefopt" / "x.py").write_text("2")
    assert environment()["git"] == {"commit": found["commit"], "dirty": True}


def test_no_commit_when_installed_inside_another_checkout(checkout, monkeypatch):
    inside = checkout / "venv" / "site-packages"
    inside.mkdir(parents=True)
    monkeypatch.setattr(module, "_ROOT", inside)
    assert environment()["git"] is None


def test_imports_nothing_heavy():
    code = (
        "import sys; from prefopt.environment import environment; environment(); "
        "print([m for m in ('transformers', 'datasets', 'triton', 'matplotlib') "
        "if m in sys.modules])"
    )
    root = Path(module.__file__).parents[1]
    environ = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=True
    )
    assert done.stdout.strip() == "[]"
