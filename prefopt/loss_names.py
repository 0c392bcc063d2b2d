"""Losses by name: ``dpo``, ``0.8*dpo + 0.2*bco_pair + sft``, ``my_module:my_loss``."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefopt.errors import InputError
from prefopt.losses import LOSSES, REFERENCE_FREE, WHOLE_BATCH, PairLogps
from prefopt.user_functions import nearest, user_function

_TERM = re.compile(
    r"\s*(?:(?P<weight>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*\*)?"
    r"\s*(?P<name>[^\W\d][\w.]*(?::[^\W\d]\w*)?)\s*(?P<end>\+|$)"
)


class Term(NamedTuple):
    weight: float
    name: str
    loss: Callable[..., Tensor]
    options: dict[str, Any]


@dataclass(frozen=True)
class Loss:
    """A weighted sum of losses with their options bound: PairLogps -> [B]."""

    name: str
    terms: tuple[Term, ...]

    def __call__(self, p: PairLogps) -> Tensor:
        total = torch.zeros_like(p.chosen)
        for weight, name, loss, options in self.terms:
            value = loss(p, **options)
            if not isinstance(value, Tensor) or value.shape != p.chosen.shape:
                what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise InputError(
                    f"loss {name!r} returned {what} for {len(p.chosen)} pairs; it must return one "
                    "number per pair"
                )
            total = total + weight * value
        return total

    @property
    def reference_free(self) -> bool:
        """No term reads ref_chosen or ref_rejected."""
        return all(t.name in REFERENCE_FREE or _says(t, "reference_free") for t in self.terms)

    @property
    def whole_batch(self) -> bool:
        """A pair's loss depends on the other pairs of its batch."""
        return any(t.name in WHOLE_BATCH or _says(t, "whole_batch") for t in self.terms)

    @property
    def beta(self) -> float:
        """beta of the first term that has one, else 0.1."""
        betas = [t.options.get("beta") for t in self.terms]
        return next((x for x in betas if isinstance(x, int | float)), 0.1)


def loss_from(name: str, **options: Any) -> Loss:
    """The loss called ``name`` with its options bound; options that are None keep their default.

    ``name`` is one of LOSSES, or ``module:function`` for your own (which may have the attributes
    ``reference_free`` and ``whole_batch``), or a weighted sum of such: ``0.8*dpo + 0.2*bco_pair +
    sft``. Each option goes to all terms that take it. Raises InputError for an unknown name or
    option, listing the valid ones, and for values out of range.
    """
    options = {k: v for k, v in options.items() if v is not None}
    weighted = [(weight, term, _function(term)) for weight, term in weighted_names(name)]
    takes = dict.fromkeys(k for *_, loss in weighted for k in _defaults(loss))
    for key in options:
        if key not in takes:
            raise InputError(
                f"loss {name!r} takes no {key!r}{nearest(key, takes)}; it takes: "
                f"{', '.join(takes) or 'no options'}"
            )
    return Loss(name, tuple(_bound(*term, options) for term in weighted))


def _bound(weight: float, name: str, loss: Callable[..., Tensor], options: dict[str, Any]) -> Term:
    defaults = _defaults(loss)
    taken = {k: v for k, v in options.items() if k in defaults}
    for key, value in taken.items():
        _check_range(name, key, value)
    try:
        inspect.signature(loss).bind(None, **taken)
    except TypeError as error:
        raise InputError(f"loss {name!r} cannot be called on pairs: {error}") from error
    return Term(weight, name, loss, defaults | taken)


def _says(term: Term, attribute: str) -> bool:
    return bool(getattr(term.loss, attribute, False))


def weighted_names(text: str) -> list[tuple[float, str]]:
    """``0.8*dpo + sft`` -> [(0.8, "dpo"), (1.0, "sft")]. Raises InputError for anything else."""
    terms, at, end = [], 0, "+"
    while end == "+":
        found = _TERM.match(text, at)
        if found is None:
            raise InputError(
                f"loss {text!r} cannot be read from {text[at:]!r} on; write a name, or a sum such "
                "as '0.8*dpo + 0.2*bco_pair + sft'"
            )
        weight, name, end = float(found["weight"] or 1), found["name"], found["end"]
        if not 0 < weight < math.inf:
            raise InputError(f"loss {text!r} gives {name!r} the weight {weight}; write one above 0")
        terms.append((weight, name))
        at = found.end()
    return terms


def _function(name: str) -> Callable[..., Tensor]:
    if ":" in name:
        return user_function(name, role="loss")
    if name not in LOSSES:
        raise InputError(
            f"unknown loss {name!r}{nearest(name, LOSSES)}; there are: {', '.join(LOSSES)}"
        )
    return LOSSES[name]


def _defaults(loss: Callable[..., Tensor]) -> dict[str, Any]:
    """Options of a loss and their defaults: its parameters after the first."""
    rest = list(inspect.signature(loss).parameters.values())[1:]
    return {k.name: k.default for k in rest if k.kind in (k.KEYWORD_ONLY, k.POSITIONAL_OR_KEYWORD)}


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "beta": (lambda x: 0 < x < math.inf, "above 0 and finite"),
    "label_smoothing": (lambda x: 0 <= x < 0.5, "in [0, 0.5)"),
    "exo_pair.label_smoothing": (lambda x: 0 < x < 0.5, "in (0, 0.5)"),
    "alpha": (lambda x: 0 <= x < math.inf, "0 or more and finite"),
    "gamma": (math.isfinite, "finite"),
    "tau": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "average": (lambda x: isinstance(x, bool), "true or false"),
}


def _check_range(name: str, key: str, value: Any) -> None:
    if name not in LOSSES and key != "beta":
        return  # what a user's option means is the user's to say
    valid, words = _RANGES.get(f"{name}.{key}", _RANGES[key])
    number = isinstance(value, int | float) and (key == "average" or not isinstance(value, bool))
    if not (number and valid(value)):
        raise InputError(f"{key} is {value!r}; it must be {words} for loss {name!r}")
