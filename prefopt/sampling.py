"""Answers to many prompts, and their scores: on disk chunk by chunk, so that nothing is done twice.

Every chunk has its own seed, which follows from its place, so that a resumed run samples what an
uninterrupted one would have.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from prefopt.data.encode import encode_prompts
from prefopt.data.records import Message
from prefopt.durable import write_bytes
from prefopt.errors import InputError
from prefopt.metrics import Progress
from prefopt.policy import Policy
from prefopt.rewards import Columns, Reward, score
from prefopt.stop import StopSignal

CHUNK = 32  # prompts
BATCH = 32  # answers sampled at a time
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Answers:
    """n sampled responses to prompt number ``prompt``; finish[i] is "length" where the i-th was cut
    at the limit, tokens[i] its length, scores[name][i] what a reward says of it."""

    prompt: int
    responses: list[str]
    finish: list[str]
    tokens: list[int]
    scores: dict[str, list[float]]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How answers are sampled: n to a prompt."""

    n: int
    temperature: float
    max_new_tokens: int
    template: str
    seed: int

    def __post_init__(self) -> None:
        if self.n < 2:
            raise InputError(f"samples is {self.n!r}; a pair needs at least 2 to a prompt")
        if not 0 < self.temperature < float("inf"):
            raise InputError(
                f"temperature is {self.temperature!r}; it must be above 0, or all answers to a "
                "prompt are the same"
            )
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens!r}; it must be at least 1")

    def answer(
        self, policy: Policy, prompts: Sequence[list[Message]], place: Sequence[int]
    ) -> list[dict[str, Any]]:
        """{"responses", "finish", "tokens"} of each prompt; ``place`` makes the seed its own."""
        seed = np.random.SeedSequence((self.seed, *place)).generate_state(1)[0]
        flat = policy.generate(
            [prompt for prompt in prompts for _ in range(self.n)],
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=int(seed),
            batch_size=BATCH,
            template=self.template,
        )
        rows = []
        for start in range(0, len(flat), self.n):
            part = slice(start, start + self.n)
            texts, finish, tokens = zip(*(dataclasses.astuple(a) for a in flat[part]), strict=True)
            rows.append({"responses": [*texts], "finish": [*finish], "tokens": [*tokens]})
        return rows


def answer_all(
    policy: Policy,
    prompts: Mapping[int, list[Message]],
    rewards: Mapping[str, Reward],
    sampler: Sampler,
    path: Path,
    place: Sequence[int],
    progress: Progress,
    stop: StopSignal,
    columns: Callable[[Sequence[int]], Columns] | None = None,
) -> list[Answers]:
    """The answers to numbered prompts, sampled and scored; ``path`` and, beside it, its scores hold
    what is done already. ``place`` tells these samples from others of the same seed; ``columns``
    gives what rewards may ask for beside the prompts of these numbers."""

    def sample(chunk: int, numbers: list[int]) -> list[dict[str, Any]]:
        asked = [prompts[number] for number in numbers]
        rows = sampler.answer(policy, asked, (*place, chunk))
        return [{"prompt": k, **row} for k, row in zip(numbers, rows, strict=True)]

    def judge(_: int, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        numbers = [row["prompt"] for row in rows for _ in row["responses"]]
        asked = [prompts[number] for number in numbers]
        given = [text for row in rows for text in row["responses"]]
        other = columns(numbers) if columns else {}
        scores = {
            name: score(reward, name, asked, given, other) for name, reward in rewards.items()
        }
        at = [slice(i * sampler.n, (i + 1) * sampler.n) for i in range(len(rows))]
        return [
            {"prompt": row["prompt"], "scores": {name: s[part] for name, s in scores.items()}}
            for row, part in zip(rows, at, strict=True)
        ]

    path.parent.mkdir(parents=True, exist_ok=True)
    scores_path = path.with_name(f"{path.stem}_scores.jsonl")
    progress.phase("sample", len(prompts))
    sampled = resumable(path, list(prompts), sample, progress, stop)
    progress.phase("score", len(prompts))
    scored = resumable(scores_path, sampled, judge, progress, stop)
    return [Answers(**row, scores=s["scores"]) for row, s in zip(sampled, scored, strict=True)]


def resumable(
    path: Path,
    items: Sequence[T],
    make: Callable[[int, list[T]], list[dict[str, Any]]],
    progress: Progress,
    stop: StopSignal,
) -> list[dict[str, Any]]:
    """One JSON line per item in ``path``: those of whole chunks that are there stay, the others are
    made by ``make(chunk number, items of the chunk)`` and appended."""
    rows = read_rows(path)
    kept = len(rows) if len(rows) == len(items) else len(rows) // CHUNK * CHUNK
    rows = rows[:kept]
    write_bytes(path, _lines(rows))  # without what a crash may have left behind it
    for start in range(kept, len(items), CHUNK):
        with promptly(stop):
            new = make(start // CHUNK, list(items[start : start + CHUNK]))
        with path.open("ab") as file:
            file.write(_lines(new))
            file.flush()
            os.fsync(file.fileno())
        rows += new
        progress.update(len(rows))
    return rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, up to the first damaged one; [] where there is none."""
    rows: list[dict[str, Any]] = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A file of JSON lines, whole or not at all."""
    write_bytes(path, _lines(rows))


def _lines(rows: Sequence[dict[str, Any]]) -> bytes:
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
    return "".join(f"{line}\n" for line in lines).encode()


@contextlib.contextmanager
def promptly(stop: StopSignal) -> Iterator[None]:
    """Inside, a signal stops at once: for what leaves nothing behind."""
    stop.check()
    stop.at_once = True
    try:
        yield
    finally:
        stop.at_once = False


def prompt_ids(
    prompts: Sequence[list[Message]], tokenizer: Any, template: str
) -> list[np.ndarray | None]:
    """Tokens of each prompt; None of one that the template refuses or makes nothing of."""
    try:
        return [*encode_prompts(prompts, tokenizer, template)]
    except InputError:
        if len(prompts) == 1:
            return [None]
    return [ids for prompt in prompts for ids in prompt_ids([prompt], tokenizer, template)]
