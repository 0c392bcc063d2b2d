"""Message lists, as data sets hold them, to turns: lists of `Message`.

A reader returns turns, or the reason why there are none, as a str.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from prefopt.data.records import ROLES, Message

Turns = list[Message]

SPEAKERS = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("observation", "function", "ipython", "tool_response"), "tool"),
    "function_call": "tool_calls",
}
PLAIN = ROLES - {"tools", "tool_calls"}  # their content is text as it stands
TEXT_PARTS = (None, "text", "input_text", "output_text")
BASIC = frozenset({str, int, float, bool, type(None), list, dict})


# --- values ------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Tuples and arrays as lists, numbers of numpy as Python's; everything else as it is."""
    if type(value) in BASIC:
        return value
    if isinstance(value, tuple):
        return list(value)
    return value.tolist() if type(value).__module__ == "numpy" else value


def as_list(value: Any) -> Any:
    """A list out of a tuple, an array or the JSON text of a list; everything else as it is."""
    value = plain(value)
    if isinstance(value, str) and value[:1] == "[" and isinstance(read := from_json(value), list):
        return read
    return value


def from_json(text: str) -> Any:
    """The value of a JSON text; None where it is none, or is nested too deeply."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def message_json(value: Any) -> Any:
    """The list that a JSON text of messages or of parts of a conversation holds; any other value as
    it is."""
    if not isinstance(value, str) or value[:2] not in ("[{", "[ ", "[\n"):
        return value
    read = from_json(value)
    fits = isinstance(read, list) and read and all(map(_is_message, read))
    return read if fits else value


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and ("role" in value or "from" in value)


def _to_json(value: Any) -> str | None:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        return None


# --- messages ----------------------------------------------------------------------------------


def read_messages(value: Any, role: str) -> Turns | str:
    """Turns of a list of {role, content} or {from, value}, or of a plain string, as `role`."""
    value = plain(value)
    if isinstance(value, str):
        return [Message(role, value)]
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        return f"a conversation is {type(value).__name__}, not a list of messages"
    out: Turns = []
    for message in value:
        if type(message) is dict and len(message) == 2:  # nearly all of them: short, as it is hot
            speaker, content = message.get("role"), message.get("content")
            if type(speaker) is str and type(content) is str and speaker in PLAIN:
                out.append(Message(speaker, content))
                continue
        turns = _read_message(message)
        if isinstance(turns, str):
            return turns
        out += turns
    return out


def _read_message(message: Any) -> Turns | str:
    if not isinstance(message, Mapping):
        return f"a message is {type(message).__name__}, not an object"
    speaker = _first(message, "role", "from")
    content = plain(_first(message, "content", "value"))
    calls = plain(message.get("tool_calls"))
    if calls in (None, [], "") and isinstance(message.get("function_call"), Mapping | str):
        calls = message["function_call"]
    spoken = [] if calls in (None, [], "") else read_calls(calls)
    if isinstance(spoken, str):
        return spoken
    if speaker is None or not (spoken or "content" in message or "value" in message):
        return "a message lacks 'role' or 'content'"
    role = SPEAKERS.get(speaker.strip().lower()) if isinstance(speaker, str) else None
    if role is None:
        shown = repr(speaker[:40]) if isinstance(speaker, str) else type(speaker).__name__
        return f"unknown role {shown}"
    if spoken and content in (None, "", []):
        return spoken
    text = _content(role, content)
    return text if isinstance(text, str) else text + spoken


def _first(message: Mapping[Any, Any], *keys: str) -> Any:
    return next((message[key] for key in keys if message.get(key) is not None), None)


def _content(role: str, content: Any) -> Turns | str:
    if role == "tool_calls":
        return read_calls(content)
    if role == "tools":
        return read_tools(content)
    if isinstance(content, str):
        return [Message(role, content)]
    if isinstance(content, list):
        texts = [part if isinstance(part, str) else _part(part) for part in content]
        if all(text is not None for text in texts):
            return [Message(role, "".join(filter(None, texts)))]
        return "a message has parts that are not text"
    if role == "tool" and isinstance(content, Mapping):
        text = _to_json(content)
        return "a tool's result is no JSON" if text is None else [Message(role, text)]
    return f"a message's content is {type(content).__name__}, not text"


def _part(part: Any) -> str | None:
    """The text of one part of a message; None for an image and the like."""
    if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
        return None
    kind = part.get("type")
    return part["text"] if kind is None or kind in TEXT_PARTS[1:] else None


# --- tools -------------------------------------------------------------------------------------


def read_calls(value: Any) -> Turns | str:
    """One "tool_calls" turn of calls as OpenAI writes them ({"function": {"name", "arguments"}},
    arguments as an object or as JSON text) or of {"name", "arguments"}; one, a list or JSON."""
    value = from_json(value) if isinstance(value, str) else plain(value)
    calls = []
    for call in [value] if isinstance(value, Mapping) else value if isinstance(value, list) else []:
        read = _read_call(call)
        if isinstance(read, str):
            return read
        calls.append(read)
    if not calls:
        return "tool calls that are no list of objects"
    text = _to_json(calls)
    return "tool calls that are no JSON" if text is None else [Message("tool_calls", text)]


def _read_call(call: Any) -> dict[str, Any] | str:
    inner = call.get("function") if isinstance(call, Mapping) else None
    inner = inner if isinstance(inner, Mapping) else call
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        return "a tool call without a name"
    arguments = _first(inner, "arguments", "parameters")
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    elif isinstance(arguments, str):
        arguments = from_json(arguments)
    if not isinstance(arguments, Mapping):
        return "a tool call's arguments are not an object"
    read: dict[str, Any] = {"name": inner["name"], "arguments": dict(arguments)}
    return read | {"id": call["id"]} if isinstance(call.get("id"), str) else read


def read_tools(value: Any) -> Turns | str:
    """A "tools" turn of a list of function schemas, or of JSON text of one; no turn for none."""
    value = plain(value)
    tools = from_json(value) if isinstance(value, str) else value
    if value in (None, "", "null") or tools == []:
        return []
    tools = [tools] if isinstance(tools, Mapping) else tools
    if not isinstance(tools, list):
        return "the tools are no list of functions"
    tools = [from_json(tool) if isinstance(tool, str) else tool for tool in tools]
    text = _to_json(tools) if all(isinstance(tool, Mapping) for tool in tools) else None
    return "the tools are no list of functions" if text is None else [Message("tools", text)]
