"""What the doctor found, and the book in which its checks note it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from prefopt.data.audit.checks import CHECKS, SEVERITIES, Check
from prefopt.data.records import DataReport
from prefopt.data.sources import Preferences

EXAMPLES = 5


@dataclass
class Finding:
    """What one check found: `count` of `total` `unit`s, the positions of the first, and `detail`
    where there is more to say. `dropped` is how many pairs --fix drops for it."""

    check: str
    severity: str
    count: int
    total: int
    unit: str = "pairs"
    examples: list[str] = field(default_factory=list)
    detail: str = ""
    dropped: int = 0

    @property
    def about(self) -> Check:
        return CHECKS[self.check]


@dataclass
class Diagnosis:
    """Everything that `examine` found in the pairs of `report`.

    `keep` [n] bool: which pairs a cleaned copy has. `lengths`: how often the longer response is
    the chosen one, in characters and in tokens.
    """

    report: DataReport
    findings: list[Finding]
    clean: list[str]
    lengths: dict[str, dict[str, Any]]
    held_out: str
    template: str
    keep: np.ndarray

    def count(self, severity: str) -> int:
        return sum(finding.severity == severity for finding in self.findings)

    def unmended(self) -> list[Finding]:
        """The errors that a cleaned copy still has."""
        return [f for f in self.findings if f.severity == "error" and not f.about.fix]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `clean` are the checks that found nothing."""
        checks = [
            {**asdict(f), "share": f.count / f.total if f.total else 0.0, "says": f.about.says}
            for f in self.findings
        ]
        return {
            "data": self.report.to_dict(),
            "checks": checks,
            "clean": self.clean,
            "lengths": self.lengths,
            "held_out": self.held_out,
            "template": self.template,
            "errors": self.count("error"),
            "warnings": self.count("warning"),
        }


class Book:
    """What was found so far."""

    def __init__(self, pairs: Preferences):
        self.pairs = pairs
        self.findings: dict[str, Finding] = {}
        self.drop = np.zeros(len(pairs), bool)

    def note(
        self,
        check: str,
        mask: np.ndarray,
        *,
        drop: np.ndarray | None = None,
        like: Callable[[int], str] | None = None,
        detail: str = "",
    ) -> None:
        """The pairs of a mask [n] bool; those of `drop` [n], else all of them, go where the check
        is one that is fixed. `like`: what an example resembles."""
        if not mask.any():
            return
        first = np.flatnonzero(mask)[: 4 * EXAMPLES].tolist()  # several may be of one row
        where = (self.pairs.where(i) + (f" (like {like(i)})" if like else "") for i in first)
        examples = list(dict.fromkeys(where))[:EXAMPLES]
        gone = mask if drop is None else drop
        gone = gone if CHECKS[check].fix else np.zeros_like(mask)
        self.drop |= gone
        read = self.findings.get(check)  # rows that reading left out for the same reason
        count, dropped = int(mask.sum()), int(gone.sum())
        if read is not None:
            count, dropped = count + read.count, dropped + read.dropped
            examples = [*read.examples, *examples][:EXAMPLES]
        severity = CHECKS[check].severity
        self.findings[check] = Finding(
            check, severity, count, len(mask), "pairs", examples, detail, dropped
        )

    def sorted(self) -> list[Finding]:
        rank, order = SEVERITIES.index, list(CHECKS)
        return sorted(
            self.findings.values(), key=lambda f: (rank(f.severity), order.index(f.check))
        )
