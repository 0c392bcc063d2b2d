"""Records of any kind on a temporary file, so that a large data set costs one offset a record."""

from __future__ import annotations

import json
import tempfile
import weakref
from array import array
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

from prefopt.data.records import DataReport
from prefopt.errors import InputError

SPOOL_BYTES = 8 << 20  # records beyond this go from memory to disk
T = TypeVar("T")


class Lines:
    """Lines of bytes on a temporary file, by number: memory holds one offset of each.

    All are appended before the first is read.
    """

    def __init__(self) -> None:
        self._offsets = array("Q", [0])
        self._file = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)
        weakref.finalize(self, self._file.close)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def append(self, line: bytes) -> None:
        self._file.write(line)
        self._offsets.append(self._offsets[-1] + len(line))

    def __getitem__(self, index: int) -> bytes:
        at = range(len(self))[index]  # negative indices, IndexError
        self._file.seek(self._offsets[at])
        return self._file.read(self._offsets[at + 1] - self._offsets[at])


class Spool(Sequence[T]):
    """Records as JSON lines, read one at a time; `report` says how they came about.

    `decode` makes a record of the fields it was appended as; `where` says where it was read.
    """

    def __init__(self, report: DataReport, decode: Callable[[list[Any]], T]):
        self.report = report
        self._decode = decode
        self._lines = Lines()

    def take(self, where: str, records: list[list[Any]] | str, rows: int = 1) -> bool:
        """Count rows in the report, and keep the records made of them (the fields of each), unless
        this is why they are dropped.

        Returns whether they were kept: text that is not Unicode is not.
        """
        self.report.rows += rows
        if isinstance(records, str):
            self.report.drop(records, where, rows)
            return False
        place = where.encode("utf-8", "replace").decode()  # file names may hold any bytes
        try:
            lines = [
                json.dumps([place, fields], ensure_ascii=False, separators=(",", ":")).encode()
                + b"\n"
                for fields in records
            ]
        except UnicodeEncodeError:
            reason = "text that is not valid Unicode (half a surrogate pair)"
            self.report.drop(reason, where, rows)
            return False
        self.report.kept += rows
        self.report.records += len(lines)
        for line in lines:
            self._lines.append(line)
        return True

    def check(self, unit: str) -> None:
        """InputError, with the reasons, where no row was kept."""
        report = self.report
        if report.kept:
            return
        if not report.rows:
            raise InputError(f"{report.source!r} is empty: it holds no {unit}.")
        counts = ", ".join(f"{reason} ({count:,})" for reason, count in report.dropped.items())
        raise InputError(
            f"No usable {unit} among the {report.rows:,} rows of {report.source!r}, read as "
            f"{report.schema}: {counts}; first at {next(iter(report.dropped_at.values()))}."
        )

    def __len__(self) -> int:
        return len(self._lines)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._decode(self._read(index)[1])

    def where(self, index: int) -> str:
        """The position of the row that a record was made of: "pairs.jsonl:12"."""
        return self._read(index)[0]

    def _read(self, index: int) -> list[Any]:
        return json.loads(self._lines[index])
