"""Text to ids in pieces is text to ids at once, for tokenizers of many kinds."""

from functools import cache

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from prefopt.data.tokens import TextTokenizer
from prefopt.data.words import _KNOWN, word_ids
from tests.chat_tokenizers import CORPUS

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def expression(regex):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), BYTES])


def sentencepiece(scheme):
    return pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=True)


# name: (normalizer, pre-tokenizer, whether its words may be remembered)
KINDS = {
    "gpt2": (None, pre_tokenizers.ByteLevel(add_prefix_space=False), True),
    "gpt2 nfc": (normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=False), True),
    "gpt2 space": (None, pre_tokenizers.ByteLevel(add_prefix_space=True), False),
    "digits": (
        None,
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        True,
    ),
    **{f"regex {i}": (None, expression(regex), True) for i, regex in enumerate(sorted(_KNOWN))},
    "unknown regex": (None, expression(r"\w+ \w+|\s+|."), False),
    "nfkc": (normalizers.NFKC(), pre_tokenizers.ByteLevel(add_prefix_space=False), False),
    "first": (None, sentencepiece("first"), True),
    "always": (None, sentencepiece("always"), True),
    "llama2": (
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None, False
    ),
    "white space": (None, pre_tokenizers.Whitespace(), False),
}  # fmt: skip
TOKENS = {
    "plain": [],
    "strips": [AddedToken("<mask>", lstrip=True, rstrip=True, special=True)],
    "inside": [AddedToken("<|im_start|>user", special=True), AddedToken("the cat")],
    "spaces": [AddedToken("  ", normalized=False), AddedToken("on the", normalized=False)],
}


@cache
def tokenizer_of(kind, tokens="plain"):
    core = Tokenizer(models.BPE(unk_token="?"))
    normalizer, pre_tokenizer, _ = KINDS[kind]
    if normalizer:
        core.normalizer = normalizer
    if pre_tokenizer:
        core.pre_tokenizer = pre_tokenizer
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["?", "<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="?"
    )
    tokenizer.add_tokens(TOKENS[tokens])
    tokenizer.chat_template = "<|im_start|>{{ messages[0].content }}<|im_end|><mask>"
    return tokenizer


PART = st.one_of(
    st.sampled_from(
        [
            *("<|im_start|>", "<|im_end|>", "</s>", "<mask>", "<|im_start|>user", "the cat"),
            *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\x0b", "\x1c", "\x85", "\xa0", "\u3000"),
            *("a", " a", "b c", " the", "cat on the mat", "it's", " I'M", "'s", "' s"),
            *("1", " 12", "1 a", "3.5 x", "!", " !", "...", "? I", ". The", "/ a", "- a\n b"),
            *("é", "e\u0301", " é", "é a", "a é", "ß", "İ", "’", "’ a", "a ’s", "٣", "日本 a"),
            *("▁", "▁a", " ▁ b", "a▁ b"),
            *("🐟 a", "\u200b a", "\u0301 a", "a \u0301", "ª a", "ⅷ a", "\u180e a", "_ a"),
        ]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
)  # fmt: skip
TEXT = st.lists(PART, max_size=10).map("".join)


@settings(max_examples=600)
@given(
    st.lists(TEXT, min_size=1, max_size=3),
    st.sampled_from(sorted(KINDS)),
    st.sampled_from(sorted(TOKENS)),
)
@example(["<|im_start|>a b<|im_end|>\n c the cat"], "first", "plain")
@example(["a  <mask> b c", "x<|im_start|>user d"], "gpt2", "strips")
def test_pieces_give_the_ids_of_the_whole(texts, kind, tokens):
    tokenizer = tokenizer_of(kind, tokens)
    whole = [tokenizer.backend_tokenizer.encode(t, add_special_tokens=False).ids for t in texts]
    found = TextTokenizer(tokenizer, "chat")(texts)
    assert [found[text].tolist() for text in texts] == whole
    assert all(found[text].dtype == np.int32 for text in texts)
    assert (word_ids(tokenizer) is not None) == KINDS[kind][2]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_is_remembered_changes_nothing(kind, monkeypatch):
    """More words than are kept; a tokenizer that has seen other texts."""
    monkeypatch.setattr("prefopt.data.tokens.WORDS", 3)
    tokenizer = tokenizer_of(kind)
    seen = TextTokenizer(tokenizer, "chat")
    for text in ("the cat sat", "on the mat, and then", "the cat sat on. It's the mat", "a b c d"):
        expected = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        assert seen([text])[text].tolist() == expected
        assert seen([text, text])[text].tolist() == expected
    assert len(seen._known or ()) < 10


def test_texts_are_cut_where_that_is_sound():
    """Else the tests above show nothing."""
    cut = TextTokenizer(tokenizer_of("gpt2"), "chat")._cut
    assert cut("a<|im_start|>b c</s>") == ["a", "<|im_start|>b c", "</s>"]
    text = TextTokenizer(tokenizer_of("gpt2"), "chat")
    assert text._words("<|im_end|>it's 1 a. The  b\n c") == (
        "<|im_end|>it's 1", ["a.", "The  b\n c"]
    )  # fmt: skip
    assert text._words("a b") == ("a", ["b"])
    assert TextTokenizer(tokenizer_of("gpt2", "inside"), "chat")._words("the cat sat on") == (
        "the cat sat on", []
    )  # fmt: skip
    cut = TextTokenizer(tokenizer_of("gpt2", "strips"), "chat")._cut
    assert cut("a <mask> b<|im_end|>") == ["a <mask> b", "<|im_end|>"]
    cut = TextTokenizer(tokenizer_of("gpt2", "inside"), "chat")._cut
    assert cut("<|im_start|>user<|im_end|>") == ["<|im_start|>user", "<|im_end|>"]


def test_special_tokens_that_are_to_be_split():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_of("gpt2").backend_tokenizer, eos_token="</s>",
        split_special_tokens=True,
    )  # fmt: skip
    text = "a</s> b c"
    expected = tokenizer([text], add_special_tokens=False)["input_ids"][0]
    assert TextTokenizer(tokenizer, "chat")([text])[text].tolist() == expected


@cache
def real_tokenizer(path):
    return AutoTokenizer.from_pretrained(path)


@settings(max_examples=300)
@given(texts=st.lists(TEXT, min_size=1, max_size=3))
@example(texts=["Once upon a time</s> there was", " a  cat\n\nand a dog", "", "a▁b c", "é b 🐟 c"])
def test_a_real_sentencepiece_tokenizer(texts, stories_path):
    tokenizer = real_tokenizer(stories_path)
    assert word_ids(tokenizer) is not None
    found = TextTokenizer(tokenizer, "chat")(texts)
    for text in texts:
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        assert found[text].tolist() == ids
