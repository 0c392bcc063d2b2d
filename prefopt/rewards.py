"""Rewards: what says how good a response is, and how several of them become one number.

A reward is any callable ``(prompts, responses) -> scores``: n prompts, each a list of Message (a
plain question is one user turn), n response texts, and n numbers, higher for the better ones.
"""

from __future__ import annotations

import inspect
import math
import re
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefopt.data.encode import Group, encode_groups
from prefopt.data.encoded import EncodedSet
from prefopt.data.mixing import check_weights
from prefopt.data.packing import pack
from prefopt.data.recipe import Recipe
from prefopt.data.records import Message
from prefopt.errors import InputError
from prefopt.loading import context_length
from prefopt.nn.heads import ScoreStats
from prefopt.policy import Policy
from prefopt.user_functions import user_function

Reward = Callable[[list[list[Message]], list[str]], Iterable[float]]

SHOWN = 120  # characters of a text in an error
_FUNCTION = re.compile(r"[^\W\d][\w.]*:[^\W\d]\w*")


def load_reward(spec: str | Path, *, device: str = "auto", dtype: str = "auto") -> Reward:
    """A reward by name: ``module:function``, or the folder (or hub id) of a reward model.

    The function is importable from the path or the current directory. The model is one of ours or
    any of AutoModelForSequenceClassification with a single label, full or adapter; text is rendered
    by its own tokenizer. Raises InputError for what cannot be loaded, for a language model, and for
    a function that does not take prompts and responses.
    """
    if isinstance(spec, str) and _FUNCTION.fullmatch(spec) and not Path(spec).exists():
        function = user_function(spec, role="reward")
        check_reward(function, spec)
        return function
    return RewardModel(spec, device=device, dtype=dtype)


def load_rewards(
    rewards: Reward | str | Path | Mapping[str, Reward | str],
    weights: Mapping[str, float] | None = None,
    **where: Any,
) -> dict[str, Reward]:
    """One reward (called "reward") or several by name, each a callable or a name for load_reward;
    ``where``: device and dtype. InputError also for weights that are not those of the rewards."""
    several = rewards if isinstance(rewards, Mapping) else {"reward": rewards}
    if not several:
        raise InputError("there is no reward; give one at least")
    if weights is not None:
        check_weights(weights, list(several), "reward")
    known: dict[str, Reward] = {}
    for name, reward in several.items():
        loaded: Any = load_reward(reward, **where) if isinstance(reward, str | Path) else reward
        check_reward(loaded, name)
        known[name] = loaded
    return known


def check_reward(function: Any, name: str) -> None:
    """InputError unless it can be called with prompts and responses."""
    if not callable(function):
        raise InputError(f"reward {name!r} is a {type(function).__name__}; give a function")
    try:
        inspect.signature(function).bind([], [])
    except TypeError as error:
        takes = inspect.signature(function)
        raise InputError(
            f"reward {name!r} takes {takes}, and it is called with (prompts, responses): {error}"
        ) from None
    except ValueError:  # built-in functions need not have a signature
        return


class RewardModel:
    """A reward model as a reward; ``score_stats`` is the scale of its scores, where it is known."""

    def __init__(
        self,
        path: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        max_length: int | None = None,
        micro_tokens: int = 4096,
    ):
        self.policy = Policy.from_pretrained(path, device=device, dtype=dtype)
        if not self.policy.is_reward_model:
            raise InputError(
                f"{path} is a language model, which has no score; a reward is a reward model's "
                "folder (prefopt reward makes one) or module:function"
            )
        self.policy.eval()
        self.path, self.score_stats = str(path), self.policy.score_stats
        context = context_length(self.policy.model)
        self.max_length = min(max_length or context, context)
        self.micro_tokens = micro_tokens

    @torch.no_grad()
    def __call__(self, prompts: list[list[Message]], responses: list[str]) -> list[float]:
        """The score of each response [R], read at its end; InputError for too long a prompt."""
        items = encode_responses(
            prompts, responses, self.policy.tokenizer, max_length=self.max_length
        )
        batches = pack(items, max_tokens=self.micro_tokens, layout=self.policy.layout, ends=True)
        scores = [self.policy.scores(batch.to(self.policy.device)).cpu() for batch in batches]
        return torch.cat(scores).tolist()


