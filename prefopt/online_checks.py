"""What goes wrong in online RL, noticed while it runs and said in plain words.

A finding is said when it first trips, and again only when it is twice as bad or comes back after
CLEAR updates without it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from prefopt.errors import InputError
from prefopt.online_findings import BOUNDS, CHECKS, Setting, Trip
from prefopt.online_history import History

CLEAR = 20  # updates without a finding after which it may be said anew
WORSE = 2.0  # factor by which a finding gets worse before it is said again


class Finding(NamedTuple):
    """One row of `alarms.jsonl`."""

    step: int
    name: str
    message: str
    remedy: str


class Watch:
    """Looks at each row of an online run and says what is wrong with it.

        watch = Watch(dtype="float32", kl_target=config.kl.target)
        for finding in watch.update(row):
            warn(f"{finding.message} {finding.remedy}")

    Args:
        dtype: of the log-probs' matrix products; the narrower one where the sampler's differs.
        kl_target: nats per response that are meant to be spent; None where none is set.

    `state` is plain JSON; a watch restored from it goes on as if it had never stopped.
    """

    def __init__(self, *, dtype: str = "float32", kl_target: float | None = None) -> None:
        dtype = dtype.removeprefix("torch.")
        if dtype not in BOUNDS:
            raise InputError(f"dtype is {dtype!r}; the checks know {', '.join(BOUNDS)}")
        self._setting = Setting(BOUNDS[dtype], dtype, kl_target)
        self._history = History()
        self._said: dict[str, list[float]] = {}  # name -> [severity, updates without it since]

    def update(self, row: Mapping[str, Any]) -> list[Finding]:
        """What is to be said after this row of `metrics.jsonl`; mostly nothing."""
        self._history.add(row)
        found = []
        for name, check in CHECKS.items():
            trip = check(row, self._history, self._setting)
            if self._is_news(name, trip) and trip is not None:
                found.append(Finding(int(row["step"]), name, trip.message, trip.remedy))
        return found

    def _is_news(self, name: str, trip: Trip | None) -> bool:
        said = self._said.get(name)
        if trip is None:
            if said is not None:
                said[1] += 1
                if said[1] >= CLEAR:
                    del self._said[name]
            return False
        if said is not None and trip.severity < WORSE * said[0]:
            said[1] = 0
            return False
        self._said[name] = [trip.severity, 0]
        return True

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return copy.deepcopy({"history": asdict(self._history), "said": self._said})

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state` gave."""
        state = copy.deepcopy(dict(state))
        self._history, self._said = History(**state["history"]), state["said"]


def repetition(rows: Iterable[Sequence[int] | np.ndarray], n: int = 4) -> float:
    """Share of the n-grams of tokens that their own row has had before: 0 where none repeats.

    1 - distinct / all, both summed over the rows (the seq-rep-n of Welleck et al. 2020, arXiv
    1908.04319, pooled). Rows of fewer than `n` tokens have no n-gram; none at all give 0.
    """
    total = distinct = 0
    for row in rows:
        tokens = np.asarray(row).tolist()
        grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
        total += len(grams)
        distinct += len(set(grams))
    return 1 - distinct / total if total else 0.0
