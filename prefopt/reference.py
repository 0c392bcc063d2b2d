"""The reference's log-probs, computed once per base model and kept on disk.

What is stored is the log-prob of every response token under the reference. Its key is what that
number depends on and nothing else: `Policy.reference_key()` (base weights and a non-zero adapter,
dtype, attention class) names the folder, the token ids of prompt and response, and which of them
are scored, name the record in it. A change of learning rate, LoRA rank, output folder or data file
changes no key.

    dir/<16 hex>/key.json          what the folder's numbers depend on
    dir/<16 hex>/part-<hex>.bin    records, one after another, only ever appended to:
                                   magic [4] key [16] n [u32] crc32 [u32] log-probs [n x f32]

All little endian; the crc covers key, n and log-probs. Each writing process has its own part and
writes one batch with one fsync, so builders may run side by side, and a killed one loses the batch
in flight: the record that it left incomplete ends its part and is passed over. Anything else that
is wrong in a part is damage, and an InputError.

Shapes: N scored tokens of a batch, n of one response.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from prefopt.durable import fsync_dir, write_all, write_json
from prefopt.errors import InputError

if TYPE_CHECKING:
    from prefopt.data.packing import Batch
    from prefopt.policy import Policy

_MAGIC = b"PRC1"
_HEADER = struct.Struct("<4s16sII")  # magic, key, n, crc32


class ReferenceCache:
    """Reference log-probs in the folder `dir`, which is made when there is something to write.

    `forwards` counts the reference's forward passes so far, `hits` and `misses` the responses that
    were, or were not, on disk.
    """

    def __init__(self, dir: str | os.PathLike[str]):
        self.dir = Path(dir)
        self.forwards = self.hits = self.misses = 0
        self._folders: dict[Path, _Folder] = {}

    def logprobs(
        self,
        policy: Policy,
        batches: Iterable[Batch],
        *,
        key: Mapping[str, str] | None = None,
        on_batch: Callable[[Batch, bool], None] | None = None,
    ) -> Iterator[torch.Tensor]:
        """Yields, per batch, the reference's log-probs of its targets: [N] float32 on the CPU.

        A batch whose responses are all on disk costs no forward. Any other is forwarded whole, so
        that packing, and with it rounding, is that of the batch; what was missing is durable before
        the batch is yielded, and what was on disk is yielded as it stands there. `key` defaults to
        `policy.reference_key()`; `on_batch(batch, forwarded)` is called after each batch.
        InputError: a damaged cache file, or a log-prob that is not finite. RuntimeError: the key
        changed on the way, so the weights were trained before their reference was complete.
        """
        start = policy.reference_key() if key is None else None
        folder = self._folder(start or key or {})
        for batch in batches:
            keys = _content_keys(batch)
            missing = {k for k, _ in keys} - folder.index.keys()
            absent = sum(k in missing for k, _ in keys)
            self.misses += absent
            self.hits += len(keys) - absent
            if missing:
                if start is not None and policy.reference_key() != start:
                    raise RuntimeError("the reference's weights changed while it was computed")
                computed = self._forward(policy, batch, keys)
                by_key = zip((k for k, _ in keys), computed, strict=True)
                folder.append({k: values for k, values in by_key if k in missing})
            values = folder.read(keys)
            if on_batch is not None:
                on_batch(batch, bool(missing))
            yield torch.from_numpy(np.concatenate([values[k] for k, _ in keys]))

    def info(self) -> list[dict[str, Any]]:
        """Per reference: folder, key, responses, tokens, bytes, parts, incomplete (cut tails)."""
        folders = [_Folder.open(path) for path in sorted(self.dir.glob("*/")) if _is_ours(path)]
        return [folder.info() for folder in folders]

    def verify(
        self,
        policy: Policy | None = None,
        batches: Iterable[Batch] = (),
        samples: int = 8,
    ) -> dict[str, Any]:
        """Reads all there is and checks every crc; InputError names the first damaged file.

        With a policy and batches, at least `samples` stored responses (as far as there are) are
        computed again. Returns `references` (as `info`), `compared` (responses computed again)
        and `max_abs_difference` of their log-probs, None without any.
        """
        report: dict[str, Any] = {
            "references": self.info(),
            "compared": 0,
            "max_abs_difference": None,
        }
        if policy is None:
            return report
        folder = _Folder.open(self.dir / _folder_name(policy.reference_key()))
        worst = 0.0
        for batch in batches:
            if report["compared"] >= samples:
                break
            keys = _content_keys(batch)
            if not any(k in folder.index for k, _ in keys):
                continue
            stored = folder.read([(k, n) for k, n in keys if k in folder.index])
            for (k, _), fresh in zip(keys, self._forward(policy, batch, keys), strict=True):
                if k in stored:
                    report["compared"] += 1
                    worst = max(worst, float(np.abs(fresh - stored[k]).max()))
                    report["max_abs_difference"] = worst
        return report

    def _folder(self, key: Mapping[str, str]) -> _Folder:
        path = self.dir / _folder_name(key)
        if path not in self._folders:
            self._folders[path] = _Folder.open(path, dict(key))
        return self._folders[path]

    def _forward(
        self, policy: Policy, batch: Batch, keys: list[tuple[bytes, int]]
    ) -> list[np.ndarray]:
        """One pass of the reference: the log-probs of each response of the batch."""
        self.forwards += 1
        with policy.reference(), torch.no_grad():
            logprobs = policy(batch.to(policy.device)).float().cpu()
        assert logprobs.shape == batch.targets.shape, (logprobs.shape, batch.targets.shape)
        if not logprobs.isfinite().all():
            where = int((~logprobs.isfinite()).nonzero()[0])
            raise InputError(
                f"the reference gives {logprobs[where].item()} as log-prob of token "
                f"{int(batch.targets[where])}; check the model's weights, or compute in a dtype of "
                "wider range (bf16 or float32)"
            )
        return np.split(logprobs.numpy(), np.cumsum([n for _, n in keys])[:-1])


@dataclass
class _Folder:
    """One reference's records: an index in memory, the log-probs on disk."""

    path: Path
    key: dict[str, str]
    index: dict[bytes, tuple[Path, int, int]] = field(default_factory=dict)  # part, offset, n
    incomplete: int = 0
    part: Path | None = None  # what this process appends to
    owner: int = 0

    @classmethod
    def open(cls, path: Path, key: dict[str, str] | None = None) -> _Folder:
        """Reads every record of the folder, if it exists; `key` None: what its key.json says."""
        stored = _read_key(path / "key.json")
        if stored is None and path.is_dir() and key is None and any(path.glob("part-*.bin")):
            raise InputError(
                f"{path / 'key.json'} is missing, so nobody can tell whose log-probs these are; "
                f"delete {path}: they will be computed again"
            )
        folder = cls(path, key or stored or {})
        if stored is not None and stored != folder.key:
            raise InputError(
                f"{path / 'key.json'} is not the key that its folder is named for; delete "
                f"{path}: its values will be computed again"
            )
        for part in sorted(path.glob("part-*.bin")):
            for key_, offset, n in _scan(part):
                if n is None:
                    folder.incomplete += 1
                else:
                    folder.index.setdefault(key_, (part, offset, n))
        return folder

    def info(self) -> dict[str, Any]:
        parts = list(self.path.glob("part-*.bin"))
        return {
            "folder": self.path.name,
            "key": self.key,
            "responses": len(self.index),
            "tokens": sum(n for _, _, n in self.index.values()),
            "bytes": sum(part.stat().st_size for part in parts),
            "parts": len(parts),
            "incomplete": self.incomplete,
        }

    def append(self, new: Mapping[bytes, np.ndarray]) -> None:
        """Makes the records durable, with one write and one fsync, then knows them."""
        if self.part is None or self.owner != os.getpid():  # a fork writes a part of its own
            self._make_dir()
            self.part = self.path / f"part-{os.urandom(8).hex()}.bin"
            self.owner = os.getpid()
        records = [_record(key, values) for key, values in new.items()]
        fd = os.open(
            self.part, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666
        )
        offset = start = os.fstat(fd).st_size
        try:
            write_all(fd, b"".join(records))
            os.fsync(fd)
        except BaseException:
            # What lies behind a torn record would be unreadable: cut it off, and begin a new part.
            self.part = None
            os.ftruncate(fd, start)
            raise
        finally:
            os.close(fd)
        if start == 0:
            fsync_dir(self.path)
        for (key, values), record in zip(new.items(), records, strict=True):
            self.index[key] = (self.part, offset, len(values))
            offset += len(record)

    def read(self, keys: list[tuple[bytes, int]]) -> dict[bytes, np.ndarray]:
        """The log-probs of these (key, n), all of which are in the index."""
        wanted = sorted((*self.index[key], key, n) for key, n in keys)
        values: dict[bytes, np.ndarray] = {}
        for part, entries in groupby(wanted, key=lambda entry: entry[0]):
            try:
                with part.open("rb") as file:
                    for _, offset, stored, key, n in entries:
                        file.seek(offset)
                        found = _parse(file.read(_HEADER.size + 4 * stored))
                        if found is None or found[0] != key or len(found[1]) != n:
                            raise _damage(part, offset)
                        values[key] = found[1]
            except FileNotFoundError:
                raise InputError(f"{part} was removed while in use; start again") from None
        return values

    def _make_dir(self) -> None:
        made = not self.path.is_dir()
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / "key.json").exists():
            write_json(self.path / "key.json", self.key)
        if made:
            fsync_dir(self.path.parent)


