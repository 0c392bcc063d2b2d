"""Conversations to text: the tokenizer's own chat template, a plain transcript, or bare text.

Tools go through chat templates only: a "tools" turn is handed over as `tools`, and a "tool_calls"
turn as the calls of the assistant's turn in front of it. A template that does not write them, but
drops them without a word, is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from prefopt.data.records import Message
from prefopt.errors import InputError

TEMPLATES = ("auto", "chat", "transcript", "plain")
SPEAKERS = {"user": "Human", "assistant": "Assistant"}
TOOL_ROLES = ("tools", "tool_calls")


class Template(NamedTuple):
    """A template by name ("chat", "transcript" or "plain") and why it was taken."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def choose_template(tokenizer: Any, template: str = "auto") -> Template:
    """The template to use; "auto" is "chat" if the tokenizer has a chat template."""
    if template not in TEMPLATES:
        raise InputError(f"template={template!r} is not one of {', '.join(TEMPLATES)}.")
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if template == "chat" and not has_chat:
        raise InputError(
            "template='chat' was asked for, but the tokenizer has no chat template: use "
            "'transcript' or 'plain', or add a chat template to the model folder."
        )
    if template != "auto":
        return Template(template, "as asked for")
    if has_chat:
        return Template("chat", "the tokenizer's own chat template")
    return Template("transcript", "the tokenizer has no chat template")


def render(
    prompt: Sequence[Message], response: Sequence[Message], tokenizer: Any, template: str
) -> tuple[str, str]:
    """(text of the prompt up to where the assistant speaks, text of the whole conversation).

    The first is a prefix of the second, but for chat templates that rewrite earlier turns.
    `template` is a name that `choose_template` returned. Raises InputError where the chat template
    refuses the conversation, and for tools where they cannot be written.
    """
    return (
        render_prompt(prompt, tokenizer, template),
        render_conversation(prompt, response, tokenizer, template),
    )


def render_prompt(prompt: Sequence[Message], tokenizer: Any, template: str) -> str:
    """The prompt with whatever opens an assistant turn."""
    if template == "chat":
        return checked(_chat(prompt, tokenizer, generate=True))
    if template == "plain":
        return checked(_plain(prompt))
    return checked(_transcript(prompt) + "\n\nAssistant:")


def render_conversation(
    prompt: Sequence[Message], response: Sequence[Message], tokenizer: Any, template: str
) -> str:
    """Prompt and response as one text."""
    whole = [*prompt, *response]
    if template == "chat":
        return checked(_chat(whole, tokenizer, generate=False))
    return checked(_plain(whole) if template == "plain" else _transcript(whole))


def checked(text: str) -> str:
    """The text; InputError for one that is not Unicode, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        reason = "text that is not valid Unicode (half a surrogate pair)"
        raise InputError(reason) from None
    return text


def _plain(messages: Sequence[Message]) -> str:
    _without_tools(messages, "plain")
    return "".join(message.content for message in messages)


def _transcript(messages: Sequence[Message]) -> str:
    """Turns as paragraphs with their speaker, as in HH-RLHF; a system turn has no speaker."""
    _without_tools(messages, "transcript")
    parts = []
    for i, (role, content) in enumerate(messages):
        gap = "\n\n" if i or role in SPEAKERS else ""
        if role in ("system", "developer"):
            parts.append(gap + content)
        else:
            parts.append(f"{gap}{SPEAKERS.get(role, role.capitalize())}: {content}")
    return "".join(parts)


def _without_tools(messages: Sequence[Message], template: str) -> None:
    if any(message.role in TOOL_ROLES for message in messages):
        raise InputError(f"tools, which the template {template!r} has no words for")


# --- chat templates ----------------------------------------------------------------------------


def _chat(messages: Sequence[Message], tokenizer: Any, generate: bool) -> str:
    if not any(message.role in TOOL_ROLES for message in messages):
        return _apply([message._asdict() for message in messages], None, tokenizer, generate)
    turns, tools = _with_tools(messages)
    text = _apply(turns, tools, tokenizer, generate)
    # What a template leaves out it leaves out of both.
    if tools and text == _apply(turns, None, tokenizer, generate):
        raise InputError("the chat template does not write the tools of a conversation")
    silent = [{k: v for k, v in turn.items() if k != "tool_calls"} for turn in turns]
    if silent != turns and text == _apply(silent, tools, tokenizer, generate):
        raise InputError("the chat template does not write the calls of tools")
    return text


def _apply(turns: list[dict[str, Any]], tools: Any, tokenizer: Any, generate: bool) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            turns, tools=tools, tokenize=False, add_generation_prompt=generate
        )
    except (TemplateError, TypeError, ValueError) as error:  # filters and slices raise their own
        raise InputError(f"the chat template refuses the conversation ({error})") from error


def _with_tools(messages: Sequence[Message]) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """(turns as chat templates read them, the functions that may be called).

    Calls stand in the assistant's turn; the results that follow carry their ids in order.
    """
    turns: list[dict[str, Any]] = []
    tools: list[Any] | None = None
    waiting: list[str] = []  # ids of calls whose results are still to come
    called, last = 0, None
    for role, content in messages:
        if role == "tools":
            tools = [*(tools or []), *_parsed(content, "tools")]
        elif role == "tool_calls":
            calls = [_call(x, i) for i, x in enumerate(_parsed(content, "tool calls"), called)]
            called, waiting = called + len(calls), [call["id"] for call in calls]
            if last != "assistant":
                turns.append({"role": "assistant", "content": ""})
            turns[-1] = {**turns[-1], "tool_calls": calls}
        elif role == "tool" and waiting:
            turns.append({"role": role, "content": content, "tool_call_id": waiting.pop(0)})
        else:
            turns.append({"role": role, "content": content})
        last = role
    return turns, tools


def _call(call: Any, number: int) -> dict[str, Any]:
    """A call as chat templates read it; Mistral's take ids of nine letters and digits only."""
    if not (isinstance(call, dict) and isinstance(call.get("name"), str)):
        raise InputError("tool calls that are not objects with a name")
    function = {"name": call["name"], "arguments": call.get("arguments", {})}
    known = call.get("id") or f"call{number:05}"
    return {"type": "function", "id": str(known), "function": function}


def _parsed(content: str, what: str) -> list[Any]:
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, list):
        raise InputError(f"{what} that are not a list in JSON")
    return parsed
