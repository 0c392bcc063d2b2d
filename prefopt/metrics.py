"""What a run measures and how it is shown: device-side sums, `metrics.jsonl`, the progress line.

Values stay on the device until a log interval ends; `Meter.flush` then moves all of them at once.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from prefopt.durable import write_bytes

PLAIN_SECONDS = 10.0  # between two lines when the progress line cannot be refreshed in place
REDRAW_SECONDS = 0.1


class Meter:
    """Running `sum / count` per metric name, without a host synchronisation until `flush`."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._counts: dict[str, Any] = {}

    def add(self, sums: Mapping[str, Tensor | float], count: Tensor | int) -> None:
        """Adds sums over `count` items: scalars, on the device or plain numbers."""
        items = _wide(count)
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0) + _wide(value)
            self._counts[name] = self._counts.get(name, 0) + items

    def state(self) -> dict[str, list[float]]:
        """name -> [sum, count] of what was added since the last flush, for a checkpoint."""
        return {name: [float(s), float(self._counts[name])] for name, s in self._sums.items()}

    def restore(self, state: Mapping[str, Sequence[float]]) -> None:
        """Continues from what `state` gave, to the bit."""
        self._sums = {name: cells[0] for name, cells in state.items()}
        self._counts = {name: cells[1] for name, cells in state.items()}

    def flush(self) -> dict[str, float]:
        """`sum / count` of everything added since the last flush, and starts anew.

        One stacked tensor crosses to the host, however many names there are. A name of which
        nothing was counted is left out: there is no mean of nothing.
        """
        cells = [*self._sums.values(), *self._counts.values()]
        on_device = [cell for cell in cells if isinstance(cell, Tensor)]
        moved = iter(torch.stack(on_device).tolist() if on_device else [])
        values = [next(moved) if isinstance(cell, Tensor) else float(cell) for cell in cells]
        names = list(self._sums)
        self._sums, self._counts = {}, {}
        triples = zip(names, values[: len(names)], values[len(names) :], strict=True)
        return {name: total / count for name, total, count in triples if count != 0}


def _wide(value: Tensor | float) -> Tensor | float:
    """Detached scalar in float64 where the device has it, so long sums do not lose digits."""
    if not isinstance(value, Tensor):
        return value
    narrow = value.device.type in ("mps", "xpu")
    return value.detach().reshape(()).to(torch.float32 if narrow else torch.float64)


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, on disk as soon as it is written.

    Floats keep 8 significant digits. JSON has no NaN or infinity: such a value is written as null
    and named, with what it was, under "non_finite": {"loss": "nan"}.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row."""
        line = json.dumps(_valid_json(row), allow_nan=False, ensure_ascii=False) + "\n"
        with self.path.open("ab+") as file:
            if file.tell():  # a crash may have cut the last line: it must not swallow this one
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    line = "\n" + line
            file.write(line.encode())

    def truncate_after(self, step: int) -> int:
        """Drops the rows of steps beyond `step` and damaged lines; returns how many went.

        Called when a run resumes at `step`, so that no step stands in the file twice.
        """
        if not self.path.exists():
            return 0
        lines = [line for line in self.path.read_bytes().splitlines() if line.strip()]
        kept = []
        for line in lines:
            row = _parse(line)
            at = row.get("step") if row is not None else math.inf
            if not isinstance(at, int | float) or at <= step:
                kept.append(line + b"\n")
        if len(kept) < len(lines):
            write_bytes(self.path, b"".join(kept))
        return len(lines) - len(kept)


def read_metrics(path: str | Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a `metrics.jsonl` and how many lines were damaged (skipped)."""
    lines = [line for line in Path(path).read_bytes().splitlines() if line.strip()]
    rows = [_parse(line) for line in lines]
    good = [row for row in rows if row is not None]
    return good, len(rows) - len(good)


def _parse(line: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError, RecursionError):  # cut, garbled or not text at all
        row = json.loads(line)
        return row if isinstance(row, dict) else None
    return None


