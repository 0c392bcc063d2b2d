"""The token that fills up a batch of texts for a reward model.

transformers reads the score of a text at its last token that is not padding. If the pad token is
the one that ends every text, it reads before the end, where nothing was trained.
"""

from __future__ import annotations

import logging
import re
from typing import Any

log = logging.getLogger("prefopt")


def set_padding(model: Any, tokenizer: Any) -> bool:
    """Makes model and tokenizer agree on a pad token that ends no text, and says so in the log;
    whether the tokenizer was changed.

    In this order: the tokenizer's own, another that is called pad, the unknown token, another
    special token, the start token, the last word of the vocabulary.
    """
    ends = _ends(model, tokenizer)
    vocab_size = model.config.get_text_config().vocab_size
    before = tokenizer.pad_token_id
    pad = next(i for i in _candidates(tokenizer, ends) if i < vocab_size)
    if pad != before:
        token = tokenizer.convert_ids_to_tokens(pad)
        why = "has no pad token" if before is None else f"pads with {tokenizer.pad_token!r}"
        tokenizer.pad_token = token
        log.warning(
            "the tokenizer %s, and a reward model needs one that ends no text: it pads with %r now",
            f"{why}, which ends texts" if before in ends else why, token,
        )  # fmt: skip
    for config in (model.config, model.config.get_text_config()):
        if config.pad_token_id is not None and config.pad_token_id in ends:
            log.warning(
                "config.json pads with the token that ends texts, so that transformers scores them "
                "one token before their end; here they are scored at their end"
            )
        config.pad_token_id = pad
    return pad != before


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that may end a text."""
    found = {tokenizer.eos_token_id}
    stored = model.config.get_text_config().eos_token_id
    found |= set(stored) if isinstance(stored, list | tuple) else {stored}
    return found - {None}


def _candidates(tokenizer: Any, ends: set[int]) -> list[int]:
    added = {i: str(t) for i, t in sorted(tokenizer.added_tokens_decoder.items())}
    special = {i: t for i, t in added.items() if tokenizer.added_tokens_decoder[i].special}
    others = [i for i, t in special.items() if not re.search(r"end|eo[stm]\b|/s", t, re.I)]
    last = sorted(tokenizer.get_vocab().values(), reverse=True)
    ordered = [
        tokenizer.pad_token_id,
        *(i for i, t in added.items() if "pad" in t.lower()),
        tokenizer.unk_token_id,
        *(i for i in others if i != tokenizer.bos_token_id),
        tokenizer.bos_token_id,
        *last,
    ]
    return [i for i in ordered if i is not None and i not in ends]
