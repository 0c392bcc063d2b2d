"""What a run ran on: versions, processor, memory, GPUs. Safe to paste into a bug report.

No host or user names, no paths, no environment variables. Versions are read from package metadata,
so nothing heavy is imported, and whatever cannot be found out is None: this never fails.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("triton", "transformers", "safetensors", "datasets", "numpy")
_ROOT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, Any]:
    """A JSON-ready description of software and hardware (written to `env.json`)."""
    return {
        "prefopt": _quietly(_own_version),
        "git": _quietly(_git),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": _quietly(platform.platform),
        "cpu": _quietly(_cpu_model),
        "cpu_count": os.cpu_count(),
        "cpu_usable": _quietly(lambda: len(os.sched_getaffinity(0))) or os.cpu_count(),
        "memory_bytes": _quietly(lambda: os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")),
        "torch": str(torch.__version__),
        "torch_build": _quietly(_torch_build),
        "torch_threads": _quietly(torch.get_num_threads),
        "gpus": _quietly(_gpus) or [],
        "packages": {name: _version(name) for name in PACKAGES},
    }


def environment_lines(env: dict[str, Any]) -> list[str]:
    """`environment()` as aligned lines for the terminal."""
    rows = environment_rows(env)
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows]


def environment_rows(env: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value) in words; keys may be missing, as in an `env.json` of another version."""

    def known(key: str) -> str:
        value = env.get(key)
        return "not recorded" if value is None else str(value)

    memory, git, gpus, packages = (env.get(k) for k in ("memory_bytes", "git", "gpus", "packages"))
    commit = git.get("commit") if isinstance(git, dict) else None
    dirty = " with local changes" if isinstance(git, dict) and git.get("dirty") else ""
    cards = [c for c in gpus if isinstance(c, dict)] if isinstance(gpus, list) else []
    size = f"{memory / 2**30:.1f} GiB" if isinstance(memory, int | float) else "not recorded"
    usable, total, threads = env.get("cpu_usable"), env.get("cpu_count"), env.get("torch_threads")
    return [
        ("prefopt", known("prefopt") + (f" (commit {str(commit)[:12]}{dirty})" if commit else "")),
        ("python", known("python")),
        ("platform", known("platform")),
        ("processor", f"{known('cpu')}, {usable} of {total} cores, {threads} torch threads"),
        ("memory", size),
        ("torch", f"{known('torch')} ({known('torch_build')} build)"),
        *[(f"gpu {i}", _gpu_text(card)) for i, card in enumerate(cards)],
        *([] if cards else [("gpu", "none")]),
        *((name, v or "not installed") for name, v in _items(packages)),
    ]


def _items(packages: Any) -> list[tuple[str, Any]]:
    return [(str(k), v) for k, v in packages.items()] if isinstance(packages, dict) else []


def _gpu_text(card: dict[str, Any]) -> str:
    memory, capability = card.get("memory_bytes"), card.get("capability")
    size = f", {memory / 2**30:.0f} GiB" if isinstance(memory, int | float) else ""
    return f"{card.get('name')}{f', {capability}' if capability else ''}{size}"


def _quietly(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except Exception:  # a description of the machine must not stop a run on it
        return None


def _version(package: str) -> str | None:
    return _quietly(lambda: metadata.version(package))


def _own_version() -> str | None:
    from prefopt import __version__

    return __version__


def _git() -> dict[str, Any] | None:
    """The commit, if this package is itself a checkout (not merely installed inside another)."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(_ROOT), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        return result.stdout.strip()

    if not (_ROOT / ".git").exists():
        return None
    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}


def _cpu_model() -> str | None:
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "hardware", "cpu model")):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine() or None


def _torch_build() -> str:
    if torch.version.hip:
        return f"rocm {torch.version.hip}"
    if torch.version.cuda:
        return f"cuda {torch.version.cuda}"
    return "xpu" if getattr(torch.version, "xpu", None) else "cpu"


def _gpus() -> list[dict[str, Any]]:
    cards = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            arch = getattr(card, "gcnArchName", None) if torch.version.hip else None
            capability = arch or f"sm_{card.major}{card.minor}"
            memory = card.total_memory
            cards.append({"name": card.name, "capability": capability, "memory_bytes": memory})
    elif hasattr(torch, "xpu") and torch.xpu.is_available():
        for index in range(torch.xpu.device_count()):
            card = torch.xpu.get_device_properties(index)
            memory = card.total_memory
            cards.append({"name": card.name, "capability": None, "memory_bytes": memory})
    elif torch.backends.mps.is_available():
        cards.append({"name": "Apple GPU (mps)", "capability": None, "memory_bytes": None})
    return cards