def _valid_json(row: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    non_finite: dict[str, str] = {}
    for name, value in row.items():
        value = value.item() if hasattr(value, "item") else value  # numpy scalars
        if isinstance(value, float) and not math.isfinite(value):
            non_finite[name] = str(value)
            out[name] = None
        else:
            out[name] = float(f"{value:.8g}") if isinstance(value, float) else value
    return {**out, "non_finite": non_finite} if non_finite else out


class Progress:
    """One line on stderr, refreshed in place: step, loss, margin, accuracy, tokens/s, time left.

    Where stderr is no terminal it prints a plain line every ten seconds and at each phase's end;
    `quiet` prints nothing. Time left counts the time spent inside a phase only, so evaluations
    in between do not distort it.

        with Progress() as progress:
            progress.phase("reference", batches)   # or "evaluate": each phase has its own clock
            progress.update(1)
            progress.phase("train", steps)         # the same name again continues that phase
            progress.update(step, {"loss": 0.69, "rewards/margins": 0.0, "tokens_per_s": 900.0})
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._quiet, self._stream, self._clock = quiet, stream or sys.stderr, clock
        self._live: Any = None
        self._task: Any = None
        self._phases: dict[str, _Phase] = {}
        self._current: _Phase | None = None
        self._shown = -math.inf  # when a line was last drawn

    def __enter__(self) -> Progress:
        if not self._quiet and self._stream.isatty():
            self._live = _live_line(self._stream)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def phase(self, name: str, total: int | None) -> None:
        """Switches the line to a phase of `total` steps (None: not known)."""
        now = self._clock()
        self._current = phase = self._phases.setdefault(name, _Phase(name, total, now))
        phase.total, phase.since = total, now
        self._draw(now, at_once=self._live is not None)

    def update(self, step: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Says how far the phase is; `metrics` may be a whole row of `metrics.jsonl`."""
        assert self._current is not None, "phase() comes before update()"
        now = self._clock()
        self._current.advance(step, now, metrics)
        done = self._current.total is not None and step >= self._current.total
        self._draw(now, at_once=done)

    def _draw(self, now: float, at_once: bool) -> None:
        phase, wait = self._current, REDRAW_SECONDS if self._live is not None else PLAIN_SECONDS
        assert phase is not None
        if self._quiet or (now - self._shown < wait and not at_once):
            return
        if self._live is not None:
            if self._task is None:
                self._task = self._live.add_task("", text="")
            fields = {"completed": phase.step or 0, "total": phase.total, "text": phase.text()}
            self._live.update(self._task, description=phase.name, refresh=True, **fields)
        elif phase.step is not None:
            total = "" if phase.total is None else f"/{phase.total}"
            line = f"{phase.name} {phase.step}{total}  {phase.text()}"
            print(line.rstrip(), file=self._stream, flush=True)
        else:
            return  # an empty plain line says nothing
        self._shown = now


class _Phase:
    def __init__(self, name: str, total: int | None, now: float) -> None:
        self.name, self.total, self.since = name, total, now
        self.step: int | None = None
        self.metrics: dict[str, Any] = {}
        self.done, self.seconds = 0, 0.0

    def advance(self, step: int, now: float, metrics: Mapping[str, Any] | None) -> None:
        if self.step is not None:  # the first update may come from a resumed run: no rate yet
            self.done += step - self.step
            self.seconds += now - self.since
        self.step, self.since = step, now
        self.metrics.update(metrics or {})

    def text(self) -> str:
        shown = (
            ("loss", "loss {:.4f}", float),
            ("eval_perplexity", "perplexity {:.2f}", float),
            ("rewards/margins", "margin {:.3f}", float),
            ("rewards/accuracies", "accuracy {:.0%}", float),
            ("tokens_per_s", "{} tokens/s", format_count),
        )
        values = ((self.metrics.get(key), form, as_) for key, form, as_ in shown)
        parts = [form.format(as_(v)) for v, form, as_ in values if isinstance(v, int | float)]
        if self.total is not None and self.step is not None and self.done > 0:
            left = max(0, self.total - self.step) * self.seconds / self.done
            parts.append(f"{format_duration(left)} left" if left else "")
        return "  ".join(part for part in parts if part)


def _live_line(stream: TextIO) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as RichProgress
    from rich.table import Column

    return RichProgress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=18),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
        console=Console(file=stream),
        auto_refresh=False,  # drawn by update(): no second thread beside the training loop
    )


def format_duration(seconds: float) -> str:
    """12.3 -> "12 s", 200 -> "3 min 20 s", 7500 -> "2 h 05 min"."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_count(value: float) -> str:
    """950 -> "950", 12345 -> "12.3k", 4.2e6 -> "4.20M"."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}"
    return f"{value:.0f}"


def peak_memory_bytes(device: torch.device | str) -> int | None:
    """The most memory used so far: of the allocator on a GPU, else resident, of this process.

    None where the system does not say.
    """
    device = torch.device(device)
    if device.type in ("cuda", "xpu"):
        return getattr(torch, device.type).max_memory_allocated(device)
    with contextlib.suppress(OSError):
        # Linux. Not ru_maxrss: a child process inherits that from its parent across exec.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(ImportError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return None


@functools.cache
def gemm_rate(device: torch.device | str, dtype: torch.dtype) -> float:
    """FLOP/s of a plain square matrix product here and now: the yardstick for useful FLOPs.

    The size doubles from 256 until one product takes 5 ms (or reaches 4096), which suits a slow
    core as well as a large GPU; then the best of a few counts. About 0.2 s, measured once.
    """
    device = torch.device(device)
    sync = getattr(getattr(torch, device.type, None), "synchronize", lambda: None)
    size, best, stop = 256, 0.0, time.perf_counter() + 0.15
    rng = torch.Generator(device)  # of its own: how often it draws depends on the machine
    a = torch.rand(size, size, generator=rng, device=device, dtype=dtype)
    torch.mm(a, a)  # the first call loads libraries and starts threads
    while True:
        sync()
        start = time.perf_counter()
        torch.mm(a, a)
        sync()
        now = time.perf_counter()
        best = max(best, 2 * size**3 / (now - start))
        if now > stop:
            return best
        if now - start < 5e-3 and size < 4096:
            size *= 2
            a = torch.rand(size, size, generator=rng, device=device, dtype=dtype)
