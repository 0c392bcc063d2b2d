"""Confidence intervals and the summary of a preference evaluation. numpy only.

Shapes: n pairs, C clusters (prompts), R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from prefopt.data.encode import Encoded

QUANTILES = (0.05, 0.25, 0.75, 0.95)
_CELLS = 1 << 22  # of a resampling matrix held at a time


def bootstrap_ci(
    values: np.ndarray,
    clusters: np.ndarray | None = None,
    *,
    statistic: Literal["mean", "median"] = "mean",
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean or median of `values` [n].

    With `clusters` [n] (one label a row: the prompt) whole clusters are drawn with replacement,
    because answers to one prompt are not independent (Efron and Tibshirani, An Introduction to the
    Bootstrap, 1993, chapters 8 and 13). The same numbers give the same interval, whatever their
    order or the names of the clusters. One cluster says nothing about spread: (nan, nan).
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"values must be finite and of shape [n >= 1], got {values.shape}")
    if statistic not in ("mean", "median"):
        raise ValueError(f"statistic must be 'mean' or 'median', not {statistic!r}")
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError("confidence lies between 0 and 1 and resamples is at least 1")
    member, sums, sizes = _clustered(values, clusters)
    if len(sums) < 2:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    drawn = []
    width = len(sums) if statistic == "mean" else len(values)
    for rows in _blocks(resamples, max(1, _CELLS // width)):
        picks = rng.integers(0, len(sums), (rows, len(sums)))
        if statistic == "mean":
            drawn.append(sums[picks].sum(1) / sizes[picks].sum(1))
        else:
            drawn.append(_medians(values, member, picks))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(drawn), [tail, 1 - tail])
    return float(low), float(high)


def _clustered(
    values: np.ndarray, clusters: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(cluster of each row [n], sum per cluster [C], rows per cluster [C]), in canonical order:
    clusters sorted by sum and size, so that neither row order nor cluster names matter."""
    if clusters is None:
        member = np.arange(len(values))
    else:
        clusters = np.asarray(clusters)
        if clusters.shape != values.shape:
            raise ValueError(f"clusters {clusters.shape} must be one label a value {values.shape}")
        member = np.unique(clusters, return_inverse=True)[1].reshape(-1)
    by_value = np.argsort(values, kind="stable")  # a sum must not depend on the order of rows
    sums = np.bincount(member[by_value], weights=values[by_value])
    sizes = np.bincount(member)
    order = np.lexsort((sizes, sums))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank[member], sums[order], sizes[order]


