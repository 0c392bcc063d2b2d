"""Several sources of preference pairs as one, each with its share of the loss."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import overload

from prefopt.data.columns import nearest
from prefopt.data.records import DataReport, Pair
from prefopt.errors import InputError


class Mixture(Sequence[Pair]):
    """The pairs of several sources, one source after the other, read where they are.

    ``pair.source`` is the source's name, ``pair.weight`` what the mixture makes of it; ``report``
    sums up the reports of the parts.
    """

    def __init__(self, parts: Mapping[str, Sequence[Pair]], factors: Mapping[str, float]):
        self._names, self._parts = list(parts), list(parts.values())
        self._factors = [factors[name] for name in self._names]
        self._ends = list(accumulate(map(len, self._parts)))
        self.report = _report(parts, factors)

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> list[Pair]: ...
    def __getitem__(self, index: int | slice) -> Pair | list[Pair]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = range(len(self))[index]  # negative indices, IndexError
        k = bisect_right(self._ends, at)
        pair = self._parts[k][at - self._ends[k] + len(self._parts[k])]
        return replace(pair, source=self._names[k], weight=pair.weight * self._factors[k])


def mix(
    sources: Mapping[str, Sequence[Pair]], weights: Mapping[str, float] | None = None
) -> Mixture:
    """All pairs of all sources; with ``weights`` w the mean loss is sum_k w_k (mean over source k).

    The w are divided by their sum. Of N pairs, n_k of them from source k, each of these gets the
    weight w_k N / n_k: exact over all pairs, nearly so over those that training keeps. Without
    ``weights`` every pair counts alike, so that a source counts by its size. Raises InputError for
    no source, an empty one, a source without a weight, a weight without a source, and a weight that
    is not a number above 0.
    """
    if not sources:
        raise InputError("there is no source of pairs to mix; name at least one")
    for name, part in sources.items():
        if not len(part):
            raise InputError(f"the source {name!r} holds no pairs; leave it out of the mixture")
    if weights is None:
        return Mixture(sources, dict.fromkeys(sources, 1.0))
    check_weights(weights, list(sources), "source")
    total, size = math.fsum(weights.values()), sum(map(len, sources.values()))
    factors = {k: float(weights[k]) / total * size / len(part) for k, part in sources.items()}
    return Mixture(sources, factors)


def check_weights(weights: Mapping[str, float], names: Sequence[str], what: str) -> None:
    """InputError unless each of ``names`` (each a ``what``) has one finite weight above 0."""
    for name, weight in weights.items():
        if name not in names:
            raise InputError(
                f"a weight is given for the {what} {name!r}{nearest(name, names)}, and the {what}s "
                f"are {', '.join(names)}"
            )
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not 0 < weight < math.inf:
            raise InputError(f"the weight of the {what} {name!r} is {weight!r}; give one above 0")
    missing = [name for name in names if name not in weights]
    if missing:
        raise InputError(f"the {what} {missing[0]!r} has no weight; give one to each {what}")


def _report(parts: Mapping[str, Sequence[Pair]], factors: Mapping[str, float]) -> DataReport:
    whole = DataReport(", ".join(parts), "mixture", "")
    schemas = []
    for name, part in parts.items():
        own = getattr(part, "report", None)
        own = own or DataReport("pairs", "pairs", "given as records", len(part), len(part))
        schemas.append(f"{name} ({own.source}) as {own.schema}")
        whole.rows += own.rows
        whole.kept += own.kept
        for reason, count in own.dropped.items():
            whole.dropped[f"{name}: {reason}"] = count
            whole.dropped_at[f"{name}: {reason}"] = own.dropped_at[reason]
        whole.notes += [f"{name}: {note}" for note in own.notes]
        share = f", each weighing {factors[name]:.4g}" if len(set(factors.values())) > 1 else ""
        whole.notes.append(f"{name}: {len(part):,} pairs{share}")
    whole.reason = "; ".join(schemas)
    return whole
