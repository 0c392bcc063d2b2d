"""The page: its headline in words and numbers, and the template filled in."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prefopt.environment import environment_rows
from prefopt.metrics import format_count, format_duration
from prefopt.report.online import (
    about_online,
    online_cards,
    online_evaluation,
    online_facts,
    online_samples,
)
from prefopt.report.record import Row, RunRecord, ends, finite, number
from prefopt.report.tables import (
    MISSING,
    data_tables,
    evaluation_rows,
    interval,
    percent,
    sample_pairs,
    signed,
    stage_rows,
)

MAX_SAMPLES = 24


class Card(NamedTuple):
    """One headline figure: where it began, where it ended, and a sentence."""

    title: str
    first: str
    last: str
    sentence: str


def page(run: RunRecord) -> str:
    """The whole page as HTML. All text from files is escaped; only our own SVG is not."""
    from markupsafe import Markup

    from prefopt.report.charts import draw_charts
    from prefopt.report.health import health_notes
    from prefopt.report.online_charts import online_charts
    from prefopt.report.online_health import online_notes

    online = run.kind == "online"
    drawn = online_charts(run) if online else draw_charts(run)
    charts = [chart._replace(svg=Markup(chart.svg)) for chart in drawn]
    samples = online_samples(run) if online else sample_pairs(run)
    return _template().render(
        run=run,
        missing=MISSING,
        about=about(run),
        cards=_cards(run),
        stages=stage_rows(run),
        facts=facts(run),
        notes=online_notes(run) if online else health_notes(run),
        charts=charts,
        evaluation=online_evaluation(run) if online else evaluation_rows(run),
        samples=samples[:MAX_SAMPLES],
        more_samples=max(0, len(samples) - MAX_SAMPLES),
        data=data_tables(run.data),
        environment=environment_rows(run.env) if run.env else [],
    )


def _cards(run: RunRecord) -> list[Card]:
    if run.kind == "online":
        return [Card(*card) for card in online_cards(run)]
    cards = _likelihood_cards if run.kind == "sft" else _preference_cards
    return [_loss_card(run), *cards(run)]


@functools.cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["flags"] = _unbroken_flags
    return environment.get_template("template.html.j2")


def _unbroken_flags(text: str) -> Any:
    """The text, escaped, with no line break inside a --flag."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"--[\w.]+", r'<span class="nowrap">\g<0></span>', str(escape(text))))


def about(run: RunRecord) -> str:
    """What was trained, on what and how, in one sentence."""
    model, data = (_base_name(run.setting(key)) for key in ("model", "data"))
    if not model and not data and run.kind != "online":
        return "What was trained, and on what, is not recorded."
    if run.kind == "online":
        answers = f"answers of its own to {f'the prompts of {data}' if data else 'prompts'}"
        answers += about_online(run)
        return f"{model or 'A model'}, trained on {answers}{_adapter(run)}."
    loss, beta = run.setting("loss"), number(run.setting("beta"))
    how = {"sft": " by imitation", "reward": " as a reward model"}.get(run.kind, "")
    how += f" with the {loss} loss" if isinstance(loss, str) else ""
    how += f" (beta {beta:g})" if how and beta is not None else ""
    how += _adapter(run)
    on = f"trained on {data}" if data else "trained on data that are not recorded"
    return f"{model or 'A model'}, {on}{how}."


def _adapter(run: RunRecord) -> str:
    rank = run.setting("lora.r")
    if isinstance(rank, int):
        return f", LoRA of rank {rank}"
    return ", all weights" if "lora" in run.config and run.config["lora"] is None else ""


def facts(run: RunRecord) -> list[tuple[str, str]]:
    """Size, time, speed and memory of the run."""
    kept, epochs = number(run.data.get("kept")), finite(run.train, "epoch")
    steps, seconds = finite(run.train, "step"), finite([*run.train, *run.evals], "elapsed_s")
    rate, memory = finite(run.train, "tokens_per_s"), finite(run.train, "peak_memory_bytes")
    useful = finite(run.train, "flop_utilization")
    size = f"{steps[-1]:,.0f}" if len(steps) else MISSING
    plural = "" if len(epochs) and round(epochs[-1], 3) == 1 else "s"
    epoch = f" ({epochs[-1]:.3g} epoch{plural})" if len(epochs) else ""
    online = run.kind == "online"
    out = [
        (f"{run.unit.capitalize()}s read", MISSING if kept is None else f"{kept:,.0f}"),
        ("Updates" if online else "Steps", size + epoch),
        ("Time", format_duration(seconds.max()) if len(seconds) else MISSING),
        *(online_facts(run) if online else [("Tokens per second", _rate(rate))]),
        ("Peak memory", _gib(memory.max()) if len(memory) else MISSING),
    ]
    if len(useful):
        out.append(("Useful FLOPs", f"{np.median(useful):.0%} of GEMM"))
    return out


def _rate(values: np.ndarray) -> str:
    return format_count(float(np.median(values))) if len(values) else MISSING


