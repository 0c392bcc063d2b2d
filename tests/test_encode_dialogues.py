"""Dialogues to tokens: which tokens are scored, against conversations written out by hand.

A conversation is written as pieces (text, scored); its tokens are those of the joined text by the
core tokenizer, and a token is scored if the core tokenizer's own offsets place it in a scored
piece. Nothing of that goes through a chat template or the code under test.
"""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from prefopt.data.encode import encode_pairs, preview
from prefopt.data.encode_dialogues import encode_dialogues
from prefopt.data.records import Dialogue, Message, Pair
from prefopt.errors import InputError

CORPUS = [
    "user assistant system Human: Assistant: the cat sat on the mat, and  then it sat again.\n\n",
    "What is it? It is a thing!\n  - one\n  - two\n\nHuman: hello\n\nAssistant: hello there: yes",
] * 3
MARKS = [
    *("<|im_start|>", "<|im_end|>", "<|start|>", "<|head|>", "<|eot|>", "<|end|>"),
    *("<turn>", "</turn>", "<|user|>", "<|assistant|>"),
]


# How Llama 3 splits: line breaks stay together, whatever follows them (GPT-2 splits off the last).
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def chat(template, eos="</s>", split=None, marks=MARKS):
    """A byte-level BPE with a chat template, that adds BOS and EOS when asked for them."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split:
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(dict.fromkeys(["<s>", "</s>", *marks])),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"<s> $A {eos}", special_tokens=[(t, core.token_to_id(t)) for t in ("<s>", eos)]
    )
    core.add_tokens(["<think>", "</think>"])  # no special tokens, as in Qwen's files
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


LOOP, END = "{% for m in messages %}", "{% endfor %}"
BODY = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TOKENIZERS = {
    "chatml": chat("{{ bos_token }}" + LOOP + BODY + END + PROMPT, eos="<|im_end|>"),
    # Llama 3: trims, and ends turns with another token than EOS.
    "trims": chat(
        "{{ bos_token }}" + LOOP + "<|start|>{{ m.role }}<|head|>\n\n{{ m.content | trim }}<|eot|>"
        + END + "{% if add_generation_prompt %}<|start|>assistant<|head|>\n\n{% endif %}",
        split=LLAMA_3,
    ),
    # Gemma: a line break after the end of every turn, and EOS is another token.
    "break": chat(
        "{{ bos_token }}" + LOOP + "<turn>{{ m.role }}\n{{ m.content }}</turn>\n" + END
        + "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
    ),
    # Knows nothing of a generation prompt: what opens the answer is for the model to write.
    "no prompt": chat(LOOP + BODY + END, eos="<|im_end|>"),
    # Llama 2 and Mistral: the answer follows the instruction, there is nothing to open it with.
    "brackets": chat(
        "{{ bos_token }}" + LOOP + "{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
        "{% else %}[{{ m.role }}] {{ m.content }} [/]{% endif %}" + END
    ),
    # Phi 3: EOS at the end of a conversation that asks for nothing.
    "ends": chat(
        LOOP + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n" + END
        + "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
    ),
    # Qwen 3: an empty thought before the last answer, and none before those that came earlier.
    "rewrites": chat(
        LOOP + "<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' and '<think>' "
        "not in m.content %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content if loop.last else m.content.split('</think>\n\n')[-1] }}<|im_end|>\n"
        + END + PROMPT,
        eos="<|im_end|>",
    ),
    "transcript": chat(None),
}  # fmt: skip


def written(name, turns):
    """The conversation as pieces (text, scored), up to the end of its last assistant turn."""
    pieces = [("" if name in ("no prompt", "ends", "rewrites") else "<s>", False)]
    for i, (role, content) in enumerate(turns):
        scored, last = role == "assistant", i == len(turns) - 1
        if name in ("chatml", "no prompt"):
            pieces += [(f"<|im_start|>{role}\n", scored and name == "no prompt")]
            pieces += [(f"{content}<|im_end|>", scored), ("" if last else "\n", False)]
        elif name == "trims":
            pieces += [
                (f"<|start|>{role}<|head|>\n\n", False),
                (f"{content.strip()}<|eot|>", scored),
            ]
            pieces += [("</s>", True)] * last
        elif name == "break":
            pieces += [(f"<turn>{role}\n", False), (f"{content}</turn>", scored)]
            pieces += [("\n</s>", True)] if last else [("\n", False)]
        elif name == "brackets":
            pieces += [(f" {content}</s>", True) if scored else (f"[{role}] {content} [/]", False)]
        elif name == "ends":
            pieces += [(f"<|{role}|>\n", False), (f"{content}<|end|>", scored)]
            pieces += [("\n</s>", True)] if last else [("\n", False)]
        elif name == "rewrites":
            thought = "" if not last or "<think>" in content else "<think>\n\n</think>\n\n"
            content = content if last else content.split("</think>\n\n")[-1]
            pieces += [(f"<|im_start|>{role}\n", False), (thought, True)]
            pieces += [(f"{content}<|im_end|>", last), ("" if last else "\n", False)]
        else:
            speaker = {"user": "Human", "assistant": "Assistant"}.get(role)
            gap = "\n\n" if i or speaker else ""
            pieces += (
                [(f"{gap}{speaker}:", False), (f" {content}", scored)]
                if speaker
                else [(gap + content, False)]
            )
            pieces += [("</s>", True)] * last
    return pieces


def tokens_of(tokenizer, pieces):
    """(ids, scored, (start, end) in characters) of the joined pieces."""
    encoding = tokenizer.backend_tokenizer.encode(
        "".join(text for text, _ in pieces), add_special_tokens=False
    )
    flags = np.repeat([scored for _, scored in pieces], [len(text) for text, _ in pieces])
    scored = np.array([flags[start:end].all() for start, end in encoding.offsets], dtype=bool)
    return encoding.ids, scored, encoding.offsets


def flat(item):
    """(all tokens, which are scored) of an encoded dialogue."""
    (response,) = item.responses
    scored = np.ones(len(response), bool) if item.scored is None else item.scored[0]
    assert len(item.prompt) >= 1 and item.prompt.dtype == response.dtype == np.int32
    assert len(scored) == len(response) and scored[0] and scored[-1]
    assert item.scored is None or not scored.all()
    return [*item.prompt, *response], np.concatenate([np.zeros(len(item.prompt), bool), scored])


def dialogue(*contents, system=None):
    turns = [Message("system", system)] if system is not None else []
    roles = ("user", "assistant")
    return Dialogue([*turns, *(Message(roles[i % 2], c) for i, c in enumerate(contents))])


WORDS = st.sampled_from(
    ["the cat", "sat.", "a", "é", "🐟!", "two\n\nlines", "Human: x", "<", "\t-"]
)
WIDE = st.lists(st.one_of(WORDS, st.text(st.characters(exclude_categories=["Cs"]), max_size=8)))
PADDED = WIDE.map(lambda parts: " ".join(parts).replace("<", "("))  # no special token as text
BARE = PADDED.map(lambda text: text.strip() or "yes")


def dialogues(text):
    def build(contents, system):
        return dialogue(*contents[: len(contents) // 2 * 2], system=system)

    contents = st.lists(text, min_size=2, max_size=7)
    return st.builds(build, contents, st.one_of(st.none(), text))


# --- which tokens are scored -------------------------------------------------------------------


@settings(max_examples=300)
@given(dialogues(BARE), st.sampled_from(sorted(TOKENIZERS)))
def test_the_scored_tokens_are_those_of_the_assistant(source, name):
    tokenizer = TOKENIZERS[name]
    encoded = encode_dialogues([source], tokenizer, max_length=100_000)
    ids, scored, _ = tokens_of(tokenizer, written(name, source.turns))
    tokens, mask = flat(encoded[0])
    assert tokens == ids and mask.tolist() == scored.tolist()
    answers = sum(turn.role == "assistant" for turn in source.turns)
    rewritten = "assistant turns that the chat template rewrites, not scored"
    expected = {"truncated": 0} | ({rewritten: answers - 1} if name == "rewrites" else {})
    assert encoded.counts == {k: n for k, n in expected.items() if n or k == "truncated"}
    assert encoded.template.startswith("transcript" if name == "transcript" else "chat")


@settings(max_examples=200)
@given(dialogues(PADDED), st.sampled_from(sorted(TOKENIZERS)))
def test_white_space_around_a_turn_lets_nothing_of_the_users_in(source, name):
    """White space at an edge shares tokens with what stands beside it. Such a token counts where a
    turn begins (it is the first that the model writes) and not where it ends."""
    tokenizer = TOKENIZERS[name]
    pieces = written(name, source.turns)
    ids, scored, offsets = tokens_of(tokenizer, pieces)
    try:
        (item,) = encode_dialogues([source], tokenizer, max_length=100_000)
    except InputError:
        assert not scored[1:].any()
        return
    tokens, mask = flat(item)
    assert tokens == ids
    text = "".join(text for text, _ in pieces)
    flags = np.repeat([flag for _, flag in pieces], [len(text) for text, _ in pieces])
    for (start, end), ours in zip(offsets, mask, strict=True):
        if ours and not flags[start:end].all():
            outside = np.flatnonzero(~flags[start:end])
            assert text[start:end].isspace() and flags[end - 1]
            assert outside.tolist() == list(range(len(outside)))
        if flags[start:end].all() and not ours:
            assert text[start:end].isspace() or start == 0


def test_pieces_are_what_the_templates_write():
    """The hand-written conversations above, against the templates themselves."""
    source = dialogue("q", "a", "r", "b", system="S")
    for name, tokenizer in TOKENIZERS.items():
        if name != "transcript":
            turns = [message._asdict() for message in source.turns]
            text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
            ours = "".join(text for text, _ in written(name, source.turns))
            assert ours in (text, text + "\n</s>", text + "</s>"), name


@pytest.mark.parametrize("name, expected", [
    ("chatml", ["a b<|im_end|>", "c<|im_end|>"]),
    ("trims", ["a b<|eot|>", "c<|eot|></s>"]),
    ("break", ["a b</turn>", "c</turn>\n</s>"]),
    ("no prompt", ["<|im_start|>assistant\na b<|im_end|>", "<|im_start|>assistant\nc<|im_end|>"]),
    ("brackets", [" a b</s>", " c</s>"]),
    ("ends", ["a b<|end|>", "c<|end|>\n</s>"]),
    ("rewrites", ["<think>\n\n</think>\n\nc<|im_end|>"]),
    ("transcript", [" a b", " c</s>"]),
])  # fmt: skip
def test_what_is_scored_read_as_text(name, expected):
    tokenizer = TOKENIZERS[name]
    source = dialogue("q", "a b", "what", "c", "thanks", system="S")  # "thanks" answers nothing
    tokens, mask = flat(encode_dialogues([source], tokenizer)[0])
    starts = np.flatnonzero(np.diff(mask.astype(int), prepend=0) == 1)
    runs = [tokens[s : s + int(np.argmin([*mask[s:], False]))] for s in starts]
    assert [tokenizer.decode(run) for run in runs] == expected


def test_a_thought_of_the_last_turn_is_scored_and_earlier_ones_are_not_shown():
    source = dialogue("q", "<think>\nhm\n</think>\n\na", "r", "<think>\nso\n</think>\n\nb")
    tokenizer = TOKENIZERS["rewrites"]
    encoded = encode_dialogues([source], tokenizer)
    segments = preview(encoded[0], tokenizer)
    assert segments[1:] == [("response", "<think>\nso\n</think>\n\nb"), ("eos", "<|im_end|>")]
    assert "hm" not in segments[0][1]
    assert encoded.counts["assistant turns that the chat template rewrites, not scored"] == 1


def test_a_prompt_that_writes_more_than_stands_before_the_answer():
    """As with DeepSeek R1: the prompt opens a thought that the conversation does not have."""
    opened = PROMPT.replace("assistant\n", "assistant\n<think>\n")
    tokenizer = chat(LOOP + BODY + END + opened, eos="<|im_end|>")
    source = dialogue("q", "two words", "r", "three more words")
    (item,) = encoded = encode_dialogues([source], tokenizer)
    texts = [tokenizer.decode(run) for run in runs(*flat(item))]
    assert texts == ["two words<|im_end|>", "three more words<|im_end|>"]
    assert encoded.counts["prompt not a prefix of its conversation, in tokens"] == 2


def test_a_template_whose_rewriting_hides_where_an_answer_begins():
    """The thought of the last assistant turn stays in a prompt but not in the whole conversation:
    what both have in common ends before that turn, and nothing after it may count for it."""
    template = (
        "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}" + LOOP
        + "<|im_start|>{{ m.role }}\n{{ m.content if loop.index0 == ns.last else "
        "m.content.split('</think>')[-1] }}<|im_end|>\n" + END + PROMPT
    )  # fmt: skip
    tokenizer = chat(template, eos="<|im_end|>")
    encoded = encode_dialogues(
        [dialogue("q", "<think>x</think>a", "r", "<think>y</think>b"), dialogue("q", "c")],
        tokenizer,
    )
    assert [item.index for item in encoded] == [1]
    assert encoded.counts["dropped: no token to score"] == 1
    assert encoded.counts["assistant turns that the chat template rewrites, not scored"] == 2


REAL = ["cohere", "cohere2", "diffusion_gemma", "gemma", "gemma3", "lfm2", "llama3", "phi3"]
REAL += ["phi3_5", "qwen2_5", "qwen2_5_vl", "qwen3_instruct_2507"]


def runs(tokens, mask):
    """Each run of scored tokens, without the white space that ends it."""
    edges = np.flatnonzero(np.diff([False, *mask, False]))
    return [list(tokens[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("system", [None, "Be kind."])
def test_templates_of_published_models(name, system):
    """Against transformers' own mask of what the assistant says: TRL ships the templates of these
    models with marks around it. Its marks take in the line break after a turn; here that is not
    scored, and where it ends the conversation EOS follows it, as in pairs."""
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    plain, marked = (
        (folder / file).read_text() for file in (f"{name}.jinja", f"{name}_training.jinja")
    )
    marks = re.findall(r"<\|[^|<>{}\s]+\|>|</?[a-z_]+>|<turn\|>|<\|turn>", plain + marked)
    source = dialogue("one q", "two a", "three q", "four a", "five q", "six a", system=system)
    if name == "gemma" and system:
        source = Dialogue(source.turns[1:])  # which has no system turns
    tokenizer = chat(plain, split=LLAMA_3, marks=marks)
    (item,) = encode_dialogues([source], tokenizer, max_length=10_000)
    tokens, mask = flat(item)

    tokenizer.chat_template = marked
    turns = [message._asdict() for message in source.turns]
    theirs = tokenizer.apply_chat_template(
        turns, return_assistant_tokens_mask=True, return_dict=True
    )
    assert len(runs(tokens, mask)) == 3
    expected = [
        tokenizer.decode(run).rstrip("\n")
        for run in runs(theirs["input_ids"], theirs["assistant_masks"])
    ]
    ours = [tokenizer.decode(run) for run in runs(tokens, mask)]
    for texts in (ours, expected):  # Phi writes EOS itself
        texts[-1] = texts[-1].removesuffix("</s>").rstrip("\n")
    assert [text.lstrip("\n") for text in expected] == ours
    size = min(len(tokens) - 1, len(theirs["input_ids"]))
    assert tokens[:size] == theirs["input_ids"][:size]


@settings(max_examples=60)
@given(BARE, BARE, BARE, st.sampled_from(sorted(TOKENIZERS)))
def test_a_single_answer_is_encoded_as_that_of_a_pair(prompt, chosen, rejected, name):
    if chosen == rejected:
        return
    sides = ([Message("assistant", text)] for text in (chosen, rejected))
    source = Pair([Message("user", prompt)], *sides)
    (pair,) = encode_pairs([source], TOKENIZERS[name], max_length=100_000)
    (item,) = encode_dialogues([dialogue(prompt, chosen)], TOKENIZERS[name], max_length=100_000)
    assert item.scored is None
    assert [*item.prompt, *item.responses[0]] == [*pair.prompt, *pair.responses[0]]
    assert len(item.prompt) == len(pair.prompt) or name == "rewrites"


def test_all_tokens_but_the_first():
    source = dialogue("q", "a", "r", "b", "unanswered", system="S")
    for name, tokenizer in TOKENIZERS.items():
        (item,) = encode_dialogues([source], tokenizer, loss_on="all")
        assert item.scored is None and len(item.prompt) == 1
        ids, _, _ = tokens_of(tokenizer, written(name, source.turns[:5]))
        assert [*item.prompt, *item.responses[0]] == ids


def test_tools_and_answers_in_a_row():
    turns = [("user", "q"), ("assistant", "call"), ("tool", "result"), ("assistant", "so")]
    turns += [("assistant", "and")]
    source = Dialogue([Message(*turn) for turn in turns], source="here")
    (item,) = encode_dialogues([source], TOKENIZERS["chatml"])
    ids, scored, _ = tokens_of(TOKENIZERS["chatml"], written("chatml", source.turns))
    tokens, mask = flat(item)
    assert tokens == ids and mask.tolist() == scored.tolist() and item.source == "here"


def test_a_conversation_that_the_assistant_opens():
    """Nothing asks for its first turn, which is context like the user's."""
    turns = [Message("assistant", "hi"), *dialogue("q", "a").turns]
    (item,) = encoded = encode_dialogues([Dialogue(turns)], TOKENIZERS["chatml"])
    assert preview(item, TOKENIZERS["chatml"])[1:] == [("response", "a"), ("eos", "<|im_end|>")]
    assert len(encoded.counts) == 2
    with pytest.raises(InputError, match="no token to score"):
        encode_dialogues([Dialogue(turns[:1])], TOKENIZERS["chatml"])


