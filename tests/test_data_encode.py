"""Pairs to tokens: the boundary, the EOS, the truncation, against texts and tokens made here."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers import decoders as token_decoders
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from prefopt.data.encode import encode_pairs, encode_prompts, preview
from prefopt.data.records import Message, Pair
from prefopt.data.sources import load_preferences
from prefopt.data.template import choose_template, render
from prefopt.errors import InputError

SHARED = Path(__file__).parents[2] / "shared"
HH = SHARED / "data" / "hh_harmless.jsonl.gz"
STORIES = SHARED / "models" / "stories260K"

CHATML = (
    "{{ bos_token }}{% for m in messages %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "user assistant system Human: Assistant: the cat sat on the mat, and  then it sat again.\n\n",
    "What is it? It is a thing!\n  - one\n  - two\n\nHuman: hello\n\nAssistant: hello there: yes",
] * 3


def byte_bpe(bos, eos, extra=(), template=None):
    """A byte-level BPE that adds both BOS and EOS when asked for special tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = token_decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(dict.fromkeys([bos, eos, *extra])),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    ids = [(token, core.token_to_id(token)) for token in (bos, eos)]
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", pair=f"{bos} $A $B {eos}", special_tokens=ids
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


BASE = byte_bpe("<s>", "</s>")
CHAT = byte_bpe("<s>", "<|im_end|>", ["<|im_start|>"], CHATML)


def ids_of(tokenizer, text):
    """Ids by the core tokenizer, without any special token of its own."""
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def whole_text(tokenizer, messages):
    """The conversation, written by hand, up to the end of its last turn."""
    if tokenizer is CHAT:
        turns = [f"<|im_start|>{role}\n{text}<|im_end|>" for role, text in messages]
        return "<s>" + "\n".join(turns)
    names = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
    text = "".join(names.get(role, "\n\n") + content for role, content in messages)
    return "<s>" + (text if messages[0].role in names else text[2:])


def whole_ids(tokenizer, messages):
    """Ids of the conversation with exactly one EOS at its end."""
    ids = ids_of(tokenizer, whole_text(tokenizer, messages))
    return ids if tokenizer is CHAT else [*ids, tokenizer.eos_token_id]


def pair(prompt, chosen, rejected):
    return Pair(
        [Message("user", prompt)], [Message("assistant", chosen)], [Message("assistant", rejected)]
    )


TEXT = st.one_of(
    st.sampled_from(
        ["", " ", "\n", "\n\n", " a", "\n b", "the cat", "\n\nHuman: no", "é", "🐟!", ":"]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
)
TURN = TEXT.map(lambda text: text.replace("<", "("))  # no special token as text


@st.composite
def conversations(draw):
    """Random alternating prompts, perhaps with a system turn, with two different replies."""
    prompt = [Message("system", draw(TURN))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 1))):
        prompt += [Message("user", draw(TURN)), Message("assistant", draw(TURN))]
    prompt.append(Message("user", draw(TURN)))
    chosen, rejected = draw(st.lists(TURN, min_size=2, max_size=2, unique=True))
    return Pair(prompt, [Message("assistant", chosen)], [Message("assistant", rejected)])


# --- the boundary and the EOS ------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.lists(conversations(), min_size=1, max_size=4), st.sampled_from([BASE, CHAT]))
def test_prompt_and_response_are_the_whole_conversation(pairs, tokenizer):
    encoded = encode_pairs(pairs, tokenizer, max_length=10_000)
    assert encoded.counts["truncated"] == 0 and [e.index for e in encoded] == list(
        range(len(pairs))
    )
    eos = tokenizer.eos_token_id
    for source, item in zip(pairs, encoded, strict=True):
        assert item.prompt.dtype == np.int32 and len(item.prompt) >= 1 and item.weight == 1.0
        for side, response in zip((source.chosen, source.rejected), item.responses, strict=True):
            expected = whole_ids(tokenizer, source.prompt + side)
            assert [*item.prompt, *response] == expected
            assert response.dtype == np.int32
            assert list(response).count(eos) == 1 and response[-1] == eos
        # The prompt is as long as it can be: it ends at its text's end, or where both must differ.
        opening = ids_of(tokenizer, prompt_text(tokenizer, source.prompt))
        first = [
            whole_ids(tokenizer, source.prompt + side) for side in (source.chosen, source.rejected)
        ]
        n = len(item.prompt)
        assert list(item.prompt) == opening[:n]
        assert n == len(opening) or any(whole[n] != opening[n] for whole in first)


