"""Prompts, transcripts and responses, as data sets hold them, to turns: lists of `Message`.

A reader returns turns, or the reason why there are none, as a str.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from prefopt.data.messages import Turns, plain, read_messages, read_tools
from prefopt.data.records import SPOKEN, Message

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
MARKER = re.compile(r"(?:\n\n|\A\s*)(Human|Assistant):")
# What a response that is an object calls its text.
TEXT_KEYS = ("text", "content", "response", "answer", "completion", "completions")
EXTRA_ID = "<extra_id_1>"  # HelpSteer2 begins each turn but the first with it
EXTRA_SPEAKERS = {"User": "user", "Assistant": "assistant"}


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


# --- two conversations -------------------------------------------------------------------------


def part(chosen: Turns, rejected: Turns) -> Turns | None:
    """The turns that both conversations share, up to where the model speaks differently.

    Both end with a turn of the model. None if they answer different things: if the users' turns
    behind that place are not the same ones.
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


def compare(
    prompt: Any, first: Any, second: Any, system: Any = None, tools: Any = None
) -> tuple[Turns, Turns, Turns] | str:
    """(prompt, first, second response) of message lists, with or without the prompt in them.

    A response is a whole conversation or what follows the prompt, which may be text then.
    """
    sides: list[Turns] = []
    for value in (first, second):
        turns = read_messages(value, "assistant")
        if isinstance(turns, str):
            return turns
        if not turns or turns[-1].role not in SPOKEN:
            return "no assistant turn"
        sides.append(turns)
    shared = part(*sides)
    if shared is None:
        return "contexts differ"
    if isinstance(prompt, Mapping):  # OpenAI's form: {"messages": [...], "tools": [...]}
        prompt, tools = prompt.get("messages"), prompt.get("tools") or tools
    asked = read_messages(prompt, "user") if prompt is not None else []
    if isinstance(asked, str):
        return asked
    asked = _join(asked, shared, isinstance(prompt, str))
    asked = asked if isinstance(asked, str) else opened(asked, system, tools)
    if isinstance(asked, str):
        return asked
    return asked, sides[0][len(shared) :], sides[1][len(shared) :]


def _join(prompt: Turns, shared: Turns, text: bool) -> Turns | str:
    """One prompt from what is called that and the turns that the conversations share."""
    if not prompt:
        return shared or "no prompt"
    if not shared:
        return prompt
    if text:  # a string beside whole conversations repeats one of their turns
        asked = prompt[0].content.strip()
        repeated = any(m.role == "user" and m.content.strip() == asked for m in shared)
    else:
        repeated = shared[: len(prompt)] == prompt or shared[-len(prompt) :] == prompt
    if repeated:
        return shared
    if not text and prompt[-1].role != "user":
        return prompt + shared
    return "the prompt column is not in the conversation"


# --- a prompt, and responses to it -------------------------------------------------------------


def read_prompt(
    value: Any, system: Any = None, tools: Any = None
) -> tuple[Turns, Callable[[str], Turns]] | str:
    """(the turns of the prompt, what makes turns of a reply's text to it).

    A prompt is a text (one user turn), an open Human/Assistant transcript, turns that
    `read_extra_id` reads, a message list, or an object with one of these.
    """
    answer = _whole
    value = plain(value)
    if isinstance(value, Mapping):
        tools = value.get("tools") or tools
        keys = ("messages", "full_text", *TEXT_KEYS)
        value = next((value[key] for key in keys if value.get(key) is not None), None)
    if isinstance(value, str) and is_open_transcript(value):
        context, _, opening = value.rpartition(ASSISTANT)
        turns: Turns | str = read_transcript(context)
        # The space after the marker stands in the prompt or in the reply, according to the file.
        answer = _whole if opening else reply
    elif isinstance(value, str):
        turns = read_extra_id(value) or [Message("user", value)]
    elif isinstance(value, list):
        turns = read_messages(value, "user")
    else:
        return f"the prompt is {type(value).__name__}, not text or messages"
    if isinstance(turns, str):
        return turns
    checked = opened(turns, system, tools)
    return checked if isinstance(checked, str) else (checked, answer)


def _whole(text: str) -> Turns:
    return [Message("assistant", text)]


def opened(prompt: Turns, system: Any = None, tools: Any = None) -> Turns | str:
    """The prompt behind its tools and its system turn; it must leave the word to the assistant."""
    if not prompt:
        return "no prompt"
    if prompt[-1].role in SPOKEN:
        return "the prompt ends with an assistant turn"
    return introduced(prompt, system, tools)


def introduced(turns: Turns, system: Any = None, tools: Any = None) -> Turns | str:
    """A conversation behind its tools and its system turn."""
    roles = [message.role for message in turns[:2]]
    if isinstance(system, str) and system and not {"system", "developer"} & set(roles):
        at = 1 if roles[:1] == ["tools"] else 0
        turns = [*turns[:at], Message("system", system), *turns[at:]]
    if tools is None or roles[:1] == ["tools"]:
        return turns
    first = read_tools(tools)
    return first if isinstance(first, str) else first + turns


def read_extra_id(text: str) -> Turns | None:
    """The turns of a text in which "<extra_id_1>Assistant" and "<extra_id_1>User" lines begin every
    turn but the first, which is a user's; None for any other text."""
    if EXTRA_ID not in text:
        return None
    first, *rest = text.split(EXTRA_ID)
    turns = [Message("user", first)]
    for turn in rest:
        speaker, line, content = turn.partition("\n")
        role = EXTRA_SPEAKERS.get(speaker.strip())
        if role is None or not line or role == turns[-1].role:
            return None
        turns.append(Message(role, content))
    # The line breaks before a marker are the marker's.
    return [Message(role, content.rstrip("\n")) for role, content in turns[:-1]] + turns[-1:]


def read_post(info: Any) -> str | None:
    """What asks for a summary of a post or an article, as summarize_from_feedback has them."""
    if not isinstance(info, Mapping):
        return None
    post, article = info.get("post"), info.get("article")
    if isinstance(post, str) and post.strip():
        about = [("SUBREDDIT: r/", info.get("subreddit")), ("TITLE: ", info.get("title"))]
        lines = [f"{what}{value}" for what, value in about if isinstance(value, str) and value]
        return "\n\n".join([*lines, f"POST: {post}", "TL;DR:"])
    if isinstance(article, str) and article.strip():
        return f"Article:\n{article}\n\nTL;DR:"
    return None


def read_response(value: Any, answer: Callable[[str], Turns]) -> Turns | str:
    """The turns of one response: a text, messages, or an object with either."""
    value = plain(value)
    if isinstance(value, Mapping) and not {"role", "from"} & value.keys():
        value = next((value[key] for key in TEXT_KEYS if value.get(key) is not None), None)
    if isinstance(value, str):
        return answer(value)
    if not isinstance(value, list | Mapping):
        return f"a response is {type(value).__name__}, not text or messages"
    turns = read_messages(value, "assistant")
    if isinstance(turns, str):
        return turns
    return turns if turns and turns[-1].role in SPOKEN else "no assistant turn"
