"""Where a byte-level tokenizer always begins a new word, so that words can be remembered.

Such tokenizers split a text by a regular expression and merge bytes within its matches only. In
each of the expressions below no alternative matches an ASCII character that is no white space and
a space behind it, and from a space in front of an ASCII letter on they all match the space with the
word. So at such a space one match ends and another begins, whatever stands left and right of it:
both sides can be tokenised by themselves. (No lookahead sees across it either: those ask what
follows white space.) NFC joins nothing to a space. Of a tokenizer that does anything else nothing
is said.
"""

from __future__ import annotations

import json
import re
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


def has_words(tokenizer: Any) -> bool:
    """Whether a text may be cut in front of every WORD."""
    core = tokenizer.backend_tokenizer
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
