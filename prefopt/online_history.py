"""What is remembered of an online run's metrics, and the statistics of their change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

START = 8  # first updates, with which later ones are compared
RECENT = 32  # last updates, over which a trend is fitted

SCORE, HELD_OUT = "objective/scores", "objective/held_out_scores"
WATCHED = (
    *(SCORE, "objective/scores_std", "objective/kl", "objective/kl_token"),
    *("objective/entropy", "policy/clipfrac", "value/explained_variance", "lengths/mean"),
    *("lengths/stop_rate", "groups/zero_variance", "repetition"),
)


@dataclass
class History:
    """What is remembered of each metric: its first values and its last ones; of the two scores
    (trained on, held out), in rows that have both, also means over equal stretches of the run."""

    start: dict[str, list[float]] = field(default_factory=dict)
    recent: dict[str, list[float]] = field(default_factory=dict)
    both: list[list[float]] = field(default_factory=list)  # the last [score, held out]
    stretches: list[list[float]] = field(default_factory=list)  # their means
    pending: list[list[float]] = field(default_factory=list)  # of a stretch not yet complete
    stretch: int = 1  # updates in one stretch; doubles whenever they become too many

    def add(self, row: Mapping[str, Any]) -> None:
        for name in WATCHED:
            value = known(row, name)
            if value is None:
                continue
            start, recent = (part.setdefault(name, []) for part in (self.start, self.recent))
            if len(start) < START:
                start.append(value)
            recent.append(value)
            del recent[:-RECENT]
        score, held_out = (known(row, name) for name in (SCORE, HELD_OUT))
        if score is not None and held_out is not None:
            self._add_scores([score, held_out])

    def _add_scores(self, both: list[float]) -> None:
        self.both = [*self.both, both][-RECENT:]
        self.pending.append(both)
        if len(self.pending) < self.stretch:
            return
        self.stretches.append(np.mean(self.pending, axis=0).tolist())
        self.pending = []
        if len(self.stretches) == 2 * RECENT:
            self.stretches = np.reshape(self.stretches, (RECENT, 2, 2)).mean(1).tolist()
            self.stretch *= 2

    def last(self, name: str, count: int) -> np.ndarray | None:
        """The last `count` values; None while there are fewer."""
        values = self.recent.get(name, [])
        return np.array(values[-count:]) if len(values) >= count else None

    def moved(self, name: str) -> tuple[float, float, float] | None:
        """(mean of the first START, mean of the last START, t statistic of their difference);
        None while the two overlap."""
        values, start = self.recent.get(name, []), self.start.get(name, [])
        if len(values) < 2 * START:
            return None
        end = values[-START:]
        return float(np.mean(start)), float(np.mean(end)), apart(start, end)


def trend(values: Sequence[float] | np.ndarray) -> float:
    """t statistic of the slope of a straight line through equally spaced values.

    Noise that lingers looks like a trend, so the statistic is shrunk by the lag-1 correlation r of
    the residuals: t * sqrt((1 - r) / (1 + r)), r >= 0, with what fitting a line takes off r put
    back, (2 + 4 r) / n. Fewer than 8 values, or values that do not move, give 0.
    """
    y = np.asarray(values, dtype=np.float64)
    if len(y) < 8 or np.ptp(y) <= 1e-9 * np.abs(y).max():
        return 0.0
    x = np.arange(len(y)) - (len(y) - 1) / 2
    slope = (x @ y) / (x @ x)
    rest = y - y.mean() - slope * x
    spread = float(rest @ rest)
    if spread <= 1e-18 * float(y @ y):
        return math.copysign(math.inf, slope)
    lingering = float(rest[1:] @ rest[:-1]) / spread
    lingering = min(0.99, max(0.0, lingering + (2 + 4 * lingering) / len(y)))
    error = math.sqrt(spread / (len(y) - 2) / (x @ x))
    return float(slope / error * math.sqrt((1 - lingering) / (1 + lingering)))


def apart(first: Sequence[float], second: Sequence[float]) -> float:
    """Welch's t statistic of mean(second) - mean(first)."""
    a, b = (np.asarray(part, dtype=np.float64) for part in (first, second))
    error = math.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
    gap = float(b.mean() - a.mean())
    return gap / error if error else math.copysign(math.inf, gap) if gap else 0.0


def known(row: Mapping[str, Any], name: str) -> float | None:
    """The finite value of a metric, or None."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
