"""The meter's arithmetic and its single transfer, metrics.jsonl, the progress line."""

import io
import json
import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefopt.metrics import (
    Meter,
    MetricsLog,
    Progress,
    format_count,
    format_duration,
    gemm_rate,
    peak_memory_bytes,
    read_metrics,
)

# ---------------------------------------------------------------- Meter

parts = st.lists(
    st.tuples(
        st.dictionaries(st.sampled_from("abc"), st.floats(-1e6, 1e6, width=32)),
        st.integers(1, 50),
        st.booleans(),
    ),
    max_size=12,
)


@given(parts)
def test_meter_divides_the_sum_by_what_was_counted(adds):
    meter, sums, counts = Meter(), {}, {}
    for values, count, on_device in adds:
        meter.add(
            {k: torch.tensor(v) for k, v in values.items()},
            torch.tensor(count) if on_device else count,
        )
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value
            counts[name] = counts.get(name, 0) + count
    assert meter.flush() == {name: sums[name] / counts[name] for name in sums}
    assert meter.flush() == {}, "a flush starts anew"


def test_meter_keeps_float32_sums_exact_over_many_steps():
    meter = Meter()
    for _ in range(10_000):
        meter.add({"x": torch.tensor(0.1)}, 1)
    assert meter.flush()["x"] == pytest.approx(float(torch.tensor(0.1)), rel=1e-12)


def test_meter_leaves_out_what_was_never_counted_and_keeps_nan():
    meter = Meter()
    meter.add({"x": torch.tensor(0.0)}, torch.tensor(0))
    meter.add({"y": torch.tensor(math.nan)}, 2)
    result = meter.flush()
    assert list(result) == ["y"] and math.isnan(result["y"])


def test_meter_does_not_hold_the_graph():
    weight = torch.ones(3, requires_grad=True)
    meter = Meter()
    meter.add({"loss": (weight * 2).sum()}, 3)
    assert not any(t.requires_grad for t in meter._sums.values())


def test_meter_reads_nothing_back_before_flush():
    unreadable = torch.ones((), device="meta")  # has no value: reading it is an error
    with pytest.raises(RuntimeError):
        float(unreadable)
    meter = Meter()
    for _ in range(3):
        meter.add({"a": unreadable, "b": unreadable}, unreadable)


