"""One reader per kind of file: rows with their position, streamed out of whatever compression.

Only a .json file is parsed whole. JSON lines are split and parsed here, not by a table library, so
that every error names its line and no row is coerced to the types of another.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from prefopt.errors import InputError

Row = tuple[str, dict[str, Any]]


class Unreadable(dict):
    """A row in the place of one that could not be read, and why."""

    def __init__(self, reason: str):
        super().__init__()
        self.reason = reason


PACKED = {".gz", ".xz", ".zst"}


def suffixes(path: Path) -> list[str]:
    """[".jsonl", ".gz"], [".csv"], ...; [] for what is not a data file."""
    tail = [suffix.lower() for suffix in path.suffixes[-2:]]
    packed = tail[-1:] if tail and tail[-1] in PACKED else []
    kind = tail[len(tail) - len(packed) - 1 : len(tail) - len(packed)]
    return kind + packed if kind and kind[0] in READERS else []


def kind_of(path: Path) -> str | None:
    """The kind by suffix (".jsonl", ".csv", ...), compressed or not; None for no data file."""
    found = suffixes(path)
    return found[0] if found else None


def file_rows(path: Path, split: str | None) -> Iterator[Row]:
    """Rows of one file; `split` names a list inside a .json object."""
    kind = kind_of(path)
    assert kind is not None
    if kind == ".json":
        return _json_rows(path, split)
    return READERS[kind](path)


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", as_row(_parse(line, path, number))


def _json_rows(path: Path, split: str | None = None) -> Iterator[Row]:
    """An array of objects, an object that holds one, a single object, or JSON lines after all."""
    with _opened(path) as file:
        text = file.read()
    if not text.strip():
        return
    try:
        value = _parse(text, path)
    except InputError as whole:
        lines = text.split(b"\n", 1)
        try:  # many .json files are JSON lines: then the first line alone is an object
            is_lines = len(lines) > 1 and isinstance(_parse(lines[0], path), dict)
        except InputError:
            is_lines = False
        if not is_lines:
            raise whole from None
        yield from _jsonl_rows(path)
        return
    if isinstance(value, dict):
        value = _rows_in_object(value, path, split)
    if not isinstance(value, list):
        raise InputError(f"{str(path)!r} holds a JSON {type(value).__name__}, no array of objects.")
    for number, row in enumerate(value, start=1):
        yield f"{path} row {number}", as_row(row)


def _rows_in_object(value: dict[str, Any], path: Path, split: str | None) -> list[Any]:
    """The one list of objects in a JSON object (or the one that `split` names); else one row."""
    lists = [k for k, v in value.items() if v and isinstance(v, list) and isinstance(v[0], dict)]
    if split is not None and split in lists:
        return value[split]
    if split is not None and split != "train":
        raise InputError(f"{str(path)!r} has no list named {split!r}, only {', '.join(value)}.")
    return value[lists[0]] if len(lists) == 1 else [value]


def _csv_rows(path: Path) -> Iterator[Row]:
    limit = 2**31 - 1  # the module's own limit of 128 KiB a cell is too small for documents
    if csv.field_size_limit() < limit:
        csv.field_size_limit(limit)
    with _opened(path) as file:
        reader = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), strict=True)
        while True:
            try:
                row = next(reader, None)
            except (csv.Error, UnicodeDecodeError) as error:
                raise InputError(
                    f"{path}:{reader.line_num + 1}: not valid CSV ({error})."
                ) from error
            if row is None:
                return
            where = f"{path}:{reader.line_num}"
            if None in row:
                raise InputError(
                    f"{where}: this CSV row has more cells than the header "
                    f"({len(reader.fieldnames or [])}); quote cells that hold commas."
                )
            yield where, row


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow.parquet as pq

    with _opened(path) as file, pq.ParquetFile(file) as table:
        yield from _batch_rows(table.iter_batches(batch_size=256), path)


def _arrow_rows(path: Path) -> Iterator[Row]:
    """Arrow IPC, the stream format (what `datasets` writes) or the file format."""
    import pyarrow as pa

    with _opened(path) as file:
        magic = file.read(6)
        file.seek(0)
        if magic == b"ARROW1":
            table = pa.ipc.open_file(file)
            batches = (table.get_batch(i) for i in range(table.num_record_batches))
        else:
            batches = iter(pa.ipc.open_stream(file))
        yield from _batch_rows(batches, path)


def _batch_rows(batches: Iterable[Any], path: Path) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield f"{path} row {number}", row


READERS = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}


# --- helpers -----------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The decompressed bytes of `path`; damage met while reading is an InputError too."""
    broken: tuple[type[Exception], ...] = (EOFError, zlib.error, lzma.LZMAError)
    try:
        suffix = path.suffix.lower()
        if suffix == ".gz":
            file: Any = gzip.open(path, "rb")
        elif suffix == ".xz":
            file = lzma.open(path, "rb")
        elif suffix == ".zst":
            zstandard = _zstandard(path)
            broken = (*broken, zstandard.ZstdError)
            file = io.BufferedReader(zstandard.open(path, "rb"))
        else:
            file = open(path, "rb")
        with file:
            yield file
    except broken as error:
        raise InputError(f"{str(path)!r} is damaged or cut short ({error}).") from error
    except OSError as error:
        raise InputError(f"Cannot read {str(path)!r} ({error.strerror or error}).") from error
    except ValueError as error:
        if type(error).__module__.startswith("pyarrow"):
            raise InputError(f"{str(path)!r} is damaged ({error}).") from error
        raise


def _zstandard(path: Path) -> Any:
    try:
        return importlib.import_module("zstandard")
    except ImportError as error:
        raise InputError(
            f"Reading {str(path)!r} needs the package zstandard: pip install zstandard, or "
            "decompress the file."
        ) from error


def _parse(text: bytes, path: Path, line: int | None = None) -> Any:
    """JSON from bytes; errors name the line (`line`, or the line inside a whole file).

    A line that is JSON, but of no use, is an `Unreadable` row.
    """
    try:
        return json.loads(text.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        at, why = line or error.lineno, f"{error.msg}, column {error.colno}"
        hint = " A JSON array belongs in a .json file." if at == 1 and text[:1] == b"[" else ""
        raise InputError(f"{path}:{at}: not valid JSON ({why}).{hint if line else ''}") from error
    except UnicodeDecodeError as error:
        at = line or text.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{at}: not valid UTF-8 ({error.reason}).") from error
    except (ValueError, RecursionError) as error:  # too deep, or a number of too many digits
        if line is not None:
            return Unreadable("JSON that is nested too deeply, or has a number of too many digits")
        raise InputError(f"{path}:1: not valid JSON ({error}).") from error


def as_row(value: Any) -> dict[str, Any]:
    """The row as a dict; an `Unreadable` one if it is none."""
    if isinstance(value, dict):
        return value
    if isinstance(value, Mapping):
        return dict(value)
    return Unreadable(f"the row is {type(value).__name__}, not an object with named columns")
