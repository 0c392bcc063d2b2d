"""The curves of a run on preferences or dialogues."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from prefopt.report.drawing import (
    COLOURS,
    Chart,
    figure,
    held_out,
    level,
    optimizer_chart,
    trained,
)
from prefopt.report.record import RunRecord, number, series


def draw_charts(run: RunRecord) -> list[Chart]:
    """All curves of a training run, in the order of the report."""
    optimizer = optimizer_chart(run)
    if run.kind == "sft":
        loss = Chart("Loss", "nats per token; lower is better", figure("loss", run, _loss))
        about = "held-out; the exponential of the loss: among how many tokens it is undecided"
        return [loss, Chart("Perplexity", about, figure("ppl", run, _perplexity)), optimizer]
    of_scores = run.kind == "reward"
    what = "score" if of_scores else "reward"
    charts = [
        Chart("Loss", f"per {run.unit}; lower is better", figure("loss", run, _loss)),
        Chart(
            "Score margin" if of_scores else "Reward margin",
            "chosen minus rejected score, mean per pair"
            if of_scores
            else "chosen minus rejected reward, mean per pair; reward = beta × (log-probability "
            "under the policy − under the reference)",
            figure("margin", run, _margin),
        ),
        Chart(
            "Preference accuracy",
            f"share of pairs whose chosen answer has the higher {what}; steps at which every pair "
            "is a tie are left out",
            figure("accuracy", run, _accuracy),
        ),
        Chart(
            "Scores" if of_scores else "Rewards",
            "of the chosen and of the rejected answer"
            + ("" if of_scores else "; below zero it is less likely than under the reference"),
            figure("rewards", run, _rewards),
        ),
    ]
    if not of_scores:
        about = "of the whole answer under the policy, in nats; solid trained on, dots held-out"
        charts.append(Chart("Log-probabilities", about, figure("logps", run, _logps)))
    about = "share of held-out pairs that are right, against what their margin promises: "
    about += "sigmoid(margin); on the dashed line it keeps its promise"
    reliability = figure("reliability", run, _reliability, xlabel="confidence")
    return [*charts, Chart("Calibration", about, reliability), optimizer]


def _loss(axes: Any, run: RunRecord) -> bool:
    axis = axes[0]
    drawn = trained(axis, run.train, "loss", "train", "training")
    drawn |= held_out(axis, run.evals, "eval_loss", "held", "held-out")
    first = series(run.train, "loss")[1][:1]
    if len(first) and abs(first[0] - math.log(2)) < 0.02:
        level(axis, math.log(2), "ln 2: nothing learned")
    return drawn


def _perplexity(axes: Any, run: RunRecord) -> bool:
    label = "held-out, 95% interval"
    return held_out(axes[0], run.evals, "eval_perplexity", "held", label, "perplexity")


def _reliability(axes: Any, run: RunRecord) -> bool:
    """After training; the size of a point is how many pairs it stands for."""
    after = run.evaluation.get("after")
    told = after.get("calibration") if isinstance(after, dict) else None
    rows = [row for row in (told or {}).get("bins", ()) if number(row.get("n"))]
    if not rows or (after or {}).get("ties") == (after or {}).get("n"):
        return False
    x, y, n = (np.array([row[key] for row in rows]) for key in ("confidence", "accuracy", "n"))
    axis = axes[0]
    dashed = {"color": COLOURS["muted"], "linewidth": 1, "linestyle": (0, (4, 3))}
    axis.plot([0.5, 1], [0.5, 1], **dashed)
    axis.plot(x, y, color=COLOURS["held"], linewidth=1.1)
    axis.scatter(x, y, s=20 + 180 * n / n.sum(), color=COLOURS["held"], zorder=4)
    ticks = [0, 0.25, 0.5, 0.75, 1]
    axis.set_yticks(ticks, [f"{tick:.0%}" for tick in ticks])
    axis.set_xticks([0.5, 0.6, 0.7, 0.8, 0.9, 1], ["50%", "60%", "70%", "80%", "90%", "100%"])
    axis.set_xlim(0.49, 1.01)
    axis.set_ylim(-0.03, 1.05)
    return True


def _margin(axes: Any, run: RunRecord) -> bool:
    drawn = trained(axes[0], run.train, "rewards/margins", "train", "training")
    drawn |= held_out(axes[0], run.evals, "eval_rewards/margins", "held", "held-out", "margin")
    level(axes[0], 0.0)
    return drawn


def _accuracy(axes: Any, run: RunRecord) -> bool:
    axis, key = axes[0], "rewards/accuracies"
    # All margins exactly 0: policy and reference are still equal, and nothing was compared.
    train = [row for row in run.train if row.get("rewards/margins") != 0]
    evals = [row for row in run.evals if row.get("eval_rewards/margins") != 0]
    drawn = trained(axis, train, key, "train", "training")
    drawn |= held_out(axis, evals, f"eval_{key}", "held", "held-out, 95% interval", "accuracy")
    level(axis, 0.5, "chance")
    axis.set_ylim(-0.03, 1.03)
    axis.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    return drawn


def _both(axis: Any, run: RunRecord, kind: str) -> bool:
    drawn = False
    for name in ("chosen", "rejected"):
        drawn |= trained(axis, run.train, f"{kind}/{name}", name, name)
        drawn |= held_out(axis, run.evals, f"eval_{kind}/{name}", name, "")
    return drawn


def _rewards(axes: Any, run: RunRecord) -> bool:
    level(axes[0], 0.0)
    return _both(axes[0], run, "rewards")


def _logps(axes: Any, run: RunRecord) -> bool:
    return _both(axes[0], run, "logps")