def prompt_text(tokenizer, prompt):
    text = whole_text(tokenizer, prompt)
    return text + ("\n<|im_start|>assistant\n" if tokenizer is CHAT else "\n\nAssistant:")


@settings(max_examples=150, deadline=None)
@given(conversations(), st.sampled_from([BASE, CHAT]))
def test_scored_tokens_decode_to_the_response(source, tokenizer):
    (item,) = encode_pairs([source], tokenizer, max_length=10_000)
    clean = len(item.prompt) == len(ids_of(tokenizer, prompt_text(tokenizer, source.prompt)))
    texts = [side[0].content for side in (source.chosen, source.rejected)]
    # White space after the opening of the turn may share a token with it; nothing else may.
    assert clean or any(text[:1].isspace() for text in texts)
    for text, response in zip(texts, item.responses, strict=True):
        scored = tokenizer.decode(response[:-1].tolist())
        if clean:
            assert scored == (text if tokenizer is CHAT else " " + text)
        assert scored.endswith(text)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(conversations(), min_size=1, max_size=5),
    st.integers(2, 40),
    st.sampled_from([BASE, CHAT]),
)
def test_truncation_counts_everything_and_leaves_no_identical_pair(pairs, max_length, tokenizer):
    full = encode_pairs(pairs, tokenizer, max_length=10_000)
    room = [max_length - len(item.prompt) for item in full]
    cut = [
        [list(r[: max(n, 0)]) for r in item.responses] for item, n in zip(full, room, strict=True)
    ]
    fills = sum(n <= 0 for n in room)
    same = sum(n > 0 and a == b for n, (a, b) in zip(room, cut, strict=True))
    kept = [i for i, (n, (a, b)) in enumerate(zip(room, cut, strict=True)) if n > 0 and a != b]
    if not kept:
        with pytest.raises(InputError, match="set max_length well above"):
            encode_pairs(pairs, tokenizer, max_length=max_length)
        return
    encoded = encode_pairs(pairs, tokenizer, max_length=max_length)
    assert [item.index for item in encoded] == kept
    assert encoded.counts.get("dropped: prompt fills max_length", 0) == fills
    assert encoded.counts.get("dropped: identical after truncation", 0) == same
    for item in encoded:
        assert list(item.prompt) == list(full[item.index].prompt)  # never cut
        assert [list(response) for response in item.responses] == cut[item.index]
    ends = [
        response[-1] == tokenizer.eos_token_id for item in encoded for response in item.responses
    ]
    assert encoded.counts["truncated"] == ends.count(False)


def words_bpe(vocab, merges, bos=None):
    """A BPE spelled out merge by merge."""
    names = {token: i for i, token in enumerate(vocab)}
    tokenizer = Tokenizer(models.BPE(vocab=names, merges=merges))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="!", bos_token=bos)


def test_a_merge_across_the_boundary_moves_it_for_both_responses():
    tokenizer = words_bpe(["!", "a", "b", "c", "d", "ab", "abc"], [("a", "b"), ("ab", "c")])
    (item,) = encode_pairs([pair("dab", "cd", "dd")], tokenizer, template="plain")
    assert item.prompt.tolist() == [4]
    assert [r.tolist() for r in item.responses] == [[6, 4, 0], [5, 4, 4, 0]]
    counts = encode_pairs([pair("dab", "cd", "dd")], tokenizer, template="plain").counts
    assert counts == {"truncated": 0, "prompt not a prefix of its conversation, in tokens": 1}
    # Where nothing is left of the prompt there is no row to predict the first token from.
    pairs = [pair("ab", "cd", "dd"), pair("", "a", "b"), pair("d", "a", "b")]
    encoded = encode_pairs(pairs, tokenizer, template="plain")
    assert encoded.counts["dropped: empty prompt"] == 2 and [item.index for item in encoded] == [2]


def test_texts_that_are_the_same_in_tokens_are_dropped():
    tokenizer = words_bpe(["!", "a", "b"], [])  # unknown characters vanish
    pairs = [pair("a", "bx", "b"), pair("a", "b", "a")]
    encoded = encode_pairs(pairs, tokenizer, template="plain")
    assert encoded.counts["dropped: identical in tokens"] == 1
    assert encoded[0].responses[0].tolist() == [2, 0] and encoded[0].responses[1].tolist() == [1, 0]


@pytest.mark.parametrize("tail", ["</s>", "</s>\n", "</s> \n\n"])
def test_an_eos_that_ends_the_text_is_not_doubled(tail):
    (item,) = encode_pairs([pair("q", f"yes{tail}", "no")], BASE)
    chosen = item.responses[0]
    assert chosen.tolist() == [*ids_of(BASE, " yes"), BASE.eos_token_id]


