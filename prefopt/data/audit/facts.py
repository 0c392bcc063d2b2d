"""What the doctor keeps of every pair: hashes, lengths and marks, never its texts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import numpy as np

from prefopt.data.audit.near import Ngrams, band_keys, plain
from prefopt.data.conversations import MARKER
from prefopt.data.encoded import Encoded, EncodedSet
from prefopt.data.records import SPOKEN, Message, Pair

UNLIMITED = 2**30  # tokens: a max_length that cuts nothing
SHORT = 10  # characters below which a reply counts as very short
# What opens or closes a turn in some format, and is text where it stands inside one.
MARKERS = (
    *("Human:", "Assistant:", "\nUSER:", "\nASSISTANT:", "### Human", "### Assistant"),
    *("### Instruction", "### Response", "[INST]", "[/INST]", "<<SYS>>"),
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|eot_id|>", "<|begin_of_text|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>"),
    *("<|endoftext|>", "<extra_id_1>"),
)
_LINE_MARKER = re.compile(r"(?<!\n)\n(?:Human|Assistant):")
_ENTITY = re.compile(r"&(?:amp|lt|gt|quot|apos|nbsp|#\d{1,7}|#x[0-9a-fA-F]{1,6});")
# U+FFFD and NUL, and UTF-8 that was read as Latin-1 or CP-1252.
_DAMAGED = ("\ufffd", "\x00", "\u00e2\u20ac", "\u00c3\u00a9", "\u00c3\u00a8", "\u00c3\u00bc")
_OWN = {"user": "Human", "assistant": "Assistant"}
MARKS = (  # the checks of `checks.CHECKS` that look at the texts of one pair
    *("empty chosen response", "empty rejected response", "very short replies", "empty prompts"),
    *("parting early", "roles do not alternate", "role markers inside turns"),
    *("single-newline markers", "special tokens in texts", "HTML entities", "damaged text"),
)


@dataclass
class Facts:
    """Arrays over n pairs, D distinct prompts and the prompts held out or in a benchmark.

    `prompt`, `chosen`, `rejected` [n] uint64: hashes. `chars` [n, 3]: characters of the prompt and
    of what the model writes in chosen and rejected. `marks`: name -> [n] bool. `distinct` [D]: the
    first pair of every prompt, `group` [n]: which prompt a pair has; `bands` [D, BANDS] and `texts`
    [D] (hash of the plain text) are of prompts. `overlap` [n, 2]: which benchmark prompt (-1: none)
    and whether it is the same word for word.
    """

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    chars: np.ndarray
    margin: np.ndarray
    preference: np.ndarray
    marks: dict[str, np.ndarray]
    distinct: np.ndarray
    group: np.ndarray
    bands: np.ndarray
    texts: np.ndarray
    overlap: np.ndarray


def gather(
    pairs: Sequence[Pair], special_tokens: Iterable[str] = (), benchmark: Ngrams | None = None
) -> Facts:
    """The facts of pairs, in one pass."""
    n, special = len(pairs), tuple(filter(str.strip, special_tokens))
    keys, chars = np.zeros((n, 3), np.uint64), np.zeros((n, 3), np.int64)
    margin, preference = np.full(n, np.nan), np.ones(n)
    marks = {name: np.zeros(n, bool) for name in MARKS}
    overlap, group = np.full((n, 2), -1, np.int64), np.zeros(n, np.int64)
    seen: dict[int, int] = {}
    distinct, bands, texts, overlaps = [], [], [], []
    for i, pair in enumerate(pairs):
        sides = (pair.prompt, pair.chosen, pair.rejected)
        keys[i] = [_key(side) for side in sides]
        chars[i] = [len(prompt_text(pair.prompt)), *(len(spoken(side)) for side in sides[1:])]
        margin[i] = np.nan if pair.margin is None else pair.margin
        preference[i] = pair.preference
        for name in _marks(pair, special):
            marks[name][i] = True
        own = int(keys[i, 0])
        if own not in seen:
            seen[own] = len(distinct)
            text = prompt_text(pair.prompt)
            distinct.append(i)
            bands.append(band_keys(text))
            texts.append(text_key(text))
            found = benchmark.inside(text) if benchmark else None
            overlaps.append((found.item, found.exact) if found else (-1, 0))
        group[i] = seen[own]
        overlap[i] = overlaps[group[i]]
    return Facts(
        keys[:, 0], keys[:, 1], keys[:, 2], chars, margin, preference, marks,
        np.array(distinct, np.int64), group, np.array(bands, np.uint64),
        np.array(texts, np.uint64), overlap,
    )  # fmt: skip


def prompt_text(prompt: Sequence[Message]) -> str:
    """What is asked, without what stands above many prompts: system turns and tools."""
    turns = [m for m in prompt if m.role not in ("system", "developer", "tools")] or prompt
    return "\n".join(turn.content for turn in turns)


def text_key(text: str) -> int:
    return _digest(plain(text))


def spoken(side: Sequence[Message]) -> str:
    """What the model writes of a response."""
    return "\n".join(turn.content for turn in side if turn.role in SPOKEN)


def _key(side: Sequence[Message]) -> int:
    return _digest("\x1e".join(f"{role}\x1f{content}" for role, content in side))


def _digest(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "replace"), digest_size=8).digest())


# --- marks of one pair -------------------------------------------------------------------------


def _marks(pair: Pair, special: Sequence[str]) -> Iterable[str]:
    replies = [spoken(side).strip() for side in (pair.chosen, pair.rejected)]
    turns = [*pair.prompt, *pair.chosen, *pair.rejected]
    if not replies[0]:
        yield "empty chosen response"
    if not replies[1]:
        yield "empty rejected response"
    if any(reply and len(reply) < SHORT for reply in replies):
        yield "very short replies"
    if not any(m.content.strip() for m in pair.prompt if m.role == "user"):
        yield "empty prompts"
    if any(m.role not in SPOKEN for m in (*pair.chosen, *pair.rejected)):
        yield "parting early"
    bodies, repeated = [], False
    for role, content in turns:
        body = _without_repeats(role, content)
        repeated |= body is not content
        bodies.append(body)
    if repeated or any(
        not _alternates([*pair.prompt, *side]) for side in (pair.chosen, pair.rejected)
    ):
        yield "roles do not alternate"
    everything = "\x1e".join(bodies)
    if any(marker in everything for marker in MARKERS):
        yield "role markers inside turns"
        if _LINE_MARKER.search(everything):
            yield "single-newline markers"
    if any(token in everything for token in special):
        yield "special tokens in texts"
    if "&" in everything and _ENTITY.search(everything):
        yield "HTML entities"
    if any(sign in everything for sign in _DAMAGED):
        yield "damaged text"


def _without_repeats(role: str, content: str) -> str:
    """A turn without the transcript markers of its own speaker, which stand where he takes the word
    a second time; the very same object if there are none."""
    if "Human:" not in content and "Assistant:" not in content:
        return content
    own = _OWN.get(role)
    out = MARKER.sub(lambda m: "" if m[0][:2] == "\n\n" and m[1] == own else m[0], content)
    return content if out == content else out


def _alternates(turns: Sequence[Message]) -> bool:
    """Whether nobody speaks twice in a row; a call of tools belongs to the turn before it."""
    return not any(a.role == b.role and a.role in _OWN for a, b in pairwise(turns))


# --- in tokens ---------------------------------------------------------------------------------


@dataclass
class TokenFacts:
    """Arrays over n pairs, of what encoding without a limit makes of them and `max_length` then
    removes. `tokens` [n, 3]: of prompt, chosen and rejected, EOS included; -1 where dropped."""

    tokens: np.ndarray
    dropped: np.ndarray
    no_room: np.ndarray
    cut: np.ndarray
    difference_cut: np.ndarray
    eos_inside: np.ndarray
    bos_twice: np.ndarray


def token_facts(n: int, encoded: EncodedSet, tokenizer: Any, max_length: int) -> TokenFacts:
    """The facts of n pairs that were encoded with no limit on their length."""
    flags = np.zeros((6, n), bool)
    facts = TokenFacts(np.full((n, 3), -1, np.int64), *flags)
    facts.dropped[:] = True
    for item in encoded:
        i, room = item.index, max_length - len(item.prompt)
        sizes = [len(response) for response in item.responses]
        facts.tokens[i] = [len(item.prompt), *sizes]
        facts.dropped[i] = False
        facts.no_room[i] = room <= 0
        facts.cut[i] = room > 0 and max(sizes) > room
        facts.difference_cut[i] = facts.cut[i] and not _differs(item, room)
        facts.eos_inside[i] = _eos_inside(item, tokenizer.eos_token_id)
        facts.bos_twice[i] = _bos_twice(item, tokenizer)
    return facts


def _differs(item: Encoded, room: int) -> bool:
    """Whether what is scored of the two responses differs within the first `room` tokens, and is
    there at all."""
    sides = [response[:room] for response in item.responses]
    if item.scored is not None:
        masks = [mask if mask is None else mask[:room] for mask in item.scored]
        sides = [s if m is None else s[m] for s, m in zip(sides, masks, strict=True)]
    return all(map(len, sides)) and not np.array_equal(sides[0], sides[1])


def _eos_inside(item: Encoded, eos: int) -> bool:
    """In a response of one turn; between turns it is where the template puts it."""
    masks = item.scored or (None,) * len(item.responses)
    return any(
        mask is None and bool((response[:-1] == eos).any())
        for response, mask in zip(item.responses, masks, strict=True)
    )


def _bos_twice(item: Encoded, tokenizer: Any) -> bool:
    """At the start of the prompt, or once more in a response, where BOS is a token of its own."""
    bos = tokenizer.bos_token_id
    if bos is None or bos == tokenizer.eos_token_id:
        return False
    twice = len(item.prompt) > 1 and (item.prompt[:2] == bos).all()
    return bool(twice or any((response == bos).any() for response in item.responses))
