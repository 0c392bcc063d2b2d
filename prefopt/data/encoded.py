"""Encoded groups: what one is, and any number of them on a temporary file.

In memory a group costs some 40 bytes: where its record stands, and what planning asks of it. All
else is read when it is asked for, with seek and read, so that it leaves no trace in memory.

A record, little endian, K responses, P and n_k tokens:
    head: P u32, K u16, u8 whether labelled, weight, margin (NaN: none), preference f64
    n_k u32 each, then the tokens of the prompt and of each response, i32
    labels i8 [K] if labelled, then per response u8 whether it is masked, and its mask, 8 to a byte
    where there is a source: u8, and its UTF-8
"""

from __future__ import annotations

import copy
import math
import struct
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import overload

import numpy as np

from prefopt.data.spool import SPOOL_BYTES

_HEAD = struct.Struct("<IHBxddd")


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt [P >= 1] and its responses, each [n_k >= 1], int32; `index` is the row encoded.

    `scored`: for each response which of its tokens count, [n_k] bool or None for all of them; None
    where that holds for every response. `labels`: one of DESIRABLE, UNDESIRABLE and BASELINE per
    response, for losses on single responses. `margin`, `source` and `preference` are the record's.
    """

    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    index: int
    weight: float = 1.0
    margin: float | None = None
    source: str | None = None
    scored: tuple[np.ndarray | None, ...] | None = None
    labels: tuple[int, ...] | None = None
    preference: float = 1.0


class EncodedSet(Sequence[Encoded]):
    """Encoded groups in source order, with what truncation and filtering did to them.

    `counts` maps "truncated" (responses cut), "dropped: <reason>" (pairs) and other facts to how
    many; `template` says which template was applied and why.
    """

    def __init__(
        self,
        items: Iterable[Encoded] = (),
        counts: dict[str, int] | None = None,
        template: str = "",
    ):
        self.counts = {} if counts is None else counts
        self.template = template
        self._file = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)
        weakref.finalize(self, self._file.close)
        self._whole: EncodedSet | None = None  # of which this is a part: its end closes the file
        self._indices, self._starts, self._bytes = array("q"), array("Q"), array("Q")
        self._tokens, self._responses, self._digests = array("I"), array("H"), array("Q")
        for item in items:
            self.add(item.index, to_record(item))

    def add(self, index: int, record: bytes) -> None:
        """Append what `to_record` made of the group of this row."""
        tokens, responses, digest = _facts(record)
        self._indices.append(index)
        self._starts.append(self._file.seek(0, 2))
        self._bytes.append(self._file.write(record))
        self._tokens.append(tokens)
        self._responses.append(responses)
        self._digests.append(digest)

    @property
    def indices(self) -> np.ndarray:
        """Row of each group, [n] int64."""
        return np.array(self._indices)

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of each group, prompt and responses, [n] int64."""
        return np.array(self._tokens, dtype=np.int64)

    @property
    def num_responses(self) -> np.ndarray:
        """Responses of each group, [n] int64."""
        return np.array(self._responses, dtype=np.int64)

    @property
    def digests(self) -> np.ndarray:
        """A hash of all of each group but its row and its source, [n] uint64."""
        return np.array(self._digests)

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> EncodedSet: ...
    def __getitem__(self, index: int | slice) -> Encoded | EncodedSet:
        if isinstance(index, slice):
            part = copy.copy(self)
            part._whole = self
            part.counts = dict(self.counts)
            for name, values in vars(self).items():
                if isinstance(values, array):
                    setattr(part, name, values[index])
            return part
        at = range(len(self))[index]  # negative indices, IndexError
        self._file.seek(self._starts[at])
        return from_record(self._indices[at], bytearray(self._file.read(self._bytes[at])))


def to_record(item: Encoded) -> bytes:
    """The bytes of a group, without its row; see the module."""
    labelled, k = item.labels is not None, len(item.responses)
    margin = math.nan if item.margin is None else item.margin
    parts = [
        _HEAD.pack(len(item.prompt), k, labelled, item.weight, margin, item.preference),
        struct.pack(f"<{k}I", *map(len, item.responses)),
        *(
            np.ascontiguousarray(ids, dtype="<i4").tobytes()
            for ids in (item.prompt, *item.responses)
        ),
        b"" if item.labels is None else struct.pack(f"<{k}b", *item.labels),
    ]
    for mask in item.scored or (None,) * k:
        parts += [b"\0"] if mask is None else [b"\1", np.packbits(mask).tobytes()]
    return b"".join(
        [
            *parts,
            b"" if item.source is None else b"\1" + item.source.encode("utf-8", "surrogatepass"),
        ]
    )


def from_record(index: int, record: bytearray) -> Encoded:
    """The group that `to_record` wrote; its arrays are views of the record."""
    size, k, labelled, weight, margin, preference = _HEAD.unpack_from(record)
    lengths = struct.unpack_from(f"<{k}I", record, _HEAD.size)
    at = _HEAD.size + 4 * k
    ids = np.frombuffer(record, "<i4", size + sum(lengths), at).astype(np.int32, copy=False)
    prompt, *responses = np.split(ids, np.cumsum([size, *lengths])[:-1])
    at += 4 * len(ids)
    labels = struct.unpack_from(f"<{k}b", record, at) if labelled else None
    at += k * labelled
    scored: list[np.ndarray | None] = []
    for n in lengths:
        masked, at = record[at], at + 1
        packed = np.frombuffer(record, np.uint8, (n + 7) // 8 * masked, at)
        scored.append(np.unpackbits(packed, count=n).astype(bool) if masked else None)
        at += len(packed)
    return Encoded(
        prompt,
        tuple(responses),
        index,
        weight=weight,
        margin=None if math.isnan(margin) else margin,
        source=record[at + 1 :].decode("utf-8", "surrogatepass") if at < len(record) else None,
        scored=None if all(mask is None for mask in scored) else tuple(scored),
        labels=labels,
        preference=preference,
    )


def _facts(record: bytes) -> tuple[int, int, int]:
    """(tokens, responses, hash without the source) of a record."""
    size, k, labelled, *_ = _HEAD.unpack_from(record)
    lengths = struct.unpack_from(f"<{k}I", record, _HEAD.size)
    tokens = size + sum(lengths)
    at = _HEAD.size + 4 * k + 4 * tokens + k * labelled
    for n in lengths:
        at += 1 + (n + 7) // 8 * record[at]
    digest = blake2b(memoryview(record)[:at], digest_size=8).digest()
    return tokens, k, int.from_bytes(digest, "little")
