"""Pairs of conversations to token ids, with one boundary between prompt and response.

P = prompt tokens, n_k = tokens of response k, end-of-sequence (EOS) token included.

The rules:
- The boundary is found in tokens. The prompt is the longest run of tokens with which the prompt's
  text and both whole conversations begin, so prompt + response are always the tokens of the whole
  conversation, and the same prompt serves both responses.
- EOS ends every response once: the template's own if it writes one, else one is appended.
- A prompt is never cut. A response is cut at its end to fit `max_length` and then has no EOS.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, overload

import numpy as np

from prefopt.data.records import Feedback, Message, Pair
from prefopt.data.template import choose_template, render_conversation, render_prompt
from prefopt.errors import InputError

BATCH = 256  # pairs per call of the tokenizer
DESIRABLE, UNDESIRABLE, BASELINE = 1, 0, -1  # labels; BASELINE: a response to another prompt


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt [P >= 1] and its responses, each [n_k >= 1], int32; `index` is the row encoded.

    `scored` [n] bool: which tokens of a single response count (None: all). `labels`: one of
    DESIRABLE, UNDESIRABLE and BASELINE per response, for losses on single responses. `margin` and
    `source` are the record's.
    """

    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    index: int
    weight: float = 1.0
    margin: float | None = None
    source: str | None = None
    scored: np.ndarray | None = None
    labels: tuple[int, ...] | None = None


class EncodedSet(Sequence[Encoded]):
    """Encoded groups in source order, with what truncation and filtering did to them.

    `counts` maps "truncated" (responses cut), "dropped: <reason>" (pairs) and other facts to how
    many; `template` says which template was applied and why.
    """

    def __init__(self, items: Sequence[Encoded], counts: dict[str, int], template: str):
        self._items = list(items)
        self.counts = counts
        self.template = template

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> EncodedSet: ...
    def __getitem__(self, index: int | slice) -> Encoded | EncodedSet:
        if isinstance(index, slice):
            return EncodedSet(self._items[index], dict(self.counts), self.template)
        return self._items[index]


class Group(NamedTuple):
    """One record to encode: a prompt, its responses, and the fields of Encoded it decides."""

    prompt: list[Message]
    responses: Sequence[list[Message]]
    about: dict[str, Any]


# (responses in tokens, room for each) -> the responses that stay, cut, or why the group is dropped
Fit = Callable[[list[np.ndarray], int], tuple[np.ndarray, ...] | str]


def encode_pairs(
    pairs: Iterable[Pair], tokenizer: Any, *, max_length: int = 1024, template: str = "auto"
) -> EncodedSet:
    """Encode each pair as a prompt with two responses (chosen, rejected); see the rules above.

    `max_length` bounds prompt + response in tokens, EOS included. Dropped, and counted: prompts
    that leave no room for a response, pairs that are the same in tokens (before or after
    truncation), conversations the chat template refuses. Raises InputError for a tokenizer without
    EOS and when every pair is dropped.
    """
    groups = (
        Group(
            p.prompt,
            (p.chosen, p.rejected),
            {"weight": p.weight, "margin": p.margin, "source": p.source},
        )
        for p in pairs
    )
    return encode_groups(groups, tokenizer, _fit_pair, max_length, template, "pair")


def encode_feedback(
    feedback: Iterable[Feedback], tokenizer: Any, *, max_length: int = 1024, template: str = "auto"
) -> EncodedSet:
    """Encode each as a prompt with one labelled response, by the rules of `encode_pairs`."""
    groups = (
        Group(f.prompt, (f.response,), {"labels": (int(f.desirable),), "source": f.source})
        for f in feedback
    )
    return encode_groups(groups, tokenizer, cut, max_length, template, "response")


def encode_groups(
    groups: Iterable[Group], tokenizer: Any, fit: Fit, max_length: int, template: str, unit: str
) -> EncodedSet:
    """Encode prompts with any number of responses; `unit` is what a group is called in errors."""
    check_limits(tokenizer, max_length)
    chosen_template = choose_template(tokenizer, template)
    counts: Counter[str] = Counter(truncated=0)
    items: list[Encoded] = []
    prompt_lengths: list[int] = []
    for index, about, tokens in _tokenized(groups, tokenizer, chosen_template.name):
        if isinstance(tokens, str):
            counts[f"dropped: {tokens}"] += 1
            continue
        prompt, *wholes = tokens
        size = min(common_prefix(prompt, whole) for whole in wholes)
        counts["prompt not a prefix of its conversation, in tokens"] += size < len(prompt)
        prompt_lengths.append(size)
        responses = [ended(whole[size:], tokenizer) for whole in wholes]
        kept = fit(responses, max_length - size) if size else "empty prompt"
        if isinstance(kept, str):
            counts[f"dropped: {kept}"] += 1
            continue
        counts["truncated"] += sum(len(r) > max_length - size for r in responses)
        inside = sum(tokenizer.eos_token_id in response[:-1] for response in kept)
        counts["responses with an EOS token inside"] += inside
        items.append(Encoded(prompt[:size].copy(), kept, index, **about))
    counts = Counter({key: n for key, n in counts.items() if n or key == "truncated"})
    if not items:
        raise InputError(nothing_left(counts, prompt_lengths, max_length, unit))
    return EncodedSet(items, dict(counts), str(chosen_template))


def encode_prompts(
    prompts: Sequence[Sequence[Message]], tokenizer: Any, template: str = "auto"
) -> list[np.ndarray]:
    """Token ids [P] int32 of each prompt, up to where the assistant starts to speak."""
    name = choose_template(tokenizer, template).name
    texts = [render_prompt(prompt, tokenizer, name) for prompt in prompts]
    encoded = tokenize(texts, tokenizer, name)
    for i, ids in enumerate(encoded):
        if len(ids) == 0:
            raise InputError(f"Prompt {i} is empty: it has no token to start from.")
    return encoded


