"""The canonical records: what every data source becomes before anything else looks at it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

# The roles a message may have. Two are for tools, with JSON text in `content`: "tools" opens a
# prompt with the list of functions that may be called, "tool_calls" holds the [{"name",
# "arguments"}] that an assistant's turn calls, behind its "assistant" text if it has one. "tool" is
# a call's result.
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "tools", "tool_calls"})
SPOKEN = ("assistant", "tool_calls")  # what the model writes: scored, where the others are given


class Message(NamedTuple):
    """One turn of a conversation: one of ROLES, and text."""

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

    `prompt + chosen` and `prompt + rejected` are whole conversations; a response is a turn, or all
    turns from where the two conversations part, of which those of SPOKEN roles are scored. `margin`
    is how much better the chosen response is where the data says so, `source` where the row came
    from where the data says so, `weight` what its loss is multiplied by, `preference` the
    probability that `chosen` is the better one: 0.5 is a tie.
    """

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    margin: float | None = None
    source: str | None = None
    weight: float = 1.0
    preference: float = 1.0


@dataclass(frozen=True)
class Candidates:
    """K >= 2 responses to one prompt with a score each: more is better, equal is a tie, NaN is a
    response that was not rated."""

    prompt: list[Message]
    responses: list[list[Message]]
    scores: list[float]
    source: str | None = None


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
        spoken = (i for i, m in turns if m.role in SPOKEN and i >= self.context)
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

    `rows == kept + sum(dropped.values())`: a row is kept if anything was made of it. `records` is
    what was made: one of each kept row, or more where responses are ranked, or fewer where several
    rows make one. `dropped_at` holds the position of the first row per reason. `notes` are facts
    worth a line that drop nothing.
    """

    source: str
    schema: str
    reason: str
    rows: int = 0
    kept: int = 0
    records: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    dropped_at: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def drop(self, reason: str, where: str, rows: int = 1) -> None:
        """Count dropped rows; the first position per reason is kept."""
        self.dropped[reason] = self.dropped.get(reason, 0) + rows
        self.dropped_at.setdefault(reason, where)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict (`data_report.json` in the run folder)."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report as a few plain lines for the terminal."""
        made = f", which make {self.records:,} records" if self.records != self.kept else ""
        out = [
            f"{self.source}: {self.kept:,} of {self.rows:,} rows kept{made}",
            f"read as {self.schema}: {self.reason}",
        ]
        for reason, count in sorted(self.dropped.items(), key=lambda item: (-item[1], item[0])):
            out.append(f"dropped {count:,}: {reason} (first at {self.dropped_at[reason]})")
        return out + list(self.notes)
