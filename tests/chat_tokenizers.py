"""Byte-level tokenizers with chat templates as they are met in the wild, written for the tests.

`written(name, messages)` is what each template writes, spelled out without Jinja: the pieces
(text, scored) of a conversation up to the end of its last assistant turn, where `scored` is what
the model has to write of it.
"""

from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "user assistant system Human: Assistant: the cat sat on the mat, and  then it sat again.\n\n",
    "What is it? It is a thing!\n  - one\n  - two\n\nHuman: hello\n\nAssistant: hello there: yes",
] * 3
# How Llama 3 splits: line breaks stay together, whatever follows them (GPT-2 splits off the last).
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LOOP, END = "{% for m in messages %}", "{% endfor %}"
CHATML = LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n" + END
CHATML_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
NO_SYSTEM = (
    "{% if messages and messages[0].role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}"
)

# name: (template, BOS, EOS, its other special tokens)
TEMPLATES = {
    "chatml": (CHATML + CHATML_PROMPT, "<s>", "<|im_end|>", ["<|im_start|>"]),
    # Llama 3: BOS by the template, trims, turns end with another token than EOS.
    "llama3": (
        "{{ bos_token }}" + LOOP + "<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>"
        + END + "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}",
        "<|begin|>", "<|eos|>", ["<|start|>", "<|end|>", "<|eot|>"],
    ),
    # Qwen 3: what was thought is shown for the last answer only.
    "qwen3": (
        LOOP + "<|im_start|>{{ m.role }}\n{% if loop.last %}{{ m.content }}{% else %}"
        "{{ m.content.split('</think>')[-1] }}{% endif %}<|im_end|>\n" + END + CHATML_PROMPT,
        "<s>", "<|im_end|>", ["<|im_start|>"],
    ),
    # Gemma: no system turns, the assistant is the "model", a line break behind every turn.
    "gemma": (
        NO_SYSTEM + "{{ bos_token }}" + LOOP
        + "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
        + "</turn>\n"
        + END + "{% if add_generation_prompt %}<turn>model\n{% endif %}",
        "<bos>", "<eos>", ["<turn>", "</turn>"],
    ),
    # Mistral: BOS and EOS by the template, nothing opens an answer.
    "mistral": (
        NO_SYSTEM + "{{ bos_token }}" + LOOP + "{% if m.role == 'assistant' %} {{ m.content }}"
        "{{ eos_token }}{% else %}[INST] {{ m.content }} [/INST]{% endif %}" + END,
        "<s>", "</s>", ["[INST]", "[/INST]"],
    ),
    # A line break behind EOS, and contents stripped.
    "strips": (
        LOOP + "<|{{ m.role }}|>{{ m.content.strip() }}{{ eos_token }}\n" + END
        + "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "<s>", "</s>", ["<|user|>", "<|assistant|>"],
    ),
    "transcript": (None, "<s>", "</s>", []),
}  # fmt: skip


@cache
def chat_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """One that adds BOS and EOS when asked for special tokens."""
    template, bos, eos, others = TEMPLATES[name]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=[bos, eos, *others],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(t, core.token_to_id(t)) for t in (bos, eos)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def written(name: str, messages) -> list[tuple[str, bool]]:
    """What the template writes; of a conversation that ends with an assistant's turn."""
    _, bos, eos, _ = TEMPLATES[name]
    pieces = [("" if name in ("chatml", "qwen3", "strips") else bos, False)]
    for i, (role, content) in enumerate(messages):
        scored, last = role == "assistant", i == len(messages) - 1
        if name in ("chatml", "qwen3"):
            if name == "qwen3" and not last:
                content, scored = (
                    content.split("</think>")[-1],
                    scored and "</think>" not in content,
                )
            pieces += [(f"<|im_start|>{role}\n", False), (f"{content}<|im_end|>", scored)]
            pieces += [("", False) if last else ("\n", False)]
        elif name == "llama3":
            pieces += [
                (f"<|start|>{role}<|end|>\n\n", False),
                (f"{content.strip()}<|eot|>", scored),
            ]
            pieces += [(eos, True)] * last
        elif name == "gemma":
            speaker = "model" if scored else role
            pieces += [(f"<turn>{speaker}\n", False), (f"{content.strip()}</turn>", scored)]
            pieces += [(f"\n{eos}", True) if last else ("\n", False)]
        elif name == "mistral":
            turn = f" {content}{eos}" if scored else f"[INST] {content} [/INST]"
            pieces += [(turn, scored)]
        elif name == "strips":
            pieces += [(f"<|{role}|>", False), (f"{content.strip()}{eos}", scored)]
            pieces += [("", False) if last else ("\n", False)]
        else:
            speaker = {"user": "Human", "assistant": "Assistant"}.get(role)
            gap = "\n\n" if i or speaker else ""
            head = f"{gap}{speaker}:" if speaker else gap
            pieces += [(head, False), (f" {content}" if speaker else content, scored)]
            pieces += [(eos, True)] * last
    return pieces


def tokens_of(tokenizer, pieces) -> tuple[list[int], list[bool]]:
    """(ids, which of them lie within scored pieces) of the joined pieces, by the core tokenizer."""
    encoding = tokenizer.backend_tokenizer.encode(
        "".join(text for text, _ in pieces), add_special_tokens=False
    )
    flags = [scored for text, scored in pieces for _ in text]
    return encoding.ids, [all(flags[start:end]) for start, end in encoding.offsets]
