"""A server as a reward.

    POST URL                 {"prompts": [[{"role": "user", "content": ...}, ...], ...],
                              "responses": ["...", ...],
                              "<column>": [...], ...}
    200                      {"scores": [0.3, ...]}

Every list has one entry per response; the columns are those of the data beside the prompt.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any

from prefopt.data.records import Message
from prefopt.errors import InputError

ABOUT_A_SAMPLE = (400, 413, 422, 500)  # what a server may say of one text, and not of another
PASSING = (429, 500, 502, 503, 504)  # what may be gone at the next try


class Unavailable(InputError):
    """The server did not answer, or refuses all requests alike: no single sample is the cause."""


class HttpReward:
    """Scores from ``url``, ``batch_size`` responses a request.

    A request that cannot be delivered, takes longer than ``timeout`` seconds to answer, or meets an
    error that may pass is repeated after 0.5, 1, 2, ... seconds, ``tries`` times in all. Then, and
    at once for any other error and for an answer that is not as above, an InputError says what the
    server did.
    """

    def __init__(
        self, url: str, *, timeout: float = 60.0, tries: int = 4, batch_size: int = 64
    ) -> None:
        self.path, self.score_stats = url, None
        self.timeout, self.tries, self.batch_size = timeout, tries, batch_size
        self.wait = 0.5  # seconds before the second try

    def __call__(
        self, prompts: list[list[Message]], responses: list[str], **columns: Any
    ) -> list[Any]:
        """The score of each response; that they are numbers is for the caller to check."""
        scores: list[Any] = []
        for start in range(0, len(responses), self.batch_size):
            part = slice(start, start + self.batch_size)
            turns = [[message._asdict() for message in prompt] for prompt in prompts[part]]
            asked = {name: values[part] for name, values in columns.items()}
            asked |= {"prompts": turns, "responses": responses[part]}
            scores += self._scores(self._post(asked), len(turns))
        return scores

    def _scores(self, body: bytes, n: int) -> list[Any]:
        try:
            scores = json.loads(body)["scores"]
        except (ValueError, KeyError, TypeError, RecursionError):
            scores = None
        if not isinstance(scores, list):
            raise InputError(
                f'{self.path} answered {_first_line(body)} where {{"scores": [...]}} was expected'
            )
        if len(scores) != n:
            raise InputError(f"{self.path} answered {len(scores)} scores for {n} responses")
        return scores

    def _post(self, asked: dict[str, Any]) -> bytes:
        data = json.dumps(asked).encode()
        kind = {"Content-Type": "application/json", "Accept": "application/json"}
        for left in reversed(range(self.tries)):
            request = urllib.request.Request(self.path, data, kind, method="POST")
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return answer.read()
            except urllib.error.HTTPError as error:
                with error:
                    status, said = error.code, _first_line(_rest(error))
                if not left or status not in PASSING:
                    known = InputError if status in ABOUT_A_SAMPLE else Unavailable
                    raise known(f"{self.path} answered with status {status}: {said}") from error
            except (OSError, http.client.HTTPException) as error:
                if not left:
                    reason = getattr(error, "reason", None) or str(error) or type(error).__name__
                    raise Unavailable(
                        f"{self.path} did not answer in {self.tries} tries: {reason}; "
                        "check the URL and the server"
                    ) from error
            time.sleep(self.wait * 2 ** (self.tries - 1 - left))
        raise AssertionError("the last try returns or raises")


def _rest(error: urllib.error.HTTPError) -> bytes:
    try:
        return error.read()
    except (OSError, http.client.HTTPException):
        return b""


def _first_line(body: bytes, most: int = 200) -> str:
    lines = body.decode("utf-8", "replace").strip().splitlines()
    line = lines[0] if lines else ""
    return repr(line if len(line) <= most else f"{line[: most - 3]}...")
