"""What an experienced eye would say about the curves, in plain words, with a remedy each.

A check is a function of the run that returns a `Note` or None. Where the same pairs were measured
twice (held-out rows), that is used; single training batches only where nothing else exists.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from prefopt.report.record import RunRecord, ends, finite, number, series

LN2 = math.log(2)


class Note(NamedTuple):
    """One finding. `remedy` is empty where nothing needs doing."""

    level: Literal["bad", "warn", "good", "info"]
    title: str
    text: str
    remedy: str = ""


def health_notes(run: RunRecord) -> list[Note]:
    """The findings, worst first; one good note if no check found anything."""
    notes = [note for check in CHECKS if (note := check(run)) is not None]
    if run.train and not any(note.level in ("bad", "warn") for note in notes):
        words = f"{len(CHECKS)} checks of loss, margins, log-probabilities, gradients, data and "
        notes.append(Note("good", "Nothing unusual", words + "samples found nothing to act on."))
    return ranked(notes)


def ranked(notes: list[Note]) -> list[Note]:
    """Worst first, else as they come."""
    return sorted(notes, key=lambda note: ("bad", "warn", "info", "good").index(note.level))


def non_finite(run: RunRecord) -> Note | None:
    for row in sorted((*run.train, *run.evals), key=lambda row: number(row["step"]) or 0.0):
        named = row.get("non_finite")  # the log names what it could only write as null
        bad = [str(key) for key in named] if isinstance(named, dict | list) else []
        bad += [key for key, v in row.items() if isinstance(v, float) and not math.isfinite(v)]
        if bad:
            step = number(row["step"])
            return Note(
                "bad",
                "Values that are no numbers",
                f"{', '.join(bad)} became infinite or undefined at step {step:.0f}.",
                "Lower the learning rate or lengthen the warm-up; with float16, use bfloat16 or "
                "float32.",
            )
    return None


def never_moved(run: RunRecord) -> Note | None:
    margins = finite(run.train, "rewards/margins")
    if len(margins) < 3 or np.abs(margins).max() > 1e-6:
        return None
    return Note(
        "bad",
        "The policy did not move",
        "Every reward margin stayed at zero: the policy is still equal to its reference.",
        "Check that the adapter's targets match layers of this model, that the learning rate is "
        "not zero, and that chosen and rejected answers differ after truncation.",
    )


def not_learning(run: RunRecord) -> Note | None:
    loss = ends(finite(run.train, "loss"))
    if loss is None or never_moved(run) or len(finite(run.train, "loss")) < 10:
        return None
    first, last = loss
    if abs(first - LN2) > 0.02 or last < LN2 - 0.01:
        return None
    verb = "rose above" if last > LN2 + 0.02 else "did not come below"
    return Note(
        "bad" if last > LN2 + 0.02 else "warn",
        "The loss says nothing was learned",
        f"It {verb} ln 2 = 0.693, the loss of a model with no preference ({last:.3f} at the end).",
        "Read a few pairs: are chosen and rejected the right way round, and does the better one "
        "differ visibly? Then raise the learning rate a little, lower beta or train longer. If "
        "the loss rose, the learning rate is too high.",
    )


def displacement(run: RunRecord) -> Note | None:
    """Razin et al. 2024, arXiv:2410.08847: the likelihood of the chosen answer falls as well."""
    moved = []
    for name in ("chosen", "rejected"):
        held = finite(run.evals, f"eval_logps/{name}")
        if len(held) >= 2:
            moved.append(float(held[-1] - held[0]))
            continue
        # A batch has its own pairs, so log-probs of two batches do not compare; rewards do.
        reward, beta = ends(finite(run.train, f"rewards/{name}")), number(run.setting("beta"))
        if reward is None or not beta or not math.isfinite(beta):
            return None
        moved.append(reward[1] / beta)
    level = ends(np.abs(finite(run.train, "logps/chosen")))
    noticeable = max(1.0, 0.05 * level[1]) if level else 1.0
    if moved[0] > -noticeable or moved[1] > 0:
        return None
    return Note(
        "warn",
        "Both answers became less likely",
        f"The log-probability of the chosen answer fell by {-moved[0]:.1f} nats and that of the "
        f"rejected one by {-moved[1]:.1f}: the margin grows because the rejected answer falls "
        "faster, and probability moves to answers in neither column (likelihood displacement). "
        "Some of this is usual for DPO.",
        "If the samples got worse: fine-tune on the chosen answers first, raise beta, lower the "
        "learning rate or train shorter; drop pairs whose two answers are nearly alike.",
    )


def overfitted(run: RunRecord) -> Note | None:
    train = ends(finite(run.train, "rewards/accuracies"))
    held = finite(run.evals, "eval_rewards/accuracies")
    if train is None or not len(held) or train[1] <= 0.98 or train[1] - held[-1] < 0.1:
        return None
    return Note(
        "warn",
        "Learned by heart",
        f"Accuracy is {train[1]:.0%} on training pairs and {held[-1]:.0%} on held-out pairs.",
        "Train for fewer epochs, lower the learning rate, or add pairs on other prompts.",
    )


def past_the_best(run: RunRecord) -> Note | None:
    steps, values = series(run.evals, "eval_loss")
    good = np.isfinite(values)
    steps, values = steps[good], values[good]
    if len(values) < 3 or values[-1] - values.min() < 0.02 * abs(values.min()) + 1e-3:
        return None
    best = int(values.argmin())
    return Note(
        "warn",
        "The best point was earlier",
        f"Held-out loss was lowest at step {steps[best]:.0f} ({values[best]:.4f}) and is "
        f"{values[-1]:.4f} at the end.",
        "Stop near that step (max_steps), or use the checkpoint nearest to it.",
    )


def near_chance(run: RunRecord) -> Note | None:
    after = run.evaluation.get("after")
    after = after if isinstance(after, dict) else {}
    row = run.evals[-1] if run.evals else {}
    low = number(after.get("accuracy_low", row.get("eval_accuracy_low")))
    high = number(after.get("accuracy_high", row.get("eval_accuracy_high")))
    if low is None or high is None or not low <= 0.5 <= high:
        return None
    return Note(
        "warn",
        "Not distinguishable from guessing",
        f"The 95% interval of held-out accuracy, {low:.0%} to {high:.0%}, contains 50%.",
        "More held-out pairs make the interval narrower; more training pairs, clearer differences "
        "between the two answers or more steps move it.",
    )


def spikes(run: RunRecord) -> Note | None:
    steps, values = series(run.train, "grad_norm")
    good = np.isfinite(values)
    steps, values = steps[good], values[good]
    if len(values) < 10 or values.max() < 20 * max(float(np.median(values)), 1e-12):
        return None
    return Note(
        "warn",
        "Gradient spikes",
        f"The gradient norm reached {values.max():.3g} at step {steps[values.argmax()]:.0f}, "
        f"{values.max() / max(float(np.median(values)), 1e-12):.0f} times its median.",
        "Clipping (max_norm) limits the damage of one spike; if they recur, lower the learning "
        "rate and look at the pairs of that step.",
    )


def saturated(run: RunRecord) -> Note | None:
    loss, margin = ends(finite(run.train, "loss")), ends(finite(run.train, "rewards/margins"))
    if loss is None or margin is None or loss[1] > 0.01 or margin[1] < 5:
        return None
    return Note(
        "warn",
        "The loss is used up",
        f"Training loss {loss[1]:.4f} with margins of {margin[1]:.1f}: the pairs teach nothing "
        "more, further steps only push the policy away from its reference.",
        "Train shorter or lower the learning rate, and check that nothing trivial (a fixed phrase, "
        "a missing end) separates chosen from rejected.",
    )


def lost_rows(run: RunRecord) -> Note | None:
    rows, kept = number(run.data.get("rows")), number(run.data.get("kept"))
    if not rows or kept is None or not kept < 0.8 * rows:
        return None
    return Note(
        "warn",
        "Many rows were not used",
        f"{rows - kept:,.0f} of {rows:,.0f} rows were dropped while reading the data.",
        "The reasons are counted under Data below.",
    )


def run_on(run: RunRecord) -> Note | None:
    before, after = (cut_share(run, stage) for stage in ("before", "after"))
    if before is None or after is None or after < 0.5 or after < before + 0.25:
        return None
    return Note(
        "warn",
        "Answers no longer end",
        f"{after:.0%} of the sampled answers ran into the length limit after training, "
        f"{before:.0%} before.",
        "Longer answers may be winning in the data: compare the lengths of chosen and rejected; "
        "check that truncation does not cut the ends off (max_length), and raise beta.",
    )


def cut_share(run: RunRecord, stage: str) -> float | None:
    """Share of the samples of a stage that ended at the length limit."""
    ended = [s.get("finish") for s in run.samples if s.get("stage") == stage and s.get("finish")]
    return sum(finish == "length" for finish in ended) / len(ended) if ended else None


def unfinished(run: RunRecord) -> Note | None:
    if run.finished:
        return None
    step: Any = number(run.train[-1].get("step")) if run.train else None
    last = "no training step was recorded" if step is None else f"the last step is {step:.0f}"
    return Note(
        "info",
        "This run has not finished",
        f"No final model was written; {last}.",
        "Continue it with --resume auto.",
    )


CHECKS: tuple[Callable[[RunRecord], Note | None], ...] = (
    non_finite,
    never_moved,
    not_learning,
    near_chance,
    overfitted,
    past_the_best,
    displacement,
    saturated,
    spikes,
    run_on,
    lost_rows,
    unfinished,
)