def test_the_first_token_is_given_where_nothing_else_is():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({"!": 0, "a": 1, "b": 2}, [])), eos_token="!"
    )
    encoded = encode_dialogues(
        [dialogue("", "ab"), dialogue("b", "a")], tokenizer, template="plain"
    )
    assert [(i.prompt.tolist(), i.responses[0].tolist()) for i in encoded] == [
        ([1], [2, 0]),
        ([2], [1, 0]),
    ]


def test_an_unknown_token_ends_no_turn():
    core = Tokenizer(models.BPE({"!": 0, "?": 1, "a": 2, "\n": 3}, [], unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="!", unk_token="?")
    (item,) = encode_dialogues([dialogue("a", "ax\n", "a", "a")], tokenizer, template="plain")
    assert flat(item)[0] == [2, 2, 1, 3, 2, 2, 0]
    assert item.scored is not None and item.scored[0].tolist() == [True] * 3 + [False] + [True] * 2


def test_an_end_of_text_inside_an_answer_is_counted():
    encoded = encode_dialogues([dialogue("q", "a</s> b", "r", "c</s>")], TOKENIZERS["transcript"])
    assert encoded.counts["responses with an EOS token inside"] == 1
    assert encoded[0].responses[0].tolist().count(TOKENIZERS["transcript"].eos_token_id) == 2


# --- plain text --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["transcript", "chatml"])
@pytest.mark.parametrize("tail", ["", "EOS", "EOS\n"])
def test_plain_text_is_scored_from_its_second_token_on(name, tail):
    tokenizer = TOKENIZERS[name]
    text = "the cat sat\n\nHuman: on the mat" + tail.replace("EOS", tokenizer.eos_token)
    encoded = encode_dialogues([Dialogue([], text), dialogue("q", "a")], tokenizer)
    (item, _) = encoded
    ids, _, _ = tokens_of(tokenizer, [("<s>" + text.split(tokenizer.eos_token)[0], True)])
    assert flat(item)[0] == [*ids, tokenizer.eos_token_id]
    assert item.scored is None and item.prompt.tolist() == [tokenizer.bos_token_id]
    assert encoded.template.startswith("chat" if name == "chatml" else "transcript")


def test_plain_text_alone_has_no_template():
    encoded = encode_dialogues([Dialogue([], "the cat")], TOKENIZERS["chatml"])
    assert encoded.template == "none: text without speakers"
    no_bos = chat(None)
    no_bos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", special_tokens=[]
    )
    (item,) = encode_dialogues([Dialogue([], "the cat")], no_bos)
    assert [*item.prompt, *item.responses[0]] == [
        *tokens_of(no_bos, [("the cat", True)])[0],
        no_bos.eos_token_id,
    ]


