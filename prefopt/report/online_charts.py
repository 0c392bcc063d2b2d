"""The curves of an online run: what it earns, how far it goes for it, what it does meanwhile."""

from __future__ import annotations

from typing import Any

import numpy as np

from prefopt.report.drawing import Chart, figure, held_out, level, line, optimizer_chart, trained
from prefopt.report.record import RunRecord, finite, number, series

HELD_OUT = "objective/held_out_scores"


def online_charts(run: RunRecord) -> list[Chart]:
    """All curves, in the order of the report; those of a critic only where there was one."""
    watched = bool(
        len(finite(run.train, HELD_OUT)) or len(finite(run.evals, "eval_held_out_scores"))
    )
    moves = np.ptp(coefficients) > 0 if len(coefficients := finite(run.train, KL_COEF)) else False
    about = "mean of the reward, over the samples of an update and over held-out prompts"
    also = "; beneath it the reward that is only watched" if watched else ""
    steered = "; beneath it the coefficient beta" if moves else ""
    charts = [
        _chart("Score", about + also, run, "score", _score, 2 if watched else 1),
        _chart(
            "Distance from the reference", f"KL, nats per response{steered}", run, "kl",
            _kl, 2 if moves else 1,
        ),
        _chart("Entropy", "nats per token: how undecided the policy is", run, "entropy", _entropy),
        _chart(
            "Length of the responses", "tokens, and the share that ends by itself", run, "length",
            _lengths, 2,
        ),
        _chart(
            "Size of the updates", "share of tokens that are clipped, and KL between the policy "
            "that sampled and the one that learns, nats per token", run, "clip", _clip, 2,
        ),
    ]  # fmt: skip
    if len(finite(run.train, "loss/value")):
        about = "its loss, and the share of the returns' variance that it explains"
        charts.append(_chart("Critic", about, run, "critic", _critic, 2))
    about = (
        "four-token sequences that repeat within a response; groups whose samples all score alike"
    )
    charts.append(_chart("Sameness", about, run, "same", _same))
    about = "tokens per second, while generating and while training"
    return [*charts, _chart("Speed", about, run, "speed", _speed), optimizer_chart(run, "update")]


KL_COEF = "objective/kl_coef"


def _chart(title: str, about: str, run: RunRecord, key: str, draw: Any, panels: int = 1) -> Chart:
    return Chart(title, about, figure(key, run, draw, panels, xlabel="update"))


def _score(axes: Any, run: RunRecord) -> bool:
    drawn = trained(axes[0], run.train, "objective/scores", "train", "training")
    drawn |= held_out(
        axes[0], run.evals, "eval_scores", "held", "held-out prompts, 95% interval", "scores"
    )
    if len(axes) > 1:
        drawn |= trained(axes[1], run.train, HELD_OUT, "rejected", "held-out reward")
        drawn |= held_out(axes[1], run.evals, "eval_held_out_scores", "held", "on held-out prompts")
    return drawn


def _kl(axes: Any, run: RunRecord) -> bool:
    drawn = trained(axes[0], run.train, "objective/kl", "train", "training")
    drawn |= held_out(axes[0], run.evals, "eval_kl", "held", "held-out prompts")
    target = number(run.config.get("kl.target"))
    level(axes[0], 0.0)
    if target is not None and drawn:
        level(axes[0], target, f"target {target:g}")
    if len(axes) > 1:
        line(axes[1], *series(run.train, KL_COEF), "ink", "beta")
        _from_zero(axes[1])
    return drawn


def _entropy(axes: Any, run: RunRecord) -> bool:
    drawn = trained(axes[0], run.train, "objective/entropy", "train", "training")
    _from_zero(axes[0])
    return drawn


def _lengths(axes: Any, run: RunRecord) -> bool:
    drawn = trained(axes[0], run.train, "lengths/mean", "train", "mean")
    drawn |= line(axes[0], *series(run.train, "lengths/max"), "muted", "longest")
    drawn |= held_out(axes[0], run.evals, "eval_lengths", "held", "held-out prompts")
    ends = trained(axes[1], run.train, "lengths/stop_rate", "chosen", "ends by itself")
    ends |= held_out(axes[1], run.evals, "eval_stop_rate", "held", "")
    _from_zero(axes[0])
    _share(axes[1])
    return drawn or ends


def _clip(axes: Any, run: RunRecord) -> bool:
    drawn = trained(axes[0], run.train, "policy/clipfrac", "train", "clipped")
    axes[0].set_ylim(0, max(0.01, axes[0].get_ylim()[1]))
    axes[0].yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    drawn |= trained(axes[1], run.train, "policy/approxkl", "ink", "approximate KL")
    _from_zero(axes[1])
    return drawn


def _critic(axes: Any, run: RunRecord) -> bool:
    drawn = trained(axes[0], run.train, "loss/value", "train", "value loss")
    _from_zero(axes[0])
    drawn |= trained(axes[1], run.train, "value/explained_variance", "ink", "explained variance")
    level(axes[1], 0.0, "a constant explains 0")
    return drawn


def _same(axes: Any, run: RunRecord) -> bool:
    drawn = trained(axes[0], run.train, "repetition", "train", "repeated 4-grams")
    drawn |= trained(axes[0], run.train, "groups/zero_variance", "rejected", "groups alike")
    _share(axes[0])
    return drawn


def _speed(axes: Any, run: RunRecord) -> bool:
    from prefopt.metrics import format_count

    drawn = trained(axes[0], run.train, "generate_tokens_per_s", "train", "generating")
    drawn |= trained(axes[0], run.train, "train_tokens_per_s", "rejected", "training")
    _from_zero(axes[0])
    axes[0].yaxis.set_major_formatter(lambda value, _: format_count(value))
    return drawn


def _from_zero(axis: Any) -> None:
    axis.set_ylim(0, 1.06 * axis.get_ylim()[1])


def _share(axis: Any) -> None:
    axis.set_ylim(-0.03, 1.03)
    axis.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])
