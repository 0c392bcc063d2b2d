"""What is wrong with preference pairs: `examine` looks for everything in `checks.CHECKS`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from prefopt.data.checks import CHECKS, SEVERITIES, Check
from prefopt.data.chunks import check_limits
from prefopt.data.encode import encode_pairs
from prefopt.data.facts import (
    UNLIMITED,
    Facts,
    TokenFacts,
    gather,
    prompt_text,
    text_key,
    token_facts,
)
from prefopt.data.near import Ngrams, band_keys, neighbours
from prefopt.data.prompts import Prompts
from prefopt.data.records import DataReport
from prefopt.data.sources import Preferences
from prefopt.data.split import split_pairs
from prefopt.data.template import choose_template
from prefopt.data.tokens import special_tokens
from prefopt.errors import InputError

EXAMPLES = 5
BIASED = (0.45, 0.55)  # an interval of "longer wins" wholly outside is worth a warning
USABLE = 0.1  # share of rows that cannot be used from which on something is wrong with all
# Why reading leaves a row out -> the check that this is.
READING = {
    "identical": "identical pairs",
    "all responses are the same text": "identical pairs",
    "contexts differ": "context mismatch",
    "tie": "ties",
}


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


class HeldOut(NamedTuple):
    """Prompts to keep apart from the pairs: what they are, and a sequence with `where`."""

    name: str
    prompts: Preferences | Prompts


def examine(
    pairs: Preferences,
    tokenizer: Any,
    *,
    max_length: int = 1024,
    template: str = "auto",
    ties: str = "drop",
    held_out: HeldOut | None = None,
    eval_fraction: float = 0.1,
    benchmarks: Sequence[Prompts] = (),
) -> Diagnosis:
    """Look for everything in CHECKS; only hashes and numbers of the pairs are held in memory.

    `pairs` should be read with ties="soft", so that ties can be seen; `ties` says what becomes of
    them in a cleaned copy. `held_out`: prompts that must not occur here; None: those that training
    would hold out by `eval_fraction`. `benchmarks`: prompts that must not occur here either.
    Raises InputError for a tokenizer without EOS and a template that there is not.
    """
    check_limits(tokenizer, max_length)
    chosen_template = str(choose_template(tokenizer, template))
    asked = [(b.report.source, b, i) for b in benchmarks for i in range(len(b))]
    index = Ngrams(prompt_text(b[i]) for _, b, i in asked) if asked else None
    facts = gather(pairs, special_tokens(tokenizer).values(), index)
    book = _Book(pairs)
    _reading(book)
    _labels(book, facts, ties)
    lengths = {"characters": longer_wins(facts.chars[:, 1:], _decided(facts))}
    _texts(book, facts)
    _prompts(book, facts)
    held_name = _held_out(book, facts, held_out, eval_fraction)
    if index:
        at = [f"{b.where(i)}" for _, b, i in asked]
        inside = facts.overlap[:, 0] >= 0
        exact = inside & (facts.overlap[:, 1] == 1)
        like = lambda i: at[facts.overlap[i, 0]]  # noqa: E731
        book.note("benchmark prompts", exact, like=like)
        book.note("overlap with a benchmark", inside & ~exact, like=like)
    tokens = _tokens(book, facts, tokenizer, max_length, template)
    if tokens is not None:
        encoded = _decided(facts) & ~tokens.dropped
        lengths["tokens"] = longer_wins(tokens.tokens[:, 1:], encoded)
    _length_bias(book, lengths)
    checked = [name for name in CHECKS if index or "benchmark" not in name]
    return Diagnosis(
        pairs.report, book.sorted(), [c for c in checked if c not in book.findings], lengths,
        held_name, chosen_template, ~book.drop,
    )  # fmt: skip


def longer_wins(lengths: np.ndarray, use: np.ndarray) -> dict[str, Any]:
    """Of the pairs with `use` [n] whose `lengths` [n, 2] differ, the share in which chosen is the
    longer one, with its 95% Wilson interval (null where there are none), and the mean lengths."""
    chosen, rejected = lengths[use].T
    longer, shorter = int((chosen > rejected).sum()), int((chosen < rejected).sum())
    n = longer + shorter
    out: dict[str, Any] = {"longer": longer, "shorter": shorter, "equal": len(chosen) - n}
    out |= {"share": None, "low": None, "high": None}
    if n:
        z, share = 1.959964, longer / n
        middle, spread = share + z * z / (2 * n), share * (1 - share) / n + (z / (2 * n)) ** 2
        low, high = ((middle + sign * z * math.sqrt(spread)) / (1 + z * z / n) for sign in (-1, 1))
        out |= {
            "share": share,
            "low": max(min(low, share), 0.0),
            "high": min(max(high, share), 1.0),
        }
    means = (float(side.mean()) if len(side) else None for side in (chosen, rejected))
    return out | dict(zip(("mean_chosen", "mean_rejected"), means, strict=True))


# --- the parts of an examination ---------------------------------------------------------------


class _Book:
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


def _reading(book: _Book) -> None:
    """What reading left out."""
    report = book.pairs.report
    for reason, count in report.dropped.items():
        check = READING.get(reason, "unusable rows")
        if "Unicode" in reason:
            check = "text that is not Unicode"
        finding = book.findings.setdefault(
            check, Finding(check, CHECKS[check].severity, 0, report.rows, "rows")
        )
        finding.count += count
        finding.dropped += count
        finding.examples = [*finding.examples, report.dropped_at[reason]][:EXAMPLES]
    if unusable := book.findings.get("unusable rows"):
        why = {r: n for r, n in report.dropped.items() if r not in READING and "Unicode" not in r}
        first = sorted(why.items(), key=lambda item: -item[1])[:EXAMPLES]
        parts = [f"{reason} ({count:,})" for reason, count in first]
        others = unusable.count - sum(count for _, count in first)
        parts += [f"{len(why) - len(first)} other reasons ({others:,})"] if others else []
        unusable.detail = "; ".join(parts)
        if unusable.count > USABLE * report.rows:
            unusable.severity = "error"


def _decided(facts: Facts) -> np.ndarray:
    return facts.preference != 0.5


def _labels(book: _Book, facts: Facts, ties: str) -> None:
    decided = _decided(facts)
    tied = ~decided
    book.note("ties", tied, drop=tied if ties == "drop" else np.zeros_like(tied))
    book.note("ratings against the label", decided & (facts.margin < 0))
    low, high = np.minimum(facts.chosen, facts.rejected), np.maximum(facts.chosen, facts.rejected)
    same = _groups(facts.prompt, low, high)
    # The probability that the response with the lower hash is the better one.
    odds = np.where(facts.chosen == low, facts.preference, 1 - facts.preference).round(9)
    book.note("duplicate pairs", _repeats(_groups(same, odds)))
    ups, downs = (np.bincount(same, weights=side)[same] for side in (odds > 0.5, odds < 0.5))
    conflict = decided & (ups > 0) & (downs > 0)
    minority = conflict & ((ups == downs) | ((odds > 0.5) != (ups > downs)))
    book.note("conflicting labels", conflict, drop=minority)
    book.note("chosen here, rejected there", _both_ways(facts, decided & ~conflict))


def _both_ways(facts: Facts, use: np.ndarray) -> np.ndarray:
    """Which of the pairs of `use` [n] have a response that wins in one of them and loses in
    another."""
    n, flipped = len(use), facts.preference < 0.5
    better = np.where(flipped, facts.rejected, facts.chosen)
    worse = np.where(flipped, facts.chosen, facts.rejected)
    sides = _groups(np.tile(facts.prompt, 2), np.concatenate([better, worse]))
    won, lost = (np.bincount(sides[part], weights=use, minlength=2 * n)[sides] > 0
                 for part in (slice(n), slice(n, None)))  # fmt: skip
    both = won & lost
    return use & (both[:n] | both[n:])


def _groups(*columns: np.ndarray) -> np.ndarray:
    """[n] -> [n]: the number of the distinct row that each row of these columns is."""
    out = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        _, own = np.unique(column, return_inverse=True)
        _, out = np.unique(out * (own.max(initial=0) + 1) + own, return_inverse=True)
    return out


def _repeats(groups: np.ndarray) -> np.ndarray:
    """Which rows are of a group that an earlier row is of."""
    again = np.ones(len(groups), bool)
    again[np.unique(groups, return_index=True)[1]] = False
    return again


def _texts(book: _Book, facts: Facts) -> None:
    book.note("empty chosen response", facts.marks["empty chosen"])
    book.note("empty rejected response", facts.marks["empty rejected"])
    book.note("parting early", facts.marks["parts early"])
    book.note("empty prompts", facts.marks["empty prompt"])
    book.note("roles do not alternate", facts.marks["alternation"])
    book.note("role markers inside turns", facts.marks["role marker"])
    book.note("single-newline markers", facts.marks["line marker"])
    book.note("damaged text", facts.marks["damaged"])
    book.note("HTML entities", facts.marks["entity"])
    book.note("very short replies", facts.marks["short reply"])
    book.note("special tokens in texts", facts.marks["special token"])


def _prompts(book: _Book, facts: Facts) -> None:
    book.note("duplicate prompts", _repeats(facts.group))
    own = _Prompts(book.pairs, facts.distinct)
    found = neighbours(facts.bands, own.text)
    near = _mask(found, len(facts.distinct))[facts.group] & ~_repeats(facts.group)
    book.note("near-duplicate prompts", near, like=lambda i: own.where(found[facts.group[i]]))


def _held_out(book: _Book, facts: Facts, held_out: HeldOut | None, fraction: float) -> str:
    """Prompts that stand on both sides, and those that nearly do; what was held out."""
    pairs, mine = book.pairs, len(facts.distinct)
    own = _Prompts(pairs, facts.distinct)
    bands, texts, name = facts.bands, facts.texts, "nothing"
    held = np.zeros(mine, bool)
    other = own
    if held_out is not None:
        name, records = held_out
        name, other = f"{name}, {len(records):,} prompts", _Prompts(records, range(len(records)))
        theirs = [(band_keys(text), text_key(text)) for text in map(other.text, other.at)]
        bands = np.concatenate([bands, np.array([keys for keys, _ in theirs])])
        texts = np.concatenate([texts, np.array([key for _, key in theirs], np.uint64)])
        held = np.arange(len(texts)) >= mine
    elif fraction:
        name = f"{fraction:.0%} of the prompts, by their hash, as in training"
        held[facts.group[split_pairs(pairs, fraction)[1]]] = True
    start = mine if held_out is not None else 0  # of the other's prompts among all
    near = neighbours(bands, lambda d: own.text(d) if d < mine else other.text(d - start), held)
    # Training holds out by the whole prompt, so the same words in other letters are a near miss.
    same = np.isin(texts, texts[held]) & ~held if held_out else np.zeros(len(texts), bool)
    near = {d: j for d, j in near.items() if not same[d]}
    equal = {
        d: int(np.flatnonzero(held & (texts == texts[d]))[0]) for d in np.flatnonzero(same).tolist()
    }
    for check, found in (
        ("held-out prompts", equal),
        ("near-duplicates of held-out prompts", near),
    ):
        hit = _mask(found, len(held))[:mine][facts.group]
        like = {d: other.where(j - start) for d, j in found.items()}
        book.note(check, hit, like=lambda i, like=like: like[facts.group[i]])
    return name


class _Prompts(NamedTuple):
    """Some prompts of a source: what they ask and where they stand."""

    source: Preferences | Prompts
    at: Sequence[int] | np.ndarray

    def text(self, d: int) -> str:
        record: Any = self.source[self.at[d]]
        return prompt_text(getattr(record, "prompt", record))

    def where(self, d: int) -> str:
        return self.source.where(self.at[d])


def _mask(found: dict[int, int], size: int) -> np.ndarray:
    out = np.zeros(size, bool)
    out[list(found)] = True
    return out


def _tokens(
    book: _Book, facts: Facts, tokenizer: Any, max_length: int, template: str
) -> TokenFacts | None:
    try:
        encoded = encode_pairs(book.pairs, tokenizer, max_length=UNLIMITED, template=template)
    except InputError as error:
        book.note("nothing to encode", np.ones(len(facts.prompt), bool), detail=str(error))
        return None
    tokens = token_facts(len(book.pairs), encoded, tokenizer, max_length)
    why = [f"{k.removeprefix('dropped: ')} ({n:,})" for k, n in encoded.counts.items() if "dr" in k]
    book.note("same in tokens", tokens.dropped, detail="; ".join(why))
    book.note("no room for a response", tokens.no_room)
    book.note("whole difference cut off", tokens.difference_cut)
    book.note("truncated responses", tokens.cut & ~tokens.difference_cut)
    book.note("EOS inside a response", tokens.eos_inside)
    book.note("BOS twice", tokens.bos_twice)
    return tokens


def _length_bias(book: _Book, lengths: dict[str, dict[str, Any]]) -> None:
    """Always said, where lengths differ; a warning where one side clearly wins."""
    told = lengths["characters"]
    if told["share"] is None:
        return
    far = any(
        t["low"] is not None and (t["low"] > BIASED[1] or t["high"] < BIASED[0])
        for t in lengths.values()
    )
    parts = [
        f"in {unit}, the longer one wins {t['share']:.1%} [{t['low']:.1%}, {t['high']:.1%}], "
        f"{t['mean_chosen']:.0f} on average against {t['mean_rejected']:.0f}"
        for unit, t in lengths.items()
        if t["share"] is not None
    ]
    book.findings["longer response chosen"] = Finding(
        "longer response chosen", "warning" if far else "info", told["longer"],
        told["longer"] + told["shorter"], "pairs of unequal length", detail="; ".join(parts),
    )  # fmt: skip
