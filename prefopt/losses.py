"""Preference losses: pure functions from the summed log-probs of pairs to one loss per pair.

Anything ``PairLogps -> [B]`` is a loss; the keyword arguments of a loss are its configuration.
Shapes: B pairs.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from prefopt.errors import InputError


class PairLogps(NamedTuple):
    """Summed log-probs of B pairs under the policy and the reference, and response lengths, [B]."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_len: Tensor
    rejected_len: Tensor

    @property
    def margin(self) -> Tensor:
        """m = (log pi(y_w) - log ref(y_w)) - (log pi(y_l) - log ref(y_l)), [B], in nats."""
        return (self.chosen - self.ref_chosen) - (self.rejected - self.ref_rejected)


def dpo(p: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m), with m the margin, [B].

    e > 0 is the conservative form for labels that are wrong with probability e. Rafailov et al.
    2023 (arXiv 2305.18290, eq. 7) and its appendix note on label noise by Mitchell.
    """
    _check(p)
    x = beta * p.margin
    return -(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)


LOSSES: dict[str, Callable[..., Tensor]] = {"dpo": dpo}


def loss_from(name: str, **kwargs: float) -> Callable[[PairLogps], Tensor]:
    """The loss called ``name`` with its keyword arguments bound.

    Raises InputError for an unknown name or keyword, listing the valid ones.
    """
    if name not in LOSSES:
        raise InputError(
            f"unknown loss {name!r}{_nearest(name, LOSSES)}; there are: {', '.join(LOSSES)}"
        )
    loss = LOSSES[name]
    takes = [k for k, v in inspect.signature(loss).parameters.items() if v.kind is v.KEYWORD_ONLY]
    for key in kwargs:
        if key not in takes:
            raise InputError(
                f"loss {name!r} takes no {key!r}{_nearest(key, takes)}; it takes: "
                f"{', '.join(takes)}"
            )
    return functools.partial(loss, **kwargs)


def _nearest(name: str, known) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _check(p: PairLogps) -> None:
    shape = p.chosen.shape
    assert len(shape) == 1 and all(x.shape == shape for x in p), [tuple(x.shape) for x in p]