# --- truncation and what is dropped ------------------------------------------------------------


@settings(max_examples=150)
@given(
    st.lists(dialogues(BARE), min_size=1, max_size=4),
    st.integers(2, 60),
    st.sampled_from(sorted(TOKENIZERS)),
)
def test_truncation_cuts_the_end_and_counts(sources, max_length, name):
    tokenizer = TOKENIZERS[name]
    full = [flat(item) for item in encode_dialogues(sources, tokenizer, max_length=100_000)]
    kept = [i for i, (_, mask) in enumerate(full) if mask[:max_length].any()]
    if not kept:
        with pytest.raises(InputError, match=r"No dialogue is left.*set max_length well above"):
            encode_dialogues(sources, tokenizer, max_length=max_length)
        return
    encoded = encode_dialogues(sources, tokenizer, max_length=max_length)
    assert [item.index for item in encoded] == kept
    for item in encoded:
        tokens, mask = full[item.index]
        last = int(np.flatnonzero(mask[:max_length])[-1]) + 1
        cut, scored = flat(item)
        assert cut == tokens[:last] and scored.tolist() == mask[:last].tolist()
    fills = len(sources) - len(kept)
    assert encoded.counts.get("dropped: prompt fills max_length", 0) == fills
    assert encoded.counts["truncated"] == sum(
        len(tokens) > max_length and i in kept for i, (tokens, _) in enumerate(full)
    )


