"""Files that are the old ones or the new ones, whole, whatever happens while they are written.

Everything goes to a `.tmp-*` name beside its place, is fsynced and renamed over the old one, and
the folder is fsynced. Nothing is written in place: a reader, or a memory map, of the old file keeps
the old bytes.
"""

import ctypes
import json
import os
import shutil
import socket
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from prefopt.errors import InputError

TMP = ".tmp-"
_HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"
# torch's names -> those of the safetensors format
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_bytes(path: str | os.PathLike[str], data: bytes | bytearray | memoryview) -> None:
    """Replaces the file `path` by `data`. On an error the old file stays, untouched."""
    with replacing(Path(path)) as fd:
        write_all(fd, data)


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Replaces the file `path` by `obj` as indented JSON (which has no NaN: ValueError)."""
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Replaces the file `path` by `tensors`, from any device, in safetensors format.

    Written one tensor at a time: `safetensors.torch.save` holds a second copy of all of them, for
    an optimizer state perhaps more than the machine has. Tensors that share memory are each written
    in full.
    """
    # Widest first, so that every tensor starts at a multiple of its item size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(Path(path)) as fd:
        write_all(fd, len(text).to_bytes(8, "little") + text)
        for name in names:
            flat = tensors[name].detach().cpu().contiguous().flatten()
            write_all(fd, flat.view(torch.uint8).numpy().data)


def load_tensors(path: str | os.PathLike[str], device: str = "cpu") -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file; InputError, naming it, when it is missing or damaged."""
    try:
        return safetensors.torch.load_file(path, device=device)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; check the path") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}); check its permissions") from None
    except safetensors.SafetensorError as error:
        raise InputError(
            f"{path} is damaged or not a safetensors file ({error}); use another copy"
        ) from None


@contextmanager
def new_dir(final: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a new `.tmp-*` folder; when the body is done, it is fsynced and becomes `final`.

    An existing `final` is replaced, on Linux in one step. On an error the new folder is removed and
    the old one stays.
    """
    final = Path(final)
    tmp = _tmp_beside(final)
    tmp.mkdir()
    try:
        yield tmp
        fsync_tree(tmp)
        if not final.exists():
            os.rename(tmp, final)
        elif not _exchange(tmp, final):
            old = _tmp_beside(final)
            os.rename(final, old)
            try:
                os.rename(tmp, final)
            except OSError:
                os.rename(old, final)
                raise
            tmp = old
        fsync_dir(final.parent)
    except BaseException:
        _remove(tmp)
        raise
    _remove(tmp)


def sweep(folder: str | os.PathLike[str]) -> list[str]:
    """Removes the `.tmp-*` in `folder` whose writer, on this machine, is dead; returns their names.

    What other machines write into a shared folder is left alone.
    """
    gone = []
    for path in Path(folder).glob(TMP + "*"):
        host, _, rest = path.name.removeprefix(TMP).partition("-")
        pid = rest.partition("-")[0]
        if host == _HOST and pid.isdigit() and not _alive(int(pid)):
            _remove(path)
            gone.append(path.name)
    return gone


def remove(path: str | os.PathLike[str]) -> None:
    """Removes a file or folder; readers find all of it or nothing, even if this is interrupted."""
    tmp = _tmp_beside(Path(path))
    os.rename(path, tmp)
    _remove(tmp)


def write_all(fd: int, data: bytes | bytearray | memoryview) -> None:
    """os.write until every byte is out (one call writes at most 2 GiB, and may write less)."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(fd, view) :]


def fsync_dir(folder: Path) -> None:
    """Makes the names in `folder` durable (Windows cannot, and does not need to, open folders)."""
    if os.name != "nt":
        _fsync(folder)


def fsync_tree(folder: Path) -> None:
    """fsyncs all that is below `folder`, and gives every file the permissions open() gives.

    safetensors writes 0600 whatever the umask is; the folder, made by mkdir, shows the umask.
    """
    readable = folder.stat().st_mode & 0o666
    for root, _, files in os.walk(folder):
        for name in files:
            path = Path(root, name)
            path.chmod(path.stat().st_mode | readable)
            _fsync(path)
        fsync_dir(Path(root))


@contextmanager
def replacing(path: Path) -> Iterator[int]:
    """Yields the descriptor of a new file; when the body is done, it is durable and at `path`."""
    tmp = _tmp_beside(path)
    try:
        # 0o666 here means 0o666 & ~umask; O_EXCL: never through somebody's link.
        fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            yield fd
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(tmp, path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _tmp_beside(path: Path) -> Path:
    """A fresh name that tells who writes it, so that sweep() can tell the dead from the living."""
    return path.parent / f"{TMP}{_HOST}-{os.getpid()}-{os.urandom(4).hex()}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two names in one step; False where the system cannot (Linux and its renameat2 can)."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
