"""Encoded chunks on disk, found again by their content.

    dir/<2 hex>/<30 hex>.tokens    magic [4] crc32 [u32], then of all that follows:
                                   n [u32], n bytes of JSON (rows, prompts, counts, bytes), records

The name is a hash of what the chunk is made of: the records' own content, the tokenizer (all of
its file, its template, the versions of what runs them), the recipe and the rules' version. So rows
that are added at the end leave the earlier chunks as they are, and a run that was killed goes on
where it stopped. A damaged file is as good as none; what cannot be written is not kept.
"""

from __future__ import annotations

import json
import logging
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from datetime import date
from hashlib import blake2b
from pathlib import Path
from typing import Any

from prefopt import durable
from prefopt.data.recipe import Chunk, Encode, Recipe

RULES = 1  # to be raised by every change of what is encoded
_MAGIC = b"PTK1"
_log = logging.getLogger("prefopt")


class TokenCache:
    """The chunks that one tokenizer and recipe make; `key` is what the names begin from."""

    def __init__(self, dir: Path, key: bytes):
        self.dir, self.key, self.full = dir, key, False

    def name(self, records: Sequence[Any]) -> Path:
        """Where the chunk of these records is kept."""
        digest = blake2b(self.key, digest_size=16)
        for record in records:
            digest.update(json.dumps(record, default=_fields).encode() + b"\n")
        name = digest.hexdigest()
        return self.dir / name[:2] / f"{name[2:]}.tokens"

    def read(self, path: Path) -> Chunk | None:
        """The chunk, or None where it is not there whole."""
        try:
            data = path.read_bytes()
        except OSError:
            return None
        chunk = _unpacked(data)
        if chunk is None:
            _log.warning("%s is damaged; its rows are encoded again", path)
        return chunk

    def write(self, path: Path, chunk: Chunk) -> None:
        """Keep the chunk; where that cannot be done, say so once."""
        if self.full:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            durable.write_bytes(path, _packed(chunk))
        except OSError as error:
            self.full = True
            _log.warning("tokens are not kept in %s: %s", self.dir, error)


def open_cache(dir: Path, tokenizer: Any, recipe: Recipe, encode: Encode) -> TokenCache | None:
    """None for a tokenizer that no file describes wholly: one that is written in Python."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    what = [RULES, encode.__module__, recipe, identity(tokenizer)]
    return TokenCache(Path(dir), blake2b(json.dumps(what).encode()).digest())


def identity(tokenizer: Any) -> list[Any]:
    """All that the ids and texts of a tokenizer depend on."""
    import jinja2
    import tokenizers
    import transformers

    core = tokenizer.backend_tokenizer
    if core.padding or core.truncation:  # which encoding turns off
        core = tokenizers.Tokenizer.from_str(core.to_str())
        core.no_padding()
        core.no_truncation()
    written = core.to_str().encode()
    template = tokenizer.chat_template
    today = date.today().isoformat() if "strftime_now" in str(template) else None
    kind = type(tokenizer)
    return [
        blake2b(written, digest_size=16).hexdigest(),
        [
            kind.__module__,
            kind.__qualname__,
            bool(getattr(tokenizer, "split_special_tokens", False)),
        ],
        [template, today, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id],
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        [transformers.__version__, tokenizers.__version__, jinja2.__version__],
    ]


def _fields(value: Any) -> Any:
    """A record's fields, or what JSON has no word for, such as numpy's numbers."""
    return vars(value) if hasattr(value, "__dict__") else repr(value)


def _packed(chunk: Chunk) -> bytes:
    head = {
        "rows": chunk.rows,
        "prompts": chunk.prompts,
        "counts": {key: int(n) for key, n in chunk.counts.items()},
        "bytes": [len(record) for record in chunk.records],
    }
    text = json.dumps(head).encode()
    body = b"".join([struct.pack("<I", len(text)), text, *chunk.records])
    return _MAGIC + struct.pack("<I", zlib.crc32(body)) + body


def _unpacked(data: bytes) -> Chunk | None:
    if len(data) < 12 or data[:4] != _MAGIC:
        return None
    crc, size = struct.unpack_from("<II", data, 4)
    if crc != zlib.crc32(memoryview(data)[8:]):
        return None
    head, records, at = json.loads(data[12 : 12 + size]), [], 12 + size
    for length in head["bytes"]:
        records.append(data[at : at + length])
        at += length
    return Chunk(head["rows"], records, head["prompts"], Counter(head["counts"]))
