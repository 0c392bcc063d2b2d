"""Rewards: what says how good a response is, and how several of them become one number.

A reward is any callable ``(prompts, responses) -> scores``: n prompts, each a list of Message (a
plain question is one user turn), n response texts, and n numbers, higher for the better ones. What
it names besides is given to it as keywords, lists of n: the columns of the rows that the prompts
came from (``answer``, say; ``**columns`` takes all), and ``tokens``, the texts of each response's
tokens. With ``tokens`` it may return, in the place of a response's number, a list with a number for
each of its tokens.
"""

from __future__ import annotations

import inspect
import math
import re
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefopt.data.mixing import check_weights
from prefopt.data.records import Message
from prefopt.errors import InputError
from prefopt.http_reward import HttpReward, Unavailable
from prefopt.nn.heads import ScoreStats
from prefopt.policy import Policy
from prefopt.reward_model import SHOWN, RewardModel, shortened
from prefopt.user_functions import nearest, user_function

Reward = Callable[..., Iterable[Any]]
Columns = Mapping[str, Sequence[Any]]  # a value per response under each name

TOKENS = "tokens"
_FUNCTION = re.compile(r"[^\W\d][\w.]*:[^\W\d]\w*")


@dataclass(frozen=True)
class Scored:
    """What a reward says of R responses. ``ends`` [R]: of each as a whole, 0 where it speaks of the
    tokens instead; ``tokens`` [R]: a number per token, or None."""

    ends: list[float]
    tokens: list[list[float] | None]

    @property
    def totals(self) -> list[float]:
        """One number per response: that of the whole and those of the tokens together."""
        both = zip(self.ends, self.tokens, strict=True)
        return [math.fsum([end, *(some or ())]) for end, some in both]

    def rows(self, width: int) -> torch.Tensor:
        """What is said of the tokens as rows [R, width] float32, 0 where nothing is."""
        out = torch.zeros(len(self.ends), width)
        for row, some in zip(out, self.tokens, strict=True):
            row[: len(some or ())] = torch.tensor(some or ())
        return out


def load_reward(
    spec: str | Path, *, device: str = "auto", dtype: str = "auto", share: Policy | None = None
) -> Reward:
    """A reward by name: ``module:function``, the URL of a server (see http_reward), or the folder
    (or hub id) of a reward model.

    The function is importable from the path or the current directory. The model is one of ours or
    any of AutoModelForSequenceClassification with a single label, full or adapter; text is rendered
    by its own tokenizer. Where it is an adapter on the base of the policy ``share``, both use that
    one. Raises InputError for what cannot be loaded, for a language model, and for a function that
    does not take prompts and responses.
    """
    if isinstance(spec, str) and spec.startswith(("http://", "https://")):
        return HttpReward(spec)
    if isinstance(spec, str) and _FUNCTION.fullmatch(spec) and not Path(spec).exists():
        function = user_function(spec, role="reward")
        check_reward(function, spec)
        return function
    return RewardModel(spec, device=device, dtype=dtype, share=share)


def load_rewards(
    rewards: Reward | str | Path | Mapping[str, Reward | str],
    weights: Mapping[str, float] | None = None,
    **where: Any,
) -> dict[str, Reward]:
    """One reward (called "reward") or several by name, each a callable or a name for load_reward;
    ``where``: device, dtype and share. InputError also for weights that are not the rewards'."""
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
    """InputError unless it can be called with prompts, responses and what else it names."""
    if not callable(function):
        raise InputError(f"reward {name!r} is a {type(function).__name__}; give a function")
    named, _ = _named(function)
    try:
        inspect.signature(function).bind([], [], **{key: [] for key, must in named.items() if must})
    except TypeError as error:
        takes = inspect.signature(function)
        raise InputError(
            f"reward {name!r} takes {takes}, and it is called with (prompts, responses): {error}"
        ) from None
    except ValueError:  # built-in functions need not have a signature
        return


def check_columns(
    rewards: Mapping[str, Reward], known: Collection[str], *, tokens: bool = False
) -> None:
    """InputError for a reward that names a column which is not ``known``; ``tokens`` says whether
    it will be given tokens."""
    for name, reward in rewards.items():
        _keywords(reward, name, dict.fromkeys(known, ()), () if tokens else None)


