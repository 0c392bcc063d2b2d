"""A cleaned copy of preference pairs, which load_preferences and other libraries read."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.data.records import Pair
from prefopt.errors import InputError


def check_target(
    path: str | os.PathLike[str], source: str, force: bool, flag: str = "--fix"
) -> Path:
    """The file to write; InputError unless it is a new .jsonl file, or with `force` an old one, in
    a folder that there is, and not the source itself."""
    target = Path(path).expanduser()
    if target.suffix != ".jsonl":
        raise InputError(f"{flag} writes JSON lines: {str(target)!r} must end in .jsonl.")
    if not target.parent.is_dir():
        raise InputError(f"the folder {str(target.parent)!r} of {flag} does not exist")
    origin = Path(source).expanduser()
    if target.exists():
        if origin.exists() and (target.samefile(origin) or origin in target.parents):
            raise InputError(f"{flag} never writes over its source {str(target)!r}")
        if target.is_dir():
            raise InputError(f"{flag} {str(target)!r} is a folder; name a file")
        if not force:
            raise InputError(f"{str(target)!r} exists; --force replaces it")
    return target


def write_pairs(target: Path, pairs: Sequence[Pair], keep: np.ndarray, ties: str) -> int:
    """Write the pairs of `keep` [n] bool as JSON lines, whole or not at all; returns how many.

    `ties`: what becomes of the ties among them, as for load_preferences.
    """
    from prefopt import durable

    if not keep.any():
        raise InputError("nothing would be left, so --fix writes nothing")
    with durable.replacing(target) as fd:
        for i in np.flatnonzero(keep).tolist():
            line = json.dumps(pair_row(pairs[i], ties), ensure_ascii=False)
            durable.write_all(fd, line.encode() + b"\n")
    return int(keep.sum())


def pair_row(pair: Pair, ties: str = "soft") -> dict[str, Any]:
    """A pair as load_preferences and TRL read it: message lists, and what else is known."""
    sides = ("prompt", "chosen", "rejected")
    row: dict[str, Any] = {
        side: [{"role": m.role, "content": m.content} for m in getattr(pair, side)]
        for side in sides
    }
    for name in ("margin", "source"):
        if getattr(pair, name) is not None:
            row[name] = getattr(pair, name)
    if pair.preference != 1 and not (pair.preference == 0.5 and ties == "keep"):
        row["preference"] = pair.preference
    return row
