"""What a report says of an online run: headline, evaluation, samples side by side."""

from __future__ import annotations

from typing import Any

import numpy as np

from prefopt.metrics import format_count, format_duration
from prefopt.report.record import Row, RunRecord, ends, finite, number
from prefopt.report.tables import MISSING, interval, percent, signed, words


def about_online(run: RunRecord) -> str:
    """By which reward and how it was trained: the words behind what it answered."""
    judge = _judge(run)
    estimator, loss, kind = (run.config.get(name) for name in ("estimator", "loss", "kl.kind"))
    how = f", with online {loss}" if loss == "dpo" else f", by the {loss} loss with {estimator}"
    how = how if isinstance(loss, str) and isinstance(estimator, str) else ""
    beta, target = (number(run.config.get(f"kl.{name}")) for name in ("beta", "target"))
    if beta:
        where, of = f", KL in the {run.config.get('kl.placement')}", f"{kind}, beta {beta:g}"
        where, of = ("", f"beta {beta:g}") if loss == "dpo" else (where, of)
        how += f"{where} ({of}, target {target:g} nats)" if target else f"{where} ({of})"
    return (f", judged by {judge}" if judge else "") + how


def _judge(run: RunRecord) -> str:
    """module:function and URLs as they are, folders by name, several by the names given them."""
    several = [key.removeprefix("reward.") for key in run.config if key.startswith("reward.")]
    named = run.config.get("reward")
    if several or not isinstance(named, str) or "://" in named:
        return " and ".join(several) or (named if isinstance(named, str) else "")
    parts = [part for part in named.replace("\\", "/").split("/") if part]
    return parts[-2] if len(parts) > 1 and parts[-1] == "model" else "".join(parts[-1:])


def online_cards(run: RunRecord) -> list[tuple[str, str, str, str]]:
    """(title, first, last, sentence) of score, distance and cost."""
    return [_score_card(run), _kl_card(run), _cost_card(run)]


def _score_card(run: RunRecord) -> tuple[str, str, str, str]:
    train = ends(finite(run.train, "objective/scores"))
    before, after = measured(run)
    old, new = (number(row.get("scores")) for row in (before, after))
    trained = "" if train is None else f"from {signed(train[0])} to {signed(train[1])}"
    if new is None:
        if train is None:
            return ("Score", MISSING, "", "No update was recorded.")
        text = f"The mean reward of the samples trained on went {trained}; none was held out."
        return ("Score", _short(train[0]), _short(train[1]), text)
    spread = interval(*bounds(after), signed, "95% interval ")
    count = number(after.get("n"))
    where = "held-out prompts" if count is None else f"{count:,.0f} held-out prompts"
    text = f"The mean reward of answers to {where} is {signed(new)}{spread}"
    if old is not None:
        text += f"; before training it was {signed(old)}{interval(*bounds(before), signed)}"
    text += f". On the prompts trained on it went {trained}." if trained else "."
    return ("Score", "" if old is None else _short(old), _short(new), text)


def _kl_card(run: RunRecord) -> tuple[str, str, str, str]:
    train, after = ends(finite(run.train, "objective/kl")), measured(run)[1]
    held, target = number(after.get("kl")), number(run.config.get("kl.target"))
    if train is None and held is None:
        return ("KL", MISSING, "", "The distance from the reference was not measured.")
    value = held if train is None else train[1]
    assert value is not None
    text = f"The policy is {value:.2f} nats per response away from its reference"
    if value < 0:
        text = f"The estimate is {signed(value)} nats per response, which is noise around 0"
    elif target:
        text += f", {abs(value / target - 1):.0%} {'above' if value > target else 'below'} its "
        text += f"target of {target:g}"
    text += "." if held is None or train is None else f"; on held-out prompts {held:.2f}."
    if len(beta := finite(run.train, "objective/kl_coef")) and np.ptp(beta):
        text += f" Beta went from {beta[0]:.3g} to {beta[-1]:.3g}."
    return ("KL", "", "about 0" if value < 0 else f"{value:.2f} nats", text)


def _cost_card(run: RunRecord) -> tuple[str, str, str, str]:
    seconds = finite(run.train, "elapsed_s")
    if not len(seconds):
        return ("Cost", MISSING, "", "No time was recorded.")
    samples = finite(run.train, "episodes")
    parts = {
        word: finite(run.train, f"seconds/{name}").sum()
        for name, word in (
            ("generate", "generating"),
            ("score", "scoring and log-probs"),
            ("train", "training"),
        )
    }
    total = sum(parts.values())
    text = f"{len(run.train):,} updates"
    text += f" from {samples[-1]:,.0f} samples" if len(samples) else ""
    if total:
        text += "; of the time, "
        text += ", ".join(f"{part / total:.0%} {word}" for word, part in parts.items())
    return ("Cost", "", format_duration(seconds.max()), f"{text}.")


