"""`prefopt data inspect | doctor`: what is in preference data, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from prefopt.command_groups import Reading
from prefopt.command_inputs import records
from prefopt.errors import InputError


def inspect(
    reading: Reading,
    data: str = "embedded",
    split: str | None = None,
    columns: dict[str, str | None] | None = None,
    model: str = "embedded",
    max_length: int = 1024,
    template: str = "auto",
    rows: int = 2,
    row: int | None = None,
    json: str | None = None,
) -> int:
    """Show how preference data is read, its lengths, and pairs as the model sees them.

    Args:
        data: file, folder or hub id; embedded is the set in the package.
        split: which split of the data.
        columns: names of your columns.
        model: model folder or hub id whose tokenizer and chat template are used.
        max_length: most tokens of prompt and response.
        template: how conversations become text; auto, chat, transcript or plain.
        rows: how many pairs to show, from the first on.
        row: show the pairs of this row instead, by the number that doctor prints.
        json: file to write the same to as JSON; "-" prints it, and nothing else.
    """
    from prefopt.data.audit.overview import as_seen, overview
    from prefopt.data_report import show_inspection

    _check_json(json)
    if rows < 0:
        raise InputError(f"rows is {rows}; it is how many pairs to show, 0 or more")
    pairs = _pairs(data, split, columns, reading)
    options: dict[str, Any] = {"max_length": max_length, "template": template}
    tokenizer = _tokenizer(model)
    about = {
        "data": pairs.report.to_dict(),
        "columns": _column_names(data, split),
        **overview(pairs, tokenizer, **options),
    }
    shown = range(min(rows, len(pairs))) if row is None else _of_row(pairs, row)
    previews = []
    for i in shown:
        says, segments = as_seen(pairs[i], tokenizer, **options)
        previews.append({"at": pairs.where(i), "says": says, "segments": segments})
    _write_json(json, {**about, "pairs_shown": previews})
    if json != "-":
        show_inspection(about, pairs.report, previews)
    return 0


def doctor(
    reading: Reading,
    data: str = "embedded",
    split: str | None = None,
    columns: dict[str, str | None] | None = None,
    held_out: str | None = None,
    eval_fraction: float = 0.1,
    against: list[str] | str | None = None,
    model: str = "embedded",
    max_length: int = 1024,
    template: str = "auto",
    fix: str | None = None,
    force: bool = False,
    json: str | None = None,
    fail_on: Literal["error", "warning", "never"] = "error",
) -> int:
    """Find what is wrong with preference data; exit code 1 if there are errors (--fail_on).

    Args:
        data: file, folder or hub id; embedded is the set in the package.
        split: which split of the data.
        columns: names of your columns.
        held_out: file, or split of --data, whose prompts must not occur here; null takes the other
            split of --data, or the prompts that training would hold out.
        eval_fraction: share of the prompts that training holds out.
        against: benchmark file, or several as [a.jsonl, b.jsonl], whose prompts must not occur
            here.
        model: model folder or hub id whose tokenizer and chat template are used.
        max_length: most tokens of prompt and response.
        template: how conversations become text; auto, chat, transcript or plain.
        fix: file to write a cleaned copy to, as JSON lines.
        force: replace an existing file.
        json: file to write the findings to as JSON; "-" prints them, and nothing else.
        fail_on: what makes the exit code 1; after --fix, what is left of it.
    """
    from prefopt.data.audit.clean import check_target, write_pairs
    from prefopt.data.audit.doctor import examine
    from prefopt.data_report import show_diagnosis

    _check_json(json)
    target = check_target(fix, data, force) if fix is not None else None
    pairs = _pairs(data, split, columns, reading, ties="soft", empty="keep")
    diagnosis = examine(
        pairs,
        _tokenizer(model),
        max_length=max_length,
        template=template,
        ties=reading.ties,
        held_out=_held_out(held_out, pairs, data, split, columns),
        eval_fraction=eval_fraction,
        benchmarks=[_benchmark(path) for path in _several(against)],
    )
    written = write_pairs(target, pairs, diagnosis.keep, reading.ties) if target else 0
    copy = {"fix": str(target), "written": written} if target else {}
    failed = _failed(diagnosis, fail_on, fixed=target is not None)
    _write_json(json, {**diagnosis.to_dict(), **copy, "exit_code": int(failed)})
    if json != "-":
        show_diagnosis(diagnosis, str(target) if target else None, written)
    return int(failed)


# --- what they read ----------------------------------------------------------------------------


def _pairs(data: str, split: str | None, columns: Any, reading: Reading, **fixed: Any) -> Any:
    from prefopt.data.sources import load_preferences

    options = {**reading.options(), **fixed}
    return records(load_preferences, data, split, columns, quiet=True, **options)


def _tokenizer(model: str) -> Any:
    from prefopt import loading

    return loading.load_tokenizer(loading.resolve(model).base)


def _held_out(asked: str | None, pairs: Any, data: str, split: str | None, columns: Any) -> Any:
    """The prompts of --held_out, or of the first other split of --data that there is."""
    from prefopt.data.audit.leaks import HeldOut
    from prefopt.data.prompts import load_prompts

    if asked is not None and Path(asked).expanduser().exists():
        return HeldOut(asked, load_prompts(asked))
    if asked is not None:
        other = _pairs(data, asked, columns, Reading(ties="keep"))
        if other.report.source == pairs.report.source and data != "embedded":
            raise InputError(f"--held_out {asked} is what --data reads already; name another split")
        return HeldOut(asked, other)
    for name in _other_splits(pairs.report.source, split):
        try:
            return HeldOut(name, _pairs(data, name, columns, Reading(ties="keep")))
        except InputError:
            continue
    return None


def _other_splits(source: str, split: str | None) -> list[str]:
    """What held-out data beside the one that was read may be called; none beside a single file."""
    from prefopt.data.files import HELD_OUT

    read = split or ("train" if source.endswith("[train]") else "")
    return [read.replace("train", name) for name in sorted(HELD_OUT)] if "train" in read else []


def _column_names(data: str, split: str | None) -> list[str]:
    from itertools import islice

    from prefopt.command_inputs import embedded_rows
    from prefopt.data.detect import SAMPLE
    from prefopt.data.files import open_rows

    _, rows = open_rows(embedded_rows(split) if data == "embedded" else data, split)
    return list(dict.fromkeys(str(key) for _, row in islice(rows, SAMPLE) for key in row))


def _of_row(pairs: Any, row: int) -> list[int]:
    ends = (f":{row}", f" row {row}", f"[{row}]")
    found = [i for i in range(len(pairs)) if pairs.where(i).endswith(ends)]
    if not found:
        raise InputError(f"no pair is made of row {row}; `prefopt data doctor` says of which rows")
    return found


# --- what they give ----------------------------------------------------------------------------


def _failed(diagnosis: Any, fail_on: str, *, fixed: bool) -> bool:
    left = [f for f in diagnosis.findings if not (fixed and f.about.fix)]
    counted = {"error": ("error",), "warning": ("error", "warning"), "never": ()}[fail_on]
    return any(finding.severity in counted for finding in left)


def _benchmark(path: str) -> Any:
    """Its prompts; of RewardBench 2 too, whose rows hold lists of chosen and rejected responses."""
    from prefopt.data.prompts import load_prompts

    try:
        return load_prompts(path)
    except InputError as error:
        try:
            return load_prompts(path, columns={"chosen": None, "rejected": None})
        except InputError:
            raise error from None


def _several(paths: list[str] | str | None) -> list[str]:
    return [paths] if isinstance(paths, str) else list(paths or ())


def _check_json(path: str | None) -> None:
    if path not in (None, "-") and not Path(path).expanduser().parent.is_dir():
        raise InputError(f"the folder of --json {path} does not exist")


def _write_json(path: str | None, result: dict[str, Any]) -> None:
    import json

    from prefopt import durable

    if path == "-":
        print(json.dumps(result, indent=2, allow_nan=False))
    elif path is not None:
        durable.write_json(Path(path).expanduser(), result)
