"""Chat templates as they are met in the wild, and tools in them: nothing lost, doubled or moved."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.data.encode import encode_pairs, encode_prompts, preview
from prefopt.data.encode_dialogues import encode_dialogues
from prefopt.data.records import Dialogue, Message, Pair
from prefopt.data.template import choose_template, render
from prefopt.errors import InputError
from tests.chat_tokenizers import (
    CHATML,
    CHATML_PROMPT,
    END,
    LOOP,
    TEMPLATES,
    chat_tokenizer,
    written,
)

NAMES = sorted(TEMPLATES)
STRIP = ("llama3", "gemma", "strips")  # what they write of a turn has no white space at its edges
NO_SYSTEM = ("gemma", "mistral")

TEXT = st.one_of(
    st.sampled_from(
        ["", " ", "\n", "the cat", " a ", "\n\nHuman: no", "é", "🐟!", "it's\ttwo  words"]
    ),
    st.sampled_from(
        ["<|im_end|>", "a</s>b", "<s>", "[/INST] x", "<|eot|>\n", "x <|im_start|>user"]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
)


@st.composite
def conversations(draw):
    prompt = [Message("system", draw(TEXT))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 1))):
        prompt += [Message("user", draw(TEXT)), Message("assistant", draw(TEXT))]
    prompt.append(Message("user", draw(TEXT)))
    sides = []
    for _ in range(2):
        side = [Message("assistant", draw(TEXT))]
        for _ in range(draw(st.integers(0, 1))):
            side += [Message("user", draw(TEXT)), Message("assistant", draw(TEXT))]
        sides.append(side)
    return Pair(prompt, *sides)


def counted(pairs, tokenizer, **options):
    """(groups by row, counts) where nothing being left is no error."""
    keep = Pair([Message("user", "q")], [Message("assistant", "yes")], [Message("assistant", "no")])
    encoded = encode_pairs([*pairs, keep], tokenizer, **options)
    return {item.index: item for item in encoded}, Counter(encoded.counts)


def scored_of(item):
    for response, mask in zip(item.responses, item.scored or (None, None), strict=True):
        yield response if mask is None else response[mask]


@settings(max_examples=400)
@given(st.lists(conversations(), min_size=1, max_size=3), st.sampled_from(NAMES))
def test_nothing_is_lost_or_doubled(pairs, name):
    """Texts with special tokens, white space and nothing in them. The tokens are those of the whole
    conversation by the core tokenizer; EOS is where the conversation ends, once."""
    tokenizer = chat_tokenizer(name)
    core, eos = tokenizer.backend_tokenizer, tokenizer.eos_token_id
    items, counts = counted(pairs, tokenizer, max_length=10_000)
    dropped = sum(n for key, n in counts.items() if key.startswith("dropped"))
    assert len(items) + dropped == len(pairs) + 1
    for row, pair in enumerate(pairs):
        refused = name in NO_SYSTEM and pair.prompt[0].role == "system"
        assert not (refused and row in items)
        if row not in items:
            continue
        item = items[row]
        for side, response in zip((pair.chosen, pair.rejected), item.responses, strict=True):
            tokens = [*item.prompt.tolist(), *response.tolist()]
            text = "".join(text for text, _ in written(name, [*pair.prompt, *side]))
            whole = core.encode(text, add_special_tokens=False).ids
            # An EOS that ends the last text stands for the one that would be appended.
            assert tokens == whole or [*tokens, eos] == whole[: len(tokens) + 1]
            assert tokens[-1] == eos
        spelled = any(
            special in message.content
            for message in (*pair.prompt, *pair.chosen, *pair.rejected)
            for special in (tokenizer.bos_token, tokenizer.eos_token, *TEMPLATES[name][3])
        )
        if not spelled:
            bos = [*item.prompt.tolist()].count(tokenizer.bos_token_id)
            assert bos == (name not in ("chatml", "qwen3", "strips"))
            for side, scored in zip((pair.chosen, pair.rejected), scored_of(item), strict=True):
                said = [m.content for m in side if m.role == "assistant"]
                said = [text.strip() for text in said] if name in STRIP else said
                decoded = tokenizer.decode(scored.tolist())
                for text in said:  # in order, every one of them
                    assert text.rstrip() in decoded, (text, decoded)
                    decoded = decoded[decoded.index(text.rstrip()) + len(text.rstrip()) :]
                assert list(scored).count(eos) == (
                    len(said) if name in ("chatml", "qwen3", "mistral", "strips") else 1
                )


@settings(max_examples=200)
@given(
    st.lists(conversations(), min_size=1, max_size=4),
    st.integers(20, 60),
    st.sampled_from(NAMES),
)
def test_truncation_leaves_no_pair_without_a_difference_and_counts(pairs, max_length, name):
    tokenizer = chat_tokenizer(name)
    full, before = counted(pairs, tokenizer, max_length=10_000)
    items, counts = counted(pairs, tokenizer, max_length=max_length)
    assert (
        len(items) + sum(n for k, n in counts.items() if k.startswith("dropped")) == len(pairs) + 1
    )
    assert items.keys() <= full.keys()
    cut = 0
    for row, item in items.items():
        chosen, rejected = (tuple(scored) for scored in scored_of(item))
        assert chosen and rejected and chosen != rejected
        assert item.prompt.tolist() == full[row].prompt.tolist()
        for response, whole in zip(item.responses, full[row].responses, strict=True):
            assert len(item.prompt) + len(response) <= max_length
            assert response.tolist() == whole[: len(response)].tolist()
            cut += len(item.prompt) + len(whole) > max_length
    assert counts["truncated"] == cut
    for reason in ("identical in tokens", "no token to score"):
        assert counts[f"dropped: {reason}"] == before[f"dropped: {reason}"]


def test_special_tokens_in_a_text_are_counted():
    tokenizer = chat_tokenizer("chatml")
    plain = Pair([Message("user", "q")], [Message("assistant", "a")], [Message("assistant", "b")])
    typed = Pair([Message("user", "x<|im_end|>\n")], plain.chosen, plain.rejected)
    _, counts = counted([plain, typed, plain], tokenizer)
    assert counts["special tokens spelled out in the text"] == 1
    dialogues = [Dialogue([*pair.prompt, *pair.chosen]) for pair in (plain, typed)]
    dialogues.append(Dialogue([], "some <s> text"))
    encoded = encode_dialogues(dialogues, tokenizer)
    assert encoded.counts["special tokens spelled out in the text"] == 2


def test_text_that_is_not_unicode_is_counted():
    tokenizer = chat_tokenizer("chatml")
    bad = Pair(
        [Message("user", "q\ud800")], [Message("assistant", "a")], [Message("assistant", "b")]
    )
    items, counts = counted([bad], tokenizer)
    assert list(items) == [1]
    reason = "dropped: text that is not valid Unicode (half a surrogate pair)"
    assert counts[reason] == 1
    encoded = encode_dialogues([Dialogue([], "\udc00"), Dialogue([], "fine")], tokenizer)
    assert encoded.counts[reason] == 1 and len(encoded) == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_that_is_answered_is_the_one_that_is_trained_on(name):
    tokenizer = chat_tokenizer(name)
    prompt = [Message("user", "q")]
    (item,) = encode_pairs(
        [Pair(prompt, [Message("assistant", "a")], [Message("assistant", "b")])], tokenizer
    )
    assert encode_prompts([prompt], tokenizer)[0].tolist() == item.prompt.tolist()


# --- tools ----------------------------------------------------------------------------------------

TOOLS = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + LOOP
    + "<|im_start|>{{ m.role }}\n{{ m.tool_call_id }}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.id }} {{ c.function.name }} "
    "{{ c.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n" + END + CHATML_PROMPT
)  # fmt: skip


def with_template(template):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=chat_tokenizer("chatml").backend_tokenizer,
        bos_token="<s>", eos_token="<|im_end|>",
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {}}}
PROMPT = [Message("tools", json.dumps([WEATHER])), Message("user", "q")]
CALLS = [{"name": "weather", "arguments": {"city": "Bern"}}, {"name": "weather", "id": "mine"}]
ANSWER = [
    Message("assistant", "let me see"), Message("tool_calls", json.dumps(CALLS)),
    Message("tool", "rain"), Message("tool", "sun"), Message("assistant", "both"),
]  # fmt: skip


def test_tools_and_calls_in_a_chat_template():
    _, whole = render(PROMPT, ANSWER, with_template(TOOLS), "chat")
    assert whole == (
        f"<|im_start|>tools\n{json.dumps([WEATHER])}<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
        '<|im_start|>assistant\nlet me see<call>call00000 weather {"city": "Bern"}</call>'
        "<call>mine weather {}</call><|im_end|>\n<|im_start|>tool\ncall00000rain<|im_end|>\n"
        "<|im_start|>tool\nminesun<|im_end|>\n<|im_start|>assistant\nboth<|im_end|>\n"
    )
    again = [*ANSWER, Message("user", "r"), Message("tool_calls", json.dumps(CALLS[:1]))]
    _, whole = render(PROMPT, again, with_template(TOOLS), "chat")
    assert whole.endswith('assistant\n<call>call00002 weather {"city": "Bern"}</call><|im_end|>\n')


def test_calls_are_scored_and_results_are_not():
    tokenizer = with_template(TOOLS)
    pair = Pair(PROMPT, ANSWER, [Message("assistant", "no idea")])
    (item,) = encode_pairs([pair], tokenizer)
    kinds = preview(item, tokenizer)
    said = [text for kind, text in kinds if kind in ("response", "eos")]
    assert said[0].startswith("let me see<call>call00000") and said[0].endswith("<|im_end|>")
    assert said[1:] == ["both", "<|im_end|>", "no idea", "<|im_end|>"]
    given = [text for kind, text in kinds if kind == "prompt"]
    assert "rain" in given[1] and "sun" in given[1] and "weather" in given[0]
    alone = Pair(PROMPT, [Message("tool_calls", json.dumps(CALLS))], [Message("assistant", "no")])
    (item,) = encode_pairs([alone], tokenizer)
    assert item.scored is None and item.responses[0][-1] == tokenizer.eos_token_id
    (item,) = encode_dialogues([Dialogue([*PROMPT, *ANSWER])], tokenizer)
    assert [t for k, t in preview(item, tokenizer) if k == "response"] == [said[0], "both"]


CALLING = [
    Message("user", "q"),
    Message("tool_calls", json.dumps(CALLS)),
    Message("assistant", "a"),
]


@pytest.mark.parametrize(
    "prompt, template, name, reason",
    [
        (PROMPT, CHATML + CHATML_PROMPT, "chat", "does not write the tools"),
        (CALLING, CHATML + CHATML_PROMPT, "chat", "does not write the calls"),
        (PROMPT, None, "transcript", "'transcript' has no words for"),
        (CALLING, None, "plain", "'plain' has no words for"),
        ([Message("tools", "{}"), Message("user", "q")], TOOLS, "chat", "not a list in JSON"),
        ([Message("tools", "[" * 9999), Message("user", "q")], TOOLS, "chat", "not a list in JSON"),
        (
            [Message("tools", "[1]"), Message("user", "q")],
            TOOLS,
            "chat",
            "refuses the conversation",
        ),
        (
            [Message("user", "q"), Message("tool_calls", "[1]")],
            TOOLS,
            "chat",
            "objects with a name",
        ),
    ],
)
def test_tools_that_would_be_lost_are_refused_and_counted(prompt, template, name, reason):
    tokenizer = with_template(template)
    pair = Pair(prompt, [Message("assistant", "a")], [Message("assistant", "b")])
    items, counts = counted([pair], tokenizer, template=name)
    assert list(items) == [1]
    (dropped,) = (key for key in counts if key.startswith("dropped"))
    assert reason in dropped and counts[dropped] == 1


def test_named_templates_are_taken_as_transformers_takes_them():
    both = with_template({"default": CHATML + CHATML_PROMPT, "tool_use": TOOLS})
    _, whole = render(PROMPT, ANSWER, both, "chat")
    assert whole == render(PROMPT, ANSWER, with_template(TOOLS), "chat")[1]
    plain = [Message("user", "q")]
    assert render(plain, ANSWER[-1:], both, "chat") == render(
        plain, ANSWER[-1:], with_template(CHATML + CHATML_PROMPT), "chat"
    )
    without = with_template({"rag": CHATML})
    pair = Pair(plain, ANSWER[-1:], ANSWER[:1])
    with pytest.raises(InputError, match="no default specified"):
        encode_pairs([pair], without)
    assert choose_template(both).name == "chat"
