"""What is wrong with preference pairs: `examine` looks for everything in `checks.CHECKS`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from prefopt.data.audit.checks import CHECKS
from prefopt.data.audit.facts import MARKS, UNLIMITED, TokenFacts, gather, token_facts
from prefopt.data.audit.findings import EXAMPLES, Book, Diagnosis, Finding
from prefopt.data.audit.labels import decided, note_labels
from prefopt.data.audit.leaks import (
    HeldOut,
    benchmark_index,
    note_benchmarks,
    note_held_out,
    note_prompts,
)
from prefopt.data.chunks import check_limits
from prefopt.data.encode import encode_pairs
from prefopt.data.prompts import Prompts
from prefopt.data.sources import Preferences
from prefopt.data.template import choose_template
from prefopt.data.tokens import special_tokens
from prefopt.errors import InputError

BIASED = (0.45, 0.55)  # an interval of "longer wins" wholly outside is worth a warning
USABLE = 0.1  # share of rows that cannot be used from which on something is wrong with all
# Why reading leaves a row out -> the check that this is.
READING = {
    "identical": "identical pairs",
    "all responses are the same text": "identical pairs",
    "contexts differ": "context mismatch",
    "tie": "ties",
}


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
    index = benchmark_index(benchmarks)
    facts = gather(pairs, special_tokens(tokenizer).values(), index)
    book = Book(pairs)
    _reading(book)
    note_labels(book, facts, ties)
    lengths = {"characters": longer_wins(facts.chars[:, 1:], decided(facts))}
    for name in MARKS:
        book.note(name, facts.marks[name])
    note_prompts(book, facts)
    held_name = note_held_out(book, facts, held_out, eval_fraction)
    note_benchmarks(book, facts, benchmarks)
    tokens = _tokens(book, tokenizer, max_length, template)
    if tokens is not None:
        encoded = decided(facts) & ~tokens.dropped
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


def _reading(book: Book) -> None:
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


def _tokens(book: Book, tokenizer: Any, max_length: int, template: str) -> TokenFacts | None:
    try:
        encoded = encode_pairs(book.pairs, tokenizer, max_length=UNLIMITED, template=template)
    except InputError as error:
        book.note("nothing to encode", np.ones(len(book.pairs), bool), detail=str(error))
        return None
    tokens = token_facts(len(book.pairs), encoded, tokenizer, max_length)
    why = [
        f"{k.removeprefix('dropped: ')} ({n:,})"
        for k, n in encoded.counts.items()
        if k.startswith("dropped")
    ]
    book.note("same in tokens", tokens.dropped, detail="; ".join(why))
    book.note("no room for a response", tokens.no_room)
    book.note("whole difference cut off", tokens.difference_cut)
    book.note("truncated responses", tokens.cut & ~tokens.difference_cut)
    book.note("EOS inside a response", tokens.eos_inside)
    book.note("BOS twice", tokens.bos_twice)
    return tokens


def _length_bias(book: Book, lengths: dict[str, dict[str, Any]]) -> None:
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
