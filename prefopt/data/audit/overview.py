"""What preference pairs look like: lengths, margins, sources, and single pairs as a model sees
them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from prefopt.data.audit.facts import UNLIMITED, prompt_text, spoken, token_facts
from prefopt.data.chunks import check_limits
from prefopt.data.encode import encode_pairs, preview
from prefopt.data.encoded import Encoded
from prefopt.data.records import Pair
from prefopt.data.template import choose_template
from prefopt.data.tokens import decode
from prefopt.errors import InputError

SIDES = ("prompt", "chosen", "rejected")
SOURCES = 12  # most sources that are named, the others as one
QUANTILES = {"median": 0.5, "90%": 0.9, "99%": 0.99}


def overview(
    pairs: Sequence[Pair], tokenizer: Any, *, max_length: int = 1024, template: str = "auto"
) -> dict[str, Any]:
    """Counts and lengths of pairs, JSON-ready.

    `lengths`: unit -> side -> mean, quantiles and maximum; tokens of a response include its EOS.
    `histogram`: `bins` of tokens and per side how many pairs are in each. `encoding`: what
    becomes of the pairs at `max_length`.
    """
    check_limits(tokenizer, max_length)
    characters, sources = np.zeros((len(pairs), 3), np.int64), Counter[str]()
    margins, preferences = [], []
    for i, pair in enumerate(pairs):
        replies = (spoken(side) for side in (pair.chosen, pair.rejected))
        characters[i] = [len(text) for text in (prompt_text(pair.prompt), *replies)]
        if pair.source is not None:
            sources[pair.source] += 1
        if pair.margin is not None:
            margins.append(pair.margin)
        if pair.preference != 1:
            preferences.append(pair.preference)
    tokens, encoding = _encoded(pairs, tokenizer, max_length, template)
    return {
        "pairs": len(pairs),
        "sources": _first(sources),
        "margins": _spread(margins),
        "preferences": _spread(preferences),
        "template": str(choose_template(tokenizer, template)),
        "encoding": encoding,
        "lengths": {"characters": _lengths(characters), "tokens": _lengths(tokens)},
        "histogram": _histogram(tokens),
    }


def _encoded(
    pairs: Sequence[Pair], tokenizer: Any, max_length: int, template: str
) -> tuple[np.ndarray, dict[str, int]]:
    """(tokens [n, 3] before truncation, how many pairs encoding at max_length keeps, and why not
    the others)."""
    encoded = encode_pairs(pairs, tokenizer, max_length=UNLIMITED, template=template)
    facts = token_facts(len(pairs), encoded, tokenizer, max_length)
    left_out = facts.no_room | facts.difference_cut
    counts = {
        "max_length": max_length,
        "kept": int((~facts.dropped & ~left_out).sum()),
        "with a truncated response": int((facts.cut & ~left_out).sum()),
        "left out, the prompt fills max_length": int(facts.no_room.sum()),
        "left out, the difference is cut off": int(facts.difference_cut.sum()),
        **{name: count for name, count in encoded.counts.items() if name != "truncated"},
    }
    return facts.tokens[~facts.dropped], {name: n for name, n in counts.items() if n}


def _first(sources: Counter[str]) -> dict[str, int]:
    named = dict(sources.most_common(SOURCES))
    others = sources.total() - sum(named.values())
    return named | ({f"{len(sources) - len(named)} others": others} if others else {})


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    low, middle, high = np.quantile(values, [0, 0.5, 1]).tolist()
    mean = float(np.mean(values))
    return {"pairs": len(values), "least": low, "median": middle, "mean": mean, "most": high}


def _lengths(lengths: np.ndarray) -> dict[str, dict[str, float]]:
    """[n, 3] -> side -> mean, quantiles, maximum."""
    quantiles = np.quantile(lengths, list(QUANTILES.values()), axis=0)
    rows = [lengths.mean(axis=0), *quantiles, lengths.max(axis=0)]
    names = ["mean", *QUANTILES, "max"]
    return {
        side: {name: float(row[k]) for name, row in zip(names, rows, strict=True)}
        for k, side in enumerate(SIDES)
    }


def _histogram(tokens: np.ndarray) -> dict[str, Any]:
    """How many pairs have so many tokens, in bins that double, from the first that is not empty to
    the last."""
    bits = np.ceil(np.log2(np.maximum(tokens, 1))).astype(np.int64)
    first, last = int(bits.min()), int(bits.max())
    bins = [f"{2 ** (b - 1) + 1:,} to {2**b:,}" if b > 1 else f"{b + 1}" for b in range(last + 1)]
    counts = {
        side: np.bincount(bits[:, k], minlength=last + 1)[first:].tolist()
        for k, side in enumerate(SIDES)
    }
    return {"bins": bins[first:], "counts": counts}


def as_seen(
    pair: Pair, tokenizer: Any, *, max_length: int = 1024, template: str = "auto"
) -> tuple[str, list[tuple[str, str]]]:
    """(what encoding does to a pair, its segments as (kind, text)): "prompt", "chosen" and
    "rejected" as the model sees them, "eos", and "cut off" for what is behind `max_length`."""
    try:
        encoded = encode_pairs([pair], tokenizer, max_length=UNLIMITED, template=template)
    except InputError as error:
        return str(error), [(side, _text(pair, side)) for side in SIDES]
    (whole,), facts = encoded, token_facts(1, encoded, tokenizer, max_length)
    prompt, chosen, rejected = facts.tokens[0]
    says, room = f"{prompt:,} + {chosen:,} and {rejected:,} tokens", max_length - prompt
    if facts.no_room[0]:
        says, room = f"{says}; left out, the prompt fills max_length {max_length:,}", 0
    elif facts.difference_cut[0]:
        says += f"; left out, nothing of the difference is within max_length {max_length:,}"
    segments: list[tuple[str, str]] = []
    for side, k in (("chosen", 0), ("rejected", 1)):
        masks = whole.scored or (None, None)
        one = replace(whole, responses=whole.responses[k : k + 1], scored=(masks[k],))
        shown = preview(_within(one, room), tokenizer) if room else preview(one, tokenizer)[:1]
        segments += [(side if kind == "response" else kind, text) for kind, text in shown[k > 0 :]]
        if segments[-1][0] == "truncated":
            segments.pop()
        if len(one.responses[0]) > room:
            segments.append(("cut off", decode(one.responses[0][room:], tokenizer)))
    return says, segments


def _within(one: Encoded, room: int) -> Encoded:
    """The first `room` tokens of its one response."""
    ((mask,), (response,)) = one.scored or (None,), one.responses
    return replace(
        one, responses=(response[:room],), scored=(mask if mask is None else mask[:room],)
    )


def _text(pair: Pair, side: str) -> str:
    return "\n".join(f"{m.role}: {m.content}" for m in getattr(pair, side))
