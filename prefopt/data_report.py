"""What `prefopt data inspect` and `prefopt data doctor` print."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

COLOURS = {"error": "bold red", "warning": "yellow", "info": "cyan"}
SEGMENTS = {
    "prompt": "dim",
    "chosen": "green",
    "rejected": "red",
    "eos": "bold magenta",
    "cut off": "red strike",
}
SHOWN = 2000  # characters of one segment
BAR = 14  # characters


def console() -> Any:
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


def columns(*kinds: str) -> Any:
    """A table without lines; a column is "text" (wraps), "label" or "number" (do not)."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0), expand="text" in kinds)
    for kind in kinds:
        if kind == "text":
            table.add_column(ratio=1, overflow="fold")
        else:
            table.add_column(no_wrap=True, justify="right" if kind == "number" else "left")
    return table


def show_source(screen: Any, report: Any, reasons: int) -> None:
    """How the rows were read, and so many of the reasons why some were not."""
    from rich.text import Text

    told, dropped = report.lines(), len(report.dropped)
    lines = [*told[: 2 + min(reasons, dropped)], *told[2 + dropped :]]
    if 0 < reasons < dropped:
        lines.append(f"and {dropped - reasons} other reasons")
    for line in lines:
        screen.print(Text(safe(line)))


# --- doctor ------------------------------------------------------------------------------------


def show_diagnosis(diagnosis: Any, fixed: str | None, written: int) -> None:
    """The findings, worst first; `fixed`: where the cleaned copy of `written` pairs is."""
    from rich.text import Text

    screen = console()
    show_source(screen, diagnosis.report, reasons=0)  # they are findings
    screen.print(Text(f"template {diagnosis.template}"))
    screen.print(Text(f"held out: {safe(diagnosis.held_out)}"))
    screen.print()
    table = columns("label", "text", "number", "number")
    for finding in diagnosis.findings:
        share = f"{finding.count / finding.total:.1%}" if finding.total else ""
        title = Text(finding.check, style="bold")
        severity = Text(finding.severity, style=COLOURS[finding.severity])
        table.add_row(severity, title, Text(f"{finding.count:,}", style="bold"), Text(share))
        for line in _explained(finding, diagnosis.report.source, fixed):
            table.add_row("", line)
    screen.print(table)
    if diagnosis.clean:
        screen.print()
        screen.print(Text(f"nothing found: {', '.join(diagnosis.clean)}", style="dim"))
    screen.print()
    if fixed:
        whole = len(diagnosis.keep)
        screen.print(Text(f"wrote {written:,} of {whole:,} pairs to {safe(fixed)}"))
    screen.print(_verdict(diagnosis, fixed))


def _explained(finding: Any, source: str, fixed: str | None) -> Iterable[Any]:
    from rich.text import Text

    yield Text(finding.about.says)
    if finding.detail:
        yield Text(safe(finding.detail))
    if finding.examples:
        more = " ..." if finding.count > len(finding.examples) else ""
        at = ", ".join(short(position, source) for position in finding.examples)
        yield Text(f"rows {at}{more}", style="dim")
    if fixed:
        left = finding.count - finding.dropped
        says = [f"{finding.dropped:,} dropped"] if finding.dropped else []
        if left and finding.severity != "info":
            says.append(f"{left:,} left as they are")
        if says:
            yield Text(f"--fix: {', '.join(says)}", style="green" if finding.dropped else "dim")


def _verdict(diagnosis: Any, fixed: str | None) -> Any:
    from rich.text import Text

    errors, warnings = diagnosis.count("error"), diagnosis.count("warning")
    found = f"{_many(errors, 'error')}, {_many(warnings, 'warning')}"
    left = len(diagnosis.unmended())
    gone = int((~diagnosis.keep).sum())
    if errors and fixed:
        end = f"{_many(left, 'error')} left in the copy" if left else "no error left in the copy"
    elif errors:
        end = "look at them before training"
        end += f"; --fix OUT.jsonl writes a copy without {_many(gone, 'pair')}" if gone else ""
    else:
        end = ""
    bad = left if fixed else errors
    style = "bold red" if bad else "bold yellow" if warnings else "bold green"
    return Text(f"verdict: {found}{': ' if end else ''}{end}", style=style)


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count > 1)}" if count else f"no {what}"


