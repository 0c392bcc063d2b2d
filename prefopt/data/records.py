"""The canonical records: what every data source becomes before anything else looks at it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple


class Message(NamedTuple):
    """One turn of a conversation. `role` is "system", "user", "assistant" (or "tool")."""

    role: str
    content: str


def are_messages(side: Any) -> bool:
    """Whether this is a list of Message with text, as records that callers make must have."""
    return isinstance(side, list) and all(
        isinstance(m, Message) and isinstance(m.role, str) and isinstance(m.content, str)
        for m in side
    )


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt, of which `chosen` was preferred.

    `prompt + chosen` and `prompt + rejected` are whole conversations. `margin` is how much better
    the chosen response is where the data says so, `source` where the row came from where the data
    says so, `weight` what its loss is multiplied by.
    """

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    margin: float | None = None
    source: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Dialogue:
    """What to imitate: a conversation, or in `text` plain text without speakers (then no turns).

    The first `context` turns are given: what the assistant says in them is not imitated. `source`
    and `weight` as of a `Pair`.
    """

    turns: list[Message]
    text: str | None = None
    source: str | None = None
    weight: float = 1.0
    context: int = 0

    @property
    def prompt(self) -> list[Message]:
        """The turns before the first that is imitated; of plain text, the text itself."""
        if self.text is not None:
            return [Message("text", self.text)]
        turns = enumerate(self.turns)
        spoken = (i for i, m in turns if m.role == "assistant" and i >= self.context)
        return self.turns[: next(spoken, None)]


@dataclass(frozen=True)
class Ranking:
    """K >= 2 responses to one prompt, the best one first; no two of them are equally good."""

    prompt: list[Message]
    responses: list[list[Message]]
    source: str | None = None


@dataclass(frozen=True)
class Feedback:
    """One response to a prompt and whether it is a desirable one."""

    prompt: list[Message]
    response: list[Message]
    desirable: bool
    source: str | None = None


@dataclass
class DataReport:
    """What was read, how it was understood and why, and a count per reason for every dropped row.

    `rows == kept + sum(dropped.values())`. `dropped_at` holds the position of the first row per
    reason. `notes` are facts worth a line that drop nothing.
    """

    source: str
    schema: str
    reason: str
    rows: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    dropped_at: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def drop(self, reason: str, where: str) -> None:
        """Count one dropped row; the first position per reason is kept."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.dropped_at.setdefault(reason, where)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict (`data_report.json` in the run folder)."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report as a few plain lines for the terminal."""
        out = [
            f"{self.source}: {self.kept:,} of {self.rows:,} rows kept",
            f"read as {self.schema}: {self.reason}",
        ]
        for reason, count in sorted(self.dropped.items(), key=lambda item: (-item[1], item[0])):
            out.append(f"dropped {count:,}: {reason} (first at {self.dropped_at[reason]})")
        return out + list(self.notes)
