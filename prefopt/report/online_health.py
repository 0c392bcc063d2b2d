"""What stands out in an online run: the alarms that went off, and what the whole of it shows."""

from __future__ import annotations

import math

from prefopt.report.health import Note, lost_rows, non_finite, ranked, spikes, unfinished
from prefopt.report.online import bounds, measured
from prefopt.report.record import Row, RunRecord, number
from prefopt.report.tables import signed, words

TITLES = {  # of the alarms, by name
    "ratio": "Old and new probabilities differ before learning",
    "kl_at_start": "The reference is not where the policy started",
    "negative_kl": "A negative KL",
    "sampler_gap": "Sampler and trainer disagree",
    "no_stop": "Responses do not end",
    "stops_fall": "Responses end less and less often",
    "zero_variance": "Samples score alike",
    "explained_variance": "The critic explains nothing",
    "entropy": "The policy says the same every time",
    "clip_fraction": "Large updates",
    "kl_budget": "Far from the reference",
    "reward_hacking": "The reward is exploited",
    "length_drift": "The length drifts",
    "repetition": "Responses repeat themselves",
}
WRONG = ("ratio", "kl_at_start", "negative_kl", "sampler_gap", "reward_hacking")


def online_notes(run: RunRecord) -> list[Note]:
    """The findings, worst first; one good note if there are none."""
    notes = [note for check in CHECKS if (note := check(run)) is not None]
    notes += alarm_notes(run)
    if run.train and not any(note.level in ("bad", "warn") for note in notes):
        text = "The checks of every update (ratio, KL, sampler, lengths, entropy, scores, critic) "
        notes.append(Note("good", "Nothing unusual", text + "found nothing to act on."))
    return ranked(notes)


def alarm_notes(run: RunRecord) -> list[Note]:
    """The alarms of `alarms.jsonl`: each once, as it was said last."""
    by_name: dict[str, list[Row]] = {}
    for row in run.alarms:
        by_name.setdefault(str(row.get("name")), []).append(row)
    notes = []
    for name, rows in by_name.items():
        steps = [f"{step:.0f}" for row in rows if (step := number(row.get("step"))) is not None]
        when = f" (update {', '.join(steps[-5:])})" if steps else ""
        title = TITLES.get(name, name.replace("_", " ").capitalize()) + when
        text, remedy = (words(rows[-1].get(part)) for part in ("message", "remedy"))
        notes.append(Note("bad" if name in WRONG else "warn", title, text, remedy))
    return notes


def not_better(run: RunRecord) -> Note | None:
    """What was held out says whether the run did what it was for. The errors of both means, a
    quarter of their 95% intervals, add up squared: the answers before and after are different."""
    means, errors = [], []
    for row in measured(run):
        mean, (low, high) = number(row.get("scores")), bounds(row)
        if mean is None or low is None or high is None:
            return None
        means.append(mean)
        errors.append((high - low) / 4)
    (first, last), error = means, math.hypot(*errors)
    if last - first > 2 * error:
        return None
    text = f"It went from {signed(first)} to {signed(last)}, which is within their noise"
    if last < first:
        text = f"It fell from {signed(first)} to {signed(last)}"
    return Note(
        "warn",
        "The held-out score did not clearly rise",
        f"{text}.",
        "If the score rises on the prompts trained on: more different prompts. If it does not: "
        "more updates, a higher learning rate, a lower beta, or a finer reward. More held-out "
        "prompts (eval_prompts) make the intervals narrower.",
    )


CHECKS = (non_finite, not_better, spikes, lost_rows, unfinished)