def preview(encoded: Encoded, tokenizer: Any) -> list[tuple[str, str]]:
    """What the model will see, as (segment, text): the prompt once, then for each response its
    text, with what is not scored of it as more "prompt", and either ("eos", ...) or
    ("truncated", "")."""
    out = [("prompt", decode(encoded.prompt, tokenizer))]
    for response in encoded.responses:
        whole = response[-1] == tokenizer.eos_token_id
        size = len(response) - whole
        scored = np.ones(size, dtype=bool) if encoded.scored is None else encoded.scored[:size]
        starts = [0, *(np.flatnonzero(np.diff(scored)) + 1).tolist()]
        for start, end in zip(starts, [*starts[1:], size], strict=True):
            kind = "response" if scored[start:end].all() else "prompt"
            out.append((kind, decode(response[start:end], tokenizer)))
        out.append(("eos", decode(response[-1:], tokenizer)) if whole else ("truncated", ""))
    return out


# --- text to tokens ----------------------------------------------------------------------------


def check_limits(tokenizer: Any, max_length: int) -> None:
    """InputError where no prompt with a response that ends could be encoded."""
    if max_length < 2:
        raise InputError(f"max_length={max_length} leaves no room for a prompt and a response.")
    if tokenizer.eos_token_id is None:
        raise InputError(
            "The tokenizer has no EOS token, so no response could end: set eos_token in the model "
            "folder's tokenizer_config.json."
        )


def _tokenized(
    groups: Iterable[Group], tokenizer: Any, template: str
) -> Iterator[tuple[int, dict[str, Any], list[np.ndarray] | str]]:
    """(index, what it decides, [prompt, whole of each response] or why it cannot be rendered)."""
    numbered = enumerate(groups)
    while batch := list(islice(numbered, BATCH)):
        texts: list[str] = []
        refused: dict[int, str] = {}
        for index, (prompt, responses, _) in batch:
            try:
                texts += [
                    render_prompt(prompt, tokenizer, template),
                    *(render_conversation(prompt, r, tokenizer, template) for r in responses),
                ]
            except InputError as error:
                refused[index] = str(error)
        ids = iter(tokenize(texts, tokenizer, template))
        for index, (_, responses, about) in batch:
            size = 1 + len(responses)
            yield index, about, refused.get(index) or [next(ids) for _ in range(size)]


def tokenize(texts: list[str], tokenizer: Any, template: str) -> list[np.ndarray]:
    """Ids of each text. A chat template writes its own special tokens; other text gets those that
    the tokenizer puts in front (BOS), never those it puts behind."""
    if not texts:
        return []
    start = [] if template == "chat" else _start_ids(tokenizer)
    ids = _ids(texts, tokenizer)
    return [np.array(start + text_ids, dtype=np.int32) for text_ids in ids]


def _ids(texts: list[str], tokenizer: Any, special: bool = False) -> list[list[int]]:
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


def _start_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text."""
    (bare,), (full,) = _ids(["a"], tokenizer), _ids(["a"], tokenizer, special=True)
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return [tokenizer.bos_token_id] if full[0] == tokenizer.bos_token_id else []


def decode(ids: np.ndarray, tokenizer: Any) -> str:
    return tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)


# --- the rules ---------------------------------------------------------------------------------


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix of two id arrays."""
    size = min(len(a), len(b))
    different = np.flatnonzero(a[:size] != b[:size])
    return int(different[0]) if len(different) else size


def ended(response: np.ndarray, tokenizer: Any) -> np.ndarray:
    """The response up to the EOS that ends it (only white space may follow), or with one added."""
    ends = np.flatnonzero(response == tokenizer.eos_token_id)
    if len(ends) and not decode(response[ends[-1] + 1 :], tokenizer).strip():
        return response[: ends[-1] + 1].copy()
    return np.append(response, np.int32(tokenizer.eos_token_id))


def cut(responses: list[np.ndarray], room: int) -> tuple[np.ndarray, ...] | str:
    """The responses cut to `room` tokens, or why there are none."""
    if room <= 0:
        return "prompt fills max_length"
    return tuple(response[:room].copy() for response in responses)


def _fit_pair(responses: list[np.ndarray], room: int) -> tuple[np.ndarray, ...] | str:
    """A pair that still differs."""
    chosen, rejected = responses
    if np.array_equal(chosen, rejected):
        return "identical in tokens"
    kept = cut(responses, room)
    if not isinstance(kept, str) and np.array_equal(kept[0], kept[1]):
        return "identical after truncation"
    return kept


def nothing_left(
    counts: Counter[str], prompt_lengths: list[int], max_length: int, unit: str = "pair"
) -> str:
    """Why encoding left nothing, and which max_length would."""
    dropped = {k.removeprefix("dropped: "): n for k, n in counts.items() if k.startswith("dropped")}
    if not dropped:
        return f"There are no {unit}s to encode."
    reasons = ", ".join(f"{reason} ({count:,})" for reason, count in dropped.items())
    message = f"No {unit} is left after encoding with max_length={max_length}: {reasons}"
    if not any("max_length" in reason or "truncation" in reason for reason in dropped):
        return f"{message}."
    longest, median = max(prompt_lengths), int(np.median(prompt_lengths))
    return (
        f"{message}; the longest prompt has {longest:,} tokens, the median one {median:,}: set "
        f"max_length well above {median:,}."
    )