def test_an_eos_inside_a_response_is_counted():
    encoded = encode_pairs([pair("q", "yes</s> no", "no")], BASE)
    assert encoded.counts["responses with an EOS token inside"] == 1
    assert encoded[0].responses[0][-1] == BASE.eos_token_id


def test_several_turns_in_a_response():
    turns = [Message("assistant", "one"), Message("user", "go on"), Message("assistant", "two")]
    source = Pair([Message("user", "q")], turns, [Message("assistant", "no")])
    for tokenizer in (BASE, CHAT):
        (item,) = encode_pairs([source], tokenizer)
        assert [*item.prompt, *item.responses[0]] == whole_ids(tokenizer, source.prompt + turns)


# --- templates ---------------------------------------------------------------------------------


def test_template_choice():
    assert choose_template(CHAT).name == "chat" and choose_template(BASE).name == "transcript"
    assert choose_template(CHAT, "plain") == ("plain", "as asked for")
    assert encode_pairs([pair("q", "a", "b")], BASE).template.startswith("transcript: ")
    with pytest.raises(InputError, match="no chat template"):
        choose_template(BASE, "chat")
    with pytest.raises(InputError, match="auto, chat, transcript, plain"):
        choose_template(BASE, "chatml")


def test_rendered_texts():
    prompt = [Message("system", "Be kind."), Message("user", "q"), Message("assistant", "r")]
    prompt.append(Message("user", "s"))
    response = [Message("assistant", "t")]
    opening = "Be kind.\n\nHuman: q\n\nAssistant: r\n\nHuman: s\n\nAssistant:"
    assert render(prompt, response, BASE, "transcript") == (opening, opening + " t")
    assert render(prompt, response, BASE, "plain") == ("Be kind.qrs", "Be kind.qrst")
    before, whole = render(prompt[1:], response, CHAT, "chat")
    assert before == (
        "<s><|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nr<|im_end|>\n"
        "<|im_start|>user\ns<|im_end|>\n<|im_start|>assistant\n"
    )
    assert whole == before + "t<|im_end|>\n"


@pytest.mark.parametrize("tokenizer", [BASE, CHAT])
@pytest.mark.parametrize("template", ["auto", "plain"])
def test_bos_stands_once_and_no_eos_in_the_prompt(tokenizer, template):
    (item,) = encode_pairs([pair("q", "a", "b")], tokenizer, template=template)
    prompt = item.prompt.tolist()
    assert prompt[0] == tokenizer.bos_token_id and prompt.count(tokenizer.bos_token_id) == 1
    assert prompt.count(tokenizer.eos_token_id) == (tokenizer is CHAT and template == "auto")


def test_a_template_that_rewrites_the_prompt_still_gives_the_whole_conversation():
    tokenizer = byte_bpe("<s>", "<|im_end|>", ["<|im_start|>", "<think>"])
    tokenizer.chat_template = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    (item,) = encoded = encode_pairs([pair("q", "yes", "no")], tokenizer)
    assert encoded.counts["prompt not a prefix of its conversation, in tokens"] == 1
    messages = [Message("user", "q"), Message("assistant", "yes")]
    assert [*item.prompt, *item.responses[0]] == ids_of(tokenizer, whole_text(CHAT, messages))
    assert tokenizer.decode(item.prompt.tolist()).endswith("<|im_start|>assistant\n")


def test_conversations_the_template_refuses_are_counted():
    tokenizer = byte_bpe("<s>", "<|im_end|>", ["<|im_start|>"])
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refuse + CHATML
    good = pair("q", "a", "b")
    bad = Pair([Message("system", "s"), *good.prompt], good.chosen, good.rejected)
    encoded = encode_pairs([bad, good, bad], tokenizer)
    assert [item.index for item in encoded] == [1]
    reason = "the chat template refuses the conversation (no system)"
    assert encoded.counts[f"dropped: {reason}"] == 2
    with pytest.raises(InputError, match="no system"):
        encode_pairs([bad], tokenizer)


def test_padding_and_truncation_of_the_tokenizer_file_are_ignored():
    tokenizer = byte_bpe("<s>", "</s>")
    pairs = [pair("q", "a", "b"), pair("a longer question", "a longer answer", "no")]
    expected = encode_pairs(pairs, tokenizer)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokenizer.backend_tokenizer.enable_truncation(6)
    for a, b in zip(encode_pairs(pairs, tokenizer), expected, strict=True):
        assert a.prompt.tolist() == b.prompt.tolist()
        assert [r.tolist() for r in a.responses] == [r.tolist() for r in b.responses]