def test_what_the_template_refuses_is_counted():
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer = chat(refuse + TOKENIZERS["chatml"].chat_template, eos="<|im_end|>")
    sources = [dialogue("q", "a", system="S"), dialogue("q", "a"), Dialogue([Message("user", "q")])]
    encoded = encode_dialogues(sources, tokenizer)
    assert [item.index for item in encoded] == [1]
    assert encoded.counts == {
        "truncated": 0,
        "dropped: the chat template refuses the conversation (no system)": 1,
        "dropped: no assistant turn": 1,
    }


@pytest.mark.parametrize(
    "options, words",
    [
        ({"loss_on": "user"}, "loss_on='user' is not one of assistant, all"),
        ({"max_length": 1}, "max_length=1 "),
        ({"template": "chatml"}, "auto, chat, transcript, plain"),
        ({"template": "chat"}, "no chat template"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(InputError, match=words):
        encode_dialogues([dialogue("q", "a")], TOKENIZERS["transcript"], **options)


def test_nothing_to_encode_and_no_eos():
    with pytest.raises(InputError, match="There are no dialogues to encode"):
        encode_dialogues([], TOKENIZERS["chatml"])
    tokenizer = chat(None)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no EOS token"):
        encode_dialogues([dialogue("q", "a")], tokenizer)


def test_the_tokenizer_is_called_for_many_dialogues_at_once():
    calls = []

    class Counting(PreTrainedTokenizerFast):
        def __call__(self, texts, **options):
            calls.append(len(texts))
            return super().__call__(texts, **options)

    core = Tokenizer.from_str(TOKENIZERS["chatml"].backend_tokenizer.to_str())
    core.normalizer = normalizers.NFKC()  # so that no words are remembered
    tokenizer = Counting(tokenizer_object=core, bos_token="<s>", eos_token="<|im_end|>")
    tokenizer.chat_template = TOKENIZERS["chatml"].chat_template
    sources = [dialogue(str(i), "a", "b", "c") for i in range(600)]
    assert len(encode_dialogues(sources, tokenizer)) == 600
    # Two chunks, and of each every distinct piece once: the question, and six that all share.
    assert [n for n in calls if n > 1] == [512 + 6, 88 + 6]
    assert len(calls) <= 6


def test_turns_that_are_given_are_not_scored(tiny_model):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model)
    turns = [
        Message(r, c)
        for r, c in zip(("user", "assistant") * 2, ("q", "aa", "r", "bb"), strict=True)
    ]
    every, last = (Dialogue(turns, context=given) for given in (0, 3))
    for dialogue, texts in ((every, [" aa", " bb"]), (last, [" bb"])):
        (item,) = encode_dialogues([dialogue], tokenizer)
        scored = item.responses[0] if item.scored is None else item.responses[0][item.scored[0]]
        assert tokenizer.decode(scored) == "".join(texts) + tokenizer.eos_token
    (whole,) = encode_dialogues([last], tokenizer, loss_on="all")
    assert len(whole.prompt) == 1 and whole.scored is None
