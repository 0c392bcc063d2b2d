"""Compile every kernel for GPUs that are not here, and say what each takes.

    python -m prefopt_kernels.compile --targets sm_90,gfx942 [--kernels fold,...] [--json FILE]

What is compiled is what runs: the public functions are called with tensors that have no memory
("meta") while triton believes in a GPU of the target architecture, and each launch is caught where
triton would compile it, with its types, alignments, constants and options. Registers and stack come
from the machine code. Exit status 1: a spill, a failed compile, or a matrix product without matrix
instructions. This replaces triton's driver, so it is a command and nothing to call in a process
that computes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from prefopt_kernels import fused, gather, logprob, nf4, tuning


class Target(NamedTuple):
    gpu: GPUTarget
    matrix: str  # its matrix instruction, as it is called in the assembly
    shared: int  # bytes of shared memory that one program may have


TARGETS = {
    name: Target(GPUTarget("cuda", int(name[3:]), 32), matrix, kilobytes * 1024)
    for name, matrix, kilobytes in (
        ("sm_75", "mma.sync", 64),
        ("sm_80", "mma.sync", 163),
        ("sm_86", "mma.sync", 99),
        ("sm_89", "mma.sync", 99),
        ("sm_90", "wgmma.mma_async", 227),
        ("sm_100", "tcgen05.mma", 227),
        ("sm_120", "mma.sync", 99),
    )
} | {
    name: Target(GPUTarget("hip", name, 64), "v_mfma", kilobytes * 1024)
    for name, kilobytes in (("gfx90a", 64), ("gfx942", 64), ("gfx950", 160))
}
DEFAULT = "sm_75,sm_80,sm_90,sm_100,gfx942"
QUICK = "sm_90,gfx942"

# ---- what is called ----

_NAMES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class Call(NamedTuple):
    variant: str
    quick: bool  # whether it is in the quick subset
    run: Callable[[], object]


def calls() -> Iterator[Call]:
    """Each public function with each set of arguments that gives other machine code. Options that
    add up are compiled alone and all together; sizes are those of a model of 8 billion parameters,
    and 4100, an odd hidden size: a multiple of no tile's depth, with unaligned rows."""
    full: dict[str, Any] = {"entropy": True, "bias": True, "softcap": 30.0}
    for dtype, name in _NAMES.items():
        quick = dtype == torch.bfloat16
        for label, options in (("", {}), (" entropy", {"entropy": True}), (" p", {"p": dtype})):
            yield Call(name + label, False, partial(_fold, dtype, **options))
        yield Call(f"{name} p entropy bias cap", quick, partial(_fold, dtype, p=dtype, **full))
        yield Call(name, False, partial(_dlogits, dtype, dtype))
        yield Call(f"{name} entropy bias cap", quick, partial(_dlogits, dtype, dtype, **full))
        yield Call(name, quick, partial(_target_dot, dtype))
        yield Call(name, False, partial(_gather, dtype))
        capped = partial(_gather, dtype, entropy=True, softcap=30.0)
        yield Call(f"{name} entropy cap", quick, capped)
        yield Call(name, quick, partial(_fused, dtype))
        yield Call(f"{name} entropy", False, partial(_fused, dtype, entropy=True))
        yield Call(f"{name} cap", False, partial(_fused, dtype, softcap=30.0))
        yield Call(f"{name} entropy bias cap", quick, partial(_fused, dtype, **full))
        yield Call(f"{name} entropy bias cap odd", False, partial(_fused, dtype, 4100, **full))
        yield Call(name, False, partial(_dequantize, dtype, dtype, double=False))
        yield Call(f"{name} double", quick, partial(_dequantize, dtype, dtype))
        yield Call(f"{name} double odd", False, partial(_dequantize, dtype, dtype, 58_720_255))
    yield Call("f32, p bf16", False, partial(_fold, torch.float32, p=torch.bfloat16))
    yield Call("f32, out bf16", False, partial(_dlogits, torch.float32, torch.bfloat16))
    yield Call("bf16, out f32", False, partial(_dequantize, torch.bfloat16, torch.float32))
    yield Call("bf16, out f16", False, partial(_dequantize, torch.bfloat16, torch.float16))
    yield Call("f16, out bf16", False, partial(_dequantize, torch.float16, torch.bfloat16))


def _fold(dtype, p=None, entropy=False, bias=False, softcap=None):
    z, y, vector = _empty(2048, 8192, dtype=dtype), _empty(2048, dtype=torch.int64), _empty(2048)
    logprob.fold(
        z, y, vector, vector, entropy=vector if entropy else None, softcap=softcap,
        p=None if p is None else _empty(2048, 8192, dtype=p),
        bias=_empty(8192, dtype=torch.bfloat16) if bias else None,
    )  # fmt: skip


