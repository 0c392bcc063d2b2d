"""Turns, pairs and rows to write by hand, for the tests of what data sets mean."""

from prefopt.data.records import Message, Pair


def U(text):
    return Message("user", text)


def A(text):
    return Message("assistant", text)


def S(text):
    return Message("system", text)


def said(*turns):
    """Messages as data sets hold them; the order of their keys is not the same everywhere."""
    roles = {"U": "user", "A": "assistant", "S": "system"}
    return [{"content": text, "role": roles[who]} for who, text in (t.split(":", 1) for t in turns)]


def pair(prompt, good, bad, margin=None, preference=1.0, source=None):
    prompt = [U(prompt)] if isinstance(prompt, str) else prompt
    sides = [[A(side)] if isinstance(side, str) else side for side in (good, bad)]
    return Pair(prompt, *sides, margin, source, preference=preference)