def _loss_card(run: RunRecord) -> Card:
    train, held = ends(finite(run.train, "loss")), finite(run.evals, "eval_loss")
    if train is None:
        return Card("Loss", MISSING, "", "No training step was recorded.")
    count = min(20, max(1, len(finite(run.train, "loss")) // 10))
    over = f" (mean of the last {count} logged steps)" if count > 1 else ""
    text = f"Training loss went from {train[0]:.4f} to {train[1]:.4f}{over}"
    if len(held) > 1:
        text += f"; on held-out {run.unit}s it went from {held[0]:.4f} to {held[-1]:.4f}"
    elif len(held):
        text += f"; on held-out {run.unit}s it is {held[-1]:.4f}"
    return Card("Loss", f"{train[0]:.3f}", f"{train[1]:.3f}", text + ".")


def _likelihood_cards(run: RunRecord) -> list[Card]:
    stages = (run.evaluation.get(stage) for stage in ("before", "after"))
    before, after = (stage if isinstance(stage, dict) else {} for stage in stages)
    old, new = (number(stage.get("perplexity")) for stage in (before, after))
    if new is None:
        return [Card("Perplexity", MISSING, "", "No evaluation was recorded.")]
    low, high = (number(after.get(f"perplexity_{end}")) for end in ("low", "high"))
    bounds = interval(low, high, "{:.2f}".format, "95% interval ")
    text = f"Held-out perplexity is {new:.2f}{bounds}"
    text += f" over {number(after.get('n')) or 0:,.0f} dialogues"
    text += "." if old is None else f"; before training it was {old:.2f}."
    return [Card("Perplexity", "" if old is None else f"{old:.2f}", f"{new:.2f}", text)]


class _Measured(NamedTuple):
    """Accuracy and margin at one point of the run, (value, low, high), as far as recorded."""

    when: str
    accuracy: tuple[float, float | None, float | None] | None
    margin: tuple[float, float | None, float | None] | None
    tied: bool  # every pair: the policy is its own reference
    pairs: float | None


def _preference_cards(run: RunRecord) -> list[Card]:
    before, after, where = _measured(run)
    where = f"{after.pairs:,.0f} {where}" if after.pairs else where
    cards, name = [], "score" if run.kind == "reward" else "reward"
    for title, key, show, what, over in (
        ("Accuracy", "accuracy", percent, f"The chosen answer has the higher {name} in", "of"),
        ("Margin", "margin", signed, f"Chosen minus rejected {name} is", "on average over"),
    ):
        old, new = getattr(before, key), getattr(after, key)
        if new is None:
            cards.append(Card(title, MISSING, "", "No evaluation was recorded."))
            continue
        amount = f"{show(new[0])}{interval(new[1], new[2], show, '95% interval ')}"
        if before.tied:
            was = "every pair was a tie, because the model was still its own reference"
        elif old is not None:
            was = f"it was {show(old[0])}{interval(old[1], old[2], show)}"
        else:
            was = "it was not measured"
        text = f"{what} {amount} {over} {where}; {before.when} {was}."
        first = "tied" if before.tied and key == "accuracy" else show(old[0]) if old else ""
        cards.append(Card(title, first, show(new[0]), text))
    return cards


def _measured(run: RunRecord) -> tuple[_Measured, _Measured, str]:
    """(start, end, of which pairs): the final evaluation, else held-out rows, else training."""
    before, after = (run.evaluation.get(stage) for stage in ("before", "after"))
    if isinstance(after, dict):
        start = before if isinstance(before, dict) else {}
        first, last = (_point(row, "accuracy", "margin_mean", "") for row in (start, after))
        return first, last, "held-out pairs"
    names = ("rewards/accuracies", "rewards/margins")
    held = [row for row in run.evals if number(row.get(f"eval_{names[0]}")) is not None]
    if held:
        right, margin = (f"eval_{name}" for name in names)
        start = held[0] if len(held) > 1 else {}
        when = f"at step {number(start.get('step')):.0f}" if start else "before training"
        first, last = (_point(row, right, margin, "eval_", when) for row in (start, held[-1]))
        return first, last, "held-out pairs"
    values = {name: ends(finite(run.train, name)) for name in names}
    first, last = ({k: v[i] for k, v in values.items() if v} for i in (0, 1))
    when = "at the first step"
    return _point(first, *names, "", when), _point(last, *names, "", when), "training pairs"


def _point(
    row: Row, accuracy: str, margin: str, prefix: str, when: str = "before training"
) -> _Measured:
    keys = ("accuracy_low", "accuracy_high", "margin_low", "margin_high", "ties", "n")
    cells = [number(row.get(key)) for key in (accuracy, margin, *(prefix + key for key in keys))]
    right, mean, low, high, margin_low, margin_high, ties, pairs = (
        None if cell is None or math.isnan(cell) else cell for cell in cells
    )
    return _Measured(
        when,
        None if right is None else (right, low, high),
        None if mean is None else (mean, margin_low, margin_high),
        tied=(right == 0 and mean == 0) or (bool(pairs) and ties == pairs),
        pairs=pairs,
    )


def _base_name(value: Any) -> str:
    return str(value).rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1] if value else ""


def _gib(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
