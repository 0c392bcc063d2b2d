"""What rounds leave behind: rounds.json, its figures, the table."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.data.records import Message
from prefopt.durable import write_json
from prefopt.errors import InputError
from prefopt.sampling import Answers

FILE = "rounds.json"
GRAM = 4  # words of a repeated piece of text


class RoundsFile:
    """rounds.json: {"settings": what the rounds were started with, "rounds": a row per round}; the
    row of round 0 is about the model before the first one."""

    def __init__(self, out: Path, settings: dict[str, Any], *, resuming: bool):
        self.path = out / FILE
        self.settings = json.loads(json.dumps(settings, default=str))
        self.rows: list[dict[str, Any]] = []
        if out.exists() and not out.is_dir():
            raise InputError(f"--out {out} is a file; name a folder")
        if not self.path.is_file():
            if any((out / name).exists() for name in ("config.yaml", "model")):
                raise InputError(f"--out {out} holds a run without rounds; name another folder")
            return
        if not resuming:
            raise InputError(
                f"--out {out} already holds rounds; continue them with --resume auto, or name "
                "another folder"
            )
        try:
            known = json.loads(self.path.read_text())
            began, self.rows = known["settings"], list(known["rounds"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path} is damaged ({error!r}); name another folder") from None
        self._check_same(began)

    def _check_same(self, began: Mapping[str, Any]) -> None:
        for key in began.keys() | self.settings.keys():
            old, new = began.get(key), self.settings.get(key)
            if isinstance(old, dict) and isinstance(new, dict):
                different = [k for k in old.keys() | new.keys() if old.get(k) != new.get(k)]
                key, old, new = (
                    (f"{key}.{min(different)}", old.get(min(different)), new.get(min(different)))
                    if different
                    else (key, None, None)
                )
            if old != new:
                raise InputError(
                    f"{self.path} was started with {key} = {old!r} and this call has {new!r}; "
                    "continue with the same settings, or name another folder"
                )

    def add(self, row: dict[str, Any] | None = None) -> None:
        """Write the file anew, with one row more."""
        self.rows += [row] if row else []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"settings": self.settings, "rounds": self.rows})


def described(objective: Any) -> dict[str, Any]:
    """What an objective was made with, as far as JSON can say it."""
    plain = (str, int, float, bool, dict, type(None))
    known = {k: v for k, v in vars(objective).items() if isinstance(v, plain)}
    terms = getattr(getattr(objective, "loss", None), "terms", ())
    return {**known, "loss": [[t.weight, t.name, t.options] for t in terms]}


def digest(prompts: Sequence[list[Message]]) -> str:
    """How many prompts, and a hash of them."""
    hashed = hashlib.sha256()
    for prompt in prompts:
        hashed.update(json.dumps(prompt).encode() + b"\n")
    return f"{len(prompts)} prompts, sha256 {hashed.hexdigest()[:16]}"


def spelled(reward: Any) -> str:
    """What a reward is called in rounds.json: a model's folder, or module:function."""
    own = getattr(reward, "__qualname__", type(reward).__qualname__)
    return getattr(reward, "path", None) or f"{getattr(reward, '__module__', '')}:{own}"


def figures(answers: Sequence[Answers]) -> dict[str, Any]:
    """Of the responses to P prompts: mean and standard error of every reward, and signs of drift.

    Standard errors are over prompts, whose responses are not independent (None for one prompt).
    ``tokens``: mean length. ``ended``: share that ended by itself. ``repeated``: share of word
    4-grams that the same response had before. ``distinct``: share of different texts among the
    responses to a prompt, on average. {} of no responses.
    """
    if not answers:
        return {}
    texts = [text for answer in answers for text in answer.responses]
    return {
        "prompts": len(answers),
        "responses": len(texts),
        "rewards": {name: _mean(answers, name) for name in answers[0].scores},
        "tokens": float(np.mean([n for answer in answers for n in answer.tokens])),
        "ended": float(np.mean([f == "stop" for answer in answers for f in answer.finish])),
        "repeated": float(np.mean([repeated(text) for text in texts])),
        "distinct": float(np.mean([len(set(a.responses)) / len(a.responses) for a in answers])),
    }


def _mean(answers: Sequence[Answers], name: str) -> dict[str, float | None]:
    means = np.array([np.mean(answer.scores[name]) for answer in answers])
    error = means.std(ddof=1) / math.sqrt(len(means)) if len(means) > 1 else None
    return {"mean": float(means.mean()), "standard_error": None if error is None else float(error)}


def repeated(text: str) -> float:
    """Share of the word 4-grams of a text that it had before; 0 for fewer than two of them."""
    words = text.split()
    grams = list(zip(*(words[i:] for i in range(GRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rounds as a table, as wide as it is: a line may go on in the next one."""
    from rich.console import Console
    from rich.measure import Measurement

    console, printed = Console(highlight=False), table(rows)
    unbounded = console.options.update(max_width=10_000)
    console.width = max(console.width, Measurement.get(console, unbounded, printed).maximum)
    console.print(printed)


def table(rows: Sequence[dict[str, Any]]) -> Any:
    """A column per round: each reward on the held-out prompts, and what training did."""
    from rich import box
    from rich.table import Table

    held = [row.get("held_out") or {} for row in rows]
    judged = [row.get("evaluation") or {} for row in rows]
    names = list(next((h["rewards"] for h in held if h), {}))
    out = Table(title="held-out prompts" if names else None, box=box.SIMPLE_HEAD)
    out.add_column("after round", no_wrap=True)
    for row in rows:
        out.add_column(str(row["round"]), justify="right", no_wrap=True)
    out.add_row("pairs", *(f"{row['pairs']:,}" if "pairs" in row else "" for row in rows))
    for name in names:
        out.add_row(name, *(_plus_minus(h["rewards"][name]) if h else "" for h in held))
    out.add_row("accuracy", *(_percent(j.get("accuracy")) for j in judged))
    for name in names if len(names) > 1 else []:
        shares = (j["rewards"][name]["accuracy"] if j else None for j in judged)
        out.add_row(f"  as {name} sees it", *map(_percent, shares))
    out.add_row("margin", *(_number(j.get("margin_mean"), ".3f") for j in judged))
    for key, form in (
        ("tokens", ".1f"),
        ("ended", ".0%"),
        ("repeated", ".0%"),
        ("distinct", ".0%"),
    ):
        out.add_row(key, *(_number(h.get(key), form) for h in held))
    return out


def _plus_minus(value: Mapping[str, float | None]) -> str:
    error = value["standard_error"]
    return f"{value['mean']:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _percent(value: float | None) -> str:
    return _number(value, ".0%")
