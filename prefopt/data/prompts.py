"""`load_prompts`: what a policy is to answer, from any source that holds prompts."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import Any

from prefopt.data.conversations import ASSISTANT, MARKER, read_messages, read_transcript
from prefopt.data.detect import SAMPLE, Columns, check_columns, nearest
from prefopt.data.dialogue_schemas import DIALOGUES, Shape, convert_rows, only_columns
from prefopt.data.files import open_rows
from prefopt.data.pair_schemas import PAIR_SCHEMAS
from prefopt.data.records import DataReport, Message
from prefopt.data.schemas import RowDict
from prefopt.data.spool import Spool
from prefopt.errors import InputError

ASKED = ("prompt", "instruction", "question", "query")  # columns that hold a prompt, best first
NAMES = (
    *(*ASKED, "input", "messages", "conversations", "text"),
    *("chosen", "rejected", "system", "source"),
)
Prompt = list[Message]


class Prompts(Spool[Prompt]):
    """Distinct prompts on a spool, read one at a time; `report` says how they came about."""

    def __init__(self, report: DataReport):
        super().__init__(report, lambda turns: [Message(*turn) for turn in turns])


def load_prompts(
    source: Any, *, split: str | None = None, columns: Columns | None = None
) -> Prompts:
    """Distinct prompts of a file, folder, hub id, `datasets` object or list (see `open_rows`).

    Read are preference rows in any schema, a `prompt`, `instruction` (with `input`), `question` or
    `query` (a text, an open Human/Assistant transcript, or a message list), conversations (up to
    where the assistant first speaks, whole if the user has the last word), the lines of a .txt
    file, and lists of texts, of message lists or of records with a prompt. `columns` maps the names
    in NAMES to the source's own and always wins (None hides a column). `.report` counts what was
    dropped, repeated prompts too. Raises InputError for what cannot be read and when none is left.
    """
    if isinstance(source, Prompts):
        return source
    if isinstance(source, Spool) or _holds_prompts(source):
        return _collect(*_of_records(source))
    if isinstance(source, list | tuple) and source and all(isinstance(s, str) for s in source):
        report = DataReport("list of str", "texts", "every text is a user turn")
        return _collect(((f"[{i}]", _asked(text)) for i, text in enumerate(source)), report)
    if isinstance(source, str | Path) and _is_text(Path(source)):
        report = DataReport(str(source), "lines of text", "every line is a user turn")
        lines = _text_lines(Path(source).expanduser())
        return _collect(((where, _asked(line)) for where, line in lines), report)
    name, rows = open_rows(source, split)
    columns = dict(columns or {})
    sample = list(islice(rows, SAMPLE))
    schema, reason = detect_prompts([row for _, row in sample], columns, name)
    report = DataReport(name, schema.name, reason)
    return _collect(convert_rows(chain(sample, rows), schema, columns, NAMES), report)


# --- which shape -------------------------------------------------------------------------------


def detect_prompts(sample: Sequence[RowDict], columns: Columns, name: str) -> tuple[Shape, str]:
    """(the first schema that reads as many of these rows as any, why).

    Raises InputError when `columns` names what is not there, and when no schema fits any row.
    """
    keys = list(dict.fromkeys(str(key) for row in sample for key in row))
    check_columns(columns, keys, name, NAMES)
    mapped = [only_columns(row, columns, NAMES) for row in sample] if columns else sample
    asked = {key for key, column in columns.items() if column is not None} & {*ASKED, "messages"}
    schemas = [s for s in PROMPTS if asked & set(s.needs)] or PROMPTS
    votes = {schema.name: sum(schema.fits(row) for row in mapped) for schema in schemas}
    most = max(votes.values())
    if most == 0:
        near = [f"{key!r}{nearest(key, NAMES)}" for key in keys]
        example = {"prompt": keys[0] if keys else "..."}
        raise InputError(
            f"The rows of {name!r} hold no prompt: found {', '.join(near) or 'no column'}; needed "
            f"is one of {', '.join(map(repr, ASKED))} (a text or a message list), 'messages', or "
            f"preference pairs; map another name with columns={example}."
        )
    schema = next(schema for schema in schemas if votes[schema.name] == most)
    looked = f"{most} of the first {len(sample)} rows" if len(sample) > 1 else "the only row"
    return schema, f"{schema.how} (so in {looked})"


def _of_pair(schema: Any) -> Shape:
    def convert(row: RowDict) -> Prompt | str:
        pair = schema.convert(row)
        return pair if isinstance(pair, str) else pair.prompt

    how = f"of preference pairs, the prompt: {schema.how}"
    return Shape(f"preference pairs, {schema.name}", schema.needs, how, schema.fits, convert)


def _of_column(key: str) -> Shape:
    def convert(row: RowDict) -> Prompt | str:
        value, below = row[key], row.get("input")
        if key == "instruction" and isinstance(value, str) and isinstance(below, str) and below:
            value = f"{value}\n\n{below}"
        return _with_system(row, _asked(value))

    how = f"{key!r} holds the prompt, a text or a message list"
    return Shape(key, (key,), how, lambda row: isinstance(row.get(key), str | list), convert)


def _of_dialogue(schema: Any) -> Shape:
    def convert(row: RowDict) -> Prompt | str:
        dialogue = schema.convert(row)
        return dialogue if isinstance(dialogue, str) else _before_the_answer(dialogue.turns)

    how = f"{schema.needs[0]!r} holds conversations; the prompt is what the assistant first answers"
    return schema._replace(how=how, convert=convert)


CONVERSATIONS = ("messages", "conversations", "transcripts")
PROMPTS: list[Shape] = [
    *map(_of_pair, PAIR_SCHEMAS),
    *map(_of_column, ASKED),
    *(_of_dialogue(schema) for schema in DIALOGUES if schema.name in CONVERSATIONS),
]


# --- one prompt --------------------------------------------------------------------------------


def _asked(value: Any) -> Prompt | str:
    """A prompt of a text, of an open transcript or of a message list."""
    if isinstance(value, str) and MARKER.match(value):
        context, marker, opening = value.rpartition(ASSISTANT)
        if marker and not opening.strip():
            return read_transcript(context)
    turns = read_messages(value, "user")
    return turns if isinstance(turns, str) else list(turns)


def _before_the_answer(turns: list[Message]) -> Prompt:
    """The turns before the assistant first speaks; all of them if the last word is not its own."""
    if not turns or turns[-1].role != "assistant":
        return turns
    return turns[: next(i for i, turn in enumerate(turns) if turn.role == "assistant")]


def _with_system(row: RowDict, prompt: Prompt | str) -> Prompt | str:
    system = row.get("system")
    if isinstance(prompt, str) or not isinstance(system, str) or not system:
        return prompt
    return prompt if prompt and prompt[0].role == "system" else [Message("system", system), *prompt]


def _obstacle(prompt: Prompt, seen: set[bytes]) -> str | None:
    """Why a prompt is not to be answered, or None; then it is one of the ``seen`` from now on."""
    if not any(turn.content.strip() for turn in prompt if turn.role != "system"):
        return "the prompt is empty"
    if prompt[-1].role == "assistant":
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


def _of_records(source: Sequence[Any]) -> tuple[Iterator[tuple[str, Any]], DataReport]:
    own: DataReport | None = getattr(source, "report", None)
    records = own is not None or hasattr(source[0], "prompt")
    kind = type(source[0]).__name__ if len(source) else "record"
    name = own.source if own else f"list of {kind}"
    how = f"the prompts of {kind} records" if records else "the items are message lists"

    def prompts() -> Iterator[tuple[str, Any]]:
        for i, item in enumerate(source):
            value = getattr(item, "prompt", item)
            turns = [m._asdict() if isinstance(m, Message) else m for m in value]
            if getattr(item, "text", None) is not None:
                yield f"[{i}]", "plain text without a prompt"
            else:
                yield f"[{i}]", read_messages(turns, "user")

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


def _collect(prompts: Iterable[tuple[str, Any]], report: DataReport) -> Prompts:
    """Spool each usable prompt once, count the rest; InputError if nothing is left."""
    out, seen = Prompts(report), set()
    for where, prompt in prompts:
        reason = prompt if isinstance(prompt, str) else _obstacle(prompt, seen)
        out.take(where, [list(prompt)] if reason is None else reason)
    out.check("prompt")
    return out
