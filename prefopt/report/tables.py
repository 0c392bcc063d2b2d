"""The tables of the page: evaluation, samples side by side, what became of the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefopt.metrics import format_duration
from prefopt.report.record import Row, RunRecord, number

MISSING = "not recorded"
QUANTILES = ("0.05", "0.95")
Show = Callable[[float], str]


def evaluation_rows(run: RunRecord) -> list[tuple[str, str, str]]:
    """(what, before, after) of `evaluation.json`."""
    stages = [run.evaluation.get(stage) for stage in ("before", "after")]
    column = _likelihood_column if run.kind == "sft" else _evaluation_column
    before, after = (column(row if isinstance(row, dict) else {}) for row in stages)
    if not any(isinstance(row, dict) and row for row in stages):
        return []
    return [(name, before.get(name, "–"), after.get(name, "–")) for name in before | after]


def _cell(row: Row, show: Show, key: str, low: str = "", high: str = "") -> str:
    value, least, most = (number(row.get(name)) for name in (key, low, high))
    return "–" if value is None else show(value) + interval(least, most, show)


def _likelihood_column(row: Row) -> dict[str, str]:
    return {
        "Dialogues": _cell(row, _count, "n"),
        "Tokens": _cell(row, _count, "tokens"),
        "Loss, nats per token": _cell(row, signed, "loss"),
        "Perplexity (95% interval)": _cell(
            row, signed, "perplexity", "perplexity_low", "perplexity_high"
        ),
    }


def _evaluation_column(row: Row) -> dict[str, str]:
    def cell(show: Show, key: str, low: str = "", high: str = "") -> str:
        return _cell(row, show, key, low, high)

    column = {
        "Pairs": cell(_count, "n"),
        "Different prompts": cell(_count, "prompts"),
        "Accuracy (95% interval)": cell(percent, "accuracy", "accuracy_low", "accuracy_high"),
        "Ties (counted as wrong)": cell(_count, "ties"),
        "Accuracy where the chosen answer is longer": cell(percent, "accuracy_chosen_longer"),
        "Accuracy where it is shorter": cell(percent, "accuracy_chosen_shorter"),
        "Margin, mean (95% interval)": cell(signed, "margin_mean", "margin_low", "margin_high"),
        "Margin, median": cell(signed, "margin_median"),
        "Margin, middle 90% of pairs": "–",
    }
    spread = row.get("margin_quantiles")
    low, high = (number(spread.get(q)) if isinstance(spread, dict) else None for q in QUANTILES)
    if low is not None and high is not None:
        column["Margin, middle 90% of pairs"] = f"{signed(low)} to {signed(high)}"
    told = row.get("calibration")
    if isinstance(told, dict):
        column["Calibration error (ECE)"] = _cell(told, percent, "ece")
        column["Log loss (a coin: 0.693)"] = _cell(told, signed, "log_loss")
    parts = row.get("sources")
    for name, part in (parts if isinstance(parts, dict) else {}).items():
        column[f"Accuracy on {name}"] = _cell(
            part, percent, "accuracy", "accuracy_low", "accuracy_high"
        )
    if row.get("ties") and row.get("ties") == row.get("n"):  # 0% right would read as all wrong
        for name in column:
            if name.startswith(("Accuracy", "Calibration")):
                column[name] = "every pair a tie"
    return column


def stage_rows(run: RunRecord) -> list[tuple[str, str, str]]:
    """(stage, time, what came of it) of `stages.jsonl`."""
    rows = []
    for row in run.stages:
        seconds = number(row.get("seconds"))
        time = "" if seconds is None else format_duration(seconds)
        rows.append((words(row.get("stage")), time, words(row.get("result"))))
    return rows


def sample_pairs(run: RunRecord) -> list[dict[str, Any]]:
    """Per prompt, in order: {"prompt", "before", "after", "between": [...]}, each a sample or None.

    Samples are told apart by `stage`; where nothing is called before or after, the first and the
    last step stand in.
    """
    named = any(sample.get("stage") in ("before", "after") for sample in run.samples)
    steps = [number(sample.get("step")) or 0 for sample in run.samples]
    first, last = min(steps, default=0), max(steps, default=0)
    groups: dict[str, dict[str, Any]] = {}
    for sample, step in zip(run.samples, steps, strict=True):
        prompt = words(sample.get("prompt"))
        empty = {"prompt": prompt, "before": None, "after": None, "between": []}
        group = groups.setdefault(prompt, empty)
        shown = {
            "response": words(sample.get("response")),
            "finish": {"length": "cut at the length limit"}.get(words(sample.get("finish")), ""),
            "step": f"{step:.0f}",
        }
        place = sample.get("stage") if named else {first: "before", last: "after"}.get(step)
        if place in ("before", "after"):
            group[place] = shown
        else:
            group["between"].append(shown)
    return list(groups.values())


def data_tables(data: Row) -> dict[str, Any]:
    """How the data was understood, and what became of the rows; {} when nothing was recorded."""
    if not data:
        return {}
    rows, kept = number(data.get("rows")), number(data.get("kept"))
    dropped, where = (
        value if isinstance(value, dict) else {}
        for value in (data.get("dropped"), data.get("dropped_at"))
    )
    reasons = []
    for reason, count in sorted(dropped.items(), key=lambda item: -(number(item[1]) or 0)):
        amount = number(count) or 0
        share = f"{amount / rows:.1%}" if rows else ""
        reasons.append((reason, f"{amount:,.0f}", share, words(where.get(reason, ""))))
    schema, why = words(data.get("schema")), words(data.get("reason"))
    notes = data.get("notes")
    known = {"source", "schema", "reason", "rows", "kept", "dropped", "dropped_at", "notes"}
    known |= {"objective", "unit"}
    facts = [
        ("Source", words(data.get("source")) or MISSING),
        ("Read as", f"{schema}: {why}" if why else schema or MISSING),
        ("Rows read", MISSING if rows is None else f"{rows:,.0f}"),
        ("Rows kept", MISSING if kept is None else f"{kept:,.0f}"),
    ]
    others = [(name, value) for name, value in data.items() if name not in known]
    counts = [(name, value) for name, value in others if not isinstance(value, dict)]
    counts += [pair for _, value in others if isinstance(value, dict) for pair in value.items()]
    return {
        "facts": facts,
        "reasons": reasons,
        "encoding": [(words(name).replace("_", " "), _plain(value)) for name, value in counts],
        "notes": [words(note) for note in notes] if isinstance(notes, list) else [],
    }


def _plain(value: Any) -> str:
    amount = number(value)
    return words(value) if amount is None else f"{amount:,.6g}"


def words(value: Any) -> str:
    """Text of a cell; nothing for what is not there."""
    return "" if value is None else str(value)


def interval(low: float | None, high: float | None, show: Show, name: str = "") -> str:
    """The words " (0.1 to 0.3)", or nothing where no interval was recorded."""
    return "" if low is None or high is None else f" ({name}{show(low)} to {show(high)})"


def percent(value: float) -> str:
    """0.608 -> "60.8%"."""
    return f"{value:.1%}"


def signed(value: float) -> str:
    """-0.2 -> "−0.200", with a true minus sign; what rounds to 0 has none."""
    return f"{round(value, 3) + 0.0:.3f}".replace("-", "−")


def _count(value: float) -> str:
    return f"{value:,.0f}"
