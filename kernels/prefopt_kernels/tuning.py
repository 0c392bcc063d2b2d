"""Which tile each kernel uses on which architecture: tables, and a search for those who ask for it.

The tables decide by architecture and shape alone, so a run is repeatable. With PREFOPT_AUTOTUNE=1
the row kernels try their candidates once per (kernel, dtype, bucket of V) and keep the fastest for
the life of the process; sums then depend on which candidate won. The batch-invariant kernel
(fused.py) never searches: its log-probs must be the same in the next process too.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, TypeVar, cast

import torch
from triton import knobs

Config = TypeVar("Config")

# ---- architectures ----

INTERPRETER = "interpreter"
_pretended: ContextVar[str | None] = ContextVar("pretended", default=None)


@contextmanager
def as_if(name: str) -> Iterator[None]:
    """Inside, every device counts as architecture `name`: compiling for a GPU that is not here."""
    token = _pretended.set(name)
    try:
        yield
    finally:
        _pretended.reset(token)


def arch(device: torch.device) -> str:
    """ "sm_90" (compute capability 9.0), "gfx942" (ROCm), or "interpreter" for the CPU. ValueError
    where kernels do not run: the CPU without TRITON_INTERPRET=1."""
    pretended = _pretended.get()
    if pretended is not None:
        return pretended
    if device.type != "cuda":
        if not knobs.runtime.interpret:
            raise ValueError(
                f"Triton kernels run on CUDA and ROCm devices, not on {device}; for a test on the "
                "CPU set TRITON_INTERPRET=1 before prefopt_kernels is imported"
            )
        return INTERPRETER
    return _cuda_arch(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _cuda_arch(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def nearest(table: Mapping[str, Config], name: str) -> Config:
    """The entry of architecture `name`; without one, that of the newest older NVIDIA architecture,
    of any ROCm one for ROCm, and of the oldest NVIDIA one for what is older still."""
    if name in table:
        return table[name]
    if name.startswith("gfx"):
        return next(entry for key, entry in table.items() if key.startswith("gfx"))
    known = sorted((int(key[3:]), key) for key in table if key.startswith("sm_"))
    older = [key for number, key in known if number <= _sm(name)]
    return table[older[-1] if older else known[0][1]]


def _sm(name: str) -> int:
    return int(name[3:]) if name.startswith("sm_") else 0


# ---- search ----

_found: dict[tuple, object] = {}


def autotuning() -> bool:
    """Whether the environment asks for the search."""
    return os.environ.get("PREFOPT_AUTOTUNE", "0") not in ("", "0")


def bucket(size: int) -> int:
    """The power of two at or above `size`: sizes in one bucket share a tile."""
    return 1 << max(size - 1, 0).bit_length()


def searched(
    key: tuple, candidates: Sequence[Config], run: Callable[[Config], object], repeats: int = 5
) -> Config:
    """The candidate whose `run` is fastest on the current CUDA device, searched once per key.

    run(candidate) launches the kernel; it is called several times, so it must not write to what the
    caller keeps. A candidate that does not fit the device's shared memory is passed over.
    """
    if key not in _found:
        times = [
            (_milliseconds(run, candidate, repeats), i) for i, candidate in enumerate(candidates)
        ]
        best, at = min(times)
        if best == float("inf"):
            raise RuntimeError(f"no candidate of {key} runs on this device")
        _found[key] = candidates[at]
    return _found[key]  # pyright: ignore[reportReturnType]


def _milliseconds(run: Callable[[Config], object], candidate: Config, repeats: int) -> float:
    from triton.runtime.errors import OutOfResources

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    best = float("inf")
    try:
        run(candidate)  # compiles
        for _ in range(repeats):
            start.record()
            run(candidate)
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end))
    except OutOfResources:
        return float("inf")
    return best


# ---- row kernels: logprob.py, gather.py ----


class Rows(NamedTuple):
    """The columns that one program of a row kernel works on at a time."""

    block: int
    warps: int


# 16 elements a thread and block, held once as loaded for the next block and once in float32, take
# 75 to 125 registers, so two or three programs share a multiprocessor. For sm_100 ptxas aims at 80
# registers whatever it takes, and spills; 8 elements a thread fit in 68.
_ROWS = {"sm_75": Rows(4096, 8), "sm_100": Rows(2048, 8), "gfx942": Rows(4096, 8)}
_ROW_KERNELS = {
    "fold": _ROWS,
    "dlogits": _ROWS,
    "target_dot": {"sm_75": Rows(1024, 4), "gfx942": Rows(1024, 4)},
    "gather_forward": _ROWS,
    "gather_backward": _ROWS,
}
ROW_CANDIDATES = tuple(
    Rows(block, warps)
    for block in (1024, 2048, 4096, 8192, 16384)
    for warps in (4, 8, 16)
    if 4 <= block // (32 * warps) <= 32
)


def row_config(kernel: str, name: str, columns: int) -> Rows:
    """The table's entry on architecture `name`, cut down to rows of `columns`."""
    return _cut(nearest(_ROW_KERNELS[kernel], name), columns)