def encode_responses(
    prompts: Sequence[list[Message]], responses: Sequence[str], tokenizer: Any, *, max_length: int
) -> EncodedSet:
    """Every response behind its prompt, by the rules of data.encode, in order and none left out.

    Neighbours with the same prompt share it. A response is cut to fit ``max_length``; a prompt that
    leaves no room for one, or that the template refuses, is an InputError.
    """
    groups = [
        Group(prompt, [[Message("assistant", text)] for _, text in part], {})
        for prompt, part in groupby(zip(prompts, responses, strict=True), key=itemgetter(0))
    ]
    encoded = encode_groups(groups, tokenizer, Recipe("prompt", "auto", max_length))
    missing = set(range(len(groups))) - set(encoded.indices.tolist())
    if missing:
        why = next(key for key in encoded.counts if key.startswith("dropped: "))
        raise InputError(
            f"the prompt {_short(groups[min(missing)].prompt[-1].content)} cannot be scored by a "
            f"model that reads {max_length:,} tokens: {why.removeprefix('dropped: ')}"
        )
    return encoded


def score(
    reward: Reward, name: str, prompts: list[list[Message]], responses: list[str]
) -> list[float]:
    """The reward's scores [R] of R samples, checked: as many as samples, every one a finite number.

    Raises InputError that names the reward, the sample and the cause; of an exception too, whose
    sample is found by asking for one sample at a time.
    """
    try:
        given = reward(prompts, responses)
        values = _listed(given)
    except Exception as error:
        at = _culprit(reward, prompts, responses)
        raise InputError(f"reward {name!r} failed{at}: {_cause(error)}") from error
    if values is None:
        raise InputError(
            f"reward {name!r} returned a {type(given).__name__}; it must return a list with one "
            "number per response"
        )
    if len(values) != len(responses):
        raise InputError(
            f"reward {name!r} returned {len(values)} scores for {len(responses)} responses, the "
            f"first of them{_sample(prompts[0], responses[0])}"
        )
    return [
        _number(value, name, prompt, response)
        for value, prompt, response in zip(values, prompts, responses, strict=True)
    ]


def combine(
    scores: Mapping[str, Sequence[float]],
    weights: Mapping[str, float] | None = None,
    *,
    scales: Mapping[str, ScoreStats | None] | None = None,
) -> list[float]:
    """One number per sample: sum_k w_k (s_k - mean_k) / std_k, or s itself of a single reward.

    Without ``weights`` all are 1. Mean and standard deviation (of the population) are those in
    ``scales`` where it has them, else those of these samples, so that no reward dominates by its
    scale; a reward that is the same for every sample adds 0. Raises InputError as check_weights.
    """
    if weights is not None:
        check_weights(weights, list(scores), "reward")
    if len(scores) == 1:
        return [float(value) for values in scores.values() for value in values]
    total = np.zeros(len(next(iter(scores.values()))))
    for name, given in scores.items():
        values, known = np.asarray(given, dtype=np.float64), (scales or {}).get(name)
        mean, std = (
            (known.mean, known.std) if known and known.std else (values.mean(), values.std())
        )
        if std > 0:
            total += (1.0 if weights is None else weights[name]) * (values - mean) / std
    return total.tolist()


# --- what an error says --------------------------------------------------------------------------


def _number(value: Any, name: str, prompt: list[Message], response: str) -> float:
    try:
        number = float("nan") if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several numbers
        number = math.nan
    if not math.isfinite(number):
        shown = _short(repr(value)) if isinstance(value, str) else f"{value}"[:SHOWN]
        raise InputError(
            f"reward {name!r} gave {shown} ({type(value).__name__}), no finite number,"
            f"{_sample(prompt, response)}"
        )
    return number


def _listed(given: Any) -> list[Any] | None:
    """What a reward returned as a list; None for what is none."""
    if isinstance(given, str | bytes | Mapping):
        return None
    try:
        values = iter(given)
    except TypeError:
        return None
    return list(values)


def _culprit(reward: Reward, prompts: list[list[Message]], responses: list[str]) -> str:
    """Which sample a reward fails on."""
    for prompt, response in zip(prompts, responses, strict=True):
        try:
            _listed(reward([prompt], [response]))
        except Exception:
            return _sample(prompt, response)
    return f" on {len(responses)} samples together, but on none of them alone"


def _sample(prompt: list[Message], response: str) -> str:
    return f" for the response {_short(response)} to the prompt {_short(prompt[-1].content)}"


def _cause(error: Exception) -> str:
    if isinstance(error, InputError):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({last.filename}, line {last.lineno})"


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return repr(flat if len(flat) <= SHOWN else f"{flat[: SHOWN - 3]}...")
