"""Rows out of anything that holds rows: files, folders, `datasets` objects, lists, hub ids.

Every row comes with its position ("pairs.jsonl:12"), so that whatever is wrong with it later can be
said where it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from prefopt.data.readers import (
    PACKED,
    READERS,
    Row,
    Unreadable,
    as_row,
    file_rows,
    kind_of,
    suffixes,
)
from prefopt.errors import InputError

HELD_OUT = {"test", "valid", "validation", "val", "eval", "dev"}
FIRST = 16  # rows: a source of which none of these can be read is not what it should be
NOT_DATA = {"dataset_info.json", "dataset_infos.json"}


class Rows(NamedTuple):
    """A source by name (with the split that was chosen) and its rows."""

    name: str
    rows: Iterator[Row]


def read_rows(source: Any, split: str | None = None) -> Iterator[Row]:
    """Yield (position, row) from `source`; see `open_rows`."""
    return open_rows(source, split).rows


def open_rows(source: Any, split: str | None = None) -> Rows:
    """Name and rows of a file, a folder, a `datasets` object, a hub id or an iterable of dicts.

    Without `split`, a source that has several takes its "train" one; the name says so. Raises
    InputError for what cannot be found, read or understood, naming file and line.
    """
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.is_dir():
            return _open_folder(path, split)
        if path.exists():
            _check_single(path, split)
            return Rows(str(source), _not_empty(str(source), file_rows(path, split)))
        if isinstance(source, str) and _is_hub_id(source):
            return _open_hub(source, split)
        raise InputError(_missing(path))
    if type(source).__module__.split(".")[0] == "datasets":
        return _open_dataset(source, split, "the data set")
    if type(source).__module__.split(".")[0] == "pandas" and hasattr(source, "to_dict"):
        source = source.to_dict("records")  # a DataFrame iterates over the names of its columns
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise InputError(
            f"Cannot read rows from a {type(source).__name__}: give a path, a hub id, a "
            "datasets.Dataset, a DataFrame or a list of dicts."
        )
    name = f"{type(source).__name__} of rows"
    return Rows(name, _not_empty(name, _object_rows(source)))


# --- in-memory sources and data sets -----------------------------------------------------------


def _object_rows(source: Iterable[Any]) -> Iterator[Row]:
    for index, row in enumerate(source):
        yield f"[{index}]", as_row(row)


def _open_dataset(source: Any, split: str | None, name: str) -> Rows:
    """A Dataset, IterableDataset or a dict of them."""
    if isinstance(source, Mapping):
        chosen = _pick_split(list(source), split, name)
        return _open_dataset(source[chosen], chosen, name)
    own = str(source.split) if source.split is not None else None
    if split is not None and own is not None and split != own:
        raise InputError(f"split={split!r} was asked for, but {name} is the split {own!r}.")
    label = f"{name} [{own or split}]" if own or split else name
    return Rows(label, _not_empty(label, _object_rows(source.with_format(None))))


def _pick_split(splits: list[str], split: str | None, name: str) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split is None and "train" in splits:
        return "train"
    if split in splits:
        return split
    asked = f"has no split {split!r}" if split else "has several splits"
    raise InputError(f"{name} {asked}: choose with split= one of {', '.join(splits)}.")


def _is_hub_id(source: str) -> bool:
    """`org/name` that cannot be meant as a path: no data suffix, no such parent folder."""
    return (
        re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) is not None
        and kind_of(Path(source)) is None
        and not Path(source).parent.exists()
    )


def _open_hub(source: str, split: str | None) -> Rows:
    import datasets

    try:
        loaded = datasets.load_dataset(source, split=split)
    except Exception as error:  # the hub client raises many unrelated classes
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"No file or folder {str(Path(source).absolute())!r}, and loading {source!r} from the "
            f"hub failed ({why[0]})."
        ) from error
    return _open_dataset(loaded, split, source)


# --- folders -----------------------------------------------------------------------------------


def _open_folder(folder: Path, split: str | None) -> Rows:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        import datasets

        return _open_dataset(datasets.load_from_disk(str(folder)), split, str(folder))
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and kind_of(path)
        and path.name not in NOT_DATA
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not files:
        raise InputError(f"{str(folder)!r} holds no data file ({', '.join(READERS)}).")
    if split is None:
        words = {word for path in files for word in re.findall("[a-z]+", _stem(path, folder))}
        if "train" in words and words & HELD_OUT:
            split = "train"  # never train on what is held out for want of an argument
    if split is not None:
        stems = ", ".join(_stem(path, folder) for path in files)
        files = [path for path in files if split.lower() in _stem(path, folder)]
        if not files:
            raise InputError(f"No file in {str(folder)!r} is named after {split!r}: {stems}.")
    name = f"{folder} [{split}]" if split else str(folder)
    rows = (row for path in files for row in file_rows(path, None))
    return Rows(name, _not_empty(name, rows))


def _stem(path: Path, folder: Path) -> str:
    """Path inside the folder, lower case, without the data suffixes: "data/train-00000"."""
    relative = path.relative_to(folder).as_posix().lower()
    return relative[: len(relative) - len("".join(suffixes(path)))]


# --- single files ------------------------------------------------------------------------------


def _check_single(path: Path, split: str | None) -> None:
    if kind_of(path) is None:
        raise InputError(
            f"{str(path)!r} is of no known kind: its name must end in one of {', '.join(READERS)} "
            f"(or one of these and {', '.join(sorted(PACKED))})."
        )
    in_file = kind_of(path) == ".json"
    if split not in (None, "train") and not in_file and split not in path.name.lower():
        raise InputError(
            f"split={split!r} was asked for, but {str(path)!r} is a single file: leave split out, "
            "or name the file that holds it."
        )


def _not_empty(name: str, rows: Iterator[Row]) -> Iterator[Row]:
    first: list[Row] = []
    for where, row in rows:
        first.append((where, row))
        if not isinstance(row, Unreadable):
            break
        if len(first) == FIRST:
            raise _no_rows(first)
    if not first:
        raise InputError(f"{name!r} is empty: it holds no rows.")
    if isinstance(first[-1][1], Unreadable):
        raise _no_rows(first)
    yield from first
    yield from rows


def _no_rows(unreadable: list[Row]) -> InputError:
    where, row = unreadable[0]
    reason = row.reason if isinstance(row, Unreadable) else ""
    hint = " A JSON array belongs in a .json file." if "row is list" in reason else ""
    return InputError(f"{where}: {reason}.{hint}")


def _missing(path: Path) -> str:
    message = f"No file or folder {str(path.absolute())!r}"
    parent = path.absolute().parent
    if not parent.is_dir():
        return f"{message} (the folder {str(parent)!r} does not exist either)."
    near = get_close_matches(path.name, [entry.name for entry in parent.iterdir()], n=1, cutoff=0.5)
    return f"{message}; did you mean {near[0]!r}?" if near else f"{message}."