def _blocks(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


def _medians(values: np.ndarray, member: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """Median of each resample [R]; picks [R, C] are cluster numbers. A row counts as often as its
    cluster was drawn, so the middle is read off cumulated counts instead of copied rows."""
    count = np.stack([np.bincount(row, minlength=picks.shape[1]) for row in picks])
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(count[:, member[order]], axis=1)  # [R, n]
    total = reached[:, -1:]
    lower = values[order][(reached > (total - 1) // 2).argmax(1)]
    upper = values[order][(reached > total // 2).argmax(1)]
    return (lower + upper) / 2


def preference_summary(
    margins: np.ndarray,
    lengths_chosen: np.ndarray,
    lengths_rejected: np.ndarray,
    clusters: np.ndarray,
) -> dict[str, Any]:
    """How well margins [n] tell chosen from rejected. Plain numbers, ready for JSON.

    A pair counts as right only if its margin is strictly above zero; a tie is not half right. A
    policy that is its own reference therefore scores 0 with `ties == n`, and is seen as such.
    Lengths [n] are in tokens; `clusters` [n] are prompt labels. `*_low` and `*_high` are 95 %
    bootstrap intervals over prompts, None when there is a single prompt; accuracy among pairs whose
    chosen answer is the longer (shorter) one shows a model that only counts words, None where there
    are no such pairs.
    """
    margins = np.asarray(margins, dtype=np.float64)
    longer = np.asarray(lengths_chosen) - np.asarray(lengths_rejected)
    if not margins.size or not np.isfinite(margins).all() or longer.shape != margins.shape:
        bad = int((~np.isfinite(margins)).sum())
        raise ValueError(
            f"an evaluation needs at least one pair, finite margins and one length each: got "
            f"{margins.shape} margins ({bad} not finite) and {longer.shape} lengths"
        )
    right = (margins > 0).astype(np.float64)
    accuracy_ci, margin_ci = (bootstrap_ci(x, clusters) for x in (right, margins))
    several = np.isfinite(accuracy_ci[0])

    def among(mask: np.ndarray) -> float | None:
        return float(right[mask].mean()) if mask.any() else None

    return {
        "n": len(margins),
        "prompts": len(np.unique(np.asarray(clusters))),
        "accuracy": float(right.mean()),
        "accuracy_low": accuracy_ci[0] if several else None,
        "accuracy_high": accuracy_ci[1] if several else None,
        "ties": int((margins == 0).sum()),
        "margin_mean": float(margins.mean()),
        "margin_low": margin_ci[0] if several else None,
        "margin_high": margin_ci[1] if several else None,
        "margin_median": float(np.median(margins)),
        "margin_quantiles": {f"{q:g}": float(np.quantile(margins, q)) for q in QUANTILES},
        "n_chosen_longer": int((longer > 0).sum()),
        "n_chosen_shorter": int((longer < 0).sum()),
        "accuracy_chosen_longer": among(longer > 0),
        "accuracy_chosen_shorter": among(longer < 0),
    }


@dataclass(frozen=True)
class Evaluation:
    """``metrics``: means over the items under TRL's names (no prefix). ``summary``: what they say,
    with 95% bootstrap intervals over prompts. ``margins`` [n]: of pairs, empty for anything else.
    """

    metrics: dict[str, float]
    summary: dict[str, Any]
    margins: np.ndarray


def preference_evaluation(
    margins: np.ndarray,
    lengths_chosen: np.ndarray,
    lengths_rejected: np.ndarray,
    items: Sequence[Encoded],
    metrics: dict[str, float],
) -> Evaluation:
    """Of n pairs: their `preference_summary`, over all and, where there are several, per source.

    Ties in the data, which no order is right for, are left out of it and counted (unless there is
    nothing else).
    """
    decided = np.array([item.preference != 0.5 for item in items])
    tied = len(items) - int(decided.sum())
    if 0 < tied < len(items):
        items = [item for item, kept in zip(items, decided, strict=True) if kept]
        margins, lengths_chosen, lengths_rejected = (
            x[decided] for x in (margins, lengths_chosen, lengths_rejected)
        )
    prompts = np.unique(
        np.array([item.prompt.tobytes() for item in items], dtype=object), return_inverse=True
    )[1]
    names = np.array([item.source or "" for item in items], dtype=object)
    sources = sorted(set(names))

    def summary(rows: np.ndarray) -> dict[str, Any]:
        return preference_summary(
            margins[rows], lengths_chosen[rows], lengths_rejected[rows], prompts[rows]
        )

    whole = summary(np.ones(len(items), dtype=bool)) | {"calibration": calibration(margins)}
    if tied:
        whole["tied_in_data"] = tied
    if len(sources) > 1:
        whole["sources"] = {name or "no source": summary(names == name) for name in sources}
        for name, part in whole["sources"].items():
            metrics[f"rewards/accuracies/{name}"] = part["accuracy"]
            metrics[f"rewards/margins/{name}"] = part["margin_mean"]
    return Evaluation(metrics, whole, margins)


def calibration(margins: np.ndarray, bins: int = 10) -> dict[str, Any]:
    """Whether sigmoid(margin) is the probability of being right. Plain numbers, ready for JSON.

    A pair is predicted to be ordered as its margin says with confidence sigmoid(|margin|), in
    [0.5, 1]; in each bin of confidence the mean of that is compared with the share that was right.
    A margin of 0 is a prediction of confidence 0.5 that is wrong. `ece` is the mean gap over the
    pairs (Guo et al. 2017, arXiv 1706.04599, eq. 3), `brier` the mean of (confidence - right)^2,
    `log_loss` that of -log sigmoid(margin), which 0.693 is for a coin.
    """
    margins = np.asarray(margins, dtype=np.float64)
    if margins.ndim != 1 or not margins.size or not np.isfinite(margins).all() or bins < 1:
        raise ValueError(f"calibration needs finite margins [n >= 1], got {margins.shape}")
    confidence, right = 1 / (1 + np.exp(-np.abs(margins))), margins > 0
    edges = np.linspace(0.5, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, bins - 1)
    table, gap = [], 0.0
    for i in range(bins):
        inside = place == i
        row: dict[str, Any] = {"low": float(edges[i]), "high": float(edges[i + 1])}
        row |= {"n": int(inside.sum()), "confidence": None, "accuracy": None}
        if inside.any():
            row["confidence"] = float(confidence[inside].mean())
            row["accuracy"] = float(right[inside].mean())
            gap += row["n"] * abs(row["accuracy"] - row["confidence"])
        table.append(row)
    return {
        "ece": float(gap / len(margins)),
        "brier": float(((confidence - right) ** 2).mean()),
        "log_loss": float(np.logaddexp(0, -margins).mean()),
        "bins": table,
    }
