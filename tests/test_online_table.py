"""The table of an online run: on a terminal as a screen shows it, and as plain lines."""

import io
import math
import re
import sys
import warnings

import pytest

from prefopt.online_table import OnlineTable

ROW = {
    "objective/scores": 1.234,
    "objective/scores_std": 0.456,
    "objective/kl": 3.21,
    "objective/entropy": 1.5,
    "lengths/mean": 45.6,
    "lengths/stop_rate": 0.93,
    "policy/clipfrac": 0.12,
    "value/explained_variance": 0.4,
    "generate_tokens_per_s": 12345.0,
    "train_tokens_per_s": 45678.0,
}
WORDS = (
    "score 1.23 ±0.46  KL 3.21  entropy 1.50  length 46  stop 93%  clip 12%  "
    "explained variance 0.40  generate tokens/s 12.3k  train tokens/s 45.7k"
)


class Terminal(io.StringIO):
    """A stream that says it is a terminal, and `screen`: what is to be seen on one."""

    def isatty(self):
        return True

    def screen(self):
        lines, row, column = [""], 0, 0
        for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|.|\n", self.getvalue()):
            if part == "\n":
                row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
            elif part == "\r":
                column = 0
            elif part.endswith("A") and part.startswith("\x1b"):
                row -= int(part[2:-1] or 1)
                assert row >= 0
            elif part == "\x1b[2K":
                lines[row] = ""
            elif not part.startswith("\x1b"):
                lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + 1 :]
                column += 1
        return [line.rstrip() for line in lines if line.strip()]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def of(width):
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setenv("LINES", "40")
        return Terminal()

    return of


# ---------------------------------------------------------------- on a terminal


def test_the_last_eight_updates_and_what_goes_on_now(terminal):
    stream, clock = terminal(80), Clock()
    with OnlineTable(200, stream=stream, clock=clock) as table:
        for step in range(1, 13):
            table.phase("generate", 64)
            clock.now += 1
            table.update(12)
            clock.now += 1
            table.phase("score")
            clock.now += 1
            table.row({"step": step, **ROW})
        table.phase("train epoch", 4)
        clock.now += 1
        table.update(2)
        seen = stream.screen()
        assert len(seen) == 10
        assert seen[0].split() == [
            *("update", "score", "KL", "entropy", "length", "stop", "clip"),
            *("expl", "var", "gen/s", "train/s"),
        ]
        assert [line.split()[0] for line in seen[1:9]] == [*map(str, range(5, 12)), "12/200"]
        assert seen[8].split()[1:] == [
            *("1.23", "±0.46", "3.21", "1.50", "46", "93%", "12%", "0.40", "12.3k", "45.7k")
        ]
        assert seen[9] == "update 13/200: train epoch 2/4  9 min 24 s left"
        assert max(map(len, seen)) <= 80
    assert stream.screen()[-1] == "9 min 24 s left"
    assert stream.getvalue().rstrip().endswith("\x1b[?25h"), "the cursor is there again"


def test_before_the_first_update_there_is_the_phase_alone(terminal):
    stream = terminal(80)
    with OnlineTable(200, start=50, stream=stream) as table:
        table.phase("generate", 64)
        assert stream.screen() == ["update 51/200: generate"]


@pytest.mark.parametrize(
    ("width", "gone"),
    [
        (100, set()),
        (80, {"gen/s", "train/s"}),
        (60, {"gen/s", "train/s", "expl", "clip"}),
        (30, {"gen/s", "train/s", "expl", "clip", "held", "entropy", "stop", "length"}),
    ],
)
def test_a_narrow_terminal_loses_columns_by_rank(terminal, width, gone):
    stream = terminal(width)
    with OnlineTable(200, stream=stream) as table:
        table.row({"step": 1, **ROW, "objective/held_out_scores": 0.7})
    seen = stream.screen()
    titles = {"update", "score", "held", "KL", "entropy", "length", "stop", "clip", "expl"}
    shown = set(seen[0].split()) - {"out", "var"}
    assert shown == (titles | {"gen/s", "train/s"}) - gone
    assert len(seen[1]) <= width and "…" not in seen[1]


