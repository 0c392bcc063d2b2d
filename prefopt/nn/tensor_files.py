"""The safetensors files of a model folder, one tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from prefopt.durable import DTYPES, save_tensors, write_json
from prefopt.errors import InputError

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Entry(NamedTuple):
    """Where a tensor stands in its file."""

    dtype: torch.dtype
    shape: list[int]
    start: int  # of its bytes
    stop: int


class TensorFiles:
    """The tensors of a folder with model.safetensors or its shards, read one at a time.

    `names` -> the file of each. Files are read, not mapped: pages of a mapped file would count as
    this process's memory, up to the size of the whole model. InputError, naming the file, when one
    is missing, damaged, or does not hold what the index says.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._entries: dict[str, Entry] = {}
        if (self.folder / WHOLE).is_file():
            self.names = dict.fromkeys(self._header(self.folder / WHOLE), self.folder / WHOLE)
        elif (self.folder / INDEX).is_file():
            self.names = self._of_index(self.folder / INDEX)
        else:
            raise InputError(f"{self.folder} has no {WHOLE} and no {INDEX}; name a model folder")

    def _of_index(self, index: Path) -> dict[str, Path]:
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(_plain(file) for file in listed.values()):
            raise InputError(f'{index} has no "weight_map" of tensors and files; get another copy')
        found = {file: self._header(self.folder / file) for file in sorted(set(listed.values()))}
        for name, file in listed.items():
            if name not in found[file]:
                raise InputError(f"{self.folder / file} lacks {name}, which {INDEX} says it has")
        for file, names in found.items():
            if extra := [name for name in names if listed.get(name) != file]:
                raise InputError(f"{self.folder / file} has {extra[0]}, which {INDEX} does not say")
        return {name: self.folder / file for name, file in listed.items()}

    def _header(self, file: Path) -> list[str]:
        """The names in a file, whose entries are kept."""
        header, begin = _header(file)
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            if entry["dtype"] not in _DTYPES:
                raise InputError(f"{file} has {name} as {entry['dtype']}, which torch has not")
            dtype = _DTYPES[entry["dtype"]]
            self._entries[name] = Entry(dtype, entry["shape"], begin + start, begin + stop)
        return list(header)

    def read(self, *names: str) -> list[Tensor]:
        """The tensors, each in memory of its own."""
        tensors = []
        for name in names:
            entry, file = self._entries[name], self.names[name]
            data = torch.empty(entry.stop - entry.start, dtype=torch.uint8)
            with file.open("rb") as opened:
                opened.seek(entry.start)
                if opened.readinto(data.numpy().data) != len(data):
                    raise InputError(f"{file} ends within {name}; use another copy")
            tensors.append(data.view(entry.dtype).view(entry.shape))
        return tensors


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """name -> dtype, shape, data_offsets, checked by safetensors, and where the data begin."""
    try:
        with safetensors.safe_open(file, framework="pt", device="cpu"):
            pass
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
    except FileNotFoundError:
        raise InputError(f"{file} does not exist; copy all shards of the model") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error}); check its permissions") from None
    except (safetensors.SafetensorError, ValueError) as error:
        raise InputError(
            f"{file} is damaged or not a safetensors file ({error}); use another copy"
        ) from None
    header.pop("__metadata__", None)
    return header, 8 + size


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; InputError, naming the file, if it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; check the path") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}); get another copy") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, not an object; get another copy")
    return value


def save_shards(
    folder: Path, groups: Iterator[dict[str, Tensor]], limit: int, parameters: int
) -> None:
    """Writes groups of tensors, each whole into one file of at most `limit` bytes (more only for a
    group that is larger by itself): model.safetensors, or shards and their index."""
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for group in groups:
        more = sum(t.nbytes for t in group.values())
        if shards[-1] and size + more > limit:
            shards.append({})
            size = 0
        shards[-1].update(group)
        size, total = size + more, total + more
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [WHOLE]
    for name, shard in zip(names, shards, strict=True):
        save_tensors(folder / name, shard, metadata={"format": "pt"})
    if len(shards) > 1:
        files = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        metadata = {"total_parameters": parameters, "total_size": total}
        write_json(
            folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(files.items()))}
        )


def byte_count(size: str | int) -> int:
    """ "5GB", "200MB" or a number of bytes -> bytes."""
    if isinstance(size, int):
        number, unit = float(size), 1
    else:
        unit = _UNITS.get(size.strip()[-2:].upper(), 0)
        try:
            number = float(size.strip()[:-2])
        except ValueError:
            unit = 0
    if not unit or not number * unit >= 1:
        raise InputError(f"max_shard_size is a size such as '5GB' or '200MB', not {size!r}")
    return int(number * unit)


def _plain(name: Any) -> bool:
    """Whether it is the name of a file in the same folder: an index may come from anywhere."""
    return isinstance(name, str) and name not in ("", "..") and Path(name).name == name


def float_dtype(name: Any) -> torch.dtype | None:
    """ "bfloat16" -> torch.bfloat16; None for what a 4-bit weight cannot have been."""
    known = {str(t)[6:]: t for t in (torch.float32, torch.bfloat16, torch.float16)}
    return known.get(name) if isinstance(name, str) else None