def _dlogits(dtype, out, entropy=False, bias=False, softcap=None):
    z, y, vector = _empty(2048, 8192, dtype=dtype), _empty(2048, dtype=torch.int64), _empty(2048)
    own = vector if entropy else None
    logprob.dlogits(
        z, y, vector, vector, _empty(2048, 8192, dtype=out), g_entropy=own, entropy=own,
        softcap=softcap, bias=_empty(8192, dtype=torch.bfloat16) if bias else None,
    )  # fmt: skip


def _target_dot(dtype):
    hidden, weight = _empty(2048, 4096, dtype=dtype), _empty(128256, 4096, dtype=dtype)
    logprob.target_dot(hidden, weight, _empty(2048, dtype=torch.int64))


def _gather(dtype, entropy=False, softcap=None):
    logits, y = _empty(2048, 128256, dtype=dtype), _empty(2048, dtype=torch.int64)
    gather.gather_forward(logits, y, softcap=softcap, entropy=entropy)
    vector = _empty(2048)
    own = vector if entropy else None
    gather.gather_backward(
        logits, y, vector, own, vector, g_entropy=own, g_lse=own, softcap=softcap
    )


def _fused(dtype, depth=4096, entropy=False, bias=False, softcap=None):
    fused.fused_fold(
        _empty(2048, depth, dtype=dtype), _empty(128256, depth, dtype=dtype),
        _empty(2048, dtype=torch.int64), entropy=entropy, softcap=softcap,
        bias=_empty(128256, dtype=torch.bfloat16) if bias else None,
    )  # fmt: skip


