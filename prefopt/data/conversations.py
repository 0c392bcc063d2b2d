"""Text and message lists, as data sets hold them, to turns: lists of `Message`.

A reader returns turns, or the reason why there are none, as a str.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from prefopt.data.records import SPOKEN, Message

Turns = list[Message]

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
MARKER = re.compile(r"(?:\n\n|\A\s*)(Human|Assistant):")
# What a response that is an object calls its text.
TEXT_KEYS = ("text", "content", "response", "answer", "completion", "completions")
TURN_ROLES = {"system", "user", "assistant", "tool", "developer"}
SPEAKERS = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant"),
    "observation": "tool",
}


# --- transcripts -------------------------------------------------------------------------------


def is_open_transcript(text: str) -> bool:
    """Whether it opens like a transcript and ends where the assistant is to speak."""
    return bool(MARKER.match(text)) and text.rstrip().endswith(ASSISTANT)


def read_transcript(context: str) -> Turns:
    """Alternating turns of a transcript; text before the first marker is a system turn.

    A marker that would repeat the speaker, or one not at the start of a paragraph, is text.
    """
    turns: Turns = []
    role, start = "system", 0
    for match in MARKER.finditer(context):
        speaker = "user" if match[1] == "Human" else "assistant"
        if speaker != role:
            turns.append(Message(role, context[start : match.start()]))
            role, start = speaker, match.end()
    turns.append(Message(role, context[start:]))
    preamble = turns[0].content.strip()
    spoken = [Message(turn.role, turn.content.removeprefix(" ")) for turn in turns[1:]]
    return [Message("system", preamble), *spoken] if preamble else spoken


def reply(text: str) -> Turns:
    """A reply behind a marker: the one space after the marker belongs to the marker."""
    return [Message("assistant", text.removeprefix(" "))]


# --- message lists -----------------------------------------------------------------------------


def read_messages(value: Any, role: str) -> Turns | str:
    """Turns of a list of {role, content} or {from, value}, or of a plain string, as `role`."""
    if isinstance(value, str):
        return [Message(role, value)]
    if not isinstance(value, list):
        return f"a conversation is {type(value).__name__}, not a list of messages"
    out: Turns = []
    for message in value:
        turns = _read_message(message)
        if isinstance(turns, str):
            return turns
        out += turns
    return out


def _read_message(message: Any) -> Turns | str:
    keys = ("role", "content")
    if isinstance(message, Mapping) and "from" in message and "role" not in message:
        keys = ("from", "value")
    if not isinstance(message, Mapping) or not all(key in message for key in keys):
        return "a message lacks 'role' or 'content'"
    speaker, content = (message[key] for key in keys)
    role = SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
    if not isinstance(role, str) or role not in TURN_ROLES:
        return f"unknown role {speaker!r:.40}"
    if not isinstance(content, str):
        return f"a message's content is {type(content).__name__}, not text"
    return [Message(role, content)]


def part(chosen: Turns, rejected: Turns) -> Turns | None:
    """The turns that both conversations share, up to where the model speaks differently.

    Both end with a turn of the model. None if they answer different things: if the turns that are
    given (of users and tools, say) behind that place are not the same ones.
    """
    shortest, n = min(len(chosen), len(rejected)), 0
    while n < shortest and chosen[n] == rejected[n]:
        n += 1
    while n > 0 and (n == shortest or chosen[n - 1].role in SPOKEN):
        n -= 1
    asked = [[m for m in side[n:] if m.role == "user"] for side in (chosen, rejected)]
    if asked[0] != asked[1] or any(side[n].role not in SPOKEN for side in (chosen, rejected)):
        return None
    return chosen[:n]


# --- a prompt, and responses to it -------------------------------------------------------------


def read_prompt(value: Any, system: Any = None) -> tuple[Turns, Callable[[str], Turns]] | str:
    """(the turns of the prompt, what makes turns of a reply's text to it).

    A prompt is a text (one user turn), an open Human/Assistant transcript or a message list.
    """

    def whole(text: str) -> Turns:
        return [Message("assistant", text)]

    answer = whole
    if isinstance(value, str) and is_open_transcript(value):
        context, _, opening = value.rpartition(ASSISTANT)
        turns: Turns | str = read_transcript(context)
        # The space after the marker stands in the prompt or in the reply, according to the file.
        answer = whole if opening else reply
    elif isinstance(value, str | list):
        turns = read_messages(value, "user")
    else:
        return f"the prompt is {type(value).__name__}, not text or messages"
    if isinstance(turns, str):
        return turns
    checked = opened(turns, system)
    return checked if isinstance(checked, str) else (checked, answer)


def opened(prompt: Turns, system: Any = None) -> Turns | str:
    """The prompt behind its system turn; it must leave the word to the assistant."""
    if isinstance(system, str) and system and not (prompt and prompt[0].role == "system"):
        prompt = [Message("system", system), *prompt]
    if not prompt:
        return "no prompt"
    if prompt[-1].role in SPOKEN:
        return "the prompt ends with an assistant turn"
    return prompt


def read_response(value: Any, answer: Callable[[str], Turns]) -> Turns | str:
    """The turns of one response: a text, messages, or an object with either."""
    if isinstance(value, Mapping):
        value = next((value[key] for key in TEXT_KEYS if value.get(key) is not None), None)
    if isinstance(value, str):
        return answer(value)
    if not isinstance(value, list):
        return f"a response is {type(value).__name__}, not text or messages"
    turns = read_messages(value, "assistant")
    if isinstance(turns, str):
        return turns
    return turns if turns and turns[-1].role in SPOKEN else "no assistant turn"