def takes_tokens(reward: Reward) -> bool:
    """Whether a reward looks at the tokens of a response."""
    return TOKENS in _named(reward)[0]


def _named(reward: Callable[..., Any]) -> tuple[dict[str, bool], bool]:
    """({keyword besides prompts and responses: whether it must be given}, whether it takes any)."""
    try:
        parameters = [*inspect.signature(reward).parameters.values()]
    except ValueError:
        return {}, False
    placed = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    first = [p.name for p in parameters if p.kind in placed][:2]
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {
        p.name: p.default is p.empty
        for p in parameters
        if p.kind in by_name and p.name not in first
    }
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _keywords(reward: Reward, name: str, columns: Columns, tokens: Any) -> dict[str, Any]:
    """What a reward is called with besides prompts and responses."""
    named, any_other = _named(reward)
    have = dict(columns) | ({} if tokens is None else {TOKENS: tokens})
    for key, must in named.items():
        if must and key not in have and key == TOKENS:
            raise InputError(
                f"reward {name!r} asks for the tokens of responses, which are known while training "
                "on samples alone (prefopt ppo)"
            )
        if must and key not in have:
            known = ", ".join(columns) or "none"
            raise InputError(
                f"reward {name!r} asks for the column {key!r}, which the rows of the prompts do "
                f"not have{nearest(key, columns)}; their other columns: {known}"
            )
    given = {key: have[key] for key in named if key in have}
    return {**columns, **given} if any_other else given


def score(
    reward: Reward,
    name: str,
    prompts: list[list[Message]],
    responses: list[str],
    columns: Columns | None = None,
) -> list[float]:
    """The reward's scores [R] of R samples, checked: as many as samples, every one a finite number.

    ``columns``: a value per sample under each name. Raises InputError that names the reward, the
    sample and the cause; of an exception too, whose sample is found by asking for one sample at a
    time.
    """
    return score_tokens(reward, name, prompts, responses, columns).ends


def score_tokens(
    reward: Reward,
    name: str,
    prompts: list[list[Message]],
    responses: list[str],
    columns: Columns | None = None,
    tokens: Sequence[Sequence[str]] | None = None,
) -> Scored:
    """As ``score``, of a reward that may look at ``tokens``, the texts of each response's tokens,
    and then say a number for each of them; InputError where these are not as many."""
    keywords = _keywords(reward, name, columns or {}, tokens)
    try:
        given = reward(prompts, responses, **keywords)
        values = _listed(given)
    except Unavailable as error:
        raise InputError(f"reward {name!r} failed: {error}") from error
    except Exception as error:
        at = _culprit(reward, prompts, responses, keywords)
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
    ends, each = [], []
    for i, (value, prompt, response) in enumerate(zip(values, prompts, responses, strict=True)):
        own = _listed(value) if TOKENS in keywords else None
        if own is None:
            ends.append(_number(value, name, prompt, response))
        elif len(own) != len(keywords[TOKENS][i]):
            raise InputError(
                f"reward {name!r} returned {len(own)} numbers for {len(keywords[TOKENS][i])} "
                f"tokens{_sample(prompt, response)}"
            )
        else:
            ends.append(0.0)
            own = [_number(number, name, prompt, response) for number in own]
        each.append(own)
    return Scored(ends, each)


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
        shown = shortened(repr(value)) if isinstance(value, str) else f"{value}"[:SHOWN]
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


def _culprit(
    reward: Reward, prompts: list[list[Message]], responses: list[str], keywords: dict[str, Any]
) -> str:
    """Which sample a reward fails on."""
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        try:
            _listed(reward([prompt], [response], **{k: [v[i]] for k, v in keywords.items()}))
        except Exception:
            return _sample(prompt, response)
    return f" on {len(responses)} samples together, but on none of them alone"


def _sample(prompt: list[Message], response: str) -> str:
    return f" for the response {shortened(response)} to the prompt {shortened(prompt[-1].content)}"


def _cause(error: Exception) -> str:
    if isinstance(error, InputError):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({last.filename}, line {last.lineno})"
