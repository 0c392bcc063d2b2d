"""The live table of an online run: its last updates, and beneath them what is going on now."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TextIO

from prefopt.metrics import PLAIN_SECONDS, REDRAW_SECONDS, format_count, format_duration

ROWS = 8  # updates on the screen, and those whose time says how much is left
Row = Mapping[str, Any]


class Column(NamedTuple):
    """`key`: the metric without which the column is not shown; the higher `rank`, the sooner it
    goes where the screen is narrow; `word`: what stands before the value in a plain line."""

    title: str
    key: str
    rank: int
    show: Callable[[Row], str]
    word: str


class OnlineTable:
    """The last updates on stderr, refreshed in place, and the phase of the current one beneath.

    Where stderr is no terminal it prints a plain line an update, but none sooner than ten seconds
    after the one before, except for the last update; `quiet` prints nothing. Time left counts the
    time spent inside phases other than "evaluate", over the last updates.

        with OnlineTable(total=200) as table:
            table.phase("generate", 64)       # 64 samples
            table.update(12)                  # "generate 12/64"
            table.phase("train", 4)
            table.update(1)
            table.row(row)                    # an update is over: its row of metrics.jsonl
            table.say("Responses got longer: ...")   # above the table

    A resumed run says at which update it starts. `update` takes a second argument and drops it, so
    that a table stands in for `Progress`.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        quiet: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._step, self._quiet = total, start, quiet
        self._stream, self._clock = stream or sys.stderr, clock
        self._live: Any = None
        self._rows: deque[dict[str, Any]] = deque(maxlen=ROWS)
        self._name, self._done, self._of = "", None, None
        self._since = clock()
        self._busy = 0.0  # seconds in phases of the current update
        self._times: deque[float] = deque(maxlen=ROWS)
        self._shown = -math.inf

    def __enter__(self) -> OnlineTable:
        if not self._quiet and self._stream.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._stream, highlight=False)
            self._live = Live(console=console, auto_refresh=False)  # no second thread
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._name = ""
            self._draw(at_once=True)
            self._live.stop()
            self._live = None

    def phase(self, name: str, total: int | None = None) -> None:
        """What begins now: so many samples, batches, epochs (None: not known)."""
        self._account()
        self._name, self._done, self._of = name, None, total
        self._draw()

    def update(self, done: int, metrics: Row | None = None) -> None:
        """How far the phase is."""
        self._done = done
        self._draw()

    def row(self, row: Row) -> None:
        """An update is over; `row` has its `step`, and whatever else was measured."""
        self._account()
        self._times.append(self._busy)
        self._busy = 0.0
        self._rows.append(dict(row))
        self._step = row["step"]
        self._name = ""
        if self._live is not None:
            self._draw(at_once=True)
        elif not self._quiet:
            self._print_row()

    def say(self, text: str) -> None:
        """A line above the table."""
        if self._live is not None:
            self._live.console.print(text, style="yellow", markup=False)
        elif not self._quiet:
            print(text, file=self._stream, flush=True)

    def _account(self) -> None:
        now = self._clock()
        if self._name and self._name != "evaluate":
            self._busy += now - self._since
        self._since = now

    def _print_row(self) -> None:
        now, row = self._clock(), self._rows[-1]
        if now - self._shown < PLAIN_SECONDS and row["step"] < self._total:
            return
        cells = [f"{column.word}{column.show(row)}" for column in _present([row])[1:]]
        line = "  ".join([f"update {row['step']}/{self._total}", *cells, *self._left()])
        print(line, file=self._stream, flush=True)
        self._shown = now

    def _left(self) -> list[str]:
        if not any(self._times) or self._step >= self._total:
            return []
        seconds = (self._total - self._step) * sum(self._times) / len(self._times)
        return [f"{format_duration(seconds)} left"]

    def _draw(self, at_once: bool = False) -> None:
        now = self._clock()
        if self._live is None or (now - self._shown < REDRAW_SECONDS and not at_once):
            return
        from rich.console import Group
        from rich.text import Text

        beneath = Text("  ".join([*self._now(), *self._left()]), no_wrap=True, overflow="ellipsis")
        width = self._live.console.width
        shown = [_table(list(self._rows), width, self._total)] if self._rows else []
        self._live.update(Group(*shown, beneath), refresh=True)
        self._shown = now

    def _now(self) -> list[str]:
        if not self._name:
            return []
        step = min(self._step + 1, self._total)
        of = "" if self._of is None else f"/{self._of}"
        far = "" if self._done is None else f" {self._done}{of}"
        return [f"update {step}/{self._total}: {self._name}{far}"]


def _present(rows: list[dict[str, Any]]) -> list[Column]:
    return [column for column in COLUMNS if any(_number(row, column.key) for row in rows)]


def _table(rows: list[dict[str, Any]], width: int, total: int) -> Any:
    from rich.table import Table

    columns = _present(rows)
    cells = {c: [c.show(row) if _number(row, c.key) else "" for row in rows] for c in columns}
    cells[COLUMNS[0]][-1] += f"/{total}"

    def wide(column: Column) -> int:
        return max(len(text) for text in (column.title, *cells[column])) + 2

    while len(columns) > 1 and sum(map(wide, columns)) - 1 > width:
        columns.remove(max(columns, key=lambda column: column.rank))
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in columns:
        table.add_column(column.title, justify="right", no_wrap=True, header_style="bold cyan")
    for i in range(len(rows)):
        style = "bold" if i == len(rows) - 1 else "dim"
        table.add_row(*(cells[column][i] for column in columns), style=style)
    return table


def _number(row: Row, key: str) -> bool:
    value = row.get(key)
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(key: str, form: str, as_: Callable[[float], Any] = float) -> Callable[[Row], str]:
    return lambda row: form.format(as_(row[key])).replace("nan", "?")


def _score(row: Row) -> str:
    text, spread = f"{row['objective/scores']:.3g}", "objective/scores_std"
    return f"{text} ±{row[spread]:.2g}" if _number(row, spread) else text


def _columns() -> tuple[Column, ...]:
    def of(title: str, key: str, rank: int, form: str, word: str, as_: Any = float) -> Column:
        return Column(title, key, rank, _plain(key, form, as_), word)

    return (
        of("update", "step", 0, "{}", "", int),
        Column("score", "objective/scores", 1, _score, "score "),
        of("held out", "objective/held_out_scores", 6, "{:.3g}", "held out "),
        of("KL", "objective/kl", 2, "{:.2f}", "KL "),
        of("entropy", "objective/entropy", 5, "{:.2f}", "entropy "),
        of("length", "lengths/mean", 3, "{:.0f}", "length "),
        of("stop", "lengths/stop_rate", 4, "{:.0%}", "stop "),
        of("clip", "policy/clipfrac", 7, "{:.0%}", "clip "),
        of("expl var", "value/explained_variance", 8, "{:.2f}", "explained variance "),
        of("gen/s", "generate_tokens_per_s", 9, "{}", "generate tokens/s ", format_count),
        of("train/s", "train_tokens_per_s", 10, "{}", "train tokens/s ", format_count),
    )


COLUMNS = _columns()
