"""Conversations to text: the tokenizer's own chat template, a plain transcript, or bare text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from prefopt.data.records import Message
from prefopt.errors import InputError

TEMPLATES = ("auto", "chat", "transcript", "plain")
SPEAKERS = {"user": "Human", "assistant": "Assistant"}


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
    refuses the conversation.
    """
    return (
        render_prompt(prompt, tokenizer, template),
        render_conversation(prompt, response, tokenizer, template),
    )


def render_prompt(prompt: Sequence[Message], tokenizer: Any, template: str) -> str:
    """The prompt with whatever opens an assistant turn."""
    if template == "chat":
        return _chat(prompt, tokenizer, generate=True)
    if template == "plain":
        return "".join(message.content for message in prompt)
    return _transcript(prompt) + "\n\nAssistant:"


def render_conversation(
    prompt: Sequence[Message], response: Sequence[Message], tokenizer: Any, template: str
) -> str:
    """Prompt and response as one text."""
    whole = [*prompt, *response]
    if template == "chat":
        return _chat(whole, tokenizer, generate=False)
    if template == "plain":
        return "".join(message.content for message in whole)
    return _transcript(whole)


def _transcript(messages: Sequence[Message]) -> str:
    """Turns as paragraphs with their speaker, as in HH-RLHF; a system turn has no speaker."""
    parts = []
    for i, (role, content) in enumerate(messages):
        gap = "\n\n" if i or role in SPEAKERS else ""
        if role in ("system", "developer"):
            parts.append(gap + content)
        else:
            parts.append(f"{gap}{SPEAKERS.get(role, role.capitalize())}: {content}")
    return "".join(parts)


def _chat(messages: Sequence[Message], tokenizer: Any, generate: bool) -> str:
    from jinja2 import TemplateError

    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate)
    except TemplateError as error:
        raise InputError(f"the chat template refuses the conversation ({error})") from error
