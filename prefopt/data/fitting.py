"""Which responses of a group stay, and how much of each, in the room that the prompt leaves."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Response(NamedTuple):
    """Tokens [n] int32 and which of them are scored, [n] bool or None for all."""

    tokens: np.ndarray
    scored: np.ndarray | None

    @property
    def spoken(self) -> bytes:
        """What the model has to write."""
        return (self.tokens if self.scored is None else self.tokens[self.scored]).tobytes()


def trimmed(tokens: np.ndarray, scored: np.ndarray) -> Response:
    """Up to the last token that is scored, if any is."""
    at = np.flatnonzero(scored)
    end = int(at[-1]) + 1 if len(at) else len(tokens)
    return Response(tokens[:end], None if len(at) == end else scored[:end])


def cut(responses: list[Response], room: int) -> list[Response] | str:
    """The responses cut to `room` tokens, or why there are none."""
    if room <= 0:
        return "prompt fills max_length"
    kept = []
    for tokens, scored in responses:
        if scored is None:
            kept.append(Response(tokens[:room], None))
        elif scored[:room].any():
            kept.append(trimmed(tokens[:room], scored[:room]))
        else:
            return "truncation leaves a response without a token to score"
    return kept


def _differing(responses: list[Response], room: int) -> list[Response] | str:
    """A pair whose scored tokens differ still."""
    if responses[0].spoken == responses[1].spoken:
        return "identical in tokens"
    kept = cut(responses, room)
    if not isinstance(kept, str) and kept[0].spoken == kept[1].spoken:
        return "identical after truncation"
    return kept


def _distinct(responses: list[Response], room: int) -> list[Response] | str:
    """Of responses with the same scored tokens, after truncation, the first."""
    kept = cut(responses, room)
    if isinstance(kept, str):
        return kept
    unique: dict[bytes, Response] = {}
    for response in kept:
        unique.setdefault(response.spoken, response)
    return list(unique.values())


# unit -> (responses, room for each) -> those that stay, cut, or why the group is dropped
FITS = {"pair": _differing, "response": cut, "prompt": cut, "ranking": _distinct}
