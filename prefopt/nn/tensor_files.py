"""The safetensors files of a model folder, one tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from prefopt.durable import save_tensors, write_json
from prefopt.errors import InputError

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class TensorFiles:
    """The tensors of a folder with model.safetensors or its shards. Nothing is kept in memory.

    `names` -> the file of each. InputError, naming the file, when one is missing, damaged, or does
    not hold what the index says.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if (self.folder / WHOLE).is_file():
            self.names = dict.fromkeys(self._keys(self.folder / WHOLE), self.folder / WHOLE)
        elif (self.folder / INDEX).is_file():
            self.names = self._of_index(self.folder / INDEX)
        else:
            raise InputError(f"{self.folder} has no {WHOLE} and no {INDEX}; name a model folder")

    def _of_index(self, index: Path) -> dict[str, Path]:
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(_plain(file) for file in listed.values()):
            raise InputError(f'{index} has no "weight_map" of tensors and files; get another copy')
        found = {file: self._keys(self.folder / file) for file in sorted(set(listed.values()))}
        for name, file in listed.items():
            if name not in found[file]:
                raise InputError(f"{self.folder / file} lacks {name}, which {INDEX} says it has")
        for file, names in found.items():
            if extra := [name for name in names if listed.get(name) != file]:
                raise InputError(f"{self.folder / file} has {extra[0]}, which {INDEX} does not say")
        return {name: self.folder / file for name, file in listed.items()}

    def _keys(self, file: Path) -> list[str]:
        with _open(file) as opened:
            return list(opened.keys())

    def shape(self, name: str) -> list[int]:
        with _open(self.names[name]) as opened:
            return opened.get_slice(name).get_shape()

    def read(self, *names: str) -> list[Tensor]:
        """The tensors, in memory of their own. The file is mapped only meanwhile, so what has been
        read of it does not count as this process's memory."""
        tensors = {}
        for file in {self.names[name] for name in names}:
            with _open(file) as opened:
                for name in names:
                    if self.names[name] == file:
                        tensors[name] = opened.get_tensor(name).clone()
        return [tensors[name] for name in names]


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


def _open(file: Path) -> Any:
    try:
        return safetensors.safe_open(file, framework="pt", device="cpu")
    except FileNotFoundError:
        raise InputError(f"{file} does not exist; copy all shards of the model") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error}); check its permissions") from None
    except safetensors.SafetensorError as error:
        raise InputError(
            f"{file} is damaged or not a safetensors file ({error}); use another copy"
        ) from None


def float_dtype(name: Any) -> torch.dtype | None:
    """ "bfloat16" -> torch.bfloat16; None for what a 4-bit weight cannot have been."""
    known = {str(t)[6:]: t for t in (torch.float32, torch.bfloat16, torch.float16)}
    return known.get(name) if isinstance(name, str) else None