@pytest.mark.parametrize("width", [1, 5, 12])
def test_the_narrowest_terminal_is_no_error(terminal, width):
    with OnlineTable(200, stream=terminal(width)) as table:
        table.row({"step": 1, **ROW})
        table.phase("generate", 64)


def test_what_was_not_measured_has_no_column(terminal):
    stream = terminal(80)
    with OnlineTable(3, stream=stream) as table:
        table.row({"step": 1, "objective/scores": 0.5, "objective/kl": None})
        table.row({"step": 2, "objective/scores": 0.25, "lengths/mean": 3.0})
    assert [line.split() for line in stream.screen()] == [
        ["update", "score", "length"],
        ["1", "0.5"],
        ["2/3", "0.25", "3"],
    ]


def test_values_that_are_no_numbers_are_shown():
    broken = dict.fromkeys(ROW, math.nan) | {"objective/kl": math.inf, "lengths/mean": None}
    stream = io.StringIO()
    with OnlineTable(1, stream=stream) as table:
        table.row({"step": 1, **broken})
    assert "KL inf" in stream.getvalue() and "entropy ?" in stream.getvalue()


def test_warnings_and_findings_stand_above_the_table(terminal, monkeypatch):
    stream = terminal(80)
    monkeypatch.setattr(sys, "stderr", stream)
    with OnlineTable(9) as table:
        table.row({"step": 1, **ROW})
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda message, *_: print(message, file=sys.stderr)
            warnings.warn("from a library", stacklevel=1)
        table.say("[x] a finding " + "of many words " * 8)
        table.row({"step": 2, **ROW})
    seen = stream.screen()
    assert seen[0] == "from a library"
    assert seen[1].startswith("[x] a finding of many words") and len(seen[1]) <= 80
    assert [line.split()[0] for line in seen[-3:]] == ["update", "1", "2/9"]
    assert sum(line.startswith("update") for line in seen) == 1, "no old table is left behind"


def test_an_error_leaves_the_terminal_as_it_was(terminal):
    stream = terminal(80)
    with pytest.raises(KeyError), OnlineTable(9, stream=stream) as table:
        table.phase("generate", 3)
        raise KeyError
    assert stream.getvalue().rstrip().endswith("\x1b[?25h")


def test_phases_are_drawn_ten_times_a_second_at_most(terminal):
    stream, clock = terminal(80), Clock()
    with OnlineTable(9, stream=stream, clock=clock) as table:
        table.phase("generate", 1000)
        before = len(stream.getvalue())
        for i in range(1000):
            clock.now += 0.001
            table.update(i)
        assert 5 * 30 < len(stream.getvalue()) - before < 12 * 80


# ---------------------------------------------------------------- elsewhere


def test_plain_lines_every_ten_seconds_and_at_the_end():
    stream, clock = io.StringIO(), Clock()
    with OnlineTable(40, stream=stream, clock=clock) as table:
        for step in range(1, 41):
            table.phase("generate", 64)
            clock.now += 1
            table.update(64)
            table.row({"step": step, **ROW})
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/40", "11/40", "21/40", "31/40", "40/40"]
    assert lines[1] == f"update 11/40  {WORDS}  29 s left"
    assert lines[-1] == f"update 40/40  {WORDS}"


def test_time_left_leaves_out_evaluations_and_follows_the_last_updates():
    stream, clock = io.StringIO(), Clock()
    with OnlineTable(1000, start=900, stream=stream, clock=clock) as table:
        for step in range(901, 921):
            clock.now += 7  # between phases: a checkpoint
            table.phase("generate", 64)
            clock.now += 20 if step < 912 else 2
            table.phase("evaluate", 7)
            clock.now += 500
            table.update(7)
            table.row({"step": step})
    assert stream.getvalue().splitlines()[-1] == "update 920/1000  2 min 40 s left"


def test_quiet_prints_nothing(terminal):
    for stream in (io.StringIO(), terminal(80)):
        with OnlineTable(1, quiet=True, stream=stream) as table:
            table.phase("generate", 2)
            table.update(2, {"loss": 0.5})
            table.say("a finding")
            table.row({"step": 1, **ROW})
        assert stream.getvalue() == ""


def test_findings_are_plain_lines_too():
    stream = io.StringIO()
    with OnlineTable(1, stream=stream) as table:
        table.say("[bold] a finding")
    assert stream.getvalue() == "[bold] a finding\n"
