"""Which of two responses is the better one, in the ways that data sets say so."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from prefopt.data.schemas.base import CHOICES, RATED, Names, RowDict, number


class Verdict(NamedTuple):
    """The probability (1, 0, or 0.5 for a tie) that the first response is the better one, and by
    how much the better one is better where the data says so."""

    first: float
    margin: float | None = None


class Kind(NamedTuple):
    """A way to say which response is better: the columns for it and the function that reads them,
    or says what is wrong with a row."""

    name: str
    level: int
    names: Names
    needs: tuple[str, ...]
    how: str
    read: Callable[[RowDict], Verdict | str]
    refuse: Callable[[Sequence[RowDict], Collection[str]], str | None] | None = None


FIRST = (
    *("a", "model_a", "response_a", "answer_a", "completion_a", "conversation_a", "assistant_a"),
    *("model a", "response a", "assistant a", "first", "left"),
)
SECOND = (
    *("b", "model_b", "response_b", "answer_b", "completion_b", "conversation_b", "assistant_b"),
    *("model b", "response b", "assistant b", "second", "right"),
)
TIE = (
    *("tie", "tie (bothbad)", "tie(bothbad)", "bothbad", "both_bad", "both bad", "tie_bothbad"),
    *("both_good", "both good", "both", "neither", "draw", "equal", "same", "none"),
)
WINNERS = {**dict.fromkeys(FIRST, 1.0), **dict.fromkeys(SECOND, 0.0), **dict.fromkeys(TIE, 0.5)}


def read_winner(row: RowDict) -> Verdict | str:
    """A text: one of WINNERS, the name of the better response's column, or of its model."""
    value = row["winner"]
    if number(value) is not None or isinstance(value, bool):
        return (
            f"{_shown(value)} may be an index or a sign; columns={{'choice': '...'}} reads 0 as "
            "the first and 1 as the second, columns={'strength': '...'} numbers below 0 as the "
            "first"
        )
    if not isinstance(value, str):
        return f"the winner is {type(value).__name__}, not text"
    if len(value) > 200:
        return "the winner is a long text"
    first = WINNERS.get(value.strip().lower())
    if first is None:
        first = _named(row, value)
    return f"the winner is {value[:40]!r}, not a, b or tie" if first is None else Verdict(first)


def _named(row: RowDict, value: str) -> float | None:
    """Of a winner that is a column's name or what stands in `model_a` or `model_b`."""
    for two in (
        [row.get(key) is row.get(value) for key in ("response_a", "response_b")],
        [isinstance(m := row.get(key), str) and m == value for key in ("model_a", "model_b")],
    ):
        if sum(two) == 1 and value:
            return float(two[0])
    return None


def read_choice(row: RowDict) -> Verdict | str:
    """The better response's index."""
    index = number(row["choice"])
    if index not in (0, 1):
        return f"the choice is {_shown(row['choice'])}, not 0 or 1"
    return Verdict(1.0 - index)


def _refuse_choice(rows: Sequence[RowDict], asked: Collection[str]) -> str | None:
    found = {number(row.get("choice")) for row in rows}
    if 2 in found and 0 not in found:
        why, instead = "the better response's index is 1 or 2, never 0", "make it 0 or 1"
    elif "choice" not in asked and any(key in row for row in rows for key in NUMBERED):
        why = "the responses are called 1 and 2, and so may be the better one in '...'"
        instead = "pass columns={'choice': '...'} if 0 is the first one"
    else:
        return None
    return f"{why}: {instead}, or write a text (a, b) to read with columns={{'winner': '...'}}"


NUMBERED = ("response_2", "response2", "answer_2", "completion_2", "output_2")


def read_strength(row: RowDict) -> Verdict | str:
    """A number: below 0 the first is better, above 0 the second, 0 is a tie."""
    strength = number(row["strength"])
    if strength is None:
        return f"the strength of the preference is {_shown(row['strength'])}, not a number"
    return Verdict(0.5 if strength == 0 else float(strength < 0), abs(strength))


