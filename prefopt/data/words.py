"""Where a tokenizer always begins a new word, so that words can be remembered.

Byte-level tokenizers split a text by a regular expression and merge bytes within its matches only.
In each of the expressions below no alternative matches an ASCII character that is no white space
and a space behind it, and from a space in front of an ASCII letter on they all match the space with
the word. So at such a space one match ends and another begins, whatever stands left and right of
it: both sides can be tokenised by themselves. (No lookahead sees across it either: those ask what
follows white space.) NFC joins nothing to a space.

Tokenizers in the manner of SentencePiece write spaces as "▁" and merge characters. Where no merge
makes a token with a "▁" behind another character, none crosses from a word to the "▁" of the next,
and merges on either side do not touch the other's.

Of a tokenizer that does anything else nothing is said.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

WORD = re.compile(r" (?<=[!-~] )(?=[A-Za-z])")  # the space that such a word begins with

_ENDINGS = "'s|'t|'re|'ve|'m|'ll|'d"
_SPACE = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACE
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_KNOWN = {
    # GPT-4, Llama 3, OLMo 2; Qwen 2 to 3; GPT-4o
    rf"(?i:{_ENDINGS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",
    rf"(?i:{_ENDINGS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+(?i:{_ENDINGS})?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*(?i:{_ENDINGS})?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_SPACE}",
}


def word_ids(tokenizer: Any) -> Callable[[list[str]], list[list[int]]] | None:
    """What finds the ids of words with a space in front of each; None for a tokenizer whose text
    may not be cut in front of every WORD."""
    core = tokenizer.backend_tokenizer
    if _is_byte_level(core):
        return lambda words: [
            encoding.ids
            for encoding in core.encode_batch_fast(
                [f" {word}" for word in words], add_special_tokens=False
            )
        ]
    if _is_sentencepiece(core):
        # By the model itself: the tokenizer would put another space in front.
        apart = _described(core.pre_tokenizer).get("split", False)
        return lambda words: [_merged(f" {word}", core.model, apart) for word in words]
    return None


def _merged(word: str, model: Any, apart: bool) -> list[int]:
    """Ids of a word with spaces as SentencePiece writes them; `apart`: none is merged with what
    precedes it."""
    word = word.replace(" ", "▁")
    parts = _EACH_SPACE.findall(word) if apart else [word]
    return [token.id for part in parts for token in model.tokenize(part)]


_EACH_SPACE = re.compile("▁[^▁]*")


def _is_byte_level(core: Any) -> bool:
    normalizer, steps = _described(core.normalizer), _described(core.pre_tokenizer)
    if normalizer not in ({}, {"type": "NFC"}):
        return False
    steps = steps.get("pretokenizers", [steps])
    *first, last = steps
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return False
    if last["use_regex"]:  # that of GPT-2; SmolLM has digits apart
        return all(step.get("type") == "Digits" for step in first)
    return len(first) == 1 and _splits(first[0])


_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_PREPENDED = {"type": "Prepend", "prepend": "▁"}


def _is_sentencepiece(core: Any) -> bool:
    normalizer, spaces = _described(core.normalizer), _described(core.pre_tokenizer)
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    if spaces.get("type") == "Metaspace" and spaces["replacement"] == "▁":
        if steps:
            return False
    elif spaces or steps not in ([_SPACES], [_PREPENDED, _SPACES]):
        return False
    model = json.loads(core.to_str())["model"]
    unusual = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    if model["type"] != "BPE" or any(model.get(key) for key in unusual):
        return False
    merged = (pair if isinstance(pair, str) else "".join(pair) for pair in model["merges"])
    return not any(_CROSSING.search(token.replace(" ", "")) for token in merged)


_CROSSING = re.compile("[^▁]▁")


def _described(part: Any) -> dict[str, Any]:
    """A part of a tokenizer as its file has it."""
    return {} if part is None else json.loads(part.__getstate__())


def _splits(step: dict[str, Any]) -> bool:
    return (
        step.get("type") == "Split"
        and step["pattern"].get("Regex") in _KNOWN
        and step["behavior"] == "Isolated"
        and not step["invert"]
    )