def test_flush_moves_one_tensor(monkeypatch):
    moved, real = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: moved.append(self) or real(self))
    meter = Meter()
    meter.add({"a": torch.tensor(1.0), "b": torch.tensor(2.0), "c": 3.0}, torch.tensor(4))
    assert meter.flush() == {"a": 0.25, "b": 0.5, "c": 0.75}
    assert [tuple(t.shape) for t in moved] == [(5,)]  # two sums and three device counts


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_meter_does_not_synchronise_a_gpu():
    meter, value = Meter(), torch.ones((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        meter.add({"x": value}, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert meter.flush() == {"x": 0.5}


# ---------------------------------------------------------------- metrics.jsonl


def test_log_is_valid_json_whatever_the_values(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"step": 1, "loss": math.nan, "up": math.inf, "down": -math.inf, "ok": 1 / 3})
    log.write({"step": 2, "loss": 0.5, "note": "é", "none": None})
    text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    first, second = (json.loads(line, parse_constant=refuse) for line in text.splitlines())
    assert first == {
        "step": 1,
        "loss": None,
        "up": None,
        "down": None,
        "ok": 0.33333333,
        "non_finite": {"loss": "nan", "up": "inf", "down": "-inf"},
    }
    assert second == {"step": 2, "loss": 0.5, "note": "é", "none": None}


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_log_keeps_eight_significant_digits(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("log") / "m.jsonl"
    MetricsLog(path).write({"step": 0, "x": value})
    (row,), _ = read_metrics(path)
    assert row["x"] == pytest.approx(value, rel=5.1e-8, abs=1e-320)


def test_log_survives_a_cut_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).write({"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')  # the process died here
    MetricsLog(path).write({"step": 3})
    assert read_metrics(path) == ([{"step": 1}, {"step": 3}], 1)


@given(st.lists(st.integers(0, 9)), st.integers(-1, 10), st.booleans())
def test_truncate_keeps_exactly_the_steps_up_to_the_resumed_one(tmp_path_factory, steps, at, cut):
    path = tmp_path_factory.mktemp("log") / "m.jsonl"
    log = MetricsLog(path)
    for step in steps:
        log.write({"step": step})
    log.write({"no step": True})
    if cut:
        with path.open("ab") as file:
            file.write(b'{"step"')
    dropped = log.truncate_after(at)
    log.write({"step": 99})
    kept = [{"step": s} for s in steps if s <= at]
    assert read_metrics(path) == ([*kept, {"no step": True}, {"step": 99}], 0)
    assert dropped == len(steps) - len(kept) + cut
    assert [p.name for p in path.parent.iterdir()] == ["m.jsonl"], "no temporary file is left"


def test_truncate_without_a_file_and_without_work(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    assert log.truncate_after(3) == 0
    log.write({"step": 1})
    inode = log.path.stat().st_ino
    assert log.truncate_after(3) == 0
    assert log.path.stat().st_ino == inode, "nothing to drop: the file is not written again"


@given(st.binary(max_size=200))
def test_read_metrics_takes_any_bytes(tmp_path_factory, junk):
    path = tmp_path_factory.mktemp("log") / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n' + junk.replace(b"\n", b"").replace(b"\r", b"") + b"\n")
    rows, damaged = read_metrics(path)
    assert rows[0] == {"step": 1} and len(rows) + damaged <= 2


# ---------------------------------------------------------------- Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


ROW = {"loss": 0.5, "rewards/margins": 0.25, "rewards/accuracies": 0.75, "tokens_per_s": 12345.0}


def test_plain_lines_every_ten_seconds_and_at_the_end():
    stream, clock = io.StringIO(), Clock()
    with Progress(stream=stream, clock=clock) as progress:
        progress.phase("train", 40)
        for step in range(1, 41):
            clock.now += 1
            progress.update(step, ROW)
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/40", "11/40", "21/40", "31/40", "40/40"]
    assert lines[1] == (
        "train 11/40  loss 0.5000  margin 0.250  accuracy 75%  12.3k tokens/s  29 s left"
    )
    assert "left" not in lines[0], "one point gives no rate"
    assert "left" not in lines[-1]


def test_time_left_counts_neither_other_phases_nor_steps_before_a_resume():
    stream, clock = io.StringIO(), Clock()
    with Progress(stream=stream, clock=clock) as progress:
        progress.phase("train", 1000)
        progress.update(500)  # resumed: these 500 steps took no time here
        clock.now += 20
        progress.update(510)  # 2 s a step
        progress.phase("evaluate", 7)
        clock.now += 500
        progress.update(7)
        progress.phase("train", 1000)
        clock.now += 20
        progress.update(520)
    assert stream.getvalue().splitlines()[-1] == "train 520/1000  16 min 00 s left"


def test_quiet_prints_nothing():
    for stream in (io.StringIO(), Terminal()):
        with Progress(quiet=True, stream=stream) as progress:
            progress.phase("train", 2)
            progress.update(2, ROW)
        assert stream.getvalue() == ""


def test_a_terminal_gets_one_line_refreshed_in_place(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    stream, clock = Terminal(), Clock()
    with Progress(stream=stream, clock=clock) as progress:
        progress.phase("train", 3)
        for step in (1, 2, 3):
            clock.now += 1
            progress.update(step, ROW)
    text = stream.getvalue()
    assert text.count("\n") == 1, "a single line, ended once"
    assert "3/3" in text and "loss 0.5000" in text and "12.3k tokens/s" in text


@pytest.mark.parametrize("width", ["20", "60"])
def test_a_narrow_terminal_still_gets_one_line(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with Progress(stream=stream) as progress:
        progress.phase("train", 3)
        progress.update(1, ROW)
    assert stream.getvalue().count("\n") == 1


def test_metrics_that_are_missing_or_null_are_left_out():
    stream = io.StringIO()
    with Progress(stream=stream) as progress:
        progress.phase("reference", None)
        progress.update(4, {"loss": None, "other": "text"})
    assert stream.getvalue() == "reference 4\n"


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (math.inf, "?"),
    ],
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (950.4, "950"), (12345, "12.3k"), (4.2e6, "4.2M"), (3e9, "3G")]
)
def test_format_count(value, text):
    assert format_count(value) == text


def test_peak_memory_lies_between_what_is_resident_and_the_system_maximum():
    resource = pytest.importorskip("resource")
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("only Linux tells resident memory in a second way")
    resident = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert 0.98 * resident <= peak_memory_bytes("cpu") <= 1.02 * most


def test_peak_memory_is_the_high_water_mark_where_the_system_has_one(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda _: "Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t1 kB")
    assert peak_memory_bytes("cpu") == 2 << 20


def test_gemm_rate_is_a_rate_and_measured_once():
    rate = gemm_rate("cpu", torch.float32)
    assert 1e7 < rate < 1e16
    assert gemm_rate("cpu", torch.float32) == rate