def online_facts(run: RunRecord) -> list[tuple[str, str]]:
    """Counts and speeds of an online run, for the line of facts."""
    out = []
    for name, key in (("Samples", "episodes"), ("Tokens per response", "lengths/mean")):
        values = finite(run.train, key)
        last = ends(values)
        amount = values[-1] if key == "episodes" and len(values) else last and last[1]
        out.append((name, MISSING if amount is None or not len(values) else f"{amount:,.0f}"))
    for name, key in (("Generating", "generate_tokens_per_s"), ("Training", "train_tokens_per_s")):
        values = finite(run.train, key)
        rate = f"{format_count(float(np.median(values)))} tokens/s" if len(values) else MISSING
        out.append((name, rate))
    return out


def measured(run: RunRecord) -> tuple[Row, Row]:
    """What was measured on held-out prompts before and after; the names without `eval_`."""
    stages = [run.evaluation.get(stage) for stage in ("before", "after")]
    before, after = (stage if isinstance(stage, dict) else {} for stage in stages)
    rows = [row for row in run.evals if "eval_scores" in row]
    held = [{key.removeprefix("eval_"): value for key, value in row.items()} for row in rows]
    if not before and held and number(held[0].get("step")) == 0:
        before = held[0]
    if not after and len(held) > 1:
        after = held[-1]
    return before, after


def online_evaluation(run: RunRecord) -> list[tuple[str, str, str]]:
    """(what, before, after) on held-out prompts."""
    before, after = measured(run)
    if not before and not after:
        return []
    shows: tuple[tuple[str, str, Any], ...] = (
        ("Prompts", "n", "{:,.0f}".format),
        ("Score, mean (95% interval)", "scores", signed),
        ("Held-out reward, mean", "held_out_scores", signed),
        ("KL, nats per response", "kl", signed),
        ("Tokens per response", "lengths", "{:.1f}".format),
        ("Ends by itself", "stop_rate", percent),
    )
    rows = []
    for name, key, show in shows:
        cells = []
        for row in (before, after):
            value = number(row.get(key))
            spread = interval(*bounds(row), show) if key == "scores" else ""
            cells.append("–" if value is None else show(value) + spread)
        if cells != ["–", "–"]:
            rows.append((name, *cells))
    return rows


def online_samples(run: RunRecord) -> list[dict[str, Any]]:
    """Per held-out prompt: {"prompt", "before", "middle", "after", "between"}.

    Without held-out prompts, the samples of the first, the middle and the last update that any of
    the prompts trained on was sampled in.
    """
    held = [row for row in run.samples if row.get("stage") != "train"]
    groups: dict[str, list[Row]] = {}
    for row in held or run.samples:
        groups.setdefault(words(row.get("prompt")), []).append(row)
    out = []
    for prompt, rows in groups.items():
        cells = [(_place(row), _cell(row)) for row in rows]
        at = {place: cell for place, cell in cells if place in ("before", "after")}
        rest = [cell for place, cell in cells if place not in ("before", "after")]
        if not held and len(rest) > 1:
            at = {"before": rest.pop(0), "after": rest.pop()}
        middle = rest.pop(len(rest) // 2) if rest else None
        sides = {"before": at.get("before"), "middle": middle, "after": at.get("after")}
        out.append({"prompt": prompt, **sides, "between": rest})
    whole = [group for group in out if group["before"] and group["after"]]
    return whole or out


def _place(row: Row) -> str:
    return words(row.get("stage"))


def _cell(row: Row) -> dict[str, str]:
    step, score, kl, tokens = (number(row.get(key)) for key in ("step", "score", "kl", "tokens"))
    stage = _place(row)
    update = "" if step is None else f"Update {step:.0f}"
    title = {"before": "Before", "after": "After", "during": update, "train": update}
    said = [
        *([] if score is None else [f"score {_short(score)}"]),
        *([] if kl is None else [f"{kl:.1f} nats".replace("-", "−")]),
        *([] if tokens is None else [f"{tokens:.0f} tokens"]),
        *(["cut off"] if row.get("finish") == "length" else []),
    ]
    return {
        "title": title.get(stage, stage) or stage,
        "response": words(row.get("response")),
        "finish": " · ".join(said),
    }


def bounds(row: Row) -> tuple[float | None, float | None]:
    """The 95% interval of the mean score."""
    low, high = (number(row.get(f"scores_{end}")) for end in ("low", "high"))
    return low, high


def _short(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")
