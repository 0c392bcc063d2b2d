"""What the benchmarks share: measured blocks, peak memory, GEMM rates, workers, tables, results.

Each side of a comparison runs in a process of its own (`run_worker`), so that its peak memory is
its own. CPU seconds stand beside wall seconds: they barely move when the machine is busy with
something else, wall seconds do.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
_MARK = "RESULT "


def peak_rss_bytes() -> int:
    """The largest resident memory this process has had, in bytes.

    Linux keeps it per program image (VmHWM); getrusage's figure is inherited through exec from
    whoever started the process, so it is only the fallback.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cpu_seconds() -> float:
    """User plus system time of this process and its threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def machine_busy_seconds() -> float:
    """CPU seconds that all processors have spent on anything; outside Linux only this process's."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return cpu_seconds()
    user, nice, system, _idle, _iowait, *rest = map(int, fields)  # rest: interrupts and steal
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


class Clock:
    """Wall and CPU seconds between every `start()` and `stop()`, added up.

    `others`: the CPU seconds that the machine meanwhile spent on everything else. A wall time with
    more than a few percent of those is no measurement: threads wait for each other at each
    operator, so one that has to share its core holds up all.
    """

    def __init__(self) -> None:
        self.wall = self.cpu = self.others = 0.0
        self._began: tuple[float, float, float] | None = None

    def start(self) -> None:
        self._began = time.perf_counter(), cpu_seconds(), machine_busy_seconds()

    def stop(self) -> None:
        assert self._began is not None, "stop() without start()"
        wall, cpu, busy = self._began
        own = cpu_seconds() - cpu
        self.wall += time.perf_counter() - wall
        self.cpu += own
        self.others += max(0.0, machine_busy_seconds() - busy - own)
        self._began = None

    def add(self, other: Clock, share: float) -> None:
        """Count a part of what another clock measured."""
        self.wall += share * other.wall
        self.cpu += share * other.cpu
        self.others += share * other.others

    def figures(self) -> dict[str, float]:
        """seconds, cpu_seconds, and others: their share of the machine."""
        share = self.others / max(self.wall * (os.cpu_count() or 1), 1e-9)
        return {"seconds": self.wall, "cpu_seconds": self.cpu, "others": share}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def gemm_rate(m: int, k: int, n: int, dtype: str, *, seconds: float = 0.5) -> float:
    """GFLOP/s of one [m, k] x [n, k]^T product in `dtype`, with torch's threads: the median call.

    Of the GEMMs that torch has, the faster one: what `linear` calls (MKL for float32), or oneDNN.
    """
    import torch

    x = torch.randn(m, k, dtype=getattr(torch, dtype))
    weight = torch.randn(n, k, dtype=getattr(torch, dtype))
    ways = [lambda: torch.nn.functional.linear(x, weight)]
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        onednn = torch.ops.mkldnn._linear_pointwise
        ways.append(lambda: onednn(x, weight, None, "none", [], ""))
    return 2 * m * k * n / min(_median_seconds(way, seconds) for way in ways) / 1e9


def _median_seconds(call: Callable[[], object], seconds: float) -> float:
    for _ in range(3):
        call()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 5:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def environment() -> dict[str, Any]:
    """The project's environment stamp, or the few facts that matter where it cannot be had."""
    try:
        from prefopt.environment import environment as stamp
    except ImportError:
        import torch

        return {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "torch": torch.__version__,
            "cpus": os.cpu_count(),
        }
    return stamp()


def versions(*distributions: str) -> dict[str, str]:
    """Installed version of each distribution, "absent" where there is none."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def run_worker(script: str | Path, job: dict[str, Any], *, log: Path) -> dict[str, Any]:
    """Run `script --worker JOB` in a process of its own and return what it handed to `report`.

    Its output goes to `log`; a worker that fails stops the benchmark with the end of it.
    `job["threads"]` sets the number of threads. Nothing is looked up on a network.
    """
    roots = [str(ROOT), str(ROOT / "kernels")]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(roots + os.environ.get("PYTHONPATH", "").split(os.pathsep)),
        "OMP_NUM_THREADS": str(job["threads"]),
        "MKL_NUM_THREADS": str(job["threads"]),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }
    with log.open("w") as sink:
        command = [sys.executable, str(script), "--worker", json.dumps(job)]
        done = subprocess.run(command, env=env, stdout=sink, stderr=subprocess.STDOUT, check=False)
    lines = log.read_text(errors="replace").splitlines()
    results = [line for line in lines if line.startswith(_MARK)]
    if done.returncode or not results:
        tail = "\n".join(lines[-25:])
        raise SystemExit(f"worker failed with {done.returncode}: {job}\n{tail}\n(whole log: {log})")
    return json.loads(results[-1].removeprefix(_MARK))


def report(result: dict[str, Any]) -> None:
    """Called by a worker, once: its result, for `run_worker`."""
    print("\n" + _MARK + json.dumps(result), flush=True)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Plain text columns, the first to the left and the others to the right."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write `result` as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, path)
