"""What the benchmarks share: measured blocks, peak memory, GEMM rates, workers, tables, results.

Each side of a comparison runs in a process of its own (`run_worker`), so that its peak memory is
its own. CPU seconds stand beside wall seconds: they barely move when the machine is busy with
something else, wall seconds do.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
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


def reset_peak() -> int:
    """Start `peak_rss_bytes` anew from what is resident now; returns that, in bytes. Linux only.

    What C's allocator holds in reserve is handed back first: it would hide the next allocations.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return peak_rss_bytes()


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


class Stopwatch:
    """Seconds of one call on the CPU, or on a CUDA device between two events.

    There the L2 cache is overwritten before each call (what a call left in it would serve the
    next), and the host has issued that before the first event, so that the start of a launch-bound
    call is measured as it is in a busy stream.
    """

    def __init__(self, device: str) -> None:
        import torch

        self.cuda = torch.device(device).type == "cuda"
        if self.cuda:
            cache = torch.cuda.get_device_properties(device).L2_cache_size or (64 << 20)
            self._flush = torch.empty(4 * cache, dtype=torch.int8, device=device)

    def measure(self, call: Callable[[Callable[[], None]], Any]) -> tuple[Any, float, float]:
        """`call(mark)` -> its result, its seconds, and the seconds until it called `mark()`."""
        if self.cuda:
            return self._measure_cuda(call)
        marks: list[float] = []
        began = time.perf_counter()
        result = call(lambda: marks.append(time.perf_counter()))
        ended = time.perf_counter()
        return result, ended - began, (marks or [ended])[-1] - began

    def _measure_cuda(self, call: Callable[[Callable[[], None]], Any]) -> tuple[Any, float, float]:
        import torch

        began, mid, ended = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        marked: list[bool] = []

        def mark() -> None:
            mid.record()
            marked.append(True)

        self._flush.zero_()
        began.record()
        result = call(mark)
        ended.record()
        torch.cuda.synchronize()
        until = mid if marked else ended
        return result, began.elapsed_time(ended) / 1e3, began.elapsed_time(until) / 1e3


def copy_rate(device: str, *, gib: float = 4.0, repeats: int = 11) -> float:
    """Bytes per second, read plus written, of a copy on the device: the median of `repeats`."""
    import torch

    source = torch.randint(0, 255, (int(gib * (1 << 30)),), dtype=torch.uint8, device=device)
    target, watch = torch.empty_like(source), Stopwatch(device)
    times = [watch.measure(lambda mark: target.copy_(source))[1] for _ in range(2 + repeats)]
    return 2 * source.numel() / statistics.median(times[2:])


def cuda_gemm_rate(dtype: str, *, size: int = 8192, repeats: int = 11) -> float:
    """FLOP/s of cuBLAS on one [size, size] product of random numbers: the median of `repeats`."""
    import torch

    a, b = (torch.randn(size, size, device="cuda").to(getattr(torch, dtype)) for _ in range(2))
    watch = Stopwatch("cuda")
    times = [watch.measure(lambda mark: a @ b)[1] for _ in range(3 + repeats)]
    return 2 * size**3 / statistics.median(times[3:])


def output_bytes(kept: Any) -> int:
    """Bytes of all tensors in tuples or lists of tensors."""
    return sum(output_bytes(x) if isinstance(x, (tuple, list)) else x.nbytes for x in kept)


def cuda_peak(call: Callable[[], Any]) -> int:
    """Device memory that `call` takes at its peak beyond what it returns, in bytes."""
    import torch

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - output_bytes(kept)


class Compilations:
    """Counts the graphs that dynamo and the kernels that Triton compiles while it is open."""

    def __enter__(self) -> Compilations:
        import torch._dynamo.utils

        self.graphs = self.kernels = 0
        self._stats = torch._dynamo.utils.counters["stats"]
        self._before = self._stats["unique_graphs"]
        try:
            import triton

            self._triton = triton.knobs.runtime
            self._hook = self._triton.jit_post_compile_hook
            self._triton.jit_post_compile_hook = self._compiled
        except (ImportError, AttributeError):  # no Triton here, or one that cannot be asked
            self._triton = None
        return self

    def _compiled(self, **about: Any) -> None:
        self.kernels += 1

    def __exit__(self, *error: object) -> None:
        self.graphs = self._stats["unique_graphs"] - self._before
        if self._triton is not None:
            self._triton.jit_post_compile_hook = self._hook


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


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