def test_encode_prompts_are_the_prompts_of_the_pairs():
    pairs = [pair("q", "a", "b"), pair("hello there", "c", "d")]
    for tokenizer in (BASE, CHAT):
        prompts = encode_prompts([source.prompt for source in pairs], tokenizer)
        for ids, item in zip(prompts, encode_pairs(pairs, tokenizer), strict=True):
            assert ids.dtype == np.int32 and ids.tolist() == item.prompt.tolist()
    with pytest.raises(InputError, match="Prompt 1 is empty"):
        empty = words_bpe(["!", "a"], [])
        encode_prompts([[Message("user", "a")], [Message("user", "")]], empty, "plain")


def test_preview_shows_the_segments():
    (item,) = encode_pairs([pair("q", "yes", "no")], CHAT)
    assert preview(item, CHAT) == [
        ("prompt", "<s><|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"),
        ("response", "yes"),
        ("eos", "<|im_end|>"),
        ("response", "no"),
        ("eos", "<|im_end|>"),
    ]
    prompt = len(item.prompt)
    (item,) = encode_pairs([pair("q", "yes", "no")], CHAT, max_length=prompt + 1)
    assert preview(item, CHAT)[2] == ("truncated", "")


# --- refusals ----------------------------------------------------------------------------------


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = byte_bpe("<s>", "</s>")
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no EOS token"):
        encode_pairs([pair("q", "a", "b")], tokenizer)


def test_prompts_longer_than_max_length():
    pairs = [pair("word " * n, "a", "b") for n in (40, 50, 60)]
    with pytest.raises(InputError) as error:
        encode_pairs(pairs, BASE, max_length=20)
    sizes = [len(item.prompt) for item in encode_pairs(pairs, BASE)]
    for word in (
        "fills max_length (3)",
        "max_length=20",
        f"{sizes[2]} tokens",
        f"above {sizes[1]}",
    ):
        assert word in str(error.value)
    encoded = encode_pairs([*pairs, pair("q", "a", "b")], BASE, max_length=20)
    assert encoded.counts == {"truncated": 0, "dropped: prompt fills max_length": 3}
    with pytest.raises(InputError, match="max_length=1 "):
        encode_pairs(pairs, BASE, max_length=1)
    with pytest.raises(InputError, match="no pairs"):
        encode_pairs([], BASE)


def test_encoded_set_is_a_sequence():
    encoded = encode_pairs([pair(str(i), "a", "b") for i in range(600)], BASE)
    assert len(encoded) == 600 and [item.index for item in encoded] == list(range(600))
    part = encoded[10:12]
    assert [item.index for item in part] == [10, 11] and part.template == encoded.template


# --- real input --------------------------------------------------------------------------------


@pytest.mark.skipif(not (HH.exists() and STORIES.exists()), reason=f"needs {HH} and {STORIES}")
def test_hh_with_a_real_tokenizer(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    path = tmp_path / "part.jsonl"
    with gzip.open(HH, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for _, line in zip(range(120), file, strict=False)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = load_preferences(path)
    encoded = encode_pairs(pairs, tokenizer, max_length=512)
    core = tokenizer.backend_tokenizer
    truncated, fills, same = 0, 0, 0
    kept = {item.index: item for item in encoded}
    for index, row in enumerate(rows):  # no row of these is dropped on reading
        whole = [
            core.encode(row[key], add_special_tokens=False).ids for key in ("chosen", "rejected")
        ]
        whole = [[1, *ids, 2] for ids in whole]  # BOS, the transcript, EOS
        opening = row["chosen"][: row["chosen"].rindex("\n\nAssistant:") + len("\n\nAssistant:")]
        size = 1 + len(core.encode(opening, add_special_tokens=False).ids)
        if size >= 512:
            fills += 1
        elif whole[0][:512] == whole[1][:512]:
            same += 1
        if index not in kept:
            assert size >= 512 or whole[0][:512] == whole[1][:512]
            continue
        item = kept[index]
        assert len(item.prompt) == size
        for ids, response in zip(whole, item.responses, strict=True):
            assert [*item.prompt, *response] == ids[:512]
            truncated += len(ids) > 512
        reply = row["chosen"][len(opening) :]
        if len(whole[0]) <= 512:
            assert core.decode(item.responses[0][:-1].tolist()) == reply.removeprefix(" ")
    assert len(rows) == len(pairs) == len(encoded) + fills + same
    expected = {
        "dropped: prompt fills max_length": fills,
        "dropped: identical after truncation": same,
    }
    expected = {key: n for key, n in expected.items() if n} | {"truncated": truncated}
    assert encoded.counts == expected and fills > 0 and truncated > 0