def _content_keys(batch: Batch) -> list[tuple[bytes, int]]:
    """(key, number of tokens) of each response, in the batch's order.

    The key is blake2b-128 over both lengths, the prompt's ids and the response's ids, and the mask
    of the scored tokens where not all of them are: only their log-probs are stored.
    """
    keys = []
    for item in batch.encoded:
        prompt = np.ascontiguousarray(item.prompt, dtype="<i4").tobytes()
        masks = item.scored or (None,) * len(item.responses)
        for response, mask in zip(item.responses, masks, strict=True):
            digest = hashlib.blake2b(digest_size=16)
            digest.update(struct.pack("<II", len(item.prompt), len(response)))
            digest.update(prompt)
            digest.update(np.ascontiguousarray(response, dtype="<i4").tobytes())
            if mask is not None:
                digest.update(np.packbits(mask).tobytes())
            keys.append((digest.digest(), len(response) if mask is None else int(mask.sum())))
    assert sum(n for _, n in keys) == len(batch.targets), "one log-prob for each scored token"
    return keys


def _folder_name(key: Mapping[str, str]) -> str:
    text = json.dumps(dict(key), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_ours(path: Path) -> bool:
    return (path / "key.json").exists() or any(path.glob("part-*.bin"))


def _read_key(file: Path) -> dict[str, str] | None:
    try:
        return dict(json.loads(file.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise InputError(
            f"{file} is damaged; delete its folder: the values will be computed again"
        ) from None


def _record(key: bytes, values: np.ndarray) -> bytes:
    payload = np.ascontiguousarray(values, dtype="<f4").tobytes()
    crc = zlib.crc32(key + struct.pack("<I", len(values)) + payload)
    return _HEADER.pack(_MAGIC, key, len(values), crc) + payload


def _parse(record: bytes) -> tuple[bytes, np.ndarray] | None:
    """(key, log-probs) of one record, None when it is not whole."""
    if len(record) < _HEADER.size:
        return None
    magic, key, n, crc = _HEADER.unpack_from(record)
    payload = record[_HEADER.size :]
    if magic != _MAGIC or len(payload) != 4 * n:
        return None
    if crc != zlib.crc32(key + struct.pack("<I", n) + payload):
        return None
    return key, np.frombuffer(payload, "<f4")


def _scan(part: Path) -> Iterator[tuple[bytes, int, int | None]]:
    """(key, offset, n) of each record of a part; n None for the incomplete one that may end it."""
    size = part.stat().st_size
    with part.open("rb", buffering=1 << 20) as file:
        offset = 0
        while offset < size:
            header = file.read(min(_HEADER.size, size - offset))
            if not header.startswith(_MAGIC[: len(header)]):
                raise _damage(part, offset)
            if len(header) < _HEADER.size:
                yield b"", offset, None
                return
            _, key, n, _ = _HEADER.unpack(header)
            left = size - offset - _HEADER.size
            payload = file.read(min(4 * n, left))
            if 4 * n > left:
                # A killed writer's last record; but with another record behind it, n is damaged.
                if _MAGIC in payload:
                    raise _damage(part, offset)
                yield b"", offset, None
                return
            if _parse(header + payload) is None:
                raise _damage(part, offset)
            yield key, offset, n
            offset += _HEADER.size + 4 * n


def _damage(part: Path, offset: int) -> InputError:
    return InputError(
        f"the cache file {part} is damaged at byte {offset}; delete it: its values will be "
        "computed again"
    )
