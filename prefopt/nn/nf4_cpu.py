"""The compiled CPU decoder of 4-bit codes: nf4_cpu.c, built once per machine, called by ctypes.

A C compiler is what torch.compile and Triton ask of a machine too; where there is none, or no
pthreads, `decode` says so by returning False and nf4.py's torch lookup serves, in the same bits.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_suffix(".c")
# No fused multiply-add and no reassociation: the bits are those of the torch specification.
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC", "-pthread")
_PER_THREAD = 1 << 20  # elements for which starting a thread is worth it


def decode(
    codes: Tensor,
    scales: Tensor,
    nested: Tensor | None,
    offset: Tensor | None,
    dynamic: Tensor,
    codebook: Tensor,
    block: int,
    out: Tensor,
) -> bool:
    """out[i] = round(codebook[code i] * scale[i // block]); False when this cannot be done here.

    The first four as in Packed4, dynamic and codebook float32 [256] and [16], out of n elements in
    float32 or bfloat16; all contiguous, on the CPU.
    """
    if out.dtype not in (torch.float32, torch.bfloat16) or why_not() is not None:
        return False
    n = out.numel()
    blocks = -(-n // block)
    assert codes.dtype == torch.uint8 and codes.numel() == (n + 1) // 2 and block % 2 == 0
    assert scales.numel() == blocks
    assert scales.dtype == (torch.float32 if nested is None else torch.uint8)
    assert nested is None or nested.numel() == -(-blocks // 256)
    assert dynamic.numel() == 256 and codebook.numel() == 16
    tensors = (codes, scales, nested, offset, dynamic, codebook, out)
    for t in tensors:
        assert t is None or (t.is_contiguous() and t.device.type == "cpu")
    for t in (nested, offset, dynamic, codebook):
        assert t is None or t.dtype == torch.float32
    threads = max(1, min(torch.get_num_threads(), n // _PER_THREAD))
    pointers = (None if t is None else t.data_ptr() for t in tensors)
    _library().decode(*pointers, n, block, out.dtype == torch.bfloat16, threads)
    return True


@functools.cache
def why_not() -> str | None:
    """None if the compiled decoder runs here, else why it does not."""
    try:
        _library()
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        return f"the compiled 4-bit decoder is not available: {error}"
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_build()))
    pointer, number = ctypes.c_void_p, ctypes.c_long
    library.decode.argtypes = [pointer] * 7 + [number, number, ctypes.c_int, ctypes.c_int]
    library.decode.restype = None
    return library


def _build() -> Path:
    """The shared object, compiled if the user's cache does not hold it already."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise OSError("no C compiler was found (cc, gcc, or the variable CC)")
    # A home folder may be shared by machines with other instruction sets.
    what = (_SOURCE.read_bytes(), " ".join((compiler, *_FLAGS)).encode(), _processor())
    name = f"nf4-{hashlib.sha256(b'|'.join(what)).hexdigest()[:16]}.so"
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        folder = user / "prefopt" / "native"
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / name).is_file():
            return folder / name
        return _compile(compiler, folder, name)
    except PermissionError:  # a read-only home: compiled for this process alone
        return _compile(compiler, Path(tempfile.mkdtemp(prefix="prefopt-")), name)


def _compile(compiler: str, folder: Path, name: str) -> Path:
    with tempfile.TemporaryDirectory(dir=folder) as work:
        built = Path(work) / name
        command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise OSError(f"{compiler} failed: {(done.stderr.strip() or 'no message')[:200]}")
        os.replace(built, folder / name)
    return folder / name


def _processor() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
        return "\n".join(sorted(set(flags))).encode()
    except OSError:
        return f"{platform.node()} {platform.machine()} {platform.processor()}".encode()