# --- inspect -----------------------------------------------------------------------------------


def show_inspection(about: dict[str, Any], report: Any, previews: Sequence[dict]) -> None:
    """What `data_commands.inspect` gathered, as text and bars."""
    from rich.text import Text

    screen = console()
    show_source(screen, report, reasons=6)
    screen.print(Text(f"columns: {safe(', '.join(about['columns']))}"))
    for name in ("sources", "encoding"):
        if about[name]:
            parts = (f"{safe(str(key))} {count:,}" for key, count in about[name].items())
            screen.print(Text(f"{name}: {', '.join(parts)}"))
    screen.print(Text(f"template {about['template']}"))
    for name in ("margins", "preferences"):
        if about[name]:
            parts = (f"{key} {value:,.4g}" for key, value in about[name].items())
            screen.print(Text(f"{name}: {', '.join(parts)}"))
    screen.print()
    _show_lengths(screen, about["lengths"])
    screen.print()
    _show_histogram(screen, about["histogram"])
    for shown in previews:
        screen.print()
        _show_preview(screen, shown)


def _show_lengths(screen: Any, lengths: dict[str, dict[str, dict[str, float]]]) -> None:
    from rich.text import Text

    stats = list(next(iter(lengths["characters"].values())))
    table = columns("label", *("number" for _ in stats))
    for unit, sides in lengths.items():
        table.add_row(Text(unit, style="bold"), *(Text(stat, style="dim") for stat in stats))
        for side, values in sides.items():
            table.add_row(f"  {side}", *(f"{value:,.0f}" for value in values.values()))
    screen.print(table)


def _show_histogram(screen: Any, histogram: dict[str, Any]) -> None:
    """Bars of how many pairs have so many tokens; one column a side."""
    from rich.text import Text

    sides = histogram["counts"]
    table = columns("label", *("label", "number") * len(sides))
    heads = (Text(text, style="bold") for side in sides for text in (side, ""))
    table.add_row(Text("tokens", style="bold"), *heads)
    most = max((max(counts) for counts in sides.values()), default=0) or 1
    for i, label in enumerate(histogram["bins"]):
        cells = []
        for side, counts in sides.items():
            bar = "█" * -(-BAR * counts[i] // most)
            cells += [Text(f"{bar:<{BAR}}", style=SEGMENTS[side]), f"{counts[i]:,}"]
        table.add_row(label, *cells)
    screen.print(table)


def _show_preview(screen: Any, shown: dict[str, Any]) -> None:
    from rich.text import Text

    screen.print(Text(f"{short(shown['at'])}: {shown['says']}", style="bold"))
    table = columns("label", "text")
    for kind, text in shown["segments"]:
        label = Text(kind, style=SEGMENTS[kind].removesuffix(" strike"))
        table.add_row(label, Text(visible(text), style=SEGMENTS[kind]))
    screen.print(table)


# --- text --------------------------------------------------------------------------------------


def short(position: str, source: str = "") -> str:
    """A position, and others within it, without the folders; of the source only the number."""
    if source:
        position = re.sub(rf"{re.escape(source)}(?::| row )(?=\d)", "", position)
    return safe(re.sub(r"[^\s()]*/(?=[^\s/])", "", position))


def safe(text: str) -> str:
    """One line of text from a file, without what a terminal would obey."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def visible(text: str) -> str:
    """A segment with its line breaks shown and kept, the middle of a long one left out."""
    if len(text) > SHOWN:
        left_out = len(text) - SHOWN
        text = f"{text[: SHOWN // 2]} [... {left_out:,} characters ...] {text[-SHOWN // 2 :]}"
    return "\n".join(map(safe, text.replace("\n", "\\n\n").split("\n")))
