"""Text to token ids, each piece of text once.

A tokenizer cuts a text at its special tokens before it does anything else, and what stands between
two of them is tokenised by itself. So a text is cut here first, in front of each special token that
a chat template writes, and each distinct piece of a chunk is tokenised once: a prompt that stands
in three texts costs one. Where a tokenizer has words (words.py), their ids are remembered. The ids
are those of the whole text (tests compare them); a tokenizer whose special tokens take in white
space or overlap is given the whole text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from prefopt.data.words import WORD, word_ids

WORDS = 1 << 16  # that are remembered: the first ones, which are the frequent ones


class TextTokenizer:
    """A tokenizer applied to the texts that a template (by name) writes.

    `turn_ends` [m]: ids of the tokens that may end a turn, the special ones.
    """

    def __init__(self, tokenizer: Any, template: str):
        self.tokenizer, self.template, self.eos = tokenizer, template, tokenizer.eos_token_id
        special = special_tokens(tokenizer)
        self.turn_ends = np.array(sorted(special.keys() - {tokenizer.unk_token_id}), np.int64)
        self._special = _any_of(special.values())
        self._blank: dict[bytes, bool] = {}
        # A chat template writes its own special tokens; other text gets those that the tokenizer
        # puts in front (BOS), never those it puts behind.
        start = [] if template == "chat" else start_ids(tokenizer)
        self.start = np.array(start, np.int32)
        self._cuts = _any_of(_cut_tokens(tokenizer))
        self._known: dict[str, bytes] = {}  # ids of words, where there are words
        self._word_ids = word_ids(tokenizer) if _whole_core(tokenizer) else None
        if self._word_ids is not None:
            bare_ids(["a"], tokenizer)  # turns padding and truncation of the tokenizer's file off
            self._added = _any_of(t.content for t in tokenizer.added_tokens_decoder.values())

    def __call__(self, texts: Iterable[str]) -> dict[str, np.ndarray]:
        """Ids [n] int32 of each text."""
        cut = {text: self._cut(text) for text in texts}
        pieces = list(dict.fromkeys(piece for parts in cut.values() for piece in parts))
        ids = self._ids(pieces) if self._word_ids is None else self._by_words(pieces)
        start = self.start.tobytes()
        return {
            text: np.frombuffer(start + b"".join([ids[part] for part in parts]), np.int32)
            for text, parts in cut.items()
        }

    def _ids(self, texts: list[str]) -> dict[str, bytes]:
        found = bare_ids(texts, self.tokenizer)
        return {text: _bytes(i) for text, i in zip(texts, found, strict=True)}

    def _by_words(self, pieces: list[str]) -> dict[str, bytes]:
        assert self._word_ids is not None
        parts = {piece: self._words(piece) for piece in pieces}
        heads = list({head for head, _ in parts.values()})
        new = list(set().union(*(words for _, words in parts.values())) - self._known.keys())
        core = self.tokenizer.backend_tokenizer  # without what transformers wraps around each text
        found = core.encode_batch_fast(heads, add_special_tokens=False)
        first = {head: _bytes(e.ids) for head, e in zip(heads, found, strict=True)}
        known = self._known if len(self._known) < WORDS else self._known.copy()
        known.update(zip(new, map(_bytes, self._word_ids(new)), strict=True))
        return {
            piece: b"".join([first[head], *map(known.__getitem__, words)])
            for piece, (head, words) in parts.items()
        }

    def _words(self, piece: str) -> tuple[str, list[str]]:
        """(what precedes the first space to cut at, the words behind it without their spaces): each
        is tokenised by itself. Where an added token stands inside, all of it is one."""
        match = self._cuts.match(piece)
        head = match.end() if match else 0
        if self._added.search(piece, head):
            return piece, []
        first, *words = WORD.split(piece[head:])  # a space behind a special token is no place
        return piece[:head] + first, words

    @cached_property
    def plain(self) -> TextTokenizer:
        """The same tokenizer for text that no template writes."""
        return TextTokenizer(self.tokenizer, "plain")

    def blank(self, ids: np.ndarray) -> bool:
        """Whether these tokens are nothing, or white space only."""
        key = ids[:8].tobytes()  # what ends a text is short, and the same in all
        if len(ids) > 8:
            return not decode(ids, self.tokenizer).strip()
        if key not in self._blank:
            self._blank[key] = not decode(ids, self.tokenizer).strip()
        return self._blank[key]

    def spelled_out(self, text: str) -> bool:
        """Whether a special token stands in the text, which the tokenizer will take for one."""
        return self._special.search(text) is not None

    def _cut(self, text: str) -> list[str]:
        at = [0, *(match.start() for match in self._cuts.finditer(text)), len(text)]
        return [text[a:b] for a, b in pairwise(at) if a < b]


def bare_ids(texts: list[str], tokenizer: Any, special: bool = False) -> list[list[int]]:
    """Ids of each text, with what the tokenizer adds around it only if `special`."""
    if not texts:
        return []
    # A tokenizer file may carry padding and truncation of its own: both are off here.
    return tokenizer(
        texts,
        add_special_tokens=special,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]


def _bytes(ids: list[int]) -> bytes:
    return np.array(ids, np.int32).tobytes()


def start_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text."""
    (bare,), (full,) = bare_ids(["a"], tokenizer), bare_ids(["a"], tokenizer, special=True)
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return [tokenizer.bos_token_id] if full[0] == tokenizer.bos_token_id else []


def decode(ids: np.ndarray, tokenizer: Any) -> str:
    return tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Special tokens by id: those that end turns, open them, and stand for what is no text."""
    added = tokenizer.added_tokens_decoder.items()
    known = {i: token.content for i, token in added if token.special}
    for i, token in zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True):
        known.setdefault(i, token)
    return known


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Finds the longest of the words that begins at a place; without words nothing."""
    longest_first = sorted(filter(None, words), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _cut_tokens(tokenizer: Any) -> list[str]:
    """Special tokens in front of which any text may be cut: no white space beside them and no
    other added token can have a part in where they are found."""
    if not _whole_core(tokenizer):
        return []
    added = list(tokenizer.added_tokens_decoder.values())
    template = str(getattr(tokenizer, "chat_template", None) or "")
    names = {tokenizer.bos_token, tokenizer.eos_token}
    others = {token.content for token in added}
    return [
        t.content
        for t in added
        if t.special and not (t.lstrip or t.rstrip or t.single_word or t.normalized)
        and (t.content in names or t.content in template)
        and not any(_overlap(t.content, other) for other in others if other != t.content)
    ]  # fmt: skip


def _whole_core(tokenizer: Any) -> bool:
    """Whether text goes through the compiled tokenizer, whose file says what it does."""
    split = getattr(tokenizer, "split_special_tokens", False)
    return bool(getattr(tokenizer, "is_fast", False)) and not split


def _overlap(a: str, b: str) -> bool:
    """Whether a text can hold both, the one beginning within the other."""
    if a in b or b in a:
        return True
    shorter = range(1, min(len(a), len(b)))
    return any(a[-n:] == b[:n] or b[-n:] == a[:n] for n in shorter)
