"""Responses of several turns: only what the assistant says is scored, compared and remembered."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from prefopt.data.encode import encode_feedback, encode_pairs, preview
from prefopt.data.encode_rankings import encode_rankings
from prefopt.data.encoded import Encoded, EncodedSet
from prefopt.data.packing import pack
from prefopt.data.records import Feedback, Message, Pair, Ranking
from prefopt.errors import InputError
from prefopt.objectives.kto import KTO
from prefopt.reference import _content_keys
from tests.chat_tokenizers import TEMPLATES, chat_tokenizer, tokens_of, written

WORD = st.sampled_from(["the cat", "sat.", "é", "🐟!", "two\n\nlines", "Human: x", "no", "yes"])
TEXT = st.lists(WORD, min_size=1, max_size=3).map(" ".join)
NAMES = sorted(TEMPLATES)


def turns(*contents, first="assistant"):
    roles = ("assistant", "user") if first == "assistant" else ("user", "assistant")
    return [Message(roles[i % 2], text) for i, text in enumerate(contents)]


def masks_of(item):
    masks = item.scored or (None,) * len(item.responses)
    return [
        np.ones(len(r), bool) if mask is None else mask
        for r, mask in zip(item.responses, masks, strict=True)
    ]


@st.composite
def diverging(draw):
    """A prompt, and two conversations from there of an odd number of turns each."""
    prompt = turns(*draw(st.lists(TEXT, min_size=1, max_size=1)), first="user")
    sides = [draw(st.lists(TEXT, min_size=1, max_size=5)) for _ in range(2)]
    chosen, rejected = (turns(*side[: len(side) - 1 + len(side) % 2]) for side in sides)
    return Pair(prompt, chosen, rejected)


@settings(max_examples=150)
@given(diverging(), st.sampled_from(NAMES))
def test_scored_is_what_the_assistant_says(pair, name):
    """Against conversations written out by hand."""
    tokenizer = chat_tokenizer(name)
    expected = [
        tokens_of(tokenizer, written(name, pair.prompt + s)) for s in (pair.chosen, pair.rejected)
    ]
    said = [[i for i, scored in zip(*side, strict=True) if scored] for side in expected]
    if said[0] == said[1]:
        with pytest.raises(InputError, match="identical in tokens"):
            encode_pairs([pair], tokenizer, max_length=10_000)
        return
    (item,) = encode_pairs([pair], tokenizer, max_length=10_000)
    for response, mask, (ids, scored) in zip(item.responses, masks_of(item), expected, strict=True):
        assert [*item.prompt, *response] == ids
        assert [False] * len(item.prompt) + mask.tolist() == scored


def test_what_is_scored_read_as_text():
    tokenizer = chat_tokenizer("chatml")
    pair = Pair(turns("q", first="user"), turns("a", "why", "b"), turns("c"))
    (item,) = encode_pairs([pair], tokenizer)
    assert item.scored is not None and item.scored[1] is None
    kinds = preview(item, tokenizer)[1:]
    assert kinds == [
        ("response", "a<|im_end|>"),
        ("prompt", "\n<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n"),
        ("response", "b"), ("eos", "<|im_end|>"), ("response", "c"), ("eos", "<|im_end|>"),
    ]  # fmt: skip


def test_what_follows_the_last_answer_is_left_out():
    tokenizer = chat_tokenizer("chatml")
    prompt = turns("q", first="user")
    asked = Pair(prompt, turns("a", "thanks"), turns("b", "why", "c", "so"))
    bare = Pair(prompt, turns("a"), turns("b", "why", "c"))
    (one,), (other,) = encode_pairs([asked], tokenizer), encode_pairs([bare], tokenizer)
    assert [r.tolist() for r in one.responses] == [r.tolist() for r in other.responses]
    with pytest.raises(InputError, match=r"no assistant turn \(1\)"):
        encode_pairs([Pair(prompt, turns("a"), turns("b", first="user"))], tokenizer)


def test_the_same_words_in_other_company_are_identical():
    """Nothing that the model would write tells the two apart."""
    tokenizer = chat_tokenizer("chatml")
    prompt = turns("q", first="user")
    same = Pair(prompt, turns("a", "why", "b"), turns("a", "what", "b"))
    encoded = encode_pairs([same, Pair(prompt, turns("a"), turns("b"))], tokenizer)
    assert encoded.indices.tolist() == [1]
    assert encoded.counts == {"truncated": 0, "dropped: identical in tokens": 1}


def test_truncation_that_takes_the_difference_or_a_whole_side():
    tokenizer = chat_tokenizer("chatml")
    prompt = turns("q", first="user")
    late = Pair(prompt, turns("a", "why", "b"), turns("a", "why", "c"))
    (whole,) = encode_pairs([late], tokenizer)
    keep = turns("yes"), turns("no")
    for room in range(1, len(whole.responses[0])):
        encoded = encode_pairs(
            [late, Pair(prompt, *keep)], tokenizer, max_length=len(whole.prompt) + room
        )
        differ = [
            r[:room][m[:room]].tolist()
            for r, m in zip(whole.responses, masks_of(whole), strict=True)
        ]
        assert (0 in encoded.indices) == (differ[0] != differ[1])
        dropped = encoded.counts.get("dropped: identical after truncation", 0)
        assert dropped == (differ[0] == differ[1])
        for item in encoded:
            assert all(mask[-1] for mask in masks_of(item))  # nothing behind what is scored
    # A turn of somebody else first: cut before the assistant speaks.
    results = [Message("tool", "many words " * 5), Message("assistant", "done")]
    tooled = Pair(prompt, results, turns("no"))
    size = len(encode_pairs([tooled], tokenizer)[0].prompt)
    encoded = encode_pairs([tooled, Pair(prompt, *keep)], tokenizer, max_length=size + 6)
    reason = "dropped: truncation leaves a response without a token to score"
    assert encoded.counts[reason] == 1 and encoded.indices.tolist() == [1]


def test_nothing_is_kept_behind_what_is_scored():
    tokenizer = chat_tokenizer("chatml")
    early = Pair(turns("q", first="user"), turns("a", "why", "b"), turns("c", "why", "b"))
    (whole,) = encode_pairs([early], tokenizer)
    sizes = set()
    for room in range(1, len(whole.responses[0])):
        (item,) = encode_pairs([early], tokenizer, max_length=len(whole.prompt) + room)
        for response, mask, full, scored in zip(
            item.responses, masks_of(item), whole.responses, masks_of(whole), strict=True
        ):
            last = int(np.flatnonzero(scored[:room])[-1]) + 1
            assert response.tolist() == full[:last].tolist()
            assert mask.tolist() == scored[:last].tolist()
            sizes.add(last)
    assert len(sizes) < len(whole.responses[0]) - 2


def test_a_token_across_the_boundary_is_scored_on_both_sides():
    """What the one response merges with the prompt's last token, the other one begins with."""
    names = {token: i for i, token in enumerate(["!", "a", "b", "c", "d", "ab", "abc"])}
    core = Tokenizer(models.BPE(vocab=names, merges=[("a", "b"), ("ab", "c")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="!")
    pair = Pair(turns("dab", first="user"), turns("d", "b", "d"), turns("cd"))
    (item,) = encode_pairs([pair], tokenizer, template="plain")
    assert item.prompt.tolist() == [4]
    assert [r.tolist() for r in item.responses] == [[5, 4, 2, 4, 0], [6, 4, 0]]
    assert item.scored[0].tolist() == [True, True, False, True, True] and item.scored[1] is None


def test_turns_that_the_template_rewrites_are_not_scored():
    tokenizer = chat_tokenizer("qwen3")
    chosen = turns("<think>x</think>a", "why", "<think>y</think>b")
    (item,) = encoded = encode_pairs(
        [Pair(turns("q", first="user"), chosen, turns("c"))], tokenizer
    )
    scored = item.responses[0][masks_of(item)[0]]
    assert tokenizer.decode(scored) == "<think>y</think>b<|im_end|>"
    assert encoded.counts["assistant turns that the chat template rewrites, not scored"] == 1


def test_rankings_and_feedback_have_masks_too():
    tokenizer = chat_tokenizer("chatml")
    prompt = turns("q", first="user")
    sides = [turns("a", "why", "b"), turns("c"), turns("a", "what", "b")]
    encoded = encode_rankings([Ranking(prompt, sides)], tokenizer)
    assert encoded.counts["responses identical to a better one"] == 1
    (item,) = encoded
    (single,) = encode_feedback([Feedback(prompt, sides[0], True)], tokenizer)
    assert len(item.responses) == 2
    assert single.scored[0].tolist() == item.scored[0].tolist() and item.scored[1] is None


# --- what is packed and remembered ----------------------------------------------------------------


def array(*ids):
    return np.array(ids, np.int32)


def masked(*scored):
    return np.array(scored, bool)


GROUP = Encoded(array(1, 2), (array(3, 4, 5), array(6, 7)), 0)


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_packed_are_the_scored_tokens(layout):
    item = dataclasses.replace(GROUP, scored=(masked(1, 0, 1), None))
    (batch,) = pack([item], max_tokens=100, layout=layout)
    assert batch.targets.tolist() == [3, 5, 6, 7] and batch.response_ids.tolist() == [0, 0, 1, 1]
    (whole,) = pack([GROUP], max_tokens=100, layout=layout)
    assert batch.input_ids.tolist() == whole.input_ids.tolist()
    assert batch.score_rows.tolist() == [whole.score_rows.tolist()[i] for i in (0, 2, 3, 4)]


def test_preferences_of_a_batch_and_of_its_parts():
    items = [dataclasses.replace(GROUP, preference=p) for p in (1.0, 0.5, 0.75)]
    (batch,) = pack(items, max_tokens=100)
    assert batch.preferences.dtype == torch.float32 and batch.preferences.tolist() == [1, 0.5, 0.75]
    assert [p.preferences is None for p in batch.split(9)] == [True, False, False]
    assert batch.to("meta").preferences.is_meta
    assert next(pack([GROUP, GROUP], max_tokens=100)).preferences is None
    pair = Pair(turns("q", first="user"), turns("a"), turns("b"), preference=0.5)
    assert encode_pairs([pair], chat_tokenizer("chatml"))[0].preference == 0.5


def keys(item):
    return _content_keys(next(pack([item], max_tokens=100)))


def test_a_mask_is_part_of_what_the_reference_is_remembered_by():
    plain, (a, n), (b, m) = (
        keys(GROUP),
        *keys(dataclasses.replace(GROUP, scored=(masked(1, 0, 1), None))),
    )
    assert plain[0][0] != a and plain[0][1] == 3 and n == 2
    assert plain[1] == (b, m)
    other = keys(dataclasses.replace(GROUP, scored=(masked(0, 1, 1), None)))
    assert other[0][0] != a and other[0][1] == n


def test_kto_takes_the_mask_of_the_other_prompt_along():
    tokenizer = chat_tokenizer("chatml")
    sides = turns("a", "why", "b"), turns("c")
    rows = [
        Feedback(turns(q, first="user"), side, bool(i))
        for i, (q, side) in enumerate(zip("pq", sides, strict=True))
    ]
    first, second = KTO().encode(rows, tokenizer, max_length=100, template="auto")
    assert first.labels == (0, -1) and second.labels == (1, -1)
    assert first.scored[1] is None and second.scored[0] is None
    assert first.scored[0].tolist() == second.scored[1].tolist()

    # Cut to the room that a longer prompt leaves.
    rows = [
        Feedback(turns("q", first="user"), sides[0], True),
        Feedback(turns("p" * 40, first="user"), sides[1], True),
    ]
    whole = KTO().encode(rows, tokenizer, max_length=200, template="auto")
    size = max(len(item.prompt) + len(item.responses[0]) for item in whole)
    _, second = KTO().encode(rows, tokenizer, max_length=size, template="auto")
    kept = len(second.responses[1])
    assert kept == size - len(second.prompt) < len(whole[1].responses[1])
    assert second.scored[1].tolist() == whole[1].scored[1].tolist()[:kept]


# --- groups on a file -----------------------------------------------------------------------------

ARRAYS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9).map(
    lambda x: np.array(x, np.int32)
)


@st.composite
def encoded_groups(draw):
    responses = tuple(draw(st.lists(ARRAYS, min_size=1, max_size=3)))
    masks = tuple(
        draw(st.none() | st.lists(st.booleans(), min_size=len(r), max_size=len(r)).map(np.array))
        for r in responses
    )
    return Encoded(
        draw(ARRAYS), responses, draw(st.integers(0, 2**40)),
        weight=draw(st.floats(0, 9)), margin=draw(st.none() | st.floats(-9, 9)),
        source=draw(st.none() | st.text(st.characters(exclude_categories=["Cs"]))),
        scored=None if all(m is None for m in masks) else masks,
        labels=draw(st.none() | st.tuples(*[st.integers(-1, 1)] * len(responses))),
        preference=draw(st.floats(0, 1)),
    )  # fmt: skip


def same(a, b):
    arrays = [
        (x.prompt, *x.responses, *(m for m in x.scored or () if m is not None)) for x in (a, b)
    ]
    fields = [
        (x.index, x.weight, x.margin, x.source, x.labels, x.preference,
         x.scored and [m is None for m in x.scored]) for x in (a, b)
    ]  # fmt: skip
    return fields[0] == fields[1] and all(
        np.array_equal(p, q) and p.dtype == q.dtype for p, q in zip(*arrays, strict=True)
    )


@given(st.lists(encoded_groups(), max_size=6), st.slices(6))
def test_a_set_gives_back_what_it_was_made_of(items, part):
    made = EncodedSet(iter(items), {"truncated": 2}, "chat")
    assert len(made) == len(items) and all(map(same, made, items))
    assert made.indices.tolist() == [item.index for item in items]
    sizes = [len(item.prompt) + sum(map(len, item.responses)) for item in items]
    assert made.sizes.tolist() == sizes
    assert made.num_responses.tolist() == [len(item.responses) for item in items]
    some, expected = made[part], items[part]
    del made
    assert len(some) == len(expected) and all(map(same, some, expected))
    assert some.counts == {"truncated": 2} and some.template == "chat"
    assert some.sizes.tolist() == sizes[part]
    with pytest.raises(IndexError):
        some[len(some)]


def test_a_digest_is_of_all_that_is_trained_on():
    item = dataclasses.replace(GROUP, scored=(None, masked(1, 1)), labels=(1, 0), source="x")
    changed = {
        "prompt": array(1, 3), "responses": (array(3, 4), array(5, 6, 7)), "weight": 2.0,
        "margin": 0.0,
        "scored": (None, masked(0, 1)), "labels": (1, 1), "preference": 0.5,
    }  # fmt: skip
    digests = [EncodedSet([item]).digests[0]]
    for name, value in changed.items():
        given = {"scored": None} if name == "responses" else {}
        digests.append(EncodedSet([dataclasses.replace(item, **{**given, name: value})]).digests[0])
    assert len(set(digests)) == 1 + len(changed)
    for name, value in (("source", None), ("index", 9)):
        other = EncodedSet([dataclasses.replace(item, **{name: value})])
        assert other.digests[0] == digests[0]
