"""`load_prompts`: what a policy is to answer, from any source that holds prompts."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from prefopt.data.columns import Columns, Keys, nearest
from prefopt.data.conversations import read_prompt
from prefopt.data.detect import SCHEMAS
from prefopt.data.messages import plain, read_messages
from prefopt.data.records import SPOKEN, Candidates, DataReport, Message, Pair
from prefopt.data.schemas.base import SCORED, RowDict, Schema
from prefopt.data.schemas.dialogues import DIALOGUES
from prefopt.data.sources import read_items
from prefopt.data.spool import Spool
from prefopt.errors import InputError

CALLED = ("prompts", "responses", "tokens")  # what rewards are given under these names
ASKED = ("prompt", "instruction", "question", "query")  # columns that hold a prompt, best first
Prompt = list[Message]
# Position, prompts or why there are none, other columns, rows
_Found = tuple[str, list[Any], dict[str, Any] | None, int]


class Prompts(Spool[Prompt]):
    """Distinct prompts on a spool, read one at a time; `report` says how they came about.

    With each prompt stay the other columns of its row (`answer`, say): all but those that the
    prompt, or the responses of a preference, were read from. `names` are theirs.
    """

    def __init__(self, report: DataReport):
        super().__init__(report, lambda fields: [Message(*turn) for turn in fields[0]])
        self.names: dict[str, None] = {}  # a set that keeps its order

    def columns(self, index: int) -> dict[str, Any]:
        """The other columns of the row that a prompt was read from, {} of what was no row."""
        return json.loads(self._read(index)[1][1])

    def put(self, where: str, prompts: list[Prompt] | str, rest: RowDict | None, rows: int) -> None:
        """`take` prompts of rows with these other columns."""
        rest = {key: value for key, value in (rest or {}).items() if key not in CALLED}
        if isinstance(prompts, str):
            self.take(where, prompts, rows)
            return
        kept = {key: value for key, value in rest.items() if _as_text(value) is not None}
        self.take(where, [[prompt, _as_text(kept)] for prompt in prompts], rows)
        self.names |= dict.fromkeys(kept)


def columns_of(prompts: Sequence[Prompt], places: Sequence[int]) -> dict[str, list[Any]]:
    """The other columns of the rows that prompts at these places came from, a value each; None
    where a row has none. {} of prompts that did not come from rows."""
    if not isinstance(prompts, Prompts):
        return {}
    rows = [prompts.columns(place) for place in places]
    return {name: [row.get(name) for row in rows] for name in prompts.names}


def _as_text(value: Any) -> str | None:
    """A column as JSON, None where it cannot be: that is no reason to leave the prompt out. As
    ASCII, for the sake of half a surrogate pair."""
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        return json.dumps(value, default=_plainly)
    return None


def _plainly(value: Any) -> Any:
    """What JSON has for values it does not know: lists for arrays, else text."""
    new = plain(value)
    return str(value) if new is value else new


def load_prompts(
    source: Any, *, split: str | None = None, columns: Columns | None = None
) -> Prompts:
    """Distinct prompts of a file, folder, hub id, `datasets` object or list (see `open_rows`).

    Read are preference rows in any schema, a `prompt`, `instruction` (with `input`), `question` or
    `query` (a text, an open Human/Assistant transcript, or a message list), conversations (up to
    where the assistant first speaks, whole if the user has the last word), the lines of a .txt
    file, and lists of texts, of message lists or of records with a prompt. `columns` maps these
    names to the source's own and always wins (None hides a column). `.report` counts what was
    dropped, repeated prompts too. The other columns of a row stay with its prompt, of the first row
    where several ask the same. Raises InputError for what cannot be read and when none is left.
    """
    if isinstance(source, Prompts):
        return source
    if isinstance(source, Spool) or _holds_prompts(source):
        return _collect(*_of_records(source))
    if isinstance(source, list | tuple) and source and all(isinstance(s, str) for s in source):
        report = DataReport("list of str", "texts", "every text is a user turn")
        texts = ((f"[{i}]", [_asked(text)], None, 1) for i, text in enumerate(source))
        return _collect(texts, report)
    if isinstance(source, str | Path) and _is_text(Path(source)):
        report = DataReport(str(source), "lines of text", "every line is a user turn")
        lines = _text_lines(Path(source).expanduser())
        return _collect(((where, [_asked(line)], None, 1) for where, line in lines), report)
    report, items = read_items(source, split, columns, PROMPTS, _nothing_fits)
    found = ((item.where, _of_item(item.record), item.rest, item.rows) for item in items)
    return _collect(found, report)


# --- which shape -------------------------------------------------------------------------------


def _nothing_fits(sample: Sequence[RowDict], columns: Columns, keys: Keys, name: str) -> str:
    known = {key for schema in PROMPTS for key in schema.needs}
    near = [f"{key!r}{nearest(key, sorted(known))}" for key in keys]
    example = {"prompt": next(iter(keys), "...")}
    return (
        f"The rows of {name!r} hold no prompt: found {', '.join(near) or 'no column'}; needed "
        f"is one of {', '.join(map(repr, ASKED))} (a text or a message list), 'messages', or "
        f"preference pairs; map another name with columns={example}."
    )


def _of_preference(schema: Schema) -> Schema:
    how = f"of preference pairs, the prompt: {schema.how}"
    return schema._replace(name=f"preference pairs, {schema.name}", how=how)


def _of_column(place: int, key: str) -> Schema:
    def convert(row: RowDict) -> Prompt | str:
        value, below = row[key], row.get("input")
        if key == "instruction" and isinstance(value, str) and isinstance(below, str) and below:
            value = f"{value}\n\n{below}"
        return _asked(value, row.get("system"), row.get("tools"))

    how = f"{key!r} holds the prompt, a text or a message list"
    names = {key: (), "input": (), "system": ("system", "system_prompt"), "tools": ()}
    fits: Callable[[RowDict], bool] = lambda row: isinstance(row.get(key), str | list)  # noqa: E731
    return Schema(key, COLUMN + place, names, (key,), how, fits, convert)


def _of_dialogue(schema: Schema) -> Schema:
    def convert(row: RowDict) -> Prompt | str:
        dialogue = schema.convert(row)
        return dialogue if isinstance(dialogue, str) else _before_the_answer(dialogue.turns)

    how = f"{schema.needs[0]!r} holds conversations; the prompt is what the assistant first answers"
    return schema._replace(how=how, level=TALK, convert=convert, refuse=None)


# Levels, behind those of preferences: every row with a prompt counts, not only those whose
# responses can be compared, so rows of single responses are read for their prompt alone.
COLUMN, TALK = 10, 20
CONVERSATIONS = ("messages", "conversations", "transcripts")
PROMPTS: list[Schema] = [
    *(_of_preference(schema) for schema in SCHEMAS if schema.level < SCORED),
    *(_of_column(place, key) for place, key in enumerate(ASKED)),
    *(_of_dialogue(schema) for schema in DIALOGUES if schema.name in CONVERSATIONS),
]


def _of_item(record: Any) -> list[Any]:
    """The prompts of a record, or of several, or why there is none."""
    several = isinstance(record, list) and record and isinstance(record[0], Candidates)
    records = record if several else [record]
    return [one.prompt if isinstance(one, Pair | Candidates) else one for one in records]


# --- one prompt --------------------------------------------------------------------------------


def _asked(value: Any, system: Any = None, tools: Any = None) -> Prompt | str:
    """A prompt of a text, of an open transcript or of a message list."""
    read = read_prompt(value, system, tools)
    return read if isinstance(read, str) else read[0]


def _before_the_answer(turns: list[Message]) -> Prompt:
    """The turns before the assistant first speaks; all of them if the last word is not its own."""
    if not turns or turns[-1].role not in SPOKEN:
        return turns
    return turns[: next(i for i, turn in enumerate(turns) if turn.role in SPOKEN)]


def _obstacle(prompt: Prompt, seen: set[bytes]) -> str | None:
    """Why a prompt is not to be answered, or None; then it is one of the ``seen`` from now on."""
    if not any(turn.content.strip() for turn in prompt if turn.role not in ("system", "tools")):
        return "the prompt is empty"
    if prompt[-1].role in SPOKEN:
        return "the prompt ends with an assistant turn"
    try:
        digest = blake2b(json.dumps(prompt, ensure_ascii=False).encode()).digest()
    except UnicodeEncodeError:
        return "text that is not valid Unicode (half a surrogate pair)"
    if digest in seen:
        return "the same prompt as an earlier one"
    seen.add(digest)
    return None


# --- lists, lines, and what is kept ------------------------------------------------------------


def _holds_prompts(source: Any) -> bool:
    """A sequence of records with a prompt, or of message lists."""
    if isinstance(source, str | Path | Mapping) or not isinstance(source, Sequence) or not source:
        return False
    return isinstance(source[0], list | tuple) or hasattr(source[0], "prompt")


def _of_records(source: Sequence[Any]) -> tuple[Iterator[_Found], DataReport]:
    own: DataReport | None = getattr(source, "report", None)
    records = own is not None or hasattr(source[0], "prompt")
    kind = type(source[0]).__name__ if len(source) else "record"
    name = own.source if own else f"list of {kind}"
    how = f"the prompts of {kind} records" if records else "the items are message lists"

    def prompts() -> Iterator[_Found]:
        for i, item in enumerate(source):
            value = getattr(item, "prompt", item)
            turns = [m._asdict() if isinstance(m, Message) else m for m in value]
            if getattr(item, "text", None) is not None:
                yield f"[{i}]", ["plain text without a prompt"], None, 1
            else:
                yield f"[{i}]", [read_messages(turns, "user")], None, 1

    return prompts(), DataReport(name, "records" if records else "message lists", how)


def _is_text(path: Path) -> bool:
    return path.name.lower().endswith((".txt", ".txt.gz")) and path.expanduser().is_file()


def _text_lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a text file that are not blank, with their position."""
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{str(path)!r} is not valid UTF-8 ({error.reason}).") from error
    except (OSError, EOFError) as error:
        raise InputError(f"Cannot read {str(path)!r} ({error}).") from error


def _collect(asked: Iterable[_Found], report: DataReport) -> Prompts:
    """Spool each usable prompt once, count the rest; InputError if nothing is left."""
    out, seen = Prompts(report), set[bytes]()
    for where, prompts, rest, rows in asked:
        why = [one if isinstance(one, str) else _obstacle(one, seen) for one in prompts]
        kept = [list(one) for one, reason in zip(prompts, why, strict=True) if reason is None]
        out.put(where, kept or str(why[0]), rest, rows)
    out.check("prompt")
    return out