def _dequantize(dtype, out, n=4096 * 14336, double=True):
    blocks = -(-n // 64)
    nf4.dequantize(
        _empty(-(-n // 2), dtype=torch.uint8),
        _empty(blocks, dtype=torch.uint8 if double else torch.float32),
        _empty(-(-blocks // 256)) if double else None, _empty() if double else None,
        _empty(16), _empty(256) if double else None, n, 64, dtype, _empty(n, dtype=out),
    )  # fmt: skip


# ---- catching launches ----


class _Driver:
    """As much of a triton driver as compiling asks for."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name].gpu

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.name)  # a kernel remembers the target by the device

    def get_current_stream(self, device: int) -> int:
        return 0


class Launch(NamedTuple):
    """What triton would have compiled for one launch."""

    kernel: str
    source: ASTSource
    options: dict[str, Any]

    def key(self) -> str:
        return f"{self.kernel} {self.source.hash()} {sorted(self.options.items())}"


def record(name: str, call: Callable[[], object]) -> list[Launch]:
    """The launches of `call` on architecture `name`; nothing is compiled and nothing runs."""
    launches: list[Launch] = []

    def catch(*, fn, compile, **_) -> bool:
        described = json.loads(compile["specialization_data"])["options"]
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in described.items()}
        options.pop("extern_libs")  # paths, found again by the compiler
        function = fn.jit_function
        source = ASTSource(
            function, compile["signature"], compile["constants"], compile["configs"][0]
        )
        launches.append(Launch(function.__name__, source, options))
        return True  # triton: neither compile nor launch

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, catch
    driver.set_active(_Driver(name))  # pyright: ignore[reportArgumentType]
    try:
        with tuning.as_if(name):
            call()
    finally:
        knobs.runtime.jit_cache_hook = before
    return launches


# ---- compiling and counting ----


class Figures(NamedTuple):
    """What one compiled kernel takes, and what is wrong with it."""

    target: str
    kernel: str
    variant: str
    block: str
    registers: int  # of a thread
    shared: int  # bytes of a program
    spills: int  # NVIDIA: bytes of stack a thread; ROCm: registers
    matrix: str  # matrix instructions in the code, "-" where there is no product
    fault: str = ""


def labels(name: str, variant: str, launch: Launch) -> tuple[str, str, str, str]:
    """The first four of the figures, which need no compiler."""
    constants = {launch.source.fn.arg_names[at[0]]: v for at, v in launch.source.constants.items()}
    sizes = "x".join(str(v) for k, v in constants.items() if k.startswith("BLOCK"))
    block = f"{sizes} w{launch.options['num_warps']} s{launch.options['num_stages']}"
    return name, launch.kernel.removesuffix("_kernel"), variant, block


def figures(name: str, variant: str, launch: Launch) -> Figures:
    """Compile one launch for architecture `name`."""
    first = labels(name, variant, launch)
    target = TARGETS[name]
    nvidia = target.gpu.backend == "cuda"
    try:
        binary = triton.compile(launch.source, target=target.gpu, options=launch.options)
    except Exception as error:  # a compiler's errors have no common type
        return Figures(*first, 0, 0, 0, "", f"does not compile: {error!s:.200}")
    shared = binary.metadata.shared
    registers, spills = _of_cubin(binary.asm["cubin"]) if nvidia else _of_text(binary.asm["amdgcn"])
    matrix = "-"
    faults = []
    if spills:
        faults.append("spills")
    if shared > target.shared:
        faults.append(f"has {target.shared} bytes of shared memory")
    if "tt.dot" in binary.asm["ttir"]:
        count = binary.asm["ptx" if nvidia else "amdgcn"].count(target.matrix)
        matrix = f"{count} {target.matrix.removeprefix('v_').split('.')[0]}"
        if nvidia and launch.source.signature["hidden_ptr"] == "*fp32":
            matrix = "fma"  # on purpose: see the README
        elif not count:
            faults.append("no matrix instructions")
    return Figures(*first, registers, shared, spills, matrix, ", ".join(faults))


def _of_cubin(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) of a thread. Triton puts nothing on the stack but spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", out)
    assert found, out
    return int(found[1]), int(found[2]) + int(found[3])


def _of_text(assembly: str) -> tuple[int, int]:
    """(vector registers, spilled registers, scalar ones included) of ROCm assembly."""

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found, f"no {name} in the assembly"
        return int(found[1])

    return field("vgpr_count"), field("vgpr_spill_count") + field("sgpr_spill_count")


# ---- the command ----


def tasks(names: list[str], kernels: set[str], quick: bool) -> Iterator[tuple[str, int, int]]:
    """(target, index of the call, index of its launch) of each different piece of machine code."""
    for name in names:
        seen = set()
        for i, call in enumerate(calls()):
            if quick and not call.quick:
                continue
            try:
                launches = record(name, call.run)
            except ValueError:  # fused, where `fused.supported` says no
                continue
            for j, launch in enumerate(launches):
                wanted = not kernels or launch.kernel.removesuffix("_kernel") in kernels
                if wanted and launch.key() not in seen:
                    seen.add(launch.key())
                    yield name, i, j


def run_task(task: tuple[str, int, int]) -> Figures:
    name, i, j = task
    call = list(calls())[i]
    return figures(name, call.variant, record(name, call.run)[j])


def table(rows: list[Figures]) -> str:
    head = Figures._fields[:-1]
    cells = [head, *((*map(str, row[:-1]), row.fault) for row in rows)]
    widths = [max(len(str(row[i])) for row in cells) for i in range(len(head))]
    aligned = "<<<<>>><"
    lines = (
        "  ".join(f"{row[i]:{aligned[i]}{w}}" for i, w in enumerate(widths))
        + (f"  <- {row[-1]}" if row is not head and row[-1] else "")
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m prefopt_kernels.compile", description=__doc__)
    parser.add_argument("--targets", help=f"of {', '.join(TARGETS)} (default {DEFAULT})")
    parser.add_argument("--kernels", default="", help="names as in the table, comma-separated")
    parser.add_argument("--json", type=Path, help="write the table as JSON too")
    parser.add_argument("--quick", action="store_true", help=f"few variants; targets {QUICK}")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8))
    asked = parser.parse_args(argv)
    listed: str = asked.targets or (QUICK if asked.quick else DEFAULT)
    names = listed.split(",")
    if unknown := [name for name in names if name not in TARGETS]:
        print(f"unknown target {', '.join(unknown)}; known: {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    if knobs.runtime.interpret:
        print(
            "TRITON_INTERPRET is set, and interpreted kernels do not compile: unset it",
            file=sys.stderr,
        )
        return 2
    work = list(tasks(names, set(asked.kernels.split(",")) - {""}, asked.quick))
    if asked.jobs == 1:
        rows = [run_task(task) for task in work]
    else:
        with ProcessPoolExecutor(asked.jobs) as pool:
            rows = list(pool.map(run_task, work))
    rows.sort(key=lambda row: (names.index(row.target), row.kernel))
    print(table(rows))
    for name in names:
        if reason := fused.supported(name):
            print(f"{name}: no fused kernel: {reason}")
    faults = sum(bool(row.fault) for row in rows)
    print(f"triton {triton.__version__}: {len(rows)} kernels compiled, {faults} faulty")
    if asked.json:
        body = {"triton": triton.__version__, "kernels": [row._asdict() for row in rows]}
        asked.json.write_text(json.dumps(body, indent=1) + "\n")
    return 1 if faults or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