def _refuse_strength(rows: Sequence[RowDict], asked: Collection[str]) -> str | None:
    found = [s for row in rows if (s := number(row.get("strength"))) is not None]
    if "strength" in asked or len(found) < 10 or min(found) < 0:
        return None
    return (
        "no number in '...' is below 0, which would say that the first response is the better one: "
        "this may be a scale that begins at 0 or 1; subtract its middle, or pass "
        "columns={'strength': '...'} if the second response is indeed always the better one"
    )


def read_labels(row: RowDict) -> Verdict | str:
    """SHP: 1 is the first response, 0 the second."""
    label = number(row["labels"])
    if label not in (0, 1):
        return f"the label is {_shown(row['labels'])}, not 0 or 1"
    return Verdict(label)


def _refuse_labels(rows: Sequence[RowDict], asked: Collection[str]) -> str | None:
    if "labels" in asked or any("human_ref_A" in row for row in rows):
        return None
    return (
        "the numbers in '...' may be 1 for the first response or an index: pass "
        "columns={'labels': '...'} if 1 is the first, or columns={'choice': '...'} if 0 is"
    )


def read_flags(row: RowDict) -> Verdict | str:
    """One column each that is 1 if the first won, if the second did, and if it was a tie."""
    flags = [_flag(row.get(key)) for key in ("winner_a", "winner_b", "winner_tie")]
    if None in flags[:2] or (flags[2] is None and row.get("winner_tie") is not None):
        return "a winner column is not 0 or 1"
    if sum(flag or 0 for flag in flags) != 1:
        return "not exactly one winner column is 1"
    return Verdict(1.0 if flags[0] else 0.0 if flags[1] else 0.5)


def _flag(value: Any) -> int | None:
    if isinstance(value, str):
        value = {"true": 1, "false": 0}.get(value.strip().lower()[:5], value)
    value = number(int(value) if isinstance(value, bool) else value)
    return int(value) if value in (0, 1) else None


def read_scores(row: RowDict) -> Verdict | str:
    """A score for each: more is better, equal ones are a tie."""
    first, second = number(row["score_a"]), number(row["score_b"])
    if first is None or second is None:
        return "a score is not a number"
    return Verdict(0.5 if first == second else float(first > second), abs(first - second))


def _shown(value: Any) -> str:
    basic = isinstance(value, int | float) and not abs(value) > 1e9
    return repr(value) if basic else repr(value[:20]) if isinstance(value, str) else "no number"


SCORES: Names = {
    "score_a": ("score_a", "score_A", "score_0", "score_1", "score1"),
    "score_b": ("score_b", "score_B", "score_1", "score_2", "score2"),
}
KINDS = [
    Kind(
        "choices by winner",
        CHOICES,
        {"winner": ("winner", "preference", "preferred", "better", "label", "choice")},
        ("winner",),
        "'winner' says which (a, b, tie)",
        read_winner,
    ),
    Kind(
        "choices by index",
        CHOICES,
        {
            "choice": (
                *("choice", "better_response_id", "chosen_index", "preferred_index"),
                *("choice_index", "better_index", "best_index"),
            ),
            "other": ("safer_response_id", "better_response_id"),
        },
        ("choice",),
        "'choice' is the index of the better one, 0 or 1",
        read_choice,
        refuse=_refuse_choice,
    ),
    Kind(
        "choices by strength",
        CHOICES,
        {"strength": ("strength", "overall_preference", "preference_strength")},
        ("strength",),
        "'strength' below 0 says the first, above 0 the second, 0 is a tie",
        read_strength,
        refuse=_refuse_strength,
    ),
    Kind(
        "choices by labels",
        CHOICES,
        {"labels": (), "margin": ("margin", "score_ratio"), **SCORES},
        ("labels",),
        "'labels' 1 says the first, 0 the second",
        read_labels,
        refuse=_refuse_labels,
    ),
    Kind(
        "choices by flags",
        CHOICES,
        {
            "winner_a": ("winner_model_a", "winner_a"),
            "winner_b": ("winner_model_b", "winner_b"),
            "winner_tie": ("winner_tie",),
        },
        ("winner_a", "winner_b"),
        "'winner_a', 'winner_b' or 'winner_tie' is 1",
        read_flags,
    ),
    Kind(
        "choices by score",
        RATED,
        SCORES,
        ("score_a", "score_b"),
        "the one with the higher score is better",
        read_scores,
    ),
]