def rows(kernel: str, like: torch.Tensor, trial: Callable[[], Callable[[Rows], object]]) -> Rows:
    """The entry for the rows of `like` on the current device. When autotuning, trial() gives the
    function that launches the kernel on scratch; it is called if the search has not run yet."""
    columns = like.shape[1]
    if not (autotuning() and like.is_cuda):
        return row_config(kernel, arch(like.device), columns)
    key = (kernel, like.device, like.dtype, bucket(columns))
    if key not in _found:
        searched(key, tuple(dict.fromkeys(_cut(c, columns) for c in ROW_CANDIDATES)), trial())
    return _cut(cast(Rows, _found[key]), columns)


def _cut(config: Rows, columns: int) -> Rows:
    block = min(config.block, bucket(columns))
    return Rows(block, max(1, config.warps * block // config.block))


# ---- nf4.py ----

# Bytes of codes. Four of them a thread are eight weights, in bfloat16 one store of 16 bytes.
_DEQUANTIZE = {"sm_75": Rows(1024, 8), "gfx942": Rows(1024, 4)}
DEQUANTIZE_CANDIDATES = tuple(
    Rows(32 * warps * each, warps) for each in (4, 8, 16) for warps in (2, 4, 8)
)


def dequantize_config(out: torch.Tensor, run: Callable[[Rows], object]) -> Rows:
    """The entry for `out` on its device. The search may write to the result itself: every candidate
    computes the same bits."""
    if not (autotuning() and out.is_cuda):
        return nearest(_DEQUANTIZE, arch(out.device))
    key = ("dequantize", out.device, out.dtype, bucket(out.numel()))
    return searched(key, DEQUANTIZE_CANDIDATES, run)


# ---- fused.py ----


class Tile(NamedTuple):
    """One program's share of the product hidden @ weight.T, and how it is compiled."""

    rows: int  # of hidden
    columns: int  # of the vocabulary
    depth: int  # of the hidden size, per step of the inner loop
    warps: int
    stages: int  # of the software pipeline over `depth`


# A program goes through this many vocabulary tiles, so V alone fixes the number of splits. Few, so
# that one block of rows still fills a GPU: 128,256 columns are 126 programs at 256 columns a tile.
TILES_PER_SPLIT = 4

_FUSED = {
    "sm_80": Tile(128, 128, 64, 8, 3),
    "sm_90": Tile(128, 256, 64, 8, 3),
    "sm_100": Tile(128, 128, 64, 8, 4),
    "sm_120": Tile(128, 128, 64, 8, 3),
    "gfx942": Tile(128, 128, 64, 8, 2),
    INTERPRETER: Tile(32, 128, 64, 4, 1),
}
# A hidden size that the depth above does not divide needs masks, and registers for them.
_FUSED_MASKED = {
    "sm_80": Tile(64, 128, 32, 8, 2),
    "gfx942": Tile(64, 128, 32, 8, 2),
    INTERPRETER: Tile(32, 128, 64, 4, 1),
}
# float32 is multiplied as float32: by fused multiply-adds on NVIDIA, by matrix units on ROCm.
_FUSED_32 = {
    "sm_80": Tile(64, 64, 32, 4, 3),
    "gfx942": Tile(64, 128, 32, 8, 2),
    INTERPRETER: Tile(32, 128, 64, 4, 1),
}


def fused_tile(name: str, dtype: torch.dtype, depth: int) -> Tile:
    """The tile of the fused kernel on architecture `name` for inputs of `dtype` and hidden size
    `depth`."""
    if dtype == torch.float32:
        return nearest(_FUSED_32, name)
    tile = nearest(_FUSED, name)
    return nearest(_FUSED_MASKED, name) if depth % tile.depth else tile
